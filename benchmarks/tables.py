"""What the README's generated sections are made of: paragraphs and tables."""

from __future__ import annotations

import textwrap


def fill(text: str) -> str:
    """`text` as a paragraph, in lines as long as the README's."""
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False)


def rows_table(rows: list[tuple[str, dict[str, str]]]) -> str:
    """A Markdown table with the columns of its first row."""
    columns = [*rows[0][1]]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells[c] for c in columns) + " |" for name, cells in rows])
