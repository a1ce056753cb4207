"""Forward pass of small networks on the CPU without PyTorch's overhead per layer; the module stays the definition."""

from __future__ import annotations

import numpy as np
from torch import nn

from sb3_ext.search.mlp_kernels import ELU, RELU, STEP, TANH, Floats, expectations, forward

CHUNK = 256
"""Rows that go through all layers together, so that what one layer writes is in the cache for the next."""


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
    expectations(logits, support, -1.0 if eps is None else float(eps), out)
    return out


class _Program:
    """Steps and parameters of a network, made by walking its modules once."""

    def __init__(self, module: nn.Module) -> None:
        self.steps: list[dict[str, float]] = []
        self.sources: list[tuple[int, nn.Module, str]] = []
        self.columns, self.size, self.source, self.width = 0, 0, -1, -1
        self.inputs = -1  # width, unknown until the first layer that has one
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
            step["weight"] = self._place(module, "weight", module.in_features * module.out_features)
            if module.bias is not None:
                step["bias"] = self._place(module, "bias", module.out_features)
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            (width,) = module.normalized_shape
            # on top of a linear layer, unless that one's activation comes between
            step = self._last("scale", "act") or self._step(width, width, name)
            self._fits(step["n_out"], width, name)
            step["scale"], step["shift"] = self._place(module, "weight", width), self._place(module, "bias", width)
            step["eps"] = module.eps
        elif isinstance(module, nn.ReLU | nn.ELU | nn.Tanh):
            step = self._last("act") or self._step(self.width, self.width, name)
            step["act"] = {nn.ReLU: RELU, nn.ELU: ELU, nn.Tanh: TANH}[type(module)]
            step["alpha"] = getattr(module, "alpha", 0.0)
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
        self.steps[-1]["add"] = add if add >= 0 else -2
        self.closed = len(self.steps)

    def _last(self, *fields: str) -> dict[str, float] | None:
        """The last step, if these and a residual are still free."""
        free = len(self.steps) > self.closed and all(self.steps[-1][field] == -1 for field in (*fields, "add"))
        return self.steps[-1] if free else None

    def _fits(self, got: float, wanted: float, name: str) -> None:
        if got != wanted:
            raise ValueError(f"Layer {name} gets {got} numbers instead of {wanted}.")

    def _step(self, n_in: int, n_out: int, name: str) -> dict[str, float]:
        if n_in < 0:
            raise TypeError(f"Layer {name} comes before any layer that has a width.")
        if self.inputs < 0:
            self.inputs = self.width = n_in
        self._fits(self.width, n_in, name)
        step = dict.fromkeys(STEP.names or (), -1.0)
        step.update(source=self.source, target=self.columns, n_in=n_in, n_out=n_out)
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
        self._program = np.array([tuple(step.values()) for step in self._plan.steps], STEP)
        raw = np.zeros(self._plan.size + 16, np.float32)
        skip = (-raw.ctypes.data % 64) // 4
        self._params = raw[skip : skip + self._plan.size]
        self._work = np.empty(self._plan.columns, np.float32)
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
        rows = min(len(x), CHUNK)
        if len(self._work) < rows * self._plan.columns:
            self._work = np.empty(rows * self._plan.columns, np.float32)
        for start in range(0, len(x), CHUNK):
            forward(x[start : start + CHUNK], out[start : start + CHUNK], self._work, self._params, self._program)
        return out


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
