"""The masked engine on a GPU: the numbers of the CPU."""

import dataclasses

import numpy as np
import pytest
from engines import DEFAULTS, case, sac_case
from running import needs_gpu

from dense_moments import DenseMomentsArguments
from high_sparsity import HighSparsityArguments

SHARED = {"adapt_interval": DEFAULTS.adapt_interval, "drop_fraction": DEFAULTS.drop_fraction, "tau": DEFAULTS.tau}


@needs_gpu
@pytest.mark.parametrize(
    "this",
    [
        case(),
        case(sparsity=0.0, args=dataclasses.replace(DEFAULTS, method="td3")),
        case(args=HighSparsityArguments(**SHARED)),
        case(args=DenseMomentsArguments(**SHARED)),
        sac_case(arguments={"learn_temperature": True}),
    ],
    ids=["ds-td3", "td3", "recipe", "dense moments", "ds-sac"],
)
def test_a_gpu_trains_as_the_cpu_does(this):
    states, draws = [], []
    for device in ("cpu", "cuda"):
        on_device = dataclasses.replace(this, args=dataclasses.replace(this.args, device=device))
        agent, rng = on_device.agent("masked")
        on_device.train(agent, rng, range(1, 61))
        states.append(agent.state_dict())
        draws.append(rng.bit_generator.state)
        assert {str(layer.weight.device) for layer in agent.engine.actor.layers} == {device.replace("cuda", "cuda:0")}
    assert draws[0] == draws[1] and set(states[0]) == set(states[1])
    for name, array in states[0].items():
        np.testing.assert_allclose(states[1][name], array, rtol=1e-8, atol=1e-11, err_msg=name)
