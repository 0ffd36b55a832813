"""Coverage-guided fuzzing of the decoder: whatever is in a file, only an ArtifactError may come out of it.

    make fuzz FUZZ_SECONDS=60

Memory is bounded: the process ends with an error if it ever holds 128 MiB more than before the first input.
A description is read with and without the shape that the dense checkpoint has.
"""

import contextlib
import json
import resource
import sys

import atheris

with atheris.instrument_imports(include=["mergekit_mediator"]):
    import torch

    from mergekit_mediator.delta.approximate import approximate
    from mergekit_mediator.delta.sparse import encode
    from mergekit_mediator.delta.value_forms import VALUES
    from mergekit_mediator.errors import ArtifactError
    from mergekit_mediator.store.codec import decode_bytes, encode_bytes
    from mergekit_mediator.store.description import parse_description

LIMIT = 1 << 27
SHAPE = (24, 16)


def seeds():
    """One stored weight of each form: its stream, and its description as a file has it."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(SHAPE, generator=generator)
    expert = dense + torch.randn(SHAPE, generator=generator)
    stored = [encode(expert, dense, density, v) for v in VALUES for density in (0.1, 1.0)]
    stored.append(approximate(expert - dense, 0.1, torch.bfloat16))
    stored.append(approximate(expert - dense, 1e-4, torch.bfloat16))
    pairs = [encode_bytes(tensor) for tensor in stored]
    return [(stream.numpy().tobytes(), d.model_dump(mode="json")) for stream, d in pairs]


SEEDS = seeds()
BEFORE = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def changed(value, provider):
    """A value of a description, or another of about its kind."""
    if isinstance(value, dict):  # of factors
        return changed_fields(value, provider)
    kind = provider.ConsumeIntInRange(0, 4)
    if kind == 0:
        return provider.ConsumeInt(9)
    if kind == 1:
        return provider.ConsumeFloat()
    if kind == 2:
        return [provider.ConsumeInt(8) for _ in range(provider.ConsumeIntInRange(0, 4))]
    if kind == 3 and isinstance(value, list) and value:
        value = list(value)
        value[provider.ConsumeIntInRange(0, len(value) - 1)] += provider.ConsumeIntInRange(-9, 9)
    return value


def changed_fields(fields, provider):
    """An object of a description with one field changed."""
    name = sorted(fields)[provider.ConsumeIntInRange(0, len(fields) - 1)]
    return fields | {name: changed(fields[name], provider)}


def decode_one(data):
    provider = atheris.FuzzedDataProvider(data)
    stream, description = SEEDS[provider.ConsumeIntInRange(0, len(SEEDS) - 1)]
    fields = json.loads(json.dumps(description))
    for _ in range(provider.ConsumeIntInRange(0, 2)):
        fields = changed_fields(fields, provider)
    damaged = bytearray(stream)
    for _ in range(provider.ConsumeIntInRange(0, 4)):
        damaged[provider.ConsumeIntInRange(0, len(damaged) - 1)] = provider.ConsumeIntInRange(
            0, 255
        )
    # what is consumed after the end of the data is 0: nothing is cut then
    kept = max(0, len(damaged) - provider.ConsumeIntInRange(0, 40))
    damaged = damaged[:kept] + provider.ConsumeBytes(64)
    shape = SHAPE if provider.ConsumeBool() else None
    with contextlib.suppress(ArtifactError):
        decode_bytes(
            torch.frombuffer(damaged or bytearray(1), dtype=torch.uint8),
            parse_description(fields, "here", shape),
            "here",
        )
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - BEFORE > LIMIT:
        raise MemoryError(f"an input took more than {LIMIT:,} bytes")


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode_one)
    atheris.Fuzz()
