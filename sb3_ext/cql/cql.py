"""Conservative Q-learning on QR-DQN: offline from a Minari dataset, then online if wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import sb3_contrib
import torch as th
from sb3_contrib.qrdqn.policies import CnnPolicy, QRDQNPolicy, QuantileNetwork
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import polyak_update

from sb3_ext.arguments import check_least
from sb3_ext.cql.conservative import ConservativeAlgorithm, check_alpha
from sb3_ext.cql.defaults import CQL_DEFAULTS, chosen
from sb3_ext.cql.offline import with_adam
from sb3_ext.cuda_graphs import GraphedLoss
from sb3_ext.data.load import DatasetLike
from sb3_ext.dqn.dqn import quantile_td
from sb3_ext.losses import LossOutput, conservative_gap


class CQL(ConservativeAlgorithm, sb3_contrib.QRDQN):
    """
    Conservative Q-learning CQL(H) (Kumar et al., 2020, https://arxiv.org/abs/2006.04779) on QR-DQN, for discrete
    actions.

    The loss is QR-DQN's plus ``cql_alpha * (logsumexp_a Q(s, a) - Q(s, a_data))`` (eq. 4) on the mean over quantiles.
    **One timestep of** ``learn`` **is one gradient step**, so that schedules, loggers, the progress bar and every SB3
    callback mean gradient steps. ``learn_online`` goes on in an environment.

    :param policy: ``"MlpPolicy"`` for vectors and everything else that can be flattened, ``"CnnPolicy"`` for pictures,
        ``"MultiInputPolicy"`` for ``Dict`` observations, or a class
    :param dataset: a ``minari.MinariDataset``, its id (downloaded if it is not here) or path, or a filled replay buffer
    :param env: environment for :meth:`learn_online`; its spaces must be the dataset's. Not needed to learn offline
    :param learning_rate: Adam's step size, or a schedule of the remaining progress (1 to 0). Default: 5e-5 with
        CnnPolicy, otherwise 5e-4 that falls to 0 over each ``learn``
    :param buffer_size: capacity for *new* transitions in :meth:`learn_online`
    :param learning_starts: online steps before the first online gradient step
    :param batch_size: transitions per gradient step
    :param tau: share of the online network that the target network takes over, 1 for a copy
    :param gamma: discount factor; higher looks further ahead, and learns slower
    :param train_freq: online: steps between updates, as in SB3
    :param gradient_steps: online: gradient steps per update, as in SB3
    :param n_steps: rewards summed before bootstrapping; higher spreads reward faster but keeps more of the behaviour
        policy
    :param target_update_interval: **gradient steps** (not environment steps as in QRDQN) between target updates.
        Default: 2000 with CnnPolicy, 1000 otherwise
    :param exploration_fraction: online: share of the steps over which epsilon falls
    :param exploration_initial_eps: online: first epsilon
    :param exploration_final_eps: share of random actions in ``predict(deterministic=False)`` after offline training,
        and the last epsilon online; the paper evaluates with 0.001
    :param max_grad_norm: gradient clipping; None for none
    :param cql_alpha: weight of the conservative term. Higher stays closer to the data (use it for little or narrow
        data), lower trusts the values more; 0 is offline QR-DQN. The paper uses 4 for 1 % and 1 for 10 % of a replay
        log. Default: 4 with CnnPolicy, 20 otherwise
    :param double_q: choose the next action with the online network. The authors' Atari code does not; d3rlpy and
        tianshou do
    :param calibrated: Cal-QL (Nakamoto et al., 2023): values are not pushed below the return that the data got from
        there on, so that they do not have to rise again before :meth:`learn_online` gets better
    :param clip_rewards: clip each reward to [-1, 1], as the DQN Replay Dataset has them
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.data.load_minari`: ``transforms``, ``frame_stack``,
        ``subset``, ``storage``, ``prioritized``, ``seed`` (of the sampler; default: this model's), ...
    :param torch_compile: compile the networks' forward pass: 10 to 20 s at the start; measure whether it gains anything
    :param bf16: run the networks in bfloat16 (fast where the processor has it, slow where it does not)
    :param cuda_graphs: on a GPU, unless observations are a ``Dict``: record the kernels of the loss once in each
        ``learn`` and replay them; False launches each by itself, as ``torch_compile`` does
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: as in QRDQN, for instance ``dict(n_quantiles=50)``. Default: 200 quantiles and Adam with an
        epsilon of 0.01 over the size of a batch with CnnPolicy; 16 quantiles, two hidden layers of 128 and an epsilon
        of 1e-8 otherwise. The default ``optimizer_kwargs`` go with the default ``optimizer_class`` only
    :param verbose: 0 none, 1 info, 2 debug
    :param seed: seed of the networks and of the sampler
    :param device: as in SB3
    :param _init_setup_model: build the networks now
    :raises TypeError: if an environment is given as the dataset or the reverse
    :raises ValueError: if dataset, environment and policy do not fit together, or a number is out of range
    """

    other_actions = " ContinuousCQL learns from Box ones, and BC clones all."
    judged = "q_best"

    def __init__(
        self,
        policy: str | type[QRDQNPolicy],
        dataset: DatasetLike | ReplayBuffer | None = None,
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule | None = None,
        buffer_size: int = 100_000,
        learning_starts: int = 0,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        n_steps: int = 1,
        target_update_interval: int | None = None,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 0.05,
        exploration_final_eps: float = 0.01,
        max_grad_norm: float | None = None,
        cql_alpha: float | None = None,
        double_q: bool = False,
        calibrated: bool = False,
        clip_rewards: bool = False,
        dataset_kwargs: dict[str, Any] | None = None,
        torch_compile: bool = False,
        bf16: bool = False,
        cuda_graphs: bool = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        self._check_env(env)
        defaults = CQL_DEFAULTS.of(policy, CnnPolicy)
        learning_rate = chosen(learning_rate, defaults.learning_rate)
        target_update_interval = chosen(target_update_interval, defaults.target_update_interval)
        cql_alpha = chosen(cql_alpha, defaults.cql_alpha)
        check_least(1, batch_size=batch_size, target_update_interval=target_update_interval, n_steps=n_steps)
        check_alpha(cql_alpha)
        if "double_q" in (policy_kwargs or {}):
            raise ValueError("policy_kwargs has no double_q here, it is an argument: CQL(..., double_q=True).")
        self.cql_alpha, self.double_q, self.clip_rewards = cql_alpha, double_q, clip_rewards
        self.calibrated = calibrated
        self.dataset_kwargs, self.dataset_info = dict(dataset_kwargs or {}), {}
        self.torch_compile, self.bf16 = torch_compile, bf16
        self.cuda_graphs = cuda_graphs and not torch_compile  # what is graphed must not be compiled meanwhile
        policy_kwargs = with_adam(policy_kwargs, chosen(defaults.adam_eps, 0.01 / batch_size))
        policy_kwargs = {**defaults.network(), **policy_kwargs}
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            n_steps=n_steps,
            target_update_interval=target_update_interval,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if _init_setup_model:
            self._attach(dataset)
            self._setup_model()

    def _setup_model(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of environments used is greater than the target")
            super()._setup_model()
        nature = type(self.quantile_net.features_extractor) is NatureCNN  # others may not bear another layout
        if nature:
            self.policy.to(memory_format=th.channels_last)
        nets = self.quantile_net, self.quantile_net_target
        forwards: list[Callable[[th.Tensor], th.Tensor]] = [net.forward for net in nets]
        if nature and self.quantile_net.normalize_images and is_image_space(self.observation_space):
            forwards = [partial(_quantiles_of_images, net) for net in nets]
        if self.torch_compile:
            forwards = [th.compile(forward) for forward in forwards]
        self._online_forward, self._target_forward = forwards
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphed_loss = GraphedLoss(self.quantile_net, lambda *x: self._loss(self._named(*x)))

    def _forward(self, net: Any, observations: th.Tensor) -> th.Tensor:
        with th.autocast(self.device.type, th.bfloat16, enabled=self.bf16):
            quantiles: th.Tensor = net(observations)
        return quantiles.float()

    def compute_loss(self, batch: Any) -> LossOutput:
        """
        Quantile Huber loss plus ``cql_alpha`` times the conservative gap, from one forward pass of the online network.

        :param batch: samples of the replay buffer
        :return: loss and TD error, ``[B]``; metrics ``td_loss``, ``conservative_gap``, ``q_data`` (mean Q of the data's
            actions), ``q_best`` (mean Q of the best actions), ``action_match`` (share of states where they coincide)
        """
        if not self.cuda_graphs or self.device.type != "cuda" or isinstance(batch.observations, dict):
            return self._loss(batch)
        return self._graphed_loss(*self._inputs(batch))

    def _loss(self, batch: Any) -> LossOutput:
        """The loss itself, with nothing in it that a CUDA graph could not hold."""
        if self.clip_rewards and self.n_steps == 1:  # else the buffers clip, before they sum
            batch = batch._replace(rewards=batch.rewards.clamp(-1, 1))
        # quantiles of all actions, [B, N, A], and of the next observation's best one, [B, N]
        quantiles = self._forward(self._online_forward, batch.observations)
        with th.no_grad():
            following = self._forward(self._target_forward, batch.next_observations)
            chooser = self._forward(self._online_forward, batch.next_observations) if self.double_q else following
            best_next = chooser.mean(dim=1).argmax(dim=1)
            following = following[th.arange(len(best_next), device=best_next.device), :, best_next]
        # QR-DQN's loss
        td = quantile_td(batch, quantiles, following, self.gamma)
        # plus the conservative term
        q_values = quantiles.mean(dim=1)
        gap = conservative_gap(q_values, batch.actions, batch.returns_to_go if self.calibrated else None)
        with th.no_grad():
            best = q_values.max(dim=1)
            metrics = {
                "td_loss": td.loss.mean(),
                "conservative_gap": gap.mean(),
                "q_data": q_values.gather(1, batch.actions.long()).mean(),
                "q_best": best.values.mean(),
                "action_match": (best.indices == batch.actions.squeeze(1)).float().mean(),
            }
        loss = td.loss if self.cql_alpha == 0 else td.loss + self.cql_alpha * gap
        return LossOutput(loss, td.td_error, metrics)

    def _after_update(self, number: int) -> None:
        if self._n_updates % self.target_update_interval == 0:
            polyak_update(self.quantile_net.parameters(), self.quantile_net_target.parameters(), self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _on_step(self) -> None:
        # QRDQN counts environment steps to update the target network; here gradient steps count
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """See :meth:`OfflineAlgorithm.learn`. Nothing is explored."""
        self.exploration_rate = self.exploration_final_eps  # what predict() does when it is not greedy
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        names = ("_online_forward", "_target_forward", "_graphed_loss")
        return [*super()._excluded_save_params(), *names]


def _quantiles_of_images(net: QuantileNetwork, observations: th.Tensor) -> th.Tensor:
    """``net(observations)``, bit for bit; pixels are laid out channels last and scaled in place, without copies."""
    pixels = observations.to(th.float32, memory_format=th.channels_last, copy=True).div_(255.0)
    flat: th.Tensor = net.quantile_net(net.features_extractor(pixels))
    return flat.view(-1, net.n_quantiles, int(net.action_space.n))
