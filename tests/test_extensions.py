"""What happens beside the training: evaluation, and progress on a terminal."""

import io
import itertools
import os
import re

import chainer
import numpy as np
import pytest
from conftest import make_run, read_log

from resnet import extensions, network
from resnet.batches import Images


def test_evaluation_counts_every_image_once_whatever_the_batches(dataset, monkeypatch):
    net = network.resnet(1)
    images = Images(
        dataset.test_x, dataset.test_y, np.zeros((3, 32, 32), "f"), chainer.get_device("@numpy")
    )
    whole = extensions.predict(net, images)
    monkeypatch.setattr(extensions, "EVALUATION_BATCH", 5)  # 12 images: 5, 5 and 2
    parts = extensions.predict(net, images)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert chainer.config.train


def test_evaluation_reports_correct_over_total_where_chainers_own_does_not(dataset, monkeypatch):
    monkeypatch.setattr(extensions, "EVALUATION_BATCH", 5)
    right = np.zeros((12, 10), "f")
    right[np.arange(12), dataset.test_y] = 9
    right[10:] = -right[10:]  # the two images of the last, smaller batch are wrong
    batches = iter([right[:5], right[5:10], right[10:]])
    net = lambda x: chainer.Variable(next(batches))  # noqa: E731
    images = Images(
        dataset.test_x, dataset.test_y, np.zeros((3, 32, 32), "f"), chainer.get_device("@numpy")
    )
    logits = extensions.predict(net, images)
    assert (logits.argmax(1) == dataset.test_y).sum() == 10


class Terminal(io.StringIO):
    """A terminal of some width, which changes with every line when there are several."""

    def __init__(self, *widths):
        super().__init__()
        self.widths = itertools.cycle(widths)

    def isatty(self):
        return True

    def fileno(self):
        return self

    def size(self):
        return os.terminal_size((next(self.widths), 24))


def shown_on(terminal, dataset, out, monkeypatch):
    """What a run writes to a terminal, as the lines that it overwrites one another."""
    monkeypatch.setattr(os, "get_terminal_size", Terminal.size)
    run = make_run(dataset, out)
    run.folder.mkdir(parents=True)
    trainer, _ = run.make_trainer()
    trainer.get_extension("Progress").out = terminal
    trainer.run()
    return terminal.getvalue().replace("\r\033[K", "\n").split("\n")


@pytest.mark.parametrize("width", [200, 88, 80, 60, 40, 20, 10])
def test_progress_fits_a_terminal_of_any_width(dataset, tmp_path, monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    lines = shown_on(Terminal(width), dataset, tmp_path, monkeypatch)
    assert max(map(len, lines)) < width
    assert len([line for line in lines if line.startswith("epoch")]) == 1
    if width >= 40:
        (bar,) = [line for line in lines if "iteration 1 of 8" in line]
        assert "left" in bar and bar.startswith("[")
        assert "test error" in next(line for line in lines if line.startswith("epoch"))
    assert len([line for line in lines if re.match(r" +[123]  ", line)]) == 3


def test_progress_shows_the_numbers_of_the_log(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    lines = shown_on(Terminal(200), dataset, tmp_path, monkeypatch)
    shown = [line.split() for line in lines if re.match(r" +[123]  ", line)]
    for cells, entry in zip(shown, read_log(tmp_path / "resnet-8-seed0"), strict=True):
        assert cells[:6] == [
            str(entry["epoch"]), str(entry["iteration"]), f"{entry['lr']:g}",
            f"{entry['main/loss']:.4f}", f"{1 - entry['main/accuracy']:.2%}",
            f"{1 - entry['test/main/accuracy']:.2%}",
        ]  # fmt: skip


def test_progress_follows_a_resize_and_names_its_columns_again(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    lines = shown_on(Terminal(100, 50, 50, 50), dataset, tmp_path, monkeypatch)
    heads = [line for line in lines if line.startswith("epoch")]
    assert len(set(heads)) == 2 and "left" in heads[0]


def test_there_is_no_bar_on_the_terminal_that_a_launcher_gives_its_processes(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal(80)
    shown_on(terminal, dataset, tmp_path, monkeypatch)
    assert "\r" not in terminal.getvalue() and "of 8" not in terminal.getvalue()
    assert "left" in terminal.getvalue()  # and every column
