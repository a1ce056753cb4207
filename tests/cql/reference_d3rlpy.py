"""
Write ``d3rlpy_cql.npz``: one critic step and one actor step of d3rlpy's CQL, with everything that it drew.

    uv run --isolated --no-project --python 3.11 --with d3rlpy==2.8.1 python tests/cql/reference_d3rlpy.py

Sizes: B = 16 transitions, 5 observations, A = 2 actions, n = 4 sampled actions of each kind, networks of 32 and 32
units with ReLU, M = 2 critics. All float32, gamma 0.99, conservative weight 5. Arrays:

``batch.observations [B, 5]``, ``batch.actions [B, A]`` (in [-1, 1]), ``batch.rewards [B, 1]``,
``batch.next_observations [B, 5]``, ``batch.terminals [B, 1]`` (three are 1).

Weights as ``nn.Linear`` has them, ``NET.LAYER.weight [out, in]`` and ``NET.LAYER.bias [out]``: NET is ``q1``, ``q2``,
``target1``, ``target2`` with LAYER ``0``, ``1``, ``out`` (the input is observation, then action), or ``policy`` with
LAYER ``0``, ``1``, ``mean``, ``log_std`` (clamped to [-20, 2]; actions are ``tanh(mean + exp(log_std) * noise)``).

For each CASE of ``fixed`` (alpha 1, threshold 0, the most probable action in the target), ``lagrange`` (the same with a
learnt alpha and threshold 3), ``soft`` (``fixed`` with the SAC target) and ``max`` (``fixed`` with
``max_q_backup``):

- ``CASE.log_temp``: logarithm of the temperature, which only ``soft`` uses.
- ``CASE.target [B, 1]``: value of the next state, before reward, discount and terminals.
- ``CASE.target_noise``, ``CASE.target_actions``, ``CASE.target_log_prob``: what the target drew. ``soft``: ``[B, A]``,
  ``[B, A]``, ``[B, 1]``; ``max``: ``[n, B, A]``, ``[B, n, A]``, ``[B, n]``. Missing where the target draws nothing.
- ``max.target_values [M, B, n]``: target networks at these actions. d3rlpy takes the minimum over critics first and the
  maximum over actions then; the authors' code has it the other way round.
- ``CASE.current_noise [n, B, A]``, ``CASE.current_actions [B, n, A]``, ``CASE.current_log_prob [B, n]``: of the policy
  at the observations; ``CASE.next_...`` at the next observations; ``CASE.random_actions [B, n, A]``, uniform, with
  log-density ``A * log(0.5)``.
- ``CASE.td_loss``: sum over critics of the mean squared error.
- ``CASE.conservative [M]``: ``5 * (mean(logsumexp - Q(data)) - threshold)`` of each critic, without alpha. The
  log-sum-exp is over the 3n values less log-densities, and is no mean: it has no ``- log(3n)``.
- ``CASE.conservative_loss``: ``sum(alpha * conservative)``; ``CASE.critic_loss``: ``td_loss + conservative_loss``.
- ``CASE.grad.NET.LAYER.weight``, ``.bias``: gradients of ``critic_loss`` for NET ``q1`` and ``q2``.
- ``lagrange.log_alpha``, ``lagrange.log_alpha_grad``, ``lagrange.log_alpha_after``: before, gradient of
  ``-mean_M(alpha * conservative)``, and after one step of Adam with rate 1e-2. ``lagrange.alpha``: what the critic's
  loss was scaled with, ``exp(log_alpha_after)``: d3rlpy moves alpha first.

One step of the actor, ``actor``: ``actor.noise [B, A]``, ``actor.actions [B, A]``, ``actor.log_prob [B, 1]``,
``actor.log_temp``, ``actor.log_temp_grad`` (of ``-mean(temp * (log_prob - A))``), ``actor.log_temp_after`` (Adam, rate
1e-2), ``actor.loss``: ``mean(exp(log_temp_after) * log_prob - min_M Q)``, and ``actor.grad.policy.LAYER.weight``,
``.bias``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import torch as th
from d3rlpy.models.torch.distributions import SquashedGaussianDistribution
from d3rlpy.torch_utility import TorchMiniBatch

BATCH, OBSERVATION, ACTION, N, UNITS, THRESHOLD = 16, 5, 2, 4, [32, 32], 3.0
LOG_TEMP, LOG_ALPHA = -0.7, 0.3
CASES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "lagrange": {"alpha_learning_rate": 1e-2, "alpha_threshold": THRESHOLD},
    "soft": {"soft_q_backup": True},
    "max": {"max_q_backup": True},
}

Arrays = dict[str, Any]


class Draws:
    """Keep everything that is drawn while it is entered: normal noise, squashed actions, and uniform actions."""

    def __enter__(self) -> Draws:
        self.noise: list[th.Tensor] = []
        self.actions: list[tuple[th.Tensor, th.Tensor]] = []
        self.uniform: list[th.Tensor] = []
        normal, squashed = th.distributions.normal, SquashedGaussianDistribution
        self._kept = (normal._standard_normal, squashed.sample_with_log_prob, squashed.sample_n_with_log_prob)
        draw_noise, draw_one, draw_many = self._kept
        draw_uniform = self._uniform = th.Tensor.uniform_

        def keep(store: list[Any], function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                found = function(*args, **kwargs)
                store.append(found)
                return found

            return wrapped

        normal._standard_normal = keep(self.noise, draw_noise)
        squashed.sample_with_log_prob = keep(self.actions, draw_one)
        squashed.sample_n_with_log_prob = keep(self.actions, draw_many)
        th.Tensor.uniform_ = keep(self.uniform, draw_uniform)
        return self

    def __exit__(self, *_: object) -> None:
        normal, squashed = th.distributions.normal, SquashedGaussianDistribution
        normal._standard_normal, squashed.sample_with_log_prob, squashed.sample_n_with_log_prob = self._kept
        th.Tensor.uniform_ = self._uniform


def linears(modules: Any) -> dict[str, th.nn.Linear]:
    """Layers of the networks by the names of the file."""
    found = {}
    for nets, name in ((modules.q_funcs, "q"), (modules.targ_q_funcs, "target")):
        for number, net in enumerate(nets, 1):
            hidden = [layer for layer in net.encoder._layers if isinstance(layer, th.nn.Linear)]
            found |= {f"{name}{number}.{k}": layer for k, layer in enumerate(hidden)}
            found[f"{name}{number}.out"] = net._fc
    policy = modules.policy
    hidden = [layer for layer in policy._encoder._layers if isinstance(layer, th.nn.Linear)]
    found |= {f"policy.{k}": layer for k, layer in enumerate(hidden)}
    return found | {"policy.mean": policy._mu, "policy.log_std": policy._logstd}


def gradients(layers: dict[str, th.nn.Linear], *nets: str) -> Arrays:
    """Gradients of these networks."""
    chosen = {name: layer for name, layer in layers.items() if name.startswith(nets)}
    return {f"grad.{n}.{part}": getattr(layer, part).grad for n, layer in chosen.items() for part in ("weight", "bias")}


def learner(start: dict[str, th.Tensor] | None, **settings: Any) -> Any:
    """d3rlpy's implementation with these weights; with random ones if none are given."""
    encoder = d3rlpy.models.VectorEncoderFactory(UNITS)
    config = {"alpha_learning_rate": 0.0, "alpha_threshold": 0.0, "temp_learning_rate": 1e-2, "n_action_samples": N}
    algorithm = d3rlpy.algos.CQLConfig(
        actor_encoder_factory=encoder, critic_encoder_factory=encoder, **{**config, **settings}
    ).create(device="cpu:0")
    algorithm.create_impl((OBSERVATION,), ACTION)
    impl = algorithm.impl
    modules = impl.modules
    with th.no_grad():
        for name, layer in linears(modules).items():
            for part in ("weight", "bias"):
                value = getattr(layer, part)
                if start is not None:
                    value.copy_(start[f"{name}.{part}"])
                    continue
                # critics wider than nn.Linear's, so that actions differ in value; a policy that is far from the bounds,
                # where formulas for the log-density that are equal on paper part
                scale = 0.7 if name.startswith("policy") else 2.0
                value.copy_(scale * th.randn_like(value) / value.shape[-1] ** 0.5)
        if start is None:
            modules.policy._logstd.bias.fill_(-1.0)
        next(modules.log_temp.parameters()).fill_(LOG_TEMP)
        if settings.get("alpha_learning_rate"):
            next(modules.log_alpha.parameters()).fill_(LOG_ALPHA)
    return impl


def critic_step(impl: Any, batch: TorchMiniBatch, case: str) -> Arrays:
    """One critic step of a case."""
    modules = impl.modules
    log_alpha = next(modules.log_alpha.parameters())
    found: Arrays = {"log_temp": next(modules.log_temp.parameters()).item()}
    before = log_alpha.item()
    modules.critic_optim.zero_grad()
    with Draws() as draws:
        target = impl.compute_target(batch)
        drawn = len(draws.actions)
        loss = impl.compute_critic_loss(batch, target)
    if case == "lagrange":  # before the critic's loss adds to its gradient
        found |= {"log_alpha": before, "log_alpha_grad": log_alpha.grad.item(), "log_alpha_after": log_alpha.item()}
        found["alpha"] = loss.alpha.item()
    loss.critic_loss.backward()
    conservative = loss.conservative_loss.item()
    td = loss.critic_loss.item() - conservative
    if drawn:
        found["target_noise"] = draws.noise[0]
        found["target_actions"], log_prob = draws.actions[0]
        found["target_log_prob"] = log_prob if case == "soft" else log_prob[..., 0]
    for name, noise, (actions, log_prob) in zip(
        ("current", "next"), draws.noise[drawn:], draws.actions[drawn:], strict=True
    ):
        found |= {f"{name}_noise": noise, f"{name}_actions": actions, f"{name}_log_prob": log_prob[..., 0]}
    (uniform,) = draws.uniform
    found["random_actions"] = uniform.view(BATCH, N, ACTION)
    if case == "max":
        observations = batch.next_observations[:, None].expand(-1, N, -1).reshape(-1, OBSERVATION)
        values = impl._targ_q_func_forwarder.compute_expected_q(
            observations, found["target_actions"].reshape(-1, ACTION), "none"
        )
        found["target_values"] = values.view(2, BATCH, N)
        other = found["target_values"].max(2).values.min(0).values[:, None]
        assert (other != target).any(), "these weights do not tell the two orders apart: take another seed"
    # the same once more, to have each critic's part
    replay = iter(draws.actions[drawn:])
    kept, fill = SquashedGaussianDistribution.sample_n_with_log_prob, th.Tensor.uniform_
    SquashedGaussianDistribution.sample_n_with_log_prob = lambda *_: next(replay)
    th.Tensor.uniform_ = lambda *_: uniform
    found["conservative"] = impl._compute_conservative_loss(
        batch.observations, batch.actions, batch.next_observations, batch.returns_to_go
    )
    SquashedGaussianDistribution.sample_n_with_log_prob, th.Tensor.uniform_ = kept, fill
    total = loss.alpha.item() * found["conservative"].sum().item()
    np.testing.assert_allclose(total, conservative, rtol=1e-5, err_msg=case)
    found |= {"target": target, "td_loss": td, "conservative_loss": conservative}
    found["critic_loss"] = loss.critic_loss.item()
    return found | gradients(linears(modules), "q1", "q2")


def actor_step(impl: Any, batch: TorchMiniBatch) -> Arrays:
    """One actor step."""
    log_temp = next(impl.modules.log_temp.parameters())
    before = log_temp.item()
    impl.modules.actor_optim.zero_grad()
    with Draws() as draws:
        loss = impl.compute_actor_loss(batch, impl.modules.policy(batch.observations))
    temp_grad = log_temp.grad.item()  # before the actor's loss adds to it
    loss.actor_loss.backward()
    ((actions, log_prob),) = draws.actions
    return {
        "noise": draws.noise[0],
        "actions": actions,
        "log_prob": log_prob,
        "log_temp": before,
        "log_temp_grad": temp_grad,
        "log_temp_after": log_temp.item(),
        "loss": loss.actor_loss.item(),
        **gradients(linears(impl.modules), "policy"),
    }


def main() -> None:
    """Write the file."""
    d3rlpy.seed(0)
    th.set_num_threads(1)
    fields = {
        "observations": th.randn(BATCH, OBSERVATION),
        "actions": th.rand(BATCH, ACTION) * 2 - 1,
        "rewards": th.randn(BATCH, 1),
        "next_observations": th.randn(BATCH, OBSERVATION),
        "terminals": (th.arange(BATCH) < 3).float()[:, None],
    }
    batch = TorchMiniBatch(
        **fields,
        next_actions=th.zeros(BATCH, ACTION),
        returns_to_go=th.zeros(BATCH, 1),
        intervals=th.ones(BATCH, 1),
        device="cpu:0",
    )
    layers = linears(learner(None).modules)
    start = {f"{n}.{part}": getattr(layer, part).detach() for n, layer in layers.items() for part in ("weight", "bias")}
    arrays = {f"batch.{name}": value for name, value in fields.items()} | start
    for case, settings in CASES.items():
        found = critic_step(learner(start, **settings), batch, case)
        arrays |= {f"{case}.{name}": value for name, value in found.items()}
    found = actor_step(learner(start), batch)
    arrays |= {f"actor.{name}": value for name, value in found.items()}
    plain = {n: v.detach().numpy() if isinstance(v, th.Tensor) else np.float32(v) for n, v in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("d3rlpy_cql.npz"), **plain)


if __name__ == "__main__":
    main()
