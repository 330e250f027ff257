"""Strict settings and eight host devices for every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import peers
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def need():
    """Return a function that skips a test without a library, or fails it where all of them are required."""
    return peers.require


@pytest.fixture
def usual_promotion():
    """The settings that the other libraries are written for."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
