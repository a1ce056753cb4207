"""Conservative Q-learning on QR-DQN: offline from a Minari dataset, then online if wanted."""

from __future__ import annotations

import io
import pathlib
import time
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import configure_logger, polyak_update
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext.common.buffers import MixedReplayBuffer, OfflineReplayBuffer
from sb3_ext.common.losses import conservative_gap
from sb3_ext.common.training import LossOutput, MetricMeans, train_weighted
from sb3_ext.cql.offline import OfflineEnv, OfflineProgressBar, warn_on_overestimation
from sb3_ext.data.minari import DatasetLike, load_minari
from sb3_ext.dqn.dqn import QRDQN


class CQL(QRDQN):
    """
    Conservative Q-learning CQL(H) (Kumar et al., 2020, https://arxiv.org/abs/2006.04779) on QR-DQN, for discrete actions.

    The loss is QR-DQN's plus ``cql_alpha * (logsumexp_a Q(s, a) - Q(s, a_data))`` (eq. 4) on the mean over quantiles.
    **One timestep of** ``learn`` **is one gradient step**, so that schedules, loggers, the progress bar and every SB3 callback mean
    gradient steps. ``learn_online`` goes on in an environment.

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
    :param n_steps: rewards summed before bootstrapping; higher spreads reward faster but keeps more of the behaviour policy
    :param target_update_interval: **gradient steps** (not environment steps as in QRDQN) between target updates
    :param exploration_fraction: online: share of the steps over which epsilon falls
    :param exploration_initial_eps: online: first epsilon
    :param exploration_final_eps: online: last epsilon
    :param max_grad_norm: gradient clipping; None for none
    :param cql_alpha: weight of the conservative term. Higher stays closer to the data (use it for little or narrow data), lower
        trusts the values more; 0 is offline QR-DQN. The paper uses 4 for 1 % and 1 for 10 % of a replay log
    :param double_q: choose the next action with the online network. The authors' Atari code does not; d3rlpy and tianshou do
    :param clip_rewards: clip rewards to [-1, 1], as the DQN Replay Dataset has them
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.data.load_minari`: ``frame_stack``, ``subset``, ``storage``, ...
    :param torch_compile: compile the networks' forward pass (about 10 to 20 s at the start, then faster)
    :param bf16: run the networks in bfloat16 (fast where the processor has it, slow where it does not)
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: as in QRDQN, for instance ``dict(n_quantiles=50)``; default 200 quantiles
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
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        _check_arguments(policy, env, cql_alpha, batch_size, target_update_interval, n_steps)
        self.cql_alpha, self.double_q, self.clip_rewards = cql_alpha, double_q, clip_rewards
        self.dataset_kwargs = dict(dataset_kwargs or {})
        self.torch_compile, self.bf16 = torch_compile, bf16
        self.dataset_info: dict[str, Any] = {}
        self._metrics = MetricMeans()
        self._sampler_state: dict[str, Any] | None = None
        self._offline = True
        # fused Adam: same update, a fifth of the time; eps as in the QR-DQN paper for batches of 32
        policy_kwargs = {
            "optimizer_class": th.optim.Adam,
            "optimizer_kwargs": {"eps": 0.01 / batch_size, "fused": True},
            **(policy_kwargs or {}),
        }
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

    # ------------------------------------------------------------------ set-up

    def _attach(self, dataset: DatasetLike | ReplayBuffer) -> None:
        """Load and check the dataset; take the spaces from it, or compare them with the environment's."""
        if isinstance(dataset, ReplayBuffer):
            buffer = dataset
            if buffer.size() == 0:
                raise ValueError("The replay buffer is empty; fill it before passing it as the dataset.")
            buffer.device = self.device
            if isinstance(buffer, OfflineReplayBuffer):
                buffer.n_steps, buffer.gamma = self.n_steps, self.gamma
            elif self.n_steps > 1 and getattr(buffer, "n_steps", 1) != self.n_steps:
                raise ValueError(
                    "For n_steps > 1 pass a Minari dataset, or an NStepReplayBuffer with the same n_steps."
                )
        else:
            buffer = load_minari(
                dataset, n_steps=self.n_steps, gamma=self.gamma, device=self.device, **self.dataset_kwargs
            )
        if not isinstance(buffer.action_space, spaces.Discrete):
            raise ValueError(f"{type(self).__name__} needs Discrete actions, the dataset has {buffer.action_space}.")
        known = getattr(self, "observation_space", None)
        if known is None:
            self.observation_space, self.action_space, self.n_envs = buffer.observation_space, buffer.action_space, 1
        else:
            for what, ours, theirs in (
                ("observation_space", buffer.observation_space, self.observation_space),
                ("action_space", buffer.action_space, self.action_space),
            ):
                if ours != theirs:
                    raise ValueError(
                        f"The {what} of the dataset and of the model or environment differ: {_short(ours)} and {_short(theirs)}. Build the "
                        "environment with sb3_ext.data.make_eval_env(dataset), or set frame_stack in dataset_kwargs."
                    )
        if self._policy_name is not None:
            _check_policy(self._policy_name, buffer.observation_space, self.policy_kwargs)
        self.dataset_info = dict(getattr(buffer, "info", {}))
        self._offline_buffer = buffer
        self.replay_buffer = buffer
        self._bound = self._largest_return(buffer)

    def _largest_return(self, buffer: ReplayBuffer) -> float:
        """Largest discounted return in the data, in the units of the Q values."""
        if not isinstance(buffer, OfflineReplayBuffer):
            return float("nan")
        rewards = np.clip(buffer.rewards, -1, 1) if self.clip_rewards else None
        return float(buffer.discounted_returns(self.gamma, rewards).max())

    def set_dataset(self, dataset: DatasetLike | ReplayBuffer) -> None:
        """
        Give a loaded model its data back, or other data of the same spaces.

        The sampler goes on where the saved model's stood, so that training continues bit for bit.

        :param dataset: as in the constructor
        :raises ValueError: if the spaces differ
        """
        self._attach(dataset)
        self._seed_sampler()

    def _seed_sampler(self) -> None:
        if isinstance(self.replay_buffer, OfflineReplayBuffer):
            self.replay_buffer.seed(self.seed)
            if self._sampler_state is not None:
                self.replay_buffer.rng.bit_generator.state = self._sampler_state

    def _setup_model(self) -> None:
        # load() comes here without data; the smallest buffer keeps SB3 from allocating one for a million transitions
        buffer, self.buffer_size, size = self.replay_buffer, 1, self.buffer_size
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of environments used is greater than the target")
            super()._setup_model()
        self.buffer_size, self.replay_buffer = size, buffer
        self.replay_buffer_class, self.replay_buffer_kwargs = None, {}
        self.policy = self.policy.to(memory_format=th.channels_last)  # type: ignore[call-overload]
        self._create_aliases()
        self._online_forward, self._target_forward = self.quantile_net.forward, self.quantile_net_target.forward
        if self.torch_compile:
            self._online_forward = th.compile(self._online_forward)
            self._target_forward = th.compile(self._target_forward)
        self._seed_sampler()

    def get_env(self) -> VecEnv | None:
        """
        Return the environment; while learning offline without one, a stand-in with the right spaces that refuses to step.

        :return: the environment
        """
        if self._offline or self.env is None:
            return DummyVecEnv([lambda: OfflineEnv(self.observation_space, self.action_space)])
        return self.env

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment for :meth:`learn_online`.

        :param env: environment with the dataset's spaces
        :param force_reset: as in SB3
        """
        self.n_envs = env.num_envs if isinstance(env, VecEnv) else 1
        super().set_env(env, force_reset)

    # ------------------------------------------------------------------ loss

    def _forward(self, net: Any, observations: th.Tensor) -> th.Tensor:
        with th.autocast(self.device.type, th.bfloat16, enabled=self.bf16):
            quantiles: th.Tensor = net(observations)
        return quantiles.float()

    def _next_quantiles(self, batch: ReplayBufferSamples) -> th.Tensor:
        quantiles = self._forward(self._target_forward, batch.next_observations)
        chooser = self._forward(self._online_forward, batch.next_observations) if self.double_q else quantiles
        best = chooser.mean(dim=1).argmax(dim=1)
        return quantiles[th.arange(len(best), device=best.device), :, best]

    def compute_loss(self, batch: ReplayBufferSamples) -> LossOutput:
        """
        Quantile Huber loss plus ``cql_alpha`` times the conservative gap, from one forward pass of the online network.

        :param batch: samples of the replay buffer
        :return: loss and TD error, ``[B]``; metrics ``td_loss``, ``conservative_gap``, ``q_data`` (mean Q of the data's actions),
            ``q_best`` (mean Q of the best actions), ``action_match`` (share of states where they coincide)
        """
        if self.clip_rewards:
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

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Run gradient steps and update the target network every ``target_update_interval`` of them.

        :param gradient_steps: number of steps
        :param batch_size: samples per step
        """
        for _ in range(gradient_steps):
            train_weighted(self, self.compute_loss, 1, batch_size, self._metrics)
            if self._n_updates % self.target_update_interval == 0:
                self._update_target()

    def _update_target(self) -> None:
        polyak_update(self.quantile_net.parameters(), self.quantile_net_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _on_step(self) -> None:
        # QRDQN counts environment steps to update the target network; here train() counts gradient steps
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    # ------------------------------------------------------------------ learning

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str = "CQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Learn offline. **One timestep is one gradient step.**

        :param total_timesteps: gradient steps
        :param callback: SB3 callbacks, called once per gradient step
        :param log_interval: gradient steps between log lines; None for none
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues counting, after ``load`` for instance
        :param progress_bar: show progress with losses and values
        :return: self
        :raises ValueError: if a loaded model was not given its dataset
        :raises FloatingPointError: if the loss is not finite
        """
        if self.replay_buffer is None:
            raise ValueError("There is no dataset: call set_dataset(dataset) after load().")
        if isinstance(self.replay_buffer, MixedReplayBuffer):
            self.replay_buffer = self._offline_buffer
        self._offline = True
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        self._log_coverage()
        while self.num_timesteps < total_timesteps:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.num_timesteps += 1
            self.train(gradient_steps=1, batch_size=self.batch_size)
            callback.update_locals(locals())
            if not callback.on_step():
                break
            if log_interval and self.num_timesteps % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

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

        :param total_timesteps: environment steps
        :param env: the environment; default the one given before
        :param callback: SB3 callbacks
        :param log_interval: episodes between log lines
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues counting
        :param progress_bar: show progress
        :param offline_fraction: share of offline transitions in each batch, 0 to 1
        :param cql_alpha: weight of the conservative term from now on; lower lets the agent leave the data. Default: unchanged
        :return: self
        :raises ValueError: if there is no environment or no dataset, or a number is out of range
        """
        if self.replay_buffer is None:
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
        online = self._online_buffer(reset_num_timesteps)
        self.replay_buffer = MixedReplayBuffer(self._offline_buffer, online, offline_fraction)
        self._offline = False
        return OffPolicyAlgorithm.learn(
            self, total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _online_buffer(self, fresh: bool) -> ReplayBuffer:
        mixed = self.replay_buffer
        if isinstance(mixed, MixedReplayBuffer) and not fresh and mixed.online.n_envs == self.n_envs:
            return mixed.online
        kind: type[ReplayBuffer] = ReplayBuffer
        kwargs: dict[str, Any] = {}
        if self.n_steps > 1:
            from stable_baselines3.common.buffers import NStepReplayBuffer

            kind, kwargs = NStepReplayBuffer, {"n_steps": self.n_steps, "gamma": self.gamma}
        return kind(self.buffer_size, self.observation_space, self.action_space, self.device, self.n_envs, **kwargs)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if not self._offline:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        # BaseAlgorithm._setup_learn without its reset of the environment
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps, self._episode_num = 0, 0
        self._total_timesteps = total_timesteps + self.num_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        with warnings.catch_warnings():
            # EvalCallback compares its environment with the training environment, which does not exist
            warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
            return self._total_timesteps, self._init_callback(callback, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not (progress_bar and self._offline):
            return super()._init_callback(callback, progress_bar)
        inner = super()._init_callback(callback, progress_bar=False)
        both = CallbackList([inner, OfflineProgressBar()])
        both.init_callback(self)
        return both

    def dump_logs(self) -> None:
        """Write the means since the last call to the logger, and look whether the values are plausible."""
        means = self._metrics.flush()
        for key, value in means.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if np.isfinite(self._bound) and "q_best" in means:
            self.logger.record("train/largest_data_return", self._bound)
            warn_on_overestimation(self, means["q_best"], self._bound)
        super().dump_logs()

    def _log_coverage(self) -> None:
        if isinstance(self.replay_buffer, OfflineReplayBuffer):
            share = self.replay_buffer.action_counts() / self.replay_buffer.buffer_size
            entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
            self.logger.record("dataset/action_coverage", float(np.exp(entropy) / len(share)))
            self.logger.record("dataset/rarest_action_share", float(share.min()))
            self.logger.record("dataset/behaviour_return", float(self.replay_buffer.episode_returns().mean()))

    # ------------------------------------------------------------------ saving

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """See SB3; without the dataset, with the place of the sampler in it."""
        if isinstance(self._offline_buffer_or_none(), OfflineReplayBuffer):
            self._sampler_state = self._offline_buffer.rng.bit_generator.state
        super().save(path, exclude, include)

    def _offline_buffer_or_none(self) -> ReplayBuffer | None:
        return getattr(self, "_offline_buffer", None)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_offline_buffer",
            "_metrics",
            "_online_forward",
            "_target_forward",
            "_offline",
        ]


def _check_arguments(
    policy: Any, env: Any, cql_alpha: float, batch_size: int, target_update_interval: int, n_steps: int
) -> None:
    if isinstance(policy, str) and policy == "MultiInputPolicy":
        raise ValueError(
            "MultiInputPolicy is for Dict observations, which offline datasets here do not have; use MlpPolicy or CnnPolicy."
        )
    if env is not None and not isinstance(env, (gym.Env, VecEnv, str)):
        raise TypeError(
            f"env must be an environment or its id, not {type(env).__name__}; the dataset is the argument before it."
        )
    if isinstance(env, str) and env not in gym.registry and ":" not in env:
        raise ValueError(f"{env!r} is no registered environment; if it is a dataset, pass it as dataset=.")
    if not cql_alpha >= 0:
        raise ValueError(f"cql_alpha must not be negative, got {cql_alpha}.")
    for name, value in (
        ("batch_size", batch_size),
        ("target_update_interval", target_update_interval),
        ("n_steps", n_steps),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_policy(policy: str, space: spaces.Space[Any], policy_kwargs: dict[str, Any]) -> None:
    image = is_image_space(space)
    own_extractor = policy_kwargs.get("features_extractor_class", FlattenExtractor) is not FlattenExtractor
    if own_extractor:
        return
    if policy == "CnnPolicy" and not image:
        raise ValueError(f"CnnPolicy needs images (uint8, 0 to 255), the dataset has {_short(space)}. Use 'MlpPolicy'.")
    if policy == "MlpPolicy" and image:
        raise ValueError(f"MlpPolicy needs vectors, the dataset has images ({_short(space)}). Use 'CnnPolicy'.")


def _short(space: spaces.Space[Any] | None) -> str:
    """Name a space without printing its bounds element by element."""
    if isinstance(space, spaces.Box):
        return f"Box({space.low.min()}, {space.high.max()}, {space.shape}, {space.dtype})"
    return str(space)
