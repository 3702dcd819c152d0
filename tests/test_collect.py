"""What was measured is kept, drawn from its logs, and found out where it no longer follows them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, deny, python
from PIL import Image, ImageChops, ImageOps, ImageStat
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(ROOT))

from plots import collect, logs
from resnet.command import InputError

RUNS = Path(__file__).parent / "data/measured"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Some runs as from a clean commit, one of them unfinished."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("resnet-20-seed0", "resnet-20-seed1", "plain-110-seed0", "resresnet-44-seed0"):
        shutil.copytree(RUNS / name, out / name)
        path = out / name / "args.json"
        content = json.loads(path.read_text())
        for start in content["starts"]:
            start["git"] = {"commit": "0123", "modified": False}
            start |= {"command": f"python experiments/resnet.py -o {out}", "data": f"{out}/cifar"}
        path.write_text(json.dumps(content))
    return out


@pytest.fixture(scope="module")
def kept(clean, tmp_path_factory):
    measured = tmp_path_factory.mktemp("measured")
    done = python("plots/collect.py", clean, "--measured", measured)
    assert done.returncode == 0, done.stderr
    assert "resresnet-44-seed0: not a complete run" in done.stderr
    return measured


@pytest.fixture
def measured(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "measured")


def test_a_kept_run_that_cannot_be_read_is_not_to_be_removed(kept, clean, monkeypatch):
    log = kept / "cifar10/resnet-20-seed0/log"
    deny(monkeypatch, log)
    with pytest.raises(InputError, match=f"^{log}: cannot be read .*; legal: a readable file$"):
        collect.add([clean], kept / "cifar10")


def test_complete_runs_are_kept_without_paths_and_drawn(clean, kept):
    folder = kept / "cifar10"
    runs = {"plain-110-seed0", "resnet-20-seed0", "resnet-20-seed1"}
    drawn = {"tables.md", "claims.md", "fig1.png", "picture.png"}
    assert {path.name for path in folder.iterdir()} == runs | drawn
    assert (folder / "resnet-20-seed0/log").read_text() == (
        clean / "resnet-20-seed0/log"
    ).read_text()
    record = (folder / "resnet-20-seed0/args.json").read_text()
    assert str(clean) not in record and '"data": "cifar"' in record
    assert "91.40 ± 0.14 (2 runs)" in (folder / "tables.md").read_text()


def test_the_check_passes_what_follows_from_the_logs_and_nothing_else(measured):
    words = ("plots/collect.py", "--check", "--measured", measured)
    done = python(*words)
    assert (done.returncode, done.stdout) == (0, "cifar10: as it should be\n")
    (measured / "cifar10/tables.md").write_text("91.50")
    done = python(*words)
    assert done.returncode == 1 and "not what the logs say; legal: make measured" in done.stderr
    assert (measured / "cifar10/tables.md").read_text() == "91.50"


@pytest.mark.parametrize("change", ["a number", "a log", "a picture", "a file too many", "a gap"])
def test_what_does_not_follow_from_the_logs_is_found_and_mended(measured, change):
    folder = measured / "cifar10"
    match change:
        case "a number":
            text = (folder / "tables.md").read_text()
            (folder / "tables.md").write_text(text.replace("91.40", "91.50"))
        case "a log":
            path = folder / "resnet-20-seed1/log"
            path.write_text(path.read_text().replace("0.913", "0.923"))
        case "a picture":
            with Image.open(folder / "picture.png") as image:
                ImageOps.mirror(image.convert("RGB")).save(folder / "picture.png")
        case "a file too many":
            shutil.copy(folder / "fig1.png", folder / "fig5.png")
        case "a gap":
            (folder / "claims.md").unlink()
    assert len(collect.renew(folder, check=True)) >= 1
    collect.renew(folder, check=False)
    assert collect.renew(folder, check=True) == []


def test_other_runs_and_unrepeatable_ones_are_refused(clean, measured, tmp_path):
    modified = shutil.copytree(clean / "resnet-20-seed0", tmp_path / "resnet-20-seed3")
    text = (modified / "args.json").read_text()
    (modified / "args.json").write_text(text.replace('"modified": false', '"modified": true'))
    with pytest.raises(InputError, match="not made from a clean checkout"):
        collect.add([modified], measured / "cifar10")
    other = shutil.copytree(clean / "resnet-20-seed0", tmp_path / "resnet-20-seed0")
    content = json.loads((other / "args.json").read_text())
    content["run"]["batchsize"] = 5
    (other / "args.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"another run than .*; legal: another --name"):
        collect.add([other], measured / "cifar10")
    assert not (measured / "cifar10/resnet-20-seed3").exists()
    (measured / "cifar10/resnet-20-seed1/log").write_text("[")
    with pytest.raises(InputError, match=r"resnet-20-seed1: .*half-written.*; legal: remove it"):
        collect.add([clean / "resnet-20-seed1"], measured / "cifar10")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb"])
def test_a_folder_of_measurements_is_named_in_one_word(name, tmp_path):
    done = python("plots/collect.py", RUNS, "--measured", tmp_path, "--name", name)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "argument --name: found" in done.stderr and not list(tmp_path.iterdir())


def test_a_picture_drawn_a_little_otherwise_is_the_same(measured, tmp_path):
    picture = measured / "cifar10/picture.png"
    with Image.open(picture) as image:
        told = PngInfo()
        told.add_text("Description", image.info["Description"])
        small = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
        small.save(tmp_path / "a.png", pnginfo=told)
    assert (tmp_path / "a.png").read_bytes() != picture.read_bytes()
    assert not collect.differs(tmp_path / "a.png", picture)
    other = tmp_path / "b.png"
    collect._save(collect.curves.draw(logs.read([RUNS / "resnet-20-seed2"]), ["net"]), other)
    assert collect.differs(other, picture)


def test_a_picture_of_other_numbers_is_another_though_one_hardly_sees_it(measured, tmp_path):
    groups = logs.read([measured / "cifar10"])
    before, after = (tmp_path / f"{name}.png" for name in ("before", "after"))
    collect._save(collect.curves.draw(groups, [group.name for group in groups]), before)
    (resnet,) = (group for group in groups if group.architecture == "resnet")
    resnet.runs[0].entries[-1]["main/loss"] *= 1.001
    collect._save(collect.curves.draw(groups, [group.name for group in groups]), after)
    with Image.open(before) as one, Image.open(after) as other:
        difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    assert max(ImageStat.Stat(difference).mean) < 0.1
    assert collect.differs(after, before) and not collect.differs(before, before)
