"""SAC: parity with SB3, weights that reach the gradient, values of many actions in one pass."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch as th
from gymnasium import spaces
from stable_baselines3.sac.policies import MultiInputPolicy, SACPolicy
from torch import nn

from sb3_ext import SAC, PrioritizedReplayBuffer
from sb3_ext.sac.values import values_of_actions
from tests.dqn.test_dqn import FixedWeights, parameters


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_steps": 3},
        {"ent_coef": 0.1, "batch_size": 100},
        {"ent_coef": "auto_0.3", "target_entropy": -0.5},
        {"use_sde": True},
        {"train_freq": 4, "gradient_steps": 4, "target_update_interval": 3},
        {"policy_kwargs": {"net_arch": [16], "n_critics": 3}},
        {"policy_kwargs": {"net_arch": [16], "share_features_extractor": True}},
    ],
    ids=str,
)
def test_parity_with_upstream(settings: dict[str, Any]) -> None:
    results = []
    for cls in (SAC, sb3.SAC):
        given = {"policy_kwargs": {"net_arch": [32]}, **settings}
        model: Any = cls("MlpPolicy", "Pendulum-v1", seed=0, learning_starts=50, device="cpu", **given)
        start = parameters(model)
        model.learn(150)
        assert np.abs(parameters(model) - start).max() > 1e-3
        ent_coef = model.log_ent_coef if model.ent_coef_optimizer else model.ent_coef_tensor
        results.append(np.append(parameters(model), ent_coef.detach()))
    np.testing.assert_array_equal(*results)


def test_a_weight_changes_the_gradient_of_the_critics_only() -> None:
    def gradients(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = SAC(
            "MlpPolicy", "Pendulum-v1", seed=0, learning_starts=100, replay_buffer_class=FixedWeights, device="cpu",
            policy_kwargs={"net_arch": [16]}, buffer_size=500, learning_rate=0.0,
        )  # fmt: skip
        model.learn(100)
        model.replay_buffer.weights = weights  # type: ignore[union-attr]
        np.random.seed(1), th.manual_seed(1)
        seen = {}
        for name, optimizer in (("critic", model.critic.optimizer), ("actor", model.actor.optimizer)):
            step = optimizer.step
            ps = [p for group in optimizer.param_groups for p in group["params"]]

            def note(ps: Any = ps, name: str = name, step: Any = step) -> None:
                seen[name] = np.concatenate([p.grad.numpy().ravel().copy() for p in ps])
                step()

            optimizer.step = note  # type: ignore[assignment,method-assign]
        model.train(1, batch_size=32)
        indices, td_errors = model.replay_buffer.seen  # type: ignore[union-attr]
        assert indices.tolist() == list(range(32))
        assert (td_errors >= 0).all()
        assert len(set(td_errors.tolist())) == 32
        return seen["critic"], seen["actor"]

    ones, doubled = gradients(np.ones(32)), gradients(np.full(32, 2.0))
    first = gradients(np.eye(32)[0])
    np.testing.assert_allclose(doubled[0], 2 * ones[0], rtol=1e-5, atol=1e-6)
    assert np.abs(first[0] * 32 - ones[0]).max() > 1e-3
    for other in (doubled, first):
        np.testing.assert_array_equal(other[1], ones[1])


def test_priorities_follow_the_errors() -> None:
    model = SAC(
        "MlpPolicy", "Pendulum-v1", seed=0, learning_starts=50, buffer_size=200, device="cpu",
        replay_buffer_class=PrioritizedReplayBuffer, policy_kwargs={"net_arch": [16]},
    )  # fmt: skip
    model.learn(120)
    buffer = model.replay_buffer
    assert isinstance(buffer, PrioritizedReplayBuffer)
    batch = buffer.sample(64)
    th.manual_seed(0)
    errors = model.compute_loss(batch).td_error.abs().numpy()
    buffer.update_priorities(batch.indices, errors)
    last = {int(i): e for i, e in zip(batch.indices, errors, strict=True)}
    for index, error in last.items():
        assert buffer.priorities.tree[np.array([index])] == pytest.approx((error + 1e-6) ** 0.6, rel=1e-5)


def test_no_gradient_is_computed_for_the_critics_in_the_actors_step() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, device="cpu")
    observations = th.randn(4, 3)
    actions, log_prob = model.actor.action_log_prob(observations)
    model._actor_loss(observations, actions, log_prob, th.ones(1)).mean().backward()
    assert all(p.grad is None for p in model.critic.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.actor.parameters())
    assert all(p.requires_grad for p in model.critic.parameters())


class Doubles:
    """SB3 casts observations to float32; with float64 rounding hides nothing."""

    def __init__(self, policy: SACPolicy) -> None:
        self.critic = policy.double().critic
        self.critic.extract_features = lambda obs, extractor: extractor(obs)  # type: ignore[method-assign]


@pytest.mark.parametrize("arch", [[], [8], [16, 8], [8, 8, 8]], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("sharpness", [1.0, 1000.0])
def test_values_of_many_actions(arch: list[int], activation: type[nn.Module], sharpness: float) -> None:
    th.manual_seed(0)
    box = spaces.Box(-1, 1, (5,))
    policy = SACPolicy(box, spaces.Box(-1, 1, (2,)), lambda _: 1e-3, net_arch=arch, activation_fn=activation)
    critic = Doubles(policy).critic
    observations = th.randn(6, 5, dtype=th.float64, requires_grad=True)
    actions = th.rand(6, 7, 2, dtype=th.float64) * 2 - 1
    found = values_of_actions(critic, observations, actions)
    assert found.shape == (2, 6, 7)
    one_by_one = [th.stack(critic(observations, actions[:, n])).squeeze(2) for n in range(7)]
    expected = th.stack(one_by_one, dim=2)
    th.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    wanted = [observations, *critic.parameters()]
    gradients = []
    for values in (found, expected):
        loss = (th.logsumexp(sharpness * values, dim=2) - values[:, :, 0]).sum()
        gradients.append(th.autograd.grad(loss, wanted, retain_graph=True))
    for ours, theirs in zip(*gradients, strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()) + 1e-12)


def test_rows_without_a_gradient_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is less than float32 rounds off, and it is left out indeed."""
    policy = SACPolicy(spaces.Box(-1, 1, (5,)), spaces.Box(-1, 1, (2,)), lambda _: 1e-3, net_arch=[64, 64])
    observations, actions = th.randn(32, 5), th.rand(32, 31, 2) * 2 - 1
    sizes = []
    original = th.outer
    monkeypatch.setattr(th, "outer", lambda a, b: sizes.append(len(a)) or original(a, b))
    for sharpness in (1.0, 3000.0):
        values = values_of_actions(policy.critic, observations, actions)
        th.logsumexp(sharpness * values, dim=2).sum().backward()  # type: ignore[no-untyped-call]
    assert sizes[:2] == [32 * 31, 32 * 31]
    assert all(32 <= n < 32 * 31 / 2 for n in sizes[2:])


def test_values_of_many_actions_for_dictionaries() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(4)})
    policy = MultiInputPolicy(space, spaces.Box(-1, 1, (2,)), lambda _: 1e-3, net_arch=[16])
    observations = {"a": th.randn(5, 3), "b": th.tensor([0, 1, 2, 3, 0])}
    actions = th.rand(5, 4, 2) * 2 - 1
    found = values_of_actions(policy.critic, observations, actions)
    expected = th.stack([th.stack(policy.critic(observations, actions[:, n])).squeeze(2) for n in range(4)], dim=2)
    th.testing.assert_close(found, expected)


def test_logs_what_sb3_logs() -> None:
    def logged(cls: Any) -> set[str]:
        model = cls("MlpPolicy", gym.make("Pendulum-v1"), learning_starts=10, policy_kwargs={"net_arch": [8]})
        model.learn(20)
        return {key for key in model.logger.name_to_value if key.startswith("train/")}

    assert logged(SAC) == logged(sb3.SAC) >= {"train/ent_coef", "train/actor_loss", "train/critic_loss"}
