"""RigL in DS-TD3: connections grow where the dense gradient is largest instead of at random (arXiv 1911.11134).

``python examples/rigl.py --env Hopper-v4 --sparsity 0.9``. A topology rule is a subclass of ``TD3`` with other scores;
this one serves both engines, since once in an adaptation the gradient may come from a masked pass over dense arrays.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.random import Generator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dst_td3 import TD3, Arguments, Layer, MaskedEngine, ReplayBuffer, main


def gradient_magnitudes(agent: TD3, network, buffer: ReplayBuffer, rng: Generator) -> list[np.ndarray]:
    """Return the magnitudes [..., inputs, outputs] of each sparse layer's dense gradient over one batch."""
    actor, critics = (n.layer_arrays() for n in agent.networks.values())
    masked = MaskedEngine(actor, critics, agent.bounds, agent.args)
    for own, copy in zip(agent.networks.values(), (masked.actor, masked.critics), strict=True):
        arrays = own.layer_arrays(target=True)
        copy.target = [Layer(*(torch.tensor(array, device=agent.args.device) for array in layer)) for layer in arrays]
    batch = masked.batch(buffer, buffer.draw(agent.args.batch_size, rng))
    if network is agent.engine.actor:
        loss, layers = masked.actor_loss(batch), masked.actor.layers
    else:
        noise = torch.from_numpy(rng.standard_normal(batch.action.shape, dtype=np.float32)).to(agent.args.device)
        (loss, _), layers = masked.critic_loss(batch, noise), masked.critics.layers
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers[:-1]])
    return [gradient.abs().cpu().numpy() for gradient in gradients]


class RigLTD3(TD3):
    """TD3 whose adaptations grow the connections with the largest gradients."""

    def scores(self, network, buffer: ReplayBuffer, rng: Generator) -> tuple[None, list | None]:
        """Return no drop scores (the weights serve) and growth scores where they are asked for."""
        by_gradient = self.args.grow_by == "gradient"
        return None, gradient_magnitudes(self, network, buffer, rng) if by_gradient else None


@dataclasses.dataclass(frozen=True)
class RigLArguments(Arguments):
    """Train DS-TD3 with RigL's growth. Defaults are the paper's settings."""

    grow_by: Literal["gradient", "uniform"] = "gradient"  # where new connections come

    def papers(self) -> "RigLArguments":
        """Return the paper's setting, so that a run's name says what differs from it."""
        return type(self)(env=self.env, method=self.method, grow_by="uniform")

    def make_agent(self, actor: list[Layer], critics: list[Layer], bounds: tuple) -> TD3:
        """Return the agent to train."""
        return RigLTD3(self.make_engine(actor, critics, bounds, MaskedEngine), bounds, self)


if __name__ == "__main__":
    sys.exit(main(RigLArguments))
