"""TD3 on connections alone."""

from collections.abc import Callable, Iterator

import numpy as np

from sparse_engine.engine import Engine
from sparse_engine.kernels import act, update_td3_actor, update_td3_critics
from sparse_engine.networks import Layer


class SparseEngine(Engine):
    """TD3's updates; ``policy_noise`` and ``noise_clip`` are those of target policy smoothing, in half the range."""

    def __init__(
        self, actor: list[Layer], critics: list[Layer], bounds: tuple, *, policy_noise: float, noise_clip: float, **rest
    ):
        dtype = actor[0][0].dtype.type
        self.smoothing = dtype(policy_noise), dtype(noise_clip)
        super().__init__(actor, critics, bounds, **rest)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions] for one observation [observations]."""
        arguments = self.actor.arrays, self._observation(observation), self.settings.low, self.settings.high
        return self._compiled[act](*arguments)

    def update_critics(self, buffer, indices: np.ndarray, noise: np.ndarray) -> dict[str, float]:
        """Fit all critics to the smallest target value; return their loss and mean value.

        The batch are the rows ``indices`` (int64 [batch]) of ``buffer.rows`` [capacity, columns]: observation, action,
        reward, next observation, terminated. ``noise`` [batch, actions], unscaled, smooths the next actions.
        """
        self.critics.steps += 1
        arguments = self._arguments(self.critics, (buffer.rows, indices), self._matrix(noise), *self.smoothing)
        loss, value = self._compiled[update_td3_critics](*arguments)
        return {"critic_loss": loss, "value": value}

    def update_actor(self, buffer, indices: np.ndarray) -> dict[str, float]:
        """Move the actor towards actions that the first critic values more (deterministic policy gradient)."""
        self.actor.steps += 1
        arguments = self._arguments(self.actor, (buffer.rows, indices))
        return {"actor_loss": self._compiled[update_td3_actor](*arguments)}

    def _calls(self, observation, batch: tuple, noise: np.ndarray) -> Iterator[tuple[Callable, tuple]]:
        yield act, (self.actor.arrays, observation, self.settings.low, self.settings.high)
        yield update_td3_critics, self._arguments(self.critics, batch, noise, *self.smoothing)
        yield update_td3_actor, self._arguments(self.actor, batch)
        yield from super()._calls(observation, batch, noise)
