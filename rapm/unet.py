"""The UNet of SD1.x, SD2.x and SDXL: teacher, student (with a LoRA) and discriminator backbone in one set of weights.

Parameter names are those of diffusers' UNet2DConditionModel, so a checkpoint loads strictly. The LoRA is an argument of
the forward, `lora[name] = (down, up)`: the layer `name` adds up(down(x)); `lora=None` is the teacher. So is `memory`,
what each layer keeps for backward (rapm/memory/saved.py); by default everything. Layers that read the same input are
computed as one (rapm/stacks.py): the time's and the text's before all others, since they read no latents.

Shapes: B batch, C channels, H W height and width, N = H W positions, L text tokens, E time embedding, R rank.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapm.architecture import complete, each
from rapm.kernels.attention import attention
from rapm.kernels.geglu import geglu
from rapm.kernels.geglu_linear import faster, geglu_linear
from rapm.layers import Conv2d, Deferred, FrozenConv2d, GroupNorm, LayerNorm, Linear, Lora
from rapm.memory.saved import KEEP_ALL, Memory, Saved
from rapm.stacks import Stack, lay

Made = Mapping[str, Tensor]  # what a stack's layers have made of their input, by name


class Text(NamedTuple):
    """What conditions the UNet: prompt embeddings, and for SDXL the pooled embedding and the size micro-conditions."""

    hidden: Tensor  # B L C
    pooled: Tensor | None = None  # B P
    time_ids: Tensor | None = None  # B 6: original size, crop, target size, in pixels

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Text:
        """On `device`, the embeddings in `dtype`; pixel sizes keep theirs, since bf16 would round them."""
        dtypes = dtype, dtype, None
        return Text(*(None if x is None else x.to(device=device, dtype=d) for x, d in zip(self, dtypes, strict=True)))

    def rows(self, start: int, stop: int) -> Text:
        """Rows start..stop of the batch, as views."""
        return Text(*(None if x is None else x[start:stop] for x in self))

    def expand(self, batch: int) -> Text:
        """One row seen as `batch` equal rows."""
        return Text(*(None if x is None else x.expand(batch, *x.shape[1:]) for x in self))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """One batch of several."""
        return Text(*(None if xs[0] is None else torch.cat(xs) for xs in zip(*texts, strict=True)))


def sinusoid(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Positions (n,) to fp32 embeddings (n, dim), frequencies 10000^(-i / (dim/2 - freq_shift)), i < dim/2."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(exponent / (half - freq_shift))
    pair = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return torch.cat(pair, dim=-1)


def timestep_embedding(inputs: int, dim: int) -> nn.Sequential:
    """Linear, SiLU, linear: B inputs -> B E."""
    layers = {"linear_1": nn.Linear(inputs, dim), "act": nn.SiLU(), "linear_2": nn.Linear(dim, dim)}
    return nn.Sequential(OrderedDict(layers))


class ResnetBlock(nn.Module):
    """conv(silu(norm(x))), plus the time embedding, conv(silu(norm(.))); and x, which whoever comes next adds."""

    def __init__(self, inputs: int, channels: int, time_dim: int, config: Mapping) -> None:
        super().__init__()
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv2d(inputs, channels, 3, padding=1)
        self.time_emb_proj = Linear(time_dim, channels)
        self.norm2 = GroupNorm(groups, channels, eps)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = Conv2d(inputs, channels, 1) if inputs != channels else None

    def forward(self, x: Tensor, made: Made, lora: Lora, saved: Saved) -> tuple[Tensor, Tensor]:  # x: B C H W
        shift = made[self.time_emb_proj.name]  # B C, conv1's bias in it
        h = self.conv1(self.norm1(x, saved, silu=True), lora, bias=False)
        y = self.conv2(self.norm2(h, saved, silu=True, shift=shift), lora)
        return y, x if self.conv_shortcut is None else self.conv_shortcut(x, lora)


class Attention(nn.Module):
    """Softmax attention of x over itself, or over the text's keys and values where it is `cross`."""

    backend = "auto"

    def __init__(self, channels: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads, self.cross = heads, context is not None
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context or channels, channels, bias=False)
        self.to_v = Linear(context or channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])
        self.qkv = Stack([self.to_q, self.to_k, self.to_v])  # of the self attention

    def forward(self, x: Tensor, made: Made, lora: Lora) -> Deferred:  # B N C
        if self.cross:
            k, v = (made[layer.name].unflatten(0, (len(x), -1)) for layer in (self.to_k, self.to_v))  # B L C
            q = self.to_q(x, lora)
        else:
            q, k, v = self.qkv.wide(x, lora).unflatten(-1, (3, -1)).unbind(-2)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # B heads N d
        return self.to_out[0].deferred(attention(q, k, v, self.backend).transpose(1, 2).flatten(2), lora)


class FeedForward(nn.Module):
    """GEGLU (value times the exact, erf gelu of gate) of four times the width, and back; net.1 is dropout's place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        up, down = Linear(channels, 8 * channels), Linear(4 * channels, channels)
        self.net = nn.ModuleList([nn.ModuleDict({"proj": up}), nn.Identity(), down])

    def forward(self, x: Tensor, lora: Lora, saved: Saved) -> Deferred:  # B N C
        up = self.net[0]["proj"]
        if self.fuses(up, x, lora):
            return self.net[2].deferred(geglu_linear(x, up.weight, up.bias), lora)
        h, *update = up.deferred(x, lora)
        saved.again("recompute", h, lambda x: up.deferred(x, lora)[0], x)
        y = geglu(h, *update)
        saved.again("lean", y, geglu, h, *update)
        return self.net[2].deferred(y, lora)

    @staticmethod
    def fuses(up: Linear, x: Tensor, lora: Lora) -> bool:
        """Whether the product and GEGLU are one launch here: no LoRA, and a whole weight, which no subclass has."""
        bare = type(up) is Linear and (lora is None or up.name not in lora)
        return bare and faster(x, up.weight, up.bias)


class TransformerBlock(nn.Module):
    """Self attention, cross attention and feed-forward, each on the normalised stream and added to it by the next."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, h: Tensor, made: Made, lora: Lora, saved: Saved) -> tuple[Tensor | None, ...]:
        """B N C: from the stream and its norm1, the stream, and in parts what is still to be added to it."""
        y, *update = self.attn1(h, made, lora)
        x, h = self.norm2(y, x, saved, *update)
        y, *update = self.attn2(h, made, lora)
        x, h = self.norm3(y, x, saved, *update)
        return x, *self.ff(h, lora, saved)


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map; the reshapes are views in channels-last."""

    def __init__(self, channels: int, depth: int, heads: int, context: int, config: Mapping) -> None:
        super().__init__()
        self.linear = config["use_linear_projection"]
        self.norm = GroupNorm(config["norm_num_groups"], channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if self.linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, heads) for _ in range(depth))
        self.proj_out = Linear(channels, channels) if self.linear else Conv2d(channels, channels, 1)

    def forward(self, branch: Tensor, x: Tensor, made: Made, lora: Lora, saved: Saved) -> Tensor:  # B C H W twice
        h, x = self.norm(branch, saved, residual=x)
        if not self.linear:
            h = self.proj_in(h, lora)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # B N C
        if self.linear:
            h = self.proj_in(h, lora)
        stream, branch = None, Deferred(h)
        for block in self.transformer_blocks:
            # Here, so that a checkpointed block keeps one tensor: the sum, of which its norm can be made again
            stream, h = block.norm1(branch.y, stream, saved, branch.low, branch.up)
            stream, *parts = saved.run(block, (stream, h), made, lora)
            branch = Deferred(*parts)
        h = branch.sum() + stream
        if self.linear:
            h = self.proj_out(h, lora)
        h = h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # B C H W
        if not self.linear:
            h = self.proj_out(h, lora)
        return h + x


class Block(nn.Module):
    """Layers: a resnet for each of `inputs` (its input channels), a transformer behind the first ones; a resampler."""

    resampler, stride = "", 0  # diffusers' name for it, and its convolution's stride
    name = ""  # its dotted path in the UNet

    def __init__(self, width: int, inputs: list, attentions: list, resample: bool, time: int, config: Mapping) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(n, width, time, config) for n in inputs)
        self.attentions = nn.ModuleList(attentions)
        convs = [Conv2d(width, width, 3, self.stride, padding=1)] if resample else []
        self.add_module(self.resampler, nn.ModuleList(nn.ModuleDict({"conv": conv}) for conv in convs))

    def layer(self, i: int, x: Tensor, made: Made, lora: Lora, memory: Memory) -> Tensor:
        """The i-th resnet and, where the block has them, attention: B C H W to B C' H W."""
        with memory.layer(f"{self.name}.{i}") as saved:
            h, x = saved.run(self.resnets[i], (x,), made, lora)
            return self.attentions[i](h, x, made, lora, saved) if i < len(self.attentions) else h + x


class DownBlock(Block):
    """Layers, then a convolution that halves the size; all results are skips. Without that, it is the mid block too."""

    resampler, stride = "downsamplers", 2

    def forward(self, x: Tensor, made: Made, lora: Lora, skips: list[Tensor], memory: Memory) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, made, lora, memory)
            skips.append(x)
        for down in self.downsamplers:
            x = down["conv"](x, lora)
            skips.append(x)
        return x


class UpBlock(Block):
    """Layers, each on its input beside a skip, then upsampling and a convolution."""

    resampler, stride = "upsamplers", 1

    def forward(self, x: Tensor, made: Made, lora: Lora, skips: list[Tensor], memory: Memory) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), made, lora, memory)
        for up in self.upsamplers:  # to the next skip's size: halving an odd size rounded up
            x = up["conv"](enlarged(x, skips[-1].shape[2:]), lora)
        return x


def enlarged(x: Tensor, size: torch.Size) -> Tensor:
    """The nearest positions of x (B C H W) at H' W', channels-last."""
    b, c, h, w = x.shape
    if size != (2 * h, 2 * w):
        return F.interpolate(x, size=size, mode="nearest")
    # A copy of whole rows of channels: PyTorch's kernel takes eight times as long for large batches
    pairs = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c)
    return pairs.reshape(b, 2 * h, 2 * w, c).contiguous().permute(0, 3, 1, 2)


class UNet(nn.Module):
    """The noise (or v) predictor that a diffusers `unet/config.json` describes. UserError for an unsupported one."""

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        self.config = config = complete(config)
        widths = config["block_out_channels"]
        last = len(widths) - 1
        time_dim = config["time_embedding_dim"] or 4 * widths[0]
        self.feature_channels = [*widths, widths[-1]]
        # diffusers' configs give the number of heads under the name attention_head_dim
        heads = config["num_attention_heads"] or config["attention_head_dim"]
        keys = "layers_per_block", "transformer_layers_per_block", "cross_attention_dim"
        values = [each(value) for value in (*map(config.get, keys), heads)]
        layers, depths, contexts, heads = (x if len(x) > 1 else x * len(widths) for x in values)

        def args(i: int, inputs: list[int], attentions: int, resample: bool) -> tuple:
            parts = [Transformer(widths[i], depths[i], heads[i], contexts[i], config) for _ in range(attentions)]
            return widths[i], inputs, parts, resample, time_dim, config

        self.conv_in = FrozenConv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = timestep_embedding(widths[0], time_dim)
        if config["addition_embed_type"] == "text_time":
            self.add_embedding = timestep_embedding(config["projection_class_embeddings_input_dim"], time_dim)
        x, skips = widths[0], [widths[0]]  # channels of the stream and of the skips, as in the forward
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config["down_block_types"]):
            inputs = [x] + [widths[i]] * (layers[i] - 1)
            self.down_blocks.append(DownBlock(*args(i, inputs, len(inputs) * kind.startswith("CrossAttn"), i < last)))
            x = widths[i]
            skips += [x] * (len(inputs) + (i < last))
        self.mid_block = DownBlock(*args(last, [x, x], 1, False))
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(range(last, -1, -1), config["up_block_types"], strict=True):
            inputs = [channels + skips.pop() for channels in [x] + [widths[i]] * layers[i]]
            self.up_blocks.append(UpBlock(*args(i, inputs, len(inputs) * kind.startswith("CrossAttn"), i > 0)))
            x = widths[i]

        self.conv_norm_out = GroupNorm(config["norm_num_groups"], widths[0], config["norm_eps"])
        self.conv_out = FrozenConv2d(widths[0], config["out_channels"], 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, (Linear, Conv2d, Block)):
                module.name = name
        resnets = [m for m in self.modules() if isinstance(m, ResnetBlock)]
        self.time_stacks = _stacks([m.time_emb_proj for m in resnets], [m.conv1 for m in resnets])
        attentions = [m for m in self.modules() if isinstance(m, Attention)]
        self.text_stacks = _stacks([layer for m in attentions if m.cross for layer in (m.to_k, m.to_v)])
        self.stacks = [*self.time_stacks, *self.text_stacks, *(m.qkv for m in attentions if not m.cross)]

    def join(self) -> UNet:
        """Lay the frozen weights of each stack below one another, where they are. Itself."""
        for stack in self.stacks:
            stack.join()
        return self

    def lay(self, device: torch.device | str) -> UNet:
        """Move the frozen weights to another device, into one piece of memory there, joined. Itself.

        One by one they would leave holes: 0.6 GiB of SDXL's. From the meta device they come unfilled.
        """
        groups = [group for stack in self.stacks for group in stack.groups()]
        joined = {id(x) for group in groups for x in group}
        lay([*groups, *([x] for x in self.parameters() if id(x) not in joined)], device)
        return self

    dtype = property(lambda self: self.conv_in.weight.dtype)
    device = property(lambda self: self.conv_in.weight.device)

    def lora_targets(self) -> dict[str, Linear | Conv2d]:
        """Dotted name -> layer, in module order: what peft matches to the 14 names of the LCM and PCM scripts.

        to_q, to_k, to_v, to_out.0, proj_in, proj_out, ff.net.0.proj, ff.net.2, conv1, conv2, conv_shortcut,
        time_emb_proj, downsamplers.0.conv, upsamplers.0.conv.
        """
        return {name: module for name, module in self.named_modules() if isinstance(module, (Linear, Conv2d))}

    def use_attention(self, backend: str) -> None:
        """Compute attention by "auto", "sdpa" or "xformers" from now on."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def layers(self) -> list[str]:
        """The names of what `memory` has a policy for, in the order of the forward: a resnet and its transformer."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [f"{block.name}.{i}" for block in blocks for i in range(len(block.resnets))]

    def forward(
        self, z: Tensor, t: Tensor, text: Text, lora: Lora = None, memory: Memory = KEEP_ALL,
        keys: Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Raw output B C H W for latents z (B C H W) at timesteps t (0-dim or B), in the weights' dtype.

        `keys`: `text_keys(text)`, where it is at hand.
        """
        made = self._condition(t.expand(z.shape[0]), text, lora, keys)
        skips: list[Tensor] = []
        x = self._encode(z, made, lora, skips, memory)[-1]
        for block in self.up_blocks:
            x = block(x, made, lora, skips, memory)
        return self.conv_out(self.conv_norm_out(x, silu=True))

    def features(
        self, z: Tensor, t: Tensor, text: Text, lora: Lora = None, memory: Memory = KEEP_ALL,
        keys: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """What each down block hands to the next, then the mid block's output; no up block runs."""
        return self._encode(z, self._condition(t.expand(z.shape[0]), text, lora, keys), lora, [], memory)

    def text_keys(self, text: Text) -> list[Tensor]:
        """The frozen keys and values of the text, for all passes over it: for each of `text_stacks`, n B L C."""
        hidden = text.hidden.to(self.dtype)
        return [stack.base(hidden.flatten(0, 1)).unflatten(1, hidden.shape[:2]) for stack in self.text_stacks]

    def _encode(self, z: Tensor, made: Made, lora: Lora, skips: list[Tensor], memory: Memory) -> list[Tensor]:
        features, x = [], self.conv_in(z.to(self.dtype))
        skips.append(x)
        for block in self.down_blocks:
            x = block(x, made, lora, skips, memory)
            features.append(x)
        return [*features, self.mid_block(x, made, lora, [], memory)]

    def _condition(self, t: Tensor, text: Text, lora: Lora, keys: Sequence[Tensor] | None) -> Made:
        """What the layers make of the timesteps (and SDXL's pooled text and sizes), B C, and of the text, B L C."""
        flip_shift = self.config["flip_sin_to_cos"], self.config["freq_shift"]
        emb = self.time_embedding(sinusoid(t, self.feature_channels[0], *flip_shift).to(self.dtype))
        if self.config["addition_embed_type"] == "text_time":
            sizes = sinusoid(text.time_ids.flatten(), self.config["addition_time_embed_dim"], *flip_shift)
            added = torch.cat([text.pooled, sizes.view(t.shape[0], -1)], dim=-1)
            emb = emb + self.add_embedding(added.to(self.dtype))
        emb, hidden, made = F.silu(emb), text.hidden.to(self.dtype).flatten(0, 1), {}
        for stack in self.time_stacks:
            made |= stack(emb, lora)
        for i, stack in enumerate(self.text_stacks):
            made |= stack(hidden, lora, None if keys is None else keys[i].flatten(1, 2))
        return made


def _stacks(layers: Sequence[Linear], biases: Sequence[nn.Module] = ()) -> list[Stack]:
    """Layers that read the same input, by their shape; each may add the bias of a module at its place in `biases`."""
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        shapes[layer.weight.shape].append(i)
    return [Stack([layers[i] for i in group], [biases[i] for i in group if biases]) for group in shapes.values()]
