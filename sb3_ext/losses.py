"""Per-sample losses. Nothing here is reduced over the batch: that is done in ``off_policy.py`` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch.nn import functional as F


class _SortedQuantileHuber(th.autograd.Function):
    """
    Exact quantile Huber loss and gradient in O(N log M).

    For one predicted quantile the sum over targets splits at three places of the sorted targets (theta - 1, theta,
    theta + 1); each part is a polynomial in theta whose coefficients are prefix sums over targets and their squares.
    """

    @staticmethod
    def forward(ctx: Any, current: th.Tensor, target: th.Tensor) -> th.Tensor:
        n, m = current.shape[1], target.shape[1]
        theta = current.detach().double()
        y = target.detach().double().sort(dim=1).values
        sums = F.pad(y.cumsum(1), (1, 0))
        squares = F.pad((y * y).cumsum(1), (1, 0))
        # targets below theta - 1, in [theta - 1, theta), in [theta, theta + 1], above
        cuts = th.searchsorted(y, th.cat([theta - 1, theta], dim=1))
        cuts = th.cat([cuts, th.searchsorted(y, theta + 1, right=True)], dim=1)
        low, mid, high = cuts.chunk(3, dim=1)
        sum_low, sum_mid, sum_high = sums.gather(1, cuts).chunk(3, dim=1)
        sq_low, sq_mid, sq_high = squares.gather(1, cuts).chunk(3, dim=1)

        n_low, n_mid, n_high = low.double(), (mid - low).double(), (high - mid).double()
        n_top = m - high.double()
        below = (theta - 0.5) * n_low - sum_low
        below += 0.5 * (sq_mid - sq_low) - theta * (sum_mid - sum_low) + 0.5 * theta * theta * n_mid
        above = sums[:, -1:] - sum_high - (theta + 0.5) * n_top
        above += 0.5 * (sq_high - sq_mid) - theta * (sum_high - sum_mid) + 0.5 * theta * theta * n_high
        slope_below = n_low + theta * n_mid - (sum_mid - sum_low)
        slope_above = theta * n_high - (sum_high - sum_mid) - n_top

        tau = _midpoints(n, theta)
        ctx.save_for_backward((((1 - tau) * slope_below + tau * slope_above) / m).to(current.dtype))
        return (((1 - tau) * below + tau * above) / m).sum(1).to(current.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad_output[:, None], None


def _midpoints(n: int, like: th.Tensor) -> th.Tensor:
    return (th.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n


def _pairwise_quantile_huber(current: th.Tensor, target: th.Tensor) -> th.Tensor:
    delta = target[:, None, :] - current[:, :, None]
    huber = th.where(delta.abs() > 1, delta.abs() - 0.5, 0.5 * delta * delta)
    weight = (_midpoints(current.shape[1], current)[None, :, None] - (delta.detach() < 0).to(current.dtype)).abs()
    return (weight * huber).mean(2).sum(1)


def quantile_huber_loss(current: th.Tensor, target: th.Tensor, method: str = "auto") -> th.Tensor:
    """
    Per-sample quantile Huber loss of QR-DQN (Dabney et al., 2018, https://arxiv.org/abs/1710.10044, eq. 10), kappa = 1.

    Summed over predicted and averaged over target quantiles; not reduced over the batch, so that callers can weight
    samples.

    :param current: predicted quantiles of the taken action, ``[B, N]``, in units of (scaled) return
    :param target: target quantiles, ``[B, M]``; no gradient flows into it
    :param method: ``"sorted"`` (O(N log M), float64 inside, fast on a CPU), ``"pairwise"`` (the N x M matrix), or
        ``"auto"``: sorted on a CPU, pairwise elsewhere
    :return: loss, ``[B]``
    :raises ValueError: if the batch sizes differ or the method is unknown
    """
    if current.ndim != 2 or target.ndim != 2 or current.shape[0] != target.shape[0]:
        raise ValueError(f"Expected [B, N] and [B, M], got {tuple(current.shape)} and {tuple(target.shape)}.")
    if method not in ("auto", "sorted", "pairwise"):
        raise ValueError(f"method must be 'auto', 'sorted' or 'pairwise', not {method!r}.")
    if method == "auto":
        method = "sorted" if current.device.type == "cpu" else "pairwise"
    if method == "sorted":
        loss: th.Tensor = _SortedQuantileHuber.apply(current, target)
        return loss
    return _pairwise_quantile_huber(current, target.detach())


def conservative_gap(q_values: th.Tensor, actions: th.Tensor, floor: th.Tensor | None = None) -> th.Tensor:
    """
    Per-sample CQL(H) term (Kumar et al., 2020, https://arxiv.org/abs/2006.04779, eq. 4).

    ``logsumexp_a Q(s, a) - Q(s, a_data)``: pushes all values down, weighted by their softmax, and the data's action up.
    The negative log-likelihood of the data's action under a softmax policy over Q; hence also behaviour cloning's loss.

    :param q_values: ``[B, A]``; for QR-DQN the mean over quantiles
    :param actions: actions of the dataset, ``[B]`` or ``[B, 1]``
    :param floor: values are not pushed below it, ``[B, 1]``: the return that the data got from there on calibrates them
        (Nakamoto et al., 2023, https://arxiv.org/abs/2303.05479, eq. 4.1)
    :return: gap, ``[B]``; without a floor not negative
    """
    pushed = q_values if floor is None else th.maximum(q_values, floor)
    return th.logsumexp(pushed, dim=1) - q_values.gather(1, actions.long().reshape(-1, 1)).squeeze(1)


def sampled_conservative_gap(q_values: th.Tensor, log_density: th.Tensor, q_data: th.Tensor) -> th.Tensor:
    """
    Per-sample CQL(H) term of continuous actions, with importance sampling (Kumar et al., 2020, appendix F).

    ``log sum_n exp(Q(s, a_n) - log p(a_n)) - Q(s, a_data)``, with the sum over samples where the paper has their mean:
    that is a constant.

    :param q_values: of sampled actions, ``[..., B, N]``
    :param log_density: logarithm of the density that each action was drawn with, ``[B, N]``
    :param q_data: of the data's actions, ``[..., B]``
    :return: gap, ``[..., B]``
    """
    return th.logsumexp(q_values - log_density, dim=-1) - q_data


TRANSFORM_EPS = 1e-3
"""Slope of the value transform far out."""


def value_transform(x: th.Tensor, eps: float = TRANSFORM_EPS) -> th.Tensor:
    """
    Compress returns: ``h(x) = sign(x) (sqrt(|x| + 1) - 1) + eps x`` (Pohlen et al., 2018,
    https://arxiv.org/abs/1805.11593, proposition A.2). ``eps`` is the slope far out; it keeps the inverse Lipschitz.
    """
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + eps * x


def inverse_value_transform(x: th.Tensor, eps: float = TRANSFORM_EPS) -> th.Tensor:
    """Inverse of :func:`value_transform` for a positive ``eps``, written without cancellation."""
    z = 4 * eps * (x.abs() + 1 + eps)
    root = z / ((1 + z).sqrt() + 1) / (2 * eps)
    return x.sign() * (root * root - 1)


def two_hot(x: th.Tensor, support: th.Tensor) -> th.Tensor:
    """
    Categorical target whose expectation is x: probability on the two neighbouring bins (Schrittwieser et al., 2020,
    https://arxiv.org/abs/1911.08265, appendix F).

    :param x: places on the support, ``[...]``; clipped to its ends
    :param support: evenly spaced, ascending bins, ``[N]``
    :return: probabilities, ``[..., N]``
    """
    place = ((x - support[0]) / (support[1] - support[0])).clamp(0, len(support) - 1)
    low = place.floor().clamp(max=len(support) - 2)
    share = (place - low).unsqueeze(-1)
    target = th.zeros(*x.shape, len(support), device=x.device, dtype=share.dtype)
    index = low.long().unsqueeze(-1)
    return target.scatter_(-1, index, 1 - share).scatter_(-1, index + 1, share)


def cross_entropy(logits: th.Tensor, target: th.Tensor) -> th.Tensor:
    """Cross entropy of logits ``[..., N]`` against probabilities ``[..., N]``, which get no gradient: ``[...]``."""
    return -(target.detach() * F.log_softmax(logits, dim=-1)).sum(-1)


def negative_cosine(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Per-sample SimSiam loss (Chen and He, 2021, https://arxiv.org/abs/2011.10566, eq. 1).

    ``[B, D]`` -> ``[B]``, from -1 (same direction) to 1; no gradient flows into the target.
    """
    return -F.cosine_similarity(prediction, target.detach(), dim=-1)


class LossOutput(NamedTuple):
    """What a loss function returns."""

    loss: th.Tensor  # per sample, [B]
    td_error: th.Tensor  # temporal-difference error per sample, [B]; its absolute value becomes the priority
    metrics: dict[str, th.Tensor]  # further scalars to log, detached, 0-dim
    # sets the parameters' gradients of the mean of weights * loss, given weights [B] or None; None: autograd does it
    backward: Callable[[th.Tensor | None], None] | None = None
