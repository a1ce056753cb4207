"""ContinuousCQL: published arithmetic, d3rlpy's numbers, calibration, what it learns, bad input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import PendulumEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext import BC, CQL, FQE, ContinuousCQL, OfflineEvalCallback, load_minari, make_eval_env, record
from sb3_ext.cql import continuous
from sb3_ext.cql.mixed import OnlineReplayBuffer
from sb3_ext.replay.batch import OfflineSamples
from sb3_ext.replay.dataset import OfflineReplayBuffer, lower_returns
from sb3_ext.replay.frames import ArrayFrames
from tests.helpers import filled_buffer

BOX, ACTIONS = spaces.Box(-np.inf, np.inf, (5,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
D3RLPY = Path(__file__).parent / "d3rlpy_cql.npz"


@pytest.fixture(scope="module")
def pendulum() -> minari.MinariDataset:
    return record(
        None, gym.make("Pendulum-v1", max_episode_steps=50), "continuous/pendulum-v0", n_steps=200, overwrite=True
    )


def small(dataset: Any, **kwargs: Any) -> ContinuousCQL:
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "batch_size": 16, "cql_n_actions": 3, "seed": 0, **kwargs}
    return ContinuousCQL("MlpPolicy", dataset, device="cpu", **kwargs)


def in_doubles(model: ContinuousCQL) -> ContinuousCQL:
    """SB3 casts observations to float32; with float64 rounding hides nothing."""
    model.policy.double()
    for part in (model.actor, model.critic, model.critic_target):
        part.extract_features = lambda obs, extractor: extractor(obs)  # type: ignore[method-assign]
    return model


def doubles(batch: Any) -> OfflineSamples:
    return OfflineSamples(*(x if x is None else x.double() for x in batch[:6]), *batch[6:])


def a_batch(size: int = 16) -> OfflineSamples:
    generator = th.Generator().manual_seed(1)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(shape, generator=generator, dtype=th.float64)

    dones = (th.arange(size, dtype=th.float64) % 5 == 0).double().reshape(-1, 1)
    return OfflineSamples(normal(size, 5), normal(size, 2).tanh(), normal(size, 5), dones, 3 * normal(size, 1))


# ---------------------------------------------------------------------- arithmetic


def published_critic_loss(model: ContinuousCQL, batch: Any, ent_coef: float, draws: dict[str, th.Tensor]) -> th.Tensor:
    """
    The authors' loss of all critics, transcribed: one action after the other, each through the critics by itself.

    :param draws: noise of the actions in the next state (the first is bootstrapped from), of those in this one, and
        actions between 0 and 1
    """
    n = model.cql_n_actions

    def policy(obs: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std, _ = model.actor.get_action_dist_params(obs)
        before = mean + log_std.exp() * noise
        action = before.tanh()
        normal = th.distributions.Normal(mean, log_std.exp())
        return action, (normal.log_prob(before) - th.log(1 - action**2 + 1e-6)).sum(1)

    with th.no_grad():
        following = [policy(batch.next_observations, draws["next"][:, k]) for k in range(n + 1)]
        here = [policy(batch.observations, draws["here"][:, k]) for k in range(n)]
        if model.max_q_backup:
            values = [th.stack(model.critic_target(batch.next_observations, a)).min(0).values for a, _ in following[1:]]
            backup = th.stack(values).max(0).values
        else:
            action, log_prob = following[0]
            backup = th.stack(model.critic_target(batch.next_observations, action)).min(0).values
            if model.soft_q_backup:
                backup = backup - ent_coef * log_prob.reshape(-1, 1)
        target = batch.rewards + (1 - batch.dones) * model.gamma * backup
    total = th.zeros((), dtype=th.float64)
    for number in range(len(model.critic.q_networks)):

        def q(action: th.Tensor, number: int = number) -> th.Tensor:
            return model.critic(batch.observations, action)[number].squeeze(1)

        exponents = [q(2 * draws["uniform"][:, k] - 1) - np.log(0.5**2) for k in range(n)]
        for action, log_prob in [*following[1:], *here]:
            value = q(action)
            if model.calibrated:
                value = th.maximum(value, batch.returns_to_go.squeeze(1))
            exponents.append(value - log_prob)
        sums = sum(th.exp(x) for x in exponents)
        assert isinstance(sums, th.Tensor)
        gap = (sums.log() - q(batch.actions)).mean()
        weight = model.cql_alpha
        if model.target_action_gap is not None:
            weight = weight * float(model.log_cql_multiplier.detach().exp())
            gap = gap - model.target_action_gap
        total = total + ((q(batch.actions) - target.squeeze(1)) ** 2).mean() + weight * gap
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cql_alpha": 0.0},
        {"soft_q_backup": True},
        {"max_q_backup": True},
        {"target_action_gap": 2.0},
        {"calibrated": True},
        {"policy_kwargs": {"net_arch": [8, 8], "n_critics": 3}},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_the_published_definition(settings: dict[str, Any]) -> None:
    model = in_doubles(small(two_step_episodes(), **settings))
    batch = a_batch()
    if model.calibrated:
        batch = batch._replace(returns_to_go=th.linspace(-0.2, 0.2, 16, dtype=th.float64).reshape(-1, 1))
    with th.no_grad():
        model.log_cql_multiplier.fill_(0.4 if model.target_action_gap is not None else 0.0)
    ent_coef, state = th.tensor([0.3], dtype=th.float64), model._noise.get_state()
    found = model._critic_loss(batch, ent_coef)
    model._noise.set_state(state)
    draws = {
        "next": th.randn(16, 4, 2, generator=model._noise),
        "here": th.randn(16, 3, 2, generator=model._noise),
        "uniform": th.rand(16, 3, 2, generator=model._noise),
    }
    expected = published_critic_loss(model, batch, 0.3, draws)
    assert found.loss.shape == found.td_error.shape == (16,)
    assert found.loss.mean().item() == pytest.approx(expected.item(), abs=1e-6)
    parameters = list(model.critic.parameters())
    ours = th.autograd.grad(found.loss.mean(), parameters)
    theirs = th.autograd.grad(expected, parameters)
    for one, two in zip(ours, theirs, strict=True):
        th.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert max(float(g.abs().max()) for g in theirs) > 0.1


def test_actor_follows_the_smaller_value_and_its_entropy() -> None:
    model = in_doubles(small(two_step_episodes()))
    observations, noise = a_batch().observations, th.randn(16, 1, 2, dtype=th.float64)
    found = model._policy_loss(th.tensor([0.3], dtype=th.float64), noise, observations)
    mean, log_std, _ = model.actor.get_action_dist_params(observations)
    actions = (mean + log_std.exp() * noise[:, 0]).tanh()
    distribution = model.actor.action_dist.proba_distribution(mean, log_std)  # type: ignore[call-arg]
    log_prob = distribution.log_prob(actions, mean + log_std.exp() * noise[:, 0])  # type: ignore[call-arg]
    expected = 0.3 * log_prob - th.minimum(*model.critic(observations, actions)).squeeze(1)
    th.testing.assert_close(found.loss, expected)
    assert found.metrics["entropy"].item() == pytest.approx(-log_prob.mean().item())
    ours = th.autograd.grad(found.loss.sum(), list(model.actor.parameters()))
    theirs = th.autograd.grad(expected.sum(), list(model.actor.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        th.testing.assert_close(one, two)


def like_d3rlpy(numbers: dict[str, th.Tensor], case: str) -> ContinuousCQL:
    """A model with the weights of the file, and with the slope of the squashing function exactly as d3rlpy has it."""
    settings: dict[str, Any] = {
        "lagrange": {"target_action_gap": 3.0}, "soft": {"soft_q_backup": True}, "max": {"max_q_backup": True},
    }.get(case, {})  # fmt: skip
    model = small(two_step_episodes(), cql_n_actions=4, policy_kwargs={"net_arch": [32, 32]}, **settings)
    places = {
        **{f"{name}{k + 1}": net for name, critic in (("q", model.critic), ("target", model.critic_target))
           for k, net in enumerate(critic.q_networks)},
    }  # fmt: skip
    layers = {f"{name}.{n}": net[i] for name, net in places.items() for n, i in (("0", 0), ("1", 2), ("out", 4))}
    layers |= {f"policy.{n}": model.actor.latent_pi[i] for n, i in (("0", 0), ("1", 2))}
    layers |= {"policy.mean": model.actor.mu, "policy.log_std": model.actor.log_std}  # type: ignore[dict-item]
    with th.no_grad():
        for name, layer in layers.items():
            for part in ("weight", "bias"):
                getattr(layer, part).copy_(numbers[f"{name}.{part}"])
    model.layers = layers  # type: ignore[attr-defined]

    def exact(observations: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std, _ = model.actor.get_action_dist_params(observations)
        before = mean[:, None] + log_std[:, None].exp() * noise
        slope = 2 * (np.log(2) - before - th.nn.functional.softplus(-2 * before))
        normal = th.distributions.Normal(mean[:, None], log_std[:, None].exp())
        return before.tanh(), (normal.log_prob(before) - slope).sum(2)

    model._sample = exact  # type: ignore[method-assign]
    return in_doubles(model)


@pytest.mark.parametrize("case", ["fixed", "lagrange", "soft", "max"])
def test_loss_and_gradients_equal_d3rlpys(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its weights and its draws."""
    numbers = {k: th.as_tensor(v).double() for k, v in np.load(D3RLPY).items()}
    model = like_d3rlpy(numbers, case)
    there = {k.partition(".")[2]: v for k, v in numbers.items() if k.startswith(f"{case}.")}
    first = th.zeros(1, 16, 2, dtype=th.float64)  # the most probable action is bootstrapped from
    later = there["next_noise"]
    if case == "soft":
        first = there["target_noise"][None]
    multiplier = there.get("alpha", th.ones(1, dtype=th.float64)).reshape(1)
    noise = th.cat([first, later]).transpose(0, 1), there["current_noise"].transpose(0, 1)
    if case == "max":  # d3rlpy draws other actions for the target than for the gap
        monkeypatch.setattr(model, "_next_values", lambda *_: there["target"])
        target = continuous.values_of_actions(
            model.critic_target, numbers["batch.next_observations"], there["target_actions"]
        )
        th.testing.assert_close(target, there["target_values"], rtol=1e-5, atol=1e-6)
        th.testing.assert_close(target.min(0).values.max(1, keepdim=True).values, there["target"], rtol=1e-5, atol=1e-6)
    found = model._conservative_loss(
        there["log_temp"].exp().reshape(1),
        multiplier,
        *noise,
        (there["random_actions"] + 1) / 2,
        *(numbers[f"batch.{k}"] for k in ("observations", "actions", "next_observations", "terminals", "rewards")),
    )
    loss = found.loss.mean()
    assert loss.item() == pytest.approx(there["critic_loss"].item(), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, layer in model.layers.items():  # type: ignore[attr-defined]
        if name.startswith("q"):
            for part in ("weight", "bias"):
                wanted = there[f"grad.{name}.{part}"]
                size = float(wanted.abs().max())
                th.testing.assert_close(getattr(layer, part).grad, wanted, rtol=1e-5, atol=1e-6 * max(1.0, size))
    assert 5 * (found.metrics["conservative_gap"].item() - (model.target_action_gap or 0)) == pytest.approx(
        there["conservative"].mean().item(), rel=1e-5
    )


def test_actors_step_equals_d3rlpys() -> None:
    numbers = {k: th.as_tensor(v).double() for k, v in np.load(D3RLPY).items()}
    model = like_d3rlpy(numbers, "fixed")
    found = model._policy_loss(
        numbers["actor.log_temp_after"].exp().reshape(1), numbers["actor.noise"][:, None], numbers["batch.observations"]
    )
    assert found.loss.mean().item() == pytest.approx(numbers["actor.loss"].item(), rel=1e-6)
    found.loss.mean().backward()  # type: ignore[no-untyped-call]
    for name, layer in model.layers.items():  # type: ignore[attr-defined]
        if name.startswith("policy"):
            for part in ("weight", "bias"):
                wanted = numbers[f"actor.grad.{name}.{part}"]
                # d3rlpy's actions lie so near their bounds that its float32 is a little off
                th.testing.assert_close(getattr(layer, part).grad, wanted, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("gap", "rises"), [(-100.0, True), (100.0, False)])
def test_multiplier_rises_while_the_gap_is_too_large(gap: float, rises: bool) -> None:
    model = small(two_step_episodes(), target_action_gap=5.0, learning_rate=0.1)
    model._tune_multiplier(th.tensor(5.0 - gap))
    moved = float(model.log_cql_multiplier.detach())
    assert moved == pytest.approx(0.1 if rises else -0.1, rel=1e-3)
    model.learn(3)
    assert "cql_multiplier" in model._train_metrics._keys


# ---------------------------------------------------------------------- data


def two_step_episodes(rewards: Any = (1.0, 2.0), ends: Any = (True,), **kwargs: Any) -> OfflineReplayBuffer:
    """Episodes of two steps each."""
    n = len(ends)
    rng = np.random.default_rng(0)
    flags, got = np.zeros(3 * n, bool), np.zeros(3 * n, np.float32)
    flags[1::3] = ends
    got.reshape(n, 3)[:, :2] = np.asarray(rewards, np.float32).reshape(-1, 2)
    actions = rng.uniform(-1, 1, (3 * n, 2)).astype(np.float32)
    return OfflineReplayBuffer(
        ArrayFrames(rng.normal(size=(3 * n, 5)).astype(np.float32)), actions, got, flags, np.full(n, 2), BOX, ACTIONS,
        device="cpu", seed=0, **kwargs,
    )  # fmt: skip


def test_returns_to_go_are_lower_bounds() -> None:
    """Rewards 1, 2 and -1, -3; gamma 0.5. A cut episode goes on with its mean reward if that is negative."""
    found = lower_returns(
        np.array([1, 2, 1, 2, -1, -3, -1, -3], np.float32), np.full(4, 2), np.array([True, False, True, False]), 0.5
    )
    beyond = -2 / (1 - 0.5)
    assert found.tolist() == [2, 2, 2, 2, -2.5, -3, -2.5 + 0.25 * beyond, -3 + 0.5 * beyond]


def test_calibrated_batches_hold_their_own_returns() -> None:
    data = two_step_episodes([[1, 2], [10, 20], [-1, -3]], [True, False, True])
    small(data, calibrated=True, gamma=0.5)
    batch = data.sample(64)
    expected = {1.0: 2.0, 2.0: 2.0, 10.0: 20.0, 20.0: 20.0, -1.0: -2.5, -3.0: -3.0}
    pairs = zip(batch.rewards.flatten().tolist(), batch.returns_to_go.flatten().tolist(), strict=True)  # type: ignore[attr-defined]
    seen = dict(pairs)
    assert seen == expected
    small(data, calibrated=False)
    assert not hasattr(data.sample(4), "returns_to_go"), "another model may have the same data"
    small(data, calibrated=True, clip_rewards=True, gamma=0.5)
    assert set(data.sample(64).returns_to_go.flatten().tolist()) == {1.5, 1.0, -1.5, -1.0}  # type: ignore[attr-defined]


def test_values_below_the_return_are_not_pushed() -> None:
    """Where the data got more than the critics say, only uniform actions and the data's own have a gradient."""
    model = small(two_step_episodes(), calibrated=True)
    values = th.zeros(2, 4, 10, requires_grad=True)
    batch = a_batch(4)._replace(returns_to_go=th.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
    single = OfflineSamples(*(x if x is None else x.float() for x in batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            continuous,
            "values_of_actions",
            lambda critic, obs, a: values if critic is model.critic else th.zeros(2, 4, a.shape[1]),
        )
        model._critic_loss(single, th.ones(1)).loss.sum().backward()  # type: ignore[no-untyped-call]
    policy = values.grad[:, :, 4:]  # type: ignore[index]
    assert (policy[:, 0::2] == 0).all()
    assert (policy[:, 1::2] > 0).all()
    assert (values.grad[:, :, 1:4] > 0).all()  # type: ignore[index]


def test_returns_of_new_transitions_are_known_when_their_episode_has_ended() -> None:
    buffer = OnlineReplayBuffer(6, BOX, ACTIONS, "cpu", n_envs=2, alpha=0.0, gamma=0.5)
    buffer.keep_returns_to_go(True)
    size = buffer.buffer_size
    assert size == 3

    def add(rewards: tuple[float, float], dones: tuple[bool, bool], cut: tuple[bool, bool] = (False, False)) -> None:
        infos = [{"TimeLimit.truncated": c} for c in cut]
        obs = np.zeros((2, 5), np.float32)
        buffer.add(obs, obs, np.zeros((2, 2), np.float32), np.array(rewards), np.array(dones), infos)

    add((1, -1), (False, False))
    assert np.isneginf(buffer.sample(20).returns_to_go.numpy()).all()  # type: ignore[union-attr]
    add((2, -3), (True, True), (False, True))
    found = buffer._returns_to_go
    assert found is not None
    assert found[:2].tolist() == [[2.0, -2.5 - 1.0], [2.0, -3.0 - 2.0]]
    add((4, 4), (False, False))
    add((8, 8), (False, True))  # wraps: slot 0 again
    assert np.isneginf(found[0, 0])
    assert found[[2, 0], 1].tolist() == [8.0, 8.0]
    buffer.end_sequences()
    add((1, 1), (True, True))
    assert found[1].tolist() == [1.0, 1.0], "what was before does not belong to it"
    assert np.isneginf(found[0, 0])


def test_actions_are_scaled_for_the_critics_and_not_for_cloning(pendulum: minari.MinariDataset) -> None:
    data = load_minari(pendulum)
    assert np.abs(data.actions).max() > 1.5, "torques are in [-2, 2]"
    model = small(data)
    half = data.sample(64).actions
    assert half.abs().max() <= 1
    BC("MlpPolicy", data, policy_kwargs={"net_arch": [8]}, device="cpu").learn(1)
    assert data.sample(64).actions.abs().max() > 1.5
    model.learn(1)
    assert data.sample(64).actions.abs().max() <= 1
    np.testing.assert_allclose(data._actions(np.array([3])), data.actions[3:4] / 2, rtol=1e-6)


def test_the_policys_actions_have_sb3s_density(pendulum: minari.MinariDataset) -> None:
    model = small(pendulum)
    observations, noise = th.randn(6, 3), th.randn(6, 4, 1)
    actions, log_prob = model._sample(observations, noise)
    mean, log_std, _ = model.actor.get_action_dist_params(observations)
    for k in range(4):
        before = mean + log_std.exp() * noise[:, k]
        distribution = model.actor.action_dist.proba_distribution(mean, log_std)  # type: ignore[call-arg]
        th.testing.assert_close(actions[:, k], before.tanh())
        expected = distribution.log_prob(actions[:, k], before)  # type: ignore[call-arg]
        th.testing.assert_close(log_prob[:, k], expected)


# ---------------------------------------------------------------------- what it learns


def bandit(n: int = 600) -> OfflineReplayBuffer:
    """One step, uniform actions, the reward falls with the distance from the observation's first number."""
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.uniform(-0.7, 0.7, (n, 5)), 2, axis=0).astype(np.float32)
    actions = rng.uniform(-1, 1, (2 * n, 2)).astype(np.float32)
    rewards = -5 * ((actions - frames[:, :2]) ** 2).sum(1).astype(np.float32)
    return OfflineReplayBuffer(
        ArrayFrames(frames), actions, rewards, np.arange(2 * n) % 2 == 0, np.ones(n, np.int64), BOX, ACTIONS,
        device="cpu", seed=0,
    )  # fmt: skip


def test_learns_better_actions_than_the_datas() -> None:
    data = bandit()
    model = small(
        data, batch_size=64, learning_rate=3e-3, actor_learning_rate=3e-3, cql_alpha=0.5, ent_coef=0.01,
        policy_kwargs={"net_arch": [32, 32]},
    )  # fmt: skip
    model.learn(600, log_interval=None)
    observations = data.frames.take(np.arange(0, 1200, 2))
    actions, _ = model.predict(observations, deterministic=True)
    reward = -5 * ((actions - observations[:, :2]) ** 2).sum(1).mean()
    behaviour = float(data.rewards[::2].mean())
    assert behaviour < -3.5
    assert reward > 0.15 * behaviour


def test_conservative_term_lowers_what_the_data_does_not_show() -> None:
    data, gaps = bandit(), []
    data.actions[:] = data.frames.take(np.arange(len(data.actions)))[:, :2]
    for alpha in (0.0, 5.0):
        model = small(data, batch_size=64, learning_rate=1e-2, cql_alpha=alpha)
        model.learn(300, log_interval=None)
        gaps.append(model.compute_loss(model.replay_buffer.sample(256)).metrics["conservative_gap"].item())  # type: ignore[union-attr]
    assert gaps[1] < gaps[0] - 0.5


def test_cloning_comes_first() -> None:
    """Data of one action in each state is imitated while the critics know nothing."""
    data = bandit()
    data.actions[:] = data.frames.take(np.arange(len(data.actions)))[:, :2]
    data.rewards[:] = 0
    model = small(data, batch_size=64, actor_learning_rate=3e-3, learning_rate=0.0, bc_steps=300, ent_coef=0.0)
    model.learn(300, log_interval=None)
    observations = data.frames.take(np.arange(200))
    actions, _ = model.predict(observations, deterministic=True)
    assert np.abs(actions - observations[:, :2]).mean() < 0.1
    state = {k: v.clone() for k, v in model.critic.state_dict().items()}
    model.learn(1, reset_num_timesteps=False)
    assert all(th.equal(v, state[k]) for k, v in model.critic.state_dict().items()), "learning rate 0"


def test_rates_of_critics_and_actor_are_their_own(pendulum: minari.MinariDataset) -> None:
    model = small(pendulum, learning_rate=1e-3, actor_learning_rate=lambda left: 1e-4 * left)
    model.learn(4)
    assert model.critic.optimizer.param_groups[0]["lr"] == 1e-3
    for optimizer in (model.actor.optimizer, model.ent_coef_optimizer):
        assert optimizer is not None
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.25)


@pytest.mark.parametrize("calibrated", [False, True])
def test_goes_on_online_with_actions_of_one_scale(pendulum: minari.MinariDataset, calibrated: bool) -> None:
    model = small(pendulum, calibrated=calibrated)
    model.learn(5)
    model.learn_online(60, gym.make("Pendulum-v1", max_episode_steps=20))
    assert model._n_updates == 65
    batch = model.replay_buffer.sample(32)  # type: ignore[union-attr]
    assert batch.actions.abs().max() <= 1
    online = model.replay_buffer.online  # type: ignore[union-attr]
    assert online.size() == 60
    if calibrated:
        returns = batch.returns_to_go.flatten()  # type: ignore[attr-defined]
        assert th.isfinite(returns).all(), "all episodes have ended"
        rewards = online.rewards[:20, 0]
        expected = sum(0.99**k * r for k, r in enumerate(rewards)) + 0.99**20 * rewards.mean() / 0.01
        assert online._returns_to_go[0, 0] == pytest.approx(expected, rel=1e-5)


def test_calibrated_returns_follow_the_normalized_rewards(pendulum: minari.MinariDataset) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1"), norm_obs=False)
    model = small(pendulum, env=env, calibrated=True)
    env.ret_rms.var = np.float64(16.0)
    plain, normalized = (model.replay_buffer._to_go(np.arange(5), e) for e in (None, env))  # type: ignore[union-attr]
    th.testing.assert_close(normalized, plain / 4)


def test_prioritized_data_weights_the_critics(pendulum: minari.MinariDataset) -> None:
    model = small(pendulum, dataset_kwargs={"prioritized": True}, calibrated=True)
    before = model.replay_buffer.priorities.tree.leaves.copy()  # type: ignore[union-attr]
    model.learn(5)
    assert (model.replay_buffer.priorities.tree.leaves != before).any()  # type: ignore[union-attr]
    batch = model.replay_buffer.sample(4)  # type: ignore[union-attr]
    assert batch.returns_to_go.shape == batch.weights.shape == (4, 1)  # type: ignore[attr-defined]


def test_n_steps_and_dictionaries() -> None:
    space = spaces.Dict({"observation": BOX, "desired_goal": spaces.Box(-1, 1, (2,))})
    model = ContinuousCQL(
        "MultiInputPolicy", filled_buffer(space, ACTIONS), batch_size=8, policy_kwargs={"net_arch": [8]}, device="cpu"
    )
    model.learn(2)
    assert ACTIONS.contains(model.predict(space.sample())[0])
    data = two_step_episodes(ends=(True, False))
    model = small(data, n_steps=2, gamma=0.5)
    batch = data.sample(64)
    assert set(batch.rewards.flatten().tolist()) == {2.0}  # 1 + 0.5 * 2, or 2
    assert set(batch.discounts.flatten().tolist()) == {0.25, 0.5}  # type: ignore[union-attr]
    model.learn(2)


def test_the_environment_of_transformed_data(pendulum: minari.MinariDataset) -> None:
    """The policy's actions are unscaled for the environment."""
    model = small(pendulum)
    env = make_eval_env(pendulum)
    actions = [model.predict(env.observation_space.sample(), deterministic=False)[0] for _ in range(40)]
    assert np.abs(actions).max() > 1
    assert all(env.action_space.contains(a[0] if a.ndim > 1 else a) for a in actions)


def test_bfloat16_rounds_the_critics_only(pendulum: minari.MinariDataset) -> None:
    model = small(pendulum, policy_kwargs={"net_arch": [16, 16]})
    batch, state = model.replay_buffer.sample(16), model._noise.get_state()  # type: ignore[union-attr]
    exact = model.compute_loss(batch)
    model.bf16 = True
    model._noise.set_state(state)
    rounded = model.compute_loss(batch)
    assert rounded.loss.dtype == th.float32
    assert not th.equal(rounded.loss, exact.loss)
    th.testing.assert_close(rounded.loss, exact.loss, rtol=0.05, atol=0.5)
    model.learn(3)


def test_is_judged_by_episodes_that_it_scales_for_itself(pendulum: minari.MinariDataset) -> None:
    """Held-out episodes may be the very buffer that the model learns from."""
    data = load_minari(pendulum)
    model = small(data, learning_rate=1e-2)
    found = []
    for held_out in (data, pendulum):
        callback = OfflineEvalCallback(held_out, verbose=0, eval_freq=5, fqe_steps=3)
        model.learn(5, callback=callback, reset_num_timesteps=False)
        found.append(callback.evaluate())
    assert set(found[0]) == {"td_error", "initial_value", "soft_opc", "action_mse", "fqe"}
    again = OfflineEvalCallback(data, verbose=0)
    again.init_callback(model)
    for name, value in again.evaluate().items():
        assert value == pytest.approx(found[1][name], rel=1e-4)
    estimator = FQE("MlpPolicy", data, model, device="cpu", seed=0).learn(5)
    assert np.isfinite(estimator.initial_value().mean)
    assert data.sample(64).actions.abs().max() <= 1, "the model's buffer is as it was"


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: small(d, calibrated=True), r"whole episodes.*Minari"),
        (lambda d: CQL("MlpPolicy", d), r"Discrete.*ContinuousCQL"),
        (lambda d: CQL("MlpPolicy", d, calibrated=True), r"Discrete.*ContinuousCQL"),
        (lambda d: small(d, soft_q_backup=True, max_q_backup=True), "choose one"),
        (lambda d: small(d, target_action_gap=-1.0), "target_action_gap"),
        (lambda d: ContinuousCQL("CnnPolicy", d), "CnnPolicy needs pictures"),
    ],
)
def test_bad_input(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(filled_buffer(BOX, ACTIONS))


def test_discrete_data_is_for_cql(cartpole: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match=r"ContinuousCQL needs Box actions.*Discrete.* CQL learns from Discrete"):
        small(cartpole)


class Unbounded(PendulumEnv):
    """It clips torques by itself."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


gym.register("Unbounded-v0", entry_point=f"{__name__}:Unbounded", max_episode_steps=30)


def test_unbounded_actions_are_given_bounds() -> None:
    dataset = record(
        lambda o: np.array([3.0 * o[0]], np.float32), gym.make("Unbounded-v0"), "pendulum/unbounded-v0", n_steps=60
    )
    with pytest.raises(ValueError, match=r"between bounds.*clip_actions:-1,1"):
        small(dataset)
    model = small(dataset, dataset_kwargs={"transforms": ["clip_actions:-1,1"]})
    assert model.action_space == spaces.Box(-1, 1, (1,))
    assert model.replay_buffer.sample(50).actions.abs().max() == 1  # type: ignore[union-attr]
    model.learn(2)


def test_is_saved_with_what_it_draws_next(pendulum: minari.MinariDataset, tmp_path: Path) -> None:
    model = small(pendulum, target_action_gap=1.0, learning_rate=1e-2)
    model.learn(20)
    model.save(tmp_path / "model")
    loaded = ContinuousCQL.load(tmp_path / "model", device="cpu")
    assert float(loaded.log_cql_multiplier.detach()) == float(model.log_cql_multiplier.detach()) != 0
    assert th.equal(loaded._noise.get_state(), model._noise.get_state())
    assert isinstance(loaded, sb3.SAC)
