"""Batched Gumbel tree search of EfficientZero V2: all roots at once; the network is a callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.search.halving import CANDIDATES, PAIR, Floats, Singles
from sb3_ext.search.tree import FIELDS, NO_ACTION, NODE, PROBLEMS, Tree, finish, plant, step

__all__ = ["Embedding", "RecurrentOutput", "SearchOutput", "Tree", "gumbel_search", "principal_line"]

Embedding = Any
"""What the network carries from step to step: an array or tensor ``[B, ...]``, or a tuple of those."""


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


class Lane(Protocol):
    """Some of the roots; a device runs their network steps, with all embeddings, while the search steps other lanes."""

    rows: slice
    """Which roots, one after the other."""

    def launch(self, sources: NDArray[np.int64], actions: NDArray[np.int64]) -> None:
        """
        Begin a step of the network.

        :param sources: where to start from, ``node * b + root`` for the lane's b roots, ``[b]``
        :param actions: slots, ``[b]``
        """
        ...

    def collect(self) -> RecurrentOutput:
        """Wait for the step; its embedding stays where it is."""
        ...


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

    @property
    def improved_values(self) -> NDArray[np.float32]:
        """
        Value of the root under the improved policy, ``sum_a pi'(a) Q(a)`` with completed Q, ``[B]``.

        Sequential halving visits actions to compare them; ``root_values`` counts each of these visits, this value only
        as much as the improved policy would take the action.
        """
        legal = self.improved_policy > 0
        values = (self.improved_policy * np.where(legal, self.completed_qvalues, 0)).sum(1)
        return np.asarray(values, np.float32)


def _floats(x: Any) -> Singles:
    """As contiguous float32 numpy."""
    if type(x) is np.ndarray and x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    if isinstance(x, th.Tensor):
        x = x.detach().cpu().numpy()
    return np.ascontiguousarray(x, np.float32)


class _Pool:
    """Embeddings of all nodes but the last, ``[N * B, ...]``, node by node, beginning with those of the roots."""

    def __init__(self, root: Any, nodes: int) -> None:
        self.shape = tuple(root.shape)
        size = nodes * self.shape[0], *self.shape[1:]
        self.rows: Any = root.new_empty(size) if isinstance(root, th.Tensor) else np.empty(size, root.dtype)
        self.out = None if isinstance(root, th.Tensor) else np.empty(self.shape, root.dtype)
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


class _Called:
    """A lane of the roots ``rows`` that is a callable, which is run when its step is launched."""

    def __init__(
        self, embedding: Embedding, recurrent_fn: Callable[[Any, Any], RecurrentOutput], nodes: int, rows: slice
    ) -> None:
        parts = _parts(embedding)
        self._function, self._several, self.rows = recurrent_fn, isinstance(embedding, tuple), rows
        self._pools = [_Pool(part[rows], nodes) for part in parts]
        self._nodes, self._node = nodes, 0
        self._device = parts[0].device if isinstance(parts[0], th.Tensor) else None
        self._out: RecurrentOutput

    def launch(self, sources: NDArray[np.int64], actions: NDArray[np.int64]) -> None:
        """See :class:`Lane`."""
        if self._device is None:
            self._run(sources, actions)
        else:
            with th.no_grad():
                self._run(*(th.from_numpy(x).to(self._device) for x in (sources, actions)))

    def _run(self, where: Any, what: Any) -> None:
        states = [pool.get(where) for pool in self._pools]
        self._out = self._function(tuple(states) if self._several else states[0], what)
        self._node += 1
        if self._node == self._nodes:
            return  # nothing starts from the last node
        parts = _parts(self._out.embedding)
        if len(parts) != len(self._pools):
            raise ValueError(f"The network returned {len(parts)} embeddings instead of {len(self._pools)}.")
        for pool, part in zip(self._pools, parts, strict=True):
            pool.put(self._node, part)

    def collect(self) -> RecurrentOutput:
        """See :class:`Lane`."""
        return self._out


def gumbel_search(
    prior_logits: Any,
    values: Any,
    embedding: Embedding,
    recurrent_fn: Callable[[Any, Any], RecurrentOutput] | Sequence[Lane],
    *,
    num_simulations: int,
    max_num_considered_actions: int,
    gamma: float,
    gumbel: Any = None,
    invalid_actions: Any = None,
    roots_at_once: int | None = None,
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
    :param embedding: of the root, an array or tensor ``[B, ...]``, or a tuple of those; with lanes not looked at
    :param recurrent_fn: ``(embedding, actions [B]) -> RecurrentOutput``, called once per simulation with all roots, or
        with ``roots_at_once`` of them. Actions are numbers of slots, int64: a tensor on the embedding's device, or
        numpy with numpy. Its arguments belong to the search, which may write to them later. Or lanes that together hold
        all roots, in order.
    :param num_simulations: N, per root
    :param max_num_considered_actions: m; rows with fewer legal actions consider those
    :param gamma: discount factor per action
    :param gumbel: Gumbel noise ``[B, A]``; None: no noise
    :param invalid_actions: actions forbidden at the root, ``[B, A]`` bool
    :param roots_at_once: search so many roots to the end before the next ones, so that what the search wrote is in the
        caches when it reads it; None: all; lanes have their own division
    :param c_visit: visits added in sigma; higher: Q counts more against the prior from the first visit on
    :param c_scale: factor of sigma; higher: Q counts more against the prior
    :param min_range: smallest range of Q that is stretched to 1
    :return: results, numpy
    :raises ValueError: if a number is too small, shapes do not fit, a root has no legal action, or the network returns
        something that is not finite
    """
    sizes = num_simulations, max_num_considered_actions, 1 if roots_at_once is None else roots_at_once
    for name, number in zip(("num_simulations", "max_num_considered_actions", "roots_at_once"), sizes, strict=True):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if not min_range > 0:
        raise ValueError(f"min_range must be positive, got {min_range}.")
    logits, values, noise = _root_arrays(prior_logits, values, gumbel, invalid_actions)
    batch, slots = logits.shape
    data = np.empty((batch, CANDIDATES + PAIR * slots + (num_simulations + 1) * (NODE + FIELDS * slots)))
    numbers = gamma, c_visit, c_scale, min_range, slots, num_simulations, max_num_considered_actions
    settings = np.array(numbers, np.float64)
    if callable(recurrent_fn):
        for part in _parts(embedding):
            if len(part) != batch:
                raise ValueError(f"There are {batch} rows of logits, but an embedding of shape {tuple(part.shape)}.")
        size = roots_at_once or batch
        for start in range(0, batch, size):
            rows = slice(start, min(start + size, batch))
            _search([_Called(embedding, recurrent_fn, num_simulations, rows)], logits, values, noise, data, settings)
    else:
        _search(recurrent_fn, logits, values, noise, data, settings)
    return SearchOutput(*finish(data, settings), Tree(data, slots))


def _parts(embedding: Embedding) -> tuple[Any, ...]:
    return embedding if isinstance(embedding, tuple) else (embedding,)


def _search(
    lanes: Sequence[Lane], logits: Singles, values: Singles, noise: Singles, data: Floats, settings: Floats
) -> None:
    """Fill the trees of these lanes, rows of ``data``."""
    num_simulations, steps = int(settings[5]), []
    for lane in lanes:
        rows = lane.rows
        trees = data[rows]
        actions, sources = np.empty(len(trees), np.int64), np.empty(len(trees), np.int64)
        code = plant(trees, logits[rows], values[rows], noise[rows], settings, actions, sources)
        if code >= 0:
            raise ValueError(_problem(code, "root", rows))
        lane.launch(sources, actions)
        steps.append((lane, trees, actions, sources))
    for simulation in range(num_simulations):
        for lane, trees, actions, sources in steps:
            found = _network_arrays(lane.collect(), len(trees), logits.shape[1])
            code = step(trees, *found, simulation, settings, actions, sources)
            if code >= 0:
                raise ValueError(_problem(code, f"simulation {simulation}", lane.rows))
            if simulation + 1 < num_simulations:
                lane.launch(sources, actions)


def _root_arrays(prior_logits: Any, values: Any, gumbel: Any, invalid_actions: Any) -> tuple[Singles, Singles, Singles]:
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
        on_cpu = invalid_actions.cpu() if isinstance(invalid_actions, th.Tensor) else invalid_actions
        invalid = np.asarray(on_cpu, np.bool_)
        _check_shape("invalid_actions", invalid, logits.shape)
        logits = np.where(invalid, np.float32(-np.inf), logits)
    return logits, values, noise


def _network_arrays(out: RecurrentOutput, batch: int, slots: int) -> tuple[Singles, Singles, Singles]:
    """Rewards, values and logits of one simulation, shapes checked."""
    rewards, values, logits = _floats(out.reward), _floats(out.value), _floats(out.prior_logits)
    if rewards.shape != (batch,) or values.shape != (batch,):
        raise ValueError(f"The network returned rewards {rewards.shape} and values {values.shape}, not ({batch},).")
    if logits.ndim != 2 or len(logits) != batch or not 1 <= logits.shape[1] <= slots:
        raise ValueError(f"The network returned logits of shape {logits.shape}; wanted ({batch}, 1 to {slots}).")
    return rewards, values, logits


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


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}.")


def _problem(code: int, where: str, rows: slice) -> str:
    """Message for what a kernel found."""
    row, problem = rows.start + code // 4, code % 4
    if problem == NO_ACTION:
        return f"Row {row} has no legal action ({where})."
    return f"The network gave {PROBLEMS[problem]} ({where}, row {row})."
