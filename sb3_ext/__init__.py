"""Systems that Stable-Baselines3 users ask for, in the shape of Stable-Baselines3."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_ext.cql import BC, CQL, ContinuousCQL
    from sb3_ext.data import load_minari, make_eval_env, record
    from sb3_ext.dqn import DQN, QRDQN
    from sb3_ext.efficientzero import EfficientZeroV2
    from sb3_ext.gail import GAIL as GAIL
    from sb3_ext.ope import FQE, OfflineEvalCallback, split_dataset
    from sb3_ext.replay.prioritized import PrioritizedReplayBuffer
    from sb3_ext.sac import SAC

__version__ = "0.1.0"
__all__ = [
    "BC",
    "CQL",
    "DQN",
    "FQE",
    "QRDQN",
    "SAC",
    "ContinuousCQL",
    "EfficientZeroV2",
    "OfflineEvalCallback",
    "PrioritizedReplayBuffer",
    "load_minari",
    "make_eval_env",
    "record",
    "split_dataset",
]

_HOMES = {
    "BC": "cql",
    "CQL": "cql",
    "ContinuousCQL": "cql",
    "DQN": "dqn",
    "FQE": "ope",
    "GAIL": "gail",  # not in __all__: it needs a library that nothing else needs
    "QRDQN": "dqn",
    "SAC": "sac",
    "EfficientZeroV2": "efficientzero",
    "OfflineEvalCallback": "ope",
    "PrioritizedReplayBuffer": "replay.prioritized",
    "load_minari": "data",
    "make_eval_env": "data",
    "record": "data",
    "split_dataset": "ope",
}
_PACKAGES = ("cql", "data", "dqn", "efficientzero", "gail", "ope", "replay", "sac", "search", "zoo")


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: PyTorch takes 650 MB and two seconds, which not everything needs."""
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _PACKAGES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names that are not imported yet, too."""
    return sorted({*globals(), *__all__})
