"""Turn failures of the Hub, of the network and of the disk into one readable line each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mergekit_mediator.errors import ShareError, first_line

# The HTTP library of huggingface_hub has changed twice; its errors are the first base of the Hub's own.
_FAILURES: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def failures(repo: str, revision: str | None = None, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn every failure into one line that names the repository and says what to do.

    Args:
        repo: the repository's name.
        revision: the repository's revision, if the user named one.
        files: the files that are fetched; the line names a single file.

    Raises:
        ShareError: always in place of an error of the Hub, the network or the disk.
    """
    try:
        yield
    except Exception as raised:
        # huggingface_hub raises a RuntimeError from each failure while a large file is sent.
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised
        if not isinstance(error, _FAILURES):
            raise
        at = f"{repo}@{revision}" if revision else repo
        at = f"{at}: {files[0]}" if len(files) == 1 else at
        raise ShareError(f"{at}: {_text(error)}") from error


def _text(error: Exception) -> str:
    """Tell a failure in one line, with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = str(getattr(error, "server_message", None) or "").strip() or first_line(error)
    if isinstance(error, GatedRepoError):
        return f"access is restricted: ask for it on the repository's page, then {_TOKEN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such directory and no such repository, or it is private: check the name, or {_TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit"
    if isinstance(error, HFValidationError):
        return "is not the name of a repository: USER/NAME required"
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return "is not in the cache, and the Hub cannot be reached: check the network and HF_HUB_OFFLINE"
    if status == 401:
        return f"the Hub does not know you ({message}): {_TOKEN}"
    if status == 403:
        return f"you may not do this there ({message}): use a token with the right to write"
    if status == 412:
        return "somebody has changed the repository meanwhile: run the command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"the Hub cannot be used ({message}): run the command again"
