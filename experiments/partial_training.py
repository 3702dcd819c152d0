"""Train a ResNet block by block, from the top down or from the bottom up (section III.B, Fig. 10).

  python experiments/partial_training.py --order top-down        ResNet-32: 50, 50 and 100 epochs
  python experiments/partial_training.py --order bottom-up
  python experiments/partial_training.py --order top-down --shorten 10  ten times shorter
  python experiments/partial_training.py --order top-down --stage 2     this stage only
  python experiments/partial_training.py --order bottom-up --scale 0.1  what the report proposes

The top is the input's side. Each stage begins with the blocks.h5 that the stage before wrote.
The same command again goes on where an interrupted run stopped.
"""

import sys
from functools import partial
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet import command, flags, training
from resnet.partial_training import DEPTHS, ORDERS, PartialTraining
from resnet.schedule import STAGES


def main() -> None:
    p = flags.parser(
        __doc__,
        depths="5, the report's 32 layers",
        epochs="train so many epochs in the last stage, half as many in each before, and lower the "
        "rate in proportion (default: 100, 50 and 50)",
    )
    # fmt: off
    p.add_argument("--order", choices=ORDERS, required=True,
        help="which block is trained first: top-down conv2, bottom-up conv4")
    p.add_argument("--stage", type=int, choices=range(1, len(STAGES) + 1),
        help="train this stage only (default: all that are not complete)")
    p.add_argument("--scale", type=flags.number(0, 1000), default=1.0, metavar="LAMBDA",
        help="a new block begins as the identity plus a perturbation of size LAMBDA (default: 1)")
    p.add_argument("--freeze", action="store_true", help="hold the earlier blocks still")
    p.add_argument("--new-ends", action="store_true",
        help="begin each stage with fresh conv1 and fc (default: they carry over)")
    # fmt: on
    args = p.parse_args()
    training.run(partial(PartialTraining, args.order), args, DEPTHS)


if __name__ == "__main__":
    command.run(main)
