"""Frame storage: every frame is stored once, stacks are rebuilt by index when a batch is drawn."""

from __future__ import annotations

from typing import Any, BinaryIO, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

Ints = NDArray[np.int64]
BLOCK = 16
"""Frames per compressed block: neighbours share most pixels, and a stack of four touches at most two blocks."""

PADDING_TYPES = ("zero", "reset")
"""What stands before an episode's first frame, in gymnasium's words: zeros, or that frame again."""


class FrameStore(Protocol):
    """
    Read-only sequence of equally shaped frames.

    Observations with several entries are records: ``shape`` is ``()``, and ``dtype`` has a field per entry.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        """Return the number of frames."""
        ...

    def take(self, rows: Ints) -> Any:
        """Copy the frames of ``rows``, ``[...]``, out: ``[..., *shape]``, an array; a tensor if they lie on a GPU."""
        ...


class ArrayFrames:
    """Frames in one array, ``[N, *shape]``; a ``numpy.memmap`` stays on disk and is paged in by the system."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.shape: tuple[int, ...] = array.shape[1:]
        self.dtype = array.dtype
        # one opaque item per frame: numpy then copies whole frames instead of walking their pixels
        item = np.dtype((np.void, max(1, self.dtype.itemsize * int(np.prod(self.shape)))))
        self._flat = np.ascontiguousarray(array).reshape(len(array), -1).view(item).reshape(-1) if len(array) else None

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: Ints) -> NDArray[Any]:
        """See :meth:`FrameStore.take`."""
        if self._flat is None:
            raise IndexError("The frame store is empty.")
        return self._flat[rows].view(self.dtype).reshape(*rows.shape, *self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        # the frames once, not again as the view that take() reads
        return ArrayFrames, (np.asarray(self.array),)


class BlockFrames:
    """
    Frames in zstd blocks of :data:`BLOCK`: 20 to 150 times smaller than raw, lossless, decoded when they are drawn.

    Every block carries a checksum.

    :param data: the concatenated compressed blocks, ``[n_bytes]`` (RAM or memory-mapped)
    :param offsets: where each block starts, and the end of the last one, ``[n_blocks + 1]``
    :param length: number of frames
    """

    def __init__(
        self, data: NDArray[np.uint8], offsets: Ints, length: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.data, self.offsets, self.length, self.shape, self.dtype = data, offsets, length, shape, dtype
        self._frame_bytes = int(np.prod(shape)) * dtype.itemsize
        self._decoder = zstandard.ZstdDecompressor()

    def __len__(self) -> int:
        return self.length

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockFrames, (self.data, self.offsets, self.length, self.shape, self.dtype)

    def take(self, rows: Ints) -> NDArray[Any]:
        """See :meth:`FrameStore.take`; a damaged block is an ``OSError``."""
        flat = rows.reshape(-1)
        out = np.empty((len(flat), *self.shape), self.dtype)
        blocks, inverse = np.unique(flat // BLOCK, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        bounds = np.searchsorted(inverse[order], np.arange(len(blocks) + 1))
        for k, block in enumerate(blocks):
            where = order[bounds[k] : bounds[k + 1]]
            out[where] = self._block(int(block))[flat[where] % BLOCK]
        return out.reshape(*rows.shape, *self.shape)

    def _block(self, number: int) -> NDArray[Any]:
        data = self.data[self.offsets[number] : self.offsets[number + 1]].tobytes()
        count = min(BLOCK, self.length - number * BLOCK)
        try:
            # before decoding, because a damaged header may ask for any amount of memory
            if zstandard.frame_content_size(data) != count * self._frame_bytes:
                raise zstandard.ZstdError("wrong size")
            raw = self._decoder.decompress(data)
        except zstandard.ZstdError as error:
            raise OSError(
                f"The frames from number {number * BLOCK} on are damaged ({error}). Delete the cached copy."
            ) from error
        return np.frombuffer(raw, self.dtype).reshape(count, *self.shape)


class BlockWriter:
    """Append frames to a compressed file; a higher zstd ``level`` is smaller and slower to write, not to read."""

    def __init__(self, file: BinaryIO, level: int = 3) -> None:
        self._file, self._encoder = file, zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._pending: list[NDArray[Any]] = []
        self._ends = [0]

    def append(self, frames: NDArray[Any]) -> None:
        """Add frames, ``[n, *shape]``, at the end."""
        self._pending.append(frames)
        if sum(map(len, self._pending)) >= BLOCK:
            self._flush(final=False)

    def _flush(self, final: bool) -> None:
        frames = np.concatenate(self._pending) if self._pending else np.empty(0, np.uint8)
        stop = len(frames) if final else len(frames) - len(frames) % BLOCK
        for start in range(0, stop, BLOCK):
            block = self._encoder.compress(frames[start : start + BLOCK].tobytes())
            self._file.write(block)
            self._ends.append(self._ends[-1] + len(block))
        self._pending = [frames[stop:]]

    def finish(self) -> Ints:
        """Write the last, shorter block; the offsets for :class:`BlockFrames`."""
        self._flush(final=True)
        return np.array(self._ends, np.int64)


def pack_frames(frames: NDArray[Any]) -> tuple[bytes, tuple[int, ...], str]:
    """Compress frames, ``[n, *shape]``, losslessly: bytes, shape and dtype, for :func:`unpack_frames`."""
    return zstandard.ZstdCompressor(level=3).compress(frames.tobytes()), frames.shape, frames.dtype.str


def unpack_frames(data: bytes, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Undo :func:`pack_frames`; the frames are read-only."""
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.dtype(dtype)).reshape(shape)


def stack_rows(rows: Ints, age: Ints, frame_stack: int, length: int = 1) -> tuple[Ints, NDArray[np.bool_]]:
    """
    Rows that make up the stacks of ``rows`` and of the ``length`` rows after them (1: of ``s`` and ``s'``).

    Frames from before the episode start do not exist: their place gets the episode's first row and a mark.

    :param rows: newest frame of each first stack, ``[B]``
    :param age: steps since the episode began at each of these rows, ``[B]``
    :param frame_stack: frames per stack, k
    :return: rows ``[B, k + length]`` oldest first, and a mask of the same shape that is True where no frame exists
    """
    offsets = np.arange(1 - frame_stack, length + 1)
    missing = offsets[None, :] < -age[:, None]
    return rows[:, None] + np.maximum(offsets[None, :], -age[:, None]), missing


def check_padding_type(padding_type: str) -> str:
    """Refuse what is no padding type, see :data:`PADDING_TYPES`."""
    if padding_type not in PADDING_TYPES:
        raise ValueError(f"padding_type must be one of {', '.join(PADDING_TYPES)}, not {padding_type!r}.")
    return padding_type


def gather_windows(
    store: FrameStore, rows: Ints, age: Ints, frame_stack: int, padding_type: str, length: int = 1
) -> Any:
    """
    Frames of the stacks of :func:`stack_rows`, each once.

    :param store: the frames; row ``i + 1`` follows row ``i`` within an episode
    :param padding_type: what stands before an episode's first frame, see :data:`PADDING_TYPES`
    :return: ``[B, (k + length) * C, ...]`` for frames of shape ``[C, ...]``, oldest first; an array, or a tensor if the
        store gives those
    """
    index, missing = stack_rows(rows, age, frame_stack, length)
    zeros, blank = padding_type == "zero", getattr(store, "blank", None)
    if zeros and blank is not None:
        index = np.where(missing, blank, index)
    frames = store.take(index)
    if zeros and blank is None and missing.any():
        frames[missing] = 0
    return frames.reshape(len(rows), (frame_stack + length) * store.shape[0], *store.shape[1:])


def gather_stacks(store: FrameStore, rows: Ints, age: Ints, frame_stack: int, padding_type: str) -> tuple[Any, Any]:
    """
    Observations and next observations of transitions stored as single frames, each ``[B, k * C, ...]``.

    See :func:`gather_windows`.
    """
    merged, channels = gather_windows(store, rows, age, frame_stack, padding_type), store.shape[0]
    return merged[:, :-channels], merged[:, channels:]


def stack_episode(frames: NDArray[Any], frame_stack: int, padding_type: str) -> NDArray[Any]:
    """Every stack of one episode of frames ``[T + 1, C, ...]``: ``[T + 1, k * C, ...]``, oldest frame first."""
    steps = np.arange(len(frames))
    stacks: NDArray[Any] = gather_windows(ArrayFrames(frames), steps, steps, frame_stack, padding_type, length=0)
    return stacks


class FrameStacker:
    """The stack of an episode that is being played, ``[k * C, ...]``, oldest frame first, frame by frame."""

    def __init__(self, frame_stack: int, padding_type: str) -> None:
        self.frame_stack, self.padding_type = frame_stack, check_padding_type(padding_type)
        self._stack: NDArray[Any] = np.empty(0)

    def reset(self, frame: NDArray[Any]) -> NDArray[Any]:
        """Begin an episode with its first frame, ``[C, ...]``; the stack."""
        self._stack = stack_episode(frame[None], self.frame_stack, self.padding_type)[0]
        return self._stack

    def push(self, frame: NDArray[Any]) -> NDArray[Any]:
        """Add the next frame, ``[C, ...]``; the stack, a new array."""
        self._stack = np.concatenate([self._stack[len(frame) :], frame])
        return self._stack


def padding_of(first_stack: NDArray[Any], frame_stack: int) -> frozenset[str]:
    """
    Tell from an episode's first stack, ``[k * C, ...]``, oldest frame first, what stands before its first frame.

    Both padding types explain it if the first frame is black, none if other frames stand there.
    """
    frames = first_stack.reshape(frame_stack, -1)
    before, first = frames[:-1], frames[-1]
    fits = {"zero": not before.any(), "reset": bool((before == first).all())}
    return frozenset(padding_type for padding_type, fit in fits.items() if fit)


def split_stacks(observations: NDArray[Any], frame_stack: int) -> tuple[NDArray[Any], frozenset[str]] | None:
    """
    Take ready-made stacks of one episode, ``[T + 1, k * C, ...]``, oldest frame first, apart, if that loses nothing.

    :param frame_stack: frames per stack, k, at least 2
    :return: the newest frames ``[T + 1, C, ...]``, and the padding types that give the first stack, see
        :func:`padding_of`; None if the observations are not such stacks
    """
    channels, rest = divmod(observations.shape[1], frame_stack)
    if rest or not np.array_equal(observations[1:, :-channels], observations[:-1, channels:]):
        return None
    fits = padding_of(observations[0], frame_stack)
    return (observations[:, -channels:], fits) if fits else None
