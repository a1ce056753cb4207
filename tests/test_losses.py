"""Losses against hand-computed numbers, slow definitions, and the published transcription."""

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.utils import quantile_huber_loss as contrib_loss

from sb3_ext.losses import conservative_gap, quantile_huber_loss


def test_one_quantile_by_hand() -> None:
    # tau = 0.5; u = 3 - 1 = 2 -> huber 1.5; |0.5 - 0| * 1.5 = 0.75
    assert quantile_huber_loss(th.tensor([[1.0]]), th.tensor([[3.0]])).item() == pytest.approx(0.75)
    # u = -0.4 -> huber 0.08; |0.5 - 1| * 0.08 = 0.04
    assert quantile_huber_loss(th.tensor([[1.0]]), th.tensor([[0.6]])).item() == pytest.approx(0.04)


def test_two_quantiles_two_targets_by_hand() -> None:
    # tau = .25, .75; predictions 0 and 1; targets 0.5 and 3
    # 0: u = .5 -> .125, 3 -> 2.5: .25 * (.125 + 2.5) / 2 = .328125
    # 1: u = -.5 -> .125 * .25, 2 -> 1.5 * .75: (.03125 + 1.125) / 2 = .578125
    for method in ("sorted", "pairwise"):
        loss = quantile_huber_loss(th.tensor([[0.0, 1.0]]), th.tensor([[0.5, 3.0]]), method)
        assert loss.item() == pytest.approx(0.328125 + 0.578125)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_sorted_equals_pairwise_and_contrib(n: int, m: int, scale: float, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    current = (th.randn(3, n, generator=generator) * scale).round(decimals=1).requires_grad_()
    target = (th.randn(3, m, generator=generator) * scale).round(decimals=1)
    losses = {k: quantile_huber_loss(current, target, k) for k in ("sorted", "pairwise")}
    grads = {k: th.autograd.grad(v.sum(), current)[0] for k, v in losses.items()}
    assert th.allclose(losses["sorted"], losses["pairwise"], atol=1e-5, rtol=1e-5)
    assert th.allclose(grads["sorted"], grads["pairwise"], atol=1e-6)
    assert th.allclose(losses["sorted"].mean(), contrib_loss(current, target), atol=1e-5, rtol=1e-5)


def test_gradient_check() -> None:
    current = th.randn(2, 7, dtype=th.float64, requires_grad=True)
    target = th.randn(2, 9, dtype=th.float64) * 2
    assert th.autograd.gradcheck(lambda c: quantile_huber_loss(c, target, "sorted"), current)


def test_no_gradient_into_target() -> None:
    for method in ("sorted", "pairwise"):
        current, target = th.zeros(1, 2, requires_grad=True), th.ones(1, 2, requires_grad=True)
        quantile_huber_loss(current, target, method).sum().backward()
        assert target.grad is None
        assert current.grad is not None


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected"):
        quantile_huber_loss(th.zeros(2, 3), th.zeros(1, 3))
    with pytest.raises(ValueError, match="method"):
        quantile_huber_loss(th.zeros(2, 3), th.zeros(2, 3), "fast")


def test_gap_by_hand() -> None:
    q = th.tensor([[0.0, np.log(3.0)], [2.0, 2.0]])
    gap = conservative_gap(q, th.tensor([[1], [0]]))
    # logsumexp(0, ln 3) = ln 4, minus ln 3; ln 2
    assert gap.tolist() == pytest.approx([np.log(4 / 3), np.log(2)])


def test_gap_is_cross_entropy() -> None:
    q, a = th.randn(5, 4), th.randint(0, 4, (5,))
    assert th.allclose(conservative_gap(q, a), th.nn.functional.cross_entropy(q, a, reduction="none"))
