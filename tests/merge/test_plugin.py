import os
import subprocess
import sys
from pathlib import Path

import mergekit.merge
import mergekit.merge_methods
import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

import mergekit_mediator
from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge import plugin

CONSOLE = [sys.executable, "-m", "mergekit.scripts.run_yaml"]


def run(arguments, **environment):
    return subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def write(config, path):
    path.write_text(yaml.safe_dump(config))
    return str(path)


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*.*")}


def test_the_stock_command_knows_the_method(family, tmp_path):
    config = write(family.config(route="all"), tmp_path / "config.yml")
    result = run([*CONSOLE, config, str(tmp_path / "out")])
    assert result.returncode == 0, result.stderr
    assert "measure and average" in result.stderr
    MediatorModel.from_pretrained(tmp_path / "out")


def test_verbose_errors_have_a_traceback(family, mergekit_yaml, tmp_path):
    result = mergekit_yaml(family.config(densty=0.1), tmp_path / "out", "-v")
    assert isinstance(result.exception, ConfigError)


def test_without_the_hook_mergekit_knows_nothing_of_the_method(family, tmp_path):
    config = write(family.config(), tmp_path / "config.yml")
    result = run([*CONSOLE, config, str(tmp_path / "out")], MERGEKIT_MEDIATOR_AUTOLOAD="0")
    assert result.returncode != 0
    assert "mediator" in result.stderr
    assert not (tmp_path / "out").exists()


def test_other_methods_write_the_same_bytes_with_and_without_the_plugin(family, tmp_path):
    config = write(family.config("linear", weight=1.0), tmp_path / "config.yml")
    outputs = []
    for name, switch in (("with", "1"), ("without", "0")):
        out = tmp_path / name
        # mergekit's card lists models in the order of a set, which differs from run to run
        arguments = [*CONSOLE, config, str(out), "--no-write-model-card"]
        result = run(arguments, MERGEKIT_MEDIATOR_AUTOLOAD=switch)
        assert result.returncode == 0, result.stderr
        outputs.append(files(out))
    assert "model.safetensors" in outputs[0]
    assert outputs[0] == outputs[1]


def test_the_hook_imports_nothing_but_itself():
    root = str(Path(mergekit_mediator.__file__).parent.parent)
    program = (
        f"import os, sys; sys.path.insert(0, {root!r}); before = set(sys.modules);"
        "import mergekit_mediator._autoload as a; a.install(); a.install();"
        "print(sorted(set(sys.modules) - before), sum(type(f) is a._Finder for f in sys.meta_path))"
    )
    # isolated, and without site-packages: an editable install imports much by itself
    result = run([sys.executable, "-I", "-S", "-c", program])
    assert result.stdout == "['mergekit_mediator', 'mergekit_mediator._autoload'] 1\n"


def test_a_broken_plugin_warns_and_leaves_mergekit_working():
    program = (
        "import sys; sys.modules['mergekit_mediator.merge.plugin'] = None;"
        "import mergekit.merge_methods; mergekit.merge_methods.get('linear')"
    )
    result = run([sys.executable, "-c", program])
    assert result.returncode == 0, result.stderr
    assert "mergekit-mediator could not be loaded" in result.stderr


@pytest.mark.parametrize(
    "module", ["merge.plugin", "merge.run", "methods.tsvm", "methods.mediator"]
)
def test_a_module_that_is_imported_before_mergekit_is_no_circular_import(module):
    program = (
        f"import mergekit_mediator.{module}, mergekit.merge, mergekit.merge_methods;"
        "mergekit.merge_methods.get('tsvm'); assert mergekit.merge.run_merge.handles_mediator"
    )
    result = run([sys.executable, "-c", program])
    assert result.returncode == 0, result.stderr
    assert "mergekit-mediator could not be loaded" not in result.stderr


def test_importing_the_package_imports_neither_torch_nor_mergekit():
    program = (
        "import sys, mergekit_mediator; assert mergekit_mediator.__version__;"
        "assert not {'torch', 'mergekit', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    result = run([sys.executable, "-c", program])
    assert result.returncode == 0, result.stderr


def test_installing_twice_changes_nothing():
    before = mergekit.merge.run_merge
    plugin.install()
    assert mergekit.merge.run_merge is before
    names = [method.spec.name for method in mergekit.merge_methods.registered_methods()]
    assert names.count("mediator") == 1


def test_run_merge_in_process_merges_into_an_artifact(family, tmp_path):
    config = MergeConfiguration.model_validate(family.config(route="all"))
    mergekit.merge.run_merge(config, str(tmp_path / "out"), options=MergeOptions(quiet=True))
    MediatorModel.from_pretrained(tmp_path / "out")


def test_errors_in_process_keep_their_type(family, tmp_path):
    config = MergeConfiguration.model_validate(family.config(densty=1))
    with pytest.raises(ConfigError, match="densty"):
        mergekit.merge.run_merge(config, str(tmp_path / "out"), options=MergeOptions())
