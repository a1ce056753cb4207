"""Open, check and load Minari datasets, without building their environment unless asked to."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gymnasium as gym
import minari
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage
from minari.serialization import deserialize_space
from minari.storage.datasets_root_dir import get_dataset_path
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext.common.buffers import OfflineReplayBuffer
from sb3_ext.common.frames import ArrayFrames, BlockFrames, BlockWriter, FrameStore, split_stacks
from sb3_ext.data.checks import CheckedEpisode, DatasetError, check_episode, check_spaces
from sb3_ext.data.envs import StackFrames, is_frame_space, stacked_space, to_channel_first
from sb3_ext.data.record import return_statistics

DatasetLike = minari.MinariDataset | str | os.PathLike[str]

STORAGES = ("mmap", "compressed", "ram")
_CACHE_FORMAT = 1
_FRAMES_RAW, _FRAMES_ZSTD = "frames.bin", "frames.zst"


class _NotStacks(Exception):
    """An episode turned out not to consist of overlapping frame stacks."""


@dataclass(frozen=True)
class _Source:
    """Where the data lies, which of its episodes are meant, and what its metadata says."""

    path: Path
    metadata: dict[str, Any]
    episodes: NDArray[np.int64] | None
    observation_space: spaces.Box
    action_space: spaces.Discrete

    @property
    def name(self) -> str:
        return str(self.metadata.get("dataset_id", self.path.parent.name))

    def open(self) -> MinariStorage:
        try:
            return MinariStorage.read(self.path)
        except Exception as error:
            raise DatasetError(
                f"{self.name}: the data cannot be opened ({error}). Delete the dataset and get it again."
            ) from error


def _find_path(dataset: str | os.PathLike[str]) -> Path:
    """Data folder of a dataset given by path or id; an id that is not here is downloaded."""
    path = Path(dataset)
    for candidate in (path, path / "data"):
        if (candidate / "metadata.json").is_file():
            return candidate
    if path.exists():
        raise DatasetError(f"{path} is not a Minari dataset: there is no metadata.json in it or in its folder 'data'.")
    name = os.fspath(dataset)
    if name in gym.registry:
        raise TypeError(
            f"{name!r} is an environment id; a dataset is expected here. Pass the environment as env={name!r}."
        )
    match = DATASET_ID_RE.fullmatch(name)
    if match is None:
        raise DatasetError(f"{name!r} is neither an existing path nor a dataset id of the form 'namespace/name-v0'.")
    local = Path(get_dataset_path(name)) / "data"
    if not local.is_dir():
        try:
            minari.download_dataset(name)
        except Exception as error:
            known = list(minari.list_local_datasets())
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise DatasetError(
                f"The dataset {name!r} is not on this machine ({len(known)} are, see `minari list local`) and could not be "
                f"downloaded ({type(error).__name__}: {error}).{hint}"
            ) from error
    return local


def _open_source(dataset: DatasetLike, build_env: bool = False) -> _Source:
    if isinstance(dataset, (gym.Env, VecEnv)):
        raise TypeError("A dataset is expected here, not an environment. Pass the environment as env=.")
    if not isinstance(dataset, (minari.MinariDataset, str, os.PathLike)):
        raise TypeError(f"A dataset is a minari.MinariDataset, an id or a path, not {type(dataset).__name__}.")
    episodes = None
    if isinstance(dataset, minari.MinariDataset):
        path = Path(dataset.storage.data_path)
        if len(dataset.episode_indices) != dataset.storage.total_episodes:
            episodes = np.asarray(dataset.episode_indices, np.int64)
    else:
        path = _find_path(dataset)
    try:
        metadata = MinariStorage.read_raw_metadata(path)
    except Exception as error:
        raise DatasetError(
            f"{path}: metadata.json cannot be read ({error}). Delete the dataset and get it again."
        ) from error
    name = metadata.get("dataset_id", path.parent.name)
    found: list[spaces.Space[Any]] = []
    for field in ("observation_space", "action_space"):
        if field in metadata:
            found.append(deserialize_space(metadata[field]))
        elif build_env:
            found.append(getattr(minari.MinariDataset(path), field))
        else:
            raise DatasetError(
                f"{name}: its metadata has no {field}; only its environment knows. Building that runs code the dataset names: if you "
                "trust it, pass build_env=True."
            )
    observation_space, action_space = check_spaces(found[0], found[1], name)
    return _Source(path, metadata, episodes, observation_space, action_space)


def choose_episodes(lengths: NDArray[np.int64], subset: float, seed: int) -> NDArray[np.int64]:
    """
    Draw whole episodes from all over a log until they hold a share of its steps.

    :param lengths: steps of each episode, ``[n]``
    :param subset: share of the steps, in (0, 1]
    :param seed: seed of the draw
    :return: positions of the chosen episodes, in the order of the log
    :raises ValueError: if ``subset`` is not in (0, 1]
    """
    if not 0 < subset <= 1:
        raise ValueError(f"subset must be in (0, 1], got {subset}.")
    order = np.random.default_rng(seed).permutation(len(lengths))
    wanted = int(np.searchsorted(np.cumsum(lengths[order]), subset * lengths.sum() - 1e-6)) + 1
    return np.sort(order[:wanted])


def default_frame_stack(space: spaces.Box) -> int:
    """
    Frames per observation if the user does not say.

    :param space: space of the dataset's observations
    :return: 4 for pictures with one channel, 1 for everything else
    """
    return 4 if is_frame_space(space) and to_channel_first(space.low, space).shape[0] == 1 else 1


def _ready_made(space: spaces.Box, frame_stack: int | None) -> int:
    """Frames per stack if the observations may be ready-made stacks, else 1."""
    if not is_frame_space(space):
        return 1
    channels = to_channel_first(space.low, space).shape[0]
    if channels > 1 and channels != 3 and frame_stack in (None, channels):
        return int(channels)
    return int(channels) if channels == 3 and frame_stack == 3 else 1


def _read_episodes(source: _Source, indices: NDArray[np.int64], strict: bool) -> Iterator[CheckedEpisode]:
    storage = source.open()
    episodes = iter(storage.get_episodes(indices.tolist()))
    for index in indices.tolist():
        try:
            episode = next(episodes)
        except StopIteration:
            raise DatasetError(
                f"{source.name}: the data ends before episode {index}. Delete the dataset and get it again."
            ) from None
        except Exception as error:
            raise DatasetError(
                f"{source.name}: episode {index} cannot be read ({type(error).__name__}: {error}). The file is damaged or cut short; "
                "delete the dataset and get it again."
            ) from error
        yield check_episode(episode, index, source.name, source.observation_space, source.action_space, strict)


class _RamSink:
    def __init__(self, n_rows: int) -> None:
        self._n_rows, self._used = n_rows, 0
        self._array: NDArray[Any] | None = None

    def append(self, frames: NDArray[Any]) -> None:
        if self._array is None:
            self._array = np.empty((self._n_rows, *frames.shape[1:]), frames.dtype)
        if self._used + len(frames) > len(self._array):
            raise DatasetError(
                "The metadata's total_steps is smaller than the data. Delete the dataset and get it again."
            )
        self._array[self._used : self._used + len(frames)] = frames
        self._used += len(frames)

    def finish(self) -> FrameStore:
        assert self._array is not None
        return ArrayFrames(self._array[: self._used])


class _FileSink:
    """Raw or compressed frames in a folder."""

    def __init__(self, folder: Path, compressed: bool) -> None:
        self.folder, self.compressed = folder, compressed
        self._file: BinaryIO = (folder / (_FRAMES_ZSTD if compressed else _FRAMES_RAW)).open("wb")
        self._blocks = BlockWriter(self._file) if compressed else None

    def append(self, frames: NDArray[Any]) -> None:
        if self._blocks is not None:
            self._blocks.append(frames)
        else:
            np.ascontiguousarray(frames).tofile(self._file)

    def finish(self) -> None:
        if self._blocks is not None:
            np.save(self.folder / "offsets.npy", self._blocks.finish())
        self._file.close()


@dataclass
class _Arrays:
    """Everything but the frames."""

    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    shape: tuple[int, ...]
    dtype: str
    pad_with_zeros: bool


def _stream(source: _Source, episodes: Iterator[CheckedEpisode], sink: _RamSink | _FileSink, n_frames: int) -> _Arrays:
    """Send the frames to the sink; with ``n_frames`` > 1 the observations are stacks to take apart."""
    actions: list[NDArray[Any]] = []
    rewards: list[NDArray[Any]] = []
    terminated: list[NDArray[Any]] = []
    lengths: list[int] = []
    action_dtype = np.min_scalar_type(int(source.action_space.n) - 1)
    padding: set[bool] = set()
    frames = np.empty(0)
    for episode in episodes:
        frames = to_channel_first(episode.observations, source.observation_space)
        if n_frames > 1:
            parts = split_stacks(frames, n_frames)
            if parts is None:
                raise _NotStacks
            frames = parts[0]
            padding.add(parts[1])
            if len(padding) > 1:
                raise _NotStacks
        if frames.dtype == np.float64:
            frames = frames.astype(np.float32)
        sink.append(frames)
        last = np.zeros(len(frames), bool)
        last[-2] = episode.terminated
        actions.append(np.append(episode.actions, 0).astype(action_dtype))
        rewards.append(np.append(episode.rewards, 0).astype(np.float32))
        terminated.append(last)
        lengths.append(len(frames) - 1)
    return _Arrays(
        np.concatenate(actions),
        np.concatenate(rewards),
        np.concatenate(terminated),
        np.array(lengths, np.int64),
        frames.shape[1:],
        frames.dtype.str,
        padding != {False},
    )


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """
    Where memory-mapped frames are kept.

    :param cache_dir: the folder, if the user names one
    :return: ``cache_dir``, else ``$SB3_EXT_CACHE``, else ``sb3_ext`` in the user's cache folder
    """
    if cache_dir is not None:
        return Path(cache_dir)
    if "SB3_EXT_CACHE" in os.environ:
        return Path(os.environ["SB3_EXT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sb3_ext"


def _cache_key(source: _Source, *options: Any) -> str:
    """Digest of the metadata, of name, size and time of every data file, and of what was asked for."""
    digest = hashlib.sha256(repr((_CACHE_FORMAT, options)).encode())
    digest.update((source.path / "metadata.json").read_bytes())
    if source.episodes is not None:
        digest.update(source.episodes.tobytes())
    stack = [source.path]
    while stack:
        for entry in sorted(os.scandir(stack.pop()), key=lambda e: e.name):
            if entry.is_dir():
                stack.append(Path(entry.path))
            else:
                stat = entry.stat()
                digest.update(f"{entry.path[len(str(source.path)) :]}|{stat.st_size}|{stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:32]


def _open_cache(folder: Path) -> tuple[FrameStore, _Arrays] | None:
    """The cached frames, or None if the folder is not a complete cache."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in manifest["sizes"].items()):
            return None
        with np.load(folder / "arrays.npz") as file:
            arrays = _Arrays(
                *(file[k] for k in ("actions", "rewards", "terminated", "lengths")),
                shape=tuple(manifest["shape"]),
                dtype=manifest["dtype"],
                pad_with_zeros=manifest["pad_with_zeros"],
            )
        n_rows = len(arrays.actions)
        if _FRAMES_ZSTD in manifest["sizes"]:
            data = np.memmap(folder / _FRAMES_ZSTD, np.uint8, "r")
            offsets = np.load(folder / "offsets.npy")
            return BlockFrames(data, offsets, n_rows, arrays.shape, np.dtype(arrays.dtype)), arrays
        frames = np.memmap(folder / _FRAMES_RAW, arrays.dtype, "r", shape=(n_rows, *arrays.shape))
        return ArrayFrames(frames), arrays
    except (FileNotFoundError, KeyError, ValueError):
        return None


def _write_cache(
    source: _Source,
    indices: NDArray[np.int64],
    folder: Path,
    compressed: bool,
    n_frames: int,
    strict: bool,
    n_rows: int,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    frame = np.prod(source.observation_space.shape, dtype=np.int64) * source.observation_space.dtype.itemsize  # type: ignore[union-attr]
    need = int(n_rows * frame) // (n_frames * (8 if compressed else 1))
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise DatasetError(
            f"{source.name}: memory-mapping needs {need / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} GB are free. Use "
            "storage='compressed', a smaller subset, or another cache_dir (environment variable SB3_EXT_CACHE)."
        )
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        sink = _FileSink(partial, compressed)
        try:
            arrays = _stream(source, _read_episodes(source, indices, strict), sink, n_frames)
        finally:
            sink.finish()
        named = {k: getattr(arrays, k) for k in ("actions", "rewards", "terminated", "lengths")}
        np.savez(partial / "arrays.npz", **named)
        manifest = {
            "dataset_id": source.name,
            "shape": arrays.shape,
            "dtype": arrays.dtype,
            "pad_with_zeros": arrays.pad_with_zeros,
            "sizes": {f.name: f.stat().st_size for f in partial.iterdir()},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest))
        if folder.exists():
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            if _open_cache(folder) is None:  # else: another process was faster, and its result is the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(
    source: _Source,
    key: Sequence[Any],
    storage: str,
    folder: Path,
    strict: bool,
    subset: float,
    seed: int,
    n_frames: int,
) -> tuple[FrameStore, _Arrays]:
    target = folder / _cache_key(source, *key, n_frames)
    if storage != "ram" and (cached := _open_cache(target)) is not None:
        return cached
    minari_storage = source.open()
    total = int(minari_storage.total_episodes)
    indices = np.arange(total) if source.episodes is None else source.episodes
    if len(indices) == 0:
        raise DatasetError(f"{source.name}: the dataset is empty.")
    n_rows = int(minari_storage.total_steps) + total
    if subset != 1.0 or source.episodes is not None:
        try:
            lengths = np.array(
                [m["total_steps"] for m in minari_storage.get_episode_metadata(indices.tolist())], np.int64
            )
        except Exception as error:
            raise DatasetError(f"{source.name}: the episodes' metadata cannot be read ({error}).") from error
        chosen = choose_episodes(lengths, subset, seed)
        indices, n_rows = indices[chosen], int((lengths[chosen] + 1).sum())
    if storage == "ram":
        sink = _RamSink(n_rows)
        arrays = _stream(source, _read_episodes(source, indices, strict), sink, n_frames)
        return sink.finish(), arrays
    _write_cache(source, indices, target, storage == "compressed", n_frames, strict, n_rows)
    cached = _open_cache(target)
    assert cached is not None
    return cached


def load_minari(
    dataset: DatasetLike,
    *,
    frame_stack: int | None = None,
    subset: float = 1.0,
    subset_seed: int = 0,
    storage: str = "mmap",
    cache_dir: str | os.PathLike[str] | None = None,
    strict: bool = True,
    build_env: bool = False,
    n_steps: int = 1,
    gamma: float = 0.99,
    device: th.device | str = "auto",
    seed: int | None = None,
) -> OfflineReplayBuffer:
    """
    Load a Minari dataset with discrete actions as a replay buffer.

    Every frame is stored once. The data is checked completely before anything is returned. Nothing the dataset names is
    executed: its environment is not built.

    :param dataset: a ``MinariDataset`` (its episode filter is respected), an id (local, else downloaded) or a path
    :param frame_stack: frames per observation; ready-made stacks are recognised and taken apart; default: 4 for pictures with
        one channel, else 1
    :param subset: share of the steps to use, drawn as whole episodes from all over the log
    :param subset_seed: seed of that draw
    :param storage: ``"mmap"``: frames raw on disk in a cache, opened at once from the second time on, and larger than RAM if
        need be; ``"compressed"``: the same in zstd blocks, 20 to 150 times smaller and a little slower to draw from;
        ``"ram"``: raw in RAM, nothing written to disk
    :param cache_dir: the cache; default ``$SB3_EXT_CACHE``, else the user's cache folder
    :param strict: False accepts episodes of one step, and lets termination win where a step is marked terminated and truncated
    :param build_env: allow building the dataset's environment if the metadata lacks its spaces (runs code it names)
    :param n_steps: see :class:`~sb3_ext.common.buffers.OfflineReplayBuffer`
    :param gamma: likewise
    :param device: likewise
    :param seed: seed of the sampler
    :return: the buffer; ``buffer.info`` says what it holds
    :raises DatasetError: if the data is missing, damaged or invalid; names episode and step, or the field
    :raises TypeError: if it is not a dataset
    :raises ValueError: for an unknown storage or a subset outside (0, 1]
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}.")
    if not 0 < subset <= 1:
        raise ValueError(f"subset must be in (0, 1], got {subset}.")
    if frame_stack is not None and frame_stack < 1:
        raise ValueError(f"frame_stack must be at least 1, got {frame_stack}.")
    source = _open_source(dataset, build_env)
    key = (storage == "compressed", subset, subset_seed, strict)
    n_frames = _ready_made(source.observation_space, frame_stack)
    try:
        frames, arrays = _build(source, key, storage, cache_folder(cache_dir), strict, subset, subset_seed, n_frames)
    except _NotStacks:
        n_frames = 1
        frames, arrays = _build(source, key, storage, cache_folder(cache_dir), strict, subset, subset_seed, n_frames)
    if n_frames > 1:
        stack, space = n_frames, stacked_space(source.observation_space, 1)
    else:
        stack = frame_stack or default_frame_stack(source.observation_space)
        space = stacked_space(source.observation_space, stack)
    buffer = OfflineReplayBuffer(
        frames,
        arrays.actions,
        arrays.rewards,
        arrays.terminated,
        arrays.lengths,
        space,
        source.action_space,
        frame_stack=stack,
        pad_with_zeros=arrays.pad_with_zeros,
        n_steps=n_steps,
        gamma=gamma,
        device=device,
        seed=seed,
    )
    buffer.info = {
        "dataset_id": source.name,
        "env_id": env_id(source.metadata),
        "algorithm_name": source.metadata.get("algorithm_name"),
        "frame_stack": stack,
        "subset": subset,
        "episodes": buffer.n_episodes,
        "steps": buffer.buffer_size,
        "behaviour_return": return_statistics(buffer.episode_returns().tolist()),
    }
    return buffer


def env_id(metadata: dict[str, Any]) -> str | None:
    """
    Read the environment's id from a dataset's metadata without building it.

    :param metadata: raw metadata
    :return: the id, or None
    """
    spec = metadata.get("eval_env_spec") or metadata.get("env_spec")
    return json.loads(spec).get("id") if spec else None


def make_eval_env(
    dataset: DatasetLike, *, n_envs: int = 1, frame_stack: int | None = None, seed: int | None = None, **kwargs: Any
) -> VecEnv:
    """
    Build the environment a dataset was made in, with the observations :func:`load_minari` gives.

    This runs the code that the dataset's metadata names; use it for datasets you trust.

    :param dataset: as in :func:`load_minari`
    :param n_envs: copies
    :param frame_stack: as in :func:`load_minari`
    :param seed: seed of the first copy; the others count up
    :param kwargs: passed to ``gymnasium.make``, for instance ``render_mode="rgb_array"``
    :return: the environment, monitored
    :raises DatasetError: if the dataset does not name an environment
    """
    source = _open_source(dataset)
    text = source.metadata.get("eval_env_spec") or source.metadata.get("env_spec")
    if not text:
        raise DatasetError(
            f"{source.name} does not say which environment it was made in; build it yourself and pass it as env=."
        )
    spec = EnvSpec.from_json(text)
    stack = frame_stack or default_frame_stack(source.observation_space)
    if _ready_made(source.observation_space, frame_stack) > 1:
        stack = 1

    def make() -> gym.Env[Any, Any]:
        env = Monitor(gym.make(spec, **kwargs))
        return StackFrames(env, stack) if stack > 1 or is_frame_space(source.observation_space) else env

    venv = DummyVecEnv([make] * n_envs)
    if seed is not None:
        venv.seed(seed)
    return venv
