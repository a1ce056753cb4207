"""Log an agent's steps in the format of the DQN Replay Dataset (Agarwal et al., 2020), and read such files."""

from __future__ import annotations

import gzip
import os
import tokenize
import warnings
import zlib
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO, SupportsFloat, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.files import atomic_path, make_folder, remove_leftovers

PADDING = 3
"""Empty rows before every episode, so that Dopamine's stacks of four begin with zeros."""

STORES = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}
FINISHED = "[!.]*_ckpt.*.gz"
"""Pattern of the names of files that are not being written any more."""

_CHUNK = 1 << 20


def store_name(store: str, suffix: int) -> str:
    """File name of one array: of :data:`STORES`, ``add_count`` or ``invalid_range``, in the file of that number."""
    return f"{f'$store$_{store}' if store in STORES else store}_ckpt.{suffix}.gz"


class StoreReader:
    """
    Read one array, a gzipped ``.npy``, row by row, without ever holding it whole. Nothing is unpickled.

    Its number of dimensions and its type are those of the format; what is not of :data:`STORES` may be any integers.
    A :class:`DatasetError` names a file that is missing, damaged, or holds something else.
    """

    def __init__(self, folder: Path, store: str, suffix: int) -> None:
        self.path = path = folder / store_name(store, suffix)
        dtype, dimensions = STORES.get(store), {"add_count": 0, "observation": 3}.get(store, 1)
        try:
            self._file = cast(BinaryIO, gzip.open(path, "rb"))  # noqa: SIM115
            version = np.lib.format.read_magic(self._file)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # numpy mends what it takes for a header of Python 2
                self.shape, fortran, self.dtype = np.lib.format.read_array_header_1_0(self._file)
        except FileNotFoundError as error:
            raise DatasetError(f"{path} is missing. Copy the log again.") from error
        except (OSError, EOFError, ValueError, UserWarning, SyntaxError, tokenize.TokenError, zlib.error) as error:
            raise self._damaged(error) from error
        if self.dtype.hasobject:
            raise DatasetError(f"{path} holds pickled objects, which may run code; it is not read.")
        fits = self.dtype == dtype if dtype is not None else self.dtype.kind in "iu"
        if not fits or len(self.shape) != dimensions or fortran:
            wanted = np.dtype(dtype).name if dtype is not None else "integers"
            raise DatasetError(
                f"{path} holds {self.dtype} of shape {self.shape}; {wanted} with {dimensions} dimensions expected. "
                "This is no log of the DQN Replay Dataset's format."
            )
        self.rows = self.shape[0] if self.shape else 1
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._left = self.rows * self._row_bytes
        # deflate shrinks by 1032 at most; a damaged header must not ask for any amount of memory
        if self._left > 1040 * path.stat().st_size:
            raise self._damaged(ValueError(f"{self.shape} cannot be in a file this small"))

    def _damaged(self, error: BaseException) -> DatasetError:
        reason = " ".join(str(error).split())
        return DatasetError(
            f"{self.path} is damaged or cut short ({type(error).__name__}: {reason}). Copy the file again."
        )

    def _read(self, size: int, at_end: bool = False) -> bytes:
        try:
            data = self._file.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise self._damaged(error) from error
        if len(data) != size and not at_end:
            raise self._damaged(EOFError(f"{size - len(data)} bytes are missing"))
        self._left -= len(data)
        return data

    def read(self, n: int) -> NDArray[Any]:
        """Read the next ``n`` rows, ``[n, *shape[1:]]``, read-only."""
        return np.frombuffer(self._read(n * self._row_bytes), self.dtype).reshape(n, *self.shape[1:])

    def finish(self) -> None:
        """Read to the end, where gzip keeps the checksum of everything; nothing may follow the array."""
        while self._left:
            self._read(min(self._left, _CHUNK))
        if self._read(1, at_end=True):
            raise self._damaged(ValueError("bytes follow the array"))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_store(folder: Path, store: str, suffix: int, verify: bool, rows: int | None = None) -> NDArray[Any]:
    """Read a small array, or its first ``rows``; if ``verify``, read on to the checksum."""
    with closing(StoreReader(folder, store, suffix)) as reader:
        array = reader.read(reader.rows if rows is None else min(rows, reader.rows))
        if verify:
            reader.finish()
    return array if reader.shape else array.reshape(())


class _Writer:
    """One gzipped ``.npy`` that appears under its name when it is complete."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any, level: int) -> None:
        self._place = ExitStack()
        raw = self._place.enter_context(self._place.enter_context(atomic_path(path)).open("wb"))
        # no name and no time in the header: the same steps give the same bytes
        self._file = self._place.enter_context(gzip.GzipFile("", "wb", level, raw, mtime=0))
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(cast(Any, self._file), header)

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._place.close()


class ReplayLog:
    """
    Write steps as Dopamine's logged replay buffer does: six files per ``capacity`` rows.

    Every episode is preceded by three rows of zeros. A file is the buffer at the moment when all rows but its last one
    are new, so that its last row is the one from before its first row (in file 0: zeros). The last file, written by
    :meth:`close`, says in ``add_count`` how many rows are new; the others are those of the file before it.
    Unlike Dopamine, no file is lost when an episode begins in the last three rows of one. Rows go straight to disk.

    :param folder: ``<DIR>/<Game>/<run>/replay_logs``; made if missing
    :param shape: height and width of a frame
    :param capacity: rows per file
    :param level: gzip's level; lower is faster and larger
    :raises ValueError: if the folder holds a log already, or the capacity is too small
    """

    def __init__(
        self, folder: str | os.PathLike[str], shape: tuple[int, int], capacity: int = 1_000_000, level: int = 9
    ) -> None:
        self.folder, self.shape, self.capacity, self._level = Path(folder), shape, capacity, level
        if capacity < PADDING + 2:
            raise ValueError(f"capacity must be at least {PADDING + 2}, got {capacity}.")
        make_folder(self.folder)
        if any(self.folder.glob(FINISHED)):
            raise ValueError(f"{self.folder} holds a log already; choose another run.")
        remove_leftovers(self.folder, age=0)
        self._shapes = {store: shape if store == "observation" else () for store in STORES}
        self._link = self._empty = {s: np.zeros(self._shapes[s], dtype).tobytes() for s, dtype in STORES.items()}
        self._added = self._suffix = self._row = 0
        self._starts, self._closed = True, False
        self._open()

    def _open(self) -> None:
        shapes = {store: (self.capacity, *shape) for store, shape in self._shapes.items()}
        self._files = {store: self._writer(store, shapes[store], dtype) for store, dtype in STORES.items()}

    def _writer(self, store: str, shape: tuple[int, ...], dtype: Any) -> _Writer:
        return _Writer(self.folder / store_name(store, self._suffix), shape, dtype, self._level)

    def _append(self, row: dict[str, bytes]) -> None:
        self._added += 1
        if self._row == self.capacity - 1:  # the file before was written when this row was still to come
            self._link, self._row = row, 0
            return
        for store, data in row.items():
            self._files[store].write(data)
        self._row += 1
        if self._row == self.capacity - 1:
            self._finish(self._added)
            self._suffix += 1
            self._open()

    def _finish(self, add_count: int) -> None:
        for store, data in self._link.items():
            self._files[store].write(data)
        for file in self._files.values():
            file.finish()
        invalid = np.array([(self._row + k) % self.capacity for k in range(-1, PADDING + 1)], np.int64)
        for store, value in (("add_count", np.array(add_count)), ("invalid_range", invalid)):
            file = self._writer(store, value.shape, value.dtype)
            file.write(value.tobytes())
            file.finish()

    def add(self, observation: NDArray[np.uint8], action: int, reward: float, terminal: bool) -> None:
        """
        Log one step.

        :param observation: what the agent saw, ``[H, W]``
        :param action: what it did
        :param reward: what it got
        :param terminal: whether the episode ended with this step
        :raises ValueError: if the frame does not fit, or the log is closed
        """
        if self._closed:
            raise ValueError("The log is closed.")
        if observation.shape != self.shape or observation.dtype != np.uint8:
            raise ValueError(f"Frames are uint8 of shape {self.shape}, got {observation.dtype} {observation.shape}.")
        if self._starts:
            for _ in range(PADDING):
                self._append(self._empty)
        values = {"observation": observation, "action": action, "reward": reward, "terminal": terminal}
        self._append({store: np.asarray(values[store], dtype).tobytes() for store, dtype in STORES.items()})
        self._starts = terminal

    def close(self) -> None:
        """Write the last file. Rows after the new ones are those of the file before, or zeros if there is none."""
        if self._closed:
            return
        self._closed = True
        # a full file has just been written: its last row still waits to be the link of the next
        new = 0 if self._row == self.capacity - 1 else self._row
        rows = self.capacity - 1
        for store, file in self._files.items():
            if self._suffix == 0:
                for _ in range(rows - new):
                    file.write(self._empty[store])
                continue
            with closing(StoreReader(self.folder, store, self._suffix - 1)) as reader:
                for start in range(0, rows, 1024):
                    before = reader.read(min(1024, rows - start))
                    file.write(before[max(new - start, 0) :].tobytes())
        self._finish(self._row)


class ReplayLogger(gym.Wrapper[Any, Any, Any, Any]):
    """
    Log what passes through an environment in the format of the DQN Replay Dataset.

    Wrap it around single frames (``make_atari_env``) and put the agent's wrappers on top. As in the published data, a
    step limit is logged as a terminal, and so is the last step before an early reset. Call :meth:`close` at the end.

    :param env: environment with grey frames, ``[H, W]`` uint8, and discrete actions
    :param folder: log folder; the files go to ``<folder>/<game>/<run>/replay_logs``
    :param game: name of the game
    :param run: number of the run
    :param capacity: rows per file
    :param clip_rewards: log rewards clipped to [-1, 1], as the published data does; the agent's are not changed
    :param level: gzip's level
    :raises ValueError: if the spaces do not fit, or the folder holds a log already
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        folder: str | os.PathLike[str],
        game: str,
        run: int = 1,
        *,
        capacity: int = 1_000_000,
        clip_rewards: bool = True,
        level: int = 9,
    ) -> None:
        super().__init__(env)
        shape = env.observation_space.shape
        if shape is None or len(shape) != 2 or env.observation_space.dtype != np.uint8:
            raise ValueError(f"Grey uint8 frames [H, W] are logged, not {env.observation_space}.")
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(f"Discrete actions are logged, not {env.action_space}.")
        self.log = ReplayLog(Path(folder, game, str(run), "replay_logs"), (shape[0], shape[1]), capacity, level)
        self.clip_rewards = clip_rewards
        self._seen: NDArray[np.uint8] | None = None
        self._pending: tuple[NDArray[np.uint8], int, float] | None = None

    def _write(self, terminal: bool) -> None:
        if self._pending is not None:
            self.log.add(*self._pending, terminal)
            self._pending = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; an unfinished one ends."""
        self._write(terminal=True)
        observation, info = self.env.reset(seed=seed, options=options)
        self._seen = np.array(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step and log; a step is written when it is known whether another one follows."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        assert self._seen is not None
        self._write(terminal=False)
        value = float(np.clip(float(reward), -1, 1)) if self.clip_rewards else float(reward)
        self._pending = (self._seen, int(action), value)
        if terminated or truncated:
            self._write(terminal=True)
        self._seen = np.array(observation)
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Write the last file and close the environment."""
        self._write(terminal=False)
        self.log.close()
        super().close()
