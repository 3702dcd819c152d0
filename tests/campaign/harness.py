"""What the campaign shares: children that may crash or hang, damaged content, counts by area."""

import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from resnet import command
from resnet.command import InputError

PART = float(os.environ.get("CAMPAIGN_PART", "1"))  # of the cases; all of them take up to an hour
SEED = 2016
SECONDS = 60  # after which a child hangs
CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen",
        "socket.connect")  # fmt: skip
COUNTS: dict[str, Counter] = {}  # by area
BAD = ("changed", "lost", "traceback", "hang", "crash", "code")


def some(cases):
    """A seeded part of the cases, at least two."""
    cases = list(cases)
    count = min(len(cases), max(2, round(PART * len(cases))))
    return random.Random(SEED).sample(cases, count)


def child(body, before=lambda: None, times=1):
    """Call ``body`` as a command in a forked process, which then ends.

    Args:
        body: The command.
        before: Called first.
        times: How many times ``SECONDS`` it may take.

    Returns:
        Its exit status, negative for a signal and None for one that hangs; what it wrote to stderr.
    """
    # A pipe, since a file would be cut off where the size of files is limited.
    said, write_to = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(write_to, 2)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
            faulthandler.disable()  # a crash is counted
            before()
            command.run(body)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            try:
                sys.stderr.flush()
            finally:
                os._exit(status)  # whatever happens, it is no second pytest
    os.close(write_to)
    os.set_blocking(said, False)
    with open(said, "rb") as said:
        status, text = _wait(pid, said, times * SECONDS)
    return status, text.decode(errors="replace")


def _wait(pid, said, seconds):
    """Exit status of a process, None for one that hangs, and what has come through its pipe."""
    end, text = time.monotonic() + seconds, b""
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        text += said.read() or b""
        if found:
            return os.waitstatus_to_exitcode(status), text
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, text


def verdict(status, said, legal=(0, 1, 2, 75, 130)):
    """One word on how a command ended, from its exit status and its stderr."""
    if status is None:
        return "hang"
    if status < 0:
        return "crash"
    if "Traceback" in said or status not in legal:
        return "traceback"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status in (1, 2) and (len(errors) != 1 or not said.endswith(errors[0] + "\n")):
        return "traceback"
    return "refused" if status in (1, 2) else "intact"


def count(area, word, what=""):
    """Add one case to an area, and name it where it went wrong."""
    COUNTS.setdefault(area, Counter())[word] += 1
    if word in BAD:
        print(f"{area}: {word}: {what}", flush=True)


def table():
    """The counts as a Markdown table."""
    words = ["intact", "refused", *BAD]
    lines = [["area", "cases", *words], ["---"] * (2 + len(words))]
    for area, counts in {**COUNTS, "all": sum(COUNTS.values(), Counter())}.items():
        lines.append([area, counts.total(), *(counts[word] for word in words)])
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def watch_code(event, _):
    if event.startswith(CODE):
        os.write(2, f"code: {event}\n".encode())
        os._exit(71)


def read_damaged(area, read, mutants, same):
    """Let ``read`` read each of the mutants, many in one process, as long as it lives.

    Args:
        area: Where they are counted.
        read: Given the number and the content of a mutant, returns what it found.
        mutants: The contents.
        same: Whether what was found is what was saved; None for what no digest guards.
    """
    place, done = Path(tempfile.mkdtemp()) / "words", 0

    def read_on():
        with open(place, "w", buffering=1) as words:
            for number in range(done, len(mutants)):
                signal.alarm(SECONDS)
                try:
                    found = read(number, mutants[number])
                    words.write("intact\n" if same is None or same(found) else "changed\n")
                except (InputError, OSError):
                    words.write("refused\n")
                except BaseException as error:
                    words.write(f"traceback {type(error).__name__} {command.reason(error)}\n")

    while done < len(mutants):
        place.write_text("")
        # The alarm ends one that hangs, even where it never comes back to Python.
        status, _ = child(read_on, lambda: sys.addaudithook(watch_code), len(mutants) - done + 1)
        words = place.read_text().splitlines()
        ends = {0: None, -signal.SIGALRM: "hang", None: "hang", 71: "code"}
        if (end := ends.get(status, "crash")) is not None:
            words.append(end)
        for word in words:
            count(area, word.split()[0], f"case {done}: {word}")
            done += 1


def damage(rng, content):
    """``content`` with bits that rot, parts that are missing, or others that came in."""
    found, size = bytearray(content), len(content)
    if not size:
        return b"?"
    # Headers and directories are at the ends.
    where = rng.choice((rng.randrange(size), rng.randrange(min(size, 2048)),
                        size - 1 - rng.randrange(min(size, 2048))))  # fmt: skip
    length = rng.choice((1, 2, 4, 8, 100, 4096))
    match rng.randrange(8):
        case 0 | 1 | 2:
            found[where] ^= 1 << rng.randrange(8)
        case 3:
            found[where : where + length] = rng.randbytes(length)
        case 4:
            found[where : where + length] = rng.choice((b"\0", b"\xff")) * length
        case 5:
            del found[where : where + length]
        case 6:
            found[where:where] = found[rng.randrange(size) :][:length]
        case 7:
            del found[where:]
    return bytes(found)


def mutants(area, content, times=1000, change=damage):
    """Damaged contents, none of which is the content itself; always the same ones."""
    rng = random.Random(f"{SEED} {area}")
    found = (change(rng, content) for _ in range(max(2, round(PART * times))))
    return [each for each in found if each != content]


DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = (None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**400, "", "\ud800", "a\nb",
          "$x^", [], {}, [[]], DEEP)  # fmt: skip


def damage_json(rng, content):
    """JSON with one value replaced by another that does not belong there; or as ``damage``."""
    if rng.random() < 0.4:
        return damage(rng, content)
    root = json.loads(content)
    item, children = root, True
    while children:
        keys = list(item) if isinstance(item, dict) else range(len(item))
        key = rng.choice(keys)
        below = item[key]
        children = isinstance(below, dict | list) and len(below) and rng.random() < 0.9
        if children:
            item = below
    item[key] = rng.choice(VALUES)
    return json.dumps(root).encode()
