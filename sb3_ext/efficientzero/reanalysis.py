"""Reanalysis: targets of value and policy by searching again, when a batch is drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.efficientzero.networks import Roots
from sb3_ext.efficientzero.policies import EfficientZeroPolicy
from sb3_ext.efficientzero.replay import SearchMemo, SequenceSamples
from sb3_ext.efficientzero.targets import masks, mix_values, n_step_values


class Targets(NamedTuple):
    """
    What a batch of windows is trained towards, at K + 1 places each.

    :param values: ``[B, K + 1]``
    :param policy: improved policy, ``[B, K + 1, S]`` over S actions or samples
    :param actions: continuous control: those samples, ``[B, K + 1, S, D]``; else None
    :param best: slot that the search chose, ``[B, K + 1]``
    :param depth: of the deepest node of each search, mean
    """

    values: th.Tensor
    policy: th.Tensor
    actions: th.Tensor | None
    best: th.Tensor
    depth: float


class _Found(NamedTuple):
    """
    What network and search say of the observations of windows, as numpy arrays.

    :param values: the network's, ``[B, L + 1]``; None if they are not needed
    :param search_values: ``[B, K + 1]``
    :param policy: as in :class:`Targets`, as is what follows
    """

    values: NDArray[np.float32] | None
    search_values: NDArray[np.float32]
    policy: NDArray[np.float32]
    actions: NDArray[np.float32] | None
    best: NDArray[np.int64]
    depth: float


@th.no_grad()
def reanalyze(
    policy: EfficientZeroPolicy,
    batch: SequenceSamples,
    *,
    unroll_steps: int,
    n_steps: int,
    max_age: int | None,
    improved_values: bool = False,
    memo: SearchMemo | None = None,
) -> Targets:
    """
    Search from the first K + 1 observations of each window, all of them at once; every observation is encoded once.

    :param policy: the target network's
    :param batch: windows
    :param unroll_steps: K
    :param n_steps: n of n-step returns
    :param max_age: windows that are older get the search's value instead of the n-step return; None: none is too old
    :param improved_values: search-based values are those of the improved policy, not means over all visits
    :param memo: of the buffer that the windows are from; what it knows is not searched again
    :return: targets; the value behind a termination is 0
    """
    places, device = unroll_steps + 1, policy.device
    fresh = np.full(len(batch.rewards), True) if max_age is None else batch.ages <= max_age
    if memo is None:
        found = _search_all(policy, batch, places, bool(fresh.any()), improved_values)
    else:
        found = _search_missing(policy, batch, places, fresh, improved_values, memo)
    values = found.search_values
    if found.values is not None:
        n_step = n_step_values(
            batch.rewards, found.values, batch.lengths, batch.terminated,
            unroll_steps=unroll_steps, n_steps=n_steps, gamma=policy.gamma,
        )  # fmt: skip
        values = mix_values(n_step, values, fresh)
    over = np.arange(places) >= batch.lengths[:, None]
    values = np.where(over & batch.terminated[:, None], 0, values).astype(np.float32)
    return Targets(
        th.from_numpy(values).to(device),
        th.from_numpy(found.policy).to(device),
        None if found.actions is None else th.from_numpy(found.actions).to(device),
        th.from_numpy(found.best).to(device),
        found.depth,
    )


def _search_all(
    policy: EfficientZeroPolicy, batch: SequenceSamples, places: int, valued: bool, improved: bool
) -> _Found:
    """Search from every observation, those behind an end too, so that shapes stay the same."""
    size, length = batch.rewards.shape
    roots = policy.roots(_observations(policy, batch))

    def first(x: Any) -> Any:
        return x.reshape(size, length + 1, *x.shape[1:])[:, :places].reshape(size * places, *x.shape[1:])

    def shaped(x: NDArray[Any]) -> NDArray[Any]:
        return x.reshape(size, places, *x.shape[1:])

    invalid = None if batch.masks is None else _invalid(batch.masks[:, :places])
    out, sampled = policy.plan(Roots(*(first(x) for x in roots)), noise=True, invalid=invalid)
    return _Found(
        _numpy(roots.values).reshape(size, length + 1) if valued else None,
        shaped(out.improved_values if improved else out.root_values),
        shaped(out.improved_policy),
        None if sampled is None else shaped(sampled),
        shaped(out.actions),
        float(out.tree.depths.max(axis=1).mean()),
    )


def _search_missing(
    policy: EfficientZeroPolicy,
    batch: SequenceSamples,
    places: int,
    fresh: NDArray[np.bool_],
    improved: bool,
    memo: SearchMemo,
) -> _Found:
    """Search from what the memo does not know, and only once where windows overlap."""
    size, length = batch.rewards.shape
    memo.follow(policy)
    real = masks(batch.lengths, batch.terminated, length)[0].astype(bool)
    positions = batch.positions.reshape(-1)
    unknown = (real & (np.arange(length + 1) < places)).reshape(-1) & ~memo.searched[positions]
    unvalued = (real & fresh[:, None]).reshape(-1) & ~memo.valued[positions]
    candidates = np.concatenate([np.flatnonzero(unknown), np.flatnonzero(unvalued)])
    # observations that are stored nowhere are all different
    keys = np.where(positions[candidates] < 0, -1 - candidates, positions[candidates])
    once = np.sort(np.unique(keys, return_index=True)[1])
    rows, searches = candidates[once], int((once < unknown.sum()).sum())
    results: dict[str, NDArray[Any]] = {}
    if len(rows):
        roots = policy.roots(_observations(policy, batch, rows))
        results["values"] = _numpy(roots.values)
    if searches:
        invalid = None
        if batch.masks is not None:
            invalid = _invalid(batch.masks.reshape(-1, batch.masks.shape[2])[rows[:searches]])
        out, sampled = policy.plan(Roots(*(x[:searches] for x in roots)), noise=True, invalid=invalid)
        memo.depth = float(out.tree.depths.max(axis=1).mean())
        values = out.improved_values if improved else out.root_values
        results |= {"search_values": values, "policy": out.improved_policy, "best": out.actions}
        results |= {} if sampled is None else {"actions": sampled}
    for name, new in results.items():
        memo.put(positions[rows[: len(new)]], name, new)

    def result(name: str, places: int) -> NDArray[Any]:
        found = memo.get(name, positions)
        if name in results:
            found[rows[: len(results[name])]] = results[name]
        return found.reshape(size, length + 1, *found.shape[1:])[:, :places]

    return _Found(
        result("values", length + 1) if fresh.any() else None,
        result("search_values", places),
        result("policy", places),
        None if policy.discrete else result("actions", places),
        result("best", places),
        memo.depth,
    )


def _observations(policy: EfficientZeroPolicy, batch: SequenceSamples, rows: Any = slice(None)) -> th.Tensor:
    flat = batch.observations.reshape(-1, *batch.observations.shape[2:])
    return th.as_tensor(flat[rows]).to(policy.device)


def _invalid(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Forbidden actions, ``[N, A]``; where no legal one is known, none is forbidden."""
    legal = masks.reshape(-1, masks.shape[-1])
    return ~legal & legal.any(axis=1, keepdims=True)


def _numpy(x: Any) -> NDArray[np.float32]:
    return np.asarray(th.as_tensor(x).float().cpu())
