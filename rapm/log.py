"""What a run says while it runs: metrics.jsonl, TensorBoard or wandb, and the progress bar's figures."""

from __future__ import annotations

import json
from pathlib import Path

from rapm.errors import UserError


class Log:
    """metrics.jsonl in `folder`, and the tracker that `report_to` names: TensorBoard where it is installed."""

    def __init__(self, folder: Path, report_to: str, done: int = 0) -> None:
        """Lines after iteration `done` are dropped: a resumed run writes them again. UserError if wandb is missing."""
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists() and done:
            kept = [x for x in path.read_text().splitlines() if json.loads(x)["iteration"] <= done]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._tracker = _tracker(folder, report_to)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One line: `iteration` and `values`."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._tracker(iteration, values)

    def close(self) -> None:
        self._file.close()


def _tracker(folder: Path, report_to: str):
    if report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return lambda iteration, values: None
        writer = SummaryWriter(str(folder / "logs"))

        def write(iteration: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            writer.flush()

        return write
    if report_to == "wandb":
        try:
            import wandb
        except ImportError as error:
            raise UserError("report_to wandb: wandb is not installed (pip install wandb)") from error
        run = wandb.init(project="rapm-fast", dir=str(folder))
        return lambda iteration, values: run.log(values, step=iteration)
    return lambda iteration, values: None
