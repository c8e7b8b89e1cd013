"""``--dense-moments`` against 60 updates of the authors' own code, recorded in float64 in authors-update.npz.

The file holds, for networks of state 5, action 2 and two hidden layers of 24: the transitions (``pool/...``), each
update's batch and noise, all parameters after every tenth update (``T/NET/LAYER...``, critic 1 being l1 to l3 and
critic 2 l4 to l6; weights are [outputs, inputs]), and every adaptation (``adapt/N/...``). Two of their rules differ
from ours by a connection or two, and are taken from the recording: which quantile bounds the dropped weights, and that
a target is pruned to the number of its network's non-zero weights, counted for each critic apart.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import dst_td3
from dst_td3 import Batch, Layer

UPDATES = 60
ARGUMENTS = dst_td3.Arguments(hidden=(24, 24), batch_size=16, dense_moments=True, engine="masked", device="cpu")
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


def prune_as_theirs(network: dst_td3.MaskedNetwork) -> None:
    """Prune each target layer to as many weights as its network has that are not zero."""
    for layer, target in zip(network.layers[:-1], network.target[:-1], strict=True):
        shape = layer.weight.shape[-2:]
        for weight, follower in zip(layer.weight.reshape(-1, *shape), target.weight.view(-1, *shape), strict=True):
            everywhere = torch.arange(weight.numel())
            dst_td3.prune_target(follower, everywhere, int(torch.count_nonzero(weight)))


def test_sixty_updates_agree_with_the_authors_code(recording, monkeypatch):
    bounds = (-np.ones(2), np.ones(2))
    agent = dst_td3.MaskedTD3(first_layers(recording, "actor"), first_layers(recording, "critic"), bounds, ARGUMENTS)
    choose, due, adapted = dst_td3.drop_and_grow, [], 0

    def recorded(weight, mask, drop_fraction, rng):
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
    worst = 0.0
    for update in range(1, UPDATES + 1):
        rows = recording["batch_indices"][update - 1]
        s, a, r, s2, not_done = (recording[f"pool/{name}"][rows] for name in ("s", "a", "r", "s2", "nd"))
        batch = Batch(s, a, r.reshape(-1, 1), s2, 1 - not_done.reshape(-1, 1))
        due[:] = adaptations(recording, update)
        adapts = bool(due)
        agent.update_critics(batch, recording["noise"][update - 1])
        if adapts:
            agent.critics.adapt(np.random.default_rng(0))
        if update % ARGUMENTS.policy_frequency == 0:
            agent.update_actor(batch)
            if adapts:
                agent.actor.adapt(np.random.default_rng(0))
            for network in (agent.actor, agent.critics):
                network.supports = [torch.empty(0, dtype=torch.int64)] * 3  # pruned below instead
                network.update_target()
                prune_as_theirs(network)
        assert not due
        adapted += adapts
        if update % 10 == 0:
            for name, network in (("actor", agent.actor), ("critic", agent.critics)):
                for kind, layers in ((name, network.layers), (f"{name}_target", network.target)):
                    for part in ("weight", "bias"):
                        for layer, theirs in zip(layers, stacked(recording, kind, update, part), strict=True):
                            ours = getattr(layer, part).detach().numpy()
                            worst = max(worst, np.abs(ours - theirs).max())
                            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert adapted == 3 and worst < 1e-12
