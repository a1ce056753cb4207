"""EfficientZeroV2: targets, windows, networks, one update, SB3's contract, and that it learns."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ext import DQN, EfficientZeroV2
from sb3_ext.data import DatasetError, StackFrames, make_atari_env, record
from sb3_ext.efficientzero.gaussian import log_prob, root_samples, sampled_entropy
from sb3_ext.efficientzero.loss import random_intensity, random_shift
from sb3_ext.efficientzero.networks import CnnNetwork, RunningNorm
from sb3_ext.efficientzero.policies import CnnPolicy, MlpPolicy
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from sb3_ext.efficientzero.targets import loss_masks, mix_values, n_step_values
from sb3_ext.losses import cross_entropy, inverse_value_transform, negative_cosine, two_hot, value_transform
from tests.helpers import SMALL, TINY_CNN, fill, randomize

# --- transforms


@given(st.floats(-1e5, 1e5))
def test_value_transform_round_trip(x: float) -> None:
    value = th.tensor(x, dtype=th.float64)
    assert inverse_value_transform(value_transform(value)).item() == pytest.approx(x, rel=1e-9, abs=1e-9)
    assert value_transform(-value) == -value_transform(value)


def test_value_transform_by_hand() -> None:
    assert value_transform(th.tensor([0.0, 3.0, -8.0])).tolist() == pytest.approx([0, 1.003, -2.008])


def test_two_hot_by_hand_and_at_the_ends() -> None:
    support = th.linspace(-2, 2, 5)
    target = two_hot(th.tensor([0.25, -2.0, 2.0, 9.0]), support)
    assert target.tolist() == [[0, 0, 0.75, 0.25, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    places = th.linspace(-2, 2, 41)
    th.testing.assert_close(two_hot(places, support) @ support, places, atol=1e-6, rtol=0)


def test_cross_entropy_and_cosine() -> None:
    logits, target = th.randn(4, 5), th.rand(4, 5).softmax(1)
    th.testing.assert_close(
        cross_entropy(logits, target), th.nn.functional.cross_entropy(logits, target, reduction="none")
    )
    x = th.randn(3, 7, requires_grad=True)
    assert negative_cosine(x, 3 * x).tolist() == pytest.approx([-1, -1, -1], abs=1e-6)
    assert negative_cosine(x, -x.detach()).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


# --- targets


def slow_n_step(rewards: Any, values: Any, length: int, terminated: bool, k: int, n: int, gamma: float) -> float:
    """One target, step by step."""
    total, discount = 0.0, 1.0
    for place in range(k, k + n):
        if place >= length:
            break
        total += discount * rewards[place]
        discount *= gamma
    end = min(k + n, length)
    if end >= length and terminated:
        return total
    return total + discount * values[max(end, min(k, length))]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_n_step_values_equal_the_slow_ones(unroll: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, length = 6, unroll + n
    rewards, values = rng.normal(size=(size, length)), rng.normal(size=(size, length + 1))
    lengths, terminated = rng.integers(1, length + 1, size), rng.random(size) < 0.5
    found = n_step_values(rewards, values, lengths, terminated, unroll_steps=unroll, n_steps=n, gamma=0.9)
    for b in range(size):
        for k in range(unroll + 1):
            if k <= lengths[b] or terminated[b]:
                wanted = slow_n_step(rewards[b], values[b], lengths[b], terminated[b], k, n, 0.9)
                assert found[b, k] == pytest.approx(wanted, abs=1e-5)


def test_short_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="no windows for 3 unroll steps and 2-step"):
        n_step_values(
            np.zeros((1, 4)), np.zeros((1, 5)), np.array([4]), np.array([False]), unroll_steps=3, n_steps=2, gamma=1
        )


def test_loss_masks_by_hand() -> None:
    policy, value, reward = loss_masks(np.array([1, 1, 5]), np.array([True, False, True]), 3)
    assert policy.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert value.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert reward.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    mixed = mix_values(np.ones((2, 2)), np.zeros((2, 2)), np.array([True, False]))
    assert mixed.tolist() == [[1, 1], [0, 0]]


# --- windows


@pytest.mark.parametrize(("n_envs", "steps"), [(1, 20), (1, 150), (2, 100)])
def test_windows_equal_what_went_in(n_envs: int, steps: int) -> None:
    buffer, episodes = fill(n_envs, steps)
    kept = min(steps, buffer.buffer_size)
    batch = buffer.sample(200)
    assert batch.observations.shape == (200, 5, 2)
    for b, index in enumerate(batch.indices):
        slot, env = divmod(int(index), n_envs)
        first = next(t for t in range(steps - kept, steps) if t % buffer.buffer_size == slot)
        log = episodes[env]
        length = 0
        while True:
            obs, action, reward, following, done, terminated = log[first + length]
            np.testing.assert_array_equal(batch.observations[b, length], obs)
            np.testing.assert_array_equal(batch.observations[b, length + 1], following)
            assert (batch.actions[b, length], batch.rewards[b, length]) == (action, pytest.approx(reward, rel=1e-6))
            length += 1
            if done or first + length == steps or length == 4:
                break
        assert batch.lengths[b] == length
        assert batch.terminated[b] == terminated
        assert batch.ages[b] == (steps - 1 - first) * n_envs
        assert (batch.rewards[b, length:] == 0).all()
        assert (batch.observations[b, length:] == following).all()


def test_windows_of_image_stacks_are_rebuilt() -> None:
    env = StackFrames(make_atari_env("Breakout"), 4)
    assert isinstance(env.observation_space, spaces.Box)
    plain = SequenceReplayBuffer(60, env.observation_space, env.action_space, "cpu", 1, length=3)
    frames = SequenceReplayBuffer(60, env.observation_space, env.action_space, "cpu", 1, True, length=3)
    obs, _ = env.reset(seed=0)
    for _ in range(50):
        following, reward, *_ = env.step(env.action_space.sample())
        for buffer in (plain, frames):
            buffer.add(obs[None], following[None], np.array([[1]]), np.array([reward]), np.array([False]), [{}])
        obs = following
    indices = np.arange(40)
    one, two = (buffer.windows(indices, np.ones(40, np.float32)) for buffer in (plain, frames))
    np.testing.assert_array_equal(one.observations, two.observations)
    assert frames.store.frames.nbytes < plain.store.observations.nbytes / 3  # type: ignore[union-attr]


# --- networks and policies


def test_running_norm_equals_numpy() -> None:
    norm, x = RunningNorm(3), th.randn(50, 3) * 4 + 2
    for part in x.split(10):
        norm(part)
    th.testing.assert_close(norm.mean, x.mean(0))
    th.testing.assert_close(norm.var, x.var(0, unbiased=False))
    norm.eval()
    assert norm(x).std(0).tolist() == pytest.approx([1, 1, 1], rel=0.05)


@pytest.mark.parametrize("shape", [(12, 96, 96), (4, 84, 84), (3, 64, 48), (4, 10, 10)])
def test_image_network_of_any_size(shape: tuple[int, ...]) -> None:
    network = CnnNetwork(spaces.Box(0, 255, shape, np.uint8), 3, 3, 51, channels=8, head_size=8, projection_size=16)
    latent = network.represent(th.randint(255, (2, *shape)))
    assert latent.shape[2:] == ((6, 6) if shape == (12, 96, 96) else latent.shape[2:])
    following = network.dynamics(latent, th.eye(3)[:2])
    assert following.shape == latent.shape
    assert network.reward_head(following).abs().max() == 0
    value, policy = network.predict(following)
    assert value.shape == (2, 51)
    assert policy.shape == (2, 3)


def test_paper_network_has_the_papers_size() -> None:
    network = CnnNetwork(spaces.Box(0, 255, (12, 96, 96), np.uint8), 4, 4, 601)

    def size(*modules: th.nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    assert size(network.representation) == 318_016
    assert size(network.trunk, network.value_head, network.policy_head) == pytest.approx(133_149, rel=0.01)
    assert size(network.projector) == 4_465_664
    assert size(network.predictor) == pytest.approx(526_080, rel=0.01)


def make_policy(action_space: spaces.Space[Any], **kwargs: Any) -> MlpPolicy:
    return MlpPolicy(spaces.Box(-1, 1, (4,)), action_space, lambda _: 1e-3, num_simulations=8, **kwargs)


@pytest.mark.parametrize("actions", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_fast_path_equals_torch(actions: spaces.Space[Any]) -> None:
    th.manual_seed(0)
    policy = make_policy(actions)
    for _ in range(2):  # again after the parameters changed
        randomize(policy)
        policy.set_training_mode(False)
        observations = th.randn(20, 4)
        fast = policy.roots(observations)
        with th.no_grad():
            latent = policy.network.represent(observations)
            value, logits = policy.network.predict(latent)
        th.testing.assert_close(th.as_tensor(fast.values), policy.decode(value), rtol=1e-3, atol=1e-3)
        th.testing.assert_close(th.as_tensor(fast.policy), logits, rtol=1e-4, atol=1e-4)
        network = policy._fast_network()
        assert network is not None
        slots = th.arange(20) % 2
        if policy.discrete:
            ours, theirs = network.recurrent(latent.numpy(), slots.numpy()), policy._recurrent(latent, slots)
            th.testing.assert_close(th.from_numpy(ours.embedding), theirs.embedding, rtol=1e-4, atol=1e-4)
        else:
            sampled = th.rand(20, 16, 2)
            th.manual_seed(1)
            ours = network.recurrent((latent.numpy(), sampled.numpy()), slots.numpy())
            th.manual_seed(1)
            theirs = policy._recurrent((latent, sampled), slots)
        th.testing.assert_close(th.as_tensor(ours.reward), th.as_tensor(theirs.reward), rtol=1e-3, atol=1e-3)
        th.testing.assert_close(th.as_tensor(ours.value), th.as_tensor(theirs.value), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_fast_path_follows_the_optimizer(fused: bool, pickled: bool) -> None:
    policy = make_policy(spaces.Discrete(3), optimizer_kwargs={"fused": fused})
    if pickled:
        policy = pickle.loads(pickle.dumps(policy))
    policy.set_training_mode(False)
    observations = th.randn(20, 4)
    before = np.array(policy.roots(observations).policy)
    for parameter in policy.parameters():
        parameter.grad = th.randn_like(parameter)
    policy.optimizer.step()  # a fused one does not count the parameters' versions
    after = policy.roots(observations).policy
    assert np.abs(after - before).max() > 1e-4
    with th.no_grad():
        wanted = policy.network.predict(policy.network.represent(observations))[1]
    th.testing.assert_close(th.as_tensor(after), wanted, rtol=1e-4, atol=1e-4)


def test_squashed_gaussian_density_integrates_to_one() -> None:
    policy = th.tensor([[0.3, -0.5], [0.5, -1.5]])
    grid = th.linspace(-0.9989, 0.9989, 20_001)
    density = log_prob(policy, grid[None, :, None].expand(2, -1, -1)).exp()
    assert th.trapezoid(density, grid).tolist() == pytest.approx([1, 1], abs=0.01)
    th.manual_seed(0)
    exact = -(density * density.log()).nan_to_num() @ th.full((20_001,), float(grid[1] - grid[0]))
    assert sampled_entropy(policy, 20_000).tolist() == pytest.approx(exact.tolist(), abs=0.03)


def test_broad_sampling_at_the_root() -> None:
    th.manual_seed(0)
    drawn = th.atanh(root_samples(th.zeros(4000, 2), 16, noise=True))
    narrow, broad = drawn[:, :4].std(), drawn[:, 4:].std()
    assert broad / narrow > 1.8  # three times, but for what the tanh's bound cuts off
    fixed = root_samples(th.zeros(2, 2), 16, noise=False)
    assert (fixed[0] == fixed[1]).all()
    assert (fixed[:, 0] == 0).all()


def test_augmentation() -> None:
    images = th.randint(0, 256, (20, 3, 8, 8), dtype=th.uint8)
    th.manual_seed(0)
    shifted = random_shift(images, 2)
    assert shifted.dtype == th.uint8
    assert not th.equal(shifted, images)
    padded = th.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").byte()
    for image, origin in zip(shifted, padded, strict=True):
        assert any(
            th.equal(image, origin[:, down : down + 8, right : right + 8]) for down in range(5) for right in range(5)
        )
    assert th.equal(random_shift(images, 0), images)
    ratio = random_intensity(images // 2 + 1, 0.05) / (images // 2 + 1)
    assert ratio.flatten(1).std(1).max() < 1e-6
    assert (ratio - 1).abs().max() <= 0.1 + 1e-6


# --- the algorithm


def test_greedy_continuous_actions_depend_on_the_observation_alone() -> None:
    settings = {**SMALL, "num_simulations": 40}
    policy = EfficientZeroV2("MlpPolicy", "Pendulum-v1", seed=0, **settings).policy
    for parameter in policy.parameters():
        if parameter.ndim > 1:  # heads start at zero
            th.nn.init.orthogonal_(parameter)
    batch = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    state = th.get_rng_state()
    together = policy.predict(batch, deterministic=True)[0]
    alone = [policy.predict(row, deterministic=True)[0] for row in batch]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)
    assert th.equal(th.get_rng_state(), state)
    assert policy.plan(policy.roots(th.from_numpy(batch)), noise=False)[0].tree.depths.max() > 1
    assert len(np.unique(together)) > 10


@pytest.mark.parametrize("change", [{"n_steps": 8}, {"value_target": "search", "unroll_steps": 7}])
def test_a_loaded_replay_buffer_fits_todays_settings(change: dict[str, Any], tmp_path: Path) -> None:
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, memoize_reanalysis=True, **SMALL).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    other = EfficientZeroV2.load(tmp_path / "model", env=model.get_env(), **change)
    other.load_replay_buffer(tmp_path / "replay")
    other.learn(4, reset_num_timesteps=False)
    assert other._n_updates > model._n_updates


def test_replay_buffers_of_others_are_refused(tmp_path: Path) -> None:
    DQN("MlpPolicy", "CartPole-v1", buffer_size=10).save_replay_buffer(tmp_path / "dqn")
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **SMALL)
    own = model.replay_buffer
    with pytest.raises(ValueError, match="holds a ReplayBuffer, not one of EfficientZeroV2"):
        model.load_replay_buffer(tmp_path / "dqn")
    assert model.replay_buffer is own


def test_pretraining_begins_the_statistics_of_vec_normalize(cartpole: minari.MinariDataset) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **{**SMALL, "buffer_size": 1000})
    model.pretrain(cartpole, 1)
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    everything = np.arange(model.replay_buffer.size())
    normalized = env.normalize_obs(model.replay_buffer.store.take(everything, everything)[0])
    assert isinstance(normalized, np.ndarray)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(normalized.std(0), 1, atol=1e-2)


def test_what_was_searched_with_other_settings_is_forgotten(tmp_path: Path) -> None:
    model = EfficientZeroV2("MlpPolicy", "Pendulum-v1", seed=0, memoize_reanalysis=True, **SMALL).learn(40)
    model.save_replay_buffer(tmp_path / "replay")
    model.save(tmp_path / "model")
    other = EfficientZeroV2.load(tmp_path / "model", env=model.get_env(), num_sampled_actions=4)
    other.load_replay_buffer(tmp_path / "replay")
    other.learn(4, reset_num_timesteps=False)
    assert isinstance(other.replay_buffer, SequenceReplayBuffer)
    memo = other.replay_buffer.memo
    assert memo is not None
    assert memo.get("policy", np.arange(3)).shape == (3, 4)


@pytest.mark.parametrize(
    ("policy", "policy_kwargs"),
    [
        ("CnnPolicy", TINY_CNN),
        ("MlpPolicy", {**SMALL["policy_kwargs"], "features_extractor_class": NatureCNN}),
    ],
)
def test_images(policy: str, policy_kwargs: dict[str, Any], tmp_path: Path) -> None:
    def make() -> gym.Env[Any, Any]:
        return Monitor(StackFrames(make_atari_env("Breakout"), 4))

    env = DummyVecEnv([make, make])
    settings = {**SMALL, "policy_kwargs": policy_kwargs}
    model = EfficientZeroV2(policy, env, seed=0, optimize_memory_usage=True, **settings).learn(30)
    assert model.image_shift == 4
    observations = env.reset()
    action, _ = model.predict(observations, deterministic=True)
    assert action.shape == (2,)
    assert model._n_updates > 0
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(
        EfficientZeroV2.load(tmp_path / "model").predict(observations, None, None, True)[0], action
    )


def test_features_extractor_sees_what_sb3_shows_it() -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    policy = MlpPolicy(space, spaces.Discrete(3), lambda _: 1e-3, features_extractor_class=NatureCNN)
    images = th.randint(0, 256, (3, 4, 36, 36), dtype=th.uint8)
    extractor = policy.network.features_extractor
    wanted = policy.network.representation(extractor(images / 255))
    assert th.equal(policy.network.represent(images), wanted)
    assert not th.equal(wanted[0], wanted[1])
    unscaled = MlpPolicy(
        space, spaces.Discrete(3), lambda _: 1e-3, features_extractor_class=NatureCNN,
        features_extractor_kwargs={"features_dim": 8, "normalized_image": True}, normalize_images=False,
    )  # fmt: skip
    extractor = unscaled.network.features_extractor
    assert th.equal(unscaled.network.represent(images), unscaled.network.representation(extractor(images.float())))


def test_image_policy_takes_no_features_extractor() -> None:
    with pytest.raises(ValueError, match="takes no features_extractor_class"):
        CnnPolicy(
            spaces.Box(0, 255, (4, 36, 36), np.uint8), spaces.Discrete(3), lambda _: 1e-3,
            features_extractor_class=NatureCNN,
        )  # fmt: skip


def test_an_update_by_value_target() -> None:
    found = {}
    for kind in ("n_step", "search", "mixed", "mixed, later"):
        later = 1000 if kind == "mixed, later" else 0
        model = EfficientZeroV2(
            "MlpPolicy", "CartPole-v1", seed=0, value_target=kind.split(",")[0], mixed_start=later,
            mixed_threshold=10, **{**SMALL, "learning_starts": 100},
        )  # fmt: skip
        model.learn(21)
        th.manual_seed(0)
        for parameter in model.policy_target.parameters():
            if parameter.ndim > 1:  # heads start at zero
                th.nn.init.orthogonal_(parameter)
        assert isinstance(model.replay_buffer, SequenceReplayBuffer)
        assert model.replay_buffer.length == (5 if kind == "search" else 10)
        batch = model.replay_buffer.windows(np.arange(16), np.ones(16, np.float32))
        th.manual_seed(0)
        found[kind] = model.reanalyze(batch).values
    old = batch.ages > 10
    assert 0 < old.sum() < len(old)
    assert (found["n_step"] - found["search"]).abs().max(1).values.min() > 1e-3
    np.testing.assert_allclose(found["mixed"][old], found["search"][old], atol=1e-5)
    np.testing.assert_allclose(found["mixed"][~old], found["n_step"][~old], atol=1e-5)
    np.testing.assert_allclose(found["mixed, later"], found["n_step"], atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "improved"])
def test_search_values_of_either_kind(kind: str) -> None:
    settings = {**SMALL, "learning_starts": 100, "value_target": "search"}
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, search_value=kind, **settings).learn(60)
    randomize(model.policy_target)  # type: ignore[arg-type]
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    batch = model.replay_buffer.windows(np.arange(8), np.ones(8, np.float32))
    flat = th.from_numpy(batch.observations).flatten(0, 1)
    th.manual_seed(0)
    values = model.reanalyze(batch).values
    th.manual_seed(0)
    out, _ = model.policy_target.plan(model.policy_target.roots(flat), noise=True)
    wanted = (out.root_values if kind == "mean" else out.improved_values).reshape(8, -1)
    inside = np.arange(6) < batch.lengths[:, None]
    np.testing.assert_allclose(values[inside], wanted[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("env", "default"), [("CartPole-v1", 0.0), ("Pendulum-v1", 0.05)])
def test_entropy_is_in_the_loss(env: str, default: float) -> None:
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **{**SMALL, "learning_starts": 100}).learn(60)
    assert model.ent_coef == default
    randomize(model.policy)  # type: ignore[arg-type]
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    batch = model.replay_buffer.windows(np.arange(8), np.ones(8, np.float32))
    losses, gradients = {}, {}
    for coef in (0.0, 0.2):
        model.ent_coef = coef
        th.manual_seed(0)
        out = model.compute_loss(batch)
        model.policy.zero_grad()
        out.loss.mean().backward()
        losses[coef] = float(out.loss.detach().mean())
        gradients[coef] = th.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])
    places = loss_masks(batch.lengths, batch.terminated, 5)[0].sum() / 8 / 5
    entropy = float(out.metrics["entropy"])
    assert losses[0.0] - losses[0.2] == pytest.approx(0.2 * places * entropy, rel=1e-3)
    assert env != "CartPole-v1" or entropy <= np.log(2)
    assert (gradients[0.0] - gradients[0.2]).abs().max() > 1e-4


def test_terminal_places_are_worth_nothing() -> None:
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **{**SMALL, "learning_starts": 100}).learn(100)
    randomize(model.policy_target)  # type: ignore[arg-type]
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    batch = model.replay_buffer.windows(np.arange(80), np.ones(80, np.float32))
    values = model.reanalyze(batch).values.numpy()
    over = (np.arange(6) >= batch.lengths[:, None]) & batch.terminated[:, None]
    assert over.any()
    assert (values[over] == 0).all()
    assert (values[~over] != 0).all()


def test_importance_weights_reach_the_gradient() -> None:
    def step(weight: float) -> th.Tensor:
        model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **SMALL).learn(20)
        assert isinstance(model.replay_buffer, SequenceReplayBuffer)
        weights = np.array([1, 1, 1, weight], np.float32)
        batch = model.replay_buffer.windows(np.arange(4), weights)
        model.replay_buffer.sample = lambda *_, **__: batch  # type: ignore[method-assign]
        before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
        model.train(1, 4)
        return th.nn.utils.parameters_to_vector(model.policy.parameters()) - before

    assert not th.equal(step(1.0), step(0.1))
    assert th.equal(step(1.0), step(1.0))


@pytest.mark.parametrize(
    ("env", "places"), [("CartPole-v1", 1), ("CartPole-v1", 4), ("Pendulum-v1", 3), ("two actions", 2)]
)
def test_search_from_windows(env: str, places: int) -> None:
    """The same as encoding and searching by hand from the first places of each window."""
    actions = {"CartPole-v1": spaces.Discrete(2), "Pendulum-v1": spaces.Box(-1, 1, (1,))}
    policy = make_policy(actions.get(env, spaces.Discrete(3)))
    randomize(policy)
    windows = np.random.default_rng(0).normal(size=(5, 4, 4)).astype(np.float32)
    legal = None
    if env == "two actions":
        legal = np.tile([True, False, True], (5, places, 1))
        legal[2] = False  # not known
    th.manual_seed(0)
    found = policy.search(windows, places, legal, improved_values=True)
    values = policy.roots(th.from_numpy(windows.reshape(20, 4))).values
    np.testing.assert_allclose(found.values, np.reshape(values, (5, 4)), rtol=1e-5)
    np.testing.assert_array_equal(found.values, policy.values(windows))
    th.manual_seed(0)
    firsts = th.from_numpy(np.concatenate([window[:places] for window in windows]))
    invalid = None if legal is None else np.array([[False, b != 2, False] for b in range(5) for _ in range(places)])
    out, sampled = policy.plan(policy.roots(firsts), noise=True, invalid=invalid)
    for b in range(5):
        rows = slice(b * places, (b + 1) * places)
        np.testing.assert_array_equal(found.best[b], out.actions[rows])
        np.testing.assert_allclose(found.policy[b], out.improved_policy[rows], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.search_values[b], out.improved_values[rows], rtol=1e-4, atol=1e-6)
        if sampled is not None:
            assert found.actions is not None
            np.testing.assert_allclose(found.actions[b], sampled[rows], rtol=1e-4, atol=1e-6)
    assert (found.actions is None) == (sampled is None)
    assert found.depth == pytest.approx(out.tree.depths.max(axis=1).mean())
    if legal is not None:
        assert (found.policy[[0, 1, 3, 4], :, 1] == 0).all()
        assert (found.policy[2, :, 1] > 0).all()


def test_who_says_how_to_search(tmp_path: Path) -> None:
    """An entry of policy_kwargs wins over the algorithm's argument, and stays what the user gave."""
    given = {**SMALL["policy_kwargs"], "num_simulations": 7, "max_num_considered_actions": None}
    settings = {**SMALL, "policy_kwargs": dict(given), "max_num_considered_actions": 3, "gamma": 0.9, "bf16": True}
    model = EfficientZeroV2("MlpPolicy", "Acrobot-v1", seed=0, **settings)
    for policy in (model.policy, model.policy_target):
        assert (policy.num_simulations, policy.considered, policy.gamma, policy.bf16) == (7, 2, 0.9, True)
    assert model.policy_kwargs == given
    del settings["policy_kwargs"]["num_simulations"], settings["policy_kwargs"]["max_num_considered_actions"]
    model = EfficientZeroV2("MlpPolicy", "Acrobot-v1", seed=0, **settings)
    model.save(tmp_path / "model")
    loaded = EfficientZeroV2.load(tmp_path / "model", device="cpu", num_simulations=50)
    for policy in (loaded.policy, loaded.policy_target):
        assert (policy.num_simulations, policy.considered, policy.gamma) == (50, 3, 0.9)
    assert model.policy_target.num_simulations == SMALL["num_simulations"]


def test_policy_alone() -> None:
    for env in ("CartPole-v1", "Pendulum-v1"):
        model = EfficientZeroV2("MlpPolicy", env, seed=0, **SMALL)
        randomize(model.policy)  # type: ignore[arg-type]
        model.policy.acts_by_search = False
        observation = model.observation_space.sample()
        action, _ = model.predict(observation, deterministic=True)
        wanted = model.policy.roots(th.from_numpy(observation)[None]).policy[0]
        if env == "CartPole-v1":
            assert action == wanted.argmax()
        else:
            mean = 5 * np.tanh(wanted[0] / 5)
            assert action == pytest.approx(2 * np.tanh(mean), rel=1e-4)


def test_policy_is_saved_and_loaded_alone(tmp_path: Path) -> None:
    policy = make_policy(spaces.Discrete(3))
    randomize(policy)
    policy.save(str(tmp_path / "policy"))
    other = MlpPolicy.load(str(tmp_path / "policy"))
    observation = np.ones(4, np.float32)
    np.testing.assert_array_equal(
        policy.predict(observation, deterministic=True)[0], other.predict(observation, deterministic=True)[0]
    )


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_pretraining_on_a_dataset(env: str) -> None:
    dataset = record(None, gym.make(env, max_episode_steps=60), "ez/data-v0", n_episodes=4)
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **SMALL)
    assert model.pretrain(dataset, 3) is model
    assert model._n_updates == 3
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    first = next(iter(dataset.iterate_episodes()))
    steps = len(first.rewards)
    batch = model.replay_buffer.windows(np.array([0, steps - 1]), np.ones(2, np.float32))
    np.testing.assert_allclose(batch.observations[0, :10], first.observations[:10], rtol=1e-6)
    np.testing.assert_allclose(batch.rewards[0], first.rewards[:10], rtol=1e-6)
    scale = 2.0 if env == "Pendulum-v1" else 1.0
    np.testing.assert_allclose(
        batch.actions[0].reshape(-1) * scale, np.asarray(first.actions[:10]).reshape(-1), rtol=1e-5
    )
    assert batch.lengths[1] == 1
    assert batch.terminated[1] == first.terminations[-1]
    model.learn(30)
    with pytest.raises(DatasetError, match="room for"):
        model.pretrain(dataset, 1) if env == "Pendulum-v1" else EfficientZeroV2(
            "MlpPolicy", env, **{**SMALL, "buffer_size": 20}
        ).pretrain(dataset, 1)


def test_datasets_that_do_not_fit_are_refused(cartpole: minari.MinariDataset) -> None:
    model = EfficientZeroV2("MlpPolicy", "Pendulum-v1", seed=0, **SMALL)
    with pytest.raises(DatasetError, match="another environment"):
        model.pretrain(cartpole, 1)
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 0
    two = EfficientZeroV2("MlpPolicy", make_vec_env("CartPole-v1", 2), seed=0, **SMALL)
    with pytest.raises(ValueError, match="one environment only, there are 2"):
        two.pretrain(cartpole, 1)


def test_recorded_frames_are_stacked_as_the_agent_sees_them(breakout: minari.MinariDataset) -> None:
    env = Monitor(StackFrames(make_atari_env("Breakout"), 4))
    model = EfficientZeroV2("CnnPolicy", env, seed=0, **{**SMALL, "policy_kwargs": TINY_CNN, "buffer_size": 1000},
                            optimize_memory_usage=True)  # fmt: skip
    model.pretrain(breakout, 1)
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    frames = next(iter(breakout.iterate_episodes())).observations
    seen = model.replay_buffer.windows(np.array([0, 10]), np.ones(2, np.float32)).observations
    np.testing.assert_array_equal(seen[1, 0], frames[7:11])
    np.testing.assert_array_equal(seen[0, 1], np.stack([frames[0] * 0, frames[0] * 0, frames[0], frames[1]]))


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_explain(env: str, tmp_path: Path) -> None:
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **SMALL)
    randomize(model.policy)  # type: ignore[arg-type]
    observation = model.observation_space.sample()
    found = model.explain(observation)
    np.testing.assert_array_equal(found.action, model.predict(observation, deterministic=True)[0])
    assert found.visits.sum() == 4
    assert found.improved_policy.sum() == pytest.approx(1)
    assert found.visits[found.principal_line[0]] == found.visits.max()
    if found.samples is not None:
        assert all(model.action_space.contains(sample) for sample in found.samples)
    assert f"value {found.root_value:.2f}" in str(found)
    found.draw(tmp_path / "tree.png")
    assert (tmp_path / "tree.png").stat().st_size > 1000
    state = th.random.get_rng_state()
    model.explain(observation)
    assert th.equal(state, th.random.get_rng_state())
    with pytest.raises(ValueError, match="a batch of 2"):
        model.explain(np.stack([observation] * 2))


# --- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_simulations": 0}, "num_simulations must be at least 1"),
        ({"max_num_considered_actions": 0}, "max_num_considered_actions must be at least 1"),
        ({"max_num_considered_actions": 3}, "a root has 2 actions"),
        ({"value_target": "best"}, "mixed, n_step, search"),
        ({"search_value": "best"}, "mean, improved"),
        ({"unroll_steps": 0}, "unroll_steps must be at least 1"),
        ({"num_sampled_actions": 1}, "num_sampled_actions must be at least 2"),
        ({"policy_kwargs": {"support_size": 1}}, "support_size must be at least 2"),
        ({"policy": "CnnPolicy"}, "CnnPolicy needs images"),
        ({"buffer_size": 5}, "Windows have 10 transitions, buffer_size is 5"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"policy": "MlpPolicy", "env": "CartPole-v1", "device": "cpu", **kwargs}
    with pytest.raises(ValueError, match=message):
        EfficientZeroV2(**settings)


class Strange(gym.Env[Any, Any]):
    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (spaces.Dict({"a": spaces.Box(0, 1, (2,))}), spaces.Discrete(2), "needs Box observations"),
        (spaces.Box(0, 1, (2,)), spaces.MultiDiscrete([2, 2]), "needs Discrete or Box actions"),
        (spaces.Box(0, 1, (2,)), spaces.Discrete(3, start=1), "must begin at 0"),
        (spaces.Box(0, 1, (2,)), spaces.Box(-np.inf, np.inf, (2,)), "must have a finite lower and upper bound"),
    ],
)
def test_unsupported_spaces(observations: Any, actions: Any, message: str) -> None:
    env = DummyVecEnv([lambda: Strange(observations, actions)])
    with pytest.raises((ValueError, AssertionError), match=message):
        EfficientZeroV2(MlpPolicy, env, device="cpu")


def test_images_without_bounds_are_refused() -> None:
    for high in (np.inf, 0.0):
        env = DummyVecEnv([lambda high=high: Strange(spaces.Box(-np.inf, high, (1, 8, 8)), spaces.Discrete(2))])  # type: ignore[misc]
        with pytest.raises(ValueError, match="upper bound of their space"):
            EfficientZeroV2("CnnPolicy", env, device="cpu")
    env = DummyVecEnv([lambda: Strange(spaces.Box(0, 255, (1, 8, 8), np.uint8), spaces.Discrete(2))])
    with pytest.raises(ValueError, match="batch_size of at least 2"):
        EfficientZeroV2("CnnPolicy", env, device="cpu", batch_size=1)


def test_small_images_are_refused() -> None:
    env = DummyVecEnv([lambda: Strange(spaces.Box(0, 255, (3, 3, 3), np.uint8), spaces.Discrete(2))])
    with pytest.raises(ValueError, match="too small"):
        EfficientZeroV2("CnnPolicy", env, device="cpu")


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = EfficientZeroV2("MlpPolicy", "CartPole-v1", seed=0, **SMALL).learn(30)
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    model.replay_buffer.rewards[:] = np.inf
    before = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(FloatingPointError, match="value_target of update 10 is not finite"):
        model.train(1, 8)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("env", "steps", "mark"), [("CartPole-v1", 2500, 195), ("Pendulum-v1", 4000, -300)])
def test_it_learns(env: str, steps: int, mark: float) -> None:
    scores = []
    for seed in range(3):
        gamma = 0.98 if env == "Pendulum-v1" else 0.997
        model = EfficientZeroV2("MlpPolicy", env, seed=seed, gamma=gamma, device="cpu").learn(steps)
        scores.append(evaluate_policy(model, make_vec_env(env, 10, seed=1000), 20)[0])
    assert sorted(scores)[1] >= mark
