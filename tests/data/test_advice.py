"""Whoever follows a message's advice gets on: no message may lead to another refusal."""

import json
import re
import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from minari.serialization import serialize_space
from minari.storage.datasets_root_dir import get_dataset_path
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ext import BC, CQL, GAIL, EfficientZeroV2, load_minari, make_eval_env
from sb3_ext.data import TransformedEnv
from tests.data.families import FAMILIES, Family, make
from tests.helpers import SMALL, flags

pytestmark = pytest.mark.filterwarnings("ignore:.*")
POLICIES = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")
KINDS: dict[str, Family] = {family.id: family for family in FAMILIES if family.id.startswith(("other", "minigrid"))}
KINDS |= {
    family.id: family
    for family in (
        Family("kind/vector-v0", spaces.Box(-1, 1, (3,)), spaces.Discrete(2)),
        Family("kind/text-v0", spaces.Text(32, charset="abcdefghijklmnopqrstuvwxyz "), spaces.Discrete(2)),
        Family("kind/picture-v0", spaces.Box(0, 255, (40, 40), np.uint8), spaces.Discrete(2), raw_pictures=True),
        Family("kind/stack-v0", spaces.Box(0, 255, (4, 40, 40), np.uint8), spaces.Discrete(2)),
        Family("kind/floats-v0", spaces.Box(0, 1, (3, 40, 40), np.float32), spaces.Discrete(2)),
        Family("kind/continuous-v0", spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,), np.float32)),
        Family("kind/goals-v0", spaces.Dict({"a": spaces.Box(-1, 1, (3,))}), spaces.Box(-1, 1, (2,), np.float32)),
    )
}


def followed(message: str, policy: str, kwargs: dict[str, Any], algorithm: Any) -> tuple[str, dict[str, Any], Any]:
    """Do what a message says, by its words alone."""
    if found := re.search(r"Use '(\w+)'", message):
        policy = found[1]
    if found := re.search(r"transforms=\['([^']+)'\]", message):
        kwargs = {**kwargs, "transforms": [*kwargs.get("transforms", []), found[1]]}
    if found := re.search(r"(BC) clones", message):
        algorithm = {"BC": BC}[found[1]]
    return policy, kwargs, algorithm


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_policies_and_spaces(kind: str, policy: str) -> None:
    """Refusals may follow one another, but each advice is new and the third attempt learns."""
    dataset = make(KINDS[kind])
    for algorithm in (BC, CQL):
        attempt: Any = policy, {"storage": "ram"}, algorithm
        seen: list[Any] = []
        while attempt is not None:
            assert attempt not in seen, f"nothing new after {seen}"
            seen.append(attempt)
            attempt = refused(dataset, *attempt)
        assert len(seen) <= 3, seen
        if kind != "kind/text-v0" and isinstance(KINDS[kind].actions, spaces.Discrete):
            assert len(seen) <= 2, f"one advice must do: {seen}"


def refused(dataset: str, policy: str, kwargs: dict[str, Any], algorithm: Any) -> Any:
    """Try to learn; what the message advises, or None if it went well."""
    try:
        algorithm(policy, dataset, seed=0, device="cpu", dataset_kwargs=kwargs).learn(2)
    except (ValueError, TypeError) as error:
        return followed(str(error), policy, kwargs, algorithm)
    return None


class Shown(gym.Env[Any, Any]):
    """Random observations of a space, for some steps."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space, self.t = observation_space, action_space, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.observation_space.sample(), 0.0, False, self.t > 9, {}


GOALS = next(family for family in FAMILIES if family.id == "D4RL/pointmaze/umaze-v2")


def goals() -> gym.Env[Any, Any]:
    bounded = {key: spaces.Box(-1, 1, entry.shape, entry.dtype) for key, entry in GOALS.observations.items()}  # type: ignore[attr-defined]
    return Shown(spaces.Dict(bounded), GOALS.actions)


SHORT: dict[str, Any] = {"n_steps": 20, "batch_size": 20, "disc_batch_size": 20, "device": "cpu", "seed": 0}


def test_gail_learns_from_goals_as_its_message_says() -> None:
    dataset = make(GOALS)
    with pytest.raises((TypeError, ValueError), match=r"TransformedEnv\(env, 'flatten'\)"):
        GAIL("MultiInputPolicy", goals(), dataset, **SHORT)
    for env in (TransformedEnv(goals(), "flatten"), gym.wrappers.FlattenObservation(goals())):
        model = GAIL("MlpPolicy", env, dataset, **SHORT).learn(20)
        assert model.observation_space.shape == (8,)


def test_efficientzero_learns_from_goals_as_its_message_says() -> None:
    dataset = make(GOALS)
    with pytest.raises((TypeError, ValueError), match=r"TransformedEnv\(env, 'flatten'\)"):
        EfficientZeroV2("MlpPolicy", goals(), **SMALL)
    model = EfficientZeroV2("MlpPolicy", TransformedEnv(goals(), "flatten"), **SMALL)
    model.pretrain(dataset, gradient_steps=2)
    assert model.replay_buffer.size() == 48  # type: ignore[union-attr]


def test_a_transformed_environment_takes_the_dataset_along() -> None:
    grid = next(family for family in FAMILIES if family.id.startswith("minigrid"))
    space = spaces.Dict({**grid.observations.spaces, "mission": spaces.Text(32, charset="abcdefghijklmnopqrstuvwxyz ")})  # type: ignore[attr-defined]
    env = DummyVecEnv([lambda: TransformedEnv(Shown(space, grid.actions), ["drop:mission", "flatten"])])
    model = GAIL("MlpPolicy", env, make(grid), **SHORT).learn(20)
    assert model.observation_space.shape == (7 * 7 * 3 + 4,)


# ------------------------------------------------------------------ bad input deep inside


def damaged(change: Any, kind: str = "D4RL/kitchen/complete-v2") -> str:
    """A twin with something wrong in episode 2, on its disk."""
    family = next(family for family in FAMILIES if family.id == kind)
    name = make(family)
    with h5py.File(get_dataset_path(name) / "data" / "main_data.hdf5", "a") as file:
        change(file["episode_2"])
    return name


def put(path: str, value: Any, at: Any = None) -> Any:
    def change(episode: Any) -> None:
        if at is None:
            del episode[path]
            episode.create_dataset(path, data=value)
        else:
            episode[path][at] = value

    return change


def without(path: str) -> Any:
    def change(episode: Any) -> None:
        del episode[path]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("observations/achieved_goal/kettle", np.nan, (5, 3)),
            r"step 5: the observation's 'achieved_goal/kettle' has NaN.*filter_episodes",
        ),
        (put("observations/observation", np.inf, (0, 0)), r"step 0: the observation's 'observation' has NaN, infinite"),
        (without("observations/desired_goal/microwave"), r"no entry 'desired_goal/microwave'.*filter_episodes"),
        (without("observations/achieved_goal"), r"no entry 'achieved_goal"),
        (
            put("observations/desired_goal/kettle", np.zeros((13, 6))),
            r"observations's 'desired_goal/kettle' have shape \(6,\), .* says \(7,\)",
        ),
        (
            put("observations/observation", np.zeros((12, 59))),
            r"12 observations\['observation'\] for 12 rewards, expected 13",
        ),
        (put("actions", np.zeros((12, 8), np.float32)), r"actions have shape \(8,\), .* says \(9,\)"),
        (put("actions", 7.0, (4, 2)), r"step 4: action .* is outside .*clip_actions"),
    ],
)
def test_what_is_wrong_deep_inside_is_named(change: Any, message: str) -> None:
    name = damaged(change)
    for storage in ("mmap", "ram"):
        with pytest.raises(ValueError, match=rf"(?s)^{name}, episode 2.*{message}"):
            BC("MultiInputPolicy", name, device="cpu", dataset_kwargs={"storage": storage})


def test_shapes_of_actions_that_mean_the_same(make_dataset: Any) -> None:
    def one(actions: Any) -> dict[str, Any]:
        return {
            "observations": np.zeros((5, 1), np.float32),
            "actions": actions,
            "rewards": np.zeros(4),
            **flags(4, True),
        }

    space = spaces.Box(-1, 1, (1,))
    column = load_minari(make_dataset([one(np.linspace(-1, 1, 4))], space, spaces.Box(-1, 1, (1,))), device="cpu")
    np.testing.assert_allclose(column._get_samples(np.arange(4)).actions[:, 0], np.linspace(-1, 1, 4), rtol=1e-6)
    hot = np.eye(3)[[2, 0, 1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = load_minari(make_dataset([one(hot)], space, spaces.Discrete(3), dataset_id="by/hot-v0"), device="cpu")
    np.testing.assert_array_equal(buffer._get_samples(np.arange(4)).actions[:, 0], [2, 0, 1, 1])


def test_an_environment_that_shows_something_else_is_named() -> None:
    spec = json.loads(gym.spec("CartPole-v1").to_json())
    vector = Family("by/other-v0", spaces.Box(-1, 1, (3,)), spaces.Discrete(2), spec)
    with pytest.raises(ValueError, match=r"by/other-v0: its environment shows Box.*\(4,\).*the data has Box.*\(3,\)"):
        make_eval_env(make(vector))


def test_a_file_of_another_structure_is_not_called_damaged() -> None:
    name = damaged(without("observations"))
    with pytest.raises(ValueError, match=rf"^{name}, episode 2 cannot be read \(KeyError.*Delete the dataset"):
        BC("MultiInputPolicy", name, device="cpu")
    vector = Family("by/array-v0", spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    for data_format in ("hdf5", "arrow"):
        other = replace(vector, id=f"by/{data_format}-v0", data_format=data_format)
        file = get_dataset_path(make(other)) / "data" / "metadata.json"
        metadata = json.loads(file.read_text())
        metadata["observation_space"] = serialize_space(spaces.Dict({"x": spaces.Box(-1, 1, (3,))}))
        file.write_text(json.dumps(metadata))
        with pytest.raises(
            ValueError, match=r"episode 0 cannot be read: the metadata says .*Dict.* the file has one array"
        ):
            load_minari(other.id, device="cpu")
