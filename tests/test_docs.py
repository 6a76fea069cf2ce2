"""The README says what the code and the measurements say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from rapm.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results():
    check = [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_command_parses():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
    commands = re.findall(r"^(?:rapm|python -m rapm\.train)\b.*$", blocks, flags=re.M)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("python -m rapm.train", "rapm train"), comments=True)
        build_parser().parse_args(words[1:])


def test_every_file_it_names_is_there():
    table = README.split("## The code")[1].split("## ")[0]
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", table):
        assert (ROOT / name).exists() or (ROOT / "rapm" / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
