"""Forward pass of small networks on the CPU without PyTorch's overhead per layer; the module stays the definition."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import nn

Floats = NDArray[np.float32]

SMALL_BATCH = 12
"""Up to this many rows a loop over the weights is faster than one BLAS call per layer."""

CHUNK = 256
"""Rows that go through all layers together, so that what one layer writes is in the cache for the next."""

# One step: [linear + bias] [layer norm] [activation] [+ residual], a row of the program. Sources and targets are
# columns of the workspace; -1: none.
_SOURCE, _TARGET, _ADD, _IN, _OUT, _WEIGHT, _BIAS, _SCALE, _SHIFT, _EPS, _ACT, _ALPHA, _STEP = range(13)
_NONE, _RELU, _ELU, _TANH = 0, 1, 2, 3
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
    """Layer norm of one row, in place."""
    n = len(y)
    mean = np.float32(0.0)
    for j in range(n):
        mean += y[j]
    mean /= np.float32(n)
    variance = np.float32(0.0)
    for j in range(n):
        variance += (y[j] - mean) * (y[j] - mean)
    factor = np.float32(1.0 / math.sqrt(np.float64(variance) / n + eps))
    for j in range(n):
        y[j] = (y[j] - mean) * factor * scale[j] + shift[j]


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _activate(y: Floats, act: int, alpha: np.float32) -> None:
    """Activation of one row, in place."""
    zero, one = np.float32(0.0), np.float32(1.0)
    if act == _RELU:
        for j in range(len(y)):
            y[j] = zero if y[j] < zero else y[j]
    elif act == _ELU:
        for j in range(len(y)):
            low = min(y[j], zero)
            # near 0 the difference would cancel: Taylor's polynomial
            near = low * (one + low * (np.float32(0.5) + low * np.float32(1 / 6)))
            down = near if low > np.float32(-0.02) else _exp(low) - one
            y[j] = y[j] if y[j] > zero else alpha * down
    elif act == _TANH:
        for j in range(len(y)):
            y[j] = _tanh(y[j])


@njit(cache=True, error_model="numpy")
def _finish(y: Floats, add: Floats, params: Floats, step: NDArray[np.float64]) -> None:
    """Bias, layer norm, activation and residual of one row, in place."""
    n = len(y)
    if step[_BIAS] >= 0:
        # a slice: with ``at + j``, which might be negative, the loop would not be vectorised
        bias = params[int(step[_BIAS]) : int(step[_BIAS]) + n]
        for j in range(n):
            y[j] += bias[j]
    if step[_SCALE] >= 0:
        scale, shift = int(step[_SCALE]), int(step[_SHIFT])
        _normalize(y, params[scale : scale + n], params[shift : shift + n], step[_EPS])
    _activate(y, int(step[_ACT]), np.float32(step[_ALPHA]))
    if step[_ADD] != -1:
        for j in range(n):
            y[j] += add[j]


@njit(cache=True, error_model="numpy")
def _finish_rows(y: Floats, source: Floats, add: Floats, params: Floats, program: NDArray[np.float64], s: int) -> None:
    """What follows BLAS, all rows; without a linear layer, the source is copied first."""
    for b in range(len(y)):
        if program[s, _WEIGHT] < 0:
            y[b, :] = source[b]
        _finish(y[b], add[b], params, program[s])


@njit(cache=True, fastmath={"contract"})
def _linear(x: Floats, y: Floats, params: Floats, at: int, used: NDArray[np.int64]) -> None:
    """``y = x W`` for one row, four rows of W at a time; rows whose input is 0 (behind a ReLU: half) are skipped."""
    n = len(y)
    count = 0
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


@njit(cache=True, error_model="numpy")
def _forward(x: Floats, out: Floats, work: Floats, params: Floats, program: NDArray[np.float64]) -> None:
    """The whole program, row by row."""
    used = np.empty(max(x.shape[1], len(work)) + 1, np.int64)
    last = len(program) - 1
    for b in range(len(x)):
        for s in range(last + 1):
            step = program[s]
            n_in, n_out = int(step[_IN]), int(step[_OUT])
            source = x[b] if step[_SOURCE] < 0 else work[int(step[_SOURCE]) : int(step[_SOURCE]) + n_in]
            target = out[b] if s == last else work[int(step[_TARGET]) : int(step[_TARGET]) + n_out]
            if step[_WEIGHT] >= 0:
                _linear(source, target, params, int(step[_WEIGHT]), used)
            else:
                target[:] = source
            add = x[b] if step[_ADD] < 0 else work[int(step[_ADD]) : int(step[_ADD]) + n_out]
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
def _decode(logits: Floats, support: Floats, eps: float, out: Floats) -> None:
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


def decode(logits: Floats, support: Floats, eps: float | None = None) -> Floats:
    """
    Value of a categorical head: the expectation of ``support`` under ``softmax(logits)``, then perhaps ``h^-1``.

    ``h(x) = sign(x) (sqrt(|x| + 1) - 1) + eps x`` (Pohlen et al., 2018, https://arxiv.org/abs/1805.11593).

    :param logits: ``[B, n]`` float32
    :param support: place of each bin, ``[n]``; in units of h if ``eps`` is given
    :param eps: of h, at least 0; None: the expectation itself
    :return: ``[B]`` float32
    :raises ValueError: if the shapes do not fit or ``eps`` is negative
    """
    logits, support = np.ascontiguousarray(logits, np.float32), np.ascontiguousarray(support, np.float32)
    if logits.ndim != 2 or support.shape != logits.shape[1:] or not len(support):
        raise ValueError(f"Logits {logits.shape} and support {support.shape} are not [B, n] and [n].")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}.")
    out = np.empty(len(logits), np.float32)
    _decode(logits, support, -1.0 if eps is None else float(eps), out)
    return out


class _Program:
    """
    Steps and parameters of a network, made by walking its modules once.

    :param module: the network
    """

    def __init__(self, module: nn.Module) -> None:
        self.steps: list[list[float]] = []
        self.sources: list[tuple[int, nn.Module, str]] = []
        self.columns, self.size = 0, 0
        self.inputs = -1  # width, unknown until the first layer that has one
        self.source, self.width = -1, -1
        self.closed = 0  # steps that nothing may be added to, because their output is needed as it is
        self._walk(module, "")
        if not self.steps or self.inputs < 0:
            raise TypeError(f"{type(module).__name__} has no layer to run.")

    def _walk(self, module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Sequential):
            for key, child in module.named_children():
                self._walk(child, f"{name}.{key}" if name else key)
        elif isinstance(getattr(module, "residual", None), nn.Sequential):
            self._residual(module, name)
        elif isinstance(module, nn.Linear):
            step = self._step(module.in_features, module.out_features, name)
            step[_WEIGHT] = self._place(module, "weight", module.in_features * module.out_features)
            if module.bias is not None:
                step[_BIAS] = self._place(module, "bias", module.out_features)
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            (width,) = module.normalized_shape
            # on top of a linear layer, unless that one's activation comes between
            step = self._last(_SCALE, _ACT) or self._step(width, width, name)
            self._fits(step[_OUT], width, name)
            step[_SCALE], step[_SHIFT] = self._place(module, "weight", width), self._place(module, "bias", width)
            step[_EPS] = module.eps
        elif isinstance(module, nn.ReLU | nn.ELU | nn.Tanh):
            step = self._last(_ACT) or self._step(self.width, self.width, name)
            step[_ACT] = {nn.ReLU: _RELU, nn.ELU: _ELU, nn.Tanh: _TANH}[type(module)]
            step[_ALPHA] = getattr(module, "alpha", 0.0)
        elif not isinstance(module, nn.Identity):
            raise TypeError(f"Layer {name or 'itself'} ({type(module).__name__}) has no fast forward pass.")

    def _residual(self, module: nn.Module, name: str) -> None:
        add, width, before = self.source, self.width, len(self.steps)
        self.closed = before
        self._walk(module.residual, f"{name}.residual" if name else "residual")  # type: ignore[arg-type]
        if len(self.steps) == before:
            self._step(self.width, self.width, name)
        width = self.inputs if width < 0 else width
        if width != self.width:
            raise ValueError(f"Residual block {name} turns {width} numbers into {self.width}.")
        self.steps[-1][_ADD] = add if add >= 0 else -2
        self.closed = len(self.steps)

    def _last(self, *fields: int) -> list[float] | None:
        """The last step, if these and a residual are still free."""
        if len(self.steps) <= self.closed:
            return None
        step = self.steps[-1]
        return step if all((step[f] == _NONE) if f == _ACT else step[f] == -1 for f in (*fields, _ADD)) else None

    def _fits(self, got: float, wanted: float, name: str) -> None:
        if got != wanted:
            raise ValueError(f"Layer {name} gets {int(got)} numbers instead of {int(wanted)}.")

    def _step(self, n_in: int, n_out: int, name: str) -> list[float]:
        if n_in < 0:
            raise TypeError(f"Layer {name} comes before any layer that has a width.")
        if self.inputs < 0:
            self.inputs = self.width = n_in
        self._fits(self.width, n_in, name)
        step = [-1.0] * _STEP
        step[_SOURCE], step[_TARGET], step[_IN], step[_OUT], step[_ACT] = self.source, self.columns, n_in, n_out, _NONE
        self.source, self.width, self.columns = self.columns, n_out, self.columns + n_out
        self.steps.append(step)
        return step

    def _place(self, module: nn.Module, name: str, size: int) -> int:
        """Reserve room for a parameter."""
        at = self.size
        self.sources.append((at, module, name))
        self.size += -(-size // 16) * 16  # whole cache lines
        return at

    def read(self, params: Floats) -> None:
        """Copy the parameters."""
        for at, module, name in self.sources:
            value = getattr(module, name)
            if value is None:  # layer norm without parameters
                (width,) = module.normalized_shape  # type: ignore[misc]
                params[at : at + width] = name == "weight"
                continue
            array = value.detach().cpu().numpy()
            params[at : at + array.size].reshape(array.T.shape)[...] = array.T


class FastMlp:
    """
    Forward pass of a torch module in numpy and numba; made by :func:`compile_mlp`.

    The result is a new array on every call.

    :param module: the network; its layers are read once, its parameters on every :meth:`refresh`
    """

    def __init__(self, module: nn.Module) -> None:
        self._plan = _Program(module)
        self.in_features, self.out_features = self._plan.inputs, self._plan.width
        self._program = np.array(self._plan.steps)
        raw = np.zeros(self._plan.size + 16, np.float32)
        skip = (-raw.ctypes.data % 64) // 4
        self._params = raw[skip : skip + self._plan.size]
        self._work = np.empty(self._plan.columns, np.float32)
        self._buffers: dict[int, list[Floats]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the module's parameters again: call it after each optimizer step that is to be seen."""
        self._plan.read(self._params)

    def __call__(self, x: Floats) -> Floats:
        """
        Forward pass.

        :param x: ``[B, in_features]``, float32
        :return: ``[B, out_features]``
        :raises ValueError: if the shape is another one
        """
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"Wanted [B, {self.in_features}], got {x.shape}.")
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), self.out_features), np.float32)
        if len(x) <= SMALL_BATCH:
            _forward(x, out, self._work, self._params, self._program)
        else:
            for start in range(0, len(x), CHUNK):
                self._chunk(x[start : start + CHUNK], out[start : start + CHUNK])
        return out

    def _chunk(self, x: Floats, out: Floats) -> None:
        """All layers for some rows, by BLAS."""
        steps = self._plan.steps
        buffers = self._buffers.get(len(x))
        if buffers is None:
            buffers = [np.empty((len(x), int(step[_OUT])), np.float32) for step in steps]
            self._buffers[len(x)] = buffers
        results: dict[float, Floats] = {-1.0: x, -2.0: x}
        for s, step in enumerate(steps):
            source, target = results[step[_SOURCE]], out if s == len(steps) - 1 else buffers[s]
            results[step[_TARGET]] = target
            if step[_WEIGHT] >= 0:
                at, n_in, n_out = int(step[_WEIGHT]), int(step[_IN]), int(step[_OUT])
                np.dot(source, self._params[at : at + n_in * n_out].reshape(n_in, n_out), out=target)
            _finish_rows(target, source, results[step[_ADD]], self._params, self._program, s)


def compile_mlp(module: nn.Module) -> FastMlp:
    """
    Fast forward pass of a small network on the CPU, float32, without gradients.

    Walks nested ``nn.Sequential`` of ``nn.Linear``, ``nn.LayerNorm``, ``nn.ReLU``, ``nn.ELU``, ``nn.Tanh``,
    ``nn.Identity`` and residual blocks: modules whose attribute ``residual`` is an ``nn.Sequential`` and that compute
    ``x + residual(x)``. Few rows go through a loop over the weights, many through BLAS.

    :param module: the network, in evaluation or training mode: these layers do not care
    :return: the forward pass, ``[B, in] -> [B, out]``; after a change of parameters, call its ``refresh()``
    :raises TypeError: if there is another layer, which is named
    :raises ValueError: if the widths of two layers do not fit
    """
    return FastMlp(module)
