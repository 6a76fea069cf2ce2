"""Run every kernel on a GPU, for a checker: `compute-sanitizer --tool memcheck python tests/sanitize.py`.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own, so that an access beside it shows;
`--tool racecheck` looks at shared memory, slowly. The calls are those of a slot of a small model in bf16, fp16 and
fp32; or `--calls` of each operator for each row of kernels that it launches, spread over all.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from unittest import mock

import torch
from compile_kernels import Call, large_card, recorded
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_map
from triton.runtime.jit import JITFunction

from rapm.kernels import runtime


def real(x: object) -> object:
    """A CUDA tensor like a meta one: normal numbers, or zeros where they are counters and indices."""
    if not torch.is_tensor(x):
        return x
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return y.normal_() if y.is_floating_point() else y.zero_()


def run(call: Call, inputs: list) -> None:
    with torch.no_grad():  # as below autograd, where operators run
        OPDEFS[call[0]]._init_fn(*inputs)


def launches(call: Call) -> tuple[str, ...]:
    """Names of the kernels that a call of meta tensors would launch."""
    names: list[str] = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: names.append(kernel.__name__)):
        run(call, list(call[1]))
    return tuple(names)


def chosen(most: int) -> list[tuple[Call, tuple[str, ...]]]:
    """Calls that launch a kernel of ours, at most so many of those that launch the same, and what they launch."""
    runtime.MODE = "triton"
    large_card()
    found: dict[tuple[str, ...], list[Call]] = defaultdict(list)
    for call in recorded(full=False):
        found[(call[0], *launches(call))].append(call)
    spread = {names: calls[:: max(1, len(calls) // most)][:most] for names, calls in found.items()}
    return [(call, names) for (_, *names), calls in spread.items() if names for call in calls]


def main(most: int) -> None:
    calls = chosen(most)
    for call, _ in calls:
        run(call, tree_map(real, list(call[1])))
    torch.cuda.synchronize()
    kernels = {name for _, names in calls for name in names}
    print(f"{len(calls)} calls of {len({call[0] for call, _ in calls})} operators, {len(kernels)} kernels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=sys.maxsize, help="at most, of those that launch the same kernels")
    main(parser.parse_args().calls)
