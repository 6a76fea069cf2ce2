"""evaluation.json: `protocol` and `rows` of the embedded teacher's table, and `figures`, an entry for each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rapm.errors import UserError
from rapm.export.lora_file import WEIGHTS
from rapm.store import sha256

RECORD = "evaluation.json"


def read_record(path: Path) -> dict[str, Any]:
    """What earlier evaluations have left, {} if there was none. Before the work too: UserError where it is damaged."""
    if not path.exists():
        return {}
    try:
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        for entry in report.get("figures", []):
            entry["protocol"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"evaluate: {path} is to have the figures too, and cannot be read ({type(error).__name__}: {error}): "
            "move it away"
        ) from error
    return report


def identity(lora: Path) -> str:
    """Of the weights in a LoRA's file or a run's folder."""
    return f"sha256 {sha256((lora / WEIGHTS if lora.is_dir() else lora).read_bytes())[:16]}"
