"""Prints how many bytes of memory saving and loading take at most, in this process alone.

Of 20 arrays of 5 MB each: first for `save`, then for `load`, whose result is 100 MB.
"""

import sys
import threading
import time

import jax
import jax.numpy as jnp
import vgrad_eqx as vg


def read_memory():
    """What is not the cache of a file."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def measure(func):
    before, is_over, most = read_memory(), threading.Event(), 0

    def watch():
        nonlocal most
        while not is_over.is_set():
            most = max(most, read_memory() - before)
            time.sleep(1e-3)

    thread = threading.Thread(target=watch)
    thread.start()
    out = func()
    jax.block_until_ready(out)
    is_over.set()
    thread.join()
    print(max(most, read_memory() - before))


def main(path):
    small = {"a": jnp.zeros(10)}
    vg.save(path, small)  # what the first call imports and compiles does not count
    vg.load(path, small)
    arrays = {f"a.{i}": jnp.full((1250, 1000), i, "float32") for i in range(20)}
    shapes = jax.eval_shape(lambda: jax.block_until_ready(arrays))
    measure(lambda: vg.save(path, arrays))
    measure(lambda: vg.load(path, shapes))


if __name__ == "__main__":
    main(sys.argv[1])
