import json
import socket

import huggingface_hub.constants
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.merge.headers import TensorHeader, fetch_headers, read_headers


@pytest.fixture
def model(tmp_path):
    weights = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": torch.zeros(4, dtype=torch.int64),
        "c": torch.zeros(()),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_names_dtypes_and_shapes_are_read_without_the_data(model):
    assert read_headers(model, ["model.safetensors"]) == {
        "a": TensorHeader("BF16", (2, 3), "model.safetensors"),
        "b": TensorHeader("I64", (4,), "model.safetensors"),
        "c": TensorHeader("F32", (), "model.safetensors"),
    }


def test_sizes_follow_from_shape_and_dtype(model):
    headers = read_headers(model, ["model.safetensors"])
    assert {name: h.bytes for name, h in headers.items()} == {"a": 12, "b": 32, "c": 4}
    assert headers["a"].numel == 6


def test_shards_are_read_together(model):
    save_file({"d": torch.zeros(1)}, model / "second.safetensors")
    headers = read_headers(model, ["model.safetensors", "second.safetensors"])
    assert (headers["a"].file, headers["d"].file) == ("model.safetensors", "second.safetensors")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "x/../../y"])
def test_a_shard_outside_the_model_is_refused(model, file):
    with pytest.raises(InputError, match="outside the model"):
        read_headers(model, [file])


def test_a_missing_file_is_named(model):
    with pytest.raises(InputError, match=r"gone\.safetensors: cannot be read"):
        read_headers(model, ["gone.safetensors"])


@given(st.integers(0, 400))
def test_a_file_that_is_cut_anywhere_is_named(tmp_path_factory, size):
    directory = tmp_path_factory.mktemp("cut")
    save_file({"a": torch.zeros(60)}, directory / "model.safetensors")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: min(size, len(content) - 1)])
    with pytest.raises(InputError, match=r"model\.safetensors: .*(truncated|malformed)"):
        read_headers(directory, ["model.safetensors"])


@given(st.binary(max_size=200))
@example(b"{}")
def test_any_bytes_give_a_typed_error_or_no_tensors(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("any")
    (directory / "m.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    try:
        tensors = read_headers(directory, ["m.safetensors"])
    except InputError:
        tensors = {}
    assert tensors == {}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": []}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**12]}},
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.safetensors: "):
        read_headers(tmp_path, ["m.safetensors"])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_model_of_the_hub_without_network_is_a_typed_error(no_network):
    with pytest.raises(InputError, match=r"org/model: headers cannot be fetched: .*not known"):
        fetch_headers("org/model", None)


def test_a_model_of_the_hub_offline_is_a_typed_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="org/model: headers cannot be fetched"):
        fetch_headers("org/model", None)


def test_the_first_line_of_an_error_stands_for_it():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
