"""Hostile files with right digests: refused by name before they take memory that the base does not need."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from hostile import (
    MIB,
    bomb,
    change_expert,
    descriptions_of,
    read_file,
    refusal,
    sign,
    stream,
    write_descriptions,
    write_file,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ArtifactError, RoutingError
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.fit import fit
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store import manifest as artifact
from mergekit_mediator.store.expert_file import ExpertFile

EXPERT = "mediator/experts/math.safetensors"
WEIGHT = "model.layers.1.mlp.up_proj.weight"  # [24, 16]
MEASURED = "model.layers.1.mlp.down_proj.weight"  # [16, 24]
LARGE = 1 << 30


@pytest.fixture(scope="module")
def original(make, tmp_path_factory):
    """An artifact with both routers, whose experts keep a tenth of the coordinates."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp("hostile")
    config = make().config(route="all", density=0.1, values="int8")
    run(MergeConfiguration.model_validate(config), str(root / "out"), MergeOptions(quiet=True))
    files = {}
    for number, name in enumerate(("math", "code", "chat")):
        words = [f"w{3 * number} w{3 * number + i % 3} w{i}" for i in range(6)]
        files[name] = root / f"{name}.jsonl"
        files[name].write_text("\n".join(json.dumps({"prompt": text}) for text in words))
    model = MediatorModel.from_pretrained(root / "out")
    calibrate_artifact(root / "out", model.model, model.tokenizer, files)
    return root / "out"


@pytest.fixture
def out(original, tmp_path):
    """A copy of the artifact, free to be made hostile."""
    return shutil.copytree(original, tmp_path / "out")


def use(out):
    """Everything that reads the files of an artifact: each expert, each router."""
    model = MediatorModel.from_pretrained(out)
    for expert in model.experts:
        with model.mixture(expert):
            pass
    for router in ("calibrated", "response"):
        model.route(["w1 w2"], router=router)


def refused(out, name, function=use):
    """What a hostile artifact is refused with, on one line that names the file, in little memory."""
    sign(out, name)
    message, grown = refusal(function, out)
    assert message.startswith(f"{out / name}: "), message
    assert "\n" not in message
    assert len(message) < 2000
    assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB"
    return message.removeprefix(f"{out / name}: ")


def test_an_honest_artifact_is_read_in_little_memory(original):
    message, grown = refusal(use, original)
    assert message == "not refused"
    assert grown < 64 * MIB


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_gaps_are_bounded_by_the_shape(out, byte):
    gaps, codes = bomb(LARGE, byte), b"\0"
    sizes = [len(gaps), len(codes)]
    change_expert(out / EXPERT, WEIGHT, gaps + codes, gaps=LARGE, count=1, sizes=sizes)
    assert (out / EXPERT).stat().st_size < 300_000
    message = refused(out, EXPERT)
    assert message.startswith(f"'{WEIGHT}': gaps of 1 to 1 bytes required for 1 coordinates of")
    assert message.endswith(f"shape [24, 16], got {LARGE}")


def test_a_shape_is_that_of_the_dense_checkpoint(out):
    codes = bomb(LARGE)
    changes = {"shape": [1 << 15, 1 << 15], "count": LARGE, "implied": True, "gaps": 0}
    change_expert(out / EXPERT, WEIGHT, codes, sizes=[len(codes)], **changes)
    message = refused(out, EXPERT)
    assert message == (
        f"'{WEIGHT}': shape [24, 16] required, as in the dense checkpoint, got [32768, 32768]"
    )


def test_a_count_is_bounded_by_the_shape(out):
    gaps, codes = bomb(LARGE, end=b"\0"), bomb(LARGE)
    sizes = [len(gaps), len(codes)]
    change_expert(out / EXPERT, WEIGHT, gaps + codes, gaps=LARGE, count=LARGE, sizes=sizes)
    assert f"'{WEIGHT}': {LARGE} coordinates do not fit shape [24, 16]" in refused(out, EXPERT)


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_a_rank_is_bounded_by_the_shape(out, dtype):
    rank = (1 << 27) // 40
    planes = [bomb(rank * 40)] * (8 if dtype == "float64" else 1) + [bomb(4 * rank)]
    factors = {"rank": rank, "dtype": dtype, "sizes": [len(plane) for plane in planes]}
    changes = {"values": "steps", "count": 0, "gaps": 0, "sizes": [0, 0], "factors": factors}
    change_expert(out / EXPERT, WEIGHT, b"".join(planes), **changes)
    assert refused(out, EXPERT) == f"'{WEIGHT}': rank {rank} does not fit shape [24, 16]"


def test_the_paired_part_of_factors_is_bounded_by_the_rank(out):
    planes = [b"", bomb(LARGE), bytes(4)]
    factors = {"rank": 1, "dtype": "int8", "paired": LARGE // 20, "sizes": [*map(len, planes)]}
    changes = {"values": "steps", "count": 0, "gaps": 0, "sizes": [0, 0], "factors": factors}
    change_expert(out / EXPERT, WEIGHT, b"".join(planes), **changes)
    assert "cannot be paired" in refused(out, EXPERT)


def test_a_stream_that_is_larger_than_it_is_described_is_refused(out):
    codes = bomb(LARGE)
    sizes = [1, 1, len(codes)]
    change_expert(out / EXPERT, WEIGHT, b"\0\0" + codes, gaps=1, count=1, sizes=sizes)
    assert "a stream of 1 bytes required" in refused(out, EXPERT)


def test_descriptions_are_bounded_by_the_number_of_weights(out):
    metadata, entries = read_file(out / EXPERT)
    write_descriptions(out / EXPERT, metadata, entries, LARGE, bomb(LARGE, b"["))
    message = refused(out, EXPERT)
    assert f"__descriptions__: {-(-LARGE // 4096)} bytes cannot hold {LARGE}: " in message
    assert "weights are described in at most" in message


@pytest.mark.parametrize("text", [b"[" * 20_000, b'{"a":' * 6_000, b"1" * 9_000])
def test_descriptions_that_no_parser_takes_are_refused(out, text):
    metadata, entries = read_file(out / EXPERT)
    write_descriptions(out / EXPERT, metadata, entries, text)
    assert "__descriptions__: " in refused(out, EXPERT)


@pytest.mark.parametrize("size", ["-1", "", "1e3", "9" * 5000])
def test_descriptions_of_no_size_are_refused(out, size):
    metadata, entries = read_file(out / EXPERT)
    write_file(out / EXPERT, {**metadata, "descriptions_bytes": size}, entries)
    assert "__descriptions__: " in refused(out, EXPERT)


def test_descriptions_are_not_larger_than_what_is_allowed(tmp_path):
    """The largest that a writer may write: every number has all its digits."""
    from mergekit_mediator.store.description import Description, FactorsDescription

    many = (2**62,) * 10
    factors = FactorsDescription(rank=2**62, dtype="bfloat16", paired=2**62, sizes=many)
    numbers = {"scale": -1e-300 / 3, "shift": -1e-300 / 3, "share": -1e-300 / 3}
    flags = {"values": "exact", "relative": True, "implied": True, "check": 2**32}
    d = Description.model_construct(
        shape=many[:5], dtype="bfloat16", count=2**62, gaps=2**62, sizes=many, factors=factors,
        **numbers, **flags,
    )  # fmt: skip
    assert len(json.dumps(d.model_dump())) < 1024


def test_an_entry_that_is_no_stream_of_bytes_is_refused(out):
    metadata, entries = read_file(out / EXPERT)
    _, _, data = entries[WEIGHT]
    entries[WEIGHT] = ("F64", [1, 1], data[:8].ljust(8))
    write_file(out / EXPERT, metadata, entries)
    assert refused(out, EXPERT) == f"'{WEIGHT}': a stream of bytes required, got F64 [1, 1]"


def test_a_weight_that_the_dense_checkpoint_lacks_is_refused(out):
    descriptions = descriptions_of(out / EXPERT)
    metadata, entries = read_file(out / EXPERT)
    descriptions["more"], entries["more"] = descriptions[WEIGHT], entries[WEIGHT]
    write_descriptions(out / EXPERT, metadata, entries, json.dumps(descriptions).encode())
    assert refused(out, EXPERT) == "'more': the dense checkpoint has no such weight"


def change_router(path, about=None, **tensors):
    """Change fields of a router's JSON object, or all of its text, and its tensors."""
    metadata, entries = read_file(path)
    if isinstance(about, str):
        metadata["mediator_router"] = about
    elif about:
        metadata["mediator_router"] = json.dumps(json.loads(metadata["mediator_router"]) | about)
    for name, tensor in tensors.items():
        array = tensor.numpy()
        dtype = {"int64": "I64", "float32": "F32"}[str(array.dtype)]
        entries[name] = (dtype, list(array.shape), array.tobytes())
    write_file(path, metadata, entries)


def change_directions(path, shape, data, scale):
    metadata, entries = read_file(path)
    about = json.loads(metadata["mediator_router"])
    about["shapes"][MEASURED] = list(shape)
    entries[MEASURED] = stream(data)
    entries[f"{MEASURED}.scale"] = ("F32", list(scale.shape), scale.tobytes())
    write_file(path, {"mediator_router": json.dumps(about)}, entries)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4, LARGE // 12), "directions of a weight [out, {}], but the dense checkpoint has"),
        ((3, LARGE // 72, 24), "at most 64 directions of an expert required, got {}"),
    ],
)
def test_the_response_router_is_bounded_by_the_weights_that_it_measures(out, shape, message):
    size = int(np.prod(shape))
    scale = np.zeros((*shape[:2], 1), dtype=np.float32)
    change_directions(out / artifact.RESPONSE, shape, bomb(size), scale)
    found = refused(out, artifact.RESPONSE)
    number = shape[2] if shape[1] == 4 else shape[1]
    assert found.startswith(f"{MEASURED}: {message.format(number)}")


def test_the_response_router_measures_weights_of_the_dense_checkpoint_only(out):
    metadata, entries = read_file(out / artifact.RESPONSE)
    about = json.loads(metadata["mediator_router"])
    data, scale = stream(bomb(LARGE)), ("F32", [3, 4, 1], bytes(48))
    about["shapes"]["no\nweight"] = [3, 4, LARGE // 12]
    entries["no\nweight"], entries["no\nweight.scale"] = data, scale
    write_file(out / artifact.RESPONSE, {"mediator_router": json.dumps(about)}, entries)
    message = refused(out, artifact.RESPONSE)
    assert message.startswith("no weight: directions of a weight [out, ")
    assert message.endswith("but the dense checkpoint has none")


def test_the_response_router_is_of_the_artifacts_experts(out):
    names = ["x"] * 1000
    about = {"experts": names, "shapes": {MEASURED: [1000, 64, 24]}}
    change_router(out / artifact.RESPONSE, about)
    assert refused(out, artifact.RESPONSE).startswith("routes to x, x, ")


@pytest.mark.parametrize("name", [artifact.RESPONSE, artifact.ROUTER])
@pytest.mark.parametrize(
    "text", ["[" * 20_000, "1" * 9_000, json.dumps({"kind": [[]] * 90_000}), "{}", "null", "\ud800"]
)
def test_a_router_whose_header_is_a_bomb_is_refused(out, name, text):
    if text == "\ud800":
        text = '{"kind": "\\ud800\\n"}'
    change_router(out / name, text)
    sign(out, name)
    message, grown = refusal(use, out)
    assert str(out / name) in message
    assert "\n" not in message
    assert len(message) < 2000
    assert grown < 64 * MIB


@pytest.mark.parametrize(
    ("about", "tensors", "message"),
    [
        ({}, {"tokens": torch.zeros(30_000, dtype=torch.int64)}, "tokens: at most 256 rows required"),
        ({}, {"tokens": torch.tensor([64])}, "tokens must be from 0 to 63"),
        ({}, {"tokens": torch.tensor([-1])}, "tokens must be from 0 to 63"),
        ({}, {"spread": torch.zeros(33, 32)}, "spread: at most 32 rows required, got 33"),
        ({}, {"background": torch.zeros(20_000, 32)}, "background: at most 16384 rows required"),
        ({}, {"features.code": torch.zeros(20_000, 32)}, "features: at most 16384 rows required"),
        ({"layers": [1, 4]}, {}, "'layers' must be from 1 to 3"),
        ({"layers": [0, 2]}, {}, "'layers' must be from 1 to 3"),
        ({"seed": 2**200}, {}, "'seed' must be a whole number"),
        ({"numbers": {"temperature": 10**400}}, {}, "'temperature' must be a finite number"),
        ({"experts": ["math", "code"] * 40_000}, {}, "'mediator_router' of at most"),
    ],
)  # fmt: skip
def test_the_calibrated_router_is_bounded_by_the_model(out, about, tensors, message):
    change_router(out / artifact.ROUTER, about, **tensors)
    assert refused(out, artifact.ROUTER).startswith(message)


def test_the_calibrated_router_is_of_the_width_of_the_models_hidden_states(out):
    metadata, entries = read_file(out / artifact.ROUTER)
    for name, (dtype, shape, data) in entries.items():
        if shape and shape[-1] == 32:
            entries[name] = (dtype, [*shape[:-1], 16], data[: len(data) // 2])
    write_file(out / artifact.ROUTER, metadata, entries)
    message = refused(out, artifact.ROUTER)
    assert message.startswith("weight: hidden features of width 32 required, got 16")


def test_calibrating_again_reads_no_hostile_router(out, tmp_path):
    change_router(out / artifact.ROUTER, tokens=torch.zeros(30_000, dtype=torch.int64))
    (tmp_path / "math.jsonl").write_text('{"prompt": "w1"}\n' * 6)

    def calibrate(out):
        model = MediatorModel.from_pretrained(out)
        files = {"math": tmp_path / "math.jsonl"}
        calibrate_artifact(out, model.model, model.tokenizer, files)

    assert refused(out, artifact.ROUTER, calibrate).startswith("tokens: at most 256 rows required")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_a_damaged_router_gives_only_artifact_errors(original, tmp_path, data):
    load, name = data.draw(
        st.sampled_from(
            [(ResponseRouter.load, artifact.RESPONSE), (CalibratedRouter.load, artifact.ROUTER)]
        )
    )
    content = bytearray((original / name).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        places = st.integers(8, header - 1) | st.integers(0, len(content) - 1)
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "damaged").write_bytes(content)
    message = problem(lambda: load(tmp_path / "damaged"))
    assert message is None or (str(tmp_path / "damaged") in message and "\n" not in message)


def problem(read):
    """The message of the ArtifactError that `read` raises, if it does."""
    try:
        read()
    except ArtifactError as error:
        return str(error)
    return None


def test_a_router_is_not_fitted_to_more_prompts_than_it_may_hold():
    with pytest.raises(RoutingError, match="at most 16384 prompts, got 16390"):
        fit({"a": torch.zeros(16_384, 2), "b": torch.zeros(6, 2)}, "embedding")


def test_expert_and_router_files_bound_their_memory_without_an_artifact(out):
    """Not by a base's shapes, which are not known, but by their own numbers."""
    gaps = bomb(LARGE)
    change_expert(out / EXPERT, WEIGHT, gaps + b"\0", gaps=LARGE, count=1, sizes=[len(gaps), 1])
    with pytest.raises(ArtifactError, match="gaps of 1 to 1 bytes required"):
        ExpertFile(out / EXPERT)
    change_router(out / artifact.ROUTER, tokens=torch.zeros(30_000, dtype=torch.int64))
    with pytest.raises(ArtifactError, match="tokens: at most 256"):
        CalibratedRouter.load(out / artifact.ROUTER)
    shape = (3, LARGE // 72, 24)
    scale = np.zeros((*shape[:2], 1), dtype=np.float32)
    change_directions(out / artifact.RESPONSE, shape, bomb(int(np.prod(shape))), scale)
    with pytest.raises(ArtifactError, match="at most 64 directions"):
        ResponseRouter.load(out / artifact.RESPONSE)
