"""CQL and its baselines: published arithmetic, SB3's face, saving, going on online, bad input."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext import BC, CQL, load_minari, make_eval_env, record
from sb3_ext.cql import offline
from sb3_ext.cql.mixed import MixedReplayBuffer
from sb3_ext.cql.offline import OfflineProgressBar
from sb3_ext.replay.dataset import OfflineReplayBuffer
from sb3_ext.replay.frames import ArrayFrames
from tests.helpers import MakeDataset, flags, published_loss

SMALL: dict[str, Any] = {"net_arch": [16], "n_quantiles": 10}


def small(cls: Any, dataset: Any, **kwargs: Any) -> Any:
    kwargs = {"policy_kwargs": dict(SMALL), "seed": 0, "device": "cpu", **kwargs}
    if cls is BC:
        kwargs["policy_kwargs"].pop("n_quantiles", None)
    return cls("MlpPolicy", dataset, **kwargs)


def parameters(model: Any) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()])


# ---------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("alpha", "clip", "double"), [(4.0, False, False), (0.0, False, False), (1.0, True, True)])
def test_loss_and_gradient_equal_the_published_definition(
    cartpole: minari.MinariDataset, alpha: float, clip: bool, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(CQL, cartpole, cql_alpha=alpha, clip_rewards=clip, double_q=double)
    batch = model.replay_buffer.sample(16)
    batch = batch._replace(rewards=batch.rewards * 3, dones=th.arange(16).reshape(-1, 1) % 2)
    captured = th.randn(16, 10, 2, dtype=th.float64, requires_grad=True)
    next_target = 2 * th.randn(16, 10, 2, dtype=th.float64)
    chosen_by = th.randn(16, 10, 2, dtype=th.float64) if double else next_target

    def forward(net: Any, observations: th.Tensor) -> th.Tensor:
        if net is model._target_forward:
            return next_target
        return chosen_by if observations is batch.next_observations else captured

    monkeypatch.setattr(model, "_forward", forward)
    loss = model.compute_loss(batch).loss.mean()
    (gradient,) = th.autograd.grad(loss, captured)

    rewards = batch.rewards.numpy()[:, 0]
    if clip:
        rewards = np.clip(rewards, -1, 1)
    actions, dones = batch.actions.numpy()[:, 0], batch.dones.numpy()[:, 0]
    best = chosen_by.mean(1).argmax(1).numpy()
    # the transcription chooses by its own next quantiles: hand it those of the chosen action alone
    chosen = next_target.numpy()[np.arange(16), :, best][:, :, None]

    def reference(z: np.ndarray) -> float:
        return published_loss(z, chosen, actions, rewards, dones, model.gamma, alpha)

    z = captured.detach().numpy()
    assert loss.item() == pytest.approx(reference(z), abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(15):
        place = tuple(int(rng.integers(n)) for n in z.shape)
        step = np.zeros_like(z)
        step[place] = 1e-5
        slope = (reference(z + step) - reference(z - step)) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, abs=1e-6)


def test_target_network_follows_gradient_steps(cartpole: minari.MinariDataset) -> None:
    model = small(CQL, cartpole, target_update_interval=5)
    start = [p.clone() for p in model.quantile_net_target.parameters()]
    model.learn(4)
    assert all(th.equal(a, b) for a, b in zip(start, model.quantile_net_target.parameters(), strict=True))
    model.learn(1, reset_num_timesteps=False)
    pairs = zip(model.quantile_net.parameters(), model.quantile_net_target.parameters(), strict=True)
    assert all(th.equal(a, b) for a, b in pairs)


def test_truncated_end_bootstraps_and_terminated_end_does_not() -> None:
    # one state, reward 1, gamma 0.5: the value is 2 if the end is a cut, 1 if it is the end
    values = []
    for terminated in (False, True):
        buffer = OfflineReplayBuffer(
            ArrayFrames(np.ones((2, 1), np.float32)), np.zeros(2, np.uint8), np.array([1, 0], np.float32),
            np.array([terminated, False]), np.array([1]), spaces.Box(-2, 2, (1,)), spaces.Discrete(2), device="cpu",
        )  # fmt: skip
        model = small(CQL, buffer, gamma=0.5, cql_alpha=0.0, learning_rate=0.02, target_update_interval=10)
        model.learn(300, log_interval=None)
        values.append(model.quantile_net(th.ones(1, 1)).mean(1)[0, 0].item())
    assert values == pytest.approx([2.0, 1.0], abs=0.1)


def test_learns_the_better_action_from_random_data() -> None:
    # a bandit with two contexts: reward 1 if the action equals the context
    rng = np.random.default_rng(0)
    context, action = rng.integers(2, size=400), rng.integers(2, size=400)
    frames = np.repeat(np.eye(2, dtype=np.float32)[context], 2, axis=0)
    actions, rewards = np.zeros(800, np.uint8), np.zeros(800, np.float32)
    actions[::2], rewards[::2] = action, action == context
    terminated = np.arange(800) % 2 == 0
    buffer = OfflineReplayBuffer(
        ArrayFrames(frames), actions, rewards, terminated, np.ones(400, np.int64), spaces.Box(0, 1, (2,)),
        spaces.Discrete(2), device="cpu",
    )  # fmt: skip
    model = small(CQL, buffer, cql_alpha=0.1, learning_rate=0.01, target_update_interval=50)
    model.learn(300, log_interval=None)
    assert model.predict(np.eye(2, dtype=np.float32), deterministic=True)[0].tolist() == [0, 1]
    assert model.replay_buffer.action_counts().sum() == 400


# ---------------------------------------------------------------------- SB3's face


def test_images_channel_first_and_last(breakout: minari.MinariDataset) -> None:
    model = CQL("CnnPolicy", breakout, seed=0, device="cpu", policy_kwargs={"n_quantiles": 5}, batch_size=4)
    model.learn(2)
    first = np.random.default_rng(0).integers(0, 255, (3, 4, 84, 84), dtype=np.uint8)
    batched = model.predict(first, deterministic=True)[0]
    assert batched.shape == (3,)
    assert model.predict(first[0], deterministic=True)[0] == batched[0]
    assert (model.predict(np.moveaxis(first, 1, -1), deterministic=True)[0] == batched).all()
    env = make_eval_env(breakout)
    observation = env.reset()
    assert observation.shape == (1, 4, 84, 84)
    env.step(model.predict(observation)[0])


@pytest.mark.parametrize(
    ("cls", "shown"), [(CQL, "td {td_loss:.3g}, gap {conservative_gap:.3g}"), (BC, "nll {nll:.3g}")]
)
def test_progress_bar_shows_losses_and_values(
    cls: Any, shown: str, cartpole: minari.MinariDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []

    class Bar(OfflineProgressBar):
        def _on_step(self) -> bool:
            result = super()._on_step()
            texts.append(self.pbar.desc or "")
            return result

    monkeypatch.setattr(offline, "OfflineProgressBar", Bar)
    model = small(cls, cartpole)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(25, log_interval=10, progress_bar=True)
    model.logger.close()
    row = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True, deletechars="")[-1]
    assert texts[:10] == [""] * 10  # nothing is known before the first line of the log
    values = {name.removeprefix("train/"): row[name] for name in row.dtype.names}
    assert texts[-1].startswith(shown.format(**values))
    assert ("Q best" in texts[-1]) == (cls is CQL)


def test_vec_env_of_another_type_evaluates(cartpole: minari.MinariDataset) -> None:
    from stable_baselines3.common.vec_env import VecNormalize

    env = VecNormalize(make_eval_env(cartpole), training=False, norm_obs=False, norm_reward=False)
    small(CQL, cartpole).learn(5, callback=EvalCallback(env, n_eval_episodes=1, eval_freq=5, verbose=0))


def test_logged_values(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    model = small(CQL, cartpole, learning_rate=LinearSchedule(1e-3, 0.0, 1.0))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, log_interval=10)
    model.logger.close()
    rows = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True, deletechars="")
    wanted = {
        "train/loss", "train/td_loss", "train/conservative_gap", "train/q_data", "train/q_best", "train/action_match",
        "train/largest_data_return", "train/overestimation", "train/learning_rate", "train/n_updates", "time/fps",
        "time/total_timesteps", "dataset/action_coverage", "dataset/behaviour_return",
    }  # fmt: skip
    assert wanted <= set(rows.dtype.names)
    assert rows["time/total_timesteps"].tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(
        rows["train/loss"], rows["train/td_loss"] + model.cql_alpha * rows["train/conservative_gap"], rtol=1e-4
    )
    assert (rows["train/q_best"] >= rows["train/q_data"]).all()
    # the schedule falls from 1e-3; the last of steps 1 to 10 starts with 9/40 done
    assert rows["train/learning_rate"][0] == pytest.approx(1e-3 * (1 - 9 / 40))
    largest = max(sum(0.99**t for t in range(len(episode))) for episode in cartpole)
    assert rows["train/largest_data_return"][0] == pytest.approx(largest, rel=1e-4)
    assert rows["dataset/action_coverage"][0] == pytest.approx(1, abs=0.05)


def test_overestimation_is_warned_of(cartpole: minari.MinariDataset) -> None:
    model = small(CQL, cartpole)
    with th.no_grad():
        model.quantile_net.quantile_net[-1].bias += 1000
    with pytest.warns(UserWarning, match="overestimated"):
        model.learn(2, log_interval=1)


def first_draw(model: Any) -> np.ndarray:
    return model.replay_buffer.sample(16).observations.numpy()


@pytest.mark.parametrize("prioritized", [False, True])
def test_other_data_after_load_starts_the_sampler_anew(
    cartpole: minari.MinariDataset, prioritized: bool, tmp_path: Path
) -> None:
    half = load_minari(cartpole, subset=0.5, device="cpu", prioritized=prioritized)
    whole = load_minari(cartpole, device="cpu", prioritized=prioritized)
    for saved, other in ((whole, half), (half, whole)):
        model = small(CQL, saved)
        model.learn(5)
        model.save(tmp_path / "model")
        loaded = CQL.load(tmp_path / "model", device="cpu")
        with pytest.warns(UserWarning, match=rf"{saved.size()} transitions.* has {other.size()}.*starts anew"):
            loaded.set_dataset(other)
        assert np.array_equal(first_draw(loaded), first_draw(small(CQL, other)))
        loaded.learn(5)
        assert loaded.replay_buffer is other
        if prioritized:
            assert np.count_nonzero(other.priorities.tree.leaves) == other.size()
        # the model still knows where it stood in its own data
        loaded = CQL.load(tmp_path / "model", device="cpu")
        with pytest.warns(UserWarning, match="starts anew"):
            loaded.set_dataset(other)
        expected = first_draw(model)
        loaded.set_dataset(saved)
        if not prioritized:
            assert np.array_equal(first_draw(loaded), expected)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_other_sampler_after_load_starts_anew(
    cartpole: minari.MinariDataset, before: bool, after: bool, tmp_path: Path
) -> None:
    small(CQL, cartpole, dataset_kwargs={"prioritized": before}).learn(5).save(tmp_path / "model")
    loaded = CQL.load(tmp_path / "model", device="cpu")
    other = load_minari(cartpole, device="cpu", prioritized=after)
    with pytest.warns(UserWarning, match=r"by priority.*uniformly" if before else r"uniformly.*by priority"):
        loaded.set_dataset(other)
    loaded.learn(5)
    assert hasattr(other, "priorities") == after


@pytest.mark.parametrize("prioritized", [False, True])
def test_saving_does_not_change_what_set_dataset_does(
    cartpole: minari.MinariDataset, prioritized: bool, tmp_path: Path
) -> None:
    results = []
    for save in (False, True):
        model = small(CQL, load_minari(cartpole, device="cpu", prioritized=prioritized))
        model.learn(5)
        if save:
            model.save(tmp_path / "model")
        model.set_dataset(load_minari(cartpole, subset=0.5, device="cpu", prioritized=prioritized))
        results.append(first_draw(model))
        model.learn(5)
        assert model.replay_buffer.size() < cartpole.total_steps
    assert np.array_equal(*results)


@pytest.mark.parametrize("options", [{"torch_compile": True}, {"bf16": True}])
def test_options_train(cartpole: minari.MinariDataset, options: dict[str, bool], tmp_path: Path) -> None:
    plain, fast = small(CQL, cartpole), small(CQL, cartpole, **options)
    for model in (plain, fast):
        model.learn(5)
    tolerance = 1e-4 if "torch_compile" in options else 5e-3
    np.testing.assert_allclose(parameters(plain), parameters(fast), atol=tolerance)
    fast.save(tmp_path / "model")
    assert CQL.load(tmp_path / "model", device="cpu").policy is not None


class Viewing(BaseFeaturesExtractor):
    """Flattens as code on the web does, which works on contiguous tensors only."""

    def __init__(self, space: Any, channels: int = 2) -> None:
        super().__init__(space, channels * 10 * 10)
        self.cnn = th.nn.Conv2d(space.shape[0], channels, 8, stride=8)

    def forward(self, x: th.Tensor) -> th.Tensor:
        x = self.cnn(x)
        return x.view(x.size(0), -1)


class Space3D(BaseFeaturesExtractor):
    """Frames of the stack as a third dimension."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 2 * 10 * 10)
        self.cnn = th.nn.Conv3d(1, 2, (4, 8, 8), stride=(4, 8, 8))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.cnn(x.unsqueeze(1)).flatten(1)


@pytest.mark.parametrize("extractor", [Viewing, Space3D])
@pytest.mark.parametrize("cls", [CQL, BC])
def test_features_extractors_of_the_users_own(
    cls: Any, extractor: Any, breakout: minari.MinariDataset, tmp_path: Path
) -> None:
    kwargs = {"features_extractor_class": extractor, "net_arch": []}
    model = cls("CnnPolicy", breakout, seed=0, device="cpu", batch_size=4, policy_kwargs=kwargs)
    model.learn(2)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", device="cpu")
    observation = np.zeros((2, 4, 84, 84), np.uint8)
    assert (
        loaded.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    ).all()


@pytest.mark.parametrize("optimizer", [th.optim.SGD, th.optim.RMSprop])
@pytest.mark.parametrize("cls", [CQL, BC])
def test_other_optimizers(cls: Any, optimizer: Any, cartpole: minari.MinariDataset) -> None:
    model = small(cls, cartpole, policy_kwargs={"net_arch": [16], "optimizer_class": optimizer})
    assert type(model.policy.optimizer) is optimizer
    start = parameters(model)
    model.learn(3)
    assert not np.array_equal(parameters(model), start)


def test_default_optimizers(cartpole: minari.MinariDataset) -> None:
    for cls in (CQL, BC):
        optimizer = small(cls, cartpole).policy.optimizer
        assert type(optimizer) is th.optim.Adam
        assert (optimizer.defaults["eps"], optimizer.defaults["fused"]) == (1e-8, True)
    given = {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-3}}
    assert small(BC, cartpole, policy_kwargs=given).policy.optimizer.defaults["eps"] == 1e-3


def test_double_q_is_an_argument(cartpole: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match=r"CQL\(\.\.\., double_q=True\)"):
        small(CQL, cartpole, policy_kwargs={"double_q": True})


# ---------------------------------------------------------------------- datasets


def test_dataset_by_object_id_path_and_buffer(cartpole: minari.MinariDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(cartpole.storage.data_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path.parents[2]))
    results = []
    for dataset in (cartpole, "cartpole/random-v0", path.parent, str(path), load_minari(cartpole, device="cpu")):
        model = small(CQL, dataset)
        model.learn(3)
        results.append(parameters(model))
    assert all(np.array_equal(results[0], r) for r in results)


def test_filled_sb3_buffer_is_a_dataset() -> None:
    source = small(CQL, _one_step_dataset())
    buffer = ReplayBuffer(10, spaces.Box(-2, 2, (1,)), spaces.Discrete(2), device="cpu")
    with pytest.raises(ValueError, match="empty"):
        small(CQL, buffer)
    buffer.add(np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    model = small(CQL, buffer)
    model.learn(3)
    assert not np.array_equal(parameters(model), parameters(source))


def test_a_buffer_with_dict_observations() -> None:
    space = spaces.Dict({"x": spaces.Box(-2, 2, (1,)), "n": spaces.Discrete(3)})
    buffer = DictReplayBuffer(10, space, spaces.Discrete(2), device="cpu")
    observation = {"x": np.ones((1, 1)), "n": np.ones(1, np.int64)}
    buffer.add(observation, observation, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    with pytest.raises(ValueError, match=r"MlpPolicy cannot see .*Use 'MultiInputPolicy'"):
        small(CQL, buffer)
    model = CQL("MultiInputPolicy", buffer, seed=0, device="cpu").learn(3)
    assert model.predict(space.sample())[0] in (0, 1)


@pytest.mark.parametrize("kwargs", [{"seed": 3}, {"prioritized": {"seed": 3}}, {"prioritized": True, "seed": 3}])
def test_sampler_may_have_a_seed_of_its_own(cartpole: minari.MinariDataset, kwargs: dict[str, Any]) -> None:
    wanted = load_minari(cartpole, device="cpu", **kwargs).sample(16).observations.numpy()
    assert np.array_equal(first_draw(small(CQL, cartpole, seed=0, dataset_kwargs=kwargs)), wanted)
    assert np.array_equal(first_draw(small(CQL, cartpole, seed=1, dataset_kwargs=kwargs)), wanted)


def _one_step_dataset() -> OfflineReplayBuffer:
    return OfflineReplayBuffer(
        ArrayFrames(np.ones((2, 1), np.float32)), np.zeros(2, np.uint8), np.ones(2, np.float32), np.zeros(2, bool),
        np.array([1]), spaces.Box(-2, 2, (1,)), spaces.Discrete(2), device="cpu",
    )  # fmt: skip


def test_n_steps(cartpole: minari.MinariDataset) -> None:
    model = small(CQL, cartpole, n_steps=3)
    batch = model.replay_buffer.sample(50)
    assert batch.discounts is not None
    assert batch.rewards.max().item() == pytest.approx(1 + 0.99 + 0.99**2)
    model.learn(3)


def test_each_of_n_rewards_is_clipped(cartpole: minari.MinariDataset) -> None:
    model, plain = small(CQL, cartpole, n_steps=3, clip_rewards=True), small(CQL, cartpole, n_steps=3)
    batch, same = model.replay_buffer.sample(50), plain.replay_buffer.sample(50)
    assert batch.rewards.max().item() == pytest.approx(1 + 0.99 + 0.99**2)
    assert th.equal(batch.rewards, same.rewards)
    assert th.equal(model.compute_loss(batch).loss, plain.compute_loss(batch).loss)
    for each in (model, plain):
        each.learn(5)
    assert np.array_equal(parameters(model), parameters(plain))  # CartPole's rewards are all 1
    model.replay_buffer.rewards = 5 * model.replay_buffer.rewards
    assert model.replay_buffer.sample(50).rewards.max().item() == pytest.approx(1 + 0.99 + 0.99**2)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_each_reward_is_clipped_online(cartpole: minari.MinariDataset, n_steps: int) -> None:
    env = gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda r: 5 * r)
    model = small(CQL, cartpole, n_steps=n_steps, clip_rewards=True)
    model.learn_online(30, env=env)
    online = model.replay_buffer.online
    assert online.rewards.max() == 5
    assert online.sample(50).rewards.max().item() == pytest.approx(sum(0.99**k for k in range(n_steps)))


def test_sums_that_cannot_be_clipped_are_refused() -> None:
    for n_steps in (1, 2):
        buffer = NStepReplayBuffer(10, spaces.Box(-2, 2, (1,)), spaces.Discrete(2), device="cpu", n_steps=2)
        buffer.add(np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
        with pytest.raises(ValueError, match="clip_rewards"):
            small(CQL, buffer, n_steps=n_steps, clip_rewards=True)


# ---------------------------------------------------------------------- online


@pytest.mark.parametrize("n_envs", [1, 2])
def test_learn_online(cartpole: minari.MinariDataset, n_envs: int, tmp_path: Path) -> None:
    model = small(CQL, cartpole, train_freq=1)
    model.learn(20)
    start = parameters(model)
    model.learn_online(
        60, env=make_vec_env("CartPole-v1", n_envs), offline_fraction=0.25, cql_alpha=0.5, log_interval=1
    )
    assert isinstance(model.replay_buffer, MixedReplayBuffer)
    assert model.replay_buffer.online.size() * n_envs == 60
    assert model.replay_buffer.offline.size() == cartpole.total_steps
    assert model.cql_alpha == 0.5
    assert model.num_timesteps == 60
    assert not np.array_equal(parameters(model), start)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 200_000
    model.learn_online(20, reset_num_timesteps=False)
    assert model.replay_buffer.online.size() * n_envs == 80
    model.learn(5)
    assert isinstance(model.replay_buffer, OfflineReplayBuffer)


def test_learn_online_shares(cartpole: minari.MinariDataset) -> None:
    model = small(CQL, cartpole, env="CartPole-v1", learning_starts=10)
    for fraction in (0.0, 1.0):
        model.learn_online(30, offline_fraction=fraction)
        mixed, drawn = model.replay_buffer, []
        offline_sample = mixed.offline.sample
        mixed.offline.sample = lambda n, env=None, s=offline_sample, d=drawn: (d.append(n), s(n, env))[1]
        assert mixed.sample(32).rewards.shape == (32, 1)
        assert drawn == ([32] if fraction else [])
        del mixed.offline.sample


def test_new_transitions_are_kept(cartpole: minari.MinariDataset) -> None:
    model = small(CQL, cartpole, env="CartPole-v1", n_steps=3, train_freq=1)
    model.learn_online(30)
    online = model.replay_buffer.online
    for total, reset in ((60, True), (90, False)):
        model.learn(3)
        model.learn_online(30, reset_num_timesteps=reset)
        assert model.replay_buffer.online is online
        assert (online.size(), model.replay_buffer.size()) == (total, total)
    # where the environment was reset, no return goes on
    assert online._ends[29, 0]
    assert (online.priorities.tree.leaves[:30] > 0).all()
    model.set_dataset(load_minari(cartpole, subset=0.5, device="cpu"))
    model.learn_online(10)
    assert (model.replay_buffer.online is online, online.size()) == (True, 100)


def test_another_number_of_environments_starts_new_transitions(cartpole: minari.MinariDataset) -> None:
    model = small(CQL, cartpole, env="CartPole-v1", train_freq=1)
    model.learn_online(30)
    with pytest.warns(UserWarning, match=r"30 transitions of 1 environment.* 2 environment"):
        model.learn_online(30, env=make_vec_env("CartPole-v1", 2))
    assert model.replay_buffer.online.size() == 15


def test_saved_transitions_come_back(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    model = small(CQL, cartpole, env="CartPole-v1", n_steps=2, clip_rewards=True, train_freq=1)
    model.learn_online(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    for with_data in (False, True):
        loaded = CQL.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
        with pytest.raises(ValueError, match="set_dataset"):
            loaded.learn_online(5)
        if with_data:
            loaded.set_dataset(cartpole)
        data = loaded.replay_buffer
        loaded.load_replay_buffer(tmp_path / "buffer")
        if with_data:
            assert loaded.replay_buffer is data
        loaded.learn_online(30, reset_num_timesteps=False)
        assert (loaded.replay_buffer.online.size(), loaded.num_timesteps) == (60, 60)
        assert loaded.replay_buffer.offline.size() == cartpole.total_steps


def test_saved_data_comes_back(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    model = small(CQL, cartpole, train_freq=1).learn(10)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = CQL.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert np.array_equal(first_draw(loaded), first_draw(model))
    loaded.learn_online(10)
    assert loaded.replay_buffer.online.size() == 10


def test_saved_transitions_of_another_kind_are_refused(cartpole: minari.MinariDataset, tmp_path: Path) -> None:
    model = small(CQL, cartpole, env="CartPole-v1")
    model.learn_online(10)
    model.save_replay_buffer(tmp_path / "buffer")
    other = small(CQL, cartpole, n_steps=3)
    data = other.replay_buffer
    with pytest.raises(ValueError, match=r"n_steps=1.*n_steps=3"):
        other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer is data
    with pytest.raises(ValueError, match="observation_space"):
        small(CQL, _one_step_dataset()).load_replay_buffer(tmp_path / "buffer")


# ---------------------------------------------------------------------- bad input


def test_environment_and_dataset_mixed_up(cartpole: minari.MinariDataset) -> None:
    with pytest.raises(TypeError, match="env="):
        CQL("MlpPolicy", gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="environment id"):
        CQL("MlpPolicy", "CartPole-v1")
    with pytest.raises(TypeError, match="dataset"):
        CQL("MlpPolicy", cartpole, env=cartpole)
    with pytest.raises(ValueError, match="dataset="):
        CQL("MlpPolicy", cartpole, env="cartpole/random-v0")
    with pytest.raises(TypeError, match="needs a dataset"):
        CQL("MlpPolicy")


def test_wrong_policy(cartpole: minari.MinariDataset, breakout: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match="Use 'MlpPolicy'"):
        CQL("CnnPolicy", cartpole)
    with pytest.warns(UserWarning, match="MlpPolicy flattens these pictures.*'CnnPolicy' is for them"):
        CQL("MlpPolicy", breakout)
    with pytest.raises(ValueError, match=r"MultiInputPolicy cannot see .*Use 'MlpPolicy'"):
        CQL("MultiInputPolicy", cartpole)
    with pytest.raises(ValueError, match="unknown"):
        CQL("CnnPolice", cartpole)


def test_spaces_that_do_not_match(cartpole: minari.MinariDataset, breakout: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match=r"action_space.*make_eval_env|observation_space.*make_eval_env"):
        small(CQL, cartpole, env="Acrobot-v1")
    with pytest.raises(ValueError, match="observation_space"):
        small(CQL, cartpole).set_dataset(breakout)
    model = small(CQL, cartpole)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.learn_online(5, env="Acrobot-v1")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dataset_kwargs": {"subset": 0.0}}, "subset"),
        ({"dataset_kwargs": {"storage": "tape"}}, "storage"),
    ],
)
def test_numbers_out_of_range(cartpole: minari.MinariDataset, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(CQL, cartpole, **kwargs)


def test_online_needs_an_environment(cartpole: minari.MinariDataset) -> None:
    with pytest.raises(ValueError, match="make_eval_env"):
        small(CQL, cartpole).learn_online(5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        small(CQL, cartpole).learn_online(5, env="CartPole-v1", offline_fraction=1.5)
    with pytest.raises(NotImplementedError, match="CQL"):
        small(BC, cartpole).learn_online(5)


def test_continuous_actions() -> None:
    dataset = record(None, gym.make("Pendulum-v1"), "tests/pendulum-v0", n_episodes=1)
    with pytest.raises(ValueError, match=r"CQL needs Discrete actions, tests/pendulum-v0 has Box.*BC clones"):
        small(CQL, dataset)


def test_shortcut_for_images_equals_the_network(breakout: minari.MinariDataset) -> None:
    model = CQL("CnnPolicy", breakout, seed=0, device="cpu", policy_kwargs={"n_quantiles": 5})
    observations = model.replay_buffer.sample(8).observations
    before = observations.clone()
    assert model.quantile_net.features_extractor.cnn[2].weight.is_contiguous(memory_format=th.channels_last)
    assert model._online_forward != model.quantile_net.forward
    assert th.equal(model._online_forward(observations), model.quantile_net(observations))
    assert th.equal(observations, before)


def test_learning_begins_the_statistics_of_vec_normalize(cartpole: minari.MinariDataset) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    model = CQL("MlpPolicy", cartpole, env=env, seed=0).learn(1)
    assert isinstance(model.replay_buffer, OfflineReplayBuffer)
    raw = model.replay_buffer._get_samples(np.arange(model.replay_buffer.size())).observations.numpy()
    normalized = env.normalize_obs(raw)
    assert isinstance(normalized, np.ndarray)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-3)
    assert model.get_env() is env


def test_models_may_share_a_buffer(cartpole: minari.MinariDataset) -> None:
    data = load_minari(cartpole)
    one = CQL("MlpPolicy", data, n_steps=3, seed=0)
    CQL("MlpPolicy", data, n_steps=1, clip_rewards=True, gamma=0.5, seed=0)
    one.learn(1)
    assert isinstance(one.replay_buffer, OfflineReplayBuffer)
    assert (data.n_steps, data.gamma, data.clip_rewards) == (3, one.gamma, False)


@pytest.mark.parametrize(("n_steps", "gamma"), [(1, 0.99), (3, 0.5)])
def test_replay_buffers_with_other_returns_are_refused(n_steps: int, gamma: float) -> None:
    buffer = NStepReplayBuffer(10, spaces.Box(-2, 2, (1,)), spaces.Discrete(2), device="cpu", n_steps=3, gamma=0.99)
    buffer.add(np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    with pytest.raises(ValueError, match=f"n_steps=3 and gamma=0.99, the model {n_steps} and {gamma}"):
        small(CQL, buffer, n_steps=n_steps, gamma=gamma)


def test_truncated_episodes_promise_more_than_they_returned(make_dataset: MakeDataset) -> None:
    def data(terminated: bool) -> OfflineReplayBuffer:
        episode = {
            "observations": np.zeros((11, 2), np.float32), "actions": np.zeros(10, np.int64), "rewards": np.ones(10),
            **flags(10, terminated),
        }  # fmt: skip
        name = f"by/hand-{int(terminated)}-v0"
        space = spaces.Box(-1, 1, (2,), np.float32)
        return load_minari(make_dataset([episode], space, spaces.Discrete(2), dataset_id=name))

    assert data(True).largest_return(0.97) == pytest.approx((1 - 0.97**10) / 0.03)
    assert data(False).largest_return(0.97) == pytest.approx(1 / 0.03)


@pytest.mark.parametrize("algorithm", [BC, CQL])
def test_pictures_of_floats(algorithm: Any) -> None:
    space = spaces.Box(0, 1, (3, 40, 40), np.float32)
    rng = np.random.default_rng(0)
    frames = rng.uniform(size=(12, 3, 40, 40)).astype(np.float32)
    buffer = OfflineReplayBuffer(
        ArrayFrames(frames), np.zeros(12, np.uint8), np.ones(12, np.float32), np.zeros(12, bool), np.array([11]), space,
        spaces.Discrete(2), device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"CnnPolicy needs pictures \(uint8"):
        algorithm("CnnPolicy", buffer, device="cpu")
    kwargs = {"normalize_images": False}
    model = algorithm("CnnPolicy", buffer, seed=0, device="cpu", batch_size=4, policy_kwargs=kwargs).learn(2)
    network = model.policy if algorithm is BC else model.quantile_net
    assert type(network.features_extractor) is NatureCNN
    assert model.predict(frames[0])[0] in (0, 1)
