"""What a user of a command meets: one-line errors, the exit codes they end with, and times."""

from __future__ import annotations

import argparse
import os
import signal
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
        self.exit(USAGE, f"error: {message} (see --help)\n")


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
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; at the end Python flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except InputError as error:
        fail(f"error: {error}", error.code)
    except OSError as error:  # an unwritable or full folder met after the checks at the start
        name = f"{error.filename}: " if error.filename else ""
        fail(f"error: {name}{error.strerror or error}", FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        fail(traceback.format_exc(), FAILURE)
