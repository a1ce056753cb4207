"""The batched search against a recursive one, its schedule, chains and bandits with known answers, and its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_ext.search.gumbel import RecurrentOutput, SearchOutput, gumbel_search, principal_line
from tests.reference import Node, SlowSearch

STATES = 29


class Table:
    """A random tabular model: the embedding is the number of a state."""

    def __init__(self, seed: int, slots: int, inner: int, holes: bool) -> None:
        rng = np.random.default_rng(seed)
        self.next = rng.integers(0, STATES, (STATES, slots))
        self.reward = rng.normal(size=(STATES, slots)).astype(np.float32)
        self.value = rng.normal(size=STATES).astype(np.float32)
        self.logits = rng.normal(size=(STATES, inner)).astype(np.float32) * 2
        if holes:
            hole = rng.random(self.logits.shape) < 0.4
            hole[np.arange(STATES), rng.integers(0, inner, STATES)] = False
            self.logits[hole] = -np.inf

    def numpy(self, states: Any, actions: Any) -> RecurrentOutput:
        s = states[:, 0]
        new = self.next[s, actions]
        return RecurrentOutput(self.reward[s, actions], self.value[new], self.logits[new], new[:, None])

    def torch(self, states: Any, actions: Any) -> RecurrentOutput:
        assert isinstance(states, th.Tensor)
        assert actions.dtype == th.int64
        return RecurrentOutput(*(th.from_numpy(x) for x in self.numpy(states.numpy(), actions.numpy())))

    def pair(self, states: Any, actions: Any) -> RecurrentOutput:
        out = self.numpy(states[0], actions)
        assert np.array_equal(states[1][:, 1, 0], states[0][:, 0] * 0.5)
        return out._replace(embedding=(out.embedding, self.half(out.embedding)))

    def half(self, states: Any) -> Any:
        return np.repeat(states * 0.5, 6).reshape(-1, 2, 3)

    def slow(self, s: int, a: int) -> tuple[float, float, list[float], int]:
        new = int(self.next[s, a])
        return float(self.reward[s, a]), float(self.value[new]), self.logits[new].tolist(), new


def roots(seed: int, batch: int, slots: int) -> tuple[Any, ...]:
    """Logits, values, states, noise, mask with different numbers of legal actions."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, slots)).astype(np.float32)
    invalid = rng.random((batch, slots)) < rng.random((batch, 1)) * 0.8
    invalid[np.arange(batch), rng.integers(0, slots, batch)] = False
    gumbel = rng.gumbel(size=(batch, slots)).astype(np.float32)
    values = rng.normal(size=batch).astype(np.float32)
    return logits, values, rng.integers(0, STATES, (batch, 1)), gumbel, invalid


def same(x: SearchOutput, y: SearchOutput) -> None:
    for a, b in zip(x[:-1], y[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    for field in ("parents", "children", "visits", "qvalues", "prior", "values", "rewards", "depths"):
        np.testing.assert_array_equal(getattr(x.tree, field), getattr(y.tree, field))


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3, 4, 7, 18]),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 4, 6, 8, 16, 30]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(50.0, 0.1, 0.01), (1.0, 1.0, 5.0)]),
)
def test_equals_the_recursive_search(
    seed: int, slots: int, n: int, m: int, holes: bool, fewer: bool, constants: tuple[float, float, float]
) -> None:
    inner = max(slots // 2, 1) if fewer else slots
    table = Table(seed, slots, inner, holes)
    logits, values, states, gumbel, invalid = roots(seed + 1, 5, slots)
    c_visit, c_scale, min_range = constants
    options = {"c_visit": c_visit, "c_scale": c_scale, "min_range": min_range}
    limits = {"num_simulations": n, "max_num_considered_actions": m}
    fast = gumbel_search(
        logits, values, states, table.numpy, gamma=0.97, gumbel=gumbel, invalid_actions=invalid, **limits, **options
    )
    for b in range(5):
        slow = SlowSearch(table.slow, 0.97, c_visit, c_scale, min_range)
        root = Node(int(states[b, 0]), 0.0, float(values[b]), np.where(invalid[b], -np.inf, logits[b]).tolist())
        want = slow.run(root, gumbel[b].tolist(), n, m)
        assert fast.visits[b].tolist() == want["visits"]
        assert fast.actions[b] == want["action"]
        np.testing.assert_allclose(fast.improved_policy[b], want["policy"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(fast.completed_qvalues[b], want["completed"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fast.root_values[b], want["value"], rtol=1e-5, atol=1e-6)
        check_tree(fast.tree, b, 0, root, 0)


def check_tree(tree: Any, b: int, at: int, node: Node, depth: int) -> None:
    assert tree.depths[b, at] == depth
    np.testing.assert_allclose(tree.values[b, at], node.value)
    np.testing.assert_allclose(tree.rewards[b, at], node.reward)
    for a, returns in node.returns.items():
        child = tree.children[b, at, a]
        assert tree.visits[b, at, a] == len(returns)
        assert (child >= 0) == (a in node.children)
        np.testing.assert_allclose(tree.prior[b, at, a], node.priors().get(a, 0.0))
        if child >= 0:
            assert (tree.parents[b, child], tree.parent_slots[b, child]) == (at, a)
            np.testing.assert_allclose(tree.qvalues[b, at, a], node.q(a))
            check_tree(tree, b, child, node.children[a], depth + 1)


@pytest.mark.parametrize(
    ("slots", "n", "m", "counts"),
    [
        # candidates in order of their scores: visits; every phase shares its simulations equally
        (4, 16, 4, [6, 6, 2, 2]),
        (18, 16, 8, [4, 4, 2, 2, 1, 1, 1, 1]),
        (16, 32, 16, [4] * 4 + [2] * 4 + [1] * 8),
        (3, 4, 2, [2, 2]),
        (4, 7, 1, [7]),
        (4, 5, 2, [3, 2]),
        (6, 3, 6, [1, 1, 1]),
        (6, 1, 4, [1]),
        (3, 12, 3, [5, 5, 2]),  # 3 floor(12 / (3 log2 3)) = 6 on three, 6 on two
        (2, 16, 4, [8, 8]),
        (20, 50, 16, [12] * 2 + [5] * 2 + [2] * 4 + [1] * 8),  # the table in halving.py
    ],
)
def test_schedule(slots: int, n: int, m: int, counts: list[int]) -> None:
    # no rewards and no values: scores are the logits for ever
    def model(embedding: Any, actions: Any) -> RecurrentOutput:
        zeros = np.zeros(1, np.float32)
        return RecurrentOutput(zeros, zeros, np.zeros((1, slots), np.float32), embedding)

    logits = -np.arange(slots, dtype=np.float32)[None]
    found = gumbel_search(
        logits, np.zeros(1), np.zeros((1, 1)), model, num_simulations=n, max_num_considered_actions=m, gamma=1.0
    )
    assert found.visits[0].tolist() == counts + [0] * (slots - len(counts))
    assert found.actions[0] == 0


def test_phases_in_time() -> None:
    seen: list[int] = []

    def model(embedding: Any, actions: Any) -> RecurrentOutput:
        if embedding[0, 0] == 0:
            seen.append(int(actions[0]))
        zeros = np.zeros(1, np.float32)
        return RecurrentOutput(zeros, zeros, np.zeros((1, 8), np.float32), embedding + 1)

    logits = -np.arange(8, dtype=np.float32)[None]
    found = gumbel_search(
        logits, np.zeros(1), np.zeros((1, 1)), model, num_simulations=16, max_num_considered_actions=8, gamma=1.0
    )
    tree, order = found.tree, []
    for node in range(1, 17):  # the root's action of each simulation
        while tree.parents[0, node] > 0:
            node = tree.parents[0, node]
        order.append(int(tree.parent_slots[0, node]))
    assert order == [*range(8), *range(4), 0, 1, 0, 1]
    assert seen == list(range(8))


@pytest.mark.parametrize("depth", range(1, 13))
def test_chain_of_rewards(depth: int) -> None:
    def model(embedding: Any, actions: Any) -> RecurrentOutput:
        batch = len(actions)
        one, zero = np.ones(batch, np.float32), np.zeros(batch, np.float32)
        return RecurrentOutput(one, zero, np.zeros((batch, 1), np.float32), embedding)

    for gamma in (1.0, 0.9):
        found = gumbel_search(
            np.zeros((2, 1)),
            np.zeros(2),
            np.zeros((2, 1)),
            model,
            num_simulations=depth,
            max_num_considered_actions=4,
            gamma=gamma,
        )
        returns = [sum(gamma**k for k in range(d)) for d in range(1, depth + 1)]
        np.testing.assert_allclose(found.completed_qvalues[:, 0], np.mean(returns), rtol=1e-6)
        np.testing.assert_allclose(found.root_values, sum(returns) / (depth + 1), rtol=1e-6)
        assert found.tree.depths[0].tolist() == list(range(depth + 1))
        assert principal_line(found.tree, 1) == [0] * depth


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    table = Table(3, 6, 6, True)
    logits, values, states, gumbel, invalid = roots(4, 9, 6)
    options: dict[str, Any] = {"num_simulations": 25, "max_num_considered_actions": 5, "gamma": 0.99}
    whole = gumbel_search(logits, values, states, table.numpy, gumbel=gumbel, invalid_actions=invalid, **options)
    for b in range(9):
        one = slice(b, b + 1)
        alone = gumbel_search(
            logits[one],
            values[one],
            states[one],
            table.numpy,
            gumbel=gumbel[one],
            invalid_actions=invalid[one],
            **options,
        )
        same(alone, whole._replace(**{k: getattr(whole, k)[one] for k in whole._fields[:-1]}, tree=cut(whole, one)))


def cut(found: SearchOutput, rows: slice) -> Any:
    return found.tree._replace(data=found.tree.data[rows])


def test_numpy_torch_tuples_and_twice() -> None:
    table = Table(7, 4, 3, False)
    logits, values, states, gumbel, invalid = roots(8, 6, 4)
    options: dict[str, Any] = {"num_simulations": 16, "max_num_considered_actions": 4, "gamma": 0.99}
    kept = [x.copy() for x in (logits, values, states, gumbel, invalid)]
    first = gumbel_search(logits, values, states, table.numpy, gumbel=gumbel, invalid_actions=invalid, **options)
    same(first, gumbel_search(logits, values, states, table.numpy, gumbel=gumbel, invalid_actions=invalid, **options))
    tensors = [th.from_numpy(x) for x in (logits, values, states, gumbel, invalid)]
    tensors[0].requires_grad_(True)
    same(
        first,
        gumbel_search(*tensors[:3], table.torch, gumbel=tensors[3], invalid_actions=tensors[4], **options),
    )
    same(
        first,
        gumbel_search(
            logits, values, (states, table.half(states)), table.pair, gumbel=gumbel, invalid_actions=invalid, **options
        ),
    )
    assert all(np.array_equal(x, y) for x, y in zip(kept, (logits, values, states, gumbel, invalid), strict=True))


@pytest.mark.parametrize("roots_at_once", [1, 4, 9, 100])
def test_roots_in_parts_equal_all_roots_at_once(roots_at_once: int) -> None:
    table = Table(7, 4, 3, False)
    logits, values, states, gumbel, invalid = roots(8, 9, 4)
    options: dict[str, Any] = {"num_simulations": 16, "max_num_considered_actions": 4, "gamma": 0.99}
    options |= {"gumbel": gumbel, "invalid_actions": invalid}
    calls: list[int] = []

    def counted(embedding: Any, actions: Any) -> RecurrentOutput:
        calls.append(len(actions))
        return table.pair(embedding, actions)

    whole = gumbel_search(logits, values, states, table.numpy, **options)
    pair = (states, table.half(states))
    same(whole, gumbel_search(logits, values, pair, counted, roots_at_once=roots_at_once, **options))
    sizes = [min(roots_at_once, 9 - start) for start in range(0, 9, roots_at_once)]
    assert calls == [size for size in sizes for _ in range(16)]


def bandit(q: Any) -> Callable[[Any, Any], RecurrentOutput]:
    """One step with exact rewards, then nothing."""

    def model(embedding: Any, actions: Any) -> RecurrentOutput:
        batch = len(actions)
        first = embedding[:, 0] == 0
        reward = np.where(first, q[np.arange(batch), actions], 0).astype(np.float32)
        return RecurrentOutput(reward, np.zeros(batch, np.float32), np.zeros(q.shape, np.float32), embedding + 1)

    return model


def test_finds_the_best_arm() -> None:
    rng = np.random.default_rng(0)
    q = rng.permuted(np.tile(np.linspace(-1, 1, 8), (200, 1)), axis=1)
    found = gumbel_search(
        np.zeros((200, 8)),
        np.zeros(200),
        np.zeros((200, 1)),
        bandit(q),
        num_simulations=32,
        max_num_considered_actions=8,
        gamma=1.0,
        gumbel=rng.gumbel(size=(200, 8)) * 0.1,
    )
    assert (found.actions == q.argmax(1)).all()
    assert (found.improved_policy.argmax(1) == q.argmax(1)).all()
    masked = np.zeros_like(q, bool)
    masked[np.arange(200), q.argmax(1)] = np.arange(200) % 2 == 0
    found = gumbel_search(
        np.zeros((200, 8)),
        np.zeros(200),
        np.zeros((200, 1)),
        bandit(q),
        num_simulations=32,
        max_num_considered_actions=8,
        gamma=1.0,
        invalid_actions=masked,
    )
    assert (found.actions == np.where(masked, -9, q).argmax(1)).all()
    assert (found.improved_policy[masked] == 0).all()
    assert (found.visits[masked] == 0).all()


def test_improved_values_leave_out_visits_that_only_compare() -> None:
    q = np.array([[1.0, 0.0, 5.0]])
    settings = {"num_simulations": 8, "max_num_considered_actions": 2, "gamma": 1.0}
    forbidden = np.array([[False, False, True]])
    found = gumbel_search(np.zeros((1, 3)), [0.5], np.zeros((1, 1)), bandit(q), invalid_actions=forbidden, **settings)
    assert found.visits.tolist() == [[4, 4, 0]]
    assert found.root_values == pytest.approx([(0.5 + 4 * 1 + 4 * 0) / 9])
    sure = 1 / (1 + np.exp(-(50 + 4) * 0.1))  # equal priors, normalised Q of 1 and 0
    assert found.improved_policy[0] == pytest.approx([sure, 1 - sure, 0])
    assert found.improved_values == pytest.approx([sure * 1 + (1 - sure) * 0])
    assert found.improved_values.dtype == np.float32


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 24))
def test_the_improved_policy_is_not_worse_than_the_prior(seed: int, slots: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    q, logits = rng.normal(size=(16, slots)), rng.normal(size=(16, slots)).astype(np.float32)
    prior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    exact = (prior * q).sum(1)
    found = gumbel_search(
        logits,
        exact,
        np.zeros((16, 1)),
        bandit(q),
        num_simulations=n,
        max_num_considered_actions=slots,
        gamma=1.0,
        gumbel=rng.gumbel(size=(16, slots)),
        min_range=1e-6,
    )
    np.testing.assert_allclose(found.improved_policy.sum(1), 1, rtol=1e-5)
    # untried actions stand for v_mix, in which the value of the prior is mixed with what was seen
    if n >= slots and (found.visits > 0).all():
        assert ((found.improved_policy * q).sum(1) >= exact - 1e-5).all()


def test_huge_weights_stay_finite() -> None:
    logits = np.array([[0.0, -400.0, -np.inf, 30.0]], np.float32)
    q = np.array([[5.0, 100.0, 0.0, -3.0]])
    found = gumbel_search(
        logits,
        np.zeros(1),
        np.zeros((1, 1)),
        bandit(q),
        num_simulations=50,
        max_num_considered_actions=4,
        gamma=1.0,
        c_scale=100.0,
    )
    assert found.actions[0] == 1
    np.testing.assert_allclose(found.improved_policy[0], [0, 1, 0, 0], atol=1e-6)


def run(**changes: Any) -> SearchOutput:
    """A small search with something changed."""
    q = np.zeros((3, 4))
    arguments: dict[str, Any] = {
        "prior_logits": np.zeros((3, 4)),
        "values": np.zeros(3),
        "embedding": np.zeros((3, 1)),
        "recurrent_fn": bandit(q),
        "num_simulations": 4,
        "max_num_considered_actions": 4,
        "gamma": 1.0,
    }
    return gumbel_search(**(arguments | changes))


def at(place: Any, number: float, shape: tuple[int, ...]) -> Any:
    array = np.zeros(shape)
    array[place] = number
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_simulations": 0}, "num_simulations must be at least 1, got 0"),
        ({"max_num_considered_actions": 0}, "max_num_considered_actions must be at least 1"),
        ({"roots_at_once": 0}, "roots_at_once must be at least 1, got 0"),
        ({"min_range": 0.0}, "min_range"),
        ({"prior_logits": np.zeros(4)}, r"prior_logits must be \[B, A\]"),
        ({"values": np.zeros((3, 1))}, r"values must have shape \(3,\)"),
        ({"gumbel": np.zeros((3, 3))}, "gumbel must have shape"),
        ({"gumbel": at((0, 0), np.nan, (3, 4))}, "gumbel is not finite"),
        ({"invalid_actions": np.zeros((2, 4), bool)}, "invalid_actions must have shape"),
        ({"invalid_actions": at(1, 1, (3, 4)) > 0}, r"Row 1 has no legal action \(root\)"),
        ({"embedding": np.zeros((2, 1))}, "3 rows of logits, but an embedding of shape"),
        ({"values": at(2, np.nan, (3,))}, r"a value that is not finite \(root, row 2\)"),
        (
            {"values": at(2, np.nan, (3,)), "roots_at_once": 1, "recurrent_fn": bandit(np.zeros((1, 4)))},
            r"a value that is not finite \(root, row 2\)",
        ),
        ({"prior_logits": at((1, 3), np.inf, (3, 4))}, r"a logit that is NaN or infinite \(root, row 1\)"),
        ({"prior_logits": at((1, 3), np.nan, (3, 4))}, r"a logit that is NaN or infinite \(root, row 1\)"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": at(1, np.inf, (3,))}, r"a reward that is not finite \(simulation 2, row 1\)"),
        ({"value": at(0, np.nan, (3,))}, r"a value that is not finite \(simulation 2, row 0\)"),
        ({"prior_logits": at((2, 0), np.nan, (3, 4))}, r"a logit that is NaN or infinite \(simulation 2, row 2\)"),
        ({"prior_logits": at(2, -np.inf, (3, 4))}, r"Row 2 has no legal action \(simulation 2\)"),
        ({"prior_logits": np.zeros((3, 5))}, r"logits of shape \(3, 5\)"),
        ({"reward": np.zeros((3, 1))}, r"rewards \(3, 1\)"),
        ({"embedding": np.zeros((3, 2))}, r"embedding of shape \(3, 2\)"),
        ({"embedding": (np.zeros((3, 1)), np.zeros((3, 1)))}, "2 embeddings instead of 1"),
    ],
)
def test_bad_networks(changes: dict[str, Any], message: str) -> None:
    calls = []

    def model(embedding: Any, actions: Any) -> RecurrentOutput:
        calls.append(1)
        out = bandit(np.zeros((3, 4)))(embedding, actions)
        return out._replace(**changes) if len(calls) == 3 else out

    with pytest.raises(ValueError, match=message):
        run(recurrent_fn=model)
