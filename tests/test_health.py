"""``benchmarks/health.py``: what it says of values, actions and units."""

from pathlib import Path

import numpy as np
import pytest
import torch
from running import SHORT, imported, run_directory

import dst_td3

ROOT = Path(dst_td3.__file__).parent
health = imported("benchmarks/health.py")


def test_discounted_returns_are_known_unless_a_time_limit_comes_too_soon():
    np.testing.assert_allclose(health.discounted_returns([1, 2, 4], ended=True, gamma=0.5), [3, 4, 4])
    cut = health.discounted_returns([1.0] * (health.HORIZON + 2), ended=False, gamma=0.99)
    assert np.isfinite(cut[:2]).all() and np.isnan(cut[2:]).all() and cut[0] == pytest.approx(100, rel=0.01)


def test_a_unit_is_silent_if_no_state_activates_it():
    weight = torch.tensor([[1.0, -1.0, -1.0, 0.0]])
    layer = dst_td3.Layer(weight, torch.ones_like(weight), torch.tensor([[0.0, 0.0, 3.0, -1.0]]))
    last = dst_td3.Layer(torch.ones(4, 1), torch.ones(4, 1), torch.zeros(1, 1))
    assert health.silent_units([layer, last], torch.tensor([[1.0], [2.0]])) == "0.50"


def test_a_dense_humanoid_acts_at_the_bounds_and_a_sparse_one_less():
    policies = (ROOT / "results" / "Humanoid-v4" / method / "seed0" / "policy.npz" for method in ("td3", "ds-td3"))
    dense, sparse = (health.examine(path, episodes=1) for path in policies)
    assert float(dense["saturated"]) > 0.9 > 0.5 > float(sparse["saturated"])
    assert dense["value"] == "" and int(sparse["length"]) > int(dense["length"])


def test_a_checkpoint_tells_of_values_too(command_line, tmp_path):
    given = [*SHORT, "--method", "td3", "--total-timesteps", 2000, "--checkpoint-interval", 1]
    kept, save = [], dst_td3.Run.save

    def keep(run):
        save(run)
        kept[:] = [run.checkpoint.read_bytes()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dst_td3.Run, "save", keep)
        assert command_line(*given, "--results-dir", tmp_path)[0] == 0
    (tmp_path / "copy.npz").write_bytes(kept[0])
    row = health.examine(tmp_path / "copy.npz", episodes=1)
    final = health.examine(run_directory(tmp_path) / "policy.npz", episodes=1)
    assert row["step"] <= final["step"] == 2000 and len(row["silent, critics"].split()) == 2
    assert np.isfinite([float(row["value"]), float(row["discounted return"])]).all()
