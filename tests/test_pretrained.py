"""Trained networks of the package: found by name, described, and as good as their logs say."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import make_run, python
from PIL import Image

from resnet import evaluate, export, pretrained, record
from resnet.command import InputError


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A place for trained networks that is not the package's own."""
    monkeypatch.setattr(pretrained, "folder", lambda: tmp_path / "shelf")
    return tmp_path / "shelf"


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The ``--out`` of a complete run of a clean commit, trained once."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "git_state", lambda: {"commit": "0123abcd", "modified": False})
        make_run(dataset, out).train()
    return out


def test_a_network_is_there_once_its_folder_is(shelf, finished):
    assert pretrained.names() == []
    shutil.copytree(finished.folder, shelf / "resnet-8")
    assert pretrained.names() == ["resnet-8"]
    assert pretrained.find("resnet-8") == shelf / "resnet-8/blocks.h5"


def test_files_and_folders_are_found_too(shelf, finished):
    blocks = finished.folder / "blocks.h5"
    assert pretrained.find(str(finished.folder)) == pretrained.find(str(blocks)) == blocks


def test_an_unknown_name_is_answered_with_those_that_are_there(shelf, finished):
    with pytest.raises(InputError, match=r"'resnet-20': no such file.*\(none is here\)"):
        pretrained.find("resnet-20")
    pretrained.add(finished.folder, "resnet-8")
    with pytest.raises(InputError, match=r"'resnet-20': no such file.*a name \(resnet-8\)"):
        pretrained.find("resnet-20")


def test_evaluate_takes_a_name_and_classifies_images(
    shelf, finished, tmp_path, monkeypatch, capsys
):
    pretrained.add(finished.folder, "resnet-8")
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    words = ["evaluate", "resnet-8", "--device", "cpu", "--images", str(tmp_path / "grey.png")]
    monkeypatch.setattr("sys.argv", words)
    evaluate.main()
    assert "ResNet, 8 layers, trained on tiny" in (out := capsys.readouterr().out)
    assert "grey.png: brightness" in out


def test_the_export_takes_a_name(shelf, finished, tmp_path, monkeypatch, capsys):
    pretrained.add(finished.folder, "resnet-8")
    monkeypatch.setattr("sys.argv", ["export", "resnet-8", "--torch", str(tmp_path / "net.pt")])
    export.main()
    assert "shelf/resnet-8/blocks.h5: ResNet, 8 layers" in (out := capsys.readouterr().out)
    assert "same class for 100.00%" in out and (tmp_path / "net.py").exists()


def test_the_card_says_how_it_was_made_and_the_record_names_no_path(shelf, finished):
    path = finished.folder / "args.json"
    content = json.loads(path.read_text())
    command = "python experiments/resnet.py --n 1 --data /home/me/cifar10 -o /home/me/runs"
    content["starts"][0] |= {"command": command, "data": "/home/me/cifar-10-batches-py"}
    path.write_text(json.dumps(content))
    target = pretrained.add(finished.folder, "resnet-8")
    assert sorted(os.listdir(target)) == ["README.md", "args.json", "blocks.h5", "log"]
    card = (target / "README.md").read_text()
    accuracy = json.loads((target / "log").read_text())[-1]["test/main/accuracy"]
    for wanted in (
        f"{accuracy:.2%} on the test images", "Data: tiny, 40 training", "custom, 8 iterations",
        "at 4, 6", "Seed 0", "commit 0123abcd", "--data cifar10 -o runs", "Licence", "Limits",
    ):  # fmt: skip
        assert wanted in card
    assert "/home" not in card + (target / "args.json").read_text()


def test_a_run_that_cannot_be_repeated_is_refused(shelf, finished):
    path = finished.folder / "args.json"
    content = json.loads(path.read_text())
    content["starts"][0]["git"]["modified"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match="not made from a clean checkout; legal: a run of a commit"
    ):
        pretrained.add(finished.folder, "resnet-8")
    (finished.folder / "blocks.h5").unlink()
    with pytest.raises(
        InputError, match=r"no blocks\.h5 in it; legal: the folder of a complete run"
    ):
        pretrained.add(finished.folder, "resnet-8")
    assert not shelf.exists()


@pytest.mark.parametrize("name", ["log", "args.json"])
def test_a_damaged_run_is_refused_before_anything_of_it_is_kept(name, shelf, finished):
    (finished.folder / name).write_text("[{}]")
    with pytest.raises(InputError, match=r"its log or args\.json is damaged"):
        pretrained.add(finished.folder, "resnet-8")
    assert not shelf.exists()


@pytest.mark.parametrize("name", pretrained.names())
def test_card_of_a_network_of_the_package_is_that_of_its_record(name):
    path = pretrained.folder() / name
    assert (path / "README.md").read_text() == pretrained.card(path)


@pytest.mark.parametrize("name", pretrained.names())
def test_a_network_of_the_package_reaches_the_accuracy_its_log_ends_with(name):
    """Only where a copy of CIFAR-10 is named by the environment."""
    data = os.environ.get("CIFAR10_COPY") or pytest.skip("CIFAR10_COPY names no copy")
    done = python("-m", "resnet.evaluate", name, "--data", data)
    assert done.returncode == 0, done.stderr
    log = json.loads((pretrained.folder() / name / "log").read_text())
    count = round(10_000 * log[-1]["test/main/accuracy"])
    assert f"({count:,} of 10,000 images)" in done.stdout


def test_the_commands_list_and_refuse(tmp_path):
    done = python("-m", "resnet.pretrained")
    assert done.returncode == 0
    known = pretrained.names()
    assert all(name in done.stdout for name in known) or "no trained network" in done.stdout
    done = python("-m", "resnet.evaluate", "resnet-21")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: 'resnet-21': no such file, folder or")
    assert python("-m", "resnet.pretrained", tmp_path).returncode == 1
