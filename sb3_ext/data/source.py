"""Find, open and read Minari datasets without building the environment they name."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage, is_image_space
from minari.serialization import deserialize_space
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray

from sb3_ext.data.checks import (
    ActionSpace,
    CheckedEpisode,
    DatasetError,
    check_action_space,
    check_episode,
    outside_bounds,
)
from sb3_ext.data.transforms.pipeline import Pipeline, TransformLike
from sb3_ext.data.trees import flat_observations, leaves, short_space

DatasetLike: TypeAlias = minari.MinariDataset | str | os.PathLike[str]
_AGAIN = "Delete the dataset and get it again."
_PARTS = ("observations", "actions", "rewards", "terminations", "truncations")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _reading(what: str, which_means: str = "") -> Iterator[None]:
    """Say what cannot be read, why, and what to do about it, instead of the reader's own error."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{what}: {error}") from error
    except ImportError as error:
        raise DatasetError(f"{what}: a package is missing ({error}). Install it: pip install {error.name}") from error
    except Exception as error:
        raise DatasetError(f"{what} ({_reason(error)}){which_means}. {_AGAIN}") from error


class Storage(Protocol):
    """Episodes as a file format keeps them; entries of an observation are nested as its space is."""

    def facts(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Metadata of episodes, one after the other; ``total_steps`` at least."""
        ...

    def episode(self, number: int) -> dict[str, Any]:
        """``observations``, ``actions``, ``rewards``, ``terminations`` and ``truncations`` of an episode."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether pictures are kept as JPEG."""
        ...


def _pictures(files: Iterable[Any]) -> NDArray[Any]:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(bytes(file)))) for file in files])


class _Hdf5Storage:
    """Minari's ``main_data.hdf5``; pictures are raw there or JPEG files, which the data itself tells."""

    def __init__(self, path: Path, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        import h5py  # here, because it is not needed for the other formats

        self._file = h5py.File(path / "main_data.hdf5", "r")
        self._spaces = {"observations": observation_space, "actions": action_space}

    def facts(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """See :meth:`Storage.facts`."""
        return (dict(self._file[f"episode_{number}"].attrs) for number in numbers)

    def episode(self, number: int) -> dict[str, Any]:
        """See :meth:`Storage.episode`."""
        group = self._file[f"episode_{number}"]
        return {
            name: self._column(group[name], self._spaces[name]) if name in self._spaces else group[name][()]
            for name in _PARTS
        }

    def _column(self, place: Any, space: spaces.Space[Any]) -> Any:
        if isinstance(space, (spaces.Dict, spaces.Tuple)) != hasattr(place, "keys"):
            _refuse_structure(space, "entries" if hasattr(place, "keys") else "one array")
        if isinstance(space, spaces.Dict):  # entries that are missing are noticed where episodes are checked
            return {key: self._column(place[key], entry) for key, entry in space.spaces.items() if key in place}
        if isinstance(space, spaces.Tuple):
            return tuple(self._column(place[f"_index_{k}"], entry) for k, entry in enumerate(space.spaces))
        if isinstance(space, spaces.Text):
            return place.asstr()[()]
        if self._is_jpeg(place, space):
            return _pictures(place[()])
        return place[()]

    @staticmethod
    def _is_jpeg(place: Any, space: spaces.Space[Any]) -> bool:
        """Whether a file per picture is stored; a raw column has the dimensions of the pictures, too."""
        return bool(is_image_space(space) and place.ndim <= 2)

    @property
    def lossy(self) -> bool:
        """See :meth:`Storage.lossy`."""
        first = next(iter(self._file.values()), None)
        return first is not None and self._any_jpeg(first["observations"], self._spaces["observations"])

    def _any_jpeg(self, place: Any, space: spaces.Space[Any]) -> bool:
        if isinstance(space, spaces.Dict):
            return any(self._any_jpeg(place[key], entry) for key, entry in space.spaces.items() if key in place)
        if isinstance(space, spaces.Tuple):
            return any(self._any_jpeg(place[f"_index_{k}"], entry) for k, entry in enumerate(space.spaces))
        return self._is_jpeg(place, space)


class _ArrowStorage:
    """Minari's folder per episode of Arrow or Parquet files, all of them; Minari itself reads the first 32,768 rows."""

    def __init__(
        self, path: Path, file_format: str, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        self._path, self._format = path, file_format
        self._spaces = {"observations": observation_space, "actions": action_space}

    def facts(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """See :meth:`Storage.facts`."""
        return (json.loads((self._path / str(number) / "metadata.json").read_text()) for number in numbers)

    def episode(self, number: int) -> dict[str, Any]:
        """See :meth:`Storage.episode`."""
        table = self._table(number)
        return {
            "observations": _decode(table["observations"].combine_chunks(), self._spaces["observations"]),
            "actions": _decode(table["actions"][:-1].combine_chunks(), self._spaces["actions"]),
            **{name: np.asarray(table[name])[:-1] for name in _PARTS[2:]},
        }

    def _table(self, number: int) -> Any:
        import pyarrow.dataset as arrow  # here, because it takes a second and HDF5 does without

        place, prefixes = str(self._path / str(number)), ["_", ".", "metadata.json"]
        return arrow.dataset(place, format=self._format, ignore_prefixes=prefixes).to_table(columns=list(_PARTS))

    @property
    def lossy(self) -> bool:
        """See :meth:`Storage.lossy`."""
        folders = [folder for folder in self._path.iterdir() if folder.name.isdigit()]
        if not folders:
            return False
        return _any_binary(self._table(int(folders[0].name))["observations"].type)


def _any_binary(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(_any_binary(kind.field(k).type) for k in range(kind.num_fields))
    return bool(types.is_binary(kind))


def _refuse_structure(space: spaces.Space[Any], stored: str) -> None:
    raise DatasetError(
        f"the metadata says that observations are {short_space(space)}, the file has {stored}. They are of different "
        "datasets; write the dataset again."
    )


def _decode(column: Any, space: spaces.Space[Any]) -> Any:
    """Arrays of an Arrow column: a struct's entries, pictures that are JPEG files, boxes that are lists, the rest."""
    import pyarrow.types as types

    if isinstance(space, (spaces.Dict, spaces.Tuple)) != types.is_struct(column.type):
        _refuse_structure(space, "entries" if types.is_struct(column.type) else "one array")
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        names = [column.type.field(k).name for k in range(column.type.num_fields)]
        entries = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        found = {key: _decode(column.field(str(key)), entry) for key, entry in entries if str(key) in names}
        return found if isinstance(space, spaces.Dict) else tuple(found[k] for k in range(len(space.spaces)))
    if isinstance(space, spaces.Text):
        return column.to_pylist()
    if types.is_binary(column.type):
        return _pictures(column.to_pylist())
    if isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)) and types.is_nested(column.type):
        return np.asarray(column.flatten()).reshape(len(column), *space.shape)
    return column.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Source:
    """
    Where the data lies, which of its episodes are meant, what its metadata says, and what is made of it.

    ``path`` is the folder of the data and of ``metadata.json``, ``name`` the dataset's id. ``episodes`` are numbers, in
    order. Whatever reads raises a :class:`~sb3_ext.data.checks.DatasetError` that names the first bad episode and step;
    ``strict`` is explained at :func:`~sb3_ext.data.checks.check_episode`. ``notices`` counts what was put right.
    """

    path: Path
    name: str
    metadata: dict[str, Any]
    episodes: NDArray[np.int64]
    recorded_observations: spaces.Space[Any]
    recorded_actions: ActionSpace
    transforms: Sequence[TransformLike] | TransformLike | None = None
    notices: Counter[str] = field(default_factory=Counter)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The transforms, which may need to look at the data for their vocabulary."""
        texts = self._recorded_texts
        return Pipeline(self.transforms, self.recorded_observations, self.recorded_actions, self.name, texts)

    def _recorded_texts(self) -> Iterator[Any]:
        storage = self.open()
        for episode in self.raw(storage, self.episodes):
            yield flat_observations(episode["observations"], self.recorded_observations)

    @property
    def observation_space(self) -> Any:
        """Of what is read: flat, and through the transforms."""
        return self.pipeline.observation_space

    @property
    def action_space(self) -> ActionSpace:
        """Of what is read."""
        return check_action_space(self.pipeline.action_space, self.name)

    @property
    def n_actions(self) -> int:
        """Number of discrete actions."""
        assert isinstance(self.action_space, spaces.Discrete)
        return int(self.action_space.n)

    def open(self) -> Storage:
        """Open the data."""
        file_format = str(self.metadata.get("data_format", "hdf5"))
        recorded = self.recorded_observations, self.recorded_actions
        with _reading(f"{self.name}: the data cannot be opened"):
            if file_format == "hdf5":
                return _Hdf5Storage(self.path, *recorded)
            if file_format in ("arrow", "parquet"):
                return _ArrowStorage(self.path, file_format, *recorded)
        raise DatasetError(f"{self.name}: its data_format is {file_format!r}; hdf5, arrow and parquet can be read.")

    def facts(self, storage: Storage) -> list[dict[str, Any]]:
        """Read the episodes' metadata."""
        numbers, facts = self.episodes.tolist(), []
        found = iter(storage.facts(numbers))
        for number in numbers:
            with _reading(f"{self.name}, episode {number}: its metadata cannot be read"):
                facts.append(next(found))
        return facts

    def episode_lengths(self, storage: Storage) -> NDArray[np.int64]:
        """Read how many steps each episode has, ``[n_episodes]``, from the episodes' metadata."""
        lengths = []
        for number, facts in zip(self.episodes.tolist(), self.facts(storage), strict=True):
            with _reading(f"{self.name}, episode {number}: its metadata cannot be read"):
                lengths.append(int(facts["total_steps"]))
        return np.array(lengths, np.int64)

    def raw(self, storage: Storage, episodes: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """Read episodes, given by number, one after the other as they are stored, unchecked."""
        for number in episodes.tolist():
            with _reading(f"{self.name}, episode {number} cannot be read", ": the file is damaged or cut short"):
                episode = storage.episode(number)
            yield episode

    def read(
        self, storage: Storage, episodes: NDArray[np.int64], lengths: NDArray[np.int64], strict: bool
    ) -> Iterator[CheckedEpisode]:
        """Read and check episodes, given by number and by the steps each must have, one after the other."""
        raw = self.raw(storage, episodes)
        for episode, number, steps in zip(raw, episodes.tolist(), lengths.tolist(), strict=True):
            yield self.check(episode, number, steps, strict)
        if isinstance(storage, _ArrowStorage):
            import pyarrow  # here, because it takes a second and HDF5 does without

            pyarrow.default_memory_pool().release_unused()  # or it keeps about 100 MB for the process's life
        if self.notices["actions"] and self.notices["clipped"] == self.notices["actions"]:
            raise DatasetError(
                f"{self.name}: all actions are outside {self.recorded_actions}, so that clipping would leave nothing "
                "of them. They are probably in other units: write the dataset again with actions in the space's."
            )

    def check(self, episode: dict[str, Any], number: int, steps: int, strict: bool) -> CheckedEpisode:
        """Check an episode as it is stored, which must have so many steps, and put it through the transforms."""
        pipeline, recorded = self.pipeline, (self.recorded_observations, self.recorded_actions)
        checked = check_episode(episode, number, self.name, *recorded, strict, pipeline.clips_actions, self.notices)
        if len(checked.rewards) != steps:
            raise DatasetError(
                f"{self.name}, episode {number} has {len(checked.rewards)} steps, its metadata says {steps}. {_AGAIN}"
            )
        if pipeline.changes_nothing:
            return checked
        if pipeline.clips_actions and isinstance(self.recorded_actions, spaces.Box):
            outside = outside_bounds(checked.actions, self.recorded_actions).reshape(steps, -1).any(axis=1)
            self.notices["clipped"] += int(outside.sum())
            self.notices["actions"] += steps
        try:
            return CheckedEpisode(
                pipeline.observations(checked.observations),
                pipeline.actions(checked.actions),
                pipeline.rewards(checked.rewards),
                checked.terminated,
                checked.recorded_return,
            )
        except DatasetError as error:
            raise DatasetError(f"{self.name}, episode {number}: {error}") from error

    def read_all(self) -> list[CheckedEpisode]:
        """Read and check every episode into RAM, for datasets as small as demonstrations are."""
        storage = self.open()
        return list(self.read(storage, self.episodes, self.episode_lengths(storage), strict=False))

    @cached_property
    def lossy(self) -> str | None:
        """What to say if the pictures went through JPEG."""
        pictures = any(is_image_space(entry) for _, entry in leaves(self.recorded_observations))
        if not pictures or self.metadata.get("jpeg_encoding") is False or not self.open().lossy:
            return None
        return (
            f"{self.name}: Minari stored these images as JPEG, which changed pixels. Record with "
            "sb3_ext.data.record, or with jpeg_encoding=False."
        )

    def found(self) -> list[str]:
        """What is worth a notice: how the data differs from what an agent gets."""
        notices = [self.lossy] if self.lossy else []
        if self.pipeline.dropped_text:
            names = ", ".join(map(repr, self.pipeline.dropped_text))
            notices.append(
                f"{self.name}: the text in {names} is left out. transforms=['tokens'] turns it into numbers of words."
            )
        if count := self.notices["both ends"]:
            notices.append(
                f"{self.name}: {count} episodes end with a step that is both terminated and truncated. Termination "
                "wins; strict=True refuses them."
            )
        if count := self.notices["one step"]:
            notices.append(f"{self.name}: {count} episodes have one step only. strict=True refuses them.")
        if count := self.notices["clipped"]:
            share = count / self.notices["actions"]
            notices.append(
                f"{self.name}: {share:.2%} of the steps had actions outside their bounds, which are clipped."
            )
        return notices

    def warn(self) -> None:
        """Give the notices, once each."""
        for notice in self.found():
            warnings.warn(notice, stacklevel=3)


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


def install_line(metadata: dict[str, Any], missing: str | None = None) -> str:
    """Say which command installs what the environment of a dataset needs."""
    needs = [str(need) for need in metadata.get("requirements") or []]
    package = missing.split(".")[0] if missing else None
    named = [need for need in needs if package and re.split(r"[<>=!~\[ ]", need)[0].replace("-", "_") == package]
    wanted = named or needs or ([package] if package else [])
    return f"pip install {' '.join(f'{need!r}' if re.search('[<>!~ ]', need) else need for need in wanted)}"


@contextmanager
def building(metadata: dict[str, Any], name: str) -> Iterator[None]:
    """Name the missing package where the environment of a dataset cannot be built."""
    try:
        yield
    except (ImportError, gym.error.Error) as error:
        missing = getattr(error, "name", None)
        package = missing if isinstance(missing, str) else None
        module = str((env_spec(metadata) or {}).get("entry_point") or "").partition(":")[0] or None
        raise DatasetError(
            f"{name}: its environment cannot be built ({_reason(error)}). Install what it needs: "
            f"{install_line(metadata, package or module)}"
        ) from error


def _read_space(metadata: dict[str, Any], field: str, path: Path, name: str, build_env: bool) -> spaces.Space[Any]:
    if field in metadata:
        with _reading(f"{name}: its {field} cannot be read"):
            space: spaces.Space[Any] = deserialize_space(metadata[field])
        return space
    if not build_env:
        raise DatasetError(
            f"{name}: its metadata has no {field}; only its environment knows. Building that runs code the dataset "
            "names: if you trust it, pass build_env=True (on the command line --build-env)."
        )
    if env_spec(metadata) is None:
        raise DatasetError(f"{name}: its metadata has no {field} and names no environment. Write the dataset again.")
    with building(metadata, name):
        return getattr(MinariStorage.read(path), field)  # type: ignore[no-any-return]


def open_source(
    dataset: DatasetLike,
    build_env: bool = False,
    transforms: Sequence[TransformLike] | TransformLike | None = None,
) -> Source:
    """
    Find a dataset, which may be an object, an id (local, else downloaded) or a path, and read its metadata.

    :param build_env: allow building its environment if the metadata lacks its spaces
    :param transforms: see :func:`~sb3_ext.load_minari`
    :raises DatasetError: if it is missing, damaged or of the wrong kind, or a transform does not fit
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
        metadata: dict[str, Any] = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        if not isinstance(metadata, dict) or not isinstance(metadata["total_episodes"], int):
            raise ValueError("total_episodes is missing")
    name = str(metadata.get("dataset_id", path.parent.name))
    observation_space = _read_space(metadata, "observation_space", path, name, build_env)
    action_space = check_action_space(_read_space(metadata, "action_space", path, name, build_env), name)
    episodes = np.arange(metadata["total_episodes"])
    if isinstance(dataset, minari.MinariDataset):
        episodes = np.asarray(dataset.episode_indices, np.int64)
    if len(episodes) == 0:
        raise DatasetError(f"{name}: the dataset is empty.")
    source = Source(path, name, metadata, episodes, observation_space, action_space, transforms)
    source.pipeline  # noqa: B018 - what does not fit is seen here
    return source


def open_for_agent(
    dataset: DatasetLike,
    observation_space: spaces.Space[Any],
    transforms: Sequence[TransformLike] | TransformLike | None = None,
) -> Source:
    """
    Open a dataset for an agent in an environment: through its transforms, if it has some.

    ``Dict`` observations are flattened for an agent that sees gymnasium's ``FlattenObservation`` of them.
    """
    source = open_source(dataset, transforms=transforms)
    if (
        transforms
        or not isinstance(source.observation_space, spaces.Dict)
        or isinstance(observation_space, spaces.Dict)
    ):
        return source
    flat = replace(source, transforms="flatten", notices=Counter())
    return flat if flat.observation_space.shape == observation_space.shape else source


def env_spec(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Fields of the ``EnvSpec`` of a dataset's environment for evaluation, without building it, or None."""
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    spec: dict[str, Any] | None = json.loads(text) if text else None
    return spec
