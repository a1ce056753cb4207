"""GAIL: imitation as the oracle, hand-computed rewards, SB3's contract, demonstrations of every kind."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from imitation.algorithms.adversarial.airl import AIRL as ImitationAIRL
from imitation.algorithms.adversarial.gail import GAIL as ImitationGAIL
from imitation.data import rollout
from imitation.data.types import Trajectory
from imitation.data.wrappers import RolloutInfoWrapper
from imitation.rewards.reward_nets import BasicRewardNet, BasicShapedRewardNet
from imitation.util.logger import configure
from imitation.util.networks import RunningNorm
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

import sb3_ext
from sb3_ext import record
from sb3_ext.data import DatasetError, StackFrames, collect_episodes
from sb3_ext.gail import GAIL, FixedHorizon, load_trajectories
from sb3_ext.gail.demonstrations import Demonstrations
from sb3_ext.gail.discriminator import Discriminator
from sb3_ext.gail.reward import LOGIT_CLIP, REWARDS, AbsorbingStates, make_reward_net
from tests.helpers import MakeDataset, flags

CARTPOLE = gym.make("CartPole-v1")
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "disc_batch_size": 64, "device": "cpu"}


def balance(observation: np.ndarray) -> int:
    """Keeps the pole up for a while."""
    return int(observation[2] + 0.5 * observation[3] > 0)


@pytest.fixture(scope="session")
def expert(session_folders: None) -> minari.MinariDataset:
    return record(balance, CARTPOLE, "cartpole/expert-v0", n_episodes=4)


def learn(model: GAIL, steps: int = 128) -> GAIL:
    return model.learn(steps)


def parameters(module: th.nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])


# imitation as the oracle


@pytest.mark.parametrize("kind", ["gail", "airl"])
def test_discriminator_step_and_reward_equal_imitations(
    expert: minari.MinariDataset, kind: str, tmp_path: Path
) -> None:
    venv = make_vec_env("CartPole-v1", 2, seed=0)
    ppo = PPO("MlpPolicy", venv, n_steps=64, seed=0, device="cpu")
    trajectories = load_trajectories(expert, venv)
    net = BasicRewardNet(venv.observation_space, venv.action_space, normalize_input_layer=RunningNorm)
    trainer = {"gail": ImitationGAIL, "airl": ImitationAIRL}[kind](
        demonstrations=trajectories, demo_batch_size=48, venv=venv, gen_algo=ppo, reward_net=net,
        custom_logger=configure(tmp_path, ()), allow_variable_horizon=True, disc_opt_kwargs={"lr": 1e-2},
    )  # fmt: skip
    ours = make_reward_net(venv.observation_space, venv.action_space, None, {}, False)
    ours.load_state_dict(net.state_dict())
    discriminator = Discriminator(venv.observation_space, venv.action_space, ours, 1e-2, 0.0, th.device("cpu"))

    demonstrations = Demonstrations(expert, venv.observation_space, venv.action_space)
    random = record(None, CARTPOLE, "cartpole/random-v0", n_episodes=5)
    generated = Demonstrations(random, venv.observation_space, venv.action_space)
    start = parameters(ours)
    for step in range(3):
        e, g = (d.get(th.arange(48) + step) for d in (demonstrations, generated))
        names = ("obs", "acts", "next_obs", "dones")
        trainer.reward_train.train()
        trainer.train_disc(
            expert_samples={k: v.numpy() for k, v in zip(names, e, strict=True)},
            gen_samples={k: v.numpy() for k, v in zip(names, g, strict=True)},
        )
        log_prob = None
        if kind == "airl":
            with th.no_grad():
                log_prob = tuple(ppo.policy.evaluate_actions(o, a)[1] for o, a, *_ in (e, g))
        discriminator.train(e, g, log_prob)
    assert np.abs(parameters(ours) - start).max() > 1e-2
    np.testing.assert_allclose(parameters(ours), parameters(net), atol=1e-6)  # the fused Adam rounds differently
    for a, b in zip(ours.buffers(), net.buffers(), strict=True):
        assert th.equal(a, b)
    if kind == "gail":
        theirs = trainer.reward_train.predict(*(part.numpy() for part in generated.get(th.arange(20))))
        logits = discriminator.logits(generated.get(th.arange(20)))
        np.testing.assert_allclose(REWARDS["-log(1-D)"](logits).numpy(), theirs, rtol=1e-6)


def test_imitations_own_trainer_takes_our_trajectories(expert: minari.MinariDataset, tmp_path: Path) -> None:
    venv = make_vec_env("CartPole-v1", 2, seed=0)
    trainer = ImitationGAIL(
        demonstrations=load_trajectories(expert, venv), demo_batch_size=32, venv=venv,
        gen_algo=PPO("MlpPolicy", venv, n_steps=32, batch_size=32, device="cpu"),
        reward_net=BasicRewardNet(venv.observation_space, venv.action_space), allow_variable_horizon=True,
        custom_logger=configure(tmp_path, ()),  # the others open files and never close them
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(128)


# rewards


def test_reward_forms() -> None:
    logits = th.tensor([-2.0, 0.0, 3.0])
    d = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    wanted = {
        "-log(1-D)": -np.log(1 - d),
        "log(D)": np.log(d),
        "D": d,
        "logit": np.log(d) - np.log(1 - d),
        "airl": np.log(d) - np.log(1 - d),
    }
    assert wanted.keys() == REWARDS.keys()
    for name, form in REWARDS.items():
        np.testing.assert_allclose(form(logits).numpy(), wanted[name], rtol=1e-5)


def test_absorbing_states_by_hand() -> None:
    # gamma 0.9: an end weighs 9 steps. Expert: 2 ends in 82 steps, 18 / 100. Generator: 5 ends in 55 steps, 45 / 100.
    states = AbsorbingStates(0.9, 82, 2)
    assert states.steps_per_end == pytest.approx(9)
    assert states.expert_share == pytest.approx(0.18)
    share = states.update(None, 55, 5)
    assert share == pytest.approx(0.45)
    absorbing, other = states.logits(share)
    assert absorbing == pytest.approx(np.log(0.181 / 0.451))
    assert other == pytest.approx(np.log(0.821 / 0.551))
    assert states.update(share, 100, 0) == pytest.approx(0.8 * 0.45)
    for rarely in (0.9, 1e-4, 0.0):  # the expert never ends: no leaps with the agent's last ends
        absorbing, other = AbsorbingStates(0.9, 100, 0).logits(rarely)
        assert absorbing == -LOGIT_CLIP
        assert other == pytest.approx(np.log(1.001 / (1.001 - rarely)))
    assert AbsorbingStates(0.9, 10, 5).logits(0.0)[0] == LOGIT_CLIP
    with pytest.raises(ValueError, match="absorbing=False"):
        AbsorbingStates(1.0, 1, 1)


class Watch(BaseCallback):
    """Copies what the rollout buffer holds after each rollout has been given its rewards."""

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self.rollouts: list[dict[str, Any]] = []

    def copy(self, buffer: Any) -> None:
        names = ("observations", "actions", "rewards", "returns", "values", "episode_starts")
        self.rollouts.append({k: getattr(buffer, k).copy() for k in names})


def relabelled(model: GAIL, steps: int) -> list[dict[str, Any]]:
    """Rollouts as PPO.train() sees them."""
    watch = Watch()
    train = model.train

    def look() -> None:
        watch.copy(model.rollout_buffer)
        train()

    model.train = look  # type: ignore[method-assign]
    model.learn(steps, callback=watch)
    return watch.rollouts


@pytest.mark.parametrize("reward", ["-log(1-D)", "log(D)", "D", "logit"])
@pytest.mark.parametrize("absorbing", [False, True])
def test_the_rollout_gets_the_discriminators_reward(expert: minari.MinariDataset, reward: str, absorbing: bool) -> None:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    model = GAIL("MlpPolicy", env, expert, reward=reward, absorbing=absorbing, seed=0, **SMALL)
    (got,) = relabelled(model, 64)
    observations, actions = th.as_tensor(got["observations"]), th.as_tensor(got["actions"]).long()
    with th.no_grad():
        one_hot = th.nn.functional.one_hot(actions.squeeze(-1), 2).float().flatten(0, 1)
        logits = model.discriminator.net(observations.flatten(0, 1), one_hot, None, None).view(32, 2)
    ended = np.concatenate([got["episode_starts"][1:], model._last_episode_starts[None]]).astype(bool)  # no time limit
    assert ended.any()
    form = REWARDS[reward]
    if absorbing:
        share = 49 * ended.sum() / (64 + 49 * ended.sum())
        assert model._generator_share == pytest.approx(share)
        end, other = model._absorbing.logits(share)
        wanted = form((logits + other).clamp(-5, 5)).numpy() - float(form(th.tensor(end)))
    else:
        wanted = form(logits).numpy()
    np.testing.assert_allclose(got["rewards"], wanted, rtol=1e-4, atol=1e-5)
    # returns belong to these rewards: the last step of an episode has no successor
    last = np.argwhere(ended)[0]
    advantage = got["returns"][tuple(last)] - got["values"][tuple(last)]
    assert advantage == pytest.approx(got["rewards"][tuple(last)] - got["values"][tuple(last)], rel=1e-4, abs=1e-4)


def test_time_limits_are_bootstrapped_and_are_no_ends(expert: minari.MinariDataset) -> None:
    def short() -> gym.Env[Any, Any]:
        return gym.wrappers.TimeLimit(gym.make("CartPole-v1").unwrapped, 6)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GAIL("MlpPolicy", DummyVecEnv([short] * 2), expert, reward="D", absorbing=False, seed=0, **SMALL)
    (got,) = relabelled(model, 64)
    cut = np.flatnonzero(got["episode_starts"][1:, 0])
    assert len(cut) == 5
    # what lies above the discriminator's reward is gamma times the value of the last observation
    obs, actions = (th.as_tensor(got[k][:, 0]) for k in ("observations", "actions"))
    with th.no_grad():
        one_hot = th.nn.functional.one_hot(actions.long().squeeze(-1), 2).float()
        bare = th.sigmoid(model.discriminator.net(obs, one_hot, None, None)).numpy()
    rest = got["rewards"][:, 0] - bare
    np.testing.assert_allclose(np.delete(rest, cut), 0, atol=1e-5)
    assert (np.abs(rest[cut]) > 1e-4).all()


def test_environment_reward_is_hidden_from_ppo_but_not_from_the_user(expert: minari.MinariDataset) -> None:
    class Bribe(gym.RewardWrapper[Any, Any]):
        def reward(self, reward: Any) -> float:
            return 1e6

    seen: list[float] = []

    def look(local: dict[str, Any], _: Any) -> bool:
        seen.append(float(local["rewards"].sum()))
        return True

    env = make_vec_env("CartPole-v1", 2, seed=0)
    plain = GAIL("MlpPolicy", env, expert, seed=0, **SMALL).learn(256)
    bribed_env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=Bribe)
    bribed = GAIL("MlpPolicy", bribed_env, expert, seed=0, **SMALL).learn(256, callback=look)
    np.testing.assert_array_equal(parameters(plain.policy), parameters(bribed.policy))
    assert set(seen) == {2e6}
    assert plain.ep_info_buffer is not None
    assert np.mean([e["r"] for e in plain.ep_info_buffer]) > 5


def test_without_discriminator_a_constant_reward_is_ppo_itself() -> None:
    """A reward of +1 is CartPole's own, so the run must equal PPO's bit for bit."""
    settings: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 3, "seed": 3, "device": "cpu"}
    episodes = collect_episodes(balance, CARTPOLE, n_episodes=2)
    ppo = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 2, seed=3), gamma=0.98, gae_lambda=0.95, learning_rate=1e-3, **settings
    )
    gail = GAIL(
        "MlpPolicy", make_vec_env("CartPole-v1", 2, seed=3), episodes, reward=th.ones_like, absorbing=False,
        n_disc_updates=0, disc_batch_size=32, **settings,
    )  # fmt: skip
    for model in (ppo, gail):  # building the discriminator draws random numbers
        model.set_random_seed(3)
        model.learn(1024)
    np.testing.assert_array_equal(parameters(ppo.policy), parameters(gail.policy))


# options


def test_spectral_norm_bounds_each_layer(expert: minari.MinariDataset) -> None:
    model = learn(GAIL("MlpPolicy", "CartPole-v1", expert, spectral_norm=True, seed=0, **SMALL))
    layers = [m for m in model.discriminator.net.modules() if isinstance(m, th.nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        assert th.linalg.matrix_norm(layer.weight.detach(), 2) < 1.2  # power iteration is not exact


def test_gradient_penalty_pulls_gradients_towards_one(expert: minari.MinariDataset) -> None:
    def slope(penalty: float) -> float:
        model = GAIL(
            "MlpPolicy", "CartPole-v1", expert, gradient_penalty=penalty, n_disc_updates=60, disc_learning_rate=1e-2,
            seed=0, **SMALL,
        ).learn(64)  # fmt: skip
        o, a, _, _ = model._demonstrations.sample(200)  # type: ignore[union-attr]
        o = o.requires_grad_(True)
        one_hot = th.nn.functional.one_hot(a, 2).float().requires_grad_(True)
        gradient = th.autograd.grad(model.discriminator.net(o, one_hot, None, None).sum(), [o, one_hot])
        return float((th.cat(gradient, 1).norm(dim=1) - 1).square().mean())

    assert slope(10.0) < 0.2 * slope(0.0)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_rarer_penalty_weighs_as_much_more(expert: minari.MinariDataset, at_once: int) -> None:
    space = CARTPOLE.observation_space, CARTPOLE.action_space
    data = Demonstrations(expert, *space).get(th.arange(256))
    e, g = (tuple(part[half] for part in data) for half in (slice(128), slice(128, 256)))

    def discriminator(penalty: float, every: int) -> Discriminator:
        th.manual_seed(0)
        net = make_reward_net(*space, None, {}, False)
        return Discriminator(*space, net, 1e-2, penalty, th.device("cpu"), every)

    lazy, by_hand = discriminator(2.0, 3), discriminator(0.0, 1)
    th.manual_seed(1)
    for start in range(0, 128, 32 * at_once):
        rows = slice(start, start + 32 * at_once)
        lazy.train(tuple(p[rows] for p in e), tuple(p[rows] for p in g), None, at_once)  # type: ignore[arg-type]
    th.manual_seed(1)
    for step in range(4):
        by_hand.penalty = [6.0, 0.0, 0.0, 6.0][step]
        rows = slice(32 * step, 32 * step + 32)
        by_hand.train(tuple(p[rows] for p in e), tuple(p[rows] for p in g))  # type: ignore[arg-type]
    np.testing.assert_array_equal(parameters(lazy.net), parameters(by_hand.net))


def test_past_rollouts_are_replayed(expert: minari.MinariDataset) -> None:
    model = GAIL("MlpPolicy", "CartPole-v1", expert, replay_rollouts=3, seed=0, **SMALL)
    learn(model, 32 * 5)
    assert [len(part[0]) for part in model._past] == [32, 32, 32]


def test_cloning_warm_start(expert: minari.MinariDataset) -> None:
    def loss(model: GAIL) -> float:
        o, a, _, _ = model._demonstrations.get(th.arange(100))  # type: ignore[union-attr]
        with th.no_grad():
            return float(-model.policy.evaluate_actions(o, a)[1].mean())

    cold, warm = (GAIL("MlpPolicy", "CartPole-v1", expert, bc_epochs=n, seed=0, **SMALL) for n in (0, 20))
    learn(cold, 32), learn(warm, 32)
    assert loss(warm) < 0.4 < 0.6 < loss(cold)
    assert warm.pretrain(0) != warm.pretrain(0)  # nan: nothing was done


def test_schedules_reach_ppo_and_discriminator(expert: minari.MinariDataset) -> None:
    rates: list[tuple[float, float]] = []
    model = GAIL(
        "MlpPolicy", "CartPole-v1", expert, learning_rate=LinearSchedule(1e-3, 0.0, 1.0),
        disc_learning_rate=LinearSchedule(1e-2, 0.0, 1.0), seed=0, **SMALL,
    )  # fmt: skip
    train = model.train

    def look() -> None:
        train()
        rates.append(
            (model.policy.optimizer.param_groups[0]["lr"], model.discriminator.optimizer.param_groups[0]["lr"])
        )

    model.train = look  # type: ignore[method-assign]
    model.learn(128)
    np.testing.assert_allclose(rates, [(1e-3 * s, 1e-2 * s) for s in (0.75, 0.5, 0.25, 0.0)], atol=1e-9)


def test_a_network_that_sees_next_observation_and_end(expert: minari.MinariDataset) -> None:
    seen: list[tuple[th.Tensor, ...]] = []

    class Spy(BasicRewardNet):
        def forward(self, state: Any, action: Any, next_state: Any, done: Any) -> Any:
            seen.append((state, action, next_state, done))
            return super().forward(state, action, next_state, done)

    env = make_vec_env("CartPole-v1", 2, seed=0)
    model = GAIL(
        "MlpPolicy", env, expert, reward_net_class=Spy, reward_net_kwargs={"use_next_state": True, "use_done": True},
        n_disc_updates=0, seed=0, **SMALL,
    )  # fmt: skip
    learn(model, 64)
    ((state, action, after, done),) = seen
    assert done.sum() > 1
    for s, a, n, d in zip(state.numpy(), action.numpy(), after.numpy(), done.numpy(), strict=True):
        env.envs[0].reset()
        env.envs[0].unwrapped.state = s.astype(np.float64)
        wanted, _, terminated, _, _ = env.envs[0].unwrapped.step(int(a.argmax()))
        np.testing.assert_allclose(n, wanted, atol=1e-4)
        assert terminated == bool(d)


def test_shaped_networks_of_imitation_work(expert: minari.MinariDataset) -> None:
    learn(GAIL("MlpPolicy", "CartPole-v1", expert, reward_net_class=BasicShapedRewardNet, seed=0, **SMALL))


# SB3's contract


def test_learns_cartpole_quickly(expert: minari.MinariDataset) -> None:
    env = make_vec_env("CartPole-v1", 8, seed=1)
    model = GAIL("MlpPolicy", env, expert, n_steps=128, disc_batch_size=256, seed=1, device="cpu").learn(16_384)
    assert evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=2), 16)[0] > 100  # random: 22


def test_save_and_load_bring_everything_back(expert: minari.MinariDataset, tmp_path: Path) -> None:
    model = GAIL("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), expert, seed=0, **SMALL).learn(256)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="set_demonstrations"):
        GAIL.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(64)
    loaded = GAIL.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2, seed=9), demonstrations=expert)
    assert loaded._generator_share == model._generator_share
    for a, b in (
        (model.policy.state_dict(), loaded.policy.state_dict()),
        (model.discriminator.net.state_dict(), loaded.discriminator.net.state_dict()),
    ):
        assert a.keys() == b.keys()
        assert all(th.equal(a[k], b[k]) for k in a)
    assert any("running_mean" in k for k in model.discriminator.net.state_dict())
    for a, b in (
        (model.policy.optimizer, loaded.policy.optimizer),
        (model.discriminator.optimizer, loaded.discriminator.optimizer),
    ):
        for p, q in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
            assert all(th.equal(p[k], q[k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    # and both go on alike from the same observations and random numbers
    for m in (model, loaded):
        m.set_env(make_vec_env("CartPole-v1", 2, seed=4))
        m.set_random_seed(4)
        m.env.seed(4)
        m.learn(128, reset_num_timesteps=False)
    np.testing.assert_array_equal(parameters(model.policy), parameters(loaded.policy))
    np.testing.assert_array_equal(parameters(model.discriminator.net), parameters(loaded.discriminator.net))


def test_another_algorithms_file_is_refused(tmp_path: Path) -> None:
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="no GAIL model"):
        GAIL.load(tmp_path / "ppo")


def test_callbacks_logs_and_progress_bar(expert: minari.MinariDataset, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    model = GAIL("MlpPolicy", env, expert, tensorboard_log=str(tmp_path / "tb"), seed=0, **SMALL)
    calls: list[int] = []
    evaluate = EvalCallback(
        make_vec_env("CartPole-v1", 1), eval_freq=32, n_eval_episodes=2, log_path=str(tmp_path), verbose=0
    )
    model.learn(
        256,
        callback=[evaluate, CheckpointCallback(64, str(tmp_path)), lambda a, b: calls.append(1) or True],  # type: ignore[list-item,func-returns-value]
        progress_bar=True,
    )
    assert len(calls) == 128
    assert len(evaluate.evaluations_timesteps) == 4
    assert (tmp_path / "rl_model_128_steps.zip").exists()
    wanted = {"disc_loss", "disc_acc", "disc_acc_expert", "disc_acc_gen", "reward_mean", "true_reward_mean",
              "absorbing_share", "absorbing_share_expert"}  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "GAIL_1"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"gail/{k}" for k in wanted} | {"rollout/ep_rew_mean", "train/value_loss"} <= tags
    assert [e.value for e in events.Scalars("gail/true_reward_mean")] == [1.0] * 4


# spaces


def test_continuous_actions(make_dataset: MakeDataset) -> None:
    env = make_vec_env("Pendulum-v1", 2, seed=0)
    data = record(None, gym.make("Pendulum-v1"), "pendulum/random-v0", n_episodes=1)
    model = GAIL("MlpPolicy", env, data, seed=0, policy_kwargs={"log_std_init": 2.0}, **SMALL)
    seen: list[th.Tensor] = []
    net = model.discriminator.net.forward
    model.discriminator.net.forward = lambda *args: (seen.append(args[1].detach()), net(*args))[1]  # type: ignore[method-assign,func-returns-value]
    learn(model, 64)
    assert np.abs(model.rollout_buffer.actions).max() > 2.5
    assert max(float(a.abs().max()) for a in seen) <= 2  # as the environment got them
    before = model.policy.log_std.item()
    model.pretrain(1)
    assert model.policy.log_std.item() == before


def test_squashed_actions(expert: minari.MinariDataset) -> None:
    data = record(None, gym.make("Pendulum-v1"), "pendulum/random-v0", n_episodes=1)
    kwargs = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
    model = GAIL("MlpPolicy", "Pendulum-v1", data, reward="airl", bc_epochs=1, seed=0, **kwargs, **SMALL)
    learn(model, 64)
    assert float(model._past[0][1].abs().max()) > 1  # unscaled to [-2, 2]


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_pictures(frame_stack: int) -> None:
    data = record(lambda o: 1, gym.make("Pixels-v0"), "pixels/still-v0", n_episodes=3)
    env = make_vec_env("Pixels-v0", 2, seed=0, wrapper_class=lambda e: StackFrames(e, frame_stack))
    model = GAIL("CnnPolicy", env, data, policy_kwargs={"normalize_images": True}, seed=0, **SMALL)
    seen: list[th.Tensor] = []
    net = model.discriminator.net.forward
    model.discriminator.net.forward = lambda *args: (seen.append(args[0]), net(*args))[1]  # type: ignore[method-assign,func-returns-value]
    learn(model, 64)
    assert seen[0].shape == (128, frame_stack, 36, 36)
    assert float(seen[0].max()) == pytest.approx(200 / 255)
    demonstrations = model._demonstrations
    assert demonstrations is not None
    first = demonstrations.get(th.tensor([0, 1, 30]))[0]
    view = StackFrames(gym.make("Pixels-v0"), frame_stack)
    a, _ = view.reset()
    np.testing.assert_array_equal(first[0], a)
    np.testing.assert_array_equal(first[1], view.step(1)[0])
    np.testing.assert_array_equal(first[2], a)  # the second episode starts with an empty stack, too


def test_normalised_observations(expert: minari.MinariDataset) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    model = GAIL("MlpPolicy", env, expert, seed=0, **SMALL)
    learn(model, 256)
    demonstrations = model._demonstrations
    assert demonstrations is not None
    which = th.arange(10)
    raw, normalised = demonstrations.get(which)[0], demonstrations.get(which, env)[0]
    np.testing.assert_allclose(normalised, env.normalize_obs(raw.numpy()), rtol=1e-6)
    assert not np.allclose(raw, normalised)


def test_cloning_behind_a_new_vec_normalize(expert: minari.MinariDataset) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    model = GAIL("MlpPolicy", env, expert, seed=0, **SMALL)
    model.pretrain(1)
    demonstrations = model._demonstrations
    assert demonstrations is not None
    normalised = demonstrations.get(th.arange(len(demonstrations)), env)[0]
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(normalised.std(0), 1, atol=1e-2)
    count = env.obs_rms.count  # type: ignore[union-attr]
    model.pretrain(1)
    assert env.obs_rms.count == count  # type: ignore[union-attr]


# demonstrations


def test_every_kind_of_demonstration_gives_the_same_transitions() -> None:
    env = gym.make("CartPole-v1", max_episode_steps=25)
    space = (env.observation_space, env.action_space)
    episodes = collect_episodes(balance, env, n_episodes=3)
    dataset = record(balance, env, "cartpole/short-v0", n_episodes=3)
    buffer = ReplayBuffer(200, *space, device="cpu", handle_timeout_termination=True)
    for e in episodes:
        for t, (action, reward) in enumerate(zip(e.actions, e.rewards, strict=True)):
            last = t == len(e.rewards) - 1
            info = {"TimeLimit.truncated": last and not e.terminated}
            step = (e.observations[t : t + 1], e.observations[t + 1 : t + 2], np.array([action]), np.array([reward]))
            buffer.add(*step, np.array([last]), [info])
    venv = DummyVecEnv([lambda: env])
    trajectories = [Trajectory(e.observations, e.actions, None, True) for e in episodes]
    found = [Demonstrations(d, *space, venv) for d in (dataset, episodes, buffer, trajectories)]
    wanted = found[0].get(th.arange(75))
    assert wanted[3].sum() == 0  # all cut by the time limit, though imitation calls them terminal
    assert found[0].n_terminated == 0
    for other in found[1:]:
        assert len(other) == 75
        for a, b in zip(wanted, other.get(th.arange(75)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_replay_buffer_that_has_wrapped() -> None:
    env = gym.make("CartPole-v1")
    model = sb3_ext.DQN("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), buffer_size=100, learning_starts=1000)
    model.learn(300)
    buffer = model.replay_buffer
    assert buffer is not None
    assert buffer.full
    found = Demonstrations(buffer, env.observation_space, env.action_space)
    assert len(found) == 100
    o, a, n, ended = found.get(th.arange(100))
    for s, action, after, over in zip(o.numpy(), a.numpy(), n.numpy(), ended.numpy(), strict=True):
        env.reset()
        env.unwrapped.state = s.astype(np.float64)  # type: ignore[attr-defined]
        wanted, _, terminated, _, _ = env.step(int(action))
        np.testing.assert_allclose(after, wanted, atol=1e-4)
        assert terminated == bool(over)


def test_actions_of_replay_buffers_are_the_environments() -> None:
    env = gym.make("Pendulum-v1")
    model = SAC("MlpPolicy", env, learning_starts=10, seed=0, buffer_size=100)
    seen: list[Any] = []
    step = env.step
    env.step = lambda action: (seen.append(np.array(action)), step(action))[1]  # type: ignore[method-assign,func-returns-value]
    model.learn(20)
    found = Demonstrations(model.replay_buffer, env.observation_space, env.action_space)
    np.testing.assert_allclose(found.get(th.arange(20))[1].numpy(), np.array(seen), rtol=1e-5, atol=1e-6)
    assert np.abs(seen).max() > 1


class Grid(gym.Env[Any, Any]):
    """Continuous actions in rows and columns."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = spaces.Box(-2, 2, shape, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        assert action.shape == self.action_space.shape
        self.steps += 1
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 0.0, self.steps == 20, False, {}


@pytest.mark.parametrize("shape", [(2, 2), (1, 2)])
def test_actions_in_rows_and_columns(shape: tuple[int, ...]) -> None:
    env = Grid(shape)
    env.action_space.seed(0)
    episodes = collect_episodes(None, env, n_episodes=5)
    model = GAIL("MlpPolicy", DummyVecEnv([lambda: Grid(shape)]), episodes, seed=0, **SMALL)
    assert model._log_prob(*model._demonstrations.get(th.arange(10), None, False)[:2]).shape == (10,)  # type: ignore[union-attr]
    model.pretrain(1)
    learn(model, 64)


def test_replay_buffers_without_final_observations_are_refused() -> None:
    env = gym.make("CartPole-v1")
    space = (env.observation_space, env.action_space)
    once = ReplayBuffer(20, *space, device="cpu", optimize_memory_usage=True, handle_timeout_termination=False)
    with pytest.raises(DatasetError, match=r"optimize_memory_usage=True, which loses .* sb3_ext.record"):
        Demonstrations(once, *space)
    with pytest.raises(DatasetError, match="is a PrioritizedReplayBuffer"):
        Demonstrations(sb3_ext.PrioritizedReplayBuffer(20, *space), *space)


def test_imitations_rollouts_with_infos() -> None:
    venv = make_vec_env("CartPole-v1", 1, seed=0, wrapper_class=RolloutInfoWrapper)
    model = PPO("MlpPolicy", venv, device="cpu")
    found = rollout.rollout(model, venv, rollout.make_sample_until(min_episodes=3), rng=np.random.default_rng(0))
    demonstrations = Demonstrations(found, venv.observation_space, venv.action_space, venv)
    assert demonstrations.n_terminated == len(found)


def test_trajectories_for_imitation_are_stacked_and_tell_ends_from_limits() -> None:
    data = record(lambda o: 1, gym.make("Pixels-v0"), "pixels/still-v0", n_episodes=2)
    trajectories = load_trajectories(data, StackFrames(gym.make("Pixels-v0"), 2))
    assert [t.obs.shape for t in trajectories] == [(31, 2, 36, 36)] * 2
    assert not any(t.terminal for t in trajectories)


# bad input


def bad(**changes: Any) -> dict[str, Any]:
    episode = {
        "observations": np.zeros((71, 4), np.float32), "actions": np.zeros(70, np.int64), "rewards": np.ones(70),
        **flags(70, True),
    }  # fmt: skip
    return {**episode, **changes}


SPACE = spaces.Box(-np.inf, np.inf, (4,), np.float32)


def test_bad_datasets(make_dataset: MakeDataset) -> None:
    nan = np.zeros((71, 4), np.float32)
    nan[7, 2] = np.nan
    cases = [
        (bad(observations=nan), spaces.Discrete(2), "episode 0, step 7: the observation has NaN"),
        (bad(actions=np.full(70, 3)), spaces.Discrete(2), r"action 3 is outside Discrete\(2\)"),
        (bad(), spaces.Discrete(3), r"another environment: its actions are Discrete\(3\)"),
        (bad(observations=np.zeros((71, 5), np.float32)), spaces.Discrete(2), "observations have shape"),
    ]
    for k, (episode, actions, message) in enumerate(cases):
        dataset = make_dataset([episode], SPACE, actions, dataset_id=f"by/hand-v{k}")
        with pytest.raises(DatasetError, match=message):
            GAIL("MlpPolicy", "CartPole-v1", dataset, **SMALL)
    wide = make_dataset(
        [bad(observations=np.zeros((71, 5)))], spaces.Box(-1, 1, (5,)), spaces.Discrete(2), dataset_id="by/wide-v0"
    )
    with pytest.raises(DatasetError, match=r"another environment.*\(5,\).*\(4,\)"):
        GAIL("MlpPolicy", "CartPole-v1", wide, **SMALL)
    far = make_dataset(
        [bad(observations=np.zeros((71, 3), np.float32), actions=np.full((70, 1), 2.5, np.float32))],
        gym.make("Pendulum-v1").observation_space, spaces.Box(-3, 3, (1,)), dataset_id="by/far-v0",
    )  # fmt: skip
    with pytest.raises(DatasetError, match="its actions are Box"):
        GAIL("MlpPolicy", "Pendulum-v1", far, **SMALL)


def test_bad_trajectories() -> None:
    def trajectory(**changes: Any) -> list[Trajectory]:
        fields = {"obs": np.zeros((71, 4), np.float32), "acts": np.zeros(70, np.int64), **changes}
        return [Trajectory(**fields, infos=None, terminal=True)]

    nan = np.full((71, 4), np.inf, np.float32)
    for changes, message in (
        ({"acts": np.full(70, 2)}, r"action 2 is outside Discrete\(2\)"),
        ({"obs": nan}, "NaN, infinite"),
        ({"obs": np.zeros((71, 3), np.float32)}, r"shape \(3,\)"),
    ):
        with pytest.raises(DatasetError, match=message):
            GAIL("MlpPolicy", "CartPole-v1", trajectory(**changes), **SMALL)
    outside = [Trajectory(np.zeros((71, 3), np.float32), np.full((70, 1), 2.1, np.float32), None, True)]
    with pytest.raises(DatasetError, match=r"step 0: action \[2.1\] is outside Box"):
        GAIL("MlpPolicy", "Pendulum-v1", outside, **SMALL)


def test_too_few_transitions(expert: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match=r"fewer than one discriminator batch.*disc_batch_size=\d+ or less"):
        GAIL("MlpPolicy", "CartPole-v1", expert, disc_batch_size=100_000)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reward": "logD"}, r"no reward 'logD'; choose one of '-log\(1-D\)'"),
        ({"n_disc_updates": -1}, "n_disc_updates must be at least 0"),
        ({"disc_batch_size": 0}, "disc_batch_size must be at least 1"),
        ({"replay_rollouts": 0}, "replay_rollouts must be at least 1"),
        ({"gradient_penalty": -0.1}, "gradient_penalty must be at least 0"),
        ({"penalty_every": 0}, "penalty_every must be at least 1"),
        ({"gamma": 1.0}, "absorbing=False"),
    ],
)
def test_bad_settings(expert: minari.MinariDataset, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GAIL("MlpPolicy", "CartPole-v1", expert, **{**SMALL, **kwargs})


def test_other_mistakes(expert: minari.MinariDataset) -> None:
    with pytest.raises(TypeError, match="Demonstrations are a Minari dataset"):
        GAIL("MlpPolicy", "CartPole-v1", 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got nothing"):
        GAIL("MlpPolicy", "CartPole-v1", [])
    with pytest.raises(TypeError, match="is an environment id"):
        GAIL("MlpPolicy", "CartPole-v1", "CartPole-v1")
    with pytest.raises(DatasetError, match="not on this machine"):
        GAIL("MlpPolicy", "CartPole-v1", "cartpole/nothing-v0")
    with pytest.raises(ValueError, match="There are no demonstrations"):
        GAIL("MlpPolicy", "CartPole-v1").learn(10)
    with pytest.raises(TypeError, match="GAIL needs Box observations"):
        GAIL("MlpPolicy", "FrozenLake-v1", expert)
    pixels = record(lambda o: 1, gym.make("Pixels-v0"), "pixels/still-v0", n_episodes=3)
    with pytest.raises(DatasetError, match="Pictures must be channel first"):
        GAIL(
            "MlpPolicy",
            make_vec_env("Pixels-v0", 1, wrapper_class=lambda e: gym.wrappers.ResizeObservation(e, (40, 40))),
            pixels,
            **SMALL,
        )


def test_demonstrations_of_an_environment_with_the_same_spaces_warn(expert: minari.MinariDataset) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        env = DummyVecEnv([lambda: gym.make("CartPole-v0")])
    with pytest.warns(UserWarning, match="was made in CartPole-v1, the environment to train in is CartPole-v0"):
        GAIL("MlpPolicy", env, expert, **SMALL)


def test_install_command_without_imitation() -> None:
    code = "import sys; sys.modules['imitation'] = None; import sb3_ext; sb3_ext.CQL; sb3_ext.GAIL"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "sb3-ext[gail]" && pip install --no-deps "imitation>=1.0.1"' in done.stderr


# the wrapper


def test_fixed_horizon() -> None:
    env = FixedHorizon(gym.make("CartPole-v1"), 40)
    for seed in range(3):
        env.reset(seed=seed)
        steps = [env.step(1) for _ in range(40)]
        assert [s[3] for s in steps] == [False] * 39 + [True]
        assert not any(s[2] for s in steps)
        fall = int(sum(s[1] for s in steps))
        assert 5 < fall < 15
        assert all(s[1] == 0 for s in steps[fall:])
        assert all((s[0] == steps[fall - 1][0]).all() for s in steps[fall:])
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        FixedHorizon(env, 0)


def test_fixed_horizon_hides_time(expert: minari.MinariDataset) -> None:
    env: VecEnv = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=lambda e: FixedHorizon(e, 50))
    episodes = collect_episodes(balance, FixedHorizon(CARTPOLE, 50), n_episodes=2)
    model = GAIL("MlpPolicy", env, episodes, seed=0, **SMALL).learn(256)
    assert model._generator_share == 0
    assert model._absorbing.expert_share == 0
