"""Each experiment from its command line to its tables, as a user types it."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import ROOT, python, read_blocks, read_log
from PIL import Image

from resnet import evaluate
from resnet.network import ARCHITECTURES

SMALL = ("--n", "1", "--data", "synthetic", "--subset", "256", "-e", "2", "-b", "64", "-d", "cpu")


def experiment(name, *words, **environment):
    return python(f"experiments/{name}.py", *words, **environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One small run of each experiment, and what each of them printed."""
    out = tmp_path_factory.mktemp("runs")
    printed = {}
    for name, *words in (
        ("plain",),
        ("resnet",),
        ("resresnet",),
        ("resresnet", "--rectify", "twice"),
        ("highway",),
        ("partial_training", "--order", "top-down"),
        ("partial_training", "--order", "bottom-up"),
    ):
        done = experiment(name, *SMALL, *words, "-o", out)
        assert done.returncode == 0, done.stderr
        printed[words[-1] if words else name] = done.stdout
    return out, printed


def test_every_experiment_says_what_it_trains_and_leaves_a_run_folder(runs):
    out, printed = runs
    names = (*ARCHITECTURES, "top_down", "bottom_up")
    assert {path.name for path in out.iterdir()} == {f"{name}-8-seed0" for name in names}
    for text in printed.values():
        for word in ("Device: CPU", "Backend: ", "# Network: ", "parameters", "# Seed: 0",
                     "synthetic", "NOT CIFAR-10", "last epoch", "best epoch"):  # fmt: skip
            assert word in text
    for folder in out.iterdir():
        assert {"log", "args.json", "blocks.h5"} <= set(os.listdir(folder))
        record = json.loads((folder / "args.json").read_text())
        assert record["run"]["architecture"] == folder.name.split("-")[0]
        assert all("python experiments/" in start["command"] for start in record["starts"])


def test_the_three_architectures_learn_differently_from_the_same_batches(runs):
    out, _ = runs
    logs = [read_log(out / f"{name}-8-seed0") for name in ("plain", "resnet", "resresnet")]
    losses = [[entry["main/loss"] for entry in log] for log in logs]
    assert losses[0] != losses[1] != losses[2] != losses[0]
    for log in logs:
        assert [entry["iteration"] for entry in log] == [4, 8]


def test_tables_figures_and_page_are_made_from_the_runs(runs, tmp_path):
    out, _ = runs
    done = python("plots/tables.py", out)
    assert done.returncode == 0
    for name in ("Plain-8", "ResNet-8", "ResResNet-8", "Top-down-8", "Bottom-up-8"):
        assert name in done.stdout
    assert "Highway: ours, synthetic" in done.stdout
    done = python("plots/curves.py", out, "-o", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    done = python("plots/report.py", out, "-o", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert "python experiments/partial_training.py" in (tmp_path / "report.html").read_text()


def test_a_saved_network_reaches_the_accuracy_of_its_log_to_the_digit(runs):
    out, _ = runs
    for name in (*ARCHITECTURES, "top_down", "bottom_up"):
        last = read_log(out / f"{name}-8-seed0")[-1]["test/main/accuracy"]
        done = python("-m", "resnet.evaluate", out / f"{name}-8-seed0", "--data", "synthetic")
        assert done.returncode == 0, done.stderr
        assert f"accuracy: {last:.2%} ({round(1000 * last)} of 1,000 images)" in done.stdout


def test_the_same_command_again_trains_nothing(runs):
    out, _ = runs
    for name, *words in (("resnet",), ("partial_training", "--order", "top-down")):
        done = experiment(name, *SMALL, *words, "-o", out)
        assert done.returncode == 0 and "already complete" in done.stdout
        assert "epoch  iteration" not in done.stdout


def test_several_seeds_and_depths_are_summed_up(runs, tmp_path):
    words = ("--data", "synthetic", "--subset", "128", "-e", "1", "-b", "64", "-o", tmp_path)
    done = experiment("resnet", "--n", "1", "2", "--runs", "2", *words)
    assert done.returncode == 0, done.stderr
    names = {f"resnet-{layers}-seed{seed}" for layers in (8, 14) for seed in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == names
    accuracies = [
        100 * read_log(tmp_path / f"resnet-8-seed{seed}")[-1]["test/main/accuracy"]
        for seed in (0, 1)
    ]
    mean, deviation = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert f"    8  {mean:6.2f} ± {deviation:.2f} %  (2 runs)" in done.stdout


@pytest.mark.parametrize("chance", [1, 2, 3])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(runs, tmp_path, chance):
    out, _ = runs
    words = [sys.executable, "experiments/resnet.py", *SMALL, "--snapshot-interval", "0",
             "-o", str(tmp_path)]  # fmt: skip
    folder = tmp_path / "resnet-8-seed0"
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(folder.glob("snapshot*.npz")):
            time.sleep(0.01)
        time.sleep(random.Random(chance).uniform(0, 1))
        process.kill()
    assert process.returncode in (-signal.SIGKILL, 0)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout or "already complete" in done.stdout
    assert read_log(folder) == read_log(out / "resnet-8-seed0")
    expected, found = read_blocks(out / "resnet-8-seed0"), read_blocks(folder)
    assert all((found[name] == value).all() for name, value in expected.items())
    assert not list(folder.glob(".*.tmp")) or process.returncode == -signal.SIGKILL


def test_sigterm_stops_a_run_that_says_how_to_go_on(tmp_path):
    words = [sys.executable, "experiments/resnet.py", *SMALL[:-4], "-e", "500", "-o", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("    1 "):
                break
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 75
    assert "stopped by SIGTERM after iteration" in rest
    assert f"to go on: {sys.executable} experiments/resnet.py" in rest
    assert list((tmp_path / "resnet-8-seed0").glob("snapshot_iter_*.npz"))


def test_evaluate_tells_the_accuracy_the_log_ends_with(runs):
    out, _ = runs
    folder = out / "resnet-8-seed0"
    done = python("-m", "resnet.evaluate", folder)
    assert done.returncode == 0, done.stderr
    accuracy = read_log(folder)[-1]["test/main/accuracy"]
    assert f"accuracy: {accuracy:.2%} ({round(1000 * accuracy)} of 1,000 images)" in done.stdout
    assert "confusion matrix" in done.stdout and "checkerboard" in done.stdout
    assert python("-m", "resnet.evaluate", out / "top_down-8-seed0").returncode == 0


def test_evaluate_names_the_classes_of_image_files(runs, tmp_path):
    out, _ = runs
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    words = ("-m", "resnet.evaluate", out / "resnet-8-seed0", "--images")
    done = python(*words, tmp_path / "grey.png")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "grey.png" in line]
    assert line.count("%") == 3
    (tmp_path / "text.png").write_text("no image")
    done = python(*words, tmp_path / "text.png")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --images {tmp_path}/text.png: not a readable image")


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    upright = np.random.RandomState(0).randint(256, size=(64, 64, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held with its right side down
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    turned, expected = (
        evaluate.read_image(str(tmp_path / name)) for name in ("turned.png", "upright.png")
    )
    np.testing.assert_array_equal(turned, expected)


def archive(path):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(path.with_name("page.html"), "cifar-10-batches-py/data_batch_1")


BAD_INPUT = [
    (("--n", "0"), 2, "--n: found '0', legal: a whole number from 1 to 1000"),
    (("--n", "-1"), 2, "--n: found '-1', legal: a whole number from 1 to 1000"),
    (("--n", "2.5"), 2, "--n: found '2.5', legal: a whole number from 1 to 1000"),
    (("--n", "1", "-b", "5001"), 2, "--batchsize: found 5001, legal: up to 5000"),
    (("--n", "1", "--schedule", "cosine"), 2, "--schedule: invalid choice: 'cosine'"),
    (("--n", "1", "--device", "17"), 2, "--device: found '17', legal: cpu"),
    (("--n", "1", "--backend", "mkl"), 2, "--backend: invalid choice: 'mkl'"),
    (("--n", "1", "--drops", "1"), 2, "--drops: needs --epoch"),
    (("--n", "1", "--shorten", "0"), 2, "--shorten: found '0', legal: a whole number from 1 to"),
    (("--n", "1", "--shorten", "2", "-e", "4"), 2, "--shorten: found with --epoch"),
    (("--n", "1", "--schedule", "report100", "-e", "2"), 2, "--schedule: found with --epoch"),
    (("--n", "1", "-e", "1", "--drops", "5"), 2, "--drops: found 5, legal: epochs below --epoch 1"),
    (("--n", "1", "--validate"), 2, "--validate: found 5000 training images, legal: more than the"),
    (("--n", "1", "--runs", "0"), 2, "--runs: found '0'"),
    (("--n", "1", "--resume", "nothing.npz"), 1, "nothing.npz: no such file"),
    (("--n", "1", "2", "--resume", "nothing.npz"), 2, "--resume: one snapshot is of one network"),
    (("--n", "1", "--data", "nowhere"), 1, "--data: no such file or folder 'nowhere'"),
    (("--n", "1", "--data", "page.html"), 1, "an HTML page of 26 bytes"),
    (("--n", "1", "--data", "other.tar.gz"), 1, "other.tar.gz: not the official archive"),
    (("--n", "1", "--data", "."), 1, "--data: no CIFAR-10 in the folder ."),
    (("--n", "1", "--out", "page.html"), 1, "--out: cannot write to page.html"),
]


@pytest.mark.parametrize(
    "words, code, message", BAD_INPUT, ids=[" ".join(words) for words, _, _ in BAD_INPUT]
)
def test_bad_input_is_answered_in_one_line(tmp_path, words, code, message):
    (tmp_path / "page.html").write_text("<html>404 not found</html>")
    archive(tmp_path / "other.tar.gz")
    words = words if "--data" in words else (*words, "--data", "synthetic")
    before = set(os.listdir(tmp_path))
    done = python(ROOT / "experiments/resnet.py", *words, cwd=tmp_path)
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert set(os.listdir(tmp_path)) == before


def test_bad_input_of_partial_training():
    done = experiment("partial_training", "--n", "1", "--data", "synthetic")
    assert done.returncode == 2 and "--order" in done.stderr
    done = experiment("partial_training", "--order", "sideways")
    assert done.returncode == 2 and "'sideways'" in done.stderr


def test_partial_training_says_what_its_epochs_are():
    done = experiment("partial_training", "--help")
    assert "so many epochs in the last stage, half as many" in " ".join(done.stdout.split())
