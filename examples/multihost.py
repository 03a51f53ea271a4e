"""Trains a classifier of handwritten digits on several processes, as on several hosts.

They meet on the loopback by `jax.distributed`. Each holds its share of the parameters and of
every batch; JAX exchanges what is needed, and adds up the gradients. The parameters are the
same as after a run with a single process, up to rounding. Orbax writes checkpoints, of which
each process writes the shards that it holds. With `--kill-at`, one process is killed at that
step: the others then end with an error, and a new run goes on from the last checkpoint. At the
end a single process reads the last one.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
import sklearn.datasets
import tqdm
import vgrad_eqx as vg
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P


matplotlib.use("agg")
import matplotlib.pyplot as plt


BATCH_SIZE = 256
SAVE_EVERY = 25
TIMEOUT = 20  # seconds after which a process that is silent is taken for dead
LARGEST_DIFFERENCE = 1e-4
LOWEST_ACCURACY = 0.96


def losses(model, images, labels):
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) / BATCH_SIZE


def load_data():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return (images / 16).astype("float32"), labels.astype("int32")


def open_checkpoints(folder):
    """Orbax keeps the last of them, each whole or not there."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)


def flatten(state):
    """The arrays as Orbax takes them: the count, which each process has, is one of NumPy."""
    leaves, structure = jax.tree.flatten(state)
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
    is_own = [each is None or isinstance(each, SingleDeviceSharding) for each in shardings]
    pairs = zip(leaves, is_own, strict=True)
    return [np.asarray(leaf) if own else leaf for leaf, own in pairs], structure


def save(checkpoints, state):
    """Writes a state in the background. Every process calls it, and writes its shards."""
    checkpoints.save(int(state.count), args=ocp.args.StandardSave(flatten(state)[0]))


def load(checkpoints, like):
    """The last state, with the shardings of `like`; or `like` itself, if there is none."""
    if checkpoints.latest_step() is None:
        return like
    leaves, structure = flatten(like)
    args = ocp.args.StandardRestore(leaves)
    return jax.tree.unflatten(
        structure, checkpoints.restore(checkpoints.latest_step(), args=args)
    )


def begin(steps, seed):
    """A new training, whose parameters are shared out where they can be."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))

    def put(x):
        is_split = x.shape[0] % jax.device_count() == 0
        return jax.device_put(x, NamedSharding(mesh, P("data") if is_split else P()))

    model = eqx.nn.MLP(64, 10, 64, 2, key=jr.key(seed))
    model = jtu.tree_map(lambda x: put(x) if eqx.is_array(x) else x, model)
    step = vg.train_step(losses, optax.adam(optax.cosine_decay_schedule(1e-2, steps)))
    return step, step.init(model), NamedSharding(mesh, P("data"))


def work(folder, steps, seed, kill_at):
    """Trains in this process, together with the others."""
    last = jax.process_index() == jax.process_count() - 1
    first = jax.process_index() == 0
    step, state, split = begin(steps, seed)
    checkpoints = open_checkpoints(folder)
    state = load(checkpoints, state)
    images, labels = load_data()
    # Every process draws the same rows, and takes its own share of them.
    orders = np.random.default_rng(seed).integers(len(images), size=(steps, BATCH_SIZE))
    share = slice(jax.process_index(), None, jax.process_count())
    history = []
    progress = tqdm.tqdm(
        total=steps, initial=state.count, desc="training", disable=not first, mininterval=1
    )
    while state.count < steps:
        if last and kill_at and state.count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = orders[state.count][share]
        batch = [
            jax.make_array_from_process_local_data(split, array[rows])
            for array in (images, labels)
        ]
        state, metrics = step(state, *batch)
        history.append((int(state.count), float(jnp.sum(metrics.value))))
        progress.update()
        if state.count % SAVE_EVERY == 0 or state.count == steps:
            save(checkpoints, state)
    progress.close()
    checkpoints.close()  # waits until the last one is whole
    if first:
        (folder / "history.json").write_text(json.dumps(history))


def join(args):
    """Meets the other processes, trains with them, and says so if one of them is gone."""
    if args.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.processes,
            args.index,
            initialization_timeout=6 * TIMEOUT,
            heartbeat_timeout_seconds=TIMEOUT,
            shutdown_timeout_seconds=TIMEOUT,
        )
    try:
        work(args.folder, args.steps, args.seed, args.kill_at)
    except jax.errors.JaxRuntimeError as error:
        message = (
            f"Process {args.index} cannot reach the others, one of which may have stopped. "
            f"Start again: training goes on from the last checkpoint. JAX says: {error}"
        )
        print(message.splitlines()[0], file=sys.stderr, flush=True)
        # An orderly end would wait for the process that is gone.
        os._exit(1)


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(processes, folder, args, kill_at=0):
    """Starts all processes of a run. The last one kills itself at step `kill_at`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--steps", str(args.steps), "--seed", str(args.seed)]
    command += ["--processes", str(processes), "--folder", str(folder)]
    command += ["--port", str(find_port()), "--kill-at", str(kill_at)]
    return [subprocess.Popen([*command, "--index", str(i)]) for i in range(processes)]


def run(processes, folder, args):
    """The steps and losses of a run, or its last part if it goes on from a checkpoint."""
    codes = [worker.wait() for worker in start(processes, folder, args)]
    if any(codes):
        raise SystemExit(f"The processes ended with {codes}.")
    return json.loads((folder / "history.json").read_text())


def run_and_kill(processes, folder, args):
    """A run that loses a process."""
    *others, last = start(processes, folder, args, args.kill_at)
    last.wait()
    killed = time.monotonic()
    codes = [worker.wait() for worker in others]
    seconds = time.monotonic() - killed
    print(f"killed one at step {args.kill_at}: the others ended after {seconds:.1f} s, {codes}")
    if not all(codes) or seconds > 3 * TIMEOUT:
        raise SystemExit("The other processes did not end with an error in time.")


def read_model(folder, args):
    """The last model, on the one device of this process."""
    _, state, _ = begin(args.steps, args.seed)
    with open_checkpoints(folder) as checkpoints:
        return load(checkpoints, state).model


def plot(histories, difference, out):
    plt.figure(figsize=(8, 4), layout="constrained")
    for (name, history), style in zip(histories.items(), ["-", "--"], strict=True):
        plt.semilogy(*zip(*history, strict=True), style, label=name)
    plt.xlabel("step")
    plt.ylabel("cross-entropy of a batch")
    plt.title(f"Digits: at the end, the parameters differ by at most {difference:.1e}")
    plt.legend()
    plt.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--steps", type=int, default=300, help="number of steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of model and batches")
    parser.add_argument("--kill-at", type=int, default=0, help="kill a process at this step")
    parser.add_argument("--out", type=Path, default=Path("multihost.png"), help="the plot")
    for name, kind in {"index": int, "port": int, "folder": Path}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.index is not None:  # this is one of the processes
        join(args)
        return
    if BATCH_SIZE % args.processes:
        raise SystemExit(f"`--processes` must divide {BATCH_SIZE}. Got {args.processes}.")
    with tempfile.TemporaryDirectory() as folder:
        several, alone = Path(folder) / "several", Path(folder) / "alone"
        if args.kill_at:
            run_and_kill(args.processes, several, args)
        histories = {
            f"{args.processes} processes": run(args.processes, several, args),
            "one process": run(1, alone, args),
        }
        model, expected = read_model(several, args), read_model(alone, args)
    params = vg.states(model)
    difference = max(
        float(jnp.max(jnp.abs(params[path] - leaf)))
        for path, leaf in vg.states(expected).items()
    )
    images, labels = load_data()
    accuracy = float(jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=1) == labels))
    plot(histories, difference, args.out)
    print(
        f"largest difference of a parameter: {difference:.1e}, accuracy: {accuracy:.1%}, "
        f"plot: {args.out}"
    )
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"The parameters differ by more than {LARGEST_DIFFERENCE}.")
    if accuracy < LOWEST_ACCURACY:
        raise SystemExit(f"The accuracy is below {LOWEST_ACCURACY:.0%}.")


if __name__ == "__main__":
    main()
