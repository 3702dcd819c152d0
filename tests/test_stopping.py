"""Training that is asked to stop: by a signal, a closed terminal, or its time limit."""

import functools
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import (
    ROOT,
    make_run,
    python,
    read_blocks,
    read_log,
    stop_after,
)

from resnet import (
    command,
    stopping,
    training,
)

pytestmark = pytest.mark.usefixtures("handlers")


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
    assert stopped.value.code == command.STOPPED
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
    request = stopping.StopRequest()
    request.unsaved = lambda: 43.2
    with request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "SIGINT"
        assert capfd.readouterr().err == "\nfinishing this iteration, then a snapshot\n"
        os.kill(os.getpid(), signal.SIGINT)
        said = "Ctrl-C once more ends it at once and loses the last 43 s of training\n"
        assert capfd.readouterr().err.endswith(said)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_ctrl_c_says_that_the_iteration_is_being_finished(capfd):
    with stopping.StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.reason == "SIGINT"
    assert "finishing this iteration, then a snapshot" in capfd.readouterr().err


def test_a_run_under_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping.StopRequest() as request:
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
    assert os.waitstatus_to_exitcode(status) == command.STOPPED
    assert list(tmp_path.glob("*/snapshot_iter_*.npz"))


def test_a_run_whose_output_nobody_reads_any_more_stops_with_a_snapshot(tmp_path):
    words = [sys.executable, *ENDLESS, "-o", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        read_until_an_epoch(run.stdout.fileno())
        run.stdout.close()
        assert run.wait(60) == command.STOPPED
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


def test_a_signal_in_a_runs_last_iteration_stops_before_the_next_run(
    dataset, tmp_path, monkeypatch, capsys
):
    first = make_run(dataset, tmp_path, "--runs", "2")
    monkeypatch.setattr(training, "prepare", lambda args: first.setting)
    stop_after(monkeypatch, first.schedule.iterations)
    with pytest.raises(SystemExit) as stopped:
        make = functools.partial(training.whole_network, "resnet")
        training.run(make, first.setting.args, (1,))
    assert stopped.value.code == command.STOPPED
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
    assert stopped.value.code == command.STOPPED
    assert f"stopped by its time limit after iteration {iteration}" in capsys.readouterr().out
    run.setting.request.deadline = math.inf
    run.train()
    assert read_log(run.folder) == read_log(finished.folder)
