"""The choice of an attention library: how it is timed and remembered, when it is not, and an unusable xformers."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, ROUNDOFF, error, tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from rapm.kernels import attention as module
from rapm.kernels import runtime
from rapm.kernels.attention import attention, choices, xformers_problem

# B H N d and L: SD1.5's self and cross attention, at three widths, and SDXL's
REAL = [(1, 8, 4096, 40, 4096), (1, 8, 4096, 40, 77), (1, 8, 1024, 80, 77), (2, 8, 64, 160, 64), (1, 10, 4096, 64, 77)]
GOOD = "from torch.nn.functional import scaled_dot_product_attention as sdpa\n" + (
    "def memory_efficient_attention(q, k, v):\n"
    "    return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()\n"
)
BUILD = "class Build:\n    cuda_version, torch_version = 1208, '2.10.0+cu128'\n"
MISFIT = BUILD + "error = OSError('no library')\nerror.build_info = Build\n_cpp_library_load_exception = error\n"


def qkv(batch: int, heads: int, n: int, d: int, length: int, dtype: torch.dtype, grad: bool = True) -> list[Tensor]:
    """As a UNet makes them: B H N d, views of B N H d."""
    return [
        tensor(batch, x, heads * d, dtype=dtype, mean=0.1)
        .unflatten(-1, (heads, d))
        .transpose(1, 2)
        .requires_grad_(grad)
        for x in (n, length, length)
    ]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_TIMES", {})
    xformers_problem.cache_clear()
    yield
    xformers_problem.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A function that installs an xformers of the given files."""
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "xformers"}

    def install(**files: str) -> None:
        for name, text in {"__init__": "", **files}.items():
            (tmp_path / "xformers").mkdir(exist_ok=True)
            (tmp_path / "xformers" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]
    sys.modules.update(saved)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA other libraries may compute it")
def test_on_a_cpu_it_is_pytorchs_own(backend: str):
    inputs = qkv(2, 3, 10, 8, 7, torch.float32)
    y, expected = attention(*inputs, backend), F.scaled_dot_product_attention(*inputs)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    assert all(map(torch.equal, torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)))
    assert choices() == {}


def test_compiled_without_a_graph_break():
    inputs = qkv(1, 2, 6, 8, 6, torch.float32, grad=False)
    compiled = torch.compile(lambda *x: attention(*x).transpose(1, 2).flatten(2), fullgraph=True, backend="aot_eager")
    assert error(compiled(*inputs), F.scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)) < 1e-5
    assert choices() == {}


def test_fake_tensors_and_the_reference_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_choice", lambda *_: pytest.fail("timed"))
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16)
        assert attention(q, q, q).shape == q.shape
    q = torch.empty(1, 2, 8, 16, device="meta")
    assert attention(q, q, q).shape == q.shape

    class Cuda:
        device = torch.device("cuda")

    monkeypatch.setattr(module, "Tensor", Cuda)
    assert not module._plain(Cuda())
    monkeypatch.setattr(runtime, "MODE", "reference")
    assert module._plain(Cuda())
    monkeypatch.setattr(runtime, "MODE", "auto")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert module._plain(Cuda())


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="'flash3': choose one of auto, sdpa, xformers"):
        attention(*qkv(1, 1, 2, 8, 2, torch.float32), "flash3")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the candidates in the order in which they are timed; none is run, and no GPU is needed."""
    calls, times = [], dict(cudnn=2.0, efficient=1.0, sdpa=4.0, xformers=0.5)

    def milliseconds(name: str, *_: Tensor) -> float:
        calls.append(name)
        if name not in times:
            raise RuntimeError("No available kernel. Aborting execution.")
        return times[name]

    monkeypatch.setattr(module, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "xformers_problem", lambda: "it is not installed")
    calls.append(times)  # the first entry, for tests to change
    return calls


def test_the_fastest_that_takes_the_case_is_timed_once_and_kept(measured: list, monkeypatch: pytest.MonkeyPatch):
    times = measured.pop()
    inputs = qkv(1, 2, 6, 8, 6, torch.float32)
    assert module._choice(*inputs) == module._choice(*inputs) == "efficient"
    assert measured == ["cudnn", "flash", "efficient"]
    assert list(choices().values()) == [{"efficient": 1.0, "cudnn": 2.0}]
    (label,) = choices()
    assert label == f"1x2x6x8 over 6, float32, {inputs[0].device}, forward and backward to qkv"
    assert json.loads(json.dumps(choices())) == choices()

    with torch.no_grad():  # another case
        monkeypatch.setattr(module, "xformers_problem", lambda: None)
        assert module._choice(*inputs) == "xformers"
    times.clear()
    times["sdpa"] = 4.0
    assert module._choice(*qkv(1, 2, 6, 8, 7, torch.float32)) == "sdpa"  # none takes it
    assert len(choices()) == 3 and module._choice(*inputs) == "efficient"


@pytest.mark.parametrize("name", ["OutOfResources", "CompilationError"])
def test_a_kernel_that_does_not_fit_the_card_is_no_candidate(
    name: str, measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.pop()
    triton = pytest.importorskip("triton")
    refusal = getattr(triton, name)(*{"OutOfResources": (77824, 65536, "shared memory")}.get(name, ("", None)))
    milliseconds = module._milliseconds

    def refused(name: str, *qkv: Tensor) -> float:
        if name == "short":
            raise refusal
        return milliseconds(name, *qkv)

    monkeypatch.setattr(module, "_milliseconds", refused)
    assert module._choice(*qkv(1, 2, 6, 8, 6, torch.float32)) == "efficient"


def test_ours_is_timed_where_it_takes_the_case(measured: list):
    times = measured.pop()
    times["short"] = 0.9
    assert module._choice(*qkv(1, 2, 6, 8, 7, torch.bfloat16)) == "short"
    assert module._choice(*qkv(1, 2, 6, 8, 7, torch.float64)) == "efficient"
    assert measured == ["cudnn", "flash", "efficient", "short", "cudnn", "flash", "efficient"]


def test_nothing_new_is_timed_where_it_would_be_recorded(measured: list, monkeypatch: pytest.MonkeyPatch):
    measured.pop()
    inputs, other = qkv(1, 2, 6, 8, 6, torch.float32), qkv(1, 2, 6, 8, 5, torch.float32)
    assert module._choice(*inputs) == "efficient"
    del measured[:]
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert module._choice(*inputs) == "efficient" and module._choice(*other) == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert module._choice(*inputs) == "efficient" and module._choice(*other) == "sdpa"
    assert measured == [] and len(choices()) == 1


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (None, "xformers is not installed: install the release built for torch"),
        (
            dict(__init__="raise OSError('undefined symbol: x\\nmore')"),
            r"does not import \(OSError: undefined symbol: x\)",
        ),
        (
            dict(ops="import flash_attn_of_old"),
            r"does not import \(ModuleNotFoundError: No module named 'flash_attn_of",
        ),
        (
            dict(__init__="__version__ = '0.0.35'\nfrom . import _cpp_lib", ops=GOOD, _cpp_lib=MISFIT),
            r"binary of xformers 0.0.35 is for torch 2.10.0\+cu128 and CUDA 12.8, not torch",
        ),
        (
            dict(__init__="from . import _cpp_lib", ops=GOOD, _cpp_lib="_cpp_library_load_exception = OSError()"),
            "xformers has no binary for this system",
        ),
        (
            dict(__init__="from . import _cpp_lib", ops=GOOD, _cpp_lib=f"{BUILD}_build_metadata = Build"),
            r"binary of xformers is for torch 2.10.0\+cu128 and CUDA 12.8",
        ),
        (dict(ops=""), "xformers has no memory_efficient_attention"),
    ],
)
def test_an_xformers_that_cannot_be_used_is_named(files, line: str, install, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if files is None:
        monkeypatch.setitem(sys.modules, "xformers", None)
    else:
        install(**files)
    problem = xformers_problem()
    assert problem and "\n" not in problem
    with pytest.raises(RuntimeError, match=line):
        attention(*qkv(1, 1, 2, 8, 2, torch.float32), "xformers")
    assert not caplog.records


def test_its_own_warning_is_not_logged_and_logging_is_as_before(install, caplog: pytest.LogCaptureFixture):
    install(__init__="import logging\nlogging.getLogger('xformers').warning('six lines')", ops=GOOD)
    level = logging.getLogger("xformers").level
    xformers_problem()
    assert not caplog.records and logging.getLogger("xformers").level == level


def test_xformers_is_called_with_its_layout(install, monkeypatch: pytest.MonkeyPatch):
    install(ops=GOOD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert xformers_problem() == "xformers needs a CUDA device, and there is none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    xformers_problem.cache_clear()
    assert xformers_problem() is None
    inputs = qkv(2, 3, 10, 8, 7, torch.float32)
    y = attention(*inputs, "xformers")
    assert error(y, F.scaled_dot_product_attention(*inputs)) < 1e-6
    assert y.transpose(1, 2).is_contiguous()


def test_the_installed_xformers_is_usable_or_named():
    problem = xformers_problem()
    if problem is None:
        inputs = qkv(1, 8, 128, 40, 77, torch.bfloat16)
        assert (
            error(attention(*inputs, "xformers"), F.scaled_dot_product_attention(*inputs))
            < 4 * ROUNDOFF[torch.bfloat16]
        )
    else:
        assert "\n" not in problem and "xformers" in problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", REAL)
def test_auto_is_as_precise_as_pytorchs_own(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = qkv(*shape, dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    dy = torch.randn_like(inputs[0])

    def results(f, inputs: list[Tensor]) -> list[Tensor]:
        y = f(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]

    expected = results(F.scaled_dot_product_attention, doubles)
    mine, own = results(attention, inputs), results(F.scaled_dot_product_attention, inputs)
    assert len(choices()) == 1
    for a, b, e in zip(mine, own, expected, strict=True):
        assert a.dtype == dtype and error(a, e) <= 2 * error(b, e) + 2 * ROUNDOFF[dtype]
    assert mine[0].transpose(1, 2).is_contiguous()


@pytest.mark.gpu
def test_timing_leaves_random_state_and_warnings_alone(recwarn: pytest.WarningsRecorder):
    inputs = qkv(1, 8, 256, 40, 77, torch.bfloat16)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    attention(*inputs)
    assert all(map(torch.equal, before, (torch.cuda.get_rng_state(), torch.get_rng_state())))
    assert len(choices()) == 1 and not recwarn.list
    assert all(x.grad is None for x in inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_first_seen_in_a_checkpoint(reentrant: bool):
    inputs = qkv(1, 8, 256, 40, 77, torch.bfloat16)
    y = checkpoint(attention, *inputs, use_reentrant=reentrant)
    mine = torch.autograd.grad(y.sum(), inputs) if not reentrant else (y.sum().backward(), [x.grad for x in inputs])[1]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sum(), inputs)
    assert choices()
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= 0.05 * b.abs().max().clamp(min=1)


@pytest.mark.gpu
def test_captured_after_the_timing_and_without_it():
    inputs, unseen = qkv(1, 8, 1024, 80, 77, torch.bfloat16), qkv(1, 8, 512, 80, 77, torch.bfloat16)
    attention(*inputs)
    timed = choices()
    for case in (inputs, unseen):
        dy = torch.randn_like(case[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = attention(*case)
            grads = torch.autograd.grad(y, case, dy)
        graph.replay()
        eager = F.scaled_dot_product_attention(*case)
        assert error(y.detach(), eager.detach()) < 4 * ROUNDOFF[torch.bfloat16]
        for a, b in zip(grads, torch.autograd.grad(eager, case, dy), strict=True):
            assert error(a, b) < 16 * ROUNDOFF[torch.bfloat16]
    assert choices() == timed
