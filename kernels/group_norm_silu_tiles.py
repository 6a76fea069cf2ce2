"""What the kernels of group_norm_silu do to a tile, and where a program's tile lies: see there."""

from __future__ import annotations

from rapm.kernels.runtime import jit, tl


@jit
def load(x, mask):
    return tl.load(x, mask=mask, other=0.0).to(tl.float32)


@jit
def add2(a, b, c, d):
    return a + c, b + d


@jit
def add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@jit
def place(C: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OWN_PAD: tl.constexpr, TILE: tl.constexpr):
    """A program's channels (TILE) and groups (OWN_PAD), and whether each exists."""
    k, g = tl.arange(0, TILE), tl.arange(0, OWN_PAD)
    c, group = tl.program_id(0) * (OWN * WIDTH) + k, tl.program_id(0) * OWN + g
    return c, (k < OWN * WIDTH) & (c < C), group, (g < OWN) & (group < C // WIDTH)


@jit
def across(c, in_c, LANES: tl.constexpr):
    """Of LANES rows: their numbers, the channels, whether these exist, and channels as a column has them, LANES TILE.

    What is loaded at the last lies as the tiles do, and no tile is moved to meet it.
    """
    return tl.arange(0, LANES)[:, None], c[None, :], in_c[None, :], c[None, :] + tl.zeros((LANES, 1), c.dtype)


@jit
def owned(TILE: tl.constexpr, WIDTH: tl.constexpr, OWN_PAD: tl.constexpr):
    """Whether a channel is a group's, OWN_PAD TILE."""
    return tl.arange(0, TILE)[None, :] // WIDTH == tl.arange(0, OWN_PAD)[:, None]


@jit
def spread(x, k, WIDTH: tl.constexpr):
    """Each channel's value of its group, from (OWN_PAD) to k's shape. One exchange, and each side keeps its layout."""
    return tl.gather(x, tl.minimum(k // WIDTH, x.shape[0] - 1), axis=0)


@jit
def wide(x, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """`spread` to 1 TILE."""
    return spread(x, tl.arange(0, TILE), WIDTH)[None, :]


@jit
def sums_of_runs(x, splits, group, in_g, GROUPS: tl.constexpr, SPLITS: tl.constexpr):
    """Both sums of every group and run, each (OWN_PAD SPLITS), 0 where nothing exists."""
    s = tl.arange(0, SPLITS)[None, :]
    at, mask = x + group[:, None] * splits + s, in_g[:, None] & (s < splits)
    return load(at, mask), load(at + GROUPS * splits, mask)


@jit
def tanh(x):
    """tanh in one instruction, right to 11 bits: x sigmoid(x) to |x| 2^-12, which far below 0 is more than bf16 rounds.

    Of a map's norm that is 1e-4 (H200), a tenth of what rounding to bf16 costs.
    """
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def logistic(u):
    """1 / (1 + exp(-u)) in five instructions, where tl.sigmoid has some fifteen; below 5e-20 it is 0."""
    v = 1.0 + tl.exp2(u * -1.4426950408889634)
    return tl.rsqrt(v * v)


@jit
def affine(mean, rstd, weight, bias, SILU: tl.constexpr, SHORT: tl.constexpr):
    """scale and offset of v that make what `act` takes: (v - mean) rstd w + b, or half of it."""
    scale = rstd * weight
    offset = bias - mean * scale
    if SILU and SHORT:
        return scale * 0.5, offset * 0.5
    return scale, offset


@jit
def act(u, SILU: tl.constexpr, SHORT: tl.constexpr):
    """act(u); or where tanh is short act(2 u), which is u + u tanh(u)."""
    if SILU and SHORT:
        return u * tanh(u) + u
    if SILU:
        return u * logistic(u)
    return u


@jit
def act_gradient(d, xhat, weight, bias, SILU: tl.constexpr, SHORT: tl.constexpr):
    """d act'(xhat w + b), or twice that."""
    if SILU and SHORT:
        h = xhat * (weight * 0.5) + bias * 0.5
        t = tanh(h)
        return d * (h * (1.0 - t * t) + t) + d
    if SILU:
        u = xhat * weight + bias
        sigmoid = logistic(u)
        silu = u * sigmoid
        return d * (sigmoid + silu - silu * sigmoid)
    return d
