"""What a command says while it works: on standard error, as its result is on the other."""

import sys


def say(line: str) -> None:
    """Print a line at once."""
    print(line, file=sys.stderr, flush=True)
