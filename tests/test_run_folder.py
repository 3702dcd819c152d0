"""What a run keeps: snapshots, log, and the refusal of another run."""

import json
import math
import os
from pathlib import Path

import chainer
import numpy as np
import pytest
from conftest import deny, flips, interrupted_run, make_run, read_log, stop_after

from plots import logs
from resnet import files, network, run_folder
from resnet.command import InputError

pytestmark = pytest.mark.usefixtures("handlers")


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


def test_a_run_that_goes_on_elsewhere_says_so(dataset, tmp_path, monkeypatch, capsys):
    run = interrupted_run(dataset, tmp_path, monkeypatch)
    record = run.folder / "args.json"
    content = json.loads(record.read_text())
    content["starts"][-1]["device"] = "CPU, of another kind"
    record.write_text(json.dumps(content))
    run.train()
    assert "NOTE: begun on CPU, of another kind: on another" in capsys.readouterr().out


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
    "nested": ({"extensions/LogReport/_log": "[" * 100_000}, "while decoding a JSON array"),
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


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("words", [(), ("--resume", "snapshot_iter_5.npz")], ids=["", "resume"])
def test_a_snapshot_that_cannot_be_read_stops_training_and_nothing_is_overwritten(
    dataset, tmp_path, monkeypatch, words
):
    """It may be intact, and what training would go on from instead is behind it."""
    run = interrupted_run(dataset, tmp_path, monkeypatch)
    newest = run.folder / "snapshot_iter_5.npz"
    before = contents(run.folder)
    words = [run.folder / word if word == newest.name else word for word in words]
    with monkeypatch.context() as patch:
        deny(patch, newest)
        with pytest.raises(
            InputError, match=f"{newest}: cannot be read .Permission denied.; legal"
        ):
            make_run(dataset, tmp_path, *map(str, words)).train()
    assert contents(run.folder) == before


@pytest.mark.parametrize("name", ["args.json", "blocks.h5", "log"])
def test_a_complete_run_of_which_a_file_cannot_be_read_is_left_as_it_is(
    finished, monkeypatch, name
):
    before = contents(finished.folder)
    with monkeypatch.context() as patch:
        deny(patch, finished.folder / name)
        with pytest.raises(InputError, match=f"{name}: cannot be read .Permission denied.; legal"):
            finished.train()
    assert contents(finished.folder) == before


def test_no_log_is_given_up_while_its_snapshot_cannot_be_read(finished, monkeypatch):
    (finished.folder / "log").write_bytes(b"")
    deny(monkeypatch, finished.folder / "snapshot_iter_8.npz")
    with pytest.raises(InputError, match=r"snapshot_iter_8\.npz: cannot be read"):
        finished.train()


def test_what_is_no_file_in_the_place_of_the_blocks_is_refused_before_training(dataset, tmp_path):
    run = make_run(dataset, tmp_path)
    (run.folder / "blocks.h5").mkdir(parents=True)
    with pytest.raises(InputError, match=r"blocks\.h5: no such file; legal"):
        run.train()


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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda log: log.unlink(),
        lambda log: log.write_bytes(b""),
        lambda log: log.write_text(log.read_text()[:-200]),
        lambda log: log.write_text("[" * 100_000),
        lambda log: log.write_text(json.dumps(json.loads(log.read_text())[:-1])),
        lambda log: log.write_text(log.read_text().replace("main/loss", "main/boss")),
        lambda log: log.write_text(log.read_text().replace('"epoch": 3', '"epoch": 2')),
    ],
    ids=["missing", "empty", "half", "nested", "an epoch short", "another key", "another digit"],
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


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("log", '"epoch": 3', '"epoch": 2'), ("args.json", '"batchsize": 16', '"batchsize": 17')],
)
def test_plots_leave_a_complete_run_out_of_which_a_digit_has_changed(finished, name, old, new):
    path = finished.folder / name
    assert logs.read_run(finished.folder / "log").identity["batchsize"] == 16
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match="changed since training ended: the sha256"):
        logs.read_run(finished.folder / "log")


def test_a_damaged_log_that_no_snapshot_holds_is_one_line(finished):
    (finished.folder / "log").write_bytes(b"")
    (finished.folder / "snapshot_iter_8.npz").unlink()
    with pytest.raises(InputError, match=r"log: damaged .*no snapshot holds it; legal: remove"):
        finished.train()


def test_a_log_is_never_half_written(finished, monkeypatch):
    log = finished.folder / "log"
    before = log.read_bytes()

    def full(path, content):
        path.open("wb").write(content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        run_folder.write_log(log, [{"epoch": 1}])
    assert log.read_bytes() == before and not list(log.parent.glob(".*.tmp"))


@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, -1, True, "1", None])
@pytest.mark.parametrize("key", ["elapsed_time", "epoch", "test/main/accuracy"])
def test_impossible_numbers_in_a_log_are_noticed(key, value):
    entry = dict.fromkeys(("epoch", "iteration", "elapsed_time", "lr", "main/accuracy"), 1)
    entry |= {"main/loss": math.nan, "test/main/loss": 2.0, "test/main/accuracy": 0.5}
    run_folder.check_log([entry], "test", 1)
    with pytest.raises(ValueError, match=key):
        run_folder.check_log([{**entry, key: value}], "test")


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
        (tmp_path, 1, "not a file; legal: "),
        (text, 1, "not a readable snapshot"),
        (model, 1, "weights but not the state"),
        (snapshot, 2, "holds --n 1, asked for is --n 2; "),
    ]
    for path, n, message in cases:
        run = make_run(dataset, tmp_path / f"out{n}", "--resume", str(path), n=n)
        with pytest.raises(InputError, match=message) as error:
            run.train()
        assert str(path) in str(error.value)
        assert not run.folder.parent.exists()


def test_a_folder_that_was_there_stays_though_nothing_is_written_into_it(dataset, tmp_path):
    run = make_run(dataset, tmp_path, "--resume", str(tmp_path / "missing.npz"))
    run.folder.mkdir()
    with pytest.raises(InputError, match="no such file"):
        run.train()
    assert run.folder.exists()


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
    run_folder.write_record(run.folder, run.identity, [])
    with pytest.raises(InputError) as error:
        other.train()
    assert str(error.value) == (
        f"{run.folder}: holds {holds}, asked for is {asked}; "
        "give that run's flags, or another --out"
    )


@pytest.mark.parametrize("schedule", [None, 3, [], {}, {"name": 3}, {"name": "custom"}])
def test_a_record_with_an_impossible_schedule_is_one_line(dataset, tmp_path, schedule):
    run = make_run(dataset, tmp_path)
    run.folder.mkdir()
    run_folder.write_record(run.folder, {**run.identity, "schedule": schedule}, [])
    with pytest.raises(InputError, match="damaged, as it names an impossible schedule"):
        run.train()


def test_unwritable_out_is_refused_before_training(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out: cannot write to"):
        make_run(dataset, tmp_path / "file").train()
