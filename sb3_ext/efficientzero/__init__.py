"""EfficientZero V2: model-based learning with Gumbel tree search."""

from sb3_ext.efficientzero.efficientzero import EfficientZeroV2

__all__ = ["EfficientZeroV2"]
