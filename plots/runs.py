"""A training run as its log tells it, and runs that differ only in the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NAMES = {  # of what the report has trained; of others a run's record says it
    "plain": "Plain",
    "resnet": "ResNet",
    "resresnet": "ResResNet",
    "top_down": "Top-down",
    "bottom_up": "Bottom-up",
}
COMPLETE, DIVERGED, UNFINISHED = "complete", "diverged", "unfinished"


@dataclass(frozen=True)
class Run:
    """One log, and what args.json beside it says about it.

    Attributes:
        path: The run folder; the log itself where there is no args.json.
        entries: The log, one dict per epoch.
        evaluation: What accuracy was measured on, ``test`` or ``validation``.
        identity: ``run`` of args.json; empty for a plain log.
        starts: ``starts`` of args.json: command, device, versions ... of each process.
    """

    path: Path
    entries: list[dict]
    evaluation: str
    identity: dict
    starts: list[dict]

    @property
    def state(self) -> str:
        """``complete``, ``diverged`` (a loss that is no number) or ``unfinished``."""
        if not all(map(math.isfinite, self.loss.values())):
            return DIVERGED
        return UNFINISHED if self.identity and self.progress < 1 else COMPLETE

    @property
    def progress(self) -> float:
        """Part of the schedule's iterations that is done; 0..1."""
        return self.entries[-1]["iteration"] / self.identity["schedule"]["iterations"]

    @property
    def loss(self) -> dict[float, float]:
        """Training loss by epoch."""
        return {self.epoch(entry): entry["main/loss"] for entry in self.entries}

    @property
    def error(self) -> dict[float, float]:
        """Error of the evaluation by epoch, in percent."""
        return {epoch: 100 - percent for epoch, percent in self._accuracy(self.entries).items()}

    @property
    def last(self) -> float:
        """Accuracy after the last epoch, in percent."""
        return list(self._accuracy(self.entries).values())[-1]

    @property
    def best(self) -> float:
        """Highest accuracy of any epoch in percent; of the last stage when there are several."""
        stage = self.entries[-1].get("stage")
        return max(self._accuracy(e for e in self.entries if e.get("stage") == stage).values())

    @property
    def seconds(self) -> float | None:
        """Time that the training took."""
        return self.entries[-1].get("elapsed_time")

    @property
    def drops(self) -> list[float]:
        """Epochs at which the learning rate fell."""
        if self.identity and "stage" not in self.entries[-1]:
            return [self._epochs(drop) for drop in self.identity["schedule"]["drops"]]
        pairs = zip(self.entries, self.entries[1:], strict=False)
        return [self.epoch(a) for a, b in pairs if b.get("lr", 0) < a.get("lr", 0)]

    @property
    def additions(self) -> list[float]:
        """Epochs after which partial training added a block."""
        pairs = zip(self.entries, self.entries[1:], strict=False)
        return [self.epoch(a) for a, b in pairs if a.get("stage") != b.get("stage")]

    def epoch(self, entry: dict) -> float:
        """Count the epochs trained at ``entry``; not whole where training ends within an epoch."""
        if self.identity and "stage" not in entry:
            return self._epochs(entry["iteration"])
        return entry["epoch"]

    def _epochs(self, iterations: int) -> float:
        return iterations * self.identity["batchsize"] / self.identity["training images"]

    def _accuracy(self, entries: Iterable[dict]) -> dict[float, float]:
        key = f"{self.evaluation}/main/accuracy"
        return {self.epoch(entry): 100 * entry[key] for entry in entries if key in entry}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        conditions: What they share: their identity without the seed.
        runs: The runs, by seed.
    """

    conditions: dict
    runs: list[Run]

    def of(self, state: str) -> list[Run]:
        """List the runs in that state."""
        return [run for run in self.runs if run.state == state]

    @property
    def architecture(self) -> str | None:
        """Name as in args.json; None for a plain log."""
        return self.conditions.get("architecture")

    @property
    def layers(self) -> int | None:
        """Weighted layers, 6n + 2 where a module has two (report, II); None for a plain log."""
        if not self.architecture:
            return None
        return self._recorded("layers", int, 6 * self.conditions["n"] + 2)

    @property
    def label(self) -> str | None:
        """What tables and plots call the architecture; None for a plain log."""
        return NAMES.get(self.architecture) or self._recorded("label", str, self.architecture)

    @property
    def beside(self) -> str | None:
        """The architecture whose numbers are set beside those of one that the report has not."""
        return None if self.architecture in NAMES else self._recorded("beside", str, None)

    def _recorded(self, key: str, kind: type, default):
        """Look up what the last start of the first run says; older versions said less."""
        found = self.runs[0].starts[-1].get(key) if self.runs[0].starts else None
        return found if type(found) is kind else default

    @property
    def name(self) -> str:
        """Architecture and depth, or where the plain log lies."""
        if self.architecture:
            return f"{self.label}-{self.layers}"
        return "/".join(self.runs[0].path.parts[-2:])
