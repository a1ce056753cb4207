"""Memoised reanalysis: the same targets from fewer searches, and nothing that is out of date."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_ext import EfficientZeroV2
from sb3_ext.efficientzero.replay import SearchMemo, SequenceReplayBuffer
from sb3_ext.efficientzero.targets import loss_masks
from tests.helpers import SMALL, Masked, fill, randomize


def collect(env: Any, **kwargs: Any) -> tuple[EfficientZeroV2, SequenceReplayBuffer]:
    """A model that has not learnt, with random heads, and its buffer of 100 steps."""
    settings = {**SMALL, "learning_starts": 1000, "memoize_reanalysis": True, **kwargs}
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **settings).learn(100)
    randomize(model.policy_target)  # type: ignore[arg-type]
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    return model, model.replay_buffer


def count_rows(model: EfficientZeroV2, monkeypatch: pytest.MonkeyPatch, noise: bool) -> dict[str, list[int]]:
    """Count what the target network encodes and searches; without noise if so wanted."""
    policy, counts = model.policy_target, {"encoded": [], "searched": []}  # type: ignore[var-annotated]
    roots, plan = policy.roots, policy.plan

    def counted_roots(observations: th.Tensor) -> Any:
        counts["encoded"].append(len(observations))
        return roots(observations)

    def counted_plan(found: Any, **kwargs: Any) -> Any:
        counts["searched"].append(len(found.values))
        return plan(found, **{**kwargs, "noise": noise})

    monkeypatch.setattr(policy, "roots", counted_roots)
    monkeypatch.setattr(policy, "plan", counted_plan)
    return counts


@pytest.mark.parametrize("target", ["n_step", "search", "mixed"])
@pytest.mark.parametrize(
    ("task", "value"),
    [("CartPole-v1", "mean"), ("two CartPoles", "improved"), ("masks", "mean"), ("masks", "improved")],
)
def test_targets_are_the_same(task: str, value: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {
        "CartPole-v1": lambda: make_vec_env("CartPole-v1", 1), "two CartPoles": lambda: make_vec_env("CartPole-v1", 2),
        "masks": lambda: make_vec_env(Masked, 1),
    }[task]()  # fmt: skip
    model, buffer = collect(env, value_target=target, search_value=value, mixed_start=0, mixed_threshold=40)
    counts, known = count_rows(model, monkeypatch, noise=False), set[int]()
    for first in (0, 0, 30, 70):  # the second time everything is known, then part of it
        batch = buffer.windows(np.arange(first, min(first + 50, 100)), np.ones(min(50, 100 - first), np.float32))
        model.memoize_reanalysis = False
        plain = model.reanalyze(batch)
        assert counts["searched"].pop() == 6 * len(batch.lengths)
        model.memoize_reanalysis = True
        memo = model.reanalyze(batch)
        chosen, valued, _ = (mask.astype(bool) for mask in loss_masks(batch.lengths, batch.terminated, 5))
        np.testing.assert_allclose(memo.values[valued], plain.values[valued], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memo.policy[chosen], plain.policy[chosen], rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(memo.best[chosen], plain.best[chosen])
        stored = chosen & (batch.positions[:, :6] >= 0)
        here = set(batch.positions[:, :6][stored].tolist())
        assert sum(counts["searched"]) == len(here - known) + (chosen & ~stored).sum()
        counts["searched"].clear()
        known |= here
    assert len(known) > 90


def test_nothing_is_searched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, buffer = collect("Pendulum-v1")
    counts = count_rows(model, monkeypatch, noise=True)
    batch = buffer.windows(np.array([5, 5, 6, 40, 8]), np.ones(5, np.float32))
    first, second = model.reanalyze(batch), model.reanalyze(batch)
    # positions 5 to 13 and 40 to 45 are searched; the bootstraps of 6 + 10, 40 + 10, 8 + 10 reach 18 and 50
    assert counts == {"encoded": [14 + 11], "searched": [9 + 6]}
    for one, two in zip(first, second, strict=True):
        assert one == two if isinstance(one, float) else th.equal(one, two)
    assert th.equal(first.policy[0], first.policy[1]), "the same window twice"
    assert th.equal(first.actions[0, 1:], first.actions[2, :-1]), "windows that overlap"  # type: ignore[index]
    np.testing.assert_allclose(first.policy.sum(2), 1, rtol=1e-5)
    late = buffer.windows(np.array([9]), np.ones(1, np.float32))  # 9 to 14 searched, 14 valued before, 19 not
    model.reanalyze(late)
    assert counts == {"encoded": [25, 2], "searched": [15, 1]}


def test_it_forgets_with_the_target_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, buffer = collect("CartPole-v1")
    counts = count_rows(model, monkeypatch, noise=True)
    batch = buffer.windows(np.array([0]), np.ones(1, np.float32))
    before = model.reanalyze(batch)
    weights = model.policy_target.state_dict()
    model.policy_target.load_state_dict({name: x.clone() for name, x in weights.items()})  # the same again
    assert th.equal(model.reanalyze(batch).values, before.values)
    assert len(counts["searched"]) == 1
    buffer = model.replay_buffer = pickle.loads(pickle.dumps(buffer))
    model.reanalyze(batch)
    assert len(counts["searched"]) == 1, "a loaded buffer knows what it knew"
    loaded = pickle.loads(pickle.dumps(buffer.memo))
    next(model.policy_target.parameters()).data.add_(1)  # other weights in the same place, as in another process
    loaded.follow(model.policy_target)
    assert not loaded.searched.any()
    randomize(model.policy_target)  # type: ignore[arg-type]
    assert not th.equal(model.reanalyze(batch).values, before.values)
    assert counts["searched"][0] == counts["searched"][1]


def test_it_forgets_for_another_model() -> None:
    one, buffer = collect("CartPole-v1")
    batch = buffer.windows(np.array([0]), np.ones(1, np.float32))
    one.reanalyze(batch)
    other, _ = collect("CartPole-v1")
    other.policy_target.load_state_dict({k: x + 0.1 for k, x in one.policy_target.state_dict().items()})
    other.replay_buffer = pickle.loads(pickle.dumps(buffer))
    assert not th.equal(other.reanalyze(batch).values, one.reanalyze(batch).values)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_it_forgets_what_is_overwritten(n_envs: int) -> None:
    buffer, _ = fill(n_envs, 100)
    size = buffer.buffer_size * n_envs
    buffer.memo = SearchMemo(size)
    rng, known = np.random.default_rng(1), []
    for step in range(300):
        positions = rng.integers(size, size=3)
        buffer.memo.put(positions, "seen", buffer.windows(positions, np.ones(3, np.float32)).observations[:, 0])
        obs = rng.normal(size=(n_envs, 2)).astype(np.float32)
        buffer.add(obs, obs + 1, np.zeros((n_envs, 1)), np.zeros(n_envs), np.full(n_envs, step % 7 == 0), [{}] * n_envs)
        now = np.flatnonzero(buffer.memo.searched)
        stored = buffer.windows(now, np.ones(len(now), np.float32)).observations[:, 0]
        np.testing.assert_array_equal(buffer.memo.get("seen", now), stored)
        known.append(len(now))
    assert min(known[100:]) > size // 3


def test_positions_say_where_observations_are() -> None:
    buffer, _ = fill(2, 100)
    batch = buffer.sample(200)
    stored = batch.positions >= 0
    firsts = buffer.windows(batch.positions[stored], np.ones(stored.sum(), np.float32)).observations[:, 0]
    np.testing.assert_array_equal(firsts, batch.observations[stored])
    assert stored[np.arange(5) < batch.lengths[:, None]].all()
    ends = batch.positions[np.arange(200), batch.lengths]
    assert (ends[batch.terminated] == -1).all()
    assert (ends >= 0).any()
