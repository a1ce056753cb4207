"""Batched Gumbel tree search of EfficientZero V2: all roots at once; the network is a callable."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numba import njit
from numpy.typing import NDArray

Embedding = Any
"""What the network carries from step to step: an array or tensor ``[B, ...]``, or a tuple of those."""

# One row of float64 per root: _MIN to _END, then (score, alive) of each root slot, then the nodes. A node is eight
# numbers and then (prior, Q, visits, child) of each slot, so that a slot is never split over two cache lines.
_MIN, _MAX, _TOTAL, _ALIVE, _END, _CONSIDERED, _ROW = 0, 1, 2, 3, 4, 5, 8
_VALUE, _REWARD, _PARENT, _SLOT, _VISITS, _MOST, _DEPTH, _NODE = 0, 1, 2, 3, 4, 5, 6, 8
_PRIOR, _Q, _N, _CHILD, _FIELDS = 0, 1, 2, 3, 4
_TINY = 1e-300  # prior of a slot that exists but underflows: 0 means "not there"
_BAD_VALUE, _BAD_REWARD, _BAD_LOGIT, _NO_ACTION = 0, 1, 2, 3
_PROBLEMS = ("a value that is not finite", "a reward that is not finite", "a logit that is NaN or infinite")

Floats = NDArray[np.float64]


class RecurrentOutput(NamedTuple):
    """
    What the network predicts for one action per root.

    :param reward: reward of the action, ``[B]``
    :param value: value of the next state, ``[B]``, undiscounted units as the reward
    :param prior_logits: of the actions in the next state, ``[B, A2]``, ``A2 <= A``; ``-inf``: there is no such action
    :param embedding: of the next state, as the one given
    """

    reward: Any
    value: Any
    prior_logits: Any
    embedding: Embedding


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
        width = _NODE + _FIELDS * self.num_actions
        return self.data[:, _ROW + 2 * self.num_actions :].reshape(len(self.data), -1, width)

    def _slots(self, field: int) -> Floats:
        return self._nodes[:, :, _NODE + field :: _FIELDS]

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


class SearchOutput(NamedTuple):
    """
    Result of :func:`gumbel_search`.

    :param actions: best survivor of sequential halving, ``[B]``
    :param improved_policy: ``softmax(logits + sigma(completed Q))`` over all legal actions, ``[B, A]``
    :param root_values: search-based value estimation: mean of the network's value and all backed-up returns, ``[B]``
    :param visits: of the root's actions, ``[B, A]``
    :param completed_qvalues: of the root's actions, ``[B, A]``, in units of value; unvisited ones have ``v_mix``
    :param tree: the trees
    """

    actions: NDArray[np.int64]
    improved_policy: NDArray[np.float32]
    root_values: NDArray[np.float32]
    visits: NDArray[np.int32]
    completed_qvalues: NDArray[np.float32]
    tree: Tree


@njit(cache=True, error_model="numpy")
def _expand(row: Floats, base: int, logits: NDArray[np.float32], slots: int) -> int:
    """Give a node its softmax priors and untried slots; -1, or what is wrong."""
    largest = -np.inf
    for a in range(len(logits)):
        if not logits[a] < np.inf:
            return _BAD_LOGIT
        largest = max(largest, np.float64(logits[a]))
    if largest == -np.inf:
        return _NO_ACTION
    total = 0.0
    at = base + _NODE
    for a in range(slots):
        prior = 0.0
        if a < len(logits) and logits[a] > -np.inf:
            prior = math.exp(np.float64(logits[a]) - largest)
        row[at + _PRIOR], row[at + _Q], row[at + _N], row[at + _CHILD] = prior, 0.0, 0.0, 0.0
        total += prior
        at += _FIELDS
    at = base + _NODE
    for a in range(len(logits)):
        if logits[a] > -np.inf:
            row[at + _PRIOR] = max(row[at + _PRIOR] / total, _TINY)
        at += _FIELDS
    row[base + _VISITS], row[base + _MOST] = 0.0, 0.0
    return -1


@njit(cache=True, error_model="numpy")
def _mixed_value(row: Floats, base: int, slots: int) -> float:
    """v_mix of a node: its value mixed with the prior-weighted Q of visited actions."""
    visits = row[base + _VISITS]
    if visits == 0.0:
        return float(row[base + _VALUE])
    mass, weighted = 0.0, 0.0
    at = base + _NODE
    for _ in range(slots):
        if row[at + _N] > 0.0:
            mass += row[at + _PRIOR]
            weighted += row[at + _PRIOR] * row[at + _Q]
        at += _FIELDS
    visits += 1.0  # the node's own first visit
    return float((row[base + _VALUE] + visits * (weighted / mass)) / (1.0 + visits))


@njit(cache=True, error_model="numpy")
def _bounds(row: Floats, min_range: float) -> tuple[float, float]:
    """Lower end and width of normalisation; infinite width as long as nothing was backed up."""
    if row[_MAX] < row[_MIN]:
        return 0.0, np.inf
    return float(row[_MIN]), max(row[_MAX] - row[_MIN], min_range)


@njit(cache=True, error_model="numpy")
def _sigma(q: float, low: float, width: float, scale: float) -> float:
    return scale * min(max((q - low) / width, 0.0), 1.0)


@njit(cache=True, error_model="numpy")
def _inner_slot(row: Floats, base: int, slots: int, settings: Floats, scratch: Floats) -> int:
    """Action of a node below the root: argmax pi'(a) - N(a) / (1 + N(node))."""
    best, highest = 0, -np.inf
    at = base + _NODE
    if row[base + _VISITS] == 0.0:  # pi' is the prior
        for a in range(slots):
            if row[at] > highest:
                best, highest = a, row[at]
            at += _FIELDS
        return best
    scale = (settings[1] + row[base + _MOST]) * settings[2]
    low, width = _bounds(row, settings[3])
    # every untried action has the same sigma: divided by its exp, their weight is the prior
    common = _sigma(_mixed_value(row, base, slots), low, width, scale)
    total = 0.0
    for a in range(slots):
        weight = row[at + _PRIOR]
        if row[at + _N] > 0.0:
            weight *= math.exp(min(max(_sigma(row[at + _Q], low, width, scale) - common, -700.0), 700.0))
        scratch[a] = weight
        total += weight
        at += _FIELDS
    share = total / (2.0 + row[base + _VISITS])  # 1 + N(node), which counts the node's own first visit
    at = base + _NODE
    for a in range(slots):
        score = scratch[a] - row[at + _N] * share
        if row[at] > 0.0 and score > highest:
            best, highest = a, score
        at += _FIELDS
    return best


@njit(cache=True, error_model="numpy")
def _root_scores(row: Floats, slots: int, settings: Floats, scratch: Floats) -> None:
    """Gumbel + logits + sigma(completed Q) of every surviving root action."""
    base = _ROW + 2 * slots
    low, width = _bounds(row, settings[3])
    scale = (settings[1] + row[base + _MOST]) * settings[2]
    mixed = _mixed_value(row, base, slots)
    at = base + _NODE
    for a in range(slots):
        if row[_ROW + 2 * a + 1] > 0.0:
            q = row[at + _Q] if row[at + _N] > 0.0 else mixed
            scratch[a] = row[_ROW + 2 * a] + _sigma(q, low, width, scale)
        at += _FIELDS


@njit(cache=True, error_model="numpy")
def _halve(row: Floats, slots: int, simulation: int, total: int, scratch: Floats) -> None:
    """Begin the next phase: drop the worse half, keep at least two."""
    alive = row[_ALIVE]
    keep = max(alive // 2, 2.0)
    while alive > keep:
        worst = -1
        for a in range(slots):
            if row[_ROW + 2 * a + 1] > 0.0 and (worst < 0 or scratch[a] <= scratch[worst]):
                worst = a
        row[_ROW + 2 * worst + 1] = 0.0
        alive -= 1.0
    row[_ALIVE] = alive
    row[_END] = simulation + _phase(total, row[_CONSIDERED], alive)


@njit(cache=True, error_model="numpy")
def _phase(total: int, considered: float, alive: float) -> float:
    """Simulations of a phase with ``alive`` candidates; the last phase takes the rest."""
    if alive <= 2.0:
        return np.inf
    return float(max(math.floor(total / (math.log2(considered) * alive)), 1.0) * alive)


@njit(cache=True, error_model="numpy")
def _select(
    row: Floats, simulation: int, total: int, slots: int, inner: int, settings: Floats, scratch: Floats
) -> tuple[int, int]:
    """Walk down to an untried action and put the node to come behind it; its parent and slot."""
    base = _ROW + 2 * slots
    width = _NODE + _FIELDS * slots
    if row[_ALIVE] > 1.0:
        _root_scores(row, slots, settings, scratch)
        if simulation >= row[_END]:
            _halve(row, slots, simulation, total, scratch)
    slot, fewest = -1, np.inf
    for a in range(slots):
        if row[_ROW + 2 * a + 1] > 0.0:
            visits = row[base + _NODE + _FIELDS * a + _N]
            if visits < fewest or (visits == fewest and scratch[a] > scratch[slot]):
                slot, fewest = a, visits
    node = 0
    depth = 1.0
    while True:
        at = base + node * width + _NODE + _FIELDS * slot + _CHILD
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
def _plant(
    data: Floats,
    logits: NDArray[np.float32],
    values: NDArray[np.float32],
    gumbel: NDArray[np.float32],
    considered: int,
    settings: Floats,
    actions: NDArray[np.int64],
    sources: NDArray[np.int64],
) -> int:
    """Make the roots and select simulation 0; -1, or four times the row plus what is wrong."""
    slots, total = logits.shape[1], int(settings[5])
    base = _ROW + 2 * slots
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
        for a in range(slots):
            row[_ROW + 2 * a] = np.float64(gumbel[b, a]) + np.float64(logits[b, a])
            row[_ROW + 2 * a + 1] = 0.0
        alive = 0
        while alive < considered:
            best = -1
            for a in range(slots):
                free = row[_ROW + 2 * a + 1] == 0.0 and logits[b, a] > -np.inf
                if free and (best < 0 or row[_ROW + 2 * a] > row[_ROW + 2 * best]):
                    best = a
            if best < 0:
                break
            row[_ROW + 2 * best + 1] = 1.0
            alive += 1
        row[_ALIVE], row[_CONSIDERED], row[_END] = alive, alive, _phase(total, alive, alive)
        _, slot = _select(row, 0, total, slots, slots, settings, scratch)
        actions[b], sources[b] = slot, b
    return -1


@njit(cache=True, error_model="numpy")
def _step(
    data: Floats,
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    logits: NDArray[np.float32],
    simulation: int,
    settings: Floats,
    actions: NDArray[np.int64],
    sources: NDArray[np.int64],
) -> int:
    """Back up one simulation and select the next; -1, or four times the row plus what is wrong."""
    batch, gamma, slots, total = len(data), settings[0], int(settings[4]), int(settings[5])
    base, width = _ROW + 2 * slots, _NODE + _FIELDS * slots
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
            at = parent + _NODE + _FIELDS * int(row[node + _SLOT])
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
def _finish(
    data: Floats,
    settings: Floats,
    actions: NDArray[np.int64],
    policy: NDArray[np.float32],
    root_values: NDArray[np.float32],
    counts: NDArray[np.int32],
    completed: NDArray[np.float32],
) -> None:
    """Read the results off the roots."""
    slots, total = int(settings[4]), settings[5]
    base = _ROW + 2 * slots
    scratch = np.empty(slots)
    for b in range(len(data)):
        row = data[b]
        low, width = _bounds(row, settings[3])
        scale = (settings[1] + row[base + _MOST]) * settings[2]
        mixed = _mixed_value(row, base, slots)
        _root_scores(row, slots, settings, scratch)
        best = -1
        for a in range(slots):
            visited = row[base + _NODE + _FIELDS * a + _N] > 0.0
            if visited and row[_ROW + 2 * a + 1] > 0.0 and (best < 0 or scratch[a] > scratch[best]):
                best = a
        actions[b] = best
        highest, mass = -np.inf, 0.0
        at = base + _NODE
        for a in range(slots):
            counts[b, a] = np.int32(row[at + _N])
            q = row[at + _Q] if row[at + _N] > 0.0 else mixed
            completed[b, a] = q
            scratch[a] = -np.inf
            if row[at + _PRIOR] > 0.0:
                scratch[a] = math.log(row[at + _PRIOR]) + _sigma(q, low, width, scale)
            highest = max(highest, scratch[a])
            at += _FIELDS
        for a in range(slots):
            scratch[a] = math.exp(scratch[a] - highest)
            mass += scratch[a]
        for a in range(slots):
            policy[b, a] = scratch[a] / mass
        root_values[b] = row[_TOTAL] / (total + 1.0)


def _floats(x: Any) -> NDArray[np.float32]:
    """As contiguous float32 numpy."""
    if type(x) is np.ndarray and x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    if isinstance(x, th.Tensor):
        x = x.detach().cpu().numpy()
    return np.ascontiguousarray(x, np.float32)


class _Pool:
    """
    Embeddings of all nodes but the last, ``[N * B, ...]``, node by node.

    :param root: of the roots, ``[B, ...]``
    :param nodes: how many nodes
    """

    def __init__(self, root: Any, nodes: int) -> None:
        self.shape = tuple(root.shape)
        self.rows: Any
        if isinstance(root, th.Tensor):
            self.rows = root.new_empty((nodes * self.shape[0], *self.shape[1:]))
        else:
            self.rows = np.empty((nodes * self.shape[0], *self.shape[1:]), root.dtype)
            self.out = np.empty(self.shape, root.dtype)
        self.put(0, root)

    def put(self, node: int, embedding: Any) -> None:
        """Store one node of every tree."""
        if tuple(embedding.shape) != self.shape:
            raise ValueError(f"The network returned an embedding of shape {tuple(embedding.shape)}, not {self.shape}.")
        self.rows[node * self.shape[0] : (node + 1) * self.shape[0]] = embedding

    def get(self, indices: Any) -> Any:
        """One node of each tree; numpy: overwritten by the next call."""
        if isinstance(self.rows, np.ndarray):
            return self.rows.take(indices, 0, self.out, "clip")
        return self.rows.index_select(0, indices)


def gumbel_search(
    prior_logits: Any,
    values: Any,
    embedding: Embedding,
    recurrent_fn: Callable[[Any, Any], RecurrentOutput],
    *,
    num_simulations: int,
    max_num_considered_actions: int,
    gamma: float,
    gumbel: Any = None,
    invalid_actions: Any = None,
    c_visit: float = 50.0,
    c_scale: float = 0.1,
    min_range: float = 0.01,
) -> SearchOutput:
    """
    Gumbel search (Danihelka et al., 2022, https://openreview.net/forum?id=bERaNdoegnO) with the normalisation and the
    root values of EfficientZero V2 (Wang et al., 2024, https://arxiv.org/abs/2403.00564), many roots at once.

    At the root the ``m`` best of ``gumbel + logits`` share the simulations by sequential halving: a phase with ``k``
    candidates has ``max(floor(N / (log2(m) k)), 1) k`` simulations, the last one (``k <= 2``) the rest; a simulation
    goes to the candidate with the fewest visits. Below, a simulation takes ``argmax pi'(a) - N(a) / (1 + N(node))``
    with ``pi' = softmax(logits + sigma(completed Q))`` and ``sigma(q) = (c_visit + max_b N(b)) c_scale q_norm``, q
    normalised by the smallest and largest Q backed up anywhere in the tree. A node counts its own first visit. With
    fewer simulations than candidates, the result is the best of the visited ones.

    Each root's search depends on nothing but its own row, and two calls with equal arguments return equal results.

    :param prior_logits: of the root's actions, ``[B, A]``; ``-inf``: there is no such action
    :param values: the network's value of the root, ``[B]``
    :param embedding: of the root, an array or tensor ``[B, ...]``, or a tuple of those
    :param recurrent_fn: ``(embedding, actions [B]) -> RecurrentOutput``, called once per simulation with all roots.
        Actions are numbers of slots, int64: a tensor on the embedding's device, or numpy with numpy. Its arguments
        belong to the search, which may write to them later.
    :param num_simulations: N, per root
    :param max_num_considered_actions: m; rows with fewer legal actions consider those
    :param gamma: discount factor per action
    :param gumbel: Gumbel noise ``[B, A]``; None: no noise
    :param invalid_actions: actions forbidden at the root, ``[B, A]`` bool
    :param c_visit: visits added in sigma; higher: Q counts more against the prior from the first visit on
    :param c_scale: factor of sigma; higher: Q counts more against the prior
    :param min_range: smallest range of Q that is stretched to 1
    :return: results, numpy
    :raises ValueError: if a number is too small, shapes do not fit, a root has no legal action, or the network returns
        something that is not finite
    """
    for name, number in {
        "num_simulations": num_simulations,
        "max_num_considered_actions": max_num_considered_actions,
    }.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if not min_range > 0:
        raise ValueError(f"min_range must be positive, got {min_range}.")
    parts: tuple[Any, ...] = embedding if isinstance(embedding, tuple) else (embedding,)
    logits, values, noise = _root_arrays(prior_logits, values, gumbel, invalid_actions)
    batch, slots = logits.shape
    for part in parts:
        if len(part) != batch:
            raise ValueError(f"There are {batch} rows of logits, but an embedding of shape {tuple(part.shape)}.")

    data = np.empty((batch, _ROW + 2 * slots + (num_simulations + 1) * (_NODE + _FIELDS * slots)))
    settings = np.array([gamma, c_visit, c_scale, min_range, slots, num_simulations], np.float64)
    actions, sources = np.empty(batch, np.int64), np.empty(batch, np.int64)
    code = _plant(data, logits, values, noise, max_num_considered_actions, settings, actions, sources)
    if code >= 0:
        raise ValueError(_problem(code, "root"))
    pools = [_Pool(part, num_simulations) for part in parts]
    device = parts[0].device if isinstance(parts[0], th.Tensor) else None
    with contextlib.nullcontext() if device is None else th.no_grad():
        for simulation in range(num_simulations):
            where, what = _at(sources, device), _at(actions, device)
            states = [pool.get(where) for pool in pools]
            out = recurrent_fn(tuple(states) if isinstance(embedding, tuple) else states[0], what)
            if simulation + 1 < num_simulations:
                _store(pools, out.embedding, simulation + 1)
            rewards, values, logits = _network_arrays(out, batch, slots)
            code = _step(data, rewards, values, logits, simulation, settings, actions, sources)
            if code >= 0:
                raise ValueError(_problem(code, f"simulation {simulation}"))
    policy, completed = np.empty((batch, slots), np.float32), np.empty((batch, slots), np.float32)
    root_values, counts = np.empty(batch, np.float32), np.empty((batch, slots), np.int32)
    _finish(data, settings, actions, policy, root_values, counts, completed)
    return SearchOutput(actions, policy, root_values, counts, completed, Tree(data, slots))


def _root_arrays(
    prior_logits: Any, values: Any, gumbel: Any, invalid_actions: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Logits (-inf where forbidden), values and noise of the roots, checked."""
    logits, values = _floats(prior_logits), _floats(values)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"prior_logits must be [B, A], got shape {logits.shape}.")
    _check_shape("values", values, logits.shape[:1])
    noise = np.zeros_like(logits) if gumbel is None else _floats(gumbel)
    _check_shape("gumbel", noise, logits.shape)
    if not np.isfinite(noise).all():
        raise ValueError("gumbel is not finite.")
    if invalid_actions is not None:
        if isinstance(invalid_actions, th.Tensor):
            invalid_actions = invalid_actions.cpu().numpy()
        invalid = np.asarray(invalid_actions, np.bool_)
        _check_shape("invalid_actions", invalid, logits.shape)
        logits = np.where(invalid, np.float32(-np.inf), logits)
    return logits, values, noise


def _network_arrays(
    out: RecurrentOutput, batch: int, slots: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Rewards, values and logits of one simulation, shapes checked."""
    rewards, values, logits = _floats(out.reward), _floats(out.value), _floats(out.prior_logits)
    if rewards.shape != (batch,) or values.shape != (batch,):
        raise ValueError(f"The network returned rewards {rewards.shape} and values {values.shape}, not ({batch},).")
    if logits.ndim != 2 or len(logits) != batch or not 1 <= logits.shape[1] <= slots:
        raise ValueError(f"The network returned logits of shape {logits.shape}; wanted ({batch}, 1 to {slots}).")
    return rewards, values, logits


def _store(pools: list[_Pool], embedding: Embedding, node: int) -> None:
    parts = embedding if isinstance(embedding, tuple) else (embedding,)
    if len(parts) != len(pools):
        raise ValueError(f"The network returned {len(parts)} embeddings instead of {len(pools)}.")
    for pool, part in zip(pools, parts, strict=True):
        pool.put(node, part)


def principal_line(tree: Tree, row: int) -> list[int]:
    """
    The line that the search follows most: from the root, always the action with most visits, of those with best Q.

    :param tree: of a search
    :param row: which root
    :return: slots, from the root on
    """
    children, visits, qvalues = tree.children[row], tree.visits[row], tree.qvalues[row]
    node, line = 0, []
    while visits[node].any():
        slot = max(range(tree.num_actions), key=lambda a: (visits[node, a], qvalues[node, a]))
        line.append(slot)
        node = children[node, slot]
    return line


def _at(numbers: NDArray[np.int64], device: th.device | None) -> Any:
    return numbers if device is None else th.from_numpy(numbers).to(device)


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}.")


def _problem(code: int, where: str) -> str:
    """Message for what a kernel found."""
    row, problem = divmod(code, 4)
    if problem == _NO_ACTION:
        return f"Row {row} has no legal action ({where})."
    return f"The network gave {_PROBLEMS[problem]} ({where}, row {row})."
