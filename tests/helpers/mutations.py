"""Damage to files, drawn with a seed: what a disk, a broken download, a careless hand or an attacker does to them."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

VALUES = [None, True, "x", "", 7, 0, -1, 2.5, 1e308, float("nan"), 10**30, 10**9, [], ["x"], {}, {"x": 1}, "y" * 3000]


@dataclass(frozen=True)
class Mutation:
    """One change of one file.

    Attributes:
        name: What it does, for a failing test.
        file: The file, relative to its input's folder.
        apply: Changes the file.
    """

    name: str
    file: str
    apply: Callable[[Path], object]


def of_bytes(file: str, size: int, draw: random.Random, count: int) -> Iterator[Mutation]:
    """Flipped bits, most of them near the start and the end, where headers are; and cut, blank and appended parts."""
    for _ in range(count):
        near = draw.choice([min(size, 64), min(size, 1500), size])
        at = draw.choice([draw.randrange(near), size - 1 - draw.randrange(near)])
        bit = draw.randrange(8)
        yield Mutation(f"bit {bit} at {at}", file, _edit(lambda data, at=at, bit=bit: _flip(data, at, bit)))
    for end in (0, 1, 7, draw.randrange(8, size), size - 1):
        yield Mutation(f"cut to {end}", file, _edit(lambda data, end=end: data[:end]))
    at = draw.randrange(size // 2)
    yield Mutation(f"blank from {at}", file, _edit(lambda data, at=at: data[:at] + bytes(64) + data[at + 64 :]))
    yield Mutation("null bytes before", file, _edit(lambda data: bytes(16) + data))
    yield Mutation("noise after", file, _edit(lambda data: data + b"\xff\x00noise"))
    yield Mutation("nothing but null bytes", file, _edit(lambda data: bytes(len(data))))


def of_header(file: str) -> Iterator[Mutation]:
    """What a safetensors header can say that is not so."""
    for length in (2**63, 2**40, 2**31, 100_000_001, 3):
        yield Mutation(f"header of {length}", file, _edit(lambda data, n=length: n.to_bytes(8, "little") + data[8:]))
    deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    yield Mutation("deep header", file, lambda path: path.write_bytes(len(deep).to_bytes(8, "little") + deep))
    for old, new in (
        (b'"F32"', b'"F99"'),
        (b'"F32"', b'"I32"'),
        (b'"shape":[', b'"shape":[-'),
        (b'"data_offsets":[0', b'"data_offsets":[9'),
        (b'"shape":[', b'"shape":[99999999999999999999,'),
    ):
        yield Mutation(f"{new!r} in the header", file, _edit(lambda data, a=old, b=new: _in_header(data, a, b)))


def of_tensors(file: str, draw: random.Random, count: int) -> Iterator[Mutation]:
    """Tensors of another name, shape, type or value, in a whole file."""
    changes: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
        "gone": lambda tensors, name: tensors.pop(name),
        "renamed": lambda tensors, name: tensors.update({f"{name}x": tensors.pop(name)}),
        "flat": lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)}),
        "longer": lambda tensors, name: tensors.update({name: torch.cat([tensors[name], tensors[name]])}),
        "scalar": lambda tensors, name: tensors.update({name: torch.tensor(1.0)}),
        "empty": lambda tensors, name: tensors.update({name: tensors[name][:0]}),
        "whole numbers": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int64)}),
        "not a number": lambda tensors, name: tensors.update({name: tensors[name] * float("nan")}),
        "infinite": lambda tensors, name: tensors.update({name: tensors[name] / 0}),
    }
    for _ in range(count):
        which, number = draw.choice(list(changes)), draw.randrange(1000)
        yield Mutation(f"tensor {number} {which}", file, lambda path, c=changes[which], n=number: _retensor(path, c, n))


def of_metadata(file: str, fields: list[str]) -> Iterator[Mutation]:
    """What a safetensors file says of itself beside its tensors."""
    for field in fields:
        for value in ("", "[]", "{}", '{"x": 1}', '{"x"', "7", "[" * 50_000, '{"a": 1, "a": 2}', None):
            shown = "nothing" if value is None else value[:20]
            yield Mutation(
                f"{field} is {shown}", file, lambda path, name=field, new=value: _remetadata(path, name, new)
            )


def of_json(file: str, content: dict[str, object], draw: random.Random, per_field: int) -> Iterator[Mutation]:
    """Fields of other types, missing and doubled; and text that is no JSON object."""
    for name in content:
        for value in draw.sample(VALUES, per_field):
            yield Mutation(f"{name} is {str(value)[:20]!r}", file, _rejson({**content, name: copy.deepcopy(value)}))
        yield Mutation(f"no {name}", file, _rejson({key: other for key, other in content.items() if key != name}))
    text = json.dumps(content)
    first = next(iter(content))
    for name, new in {
        "a field twice": text[:-1] + f', "{first}": 1}}',
        "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "a deep field": text[:-1] + ', "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "a number of many digits": text[:-1] + ', "a": ' + "9" * 10_000 + "}",
        "cut": text[: len(text) // 2],
        "nothing": "",
        "a list": "[1, 2]",
        "a text": '"x"',
        "null": "null",
        "a null byte": text.replace('"', '"\0', 1),
        "two objects": text + text,
    }.items():
        yield Mutation(name, file, lambda path, new=new: path.write_text(new))
    yield Mutation("another encoding", file, lambda path: path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le")))


def _edit(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def _in_header(data: bytes, old: bytes, new: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(old, new, 1)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in list(file.keys())}, file.metadata() or {}


def _retensor(path: Path, change: Callable[[dict[str, torch.Tensor], str], object], number: int) -> None:
    tensors, metadata = _contents(path)
    change(tensors, sorted(tensors)[number % len(tensors)])
    save_file(tensors, path, metadata)


def _remetadata(path: Path, field: str, value: str | None) -> None:
    tensors, metadata = _contents(path)
    metadata.pop(field)
    save_file(tensors, path, metadata | ({} if value is None else {field: value}))


def _rejson(content: dict[str, object]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(content))
