"""Prioritized replay: what is drawn, how it is weighted, and that every stored transition comes back as it was."""

import contextlib
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ext import CQL, DQN, QRDQN, PrioritizedReplayBuffer, make_eval_env
from sb3_ext.cql.mixed import MixedReplayBuffer
from sb3_ext.replay.priorities import Priorities
from tests.reference import ReferencePER, stack_at

VECTOR = spaces.Box(-10, 10, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (4, 6, 5), np.uint8)
RGB = spaces.Box(0, 255, (6, 6, 5), np.uint8)
DICT = spaces.Dict({"vector": VECTOR, "image": spaces.Box(0, 255, (3, 6, 5), np.uint8)})


# ----------------------------------------------------------------------------------------------------------- priorities


def test_indices_and_weights_equal_the_reference() -> None:
    ours, reference = Priorities(40, alpha=0.7, beta=0.5, eps=0.01, seed=3), ReferencePER(0.7, 0.5, 0.01)
    rng = np.random.default_rng(0)
    draws = np.random.default_rng(3)
    for start in range(0, 40, 10):
        ours.activate(np.arange(start, start + 10))
        for _ in range(10):
            reference.add()
        for _ in range(20):
            indices, weights = ours.draw(16)
            expected, expected_weights = reference.sample(draws.random(16))
            assert indices.tolist() == expected
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
            errors = rng.standard_cauchy(16)
            ours.update(indices, errors)
            reference.update(expected, errors)


def test_a_new_item_has_the_largest_priority_and_beta_anneals() -> None:
    priorities = Priorities(4, alpha=1.0, beta=0.4, eps=1e-3, seed=0)
    priorities.activate([0])
    priorities.update([0], [-5.0])
    priorities.update([0], [0.1])
    priorities.activate([1, 2])
    np.testing.assert_allclose(priorities.tree.leaves, [0.101, 5.001, 5.001, 0])
    for remaining, beta in ((1.0, 0.4), (0.5, 0.7), (0.0, 1.0)):
        priorities.set_progress(remaining)
        assert priorities.current_beta == pytest.approx(beta)
    scheduled = Priorities(4, beta=lambda remaining: 0.9 - 0.2 * remaining)
    scheduled.set_progress(0.5)
    assert scheduled.current_beta == pytest.approx(0.8)


@pytest.mark.parametrize("rank_based", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_errors_that_are_not_finite(bad: float, rank_based: bool) -> None:
    priorities = Priorities(10, rank_based=rank_based)
    priorities.activate(np.arange(10))
    before = priorities.tree.leaves.tolist()
    with pytest.raises(ValueError, match="index 7 is"):
        priorities.update([2, 7], [1.0, bad])
    assert priorities.tree.leaves.tolist() == before
    assert priorities.max_priority == 1


def test_tiny_and_huge_errors() -> None:
    priorities = Priorities(4, alpha=1.0, beta=1.0, eps=1e-300, seed=0)
    priorities.activate(np.arange(4))
    priorities.update(np.arange(4), [0.0, 5e-324, 1e30, 1e-5])
    indices, weights = priorities.draw(100)
    assert (indices == 2).all()
    assert (weights == 1).all()


def test_full_correction_makes_weighted_means_unbiased() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(1000) < 0.1, 10.0, 0.0)
    priorities = Priorities(1000, alpha=0.8, beta=1.0, seed=0)
    priorities.activate(np.arange(1000))
    priorities.update(np.arange(1000), values + 0.1)
    indices, weights = priorities.draw(200_000)
    assert values[indices].mean() > 2 * values.mean()
    assert np.average(values[indices], weights=weights) == pytest.approx(values.mean(), rel=0.02)


def test_ranks() -> None:
    errors = np.append([0.3, 8.0, 0.1, 1e9, 2.0], np.zeros(45))
    priorities = Priorities(200, alpha=0.7, rank_based=True, seed=0)
    priorities.activate(np.arange(50))
    priorities.update(np.arange(50), errors)  # sorted now
    np.testing.assert_allclose(priorities.tree.leaves[:5], np.array([4, 2, 5, 1, 3.0]) ** -0.7)
    priorities.update([2], [5.0])  # between 8 and 2 of the last sorting; not sorted yet
    np.testing.assert_allclose(priorities.tree.leaves[:5], np.array([4, 2, 3, 1, 3.0]) ** -0.7)
    priorities.deactivate([3])
    priorities.update([2] * 5, [5.0] * 5)  # more than a tenth of the items changed: sorted
    np.testing.assert_allclose(priorities.tree.leaves[:5], [0.25**0.7, 1, 0.5**0.7, 0, (1 / 3) ** 0.7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha must be"),
        ({"beta": 1.5}, "beta must be between 0 and 1"),
        ({"final_beta": -1.0}, "final_beta must be between 0 and 1"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"n_steps": 0}, "n_steps must be between 1 and the 50"),
        ({"n_steps": 51}, "n_steps must be between 1 and the 50"),
        ({"optimize_memory_usage": True, "frame_stack": 2}, "no such stacks"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrioritizedReplayBuffer(50, VECTOR, spaces.Discrete(2), **arguments)


def test_frames_need_a_box() -> None:
    with pytest.raises(ValueError, match="needs Box observations"):
        PrioritizedReplayBuffer(50, DICT, spaces.Discrete(2), optimize_memory_usage=True)


# --------------------------------------------------------------------------------------------------------------- buffer


class Step(NamedTuple):
    obs: Any
    action: int
    reward: float
    next_obs: Any
    done: bool
    timeout: bool
    ends: bool


class Player:
    """An environment's stream of transitions: random episodes, some cut by a time limit, some abandoned."""

    def __init__(self, space: spaces.Space[Any], frame_stack: int, longest: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.space, self.frame_stack, self.longest = space, frame_stack, longest
        self.space.seed(seed)
        self.log: list[Step] = []
        self.start()

    def frame(self) -> Any:
        sample = self.space.sample()
        return sample[: len(sample) // self.frame_stack] if isinstance(sample, np.ndarray) else sample

    def start(self) -> None:
        self.frames = [self.frame()]
        self.left = int(self.rng.integers(1, self.longest))
        self.zeros = bool(self.rng.integers(2))

    def observe(self) -> Any:
        if isinstance(self.space, spaces.Dict):
            return self.frames[-1]
        return stack_at(self.frames, len(self.frames) - 1, self.frame_stack, self.zeros)

    def step(self) -> Step:
        obs = self.observe()
        self.frames.append(self.frame())
        self.left -= 1
        over = self.left == 0
        kind = self.rng.integers(3)  # terminated, cut by the time limit, or simply left by whoever drives it
        step = Step(
            obs, int(self.rng.integers(2)), float(self.rng.normal()), self.observe(),
            over and kind < 2, over and kind == 1, over,
        )  # fmt: skip
        self.log.append(step)
        if over:
            self.start()
        return step


def stacked(parts: list[Any]) -> Any:
    return {k: np.stack([p[k] for p in parts]) for k in parts[0]} if isinstance(parts[0], dict) else np.stack(parts)


def play(buffer: Any, players: list[Player], steps: int) -> None:
    for _ in range(steps):
        taken = [player.step() for player in players]
        buffer.add(
            stacked([s.obs for s in taken]),
            stacked([s.next_obs for s in taken]),
            np.array([s.action for s in taken]),
            np.array([s.reward for s in taken], np.float32),
            np.array([s.done for s in taken]),
            [{"TimeLimit.truncated": s.timeout} for s in taken],
        )


def same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


def row(batch: Any, k: int) -> Any:
    return {key: part[k].numpy() for key, part in batch.items()} if isinstance(batch, dict) else batch[k].numpy()


KINDS = {
    "vector": (VECTOR, 1, {}),
    "vector-once": (VECTOR, 1, {"optimize_memory_usage": True}),
    "dict": (DICT, 1, {}),
    "image": (IMAGE, 4, {}),
    "image-once": (IMAGE, 4, {"optimize_memory_usage": True}),
    "rgb-once": (RGB, 2, {"optimize_memory_usage": True, "frame_stack": 2}),
}


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("longest", [2, 5, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_every_transition_comes_back(kind: str, longest: int, n_envs: int, n_steps: int) -> None:
    space, frame_stack, arguments = KINDS[kind]
    size, gamma = 60, 0.9
    buffer = PrioritizedReplayBuffer(
        size * n_envs, space, spaces.Discrete(2), n_envs=n_envs, n_steps=n_steps, gamma=gamma, device="cpu", **arguments
    )
    players = [Player(space, frame_stack, longest, seed) for seed in range(n_envs)]
    for steps in (1, 1, 1, 40, 30, 100):  # before and after it is full, at many places in the ring
        play(buffer, players, steps)
        added = len(players[0].log)
        expired = 0
        for env, player in enumerate(players):
            for age in range(min(size, added)):
                when = added - 1 - age
                index = when % size * n_envs + env
                window = [player.log[when]]
                while not window[-1].ends and len(window) < n_steps and when + len(window) < added:
                    window.append(player.log[when + len(window)])
                # "left" episodes are noticed at the next step, unless nothing depends on them
                noticed = window[-1].ends and (window[-1].done or when + len(window) < added)
                complete = len(window) == n_steps or noticed
                active = buffer.priorities.tree[index] > 0
                if not active:
                    expired += complete
                    assert not complete or (arguments and age >= size // (frame_stack + 1))
                    continue
                assert complete
                batch = buffer._gather(np.array([index]), np.ones(1, np.float32), None)
                same(row(batch.observations, 0), window[0].obs)
                same(row(batch.next_observations, 0), window[-1].next_obs)
                assert batch.actions.item() == window[0].action
                expected = sum(gamma**i * s.reward for i, s in enumerate(window))
                assert batch.rewards.item() == pytest.approx(expected, abs=1e-5)
                assert batch.dones.item() == (window[-1].done and not window[-1].timeout)
                if n_steps > 1:
                    assert batch.discounts is not None
                    assert batch.discounts.item() == pytest.approx(gamma ** len(window))
                else:
                    assert batch.discounts is None
        if longest == 400:
            assert expired == 0


@pytest.mark.parametrize("n_steps", [1, 3])
def test_equals_sb3_on_the_same_indices(n_steps: int) -> None:
    space = VECTOR
    arguments = {"n_steps": n_steps, "gamma": 0.95} if n_steps > 1 else {}
    theirs = (NStepReplayBuffer if n_steps > 1 else ReplayBuffer)(50, space, spaces.Discrete(2), "cpu", **arguments)
    ours = PrioritizedReplayBuffer(50, space, spaces.Discrete(2), "cpu", **arguments)
    normalise = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), clip_obs=1.0)
    normalise.obs_rms.mean, normalise.obs_rms.var = np.full(3, 0.5), np.full(3, 4.0)
    normalise.ret_rms.var = np.float64(9.0)

    class Finished(Player):  # SB3's buffer does not notice abandoned episodes
        def step(self) -> Step:
            step = super().step()
            self.log[-1] = step._replace(done=step.ends)
            return self.log[-1]

    for buffer in (theirs, ours):
        play(buffer, [Finished(space, 1, 12, 0)], 75)
    active = np.flatnonzero(ours.priorities.tree.leaves)
    assert len(active) >= 50 - n_steps
    a, b = theirs._get_samples(active, normalise), ours._gather(active, np.ones(len(active), np.float32), normalise)
    for field in a._fields:
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        if x is not None:
            th.testing.assert_close(x, y.to(x.dtype), rtol=1e-6, atol=1e-6)


def test_observations_that_are_no_stacks_are_refused() -> None:
    buffer = PrioritizedReplayBuffer(50, IMAGE, spaces.Discrete(2), optimize_memory_usage=True)
    with pytest.raises(ValueError, match="moved on by one frame"):
        play(buffer, [Player(IMAGE, 1, 10, 0)], 5)
    assert buffer.size() == 0


def test_frames_take_a_seventh_of_the_memory() -> None:
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = PrioritizedReplayBuffer(5000, space, spaces.Discrete(4), optimize_memory_usage=True)
    assert len(pickle.dumps(buffer)) / 5000 < 7300


def test_memory_above_uniform() -> None:
    uniform = ReplayBuffer(10_000, VECTOR, spaces.Discrete(2))
    ours = PrioritizedReplayBuffer(10_000, VECTOR, spaces.Discrete(2))
    arrays = (ours.actions, ours.rewards, ours.dones, ours._ends, ours.priorities.tree._tree)
    used = sum(a.nbytes for a in arrays) + ours.store.observations.nbytes + ours.store.next_observations.nbytes
    theirs = (uniform.observations, uniform.next_observations, uniform.actions, uniform.rewards, uniform.dones)
    assert (used - sum(a.nbytes for a in (*theirs, uniform.timeouts))) / 10_000 < 25


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets(kind: str) -> None:
    space, frame_stack, arguments = KINDS[kind]
    once, twice = (
        PrioritizedReplayBuffer(60, space, spaces.Discrete(2), n_steps=2, seed=0, **arguments) for _ in range(2)
    )
    play(twice, [Player(space, frame_stack, 10, 0)], 35)
    twice.reset()
    assert twice.size() == 0
    with pytest.raises(ValueError, match="all priorities are 0"):
        twice.sample(1)
    for buffer in (once, twice):
        play(buffer, [Player(space, frame_stack, 2, 1)], 60)
    np.testing.assert_array_equal(once.priorities.tree.leaves, twice.priorities.tree.leaves)
    drawable = np.flatnonzero(once.priorities.tree.leaves)
    wanted, found = (x._gather(drawable, np.ones(len(drawable), np.float32), None) for x in (once, twice))
    for k in range(len(drawable)):
        same(row(wanted.observations, k), row(found.observations, k))
        same(row(wanted.next_observations, k), row(found.next_observations, k))


@pytest.mark.parametrize("optimize", [False, True])
def test_observations_of_another_dtype_go_on(optimize: bool) -> None:
    buffer = PrioritizedReplayBuffer(
        50,
        spaces.Box(-1, 1, (2,), np.float32),
        spaces.Discrete(2),
        n_steps=3,
        gamma=0.9,
        optimize_memory_usage=optimize,
    )
    states = np.random.default_rng(0).random((11, 1, 2))  # float64: as float32 they are others
    for now, after in itertools.pairwise(states):
        buffer.add(now, after, np.zeros(1), np.ones(1), np.zeros(1), [{}])
    np.testing.assert_allclose(buffer.sample(20).discounts.numpy(), 0.9**3, rtol=1e-6)


def test_ranks_are_looked_up_from_the_beginning() -> None:
    priorities = Priorities(1_000_000, rank_based=True, seed=0)
    priorities.activate_range(0, 100)
    for _ in range(10):
        priorities.update(np.arange(100), np.arange(100.0))
    mass = priorities.tree.leaves[:100]
    assert len(set(mass.tolist())) == 100
    assert (np.diff(mass) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank_based", [False, True])
def test_pickled_buffers_go_on_alike(kind: str, rank_based: bool) -> None:
    space, frame_stack, arguments = KINDS[kind]
    buffer = PrioritizedReplayBuffer(60, space, spaces.Discrete(2), n_steps=2, rank_based=rank_based, **arguments)
    players = [Player(space, frame_stack, 9, 0)]
    play(buffer, players, 80)
    batch = buffer.sample(16)
    buffer.update_priorities(batch.indices, np.arange(16.0))
    copies = [pickle.loads(pickle.dumps((buffer, players))) for _ in range(2)]
    drawn = []
    for copy, its_players in copies:
        for _ in range(3):
            play(copy, its_players, 7)
            batch = copy.sample(16)
            copy.update_priorities(batch.indices, batch.rewards.numpy())
        drawn.append((batch.indices.tolist(), batch.rewards.tolist()))
    assert drawn[0] == drawn[1]


# ----------------------------------------------------------------------------------------------------------- algorithms

PER: dict[str, Any] = {"replay_buffer_class": PrioritizedReplayBuffer, "learning_starts": 50, "seed": 0}


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("kind", [DQN, QRDQN])
def test_weights_reach_the_gradient_and_errors_the_buffer(kind: Any, n_steps: int) -> None:
    model = kind(
        "MlpPolicy", "CartPole-v1", n_steps=n_steps, learning_rate=1.0, batch_size=8, **PER,
        replay_buffer_kwargs={"eps": 0.5, "alpha": 1.0},
        policy_kwargs={"optimizer_class": th.optim.SGD, "optimizer_kwargs": {}}, max_grad_norm=1e9,
    )  # fmt: skip
    model.learn(50)
    buffer = model.replay_buffer
    assert buffer.n_steps == n_steps
    assert buffer.gamma == model.gamma
    # very unequal priorities, so that weights differ
    indices = np.flatnonzero(buffer.priorities.tree.leaves)
    buffer.update_priorities(indices, np.geomspace(0.01, 100, len(indices)))
    model._current_progress_remaining = 0.25
    before = [p.detach().clone() for p in model.policy.parameters()]
    twin = pickle.loads(pickle.dumps(buffer))
    twin.set_progress(0.25)
    batch = twin.sample(8)
    assert batch.weights.min() < 0.5 * batch.weights.max() == 0.5
    output = model.compute_loss(batch)
    gradients = th.autograd.grad(
        (batch.weights.squeeze(1) * output.loss).mean(), list(model.policy.parameters()), allow_unused=True
    )
    model._logger = sb3.common.logger.configure(None, [])
    model.train(1, 8)
    for old, new, gradient in zip(before, model.policy.parameters(), gradients, strict=True):
        th.testing.assert_close(new.detach(), old if gradient is None else old - gradient)
    np.testing.assert_allclose(buffer.priorities.tree[batch.indices], output.td_error.abs().numpy() + 0.5, rtol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"optimize_memory_usage": True}, {"n_steps": 3}])
def test_our_algorithms_learn_without_a_warning_and_anneal_beta(arguments: dict[str, Any]) -> None:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DQN("MlpPolicy", env, **PER, **arguments).learn(200)
    assert model.replay_buffer.priorities.current_beta == pytest.approx(1, abs=0.05)
    assert len(np.unique(model.replay_buffer.priorities.tree.leaves)) > 20


def test_sb3s_own_dqn_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"stays uniform .* Use sb3_ext.DQN or QRDQN"):
        sb3.DQN("MlpPolicy", "CartPole-v1", **PER).learn(200)


def test_atari_frames_once() -> None:
    from sb3_ext.data import StackFrames, make_atari_env

    arguments = {**PER, "buffer_size": 500, "optimize_memory_usage": True, "policy_kwargs": {"net_arch": []}}
    model = DQN("CnnPolicy", StackFrames(make_atari_env("Breakout")), train_freq=30, **arguments).learn(200)
    assert model.replay_buffer.store.frames.nbytes < 1.1 * 500 * 84 * 84


def test_learning_again_cuts_the_sequence_where_it_was_left() -> None:
    env = gym.wrappers.TimeLimit(gym.make("CartPole-v1").unwrapped, 1000)
    model = DQN("MlpPolicy", env, n_steps=3, train_freq=1, optimize_memory_usage=True, **PER).learn(5)
    assert model.replay_buffer._pending.tolist() == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 warns that it truncates the last episode
        model.learn(5)
    # the environment was reset after the fifth step: an end that is no termination
    assert model.replay_buffer._ends[:6, 0].tolist() == [False] * 4 + [True, False]
    assert model.replay_buffer.dones[:6].sum() == 0
    assert (model.replay_buffer.priorities.tree.leaves[:5] > 0).all()


class StopAt(BaseCallback):
    """Stop after some steps, by the return value or by an error."""

    def __init__(self, step: int, error: bool) -> None:
        super().__init__()
        self.step, self.error = step, error

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step and self.error:
            raise KeyboardInterrupt
        return self.num_timesteps < self.step


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("once", [False, True])
def test_learning_on_after_a_stop_begins_anew(once: bool, error: bool) -> None:
    model = DQN("MlpPolicy", "CartPole-v1", optimize_memory_usage=once, n_steps=3, train_freq=1, **PER)
    with contextlib.suppress(KeyboardInterrupt):
        model.learn(20, callback=StopAt(5, error))
    assert model.replay_buffer.size() == 4  # SB3 asks callbacks before it stores a step
    model.learn(6, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert buffer._ends[:5, 0].tolist() == [False] * 3 + [True, False]
    before, after = buffer.store.take(np.arange(8), np.arange(8))
    assert np.abs(before[4]).max() < 0.05  # CartPole begins there
    assert np.abs(after - before).max() < 1.5
    assert not np.array_equal(after[3], before[4])


def test_sb3s_own_buffers_go_on_in_the_same_episode() -> None:
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=50, train_freq=1, seed=0)
    model.learn(20, callback=StopAt(5, False))
    assert model._last_obs is not None


def test_loaded_replay_buffers_fit_the_model(tmp_path: Path) -> None:
    model = DQN("MlpPolicy", "CartPole-v1", n_steps=3, **PER).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    other = DQN.load(tmp_path / "model", gamma=0.5)
    other.load_replay_buffer(tmp_path / "buffer")
    assert (other.replay_buffer.size(), other.replay_buffer.gamma) == (60, 0.5)
    longer = DQN.load(tmp_path / "model", n_steps=5)
    own = longer.replay_buffer
    with pytest.raises(ValueError, match="saved replay buffer has n_steps=3, the model 5"):
        longer.load_replay_buffer(tmp_path / "buffer")
    assert longer.replay_buffer is own


def test_loaded_models_have_todays_discount(tmp_path: Path) -> None:
    DQN("MlpPolicy", "CartPole-v1", n_steps=3, replay_buffer_kwargs={"alpha": 0.5}, **PER).save(tmp_path / "model")
    model = DQN.load(tmp_path / "model", gamma=0.5, n_steps=5)
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (5, 0.5)
    assert model.replay_buffer.priorities.alpha == 0.5
    assert model.replay_buffer_kwargs == {"alpha": 0.5}


def test_online_frames_of_cql_are_kept_once(breakout: minari.MinariDataset) -> None:
    model = CQL("CnnPolicy", breakout, policy_kwargs={"net_arch": [], "n_quantiles": 2}, buffer_size=200, seed=0)
    model.learn_online(20, env=make_eval_env(breakout), offline_fraction=0.5)
    mixed = model.replay_buffer
    assert isinstance(mixed, MixedReplayBuffer)
    assert isinstance(mixed.online, PrioritizedReplayBuffer)
    assert mixed.online.store.frames.nbytes < 1.2 * 200 * 84 * 84
    assert mixed.online.size() == 20
    assert mixed.sample(8).observations.shape == (8, 4, 84, 84)


def test_saving_and_loading(tmp_path: Path) -> None:
    model = DQN("MlpPolicy", "CartPole-v1", n_steps=2, **PER).learn(150)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    parameters = []
    for _ in range(2):
        loaded = DQN.load(tmp_path / "model", env=gym.make("CartPole-v1"))
        loaded.load_replay_buffer(tmp_path / "buffer")
        loaded._logger = sb3.common.logger.configure(None, [])
        loaded.train(20, 16)
        parameters.append(th.nn.utils.parameters_to_vector(loaded.policy.parameters()))
    assert th.equal(*parameters)


def test_offline_with_priorities(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    settings = {"dataset_kwargs": {"prioritized": {"alpha": 0.8}}, "seed": 1, "policy_kwargs": {"n_quantiles": 10}}
    whole = CQL("MlpPolicy", cartpole, **settings).learn(60)
    assert len(np.unique(whole.replay_buffer.priorities.tree.leaves)) > 20
    half = CQL("MlpPolicy", cartpole, **settings)
    half.learn(30)
    half.save(tmp_path / "half")
    resumed = CQL.load(tmp_path / "half")
    resumed.set_dataset(cartpole)
    resumed.learn(30, reset_num_timesteps=False)
    # beta follows the progress of each call of learn(), so only the way there may differ: the data drawn first does not
    assert resumed.replay_buffer.priorities.tree.total != half.replay_buffer.priorities.tree.total
    assert resumed.num_timesteps == 60

    whole.learn_online(80, env=make_eval_env(cartpole), offline_fraction=0.5)
    mixed = whole.replay_buffer
    assert isinstance(mixed, MixedReplayBuffer)
    batch = mixed.sample(20)
    assert (batch.indices < mixed.offline.buffer_size).sum() == 10
    mixed.update_priorities(batch.indices, np.full(20, 123.0))
    eps = mixed.offline.priorities.eps
    assert mixed.offline.priorities.tree[batch.indices[0]] == pytest.approx((123 + eps) ** 0.8)
    assert mixed.online.priorities.tree[batch.indices[-1] - mixed.offline.buffer_size] == pytest.approx(
        (123 + eps) ** 0.8
    )
