"""Frames of a dataset in RAM, or on disk in a cache that opens at once from the second time on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import CheckedEpisode, DatasetError
from sb3_ext.data.envs import to_channel_first
from sb3_ext.data.source import Source
from sb3_ext.files import atomic_folder, make_folder, remove_leftovers
from sb3_ext.replay.frames import PADDING_TYPES, ArrayFrames, BlockFrames, BlockWriter, FrameStore, split_stacks

_FORMAT = 5
_RAW, _ZSTD = "frames.bin", "frames.zst"
_NAMED = ("actions", "rewards", "terminated", "lengths", "returns")


class NotStacks(Exception):
    """An episode turned out not to consist of overlapping frame stacks."""


@dataclass
class Arrays:
    """
    Everything but the frames.

    ``actions`` ``[N]`` or ``[N, *action_shape]``, ``rewards`` and ``terminated`` ``[N]`` are per row, ``lengths`` steps
    per episode, ``returns`` sums of recorded rewards per episode. ``shape`` and ``dtype`` are those of a frame, for
    ``Dict`` observations those of a record with their entries, see :func:`record_dtype`. ``n_frames`` were in the
    stacks that were taken apart: 1 if the observations are stored as they are. ``padding_types`` may stand before an
    episode's first frame: what these stacks show, else any.
    """

    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    returns: NDArray[np.float64]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    n_frames: int
    padding_types: frozenset[str]


class RamSink:
    """Collect frames, ``n_rows`` in all, in one array."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows, self._used = n_rows, 0
        self._array: NDArray[Any] | None = None

    def append(self, frames: NDArray[Any]) -> None:
        """Add frames at the end."""
        if self._array is None:
            self._array = np.empty((self._n_rows, *frames.shape[1:]), frames.dtype)
        self._array[self._used : self._used + len(frames)] = frames
        self._used += len(frames)

    def finish(self) -> FrameStore:
        """Return the frames."""
        assert self._array is not None
        assert self._used == self._n_rows
        return ArrayFrames(self._array)


def record_dtype(space: spaces.Dict) -> np.dtype[Any]:
    """One item that holds all entries of an observation, so that they are read together; aligned, floats as float32."""
    fields = []
    for key, entry in space.spaces.items():
        dtype = np.dtype(entry.dtype) if isinstance(entry, (spaces.Box, spaces.MultiBinary)) else np.dtype(np.int64)
        # one number has a dimension, as in SB3's buffers
        fields.append((key, np.dtype(np.float32) if dtype == np.float64 else dtype, entry.shape or (1,)))
    return np.dtype(fields, align=True)


def _rows_of(observations: Any, space: spaces.Space[Any]) -> NDArray[Any]:
    """Observations of an episode as rows: frames channel first, or records."""
    if isinstance(space, spaces.Dict):
        dtype = record_dtype(space)
        rows = np.zeros(len(next(iter(observations.values()))), dtype)
        for key in space.spaces:
            rows[key] = observations[key].reshape(rows[key].shape)
        return rows
    if isinstance(space, spaces.Discrete):
        return np.asarray(observations)[:, None]
    frames = to_channel_first(observations, space)
    return frames.astype(np.float32) if frames.dtype == np.float64 else frames


def stream(
    source: Source, episodes: Iterable[CheckedEpisode], write: Callable[[NDArray[Any]], None], n_frames: int
) -> Arrays:
    """
    Write the frames of at least one episode, channel first, and collect the rest.

    :param n_frames: more than 1: the observations are stacks of so many frames, to take apart
    :raises NotStacks: if they are not
    """
    space, padding = source.action_space, frozenset(PADDING_TYPES)
    dtype: Any = np.float32 if isinstance(space, spaces.Box) else np.int64
    if isinstance(space, spaces.Discrete):
        dtype = np.min_scalar_type(space.n - 1)
    rows: list[tuple[NDArray[Any], ...]] = []
    returns: list[float] = []
    frames = np.empty(0)
    for episode in episodes:
        frames = _rows_of(episode.observations, source.observation_space)
        if n_frames > 1:
            parts = split_stacks(frames, n_frames)
            if parts is None or not padding & parts[1]:
                raise NotStacks
            frames, padding = parts[0], padding & parts[1]
        write(frames)
        actions = np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]).astype(dtype)
        terminated = np.zeros(len(frames), bool)
        terminated[-2] = episode.terminated
        returns.append(episode.recorded_return)
        rows.append((actions, np.append(episode.rewards, 0).astype(np.float32), terminated))
    lengths = np.array([len(actions) - 1 for actions, *_ in rows], np.int64)
    actions, rewards, terminated = map(np.concatenate, zip(*rows, strict=True))
    shape, kind = frames.shape[1:], frames.dtype
    return Arrays(actions, rewards, terminated, lengths, np.array(returns), shape, kind, n_frames, padding)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where memory-mapped frames are kept: ``cache_dir``, ``$SB3_EXT_CACHE``, or in the user's cache folder."""
    if cache_dir is None:
        cache_dir = os.environ.get("SB3_EXT_CACHE")
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sb3_ext"


def cache_key(source: Source, *options: Any) -> str:
    """
    Name of the cache entry, a digest that changes with the data and with the options that were asked for.

    Of the data, the metadata and the name, size and time of every file count.
    """
    digest = hashlib.sha256(repr((_FORMAT, options)).encode())
    digest.update((source.path / "metadata.json").read_bytes())
    digest.update(source.episodes.tobytes())
    for folder, subfolders, names in os.walk(source.path):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            stat = file.stat()
            place = file.relative_to(source.path).as_posix()
            digest.update(f"{place}|{stat.st_size}|{stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:32]


def _read_dtype(descr: Any) -> np.dtype[Any]:
    """Undo ``dtype_to_descr``, after JSON has made lists of its tuples."""

    def tuples(x: Any) -> Any:
        return tuple(map(tuples, x)) if isinstance(x, list) else x

    return np.lib.format.descr_to_dtype([tuples(x) for x in descr] if isinstance(descr, list) else descr)


def open_cache(folder: Path) -> tuple[FrameStore, Arrays] | None:
    """Open a cache entry: frames, which stay on disk, and the rest; None if it is missing, incomplete or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in manifest["sizes"].items()):
            return None
        with np.load(folder / "arrays.npz") as file:
            offsets, named = file["offsets"], {name: file[name] for name in _NAMED}
        shape, dtype = tuple(manifest["shape"]), _read_dtype(manifest["dtype"])
        n_frames, padding = manifest["n_frames"], frozenset(manifest["padding_types"])
        arrays = Arrays(**named, shape=shape, dtype=dtype, n_frames=n_frames, padding_types=padding)
        n_rows = len(arrays.actions)
        if _ZSTD in manifest["sizes"]:
            return BlockFrames(np.memmap(folder / _ZSTD, np.uint8, "r"), offsets, n_rows, shape, dtype), arrays
        return ArrayFrames(np.memmap(folder / _RAW, dtype, "r", shape=(n_rows, *shape))), arrays
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return None


def _check_space(source: Source, folder: Path, n_rows: int, n_frames: int, compressed: bool) -> None:
    space = source.observation_space
    if isinstance(space, spaces.Dict):
        size = record_dtype(space).itemsize
    else:
        size = int(np.prod(space.shape, dtype=np.int64)) * np.dtype(space.dtype).itemsize
    need = n_rows * size // (n_frames * (8 if compressed else 1))
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DatasetError(
            f"{source.name}: memory-mapping needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free. Use "
            "storage='compressed', a smaller subset, or another cache_dir (environment variable SB3_EXT_CACHE)."
        )


def write_cache(
    source: Source, episodes: Iterable[CheckedEpisode], folder: Path, n_rows: int, n_frames: int, compressed: bool
) -> None:
    """
    Write a cache entry, which appears under its name only when it is complete; see :func:`stream`.

    :raises DatasetError: if the data is bad, or ``n_rows`` frames do not fit on the disk, which is seen beforehand
    """
    make_folder(folder.parent)
    remove_leftovers(folder.parent)
    _check_space(source, folder.parent, n_rows, n_frames, compressed)
    with atomic_folder(folder, good=lambda found: open_cache(found) is not None) as partial:
        with (partial / (_ZSTD if compressed else _RAW)).open("wb") as file:
            offsets = np.empty(0, np.int64)
            if compressed:
                blocks = BlockWriter(file)
                arrays = stream(source, episodes, blocks.append, n_frames)
                offsets = blocks.finish()
            else:
                arrays = stream(source, episodes, lambda frames: np.ascontiguousarray(frames).tofile(file), n_frames)
        np.savez(partial / "arrays.npz", offsets=offsets, **{name: getattr(arrays, name) for name in _NAMED})
        manifest = {
            "dataset_id": source.name,
            "shape": arrays.shape,
            "dtype": np.lib.format.dtype_to_descr(arrays.dtype),
            "n_frames": arrays.n_frames,
            "padding_types": sorted(arrays.padding_types),
            "sizes": {f.name: f.stat().st_size for f in partial.iterdir()},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest))
