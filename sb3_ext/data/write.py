"""Write episodes as a Minari dataset, losslessly and all or nothing."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.envs import is_frame_space
from sb3_ext.data.folders import dataset_folder, ensure_namespace
from sb3_ext.data.trees import are_texts, leaves
from sb3_ext.files import remove_leftovers
from sb3_ext.replay.frames import pack_frames, unpack_frames

_FORMATS = ("arrow", "hdf5", "parquet")
_ACTIONS = (spaces.Discrete, spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)
WORDS = spaces.Text(512, min_length=0, charset="".join(map(chr, range(32, 127))))
"""Space under which texts are stored whose own space says nothing of them, such as the missions of MiniGrid."""
_OBSERVERS = (
    "sb3_ext.data.record:EpisodeRecorder",
    "sb3_ext.data.dqn_replay.log:ReplayLogger",
    "stable_baselines3.common.monitor:Monitor",
)
"""Wrappers that change nothing, so that the dataset's environment needs none of them."""

PackedFrames: TypeAlias = tuple[bytes, tuple[int, ...], str]
Packed: TypeAlias = "PackedFrames | list[str] | dict[str, Packed] | tuple[Packed, ...]"


def pack_observations(observations: Any) -> Packed:
    """
    Compress the observations of an episode.

    :param observations: an array ``[T + 1, ...]``, a list of texts, or a dictionary or tuple of observations
    :return: the same structure with each array compressed
    """
    if isinstance(observations, dict):
        return {key: pack_observations(part) for key, part in observations.items()}
    if isinstance(observations, tuple):
        return tuple(map(pack_observations, observations))
    return observations if isinstance(observations, list) else pack_frames(observations)


def unpack_observations(packed: Packed) -> Any:
    """Undo :func:`pack_observations`; the arrays are read-only."""
    if isinstance(packed, dict):
        return {key: unpack_observations(part) for key, part in packed.items()}
    if isinstance(packed, list):
        return packed
    parts: tuple[Any, ...] = packed
    if parts and isinstance(parts[0], bytes):
        return unpack_frames(*parts)
    return tuple(unpack_observations(part) for part in parts)


@dataclass(frozen=True)
class Episode:
    """
    One recorded episode of T steps.

    :param packed: the observations, see :func:`pack_observations`
    :param actions: ``[T]`` or ``[T, ...]``
    :param rewards: ``[T]``, as the environment gave them
    :param terminated: whether the last step ended the task
    :param seed: the seed the environment was reset with, if any
    """

    packed: Packed
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: bool
    seed: int | None

    @property
    def observations(self) -> Any:
        """
        Decompress the observations.

        They are ``[T + 1, ...]``; T + 1 texts in a list if the space is ``Text``; for ``Dict`` and ``Tuple`` a
        dictionary or tuple of such parts.
        """
        return unpack_observations(self.packed)

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


def stored_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Space that Minari can write down for what an environment shows: other spaces of texts become :data:`WORDS`."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: stored_space(part) for key, part in space.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([stored_space(part) for part in space.spaces])
    return WORDS if are_texts(space) and not isinstance(space, spaces.Text) else space


def _bad_key(key: Any, data_format: str) -> bool:
    """Tell keys that Minari's storage would lose; HDF5 takes them as paths."""
    return not isinstance(key, str) or (data_format == "hdf5" and (key in ("", ".") or "/" in key or "\0" in key))


def _obstacle(space: spaces.Space[Any], data_format: str) -> str:
    """Say why a format cannot hold a space, or nothing."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces if isinstance(space, spaces.Dict) else {str(k): part for k, part in enumerate(space)}
        if not parts and data_format != "hdf5":
            return f"{space} is empty"
        bad = [key for key in parts if _bad_key(key, data_format)]
        if bad:
            return f"the key {bad[0]!r} is no name there"
        return next((why for part in parts.values() if (why := _obstacle(part, data_format))), "")
    if isinstance(space, spaces.Text):
        surrogates = any("\ud800" <= c <= "\udfff" for c in space.characters)
        if surrogates or (data_format == "hdf5" and "\0" in space.characters):
            return f"the characters of {space!a} are no text there"
    elif isinstance(space, _ACTIONS):
        if 0 in (space.shape or ()) or space.dtype.kind not in "biuf" or space.dtype.itemsize > 8:
            return f"arrays of shape {space.shape} and type {space.dtype} cannot be stored"
    elif not are_texts(space):
        return f"{space} is none of Box, Discrete, MultiDiscrete, MultiBinary, Text, and Dict and Tuple of those"
    return ""


def choose_format(dataset_id: str, env: gym.Env[Any, Any], data_format: str | None = None) -> str:
    """
    Choose the format of a new dataset, or make sure that the one that is wanted can hold it.

    :param dataset_id: for the message
    :param env: environment of the dataset
    :param data_format: see :func:`write_dataset`
    :return: the format; Parquet for pictures, also those in a ``Dict`` or ``Tuple``, HDF5 otherwise; the other one
        where only that can hold the observations
    :raises DatasetError: if none can, or not the one that is wanted
    :raises ValueError: if there is no format of that name
    """
    if data_format is not None and data_format not in _FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(_FORMATS)}, not {data_format!r}.")
    space = env.observation_space
    pictures = any(is_frame_space(entry) for _, entry in leaves(space))
    preferred = ("parquet", "hdf5") if pictures else ("hdf5", "parquet")
    tried = preferred if data_format is None else (data_format,)
    for name in tried:
        if not _obstacle(space, name):
            break
    else:
        able = [other for other in preferred if not _obstacle(space, other)]
        remedy = f"Pass data_format={able[0]!r}." if able else "Record through a wrapper that changes them."
        raise DatasetError(
            f"{dataset_id}: {tried[0]} cannot hold the observations {space!a}: {_obstacle(space, tried[0])}. {remedy}"
        )
    actions = env.action_space
    if not isinstance(actions, _ACTIONS) or _obstacle(actions, name):
        raise DatasetError(
            f"{dataset_id}: the actions are {actions}; Discrete, Box, MultiDiscrete and MultiBinary can be recorded."
        )
    return name


def check_new_dataset(
    dataset_id: str, env: gym.Env[Any, Any], data_format: str | None = None, overwrite: bool = False
) -> None:
    """
    Make sure that a dataset of an environment can be written and loaded again, before anything is played for it.

    :param dataset_id: see :func:`write_dataset`
    :param env: see :func:`write_dataset`
    :param data_format: see :func:`write_dataset`
    :param overwrite: see :func:`write_dataset`
    :raises DatasetError: if observations or actions are of a space that cannot be stored or loaded
    :raises ValueError: if the id or the format is none, the id is taken, or the environment has no spec that can be
        stored
    """
    check_new_id(dataset_id, overwrite)
    choose_format(dataset_id, env, data_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when the dataset is written
        plain_spec(env)


def requirements(env: gym.Env[Any, Any]) -> list[str]:
    """
    Pip requirements, ``name==version``, of an environment.

    They are the packages that its entry point, its class and its wrappers' classes come from, and gymnasium.
    """
    owners = importlib.metadata.packages_distributions()
    modules, layer = {"gymnasium", type(env.unwrapped).__module__.split(".")[0]}, env
    if env.spec is not None and env.spec.entry_point is not None:
        entry = env.spec.entry_point
        modules.add((entry if isinstance(entry, str) else entry.__module__).split(":")[0].split(".")[0])
    while isinstance(layer, gym.Wrapper):
        modules.add(type(layer).__module__.split(".")[0])
        layer = layer.env
    names = {name for module in modules for name in owners.get(module, [])}
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(names)]


def _fitted(values: Any, space: spaces.Space[Any], data_format: str) -> Any:
    """
    Bring one episode's observations or actions to the types of their space where the format keeps no others.

    :raises ValueError: if that would change a value, or a text is none of :data:`WORDS`
    """
    if isinstance(space, spaces.Dict):
        return {key: _fitted(values[key], part, data_format) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_fitted(v, part, data_format) for v, part in zip(values, space.spaces, strict=True))
    if are_texts(space):
        odd = [] if isinstance(space, spaces.Text) else [text for text in set(values) if text not in WORDS]
        if odd:
            raise ValueError(f"A text must have at most {WORDS.max_length} ASCII characters, not {sorted(odd)[0]!r}.")
        return values
    values = np.asarray(values)
    if data_format == "hdf5" or values.dtype == space.dtype:
        return values
    with np.errstate(invalid="ignore"):
        converted = values.astype(space.dtype)
    if not np.array_equal(converted, values, equal_nan=True):
        raise ValueError(
            f"The environment's {values.dtype} values do not fit the {space.dtype} of {space}, which is all that "
            f'{data_format} keeps. Pass data_format="hdf5".'
        )
    return converted


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
        raw), HDF5 otherwise, see :func:`choose_format`
    :param metadata: further entries for the dataset's metadata
    :param overwrite: replace a dataset of the same id
    :return: the dataset
    :raises DatasetError: if observations or actions are of a space that the format cannot hold
    :raises ValueError: if the id is malformed, lacks a version, is taken, there is no episode, or values do not fit
        their space
    """
    namespace, final = check_new_id(dataset_id, overwrite)
    spec = plain_spec(env)
    data_format = choose_format(dataset_id, env, data_format)
    with dataset_folder(final) as partial:
        storage = MinariStorage.new(
            partial / "data",
            observation_space=stored_space(env.observation_space),
            action_space=env.action_space,
            env_spec=spec,
            data_format=data_format,
            jpeg_encoding=False,
        )
        rewards: list[NDArray[np.float64]] = []

        def numbered() -> Iterator[EpisodeBuffer]:
            for number, episode in enumerate(episodes):
                rewards.append(episode.rewards)
                buffer = episode.to_minari(number)
                yield replace(
                    buffer,
                    observations=_fitted(buffer.observations, env.observation_space, data_format),
                    actions=_fitted(buffer.actions, env.action_space, data_format),
                )

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
