"""Kernels of `disc_head` from the logits back to the features and the weights. Legend and launches: disc_head.py.

A chain is one gradient on its way back through one image: the discriminator's for every image, and the generator's for
the current fake. A chain starts at dlogit = -1, 0 or 1 (the generator's times its weight); what the means divide by is
applied to the results, so that half-precision gradients stay far from their smallest numbers.
"""

from __future__ import annotations

from rapm.kernels.disc_head_forward import _group_sum, _leaky, _multiply, _offset, _parameters, _pick, _size, _strip
from rapm.kernels.disc_head_plan import (
    CHAIN_BIAS,
    CHAIN_BLOCKS,
    CHAIN_D,
    CHAIN_DIVISOR,
    CHAIN_DLOGIT,
    CHAIN_ENDS,
    CHAIN_LOGITS,
    CHAIN_ROLE,
    CHAIN_S,
    CHAIN_SUMS,
    CHAIN_TERMS,
    FAKE,
    GENERATOR,
    INPUT_AT,
    INPUT_C,
    INPUT_D,
    INPUT_DIVISOR,
    INPUT_MATRIX,
    INPUT_N0,
    INPUT_OUTPUT,
    INPUT_ROWS,
    INPUT_STEP,
    REDUCE_AT,
    REDUCE_DIVISOR,
    REDUCE_N,
    REDUCE_OUT,
    REDUCE_SOURCE,
    REDUCE_STRIDE,
    REDUCE_TARGET,
    REDUCE_WIDTH,
    STRIP_C0,
    STRIP_HEAD,
    STRIP_MAP,
    STRIP_SHARES,
    STRIP_STATS,
    WEIGHT_C,
    WEIGHT_D,
    WEIGHT_DIVISOR,
    WEIGHT_KINDS,
    WEIGHT_LENGTH,
    WEIGHT_M0,
    WEIGHT_MATRIX,
    WEIGHT_N0,
    WEIGHT_PITCH,
    WEIGHT_SOURCE,
    WEIGHT_X,
)
from rapm.kernels.runtime import jit, tl


@jit
def _hinge_kernel(
    weights, a1, h, da1, stats, partial_logits, dlogit, sums, out_bias, losses, logits, weight_generator, table,
    COLUMNS: tl.constexpr, SECOND: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """For each channel of a strip in a chain the sums of dy and dy hat(h), dy = lrelu'(y) (da1 + dlogit w_out).

    Layer 2 has no da1 and comes first: it makes the logits and dlogit, and sums dlogit a2. Its strips of the first
    channels also write dlogit, its sum, their share of the loss, and logits where wanted.
    """
    row = table + tl.program_id(0) * COLUMNS
    C, P, r0, c, inside, _, _ = _strip(row, LANES, GROUPS)
    _, _, gamma, beta, w_out, b_out = _parameters(_offset(row, STRIP_HEAD), C, SECOND)
    at, stat = _offset(row, STRIP_MAP), stats + _offset(row, STRIP_STATS)
    w_out = tl.load(weights + w_out + c, mask=inside, other=0.0)
    b_out = tl.load(weights + b_out)
    mean = tl.load(stat + c, mask=inside, other=0.0)
    rstd = tl.load(stat + C + c, mask=inside, other=0.0)
    gamma = tl.load(weights + gamma + c, mask=inside, other=0.0)
    beta = tl.load(weights + beta + c, mask=inside, other=0.0)
    role = tl.load(row + CHAIN_ROLE)
    sign = tl.where(role == FAKE, 1.0, -1.0)
    factor = sign
    if role == GENERATOR:
        factor *= _pick(weight_generator, tl.load(row + CHAIN_S))
    writes = tl.load(row + STRIP_C0) == 0
    block, blocks = tl.arange(0, BLOCKS), tl.load(row + CHAIN_BLOCKS)
    dy_sum = tl.zeros([STEP, LANES], tl.float32)
    hat_sum = tl.zeros([STEP, LANES], tl.float32)
    out_sum = tl.zeros([STEP, LANES], tl.float32)
    d_sum = tl.zeros([STEP], tl.float32)
    loss = tl.zeros([STEP], tl.float32)
    for start in range(r0, tl.minimum(r0 + ROWS, P), STEP):
        r = start + tl.arange(0, STEP)
        valid = r < P
        tile, mask = r[:, None] * C + c[None, :], valid[:, None] & inside[None, :]
        hat = (tl.load(h + at + tile, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        y = hat * gamma[None, :] + beta[None, :]
        if SECOND:
            shares = partial_logits + tl.load(row + STRIP_SHARES) + block[:, None] * P + r[None, :]
            logit = tl.load(shares, mask=(block < blocks)[:, None] & valid[None, :], other=0.0)
            logit = tl.sum(logit, axis=0) + b_out
            margin = 1.0 + sign * logit
            d = tl.where(valid & (margin > 0), factor, 0.0)
            tl.store(dlogit + tl.load(row + CHAIN_DLOGIT) + r, d, mask=valid & writes)
            if logits is not None:
                tl.store(logits + tl.load(row + CHAIN_LOGITS) + r, logit, mask=valid & writes & (role != GENERATOR))
            d_sum += d
            loss += tl.where(valid & ~(margin <= 0), margin, 0.0)  # NaN counts: the step's guard must see it
            a2 = _leaky(y, y) + tl.load(a1 + at + tile, mask=mask, other=0.0).to(tl.float32)
            out_sum += d[:, None] * a2
            dy = _leaky(y, d[:, None] * w_out[None, :])
        else:
            d = tl.load(dlogit + tl.load(row + CHAIN_DLOGIT) + r, mask=valid, other=0.0)
            da = tl.load(da1 + _offset(row, CHAIN_D) + tile, mask=mask, other=0.0).to(tl.float32)
            dy = _leaky(y, da + d[:, None] * w_out[None, :])
        dy_sum += dy
        hat_sum += dy * hat
    strip = r0 // ROWS
    sums += _offset(row, CHAIN_SUMS) + strip * 3 * C
    tl.store(sums + c, tl.sum(dy_sum, axis=0), mask=inside)
    tl.store(sums + C + c, tl.sum(hat_sum, axis=0), mask=inside)
    if SECOND:
        tl.store(sums + 2 * C + c, tl.sum(out_sum, axis=0), mask=inside)
        lane = tl.arange(0, 16)  # of out.bias and the padding behind it
        ends = tl.where(lane == 0, tl.sum(d_sum, axis=0), 0.0)
        tl.store(out_bias + _offset(row, CHAIN_ENDS) + strip * 16 + lane, ends, mask=(lane < 16) & writes)
        share = tl.sum(loss, axis=0) / tl.load(row + CHAIN_DIVISOR).to(tl.float32)
        tl.store(losses + tl.load(row + CHAIN_TERMS) + strip, share, mask=writes)


@jit
def _norm_backward_kernel(
    weights, h, d, stats, dlogit, sums, bias_sums, table,
    COLUMNS: tl.constexpr, SECOND: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dh = rstd (gamma dy - mean(gamma dy) - hat mean(gamma dy hat)) of a strip, means over the group; and dh's sums.

    dy as in `_hinge_kernel`. In layer 1 dh takes da1's place.
    """
    row = table + tl.program_id(0) * COLUMNS
    C, P, r0, c, inside, member, width = _strip(row, LANES, GROUPS)
    _, _, gamma, beta, w_out, _ = _parameters(_offset(row, STRIP_HEAD), C, SECOND)
    at, stat = _offset(row, STRIP_MAP), stats + _offset(row, STRIP_STATS)
    w_out = tl.load(weights + w_out + c, mask=inside, other=0.0)
    d += _offset(row, CHAIN_D)
    sums += _offset(row, CHAIN_SUMS)
    mean = tl.load(stat + c, mask=inside, other=0.0)
    rstd = tl.load(stat + C + c, mask=inside, other=0.0)
    gamma = tl.load(weights + gamma + c, mask=inside, other=0.0)
    beta = tl.load(weights + beta + c, mask=inside, other=0.0)
    dy_sum, hat_sum = tl.zeros_like(mean), tl.zeros_like(mean)
    strips = tl.cdiv(P, ROWS)
    for start in range(0, strips, CHUNK):
        i = start + tl.arange(0, CHUNK)
        part, mask = sums + i[:, None] * 3 * C + c[None, :], (i < strips)[:, None] & inside[None, :]
        dy_sum += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
        hat_sum += tl.sum(tl.load(part + C, mask=mask, other=0.0), axis=0)
    count = (P * width).to(tl.float32)
    dy_mean, hat_mean = _group_sum(gamma * dy_sum, member) / count, _group_sum(gamma * hat_sum, member) / count
    total = tl.zeros([STEP, LANES], tl.float32)
    for start in range(r0, tl.minimum(r0 + ROWS, P), STEP):
        r = start + tl.arange(0, STEP)
        tile, mask = r[:, None] * C + c[None, :], (r < P)[:, None] & inside[None, :]
        hat = (tl.load(h + at + tile, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dl = tl.load(dlogit + tl.load(row + CHAIN_DLOGIT) + r, mask=r < P, other=0.0)
        da = dl[:, None] * w_out[None, :]
        if not SECOND:
            da += tl.load(d + tile, mask=mask, other=0.0).to(tl.float32)
        dy = _leaky(hat * gamma[None, :] + beta[None, :], da)
        dh = rstd[None, :] * (gamma[None, :] * dy - dy_mean[None, :] - hat * hat_mean[None, :])
        total += tl.where(mask, dh, 0.0)
        tl.store(d + tile, dh.to(d.dtype.element_ty), mask=mask)
    tl.store(bias_sums + _offset(row, CHAIN_BIAS) + r0 // ROWS * C + c, tl.sum(total, axis=0), mask=inside)


@jit
def _input_kernel(
    d, matrices, outputs, scale, table,
    COLUMNS: tl.constexpr, SIDES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a convolution's input, the sum over sides of d W, M rows by N channels; times scale / divisor."""
    row = table + tl.program_id(0) * COLUMNS
    C, rows, n0 = _size(row, INPUT_C, 16), _size(row, INPUT_ROWS, 1), _size(row, INPUT_N0, 16)
    m, n, k = tl.arange(0, M), n0 + tl.arange(0, N), tl.arange(0, K)
    columns = n < C
    acc = tl.zeros([M, N], tl.float32)
    for side in tl.static_range(SIDES):
        a = d + _offset(row, INPUT_D) + side * _offset(row, INPUT_STEP)
        a = a + tl.minimum(m, rows - 1)[:, None] * C + k[None, :]
        b = matrices + _offset(row, INPUT_MATRIX + side) + k[:, None] * C + n[None, :]
        acc = _multiply(acc, a, b, C, columns, C, K, EVEN, PRECISION)
    acc *= scale / tl.load(row + INPUT_DIVISOR).to(tl.float32)
    out = _pick(outputs, tl.load(row + INPUT_OUTPUT)) + _offset(row, INPUT_AT) + m[:, None] * C + n[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & columns[None, :])


@jit
def _weight_kernel(
    sources, dh1, dh2, gradient, table,
    COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dh^T x over the positions of all fake, then all real images of a side: M by N channels. dh2 goes with a1."""
    row = table + tl.program_id(0) * COLUMNS
    C, length, pitch = _size(row, WEIGHT_C, 16), _size(row, WEIGHT_LENGTH, 1), _size(row, WEIGHT_PITCH, 16)
    source, kinds = tl.load(row + WEIGHT_SOURCE), _offset(row, WEIGHT_KINDS)
    m, n = _size(row, WEIGHT_M0, 16) + tl.arange(0, M), _size(row, WEIGHT_N0, 16) + tl.arange(0, N)
    k = tl.arange(0, K)
    a = dh1
    if source == 0:
        a = dh2
    a += _offset(row, WEIGHT_D)
    b = _pick(sources, source) + _offset(row, WEIGHT_X)
    steps = tl.cdiv(length, K)
    acc = tl.zeros([M, N], tl.float32)
    for i in range(0, 2 * steps):
        kind = i // steps
        p = (i - kind * steps) * K + k
        left = a + kind.to(tl.int64) * length * C + p[None, :] * C + m[:, None]
        right = b + kind.to(tl.int64) * kinds + p[:, None] * pitch + n[None, :]
        if EVEN:
            left = tl.load(left, mask=(m < C)[:, None], other=0.0)
            right = tl.load(right, mask=(n < C)[None, :], other=0.0)
        else:
            left = tl.load(left, mask=(p < length)[None, :] & (m < C)[:, None], other=0.0)
            right = tl.load(right, mask=(p < length)[:, None] & (n < C)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc /= tl.load(row + WEIGHT_DIVISOR).to(tl.float32)
    out = gradient + _offset(row, WEIGHT_MATRIX) + m[:, None] * C + n[None, :]
    tl.store(out, acc, mask=(m < C)[:, None] & (n < C)[None, :])


@jit
def _reduce_kernel(sources, targets, table, COLUMNS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr):
    """Up to LANES columns of a partial result, summed over its rows in order: vector gradients and both losses."""
    row = table + tl.program_id(0) * COLUMNS
    width, stride = tl.load(row + REDUCE_WIDTH), tl.load(row + REDUCE_STRIDE)
    n = tl.load(row + REDUCE_N).to(tl.int32)
    lane = tl.arange(0, LANES)
    source = _pick(sources, tl.load(row + REDUCE_SOURCE)) + tl.load(row + REDUCE_AT) + lane[None, :]
    acc = tl.zeros([CHUNK, LANES], tl.float32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        acc += tl.load(source + i[:, None] * stride, mask=(i < n)[:, None] & (lane < width)[None, :], other=0.0)
    out = _pick(targets, tl.load(row + REDUCE_TARGET)) + tl.load(row + REDUCE_OUT) + lane
    tl.store(out, tl.sum(acc, axis=0) / tl.load(row + REDUCE_DIVISOR).to(tl.float32), mask=lane < width)
