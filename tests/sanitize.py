"""Run every kernel on a GPU, for a checker: `compute-sanitizer --tool memcheck python tests/sanitize.py`.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own, so that an access beside it shows;
`--tool racecheck` looks at shared memory, slowly; of cuDNN's kernels it names one, in which it finds hazards (H200,
cuDNN 9.19). The calls are those of a slot of a small model in bf16, fp16 and fp32, or `--calls` of each operator.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

import torch
from compile_kernels import Call, recorded
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_map

from rapm.kernels import runtime


def real(x: object) -> object:
    """A CUDA tensor like a meta one: normal numbers, or zeros where they are counters and indices."""
    if not torch.is_tensor(x):
        return x
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return y.normal_() if y.is_floating_point() else y.zero_()


def main(most: int) -> None:
    runtime.MODE = "triton"
    by_name: dict[str, list[Call]] = defaultdict(list)
    for call in recorded(full=False):
        by_name[call[0]].append(call)
    calls = [call for found in by_name.values() for call in found[:: max(1, len(found) // most)][:most]]
    for name, args in calls:
        OPDEFS[name]._init_fn(*tree_map(real, list(args)))
    torch.cuda.synchronize()
    print(f"{len(calls)} calls of {len(by_name)} operators")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=sys.maxsize, help="at most, of each operator, spread over all")
    main(parser.parse_args().calls)
