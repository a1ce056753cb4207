"""Behaviour cloning: its loss by hand, every space of PPO, and its weights as a warm start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from torch.nn import functional as F

from sb3_ext import BC, CQL, record
from tests.helpers import filled_buffer

SPACES: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-1, 1, (3,)),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
    "image": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    "dict": spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)}),
}
ACTIONS = {
    "discrete": spaces.Discrete(4),
    "continuous": spaces.Box(-1, 1, (2,)),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
}
POLICIES = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}


class Anything(gym.Env[Any, Any]):
    """Random observations of a space."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", SPACES)
def test_every_space_of_ppo_and_a_warm_start(observation: str, action: str, tmp_path: Path) -> None:
    space, actions = SPACES[observation], ACTIONS[action]
    policy = POLICIES.get(observation, "MlpPolicy")
    model = BC(policy, filled_buffer(space, actions), seed=0, device="cpu", learning_rate=1e-3).learn(30)
    env = Anything(space, actions)
    ppo = PPO(policy, env, n_steps=8, batch_size=8, device="cpu")
    ppo.policy.load_state_dict(model.policy.state_dict())
    one, _ = env.reset(seed=0)
    assert actions.contains(model.predict(one)[0])
    cloned, warm = model.predict(one, deterministic=True)[0], ppo.predict(one, deterministic=True)[0]
    np.testing.assert_allclose(warm, cloned, rtol=1e-4)
    ppo.learn(8)
    model.save(tmp_path / "model")
    loaded = BC.load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(loaded.predict(one, deterministic=True)[0], cloned)


def test_loss_is_the_negative_log_likelihood(cartpole: minari.MinariDataset) -> None:
    model = BC("MlpPolicy", cartpole, seed=0, device="cpu")
    batch = model.replay_buffer.sample(8)
    logits = model.policy.action_net(model.policy.mlp_extractor.forward_actor(batch.observations))
    expected = F.cross_entropy(logits, batch.actions[:, 0], reduction="none")
    out = model.compute_loss(batch)
    assert th.allclose(out.loss, expected, atol=1e-6)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    assert out.metrics["entropy"].item() == pytest.approx(entropy.mean().item(), abs=1e-6)
    assert out.metrics["action_match"].item() == (logits.argmax(1) == batch.actions[:, 0]).float().mean().item()
    model.ent_coef = 0.5
    assert th.allclose(model.compute_loss(batch).loss, expected - 0.5 * entropy, atol=1e-6)


def test_continuous_actions_by_hand() -> None:
    # SB3's off-policy algorithms store actions scaled to [-1, 1]: -1 and 0.5 of [0, 4] are 0 and 3
    space, actions = spaces.Box(-1, 1, (1,)), spaces.Box(0, 4, (1,))
    buffer = ReplayBuffer(2, space, actions, "cpu", handle_timeout_termination=False)
    for scaled in (-1.0, 0.5):
        buffer.add(np.zeros((1, 1)), np.zeros((1, 1)), np.array([[scaled]]), np.zeros(1), np.zeros(1), [{}])
    model = BC("MlpPolicy", buffer, seed=0, device="cpu")
    out = model.compute_loss(buffer._get_samples(np.array([0, 1])))
    mean = model.policy.predict(np.zeros(1, np.float32), deterministic=True)[0]  # 0 at first: nothing is clipped
    raw = model.policy.get_distribution(th.zeros(1, 1)).distribution.mean.item()
    assert mean.item() == pytest.approx(max(raw, 0))
    wanted = [0.5 * (a - raw) ** 2 + 0.5 * np.log(2 * np.pi) for a in (0.0, 3.0)]
    assert out.loss.tolist() == pytest.approx(wanted, rel=1e-5)
    assert "action_match" not in out.metrics


def test_it_clones_a_controller() -> None:
    env = gym.make("Pendulum-v1")
    teacher = SAC("MlpPolicy", env, seed=0, learning_starts=200, device="cpu")
    teacher.learn(200)  # random actions, each stored scaled
    buffer = teacher.replay_buffer
    buffer.actions[:200, 0, 0] = np.tanh(buffer.observations[:200, 0, 2])  # a rule to be cloned, of [-1, 1]
    model = BC("MlpPolicy", buffer, seed=0, device="cpu", learning_rate=1e-3).learn(1500)
    observations = buffer.observations[:200, 0]
    found = model.predict(observations, deterministic=True)[0][:, 0]
    assert np.abs(found - 2 * np.tanh(observations[:, 2])).mean() < 0.15  # torques are in [-2, 2]


def test_images_are_laid_out_channels_last_and_come_out_the_same(breakout: minari.MinariDataset) -> None:
    model = BC("CnnPolicy", breakout, seed=0, device="cpu")
    batch = model.replay_buffer.sample(4)
    fast = model.compute_loss(batch).loss
    model._channels_last = False
    assert th.allclose(model.compute_loss(batch).loss, fast, atol=1e-5)
    half = BC("CnnPolicy", breakout, seed=0, device="cpu", bf16=True).compute_loss(batch).loss
    assert half.dtype == th.float32
    assert th.allclose(half, fast, atol=0.05)
    assert not th.equal(half, fast)


def test_it_is_a_sibling_of_cql() -> None:
    between = [c.__name__ for c in BC.__mro__ if c.__name__ not in ("ABC", "object")]
    assert between == ["BC", "OfflineAlgorithm", "BaseAlgorithm"]
    assert not issubclass(BC, CQL)
    assert issubclass(BC, BaseAlgorithm)


def test_what_cloning_has_no_use_for(cartpole: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match="leave 'prioritized' out"):
        BC("MlpPolicy", cartpole, dataset_kwargs={"prioritized": True})
    with pytest.raises(ValueError, match="ent_coef must be at least 0, got -1"):
        BC("MlpPolicy", cartpole, ent_coef=-1)
    with pytest.raises(ValueError, match="Use 'MultiInputPolicy'"):
        BC("MlpPolicy", filled_buffer(SPACES["dict"], ACTIONS["discrete"]))


@pytest.mark.parametrize("storage", ["ram", "mmap"])
def test_continuous_actions_of_a_minari_dataset(storage: str) -> None:
    env = gym.make("Pendulum-v1")
    dataset = record(lambda o: np.array([2 * np.tanh(o[2])], np.float32), env, "pendulum/rule-v0", n_episodes=2)
    model = BC(
        "MlpPolicy", dataset, seed=0, device="cpu", learning_rate=1e-3, dataset_kwargs={"storage": storage}
    ).learn(800)
    batch = model.replay_buffer.sample(200)
    rule = 2 * np.tanh(batch.observations[:, 2].numpy())
    np.testing.assert_allclose(batch.actions[:, 0].numpy(), rule, rtol=1e-5)  # as the environment got them
    found = model.predict(batch.observations.numpy(), deterministic=True)[0][:, 0]
    assert np.abs(found - rule).mean() < 0.15
    with pytest.raises(ValueError, match=r"CQL needs Discrete actions.* ContinuousCQL learns from Box ones"):
        CQL("MlpPolicy", dataset)
