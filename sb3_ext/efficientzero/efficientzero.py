"""EfficientZero V2 in SB3's shape: search in the policy, reanalysis in the loss, everything else is SB3's."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Self

import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import configure_logger

from sb3_ext.arguments import check_least, check_share
from sb3_ext.cuda_graphs import GraphedLoss
from sb3_ext.data.envs import padding_shown_by
from sb3_ext.data.load import DatasetLike
from sb3_ext.data.transforms.pipeline import transforms_of
from sb3_ext.efficientzero.explain import Explanation, explain
from sb3_ext.efficientzero.loss import random_intensity, random_shift, unroll, unrolled_loss
from sb3_ext.efficientzero.masking import MaskedCollection
from sb3_ext.efficientzero.policies import CnnPolicy, EfficientZeroPolicy, MlpPolicy, Rate, flush_rate
from sb3_ext.efficientzero.reanalysis import Targets, reanalyze
from sb3_ext.efficientzero.replay import SearchMemo, SequenceReplayBuffer, SequenceSamples, fill_replay_buffer
from sb3_ext.efficientzero.resume import random_state, restore_random_state
from sb3_ext.losses import LossOutput
from sb3_ext.normalize import begin_statistics
from sb3_ext.off_policy import OffPolicy
from sb3_ext.replay.frames import PADDING_TYPES
from sb3_ext.saving import FileLike
from sb3_ext.threads import with_loop_threads

VALUE_TARGETS = ("mixed", "n_step", "search")
SEARCH_VALUES = ("mean", "improved")
SEARCH_SETTINGS = (
    *("num_simulations", "max_num_considered_actions", "num_sampled_actions", "gamma"),
    *("torch_compile", "bf16", "cuda_graphs"),
)
"""Arguments that the policy gets unless ``policy_kwargs`` has them."""


class EfficientZeroV2(OffPolicy, MaskedCollection):
    """
    EfficientZero V2 (Wang et al., 2024, https://arxiv.org/abs/2403.00564): a learned latent model, searched with Gumbel
    sequential halving, for discrete and continuous actions, images and vectors.

    Every update draws windows of ``unroll_steps`` transitions by priority, searches anew from each of their
    observations with a target network (reanalysis) and trains reward, value and policy of the unrolled model towards
    what was found, and its latent states towards the encoded observations (SimSiam). Nothing runs in parallel, so a
    seed gives the same result on any machine of the same kind.

    Unlike the paper: values may be negative for continuous control too; value prefixes, which the paper has on Atari,
    are an option, ``policy_kwargs=dict(network_kwargs=dict(value_prefix=True))``. More in docs/efficientzero.md.

    :param policy: ``"MlpPolicy"`` for vectors, ``"CnnPolicy"`` for images, or a class
    :param env: environment with ``Box`` observations, and ``Discrete`` or ``Box`` actions
    :param learning_rate: step size, or a schedule of the remaining progress (1 to 0)
    :param buffer_size: transitions to keep, over all environments
    :param learning_starts: random steps before the first update
    :param batch_size: windows per update, B
    :param gamma: discount factor per step of the agent; higher looks further ahead
    :param train_freq: steps between updates, as in SB3
    :param gradient_steps: updates after each rollout, as in SB3; more learn more from less data and take longer
    :param n_steps: rewards summed before bootstrapping in value targets, n
    :param unroll_steps: steps of the model that a loss goes through, K
    :param num_simulations: network steps per search; more finds better actions and takes longer
    :param max_num_considered_actions: actions that share them at the root; None chooses by the number of actions
    :param num_sampled_actions: continuous control: actions sampled at the root
    :param value_target: ``"n_step"``: n-step returns; ``"search"``: search-based values; ``"mixed"``: the first until
        ``mixed_start``, then the second for windows older than ``mixed_threshold``
    :param search_value: ``"mean"``: search-based values are means of the network's value and of all returns that were
        backed up, as in the paper; ``"improved"``: expected completed Q under the improved policy, where visits that
        only compared actions do not count
    :param mixed_start: updates before search-based values are trusted; the paper has 30,000 on Atari
    :param mixed_threshold: environment steps after which a window is too old for n-step returns; the paper: 5,000
    :param target_update_interval: updates between copies of the network to the one that reanalysis uses
    :param memoize_reanalysis: search from a stored observation once per copy of the target network, not once per window
        that contains it: the same targets up to their noise, less work the longer the copies last
    :param reward_coef: weight of the reward loss
    :param value_coef: weight of the value loss; lower protects the representation from noisy values
    :param policy_coef: weight of the policy loss
    :param consistency_coef: weight of the self-supervised loss; higher helps most where rewards are rare
    :param ent_coef: weight of the policy's entropy, higher explores more; by default 0 for discrete actions, as in the
        paper, else 0.05
    :param max_grad_norm: gradient clipping; None for none
    :param image_shift: images are shifted at random by up to so many pixels for training; None: 4 from 32 pixels on,
        else 0
    :param optimize_memory_usage: store every frame of image stacks once
    :param replay_buffer_kwargs: arguments of :class:`~sb3_ext.efficientzero.replay.SequenceReplayBuffer`, such as
        ``alpha`` and ``beta``
    :param policy_kwargs: arguments of :class:`~sb3_ext.efficientzero.policies.EfficientZeroPolicy`
    :param torch_compile: compile the network's functions: a minute at the start; measure whether it gains anything
    :param bf16: run the network in bfloat16, in training and search. The search of an MLP on a CPU is compiled and
        float32 in any case
    :param cuda_graphs: on a GPU, run search and loss as CUDA graphs, captured once and replayed; False launches each
        kernel by itself, as ``torch_compile`` does
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param verbose: as in SB3
    :param seed: as in SB3
    :param device: as in SB3
    :param _init_setup_model: as in SB3
    :raises ValueError: if an argument is out of range, or spaces are not supported
    """

    policy_aliases: ClassVar[dict[str, Any]] = {"MlpPolicy": MlpPolicy, "CnnPolicy": CnnPolicy}
    _random_state: dict[str, Any] | None = None
    policy: EfficientZeroPolicy
    policy_target: EfficientZeroPolicy

    def __init__(
        self,
        policy: str | type[EfficientZeroPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 100_000,
        learning_starts: int = 200,
        batch_size: int = 64,
        gamma: float = 0.997,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = -1,
        n_steps: int = 5,
        unroll_steps: int = 5,
        num_simulations: int = 16,
        max_num_considered_actions: int | None = None,
        num_sampled_actions: int = 16,
        value_target: str = "mixed",
        search_value: str = "mean",
        mixed_start: int = 500,
        mixed_threshold: int = 500,
        target_update_interval: int = 100,
        memoize_reanalysis: bool = False,
        reward_coef: float = 1.0,
        value_coef: float = 0.25,
        policy_coef: float = 1.0,
        consistency_coef: float = 2.0,
        ent_coef: float | None = None,
        max_grad_norm: float | None = 5.0,
        image_shift: int | None = None,
        optimize_memory_usage: bool = False,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        torch_compile: bool = False,
        bf16: bool = False,
        cuda_graphs: bool = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if policy == "MultiInputPolicy" or isinstance(getattr(env, "observation_space", None), spaces.Dict):
            raise ValueError(
                "EfficientZeroV2 needs Box observations, not Dict: wrap the environment in "
                "sb3_ext.data.TransformedEnv(env, 'flatten'), and take MlpPolicy."
            )
        check_least(
            1, n_steps=n_steps, unroll_steps=unroll_steps, num_simulations=num_simulations, batch_size=batch_size,
            target_update_interval=target_update_interval, max_num_considered_actions=max_num_considered_actions,
        )  # fmt: skip
        check_least(2, num_sampled_actions=num_sampled_actions)
        check_least(
            0, mixed_start=mixed_start, mixed_threshold=mixed_threshold, reward_coef=reward_coef,
            value_coef=value_coef, policy_coef=policy_coef, consistency_coef=consistency_coef, ent_coef=ent_coef,
            max_grad_norm=max_grad_norm, image_shift=image_shift,
        )  # fmt: skip
        check_share(gamma=gamma)
        if value_target not in VALUE_TARGETS:
            raise ValueError(f"value_target must be one of {', '.join(VALUE_TARGETS)}, not {value_target!r}.")
        if search_value not in SEARCH_VALUES:
            raise ValueError(f"search_value must be one of {', '.join(SEARCH_VALUES)}, not {search_value!r}.")
        window = unroll_steps + n_steps
        if buffer_size < window:
            raise ValueError(f"Windows have {window} transitions, buffer_size is {buffer_size}. Raise it.")
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau=1.0,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            replay_buffer_class=SequenceReplayBuffer,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
        )
        self.unroll_steps, self.num_simulations = unroll_steps, num_simulations
        self.num_sampled_actions, self.max_num_considered_actions = num_sampled_actions, max_num_considered_actions
        self.value_target, self.search_value = value_target, search_value
        self.mixed_start, self.mixed_threshold = mixed_start, mixed_threshold
        self.target_update_interval, self.memoize_reanalysis = target_update_interval, memoize_reanalysis
        self.reward_coef, self.value_coef, self.policy_coef = reward_coef, value_coef, policy_coef
        self.consistency_coef, self.ent_coef = consistency_coef, ent_coef
        self.max_grad_norm, self.image_shift = max_grad_norm, image_shift
        self.torch_compile, self.bf16 = torch_compile, bf16
        self.cuda_graphs = cuda_graphs and not torch_compile  # what is graphed must not be compiled meanwhile
        self._update_rate = Rate()
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        _check_supported(self.observation_space, self.action_space, self.policy_class, self.batch_size)
        if self.image_shift is None:
            shape = self.observation_space.shape or ()
            self.image_shift = 4 if len(shape) == 3 and min(shape[1:]) >= 32 else 0
        if self.ent_coef is None:
            self.ent_coef = 0.0 if isinstance(self.action_space, spaces.Discrete) else 5e-2
        super()._setup_model()
        self.policy_target = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)  # type: ignore[assignment]
        self.policy_target.load_state_dict(self.policy.state_dict())
        settings: dict[str, Any] = {name: getattr(self, name) for name in SEARCH_SETTINGS}
        settings |= {name: value for name, value in self.policy_kwargs.items() if name in SEARCH_SETTINGS}
        for policy in (self.policy, self.policy_target):
            policy.configure_search(**settings)
            if self.device.type == "cuda":
                policy.to(memory_format=th.channels_last)
        self.policy_target.set_training_mode(False)
        self._forget_graphs()

    def _make_replay_buffer(self) -> SequenceReplayBuffer:
        kwargs = {"alpha": 1.0, "beta": 1.0, **self.replay_buffer_kwargs, "length": self._window_length}
        rest = self.device, self.n_envs, self.optimize_memory_usage
        return SequenceReplayBuffer(self.buffer_size, self.observation_space, self.action_space, *rest, **kwargs)

    @property
    def _window_length(self) -> int:
        """Transitions per window."""
        return self.unroll_steps + (0 if self.value_target == "search" else self.n_steps)

    def _forget_graphs(self) -> None:
        self.graphed_loss = GraphedLoss(self.policy.network, partial(unroll, self))

    def _after_update(self, number: int) -> None:
        if self._n_updates % self.target_update_interval == 0:
            self.policy_target.load_state_dict(self.policy.state_dict())

    def augment(self, observations: th.Tensor) -> th.Tensor:
        """Shift images ``[B, *obs_shape]`` and change their intensity at random; leave vectors alone."""
        if not self.image_shift:
            return observations
        return random_intensity(random_shift(observations, self.image_shift), 0.05)

    def reanalyze(self, batch: SequenceSamples) -> Targets:
        """Targets of value and policy: search from the first K + 1 observations of windows with the target network."""
        late = self.value_target == "mixed" and self._n_updates >= self.mixed_start
        memo = None
        if self.memoize_reanalysis:
            buffer, policy = self.replay_buffer, self.policy
            assert isinstance(buffer, SequenceReplayBuffer)
            memo = buffer.memo = buffer.memo or SearchMemo(buffer.buffer_size * buffer.n_envs)
            memo.settings = repr((self.search_value, self.gamma, policy.num_simulations, policy.considered))
        return reanalyze(
            self.policy_target, batch, unroll_steps=self.unroll_steps, n_steps=self.n_steps,
            max_age=-1 if self.value_target == "search" else self.mixed_threshold if late else None,
            improved_values=self.search_value == "improved", memo=memo,
        )  # fmt: skip

    def compute_loss(self, batch: SequenceSamples) -> LossOutput:
        """
        Loss ``[B]`` of windows unrolled through the model, see :func:`~sb3_ext.efficientzero.loss.unrolled_loss`.

        :raises FloatingPointError: if a term is not finite, on a CPU; names it
        """
        return unrolled_loss(self, batch, self.reanalyze(batch))

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """See :meth:`~sb3_ext.off_policy.OffPolicy.train`."""
        with self._update_rate.measure(gradient_steps):
            super().train(gradient_steps, batch_size)

    def dump_logs(self) -> None:
        """Write the log, with the speed since the last time."""
        searches = self.policy.search_rate, self.policy_target.search_rate
        for name, rate in (("search_simulations", flush_rate(*searches)), ("updates", flush_rate(self._update_rate))):
            if rate is not None:
                self.logger.record(f"time/{name}_per_second", rate)
        super().dump_logs()

    @with_loop_threads
    def pretrain(self, dataset: DatasetLike, gradient_steps: int) -> Self:
        """
        Put a Minari dataset into the replay buffer and learn from it by reanalysis, before :meth:`learn` or instead.

        ``learn`` then begins with random steps as long as ``learning_starts`` says; set that to 0 to go on at once.
        Frames are stacked as the environment does at the start of an episode. It is reset to see that, so that
        ``learn`` begins a new episode; without an environment, zeros stand before the first frame.

        :param dataset: a ``MinariDataset``, an id or a path; of this environment
        :param gradient_steps: updates
        :return: self
        :raises DatasetError: if it is damaged, of other spaces, or larger than the buffer; nothing is added then
        :raises ValueError: if there are several environments
        """
        buffer = self.replay_buffer
        assert isinstance(buffer, SequenceReplayBuffer)
        fill_replay_buffer(buffer, dataset, self.policy, self._padding_shown, transforms_of(self.env))
        begin_statistics(self._vec_normalize_env, lambda i: buffer.store.take(i, i)[0], buffer.size())
        if not self._custom_logger and not hasattr(self, "_logger"):
            self._logger = configure_logger(self.verbose, self.tensorboard_log, "pretrain")
        self.train(gradient_steps, self.batch_size)
        return self

    def _padding_shown(self, n_frames: int) -> frozenset[str]:
        """What the environment has before an episode's first frame; any if there is no environment."""
        if self.env is None:
            return frozenset(PADDING_TYPES)
        self._last_obs = None  # it is reset, so the episode is not gone on with
        return padding_shown_by(self.env, n_frames)

    def explain(self, observation: NDArray[Any], deterministic: bool = True, action_masks: Any = None) -> Explanation:
        """
        Search once from one observation and say what the search did: ``print`` it, or ``draw`` its tree.

        :param observation: as for ``predict``, a single one
        :param deterministic: without Gumbel noise
        :param action_masks: as for ``predict``
        :return: see :class:`~sb3_ext.efficientzero.explain.Explanation`
        :raises ValueError: if it is a batch, or the masks do not fit
        """
        return explain(self.policy, observation, deterministic, action_masks)

    @with_loop_threads
    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "EfficientZeroV2",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Collect and learn, as in SB3.

        The first call after ``load`` with ``reset_num_timesteps=False`` goes on with the random state that was saved.
        If the environment is reset then, it is seeded with ``seed + num_timesteps``: with the seed alone every part of
        a run would begin with the same episodes.

        :param total_timesteps: environment steps
        :param callback: SB3 callbacks
        :param log_interval: episodes between log lines
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues counting
        :param progress_bar: show progress
        :return: self
        """
        if self._random_state is not None and not reset_num_timesteps:
            if self._last_obs is None and self.seed is not None and self.env is not None:
                self.env.seed(self.seed + self.num_timesteps)
            restore_random_state(self, self._random_state)
        self._random_state = None
        self._forget_graphs()  # they have the coefficients of then
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def save(self, path: FileLike, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """See :meth:`~sb3_ext.off_policy.OffPolicy.save`; with the random state."""
        before = self._random_state
        self._random_state = before or random_state(self)  # a loaded model that has not gone on keeps the one it had
        try:
            super().save(path, exclude, include)
        finally:
            self._random_state = before

    def _check_loaded_buffer(self, before: ReplayBuffer | None) -> None:
        if not isinstance(self.replay_buffer, SequenceReplayBuffer):
            raise ValueError(f"The file holds a {type(self.replay_buffer).__name__}, not one of EfficientZeroV2.")
        self.replay_buffer.length = self._window_length

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "policy_target", "_update_rate", "graphed_loss"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy_target", "policy.optimizer"], []


def _check_supported(
    observations: spaces.Space[Any], actions: spaces.Space[Any], policy_class: type[BasePolicy], batch_size: int
) -> None:
    """Refuse spaces that are not supported, and say what is wrong."""
    if not isinstance(observations, spaces.Box):
        raise ValueError(f"EfficientZeroV2 needs Box observations, not {observations}.")
    if not isinstance(actions, spaces.Discrete | spaces.Box):
        raise ValueError(f"EfficientZeroV2 needs Discrete or Box actions, not {actions}.")
    if isinstance(actions, spaces.Discrete) and actions.start != 0:
        raise ValueError(f"Discrete actions must begin at 0, not {actions}: gymnasium.wrappers.TransformAction.")
    if not issubclass(policy_class, CnnPolicy):
        return
    shape, high = observations.shape, observations.high.max()
    if len(shape) != 3:
        raise ValueError(f"CnnPolicy needs images, the observations have shape {shape}: MlpPolicy.")
    if is_image_space(observations) and not is_image_space_channels_first(observations):
        raise ValueError(f"Images must come channels first, not as {shape}: VecTransposeImage.")
    if not 0 < high < 1e6:
        raise ValueError(
            f"CnnPolicy divides images by the upper bound of their space, which is {high}; give the space the bounds "
            "that the pixels have."
        )
    if batch_size < 2:
        raise ValueError("CnnPolicy has batch norm and needs a batch_size of at least 2.")
