"""What to train on: a dataset, described by its metadata alone, or an environment; and the environments to play in."""

from __future__ import annotations

import importlib
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.storage import get_dataset_path

from sb3_ext.data import StackFrames, TransformedEnv, make_atari_env, policy_for
from sb3_ext.zoo.config import Algo, ZooError, hint
from sb3_ext.zoo.settings import AgentSettings

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv


@dataclass(frozen=True)
class Task:
    """What a run is about."""

    name: str  # id of the dataset, or of the environment
    dataset: str | None  # as the user gave it
    env: str | None  # id, as the user gave it
    env_id: str | None  # from the user or from the dataset's metadata
    atari: bool  # whether that is an Atari game
    here: bool = False  # whether the dataset to learn from is on this machine
    actions: str | None = None  # kind of its actions, as far as its metadata says it

    @property
    def entries(self) -> list[str]:
        """Names of the entries of a YAML file that fit, the most specific first."""
        found = [self.name, *([self.env_id.split(":")[-1]] if self.env_id else []), *(["atari"] if self.atari else [])]
        return list(dict.fromkeys(found))

    def policy(self, dataset_kwargs: dict[str, Any]) -> str | None:
        """What ``policy: auto`` means, if the dataset that tells is here."""
        if not self.here or self.dataset is None:
            return None
        from sb3_ext.data import dataset_spaces  # here, because it brings PyTorch

        how = {key: dataset_kwargs[key] for key in ("transforms", "build_env") if key in dataset_kwargs}
        return policy_for(dataset_spaces(self.dataset, **how)[0])


def use_threads(number: int) -> None:
    """Let PyTorch compute in so many threads, small networks included, if the number is positive."""
    import torch as th  # here, because `sb3x data` does without it

    if number > 0:
        os.environ["OMP_NUM_THREADS"] = str(number)  # says that the number was chosen, also if it is PyTorch's own
        th.set_num_threads(number)


def is_picture(space: spaces.Space[Any] | None) -> bool:
    """Whether observations are pictures: bytes in two or three dimensions."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def find_task(settings: AgentSettings, algo: Algo, download: bool) -> Task:
    """Look at what the user wants to train on, without loading data or building an environment."""
    dataset, env = settings.dataset, settings.env
    if dataset and not (algo.offline or algo.imitates):
        raise ZooError(f"{algo.name} learns in an environment, not from a dataset; pass --env instead of --dataset.")
    name = dataset if algo.offline else env
    if not name:
        needs = "learns from a dataset: pass --dataset ID." if algo.offline else "needs an environment: pass --env ID."
        raise ZooError(f"{algo.name} {needs}")
    if env:
        check_env_id(env)
    metadata = read_metadata(dataset) if dataset else None
    if dataset and metadata is None and download:
        metadata = _download(dataset)
    atari = is_atari(env) if env else False
    if not algo.offline or metadata is None:
        return Task(name, dataset, env, env, atari)
    spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}")
    return Task(
        metadata.get("dataset_id", name),
        dataset,
        env,
        env or spec.get("id"),
        atari if env else "AtariEnv" in str(spec.get("entry_point")),
        here=True,
        actions=json.loads(metadata.get("action_space") or "{}").get("type"),
    )


def read_metadata(dataset: str) -> dict[str, Any] | None:
    """Metadata of a dataset given by id or path, None if it is not on this machine; no environment is built."""
    path = Path(dataset)
    for folder in (path, path / "data", Path(get_dataset_path(dataset)) / "data"):
        if (file := folder / "metadata.json").is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ZooError(f"{file} cannot be read ({error}); get the dataset again.") from error
    if path.exists():
        raise ZooError(f"{dataset} is not a Minari dataset: there is no metadata.json in it.")
    return None


def _download(dataset: str) -> dict[str, Any] | None:
    if dataset in gym.registry:
        raise ZooError(f"{dataset} is an environment, not a dataset; pass --dataset the id of a Minari dataset.")
    try:
        minari.download_dataset(dataset)
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
        raise ZooError(
            f"The dataset {dataset!r} is not on this machine and could not be downloaded ({reason}); "
            + hint(dataset, minari.list_local_datasets())
        ) from error
    return read_metadata(dataset)


def check_env_id(env_id: str) -> None:
    """Make sure that an environment is registered; ``module:id`` imports the module first."""
    if env_id.startswith("ALE/"):
        try:
            import ale_py
        except ImportError as error:
            raise ZooError('Atari games need: pip install "sb3-ext[atari]"') from error
        gym.register_envs(ale_py)
    try:
        _spec(env_id)
    except (gym.error.Error, ImportError) as error:
        raise ZooError(f"There is no environment {env_id!r}; {hint(env_id, gym.registry)}") from error
    if is_atari(env_id) and not env_id.startswith("ALE/"):
        raise ZooError(f"{env_id}: Atari games are called ALE/<Game>-v5 here.")


def is_atari(env_id: str) -> bool:
    """Whether a registered environment is an Atari game."""
    return "AtariEnv" in str(_spec(env_id).entry_point)


def _spec(env_id: str) -> EnvSpec:
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gym.spec(name)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Build one bare environment; Atari games follow the protocol of :func:`~sb3_ext.data.make_atari_env`."""
    if is_atari(env_id):
        return make_atari_env(env_id.removeprefix("ALE/").partition("-")[0], render_mode=render_mode)
    return gym.make(env_id, render_mode=render_mode)


def make_envs(
    env_id: str,
    *,
    n_envs: int = 1,
    seed: int | None = None,
    frame_stack: int | None = None,
    padding_type: str | None = None,
    transforms: Sequence[Any] | None = None,
    like: spaces.Space[Any] | None = None,
    monitor: Path | None = None,
    training: bool = False,
    render_mode: str | None = None,
) -> VecEnv:
    """
    Build an environment given by id, see :func:`make_env`, as an agent sees it: monitored, pictures channel first.

    :param seed: seed of the first copy; the others count up
    :param frame_stack: frames per observation; default 4 for pictures with one channel, else 1
    :param padding_type: what stands before an episode's first frame; default zeros
    :param transforms: what to make of what the environment shows, see :class:`~sb3_ext.data.TransformedEnv`
    :param like: observation space of a model; pictures are stacked to fit it
    :param monitor: folder for ``<i>.monitor.csv``, which are added to if they exist
    :param training: clip the rewards of Atari games to [-1, 1]; the monitor still sees the score
    """
    from stable_baselines3.common.monitor import Monitor  # here, because it brings PyTorch
    from stable_baselines3.common.vec_env import DummyVecEnv

    atari = is_atari(env_id)

    def make(index: int) -> gym.Env[Any, Any]:
        env = make_env(env_id, render_mode)
        file = str(monitor / f"{index}.monitor.csv") if monitor is not None else None
        env = Monitor(env, file, override_existing=file is None or not os.path.exists(file))
        if training and atari:
            env = gym.wrappers.ClipReward(env, -1.0, 1.0)
        if transforms:
            env = TransformedEnv(env, transforms)
        stack = _stack(env, frame_stack, like)
        if stack == 1 and not is_picture(env.observation_space):
            return env
        return StackFrames(env, stack, padding_type or "zero")

    venv = DummyVecEnv([lambda i=i: make(i) for i in range(n_envs)])  # type: ignore[misc]
    venv.seed(seed)
    return venv


def _stack(env: gym.Env[Any, Any], frame_stack: int | None, like: spaces.Space[Any] | None) -> int:
    if not is_picture(env.observation_space):
        return frame_stack or 1
    channels = StackFrames(env, 1).observation_space.shape[0]  # type: ignore[index]
    if like is not None and like.shape and like.shape[0] % channels == 0:
        return int(like.shape[0] // channels)
    return frame_stack or (4 if channels == 1 else 1)


def make_model_envs(task: Task, model: BaseAlgorithm, build_env: bool = False, **kwargs: Any) -> VecEnv:
    """
    Build the environment that a model plays in: the user's, else the one of the dataset, whose code its metadata names.

    :param kwargs: arguments that :func:`make_envs` and :func:`~sb3_ext.data.make_eval_env` share
    """
    learnt = getattr(model, "dataset_info", {})
    kwargs["padding_type"] = learnt.get("padding_type")
    kwargs["transforms"] = learnt.get("transforms") or kwargs.get("transforms")
    if task.env:
        env = make_envs(task.env, like=model.observation_space, **kwargs)
    else:
        from sb3_ext.data import make_eval_env  # here, because it brings PyTorch

        assert task.dataset is not None
        env = make_eval_env(task.dataset, build_env=build_env, **kwargs)
    for what in ("observation_space", "action_space"):
        ours, theirs = getattr(model, what), getattr(env, what)
        if ours != theirs:
            env.close()
            raise ZooError(f"The model's {what} is {ours}, the environment's is {theirs}; they must be the same.")
    return env
