"""What stands before an episode's first frame: environments are looked at, and nothing that follows is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_ext.data import StackFrames
from sb3_ext.data.envs import padding_shown_by
from tests.helpers import Ramp


class Anonymous(gym.ObservationWrapper[Any, Any, Any]):
    """Hides which wrapper stacks."""

    def observation(self, observation: Any) -> Any:
        return observation

    def get_wrapper_attr(self, name: str) -> Any:
        if name == "padding_type":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


def vectorised(make: Callable[[], Any], n: int = 2) -> DummyVecEnv:
    return DummyVecEnv([make] * n)


def stacked(padding_type: Any = "reset", start: int | None = 100) -> DummyVecEnv:
    return vectorised(lambda: FrameStackObservation(Ramp(start), 4, padding_type=padding_type))


SHOWN = {
    "gymnasium's default": (lambda: vectorised(lambda: FrameStackObservation(Ramp(), 4)), {"reset"}),
    "gymnasium, zeros": (lambda: stacked("zero"), {"zero"}),
    "StackFrames": (lambda: vectorised(lambda: StackFrames(Ramp(), 4)), {"zero"}),
    "StackFrames, again": (lambda: vectorised(lambda: StackFrames(Ramp(), 4, padding_type="reset")), {"reset"}),
    "VecFrameStack": (lambda: VecFrameStack(vectorised(lambda: ReshapeObservation(Ramp(), (36, 36, 1))), 4), {"zero"}),
    "VecFrameStack for an agent": (
        lambda: VecTransposeImage(VecFrameStack(vectorised(lambda: ReshapeObservation(Ramp(), (36, 36, 1))), 4)),
        {"zero"},
    ),
    "other frames": (lambda: stacked(np.full((36, 36), 7, np.uint8)), set()),
    "no wrapper that says": (lambda: vectorised(lambda: Anonymous(StackFrames(Ramp(), 4, "reset"))), {"reset"}),
    "black, wrapper decides": (lambda: stacked(start=0), {"reset"}),
    "black, VecFrameStack": (
        lambda: VecFrameStack(vectorised(lambda: ReshapeObservation(Ramp(0), (36, 36, 1))), 4),
        {"zero"},
    ),
    "black, nothing decides": (
        lambda: vectorised(lambda: Anonymous(StackFrames(Ramp(0), 4, "reset"))),
        {"zero", "reset"},
    ),
}


@pytest.mark.parametrize("which", SHOWN)
def test_what_environments_show(which: str) -> None:
    make, wanted = SHOWN[which]
    assert padding_shown_by(make(), 4) == wanted


def test_single_frames_need_no_reset() -> None:
    venv = vectorised(lambda: StackFrames(Ramp(), 1))
    assert padding_shown_by(venv, 1) == {"zero", "reset"}
    assert venv.get_attr("resets") == [0, 0]


def play(venv: VecEnv, steps: int = 25) -> np.ndarray:
    seen = [venv.reset()]
    for _ in range(steps):
        seen.append(venv.step(np.zeros(venv.num_envs, np.int64))[0])
    return np.stack(seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("before", ["seeded", "seeded with options", "reset before"])
def test_a_seeded_run_is_not_changed(before: str) -> None:
    def prepared() -> VecEnv:
        venv = stacked(start=None)
        venv.seed(3)
        if before == "seeded with options":
            venv.set_options({"first": 77})
        if before == "reset before":
            play(venv, 3)
        return venv

    wanted, venv = play(prepared()), prepared()
    assert len(np.unique(wanted)) > 20  # several episodes that begin differently
    assert padding_shown_by(venv, 4) == {"reset"}
    np.testing.assert_array_equal(play(venv), wanted)


def test_environments_in_other_processes() -> None:
    def make() -> gym.Env[Any, Any]:
        return Monitor(FrameStackObservation(Ramp(None), 4))

    wanted = stacked(start=None)
    wanted.seed(3)
    play(wanted, 3)
    venv = SubprocVecEnv([make, make], start_method="fork")
    try:
        venv.seed(3)
        play(venv, 3)
        assert padding_shown_by(venv, 4) == {"reset"}
        np.testing.assert_array_equal(play(venv), play(wanted))
    finally:
        venv.close()


def test_statistics_of_vec_normalize_are_not_changed() -> None:
    normalize = VecNormalize(VecMonitor(stacked()), norm_obs=True)
    normalize.reset()
    count, mean, old = normalize.obs_rms.count, normalize.obs_rms.mean.copy(), normalize.get_original_obs()  # type: ignore[union-attr]
    for venv in (normalize, VecMonitor(normalize)):
        assert padding_shown_by(venv, 4) == {"reset"}
    assert normalize.obs_rms.count == count  # type: ignore[union-attr]
    np.testing.assert_array_equal(normalize.obs_rms.mean, mean)  # type: ignore[union-attr]
    np.testing.assert_array_equal(normalize.get_original_obs(), old)


def test_stacks_of_normalised_frames_are_told_by_their_wrapper() -> None:
    normalize = VecNormalize(vectorised(lambda: ReshapeObservation(Ramp(), (36, 36, 1))))
    assert padding_shown_by(VecFrameStack(normalize, 4), 4) == {"zero"}
    assert normalize.get_attr("resets") == [0, 0]


@pytest.mark.parametrize("padding_type", ["zero", "reset"])
def test_an_environment_that_must_not_be_reset_twice_is_not(padding_type: str) -> None:
    venv = vectorised(
        lambda: Monitor(FrameStackObservation(Ramp(), 4, padding_type=padding_type), allow_early_resets=False)
    )
    assert padding_shown_by(venv, 4) == {padding_type}
    play(venv)
    assert padding_shown_by(venv, 4) == {padding_type}


@pytest.mark.parametrize("padding_type", ["zero", "reset"])
def test_stack_frames_shows_what_gymnasium_does(padding_type: str) -> None:
    ours, theirs = StackFrames(Ramp(), 4, padding_type), FrameStackObservation(Ramp(), 4, padding_type=padding_type)
    for _ in range(2):
        np.testing.assert_array_equal(ours.reset()[0], theirs.reset()[0])
        for _ in range(6):
            np.testing.assert_array_equal(ours.step(0)[0], theirs.step(0)[0])


def test_stack_frames_can_be_made_again_from_its_spec() -> None:
    env = gym.make(StackFrames(gym.make("Ramp-v0"), 4, padding_type="reset").spec)  # type: ignore[arg-type]
    assert env.reset()[0][:, 0, 0].tolist() == [100, 100, 100, 100]
    with pytest.raises(ValueError, match="padding_type must be one of zero, reset, not 'edge'"):
        StackFrames(Ramp(), 4, padding_type="edge")
