"""Strict settings and eight host devices for every test."""

import importlib.util
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def need():
    """Return a function that skips a test without a library, or fails it where all of them are required."""

    def check(name):
        if importlib.util.find_spec(name) is None:
            if os.environ.get("JDROP_PEERS") == "required":
                pytest.fail(f"{name} is required here and is not installed")
            pytest.skip(f"{name} is not installed")

    return check


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
