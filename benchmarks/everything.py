"""Every figure that README and docs/results.md have from a GPU, and the GPU tests, in the time there is:

    python benchmarks/everything.py --list                                the jobs; seconds are an H100's
    python benchmarks/everything.py --seconds 570 --output DIR            as many as fit, on all GPUs of this machine
    python benchmarks/everything.py --only 'memory-*' --skip '*-stock'      some of them

Each free GPU takes the next job: by priority, the longest first; one for two GPUs waits until two are free. What does
not fit into the time left is left out. When the time is up, what still runs gets SIGTERM and, some seconds later,
SIGKILL: scripts write each row when they have it. Results go to DIR, with what benchmarks/results has beside them, of
such a card where a table has one, so that they can be copied back; what a job says to DIR/logs/NAME.log. Exit code 1 if
a job fails.

Not here: what a CPU measures (demo.py, tests/faults/kills.py), and the embedded teacher's own training
(rapm/zoo/make_teacher.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from scheduling import Ended, Job, schedule

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TELL = 25  # seconds that a soak needs before and after its iterations
TESTS = (
    "pytest -m gpu -o addopts=--strict-markers -p no:cacheprovider --continue-on-collection-errors --durations 10 "
    "--timeout 300 --session-timeout {left}"  # which ends with what failed, as a signal would not; some compile much
)
# Jobs of their own do those
NOT_OTHERS = ("kernels", "test_distributed.py", "test_faults.py", "test_full_teacher.py", "test_memory_policies.py",
              "test_unet.py")  # fmt: skip
STEP, FOUR = "benchmarks/step.py --models", "--providers naive stock rapm lean"
OURS, STOCK = "benchmarks/memory.py --kinds rapm --models", "benchmarks/memory.py --kinds stock --models"
LARGE, SMALL = "--budgets none 24G 16G", "--budgets 12G 8G 6G"
CHECKER = "compute-sanitizer --error-exitcode 1 --tool"
JOBS = (
    Job("distributed-equal", 0, 2, 100, "distributed.json", "benchmarks/distributed.py --parts equal"),
    Job("distributed-speed", 1, 2, 210, "distributed.json", "benchmarks/distributed.py --parts speed"),
    Job("tests-two-gpus", 0, 2, 100, "", f"{TESTS} tests/test_distributed.py"),
    Job("tests-others", 0, 1, 400, "", " ".join([f"{TESTS} tests", *(f"--ignore tests/{x}" for x in NOT_OTHERS)])),
    Job("tests-policies", 0, 1, 100, "", f"{TESTS} tests/test_memory_policies.py"),
    Job("tests-unet", 1, 1, 250, "", f"{TESTS} tests/test_unet.py"),
    Job("tests-kernels", 1, 1, 180, "", f"{TESTS} -n 4 --dist load tests/kernels"),
    Job("trajectories", 1, 1, 230, "trajectories.json", "benchmarks/trajectories.py"),
    Job("step-sdxl", 1, 1, 360, "step.json", f"{STEP} sdxl {FOUR}"),  # 90 s of each are its check
    Job("step-others", 1, 1, 330, "step.json", f"{STEP} sd15 embedded {FOUR}"),
    Job("step-sdxl-compile", 1, 1, 170, "step.json", f"{STEP} sdxl --providers compile"),
    Job("step-sd15-compile", 1, 1, 200, "step.json", f"{STEP} sd15 --providers compile"),
    Job("slot-time", 1, 1, 90, "slot_time.json", "benchmarks/slot_time.py"),
    Job("job-training", 2, 1, 450, "job.json", "benchmarks/job.py --stages training --share 0.05"),
    Job("bench", 2, 1, 250, "kernels.json", "rapm bench"),
    Job("memory-sdxl-1", 2, 1, 200, "memory.json", f"{OURS} sdxl --ranks 1 {LARGE}"),
    Job("memory-sdxl-1-small", 2, 1, 240, "memory.json", f"{OURS} sdxl --ranks 1 {SMALL}"),
    Job("memory-sdxl-1-stock", 2, 1, 290, "memory.json", f"{STOCK} sdxl --ranks 1"),
    Job("memory-sdxl-64", 2, 1, 210, "memory.json", f"{OURS} sdxl --ranks 64 {LARGE}"),
    Job("memory-sdxl-64-small", 2, 1, 200, "memory.json", f"{OURS} sdxl --ranks 64 {SMALL}"),
    Job("memory-sdxl-64-stock", 2, 1, 290, "memory.json", f"{STOCK} sdxl --ranks 64"),
    Job("memory-sd15-64", 2, 1, 240, "memory.json", f"{OURS} sd15 --ranks 64"),
    Job("memory-sd15-64-stock", 2, 1, 240, "memory.json", f"{STOCK} sd15 --ranks 64"),
    Job("memory-768", 2, 1, 300, "memory.json", f"{OURS} sdxl-768 sd15-768"),
    Job("memory-offload", 2, 1, 240, "memory.json", "benchmarks/memory.py --models sdxl --kinds move"),
    Job("full-sdxl-14G", 2, 1, 170, "full_teacher_sdxl_14G.json", "tests/test_full_teacher.py sdxl --vram 14G"),
    Job("full-sdxl-8G", 2, 1, 270, "full_teacher_sdxl_8G.json", "tests/test_full_teacher.py sdxl --vram 8G"),
    Job("full-sd15-5G", 2, 1, 90, "full_teacher_sd15_5G.json", "tests/test_full_teacher.py sd15 --vram 5G"),
    Job("job-trajectories", 2, 1, 90, "job.json", "benchmarks/job.py --stages trajectories"),
    Job("crowd", 2, 1, 250, "crowd.json", "tests/faults/crowd.py"),
    Job("soak-same-bits", 2, 1, 220, "soak.json", "benchmarks/soak.py --same_bits"),
    Job("low-precision-slots", 2, 1, 60, "low_precision.json", "benchmarks/low_precision.py --parts slots"),
    Job("low-precision-products", 2, 1, 40, "low_precision.json", "benchmarks/low_precision.py --parts products"),
    Job("soak", 3, 1, 520, "soak.json", "benchmarks/soak.py --limit_s {left}"),  # 680 s for all of it
    Job("soak-fp16", 3, 1, 350, "soak.json", "benchmarks/soak.py --precision fp16 --limit_s {left}"),
    Job("ablation", 3, 1, 450, "ablation.json", "benchmarks/quality.py ablation --iterations 2000 --pairs 4096"),
    Job("low-precision-quality", 3, 1, 230, "low_precision.json", "benchmarks/low_precision.py --parts quality"),
    Job("search", 3, 1, 250, "search.json", "benchmarks/quality.py search --iterations 1050 --pairs 4096"),
    Job("memcheck", 3, 1, 550, "",
        f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {CHECKER} memcheck {{python}} tests/sanitize.py"),
    Job("racecheck", 3, 1, 200, "", f"{CHECKER} racecheck {{python}} tests/sanitize.py --calls 3"),
)  # fmt: skip


def command(job: Job, output: Path, left: float) -> tuple[dict[str, str], list[str]]:
    """Its variables and its words, for a start with `left` seconds to go."""
    words = shlex.split(job.words.format(left=int(left) - TELL, python=shlex.quote(sys.executable)))
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    if words[0] in ("pytest", "rapm"):
        words.insert(0, "-m")
    if words[0] == "-m" or words[0].endswith(".py"):
        words.insert(0, sys.executable)
    return variables, words + ["--output", str(output / job.file)] * bool(job.file)


def launch(job: Job, cards: list[str], left: float, output: Path) -> subprocess.Popen:
    """Starts `job` in a process group of its own, which sees `cards` only."""
    (output / "logs").mkdir(parents=True, exist_ok=True)
    if job.file and (RESULTS / job.file).is_file() and not (output / job.file).exists():
        shutil.copy(RESULTS / job.file, output / job.file)  # a script keeps of it what another call has measured
    variables, words = command(job, output, left)
    environment = {**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(cards), "PYTHONUNBUFFERED": "1"}
    with (output / "logs" / f"{job.name}.log").open("wb") as log:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def refused(job: Job, count: int) -> str:
    """Why `job` cannot run beside `count` GPUs; empty if it can."""
    program = command(job, Path(), 0)[1][0]
    if job.gpus > count:
        return f"needs {job.gpus} GPUs"
    return "" if shutil.which(program) else f"{program} is not on PATH"


def told(ended: Sequence[Ended], left_out: dict[str, str], output: Path) -> str:
    """A line a job: done, failed with the last line of its log, left out."""
    lines = [f"done      {end.job.name:24}{end.seconds:5.0f} s" for end in ended if end.code == 0]
    for end in ended:
        if end.code:
            log = (output / "logs" / f"{end.job.name}.log").read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(log) if line.strip()), "it said nothing")
            late = "the time was up: " if end.late else f"exit code {end.code}: "
            lines.append(f"failed    {end.job.name:24}{end.seconds:5.0f} s  {late}{last[:200]}")
    return "\n".join([*lines, *(f"left out  {name:24}{why}" for name, why in left_out.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570, help="that this may take; some more to end what runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="these jobs; * and ? as in a shell")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="not these")
    parser.add_argument("--output", type=Path, metavar="DIR", default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--list", action="store_true", help="the jobs, and nothing more")
    arguments = parser.parse_args()
    for pattern in (*arguments.only, *arguments.skip):
        if not any(fnmatchcase(job.name, pattern) for job in JOBS):
            print(f"everything: no job is called {pattern}: --list names them", file=sys.stderr)
            return 2
    wanted = [job for job in JOBS if any(fnmatchcase(job.name, pattern) for pattern in arguments.only)]
    wanted = [job for job in wanted if not any(fnmatchcase(job.name, pattern) for pattern in arguments.skip)]
    if arguments.list:
        print("\n".join(f"{job.name:24}{job.seconds:5.0f} s on {job.gpus}: {job.words}" for job in wanted))
        return 0
    begin = time.monotonic()
    import torch  # here: on a fresh machine it takes some of the time

    from rapm.bench.measure import need_gpu
    from rapm.errors import UserError

    try:
        need_gpu()
    except UserError as error:
        print(f"everything: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through schedule's `finally`
    seen, output = os.environ.get("CUDA_VISIBLE_DEVICES"), arguments.output.resolve()
    cards = [str(i) for i in range(torch.cuda.device_count())]
    cards = seen.split(",")[: len(cards)] if seen else cards
    left_out = {job.name: why for job in wanted if (why := refused(job, len(cards)))}
    able = [job for job in wanted if job.name not in left_out]
    left = arguments.seconds - (time.monotonic() - begin)
    ended = schedule(able, cards, left, lambda *words: launch(*words, output))
    started = {end.job.name for end in ended}
    left_out |= {job.name: f"{job.seconds:.0f} s were not left" for job in able if job.name not in started}
    print(told(ended, left_out, output))
    return int(any(end.code for end in ended))


if __name__ == "__main__":
    sys.exit(main())
