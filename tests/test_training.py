"""A whole run in its folder: log, snapshots, resume, refusals."""

import functools
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import chainer
import h5py
import numpy as np
import pytest
from conftest import ROOT

from resnet import extensions, flags, network, schedule, training, weights
from resnet.command import InputError
from resnet.updater import Images


def make_run(dataset, out, *words, n=1):
    args = flags.add_schedule(flags.parser("")).parse_args(
        ["--n", str(n), "-b", "16", "-e", "3", "--out", str(out), *words]
    )
    setting = training.Setting(args, dataset, "test", chainer.get_device("@numpy"), "chainer")
    return training.Run("resnet", n, args.seed, setting)


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
    assert start["data digest"] == finished.dataset.digest
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("iteration", [1, 5])
def test_a_stopped_run_goes_on_to_the_same_end(
    dataset, finished, tmp_path, monkeypatch, capsys, number, iteration
):
    assert threading.current_thread() is threading.main_thread()
    run = make_run(dataset, tmp_path / "stopped", "--warmup", "off")
    with monkeypatch.context() as patch:
        stop_after(patch, iteration, number)
        with pytest.raises(SystemExit) as stopped, run.request:
            run.train()
    assert stopped.value.code == training.UNFINISHED
    out = capsys.readouterr().out
    assert f"stopped by {number.name} after iteration {iteration}" in out
    assert f"to go on: {sys.orig_argv[0]} " in out
    assert not (run.folder / "blocks.h5").exists()
    with run.request:
        run.train()
    assert read_log(run.folder) == read_log(finished.folder)
    expected, found = read_blocks(finished.folder), read_blocks(run.folder)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
    starts = json.loads((run.folder / "args.json").read_text())["starts"]
    assert [start["iteration"] for start in starts] == [0, iteration]
    assert ["packages" in start for start in starts] == [True, False]  # once, as they are the same


def test_a_signal_in_a_runs_last_iteration_stops_before_the_next_run(
    dataset, tmp_path, monkeypatch, capsys
):
    first = make_run(dataset, tmp_path, "--runs", "2")
    monkeypatch.setattr(training, "prepare", lambda args: first.setting)
    stop_after(monkeypatch, first.schedule.iterations)
    with pytest.raises(SystemExit) as stopped:
        training.run(functools.partial(training.Run, "resnet"), first.args, (1,))
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
            run.request.deadline = time.monotonic()

    if iteration == 0:
        run.request.deadline = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(training.Updater, "update", last)
        with pytest.raises(SystemExit) as stopped:
            run.train()
    assert stopped.value.code == training.UNFINISHED
    assert f"stopped by its time limit after iteration {iteration}" in capsys.readouterr().out
    run.request.deadline = math.inf
    run.train()
    assert read_log(run.folder) == read_log(finished.folder)


def test_a_run_folder_has_one_writer_and_keeps_no_leftovers_of_killed_ones(dataset, tmp_path):
    run = make_run(dataset, tmp_path)
    run.folder.mkdir()
    left = run.folder / ".snapshot_iter_4.npz.123.tmp"
    left.write_bytes(b"half")
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
    run.train()
    assert (run.folder / "blocks.h5").exists() and not left.exists()


def interrupted_run(dataset, out, monkeypatch, iteration=5):
    """A run with a snapshot after every iteration, stopped after ``iteration``."""
    run = make_run(dataset, out, "--snapshot-interval", "0")
    with monkeypatch.context() as patch, pytest.raises(SystemExit), run.request:
        stop_after(patch, iteration)
        run.train()
    run.request = extensions.StopRequest()
    return run


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
        training.Run("resnet", 1, 0, replace(setting, args=args))
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
    np.testing.assert_array_equal(x, updater.images.batch(updater._indices(np))[0])


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

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
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
    lines = shown_on(Terminal(width), dataset, tmp_path, monkeypatch)
    assert max(map(len, lines)) < width
    assert len([line for line in lines if line.startswith("epoch")]) == 1
    if width >= 40:
        (bar,) = [line for line in lines if "iteration 1 of 8" in line]
        assert "left" in bar and bar.startswith("[")
        assert "test error" in next(line for line in lines if line.startswith("epoch"))
    assert len([line for line in lines if re.match(r" +[123]  ", line)]) == 3


def test_progress_follows_a_resize_and_names_its_columns_again(dataset, tmp_path, monkeypatch):
    lines = shown_on(Terminal(100, 50, 50, 50), dataset, tmp_path, monkeypatch)
    heads = [line for line in lines if line.startswith("epoch")]
    assert len(set(heads)) == 2 and "left" in heads[0]


def test_there_is_no_bar_on_the_terminal_that_a_launcher_gives_its_processes(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
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
