"""A whole run, from its flags to its last line."""

import json
from dataclasses import replace

import chainer
import numpy as np
import pytest
from conftest import make_run, read_blocks, read_log

from resnet import cifar10, flags, schedule, training, weights
from resnet.command import InputError
from resnet.network import ARCHITECTURES, GROUPS

pytestmark = pytest.mark.usefixtures("handlers")


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


def test_the_log_ends_with_accuracy_and_loss_of_the_saved_network_on_all_test_images(
    finished, dataset
):
    path = finished.folder / "blocks.h5"
    network, _ = weights.restore(path)
    x = (dataset.test_x / 255 - weights.read_mean(path)).astype(np.float32)
    with chainer.using_config("train", False):
        y = network(x).array.astype(np.float64)
    last = read_log(finished.folder)[-1]
    assert last["test/main/accuracy"] == (y.argmax(axis=1) == dataset.test_y).mean()
    of_labels = y[np.arange(len(y)), dataset.test_y]
    loss = np.mean(np.log(np.exp(y).sum(axis=1)) - of_labels)
    assert last["test/main/loss"] == pytest.approx(loss, rel=1e-4)


def test_a_step_is_of_momentum_0_9_and_weight_decay_1e_4(dataset, tmp_path):
    """He et al. 2015, 4.2."""
    optimizer = make_run(dataset, tmp_path).make_trainer()[0].updater.optimizer
    optimizer.lr = 0.1
    weight, bias = optimizer.target.fc.W, optimizer.target.fc.b
    weight.array[...], bias.array[...] = 1, 0
    for _ in range(2):
        for parameter in optimizer.target.params():
            parameter.grad = np.zeros_like(parameter.array)
        bias.grad[...] = 1
        optimizer.update()
    np.testing.assert_allclose(bias.array, -0.1 - 0.19, rtol=1e-4)
    np.testing.assert_allclose(1 - weight.array, (1 + 1.9) * 1e-5, rtol=0.01)


def test_a_seed_decides_both_the_first_weights_and_the_batches(dataset, tmp_path):
    first, other = (
        make_run(dataset, tmp_path, "--seed", seed).make_trainer()[0].updater for seed in "01"
    )
    networks = first.optimizer.target, other.optimizer.target
    for one, another in zip(*(each.params() for each in networks), strict=True):
        assert one.ndim == 1 or (one.array != another.array).any()
    assert first.batches.indices(0).tolist() != other.batches.indices(0).tolist()
    assert (first.batches.seed, other.batches.seed) == (0, 1)  # of crops and flips, too


def test_of_a_subset_the_first_images_are_trained_on_and_all_test_images_evaluated(
    dataset, tmp_path
):
    run = make_run(dataset, tmp_path, "--subset", "20")
    images = run.make_trainer()[0].updater.batches.images
    np.testing.assert_array_equal(images.x, dataset.train_x[:20])
    np.testing.assert_array_equal(images.y, dataset.train_y[:20])
    np.testing.assert_allclose(images.mean, (dataset.train_x[:20] / 255).mean(axis=0), atol=1e-6)
    assert run.identity["training images"] == 20
    assert len(run.setting.dataset.test_y) == 12


def test_validation_is_on_5000_held_out_images_and_none_of_the_test_set(monkeypatch, tmp_path):
    """He et al. 2015, 4.2: the 45k/5k split."""
    x = np.arange(5020, dtype=np.uint32).view(np.uint8).reshape(-1, 4)[:, :3, None, None]
    x = np.broadcast_to(x, (5020, 3, 32, 32))  # images that hold their own number
    y = np.arange(5020, dtype=np.int32) % 10
    whole = cifar10.Dataset("tiny", x, y, x[:30] + 128, y[:30], cifar10.CLASSES, "here", "")
    monkeypatch.setattr(cifar10, "load", lambda data: whole)
    words = ["--validate", "-b", "16", "--device", "cpu", "--out", str(tmp_path)]
    setting = training.prepare(flags.add_schedule(flags.parser("")).parse_args(words))
    assert setting.evaluation == "validation"
    assert (setting.size, len(setting.dataset.test_y)) == (20, 5000)
    parts = [part[:, :2, 0, 0].astype(int) @ (1, 256) for part in
             (setting.dataset.train_x, setting.dataset.test_x)]  # fmt: skip
    assert sorted(np.concatenate(parts)) == list(range(5020))


@pytest.mark.parametrize(
    ("n", "words", "warms_up"),
    [
        (17, (), False),
        (18, (), True),
        (18, ("--warmup", "off"), False),
        (1, ("--warmup", "on"), True),
    ],
)
def test_nets_of_110_layers_and_more_warm_up_unless_a_flag_says_otherwise(
    dataset, tmp_path, n, words, warms_up
):
    """He et al. 2015, 4.2."""
    run = make_run(dataset, tmp_path, *words, n=n)
    assert run.identity["warm-up"] == warms_up
    assert run.make_trainer()[0].updater.warm_up.active == warms_up


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        ((), ("he2015", 64_000, (32_000, 48_000))),
        (("--shorten", "4"), ("he2015 / 4", 16_000, (8_000, 12_000))),
        # 100 epochs of 40 images in batches of 16, with drops at 40 and 80.
        (("--schedule", "report100"), ("report100", 250, (100, 200))),
        (("--schedule", "report100", "--shorten", "2"), ("report100 / 2", 125, (50, 100))),
        (("--epoch", "8"), ("custom", 20, (10, 15))),
        (("--epoch", "8", "--drops", "2", "4"), ("custom", 20, (5, 10))),
    ],
)
def test_the_schedule_is_that_of_the_flags(dataset, tmp_path, words, plan):
    words = ["-b", "16", "--out", str(tmp_path), *words]
    args = flags.add_schedule(flags.parser("")).parse_args(words)
    setting = replace(make_run(dataset, tmp_path).setting, args=args)
    assert training.choose_schedule(setting) == schedule.Schedule(*plan)


def test_last_and_best_epoch_are_told_apart(finished, capsys):
    folder = finished.folder
    log = json.loads((folder / "log").read_text())
    for entry, accuracy in zip(log, (0.5, 0.75, 0.25), strict=True):
        entry["test/main/accuracy"] = accuracy
    (folder / "log").write_text(json.dumps(log))
    training.report(folder, finished.setting)
    out = capsys.readouterr().out
    assert "last epoch (3): 25.00%" in out
    assert "best epoch (2): 75.00%" in out


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_loss_that_is_no_number_is_told_in_whichever_epoch(finished, capsys, epoch):
    log = json.loads((finished.folder / "log").read_text())
    training.report(finished.folder, finished.setting)
    assert "DIVERGED" not in capsys.readouterr().out
    log[epoch]["main/loss"] = float("inf")
    (finished.folder / "log").write_text(json.dumps(log))
    training.report(finished.folder, finished.setting)
    assert "DIVERGED" in capsys.readouterr().out


def test_of_partial_training_the_best_epoch_is_one_of_the_last_stage(finished):
    log = json.loads((finished.folder / "log").read_text())
    for entry, stage, accuracy in zip(log, (1, 2, 2), (0.9, 0.5, 0.4), strict=True):
        entry |= {"stage": stage, "test/main/accuracy": accuracy}
    (finished.folder / "log").write_text(json.dumps(log))
    last, best, _ = training.result(finished.folder, "test")
    assert (last["test/main/accuracy"], best["test/main/accuracy"]) == (0.4, 0.5)


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


@pytest.mark.parametrize(
    ("change", "holds", "asked"),
    [
        ({"architecture": "plain"}, "architecture = plain", "architecture = resnet"),
        ({"n": 2}, "n = 2", "n = 1"),
        ({"seed": 7}, "seed = 7", "seed = 0"),
        ({"dataset": "CIFAR-10"}, "dataset = CIFAR-10", "dataset = tiny"),
        ({"iteration": 9}, "iteration = 9", "iteration = 8"),
        ({"iteration": 7}, "iteration = 7", "iteration = 8"),
        (
            {"groups": GROUPS[1:]},
            "groups = conv2, conv3, conv4, fc",
            f"groups = {', '.join(GROUPS)}",
        ),
    ],
    ids=str,
)
def test_blocks_of_another_run_make_no_run_complete_and_are_kept(finished, change, holds, asked):
    path = finished.folder / "blocks.h5"
    found = replace(weights.describe(path), **change)
    network = ARCHITECTURES[found.architecture](found.n)
    weights.save(path, network, found, weights.read_mean(path))
    before = path.read_bytes()
    with pytest.raises(InputError) as error:
        finished.train()
    assert str(error.value) == (
        f"{path}: of another run, holds {holds}; legal here: {asked}, or no such file"
    )
    assert path.read_bytes() == before
    path.unlink()
    finished.train()
    assert finished.is_complete()


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


def test_a_depth_that_is_typed_twice_is_trained_and_counted_once(dataset, tmp_path, monkeypatch):
    setting = make_run(dataset, tmp_path).setting
    monkeypatch.setattr(training, "prepare", lambda args: setting)
    planned = []

    def make(n, seed, setting):
        planned.append((n, seed))
        return make_run(dataset, tmp_path, n=n)

    monkeypatch.setattr(training.Run, "train", lambda run: None)
    monkeypatch.setattr(training, "print_summary", lambda runs: None)
    args = flags.parser("").parse_args(["--n", "2", "1", "2", "--runs", "2", "--seed", "3"])
    training.run(make, args, ())
    assert planned == [(2, 3), (2, 4), (1, 3), (1, 4)]  # from --seed up


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


def test_a_diverged_run_is_logged_to_its_end(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.schedule, "INITIAL_RATE", 1e30)
    run = make_run(dataset, tmp_path)
    run.train()
    log = read_log(run.folder)
    assert len(log) == 3 and np.isnan(log[-1]["main/loss"])
    assert "last epoch (3)" in capsys.readouterr().out
