"""The one-line errors a user sees, and the exit codes they end with."""

from __future__ import annotations

import sys
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


def run(command: Callable[[], None]) -> None:
    """Call ``command`` and end the process with one line instead of a traceback on a user error."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:  # an unwritable or full folder met after the checks at the start
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror or error}", file=sys.stderr)
        sys.exit(FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
