"""Files that are replaced atomically."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

from .._tree.text import show


def check_path(path: object, caller: str) -> str:
    """The path of a file, with links resolved."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`{caller}` must be a path. Got {show(path)}.")
    path = os.fsdecode(path)
    if not path or "\0" in path:
        raise ValueError(f"`{caller}` must be the path of a file. Got {path!r}.")
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"`{caller}` must be the path of a file. Got the folder {path!r}. Add the name of "
            "a file."
        )
    if os.path.exists(path) and not os.path.isfile(path):
        # A pipe would be waited for, and a device replaced.
        raise OSError(errno.EINVAL, f"`{caller}` must be the path of a regular file", path)
    return os.path.realpath(path)


@contextlib.contextmanager
def replace_file(path: str) -> Iterator[BinaryIO]:
    """A new file to write, which replaces `path` at the end.

    It has no name before, where the system can do that, so that nothing remains of it in a
    process that is killed.
    """
    part = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.part")
    try:
        old = os.stat(path) if os.path.exists(path) else None
        descriptor, is_named = _open_new(part)
        with open(descriptor, "wb") as file:
            if old is not None and os.chmod in os.supports_fd:
                os.chmod(descriptor, stat.S_IMODE(old.st_mode))
            yield file
            file.flush()
            sync(descriptor)
            if not is_named:
                # With a folder, though the path is absolute; or the link would not be followed.
                os.link(_name_open(descriptor), part, src_dir_fd=descriptor)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(
                error.errno,
                f"`save(path=...)` cannot be written: {reason}. What was there is unchanged",
                path,
            ) from error
        raise
    # The folder keeps the name. It may be one that cannot be read, or on a system without this.
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _open_new(path: str) -> tuple[int, bool]:
    """A new file, and whether it already has its name."""
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # from a file system without support for it
            descriptor = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o666)
            if os.path.exists(_name_open(descriptor)):
                return descriptor, False
            os.close(descriptor)
    # `O_EXCL` does not follow links.
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666), True


def _name_open(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def sync(descriptor: int) -> None:
    """Waits until a file is on the disk, if the system supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
