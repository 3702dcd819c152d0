"""Each claim of the report has its verdict by made logs: reproduced, not reproduced, open."""

import math
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python

sys.path.insert(0, str(ROOT))

from plots import claims, logs, reference
from plots.claims import NOT_REPRODUCED, OPEN, REPRODUCED
from plots.runs import Group, Run

DATA = Path(__file__).parent / "data"
SEEDS = (-0.2, 0, 0.2)  # what the seeds add to an accuracy; a tenth of it, in parts, to a loss

LENGTH = {"he2015": 64_000, "he2015 / 4": 16_000, "partial": 78_127, "partial / 4": 19_532}


def entry(accuracy, loss, trained=99.0, **more):
    return {
        "epoch": 1, "iteration": 10**6, "main/loss": loss, "main/accuracy": trained / 100,
        "test/main/accuracy": accuracy / 100, **more,
    }  # fmt: skip


def group(net, entries, seeds=SEEDS, schedule="he2015", **conditions):
    """Runs of ``entries``, spread by ``seeds``; ``net`` as (architecture, layers)."""
    architecture, layers = net
    identity = {
        "architecture": architecture, "n": (layers - 2) // 6, "batchsize": 128, "data": "CIFAR-10",
        "training images": 50_000, "evaluation": "test", "warm-up": layers >= 110,
        "schedule": {"name": schedule, "iterations": LENGTH[schedule], "drops": []}, **conditions,
    }  # fmt: skip
    runs = []
    for seed, shift in enumerate(seeds):
        log = []
        for each in entries:
            spread = {key: value * (1 + shift / 10) for key, value in each.items()
                      if key == "main/loss" or key.endswith("distance")}  # fmt: skip
            accuracy = each["test/main/accuracy"] + shift / 100
            log.append({**each, **spread, "test/main/accuracy": accuracy})
        runs.append(Run(Path(f"{net}-{seed}"), log, "test", {**identity, "seed": seed}, []))
    return Group(identity, runs)


def stages(last, first, added, start=1.5):
    """A partial training, which begins with conv2 top-down, or with conv4.

    Args:
        last: Its accuracy.
        first: How far the block that is trained first moves in stages 2 and 3.
        added: How far conv3 moves in stage 2, and the block that is added last in stage 3.
        start: Loss where a stage begins; it ends with 1, and had 1.2 before its rate fell.
    """
    upper, lower = first if isinstance(first, tuple) else (first, added)
    ways = {"conv2/distance": upper, "conv3/distance": added, "conv4/distance": lower}
    found = []
    for stage in (1, 2, 3):
        found += [
            entry(60, start, stage=stage, lr=0.1), entry(65, 1.2, stage=stage, lr=0.1),
            entry(70, 1.0, stage=stage, lr=0.01, **ways),
        ]  # fmt: skip
    return [*found[:-1], {**found[-1], **entry(last, 0.1)}]


def top_down(last, first=0.1, added=0.3, **how):
    return stages(last, (first, added), added, **how)


def bottom_up(last, first=0.4, added=0.6, **how):
    return stages(last, (added, first), added, **how)


LOSSES = {
    "plain": {20: 0.05, 32: 0.10, 44: 0.15, 56: 0.20, 110: 2.30},
    "resnet": {20: 0.030, 32: 0.020, 44: 0.015, 56: 0.010, 110: 0.008},
    "resresnet": {20: 0.028, 32: 0.018, 44: 0.014, 56: 0.009, 110: 0.007},
}
# The report's and He et al.'s accuracies, which no single run of so small a spread could both be.
BETWEEN = {44: 92.5, 56: 92.7}
TOP, BOTTOM = ("top_down", 32), ("bottom_up", 32)


def world(seeds=SEEDS, schedule="he2015", partial="partial", **changes):
    """The report's numbers, but for those ``BETWEEN``, and its explanations, as logs.

    Args:
        changes: Other entries by name: ``resnet_20``, ``without``, ``top_down``, ``scaled_top`` ...
            None for runs that are missing.
    """
    made = {}
    for architecture, losses in LOSSES.items():
        trained = 99.9 if architecture == "resresnet" else 99
        for layers, loss in losses.items():
            accuracy = reference.REPORT[architecture][layers]
            made[f"{architecture}_{layers}"] = (
                (architecture, layers), [entry(accuracy, loss, trained)], {},
            )  # fmt: skip
    for layers, accuracy in BETWEEN.items():
        loss = LOSSES["resnet"][layers]
        made[f"resnet_{layers}"] = ("resnet", layers), [entry(accuracy, loss)], {}
    made["without"] = ("resnet", 20), [entry(87.5, 0.001, 100)], {"augmentation": "none"}
    made["top_down"] = TOP, top_down(89.82), {}
    made["bottom_up"] = BOTTOM, bottom_up(92.15), {}
    for name, choice in (("scaled", {"scale": 0.1}), ("frozen", {"freeze": True})):
        made[f"{name}_top"] = TOP, top_down(91.5), choice
        made[f"{name}_bottom"] = BOTTOM, bottom_up(93.5), choice
    groups = []
    for name, (net, entries, choice) in made.items():
        entries = changes.get(name, entries)
        if entries is not None:
            plan = partial if net in (TOP, BOTTOM) else schedule
            groups.append(group(net, entries, seeds, plan, **choice))
    return groups


def verdicts(groups):
    return {claim.title: found for claim, found in claims.verdicts(groups)}


def words(groups):
    return {title: [verdict.word for verdict in found] for title, found in verdicts(groups).items()}


# For each claim, what would contradict it.
CONTRADICTIONS = {
    "plain nets degrade with depth, in training loss too": {"plain_56": [entry(85.81, 0.04)]},
    "plain nets lose little up to 56 layers": {"plain_56": [entry(66.26, 0.97)]},
    "the plain net of 110 layers fails": {"plain_110": [entry(70, 0.5)]},
    "augmentation brings about 4 points": {"without": [entry(91, 0.001, 100)]},
    "augmentation reduces overfitting": {"without": [entry(87.5, 0.001, 92)]},
    "ResNets do not degrade with depth": {"resnet_56": [entry(92.3, 0.05)]},
    "ResNets gain with depth": {"resnet_32": [entry(90, 0.02)]},
    "the ResNet of 110 layers is the best": {"resnet_110": [entry(92, 0.008)]},
    "ResNets are as accurate as the report's": {"resnet_44": [entry(90, 0.015)]},
    "ResNets are as accurate as those of He et al.": {"resnet_44": [entry(91, 0.015)]},
    "ResResNets are below ResNets at every depth": {"resresnet_110": [entry(94.5, 0.007)]},
    "ResResNets fit the training images as well": {"resresnet_20": [entry(90.05, 0.1)]},
    "ResResNets overfit": {"resresnet_44": [entry(88.82, 0.3, 89)]},
    "ResResNets of 20 and 110 layers are above those between": {"resresnet_44": [entry(91, 0.014)]},
    "bottom-up is level with the usual training": {"bottom_up": bottom_up(90)},
    "top-down is below both": {"top_down": top_down(92.7)},
    "lower blocks are less plastic": {"top_down": top_down(89.82, added=0.7)},
    "a new block and the higher rate disturb what was trained": {
        "bottom_up": bottom_up(92.15, start=1.1)  # as the rate alone would have it
    },
    "a new block scaled by a small factor helps": {"scaled_top": top_down(88)},
    "earlier blocks lose by being disturbed": {"frozen_bottom": bottom_up(91)},
    "upper blocks adapt less": {"top_down": top_down(89.82, first=0.5)},
}


def test_by_the_reports_own_numbers_every_claim_is_reproduced():
    found = words(world())
    assert found == {title: [REPRODUCED] for title in CONTRADICTIONS}  # in the report's order


@pytest.mark.parametrize("title", CONTRADICTIONS)
def test_a_claim_that_the_logs_contradict_is_not_reproduced(title):
    (verdict,) = verdicts(world(**CONTRADICTIONS[title]))[title]
    assert verdict.word == NOT_REPRODUCED
    assert "one run" not in verdict.text and " in " in verdict.reason


@pytest.mark.parametrize("title", CONTRADICTIONS)
def test_a_claim_without_all_its_runs_is_open_and_names_them(title):
    (name,) = CONTRADICTIONS[title]
    groups = world(**{name: None})
    (verdict,) = verdicts(groups)[title]
    assert verdict.word == OPEN and verdict.reason.startswith("missing: '")
    (gone,) = {claims._net(g).name for g in world()} - {claims._net(g).name for g in groups}
    assert f"'{gone}'" in verdict.reason


# For each claim, the runs that its rule in words speaks of; see ``world``.
ALL = {kind: [f"{kind}_{layers}" for layers in reference.DEPTHS] for kind in LOSSES}
NETS = {
    "plain nets degrade with depth, in training loss too": ["plain_20", "plain_32", "plain_56"],
    "plain nets lose little up to 56 layers": ["plain_32", "plain_56", "plain_110"],
    "the plain net of 110 layers fails": ["plain_110"],
    "augmentation brings about 4 points": ["resnet_20", "without"],
    "augmentation reduces overfitting": ["resnet_20", "without"],
    "ResNets do not degrade with depth": ["resnet_20", "resnet_32", "resnet_56"],
    "ResNets gain with depth": ["resnet_20", "resnet_32", "resnet_56"],
    "the ResNet of 110 layers is the best": ALL["resnet"],
    "ResNets are as accurate as the report's": ALL["resnet"],
    "ResNets are as accurate as those of He et al.": ALL["resnet"],
    "ResResNets are below ResNets at every depth": ALL["resresnet"] + ALL["resnet"],
    "ResResNets fit the training images as well": ALL["resresnet"] + ALL["resnet"],
    "ResResNets overfit": [
        f"{kind}_{layers}" for kind in ("resresnet", "resnet") for layers in (32, 44, 56)
    ],
    "ResResNets of 20 and 110 layers are above those between": ALL["resresnet"],
    "bottom-up is level with the usual training": ["bottom_up", "resnet_32"],
    "top-down is below both": ["top_down", "bottom_up", "resnet_32"],
    "lower blocks are less plastic": ["top_down", "bottom_up"],
    "a new block and the higher rate disturb what was trained": ["top_down", "bottom_up"],
    "a new block scaled by a small factor helps": [
        "top_down", "bottom_up", "scaled_top", "scaled_bottom",
    ],
    "earlier blocks lose by being disturbed": [
        "top_down", "bottom_up", "frozen_top", "frozen_bottom",
    ],
    "upper blocks adapt less": ["top_down", "bottom_up"],
}  # fmt: skip


def test_a_claim_waits_for_every_net_that_its_rule_speaks_of_and_for_no_other():
    found = {title: set() for title in NETS}
    for name in {name for names in NETS.values() for name in names}:
        for title, words_found in words(world(**{name: None})).items():
            found[title] |= {name} if words_found != [REPRODUCED] else set()
    assert found == {title: set(names) for title, names in NETS.items()}


CLOSE = (-0.02, 0, 0.02)  # seeds of a spread that decides by the margins of the rules alone


@pytest.mark.parametrize(
    ("title", "changes", "word"),
    [
        ("the plain net of 110 layers fails", {"plain_110": [entry(14.5, 2)]}, REPRODUCED),
        ("the plain net of 110 layers fails", {"plain_110": [entry(15.5, 2)]}, NOT_REPRODUCED),
        *(
            ("augmentation brings about 4 points", {"without": [entry(91.53 - gain, 0.1)]}, word)
            for gain, word in ((1.8, NOT_REPRODUCED), (2.2, REPRODUCED), (5.8, REPRODUCED),
                               (6.2, NOT_REPRODUCED))
        ),
        *(
            ("bottom-up is level with the usual training",
             {"bottom_up": bottom_up(92.66 + gain)}, word)
            for gain, word in ((-1.2, NOT_REPRODUCED), (-0.8, REPRODUCED), (0.8, REPRODUCED),
                               (1.2, NOT_REPRODUCED))
        ),
        *(
            ("ResResNets fit the training images as well",
             {"resresnet_20": [entry(90.05, 0.030 * ratio)]}, word)
            for ratio, word in ((1.08, REPRODUCED), (1.12, NOT_REPRODUCED))
        ),
        ("plain nets degrade with depth, in training loss too",
         {"plain_32": [entry(88.22, 0.21)]}, NOT_REPRODUCED),
        ("plain nets degrade with depth, in training loss too",
         {"plain_32": [entry(85.7, 0.10)]}, NOT_REPRODUCED),
        ("ResNets gain with depth", {"resnet_56": [entry(91.4, 0.01)]}, NOT_REPRODUCED),
    ],
)  # fmt: skip
def test_a_rule_decides_at_the_numbers_that_it_names(title, changes, word):
    assert words(world(CLOSE, **changes))[title] == [word]


@pytest.mark.parametrize(("away", "word"), [(0.75, REPRODUCED), (0.9, OPEN)])
def test_a_published_accuracy_is_confirmed_by_a_spread_of_less_than_two_points(away, word):
    """22 degrees of freedom, and a single run beside three: 2.086 * (4 / 3) ** 0.5 * ``away``."""
    found = words(world([-away, 0, away]))
    assert found["ResNets are as accurate as the report's"] == [word]


def test_student_s_t_leaves_five_percent_on_both_sides_together():
    """By the density, integrated from the middle outwards."""
    for freedom, t in claims.STUDENT.items():
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale /= math.sqrt(freedom * math.pi)
        steps = 20_000
        middles = ((i + 0.5) * t / steps for i in range(steps))
        within = sum((1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in middles)
        assert 2 * scale * within * t / steps == pytest.approx(0.95, abs=1e-4), freedom


def test_what_fails_decides_though_other_runs_are_missing():
    groups = world(resnet_32=None, resnet_56=[entry(90, 0.01)])
    (verdict,) = verdicts(groups)["ResNets gain with depth"]
    assert verdict.word == NOT_REPRODUCED
    assert verdict.reason.startswith("ResNet-56 against ResNet-20 in accuracy: -1.53 ")


def test_a_run_that_is_not_finished_is_none():
    groups = world(plain_110=[entry(10, 2.3, iteration=63_000)])
    (verdict,) = verdicts(groups)["the plain net of 110 layers fails"]
    assert verdict.text == "open (missing: 'Plain-110')"


def test_the_last_epoch_counts_not_the_best_one():
    first = {"iteration": 10}
    groups = world(
        plain_110=[entry(40, 0.5, **first), entry(9.98, 2.3)],
        without=[entry(95, 0.1, 80, **first), entry(87.5, 0.001, 100)],
    )
    found = verdicts(groups)
    (verdict,) = found["the plain net of 110 layers fails"]
    assert (verdict.word, verdict.measured) == (
        REPRODUCED, ("accuracy, %: Plain-110 9.98 ± 0.20 (3 runs)",),
    )  # fmt: skip
    (verdict,) = found["augmentation reduces overfitting"]
    assert verdict.word == REPRODUCED and "augmentation 12.50 ± 0.20" in verdict.measured[0]


@pytest.mark.parametrize("first", [True, False])
def test_of_a_net_with_and_without_warm_up_the_reports_way_is_judged(first):
    """Warm-up of the nets of 110 layers alone, whichever run is found first."""
    others = [
        group(("plain", 110), [entry(70, 0.5)], **{"warm-up": False}),
        group(("resnet", 20), [entry(99, 0.03)], **{"warm-up": True}),
    ]
    groups = [*others, *world()] if first else [*world(), *others]
    found = words(groups)
    assert found["the plain net of 110 layers fails"] == [REPRODUCED]
    assert found["ResNets gain with depth"] == [REPRODUCED]


def test_without_any_run_every_claim_is_open():
    assert set(map(str, words([]).values())) == {"['open']"}


def test_one_run_of_each_decides_nothing():
    found = verdicts(world(seeds=[0]))
    for title, (verdict,) in found.items():
        assert (verdict.word, verdict.reason) == (OPEN, "no spread is known; one run"), title


def test_one_run_is_judged_by_the_spread_of_its_kind_and_says_so():
    groups = [group(("resnet", 20), [entry(91.53, 0.03)])]
    found = verdicts([*groups, *world(seeds=[0], resnet_20=None)])
    (verdict,) = found["ResNets do not degrade with depth"]
    assert verdict.text == "reproduced (one run)"
    (verdict,) = found["top-down is below both"]  # a ResNet, trained otherwise
    assert verdict.text == "reproduced (one run)"
    for other_kind in ("the plain net of 110 layers fails", "augmentation brings about 4 points"):
        (verdict,) = found[other_kind]
        assert verdict.text == "open (no spread is known; one run)"


@pytest.mark.parametrize("runs", [1, 3, 30])
def test_a_difference_within_the_spread_decides_nothing_however_many_runs_there_are(runs):
    shifts = [0.2 * (-1) ** seed for seed in range(runs)] if runs > 1 else [0]
    groups = world(resnet_32=None)
    groups.append(group(("resnet", 32), [entry(91.56, 0.02)], seeds=shifts))
    (verdict,) = verdicts(groups)["ResNets gain with depth"]
    assert verdict.word == OPEN
    assert verdict.reason.startswith("ResNet-32 against ResNet-20 in accuracy: +"), verdict


def test_a_spread_that_would_confirm_any_published_accuracy_confirms_none():
    words_found = words(world([-3, 0, 3]))
    assert words_found["ResNets are as accurate as the report's"] == [OPEN]


def test_a_kind_of_net_is_not_judged_by_the_spread_of_another():
    """ResNets whose losses scatter, beside plain nets whose losses hardly do."""
    found = {}
    for seeds in ([-0.002, 0, 0.002], [-4, 0, 4]):
        groups = [g for g in world([-0.002, 0, 0.002]) if g.architecture != "resnet"]
        groups += [
            group(("resnet", layers), [entry(90, loss)], seeds)
            for layers, loss in ((20, 0.03), (32, 0.03), (56, 0.04))
        ]
        (verdict,) = verdicts(groups)["ResNets do not degrade with depth"]
        found[verdict.word] = verdict.reason
    assert found[NOT_REPRODUCED].startswith("ResNet-56 against ResNet-20 in training loss: 1.33 ")
    assert "ResNet-56 against ResNet-20 in training loss: 1.3" in found[OPEN]


def test_the_interval_of_two_kinds_is_welchs():
    """Variances of 7.9 and 3.8, 15 runs each: 24.9 degrees of freedom, by Welch's formula."""
    sides = []
    for kind, variance in (("resnet", 7.9), ("resresnet", 3.8)):
        away = variance**0.5  # seven runs below the mean, seven above, one there
        seeds = [-away, away] * 7 + [0]
        sides.append(group((kind, 20), [entry(90, 0.1)], seeds))
    comparison = claims._compare(
        claims.ACCURACY, claims._resnet(20), "above", claims._resresnet(20)
    )
    difference, half = claims.Evidence("", True, sides).difference(comparison)
    assert difference == pytest.approx(0)
    # The table has Student's t of 20 degrees, not of 24.
    assert half == pytest.approx(2.086 * (7.9 / 15 + 3.8 / 15) ** 0.5, rel=1e-6)


def test_a_loss_may_be_as_high_by_less_than_a_tenth():
    slightly, clearly = (
        verdicts(world(resnet_56=[entry(92.3, loss)]))["ResNets do not degrade with depth"][0].word
        for loss in (0.0205, 0.0305)
    )
    assert (slightly, clearly) == (REPRODUCED, NOT_REPRODUCED)


def test_what_the_rate_alone_brings_back_is_no_disturbance():
    title = "a new block and the higher rate disturb what was trained"
    (verdict,) = verdicts(world(top_down=top_down(89.82, start=1.1)))[title]
    assert verdict.word == NOT_REPRODUCED and "epoch with its rate before" in verdict.reason
    assert "in the last epoch before" not in verdict.reason


def test_a_row_names_the_schedule_of_partial_training_too():
    groups = world(schedule="he2015 / 4", partial="partial / 4")
    (verdict,) = verdicts(groups)["top-down is below both"]
    assert verdict.schedule == "he2015 / 4"
    assert verdict.schedules == "he2015 / 4; partial training / 4, 19,532 iterations in all"


def test_schedules_are_never_mixed_and_each_has_its_verdict():
    quarter = world(schedule="he2015 / 4", partial="partial / 4", top_down=top_down(92.7))
    found = verdicts([*world(), *quarter])
    assert [(v.schedule, v.word) for v in found["top-down is below both"]] == [
        ("he2015", REPRODUCED), ("he2015 / 4", NOT_REPRODUCED),
    ]  # fmt: skip
    # Published accuracies are those of full schedules.
    (verdict,) = found["ResNets are as accurate as those of He et al."]
    assert verdict.schedule == "he2015"
    # Half of the nets in each schedule: nothing to compare.
    mixed = [g for g in world() if g.architecture == "resnet"]
    mixed += [g for g in quarter if g.architecture == "resresnet"]
    (verdict,) = verdicts(mixed)["ResResNets are below ResNets at every depth"]
    assert verdict.word == OPEN and "ResResNet-20" in verdict.reason


def test_partial_training_shortened_by_epochs_is_no_full_one():
    groups = world()
    for each in groups:
        if each.architecture == "bottom_up":
            each.conditions["schedule"]["iterations"] = 3_127
    (verdict,) = verdicts(groups)["bottom-up is level with the usual training"]
    assert verdict.word == OPEN and "missing" in verdict.reason


@pytest.mark.parametrize(
    "other",
    [
        {"batchsize": 32},
        {"data": "another copy"},
        {"training images": 45_000},
        {"evaluation": "validation"},
    ],
    ids=str,
)
def test_runs_with_other_data_or_batch_are_not_compared(other):
    groups = [g for g in world() if g.architecture == "resnet"]
    groups += [group(("resresnet", n), [entry(80, 0.01)], **other) for n in reference.DEPTHS]
    (verdict,) = verdicts(groups)["ResResNets are below ResNets at every depth"]
    assert verdict.word == OPEN


def test_a_diverged_plain_net_has_failed():
    groups = world(plain_110=[entry(10, math.nan)])
    assert words(groups)["the plain net of 110 layers fails"] == [REPRODUCED]


def test_a_loss_that_is_no_number_is_none_to_compare():
    (verdict,) = verdicts(world(plain_56=[entry(10, math.nan)]))[
        "plain nets degrade with depth, in training loss too"
    ]
    assert (verdict.word, verdict.reason) == (OPEN, "missing: 'Plain-56'")


def test_values_runs_and_spread_stand_beside_the_verdict():
    (verdict,) = verdicts(world())["the plain net of 110 layers fails"]
    assert verdict.measured == ("accuracy, %: Plain-110 9.98 ± 0.20 (3 runs)",)
    assert [g.name for g in verdict.groups] == ["Plain-110"]


def test_what_is_not_reproduced_is_said_first():
    first, *_ = claims.summary(world(plain_110=[entry(70, 0.5)]))
    assert first == "Not reproduced: the plain net of 110 layers fails (he2015)."


def test_command_prints_or_writes_the_claims(tmp_path):
    runs = DATA / "measured"
    done = python("plots/claims.py", runs)
    assert (done.returncode, done.stdout) == (0, claims.markdown(logs.read([runs])))
    assert "python experiments/plain.py --n 3 5 9 --runs 3" in done.stdout
    assert "he2015 is the full schedule of He et al., 64,000 iterations" in done.stdout
    done = python("plots/claims.py", runs, "-o", tmp_path)
    assert (tmp_path / "claims.md").read_text() == claims.markdown(logs.read([runs]))
    assert python("plots/claims.py", tmp_path / "nowhere").returncode == 1
