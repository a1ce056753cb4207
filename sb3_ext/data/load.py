"""Minari datasets as replay buffers, and the environments they were made in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext.data.cache import Arrays, NotStacks, RamSink, cache_folder, cache_key, open_cache, stream, write_cache
from sb3_ext.data.checks import DatasetError, check_padding, choose_padding, ready_made_frames
from sb3_ext.data.envs import StackFrames, is_frame_space, padding_shown_by, stacked_space, to_channel_first
from sb3_ext.data.source import DatasetLike as DatasetLike
from sb3_ext.data.source import Source, building, env_spec, open_source
from sb3_ext.data.transforms.pipeline import TransformedEnv, TransformLike
from sb3_ext.data.trees import alike, short_space
from sb3_ext.data.write import return_statistics
from sb3_ext.replay.dataset import OfflineReplayBuffer, PrioritizedOfflineReplayBuffer
from sb3_ext.replay.device import DeviceFrames
from sb3_ext.replay.frames import PADDING_TYPES, FrameStore, check_padding_type, split_stacks

STORAGES = ("mmap", "compressed", "ram", "device")


def choose_episodes(lengths: NDArray[np.int64], subset: float, seed: int) -> NDArray[np.int64]:
    """Positions of whole episodes, sorted, drawn from all over a log until they hold the share ``subset`` of steps."""
    if subset == 1:
        return np.arange(len(lengths))
    order = np.random.default_rng(seed).permutation(len(lengths))
    wanted = int(np.searchsorted(np.cumsum(lengths[order]), subset * lengths.sum() - 1e-6)) + 1
    return np.sort(order[:wanted])


def default_frame_stack(space: spaces.Space[Any]) -> int:
    """Frames per observation if the user does not say: 4 for pictures with one channel, 1 for everything else."""
    if not isinstance(space, spaces.Box):
        return 1
    return 4 if is_frame_space(space) and to_channel_first(space.low, space).shape[0] == 1 else 1


def _choose_padding_type(name: str, given: str | None, fitting: frozenset[str]) -> str:
    """The given padding type if it fits the recorded stacks; else what they show."""
    if given is None:
        return "zero" if "zero" in fitting else "reset"
    if check_padding_type(given) not in fitting:
        (theirs,) = fitting
        raise DatasetError(
            f"{name}: its frame stacks were recorded with padding_type={theirs!r}, padding_type={given!r} was asked "
            "for. Leave it out, and the recorded one is taken."
        )
    return given


def _digest(function: Any, name: str) -> str:
    """Tell one function or transform of the user's from another, so that cached data is the one it made."""
    try:
        return hashlib.sha256(cloudpickle.dumps(function)).hexdigest()
    except Exception as error:
        raise DatasetError(
            f"{name}: a transform cannot be told from others for the cache ({type(error).__name__}: {error}). Use "
            "storage='ram', which has no cache."
        ) from error


def _read(
    source: Source, storage: str, folder: Path, subset: float, seed: int, strict: bool, n_frames: int
) -> tuple[FrameStore, Arrays]:
    """Frames and the rest of a dataset, from the cache if they are there; stacks of ``n_frames`` are taken apart."""
    compressed = storage == "compressed"
    key = ""
    if storage != "ram":
        transforms = [t if isinstance(t, str) else _digest(t, source.name) for t in source.pipeline.names]
        key = cache_key(source, compressed, subset, seed if subset < 1 else None, strict, n_frames, transforms)
        if (cached := open_cache(folder / key)) is not None:
            return cached
    opened = source.open()
    lengths = source.episode_lengths(opened)
    chosen = choose_episodes(lengths, subset, seed)
    n_rows = int((lengths[chosen] + 1).sum())
    for n in (n_frames, 1):
        episodes = source.read(opened, source.episodes[chosen], lengths[chosen], strict)
        with suppress(NotStacks):
            if storage == "ram":
                sink = RamSink(n_rows)
                arrays = stream(source, episodes, sink.append, n)
                return sink.finish(), arrays
            write_cache(source, episodes, folder / key, n_rows, n, compressed)
            break
    cached = open_cache(folder / key)
    assert cached is not None
    return cached


def load_minari(
    dataset: DatasetLike,
    *,
    transforms: Sequence[TransformLike] | TransformLike | None = None,
    frame_stack: int | None = None,
    padding_type: str | None = None,
    subset: float = 1.0,
    subset_seed: int = 0,
    storage: str = "mmap",
    cache_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    build_env: bool = False,
    n_steps: int = 1,
    gamma: float = 0.99,
    prioritized: bool | dict[str, Any] = False,
    device: th.device | str = "auto",
    seed: int | None = None,
) -> OfflineReplayBuffer:
    """
    Load a Minari dataset as a replay buffer.

    Every frame is stored once. Continuous actions are those of the environment, not scaled to [-1, 1] as SB3's
    algorithms store them. The data is checked completely before anything is returned. Nothing the dataset names is
    executed: its environment is not built.

    Observations are those that SB3's policies take. Nested ``Dict`` and ``Tuple`` observations become one ``Dict`` with
    entries such as ``goal/achieved``. Text is left out with a notice. Numbers of things count from 0.

    :param dataset: a ``MinariDataset`` (its episode filter is respected), an id (local, else downloaded) or a path
    :param transforms: what to make of observations, actions and rewards, in order: names such as ``"atari"``,
        ``"flatten"``, ``"drop:mission"``, ``"tokens"`` or ``"clip_actions"``, functions of observations ``[n, ...]``,
        or :class:`~sb3_ext.data.Transform` objects. :class:`~sb3_ext.data.TransformedEnv` does the same to an
        environment. All names are in ``docs/datasets.md``
    :param frame_stack: frames per observation; ready-made stacks are recognised and taken apart; default: 4 for
        pictures with one channel, else 1
    :param padding_type: what stands before an episode's first frame: ``"zero"``, or ``"reset"`` for that frame again,
        which is the default of gymnasium's ``FrameStackObservation``; default: what ready-made stacks show, else zeros
    :param subset: share of the steps to use, drawn as whole episodes from all over the log
    :param subset_seed: seed of that draw
    :param storage: ``"mmap"``: frames raw on disk in a cache, opened at once from the second time on, and larger than
        RAM if need be; ``"compressed"``: the same in zstd blocks, 20 to 150 times smaller and a little slower to draw
        from; ``"ram"``: raw in RAM, nothing written to disk; ``"device"``: as ``"mmap"``, and a copy
        on the device, where batches are then cut out: the fastest on a GPU, if its memory holds 7 kB a step of 84x84
    :param cache_dir: the cache; default ``$SB3_EXT_CACHE``, else the user's cache folder
    :param strict: refuse episodes of one step, and steps that are marked both terminated and truncated. Otherwise they
        are accepted with a notice, and termination wins
    :param build_env: allow building the dataset's environment if the metadata lacks its spaces (runs code it names)
    :param n_steps: see :class:`~sb3_ext.replay.dataset.OfflineReplayBuffer`
    :param gamma: likewise
    :param prioritized: draw by priority: True, or arguments of
        :class:`~sb3_ext.replay.priorities.Priorities` such as ``{"alpha": 0.6, "beta": 0.4}``
    :param device: likewise
    :param seed: seed of the sampler
    :return: the buffer; ``buffer.info`` says what it holds
    :raises DatasetError: if the data is missing, damaged or invalid; names episode and step, or the field. Also if
        ready-made stacks have another padding type than the given one
    :raises TypeError: if it is not a dataset
    :raises ValueError: for an unknown storage or padding type, or a subset outside (0, 1]
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}.")
    if not 0 < subset <= 1:
        raise ValueError(f"subset must be in (0, 1], got {subset}.")
    if frame_stack is not None and frame_stack < 1:
        raise ValueError(f"frame_stack must be at least 1, got {frame_stack}.")
    if padding_type is not None:
        check_padding_type(padding_type)
    source = open_source(dataset, build_env, transforms)
    if not isinstance(source.observation_space, spaces.Box) and (frame_stack or 1) > 1:
        raise ValueError(
            f"frame_stack={frame_stack} stacks Box observations, those of {source.name} are "
            f"{short_space(source.observation_space)}. Leave frame_stack out."
        )
    n_frames = ready_made_frames(source.observation_space, frame_stack)
    frames, arrays = _read(source, storage, cache_folder(cache_dir), subset, subset_seed, strict, n_frames)
    source.warn()
    if storage == "device":
        frames = DeviceFrames.copy_of(frames, get_device(device))
    if arrays.n_frames > 1:
        stack, space = arrays.n_frames, stacked_space(source.observation_space, 1)
    else:
        stack = frame_stack or default_frame_stack(source.observation_space)
        space = stacked_space(source.observation_space, stack)
    kind: Callable[..., OfflineReplayBuffer] = OfflineReplayBuffer
    if prioritized is not False:
        kind = partial(PrioritizedOfflineReplayBuffer, prioritized={} if prioritized is True else prioritized)
    buffer = kind(
        frames,
        arrays.actions,
        arrays.rewards,
        arrays.terminated,
        arrays.lengths,
        space,
        source.action_space,
        frame_stack=stack,
        padding_type=_choose_padding_type(source.name, padding_type, arrays.padding_types),
        n_steps=n_steps,
        gamma=gamma,
        device=device,
        seed=seed,
    )
    buffer.info = {
        "dataset_id": source.name,
        "env_id": (env_spec(source.metadata) or {}).get("id"),
        "algorithm_name": source.metadata.get("algorithm_name"),
        "transforms": source.pipeline.names,
        "frame_stack": stack,
        "padding_type": buffer.padding_type,
        "recorded_stacks": arrays.n_frames > 1,
        "subset": subset,
        "episodes": buffer.n_episodes,
        "steps": buffer.buffer_size,
        "behaviour_return": return_statistics(arrays.returns.tolist()),
    }
    return buffer


def match_padding(buffer: OfflineReplayBuffer, venv: VecEnv, fixed: bool = False) -> None:
    """
    Let the frame stacks of a buffer made by :func:`load_minari` begin an episode as the environment's do.

    Stacks of single frames take over what the environment shows, which is reset once, see
    :func:`~sb3_ext.data.envs.padding_shown_by`. Recorded stacks are only compared, and so are all if ``fixed``, because
    the user chose the padding type or a model has learnt with it.

    :raises DatasetError: if it may not be changed and differs; names both and the remedy
    """
    name, recorded = buffer.info.get("dataset_id") or "the dataset", buffer.info.get("recorded_stacks", False)
    if fixed or recorded:
        check_padding(name, buffer.padding_type, venv, buffer.frame_stack, recorded)
        return
    buffer.padding_type = choose_padding(name, padding_shown_by(venv, buffer.frame_stack), buffer.frame_stack)
    buffer.info["padding_type"] = buffer.padding_type


def dataset_spaces(
    dataset: DatasetLike, transforms: Sequence[TransformLike] | TransformLike | None = None, build_env: bool = False
) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """
    Spaces of a dataset's observations and actions as :func:`load_minari` gives them, before frames are stacked.

    :param dataset: as in :func:`load_minari`
    :param transforms: as in :func:`load_minari`
    :param build_env: as in :func:`load_minari`
    :return: observation space and action space
    :raises DatasetError: as :func:`load_minari` does, as far as the metadata shows it
    """
    source = open_source(dataset, build_env, transforms)
    return source.observation_space, source.action_space


def _recorded_padding(source: Source, n_frames: int) -> frozenset[str] | None:
    """Padding types of the first episode's stacks, which the environment makes itself; None if it has no stacks."""
    if n_frames == 1:
        return None
    opened = source.open()
    first = source.episodes[:1]
    episode = next(source.read(opened, first, source.episode_lengths(opened)[:1], strict=False))
    parts = split_stacks(to_channel_first(episode.observations, source.observation_space), n_frames)
    return None if parts is None else parts[1]


def make_eval_env(
    dataset: DatasetLike,
    *,
    n_envs: int = 1,
    transforms: Sequence[TransformLike] | TransformLike | None = None,
    frame_stack: int | None = None,
    padding_type: str | None = None,
    build_env: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> VecEnv:
    """
    Build the environment a dataset was made in, with the observations :func:`load_minari` gives.

    This runs the code that the dataset's metadata names; use it for datasets you trust.

    :param dataset: as in :func:`load_minari`
    :param n_envs: copies
    :param transforms: as in :func:`load_minari`; they see what the environment shows, while the monitor below them
        keeps the rewards as they are
    :param frame_stack: as in :func:`load_minari`
    :param build_env: as in :func:`load_minari`
    :param padding_type: as in :func:`load_minari`; ready-made stacks are the environment's own and not stacked again
    :param seed: seed of the first copy; the others count up
    :param kwargs: passed to ``gymnasium.make``, for instance ``render_mode="rgb_array"``
    :return: the environment, monitored
    :raises DatasetError: if the dataset does not name an environment, a package that it needs is missing, or ready-made
        stacks have another padding type
    :raises ValueError: for an unknown padding type
    """
    if padding_type is not None:
        check_padding_type(padding_type)
    source = open_source(dataset, build_env, transforms)
    fields_of_spec = env_spec(source.metadata)
    if fields_of_spec is None:
        raise DatasetError(
            f"{source.name} does not say which environment it was made in; build it yourself and pass it as env=."
        )
    known = {field.name for field in fields(EnvSpec) if field.init}
    # older Gymnasium wrote fields that today's does not have
    spec = EnvSpec.from_json(json.dumps({k: v for k, v in fields_of_spec.items() if k in known}))
    stack = frame_stack or default_frame_stack(source.observation_space)
    recorded = _recorded_padding(source, ready_made_frames(source.observation_space, frame_stack))
    if recorded is not None:
        stack = 1
    padding = _choose_padding_type(source.name, padding_type, recorded or frozenset(PADDING_TYPES))

    def make() -> gym.Env[Any, Any]:
        env: gym.Env[Any, Any] = Monitor(gym.make(spec, **kwargs))
        if not source.pipeline.changes_nothing:
            env = TransformedEnv(env, source.pipeline.names)
        if not alike(env.observation_space, source.observation_space):
            raise DatasetError(
                f"{source.name}: its environment shows {short_space(env.observation_space)}, the data has "
                f"{short_space(source.observation_space)}: it was recorded through wrappers that are not stored. Build "
                "the environment yourself, with them, and pass it as env=."
            )
        return StackFrames(env, stack, padding) if stack > 1 or is_frame_space(source.observation_space) else env

    with building(source.metadata, source.name):
        venv = DummyVecEnv([make] * n_envs)
    if seed is not None:
        venv.seed(seed)
    return venv
