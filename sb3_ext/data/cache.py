"""Frames of a dataset in RAM, or on disk in a cache that opens at once from the second time on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import ActionSpace, CheckedEpisode, DatasetError
from sb3_ext.data.envs import to_channel_first
from sb3_ext.data.source import Source
from sb3_ext.files import atomic_folder, make_folder, remove_leftovers
from sb3_ext.replay.frames import PADDING_TYPES, ArrayFrames, BlockFrames, BlockWriter, FrameStore, split_stacks

_FORMAT = 3
_RAW, _ZSTD = "frames.bin", "frames.zst"
_NAMED = ("actions", "rewards", "terminated", "lengths")


class NotStacks(Exception):
    """An episode turned out not to consist of overlapping frame stacks."""


@dataclass
class Arrays:
    """
    Everything but the frames.

    :param actions: per row, ``[N]``, or ``[N, *action_shape]`` if they are continuous
    :param rewards: per row, ``[N]``
    :param terminated: per row, ``[N]``
    :param lengths: steps per episode
    :param shape: shape of a frame
    :param dtype: dtype of a frame
    :param n_frames: frames in the stacks that were taken apart; 1 if the observations are stored as they are
    :param padding_types: what may stand before an episode's first frame: what these stacks show, else any
    """

    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    shape: tuple[int, ...]
    dtype: str
    n_frames: int
    padding_types: frozenset[str]


class RamSink:
    """
    Collect frames in one array.

    :param n_rows: number of frames that will come
    """

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


class FileSink:
    """
    Write frames to a file, raw or compressed.

    :param file: binary file open for writing
    :param compressed: whether to compress them
    """

    def __init__(self, file: BinaryIO, compressed: bool) -> None:
        self._file = file
        self._blocks = BlockWriter(file) if compressed else None

    def append(self, frames: NDArray[Any]) -> None:
        """Add frames at the end."""
        if self._blocks is not None:
            self._blocks.append(frames)
        else:
            np.ascontiguousarray(frames).tofile(self._file)

    def finish(self) -> NDArray[np.int64]:
        """Return the offsets of the compressed blocks; empty for raw frames."""
        return self._blocks.finish() if self._blocks is not None else np.empty(0, np.int64)


def stream(
    episodes: Iterable[CheckedEpisode],
    observation_space: spaces.Box,
    action_space: ActionSpace,
    sink: RamSink | FileSink,
    n_frames: int,
) -> Arrays:
    """
    Send the frames of all episodes to a sink and collect the rest.

    :param episodes: at least one
    :param observation_space: of the dataset
    :param action_space: of the dataset
    :param sink: takes the frames, channel first
    :param n_frames: more than 1: the observations are stacks of so many frames, to take apart
    :return: everything but the frames
    :raises NotStacks: if ``n_frames`` > 1 and they are not
    """
    rows: dict[str, list[NDArray[Any]]] = {"actions": [], "rewards": [], "terminated": []}
    lengths: list[int] = []
    dtype = np.min_scalar_type(action_space.n - 1) if isinstance(action_space, spaces.Discrete) else np.float32
    padding = frozenset(PADDING_TYPES)
    frames = np.empty(0)
    for episode in episodes:
        frames = to_channel_first(episode.observations, observation_space)
        if n_frames > 1:
            parts = split_stacks(frames, n_frames)
            if parts is None or not padding & parts[1]:
                raise NotStacks
            frames, padding = parts[0], padding & parts[1]
        if frames.dtype == np.float64:
            frames = frames.astype(np.float32)
        sink.append(frames)
        last = np.zeros(len(frames), bool)
        last[-2] = episode.terminated
        rows["actions"].append(np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]).astype(dtype))
        rows["rewards"].append(np.append(episode.rewards, 0).astype(np.float32))
        rows["terminated"].append(last)
        lengths.append(len(frames) - 1)
    return Arrays(
        **{name: np.concatenate(parts) for name, parts in rows.items()},
        lengths=np.array(lengths, np.int64),
        shape=frames.shape[1:],
        dtype=frames.dtype.str,
        n_frames=n_frames,
        padding_types=padding,
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


def cache_key(source: Source, *options: Any) -> str:
    """
    Name of the cache entry: it changes with the data and with what was asked for.

    :param source: the dataset; its metadata, and name, size and time of every data file count
    :param options: what was asked for
    :return: a digest
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


def open_cache(folder: Path) -> tuple[FrameStore, Arrays] | None:
    """
    Open a cache entry.

    :param folder: the entry
    :return: frames, which stay on disk, and the rest; None if the entry is missing, incomplete or damaged
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in manifest["sizes"].items()):
            return None
        with np.load(folder / "arrays.npz") as file:
            offsets, named = file["offsets"], {name: file[name] for name in _NAMED}
        shape, dtype = tuple(manifest["shape"]), np.dtype(manifest["dtype"])
        arrays = Arrays(
            **named,
            shape=shape,
            dtype=dtype.str,
            n_frames=manifest["n_frames"],
            padding_types=frozenset(manifest["padding_types"]),
        )
        n_rows = len(arrays.actions)
        if _ZSTD in manifest["sizes"]:
            return BlockFrames(np.memmap(folder / _ZSTD, np.uint8, "r"), offsets, n_rows, shape, dtype), arrays
        return ArrayFrames(np.memmap(folder / _RAW, dtype, "r", shape=(n_rows, *shape))), arrays
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return None


def _check_space(source: Source, folder: Path, n_rows: int, n_frames: int, compressed: bool) -> None:
    space = source.observation_space
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
    Write a cache entry, which appears under its name only when it is complete.

    :param source: the dataset
    :param episodes: its episodes
    :param folder: the entry
    :param n_rows: number of frames, to see beforehand whether they fit on the disk
    :param n_frames: see :func:`stream`
    :param compressed: whether to compress the frames
    :raises DatasetError: if the data is bad or the disk is too small
    :raises NotStacks: see :func:`stream`
    """
    make_folder(folder.parent)
    remove_leftovers(folder.parent)
    _check_space(source, folder.parent, n_rows, n_frames, compressed)
    with atomic_folder(folder, good=lambda found: open_cache(found) is not None) as partial:
        with (partial / (_ZSTD if compressed else _RAW)).open("wb") as file:
            sink = FileSink(file, compressed)
            arrays = stream(episodes, source.observation_space, source.action_space, sink, n_frames)
            offsets = sink.finish()
        named = {name: getattr(arrays, name) for name in _NAMED}
        np.savez(partial / "arrays.npz", offsets=offsets, **named)
        manifest = {
            "dataset_id": source.name,
            "shape": arrays.shape,
            "dtype": arrays.dtype,
            "n_frames": arrays.n_frames,
            "padding_types": sorted(arrays.padding_types),
            "sizes": {f.name: f.stat().st_size for f in partial.iterdir()},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest))
