"""Reanalysis: targets of value and policy by searching again, when a batch is drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.common.sequences import SequenceSamples
from sb3_ext.efficientzero.fast_network import Roots
from sb3_ext.efficientzero.policies import EfficientZeroPolicy
from sb3_ext.efficientzero.targets import mix_values, n_step_values


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


@th.no_grad()
def reanalyze(
    policy: EfficientZeroPolicy, batch: SequenceSamples, *, unroll_steps: int, n_steps: int, max_age: int | None
) -> Targets:
    """
    Search from the first K + 1 observations of each window, all of them at once; every observation is encoded once.

    :param policy: the target network's
    :param batch: windows
    :param unroll_steps: K
    :param n_steps: n of n-step returns
    :param max_age: windows that are older get the search's value instead of the n-step return; None: none is too old
    :return: targets; the value behind a termination is 0
    """
    places, device = unroll_steps + 1, policy.device
    size, length = batch.rewards.shape
    flat = th.from_numpy(batch.observations.reshape(-1, *batch.observations.shape[2:])).to(device)
    roots = policy.roots(flat)

    def first(x: Any) -> Any:
        return x.reshape(size, length + 1, *x.shape[1:])[:, :places].reshape(size * places, *x.shape[1:])

    invalid = None
    if batch.masks is not None:
        legal = first(batch.masks.reshape(-1, batch.masks.shape[2]))
        invalid = ~legal & legal.any(axis=1, keepdims=True)  # where none is known, all are legal
    out, sampled = policy.plan(Roots(*(first(x) for x in roots)), noise=True, invalid=invalid)
    found: NDArray[np.float32] = out.root_values.reshape(size, places)
    fresh = np.full(size, True) if max_age is None else batch.ages <= max_age
    if fresh.any():
        values = np.asarray(th.as_tensor(roots.values).cpu()).reshape(size, length + 1)
        n_step = n_step_values(
            batch.rewards, values, batch.lengths, batch.terminated,
            unroll_steps=unroll_steps, n_steps=n_steps, gamma=policy.gamma,
        )  # fmt: skip
        found = mix_values(n_step, found, fresh)
    over = np.arange(places) >= batch.lengths[:, None]
    found = np.where(over & batch.terminated[:, None], 0, found).astype(np.float32)

    def tensor(x: NDArray[Any]) -> th.Tensor:
        return th.from_numpy(x).to(device).reshape(size, places, *x.shape[1:])

    return Targets(
        th.from_numpy(found).to(device),
        tensor(out.improved_policy),
        None if sampled is None else tensor(sampled),
        tensor(out.actions),
        float(out.tree.depths.max(axis=1).mean()),
    )
