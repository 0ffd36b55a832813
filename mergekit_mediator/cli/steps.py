"""Show one line for each step of a long command; the messages of libraries go to a file."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import click


class Steps:
    """Count the steps of a command, and show each with its time on standard error."""

    def __init__(self, count: int, log: Path | None) -> None:
        """Begin before the first step.

        Args:
            count: the number of steps.
            log: the file of the libraries' warnings and progress bars; None shows them.
        """
        self._count, self._log, self._done = count, log, 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show a step while it runs, and at its end the seconds that it took."""
        self._done += 1
        line = f"[{self._done}/{self._count}] {name} "
        click.echo(line, err=True, nl=self._log is None)
        began = time.monotonic()
        try:
            with nullcontext() if self._log is None else _standard_error_to(self._log):
                yield
        except BaseException:
            where = "" if self._log is None else f" (the messages of libraries are in {self._log})"
            click.echo(f"failed{where}", err=True)
            raise
        click.echo(f"{time.monotonic() - began:.0f} s", err=True)


@contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    """Append standard error to a file: the output of Python, of log handlers and of C++ code.

    Log handlers keep the stream that they were made with, so the file descriptor is redirected, too.
    """
    with path.open("a", encoding="utf-8") as file, redirect_stderr(file):
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            file.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
