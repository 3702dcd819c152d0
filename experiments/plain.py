"""Train the report's plain networks on CIFAR-10: no shortcuts (Fig. 1 and 9).

  python experiments/plain.py --n 3                     20 layers, 64k iterations
  python experiments/plain.py                           20, 32, 44, 56 and 110 layers, one by one
  python experiments/plain.py --n 3 9 --shorten 10      20 and 56 layers, ten times shorter

A plain network of 110 layers may not learn at all: the report has 9.98 %, the accuracy of guessing.
A run that diverges is trained to its end all the same, and reported as diverged.

The same command again goes on where an interrupted run stopped.
"""

import sys
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet import command, training

if __name__ == "__main__":
    command.run(lambda: training.main("plain", __doc__))
