"""The sparse engine against the masked one: the same topologies always, the same numbers within rounding."""

import dataclasses
import itertools
import math
import os
import pickle
import platform
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from engines import ACTIONS, DEFAULTS, OBSERVATIONS, Case, Pair, bytes_of, case, cases, loaded, sac_case, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dst_td3
import sparse_engine.networks
from sparse_engine.kernels import prune_target


def test_engines_agree_over_hundreds_of_updates():
    pair = Pair(case(args=dataclasses.replace(DEFAULTS, adapt_interval=30), batch_size=37))
    pair.train_over_ten_adaptations()
    assert len(pair.sparse.state_dict()["critic.extra_weight"]) > 0


def test_engines_agree_on_a_dense_agent():
    """Its hidden layers are matrices that BLAS multiplies, its output layers are not."""
    dense = dataclasses.replace(DEFAULTS, method="td3")
    pair = Pair(case(hidden=(40, 24), sparsity=0.0, args=dense, batch_size=37))
    assert pair.sparse.engine.critics.arrays.dense.tolist() == [True, True, False]
    pair.train(range(1, 61))
    pair.assert_agree(rtol=1e-8, atol=1e-11)


def test_engines_agree_where_only_some_layers_are_full():
    """What a full layer leaves in the padding of its rows must not reach the others."""
    this = Case([5, 40, 50, 40, 3], [8, 40, 50, 40, 1], [200, 900, 2000, 120], [320, 700, 2000, 40], batch_size=37)
    pair = Pair(this)
    assert pair.sparse.engine.critics.arrays.dense.tolist() == [True, False, True, False]
    pair.train(range(1, 31))
    pair.assert_agree(rtol=1e-8, atol=1e-11)


def python(program, *arguments, **options):
    """Run a program in a process of its own that imports the modules under test."""
    command, root = [sys.executable, "-c", program, *arguments], Path(dst_td3.__file__).parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, **options)


def test_blas_keeps_to_one_thread():
    """In a process of its own, since a library that is loaded later than the limit is set would not be held to it."""
    program = """
import dst_td3, numpy, threadpoolctl
run = dst_td3.Run(dst_td3.Arguments(env="Hopper-v4", method="td3", engine="sparse", hidden=(64, 64)))
run.buffer.added = 100
run.agent.learn(run.buffer, 2, run.rng)
libraries = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
print(len(libraries), {pool["num_threads"] for pool in libraries})
"""
    done = python(program)
    assert done.returncode == 0 and done.stdout.split()[1:] == ["{1}"], done.stdout + done.stderr


# A processor, what it can do, and the bytes of its vectors.
FEATURES = {
    "AVX2": (
        "haswell",
        "+avx2,+avx,+fma,+bmi,+bmi2,+popcnt,+lzcnt,+f16c,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2,+sse,+cx16",
        32,
    ),
    "no AVX": ("x86-64", "+sse2,+sse,+cx16,+fxsr,+mmx", 16),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the features are those of x86-64")
@pytest.mark.parametrize("features", FEATURES)
def test_engines_agree_on_processors_with_less(features):
    """The kernels compiled for shorter vectors than this machine may have, and kept beside this machine's own."""
    name, flags, vector_bytes = FEATURES[features]
    compiled_for = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": flags}
    program = """
import sys, pytest, sparse_engine.kernels
print("vectors of", sparse_engine.kernels.VECTOR_BYTES, flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
    chosen = "hundreds_of_updates or some_layers_are_full"
    files = __file__, Path(__file__).with_name("test_high_sparsity.py")
    done = python(program, *map(str, files), "-k", chosen, env=os.environ | compiled_for)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]
    assert done.stdout.startswith(f"vectors of {vector_bytes}\n")


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(cases())
def test_engines_agree_whatever_the_networks(this):
    Pair(this).train_step_by_step()


@pytest.mark.parametrize("batch_size", [1, 7, 100, 250])
def test_engines_agree_in_float32(batch_size):
    args = dataclasses.replace(DEFAULTS, adapt_interval=12)
    pair = Pair(case(dtype=np.float32, batch_size=batch_size, args=args))
    pair.train(range(1, 15))
    pair.assert_same_topologies()
    pair.assert_matrices_agree(rtol=1e-3, atol=2e-5)


def test_what_an_update_takes_is_converted_or_refused():
    """Compiled code asks no more: what is of another type, or not contiguous, would be read as if it were."""
    this = case()
    noise = np.random.default_rng(0).standard_normal((8, ACTIONS)).astype(np.float32).astype(np.float64)
    indices = np.arange(8)
    losses = []
    for rows, picked, drawn in (
        (this.buffer.rows, indices, noise),
        (np.asfortranarray(this.buffer.rows), indices.astype(np.int32), noise.astype(np.float32)),
        (np.repeat(this.buffer.rows, 2, axis=1)[:, ::2], np.repeat(indices, 2)[::2], np.asfortranarray(noise)),
    ):
        agent, _ = this.agent("sparse")
        buffer = types.SimpleNamespace(rows=rows)
        losses.append(
            {**agent.engine.update_critics(buffer, picked, drawn), **agent.engine.update_actor(buffer, picked)}
        )
    assert losses[0] == losses[1] == losses[2]
    for wrong in (noise.ravel(), noise[None]):
        with pytest.raises(ValueError, match="is not a matrix"):
            agent.engine.update_critics(this.buffer, indices, wrong)
    for wrong in (indices.reshape(4, 2), indices > 3, indices + 0.5, np.int64(3)):
        with pytest.raises(ValueError, match="not whole numbers"):
            agent.engine.update_critics(this.buffer, wrong, noise)


def test_an_agent_can_be_pickled():
    this = case()
    agent, rng = this.agent("sparse")
    this.train(agent, rng, range(1, 4))
    other = pickle.loads(pickle.dumps(agent))
    other_rng = np.random.default_rng()
    other_rng.bit_generator.state = rng.bit_generator.state
    for each, generator in ((agent, rng), (other, other_rng)):
        this.train(each, generator, range(4, 20))
    assert bytes_of(agent) == bytes_of(other)


def test_the_batch_size_may_change():
    small, large = case(batch_size=7), case(batch_size=130)
    pair = Pair(small)
    for this, steps in ((small, range(1, 4)), (large, range(4, 7)), (small, range(7, 10))):
        for agent in (pair.masked, pair.sparse):
            agent.args = dataclasses.replace(agent.args, batch_size=this.batch_size)
        pair.this = this
        pair.train(steps)
    pair.assert_agree(rtol=1e-8, atol=1e-11)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 6))
def test_engines_act_alike(hidden, observations, actions):
    this = case(hidden, 0.0, observations, actions, dtype=np.float32)
    masked, sparse = this.agent("masked")[0], this.agent("sparse")[0]
    observation = np.random.default_rng(0).standard_normal(observations)
    action = sparse.act(observation)
    assert action.dtype == np.float32 and action.shape == (actions,)
    np.testing.assert_allclose(action, masked.act(observation), atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (1,), (OBSERVATIONS - 1,), (100,), (OBSERVATIONS, 1)])
@pytest.mark.parametrize("kind", [case, sac_case])
def test_it_reads_no_further_than_an_observation(kind, shape):
    agent, _ = kind(dtype=np.float32).agent("sparse")
    with pytest.raises(ValueError, match=rf"an observation has shape .*, not \({OBSERVATIONS},\)"):
        agent.act(np.zeros(shape, np.float32))


@settings(max_examples=100)
@given(st.data())
def test_prune_target_keeps_the_largest(data):
    magnitudes = st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0, 2.0]) | st.floats(0, 4, width=32)
    weights = st.lists(st.builds(math.copysign, magnitudes, st.sampled_from([-1.0, 1.0])), min_size=1, max_size=30)
    own, extras = (np.array(data.draw(weights), dtype=np.float32) for _ in range(2))
    extras = extras[: len(own)]
    before = np.concatenate([own, extras])
    prune_target(own.view(np.int32), extras.view(np.int32), data.draw(st.integers(0, 2**31 - 2)))
    after = np.concatenate([own, extras])
    np.testing.assert_array_equal(after[after != 0], before[after != 0])
    np.testing.assert_array_equal(np.sort(np.abs(after))[-len(own) :], np.sort(np.abs(before))[-len(own) :])
    assert np.count_nonzero(after) <= len(own)


def test_a_loaded_agent_goes_on_to_the_same_bytes():
    this = case(dtype=np.float32)
    (first, rng), (second, other_rng) = loaded(this, "sparse", range(1, 28))
    assert len(first.state_dict()["critic.extra_weight"]) > 0
    this.train(first, rng, range(28, 60))
    this.train(second, other_rng, range(28, 60))
    assert bytes_of(first) == bytes_of(second)


def test_a_state_fits_another_layout_in_memory(monkeypatch):
    """A machine with other caches cuts layers into other bands of inputs."""
    this = case(hidden=(300, 129), sparsity=0.3)
    first, rng = this.agent("sparse")
    this.train(first, rng, range(1, 12))
    monkeypatch.setattr(sparse_engine.networks, "BAND_INPUTS", 10)
    second, _ = this.agent("sparse")
    assert list(second.engine.critics.arrays.bands) != list(first.engine.critics.arrays.bands)
    second.load_state_dict(saved(first))
    assert bytes_of(second) == bytes_of(first)
    other_rng = np.random.default_rng()
    other_rng.bit_generator.state = rng.bit_generator.state
    this.train(first, rng, range(12, 20))
    this.train(second, other_rng, range(12, 20))
    for ours, theirs in zip(first.networks.values(), second.networks.values(), strict=True):
        for (weight, mask, _), expected in zip(ours.layer_arrays(), theirs.layer_arrays(), strict=True):
            np.testing.assert_array_equal(mask, expected[1])
            np.testing.assert_allclose(weight, expected[0], rtol=1e-8, atol=1e-11)


FOREIGN = {
    "other widths": lambda: case(hidden=(20, 24)),
    "another depth": lambda: case(hidden=(24, 20, 5)),
    "another sparsity": lambda: case(sparsity=0.5),
    "another type": lambda: case(dtype=np.float32),
}


@pytest.mark.parametrize("other", FOREIGN)
def test_another_networks_state_is_rejected(other):
    state = FOREIGN[other]().agent("sparse")[0].engine.actor.state_dict()
    with pytest.raises((KeyError, ValueError)):
        case().agent("sparse")[0].engine.actor.load_state_dict(state)


def test_a_masked_networks_state_is_rejected():
    with pytest.raises(KeyError):
        case().agent("sparse")[0].engine.actor.load_state_dict(case().agent("masked")[0].engine.actor.state_dict())


@pytest.mark.parametrize("name", ["topology", "extra_topology", "extra_ends", "sizes"])
def test_a_damaged_topology_is_rejected(name):
    this = case()
    agent, rng = this.agent("sparse")
    this.train(agent, rng, range(1, 10))
    state = {key: array.copy() for key, array in agent.engine.critics.state_dict().items()}
    state[name][len(state[name]) // 2] = 60_000
    with pytest.raises(ValueError):
        agent.engine.critics.load_state_dict(state)


def arrays_in(value):
    """Yield all numpy arrays that an object holds, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(arrays_in, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(arrays_in, value))
    elif hasattr(value, "__dict__"):
        yield from arrays_in(vars(value))


def test_nothing_is_as_large_as_a_dense_matrix():
    this = case(hidden=(600, 600), sparsity=0.99, batch_size=4, dtype=np.float32)
    agent, rng = this.agent("sparse")
    this.train(agent, rng, range(1, 8))
    tracemalloc.start()
    this.train(agent, rng, range(8, 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    dense = 600 * 600
    assert all(array.size < dense / 5 for array in arrays_in(agent))
    assert peak < dense * 4 / 2


def test_a_diverged_network_shows():
    this = case(dtype=np.float32)
    agent, rng = this.agent("sparse")
    state = agent.state_dict()
    state["actor.parameters"][0] = np.nan
    agent.load_state_dict(state)
    assert np.isnan(agent.act(this.buffer.batch(this.buffer.draw(1, rng)).observation[0])).any()
    assert math.isnan(agent.engine.update_actor(this.buffer, this.buffer.draw(8, rng))["actor_loss"])


def test_both_engines_tell_the_same_moments():
    this = case()
    agents = {engine: this.agent(engine) for engine in ("masked", "sparse")}
    for agent, rng in agents.values():
        this.train(agent, rng, range(1, 15))
    masked, sparse = (agent.networks for agent, _ in agents.values())
    for name, network in masked.items():
        layers = network.layer_arrays()
        for ours, theirs, (weight, mask, _) in zip(
            network.moment_arrays(), sparse[name].moment_arrays(), layers, strict=True
        ):
            for moment, expected in zip(ours, theirs, strict=True):
                assert moment.shape == weight.shape and moment.any() and not moment[mask == 0].any()
                np.testing.assert_allclose(moment, expected, rtol=1e-6, atol=1e-15)
