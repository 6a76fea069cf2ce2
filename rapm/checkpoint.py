"""Checkpoints: one safetensors file in a folder `checkpoint-N`, which appears whole or not at all.

`checkpoint-best` is the one of the validation with the least FD to the teacher; the limit never removes it.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rapm import distributed
from rapm.config import Config, toml
from rapm.disk import write_atomic
from rapm.errors import UserError
from rapm.finite import finite

STATE = "state.safetensors"
BEST = "checkpoint-best"
FORMAT = "4"  # of the state: raised whenever a tensor's layout changes
# Settings that a resumed run may change: they decide where, how far and how often, not what is computed. The prompts'
# words are in the store, which refuses others.
FREE = {
    "output_dir", "store", "device", "vram", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
    "log_steps", "report_to", "solve_batch", "prompts",
}  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def save_checkpoint(folder: Path, state: dict[str, Tensor], done: int, config: Config) -> Path:
    """Write `checkpoint-{done}`, then remove the oldest ones beyond the limit. OSError: nothing has changed."""
    path = folder / f"checkpoint-{done}"
    _write(path, state, done, config, {})
    for old in checkpoints(folder)[: -config.checkpoints_total_limit]:
        shutil.rmtree(old)
    return path


def save_best(folder: Path, state: dict[str, Tensor], done: int, config: Config, fd: float) -> None:
    """Write `checkpoint-best` in the place of the last one."""
    _write(folder / BEST, state, done, config, {"fd": repr(fd)})


def sweep_checkpoints(folder: Path) -> None:
    """Remove the empty folders that a kill leaves between making or removing one and its file."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def find_best(folder: Path) -> tuple[int, float] | None:
    """The iteration and the FD of `checkpoint-best`; None where there is none. UserError for a damaged one."""
    if not (folder / BEST / STATE).is_file():
        return None
    header = _header(folder / BEST)
    return int(header["iterations"]), float(header["fd"])


def find_checkpoint(folder: Path, which: str) -> Path:
    """The checkpoint that `which` names: "latest", "best", one in the folder, or a path. UserError if there is none."""
    if which == "latest":
        found = checkpoints(folder)
        if not found:
            raise UserError(f"resume: {folder} has no checkpoint: leave out --resume_from_checkpoint")
        return found[-1]
    inside = folder / (BEST if which == "best" else which)
    path = inside if which == "best" or (inside / STATE).is_file() else Path(which)
    if not (path / STATE).is_file():
        raise UserError(f"checkpoint: {path} is not a checkpoint: give `latest`, `best` or a folder checkpoint-N")
    return path


def load_checkpoint(path: Path, config: Config) -> tuple[dict[str, Tensor], int]:
    """The state and the number of iterations done. UserError for a damaged file or one made with other settings.

    Numbers that are not finite are damage.
    """
    state, done, then = _open(path)
    # A decaying rate depends on where it ends.
    free = FREE | ({"max_train_steps"} if config.lr_schedule == "constant" else set())
    for name, value in asdict(config).items():
        if name not in free and _known_by(name, then.get(name)) != _known_by(name, json.loads(json.dumps(value))):
            raise UserError(
                f"checkpoint {path} was made with {name} = {then.get(name)!r}, not {value!r}: go on with "
                f"{name} = {toml(then.get(name))} in a file for --config, or leave this checkpoint out"
            )
    if bad := next((name for name, x in state.items() if not finite(x)), None):
        raise UserError(f"checkpoint: {path}: {bad} holds numbers that are not finite: give an earlier checkpoint")
    return state, done


def _known_by(name: str, value: Any) -> Any:
    """What of a setting must stay: the last part of a teacher's path, which may move. The store has its fingerprint."""
    given = {"teacher": [value], "teacher_lora": value}.get(name)
    return value if given is None else [PurePath(path).name for path in given]


def ranks(path: Path) -> int:
    """How many processes made the checkpoint. UserError for a damaged one."""
    return int(_header(path).get("ranks", 1))


def frozen_weights(path: Path) -> str:
    """The mode of the frozen weights that the checkpoint was made with. UserError for a damaged one."""
    mode: str = json.loads(_header(path)["config"]).get("frozen_weights", "full")
    return mode


def _write(path: Path, state: dict[str, Tensor], done: int, config: Config, extra: dict[str, str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    header = {"format": FORMAT, "iterations": str(done), "config": json.dumps(asdict(config)), **extra}
    if distributed.world() > 1:
        header["ranks"] = str(distributed.world())
    try:
        write_atomic(path / STATE, save(tensors, header))
    except OSError:
        with suppress(OSError):  # not empty where it replaces another
            path.rmdir()
        raise


def _open(path: Path) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    header = _header(path)
    with safe_open(path / STATE, framework="pt") as file:
        # copies: Windows deletes and replaces no file that is mapped
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    # settings that are newer than the checkpoint have their defaults
    return state, int(header["iterations"]), json.loads(json.dumps(asdict(Config()))) | json.loads(header["config"])


def _header(path: Path) -> dict[str, str]:
    """The file's header, once its fields have proven to be there."""
    try:
        with safe_open(path / STATE, framework="pt") as file:
            header = file.metadata() or {}
        int(header["iterations"]), int(header.get("ranks", 1)), float(header.get("fd", 0))
        {**json.loads(header["config"])}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint: {path} is not a checkpoint of ours ({type(error).__name__}: {error}): give another"
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(f"checkpoint: {path} was written by another version of rapm-fast: finish the run with that one")
    return header
