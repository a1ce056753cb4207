"""What EfficientZeroV2 cannot learn, said before anything is built."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

from sb3_ext.efficientzero.policies import CnnPolicy


def check_spaces(
    observations: spaces.Space[Any], actions: spaces.Space[Any], policy_class: type[BasePolicy], batch_size: int
) -> None:
    """
    Refuse spaces that are not supported.

    :param observations: of the environment
    :param actions: of the environment
    :param policy_class: the policy that will see them
    :param batch_size: windows per update
    :raises ValueError: names what is wrong
    """
    if not isinstance(observations, spaces.Box):
        raise ValueError(f"EfficientZeroV2 needs Box observations, not {observations}.")
    if not isinstance(actions, spaces.Discrete | spaces.Box):
        raise ValueError(f"EfficientZeroV2 needs Discrete or Box actions, not {actions}.")
    if isinstance(actions, spaces.Discrete) and actions.start != 0:
        raise ValueError(f"Discrete actions must begin at 0, not {actions}: gymnasium.wrappers.TransformAction.")
    if issubclass(policy_class, CnnPolicy):
        _check_images(observations, batch_size)


def _check_images(space: spaces.Box, batch_size: int) -> None:
    if len(space.shape) != 3:
        raise ValueError(f"CnnPolicy needs images, the observations have shape {space.shape}: MlpPolicy.")
    if is_image_space(space) and not is_image_space_channels_first(space):
        raise ValueError(f"Images must come channels first, not as {space.shape}: VecTransposeImage.")
    if not 0 < space.high.max() < 1e6:
        raise ValueError(
            f"CnnPolicy divides images by the upper bound of their space, which is {space.high.max()}; give the space "
            "the bounds that the pixels have."
        )
    if batch_size < 2:
        raise ValueError("CnnPolicy has batch norm and needs a batch_size of at least 2.")
