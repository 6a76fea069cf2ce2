"""`rapm export --push_to_hub` against a hub on loopback: what arrives there, and what is said when it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import OWNER, TOKEN, FakeHub, fake_hub
from huggingface_hub import constants

from rapm.errors import ExportError, UserError
from rapm.export.hub import SHARED, claim_repo, upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """huggingface_hub at work with a fake hub and its user's token, and with no other's."""
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with files that are not to be shared."""
    folder = tmp_path / "run"
    for name in (*SHARED, "config.toml", "metrics.jsonl", "checkpoint-4/state.safetensors", "merged/model_index.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "README.md").write_text("---\nlicense: other\n---\n\n# A LoRA\n", encoding="utf-8")
    return folder


def test_what_is_shared_arrives(hub: FakeHub, run: Path) -> None:
    repo = claim_repo(f"{OWNER}/lora")
    assert repo == f"{OWNER}/lora" and hub.repos[repo]["private"]
    assert upload(run, repo) == f"{hub.url}/{repo}"
    assert hub.repos[repo]["files"] == {name: (run / name).read_bytes() for name in SHARED}


def test_a_name_alone_is_the_users_and_what_is_there_stays(hub: FakeHub, run: Path) -> None:
    hub.repos[f"{OWNER}/lora"] = {"private": False, "files": {"notes.md": b"mine"}}
    repo = claim_repo("lora")
    upload(run, repo)
    assert repo == f"{OWNER}/lora" and not hub.repos[repo]["private"]
    assert set(hub.repos[repo]["files"]) == {*SHARED, "notes.md"}


def test_without_a_token_nothing_is_asked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token .*hf auth login.*HF_TOKEN"):
        claim_repo("lora")
    assert hub.requests == []


@pytest.mark.parametrize("trouble", ["token", "rights", "name", "offline", "no network"])
def test_trouble_is_one_line_before_any_work(hub: FakeHub, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a/b/c d" if trouble == "name" else f"{OWNER}/lora"
    if trouble == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    if trouble == "rights":
        hub.refuse = 403
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if trouble == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=f"push_to_hub: cannot make or open the model {name}") as caught:
        claim_repo(name)
    assert "\n" not in str(caught.value) and "hf_" not in str(caught.value)
    assert not hub.repos


def test_a_broken_upload_keeps_the_files(hub: FakeHub, run: Path) -> None:
    repo = claim_repo("lora")
    hub.refuse = 403
    with pytest.raises(ExportError, match=f"the upload to {repo} failed") as caught:
        upload(run, repo)
    assert "\n" not in str(caught.value) and str(run) in str(caught.value)
    assert all((run / name).is_file() for name in SHARED)
