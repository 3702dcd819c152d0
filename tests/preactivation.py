"""Train pre-activation ResNets (He et al., arXiv:1603.05027): a block from outside the package."""

from resnet import command, training
from resnet.functions import option_a, relu
from resnet.modules import Convolution, Module, Normalization
from resnet.network import ARCHITECTURES, Architecture, Head


class PreActivatedModule(Module):  # normalization and ReLU in front of each convolution
    def __init__(self, channels_in, channels, stride, rng):
        super().__init__(channels_in, channels, stride, rng)
        with self.init_scope():
            self.bn1 = Normalization(channels_in)
            self.conv1 = Convolution(channels_in, channels, stride, rng)
            self.bn2 = Normalization(channels)
            self.conv2 = Convolution(channels, channels, 1, rng)

    def forward(self, x):
        h = self.conv1(relu(self.bn1(x)))
        return self.conv2(relu(self.bn2(h))) + option_a(x, self.channels, self.stride)


class PreActivatedHead(Head):  # what follows the last sum is part of the group fc
    def __init__(self, channels, classes, rng):
        super().__init__(channels, classes, rng)
        with self.init_scope():
            self.bn = Normalization(channels)

    def forward(self, x):
        return super().forward(relu(self.bn(x)))


ARCHITECTURES["preact"] = Architecture(
    "pre-activation ResNet", "PreAct", "conv2(ReLU(bn2(conv1(ReLU(bn1(x)))))) + A(x)",
    PreActivatedModule, head=PreActivatedHead, beside="resnet",
)  # fmt: skip

if __name__ == "__main__":
    command.run(lambda: training.main("preact", __doc__))
