"""Sum tree: draw indices in proportion to their priorities, and change priorities, in logarithmic time."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WIDTH = 8
"""Children per node: eight float64 fill one cache line, so a step down the tree touches one line."""

_SHIFT = 3


@njit(cache=True)
def _write(tree: Floats, starts: Ints, capacity: int, leaves: Ints, values: Floats, revive: bool) -> int:
    """
    Set leaves in order, then recompute every ancestor from its children, level by level.

    :return: -1; or, with nothing changed, the place of the first bad index or value
    """
    for i in range(len(leaves)):
        # NaN fails every comparison
        if leaves[i] < 0 or leaves[i] >= capacity or not (values[i] >= 0.0 and values[i] < np.inf):
            return i
    bottom = starts[len(starts) - 1]
    for i in range(len(leaves)):
        if revive or tree[bottom + leaves[i]] > 0.0:
            tree[bottom + leaves[i]] = values[i]
    for level in range(len(starts) - 1, 0, -1):
        shift = _SHIFT * (len(starts) - level)
        previous = np.int64(-1)
        for i in range(len(leaves)):
            node = leaves[i] >> shift
            if node == previous:
                continue
            previous = node
            first = starts[level] + (node << _SHIFT)
            total = 0.0
            for child in range(first, first + WIDTH):
                total += tree[child]
            tree[starts[level - 1] + node] = total
    return -1


@njit(cache=True)
def _fill(tree: Floats, starts: Ints, first: int, count: int, value: float) -> None:
    """Set neighbouring leaves, and their ancestors."""
    bottom = starts[len(starts) - 1]
    tree[bottom + first : bottom + first + count] = value
    low, high = first, first + count - 1
    for level in range(len(starts) - 1, 0, -1):
        low, high = low >> _SHIFT, high >> _SHIFT
        for node in range(low, high + 1):
            child = starts[level] + (node << _SHIFT)
            total = 0.0
            for i in range(child, child + WIDTH):
                total += tree[i]
            tree[starts[level - 1] + node] = total


@njit(cache=True)
def _descend(tree: Floats, starts: Ints, masses: Floats, strata: int, leaves: Ints, values: Floats) -> None:
    """
    For every mass find the leaf in whose interval of the running sum it lies; masses are used up.

    ``strata``: 0 if masses are masses; else they are shares, of the total (1) or each of its own stratum.
    """
    for i in range(len(masses)):
        if strata == 1:
            masses[i] = masses[i] * tree[0]
        elif strata > 1:
            masses[i] = (masses[i] + i) / strata * tree[0]
        leaves[i] = 0
        values[i] = tree[0]
    for level in range(1, len(starts)):
        # all rows one level down together: their cache misses overlap
        for i in range(len(masses)):
            node = leaves[i] << _SHIFT
            first = starts[level] + node
            mass = masses[i]
            # without a branch, because it could not be predicted: count the children that end at or before the mass
            chosen, end, before = 0, 0.0, 0.0
            for child in range(WIDTH):
                end += tree[first + child]
                passed = mass >= end
                chosen += passed
                before = end if passed else before
            if chosen == WIDTH:  # rounding left a rest behind the last child: the last positive one, at its end
                chosen -= 1
                while tree[first + chosen] == 0.0:
                    chosen -= 1
                before = mass - tree[first + chosen]
            leaves[i] = node + chosen
            values[i] = tree[first + chosen]
            masses[i] = mass - before


class SumTree:
    """
    Priorities of ``capacity`` items in a tree of sums with :data:`WIDTH` children per node, float64.

    All levels lie in one numpy array, so a tree is pickled and copied like one. Parents are recomputed from their
    children, never adjusted by differences, so rounding does not accumulate. An item of priority 0 is never drawn.

    :param capacity: number of items, at least 1; all start with priority 0
    :raises ValueError: if there is no item
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}.")
        self.capacity = capacity
        sizes = [capacity]
        while sizes[0] > 1:
            sizes.insert(0, -(-sizes[0] // WIDTH))
        # whole nodes on every level but the root's, which is one number; it gets a line of its own
        padded = [-(-size // WIDTH) * WIDTH for size in sizes]
        self._starts = np.cumsum([0, *padded[:-1]], dtype=np.int64)
        self._tree = _aligned_zeros(sum(padded))

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._tree[0])

    @property
    def leaves(self) -> Floats:
        """The priorities, ``[capacity]``, as a read-only view."""
        start = self._starts[-1]
        view = self._tree[start : start + self.capacity]
        view.flags.writeable = False
        return view

    def __getitem__(self, indices: NDArray[np.int64] | int) -> Floats:
        found: Floats = self.leaves[indices]
        return found

    def update(self, indices: ArrayLike, priorities: ArrayLike, revive: bool = True) -> None:
        """
        Set priorities, finite and not negative. If an index occurs more than once, its last priority counts.

        :param revive: False leaves items alone whose priority is 0
        :raises IndexError: if an index is out of range; nothing is changed then
        :raises ValueError: if a priority is negative, NaN or infinite, or the shapes differ; nothing is changed then
        """
        leaves = np.ascontiguousarray(indices, np.int64).reshape(-1)
        values = np.ascontiguousarray(priorities, np.float64).reshape(-1)
        if len(leaves) != len(values):
            raise ValueError(f"{len(leaves)} indices and {len(values)} priorities do not belong together.")
        at = _write(self._tree, self._starts, self.capacity, leaves, values, revive)
        if at < 0:
            return
        if not 0 <= leaves[at] < self.capacity:
            raise IndexError(f"Index {leaves[at]} is outside a tree of {self.capacity} items.")
        raise ValueError(f"The priority of index {leaves[at]} is {values[at]}; it must be finite and not negative.")

    def fill(self, first: int, count: int, priority: float) -> None:
        """Set ``count`` neighbours from ``first`` on to one priority, finite and not negative; not checked."""
        _fill(self._tree, self._starts, first, count, priority)

    def find(self, masses: ArrayLike) -> tuple[Ints, Floats]:
        """
        Find the items at places of the running sum, ``masses``, from 0 (included) to :attr:`total` (excluded).

        :return: the smallest indices whose running sums exceed the masses, never of priority 0, and their priorities
        :raises ValueError: if all priorities are 0
        """
        return self._find(np.array(masses, np.float64).reshape(-1), 0)

    def _find(self, masses: Floats, strata: int) -> tuple[Ints, Floats]:
        if not self._tree[0] > 0:
            raise ValueError("Nothing can be drawn: all priorities are 0.")
        indices, priorities = np.empty(len(masses), np.int64), np.empty(len(masses))
        _descend(self._tree, self._starts, masses, strata, indices, priorities)
        return indices, priorities

    def sample(self, n: int, rng: np.random.Generator, stratified: bool = True) -> tuple[Ints, Floats]:
        """
        Draw n items with probability ``priority / total``, with replacement: indices and priorities, ``[n]``.

        :param rng: random generator; ``n`` doubles are taken from it
        :param stratified: one draw from each of ``n`` equal parts of the total (Schaul et al., 2016, appendix B.2.1):
            same probabilities, less variance
        :raises ValueError: if all priorities are 0
        """
        return self._find(rng.random(n), n if stratified else 1)

    def __getstate__(self) -> dict[str, object]:
        return {"capacity": self.capacity, "leaves": np.array(self.leaves)}

    def __setstate__(self, state: dict[str, object]) -> None:
        leaves = np.asarray(state["leaves"])
        SumTree.__init__(self, len(leaves))
        self.update(np.arange(len(leaves)), leaves)


def _aligned_zeros(size: int) -> Floats:
    """Zeros whose first element starts a cache line."""
    raw = np.zeros(size + WIDTH, np.float64)
    skip = (-raw.ctypes.data % (WIDTH * raw.itemsize)) // raw.itemsize
    return raw[skip : skip + size]
