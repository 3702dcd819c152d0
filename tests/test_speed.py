"""The speed table: what it counts, and that it measures what it says."""

import json

import pytest
from conftest import python

from experiments import speed


@pytest.mark.parametrize("n, macs", [(3, 40.55), (5, 68.86), (7, 97.17), (9, 125.49), (18, 252.89)])
def test_operations_are_three_products_per_weight_but_for_the_first_inputs(n, macs):
    """Multiply-accumulates of a forward pass, in millions, are known for the five depths."""
    stem = 32 * 32 * 9 * 3 * 16
    assert speed.flop(n) == pytest.approx(2 * (3 * macs * 1e6 - stem), rel=1e-3)


def test_table_names_the_ratio_to_the_best_of_pytorch():
    def one(variant, rate):
        return {"layers": 20, "batchsize": 128, "variant": variant, "ms": 128e3 / rate,
                "ms 10 %": 1.0, "ms 90 %": 2.0, "images/s": rate, "peak MiB": 900.0,
                "of sgemm": 0.5}  # fmt: skip

    missing = {"layers": 20, "batchsize": 128, "variant": "torch compile", "error": "no compiler"}
    results = [one("ours", 900.0), one("torch", 300.0), one("torch channels_last", 600.0), missing]
    lines = speed.table(results).splitlines()
    assert "| 900 | 1.50 |" in lines[2] and "| 300 | 0.50 |" in lines[3]
    assert "| 600 | 1.00 |" in lines[4] and "not run: no compiler" in lines[5]


def test_float16_is_compared_with_float16():
    rates = {"ours tf32": 400.0, "ours fp16": 900.0, "torch": 200.0, "torch graph amp": 600.0}
    results = [
        {"layers": 20, "batchsize": 128, "variant": variant, "ms": 128e3 / rate, "ms 10 %": 1.0,
         "ms 90 %": 2.0, "images/s": rate, "peak MiB": 900.0, "of sgemm": None}
        for variant, rate in rates.items()
    ]  # fmt: skip
    lines = speed.table(results).splitlines()
    assert "| 400 | 2.00 |" in lines[2] and "| 900 | 1.50 |" in lines[3]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--only", "ours tf32"), "--only: found 'ours tf32', legal with --device cpu: ours, "),
        (("--device", "gpu"), "--device: found 'gpu', legal: cpu"),
    ],
)
def test_what_the_device_cannot_run_is_one_line(words, line):
    done = python("experiments/speed.py", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_a_measurement_from_the_command_line(tmp_path):
    words = ("--n", "1", "-b", "4", "--rounds", "2", "--turn", "0", "-o", tmp_path / "speed")
    done = python("experiments/speed.py", *words, "--only", "ours", "chainer", "torch")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "speed.json").read_text())
    assert [r["variant"] for r in measured["results"]] == ["ours", "chainer", "torch"]
    for r in measured["results"]:
        if "error" not in r:
            assert r["steps"] == 2 and 0 < r["ms 10 %"] <= r["ms"] <= r["ms 90 %"]
            assert r["images/s"] == pytest.approx(4000 / r["ms"]) and r["peak MiB"] > 50
    assert (tmp_path / "speed.md").read_text().strip() == done.stdout.strip()
