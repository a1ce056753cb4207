"""Off-policy evaluation: how good a policy is, from recorded data alone."""

from sb3_ext.ope.callback import OfflineEvalCallback
from sb3_ext.ope.criteria import CRITERIA
from sb3_ext.ope.fqe import FQE, ValueEstimate
from sb3_ext.ope.split import split_dataset

__all__ = ["CRITERIA", "FQE", "OfflineEvalCallback", "ValueEstimate", "split_dataset"]
