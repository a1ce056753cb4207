"""Value prefixes of EfficientZeroV2: the head, the search through it against a recursive one, the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_ext import EfficientZeroV2
from sb3_ext.efficientzero.networks import CnnNetwork, ValuePrefix, start_parts, step_parts
from sb3_ext.efficientzero.policies import CnnPolicy, EfficientZeroPolicy, MlpPolicy
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from sb3_ext.efficientzero.targets import value_prefixes
from sb3_ext.search.gumbel import RecurrentOutput, gumbel_search
from tests.helpers import SMALL, TINY_CNN, randomize
from tests.reference import Node, SlowSearch

PREFIX = {"network_kwargs": {"latent_size": 8, "projection_size": 8, "value_prefix": True, "prefix_size": 6}}


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))
def test_sums_begin_anew(steps: int, horizon: int, seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(size=(3, steps))
    found = value_prefixes(rewards, horizon)
    assert found.shape == (3, steps)
    for row, sums in zip(rewards, found, strict=True):
        total = 0.0
        for k in range(steps):
            total = row[k] if k % horizon == 0 else total + row[k]
            assert sums[k] == pytest.approx(total, abs=1e-5)


def test_the_papers_head_has_the_papers_size() -> None:
    network = CnnNetwork(spaces.Box(0, 255, (12, 96, 96), np.uint8), 4, 4, 601, value_prefix=True)
    assert sum(p.numel() for p in network.reward_head.parameters()) == pytest.approx(2_270_729, rel=1e-4)
    assert network.horizon == 5
    assert CnnNetwork(spaces.Box(0, 255, (3, 8, 8), np.uint8), 4, 4, 51, channels=4, projection_size=4).horizon == 0
    with pytest.raises(ValueError, match="prefix_horizon must be at least 1"):
        ValuePrefix(th.nn.Identity(), 1, 1, th.nn.Identity(), 0)


class SlowModel:
    """One step for one row; what a reward is, is worked out from the whole line of latent states since the root."""

    def __init__(self, policy: EfficientZeroPolicy, horizon: int) -> None:
        self.policy, self.horizon = policy, horizon

    def sums(self, line: list[th.Tensor]) -> list[float]:
        """Sum of rewards at each place of a line, by running the LSTM over it from the root."""
        head, found = self.policy.network.reward_head, []
        for at, latent in enumerate(line):
            if at % self.horizon == 0:
                hidden = cell = th.zeros(1, head.lstm.hidden_size)
            hidden, cell = head.lstm(head.features(latent), (hidden, cell))
            found.append(float(self.policy.decode(head.head(hidden))))
        return found

    def __call__(self, line: list[th.Tensor], action: int) -> tuple[float, float, list[float], list[th.Tensor]]:
        with th.no_grad():
            latent = self.policy.network.dynamics(line[-1], self.policy.action_input(th.tensor([action])))
            value, logits = self.policy.network.predict(latent)
            line = [*line, latent]
            sums = self.sums(line[1:])
        fresh = len(sums) % self.horizon == 1 or self.horizon == 1
        reward = sums[-1] - (0.0 if fresh else sums[-2])
        return reward, float(self.policy.decode(value)), logits[0].tolist(), line


def make(kind: str, horizon: int, **kwargs: Any) -> EfficientZeroPolicy:
    sizes = {"value_prefix": True, "prefix_size": 6, "prefix_horizon": horizon}
    if kind == "mlp":
        sizes |= {"latent_size": 8, "projection_size": 8}
        space, cls = spaces.Box(-1, 1, (4,)), MlpPolicy
    else:
        sizes |= TINY_CNN["network_kwargs"]
        space, cls = spaces.Box(0, 255, (1, 4, 4), np.uint8), CnnPolicy  # type: ignore[assignment]
    actions = spaces.Discrete(2)
    policy = cls(space, actions, lambda _: 1e-3, network_kwargs=sizes, **kwargs)
    randomize(policy)  # type: ignore[arg-type]
    policy.set_training_mode(False)
    return policy


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_search_through_the_prefix_equals_the_recursive_one(kind: str, horizon: int) -> None:
    th.manual_seed(horizon)
    policy = make(kind, horizon, num_simulations=24, max_num_considered_actions=2)
    assert policy._fast_network() is None
    observations = th.stack([th.from_numpy(policy.observation_space.sample()) for _ in range(3)])
    roots = policy.roots(observations)
    out, _ = policy.plan(roots, noise=False)
    assert out.tree.depths.max() > horizon
    for b in range(3):
        slow = SlowSearch(SlowModel(policy, horizon), policy.gamma, 50.0, 0.1, 0.01)
        root = Node([roots.latent[b : b + 1]], 0.0, float(roots.values[b]), roots.policy[b].tolist())
        want = slow.run(root, [0.0, 0.0], 24, 2)
        assert out.visits[b].tolist() == want["visits"]
        assert out.actions[b] == want["action"]
        np.testing.assert_allclose(out.root_values[b], want["value"], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(out.completed_qvalues[b], want["completed"], rtol=2e-3, atol=2e-3)
    found, _ = policy.predict(observations.numpy(), deterministic=True)
    np.testing.assert_array_equal(found, out.actions)


@pytest.mark.parametrize("depth", range(1, 13))
def test_a_reward_is_counted_once_however_deep(depth: int) -> None:
    """A sum that is right, 1 per step, gives back 1 per step: horizon 5, one action, a chain."""
    head = ValuePrefix(th.nn.Identity(), 1, 1, th.nn.Identity(), 5)

    def reward(_: Any, memory: Any) -> Any:
        count = memory[0] + 1  # the memory counts the steps since it was emptied
        return count, (count, count)

    def recurrent(embedding: Any, _: Any) -> RecurrentOutput:
        rewards, parts = step_parts(reward, lambda x: x.squeeze(1), embedding[0], embedding[1:], 5)
        return RecurrentOutput(rewards, th.zeros(1), th.zeros(1, 1), (embedding[0], *parts))

    out = gumbel_search(
        th.zeros(1, 1), th.zeros(1), (th.zeros(1, 1), *start_parts(head, 1)), recurrent,
        num_simulations=depth, max_num_considered_actions=1, gamma=1.0,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tree.rewards[0], [0] + [1] * depth)
    assert out.tree.depths.max() == depth


def learner(**kwargs: Any) -> EfficientZeroV2:
    settings = {**SMALL, "policy_kwargs": PREFIX, **kwargs}
    return EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **settings)


def test_gradients_flow_through_the_memory() -> None:
    model = learner(learning_starts=100, consistency_coef=0.0, value_coef=0.0, policy_coef=0.0).learn(60)
    randomize(model.policy)  # type: ignore[arg-type]
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    batch = model.replay_buffer.windows(np.arange(30), np.ones(30, np.float32))
    whole = batch.lengths >= 5
    assert whole.any()
    model.policy.set_training_mode(True)
    model.compute_loss(batch).loss.sum().backward()
    head = model.policy.network.reward_head
    for part in (head.features, head.lstm, head.head, model.policy.network.representation, model.policy.network.step):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    # the memory before the second step matters to its loss: without it the loss is another one
    before = model.compute_loss(batch).metrics["reward_loss"]
    with th.no_grad():
        head.lstm.weight_hh.zero_()
    assert model.compute_loss(batch).metrics["reward_loss"] != before


def test_the_loss_is_that_of_the_sums() -> None:
    """A head that always says the sum 3 has its smallest loss where the sum is 3."""
    model = learner(learning_starts=100).learn(60)
    head = model.policy.network.reward_head
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    batch = model.replay_buffer.windows(np.arange(40), np.ones(40, np.float32))
    batch = batch._replace(
        lengths=np.full(40, 10), terminated=np.zeros(40, bool), rewards=np.ones((40, 10), np.float32)
    )
    seen = []
    for said in (1.0, 3.0, 5.0):
        with th.no_grad():
            head.head[-1].bias.copy_(20 * model.policy.encode(th.tensor(said)))
        loss = model.compute_loss(batch).metrics["reward_loss"] * 5
        wanted = th.nn.functional.cross_entropy(
            (20 * model.policy.encode(th.tensor(said))).expand(5, -1), model.policy.encode(th.arange(1.0, 6.0)),
            reduction="sum",
        )  # fmt: skip
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
        seen.append(loss)
    assert seen[0] != seen[2]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_it_runs_saves_and_loads(env: str, tmp_path: Any) -> None:
    settings = {**SMALL, "policy_kwargs": PREFIX, "unroll_steps": 7}
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **settings).learn(30)
    model.save(tmp_path / "model")
    other = EfficientZeroV2.load(tmp_path / "model", device="cpu")
    observation = model.observation_space.sample()
    np.testing.assert_array_equal(
        model.predict(observation, deterministic=True)[0], other.predict(observation, deterministic=True)[0]
    )
    assert "lstm" in str(model.policy.network)
