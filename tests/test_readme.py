"""The README is true: its tables are those of the results, and its list of files that of the package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import readme  # noqa: E402


def test_every_table_is_made_from_the_results_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text


def test_every_section_stands_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in readme.SECTIONS:
        assert f"<!-- {name} -->\n|" in text, name


def test_every_file_of_the_package_is_listed_once():
    listed = [name for names in readme.ROOMS.values() for name in names.split()]
    there = [path.stem for path in (ROOT / "mergekit_mediator").glob("*.py")]
    assert sorted(listed) == sorted(there)
