"""Recorded kernels and frames on the device; what needs a GPU is skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext import CQL, FQE, ContinuousCQL, EfficientZeroV2, OfflineEvalCallback, load_minari, record
from sb3_ext.cuda_graphs import GraphedLoss
from sb3_ext.data import StackFrames, make_atari_env
from sb3_ext.efficientzero.gaussian import root_samples
from sb3_ext.efficientzero.networks import start_parts
from sb3_ext.efficientzero.policies import CnnPolicy, Roots
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from sb3_ext.losses import LossOutput
from sb3_ext.search import gpu as device_search
from sb3_ext.search.gpu import DeviceSearch, padded
from sb3_ext.search.gumbel import gumbel_search

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]

TINY = {"network_kwargs": {"channels": 8, "head_channels": 4, "head_size": 8, "projection_size": 16, "prefix_size": 8}}


def breakout_env(n_envs: int = 2) -> VecEnv:
    return make_vec_env(lambda: StackFrames(make_atari_env("Breakout"), 4), n_envs, seed=0)


def image_model(**kwargs: Any) -> EfficientZeroV2:
    network = {**TINY["network_kwargs"], "value_prefix": kwargs.pop("value_prefix", True)}
    arguments: dict[str, Any] = {
        "learning_starts": 40, "batch_size": 8, "num_simulations": 4, "buffer_size": 500, "seed": 0,
        "optimize_memory_usage": True, "policy_kwargs": {"network_kwargs": network}, "device": "cuda",
        "gradient_steps": 0, **kwargs,
    }  # fmt: skip
    return EfficientZeroV2("CnnPolicy", breakout_env(), **arguments)


def randomize(policy: Any) -> None:
    """Heads begin at zero, where everything is equal."""
    th.manual_seed(1)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * th.randn_like(parameter))


def backward(out: LossOutput, weights: th.Tensor | None = None) -> None:
    """As the gradient loop does it."""
    if out.backward is not None:
        out.backward(weights)
    else:
        (out.loss if weights is None else out.loss * weights).mean().backward()


# --- frames on the device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [60, 200])
def test_windows_on_the_device_equal_those_of_the_store(device: str, capacity: int) -> None:
    rng = np.random.default_rng(0)
    space, actions = spaces.Box(0, 255, (4, 6, 5), np.uint8), spaces.Discrete(3)
    buffer = SequenceReplayBuffer(
        capacity, space, actions, device, n_envs=2, optimize_memory_usage=True, length=5, frames_on_device=True
    )
    observation = np.zeros((2, 4, 6, 5), np.uint8)
    for step in range(150):  # the smaller ring begins anew several times
        frame = rng.integers(256, size=(2, 1, 6, 5)).astype(np.uint8)
        following = np.concatenate([observation[:, 1:], frame], axis=1)
        dones = rng.random(2) < 0.1
        buffer.add(observation, following, np.zeros((2, 1)), np.zeros(2), dones, [{}, {}])
        observation = np.where(dones[:, None, None, None], np.uint8(step), following)
        if step % 40 == 30:  # also between the steps, so that the copy grows in parts
            indices, weights = buffer.sample(20).indices, np.ones(20, np.float32)
            found = buffer.windows(indices, weights).observations
            assert isinstance(found, th.Tensor)
            assert found.device.type == device
            buffer.frames_on_device = False
            np.testing.assert_array_equal(found.cpu().numpy(), buffer.windows(indices, weights).observations)
            buffer.frames_on_device = True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_steps", [1, 3])
def test_batches_of_frames_on_the_device_equal_those_in_ram(
    device: str, n_steps: int, breakout: minari.MinariDataset
) -> None:
    buffers = [
        load_minari(breakout, storage=storage, device=device, seed=0, n_steps=n_steps) for storage in ("device", "ram")
    ]
    assert buffers[0].frames.take(np.arange(3)).device.type == device
    for _ in range(5):  # with stacks from before the first frame of an episode among them
        for ours, theirs in zip(*(buffer.sample(200) for buffer in buffers), strict=True):
            if theirs is not None:
                th.testing.assert_close(ours, theirs)


# --- searches that see row numbers only


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("actions", [spaces.Discrete(5), spaces.Box(-1, 1, (2,))])
@pytest.mark.parametrize("value_prefix", [False, True])
@pytest.mark.parametrize("split", [512, 8])
def test_row_numbers_stand_for_latent_states(
    device: str, actions: spaces.Space[Any], value_prefix: bool, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(actions, spaces.Box) and split == 8:
        pytest.skip("each lane draws its own samples")
    monkeypatch.setattr(device_search, "_SPLIT", split)
    policy = CnnPolicy(
        spaces.Box(0, 255, (4, 12, 12), np.uint8), actions, lambda _: 1e-3, num_sampled_actions=5,
        network_kwargs={**TINY["network_kwargs"], "value_prefix": value_prefix},
    ).to(device)  # fmt: skip
    randomize(policy)
    policy.set_training_mode(False)
    roots = 11 if policy.discrete else 16  # for fewer than 16, others samples would be drawn
    latent, values, logits = policy.roots(th.randint(256, (roots, 4, 12, 12), dtype=th.uint8, device=device))
    parts: tuple[th.Tensor, ...] = (latent,)
    if not policy.discrete:
        parts, logits = (latent, root_samples(logits, 5, noise=True)), th.zeros(roots, 5)
    if value_prefix:
        parts = (*parts, *start_parts(policy.network.reward_head, roots))
    search: dict[str, Any] = {"num_simulations": 12, "max_num_considered_actions": 4, "gamma": 0.9}
    on_device, found = DeviceSearch(policy._step), []
    on_device.start(parts, 12)
    for _ in range(2):  # the second search must not see the first one's states
        th.manual_seed(0)
        found.append(gumbel_search(logits, values, parts if len(parts) > 1 else parts[0], policy._recurrent, **search))
        th.manual_seed(0)
        found.append(gumbel_search(logits, values, None, on_device.start(parts, 12), **search))
    wanted = found[0]
    for out in found[1:]:
        np.testing.assert_allclose(out.root_values, wanted.root_values, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(out.improved_policy, wanted.improved_policy, rtol=1e-2, atol=1e-4)
        np.testing.assert_array_equal(out.visits.sum(1), 12)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (200, 256), (256, 256), (257, 512), (1536, 1536)])
def test_few_sizes_serve_all(rows: int, size: int) -> None:
    assert padded(rows) == size


# --- on a GPU


@needs_gpu
@pytest.mark.parametrize("value_prefix", [True, False])
def test_graphed_search_equals_the_eager_one(value_prefix: bool) -> None:
    model = image_model(value_prefix=value_prefix)
    policy = model.policy
    randomize(policy)
    th.manual_seed(0)
    for batch in (16, 2, 11):  # eleven roots take the places of sixteen
        observations = th.randint(256, (batch, 4, 84, 84), dtype=th.uint8, device="cuda")
        roots = policy.roots(observations)
        policy.cuda_graphs = False
        wanted = policy.plan(roots, noise=False)[0]
        policy.cuda_graphs = True
        for _ in range(3):
            found = policy.plan(roots, noise=False)[0]
        np.testing.assert_allclose(found.root_values, wanted.root_values, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.improved_policy, wanted.improved_policy, rtol=1e-2, atol=1e-3)
    assert True in policy._device_searches
    assert set(policy._device_searches[True].lanes) == {(16, 4, 0), (2, 4, 0)}


@needs_gpu
def test_graphed_search_follows_the_parameters() -> None:
    policy = image_model().policy
    randomize(policy)
    observations = th.randint(256, (16, 4, 84, 84), dtype=th.uint8, device="cuda")
    for _ in range(3):
        before = policy.plan(policy.roots(observations), noise=False)[0].root_values
    latent = policy.roots(observations).latent
    randomize(policy)
    roots = Roots(latent, *policy.roots(observations)[1:])
    after = policy.plan(roots, noise=False)[0].root_values
    policy.cuda_graphs = False
    np.testing.assert_allclose(after, policy.plan(roots, noise=False)[0].root_values, rtol=1e-3, atol=1e-3)
    assert np.abs(after - before).max() > 1e-3


@needs_gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_graphed_loss_equals_the_eager_one(bf16: bool) -> None:
    """Loss, gradients and running means; shifts are off, because they are drawn anew."""
    model = image_model(image_shift=0, bf16=bf16)
    model.learn(100)
    model.policy.set_training_mode(True)
    randomize(model.policy)
    batch = model.replay_buffer.sample(8)
    targets, weights = model.reanalyze(batch), th.rand(8, device="cuda")
    model.reanalyze = lambda batch: targets  # type: ignore[method-assign]
    state = {name: x.clone() for name, x in model.policy.state_dict().items()}

    def run() -> tuple[Any, list[th.Tensor], dict[str, th.Tensor]]:
        model.policy.load_state_dict(state)
        model.policy.optimizer.zero_grad()
        out = model.compute_loss(batch)
        backward(out, weights)
        gradients = [p.grad.clone() for p in model.policy.parameters() if p.grad is not None]
        return out, gradients, {name: x.clone() for name, x in model.policy.state_dict().items()}

    model.cuda_graphs = False
    wanted, gradients, after = run()
    model.cuda_graphs = True
    for _ in range(4):
        found, ours, buffers = run()
    assert model.graphed_loss.graphs
    tolerance = {"rtol": 5e-2, "atol": 5e-3} if bf16 else {"rtol": 5e-3, "atol": 1e-4}
    th.testing.assert_close(found.loss, wanted.loss, **tolerance)
    th.testing.assert_close(found.td_error, wanted.td_error, **tolerance)
    assert found.metrics.keys() == wanted.metrics.keys()
    largest = max(g.abs().max().item() for g in gradients)
    for one, other in zip(ours, gradients, strict=True):
        assert (one - other).abs().max().item() < (0.1 if bf16 else 1e-2) * largest
    for name, value in after.items():
        th.testing.assert_close(buffers[name], value, **tolerance, msg=name)


@needs_gpu
def test_graphed_shifts_are_drawn_anew() -> None:
    model = image_model()
    model.learn(100)
    model.policy.set_training_mode(True)
    randomize(model.policy)
    batch = model.replay_buffer.sample(8)
    targets = model.reanalyze(batch)
    model.reanalyze = lambda batch: targets  # type: ignore[method-assign]
    losses = [model.compute_loss(batch).loss.mean().item() for _ in range(8)]
    assert len(set(losses[3:])) == 5


@needs_gpu
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_learns_saves_and_goes_on(env: str, tmp_path: Path) -> None:
    model = EfficientZeroV2("MlpPolicy", env, learning_starts=20, batch_size=16, num_simulations=4, seed=0,
                            device="cuda").learn(60)  # fmt: skip
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = EfficientZeroV2.load(tmp_path / "model", make_vec_env(env), device="cuda")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80
    on_cpu = EfficientZeroV2.load(tmp_path / "model", device="cpu")
    observation = np.zeros((1, *on_cpu.observation_space.shape), np.float32)
    ours, theirs = (m.policy.roots(th.as_tensor(observation, device=m.device)) for m in (on_cpu, model))
    np.testing.assert_allclose(np.asarray(ours.policy), theirs.policy.cpu().numpy(), rtol=1e-2, atol=1e-3)


@needs_gpu
def test_images_learn_with_frames_on_the_device(tmp_path: Path) -> None:
    model = image_model(gradient_steps=-1, bf16=True).learn(80)
    assert model.graphed_loss.graphs
    model.save_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(20, reset_num_timesteps=False)
    assert all(th.isfinite(p).all() for p in model.policy.parameters())


@needs_gpu
def test_graphed_offline_learning_equals_the_eager_one(breakout: minari.MinariDataset) -> None:
    found = []
    for cuda_graphs in (True, False):
        model = CQL("CnnPolicy", breakout, seed=0, device="cuda", batch_size=8, cuda_graphs=cuda_graphs).learn(30)
        assert bool(model._graphed_loss.graphs) == cuda_graphs
        found.append([p.detach().clone() for p in model.policy.parameters()])
    for one, other in zip(*found, strict=True):
        th.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize(
    "settings", [{}, {"calibrated": True, "n_steps": 2}, {"target_action_gap": 1.0, "bc_steps": 10}], ids=str
)
def test_graphed_continuous_learning_equals_the_eager_one(settings: dict[str, Any]) -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=50)
    data, found = record(None, env, "pendulum/graphed-v0", n_steps=200, overwrite=True), []
    for cuda_graphs in (True, False):
        model = ContinuousCQL(
            "MlpPolicy", data, seed=0, device="cuda", batch_size=32, cuda_graphs=cuda_graphs, **settings
        ).learn(30)
        assert bool(model._graphed_critic.graphs) == bool(model._graphed_actor.graphs) == cuda_graphs
        found.append([p.detach().clone() for p in model.policy.parameters()])
    for one, other in zip(*found, strict=True):
        th.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@needs_gpu
def test_a_graphed_loss_has_gradients_and_metrics() -> None:
    network = th.nn.Linear(2, 1, device="cuda")
    x = th.ones(4, 2, device="cuda")
    graphed = GraphedLoss(network, lambda x: LossOutput(network(x)[:, 0], x[:, 0], {"mean": network(x).mean()}))
    kept = []
    for _ in range(5):
        out = graphed(x)
        kept.append(out)  # an old graph that is alive must not matter
        network.zero_grad()
        backward(out)
        assert network.weight.grad.tolist() == [[1, 1]]
    assert graphed.graphs
    assert out.metrics["mean"].item() == pytest.approx(network(x).mean().item())


@needs_gpu
def test_every_learn_records_the_coefficients_of_then(breakout: minari.MinariDataset) -> None:
    model = CQL("CnnPolicy", breakout, seed=0, device="cuda", batch_size=8).learn(10)
    batch = model.replay_buffer.sample(8)
    before = model.compute_loss(batch).loss.clone()
    model.cql_alpha = 0.0
    th.testing.assert_close(model.compute_loss(batch).loss, before)  # within one learn() they are graphed
    model.learn(10, reset_num_timesteps=False)
    assert (model._loss(batch).loss - model.compute_loss(batch).loss).abs().max().item() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("other", DEVICES)
def test_offline_evaluation_on_another_device(device: str, other: str, cartpole: minari.MinariDataset) -> None:
    callback = OfflineEvalCallback(cartpole, eval_freq=3, fqe_steps=2, verbose=0)
    model = CQL("MlpPolicy", cartpole, device=device, seed=0).learn(3, callback=callback)
    assert all(np.isfinite(scores).all() for scores in callback.evaluations.values())
    assert np.isfinite(FQE("MlpPolicy", cartpole, model, device=other).learn(2).initial_value().mean)
