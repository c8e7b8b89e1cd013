"""Run directories: their names, the run that each belongs to, and folders that cannot be used."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from point import TRAINING
from running import SHORT, before_step, run_directory

import dst_td3
from dense_moments import DenseMomentsArguments
from dst_sac import SACArguments
from dst_td3 import Arguments
from high_sparsity import HighSparsityArguments


# --- Names ------------------------------------------------------------------------------------------------------------
def test_runs_are_named_by_what_differs_from_the_paper():
    def name(**changes) -> str:
        return dst_td3.run_name(dst_td3.resolve(Arguments(**changes)))

    assert name() == name(er_lambda=(7.0, 64.0)) == name(seed=3, threads=2) == "ds-td3"
    assert name(method="td3") == "td3"
    assert name(sparsity=0.8) == "ds-td3_sparsity=0.8"
    assert name(adapt_interval=200, er_lambda=(5.0, 6.5)) == "ds-td3_er-lambda=5,6.5_adapt-interval=200"


def test_a_long_name_is_shortened_by_a_checksum(command_line, tmp_path):
    long = {"hidden": (64,) * 60, "gamma": 0.98}

    def name(args: Arguments) -> str:
        return dst_td3.run_directory(dst_td3.resolve(args)).parent.name

    names = [name(Arguments(**long | {"tau": tau})) for tau in (0.005, 0.1, 0.2)]
    assert len(set(names)) == 3 and all(len(name.encode()) <= 200 for name in names)
    assert all(name.startswith("ds-td3_sparsity=0.5_hidden=64,64,") for name in names)
    assert re.fullmatch(r".*_[0-9a-f]{1,8}", names[0])
    accented = Arguments(env_kwargs=json.dumps({"é" * 150: 1}, ensure_ascii=False))
    assert len(os.fsencode(name(accented))) <= 200
    assert name(Arguments(gamma=0.98, tau=0.1)) == "ds-td3_gamma=0.98_tau=0.1"
    (tmp_path / names[0]).mkdir()


def test_a_module_leaves_no_colon_in_a_path_and_an_old_folder_is_found(tmp_path):
    args = dst_td3.resolve(Arguments(env="module:Space/Env-v0", results_dir=tmp_path))
    assert dst_td3.run_directory(args) == tmp_path / "module-Space-Env-v0" / "ds-td3" / "seed0"
    old = tmp_path / "module:Space-Env-v0" / "ds-td3" / "seed0"
    old.mkdir(parents=True)
    assert dst_td3.run_directory(args) == old


# --- Runs that are there ----------------------------------------------------------------------------------------------
# What the paper's runs have of the options that have programs of their own.
PAPERS = {"drop_by": "magnitude", "recycle_dormant": False, "step_exponent": 0.0, "n_step": 1, "dense_moments": False}


def kind_of(stored: dict) -> type[Arguments]:
    """Return the arguments of the program that goes on with a run of stored ones."""
    other = [name for name, papers in PAPERS.items() if stored.get(name, papers) != papers]
    if not other:
        return Arguments if stored["method"].endswith("td3") else SACArguments
    return DenseMomentsArguments if other == ["dense_moments"] else HighSparsityArguments


def test_the_committed_runs_are_finished(command_line, monkeypatch):
    """Also where arguments have been added since they were made, and on a machine with a GPU."""
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: True)
    results = Path(dst_td3.__file__).parent / "results"
    directories = [path.parent for path in results.glob("*-v4/*/*/summary.json")]
    assert len(directories) >= 6
    kinds = set()
    for directory in directories:
        stored = json.loads((directory / "config.json").read_text())["arguments"]
        kind = kind_of(stored)
        assert stored.pop("program", kind.__name__) == kind.__name__
        more = dataclasses.make_dataclass(kind.__name__, [("added_later", float, 0.5)], bases=(kind,), frozen=True)
        left_open, known = {"engine", "device"}, {field.name for field in dataclasses.fields(kind)}
        assert all(stored[name] == PAPERS[name] for name in set(stored) - known)
        values = {name: value for name, value in (PAPERS | stored).items() if name in known - left_open}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if stored.get("initial_policy"):  # kept by name and content; it is one of the same seed's snapshots
            snapshot = stored["initial_policy"].split()[0]
            given["initial_policy"] = directory.parents[1] / stored["method"] / directory.name / snapshot
        args = dst_td3.resolve(more(**given, results_dir=directory.parents[2]))
        args.validate()
        assert dst_td3.run_directory(args) == directory and dst_td3.is_finished(args)
        kinds.add(kind)
    assert kinds >= {Arguments, HighSparsityArguments, DenseMomentsArguments}
    args = dataclasses.replace(args, added_later=0.6)
    assert dst_td3.run_name(args).endswith("_added-later=0.6")


def test_a_finished_run_is_left_alone(command_line, unbroken, tmp_path):
    shutil.copytree(unbroken.parents[2], tmp_path / "copy")
    times = {path.name: path.stat().st_mtime_ns for path in run_directory(tmp_path / "copy").iterdir()}
    code, output, _ = command_line(*SHORT, "--results-dir", tmp_path / "copy")
    assert code == 0 and "finished already" in output
    assert times == {path.name: path.stat().st_mtime_ns for path in run_directory(tmp_path / "copy").iterdir()}


@pytest.mark.parametrize("directory", ["unbroken", "stopped"])
def test_a_folder_with_other_arguments_is_refused(command_line, request, directory):
    path = request.getfixturevalue(directory)
    code, _, error = command_line(*SHORT, "--threads", 2, "--results-dir", path.parents[2])
    assert code == 2 and "threads 1 there and 2 here" in error


def test_only_an_unfinished_run_needs_the_engine_that_it_was_begun_with(command_line, unbroken, stopped):
    code, _, error = command_line(*SHORT, "--engine", "masked", "--results-dir", stopped.parents[2])
    assert code == 2 and "engine sparse there and masked here" in error
    code, output, _ = command_line(*SHORT, "--engine", "masked", "--results-dir", unbroken.parents[2])
    assert code == 0 and "finished already" in output


def test_a_folder_in_use_is_refused(command_line, tmp_path):
    refusals = []
    with before_step(200, lambda: refusals.append(command_line(*SHORT, "--results-dir", tmp_path))):
        assert command_line(*SHORT, "--results-dir", tmp_path)[0] == 0
    ((code, _, error),) = refusals
    assert code == 2 and "another process" in error


# --- Folders that cannot be used --------------------------------------------------------------------------------------
@contextmanager
def with_rights(folder: Path, rights: int):
    """Give this process, be it root's, only these rights to a folder."""
    user = os.geteuid()
    folder.chmod(rights)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize("why", ["a file", "no right to write", "no right to enter"])
def test_an_unusable_results_folder_is_refused(command_line, plain, why):
    """After another run, since torch imports some of itself late, which a user without rights may not read."""
    with tempfile.TemporaryDirectory() as parent:  # not pytest's, which lets in its owner alone
        Path(parent).chmod(0o755)
        results = Path(parent) / "results"
        results.write_text("") if why == "a file" else results.mkdir()
        rights = {"a file": 0o444, "no right to write": 0o555, "no right to enter": 0}[why]
        with with_rights(results, rights):
            code, _, error = command_line(*SHORT, "--engine", "masked", "--results-dir", results)
    assert code == 2 and "cannot use" in error and error.count("\n") == 1


@pytest.mark.parametrize("link", ["runs", "runs/Point-v0"])
def test_a_link_to_nothing_so_far_is_followed(command_line, tmp_path, link):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "scratch")
    code, _, error = command_line(*TRAINING, "--results-dir", tmp_path / "runs")
    assert (code, error) == (0, "") and list((tmp_path / "scratch").rglob("policy.npz"))


def test_other_failures_are_not_blamed_on_the_results_folder(command_line, tmp_path, monkeypatch):
    def lost(*_):
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr(dst_td3.Progress, "evaluated", lost)
    with pytest.raises(ConnectionResetError):
        command_line(*SHORT, "--results-dir", tmp_path)
