"""Generative adversarial imitation learning, built on the ``imitation`` library."""

try:
    import imitation  # noqa: F401
except ImportError as error:
    raise ImportError(
        "GAIL needs the imitation library, whose metadata names old versions of what it needs although it runs on "
        'current ones. Install it with: pip install "sb3-ext[gail]" && pip install --no-deps "imitation>=1.0.1"'
    ) from error

from sb3_ext.gail.demonstrations import load_trajectories
from sb3_ext.gail.fixed_horizon import FixedHorizon
from sb3_ext.gail.gail import GAIL
from sb3_ext.gail.reward import NatureRewardNet

__all__ = ["GAIL", "FixedHorizon", "NatureRewardNet", "load_trajectories"]
