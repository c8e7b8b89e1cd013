"""What a run says: a line at each evaluation, its first and last lines, and logs."""

import re
from contextlib import ExitStack

import numpy as np
import pytest
from point import habit, trained
from running import rows_of, run_directory

import dst_td3
from dst_td3 import Arguments


def test_a_run_says_what_it_is_and_has_a_line_for_each_evaluation(finished):
    run, output = finished
    *_, begin = (line for line in output.splitlines() if line.endswith("step 0 of 2,400"))
    sparsity = r"sparsity 0\.50 of the hidden layers \(0\.48 of all\)"
    assert re.search(rf"seed 0, {sparsity}, sparse engine on cpu: step 0 of 2,400$", begin), begin
    waiting, *lines, _ = output.split(f"{begin}\n")[1].splitlines()
    assert waiting == "random actions, and nothing learned, until step 400"
    for line, row in zip(lines, rows_of(run / "evaluations.csv"), strict=True):
        step, mean, std = int(row["step"]), float(row["return_mean"]), float(row["return_std"])
        speed = "" if step == 0 else r"  [\d,]+ steps/s" if step <= 400 else r"  [\d,]+ steps/s  0:\d\d:\d\d left"
        assert re.fullmatch(rf"step +{step:,}  return +{mean:.1f} \+- +{std:.1f}{speed}", line), line


def test_a_progress_line_has_the_speed_since_the_last_one_and_the_time_left(monkeypatch, capsys, tmp_path):
    now = [100.0]
    args = Arguments(env="Hopper-v4", engine="masked", sparsity=0.5, hidden=(8, 8), results_dir=tmp_path)
    run = dst_td3.Run(args)
    monkeypatch.setattr(dst_td3.time, "perf_counter", lambda: now[0])
    with ExitStack() as closing:
        progress = dst_td3.Progress(run, closing)
        for step, seconds in ((0, 3), (20_000, 4), (30_000, 20), (40_000, 10)):
            now[0] += seconds
            progress.evaluated({"step": step, "return_mean": 1.0, "return_std": 2.0})
    _, _, *lines = capsys.readouterr().out.splitlines()
    # Random actions before step 25,000 are many times faster, so that they say nothing of the time left.
    expected = ("1.0 +-     2.0", "5,000 steps/s", "500 steps/s  0:32:20 left", "1,000 steps/s  0:16:00 left")
    assert [line.endswith(end) for line, end in zip(lines, expected, strict=True)] == [True] * 4, lines


def test_the_first_line_says_which_sparsity_is_counted(command_line, tmp_path):
    _, output = trained(command_line, tmp_path, "--sparsity", 0.8)
    run = dst_td3.Run(Arguments(env="Point-v0", engine="masked", hidden=(16, 16), sparsity=0.8))
    hidden = sum(mask.sum() for masks in run.initial_masks for mask in masks)
    full = sum(mask.size for masks in run.initial_masks for mask in masks)
    assert 1 - hidden / full == pytest.approx(0.8, abs=0.005)
    of_all = f"{run.costs['sparsity']:.2f}"
    assert of_all != "0.80"
    assert f", sparsity 0.80 of the hidden layers ({of_all} of all), masked engine on cpu: step 0 of" in output


def test_dictionaries_are_flattened_which_is_said(command_line, plain, tmp_path):
    _, output = trained(command_line, tmp_path, *habit("dictionary"))
    assert "observations of Point-v0 are flattened to 5 numbers\n" in output
    observation, _ = dst_td3.make_environment("Point-v0", habit("dictionary")[1]).reset(seed=0)
    np.testing.assert_array_equal(observation[:3], [0, 1, 0])  # keys in order: the number one of three, then the place
    assert "flattened" not in plain[1]


def test_an_environment_without_a_time_limit_is_named(command_line, plain, tmp_path):
    said = "Point-v0 has no time limit: its episodes, and so evaluations, end by themselves or by --env-kwargs "
    assert said in plain[1]
    assert "no time limit" not in trained(command_line, tmp_path, "--env", "Point-v1")[1]


def test_a_path_with_spaces_is_quoted_in_the_last_line(plain):
    run, output = plain
    assert " " in str(run) and output.splitlines()[-1].endswith(f": python watch.py '{run}'")


def test_tensorboard_logs_are_written_where_it_is_installed(command_line, tmp_path):
    pytest.importorskip("tensorboard")
    trained(command_line, tmp_path, "--tensorboard")
    assert list(run_directory(tmp_path).glob("tensorboard/events*"))
