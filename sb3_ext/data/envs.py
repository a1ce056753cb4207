"""Environments as the data layer sees them: single frames below, stacks for the agent above."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.replay.frames import PADDING_TYPES, FrameStacker, padding_of

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

ATARI_MAX_STEPS = 27_000
"""Agent steps after which Dopamine ends an episode (30 minutes of play at 60 Hz and frame skip 4)."""


SMALLEST_PICTURE = 36
"""Pixels on a side that SB3's Nature CNN needs."""


def is_frame_space(space: spaces.Space[Any]) -> bool:
    """Tell pictures: uint8 boxes from 0 to 255 of two (height, width) or three dimensions."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3) or space.dtype != np.uint8:
        return False
    return bool((space.low == 0).all()) and bool((space.high == 255).all())


def policy_for(space: spaces.Space[Any]) -> str:
    """Name of the policy, and so the kind of network, that SB3 has for observations of a dataset."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    if not is_frame_space(space):
        return "MlpPolicy"
    assert space.shape is not None
    sides = space.shape if len(space.shape) == 2 else sorted(space.shape)[1:]  # the channels are fewer
    return "CnnPolicy" if min(sides) >= SMALLEST_PICTURE else "MlpPolicy"


def to_channel_first(observations: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    """Bring pictures ``[..., *space.shape]`` to ``[..., C, H, W]`` (C = 1 for ``[H, W]``); others stay unchanged."""
    if not is_frame_space(space):
        return observations
    assert isinstance(space, spaces.Box)
    if len(space.shape) == 2:
        return observations[..., None, :, :]
    from stable_baselines3.common.preprocessing import is_image_space_channels_first  # here, because it brings PyTorch

    return observations if is_image_space_channels_first(space) else np.moveaxis(observations, -1, -3)


def stacked_space(space: Any, frame_stack: int) -> Any:
    """
    Space of an agent that sees ``frame_stack`` observations of ``space``.

    They are concatenated along the first (channel) axis after :func:`to_channel_first`. Other spaces than ``Box`` stay.
    """
    if not isinstance(space, spaces.Box):
        return space
    low, high = to_channel_first(space.low, space), to_channel_first(space.high, space)
    return spaces.Box(np.concatenate([low] * frame_stack), np.concatenate([high] * frame_stack), dtype=space.dtype.type)


def channels_first(space: spaces.Space[Any]) -> Any:
    """A space of pictures with three dimensions as SB3 turns it, channels in front; others stay."""
    return stacked_space(space, 1) if is_frame_space(space) and len(space.shape or ()) == 3 else space


class StackFrames(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """
    Show the agent the stack that the replay buffer will rebuild from single frames.

    Channel first, oldest frame first.

    :param env: environment with ``Box`` observations
    :param frame_stack: frames per stack, at least 1; 1 only brings the channels to the front
    :param padding_type: what stands before an episode's first frame: ``"zero"``, or ``"reset"`` for that frame again
    :raises TypeError: if the observations are not a ``Box``
    :raises ValueError: if ``frame_stack`` is less than 1, or ``padding_type`` is none
    """

    def __init__(self, env: gym.Env[Any, Any], frame_stack: int = 4, padding_type: str = "zero") -> None:
        gym.utils.RecordConstructorArgs.__init__(self, frame_stack=frame_stack, padding_type=padding_type)
        gym.Wrapper.__init__(self, env)
        if not isinstance(env.observation_space, spaces.Box):
            raise TypeError(f"StackFrames needs Box observations, got {env.observation_space}.")
        if frame_stack < 1:
            raise ValueError(f"frame_stack must be at least 1, got {frame_stack}.")
        self._stacker = FrameStacker(frame_stack, padding_type)
        self.frame_stack, self.padding_type = frame_stack, padding_type
        self._frame_space = env.observation_space
        self.observation_space = stacked_space(env.observation_space, frame_stack)

    def _frame(self, observation: Any) -> NDArray[Any]:
        return to_channel_first(np.asarray(observation), self._frame_space)

    def reset(self, **kwargs: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start an episode with a fresh stack."""
        observation, info = self.env.reset(**kwargs)
        return self._stacker.reset(self._frame(observation)), info

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Step and stack."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._stacker.push(self._frame(observation)), float(reward), terminated, truncated, info


def padding_shown_by(venv: VecEnv, n_frames: int) -> frozenset[str]:
    """
    Padding types that explain the frame stacks of ``n_frames`` with which an environment begins an episode.

    They are both if nothing tells them apart, none if it begins with other frames.

    Unless ``n_frames`` is 1, the environment is reset once, so a model that is in the middle of an episode must begin a
    new one (``model._last_obs = None``). A seeded run that follows is not changed by this: seeds and options that wait
    for the next reset still do, random generators are put back, and no ``VecNormalize`` takes the observation into
    account.

    An environment that must not be reset twice (``Monitor(allow_early_resets=False)``) is not. Its wrappers then tell,
    and also where its first frame is black.
    """
    undecided = frozenset(PADDING_TYPES)
    if n_frames == 1:
        return undecided
    shown = undecided
    if not venv.has_attr("allow_early_resets") or all(venv.get_attr("allow_early_resets")):
        shown = _padding_at_reset(venv, n_frames)
    return shown if shown != undecided else _padding_of_wrappers(venv)


def _padding_at_reset(venv: VecEnv, n_frames: int) -> frozenset[str]:
    from stable_baselines3.common.vec_env import unwrap_vec_normalize  # here, because it brings PyTorch

    below, base = venv, venv.unwrapped
    while (normalize := unwrap_vec_normalize(below)) is not None:
        below = normalize.venv
    if np.prod(below.observation_space.shape or 0) != np.prod(venv.observation_space.shape or 0):
        return frozenset(PADDING_TYPES)  # normalised frames are stacked, so the stacks cannot be seen below
    waiting = base._seeds, base._options
    generators = venv.get_attr("np_random") if venv.has_attr("np_random") else []
    states = [g.bit_generator.state if isinstance(g, np.random.Generator) else None for g in generators]
    stacks = to_channel_first(np.asarray(below.reset()), below.observation_space)
    base._seeds, base._options = waiting
    for number, (generator, state) in enumerate(zip(generators, states, strict=True)):
        if state is not None:
            generator.bit_generator.state = state
            venv.set_attr("np_random", generator, number)
    return frozenset.intersection(*(padding_of(stack, n_frames) for stack in stacks))


def _padding_of_wrappers(venv: VecEnv) -> frozenset[str]:
    from stable_baselines3.common.vec_env import VecFrameStack, unwrap_vec_wrapper  # here, because it brings PyTorch

    if unwrap_vec_wrapper(venv, VecFrameStack) is not None:
        return frozenset({"zero"})
    if not venv.has_attr("padding_type"):
        return frozenset(PADDING_TYPES)
    return frozenset.intersection(*(frozenset({given}) for given in venv.get_attr("padding_type"))) & set(PADDING_TYPES)


def make_atari_env(game: str = "Breakout", *, sticky: float = 0.25, **kwargs: Any) -> gym.Env[Any, Any]:
    """
    Build an Atari game under the protocol of the DQN Replay Dataset (Dopamine; Machado et al., 2018).

    Sticky actions, 4 frames per step with the maximum of the last two, grey 84x84 frames, minimal action set, no no-op
    start, no fire on reset, a lost life does not end the episode, 27,000 steps at most, unclipped rewards.
    Unlike Dopamine, which marks it as terminal, the step limit is a truncation.

    :param game: name in CamelCase, as in ``ALE/<game>-v5``
    :param sticky: probability that the last action is repeated
    :param kwargs: passed to ``gymnasium.make``, for instance ``render_mode="rgb_array"``, or ``max_episode_steps``,
        which counts frames, 4 a step
    :return: environment with single ``[84, 84]`` uint8 frames; wrap it in :class:`StackFrames` for an agent
    :raises ImportError: if ale-py or OpenCV is missing
    """
    try:
        import ale_py
        import cv2  # noqa: F401
    except ImportError as error:
        raise ImportError('Atari games need: pip install "sb3-ext[atari]"') from error
    gym.register_envs(ale_py)
    env = gym.make(
        f"ALE/{game}-v5",
        frameskip=1,
        repeat_action_probability=sticky,
        full_action_space=False,
        disable_env_checker=True,
        **{"max_episode_steps": 4 * ATARI_MAX_STEPS, **kwargs},
    )
    return gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84, terminal_on_life_loss=False)
