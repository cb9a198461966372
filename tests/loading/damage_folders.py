"""A wrong index, shards in disorder, and a wrong config.json. See `damage.py`."""

import json
from random import Random
from typing import Any

from tests.loading.damage import Damage, Files, index_of, weights


def index_entry(files: Files, random: Random) -> str | None:
    """A tensor that is said to be where it is not: outside of the folder, in another shard, nowhere, no file at all."""
    index = index_of(files)
    if index is None:
        return None
    values = json.loads(files[index])
    name = random.choice(sorted(values["weight_map"]))
    here = values["weight_map"][name]
    wrong: list[Any] = [
        "../" + here, "/etc/passwd", "/etc/x.safetensors", "a/../" + here, "./" + here, "", ".", "..", "x.bin",
        "config.json", "gone.safetensors", "x" * 400 + ".safetensors", "a\0.safetensors", None, 1, [here], {here: 1},
    ]  # fmt: skip
    wrong += [other for other in weights(files) if other != here] * 4
    values["weight_map"][name] = random.choice(wrong)
    files[index] = json.dumps(values).encode()
    return "refused"


def index_names(files: Files, random: Random) -> str | None:
    """A tensor too many in the index, or one that it does not have."""
    index = index_of(files)
    if index is None:
        return None
    values = json.loads(files[index])
    if random.random() < 0.5:
        values["weight_map"]["more.weight"] = random.choice(weights(files))
        files[index] = json.dumps(values).encode()
        return "refused"
    del values["weight_map"][random.choice(sorted(values["weight_map"]))]
    files[index] = json.dumps(values).encode()
    return "agrees"


def index_itself(files: Files, random: Random) -> str | None:
    index = index_of(files)
    if index is None:
        return None
    content = files[index]
    wrong = [b"", b"{}", b"[]", b"null", content[: len(content) // 2], b"[" * 90_000, b"\xff"]
    files[index] = random.choice([*wrong, b'{"weight_map": {}}', b'{"weight_map": 1}'])
    return "refused"


def missing_shard(files: Files, random: Random) -> str:
    del files[random.choice(weights(files))]
    return "refused"


def shards_exchanged(files: Files, random: Random) -> str | None:
    names = weights(files)
    if len(names) < 2:
        return None
    one, other = random.sample(names, 2)
    files[one], files[other] = files[other], files[one]
    return "refused"


def shard_twice(files: Files, random: Random) -> str | None:
    names = weights(files)
    if len(names) < 2:
        return None
    one, other = random.sample(names, 2)
    files[one] = files[other]
    return "refused"


# config.json


def config_bytes(files: Files, random: Random) -> str:
    content = files["config.json"]
    cut = content[: random.randrange(1, len(content) - 1)]
    wrong = [b"", b"[]", b"null", b'"x"', cut, b"{" * 90_000, b"\xff\xfe" + content, content + content]
    files["config.json"] = random.choice(wrong)
    return "refused"


def quantization_config(files: Files, random: Random) -> str | None:
    """A field of the embedded config with another value, without it, or another config altogether."""
    config = json.loads(files["config.json"])
    embedded = config.get("quantization_config")
    if embedded is None:
        config["quantization_config"] = random.choice([[], "x", 1, {}, {"quant_method": "awq"}, {"quant_method": None}])
        files["config.json"] = json.dumps(config).encode()
        return "refused"
    kind, key = random.randrange(6), random.choice(sorted(embedded))
    if kind == 0:
        config["quantization_config"] = random.choice(
            [[], "x", 1, {}, {"quant_method": "awq"}, {"quant_method": 3}, None]
        )
    elif kind == 1:
        embedded["quant_method"] = random.choice(
            ["bitsandbytes", "torchao", "quanto", "qexp_packed", "none", "gptq", None, [], "../x"]
        )
    elif kind == 2:
        del embedded[key]
    elif kind == 3:
        embedded[key] = random.choice(
            [None, [], {}, "x", -1, 2**70, 1.5, True, False, ["x"], {"_type": "x"}, [[]], "bfloat16"]
        )
    elif kind == 4:
        types = [
            key
            for key in embedded
            if key in ("quant_type", "weights_dtype", "bnb_4bit_quant_type", "load_in_4bit", "load_in_8bit")
        ]
        if not types:
            return None
        embedded[types[-1]] = random.choice(
            ["int8", "int4", "int2", "float8", "fp4", "nf4", "uint3wo", "uint4wo", "fp6_e3w2", "uint8wo", True, False]
        )
    else:
        embedded["group_size"] = random.choice([0, -1, 3, 32, 64, 128, 2**40, None, "64"])
    files["config.json"] = json.dumps(config).encode()
    return "agrees"


KINDS: list[Damage] = [
    *[index_entry] * 2, index_names, index_itself, missing_shard, shards_exchanged, shard_twice, config_bytes,
    *[quantization_config] * 3,
]  # fmt: skip
