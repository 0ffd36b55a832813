"""The part of a model card that the program writes anew: conflict, sizes, routing, evaluation and limits.

The part stands between two comments, of which the first has a digest of it. What people write above and below
stays, and a part that people have changed stays, too.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from mergekit_mediator.errors import OutputError
from mergekit_mediator.store import durable
from mergekit_mediator.store.card_text import card_text
from mergekit_mediator.store.evaluation import Evaluation
from mergekit_mediator.store.manifest import CARD, PICTURES, Manifest
from mergekit_mediator.store.model_index import with_results
from mergekit_mediator.store.staging_directories import output_name

_BEGIN = "<!-- mergekit-mediator {digest}: this part is written by the program; write above or below it -->"
_END = "<!-- end mergekit-mediator -->"
_PART = re.compile(
    r"<!-- mergekit-mediator(?: ([0-9a-f]{12}))?:? [^\n]*-->\n(.*?)<!-- end mergekit-mediator -->",
    re.DOTALL,
)


def generated_part(
    manifest: Manifest, evaluation: Evaluation | None = None, pictures: tuple[str, ...] = ()
) -> str:
    """Write the part with its comments.

    Args:
        manifest: the artifact's manifest.
        evaluation: the artifact's evaluation, if there was one.
        pictures: the pictures that the artifact has, of `PICTURES`. Text takes the place of the others.

    Raises:
        ArtifactError: the manifest's figures of the router are damaged.
    """
    text = card_text(manifest, evaluation, pictures)
    return f"{_BEGIN.format(digest=_digest(text))}\n{text}{_END}"


def refresh_card(
    root: Path,
    manifest: Manifest,
    evaluation: Evaluation | None,
    draw: Callable[[], Mapping[str, bytes]],
) -> bool:
    """Bring the generated part of an artifact's card up to date, and its pictures and `model-index`.

    Nothing is written if there is no card, if it has no such part, or if people changed the part; a note says so.

    Args:
        root: the artifact's directory.
        manifest: the artifact's manifest.
        evaluation: the artifact's evaluation, if there was one.
        draw: gives the pictures by name, of `PICTURES`; those that it does not give are removed.

    Returns:
        Whether the card is up to date.

    Raises:
        OutputError: the card cannot be read or written, or its metadata are damaged.
        ArtifactError: the manifest's figures of the router are damaged.
    """
    path = root / CARD
    if not path.is_file():
        return False
    try:
        text = path.read_bytes().decode()
        windows = text.count("\r\n") == text.count("\n") > 0
        text = text.replace("\r\n", "\n") if windows else text
        part = _PART.search(text)
        if part is None:
            _note(f"{path}: stays as it is: it has no part of mergekit-mediator")
            return False
        if part[1] not in (None, _digest(part[2])):
            _note(
                f"{path}: stays as it is: somebody changed the part that mergekit-mediator wrote: to have it "
                f"written anew, delete {part[1]} in the comment above it"
            )
            return False
        pictures = draw()
        new = generated_part(manifest, evaluation, tuple(pictures))
        new = text[: part.start()] + new + text[part.end() :]
        new = with_results(new, evaluation, output_name(root.resolve()), str(path))
        for name in PICTURES:
            if name in pictures:
                durable.write_bytes(root / name, pictures[name])
            else:
                (root / name).unlink(missing_ok=True)
        if new != text:
            durable.write_bytes(path, (new.replace("\n", "\r\n") if windows else new).encode())
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: the card cannot be brought up to date: {error}") from error
    return True


def with_generated(card: str, part: str) -> str | None:
    """Replace a card's generated part, and remove the results of an evaluation.

    Args:
        card: the text of the card.
        part: the new part, see `generated_part`; empty to leave it out.

    Returns:
        The text; None if the card has no generated part, or one that people changed.

    Raises:
        OutputError: the card's metadata cannot be read.
    """
    match = _PART.search(card)
    if match is None or match[1] not in (None, _digest(match[2])):
        return None
    return with_results(card[: match.start()] + part + card[match.end() :], None, "", CARD)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _note(text: str) -> None:
    tqdm.write(f"note: {text}", file=sys.stderr)
