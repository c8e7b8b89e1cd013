"""The masked engine on a GPU: the numbers of the CPU."""

import dataclasses

import numpy as np
import pytest
from conftest import needs_gpu
from test_sac import sac_case
from test_sparse_engine import DEFAULTS, case

from dst_sac import MaskedSAC
from dst_td3 import MaskedTD3

RECIPE = {"step_exponent": 0.5, "updates_per_step": 2, "recycle_dormant": True, "drop_by": "contribution"}


@needs_gpu
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
        on_device = dataclasses.replace(this, args=dataclasses.replace(this.args, device=device))
        agent, rng = on_device.agent(engine)
        on_device.train(agent, rng, range(1, 61))
        states.append(agent.state())
        draws.append(rng.bit_generator.state)
        assert {str(layer.weight.device) for layer in agent.actor.layers} == {device.replace("cuda", "cuda:0")}
    assert draws[0] == draws[1] and set(states[0]) == set(states[1])
    for name, array in states[0].items():
        np.testing.assert_allclose(states[1][name], array, rtol=1e-8, atol=1e-11, err_msg=name)
