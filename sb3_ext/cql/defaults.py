"""What CQL and BC take where the user gives nothing: the paper's settings for pictures, others for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

T = TypeVar("T")


@dataclass(frozen=True)
class CQLDefaults:
    """
    Arguments of CQL whose default follows the policy.

    :param adam_eps: Adam's epsilon; None for 0.01 over the size of a batch, as in the QR-DQN paper
    :param n_quantiles: None for sb3-contrib's
    :param net_arch: None for sb3-contrib's
    """

    learning_rate: float | Schedule
    target_update_interval: int
    cql_alpha: float
    adam_eps: float | None = None
    n_quantiles: int | None = None
    net_arch: tuple[int, ...] | None = None

    def network(self) -> dict[str, Any]:
        """The part of ``policy_kwargs`` that sizes the network."""
        found: dict[str, Any] = {}
        if self.n_quantiles is not None:
            found["n_quantiles"] = self.n_quantiles
        if self.net_arch is not None:
            found["net_arch"] = list(self.net_arch)
        return found


@dataclass(frozen=True)
class BCDefaults:
    """Arguments of BC whose default follows the policy."""

    learning_rate: float | Schedule
    batch_size: int


@dataclass(frozen=True)
class Defaults(Generic[T]):
    """Two sets of defaults, ``pictures`` for ``CnnPolicy`` and classes derived from it."""

    pictures: T
    others: T

    def of(self, policy: str | type[BasePolicy], cnn_policy: type[BasePolicy]) -> T:
        """
        Choose by the policy.

        :param policy: as in the constructor
        :param cnn_policy: SB3's class for pictures
        :return: the defaults for it
        """
        pictures = policy == "CnnPolicy" if isinstance(policy, str) else issubclass(policy, cnn_policy)
        return self.pictures if pictures else self.others


CQL_DEFAULTS = Defaults(
    # Kumar et al., 2020, for a million gradient steps on Atari
    CQLDefaults(learning_rate=5e-5, target_update_interval=2000, cql_alpha=4.0),
    # for some thousand gradient steps on vectors
    CQLDefaults(
        learning_rate=LinearSchedule(5e-4, 0.0, 1.0),
        target_update_interval=1000,
        cql_alpha=20.0,
        adam_eps=1e-8,
        n_quantiles=16,
        net_arch=(128, 128),
    ),
)
BC_DEFAULTS = Defaults(BCDefaults(learning_rate=1e-4, batch_size=32), BCDefaults(learning_rate=1e-3, batch_size=64))


def chosen(value: T | None, default: T) -> T:
    """The user's value, or the default where there is none."""
    return default if value is None else value
