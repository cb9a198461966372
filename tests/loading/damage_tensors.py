"""Tensors that are wrong in files which are in order: other names, shapes, dtypes, descriptions. See `damage.py`."""

import json
from random import Random
from typing import Any

from qexp.checkpoints.tensor_entry import DTYPE_BYTES
from tests.loading.damage import (
    FLOATS,
    FREE,
    Damage,
    Files,
    all_tensors,
    edit,
    is_inner,
    layer_of,
    parts_of,
    pick,
    reindex,
    rewrite,
    split,
    weights,
)

SHAPES = {"first.weight": (64, 256), "second.weight": (32, 64)}  # of the model that the tests save


def rename(files: Files, random: Random) -> str:
    """A tensor under another name, in the index as well."""
    file, name = pick(files, random) or ("", "")
    new = random.choice([name + "x", "x" + name, name.replace(".", "_"), name.upper(), "", name[:-1], name + "\n"])
    parts = parts_of(files, file)
    rewrite(files, file, {new if key == name else key: part for key, part in parts.items()})
    reindex(files)
    return "agrees" if name.endswith(FREE) or new in all_but(files, file) else "refused"


def all_but(files: Files, file: str) -> set[str]:
    return {name for name, (place, _) in all_tensors(files).items() if place != file}


def remove(files: Files, random: Random) -> str:
    """A tensor that is gone, as if it had never been written."""
    file, name = pick(files, random) or ("", "")
    rewrite(files, file, {key: part for key, part in parts_of(files, file).items() if key != name})
    reindex(files)
    return "agrees" if name.endswith(FREE) else "refused"


def reshape(files: Files, random: Random) -> str | None:
    """The same bytes in another shape."""
    file, name = pick(files, random) or ("", "")
    entry, data = parts_of(files, file)[name]
    shape, count = entry["shape"], len(data) // DTYPE_BYTES[entry["dtype"]]
    others = [shape[::-1], [count], [1, count], [count, 1], [*shape, 1], [1, *shape]]
    others.append([2, count // 2] if count % 2 == 0 else shape)
    others = [other for other in others if other != shape]
    allowed = _replace(files, file, name, {**entry, "shape": random.choice(others)}, data)
    return "agrees" if "quant_state" in name else allowed  # it is a text


def cut_tensor(files: Files, random: Random) -> str | None:
    """Half of a tensor, or twice, in a file that is whole."""
    file, name = pick(files, random) or ("", "")
    entry, data = parts_of(files, file)[name]
    if not entry["shape"]:
        return _replace(files, file, name, {**entry, "shape": [2]}, data * 2)
    first, *rest = entry["shape"]
    rows = random.choice([n for n in (0, 1, first // 2, first - 1, first + 1, 2 * first) if n != first])
    row = len(data) // max(first, 1)
    return _replace(files, file, name, {**entry, "shape": [rows, *rest]}, (data * 2 + bytes(row))[: rows * row])


def other_dtype(files: Files, random: Random) -> str | None:
    """The same number of values of another type, of whole numbers where it was of floating-point numbers."""
    file, name = pick(files, random, random.random() < 0.8 or None) or pick(files, random) or ("", "")
    entry, data = parts_of(files, file)[name]
    floats = [one for one in DTYPE_BYTES if "F" in one]
    same = (
        floats if entry["dtype"] in floats and not is_inner(name, files) else FLOATS if entry["dtype"] in FLOATS else []
    )
    names = [one for one in DTYPE_BYTES if one not in (entry["dtype"], *same)]
    dtype, count = random.choice(names), len(data) // DTYPE_BYTES[entry["dtype"]]
    return _replace(files, file, name, {**entry, "dtype": dtype}, (data * 8)[: count * DTYPE_BYTES[dtype]])


def same_bytes_other_dtype(files: Files, random: Random) -> str | None:
    """An inner tensor's bytes read as another type of the same width."""
    found = pick(files, random, True)
    if found is None:
        return None
    entry, data = parts_of(files, found[0])[found[1]]
    width = DTYPE_BYTES[entry["dtype"]]
    names = [name for name, nbytes in DTYPE_BYTES.items() if nbytes == width and name != entry["dtype"]]
    return _replace(files, *found, {**entry, "dtype": random.choice(names)}, data)


def swap(files: Files, random: Random) -> str | None:
    """Two tensors of one layer under each other's names."""
    found = pick(files, random, True)
    if found is None:
        return None
    file, name = found
    parts = parts_of(files, file)
    near = [key for key in parts if key != name and layer_of(key) == layer_of(name) and not key.endswith(FREE)]
    near = [key for key in near if any(parts[key][0][field] != parts[name][0][field] for field in ("dtype", "shape"))]
    if not near or name.endswith(FREE):
        return None
    other = random.choice(near)
    parts[name], parts[other] = parts[other], parts[name]
    rewrite(files, file, parts)
    return "refused"


def dense_again(files: Files, random: Random) -> str | None:
    """A dense weight where the quantized one was."""
    layers = sorted({layer_of(name) for name in all_tensors(files) if is_inner(name, files)})
    if not layers:
        return None
    name = f"{random.choice(layers)}.weight"
    file = next((place for key, (place, _) in all_tensors(files).items() if key.startswith(name[:-7])), "")
    shape = SHAPES[name]
    parts = parts_of(files, file)
    parts[name] = ({"dtype": "F32", "shape": list(shape)}, bytes(4 * shape[0] * shape[1]))
    rewrite(files, file, parts)
    reindex(files)
    return "agrees" if set(parts) > {name} else "refused"


def state_json(files: Files, random: Random) -> str | None:
    """A description that is stored as a tensor of JSON text."""
    found = [(file, name) for name, (file, _) in all_tensors(files).items() if "quant_state" in name]
    if not found:
        return None
    file, name = random.choice(found)
    entry, data = parts_of(files, file)[name]
    described = json.loads(data)
    change = random.randrange(4)
    if change == 0:
        new = data[: random.randrange(len(data))]
    elif change == 1:
        place = random.randrange(len(data))
        new = data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
    elif change == 2:
        key = random.choice(sorted(described))
        new = json.dumps({field: value for field, value in described.items() if field != key}).encode()
    else:
        key = random.choice(sorted(described))
        wrong = random.choice(
            [None, -1, 0, 7, 2**40, "x", [], {}, [2**40, 2**40], [-1, 64], True, 1e400, "complex64", 63]
        )
        new = json.dumps({**described, key: wrong}).encode()
        if wrong == described[key]:
            return None
    _replace(files, file, name, {**entry, "shape": [len(new)]}, new)
    return "agrees"


def metadata(files: Files, random: Random) -> str | None:
    """The description of a weight that is stored in the header."""
    file = random.choice(weights(files))
    stored = split(files[file])[0].get("__metadata__", {})
    names = sorted(name for name in stored if name != "format")
    if not names:
        return None
    name, kind = random.choice(names), random.randrange(5)
    text = stored[name]
    if kind == 0:
        place = random.randrange(len(text))
        new: Any = text[:place] + chr(random.randrange(32, 127)) + text[place + 1 :]
    elif kind == 1:
        new = text[: random.randrange(len(text))]
    elif kind == 2:
        new = random.choice(["", "{}", "[]", "null", "1", '"x"', '{"_type": "Tensor"}', '{"_data": {}}', "[" * 9000])
    elif kind == 3:
        new = random.choice([None, 1, [], {}])
    else:
        described = json.loads(text)
        if not isinstance(described, dict):
            return None
        key = random.choice(sorted(described))
        described[key] = random.choice([None, 1, "x", [], {}, ["qdata"], {"_type": "x"}, "Int4Tensor", "os.system"])
        new = json.dumps(described)
    edit(files, file, lambda header: header["__metadata__"].__setitem__(name, new))
    return "agrees"


def _replace(files: Files, file: str, name: str, entry: dict[str, Any], data: bytes) -> str:
    parts = parts_of(files, file)
    parts[name] = (entry, data)
    rewrite(files, file, parts)
    return "agrees" if name.endswith(FREE) else "refused"


KINDS: list[Damage] = [
    rename, remove, reshape, cut_tensor, *[other_dtype] * 2, same_bytes_other_dtype, swap, dense_again,
    *[state_json] * 2, *[metadata] * 2,
]  # fmt: skip
