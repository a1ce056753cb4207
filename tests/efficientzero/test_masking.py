"""Action masks of EfficientZeroV2: predict, collection, replay, reanalysis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ext import EfficientZeroV2
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from tests.helpers import SMALL, Masked, N, randomize


def states(observations: Any) -> Any:
    return observations.argmax(axis=-1)


def legal(state: Any) -> Any:
    return np.eye(N, dtype=bool)[state] | np.eye(N, dtype=bool)[(state + 1) % N]


@pytest.mark.parametrize("n_envs", [1, 2])
def test_only_legal_actions_are_taken_and_learnt(n_envs: int, tmp_path: Any) -> None:
    env = make_vec_env(Masked, n_envs)
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **SMALL).learn(60)
    assert model._n_updates > 0
    buffer = model.replay_buffer
    assert isinstance(buffer, SequenceReplayBuffer)
    batch = buffer.windows(np.arange(60), np.ones(60, np.float32))
    assert batch.legal is not None
    for b in range(60):
        length = batch.lengths[b]
        wanted = legal(states(batch.observations[b, :length]))
        np.testing.assert_array_equal(batch.legal[b, :length], wanted)
        assert wanted[np.arange(length), batch.actions[b, :length, 0]].all()
        assert not batch.legal[b, length:].any(), "what follows an end or the newest step is not known"
    targets = model.reanalyze(batch).policy.numpy()
    known = batch.legal[:, :6].any(axis=2)
    assert (targets[known][~batch.legal[:, :6][known]] == 0).all()
    assert (targets[~known] > 0).all()
    model.save_replay_buffer(tmp_path / "replay")
    model.load_replay_buffer(tmp_path / "replay")
    again = model.replay_buffer.windows(np.arange(60), np.ones(60, np.float32))  # type: ignore[union-attr]
    np.testing.assert_array_equal(again.legal, batch.legal)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=2)  # type: ignore[arg-type]
    assert np.isfinite(mean)
    watch = MaskableEvalCallback(make_vec_env(Masked, 1), eval_freq=5, n_eval_episodes=1, verbose=0)
    model.learn(10, callback=watch, reset_num_timesteps=False)
    assert np.isfinite(watch.last_mean_reward)


def test_a_window_of_short_length_knows_the_mask_behind_it() -> None:
    model = EfficientZeroV2("MlpPolicy", make_vec_env(Masked, 1), seed=0, value_target="search", **SMALL).learn(40)
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    batch = model.replay_buffer.windows(np.arange(40), np.ones(40, np.float32))
    assert batch.legal is not None
    inside = batch.legal[:, 5].any(axis=1)
    assert inside.any()
    assert not inside.all()
    np.testing.assert_array_equal(batch.legal[inside, 5], legal(states(batch.observations[inside, 5])))


def test_predict_with_masks() -> None:
    model = EfficientZeroV2("MlpPolicy", make_vec_env(Masked, 1), seed=0, **SMALL)
    randomize(model.policy)  # type: ignore[arg-type]
    observations = np.eye(N, dtype=np.float32)
    for search in (True, False):
        model.policy.search = search
        for deterministic in (True, False):
            for a in range(N):
                only = np.eye(N, dtype=np.int8)[[a] * N]
                found, _ = model.predict(observations, deterministic=deterministic, action_masks=only)
                assert found.tolist() == [a] * N
                single, state = model.predict(observations[0], deterministic=deterministic, action_masks=only[0])
                assert (int(single), single.shape, state) == (a, (), None)
    model.policy.search = True
    free, _ = model.predict(observations, deterministic=True)
    allowed, _ = model.predict(observations, deterministic=True, action_masks=np.ones((N, N), bool))
    np.testing.assert_array_equal(free, allowed)
    shown = model.explain(observations[0], action_masks=[0, 1, 0, 1, 0])
    assert (shown.improved_policy > 0).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.array([[1] * N, [0] * N]), "Environment 1 has no legal action"),
        (np.ones((2, 3)), r"shape \(2, 3\), wanted \(2, 5\)"),
        (np.ones(N), r"shape \(5,\), wanted \(2, 5\)"),
    ],
)
def test_bad_masks(masks: Any, message: str) -> None:
    model = EfficientZeroV2("MlpPolicy", make_vec_env(Masked, 1), seed=0, **SMALL)
    with pytest.raises(ValueError, match=message):
        model.predict(np.eye(N, dtype=np.float32)[:2], action_masks=masks)


def test_an_environment_without_legal_actions_is_named() -> None:
    env = DummyVecEnv([Masked, lambda: Masked(dead_at=3)])
    model = EfficientZeroV2("MlpPolicy", env, seed=0, **SMALL)
    with pytest.raises(ValueError, match="Environment 1 has no legal action"):
        model.learn(60)


def test_masks_are_for_discrete_actions() -> None:
    model = EfficientZeroV2("MlpPolicy", "Pendulum-v1", seed=0, **SMALL)
    with pytest.raises(ValueError, match="for Discrete actions"):
        model.predict(np.zeros(3, np.float32), action_masks=[1])


def test_masks_end_with_the_environment_that_had_them() -> None:
    model = EfficientZeroV2("MlpPolicy", make_vec_env(Masked, 1), seed=0, **SMALL).learn(21)
    buffer = model.replay_buffer
    assert isinstance(buffer, SequenceReplayBuffer)
    row = np.zeros((1, N), np.float32)
    buffer.add(row, row, np.array([[0]]), np.zeros(1), np.array([False]), [{}])
    batch = buffer.windows(np.array([21]), np.ones(1, np.float32))
    assert batch.legal is not None
    assert not batch.legal.any()
    assert th.isfinite(model.compute_loss(batch).loss).all()
