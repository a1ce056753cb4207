from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.dataset.minari_storage import MinariStorage
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.data import (
    DatasetError,
    Episode,
    EpisodeRecorder,
    StackFrames,
    collect_episodes,
    load_minari,
    make_atari_env,
    make_eval_env,
    record,
    write_dataset,
)
from sb3_ext.data.write import return_statistics
from sb3_ext.replay.frames import pack_frames


class Counting(gym.Env[np.ndarray, Any], gym.utils.RecordConstructorArgs):
    """Shows how often it was stepped; the action is the reward; ends after ``length`` steps."""

    action_space = spaces.Discrete(5)

    def __init__(self, length: int = 3, pictures: bool = False, truncate: bool = False) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, length=length, pictures=pictures, truncate=truncate)
        self.length, self.truncate = length, truncate
        self.observation_space = spaces.Box(0, 255, (36, 36) if pictures else (1,), np.uint8)
        self.t = 0
        self.seeds: list[int | None] = []

    def _see(self) -> np.ndarray:
        return np.full(self.observation_space.shape, self.t, np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.t = 0
        return self._see(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        end = self.t >= self.length
        return self._see(), float(action), end and not self.truncate, end and self.truncate, {}


@pytest.fixture(autouse=True)
def counting_is_registered() -> Iterator[None]:
    gym.register("Counting-v0", entry_point=f"{__name__}:Counting", disable_env_checker=True)
    yield
    gym.registry.pop("Counting-v0")


def counting(**kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make("Counting-v0", **kwargs)


def some_episode(steps: int = 3, reward: float = 1.0, terminated: bool = True) -> Episode:
    observations = np.arange(steps + 1, dtype=np.uint8)[:, None]
    return Episode(pack_frames(observations), np.zeros(steps, int), np.full(steps, reward), terminated, None)


def write(dataset_id: str, episodes: Any, env: gym.Env[Any, Any] | None = None, **kwargs: Any) -> minari.MinariDataset:
    return write_dataset(dataset_id, episodes, env or counting(), algorithm_name="test", description="a test", **kwargs)


# ------------------------------------------------------------------ record


def test_what_is_recorded() -> None:
    actions = iter([0, 1, 2, 3, 4, 0])
    dataset = record(lambda observation: next(actions), counting(), "by/function-v0", n_episodes=2, seed=7)
    assert isinstance(dataset, minari.MinariDataset)
    assert len(dataset) == 2
    for k, episode in enumerate(dataset):
        assert episode.observations.tolist() == [[0], [1], [2], [3]]
        assert episode.actions.tolist() == [[0, 1, 2], [3, 4, 0]][k]
        assert episode.rewards.tolist() == [[0, 1, 2], [3, 4, 0]][k]
        assert episode.terminations.tolist() == [False, False, True]
        assert episode.truncations.tolist() == [False, False, False]
    again = minari.load_dataset("by/function-v0")
    assert again.total_steps == 6
    assert again.storage.metadata["algorithm_name"] == "<lambda>"


def test_truncated_episodes_are_marked_so() -> None:
    (episode,) = record(None, counting(truncate=True), "by/cut-v0", n_episodes=1)
    assert episode.terminations.tolist() == [False, False, False]
    assert episode.truncations.tolist() == [False, False, True]


def test_random_actions_are_seeded_and_the_seeds_count_up() -> None:
    env = counting(length=20)
    first = collect_episodes(None, env, n_episodes=3, seed=5)
    assert env.unwrapped.seeds == [5, 6, 7]  # type: ignore[attr-defined]
    assert [e.seed for e in first] == [5, 6, 7]
    again = collect_episodes(None, env, n_episodes=3, seed=5)
    other = collect_episodes(None, env, n_episodes=3, seed=6)
    assert [e.actions.tolist() for e in first] == [e.actions.tolist() for e in again]
    assert [e.actions.tolist() for e in first] != [e.actions.tolist() for e in other]


def test_steps_are_rounded_up_to_whole_episodes() -> None:
    assert [len(e.rewards) for e in collect_episodes(None, counting(), n_steps=7)] == [3, 3, 3]
    assert len(collect_episodes(None, counting(), n_steps=6)) == 2


@pytest.mark.parametrize("amount", [{}, {"n_episodes": 1, "n_steps": 1}, {"n_episodes": 0}, {"n_steps": 0}])
def test_how_much_to_record_must_be_said(amount: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Give either n_episodes or n_steps, at least 1"):
        collect_episodes(None, counting(), **amount)


def test_a_policy_is_a_model_a_function_or_nothing() -> None:
    with pytest.raises(TypeError, match="policy must be an SB3 model"):
        collect_episodes("PPO", counting(), n_episodes=1)  # type: ignore[arg-type]


def pendulum() -> gym.Env[Any, Any]:
    return gym.make("Pendulum-v1", max_episode_steps=8)


def test_a_policy_may_reuse_its_array_of_actions() -> None:
    shared, turn = np.zeros(1, np.float32), iter(np.linspace(-2, 2, 8, dtype=np.float32))

    def policy(observation: np.ndarray) -> np.ndarray:
        shared[:] = next(turn)
        return shared

    (episode,) = collect_episodes(policy, pendulum(), n_episodes=1)
    np.testing.assert_array_equal(episode.actions[:, 0], np.linspace(-2, 2, 8, dtype=np.float32))


def test_a_recurrent_model_remembers_within_an_episode() -> None:
    model = RecurrentPPO("MlpLstmPolicy", pendulum(), policy_kwargs={"lstm_hidden_size": 4}, seed=0, device="cpu")
    found = collect_episodes(model, pendulum(), n_episodes=2, deterministic=True, seed=3)
    for episode in found:
        state = None
        for t, action in enumerate(episode.actions):
            wanted, state = model.predict(episode.observations[t], state, deterministic=True)
            np.testing.assert_array_equal(action, wanted)
        assert (action != model.predict(episode.observations[t], deterministic=True)[0]).all()


def test_a_greedy_model_is_repeatable() -> None:
    model = DQN("MlpPolicy", gym.make("CartPole-v1"), seed=0, buffer_size=10, device="cpu")
    dataset = record(model, gym.make("CartPole-v1"), "by/model-v0", n_episodes=2, deterministic=True, seed=3)
    again = record(model, gym.make("CartPole-v1"), "by/model-v1", n_episodes=2, deterministic=True, seed=3)
    for one, two in zip(dataset, again, strict=True):
        np.testing.assert_array_equal(one.observations, two.observations)
    for episode in dataset:
        wanted = model.predict(episode.observations[:-1], deterministic=True)[0]
        np.testing.assert_array_equal(episode.actions, wanted)
    metadata = dataset.storage.metadata
    assert metadata["algorithm_name"] == "DQN"
    assert metadata["description"] == (
        f"2 episodes ({dataset.total_steps} steps) of CartPole-v1 by DQN, greedy actions, seeds from 3."
    )


def test_a_model_on_stacks_records_single_frames() -> None:
    """The dataset gets what the environment shows, the model what it was trained on."""
    stacked = StackFrames(counting(length=6, pictures=True), 4)
    model = DQN("CnnPolicy", stacked, buffer_size=10, seed=0, device="cpu")
    seen = []
    predict = model.predict
    model.predict = lambda observation, **kw: (seen.append(observation), predict(observation, **kw))[1]  # type: ignore[method-assign,assignment]
    dataset = record(model, counting(length=6, pictures=True), "by/frames-v0", n_episodes=1)
    assert dataset.observation_space.shape == (36, 36)
    assert dataset[0].observations[:, 0, 0].tolist() == list(range(7))
    assert [stack[:, 0, 0].tolist() for stack in seen[:5]] == [
        [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"The model sees .*stacking its frames does not help"):
        record(model, counting(), "by/other-v0", n_episodes=1)


# ------------------------------------------------------------------ the dataset


def test_pictures_are_exact(breakout: minari.MinariDataset) -> None:
    assert breakout.storage.metadata["jpeg_encoding"] is False
    assert breakout.storage.metadata["data_format"] == "parquet"
    episode, seed = breakout[1], next(iter(breakout.storage.get_episode_metadata([1])))["seed"]
    env = make_atari_env("Breakout")
    observation, _ = env.reset(seed=seed)
    np.testing.assert_array_equal(episode.observations[0], observation)
    for t, action in enumerate(episode.actions):
        np.testing.assert_array_equal(episode.observations[t + 1], env.step(int(action))[0])
    raw = (breakout.total_steps + 4) * 84 * 84
    size = sum(f.stat().st_size for f in Path(breakout.storage.data_path).rglob("*") if f.is_file())
    assert size < raw / 10


def test_every_field_of_the_metadata_is_filled(cartpole: minari.MinariDataset) -> None:
    metadata = cartpole.storage.metadata
    steps = [len(e) for e in cartpole]
    spec = json.loads(metadata["env_spec"])
    assert spec["id"] == "CartPole-v1"
    assert metadata["eval_env_spec"] == metadata["env_spec"]
    assert metadata["dataset_id"] == "cartpole/random-v0"
    assert metadata["total_episodes"] == len(steps)
    assert metadata["total_steps"] == sum(steps)
    assert metadata["dataset_size"] > 0
    assert metadata["minari_version"] == minari.__version__
    assert metadata["algorithm_name"] == "random"
    assert metadata["author"] == {"The sb3_ext authors"}
    assert metadata["author_email"]
    assert metadata["code_permalink"]
    assert metadata["description"].endswith("by random, sampled actions, seeds from 0.")
    assert metadata["requirements"] == [f"gymnasium=={gym.__version__}"]
    assert metadata["python_version"].startswith("3.")
    assert metadata["jpeg_encoding"] is False
    assert metadata["observation_space"] == cartpole.observation_space
    assert metadata["action_space"] == cartpole.action_space
    assert metadata["behaviour_return"] == {
        "mean": pytest.approx(np.mean(steps)),
        "std": pytest.approx(np.std(steps)),
        "min": min(steps),
        "median": np.median(steps),
        "max": max(steps),
        "episodes": len(steps),
    }


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_metadata_of_each_episode(data_format: str) -> None:
    rewards = iter([1, 2, 3, 0, 4, 4])
    dataset = record(
        lambda observation: next(rewards), counting(), "by/hand-v0", n_episodes=2, seed=4, data_format=data_format
    )
    first, second = dataset.storage.get_episode_metadata([0, 1])
    assert (first["seed"], second["seed"]) == (4, 5)
    assert (first["total_steps"], second["total_steps"]) == (3, 3)
    for name, values in {"sum": (6, 8), "mean": (2, 8 / 3), "min": (1, 0), "max": (3, 4)}.items():
        assert (first[f"rewards_{name}"], second[f"rewards_{name}"]) == pytest.approx(values)
    assert first["rewards_std"] == pytest.approx(np.sqrt(2 / 3))


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_the_size_is_not_measured_after_every_episode(data_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, measure = 0, MinariStorage.get_size

    def counted(storage: MinariStorage) -> float:
        nonlocal calls
        calls += 1
        return float(measure(storage))

    monkeypatch.setattr(MinariStorage, "get_size", counted)
    counts = []
    for n in (2, 20):
        dataset = record(None, gym.make("CartPole-v1"), f"by/hand-v{n}", n_episodes=n, data_format=data_format)
        counts.append(calls)
        calls = 0
        size = sum(f.stat().st_size for f in Path(dataset.storage.data_path).rglob("*") if f.is_file()) / 1e6
        assert dataset.storage.metadata["dataset_size"] == pytest.approx(size, abs=0.2)  # folders have a size, too
    assert counts[0] == counts[1] <= 2


def test_what_the_caller_adds_to_the_metadata() -> None:
    dataset = write(
        "by/hand-v0",
        [some_episode(reward=2.0), some_episode(reward=4.0)],
        author="A",
        author_email="a@b.c",
        code_permalink="https://example.org/code",
        ref_min_score=0.0,
        ref_max_score=12.0,
        metadata={"sticky": 0.25},
    )
    metadata = dataset.storage.metadata
    assert (metadata["author"], metadata["author_email"]) == ({"A"}, {"a@b.c"})
    assert (metadata["code_permalink"], metadata["sticky"]) == ("https://example.org/code", 0.25)
    assert minari.get_normalized_score(dataset, np.array([6.0])) == pytest.approx(0.5)
    assert metadata["behaviour_return"]["mean"] == 9.0
    assert "ref_min_score" not in write("by/other-v0", [some_episode()], ref_min_score=0.0).storage.metadata


def test_return_statistics_by_hand() -> None:
    assert return_statistics([1.0, 2.0, 6.0, 3.0]) == {
        "mean": 3.0, "std": pytest.approx(np.sqrt(3.5)), "min": 1.0, "median": 2.5, "max": 6.0, "episodes": 4,
    }  # fmt: skip


def test_the_environment_can_be_built_again(breakout: minari.MinariDataset) -> None:
    env = breakout.recover_environment()
    evaluation = breakout.recover_environment(eval_env=True)
    assert env.observation_space == evaluation.observation_space == breakout.observation_space
    assert env.reset(seed=0)[0].shape == (84, 84)
    built = make_eval_env(breakout, render_mode="rgb_array")
    built.reset()
    assert built.render().shape == (210, 160, 3)  # type: ignore[union-attr]


def test_wrappers_are_built_again_and_observers_left_out() -> None:
    env = EpisodeRecorder(Monitor(StackFrames(gym.make("CartPole-v1", render_mode="rgb_array"), 2)))
    collect_episodes(None, env, n_episodes=1)
    dataset = write("by/wrapped-v0", env.episodes, env)
    built = dataset.recover_environment()
    assert built.observation_space.shape == (8,)
    assert built.render_mode is None
    kinds = []
    while isinstance(built, gym.Wrapper):
        kinds.append(type(built))
        built = built.env
    assert StackFrames in kinds
    assert not {EpisodeRecorder, Monitor} & set(kinds)


def test_a_wrapper_that_nobody_can_build_again_is_named() -> None:
    class Scaled(gym.RewardWrapper[Any, Any]):
        def reward(self, reward: Any) -> float:
            return 2.0 * reward

    with pytest.warns(UserWarning, match=r"Nobody can build this environment again.*Scaled"):
        write("by/hand-v0", [some_episode()], Scaled(counting()))


def test_an_environment_without_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no spec; build it with gymnasium\.make"):
        write("by/hand-v0", [some_episode()], Counting())
    assert not (tmp_path / "datasets" / "by").exists()


class Shown(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Claims to show observations of another space, and does."""

    def __init__(self, env: gym.Env[Any, Any], space: spaces.Space[Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = space

    def observation(self, observation: Any) -> Any:
        return self.observation_space.sample()


def never(observation: Any) -> int:
    raise AssertionError("Something was played.")


BOX = spaces.Box(0, 1, (2,), np.float32)
UNKEEPABLE = [spaces.Sequence(BOX), spaces.Graph(BOX, None), spaces.Dict(a=spaces.Tuple([spaces.Sequence(BOX)]))]


@pytest.mark.parametrize("space", UNKEEPABLE, ids=lambda space: type(space).__name__)
def test_observations_of_no_fixed_structure_are_refused(space: spaces.Space[Any]) -> None:
    env = Shown(counting(), space)
    with pytest.raises(TypeError, match=r"observations that are arrays or texts, or a Dict or Tuple of them, not "):
        EpisodeRecorder(env)
    with pytest.raises(TypeError, match="observations that are arrays"):
        collect_episodes(never, env, n_episodes=1)


@pytest.mark.parametrize("space", [*UNKEEPABLE, spaces.Box(0, 1, (0,))], ids=lambda space: type(space).__name__)
def test_what_could_not_be_loaded_is_not_recorded(space: spaces.Space[Any], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^by/hand-v0: "):
        record(never, Shown(counting(), space), "by/hand-v0", n_episodes=1)
    assert not (tmp_path / "datasets" / "by").exists()


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_record_checks_everything_before_it_plays(tmp_path: Path) -> None:
    write("by/taken-v0", [some_episode()])
    gym.register("Callable-v0", entry_point=f"{__name__}:Counting", kwargs={"length": int}, disable_env_checker=True)
    odd = gym.make("Callable-v0")
    gym.registry.pop("Callable-v0")
    nested = gym.wrappers.TransformAction(
        counting(), lambda action: action["a"], spaces.Dict({"a": spaces.Discrete(5)})
    )
    for message, env, dataset_id, more in (
        ("no dataset id", counting(), "by/hand", {}),
        ("exists; choose another version", counting(), "by/taken-v0", {}),
        (
            "data_format must be one of arrow, hdf5, parquet, not 'csv'",
            counting(),
            "by/hand-v0",
            {"data_format": "csv"},
        ),
        ("has no spec; build it with gymnasium.make", Counting(), "by/hand-v0", {}),
        ("spec cannot be stored as JSON .*arguments", odd, "by/hand-v0", {}),
        ("MultiDiscrete and MultiBinary can be recorded", nested, "by/hand-v0", {}),
    ):
        with pytest.raises(ValueError, match=message):
            record(never, env, dataset_id, n_episodes=1, **more)
    with pytest.raises(TypeError, match="unexpected keyword argument 'auther'"):
        record(never, counting(), "by/hand-v0", n_episodes=1, auther="A")
    record(None, counting(), "by/taken-v0", n_episodes=1, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "datasets" / "by").iterdir()) == ["namespace_metadata.json", "taken-v0"]


# ------------------------------------------------------------------ ids, failures


@pytest.mark.parametrize("name", ["by/hand", "by/hand-vx", "i/x-v0", "a b/x-v0", "../x-v0", "", "by/hand-v0/"])
def test_malformed_ids(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no dataset id: call it 'namespace/name-v0'"):
        write(name, [some_episode()])
    assert not (tmp_path / "datasets").exists() or list((tmp_path / "datasets").iterdir()) == []


@pytest.mark.parametrize("dataset_id", ["plain-v0", "by/hand-v0", "deep/er/still/x-v12"])
def test_ids_with_and_without_namespaces(dataset_id: str) -> None:
    write(dataset_id, [some_episode()])
    assert list(minari.list_local_datasets()) == [dataset_id]
    namespace = dataset_id.rpartition("/")[0]
    assert not namespace or namespace in minari.namespace.list_local_namespaces()
    assert load_minari(dataset_id, device="cpu").size() == 3


def test_an_existing_dataset_is_replaced_only_on_request() -> None:
    write("by/hand-v0", [some_episode(3)])
    with pytest.raises(ValueError, match="exists; choose another version or pass overwrite=True"):
        write("by/hand-v0", [some_episode(5)])
    assert minari.load_dataset("by/hand-v0").total_steps == 3
    assert load_minari("by/hand-v0", device="cpu").size() == 3
    write("by/hand-v0", [some_episode(5)], overwrite=True)
    assert minari.load_dataset("by/hand-v0").total_steps == 5
    assert load_minari("by/hand-v0", device="cpu").size() == 5


def failing() -> Iterator[Episode]:
    yield some_episode()
    raise RuntimeError("the game crashed")


@pytest.mark.parametrize("data_format", ["hdf5", "parquet"])
def test_a_failure_leaves_nothing_behind(data_format: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the game crashed"):
        write("by/some/hand-v0", failing(), data_format=data_format)
    with pytest.raises(ValueError, match="No episode to write"):
        write("by/some/hand-v0", [], data_format=data_format)
    assert list((tmp_path / "datasets").iterdir()) == []


def test_a_failure_leaves_an_existing_dataset_alone(tmp_path: Path) -> None:
    write("by/hand-v0", [some_episode(3)])
    before = {f: f.read_bytes() for f in (tmp_path / "datasets").rglob("*") if f.is_file()}
    with pytest.raises(RuntimeError, match="the game crashed"):
        write("by/hand-v0", failing(), overwrite=True)
    assert {f: f.read_bytes() for f in (tmp_path / "datasets").rglob("*") if f.is_file()} == before


def test_a_dataset_that_a_killed_replacement_set_aside_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("by/hand-v0", [some_episode(3)])
    folder = tmp_path / "datasets" / "by"
    (folder / "hand-v0").rename(folder / f".hand-v0.{'a' * 32}.old")
    (folder / f".hand-v0.{'a' * 32}").mkdir()
    write("by/other-v0", [some_episode(4)])
    assert set(minari.list_local_datasets()) == {"by/other-v0"}, "its process may still be at it"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_500)
    with pytest.raises(ValueError, match="exists; choose another version or pass overwrite=True"):
        write("by/hand-v0", [some_episode(5)])
    assert minari.load_dataset("by/hand-v0").total_steps == 3
    assert {p.name for p in folder.iterdir()} == {"hand-v0", "other-v0", "namespace_metadata.json"}


def test_a_replacement_leaves_no_rest(tmp_path: Path) -> None:
    for steps in (3, 4):
        write("by/hand-v0", [some_episode(steps)], overwrite=True)
    names = sorted(p.name for p in (tmp_path / "datasets" / "by").iterdir())
    assert names == ["hand-v0", "namespace_metadata.json"]


# ------------------------------------------------------------------ recorder


def play(env: gym.Env[Any, Any], games: int, steps: int = 3) -> None:
    for seed in range(games):
        env.reset(seed=seed)
        for _ in range(steps):
            env.step(1)


def test_recorder_keeps_a_share_of_the_games() -> None:
    kept = []
    for seed in (0, 0, 1):
        env = EpisodeRecorder(counting(), keep=0.3, seed=seed)
        play(env, 400)
        kept.append([e.seed for e in env.episodes])
        assert all(len(e.rewards) == 3 and e.terminated for e in env.episodes)
    assert kept[0] == kept[1] != kept[2]
    assert abs(len(kept[0]) - 120) < 4 * np.sqrt(400 * 0.3 * 0.7)
    for keep, wanted in ((0.0, 0), (1.0, 50)):
        env = EpisodeRecorder(counting(), keep=keep)
        play(env, 50)
        assert len(env.episodes) == wanted


def test_unfinished_games_are_truncated() -> None:
    env = EpisodeRecorder(counting(length=10))
    env.flush()
    env.reset(seed=1)
    env.flush()  # no step yet: nothing to keep
    assert env.episodes == []
    play(env, 2, steps=4)  # the second reset ends the first game
    env.flush()
    env.flush()
    assert [len(e.rewards) for e in env.episodes] == [4, 4]
    assert not any(e.terminated for e in env.episodes)
    env.step(1)  # without a reset: belongs to no episode
    env.flush()
    assert len(env.episodes) == 2
    buffer = env.episodes[0].to_minari(0)
    assert buffer.truncations.tolist() == [False, False, False, True]  # type: ignore[attr-defined]
    assert not buffer.terminations.any()  # type: ignore[attr-defined]


def test_recorded_observations_are_copies() -> None:
    class Reusing(gym.ObservationWrapper[Any, Any, Any]):
        """Gives the same array every time, as fast environments do."""

        shared = np.zeros(1, np.uint8)

        def observation(self, observation: Any) -> Any:
            self.shared[:] = observation
            return self.shared

    env = EpisodeRecorder(Reusing(counting()))
    play(env, 1)
    assert env.episodes[0].observations.tolist() == [[0], [1], [2], [3]]


def test_recorders_may_share_a_list() -> None:
    episodes: list[Episode] = []
    for _ in range(2):
        play(EpisodeRecorder(counting(), episodes), 2)
    assert len(episodes) == 4


def test_recording_a_learning_agent() -> None:
    """The recorder sits below the agent's wrappers; what they do to rewards does not show in the data."""
    episodes: list[Episode] = []
    env = make_vec_env(
        lambda: gym.wrappers.TransformReward(EpisodeRecorder(counting(length=5), episodes), lambda reward: -reward),
        n_envs=2,
    )
    DQN("MlpPolicy", env, learning_starts=5, buffer_size=100, seed=0, device="cpu").learn(40)
    assert len(episodes) == 8
    assert all((e.rewards == e.actions).all() and (e.rewards >= 0).all() for e in episodes)


# ------------------------------------------------------------------ round trip


def test_from_a_model_to_a_dataset_to_a_buffer_to_an_evaluation() -> None:
    model = DQN("MlpPolicy", gym.make("CartPole-v1"), seed=0, buffer_size=10, device="cpu")
    dataset = record(model, gym.make("CartPole-v1"), "by/round-v0", n_steps=50)
    buffer = load_minari("by/round-v0", device="cpu")
    assert buffer.episode_returns().tolist() == [float(e.rewards.sum()) for e in dataset]
    mean, _ = evaluate_policy(model, make_eval_env(dataset, seed=0), n_eval_episodes=2)
    assert mean > 0


def test_a_model_behind_vec_normalize_sees_what_it_was_trained_on() -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 1, seed=0))
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=64, seed=0, device="cpu").learn(64)
    (episode,) = collect_episodes(model, gym.make("CartPole-v1"), n_episodes=1, deterministic=True)
    normalized = env.normalize_obs(episode.observations[:-1])
    np.testing.assert_array_equal(episode.actions, model.predict(normalized, deterministic=True)[0])
    assert (model.predict(episode.observations[:-1], deterministic=True)[0] != episode.actions).any()
