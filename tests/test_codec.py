import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_mediator.codec import decode_bytes, encode_bytes, parse_description
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.sparse import VALUES, encode

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 0), (1, 1), (5, 9), (40, 31)])


@st.composite
def stored_tensors(draw):
    shape, dtype = draw(SHAPES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(shape, generator=generator).to(dtype)
    expert = (dense + torch.randn(shape, generator=generator).to(dtype)).to(dtype)
    return encode(expert, dense, draw(st.floats(0.01, 1)), draw(st.sampled_from(VALUES)))


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        integers = (
            a.dtype
            if not a.is_floating_point()
            else {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        )
        return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


@given(stored_tensors())
def test_bytes_give_the_stored_tensor_back(stored):
    stream, description = encode_bytes(stored)
    assert stream.dtype == torch.uint8
    assert same(decode_bytes(stream, description, "here"), stored)


@given(stored_tensors())
def test_a_description_survives_json(stored):
    _, description = encode_bytes(stored)
    assert parse_description(description.model_dump(mode="json"), "here") == description


@given(stored_tensors(), st.data())
@settings(max_examples=300)
def test_damaged_bytes_give_an_artifact_error_or_a_valid_tensor(stored, data):
    stream, description = encode_bytes(stored)
    damaged = bytearray(stream.numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
        if kind == "flip" and damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del damaged[data.draw(st.integers(0, len(damaged))) :]
        else:
            damaged += data.draw(st.binary(max_size=9))
    tensor = torch.tensor(list(damaged), dtype=torch.uint8)
    decoded, message = attempt(lambda: decode_bytes(tensor, description, "here"))
    if decoded is None:
        assert message.startswith("here: ")
        assert "\n" not in message
        return
    positions = decoded.positions.tolist()
    assert positions == sorted(set(positions))
    assert all(0 <= p < description.numel for p in positions)


def attempt(read):
    """What `read` gives, or None and the message of its ArtifactError."""
    try:
        return read(), ""
    except ArtifactError as error:
        return None, str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(stored_tensors(), st.data())
def test_a_damaged_description_gives_an_artifact_error_or_one_that_is_checked(stored, data):
    stream, description = encode_bytes(stored)
    fields = description.model_dump(mode="json")
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(JSON)
    decoded, message = attempt(
        lambda: decode_bytes(stream, parse_description(fields, "here"), "here")
    )
    assert decoded is not None or message.startswith("here: ")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"count": 7}, "fit"),
        ({"count": -1}, "count"),
        ({"shape": [-2, -3]}, "shape"),
        ({"shape": [1 << 40, 1 << 40]}, "shape"),
        ({"dtype": "int32"}, "dtype"),
        ({"values": "int2"}, "values"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_description_out_of_range_is_refused_by_name(change, what):
    _, description = encode_bytes(encode(torch.ones(2, 3), torch.zeros(2, 3), 1.0))
    with pytest.raises(ArtifactError, match=rf"^here: .*{what}"):
        parse_description(description.model_dump(mode="json") | change, "here")
