"""Generative adversarial imitation learning around one PPO."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch as th
from imitation.rewards.reward_nets import RewardNet
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_ext.arguments import check_least
from sb3_ext.data.envs import is_frame_space
from sb3_ext.gail.demonstrations import Demonstrations, DemonstrationsLike, check_observations_of
from sb3_ext.gail.discriminator import Discriminator
from sb3_ext.gail.reward import LOGIT_CLIP, AbsorbingStates, RewardForm, make_reward_net, reward_form
from sb3_ext.gail.rollout import RolloutNotes
from sb3_ext.saving import FileLike, save_whole
from sb3_ext.threads import with_loop_threads


class GAIL(PPO):
    """
    Generative adversarial imitation learning (Ho and Ermon, 2016) with PPO as the generator.

    A discriminator D(s, a) learns to tell the expert's steps from the agent's (algorithm 1, equation 17), and PPO
    learns from a reward made of it. After each rollout the discriminator is trained first and then gives the whole
    rollout its reward at once, so rewards are never a round old. The environment's own reward is not used;
    ``rollout/ep_rew_mean`` still shows it. Networks, input normalisation and the sign of the logits (high for the
    expert) are those of the ``imitation`` library.

    With ``reward="airl"`` this is adversarial inverse reinforcement learning (Fu et al., 2018): the network is f,
    the logit is f(s, a) - log pi(a|s), and the reward is that logit.

    :param policy: as in PPO
    :param env: environment to learn in, or its id; keep ``n_steps`` times its number of copies near 1,024
    :param demonstrations: a Minari dataset (object, id or path), imitation trajectories, episodes of
        :func:`sb3_ext.data.collect_episodes`, or an SB3 ``ReplayBuffer``; never saved with the model
    :param learning_rate: of PPO; a float or a schedule
    :param n_steps: steps per environment and rollout; the discriminator is trained once per rollout
    :param batch_size: as in PPO
    :param n_epochs: as in PPO
    :param gamma: as in PPO; also sets how much an end weighs, see ``absorbing``
    :param gae_lambda: as in PPO
    :param clip_range: as in PPO
    :param clip_range_vf: as in PPO
    :param normalize_advantage: as in PPO
    :param ent_coef: as in PPO
    :param vf_coef: as in PPO
    :param max_grad_norm: as in PPO
    :param use_sde: as in PPO
    :param sde_sample_freq: as in PPO
    :param rollout_buffer_class: as in PPO
    :param rollout_buffer_kwargs: as in PPO
    :param target_kl: as in PPO
    :param reward: what PPO maximises, for a logit l and D = sigmoid(l) the probability that the expert acted:
        ``"-log(1-D)"`` = log(1 + e^l) is always positive; without ``absorbing`` it pays for long episodes.
        ``"log(D)"`` = -log(1 + e^-l) is always negative and pays for short ones. ``"D"`` is positive and bounded
        by 1, so it hardly tells good from very good. ``"logit"`` = l = log D - log(1 - D) is unbiased where D = 1/2.
        ``"airl"``: see above. Or a function from logits ``[B]`` to rewards ``[B]``
    :param absorbing: value what lies behind the end of an episode by how often the expert's episodes end (see
        :class:`~sb3_ext.gail.reward.AbsorbingStates`); False leaves the bias of the reward form as it is, and
        an end is worth 0
    :param reward_net_class: a reward network of ``imitation``, channel first for pictures; default:
        :class:`~sb3_ext.gail.reward.NatureRewardNet` for pictures, else ``BasicRewardNet``
    :param reward_net_kwargs: further arguments for it, ``{"hid_sizes": (64, 64)}`` for instance
    :param disc_learning_rate: of the discriminator's Adam; a float or a schedule. Higher: a sharper, more restless
        reward
    :param disc_batch_size: transitions per discriminator step, as many of the expert as of the agent
    :param n_disc_updates: discriminator steps per rollout. More: a sharper reward
    :param gradient_penalty: weight of the gradient penalty on the discriminator. Higher: a smoother reward between
        expert and agent, which makes training steadier; 0 for none
    :param penalty_every: take it at every so many discriminator steps only, and as many times as heavy (Karras et al.,
        2020, section 3.1). Higher: cheaper, less steady
    :param spectral_norm: spectral normalisation of the discriminator's layers
    :param replay_rollouts: how many rollouts the agent's transitions are drawn from, the last included
    :param bc_epochs: passes over the demonstrations of behaviour cloning before the first rollout
    :param stats_window_size: as in PPO
    :param tensorboard_log: as in PPO
    :param policy_kwargs: as in PPO
    :param verbose: as in PPO
    :param seed: as in PPO
    :param device: as in PPO
    :param _init_setup_model: as in PPO
    :raises DatasetError: if the demonstrations are damaged, invalid or of another environment
    :raises TypeError: if they are of no known kind, or observations are not arrays
    :raises ValueError: for an unknown reward, or fewer transitions than ``disc_batch_size``
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        demonstrations: DemonstrationsLike | None = None,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 1024,
        batch_size: int = 256,
        n_epochs: int = 10,
        gamma: float = 0.98,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        reward: str | RewardForm = "-log(1-D)",
        absorbing: bool = True,
        reward_net_class: type[RewardNet] | None = None,
        reward_net_kwargs: dict[str, Any] | None = None,
        disc_learning_rate: float | Schedule = 1e-3,
        disc_batch_size: int = 512,
        n_disc_updates: int = 16,
        gradient_penalty: float = 1.0,
        penalty_every: int = 2,
        spectral_norm: bool = False,
        replay_rollouts: int = 1,
        bc_epochs: int = 0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        reward_form(reward)
        check_observations_of(getattr(env, "observation_space", None))
        check_least(1, disc_batch_size=disc_batch_size, penalty_every=penalty_every, replay_rollouts=replay_rollouts)
        check_least(0, n_disc_updates=n_disc_updates, gradient_penalty=gradient_penalty, bc_epochs=bc_epochs)
        check_least(0, disc_learning_rate=None if callable(disc_learning_rate) else disc_learning_rate)
        self.reward, self.absorbing = reward, absorbing
        self.reward_net_class, self.reward_net_kwargs = reward_net_class, reward_net_kwargs or {}
        self.disc_learning_rate, self.disc_batch_size = disc_learning_rate, disc_batch_size
        self.n_disc_updates, self.gradient_penalty, self.spectral_norm = n_disc_updates, gradient_penalty, spectral_norm
        self.penalty_every, self.replay_rollouts, self.bc_epochs = penalty_every, replay_rollouts, bc_epochs
        self._demonstrations: Demonstrations | None = None
        self._generator_share: float | None = None
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # load() passes None, as it does to PPO
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if demonstrations is not None:
            self.set_demonstrations(demonstrations)
        if _init_setup_model:
            self._setup_model()

    def set_demonstrations(self, demonstrations: DemonstrationsLike) -> None:
        """
        Give the model demonstrations: a loaded one its own again, or others that fit its spaces.

        Frames are stacked as the environment does at the start of an episode. It is reset to see that, so that
        :meth:`learn` then begins a new episode; without an environment, zeros stand before the first frame.

        :param demonstrations: as in the constructor
        :raises DatasetError: see the constructor
        :raises TypeError: see the constructor
        :raises ValueError: if they hold fewer transitions than ``disc_batch_size``
        """
        found = Demonstrations(demonstrations, self.observation_space, self.action_space, self.env, self.device)
        if found.n_frames > 1:
            self._last_obs = None
        if len(found) < self.disc_batch_size:
            raise ValueError(
                f"{found.name}: {len(found)} transitions are fewer than one discriminator batch; record more, or pass "
                f"disc_batch_size={len(found)} or less (it is {self.disc_batch_size})."
            )
        if self.absorbing:
            self._absorbing = AbsorbingStates(self.gamma, len(found), found.n_terminated)
        self._demonstrations = found

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment; see SB3.

        :param force_reset: as in SB3; False also leaves the demonstrations' frame stacks as they are
        :raises DatasetError: if the demonstrations are frame stacks that begin an episode otherwise
        """
        super().set_env(env, force_reset)
        if force_reset and self._demonstrations is not None and self.env is not None:
            self._demonstrations.match_padding(self.env)

    def _setup_model(self) -> None:
        super()._setup_model()
        spaces = self.observation_space, self.action_space
        net = make_reward_net(*spaces, self.reward_net_class, self.reward_net_kwargs, self.spectral_norm)
        self.discriminator = Discriminator(
            *spaces, net, self.disc_learning_rate, self.gradient_penalty, self.device, self.penalty_every
        )
        self._reward_form = reward_form(self.reward)
        self._past: deque[tuple[th.Tensor, ...]] = deque(maxlen=self.replay_rollouts)

    @with_loop_threads
    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "GAIL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Learn to act as demonstrated; arguments as in PPO.

        :param callback: SB3 callbacks; when they see the end of a rollout its rewards are not made yet
        :return: self
        :raises ValueError: if there are no demonstrations, as after ``load``
        """
        self._need_demonstrations()
        if self.bc_epochs and self.num_timesteps == 0:
            self.pretrain(self.bc_epochs)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _need_demonstrations(self) -> Demonstrations:
        if self._demonstrations is None:
            raise ValueError(
                "There are no demonstrations: pass them to GAIL(policy, env, demonstrations), or call "
                "set_demonstrations(demonstrations) after load()."
            )
        return self._demonstrations

    @with_loop_threads
    def pretrain(self, n_epochs: int, batch_size: int = 64, learning_rate: float = 1e-3) -> float:
        """
        Clone the demonstrated behaviour: maximise the log-likelihood of the expert's actions.

        The standard deviation of continuous actions is left alone, or it would shrink until nothing is explored. A new
        ``VecNormalize`` begins with the statistics of the demonstrations.

        :param n_epochs: passes over the demonstrations
        :param batch_size: transitions per gradient step
        :param learning_rate: of an Adam of its own
        :return: mean negative log-likelihood of the last pass
        :raises ValueError: if there are no demonstrations
        """
        demonstrations = self._need_demonstrations()
        demonstrations.begin_statistics(self._vec_normalize_env)
        parameters = [p for name, p in self.policy.named_parameters() if name != "log_std"]
        optimizer = th.optim.Adam(parameters, lr=learning_rate)
        self.policy.set_training_mode(True)
        losses: list[float] = []
        for _ in range(n_epochs):
            losses = []
            for which in th.randperm(len(demonstrations)).split(batch_size):  # type: ignore[no-untyped-call]
                observations, actions, _, _ = demonstrations.get(which, self._vec_normalize_env, False)
                loss = -self._log_prob(observations, actions).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                optimizer.step()
                losses.append(loss.item())
        self.policy.set_training_mode(False)
        return float(np.mean(losses)) if losses else float("nan")

    def _log_prob(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Log-likelihood of actions of the environment, ``[B]``."""
        if self.policy.squash_output:
            actions = th.as_tensor(self.policy.scale_action(actions.cpu().numpy()), device=self.device)
        return self.policy.evaluate_actions(observations, actions.flatten(1) if actions.ndim > 1 else actions)[1]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        given = callback if isinstance(callback, list) else [] if callback is None else [callback]
        found = [c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in given]
        # last, so that the user's callbacks still see the environment's reward
        return super()._init_callback([*found, RolloutNotes(self._end_rollout)], progress_bar)

    def _end_rollout(self, rollout: RolloutNotes) -> None:
        """Train the discriminator on a finished rollout, then give the rollout its rewards."""
        buffer, terminated = self.rollout_buffer, rollout.terminated
        steps = rollout.transitions(self.discriminator.needs_next)
        self._past.append(steps)
        self._train_discriminator()
        logits = self.discriminator.logits(steps[:4], steps[4] if self.reward == "airl" else None)
        shift = 0.0
        if self.absorbing:
            ends = int(terminated.sum())
            self._generator_share = self._absorbing.update(self._generator_share, terminated.size, ends)
            absorbing, other = self._absorbing.logits(self._generator_share)
            logits = (logits + other).clamp(-LOGIT_CLIP, LOGIT_CLIP)
            shift = float(self._reward_form(th.tensor(absorbing)))
            self.logger.record("gail/absorbing_share", self._generator_share)
            self.logger.record("gail/absorbing_share_expert", self._absorbing.expert_share)
        rewards = self._reward_form(logits).cpu().numpy().reshape(buffer.rewards.shape)
        self.logger.record("gail/reward_mean", float(rewards.mean()))
        buffer.rewards += rewards - shift  # the bootstrap of time limits is in there already
        buffer.compute_returns_and_advantage(rollout.locals["values"], rollout.locals["dones"])
        for key, stat in self.discriminator.statistics().items():
            self.logger.record(f"gail/{key}", stat)
        self.logger.record("gail/true_reward_mean", float(np.mean(rollout.true_rewards)))

    def _train_discriminator(self) -> None:
        """Take ``n_disc_updates`` steps on demonstrations and the agent's last rollouts."""
        demonstrations, past = self._need_demonstrations(), self._past
        pool = past[0] if len(past) == 1 else tuple(th.cat(parts) for parts in zip(*past, strict=True))
        self.discriminator.set_progress(max(0.0, 1.0 - self.num_timesteps / self._total_timesteps))
        needs_next = self.discriminator.needs_next
        at_once = 1 if is_frame_space(self.observation_space) else max(self.n_disc_updates, 1)
        for _ in range(0, self.n_disc_updates, at_once):
            n = self.disc_batch_size * at_once
            expert = demonstrations.sample(n, self._vec_normalize_env, needs_next)
            which = th.randint(len(pool[0]), (n,)).to(pool[0].device)
            o, a, after, ended, log_prob = (part[which].to(self.device) for part in pool)
            log_probs = None
            if self.reward == "airl":
                with th.no_grad():
                    log_probs = self._log_prob(expert[0], expert[1]), log_prob
            self.discriminator.train(expert, (o, a, after, ended), log_probs, at_once)

    def save(self, path: FileLike, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """See SB3; an older file stays under ``path`` until the new one is whole."""
        save_whole(super().save, path, ".zip", exclude=exclude, include=include)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, "discriminator.net", "discriminator.optimizer"], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_absorbing", "_demonstrations", "_past", "_reward_form"]

    @classmethod
    def load(
        cls,
        path: FileLike,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model with its discriminator; call :meth:`set_demonstrations` before it learns on.

        :param kwargs: as in SB3, like the other arguments; ``demonstrations`` sets them at once
        :return: the model
        :raises ValueError: if the file holds another algorithm's model
        """
        _, params, _ = load_from_zip_file(path, device="cpu", load_data=False)
        if "discriminator.net" not in params:
            raise ValueError(
                f"{path} holds no GAIL model: it has no discriminator. Load it with the class that saved it."
            )
        if hasattr(path, "seek"):
            path.seek(0)
        demonstrations = kwargs.pop("demonstrations", None)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if demonstrations is not None:
            model.set_demonstrations(demonstrations)
        return model
