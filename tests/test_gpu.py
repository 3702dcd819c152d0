"""The CUDA backend on a GPU. Run with ``make gpu``; test_functions.py and test_network.py, too."""

import itertools

import chainer
import numpy as np
import pytest
from chainer.serializers import DictionarySerializer, NpzDeserializer

from resnet import cifar10, extensions, functions, network, schedule
from resnet.backends.gpu import cudnn
from resnet.batches import Batches, Images
from resnet.updater import Updater

pytestmark = pytest.mark.gpu
BATCHSIZE = 32


@pytest.fixture(scope="module")
def images():
    return cifar10.load("synthetic")


@pytest.fixture(params=itertools.product(functions.ON_GPU, cudnn.PRECISIONS), ids="-".join)
def precision(request):
    """A backend of the GPU computes, in each precision in turn."""
    name, precision = request.param
    if not functions.count_gpus():
        pytest.skip("there is no GPU")
    chainer.get_device("@cupy:0").use()
    functions.use(name, gpu=True, precision=precision)
    return precision


def make_updater(images, device="@cupy:0", recorded=True, n=1):
    net = network.resnet(n)
    net.to_device(device)
    mean = cifar10.mean_image(images.train_x)
    images = Images(images.train_x, images.train_y, mean, chainer.get_device(device))
    plan = schedule.Schedule("test", 10_000, (12,))
    optimizer = functions.momentum_sgd(net, 0.9, 1e-4)
    updater = Updater(optimizer, Batches(images, BATCHSIZE), plan)
    if not recorded:
        updater._recorded = None
    return updater


def train(updater, steps):
    """Losses of the steps."""
    losses = []
    for _ in range(steps):
        updater.update()
        losses.append(updater.statistics()["main/loss"])
    return np.array(losses)


def state(updater):
    serializer = DictionarySerializer()
    serializer.save(updater)
    return {name: np.array(chainer.cuda.to_cpu(v)) for name, v in serializer.target.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_replays_are_the_eager_steps_bit_for_bit(precision, images):
    """20 steps of ResNet-20 over a drop of the rate."""
    eager, updater = make_updater(images, recorded=False, n=3), make_updater(images, n=3)
    for _ in range(20):
        eager.update()
        updater.update()
    assert updater._recorded.captured.graph is not None
    assert_same(state(updater), state(eager))
    assert updater.statistics() == eager.statistics()


def test_runs_repeat_bit_for_bit(precision, images):
    first, second = make_updater(images), make_updater(images)
    np.testing.assert_array_equal(train(first, 20), train(second, 20))
    assert_same(state(second), state(first))


def test_a_run_resumed_across_a_recording_is_the_uninterrupted_one(precision, images):
    whole, first, resumed = (make_updater(images) for _ in range(3))
    train(whole, 20)
    train(first, 11)
    NpzDeserializer(state(first)).load(resumed)
    train(resumed, 9)
    assert_same(state(resumed), state(whole))


def test_batches_are_those_of_the_cpu_bit_for_bit(precision, images):
    updater = make_updater(images)
    train(updater, 6)
    updater._recorded.captured.stream.synchronize()
    on_cpu = make_updater(images, "@numpy")
    on_cpu.iteration = 5
    x, t = on_cpu.batch()
    found = updater._recorded.x.get().transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(updater._recorded.t.get(), t)


@pytest.fixture(scope="module")
def on_the_cpu(images):
    """Losses of 200 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "_backend", functions._backend)  # puts it back afterwards
        functions.use("auto")
        return train(make_updater(images, "@numpy"), 200)


def test_first_losses_are_those_of_the_cpu(precision, images, on_the_cpu):
    """Later ones are not: a difference in the last bit grows with every step."""
    found = train(make_updater(images), 3)
    expected = on_the_cpu[:3]
    rtol = {"fp32": (1e-5, 1e-4, 1e-3), "tf32": (3e-3, 0.03, 0.1), "fp16": (3e-3, 0.03, 0.1)}
    assert (abs(found / expected - 1) < rtol[precision]).all(), (found, expected)


def test_200_steps_reach_the_loss_of_the_cpu(precision, images, on_the_cpu):
    found, expected = train(make_updater(images), 200), on_the_cpu
    assert expected[-40:].mean() < 0.5 * expected[:4].mean()
    assert found[-40:].mean() < 1.2 * expected[-40:].mean() + 0.02


def test_a_replayed_evaluation_is_one_without_a_recording(precision, images):
    """Twice, with training between."""
    updater = make_updater(images)
    net, mean = updater.optimizer.target, updater.batches.images.mean
    held_out = Images(images.test_x, images.test_y, chainer.cuda.to_cpu(mean), net.device)
    evaluation = functions.recorded_evaluation(net, held_out, 100)
    for _ in range(2):
        train(updater, 5)
        loss, correct = evaluation()
        logits = chainer.cuda.to_cpu(extensions.predict(net, held_out))
        losses = chainer.functions.softmax_cross_entropy(logits, images.test_y, reduce="no").array
        np.testing.assert_allclose(loss, losses.sum(dtype=np.float64), rtol=1e-4)
        assert abs(correct - (logits.argmax(axis=1) == images.test_y).sum()) <= 2  # ties
    assert evaluation.captured.graph is not None
