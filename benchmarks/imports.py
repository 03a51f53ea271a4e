"""How long imports take, each in a new process, beyond those of JAX, Equinox and optax."""

import os
import subprocess
import sys

from .gradients import Ways
from .interleave import Way
from .peers import is_installed


BASE = "import jax, equinox, optax"
MODULES = ["vgrad_eqx", "brainunit", "saiunit", "brainstate", "flax.nnx"]


def measure(module: str) -> float:
    """Seconds, with the bytecode of Python cached."""
    # A garbage collection of what JAX has made could fall into the import, so it comes before.
    code = (
        f"{BASE}\nimport gc, time\ngc.collect()\nstart = time.perf_counter()\n"
        f"import {module}\nprint(time.perf_counter() - start)"
    )
    env = {key: value for key, value in os.environ.items() if "DONTWRITEBYTECODE" not in key}
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env
    )
    return float(result.stdout)


def imports(_: int) -> Ways:
    return {
        module: Way(lambda module=module: measure(module), is_timer=True)
        for module in MODULES
        if is_installed(module)
    }
