"""Where there is no Linux on x86-64: simulated, in a fresh process each."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, python
from packaging.requirements import Requirement

MAC = """
import filelock, os, platform, runpy, sys
del os.sched_getaffinity
sys.modules["fcntl"] = sys.modules["numba"] = None  # numba: not among a Mac's packages
import resnet.evaluate, resnet.partial_training, plots.report
del sys.modules["fcntl"]
sys.platform, platform.machine = "darwin", lambda: "arm64"
sys.argv[0] = "experiments/resnet.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = ("--n", "1", "--data", "synthetic", "--subset", "64", "-b", "32", "-e", "1")


def test_a_mac_trains_with_chainers_own_functions_and_says_why(tmp_path):
    done = python("-c", MAC, *RUN, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cores, arm64\n" in done.stdout
    assert "own functions); faster on a CPU with oneDNN: its package is for Linux on x86-64, found "
    assert "found darwin arm64" in done.stdout
    assert (tmp_path / "resnet-8-seed0" / "blocks.h5").exists()


def test_a_mac_that_asks_for_the_fast_backend_is_told_in_one_line(tmp_path):
    done = python("-c", MAC, *RUN, "-o", tmp_path, "--backend", "onednn")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --backend onednn: its package is for Linux on x86-64, found darwin arm64\n"
    )


def test_windows_gets_one_line():
    done = python("-c", "import sys; sys.platform = 'win32'; import resnet.training")
    assert done.returncode == 1
    assert done.stderr == (
        "error: found Windows, legal: Linux or macOS; on Windows, a Linux under WSL 2\n"
    )


@pytest.mark.parametrize("goal", ["demo", "test", "lint", "gpu"])
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("echo 3.10.13", "is Python 3.10.13"),
        ("echo 3.99.0", "is Python 3.99.0"),
        ("exit 1", "is no Python"),
    ],
)
def test_make_refuses_a_python_it_cannot_use_before_anything_else(tmp_path, goal, answer, found):
    interpreter = tmp_path / "python3"
    interpreter.write_text(f"#!/bin/sh\n{answer}\n")
    interpreter.chmod(0o755)
    words = ["make", "-C", str(ROOT), goal, f"PYTHON={interpreter}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert found in line and "legal: Python 3.11 3.12 3.13 3.14" in line and "make PYTHON=" in line
    assert not (tmp_path / "venv").exists()
    assert subprocess.run(["make", "-n", *words[1:3], "clean", words[4]]).returncode == 0


def test_make_takes_the_python_of_the_tests():
    words = ["make", "-n", "-C", str(ROOT), "demo", f"PYTHON={sys.executable}", "VENV=nowhere"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "experiments/resnet.py" in done.stdout


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_an_environment_for_a_gpu_has_one_cuda(cuda):
    """And its libraries as packages; PyTorch's are those of CUDA 13."""
    words = ["make", "-n", "-C", str(ROOT), "gpu", f"CUDA={cuda}", f"PYTHON={sys.executable}"]
    alone = {"PATH": os.environ["PATH"]}  # not what a make around the tests has been told
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=alone)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = ",".join(re.findall(r"--editable '\.\[(.*?)\]'", done.stdout)).split(",")
    packages = [Requirement(each) for extra in named for each in extras[extra]]
    (cupy,) = {str(each.specifier) for each in packages if each.name.startswith("cupy")}
    assert [each.extras for each in packages if each.name == f"cupy-cuda{cuda}x"] == [{"ctk"}]
    assert not Requirement(f"cupy{cupy}").specifier.contains("13.6.0")  # it has no such extra
    cudnns = {each.name for each in packages if each.name.startswith("nvidia-cudnn-cu")}
    assert cudnns == {f"nvidia-cudnn-cu{cuda}"}
    assert ("torch" in {each.name for each in packages}) == (cuda == "13")
    assert (".venv12/" in done.stdout) == (cuda == "12")


@pytest.mark.parametrize("failing", ["", "precision tf32"], ids=["all are recorded", "one is not"])
def test_make_gpu_goes_on_only_while_each_precision_is_recorded(tmp_path, failing):
    """With a stand-in for Python, in an environment that is complete."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(
        '#!/bin/sh\necho "$*"\n[ -n "$FAILING" ] || exit 0\n'
        'case "$*" in *"$FAILING"*) echo "warning: no CUDA graph (why)" >&2;; esac\n'
    )
    stand_in.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for extra in ("", "-test", "-gpu13"):
        (tmp_path / f"installed-{platform.python_version()}{extra}").touch()
    words = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"VENV={tmp_path}"]
    alone = {"PATH": os.environ["PATH"], "FAILING": failing}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert (done.returncode == 0) == (not failing), done.stderr
    assert ("no CUDA graph (why)" in done.stdout) == bool(failing)
    assert ("speed.py" in done.stdout) == (not failing)
    assert done.stdout.index("pytest") < done.stdout.index("plans.py")
