"""The masked engine on a GPU: the numbers of the CPU, and runs that resume to the same bytes."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SHORT, assert_same_bytes, killed_after, run_directory
from test_sac import sac_case
from test_sparse_engine import DEFAULTS, case

from dst_sac import MaskedSAC
from dst_td3 import MaskedTD3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to use here")

RECIPE = {"step_exponent": 0.5, "updates_per_step": 2, "recycle_dormant": True, "drop_by": "contribution"}


@pytest.mark.parametrize(
    ("this", "engine"),
    [
        (case(), MaskedTD3),
        (case(sparsity=0.0, args=dataclasses.replace(DEFAULTS, method="td3")), MaskedTD3),
        (case(args=dataclasses.replace(DEFAULTS, **RECIPE)), MaskedTD3),
        (case(args=dataclasses.replace(DEFAULTS, dense_moments=True)), MaskedTD3),
        (sac_case(arguments={"learn_temperature": True}), MaskedSAC),
    ],
    ids=["ds-td3", "td3", "recipe", "dense moments", "ds-sac"],
)
def test_a_gpu_trains_as_the_cpu_does(this, engine):
    states, draws = [], []
    for device in ("cpu", "cuda"):
        this.args = dataclasses.replace(this.args, device=device)
        agent, rng = this.agent(engine)
        this.train(agent, rng, range(1, 61))
        states.append(agent.state())
        draws.append(rng.bit_generator.state)
        assert {str(layer.weight.device) for layer in agent.actor.layers} == {device.replace("cuda", "cuda:0")}
    assert draws[0] == draws[1] and set(states[0]) == set(states[1])
    for name, array in states[0].items():
        np.testing.assert_allclose(states[1][name], array, rtol=1e-8, atol=1e-11, err_msg=name)


def test_a_run_on_a_gpu_resumes_to_the_same_bytes(command_line, tmp_path):
    arguments = [*SHORT, "--device", "cuda"]
    assert command_line(*arguments, "--results-dir", tmp_path / "unbroken")[0] == 0
    with killed_after(700):
        command_line(*arguments, "--results-dir", tmp_path / "stopped")
    assert command_line(*arguments, "--results-dir", tmp_path / "stopped")[0] == 0
    assert_same_bytes(run_directory(tmp_path / "stopped"), run_directory(tmp_path / "unbroken"))
