"""The recipe for high sparsity: what each of its parts does, that both engines do the same, and its command line."""

import functools
import itertools

import numpy as np
import pytest
import torch
from engines import (
    ACTIONS,
    DEFAULTS,
    OBSERVATIONS,
    Case,
    Pair,
    case,
    cases,
    make_agent,
    random_buffer,
    torch_module,
    train,
)
from hypothesis import HealthCheck, given, settings
from running import ADAPTING_RECIPE, FOUR, SHORT, assert_refused, assert_same_bytes, killed_after, run_directory

import dst_td3
import high_sparsity
from high_sparsity import HighSparsityArguments

PAPERS = {"drop_by": "magnitude", "recycle_dormant": False, "updates_per_step": 1, "step_exponent": 0.0}
make_agent = functools.partial(make_agent, HighSparsityArguments)


def arguments(**changes) -> HighSparsityArguments:
    """Return the arguments of the engines' cases with parts of the recipe."""
    return HighSparsityArguments(**vars(DEFAULTS) | PAPERS | changes)


@pytest.fixture
def command_line(command_line):
    """Return the function that runs a command line here, with the recipe's arguments."""
    return functools.partial(command_line, kind=HighSparsityArguments)


# Contribution


def test_a_contribution_is_a_weight_times_the_deviation_of_what_it_weighs():
    agent, x = make_agent(sparsity=0.5), np.random.default_rng(0).standard_normal((8, OBSERVATIONS + ACTIONS))
    critics = agent.engine.critics
    critics.layers[0].bias.detach()[0, 0, 3] = -100  # a unit that nothing opens
    layers = [dst_td3.Layer(*(tensor.detach().double() for tensor in layer)) for layer in critics.layers]
    found = high_sparsity.contributions(layers, torch.from_numpy(x))
    assert len(found) == 2, "the output layer drops nothing"
    assert not found[1][0, 3].any() and layers[1].weight[0, 3].any()
    for critic in range(2):
        inputs = x
        for layer, contribution in zip(layers[:-1], found, strict=True):
            weight, bias = layer.weight[critic].numpy(), layer.bias[critic].numpy()
            np.testing.assert_allclose(contribution[critic], weight * inputs.std(axis=0)[:, None], rtol=0, atol=1e-12)
            inputs = np.maximum(inputs @ weight + bias, 0)


@pytest.mark.parametrize("rule", ["magnitude", "contribution"])
def test_connections_are_dropped_by_the_rule_that_was_asked_for(rule):
    """The first observation hardly changes, and has the largest weights."""
    agent, buffer = make_agent(sparsity=0.6, drop_by=rule, drop_fraction=0.1), random_buffer(np.random.default_rng(0))
    buffer.rows[:, 0] /= 1000
    for network in agent.networks.values():
        layer = network.layers[0]
        layer.weight.detach()[..., 0, :] *= 100
        before = layer.mask.sum((-2, -1))
        was = layer.weight.detach().clone()
        agent.adapt(network, buffer, np.random.default_rng(0))
        dropped = (was != 0) & (layer.weight == 0)
        assert dropped.any() and bool(dropped[..., 0, :].any()) == (rule == "contribution")
        assert torch.equal(layer.mask.sum((-2, -1)), before)


# Longer steps


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_sparse_layers_steps_grow_with_its_sparsity(exponent):
    # Adam's first step is as long as the learning rate, whatever the gradient.
    agent = make_agent(sparsity=0.8, step_exponent=exponent, learning_rate=1e-3, weight_decay=0)
    critics, buffer = agent.engine.critics, random_buffer(np.random.default_rng(0))
    before = critics.layer_arrays()
    agent.engine.update_critics(buffer, np.arange(8), np.zeros((8, ACTIONS), np.float32))
    for layer, was in zip(critics.layer_arrays(), before, strict=True):
        steps, expected = np.abs(layer.weight - was.weight), 1e-3 * was.mask.mean() ** -exponent
        assert steps.max() == pytest.approx(expected, rel=1e-3)
        assert np.abs(layer.bias - was.bias).max() == pytest.approx(1e-3, rel=1e-3)


# Dormant units drawn anew


@pytest.mark.parametrize("recycles", [False, True])
@pytest.mark.parametrize("method", ["td3", "static-td3", "ds-td3"])
def test_only_what_was_asked_for_is_done_to_a_topology(monkeypatch, method, recycles):
    options = {"updates_per_step": 1, "recycle_dormant": recycles, "sparsity": None if method == "td3" else 0.5}
    agent, done = make_agent(method=method, **options), []
    for name, network in agent.networks.items():
        for piece in ("adapt", "redraw_dormant"):
            monkeypatch.setattr(network, piece, lambda *_, name=name, piece=piece: done.append((name, piece)))
    train(agent, range(1, 9))
    pieces = ["adapt"] * (method == "ds-td3") + ["redraw_dormant"] * recycles
    assert done == [(name, piece) for name in ("critic", "actor") for piece in pieces] * 2


def test_engines_draw_the_same_dormant_units_anew():
    """Units 0 to 2 of each hidden layer have died, unit 3 still has a positive bias, and unit 4 one weight."""

    class Dormant(Case):
        def layers(self):
            networks, rng = super().layers()
            for layer in itertools.chain(*(layers[:-1] for layers in networks)):
                layer.bias[..., :3], layer.bias[..., 3] = -1e-20, 1e-20
                layer.weight[..., :5] *= 1e-9
                first = layer.mask[..., 4].argmax(-1)
                np.put_along_axis(layer.weight[..., 4], first[..., None], 0.1, -1)
            return networks, rng

    args = arguments(method="static-td3", recycle_dormant=True, adapt_interval=2)
    pair = Pair(Dormant(**vars(case(args=args))))
    before = [network.layer_arrays() for network, _ in pair.networks]
    for (sparse, masked), layers in zip(pair.networks, before, strict=True):
        sparse.arrays.first_moment[:] = sparse.arrays.second_moment[:] = 1
        for layer in masked.layers:
            for name in ("exp_avg", "exp_avg_sq"):
                masked.optimizer.state[layer.weight][name].copy_(layer.mask)
                masked.optimizer.state[layer.bias][name].fill_(1)
        for network in (sparse, masked):
            network.redraw_dormant(np.random.default_rng(3), dst_td3.initial_values, high_sparsity.DORMANT)
        for index, (old, new) in enumerate(zip(layers, sparse.layer_arrays(), strict=True)):
            (old_weight, old_mask, old_bias), (weight, mask, bias) = old, new
            drawn = weight != old_weight
            assert drawn[..., :3].sum() == old_mask[..., :3].sum() * (index < 2) and not drawn[..., 3:].any()
            assert (bias != old_bias).sum() == (3 * bias[..., 0].size if index < 2 else 0)
            bound = 1 / np.sqrt(weight.shape[-2])
            assert bound / 2 < np.abs(weight[drawn]).max(initial=bound) <= bound
            np.testing.assert_array_equal(mask, old_mask)
    pair.assert_matrices_agree(rtol=0, atol=0)
    pair.train(range(1, 8))
    pair.assert_agree(rtol=1e-8, atol=1e-11)
    pair.assert_same_draws()


# Layer normalization


@pytest.mark.parametrize("normalized", [False, True])
def test_critics_alone_are_normalized_before_their_relu(normalized):
    agent, rng = make_agent(sparsity=0.5, layer_norm=normalized), np.random.default_rng(0)
    observation, action = (torch.from_numpy(rng.standard_normal((8, n), np.float32)) for n in (OBSERVATIONS, ACTIONS))
    critics, actor = agent.engine.critics, agent.engine.actor
    found = agent.engine.values(critics.layers, observation, action)
    for index in range(2):
        first, relu, second, _, last = torch_module(critics.layers, index)
        parts = [first, torch.nn.LayerNorm(16), relu, second, torch.nn.LayerNorm(12), relu, last]
        expected = torch.nn.Sequential(
            *(part for part in parts if normalized or not isinstance(part, torch.nn.LayerNorm))
        )
        torch.testing.assert_close(found[index], expected(torch.cat([observation, action], -1)))
    action = torch.tanh(torch_module(actor.layers)(observation[:1]))[0].detach().numpy()
    low, high = agent.bounds
    np.testing.assert_allclose(agent.act(observation[0].numpy()), low + (action + 1) / 2 * (high - low), atol=1e-6)


@pytest.mark.parametrize("hidden", [(24, 20), (300,), (40, 33, 7)])
def test_engines_agree_with_normalized_critics(hidden):
    pair = Pair(case(hidden, args=arguments(adapt_interval=30, drop_by="contribution", layer_norm=True), batch_size=37))
    pair.train_over_ten_adaptations()
    plain = Pair(case(hidden, args=arguments(adapt_interval=30, drop_by="contribution"), batch_size=37))
    plain.train(range(1, 301))
    assert plain.sparse.losses["critic_loss"] != pair.sparse.losses["critic_loss"]


# Targets of several steps


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_target_adds_up_the_rewards_of_so_many_steps(steps):
    """Episodes of 1 to 7 steps, each observation the number of its state: a target is worked out from the beginning."""
    gamma, rng = 0.9, np.random.default_rng(steps)
    buffer, expected, state = high_sparsity.MultiStepBuffer(200, 1, 1, steps, gamma), [], 0
    for _ in range(30):
        length, terminates = int(rng.integers(1, 8)), bool(rng.integers(2))
        rewards = rng.standard_normal(length)
        for step in range(length):
            ended = step == length - 1
            before, after = np.float32([state + step]), np.float32([state + step + 1])
            buffer.add(dst_td3.Batch(before, before / 2, [rewards[step]], after, [ended and terminates]), ended)
            assert buffer.added >= len(expected) + step + 1 - (steps - 1)
        for step in range(length):
            last = min(step + steps, length)
            discounts = gamma ** np.arange(last - step)
            goes_on = 0 if last == length and terminates else gamma ** (last - step)
            expected.append((state + step, discounts @ rewards[step:last], state + last, goes_on))
        state += length + 1
        assert buffer.added == len(expected), "nothing waits between episodes"
    batch = buffer.batch(np.arange(buffer.added))
    discount = gamma * (1 - batch.terminated)
    found = np.hstack([batch.observation, batch.reward, batch.next_observation, discount])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(batch.action, batch.observation / 2)


# Sparsities apart


def test_actor_and_critics_can_have_sparsities_of_their_own():
    env = dst_td3.make_environment("Hopper-v4")

    def sparsities(**changes) -> list[float]:
        args = dst_td3.resolve(HighSparsityArguments(env="Hopper-v4", **changes))
        args.validate()
        sizes = dst_td3.network_sizes(env, args)
        full = [sum(a * b for a, b in itertools.pairwise(widths[:-1])) for widths, _ in sizes]
        return [1 - sum(counts[:-1]) / all_of_them for (_, counts), all_of_them in zip(sizes, full, strict=True)]

    assert sparsities(sparsity=0.9) == pytest.approx([0.9, 0.9], abs=1e-4)
    assert sparsities(sparsity=0.9, actor_sparsity=0.95) == pytest.approx([0.95, 0.9], abs=1e-4)
    assert sparsities(sparsity=0.9, critic_sparsity=0.0) == pytest.approx([0.9, 0.0], abs=1e-4)
    assert sparsities(sparsity=0.9, actor_sparsity=0.98, critic_sparsity=0.8) == pytest.approx([0.98, 0.8], abs=1e-4)


# Both engines


def test_engines_agree_over_hundreds_of_updates():
    pair = Pair(case(args=arguments(adapt_interval=30, drop_by="contribution"), batch_size=37))
    pair.train_over_ten_adaptations()
    assert len(pair.sparse.state_dict()["critic.extra_weight"]) > 0


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(cases(HighSparsityArguments))
def test_engines_agree_whatever_the_networks(this):
    Pair(this).train_step_by_step()


def test_engines_measure_the_same_contributions():
    pair = Pair(case(args=arguments(), batch_size=37))
    pair.train(range(1, 20))
    for sparse, masked in pair.networks:
        found, expected = (network.contributions(pair.this.buffer.rows) for network in (sparse, masked))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape and theirs.any()
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


# The command line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--recycle-dormant --weight-decay 0", "--weight-decay must be positive with --recycle-dormant"),
        (
            "--drop-by contribution --method td3",
            "--drop-by contribution needs a method that drops connections, not td3",
        ),
        ("--drop-by contribution --method static-td3", "--drop-by contribution needs a method that drops connections"),
        ("--drop-by nothing", "--drop-by"),
        ("--step-exponent 1.5", "--step-exponent must be between 0 and 1, not 1.5"),
        ("--step-exponent nan", "--step-exponent must be"),
        ("--n-step 0", "--n-step must be a positive whole number, not 0"),
        (
            "--n-step 3 --buffer-size 5",
            "--n-step must be at most 2 (--learning-starts + 1 and half of --buffer-size), not 3",
        ),
        ("--n-step 3 --learning-starts 1", "--n-step must be at most 2 (--learning-starts + 1 and half"),
        ("--sparsity 0.9 --critic-sparsity 1", "--critic-sparsity must be at least 0 and below 1, not 1.0"),
        ("--actor-sparsity 0.9", "--actor-sparsity changes --sparsity for one network: give that"),
        ("--er-lambda 7 64 --critic-sparsity 0.9", "for one network: give that instead of --er-lambda"),
        ("--method td3 --critic-sparsity 0.9", "for one network: leave it out: td3 is dense"),
        ("--sparsity 0.9 --actor-sparsity 0.99999", "this sparsity or lambda leaves layer 1 of [11, 256, 256, 3] no"),
        ("--updates-per-step 0", "--updates-per-step must be a positive whole number, not 0"),
        ("--method td3 --sparsity 0.5", "td3 is dense"),
        ("--dense-moments", "--dense-moments is an option of dense_moments.py"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(command_line, tmp_path, given, expected):
    assert_refused(command_line, tmp_path, given, expected)


# The buffer of the second holds less than an episode, so that it is saved during one.
@pytest.mark.parametrize("options", ["", "--n-step 3 --layer-norm --critic-sparsity 0.8 --buffer-size 6"])
@pytest.mark.parametrize("engine", ["masked", "sparse"])
def test_a_killed_run_resumes_to_the_same_bytes(command_line, tmp_path, engine, options):
    given = [*SHORT, "--sparsity", 0.9, "--total-timesteps", 800, "--engine", engine, *options.split()]
    assert command_line(*given, "--results-dir", tmp_path / "unbroken")[0] == 0
    with killed_after(500):
        command_line(*given, "--results-dir", tmp_path / "stopped")
    assert command_line(*given, "--results-dir", tmp_path / "stopped")[0] == 0
    stopped = run_directory(tmp_path / "stopped")
    assert_same_bytes(stopped, run_directory(tmp_path / "unbroken"))
    assert ADAPTING_RECIPE.split("_")[0] in stopped.parent.name


def test_it_trains_with_the_recipe_unless_told_otherwise():
    """Methods that drop nothing have no rule to drop by, and keep the rest. Walker2d has targets of three steps."""
    recipe = {"recycle_dormant": True, "updates_per_step": 2, "step_exponent": 0.5}
    for method, rule in (("ds-td3", "contribution"), ("static-td3", "magnitude"), ("td3", "magnitude")):
        args = HighSparsityArguments(method=method)
        args.validate()
        assert {name: getattr(args, name) for name in PAPERS} == recipe | {"drop_by": rule}
    steps = {env: HighSparsityArguments(env=env).n_step for env in FOUR}
    assert steps == {"HalfCheetah-v4": 1, "Walker2d-v4": 3, "Hopper-v4": 1, "Ant-v4": 1}


def test_runs_are_named_by_what_differs_from_the_paper():
    def name(env: str = "Ant-v4", **changes) -> str:
        return dst_td3.run_name(dst_td3.resolve(HighSparsityArguments(env=env, **changes)))

    parts = "recycle-dormant=True_updates-per-step=2_step-exponent=0.5"
    assert name(sparsity=0.9) == f"ds-td3_sparsity=0.9_drop-by=contribution_{parts}"
    assert name(sparsity=0.9, drop_by="magnitude") == f"ds-td3_sparsity=0.9_{parts}"
    assert name(method="static-td3", sparsity=0.95) == f"static-td3_sparsity=0.95_{parts}"
    assert name(method="td3") == f"td3_{parts}"
    off = name(recycle_dormant=False, updates_per_step=1, step_exponent=0.0)
    assert off == "ds-td3_drop-by=contribution"
    assert name(**PAPERS) == "ds-td3", "without any part it is the paper's"
    apart = name(sparsity=0.95, n_step=3, layer_norm=True, critic_sparsity=0.9)
    assert apart == f"ds-td3_sparsity=0.95_drop-by=contribution_{parts}_n-step=3_layer-norm=True_critic-sparsity=0.9"
    assert name(env="Walker2d-v4", sparsity=0.9) == f"ds-td3_sparsity=0.9_drop-by=contribution_{parts}_n-step=3"
    assert name(env="Walker2d-v4", sparsity=0.9, n_step=1) == f"ds-td3_sparsity=0.9_drop-by=contribution_{parts}"
    named = name(hidden=(32, 32), adapt_interval=200, sparsity=0.9)
    place = "ds-td3_sparsity=0.9_hidden=32,32_adapt-interval=200_drop-by=contribution_recycle-dormant=True_updates"
    assert named.startswith(place), "in the places where they have always stood"
