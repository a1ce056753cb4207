"""Criteria by hand, and the callback that keeps the best model by one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ext import BC, CQL, FQE, OfflineEvalCallback, record, split_dataset
from sb3_ext.ope.criteria import available_criteria, held_out_scores
from sb3_ext.ope.episodes import ROWS, load_episodes
from tests.helpers import MakeDataset, flags

QUICK: dict[str, Any] = {"device": "cpu", "policy_kwargs": {"n_quantiles": 4, "net_arch": [8]}}


@pytest.fixture(scope="module")
def pendulum(session_folders: None) -> minari.MinariDataset:
    """Three random episodes of Pendulum: 600 steps with bounds of 2."""
    return record(None, gym.make("Pendulum-v1"), "pendulum/random-v0", n_episodes=3)


def transitions(dataset: minari.MinariDataset) -> Any:
    """Of each episode: states, actions, rewards, next states, terminations."""
    for e in dataset.iterate_episodes():
        yield e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminations


def test_discrete_criteria_by_hand(cartpole: minari.MinariDataset) -> None:
    model = CQL("MlpPolicy", cartpole, seed=0, gamma=0.9, n_steps=3, **QUICK).learn(30)

    def q_values(states: Any) -> Any:
        return model.quantile_net(th.as_tensor(states)).mean(1).detach().numpy()

    errors, initial, values, same, returns = [], [], [], [], []
    for states, actions, rewards, following, over in transitions(cartpole):
        q = q_values(states)
        taken = q[np.arange(len(q)), actions]
        errors.append((taken - rewards - 0.9 * ~over * q_values(following).max(axis=1)) ** 2)
        initial.append(q[0].max())
        values.append(taken)
        same.append(q.argmax(axis=1) == actions)
        returns.append(rewards.sum())
    threshold = sorted(returns)[int(np.ceil(0.75 * (len(returns) - 1)))]
    good = np.concatenate([v for v, r in zip(values, returns, strict=True) if r >= threshold])
    expected = {
        "td_error": np.concatenate(errors).mean(),
        "initial_value": np.mean(initial),
        "soft_opc": good.mean() - np.concatenate(values).mean(),
        "action_match": np.concatenate(same).mean(),
    }
    buffer = load_episodes(model, cartpole)
    assert available_criteria(model) == [*expected, "fqe"]
    assert held_out_scores(model, buffer, list(expected)) == pytest.approx(expected, rel=1e-4)
    best = np.concatenate([v for v, r in zip(values, returns, strict=True) if r >= max(returns)])
    found = held_out_scores(model, buffer, ["soft_opc"], max(returns))
    assert found["soft_opc"] == pytest.approx(best.mean() - np.concatenate(values).mean(), rel=1e-4)


def test_continuous_criteria_by_hand(pendulum: minari.MinariDataset) -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", seed=0, gamma=0.9, buffer_size=1, device="cpu")

    def q_values(states: Any, scaled: Any) -> Any:
        both = model.critic(th.as_tensor(states), th.as_tensor(scaled, dtype=th.float32))
        return th.stack(both).mean(0)[:, 0].detach().numpy()

    def act(states: Any) -> Any:
        return model.predict(states, deterministic=True)[0] / 2  # bounds of 2

    errors, initial, far = [], [], []
    for states, actions, rewards, following, over in transitions(pendulum):
        errors.append(
            (q_values(states, actions / 2) - rewards - 0.9 * ~over * q_values(following, act(following))) ** 2
        )
        initial.append(q_values(states[:1], act(states[:1]))[0])
        far.append((actions / 2 - act(states)) ** 2)
    expected = {
        "td_error": np.concatenate(errors).mean(),
        "initial_value": np.mean(initial),
        "action_mse": np.concatenate(far).mean(),
    }
    assert available_criteria(model) == ["td_error", "initial_value", "soft_opc", "action_mse", "fqe"]
    buffer = load_episodes(model, pendulum)
    assert buffer.buffer_size < ROWS
    assert held_out_scores(model, buffer, list(expected)) == pytest.approx(expected, rel=1e-4)


def test_cloning_has_no_values(cartpole: minari.MinariDataset, pendulum: minari.MinariDataset) -> None:
    model = BC("MlpPolicy", cartpole, seed=0, device="cpu")
    expected = {"action_match": [], "log_likelihood": []}  # type: ignore[var-annotated]
    for states, actions, *_ in transitions(cartpole):
        probabilities = model.policy.get_distribution(th.as_tensor(states)).distribution.probs.detach().numpy()
        expected["action_match"].append(probabilities.argmax(axis=1) == actions)
        expected["log_likelihood"].append(np.log(probabilities[np.arange(len(states)), actions]))
    means = {name: np.concatenate(parts).mean() for name, parts in expected.items()}
    assert available_criteria(model) == [*means, "fqe"]
    assert held_out_scores(model, load_episodes(model, cartpole), list(means)) == pytest.approx(means, rel=1e-5)

    continuous = BC("MlpPolicy", pendulum, seed=0, device="cpu")
    buffer = load_episodes(continuous, pendulum)
    assert available_criteria(continuous) == ["action_mse", "log_likelihood", "fqe"]
    batch = buffer._get_samples(np.arange(buffer.buffer_size))
    nll = continuous.compute_loss(batch).metrics["nll"].item()
    far = (batch.actions.numpy() - continuous.predict(batch.observations.numpy(), deterministic=True)[0]) / 2
    found = held_out_scores(continuous, buffer, ["log_likelihood", "action_mse"])
    assert found == pytest.approx({"log_likelihood": -nll, "action_mse": (far**2).mean()}, rel=1e-4)


def test_multi_discrete_actions_match_as_a_whole(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(0)
    episodes = [
        {
            "observations": rng.normal(size=(9, 2)).astype(np.float32),
            "actions": rng.integers(2, size=(8, 2)),
            "rewards": np.zeros(8),
            **flags(8, True),
        }
        for _ in range(3)
    ]
    space = spaces.MultiDiscrete([2, 2])
    data = make_dataset(episodes, spaces.Box(-np.inf, np.inf, (2,)), space)
    model = BC("MlpPolicy", data, seed=0, device="cpu")
    expected = np.mean(
        [(model.predict(e["observations"][:-1], deterministic=True)[0] == e["actions"]).all(1) for e in episodes]
    )
    found = held_out_scores(model, load_episodes(model, data), ["action_match", "log_likelihood"])
    assert found["action_match"] == pytest.approx(expected)
    assert found["log_likelihood"] == pytest.approx(2 * np.log(0.5), abs=0.1)
    assert "fqe" not in available_criteria(model)


class Forward(BaseCallback):
    """Counts."""

    calls = 0

    def _on_step(self) -> bool:
        self.calls += 1
        return True


def parameters(model: BaseAlgorithm) -> list[th.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters()]


@pytest.mark.parametrize("kind", [CQL, BC])
def test_training_is_the_same_with_and_without(kind: Any, cartpole: minari.MinariDataset) -> None:
    train, validation = split_dataset(cartpole, 0.2)
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 1}
    without = kind("MlpPolicy", train, **kwargs).learn(40)
    drawn = np.random.random(3).tolist(), th.rand(3).tolist()
    model = kind("MlpPolicy", train, **kwargs)
    model.learn(40, callback=OfflineEvalCallback(validation, eval_freq=10, fqe_steps=3, verbose=0))
    assert (np.random.random(3).tolist(), th.rand(3).tolist()) == drawn
    assert all(map(th.equal, parameters(without), parameters(model)))


def test_the_best_model_is_kept(
    cartpole: minari.MinariDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = split_dataset(cartpole, 0.2)
    scores = iter([3.0, 1.0, float("nan"), 2.0])
    monkeypatch.setattr("sb3_ext.ope.callback.held_out_scores", lambda *_: {"td_error": next(scores)})
    better, every = Forward(), Forward()
    callback = OfflineEvalCallback(
        validation, better, every, eval_freq=5, criteria=["td_error"], criterion="td_error",
        log_path=tmp_path / "log", best_model_save_path=tmp_path / "best",
    )  # fmt: skip
    model = CQL("MlpPolicy", train, seed=0, **QUICK).learn(20, callback=callback)
    assert CQL.load(tmp_path / "best" / "best_model").num_timesteps == 10
    assert (better.calls, every.calls, callback.best_score) == (2, 4, 1.0)
    with np.load(tmp_path / "log" / "offline_evaluations.npz") as file:
        assert file["timesteps"].tolist() == [5, 10, 15, 20]
        np.testing.assert_array_equal(file["td_error"], [3, 1, np.nan, 2])
    assert model.logger.name_to_value == {}, "written with the step"
    assert "num_timesteps=10, td_error=1\nNew best td_error!" in capsys.readouterr().out

    again = OfflineEvalCallback(validation, criterion="td_error", criteria=["td_error"], log_path=tmp_path / "log")
    again.continue_from(12)
    again.eval_freq, again.best_file = 5, tmp_path / "other" / "best_model.zip"
    monkeypatch.setattr("sb3_ext.ope.callback.held_out_scores", lambda *_: {"td_error": 1.5})
    model.learn(5, callback=again)
    assert again.evaluations["td_error"] == [3, 1, 1.5]
    assert again.best_score == 1.0
    assert not again.best_file.exists(), "no better than before the interruption"
    (tmp_path / "log" / "offline_evaluations.npz").write_bytes(b"PK half")
    with pytest.warns(UserWarning, match="is damaged"):
        OfflineEvalCallback(validation, log_path=tmp_path / "log").continue_from(12)


def test_every_number_is_logged(cartpole: minari.MinariDataset, pendulum: minari.MinariDataset, tmp_path: Path) -> None:
    train, validation = split_dataset(cartpole, 0.2)
    callback = OfflineEvalCallback(validation, eval_freq=10, fqe_steps=2, log_path=tmp_path, verbose=0)
    model = CQL("MlpPolicy", train, seed=0, tensorboard_log=None, **QUICK).learn(10, callback=callback)
    names = ["td_error", "initial_value", "soft_opc", "action_match", "fqe"]
    assert callback.names == names
    assert callback.best_by == "fqe"
    estimator = FQE("MlpPolicy", validation, model, seed=0, device="cpu").learn(2)
    assert callback.evaluations["fqe"] == [pytest.approx(estimator.initial_value().mean)]
    expected = held_out_scores(model, load_episodes(model, validation), names[:-1])
    assert {name: callback.evaluations[name][0] for name in expected} == pytest.approx(expected)

    sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=5, batch_size=4, seed=0, device="cpu")
    callback = OfflineEvalCallback(pendulum, eval_freq=10, verbose=0)
    sac.learn(10, callback=callback)
    assert set(callback.evaluations) == {"td_error", "initial_value", "soft_opc", "action_mse"}
    assert callback.best_by == "soft_opc"


def test_stacked_pictures_and_transforms_are_the_models(breakout: minari.MinariDataset) -> None:
    train, validation = split_dataset(breakout, 0.25)
    model = CQL(
        "CnnPolicy", train, seed=0, device="cpu", policy_kwargs={"n_quantiles": 2}, clip_rewards=True,
        dataset_kwargs={"frame_stack": 2, "prioritized": True, "subset": 0.5, "transforms": ["reward_scale:3"]},
    )  # fmt: skip
    callback = OfflineEvalCallback(validation, eval_freq=1, verbose=0)
    model.learn(1, callback=callback)
    buffer = callback._buffer
    assert buffer.frame_stack == 2
    assert buffer.clip_rewards
    assert buffer.buffer_size == validation.total_steps
    with pytest.raises(ValueError, match="observation_space of the model and of the dataset differ"):
        model.learn(1, callback=OfflineEvalCallback(validation, dataset_kwargs={"frame_stack": 3}))


def test_what_a_model_does_not_have_is_an_error_before_training(
    cartpole: minari.MinariDataset, pendulum: minari.MinariDataset
) -> None:
    train, validation = split_dataset(cartpole, 0.2)
    model = BC("MlpPolicy", train, device="cpu")
    with pytest.raises(ValueError, match=r"BC has no 'td_error'.*action_match, log_likelihood"):
        model.learn(1, callback=OfflineEvalCallback(validation, criterion="td_error"))
    with pytest.raises(ValueError, match="BC has no 'soft_opc'"):
        model.learn(1, callback=OfflineEvalCallback(validation, criteria=["soft_opc"]))
    with pytest.raises(ValueError, match="There is no criterion 'td'"):
        OfflineEvalCallback(validation, criteria=["td"])
    with pytest.raises(ValueError, match="fqe_steps"):
        OfflineEvalCallback(validation, criterion="fqe")
    with pytest.raises(ValueError, match="eval_freq must be at least 1"):
        OfflineEvalCallback(validation, eval_freq=0)
    with pytest.raises(ValueError, match="observation_space"):
        model.learn(1, callback=OfflineEvalCallback(pendulum))
    with pytest.raises(ValueError, match="no held-out episode returned more than"):
        CQL("MlpPolicy", train, **QUICK).learn(1, callback=OfflineEvalCallback(validation, success_return=1e4))
    assert model.num_timesteps == 0
