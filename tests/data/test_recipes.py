"""The recipes in datasets/: deterministic, listed in the catalogue, used by the benchmark."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import minari
import numpy as np
import pytest

from sb3_ext import make_eval_env
from sb3_ext.data import convert_dqn_replay, make_atari_env, verify_dataset, write_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def recipes_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "datasets"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_the_catalogue_names_every_recipe_and_every_log() -> None:
    from ppo_log import LOGS

    text = (ROOT / "datasets" / "README.md").read_text()
    for name in [p.name for p in (ROOT / "datasets").glob("*.py")] + [log["id"] for log in LOGS.values()]:
        assert f"`{name}" in text or f"[{name}]" in text, name


def test_the_same_seed_gives_the_same_log() -> None:
    from ppo_log import learning_log

    def log(seed: int) -> list[tuple[bytes, bytes, bool]]:
        episodes = learning_log("CartPole-v1", 1024, 0.5, seed, n_steps=64, batch_size=64, n_epochs=2)
        return [(e.packed[0], e.actions.tobytes(), e.terminated) for e in episodes]

    first = log(3)
    assert len(first) > 5
    assert first == log(3)
    assert first != log(4)


def test_the_benchmark_makes_its_data_by_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    import cql_learning
    from ppo_log import LOGS

    made: list[str] = []
    monkeypatch.setattr(cql_learning, "make_dataset", made.append)
    for task in ("cartpole", "minatar"):
        cql_learning.make_data(task)
    assert made == ["CartPole-v1", "MinAtarBreakout-v0"]
    assert {cql_learning.TASKS[t]["dataset"] for t in ("cartpole", "minatar")} == {log["id"] for log in LOGS.values()}


def test_the_benchmark_says_which_recipe_is_missing() -> None:
    import cql_learning

    for task, recipe in {"breakout": "breakout_scripted.py", "babyai": "babyai_bot.py"}.items():
        with pytest.raises(SystemExit, match=recipe):
            cql_learning.make_data(task)


def test_a_share_of_successes_counts_returns_above_0() -> None:
    import cql_learning

    assert cql_learning.share_above_0([0.0, 0.3, 0.9, 0.0]) == 0.5


def test_a_recipe_writes_a_valid_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import ppo_log

    monkeypatch.setitem(ppo_log.LOGS["CartPole-v1"], "steps", 500)
    dataset = ppo_log.make_dataset("CartPole-v1")
    assert dataset.id == "cartpole/mixed-v0"
    assert dataset.storage.metadata["seed"] == 7
    report = verify_dataset(dataset)
    assert report.ok
    assert report.warnings == []
    # every environment runs its 256 steps, so no step is lost but those of one-step episodes
    assert dataset.total_steps == 2048


def test_the_scripted_players_log_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["breakout_log.py", "--steps", "300", "--mistakes", "0.5", "--rows", "200", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "datasets" / "breakout_log.py"), run_name="__main__")
    out = capsys.readouterr().out
    dataset = convert_dqn_replay(tmp_path, "atari/breakout/log-v0", game="Breakout")
    assert f"{dataset.total_episodes} games, {dataset.total_steps} steps" in out
    assert dataset.total_steps >= 300
    assert all(e.terminations[-1] for e in dataset)
    assert np.concatenate([e.rewards for e in dataset]).max() == 1


def test_the_bots_episodes_succeed_as_often_as_it_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("minigrid")
    words = ["babyai_bot.py", "--steps", "600", "--mistakes", "1", "0", "--id", "minigrid/bot-v0"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "datasets" / "babyai_bot.py"), run_name="__main__")
    lost, won, total = capsys.readouterr().out.splitlines()
    assert "0% random moves" in won
    assert won.endswith("100.0% successful")
    dataset = minari.load_dataset("minigrid/bot-v0")
    successes = [bool(e.rewards.sum() > 0) for e in dataset]
    assert lost.startswith("100% random moves")
    assert not all(successes)
    assert dataset.storage.metadata["success_rate"] == pytest.approx(np.mean(successes))
    assert f"{len(successes)} episodes, {dataset.total_steps} steps, {np.mean(successes):.1%} successful" in total
    assert set(dataset[0].observations) == {"image", "direction", "mission"}
    assert dataset[0].observations["image"].shape[1:] == (7, 7, 3)
    assert all(len(set(e.observations["mission"])) == 1 for e in dataset)
    assert dataset[0].observations["mission"][0].startswith("go to the ")
    part = int(lost.split(": ")[1].split()[0])
    moves = np.concatenate([dataset[k].actions for k in range(part)])
    shares = np.bincount(moves, minlength=7) / len(moves)
    assert shares[2] == pytest.approx(
        1 / 2 + 1 / 14, abs=0.08
    )  # forward: half of the random moves, and a 7th of the rest
    assert np.delete(shares, 2) == pytest.approx(1 / 14, abs=0.05)


def test_players_in_many_processes_play_what_they_play_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import breakout_players

    words = ["breakout_players.py", "--steps", "400", "--mistakes", "1", "0.5", "--id", "breakout/two-v0"]
    monkeypatch.setattr(sys, "argv", words)
    breakout_players.main()
    games = [*breakout_players.play(200, 1.0, 0), *breakout_players.play(200, 0.5, 100_000)]
    dataset = minari.load_dataset("breakout/two-v0")
    assert dataset.total_episodes == len(games) >= 2
    for game, episode in zip(games, dataset, strict=True):
        assert game.actions.tobytes() == episode.actions.tobytes()
        assert np.array_equal(game.observations, episode.observations)
        assert np.array_equal(game.rewards, episode.rewards)


def test_agents_play_games_that_are_cut_as_the_players_were(monkeypatch: pytest.MonkeyPatch) -> None:
    import breakout_players

    monkeypatch.setattr(breakout_players, "MAX_STEPS", 30)
    games = breakout_players.play(70, 0.1, 0)
    assert [len(g.actions) for g in games] == [30, 30, 30]
    assert not any(g.terminated for g in games)
    env = make_atari_env("Breakout", max_episode_steps=4 * 30)
    dataset = write_dataset("breakout/cut-v0", games, env, algorithm_name="scripted", description="cut")
    agents = make_eval_env(dataset)
    agents.reset()
    steps = next(n for n in range(1, 100) if agents.step(np.zeros(1, int))[2][0])
    assert steps == 30
