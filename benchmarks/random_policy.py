"""Measures the uniform random policy on the five tasks, the zero of the normalised scores of results/rules.md.

usage: python benchmarks/random_policy.py, from the root, writes results/random_policy.csv. An episode starts and ends
as in training and evaluation: the task's own time limit of 1,000 steps, or a fall.
"""

import argparse
import csv
from pathlib import Path

import gymnasium
import numpy as np

TASKS = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Ant-v4", "Humanoid-v4")
COLUMNS = ("environment", "episodes", "return_mean", "return_std", "length_mean")


def play(task: str, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the returns and the lengths, both of shape (episodes,), of uniform random actions within the bounds."""
    env = gymnasium.make(task)
    env.action_space.seed(seed)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    for episode in range(episodes):
        env.reset(seed=seed if episode == 0 else None)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += reward
            lengths[episode] += 1
            done = terminated or truncated
    env.close()
    return returns, lengths


def main() -> None:
    """Measure the tasks one after the other and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the task and of the actions")
    parser.add_argument("--output", type=Path, default=Path("results/random_policy.csv"))
    args = parser.parse_args()
    with open(args.output, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for task in TASKS:
            returns, lengths = play(task, args.episodes, args.seed)
            row = (f"{returns.mean():.2f}", f"{returns.std(ddof=1):.2f}", f"{lengths.mean():.2f}")
            writer.writerow((task, args.episodes, *row))
            print(task, *row)


if __name__ == "__main__":
    main()
