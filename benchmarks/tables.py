"""What the generated sections of README and docs/ are made of: paragraphs and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

NONE = "–"  # the cell of what does not apply


def fill(text: str) -> str:
    """`text` as a paragraph, in lines as long as the README's."""
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    lines = ["|" + "".join(f" {cell} |" if cell or row is not rows[0] else " |" for cell in row) for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def rows_table(rows: Sequence[tuple[str, dict[str, str]]]) -> str:
    """A table with the columns of its first row."""
    columns = [*rows[0][1]]
    return table([["", *columns], *([name, *(cells[c] for c in columns)] for name, cells in rows)])
