"""``dense_moments.py`` against 60 updates of the authors' own code, recorded in float64 in authors-update.npz.

The file holds, for networks of state 5, action 2 and two hidden layers of 24: the transitions (``pool/...``), each
update's batch and noise, all parameters after every tenth update (``T/NET/LAYER...``, critic 1 being l1 to l3 and
critic 2 l4 to l6; weights are [outputs, inputs]), and every adaptation (``adapt/N/...``). Two of their rules differ
from ours by a connection or two, and are taken from the recording: which quantile bounds the dropped weights, and that
a target is pruned to the number of its network's non-zero weights, counted for each critic apart.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import make_agent, moments, train
from running import SHORT, assert_refused, assert_same_bytes, killed_after, run_directory

import dst_td3
from dense_moments import DenseMomentsArguments
from dst_td3 import Layer, ReplayBuffer

UPDATES = 60
ARGUMENTS = DenseMomentsArguments(hidden=(24, 24), batch_size=16)
LAYERS = {"actor": [["l1"], ["l2"], ["l3"]], "critic": [["l1", "l4"], ["l2", "l5"], ["l3", "l6"]]}


@pytest.fixture(scope="module")
def recording() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "authors-update.npz") as stored:
        return dict(stored)


def stacked(recording, network: str, update: int, name: str) -> list[np.ndarray]:
    """Return weights, biases or masks of a network's layers as [..., inputs, outputs], the twin critics stacked."""
    layers = []
    for twins in LAYERS[network.removesuffix("_target")]:
        arrays = [recording[f"{update}/{network}/{layer}.{name}"] for layer in twins]
        arrays = [array.T if array.ndim == 2 else array[None] for array in arrays]
        layers.append(np.ascontiguousarray(np.stack(arrays) if len(arrays) > 1 else arrays[0]))
    return layers


def first_layers(recording, network: str) -> list[Layer]:
    weights, biases = (stacked(recording, network, 0, name) for name in ("weight", "bias"))
    masks = []
    for twins, weight in zip(LAYERS[network], weights, strict=True):
        stored = [recording.get(f"0/{network}/{layer}.mask") for layer in twins]
        mask = np.ones(weight.shape) if stored[0] is None else np.stack([m.T for m in stored]).reshape(weight.shape)
        masks.append(mask.astype(float, order="C"))
    return [Layer(*arrays) for arrays in zip(weights, masks, biases, strict=True)]


def adaptations(recording, update: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return mask before and after of the layers that adapt at an update, in our order: twins together."""
    numbers = sorted({int(key.split("/")[1]) for key in recording if key.startswith("adapt/")})
    now = [n for n in numbers if int(recording[f"adapt/{n}/iteration"]) == update]
    pairs = [tuple(recording[f"adapt/{n}/{name}"].T for name in ("before", "after")) for n in now]
    if not pairs:
        return []
    l1, l2, l4, l5, *actor = pairs
    return [tuple(map(np.stack, zip(*twins, strict=True))) for twins in ((l1, l4), (l2, l5))] + actor


def recorded_buffer(recording) -> ReplayBuffer:
    """Return the transitions, in float64."""
    s, a, r, s2, not_done = (recording[f"pool/{name}"] for name in ("s", "a", "r", "s2", "nd"))
    buffer = ReplayBuffer(len(s), s.shape[1], a.shape[1])
    buffer.rows = np.column_stack([s, a, r, s2, 1 - not_done])
    buffer.added = len(s)
    return buffer


def prune_as_theirs(prune, network: dst_td3.MaskedNetwork) -> None:
    """Prune each target layer to as many weights as its network has that are not zero."""
    for layer, target in zip(network.layers[:-1], network.target[:-1], strict=True):
        shape = layer.weight.shape[-2:]
        for weight, follower in zip(layer.weight.reshape(-1, *shape), target.weight.view(-1, *shape), strict=True):
            everywhere = torch.arange(weight.numel())
            prune(follower, everywhere, int(torch.count_nonzero(weight)))


def test_empty_positions_have_moments_too():
    agent = make_agent(DenseMomentsArguments, sparsity=0.5, adapt_interval=100)
    train(agent, range(1, 5))
    for network in agent.networks.values():
        for layer in network.layers[:-1]:
            absent = layer.mask == 0
            assert not layer.weight[absent].any()
            assert all(moment[absent].any() for moment in moments(network, layer))


def test_sixty_updates_agree_with_the_authors_code(recording, monkeypatch):
    bounds = (-np.ones(2), np.ones(2))
    agent = ARGUMENTS.make_agent(first_layers(recording, "actor"), first_layers(recording, "critic"), bounds)
    engine, buffer = agent.engine, recorded_buffer(recording)
    choose, prune, due, adapted = dst_td3.drop_and_grow, dst_td3.prune_target, [], 0

    def recorded(weight, mask, drop_fraction, rng, growth_scores):
        """Take the recorded mask, where ours drops what theirs drops."""
        before, after = due.pop(0)
        np.testing.assert_array_equal(mask.numpy(), before)
        kept, _ = choose(weight, mask, drop_fraction, rng)
        gone_with_them_only = (before == 1) & (after == 0) & (kept.numpy() == 1)
        # A weight of zero drops with us as one of the smallest, with them on top of the others.
        zeros = ((weight == 0) & (mask == 1)).sum((-2, -1)).numpy()
        assert (gone_with_them_only.sum((-2, -1)) <= 2 + zeros).all()
        after = torch.from_numpy(after.astype(float, order="C"))
        return mask * after, (1 - mask) * after

    monkeypatch.setattr(dst_td3, "drop_and_grow", recorded)
    monkeypatch.setattr(dst_td3, "prune_target", lambda *_: None)  # targets are pruned below instead
    worst = 0.0
    for update in range(1, UPDATES + 1):
        indices = recording["batch_indices"][update - 1]
        due[:] = adaptations(recording, update)
        adapts = bool(due)
        engine.update_critics(buffer, indices, recording["noise"][update - 1])
        if adapts:
            engine.critics.adapt(np.random.default_rng(0))
        if update % ARGUMENTS.policy_frequency == 0:
            engine.update_actor(buffer, indices)
            if adapts:
                engine.actor.adapt(np.random.default_rng(0))
            for network in agent.networks.values():
                network.update_target()
                prune_as_theirs(prune, network)
        assert not due
        adapted += adapts
        if update % 10 == 0:
            for name, network in agent.networks.items():
                for kind, layers in ((name, network.layers), (f"{name}_target", network.target)):
                    for part in ("weight", "bias"):
                        for layer, theirs in zip(layers, stacked(recording, kind, update, part), strict=True):
                            ours = getattr(layer, part).detach().numpy()
                            worst = max(worst, np.abs(ours - theirs).max())
                            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert adapted == 3 and worst < 1e-12


# The command line


@pytest.fixture
def command_line(command_line):
    """Return the function that runs a command line here, with these arguments."""
    return functools.partial(command_line, kind=DenseMomentsArguments)


def test_a_killed_run_resumes_to_the_same_bytes(command_line, tmp_path):
    """Its topology is not that of the moments."""
    given = [*SHORT, "--total-timesteps", 800]
    assert command_line(*given, "--results-dir", tmp_path / "unbroken")[0] == 0
    with killed_after(500):
        command_line(*given, "--results-dir", tmp_path / "stopped")
    assert command_line(*given, "--results-dir", tmp_path / "stopped")[0] == 0
    assert_same_bytes(run_directory(tmp_path / "stopped"), run_directory(tmp_path / "unbroken"))


@pytest.mark.parametrize("given", ["--method td3", "--engine sparse", "--drop-by magnitude", "--recycle-dormant"])
def test_bad_input_gets_one_clear_line_and_exit_code_2(command_line, tmp_path, given):
    assert_refused(command_line, tmp_path, given, given.split()[0])


def test_runs_are_named_by_what_differs_from_the_paper():
    def name(**changes) -> str:
        return dst_td3.run_name(dst_td3.resolve(DenseMomentsArguments(**changes)))

    assert name() == "ds-td3_dense-moments=True"
    assert name(method="static-td3", total_timesteps=300_000) == "static-td3_total-timesteps=300000_dense-moments=True"
    assert name(dense_moments=False) == "ds-td3"
