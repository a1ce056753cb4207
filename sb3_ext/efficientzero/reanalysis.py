"""Reanalysis: targets of value and policy by searching again, when a batch is drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.efficientzero.policies import EfficientZeroPolicy, Searched
from sb3_ext.efficientzero.replay import SearchMemo, SequenceSamples
from sb3_ext.efficientzero.targets import loss_masks, mix_values, n_step_values
from sb3_ext.replay.batch import to_device


class Targets(NamedTuple):
    """
    What a batch of windows is trained towards, at K + 1 places each: values ``[B, K + 1]``, and what the search found,
    as in :class:`~sb3_ext.efficientzero.policies.Searched`.
    """

    values: th.Tensor
    policy: th.Tensor
    actions: th.Tensor | None
    best: th.Tensor
    depth: float


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

    Windows older than ``max_age`` get the search's value instead of the n-step return; None: none is too old. With
    ``improved_values`` that is the improved policy's, not the mean over all visits. What the ``memo`` of the windows'
    buffer knows is not searched again. The value behind a termination is 0.
    """
    places = unroll_steps + 1
    fresh = np.full(len(batch.rewards), True) if max_age is None else batch.ages <= max_age
    if memo is None:
        # from observations behind an end too, so that shapes stay the same
        legal = None if batch.legal is None else batch.legal[:, :places]
        found = policy.search(batch.observations, places, legal, improved_values)
    else:
        found = _search_missing(policy, batch, places, fresh, improved_values, memo)
    values = found.search_values
    if fresh.any():
        n_step = n_step_values(
            batch.rewards, found.values, batch.lengths, batch.terminated,
            unroll_steps=unroll_steps, n_steps=n_steps, gamma=policy.gamma,
        )  # fmt: skip
        values = mix_values(n_step, values, fresh)
    over = batch.terminated[:, None] & (np.arange(places) >= batch.lengths[:, None])
    values = np.where(over, 0, values).astype(np.float32)
    tensors = to_device([values, found.policy, found.actions, found.best], policy.device)
    return Targets._make([*tensors, found.depth])


def _search_missing(
    policy: EfficientZeroPolicy,
    batch: SequenceSamples,
    places: int,
    fresh: NDArray[np.bool_],
    improved: bool,
    memo: SearchMemo,
) -> Searched:
    """Search from what the memo does not know, and only once where windows overlap."""
    memo.follow(policy)
    rows, searches = _missing(batch, places, fresh, memo)
    window, place = np.unravel_index(rows, batch.positions.shape)
    results: dict[str, NDArray[Any]] = {}
    if len(rows):
        # one window of them all
        observations = batch.observations[window, place][None]
        if searches:
            legal = None if batch.legal is None else batch.legal[window, place][:searches]
            found = policy.search(observations, searches, legal, improved)
            memo.depth = found.depth
            results = {name: x[0] for name, x in found._asdict().items() if name != "depth" and x is not None}
        else:
            results["values"] = policy.values(observations)[0]
    for name, new in results.items():
        memo.put(batch.positions[window, place][: len(new)], name, new)

    def result(name: str) -> NDArray[Any]:
        found = memo.get(name, batch.positions)
        if name in results:  # also those of observations that are stored nowhere
            count = len(results[name])
            found[window[:count], place[:count]] = results[name]
        return found if name == "values" else found[:, :places]

    actions = None if policy.discrete else result("actions")
    return Searched(result("values"), result("search_values"), result("policy"), actions, result("best"), memo.depth)


def _missing(
    batch: SequenceSamples, places: int, fresh: NDArray[np.bool_], memo: SearchMemo
) -> tuple[NDArray[np.int64], int]:
    """
    Observations that the memo lacks, as rows of ``[B * (L + 1)]``: first those to search from, then those of which only
    the network's value is needed; and how many the first are.
    """
    length = batch.rewards.shape[1]
    real = loss_masks(batch.lengths, batch.terminated, length)[0].astype(bool)
    positions = batch.positions.reshape(-1)
    unknown = (real & (np.arange(length + 1) < places)).reshape(-1) & ~memo.searched[positions]
    unvalued = (real & fresh[:, None]).reshape(-1) & ~memo.valued[positions]
    candidates = np.concatenate([np.flatnonzero(unknown), np.flatnonzero(unvalued)])
    # observations that are stored nowhere are all different
    keys = np.where(positions[candidates] < 0, -1 - candidates, positions[candidates])
    once = np.sort(np.unique(keys, return_index=True)[1])
    return candidates[once], int((once < unknown.sum()).sum())
