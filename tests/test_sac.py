"""DS-SAC: SAC as the textbook has it, by either engine, in runs that learn, resume and refuse as TD3's do."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from engines import (
    SAC_DEFAULTS,
    Case,
    Pair,
    as_sac,
    assert_same_parameters,
    bytes_of,
    case,
    cases,
    loaded,
    sac_case,
    sparse_layers,
    torch_module,
)
from hypothesis import HealthCheck, given, settings
from running import SHORT, assert_refused, assert_same_bytes, killed_after, rows_of, run_directory
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import dst_sac
import dst_td3
from dst_sac import SAC, SACArguments

TD3_ONLY = ("policy-noise", "noise-clip", "exploration-noise", "policy-frequency", "tau", "initial-policy")


class SACPair(Pair):
    """A SAC agent by either engine."""

    def assert_agree(self, **close):
        """Require what TD3's agents are required to share, and the same temperature."""
        super().assert_agree(**close)
        np.testing.assert_allclose(self.sparse.log_temperature, self.masked.log_temperature, **close)


@pytest.fixture
def command_line(command_line):
    """Return the function that runs a command line here, with SAC's arguments."""
    return functools.partial(command_line, kind=SACArguments)


# The update


def squashed(mean: torch.Tensor, log_std: torch.Tensor) -> TransformedDistribution:
    """Return torch's own squashed Gaussian."""
    return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))


def test_the_log_probability_is_that_of_torchs_distributions():
    rng = np.random.default_rng(0)
    mean, log_std, noise = (torch.from_numpy(rng.standard_normal((500, 3))) for _ in range(3))
    unbounded = mean + log_std.exp() * noise
    expected = squashed(mean, log_std).base_dist.log_prob(unbounded)
    expected = expected - TanhTransform().log_abs_det_jacobian(unbounded, torch.tanh(unbounded))
    ours = dst_sac.log_probability(unbounded, log_std, noise)
    # torch's slope of the tanh is rounded to about 1e-9 where it is nearly zero.
    torch.testing.assert_close(ours, expected.sum(-1, keepdim=True), rtol=1e-9, atol=1e-8)
    moderate = unbounded.abs().amax(-1) < 5  # where the inverse of the tanh still tells actions apart
    whole = squashed(mean, log_std).log_prob(torch.tanh(unbounded)).sum(-1, keepdim=True)
    assert moderate.sum() > 300
    torch.testing.assert_close(ours[moderate], whole[moderate], rtol=1e-6, atol=1e-6)


def test_the_log_probability_is_a_density_and_stays_finite():
    """Over all actions of one dimension it sums to 1, and far outside nothing rounds to infinity."""
    action = torch.linspace(-1, 1, 400_001, dtype=torch.float64)[1:-1, None]
    unbounded, mean, log_std = torch.atanh(action), 0.3, torch.tensor(-0.5, dtype=torch.float64)
    density = dst_sac.log_probability(unbounded, log_std, (unbounded - mean) / log_std.exp()).exp()
    assert float(density.sum() * (action[1] - action[0])) == pytest.approx(1, abs=1e-5)
    far = torch.tensor([[-300.0], [300.0]])
    assert torch.isfinite(dst_sac.log_probability(far, torch.zeros(2, 1), torch.zeros(2, 1))).all()


class Textbook:
    """SAC written with torch's own modules, distributions and optimizer, from an agent's networks."""

    def __init__(self, agent: SAC):
        args, self.args, (self.low, self.high) = agent.args, agent.args, map(torch.from_numpy, agent.bounds)
        (self.actor,), self.critics = map(modules, agent.networks.values())
        self.targets = copy.deepcopy(self.critics)
        rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), **rates)
        parameters = [p for critic in self.critics for p in critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(parameters, **rates)
        self.log_temperature = torch.tensor(math.log(args.temperature), dtype=torch.float64, requires_grad=True)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=args.learning_rate)

    def draw(self, observation: torch.Tensor, noise: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.actor(observation).chunk(2, dim=-1)
        distribution = squashed(mean, log_std.clamp(-20, 2))
        gaussian = distribution.base_dist
        action = distribution.transforms[0](gaussian.mean + gaussian.stddev * torch.from_numpy(noise))
        stretched = self.low + (action + 1) / 2 * (self.high - self.low)
        return stretched, distribution.log_prob(action).sum(-1, keepdim=True)

    def critic_loss(self, batch: dst_td3.Batch, noise: np.ndarray) -> torch.Tensor:
        observation, action, reward, next_observation, terminated = map(torch.from_numpy, batch)
        with torch.no_grad():
            next_action, next_log_probability = self.draw(next_observation, noise)
            pair = torch.cat([next_observation, next_action], 1)
            value = torch.minimum(self.targets[0](pair), self.targets[1](pair))
            value = value - self.log_temperature.exp() * next_log_probability
            target = reward + self.args.gamma * (1 - terminated) * value
        pair = torch.cat([observation, action], 1)
        return sum(torch.nn.functional.mse_loss(critic(pair), target) for critic in self.critics)

    def actor_loss(self, batch: dst_td3.Batch, noise: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        observation = torch.from_numpy(batch.observation)
        action, log_probability = self.draw(observation, noise)
        pair = torch.cat([observation, action], 1)
        value = torch.minimum(self.critics[0](pair), self.critics[1](pair))
        loss = (self.log_temperature.exp().detach() * log_probability - value).mean()
        return loss, log_probability.detach()

    def learn(self, buffer: dst_td3.ReplayBuffer, step: int, rng: np.random.Generator) -> None:
        batch = buffer.batch(buffer.draw(self.args.batch_size, rng))
        next_noise, noise = rng.standard_normal((2, self.args.batch_size, len(self.low)))
        self.critic_optimizer.zero_grad()
        self.critic_loss(batch, next_noise).backward()
        self.critic_optimizer.step()
        self.actor_optimizer.zero_grad()
        loss, log_probability = self.actor_loss(batch, noise)
        loss.backward()
        self.actor_optimizer.step()
        if self.args.learn_temperature:
            self.temperature_optimizer.zero_grad()
            (-self.log_temperature * (log_probability - len(self.low)).mean()).backward()
            self.temperature_optimizer.step()
        if step % self.args.target_interval == 0:
            self.targets = copy.deepcopy(self.critics)


def modules(network) -> list[torch.nn.Sequential]:
    """Return torch's own networks with the weights of a network, or of each of those stacked in it."""
    layers = [dst_td3.Layer(*layer) for layer in network.layer_arrays()]
    stack = layers[0].weight.shape[:-2]
    return [torch_module(layers, index) for index in np.ndindex(stack)]


@pytest.mark.parametrize("engine", ["masked", "sparse"])
def test_a_dense_agent_is_the_textbooks(engine):
    """Over twelve updates, with two copies into the targets and a temperature that is learned."""
    this = sac_case((16, 12), 0.0, {"method": "sac", "learn_temperature": True})
    agent, rng = this.agent(engine)
    textbook = Textbook(agent)
    other_rng = np.random.default_rng()
    other_rng.bit_generator.state = rng.bit_generator.state
    for step in range(1, 13):
        this.train(agent, rng, [step])
        textbook.learn(this.buffer, step, other_rng)
    for ours, expected in (
        (modules(agent.engine.actor)[0], textbook.actor),
        *zip(modules(agent.engine.critics), textbook.critics, strict=True),
    ):
        assert_same_parameters(ours, expected, rtol=1e-7, atol=1e-10)
    assert agent.log_temperature[0] == pytest.approx(float(textbook.log_temperature.detach()), rel=1e-9)
    assert agent.temperature != SAC_DEFAULTS.temperature


def assert_gradients(network, modules: list[torch.nn.Sequential]) -> None:
    """Require that a SparseNetwork's first gradient, ten times Adam's first moment, is autograd's."""
    state, layers = network.state_dict(), network.layer_arrays()
    weights, biases = sparse_layers(network), state["first_moment"][len(state["topology"]) :]
    linear = [(n, layer, module[2 * layer]) for n, module in enumerate(modules) for layer in range(len(layers))]
    biases = np.split(biases, np.cumsum([part.out_features for _, _, part in linear])[:-1])
    for (n, layer, part), weight, bias in zip(linear, weights, biases, strict=True):
        mask = layers[layer][1].reshape(-1, *part.weight.T.shape)[n]
        for moment, expected in ((weight[2], part.weight.grad.T.numpy() * mask), (bias, part.bias.grad.numpy())):
            assert np.abs(expected).max() > 0
            np.testing.assert_allclose(10 * moment, expected, rtol=1e-6, atol=1e-9)  # as torch's slope of the tanh


def test_the_compiled_gradients_are_those_of_autograd():
    """Of all parameters, with deviations within, below and above their bounds and either critic the minimum one."""
    this = sac_case((24, 20), 0.5, {"weight_decay": 0.0}, batch_size=40)
    agent, rng = this.agent("sparse")
    engine, buffer = agent.engine, this.buffer
    # Of three means, then of three logarithmic deviations.
    set_biases(agent, [0.1, -0.2, 0.3, -20.0, 2.0, -0.5])
    textbook = Textbook(agent)
    indices = buffer.draw(40, rng)
    batch = buffer.batch(indices)
    next_noise, noise = rng.standard_normal((2, 40, 3))
    pair = torch.from_numpy(np.concatenate([batch.observation, batch.action], axis=1))
    minimum = textbook.critics[0](pair) < textbook.critics[1](pair)
    log_std = textbook.actor(torch.from_numpy(batch.observation))[:, 3:]
    assert 0 < int(minimum.sum()) < 40
    assert 0 < int((log_std[:, 0] < -20).sum()) < 40 and 0 < int((log_std[:, 1] > 2).sum()) < 40

    textbook.critic_loss(batch, next_noise).backward()
    engine.update_critics(buffer, indices, next_noise, agent.temperature)
    assert_gradients(engine.critics, textbook.critics)
    textbook.critics = modules(engine.critics)
    textbook.actor_loss(batch, noise)[0].backward()
    engine.update_actor(buffer, indices, noise, agent.temperature)
    assert_gradients(engine.actor, [textbook.actor])


def set_biases(agent: SAC, values: list[float]) -> None:
    """Set the biases of an actor's outputs."""
    state = agent.state_dict()
    name = (
        "actor.parameters" if "actor.parameters" in state else f"actor.{3 * len(agent.engine.actor.layer_arrays()) - 1}"
    )
    state[name] = state[name].copy()
    state[name].reshape(-1)[-len(values) :] = values
    agent.load_state_dict(state)


def test_a_learned_temperature_moves_towards_its_entropy():
    """Up where the entropy is below minus the number of actions, down where it is above."""
    for log_std, sign in ((-6.0, 1), (-0.5, -1)):
        this = sac_case(arguments={"learn_temperature": True})
        agent, rng = this.agent("masked")
        agent.engine.actor.layers[-1].bias.data[..., 3:] = log_std
        this.train(agent, rng, range(1, 6))
        assert (agent.losses["entropy"] + 3) * sign < 0
        assert sign * (agent.temperature - SAC_DEFAULTS.temperature) > 1e-4
        assert agent.losses["temperature"] == agent.temperature


def test_targets_are_copies_of_now_and_then():
    """A copy has its network's topology, so that nothing is left to prune; until the next one it stays as it is."""
    pair = SACPair(sac_case(arguments={"adapt_interval": 4, "target_interval": 5}))
    critics, sparse = pair.masked.engine.critics, pair.sparse
    kept = [layer.weight for layer in critics.layer_arrays(target=True)]
    for step in range(1, 21):
        pair.train([step])
        target, own = ([layer.weight for layer in critics.layer_arrays(of)] for of in (True, False))
        if step % 5 == 0:
            assert all(map(np.array_equal, target, own))
            state = sparse.state_dict()
            np.testing.assert_allclose(state["critic.target"], state["critic.parameters"], rtol=1e-12)
            assert not state["critic.extra_weight"].any()
            kept = target
        else:
            assert all(map(np.array_equal, target, kept)) and not any(map(np.array_equal, target, own))


def test_the_policy_is_stochastic_in_training_and_its_mean_otherwise():
    this = sac_case(dtype=np.float32)
    observation = np.random.default_rng(0).standard_normal(5)
    for engine in ("masked", "sparse"):
        agent, _ = this.agent(engine)
        rng = np.random.default_rng(1)
        drawn = np.array([agent.explore(observation, rng) for _ in range(4000)])
        low, high = this.bounds
        assert drawn.dtype == np.float32 and (drawn >= low).all() and (drawn <= high).all()
        mean, log_std = np.split(agent.engine.outputs(observation), 2)
        np.testing.assert_allclose(agent.act(observation), np.tanh(mean) * (high - low) / 2 + (high + low) / 2)
        unbounded = np.arctanh(((drawn - low) / (high - low) * 2 - 1).clip(-1 + 1e-6, 1 - 1e-6))
        np.testing.assert_allclose(unbounded.mean(0), mean, atol=0.08)
        np.testing.assert_allclose(unbounded.std(0), np.exp(log_std), rtol=0.06)


# Both engines


def test_engines_agree_over_hundreds_of_updates():
    arguments = {"adapt_interval": 30, "target_interval": 40, "learn_temperature": True}
    SACPair(sac_case(arguments=arguments, batch_size=37)).train_over_ten_adaptations()


def test_engines_agree_on_a_dense_agent():
    """Its hidden layers are matrices that BLAS multiplies."""
    pair = SACPair(sac_case((40, 24), 0.0, {"method": "sac"}, batch_size=37))
    assert pair.sparse.engine.critics.arrays.dense.tolist() == [True, True, False]
    pair.train(range(1, 61))
    pair.assert_agree(rtol=1e-8, atol=1e-11)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(cases())
def test_engines_agree_whatever_the_networks(this):
    SACPair(as_sac(this)).train_step_by_step()


def test_engines_agree_where_outputs_saturate():
    """Deviations at their bounds and actions at theirs, in the type of a run."""
    pair = SACPair(sac_case(dtype=np.float32, batch_size=100))
    for agent in (pair.masked, pair.sparse):
        set_biases(agent, [30.0, -8.0, 0.5, -25.0, 3.0, 1.5])
    pair.train(range(1, 8))
    pair.assert_matrices_agree(rtol=1e-3, atol=2e-5)
    assert np.isfinite(list(map(float, pair.sparse.losses.values()))).all()


@pytest.mark.parametrize("engine", ["masked", "sparse"])
def test_a_loaded_agent_goes_on_to_the_same_bytes(engine):
    this = sac_case(arguments={"learn_temperature": True, "target_interval": 7}, dtype=np.float32)
    (first, rng), (second, other_rng) = loaded(this, engine, range(1, 28))
    this.train(first, rng, range(28, 60))
    this.train(second, other_rng, range(28, 60))
    assert bytes_of(first) == bytes_of(second)


def test_a_state_without_a_temperature_is_rejected():
    agent = sac_case().agent("masked")[0]
    state = agent.state_dict()
    del state["log_temperature"]
    with pytest.raises(KeyError):
        agent.load_state_dict(state)


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("kind", [case, sac_case])
def test_actions_stay_within_bounds_that_rounding_would_leave(monkeypatch, kind, engine):
    """In float32, (1.1 + 3.7) / 2 + (1.1 - 3.7) / 2 is more than 1.1."""
    low, high = np.full(3, -3.7, np.float32), np.full(3, 1.1, np.float32)
    monkeypatch.setattr(Case, "bounds", (low, high))
    agent, rng = kind(dtype=np.float32).agent(engine)
    far = 1e9 * np.random.default_rng(0).standard_normal((20, 5))
    for actions in (np.array([agent.act(x) for x in far]), np.array([agent.explore(x, rng) for x in far])):
        assert ((actions >= low) & (actions <= high)).all() and actions.dtype == np.float32
        assert (actions == low).any() and (actions == high).any()


@pytest.mark.parametrize("which", ["actor", "critics"])
def test_a_diverged_network_shows(which):
    this = sac_case(dtype=np.float32)
    agent, rng = this.agent("sparse")
    state, name = agent.state_dict(), which.removesuffix("s")
    connections = len(state[f"{name}.topology"])
    state[f"{name}.parameters"][connections - 20 : connections] = np.nan  # output weights; only the second critic's
    agent.load_state_dict(state)
    noise = rng.standard_normal((8, 3), dtype=np.float32)
    losses = agent.engine.update_actor(this.buffer, this.buffer.draw(8, rng), noise, agent.temperature)
    assert math.isnan(losses["actor_loss"])
    assert np.isnan(agent.explore(np.zeros(5), rng)).any()


# Whole runs


@pytest.mark.parametrize("further", ["", "--learn-temperature", "--method sac"])
def test_it_learns_to_balance_a_pole(command_line, tmp_path, further):
    """Balancing for a whole episode returns 1000; an untrained agent reaches about 10."""
    arguments = (
        "--env InvertedPendulum-v4 --hidden 64 64 --learning-rate 0.003 --batch-size 100 --target-interval 100 "
        "--total-timesteps 10000 --learning-starts 1000 --eval-interval 1000 --eval-episodes 5 --adapt-interval 200"
    )
    code, output, error = command_line(*arguments.split(), *further.split(), "--results-dir", tmp_path)
    assert code == 0, error
    returns = [float(row["return_mean"]) for row in rows_of(run_directory(tmp_path) / "evaluations.csv")]
    assert returns[0] < 100 and max(returns) > 900, output


@pytest.mark.parametrize("further", ["--learn-temperature", "--engine masked --total-timesteps 800"])
def test_a_killed_run_resumes_to_the_same_bytes(command_line, tmp_path, further):
    """Killed twice: while it explores at random, and while it learns with adapted topologies."""
    arguments = [*SHORT, "--batch-size", 100, "--target-interval", 70, *further.split()]
    assert command_line(*arguments, "--results-dir", tmp_path / "unbroken")[0] == 0
    stopped = tmp_path / "stopped"
    for step in (150, 500):
        with killed_after(step):
            command_line(*arguments, "--results-dir", stopped)
    assert not list(stopped.rglob("summary.json"))
    code, output, _ = command_line(*arguments, "--results-dir", stopped)
    assert code == 0 and "step 0 of" not in output
    assert_same_bytes(run_directory(stopped), run_directory(tmp_path / "unbroken"))
    config = json.loads((run_directory(stopped) / "config.json").read_text())
    assert not set(config["arguments"]) & {name.replace("-", "_") for name in TD3_ONLY}


@pytest.mark.parametrize("engine", ["masked", "sparse"])
def test_a_diverged_temperature_stops_the_run_with_one_line(command_line, tmp_path, engine):
    arguments = (
        "--env Pendulum-v1 --hidden 8 8 --batch-size 4 --total-timesteps 60 --learning-starts 20 --eval-episodes 1 "
        f"--learn-temperature --learning-rate 1000 --engine {engine}"
    )
    code, _, error = command_line(*arguments.split(), "--results-dir", tmp_path)
    (line,) = [line for line in error.splitlines() if not line.startswith("compiling ")]  # which a first run also says
    assert code == 1 and "error: after step" in line and "the networks have diverged" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--temperature 0", "--temperature must be a positive number, not 0.0"),
        ("--temperature nan", "--temperature must be a positive number, not nan"),
        ("--target-interval 0", "--target-interval must be a positive whole number, not 0"),
        ("--method td3", "ds-sac"),
        ("--method sac --sparsity 0.5", "sac is dense"),
        ("--sparsity 1", "--sparsity must be at least 0 and below 1"),
        ("--batch-size 0", "--batch-size must be"),
        ("--drop-by magnitude", "--drop-by is an option of high_sparsity.py"),
        ("--step-exponent 1", "--step-exponent is an option of high_sparsity.py"),
        ("--recycle-dormant", "--recycle-dormant is an option of high_sparsity.py"),
        ("--dense-moments", "--dense-moments is an option of dense_moments.py"),
        *((f"--{name} 1", f"--{name}") for name in TD3_ONLY),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(command_line, tmp_path, arguments, expected):
    assert_refused(command_line, tmp_path, arguments, expected)


def test_help_lists_what_sac_has_and_nothing_else(command_line):
    code, output, _ = command_line("--help")
    assert code == 0 and not [name for name in TD3_ONLY if f"--{name} " in output]
    for shown in ("--temperature", "--learn-temperature", "--target-interval", "eta of the paper", "alpha of SAC"):
        assert shown in output


def test_describe_counts_both_outputs_of_an_action(command_line):
    code, described, _ = command_line("--describe", "--env", "HalfCheetah-v4")
    rows = [line.split() for line in described.splitlines()]
    assert code == 0 and ["actor", "3", "256", "x", "12", "3,072", "0.000"] in rows
    assert [row[-2] for row in rows if row[-4:-3] == ["256"] or row[2:3] == ["17"]][:1] == ["3,276"]  # 12 * (17 + 256)
    code, described, _ = command_line("--describe", "--env", "HalfCheetah-v4", "--method", "sac")
    actor, critic = 256 * (17 + 256 + 12), 256 * (23 + 256 + 1)
    assert f"{actor + 2 * critic:,} connections" in described
    assert f"{1e6 * 256 * 6 * (actor + 2 * critic):.3g} for training" in described


def test_ant_keeps_the_papers_density():
    """The paper's lambda of 30 on the 111 observations of Ant-v3."""
    first, second = SACArguments.PAPER_LAMBDA["Ant-v4"]
    assert first * (27 + 256) / (27 * 256) == pytest.approx(30 * (111 + 256) / (111 * 256), abs=0.002)
    assert second == 64


def test_runs_are_named_by_what_differs_from_the_paper():
    def name(**changes) -> str:
        return dst_td3.run_name(dst_td3.resolve(SACArguments(**changes)))

    assert name() == name(er_lambda=(12.0, 80.0)) == name(seed=3, threads=2, temperature=0.2) == "ds-sac"
    assert name(method="static-sac") == "static-sac"
    assert name(sparsity=0.8, learn_temperature=True) == "ds-sac_sparsity=0.8_learn-temperature=True"
    assert name(method="sac", temperature=0.1, target_interval=500) == "sac_temperature=0.1_target-interval=500"
