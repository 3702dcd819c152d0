"""Train Highway networks on CIFAR-10: not in the report, whose introduction discusses them.

A gate in each module decides how much of its input goes past it (Srivastava, Greff and
Schmidhuber, arXiv:1505.00387). The gates have weights of their own: half as many again.

  python experiments/highway.py --n 3                   Highway-20, 64k iterations
  python experiments/highway.py                         20, 32, 44, 56 and 110 layers, one by one

The same command again goes on where an interrupted run stopped.
"""

import sys
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet import command, training

if __name__ == "__main__":
    command.run(lambda: training.main("highway", __doc__))
