"""Learning rate as a pure function of the iteration, and the warm-up that ends on a condition."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

INITIAL_RATE = 0.1  # He et al. 2015, 4.2
# Of partial training: epochs of each stage, and where its rate drops (report, III.B).
STAGES = ((50, (40,)), (50, (40,)), (100, (40, 80)))
LAST_EPOCHS = STAGES[-1][0]
WARM_UP_FROM = 110  # layers, unless a flag says otherwise: He et al. 2015, 4.2
WARM_UP_RATE = 0.01
WARM_UP_ERROR = 0.80  # warm-up ends when the training error falls below it
WARM_UP_WINDOW = 100  # iterations the training error is averaged over
WARM_UP_LIMIT = 2000  # iterations; He et al. needed about 400. A net that cannot learn goes on


@dataclass(frozen=True)
class Schedule:
    """A rate that is divided by 10 at each drop.

    Args:
        name: ``he2015``, ``report100`` or ``custom``; ``he2015 / 4`` of one that is shortened.
        iterations: Length of the training.
        drops: Iterations from which on the rate is a tenth of the one before.
    """

    name: str
    iterations: int
    drops: tuple[int, ...]

    def rate(self, iteration: int) -> float:
        """Compute the rate of the update number ``iteration``, counted from 0."""
        return INITIAL_RATE / 10 ** sum(iteration >= drop for drop in self.drops)

    def shortened(self, factor: int) -> Schedule:
        """Make this schedule ``factor`` times shorter, its drops alike; the rates are the same."""
        if factor == 1:
            return self
        iterations, *drops = (math.ceil(end / factor) for end in (self.iterations, *self.drops))
        return Schedule(f"{self.name} / {factor}", iterations, tuple(drops))


def he2015() -> Schedule:
    """Make the schedule of 64k iterations with drops at 32k and 48k (He et al. 2015, 4.2)."""
    return Schedule("he2015", 64_000, (32_000, 48_000))


def epochs(
    length: float, drops: Sequence[float], size: int, batchsize: int, name: str = "custom"
) -> Schedule:
    """Make a schedule counted in epochs of ``size`` images, in batches of ``batchsize``."""

    def iteration(epoch: float) -> int:
        return math.ceil(epoch * size / batchsize)

    return Schedule(name, iteration(length), tuple(map(iteration, drops)))


def report100(size: int, batchsize: int) -> Schedule:
    """Make the schedule that the report prints (III.B): 100 epochs with drops at 40 and 80."""
    return epochs(100, (40, 80), size, batchsize, "report100")


class WarmUp:
    """Rate 0.01 until the training error falls below 80 % (He et al. 2015, 4.2).

    The error is that of the last ``WARM_UP_WINDOW`` iterations. Its state travels in snapshots.

    Attributes:
        ended_at: Iteration from which on the schedule's own rate holds; None while warming up.
    """

    def __init__(self, active: bool) -> None:
        self.ended_at: int | None = None if active else 0
        self._errors: deque[float] = deque(maxlen=WARM_UP_WINDOW)

    @property
    def active(self) -> bool:
        return self.ended_at is None

    def observe(self, iteration: int, error: float) -> None:
        """Take the training error (0..1) of the batch of ``iteration`` into account."""
        self._errors.append(error)
        full = len(self._errors) == WARM_UP_WINDOW
        learned = full and sum(self._errors) / WARM_UP_WINDOW < WARM_UP_ERROR
        if learned or iteration + 1 >= WARM_UP_LIMIT:
            self.ended_at = iteration + 1

    def serialize(self, serializer) -> None:
        """Save to or load from a snapshot."""
        text = ",".join(map(repr, self._errors))
        text = str(serializer("errors", text))
        self._errors = deque(map(float, filter(None, text.split(","))), WARM_UP_WINDOW)
        ended_at = int(serializer("ended_at", -1 if self.ended_at is None else self.ended_at))
        self.ended_at = None if ended_at < 0 else ended_at
