"""Bad data is refused before any training starts, with the place and the remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces

from sb3_ext.data import DatasetError, load_minari, make_eval_env, verify_dataset
from sb3_ext.data.checks import check_episode, frames_per_observation
from sb3_ext.data.source import open_source
from tests.helpers import MakeDataset, flags

SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float32)


def episode(steps: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "observations": np.arange(2 * steps + 2, dtype=np.float32).reshape(-1, 2),
        "actions": np.arange(steps) % 3,
        "rewards": np.ones(steps),
        **flags(steps, True),
        **changes,
    }


def replaced(array: np.ndarray, at: Any, value: float) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


def ones_at(*steps: int) -> np.ndarray:
    flags = np.zeros(4, bool)
    flags[list(steps)] = True
    return flags


def refused(dataset: Any, tmp_path: Path, match: str, **kwargs: Any) -> None:
    for storage in ("mmap", "compressed", "ram"):
        with pytest.raises(DatasetError, match=match):
            load_minari(dataset, storage=storage, device="cpu", **kwargs)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------ spaces


@pytest.mark.parametrize(
    ("observation_space", "action_space", "match"),
    [
        (SPACE, spaces.Box(-1, 1, (), np.float32), "action_space is Box.*can be learnt"),
        (SPACE, spaces.Dict({"a": spaces.Discrete(2)}), "action_space is Dict.*can be learnt"),
        (spaces.Text(8), spaces.Discrete(3), r"the observations are Text: text alone.*transforms=\['tokens'\]"),
    ],
)
def test_kinds_of_spaces(
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    match: str,
    make_dataset: MakeDataset,
    tmp_path: Path,
) -> None:
    sampled = [observation_space.sample() for _ in range(5)]
    observations: Any = sampled if isinstance(sampled[0], str) else np.array(sampled)
    drawn = [action_space.sample() for _ in range(4)]
    actions: Any = {"a": np.array([a["a"] for a in drawn])} if isinstance(drawn[0], dict) else np.array(drawn)
    dataset = make_dataset([episode(observations=observations, actions=actions)], observation_space, action_space)
    refused(dataset, tmp_path, "by/hand-v0: " + match)


# ------------------------------------------------------------------ values


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"observations": replaced(episode()["observations"], (3, 1), np.nan)}, "step 3: the observation has NaN"),
    "infinite": ({"observations": replaced(episode()["observations"], (4, 0), -np.inf)}, "step 4: the observation"),
    "too large": (
        {"observations": replaced(episode()["observations"].astype(np.float64), (1, 0), 1e39)},
        "step 1: the observation has NaN, infinite or too large",
    ),
    "reward NaN": ({"rewards": np.array([0, 1, np.nan, 1])}, "step 2: the reward is nan"),
    "reward infinite": ({"rewards": np.array([0, np.inf, 0, 1])}, "step 1: the reward is inf"),
    "action too high": ({"actions": np.array([0, 1, 3, 1])}, r"step 2: action 3 is outside Discrete\(3\)"),
    "action negative": ({"actions": np.array([-1, 1, 2, 1])}, "step 0: action -1 is outside"),
    "action broken": ({"actions": np.array([0, 1.5, 2, 1])}, "step 1: action 1.5 is no whole number"),
    "action NaN": ({"actions": np.array([0, 1, np.nan, np.inf])}, "step 2: action nan is no whole number"),
    "terminated early": ({"terminations": ones_at(1, 3)}, "step 1: the episode ends here, but 4 steps are stored"),
    "truncated early": ({"truncations": ones_at(0)}, "step 0: the episode ends here"),
    "T observations": ({"observations": episode(3)["observations"]}, "4 observations for 4 rewards, expected 5"),
    "T + 2 observations": ({"observations": episode(5)["observations"]}, "6 observations for 4 rewards"),
    "actions missing": ({"actions": np.arange(3)}, "3 actions for 4 rewards, expected 4. The episode was not stored"),
    "two actions": ({"actions": np.zeros((4, 2), int)}, r"actions have shape \(2,\), .* action_space says \(\)"),
    "not one-hot": ({"actions": np.ones((4, 3), int)}, r"step 0: action \[1 1 1\] has 3 numbers and is not one-hot"),
    "flags missing": ({"truncations": np.zeros(3, bool)}, "3 truncations for 4 rewards"),
    "terminations missing": ({"terminations": np.zeros(2, bool)}, "2 terminations for 4 rewards"),
    "shape": ({"observations": np.zeros((5, 3), np.float32)}, r"observations have shape \(3,\), .* says \(2,\)"),
    "no step": (episode(0), r"has no step.*filter_episodes\(lambda e: len\(e\) > 0\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_episodes(what: str, make_dataset: MakeDataset, tmp_path: Path) -> None:
    changes, match = BAD[what]
    if what == "no step":  # Minari's HDF5 storage cannot write it
        with pytest.raises(DatasetError, match=r"^x, episode 2 " + match):
            check_episode(episode(0), 2, "x", SPACE, spaces.Discrete(3))
        return
    dataset = make_dataset([episode(), episode(5), episode(**changes), episode()], SPACE)
    refused(dataset, tmp_path, r"^by/hand-v0, episode 2[:,]? .*" + match)


def test_the_good_neighbours_of_a_bad_episode_load(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([episode(), episode(1), episode(5)], SPACE)
    kept = dataset.filter_episodes(lambda e: len(e) > 1)  # as the message says
    assert load_minari(kept, device="cpu").lengths.tolist() == [4, 5]


def test_what_strict_false_lets_pass(make_dataset: MakeDataset) -> None:
    both = episode(terminations=ones_at(3), truncations=ones_at(3))
    dataset = make_dataset([episode(1), both], SPACE)
    for storage in ("ram", "mmap"):
        with pytest.warns(UserWarning, match="strict=True refuses them") as notices:
            buffer = load_minari(dataset, storage=storage, device="cpu")
        assert buffer._get_samples(np.arange(5)).dones.squeeze(1).tolist() == [1, 0, 0, 0, 1]
        assert [str(w.message) for w in notices] == [
            "by/hand-v0: 1 episodes end with a step that is both terminated and truncated. Termination wins; "
            "strict=True refuses them.",
            "by/hand-v0: 1 episodes have one step only. strict=True refuses them.",
        ]
    for storage in ("ram", "mmap"):  # the cache of the lenient call does not count
        with pytest.raises(DatasetError, match=r"episode 0 has one step only.*strict=False"):
            load_minari(dataset, strict=True, storage=storage, device="cpu")
    with pytest.raises(DatasetError, match=r"step 3: marked both terminated and truncated.*strict=False"):
        check_episode(both, 0, "x", SPACE, spaces.Discrete(3), strict=True)
    with pytest.raises(DatasetError, match="has no step"):
        check_episode(episode(0), 0, "x", SPACE, spaces.Discrete(3), strict=False)
    with pytest.raises(DatasetError, match="ends here"):
        check_episode(episode(terminations=ones_at(1)), 0, "x", SPACE, spaces.Discrete(3), strict=False)


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_an_empty_episode_in_other_formats(data_format: str, make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode(), episode(0)], SPACE, data_format=data_format)
    for strict in (True, False):
        refused(dataset, tmp_path, r"^by/hand-v0, episode 1 has no step", strict=strict)


def test_actions_in_a_column_and_flags_in_a_column_are_fine() -> None:
    column = episode(actions=np.arange(4)[:, None] % 3, rewards=np.ones((4, 1)), terminations=ones_at(3)[:, None])
    checked = check_episode(column, 0, "x", SPACE, spaces.Discrete(3))
    assert checked.actions.tolist() == [0, 1, 2, 0]
    assert checked.rewards.shape == (4,)
    assert checked.terminated


def test_pictures_stored_as_numbers_that_are_none() -> None:
    space = spaces.Box(0, 255, (2, 2), np.uint8)
    fine = np.full((5, 2, 2), 7.0)
    assert check_episode(episode(observations=fine), 0, "x", space, spaces.Discrete(3)).observations.dtype == np.uint8
    with pytest.raises(DatasetError, match=r"^x, episode 0, step 2: observations are stored as float64"):
        check_episode(episode(observations=replaced(fine, (2, 0, 0), 7.5)), 0, "x", space, spaces.Discrete(3))


@pytest.mark.parametrize("data_format", ["arrow", "parquet", "hdf5"])
def test_an_episode_of_more_rows_than_arrow_reads_at_once(data_format: str, make_dataset: MakeDataset) -> None:
    steps = 40_000
    frames = np.random.default_rng(0).integers(0, 256, (steps + 1, 2, 2), np.uint8)
    long = episode(steps, observations=frames, rewards=np.arange(steps, dtype=np.float64))
    short = episode(observations=frames[:5])
    dataset = make_dataset([short, long], spaces.Box(0, 255, (2, 2), np.uint8), data_format=data_format)
    before, found = open_source(dataset).read_all()
    assert len(before.rewards) == 4
    np.testing.assert_array_equal(found.observations, frames)
    np.testing.assert_array_equal(found.actions, long["actions"])
    np.testing.assert_array_equal(found.rewards, long["rewards"])
    assert found.terminated
    assert verify_dataset(dataset).ok


def test_no_episode_at_all(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([], SPACE)
    refused(dataset, tmp_path, "by/hand-v0: the dataset is empty")


# ------------------------------------------------------------------ damaged files


def data_files(dataset: minari.MinariDataset) -> list[Path]:
    return sorted(f for f in Path(dataset.storage.data_path).rglob("*") if f.is_file() and f.suffix != ".json")


AGAIN = "Delete the dataset and get it again"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_hdf5_file(share: float, make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode(50) for _ in range(6)], SPACE)
    (file,) = data_files(dataset)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused(dataset, tmp_path, rf"(?s)^by/hand-v0(: the data|, episode \d.*) cannot be (opened|read) .*{AGAIN}")


def test_a_damaged_hdf5_file(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode(50) for _ in range(6)], SPACE)
    (file,) = data_files(dataset)
    content = bytearray(file.read_bytes())
    content[500:20_000] = bytes(19_500)
    file.write_bytes(content)
    refused(dataset, tmp_path, rf"(?s)^by/hand-v0, episode \d.*{AGAIN}")


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "noise"])
def test_a_damaged_arrow_or_parquet_file(
    data_format: str, damage: str, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = make_dataset([episode(50) for _ in range(3)], SPACE, data_format=data_format)
    file = data_files(dataset)[1]
    assert file.parent.name == "1"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-20])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(np.random.default_rng(0).bytes(len(content)))
    refused(dataset, tmp_path, rf"(?s)^by/hand-v0, episode 1\b.* cannot be read .*{AGAIN}")


def test_the_hdf5_file_is_gone(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode()], SPACE)
    data_files(dataset)[0].unlink()
    refused("by/hand-v0", tmp_path, rf"^by/hand-v0: the data cannot be opened .*{AGAIN}")


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_fewer_steps_than_the_metadata_says(data_format: str, make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode(), episode(6)], SPACE, data_format=data_format)
    dataset.storage.update_episode_metadata([{"total_steps": 7}], [1])
    refused(dataset, tmp_path, rf"^by/hand-v0, episode 1 has 6 steps, its metadata says 7. {AGAIN}")


def test_more_episodes_in_the_metadata_than_in_the_data(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode(), episode()], SPACE)
    edit_metadata(dataset, lambda m: {**m, "total_episodes": 3})
    refused("by/hand-v0", tmp_path, rf"by/hand-v0, episode 2: its metadata cannot be read .*{AGAIN}")


def edit_metadata(dataset: minari.MinariDataset, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = Path(dataset.storage.data_path) / "metadata.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return file


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda metadata: {k: v for k, v in metadata.items() if k != key}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: [1], "metadata.json cannot be read"),
        (without("total_episodes"), r"metadata.json cannot be read \(KeyError"),
        (lambda m: {**m, "total_episodes": "2"}, "metadata.json cannot be read"),
        (lambda m: {**m, "observation_space": "{"}, "observation_space cannot be read"),
        (lambda m: {**m, "action_space": '{"type": "Nothing"}'}, "action_space cannot be read"),
        (lambda m: {**m, "data_format": "zip"}, "data_format is 'zip'; hdf5, arrow and parquet can be read"),
        (without("action_space"), "its metadata has no action_space"),
    ],
)
def test_broken_metadata(change: Any, match: str, make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode()], SPACE)
    edit_metadata(dataset, change)
    refused("by/hand-v0", tmp_path, match)


def test_metadata_that_is_no_json(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode()], SPACE)
    file = Path(dataset.storage.data_path) / "metadata.json"
    for content in (b"", file.read_bytes()[:-10], b"\xff\xfe"):
        file.write_bytes(content)
        refused("by/hand-v0", tmp_path, rf"metadata.json cannot be read .*{AGAIN}")
    file.unlink()
    refused("by/hand-v0", tmp_path, rf"metadata.json cannot be read .*{AGAIN}")  # as an interrupted download leaves it


def test_an_environment_that_cannot_be_built(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([episode()], SPACE)
    edit_metadata(dataset, without("observation_space"))
    refused("by/hand-v0", tmp_path, r"no observation_space.*--build-env")
    refused("by/hand-v0", tmp_path, r"has no observation_space and names no environment", build_env=True)
    spec = gym.spec("CartPole-v1").to_json().replace("gymnasium.envs.classic_control.cartpole", "cart_poles.env")
    edit_metadata(dataset, lambda m: {**m, "env_spec": spec, "requirements": ["numpy", "cart-poles>=2"]})
    missing = (
        r"its environment cannot be built \(ModuleNotFoundError.* Install what it needs: pip install 'cart-poles>=2'$"
    )
    refused("by/hand-v0", tmp_path, missing, build_env=True)
    with pytest.raises(DatasetError, match=missing):
        make_eval_env("by/hand-v0", build_env=True)


# ------------------------------------------------------------------ no dataset


def test_an_unknown_id_names_similar_ones(make_dataset: MakeDataset, tmp_path: Path) -> None:
    make_dataset([episode()], SPACE, dataset_id="cartpole/random-v0")
    (tmp_path / "datasets" / "broken-v0" / "data").mkdir(parents=True)  # what else lies there does not matter
    with pytest.raises(
        DatasetError, match=r"'cartpole/randon-v0' is not on this machine \(1 are.* mean 'cartpole/random"
    ):
        load_minari("cartpole/randon-v0")
    (tmp_path / "datasets" / "no id" / "data").mkdir(parents=True)
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load_minari("cartpole/randon-v0")
    assert not (tmp_path / "cache").exists()


def test_a_name_without_version_names_similar_ones(make_dataset: MakeDataset) -> None:
    make_dataset([episode()], SPACE, dataset_id="cartpole/random-v0")
    with pytest.raises(DatasetError, match=r"neither an existing path nor a dataset id.* mean 'cartpole/random-v0'\?"):
        load_minari("cartpole/random")
    with pytest.raises(DatasetError, match=r"neither an existing path nor a dataset id"):
        load_minari("no such file.hdf5")


def test_a_path_that_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.hdf5").write_bytes(b"x")
    for path in (tmp_path / "folder", tmp_path / "file.hdf5", str(tmp_path / "folder")):
        with pytest.raises(DatasetError, match=r"is not a Minari dataset: there is no metadata\.json"):
            load_minari(path)


def test_environments_in_the_place_of_a_dataset() -> None:
    with pytest.raises(TypeError, match=r"'CartPole-v1' is an environment id.*env='CartPole-v1'"):
        load_minari("CartPole-v1")
    with pytest.raises(TypeError, match="not an environment"):
        load_minari(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="not an environment"):
        make_eval_env(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="not int"):
        load_minari(3)  # type: ignore[arg-type]


def test_unknown_options(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([episode()], SPACE)
    with pytest.raises(ValueError, match=r"storage must be one of mmap, compressed, ram, device, not 'disk'"):
        load_minari(dataset, storage="disk")
    with pytest.raises(ValueError, match="frame_stack must be at least 1, got 0"):
        load_minari(dataset, frame_stack=0)
    for subset in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="subset must be in"):
            load_minari(dataset, subset=subset)


def pictures(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


@pytest.mark.parametrize(
    ("recorded", "agent", "frames"),
    [
        (pictures(84, 84), pictures(4, 84, 84), 4),
        (pictures(84, 84), pictures(84, 84), 1),
        (pictures(84, 84, 3), pictures(12, 84, 84), 4),
        (pictures(3, 84, 84), pictures(3, 84, 84), 1),
        (spaces.Box(-1, 1, (5,)), spaces.Box(-1, 1, (5,)), 1),
    ],
)
def test_recorded_frames_in_an_observation_are_counted(recorded: spaces.Box, agent: spaces.Box, frames: int) -> None:
    assert frames_per_observation("a/b-v0", recorded, agent) == frames


@pytest.mark.parametrize(
    ("recorded", "agent"),
    [
        (pictures(84, 84, 3), pictures(4, 84, 84)),
        (pictures(84, 84), pictures(4, 64, 64)),
        (pictures(84, 84), pictures(84, 84, 4)),
        (spaces.Box(-1, 1, (5,)), spaces.Box(-1, 1, (10,))),
    ],
)
def test_observations_that_are_not_made_of_recorded_ones_are_refused(recorded: spaces.Box, agent: spaces.Box) -> None:
    with pytest.raises(DatasetError) as error:
        frames_per_observation("a/b-v0", recorded, agent)
    assert str(recorded.shape) in str(error.value)
    assert str(agent.shape) in str(error.value)
