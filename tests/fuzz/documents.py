"""Mutations of bytes, of any JSON, and of the documents of an artifact: plan, manifest, kernels, template."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from kvcc.kernels.levels import KINDS
from tests.fuzz.material import NUMBERS, ODD, files, replace

TEMPLATES = [
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'x' * 999999999 }}",
    "{% for i in range(9) %}",
    "{% endfor %}",
    "{{ messages }}",
    "{{ x.__class__.__mro__ }}",
    "{% if ",
    "((((" * 200,
    "{% for m in messages %}" * 25,
    "9" * 5000,
    "{#",
    "{{ messages[0].content|tojson(indent=2) }}",
    "{% include 'x' %}",
    "{{ raise_exception('x') }}",
    "\x00",
]
SIZES = ["q_heads", "kv_heads", "k_dim", "v_dim", "sinks", "recent", "page", "window", "elements", "salient"]
WIDTHS = [0, 1, 2, 3, 4, 5, 6, 8, 16, 24, 32, -8, 1 << 40]


def some_bytes(path: Path, rng: Random) -> None:
    """Bytes of one file changed, added, repeated or taken out, near its beginning preferably."""
    file = rng.choice(files(path))
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 5])):
        at = rng.randrange(min(len(data), rng.choice([16, 400, 1 << 30])) + 1)
        piece = rng.choice(
            [rng.randbytes(rng.randrange(9)), b"\xff" * 8, bytes(8), b"[" * 60, b'"', b"9" * 30, b"\\"]
        )
        what = rng.randrange(5)
        if what == 0:
            data[at : at + len(piece)] = piece
        elif what == 1:
            data[at:at] = piece
        elif what == 2:
            del data[at : at + rng.randrange(1, 200)]
        elif what == 3:
            data[at:at] = data[at : at + rng.randrange(1, 400)]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    if rng.random() < 0.05:
        del data[rng.randrange(len(data) + 1) :]
    replace(file, bytes(data))


def any_json(path: Path, rng: Random) -> None:
    """Places of one JSON file spoiled, whatever they mean; the front that a report may show is one, too."""
    front = path.parent / "front.json"
    name = rng.choice([file for file in files(path) if file.suffix == ".json"] + [front] * front.is_file())
    data = json.loads(name.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 4])):
        _spoil(data, rng)
    replace(name, json.dumps(data).encode())


def _spoil(data: Any, rng: Random) -> None:
    """Put something odd at a random place, take something away, or put one part where another is."""
    while True:
        keys = list(data) if isinstance(data, dict) else range(len(data))
        key = rng.choice(keys)
        inner = data[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            data = inner
            continue
        what = rng.randrange(8)
        if what == 0:
            del data[key]
        elif what == 1 and isinstance(data, list):
            data.insert(key, copy.deepcopy(inner))
        elif what == 2 and isinstance(data, dict):
            data[rng.choice(["x", "__class__", "", "version", "a" * 5000])] = inner
        elif what == 3:
            data[key] = data[rng.choice(keys)]
        elif what == 4 and isinstance(inner, int):
            data[key] = inner + rng.choice([1, -1, inner, 8])
        elif what == 5:
            data[key] = rng.choice(NUMBERS)
        elif what == 6:
            data[key] = _deep(rng.choice([2, 31, 33, 900]))
        else:
            data[key] = copy.deepcopy(rng.choice(ODD))
        return


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def plan(path: Path, rng: Random) -> None:
    """Sizes, policies, classes of tokens and how sides are stored, in one layer or in all."""
    file = path / "plan.json"
    data = json.loads(file.read_bytes())
    for layer in rng.choice([data["layers"], [rng.choice(data["layers"])]]):
        rng.choice([_size, _policy, _classes, _side, _side])(layer, rng)
    if rng.random() < 0.2:
        data["window_dtype"] = rng.choice([None, "float16", "bfloat16", "float32", "float64"])
    replace(file, json.dumps(data).encode())


def _size(layer: dict[str, Any], rng: Random) -> None:
    key = rng.choice(SIZES)
    layer[key] = rng.choice([*NUMBERS, (layer[key] or 0) * 2, 8, 16, 24])


def _policy(layer: dict[str, Any], rng: Random) -> None:
    if rng.random() < 0.5:
        layer["select"] = rng.choice(["all", "static", "request", "basis"])
    else:
        layer["mean_correction"] = not layer["mean_correction"]


def _classes(layer: dict[str, Any], rng: Random) -> None:
    """Salient tokens where there are none, others where there are, or the two classes exchanged."""
    what = rng.randrange(4)
    if what == 0:
        layer["salient"], layer["salient_heads"] = 8, copy.deepcopy(layer["heads"])
        layer["page"] += 8
    elif what == 1:
        layer["heads"], layer["salient_heads"] = layer["salient_heads"], layer["heads"]
    elif what == 2:
        layer["salient"] = layer["page"] - layer["salient"]
    else:
        layer["salient"], layer["salient_heads"] = rng.choice(
            [(0, []), (8, []), (layer["page"], layer["heads"])]
        )


def _side(layer: dict[str, Any], rng: Random) -> None:
    """Another way to store K or V of one head, or of all."""
    heads = layer[rng.choice(["heads", "heads", "salient_heads"])]
    which = rng.choice("kv")
    names = ["groups", "group_size", "steps", "token_scales", "levels", "clip", "page_means", "planes"]
    name = rng.choice(names)
    value = {
        "groups": rng.choice(["tokens", "channels"]),
        "group_size": rng.choice([0, 4, 8, 16, *NUMBERS]),
        "steps": rng.choice(["adaptive", "scaled", "unit"]),
        "token_scales": rng.random() < 0.5,
        "levels": rng.choice(KINDS),
        "clip": rng.choice([100, 90, 1, 0, -1, 101]),
        "page_means": rng.choice([0, 1, 4, 15, 16, layer["k_dim"], *NUMBERS]),
    }
    several = rng.choice([heads, [rng.choice(heads)]])
    for head in several:
        if name != "planes":
            head[which][name] = value[name]
        else:
            plane = rng.choice(head[which]["planes"])
            plane[rng.choice(["bits", "channels"])] = rng.choice(WIDTHS)


def manifest(path: Path, rng: Random) -> None:
    """What the manifest says of the model, of folds, of the recipe and of the calibration."""
    file = path / "manifest.json"
    data = json.loads(file.read_bytes())
    what = rng.randrange(5)
    if what < 2:
        data["model"][rng.choice(sorted(data["model"]))] = rng.choice([*NUMBERS, *ODD])
    elif what == 2:
        names = rng.choice([["x"], ["model.norm.weight"], list(data["folded"] or {"x": ""})])
        data["folded"] = {name: rng.choice(["", "x", "lm_head.weight", "../x"]) for name in names}
    elif what == 3:
        data["recipe"][rng.choice(["passes", "name", "summary", "windows"])] = rng.choice(
            [
                [{}],
                [{"fp8": {}}],
                [{"int8": None}],
                [{"fp8": {"layers": 1}}],
                ["fp8"],
                "fp8",
                7,
                None,
                [[1]],
                {"x": 1},
            ]
        )
    else:
        keys = {
            "kept": [rng.choice([0.5, 2, -1])] * rng.choice([0, 1, 2]),
            "ranks": [[1.0, 0.5]] * rng.choice([0, 1, 9]),
        }
        source = {"name": "\u202e[/]", "digest": "x", "seed": 0, "samples": 1, "tokens": rng.choice(NUMBERS)}
        data["calibration"] = {
            "prompts": rng.choice([1, 1 << 62]),
            "tokens": rng.choice([1, 1 << 62]),
            "gradients": True,
            "sources": [source] * rng.choice([0, 1, 50]),
            "keys": [rng.choice([None, keys]) for _ in range(rng.choice([0, 1, 2]))],
        }
    replace(file, json.dumps(data).encode())


def kernels(path: Path, rng: Random) -> None:
    """Indexes of GPU kernels that name other files, functions, targets or keys."""
    file = path / "kernels/sm_90.json"
    data = json.loads(file.read_bytes())
    entry = rng.choice(data["kernels"])
    what = rng.randrange(5)
    if what == 0:
        entry["file"] = rng.choice(
            ["../../x", "sm_90.json", "sm_80-" + "0" * 16 + ".cubin", "x" * 9000, "kernels.json"]
        )
    elif what == 1:
        entry["results"] = rng.choice(
            [{"class": 1}, {"__init__": 1}, {"shared": 1 << 62}, {"a": [[]]}, {}, []]
        )
    elif what == 2:
        data["kernels"] = data["kernels"] * rng.choice([0, 2, 5000])
    elif what == 3:
        entry["name"] = rng.choice(["attend; import os", "eval", "", "x" * 100, "ATTEND"])
    else:
        data["target"] = rng.choice(["sm_80", "gfx942", "../sm_90", ""])
    replace(file, json.dumps(data).encode())


def template(path: Path, rng: Random) -> None:
    """Pieces of jinja anywhere in the chat template."""
    file = path / "tokenizer/chat_template.jinja"
    text = file.read_text()
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(TEMPLATES) + text[at:]
    replace(file, text.encode())
