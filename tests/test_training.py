"""A whole run in its folder: log, snapshots, resume, refusals."""

import functools
import io
import itertools
import json
import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import chainer
import h5py
import numpy as np
import pytest
from conftest import ROOT, python

from resnet import extensions, files, flags, network, schedule, training, weights
from resnet.batches import Images
from resnet.command import InputError


def make_run(dataset, out, *words, n=1):
    args = flags.add_schedule(flags.parser("")).parse_args(
        ["--n", str(n), "-b", "16", "-e", "3", "--out", str(out), *words]
    )
    setting = training.Setting(args, dataset, "test", chainer.get_device("@numpy"), "chainer")
    return training.whole_network("resnet", n, args.seed, setting)


def read_log(folder):
    """The log without its times."""
    log = json.loads((folder / "log").read_text())
    for entry in log:
        assert entry.pop("elapsed_time") > 0
    return log


def read_blocks(folder):
    arrays = {}
    with h5py.File(folder / "blocks.h5") as file:
        file.visititems(
            lambda name, item: arrays.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    return arrays


@pytest.fixture
def finished(dataset, tmp_path, capsys):
    run = make_run(dataset, tmp_path)
    run.train()
    return run


def test_a_run_leaves_log_blocks_snapshot_and_arguments(finished, capsys):
    folder = finished.folder
    assert folder.name == "resnet-8-seed0"
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert visible == {"log", "blocks.h5", "args.json", "snapshot_iter_8.npz"}
    log = read_log(folder)
    assert [(entry["epoch"], entry["iteration"]) for entry in log] == [(1, 3), (2, 5), (3, 8)]
    # 3 epochs of 40 images are 8 batches of 16; the rate drops at 1.5 and 2.25 epochs.
    assert [entry["lr"] for entry in log] == [0.1, 0.01, 0.001]
    assert all(0 <= entry["test/main/accuracy"] <= 1 for entry in log)
    record = json.loads((folder / "args.json").read_text())
    assert record["run"]["schedule"] == {"name": "custom", "iterations": 8, "drops": [4, 6]}
    start = record["starts"][0]
    assert start["versions"]["chainer"] == chainer.__version__
    assert start["device"].startswith("CPU")
    assert start["data digest"] == finished.setting.dataset.digest
    assert start["packages"]["chainer"] == chainer.__version__
    description = weights.describe(folder / "blocks.h5")
    assert (description.architecture, description.n, description.epoch) == ("resnet", 1, 3)


def test_last_and_best_epoch_are_told_apart(finished, capsys):
    folder = finished.folder
    log = json.loads((folder / "log").read_text())
    for entry, accuracy in zip(log, (0.5, 0.75, 0.25), strict=True):
        entry["test/main/accuracy"] = accuracy
    (folder / "log").write_text(json.dumps(log))
    finished.train()
    out = capsys.readouterr().out
    assert "last epoch (3): 25.00%" in out
    assert "best epoch (2): 75.00%" in out


def test_the_same_command_again_does_not_train_a_complete_run(finished, capsys):
    before = (finished.folder / "blocks.h5").stat().st_mtime_ns
    finished.train()
    assert "already complete" in capsys.readouterr().out
    assert (finished.folder / "blocks.h5").stat().st_mtime_ns == before


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(dataset, finished, tmp_path):
    again = make_run(dataset, tmp_path / "again")
    again.train()
    assert read_log(again.folder) == read_log(finished.folder)
    other = make_run(dataset, tmp_path, "--seed", "1")
    other.train()
    assert read_log(other.folder) != read_log(finished.folder)


def stop_after(monkeypatch, iteration, number=signal.SIGTERM):
    """Send this process a signal during the given iteration, and more while it stops."""
    update, save = training.Updater.update, extensions.Snapshots.save

    def interrupted(updater):
        update(updater)
        if updater.iteration == iteration:
            os.kill(os.getpid(), number)

    def interrupted_again(snapshots, trainer):
        if trainer.updater.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return save(snapshots, trainer)

    monkeypatch.setattr(training.Updater, "update", interrupted)
    monkeypatch.setattr(extensions.Snapshots, "save", interrupted_again)


@pytest.fixture(autouse=True)
def handlers():
    """Give the signals of a run that has left by ``sys.exit`` their handlers back."""
    before = {n: signal.getsignal(n) for n in extensions.StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("iteration", [1, 5])
def test_a_stopped_run_goes_on_to_the_same_end(
    dataset, finished, tmp_path, monkeypatch, capsys, number, iteration
):
    assert threading.current_thread() is threading.main_thread()
    run = make_run(dataset, tmp_path / "stopped", "--warmup", "off")
    with monkeypatch.context() as patch:
        stop_after(patch, iteration, number)
        with pytest.raises(SystemExit) as stopped, run.setting.request:
            run.train()
    assert stopped.value.code == training.UNFINISHED
    out = capsys.readouterr().out
    assert f"stopped by {number.name} after iteration {iteration}" in out
    assert f"to go on: {sys.executable}" in out
    assert not (run.folder / "blocks.h5").exists()
    with run.setting.request:
        run.train()
    assert read_log(run.folder) == read_log(finished.folder)
    expected, found = read_blocks(finished.folder), read_blocks(run.folder)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
    starts = json.loads((run.folder / "args.json").read_text())["starts"]
    assert [start["iteration"] for start in starts] == [0, iteration]
    assert ["packages" in start for start in starts] == [True, False]  # once, as they are the same


def test_a_second_ctrl_c_tells_what_a_third_one_loses(capfd):
    request = extensions.StopRequest()
    request.unsaved = lambda: 43.2
    with request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "SIGINT"
        assert capfd.readouterr().err == "\nfinishing this iteration, then a snapshot\n"
        os.kill(os.getpid(), signal.SIGINT)
        said = "Ctrl-C once more ends it at once and loses the last 43 s of training\n"
        assert capfd.readouterr().err.endswith(said)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_run_under_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with extensions.StopRequest() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.reason is None


ENDLESS = ("experiments/resnet.py", "--n", "1", "--data", "synthetic", "--subset", "64", "-b", "32",
           "--epoch", "500", "--backend", "chainer")  # fmt: skip


def read_until_an_epoch(file):
    text = b""
    while not re.search(rb" 1 +2 +0\.1 ", text):
        text += os.read(file, 4096)


def test_a_run_whose_terminal_is_closed_stops_with_a_snapshot(tmp_path):
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *ENDLESS, "-o", str(tmp_path)])
    read_until_an_epoch(terminal)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == training.UNFINISHED
    assert list(tmp_path.glob("*/snapshot_iter_*.npz"))


def test_a_run_whose_output_nobody_reads_any_more_stops_with_a_snapshot(tmp_path):
    words = [sys.executable, *ENDLESS, "-o", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        read_until_an_epoch(run.stdout.fileno())
        run.stdout.close()
        assert run.wait(60) == training.UNFINISHED
        assert run.stderr.read() == b""
    assert list(tmp_path.glob("*/snapshot_iter_*.npz"))


def test_ctrl_c_before_training_is_one_line(tmp_path):
    # A module that is imported late, and a data set that is read later yet.
    press = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "h5py.py").write_text(press)
    words = [sys.executable, *ENDLESS, "-o", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "interrupted\n")
    code = f"from resnet import command\ndef main():\n  {press}command.run(main)"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_error_stands_after_what_was_printed_before_it():
    code = """from resnet import command
def main():
  print("before")
  raise command.InputError("the error")
command.run(main)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.stdout == "before\nerror: the error\n"


def test_a_signal_in_a_runs_last_iteration_stops_before_the_next_run(
    dataset, tmp_path, monkeypatch, capsys
):
    first = make_run(dataset, tmp_path, "--runs", "2")
    monkeypatch.setattr(training, "prepare", lambda args: first.setting)
    stop_after(monkeypatch, first.schedule.iterations)
    with pytest.raises(SystemExit) as stopped:
        make = functools.partial(training.whole_network, "resnet")
        training.run(make, first.setting.args, (1,))
    assert stopped.value.code == training.UNFINISHED
    assert (tmp_path / "resnet-8-seed0" / "blocks.h5").exists()
    assert "stopped by SIGTERM after iteration 0" in capsys.readouterr().out
    assert not list((tmp_path / "resnet-8-seed1").glob("*.npz"))


@pytest.mark.parametrize("iteration", [0, 4])
def test_a_run_whose_time_is_over_stops_and_goes_on_to_the_same_end(
    dataset, finished, tmp_path, monkeypatch, capsys, iteration
):
    run = make_run(dataset, tmp_path / "stopped", "--warmup", "off")
    update = training.Updater.update

    def last(updater):
        update(updater)
        if updater.iteration == iteration:
            run.setting.request.deadline = time.monotonic()

    if iteration == 0:
        run.setting.request.deadline = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(training.Updater, "update", last)
        with pytest.raises(SystemExit) as stopped:
            run.train()
    assert stopped.value.code == training.UNFINISHED
    assert f"stopped by its time limit after iteration {iteration}" in capsys.readouterr().out
    run.setting.request.deadline = math.inf
    run.train()
    assert read_log(run.folder) == read_log(finished.folder)


def test_a_run_folder_has_one_writer_and_keeps_no_leftovers_of_killed_ones(dataset, tmp_path):
    run = make_run(dataset, tmp_path)
    run.folder.mkdir()
    left = run.folder / ".snapshot_iter_4.npz.123.tmp"
    left.write_bytes(b"half")
    (run.folder / "writable").mkdir()  # whatever else is wrong, who writes there comes first
    of_log_report = run.folder / "log3_abc9zz"
    of_the_user = run.folder / "lognotes1234"
    for folder, name in (of_log_report, "log.json"), (of_the_user, "mine"):
        folder.mkdir()
        (folder / name).touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from resnet import files\n"
         "with files.only_writer(Path(sys.argv[1])): print(); input()", run.folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    holder.stdout.readline()
    with pytest.raises(InputError, match=f"process {holder.pid} on .* is writing to it; legal:"):
        run.train()
    assert not (run.folder / "log").exists()
    holder.kill()  # the system gives the right back
    holder.communicate()
    (run.folder / "writable").rmdir()
    run.train()
    assert (run.folder / "blocks.h5").exists() and not left.exists()
    assert not of_log_report.exists() and (of_the_user / "mine").exists()


def interrupted_run(dataset, out, monkeypatch, iteration=5):
    """A run with a snapshot after every iteration, stopped after ``iteration``."""
    run = make_run(dataset, out, "--snapshot-interval", "0")
    with monkeypatch.context() as patch, pytest.raises(SystemExit), run.setting.request:
        stop_after(patch, iteration)
        run.train()
    return make_run(dataset, out, "--snapshot-interval", "0")


def test_only_the_newest_snapshots_are_kept(dataset, tmp_path, monkeypatch):
    run = interrupted_run(dataset, tmp_path, monkeypatch)
    snapshots = sorted(path.name for path in run.folder.glob("*.npz"))
    assert snapshots == ["snapshot_iter_4.npz", "snapshot_iter_5.npz"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_newest_snapshot_falls_back_to_the_one_before(
    dataset, finished, tmp_path, monkeypatch, capsys, damage
):
    run = interrupted_run(dataset, tmp_path / "damaged", monkeypatch)
    newest = run.folder / "snapshot_iter_5.npz"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "flipped": content,
            "empty": b"",
            "text": b"this is not a snapshot\n",
        }[damage]
    )
    run.train()
    output = capsys.readouterr()
    assert "snapshot_iter_5.npz is damaged" in output.err
    assert "Going on from" in output.out and "snapshot_iter_4.npz" in output.out
    assert read_log(run.folder) == read_log(finished.folder)


def flips(path, count=200):
    """The content of a file with one bit flipped, at ``count`` places of all of it."""
    content = path.read_bytes()
    rng = random.Random(len(content))
    for _ in range(count):
        place = rng.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield place, bytes(changed)


def test_any_flipped_bit_of_a_snapshot_is_noticed(finished):
    path = finished.folder / "snapshot_iter_8.npz"
    trainer, snapshots = finished.make_trainer()
    for place, content in flips(path):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="sha256"):
            snapshots._read(path, trainer)
        assert trainer.updater.iteration == 0, place


def save_as_before(path, *left_out, **changes):
    """Write a snapshot again as it was before there was a digest, and with other arrays."""
    with np.load(path) as file:
        state = {name: file[name] for name in file.files if name not in ("sealed", *left_out)}
    np.savez(path, **{**state, **changes})


def test_a_snapshot_of_before_there_was_a_digest_is_read(dataset, finished, tmp_path, monkeypatch):
    run = interrupted_run(dataset, tmp_path / "old", monkeypatch)
    save_as_before(run.folder / "snapshot_iter_5.npz")
    run.train()
    assert read_log(run.folder) == read_log(finished.folder)


FC = "updater/network/fc/W"
DAMAGES = {  # of a snapshot without a digest, and what is said of it
    "shape": ({FC: np.zeros((10, 1), "f")}, "found float32 (10, 1), legal: float32 (10, 64)"),
    "one number": ({FC: np.zeros((), "f")}, "found float32 (), legal: float32 (10, 64)"),
    "type": ({FC: np.zeros((10, 64))}, "found float64 (10, 64), legal: float32 (10, 64)"),
    "pickle": ({FC: np.array([{}])}, "object"),
    "foreign": ({"updater/network/fc/V": np.zeros(1)}, "fc/V: found float64 (1,), legal: nothing"),
    "rows": ({"extensions/LogReport/x": np.zeros(9)}, "x: found float64 (9,), legal: float64 ()"),
    "iteration": ({"updater/iteration": 9}, "updater/iteration: found 9, legal: up to 8"),
    "before": ({"updater/iteration": -1}, "updater/iteration: found -1, legal: from 0 up"),
    "rate": ({"updater/lr": -0.1}, "updater/lr: found -0.1, legal: from 0 up"),
    "variance": ({"updater/network/conv1/bn/avg_var": np.full(16, -1, "f")}, "avg_var: found -1"),
    "log": ({"extensions/LogReport/_log": "[{"}, "Expecting"),
    "nested": ({"extensions/LogReport/_log": "[" * 100_000}, "recursion"),
    "no list": ({"extensions/LogReport/_log": "7"}, "not a list"),
    "errors": ({"updater/warm_up/errors": "0.5,half"}, "could not convert"),
    "identity": ({"identity": "7"}, "not iterable"),
}


def test_what_a_damaged_snapshot_holds_never_reaches_the_run(
    dataset, tmp_path, monkeypatch, capsys
):
    run = interrupted_run(dataset, tmp_path, monkeypatch)
    newest = run.folder / "snapshot_iter_5.npz"
    whole = newest.read_bytes()

    def check(message):
        trainer, snapshots = run.make_trainer()
        assert snapshots.resume_newest(trainer) == run.folder / "snapshot_iter_4.npz", message
        assert trainer.updater.iteration == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{newest} is damaged" in line and message in line
        assert "trying the one before" in line

    capsys.readouterr()
    for changes, message in DAMAGES.values():
        newest.write_bytes(whole)
        save_as_before(newest, **changes)
        check(message)
    newest.write_bytes(whole)
    save_as_before(newest, FC)
    check("found nothing, legal: float32 (10, 64)")
    newest.write_bytes(whole)
    save_as_before(newest)
    old = newest.read_bytes()
    # NumPy would stop before the member's end, see no checksum, and Chainer would broadcast.
    newest.write_bytes(old.replace(b"(64, 64, 3, 3)", b"(64, 64, 3, 1)"))
    check("Bad CRC-32")
    newest.write_bytes(old.replace(b"(64, 64, 3, 3)", b"(64, 64, 3, x)"))
    check("Bad CRC-32")
    newest.write_bytes(whole[: -len(files.SEAL) - 64])
    check("its sha256 is missing")
    newest.unlink()
    os.mkfifo(newest)
    check("not a regular file")


def test_a_damaged_snapshot_takes_no_intact_ones_place(dataset, tmp_path, monkeypatch):
    run = interrupted_run(dataset, tmp_path, monkeypatch)
    (run.folder / "snapshot_iter_7.npz").write_bytes(b"damaged")
    with monkeypatch.context() as patch, pytest.raises(SystemExit), run.setting.request:
        stop_after(patch, 6)
        run.train()
    names = sorted(path.name for path in run.folder.glob("*.npz"))
    assert names == [f"snapshot_iter_{i}.npz" for i in (5, 6, 7)]


def test_without_an_intact_snapshot_training_begins_anew(
    dataset, finished, tmp_path, monkeypatch, capsys
):
    run = interrupted_run(dataset, tmp_path / "lost", monkeypatch)
    for path in run.folder.glob("*.npz"):
        path.write_bytes(b"damaged")
    run.train()
    assert "beginning anew, as there is no other" in capsys.readouterr().err
    assert read_log(run.folder) == read_log(finished.folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda log: log.unlink(),
        lambda log: log.write_bytes(b""),
        lambda log: log.write_text(log.read_text()[:-200]),
        lambda log: log.write_text("[" * 100_000),
        lambda log: log.write_text(json.dumps(json.loads(log.read_text())[:-1])),
        lambda log: log.write_text(log.read_text().replace("main/loss", "main/boss")),
    ],
    ids=["missing", "empty", "half", "nested", "an epoch short", "another key"],
)
def test_a_damaged_log_of_a_complete_run_is_written_again(finished, capsys, spoil):
    log = finished.folder / "log"
    before = log.read_bytes()
    spoil(log)
    finished.train()
    output = capsys.readouterr()
    assert log.read_bytes() == before
    assert "already complete" in output.out and "last epoch (3)" in output.out
    (line,) = output.err.splitlines()
    assert line.startswith(f"warning: {log}: damaged (") and "written again from" in line


def test_a_damaged_log_that_no_snapshot_holds_is_one_line(finished):
    (finished.folder / "log").write_bytes(b"")
    (finished.folder / "snapshot_iter_8.npz").unlink()
    with pytest.raises(InputError, match=r"log: damaged .*no snapshot holds it; legal: remove"):
        finished.train()


def test_a_log_is_never_half_written(finished, monkeypatch):
    log = finished.folder / "log"
    before = log.read_bytes()

    def full(path, text):
        path.open("w").write(text[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        extensions.write_log(log, [{"epoch": 1}])
    assert log.read_bytes() == before and not list(log.parent.glob(".*.tmp"))


def test_damaged_blocks_of_a_complete_run_are_written_again(finished, capsys):
    path = finished.folder / "blocks.h5"
    before = read_blocks(finished.folder)
    log = read_log(finished.folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    finished.train()
    assert "blocks.h5: damaged" in capsys.readouterr().err
    after = read_blocks(finished.folder)
    assert all((after[name] == value).all() for name, value in before.items())
    assert read_log(finished.folder) == log


def test_resume_from_a_named_snapshot(dataset, finished, tmp_path, monkeypatch, capsys):
    source = interrupted_run(dataset, tmp_path / "source", monkeypatch)
    run = make_run(
        dataset, tmp_path / "target", "--resume", str(source.folder / "snapshot_iter_4.npz")
    )
    run.train()
    assert "iteration 4" in capsys.readouterr().out
    assert read_log(run.folder) == read_log(finished.folder)


def test_resume_refuses_what_is_no_snapshot_of_this_run(dataset, tmp_path, monkeypatch):
    source = interrupted_run(dataset, tmp_path / "source", monkeypatch)
    snapshot = source.folder / "snapshot_iter_5.npz"
    model = tmp_path / "model.npz"
    chainer.serializers.save_npz(model, network.resnet(1))
    missing = tmp_path / "missing.npz"
    text = tmp_path / "text.npz"
    text.write_text("hello")
    cases = [
        (missing, 1, "no such file"),
        (text, 1, "not a readable snapshot"),
        (model, 1, "weights but not the state"),
        (snapshot, 2, "holds --n 1, asked for is --n 2; "),
    ]
    for path, n, message in cases:
        run = make_run(dataset, tmp_path / f"out{n}", "--resume", str(path), n=n)
        with pytest.raises(InputError, match=message) as error:
            run.train()
        assert str(path) in str(error.value)


def test_a_folder_of_another_run_is_refused(dataset, finished, tmp_path):
    with pytest.raises(InputError, match="holds --batchsize 16, asked for is --batchsize 8"):
        make_run(dataset, tmp_path, "-b", "8").train()


@pytest.mark.parametrize(
    ("words", "holds", "asked"),
    [
        (("-e", "2"), "--epoch 3", "--epoch 2"),
        (("-e", "3", "--drops", "1"), "--epoch 3 --drops 1.6 2.4", "--epoch 3 --drops 1.2"),
        (("--subset", "20", "-e", "3"), "--subset 40", "--subset 20"),
        (("--warmup", "on", "-e", "3"), "--warmup off", "--warmup on"),
    ],
)
def test_a_folder_of_another_run_is_told_in_flags(dataset, tmp_path, words, holds, asked):
    run = make_run(dataset, tmp_path)
    other = make_run(dataset, tmp_path, *words)
    assert other.folder == run.folder
    run.folder.mkdir()
    training.write_record(run.folder, run.identity, [])
    with pytest.raises(InputError) as error:
        other.train()
    assert str(error.value) == (
        f"{run.folder}: holds {holds}, asked for is {asked}; "
        "give that run's flags, or another --out"
    )


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


def test_a_shortened_run_lies_beside_the_full_one_and_is_no_other_run(dataset, tmp_path):
    words = ["--n", "1", "--data", "synthetic", "--out", str(tmp_path)]
    setting = make_run(dataset, tmp_path).setting
    full, quarter = (
        training.whole_network("resnet", 1, 0, replace(setting, args=args))
        for args in map(
            flags.add_schedule(flags.parser("")).parse_args,
            (["-b", "16", *words], ["-b", "16", *words, "--shorten", "4"]),
        )
    )
    assert (full.folder.name, quarter.folder.name) == ("resnet-8-seed0", "resnet-8-shorten4-seed0")
    assert quarter.identity["schedule"] == {
        "name": "he2015 / 4", "iterations": 16_000, "drops": [8_000, 12_000],
    }  # fmt: skip
    assert {**quarter.identity, "schedule": full.identity["schedule"]} == full.identity


def test_augmentation_is_part_of_a_run_and_of_its_folders_name(dataset, finished, tmp_path):
    run = make_run(dataset, tmp_path, "--augmentation", "none")
    run.train()
    assert run.folder.name == "resnet-8-augmentation-none-seed0"
    assert run.identity == {**finished.identity, "augmentation": "none"}
    assert read_log(run.folder) != read_log(finished.folder)
    updater = run.make_trainer()[0].updater
    x, _ = updater.batch()
    batches = updater.batches
    np.testing.assert_array_equal(x, batches.images.batch(batches.indices(0))[0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["-b", "41"], "--batchsize: found 41, legal: up to 40"),
        (["--subset", "50"], "--subset: found 50"),
        (["--subset", "8"], "--batchsize: found 16, legal: up to 8"),
    ],
)
def test_impossible_sizes_are_refused(dataset, tmp_path, words, message):
    with pytest.raises(InputError, match=message) as error:
        make_run(dataset, tmp_path, *words)
    assert error.value.code == 2


def test_unwritable_out_is_refused_before_training(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out: cannot write to"):
        make_run(dataset, tmp_path / "file").train()


def test_an_interrupted_write_leaves_the_older_snapshot(dataset, tmp_path, monkeypatch):
    run = interrupted_run(dataset, tmp_path, monkeypatch)
    before = set(os.listdir(run.folder))
    run.setting.device.use()
    trainer, snapshots = run.make_trainer()
    snapshots.resume_newest(trainer)

    def full(path, content):
        path.open("wb").write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    trainer.updater.iteration = 6
    trainer._start_at = 0
    with pytest.raises(OSError, match="No space left"):
        snapshots.save(trainer)
    assert set(os.listdir(run.folder)) == before


def test_evaluation_counts_every_image_once_whatever_the_batches(dataset, monkeypatch):
    net = network.resnet(1)
    images = Images(
        dataset.test_x, dataset.test_y, np.zeros((3, 32, 32), "f"), chainer.get_device("@numpy")
    )
    whole = extensions.predict(net, images)
    monkeypatch.setattr(extensions, "EVALUATION_BATCH", 5)  # 12 images: 5, 5 and 2
    parts = extensions.predict(net, images)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert chainer.config.train


def test_evaluation_reports_correct_over_total_where_chainers_own_does_not(dataset, monkeypatch):
    monkeypatch.setattr(extensions, "EVALUATION_BATCH", 5)
    right = np.zeros((12, 10), "f")
    right[np.arange(12), dataset.test_y] = 9
    right[10:] = -right[10:]  # the two images of the last, smaller batch are wrong
    batches = iter([right[:5], right[5:10], right[10:]])
    net = lambda x: chainer.Variable(next(batches))  # noqa: E731
    images = Images(
        dataset.test_x, dataset.test_y, np.zeros((3, 32, 32), "f"), chainer.get_device("@numpy")
    )
    logits = extensions.predict(net, images)
    assert (logits.argmax(1) == dataset.test_y).sum() == 10


def test_a_diverged_run_is_logged_to_its_end(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.schedule, "INITIAL_RATE", 1e30)
    run = make_run(dataset, tmp_path)
    run.train()
    log = read_log(run.folder)
    assert len(log) == 3 and np.isnan(log[-1]["main/loss"])
    assert "last epoch (3)" in capsys.readouterr().out


def test_ctrl_c_says_that_the_iteration_is_being_finished(capfd):
    with extensions.StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.reason == "SIGINT"
    assert "finishing this iteration, then a snapshot" in capfd.readouterr().err


class Terminal(io.StringIO):
    """A terminal of some width, which changes with every line when there are several."""

    def __init__(self, *widths):
        super().__init__()
        self.widths = itertools.cycle(widths)

    def isatty(self):
        return True

    def fileno(self):
        return self

    def size(self):
        return os.terminal_size((next(self.widths), 24))


def shown_on(terminal, dataset, out, monkeypatch):
    """What a run writes to a terminal, as the lines that it overwrites one another."""
    monkeypatch.setattr(os, "get_terminal_size", Terminal.size)
    run = make_run(dataset, out)
    run.folder.mkdir(parents=True)
    trainer, _ = run.make_trainer()
    trainer.get_extension("Progress").out = terminal
    trainer.run()
    return terminal.getvalue().replace("\r\033[K", "\n").split("\n")


@pytest.mark.parametrize("width", [200, 88, 80, 60, 40, 20, 10])
def test_progress_fits_a_terminal_of_any_width(dataset, tmp_path, monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    lines = shown_on(Terminal(width), dataset, tmp_path, monkeypatch)
    assert max(map(len, lines)) < width
    assert len([line for line in lines if line.startswith("epoch")]) == 1
    if width >= 40:
        (bar,) = [line for line in lines if "iteration 1 of 8" in line]
        assert "left" in bar and bar.startswith("[")
        assert "test error" in next(line for line in lines if line.startswith("epoch"))
    assert len([line for line in lines if re.match(r" +[123]  ", line)]) == 3


def test_progress_follows_a_resize_and_names_its_columns_again(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    lines = shown_on(Terminal(100, 50, 50, 50), dataset, tmp_path, monkeypatch)
    heads = [line for line in lines if line.startswith("epoch")]
    assert len(set(heads)) == 2 and "left" in heads[0]


def test_there_is_no_bar_on_the_terminal_that_a_launcher_gives_its_processes(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal(80)
    shown_on(terminal, dataset, tmp_path, monkeypatch)
    assert "\r" not in terminal.getvalue() and "of 8" not in terminal.getvalue()
    assert "left" in terminal.getvalue()  # and every column


@pytest.mark.parametrize("name", ["7", "gpu", "-2", "@cupy:9", "1.5"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match="--device: found") as error:
        flags.find_device(name)
    assert error.value.code == 2


@pytest.mark.parametrize("name", ["cpu", "-1", "@numpy"])
def test_spellings_of_the_cpu(name):
    assert flags.find_device(name).xp is np


@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, -1, True, "1", None])
@pytest.mark.parametrize("key", ["elapsed_time", "epoch", "test/main/accuracy"])
def test_impossible_numbers_in_a_log_are_noticed(key, value):
    entry = dict.fromkeys(("epoch", "iteration", "elapsed_time", "lr", "main/accuracy"), 1)
    entry |= {"main/loss": math.nan, "test/main/loss": 2.0, "test/main/accuracy": 0.5}
    extensions.check_log([entry], "test", 1)
    with pytest.raises(ValueError, match=key):
        extensions.check_log([{**entry, key: value}], "test")
