"""Two processes as one run, on a CPU: one store, one training, one voice; and what becomes of it when one is lost.

The run has two ranks, three shards of trajectories, a replay, and no GPU in it. benchmarks/distributed.py has the same
training in one process, and starts both on two GPUs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rapm.checkpoint import STATE, checkpoints
from rapm.cli import build_parser, main
from rapm.config import Config
from rapm.trajectories import prepare
from rapm.unet import UNet

ROOT = Path(__file__).parents[1]
SMALL = dict(
    block_out_channels=[32, 32], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)  # fmt: skip
SETTINGS = """
device = "cpu"
resolution = [32, 32]
steps = 2
trajectories = 131
solve_batch = 32
fine_steps = 1
guidance = 3.0
validation_prompts = 1
fd_samples = 0
learning_rate = 1e-3
head_learning_rate = 1e-3  # at 1e-4 a rounding decides from the third iteration on
lr_warmup_steps = 0
replay_size = 2
log_steps = 1
checkpointing_steps = 2
validation_steps = 100000
"""
STEPS = 5
END = 20.0  # seconds in which all must have ended once one is lost


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import distributed as module

    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("distributed", "slot_time"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a UNet that is smaller still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.UNET, "sd1", {**tiny.SD1, **SMALL})
        return tiny.place(tmp_path_factory.mktemp("place"), SETTINGS)


def arguments(place: Path, output: Path, *extra: str) -> list[str]:
    return [
        "--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--output_dir", str(output),
        "--config", str(place / "settings.toml"), "--report_to", "none", "--lora_rank", "2",
        "--max_train_steps", str(STEPS), *extra,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Of a launcher: our tree, and as many threads as the processes in this one use."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(command: list[str], output: Path) -> subprocess.Popen:
    """The launcher, with what all processes say in `output`.txt."""
    with output.with_suffix(".txt").open("w") as said:
        return subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT)


def said(output: Path) -> list[str]:
    """The lines of rapm's own that end a command."""
    return re.findall(r"rapm: .*", output.with_suffix(".txt").read_text())


@pytest.fixture(scope="module")
def run(place: Path, bench: ModuleType) -> Path:
    """The folder of an uninterrupted run of two processes, by torchrun."""
    command = bench.launch(2, "-m", "rapm.train", *arguments(place, place / "run"))
    assert start(command, place / "run").wait(300) == 0, (place / "run.txt").read_text()
    return place / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_store_has_the_bytes_of_one_process(place, run):
    assert main(["trajectories", *arguments(place, place / "alone")]) == 0
    mine, theirs = files(run / "trajectories"), files(place / "alone/trajectories")
    assert len([name for name in mine if name.startswith("shard-")]) == 3
    assert mine == theirs


def test_one_process_with_the_mean_of_the_gradients_learns_the_same(run, bench):
    mine = bench.found(run)
    assert len(mine.losses) == STEPS
    for name, difference in bench.differences(mine, bench.expected(run, 2, "cpu")).items():
        assert difference <= bench.TOLERANCE, name
    for name, difference in bench.differences(mine, bench.expected(run, 1, "cpu")).items():  # half of each batch
        assert difference > 10 * bench.TOLERANCE, name


def test_only_the_first_writes_and_speaks(run):
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {
        "trajectories", "checkpoint-4", "checkpoint-5", "config.toml", "metrics.jsonl", "samples", "samples.png",
        "pytorch_lora_weights.safetensors", "diffusers", "README.md", "report.html", "comfyui_workflow.json",
    }  # fmt: skip
    text = run.with_suffix(".txt").read_text()
    assert text.count("prompts: 3 in") == text.count("done: ") == 1 and not said(run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS + 1  # and one validation


def test_resumed_by_accelerate_equals_uninterrupted(place, run, tmp_path):
    """From iteration 4 on, by the other launcher: every byte of the state, each rank's replay too."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-5"))
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "rapm.train",
    ]  # fmt: skip
    command = [*launcher, *arguments(place, tmp_path / "run", "--resume_from_checkpoint", "latest")]
    assert start(command, tmp_path / "run").wait(300) == 0, (tmp_path / "run.txt").read_text()
    assert "at iteration 4" in (tmp_path / "run.txt").read_text()
    mine, theirs = (load_file(folder / "checkpoint-5" / STATE) for folder in (tmp_path / "run", run))
    assert mine.keys() == theirs.keys() and {"replay.tap0", "rank1.replay.tap0", "adam.lora.0.exp_avg"} <= mine.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert not torch.equal(mine["replay.tap0"], mine["rank1.replay.tap0"])


def test_another_number_of_processes_does_not_resume(place, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert main(["train", *arguments(place, tmp_path / "run", "--resume_from_checkpoint", "latest")]) == 2
    assert "is of 2 processes, not 1: start as many again" in capsys.readouterr().err


def lose(command: list[str], output: Path) -> Path:
    """Kill rank 1 of a run once it has saved: all end in one line. The newest checkpoint."""
    launcher = start(command, output)
    while launcher.poll() is None and not checkpoints(output):
        time.sleep(0.02)
    ranks = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(x[5:]): int(child) for x in variables if x.startswith(b"RANK=")}
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(END) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert len(said(output)) == 1 and "rank 1 of 2 is lost, so all end" in said(output)[0]
    return checkpoints(output)[-1]


def test_a_lost_rank_ends_all_and_nothing_is_lost(place, run, tmp_path, bench):
    """SIGKILL: the other one says so in one line and ends, and what it has saved is whole."""
    shutil.copytree(run / "trajectories", tmp_path / "run/trajectories")
    words = arguments(place, tmp_path / "run", "--max_train_steps", "100000")
    newest = lose(bench.launch(2, "-m", "rapm.train", *words), tmp_path / "run")
    assert load_file(newest / STATE).keys() == load_file(run / "checkpoint-4" / STATE).keys()


def test_the_page_has_commands_that_parse():
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), re.S | re.M)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert {words[0] for words in commands} == {"torchrun", "accelerate"}
    for words in commands:
        module = words.index("-m") + 1
        ours = {"rapm.train": ["train"], "rapm": []}[words[module]] + words[module + 1 :]
        assert build_parser().parse_args(ours).teacher


def test_the_stand_in_is_enough_of_a_teacher(tmp_path, bench):
    """What the benchmark solves with, on a CPU: the store is whole."""
    unet = UNet(tiny.UNET["sdxl"]).requires_grad_(False).eval()
    config = Config(trajectories=3, validation_prompts=1, steps=2, fine_steps=1, solve_batch=2)
    store = prepare(tmp_path / "store", bench.stand_in(unet, 8), ["a"], config, progress=False)
    assert len(store) == 3 and torch.isfinite(store[2].positions).all()


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


@pytest.mark.gpu
@needs_two
def test_two_gpus_learn_what_one_process_does(bench):
    """NCCL's sum inside the captured slots, on the embedded teacher: losses and LoRA within 1e-4."""
    assert bench.check().keys() == {"losses", "lora"}


@pytest.mark.gpu
@needs_two
def test_a_gpu_that_waits_for_a_lost_rank_ends_too(tmp_path, bench):
    """Rank 0's GPU is in an all-reduce that will never end."""
    (tmp_path / "settings.toml").write_text("trajectories = 30\nfine_steps = 5\nvalidation_prompts = 2\n")
    words = ["--config", str(tmp_path / "settings.toml"), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    words += ["--max_train_steps", "100000", "--checkpointing_steps", "50", "--validation_steps", "100000"]
    newest = lose(bench.launch(2, "-m", "rapm.train", *words), tmp_path / "run")
    assert "lora" in load_file(newest / STATE)
