"""
CQL for continuous actions as a bare torch loop: what the mathematics costs, and nothing else.

No sampling, no metrics, no modules. Both critics see the 30 sampled actions and the data's in one pass; the gradients
of their weights are written by hand, in place where possible; the actor's step has no gradients of critic weights. A
256x256 layer over 31 * 256 rows takes nine tenths of the time, and oneDNN multiplies matrices faster than MKL does on
many processors, so that it is called here by name. ``autograd`` is the same loop as one would write it first.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

HIDDEN, CRITICS = 256, 2
GAMMA, TAU, CONSERVATIVE, CRITIC_RATE, ACTOR_RATE = 0.99, 0.005, 5.0, 3e-4, 1e-4

Layers = list[th.Tensor]
Batch = dict[str, th.Tensor]


def layers(*sizes: int) -> Layers:
    """Weights and biases of a perceptron as ``nn.Linear`` draws them, alternating."""
    linears = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return [p.detach().clone().requires_grad_() for linear in linears for p in linear.parameters()]


def perceptron(weights: Layers, x: th.Tensor) -> th.Tensor:
    """Forward pass."""
    for w, b in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        x = F.relu(F.linear(x, w, b))
    return F.linear(x, weights[-2], weights[-1])


def squash(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Actions and their log-densities, summed over the last axis."""
    raw = mean + log_std.exp() * noise
    normal = -0.5 * noise * noise - log_std - 0.5 * math.log(2 * math.pi)
    return raw.tanh(), (normal - 2 * (math.log(2) - raw - F.softplus(-2 * raw))).sum(-1)


class BareCQL:
    """
    The loop.

    :param batches: tensors ``observations, actions, rewards, next_observations, dones``, drawn beforehand
    :param kind: ``onednn``, the fastest in fp32; ``bf16``, the same with the large layers in bfloat16; or ``autograd``
    :param n_actions: sampled actions of each of the three kinds
    """

    def __init__(self, batches: list[Batch], kind: str, n_actions: int) -> None:
        self.batches, self.kind, self.n, self.count = batches, kind, n_actions, 0
        (self.size, observation), action = batches[0]["observations"].shape, batches[0]["actions"].shape[1]
        self.critics = [layers(observation + action, HIDDEN, HIDDEN, 1) for _ in range(CRITICS)]
        self.actor, self.log_temp = layers(observation, HIDDEN, HIDDEN, 2 * action), th.zeros(1, requires_grad=True)
        self.online = [p for critic in self.critics for p in critic]
        self.target = [p.detach().clone() for p in self.online]
        self.frozen = [p.detach() for p in self.online]  # the same memory, without gradients
        adam = {"fused": True}
        self.critic_optimizer = th.optim.Adam(self.online, CRITIC_RATE, **adam)
        self.actor_optimizer = th.optim.Adam(self.actor, ACTOR_RATE, **adam)
        self.temp_optimizer = th.optim.Adam([self.log_temp], ACTOR_RATE, **adam)
        self.backward = self._autograd if kind == "autograd" else self._by_hand
        self.cast = (lambda x: x.to(th.bfloat16)) if kind == "bf16" else (lambda x: x)

    def step(self) -> None:
        """One gradient step of critics, temperature and actor, and of the target."""
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        mean, log_std = self._policy(batch)
        self.backward(batch, *self._constants(batch, mean.detach(), log_std.detach()))
        self.critic_optimizer.step()
        self._actor_step(batch, mean[: self.size], log_std[: self.size])
        th._foreach_lerp_(self.target, self.frozen, TAU)

    def _policy(self, batch: Batch) -> Any:
        # observations and next observations in one pass; the critics' step leaves the actor as it is
        both = th.cat([batch["observations"], batch["next_observations"]])
        mean, log_std = perceptron(self.actor, both).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    @th.no_grad()
    def _constants(self, batch: Batch, mean: th.Tensor, log_std: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Actions ``[3n + 1, B, A]``, the data's last; log-densities of the others ``[3n, B]``; targets ``[B]``."""
        size, n, width = self.size, self.n, mean.shape[1]
        noise = th.randn(2, n, size, width)
        sampled, log_prob = squash(mean.view(2, 1, size, width), log_std.view(2, 1, size, width), noise)
        uniform = th.rand(n, size, width).mul_(2).sub_(1)
        actions = th.cat([sampled.view(-1, size, width), uniform, batch["actions"][None]])
        log_prob = th.cat([log_prob.view(-1, size), th.full((n, size), width * math.log(0.5))])
        following = th.cat([batch["next_observations"], mean[size:].tanh()], -1)
        values = [perceptron(self.target[6 * k : 6 * k + 6], following) for k in range(CRITICS)]
        target = batch["rewards"] + GAMMA * (1 - batch["dones"]) * th.min(*values)
        return actions, log_prob, target[:, 0]

    def _autograd(self, batch: Batch, actions: th.Tensor, log_prob: th.Tensor, target: th.Tensor) -> None:
        x = th.cat([batch["observations"].expand(len(actions), -1, -1), actions], -1)
        q = th.stack([perceptron(critic, x)[..., 0] for critic in self.critics])
        td = (q[:, -1] - target).square().mean(1)
        gap = ((q[:, :-1] - log_prob).logsumexp(1) - q[:, -1]).mean(1)
        self.critic_optimizer.zero_grad()
        (td + CONSERVATIVE * gap).sum().backward()

    @th.no_grad()
    def _by_hand(self, batch: Batch, actions: th.Tensor, log_prob: th.Tensor, target: th.Tensor) -> None:
        linear, cast = th.ops.mkldnn._linear_pointwise, self.cast
        ones = actions.new_ones(*actions.shape[:2], 1)
        x = th.cat([batch["observations"].expand(len(actions), -1, -1), actions, ones], -1).flatten(0, 1)
        hidden, values = [], []
        for w1, b1, w2, b2, w3, b3 in self.critics:
            h1 = cast(linear(x, th.cat([w1, b1[:, None]], 1), None, "relu", [], ""))
            h2 = linear(h1, cast(w2), cast(b2), "relu", [], "")
            hidden.append((h1, h2))
            values.append(th.mv(h2, cast(w3)[0]).float() + b3)
        q = th.stack(values).view(CRITICS, -1, self.size)
        # the gradient of the loss with respect to every value
        slope = th.empty_like(q)
        slope[:, :-1] = (q[:, :-1] - log_prob).softmax(1) * (CONSERVATIVE / self.size)
        slope[:, -1] = (q[:, -1] - target) * (2 / self.size) - CONSERVATIVE / self.size
        for (w1, b1, w2, b2, w3, b3), (h1, h2), d in zip(self.critics, hidden, slope.view(CRITICS, -1, 1), strict=True):
            dc = cast(d)
            w3.grad, b3.grad = (dc.t() @ h2).float(), d.sum(0)
            mask = h2.sign_()  # that of the ReLU; the factors of a row and of a column move out of the products
            g1 = linear(mask, cast(w3.t() * w2).t(), None, "none", [], "")
            th.ops.aten.threshold_backward.grad_input(g1, h1, 0, grad_input=g1)
            first = (g1.t() @ cast(x * d)).float()
            w1.grad, b1.grad = first[:, :-1].contiguous(), first[:, -1].contiguous()
            w2.grad = (mask.t() @ h1.mul_(dc)).float().mul_(w3.t())
            b2.grad = th.mv(mask.t(), dc[:, 0]).float() * w3[0]

    def _actor_step(self, batch: Batch, mean: th.Tensor, log_std: th.Tensor) -> None:
        actions, log_prob = squash(mean, log_std, th.randn_like(mean))
        self.temp_optimizer.zero_grad()
        (self.log_temp.exp() * (mean.shape[1] - log_prob.detach().mean())).backward()
        self.temp_optimizer.step()
        x = th.cat([batch["observations"], actions], -1)
        values = [perceptron(self.frozen[6 * k : 6 * k + 6], x)[:, 0] for k in range(CRITICS)]
        self.actor_optimizer.zero_grad()
        (self.log_temp.detach().exp() * log_prob - th.min(*values)).mean().backward()
        self.actor_optimizer.step()

    def check(self) -> None:
        """Hold the gradients by hand against autograd's on the first batch, with the same noise."""
        batch, found = self.batches[0], []
        mean, log_std = self._policy(batch)
        constants = self._constants(batch, mean.detach(), log_std.detach())
        for backward in (self._autograd, self._by_hand):
            backward(batch, *constants)
            found.append([p.grad.clone() for p in self.online if p.grad is not None])
        for wanted, got in zip(*found, strict=True):
            th.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * max(1.0, float(wanted.abs().max())))
