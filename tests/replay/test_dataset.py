from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ext.cql.mixed import MixedReplayBuffer
from sb3_ext.replay.dataset import OfflineReplayBuffer, discounted_returns
from sb3_ext.replay.frames import ArrayFrames
from tests import reference

SPACE = spaces.Box(-1000, 1000, (2,), np.float32)


def make_buffer(episodes: list[dict[str, Any]], n_actions: int = 3, **kwargs: Any) -> OfflineReplayBuffer:
    """Each episode: rewards, optionally actions and terminated; observation t of episode k is (100 k + t, k)."""
    frames, actions, rewards, terminated, lengths = [], [], [], [], []
    for k, episode in enumerate(episodes):
        steps = len(episode["rewards"])
        frames += [(100.0 * k + t, float(k)) for t in range(steps + 1)]
        actions += [*episode.get("actions", [0] * steps), 99]  # 99 and -7: what stands in the last row is never used
        rewards += [*episode["rewards"], -7.0]
        terminated += [False] * (steps - 1) + [episode.get("terminated", False), False] if steps else [False]
        lengths.append(steps)
    frame_stack = kwargs.get("frame_stack", 1)
    space = spaces.Box(-1000, 1000, (2 * frame_stack,), np.float32)
    return OfflineReplayBuffer(
        ArrayFrames(np.array(frames, np.float32)),
        np.array(actions, np.uint8),
        np.array(rewards, np.float32),
        np.array(terminated, bool),
        np.array(lengths, np.int64),
        space,
        spaces.Discrete(n_actions),
        **{"device": "cpu", **kwargs},
    )


TWO = [
    {"rewards": [1.0, 2.0, 3.0], "actions": [0, 1, 2], "terminated": True},
    {"rewards": [10.0, 20.0], "actions": [2, 2], "terminated": False},
]


def everything(buffer: OfflineReplayBuffer) -> Any:
    return buffer._get_samples(np.arange(buffer.buffer_size))


def test_one_step_by_hand() -> None:
    batch = everything(make_buffer(TWO))
    assert batch.observations[:, 0].tolist() == [0, 1, 2, 100, 101]
    assert batch.next_observations[:, 0].tolist() == [1, 2, 3, 101, 102]
    assert batch.actions.tolist() == [[0], [1], [2], [2], [2]]
    assert batch.rewards.tolist() == [[1], [2], [3], [10], [20]]
    assert batch.dones.tolist() == [[0], [0], [1], [0], [0]]  # the second episode was cut: it bootstraps
    assert batch.discounts is None


def test_three_steps_by_hand() -> None:
    batch = everything(make_buffer(TWO, n_steps=3, gamma=0.5))
    assert batch.observations[:, 0].tolist() == [0, 1, 2, 100, 101]
    assert batch.rewards.squeeze(1).tolist() == [1 + 1 + 0.75, 2 + 1.5, 3, 10 + 10, 20]
    assert batch.next_observations[:, 0].tolist() == [3, 3, 3, 102, 102]
    assert batch.dones.squeeze(1).tolist() == [1, 1, 1, 0, 0]
    assert batch.discounts is not None
    assert batch.discounts.squeeze(1).tolist() == [0.125, 0.25, 0.5, 0.25, 0.5]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.lists(st.integers(-5, 5), min_size=1, max_size=7), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from(["zero", "reset"]),
)
def test_every_transition_against_the_loop(
    episodes: list[tuple[list[int], bool]], n_steps: int, frame_stack: int, gamma: float, padding_type: str
) -> None:
    made = [{"rewards": list(map(float, rewards)), "terminated": end} for rewards, end in episodes]
    options = {"n_steps": n_steps, "frame_stack": frame_stack, "gamma": gamma, "padding_type": padding_type}
    batch = everything(make_buffer(made, **options))
    wanted: list[reference.Transition] = []
    for k, (rewards, end) in enumerate(episodes):
        frames = [np.array([100.0 * k + t, k], np.float32) for t in range(len(rewards) + 1)]
        wanted += reference.episode_transitions(frames, [0] * len(rewards), rewards, end, **options)
    assert_same(batch, wanted, n_steps)


def assert_same(batch: Any, wanted: list[reference.Transition], n_steps: int) -> None:
    assert len(batch.observations) == len(wanted)
    np.testing.assert_array_equal(batch.observations.numpy(), np.stack([w.observation for w in wanted]))
    np.testing.assert_array_equal(batch.next_observations.numpy(), np.stack([w.next_observation for w in wanted]))
    assert batch.actions.squeeze(1).tolist() == [w.action for w in wanted]
    assert batch.dones.squeeze(1).tolist() == [w.done for w in wanted]
    np.testing.assert_allclose(batch.rewards.squeeze(1), [w.reward for w in wanted], rtol=1e-6)
    if n_steps == 1:
        assert batch.discounts is None
    else:
        np.testing.assert_allclose(batch.discounts.squeeze(1), [w.discount for w in wanted], rtol=1e-6)


def test_batches_have_the_shapes_and_types_sb3_expects() -> None:
    buffer = make_buffer(TWO, n_steps=2, frame_stack=3)
    batch = buffer.sample(7)
    assert batch.observations.shape == batch.next_observations.shape == (7, 6)
    for tensor, dtype in (
        (batch.observations, th.float32),
        (batch.actions, th.int64),
        (batch.rewards, th.float32),
        (batch.dones, th.float32),
        (batch.discounts, th.float32),
    ):
        assert tensor is not None
        assert tensor.dtype == dtype
    for tensor in (batch.actions, batch.rewards, batch.dones, batch.discounts):
        assert tensor is not None
        assert tensor.shape == (7, 1)
    assert buffer.size() == buffer.buffer_size == 5
    assert buffer.n_episodes == 2


def test_sampling_is_uniform() -> None:
    buffer = make_buffer(TWO, seed=0)
    drawn = buffer.sample(50_000).observations[:, 0].numpy()
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [0, 1, 2, 100, 101]
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(50_000 * 0.2 * 0.8)


def test_the_sampler_has_its_own_seed() -> None:
    buffer, same = make_buffer(TWO, seed=3), make_buffer(TWO, seed=3)
    first = buffer.sample(20).observations
    np.random.seed(0)
    np.random.rand()
    assert th.equal(first, same.sample(20).observations)
    second = buffer.sample(20).observations
    assert not th.equal(first, second)
    buffer.seed(3)
    assert th.equal(first, buffer.sample(20).observations)
    assert not th.equal(first, make_buffer(TWO, seed=4).sample(20).observations)


def test_sampling_leaves_the_global_generators_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    make_buffer(TWO).sample(20)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_normalization_is_applied() -> None:
    env = VecNormalize(DummyVecEnv([lambda: IdentityEnvBox()]), norm_obs=False, clip_reward=2.0)
    env.ret_rms.var = np.array(4.0)
    buffer = make_buffer(TWO, seed=0)
    raw = buffer.sample(50).rewards
    buffer.seed(0)
    assert raw.max() == 20
    np.testing.assert_allclose(buffer.sample(50, env=env).rewards, (raw / 2).clamp(-2, 2), rtol=1e-5)


def test_each_reward_is_clipped_before_the_sum() -> None:
    one, three = make_buffer(TWO), make_buffer(TWO, n_steps=3, gamma=0.5)
    one.clip_rewards = three.clip_rewards = True
    assert everything(one).rewards.squeeze(1).tolist() == [1] * 5
    assert everything(three).rewards.squeeze(1).tolist() == [1 + 0.5 + 0.25, 1.5, 1, 1.5, 1]


def test_each_reward_is_normalized_before_it_is_clipped_and_summed() -> None:
    env = VecNormalize(DummyVecEnv([lambda: IdentityEnvBox()]), norm_obs=False, clip_reward=2.0)
    env.ret_rms.var = np.array(16.0)
    buffer = make_buffer(TWO, n_steps=3, gamma=0.5)
    rewards = buffer._get_samples(np.arange(5), env).rewards.squeeze(1)
    np.testing.assert_allclose(rewards, [0.25 + 0.25 + 0.1875, 0.5 + 0.375, 0.75, 2 + 1, 2], rtol=1e-5)
    buffer.clip_rewards = True
    rewards = buffer._get_samples(np.arange(5), env).rewards.squeeze(1)
    np.testing.assert_allclose(rewards, [0.25 + 0.25 + 0.1875, 0.5 + 0.375, 0.75, 1 + 0.5, 1], rtol=1e-5)


def test_a_dataset_cannot_be_changed() -> None:
    buffer = make_buffer(TWO)
    with pytest.raises(TypeError, match="fixed"):
        buffer.add(None, None, None, None, None, None)
    with pytest.raises(TypeError, match="cannot be reset"):
        buffer.reset()
    assert buffer.size() == 5


def test_pickled_buffer_goes_on_where_it_was() -> None:
    buffer = make_buffer(TWO, n_steps=2, seed=1)
    buffer.sample(3)
    again = pickle.loads(pickle.dumps(buffer))
    assert th.equal(buffer.sample(10).observations, again.sample(10).observations)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="no transition"):
        make_buffer([])
    with pytest.raises(ValueError, match="Episode 1 has 0 steps"):
        make_buffer([{"rewards": [1.0]}, {"rewards": []}])
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        make_buffer(TWO, n_steps=0)
    frames, zeros = ArrayFrames(np.zeros((3, 2), np.float32)), np.zeros(3)
    with pytest.raises(ValueError, match=r"3 frames, 3 actions.* 4 rows"):
        OfflineReplayBuffer(
            frames, zeros, zeros, zeros.astype(bool), np.array([3]), SPACE, spaces.Discrete(2), device="cpu"
        )


# ------------------------------------------------------------------ statistics


@given(
    st.lists(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.3, 0.99, 1.0]),
)
def test_discounted_returns_against_the_loop(rewards: list[list[float]], gamma: float) -> None:
    flat = np.array([r for episode in rewards for r in episode], np.float32)
    remaining = np.concatenate([np.arange(len(episode), 0, -1) for episode in rewards])
    wanted = reference.discounted_returns(rewards, gamma)
    np.testing.assert_allclose(discounted_returns(flat, remaining, gamma), wanted, atol=1e-9)
    buffer = make_buffer([{"rewards": episode} for episode in rewards])
    np.testing.assert_allclose(buffer.discounted_returns(gamma), wanted, atol=1e-9)
    np.testing.assert_allclose(buffer.episode_returns(), [sum(episode) for episode in rewards])


def test_returns_of_other_rewards() -> None:
    buffer = make_buffer(TWO)
    assert buffer.discounted_returns(0.5, np.clip(buffer.rewards, -1, 1)).tolist() == [1.75, 1.5, 1, 1.5, 1]
    assert buffer.discounted_returns(1.0).tolist() == [6, 5, 3, 30, 20]


def test_action_counts() -> None:
    assert make_buffer(TWO, n_actions=4).action_counts().tolist() == [1, 1, 3, 0]


# ------------------------------------------------------------------ mixture


def online_buffer(n: int, n_steps: int = 1) -> ReplayBuffer:
    kwargs: dict[str, Any] = {"n_steps": n_steps, "gamma": 0.99} if n_steps > 1 else {}
    kind = NStepReplayBuffer if n_steps > 1 else ReplayBuffer
    buffer = kind(100, SPACE, spaces.Discrete(3), "cpu", handle_timeout_termination=True, **kwargs)
    for t in range(n):
        fill(buffer, t)
    return buffer


def fill(buffer: ReplayBuffer, t: int) -> None:
    observation = np.full((1, 2), 500.0 + t, np.float32)
    buffer.add(observation, observation, np.array([[1]]), np.array([5.0]), np.array([0.0]), [{}])


def test_shares_of_a_mixture() -> None:
    for fraction, wanted in ((0.5, 16), (0.25, 8), (0.0, 0), (1.0, 32)):
        mixed = MixedReplayBuffer(make_buffer(TWO), online_buffer(10), fraction)
        batch = mixed.sample(32)
        old = batch.observations[:, 0] < 500
        assert old.sum() == wanted
        assert old[:wanted].all()
        assert (batch.rewards[wanted:] == 5).all()
        assert batch.observations.dtype == th.float32
        assert batch.actions.dtype == th.int64


def test_a_mixture_is_all_offline_until_there_is_something_new() -> None:
    mixed = MixedReplayBuffer(make_buffer(TWO), online_buffer(0), 0.5)
    assert (mixed.sample(8).observations[:, 0] < 500).all()
    fill(mixed, 3)
    assert mixed.size() == mixed.online.size() == 1
    assert (mixed.sample(8).observations[:, 0] == 503).sum() == 4
    mixed.reset()
    assert mixed.size() == mixed.online.size() == 0
    assert mixed.offline.size() == 5
    assert (mixed.sample(8).observations[:, 0] < 500).all()


def test_mixed_n_step_returns_keep_their_discounts() -> None:
    mixed = MixedReplayBuffer(make_buffer(TWO, n_steps=2), online_buffer(10, n_steps=2), 0.5)
    batch = mixed.sample(64)
    assert batch.discounts is not None
    assert batch.discounts.shape == (64, 1)
    with pytest.raises(ValueError, match="same n_steps"):
        MixedReplayBuffer(make_buffer(TWO, n_steps=2), online_buffer(10)).sample(8)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_share_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match="offline_fraction must be between 0 and 1"):
        MixedReplayBuffer(make_buffer(TWO), online_buffer(0), fraction)
