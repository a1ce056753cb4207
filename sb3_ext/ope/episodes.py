"""Recorded episodes as a trained model sees them, in batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_ext.data.load import DatasetLike, load_minari
from sb3_ext.data.trees import short_space
from sb3_ext.replay.dataset import OfflineReplayBuffer, PrioritizedOfflineReplayBuffer

ROWS = 1024
"""Transitions that are looked at together."""
_FOR_TRAINING = {"prioritized", "subset", "subset_seed", "seed"}


def reading_of(model: Any) -> dict[str, Any]:
    """Arguments of :func:`~sb3_ext.load_minari` with which other data looks to a model like what it has learnt from."""
    kwargs = {k: v for k, v in getattr(model, "dataset_kwargs", {}).items() if k not in _FOR_TRAINING}
    learnt = getattr(model, "dataset_info", {})
    kwargs |= {key: learnt[key] for key in ("transforms", "padding_type") if learnt.get(key)}
    return kwargs


def own_view(buffer: ReplayBuffer) -> OfflineReplayBuffer:
    """
    The same episodes with settings and a sampler of their own, so that another model can go on with the buffer.

    :raises TypeError: if the buffer does not keep episodes
    :raises ValueError: if it is drawn from by priority
    """
    if not isinstance(buffer, OfflineReplayBuffer):
        raise TypeError(
            f"Whole episodes are needed here, and {type(buffer).__name__} does not say where they begin. Pass a Minari "
            "dataset, its id or path, or what load_minari() gave."
        )
    if isinstance(buffer, PrioritizedOfflineReplayBuffer):
        raise ValueError("Off-policy evaluation draws uniformly: leave 'prioritized' out of load_minari().")
    view = copy.copy(buffer)
    view.scale_actions = False  # as the environment gets them
    view.keep_returns_to_go(False)
    return view


def check_spaces(model: BaseAlgorithm, buffer: ReplayBuffer) -> None:
    """
    Compare the spaces of a model and of the data it is evaluated with.

    :raises ValueError: if they differ
    """
    for what in ("observation_space", "action_space"):
        ours, theirs = getattr(model, what), getattr(buffer, what)
        if ours != theirs:
            raise ValueError(
                f"The {what} of the model and of the dataset differ: {short_space(ours)} and {short_space(theirs)}. "
                "Pass data of the model's task, with dataset_kwargs (transforms, frame_stack) as it learnt."
            )


def load_episodes(
    model: Any, dataset: DatasetLike | ReplayBuffer, dataset_kwargs: dict[str, Any] | None = None
) -> OfflineReplayBuffer:
    """
    Load data as a model sees it, rewards included, one step at a time.

    :param model: the trained model
    :param dataset: as in :class:`~sb3_ext.CQL`; a buffer is not changed
    :param dataset_kwargs: arguments of :func:`~sb3_ext.load_minari` that win over the model's own
    :raises TypeError: if a buffer does not keep episodes
    :raises ValueError: if the spaces differ
    """
    if isinstance(dataset, ReplayBuffer):
        buffer = own_view(dataset)
        buffer.device = model.device
    else:
        kwargs = {**reading_of(model), **(dataset_kwargs or {})}
        buffer = load_minari(dataset, device=model.device, **kwargs)
    check_spaces(model, buffer)
    buffer.n_steps, buffer.gamma = 1, model.gamma
    buffer.clip_rewards = getattr(model, "clip_rewards", False)
    return buffer


def first_steps(buffer: OfflineReplayBuffer) -> NDArray[np.int64]:
    """Numbers of the transitions with which episodes begin, ``[n_episodes]``."""
    return np.cumsum(buffer.lengths) - buffer.lengths


def in_batches(
    buffer: OfflineReplayBuffer, numbers: NDArray[np.int64], env: Any = None
) -> Iterator[ReplayBufferSamples]:
    """
    Transitions by number, in order, :data:`ROWS` at a time.

    :param env: what normalises them, as in SB3's ``ReplayBuffer.sample``
    """
    for start in range(0, len(numbers), ROWS):
        yield buffer._get_samples(numbers[start : start + ROWS], env)
