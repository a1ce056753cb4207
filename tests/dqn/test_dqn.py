"""Drop-ins: parity with upstream, and weights that reach the gradient."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_ext import DQN, QRDQN


def parameters(model: Any) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()])


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(("ours", "theirs", "tolerance"), [(DQN, sb3.DQN, 0.0), (QRDQN, sb3_contrib.QRDQN, 2e-5)])
def test_parity_with_upstream(ours: Any, theirs: Any, tolerance: float, n_steps: int) -> None:
    results = []
    for cls in (ours, theirs):
        policy_kwargs: dict[str, Any] = {"net_arch": [32]}
        if "QR" in cls.__name__:
            policy_kwargs["n_quantiles"] = 25
        model = cls(
            "MlpPolicy", "CartPole-v1", seed=0, learning_starts=50, target_update_interval=40, n_steps=n_steps,
            policy_kwargs=policy_kwargs, device="cpu",
        )  # fmt: skip
        start = parameters(model)
        model.learn(300)
        assert np.abs(parameters(model) - start).max() > 1e-3
        results.append(parameters(model))
    assert np.abs(results[0] - results[1]).max() <= tolerance


class WeightedSamples(NamedTuple):
    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    weights: th.Tensor
    indices: np.ndarray


class FixedWeights(ReplayBuffer):
    """A buffer whose samples carry weights given by the test, and that remembers the priorities it is sent."""

    weights = np.ones(32)

    def sample(self, batch_size: int, env: Any = None) -> Any:
        batch = super().sample(batch_size, env)
        weights = th.as_tensor(self.weights, dtype=th.float32).reshape(-1, 1)
        return WeightedSamples(*batch[:5], batch.discounts, weights, np.arange(batch_size))

    def update_priorities(self, indices: np.ndarray, td_errors: np.ndarray) -> None:
        self.seen = (indices, td_errors)


@pytest.mark.parametrize("cls", [DQN, QRDQN])
def test_a_weight_changes_the_gradient(cls: Any) -> None:
    def gradient(weights: np.ndarray) -> np.ndarray:
        model = cls(
            "MlpPolicy", "CartPole-v1", seed=0, learning_starts=100, replay_buffer_class=FixedWeights, device="cpu",
            policy_kwargs={"net_arch": [16]}, buffer_size=500,
        )  # fmt: skip
        model.learn(100)
        model.replay_buffer.weights = weights
        np.random.seed(1)
        model.train(1, batch_size=32)
        indices, td_errors = model.replay_buffer.seen
        assert indices.tolist() == list(range(32))
        assert td_errors.shape == (32,)
        assert (td_errors >= 0).all()
        return np.concatenate([p.grad.numpy().ravel() for p in model.policy.parameters() if p.grad is not None])

    ones, twos = gradient(np.ones(32)), gradient(2 * np.ones(32))
    uneven = np.ones(32)
    uneven[0] = 0
    np.testing.assert_allclose(
        twos if cls is QRDQN else np.sign(twos), 2 * ones if cls is QRDQN else np.sign(ones), rtol=1e-4
    )
    assert np.abs(gradient(uneven) - ones).max() > 1e-8


@pytest.mark.parametrize("cls", [DQN, QRDQN])
def test_save_keeps_the_old_file_if_writing_fails(cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cls("MlpPolicy", "CartPole-v1", seed=0, buffer_size=100, device="cpu")
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    monkeypatch.setattr(th, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.zip"]
    assert cls.load(tmp_path / "model").predict(np.zeros(4, np.float32), deterministic=True)[0].shape == ()


@pytest.mark.parametrize("cls", [DQN, QRDQN])
def test_infinite_reward_stops_training(cls: Any) -> None:
    model = cls("MlpPolicy", "CartPole-v1", seed=0, learning_starts=64, buffer_size=500, device="cpu")
    model.learn(64)
    model.replay_buffer.rewards[:] = np.inf
    start = parameters(model)
    with pytest.raises(FloatingPointError, match="loss is inf"):
        model.train(1, batch_size=8)
    assert np.array_equal(parameters(model), start)


@pytest.mark.parametrize("cls", [DQN, QRDQN])
def test_dueling_heads_are_values_plus_centred_advantages(cls: Any, tmp_path: Path) -> None:
    sizes = {"n_quantiles": 3} if cls is QRDQN else {}
    model = cls("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs={"dueling": True, **sizes})
    net = model.quantile_net.quantile_net if cls is QRDQN else model.q_net.q_net
    features = th.randn(5, 4)
    value, advantage = net.value(features), net.advantage(features).view(5, -1, 2)
    found = net(features).view(5, -1, 2)
    th.testing.assert_close(found.mean(dim=2), value)
    th.testing.assert_close(found[:, :, 0] - found[:, :, 1], advantage[:, :, 0] - advantage[:, :, 1])
    observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    actions = model.predict(observations, deterministic=True)[0]
    model.learn(200)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    assert len(set(actions)) > 1
    expected = model.predict(observations, deterministic=True)[0]
    assert (cls.load(tmp_path / "model").predict(observations, deterministic=True)[0] == expected).all()
    policy = type(model.policy).load(tmp_path / "policy")
    assert policy.dueling
    assert (policy.predict(observations, deterministic=True)[0] == expected).all()


@pytest.mark.parametrize("cls", [DQN, QRDQN])
@pytest.mark.parametrize("double_q", [False, True])
def test_double_q(cls: Any, double_q: bool) -> None:
    sizes = {"n_quantiles": 1} if cls is QRDQN else {}
    model = cls("MlpPolicy", "CartPole-v1", device="cpu", policy_kwargs={"double_q": double_q, "net_arch": [], **sizes})
    online, target = (
        (model.quantile_net.quantile_net[0], model.quantile_net_target.quantile_net[0])
        if cls is QRDQN
        else (model.q_net.q_net[0], model.q_net_target.q_net[0])
    )
    for layer, values in ((online, [1.0, 2.0]), (target, [30.0, 20.0])):  # they disagree on the best action
        th.nn.init.zeros_(layer.weight)
        layer.bias.data = th.tensor(values)
    zeros = th.zeros(1, 4)
    batch = WeightedSamples(
        zeros, th.zeros(1, 1).long(), zeros, th.zeros(1, 1), th.ones(1, 1), None, th.ones(1, 1), None
    )
    wanted = 1 + 0.99 * (20 if double_q else 30) - 1
    assert model.compute_loss(batch).td_error.item() == pytest.approx(wanted)


def test_rainbow_options_on_images_and_dicts() -> None:
    from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv

    options: dict[str, Any] = {"dueling": True, "double_q": True}
    common: dict[str, Any] = {"learning_starts": 20, "buffer_size": 100, "train_freq": 20}
    env = FakeImageEnv(screen_height=40, screen_width=40)
    for cls in (DQN, QRDQN):
        cls("CnnPolicy", env, policy_kwargs={"net_arch": [8], **options}, **common).learn(40)
        cls("MultiInputPolicy", SimpleMultiObsEnv(), policy_kwargs={"net_arch": [8], **options}, **common).learn(40)
