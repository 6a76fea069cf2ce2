"""benchmarks/everything.py: which job runs when and where, what becomes of those that fail or hang, and every call."""

from __future__ import annotations

import argparse
import json
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import rapm.bench.measure  # noqa: F401  (everything.py imports it within its seconds)
from rapm.bench.results import keep
from rapm.cli import build_parser

ROOT = Path(__file__).parents[1]
CARD = {"card": {"device": "A Card"}}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import everything

    before = signal.getsignal(signal.SIGTERM)
    yield everything
    signal.signal(signal.SIGTERM, before)
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


def simulate(everything: ModuleType, jobs: list, count: int, seconds: float, takes: Callable) -> dict[str, tuple]:
    """When each job that runs begins and ends, and its GPUs, by the clock of a world where `takes(job)` is its time."""
    now, found = [0.0], {}

    def start(job: object, cards: list[str], left: float) -> SimpleNamespace:
        begin, end = now[0], now[0] + takes(job)
        assert left == seconds - begin
        found[job.name] = begin, end, cards
        return SimpleNamespace(poll=lambda: 0 if now[0] >= end else None)

    def pause(tick: float) -> None:
        now[0] += tick

    ended = everything.schedule(jobs, [str(i) for i in range(count)], seconds, start, lambda: now[0], pause)
    assert sorted(end.job.name for end in ended) == sorted(found)
    return found


def job(everything: ModuleType, name: str, seconds: float, gpus: int = 1, priority: int = 1, words: str = "") -> object:
    return everything.Job(name, priority, gpus, seconds, "", words)


def test_the_longest_first_by_priority(everything: ModuleType) -> None:
    """What does not fit is left out, and what does passes it; one for two GPUs waits, and nobody passes that."""
    jobs = [job(everything, *x) for x in (
        ("short", 10), ("long", 60), ("late", 80, 1, 2), ("pair", 30, 2, 2), ("little", 5, 1, 3), ("first", 20, 1, 0),
    )]  # fmt: skip
    found = simulate(everything, jobs, 2, 100, lambda job: job.seconds - 0.1)
    begins = {name: round(begin) for name, (begin, _, _) in found.items()}
    assert begins == {"first": 0, "long": 0, "short": 20, "pair": 60, "little": 90}
    assert found["long"][2] == ["1"] and found["short"][2] == ["0"] and sorted(found["pair"][2]) == ["0", "1"]


@pytest.mark.parametrize("seed", range(20))
def test_never_more_gpus_than_there_are(everything: ModuleType, seed: int) -> None:
    """Nor one for two jobs, nor a start that cannot end in time; the longest of those that fit is the first."""
    draw = random.Random(seed)
    count, seconds = draw.randint(2, 4), 100
    jobs = [job(everything, str(i), draw.randint(1, 60), draw.choice((1, 1, 1, 2))) for i in range(20)]
    found = simulate(everything, jobs, count, seconds, lambda job: job.seconds * draw.uniform(0.2, 1.0))
    assert len(found) > 3
    for begin, _, _ in found.values():
        used = [card for b, e, cards in found.values() if b <= begin < e for card in cards]
        assert len(used) == len(set(used)) <= count
    expected = {job.name: job.seconds for job in jobs}
    assert all(begin + expected[name] <= seconds for name, (begin, _, _) in found.items())
    begins = sorted(found.items(), key=lambda item: item[1][0])  # Python's sort keeps the order of those at one time
    for (one, _), (two, (begin, _, _)) in pairwise(begins):
        assert expected[one] >= expected[two] or begin + expected[two] <= seconds < begin + expected[one]


def script(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")


@pytest.mark.usefixtures("two_gpus")
def test_what_fails_and_what_hangs(
    everything: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import scheduling

    monkeypatch.setattr(scheduling, "GRACE", 0.3)
    seen = "os.environ['CUDA_VISIBLE_DEVICES'] + os.environ.get('A', '')"
    note = f"import os, sys\nopen(sys.argv[-1], 'w').write({seen})\n"
    hang = f"""{note}import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
for _ in range(600):
    time.sleep(0.1)
    os.write(1, b"alive\\n")  # at once, whatever PYTHONUNBUFFERED says: two processes write
"""
    scripts = {
        "good": script(tmp_path / "good.py", note),
        "bad": script(tmp_path / "bad.py", f"{note}print('begun')\nsys.exit('it broke')"),
        "hang": script(tmp_path / "hang.py", hang),
    }
    shown, output = tmp_path / "results", tmp_path / "output"
    shown.mkdir()
    (shown / "kept.json").write_text("of an earlier call")
    jobs = [
        everything.Job("hang", 1, 1, 1, "hang.json", scripts["hang"]),
        everything.Job("good", 2, 1, 1, "good.json", f"A=b {scripts['good']}"),
        everything.Job("bad", 3, 1, 0.5, "kept.json", scripts["bad"]),
        everything.Job("long", 1, 1, 1000, "long.json", scripts["good"]),
        everything.Job("pair", 1, 3, 1, "pair.json", scripts["good"]),
        everything.Job("tool", 1, 1, 1, "", "no-such-program {python}"),
        everything.Job("other", 1, 1, 1, "other.json", scripts["good"]),
    ]
    monkeypatch.setattr(everything, "JOBS", tuple(jobs))
    monkeypatch.setattr(everything, "RESULTS", shown)
    monkeypatch.setattr(sys, "argv", ["everything.py", "--seconds", "5", "--skip", "oth*", "--output", str(output)])
    start = time.monotonic()
    assert everything.main() == 1
    assert time.monotonic() - start < 20
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["good", "bad", "hang"]
    table = {line[10:].split()[0]: (line[:10].strip(), line.split(" s  ")[-1]) for line in lines[3:]}
    assert table["bad"] == ("failed", "exit code 1: it broke") and table["hang"][0] == "failed"
    assert table["good"][0] == "done" and table["hang"][1] == "the time was up: alive"
    assert {name for name, (how, _) in table.items() if how == "left out"} == {"long", "pair", "tool"}
    assert "needs 3 GPUs" in lines[-2] + lines[-3] and "other" not in table
    assert (output / "good.json").read_text() == "6b" and (output / "hang.json").read_text() == "4"
    assert (output / "kept.json").read_text() == "6" and (output / "logs" / "bad.log").read_text().startswith("begun")
    alive = (output / "logs" / "hang.log").read_text()
    time.sleep(0.5)
    assert alive and (output / "logs" / "hang.log").read_text() == alive


def test_a_stopped_call_leaves_no_process(everything: ModuleType, tmp_path: Path) -> None:
    begun = []

    def start(job: object, cards: list[str], left: float) -> object:
        if begun:
            raise KeyboardInterrupt
        begun.append(everything.launch(job, cards, left, tmp_path))
        return begun[0]

    jobs = [job(everything, name, 1, words="{python} -c 'import time; time.sleep(60)'") for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        everything.schedule(jobs, ["0", "1"], 100, start)
    assert begun[0].poll() == -signal.SIGTERM


def test_without_a_gpu_or_a_name(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, code, name in (([], 2, "no CUDA device"), (["--list"], 0, "slot-time"), (["--only", "no"], 2, "no job")):
        monkeypatch.setattr(sys, "argv", ["everything.py", *words])
        assert everything.main() == code
        out, err = capsys.readouterr()
        assert name in out + err and len(err.splitlines()) == (code == 2)


class Parsed(Exception):
    """What a script has been told was understood."""


def test_every_script_takes_its_words(
    everything: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Each script runs up to its parser, which must take the words, and write where it is told."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *words: object) -> None:
        raise Parsed(parse(self, *words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def understood(path: Path, words: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        with pytest.raises(Parsed) as found:
            runpy.run_path(str(path), run_name="__main__")
        return found.value.args[0]

    with pytest.raises(SystemExit):
        understood(ROOT / "benchmarks" / "slot_time.py", ["--modles", "sd15"])
    for job in everything.JOBS:
        words = everything.command(job, tmp_path, 500.0)[1]
        if "sanitize.py" in job.words:
            place = words.index("tests/sanitize.py")
            assert words[place - 1] == sys.executable and understood(ROOT / words[place], words[place + 1 :])
        elif words[1:3] == ["-m", "pytest"]:
            told = pytestconfig._parser.parse(words[3:])
            assert told.markexpr == "gpu" and told.timeout == 300 and told.file_or_dir, job.name
            assert all((ROOT / path).exists() for path in [*told.file_or_dir, *(told.ignore or ())]), job.name
        elif words[1:3] == ["-m", "rapm"]:
            assert parse(build_parser(), words[3:]).output == tmp_path / job.file
        else:
            place = tmp_path / job.file if job.file else None
            assert understood(ROOT / words[1], words[2:]).output == place, job.name


def test_every_file_is_shown(everything: ModuleType) -> None:
    """In README or docs/results.md; and whatever they show from a GPU has its job."""
    import readme

    shown = {name for _, name in readme.SECTIONS.values()} | {"full_teacher_sd15_5G", "full_teacher_sdxl_8G"}
    elsewhere = {"teacher", "stops"}
    assert {Path(job.file).stem for job in everything.JOBS if job.file} == shown - elsewhere
    assert len({job.name for job in everything.JOBS}) == len(everything.JOBS)


def test_rows_of_several_calls(tmp_path: Path) -> None:
    """Two at a time lose nothing; what is measured again takes the old one's place, on another card all of it."""
    path = tmp_path / "new" / "step.json"

    def call(model: str) -> None:
        report = {**CARD, "limits": {"x": 1}, "models": {model: {}}}
        for i in range(10):
            report["models"][model][i] = {"seconds": i}
            keep(path, report, depth=2)

    with ThreadPoolExecutor() as pool:
        list(pool.map(call, "ab"))
    found = json.loads(path.read_text())
    assert found["models"] == {model: {str(i): {"seconds": i} for i in range(10)} for model in "ab"}
    told = keep(path, {**CARD, "models": {"a": {"3": {"failed": "no"}}}}, depth=2, conclude=lambda x: {**x, "end": 1})
    assert told == json.loads(path.read_text()) and told["limits"] == {"x": 1} and told["end"] == 1
    assert told["models"]["a"]["3"] == {"failed": "no"} and len(told["models"]["a"]) == 10
    assert keep(path, {**CARD, "models": {"a": {}}})["models"] == {"a": {}, "b": found["models"]["b"]}
    assert keep(path, {**CARD, "models": {}}, depth=0)["models"] == {}
    mine, yours = ({"models": {"a": {"card": name, name: {}}}} for name in ("mine", "yours"))
    keep(path.with_name("each.json"), mine, depth=2, same=())
    assert keep(path.with_name("each.json"), yours, depth=2, same=())["models"] == yours["models"]
    other = {"card": {"device": "Another"}, "models": {"c": {}}}
    assert keep(path, other, depth=2) == other and not list(path.parent.glob("*.tmp"))
