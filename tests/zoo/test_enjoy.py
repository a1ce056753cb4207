"""Watching trained agents: which model, and pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.zoo.helpers import DATASET, NAME, SMALL, enjoy, fails, train


def test_enjoy_chooses_models_and_finds_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--save-freq", "20", "--eval-freq", "40", "--eval-episodes", "1", *SMALL) == 0
    assert train(*SMALL) == 0
    capsys.readouterr()
    for words, loaded in (
        ((), f"{NAME}_2/{NAME}.zip (60 steps)"),
        (("--exp-id", "1", "--load-checkpoint", "20"), f"{NAME}_1/rl_model_20_steps.zip (20 steps)"),
        (("--exp-id", "1", "--load-last-checkpoint"), f"{NAME}_1/rl_model_60_steps.zip (60 steps)"),
        (("--exp-id", "1", "--load-best"), f"{NAME}_1/best_model.zip (40 steps)"),
    ):
        assert enjoy("--dataset", DATASET, "-n", "600", *words) == 0  # an episode ends after 500 steps
        out = capsys.readouterr().out
        assert loaded in out
        assert "Mean reward: " in out
    assert enjoy("--env", "CartPole-v1", "--n-envs", "2", "--stochastic", "--verbose", "0") == 0
    assert capsys.readouterr().out == ""
    fails(capsys, enjoy("--dataset", DATASET, "--exp-id", "7"), "no run 7", "there are 1, 2")
    fails(capsys, enjoy("--dataset", DATASET, "--load-best"), "no model best_model.zip")
    fails(capsys, enjoy("--dataset", DATASET, "--exp-id", "1", "--load-checkpoint", "7"), "20, 40, 60")
    fails(capsys, enjoy("--dataset", DATASET, "--load-last-checkpoint"), "no checkpoint")
    fails(capsys, enjoy("--env", "Acrobot-v1"), "no run of Acrobot-v1", NAME)
    fails(capsys, enjoy("--dataset", DATASET, "--env", "Acrobot-v1"), "observation_space", "must be the same")


def test_enjoy_needs_no_display_and_writes_videos(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*SMALL) == 0
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        assert enjoy("--dataset", DATASET, "--render") == 0
        assert "No window can be opened" in capsys.readouterr().out
    pytest.importorskip("imageio")
    assert enjoy("--dataset", DATASET, "--video", "videos/a.gif", "-n", "5") == 0
    assert (here / "videos" / "a.gif").read_bytes()[:3] == b"GIF"
    assert "No episode ended within 5 steps" in capsys.readouterr().out
    fails(capsys, enjoy("--dataset", DATASET, "--video", "a.avi"), ".gif or .mp4")
    monkeypatch.setattr("sb3_ext.zoo.enjoy.find_spec", lambda name: None)
    fails(capsys, enjoy("--dataset", DATASET, "--video", "a.mp4"), 'pip install "sb3-ext[report]"')
