import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mergekit_mediator import __version__
from mergekit_mediator._build import STARTUP_FILES

ROOT = Path(__file__).parent.parent
WHEEL = f"mergekit_mediator-{__version__}-py3-none-any.whl"


def source(target):
    """A copy of the repository, so that builds leave nothing in it; tests and results are left out."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "results", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def build(hook, directory, out):
    """Runs a hook of the build backend as pip does: in the source directory, in a process of its own."""
    program = (
        f"import sys; sys.path.insert(0, '.'); from setuptools import build_meta;"
        f"print(build_meta.{hook}({str(out)!r}))"
    )
    arguments = [sys.executable, "-c", program]
    environment = {**os.environ, "MERGEKIT_MEDIATOR_AUTOLOAD": "0"}
    result = subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return out / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, the editable wheel and the sdist."""
    root = tmp_path_factory.mktemp("packaging")
    directory = source(root / "source")
    hooks = {"wheel": "build_wheel", "editable": "build_editable", "sdist": "build_sdist"}
    found = {}
    for name, hook in hooks.items():
        (root / name).mkdir()
        found[name] = build(hook, directory, root / name)
    return found


def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_start_up_files_are_installed_beside_the_package(built, kind):
    files = content(built[kind])
    record = next(text for name, text in files.items() if name.endswith(".dist-info/RECORD"))
    for name, text in STARTUP_FILES.items():
        assert files[name].decode() == text
        assert f"\n{name},sha256=" in "\n" + record.decode()


def test_the_wheel_holds_the_whole_package_and_nothing_else(built):
    roots = {name.split("/")[0] for name in content(built["wheel"])}
    information = f"mergekit_mediator-{__version__}.dist-info"
    assert roots == {"mergekit_mediator", information, *STARTUP_FILES}
    package = ROOT / "mergekit_mediator"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    adapters = {path.relative_to(ROOT).as_posix() for path in package.glob("cli/adapters/*/*")}
    assert "mergekit_mediator/cli/main.py" in modules
    assert "mergekit_mediator/cli/adapters/sums/adapter_model.safetensors" in adapters
    files = {name for name in content(built["wheel"]) if name.startswith("mergekit_mediator/")}
    assert files == modules | adapters | {"mergekit_mediator/py.typed"}


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    shutil.unpack_archive(built["sdist"], tmp_path)
    (directory,) = tmp_path.iterdir()
    (tmp_path / "out").mkdir()
    again = build("build_wheel", directory, tmp_path / "out")
    assert again.name == built["wheel"].name == WHEEL
    assert content(again) == content(built["wheel"])


def site(wheel, directory):
    """A virtual environment without any package but what a wheel unpacks into it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run(
        [python, "-c", where], capture_output=True, text=True, check=True
    ).stdout.strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return python


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_every_interpreter_has_the_hook_unless_it_is_switched_off(built, tmp_path, kind):
    python = site(built[kind], tmp_path / "venv")
    program = (
        "import sys; print(sum(type(f).__module__ == 'mergekit_mediator._autoload' "
        "for f in sys.meta_path))"
    )
    for switch, expected in (("1", "1"), ("0", "0")):
        environment = {**os.environ, "MERGEKIT_MEDIATOR_AUTOLOAD": switch}
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            [python, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert (result.stdout.strip(), result.stderr) == (expected, "")


def test_a_start_file_names_what_the_pth_file_calls():
    module, function = STARTUP_FILES["mergekit_mediator.start"].strip().split(":")
    assert STARTUP_FILES["mergekit_mediator.pth"] == f"import {module}; {module}.{function}()\n"
