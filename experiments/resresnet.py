"""Train the report's residual of residual networks on CIFAR-10 (section III.A, Fig. 8 and 9).

Each block's input is added to its output and the sum rectified: three more shortcuts whatever the
depth, and no more parameters. The report does not say whether the output is rectified before the
sum, too. As in a residual module it is not, unless asked for.

  python experiments/resresnet.py --n 9                   ResResNet-56, 64k iterations
  python experiments/resresnet.py --n 3 --rectify twice   the other reading
  python experiments/resresnet.py                         20, 32, 44, 56 and 110 layers, one by one

The same command again goes on where an interrupted run stopped.
"""

import sys
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet import command, flags, training

ARCHITECTURES = {"once": "resresnet", "twice": "resresnet_twice"}


def main() -> None:
    p = flags.add_schedule(flags.parser(__doc__))
    p.add_argument(
        "--rectify",
        choices=ARCHITECTURES,
        default="once",
        help="rectify a block's output after its input is added, or before it and after it "
        "(default: %(default)s)",
    )
    args = p.parse_args()
    training.train_depths(ARCHITECTURES[args.rectify], args)


if __name__ == "__main__":
    command.run(main)
