"""The rules of the house: who may import what, and in one direction."""

import ast
import graphlib
from pathlib import Path

import pytest

import mergekit_mediator

ROOT = Path(mergekit_mediator.__file__).parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))

TENSORS_ONLY = {
    *("conflict", "plan", "sparse", "router", "threshold", "dense", "response"),
    *(
        "codec",
        "factor_codec",
        "entropy",
        "bits",
        "description",
        "expert_file",
        "workers",
        "mixture",
    ),
    *(
        "factor_steps",
        "factors",
        "approximate",
        "budget",
        "allocate",
        "importance",
        "teacher",
        "distil",
    ),
}
MERGING = {
    "plugin",
    "config",
    "settings",
    "expert_names",
    "keys",
    "planner",
    "weights",
    "architecture",
}
MERGING |= {"passes", "storing", "checkpoint", "merge"}
MERGING |= {"estimate", "slopes", "cli_merge", "demo", "dense_writer", "rivals"}
MERGING |= {"lessons", "tuning"}
SERVING = {"runtime", "loading", "routed", "remote", "routers", "serving", "requests"}


def imports(module, at_import_only=False):
    """The modules that one file imports; those inside functions too, unless told otherwise."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    skipped = set()
    if at_import_only:
        for node in ast.walk(tree):
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if lazy or typing:
                skipped.update(id(inner) for inner in ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def packages(module):
    return {name.split(".")[0] for name in imports(module)}


def own(module, at_import_only=False):
    """The modules of this package that one file imports."""
    prefix = "mergekit_mediator."
    names = {n.removeprefix(prefix).split(".")[0] for n in imports(module, at_import_only)}
    return names & set(MODULES)


def reach(module):
    """Everything of this package that a module needs, directly or not."""
    seen, left = set(), {module}
    while left:
        name = left.pop()
        seen.add(name)
        left |= own(name) - seen
    return seen


@pytest.mark.parametrize("module", sorted(TENSORS_ONLY & set(MODULES)))
def test_the_core_knows_tensors_only(module):
    for name in reach(module):
        assert not packages(name) & {"mergekit", "transformers", "huggingface_hub"}, name


@pytest.mark.parametrize("module", MODULES)
def test_mergekit_is_imported_at_its_seam_only(module):
    assert "mergekit" not in packages(module) or module in MERGING


@pytest.mark.parametrize("module", MODULES)
def test_transformers_is_imported_where_models_are_made_only(module):
    assert "transformers" not in packages(module) or module in MERGING | SERVING | {"cli"}


@pytest.mark.parametrize("module", sorted(SERVING & set(MODULES)))
def test_serving_needs_no_mergekit(module):
    assert all("mergekit" not in packages(name) for name in reach(module))


def test_merging_and_serving_meet_in_the_artifact_only():
    assert "runtime" not in reach("merge")
    assert "merge" not in reach("runtime")


def test_no_module_imports_itself_through_others():
    graph = {module: own(module) for module in MODULES if module != "__init__"}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_pickle(module):
    source = (ROOT / f"{module}.py").read_text()
    for call in ("pickle.load", "pickle.dump", "Unpickler(", "torch.load(", "torch.save("):
        assert call not in source


@pytest.mark.parametrize("module", MODULES)
def test_user_errors_are_no_asserts(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text()))


def test_every_module_of_the_core_has_its_tests():
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    core = {"conflict", "plan", "sparse", "router", "threshold", "response", "codec", "expert_file"}
    assert core <= tests
