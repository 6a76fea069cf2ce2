"""How much of the host's memory this process may take: what is free, within a container's limit, and what it has."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rapm import distributed
from rapm.memory.cards import GIB

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of memory that is free: a desktop and the page cache of what is read take some, and what fills it is killed.
MARGIN = GIB // 4
# A cgroup's limit, its usage, and in `memory.stat` the files that it can let go of: version 2's names, and 1's.
NAMES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def limit() -> int | None:
    """Bytes of the host that this process may hold, with what it holds already; None where nothing tells (macOS).

    Of several processes on a machine each has its share of what is free.
    """
    if (free := available()) is None:
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world()))
    return max(0, free - MARGIN) // processes + held()


def available() -> int | None:
    """Bytes that can be taken without swapping, here and in every cgroup that this process is in."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size and the load, then all and free physical memory
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    free = _number(PROC / "meminfo", "MemAvailable:")
    return None if free is None else min([2**10 * free, *_cgroups()])


def held() -> int:
    """Bytes that this process holds and would have to give back: mapped files do not count."""
    if sys.platform == "win32":
        counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS: its size, the peak, the working set
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return counters[2]
    return 2**10 * (_number(PROC / "self/status", "RssAnon:") or 0)


def _cgroups() -> Iterator[int]:
    """What each cgroup with a limit leaves: this process's own, of either version, and those around it."""
    for line in _read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        most, used, files = NAMES[bool(controllers)]
        own = root / path.lstrip("/")  # in a container maybe the host's path, not there: the root's own tells then
        for group in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            if (size := _number(group / most)) is not None:  # else "max", or no file
                idle = sum(_number(group / "memory.stat", name) or 0 for name in files)
                yield size - (_number(group / used) or 0) + idle


def _number(path: Path, name: str = "") -> int | None:
    """The number behind `name` at the beginning of a line."""
    found = re.search(rf"^{name}\s*(\d+)", _read(path), re.MULTILINE)
    return int(found[1]) if found else None


def _read(path: Path) -> str:
    """The text of a file of the kernel's; "" where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
