"""The benchmarks, as far as a CPU goes: shapes, checks, sums, families of kernels, and what the README shows."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from full import FULL
from torch.utils._pytree import tree_map

from rapm.architecture import DEFAULTS, complete
from rapm.bench import measure
from rapm.bench import ops as bench_ops
from rapm.bench import run as bench
from rapm.bench.measure import check, errors, fresh, kept_mib, results, tensors, wanted
from rapm.bench.ops import DEVICE, RAPM, REFERENCE, Provider, operators, providers_of
from rapm.bench.shapes import MODELS, unet_shapes
from rapm.bench.warm import tasks_of, warm
from rapm.cli import main
from rapm.config import Config
from rapm.unet import UNet

ROOT = Path(__file__).parents[1]
KERNEL_FILES = list((ROOT / "kernels").glob("*.py"))
# A shape of each operator that a CPU does at once
SMALL = {
    "group_norm_silu": (64, 5, 3, True, True, True), "layer_norm": (6, 48, True), "geglu": (6, 32),
    "lora_linear": (6, 32, 48, True, 3), "lora_conv": (32, 48, 3, 2, 6, 4), "frozen_conv": (32, 48, 3, 1, 6, 4),
    "attention": (2, 12, 7, 16), "short_attention": (2, 12, 7, 16), "disc_head": ((16, 4, 4), (32, 2, 2)),
    "position_loss": (6, 4), "renoise": (6, 4), "guided_step": (6, 4), "int8_linear": (6, 64, 48, True, 3),
    "dequantise": (64, 48), "geglu_linear": (6, 16, 128),
}  # fmt: skip
OPS = operators({})


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        ("sd15", "attention"): [(2, 12, 7, 16)], ("sd15", "geglu"): [(6, 32), (6, 48)],
        ("sd15", "lora_linear rank 1"): [(6, 32, 48, True, 1)], ("sd15", "disc_head"): [((16, 4, 4),)],
        ("sdxl", "geglu"): [(6, 32)],
    }  # fmt: skip
    tasks = tasks_of(OPS, shapes)
    counts = Counter((name, provider) for name, _, provider in tasks)
    assert counts == {("disc_head", "rapm"): 1, ("disc_head", "compile"): 1, ("geglu", "rapm"): 2,
                      ("geglu", "compile"): 2, ("lora_linear rank 1", "rapm"): 1}  # fmt: skip
    assert tasks[0] == ("disc_head", ((16, 4, 4),), "compile")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**34, 2**35))
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # to be as it was, afterwards
        monkeypatch.delenv(name)
    done = warm([("geglu", (6, 32), RAPM), ("geglu", ("wrong",), RAPM)])
    assert done.startswith("compiled 1 of 2 cases beforehand")


@pytest.mark.parametrize("model", MODELS)
def test_the_configs_are_the_published_ones(model: str) -> None:
    ours, published = complete(MODELS[model].unet), complete(FULL[model])
    plain = lambda x: list(x) if isinstance(x, (list, tuple)) else x  # noqa: E731
    assert {key: plain(ours[key]) for key in DEFAULTS} == {key: plain(published[key]) for key in DEFAULTS}


@pytest.mark.parametrize(
    ("model", "blocks", "resnets", "transformers", "tflop"), [("sd15", 16, 22, 16, 0.803), ("sdxl", 70, 17, 11, 6.761)]
)
def test_shapes_of_a_pass(model: str, blocks: int, resnets: int, transformers: int, tflop: float) -> None:
    found = unet_shapes(model)
    counts = {name: sum(shapes.values()) for name, shapes in found.items()}
    assert counts["group_norm"] == 2 * resnets + transformers + 1
    assert counts["layer_norm"] == 3 * blocks and counts["attention"] == 2 * blocks and counts["geglu"] == blocks
    with torch.device("meta"):
        targets = UNet(MODELS[model].unet).lora_targets()
    ranks = {name: op.shapes(found) for name, op in OPS.items() if name.startswith("lora_") and name.endswith("rank 1")}
    layers = [n * (shape[-1] if "linear" in name else 1) for name, found in ranks.items() for shape, n in found.items()]
    assert sum(layers) == len(targets)
    assert sum(OPS["frozen_conv"].shapes(found).values()) == counts["conv"]
    # Known from elsewhere: the FLOP of a pass
    flop = sum(n * OPS["frozen_conv"].cost(*shape)[0] for shape, n in OPS["frozen_conv"].shapes(found).items())
    flop += sum(n * OPS["attention"].cost(*shape)[0] for shape, n in found["attention"].items())
    linear = found["linear"] + found["stack"]
    flop += sum(n * 2 * rows * inputs * outputs for (rows, inputs, outputs, *_), n in linear.items())
    assert flop == pytest.approx(tflop * 1e12, rel=0.01)


@pytest.mark.parametrize("name", OPS)
def test_an_operators_shapes_are_those_that_it_takes(name: str) -> None:
    op, used = OPS[name], 0
    for model in MODELS:
        for shape, count in op.shapes(unet_shapes(model)).items():
            inspect.signature(op.make).bind(*shape)
            assert count > 0 and len(op.cost(*shape)) == 2
            used += 1
    assert used > 0


@pytest.mark.parametrize("name", OPS)
def test_every_provider_computes_the_same(name: str) -> None:
    op = OPS[name]
    shape = SMALL[name.split()[0]]
    args = op.make(*shape)
    assert len(op.cost(*shape)) == 2 and op.cost(*shape)[0] > 0
    cotangents = [torch.randn_like(y) for y in wanted(op.reference(*args))]
    exact = results(op.reference, fresh(args, torch.float64), cotangents)
    allowed = [1.5 * e + op.slack for e in errors(results(op.reference, fresh(args), cotangents), exact)]
    providers = providers_of(op, compiled=False)
    for key in {REFERENCE, RAPM, "peft"} & providers.keys():
        check(providers[key], args, cotangents, exact, allowed)

    def off(*x: object) -> object:
        out = op.reference(*x)
        return out * 1.2 if torch.is_tensor(out) else (out[0] * 1.2, *out[1:])

    for wrong in (off, lambda *x: tree_map(lambda y: y * torch.nan, list(tensors(op.reference(*x))))):
        with pytest.raises(ArithmeticError, match="result 0"):
            check(Provider(wrong), args, cotangents, exact, allowed)
    if "frozen layer" in providers:  # the LoRA's gradients are not asked of it
        layer = providers["frozen layer"]
        backward = "stack" not in name  # of the time and the text no gradient is wanted
        assert len(wanted(layer.prepare(*args))) == backward
        assert layer.run(*layer.prepare(*args)).requires_grad == backward


def test_the_heads_compiled_form_is_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "whole", lambda reference: reference)
    op = operators({})["disc_head"]
    args = op.make(*SMALL["disc_head"])
    exact, actual = (tensors(run(*args)) for run in (op.reference, op.compiled(op.reference)))
    assert max(errors(actual, exact)) < 1e-5


def test_what_is_kept() -> None:
    """Whole storages, once; no weights."""

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x * weight).exp() * x.view(-1)[:16].view(1, 16)

    args = [torch.randn(64, 16, device=DEVICE, requires_grad=True), torch.randn(16, device=DEVICE, requires_grad=True)]
    assert kept_mib(Provider(run), args) == 2 * 64 * 16 * 4 / 2**20  # x, exp's result
    assert kept_mib(Provider(run, activations=2), args) == (2 * 64 + 1) * 16 * 4 / 2**20


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is run, and a call takes a millisecond."""

    def graph_ms(calls: list[Callable], replays: int = 1) -> tuple[float, int]:
        for call in calls:
            call()
        return 1.0, 2

    monkeypatch.setattr(measure, "graph_ms", graph_ms)
    monkeypatch.setattr(bench, "copy_ms", lambda size, sets, replays: 0.5)
    monkeypatch.setattr(bench, "SET_BYTES", 1.0)
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


@pytest.mark.parametrize("name", ["layer_norm", "lora_conv rank 1", "renoise"])
def test_a_case(name: str, no_clock: None) -> None:
    op = OPS[name]
    row = bench.case(op, SMALL[name.split()[0]], 1, compiled=False)
    passes = 1 if name == "renoise" else 2
    assert row["sets"] == 2 and json.dumps(row)
    for provider in row["providers"].values():
        assert provider["ms"] == [1.0] * passes and provider["launches"] == [2] * passes
    assert (row["providers"][RAPM]["kept_mib"] > 0) == (passes == 2)
    wrong = op._replace(rapm=lambda *args: [y * 1.1 for y in tensors(op.reference(*args))])
    failed = bench.case(wrong, SMALL[name.split()[0]], 1, compiled=False)["providers"]
    assert failed[RAPM].keys() == {"failed"} and "result" in failed[RAPM]["failed"] and "ms" in failed[REFERENCE]
    assert RAPM not in bench.case(wrong, SMALL[name.split()[0]], 1, compiled=False, without={RAPM})["providers"]


def row(count: int, cost: float, **ms: list[float] | None) -> dict:
    def provider(values: list[float] | None) -> dict:
        return {"failed": "wrong"} if values is None else {"ms": values, "kept_mib": 2.0, "launches": [3, 4]}

    found = {name.replace("_", " "): provider(values) for name, values in ms.items()}
    return {"count": count, "unit": "bytes", "cost": [cost, 2 * cost], "copy_ms": [1.0, 2.0], "providers": found}


def test_totals() -> None:
    rows = [row(3, 1e6, reference=[4.0, 6.0], peer=None, rapm=[1.0, 2.0]), row(1, 4e6, reference=[1.0, 1.0],
            peer=[1.0, 1.0], rapm=[1.0, 4.0])]  # fmt: skip
    total = bench.totals(rows, {"copy_gbs": 5.0, "bf16_tflops": 1.0})
    assert total["providers"] == {
        "reference": {"ms": [13.0, 19.0], "kept_mib": 8.0}, "rapm": {"ms": [4.0, 10.0], "kept_mib": 8.0},
    }  # fmt: skip
    assert total["share"] == [[0.8, 0.2], [0.4, 0.2]]  # the larger shape first
    assert total["of_copy"] == [[1.0, 1.0], [0.5, 1.0]]
    assert "peer: wrong" in bench.line("sdxl", "geglu", total, rows)


@pytest.mark.parametrize(("arguments", "words"), [([], "CUDA"), (["gegluu"], "gegluu"), (["--output", "no/x"], "no/x")])
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_slot_time_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["slot_time.py"])
    with pytest.raises(SystemExit) as error:
        script("slot_time").main()
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


NAMES = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN": "gemm",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_execute_segment_k_off_kernel__5x_cublas": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)": "gemm",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_32x6_nn_align8>(...)": "gemm",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn": "conv",
    "sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32": "conv",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64>(...)": "conv",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x64_4x1x1_kernel0_0": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": "attention",
    "void gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, float, false, true>(...)": "lora",
    "void gemmk1_kernel<int, float, 256, 5, false, false, true, false, __nv_bfloat16>(...)": "lora",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128, 16>(...)": "lora",
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16, float, int>(...)": "norm",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(...)": "norm",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GroupNormKernelImplInternal<float>(...)>": "norm",
    "void at::native::vectorized_elementwise_kernel<4, at::native::direct_copy_kernel_cuda(...)>": "copy",
    "void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(...)>": "copy",
    "Memcpy DtoD (Device -> Device)": "copy",
    "Memset (Device)": "copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<...>": "copy",
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel>": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<...>>>": "elementwise",
    "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>(...)": "layout",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
    "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x32_cudnn": "heads",
    "_geglu_fwd_kernel": "elementwise",
    "something_new": "other",
}  # fmt: skip


def test_families() -> None:
    slot_time = script("slot_time")
    own = slot_time.own_kernels()
    for name, family in NAMES.items():
        assert slot_time.classify(name, own) == family, name
    for file in KERNEL_FILES:  # every kernel has a family, and its name no other
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M):
            assert slot_time.classify(name, own) == slot_time.classify(name, {name: file.stem}) != "other", name
    found = slot_time.summary([("_geglu_fwd_kernel", 1.0), ("something_new", 2.0), ("_geglu_fwd_kernel", 1.5)], 3)
    assert found["families"]["elementwise"] == 2.5 and found["families"]["other"] == 2.0
    assert found["kernel_ms"] == sum(found["families"].values()) == 4.5
    assert found["ours"] == {"_geglu_fwd_kernel": 2.5} and found["unclassified"] == [["something_new", 2.0]]


def test_a_slot_on_random_weights() -> None:
    slot_time = script("slot_time")
    config, unet = Config.preset("sdxl").replace(lora_rank=1), slot_time.random_unet(tiny.SDXL, DEVICE)
    trajectory = slot_time.random_trajectory(unet, config, 16)
    step = slot_time.make_step(unet, config, trajectory)
    for _ in range(2):
        step.load(trajectory, 0)
        for _ in range(step.config.steps):
            step()
    assert float(step.skipped) == 0 and step.sums.isfinite().all() and step.sums[0] > 0


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/readme.py on made-up results."""
    card = dict(device="A Card", driver="1.2", torch="2.11", cuda="13.0", cudnn="9", triton="3.6")
    rows, totals = [], {}
    for model in MODELS:
        totals[model] = {}
        for name in ("geglu", "lora_linear rank 1", "lora_linear rank 64"):
            made = row(2, 1e6, reference=[0.4, 0.6], compile=[0.3, 0.4], Liger=[0.2, 0.5], frozen_layer=[0.09, 0.1],
                       rapm=[0.1, 0.15], peft=[0.18, 0.3])  # fmt: skip
            made |= {"model": model, "op": name}
            made["providers"]["cuDNN"] = {"failed": "RuntimeError: refused"}
            rows.append(made)
            totals[model][name] = bench.totals([made], {"copy_gbs": 100.0, "bf16_tflops": 700.0})
    limits = {"copy_gbs": 100.0, "bf16_tflops": 700.0}
    kernels = dict(card=card, limits=limits, quick=False, left_out={"xformers": "no module"}, rows=rows, totals=totals)
    mode = dict(gpu_ms=60.0, kernel_ms=58.0, launches=16000, families={"gemm": 40.0, "norm": 18.0})
    after = {**mode, "gpu_ms": 30.0, "kernel_ms": 29.0, "families": {"gemm": 28.0, "other": 1.0}, "launches": 2000}
    slot_time = dict(card=card, models={model: {"before": mode, "after": after} for model in MODELS})
    for name, report in (("kernels", kernels), ("slot_time", slot_time)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = script("readme")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_the_tables_of_operators(readme: ModuleType) -> None:
    names = ["operators", "kernels", "slot", "slot_table", "step"]  # the last one's results are not there
    page = "a\n" + "".join(f"<!-- {name}:begin --><!-- {name}:end -->\n" for name in names[:-1])
    text = readme.render(page, "page", names)
    assert readme.render(text, "page", names) == text and text.startswith("a\n<!-- operators:begin -->")
    (geglu, *_) = [line for line in text.splitlines() if line.startswith("| geglu")]
    cells = [cell.strip() for cell in geglu.strip("|").split("|")]
    assert cells == ["geglu", "0.800 + 1.20", "0.600 + 0.800", "0.360 + 0.600 (peft)", "0.200 + 0.300", "2.80",
                     "10%; 13%", "4 → 4"]  # fmt: skip
    both = "+11%; +50%; +32% | +100%; +200%; +153%"
    assert f"| SDXL lora_linear | 0.180 + 0.200 | {both} | {both} |" in text
    flat = " ".join(text.split())
    assert "xformers (no module)" in text and "cuDNN's geglu (RuntimeError: refused)" in flat
    sums = "2.00 | 1.40 | 0.960 | 0.500"
    assert f"| `geglu` | value times gelu of the gate | {sums} | {sums} |" in text and "A Card" in text
    assert "Ours is not" not in text and "Not timed yet: `group_norm_silu` (" in flat
    assert "docs/slot_time.svg" in text and "SDXL takes 50% of the time" in flat
    assert "| all | 60.0 | 30.0 | 60.0 | 30.0 |" in text and "| norms | 18.0 | 0.0 | 18.0 | 0.0 |" in text
    assert "| launches | 16,000 | 2,000 | 16,000 | 2,000 |" in text and "optimizer" not in text


def test_who_is_slower_or_fails_is_named(readme: ModuleType) -> None:
    report = readme.load("kernels")
    for model, ops in report["totals"].items():
        ops["geglu"]["providers"]["rapm"]["ms"] = [1.0, 1.0]
        del ops["lora_linear rank 1"]["providers"]["compile"]
        slow = {"compile": {"failed": "TypeError: no"}}
        report["rows"].append({"model": model, "op": "lora_linear rank 1", "providers": slow})
    text = " ".join(script("readme_kernels").operators(report).split())
    assert "Ours is not the fastest at `geglu` on SD1.5 (2.00 ms, peft 0.960), `geglu` on SDXL (" in text
    assert "| `lora_linear` rank 1 | linear layer and its LoRA | 2.00 | failed | 0.960 | 0.500 |" in text


def test_the_picture(readme: ModuleType) -> None:
    drawn = script("readme_kernels")
    root = ElementTree.fromstring(drawn.slot_svg(readme.load("slot_time")))
    bars = [x for x in root.iter("{http://www.w3.org/2000/svg}rect") if x.get("height") == "26"]
    n = len(drawn.COLOURS)
    assert len(bars) == 4 * n
    before, after = (sum(float(x.get("width")) for x in bars[i : i + n]) for i in (0, n))
    assert before == pytest.approx(2 * after, rel=0.01)
    assert set(drawn.COLOURS) == {*dict(script("slot_time").FAMILIES), "other"}


def test_results_without_a_place_are_named(readme: ModuleType) -> None:
    with pytest.raises(SystemExit, match="kernels"):
        readme.render("no markers", "page", ["kernels"])


def test_operators_are_what_the_command_takes() -> None:
    assert {name.split()[0] for name in OPS} == set(bench_ops.KERNELS)
