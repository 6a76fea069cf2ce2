"""The report of a run: one page that loads nothing, with every figure, and text that stays text."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rapm.cli import main
from rapm.config import Config
from rapm.disk import write_atomic
from rapm.log import Log, read_metrics
from rapm.pictures import png
from rapm.report.chart import Chart, svg
from rapm.report.page import CLOSENESS, MACHINE, TRAINING, write_report

EVIL = '<script src="https://example.org/x.js">"&\'</script>'
FIGURES = [figure for chart in CLOSENESS + TRAINING + MACHINE for figure in chart.figures]
OWN = [f"val_disc_{side}_slot{n}" for side in ("rel", "abs") for n in range(4)] + ["a_figure_of_tomorrow"]


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves, with every figure and with text that means mischief."""
    config = Config().replace(teacher="a/teacher & co", prompts=EVIL, max_train_steps=500, output_dir=str(tmp_path))
    (tmp_path / "config.toml").write_text(config.to_toml())
    lines = []
    for i in range(1, 301):
        values = {name: 1 + 0.1 * k + 1 / i for k, name in enumerate([*FIGURES, *OWN])}
        lines.append({"iteration": i, **values, "seconds": 2.0 * i, "val_fd": 5.0 + abs(i - 200)})
    lines.append({"iteration": 300, "loss": float("nan")})
    lines.append({"iteration": 250, "warning": f"contrast {EVIL}"})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 301, "lo'
    )
    plan = {"budget": 8192, "phases": {"load": 3072, "train": 7168}, "slowdown": 1.25, "summary": "all kept <b>"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "samples").mkdir()
    for i in range(1, 10):
        write_atomic(tmp_path / "samples" / f"{i:06d}.png", png(Image.new("RGB", (1000, 50), (i, 0, 0))))
    write_atomic(tmp_path / "samples.png", png(Image.new("RGB", (2000, 100)), prompts=json.dumps([EVIL, "Ü"])))
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors", {"ss_steps": "200"})
    (tmp_path / "README.md").write_text(f"# Card\n```python\nprint('a < b')  # {EVIL}\n```\nmore")
    figures = [
        {"protocol": {"samples": 30000}, "rows": [{"name": EVIL, "FID": 19.25}, {"name": "teacher", "CLIP": 30.5}]}
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"figures": figures}))
    return tmp_path


def test_one_page_that_loads_nothing(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = Page(folder / "report.html")
    assert not page.open  # every tag is closed
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("href", "srcset", "action", "style-src")
            assert name != "src" or value.startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", page.source)
    images = [base64.b64decode(a["src"].partition(",")[2]) for tag, a in page.tags if tag == "img"]
    assert len(images) == 6 and all(data.startswith(b"\x89PNG") for data in images)


def test_every_figure_and_every_word_is_there(folder):
    page = Page(write_report(folder))
    charted = " ".join(a["data-figures"] for tag, a in page.tags if "data-figures" in a).split()
    assert sorted(charted) == sorted([*FIGURES, *OWN])
    assert page.source.count("<svg") == len(CLOSENESS + TRAINING + MACHINE) + 3
    assert page.text.count(EVIL) == 5  # prompt, warning, snippet, evaluation, settings: as text
    for words in ("300 of 500 iterations, not finished, 10.0 min", "best checkpoint", "19.25", "30.5", "Ü",
                  "a/teacher & co", "CFG 1", "1,000 to train on", "max_train_steps", "(of iteration 200)",
                  "Iteration 9", "budget 8.0 GiB; planned: load 3.0 GiB, train 7.0 GiB", "all kept <b>"):  # fmt: skip
        assert words in page.text, words
    assert "best" in page.source[page.source.index("Distance to the teacher") :][:6000]
    assert ">200<" in page.source  # the best checkpoint's iteration
    assert "prefers-color-scheme:dark" in page.source and "width=device-width" in page.source


def test_a_run_that_has_just_begun_has_one_too(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(Config().to_toml())
    page = Page(write_report(tmp_path))
    assert "Not exported yet" in page.text and "0 of 20,000 iterations" in page.text
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("name, damage", [
    ("samples.png", b""), ("samples.png", 40), ("samples.png", 200), ("samples/000009.png", b"no picture"),
    ("evaluation.json", 30), ("evaluation.json", b"[]"), ("evaluation.json", b'{"figures": [3]}'), ("plan.json", 20),
    ("plan.json", b'{"budget": 3}'), ("plan.json", b"[" * 10**5), ("README.md", b"\xff"),
    ("pytorch_lora_weights.safetensors", 9), ("pytorch_lora_weights.safetensors", b""), *[(name, None) for name in (
        "samples.png", "samples/000009.png", "evaluation.json", "plan.json", "README.md",
        "pytorch_lora_weights.safetensors")],
])  # fmt: skip
def test_what_is_damaged_is_left_out(folder, name, damage):
    """Cut, other than what was written, or a folder: a note in its place, and every other part."""
    before, path = Page(write_report(folder)), folder / name
    data = path.read_bytes()
    path.unlink()
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(data[:damage] if isinstance(damage, int) else damage)
    page = Page(write_report(folder))
    assert f"Not shown: {path.name} cannot be read (" in page.text and page.text.count("Not shown") == 1
    assert not page.open and page.source.count("<h2>") == before.source.count("<h2>")
    counts = [sum(tag == "img" for tag, _ in each.tags) for each in (before, page)]
    assert counts[1] == counts[0] - name.endswith("png")


def test_damaged_figures_are_counted(folder):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[10:10] = [b"\xff\x00", b'{"iteration": 11, "lo}', b"3", b'{"loss": 1.0}', b'{"iteration": 11, "loss": "x"}']
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    page = Page(write_report(folder))
    assert "Not shown: damaged lines of metrics.jsonl (5)." in page.text and "300 of 500 iterations" in page.text
    with Log(folder, "none", done=20):
        pass
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")[0]] == [*range(1, 21)]


def test_a_mistake_of_ours_is_not_hidden(folder, monkeypatch):
    monkeypatch.setattr("rapm.report.page._settings", lambda config: config.nothing)
    with pytest.raises(AttributeError):
        write_report(folder)


def test_pictures_that_were_put_beside_the_grids(folder):
    """As by `rapm sample --output run/samples`."""
    for name in ("00000-0", "grid", "000010-x"):
        write_atomic(folder / "samples" / f"{name}.png", png(Image.new("RGB", (8, 8))))
    (folder / "samples.png").unlink()
    page = Page(write_report(folder))
    assert "The newest so far" in page.text and "Iteration 8" in page.text and "Not shown" not in page.text


def points(text: str, colour: int) -> list[tuple[float, float]]:
    path = re.search(rf'd="M([^"]*)"[^>]*stroke="var\(--c{colour}\)"', text)[1]
    return [tuple(map(float, point.split())) for point in path.split("L")]


def test_a_chart_puts_points_where_they_belong():
    series = {"a": [(0, 1.0), (50, 10.0), (100, 100.0)], "b": [(100, 0.0)]}
    linear = points(svg(Chart("t", "", {"a": "A"}), series), 0)
    assert linear[1][0] - linear[0][0] == pytest.approx(linear[2][0] - linear[1][0], abs=0.2)
    assert linear[0][1] > linear[1][1] > linear[2][1]  # upwards is more
    assert (linear[1][1] - linear[2][1]) / (linear[0][1] - linear[1][1]) == pytest.approx(10, rel=0.05)
    logarithmic = points(svg(Chart("t", "", {"a": "A", "b": "B"}, log=True), series), 0)
    steps = [logarithmic[i][1] - logarithmic[i + 1][1] for i in range(2)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)  # and a 0 has no logarithm
    flat = svg(Chart("t", "", {"b": "B"}), {"b": [(i, 3.0) for i in range(1, 1001)]})
    assert "nan" not in flat and flat.count("L") <= 2 * 400


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
def test_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """Headless Chromium draws the page as it was written: every chart, every picture, no script, no line in its log."""
    path = write_report(folder)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--log-level=0",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,4000"]  # fmt: skip
    shot = tmp_path / "page.png"

    def chromium(*words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [BROWSER, *flags, *words, path.resolve().as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    dumped = chromium("--dump-dom")
    written, drawn = Page(path), tmp_path / "dumped.html"
    drawn.write_text(dumped.stdout, "utf-8")
    for tag in ("svg", "img", "table", "polyline", "h2"):
        counts = [source.lower().count(f"<{tag}") for source in (written.source, dumped.stdout)]
        assert counts[0] == counts[1], f"{tag}: {counts}"
    assert "<script" not in dumped.stdout.lower() and "CONSOLE" not in dumped.stderr
    chromium(f"--screenshot={shot}")
    picture = Image.open(shot).convert("L")
    assert picture.size == (1200, 4000) and len(set(picture.resize((60, 200)).tobytes())) > 8  # something is drawn


def test_a_folder_of_any_name_can_be_pasted(folder, capsys):
    odd = folder.with_name("mein L\u00e4ufe's r\u00fcn")
    folder.rename(odd)
    assert main(["report", str(odd)]) == 0
    html = (odd / "report.html").read_text("utf-8")
    command = unescape(re.search(r"From here: <code>(.*?)</code>", html)[1])
    assert shlex.split(command)[-1] == str(odd)
