"""Trees of the Gumbel search as arrays, and the compiled steps on them: no network, no randomness."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sb3_ext.search import halving
from sb3_ext.search.halving import CANDIDATES, FIXED, IN, PAIR, Floats, Ints, Singles

# One row of float64 per root: _MIN to _TOTAL, what halving.py keeps, then the nodes. A node is eight numbers and then
# (prior, Q, visits, child) of each slot, so that a slot is never split over two cache lines.
_MIN, _MAX, _TOTAL = 0, 1, 2
_VALUE, _REWARD, _PARENT, _SLOT, _VISITS, _MOST, _DEPTH, NODE = 0, 1, 2, 3, 4, 5, 6, 8
_PRIOR, _Q, _N, _CHILD, FIELDS = 0, 1, 2, 3, 4
# The settings of the kernels, float64: gamma, c_visit, c_scale, min_range, slots, simulations, considered actions.
_TINY = 1e-300  # prior of a slot that exists but underflows: 0 means "not there"
_BAD_VALUE, _BAD_REWARD, _BAD_LOGIT, NO_ACTION = 0, 1, 2, 3
PROBLEMS = ("a value that is not finite", "a reward that is not finite", "a logit that is NaN or infinite")


class Tree(NamedTuple):
    """
    Search trees of all roots. Node 0 is the root, node ``i`` was added by simulation ``i``; ``-1`` is "none".

    :param data: everything, packed, ``[B, ...]``; read it through the properties
    :param num_actions: slots per node
    """

    data: Floats
    num_actions: int

    @property
    def _nodes(self) -> Floats:
        width = NODE + FIELDS * self.num_actions
        return self.data[:, CANDIDATES + PAIR * self.num_actions :].reshape(len(self.data), -1, width)

    def _slots(self, field: int) -> Floats:
        return self._nodes[:, :, NODE + field :: FIELDS]

    @property
    def parents(self) -> NDArray[np.int64]:
        """Node above, ``[B, N + 1]``; -1 above the root."""
        return self._nodes[:, :, _PARENT].astype(np.int64)

    @property
    def parent_slots(self) -> NDArray[np.int64]:
        """Action that leads to the node, ``[B, N + 1]``; -1 for the root."""
        return self._nodes[:, :, _SLOT].astype(np.int64)

    @property
    def depths(self) -> NDArray[np.int64]:
        """Actions between root and node, ``[B, N + 1]``."""
        return self._nodes[:, :, _DEPTH].astype(np.int64)

    @property
    def values(self) -> Floats:
        """The network's value of each node, ``[B, N + 1]``."""
        return self._nodes[:, :, _VALUE]

    @property
    def rewards(self) -> Floats:
        """Reward on the way to each node, ``[B, N + 1]``; 0 for the root."""
        return self._nodes[:, :, _REWARD]

    @property
    def children(self) -> NDArray[np.int64]:
        """Node behind each action, ``[B, N + 1, A]``; -1 where nothing was tried."""
        found = self._slots(_CHILD).astype(np.int64)
        return np.where(found > 0, found, -1)

    @property
    def visits(self) -> NDArray[np.int64]:
        """Simulations through each action, ``[B, N + 1, A]``."""
        return self._slots(_N).astype(np.int64)

    @property
    def qvalues(self) -> Floats:
        """Mean return of each action, ``[B, N + 1, A]``; 0 where nothing was tried."""
        return self._slots(_Q)

    @property
    def prior(self) -> Floats:
        """The network's probability of each action, ``[B, N + 1, A]``; 0 where there is no action."""
        return self._slots(_PRIOR)


@njit(cache=True, error_model="numpy")
def _expand(row: Floats, base: int, logits: Singles, slots: int) -> int:
    """Give a node its softmax priors and untried slots; -1, or what is wrong."""
    largest = -np.inf
    for a in range(len(logits)):
        if not logits[a] < np.inf:
            return _BAD_LOGIT
        largest = max(largest, np.float64(logits[a]))
    if largest == -np.inf:
        return NO_ACTION
    at, total = base + NODE, 0.0
    for a in range(slots):
        prior = 0.0
        if a < len(logits) and logits[a] > -np.inf:
            prior = math.exp(np.float64(logits[a]) - largest)
        row[at + _PRIOR], row[at + _Q], row[at + _N], row[at + _CHILD] = prior, 0.0, 0.0, 0.0
        total += prior
        at += FIELDS
    at, share = base + NODE, 1.0 / total
    for a in range(len(logits)):
        if logits[a] > -np.inf:
            row[at + _PRIOR] = max(row[at + _PRIOR] * share, _TINY)
        at += FIELDS
    row[base + _VISITS], row[base + _MOST] = 0.0, 0.0
    return -1


@njit(cache=True, error_model="numpy")
def _mixed_value(row: Floats, base: int, slots: int) -> float:
    """v_mix of a node: its value mixed with the prior-weighted Q of visited actions."""
    visits = row[base + _VISITS]
    if visits == 0.0:
        return float(row[base + _VALUE])
    at, mass, weighted = base + NODE, 0.0, 0.0
    for _ in range(slots):
        if row[at + _N] > 0.0:
            mass += row[at + _PRIOR]
            weighted += row[at + _PRIOR] * row[at + _Q]
        at += FIELDS
    visits += 1.0  # the node's own first visit
    return float((row[base + _VALUE] + visits * (weighted / mass)) / (1.0 + visits))


@njit(cache=True, error_model="numpy")
def _bounds(row: Floats, min_range: float) -> tuple[float, float]:
    """Lower end and inverse width of normalisation; 0 as long as nothing was backed up."""
    if row[_MAX] < row[_MIN]:
        return 0.0, 0.0
    return float(row[_MIN]), 1.0 / max(row[_MAX] - row[_MIN], min_range)


@njit(cache=True, error_model="numpy")
def _sigma(q: float, low: float, per: float, scale: float) -> float:
    return scale * min(max((q - low) * per, 0.0), 1.0)


@njit(cache=True, error_model="numpy")
def _inner_slot(row: Floats, base: int, slots: int, settings: Floats, scratch: Floats) -> int:
    """Action of a node below the root: argmax pi'(a) - N(a) / (1 + N(node))."""
    at, best, highest = base + NODE, 0, -np.inf
    if row[base + _VISITS] == 0.0:  # pi' is the prior
        for a in range(slots):
            if row[at] > highest:
                best, highest = a, row[at]
            at += FIELDS
        return best
    scale = (settings[1] + row[base + _MOST]) * settings[2]
    low, per = _bounds(row, settings[3])
    # every untried action has the same sigma: divided by its exp, their weight is the prior
    common = _sigma(_mixed_value(row, base, slots), low, per, scale)
    total = 0.0
    for a in range(slots):
        weight = row[at + _PRIOR]
        if row[at + _N] > 0.0:
            weight *= math.exp(min(max(_sigma(row[at + _Q], low, per, scale) - common, -700.0), 700.0))
        scratch[a] = weight
        total += weight
        at += FIELDS
    share = total / (2.0 + row[base + _VISITS])  # 1 + N(node), which counts the node's own first visit
    at = base + NODE
    for a in range(slots):
        score = scratch[a] - row[at + _N] * share
        if row[at] > 0.0 and score > highest:
            best, highest = a, score
        at += FIELDS
    return best


@njit(cache=True, error_model="numpy")
def _root_scores(row: Floats, slots: int, settings: Floats, scratch: Floats) -> None:
    """Gumbel + logits + sigma(completed Q) of every surviving root action."""
    base = CANDIDATES + PAIR * slots
    low, per = _bounds(row, settings[3])
    scale = (settings[1] + row[base + _MOST]) * settings[2]
    mixed = _mixed_value(row, base, slots)
    at = base + NODE
    for a in range(slots):
        if row[CANDIDATES + PAIR * a + IN] > 0.0:
            q = row[at + _Q] if row[at + _N] > 0.0 else mixed
            scratch[a] = row[CANDIDATES + PAIR * a + FIXED] + _sigma(q, low, per, scale)
        at += FIELDS


@njit(cache=True, error_model="numpy")
def _search_based_value(row: Floats, total: float) -> float:
    """
    Search-based value estimation (Wang et al., 2024, https://arxiv.org/abs/2403.00564): ``(v(s_0) + sum_n G_n) /
    (N + 1)`` with the return ``G_n = sum_{t < d} gamma^t r_t + gamma^d v(s_d)`` along the path of simulation n, whose
    new node lies d actions below the root.
    """
    return float(row[_TOTAL] / (total + 1.0))


@njit(cache=True, error_model="numpy")
def _select(
    row: Floats, simulation: int, total: int, slots: int, inner: int, settings: Floats, scratch: Floats
) -> tuple[int, int]:
    """Walk down to an untried action and put the node to come behind it; its parent and slot."""
    base = CANDIDATES + PAIR * slots
    width = NODE + FIELDS * slots
    if not halving.is_decided(row):
        _root_scores(row, slots, settings, scratch)
    slot = halving.next_candidate(row, slots, base + NODE + _N, FIELDS, simulation, total, scratch)
    node, depth = 0, 1.0
    while True:
        at = base + node * width + NODE + FIELDS * slot + _CHILD
        child = int(row[at])
        if child == 0:
            break
        node = child
        slot = _inner_slot(row, base + node * width, inner, settings, scratch)
        depth += 1.0
    row[at] = simulation + 1.0
    leaf = base + (simulation + 1) * width
    row[leaf + _PARENT], row[leaf + _SLOT], row[leaf + _DEPTH] = node, slot, depth
    return node, slot


@njit(cache=True, error_model="numpy")
def plant(
    data: Floats, logits: Singles, values: Singles, gumbel: Singles, settings: Floats, actions: Ints, sources: Ints
) -> int:
    """Make the roots and select simulation 0; -1, or four times the row plus what is wrong."""
    slots, total, considered = logits.shape[1], int(settings[5]), int(settings[6])
    base = CANDIDATES + PAIR * slots
    scratch = np.empty(slots)
    for b in range(len(data)):
        row = data[b]
        if not np.isfinite(values[b]):
            return 4 * b + _BAD_VALUE
        problem = _expand(row, base, logits[b], slots)
        if problem >= 0:
            return 4 * b + problem
        row[_MIN], row[_MAX], row[_TOTAL] = np.inf, -np.inf, values[b]
        row[base + _VALUE], row[base + _REWARD], row[base + _DEPTH] = values[b], 0.0, 0.0
        row[base + _PARENT], row[base + _SLOT] = -1.0, -1.0
        halving.begin(row, gumbel[b], logits[b], considered, total)
        _, slot = _select(row, 0, total, slots, slots, settings, scratch)
        actions[b], sources[b] = slot, b
    return -1


@njit(cache=True, error_model="numpy")
def step(
    data: Floats,
    rewards: Singles,
    values: Singles,
    logits: Singles,
    simulation: int,
    settings: Floats,
    actions: Ints,
    sources: Ints,
) -> int:
    """Back up one simulation and select the next; -1, or four times the row plus what is wrong."""
    batch, gamma, slots, total = len(data), settings[0], int(settings[4]), int(settings[5])
    base, width = CANDIDATES + PAIR * slots, NODE + FIELDS * slots
    scratch = np.empty(slots)
    for b in range(batch):
        row = data[b]
        if not np.isfinite(values[b]):
            return 4 * b + _BAD_VALUE
        if not np.isfinite(rewards[b]):
            return 4 * b + _BAD_REWARD
        node = base + (simulation + 1) * width
        problem = _expand(row, node, logits[b], slots)
        if problem >= 0:
            return 4 * b + problem
        row[node + _VALUE], row[node + _REWARD] = values[b], rewards[b]
        value = np.float64(values[b])
        low, high = row[_MIN], row[_MAX]
        while node != base:
            value = row[node + _REWARD] + gamma * value
            parent = base + int(row[node + _PARENT]) * width
            at = parent + NODE + FIELDS * int(row[node + _SLOT])
            visits = row[at + _N] + 1.0
            q = row[at + _Q] + (value - row[at + _Q]) / visits
            row[at + _N], row[at + _Q] = visits, q
            row[parent + _VISITS] += 1.0
            row[parent + _MOST] = max(row[parent + _MOST], visits)
            low, high = min(low, q), max(high, q)
            node = parent
        row[_MIN], row[_MAX] = low, high
        row[_TOTAL] += value
        if simulation + 1 < total:
            source, slot = _select(row, simulation + 1, total, slots, logits.shape[1], settings, scratch)
            actions[b], sources[b] = slot, source * batch + b
    return -1


@njit(cache=True, error_model="numpy")
def finish(data: Floats, settings: Floats) -> tuple[Ints, Singles, Singles, NDArray[np.int32], Singles]:
    """Read the results off the roots: actions, improved policy, values, visits, completed Q."""
    batch, slots, total = len(data), int(settings[4]), settings[5]
    base = CANDIDATES + PAIR * slots
    scratch, actions, root_values = np.empty(slots), np.empty(batch, np.int64), np.empty(batch, np.float32)
    policy, completed = np.empty((batch, slots), np.float32), np.empty((batch, slots), np.float32)
    visits = np.empty((batch, slots), np.int32)
    for b in range(batch):
        row = data[b]
        low, per = _bounds(row, settings[3])
        scale = (settings[1] + row[base + _MOST]) * settings[2]
        mixed = _mixed_value(row, base, slots)
        _root_scores(row, slots, settings, scratch)
        actions[b] = halving.best_candidate(row, slots, base + NODE + _N, FIELDS, scratch)
        at, highest, mass = base + NODE, -np.inf, 0.0
        for a in range(slots):
            visits[b, a] = np.int32(row[at + _N])
            q = row[at + _Q] if row[at + _N] > 0.0 else mixed
            completed[b, a] = q
            scratch[a] = -np.inf
            if row[at + _PRIOR] > 0.0:
                scratch[a] = math.log(row[at + _PRIOR]) + _sigma(q, low, per, scale)
            highest = max(highest, scratch[a])
            at += FIELDS
        for a in range(slots):
            scratch[a] = math.exp(scratch[a] - highest)
            mass += scratch[a]
        for a in range(slots):
            policy[b, a] = scratch[a] / mass
        root_values[b] = _search_based_value(row, total)
    return actions, policy, root_values, visits, completed
