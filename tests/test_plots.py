"""Tables, pictures and the page, from the fixed logs in tests/data."""

import csv
import errno
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, deny, python
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

sys.path.insert(0, str(ROOT))

from plots import claims, conditions, curves, figures, logs, reference, report, results, tables
from plots.runs import COMPLETE, DIVERGED, UNFINISHED
from resnet.command import InputError

DATA = Path(__file__).parent / "data"
MEASURED, DAMAGED = DATA / "measured", DATA / "damaged"
CHAINER = DATA / "chainer/result/log"
SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-"}


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture
def groups():
    return logs.read([MEASURED])


def find(groups, architecture, layers, data="CIFAR-10"):
    (group,) = [
        group
        for group in groups
        if (group.architecture, group.layers, group.conditions["data"])
        == (architecture, layers, data)
    ]
    return group


def find_tables(groups, title):
    return [table for table in results.build(groups) if table.title.startswith(title)]


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def copy_run(name, folder, **identity):
    """A copy of a run in ``folder`` with another identity."""
    shutil.copytree(MEASURED / name, folder)
    path = folder / "args.json"
    record = json.loads(path.read_text())
    record["run"].update(identity)
    path.write_text(json.dumps(record))


# Reading


def test_paths_may_be_strings(tmp_path, groups):
    again = logs.read([str(MEASURED)])
    assert [group.name for group in again] == [group.name for group in groups]
    assert logs.read_run(str(CHAINER)).evaluation == "validation"
    curves.save(curves.draw(groups, conditions.labels(groups)), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()


def test_a_shortened_partial_training_is_told_from_the_reports():
    short, whole = (
        conditions.describe("schedule", {"name": "partial", "iterations": count, "drops": []})
        for count in (3127, 78127)
    )
    assert short == "partial training, 3,127 iterations in all" and whole != short


def test_a_shortened_schedule_is_named_in_tables_and_figures(tmp_path):
    plan = {"name": "he2015 / 4", "iterations": 40, "drops": [20, 30]}
    copy_run("resnet-32-seed0", tmp_path / "a")
    copy_run("resnet-32-seed0", tmp_path / "b", schedule=plan)
    partial = {"name": "partial / 4", "iterations": 60, "drops": []}
    copy_run("top_down-32-seed0", tmp_path / "c", schedule=partial)
    groups = logs.read([tmp_path])
    notes = [table.note for table in find_tables(groups, "Fig. 6")]
    assert ["he2015 / 4" in note for note in notes] == [False, True]
    (table,) = find_tables(groups, "III.B")
    assert table.rows[1][3].text == "partial training / 4, 60 iterations in all"
    drawn = [(name, title) for name, title, _ in figures.draw(figures.PICTURES[1], groups)]
    assert [name for name, _ in drawn][1] == "fig5-he2015-4"
    assert "he2015 / 4" in drawn[1][1]


def test_seeds_are_one_group_and_other_data_is_another(groups):
    names = [(g.name, g.conditions["data"], len(g.runs)) for g in groups]
    assert names == [
        ("Plain-110", "CIFAR-10", 1),
        ("ResNet-20", "CIFAR-10", 3),
        ("ResNet-20", "synthetic", 1),
        ("ResNet-32", "CIFAR-10", 1),
        ("ResResNet-44", "CIFAR-10", 1),
        ("Top-down-32", "CIFAR-10", 1),
    ]
    assert [run.identity["seed"] for run in find(groups, "resnet", 20).runs] == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"name": "he2015", "iterations": 40, "drops": [20, 30]}},
        {"batchsize": 20},
        {"warm-up": True},
        {"augmentation": "none"},
        {"something new": 1},
    ],
)
def test_runs_that_differ_in_anything_but_the_seed_are_not_averaged(tmp_path, change):
    copy_run("resnet-20-seed0", tmp_path / "a")
    copy_run("resnet-20-seed1", tmp_path / "b", **change)
    groups = logs.read([tmp_path])
    assert [len(group.runs) for group in groups] == [1, 1]
    assert len(set(conditions.labels(groups))) == 2


def test_states():
    states = {run.path.name: run.state for g in logs.read([MEASURED]) for run in g.runs}
    assert states.pop("plain-110-seed0") == DIVERGED
    assert states.pop("resresnet-44-seed0") == UNFINISHED
    assert set(states.values()) == {COMPLETE}


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_a_run_with_a_loss_that_is_no_number_has_diverged_whatever_came_after(tmp_path, epoch):
    copy_run("resnet-20-seed0", tmp_path / "run")
    log = json.loads((tmp_path / "run/log").read_text())
    log[epoch]["main/loss"] = math.inf
    (tmp_path / "run/log").write_text(json.dumps(log))
    (group,) = logs.read([tmp_path])
    assert group.runs[0].state == DIVERGED


def test_epochs_errors_and_drops_of_a_run(groups):
    run = find(groups, "resnet", 20).runs[0]
    assert run.loss == {1: 2.0, 2: 1.0, 3: 0.5, 4: 0.25}
    assert run.error == pytest.approx({1: 50, 2: 30, 3: 8, 4: 8.5})
    assert run.drops == [2, 3]  # iterations 20 and 30 of 10 in each epoch
    assert (run.last, run.best, run.seconds) == (91.5, 92, 240)


def test_training_that_ends_within_an_epoch_has_a_part_of_an_epoch(tmp_path):
    copy_run("resnet-20-seed0", tmp_path / "run", **{"training images": 96})
    (group,) = logs.read([tmp_path])
    assert list(group.runs[0].loss)[-1] == pytest.approx(40 * 10 / 96)


def test_partial_training_counts_epochs_through_its_stages(groups):
    run = find(groups, "top_down", 32).runs[0]
    assert list(run.loss) == [1, 2, 3, 4, 5, 6]
    assert run.drops == [1, 3, 5]  # where the logged rate falls
    assert run.additions == [2, 4]
    assert run.best == 89  # of the last stage; a net with fewer blocks had 95


def test_a_plain_chainer_log_is_read_and_called_validation():
    (group,) = logs.read([CHAINER])
    assert group.name == "result/log"
    assert group.runs[0].evaluation == "validation"
    assert group.runs[0].error == pytest.approx({1: 25, 2: 12.5})
    assert conditions.labels([group, *logs.read([MEASURED])])[0] == "result/log, validation images"


def test_logs_of_equal_names_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "result").mkdir(parents=True)
        shutil.copy(CHAINER, tmp_path / name / "result/log")
    groups = logs.read([tmp_path])
    assert conditions.labels(groups) == [
        f"result/log ({tmp_path}/{name}/result/log)" for name in "ab"
    ]


def test_damaged_and_foreign_logs_are_named_and_left_out(capsys):
    groups = logs.read([DAMAGED, MEASURED])
    assert sum(len(group.runs) for group in groups) == 8
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for name, reason in (
        ("foreign", "not a log with entries"),
        ("half", "half-written"),
        ("half-arguments", "args.json"),
        ("no-accuracy", "test/main/accuracy"),
    ):
        (line,) = [line for line in lines if f"{name}/log" in line]
        assert reason in line


@pytest.mark.parametrize("name", ["log", "args.json"])
def test_a_run_that_cannot_be_read_is_left_out_with_the_right_reason(
    tmp_path, monkeypatch, capsys, name
):
    for seed in "01":
        copy_run(f"resnet-20-seed{seed}", tmp_path / seed)
    deny(monkeypatch, tmp_path / "0" / name)
    (group,) = logs.read([tmp_path])
    assert [run.path.name for run in group.runs] == ["1"]
    said = f"skipped {tmp_path}/0/log: {name} cannot be read (Permission denied)\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("denied", ["kept", "kept/0"])
def test_a_folder_that_cannot_be_read_is_named_and_left_out(tmp_path, monkeypatch, capsys, denied):
    copy_run("resnet-20-seed0", tmp_path / "kept/0")
    copy_run("resnet-20-seed1", tmp_path / "1")
    scan = os.scandir

    def refused(folder):
        if Path(folder) == tmp_path / denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refused)
    (group,) = logs.read([tmp_path])
    assert [run.path.name for run in group.runs] == ["1"]
    said = f"skipped {tmp_path / denied}: cannot be read (Permission denied)\n"
    assert capsys.readouterr().err == said
    assert [log.parent.name for log in logs.stamps([tmp_path])] == ["1"]
    assert not capsys.readouterr().err


def test_the_same_run_twice_counts_once(tmp_path, capsys):
    for name in ("a", "b"):
        copy_run("resnet-20-seed0", tmp_path / name)
    log = tmp_path / "a/log"
    log.write_text(json.dumps(json.loads(log.read_text())[:2]))
    (group,) = logs.read([tmp_path, tmp_path / "b", tmp_path / "b/log"])
    assert [run.path for run in group.runs] == [tmp_path / "b"]  # the further one
    assert "a: the same run as" in capsys.readouterr().err


def test_nothing_to_read_is_a_user_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        logs.read([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no log that can be read"):
        logs.read([tmp_path])


NAN, INFINITE, HUGE = math.nan, math.inf, 10**400
DEEP = [[]]
for _ in range(500):
    DEEP = [DEEP]


def hostile(folder, entry=None, identity=None, starts=None, count=None):
    """A copy of a run with these values in each entry of its log, its identity and its starts."""
    copy_run("resnet-20-seed0", folder / "r$un", **(identity or {}))
    log, record = folder / "r$un/log", folder / "r$un/args.json"
    entries = [{**each, **(entry or {})} for each in json.loads(log.read_text())]
    log.write_text(json.dumps(entries[:count]))
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "starts": starts or content["starts"]}))
    return folder


def draw_all(folder):
    """Make everything that can be made from the runs in ``folder``."""
    found = logs.read([folder])
    curves.save(curves.draw(found, conditions.labels(found)), folder / "curves.png")
    for picture in figures.PICTURES:
        list(figures.draw(picture, found))
    tables.markdown(found)
    tables.comma_separated(found)
    report.page(found).encode(errors="backslashreplace")


@pytest.mark.parametrize(
    "values",
    [
        {"entry": {"main/loss": NAN}},
        {"entry": {"main/loss": NAN}, "count": 1},
        {"entry": {"main/loss": INFINITE}},
        {"entry": {"main/loss": 0}},
        {"entry": {"test/main/accuracy": 1}},
        {"entry": {"deep": DEEP}},
        {"identity": {"data": "$\\frac{\ud800$"}},
        {"identity": {"data": "a\nb\x00"}},
        {"identity": {"architecture": "$x^$"}},
        {"starts": [{"device": DEEP, "git": {"commit": DEEP}, "versions": {"a": DEEP}}]},
    ],
    ids=str,
)
def test_odd_logs_are_shown(tmp_path, values, monkeypatch):
    """A loss that is no number from the first epoch on is a result, too."""
    draw_all(hostile(tmp_path, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"entry": {"main/loss": HUGE}},
        {"entry": {"main/loss": "2"}},
        *({"entry": {"test/main/accuracy": value}} for value in (NAN, 2, -1, HUGE)),
        *({"entry": {"elapsed_time": value}} for value in (NAN, [1], HUGE, -1, "1", None)),
        *({"entry": {key: NAN}} for key in ("epoch", "iteration")),
        {"entry": {"lr": "x"}},
        {"entry": {"stage": [1]}},
        {"identity": {"n": HUGE}},
        {"identity": {"n": True}},
        {"identity": {"seed": NAN}},
        {"identity": {"extra": DEEP}},
        {"identity": {"schedule": {"name": "x", "iterations": HUGE, "drops": []}}},
        {"identity": {"schedule": {"name": "x", "iterations": 9, "drops": [NAN]}}},
        {"starts": [7]},
    ],
    ids=lambda values: str(values)[:60],
)
def test_impossible_values_in_a_log_are_named_and_left_out(tmp_path, capsys, values):
    with pytest.raises(InputError, match="no log that can be read"):
        logs.read([hostile(tmp_path, **values)])
    said = capsys.readouterr().err
    assert said.startswith("skipped ") and said.count("\n") == 1


def test_a_log_nested_beyond_all_measure_or_none_of_a_file_is_left_out(tmp_path, capsys):
    for name, content in (("deep", b"[" * 10**6), ("digits", b"[" + b"9" * 10**5 + b"]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").write_bytes(content)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "log")
    with pytest.raises(InputError):
        logs.read([tmp_path])
    assert capsys.readouterr().err.count("skipped") == 3


def test_dollars_in_names_are_no_mathematics(tmp_path):
    found = logs.read([hostile(tmp_path, identity={"data": "$x^2$ of $y"})])
    figure = curves.draw(found, ["$x^2$ of $y"], "$title$")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[0] == r"\$x^2\$ of \$y" and figure.get_suptitle() == r"\$title\$"


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_a_picture_that_the_disk_refuses_says_why_and_leaves_nothing(tmp_path, groups, kind):
    figure = curves.draw(groups[:1], ["one"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError) as error:
            curves.save(figure, tmp_path / f"curves.{kind}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


# Tables


def test_fig6(groups):
    ours, synthetic = find_tables(groups, "Fig. 6")
    assert ours.head == ["Layers", "He et al.", "Report", "Ours, CIFAR-10"]
    assert texts(ours) == [
        ["20", "91.25", "91.53", "91.50 ± 0.20 (3 runs)"],
        ["32", "92.49", "92.66", "92.66 (1 run)"],
        ["44", "92.83", "92.20", results.BLANK],
        ["56", "93.03", "92.30", results.BLANK],
        ["110", "93.57", "93.59", results.BLANK],
    ]
    assert synthetic.head[-1] == "Ours, synthetic"
    assert [row[3] for row in texts(synthetic)] == ["99.00 (1 run)"] + 4 * [results.BLANK]


def test_fig9_marks_what_diverged_or_is_not_finished(groups):
    table = find_tables(groups, "Fig. 9")[0]
    assert [name.split(",")[0] for name in table.head] == [
        "Layers", "Plain: report", "Plain: ours", "ResNet: report", "ResNet: ours",
        "ResResNet: report", "ResResNet: ours",
    ]  # fmt: skip
    rows = texts(table)
    assert [(row[0], *row[1::2]) for row in rows] == [
        ("20", "90.61", "91.53", "90.05"), ("32", "88.22", "92.66", "88.32"),
        ("44", "87.49", "92.20", "88.82"), ("56", "85.81", "92.30", "86.03"),
        ("110", "9.98", "93.59", "90.89"),
    ]  # fmt: skip
    blank = results.BLANK
    assert rows[0] == ["20", "90.61", blank, "91.53", "91.50 ± 0.20 (3 runs)", "90.05", blank]
    assert rows[2] == ["44", "87.49", blank, "92.20", blank, "88.82", "unfinished: 50% done"]
    assert rows[4] == ["110", "9.98", "diverged: 10.00 (1 run)", "93.59", blank, "90.89", blank]


def test_partial_training(groups):
    table = find_tables(groups, "III.B")[0]
    assert [row[:3] for row in texts(table)] == [
        ["all from the start", "92.66", "92.66 (1 run)"],
        ["top-down", "89.82", "88.00 (1 run)"],
        ["bottom-up", "92.15", results.BLANK],
    ]
    assert table.rows[1][3].text == "60 iterations (drops: none)"


def test_the_best_epoch_stands_apart_and_says_what_it_is(groups):
    (table,) = find_tables(groups, "Best epochs")
    assert "no result" in table.head[2]
    row = next(row for row in texts(table) if row[0].startswith("ResNet-20, CIFAR-10"))
    # Best of the seeds: 92.0, 91.3 and 91.7.
    assert row[1:] == ["91.50 ± 0.20 (3 runs)", "91.67 ± 0.35 (3 runs)"]
    assert not any("92.00" in str(texts(t)) for t in results.build(groups) if t is not table)


def test_an_unfinished_or_diverged_seed_does_not_enter_the_mean(tmp_path):
    for seed in (0, 1):
        shutil.copytree(MEASURED / f"resnet-20-seed{seed}", tmp_path / str(seed))
    copy_run("resnet-20-seed2", tmp_path / "2")
    log = json.loads((tmp_path / "2/log").read_text())
    (tmp_path / "2/log").write_text(json.dumps(log[:3]))
    (group,) = logs.read([tmp_path])
    assert results.last(group) == "91.40 ± 0.14 (2 runs); unfinished: 75% done"
    log[-1]["main/loss"] = math.nan
    (tmp_path / "2/log").write_text(json.dumps(log))
    (group,) = logs.read([tmp_path])
    assert results.last(group) == "91.40 ± 0.14 (2 runs); diverged: 91.70 (1 run)"


def test_two_ways_to_train_one_network_are_told_apart_in_a_cell(tmp_path):
    copy_run("resnet-20-seed0", tmp_path / "a")
    copy_run("resnet-20-seed1", tmp_path / "b", **{"warm-up": True})
    cell = find_tables(logs.read([tmp_path]), "Fig. 6")[0].rows[0][3]
    assert cell.text == "91.50 (1 run) [no warm-up]; 91.30 (1 run) [warm-up]"


def test_runs_outside_of_the_report_have_their_own_table():
    found = results.build(logs.read([CHAINER]))
    assert all(row[-1].text == results.BLANK for row in found[0].rows)  # and a blank Fig. 6
    assert texts(found[-2]) == [["result/log", "87.50 (1 run)"]]


def test_reference_numbers_of_fig6_are_those_of_fig9():
    assert tuple(reference.HE2015) == reference.DEPTHS
    for name in ("plain", "resnet", "resresnet"):
        assert tuple(reference.REPORT[name]) == reference.DEPTHS


def test_csv_has_a_line_for_each_group_and_each_missing_number(groups):
    lines = list(csv.DictReader(io.StringIO(tables.comma_separated(groups))))
    assert len(lines) == 6 + 12  # 5 of the report's 17 networks are measured, one on other data too
    line = next(li for li in lines if li["layers"] == "20" and li["data"] == "CIFAR-10")
    assert (line["mean"], line["standard deviation"], line["runs"]) == ("91.5000", "0.2000", "3")
    assert (line["He et al."], line["report"]) == ("91.25", "91.53")
    assert line[results.BEST] == "91.6667"
    blank = next(li for li in lines if (li["architecture"], li["layers"]) == ("plain", "20"))
    assert (blank["report"], blank["mean"], blank["data"]) == ("90.61", "", "")
    assert blank["He et al."] == ""


# Pictures


def lines_of(axes):
    """Curves by label; what marks the axes has a label that begins with '_'."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_line_and_band_are_mean_and_range_over_seeds(groups):
    group = find(groups, "resnet", 20)
    figure = curves.draw([group], ["net"])
    left, right = figure.axes
    loss, error = lines_of(left)["net (3 runs)"], lines_of(right)["net (3 runs)"]
    assert list(loss.get_xdata()) == [1, 2, 3, 4]
    assert list(loss.get_ydata()) == pytest.approx([2, 1, 0.5, 0.5])
    assert list(error.get_ydata()) == pytest.approx([50, 28, 9, 8.5])
    (band,) = right.collections
    edge = band.get_paths()[0].vertices
    low = [min(y for x, y in edge if x == epoch) for epoch in (1, 2, 3, 4)]
    high = [max(y for x, y in edge if x == epoch) for epoch in (1, 2, 3, 4)]
    assert low == pytest.approx([40, 25, 8, 8.3])
    assert high == pytest.approx([60, 30, 10, 8.7])
    drops = [line for line in right.lines if line.get_label().startswith("_")]
    assert [line.get_xdata()[0] for line in drops] == [2, 3]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["net (3 runs)", "band: smallest to largest run", "learning rate lowered"]
    assert left.get_yscale() == right.get_yscale() == "log"
    assert (left.get_xlabel(), left.get_ylabel()) == ("epoch", "training loss (log scale)")
    assert right.get_ylabel() == "test error, % (log scale)"


def test_a_single_run_has_no_band(groups):
    figure = curves.draw([find(groups, "resnet", 32)], ["net"])
    assert list(lines_of(figure.axes[0])) == ["net"]
    assert not figure.axes[0].collections


def test_diverged_and_unfinished_runs_are_lines_of_their_own(groups):
    some = [find(groups, "plain", 110), find(groups, "resresnet", 44)]
    left, right = curves.draw(some, ["a", "b"]).axes
    diverged, unfinished = "a, seed 0, diverged", "b, seed 0, unfinished"
    assert list(lines_of(left)) == list(lines_of(right)) == [diverged, unfinished]
    loss = lines_of(left)[diverged].get_ydata()
    assert loss[0] == 2.5 and all(map(math.isnan, loss[1:]))
    assert list(lines_of(right)[diverged].get_ydata()) == [90] * 4
    assert list(lines_of(right)[unfinished].get_xdata()) == [1, 2]


def test_an_error_of_zero_is_drawn_on_a_linear_scale(tmp_path):
    copy_run("resnet-20-seed0", tmp_path / "run")
    log = json.loads((tmp_path / "run/log").read_text())
    log[-1]["test/main/accuracy"] = 1.0
    (tmp_path / "run/log").write_text(json.dumps(log))
    right = curves.draw(logs.read([tmp_path]), ["net"]).axes[1]
    assert (right.get_yscale(), right.get_ylabel()) == ("linear", "test error, %")


def test_validation_is_called_so():
    left, right = curves.draw(logs.read([CHAINER]), ["net"]).axes
    assert right.get_ylabel() == "validation error, % (log scale)"
    assert list(lines_of(left)["net"].get_ydata()) == [2, 1]


def test_the_report_s_figures(groups):
    drawn = {p.name: list(figures.draw(p, groups)) for p in figures.PICTURES}
    assert [len(pictures) for pictures in drawn.values()] == [1, 1, 1, 1]
    ((name, title, figure),) = drawn["fig5"]
    assert name == "fig5"
    assert "CIFAR-10" in title and "100 training images" in title
    assert list(lines_of(figure.axes[1])) == ["32 layers"]  # Fig. 5 has no 20 layers
    assert lines_of(figure.axes[1])["32 layers"].get_color() == curves.COLOURS[1]
    ((_, _, figure),) = drawn["fig10"]
    assert [label.split(",")[0] for label in lines_of(figure.axes[0])] == [
        "ResNet-32",
        "Top-down-32",
    ]


def test_other_data_comes_into_another_picture(tmp_path):
    copy_run("resnet-32-seed0", tmp_path / "a")
    copy_run("resnet-32-seed0", tmp_path / "b", data="another copy")
    drawn = list(figures.draw(figures.PICTURES[1], logs.read([tmp_path])))
    assert [name for name, _, _ in drawn] == ["fig5-cifar-10", "fig5-another-copy"]
    assert all(len(lines_of(figure.axes[0])) == 1 for _, _, figure in drawn)


def test_neighbouring_lines_differ_in_colour_and_style(tmp_path):
    for i in range(8):
        copy_run("resnet-20-seed0", tmp_path / str(i), data=f"data {i}")
    groups = logs.read([tmp_path])
    lines = lines_of(curves.draw(groups, conditions.labels(groups)).axes[0]).values()
    looks = {(to_hex(li.get_color()), str(li._unscaled_dash_pattern)) for li in lines}
    assert len(looks) == 8


# Page


class Reader(HTMLParser):
    """Follows the tags; unbalanced ones and references are kept."""

    EMPTY = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(groups):
    page = report.page(groups)
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids) == len(groups)
    assert {link.removeprefix("#") for link in reader.links} == set(reader.ids)
    assert len(reader.sources) == 4
    assert all(src.startswith("data:image/svg+xml;base64,") for src in reader.sources)
    assert not re.search(r"https?:|@import|url\(|<script", page)
    text = reader.text.replace("\xa0", " ")
    for wanted in (
        "python experiments/resnet.py --n 3 --data '<a> & b'",  # escaped in the page
        "0123456789abcdef0123456789abcdef01234567, modified",
        "resnet 0.1.0, chainer 7.8.1",
        "CPU, 2 cores, x86_64",
        "0:04:00 of training",
        "91.50 ± 0.20 (3 runs)",
        "diverged: 10.00 (1 run)",
    ):
        assert wanted in text
    # What the runs say about the report's claims comes first.
    assert page.index("The report's claims") < page.index("<h2>Tables</h2>")
    for claim, (verdict, *_) in claims.verdicts(groups):
        assert claim.text in text and claim.rule in text and verdict.word in text


def test_both_axes_have_ticks_at_numbers_that_can_be_read(groups):
    figure = curves.draw([find(groups, "resnet", 32)], ["net"])
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        labels = [
            text.get_text()
            for text in axes.get_yticklabels()
            if low <= text.get_position()[1] <= high and text.get_text()
        ]
        assert len(labels) > 1 and all(re.fullmatch(r"[125]0*|0\.0*[125]", text) for text in labels)


def test_pictures_of_other_schedules_have_short_names_of_their_own(tmp_path):
    plan = {"name": "custom", "iterations": 8, "drops": [4, 6]}
    copy_run("resnet-32-seed0", tmp_path / "a")
    copy_run("resnet-32-seed0", tmp_path / "b", schedule=plan, batchsize=50)
    copy_run("resnet-32-seed0", tmp_path / "c", schedule={**plan, "drops": [2]}, batchsize=50)
    names = [name for name, _, _ in figures.draw(figures.PICTURES[1], logs.read([tmp_path]))]
    assert len(set(names)) == 3 and max(map(len, names)) < 30
    assert {"fig5-4-epochs-batch-50", "fig5-4-epochs-batch-50-2"} < set(names)


def test_a_schedule_of_which_nothing_is_finished_has_no_table_of_its_own(tmp_path):
    copy_run("resnet-32-seed0", tmp_path / "a")
    copy_run("resnet-20-seed0", tmp_path / "b",
             schedule={"name": "he2015", "iterations": 64_000, "drops": []})  # fmt: skip
    groups = logs.read([tmp_path])
    (table,) = find_tables(groups, "Fig. 6")
    assert [row[3] for row in texts(table)].count(results.BLANK) == 4
    (others,) = find_tables(groups, "Other runs")
    assert [row[0].split(",")[0] for row in texts(others)] == ["ResNet-20"]


# Command line


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def script(name, *words, cwd):
    return python(ROOT / "plots" / f"{name}.py", *words, cwd=cwd)


@pytest.mark.parametrize("name", ["curves.png", "deeper/curves.PDF"])
def test_curves_writes_the_format_of_the_name(work, name):
    done = script("curves", MEASURED, CHAINER, DAMAGED, "-o", name, cwd=work)
    assert (done.returncode, done.stdout) == (0, f"wrote {name}\n")
    assert len(done.stderr.splitlines()) == 4  # the damaged logs
    path = work / name
    content = path.read_bytes()
    assert content.startswith(SIGNATURES[path.suffix.lower()]) and len(content) > 5000


def test_curves_are_drawn_again_while_training_goes_on(tmp_path):
    words = [sys.executable, ROOT / "plots/curves.py", tmp_path / "runs", "-o", tmp_path / "a.png"]
    watching = subprocess.Popen(
        [*words, "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # As in a terminal: a shell's background jobs ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        for count in (1, 2):
            copy_run("resnet-32-seed0", tmp_path / "new")
            log = tmp_path / "new/log"
            log.write_text(json.dumps(json.loads(log.read_text())[:count]))
            shutil.copytree(tmp_path / "new", tmp_path / "runs/run", dirs_exist_ok=True)
            shutil.rmtree(tmp_path / "new")
            assert watching.stdout.readline() == f"wrote {tmp_path / 'a.png'}\n"
        watching.send_signal(signal.SIGINT)
        out, error = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert (watching.returncode, out) == (0, "") and "Traceback" not in error


def test_a_reader_that_has_seen_enough_ends_the_command_silently(tmp_path):
    for i in range(300):  # more than a pipe holds
        copy_run("resnet-20-seed0", tmp_path / f"run{i}", batchsize=i + 1)
    words = [sys.executable, str(ROOT / "plots/tables.py"), str(tmp_path)]
    line = shlex.join(words) + " | head -n 1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("### Fig. 6: residual networks\n", "")


def test_figures_writes_png_and_pdf_and_names_what_is_missing(work):
    runs = [MEASURED / "plain-110-seed0", MEASURED / "resnet-20-seed0"]
    done = script("figures", *runs, "-o", "pictures", cwd=work)
    assert done.returncode == 0
    assert sorted(path.name for path in (work / "pictures").iterdir()) == ["fig1.pdf", "fig1.png"]
    for path in (work / "pictures").iterdir():
        assert path.read_bytes().startswith(SIGNATURES[path.suffix])
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "skipped fig5",
        "skipped fig8",
        "skipped fig10",
    ]


def test_tables_prints_or_writes(work, groups):
    printed = script("tables", MEASURED, cwd=work)
    assert (printed.returncode, printed.stdout) == (0, tables.markdown(groups))
    assert "| 20 | 91.25 | 91.53 | 91.50 ± 0.20 (3 runs) |" in printed.stdout
    done = script("tables", MEASURED, "--format", "csv", "-o", "out", cwd=work)
    assert done.returncode == 0
    assert (work / "out/tables.csv").read_text() == tables.comma_separated(groups)


@pytest.mark.parametrize("name", ["tables", "claims", "report"])
def test_a_name_that_no_encoding_has_is_written_as_python_does(tmp_path, name):
    folder = hostile(tmp_path, identity={"data": "a\ud800"})
    out = tmp_path / ("page.html" if name == "report" else "out")
    done = script(name, folder, "-o", out, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"a\ud800" in (out if out.is_file() else out / f"{name}.md").read_text()


def test_report_writes_the_page(work, groups):
    done = script("report", MEASURED, "-o", "page.html", cwd=work)
    assert (done.returncode, done.stderr) == (0, "")
    assert (work / "page.html").read_text() == report.page(groups)


def test_help_gives_examples_and_no_network_is_imported(work):
    for name in ("claims", "curves", "figures", "tables", "report"):
        done = script(name, "-h", cwd=work)
        assert done.returncode == 0
        assert f"python plots/{name}.py runs" in done.stdout
    check = "import sys; from plots import report; sys.exit('chainer' in sys.modules)"
    assert python("-c", check).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["curves", "nowhere"], 1, "nowhere: no such file or folder"),
        (["curves", DAMAGED], 1, "no log that can be read"),
        (["curves", MEASURED, "-o", "curves.jpg"], 2, "found 'curves.jpg', legal: a name in .png"),
        (["report", MEASURED, "-o", "page.txt"], 2, "legal: a name in .html"),
        (["tables", MEASURED, "--format", "word"], 2, "word"),
        (["figures"], 2, "RUNS"),
        (["tables", MEASURED, "-o", "/dev/null/x"], 1, "/dev/null"),
        (["claims", MEASURED, "-o", ""], 2, "found '', legal: the name of a file or folder"),
    ],
)
def test_mistakes_are_one_line(work, words, code, message):
    done = script(*words, cwd=work)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
