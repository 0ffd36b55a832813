"""The rules of the house: which room may import which, and what no room does."""

import ast
import graphlib
from pathlib import Path

import pytest

import mergekit_mediator

ROOT = Path(mergekit_mediator.__file__).parent

# By room, the rooms that it may import from. Modules of the root are rooms of one file.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "remote_code": set(),
    "delta": {"errors"},
    "store": {"errors", "remote_code", "delta"},
    "models": {"errors", "remote_code"},
    "tune": {"errors", "delta", "models"},
    "route": {"errors", "delta", "store", "models"},
    "methods": {"errors", "delta"},
    "merge": {"errors", "remote_code", "delta", "store", "models", "tune", "route", "methods"},
    "serve": {"errors", "remote_code", "delta", "store", "models", "route", "share"},
    "evaluate": {"errors", "models", "route", "methods", "merge", "serve"},
    "share": {"errors", "store", "models"},
    "export": {"errors", "remote_code", "delta", "store", "models"},
    "engines": {"errors", "models", "store", "route", "serve", "share", "export"},
    "remote": {"serve"},
    "_autoload": {"merge"},
    "_build": set(),
}
ALLOWED["cli"] = {"errors", *ALLOWED} - {"remote", "remote_code", "_autoload", "_build"}
ALLOWED["__init__"] = {
    "errors",
    "store",
    "route",
    "serve",
}  # lazily: what `import` of the package gives

# Libraries that only some rooms may import.
LIBRARIES = {
    "mergekit": {"methods", "merge", "evaluate", "cli"},
    "transformers": {"models", "merge", "serve", "cli", "remote"},
    "huggingface_hub": {"store", "models", "merge", "share"},
    "datasets": {"models"},
}


def modules():
    """The source of every module, by its path below the package without the suffix."""
    paths = sorted(ROOT.rglob("*.py"))
    return {p.relative_to(ROOT).with_suffix("").as_posix(): p.read_text() for p in paths}


def room(module):
    return module.split("/")[0]


def imports(source):
    """The dotted names that a module imports, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own(source):
    """The modules of this package that a module imports, as paths."""
    found = set()
    for name in imports(source):
        parts = name.split(".")
        if parts[0] != "mergekit_mediator":
            continue
        parts = parts[1:]
        while parts and not (ROOT.joinpath(*parts).with_suffix(".py").exists()):
            parts.pop()  # a definition, or what the package itself gives
        found.add("/".join(parts) or "__init__")
    return found


def wrong_arrows(sources):
    """Every import that the table does not allow, and every room that it does not know."""
    wrong = [f"unknown room: {room(m)}" for m in sources if room(m) not in ALLOWED]
    for module, source in sources.items():
        for other in own(source) - {"__init__"}:
            a, b = room(module), room(other)
            if a != b and b not in ALLOWED.get(a, set()):
                wrong.append(f"{module} imports {other}")
    return sorted(set(wrong))


def test_imports_point_one_way():
    assert wrong_arrows(modules()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("serve/model", "from mergekit_mediator.merge.run import run", "imports merge/run"),
        ("merge/run", "def f():\n    import mergekit_mediator.serve.model", "imports serve/model"),
        ("delta/curve", "from mergekit_mediator.store import codec", "imports store/codec"),
    ],
)
def test_a_wrong_import_is_found(module, line, complaint):
    sources = modules()
    sources[module] += f"\n{line}\n"
    assert wrong_arrows(sources) == [f"{module} {complaint}"]


def test_a_room_that_the_table_does_not_know_is_found():
    assert wrong_arrows({**modules(), "attic/box": ""}) == ["unknown room: attic"]


def test_the_table_names_no_room_that_is_gone():
    assert set(ALLOWED) == {room(module) for module in modules()}


def test_merging_and_serving_share_nothing_but_the_rooms_below_both():
    below, left = set(), ["serve"]
    while left:
        rooms = ALLOWED[left.pop()] - below
        below |= rooms
        left += rooms
    assert not below & {"merge", "methods", "evaluate", "cli"}


def test_no_module_imports_itself_through_others():
    sources = modules()
    graph = {module: own(source) - {"__init__"} for module, source in sources.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_its_rooms_only(library):
    for module, source in modules().items():
        if any(name.split(".")[0] == library for name in imports(source)):
            assert room(module) in LIBRARIES[library], module


@pytest.mark.parametrize("module", modules())
def test_no_module_uses_pickle(module):
    source = modules()[module]
    for call in ("pickle.load", "pickle.dump", "Unpickler(", "torch.load(", "torch.save("):
        assert call not in source


@pytest.mark.parametrize("module", modules())
def test_user_errors_are_no_asserts(module):
    tree = ast.parse(modules()[module])
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_files_are_short():
    long = {module: source.count("\n") for module, source in modules().items()}
    assert {module: lines for module, lines in long.items() if lines > 400} == {}


def docstrings(source):
    """Every docstring of a module, of its classes and of its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


@pytest.mark.parametrize("module", modules())
def test_no_docstring_begins_with_what(module):
    assert not [text for text in docstrings(modules()[module]) if text.startswith("What ")]
