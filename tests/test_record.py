"""What a run was made with is recorded whole."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import chainer
import pytest

from resnet import record


def git(*words, cwd, **options):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", *identity, *words], cwd=cwd, check=True, capture_output=True, **options
    )


@pytest.fixture
def checkout(tmp_path):
    git("init", "-q", cwd=tmp_path)
    (tmp_path / "resnet").mkdir()
    (tmp_path / "resnet/code.py").write_text("a = 1\nb = 'é'\n")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    git("add", ".", cwd=tmp_path)
    git("commit", "-qm", "code", cwd=tmp_path)
    return tmp_path


def test_a_clean_checkout_is_told_by_its_commit(checkout):
    (checkout / "resnet/__pycache__").mkdir()
    (checkout / "resnet/__pycache__/code.pyc").write_text("")
    (checkout / "log").write_text("not code")
    state = record.git_state(checkout)
    assert state.keys() == {"commit", "modified"} and not state["modified"]
    assert record.describe_code(state) == f"commit {state['commit']}"


def test_the_checkout_of_another_user_is_told_by_its_commit(checkout, monkeypatch):
    """As in a container that has it from its host; git itself refuses such a folder."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert record.git_state(checkout)["modified"] is False


def test_the_variables_of_another_repository_are_not_asked(checkout, tmp_path_factory, monkeypatch):
    """As in a hook of it, or where someone keeps their home in one."""
    other = tmp_path_factory.mktemp("other")
    git("init", "-q", cwd=other)
    git("commit", "-qm", "other", "--allow-empty", cwd=other)
    expected = record.git_state(checkout)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert record.git_state(checkout) == expected


def test_the_diff_of_a_modified_checkout_brings_it_back(checkout, tmp_path_factory):
    modified = "a = 2\nb = 'é'\n".encode() + b"c = '\xff'\n"  # not all of it UTF-8
    (checkout / "resnet/code.py").write_bytes(modified)
    (checkout / "resnet/staged.py").write_text("d = 1\n")
    git("add", "resnet/staged.py", cwd=checkout)
    state = record.git_state(checkout)
    assert state["modified"] and "diff" in record.describe_code(state)
    again = tmp_path_factory.mktemp("again")
    git("clone", "-q", str(checkout), ".", cwd=again)
    git("checkout", "-q", state["commit"], cwd=again)
    git("apply", "-", cwd=again, input=state["diff"].encode("utf-8", "surrogateescape"))
    assert (again / "resnet/code.py").read_bytes() == modified
    assert (again / "resnet/staged.py").read_text() == "d = 1\n"


def test_what_cannot_be_kept_is_said_to_be_unrepeatable(checkout, monkeypatch):
    (checkout / "resnet/code.py").write_text("a = 3\n" * 1000)
    monkeypatch.setattr(record, "LARGEST_DIFF", 1000)
    found = [record.git_state(checkout)]
    git("checkout", "-q", ".", cwd=checkout)
    (checkout / "resnet/new.py").write_text("in no commit")
    found.append(record.git_state(checkout))
    for state in found:
        assert state["modified"] and state["repeatable"] is False and "diff" not in state
        assert "CANNOT BE REPEATED" in record.describe_code(state)


def test_outside_of_a_checkout_there_is_the_version(tmp_path):
    assert record.git_state(tmp_path) is None
    assert "not from a checkout" in record.describe_code(None)


def test_all_installed_packages_are_recorded_with_their_versions():
    packages = record.packages()
    assert packages["chainer"] == chainer.__version__
    assert packages["numpy"] == version("numpy") and len(packages) > 10


def test_the_cpu_is_named_by_its_model():
    name = record.device_name(chainer.get_device("@numpy"))
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in (text := info.read_text()):
        model = text.split("model name", 1)[1].split(":", 1)[1].splitlines()[0].strip()
        assert model in name
    assert name.startswith("CPU, ") and "cores" in name


@pytest.mark.parametrize(
    ("told", "processors"),
    [
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_container_s_share_of_the_processors_is_counted(told, processors, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, text in told.items():
        (tmp_path / name).write_text(text + "\n")
    assert record.quota(tmp_path) == processors
