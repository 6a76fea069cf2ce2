"""Jobs of several GPUs' machine in a given time: which is started when, and how what still runs at the end is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

TICK, GRACE = 0.2, 8.0  # seconds: between two looks at what runs; from SIGTERM to SIGKILL


class Job(NamedTuple):
    """`words`: a script, pytest or a program, behind its variables; `{left}` are the seconds it may take."""

    name: str
    priority: int  # the smallest first
    gpus: int
    seconds: float  # on an H100, with the start
    file: str  # of results, which its `--output` names
    words: str


class Running(NamedTuple):
    """A job on `cards`, since `begun`."""

    job: Job
    process: subprocess.Popen
    cards: list[str]
    begun: float


class Ended(NamedTuple):
    """A job that was started; `late`: it was ended because the time was up."""

    job: Job
    code: int
    seconds: float
    late: bool = False


def due(waiting: Sequence[Job], free: int, left: float) -> Job | None:
    """The next job, if it can start: the first of those that fit into the time. None passes one that waits for GPUs."""
    job = next((job for job in waiting if job.seconds <= left), None)
    return job if job and job.gpus <= free else None


def schedule(
    jobs: Sequence[Job],
    cards: Sequence[str],
    seconds: float,
    start: Callable[[Job, list[str], float], subprocess.Popen],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[Ended]:
    """What was run of `jobs`, none of which needs more than all `cards`, in `seconds`, in the order of their ends.

    `start` starts a job on some of the cards, with so many seconds left. A process must lead a group of its own.
    """
    begin, free, running, ended = clock(), list(cards), [], []
    waiting = sorted(jobs, key=lambda job: (job.priority, -job.seconds))

    def note(run: Running, late: bool = False) -> None:
        ended.append(Ended(run.job, run.process.poll(), clock() - run.begun, late))
        print(f"{run.job.name}: exit code {ended[-1].code} after {ended[-1].seconds:.0f} s", flush=True)

    try:
        while True:
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                free += run.cards
                note(run)
            left = begin + seconds - clock()
            while job := due(waiting, len(free), left):
                waiting.remove(job)
                mine, free = free[: job.gpus], free[job.gpus :]
                running.append(Running(job, start(job, mine, left), mine, clock()))
            if not running or left <= 0:
                break
            pause(TICK)
    finally:  # Ctrl-C too: jobs have process groups of their own
        stop([run.process for run in running])
    for run in running:
        note(run, late=True)
    return ended


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM to their groups, then SIGKILL to what is left."""

    def tell(number: int) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    tell(signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    tell(signal.SIGKILL)
    for process in processes:
        process.wait()
