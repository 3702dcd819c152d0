"""The networks of "Residual Neural Networks for Image Recognition" (Gelda et al. 2016) in PyTorch.

This file needs PyTorch and nothing else; copy it wherever a state dict of such a network goes.
"""

import torch
from torch import nn
from torch.nn import functional as F

ARCHITECTURES = ("plain", "resnet", "resresnet", "resresnet_twice", "highway")
EPS = 2e-5  # of Chainer's batch normalization; its decay 0.9 is PyTorch's momentum 0.1


def option_a(x, like):
    """x, or every second pixel of it with channels of zeros appended, in the shape of ``like``."""
    stride = max(-(-x.shape[i] // like.shape[i]) for i in (2, 3))
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
    def __init__(self, channels_in, channels, stride, architecture):
        super().__init__()
        self.conv1, self.bn1 = convolution(channels_in, channels, stride), normalization(channels)
        self.conv2, self.bn2 = convolution(channels, channels), normalization(channels)
        self.shortcut = architecture in ("resnet", "resresnet", "resresnet_twice")
        gated = architecture == "highway"
        self.gate = nn.Conv2d(channels_in, channels, 3, stride, padding=1) if gated else None

    def forward(self, x, start=None):
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(h))
        if start is not None:
            y = y + option_a(start, y)
        if self.gate is not None:
            t = torch.sigmoid(self.gate(x))
            return F.relu(y) * t + option_a(x, y) * (1 - t)
        return F.relu(y + option_a(x, y) if self.shortcut else y, inplace=True)


class Block(nn.Sequential):
    def __init__(self, n, channels_in, channels, stride, architecture):
        shapes = [(channels_in, stride)] + [(channels, 1)] * (n - 1)
        super().__init__(*(Module(c, channels, s, architecture) for c, s in shapes))
        self.architecture = architecture

    def forward(self, x):
        *modules, last = self
        h = x
        for module in modules:
            h = module(h)
        h = last(h, x if self.architecture == "resresnet" else None)
        return F.relu(h + option_a(x, h)) if self.architecture == "resresnet_twice" else h


class Network(nn.Module):
    """A network of 6n + 2 layers: one of ``ARCHITECTURES``."""

    def __init__(self, architecture, n, classes=10):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"found {architecture}, legal: {', '.join(ARCHITECTURES)}")
        self.register_buffer("mean", torch.zeros(3, 32, 32))  # of the training images
        self.conv1 = Stem()
        self.conv2 = Block(n, 16, 16, 1, architecture)
        self.conv3 = Block(n, 16, 32, 2, architecture)
        self.conv4 = Block(n, 32, 64, 2, architecture)
        self.fc = nn.Linear(64, classes)

    def forward(self, images):
        """Logits (N, classes) of RGB images (N, 3, 32, 32), float32, with values from 0 to 1."""
        return self.logits(images - self.mean)

    def logits(self, x):
        h = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))
