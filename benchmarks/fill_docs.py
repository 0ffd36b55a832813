"""Put what the benchmarks found into README.md and docs/.

    python benchmarks/fill_docs.py

Each section stands between `<!-- NAME -->` and `<!-- end NAME -->`, and is made by `sections`. A test
holds the documents to the results: no figure of theirs is typed by hand.
"""

import re
from pathlib import Path

from sections import SECTIONS

ROOT = Path(__file__).parents[1]
_SECTION = re.compile(r"<!-- (?!end )(.+?) -->\n.*?<!-- end \1 -->", re.DOTALL)


def main() -> None:
    for path in pages():
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text), encoding="utf-8")


def pages() -> list[Path]:
    """README.md, and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with each of its sections made anew.

    Raises:
        KeyError: a section of this name is not made by anything.
    """
    return _SECTION.sub(lambda m: f"<!-- {m[1]} -->\n{SECTIONS[m[1]]()}\n<!-- end {m[1]} -->", text)


def names(text: str) -> list[str]:
    """The sections of a page, in its order."""
    return [match[1] for match in _SECTION.finditer(text)]


def typed(text: str) -> str:
    """A page without its sections: the part that people write."""
    return _SECTION.sub("", text)


if __name__ == "__main__":
    main()
