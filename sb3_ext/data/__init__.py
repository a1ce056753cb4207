"""Minari datasets in and out."""

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.dqn_replay import convert_dqn_replay
from sb3_ext.data.envs import StackFrames, make_atari_env
from sb3_ext.data.hub import download, publish
from sb3_ext.data.minari import load_minari, make_eval_env
from sb3_ext.data.play import default_keys, describe_keys, parse_keys, play_episodes
from sb3_ext.data.record import EpisodeRecorder, collect_episodes, record
from sb3_ext.data.replay_log import ReplayLog, ReplayLogger
from sb3_ext.data.replay_plan import SUBSETS
from sb3_ext.data.write import Episode, check_new_id, write_dataset

__all__ = [
    "SUBSETS",
    "DatasetError",
    "Episode",
    "EpisodeRecorder",
    "ReplayLog",
    "ReplayLogger",
    "StackFrames",
    "check_new_id",
    "collect_episodes",
    "convert_dqn_replay",
    "default_keys",
    "describe_keys",
    "download",
    "load_minari",
    "make_atari_env",
    "make_eval_env",
    "parse_keys",
    "play_episodes",
    "publish",
    "record",
    "write_dataset",
]
