"""Partial training: which blocks are there, what each stage begins with, what is logged."""

import json
import shutil

import chainer
import numpy as np
import pytest
from chainer import functions as F
from conftest import deny, read_blocks

from resnet import (
    extensions,
    flags,
    functions,
    partial_training,
    run_folder,
    training,
    weights,
)
from resnet.command import InputError
from resnet.network import BLOCKS, resnet
from resnet.partial_training import PartialTraining


def make(dataset, out, *words, order="top-down", n=1, epoch=("-e", "3")):
    # --epoch 3: stages of 1.5, 1.5 and 3 epochs of 40 images, in batches of 16.
    p = flags.parser("")
    p.add_argument("--stage", type=int)
    p.add_argument("--scale", type=float, default=1.0)
    p.add_argument("--freeze", action="store_true")
    p.add_argument("--new-ends", action="store_true")
    args = p.parse_args(["-b", "16", *epoch, "--out", str(out), *words])
    backend = functions.use("chainer")
    setting = training.Setting(args, dataset, "test", chainer.get_device("@numpy"), backend)
    return PartialTraining(order, n, args.seed, setting)


@pytest.fixture(scope="module", params=partial_training.ORDERS)
def trained_in_order(request, dataset, tmp_path_factory):
    """The order, and the ``--out`` of a complete training."""
    out = tmp_path_factory.mktemp(request.param)
    make(dataset, out, order=request.param).train()
    return request.param, out


@pytest.fixture
def finished(trained_in_order, dataset, tmp_path):
    """A complete training, which the test may change."""
    order, out = trained_in_order
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    return make(dataset, tmp_path, order=order)


def arrays(network, groups):
    serializer = chainer.serializers.DictionarySerializer()
    for name in groups:
        serializer[name].save(network[name])
    return {key: np.array(value) for key, value in serializer.target.items()}


@pytest.mark.parametrize(
    "present", [("conv2",), ("conv4",), ("conv2", "conv3"), ("conv3", "conv4")]
)
def test_present_blocks_have_the_shapes_and_first_weights_of_the_whole_network(present):
    whole, part = resnet(2, seed=7), resnet(2, seed=7, present=present)
    groups = ("conv1", *present, "fc")
    assert part.groups == groups
    expected, found = arrays(whole, groups), arrays(part, groups)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
    assert sum(p.size for p in part.params()) == sum(
        p.size for name in groups for p in whole[name].params()
    )
    assert part(np.zeros((2, 3, 32, 32), "f")).shape == (2, 10)


def test_blocks_are_added_in_the_order_of_the_report(dataset, tmp_path):
    """Top-down begins with the block next to the input, bottom-up with the last one."""
    for order, first, second in (
        ("top-down", ("conv2",), ("conv2", "conv3")),
        ("bottom-up", ("conv4",), ("conv3", "conv4")),
    ):
        whole = make(dataset, tmp_path, order=order)
        stages = whole.stages
        built = [set(whole.present(number)) for number in (1, 2, 3)]
        assert built == [set(first), set(second), set(BLOCKS)]
        assert stages[0].build().groups == ("conv1", *first, "fc")


def test_schedule_is_the_reports_and_can_be_shortened(dataset, tmp_path):
    args = make(dataset, tmp_path).setting.args
    args.epoch = None
    plans = [partial_training.stage_schedule(k, args, 16) for k in (1, 2, 3)]
    assert [(plan.iterations, plan.drops) for plan in plans] == [
        (50, (40,)), (50, (40,)), (100, (40, 80)),
    ]  # fmt: skip
    args.epoch = 10
    plans = [partial_training.stage_schedule(k, args, 16) for k in (1, 2, 3)]
    assert [(plan.iterations, plan.drops) for plan in plans] == [(5, (4,)), (5, (4,)), (10, (4, 8))]


def test_a_shortened_schedule_has_shorter_stages(dataset, tmp_path):
    whole = make(dataset, tmp_path, "--shorten", "4", epoch=())
    plans = [stage.schedule for stage in whole.stages]
    # 12.5, 12.5 and 25 epochs of 40 images in batches of 16, the rate divided at 10 and 20.
    assert [(plan.name, plan.iterations, plan.drops) for plan in plans] == [
        ("stage 1 / 4", 32, (25,)), ("stage 2 / 4", 32, (25,)), ("stage 3 / 4", 63, (25, 50)),
    ]  # fmt: skip
    together = whole.schedule
    assert (together.name, together.iterations) == ("partial / 4", 127)
    assert together.drops == (25, 57, 89, 114)


def test_a_stage_begins_with_what_the_one_before_saved(finished):
    for number, before, stage in zip((2, 3), finished.stages, finished.stages[1:], strict=False):
        network = stage.build()
        found = arrays(network, before.build().groups)
        saved = read_blocks(before.folder)
        assert len(found) > 10
        for name, value in found.items():
            np.testing.assert_array_equal(value, saved[name.lstrip("/")], err_msg=name)
        *_, new = finished.present(number)
        fresh = arrays(resnet(1, finished.seed), [new])
        for name, value in arrays(network, [new]).items():
            np.testing.assert_array_equal(value, fresh[name], err_msg=name)


def test_the_folder_joins_the_stages(finished):
    log = json.loads((finished.folder / "log").read_text())
    assert [entry["stage"] for entry in log] == [1, 1, 2, 2, 3, 3, 3]
    assert [entry["iteration"] for entry in log] == [3, 4, 7, 8, 11, 13, 16]
    assert log[-1]["epoch"] == 16 * 16 / 40
    times = [entry["elapsed_time"] for entry in log]
    assert times == sorted(times)
    record = json.loads((finished.folder / "args.json").read_text())
    assert record["run"]["architecture"] == finished.order.replace("-", "_")
    assert record["run"]["schedule"]["iterations"] == 16 and len(record["starts"]) == 3
    whole, last = read_blocks(finished.folder), read_blocks(finished.stages[-1].folder)
    assert all((whole[name] == value).all() for name, value in last.items())


@pytest.mark.parametrize("where", ["stage1/log", "stage3/log", "log"])
def test_damaged_logs_of_a_complete_training_are_written_again(finished, capsys, where):
    paths = [finished.folder / name for name in ("log", "stage1/log", "stage3/log")]
    before = [path.read_bytes() for path in paths]
    (finished.folder / where).write_bytes(b"[")
    finished.train()
    assert [path.read_bytes() for path in paths] == before
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["stage1/log", "stage2/args.json", "log"])
def test_no_log_is_joined_without_what_cannot_be_read(finished, monkeypatch, where):
    before = (finished.folder / "log").read_bytes()
    with monkeypatch.context() as patch:
        deny(patch, finished.folder / where)
        with pytest.raises(InputError, match=f"{where}: cannot be read"):
            finished.train()
        if where != "log":
            with pytest.raises(InputError, match=f"{where}: cannot be read"):
                finished.join()
    assert (finished.folder / "log").read_bytes() == before


def test_blocks_of_another_stage_or_run_make_nothing_complete(dataset, finished, tmp_path):
    first, second, last = finished.stages
    path = second.folder / "blocks.h5"
    path.write_bytes((first.folder / "blocks.h5").read_bytes())
    with pytest.raises(
        InputError, match=f"{path}: of another run, holds groups = conv1, conv., fc"
    ):
        finished.train()
    other = make(dataset, tmp_path, "--seed", "1", order=finished.order)
    assert not other.is_complete()
    other.folder.mkdir()
    shutil.copy(last.folder / "blocks.h5", other.folder)
    with pytest.raises(
        InputError, match=r"seed1/blocks\.h5: of another run, holds seed = 0; legal"
    ):
        other.train()


def test_distances_of_the_present_blocks_are_logged(finished):
    log = json.loads((finished.folder / "log").read_text())
    first, new = finished.present(2)
    assert f"{first}/distance" in log[0] and f"{new}/distance" not in log[0]
    assert 0 < log[0][f"{first}/distance"] < log[1][f"{first}/distance"]
    end = finished.stages[2]
    start, stop = read_blocks(finished.stages[1].folder), read_blocks(end.folder)
    trained = [name for name in start if name.startswith(first) and name[-1] in "Wa"]  # W, gamma...
    trained = [name for name in trained if "avg" not in name]
    moved = np.concatenate([(stop[name] - start[name]).ravel() for name in trained])
    norm = np.linalg.norm(np.concatenate([start[name].ravel() for name in trained]))
    np.testing.assert_allclose(log[-1][f"{first}/distance"], np.linalg.norm(moved) / norm, 1e-4)


def test_stages_can_be_trained_on_another_day(dataset, finished, tmp_path, capsys):
    order = finished.order
    later = tmp_path / "later"
    with pytest.raises(InputError, match=r"stage1: not complete.*--stage 1 first"):
        make(dataset, later, "--stage", "2", order=order).train()
    assert not later.exists()
    for stage in "123":
        whole = make(dataset, later, "--stage", stage, order=order)
        whole.train()
    strip = lambda log: [{k: v for k, v in e.items() if k != "elapsed_time"} for e in log]  # noqa: E731
    logs = [json.loads((each.folder / "log").read_text()) for each in (finished, whole)]
    assert strip(logs[0]) == strip(logs[1])
    capsys.readouterr()
    make(dataset, later, order=order).train()
    assert "already complete" in capsys.readouterr().out


def test_a_frozen_block_does_not_change_by_a_bit(dataset, tmp_path):
    whole = make(dataset, tmp_path, "--freeze")
    whole.train()
    first, second, third = (read_blocks(stage.folder) for stage in whole.stages)
    for before, after, held in ((first, second, "conv2"), (second, third, "conv3")):
        names = [name for name in before if name.startswith(held)]
        assert len(names) > 10
        for name in names:
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert (second["conv1/conv/W"] != third["conv1/conv/W"]).any()


def test_a_scaled_block_begins_as_a_perturbation_of_the_identity(dataset, tmp_path):
    make(dataset, tmp_path, "--stage", "1", order="bottom-up").train()
    x = chainer.Variable(np.random.RandomState(3).rand(4, 16, 32, 32).astype("f"))
    sizes = {}
    for factor in ("0", "0.01", "0.1"):
        whole = make(dataset, tmp_path, "--scale", factor, order="bottom-up")
        whole.stages[0] = make(dataset, tmp_path, order="bottom-up").stages[0]
        module = whole.stages[1].build().conv3[0]
        identity = F.relu(training.functions.option_a(x, 32, 2))
        sizes[factor] = float(abs(module(x).array - identity.array).max())
    assert sizes["0"] == 0
    assert 0 < sizes["0.01"] < 0.1
    np.testing.assert_allclose(sizes["0.1"], 10 * sizes["0.01"], rtol=0.5)


def test_every_module_of_a_new_block_is_scaled_and_no_other_block(dataset, tmp_path):
    make(dataset, tmp_path, "--stage", "1", n=2).train()
    whole = make(dataset, tmp_path, "--scale", "0.1", n=2)
    whole.stages[0] = make(dataset, tmp_path, n=2).stages[0]
    network, saved = whole.stages[1].build(), read_blocks(whole.stages[0].folder)
    for i in range(2):
        np.testing.assert_array_equal(network.conv3[i].bn2.gamma.array, np.float32(0.1))
        np.testing.assert_array_equal(network.conv3[i].bn1.gamma.array, 1)
        gamma = saved[f"conv2/{i}/bn2/gamma"]
        np.testing.assert_array_equal(network.conv2[i].bn2.gamma.array, gamma)


def test_a_seed_decides_both_the_first_weights_and_the_batches(dataset, tmp_path):
    first, other = (
        make(dataset, tmp_path, "--seed", seed).stages[0].make_trainer()[0].updater for seed in "01"
    )
    weights = [updater.optimizer.target.conv2[0].conv1.W.array for updater in (first, other)]
    assert (weights[0] != weights[1]).any()
    assert first.batches.indices(0).tolist() != other.batches.indices(0).tolist()


def test_new_ends_draw_conv1_and_fc_afresh(dataset, tmp_path):
    whole = make(dataset, tmp_path, "--new-ends")
    whole.stages[0].train()
    network, fresh = whole.stages[1].build(), resnet(1, whole.seed)
    saved = read_blocks(whole.stages[0].folder)
    np.testing.assert_array_equal(network.fc.W.array, fresh.fc.W.array)
    np.testing.assert_array_equal(network.conv1.conv.W.array, fresh.conv1.conv.W.array)
    np.testing.assert_array_equal(network.conv2[0].conv1.W.array, saved["conv2/0/conv1/W"])


def test_stages_shuffle_and_augment_differently(dataset, tmp_path):
    batches = []
    for stage in make(dataset, tmp_path).stages[:1] + make(dataset, tmp_path).stages[:1]:
        batches.append(stage.make_trainer()[0].updater.batch()[0])
    np.testing.assert_array_equal(batches[0], batches[1])
    whole = make(dataset, tmp_path)
    whole.stages[0].train()
    assert (whole.stages[1].make_trainer()[0].updater.batch()[0] != batches[0]).any()


@pytest.mark.parametrize("words", ["--epoch 1", "--epoch 2", "--epoch 7", "--shorten 3"])
def test_another_length_is_refused_in_the_flags_that_were_typed(dataset, tmp_path, words):
    run, other = make(dataset, tmp_path, epoch=words.split()), make(dataset, tmp_path)
    for stage in run.stages:
        flag = flags.spell("schedule", stage.identity, stage.identity)
        assert flag == f"--stage {stage.identity['stage']} {words}"
    other.folder.mkdir()
    run_folder.write_record(other.folder, run.identity, [])
    with pytest.raises(InputError, match=f": holds {words}, asked for is --epoch 3; "):
        other.train()


def test_a_snapshot_needs_its_stage(dataset, tmp_path):
    with pytest.raises(InputError, match="--stage K"):
        make(dataset, tmp_path, "--resume", "x.npz", "--n", "1")


def test_other_choices_are_other_runs_beside_each_other(dataset, finished, tmp_path):
    scaled = make(dataset, tmp_path, "--scale", "0.5", "--stage", "1", order=finished.order)
    scaled.train()
    assert scaled.folder.name == f"{finished.identity['architecture']}-8-scale0.5-seed0"
    chosen = make(dataset, tmp_path, "--shorten", "2", "--freeze", "--new-ends")
    assert chosen.folder.name == "top_down-8-shorten2-freeze-new-ends-seed0"
    # And whoever gives the folder another name is told.
    finished.folder.rename(tmp_path / "aside")
    scaled.folder.rename(finished.folder)
    with pytest.raises(InputError, match=r"holds --scale 0\.5, asked for is --scale 1;"):
        make(dataset, tmp_path, order=finished.order).train()
    (tmp_path / "aside").rename(scaled.folder)
    with pytest.raises(InputError, match=r"holds --scale 1, asked for is --scale 0\.5;"):
        make(dataset, tmp_path, "--scale", "0.5", order=finished.order).train()


def test_blocks_of_a_stage_are_not_taken_for_a_whole_network(finished):
    path = finished.stages[0].folder / "blocks.h5"
    with pytest.raises(InputError, match=r"holds conv1, conv., fc of the network, and no conv"):
        weights.load(path, resnet(1), "resnet")
    network, description = weights.restore(path)
    assert network.groups == description.groups == finished.stages[0].build().groups


def test_distance_of_unmoved_weights_is_zero(dataset):
    network = resnet(1)
    distance = extensions.Distance(network)
    observation = {}
    with chainer.Reporter().scope(observation):
        distance(None)
        network.conv3[0].conv1.W.array *= 2
        distance(None)
    assert observation["conv2/distance"] == 0 < observation["conv3/distance"]


def test_every_stage_is_a_run_like_any_other(finished):
    assert all(isinstance(stage, training.Run) and stage.is_complete() for stage in finished.stages)
