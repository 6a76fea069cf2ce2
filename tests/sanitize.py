"""Run every kernel once on a GPU, for a checker: `compute-sanitizer --tool memcheck python tests/sanitize.py`.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own, so that an access beside it shows;
`--tool racecheck` looks at shared memory; of cuDNN's kernels it names one, in which it finds hazards (H200, cuDNN
9.19): `--kernel-name-exclude kns=cudnn`. The calls are those of a slot of a small model in bf16, fp16 and fp32.
"""

from __future__ import annotations

import torch
from compile_kernels import recorded
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_map

from rapm.kernels import runtime


def real(x: object) -> object:
    """A CUDA tensor like a meta one: normal numbers, or zeros where they are counters and indices."""
    if not torch.is_tensor(x):
        return x
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return y.normal_() if y.is_floating_point() else y.zero_()


def main() -> None:
    runtime.MODE = "triton"
    calls = list(recorded(full=False))
    for name, args in calls:
        OPDEFS[name]._init_fn(*tree_map(real, list(args)))
    torch.cuda.synchronize()
    print(f"{len(calls)} calls of {len({name for name, _ in calls})} operators")


if __name__ == "__main__":
    main()
