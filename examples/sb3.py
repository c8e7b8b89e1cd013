"""Stable-Baselines3's TD3 and SAC, sparse from the first step to the last by the pieces of dst_td3.py.

``python examples/sb3.py --env Hopper-v4 --sparsity 0.5`` trains one. In a script of your own::

    model = TD3(SparseTD3Policy, env, policy_kwargs={"sparsity": 0.5, "net_arch": [256, 256]})
    model.learn(1_000_000, callback=DynamicSparseTraining())

The policy draws the topology and keeps it, the callback adapts it; without the callback it stays as it was drawn.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dst_td3 import (
    Arguments,
    adaptation_due,
    command_line,
    count_connections,
    drop_and_grow,
    erdos_renyi_topology,
    make_environment,
    prune_target,
    replaced,
    target_support,
)


# --- What makes an agent of SB3 sparse --------------------------------------------------------------------------------
#
# Weights of torch's layers are [outputs, inputs], those of dst_td3.py [..., inputs, outputs]. Its functions see a layer
# as so many positions, so either order will do where weight, mask and target share it: nothing is transposed here.
def hidden_layers(network: nn.Module, options: dict) -> list[nn.Linear]:
    """List the layers of a network of SB3 without those of its outputs, which stay dense."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linear[: len(options["net_arch"])]


class SparsePolicy:
    """Makes a policy class of SB3 sparse, for vectors of observations: piece 1, the topology.

    No gradient passes its masks, so what is zero outside the topology, weights and Adam's moments, stays zero. Masks
    are buffers of their layers, [outputs, inputs], which SB3 saves and loads. ``sparsity`` is that of each network's
    hidden layers, drawn with torch's seed. Raises InputError when a layer would have no connection.
    """

    def __init__(self, *arguments, sparsity: float = 0.5, **options):
        super().__init__(*arguments, **options)
        self.sparsity, self.rng = sparsity, np.random.default_rng(torch.initial_seed())
        for _, layers, targets in self.networks():
            widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
            connections = count_connections([*widths, 1], sparsity)[:-1]
            for layer, target, count in zip(layers, targets, connections, strict=True):
                mask = erdos_renyi_topology(tuple(layer.weight.shape), count, self.rng)
                layer.register_buffer("mask", torch.from_numpy(mask).to(layer.weight.device))
                layer.weight.register_hook(lambda gradient, layer=layer: gradient * layer.mask)
                layer.weight.data.mul_(layer.mask)
                target.weight.data.copy_(layer.weight.data)

    def networks(self) -> Iterator[tuple[Optimizer, list[nn.Linear], list[nn.Linear]]]:
        """Yield optimizer, hidden layers and those of the target of each network (its own where it has none)."""
        targets = getattr(self, "actor_target", self.actor), *self.critic_target.q_networks
        actor_options, critic_options = self.actor_kwargs, self.critic_kwargs
        yield (self.actor.optimizer, *(hidden_layers(network, actor_options) for network in (self.actor, targets[0])))
        for pair in zip(self.critic.q_networks, targets[1:], strict=True):
            yield (self.critic.optimizer, *(hidden_layers(network, critic_options) for network in pair))

    def _get_constructor_parameters(self) -> dict:
        return super()._get_constructor_parameters() | {"sparsity": self.sparsity}


class SparseTD3Policy(SparsePolicy, TD3Policy):
    """TD3's policy, sparse."""


class SparseSACPolicy(SparsePolicy, SACPolicy):
    """SAC's policy, sparse."""


class DynamicSparseTraining(BaseCallback):
    """Adapts the topology of a sparse policy and prunes its targets: pieces 2 to 4, after each training of SB3's."""

    def __init__(self, adapt_interval: int = 1000, drop_fraction: float = 0.05, adapt_until: float = 0.95):
        super().__init__()
        self.args = Arguments(adapt_interval=adapt_interval, drop_fraction=drop_fraction, adapt_until=adapt_until)

    def _on_training_start(self) -> None:
        self.args = dataclasses.replace(self.args, total_timesteps=self.locals["total_timesteps"])
        self.supports, self.last_step = {}, self.num_timesteps

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _on_rollout_start(self) -> None:  # the first moment after a training
        due = adaptation_due(self.num_timesteps, self.num_timesteps - self.last_step, self.args)
        due, self.last_step = due and self.num_timesteps > self.model.learning_starts, self.num_timesteps
        for optimizer, layers, targets in self.model.policy.networks():
            for layer, target in zip(layers, targets, strict=True):
                if due:
                    self.adapt(layer, optimizer.state[layer.weight])
                if due or layer not in self.supports:
                    self.supports[layer] = target_support(target.weight, layer.mask), int(layer.mask.sum())
                prune_target(target.weight, *self.supports[layer])

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def adapt(self, layer: nn.Linear, adam: dict) -> None:
        """Drop and grow a layer's connections; grown ones start at zero with zero moments."""
        kept, grown = drop_and_grow(layer.weight, layer.mask, self.args.drop_fraction, self.model.policy.rng)
        layer.mask.copy_(kept + grown)
        moments = (tensor for tensor in adam.values() if tensor.shape == kept.shape)
        for tensor in (layer.weight, *moments):
            tensor.mul_(kept)


# --- A run ------------------------------------------------------------------------------------------------------------
def train(
    algorithm: Literal["td3", "sac"] = "td3",
    env: str = "Hopper-v4",
    sparsity: float = 0.5,
    total_timesteps: int = 100_000,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Train an agent of Stable-Baselines3 with sparse networks of 256 x 256 and print its return over ten episodes.

    Args:
        algorithm: the agent of Stable-Baselines3
        env: Gymnasium environment with a vector of observations and a bounded vector of actions
        sparsity: fraction of connections that the hidden layers go without; at 0 the agent is SB3's dense one
        total_timesteps: environment steps of the run, more than the 10,000 of random actions at its start
        seed: seed of the run; the evaluation uses seed + 100
        output: write the model to this file, as SB3's save does
    """
    args = Arguments(env=env, sparsity=sparsity, total_timesteps=total_timesteps, learning_starts=10_000, seed=seed)
    args.validate()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # moments that decay towards zero would slow a CPU many times over
    environment, evaluation = (make_vec_env(lambda: make_environment(env), seed=s) for s in (seed, seed + 100))
    policy_kwargs = {"sparsity": sparsity, "net_arch": list(args.hidden)}
    options = {"learning_starts": args.learning_starts, "batch_size": args.batch_size, "seed": seed}
    if algorithm == "td3":
        actions = np.ones(environment.action_space.shape)
        options["action_noise"] = NormalActionNoise(0 * actions, args.exploration_noise * actions)
        model = TD3(SparseTD3Policy, environment, policy_kwargs=policy_kwargs, **options)
    else:
        model = SAC(SparseSACPolicy, environment, policy_kwargs=policy_kwargs, **options)
    model.learn(total_timesteps, callback=DynamicSparseTraining())
    mean, deviation = evaluate_policy(model, evaluation, n_eval_episodes=args.eval_episodes)
    setting = f"{env} {algorithm} sparsity {sparsity:g} seed {seed} step {total_timesteps:,}"
    print(f"{setting}: return {mean:.1f} +- {deviation:.1f}")
    if output:
        with replaced(output) as file:
            model.save(file)


def main() -> int:
    """Run the command line and return its exit code."""
    return command_line(lambda name: tyro.cli(train, prog=name))


if __name__ == "__main__":
    sys.exit(main())
