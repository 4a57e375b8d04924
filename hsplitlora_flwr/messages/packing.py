"""Tensors in Flower's records, and records as bytes for the stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.messages.reading import printable

PACKET_BYTES = 4 << 20
"""Bytes of tensors that travel as one array; Flower cuts arrays longer than 5 MB."""
PACKET_TYPE = "safetensors"
"""The name of their serialization in Flower, which is not NumPy's."""


def pack_factors(adapters: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors ``(B, A)`` by layer as tensors named ``layer:B`` and ``layer:A``."""
    return {f"{name}:{role}": t for name, pair in adapters.items() for role, t in zip("BA", pair, strict=True)}


def unpack_factors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The inverse of :func:`pack_factors`."""
    names = [key.removesuffix(":B") for key in tensors if key.endswith(":B")]
    return {name: (tensors[f"{name}:B"], tensors[f"{name}:A"]) for name in names}


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a Flower record of safetensors files, each of about :data:`PACKET_BYTES`.

    In a deployment Flower fetches every array of a record separately, which for a thousand small ones takes longer than
    their bytes do.
    """
    packets: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room or not packets:
            packets.append({})
            room = PACKET_BYTES
        packets[-1][name] = tensor.detach().cpu().contiguous()
        room -= tensor.nbytes
    return ArrayRecord({str(i): _packet(save(each)) for i, each in enumerate(packets)})


def pack_content(records: RecordDict) -> Tensor:
    """The content of a message as one tensor of bytes, uint8, for the stream."""
    data: dict[str, Tensor] = {}
    text: dict[str, list[Any]] = {}
    for name, held in records.items():
        kind = _RECORDS.index(type(held))
        if isinstance(held, ArrayRecord):
            keys = {str(len(data) + index): key for index, key in enumerate(held)}
            data |= {place: _bytes(held[key].data) for place, key in keys.items()}
            text[name] = [kind, [[key, place, held[key].stype] for place, key in keys.items()]]
        else:
            text[name] = [kind, dict(held)]
    return _bytes(save({_TEXT: _bytes(json.dumps(text).encode()), **data}))


def unpack_content(content: Tensor) -> RecordDict:
    """The inverse of :func:`pack_content`.

    Raises
    ------
    Exception
        Of whatever kind, if it is not what that makes.
    """
    data = load(content.numpy().tobytes())
    records = RecordDict()
    for name, (kind, held) in json.loads(data.pop(_TEXT).numpy().tobytes()).items():
        if _RECORDS[kind] is ArrayRecord:
            packets = {key: (data.pop(place).numpy().tobytes(), stype) for key, place, stype in held}
            held = {key: Array("uint8", (len(packet),), stype, packet) for key, (packet, stype) in packets.items()}
        records[name] = _RECORDS[kind](held)
    return records


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


_RECORDS: tuple[type[Any], ...] = (ArrayRecord, ConfigRecord, MetricRecord)
_TEXT = "text"


def _packet(data: bytes) -> Array:
    return Array("uint8", (len(data),), PACKET_TYPE, data)


def take_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a Flower record, which is emptied so that its bytes do not stay in memory.

    Raises
    ------
    Exception
        Of whatever kind, if they are not what :func:`to_arrays` makes.
    """
    tensors: dict[str, Tensor] = {}
    for key in list(arrays):
        packet = arrays.pop(key)
        if packet.stype != PACKET_TYPE:
            raise ValueError(f"array '{printable(key, 40)}' is not {PACKET_TYPE}")
        # sorted, since `load` gives them in any order, and two runs are to be alike
        tensors |= sorted(load(packet.data).items())
    return tensors
