"""Looks into TD3 agents: are values right, actions saturated, units silent? Prints a CSV row for each.

usage: python benchmarks/health.py FILE ..., each the policy.npz of a finished run of dst_td3.py, or a copy of the
checkpoint.npz that a run has in its folder until it ends, which has the critics too. An agent plays episodes
without noise from the start states of its evaluations.

- saturated: share of the actions' components within 1% of half the range from a bound
- pre-activation: median magnitude of what the actor's tanh is given
- observation: median Euclidean norm
- silent: share of units that no state played activates, in each hidden layer
- value: what the smaller critic says, and discounted return, both means over all states played but the last 500 of an
  episode that the time limit ended
"""

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dst_td3 import (
    Arguments,
    Layer,
    forward,
    initial_layers,
    make_environment,
    network_sizes,
    policy,
    read_arrays,
    read_policy,
)

HORIZON = 500  # steps of rewards that tell a discounted return: 0.99 ** 500 is below 0.01


class Agent(NamedTuple):
    """What an agent is played with: its run's arguments, the step, the actor, its bounds, the critics if there."""

    args: Arguments
    step: int
    actor: list[Layer]
    low: Tensor
    high: Tensor
    critics: list[Layer] | None = None


class Played(NamedTuple):
    """Episodes: observations of each step, discounted returns from it on, returns, lengths.

    A discounted return is NaN where a time limit comes too soon to tell it.
    """

    observations: Tensor
    discounted: np.ndarray
    returns: list[float]
    lengths: list[int]


def read_arguments(stored: dict) -> Arguments:
    """Return the arguments of a run, of those that it stored; the paper's runs have no others."""
    names = {field.name for field in dataclasses.fields(Arguments)}
    return Arguments(**{name: value for name, value in stored.items() if name in names})


def read_agent(path: Path) -> Agent:
    """Return the agent of a policy.npz or of a checkpoint."""
    arrays = read_arrays(path)
    if "state" not in arrays:
        actor, low, high = read_policy(path)
        args = read_arguments(json.loads((path.parent / "config.json").read_text())["arguments"])
        return Agent(args, args.total_timesteps, actor, low, high)
    state = json.loads(str(arrays["state"]))
    args, rng = read_arguments(state["arguments"]), np.random.default_rng(0)
    env = make_environment(args.env, args.env_kwargs)
    actor, critic = network_sizes(env, args)
    bounds = tuple(bound.astype(np.float32) for bound in (env.low, env.high))
    agent = args.make_agent(initial_layers(*actor, rng), initial_layers(*critic, rng, networks=(2,)), bounds)
    agent.load_state_dict(arrays)
    actor, critics = (
        [Layer(*map(torch.from_numpy, layer)) for layer in network.layer_arrays()]
        for network in agent.networks.values()
    )
    return Agent(args, state["step"], actor, *map(torch.from_numpy, bounds), critics)


def discounted_returns(rewards: list[float], ended: bool, gamma: float) -> np.ndarray:
    """Return the discounted sum of the rewards from each step on, NaN where they were cut off too soon."""
    returns, coming = np.zeros(len(rewards)), 0.0
    for step in reversed(range(len(rewards))):
        returns[step] = coming = rewards[step] + gamma * coming
    if not ended:
        returns[-HORIZON:] = np.nan
    return returns


def play(agent: Agent, episodes: int) -> Played:
    """Play episodes without noise from the start states of the run's evaluations."""
    env = make_environment(agent.args.env, agent.args.env_kwargs)
    observations, discounted, returns, lengths = [], [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=agent.args.seed + 100 if episode == 0 else None)
        rewards, terminated, truncated = [], False, False
        while not (terminated or truncated):
            observations.append(torch.from_numpy(observation))
            action = policy(agent.actor, observations[-1][None], agent.low, agent.high)[0]
            observation, reward, terminated, truncated, _ = env.step(action.numpy())
            rewards.append(reward)
        discounted.append(discounted_returns(rewards, terminated, agent.args.gamma))
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    return Played(torch.stack(observations), np.concatenate(discounted), returns, lengths)


def silent_units(layers: list[Layer], x: Tensor) -> str:
    """Return the share of units in each hidden layer that no row of ``x`` [batch, inputs] activates."""
    shares = []
    for layer in layers[:-1]:
        x = torch.relu(forward([layer], x))
        shares.append((x.amax(dim=-2) == 0).float().mean().item())
    return " ".join(f"{share:.2f}" for share in shares)


def examine(path: Path, episodes: int) -> dict[str, object]:
    """Return the row of one agent."""
    agent = read_agent(path)
    played, args = play(agent, episodes), agent.args
    before_tanh = forward(agent.actor, played.observations)
    row = {
        "environment": args.env,
        "method": args.method,
        "seed": args.seed,
        "step": agent.step,
        "return": f"{np.mean(played.returns):.0f}",
        "length": f"{np.mean(played.lengths):.0f}",
        "saturated": f"{(before_tanh.tanh().abs() > 0.99).float().mean():.2f}",
        "pre-activation": f"{before_tanh.abs().median():.1f}",
        "observation": f"{played.observations.norm(dim=-1).median():.0f}",
        "silent, actor": silent_units(agent.actor, played.observations),
        "silent, critics": "",
        "value": "",
        "discounted return": "",
    }
    if agent.critics:
        actions = policy(agent.actor, played.observations, agent.low, agent.high)
        inputs, known = torch.cat([played.observations, actions], dim=-1), ~np.isnan(played.discounted)
        values = forward(agent.critics, inputs).amin(dim=0)[:, 0].numpy()
        row["silent, critics"] = silent_units(agent.critics, inputs)
        row["value"], row["discounted return"] = f"{values[known].mean():.1f}", f"{played.discounted[known].mean():.1f}"
    return row


def main() -> None:
    """Examine the agents one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--episodes", type=int, default=5)
    given, writer = parser.parse_args(), None
    torch.set_num_threads(1)
    for path in given.files:
        row = examine(path, given.episodes)
        if writer is None:
            writer = csv.DictWriter(sys.stdout, row, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
