"""Recorded frames are stacked as the environment shows them, whoever learns from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecTransposeImage

from sb3_ext import CQL, DQN, EfficientZeroV2, load_minari, make_eval_env, record
from sb3_ext.data import DatasetError, Episode, StackFrames, collect_episodes
from sb3_ext.data.checks import check_padding
from sb3_ext.data.envs import padding_shown_by
from sb3_ext.data.load import match_padding
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from sb3_ext.gail import GAIL, load_trajectories
from sb3_ext.gail import demonstrations as demonstrations_module
from sb3_ext.gail.demonstrations import Demonstrations
from sb3_ext.replay.frames import pack_frames
from tests.helpers import SMALL, TINY_CNN, Ramp

WANTED = {
    "zero": [[0, 0, 0, 100], [0, 0, 100, 101], [0, 100, 101, 102], [100, 101, 102, 103], [101, 102, 103, 104]],
    "reset": [[100] * 4, [100, 100, 100, 101], [100, 100, 101, 102], [100, 101, 102, 103], [101, 102, 103, 104]],
}
GAIL_SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "disc_batch_size": 16, "device": "cpu"}


def gymnasium_stack(padding_type: str, start: int | None = 100) -> gym.Env[Any, Any]:
    return FrameStackObservation(Ramp(start), 4, padding_type=padding_type)


ENVIRONMENTS: dict[str, tuple[str, Callable[[], VecEnv]]] = {
    "gymnasium, again": ("reset", lambda: DummyVecEnv([lambda: gymnasium_stack("reset")])),
    "gymnasium, zeros": ("zero", lambda: DummyVecEnv([lambda: gymnasium_stack("zero")])),
    "StackFrames, again": ("reset", lambda: DummyVecEnv([lambda: StackFrames(Ramp(), 4, "reset")])),
    "StackFrames, zeros": ("zero", lambda: DummyVecEnv([lambda: StackFrames(Ramp(), 4)])),
    "VecFrameStack": (
        "zero",
        lambda: VecTransposeImage(VecFrameStack(DummyVecEnv([lambda: ReshapeObservation(Ramp(), (36, 36, 1))]), 4)),
    ),
}


@pytest.fixture
def frames() -> minari.MinariDataset:
    """Two episodes of single frames."""
    return record(lambda _: 0, gym.make("Ramp-v0"), "ramp/frames-v0", n_episodes=2)


def stacks_dataset(padding_type: str) -> minari.MinariDataset:
    env = StackFrames(gym.make("Ramp-v0"), 4, padding_type)
    return record(lambda _: 0, env, f"ramp/{padding_type}-v0", n_episodes=2)


def one_pixel(stacks: Any) -> list[list[int]]:
    return np.asarray(stacks)[:, :, 0, 0].tolist()


def pretrained(dataset: Any, env: Any, **kwargs: Any) -> EfficientZeroV2:
    settings = {**SMALL, "policy_kwargs": TINY_CNN, "buffer_size": 100, "batch_size": 2, **kwargs}
    model = EfficientZeroV2("CnnPolicy", env, seed=0, **settings)
    return model.pretrain(dataset, 0)


@pytest.mark.parametrize("which", ENVIRONMENTS)
def test_all_stack_as_the_environment_shows(which: str, frames: minari.MinariDataset) -> None:
    padding_type, make = ENVIRONMENTS[which]
    venv = make()
    shown = [venv.reset()[0], *(venv.step(np.array([0]))[0][0].copy() for _ in range(4))]  # type: ignore[index]
    wanted = WANTED[padding_type]
    assert one_pixel(shown) == wanted

    buffer = load_minari(frames, device="cpu")
    match_padding(buffer, venv)
    batch = buffer._get_samples(np.arange(5))
    assert one_pixel(batch.observations) == wanted
    assert one_pixel(batch.next_observations)[:4] == wanted[1:]
    assert one_pixel(buffer._get_samples(np.arange(9, 14)).observations) == wanted  # the second episode
    assert buffer.info["padding_type"] == buffer.padding_type == padding_type
    match_padding(buffer, venv, fixed=True)

    found = Demonstrations(frames, venv.observation_space, venv.action_space, venv)
    now, _, after, _ = found.get(th.arange(5))
    assert one_pixel(now) == wanted
    assert one_pixel(after)[:4] == wanted[1:]
    assert one_pixel(found.get(th.arange(9, 14), next_observations=False)[0]) == wanted
    assert [one_pixel(t.obs)[:5] for t in load_trajectories(frames, venv)] == [wanted] * 2

    for optimize in (False, True):
        replay = pretrained(frames, venv, optimize_memory_usage=optimize).replay_buffer
        assert isinstance(replay, SequenceReplayBuffer)
        windows = replay.windows(np.array([0, 9]), np.ones(2, np.float32)).observations
        assert [one_pixel(window)[:5] for window in windows] == [wanted] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("padding_type", ["zero", "reset"])
def test_without_environment_an_argument_decides(padding_type: str, frames: minari.MinariDataset) -> None:
    for storage in ("ram", "mmap", "compressed", "device"):
        buffer = load_minari(frames, padding_type=padding_type, storage=storage, device="cpu")
        assert one_pixel(buffer._get_samples(np.arange(5)).observations) == WANTED[padding_type]
    venv = make_eval_env(frames, padding_type=padding_type)
    assert padding_shown_by(venv, 4) == {padding_type}
    check_padding("it", padding_type, venv, 4)


def test_the_default_is_zeros(frames: minari.MinariDataset) -> None:
    assert load_minari(frames, device="cpu").padding_type == "zero"
    assert padding_shown_by(make_eval_env(frames), 4) == {"zero"}
    venv = DummyVecEnv([lambda: gymnasium_stack("reset")])
    found = Demonstrations(frames, venv.observation_space, venv.action_space)
    assert one_pixel(found.get(th.arange(5))[0]) == WANTED["zero"]


def test_other_words_are_refused(frames: minari.MinariDataset) -> None:
    for load in (load_minari, make_eval_env):
        with pytest.raises(ValueError, match="must be one of zero, reset, not 'edge'"):
            load(frames, padding_type="edge")


@pytest.mark.parametrize(("recorded", "other"), [("zero", "reset"), ("reset", "zero")])
def test_recorded_stacks_decide_for_themselves(recorded: str, other: str) -> None:
    dataset = stacks_dataset(recorded)
    for given in (None, recorded):
        buffer = load_minari(dataset, padding_type=given, device="cpu")
        assert buffer.frames.shape == (1, 36, 36)
        assert one_pixel(buffer._get_samples(np.arange(5)).observations) == WANTED[recorded]
        assert padding_shown_by(make_eval_env(dataset, padding_type=given), 4) == {recorded}
    for load in (load_minari, make_eval_env):
        with pytest.raises(DatasetError, match=f"recorded with padding_type='{recorded}', padding_type='{other}' was"):
            load(dataset, padding_type=other)


def test_black_first_frames_leave_the_choice() -> None:
    env = StackFrames(gym.make("Ramp-v0", start=0), 4)
    dataset = record(lambda _: 0, env, "ramp/black-v0", n_episodes=2)
    for padding_type in ("zero", "reset"):
        assert load_minari(dataset, padding_type=padding_type, device="cpu").padding_type == padding_type


# what does not fit


@pytest.mark.parametrize(("ours", "other"), [("zero", "reset"), ("reset", "zero")])
def test_a_dataset_loaded_otherwise_is_refused(ours: str, other: str, frames: minari.MinariDataset) -> None:
    buffer = load_minari(frames, padding_type=ours, device="cpu")
    venv = DummyVecEnv([lambda: gymnasium_stack(other)])
    words = {"zero": "zeros", "reset": "the first frame again"}
    with pytest.raises(DatasetError) as caught:
        match_padding(buffer, venv, fixed=True)
    text = str(caught.value)
    assert text.startswith("ramp/frames-v0 begins an episode otherwise than the environment")
    assert f"the dataset's stacks have {words[ours]}" in text
    assert f"the environment's have {words[other]}" in text
    # each remedy
    assert f"StackFrames(env, 4, padding_type='{ours}')" in text
    match_padding(buffer, DummyVecEnv([lambda: StackFrames(Ramp(), 4, padding_type=ours)]), fixed=True)
    assert f"load_minari(..., padding_type='{other}')" in text
    match_padding(load_minari(frames, padding_type=other, device="cpu"), venv, fixed=True)


@pytest.mark.parametrize(("ours", "other"), [("zero", "reset"), ("reset", "zero")])
def test_recorded_stacks_that_begin_otherwise_are_refused(ours: str, other: str, frames: minari.MinariDataset) -> None:
    dataset = stacks_dataset(ours)
    episodes = collect_episodes(lambda _: 0, StackFrames(Ramp(), 4, ours), n_episodes=2)
    single = collect_episodes(lambda _: 0, Ramp(), n_episodes=2)

    def env(padding_type: str) -> VecEnv:
        return DummyVecEnv([lambda: StackFrames(Ramp(), 4, padding_type=padding_type)])

    uses: list[tuple[Callable[[Any, VecEnv], Any], Any, Any]] = [
        (lambda data, venv: match_padding(load_minari(data, device="cpu"), venv), dataset, frames),
        (lambda data, venv: GAIL("CnnPolicy", venv, data, **GAIL_SMALL), dataset, frames),
        (lambda data, venv: GAIL("CnnPolicy", venv, data, **GAIL_SMALL), episodes, single),
        (load_trajectories, dataset, frames),
        (pretrained, dataset, frames),
    ]
    for use, recorded, frame_by_frame in uses:
        with pytest.raises(DatasetError, match=f"{ours}.*{other}.*StackFrames.*, or record single frames"):
            use(recorded, env(other))
        use(recorded, env(ours))  # both remedies
        use(frame_by_frame, env(other))


def test_an_environment_that_shows_other_frames_warns(frames: minari.MinariDataset) -> None:
    venv = DummyVecEnv([lambda: gymnasium_stack(np.full((36, 36), 7, np.uint8))])  # type: ignore[arg-type]
    text = "stacks of ramp/frames-v0 have zeros, .* neither zeros nor .* first 3 observations of an episode differ"
    buffer = load_minari(frames, device="cpu")
    for fixed in (True, False):
        with pytest.warns(UserWarning, match=text):
            match_padding(buffer, venv, fixed=fixed)
    with pytest.warns(UserWarning, match=text):
        found = Demonstrations(frames, venv.observation_space, venv.action_space, venv)
    assert found.padding_type == "zero"
    with pytest.warns(UserWarning, match="stacks of ramp/reset-v0 have the first frame again"):
        Demonstrations(stacks_dataset("reset"), venv.observation_space, venv.action_space, venv)


def test_pieces_that_begin_within_an_episode_are_not_compared() -> None:
    """A replay buffer that has wrapped begins with a still scene, which looks like the first frame again."""
    env = StackFrames(Ramp(), 4)
    buffer = ReplayBuffer(12, env.observation_space, env.action_space, device="cpu", optimize_memory_usage=False)
    still = np.full((1, 4, 36, 36), 9, np.uint8)
    for step in range(15):
        buffer.add(still, still, np.array([[0]]), np.array([0.0]), np.array([step == 8]), [{}])
    venv = DummyVecEnv([lambda: env])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DatasetError, match="episode 1, begins an episode otherwise"):
            Demonstrations(buffer, venv.observation_space, venv.action_space, venv)
    buffer.dones[:] = 0
    assert len(Demonstrations(buffer, venv.observation_space, venv.action_space, venv).trajectories) == 1


def test_four_channels_that_are_no_stack_are_not_compared() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 4, 36, 36), np.uint8)
    episode = Episode(pack_frames(pictures), np.zeros(19, np.int64), np.zeros(19), True, None)
    venv = DummyVecEnv([lambda: StackFrames(Ramp(), 4, "reset")])
    found = Demonstrations([episode], venv.observation_space, venv.action_space, venv)
    assert found.n_frames == 1
    assert venv.get_attr("resets") == [0]


# looking changes nothing


def test_a_seeded_run_is_the_same_whether_or_not_the_environment_was_looked_at(
    frames: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> np.ndarray:
        venv = DummyVecEnv([lambda: Monitor(gymnasium_stack("reset", start=None))])
        venv.seed(5)
        model = GAIL("CnnPolicy", venv, frames, policy_kwargs={"normalize_images": True}, seed=0, **GAIL_SMALL)
        model.learn(32)
        return th.cat([p.detach().flatten() for p in model.policy.parameters()]).numpy()

    looked = run()
    monkeypatch.setattr(demonstrations_module, "padding_shown_by", lambda *_: frozenset({"reset"}))
    np.testing.assert_array_equal(looked, run())


def test_gail_follows_the_environment_it_gets(frames: minari.MinariDataset, tmp_path: Any) -> None:
    model = GAIL("CnnPolicy", DummyVecEnv([lambda: gymnasium_stack("zero")]), frames, seed=0, **GAIL_SMALL)
    model.save(tmp_path / "model")
    loaded = GAIL.load(tmp_path / "model", device="cpu")
    loaded.set_demonstrations(frames)
    demonstrations = loaded._demonstrations
    assert demonstrations is not None
    assert demonstrations.padding_type == "zero"
    loaded.set_env(DummyVecEnv([lambda: gymnasium_stack("reset")]))
    assert demonstrations.padding_type == "reset"
    loaded.set_env(DummyVecEnv([lambda: gymnasium_stack("zero")]), force_reset=False)
    assert demonstrations.padding_type == "reset"


def test_looking_within_an_episode_begins_a_new_one(frames: minari.MinariDataset) -> None:
    env = DummyVecEnv([lambda: gymnasium_stack("reset")])
    model = GAIL("CnnPolicy", env, frames, seed=0, **GAIL_SMALL).learn(32)
    assert env.get_attr("steps") == [32 % 9]
    model.set_demonstrations(frames)
    assert model._last_obs is None
    model.learn(32, reset_num_timesteps=False)
    assert env.get_attr("steps") == [32 % 9]  # counted from a new episode; 64 % 9 is 1
    other = pretrained(frames, env, learning_starts=0, gradient_steps=0).learn(4)
    assert other._last_obs is not None
    other.pretrain(frames, 0)
    assert other._last_obs is None


TINY: dict[str, Any] = {"seed": 0, "device": "cpu", "batch_size": 4, "policy_kwargs": {"n_quantiles": 5}}


def stacked(padding_type: str) -> VecEnv:
    return DummyVecEnv([lambda: StackFrames(Ramp(), 4, padding_type)])


@pytest.mark.parametrize(("shown", "other"), [("zero", "reset"), ("reset", "zero")])
def test_cql_follows_its_environment_until_it_has_learnt(
    shown: str, other: str, frames: minari.MinariDataset, tmp_path: Any
) -> None:
    model = CQL("CnnPolicy", frames, env=stacked(shown), **TINY)
    assert model.dataset_info["padding_type"] == shown
    np.testing.assert_array_equal(
        model.replay_buffer._get_samples(np.array([0])).observations[0], stacked(shown).reset()[0]
    )
    given = {"dataset_kwargs": {"padding_type": other}}
    with pytest.raises(DatasetError, match=f"{other}.*{shown}|{shown}.*{other}"):
        CQL("CnnPolicy", frames, env=stacked(shown), **TINY, **given)
    model.set_env(stacked(other))  # nothing is learnt yet
    assert model.replay_buffer.padding_type == other
    model.learn(2)
    with pytest.raises(DatasetError, match="padding_type"):
        model.set_env(stacked(shown))
    model.save(tmp_path / "model")
    loaded = CQL.load(tmp_path / "model", device="cpu")
    loaded.set_dataset(frames)
    assert loaded.replay_buffer.padding_type == other
    model.set_env(stacked(other))
    model.learn_online(8)


@pytest.mark.parametrize("padding_type", ["zero", "reset"])
def test_a_model_is_recorded_with_the_stacks_that_it_knows(padding_type: str, frames: minari.MinariDataset) -> None:
    seen: list[Any] = []
    given = {"dataset_kwargs": {"padding_type": padding_type}}
    offline = CQL("CnnPolicy", frames, **TINY, **given)
    online = DQN("CnnPolicy", stacked(padding_type), buffer_size=10, device="cpu")
    for model in (offline, online):
        predict = model.predict

        def watched(observation: Any, predict: Any = predict, **kwargs: Any) -> Any:
            seen.append(observation)
            return predict(observation, **kwargs)

        model.predict = watched  # type: ignore[method-assign]
        collect_episodes(model, Ramp(), n_episodes=1)
        first = [0, 0, 0, 100] if padding_type == "zero" else [100] * 4
        assert seen[0][:, 0, 0].tolist() == first
        seen.clear()
