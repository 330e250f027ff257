"""Settings of all tests: tiers, compiler flags, strict promotion, and eight host devices.

Tests of the tiers ``compiled``, ``long`` and ``accelerators`` compile as users do, without a cache. All others compile
without LLVM's expensive passes, into a cache in the virtual environment. XLA reads its flags only once, so the two
kinds cannot share a process: ``-m`` decides which kind this process runs.
"""

import os
import re
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import jax
import peers
import pytest
from hypothesis import HealthCheck, Phase, settings
from xla_flags import DEVICES, LEVEL, QUICK

from jdrop._platform import PLATFORMS

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

TIERS = ("unit", "compiled", "docs", "examples", "benchmarks", "long", "property", "accelerators")

# Of the tier ``property``. A test says how many cases it runs per hundred of ``max_examples``, see strategies.py.
settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=60,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("few", settings.get_profile("ci"), max_examples=15)
settings.register_profile("hunt", settings.get_profile("ci"), derandomize=False, max_examples=300, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--one-in", type=int, default=1, metavar="N", help="run about 1/N of the cases of each test, at least one"
    )


def pytest_configure(config):
    """Set XLA's flags before any test module is imported, which makes XLA read them."""
    config.addinivalue_line("markers", "every_case: --one-in takes all cases, because they run only on the newest JAX")
    expression = config.option.markexpr
    by_name = set(re.findall(r"\w+", re.sub(r"\bnot \w+", "", expression)))
    as_users = not expression or bool(by_name & {"compiled", "long", "accelerators"})
    if "accelerators" in by_name:
        jax.config.update("jax_platforms", "cpu")  # otherwise, JAX would look for the devices of its plugins
    flags = os.environ.get("XLA_FLAGS", "").split()
    has_level = any(flag.startswith(LEVEL) for flag in flags)  # set by the caller
    flags += [flag for flag in (DEVICES, *QUICK * (not as_users and not has_level)) if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if QUICK[0] in flags:
        forbid_reading_programs()
        if sys.prefix != sys.base_prefix:
            folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(sys.prefix, "jax-cache")))
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def forbid_reading_programs():
    """Make tests fail that read a compiled program but are not marked ``compiled``."""

    def refuse(*args, **kwargs):
        pytest.fail("users get another program than this one: mark the test as compiled or long")

    for name in ("as_text", "memory_analysis", "cost_analysis"):
        setattr(jax.stages.Compiled, name, refuse)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Add tests without a tier to the tier ``unit``, and require that each tier has tests."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker("unit")
    paths = [config.rootpath / path for path in config.getini("testpaths")]
    if [config.rootpath / path for path in config.args] == paths:
        empty = [tier for tier in TIERS if not any(item.get_closest_marker(tier) for item in items)]
        if empty:
            raise pytest.UsageError(f"no tests in tiers {empty}")
    take_one_in(config, items, config.option.one_in)


def take_one_in(config, items, n):
    """Deselect all but about 1/n of the cases of each test in each tier: by a hash, so that all parameters vary."""
    cases = defaultdict(list)
    for item in items:
        tiers = [mark.name for mark in item.iter_markers() if mark.name in TIERS]
        cases[item.nodeid.split("[")[0], *tiers].append(item)
    kept = {item for item in items if item.get_closest_marker("every_case")}
    for of_test in cases.values():
        kept.update([item for item in of_test if zlib.crc32(item.nodeid.encode()) % n == 0] or of_test[:1])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item):
    if QUICK[0] in os.environ["XLA_FLAGS"].split() and item.get_closest_marker("compiled"):
        pytest.fail("this process compiles without LLVM's expensive passes: run the test with -m compiled")


def pytest_runtest_teardown(item, nextitem):
    """Free the compiled programs of a file after its last test: those of all files take gigabytes."""
    if nextitem is not None and nextitem.path != item.path:
        jax.clear_caches()


@pytest.fixture
def need():
    """Return a function that imports a library, or else skips the test, or fails it if the library is required."""
    return peers.require


@pytest.fixture
def usual_promotion():
    """Allow the promotions that the other libraries rely on."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def use_on_cpu(monkeypatch):
    """Return a function that replaces the forms for CPU."""

    def use(forms):
        jax.clear_caches()
        monkeypatch.setitem(PLATFORMS, "cpu", forms)

    yield use
    jax.clear_caches()
