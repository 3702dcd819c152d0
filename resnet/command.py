"""What a user of a command meets: one-line errors, the exit codes they end with, and times."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable

USAGE = 2  # a flag or argument is wrong
FAILURE = 1  # everything else: files, network, damaged data


class InputError(Exception):
    """A mistake or a circumstance that the user can mend.

    Args:
        message: One line that names the flag or file, what was found and what is legal.
        code: Exit status of the command: ``USAGE`` or ``FAILURE``.
    """

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        self.exit(USAGE, f"error: {one_line(message)} (see --help)\n")


def one_line(text: object) -> str:
    """``text`` with line breaks and other characters that do not print written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def reason(error: BaseException) -> str:
    """What a library says of its failure, in one line of at most 300 characters."""
    text = getattr(error, "strerror", None) or str(error)
    return one_line(" ".join(text.split()) or type(error).__name__)[:300]


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def fail(message: str, code: int) -> None:
    """End this process; ``parallel`` has another way, which ends all that train together."""
    print(message, file=sys.stderr)
    sys.exit(code)


def run(command: Callable[[], None]) -> None:
    """Call ``command`` and end the process with one line instead of a traceback on a user error."""
    try:
        command()
    except InputError as error:
        fail(f"error: {one_line(error)}", error.code)
    except OSError as error:  # an unwritable or full folder met after the checks at the start
        name = f"{error.filename}: " if error.filename else ""
        fail(f"error: {one_line(name)}{error.strerror or reason(error)}", FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        fail(traceback.format_exc(), FAILURE)
