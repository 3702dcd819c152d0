"""An architecture from outside the package, ``preactivation.py``: it gets everything."""

import json
import re
import runpy
import sys

import chainer
import numpy as np
import pytest
import torch
from conftest import ROOT, make_run, python
from torch.nn import functional as F

from plots import logs, tables
from resnet import command, evaluate, network, training, weights
from resnet.torch_module import EPS, option_a

SCRIPT = ROOT / "tests" / "preactivation.py"
PLOTS = {"tables": (), "claims": (), "curves": ("-o", "curves.png"), "report": ("-o", "page.html")}


@pytest.fixture(autouse=True)
def known():
    """The script's architecture makes itself known here, too; to other tests it is not."""
    runpy.run_path(str(SCRIPT))
    yield
    del network.ARCHITECTURES["preact"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of the new architecture and of the one it is compared with, through their command lines."""
    out = tmp_path_factory.mktemp("runs")
    for script in (SCRIPT, "experiments/resnet.py"):
        done = python(script, "--n", 1, "--data", "synthetic", "--subset", 256, "--epoch", 2,
                      "--out", out, PYTHONPATH=str(ROOT))  # fmt: skip
        assert done.returncode == 0, done.stderr
    return out


def test_it_is_trained_saved_and_loaded_to_the_digit_of_its_log(runs, monkeypatch, capsys):
    folder = runs / "preact-8-seed0"
    last = json.loads((folder / "log").read_text())[-1]
    net, description = weights.restore(folder / "blocks.h5")
    assert description.architecture == "preact" and "fc/bn" in str([p for p, _ in net.namedlinks()])
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--data", "synthetic"])
    with pytest.raises(SystemExit) as end:
        command.run(lambda: evaluate.main() or sys.exit(0))
    assert end.value.code == 0
    assert f"{last['test/main/accuracy']:.2%}" in capsys.readouterr().out


def test_a_run_does_not_go_on_unnoticed_with_another_module(tmp_path):
    script, words = tmp_path / "mine.py", ["--n", 1, "--data", "synthetic", "--subset", 256]
    content = "import os" + SCRIPT.read_text().partition('"""')[2].partition('"""')[2]
    content = content.replace(
        "        h =", "        os.getenv('STOP') and os.kill(os.getpid(), 15)\n        h ="
    )

    def train(text, **environment):
        script.write_text(text)
        out = "--epoch", 2, "--out", tmp_path / "runs"
        return python(script, *words, *out, PYTHONPATH=str(ROOT), **environment)

    assert "after iteration 1" in train(content, STOP="1").stdout
    again = train(content, STOP="1")
    assert "after iteration 2" in again.stdout and "changed since" not in again.stdout
    noted = train(content + "# other now\n", STOP="1")
    assert "NOTE: mine.py: changed since this run was begun" in noted.stdout
    refused = train(content.replace('"conv2(ReLU(', '"conv2(LeakyReLU('))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "begun with modules that compute 'conv2(ReLU(" in refused.stderr
    assert "Going on from" in (end := train(content)).stdout and end.returncode == 0


def test_layers_are_counted_where_a_module_has_three(dataset, tmp_path, capsys):
    """Folder, header, summary and tables say 9n + 2, and set it beside a ResNet as deep."""
    source = SCRIPT.read_text()
    for two, three in (
        ('beside="resnet"', 'beside="resnet", layers=3'),
        ("self.conv2(relu", "self.conv3(relu(self.bn3(self.conv2(relu"),
        ("self.bn2(h)))", "self.bn2(h))))))"),
        ("            self.bn2 =", "            self.bn3 = Normalization(channels)\n"
         "            self.conv3 = Convolution(channels, channels, 1, rng)\n"
         "            self.bn2 ="),
    ):  # fmt: skip
        assert source.count(two) == 1
        source = source.replace(two, three)
    (tmp_path / "bottleneck.py").write_text(source)
    runpy.run_path(str(tmp_path / "bottleneck.py"))
    assert len(network.ARCHITECTURES["preact"](2).conv4[1].conv3.W) == 64
    setting = make_run(dataset, tmp_path / "runs", "-e", "1").setting
    runs = [training.whole_network("preact", n, 0, setting) for n in (1, 2)]
    runs.append(training.whole_network("resnet", 3, 0, setting))
    for run in runs:
        run.train()
    training.print_summary(runs[:2])
    assert [run.folder.name for run in runs[:2]] == ["preact-11-seed0", "preact-20-seed0"]
    said = capsys.readouterr().out
    assert "# Network: pre-activation ResNet, 20 layers (n = 2), " in said
    summary = said.partition("last epoch, by layers:\n")[2].splitlines()
    assert [line.split()[0] for line in summary] == ["11", "20"]
    groups = logs.read([tmp_path / "runs"])
    assert [group.name for group in groups] == ["ResNet-20", "PreAct-11", "PreAct-20"]
    table = tables.markdown(groups).partition("Not in the report")[2]
    rows = [row.count("(1 run)") for row in table.splitlines() if row.startswith(("| 11", "| 20"))]
    assert rows == [1, 2]
    for name, deep in (("preact", 12), ("resnet", 18)):  # 110 layers, He et al. 4.2
        both = [training.whole_network(name, n, 0, setting).identity for n in (deep - 1, deep)]
        assert [each["warm-up"] for each in both] == [False, True]


def test_training_refuses_to_begin_where_a_link_would_be_lost(tmp_path):
    made = "self.bn2 = Normalization(channels)\n"
    script = tmp_path / "mine.py"
    lost = f"{made}        self.more = [Normalization(channels)]\n        with self.init_scope():\n"
    script.write_text(SCRIPT.read_text().replace(made, lost))
    done = python(script, "--n", 1, "--data", "synthetic", "--epoch", 1, "--out", tmp_path,
                  PYTHONPATH=str(ROOT))  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("error: architecture 'preact': found more of PreActivatedModule, which")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("module", ["evaluate", "pretrained"])
def test_without_its_script_a_command_says_that_it_is_not_registered(runs, module):
    done = python("-m", f"resnet.{module}", runs / "preact-8-seed0")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"error: {runs}/preact-8-seed0/blocks.h5: holds 'preact', which is not ")
    assert line.endswith("or import the script that defines it")


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('beside="resnet"', 'beside="resnett"', "preact: beside: found 'resnett', legal: plain, "),
        ('beside="resnet"', 'beside="preact"', "preact: beside: found 'preact', legal: plain, "),
        ('main("preact"', 'main("react"', "architecture: found 'react', legal: plain, "),
    ],
)
def test_a_misspelt_architecture_is_one_line(tmp_path, right, wrong, message):
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    (tmp_path / "mine.py").write_text(source.replace(right, wrong))
    done = python("mine.py", "--n", 1, "--data", "synthetic", cwd=tmp_path, PYTHONPATH=str(ROOT))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def command_on(module, *words, **where):
    """Run a command of the package as the page tells of an architecture."""
    (code,) = re.findall(
        r'python -c "(import preactivation;[^"]+)"', (ROOT / "README.md").read_text()
    )
    code = code.replace("evaluate", module)
    return python("-c", code, *words, PYTHONPATH=f"{ROOT}:{SCRIPT.parent}", **where)


def test_the_pages_way_to_evaluate_it_evaluates_and_answers_a_wrong_folder_in_one_line(runs):
    done = command_on("evaluate", runs / "preact-8-seed0")
    assert (done.returncode, done.stderr) == (0, "") and "\naccuracy: " in done.stdout
    done = command_on("evaluate", "nowhere")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: 'nowhere': no such file")


def test_it_goes_to_onnx_and_its_export_to_pytorch_is_refused_in_one_line(runs, tmp_path):
    pytest.importorskip("onnxruntime")
    folder = runs / "preact-8-seed0"
    done = command_on("export", folder, "--onnx", "a.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same class for 100.00%") == 2
    done = command_on("export", folder, "--h5", "b.h5", "--torch", "b.pt", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: --torch: {folder}/blocks.h5 holds pre")
    assert "legal: plain, resnet, resresnet, " in line and "--onnx" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_tables_curves_and_page_have_it_beside_what_it_is_compared_with(runs, tmp_path):
    """They read the record, and know nothing of the script."""
    said = {}
    for name, words in PLOTS.items():
        done = python(ROOT / f"plots/{name}.py", runs, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    _, _, table = said["tables"].partition("Not in the report")
    head, _, row = table.split("\n\n")[2].splitlines()[:3]
    assert head.startswith("| Layers | ResNet: ours, synthetic | PreAct: ours, synthetic |")
    assert row.startswith("| 8 | ") and row.count("(1 run)") == 2
    assert "PreAct-8" in (tmp_path / "page.html").read_text()


def test_it_computes_what_pytorch_computes(backend):
    net = network.ARCHITECTURES["preact"](1, seed=2)
    net.to_device(backend)
    x = np.random.RandomState(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    y = net(backend.send(x))
    net.to_device("@numpy")
    parameters = {n: torch.tensor(p.array).double() for n, p in net.copy().namedparams()}

    def bn(name, x):
        gamma, beta = (parameters[f"{name}/{key}"] for key in ("gamma", "beta"))
        return F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS))

    h = bn("/conv1/bn", F.conv2d(torch.tensor(x).double(), parameters["/conv1/conv/W"], padding=1))
    for block, stride in (("/conv2/0", 1), ("/conv3/0", 2), ("/conv4/0", 2)):
        f = F.conv2d(bn(f"{block}/bn1", h), parameters[f"{block}/conv1/W"], None, stride, 1)
        f = F.conv2d(bn(f"{block}/bn2", f), parameters[f"{block}/conv2/W"], padding=1)
        h = f + option_a(h, f)
    expected = bn("/fc/bn", h).mean((2, 3)) @ parameters["/fc/W"].T + parameters["/fc/b"]
    np.testing.assert_allclose(chainer.cuda.to_cpu(y.array), expected.numpy(), rtol=1e-4, atol=1e-4)
