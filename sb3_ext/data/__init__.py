"""Minari datasets in and out. Nothing is imported from PyTorch or SB3 before it is needed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.dqn_replay.convert import convert_dqn_replay
from sb3_ext.data.dqn_replay.engines import ENGINES
from sb3_ext.data.dqn_replay.log import ReplayLog, ReplayLogger
from sb3_ext.data.dqn_replay.plan import SUBSETS
from sb3_ext.data.envs import StackFrames, make_atari_env, policy_for
from sb3_ext.data.hub.hub import download, publish
from sb3_ext.data.play import default_keys, describe_keys, parse_keys, play_episodes
from sb3_ext.data.record import EpisodeRecorder, collect_episodes, record
from sb3_ext.data.show import Transitions, list_datasets, sample_transitions, show_dataset
from sb3_ext.data.transforms.base import Transform
from sb3_ext.data.transforms.pipeline import TRANSFORMS, TransformedEnv
from sb3_ext.data.verify import DatasetReport, verify_dataset
from sb3_ext.data.write import Episode, check_new_dataset, check_new_id, write_dataset

if TYPE_CHECKING:
    from sb3_ext.data.load import dataset_spaces, load_minari, make_eval_env

__all__ = [
    "ENGINES",
    "SUBSETS",
    "TRANSFORMS",
    "DatasetError",
    "DatasetReport",
    "Episode",
    "EpisodeRecorder",
    "ReplayLog",
    "ReplayLogger",
    "StackFrames",
    "Transform",
    "TransformedEnv",
    "Transitions",
    "check_new_dataset",
    "check_new_id",
    "collect_episodes",
    "convert_dqn_replay",
    "dataset_spaces",
    "default_keys",
    "describe_keys",
    "download",
    "list_datasets",
    "load_minari",
    "make_atari_env",
    "make_eval_env",
    "parse_keys",
    "play_episodes",
    "policy_for",
    "publish",
    "record",
    "sample_transitions",
    "show_dataset",
    "verify_dataset",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    """Import what builds on PyTorch when it is asked for."""
    if name not in ("dataset_spaces", "load_minari", "make_eval_env"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("sb3_ext.data.load"), name)
    return value


def __dir__() -> list[str]:
    """List the names that are not imported yet, too."""
    return sorted({*globals(), *__all__})
