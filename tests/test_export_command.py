"""`rapm export`: its flags, and what it refuses before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rapm import cli, train
from rapm.errors import UserError


@pytest.mark.parametrize(
    "flags, asked",
    [
        ([], dict(dtype=torch.float32, merge=False, push_to_hub=None)),
        (["--dtype", "fp16", "--merge"], dict(dtype=torch.float16, merge=True, push_to_hub=None)),
        (["--dtype", "bf16", "--push_to_hub"], dict(dtype=torch.bfloat16, merge=False, push_to_hub="")),
        (["--push_to_hub", "me/lora"], dict(dtype=torch.float32, merge=False, push_to_hub="me/lora")),
    ],
)
def test_flags(flags: list[str], asked: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(train, "export_run", lambda *run, **options: calls.append((run, options)))
    assert cli.main(["export", "--run", "runs/x", *flags]) == 0
    assert calls == [((Path("runs/x"), "latest"), asked)]


def test_another_dtype_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["export", "--dtype", "int8"]) == 2
    assert "int8" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint: give a run.s folder with --run") as caught:
        train.export_run(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)
    assert not (tmp_path / "nothing").exists()


def test_the_hub_is_asked_before_the_teacher_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "state.safetensors").touch()
    (tmp_path / "config.toml").write_text("")
    names = []

    def refuse(name: str) -> None:
        names.append(name)
        raise UserError("no")

    monkeypatch.setattr(train, "claim_repo", refuse)
    monkeypatch.setattr(train, "prepare_run", None)  # not reached
    for given in ("", "me/lora"):
        with pytest.raises(UserError, match="no"):
            train.export_run(tmp_path, push_to_hub=given)
    assert names == [tmp_path.name, "me/lora"]
