"""What a run says while it runs: metrics.jsonl, TensorBoard or wandb, and the progress bar's figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rapm.disk import write_atomic
from rapm.errors import UserError

METRICS = "metrics.jsonl"


class Log:
    """metrics.jsonl in `folder`, and the tracker that `report_to` names: TensorBoard where it is installed."""

    def __init__(self, folder: Path, report_to: str, done: int = 0) -> None:
        """Lines after iteration `done` are dropped: a resumed run writes them again. So are those that are damaged."""
        path = folder / METRICS
        lines = read_metrics(path)[0] if done else []
        kept = [json.dumps(line) + "\n" for line in lines if line["iteration"] <= done]
        write_atomic(path, "".join(kept).encode())
        self._file = path.open("a", buffering=1)
        self._track, self._close = _tracker(folder, report_to, done)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One line: `iteration` and `values`."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._track(iteration, values)

    def warn(self, iteration: int, text: str) -> None:
        """A warning: on the terminal, above the progress bar, and in metrics.jsonl for the report."""
        self._file.write(json.dumps({"iteration": iteration, "warning": text}) + "\n")
        self.say(f"warning: iteration {iteration}: {text}")

    def say(self, text: str) -> None:
        """Lines on the terminal, above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._close()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl, none where there is no file yet, and how many are damaged.

    The last one may be half a line, which a kill leaves: that is no damage.
    """
    texts = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    lines, damaged = [], 0
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _written(line):
            lines.append(line)
        else:
            damaged += number < len(texts)
    return lines, damaged


def _written(line: object) -> bool:
    """Whether that is what `write` or `warn` wrote: numbers by name, and a warning's words."""
    if not (isinstance(line, dict) and isinstance(line.get("iteration"), int)):
        return False
    return all(isinstance(value, str if name == "warning" else (int, float)) for name, value in line.items())


def check_tracker(report_to: str) -> None:
    """UserError for a tracker that is asked for and not installed."""
    if report_to == "wandb" and find_spec("wandb") is None:
        raise UserError("report_to wandb: wandb is not installed (pip install wandb)")


def _tracker(
    folder: Path, report_to: str, done: int
) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    """What writes the figures of an iteration, and what ends it."""
    if report_to == "tensorboard" and find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "logs"), purge_step=done + 1 if done else None)

        def write(iteration: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)

        return write, writer.close
    if report_to == "wandb":
        import wandb

        run = wandb.init(project="rapm-fast", dir=str(folder))
        return lambda iteration, values: run.log(values, step=iteration), run.finish
    return lambda iteration, values: None, lambda: None
