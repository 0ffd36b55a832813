import subprocess
import sys

import pytest
import torch

from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.expert_file import ExpertFile, ExpertWriter
from mergekit_mediator.store.expert_header import ExpertHeader, open_header
from mergekit_mediator.store.manifest import ExpertEntry


@pytest.fixture
def path(tmp_path):
    """The file of expert `math` in an artifact."""
    path = tmp_path / "mediator" / "experts" / "math.safetensors"
    path.parent.mkdir(parents=True)
    writer = ExpertWriter(path, "math")
    for name, count in (("a", 3), ("b", 500)):
        writer.write(name, encode(torch.ones(count), torch.zeros(count), 1.0, "sign"))
    writer.close()
    return path


def test_a_header_says_of_each_weight_what_the_file_says(path):
    header, file = ExpertHeader(path), ExpertFile(path)
    assert set(header.weights) == {"a", "b"}
    assert header.weights == file.weights
    assert [header.stored_bytes(n) for n in "ab"] == [file.stored_bytes(n) for n in "ab"]
    assert header.expert == file.expert == "math"


def test_the_header_of_another_expert_is_refused(path, tmp_path):
    entries = [
        ExpertEntry(name=name, source="", file="experts/math.safetensors")
        for name in ("math", "code")
    ]
    assert open_header(tmp_path, entries[0]).expert == "math"
    with pytest.raises(ArtifactError, match="holds expert 'math', not 'code'"):
        open_header(tmp_path, entries[1])


def test_a_header_is_read_without_torch(path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mergekit_mediator.store.expert_header import ExpertHeader\n"
        "print(sorted(ExpertHeader(Path(sys.argv[1])).weights), 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == "['a', 'b'] False\n"
