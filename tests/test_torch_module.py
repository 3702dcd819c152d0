"""The networks in PyTorch: a file that stands alone. Against ours: test_network.py."""

import ast
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import python
from test_export import IMAGES, MEAN, logits, save

from resnet import torch_module
from resnet.network import ARCHITECTURES


def test_it_has_every_architecture_of_the_package_and_no_other():
    assert set(torch_module.ARCHITECTURES) == set(ARCHITECTURES)
    with pytest.raises(ValueError, match="found rsnet, legal: plain, resnet"):
        torch_module.Network("rsnet", 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_state_dict_and_its_module_need_nothing_of_this_project(architecture, tmp_path):
    path, net = save(architecture, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = python("-m", "resnet.export", path, "--torch", elsewhere / "net.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    source = (elsewhere / "net.py").read_text()
    imports = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imports == {"torch", "pathlib"}
    np.save(tmp_path / "images.npy", IMAGES / np.float32(255))
    code = (
        "import sys; sys.path.insert(0, 'elsewhere')\n"
        "import numpy, torch, net\n"
        "images = torch.from_numpy(numpy.load('images.npy'))\n"
        "numpy.save('logits.npy', net.load()(images).detach().numpy())\n"
        "assert net.CLASSES[1] == '鳥' and len(net.CLASSES) == 10"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = logits(net, MEAN)
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (5, 8)])
def test_a_shortcut_is_subsampled_whatever_the_shape_of_an_image(size):
    x = torch.rand(2, 3, *size)
    y = torch_module.option_a(x, torch.empty(2, 5, *(-(-length // 2) for length in size)))
    np.testing.assert_array_equal(y[:, :3], x[:, :, ::2, ::2])
