"""Train all that the report's claims are judged by, and a little more, what tells most first.

Nearly all in a quarter of the full schedule. It decides all but two claims, that ResNets are as
accurate as the report's and as those of He et al.: for these --full trains full schedules.

  python experiments/evidence.py --data PATH --out runs       or: make evidence DATA=PATH OUT=runs
  python experiments/evidence.py --out runs --list            what is complete, and what is not
  python experiments/evidence.py --full --at-once 4 --backend cuda    five seeds, on a GPU

Stop it at will: SIGTERM, as Ctrl-C, lets the trainings in progress write their snapshots, and the
same command goes on. What is complete is skipped, and what another process is training, too. Each
training takes OMP_NUM_THREADS threads.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet import command, files, flags, record, run_folder
from resnet.command import STOPPED, InputError
from resnet.network import ARCHITECTURES
from resnet.stopping import StopRequest

SCRIPTS = {
    "plain": ["plain.py"],
    "resnet": ["resnet.py"],
    "resresnet": ["resresnet.py"],
    "resresnet_twice": ["resresnet.py", "--rectify", "twice"],  # the other reading of III.A
    "top_down": ["partial_training.py", "--order", "top-down"],
    "bottom_up": ["partial_training.py", "--order", "bottom-up"],
}
PAUSE = 0.1  # seconds between two looks at what is being trained
PASSED_ON = ("data", "backend", "device", "precision")  # flags for the experiments


@dataclass(frozen=True)
class Training:
    """One training of the list.

    Attributes:
        net: A name in ``SCRIPTS``.
        n: Modules per block.
        shorten: As the flag.
        choices: Flags beyond the report's, by name.
        seed: As the flag.
    """

    net: str
    n: int
    shorten: int = 4
    choices: dict = field(default_factory=dict)
    seed: int = 0

    @property
    def architecture(self) -> str:
        """Of the network; partial training trains ResNets."""
        return self.net if self.net in ARCHITECTURES else "resnet"

    @property
    def name(self) -> str:
        """Name of its run folder."""
        net = f"{self.net}-{ARCHITECTURES[self.architecture].depth(self.n)}"
        return run_folder.run_name(net, self.seed, self.shorten, self.choices)

    @property
    def words(self) -> list[str]:
        """The experiment's script and its flags."""
        words = [*SCRIPTS[self.net], "--n", self.n, "--seed", self.seed]
        words += ["--shorten", self.shorten] if self.shorten > 1 else []
        for name, value in self.choices.items():
            words += [f"--{name}"] if value is True else [f"--{name}", value]
        return list(map(str, words))

    @property
    def blocks(self) -> dict:
        """What its blocks.h5 holds."""
        return {"architecture": self.architecture, "n": self.n, "seed": self.seed}


def three(n: int, shorten: int = 4) -> tuple[Training, ...]:
    """Name the three architectures in one depth."""
    return tuple(Training(net, n, shorten) for net in ("plain", "resnet", "resresnet"))


SMALL = {"scale": 0.1}  # what the report proposes for a new block (III.B)
WHOLE = Training("resnet", 5)
PARTIAL = (Training("top_down", 5), Training("bottom_up", 5))
WITHOUT = Training("resnet", 3, choices={"augmentation": "none"})
DEEPER = (*three(5)[::2], *three(9), *three(7), *three(18))
# Seeds, and what is trained with each of them; in a quarter of the schedule where nothing is said.
LIST = (
    ((0, 1, 2), three(3)),
    ((0,), (WHOLE, *PARTIAL)),
    ((0, 1, 2), (WITHOUT,)),
    ((0,), three(5)[::2]),  # its ResNet is above
    ((0,), three(9)),
    ((0,), (Training("resnet", 3, shorten=1),)),
    ((0,), three(7)),
    ((0,), three(18)),
    ((0, 1, 2), (Training("resresnet_twice", 3),)),
    ((1, 2), (WHOLE, *PARTIAL)),
    ((0, 1, 2), [replace(each, choices=SMALL) for each in PARTIAL]),
    ((0,), three(3, shorten=1)[::2]),
    ((0, 1, 2), [replace(each, choices={"freeze": True}) for each in PARTIAL]),
    ((1, 2), DEEPER),
    ((1, 2), three(3, shorten=1)),
)
FULL_SEEDS = range(5)


def trainings(full: bool = False) -> list[Training]:
    """Write out the list, training by training.

    Args:
        full: Nothing shortened and ``FULL_SEEDS`` of each, the first seed of all of them first.
    """
    listed = [replace(each, seed=seed) for seeds, some in LIST for seed in seeds for each in some]
    if not full:
        return listed
    every = [
        replace(each, shorten=1, seed=seed)
        for seed in FULL_SEEDS
        for each in listed
        if each.seed == 0
    ]
    return [each for i, each in enumerate(every) if each not in every[:i]]


class Trainer:
    """Runs trainings, some at a time, and hands the signals that it gets on to them.

    Args:
        at_once: How many. What a single one prints is seen; of several it is in their logs.

    Attributes:
        stopped: Whether there was a signal.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.stopped = False
        self._children: list[tuple[Training, subprocess.Popen]] = []
        for number in StopRequest.noted():
            signal.signal(number, self._hand_on)

    @property
    def is_full(self) -> bool:
        return len(self._children) >= self.at_once

    @property
    def is_idle(self) -> bool:
        return not self._children

    def start(self, training: Training, words: list[str]) -> None:
        """Run ``python *words``."""
        # In a session of its own, a Ctrl-C comes to it once, from here.
        child = subprocess.Popen(
            [sys.executable, *words],
            start_new_session=True,
            stdout=subprocess.DEVNULL if self.at_once > 1 else None,
        )
        self._children.append((training, child))
        if self.stopped:  # in between
            child.terminate()

    def wait(self) -> tuple[Training, int]:
        """Wait until one has ended; returns it and its exit status."""
        while True:
            for training, child in self._children:
                if child.poll() is not None:
                    self._children.remove((training, child))
                    return training, child.returncode
            time.sleep(PAUSE)

    def stop(self) -> None:
        """Let what runs write snapshots and end."""
        for _, child in self._children:
            child.terminate()
        while self._children:
            self.wait()

    def _hand_on(self, number: int, _frame: object) -> None:
        self.stopped = True
        for _, child in list(self._children):
            child.send_signal(number)


def is_complete(training: Training, out: Path) -> bool:
    """Tell whether its run folder in ``out`` holds the blocks that are saved at the end, intact."""
    return run_folder.has_blocks(out / training.name, training.blocks)


def is_taken(folder: Path) -> bool:
    """Tell whether another process writes to a run folder."""
    try:
        with files.only_writer(folder):
            return False
    except (InputError, FileNotFoundError) as error:
        return isinstance(error, InputError)


def train_all(wanted: list[Training], out: Path, passed_on: list[str], at_once: int = 1) -> None:
    """Train what is not complete, in order; ends the process where one is stopped.

    Args:
        wanted: The trainings.
        out: Folder of their run folders.
        passed_on: Flags for each of them.
        at_once: How many at a time.
    """
    trainer = Trainer(at_once)
    try:
        taken = _train(wanted, out, passed_on, trainer)
    finally:
        trainer.stop()
    if trainer.stopped:
        done = sum(is_complete(every, out) for every in wanted)
        print(f"stopped with {done} of {len(wanted)} complete; the same command goes on")
        sys.exit(STOPPED)
    if taken:
        print(f"{taken} of {len(wanted)} are being trained by other processes, the rest complete")
        sys.exit(STOPPED)
    print(f"all {len(wanted)} complete in {out}")


def _train(wanted: list[Training], out: Path, passed_on: list[str], trainer: Trainer) -> int:
    """Train until all are complete or one is stopped; returns how many other processes train."""
    scripts = Path(os.path.relpath(Path(__file__).parent))
    taken, waiting = 0, list(enumerate(wanted, 1))
    while waiting or not trainer.is_idle:
        if waiting and not trainer.is_full and not trainer.stopped:
            number, each = waiting.pop(0)
            if is_complete(each, out):
                continue
            words = [str(scripts / each.words[0]), *each.words[1:], "--out", str(out), *passed_on]
            print(f"== {number} of {len(wanted)}: python {shlex.join(words)}", flush=True)
            trainer.start(each, words)
            continue
        if trainer.is_idle:
            break
        each, status = trainer.wait()
        folder = out / each.name
        if trainer.stopped or status == STOPPED:
            trainer.stopped = True
            break
        if status < 0:
            killer = signal.Signals(-status).name
            raise InputError(f"{folder}: training was killed by {killer}; the same command goes on")
        if status and is_taken(folder):
            taken += 1
        elif status:
            if trainer.at_once > 1:
                print(f"{folder}: ended with status {status}", file=sys.stderr)
            sys.exit(status)  # it has said why
        elif trainer.at_once > 1:
            print(f"complete: {folder}", flush=True)
    return taken


def flags_of(args: argparse.Namespace) -> Iterator[str]:
    """Spell the flags for the experiments that were given."""
    for name in PASSED_ON:
        if (value := getattr(args, name)) is not None:
            yield from (f"--{name}", value)


def main() -> None:
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", "-o", type=command.path, default=Path("runs"), metavar="FOLDER",
                   help="folder for the run folders (default: %(default)s)")  # fmt: skip
    p.add_argument("--list", action="store_true", help="print the list and train nothing")
    p.add_argument(
        "--full", action="store_true", help="shorten nothing, train each with five seeds"
    )
    p.add_argument("--at-once", type=flags.whole_number(1, 64), default=1, metavar="K",
                   help="train so many networks at a time; what they print is not shown, but "
                   "errors are (default: 1)")  # fmt: skip
    for name in PASSED_ON:
        p.add_argument(f"--{name}", metavar=name.upper(), help="as of every experiment")
    args = p.parse_args()
    wanted = trainings(args.full)
    if args.list:
        for each in wanted:
            done = "complete" if is_complete(each, args.out) else ""
            print(f"{done:8}  {args.out / each.name}  python experiments/{shlex.join(each.words)}")
        return
    state = record.git_state()
    if state and state["modified"]:
        raise InputError(
            f"{record.ROOT}: modified since commit {state['commit'][:12]}; "
            "legal: a commit as it is, so that what is measured can be measured again"
        )
    train_all(wanted, args.out, list(flags_of(args)), args.at_once)


if __name__ == "__main__":
    command.run(main)
