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


def stages(last, moved, block, start=1.5):
    """A partial training: loss 1 at the end of each stage, ``start`` where the next begins."""
    way = f"{block}/distance"
    return [
        entry(60, 1.0, stage=1, **{way: 0.5}),
        entry(60, start, stage=2), entry(70, 1.0, stage=2, **{way: moved}),
        entry(70, start, stage=3), entry(last, 0.1, stage=3, **{way: moved}),
    ]  # fmt: skip


LOSSES = {
    "plain": {20: 0.05, 32: 0.10, 44: 0.15, 56: 0.20, 110: 2.30},
    "resnet": {20: 0.030, 32: 0.020, 44: 0.015, 56: 0.010, 110: 0.008},
    "resresnet": {20: 0.028, 32: 0.018, 44: 0.014, 56: 0.009, 110: 0.007},
}
TOP, BOTTOM = ("top_down", 32), ("bottom_up", 32)


def world(seeds=SEEDS, schedule="he2015", partial="partial", **changes):
    """The report's numbers, and its explanations, as logs.

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
    made["without"] = ("resnet", 20), [entry(87.5, 0.001, 100)], {"augmentation": "none"}
    made["top_down"] = TOP, stages(89.82, 0.1, "conv2"), {}
    made["bottom_up"] = BOTTOM, stages(92.15, 0.4, "conv4"), {}
    for name, choice in (("scaled", {"scale": 0.1}), ("frozen", {"freeze": True})):
        made[f"{name}_top"] = TOP, stages(91.5, 0.1, "conv2"), choice
        made[f"{name}_bottom"] = BOTTOM, stages(93.5, 0.4, "conv4"), choice
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
    "bottom-up is level with the usual training": {"bottom_up": stages(90, 0.4, "conv4")},
    "top-down is below both": {"top_down": stages(92.7, 0.1, "conv2")},
    "upper blocks adapt less": {"top_down": stages(89.82, 0.5, "conv2")},
    "a new block and the higher rate disturb what was trained": {
        "bottom_up": stages(92.15, 0.4, "conv4", start=0.9)
    },
    "a new block scaled by a small factor helps": {"scaled_top": stages(88, 0.1, "conv2")},
    "earlier blocks lose by being disturbed": {"frozen_bottom": stages(92.2, 0.4, "conv4")},
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


def test_without_any_run_every_claim_is_open():
    assert set(map(str, words([]).values())) == {"['open']"}


def test_one_run_of_each_decides_nothing():
    found = verdicts(world(seeds=[0]))
    for title, (verdict,) in found.items():
        assert (verdict.word, verdict.reason) == (OPEN, "one run, no spread is known"), title


def test_one_run_is_judged_by_the_spread_of_other_nets_and_says_so():
    groups = [group(("resnet", 20), [entry(91.53, 0.03)])]
    one = world(seeds=[0], resnet_20=None, resnet_32=[entry(91.8, 0.02)])
    found = verdicts([*groups, *one])
    (verdict,) = found["the plain net of 110 layers fails"]
    assert (verdict.word, verdict.reason) == (REPRODUCED, "one run")
    (verdict,) = found["plain nets degrade with depth, in training loss too"]
    assert verdict.text == "reproduced (one run)"
    # 91.80 against 91.53 is within the spread, and a single run decides nothing there.
    (verdict,) = found["ResNets gain with depth"]
    assert verdict.text == "open (one run, the spread is too large)"


def test_a_difference_within_the_spread_of_several_runs_is_not_one():
    (verdict,) = verdicts(world(resnet_32=[entry(91.8, 0.02)]))["ResNets gain with depth"]
    assert verdict.word == NOT_REPRODUCED
    assert verdict.reason == "ResNet-32 against ResNet-20 in accuracy: within the spread"


def test_schedules_are_never_mixed_and_each_has_its_verdict():
    quarter = world(
        schedule="he2015 / 4", partial="partial / 4", top_down=stages(92.7, 0.1, "conv2")
    )
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


def test_runs_with_other_data_or_batch_are_not_compared():
    groups = [g for g in world() if g.architecture == "resnet"]
    groups += [group(("resresnet", n), [entry(80, 0.01)], batchsize=32) for n in reference.DEPTHS]
    (verdict,) = verdicts(groups)["ResResNets are below ResNets at every depth"]
    assert verdict.word == OPEN


def test_a_diverged_plain_net_has_failed():
    groups = world(plain_110=[entry(10, math.nan)])
    assert words(groups)["the plain net of 110 layers fails"] == [REPRODUCED]


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
    done = python("plots/claims.py", runs, "-o", tmp_path)
    assert (tmp_path / "claims.md").read_text() == claims.markdown(logs.read([runs]))
    assert python("plots/claims.py", tmp_path / "nowhere").returncode == 1
