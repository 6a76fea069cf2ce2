"""What will be measured, compiled beforehand by processes of its own, all at once.

The measuring pass then finds it in the caches on disk of Triton and of torch.compile (FX graphs and AOTAutograd's),
which know it by its graph, inputs and settings.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from rapm.bench.measure import measuring, wanted
from rapm.bench.ops import COMPILE, RAPM, Op, operators, providers_of
from rapm.kernels import runtime

WORKERS, WORKER_BYTES = 8, 2**32  # processes that compile, at most; GPU memory that one may need
UNCOMPILED = "attention", "frozen_conv"  # operators whose products are libraries' alone


def tasks_of(table: dict[str, Op], shapes: dict[tuple[str, str], list[tuple]]) -> list[tuple[str, tuple, str]]:
    """What `warm` compiles: the one that takes longest first, then torch.compile's others, then our kernels."""
    tasks = {(name, shape, RAPM) for (_, name), found in shapes.items() for shape in found if name not in UNCOMPILED}
    tasks |= {(name, shape, COMPILE) for name, shape, _ in tasks if table[name].compiled}
    tasks = random.Random(0).sample(sorted(tasks, key=str), len(tasks))  # neighbours often share a kernel
    return sorted(tasks, key=lambda task: (task[0] != "disc_head", task[2] != COMPILE))


@functools.cache
def own_operators() -> dict[str, Op]:
    """Without the libraries they are compared with."""
    return operators({}, peers=False)


def warmed(task: tuple[str, tuple, str]) -> bool:
    """Runs a provider (the task: operator, shape, provider) forward and backward, so that it is compiled; if it can."""
    name, shape, provider = task
    try:
        with measuring():
            op = own_operators()[name]
            args = op.make(*shape)
            heads = wanted(providers_of(op, provider == COMPILE)[provider].run(*args))
            if heads:
                torch.autograd.grad(heads, wanted(args), [torch.ones_like(y) for y in heads])
        return True
    except Exception:  # the measuring pass will meet it again, and tell
        return False


def warm(tasks: list[tuple[str, tuple, str]]) -> str:
    """Compiles `tasks` in processes of their own; what was done, in a line."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each process; one for each core by default
    if runtime.triton:  # torch.compile moves Triton's cache at its first kernel, unless told where it is
        os.environ.setdefault("TRITON_CACHE_DIR", runtime.triton.knobs.cache.dir)
    places = min(WORKERS, (os.cpu_count() or 1) // 2, torch.cuda.mem_get_info()[0] // WORKER_BYTES, len(tasks))
    workers, done, start = max(1, places), 0, time.perf_counter()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for good in pool.map(warmed, tasks):
                done += good
    except BrokenProcessPool:  # one was killed, perhaps for its memory: what is not done is compiled later
        pass
    seconds = time.perf_counter() - start
    return f"compiled {done} of {len(tasks)} cases beforehand, {workers} at once, in {seconds:.0f} s"
