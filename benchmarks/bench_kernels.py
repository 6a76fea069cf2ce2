"""The operators on the largest shape of a UNet pass, forward and backward, by provider (`make bench`).

A call is timed as its caller sees it, launches and all, and ends with a synchronisation. `rapm bench` has every shape,
the time on the GPU alone, and a check of what is computed.
"""

from __future__ import annotations

import pytest
import torch

from rapm.bench.measure import fresh, kernel_mode, results, wanted
from rapm.bench.ops import COMPILE, RAPM, REFERENCE, operators, providers_of
from rapm.bench.shapes import MODELS, unet_shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LEFT_OUT: dict[str, str] = {}
OPS = operators(LEFT_OUT)
CASES = [
    pytest.param(model, op, provider, id=f"{model} {op} {provider}")
    for model in MODELS
    for op in OPS
    for provider in (REFERENCE, *([COMPILE] if OPS[op].compiled else []), *OPS[op].others, RAPM)
]


@pytest.mark.parametrize(("model", "name", "provider"), CASES)
def test_operator(benchmark, model: str, name: str, provider: str) -> None:
    op, counts = OPS[name], OPS[name].shapes(unet_shapes(model))
    torch.manual_seed(0)
    chosen = providers_of(op, provider == COMPILE)[provider]
    args = fresh(chosen.prepare(*op.make(*max(counts, key=lambda shape: sum(op.cost(*shape))))))
    benchmark.group = f"{model} {name}"

    def both() -> None:
        results(chosen.run, args, cotangents)
        torch.cuda.synchronize()

    with kernel_mode("auto"):
        try:
            cotangents = [torch.randn_like(y) for y in wanted(chosen.run(*args))]
            both()
        except (RuntimeError, NotImplementedError) as error:
            if provider in (REFERENCE, COMPILE, RAPM):
                raise
            pytest.skip(f"{provider} refuses: {str(error).splitlines()[0]}")
        benchmark.pedantic(both, rounds=20, warmup_rounds=3)
