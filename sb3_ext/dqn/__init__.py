"""DQN and QR-DQN with per-sample losses."""

from sb3_ext.dqn.dqn import DQN, QRDQN

__all__ = ["DQN", "QRDQN"]
