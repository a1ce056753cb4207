"""The sum tree against lists, running sums and statistics."""

import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_ext.replay import sum_tree
from sb3_ext.replay.sum_tree import SumTree

SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 1000, 1237]
priority = st.one_of(st.just(0.0), st.floats(0, 1e30), st.floats(0, 1e-300))


def filled(leaves: Any) -> SumTree:
    tree = SumTree(len(leaves))
    tree.update(np.arange(len(leaves)), leaves)
    return tree


@given(
    st.sampled_from(SIZES),
    st.lists(st.lists(st.tuples(st.integers(0, 10**6), priority), min_size=1, max_size=20), max_size=10),
)
def test_updates_equal_a_list(size: int, batches: list[list[tuple[int, float]]]) -> None:
    tree, plain = SumTree(size), [0.0] * size
    for batch in batches:
        batch = [(index % size, value) for index, value in batch]
        tree.update([i for i, _ in batch], [v for _, v in batch])
        for index, value in batch:  # the last of a repeated index counts
            plain[index] = value
    assert tree.leaves.tolist() == plain
    assert tree.total == pytest.approx(sum(plain), rel=1e-12)


@given(st.lists(priority, min_size=1, max_size=200).filter(any), st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_draws_are_in_range_and_never_of_priority_zero(leaves: list[float], places: list[float]) -> None:
    tree = filled(leaves)
    # up to and at the very end, where rounding decides
    indices, found = tree.find(np.array([*places, 1.0]) * tree.total)
    assert ((indices >= 0) & (indices < len(leaves))).all()
    assert (found > 0).all()
    assert found.tolist() == [leaves[i] for i in indices]


@pytest.mark.parametrize("size", SIZES)
def test_find_equals_a_search_in_the_running_sum(size: int) -> None:
    rng = np.random.default_rng(size)
    leaves = rng.integers(0, 5, size).astype(float)  # whole numbers: no rounding anywhere
    leaves[-1] += 1
    masses = rng.random(500) * leaves.sum()
    indices, found = filled(leaves).find(masses)
    assert indices.tolist() == np.searchsorted(np.cumsum(leaves), masses, side="right").tolist()
    assert found.tolist() == leaves[indices].tolist()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("size", "draws"), [(2, 10**5), (9, 10**5), (1237, 10**6), (10**6, 4 * 10**6)])
def test_frequencies(size: int, draws: int, stratified: bool) -> None:
    rng = np.random.default_rng(1)
    leaves = rng.pareto(1.5, size) + 1e-3
    tree = filled(leaves)
    # groups of similar priority and equal probability: the small ones show what float32 sums get wrong
    order = np.argsort(leaves)
    group = np.empty(size, np.int64)
    n_groups = min(size, 100)
    group[order] = np.minimum(np.cumsum(leaves[order]) / leaves.sum() * n_groups, n_groups - 1).astype(int)
    expected = np.bincount(group, leaves, n_groups) / leaves.sum()
    counts = np.zeros(n_groups)
    for _ in range(draws // 10**5):
        counts += np.bincount(group[tree.sample(10**5, rng, stratified)[0]], minlength=n_groups)
    used = expected > 0
    value, freedom = chi_square(counts[used], draws * expected[used]), int(used.sum()) - 1
    # normal approximation of the 99.9 % quantile (Wilson and Hilferty); strata only make the counts steadier
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert value < quantile
    if not stratified and freedom > 50:
        assert value > freedom * (1 - 2 / (9 * freedom) - 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


def test_the_root_does_not_drift() -> None:
    rng = np.random.default_rng(0)
    tree = SumTree(1000)
    for _ in range(100):
        tree.update(rng.integers(0, 1000, 10**4), rng.pareto(1.0, 10**4) * 10.0 ** rng.integers(-9, 9, 10**4))
    assert tree.total == pytest.approx(float(np.sum(tree.leaves)), rel=1e-12)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (3, np.nan, ValueError, "index 3 is nan"),
        (4, np.inf, ValueError, "index 4 is inf"),
        (0, -1.0, ValueError, "index 0 is -1.0"),
        (10, 1.0, IndexError, "Index 10 is outside a tree of 10"),
        (-1, 1.0, IndexError, "Index -1 is outside"),
    ],
)
def test_bad_input_changes_nothing(index: int, value: float, error: type[Exception], message: str) -> None:
    tree = filled(np.arange(10.0))
    with pytest.raises(error, match=message):
        tree.update([1, index, 2], [7.0, value, 7.0])
    assert tree.leaves.tolist() == list(range(10))
    assert tree.total == 45


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        SumTree(0)
    with pytest.raises(ValueError, match="all priorities are 0"):
        SumTree(3).sample(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 indices and 1 priorities"):
        SumTree(3).update([0, 1], [1.0])


def test_zero_items_stay_zero_unless_revived() -> None:
    tree = filled([1.0, 0.0, 3.0])
    tree.update([0, 1], [5.0, 6.0], revive=False)
    assert tree.leaves.tolist() == [5, 0, 3]
    tree.update([1], [6.0])
    assert tree.total == 14


def test_leaves_are_read_only_and_trees_are_pickled() -> None:
    tree = filled(np.random.default_rng(0).random(100))
    with pytest.raises(ValueError, match="read-only"):
        tree.leaves[0] = 1
    copy = pickle.loads(pickle.dumps(tree))
    a, b = (t.sample(50, np.random.default_rng(1)) for t in (tree, copy))
    assert a[0].tolist() == b[0].tolist()
    assert copy.total == tree.total


def test_plain_python_gives_the_same() -> None:
    # the functions numba compiled, and the same ones interpreted
    rng = np.random.default_rng(3)
    leaves, masses = rng.pareto(1.5, 700), rng.random(200)
    tree, plain = filled(leaves), SumTree(700)
    sum_tree._write.py_func(plain._tree, plain._starts, 700, np.arange(700), leaves, True)
    assert plain._tree.tolist() == tree._tree.tolist()
    indices, found = np.empty(200, np.int64), np.empty(200)
    sum_tree._descend.py_func(plain._tree, plain._starts, masses * tree.total, 0, indices, found)
    expected = tree.find(masses * tree.total)
    assert indices.tolist() == expected[0].tolist()
    assert found.tolist() == expected[1].tolist()


def test_works_without_jit() -> None:
    code = (
        "import numpy as np; from sb3_ext.replay.sum_tree import SumTree; t = SumTree(20);"
        "t.update(np.arange(20), np.arange(20.)); print(t.total, t.find([0.0, 189.9])[0].tolist())"
    )
    environ = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "190.0 [1, 19]"


@pytest.mark.slow
def test_a_hundred_million_updates() -> None:
    rng = np.random.default_rng(0)
    tree = SumTree(10**5)
    for _ in range(1000):
        tree.update(rng.integers(0, 10**5, 10**5), rng.pareto(1.0, 10**5))
    assert tree.total == pytest.approx(float(np.sum(tree.leaves)), rel=1e-9)
