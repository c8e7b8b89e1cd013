"""The command line: bad input gets one line and exit code 2, and --describe counts what the paper counts."""

import re

import pytest
from running import SHORT, UNMADE, assert_refused

import dst_td3
from dst_sac import SACArguments
from dst_td3 import Arguments
from high_sparsity import HighSparsityArguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--env Hoper-v4", "Did you mean: `Hopper`?"),
        ("--env Hopper-v3", "Hopper-v4"),
        (
            "--env Nonsense",
            f"Nonsense {UNMADE}: NameNotFound: Environment `Nonsense` doesn't exist",
        ),
        ("--sparsity 1", "--sparsity must be at least 0 and below 1, not 1.0"),
        ("--sparsity -0.1", "--sparsity must be"),
        ("--sparsity nan", "--sparsity must be"),
        ("--sparsity 0.99999", "leaves layer 1 of [11, 256, 256, 3] no connection"),
        ("--er-lambda 0 64", "--er-lambda must be 2 positive numbers"),
        ("--er-lambda -7 64", "--er-lambda must be"),
        ("--er-lambda 7", "one for each hidden layer"),
        ("--er-lambda 7 64 --sparsity 0.5", "give one of them"),
        ("--method td3 --sparsity 0.5", "td3 is dense"),
        ("--method td3 --er-lambda 7 64", "td3 is dense"),
        ("--batch-size 0", "--batch-size must be a positive whole number, not 0"),
        ("--total-timesteps -5", "--total-timesteps must be"),
        ("--total-timesteps 25000", "--total-timesteps must be more than --learning-starts (25000)"),
        ("--env no_such_module:Env-v0", "no_such_module"),
        ("--buffer-size 0", "--buffer-size must be"),
        ("--buffer-size 10000000000000 --total-timesteps 10000000000000", "--buffer-size"),
        ("--hidden 0", "--hidden must be"),
        ("--hidden", "--hidden must be"),
        ("--adapt-interval 0", "--adapt-interval must be"),
        ("--drop-fraction 1.5", "--drop-fraction must be between 0 and 1"),
        ("--learning-rate 0", "--learning-rate must be"),
        ("--eval-episodes 0", "--eval-episodes must be"),
        ("--threads 0", "--threads must be"),
        ("--seed -1", "--seed must be"),
        ("--device tpu", "--device"),
        ("--device auto", "--device"),
        ("--snapshot-at 5 2000000", "--snapshot-at must be steps of the run, 1 to 1000000, not (5, 2000000)"),
        ("--snapshot-at 0", "--snapshot-at must be"),
        ("--buffer-size 9999999999 --total-timesteps 9999999999", "networks and transitions need about 1,0"),
        ("--initial-policy nowhere.npz", "nowhere.npz is no policy"),
        ("--batch-size many", "--batch-size"),
        ("--spasity 0.5", "--sparsity"),
        ("--method sac", "ds-td3"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(command_line, tmp_path, arguments, expected):
    assert_refused(command_line, tmp_path, arguments, expected)


@pytest.mark.parametrize(
    "given",
    [
        *("--drop-by contribution", "--drop_by=magnitude", "--recycle-dormant"),
        *("--step-exponent 0.5", "--step-exponent=0", "--dense-moments"),
    ],
)
def test_an_option_that_has_a_program_of_its_own_is_named_with_it(command_line, tmp_path, given):
    flag = given.split()[0].partition("=")[0].replace("_", "-")
    program = "dense_moments.py" if flag == "--dense-moments" else "high_sparsity.py"
    code, output, error = command_line(*given.split(), "--results-dir", tmp_path)
    assert (code, output) == (2, "") and error == f"dst_td3.py: error: {flag} is an option of {program}\n"


@pytest.mark.parametrize("kind", [Arguments, SACArguments, HighSparsityArguments])
def test_auto_is_the_sparse_engine_wherever_it_can_be(monkeypatch, kind):
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: True)  # a GPU alone is no reason to use it

    def engine(**given) -> str:
        return dst_td3.resolve(kind(**given)).engine

    assert engine() == engine(method=kind().method.replace("ds-", "")) == "sparse"
    assert engine(engine="masked") == engine(device="cuda") == "masked"
    found = dst_td3.importlib.util.find_spec
    for missing in ("sparse_engine", "numba", "scipy", "threadpoolctl"):
        monkeypatch.setattr(dst_td3.importlib.util, "find_spec", lambda n, m=missing: None if n == m else found(n))
        assert engine() == "masked"
        with pytest.raises(dst_td3.InputError, match=f"--engine sparse needs a CPU and the packages .*{missing}"):
            engine(engine="sparse")


def test_the_sparse_engine_is_refused_on_a_gpu(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: True)
    assert_refused(command_line, tmp_path, "--engine sparse --device cuda", "--engine sparse needs a CPU")


def test_a_missing_gpu_is_said(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: False)
    code, _, error = command_line("--device", "cuda", "--results-dir", tmp_path)
    assert code == 2 and "--device must be cpu (torch finds no GPU to use), not cuda" in error


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboard"), ("--track", "wandb")])
def test_a_missing_logger_is_said(command_line, tmp_path, monkeypatch, flag, package):
    monkeypatch.setattr(dst_td3.importlib.util, "find_spec", lambda name: None)
    code, _, error = command_line(*SHORT, flag, "--results-dir", tmp_path)
    assert code == 2 and f"{flag} needs the package {package}" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--hidden 1000000 1000000",
            r"networks and transitions need about 48,\d{3}\.\d GB and this machine has [\d.]+",
        ),
        ("--sparsity 0.9 --hidden 300000 300000", r"need about 4,3\d\d\.\d GB"),
        ("--engine masked --hidden 300000 300000", r"need about 10,8\d\d\.\d GB"),
        ("--batch-size 1000000000000", r"need about 6,42\d,\d{3}\.\d GB"),
        ("--buffer-size 99999999999 --total-timesteps 99999999999", r"need about 10,8\d\d\.\d GB"),
    ],
)
def test_what_no_memory_holds_is_refused_with_its_bytes(command_line, tmp_path, arguments, expected):
    assert_refused(command_line, tmp_path, arguments, "and this machine has")
    _, _, error = command_line("--env", "Hopper-v4", "--results-dir", tmp_path, *arguments.split())
    assert re.search(expected, error), error


def test_describe_prints_the_papers_figures(command_line):
    code, dense, _ = command_line("--describe", "--env", "HalfCheetah-v4", "--method", "td3")
    assert code == 0 and "214,784 connections" in dense and "1.07e+14" in dense
    code, sparse, _ = command_line("--describe", "--env", "HalfCheetah-v4", "--er-lambda", 7, 64)
    assert code == 0 and "sparsity 0.51" in sparse and "0.49x dense" in sparse
    assert [line.split()[-2:] for line in sparse.splitlines() if "17 x 256" in line] == [["1,911", "0.561"]]
