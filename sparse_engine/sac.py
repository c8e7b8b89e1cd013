"""SAC on connections alone."""

from collections.abc import Callable, Iterator

import numpy as np

from sparse_engine.engine import Engine
from sparse_engine.kernels import outputs_for_one, update_sac_actor, update_sac_critics


class SparseSACEngine(Engine):
    """SAC's updates: the actor has two outputs for each action, mean and logarithmic deviation of a Gaussian."""

    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """Return the means and logarithmic deviations [2 * actions] for one observation [observations]."""
        return self._compiled[outputs_for_one](self.actor.arrays, self._observation(observation))

    def update_critics(self, buffer, indices: np.ndarray, noise: np.ndarray, temperature: float) -> dict[str, float]:
        """Fit all critics to the smallest target value and entropy; return their loss and mean value.

        The batch is as in ``SparseEngine``; ``noise`` [batch, actions] draws the next actions.
        """
        self.critics.steps += 1
        arguments = self._arguments(self.critics, (buffer.rows, indices), self._matrix(noise), temperature)
        loss, value = self._compiled[update_sac_critics](*arguments)
        return {"critic_loss": loss, "value": value}

    def update_actor(self, buffer, indices: np.ndarray, noise: np.ndarray, temperature: float) -> dict[str, float]:
        """Move the actor towards actions that the minimum critic values more, and towards entropy."""
        self.actor.steps += 1
        arguments = self._arguments(self.actor, (buffer.rows, indices), self._matrix(noise), temperature)
        loss, entropy = self._compiled[update_sac_actor](*arguments)
        return {"actor_loss": loss, "entropy": entropy}

    def _calls(self, observation, batch: tuple, noise: np.ndarray) -> Iterator[tuple[Callable, tuple]]:
        yield outputs_for_one, (self.actor.arrays, observation)
        yield update_sac_critics, self._arguments(self.critics, batch, noise, 0.0)
        yield update_sac_actor, self._arguments(self.actor, batch, noise, 0.0)
        yield from super()._calls(observation, batch, noise)
