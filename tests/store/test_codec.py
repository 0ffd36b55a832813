import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.float_bits import bit_patterns
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.value_forms import VALUES
from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.codec import decode_bytes, encode_bytes
from mergekit_mediator.store.description import parse_description

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 0), (1, 1), (5, 9), (40, 31)])


@st.composite
def stored_pairs(draw):
    """A stored tensor and the dense weight that it was encoded against."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(shape, generator=generator).to(dtype)
    step = draw(st.sampled_from([1e-6, 1e-2, 1.0]))
    expert = (dense + step * torch.randn(shape, generator=generator).to(dtype)).to(dtype)
    values = draw(st.sampled_from(VALUES))
    if values == "exact" and draw(st.booleans()):
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
        expert.view(-1)[:5] = special[: expert.numel()]
        dense.view(-1)[1:6] = special[: max(0, dense.numel() - 1)]
    return encode(expert, dense, draw(st.floats(0.01, 1)), values), dense


@st.composite
def approximations(draw):
    """Low rank plus sparse, of quantised factors or of those of an adapter."""
    shape = draw(st.sampled_from([(7,), (0, 3), (9, 5), (20, 31), (2, 6, 4)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    delta = torch.randn(shape, generator=generator)
    stored = approximate(delta, draw(st.floats(1e-4, 2)), torch.bfloat16, draw(st.floats(0, 1)))
    if stored.factors is None or draw(st.booleans()):
        return stored
    dtype = draw(DTYPES)
    left, right = stored.factors.left.to(dtype) / 3, stored.factors.right.to(dtype) / 7
    return replace(stored, factors=Factors(left, right, stored.factors.scales))


@st.composite
def random_signs(draw):
    """Signs at random places, of changes of which some coordinates or whole rows are zero."""
    shape, dtype = draw(st.sampled_from([(9, 5), (20, 31), (2, 6, 4), (40, 3)])), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    delta = torch.randn(shape, generator=generator)
    delta[draw(st.integers(0, shape[0] - 1)) :] *= draw(st.sampled_from([0.0, 1e-9, 1.0]))
    delta *= torch.rand(shape, generator=generator) < draw(st.floats(0.3, 1))
    dense = torch.zeros(shape, dtype=dtype)
    return encode_random_sign(delta.to(dtype), dense, draw(st.floats(0.01, 1)))


def stored_tensors():
    return stored_pairs().map(lambda pair: pair[0]) | approximations() | random_signs()


def same(a, b):
    """Whether two values are equal, tensors bit for bit and in dataclasses too."""
    if isinstance(a, torch.Tensor):
        raw = [bit_patterns(x) if x.is_floating_point() else x for x in (a, b)]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(*raw)
    if is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)
        )
    return a == b


@given(stored_tensors())
def test_bytes_give_the_stored_tensor_back(stored):
    stream, description = encode_bytes(stored)
    assert stream.dtype == torch.uint8
    assert same(decode_bytes(stream, description, "here"), stored)


@given(stored_pairs())
def test_bytes_relative_to_a_dense_weight_give_the_stored_tensor_back_with_it(pair):
    stored, dense = pair
    stream, description = encode_bytes(stored, dense)
    assert description.relative == (stored.values == "exact")
    assert same(decode_bytes(stream, description, "here", dense), stored)


def test_another_dense_weight_is_refused():
    dense = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    stream, description = encode_bytes(encode(dense + 0.01, dense, 0.5), dense)
    with pytest.raises(ArtifactError, match=r"here: the dense weight .* is required"):
        decode_bytes(stream, description, "here")
    with pytest.raises(ArtifactError, match=r"here: the dense weight .* is required"):
        decode_bytes(stream, description, "here", dense.half())
    with pytest.raises(ArtifactError, match="the dense weight of the merge"):
        decode_bytes(stream, description, "here", dense + 1e-4)


def test_a_weight_of_another_shape_is_refused_even_where_it_is_not_needed():
    stream, description = encode_bytes(encode(torch.ones(4), torch.zeros(4), 1.0, "sign"))
    with pytest.raises(ArtifactError, match=r"here: the dense weight .* is required"):
        decode_bytes(stream, description, "here", torch.zeros(3))


def test_exact_values_near_the_dense_weight_take_few_bits():
    generator = torch.Generator().manual_seed(0)
    dense = (0.2 * torch.randn(1000, 300, generator=generator)).bfloat16()
    expert = (dense.float() + 1e-3 * torch.randn(1000, 300, generator=generator)).bfloat16()
    stored = encode(expert, dense, 0.1)
    stream, description = encode_bytes(stored, dense)
    position_bits = 8 * description.sizes[0] / description.count
    assert position_bits < 1.02 * 4.69  # H(p)/p at p = 0.1
    assert 8 * stream.numel() < 0.9 * description.numel
    assert stream.numel() < 0.75 * encode_bytes(stored)[0].numel()


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01, 0.2])
def test_positions_take_little_more_than_their_entropy(density):
    generator = torch.Generator().manual_seed(0)
    delta = torch.zeros(600_000)
    delta[torch.rand(600_000, generator=generator) < density] = 1.0
    stream, description = encode_bytes(encode(delta, torch.zeros(600_000), 1.0, "sign"))
    p = description.count / description.numel
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * description.numel
    assert 8 * stream.numel() < 1.03 * entropy + 8 * 100


def test_a_stream_that_claims_to_expand_too_far_is_refused_before_memory_is_taken():
    stored = encode(torch.ones(3), torch.zeros(3), 1.0, "sign")
    stream, description = encode_bytes(stored)
    huge = description.model_copy(update={"shape": (1 << 40,), "count": 1 << 40})
    with pytest.raises(ArtifactError, match="cannot hold"):
        decode_bytes(stream, huge, "here")


def test_constant_codes_of_a_large_weight_survive_the_limit_on_expansion():
    delta = torch.ones(3 << 20)
    stored = encode(delta, torch.zeros_like(delta), 1.0, "sign")
    stream, description = encode_bytes(stored)
    assert stream.numel() < 2000
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
    changed = description.model_dump(mode="json")
    name = data.draw(st.sampled_from(sorted(changed)))
    changed[name] = data.draw(JSON)
    decoded, message = attempt(
        lambda: decode_bytes(stream, parse_description(changed, "here"), "here")
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
