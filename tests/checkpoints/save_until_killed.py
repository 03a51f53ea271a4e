"""Saves checkpoint after checkpoint, in children that are killed at random moments.

They are large, so that many moments fall into the writing. It forks before JAX has started a
thread, so that a child takes no time to start. Each child writes the number of a checkpoint to
a pipe when it is whole. Prints, for each child, that number and what is found in the file.
"""

import os
import random
import signal
import sys
import time
import warnings

import numpy as np
import vgrad_eqx as vg


warnings.simplefilter("ignore")  # JAX warns of forks


def make(number):
    return {"w": np.full(2_000_000, number, "float32"), "number": number}


def save_forever(path, first, pipe):
    for number in range(first, 10**6):
        vg.save(path, make(number))
        os.write(pipe, number.to_bytes(8, "little"))


def run_child(path, first, seconds):
    """The number of the last checkpoint that the child has reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        save_forever(path, first, writing)
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        reported = pipe.read()
    return int.from_bytes(reported[-8:], "little") if reported else None


def main(path, num_children):
    generator = random.Random(0)
    last = 0
    vg.save(path, make(last))
    for _ in range(num_children):
        reported = run_child(path, last + 1, generator.uniform(0.02, 0.12))
        if reported is not None:
            last = reported
        loaded = vg.load(path, make(0))
        assert np.all(loaded["w"] == loaded["number"])
        print(last, loaded["number"])
        last = max(last, loaded["number"])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
