"""The three latents for the discriminators at one random u: x_u = keep x + add xi (docs/METHOD.md, stage 2, 5).

u = low + floor(share time (high - low)); keep, add = table[slot, u]; time ~ U[0, 1) and xi ~ N(0, I) come from Philox
4x32-10 (Salmon et al., SC 2011; Random123), drawn in the kernel, so no noise is stored or copied. Key: 64 bits of seed;
counter: 64 bits of `key[1]` above 64 bits of index. Index 0 gives time; 1 + q gives four normal numbers, two Box-Muller
pairs, to four neighbouring channels of position q, counted over input, row, group of four channels and position. The
reference draws the same bits, so u is equal everywhere and xi is, up to fp32 rounding. d x_u / d x = keep, which is an
output: nothing else is kept for backward.

Shapes: B rows, C channels, H W positions, G = ceil(C / 4), N slots, T timesteps. One launch: a program takes POSITIONS
positions of one input, row and group, a thread each: 96 programs for 64x64 latents, 384 for 128x128. All draw u again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rapm.kernels.runtime import enabled, jit, tl, triton

POSITIONS, WARPS = 128, 4  # a position a thread
WORD = 0xFFFFFFFF
# Philox 4x32: the two multipliers and the key's two increments
MULTIPLIERS, INCREMENTS = (0xCD9E8D57, 0xD2511F53), (0x9E3779B9, 0xBB67AE85)


def philox(key: Tensor, index: Tensor) -> Tensor:
    """Philox 4x32-10 at counter index + 2^64 key[1] with key key[0] (int64, as bits): 4 words in [0, 2^32), 4 n."""
    pair = torch.arange(2, device=key.device)[:, None]  # no copy from the host: a graph could not capture it
    multiplier = MULTIPLIERS[0] + (MULTIPLIERS[1] - MULTIPLIERS[0]) * pair
    increment = INCREMENTS[0] + (INCREMENTS[1] - INCREMENTS[0]) * pair
    rounds = torch.arange(10, device=key.device)[:, None, None]
    keys = ((key[0] >> 32 * pair & WORD) + increment * rounds) & WORD
    even = torch.stack([index, key[1].expand_as(index)])
    even, odd = even & WORD, even >> 32 & WORD  # words 0 and 2, words 1 and 3
    for round_key in keys:
        product = even.flip(0) * multiplier  # modulo 2^64, whose bits the sign does not change
        even, odd = (product >> 32 & WORD) ^ odd ^ round_key, product & WORD
    return torch.stack([even, odd], dim=1).flatten(0, 1)


def renoise_ref(
    fake: Tensor, relative: Tensor, absolute: Tensor, low: Tensor, high: Tensor, table: Tensor, slot: Tensor,
    key: Tensor, share: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`renoise` in plain PyTorch; xi is fp32, the rest in the dtype of the inputs."""
    x = torch.cat([fake, relative, absolute])
    groups = (x.shape[1] + 3) // 4
    words = philox(key, torch.arange(1 + len(x) * groups * x.shape[2] * x.shape[3], device=x.device))
    time = (words[0, :1] >> 8).float() * 2**-24
    u = low[slot] + (share * time * (high[slot] - low[slot]).float()).long()
    keep, add = table[slot, u].unbind(-1)
    radius = (-2 * (words[::2, 1:].float() * 2**-32 + 2**-33).log()).sqrt()  # never log(0): |xi| reaches 6.8
    angle = math.pi / 2 * (words[1::2, 1:].float() * 2**-30)
    xi = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)  # 2 2 3BGHW
    xi = xi.view(4, len(x), groups, *x.shape[2:]).permute(1, 2, 0, 3, 4).flatten(1, 2)[:, : x.shape[1]]
    return (keep * x + add * xi).to(dtype, memory_format=torch.contiguous_format), u, keep


@jit
def _normals(first, second):
    """Box-Muller. Cosine and sine of `second` / 2^32 turns: the nearest quarter, and a polynomial for the rest."""
    radius = tl.sqrt(-2.0 * tl.log(first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    quarter = (second + 0x20000000) >> 30
    # in eighths, [-1, 1); tl.cos would bring the reduction of huge angles, twice as many instructions as all the rest
    t = (second << 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    s = t * t
    sine = t * (0.7853982 + s * (-0.08074544 + s * (0.002490007 + s * -3.5954508e-05)))  # within 3e-9
    cosine = 1.0 + s * (-0.30842426 + s * (0.015849914 + s * -0.00031888051))  # within 3e-8
    swap = (quarter & 1) == 1
    x, y = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    x, y = tl.where(((quarter + 1) & 2) == 2, -x, x), tl.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y


@jit
def _read(x, channel, position, channels, size):
    mask = (position < size) & (channel < channels)
    return tl.load(x + channel * size + position, mask=mask, other=0.0).to(tl.float32)


@jit
def _write(x_u, value, channel, position, channels, size):
    tl.store(x_u + channel * size + position, value, mask=(position < size) & (channel < channels))


@jit
def _renoise_kernel(
    fake, relative, absolute, low, high, table, slot, key, x_u, u_out, keep_out, share, timesteps, rows, channels, size,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    # Sizes are of latents: 3 B C H W is below 2^31.
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.program_id(1) * 4
    source, row = tl.program_id(2) // rows, tl.program_id(2) % rows
    seed, count, n = tl.load(key), tl.load(key + 1), tl.load(slot)
    count_low, count_high = count.to(tl.uint32), (count >> 32).to(tl.uint32)
    x = fake
    if source == 1:
        x = relative
    elif source == 2:
        x = absolute
    x += row * channels * size
    x_u += tl.program_id(2) * channels * size
    # every load comes before the first store, which the compiler may not move them over
    x_0 = _read(x, channel, position, channels, size)
    x_1 = _read(x, channel + 1, position, channels, size)
    x_2 = _read(x, channel + 2, position, channels, size)
    x_3 = _read(x, channel + 3, position, channels, size)

    time, _, _, _ = tl.philox(seed, 0, 0, count_low, count_high)
    time = (time >> 8).to(tl.float32) * 5.9604644775390625e-08
    start = tl.load(low + n)
    u = start + (share * time * (tl.load(high + n) - start).to(tl.float32)).to(tl.int64)
    at = table + (n * timesteps + u) * 2
    keep, add = tl.load(at), tl.load(at + 1)

    index = 1 + (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * size + position
    word_0, word_1, word_2, word_3 = tl.philox(seed, index, 0, count_low, count_high)
    xi_0, xi_1 = _normals(word_0, word_1)
    xi_2, xi_3 = _normals(word_2, word_3)
    _write(x_u, keep * x_0 + add * xi_0, channel, position, channels, size)
    _write(x_u, keep * x_1 + add * xi_1, channel + 1, position, channels, size)
    _write(x_u, keep * x_2 + add * xi_2, channel + 2, position, channels, size)
    _write(x_u, keep * x_3 + add * xi_3, channel + 3, position, channels, size)
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        tl.store(u_out, u)
        tl.store(keep_out, keep)


@torch.library.custom_op("rapm::renoise", mutates_args=())
def _op(
    fake: Tensor, relative: Tensor, absolute: Tensor, low: Tensor, high: Tensor, table: Tensor, slot: Tensor,
    key: Tensor, share: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    fake, relative, absolute = fake.contiguous(), relative.contiguous(), absolute.contiguous()
    rows, channels, height, width = fake.shape
    size = height * width
    x_u, u, keep = outputs = _empty(fake, slot, table, dtype)
    _renoise_kernel[triton.cdiv(size, POSITIONS), triton.cdiv(channels, 4), 3 * rows](
        fake, relative, absolute, low, high, table, slot, key, x_u, u, keep, share, table.shape[1], rows, channels,
        size, POSITIONS=POSITIONS, num_warps=WARPS,
    )  # fmt: skip
    return outputs


@_op.register_fake
def _(fake, relative, absolute, low, high, table, slot, key, share, dtype):
    return _empty(fake, slot, table, dtype)


def _empty(fake: Tensor, slot: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_u = torch.empty((3 * len(fake), *fake.shape[1:]), dtype=dtype, device=fake.device)
    return x_u, slot.new_empty(1), table.new_empty(1)


def _setup(ctx, inputs, output):
    _, u, keep = output
    ctx.mark_non_differentiable(u, keep)
    ctx.save_for_backward(keep)


def _backward(ctx, grad, *_):
    (keep,) = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    parts = zip(grad.chunk(3), needed, strict=True)
    return (*(keep * part.to(keep.dtype) if need else None for part, need in parts), *(None for _ in range(7)))


_op.register_autograd(_backward, setup_context=_setup)


def renoise(
    fake: Tensor, relative: Tensor, absolute: Tensor, low: Tensor, high: Tensor, table: Tensor, slot: Tensor,
    key: Tensor, share: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x_u, u, keep): 3B C H W in `dtype` (fake, relative, absolute), the timestep (1,) int64 they share, (1,) fp32.

    The inputs are fp32 latents B C H W at the timestep low[slot]. low, high: N int64. table: N T 2 fp32, by slot and u.
    slot: (1,) int64. key: (2,) int64, seed and counter; the caller moves the counter on, on the device, so that a
    replay draws anew. share, in [0, 1]: the part of [low, high) over which u is drawn.
    """
    arguments = fake, relative, absolute, low, high, table, slot, key, float(share), dtype
    return _op(*arguments) if enabled(fake) else renoise_ref(*arguments)
