"""``--validation``: held-out episodes, and runs in parts that keep their evaluations on them."""

from __future__ import annotations

from pathlib import Path

import minari
import numpy as np
import pytest
import torch as th
import yaml

from sb3_ext import BC, split_dataset
from sb3_ext.zoo.runs import find_run, steps_of
from tests.zoo.helpers import DATASET, NAME, SMALL, fails, stop_at, train, weights

HELD_OUT = ("--validation", "0.2", "--validation-freq", "10")


def test_the_rest_is_learnt_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--validation", "0.2", algo="bc", n=40) == 0
    run = find_run("logs", "bc", NAME)
    learnt = BC.load(run.final, device="cpu").dataset_info
    total = minari.load_dataset(DATASET).total_episodes
    assert learnt["episodes"] == total - round(0.2 * total)
    assert learnt["steps"] == split_dataset(DATASET, 0.2)[0].total_steps
    with np.load(run.path / "offline_evaluations.npz") as file:
        assert file["timesteps"].tolist() == list(range(2, 41, 2)), "a twentieth of n"
        best = file["timesteps"][file["log_likelihood"].argmax()]
    assert steps_of(run.best) == best
    assert "No evaluation" not in capsys.readouterr().out


def test_interrupted_and_resumed_equals_uninterrupted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*HELD_OUT, "--validation-criterion", "td_error", *SMALL)
    assert train("-f", "whole", *words) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 33)
        assert train("-f", "parts", "--resume", *words) == 0
    assert train("-f", "parts", "--resume", *words) == 0
    one, two = (find_run(folder, "cql", NAME) for folder in ("whole", "parts"))
    first, second = weights(one.final), weights(two.final)
    assert all(th.equal(first[k], second[k]) for k in first)
    with np.load(one.path / "offline_evaluations.npz") as a, np.load(two.path / "offline_evaluations.npz") as b:
        assert a["timesteps"].tolist() == [10, 20, 30, 40, 50, 60]
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])
    assert steps_of(one.best) == steps_of(two.best)


def test_with_an_environment_its_returns_choose_the_best(here: Path) -> None:
    assert train(*HELD_OUT, "--eval-freq", "20", "--eval-episodes", "1", *SMALL, n=20) == 0
    run = find_run("logs", "cql", NAME)
    assert (run.path / "evaluations.npz").exists()
    assert (run.path / "offline_evaluations.npz").exists()
    assert steps_of(run.best) == 20


def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, train("--validation", "0.1", algo="dqn"), "dqn learns in an environment")
    fails(capsys, train("--validation", "1.5"), "between 0 and 1")
    fails(capsys, train("--validation", "0.001"), "nothing to validate with", "Choose a share from")
    fails(capsys, train("--validation-freq", "5"), "--validation-freq needs --validation SHARE")
    fails(capsys, train("--validation-criterion", "fqe"), "--validation-criterion needs")
    fails(capsys, train("--validation", "0.2", "--validation-freq", "0"), "--validation-freq must be at least 1")
    words = ("--validation", "0.2", "--validation-criterion", "td_error")
    fails(capsys, train(*words, algo="bc"), "BC has no 'td_error'")
    assert not list(here.glob("logs/*/*")), "no run was begun"
    assert train("--validation", "0.2", "--resume", *SMALL, n=5) == 0
    capsys.readouterr()
    fails(capsys, train("--validation", "0.3", "--resume", *SMALL, n=9), "--validation 0.2, not 0.3")
    fails(capsys, train("--resume", *SMALL, n=9), "--validation 0.2, not None")


def test_the_plan_shows_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--validation", "0.2", "--dry-run", n=60) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert (plan["validation"], plan["validation_freq"]) == (0.2, 3)
