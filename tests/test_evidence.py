"""The list of trainings that the claims need: skipped, stopped, shared and gone on with."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, python

from plots import claims
from resnet import files

sys.path.insert(0, str(ROOT / "experiments"))

import evidence
from evidence import Training

sys.path.remove(str(ROOT / "experiments"))  # where 'resnet' is another script

DRIVER = """
import sys
sys.path.insert(0, "experiments")
import evidence
from evidence import Training
from resnet import command, record
evidence.LIST = [((0,), [{trainings}])]
record.git_state = lambda: {state}
command.run(evidence.main)
"""
SHORT = "Training('plain', 1, 32000)"  # 2 iterations
SCALED = "Training('top_down', 1, 20000, {'scale': 0.1})"
LONG = "Training('resnet', 1, 1)"


def words(out, *trainings, state=None):
    driver = DRIVER.format(trainings=", ".join(trainings), state=state)
    return "-c", driver, "--data", "synthetic", "--out", str(out), "--device", "cpu"


def test_the_list_is_trained_in_order_and_skipped_when_it_is_complete(tmp_path):
    done = python(*words(tmp_path, SHORT, SCALED))
    assert done.returncode == 0, done.stderr
    assert f"all 2 complete in {tmp_path}" in done.stdout
    names = ["plain-8-shorten32000-seed0", "top_down-8-shorten20000-scale0.1-seed0"]
    assert sorted(os.listdir(tmp_path)) == names
    assert done.stdout.index(names[0]) < done.stdout.index(names[1])
    assert "python experiments/plain.py --n 1 --seed 0 --shorten 32000" in done.stdout
    again = python(*words(tmp_path, SHORT, SCALED))
    assert (again.returncode, again.stdout) == (0, f"all 2 complete in {tmp_path}\n")
    listed = python(*words(tmp_path, SHORT, LONG), "--list").stdout.splitlines()
    assert [line.startswith("complete") for line in listed] == [True, False]


def test_blocks_of_another_run_are_not_taken_for_the_wanted_ones(tmp_path):
    done = python(*words(tmp_path, SHORT))
    assert done.returncode == 0, done.stderr
    deeper = "plain-14-shorten32000-seed0"
    shutil.copytree(tmp_path / "plain-8-shorten32000-seed0", tmp_path / deeper)
    done = python(*words(tmp_path, SHORT.replace("1", "2", 1)))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"error: {tmp_path}/{deeper}/blocks.h5: of another run, holds n = 1; ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_the_training_in_progress_with_a_snapshot(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, *words(tmp_path, LONG, SHORT)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stdout:
            if line.startswith("    1 "):
                break
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 75
    assert f"stopped by {number.name} after iteration" in rest
    assert "stopped with 0 of 2 complete; the same command goes on" in rest
    assert list((tmp_path / "resnet-8-seed0").glob("snapshot_iter_*.npz"))


def test_several_are_trained_at_once_and_all_are_stopped(tmp_path):
    other = "Training('plain', 1, 1)"
    command = words(tmp_path, SHORT, LONG, other)
    process = subprocess.Popen(
        [sys.executable, *command, "--at-once", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        first = [process.stdout.readline() for _ in range(4)]
        folders = [tmp_path / "resnet-8-seed0", tmp_path / "plain-8-seed0"]
        while not all((folder / "log").exists() for folder in folders):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert [line.startswith("== ") for line in first] == [True, True, False, True]
    assert first[2] == f"complete: {tmp_path / 'plain-8-shorten32000-seed0'}\n"
    assert process.returncode == 75 and "stopped with 1 of 3 complete" in rest
    assert all(list(folder.glob("snapshot_iter_*.npz")) for folder in folders)


def test_the_end_of_one_of_several_is_told_and_ends_all(tmp_path):
    done = python(*words(tmp_path, LONG, SHORT), "--at-once", "2", "--backend", "mkl")
    assert done.returncode == 2
    assert "--backend: invalid choice: 'mkl'" in done.stderr
    assert f"{tmp_path}/" in done.stderr and "ended with status 2" in done.stderr


def test_one_of_several_that_is_killed_ends_all_with_snapshots(tmp_path):
    other = "Training('plain', 1, 1)"
    process = subprocess.Popen(
        [sys.executable, *words(tmp_path, LONG, other), "--at-once", "2"], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    killed, stopped = tmp_path / "resnet-8-seed0", tmp_path / "plain-8-seed0"
    with process:
        while not all((folder / "log").exists() for folder in (killed, stopped)):
            assert process.poll() is None
            time.sleep(0.1)
        (child,) = (
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and f"resnet.py\0--n\0{1}\0" in read(entry / "cmdline")
            and str(tmp_path) in read(entry / "cmdline")
        )  # fmt: skip
        os.kill(child, signal.SIGKILL)
        said = process.stderr.read()
    assert process.returncode == 1 and f"{killed}: training was killed by SIGKILL" in said
    assert list(stopped.glob("snapshot_iter_*.npz"))


def read(path):
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def test_what_another_process_trains_is_left_to_it(tmp_path):
    folder = tmp_path / Training("resnet", 1, 1).name
    folder.mkdir()
    with files.only_writer(folder):
        done = python(*words(tmp_path, LONG, SHORT))
    assert done.returncode == 75
    assert "1 of 2 are being trained by other processes" in done.stdout
    assert (tmp_path / "plain-8-shorten32000-seed0/blocks.h5").exists()


def test_a_mistake_is_told_once_and_ends_it(tmp_path):
    done = python(*words(tmp_path, SHORT, LONG), "--backend", "mkl")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--backend: invalid choice: 'mkl'" in line


def test_a_modified_checkout_is_refused(tmp_path):
    done = python(*words(tmp_path, SHORT, state={"commit": "0123456789abcdef", "modified": True}))
    assert done.returncode == 1 and "modified since commit 0123456789ab; legal:" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_training_of_the_list_has_a_folder_of_its_own():
    for full in (False, True):
        names = [each.name for each in evidence.trainings(full)]
        assert len(set(names)) == len(names)
        assert not full or not any("shorten" in name for name in names)
    first = [each.name for each in evidence.trainings()[:3]]
    assert first == [f"{net}-20-shorten4-seed0" for net in ("plain", "resnet", "resresnet")]


def test_two_claims_are_left_to_full_schedules():
    needed = [claim.title for claim in claims.CLAIMS if claim.full]
    assert len(needed) == 2 and "all but two claims" in evidence.__doc__


@pytest.mark.parametrize("full", [False, True])
def test_the_list_has_every_net_that_a_claim_is_judged_by(full):
    """Each with three seeds in a quarter of the schedule, with five in all of it."""
    wanted = {
        (side.net.architecture, side.net.layers, side.net.choices)
        for claim in claims.CLAIMS
        for comparison in claim.comparisons
        for side in comparison.sides
    }
    seeds = {}
    for each in evidence.trainings(full):
        assert each.shorten == 1 or not full
        net = each.net, 6 * each.n + 2, tuple(each.choices.items())
        if full or each.shorten == 4:
            seeds.setdefault(net, set()).add(each.seed)
    assert wanted <= seeds.keys()
    assert all(found == (set(range(5)) if full else {0, 1, 2}) for found in seeds.values())
