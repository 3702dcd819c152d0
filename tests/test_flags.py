"""Values of flags: what is out of range is refused where it is read, in one line."""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import python

from resnet import cifar10, command, flags, schedule
from resnet.command import USAGE, InputError

FLAGS = flags.add_schedule(flags.parser(""))


def refusal(*words):
    """The one line that these words are refused with."""
    with pytest.raises((SystemExit, InputError)) as caught:
        args = FLAGS.parse_args([*words])
        flags.check(args)
        flags.find_device(args.device)
        cifar10.load(args.data)
    assert getattr(caught.value, "code", None) == USAGE or isinstance(caught.value, InputError)
    return caught.value


@pytest.mark.parametrize(
    "words",
    [
        *((f"--{flag}=--",) for flag in ("n", "out", "resume", "data", "device", "seed", "drops")),
        ("-d--",),
        *(("--n", value) for value in ("0", "1001", "9" * 30, "\u00b2", "1e3", "3\n5", "")),
        ("--batchsize", "50001"),
        ("--epoch", "10000000"),
        ("--shorten", "64001"),
        *(("--seed", value) for value in ("4294967296", "-1")),
        ("--runs", "100000"),
        ("--seed", "4294967295", "--runs", "2"),
        *(("--epoch", "2", "--drops", value) for value in ("1e308", "nan", "-1", "inf")),
        *(("--drops", *values, "-e", "2") for values in (["2"], ["1", "1"], ["1.5", "1", "0"])),
        *(("--schedule", value, "--epoch", "2") for value in ("he2015", "report100")),
        *(("--time-limit", value) for value in ("nan", "inf", "1e10")),
        ("--snapshot-interval", "1e300"),
        ("--out", ""),
        ("--resume", ""),
        ("--out", "~nosuchuser/runs"),
        ("--augmentation", "crop\nflip"),
        *(("--device", value) for value in ("\u00b2", "-3", "9" * 5000, "cpu\n", "")),
        *(("--data", value) for value in ("", "~nosuchuser", "/dev/zero", "no\nsuch")),
    ],
    ids=lambda words: " ".join(words)[:30].encode("ascii", "backslashreplace").decode(),
)
def test_impossible_values_are_refused_in_one_line(words, capsys):
    caught = refusal(*words)
    said = capsys.readouterr().err or f"error: {command.one_line(caught)}\n"
    assert said.startswith("error: ") and said.count("\n") == 1
    assert words[0].lstrip("-").partition("=")[0][:1] in said
    assert any(word in said for word in ("legal: ", "invalid choice", "no such file"))


@pytest.mark.parametrize("words", [("--drops", "0", "1.9", "-e", "2"), ("--schedule", "he2015")])
def test_schedules_that_can_be_trained_are_taken(words):
    flags.check(FLAGS.parse_args(words))


def test_a_home_that_the_shell_has_left_as_it_was_typed_is_one(monkeypatch):
    """As in --out=~/runs."""
    monkeypatch.setenv("HOME", "/home/student")
    assert FLAGS.parse_args(["--out=~/runs"]).out == Path("/home/student/runs")


def test_a_pipe_is_no_data_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no such file or folder"):
        cifar10.load(str(tmp_path / "pipe"))


def test_a_thousand_seeds_are_planned_in_a_second(dataset, tmp_path):
    from conftest import make_run

    begin = time.monotonic()
    for seed in range(100):
        make_run(dataset, tmp_path, "--seed", str(seed))
    assert time.monotonic() - begin < 5
    assert "mean" not in vars(make_run(dataset, tmp_path).setting)  # waits until it is trained


def test_the_command_to_go_on_names_the_interpreter_that_runs():
    script = "from resnet import record; print(record.command_here())"
    shown = python("-c", script, PYTHONPATH=".")
    assert shown.stdout.startswith(f"{sys.executable} -c ")


@pytest.mark.parametrize(
    ("plan", "flag"),
    [
        (schedule.he2015(), "--schedule he2015"),
        (schedule.he2015().shortened(4), "--schedule he2015 --shorten 4"),
        (schedule.report100(50_000, 128), "--schedule report100"),
        (schedule.epochs(7, (4, 5), 50_000, 128), "--epoch 7"),
    ],
)
def test_a_schedule_is_told_in_flags(plan, flag):
    sizes = {"training images": 50_000, "batchsize": 128}
    other = {"schedule": {"iterations": 0}}
    assert flags.spell("schedule", {**sizes, "schedule": asdict(plan)}, other) == flag


def test_a_number_of_epochs_is_told_as_it_was_typed():
    for batchsize, epoch in ((7, 7), (14, 119), (26, 117), (128, 3), (5000, 1)):
        plan = asdict(schedule.epochs(epoch, (epoch / 2,), 5000, batchsize))
        run = {"training images": 5000, "batchsize": batchsize, "schedule": plan}
        other = {"schedule": {"iterations": 0}}
        assert flags.spell("schedule", run, other) == f"--epoch {epoch}"


@pytest.mark.parametrize("name", ["7", "gpu", "-2", "@cupy:9", "1.5"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match="--device: found") as error:
        flags.find_device(name)
    assert error.value.code == 2


@pytest.mark.parametrize("name", ["cpu", "-1", "@numpy"])
def test_spellings_of_the_cpu(name):
    assert flags.find_device(name).xp is np
