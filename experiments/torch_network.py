"""The networks of the report in PyTorch: what the tests and the speed table compare with."""

from __future__ import annotations

import numpy as np
import torch
from chainer.serializers import DictionarySerializer
from torch import nn
from torch.nn import functional as F

EPS = 2e-5  # of Chainer's batch normalization; its decay 0.9 is torch's momentum 0.1


def option_a(x, like):
    """x, or every second pixel of it with channels of zeros appended, in the shape of ``like``."""
    stride = -(-x.shape[2] // like.shape[2])
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, like.shape[1] - x.shape[1]))


def convolution(channels_in, channels, stride=1):
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)


def normalization(channels):
    return nn.BatchNorm2d(channels, eps=EPS, momentum=0.1)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = convolution(3, 16), normalization(16)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Module(nn.Module):
    def __init__(self, channels_in, channels, stride, shortcut):
        super().__init__()
        self.conv1, self.bn1 = convolution(channels_in, channels, stride), normalization(channels)
        self.conv2, self.bn2 = convolution(channels, channels), normalization(channels)
        self.shortcut = shortcut

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(h))
        return F.relu(y + option_a(x, y) if self.shortcut else y, inplace=True)


class Block(nn.Sequential):
    def __init__(self, n, channels_in, channels, stride, architecture):
        shapes = [(channels_in, stride)] + [(channels, 1)] * (n - 1)
        super().__init__(*(Module(c, channels, s, architecture != "plain") for c, s in shapes))
        self.shortcut = architecture == "resresnet"

    def forward(self, x):
        y = super().forward(x)
        return F.relu(y + option_a(x, y), inplace=True) if self.shortcut else y


class TorchNetwork(nn.Module):
    """The network ``architecture`` with 6n + 2 layers."""

    def __init__(self, architecture, n):
        super().__init__()
        self.conv1 = Stem()
        self.conv2 = Block(n, 16, 16, 1, architecture)
        self.conv3 = Block(n, 16, 32, 2, architecture)
        self.conv4 = Block(n, 32, 64, 2, architecture)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        h = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))

    def load(self, network):
        """Take over every weight and statistic of a Chainer network; each must have its place."""
        arrays = state(network)
        self.load_state_dict({torch_name(k): torch.as_tensor(v) for k, v in arrays.items()})
        return self


def state(network):
    """Every weight and statistic of a Chainer network by name, on the CPU."""
    serializer = DictionarySerializer()
    serializer.save(network)
    return {name: np.array(array) for name, array in serializer.target.items()}


def torch_name(name):
    """conv2/0/bn1/gamma -> conv2.0.bn1.weight"""
    *path, last = name.strip("/").split("/")
    names = {
        "W": "weight",
        "gamma": "weight",
        "b": "bias",
        "beta": "bias",
        "avg_mean": "running_mean",
        "avg_var": "running_var",
        "N": "num_batches_tracked",
    }
    return ".".join((*path, names[last]))
