"""The pages: what they name is there; the maps of the library and of its tests are whole."""

import ast
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from plots import figures

PAGES = sorted(
    page.relative_to(ROOT)
    for page in ROOT.rglob("README.md")
    if not any(part.startswith(".") or part in ("runs", "demo") for part in page.parts)
)
MAP = ROOT / "resnet" / "README.md"
README = (ROOT / "README.md").read_text()


def test_the_map_of_the_library_names_each_file_and_no_other():
    _, _, text = MAP.read_text().partition("## Which file has what\n")
    text, _, _ = text.partition("\n## ")
    entries = [entry.partition(":")[0] for entry in text.split("\n- ")[1:]]
    named = [name for entry in entries for name in re.findall(r"`([^`]+)`", entry)]
    folder = MAP.parent
    files = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cu") and "pretrained" not in path.parts
    }
    rooms = {"backends/__init__.py", "backends/cpu/__init__.py", "backends/gpu/__init__.py"}
    assert sorted(named) == sorted(files - rooms)


def test_each_file_of_the_library_has_its_tests_under_its_name():
    rooms = {path.stem.strip("_") for path in MAP.parent.rglob("*.py")} - {"init"}
    missing = {room for room in rooms if not (ROOT / "tests" / f"test_{room}.py").exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_line_of_a_page_is_too_long(page):
    long = [line for line in (ROOT / page).read_text().splitlines() if len(line) > 120]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_links_to_what_is_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"`((?:resnet|experiments|plots|jobs|tests)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["plain", "resnet", "resresnet"])
def test_an_experiment_names_the_figures_its_networks_are_in(name):
    expected = {"9"} | ({"6"} if name == "resnet" else set())  # the tables
    for picture in figures.PICTURES:
        if name in dict(picture.nets):
            expected.add(picture.name.removeprefix("fig"))
    (row,) = re.findall(
        rf"^\| `python experiments/{name}\.py` .*Fig\.(.*)\|$", README, re.MULTILINE
    )
    head, *_ = ast.get_docstring(ast.parse((ROOT / f"experiments/{name}.py").read_text())).split(
        "\n"
    )
    for text in (row, head.partition("Fig.")[2]):
        assert set(re.findall(r"\d+", text)) == expected
