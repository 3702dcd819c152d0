"""The profile of a step."""

import os
import re

import pytest
from conftest import python

from resnet.backends.cpu import onednn

pytestmark = pytest.mark.skipif(not onednn.available()[0], reason=onednn.available()[1])


@pytest.mark.parametrize(
    ("name", "threads", "kind"),
    [("onednn", 1, "of processor time"), ("winograd", 1, "of processor time"),
     ("winograd", 2, "by the clock")],
)  # fmt: skip
def test_a_step_is_mostly_its_passes(name, threads, kind):
    if not onednn.available(by_tiles=name == "winograd")[0]:
        pytest.skip("this processor has no AVX2")
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has one processor")
    words = "experiments/step_profile.py", "--n", 1, "--steps", 2, "--backend", name
    done = python(*words, OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stderr
    total = float(re.search(rf"(\d+) ms a step {kind}", done.stdout).group(1))
    rows = re.findall(r"\| (.+) \| ([\d.]+) \|", done.stdout)
    passes = {what: float(ms) for what, ms in rows}
    assert sum(passes.values()) == pytest.approx(total, rel=0.1)
    assert "direct convolutions, forward" in passes and min(passes.values()) > 0
    assert passes["pooling, loss, graph and the rest"] < total / 2
    convolutions = "Winograd's" if name == "winograd" else "direct"
    assert passes[f"{convolutions} convolutions, forward"] > 0.05 * total
    assert passes[f"{convolutions} convolutions, both gradients"] > 0.1 * total


def test_a_backend_that_is_missing_is_one_line():
    older = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse4.2"}
    done = python("experiments/step_profile.py", **older)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: --backend winograd: needs a processor with AVX2 or AVX-512"
    )
    assert "Traceback" not in done.stderr


def test_a_step_that_is_left_out_is_not_computed():
    if not onednn.available(by_tiles=True)[0]:
        pytest.skip("this processor has no AVX2")
    words = "experiments/step_profile.py", "--n", 1, "--steps", 3, "--without"
    done = python(*words, "product", "read", "write", OMP_NUM_THREADS="1")
    whole = python(*words[:-1], OMP_NUM_THREADS="1")
    assert "without the products" in done.stdout and "without" not in whole.stdout
    convolutions = r"Winograd's convolutions, forward \| ([\d.]+)"
    less, all_of_it = (float(re.search(convolutions, each.stdout)[1]) for each in (done, whole))
    assert less < 0.8 * all_of_it


def test_direct_convolutions_have_no_steps_to_leave_out():
    done = python("experiments/step_profile.py", "--backend", "onednn", "--without", "read")
    assert done.returncode == 2
    assert "--without: found with --backend onednn, legal: with winograd" in done.stderr
