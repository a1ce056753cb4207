"""Every public family of Minari datasets: load, look, learn, save, continue, play."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import BC, CQL, ContinuousCQL, load_minari, make_eval_env
from sb3_ext.data import dataset_spaces, policy_for, sample_transitions, show_dataset, verify_dataset
from sb3_ext.data.envs import stacked_space
from tests.data.families import FAMILIES, Family, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is left out", "ignore:.*stored these images as JPEG", "ignore:.*overestimated"
)
BY_ID = [pytest.param(family, id=family.id) for family in FAMILIES]


def algorithms(family: Family) -> list[tuple[type[BC] | type[CQL] | type[ContinuousCQL], dict[str, Any]]]:
    """Those that learn from its actions, with settings that save time."""
    if isinstance(family.actions, spaces.Discrete):
        return [(BC, {}), (CQL, {})]
    if isinstance(family.actions, spaces.Box):
        return [(BC, {}), (ContinuousCQL, {"batch_size": 16, "cql_n_actions": 2, "policy_kwargs": {"net_arch": [32]}})]
    return [(BC, {})]


@pytest.mark.parametrize("family", BY_ID)
def test_a_family_is_loaded_verified_shown_and_sampled(family: Family, tmp_path: Path) -> None:
    dataset, transforms = make(family), family.transforms
    report = verify_dataset(dataset, transforms)
    assert report.ok, report.errors
    assert report.facts["steps"] == 4 * family.steps
    show_dataset(dataset, tmp_path / "look.png", transforms=transforms)
    lines = sample_transitions(dataset, 5, transforms=transforms).lines()
    assert len(lines) == 5
    buffer = load_minari(dataset, transforms=transforms, device="cpu")
    observation_space, action_space = dataset_spaces(dataset, transforms)
    assert buffer.action_space == action_space
    assert buffer.observation_space == stacked_space(observation_space, buffer.frame_stack)
    batch = buffer.sample(64)
    found = batch.observations if isinstance(batch.observations, dict) else {"": batch.observations}
    for key, tensor in found.items():
        space = buffer.observation_space[key] if key else buffer.observation_space
        assert tensor.shape == (64, *(space.shape or (1,)))


@pytest.mark.parametrize("family", BY_ID)
def test_a_family_trains_saves_loads_and_predicts(family: Family, tmp_path: Path) -> None:
    dataset, kwargs = make(family), {"transforms": family.transforms, "storage": "ram"}
    for algorithm, settings in algorithms(family):
        observation_space, _ = dataset_spaces(dataset, family.transforms)
        policy = policy_for(observation_space)
        steps = 20 if policy == "CnnPolicy" else 200
        model = algorithm(policy, dataset, seed=0, device="cpu", dataset_kwargs=kwargs, **settings).learn(steps)
        model.save(tmp_path / "model")
        again = algorithm.load(tmp_path / "model", device="cpu")
        again.set_dataset(dataset)
        again.learn(2, reset_num_timesteps=False)
        assert again.num_timesteps == steps + 2
        action, _ = again.predict(again.observation_space.sample())
        assert again.action_space.contains(
            np.asarray(action, again.action_space.dtype).reshape(again.action_space.shape)
        )


@pytest.mark.parametrize("family", [p for p in BY_ID if p.values[0].needs is not None])
def test_a_family_is_played_where_its_environment_is_installed(family: Family) -> None:
    if importlib.util.find_spec(str(family.needs)) is None:
        pytest.skip(f"{family.needs} is not installed")
    dataset, kwargs = make(family), {"transforms": family.transforms, "storage": "ram"}
    env = make_eval_env(dataset, transforms=family.transforms, seed=0, max_episode_steps=20)
    policy = policy_for(dataset_spaces(dataset, family.transforms)[0])
    model = BC(policy, dataset, env=env, seed=0, device="cpu", dataset_kwargs=kwargs).learn(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        returns, lengths = evaluate_policy(model, env, 1, return_episode_rewards=True)
    assert len(returns) == 1
    assert lengths[0] <= 20


def test_raw_pictures_of_old_minari_are_read_as_they_are(tmp_path: Path) -> None:
    families = {family.id: family for family in FAMILIES}
    old, new = families["atari/breakout/expert-old-v0"], families["atari/breakout/expert-v0"]
    rng = np.random.default_rng(0)  # what the first episode of a twin is drawn from
    expected = rng.integers(0, 256, (old.steps + 1, 210, 160, 3)).astype(np.uint8)
    buffer = load_minari(make(old), frame_stack=1, device="cpu", storage="ram")
    first = buffer._get_samples(np.array([0])).observations[0].numpy()
    np.testing.assert_array_equal(first, np.moveaxis(expected[0], -1, 0))
    with pytest.warns(UserWarning, match="JPEG"):
        lossy = load_minari(make(new), frame_stack=1, device="cpu", storage="ram")
    assert not np.array_equal(lossy._get_samples(np.array([0])).observations[0].numpy(), first)
