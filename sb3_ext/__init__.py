"""Systems that Stable-Baselines3 users ask for, in the shape of Stable-Baselines3."""

from typing import TYPE_CHECKING, Any

from sb3_ext.common.prioritized import PrioritizedReplayBuffer
from sb3_ext.cql import BC, CQL
from sb3_ext.data import load_minari, make_eval_env, record
from sb3_ext.dqn import DQN, QRDQN
from sb3_ext.efficientzero import EfficientZeroV2

if TYPE_CHECKING:
    from sb3_ext.gail import GAIL as GAIL

__version__ = "0.1.0"
__all__ = [
    "BC",
    "CQL",
    "DQN",
    "QRDQN",
    "EfficientZeroV2",
    "PrioritizedReplayBuffer",
    "load_minari",
    "make_eval_env",
    "record",
]


def __getattr__(name: str) -> Any:
    """Import GAIL when it is asked for: it needs a library that nothing else needs."""
    if name == "GAIL":
        from sb3_ext.gail import GAIL

        return GAIL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
