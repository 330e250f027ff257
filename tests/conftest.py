"""For every test: its tier, how it is compiled, strict settings and eight host devices.

Tests of the tier ``compiled`` read or need XLA's optimized program, so they compile as users do, and without a cache.
All others compile without LLVM's expensive passes, into a cache in the virtual environment. XLA reads its flags once,
so the two cannot share a process: which one this is follows from ``-m``.
"""

import os
import re
import sys
from pathlib import Path

import jax
import peers
import pytest
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

TIERS = ("unit", "compiled", "examples", "benchmarks", "long", "property")
DEVICES = "--xla_force_host_platform_device_count=8"
LEVEL = "--xla_backend_optimization_level"
QUICK = (f"{LEVEL}=0", "--xla_llvm_disable_expensive_passes=true")


# Of the tier ``property``. A test says how many cases it runs per hundred of ``max_examples``, see strategies.py.
settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=100,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("hunt", settings.get_profile("ci"), derandomize=False, max_examples=500, print_blob=True)
settings.load_profile("ci")


def pytest_configure(config):
    """Before a test module is imported, and with that XLA's flags are read."""
    asked = config.option.markexpr
    by_name = set(re.findall(r"\w+", re.sub(r"\bnot \w+", "", asked)))
    whole = not asked or bool(by_name & {"compiled", "long"})
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = any(flag.startswith(LEVEL) for flag in flags)  # by whoever wants another level
    flags += [flag for flag in (DEVICES, *QUICK * (not whole and not given)) if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if QUICK[0] in flags:
        only_where_compiled()
        if sys.prefix != sys.base_prefix:
            folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(sys.prefix, "jax-cache")))
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def only_where_compiled():
    """Let a test fail that reads the compiled program and is not marked ``compiled``."""

    def refuse(*args, **kwargs):
        pytest.fail("this is not the program that users get: mark the test as compiled, or long")

    for name in ("as_text", "memory_analysis", "cost_analysis"):
        setattr(jax.stages.Compiled, name, refuse)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is in no other tier is in ``unit``."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker("unit")


def pytest_runtest_setup(item):
    if QUICK[0] in os.environ["XLA_FLAGS"].split() and item.get_closest_marker("compiled"):
        pytest.fail("this process compiles without LLVM's expensive passes: run the test with -m compiled")


def pytest_runtest_teardown(item, nextitem):
    """Let the programs of a file go with its last test: kept, those of all files are gigabytes."""
    if nextitem is not None and nextitem.path != item.path:
        jax.clear_caches()


@pytest.fixture
def need():
    """Return a function that skips a test without a library, or fails it where the library is required."""
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
