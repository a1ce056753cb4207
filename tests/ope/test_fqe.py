"""Fitted Q evaluation, held against values that are known by algebra or simulation; and how it behaves as a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ext import BC, CQL, FQE, load_minari, record
from sb3_ext.ope.fqe import PolicySamples
from tests.helpers import filled_buffer
from tests.ope.tabular import ACTIONS, GAMMA, STATES, Tabular, agent_with, counted, solve

FAST: dict[str, Any] = {"learning_rate": 1e-3, "tau": 0.05, "policy_kwargs": {"net_arch": [32, 32]}, "device": "cpu"}
TABLE = np.random.default_rng(0).normal(size=(STATES, ACTIONS))


@pytest.fixture(scope="module")
def tabular(session_folders: None) -> minari.MinariDataset:
    """4,000 random steps."""
    return record(None, gym.make("Tabular-v0"), "tabular/random-v0", n_steps=4000)


@pytest.fixture
def quiet() -> Any:
    """The notice of episodes of one step does not concern these tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one step only")
        yield


pytestmark = pytest.mark.usefixtures("quiet")


def test_a_greedy_policy_is_worth_what_algebra_says(tabular: minari.MinariDataset) -> None:
    policy = np.eye(ACTIONS)[TABLE.argmax(axis=1)]
    transitions, first = counted(tabular)
    estimate = FQE("MlpPolicy", tabular, agent_with(TABLE), seed=0, **FAST).learn(700).initial_value()
    values = solve(policy, transitions)[first]
    assert estimate.mean == pytest.approx(values.mean(), abs=0.08), "of the process as the data shows it"
    assert estimate.mean == pytest.approx(solve(policy).mean(), abs=0.25), "of the true one"
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / len(values) ** 0.5, rel=0.1)
    assert estimate.n_episodes == len(first)
    behaviour = solve(np.full((STATES, ACTIONS), 1 / ACTIONS), transitions)[first].mean()
    assert abs(behaviour - values.mean()) > 1, "that the policy is another one matters"


def test_a_random_policy_is_an_expectation_over_actions(tabular: minari.MinariDataset) -> None:
    agent = agent_with(TABLE)
    agent.exploration_rate = 0.6
    transitions, first = counted(tabular)
    policy = 0.4 * np.eye(ACTIONS)[TABLE.argmax(axis=1)] + 0.2
    found = FQE("MlpPolicy", tabular, agent, deterministic=False, seed=0, **FAST).learn(700).initial_value().mean
    assert found == pytest.approx(solve(policy, transitions)[first].mean(), abs=0.08)

    cloned = PPO("MlpPolicy", Tabular(), gamma=GAMMA, policy_kwargs={"net_arch": []}, device="cpu")
    with th.no_grad():
        cloned.policy.action_net.weight.copy_(th.as_tensor(2 * TABLE.T))
        cloned.policy.action_net.bias.zero_()
    policy = np.exp(2 * TABLE) / np.exp(2 * TABLE).sum(axis=1, keepdims=True)
    found = FQE("MlpPolicy", tabular, cloned, deterministic=False, seed=0, **FAST).learn(700).initial_value().mean
    assert found == pytest.approx(solve(policy, transitions)[first].mean(), abs=0.08)


A, B, COST, NOISE, GAIN = 0.8, 0.4, 0.1, 0.1, -0.6


class Linear(gym.Env[Any, Any]):
    """``s' = A s + B a + noise``, and ``-(s^2 + COST a^2)`` is the reward: linear policies have quadratic values."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (1,)), spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1, 1), 0
        return np.array([self.state], np.float32), {}

    def step(self, action: Any) -> Any:
        reward = -(self.state**2 + COST * action[0] ** 2)
        self.state = A * self.state + B * action[0] + NOISE * self.np_random.normal()
        self.steps += 1
        return np.array([self.state], np.float32), float(reward), False, self.steps == 20, {}


gym.register("Linear-v0", entry_point=f"{__name__}:Linear")


@pytest.fixture(scope="module")
def linear(session_folders: None) -> minari.MinariDataset:
    """4,000 random steps."""
    return record(None, gym.make("Linear-v0"), "linear/random-v0", n_steps=4000)


def first_states(dataset: minari.MinariDataset) -> NDArray[np.float64]:
    return np.array([episode.observations[0, 0] for episode in dataset.iterate_episodes()], np.float64)


def test_a_linear_policy_is_worth_what_its_riccati_equation_says(linear: minari.MinariDataset) -> None:
    agent = PPO("MlpPolicy", Linear(), gamma=0.9, policy_kwargs={"net_arch": []}, device="cpu")
    with th.no_grad():
        agent.policy.action_net.weight.fill_(GAIN)
        agent.policy.action_net.bias.zero_()
    quadratic = (1 + COST * GAIN**2) / (1 - 0.9 * (A + B * GAIN) ** 2)
    true = -(quadratic * first_states(linear) ** 2 + 0.9 / 0.1 * quadratic * NOISE**2)
    model = FQE("MlpPolicy", linear, agent, seed=0, **FAST).learn(1200)
    estimate = model.initial_value()
    # errors of a step add up over ten steps; what the data's own policy is worth is 0.6 away
    assert estimate.mean == pytest.approx(true.mean(), abs=0.12 * model.return_std)
    assert abs(model.return_mean - true.mean()) > 0.5 * model.return_std
    assert estimate.standard_error == pytest.approx(true.std(ddof=1) / len(true) ** 0.5, rel=0.2)


def test_an_actor_is_worth_what_simulation_says(linear: minari.MinariDataset) -> None:
    agent = SAC("MlpPolicy", Linear(), gamma=0.9, seed=1, buffer_size=1, device="cpu")
    with th.no_grad():  # bad actions, so that they matter
        agent.actor.mu.bias.fill_(0.25)
    rng, states, total = np.random.default_rng(0), np.tile(first_states(linear), 20), 0.0
    for step in range(80):
        actions = agent.predict(states[:, None].astype(np.float32), deterministic=True)[0][:, 0]
        total += 0.9**step * -(states**2 + COST * actions**2).mean()
        states = A * states + B * actions + NOISE * rng.normal(size=len(states))
    model = FQE("MlpPolicy", linear, agent, seed=0, **FAST).learn(1200)
    assert model.initial_value().mean == pytest.approx(total, rel=0.1)
    assert abs(total - model.return_mean) > 0.2 * abs(total), "that the policy is another one matters"


def test_loss_by_hand(tabular: minari.MinariDataset) -> None:
    model = FQE("MlpPolicy", tabular, agent_with(TABLE), seed=0, gamma=0.5, device="cpu")
    seen, following = th.eye(STATES)[[0, 1]], th.eye(STATES)[[2, 3]]
    actions, after = th.eye(ACTIONS)[[0, 2]], th.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    batch = PolicySamples(seen, actions, following, after, th.tensor([0.0, 1.0]), th.tensor([0.3, -0.2]))
    now, then = model.policy.critic(seen), model.policy.critic_target(following)
    mean, std = model.return_mean, model.return_std
    first = 0.3 + 0.5 * (mean + std * (then[0, 0] + then[0, 1]) / 2) - (mean + std * now[0, 0])
    second = -0.2 - (mean + std * now[1, 2])
    output = model.compute_loss(batch)
    expected = th.stack([first, second])
    assert th.allclose(output.td_error, expected, atol=1e-5)
    assert th.allclose(output.loss, (expected / std) ** 2, atol=1e-5)
    assert output.metrics["td_loss"].item() == pytest.approx((expected**2).mean().item(), abs=1e-5)
    beyond = model.compute_loss(batch._replace(rewards=th.tensor([0.3, 1e6])))
    value = beyond.td_error[1] + mean + std * now[1, 2]
    assert value.item() == pytest.approx(model.highest_return), "targets are returns that rewards can add up to"
    rewards = np.concatenate([e.rewards for e in tabular.iterate_episodes()])
    assert model.highest_return == pytest.approx(rewards.max() / 0.5, rel=1e-5)
    assert model.lowest_return == pytest.approx(rewards.min() / 0.5, rel=1e-5)


def test_an_episode_that_ends_is_worth_at_least_one_reward(cartpole: minari.MinariDataset) -> None:
    model = FQE("MlpPolicy", cartpole, BC("MlpPolicy", cartpole, device="cpu"), device="cpu")
    assert (model.lowest_return, model.highest_return) == pytest.approx((1, 100))
    assert model.gamma == 0.99
    endless = FQE("MlpPolicy", cartpole, BC("MlpPolicy", cartpole, device="cpu"), gamma=1, device="cpu")
    assert (endless.lowest_return, endless.highest_return) == (1, np.inf)


def test_seeds_saving_and_going_on(tabular: minari.MinariDataset, tmp_path: Path) -> None:
    agent = agent_with(TABLE)
    whole, again = (FQE("MlpPolicy", tabular, agent, seed=3, **FAST).learn(60, log_interval=7) for _ in range(2))
    assert whole.initial_value() == again.initial_value()
    other = FQE("MlpPolicy", tabular, agent, seed=4, **FAST).learn(60)
    assert other.initial_value() != whole.initial_value()
    FQE("MlpPolicy", tabular, agent, seed=3, **FAST).learn(30).save(tmp_path / "fqe")
    loaded = FQE.load(tmp_path / "fqe", device="cpu")
    with pytest.raises(ValueError, match="set_dataset"):
        loaded.initial_value()
    with pytest.raises(ValueError, match="set_dataset"):
        loaded.learn(1)
    loaded.set_dataset(tabular)
    with pytest.raises(ValueError, match="set_model"):
        loaded.learn(1)
    loaded.set_model(agent)
    assert loaded.learn(30, reset_num_timesteps=False).num_timesteps == 60
    assert loaded.initial_value() == whole.initial_value()
    with pytest.raises(NotImplementedError, match="predict"):
        loaded.predict(np.zeros(STATES))


def test_the_model_and_its_data_are_left_alone(cartpole: minari.MinariDataset) -> None:
    one = CQL("MlpPolicy", cartpole, seed=0, device="cpu", n_steps=3, clip_rewards=True).learn(20)
    two = CQL("MlpPolicy", cartpole, seed=0, device="cpu", n_steps=3, clip_rewards=True).learn(20)
    before = th.get_rng_state()
    FQE("MlpPolicy", one._dataset, one, device="cpu").initial_value()
    estimator = FQE("MlpPolicy", one._dataset, one, seed=5, device="cpu").learn(10)
    assert estimator._dataset.n_steps == 1
    assert not estimator._dataset.clip_rewards
    th.set_rng_state(before)
    one.learn(20, reset_num_timesteps=False)
    two.learn(20, reset_num_timesteps=False)
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert th.equal(a, b)


class Lines(KVWriter):
    """Log lines, kept."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.seen.append(dict(key_values))

    def close(self) -> None:
        pass


def test_log_lines_have_the_estimate(tabular: minari.MinariDataset) -> None:
    model, lines = FQE("MlpPolicy", tabular, agent_with(TABLE), seed=0, **FAST), Lines()
    model.set_logger(Logger(None, [lines]))
    model.learn(20, log_interval=10)
    assert [line["time/total_timesteps"] for line in lines.seen] == [10, 20]
    assert lines.seen[-1]["train/initial_value"] == model.initial_value().mean
    assert {"train/loss", "train/td_loss", "train/q_data"} <= lines.seen[0].keys()


def test_next_actions_are_those_of_predict(linear: minari.MinariDataset) -> None:
    agent = SAC("MlpPolicy", Linear(), seed=1, buffer_size=1, device="cpu")
    model = FQE("MlpPolicy", linear, agent, seed=0, device="cpu").learn(1)
    states = np.concatenate([episode.observations[1:] for episode in linear.iterate_episodes()])
    expected = agent.policy.scale_action(agent.predict(states, deterministic=True)[0])
    np.testing.assert_allclose(model._next_actions.numpy(), expected, atol=1e-5)
    sampled = FQE("MlpPolicy", linear, agent, seed=0, deterministic=False, device="cpu").learn(2)
    assert sampled._next_actions is None
    one, two = (sampled._actions_after(np.arange(5)) for _ in range(2))
    assert not th.equal(one, two), "drawn again in each batch"


def test_a_normalised_model_sees_normalised_states(linear: minari.MinariDataset) -> None:
    env = VecNormalize(DummyVecEnv([Linear]), norm_reward=False)
    env.obs_rms.mean, env.obs_rms.var = np.array([0.5]), np.array([0.04])
    agent = SAC("MlpPolicy", env, seed=1, buffer_size=1, device="cpu")
    model = FQE("MlpPolicy", linear, agent, seed=0, device="cpu").learn(1)
    states = np.concatenate([episode.observations[1:] for episode in linear.iterate_episodes()])
    expected = agent.policy.scale_action(agent.predict(env.normalize_obs(states), deterministic=True)[0])
    np.testing.assert_allclose(model._next_actions.numpy(), expected, atol=1e-4)


def test_pictures_and_dicts(breakout: minari.MinariDataset) -> None:
    agent = CQL("CnnPolicy", breakout, seed=0, device="cpu", policy_kwargs={"n_quantiles": 5})
    model = FQE("CnnPolicy", breakout, agent, seed=0, device="cpu", batch_size=8).learn(2)
    assert np.isfinite(model.initial_value().mean)
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})
    agent = BC("MultiInputPolicy", filled_buffer(space, spaces.Discrete(2)), device="cpu")
    with pytest.raises(TypeError, match="does not say where they begin"):
        FQE("MultiInputPolicy", filled_buffer(space, spaces.Discrete(2)), agent)


def test_what_cannot_be_evaluated_is_said_at_once(cartpole: minari.MinariDataset, linear: minari.MinariDataset) -> None:
    agent = BC("MlpPolicy", cartpole, device="cpu")
    with pytest.raises(TypeError, match="needs a dataset"):
        FQE("MlpPolicy", None, agent)
    with pytest.raises(TypeError, match="needs the model whose policy"):
        FQE("MlpPolicy", cartpole)
    with pytest.raises(TypeError, match=r"A trained model is expected .* not str"):
        FQE("MlpPolicy", cartpole, "model.zip")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"RecurrentPPO.* cannot be asked"):
        FQE("MlpPolicy", cartpole, RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8, device="cpu"))
    with pytest.raises(ValueError, match="observation_space of the model and of the dataset differ"):
        FQE("MlpPolicy", linear, agent)
    with pytest.raises(ValueError, match="CnnPolicy needs pictures"):
        FQE("CnnPolicy", cartpole, agent)
    with pytest.raises(ValueError, match="gamma must be between"):
        FQE("MlpPolicy", cartpole, agent, gamma=1.5)
    with pytest.raises(ValueError, match="prioritized"):
        FQE("MlpPolicy", cartpole, agent, dataset_kwargs={"prioritized": True})
    with pytest.raises(ValueError, match="prioritized"):
        FQE("MlpPolicy", load_minari(cartpole, prioritized=True), agent)
    with pytest.raises(TypeError, match="does not say where they begin"):
        FQE("MlpPolicy", ReplayBuffer(5, agent.observation_space, agent.action_space), agent)
    multi = BC("MlpPolicy", filled_buffer(spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete([2, 3])), device="cpu")
    with pytest.raises(ValueError, match=r"observation_space of the model"):
        FQE("MlpPolicy", cartpole, multi)
