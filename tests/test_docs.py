"""The documents say what the code and the measurements say: every code block, command, flag, setting and file name."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

from rapm.bench.ops import KERNELS
from rapm.cli import build_parser, settings
from rapm.config import Config

ROOT = Path(__file__).parents[1]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for folder in (".", "docs", "csrc") for path in sorted((ROOT / folder).glob("*.md"))}  # fmt: skip
README = TEXTS["README.md"]
GENERATED = re.compile(r"<!-- (\w+):begin -->(.*?)<!-- \1:end -->", re.S)  # by benchmarks/readme.py
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
BLOCKS = [(name, *block) for name, text in TEXTS.items() for block in FENCED.findall(text)]
LAUNCHERS = ("python", "torchrun", "accelerate")  # of a module
OTHERS = ("pip", "make", "python", "cd", "git")  # commands of a block that are not ours


def test_the_tables_are_those_of_the_results():
    check = [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def bash(text: str, folder: Path) -> None:
    """Every line is a command that exists, with arguments that its parser takes."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    extras = metadata("rapm-fast").get_all("Provides-Extra")
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] in LAUNCHERS and "-m" in words:
            _, module, *words = words[words.index("-m") :]
            words = [*module.split("."), *words]
        assert words[0] in ("rapm", *OTHERS), line
        if words[0] == "rapm":
            build_parser().parse_args(words[1:])
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= {*targets}, line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), line
        for extra in re.findall(r"\[(\w+)\]", line if words[0] == "pip" else ""):
            assert extra in extras, line


def python(text: str, folder: Path) -> None:
    """It compiles, and every name that it imports is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def toml(text: str, folder: Path) -> None:
    """A file for --config."""
    (folder / "settings.toml").write_text(text)
    settings(build_parser().parse_args(["train", "--config", str(folder / "settings.toml")]))


READERS = {"bash": bash, "python": python, "toml": toml, "json": lambda text, folder: json.loads(text)}


@pytest.mark.parametrize("file, language, text", BLOCKS, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BLOCKS)])
def test_every_block_is_what_it_says(tmp_path, file, language, text):
    if language:  # without one it is a drawing
        READERS[language](text, tmp_path)


@pytest.mark.parametrize("language, text", [
    ("bash", "rapm train --no_such_flag"), ("bash", "rapm trian"), ("bash", "frobnicate"), ("bash", "make tset"),
    ("bash", "pip install rapm-fast[evil]"), ("bash", "python benchmarks/none.py"), ("python", "1 +"),
    ("python", "from rapm.train import trian"), ("toml", "lora_rnk = 4"), ("toml", "lora_rank = 'x'"), ("json", "{"),
])  # fmt: skip
def test_a_block_that_is_wrong_is_found(tmp_path, language, text):
    with pytest.raises(Exception):  # noqa: B017  # whatever its reader says
        READERS[language](text, tmp_path)


def test_the_python_block_runs(monkeypatch):
    """With the job itself taken out."""
    asked = []
    monkeypatch.setattr("rapm.train.train", lambda config, **options: asked.append(config) or Path(config.output_dir))
    blocks = [text for _, language, text in BLOCKS if language == "python"]
    for text in blocks:
        exec(compile(text, "README.md", "exec"), {})
    assert blocks and all(isinstance(config, Config) for config in asked) and len(asked) == len(blocks)


def test_commands_and_flags_in_the_text():
    parser = build_parser()
    (commands,) = [action.choices for action in parser._actions if hasattr(action, "choices") and action.choices]
    flags = {flag for command in commands.values() for action in command._actions for flag in action.option_strings}
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", README))
    ours = [span for span in spans if span.startswith("rapm ")]
    assert len(ours) > 1
    for span in ours:
        words = shlex.split(span)
        assert words[1] in commands and {word for word in words if word.startswith("--")} <= flags, span
    wanted = {span.split()[0].partition("=")[0] for span in spans if span.startswith("--")}
    assert len(wanted) > 5 and not wanted - flags, wanted - flags


def test_every_file_it_names_is_there_and_every_module_is_named():
    _, drawing, table = TEXTS["docs/code.md"].split("```")
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", table) + re.findall(r"\b([a-z]\w*\.py|[a-z]\w*/)(?=\W)", drawing):
        assert (ROOT / name).exists() or (ROOT / "rapm" / name).exists(), name
    assert not {path.name for path in (ROOT / "rapm").glob("[a-z]*.py")} - {*re.findall(r"`(\w+\.py)`", table)}
    for name in re.findall(r"`([a-z]\w*/(?:[\w/]+\.py|\w+/)?)`", README.split("## The code")[1]):
        assert (ROOT / name).exists(), name


def test_every_link_leads_somewhere():
    """To a file that is there, and in it to a heading, as GitHub names them."""
    for file, text in TEXTS.items():
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            path = (ROOT / file).parent / link if link else ROOT / file
            assert path.exists(), f"{file}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{file}: {link}#{anchor}"


def test_every_figure_is_of_a_result():
    """No time, size or rate of a measurement is typed by hand."""
    units = "GiB|MiB|GB|MB|TFLOP/s|GB/s|seconds?|minutes?|hours?|ms|us|s|times"
    figure = re.compile(rf"\d[\d.,]*(?: ?%| (?:{units})\b)")
    known = {"11 MB", "15 minutes"}  # the embedded teacher's, the longest time without a checkpoint
    for page in ("README.md", "docs/results.md"):
        typed = {*figure.findall(GENERATED.sub("", TEXTS[page]))} - known
        assert not typed, f"{page}: {typed}"


def test_every_kernel_has_its_line():
    """In the README's table or below it, and in the other page's, by the names that `rapm bench` takes."""
    for name in KERNELS:
        assert f"`{name}`" in dict(GENERATED.findall(README))["operators"], name
        assert f"`{name}`" in GENERATED.sub("", TEXTS["docs/results.md"]), name


def test_the_drawing_shows_the_imports():
    """Where an arrow leads from one to the next, one of them imports the other."""
    drawing = TEXTS["docs/code.md"].split("```")[1]
    arrows = re.findall(r"(\w+\.py|\w+/) (?:-+>|<-+) (?=(\w+\.py|\w+/))", drawing)
    assert len(arrows) >= 9
    for arrow in arrows:
        files = [[path] if path.is_file() else [*path.rglob("*.py")] for path in (ROOT / "rapm" / end for end in arrow)]
        texts = ["".join(file.read_text(encoding="utf-8") for file in some) for some in files]
        names = [f"from rapm.{re.split(r'[./]', end)[0]}" for end in arrow]
        assert names[0] in texts[1] or names[1] in texts[0], " -> ".join(arrow)
