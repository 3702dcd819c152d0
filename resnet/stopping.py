"""Stops training between two iterations: on a signal, or when its time is over."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable


class StopRequest:
    """Lets training stop between two iterations: on a signal, or when its time is over.

    Signals are noted while it is entered, and to the end of a process that leaves by ``sys.exit``:
    a batch system and a launcher under it each send their own, at any time, and a later one must
    not keep a snapshot from being written. Only Ctrl-C ends the process at once, when it comes
    for a third time; the second tells what that loses. A closed terminal and a pipe without a
    reader are signals, too.

    Args:
        deadline: When the time is over, on the clock of ``time.monotonic``.

    Attributes:
        reason: Why training shall stop; None while it shall not.
        unsaved: Tells how many seconds of training no snapshot holds yet.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGPIPE)

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.unsaved: Callable[[], float] = lambda: 0
        self._signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        if self._signal is not None:
            return self._signal.name
        return "its time limit" if time.monotonic() >= self.deadline else None

    def __enter__(self) -> StopRequest:
        self._signal = None
        self._before = {number: signal.signal(number, self._remember) for number in self.noted()}
        return self

    @classmethod
    def noted(cls) -> set[signal.Signals]:
        """List those of ``SIGNALS`` that are a request here: under nohup, SIGHUP is none."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        return set(cls.SIGNALS) - ({signal.SIGHUP} if ignored else set())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not SystemExit:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        first = self._signal is None
        if first:
            self._signal = signal.Signals(number)
        if number == signal.SIGINT:
            text = "finishing this iteration, then a snapshot"
            if not first:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                text += (
                    "; Ctrl-C once more ends it at once and loses the last "
                    f"{self.unsaved():.0f} s of training"
                )
            with contextlib.suppress(OSError):  # not print, which may be what was interrupted
                os.write(2, f"\n{text}\n".encode())


class UntilDone:
    """Stop trigger: all iterations done, or a wish to stop in one of the processes."""

    def __init__(self, iterations: int, request: StopRequest) -> None:
        self.iterations = iterations
        self.request = request

    def __call__(self, trainer) -> bool:
        updater = trainer.updater
        wish = updater.processes.any(self.request.reason is not None)
        return updater.iteration >= self.iterations or wish

    def get_training_length(self) -> tuple[int, str]:
        return self.iterations, "iteration"
