"""Systems that Stable-Baselines3 users ask for, in the shape of Stable-Baselines3."""

from sb3_ext.common.prioritized import PrioritizedReplayBuffer
from sb3_ext.cql import BC, CQL
from sb3_ext.data import load_minari, make_eval_env, record
from sb3_ext.dqn import DQN, QRDQN

__version__ = "0.1.0"
__all__ = ["BC", "CQL", "DQN", "QRDQN", "PrioritizedReplayBuffer", "load_minari", "make_eval_env", "record"]
