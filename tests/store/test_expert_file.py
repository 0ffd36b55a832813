import functools
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.value_forms import VALUES
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.expert_file import ExpertFile, ExpertWriter


def weights():
    generator = torch.Generator().manual_seed(0)
    dense = {
        "a.weight": torch.randn(30, 20, generator=generator).bfloat16(),
        "b.bias": torch.randn(20, generator=generator),
        "c": torch.randn((), generator=generator),
        'é\n"': torch.zeros(0, 3),
    }
    expert = {
        n: (w + torch.randn(w.shape, generator=generator)).to(w.dtype) for n, w in dense.items()
    }
    return dense, expert


def write(path, values="exact"):
    dense, expert = weights()
    writer = ExpertWriter(path, "math")
    for name in dense:
        writer.write(name, encode(expert[name], dense[name], 1.0, values))
    writer.close()
    return dense, expert


@pytest.mark.parametrize("values", VALUES)
def test_a_file_gives_back_what_was_written(tmp_path, values):
    dense, expert = write(tmp_path / "e.safetensors", values)
    file = ExpertFile(tmp_path / "e.safetensors")
    assert file.expert == "math"
    assert set(file.weights) == set(dense)
    for name, weight in dense.items():
        expected, got = weight.clone(), weight.clone()
        mix_(expected, [(1.0, encode(expert[name], weight, 1.0, values))])
        mix_(got, [(1.0, file.read(name))])
        assert torch.equal(got, expected)


def test_the_file_is_ordinary_safetensors(tmp_path):
    dense, _ = write(tmp_path / "e.safetensors")
    file = ExpertFile(tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", framework="np") as opened:
        assert set(opened.keys()) == {*dense, "__descriptions__"}
        for name in dense:
            assert opened.get_tensor(name).dtype == "uint8"
            assert opened.get_tensor(name).nbytes == file.stored_bytes(name)


def test_weights_that_were_not_written_are_not_in_the_file(tmp_path):
    writer = ExpertWriter(tmp_path / "e.safetensors", "math")
    writer.write("b", encode(torch.ones(3), torch.zeros(3), 1.0))
    writer.close()
    assert list(ExpertFile(tmp_path / "e.safetensors").weights) == ["b"]


def test_the_header_holds_many_long_names(tmp_path):
    names = [f'{"é" * 60}.{i}."quoted".weight' for i in range(200)]
    writer = ExpertWriter(tmp_path / "e.safetensors", "math")
    for name in names:
        writer.write(name, encode(torch.ones(3), torch.zeros(3), 1.0))
    writer.close()
    assert ExpertFile(tmp_path / "e.safetensors").read(names[-1]).positions.tolist() == [0, 1, 2]


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "e.safetensors").write_text("mine")
    writer = ExpertWriter(tmp_path / "e.safetensors", "math")
    with pytest.raises(FileExistsError):
        writer.close()
    assert (tmp_path / "e.safetensors").read_text() == "mine"


def test_an_abandoned_file_does_not_open(tmp_path):
    writer = ExpertWriter(tmp_path / "e.safetensors", "math")
    writer.write("a", encode(torch.ones(3), torch.zeros(3), 1.0))
    writer.abandon()
    with pytest.raises(ArtifactError, match="cannot be read"):
        ExpertFile(tmp_path / "e.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.safetensors"):
        ExpertFile(tmp_path / "nowhere.safetensors")


def rewrite_header(path, change):
    """Apply `change` to the parsed header, keeping its room and the data behind it."""
    content = path.read_bytes()
    (room,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + room])
    change(header)
    text = json.dumps(header).encode().ljust(room)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + room :])


@pytest.mark.parametrize("key", ["format", "version", "descriptions_bytes"])
def test_a_foreign_header_is_refused(tmp_path, key):
    path = tmp_path / "e.safetensors"
    write(path)
    rewrite_header(path, lambda header: header["__metadata__"].update({key: "9"}))
    with pytest.raises(ArtifactError, match=r"e\.safetensors: "):
        ExpertFile(path)


def test_a_weight_without_a_description_is_refused(tmp_path):
    path = tmp_path / "e.safetensors"
    write(path)
    rewrite_header(path, lambda header: header.update(d=header.pop("c")))
    with pytest.raises(ArtifactError, match="its descriptions name different weights"):
        ExpertFile(path)


def test_descriptions_that_claim_to_be_huge_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "e.safetensors"
    write(path)
    change = {"descriptions_bytes": str(10**12)}
    rewrite_header(path, lambda header: header["__metadata__"].update(change))
    with pytest.raises(ArtifactError, match=r"__descriptions__: \d+ bytes cannot hold 10{12}"):
        ExpertFile(path)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "an object required, got list"), ("{", "cannot be read")]
)
def test_descriptions_that_are_no_object_are_refused(tmp_path, text, message):
    path = tmp_path / "e.safetensors"
    write(path)
    with safe_open(path, framework="np") as opened:
        stored = opened.get_tensor("__descriptions__").nbytes

    def shorten(header):
        header["__metadata__"]["descriptions_bytes"] = str(len(text))
        entry = header["__descriptions__"]
        start = entry["data_offsets"][0]
        entry.update(shape=[len(text)], data_offsets=[start, start + len(text)])

    rewrite_header(path, shorten)
    path.write_bytes(path.read_bytes()[:-stored] + text.encode())
    with pytest.raises(ArtifactError, match=f"__descriptions__: {message}"):
        ExpertFile(path)


@functools.cache
def content_of_a_file(values):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "e", values)
        return (Path(folder) / "e").read_bytes()


def problem(path):
    """What reading everything in a file says, on one line; nothing if it is readable."""
    try:
        file = ExpertFile(path)
        for name in file.weights:
            file.read(name)
    except ArtifactError as error:
        return str(error)
    return None


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_a_damaged_file_gives_only_artifact_errors(tmp_path, data):
    content = bytearray(content_of_a_file(data.draw(st.sampled_from(VALUES))))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    header = len(bytes(content[:header]).rstrip())
    for _ in range(data.draw(st.integers(1, 4))):
        places = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "damaged").write_bytes(content)
    message = problem(tmp_path / "damaged")
    assert message is None or (message.startswith(str(tmp_path)) and "\n" not in message)
