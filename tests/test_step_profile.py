"""The profile of a step."""

import os
import re

import pytest
from conftest import python

from resnet.backends.cpu import onednn

pytestmark = pytest.mark.skipif(not onednn.available()[0], reason=onednn.available()[1])


@pytest.mark.parametrize(
    ("name", "threads", "what"),
    [("onednn", 1, "of processor time"), ("winograd", 1, "of processor time"),
     ("winograd", 2, "by the clock")],
)  # fmt: skip
def test_the_passes_of_a_step_add_up_to_it(name, threads, what):
    if not onednn.available(by_tiles=name == "winograd")[0]:
        pytest.skip("this processor has no AVX2")
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has one processor")
    words = "experiments/step_profile.py", "--n", 1, "--steps", 2, "--backend", name
    done = python(*words, OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stderr
    total = float(re.search(rf"(\d+) ms a step {what}", done.stdout).group(1))
    passes = [float(ms) for ms in re.findall(r"\| ([\d.]+) \|", done.stdout)]
    assert "direct convolutions, forward" in done.stdout and min(passes) > 0
    assert sum(passes) == pytest.approx(total, rel=0.1)
