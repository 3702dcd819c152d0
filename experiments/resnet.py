"""Train the report's residual networks on CIFAR-10 (section II, Fig. 5, 6, 9 and 10).

  python experiments/resnet.py --n 3                    ResNet-20, 64k iterations
  python experiments/resnet.py                          20, 32, 44, 56 and 110 layers, one by one
  python experiments/resnet.py --runs 5                 each with five seeds, mean and deviation
  python experiments/resnet.py --n 3 --data synthetic --epoch 5    a look without CIFAR-10

The same command again goes on where an interrupted run stopped.
"""

import sys
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is this script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet import command, training

if __name__ == "__main__":
    command.run(lambda: training.main("resnet", __doc__))
