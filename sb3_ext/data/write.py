"""Write episodes as a Minari dataset, losslessly and all or nothing."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray

from sb3_ext.data.checks import check_action_space
from sb3_ext.data.envs import is_frame_space
from sb3_ext.data.folders import dataset_folder, ensure_namespace
from sb3_ext.data.transforms.pipeline import Pipeline
from sb3_ext.files import remove_leftovers
from sb3_ext.replay.frames import unpack_frames

_FORMATS = ("arrow", "hdf5", "parquet")
_OBSERVERS = (
    "sb3_ext.data.record:EpisodeRecorder",
    "sb3_ext.data.dqn_replay.log:ReplayLogger",
    "stable_baselines3.common.monitor:Monitor",
)
"""Wrappers that change nothing, so that the dataset's environment needs none of them."""


@dataclass(frozen=True)
class Episode:
    """
    One recorded episode of T steps.

    :param observations: ``[T + 1, ...]``, compressed
    :param actions: ``[T]`` or ``[T, ...]``
    :param rewards: ``[T]``, as the environment gave them
    :param terminated: whether the last step ended the task
    :param seed: the seed the environment was reset with, if any
    """

    packed: tuple[bytes, tuple[int, ...], str]
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: bool
    seed: int | None

    @property
    def observations(self) -> NDArray[Any]:
        """Decompress the observations, ``[T + 1, ...]``."""
        return unpack_frames(*self.packed)

    def to_minari(self, number: int) -> EpisodeBuffer:
        """
        Convert for Minari's storages.

        :param number: episode number in the dataset
        :return: the buffer, with the end marked as termination or truncation, never both
        """
        last = np.zeros(len(self.rewards), bool)
        last[-1] = True
        return EpisodeBuffer(
            id=number,
            seed=self.seed,
            observations=self.observations,
            actions=self.actions,
            rewards=self.rewards,
            terminations=last & self.terminated,
            truncations=last & (not self.terminated),
        )


def return_statistics(returns: Sequence[float]) -> dict[str, float]:
    """Mean, std, min, median and max of the undiscounted returns of episodes, and their number."""
    r = np.asarray(returns, np.float64)
    return {k: float(getattr(np, k)(r)) for k in ("mean", "std", "min", "median", "max")} | {"episodes": len(r)}


def plain_spec(env: gym.Env[Any, Any]) -> EnvSpec:
    """
    Spec from which users can build an environment again, without what only observes it.

    :raises ValueError: if it was not built with ``gymnasium.make``, or has a spec that cannot be stored
    """
    spec = deepcopy(env.spec)
    if spec is None:
        raise ValueError("The environment has no spec; build it with gymnasium.make so that users can build it again.")
    spec.kwargs.pop("render_mode", None)
    if callable(spec.entry_point):
        spec.entry_point = f"{spec.entry_point.__module__}:{getattr(spec.entry_point, '__qualname__', '')}"
    spec.additional_wrappers = tuple(w for w in spec.additional_wrappers if w.entry_point not in _OBSERVERS)
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The environment's spec cannot be stored as JSON ({error}). Build {spec.id} and its wrappers with "
            "arguments that are numbers, texts, lists or dictionaries."
        ) from error
    for wrapper in spec.additional_wrappers:
        if wrapper.kwargs is None:
            warnings.warn(
                f"Nobody can build this environment again from the dataset, because {wrapper.name} is no "
                "gymnasium.utils.RecordConstructorArgs.",
                stacklevel=3,
            )
    return spec


def check_new_id(dataset_id: str, overwrite: bool = False) -> tuple[str | None, Path]:
    """
    Make sure that a dataset can be written under an id, before anything is played for it.

    What killed processes left in its namespace is put right first.

    :param dataset_id: ``namespace/name-v0``
    :param overwrite: whether one of the same id may be replaced
    :return: namespace and folder of the new dataset
    :raises ValueError: if the id is malformed, lacks a version, or is taken
    """
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise ValueError(
            f"{dataset_id!r} is no dataset id: call it 'namespace/name-v0', with a namespace of two or more characters."
        )
    folder = Path(get_dataset_path(dataset_id))
    remove_leftovers(folder.parent)
    if folder.exists() and not overwrite:
        raise ValueError(f"The dataset {dataset_id!r} exists; choose another version or pass overwrite=True.")
    return match["namespace"], folder


def check_new_dataset(
    dataset_id: str, env: gym.Env[Any, Any], data_format: str | None = None, overwrite: bool = False
) -> None:
    """
    Make sure that a dataset of an environment can be written and loaded again, before anything is played for it.

    :param dataset_id: see :func:`write_dataset`
    :param env: see :func:`write_dataset`
    :param data_format: see :func:`write_dataset`
    :param overwrite: see :func:`write_dataset`
    :raises DatasetError: if the observations are no vectors or pictures, or the actions neither discrete nor vectors
    :raises ValueError: if the id or the format is none, the id is taken, or the environment has no spec that can be
        stored
    """
    check_new_id(dataset_id, overwrite)
    if data_format is not None and data_format not in _FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(_FORMATS)}, not {data_format!r}.")
    Pipeline(None, env.observation_space, check_action_space(env.action_space, dataset_id), dataset_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when the dataset is written
        plain_spec(env)


def requirements(env: gym.Env[Any, Any]) -> list[str]:
    """Pip requirements, ``name==version``, of an environment: the packages its and its wrappers' classes come from."""
    owners = importlib.metadata.packages_distributions()
    modules, layer = {"gymnasium", type(env.unwrapped).__module__.split(".")[0]}, env
    while isinstance(layer, gym.Wrapper):
        modules.add(type(layer).__module__.split(".")[0])
        layer = layer.env
    names = {name for module in modules for name in owners.get(module, [])}
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(names)]


def write_dataset(
    dataset_id: str,
    episodes: Iterable[Episode],
    env: gym.Env[Any, Any],
    *,
    algorithm_name: str,
    description: str,
    author: str = "The sb3_ext authors",
    author_email: str = "none",
    code_permalink: str = "none",
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    data_format: str | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> minari.MinariDataset:
    """
    Write episodes as a local Minari dataset with every metadata field filled.

    Images are stored without JPEG. The dataset appears under its id only when it is complete; until then it lies in a
    hidden folder beside it, so that an interrupted call leaves nothing that could be mistaken for data.

    :param dataset_id: ``namespace/name-v0``
    :param episodes: the episodes, may be a generator
    :param env: environment that users shall rebuild for evaluation; gives spaces, spec and requirements
    :param algorithm_name: what chose the actions
    :param description: what the data is and how it was made
    :param author: who made it
    :param author_email: how to reach them
    :param code_permalink: where the code that made it is
    :param ref_min_score: return of a random policy, for Minari's normalised score
    :param ref_max_score: return of an expert
    :param data_format: ``"hdf5"``, ``"arrow"`` or ``"parquet"``; default: Parquet for images (40 times smaller than
        raw), HDF5 otherwise
    :param metadata: further entries for the dataset's metadata
    :param overwrite: replace a dataset of the same id
    :return: the dataset
    :raises ValueError: if the id is malformed, lacks a version, is taken, or there is no episode
    """
    namespace, final = check_new_id(dataset_id, overwrite)
    spec = plain_spec(env)
    if data_format is None:
        data_format = "parquet" if is_frame_space(env.observation_space) else "hdf5"
    with dataset_folder(final) as partial:
        storage = MinariStorage.new(
            partial / "data",
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_spec=spec,
            data_format=data_format,
            jpeg_encoding=False,
        )
        rewards: list[NDArray[np.float64]] = []

        def numbered() -> Iterator[EpisodeBuffer]:
            for number, episode in enumerate(episodes):
                rewards.append(episode.rewards)
                yield episode.to_minari(number)

        # Minari measures the whole folder after each episode, which makes long logs quadratic to write
        storage.get_size = lambda: 0.0
        storage.update_episodes(numbered())
        del storage.get_size
        if not rewards:
            raise ValueError("No episode to write.")
        storage.update_episode_metadata(
            [{f"rewards_{k}": getattr(np, k)(r).item() for k in ("sum", "mean", "std", "min", "max")} for r in rewards],
            range(len(rewards)),
        )
        facts = {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "algorithm_name": algorithm_name,
            "author": {author},
            "author_email": {author_email},
            "code_permalink": code_permalink,
            "description": description,
            "requirements": requirements(env),
            "eval_env_spec": spec.to_json(),
            "behaviour_return": return_statistics([float(r.sum()) for r in rewards]),
            "python_version": platform.python_version(),
            **(metadata or {}),
        }
        if ref_min_score is not None and ref_max_score is not None:
            facts |= {"ref_min_score": ref_min_score, "ref_max_score": ref_max_score}
        storage.update_metadata({**facts, "dataset_size": float(storage.get_size())})
        ensure_namespace(namespace)
    return minari.load_dataset(dataset_id)
