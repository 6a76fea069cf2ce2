"""Several processes as one run, a process a GPU: `torchrun -m rapm.train`, `accelerate launch -m rapm.train`.

Where WORLD_SIZE is not above 1 nothing is set up, and every function here is that of a single process. Otherwise three
groups over all ranks, none of which shares a thread or a queue with another:

    hosts      gloo, blocking: what the processes agree on between iterations
    gradients  NCCL, on a CPU gloo: the one sum of a slot, inside its CUDA graph
    watch      gloo, in a thread: a ring in which each rank waits for the exit code of the one before it, so that a
               rank that fails or is lost ends all, whatever a GPU is waiting for

Rank 0 alone writes, but for the shards of trajectories, and speaks.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rapm.config import Config
from rapm.errors import RunError, UserError

MEETING = timedelta(minutes=10)  # until every rank has started
FOREVER = timedelta(days=365)  # no wait for another rank's work has a limit: the ring knows whether it lives
VERDICT = 5.0  # seconds for the ring to say that a rank is lost, where a collective has failed first
ALIGNED = 4  # numbers: 16 bytes, which vectorised kernels ask for
Value = TypeVar("Value")


class _Run(NamedTuple):
    rank: int
    world: int
    store: Any  # a torch.distributed.Store
    hosts: dist.ProcessGroup
    gradients: dist.ProcessGroup
    watch: dist.ProcessGroup


_run: _Run | None = None
_ending = threading.Lock()


def rank() -> int:
    """Which of the processes this is, from 0."""
    return 0 if _run is None else _run.rank


def world() -> int:
    """How many processes the run has."""
    return 1 if _run is None else _run.world


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def local_device(name: str) -> str:
    """`name`, and for "cuda" in one of several processes the GPU that is its own."""
    return f"cuda:{_number('LOCAL_RANK')}" if _run is not None and name == "cuda" else name


@contextmanager
def group(config: Config) -> Iterator[None]:
    """The processes that a launcher has started, as one run; nothing for a single one. UserError for what cannot be.

    An error leaves the groups as they are: `fail` ends the process.
    """
    global _run
    if (count := _count()) == 1:
        yield
        return
    if config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {config.device}: each of {count} processes takes that of its LOCAL_RANK: write cuda")
    if config.prompts == "-":
        raise UserError(f"prompts -: {count} processes cannot share the standard input: give a file")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    _run = _meet(_number("RANK"), count, "nccl" if cuda else "gloo")
    ring = threading.Thread(target=_wait_for_the_one_before, args=(_run,), daemon=True)
    ring.start()
    with ExitStack() as stack:
        if not first():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        try:
            yield
            wait()
        except RuntimeError as error:
            if not isinstance(error, (RunError, torch.OutOfMemoryError)):
                time.sleep(VERDICT)  # a collective that a lost rank has broken: the ring says it in one line
            raise
    dist.send(torch.tensor([0]), (_run.rank + 1) % _run.world, group=_run.watch)
    ring.join()
    dist.destroy_process_group()
    _run = None


def fail(code: int, message: object) -> int:
    """Say why the command ends, on the standard error, and return its exit code.

    Of several processes the first to know says it, and all end with its code, at once: a GPU may be waiting for one
    that is gone.
    """
    if _run is None:
        if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
            print(f"rapm: {message}", file=sys.stderr)
        return code
    ours = threading.current_thread() is threading.main_thread()  # not the ring's
    _ending.acquire()  # and never release: of two threads of ours the first ends the process
    mine = said = f"{_run.rank} {code}"
    try:
        said = _run.store.compare_set("failed", "", mine).decode()
    except RuntimeError:  # whoever kept the store is gone
        if ours:
            _ending.release()
            time.sleep(VERDICT)  # and the ring knows why
            _ending.acquire()
    if said == mine:
        line = "" if ours else "\n"  # from a thread: the main one's progress bar is still on its line
        print(f"{line}rapm: {message}", file=sys.__stderr__, flush=True)
    _end(_run, int(said.split()[1]))


def _end(run: _Run, code: int) -> NoReturn:
    """End this process and, by the ring, the others, whose exit code will be the same."""
    with suppress(RuntimeError):
        dist.send(torch.tensor([code]), (run.rank + 1) % run.world, group=run.watch)
    if sys.stdout:  # None where a launcher has closed it
        sys.stdout.flush()
    os._exit(code)


def wait() -> None:
    """Until every rank is here."""
    largest(0)


def largest(number: int) -> int:
    """The largest of the ranks' numbers, on all."""
    if _run is None:
        return number
    x = torch.tensor([number])
    dist.all_reduce(x, dist.ReduceOp.MAX, group=_run.hosts)
    return int(x)


def smallest(number: int) -> int:
    """The smallest of the ranks' numbers, on all."""
    return -largest(-number)


def from_first(value: Value) -> Value:
    """Rank 0's value, on all: anything that JSON can hold."""
    if _run is None:
        return value
    data = json.dumps(value).encode()
    size = largest(len(data) if first() else 0)
    x = torch.frombuffer(bytearray(data), dtype=torch.uint8) if first() else torch.zeros(size, dtype=torch.uint8)
    dist.broadcast(x, 0, group=_run.hosts)
    found: Value = json.loads(bytes(x.tolist()))
    return found


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each rank's tensors, as `owned` names them; on rank 0 those of all, on the CPU."""
    if _run is None:
        return tensors
    found = {}
    for name, x in tensors.items():
        mine = x.detach().cpu().contiguous()
        raw = mine.flatten().view(torch.uint8)  # gloo does not know every dtype
        parts = [torch.zeros_like(raw) for _ in range(_run.world)] if first() else None
        dist.gather(raw, parts, 0, group=_run.hosts)
        for r, part in enumerate(parts or ()):
            found[owned(name, r)] = part.view(mine.dtype).view(mine.shape)
    return found


def owned(name: str, of: int | None = None) -> str:
    """The name in a checkpoint of what each rank has for itself: of rank `of`, or of this one."""
    number = rank() if of is None else of
    return f"rank{number}.{name}" if number else name


class Gradients:
    """The ranks' gradients, and a few numbers beside them, in one fp32 buffer, so that a slot sends once.

    A mean is finite only where every rank's number is, so that all take or skip an update together.
    """

    def __init__(self, numbers: int, *weights: Tensor) -> None:
        """`numbers`: how many there will be; `weights`: fp32, whose gradients will come in this order."""
        self._sizes = [*(-(-x.numel() // ALIGNED) * ALIGNED for x in weights), numbers]
        self.buffer = torch.zeros(sum(self._sizes), device=weights[0].device)

    def __call__(self, numbers: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The means over the ranks: views of the buffer, good until the next call. May be captured."""
        given = (*gradients, numbers)
        views = [part[: x.numel()].view_as(x) for part, x in zip(self.buffer.split(self._sizes), given, strict=True)]
        for view, x in zip(views, given, strict=True):
            view.copy_(x)
        if _run is not None:
            dist.all_reduce(self.buffer, group=_run.gradients)
            self.buffer /= _run.world
        return views[-1], *views[:-1]


def _meet(number: int, count: int, backend: str) -> _Run:
    """The groups. UserError if the launcher's variables are not complete, or the others do not come."""
    try:
        store, _, _ = next(iter(rendezvous("env://", number, count, timeout=MEETING)))
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=MEETING)
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"{count} processes cannot meet ({why}): start them with torchrun, or unset WORLD_SIZE"
        ) from error
    hosts, gradients, watch = (dist.new_group(backend=kind, timeout=FOREVER) for kind in ("gloo", backend, "gloo"))
    return _Run(number, count, store, hosts, gradients, watch)


def _wait_for_the_one_before(run: _Run) -> None:
    """Until the rank before this one is done. If it is lost this one says so; if it has failed, it has said why."""
    before, code = (run.rank - 1) % run.world, torch.zeros(1, dtype=torch.long)
    try:
        dist.recv(code, before, group=run.watch)
        if code:
            _ending.acquire()
            _end(run, int(code))
    except RuntimeError:
        words = "what was written is whole; --resume_from_checkpoint latest goes on from the newest checkpoint"
        fail(1, f"rank {before} of {run.world} is lost, so all end; {words}")


def _count() -> int:
    return _number("WORLD_SIZE") if os.environ.get("WORLD_SIZE") else 1


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}: start several processes with torchrun, or unset WORLD_SIZE")
    return int(value)
