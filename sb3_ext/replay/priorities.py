"""Prioritized sampling (Schaul et al., 2016): which items to draw, and how to weight them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from sb3_ext.replay.sum_tree import SumTree

_SORT_EVERY = 0.1
"""Share of the sorted items whose errors may change before they are sorted anew; on the blind cliffwalk as good as a
heap."""


@njit(cache=True)
def _importance(priorities: NDArray[np.float64], beta: float) -> NDArray[np.float32]:
    """``(N P)^-beta`` divided by its largest: number of items and total cancel."""
    smallest = priorities.min()
    weights = np.empty(len(priorities), np.float32)
    for i in range(len(priorities)):
        weights[i] = (smallest / priorities[i]) ** beta
    return weights


@njit(cache=True)
def _proportional(td_errors: NDArray[np.float64], eps: float, alpha: float, powers: NDArray[np.float64]) -> float:
    """``(|td_error| + eps)^alpha``; returns the largest before the power."""
    largest = 0.0
    for i in range(len(td_errors)):
        priority = abs(td_errors[i]) + eps
        largest = max(largest, priority)
        powers[i] = priority**alpha
    return largest


class Priorities:
    """
    Priorities of a fixed number of items: Prioritized Experience Replay (https://arxiv.org/abs/1511.05952).

    Item i is drawn with probability ``P(i) = p_i^alpha / sum_k p_k^alpha`` (eq. 1), where ``p_i = |td_error| + eps``
    (proportional variant) or ``1 / rank(i)`` (rank-based variant, section 3.3). An item is unknown, and never drawn,
    until :meth:`activate`; then it has the largest priority seen so far, 1 at first (algorithm 1, line 6).

    Unlike the paper, the rank of a changed item is looked up in the order of the last sorting, instead of in a heap.

    :param capacity: number of items
    :param alpha: how much errors decide; 0 draws uniformly, 1 in proportion
    :param beta: exponent of the importance weights at the start, or a function of the remaining progress (1 to 0)
    :param final_beta: exponent at the end of the run, reached linearly; ignored if ``beta`` is a function
    :param eps: added to every error, so that items of error 0 are still drawn now and then; higher is more uniform
    :param rank_based: use ranks instead of errors: blind to outliers and to the errors' scale
    :param stratified: one draw from each of B equal parts of the distribution: same probabilities, less variance
    :param seed: seed of the draws; None takes it from numpy's global generator, which SB3 seeds
    :raises ValueError: if a number is out of range
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.6,
        beta: float | Callable[[float], float] = 0.4,
        final_beta: float = 1.0,
        eps: float = 1e-6,
        rank_based: bool = False,
        stratified: bool = True,
        seed: int | None = None,
    ) -> None:
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha must be finite and not negative, got {alpha}.")
        if not 0 < eps < np.inf:
            raise ValueError(f"eps must be positive, or items of error 0 would never be drawn again; got {eps}.")
        for name, value in (("beta", beta), ("final_beta", final_beta)):
            if not callable(value) and not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}.")
        self.tree = SumTree(capacity)
        self.alpha, self.beta, self.final_beta, self.eps = alpha, beta, final_beta, eps
        self.rank_based, self.stratified = rank_based, stratified
        self.rng = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)
        self.max_priority = 1.0
        self.set_progress(1.0)
        if rank_based:
            self._errors = np.zeros(capacity)
            self._order = np.empty(0)
            self._changed = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments but the seed, for another buffer of the same kind."""
        names = ("alpha", "beta", "final_beta", "eps", "rank_based", "stratified")
        return {name: getattr(self, name) for name in names}

    def set_progress(self, remaining: float) -> None:
        """Anneal beta: ``remaining`` of the run is left, 1 to 0."""
        if callable(self.beta):
            self.current_beta = float(self.beta(remaining))
        else:
            self.current_beta = self.final_beta + (self.beta - self.final_beta) * remaining

    def draw(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """
        Draw B items with replacement: indices, and importance weights ``(N P(i))^-beta`` over the batch's largest.

        :raises ValueError: if no item is active
        """
        indices, mass = self.tree.sample(n, self.rng, self.stratified)
        return indices, _importance(mass, self.current_beta)

    def activate(self, indices: ArrayLike) -> None:
        """Make items drawable, with the largest priority."""
        indices = np.asarray(indices)
        if self.rank_based:
            self._errors[indices] = self.max_priority
        power = 1.0 if self.rank_based else self.max_priority**self.alpha
        self.tree.update(indices, np.full(indices.shape, power))

    def activate_range(self, first: int, count: int) -> None:
        """Make ``count`` neighbours drawable, as :meth:`activate` does."""
        if self.rank_based:
            self._errors[first : first + count] = self.max_priority
        self.tree.fill(first, count, 1.0 if self.rank_based else self.max_priority**self.alpha)

    def deactivate(self, indices: ArrayLike) -> None:
        """Keep items from being drawn until they are activated again."""
        self.tree.update(indices, np.zeros(np.shape(indices)))

    def update(self, indices: ArrayLike, td_errors: ArrayLike) -> None:
        """
        Set priorities by errors of any sign. Inactive items stay so; of an index that occurs twice the last counts.

        :raises ValueError: if an error is NaN or infinite: names the index; nothing is changed then
        """
        errors = np.ascontiguousarray(td_errors, np.float64).reshape(-1)
        if not self.rank_based:
            powers = np.empty(len(errors))
            largest = _proportional(errors, self.eps, self.alpha, powers)
            self.tree.update(indices, powers, revive=False)
        else:
            priorities = np.abs(errors) + self.eps
            largest = float(priorities.max(initial=0))
            # ranks from the order of the last sorting; 1 is the largest
            later = len(self._order) - np.searchsorted(self._order, priorities, side="right")
            ranks = np.where(np.isfinite(priorities), later + 1.0, np.nan)
            self.tree.update(indices, ranks**-self.alpha, revive=False)
            self._errors[np.asarray(indices)] = priorities
            self._changed += len(priorities)
            if self._changed > _SORT_EVERY * len(self._order):
                self._sort()
        self.max_priority = max(self.max_priority, largest)

    def _sort(self) -> None:
        active = np.flatnonzero(self.tree.leaves)
        order = np.argsort(self._errors[active], kind="stable")
        self._order = self._errors[active][order]
        ranks = np.empty(len(active))
        ranks[order] = np.arange(len(active), 0, -1)
        self.tree.update(active, ranks**-self.alpha)
        self._changed = 0
