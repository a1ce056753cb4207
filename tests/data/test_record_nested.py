"""Recording observations that are not one array, and actions of every kind, through the real Minari and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.data import DatasetError, EpisodeRecorder, check_new_dataset, collect_episodes, record, write_dataset
from sb3_ext.data.write import WORDS, choose_format, pack_observations, stored_space, unpack_observations

FORMATS = ("hdf5", "arrow", "parquet")
BOX = spaces.Box(-1, 1, (3,), np.float32)
PICTURE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
GOALS = spaces.Dict(now=BOX, goal=spaces.Dict(where=BOX, which=spaces.Discrete(4)))
SPACES: dict[str, spaces.Space[Any]] = {
    "box": BOX,
    "scalar": spaces.Dict(x=spaces.Box(-1, 1, (), np.float64)),
    "half": spaces.Box(-1, 1, (2, 2), np.float16),
    "bool": spaces.Box(0, 1, (3,), np.bool_),
    "picture": PICTURE,
    "discrete": spaces.Discrete(3),
    "discrete from -5": spaces.Discrete(3, start=-5),
    "multi-discrete": spaces.MultiDiscrete([3, 4]),
    "multi-discrete table": spaces.MultiDiscrete([[3, 4], [2, 2]], start=[[1, 1], [0, -3]]),
    "multi-binary": spaces.MultiBinary(4),
    "multi-binary table": spaces.MultiBinary([2, 3]),
    "text": spaces.Text(8, min_length=0, charset="aß😀 \"\\'\n"),
    "dict": spaces.Dict({"image": PICTURE, "direction": spaces.Discrete(4), "mission": spaces.Text(20)}),
    "goals in goals": spaces.Dict(observation=BOX, desired=GOALS, achieved=GOALS),
    "tuple": spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), BOX]),
    "tuple of one": spaces.Tuple([spaces.Text(3)]),
    "tuple of twelve": spaces.Tuple([spaces.Discrete(k + 1) for k in range(12)]),
    "all": spaces.Dict(
        a=spaces.Tuple([spaces.Dict(x=BOX, y=spaces.Tuple([spaces.MultiBinary(2), spaces.Text(4)]))]),
        b=spaces.MultiDiscrete([2, 5]),
        c=spaces.Dict({"a key": spaces.Box(0, 1, (1,), np.bool_), "ä": spaces.Discrete(2, start=1)}),
    ),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(5),
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "multi-discrete": spaces.MultiDiscrete([3, 4, 2]),
    "multi-binary": spaces.MultiBinary(3),
}


class Showing(gym.Env[Any, Any], gym.utils.RecordConstructorArgs):
    """Shows samples of a space, which it keeps, with the actions; ends after four steps."""

    def __init__(self, space: str, actions: str = "discrete") -> None:
        gym.utils.RecordConstructorArgs.__init__(self, space=space, actions=actions)
        self.observation_space, self.action_space = SPACES[space], ACTIONS[actions]
        self.shown: list[list[Any]] = []
        self.taken: list[list[Any]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.shown.append([self.observation_space.sample()])
        self.taken.append([])
        return self.shown[-1][0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.shown[-1].append(self.observation_space.sample())
        self.taken[-1].append(action)
        return self.shown[-1][-1], 1.0, len(self.taken[-1]) == 4, False, {}


@pytest.fixture(autouse=True)
def showing_is_registered() -> Iterator[None]:
    gym.register("Showing-v0", entry_point=f"{__name__}:Showing", disable_env_checker=True)
    yield
    gym.registry.pop("Showing-v0")


def showing(space: str | spaces.Space[Any], actions: str = "discrete") -> gym.Env[Any, Any]:
    if not isinstance(space, str):
        SPACES["given"] = space
        space = "given"
    return gym.make("Showing-v0", space=space, actions=actions)


def never(observation: Any) -> int:
    raise AssertionError("Something was played.")


def assert_step(stored: Any, t: int, shown: Any, space: spaces.Space[Any]) -> None:
    """Compare step t of stored observations with what the environment showed, leaf by leaf."""
    if isinstance(space, spaces.Dict):
        assert isinstance(stored, dict)
        assert stored.keys() == space.spaces.keys()
        for key, part in space.items():
            assert_step(stored[key], t, shown[key], part)
    elif isinstance(space, spaces.Tuple):
        assert isinstance(stored, tuple)
        assert len(stored) == len(space)
        for k, part in enumerate(space):
            assert_step(stored[k], t, shown[k], part)
    elif isinstance(space, spaces.Text):
        assert isinstance(stored, list)
        assert stored[t] == shown
    else:
        assert stored.dtype == space.dtype
        np.testing.assert_array_equal(stored[t], shown, strict=False)


def assert_same(dataset: minari.MinariDataset, env: gym.Env[Any, Any]) -> None:
    played = env.unwrapped
    assert isinstance(played, Showing)
    assert dataset.observation_space == env.observation_space
    assert dataset.action_space == env.action_space
    assert len(dataset) == len(played.shown)
    for episode, shown, taken in zip(dataset, played.shown, played.taken, strict=True):
        np.testing.assert_array_equal(episode.actions, np.array(taken))
        assert episode.actions.dtype == env.action_space.dtype
        assert episode.terminations.tolist() == [False, False, False, True]
        for t, observation in enumerate(shown):
            assert_step(episode.observations, t, observation, env.observation_space)


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("space", [name for name in SPACES if name != "given"])
def test_what_was_shown_is_loaded(space: str, data_format: str) -> None:
    env = showing(space)
    record(None, env, "by/shown-v0", n_episodes=2, seed=3, data_format=data_format)
    assert_same(minari.load_dataset("by/shown-v0"), env)
    rebuilt = minari.load_dataset("by/shown-v0").recover_environment()
    assert rebuilt.observation_space == env.observation_space


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("actions", ACTIONS)
def test_what_was_done_is_loaded(actions: str, data_format: str) -> None:
    env = showing("goals in goals", actions)
    record(None, env, "by/done-v0", n_episodes=2, data_format=data_format)
    assert_same(minari.load_dataset("by/done-v0"), env)


LEAVES = st.one_of(
    st.builds(
        lambda shape, dtype: spaces.Box(0, 1, tuple(shape), dtype),
        st.lists(st.integers(1, 3), max_size=3),
        st.sampled_from([np.float32, np.float64, np.uint8, np.int32, np.bool_]),
    ),
    st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-3, 3)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    st.builds(spaces.MultiBinary, st.integers(1, 5)),
    st.builds(lambda n, charset: spaces.Text(n, min_length=0, charset=charset), st.integers(1, 5), st.just("ab ü")),
)
KEYS = st.text("abc_. 01ä", min_size=1, max_size=4).filter(lambda key: key != ".")
NESTED = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        st.dictionaries(KEYS, parts, min_size=1, max_size=3).map(spaces.Dict),
        st.lists(parts, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=6,
)


@settings(max_examples=15)
@given(space=NESTED, data_format=st.sampled_from([None, *FORMATS]), seed=st.integers(0, 99))
def test_any_space_that_can_be_built_of_these(space: spaces.Space[Any], data_format: str | None, seed: int) -> None:
    env = showing(space)
    episodes = collect_episodes(None, env, n_episodes=2, seed=seed)
    write_dataset(
        "by/drawn-v0", episodes, env, algorithm_name="a", description="b", data_format=data_format, overwrite=True
    )
    assert_same(minari.load_dataset("by/drawn-v0"), env)


def test_an_episode_keeps_the_structure_packed() -> None:
    (episode,) = collect_episodes(None, showing("all"), n_episodes=1)
    seen = episode.observations
    assert seen["a"][0]["x"].shape == (5, 3)
    assert seen["b"].shape == (5, 2)
    assert len(seen["a"][0]["y"][1]) == 5
    packed: Any = episode.packed
    assert isinstance(packed["a"][0]["x"][0], bytes)
    assert packed["a"][0]["y"][1] == seen["a"][0]["y"][1]


def test_packing_by_hand() -> None:
    observations = ({"a": np.arange(6).reshape(3, 2)}, ["x", "", "y"], (), np.array([1.0, 2.0, 3.0]))
    again = unpack_observations(pack_observations(observations))
    assert again[0]["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert again[1:3] == (["x", "", "y"], ())
    assert again[3].tolist() == [1.0, 2.0, 3.0]


# ------------------------------------------------------------------ formats


class Words(spaces.Space[str]):
    """A space of texts that says no more of them, as MiniGrid's missions are."""

    def __init__(self) -> None:
        super().__init__(dtype=str)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        return "go to the red ball"

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


def test_the_format_is_chosen_by_what_it_must_hold() -> None:
    nothing = spaces.Dict(picture=PICTURE, nothing=spaces.Dict())
    for space, wanted in (
        (BOX, "hdf5"),
        (PICTURE, "parquet"),
        (GOALS, "hdf5"),
        (SPACES["dict"], "parquet"),
        (spaces.Tuple([BOX, spaces.Tuple([PICTURE])]), "parquet"),
        (spaces.Dict({"a/b": BOX}), "parquet"),
        (nothing, "hdf5"),
    ):
        env = showing(space)
        assert choose_format("by/chosen-v0", env) == wanted, space
        dataset = record(None, env, "by/chosen-v0", n_episodes=1, overwrite=True)
        assert dataset.storage.metadata["data_format"] == wanted
        assert_same(dataset, env)


@pytest.mark.parametrize(
    ("space", "data_format", "message"),
    [
        (spaces.Dict({"a/b": BOX}), "hdf5", r"the key 'a/b' is no name there. Pass data_format='parquet'"),
        (spaces.Dict(d=spaces.Dict({"": BOX})), "hdf5", r"the key '' is no name there"),
        (spaces.Dict({".": BOX}), "hdf5", r"the key '\.' is no name there"),
        (spaces.Dict({1: BOX}), None, r"hdf5 cannot hold .*the key 1 is no name there. Record through a wrapper"),
        (spaces.Dict(a=BOX, b=spaces.Tuple([])), "arrow", r"Tuple\(\) is empty. Pass data_format='hdf5'"),
        (spaces.Text(3, charset="a\0"), "hdf5", r"no text there. Pass data_format='parquet'"),
        (spaces.Text(3, charset="a\ud800"), None, r"no text there. Record through a wrapper"),
        (spaces.Tuple([spaces.Box(0, 1, (0, 2))]), None, r"arrays of shape \(0, 2\) and type float32"),
        (spaces.Box(0, 1, (2,), np.longdouble), None, r"arrays of shape \(2,\) and type float128"),
        (spaces.Dict(a=spaces.Sequence(BOX)), None, r"Sequence\(.* is none of Box, Discrete"),
        (spaces.OneOf([BOX, spaces.Discrete(2)]), "arrow", r"OneOf\(.* is none of Box, Discrete"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_first_step(
    space: spaces.Space[Any], data_format: str | None, message: str, tmp_path: Path
) -> None:
    env = showing(space)
    with pytest.raises(DatasetError, match=f"^by/refused-v0: .*{message}"):
        record(never, env, "by/refused-v0", n_episodes=1, data_format=data_format)
    with pytest.raises(DatasetError, match=message):
        write_dataset("by/refused-v0", [], env, algorithm_name="a", description="b", data_format=data_format)
    assert not (tmp_path / "datasets" / "by" / "refused-v0").exists()


@pytest.mark.parametrize("actions", [spaces.Dict(a=BOX), spaces.Tuple([BOX]), spaces.Text(3)], ids=repr)
def test_actions_that_are_no_arrays_are_refused(actions: spaces.Space[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIONS, "given", actions)
    env = showing("dict", "given")
    with pytest.raises(DatasetError, match=r"the actions are .*; Discrete, Box, MultiDiscrete and MultiBinary can be"):
        check_new_dataset("by/refused-v0", env)
    with pytest.raises(TypeError, match="keeps actions that are arrays"):
        EpisodeRecorder(env)


class Shown(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Shows the same observation every time."""

    def __init__(self, env: gym.Env[Any, Any], shown: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.shown = shown

    def observation(self, observation: Any) -> Any:
        return self.shown


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_arrow_gets_the_types_of_the_spaces_where_nothing_is_lost(data_format: str) -> None:
    space = spaces.Dict(buttons=spaces.MultiBinary(2), deep=spaces.Tuple([BOX, spaces.MultiDiscrete([3, 3])]))
    shown = {"buttons": np.array([True, False]), "deep": ([0.5, np.nan, -1.0], np.array([2, 1], np.int8))}
    env = Shown(showing(space), shown)
    dataset = record(None, env, "by/types-v0", n_episodes=1, data_format=data_format)
    seen = dataset[0].observations
    assert seen["buttons"].dtype == np.int8
    assert seen["buttons"].tolist() == [[1, 0]] * 5
    assert seen["deep"][0].dtype == np.float32
    np.testing.assert_array_equal(seen["deep"][0], [[0.5, np.nan, -1.0]] * 5)
    assert seen["deep"][1].tolist() == [[2, 1]] * 5
    shown["deep"] = ([0.1, 0.0, 0.0], shown["deep"][1])
    with pytest.raises(ValueError, match=r'float64 values do not fit the float32 of Box.*Pass data_format="hdf5"'):
        record(None, env, "by/types-v1", n_episodes=1, data_format=data_format)
    assert set(minari.list_local_datasets()) == {"by/types-v0"}
    kept = record(None, env, "by/types-v1", n_episodes=1, data_format="hdf5")
    assert kept[0].observations["deep"][0][0, 0] == np.float64(0.1)


@pytest.mark.parametrize("data_format", FORMATS)
def test_texts_of_another_space_are_stored_as_text(data_format: str) -> None:
    space = spaces.Dict(mission=Words(), more=spaces.Tuple([Words(), spaces.Text(3)]))
    env = showing(space)
    dataset = record(None, env, "by/words-v0", n_episodes=1, data_format=data_format)
    assert dataset.observation_space == spaces.Dict(mission=WORDS, more=spaces.Tuple([WORDS, spaces.Text(3)]))
    assert dataset[0].observations["mission"] == ["go to the red ball"] * 5
    assert stored_space(dataset.observation_space) == dataset.observation_space
    for text in ("x" * 513, "grün"):
        with pytest.raises(ValueError, match=f"at most 512 ASCII characters, not '{text}'"):
            record(None, Shown(showing(Words()), text), "by/words-v1", n_episodes=1, data_format=data_format)
    assert set(minari.list_local_datasets()) == {"by/words-v0"}


# ------------------------------------------------------------------ recorder


def test_recorded_parts_are_copies() -> None:
    shared = np.zeros(3, np.float32)

    class Reusing(gym.ObservationWrapper[Any, Any, Any]):
        def observation(self, observation: Any) -> Any:
            shared[:] += 1
            return {"now": shared, "goal": {"where": shared, "which": 0}}

    (episode,) = collect_episodes(None, Reusing(showing(GOALS)), n_episodes=1)
    assert episode.observations["now"][:, 0].tolist() == [1, 2, 3, 4, 5]
    assert episode.observations["goal"]["where"][:, 1].tolist() == [1, 2, 3, 4, 5]


def test_observations_without_the_structure_of_their_space_are_refused() -> None:
    for shown in ({"now": np.zeros(3)}, {"now": np.zeros(3), "goal": {}, "more": 1}):
        with pytest.raises(ValueError, match=r"The observation has the keys .*, its space \['goal', 'now'\]"):
            collect_episodes(None, Shown(showing(GOALS), shown), n_episodes=1)
    with pytest.raises(ValueError, match="The observation has 2 parts, its space 3"):
        collect_episodes(None, Shown(showing("tuple"), (1, 2)), n_episodes=1)


# ------------------------------------------------------------------ models


class Reach(gym.Env[Any, Any], gym.utils.RecordConstructorArgs):
    """Go to a goal on a line: a small environment with ``Dict`` observations, with or without a picture."""

    def __init__(self, picture: bool = False, length: int = 6) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, picture=picture, length=length)
        parts: dict[str, spaces.Space[Any]] = {"at": spaces.Box(-9, 9, (1,), np.float32), "goal": spaces.Discrete(3)}
        if picture:
            parts["picture"] = PICTURE
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.MultiDiscrete([3, 2])
        self.length = length

    def _see(self) -> dict[str, Any]:
        seen = {"at": np.array([self.at], np.float32), "goal": self.goal}
        if "picture" in self.observation_space.spaces:
            seen["picture"] = self.np_random.integers(0, 256, PICTURE.shape, np.uint8)
        return seen

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.t, self.goal = self.np_random.normal(), 0, int(self.np_random.integers(3))
        return self._see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at, self.t = self.at + float(action[0]) - 1, self.t + 1
        return self._see(), -abs(self.at - self.goal), False, self.t >= self.length, {}


@pytest.fixture
def reach() -> Iterator[gym.Env[Any, Any]]:
    gym.register("Reach-v0", entry_point=f"{__name__}:Reach", disable_env_checker=True)
    yield gym.make("Reach-v0")
    gym.registry.pop("Reach-v0")


@pytest.mark.parametrize("picture", [False, True], ids=["vectors", "with a picture"])
def test_a_model_on_dictionaries(reach: gym.Env[Any, Any], picture: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make("Reach-v0", picture=picture)
    own = gym.make("Reach-v0", picture=picture)
    model = PPO("MultiInputPolicy", own, n_steps=8, batch_size=8, seed=0, device="cpu")
    seen: list[Any] = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda o, **kw: (seen.append(o), predict(o, **kw))[1])
    dataset = record(model, env, "reach/ppo-v0", n_episodes=2, deterministic=True, seed=1)
    assert len(seen) == 12
    assert set(seen[0]) == set(env.observation_space.spaces)
    metadata = dataset.storage.metadata
    assert metadata["algorithm_name"] == "PPO"
    assert metadata["data_format"] == ("parquet" if picture else "hdf5")
    for episode in minari.load_dataset("reach/ppo-v0"):
        for t in range(6):
            observation = {key: part[t] for key, part in episode.observations.items()}
            np.testing.assert_array_equal(episode.actions[t], predict(observation, deterministic=True)[0])


def test_a_model_on_other_dictionaries_is_refused(reach: gym.Env[Any, Any]) -> None:
    model = PPO("MultiInputPolicy", reach, n_steps=8, batch_size=8, device="cpu")
    for env in (gym.make("Reach-v0", picture=True), showing(GOALS), showing("box"), showing("discrete")):
        with pytest.raises(ValueError, match=r"The model sees Dict.*stacking its frames does not help"):
            record(model, env, "reach/other-v0", n_episodes=1)
    flat = PPO("MlpPolicy", gym.wrappers.FlattenObservation(reach), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match=r"The model sees Box.*the environment shows Dict"):
        record(flat, reach, "reach/other-v0", n_episodes=1)


def test_a_model_behind_vec_normalize_sees_normalised_dictionaries(reach: gym.Env[Any, Any]) -> None:
    venv = VecNormalize(make_vec_env(lambda: gym.make("Reach-v0"), 1, seed=0), norm_obs_keys=["at"])
    model = PPO("MultiInputPolicy", venv, n_steps=32, batch_size=32, seed=0, device="cpu").learn(32)
    seen: list[Any] = []
    predict = model.predict
    model.predict = lambda o, **kw: (seen.append(o), predict(o, **kw))[1]  # type: ignore[method-assign,assignment]
    (episode,) = collect_episodes(model, reach, n_episodes=1, deterministic=True)
    mean, var = venv.obs_rms["at"].mean, venv.obs_rms["at"].var  # type: ignore[index]
    wanted = (episode.observations["at"][:-1] - mean) / np.sqrt(var + venv.epsilon)
    np.testing.assert_allclose([o["at"] for o in seen], wanted, rtol=1e-5)
    assert [o["goal"] for o in seen] == episode.observations["goal"][:-1].tolist()


# ------------------------------------------------------------------ requirements


def test_the_package_of_the_entry_point_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maker_of_worlds.py").write_text(f"from {__name__} import Showing as make")
    info = tmp_path / "worlds-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: worlds\nVersion: 1.2.3\n")
    (info / "top_level.txt").write_text("maker_of_worlds\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    gym.register("World-v0", entry_point="maker_of_worlds:make", disable_env_checker=True)
    dataset = record(None, gym.make("World-v0", space="dict"), "by/world-v0", n_episodes=1)
    gym.registry.pop("World-v0")
    assert {f"gymnasium=={gym.__version__}", "worlds==1.2.3"} <= set(dataset.storage.metadata["requirements"])


def test_minigrid_is_recorded_with_its_missions() -> None:
    minigrid = pytest.importorskip("minigrid")
    env = gym.make("BabyAI-GoToObj-v0")
    dataset = record(None, env, "minigrid/random-v0", n_episodes=2, seed=5)
    metadata = dataset.storage.metadata
    assert metadata["requirements"] == [f"gymnasium=={gym.__version__}", f"minigrid=={minigrid.__version__}"]
    assert json.loads(metadata["env_spec"])["id"] == "BabyAI-GoToObj-v0"
    assert dataset.observation_space["mission"] == WORDS  # type: ignore[index]
    for k, episode in enumerate(minari.load_dataset("minigrid/random-v0")):
        observation, _ = env.reset(seed=5 + k)
        for t, action in enumerate([*episode.actions, None]):
            assert episode.observations["mission"][t] == observation["mission"]
            assert episode.observations["direction"][t] == observation["direction"]
            np.testing.assert_array_equal(episode.observations["image"][t], observation["image"])
            if action is not None:
                observation = env.step(action)[0]
