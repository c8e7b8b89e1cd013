"""Dynamic sparse training in SAC (DS-SAC): the paper's appendix, which puts its four pieces into another agent.

What is here is SAC alone (Haarnoja et al., "Soft Actor-Critic", arXiv 1801.01290, and "Soft Actor-Critic Algorithms and
Applications", arXiv 1812.05905): its arguments, its stochastic actor and its losses. Topology, networks, replay buffer,
run and command line are imported. ``sparse_engine/sac.py`` computes the same update on connections alone.

What differs from other SACs is the paper's or its TD3's: the temperature is fixed, targets are copies made every 1,000
updates instead of moving averages, Adam has weight decay, and an update's critics and actor share a batch.
"""

import dataclasses
import math
import sys
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import logsigmoid

from dst_td3 import (
    TD3,
    Arguments,
    Batch,
    Layer,
    MaskedEngine,
    ReplayBuffer,
    adaptation_due,
    forward,
    main,
    unscale_action,
)

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # bounds of the Gaussian's logarithmic deviation, as SAC's authors have them


# --- Arguments --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class SACArguments(Arguments):
    """Train a SAC agent that is sparse from the first step to the last (DS-SAC). Defaults are the paper's settings.

    Where its Appendix A is silent (weight decay, discount, random actions at the start, buffer), they are its TD3's.
    """

    method: Literal["ds-sac", "static-sac", "sac"] = "ds-sac"
    """ds-sac adapts its sparse topology, static-sac keeps the first one, sac is dense"""
    drop_fraction: float = 0.1  # eta of the paper: fraction of a layer's connections that an adaptation replaces
    batch_size: int = 256  # transitions in a batch
    learning_rate: float = 3e-4  # Adam's learning rate: actor, critics, and the temperature where it is learned
    temperature: float = 0.2  # alpha of SAC, the weight of the entropy; where it is learned, the first one
    learn_temperature: bool = False  # learn the temperature, so that the entropy tends to minus the number of actions
    target_interval: int = 1000  # updates between two copies of the critics into their targets

    # What TD3 is asked and SAC is not; a constant of the class is no argument. SAC's policy explores by itself, its
    # actor learns at every step, its targets are copies, and a policy's file, to begin with, would hold the mean alone.
    exploration_noise: ClassVar = 0.0
    policy_noise: ClassVar = 0.0
    noise_clip: ClassVar = 0.0
    policy_frequency: ClassVar = 1
    tau: ClassVar = 1.0
    initial_policy: ClassVar = None

    OUTPUTS_PER_ACTION: ClassVar = 2  # mean and logarithmic deviation
    # For Ant-v4 as in TD3: the paper's 30 would be more than a full layer, 9.5 keeps its density on Ant-v3 (0.39).
    PAPER_LAMBDA: ClassVar = {
        **dict.fromkeys(("HalfCheetah-v4", "HalfCheetah-v5", "Walker2d-v4", "Walker2d-v5"), (12.0, 80.0)),
        **dict.fromkeys(("Hopper-v4", "Hopper-v5"), (7.0, 20.0)),
        "Ant-v4": (9.5, 64.0),
        "Humanoid-v4": (61.0, 64.0),
    }

    def validate(self) -> None:
        """Raise InputError for the first argument that no run can use."""
        super().validate()
        self.require(0 < self.temperature < math.inf, "temperature", "a positive number")

    def make_agent(self, actor: list[Layer], critics: list[Layer], bounds: tuple) -> "SAC":
        """Return the agent to train, on the engine that was asked for."""
        if self.engine == "masked":
            return SAC(MaskedSACEngine(actor, critics, bounds, self), bounds, self)
        from sparse_engine.sac import SparseSACEngine

        names = ("batch_size", "learning_rate", "weight_decay", "gamma", "tau", "drop_fraction")
        return SAC(SparseSACEngine(actor, critics, bounds, **{n: getattr(self, n) for n in names}), bounds, self)


# --- SAC --------------------------------------------------------------------------------------------------------------
class SAC(TD3):
    """Soft actor-critic on an engine, whose ``outputs`` are the actor's means and logarithmic deviations.

    An action is ``tanh(mean + deviation * noise)``, scaled to its bounds. Probabilities are those of the actions before
    that, in [-1, 1] as SAC's authors have them, so that a temperature suits any bounds.
    """

    def __init__(self, engine, bounds: tuple[np.ndarray, np.ndarray], args: SACArguments):
        super().__init__(engine, bounds, args)
        self.actions = len(bounds[0])
        # The temperature's logarithm, its two moments in Adam, and Adam's number of steps.
        self.log_temperature = np.array([math.log(args.temperature), 0.0, 0.0, 0.0])

    @property
    def temperature(self) -> float:
        """The weight of the entropy, alpha."""
        return math.exp(min(self.log_temperature[0], 80))  # far beyond use, and still a number in float32

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions], that of the mean, for one observation [observations]."""
        return unscale_action(np.tanh(self.engine.outputs(observation)[: self.actions]), *self.bounds)

    def explore(self, observation: np.ndarray, rng: Generator, act: None = None) -> np.ndarray:
        """Draw an action [actions] from the policy."""
        mean, log_std = np.split(self.engine.outputs(observation), 2)
        noise = rng.standard_normal(self.actions, dtype=np.float32)
        unbounded = mean + np.exp(log_std.clip(LOG_STD_MIN, LOG_STD_MAX)) * noise
        return unscale_action(np.tanh(unbounded), *self.bounds)

    def learn(self, buffer: ReplayBuffer, step: int, rng: Generator) -> None:
        """Do the learning of one environment step: both updates, with adaptations as in Algorithm 1 of the paper."""
        engine, args = self.engine, self.args
        for update in range(args.updates_per_step * (step - 1) + 1, args.updates_per_step * step + 1):
            batch = buffer.draw(args.batch_size, rng)
            size = (2, args.batch_size, self.actions)
            next_noise, noise = rng.standard_normal(size, dtype=self.bounds[0].dtype)
            self.losses |= engine.update_critics(buffer, batch, next_noise, self.temperature)
            if adaptation_due(update, 1, args):
                self.adapt(engine.critics, buffer, rng)
            self.losses |= engine.update_actor(buffer, batch, noise, self.temperature)
            if adaptation_due(update, 1, args):
                self.adapt(engine.actor, buffer, rng)
            if args.learn_temperature:
                self._update_temperature()
            if update % args.target_interval == 0:
                # A copy (tau is 1) has the topology of its network too: the target's prune, the paper's fourth piece,
                # has nothing to do. The actor's target is of no use to SAC; as a copy it keeps no old connection.
                engine.critics.update_target()
                engine.actor.update_target()

    def _update_temperature(self) -> None:
        """Take one Adam step that raises the temperature where the entropy is below its target, minus the actions."""
        logarithm, first, second, steps = self.log_temperature
        decay, square_decay = 0.9, 0.999  # Adam's, as torch has them by default
        gradient = float(self.losses["entropy"]) + self.actions
        first += (1 - decay) * (gradient - first)
        second += (1 - square_decay) * (gradient**2 - second)
        steps += 1
        scale = math.sqrt(second / (1 - square_decay**steps)) + 1e-8
        logarithm -= self.args.learning_rate * first / (1 - decay**steps) / scale
        self.log_temperature[:] = logarithm, first, second, steps
        self.losses |= {"temperature": self.temperature}

    def policy_layers(self) -> list[Layer]:
        """Return copies of the layers whose outputs, through a tanh, are the deterministic actions: the mean's."""
        *hidden, output = super().policy_layers()
        return [*hidden, Layer(*(array[..., : self.actions] for array in output))]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        return super().state_dict() | {"log_temperature": self.log_temperature}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state_dict`` returned. Raises KeyError or ValueError when it belongs to another agent."""
        super().load_state_dict(state)
        self.log_temperature[:] = state["log_temperature"]


def log_probability(unbounded: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """Return the logarithmic density [..., 1] of actions ``tanh(unbounded)`` [..., actions] of a squashed Gaussian.

    ``unbounded`` lies ``noise`` deviations from the mean. The Gaussian's density is divided by the slope of the tanh,
    1 - tanh(x)^2 (arXiv 1801.01290, Appendix C), here 4 * sigmoid(2x) * sigmoid(-2x), which no rounding makes zero.
    """
    gaussian = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
    log_slope = math.log(4) + logsigmoid(2 * unbounded) + logsigmoid(-2 * unbounded)
    return (gaussian - log_slope).sum(dim=-1, keepdim=True)


class MaskedSACEngine(MaskedEngine):
    """Computes SAC's updates with masked networks, on any torch device."""

    @torch.no_grad()
    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """Return the means and logarithmic deviations [2 * actions] for one observation [observations]."""
        x = torch.from_numpy(observation.astype(np.float32)).to(self.args.device)
        return forward(self.actor.layers, x[None])[0].cpu().numpy()

    def draw(self, observation: Tensor, noise: np.ndarray) -> tuple[Tensor, Tensor]:
        """Draw actions [batch, actions] by ``noise``, as large; return them and their log-probabilities [batch, 1]."""
        noise = torch.from_numpy(noise).to(self.args.device)
        mean, log_std = forward(self.actor.layers, observation).chunk(2, dim=-1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        unbounded = mean + log_std.exp() * noise
        return unscale_action(torch.tanh(unbounded), self.low, self.high), log_probability(unbounded, log_std, noise)

    def update_critics(
        self, buffer: ReplayBuffer, indices: np.ndarray, noise: np.ndarray, temperature: float
    ) -> dict[str, Tensor]:
        """Fit both critics to the smaller target value and entropy; ``noise`` [batch, actions] draws next actions."""
        batch: Batch = self.batch(buffer, indices)
        with torch.no_grad():
            next_action, next_log_probability = self.draw(batch.next_observation, noise)
            next_values = self.values(self.critics.target, batch.next_observation, next_action)
            next_value = next_values.amin(dim=-3) - temperature * next_log_probability
            target_value = batch.reward + self.args.gamma * (1 - batch.terminated) * next_value
        values = self.values(self.critics.layers, batch.observation, batch.action)
        loss = (values - target_value).square().mean(dim=(-2, -1)).sum()
        self.critics.minimize(loss)
        return {"critic_loss": loss.detach(), "value": values.detach().mean()}

    def update_actor(
        self, buffer: ReplayBuffer, indices: np.ndarray, noise: np.ndarray, temperature: float
    ) -> dict[str, Tensor]:
        """Move the actor towards actions that the minimum critic values more, and towards entropy."""
        observation = self.batch(buffer, indices).observation
        action, drawn_log_probability = self.draw(observation, noise)
        values = self.values(self.critics.layers, observation, action)
        loss = (temperature * drawn_log_probability - values.amin(dim=-3)).mean()
        self.actor.minimize(loss)
        return {"actor_loss": loss.detach(), "entropy": -drawn_log_probability.detach().mean()}


def command() -> int:
    """Run the command line and return its exit code."""
    return main(SACArguments)


if __name__ == "__main__":
    sys.exit(command())
