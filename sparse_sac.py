"""SAC on connections alone: the update of ``dst_sac.py`` by the kernels of ``sparse_engine.py``.

``SparseSAC`` does what ``MaskedSAC`` does. Networks, layout in memory and kernels are those of ``SparseTD3``; what is
here corresponds to that file's last room: two updates, and the policy's outputs for one observation. numba keeps what
it has compiled while a function's own file stays the same: after an edit of ``sparse_engine.py``, touch this one too.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from numba import njit

from dst_sac import LOG_STD_MAX, LOG_STD_MIN, SAC
from sparse_engine import (
    COMPILED,
    SparseNetwork,
    SparseTD3,
    adam_step,
    backward,
    fit_critics,
    forward,
    gather,
    in_threads,
    outputs_for_one,
    target_values,
    units,
)


@njit(**COMPILED)
def draw(actor, actor_values, action, noise, settings):
    """Draw actions by ``noise`` [batch, actions] for the observations that are the actor's inputs.

    Writes them to ``action`` [actions, padded batch]. Returns a view of the actor's outputs [2 * actions, padded
    batch], the actions as they were before they were stretched to their bounds [actions, batch], and their
    log-probabilities [batch].
    """
    low, high = settings.low, settings.high
    size, actions = noise.shape
    outputs = forward(actor, 0, False, actor_values, size)
    squashed, log_probability, product = np.empty((actions, size)), np.zeros(size), np.ones(size)
    for a in range(actions):
        half, middle = (high[a] - low[a]) / 2, (high[a] + low[a]) / 2
        for b in range(size):
            log_std = min(max(np.float64(outputs[actions + a, b]), LOG_STD_MIN), LOG_STD_MAX)
            unbounded = outputs[a, b] + math.exp(log_std) * noise[b, a]
            e = math.exp(-2 * abs(unbounded))  # tanh is (1 - e) / (1 + e), and its slope 4e / (1 + e)^2
            squashed[a, b] = math.copysign((1 - e) / (1 + e), unbounded)
            action[a, b] = squashed[a, b] * half + middle
            log_probability[b] -= noise[b, a] ** 2 / 2 + log_std - 2 * abs(unbounded)
            product[b] *= 1 + e  # a logarithm for each sample is enough
    for b in range(size):
        log_probability[b] += 2 * math.log(product[b]) - actions * (math.log(4) + math.log(2 * math.pi) / 2)
    return outputs, squashed, log_probability


@njit(**COMPILED)
def update_critics(actor, critics, actor_values, values, rows, picks, noise, temperature, settings, steps):
    """Fit all critics to the smallest of the target critics' values, plus what entropy the next actions add.

    The batch is as in ``target_values``; ``noise`` [batch, actions] draws the next actions. Returns the loss and the
    mean value.
    """
    size, observations, actions = len(picks), actor.sizes[0], len(settings.low)
    gather(actor_values, rows, picks, observations + actions + 1, rows.shape[1] - 1)
    next_action = units(values, observations, actions, size)
    _, _, next_log_probability = draw(actor, actor_values, next_action, noise, settings)
    next_values = target_values(critics, values, rows, picks)
    for n in range(len(next_values)):
        for b in range(size):
            next_values[n, b] -= temperature * next_log_probability[b]
    return fit_critics(critics, values, rows, picks, next_values, settings, steps)


@njit(**COMPILED)
def update_actor(actor, critics, actor_values, values, rows, picks, noise, temperature, settings, steps):
    """Move the actor towards actions that the lesser critic values more, and towards entropy.

    The batch is as in ``target_values``; ``noise`` [batch, actions] draws its actions. Returns loss and entropy.
    """
    low, high = settings.low, settings.high
    size, observations, actions = len(picks), actor.sizes[0], len(low)
    networks = len(critics.prune_guess)
    gather(actor_values, rows, picks, 0, observations)
    action = units(values, observations, actions, size)
    outputs, squashed, log_probability = draw(actor, actor_values, action, noise, settings)
    gather(values, rows, picks, 0, observations)
    lesser, value = np.zeros(size, np.int64), np.empty(size, values.dtype)
    for n in range(networks):
        output = forward(critics, n, False, values, size)[0]
        for b in range(size):
            if n == 0 or not output[b] >= value[b]:  # lets NaN through
                lesser[b], value[b] = n, output[b]

    # A sample's gradient comes through its lesser critic. Each critic leaves its part in place of the actions, where
    # the next one no longer needs them.
    slope = np.zeros((actions, size))
    for n in range(networks):
        output = units(values, critics.sizes[0] + (n + 1) * critics.sizes[1:].sum() - 1, 1, size)[0]  # its last unit
        output[:] = 0
        for b in range(size):
            if lesser[b] == n:
                output[b] = -1 / size
        backward(critics, n, values, size, observations, None)
        slope += action[:, :size]

    outputs[:, size:] = 0
    for a in range(actions):
        for b in range(size):
            y, log_std = squashed[a, b], np.float64(outputs[actions + a, b])
            # The log-probability falls with the slope of the tanh, 1 - y^2, whose logarithm has the derivative -2y.
            gradient = slope[a, b] * (1 - y * y) * (high[a] - low[a]) / 2 + temperature * 2 * y / size
            outputs[a, b] = gradient
            within = LOG_STD_MIN <= log_std <= LOG_STD_MAX
            outputs[actions + a, b] = gradient * math.exp(log_std) * noise[b, a] - temperature / size if within else 0
    backward(actor, 0, actor_values, size, 0, actor.gradient)
    adam_step(actor, steps, settings.learning_rate, settings.weight_decay)
    entropy = -log_probability.mean()
    return -temperature * entropy - value.mean(), entropy


class SparseSAC(SparseTD3, SAC):
    """SAC on sparse networks, on one CPU. All that engine and algorithm do not share comes from SAC."""

    CRITIC_UPDATES = (update_critics, in_threads(update_critics))
    act = SAC.act

    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """Return the means and logarithmic deviations [2 * actions] for one observation [observations]."""
        return outputs_for_one(self.actor.arrays, np.array(observation, self.dtype))

    def update_actor(self, batch: tuple[np.ndarray, np.ndarray], noise: np.ndarray) -> None:
        """Move the actor towards actions that the lesser critic values more, and towards entropy."""
        self.actor.steps += 1
        loss, entropy = update_actor(*self._arguments(self.actor, batch, noise))
        self.losses |= {"actor_loss": loss, "entropy": entropy}

    def _arguments(self, network: SparseNetwork, batch: tuple[np.ndarray, np.ndarray], *noise: np.ndarray) -> tuple:
        return super()._arguments(network, batch, *noise, self.temperature)

    def _calls(self, observation: np.ndarray, batch: tuple, noise: np.ndarray) -> Iterator[tuple[Callable, tuple]]:
        yield outputs_for_one, (self.actor.arrays, observation)
        yield self._critic_update, self._arguments(self.critics, batch, noise)
        yield update_actor, self._arguments(self.actor, batch, noise)
        yield from self._network_calls(batch)
