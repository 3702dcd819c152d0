"""The profile of a step."""

import re

import pytest
from conftest import python

from resnet.backends.cpu import onednn

pytestmark = pytest.mark.skipif(not onednn.available()[0], reason=onednn.available()[1])


@pytest.mark.parametrize("name", ["onednn", "winograd"])
def test_the_passes_of_a_step_add_up_to_it(name):
    if not onednn.available(by_tiles=name == "winograd")[0]:
        pytest.skip("this processor has no AVX2")
    words = "experiments/step_profile.py", "--n", 1, "--steps", 2, "--backend", name
    done = python(*words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    total = float(re.search(r"(\d+) ms a step", done.stdout).group(1))
    passes = [float(ms) for ms in re.findall(r"\| ([\d.]+) \|", done.stdout)]
    assert "direct convolutions, forward" in done.stdout and min(passes) > 0
    assert sum(passes) == pytest.approx(total, rel=0.1)


def test_more_than_one_thread_is_refused_in_one_line():
    if onednn.threads() < 2:
        pytest.skip("this machine has one processor")
    done = python("experiments/step_profile.py", OMP_NUM_THREADS="2")
    assert done.returncode == 2
    assert done.stderr == "error: found 2 threads, legal: OMP_NUM_THREADS=1\n"
