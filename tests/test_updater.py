"""The training step: epochs, rate, statistics, resume."""

import chainer
import numpy as np
import pytest
from chainer.serializers import DictionarySerializer, NpzDeserializer

from resnet import cifar10, functions, network, schedule
from resnet.batches import Batches, Images
from resnet.modules import ResidualModule
from resnet.updater import Updater


def make_updater(dataset, batchsize=16, plan=None, warm_up=False, seed=0, make=network.resnet):
    device = chainer.get_device("@numpy")
    optimizer = functions.momentum_sgd(make(1, seed % 2**32), 0.9, 1e-4)
    mean = cifar10.mean_image(dataset.train_x)
    images = Images(dataset.train_x, dataset.train_y, mean, device)
    plan = plan or schedule.Schedule("test", 20, (2, 4))
    return Updater(optimizer, Batches(images, batchsize, seed), plan, warm_up)


def test_epochs_count_images_and_a_batch_may_span_two(dataset):
    updater = make_updater(dataset)
    seen = []
    for updater.iteration in range(8):
        seen.append((updater.epoch, updater.is_new_epoch))
    new = [iteration for iteration, (_, is_new) in enumerate(seen) if is_new]
    assert new == [3, 5]  # 40 and 80 images are passed during the third and fifth batch
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_rate_is_that_of_this_iteration(dataset):
    updater = make_updater(dataset)
    rates = []
    for _ in range(6):
        updater.update()
        rates.append(updater.optimizer.lr)
    assert rates == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


def test_warm_up_rate_holds_until_the_condition_is_met(dataset, monkeypatch):
    monkeypatch.setattr(schedule, "WARM_UP_LIMIT", 3)
    updater = make_updater(dataset, plan=schedule.Schedule("test", 20, ()), warm_up=True)
    rates = []
    for _ in range(5):
        updater.update()
        rates.append(updater.optimizer.lr)
    assert rates == [0.01, 0.01, 0.01, 0.1, 0.1]


def test_the_warm_up_is_told_the_error_of_each_batch(dataset, monkeypatch):
    updater = make_updater(dataset, warm_up=True)
    told = []
    monkeypatch.setattr(updater.warm_up, "observe", lambda *observed: told.append(observed))
    for iteration in range(3):
        updater.update()
        error = 1 - updater.statistics()["main/accuracy"]
        assert told[iteration] == (iteration, error)
    assert not any(error == 0.5 for _, error in told)  # it is told from the accuracy


@pytest.mark.parametrize("seed", [3, 3 + (1 << 32)])  # also of a stage of partial training
def test_dropout_is_a_function_of_seed_and_iteration(dataset, seed):
    """Of a network whose modules draw from NumPy's own generator."""

    class Dropping(ResidualModule):
        def forward(self, x):
            return super().forward(chainer.functions.dropout(x))

    dropping = network.Architecture(
        "ResNet with dropout", "Dropping", "relu(F(D(x)) + x)", Dropping
    )
    found = []
    for before in (1, 2):
        np.random.seed(before)
        updater = make_updater(dataset, seed=seed, make=dropping)
        found.append([])
        for _ in range(2):
            updater.update()
            np.random.rand(before)
            found[-1].append(updater.statistics()["main/loss"])
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_other_seeds_and_iterations_draw_otherwise_from_numpy_s_generator(dataset):
    drawn = set()
    for seed in (3, 4, 3 + (1 << 32)):
        updater = make_updater(dataset, seed=seed)
        for _ in range(2):
            updater.update()
            drawn.add(np.random.rand())
    assert len(drawn) == 6


def test_statistics_are_means_over_the_updates_since_the_last_report(dataset, monkeypatch):
    updater = make_updater(dataset)
    losses, correct = [], []
    step = functions.softmax_cross_entropy

    def watched(y, t):
        loss = step(y, t)
        losses.append(float(loss.array))
        correct.append(int((y.array.argmax(1) == t).sum()))
        return loss

    monkeypatch.setattr(functions, "softmax_cross_entropy", watched)
    for _ in range(3):
        updater.update()
    report = updater.statistics()
    assert report["main/loss"] == pytest.approx(np.mean(losses))
    assert report["main/accuracy"] == sum(correct) / 48
    updater.update()
    assert updater.statistics()["main/loss"] == pytest.approx(losses[3])


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resumed_updates_equal_uninterrupted_ones_bit_for_bit(dataset, cut):
    def state(updater):
        serializer = DictionarySerializer()
        serializer.save(updater)
        return serializer.target

    plan = schedule.Schedule("test", 20, (4,))
    whole, first = (make_updater(dataset, plan=plan, warm_up=True) for _ in range(2))
    for _ in range(6):
        whole.update()
    for _ in range(cut):
        first.update()
    resumed = make_updater(dataset, plan=plan, warm_up=True)
    for parameter in resumed.optimizer.target.params():
        parameter.array[...] = 7  # nothing may survive of what the resumed net began with
    NpzDeserializer(state(first)).load(resumed)
    for _ in range(6 - cut):
        resumed.update()
    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    assert any(name.endswith("/v") for name in expected)  # momentum is part of it
    assert any(name.endswith("avg_var") for name in expected)  # and the statistics
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
