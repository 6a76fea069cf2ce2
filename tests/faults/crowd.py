"""Take a GPU's memory away from a run: python tests/faults/crowd.py [--output FILE] (needs a GPU).

While a run of the embedded teacher goes on under `--vram`, another process takes all of the card but `--spares` MiB,
and what the run gives back when it validates too. The run may go on with less kept, or end with exit code 1 and one
line. Then the other process leaves, the same command goes on from the newest checkpoint, and the LoRA must be the
undisturbed run's, bit for bit: both have PyTorch's deterministic algorithms. `--check` goes through this on a CPU,
where nothing is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from kills import contents, left_over, whole

from rapm.checkpoint import checkpoints
from rapm.export.lora_file import WEIGHTS

SETTINGS = dict(
    trajectories=40, validation_prompts=1, fd_samples=0, log_steps=1, max_train_steps=400, validation_steps=100,
    checkpointing_steps=50, vram="4G", report_to="none",
)  # fmt: skip
CHECK = dict(SETTINGS, trajectories=3, fine_steps=1, max_train_steps=6, validation_steps=3, checkpointing_steps=2)
DETERMINISTIC = (
    "import sys, torch; torch.use_deterministic_algorithms(True, warn_only=True); from rapm.cli import main; "
    "sys.exit(main(sys.argv[1:]))"
)
PIECE = 2 * 2**20  # what the driver hands out
LIMIT = 240.0  # seconds for a run


def hog(spare: int) -> None:
    """Once a line comes in: holds all memory of the card but `spare` bytes, for as long as the process lives."""
    held, cuda = [], torch.cuda.is_available()
    if cuda:
        held.append(torch.empty(1, device="cuda"))
    print("ready", flush=True)
    sys.stdin.readline()
    while cuda:
        size = (torch.cuda.mem_get_info()[0] - spare) // PIECE * PIECE
        while size >= PIECE:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                break
            except torch.OutOfMemoryError:
                size = size // 2 // PIECE * PIECE
        time.sleep(0.002)
    time.sleep(LIMIT)


def start(output: Path) -> subprocess.Popen:
    """The run in `output`, or what is left of it; its words go to `output`.txt and its errors to `output`.err."""
    words = ["train", "--config", str(output.parent / "settings.toml"), "--output_dir", str(output)]
    words += ["--resume_from_checkpoint", "latest"] * bool(checkpoints(output))
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(sys.path)}
    with output.with_suffix(".txt").open("w") as out, output.with_suffix(".err").open("w") as err:
        return subprocess.Popen([sys.executable, "-c", DETERMINISTIC, *words], stdout=out, stderr=err, env=environment)


def iterations(output: Path) -> list[int]:
    """Those whose losses the run has written."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [line["iteration"] for line in found if "loss" in line]


@contextmanager
def crowded(spare: int):
    """A process that takes the card when a line is written to it."""
    command = [sys.executable, __file__, "--hog", str(spare)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        try:
            yield other.stdin
        finally:
            other.kill()


def case(output: Path, spare: int, expected: dict, settings: dict) -> dict:
    """A run that is crowded out; AssertionError where something is lost or said wrongly."""
    begun = max(1, settings["checkpointing_steps"] // 2)
    with crowded(spare) as other:
        run, deadline = start(output), time.monotonic() + LIMIT
        while len(iterations(output)) < begun and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.poll() is None, f"ended with {run.poll()} before it was disturbed"
        at = iterations(output)[-1]
        other.write("go\n")
        other.flush()
        code = run.wait(timeout=LIMIT)
    said, errors = output.with_suffix(".txt").read_text(), output.with_suffix(".err").read_text()
    last = errors.strip().splitlines()[-1]
    assert code in (0, 1), f"exit code {code}: {errors[-12000:]}"
    assert "Traceback" not in errors, errors[-2000:]
    assert code == 0 or (last.startswith("rapm: ") and "out of memory" in last), last
    done, kept = iterations(output)[-1], [int(path.name.partition("-")[2]) for path in checkpoints(output)]
    assert not whole(output), whole(output)
    assert max(kept, default=0) >= (done - 1) // settings["checkpointing_steps"] * settings["checkpointing_steps"]
    if code:
        assert start(output).wait(timeout=LIMIT) == 0, output.with_suffix(".err").read_text()[-2000:]
    assert iterations(output) == list(range(1, settings["max_train_steps"] + 1))
    assert not left_over(output), left_over(output)
    assert contents(output / WEIGHTS)[0] == expected, "the LoRA is not the undisturbed run's"
    stepped = "note: out of memory" in said + errors
    line = last if code else ""
    return {"crowded_at": at, "code": code, "ended_at": done, "stepped_down": stepped, "line": line, "same_lora": True}


def campaign(place: Path, spares: list[int], settings: dict) -> Iterator[dict]:
    """The cases by MiB that are left, after each of them."""
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    (place / "settings.toml").write_text("".join([f'store = "{place / "store"}"\n', *lines]))
    (place / "store").mkdir()
    reference, found = place / "reference", {}
    assert start(reference).wait(timeout=LIMIT) == 0, reference.with_suffix(".err").read_text()[-2000:]
    expected = contents(reference / WEIGHTS)[0]
    for spare in spares:
        found[str(spare)] = case(place / f"run-{spare}", spare * 2**20, expected, settings)
        print(f"{spare} MiB left: {found[str(spare)]}", flush=True)
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spares", type=int, nargs="+", default=[256, 64, 0], help="MiB that are left to the run")
    parser.add_argument("--output", type=Path, help="where to write the figures, as JSON")
    parser.add_argument("--check", action="store_true", help="a short run, on any device")
    parser.add_argument("--hog", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hog is not None:
        hog(arguments.hog)
        return 0
    if not arguments.check and not torch.cuda.is_available():
        print("crowd: no CUDA device here: what is taken is a GPU's memory", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        settings = CHECK if arguments.check else SETTINGS
        for found in campaign(Path(folder), arguments.spares[:1] if arguments.check else arguments.spares, settings):
            if arguments.output:
                from rapm.bench.measure import card
                from rapm.bench.results import keep

                keep(arguments.output, {"card": card(), "cases": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
