"""Files that appear whole under their name or not at all, whatever the disk does in between."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".rapm.tmp"
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


def sweep(folder: Path) -> None:
    """Remove what a killed process may have left in `folder` and the folders in it."""
    for stale in [*folder.glob(f"*{TEMPORARY}"), *folder.glob(f"*/*{TEMPORARY}")]:
        stale.unlink()
