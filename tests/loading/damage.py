"""Damaged copies of a saved checkpoint, made by a seeded generator: what storage, transport and malice do to one.

A folder is a dict of its files' bytes. A kind of damage changes a copy of it in place and says what a load may do:

    "refused"   it must raise
    "agrees"    it must raise, or load what the file says: no quantized weight described otherwise than before
    None        this checkpoint has nothing of the kind to damage

Bytes of tensors are damaged only where they mean something to a loader (a description in JSON): nothing can tell a
flipped bit of a weight from a weight.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from qexp.checkpoints.tensor_entry import DTYPE_BYTES

Files = dict[str, bytes]
Damage = Callable[[Files, Random], str | None]
FREE = ("weight_format", "steps", "put_scale")  # what says nothing here, or is of whole numbers of any width
FLOATS = ["F64", "F32", "F16", "BF16"]
CHARACTERS = b'0123456789-.eE,:[]{}"\\ntfu\x00\xff'


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, the tensors' bytes) of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: object, body: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def weights(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def tensors(header: dict[str, Any]) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def is_inner(name: str, files: Files) -> bool:
    """Whether a tensor is part of a quantized weight: of a layer that has several tensors where a dense one has two."""
    return any(key.startswith(f"{layer_of(name)}.") and is_state(key) for key in all_tensors(files)) and (
        ".weight" in name or "._weight" in name or is_state(name)
    )


def is_state(name: str) -> bool:
    return not name.endswith((".weight", ".bias")) and "norm" not in name and name.count(".") > 0


def layer_of(name: str) -> str:
    return name.split(".weight")[0].split("._weight")[0].rsplit(".SCB")[0].removesuffix(".bias")


def all_tensors(files: Files) -> dict[str, tuple[str, dict[str, Any]]]:
    """Tensor -> (file, its entry)."""
    return {name: (file, entry) for file in weights(files) for name, entry in split(files[file])[0].items()
            if name != "__metadata__"}  # fmt: skip


def edit(files: Files, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    header, body = split(files[file])
    change(header)
    files[file] = join(header, body)


def rewrite(files: Files, file: str, parts: dict[str, tuple[dict[str, Any], bytes]]) -> None:
    """A file with other tensors: name -> (entry, bytes)."""
    header, _ = split(files[file])
    new, body = {name: value for name, value in header.items() if name == "__metadata__"}, b""
    for name, (entry, data) in parts.items():
        new[name] = {**entry, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    files[file] = join(new, body)


def parts_of(files: Files, file: str) -> dict[str, tuple[dict[str, Any], bytes]]:
    header, body = split(files[file])
    return {name: (header[name], body[slice(*header[name]["data_offsets"])]) for name in tensors(header)}


def pick(files: Files, random: Random, inner: bool | None = None) -> tuple[str, str] | None:
    """(file, tensor): any, one that is part of a quantized weight, or one that is not."""
    found = [(file, name) for name, (file, _) in all_tensors(files).items()]
    found = [one for one in found if inner is None or is_inner(one[1], files) == inner]
    return random.choice(found) if found else None


def index_of(files: Files) -> str | None:
    return next((name for name in files if name.endswith(".index.json")), None)


def reindex(files: Files) -> None:
    """Write the index anew, where there is one, as the files are now."""
    if (index := index_of(files)) is not None:
        weight_map = {name: file for name, (file, _) in all_tensors(files).items()}
        files[index] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


# Bytes


def truncate(files: Files, random: Random) -> str:
    file = random.choice(weights(files))
    files[file] = files[file][: random.randrange(len(files[file]))]
    return "refused"


def extend(files: Files, random: Random) -> str:
    file = random.choice(weights(files))
    files[file] += bytes(random.randrange(1, 100))
    return "refused"


def header_length(files: Files, random: Random) -> str:
    file = random.choice(weights(files))
    length = int.from_bytes(files[file][:8], "little")
    wrong = random.choice([0, 1, length - 1, length + 1, 2 * length, 10**8, 10**8 + 1, 2**62, 2**63, 2**64 - 1])
    files[file] = wrong.to_bytes(8, "little") + files[file][8:]
    return "refused"


def header_bytes(files: Files, random: Random) -> str:
    """Flipped, replaced, removed and doubled bytes, most often one."""
    file = random.choice(weights(files))
    content, end = bytearray(files[file]), 8 + int.from_bytes(files[file][:8], "little")
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place, kind = random.randrange(8, end), random.randrange(4)
        if kind == 0:
            content[place : place + 1] = bytes([random.choice(CHARACTERS)])
        elif kind == 1:
            content[place] ^= 1 << random.randrange(8)
        elif kind == 2:
            del content[place : place + random.randrange(1, 9)]
        else:
            content[place:place] = content[place : place + random.randrange(1, 9)]
    files[file] = bytes(content)
    return "agrees"


# Entries of a header


def entry_field(files: Files, random: Random) -> str:
    """A field of one entry with a value that is none."""
    file, name = pick(files, random) or ("", "")
    wrong: list[Any] = [None, True, -1, 1.5, "", "x", [], {}, [None], [-1, 2], [1.0], [True], ["1"], [[1]], 2**70]
    wrong += [[2**61] * 9, [1] * 70, [2**64, 2**64 + 8], [0, 2**40], "F7", "f32", "B" * 10_000]
    field = random.choice(["dtype", "shape", "data_offsets", "strides"])
    value = random.choice(wrong)
    entry = split(files[file])[0][name]
    if entry.get(field) == value or (field == "shape" and value == [] and entry["shape"] in ([], [1])):
        return "agrees"
    edit(files, file, lambda header: header[name].__setitem__(field, value))
    return "refused"


def offsets(files: Files, random: Random) -> str:
    """Overlapping, out of range, backwards, with a gap."""
    file, name = pick(files, random) or ("", "")
    start, end = split(files[file])[0][name]["data_offsets"]
    by = random.choice([1, 2, 8, 64, end - start or 1, 2**33, 2**62, 2**64])
    wrong = random.choice(
        [[start + by, end + by], [start - by, end - by], [start, end + by], [start + by, end], [end + 1, start]]
    )
    edit(files, file, lambda header: header[name].__setitem__("data_offsets", wrong))
    return "refused"


def drop_entry(files: Files, random: Random) -> str:
    """A tensor that the header no longer has, its bytes still there."""
    file, name = pick(files, random) or ("", "")
    edit(files, file, lambda header: header.pop(name))
    return "agrees" if name.endswith(FREE) else "refused"


def same_name_twice(files: Files, random: Random) -> str | None:
    found = [file for file in weights(files) if len(tensors(split(files[file])[0])) > 1]
    if not found:
        return None
    file = random.choice(found)
    one, other = random.sample(tensors(split(files[file])[0]), 2)
    old, new = f'"{one}":'.encode(), f'"{other}":'.encode()
    place = files[file].rindex(old)  # the entry, not its description in the metadata
    length = int.from_bytes(files[file][:8], "little") + len(new) - len(old)
    files[file] = length.to_bytes(8, "little") + files[file][8:place] + new + files[file][place + len(old) :]
    return "refused"


def huge_shape(files: Files, random: Random) -> str:
    """As much as the offsets say, or nothing at all in very many rows."""
    file, name = pick(files, random) or ("", "")
    dtype = split(files[file])[0][name]["dtype"]
    rows = random.choice([2**31, 2**40, 2**61])
    size = rows * DTYPE_BYTES[dtype]
    shape, end = random.choice([([rows], size), ([0, rows], 0), ([rows, 0, rows], 0)])
    edit(files, file, lambda header: header[name].update(shape=shape, data_offsets=[0, end]))
    return "refused"


KINDS: list[Damage] = [
    truncate, extend, header_length, *[header_bytes] * 3, *[entry_field] * 2, offsets, drop_entry, same_name_twice,
    huge_shape,
]  # fmt: skip
