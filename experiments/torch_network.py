"""The networks of the report in PyTorch: what the tests and the speed table compare with."""

from __future__ import annotations

import functools

import numpy as np
import torch
from chainer.serializers import DictionarySerializer
from torch import nn
from torch.nn import functional as F

from resnet import functions, training
from resnet.command import InputError
from resnet.functions.capture import EAGER

SCALE = 1024  # of the loss in float16, as of our float16 gradients
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


def training_step(n, x, t, rate, variant="torch", precision="float32", gpu=None):
    """Make a function that trains a ResNet of 6n + 2 layers on one batch once.

    Args:
        n: Modules per block.
        x, t: Images (N, C, H, W) and labels (N,), NumPy arrays.
        rate: Learning rate.
        variant: ``torch``, or with channels last ``torch channels_last``, ``torch compile`` and,
            recorded as one CUDA graph, ``torch graph``.
        precision: Type of PyTorch's; but for float32, autocast chooses what is computed in it.
        gpu: Number of the GPU; None: on the CPU.

    Returns:
        It; on a GPU also one that waits for the GPU, and one that tells the bytes taken there.

    Raises:
        InputError: It cannot run here; the message says why.
    """
    if gpu is not None and not torch.cuda.is_available():
        raise InputError("this PyTorch has no CUDA")
    there, dtype = torch.device("cpu" if gpu is None else f"cuda:{gpu}"), getattr(torch, precision)
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("PyTorch has no bfloat16 convolutions for this processor")
    torch.set_num_threads(functions.onednn.threads())
    torch.backends.cudnn.benchmark = True
    layout = torch.contiguous_format if variant == "torch" else torch.channels_last
    network = TorchNetwork("resnet", n).to(there, memory_format=layout)
    inputs = torch.as_tensor(x).to(there).contiguous(memory_format=layout)
    labels = torch.as_tensor(t, dtype=torch.int64).to(there)
    forward = torch.compile(network) if variant in ("torch compile", "torch graph") else network
    scale = SCALE if dtype is torch.float16 else 1  # of loss and gradients
    optimizer = torch.optim.SGD(
        network.parameters(), rate / scale, training.MOMENTUM,
        weight_decay=training.WEIGHT_DECAY * scale, fused=gpu is not None,
    )  # fmt: skip

    def step():
        with torch.autocast(there.type, dtype, enabled=dtype is not torch.float32):
            y = forward(inputs)
            loss = F.cross_entropy(y, labels)
        if y.dtype is not dtype:
            raise RuntimeError(f"autocast made logits of {y.dtype}, not {dtype}")
        optimizer.zero_grad()
        (loss * scale if scale > 1 else loss).backward()
        optimizer.step()

    if gpu is None:
        return (step,)
    taken = functools.partial(torch.cuda.max_memory_reserved, there)
    return graph_of(step) if variant == "torch graph" else step, torch.cuda.synchronize, taken


def graph_of(step):
    """Record a training step as one CUDA graph; returns what replays it."""
    side = torch.cuda.Stream()  # the default stream cannot be recorded
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(EAGER):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
