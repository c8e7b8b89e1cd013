"""DS-TD3 by the arithmetic of the authors' code, where the paper is silent: moments at empty positions too.

The authors mask the weights after Adam's step, so that the dense gradient still reaches the moments of positions
without a connection, and what grows there starts at zero but with momentum. It is a simulation by nature, so there is
no sparse engine for it. ``tests/test_authors_update.py`` holds it against a recording of their update, to 1e-12 in
float64.
"""

import dataclasses
import sys
from typing import ClassVar, Literal

import torch
from numpy.random import Generator
from torch import Tensor

from dst_td3 import TD3, Arguments, Layer, MaskedEngine, MaskedNetwork, main


@dataclasses.dataclass(frozen=True)
class DenseMomentsArguments(Arguments):
    """Train DS-TD3 by the arithmetic of the authors' code. Defaults are the paper's settings."""

    method: Literal["ds-td3", "static-td3"] = "ds-td3"  # adapts its topology, or keeps its first one
    engine: Literal["masked"] = "masked"
    """the one engine that has empty positions"""
    dense_moments: bool = True  # empty positions have moments too, and what grows keeps its step

    def papers(self) -> "DenseMomentsArguments":
        """Return the paper's setting of this environment and method; a run's name says what differs from it."""
        return type(self)(env=self.env, method=self.method, dense_moments=False)

    def make_agent(self, actor: list[Layer], critics: list[Layer], bounds: tuple) -> TD3:
        """Return the agent to train."""
        masked = DenseMomentsEngine if self.dense_moments else MaskedEngine
        return TD3(self.make_engine(actor, critics, bounds, masked), bounds, self)


class DenseMomentsNetwork(MaskedNetwork):
    """A masked network whose optimizer does not know of the masks."""

    def minimize(self, loss: Tensor) -> None:
        """Take one Adam step down the dense gradient of ``loss``, then mask the weights."""
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.unmasked = [layer.weight.detach().clone() for layer in self.layers]
        for layer in self.layers:
            layer.weight.detach().mul_(layer.mask)

    @torch.no_grad()
    def adapt(self, rng: Generator, drop_scores: list | None = None, growth_scores: list | None = None) -> None:
        """Adapt the topology of every sparse layer; what grows keeps its moments and its last step."""
        states = [self.optimizer.state[layer.weight] for layer in self.layers]
        moments = [[state[name].clone() for name in ("exp_avg", "exp_avg_sq")] for state in states]
        super().adapt(rng, drop_scores, growth_scores)
        for layer, unmasked, state, (first, second) in zip(self.layers, self.unmasked, states, moments, strict=True):
            layer.weight.copy_(unmasked * layer.mask)
            state["exp_avg"].copy_(first)
            state["exp_avg_sq"].copy_(second)


class DenseMomentsEngine(MaskedEngine):
    """The masked engine on networks with dense moments."""

    network: ClassVar = DenseMomentsNetwork


if __name__ == "__main__":
    sys.exit(main(DenseMomentsArguments))
