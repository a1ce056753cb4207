"""
Sequential halving (Karnin et al., 2013, https://proceedings.mlr.press/v28/karnin13.html) as Danihelka et al. (2022,
https://openreview.net/forum?id=bERaNdoegnO) use it at a root: how candidate actions share N simulations.

The m actions of the highest ``gumbel + logits`` are the first candidates. A phase with k candidates has
``max(floor(N / (log2(m) k)), 1) k`` simulations, which go to the candidate with the fewest visits, of those to the one
with the highest score ``gumbel + logits + sigma(completed Q)``. Then the half with the lower scores drops out. The last
phase, with two candidates or one, takes the rest. For m = 16 and N = 50:

    phase   candidates k   simulations                    visits of each candidate after it
    1       16             max(floor(50 / 64), 1) 16 = 16   1
    2       8              max(floor(50 / 32), 1) 8  = 8    2
    3       4              max(floor(50 / 16), 1) 4  = 12   5
    4       2              the rest                  = 14   12

A slow and readable version of it, and of the search around it, is ``SlowSearch`` in tests/reference.py.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

# What halving keeps of a root, in the head of its row of the trees: how many candidates there are, the simulation that
# begins the next phase, how many candidates there were at first; then of each slot gumbel + logits, and 1 if it is a
# candidate, else 0.
# numba compiles these functions into those of tree.py, and renews its cache of a file only when that file changes.
_ALIVE, _END, _CONSIDERED = 3, 4, 5
CANDIDATES, PAIR, FIXED, IN = 8, 2, 0, 1

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]


@njit(cache=True, error_model="numpy")
def phase_length(total: int, considered: float, alive: float) -> float:
    """Simulations of a phase with ``alive`` candidates of ``considered`` at first; infinite for the last phase."""
    if alive <= 2.0:
        return np.inf
    return float(max(math.floor(total / (math.log2(considered) * alive)), 1.0) * alive)


@njit(inline="always", error_model="numpy")
def begin(row: Floats, gumbel: Singles, logits: Singles, considered: int, total: int) -> None:
    """Make the ``considered`` legal actions of highest ``gumbel + logits`` candidates, and begin the first phase."""
    slots = len(logits)
    for a in range(slots):
        row[CANDIDATES + PAIR * a + FIXED] = np.float64(gumbel[a]) + np.float64(logits[a])
        row[CANDIDATES + PAIR * a + IN] = 0.0
    alive = 0
    while alive < considered:
        best = -1
        for a in range(slots):
            at = CANDIDATES + PAIR * a
            free = row[at + IN] == 0.0 and logits[a] > -np.inf
            if free and (best < 0 or row[at + FIXED] > row[CANDIDATES + PAIR * best + FIXED]):
                best = a
        if best < 0:
            break
        row[CANDIDATES + PAIR * best + IN] = 1.0
        alive += 1
    row[_ALIVE], row[_CONSIDERED], row[_END] = alive, alive, phase_length(total, alive, alive)


@njit(inline="always", error_model="numpy")
def is_decided(row: Floats) -> bool:
    """Whether one candidate is left, so that no score matters."""
    return bool(row[_ALIVE] <= 1.0)


@njit(cache=True, error_model="numpy")
def _halve(row: Floats, slots: int, simulation: int, total: int, scores: Floats) -> None:
    """Begin the next phase: drop the worse half, keep at least two."""
    alive = row[_ALIVE]
    keep = max(alive // 2, 2.0)
    while alive > keep:
        worst = -1
        for a in range(slots):
            if row[CANDIDATES + PAIR * a + IN] > 0.0 and (worst < 0 or scores[a] <= scores[worst]):
                worst = a
        row[CANDIDATES + PAIR * worst + IN] = 0.0
        alive -= 1.0
    row[_ALIVE] = alive
    row[_END] = simulation + phase_length(total, row[_CONSIDERED], alive)


@njit(inline="always", error_model="numpy")
def next_candidate(
    row: Floats, slots: int, visits: int, stride: int, simulation: int, total: int, scores: Floats
) -> int:
    """Candidate that gets a simulation: fewest visits, then highest score; before that the phase may end."""
    # the row has the visits of the first slot at ``visits``, those of the next one ``stride`` later
    if simulation >= row[_END]:
        _halve(row, slots, simulation, total, scores)
    slot, fewest = -1, np.inf
    for a in range(slots):
        if row[CANDIDATES + PAIR * a + IN] > 0.0:
            count = row[visits + stride * a]
            if count < fewest or (count == fewest and scores[a] > scores[slot]):
                slot, fewest = a, count
    return slot


@njit(inline="always", error_model="numpy")
def best_candidate(row: Floats, slots: int, visits: int, stride: int, scores: Floats) -> int:
    """Candidate that is chosen in the end: of the visited ones that with the highest score."""
    best = -1
    for a in range(slots):
        there = row[visits + stride * a] > 0.0 and row[CANDIDATES + PAIR * a + IN] > 0.0
        if there and (best < 0 or scores[a] > scores[best]):
            best = a
    return best
