"""The Triton kernels: squeeze, bottleneck, tail, and their backward passes. Imported only where Triton is.

A value (N, C, *) is read as three strides: of an example, of a channel and of a position; one of the last two is 1, so
one kernel serves both layouts, with a tile that is long where memory is. Programs are numbered in one dimension, example
by example. All sums are in float32 and in a fixed order: the same numbers at every run.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """Compute e^x as CUDA's math library rounds it; Triton's own is an approximation."""
    if EXACT:
        return libdevice.exp(x)
    return tl.exp(x)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    return tl.div_rn(1.0, 1.0 + _exp(-x, EXACT))


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    if EXACT:
        return libdevice.normcdf(x)
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activate(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """Apply the activation to a sum that has been rounded as torch would round it. NaN stays NaN."""
    if ACT == "relu":
        x = tl.where(x <= 0.0, 0.0, x)
    if ACT == "relu6":
        x = tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    if ACT == "silu":
        x = tl.div_rn(x, 1.0 + _exp(-x, EXACT))
    if ACT == "hardswish":
        x = x * tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 6.0, x + 3.0))
        x = x * 0.16666666666666666 if EXACT else tl.div_rn(x, 6.0)  # as torch rounds on CUDA, and elsewhere
    if ACT == "gelu":
        x = x * _normal_cdf(x, EXACT)
    return x


@triton.jit
def _slope(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """Compute the activation's derivative; ``x`` is the output for ReLU and ReLU6, else the input."""
    if ACT == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    if ACT == "relu6":
        return tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    if ACT == "silu":
        s = _sigmoid(x, EXACT)
        return s * (1.0 + x * (1.0 - s))
    if ACT == "hardswish":
        return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))
    # gelu
    return _normal_cdf(x, EXACT) + x * 0.3989422804014327 * _exp(-0.5 * x * x, EXACT)


@triton.jit
def _gate(a, GATE: tl.constexpr, ONE: tl.constexpr, EXACT: tl.constexpr):
    """Compute σ of the logits; with ONE it is exactly 1 at 0. ``given``: it is the gate already."""
    g = a
    if GATE == "sigmoid":
        g = _sigmoid(a, EXACT)
        if ONE:
            g = 2.0 * g
    if GATE == "hard_sigmoid":
        g = tl.div_rn(tl.where(a <= -3.0, 0.0, tl.where(a >= 3.0, 6.0, a + 3.0)), 6.0)
        if ONE:
            g = 2.0 * g
    if GATE == "tanh":
        g = 2.0 * _sigmoid(2.0 * a, EXACT) - 1.0
        if ONE:
            g = 1.0 + g
    if GATE == "relu":
        if ONE:
            a = 1.0 + a
        g = tl.where(a <= 0.0, 0.0, a)
    return g


@triton.jit
def _gate_slope(a, GATE: tl.constexpr, ONE: tl.constexpr, EXACT: tl.constexpr):
    """Compute the derivative of ``_gate`` by the logits."""
    d = tl.full(a.shape, 1.0, tl.float32)
    if GATE == "sigmoid":
        s = _sigmoid(a, EXACT)
        d = s * (1.0 - s)
    if GATE == "hard_sigmoid":
        d = tl.where((a > -3.0) & (a < 3.0), 0.16666666666666666, 0.0)
    if ONE and (GATE == "sigmoid" or GATE == "hard_sigmoid"):
        d = 2.0 * d
    if GATE == "tanh":
        t = 2.0 * _sigmoid(2.0 * a, EXACT) - 1.0
        d = 1.0 - t * t
    if GATE == "relu":
        if ONE:
            a = 1.0 + a
        d = tl.where(a <= 0.0, 0.0, 1.0)
    return d


@triton.jit
def _tile(sn, sc, sp, P, C, tiles_p, tiles_c, BP: tl.constexpr, BC: tl.constexpr):
    """Locate the work of this program: example, first channel, and for its tile the offsets, the mask and the channels."""
    program = tl.program_id(0)
    n = program // (tiles_p * tiles_c)
    rest = program % (tiles_p * tiles_c)
    first_p = (rest // tiles_c) * BP
    first_c = (rest % tiles_c) * BC
    p = tl.arange(0, BP)
    c = tl.arange(0, BC)
    start = n.to(tl.int64) * sn + first_p.to(tl.int64) * sp + first_c.to(tl.int64) * sc
    offsets = start + (p[:, None] * sp + c[None, :] * sc)
    mask = (first_p + p[:, None] < P) & (first_c + c[None, :] < C)
    return n, first_c + c, offsets, mask


@triton.jit
def squeeze(value, partial, sn, sc, sp, P, C, splits, length, tiles_c, BP: tl.constexpr, BC: tl.constexpr):
    """Sum over a part of the positions, divided by the number of all: (N, C, *) to (N, splits, C), which add up to the mean."""
    program = tl.program_id(0)
    n = program // (splits * tiles_c)
    rest = program % (splits * tiles_c)
    split = rest // tiles_c
    c = (rest % tiles_c) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    low = split * length
    high = tl.minimum(low + length, P)
    start = value + n.to(tl.int64) * sn
    for q in range(low, high, BP):
        p = q + tl.arange(0, BP)
        offsets = p[:, None].to(tl.int64) * sp + c[None, :].to(tl.int64) * sc
        x = tl.load(start + offsets, (p[:, None] < high) & (c[None, :] < C), 0.0)
        total += tl.sum(x.to(tl.float32), 0)
    share = (total / P).to(partial.dtype.element_ty)
    tl.store(partial + (n.to(tl.int64) * splits + split) * C + c, share, c < C)


@triton.jit
def bottleneck(
    partial, w1, b1, mean, hidden, C, R, splits,
    BIAS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute one unit of W1 z + b1 for one example, and z where it is asked for: for small batches, where launches count."""
    n = (tl.program_id(0) // R).to(tl.int64)
    r = tl.program_id(0) % R
    total = tl.zeros((BC,), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        z = tl.zeros((BC,), tl.float32)
        for split in range(splits):
            z += tl.load(partial + (n * splits + split) * C + c, c < C, 0.0)
        if mean is not None:  # noqa: SIM102 -- for Triton it is a constant
            if r == 0:
                tl.store(mean + n * C + c, z, c < C)
        total += z * tl.load(w1 + r * C + c, c < C, 0.0).to(tl.float32)
    a = tl.sum(total, 0)
    if BIAS:
        a += tl.load(b1 + r).to(tl.float32)
    tl.store(hidden + n * R + r, a)


@triton.jit
def tail_with_gate(
    value, shortcut, out, hidden, logits, w2, b2, sn, sc, sp, P, C, R, tiles_p, tiles_c,
    ADD: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, ONE: tl.constexpr,
    ACT: tl.constexpr, EXACT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute act(value · σ(W2 δ(a) + b2) + shortcut), each program making the gates of its own channels.

    The logits are stored where they are asked for, by the programs of the first positions.
    """
    n, c, offsets, mask = _tile(sn, sc, sp, P, C, tiles_p, tiles_c, BP, BC)
    a = tl.zeros((BC,), tl.float32)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        h = _activate(tl.load(hidden + n.to(tl.int64) * R + r, r < R, 0.0), INNER, EXACT)
        h = tl.where(r < R, h, 0.0)
        w = tl.load(w2 + c[:, None] * R + r[None, :], (c[:, None] < C) & (r[None, :] < R), 0.0).to(tl.float32)
        a += tl.sum(w * h[None, :], 1)
    if BIAS:
        a += tl.load(b2 + c, c < C, 0.0).to(tl.float32)
    if logits is not None:  # noqa: SIM102
        if (tl.program_id(0) // tiles_c) % tiles_p == 0:
            tl.store(logits + n.to(tl.int64) * C + c, a, c < C)
    g = _gate(a, GATE, ONE, EXACT)
    x = tl.load(value + offsets, mask, 0.0).to(tl.float32) * g[None, :]
    if ADD:
        x += tl.load(shortcut + offsets, mask, 0.0).to(tl.float32)
    x = _activate(x.to(out.dtype.element_ty).to(tl.float32), ACT, EXACT)
    tl.store(out + offsets, x.to(out.dtype.element_ty), mask)


@triton.jit
def tail(
    value, gate, shortcut, out, sn, sc, sp, P, C, tiles_p, tiles_c,
    ADD: tl.constexpr, GATE: tl.constexpr, ONE: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute act(value · gate + shortcut), the gate given or made of its logits."""
    n, c, offsets, mask = _tile(sn, sc, sp, P, C, tiles_p, tiles_c, BP, BC)
    g = _gate(tl.load(gate + n.to(tl.int64) * C + c, c < C, 0.0).to(tl.float32), GATE, ONE, EXACT)
    x = tl.load(value + offsets, mask, 0.0).to(tl.float32) * g[None, :]
    if ADD:
        x += tl.load(shortcut + offsets, mask, 0.0).to(tl.float32)
    x = _activate(x.to(out.dtype.element_ty).to(tl.float32), ACT, EXACT)
    tl.store(out + offsets, x.to(out.dtype.element_ty), mask)


@triton.jit
def _before_activation(grad, value, other, g, offsets, mask, ADD: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr):
    """Compute the gradient of the sum, and the value. ``other`` is the output for ReLU and ReLU6, else the shortcut."""
    d = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    v = tl.load(value + offsets, mask, 0.0).to(tl.float32)
    if ACT == "relu" or ACT == "relu6":
        d = d * _slope(tl.load(other + offsets, mask, 0.0).to(tl.float32), ACT, EXACT)
    elif ACT != "none":
        x = v * g[None, :]
        if ADD:
            x += tl.load(other + offsets, mask, 0.0).to(tl.float32)
        d = d * _slope(x.to(value.dtype.element_ty).to(tl.float32), ACT, EXACT)
    return d, v


@triton.jit
def tail_backward(
    grad, value, other, gate, d_shortcut, d_value, partial, sn, sc, sp, P, C, splits, length, tiles_c,
    ADD: tl.constexpr, STORE: tl.constexpr, SCALE: tl.constexpr, GATE: tl.constexpr, ONE: tl.constexpr,
    ACT: tl.constexpr, EXACT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the shortcut (STORE), of the value through the product (SCALE), and sums for the gate's.

    The sums (N, splits, C) are the gradient of the logits, where these are what is given.
    """
    program = tl.program_id(0)
    n = (program // (splits * tiles_c)).to(tl.int64)
    rest = program % (splits * tiles_c)
    split = rest // tiles_c
    c = (rest % tiles_c) * BC + tl.arange(0, BC)
    a = tl.load(gate + n * C + c, c < C, 0.0).to(tl.float32)
    g = _gate(a, GATE, ONE, EXACT)
    total = tl.zeros((BC,), tl.float32)
    low = split * length
    high = tl.minimum(low + length, P)
    for q in range(low, high, BP):
        p = q + tl.arange(0, BP)
        offsets = n * sn + p[:, None].to(tl.int64) * sp + c[None, :].to(tl.int64) * sc
        mask = (p[:, None] < high) & (c[None, :] < C)
        d, v = _before_activation(grad, value, other, g, offsets, mask, ADD, ACT, EXACT)
        if STORE:
            tl.store(d_shortcut + offsets, d.to(d_shortcut.dtype.element_ty), mask)
        if SCALE:
            tl.store(d_value + offsets, (d * g[None, :]).to(d_value.dtype.element_ty), mask)
        total += tl.sum(d * v, 0)
    total = total * _gate_slope(a, GATE, ONE, EXACT)
    tl.store(partial + (n * splits + split) * C + c, total, c < C)


@triton.jit
def value_backward(
    grad, value, other, gate, d_mean, d_value, sn, sc, sp, P, C, tiles_p, tiles_c,
    ADD: tl.constexpr, GATE: tl.constexpr, ONE: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the value's gradient: through the product, and through the mean."""
    n, c, offsets, mask = _tile(sn, sc, sp, P, C, tiles_p, tiles_c, BP, BC)
    g = _gate(tl.load(gate + n.to(tl.int64) * C + c, c < C, 0.0).to(tl.float32), GATE, ONE, EXACT)
    z = tl.load(d_mean + n.to(tl.int64) * C + c, c < C, 0.0) / P
    if ACT == "none":
        d = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    else:
        d, _ = _before_activation(grad, value, other, g, offsets, mask, ADD, ACT, EXACT)
    tl.store(d_value + offsets, (d * g[None, :] + z[None, :]).to(d_value.dtype.element_ty), mask)
