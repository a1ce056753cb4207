"""What lies behind the end of a task."""

from __future__ import annotations

import math

LOGIT_CLIP = 5.0
"""Bound of the logits that carry an absorbing-state correction."""


class AbsorbingStates:
    """
    The value of a task's end, in closed form.

    An episode that ends is thought to go on for ever in an absorbing state (Kostrikov et al., 2019, section 4.2).
    Without it, a reward that is always positive pays for living on and one that is always negative for dying,
    whatever the expert does.

    Unlike the paper, no transition is added and no network is asked: all absorbing states are one point, and the best
    discriminator there is known. Let p_E and p_G be the shares of the absorbing state in expert's and generator's
    experience, each end counting for the gamma / (1 - gamma) steps that discounting sees. Then the logit of the
    absorbing state is log(p_E / p_G), and that of any other (s, a) is the network's plus log((1 - p_E) / (1 - p_G)),
    because the network compares distributions that are conditional on not being absorbed.

    Nor is a reward added at the end: subtracting the absorbing state's reward from every step's, for ever, changes
    no preference and leaves 0 for what lies behind the end, which is what PPO assumes. A bonus at the end would say the
    same, but drown the differences between steps in the value function's errors.

    Where the expert never ends, an end is as unlike it as can be, however rarely the agent ends. A smoothed
    log(p_E / p_G) would fade with the agent's last ends and leap back with the next one, by tens of rewards in every
    state's value; so the logit stays at its bound, where "-log(1-D)" takes next to nothing from the reward.

    :param gamma: discount factor
    :param n_expert: steps of the demonstrations
    :param n_expert_ends: how many of them ended the task
    """

    SMALLEST, MEMORY = 1e-3, 0.8

    def __init__(self, gamma: float, n_expert: int, n_expert_ends: int) -> None:
        if gamma >= 1:
            raise ValueError("Absorbing states need gamma < 1; pass absorbing=False for an undiscounted task.")
        self.steps_per_end = gamma / (1 - gamma)
        self.expert_share = self._share(n_expert, n_expert_ends)

    def _share(self, steps: int, ends: int) -> float:
        return self.steps_per_end * ends / (steps + self.steps_per_end * ends)

    def update(self, generator_share: float | None, steps: int, ends: int) -> float:
        """
        Average the generator's share over rollouts, weighting the last with 1 - ``MEMORY``.

        :param generator_share: the share so far, None if there was no rollout
        :param steps: steps of the new rollout
        :param ends: how many of them ended the task
        :return: the share now
        """
        new = self._share(steps, ends)
        return new if generator_share is None else self.MEMORY * generator_share + (1 - self.MEMORY) * new

    def logits(self, generator_share: float) -> tuple[float, float]:
        """
        Logit of the absorbing state, and what to add to all others.

        :param generator_share: share of the absorbing state in the generator's experience
        :return: both; the first within +-``LOGIT_CLIP``
        """
        e = self.SMALLEST
        other = math.log((1 - self.expert_share + e) / (1 - generator_share + e))
        if self.expert_share == 0:
            return -LOGIT_CLIP, other
        absorbing = math.log((self.expert_share + e) / (generator_share + e))
        return max(-LOGIT_CLIP, min(LOGIT_CLIP, absorbing)), other
