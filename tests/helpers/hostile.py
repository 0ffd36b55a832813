"""Files made hostile by hand, with digests that are right, and what opening them takes in memory."""

import json
import multiprocessing
import resource
import struct

from safetensors import safe_open

from mergekit_mediator.errors import MediatorError
from mergekit_mediator.store import manifest as artifact
from mergekit_mediator.store.digests import digest
from mergekit_mediator.store.manifest import MANIFEST
from mergekit_mediator.store.verification import verify_files

MIB = 1 << 20
_BLOCK = 1 << 17  # the most that one zstandard block holds


def frame(size, byte=b"\0", end=b""):
    """A zstandard frame of one byte over and over, in 4 bytes for each 128 KiB; `end` are its last bytes."""
    count = size - len(end)
    lengths = [min(_BLOCK, count - start) for start in range(0, count, _BLOCK)]
    blocks = [((n << 3) | 2).to_bytes(3, "little") + byte for n in lengths]
    blocks.append(((len(end) << 3) | 1).to_bytes(3, "little") + end)
    # one segment, whose size takes 8 bytes
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + b"".join(blocks)


def bomb(size, byte=b"\0", end=b""):
    """The smallest stream that a reader of format version 2 decodes to so many bytes."""
    stored = frame(size, byte, end)
    return stored + bytes(max(0, -(-size // 4096) - len(stored)))


def read_file(path):
    """The metadata of a safetensors file, and by name dtype, shape and bytes of its entries."""
    content = path.read_bytes()
    (room,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + room])
    metadata = header.pop("__metadata__", {})
    entries = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        data = content[8 + room + start : 8 + room + end]
        entries[name] = (entry["dtype"], entry["shape"], data)
    return metadata, entries


def write_file(path, metadata, entries):
    """A safetensors file of anything at all."""
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    parts = [data for _, _, data in entries.values()]
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def descriptions_of(path):
    """What an expert file says about its weights."""
    from mergekit_mediator.store.expert_file import ExpertFile

    return {n: d.model_dump(mode="json") for n, d in ExpertFile(path).weights.items()}


def stream(data):
    return "U8", [len(data)], data


def change_expert(path, weight, data, **changes):
    """Replace the stream of one weight of an expert file, and fields of its description."""
    descriptions = descriptions_of(path)
    descriptions[weight].update(changes)
    metadata, entries = read_file(path)
    entries[weight] = stream(data)
    write_descriptions(path, metadata, entries, json.dumps(descriptions).encode())


def write_descriptions(path, metadata, entries, text, stored=None):
    """Write an expert file with a text of descriptions, stored as it is unless otherwise given."""
    entries["__descriptions__"] = stream(text if stored is None else stored)
    size = text if isinstance(text, int) else len(text)
    write_file(path, {**metadata, "descriptions_bytes": str(size)}, entries)


def sign(out, *names):
    """Make the manifest's digests of some files those of what they hold now."""
    manifest = json.loads((out / MANIFEST).read_text())
    for name in names:
        manifest["files"][name] = digest(out / name).model_dump()
    (out / MANIFEST).write_text(json.dumps(manifest))
    verify_files(out, artifact.read_manifest(out))


def shapes_of(path):
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def refusal(function, *arguments):
    """What a call is refused with, and by how many bytes it made a process of its own grow.

    The process cannot take more than 1 GiB besides what it has.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(sender, function, arguments))
    child.start()
    sender.close()
    message, grown = receiver.recv()
    child.join()
    return message, grown


def _report(sender, function, arguments):
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 1024 * MIB, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        function(*arguments)
        message = "not refused"
    except MediatorError as error:
        message = str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        message = f"{type(error).__name__}: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sender.send((message, 1024 * grown))
