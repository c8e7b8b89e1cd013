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


class RigLTD3(TD3):
    """TD3 whose adaptations grow the connections with the largest gradients."""

    def scores(self, network, buffer: ReplayBuffer, rng: Generator) -> tuple[None, list | None]:
        """Return no drop scores (the weights serve) and the magnitude of the loss's dense gradient over one batch."""
        if self.args.grow_by == "uniform":
            return None, None
        actor, critics = (n.layer_arrays() for n in self.networks.values())
        masked = MaskedEngine(actor, critics, self.bounds, self.args)
        for own, copy in zip(self.networks.values(), (masked.actor, masked.critics), strict=True):
            arrays = own.layer_arrays(target=True)
            copy.target = [
                Layer(*(torch.tensor(array, device=self.args.device) for array in layer)) for layer in arrays
            ]
        batch = masked.batch(buffer, buffer.draw(self.args.batch_size, rng))
        if network is self.engine.actor:
            loss, layers = masked.actor_loss(batch), masked.actor.layers
        else:
            noise = torch.from_numpy(rng.standard_normal(batch.action.shape, dtype=np.float32)).to(self.args.device)
            (loss, _), layers = masked.critic_loss(batch, noise), masked.critics.layers
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers[:-1]])
        return None, [gradient.abs().cpu().numpy() for gradient in gradients]


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
