"""Looking at datasets: list, show, verify, sample."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces

from sb3_ext import record
from sb3_ext.data import download, list_datasets, publish, sample_transitions, show_dataset, verify_dataset
from sb3_ext.data.show import _read_one, picture
from sb3_ext.data.source import open_source
from sb3_ext.data.verify import action_coverage, judge, neighbours_agree, room_above
from sb3_ext.zoo.main import main
from tests.helpers import MakeDataset, flags

VECTOR = spaces.Box(-10, 10, (2,), np.float32)


def episode(steps: int = 5, terminated: bool | None = True, seed: int = 0, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(steps + 1, 2)).astype(np.float32),
        "actions": rng.integers(3, size=steps),
        "rewards": rng.normal(size=steps),
        **flags(steps, terminated),
    } | changes


def test_a_good_dataset(cartpole: minari.MinariDataset) -> None:
    report = verify_dataset(cartpole)
    assert report.ok
    assert report.warnings == []
    lengths = [len(e.rewards) for e in cartpole]
    facts = report.facts
    assert (facts["episodes"], facts["steps"], facts["terminated"]) == (len(lengths), sum(lengths), len(lengths))
    assert facts["episode_length"] == {"min": min(lengths), "mean": np.mean(lengths), "max": max(lengths)}
    actions = np.concatenate([e.actions for e in cartpole])
    assert facts["action_shares"] == pytest.approx([np.mean(actions == a) for a in (0, 1)], abs=1e-4)
    assert facts["neighbours_agree"] == pytest.approx(0.5, abs=0.1)
    assert report.outlook is not None
    assert report.outlook.verdict == "doubtful", "500 steps are few"
    assert [good for good, _ in report.outlook.reasons] == [False, True, True, True]
    assert "whole and valid" in str(report)
    assert "- 5" in str(report)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_every_error_is_found_not_only_the_first(data_format: str, make_dataset: MakeDataset) -> None:
    nan = np.zeros(5)
    nan[3] = np.nan
    both = {"terminations": np.arange(5) == 4, "truncations": np.arange(5) == 4}
    early = {"terminations": np.arange(5) == 2, "truncations": np.zeros(5, bool)}
    infinite = np.zeros((6, 2), np.float32)
    infinite[1] = np.inf
    bad = [
        (episode(rewards=nan), "episode 1, step 3: the reward is nan"),
        (episode(observations=infinite), "episode 2, step 1: the observation has NaN, infinite"),
        (episode(actions=np.array([0, 1, 2, 3, 0])), "episode 3, step 3: action 3 is outside"),
        (episode(**early), "episode 4, step 2: the episode ends here, but 5 steps are stored"),
    ]
    fine = [episode(**both), episode(steps=1), episode(seed=1)]
    dataset = make_dataset([episode(), *(e for e, _ in bad), *fine], VECTOR, data_format=data_format)
    report = verify_dataset(dataset)
    assert not report.ok
    assert len(report.errors) == len(bad)
    for error, (_, message) in zip(report.errors, bad, strict=True):
        assert message in error
    assert report.facts["episodes"] == 4
    assert "1 episodes end with a step that is both terminated and truncated" in report.warnings[0]
    assert "1 episodes have one step only" in report.warnings[1]
    assert report.outlook is not None
    assert report.outlook.verdict == "impossible"


def test_damage_on_the_disk(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([episode(seed=k) for k in range(4)], VECTOR, data_format="arrow")
    folder = Path(dataset.storage.data_path)
    part = next((folder / "2").glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-40])
    report = verify_dataset(folder)
    assert len(report.errors) == 1
    assert "episode 2 cannot be read" in report.errors[0]
    assert report.facts["episodes"] == 3
    (folder / "1" / "metadata.json").unlink()
    assert "episode 1: its metadata cannot be read" in verify_dataset(folder).errors[0]
    (folder / "metadata.json").write_text("{")
    assert "metadata.json cannot be read" in verify_dataset(folder).errors[0]


def test_checksums_of_a_downloaded_dataset(tmp_path: Path) -> None:
    record(None, gym.make("CartPole-v1"), "verify/shared-v0", n_episodes=3, seed=0)
    assert verify_dataset("verify/shared-v0").facts["checksums"] == "none"
    download(publish("verify/shared-v0", tmp_path), overwrite=True)
    report = verify_dataset("verify/shared-v0")
    assert report.ok
    assert report.facts["checksums"] == "all right"
    file = Path(minari.load_dataset("verify/shared-v0").storage.data_path, "metadata.json")
    good = file.read_text()
    file.write_text(good.replace("shared", "shaved"))
    assert (
        "metadata.json is not the file that was published: its SHA-256" in verify_dataset("verify/shared-v0").errors[0]
    )
    file.write_text("{")
    assert len(verify_dataset("verify/shared-v0").errors) == 2
    file.write_text(good)
    (file.parent.parent / "README.md").unlink()
    assert "README.md is not the file that was published: it is missing" in verify_dataset("verify/shared-v0").errors[0]
    (file.parent.parent / "manifest.json").write_text("{}")
    assert "manifest.json is damaged" in verify_dataset("verify/shared-v0").errors[0]


def test_totals_and_returns_that_do_not_fit_the_metadata(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([episode(seed=k) for k in range(4)], VECTOR)
    file = Path(dataset.storage.data_path, "metadata.json")
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "total_steps": 21, "behaviour_return": {"mean": 7.0}}))
    report = verify_dataset(dataset)
    assert "metadata says 21 steps, the episodes have 20" in report.errors[0]
    assert "mean return is 7; it is" in report.warnings[0]
    file.write_text(json.dumps({**good, "total_episodes": 5}))
    assert "episode 4: its metadata cannot be read" in verify_dataset("by/hand-v0").errors[0]
    chosen = dataset.filter_episodes(lambda e: e.id > 1)
    assert verify_dataset(chosen).facts["episodes"] == 2


def test_warnings(make_dataset: MakeDataset) -> None:
    same = [episode(seed=k) for k in (0, 1, 0, 0)]
    report = verify_dataset(make_dataset([*same, episode(terminated=None, seed=5)], VECTOR))
    assert report.ok
    assert report.facts["cut"] == 1
    assert "1 episodes just stop" in report.warnings[0]
    assert "2 of 5 episodes repeat an earlier one bit by bit (2 = 0, 3 = 0)" in report.warnings[1]


def test_lossy_pictures_are_named(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(6, 40, 40), dtype=np.uint8)
    dataset = make_dataset(
        [episode(observations=frames)], spaces.Box(0, 255, (40, 40), np.uint8), data_format="arrow", jpeg_encoding=True
    )
    assert "as JPEG" in verify_dataset(dataset).warnings[0]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-1, 1, (), np.float32), "Nothing here learns such actions"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "Nothing here learns such actions"),
    ],
)
def test_spaces_that_do_not_fit(space: spaces.Space[Any], message: str, make_dataset: MakeDataset) -> None:
    actions = {"a": np.ones(5, int)} if isinstance(space, spaces.Dict) else np.ones(5, np.float32)
    report = verify_dataset(make_dataset([episode(actions=actions)], VECTOR, space))
    assert message in report.errors[0]
    assert report.outlook is None


@pytest.mark.parametrize(
    ("space", "verdict", "first"),
    [
        (spaces.Box(-1, 1, (1,), np.float32), "doubtful", "5 steps"),
        (spaces.MultiBinary(2), "impossible", "neither Discrete nor Box"),
    ],
    ids=["continuous", "binary"],
)
def test_the_outlook_of_other_actions(
    make_dataset: MakeDataset, space: spaces.Space[Any], verdict: str, first: str
) -> None:
    """Continuous actions have no shares; what is neither they nor Discrete is not for CQL."""
    report = verify_dataset(make_dataset([episode(actions=np.zeros((5, *space.shape), space.dtype))], VECTOR, space))
    assert report.ok
    assert report.outlook is not None
    assert report.outlook.verdict == verdict
    assert first in report.outlook.reasons[0][1]
    assert not any("coverage" in text for _, text in report.outlook.reasons)


# ------------------------------------------------------------------ the outlook


def outlook(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "returns": np.array([1.0, 2.0, 3.0, 4.0, 10.0]),
        "steps": 30_000,
        "shares": np.array([0.5, 0.3, 0.2]),
        "agreement": 0.5,
        "rewarded": True,
        "valid": True,
    }
    return judge(**{**facts, **changes}).verdict


def test_the_verdict() -> None:
    steady = np.full(5, 7.0)
    assert outlook() == outlook(agreement=None) == outlook(shares=None, agreement=None, continuous=True) == "expected"
    assert outlook(returns=steady, agreement=0.95) == "cloning"
    for change in (
        {"steps": 10_000},
        {"shares": np.array([0.94, 0.03, 0.03])},
        {"shares": np.array([0.5, 0.5, 0.0])},
        {"returns": steady},
        {"agreement": 0.95},
    ):
        assert outlook(**change) == "doubtful", change
    for change in ({"shares": None}, {"rewarded": False}, {"valid": False}, {"shares": np.array([0.0, 1.0])}):
        assert outlook(**change) == "impossible", change


def test_numbers_of_the_outlook_by_hand() -> None:
    assert action_coverage(np.array([0.25] * 4)) == pytest.approx(1)
    assert action_coverage(np.array([1.0, 0, 0, 0])) == pytest.approx(0.25)
    assert room_above(np.array([-1.0, -1, -1, -1, 1])) == pytest.approx((1 + 0.6) / 0.6)
    states = np.array([[0.0, 1], [0.1, 1], [5, 1], [5.1, 1]], np.float32)  # the second number says nothing
    assert neighbours_agree(states, np.array([0, 0, 1, 0]), np.array([0, 1, 0, 1])) == 0.5
    assert neighbours_agree(states, np.array([0, 0, 1, 0]), np.zeros(4, int)) is None


def test_one_greedy_policy_is_recognised() -> None:
    dataset = record(lambda o: int(o[2] + 0.5 * o[3] > 0), gym.make("CartPole-v1"), "cartpole/greedy-v0", n_episodes=8)
    report = verify_dataset(dataset)
    assert report.facts["neighbours_agree"] > 0.9
    assert report.outlook is not None
    assert report.outlook.verdict == "cloning"


# ------------------------------------------------------------------ list, show, sample, and the command line


def test_list(capsys: pytest.CaptureFixture[str], make_dataset: MakeDataset) -> None:
    assert main(["data", "list"]) == 0
    assert capsys.readouterr().out == "There are no datasets on this machine.\n"
    record(None, gym.make("CartPole-v1"), "a/cart/pole-v0", n_episodes=2, data_format="arrow")
    make_dataset([episode()], VECTOR)
    broken = Path(os.environ["MINARI_DATASETS_PATH"], "bad", "x-v0", "data")
    broken.mkdir(parents=True)
    (broken / "metadata.json").write_text("{}")
    rows = list_datasets()
    assert [row["id"] for row in rows] == ["a/cart/pole-v0", "bad/x-v0", "by/hand-v0"]
    assert (rows[0]["episodes"], rows[0]["algorithm"]) == (2, "random")
    assert (rows[2]["steps"], rows[2]["mean_return"]) == (5, None)
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "episodes", "steps", "mean", "return", "MB"]
    assert lines[1].split()[:2] == ["a/cart/pole-v0", "2"]
    assert "cannot be read (KeyError" in lines[2]


def test_sample(cartpole: minari.MinariDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = sample_transitions(cartpole, 100, seed=3)
    assert len({*zip(drawn.episodes.tolist(), drawn.steps.tolist(), strict=True)}) == 100
    assert 0 < drawn.terminated.sum() < 20
    assert not drawn.truncated.any()
    for k in range(100):
        e, t = cartpole[int(drawn.episodes[k])], int(drawn.steps[k])
        np.testing.assert_array_equal(drawn.observations[k], e.observations[t])
        np.testing.assert_array_equal(drawn.next_observations[k], e.observations[t + 1])
        assert (drawn.actions[k], drawn.rewards[k]) == (e.actions[t], e.rewards[t])
        assert drawn.terminated[k] == e.terminations[t]
    path = str(Path(cartpole.storage.data_path).parent)
    assert main(["data", "sample", path, "-n", "100", "--seed", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[7]["observations"] == pytest.approx(drawn.observations[7].tolist())
    assert main(["data", "sample", path, "-n", "100", "--seed", "3", "--out", str(tmp_path / "a" / "b.npz")]) == 0
    with np.load(tmp_path / "a" / "b.npz") as file:
        np.testing.assert_array_equal(file["next_observations"], drawn.next_observations)
    assert len(sample_transitions(cartpole, 10_000).rewards) == cartpole.total_steps
    assert main(["data", "sample", path, "-n", "0"]) == 2


def test_pictures_are_printed_as_shapes(breakout: minari.MinariDataset) -> None:
    assert json.loads(sample_transitions(breakout, 1).lines()[0])["observations"] == "uint8 (84, 84)"


def test_show(cartpole: minari.MinariDataset, breakout: minari.MinariDataset, tmp_path: Path) -> None:
    from PIL import Image

    for name, dataset in (("vectors", cartpole), ("pictures", breakout)):
        path = show_dataset(dataset, tmp_path / "new" / f"{name}.png", episode=1)
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
    more = show_dataset(breakout, tmp_path / "more.png", frames=24)
    with Image.open(path) as few, Image.open(more) as many:
        assert many.height > few.height
    with pytest.raises(ValueError, match="no episode 99; they go from 0 to 3"):
        show_dataset(breakout, tmp_path / "x.png", episode=99)
    with pytest.raises(ValueError, match="at least 1"):
        show_dataset(breakout, tmp_path / "x.png", frames=0)


def test_show_finds_episodes_of_a_split(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    part, rest = minari.split_dataset(cartpole, sizes=[4, 4], seed=1)
    numbers = part.episode_indices.tolist()
    assert numbers != sorted(numbers)
    for number in numbers:
        shown, episode, _ = _read_one(open_source(part), number)
        assert shown == number
        np.testing.assert_array_equal(episode.observations, cartpole[number].observations)
    missing = int(rest.episode_indices[0])
    between = f"it has 4 between {min(numbers)} and {max(numbers)}"
    with pytest.raises(ValueError, match=f"has no episode {missing}; {between}"):
        show_dataset(part, tmp_path / "x.png", episode=missing)


def test_what_a_picture_shows() -> None:
    grey = np.arange(6400, dtype=np.uint8).reshape(4, 40, 40)
    np.testing.assert_array_equal(picture(grey, spaces.Box(0, 255, (4, 40, 40), np.uint8)), grey[-1])
    colours = np.zeros((40, 40, 3), np.uint8)
    assert picture(colours, spaces.Box(0, 255, (40, 40, 3), np.uint8)).shape == (40, 40, 3)
    planes = np.zeros((4, 10, 10), np.uint8)
    planes[0, 1, 1] = planes[3, 2, 2] = planes[1, 2, 2] = 1
    shown = picture(planes, spaces.Box(0, 1, (4, 10, 10), np.uint8))
    assert (shown[1, 1], shown[2, 2], shown[0, 0]) == (1, 4, 0)


def test_verify_from_the_command_line(
    capsys: pytest.CaptureFixture[str], make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_dataset([episode(seed=k) for k in range(4)], VECTOR)
    assert main(["data", "verify", "by/hand-v0"]) == 0
    out = capsys.readouterr().out
    assert "by/hand-v0: whole and valid" in out
    assert "CQL: doubtful" in out
    assert main(["data", "show", "by/hand-v0"]) == 0
    assert (tmp_path / "by-hand-v0.png").exists()
    bad = episode(actions=np.full(5, 9))
    make_dataset([bad] * 30, VECTOR, dataset_id="by/hand-v1")
    assert main(["data", "verify", "by/hand-v1"]) == 1
    assert "30 errors" in (out := capsys.readouterr().out)
    assert "... and 10 more of the kind 'error'" in out
    assert main(["data", "verify", "by/nothing-v0"]) == 2
    assert "not on this machine" in capsys.readouterr().err
