"""EfficientZero V2: model-based learning with Gumbel tree search."""

from sb3_ext.efficientzero.efficientzero import EfficientZeroV2
from sb3_ext.efficientzero.replay import SequenceReplayBuffer

__all__ = ["EfficientZeroV2", "SequenceReplayBuffer"]
