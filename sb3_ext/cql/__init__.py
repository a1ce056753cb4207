"""Conservative Q-learning and its baselines."""

from sb3_ext.cql.bc import BC
from sb3_ext.cql.continuous import ContinuousCQL
from sb3_ext.cql.cql import CQL

__all__ = ["BC", "CQL", "ContinuousCQL"]
