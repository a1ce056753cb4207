"""Find, open and read Minari datasets without building the environment they name."""

from __future__ import annotations

import difflib
import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage, is_image_space
from minari.serialization import deserialize_space
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray

from sb3_ext.data.checks import ActionSpace, CheckedEpisode, DatasetError, check_episode, check_spaces

DatasetLike: TypeAlias = minari.MinariDataset | str | os.PathLike[str]
_AGAIN = "Delete the dataset and get it again."


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _reading(what: str, which_means: str = "") -> Iterator[None]:
    """Say what cannot be read, why, and what to do about it, instead of the reader's own error."""
    try:
        yield
    except Exception as error:
        raise DatasetError(f"{what} ({_reason(error)}){which_means}. {_AGAIN}") from error


@dataclass(frozen=True)
class Source:
    """
    Where the data lies, which of its episodes are meant, and what its metadata says.

    ``path`` is the folder of the data and of ``metadata.json``, ``name`` the dataset's id. ``episodes`` are numbers, in
    order. Whatever reads raises a :class:`~sb3_ext.data.checks.DatasetError` that names the first bad episode and step;
    ``strict`` is explained at :func:`~sb3_ext.data.checks.check_episode`.
    """

    path: Path
    name: str
    metadata: dict[str, Any]
    episodes: NDArray[np.int64]
    observation_space: spaces.Box
    action_space: ActionSpace

    @property
    def n_actions(self) -> int:
        """Number of discrete actions."""
        assert isinstance(self.action_space, spaces.Discrete)
        return int(self.action_space.n)

    def open(self) -> MinariStorage:
        """Open the data."""
        with _reading(f"{self.name}: the data cannot be opened"):
            return MinariStorage.read(self.path)

    def episode_lengths(self, storage: MinariStorage) -> NDArray[np.int64]:
        """Read how many steps each episode has, ``[n_episodes]``, from the episodes' metadata."""
        numbers, lengths = self.episodes.tolist(), []
        found = iter(storage.get_episode_metadata(numbers))
        for number in numbers:
            with _reading(f"{self.name}, episode {number}: its metadata cannot be read"):
                lengths.append(int(next(found)["total_steps"]))
        return np.array(lengths, np.int64)

    def raw(self, storage: MinariStorage, episodes: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """Read episodes, given by number, one after the other as they are stored, unchecked."""
        if storage.FORMAT == "hdf5":
            found = iter(storage.get_episodes(episodes.tolist()))
        else:
            found = (_read_arrow(storage, number) for number in episodes.tolist())
        for number in episodes.tolist():
            with _reading(f"{self.name}, episode {number} cannot be read", ": the file is damaged or cut short"):
                episode = next(found)
            yield episode

    def read(
        self, storage: MinariStorage, episodes: NDArray[np.int64], lengths: NDArray[np.int64], strict: bool
    ) -> Iterator[CheckedEpisode]:
        """Read and check episodes, given by number and by the steps each must have, one after the other."""
        raw = self.raw(storage, episodes)
        for episode, number, steps in zip(raw, episodes.tolist(), lengths.tolist(), strict=True):
            yield self.check(episode, number, steps, strict)
        if storage.FORMAT != "hdf5":
            import pyarrow  # here, because it takes a second and HDF5 does without

            pyarrow.default_memory_pool().release_unused()  # or it keeps about 100 MB for the process's life

    def check(self, episode: dict[str, Any], number: int, steps: int, strict: bool) -> CheckedEpisode:
        """Check an episode as it is stored, which must have so many steps."""
        checked = check_episode(episode, number, self.name, self.observation_space, self.action_space, strict)
        if len(checked.rewards) != steps:
            raise DatasetError(
                f"{self.name}, episode {number} has {len(checked.rewards)} steps, its metadata says {steps}. {_AGAIN}"
            )
        return checked

    def read_all(self) -> list[CheckedEpisode]:
        """Read and check every episode into RAM, for datasets as small as demonstrations are."""
        storage = self.open()
        return list(self.read(storage, self.episodes, self.episode_lengths(storage), strict=True))

    @property
    def lossy(self) -> str | None:
        """What to say if the images went through JPEG."""
        if not self.metadata.get("jpeg_encoding", True) or not is_image_space(self.observation_space):
            return None
        return (
            f"{self.name}: Minari stored these images as JPEG, which changed pixels. Record with "
            "sb3_ext.data.record, or with jpeg_encoding=False."
        )

    def warn_if_lossy(self) -> None:
        """Warn when the images went through JPEG."""
        if self.lossy:
            warnings.warn(self.lossy, stacklevel=3)


def _decode(column: Any, space: spaces.Space[Any], jpeg: bool) -> NDArray[Any]:
    """Array of an Arrow column as Minari writes it: pictures as JPEG files, other boxes as lists, the rest as it is."""
    if jpeg and is_image_space(space):
        from PIL import Image

        return np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in column.to_pylist()])
    if isinstance(space, spaces.Box):
        return np.array(column.combine_chunks().flatten()).reshape(-1, *space.shape)
    return np.asarray(column)


def _read_arrow(storage: MinariStorage, number: int) -> dict[str, Any]:
    """Read all of an episode; Minari itself stops after its first batch, of 32,768 rows at most."""
    import pyarrow.dataset as arrow  # here, because it takes a second and HDF5 does without

    table = arrow.dataset(
        f"{storage.data_path}/{number}", format=storage.FORMAT, ignore_prefixes=["_", ".", "metadata.json"]
    ).to_table(columns=["observations", "actions", "rewards", "terminations", "truncations"])
    jpeg = bool(storage.metadata.get("jpeg_encoding", True))
    return {
        "observations": _decode(table["observations"], storage.observation_space, jpeg),
        "actions": _decode(table["actions"][:-1], storage.action_space, jpeg),
        **{name: np.asarray(table[name])[:-1] for name in ("rewards", "terminations", "truncations")},
    }


def _similar(name: str) -> tuple[int, str]:
    """Number of datasets on this machine, and a hint at those with a similar name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other datasets that are broken
        try:
            known = list(minari.list_local_datasets())
        except ValueError:  # a folder whose name is no id
            known = []
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return len(known), f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def find_path(dataset: str | os.PathLike[str]) -> Path:
    """
    Find the folder of a dataset's ``metadata.json`` by path or id; an id that is not on this machine is downloaded.

    :raises DatasetError: if there is no such dataset
    :raises TypeError: if it is an environment's id
    """
    path, name = Path(dataset), os.fspath(dataset)
    for candidate in (path, path / "data"):
        if (candidate / "metadata.json").is_file():
            return candidate
    match = DATASET_ID_RE.fullmatch(name)
    local = Path(get_dataset_path(name)) / "data"
    if match and local.is_dir():
        return local
    if name in gym.registry:
        raise TypeError(
            f"{name!r} is an environment id; a dataset is expected here. Pass the environment as env={name!r}."
        )
    if path.exists():
        raise DatasetError(f"{path} is not a Minari dataset: there is no metadata.json in it or in its folder 'data'.")
    if not match or not match["version"]:
        raise DatasetError(
            f"{name!r} is neither an existing path nor a dataset id of the form 'namespace/name-v0'.{_similar(name)[1]}"
        )
    try:
        minari.download_dataset(name)
    except Exception as error:
        n_known, hint = _similar(name)
        raise DatasetError(
            f"The dataset {name!r} is not on this machine ({n_known} are, see `minari list local`) and could not be "
            f"downloaded ({_reason(error)}).{hint}"
        ) from error
    return local


def _read_space(metadata: dict[str, Any], field: str, path: Path, name: str, build_env: bool) -> spaces.Space[Any]:
    if field not in metadata and not build_env:
        raise DatasetError(
            f"{name}: its metadata has no {field}; only its environment knows. Building that runs code the dataset "
            "names: if you trust it, pass build_env=True."
        )
    with _reading(f"{name}: its {field} cannot be read"):
        if field in metadata:
            space: spaces.Space[Any] = deserialize_space(metadata[field])
        else:
            space = getattr(MinariStorage.read(path), field)
    return space


def open_source(dataset: DatasetLike, build_env: bool = False, continuous: bool = False) -> Source:
    """
    Find a dataset, which may be an object, an id (local, else downloaded) or a path, and read its metadata.

    :param build_env: allow building its environment if the metadata lacks its spaces
    :param continuous: accept ``Box`` actions as well
    :raises DatasetError: if it is missing, damaged or of the wrong kind
    :raises TypeError: if it is not a dataset
    """
    if isinstance(dataset, minari.MinariDataset):
        path = Path(dataset.storage.data_path)
    elif isinstance(dataset, (str, os.PathLike)):
        path = find_path(dataset)
    else:
        from stable_baselines3.common.vec_env import VecEnv  # here, because it brings PyTorch

        if isinstance(dataset, (gym.Env, VecEnv)):
            raise TypeError("A dataset is expected here, not an environment. Pass the environment as env=.")
        raise TypeError(f"A dataset is a minari.MinariDataset, an id or a path, not {type(dataset).__name__}.")
    with _reading(f"{path}: metadata.json cannot be read"):
        metadata: dict[str, Any] = MinariStorage.read_raw_metadata(path)
        if not isinstance(metadata, dict) or not isinstance(metadata["total_episodes"], int):
            raise ValueError("total_episodes is missing")
    name = str(metadata.get("dataset_id", path.parent.name))
    observation_space, action_space = check_spaces(
        _read_space(metadata, "observation_space", path, name, build_env),
        _read_space(metadata, "action_space", path, name, build_env),
        name,
        continuous,
    )
    episodes = np.arange(metadata["total_episodes"])
    if isinstance(dataset, minari.MinariDataset):
        episodes = np.asarray(dataset.episode_indices, np.int64)
    if len(episodes) == 0:
        raise DatasetError(f"{name}: the dataset is empty.")
    return Source(path, name, metadata, episodes, observation_space, action_space)


def env_spec(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Fields of the ``EnvSpec`` of a dataset's environment for evaluation, without building it, or None."""
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    spec: dict[str, Any] | None = json.loads(text) if text else None
    return spec
