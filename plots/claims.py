"""Judge every claim of the report by the logs of the runs made so far.

  python plots/claims.py runs                   markdown, on the screen
  python plots/claims.py runs -o results        results/claims.md

A rule compares means over seeds, and a difference counts where it is beyond its 95 % interval: of
Student's t, with the deviation of the seeds within all nets of a kind (plain nets; ResNets, those
trained block by block among them; ResResNets), and Welch's degrees of freedom for nets of two
kinds. A difference within it decides nothing, however many runs there are, nor does one of nets of
a kind without two runs of any; a verdict for which a net has a single run says "one run". Runs with
other data or batches are never compared, nor those of other schedules, but that partial training,
which has its own, is compared with whole networks.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plots import conditions, logs, reference
from plots.results import BLANK, WITHIN, spread
from plots.runs import COMPLETE, DIVERGED, NAMES, Group, Run
from resnet import command, files, schedule

REPRODUCED, NOT_REPRODUCED, OPEN = "reproduced", "not reproduced", "open"
CHOICES = ("augmentation", "scale", "freeze", "new ends")  # that tell nets of one set apart
FULL = "he2015"
PARTIAL_EPOCHS = 200  # of the report's partial training, all stages
SMALLEST = 1e-12  # of a loss; a smaller one is rounding
AS_HIGH = math.log(1.1)  # of a loss: as high as another one that is lower by less than 10 %
HOW = (
    "A difference counts where it is beyond its 95 % interval (Student's t), by the deviation of "
    "the seeds within all nets of a kind: plain nets, ResNets (those trained block by block among "
    "them), ResResNets; those without augmentation by themselves. Within it a claim stays open. "
    "Losses are compared by their ratio. Where a net has one run, the verdict says so."
)
SHORTER = (
    "he2015 is the full schedule of He et al., 64,000 iterations, he2015 / 4 a quarter of it. The "
    "commands make full ones; with --shorten 4, quarters."
)
# Student's t, two-sided 95 %, by degrees of freedom; in between, that of the fewer.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
           10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000}  # fmt: skip


@dataclass(frozen=True)
class Net:
    """What is trained: architecture, depth and the choices beyond the report's."""

    architecture: str
    layers: int
    choices: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        chosen = [conditions.describe(*choice) for choice in self.choices]
        return ", ".join([f"{NAMES[self.architecture]}-{self.layers}", *chosen])


@dataclass(frozen=True)
class Quantity:
    """What is measured of each run.

    Attributes:
        name: In words, as it is shown.
        of: The value of a run; None where its log does not have it.
        relative: Whether a difference is one of the logarithms: a ratio.
        diverged: Whether a run whose loss is no longer a number has a value, too.
    """

    name: str
    of: Callable[[Run], float | None]
    relative: bool = False
    diverged: bool = False

    def values(self, group: Group | None) -> list[float]:
        """List the values of the complete runs of a group."""
        runs = group.of(COMPLETE) + group.of(DIVERGED) * self.diverged if group else []
        return [value for run in runs if (value := self.of(run)) is not None]

    def scaled(self, values: Iterable[float]) -> list[float]:
        """Bring values to the scale on which they are compared."""
        return [math.log(max(value, SMALLEST)) if self.relative else value for value in values]

    def show(self, values: Sequence[float]) -> str:
        """Write mean ± deviation (runs); of losses with four digits."""
        return spread(values, 4 if self.relative else 2)


def _overfitting(run: Run) -> float | None:
    accuracy = run.entries[-1].get("main/accuracy")
    return None if accuracy is None else 100 * accuracy - run.last


def _distance(block: str, stage: int) -> Callable[[Run], float | None]:
    """Measure how far ``block`` has moved in a stage of partial training, in % of its norm."""

    def of(run: Run) -> float | None:
        found = [e.get(f"{block}/distance") for e in run.entries if e.get("stage") == stage]
        return 100 * found[-1] if found and found[-1] is not None else None

    return of


def _rise(stage: int, same_rate: bool) -> Callable[[Run], float | None]:
    """Divide training loss of the first epoch of a stage by that of the last one before.

    With ``same_rate``, by that of the last one before that had its rate.
    """

    def of(run: Run) -> float | None:
        first = next((e for e in run.entries if e.get("stage") == stage), None)
        before = [e for e in run.entries if e.get("stage") == stage - 1]
        if same_rate and first:
            before = [e for e in before if e.get("lr") == first.get("lr")]
        return first["main/loss"] / before[-1]["main/loss"] if first and before else None

    return of


ACCURACY = Quantity("accuracy, %", lambda run: run.last, diverged=True)
LOSS = Quantity("training loss", lambda run: run.entries[-1]["main/loss"], relative=True)
OVERFITTING = Quantity("training minus test accuracy, points", _overfitting)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a quantity of a net."""

    net: Net
    quantity: Quantity


@dataclass(frozen=True)
class Comparison:
    """A condition of a claim on the difference ``left`` minus ``right``.

    Attributes:
        left: Some runs.
        right: Other runs, or a number.
        kind: ``above``; ``below``; ``not above``, but for a ``margin``; ``about``: within
            ``margin`` of ``target``; or ``as published``: the number is one run of the same spread,
            and no further away, nor could it be by more than ``margin``.
    """

    left: Side
    right: Side | float
    kind: str = "above"
    target: float = 0
    margin: float = 0

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those that are measured."""
        return (self.left, self.right) if isinstance(self.right, Side) else (self.left,)

    @property
    def name(self) -> str:
        """What is compared, in words."""
        right = self.right.net.name if isinstance(self.right, Side) else f"{self.right:.2f}"
        nets = dict.fromkeys((self.left.net.name, right))
        return f"{' against '.join(nets)} in {self.left.quantity.name.partition(',')[0]}"

    def show(self, difference: float, half: float) -> str:
        """Write its name, and the difference with its 95 % interval."""
        if self.left.quantity.relative:
            ratio, low, high = map(math.exp, (difference, difference - half, difference + half))
            return f"{self.name}: {ratio:.2f} times, {low:.2f} to {high:.2f}"
        return f"{self.name}: {difference:+.2f} ± {half:.2f}"


@dataclass(frozen=True)
class Claim:
    """What the report says, and what decides it.

    Attributes:
        section: Where the report says it.
        title: It in a few words.
        text: It in our words.
        rule: What decides it, in words.
        commands: What makes the runs.
        comparisons: The rule: all of them must hold.
        full: Whether only a full schedule can decide it.
    """

    section: str
    title: str
    text: str
    rule: str
    commands: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    full: bool = False


@dataclass(frozen=True)
class Verdict:
    """What runs say about a claim.

    Attributes:
        schedule: Of the runs.
        word: ``REPRODUCED``, ``NOT_REPRODUCED`` or ``OPEN``.
        reason: What has to be said with the word: one run, what is missing, what does not hold.
        measured: The values, a line for each quantity.
        groups: The runs.
    """

    schedule: str
    word: str
    reason: str
    measured: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def text(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word

    @property
    def schedules(self) -> str:
        """``schedule``, and that of partial training if it is among the runs."""
        plans = [group.conditions["schedule"] for group in self.groups]
        own = [conditions.describe("schedule", p) for p in plans if conditions.is_partial(p)]
        return "; ".join(dict.fromkeys(filter(None, [self.schedule, *own])))


class Evidence:
    """Runs that may be compared: of the same schedule, data and batch.

    Args:
        label: Their schedule, for people.
        full: Whether it is the full one.
        groups: The runs.
    """

    def __init__(self, label: str, full: bool, groups: Iterable[Group]) -> None:
        self.label, self.full = label, full
        self.groups: dict[Net, Group] = {}
        for group in groups:
            # Of a net with and without warm-up, the one that the flags give by default.
            deep = group.layers >= schedule.WARM_UP_FROM
            default = bool(group.conditions.get("warm-up")) == deep
            net = _net(group)
            if default or net not in self.groups:
                self.groups[net] = group

    def values(self, side: Side) -> list[float]:
        """Find the quantity of each run, on the scale on which it is compared."""
        return side.quantity.scaled(side.quantity.values(self.groups.get(side.net)))

    def difference(self, comparison: Comparison) -> tuple[float, float]:
        """Compute the difference and half of its 95 % interval; NaN where no spread is known."""
        left, right = comparison.left, comparison.right
        samples = [self.values(side) for side in comparison.sides]
        shares: dict[tuple, float] = {}  # of the variance of a single run, by kind of net
        for side, values in zip(comparison.sides, samples, strict=True):
            key = _kind(side.net), side.quantity
            shares[key] = shares.get(key, 0) + 1 / len(values)
        if comparison.kind == "as published":
            shares[_kind(left.net), left.quantity] += 1
        variance, spent = 0.0, 0.0  # Welch and Satterthwaite
        for key, share in shares.items():
            one, freedom = self._variance(*key)
            variance += one * share
            spent += (one * share) ** 2 / freedom if freedom else math.nan
        freedom = variance**2 / spent if spent else math.inf
        other = mean(samples[1]) if isinstance(right, Side) else left.quantity.scaled([right])[0]
        return mean(samples[0]) - other, student(freedom) * math.sqrt(variance)

    def _variance(self, kind: tuple, quantity: Quantity) -> tuple[float, int]:
        """Compute the variance of one run within all nets of a kind, and its degrees of freedom."""
        known = [self.values(Side(net, quantity)) for net in self.groups if _kind(net) == kind]
        freedom = sum(len(values) - 1 for values in known if values)
        squares = sum((value - mean(values)) ** 2 for values in known for value in values)
        return (squares / freedom if freedom else math.nan), freedom


def student(freedom: float) -> float:
    """Look up Student's t, two-sided 95 %; NaN if ``freedom`` is."""
    known = [t for least, t in STUDENT.items() if least <= freedom + SMALLEST]
    return known[-1] if known else math.nan


def decide(comparison: Comparison, difference: float, half: float) -> bool | None:
    """Decide whether a comparison holds; None where the runs cannot tell.

    Args:
        comparison: What is asked.
        difference: Left minus right.
        half: Of the 95 % interval of the difference; NaN where no spread is known.
    """
    low, high, margin = difference - half, difference + half, comparison.margin
    match comparison.kind:
        case "above":
            holds, fails = low > 0, high < 0
        case "below":
            holds, fails = high < 0, low > 0
        case "not above":
            holds, fails = high <= margin, low > margin
        case "about":
            least, most = comparison.target - margin, comparison.target + margin
            holds, fails = least <= low and high <= most, high < least or low > most
        case "as published":
            holds, fails = abs(difference) <= half <= margin, abs(difference) > half
        case kind:
            raise ValueError(kind)
    return holds if holds or fails else None


def judge(claim: Claim, evidence: Evidence) -> Verdict | None:
    """Find the verdict on a claim by runs of one schedule; None without any of its runs."""
    sides = list(dict.fromkeys(side for each in claim.comparisons for side in each.sides))
    measured: dict[str, list[str]] = {}
    for side in sides:
        if values := side.quantity.values(evidence.groups.get(side.net)):
            shown = f"{side.net.name} {side.quantity.show(values)}"
            measured.setdefault(side.quantity.name, []).append(shown)
    if not measured or (claim.full and not evidence.full):
        return None
    missing, failed, undecided, singles = [], [], [], []
    for each in claim.comparisons:
        samples = [evidence.values(side) for side in each.sides]
        if not all(samples):
            sides_and_samples = zip(each.sides, samples, strict=True)
            missing += [side.net.name for side, values in sides_and_samples if not values]
            continue
        difference, half = evidence.difference(each)
        holds = decide(each, difference, half)
        shown = "no spread is known" if math.isnan(half) else each.show(difference, half)
        if holds is False:
            failed.append(shown)
        elif holds is None:
            undecided.append(shown)
        if min(map(len, samples)) < 2:
            singles.append(shown)
    if failed:
        word, reasons = NOT_REPRODUCED, failed
    elif missing:
        word, reasons = OPEN, [_missing(missing)]
    elif undecided:
        word, reasons = OPEN, undecided
    else:
        word, reasons = REPRODUCED, []
    if any(shown in reasons or word == REPRODUCED for shown in singles):
        reasons = [*reasons, "one run"]
    lines = tuple(f"{name}: {', '.join(values)}" for name, values in measured.items())
    groups = dict.fromkeys(side.net for side in sides if side.net in evidence.groups)
    return Verdict(
        evidence.label,
        word,
        "; ".join(dict.fromkeys(reasons)),
        lines,
        tuple(evidence.groups[net] for net in groups),
    )


def _missing(nets: Iterable[str]) -> str:
    return "missing: " + ", ".join(f"'{net}'" for net in dict.fromkeys(nets))


def _net(group: Group) -> Net:
    choices = tuple((key, group.conditions[key]) for key in CHOICES if key in group.conditions)
    return Net(group.architecture, group.layers, choices)


def _kind(net: Net) -> tuple:
    """Tell the kind of a net of any depth: nets of a kind are spread alike by their seeds."""
    architecture = "resnet" if net.architecture in ("top_down", "bottom_up") else net.architecture
    return architecture, dict(net.choices).get("augmentation")


def _schedule(group: Group) -> str:
    """Name the schedule, the same for the whole net and for partial training beside it."""
    plan = group.conditions["schedule"]
    name, _, factor = str(plan.get("name")).partition(" / ")
    if conditions.is_partial(plan):
        images = plan["iterations"] * group.conditions["batchsize"]
        epochs = images / group.conditions["training images"]
        times = int(factor) if factor.isdigit() else 1
        if abs(epochs * times - PARTIAL_EPOCHS) < 1:  # not shortened by --epoch
            name = FULL
    if name == FULL:
        return f"{FULL} / {factor}" if factor else FULL
    return conditions.describe("schedule", plan)


def collect(groups: Sequence[Group]) -> list[Evidence]:
    """Put the runs together that may be compared; the full schedule first."""
    trained = [group for group in groups if group.architecture in NAMES]
    keys = {key for group in trained for key in group.conditions}
    keys -= {*WITHIN, "schedule", *CHOICES}
    varying = [key for key in conditions.varying(trained) if key in keys]
    found: dict[str, tuple[str, list[Group]]] = {}
    for group in trained:
        others = (conditions.describe(key, group.conditions.get(key)) for key in varying)
        label = ", ".join([_schedule(group), *others])
        key = json.dumps([label, {key: group.conditions.get(key) for key in sorted(keys)}])
        found.setdefault(key, (label, []))[1].append(group)
    sets = [Evidence(label, _schedule(some[0]) == FULL, some) for label, some in found.values()]
    return sorted(sets, key=lambda each: (not each.label.startswith(FULL), each.label))


def verdicts(groups: Sequence[Group]) -> list[tuple[Claim, list[Verdict]]]:
    """Find for each claim its verdicts: of each schedule in which none of its runs is missing.

    Where there is none, the one of the schedule that has the most of them.
    """
    sets = collect(groups)
    judged = []
    for claim in CLAIMS:
        found = [verdict for each in sets if (verdict := judge(claim, each))]
        whole = [verdict for verdict in found if not verdict.reason.startswith("missing")]
        if not found:
            nets = [side.net.name for each in claim.comparisons for side in each.sides]
            whole = [Verdict("", OPEN, _missing(nets))]
        judged.append((claim, whole or [max(found, key=lambda verdict: len(verdict.groups))]))
    return judged


def summary(groups: Sequence[Group]) -> list[str]:
    """Write one sentence for each verdict, with the claims that have it; what failed first."""
    sentences = []
    for word in (NOT_REPRODUCED, REPRODUCED, OPEN):
        titles = []
        for claim, found in verdicts(groups):
            own = [verdict.schedule for verdict in found if verdict.word == word]
            schedules = f" ({', '.join(filter(None, own))})" if any(own) else ""
            titles += [claim.title + schedules] if own else []
        if titles:
            sentences.append(f"{word.capitalize()}: {'; '.join(titles)}.")
    return sentences


def _plain(layers: int) -> Net:
    return Net("plain", layers)


def _resnet(layers: int) -> Net:
    return Net("resnet", layers)


def _resresnet(layers: int) -> Net:
    return Net("resresnet", layers)


TOP_DOWN, BOTTOM_UP = Net("top_down", 32), Net("bottom_up", 32)
WITHOUT = Net("resnet", 20, (("augmentation", "none"),))
MIDDLE = (32, 44, 56)


def _compare(quantity: Quantity, left: Net, kind: str, right: Net, **how: float) -> Comparison:
    return Comparison(Side(left, quantity), Side(right, quantity), kind, **how)


def _published(numbers: dict[int, float]) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(Side(_resnet(layers), ACCURACY), numbers[layers], "as published", margin=2)
        for layers in reference.DEPTHS
    )


def _chosen(net: Net, name: str, value: object) -> Net:
    return replace(net, choices=((name, value),))


def _stage_start(net: Net, stage: int, same_rate: bool) -> Comparison:
    before = "epoch with its rate before" if same_rate else "epoch before"
    name = f"training loss in the first epoch of stage {stage} / in the last {before}"
    return Comparison(Side(net, Quantity(name, _rise(stage, same_rate), True)), 1.0)


def _moves_less(stage: int, top_down: str, bottom_up: str) -> Comparison:
    def way(net: Net, block: str) -> Side:
        name = f"{block}'s way within stage {stage}, % of its norm"
        return Side(net, Quantity(name, _distance(block, stage)))

    return Comparison(way(TOP_DOWN, top_down), way(BOTTOM_UP, bottom_up), "below")


def _experiment(script: str, *flags: str) -> str:
    return " ".join([f"python experiments/{script}.py", *flags, "--runs 3"])


def _orders(*flags: str) -> tuple[str, ...]:
    return tuple(
        _experiment("partial_training", f"--order {order}", *flags)
        for order in ("top-down", "bottom-up")
    )


NEAR = "no further away than a single run may be by our seeds' spread, if that is below 2 points"
THREE_ARCHITECTURES = tuple(_experiment(name) for name in ("resnet", "resresnet"))
CLAIMS = (
    Claim(
        "I, Fig. 1",
        "plain nets degrade with depth, in training loss too",
        "More layers make a plain network worse, and not by overfitting: its training loss rises.",
        "Training loss and test error of the plain net of 56 layers are above those of 20 and 32.",
        (_experiment("plain", "--n 3 5 9"),),
        tuple(
            comparison
            for layers in (20, 32)
            for comparison in (
                _compare(LOSS, _plain(56), "above", _plain(layers)),
                _compare(ACCURACY, _plain(56), "below", _plain(layers)),
            )
        ),
    ),
    Claim(
        "I, Fig. 1",
        "plain nets lose little up to 56 layers",
        "From 32 to 56 layers a plain network gets only slightly worse, with 110 far more.",
        "Test accuracy of the plain net of 56 layers is below that of 32 by no more than 5 points, "
        "and that of 110 layers below that of 56.",
        (_experiment("plain", "--n 5 9 18"),),
        (
            _compare(ACCURACY, _plain(32), "not above", _plain(56), margin=5),
            _compare(ACCURACY, _plain(110), "below", _plain(56)),
        ),
    ),
    Claim(
        "I, Fig. 1 and 9",
        "the plain net of 110 layers fails",
        "A plain network of 110 layers does not learn (9.98 %, chance is 10 %).",
        "Its test accuracy is below 15 %.",
        (_experiment("plain", "--n 18"),),
        (Comparison(Side(_plain(110), ACCURACY), 15.0, "below"),),
    ),
    Claim(
        "II",
        "augmentation brings about 4 points",
        "Random crops and flips raise test accuracy by about 4 points.",
        "ResNet-20 with augmentation is 2 to 6 points above the one without.",
        (_experiment("resnet", "--n 3"), _experiment("resnet", "--n 3 --augmentation none")),
        (_compare(ACCURACY, _resnet(20), "about", WITHOUT, target=4, margin=2),),
    ),
    Claim(
        "II",
        "augmentation reduces overfitting",
        "Random crops and flips greatly reduce overfitting.",
        "Without augmentation, the accuracy of ResNet-20 in its last epoch of training is further "
        "above its test accuracy than with it (then on augmented images).",
        (_experiment("resnet", "--n 3"), _experiment("resnet", "--n 3 --augmentation none")),
        (_compare(OVERFITTING, WITHOUT, "above", _resnet(20)),),
    ),
    Claim(
        "II, Fig. 5",
        "ResNets do not degrade with depth",
        "Residual networks overcome the degradation problem: deeper ones can still be optimized.",
        "The training loss of the ResNet of 56 layers is not above those of 20 and 32 by 10 % or "
        "more, nor that of 32 above that of 20.",
        (_experiment("resnet", "--n 3 5 9"),),
        tuple(
            _compare(LOSS, _resnet(deep), "not above", _resnet(other), margin=AS_HIGH)
            for deep, other in ((32, 20), (56, 20), (56, 32))
        ),
    ),
    Claim(
        "II, Fig. 6; IV",
        "ResNets gain with depth",
        "Residual networks become more accurate with depth.",
        "Test accuracy of ResNets of 32 and 56 layers is above that of 20.",
        (_experiment("resnet", "--n 3 5 9"),),
        tuple(_compare(ACCURACY, _resnet(deep), "above", _resnet(20)) for deep in (32, 56)),
    ),
    Claim(
        "II, Fig. 6; IV",
        "the ResNet of 110 layers is the best",
        "The deepest residual network, of 110 layers, is the most accurate.",
        "Its test accuracy is above that of every other depth.",
        (_experiment("resnet"),),
        tuple(
            _compare(ACCURACY, _resnet(110), "above", _resnet(other))
            for other in reference.DEPTHS[:-1]
        ),
    ),
    Claim(
        "II, Fig. 6",
        "ResNets are as accurate as the report's",
        "The accuracies of Fig. 6, column 'Our results': 91.53, 92.66, 92.20, 92.30 and 93.59 %.",
        f"Each of the five is {NEAR}.",
        (_experiment("resnet"),),
        _published(reference.REPORT["resnet"]),
        full=True,
    ),
    Claim(
        "II, Fig. 6",
        "ResNets are as accurate as those of He et al.",
        "The accuracies of He et al., column 'Paper', are reproduced.",
        f"Each of the five is {NEAR}. (With 110 layers it is the best of their five runs.)",
        (_experiment("resnet"),),
        _published(reference.HE2015),
        full=True,
    ),
    Claim(
        "III.A, Fig. 9",
        "ResResNets are below ResNets at every depth",
        "Shortcuts round the blocks make a ResNet of any depth less accurate.",
        "At each of the five depths, test accuracy of the ResResNet is below the ResNet's.",
        THREE_ARCHITECTURES,
        tuple(
            _compare(ACCURACY, _resresnet(layers), "below", _resnet(layers))
            for layers in reference.DEPTHS
        ),
    ),
    Claim(
        "III.A, Fig. 8",
        "ResResNets fit the training images as well",
        "All ResResNets end with very low training losses, and yet are less accurate: it is not "
        "that they fit the training images less well than ResNets.",
        "At each of the five depths, training loss of the ResResNet is not above the ResNet's by "
        "10 % or more.",
        THREE_ARCHITECTURES,
        tuple(
            _compare(LOSS, _resresnet(layers), "not above", _resnet(layers), margin=AS_HIGH)
            for layers in reference.DEPTHS
        ),
    ),
    Claim(
        "III.A; IV",
        "ResResNets overfit",
        "ResResNets of middle depth are less accurate since they overfit.",
        "At 32, 44 and 56 layers, the accuracy of the ResResNet in its last epoch of training is "
        "further above its test accuracy than the ResNet's.",
        THREE_ARCHITECTURES,
        tuple(
            _compare(OVERFITTING, _resresnet(layers), "above", _resnet(layers)) for layers in MIDDLE
        ),
    ),
    Claim(
        "III.A, Fig. 9",
        "ResResNets of 20 and 110 layers are above those between",
        "The shallowest and the deepest ResResNet are more accurate than those of middle depth.",
        "Test accuracy of the ResResNets of 20 and of 110 layers is above those of 32, 44 and 56.",
        (_experiment("resresnet"),),
        tuple(
            _compare(ACCURACY, _resresnet(outer), "above", _resresnet(layers))
            for outer in (20, 110)
            for layers in MIDDLE
        ),
    ),
    Claim(
        "III.B",
        "bottom-up is level with the usual training",
        "A ResNet-32 trained block by block from the bottom up is comparable (92.15 and 92.66 %).",
        "Test accuracies are within 1 point of each other.",
        (_experiment("resnet", "--n 5"), *_orders()[1:]),
        (_compare(ACCURACY, BOTTOM_UP, "about", _resnet(32), margin=1),),
    ),
    Claim(
        "III.B",
        "top-down is below both",
        "A ResNet-32 trained block by block from the top down is less accurate (89.82 %).",
        "Its test accuracy is below that of the usual training and of bottom-up.",
        (_experiment("resnet", "--n 5"), *_orders()),
        tuple(_compare(ACCURACY, TOP_DOWN, "below", other) for other in (_resnet(32), BOTTOM_UP)),
    ),
    Claim(
        "III.B",
        "lower blocks are less plastic",
        "Top-down is worse since the lower blocks, which it adds, do not converge enough, less "
        "plastic than the upper ones, which bottom-up adds.",
        "In the stage that adds it, conv3 moves by less of its norm top-down than bottom-up, and "
        "conv4 (added last top-down) by less than conv2 (added last bottom-up).",
        _orders(),
        (_moves_less(2, "conv3", "conv3"), _moves_less(3, "conv4", "conv2")),
    ),
    Claim(
        "III.B",
        "a new block and the higher rate disturb what was trained",
        "The random block that is added and the rate that jumps back push the earlier blocks away "
        "from what they had learned.",
        "In both orders, training loss in the first epoch of stages 2 and 3 is above that of the "
        "last epoch before, and above that of the last one before that had the same rate: what the "
        "rate alone brings back is no disturbance by the block.",
        _orders(),
        tuple(
            _stage_start(net, stage, same_rate)
            for net in (TOP_DOWN, BOTTOM_UP)
            for stage in (2, 3)
            for same_rate in (False, True)
        ),
    ),
    Claim(
        "III.B",
        "a new block scaled by a small factor helps",
        "New blocks scaled by a factor much smaller than 1 may help (proposed, not tried).",
        "With a factor of 0.1, test accuracy is above that without, in both orders.",
        (*_orders(), *_orders("--scale 0.1")),
        tuple(
            _compare(ACCURACY, _chosen(net, "scale", 0.1), "above", net)
            for net in (TOP_DOWN, BOTTOM_UP)
        ),
    ),
    Claim(
        "III.B",
        "earlier blocks lose by being disturbed",
        "What the new block does to the earlier ones may cost the accuracy that was hoped for.",
        "With the earlier blocks held still, test accuracy is above that without, in both orders.",
        (*_orders(), *_orders("--freeze")),
        tuple(
            _compare(ACCURACY, _chosen(net, "freeze", True), "above", net)
            for net in (TOP_DOWN, BOTTOM_UP)
        ),
    ),
    Claim(
        "IV",
        "upper blocks adapt less",
        "Top-down is worse since the upper block, trained first, does not adapt when lower ones "
        "are added; the lower block, trained first from the bottom up, does.",
        "In stages 2 and 3, conv2 (top-down) moves by less of its norm than conv4 (bottom-up).",
        _orders(),
        (_moves_less(2, "conv2", "conv4"), _moves_less(3, "conv2", "conv4")),
    ),
)


def note(groups: Sequence[Group]) -> str:
    """Say how differences are judged, and what all runs have in common."""
    ours = conditions.shared(groups, but=["schedule"])
    return HOW + (f" Runs: {ours}." if ours else "")


def markdown(groups: Sequence[Group]) -> str:
    """Write summary, table, and the rules with their commands, in Markdown."""
    lines = ["### The report's claims", "", note(groups), ""]
    lines += [f"- {sentence}" for sentence in summary(groups)]
    lines += [
        "",
        "| Report | Claim | Schedule | Measured | Verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    judged = verdicts(groups)
    for claim, found in judged:
        for verdict in found:
            cells = (claim.section, claim.text, verdict.schedules or BLANK,
                     "; ".join(verdict.measured) or BLANK, verdict.text)  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", f"What decides each, and what makes the runs. {SHORTER}", ""]
    for claim, _ in judged:
        lines.append(f"- *{claim.title}*: {claim.rule}")
        lines += [f"  `{each}`" for each in claim.commands]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = logs.parser(__doc__)
    p.add_argument("--out", "-o", type=command.path, metavar="FOLDER",
                   help="write claims.md there (default: print it)")  # fmt: skip
    args = p.parse_args()
    text = markdown(logs.read(args.runs))
    if args.out is None:
        print(text, end="")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    files.write(args.out / "claims.md", text)
    print(f"wrote {args.out / 'claims.md'}")


if __name__ == "__main__":
    command.run(main)
