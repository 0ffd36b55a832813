"""The end of a server that cannot start: one line, and exit status 1."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_mediator.errors import MediatorError


@contextmanager
def ends_server() -> Iterator[None]:
    """Turn an error inside a context into one line on the standard error stream and exit status 1.

    Raises:
        SystemExit: there was an error.
    """
    try:
        yield
    except MediatorError as error:
        print(f"mergekit-mediator: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
