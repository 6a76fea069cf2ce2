"""The UNet against diffusers' UNet2DConditionModel: names, output, input gradient, features, loading, refusals."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from full import FULL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import UNET, load_unet
from torch import Tag, Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from rapm.errors import UserError
from rapm.unet import Text, UNet, enlarged

PIXEL = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=[64, 128, 192], layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    cross_attention_dim=128, attention_head_dim=4, norm_num_groups=32,
)  # fmt: skip
CONFIGS = {**UNET, "pixel": PIXEL}
Pair = tuple[UNet2DConditionModel, UNet]


def perturb(model: nn.Module) -> nn.Module:
    """Move biases and norm weights off their initial 0 and 1, so that an error in one of them shows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    """diffusers' model and ours on the same weights, by family; loading is strict."""
    torch.manual_seed(0)
    out = {}
    for name, config in CONFIGS.items():
        stock = perturb(UNet2DConditionModel(**config))
        ours = UNet(config).requires_grad_(False).eval()
        ours.load_state_dict(stock.state_dict())
        out[name] = stock, ours
    return out


def inputs(config: dict, batch: int, size: tuple[int, int], **to: object) -> tuple[Tensor, Tensor, Text]:
    """Latents with an offset mean, a different timestep for each row, and text."""
    z = (torch.randn(batch, config["in_channels"], *size) + 0.5).to(**to)
    t = torch.tensor([999, 1, 437])[:batch].to(z.device)
    text = Text(torch.randn(batch, 7, config["cross_attention_dim"]) + 0.2)
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        text = Text(text.hidden, torch.randn(batch, pooled), torch.tensor([[1024.0, 1000, 0, 8, 1024, 1000]] * batch))
    return z, t, text.to(**to)


def stock_forward(stock: UNet2DConditionModel, z: Tensor, t: Tensor, text: Text) -> Tensor:
    text = text.to(dtype=stock.dtype)
    added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": text.time_ids}
    return stock(z.to(stock.dtype), t, text.hidden, added_cond_kwargs=added).sample


def run(forward: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a fixed weighted sum of it with respect to the input."""
    z = z.clone().requires_grad_()
    out = forward(z)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(weight)
    return out.detach(), z.grad


def error(x: Tensor, reference: Tensor) -> float:
    """Largest error over the largest reference value."""
    return ((x.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (12, 20), (13, 22)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_output_and_input_gradient(pairs: dict[str, Pair], family: str, batch: int, size: tuple[int, int]) -> None:
    stock, ours = pairs[family]
    z, t, text = inputs(CONFIGS[family], batch, size)
    expected = run(lambda z: stock_forward(stock, z, t, text), z)
    for actual, wanted in zip(run(lambda z: ours(z, t, text), z), expected, strict=True):
        assert error(actual, wanted) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_is_as_exact_as_stock(pairs: dict[str, Pair], family: str) -> None:
    stock, ours = pairs[family]
    z, t, text = inputs(CONFIGS[family], 2, (16, 16))
    expected = run(lambda z: stock_forward(stock, z, t, text), z)
    stock16 = UNet2DConditionModel(**CONFIGS[family]).requires_grad_(False).eval().bfloat16()
    stock16.load_state_dict(stock.state_dict())
    ours16 = UNet(CONFIGS[family]).requires_grad_(False).eval().bfloat16()
    ours16.load_state_dict(ours.state_dict())
    theirs = run(lambda z: stock_forward(stock16, z, t, text), z)
    mine = run(lambda z: ours16(z, t, text), z)  # casts its inputs itself
    assert mine[0].dtype == torch.bfloat16
    for actual, peer, wanted in zip(mine, theirs, expected, strict=True):
        assert (actual - wanted).norm() < 1.2 * (peer - wanted).norm()


@pytest.mark.parametrize("family", CONFIGS)
def test_features_stop_before_the_up_blocks(pairs: dict[str, Pair], family: str) -> None:
    stock, ours = pairs[family]
    z, t, text = inputs(CONFIGS[family], 2, (40, 24))
    expected, handles = [], []
    for block in [*stock.down_blocks, stock.mid_block]:
        keep = lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    stock_forward(stock, z, t, text)
    ran = []
    handles += [block.register_forward_pre_hook(lambda *_: ran.append(1)) for block in ours.up_blocks]
    features = ours.features(z, t, text)
    assert not ran
    ours(z, t, text)
    assert len(ran) == len(ours.up_blocks)
    for handle in handles:
        handle.remove()
    assert [f.shape[1] for f in features] == ours.feature_channels
    for actual, wanted in zip(features, expected, strict=True):
        assert actual.shape == wanted.shape and error(actual, wanted) < 1e-5


def test_timesteps_as_scalar_or_vector(pairs: dict[str, Pair]) -> None:
    ours = pairs["sdxl"][1]
    z, t, text = inputs(CONFIGS["sdxl"], 3, (16, 16))
    out = ours(z, t, text)
    for i in range(3):
        alone = ours(z[i : i + 1], t[i], text.rows(i, i + 1))  # t[i] is 0-dim
        assert error(alone, out[i : i + 1]) < 1e-5
    assert torch.equal(ours(z, t[0], text), ours(z, t[:1].expand(3), text))


def test_sinusoid_options() -> None:
    config = {**UNET["sd1"], "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": 2}
    config |= {"layers_per_block": [1, 2, 1], "cross_attention_dim": [32, 32, 32], "time_embedding_dim": 48}
    stock = perturb(UNet2DConditionModel(**config))
    ours = UNet(config).requires_grad_(False)
    ours.load_state_dict(stock.state_dict())
    z, t, text = inputs(UNET["sd1"], 2, (16, 16))
    assert error(ours(z, t, text), stock_forward(stock, z, t, text)) < 1e-5


@pytest.mark.parametrize("family", FULL)
def test_full_size_names_and_shapes(family: str) -> None:
    config = FULL[family]
    with torch.device("meta"):
        models = UNet(config), UNet2DConditionModel.from_config(config)
    assert all(x.is_meta for model in models for x in model.parameters())
    ours, stock = ({name: x.shape for name, x in model.state_dict().items()} for model in models)
    assert ours == stock


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_reads_no_value(pairs: dict[str, Pair], family: str) -> None:
    """Nothing that a CUDA graph cannot hold: no value is read on the host, no shape depends on data."""

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            assert Tag.dynamic_output_shape not in op.tags and Tag.data_dependent_output not in op.tags, op
            return op(*args, **(kwargs or {}))

    ours = pairs[family][1]
    z, t, text = inputs(CONFIGS[family], 2, (13, 22))
    with Capture():
        ours(z, t, text)
        ours.features(z, t[0], text)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_load_unet(pairs: dict[str, Pair], tmp_path: Path, variant: str | None, shard: str) -> None:
    stock = pairs["sdxl"][0]
    stock.save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "200KB")
    state = stock.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_unet(tmp_path, dtype)
        assert ours.dtype == dtype and ours.device.type == "cpu" and not ours.training
        for name, p in ours.named_parameters():
            assert torch.equal(p, state[name].to(dtype))
            assert not p.requires_grad and (p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last))
    ours = load_unet(tmp_path)
    z, t, text = inputs(CONFIGS["sdxl"], 2, (13, 22))
    expected = run(lambda z: stock_forward(stock, z, t, text), z)
    for actual, wanted in zip(run(lambda z: ours(z, t, text), z), expected, strict=True):
        assert error(actual, wanted) < 1e-5


def test_load_unet_picks_the_precision(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pairs["sd1"][0].save_pretrained(tmp_path)
    full = tmp_path / "diffusion_pytorch_model.safetensors"
    half = {name: (x + 1).half() for name, x in load_file(full).items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    name = "conv_in.bias"
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(load_unet(tmp_path, dtype).conv_in.bias, load_file(full)[name].to(dtype))
    assert torch.equal(load_unet(tmp_path, torch.float16).conv_in.bias, half[name])


def test_load_unet_refuses_an_index_without_its_files(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pairs["sd1"][0].save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    sound = json.loads(index.read_text())
    first = sorted(sound["weight_map"])[0]
    (tmp_path.parent / "outside.safetensors").write_bytes(b"")
    for names, message in (
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({**sound["weight_map"], first: "../outside.safetensors"}, "names '../outside.safetensors', which is not a"),
        ({**sound["weight_map"], first: ["x"]}, "which is not a file beside it"),
        ({**sound["weight_map"], first: "x" * 5000}, "which is not a file beside it"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path)


def test_load_unet_streams(pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded weights own their memory: the file may go, and no source tensor is alive when the next is read."""
    pairs["sd1"][0].save_pretrained(tmp_path)
    alive: list[weakref.ref] = []

    class Watched:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            assert sum(ref() is not None for ref in alive) <= 1  # the caller's variable still names the last one
            x = self.file.get_tensor(name)
            alive.append(weakref.ref(x))
            return x

    monkeypatch.setattr("rapm.loading.weights.safe_open", Watched)
    ours = load_unet(tmp_path)
    assert len(alive) == len(ours.state_dict()) and not any(ref() for ref in alive)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert torch.equal(ours.conv_in.bias, pairs["sd1"][1].conv_in.bias)


def test_residual_stream_stays_channels_last(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pairs["sd1"][0].save_pretrained(tmp_path)
    ours = load_unet(tmp_path)
    seen = []
    for block in [*ours.down_blocks, ours.mid_block, *ours.up_blocks]:
        for module in [*block.resnets, *block.attentions]:
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].stride(1)))
    ours(*inputs(CONFIGS["sd1"], 2, (16, 16)))
    assert len(seen) > 10 and set(seen) == {1}


def test_text() -> None:
    a = Text(torch.randn(2, 7, 8), torch.randn(2, 5), torch.full((2, 6), 1001.0))
    half = a.to("cpu", torch.bfloat16)
    assert half.hidden.dtype == half.pooled.dtype == torch.bfloat16
    assert half.time_ids.dtype == torch.float32  # bf16 has no 1001
    both = Text.cat([a, a.rows(1, 2)])
    assert all(torch.equal(x, y[[0, 1, 1]]) for x, y in zip(both, a, strict=True))
    assert all(torch.equal(x, y[[1, 1, 1]]) for x, y in zip(a.rows(1, 2).expand(3), a, strict=True))
    plain = Text.cat([Text(a.hidden), Text(a.hidden)]).rows(0, 3).to(dtype=torch.float16)
    assert plain.pooled is None and plain.time_ids is None and plain.hidden.shape == (3, 7, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 9}, "in_channels is 9, not 4"),
        ({"in_channels": 8}, "in_channels is 8, not 4"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10"),
        ({"class_embed_type": "timestep"}, "class_embed_type is timestep"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D, not CrossAttnDownBlock2D or DownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D", "SimpleCrossAttnUpBlock2D"]}, "SimpleCrossAttnUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is UNetMidBlock2D, not UNetMidBlock2DCrossAttn"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"act_fn": "gelu"}, "act_fn is gelu, not silu or swish"),
        ({"addition_embed_type": "image"}, "addition_embed_type is image, not None or text_time"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim is 32"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is fourier"),
        ({"only_cross_attention": [True, False, False]}, "only_cross_attention is True"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is scale_shift"),
        ({"downsample_padding": 0}, "downsample_padding is 0"),
        ({"center_input_sample": True}, "center_input_sample is True"),
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name is SD3Transformer2DModel"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refuses(change: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        UNet({**UNET["sd1"], **change})
    assert words in str(caught.value) and "SD1.x, SD2.x or SDXL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_unet_refuses(pairs: dict[str, Pair], tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            load_unet(tmp_path)
        assert "\n" not in str(caught.value)

    pairs["sd1"][0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 48}))
    refused("do not fit config.json.*size mismatch")
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    refused("do not fit config.json.*Missing key")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("not a whole safetensors file")
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    refused("only safetensors is read")


def full_size_runs(family: str, dtype: torch.dtype, z: Tensor, t: Tensor, text: Text) -> list[tuple[Tensor, Tensor]]:
    """Output and input gradient of diffusers' model (NCHW) and ours (channels-last) on equal random weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        stock = perturb(UNet2DConditionModel.from_config(FULL[family])).to(dtype)
    with torch.device("meta"):
        ours = UNet(FULL[family]).requires_grad_(False)
    ours.load_state_dict(stock.state_dict(), assign=True)
    theirs = run(partial(stock_forward, stock, t=t, text=text), z)
    del stock
    ours.to(memory_format=torch.channels_last)
    mine = run(lambda z: ours(z, t, text), z)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):  # a host sync in the forward raises here
        out = ours(z, t, text)
    graph.replay()
    assert error(out, mine[0]) < (1e-4 if dtype == torch.float32 else 2e-2)
    return [theirs, mine]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FULL)
def test_full_size_on_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 (TF32 off) equals diffusers; in bf16 we are as close to fp32 as diffusers is; a CUDA graph replays it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not torch.backends.cuda.matmul.allow_tf32  # PyTorch's default
    side = FULL[family]["sample_size"]
    for size in ((side, side), (40, 27)):
        case = inputs(FULL[family], 1, size, device="cuda")
        exact, mine = full_size_runs(family, torch.float32, *case)
        exact16, mine16 = full_size_runs(family, torch.bfloat16, *case)
        for kind, wanted, actual, peer16, actual16 in zip(
            ("output", "gradient"), exact, mine, exact16, mine16, strict=True
        ):
            print(f"{family} {size} {kind}: fp32 {error(actual, wanted):.1e}, bf16 {error(actual16, wanted):.1e}")
            assert error(actual, wanted) < 1e-4
            assert (actual16.float() - wanted).norm() < 1.2 * (peer16.float() - wanted).norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "size"), [((2, 8, 3, 5), (6, 10)), ((2, 8, 1, 1), (2, 2)), ((1, 4, 3, 5), (5, 9))])
def test_enlarged(shape: tuple[int, ...], size: tuple[int, int], layout: torch.memory_format) -> None:
    """The nearest positions, in channels-last where the size is twice the input's; and the sum of their gradients."""
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y, expected = enlarged(x, torch.Size(size)), torch.nn.functional.interpolate(x, size=size, mode="nearest")
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last) or size != tuple(2 * n for n in shape[2:])
    dy = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, x, dy)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients)
