import importlib
import os
from importlib.metadata import version

import equinox.internal as eqxi
import hypothesis
import jax
import pytest


# To import brainstate 0.5 turns x64 off, so it is done before any test, and x64 set back.
x64 = jax.config.read("jax_enable_x64")
importlib.import_module("brainstate")
jax.config.update("jax_enable_x64", x64)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A GPU would keep ten bits of the numbers that it multiplies.
jax.config.update("jax_default_matmul_precision", "highest")
# Compiling is most of the time of an example, and its share of it varies from run to run.
for profile, max_examples in {"quick": 10, "slow": 50}.items():
    hypothesis.settings.register_profile(
        profile, deadline=None, max_examples=max_examples, derandomize=True
    )


# Nobody imports it, not even to look for doctests.
collect_ignore = ["typing/programs.py"]


def pytest_addoption(parser):
    for mark in ("slow", "nightly"):
        parser.addoption(f"--{mark}", action="store_true", help=f"run the {mark} tests as well")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Runs a whole suite, but not a named part, in as many processes as there are cores."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_worker = hasattr(config, "workerinput")
    if is_whole and not is_worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"


def runs_slow_tests(config):
    return config.getoption("--slow") or config.getoption("--nightly")


def share_programs(config):
    """Lets the processes of a run, and the next run, share what they compile.

    To compile is two thirds of the time of the tests. `pytest --cache-clear` forgets it.
    """
    if not hasattr(config, "cache"):
        return
    options = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for the processes that tests start


def pytest_configure(config):
    share_programs(config)
    is_slow = runs_slow_tests(config)
    hypothesis.settings.load_profile("slow" if is_slow else "quick")
    # Takes a third from the time of compiling. Later versions have no other code for fusions.
    if not is_slow and version("jaxlib").startswith("0.10."):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


def pytest_runtest_setup(item):
    """Compiles without optimizing, but with the slow tests what is marked `optimized`.

    Half of the time of the tests is that of the compiler.
    """
    is_optimized = runs_slow_tests(item.config) and item.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", not is_optimized)


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests that were not asked for."""
    left_out = [mark for mark in ("slow", "nightly") if not config.getoption(mark)]
    chosen = [not any(map(item.get_closest_marker, left_out)) for item in items]
    config.hook.pytest_deselected(
        items=[item for item, is_chosen in zip(items, chosen, strict=True) if not is_chosen]
    )
    items[:] = [item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen]


def pytest_report_header():
    versions = [f"{name} {version(name)}" for name in ("jax", "equinox", "optax", "brainunit")]
    return f"{', '.join(versions)}, {jax.numpy.result_type(float)}"


@pytest.fixture
def getkey():
    return eqxi.GetKey()
