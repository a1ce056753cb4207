"""The recipes in datasets/: deterministic, listed in the catalogue, used by the benchmark."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest

from sb3_ext import make_eval_env
from sb3_ext.data import Episode, convert_dqn_replay, make_atari_env, verify_dataset, write_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def recipes_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "datasets"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_the_catalogue_names_every_recipe_and_every_log() -> None:
    import ppo_log
    import sac_log

    logs = [*ppo_log.LOGS.values(), *sac_log.LOGS.values()]
    text = (ROOT / "datasets" / "README.md").read_text()
    for name in [p.name for p in (ROOT / "datasets").glob("*.py")] + [log["id"] for log in logs]:
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


SMALL_SAC = {"learning_starts": 50, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}}


def test_the_same_seed_gives_the_same_log_of_a_sac() -> None:
    from sac_log import learning_log

    def log(seed: int) -> list[bytes]:
        return [e.actions.tobytes() for e in learning_log("Pendulum-v1", 90, -np.inf, seed, **SMALL_SAC)]

    first = log(3)
    assert [len(actions) for actions in first] == [4 * 90]
    assert first == log(3)
    assert first != log(4)


def test_a_sac_is_logged_with_the_environments_actions() -> None:
    from sac_log import learning_log

    episode, rest = learning_log("Pendulum-v1", 230, -np.inf, 0, **{**SMALL_SAC, "learning_starts": 190})
    assert len(rest.rewards) == 30
    assert not rest.terminated
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=episode.seed)
    for step in range(200):
        assert np.array_equal(episode.observations[step], observation)
        observation, reward, *_ = env.step(episode.actions[step])
        assert episode.rewards[step] == reward
    assert 1.5 < np.abs(episode.actions).max() <= 2  # the agent's own are between -1 and 1


def test_a_tenth_of_a_log_is_one_of_its_steps() -> None:
    from sac_log import tenths

    def episode(steps: int, reward: float) -> Episode:
        return Episode(([], (), ""), np.zeros(steps), np.full(steps, reward), False, None)

    # 20 steps, so that a tenth is 2: the episodes end after 1, 3, 10, 19 and 20
    log = [episode(1, 5.0), episode(2, 1.0), episode(7, 0.0), episode(9, 1.0), episode(1, 4.0)]
    nan = float("nan")
    assert tenths(log) == pytest.approx([5.0, 2.0, nan, nan, nan, 0.0, nan, nan, nan, 6.5], nan_ok=True)


@pytest.mark.parametrize(("good", "steps"), [(-1e9, 300), (1e9, 450)])
def test_a_sac_that_plays_badly_learns_on(monkeypatch: pytest.MonkeyPatch, good: float, steps: int) -> None:
    pytest.importorskip("mujoco")
    import sac_log

    monkeypatch.setitem(sac_log.LOGS["Hopper-v5"], "good", good)
    dataset = sac_log.make_dataset("Hopper-v5", steps=300)
    assert dataset.id == "mujoco/hopper/medium-replay-v0"
    report = verify_dataset(dataset)
    assert report.ok
    assert dataset.total_steps == steps
    facts = dataset.storage.metadata
    assert f"first {steps} steps" in facts["description"]
    assert facts["seed"] == 7
    ends = np.cumsum([len(e) for e in dataset])
    last = [e.rewards.sum() for e, end in zip(dataset, ends, strict=True) if end >= 0.9 * steps]
    assert facts["mean_return_of_tenths"][-1] == pytest.approx(np.mean(last))
    assert minari.get_normalized_score(dataset, np.array([-20.272305, 3234.3])) == pytest.approx([0.0, 1.0])


def test_a_sac_that_is_stopped_leaves_what_it_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sac_log

    def stop(progress: sac_log.Progress) -> bool:
        if progress.num_timesteps == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(sac_log.Progress, "_on_step", stop)
    monkeypatch.setattr(sys, "argv", ["sac_log.py", "--id", "pendulum/stopped-v0", "--seed", "3"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        sac_log.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped at step 40" in capsys.readouterr().out
    dataset = minari.load_dataset("pendulum/stopped-v0")
    assert dataset.total_steps == 40
    assert dataset.storage.metadata["seed"] == 3
    assert verify_dataset(dataset).ok
    with pytest.raises(ValueError, match="exists"):  # before hours of learning
        sac_log.main()


def test_the_way_through_the_maze_is_the_shortest() -> None:
    pytest.importorskip("gymnasium_robotics")
    from pointmaze_waypoints import first_steps

    # a square of four cells with a tail, and a cell that cannot be reached
    free = {(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (5, 5)}
    steps = first_steps(free, (2, 1))
    assert steps == {(2, 1): (2, 1), (1, 1): (2, 1), (0, 1): (1, 1), (1, 0): (1, 1), (0, 0): steps[0, 0]}
    assert steps[0, 0] in {(0, 1), (1, 0)}


def _maze() -> gym.Env:
    gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    env = gym.make("PointMaze_UMaze-v3", continuing_task=False)
    env.reset(seed=0)
    return env


def test_the_point_is_pushed_to_the_next_cell_and_held_back_by_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    env = _maze()
    import pointmaze_waypoints as recipe

    monkeypatch.setattr(recipe, "DETOUR", 0.0)
    push = recipe.noisy_waypoints(env, 0.0, 0.0, 0)
    # cell (1, 1) has its centre at (-1, 1); the way to (3, 1) starts to the right
    seen = {"observation": np.array([-1.0, 1.0, 0.1, 0.2]), "achieved_goal": np.array([-1.0, 1.0])}
    assert push({**seen, "desired_goal": np.array([-1.1, -1.0])}) == pytest.approx([1.0, -0.4])  # 5 - 0.2, clipped
    # in the goal's cell it goes to the goal itself: 5 * 0.1 - 2 * 0.1 and 5 * -0.1 - 2 * 0.2
    assert push({**seen, "desired_goal": np.array([-0.9, 0.9])}) == pytest.approx([0.3, -0.9])


def test_wanderers_and_detours_take_no_notice_of_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    env = _maze()
    import pointmaze_waypoints as recipe

    seen = {"observation": np.array([1.0, 0.0, 0.0, 0.0]), "achieved_goal": np.array([1.0, 0.0])}  # the middle cell
    up, down = ({**seen, "desired_goal": np.array([-1.0, y])} for y in (1.0, -1.0))

    def share_that_notices(wander: float, detour: float) -> float:
        monkeypatch.setattr(recipe, "DETOUR", detour)
        pushes = [
            [recipe.noisy_waypoints(env, wander, 0.0, seed)(goal).tolist() for goal in (up, down)] for seed in range(70)
        ]
        return float(np.mean([first != second for first, second in pushes]))

    assert share_that_notices(0.0, 0.0) == 1
    assert share_that_notices(1.0, 0.0) == 0
    # the detour's cell is one of seven, and the point is already in one of these
    assert share_that_notices(0.0, 1.0) == pytest.approx(1 / 7, abs=0.1)


def test_a_maze_ends_at_its_goal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    env = _maze()
    import pointmaze_waypoints

    words = ["pointmaze_waypoints.py", "--episodes", "8", "--wander", "0.5", "--id", "pointmaze/few-v0"]
    monkeypatch.setattr(sys, "argv", words)
    pointmaze_waypoints.main()
    dataset = minari.load_dataset("pointmaze/few-v0")
    assert verify_dataset(dataset).ok
    goals = [bool(e.terminations[-1]) for e in dataset]
    assert 0 < sum(goals) < 8
    for goal, episode in zip(goals, dataset, strict=True):
        assert episode.rewards.tolist() == [0.0] * (len(episode.rewards) - 1) + [float(goal)]
        assert goal or len(episode.rewards) == 300
        assert set(episode.observations) == {"observation", "achieved_goal", "desired_goal"}
        assert np.array_equal(episode.observations["achieved_goal"], episode.observations["observation"][:, :2])
        assert len(np.unique(episode.observations["desired_goal"], axis=0)) == 1
    assert dataset.storage.metadata["success_rate"] == sum(goals) / 8
    assert f"8 episodes, {dataset.total_steps} steps, {sum(goals) / 8:.1%} successful" in capsys.readouterr().out
    rebuilt = dataset.recover_environment()
    assert rebuilt.unwrapped.continuing_task is env.unwrapped.continuing_task is False
