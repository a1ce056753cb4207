"""Compiled steps of the fast forward pass: plain loops and matrix products on rows, no torch."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SMALL_BATCH = 16
"""Up to this many rows loops over the weights serve; BLAS is faster on few rows only where it has kernels for that."""

_PLACES = ("source", "target", "add", "n_in", "n_out", "weight", "bias", "scale", "shift", "act")
STEP = np.dtype([*((name, np.int64) for name in _PLACES), ("eps", np.float64), ("alpha", np.float64)])
"""
One step of a program: [linear + bias] [layer norm] [activation] [+ residual].

Source, target and what is added are columns of the workspace; weight, bias, scale and shift begin at these places of
the parameters; -1: none.
"""
RELU, ELU, TANH = 0, 1, 2
_SUMS = {"contract", "reassoc", "nsz"}


@njit(inline="always", error_model="numpy")
def _exp(x: np.float32) -> np.float32:
    """``exp`` in float32 for x <= 88, relative error below 2e-7; unlike libm's, LLVM vectorises it."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power: np.float32 = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    product: np.float32 = p * power
    return product


@njit(inline="always", error_model="numpy")
def _tanh(x: np.float32) -> np.float32:
    """``tanh`` in float32: a polynomial near 0, where the formula with exp cancels."""
    s = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * s + np.float32(2.06390887954e-2)
    p = p * s + np.float32(-5.37397155531e-2)
    p = p * s + np.float32(1.33314422036e-1)
    p = p * s + np.float32(-3.33332819422e-1)
    near = p * s * x + x
    size = min(abs(x), np.float32(15.0))
    far = np.float32(1.0) - np.float32(2.0) / (_exp(size + size) + np.float32(1.0))
    return near if abs(x) < np.float32(0.625) else (far if x > 0 else -far)


@njit(cache=True, fastmath=_SUMS, error_model="numpy")
def _normalize(y: Floats, scale: Floats, shift: Floats, eps: float) -> None:
    """Layer norm of each row, in place."""
    n = y.shape[1]
    for b in range(len(y)):
        row = y[b]
        mean, variance = np.float32(0.0), np.float32(0.0)
        for j in range(n):
            mean += row[j]
        mean /= np.float32(n)
        for j in range(n):
            variance += (row[j] - mean) * (row[j] - mean)
        factor = np.float32(1.0 / math.sqrt(np.float64(variance) / n + eps))
        for j in range(n):
            row[j] = (row[j] - mean) * factor * scale[j] + shift[j]


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _activate(y: Floats, act: int, alpha: np.float32) -> None:
    """Activation, in place."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for b in range(len(y)):
        row = y[b]
        if act == RELU:
            for j in range(len(row)):
                row[j] = zero if row[j] < zero else row[j]
        elif act == ELU:
            for j in range(len(row)):
                low = min(row[j], zero)
                # near 0 the difference would cancel: Taylor's polynomial
                near = low * (one + low * (np.float32(0.5) + low * np.float32(1 / 6)))
                down = near if low > np.float32(-0.02) else _exp(low) - one
                row[j] = row[j] if row[j] > zero else alpha * down
        elif act == TANH:
            for j in range(len(row)):
                row[j] = _tanh(row[j])


@njit(cache=True, error_model="numpy")
def _finish(y: Floats, add: Floats, params: Floats, step: np.void) -> None:
    """Bias, layer norm, activation and residual, in place: each for all rows, because short calls would cost more."""
    n = y.shape[1]
    if step["bias"] >= 0:
        # a slice: with ``at + j``, which might be negative, the loop would not be vectorised
        bias = params[step["bias"] : step["bias"] + n]
        for b in range(len(y)):
            row = y[b]
            for j in range(n):
                row[j] += bias[j]
    if step["scale"] >= 0:
        scale, shift = step["scale"], step["shift"]
        _normalize(y, params[scale : scale + n], params[shift : shift + n], step["eps"])
    if step["act"] >= 0:
        _activate(y, step["act"], np.float32(step["alpha"]))
    if step["add"] != -1:
        for b in range(len(y)):
            row, more = y[b], add[b]
            for j in range(n):
                row[j] += more[j]


@njit(cache=True, fastmath={"contract"})
def _linear(x: Floats, y: Floats, params: Floats, at: int) -> None:
    """``y = x W`` for one row, four rows of W at a time; rows whose input is 0 (behind a ReLU: half) are skipped."""
    n, count = len(y), 0
    used = np.empty(len(x) + 1, np.int64)
    for i in range(len(x)):
        used[count] = i
        count += x[i] != 0
    y[:] = 0.0
    k = 0
    while k + 4 <= count:
        i0, i1, i2, i3 = used[k], used[k + 1], used[k + 2], used[k + 3]
        x0, x1, x2, x3 = x[i0], x[i1], x[i2], x[i3]
        w0, w1 = params[at + i0 * n : at + i0 * n + n], params[at + i1 * n : at + i1 * n + n]
        w2, w3 = params[at + i2 * n : at + i2 * n + n], params[at + i3 * n : at + i3 * n + n]
        for j in range(n):
            y[j] = y[j] + x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]
        k += 4
    while k < count:
        x0, w0 = x[used[k]], params[at + used[k] * n : at + used[k] * n + n]
        for j in range(n):
            y[j] += x0 * w0[j]
        k += 1


@njit(cache=True, fastmath={"contract"})
def _linear4(x: Floats, y: Floats, params: Floats, at: int) -> None:
    """``y = x W`` for four rows, four rows of W at a time, so that each is read once."""
    n, k = y.shape[1], 0
    a, b, c, d = x[0], x[1], x[2], x[3]
    ya, yb, yc, yd = y[0], y[1], y[2], y[3]
    y[:] = 0.0
    while k + 4 <= x.shape[1]:
        i = at + k * n
        w0, w1 = params[i : i + n], params[i + n : i + 2 * n]
        w2, w3 = params[i + 2 * n : i + 3 * n], params[i + 3 * n : i + 4 * n]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        c0, c1, c2, c3 = c[k], c[k + 1], c[k + 2], c[k + 3]
        d0, d1, d2, d3 = d[k], d[k + 1], d[k + 2], d[k + 3]
        for j in range(n):
            ya[j] = ya[j] + a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
            yb[j] = yb[j] + b0 * w0[j] + b1 * w1[j] + b2 * w2[j] + b3 * w3[j]
            yc[j] = yc[j] + c0 * w0[j] + c1 * w1[j] + c2 * w2[j] + c3 * w3[j]
            yd[j] = yd[j] + d0 * w0[j] + d1 * w1[j] + d2 * w2[j] + d3 * w3[j]
        k += 4
    while k < x.shape[1]:
        w0 = params[at + k * n : at + k * n + n]
        a0, b0, c0, d0 = a[k], b[k], c[k], d[k]
        for j in range(n):
            ya[j] += a0 * w0[j]
            yb[j] += b0 * w0[j]
            yc[j] += c0 * w0[j]
            yd[j] += d0 * w0[j]
        k += 1


@njit(cache=True, error_model="numpy")
def _multiply(x: Floats, y: Floats, params: Floats, at: int) -> None:
    """``y = x W``."""
    rows, n_in, n_out = len(x), x.shape[1], y.shape[1]
    if rows > SMALL_BATCH:
        np.dot(x, params[at : at + n_in * n_out].reshape(n_in, n_out), y)
        return
    fours = rows // 4 * 4
    for b in range(0, fours, 4):
        _linear4(x[b : b + 4], y[b : b + 4], params, at)
    for b in range(fours, rows):
        _linear(x[b], y[b], params, at)


@njit(cache=True, error_model="numpy")
def forward(x: Floats, out: Floats, work: Floats, params: Floats, program: NDArray[np.void]) -> None:
    """The whole program, layer by layer; column c of the workspace is a block of rows here."""
    rows, last = len(x), len(program) - 1
    for s in range(last + 1):
        step = program[s]
        n_in, n_out = step["n_in"], step["n_out"]
        source, target, add = x, out, x
        if step["source"] >= 0:
            at = step["source"] * rows
            source = work[at : at + rows * n_in].reshape(rows, n_in)
        if s < last:
            at = step["target"] * rows
            target = work[at : at + rows * n_out].reshape(rows, n_out)
        if step["add"] >= 0:
            at = step["add"] * rows
            add = work[at : at + rows * n_out].reshape(rows, n_out)
        if step["weight"] >= 0:
            _multiply(source, target, params, step["weight"])
        else:
            target[:] = source
        _finish(target, add, params, step)


@njit(cache=True, fastmath=_SUMS, error_model="numpy")
def _expectation(logits: Floats, support: Floats) -> np.float32:
    largest = logits[0]
    for i in range(len(logits)):
        largest = max(largest, logits[i])
    mass, weighted = np.float32(0.0), np.float32(0.0)
    for i in range(len(logits)):
        weight = _exp(logits[i] - largest)
        mass += weight
        weighted += weight * support[i]
    return weighted / mass


@njit(cache=True, error_model="numpy")
def expectations(logits: Floats, support: Floats, eps: float, out: Floats) -> None:
    """See :func:`decode`; ``eps < 0``: no transform."""
    for b in range(len(logits)):
        value = float(_expectation(logits[b], support))
        if eps > 0.0:
            # (sqrt(1 + z) - 1) / (2 eps) without cancellation
            z = 4.0 * eps * (abs(value) + 1.0 + eps)
            root = z / (math.sqrt(1.0 + z) + 1.0) / (2.0 * eps)
            value = math.copysign(root * root - 1.0, value)
        elif eps == 0.0:
            value = math.copysign((abs(value) + 1.0) ** 2 - 1.0, value)
        out[b] = value
