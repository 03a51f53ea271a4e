import os
import re
import subprocess
import sys

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


def tree_allclose(x, y, rtol=1e-5, atol=1e-5):
    return bool(eqx.tree_equal(x, y, typematch=True, rtol=rtol, atol=atol))


def make_mlp(depth=2, seed=0):
    return eqx.nn.MLP(3, 2, 8, depth, key=jr.key(seed))


def make_ones():
    return {"a": jnp.ones(3)}


def sgd(rate):
    """With a rate that can be set."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def apply(model, x):
    return model(x)


WAYS = {"eager": lambda func: func, "jit": jax.jit, "filter_jit": eqx.filter_jit}


def draw(num_examples):
    """Draws so many examples of each ten, of those which take long to compile."""
    default = hypothesis.settings().max_examples
    return hypothesis.settings(max_examples=num_examples * default // 10)


class Counted:
    """A function that counts how often it is called, which compiled code never does."""

    def __init__(self, func):
        self.func = func
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.func(*args, **kwargs)


def column_sums(jacobian, out, tree):
    """The column sums of `jax.jacrev`, added up over the leaves of the output."""
    out_structure = jtu.tree_structure(out)
    blocks = out_structure.flatten_up_to(jacobian)
    out_ndims = [jnp.ndim(leaf) for leaf in jtu.tree_leaves(out)]
    summed = [
        jtu.tree_map(lambda block, n=ndim: block.sum(axis=tuple(range(n))), blocks_of_leaf)
        for blocks_of_leaf, ndim in zip(blocks, out_ndims, strict=True)
    ]
    return jtu.tree_map(
        lambda leaf, *parts: jnp.asarray(sum(parts), jnp.result_type(leaf)),
        tree,
        *summed,
    )


def count_instructions(compiled):
    """The number of instructions of a compiled program."""
    return len(re.findall(r"^\s+(ROOT )?%\S+ = ", compiled.as_text(), re.MULTILINE))


NUM_DEVICES = 8


def run_on_eight_devices(file):
    """Runs the tests of a file in a process with eight devices. Returns what pytest prints.

    JAX must be told of them before it starts.
    """
    flags = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    return result.stdout
