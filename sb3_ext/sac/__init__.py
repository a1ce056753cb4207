"""SAC with per-sample losses."""

from sb3_ext.sac.sac import SAC

__all__ = ["SAC"]
