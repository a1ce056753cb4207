from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sb3_ext.replay.frames import (
    BLOCK,
    PADDING_TYPES,
    ArrayFrames,
    BlockFrames,
    BlockWriter,
    FrameStacker,
    gather_stacks,
    pack_frames,
    padding_of,
    split_stacks,
    stack_episode,
    stack_rows,
    unpack_frames,
)
from tests import reference

DTYPES = st.sampled_from([np.uint8, np.float32, np.int64, np.bool_])
FRAMES = st.tuples(st.integers(1, 3 * BLOCK + 5), st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda shape: DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, shape))
)


def compress(frames: np.ndarray, cuts: list[int] | None = None) -> BlockFrames:
    file = io.BytesIO()
    writer = BlockWriter(file)
    for part in np.split(frames, sorted(cuts or [])):
        writer.append(part)
    offsets = writer.finish()
    data = np.frombuffer(file.getvalue(), np.uint8)
    return BlockFrames(data, offsets, len(frames), frames.shape[1:], frames.dtype)


@settings(max_examples=60)
@given(st.data())
def test_compressed_frames_come_back_whatever_pieces_they_are_written_in(data: st.DataObject) -> None:
    frames = data.draw(FRAMES)
    store = compress(frames, data.draw(st.lists(st.integers(0, len(frames)), max_size=5)))
    rows = data.draw(hnp.arrays(np.int64, hnp.array_shapes(max_dims=2), elements=st.integers(0, len(frames) - 1)))
    assert len(store) == len(frames)
    assert store.take(rows).dtype == frames.dtype
    np.testing.assert_array_equal(store.take(rows), frames[rows])
    np.testing.assert_array_equal(ArrayFrames(frames).take(rows), frames[rows])


def test_neighbouring_frames_compress() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (1, 1, 84, 84), np.uint8).repeat(160, axis=0)
    assert len(compress(frames).data) < frames.nbytes / 10


def test_a_flipped_bit_is_never_silently_wrong() -> None:
    frames = np.random.default_rng(0).integers(0, 4, (20, 6, 6), np.uint8)
    store = compress(frames)
    rows, bits = np.arange(20), range(0, 8 * len(store.data), 3)
    errors = 0
    for bit in bits:
        data = store.data.copy()
        data[bit // 8] ^= 1 << bit % 8
        try:
            taken = BlockFrames(data, store.offsets, 20, store.shape, store.dtype).take(rows)
        except OSError:
            errors += 1
        else:  # a bit that does not matter
            np.testing.assert_array_equal(taken, frames)
    assert errors > 0.9 * len(bits)


def test_a_cut_file_is_an_error() -> None:
    store = compress(np.random.default_rng(0).integers(0, 4, (20, 6, 6), np.uint8))
    for length in (0, 1, len(store.data) - 1):
        cut = BlockFrames(store.data[:length], store.offsets, 20, store.shape, store.dtype)
        with pytest.raises(OSError, match="from number 16 on"):
            cut.take(np.array([19]))


@pytest.mark.parametrize("mapped", [False, True])
def test_pickled_stores_hold_their_frames_once(mapped: bool, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, 1, 30, 30), np.uint8)
    rows = np.array([[0, 39], [7, 16]])
    array: Any = frames
    if mapped:
        frames.tofile(tmp_path / "frames.bin")
        array = np.memmap(tmp_path / "frames.bin", np.uint8, "r", shape=frames.shape)
    for store in (ArrayFrames(array), compress(frames)):
        data = pickle.dumps(store)
        assert len(data) < 1.2 * frames.nbytes
        again = pickle.loads(data)
        assert len(again) == 40
        np.testing.assert_array_equal(again.take(rows), frames[rows])


def test_memory_mapped_frames_are_not_copied_into_ram(tmp_path: Path) -> None:
    frames = np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2)
    frames.tofile(tmp_path / "frames.bin")
    array = np.memmap(tmp_path / "frames.bin", np.uint8, "r+", shape=frames.shape)
    store = ArrayFrames(array)
    array[3] = 200
    assert (store.take(np.array([3])) == 200).all()
    taken = store.take(np.array([3]))
    taken[:] = 0
    assert (array[3] == 200).all()


def test_empty_store_says_so() -> None:
    with pytest.raises(IndexError, match="empty"):
        ArrayFrames(np.empty((0, 2), np.uint8)).take(np.array([0]))


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4)))
def test_packed_episodes_come_back(frames: np.ndarray) -> None:
    for array in (frames, frames.astype(np.float64), np.asfortranarray(frames)):
        again = unpack_frames(*pack_frames(array))
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)


@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_stack_rows_against_a_loop(pairs: list[tuple[int, int]], frame_stack: int, length: int) -> None:
    ages = np.array([age for _, age in pairs])
    rows = np.array([start for start, _ in pairs]) + ages
    index, missing = stack_rows(rows, ages, frame_stack, length)
    for k in range(len(pairs)):
        assert (index[k].tolist(), missing[k].tolist()) == reference.window_rows(
            int(rows[k]), int(ages[k]), frame_stack, length
        )


def test_stack_rows_by_hand() -> None:
    index, missing = stack_rows(np.array([10, 12]), np.array([0, 2]), 4)  # both in an episode that begins at row 10
    assert index.tolist() == [[10, 10, 10, 10, 11], [10, 10, 11, 12, 13]]
    assert missing.tolist() == [[True, True, True, False, False], [True, False, False, False, False]]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(PADDING_TYPES),
    st.booleans(),
)
def test_gathered_stacks_against_a_loop(
    lengths: list[int], frame_stack: int, channels: int, padding_type: str, compressed: bool
) -> None:
    n_rows = sum(lengths) + len(lengths)
    frames = np.random.default_rng(0).integers(1, 256, (n_rows, channels, 2, 3), np.uint8)
    store = compress(frames) if compressed else ArrayFrames(frames)
    row = 0
    for length in lengths:
        episode = list(frames[row : row + length + 1])
        ages = np.arange(length)
        got, following = gather_stacks(store, row + ages, ages, frame_stack, padding_type)
        for t in range(length):
            np.testing.assert_array_equal(got[t], reference.stack_at(episode, t, frame_stack, padding_type))
            np.testing.assert_array_equal(following[t], reference.stack_at(episode, t + 1, frame_stack, padding_type))
        row += length + 1


def stacks_of(frames: np.ndarray, k: int, padding_type: str) -> np.ndarray:
    return np.stack([reference.stack_at(list(frames), t, k, padding_type) for t in range(len(frames))])


@given(
    st.integers(2, 8), st.integers(2, 4), st.integers(1, 3), st.sampled_from(PADDING_TYPES), st.integers(0, 2**32 - 1)
)
def test_stacks_can_be_taken_apart(length: int, k: int, channels: int, padding_type: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = rng.integers(1, 256, (length, channels, 2, 2), np.uint8)
    stacks = stacks_of(frames, k, padding_type)
    parts = split_stacks(stacks, k)
    assert parts is not None
    np.testing.assert_array_equal(parts[0], frames)
    assert parts[1] == {padding_type}

    # one pixel of an older frame that the next stack does not confirm
    t, c = int(rng.integers(1, length)), int(rng.integers(0, (k - 1) * channels))
    stacks[t, c, 0, 0] ^= 1
    assert split_stacks(stacks, k) is None


def test_a_black_first_frame_fits_both_paddings() -> None:
    frames = np.random.default_rng(0).integers(1, 256, (5, 1, 2, 2), np.uint8)
    frames[0] = 0
    parts = split_stacks(stacks_of(frames, 4, "zero"), 4)
    assert parts is not None
    assert parts[1] == {"zero", "reset"}


def test_what_is_no_stack_is_left_alone() -> None:
    frames = np.random.default_rng(0).integers(1, 256, (8, 1, 2, 2), np.uint8)
    stacks = stacks_of(frames, 4, "zero")
    assert split_stacks(stacks[4:], 4) is None  # the middle of an episode: what came before is not padding
    assert split_stacks(stacks[:, ::-1], 4) is None  # newest frame first
    assert split_stacks(stacks, 3) is None  # 4 channels are no 3 frames
    assert split_stacks(stacks, 2) is None


@pytest.mark.parametrize(
    ("padding_type", "wanted"),
    [
        ("zero", [[0, 0, 7], [0, 7, 8], [7, 8, 9], [8, 9, 5]]),
        ("reset", [[7, 7, 7], [7, 7, 8], [7, 8, 9], [8, 9, 5]]),
    ],
)
def test_an_episode_is_stacked_by_hand(padding_type: str, wanted: list[list[int]]) -> None:
    """As a whole, as transitions, and frame by frame, twice."""
    frames = np.array([[7], [8], [9], [5]], np.uint8)
    stacks = stack_episode(frames, 3, padding_type)
    assert stacks.dtype == np.uint8
    assert stacks.tolist() == wanted
    steps = np.arange(3)
    now, following = gather_stacks(ArrayFrames(frames), steps, steps, 3, padding_type)
    assert now.tolist() == wanted[:-1]
    assert following.tolist() == wanted[1:]
    stacker = FrameStacker(3, padding_type)
    for _ in range(2):
        played = [stacker.reset(frames[0]), *(stacker.push(frame) for frame in frames[1:])]
        assert [stack.tolist() for stack in played] == wanted  # none is overwritten by the next


def test_padding_by_hand() -> None:
    for stack, wanted in (
        ([0, 0, 0, 0, 5, 6], {"zero"}),
        ([5, 6, 5, 6, 5, 6], {"reset"}),
        ([0, 0, 0, 0, 0, 0], {"zero", "reset"}),
        ([0, 0, 1, 2, 5, 6], set()),
        ([5, 6, 5, 5, 5, 6], set()),
        ([0, 0, 5, 6, 5, 6], set()),
    ):
        assert padding_of(np.array(stack), 3) == wanted
    assert padding_of(np.array([5, 6]), 1) == {"zero", "reset"}


def test_another_padding_type_is_refused() -> None:
    with pytest.raises(ValueError, match="padding_type must be one of zero, reset, not 'edge'"):
        FrameStacker(2, "edge")
