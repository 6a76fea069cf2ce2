"""What the command line refuses, in one line and before any work, and how it ends on Ctrl-C."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rapm import draw
from rapm.cli import build_parser, main, settings
from rapm.config import Config
from rapm.store import METADATA


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "teacher_to_draw", None)  # not reached


def refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line with which a command is refused, on the standard error."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rapm: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "flags, words",
    [
        *((f"--guidance={value}", "guidance") for value in ("nan", "inf", "-5", "0", "0.5")),
        *((f"--seeds={value}", "seed") for value in (-1, 2**63, 99999999999999999999)),
        *((f"--steps={value}", "steps") for value in (0, -1)),
        *((f"--batch={value}", "batch") for value in (0, -1)),
        ("--resolution=0x0", "resolution"),
        ("--resolution=100x128", "resolution"),
        ("--mixed_precision=fp8", "mixed_precision"),
        ("--prompts=nosuch.txt", "not both"),
        ("--teacher=", "teacher"),
        ("--negative_prompt=\udcff", "not UTF-8"),
    ],
)
@pytest.mark.usefixtures("nothing_loaded")
def test_sample_refuses(flags: str, words: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert words in refused(["sample", "x", flags], capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_loaded")
def test_sample_refuses_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "out" / "grid.png").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for output in ("dir.png", "out", "file", "file/a.png", "a" * 250 + ".png"):
        assert f"output {output} cannot be written" in refused(["sample", "x", "--output", output], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_sample_refuses_a_grid_that_its_format_cannot_hold(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "sample_batches", None)  # not reached
    argv = ["sample", *["x"] * 130, "--output", str(tmp_path / "a.webp")]
    assert "too large" in refused(argv, capsys)


def test_sample_needs_prompts(capsys: pytest.CaptureFixture) -> None:
    assert "prompts" in refused(["sample"], capsys)


def test_sample_on_a_full_disk(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(draw, "write_atomic", full)
    assert main(["sample", "x", "--steps=1", "--output", str(tmp_path / "a.jpg")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"rapm: {tmp_path / 'a.jpg'}: No space left") and err.count("\n") == 1


def test_verify_of_what_is_no_store(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """A damaged one is a result, on the standard output."""
    for name in (str(tmp_path / "nosuch"), str(tmp_path)):
        assert "not a store of trajectories" in refused(["trajectories", "--verify", name], capsys)
    (tmp_path / METADATA).write_text("{}")
    assert main(["trajectories", "--verify", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "is damaged" in out and err == ""


LONG = "a red seven on the left, " * 12
PATHS = [
    *(("train", option) for option in ("--prompts", "--output_dir", "--teacher", "--teacher_lora", "--config",
                                       "--resume_from_checkpoint")),
    *(("sample", "x", option) for option in ("--lora", "--teacher", "--prompts", "--output")),
    *(("evaluate", option) for option in ("--run", "--lora", "--captions", "--reference", "--clip", "--inception")),
    ("trajectories", "--verify"), ("trajectories", "--prompts"), ("export", "--run"), ("export", "--checkpoint"),
    ("report",), ("doctor", "--output_dir"), ("plan", "--output_dir"), ("bench", "--output"),
]  # fmt: skip


@pytest.mark.parametrize("words", PATHS, ids=" ".join)
@pytest.mark.usefixtures("nothing_loaded")
def test_paths_that_nothing_can_be(words, capsys, tmp_path) -> None:
    """Too long, as a prompt in the place of its file; empty, as a variable that is not set; the home of nobody."""
    line = refused([*words, LONG], capsys)
    assert "a red seven on the left, a red" in line and "File name too long" in line and len(line) < 260
    assert "it is empty" in refused([*words, ""], capsys)
    assert "~nosuchuser is nobody's home" in refused([*words, "~nosuchuser/x"], capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [("train", "--preset"), ("plan", "--vram"), ("sample", "x", "--resolution"), ("export", "--push_to_hub")]
)
def test_words_that_are_empty(words, capsys) -> None:
    assert "it is empty" in refused([*words, ""], capsys)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_name_of_a_file_of_settings_that_is_too_long(capsys, tmp_path) -> None:
    (tmp_path / "a.toml").write_text(f'teacher = "{"a" * 300}"\n')
    line = refused(["plan", "--config", "a.toml"], capsys)
    assert "aaa...: File name too long: choose a shorter one" in line and len(line) < 200


def test_home_is_not_a_folder_named_so(capsys, tmp_path, monkeypatch) -> None:
    """A shell leaves the ~ of --option=~/x, and a file of settings has none to expand it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    given = build_parser().parse_args(["sample", "--prompts=~/p.txt", "--lora=~/a", "--output=~/b.png"])
    assert given.prompts == str(tmp_path / "home/p.txt")
    assert (given.lora, given.output) == (tmp_path / "home/a", tmp_path / "home/b.png")
    (tmp_path / "a.toml").write_text('store = "~/s"\nprompts = "~/p.csv:text"\nteacher_lora = ["~/l:0.5"]\n')
    config = settings(build_parser().parse_args(["train", "--config=a.toml", "--output_dir=~/r"]))
    assert [config.output_dir, config.store, config.prompts, *config.teacher_lora] == [
        str(tmp_path / "home" / name) for name in ("r", "s", "p.csv:text", "l:0.5")
    ]
    (tmp_path / "a.toml").write_text('teacher = "~nosuchuser/x"\n')
    assert "~nosuchuser is nobody's home" in refused(["plan", "--config=a.toml"], capsys)


@pytest.mark.usefixtures("nothing_loaded")
def test_sample_makes_no_folder_of_another_kind_of_picture(capsys, tmp_path) -> None:
    assert "output x.gif: choose a name in .png, " in refused(["sample", "x", "--output", "x.gif"], capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_loaded")
def test_sample_with_a_run_that_has_no_lora_yet(capsys, tmp_path) -> None:
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run/config.toml").write_text(Config().to_toml())
    assert "has none yet: `rapm export --run 'my run'` writes it" in refused(["sample", "x", "--lora=my run"], capsys)


def test_sample_replaces_no_file(capsys, tmp_path, monkeypatch) -> None:
    """Neither a picture of the name that was given, or that is the default, nor those of a folder."""
    monkeypatch.chdir(tmp_path)
    for output in ("samples.png", "pictures"):
        for prompt in ("a red seven", "a blue one"):
            assert main(["sample", prompt, "--steps=1", *(["--output", output] if output == "pictures" else [])]) == 0
    names = ["samples.png", "samples-1.png", *(f"pictures/{x}.png" for x in ("00000-0", "grid", "00001-0", "grid-1"))]
    assert capsys.readouterr().out.split() == names
    assert len({(tmp_path / name).read_bytes() for name in names}) == 4  # a picture and a grid of each prompt


# A shell's background jobs, and what they start, do not hear SIGINT
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    """One line and 130, though what is half imported swallows the KeyboardInterrupt, as numpy may."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n os.kill(os.getpid(), signal.SIGINT)\n time.sleep(9)\nexcept BaseException: pass"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"{HEARD}import sys; from rapm.cli import main; sys.exit(main(['plan']))"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "rapm: stopped\n")
