"""Texts for heavy fine-tunes, from what a machine has or installs: documents, then rows of tokens.

`python` is the source of the standard library and of installed packages. `german` is the translations and
manuals under /usr/share, and those of unpacked packages:

    apt-get download manpages-de debian-reference-de && for file in *.deb; do dpkg -x $file german; done

`reasoning` is problems of all tasks of `reasoning-gym` that are drawn fast enough, with their answers.
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import html
import re
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROW = 512  # tokens that a model reads at once
HELD_OUT = 64  # rows that no model is trained on
GERMAN = (Path("/usr/share/locale/de"), Path("/usr/share/man/de"))
_LEAST_TRANSLATIONS = 200  # characters of a text: shorter ones are joined
# A text is German if more than this part of its words are among these, of which English has few.
_IS_GERMAN, _GERMAN_WORDS = (
    0.06,
    re.compile(
        r"\b(?:der|die|das|den|dem|und|oder|ist|sind|wird|nicht|ein|eine|mit|von|für|auf|zu|sie)\b",
        re.I,
    ),
)
_AT_ONCE = (
    256  # documents that are tokenised together, on all cores if TOKENIZERS_PARALLELISM is true
)
_SLOW = 20.0  # seconds for the problems of one task, after which no more of it are drawn
_DRAWN = 16  # problems of a task at once
_SEED = 400_000
Rows = NDArray[np.int32]


def rows(kind: str, tokenizer: Any, tokens: int, folder: Path, german: list[Path]) -> list[Rows]:
    """Rows `[n, ROW]` to train on and held out; made once, then read from the folder.

    There are fewer rows than tokens ask for if there is not so much text. Every document is either
    trained on or held out.
    """
    paths = [folder / f"{kind}-{part}.npy" for part in ("train", "held-out")]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        documents = DOCUMENTS[kind](tokens, german)
        dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        for path, count in zip(reversed(paths), (HELD_OUT, -(-tokens // ROW)), strict=True):
            packed = _packed(documents, tokenizer, count)
            np.save(path, packed.astype(dtype), allow_pickle=False)
    return [np.load(path, allow_pickle=False).astype(np.int32) for path in paths]


def _packed(documents: Iterator[str], tokenizer: Any, count: int) -> Rows:
    """Up to `count` rows of documents one after another, each with its end of sequence."""
    parts: list[Rows] = []
    missing = count * ROW
    # few documents at once for few rows, because those that are left over are read for no other rows
    while missing > 0 and (batch := list(islice(documents, min(_AT_ONCE, 1 + count // 64)))):
        for ids in tokenizer(batch, add_special_tokens=False).input_ids:
            parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
            missing -= len(parts[-1])
    whole = min(count, count - -(-missing // ROW))
    if whole < 1:
        raise SystemExit(f"no {ROW} tokens of text: install packages, or give --german DIR")
    return np.concatenate(parts)[: whole * ROW].reshape(whole, ROW)


def python(tokens: int, german: list[Path]) -> Iterator[str]:
    """Source files of Python, in an order that does not depend on the machine."""
    paths = sysconfig.get_paths()
    files = {p for key in ("stdlib", "purelib") for p in Path(paths[key]).rglob("*.py")}
    for path in _mixed(files):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 200:  # most shorter ones are empty or alike
            yield text


def german(tokens: int, folders: list[Path]) -> Iterator[str]:
    """Manual pages, other texts and translations in German."""
    files = [p for folder in (*GERMAN, *folders) for p in folder.rglob("*") if p.is_file()]
    known: set[int] = set()
    for path in _mixed(files):
        for text in _translations(path) if path.suffix == ".mo" else _prose(path):
            if _is_german(text) and hash(text) not in known:
                known.add(hash(text))
                yield text


def _is_german(text: str) -> bool:
    return len(_GERMAN_WORDS.findall(text)) > _IS_GERMAN * len(text.split())


def _prose(path: Path) -> Iterator[str]:
    """A text file whose path says that it may be German, without markup: commands of troff, tags of HTML."""
    if "/de" in path.as_posix() or "de." in path.name or path.suffix == ".html":
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if b"\0" not in content:
            text = content.decode(errors="ignore")
            text = re.sub(r"<(style|script)\b.*?</\1>", "", text, flags=re.S)
            text = re.sub(r"<[^>]*>|^[.'].*$|\\f.", "", text, flags=re.M)
            yield re.sub(r"\s*\n\s*\n", "\n\n", html.unescape(text))


def _translations(path: Path) -> Iterator[str]:
    """The German side of a file of translations, several messages a document."""
    try:
        with path.open("rb") as file:
            catalog: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except (IndexError, OSError, ValueError):
        return
    text = ""
    for key, message in catalog.items():
        text += f"{message}\n" if key else ""
        if len(text) >= _LEAST_TRANSLATIONS:
            yield text
            text = ""


def reasoning(tokens: int, german: list[Path]) -> Iterator[str]:
    """Problems with their answers, one of each task in turn."""
    # here, because it is not needed where the rows are there
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    spent: dict[str, float] = dict.fromkeys(sorted(DATASETS), 0.0)
    for round_ in range(tokens):
        drawn = []
        for task in [task for task, seconds in spent.items() if seconds < _SLOW]:
            start = time.process_time()
            # problem i of seed s is problem i - 1 of seed s + 1
            seed = _SEED + round_ * _DRAWN
            try:
                items = list(reasoning_gym.create_dataset(task, seed=seed, size=_DRAWN))
            except Exception as error:  # noqa: BLE001 (some tasks need other packages)
                print(f"{task} is left out: {error}")
                spent[task] = _SLOW
                continue
            spent[task] += time.process_time() - start
            drawn.append([f"{item['question']}\n\n{item['answer']}" for item in items])
        for problems in zip(*drawn, strict=True):
            yield from problems


def _mixed(paths: Any) -> list[Path]:
    """Files in an order of chance that their names alone decide."""
    return sorted(
        paths, key=lambda path: hashlib.sha256("/".join(path.parts[-3:]).encode()).digest()
    )


DOCUMENTS = {"python": python, "german": german, "reasoning": reasoning}
