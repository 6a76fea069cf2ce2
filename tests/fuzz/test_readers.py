"""Spoilt files of every kind: one clear line, no crash, nothing written, memory bounded."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import pytest
import readers

CASES = 150  # of each kind in `make test`; fuzz.py runs as many as it is given


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def samples(folder: Path) -> dict[str, readers.Reader]:
    return readers.samples(folder)


NAMES = (
    "LoRA", "checkpoint", "UNet weights", "UNet config", "UNet index", "pipeline index", "scheduler config",
    "text encoder config", "VAE config", "VAE weights", "single file", "single file's YAML", "settings", "prompts",
    "prompts csv", "prompts jsonl", "prompts parquet", "metadata", "shard",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_files_are_read_or_refused(samples: dict[str, readers.Reader], folder: Path, name: str) -> None:
    assert set(samples) == set(NAMES)
    file, read = samples[name]
    sound = (folder / file).read_bytes()
    assert readers.outcome(read, folder) == "read"
    before = sorted(folder.rglob("*"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = []
    try:
        for case in range(CASES):
            (folder / file).write_bytes(readers.spoil(sound, random.Random(case)))
            try:
                outcomes.append(readers.outcome(read, folder))
            except Exception as error:
                raise AssertionError(f"{name}, case {case}: {type(error).__name__}: {error}") from error
    finally:
        (folder / file).write_bytes(sound)
    assert outcomes.count("refused") > CASES / 10  # the fuzzer does spoil things
    assert sorted(folder.rglob("*")) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 256 * 2**10  # KiB


@pytest.mark.parametrize(
    "name", ["UNet config", "UNet index", "pipeline index", "scheduler config", "text encoder config", "VAE config"]
)
def test_values_of_another_kind(samples: dict[str, readers.Reader], folder: Path, name: str) -> None:
    """Spoilt bytes seldom leave JSON that can be read: here each of its values is something else."""
    file, read = samples[name]
    sound = (folder / file).read_text()
    config, outcomes = json.loads(sound), []
    try:
        for key in list(config)[:60]:
            for value in (None, -1, "x", [], {"x": [None]}, 10**40):
                (folder / file).write_text(json.dumps({**config, key: value}))
                try:
                    outcomes.append(readers.outcome(read, folder))
                except Exception as error:
                    raise AssertionError(f"{name}, {key}: {value!r}: {type(error).__name__}: {error}") from error
    finally:
        (folder / file).write_text(sound)
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "config", [b"44", b"[]", b'{"block_out_channels": [32], "layers_per_block": 1000000000}', b"{}x", b"[" * 100_000]
)
def test_configs_that_are_no_unet(samples: dict[str, readers.Reader], folder: Path, config: bytes) -> None:
    """What coverage-guided fuzzing has found, and what it would take too long to find."""
    file, read = samples["UNet config"]
    sound = (folder / file).read_bytes()
    (folder / file).write_bytes(config)
    try:
        assert readers.outcome(read, folder) == "refused"
    finally:
        (folder / file).write_bytes(sound)
