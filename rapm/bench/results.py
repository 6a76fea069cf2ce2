"""Files of results that several calls fill: one after another, or at the same time on a GPU each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from rapm.disk import held, write_atomic

WAIT = 60.0  # seconds for another call's writing


def keep(
    path: Path,
    report: Mapping,
    depth: int = 1,
    same: tuple[str, ...] = ("card",),
    conclude: Callable[[dict], dict] = lambda report: report,
) -> dict:
    """Write `report` to `path`, and beside it what other calls have measured there, where what `same` names is equal.

    `depth` says of which tables the entries of both stay: 0, of the report itself; 1, of the tables in it, and so on.
    Deeper down the new takes the old one's place. `conclude` adds what follows from all. Returns what was written.
    A call gives its own figures alone, as often as it likes: another's would overwrite what that has measured since.
    """
    report = json.loads(json.dumps(report))  # keys are text, as the file's are
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.parent, WAIT):
        earlier = json.loads(path.read_text()) if path.is_file() else {}
        if all(earlier.get(name) == report[name] for name in same):
            report = united(earlier, report, depth)
        report = conclude(report)
        write_atomic(path, f"{json.dumps(report, indent=1)}\n".encode())
    return report


def united(earlier: Mapping, report: Mapping, depth: int) -> dict:
    """The entries of both; `report`'s where both have one, put together as long as they are tables, `depth` deep.

    Of two tables that name a card each, both are kept only if it is the same.
    """
    both = dict(report)
    for name, new in report.items():
        old = earlier.get(name)
        tables = isinstance(old, dict) and isinstance(new, dict)
        if depth and tables and old.get("card") == new.get("card"):
            both[name] = united(old, new, depth - 1)
    return {**earlier, **both}
