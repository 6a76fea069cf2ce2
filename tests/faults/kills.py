"""Stop a run at random moments of every phase, go on, and compare: python tests/faults/kills.py --kills 200.

A child (forked, so that imports are paid once) trains a tiny teacher. A trap ends it: SIGKILL before a file operation
in the output folder, or SIGKILL, SIGINT or SIGTERM a random while after some entry into a phase. After each stop what
lies on the disk must be whole; then the same command goes on, under the next trap, until a run gets through: its LoRA
must be the uninterrupted run's, byte for byte, and no temporary file may be left. Then a new folder begins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
from safetensors import safe_open

from rapm.checkpoint import STATE, checkpoints, load_checkpoint
from rapm.cli import main as rapm
from rapm.config import Config
from rapm.export.lora_file import WEIGHTS
from rapm.store import verify

# Phase -> what is entered, and the seconds it takes: a trap strikes up to that much later.
PHASES = {
    "encoding": ("rapm.teacher:Teacher.encode", 0.05), "solving": ("rapm.solver:Walk.__call__", 0.05),
    "training": ("rapm.training:Training.iterate", 0.3), "checkpoint": ("rapm.train:save_checkpoint", 0.05),
    "validation": ("rapm.training:Training.measure", 0.3), "export": ("rapm.train:finish", 2.0),
}  # fmt: skip
FILES = "files"  # the other trap: before the n-th operation on a file of the output folder
OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGINT, signal.SIGTERM)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
GRACE = 10.0  # seconds that a signalled run has to save and exit, without those in which others had the cores
LIMIT = 120.0  # for one child
SMALL = dict(
    block_out_channels=[32, 32], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)  # fmt: skip
SETTINGS = """
resolution = [32, 32]
steps = 2
trajectories = 3
solve_batch = 2
fine_steps = 2
guidance = 3.0
validation_prompts = 1
learning_rate = 1e-3
replay_size = 2
log_steps = 1
checkpointing_steps = 1
validation_steps = 2
"""
STEPS = 3


def place(folder: Path) -> Path:
    """`folder` with a tiny teacher, prompts and settings."""
    tiny.UNET["sd1"] = {**tiny.SD1, **SMALL}  # a run of it is two or three seconds
    tiny.tiny_pipeline("sd1", folder / "teacher")
    (folder / "prompts.txt").write_text("a cat\na dog\na house on a hill\n")
    (folder / "settings.toml").write_text(SETTINGS)
    return folder


def command(place: Path, output: Path) -> list[str]:
    words = [
        "train", "--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--output_dir",
        str(output), "--config", str(place / "settings.toml"), "--report_to", "none", "--lora_rank", "2",
        "--max_train_steps", str(STEPS),
    ]  # fmt: skip
    return words + ["--resume_from_checkpoint", "latest"] * bool(checkpoints(output))


Trap = Callable[[Callable[[], None]], None]  # arms itself; what it gets strikes


def before_file(output: Path, n: int) -> Trap:
    """Strikes before the n-th operation in `output` that changes a file."""

    def arm(strike: Callable[[], None]) -> None:
        left = n

        def hook(event: str, args: tuple) -> None:
            nonlocal left
            changes = event in OPERATIONS or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa"))
            if changes and str(args[0]).startswith(str(output)):
                left -= 1
                if left == 0:
                    strike()

        sys.addaudithook(hook)

    return arm


def in_phase(phase: str, entry: int, delay: float) -> Trap:
    """Strikes `delay` seconds after the entry-th entry into `phase`."""

    def arm(strike: Callable[[], None]) -> None:
        path, (module, _, names) = PHASES[phase][0], PHASES[phase][0].partition(":")
        owner = resolve_name(f"{module}:{names.rpartition('.')[0]}") if "." in names else resolve_name(module)
        name, original, left = names.rpartition(".")[2], resolve_name(path), entry

        def entered(*args: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                threading.Timer(delay, strike).start()
            return original(*args, **options)

        setattr(owner, name, entered)

    return arm


def waited(pid: int) -> float:
    """Seconds in which a process's first thread was ready and had no core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9


def run(words: list[str], trap: Trap | None = None, number: int = signal.SIGKILL) -> tuple[int, float]:
    """The exit code of a child (minus the signal that ended it), and the seconds from the strike to its end.

    Those seconds are what they are on an idle machine: without those it waited for a core.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)

        def strike() -> None:
            os.write(write, b"%f" % (time.monotonic() - waited(os.getpid())))
            os.kill(os.getpid(), number)

        code = 70
        try:
            if trap:
                trap(strike)
            code = rapm(words)
        finally:
            os._exit(code)
    os.close(write)
    deadline = time.monotonic() + LIMIT
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"a run took more than {LIMIT:.0f} s")
        time.sleep(0.01)
    end = time.monotonic() - waited(pid)
    _, status = os.waitpid(pid, 0)
    struck = os.read(read, 64)
    os.close(read)
    return os.waitstatus_to_exitcode(status), max(0.0, end - float(struck)) if struck else 0.0


def whole(output: Path) -> list[str]:
    """What is damaged in a folder whose run has just been stopped: files appear whole or not at all."""
    found = []
    store = output / "trajectories"
    if (store / "metadata.json").exists():
        found += [line for line in verify(store) if not line.endswith("is missing")]
    for checkpoint in checkpoints(output):
        config = Config.from_toml(output / "config.toml")
        load_checkpoint(checkpoint, Config().replace(**config))
    for path in (output / WEIGHTS, output / "diffusers" / WEIGHTS):
        if path.exists():
            contents(path)
    return found


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The tensors' bytes and the header of a LoRA file, but for the date and the folder's name."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {k: v for k, v in file.metadata().items() if k not in ("modelspec.date", "ss_output_name")}
    return {name: x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}, header


def left_over(output: Path) -> list[str]:
    """Temporary files, and folders of checkpoints without one."""
    empty = [path for path in output.glob("checkpoint-*") if not (path / STATE).is_file()]
    return [str(path) for path in [*output.rglob("*.tmp"), *empty]]


def progress(text: str) -> None:
    """On the error stream, at once: the figures alone go to the other one."""
    print(text, file=sys.stderr, flush=True)


def campaign(folder: Path, kills: int, seed: int, say: Callable[[str], None] = progress) -> dict:
    """`kills` stops in a row of runs; AssertionError at the first thing that is not as it was."""
    draw, place_of_runs = random.Random(seed), place(folder)
    reference = folder / "reference"
    start = time.monotonic()
    code, _ = run(command(place_of_runs, reference))
    assert code == 0, f"the uninterrupted run ended with {code}"
    operations = count_operations(place_of_runs, folder / "counted")
    say(f"reference: {time.monotonic() - start:.1f} s for two runs, {operations} file operations")
    expected = {name: contents(reference / name) for name in (WEIGHTS, f"diffusers/{WEIGHTS}")}
    stops, slowest, finished, output = Counter(), 0.0, 0, folder / "run-0"
    while sum(stops.values()) < kills:
        number = draw.choice(SIGNALS)
        phase = draw.choice((FILES, *PHASES))
        if phase == FILES:
            number, trap = signal.SIGKILL, before_file(output, draw.randint(1, operations))
        else:
            trap = in_phase(phase, draw.choice((1, 1, 2, 4)), draw.uniform(0, PHASES[phase][1]))
        code, seconds = run(command(place_of_runs, output), trap, number)
        where = f"{phase}, {signal.Signals(number).name}, folder {output.name}"
        if code == 0:  # the trap came too late, or never
            check_end(output, expected)
            finished, output = finished + 1, folder / f"run-{finished + 1}"
            continue
        assert code == (-number if number == signal.SIGKILL else CODES[number]), f"{where}: exit code {code}"
        assert number == signal.SIGKILL or seconds < GRACE, f"{where}: {seconds:.1f} s to exit"
        slowest = max(slowest, seconds if number != signal.SIGKILL else 0.0)
        damaged = whole(output)
        assert not damaged, f"{where}: {damaged}"
        stops[phase, signal.Signals(number).name] += 1
        if sum(stops.values()) % 20 == 0:
            say(f"{sum(stops.values())} stops, {finished} runs finished, slowest exit {slowest:.1f} s")
    code, _ = run(command(place_of_runs, output))
    assert code == 0, f"the last run ended with {code}"
    check_end(output, expected)
    by_phase = Counter()
    for (phase, _), n in stops.items():
        by_phase[phase] += n
    return {
        "stops": sum(stops.values()), "runs_finished": finished + 1, "file_operations": operations,
        "by_phase": dict(by_phase),
        "by_signal": dict(sum((Counter({name: n}) for (_, name), n in stops.items()), Counter())),
        "slowest_exit_seconds": round(slowest, 2), "seconds": round(time.monotonic() - start),
    }  # fmt: skip


def count_operations(place_of_runs: Path, output: Path) -> int:
    """How many file operations a whole run makes."""
    read, write = os.pipe()

    def arm(strike: Callable[[], None]) -> None:
        before_file(output, -1)(strike)  # never strikes; counts down from -1

        def hook(event: str, args: tuple) -> None:
            changes = event in OPERATIONS or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa"))
            if changes and str(args[0]).startswith(str(output)):
                os.write(write, b".")

        sys.addaudithook(hook)

    assert run(command(place_of_runs, output), arm)[0] == 0
    os.close(write)
    with os.fdopen(read, "rb") as file:
        return len(file.read())


def check_end(output: Path, expected: dict) -> None:
    for name, (tensors, header) in expected.items():
        mine, mine_header = contents(output / name)
        assert mine == tensors, f"{output.name}: {name} is not the uninterrupted run's"
        assert mine_header == header, f"{output.name}: the header of {name} differs"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["iteration"] for line in lines if "loss" in line]
    assert steps == list(range(1, STEPS + 1)), f"{output.name}: metrics of iterations {steps}"
    assert not left_over(output), f"{output.name}: left over: {left_over(output)}"


def together(count: int, kills: int, seed: int) -> dict:
    """`count` campaigns at a time, each in a process of its own and with its own seed; the sum of what they found."""
    command = [sys.executable, __file__, "--kills", str(-(-kills // count)), "--seed"]
    campaigns = [subprocess.Popen([*command, str(seed + i)], stdout=subprocess.PIPE, text=True) for i in range(count)]
    total: dict = {}
    for each in campaigns:
        text = each.communicate()[0]
        if each.returncode:
            raise SystemExit(f"a campaign failed: {' '.join(each.args)}")
        for name, value in json.loads(text[text.index("{") :]).items():
            if isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            elif name in ("stops", "runs_finished"):
                total[name] = total.get(name, 0) + value
            else:
                total[name] = max(total.get(name, 0), value)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--campaigns", type=int, default=1, help="that many at a time share the stops")
    parser.add_argument("--output", type=Path, help="where to write the figures, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a child of a process with threads of OpenMP's hangs
    if arguments.campaigns > 1:
        found = together(arguments.campaigns, arguments.kills, arguments.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = campaign(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
