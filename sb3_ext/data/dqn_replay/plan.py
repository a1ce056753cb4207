"""Which rows of a DQN Replay log are which steps of which episode."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.dqn_replay.log import FINISHED, PADDING, STORES, StoreReader, read_store, store_name

SUBSETS = ("author", "episodes", "first", "uniform")
WINDOW = 1000
"""Rows of each piece of a uniform subset."""

_DOPAMINE = 1_000_000
_NO_LAST_FILE = {
    ("Carnival", 1), ("Centipede", 1), ("IceHockey", 1), ("StarGunner", 1), ("VideoPinball", 1), ("YarsRevenge", 1),
    ("Breakout", 5),
}  # fmt: skip
"""Game and run whose last file the published data lacks."""


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of one file, which are part ``part`` of the ``parts`` of an episode of the dataset."""

    episode: int
    part: int
    parts: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """
    What to read from each file, and what to make of it.

    :param capacity: rows per file
    :param segments: by file, in the order of rows
    :param padding: rows before the last one read that must be empty, by file
    :param terminated: per episode, whether its last row is its last step; otherwise that row is only what the step
        before it led to
    :param notes: what is known to be odd about this log
    :param steps_dropped: steps at cut ends, whose outcome the log does not hold
    """

    folder: Path
    capacity: int
    segments: dict[int, list[Segment]]
    padding: dict[int, NDArray[np.int64]]
    terminated: NDArray[np.bool_]
    notes: list[str]
    steps_dropped: int


@dataclass
class _Run:
    """Files that follow each other without a gap: their rows in the order of time."""

    chunks: list[tuple[int, int, int, int]]  # file, first row, row after the last, rows of the run before these
    terminals: NDArray[np.uint8]
    fresh: bool


_Piece: TypeAlias = tuple[_Run, int, int, bool]
"""Run, first row, row after the last one to read, whether it ends with a terminal."""


def find_files(folder: Path) -> list[int]:
    """List the numbers of a log's files; there must be one, and none may lack a store."""
    found: dict[int, set[str]] = {}
    for path in folder.glob(FINISHED) if folder.is_dir() else ():
        match = re.fullmatch(r"(?:\$store\$_)?([a-z_]+)_ckpt\.(\d+)\.gz", path.name)
        if match:
            found.setdefault(int(match[2]), set()).add(match[1])
    if not found:
        raise DatasetError(
            f"There is no log in {folder}: files like {store_name('observation', 0)} are expected in "
            "<DIR>/<Game>/<run>/replay_logs."
        )
    for suffix in sorted(found):
        for store in (*STORES, "add_count"):
            if store not in found[suffix]:
                raise DatasetError(f"{folder / store_name(store, suffix)} is missing. Copy the log again.")
    return sorted(found)


def _read_runs(folder: Path, suffixes: list[int], verify: bool) -> tuple[list[_Run], int, list[str]]:
    runs: list[_Run] = []
    capacity, before, notes = 0, (-2, -1), list[str]()
    for suffix in suffixes:
        terminal = read_store(folder, "terminal", suffix, verify)
        for store in ("observation", "action", "reward"):
            with closing(StoreReader(folder, store, suffix)) as reader:
                if reader.rows != len(terminal):
                    raise DatasetError(f"{reader.path} has {reader.rows} rows, its terminal has {len(terminal)}.")
        capacity = capacity or len(terminal)
        if len(terminal) != capacity or capacity < PADDING + 2:
            raise DatasetError(f"{folder}: file {suffix} has {len(terminal)} rows, the first one has {capacity}.")
        if terminal.max() > 1:
            raise DatasetError(f"{folder / store_name('terminal', suffix)}: values other than 0 and 1.")
        added = int(read_store(folder, "add_count", suffix, verify))
        last = suffix == suffixes[-1] and suffix > 0 and added < capacity
        if last and added == capacity - 1:
            continue  # written at the very end of the run: the file before once more
        if not last and (added < 0 or added % capacity != capacity - 1) and not (suffix == 0 and added < capacity):
            raise DatasetError(
                f"{folder / store_name('add_count', suffix)}: {added} rows added, but only the last file of a log may "
                f"be shorter than {capacity - 1} rows. Is a file of another log among these?"
            )
        new = added if last or added < capacity else capacity - 1
        follows = suffix == before[0] + 1 and (last or added == before[1] + capacity)
        if not follows and runs:
            notes.append(f"a gap before file {suffix}: the episodes beside it are cut")
        if follows:
            n = len(runs[-1].terminals)
            runs[-1].chunks += [(suffix, capacity - 1, capacity, n), (suffix, 0, new, n + 1)]
            runs[-1].terminals = np.concatenate([runs[-1].terminals, terminal[-1:], terminal[:new]])
        else:
            runs.append(_Run([(suffix, 0, new, 0)], terminal[:new], added < capacity and suffix == 0))
        before = (suffix, added)
    return runs, capacity, notes


def _leading_padding(run: _Run, folder: Path) -> int:
    """Empty rows at the start of a run whose beginning is unknown."""
    suffix, count = run.chunks[0][0], min(PADDING, len(run.terminals))
    empty = np.ones(count, bool)
    for store in STORES:
        with closing(StoreReader(folder, store, suffix)) as reader:
            empty &= ~reader.read(count).reshape(count, -1).any(axis=1)
    return count if empty.all() else int(np.argmin(empty))


def _selected(run: _Run, subset: str | None, fraction: float, capacity: int, budget: int) -> NDArray[np.int64]:
    """Intervals of a run's rows that are wanted, ``[n, 2]``."""
    total = len(run.terminals)
    if subset == "author":
        n = round(fraction * capacity)
        spans = [(before, before + min(n, stop)) for _, start, stop, before in run.chunks if start == 0]
    elif subset == "first":
        spans = [(0, min(total, budget))]
    elif subset == "uniform":
        starts = np.arange(0, total, WINDOW / fraction).astype(np.int64).tolist()
        spans = [(start, min(start + WINDOW, total)) for start in starts]
    else:
        spans = [(0, total)]
    return np.array([s for s in spans if s[1] > s[0]], np.int64).reshape(-1, 2)


def _pieces(
    run: _Run, starts: NDArray[np.int64], ends: NDArray[np.int64], spans: NDArray[np.int64]
) -> tuple[list[_Piece], int]:
    """What the wanted intervals hold of each episode, and how many of the steps there are lost at cuts."""
    out: list[_Piece] = []
    dropped, total = 0, len(run.terminals)
    for begin, end in zip(starts.tolist(), [*ends.tolist(), None], strict=True):
        stop = total if end is None else end
        for low, high in spans[(spans[:, 0] < stop) & (spans[:, 1] > begin)].tolist():
            a, b = max(begin, low), min(stop, high)
            whole = b == end
            read = b if whole else min(b + 1, stop)
            steps = read - a - (not whole)
            # one step alone is an episode only if the log says so; a cut one is an artefact
            keep = steps >= 2 or (whole and a == begin and (run.fresh or begin != starts[0]))
            dropped += b - a - (steps if keep else 0)
            if keep:
                out.append((run, a, read, whole))
    return out, dropped


def make_plan(folder: Path, subset: str | None, fraction: float, seed: int, verify: bool) -> Plan:
    """
    Find the episodes of a log, ``<DIR>/<Game>/<run>/replay_logs``, from its small files.

    The arguments are those of :func:`~sb3_ext.data.convert_dqn_replay`. A log that is incomplete or contradicts itself
    is refused.
    """
    suffixes = find_files(folder)
    runs, capacity, notes = _read_runs(folder, suffixes, verify)
    key = (folder.parent.parent.name, int(folder.parent.name) if folder.parent.name.isdigit() else 0)
    if capacity == _DOPAMINE and key in _NO_LAST_FILE:
        notes.append("the published data lacks the last file of this run")
    if capacity == _DOPAMINE and key == ("Asterix", 1):
        notes.append("others could not reproduce published results with this run")
    budget = round(fraction * sum(len(run.terminals) for run in runs))
    pieces: list[_Piece] = []
    padding: dict[int, list[int]] = {s: [] for s in suffixes}
    dropped = 0
    for run in runs:
        first = PADDING if run.fresh else _leading_padding(run, folder)
        ends = np.flatnonzero(run.terminals) + 1
        starts = np.concatenate([[first], ends + PADDING])
        for begin, end in zip([0, *ends], starts, strict=True):
            for suffix, low, high in _split(run, int(begin), min(int(end), len(run.terminals))):
                padding[suffix] += range(low, high)
        found, lost = _pieces(run, starts, ends, _selected(run, subset, fraction, capacity, budget))
        pieces, dropped, budget = pieces + found, dropped + lost, budget - len(run.terminals)
    if subset == "episodes" and pieces:
        lengths = np.array([stop - start for _, start, stop, _ in pieces], np.int64)
        order = np.random.default_rng(seed).permutation(len(lengths))
        wanted = int(np.searchsorted(np.cumsum(lengths[order]), fraction * lengths.sum() - 1e-6)) + 1
        pieces = [pieces[k] for k in sorted(order[:wanted].tolist())]
    if not pieces:
        raise DatasetError(f"{folder}: no step is in the subset.")
    segments: dict[int, list[Segment]] = {}
    for number, (run, start, stop, _) in enumerate(pieces):
        split = _split(run, start, stop)
        for part, (suffix, low, high) in enumerate(split):
            segments.setdefault(suffix, []).append(Segment(number, part, len(split), low, high))
    for of_file in segments.values():
        of_file.sort(key=lambda s: s.start)
    empty = {s: np.array(sorted(rows), np.int64) for s, rows in padding.items()}
    return Plan(folder, capacity, segments, empty, np.array([p[3] for p in pieces]), notes, dropped)


def _split(run: _Run, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Rows ``start`` to ``stop`` of a run as file, first row, row after the last."""
    out = []
    for suffix, first, last, before in run.chunks:
        low, high = max(first, first + start - before), min(last, first + stop - before)
        if high > low:
            out.append((suffix, low, high))
    return out
