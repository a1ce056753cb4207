"""Transforms: hand-computed values, the same for data and for environments, and what is refused."""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sb3_ext import BC, CQL, load_minari, make_eval_env, record
from sb3_ext.data import (
    DatasetError,
    Transform,
    TransformedEnv,
    dataset_spaces,
    sample_transitions,
    verify_dataset,
)
from sb3_ext.data.transforms.pipeline import Pipeline
from tests.helpers import MakeDataset, flags

ACTIONS = spaces.Discrete(3)
GOALS = spaces.Dict(
    {
        "goal": spaces.Dict({"at": spaces.Box(-9, 9, (2,), np.float64), "kind": spaces.Discrete(3)}),
        "seen": spaces.Box(-9, 9, (1,), np.float32),
        "mission": spaces.Text(32),
    }
)


def piped(transforms: Any, space: spaces.Space[Any], actions: spaces.Space[Any] = ACTIONS) -> Pipeline:
    return Pipeline(transforms, space, actions, "it")


def goals(n: int) -> dict[str, Any]:
    return {
        "goal": {"at": np.arange(2.0 * n).reshape(n, 2) % 9, "kind": np.arange(n) % 3},
        "seen": np.full((n, 1), 0.5, np.float32),
        "mission": ["Go to the red ball!", "open a door"] * (n // 2) + ["go"] * (n % 2),
    }


def flat_goals(n: int) -> dict[str, Any]:
    nested = goals(n)
    return {
        "goal/at": nested["goal"]["at"],
        "goal/kind": nested["goal"]["kind"],
        "mission": np.array(nested["mission"], object),
        "seen": nested["seen"],
    }


def test_nested_entries_become_one_dictionary_and_text_is_left_out() -> None:
    found = piped(None, GOALS)
    assert list(found.observation_space.spaces) == ["goal/at", "goal/kind", "seen"]  # type: ignore[attr-defined]
    assert found.dropped_text == ["mission"]
    out = found.observations(flat_goals(2))
    assert list(out) == ["goal/at", "goal/kind", "seen"]
    np.testing.assert_array_equal(out["goal/at"], [[0, 1], [2, 3]])


def test_flatten_is_gymnasiums() -> None:
    space = spaces.Dict({key: entry for key, entry in GOALS.spaces.items() if key != "mission"})
    expected = [
        spaces.flatten(space, {"goal": {"at": o["at"], "kind": o["kind"]}, "seen": np.array([0.5], np.float32)})
        for o in ({"at": np.array([0.0, 1.0]), "kind": 0}, {"at": np.array([2.0, 3.0]), "kind": 1})
    ]
    found = piped("flatten", GOALS)
    np.testing.assert_array_equal(found.observations(flat_goals(2)), expected)
    assert found.observation_space == spaces.flatten_space(space)
    np.testing.assert_array_equal(expected[1], [2, 3, 0, 1, 0, 0.5])


def test_flatten_counts_from_their_start() -> None:
    space = spaces.MultiDiscrete([2, 3], start=[1, -1])
    out = piped("flatten", space).observations(np.array([[1, -1], [2, 1]]))
    np.testing.assert_array_equal(out, [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]])


@pytest.mark.parametrize(
    ("transform", "left"),
    [
        ("keep:seen", None),
        ("drop:goal", None),
        ("keep:goal", ["goal/at", "goal/kind"]),
        ("drop:goal/kind", ["goal/at", "seen"]),
        ("keep:goal/at,seen", ["goal/at", "seen"]),
    ],
)
def test_entries_are_kept_and_dropped_by_name(transform: str, left: list[str] | None) -> None:
    found = piped(["drop:mission", transform], GOALS)
    out = found.observations(flat_goals(2))
    if left is None:
        np.testing.assert_array_equal(out, [[0.5], [0.5]])
        assert found.observation_space == GOALS["seen"]
    else:
        assert list(out) == left == list(found.observation_space.spaces)  # type: ignore[attr-defined]


def test_numbers_of_things_count_from_0() -> None:
    found = piped(None, spaces.Discrete(4, start=-2), spaces.Discrete(3, start=5))
    assert found.observation_space == spaces.Discrete(4)
    assert found.action_space == spaces.Discrete(3)
    np.testing.assert_array_equal(found.observations(np.array([-2, 1])), [0, 3])
    np.testing.assert_array_equal(found.actions(np.array([5, 7])), [0, 2])
    assert found.environment_actions(2) == 7


COLOURS = np.array([[[[255, 255, 255], [255, 0, 0]], [[0, 255, 0], [0, 0, 255]]]], np.uint8)  # [1, 2, 2, 3]


@pytest.mark.parametrize("channels_first", [False, True])
def test_grey_weighs_colours_as_the_eye_does(channels_first: bool) -> None:
    pictures = np.moveaxis(COLOURS, -1, 1) if channels_first else COLOURS
    found = piped("grey", spaces.Box(0, 255, pictures.shape[1:], np.uint8))
    # 0.299 R + 0.587 G + 0.114 B
    np.testing.assert_array_equal(found.observations(pictures), [[[255, 76], [150, 29]]])
    assert found.observation_space == spaces.Box(0, 255, (2, 2), np.uint8)


def test_grey_is_what_the_emulator_shows() -> None:
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    env = gym.make("ALE/Breakout-v5")
    colours, _ = env.reset(seed=0)
    grey = env.unwrapped.ale.getScreenGrayscale()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(piped("grey", env.observation_space).observations(colours[None])[0], grey)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (3, 4, 4)])
def test_resize_takes_means_over_areas(shape: tuple[int, ...]) -> None:
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, *shape)).astype(np.uint8)
    found = piped("resize:2", spaces.Box(0, 255, shape, np.uint8))
    out = found.observations(pictures)
    last = np.moveaxis(pictures, 1, -1) if shape[0] == 3 else pictures
    blocks = last.reshape(5, 2, 2, 2, 2, *last.shape[3:]).astype(float).mean(axis=(2, 4))
    expected = np.moveaxis(blocks, -1, 1) if shape[0] == 3 else blocks
    assert out.shape == expected.shape == (5, *found.observation_space.shape)
    assert np.abs(out - expected).max() <= 0.5


def test_atari_leaves_what_is_right_alone() -> None:
    pytest.importorskip("cv2")
    for shape in ((84, 84), (4, 84, 84), (84, 84, 1)):
        pictures = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
        found = piped("atari", spaces.Box(0, 255, shape, np.uint8))
        assert found.observations(pictures) is pictures
    wide = piped("atari", spaces.Box(0, 255, (210, 160, 3), np.uint8))
    assert wide.observation_space == spaces.Box(0, 255, (84, 84), np.uint8)


def test_atari_is_what_gymnasiums_preprocessing_makes_of_one_frame() -> None:
    pytest.importorskip("cv2")
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    raw = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    processed = gym.wrappers.AtariPreprocessing(
        gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0), noop_max=0, frame_skip=1
    )
    pipeline = piped("atari", raw.observation_space)
    a, b = raw.reset(seed=1)[0], processed.reset(seed=1)[0]
    for action in (2, 2, 3, 3, 0):
        np.testing.assert_array_equal(pipeline.observations(a[None])[0], b)
        a, b = raw.step(action)[0], processed.step(action)[0]


def test_public_atari_frames_are_learnt_from_as_small_ones_are() -> None:
    """One play of Breakout, recorded in colours and as 84x84 grey frames: the same data, so the same weights."""
    pytest.importorskip("cv2")
    gym.register_envs(pytest.importorskip("ale_py"))
    colours = gym.make("ALE/Breakout-v5")
    small = gym.wrappers.AtariPreprocessing(gym.make("ALE/Breakout-v5"), noop_max=0, frame_skip=1)
    models = []
    for env, name, transforms in ((colours, "colours", "atari"), (small, "small", None)):
        # outside, because AtariPreprocessing shows an old frame where a limit below it ends an episode
        record(None, gym.wrappers.TimeLimit(env, 120), f"same/{name}-v0", n_episodes=2, seed=3)
        kwargs = {"transforms": transforms, "storage": "ram"}
        model = CQL(
            "CnnPolicy", f"same/{name}-v0", seed=0, device="cpu", batch_size=8, dataset_kwargs=kwargs,
            policy_kwargs={"n_quantiles": 5},
        ).learn(5)  # fmt: skip
        models.append(model)
    first, second = models
    assert first.observation_space == second.observation_space == spaces.Box(0, 255, (4, 84, 84), np.uint8)
    np.testing.assert_array_equal(first.replay_buffer.frames.array, second.replay_buffer.frames.array)
    for ours, theirs in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach().numpy(), theirs.detach().numpy())
    env = make_eval_env("same/colours-v0", transforms="atari")
    assert env.observation_space == first.observation_space
    assert first.predict(env.reset())[0].shape == (1,)


def test_max_pool_looks_one_picture_back() -> None:
    pictures = np.array([[[1, 9]], [[5, 2]], [[3, 3]]], np.uint8)
    out = piped("max_pool", spaces.Box(0, 255, (1, 2), np.uint8)).observations(pictures)
    np.testing.assert_array_equal(out, [[[1, 9]], [[5, 9]], [[5, 3]]])


def test_one_hot_makes_a_plane_for_each_thing() -> None:
    picture = np.array([[[[1, 0], [0, 2]]]], np.uint8)  # [1, 1, 2, 2]: objects of 2, colours of 3
    found = piped("one_hot:2,3", spaces.Box(0, 255, (1, 2, 2), np.uint8))
    out = found.observations(picture)
    np.testing.assert_array_equal(out[0, :, 0], [[0, 1], [1, 0], [1, 0], [0, 0], [0, 1]])
    assert found.observation_space == spaces.Box(0, 1, (5, 1, 2), np.uint8)
    with pytest.raises(DatasetError, match="there is a 2 where 0 to 1 may be"):
        found.observations(picture + np.array([1, 0], np.uint8))


def test_tokens_are_numbers_of_words() -> None:
    space = spaces.Dict({"mission": spaces.Text(64), "x": spaces.Box(0, 1, (1,))})
    texts = [{"mission": ["Go to the red ball!", "open a door"], "x": np.zeros((2, 1))}]
    found = Pipeline("tokens", space, ACTIONS, "it", lambda: texts)
    (name,) = found.names
    assert name == "tokens:5,a,ball,door,go,open,red,the,to"
    again = Pipeline(name, space, ACTIONS, "it")
    batch = {"mission": np.array(["go to a blue ball of the sea", "Open!"], object), "x": np.zeros((2, 1))}
    for pipeline in (found, again):
        assert pipeline.observation_space["mission"] == spaces.MultiDiscrete([10] * 5)  # type: ignore[index]
        # a=2 ball=3 door=4 go=5 open=6 red=7 the=8 to=9; 1 is unknown, 0 nothing
        np.testing.assert_array_equal(pipeline.observations(batch)["mission"], [[5, 9, 2, 1, 3], [6, 0, 0, 0, 0]])
    assert again.names == found.names


def test_rewards_are_scaled_shifted_and_clipped_in_order() -> None:
    space = spaces.Box(-1, 1, (1,))
    rewards = np.array([-10.0, 0.0, 4.0])
    found = piped(["reward_scale:0.5", "reward_shift:1", "reward_clip:2"], space)
    np.testing.assert_array_equal(found.rewards(rewards), [-2, 1, 2])
    found = piped(["reward_clip:0,3", "reward_scale:-2"], space)
    np.testing.assert_array_equal(found.rewards(rewards), [0, 0, -6])


def test_a_function_of_your_own() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})

    def both(observations: dict[str, Any]) -> Any:
        return np.concatenate([observations["a"], observations["b"][:, None]], axis=1).astype(np.float32)

    found = piped(both, space)
    assert found.observation_space == spaces.Box(-np.inf, np.inf, (3,), np.float32)
    out = found.observations({"a": np.ones((2, 2)), "b": np.array([2, 0])})
    np.testing.assert_array_equal(out, [[1, 1, 2], [1, 1, 0]])
    assert found.names == [both]


class Doubled(Transform):
    """Everything twice, actions halved."""

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        assert isinstance(space, spaces.Box)
        return spaces.Box(2 * space.low, 2 * space.high), action_space

    def observations(self, observations: Any) -> Any:
        return 2 * observations

    def __str__(self) -> str:
        return "doubled"


def test_a_transform_of_your_own_is_bound_anew_each_time() -> None:
    given = Doubled()
    found = piped([given, "reward_scale:2"], spaces.Box(-1, 1, (2,)))
    np.testing.assert_array_equal(found.observations(np.ones((1, 2))), [[2, 2]])
    assert found.names[0] is given, "as it was given: a name of its own choice is none of ours"
    assert found.names[1] == "reward_scale:2"


VECTOR, PICTURE = spaces.Box(-1, 1, (2,)), spaces.Box(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("transform", "space", "message"),
    [
        ("flaten", VECTOR, "no transform 'flaten'; there are .*flatten"),
        (7, VECTOR, "a name or a function, not int"),
        ("grey", VECTOR, "grey needs colour pictures"),
        ("grey", spaces.Box(0, 255, (40, 40), np.uint8), "grey needs colour pictures"),
        ("grey@rgb", GOALS, "no entry 'rgb'; there are 'goal/at'"),
        ("resize", PICTURE, "arguments do not fit"),
        ("resize:big", PICTURE, "size in pixels, as in 'resize:84'"),
        ("resize:0", PICTURE, "size in pixels"),
        ("resize:84", VECTOR, "needs pictures"),
        ("atari", GOALS, "needs pictures"),
        ("keep:seen", VECTOR, "needs Dict observations"),
        ("keep", GOALS, "needs the entries' names"),
        ("drop:nothing", GOALS, "no entry 'nothing'"),
        ("drop:goal,seen,mission", GOALS, "no entry would be left"),
        ("one_hot", PICTURE, "as in 'one_hot:11,6,3'"),
        ("one_hot:3", PICTURE, "as many channels"),
        ("tokens", VECTOR, "no vocabulary"),
        ("tokens:2,go", VECTOR, "needs text"),
        ("tokens:red", GOALS, "needs no arguments, or a length and words"),
        ("clip_actions", VECTOR, "needs Box actions"),
        ("reward_scale", VECTOR, "needs a number, as in 'reward_scale:0.1'"),
        ("reward_clip:2,1", VECTOR, "lower bound comes first"),
        ("reward_shift:nan", VECTOR, "needs a number"),
        (lambda x: x[:1], VECTOR, "with two rows"),
        (lambda x: x["a"], VECTOR, "fails on observations of Box"),
    ],
)
def test_what_does_not_fit_is_named(transform: Any, space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(DatasetError, match=f"(?s)it: .*{message}|{message}"):
        piped(transform, space)


def test_text_alone_has_a_remedy_and_a_strange_space_has_one() -> None:
    with pytest.raises(DatasetError, match=r"text alone.*transforms=\['tokens'\]"):
        piped(None, spaces.Text(8))
    strange = spaces.Dict({"x": VECTOR, "list": spaces.Sequence(VECTOR)})
    with pytest.raises(DatasetError, match=r"transforms=\['drop:list'\]"):
        piped(None, strange)
    assert piped("drop:list", strange).observation_space == VECTOR


# ---- data and environment alike ----


class Grid(gym.Env[Any, Any]):
    """Counts its steps in every entry, and knows the words of two missions."""

    observation_space = spaces.Dict(
        {
            "count": spaces.Discrete(9, start=1),
            "deep": spaces.Dict({"at": spaces.Box(-9, 9, (2,), np.float64)}),
            "mission": spaces.Text(32, charset="abcdefghijklmnopqrstuvwxyz "),
            "pixels": spaces.Box(0, 255, (40, 40, 3), np.uint8),
        }
    )
    action_space = spaces.Discrete(3, start=1)

    def _see(self) -> dict[str, Any]:
        pixels = np.random.default_rng(self.t).integers(0, 256, (40, 40, 3)).astype(np.uint8)
        mission = "go to the ball" if self.t % 2 else "open the door"
        deep = {"at": np.array([self.t, -self.t], np.float64)}
        return {"count": np.int64(self.t + 1), "deep": deep, "mission": mission, "pixels": pixels}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._see(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.t += 1
        return self._see(), float(action), self.t == 6, False, {}


gym.register("TransformedGrid-v0", "tests.data.test_transforms:Grid")


def play(env: gym.Env[Any, Any], actions: list[int]) -> tuple[list[Any], list[float]]:
    observations, rewards = [env.reset()[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(float(reward))
    return observations, rewards


@pytest.fixture
def grid(make_dataset: MakeDataset) -> str:
    """Three episodes of the grid; actions 1 2 3 1 2 3."""
    observations, rewards = play(Grid(), [1, 2, 3, 1, 2, 3])
    columns = {
        "count": np.array([o["count"] for o in observations]),
        "deep": {"at": np.stack([o["deep"]["at"] for o in observations])},
        "mission": [o["mission"] for o in observations],
        "pixels": np.stack([o["pixels"] for o in observations]),
    }
    episode = {"observations": columns, "actions": np.array([1, 2, 3, 1, 2, 3]), "rewards": rewards, **flags(6, True)}
    dataset = make_dataset([episode] * 3, Grid.observation_space, Grid.action_space, dataset_id="by/grid-v0")
    dataset.storage.update_metadata({"env_spec": gym.spec("TransformedGrid-v0").to_json()})
    return "by/grid-v0"


@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.parametrize(
    "transforms",
    [
        None,
        "flatten",
        ["tokens", "drop:pixels"],
        ["keep:pixels", "grey", "resize:36", "max_pool"],
        ["grey@pixels", "max_pool", "reward_scale:0.5", "drop:mission"],
        ["drop:mission,pixels", lambda o: o["deep/at"] * np.float32(2)],
    ],
)
def test_data_and_environment_go_through_the_same(grid: str, transforms: Any) -> None:
    buffer = load_minari(grid, transforms=transforms, frame_stack=1, device="cpu", storage="ram")
    env = make_eval_env(grid, transforms=transforms, frame_stack=1)
    assert env.observation_space == buffer.observation_space
    assert env.action_space == buffer.action_space == spaces.Discrete(3)
    # the same again by hand, with the names that a model keeps
    single = TransformedEnv(Grid(), buffer.info["transforms"])
    seen, rewards = play(single, [0, 1, 2, 0, 1, 2])
    samples = sample_transitions(grid, 18, transforms=transforms)
    batch = buffer._get_samples(np.arange(6))
    np.testing.assert_allclose(batch.rewards[:, 0], rewards)
    np.testing.assert_array_equal(batch.actions[:, 0], [0, 1, 2, 0, 1, 2])
    first = env.reset()
    for key in seen[0] if isinstance(seen[0], dict) else [None]:
        wanted = np.stack([o if key is None else o[key] for o in seen])
        now = batch.observations if key is None else batch.observations[key]  # type: ignore[index]
        then = batch.next_observations if key is None else batch.next_observations[key]  # type: ignore[index]
        drawn = samples.observations if key is None else samples.observations[key]
        np.testing.assert_allclose(now.numpy().reshape(6, -1), wanted[:-1].reshape(6, -1), rtol=1e-6)
        np.testing.assert_allclose(then.numpy().reshape(6, -1), wanted[1:].reshape(6, -1), rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(drawn[:6]).reshape(6, -1), wanted[:-1].reshape(6, -1))
        one = first if key is None else first[key]
        np.testing.assert_allclose(np.asarray(one).reshape(-1), wanted[0].reshape(-1))


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_a_model_keeps_its_transforms(grid: str, tmp_path: Path) -> None:
    kwargs = {"transforms": ["tokens", "drop:pixels"], "storage": "ram"}
    model = CQL("MultiInputPolicy", grid, seed=0, device="cpu", dataset_kwargs=kwargs).learn(3)
    vocabulary = "tokens:4,ball,door,go,open,the,to"
    assert model.dataset_info["transforms"] == [vocabulary, "drop:pixels"]
    model.save(tmp_path / "model")
    again = CQL.load(tmp_path / "model", device="cpu")
    assert again.dataset_info["transforms"] == [vocabulary, "drop:pixels"]
    again.set_dataset(grid)
    again.learn(2, reset_num_timesteps=False)
    env = make_eval_env(grid, transforms=again.dataset_info["transforms"])
    action, _ = again.predict(env.reset(), deterministic=True)
    env.step(action)
    again.learn_online(30, env=env)
    assert again.num_timesteps == 32  # updates come every 4 steps


def test_text_that_is_left_out_gives_one_notice(grid: str) -> None:
    with pytest.warns(UserWarning, match=r"the text in 'mission' is left out. transforms=\['tokens'\]") as found:
        CQL("MultiInputPolicy", grid, seed=0, device="cpu", dataset_kwargs={"transforms": "drop:pixels"})
    assert len([w for w in found if "left out" in str(w.message)]) == 1


def test_cached_data_is_that_of_its_transforms(grid: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = load_minari(grid, transforms="drop:pixels,mission", device="cpu")
        doubled = load_minari(grid, transforms=["drop:pixels,mission,count", lambda o: 2 * o], device="cpu")
        tripled = load_minari(grid, transforms=["drop:pixels,mission,count", lambda o: 3 * o], device="cpu")
    at = plain._get_samples(np.array([3])).observations["deep/at"].numpy()  # type: ignore[index]
    np.testing.assert_array_equal(at, [[3, -3]])
    np.testing.assert_array_equal(doubled._get_samples(np.array([3])).observations, [[6, -6]])
    np.testing.assert_array_equal(tripled._get_samples(np.array([3])).observations, [[9, -9]])


@pytest.mark.parametrize("storage", ["mmap", "compressed", "ram", "device"])
def test_entries_are_drawn_together_from_every_storage(grid: str, storage: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = load_minari(grid, storage=storage, device="cpu", n_steps=3, gamma=0.5)
    batch = buffer._get_samples(np.array([0, 4, 5]))
    now, then = batch.observations, batch.next_observations
    assert isinstance(now, dict)
    assert isinstance(then, dict)
    np.testing.assert_array_equal(now["deep/at"][:, 0], [0, 4, 5])
    np.testing.assert_array_equal(then["deep/at"][:, 0], [3, 6, 6])
    np.testing.assert_array_equal(now["count"], [[0], [4], [5]])
    np.testing.assert_allclose(batch.rewards[:, 0], [1 + 1 + 0.75, 2 + 1.5, 3])
    pixels = np.stack([np.random.default_rng(t).integers(0, 256, (40, 40, 3)) for t in (3, 6, 6)])
    np.testing.assert_array_equal(then["pixels"], np.moveaxis(pixels, -1, 1))


class Walk(gym.Env[Any, Any]):
    """Moves by its action, which must be between -1 and 1."""

    observation_space, action_space = spaces.Box(-9, 9, (1,)), spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return np.asarray(action, np.float32), 0.0, False, False, {}


def test_actions_are_clipped_on_request_in_both(make_dataset: MakeDataset) -> None:
    actions = np.array([[0.5], [1.01], [-1.5], [0.0]], np.float32)
    episode = {
        "observations": np.zeros((5, 1), np.float32),
        "actions": actions,
        "rewards": [0.0] * 4,
        **flags(4, False),
    }
    dataset = make_dataset([episode], Walk.observation_space, Walk.action_space)
    message = r"step 1: action \[1.01\] is outside .* 50.00% of this episode's steps. .*\['clip_actions'\]"
    with pytest.raises(DatasetError, match=message):
        load_minari(dataset, device="cpu")
    with pytest.warns(UserWarning, match="50.00% of the steps had actions outside their bounds, which are clipped"):
        buffer = load_minari(dataset, transforms="clip_actions", device="cpu")
    np.testing.assert_array_equal(buffer._get_samples(np.arange(4)).actions[:, 0], [0.5, 1, -1, 0])
    env = TransformedEnv(Walk(), "clip_actions")
    env.reset()
    assert env.step(np.array([3.0], np.float32))[0] == 1
    walk = Walk.observation_space, Walk.action_space
    wrong = make_dataset([{**episode, "actions": actions + 9}], *walk, dataset_id="by/wrong-v0")
    with pytest.raises(DatasetError, match="all actions are outside"):
        load_minari(wrong, transforms="clip_actions", device="cpu")


def test_the_spaces_are_told_without_reading(grid: str) -> None:
    observations, actions = dataset_spaces(grid, ["drop:mission,pixels"])
    expected = OrderedDict([("count", spaces.Discrete(9)), ("deep/at", spaces.Box(-9, 9, (2,), np.float64))])
    assert observations == spaces.Dict(expected)
    assert actions == spaces.Discrete(3)


@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.parametrize("storage", ["ram", "mmap"])
def test_returns_are_told_as_the_environment_gives_them(grid: str, storage: str) -> None:
    for _ in range(2):  # the second time from the cache
        buffer = load_minari(grid, transforms=["drop:pixels", "reward_scale:10"], device="cpu", storage=storage)
        assert buffer.info["behaviour_return"]["mean"] == 12
        assert buffer.episode_returns().tolist() == [120, 120, 120]
    assert verify_dataset(grid, ["drop:pixels", "reward_clip:1"]).facts["behaviour_return"]["mean"] == 12


@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.parametrize("algorithm", [BC, CQL])
def test_learning_from_entries_continues_bit_for_bit(grid: str, algorithm: Any, tmp_path: Path) -> None:
    def fresh() -> Any:
        settings = {"seed": 3, "device": "cpu", "batch_size": 8, "learning_rate": 1e-3}
        kwargs = {"transforms": ["tokens", "drop:pixels"], "storage": "ram"}
        return algorithm("MultiInputPolicy", grid, dataset_kwargs=kwargs, **settings)

    whole = fresh().learn(10)
    fresh().learn(5).save(tmp_path / "half")
    half = algorithm.load(tmp_path / "half", device="cpu")
    half.set_dataset(grid)
    half.learn(5, reset_num_timesteps=False)
    for ours, theirs in zip(half.policy.parameters(), whole.policy.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach().numpy(), theirs.detach().numpy())


def test_what_is_recorded_through_transforms_can_be_built_again() -> None:
    env = TransformedEnv(gym.make("CartPole-v1"), ["flatten", "reward_scale:3"])
    dataset = record(None, env, "by/transformed-v0", n_episodes=2)
    assert set(np.concatenate([e.rewards for e in dataset])) == {3.0}
    again = make_eval_env(dataset)
    again.reset()
    assert again.step(np.array([0]))[1][0] == 3
    with pytest.raises(ValueError, match="spec cannot be stored as JSON"):
        record(None, TransformedEnv(gym.make("CartPole-v1"), lambda x: x), "by/function-v0", n_episodes=1)
