"""Files that appear whole under their name or not at all, whatever the disk does in between."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rapm.errors import UserError

TEMPORARY = ".rapm.tmp"
LOCK = ".lock"  # stays in the folder; the lock itself goes with the process, however that ends
# What a disk may say in the middle of a run: full, over quota, read-only, not ours, too large, broken.
TROUBLE = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO")
           if hasattr(errno, name)}  # fmt: skip


def write_atomic(path: Path, data: bytes) -> None:
    """`data` under `path`, on the disk when this returns; a reader, or a kill, never meets half a file.

    OSError, naming `path`, if it cannot be written; nothing temporary is left then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself is in the folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_writable(folder: Path) -> None:
    """`folder`, made if it is not there. OSError if it cannot be, or nothing can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    (folder / ".writable").unlink(missing_ok=True)  # another process may be at the same


def need_writable(folder: Path) -> None:
    """`make_writable`, before work whose results are to be there: a UserError where it fails."""
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another, or its rights") from error


@contextmanager
def held(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """`folder` for this process alone, until it is done or dies. UserError if another has it after `wait` seconds.

    As `need_writable` too: the lock is a file there.
    """
    need_writable(folder)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=wait)
    except Timeout:
        raise UserError(f"{folder}: another run is at work there: wait for it, or take another folder") from None
    with lock:
        yield


def sweep(folder: Path) -> None:
    """Remove what a killed process may have left in `folder` and the folders in it."""
    for stale in [*folder.glob(f"*{TEMPORARY}"), *folder.glob(f"*/*{TEMPORARY}")]:
        stale.unlink()
