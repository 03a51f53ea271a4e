"""A checkpoint is whole or as it was before, whatever happens while it is written."""

import errno
import multiprocessing
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import vgrad_eqx as vg


OLD = {"a": jnp.arange(5.0)}


def check_old(path, names=("checkpoint",)):
    """The old checkpoint is there, and nothing else."""
    assert sorted(os.listdir(path.parent)) == sorted(names)
    assert vg.load(path, {"a": jnp.zeros(5)})["a"].tolist() == OLD["a"].tolist()


@pytest.fixture(params=["unnamed", "named"])
def system(request, monkeypatch):
    """A system that has files without a name, and one that has not."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("This system has no files without a name.")


def test_a_full_disk_leaves_the_old_file_alone(path, system):
    vg.save(path, OLD)
    new = {"a": jnp.zeros(10_000)}  # made before, since a compiler writes files, too
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="cannot be written: File too large. What was the"):
            vg.save(path, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_old(path)


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=str)
def test_an_error_leaves_the_old_file_alone(path, system, monkeypatch, name, error):
    vg.save(path, OLD)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(type(error)):
            vg.save(path, {"a": jnp.zeros(5)})
    check_old(path)


def test_the_file_is_on_the_disk_before_its_name_is(path, system, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("folder" if is_folder else "file")
        fsync(descriptor)

    def note_replace(*args, **kwargs):
        steps.append("name")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    vg.save(path, OLD)
    assert steps == ["file", "name", "folder"]


def test_a_file_has_no_name_before_it_is_on_the_disk(path, monkeypatch):
    try:
        os.close(os.open(path.parent, os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        pytest.skip("This file system has no files without a name.")
    names = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: names.append(os.listdir(path.parent)))
    vg.save(path, OLD)
    assert names == [[], [path.name]]


def test_a_disk_without_fsync_is_written_to(path, system, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fail)
    vg.save(path, OLD)
    check_old(path)


def test_a_link_is_followed_and_kept(path, system):
    real = path.parent / "real"
    path.symlink_to("real")
    vg.save(path, {"a": jnp.zeros(5)})
    vg.save(path, OLD)
    assert path.is_symlink()
    assert not real.is_symlink()
    check_old(path, ["checkpoint", "real"])


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_the_mode_is_kept(path, system, mode):
    vg.save(path, {"a": jnp.zeros(5)})
    path.chmod(mode)
    vg.save(path, OLD)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    check_old(path)


def test_a_new_file_has_the_usual_mode(path, system):
    vg.save(path, OLD)
    usual = path.parent / "usual"
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode


def test_no_other_file_is_written_to(path, system, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    victim = path.parent / "victim"
    victim.write_bytes(b"precious")
    (path.parent / ".guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError, match="cannot be written: File exists"):
        vg.save(path, OLD)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["n" * 255, "with space", "é"])
def test_any_name_of_a_file(tmp_path, system, name):
    vg.save(tmp_path / name, OLD)
    check_old(tmp_path / name, [name])


def test_the_working_folder(tmp_path, monkeypatch, system):
    monkeypatch.chdir(tmp_path)
    vg.save("checkpoint", OLD)
    check_old(tmp_path / "checkpoint")


@pytest.mark.parametrize("func", [vg.save, vg.load])
def test_paths_that_are_none(tmp_path, func):
    name = rf"`{func.__name__}\(path=...\)` must be"
    with pytest.raises(TypeError, match=f"{name} a path. Got None"):
        func(None, OLD)
    with pytest.raises(ValueError, match=f"{name} the path of a file. Got ''"):
        func("", OLD)
    with pytest.raises(IsADirectoryError, match=f"{name} the path of a file. Got the folder"):
        func(tmp_path, OLD)
    assert os.listdir(tmp_path) == []


def test_no_folder_and_no_permission(path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="cannot be written: No such file or directory"):
        vg.save(path.parent / "nowhere" / "checkpoint", OLD)

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="cannot be written: Permission denied. What was"):
        vg.save(path, OLD)


def test_a_folder_that_cannot_be_read(path, monkeypatch):
    original = os.open

    def refuse(name, flags, *args):
        if flags == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(name, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    vg.save(path, OLD)
    monkeypatch.undo()
    check_old(path)


def test_a_pipe_is_neither_replaced_nor_waited_for(path):
    os.mkfifo(path)
    with pytest.raises(OSError, match="must be the path of a regular file"):
        vg.save(path, OLD)
    with pytest.raises(OSError, match="must be the path of a regular file"):
        vg.load(path, OLD)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_no_path_has_a_null():
    with pytest.raises(ValueError, match="must be the path of a file"):
        vg.save("a\0b", OLD)


def _save_often(path, number):
    for _ in range(20):
        vg.save(path, {"w": np.full(100_000, number, "float32"), "number": number})


@pytest.mark.slow
def test_two_processes_at_one_path(path):
    like = {"w": np.zeros(100_000, "float32"), "number": 0}
    _save_often(path, 0)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_save_often, args=(path, i)) for i in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        loaded = vg.load(path, like)
        assert np.all(loaded["w"] == loaded["number"])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert vg.load(path, like)["number"] in (1, 2)
    assert os.listdir(path.parent) == ["checkpoint"]


def kill(path, times):
    """Kills a process that saves, again and again, and looks at what is there."""
    script = Path(__file__).parent / "save_until_killed.py"
    # A child must find no thread that JAX or a linear algebra library has started.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, script, path, str(times)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    pairs = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(pairs) == times
    assert all(loaded >= reported for reported, loaded in pairs)
    assert pairs[-1][0] > times // 5
    # Of a file with a name, which it has for some microseconds, a part may remain.
    assert len(os.listdir(path.parent)) <= 2


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint(path):
    kill(path, 50)


@pytest.mark.nightly
def test_a_process_that_is_killed_often_leaves_a_whole_checkpoint(path):
    kill(path, 200)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by Linux")
def test_memory_is_that_of_the_largest_array(path):
    script = Path(__file__).parent / "measure_memory.py"
    result = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, check=True
    )
    saving, loading = map(int, result.stdout.split())
    size, largest = 100e6, 5e6
    assert saving <= largest
    assert loading <= size + 2 * largest


AT_EXIT = """
import atexit
import sys

import jax.numpy as jnp
import vgrad_eqx as vg

atexit.register(vg.save, sys.argv[1], {"a": jnp.arange(5.0)})
"""


@pytest.mark.slow
def test_saving_at_the_end_of_a_program(path):
    subprocess.run([sys.executable, "-c", AT_EXIT, path], check=True, timeout=60)
    check_old(path)
