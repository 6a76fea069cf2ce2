"""Prompt files: UTF-8 text, one prompt a line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rapm.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of `path` ("-" is the standard input) in file order, without blank lines and repetitions.

    UserError for a file that cannot be read, is not UTF-8, or holds no prompt.
    """
    if str(path) == "-":
        return _parse(sys.stdin.buffer, "the standard input")
    try:
        with open(path, "rb") as lines:
            return _parse(lines, str(path))
    except OSError as error:
        raise UserError(f"prompts: cannot read {path}: {error.strerror}") from error


def _parse(lines: Iterable[bytes], name: str) -> list[str]:
    prompts: dict[str, None] = {}  # a set that keeps the order
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # editors on Windows write a byte-order mark
        except UnicodeDecodeError as error:
            raise UserError(f"prompts: line {number} of {name} is not UTF-8: save the file as UTF-8") from error
        prompts[text.strip()] = None
    prompts.pop("", None)
    if not prompts:
        raise UserError(f"prompts: {name} is empty: write one prompt a line")
    return list(prompts)
