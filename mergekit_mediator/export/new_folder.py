"""A folder that appears when its content is whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_mediator.errors import ExportError, first_line


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write to; it takes the name at the end, or goes if the writing fails.

    Args:
        out: the folder to make; it is absent or empty.

    Raises:
        ExportError: the folder is not empty, or cannot be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ExportError(
                f"{out}: an empty folder is required, it is not empty: choose another folder"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {first_line(error)}") from error
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
