"""Where prompts come from: text files, a column of a table, the standard input, the bundled list.

Every source is read once from front to back. The prompts that are asked for are kept; of the rest only a 64-bit hash
stays, to count how many are different: a file of five million lines costs 40 MB.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from rapm.errors import UserError

BUNDLED = Path(__file__).parent / "zoo" / "prompts.txt"
PROMPT_COLUMNS = ("prompt", "caption", "text", "prompts", "captions", "description")
NEGATIVE_COLUMNS = ("negative_prompt", "negative", "negative_prompts", "neg_prompt")
PARQUET_TEXT = ("string", "large_string", "dictionary<values=string")
LINE_BYTES = 2**16  # a prompt is some hundred bytes; what is longer is not a list of prompts


class Row(NamedTuple):
    """A prompt and what its trajectory is guided away from; "" is the run's `negative_prompt`."""

    text: str
    negative: str = ""


@dataclass
class Prompts:
    """The different prompts of a source in its order: all of them, or the first ones that were asked for."""

    name: str  # of the source, for a person
    rows: list[Row] = field(default_factory=list)
    total: int = 0  # rows of the source that hold a prompt
    different: int = 0  # of these

    @property
    def texts(self) -> list[str]:
        """Without the negative ones."""
        return [row.text for row in self.rows]

    def __str__(self) -> str:
        negative = sum(bool(row.negative) for row in self.rows)
        parts = [f"{self.different} in {self.name}"]
        parts += [f"{self.total - self.different} repeated ones left out"] if self.total > self.different else []
        parts += [f"{negative} with a negative prompt of their own"] if negative else []
        return ", ".join(parts)


def load_prompts(source: str | Path, keep: int | None = None) -> Prompts:
    """The prompts of `source`, without blank ones and repetitions; the first `keep` different ones, or all.

    `source` is a text file of one prompt a line, "-" for such lines on the standard input, or a table FILE or
    FILE:COLUMN: .csv, .tsv, .jsonl or .parquet. Without COLUMN it is the only one that is called like one of
    PROMPT_COLUMNS, or the only one. A column of NEGATIVE_COLUMNS gives negative prompts; a row's is part of what makes
    it different. UserError, of one line, for a source that cannot be read or holds no prompt.
    """
    path, column = _split(str(source))
    if str(source) == "-":
        return _collect(_text_rows(sys.stdin.buffer, "the standard input"), "the standard input", keep)
    read = READERS.get(path.suffix.lower())
    if path.suffix.lower() == ".json":
        raise UserError(f"prompts: {path} is JSON: write one object a line, as .jsonl, or one prompt a line, as .txt")
    try:
        with open(path, "rb") as file:
            rows = read(file, str(path), column) if read else _text_rows(file, str(path))
            return _collect(rows, str(path), keep)
    except OSError as error:
        raise UserError(f"prompts: cannot read {path}: {error.strerror or error}") from error


def read_prompts(source: str | Path) -> list[str]:
    """All prompts of `source`, as `load_prompts` reads them, without their negative ones."""
    return load_prompts(source).texts


def _split(source: str) -> tuple[Path, str | None]:
    """FILE and COLUMN of "FILE:COLUMN", where FILE is a table and the whole is not a file's name."""
    file, colon, column = source.rpartition(":")
    if colon and column and Path(file).suffix.lower() in READERS and not Path(source).exists():
        return Path(file), column
    return Path(source), None


def _collect(rows: Iterable[tuple[str, str]], name: str, keep: int | None) -> Prompts:
    kept: dict[Row, None] = {}  # a set that keeps the order
    hashes = array("q")  # of all rows: what is not kept is only counted
    for row in rows:
        if row[0]:
            hashes.append(hash(row))
            if keep is None or len(kept) < keep:
                kept[Row(*row)] = None
    if not kept:
        raise UserError(f"prompts: {name} is empty: write one prompt a line")
    found = np.frombuffer(hashes, dtype=np.int64)
    found.sort()  # in place: no second copy
    return Prompts(name, list(kept), len(found), 1 + int(np.count_nonzero(found[1:] != found[:-1])))


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    """The file's lines with their ends. UserError, naming the line, for what is not text."""
    for number, line in enumerate(iter(partial(file.readline, LINE_BYTES + 1), b""), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # editors on Windows write a byte-order mark
        except UnicodeDecodeError as error:
            if len(line) > LINE_BYTES and error.start > LINE_BYTES - 3:  # a letter cut in two
                raise _too_long(number, name) from error
            raise UserError(f"prompts: line {number} of {name} is not UTF-8: save the file as UTF-8") from error
        if "\0" in text:
            raise UserError(f"prompts: line {number} of {name} holds a NUL byte: it is no text file, or not in UTF-8")
        if len(line) > LINE_BYTES:
            raise _too_long(number, name)
        yield text


def _too_long(number: int, name: str) -> UserError:
    return UserError(
        f"prompts: line {number} of {name} has more than {LINE_BYTES} bytes: it is no list of one prompt a line"
    )


def _text_rows(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    return ((line.strip(), "") for line in _lines(file, name))  # plain pairs: a list may have millions of lines


def _csv_rows(file: BinaryIO, name: str, column: str | None) -> Iterator[Row]:
    lines = _lines(file, name)
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)  # spreadsheets write what their country's comma leaves free
    table = csv.reader(chain([first], lines), delimiter=delimiter)
    try:
        header = [cell.strip() for cell in next(table, [])]
        prompt, negative = _columns(header, column, name, alone=False)  # a lone column may have no header at all
        indices = [header.index(prompt)] + ([header.index(negative)] if negative else [])
        for cells in table:
            yield Row(*(_cell(cells[i], name) if i < len(cells) else "" for i in indices))
    except csv.Error as error:
        raise UserError(f"prompts: line {table.line_num} of {name} is not CSV ({error})") from error


def _jsonl_rows(file: BinaryIO, name: str, column: str | None) -> Iterator[Row]:
    keys: list[str] = []
    for number, line in enumerate(_lines(file, name), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"prompts: line {number} of {name} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"prompts: line {number} of {name} is not a JSON object: write one a line")
        keys = keys or [key for key in _columns(list(row), column, name) if key is not None]
        cells = [row.get(key) or "" for key in keys]
        for key, cell in zip(keys, cells, strict=True):
            if not isinstance(cell, str):
                raise UserError(f"prompts: line {number} of {name}: {key} is not text")
        yield Row(*(_cell(cell, name) for cell in cells))


def _parquet_rows(file: BinaryIO, name: str, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"prompts: {name} needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        kinds = {field.name: str(field.type) for field in table.schema_arrow}
        texts = [name for name, kind in kinds.items() if kind.startswith(PARQUET_TEXT)]
        keys = [key for key in _columns(texts, column, name) if key is not None]
        for batch in table.iter_batches(columns=keys):
            for cells in zip(*(batch[key].to_pylist() for key in keys), strict=True):
                yield Row(*(_cell(cell or "", name) for cell in cells))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise UserError(f"prompts: {name} is not a readable parquet file ({reason})") from error


READERS: dict[str, Callable[[BinaryIO, str, str | None], Iterator[Row]]] = {
    ".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows,
}  # fmt: skip


def _columns(names: list[str], asked: str | None, source: str, alone: bool = True) -> tuple[str, str | None]:
    """The prompts' column and that of the negative ones. UserError unless there is exactly one candidate."""
    negatives = [name for name in names if name.lower() in NEGATIVE_COLUMNS and name != asked]
    found = [asked] if asked in names else []
    if asked is None:
        found = [name for name in names if name.lower() in PROMPT_COLUMNS]
        if alone and not found and len(names) - len(negatives) == 1:
            found = [name for name in names if name not in negatives]
    if len(found) != 1 or len(negatives) > 1:
        problem = f"no column {asked!r}" if asked else "no column that is plainly the prompts'"
        listed = ", ".join(names) or "none with text"
        if len(listed) > 200:
            listed = listed[:200] + "..."
        raise UserError(f"prompts: {source} has {problem} ({listed}): give FILE:COLUMN, COLUMN as its header has it")
    return found[0], negatives[0] if negatives else None


def _cell(text: str, name: str) -> str:
    """A cell of a table without the line ends in it. UserError for what no prompt holds."""
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise UserError(f"prompts: {name} has a prompt with a NUL or half a character in it: {text[:40]!r}")
    if len(text) > LINE_BYTES:
        raise UserError(f"prompts: {name} has a prompt of more than {LINE_BYTES} characters: {text[:40]!r}...")
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip()
