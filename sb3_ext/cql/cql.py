"""Conservative Q-learning on QR-DQN: offline from a Minari dataset, then online if wanted."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Self

import gymnasium as gym
import torch as th
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule

from sb3_ext.cql.mixed import MixedReplayBuffer
from sb3_ext.cql.offline import OfflineQRDQN
from sb3_ext.cql.support import OnlineReplayBuffer, check_arguments, with_adam
from sb3_ext.data.load import DatasetLike
from sb3_ext.dqn.dqn import QRDQN
from sb3_ext.losses import LossOutput, conservative_gap
from sb3_ext.replay.dataset import OfflineReplayBuffer


class CQL(OfflineQRDQN):
    """
    Conservative Q-learning CQL(H) (Kumar et al., 2020, https://arxiv.org/abs/2006.04779) on QR-DQN, for discrete
    actions.

    The loss is QR-DQN's plus ``cql_alpha * (logsumexp_a Q(s, a) - Q(s, a_data))`` (eq. 4) on the mean over quantiles.
    **One timestep of** ``learn`` **is one gradient step**, so that schedules, loggers, the progress bar and every SB3
    callback mean gradient steps. ``learn_online`` goes on in an environment.

    :param policy: ``"MlpPolicy"`` for vectors, ``"CnnPolicy"`` for images, or a class
    :param dataset: a ``minari.MinariDataset``, its id (downloaded if it is not here) or path, or a filled replay buffer
    :param env: environment for :meth:`learn_online`; its spaces must be the dataset's. Not needed to learn offline
    :param learning_rate: Adam's step size, or a schedule of the remaining progress (1 to 0)
    :param buffer_size: capacity for *new* transitions in :meth:`learn_online`
    :param learning_starts: online steps before the first online gradient step
    :param batch_size: transitions per gradient step
    :param tau: share of the online network that the target network takes over, 1 for a copy
    :param gamma: discount factor; higher looks further ahead, and learns slower
    :param train_freq: online: steps between updates, as in SB3
    :param gradient_steps: online: gradient steps per update, as in SB3
    :param n_steps: rewards summed before bootstrapping; higher spreads reward faster but keeps more of the behaviour
        policy
    :param target_update_interval: **gradient steps** (not environment steps as in QRDQN) between target updates
    :param exploration_fraction: online: share of the steps over which epsilon falls
    :param exploration_initial_eps: online: first epsilon
    :param exploration_final_eps: share of random actions in ``predict(deterministic=False)`` after offline training,
        and the last epsilon online; the paper evaluates with 0.001
    :param max_grad_norm: gradient clipping; None for none
    :param cql_alpha: weight of the conservative term. Higher stays closer to the data (use it for little or narrow
        data), lower trusts the values more; 0 is offline QR-DQN. The paper uses 4 for 1 % and 1 for 10 % of a replay
        log
    :param double_q: choose the next action with the online network. The authors' Atari code does not; d3rlpy and
        tianshou do
    :param clip_rewards: clip each reward to [-1, 1], as the DQN Replay Dataset has them
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.data.load_minari`: ``frame_stack``, ``subset``,
        ``storage``, ``prioritized``, ``seed`` (of the sampler; default: this model's), ...
    :param torch_compile: compile the networks' forward pass: 10 to 20 s at the start; measure whether it gains anything
    :param bf16: run the networks in bfloat16 (fast where the processor has it, slow where it does not)
    :param cuda_graphs: on a GPU, record the kernels of the loss once in each ``learn`` and replay them; False launches
        each by itself, as ``torch_compile`` does
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: as in QRDQN, for instance ``dict(n_quantiles=50)``; default 200 quantiles. The default
        ``optimizer_kwargs`` go with the default ``optimizer_class`` only
    :param verbose: 0 none, 1 info, 2 debug
    :param seed: seed of the networks and of the sampler
    :param device: as in SB3
    :param _init_setup_model: build the networks now
    :raises TypeError: if an environment is given as the dataset or the reverse
    :raises ValueError: if dataset, environment and policy do not fit together, or a number is out of range
    """

    policy_aliases: ClassVar[dict[str, Any]] = {
        k: v for k, v in QRDQN.policy_aliases.items() if k != "MultiInputPolicy"
    }

    def __init__(
        self,
        policy: str | type[QRDQNPolicy],
        dataset: DatasetLike | ReplayBuffer | None = None,
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 5e-5,
        buffer_size: int = 100_000,
        learning_starts: int = 0,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        n_steps: int = 1,
        target_update_interval: int = 2000,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 0.05,
        exploration_final_eps: float = 0.01,
        max_grad_norm: float | None = None,
        cql_alpha: float = 4.0,
        double_q: bool = False,
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
        check_arguments(policy, env, cql_alpha, batch_size, target_update_interval, n_steps, policy_kwargs)
        self.cql_alpha, self.double_q, self.clip_rewards = cql_alpha, double_q, clip_rewards
        self.dataset_kwargs = dict(dataset_kwargs or {})
        self.torch_compile, self.bf16 = torch_compile, bf16
        self.cuda_graphs = cuda_graphs and not torch_compile  # what is recorded must not be compiled meanwhile
        self.dataset_info: dict[str, Any] = {}
        self._last_means = {}
        self._offline_buffer, self._online_buffer = None, None
        self._sampler_state: Any = None
        self._offline = True
        # as in the QR-DQN paper for batches of 32
        policy_kwargs = with_adam(policy_kwargs, eps=0.01 / batch_size)
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
        self._policy_name = policy if isinstance(policy, str) else None
        if not _init_setup_model:
            return
        if dataset is None:
            raise TypeError(
                f"{type(self).__name__} needs a dataset: a MinariDataset, its id or path, or a filled replay buffer."
            )
        self._attach(dataset)
        self._setup_model()

    def _forward(self, net: Any, observations: th.Tensor) -> th.Tensor:
        with th.autocast(self.device.type, th.bfloat16, enabled=self.bf16):
            quantiles: th.Tensor = net(observations)
        return quantiles.float()

    def _next_quantiles(self, batch: ReplayBufferSamples) -> th.Tensor:
        quantiles = self._forward(self._target_forward, batch.next_observations)
        chooser = self._forward(self._online_forward, batch.next_observations) if self.double_q else quantiles
        best = chooser.mean(dim=1).argmax(dim=1)
        return quantiles[th.arange(len(best), device=best.device), :, best]

    def _loss(self, batch: ReplayBufferSamples) -> LossOutput:
        """
        Quantile Huber loss plus ``cql_alpha`` times the conservative gap, from one forward pass of the online network.

        :param batch: samples of the replay buffer
        :return: loss and TD error, ``[B]``; metrics ``td_loss``, ``conservative_gap``, ``q_data`` (mean Q of the data's
            actions), ``q_best`` (mean Q of the best actions), ``action_match`` (share of states where they coincide)
        """
        if self.clip_rewards and self.n_steps == 1:  # else the buffers clip, before they sum
            batch = batch._replace(rewards=batch.rewards.clamp(-1, 1))
        quantiles = self._forward(self._online_forward, batch.observations)
        td = self._quantile_loss(batch, quantiles)
        q_values = quantiles.mean(dim=1)
        gap = conservative_gap(q_values, batch.actions)
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

    def learn_online(
        self,
        total_timesteps: int,
        env: GymEnv | str | None = None,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "CQL_online",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        offline_fraction: float = 0.5,
        cql_alpha: float | None = None,
    ) -> Self:
        """
        Go on in an environment, from the same data plus new transitions. Here one timestep is one environment step.

        New transitions are kept over calls, as in SB3, as long as the number of environments stays the same.

        :param total_timesteps: environment steps
        :param env: the environment; default the one given before
        :param callback: SB3 callbacks
        :param log_interval: episodes between log lines
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues counting
        :param progress_bar: show progress
        :param offline_fraction: share of offline transitions in each batch, 0 to 1
        :param cql_alpha: weight of the conservative term from now on; lower lets the agent leave the data. Default:
            unchanged
        :return: self
        :raises ValueError: if there is no environment or no dataset, or a number is out of range
        """
        if self._offline_buffer is None:
            raise ValueError("There is no dataset: call set_dataset(dataset) after load().")
        if env is not None:
            self.set_env(gym.make(env) if isinstance(env, str) else env)
        if self.env is None:
            raise ValueError(
                "learn_online() needs an environment: pass env=, for instance sb3_ext.data.make_eval_env(dataset)."
            )
        if cql_alpha is not None:
            if not cql_alpha >= 0:
                raise ValueError(f"cql_alpha must not be negative, got {cql_alpha}.")
            self.cql_alpha = cql_alpha
        online = self._new_transitions()
        mixed = MixedReplayBuffer(self._offline_buffer, online, offline_fraction)
        mixed.pos, mixed.full = online.pos, online.full
        self.replay_buffer, self._offline = mixed, False
        return OffPolicyAlgorithm.learn(
            self, total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _new_transitions(self) -> OnlineReplayBuffer:
        """The online buffer, made when it is first needed or no longer fits the environments."""
        kept = self._online_buffer
        if kept is None or kept.n_envs != self.n_envs:
            if kept is not None and kept.size():
                warnings.warn(
                    f"The {kept.size() * kept.n_envs} transitions of {kept.n_envs} environment(s) are forgotten: there "
                    f"are {self.n_envs} environment(s) now. Use as many as before to keep them.",
                    stacklevel=3,
                )
            kept = self._online_buffer = self._make_online_buffer()
        kept.clip_rewards, kept.gamma = self.clip_rewards, self.gamma
        return kept

    def _make_online_buffer(self) -> OnlineReplayBuffer:
        offline = self._offline_buffer
        assert offline is not None
        # images take a frame per transition, as in the dataset; alpha 0 draws uniformly
        images = isinstance(offline, OfflineReplayBuffer) and is_image_space(self.observation_space)
        return OnlineReplayBuffer(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            self.device,
            self.n_envs,
            optimize_memory_usage=images,
            frame_stack=getattr(offline, "frame_stack", None),
            n_steps=self.n_steps,
            gamma=self.gamma,
            **(offline.priorities.settings if hasattr(offline, "priorities") else {"alpha": 0.0}),
        )
