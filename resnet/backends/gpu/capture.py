"""The training step, and an evaluation's, as CUDA graphs: recorded once, replayed from then on.

A replay costs one call instead of Python's work for hundreds of kernels, and the host waits for
nothing. All that changes from step to step is on the GPU: iteration, order of the images, rate, and
the sums for the log.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable

import chainer
import numpy as np

from resnet import random
from resnet.backends.flat import FlatMomentumSGD
from resnet.backends.gpu import cuda, programs

DEFAULT_STREAMS = (0, 1, 2)  # null, cudaStreamLegacy, cudaStreamPerThread
EAGER = 3  # calls before the recording: they compile kernels, build plans and fill the pool


class Captured:
    """A function without arguments that is recorded on its fourth call and replayed afterwards.

    If it cannot be recorded, or draws numbers on the host, which a replay would not do again, one
    line on stderr says so and it goes on being called. The process must be alone: from here on its
    work is on a stream of its own, and ChainerMN packs and sums gradients on the null stream
    without waiting for it.

    Args:
        function: All its work is on the GPU, on the same arrays each time.
        signature: What must stay as it was for a recording to hold; see ``check``.
    """

    def __init__(self, function: Callable[[], None], signature: Callable[[], Hashable]) -> None:
        cupy = programs.cupy()
        self.function, self.signature = function, signature
        # The default stream cannot be recorded. From here on everything is on one that can: then
        # evaluation and snapshots need not be told to wait for a step.
        self.stream = cupy.cuda.get_current_stream()
        if self.stream.ptr in DEFAULT_STREAMS:
            self.stream.synchronize()
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.stream.use()
        # Memory that is free after the recording is not free for others: replays write to it.
        self.pool = cupy.cuda.MemoryPool()
        self.forget()

    def forget(self) -> None:
        """Begin again: what was recorded no longer holds."""
        self.graph = None
        self.calls = 0

    def check(self) -> None:
        """Forget the recording if its signature has changed."""
        if self.graph is not None and self.signature() != self._recorded:
            self.forget()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.launch(self.stream)
            return
        with programs.cupy().cuda.using_allocator(self.pool.malloc):
            if self.calls == EAGER and self._record():
                self.graph.launch(self.stream)
            else:
                self.function()
        self.calls += 1

    def _record(self) -> bool:
        gc.collect()
        gc.disable()  # it could free what belongs to CUDA, which ends a recording
        try:
            self.stream.begin_capture()
            try:
                with random.nothing_drawn():
                    self.function()
            except BaseException:
                self._abandon()
                raise
            self.graph = self.stream.end_capture()
        except Exception as error:  # of CuPy, CUDA or cuDNN
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"warning: no CUDA graph ({reason}); it goes on without", file=sys.stderr)
            return False
        finally:
            gc.enable()
        self._recorded = self.signature()
        return True

    def _abandon(self) -> None:
        try:
            self.stream.end_capture()
        except Exception:  # it says again that the recording is broken
            return


class Step:
    """One training step from the images to the sums for the log.

    Args:
        backend: Computes the step.
        optimizer: From ``functions.momentum_sgd``, of the CUDA backend.
        batches: ``batches.Batches`` of images on the GPU, with the report's augmentation.
        loss, correct: float64 and int64 () on the GPU; each step adds its own.
    """

    def __init__(self, backend: cuda.Cuda, optimizer, batches, loss, correct) -> None:
        xp = programs.cupy()
        self.backend, self.optimizer, self.batches = backend, optimizer, batches
        self.loss, self.correct = loss, correct
        _, channels, height, width = batches.images.x.shape
        self.x = xp.empty((batches.size, height, width, channels), np.float32)
        self.t = xp.empty((batches.size,), np.int32)
        self.counter = xp.zeros(1, np.int64)
        self._next = -1  # the iteration that the counter holds
        self.captured = Captured(self._compute, self._signature)

    def __call__(self, iteration: int) -> None:
        """Train on the batch of ``iteration`` at the optimizer's rate."""
        self.batches.prepare(iteration)
        if self._next != iteration:
            self.counter.fill(iteration)
        self._next = iteration + 1
        self.optimizer.send_rate()
        t = self.optimizer.t
        if self.captured.graph is None:  # a replay draws nothing on the host
            random.seed_numpy(self.batches.seed, iteration, 0)
        self.captured()
        self.optimizer.t = t + 1  # a replay does not count, a failed recording counts twice

    def _compute(self) -> None:
        batches, images, network = self.batches, self.batches.images, self.optimizer.target
        _, _, height, width = images.x.shape
        arrays = images.x, images.y, images.mean, batches.orders, self.counter, self.x, self.t
        numbers = batches.size, *images.x.shape, *batches.draws
        programs.launch("augment", batches.size * height * width, *arrays, *numbers)
        y = network(cuda._images(self.x))
        loss = self.backend.softmax_cross_entropy(y, self.t)
        network.cleargrads()
        loss.backward()
        self.optimizer.update()
        arrays = y.array, self.t, loss.array, *y.shape
        sums = self.loss, self.correct, self.counter
        programs.launch("finish_step", programs.THREADS, *arrays, *sums)

    def _signature(self) -> Hashable:
        """Where the persistent arrays are, and which parameters are trained."""
        network = self.optimizer.target
        enabled = (p.update_rule.enabled for p in network.params())
        return places(network), tuple(enabled), self.backend.precision


class Evaluation:
    """Loss and right answers of a network at test time over a set of images, batch by batch.

    Args:
        backend: Computes it.
        network: On the GPU.
        images: ``batches.Images`` on the GPU.
        batchsize: Images at once; it divides the set.
    """

    def __init__(self, backend: cuda.Cuda, network, images, batchsize: int) -> None:
        xp = programs.cupy()
        self.backend = backend
        self.network, self.images, self.batchsize = network, images, batchsize
        _, channels, height, width = images.x.shape
        self.x = xp.empty((batchsize, height, width, channels), np.float32)
        self.t = xp.empty((batchsize,), np.int32)
        self.counter = xp.zeros(1, np.int64)
        self.loss, self.correct = xp.zeros((), np.float64), xp.zeros((), np.int64)
        self.captured = Captured(self._compute, lambda: places(network))

    def __call__(self) -> tuple[float, int]:
        """Sum of the images' losses, and number of right answers."""
        self.captured.check()
        for array in (self.counter, self.loss, self.correct):
            array.fill(0)
        for _ in range(len(self.images) // self.batchsize):
            self.captured()
        return self.batchsize * float(self.loss), int(self.correct)

    def _compute(self) -> None:
        images = self.images
        _, channels, height, width = images.x.shape
        arrays = images.x, images.y, images.mean, self.counter, self.x, self.t
        numbers = self.batchsize, channels, height * width
        programs.launch("centre", self.batchsize * height * width, *arrays, *numbers)
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            y = self.network(cuda._images(self.x))
            loss = self.backend.softmax_cross_entropy(y, self.t)
        arrays = y.array, self.t, loss.array, *y.shape
        sums = self.loss, self.correct, self.counter
        programs.launch("finish_step", programs.THREADS, *arrays, *sums)


class Recorded(cuda.Cuda):
    """The CUDA backend, whose training steps and evaluations are recorded where they can be."""

    def recorded_step(self, optimizer, batches, loss, correct) -> Step | None:
        if not isinstance(optimizer, FlatMomentumSGD):
            return None
        return Step(self, optimizer, batches, loss, correct)

    def recorded_evaluation(self, network, images, batchsize: int) -> Evaluation | None:
        if len(images) % batchsize or not cuda._are_floats(*network.params()):
            return None
        return Evaluation(self, network, images, batchsize)


def places(network) -> tuple[int, ...]:
    """Where the weights and statistics of a network are."""
    arrays = [p.array for p in network.params()]
    for link in network.links():
        if isinstance(link, chainer.links.BatchNormalization):
            arrays += [link.avg_mean, link.avg_var]
    return tuple(map(cuda.cudnn.address, arrays))
