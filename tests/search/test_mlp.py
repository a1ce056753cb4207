"""The fast forward pass against the torch module, and decoding against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sb3_ext.search import mlp as fast
from sb3_ext.search.mlp import compile_mlp, decode
from sb3_ext.search.mlp_kernels import SMALL_BATCH

BATCHES = [1, 2, 3, 5, 7, SMALL_BATCH, SMALL_BATCH + 1, 64, fast.CHUNK + 3]


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.residual = nn.Sequential(*layers)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.residual(x)


NETWORKS = {
    "linear": lambda: nn.Linear(3, 1),
    "no bias": lambda: nn.Sequential(nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Linear(5, 601)),
    "activations": lambda: nn.Sequential(
        nn.Linear(9, 33), nn.ELU(0.7), nn.Linear(33, 17), nn.Tanh(), nn.Tanh(), nn.ELU(), nn.Linear(17, 4), nn.ReLU()
    ),
    "norms": lambda: nn.Sequential(
        nn.LayerNorm(6),
        nn.Linear(6, 20),
        nn.LayerNorm(20, eps=1e-3),
        nn.Identity(),
        nn.ReLU(),
        nn.LayerNorm(20, elementwise_affine=False),
        nn.LayerNorm(20),
    ),
    "residual": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(5, 24), nn.LayerNorm(24), nn.Tanh()),
        Residual(nn.LayerNorm(24), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)),
        Residual(nn.ELU(), Residual(nn.Linear(24, 24), nn.Tanh()), nn.LayerNorm(24)),
        nn.LayerNorm(24),
        Residual(nn.Identity()),
        nn.ReLU(),
        nn.Linear(24, 3),
    ),
    "residual first": lambda: nn.Sequential(Residual(nn.Linear(8, 8), nn.ReLU()), nn.Tanh()),
    "residual alone": lambda: Residual(nn.LayerNorm(8), nn.Linear(8, 8)),
}


def check(module: nn.Module, forward: fast.FastMlp, batch: int) -> None:
    x = np.random.default_rng(batch).normal(size=(batch, forward.in_features)).astype(np.float32) * 2
    x[:, ::3] *= x[:, ::3] > 0  # zeros, as behind a ReLU
    kept = x.copy()
    with th.no_grad():
        want = module(th.from_numpy(x)).numpy()
    got = forward(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=3e-6)
    np.testing.assert_array_equal(x, kept)
    again = forward(x[:, ::-1][:, ::-1])  # another memory layout; the first result stays
    assert again is not got
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_module(name: str) -> None:
    th.manual_seed(0)
    module = NETWORKS[name]()
    for parameter in module.parameters():
        parameter.data += 0.2 * th.randn_like(parameter)
    forward = compile_mlp(module)
    for batch in BATCHES:
        check(module, forward, batch)
    optimizer = th.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(th.randn(4, forward.in_features)).square().mean().backward()
        optimizer.step()
        forward.refresh()
        for batch in (2, 20):
            check(module, forward, batch)


def test_refresh_is_needed_and_follows_new_tensors() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    forward, x = compile_mlp(module), np.ones((1, 2), np.float32)
    before = forward(x)
    module[0].weight = nn.Parameter(th.full((2, 2), 3.0))
    np.testing.assert_array_equal(forward(x), before)
    forward.refresh()
    check(module, forward, 1)


@given(st.integers(1, 70), st.integers(1, 140), st.integers(1, 40), st.integers(0, 10**6))
def test_any_size(n_in: int, hidden: int, batch: int, seed: int) -> None:
    th.manual_seed(seed)
    module = nn.Sequential(nn.Linear(n_in, hidden), nn.ELU(), Residual(nn.Linear(hidden, hidden), nn.ReLU()))
    check(module, compile_mlp(module), batch)


def test_activations_at_their_ends() -> None:
    x = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-0.7, 0.7, 4001), [0.0, 1e-20, -1e-20, 1e30, -1e30]])
    for layer in (nn.Tanh(), nn.ELU(), nn.ReLU()):
        module = nn.Sequential(nn.Linear(1, 1), layer)
        module[0].weight.data.fill_(1)
        module[0].bias.data.zero_()
        wide = x.astype(np.float32)[:, None]
        with th.no_grad():
            want = module(th.from_numpy(wide)).numpy()
        np.testing.assert_allclose(compile_mlp(module)(wide), want, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Identity(), nn.Dropout())), r"Layer 1\.1 \(Dropout\)"),
        (Residual(nn.Linear(2, 2), nn.GELU()), r"Layer residual\.1 \(GELU\)"),
        (nn.Conv2d(1, 1, 1), r"\(Conv2d\)"),
        (nn.Sequential(nn.LayerNorm((2, 2))), r"Layer 0 \(LayerNorm\)"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "Layer 0 comes before any layer that has a width"),
        (nn.Sequential(), "has no layer to run"),
    ],
)
def test_other_layers(module: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        compile_mlp(module)


def test_widths() -> None:
    with pytest.raises(ValueError, match="Layer 1 gets 3 numbers instead of 4"):
        compile_mlp(nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match="Residual block 0 turns 2 numbers into 3"):
        compile_mlp(nn.Sequential(Residual(nn.Linear(2, 3))))
    forward = compile_mlp(nn.Linear(2, 3))
    for shape in ((2,), (1, 3)):
        with pytest.raises(ValueError, match="Wanted"):
            forward(np.zeros(shape, np.float32))


@pytest.mark.parametrize("n", [1, 2, 51, 601])
@pytest.mark.parametrize("eps", [None, 0.0, 0.001, 0.1])
def test_decode(n: int, eps: float | None) -> None:
    rng = np.random.default_rng(n)
    logits = (rng.normal(size=(40, n)) * rng.choice([0.1, 3, 40], (40, 1))).astype(np.float32)
    support = np.linspace(-20, 20, n).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    want = (weights * support).sum(1) / weights.sum(1)
    got = decode(logits, support, eps)
    if eps is not None:  # h of the result is the expectation
        x = got.astype(np.float64)
        got = np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + eps * x
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_decode_errors() -> None:
    with pytest.raises(ValueError, match=r"\[B, n\]"):
        decode(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="eps"):
        decode(np.zeros((2, 3), np.float32), np.zeros(3, np.float32), -1.0)
