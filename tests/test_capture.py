"""The recorded step, on a stream that records in earnest what kernels and cuDNN are to do."""

import random

import chainer
import emulation
import numpy as np
import pytest
from chainer import links as L
from chainer.serializers import DictionarySerializer, NpzDeserializer
from conftest import layer

from resnet import cifar10, extensions, functions, network, schedule
from resnet.backends.gpu import cuda, programs
from resnet.batches import Batches, Images
from resnet.parallel import ALONE, Processes
from resnet.updater import Updater

pytestmark = emulation.needs_compiler


class Small(chainer.Chain):
    """A network of one layer, whose steps take no time."""

    def __init__(self):
        super().__init__()
        rng = np.random.RandomState(0)
        with self.init_scope():
            self.conv = L.Convolution2D(3, 8, 3, pad=1, nobias=True, initialW=rng.randn(8, 3, 3, 3))
            self.bn = L.BatchNormalization(8)
            self.fc = L.Linear(8, 10, initialW=rng.randn(10, 8))

    def forward(self, x):
        h = layer(x, self.conv.W, self.bn, 2)
        return functions.linear(functions.average_pooling(h), self.fc.W, self.fc.b)


@pytest.fixture
def gpu(monkeypatch):
    module, _, memory = emulation.install(monkeypatch)
    yield module
    memory.check()


def make_updater(dataset, net=None, batchsize=16, recorded=True, warm_up=False, processes=ALONE):
    optimizer = functions.momentum_sgd(net or Small(), 0.9, 1e-4)
    device = chainer.get_device("@numpy")
    mean = cifar10.mean_image(dataset.train_x)
    images = Images(dataset.train_x, dataset.train_y, mean, device)
    plan = schedule.Schedule("test", 20, (2, 6))
    updater = Updater(optimizer, Batches(images, batchsize, 1), plan, warm_up, processes)
    assert bool(updater._recorded) == (processes is ALONE)
    if not recorded:
        updater._recorded = None
    return updater


def state(updater):
    serializer = DictionarySerializer()
    serializer.save(updater)
    return {name: np.array(value) for name, value in serializer.target.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("make", "batchsize", "steps"),
    [
        (Small, 16, 12),
        (lambda: network.resnet(1), 4, 6),
        (lambda: network.resresnet(2), 2, 6),
    ],
    ids=["one layer", "resnet", "resresnet"],
)
def test_replays_are_the_eager_steps_bit_for_bit(gpu, dataset, make, batchsize, steps):
    """Over drops of the rate, ends of passes and of epochs; what the log and snapshots say, too."""
    eager = make_updater(dataset, make(), batchsize, recorded=False)
    updater = make_updater(dataset, make(), batchsize)
    for step in range(steps):
        eager.update()
        before = len(gpu.launched)
        updater.update()
        assert (len(gpu.launched) == before) == (step > 3)  # a replay asks for no kernel
        assert_same(state(updater), state(eager))
        if step in (1, 4, 7):
            assert updater.statistics() == eager.statistics()
    assert gpu.stream.log.count("begin_capture") == 1


def test_all_work_is_on_a_stream_that_can_be_recorded(gpu, dataset):
    make_updater(dataset)
    assert gpu.stream.log == ["synchronize", "use"]  # the default stream's work is over by then


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "eager"])
def test_a_step_whose_float16_gradients_overflow_is_skipped_and_counted(dataset, monkeypatch,
                                                                        recorded):  # fmt: skip
    emulation.install(monkeypatch, "fp16")
    updater = make_updater(dataset, recorded=recorded)
    net, optimizer = updater.optimizer.target, updater.optimizer
    for _ in range(5):
        updater.update()
    assert updater.statistics()["main/skipped"] == 0
    weights = optimizer.values.copy()
    net.fc.W.array *= 1e6  # the loss is finite still, its gradient beyond float16
    enlarged, velocities = optimizer.values.copy(), optimizer.velocities.copy()
    with np.errstate(all="ignore"):
        updater.update()
    np.testing.assert_array_equal(optimizer.values, enlarged)
    np.testing.assert_array_equal(optimizer.velocities, velocities)
    optimizer.values[...] = weights
    updater.update()
    assert np.isfinite(optimizer.values).all() and (optimizer.values != weights).any()
    restored = make_updater(dataset)
    NpzDeserializer(state(updater)).load(restored)
    assert updater.statistics()["main/skipped"] == restored.statistics()["main/skipped"] == 1
    assert updater.statistics()["main/skipped"] == 0


def test_a_run_in_float16_goes_on_from_a_snapshot_of_another_precision(gpu, dataset, monkeypatch):
    before = make_updater(dataset)
    before.update()
    snapshot = state(before)
    emulation.install(monkeypatch, "fp16")
    updater = make_updater(dataset)
    NpzDeserializer(snapshot).load(updater)
    updater.update()
    assert updater.statistics()["main/skipped"] == 0


def test_other_augmentation_than_the_reports_is_not_recorded_but_obeyed(gpu, dataset):
    recorded = make_updater(dataset)
    batches = Batches(recorded.batches.images, 16, augment="none")
    updater = Updater(recorded.optimizer, batches, recorded.schedule)
    updater.update()
    assert updater._recorded is None and "augment" not in gpu.launched
    np.testing.assert_array_equal(batches.batch(0)[0], batches.images.batch(batches.indices(0))[0])


class Second(Processes):
    """The second of two processes, whose partner does nothing."""

    def __init__(self):
        super().__init__()
        self.rank, self.size = 1, 2


def test_with_several_processes_all_work_stays_on_the_null_stream(gpu, dataset, monkeypatch):
    """ChainerMN packs and sums gradients there, and waits for no other stream."""
    updater = make_updater(dataset, processes=Second())
    evaluator = make_evaluator(updater, dataset, monkeypatch, processes=updater.processes)
    updater.update()
    evaluate(evaluator)
    updater.update()
    assert gpu.stream.log == [] and gpu.stream.ptr == 0


@pytest.mark.parametrize("where", ["begin_capture", "end_capture", "a kernel"])
def test_what_cannot_be_recorded_goes_on_eagerly_and_says_so(gpu, dataset, where, capsys,
                                                             monkeypatch):  # fmt: skip
    eager, updater = make_updater(dataset, recorded=False), make_updater(dataset)
    gpu.stream.refuses = where
    if where == "a kernel":
        launch = programs.launch

        def refuse(name, *arguments):
            if gpu.stream.recording is not None and name == "momentum_step":
                raise RuntimeError("operation not permitted\nwhile a stream is captured")
            launch(name, *arguments)

        monkeypatch.setattr(cuda, "launch", refuse)
    for _ in range(7):
        eager.update()
        updater.update()
    assert_same(state(updater), state(eager))
    assert gpu.stream.recording is None
    assert gpu.stream.log.count("begin_capture") == 1
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no CUDA graph" in warning
    assert ("operation not permitted" if where == "a kernel" else where) in warning


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["NumPy", "Python"])
def test_a_network_that_draws_on_the_host_is_not_recorded(gpu, dataset, draw, capsys):
    """A replay would repeat one draw; NumPy's are those of the step without a recording."""

    class Dropping(Small):
        drawn = 0

        def forward(self, x):
            self.drawn = draw()
            return super().forward(x) * np.float32(self.drawn)

    eager = make_updater(dataset, Dropping(), recorded=False)
    updater, drawn = make_updater(dataset, Dropping()), []
    for step in range(7):
        for each in (eager, updater):
            random.seed(step)
            each.update()
            drawn.append(each.optimizer.target.drawn)
            np.random.rand()  # by somebody else, in between
        assert drawn[-1] == drawn[-2]
    assert len(set(drawn)) == 7
    assert_same(state(updater), state(eager))
    assert capsys.readouterr().err.count("no CUDA graph (numbers drawn on the host") == 1


@pytest.mark.parametrize("cut", [2, 5, 7])
def test_a_run_resumed_across_a_recording_is_the_uninterrupted_one(gpu, dataset, cut):
    whole, first = (make_updater(dataset) for _ in range(2))
    for _ in range(12):
        whole.update()
    for _ in range(cut):
        first.update()
    resumed = make_updater(dataset)
    for parameter in resumed.optimizer.target.params():
        parameter.array[...] = 7
    NpzDeserializer(state(first)).load(resumed)
    for _ in range(12 - cut):
        resumed.update()
    assert_same(state(resumed), state(whole))


def test_a_state_can_be_loaded_between_replays(gpu, dataset):
    updater = make_updater(dataset)
    states = []
    for _ in range(9):
        states.append(state(updater))
        updater.update()
    expected = state(updater)
    NpzDeserializer(states[5]).load(updater)
    for _ in range(4):
        updater.update()
    assert_same(state(updater), expected)


def test_weights_that_were_replaced_are_recorded_anew(gpu, dataset):
    """The recording would go on training the old ones."""
    eager, updater = make_updater(dataset, recorded=False), make_updater(dataset)
    for step in range(12):
        for each in (eager, updater):
            if step == 6:
                fc = each.optimizer.target.fc
                fc.W.array = fc.W.array * 2
                each.statistics()  # the end of an epoch, when extensions have run
            each.update()
    assert_same(state(updater), state(eager))
    assert gpu.stream.log.count("begin_capture") == 2


def test_the_warm_up_is_not_recorded(gpu, dataset, monkeypatch):
    """The host must see the error of each of its steps; afterwards it need not."""
    monkeypatch.setattr(schedule, "WARM_UP_LIMIT", 3)
    eager = make_updater(dataset, recorded=False, warm_up=True)
    updater = make_updater(dataset, warm_up=True)
    for _ in range(10):
        eager.update()
        updater.update()
        assert_same(state(updater), state(eager))
    assert gpu.stream.log.count("begin_capture") == 1
    assert updater._recorded.captured.graph is not None


# The evaluation


def make_evaluator(updater, dataset, monkeypatch, batchsize=2, processes=ALONE):
    monkeypatch.setattr(extensions, "EVALUATION_BATCH", batchsize)
    images = Images(
        dataset.test_x, dataset.test_y, updater.batches.images.mean, chainer.get_device("@numpy")
    )
    return extensions.Evaluator(updater.optimizer.target, images, "test", processes)


def evaluate(evaluator):
    """Loss and accuracy."""
    reporter, found = chainer.Reporter(), {}
    with reporter, reporter.scope(found):
        evaluator()
    return found["test/main/loss"], found["test/main/accuracy"]


def expected(evaluator):
    """The same from Chainer's own functions."""
    logits = extensions.predict(evaluator.network, evaluator.share).astype(np.float64)
    loss = chainer.functions.softmax_cross_entropy(logits, evaluator.share.y).array
    return float(loss), float((logits.argmax(axis=1) == evaluator.share.y).mean())


def test_replayed_evaluations_follow_the_weights(gpu, dataset, monkeypatch):
    updater = make_updater(dataset)
    updater.update()
    evaluator = make_evaluator(updater, dataset, monkeypatch)
    losses = set()
    for _ in range(6):
        before = state(updater)
        found = evaluate(evaluator)
        assert_same(state(updater), before)
        np.testing.assert_allclose(found, expected(evaluator), rtol=1e-5)
        losses.add(found[0])
        updater.update()
    assert len(losses) == 6
    assert gpu.stream.log.count("begin_capture") == 2  # one step, one batch of the evaluation
    assert gpu.stream.log.count("use") == 1  # both on one stream
    launched = len(gpu.launched)
    evaluate(evaluator)
    assert len(gpu.launched) == launched


def test_an_evaluation_that_cannot_be_recorded_is_the_same(gpu, dataset, monkeypatch, capsys):
    updater = make_updater(dataset)
    updater.update()
    recorded = make_evaluator(updater, dataset, monkeypatch)
    eager = make_evaluator(updater, dataset, monkeypatch)
    found = [evaluate(recorded) for _ in range(2)]
    gpu.stream.refuses = "end_capture"
    assert [evaluate(eager) for _ in range(2)] == found
    assert capsys.readouterr().err.count("no CUDA graph") == 1


def test_an_evaluation_is_recorded_anew_when_weights_were_replaced(gpu, dataset, monkeypatch):
    updater = make_updater(dataset)
    updater.update()
    evaluator = make_evaluator(updater, dataset, monkeypatch)
    before = evaluate(evaluator)
    fc = evaluator.network.fc
    fc.W.array = fc.W.array * 2
    after = evaluate(evaluator)
    np.testing.assert_allclose(after, expected(evaluator), rtol=1e-5)
    assert after != before


def test_batches_that_do_not_divide_the_set_are_evaluated_without_a_recording(
    gpu, dataset, monkeypatch
):
    updater = make_updater(dataset)
    updater.update()
    evaluator = make_evaluator(updater, dataset, monkeypatch, batchsize=5)
    for _ in range(2):
        np.testing.assert_allclose(evaluate(evaluator), expected(evaluator), rtol=1e-5)
    assert "begin_capture" not in gpu.stream.log
