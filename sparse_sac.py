"""SAC on connections alone: the update of ``dst_sac.py`` by the kernels of ``sparse_engine.py``.

``SparseSAC`` does what ``MaskedSAC`` does. Networks, layout in memory and kernels are those of ``SparseTD3``; what is
here corresponds to that file's last room: two updates, and the policy's outputs for one observation.
"""

import math
from collections.abc import Callable, Iterator
from types import FunctionType

import numpy as np
from numba import njit, prange

from dst_sac import LOG_STD_MAX, LOG_STD_MIN, SAC
from sparse_engine import (
    COMPILED,
    CRITICS_ALONE,
    SparseTD3,
    adam_step,
    backward,
    first_output,
    forward,
    gather,
    outputs_for_one,
    soft_update,
    square_errors,
    units,
)


@njit(**COMPILED)
def draw(actor, actor_values, action, noise, settings):
    """Draw actions by ``noise`` [batch, actions] for the observations that are the actor's inputs.

    Writes them to ``action`` [actions, padded batch]. Returns them as they were before they were stretched to their
    bounds [actions, batch], and their log-probabilities [batch].
    """
    low, high = settings.low, settings.high
    size, actions = noise.shape
    forward(actor, 0, False, actor_values, size)
    outputs = units(actor_values, first_output(actor, 0), 2 * actions, size)
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
    return squashed, log_probability


@njit(**COMPILED)
def update_critics(actor, critics, actor_values, values, rows, picks, noise, temperature, settings, steps):
    """Fit all critics to the smallest of the target critics' values, plus what entropy the next actions add.

    The batch are the ``picks`` among a replay buffer's ``rows``, whose columns are those of a ``Batch``; ``noise``
    [batch, actions] draws the next actions. Returns the loss and the mean value.
    """
    size, observations, actions = len(picks), actor.sizes[0], len(settings.low)
    reward, following = observations + actions, observations + actions + 1
    networks = len(critics.prune_guess) // len(critics.bands)

    gather(actor_values, 0, rows, picks, following, following + observations)
    next_action = units(values, observations, actions, size)
    _, next_log_probability = draw(actor, actor_values, next_action, noise, settings)
    gather(values, 0, rows, picks, following, following + observations)
    next_values = np.empty((networks, size), values.dtype)
    for n in prange(networks):
        forward(critics, n, True, values, size)
        next_values[n] = units(values, first_output(critics, n), 1, size)[0, :size]
    for n in range(networks):
        for b in range(size):
            next_values[n, b] -= temperature * next_log_probability[b]

    gather(values, 0, rows, picks, 0, reward)
    losses, mean_values = np.empty(networks), np.empty(networks)
    for n in prange(networks):
        forward(critics, n, False, values, size)
        output = units(values, first_output(critics, n), 1, size)[0]
        losses[n], mean_values[n] = square_errors(output, next_values, rows, picks, reward, settings.gamma)
        backward(critics, n, values, size, 0, critics.gradient)
    adam_step(critics, steps, settings.learning_rate, settings.weight_decay)
    return losses.sum(), mean_values.mean()


# As in sparse_engine.py: with two threads each critic has one to itself, and a name of its own in numba's cache.
OWN_NAME = update_critics.py_func.__code__.replace(co_qualname="update_critics_in_threads")
update_critics_in_threads = njit(**COMPILED, parallel=CRITICS_ALONE)(FunctionType(OWN_NAME, globals()))


@njit(**COMPILED)
def update_actor(actor, critics, actor_values, values, rows, picks, noise, temperature, settings, steps):
    """Move the actor towards actions that the lesser critic values more, and towards entropy.

    The batch is as in ``update_critics``; ``noise`` [batch, actions] draws its actions. Returns loss and entropy.
    """
    low, high = settings.low, settings.high
    size, observations, actions = len(picks), actor.sizes[0], len(low)
    networks = len(critics.prune_guess) // len(critics.bands)
    gather(actor_values, 0, rows, picks, 0, observations)
    action = units(values, observations, actions, size)
    squashed, log_probability = draw(actor, actor_values, action, noise, settings)
    gather(values, 0, rows, picks, 0, observations)
    lesser, value = np.zeros(size, np.int64), np.empty(size, values.dtype)
    for n in range(networks):
        forward(critics, n, False, values, size)
        output = units(values, first_output(critics, n), 1, size)[0]
        for b in range(size):
            if n == 0 or not output[b] >= value[b]:  # lets NaN through
                lesser[b], value[b] = n, output[b]

    # A sample's gradient comes through its lesser critic. Each critic leaves its part in place of the actions, where
    # the next one no longer needs them.
    slope = np.zeros((actions, size))
    for n in range(networks):
        output = units(values, first_output(critics, n), 1, size)[0]
        output[:] = 0
        for b in range(size):
            if lesser[b] == n:
                output[b] = -1 / size
        backward(critics, n, values, size, observations, None)
        slope += action[:, :size]

    outputs = units(actor_values, first_output(actor, 0), 2 * actions, size)
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

    CRITIC_UPDATES = (update_critics, update_critics_in_threads)
    act = SAC.act

    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """Return the means and logarithmic deviations [2 * actions] for one observation [observations]."""
        return outputs_for_one(self.actor.arrays, np.array(observation, self.dtype))

    def update_critics(self, batch: tuple[np.ndarray, np.ndarray], noise: np.ndarray) -> None:
        """Fit both critics to the smaller target value and entropy; ``noise`` [batch, actions] draws next actions."""
        self.critics.steps += 1
        update = self.CRITIC_UPDATES[self.args.threads > 1]
        loss, value = update(*self._arguments(batch, noise, self.critics))
        self.losses |= {"critic_loss": loss, "value": value}

    def update_actor(self, batch: tuple[np.ndarray, np.ndarray], noise: np.ndarray) -> None:
        """Move the actor towards actions that the lesser critic values more, and towards entropy."""
        self.actor.steps += 1
        loss, entropy = update_actor(*self._arguments(batch, noise, self.actor))
        self.losses |= {"actor_loss": loss, "entropy": entropy}

    def _arguments(self, batch: tuple[np.ndarray, np.ndarray], noise: np.ndarray, network) -> tuple:
        """Return what an update of ``network`` takes."""
        return *self._spaces(batch), noise, self.temperature, self.settings, int(network.steps)

    def _calls(self) -> Iterator[tuple[Callable, tuple]]:
        observations, actions = int(self.actor.arrays.sizes[0]), len(self.settings.low)
        batch = np.zeros((1, 2 * observations + actions + 2), self.dtype), np.zeros(1, np.int64)
        update = self._arguments(batch, np.zeros((1, actions), self.dtype), self.actor)
        yield outputs_for_one, (self.actor.arrays, np.zeros(observations, self.dtype))
        yield self.CRITIC_UPDATES[self.args.threads > 1], update
        yield update_actor, update
        yield soft_update, self.actor.soft_update_arguments()
