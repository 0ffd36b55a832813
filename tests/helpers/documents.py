"""The documents of the repository: their blocks of code, links and headings."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")


def documents():
    """README and its neighbours, the pages of docs/, and what is said about the examples."""
    names = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]


def name(path):
    """A document's path in the repository."""
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """The blocks of code in one language, in their order."""
    text = path.read_text(encoding="utf-8")
    return [match[2] for match in _FENCE.finditer(text) if match[1] == language]


def prose(path):
    """A document without its blocks of code."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def spans(path):
    """The code in the lines of a document, such as `make demo`."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def links(path):
    """The targets of links and pictures."""
    text = re.sub(r"`[^`\n]+`", "", prose(path))
    return [match[1] or match[2] for match in _LINK.finditer(text)]


def anchors(path):
    """What a link to a heading may end with, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(path):
    """The commands of the shell blocks, as lists of words; those joined by `&&` one by one."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                end = words.index("&&")
                found.append(words[:end])
                words = words[end + 1 :]
            found.append(words)
    return [words for words in found if words]
