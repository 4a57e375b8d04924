"""A cut activation in fewer numbers: what a token is in the directions that matter for the loss, and nothing else.

A file of directions (``hsplitlora bottleneck`` learns it from public text) holds, for every split point, a mean and two
matrices. The client sends ``code = (cut - mean) encoder``, the server goes on with ``cut ~ mean + code decoder``, and
the gradient of the code comes down. Directions stand in the order of what they are worth, so that a narrower bottleneck
is the beginning of a wider one. Both sides hold the file, and compare its digest before anything trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsplitlora_flwr.config import ConfigError

WAY_OUT = "learn one with hsplitlora bottleneck --out FILE"


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """The bottleneck of a split point.

    Parameters
    ----------
    mean : Tensor
        ``(hidden,)``, of the cut activations.
    encoder, decoder : Tensor
        ``(width, hidden)``; a row for every direction, the most important first. ``encoder`` reads it off an
        activation, ``decoder`` puts it back.
    switches : int
        How many of the first directions say that a token is of a kind or not, with a code of about 1 or 0.
    """

    mean: Tensor
    encoder: Tensor
    decoder: Tensor
    switches: int = 0

    @classmethod
    def read(cls, file: str, split: int, width: int) -> Bottleneck:
        """The first ``width`` directions of a split point, fp32.

        Raises
        ------
        ConfigError
            If there is no such file, it does not hold this split point, or it holds fewer directions.
        """
        check_directions(file, split, width)
        with safe_open(Path(file).expanduser(), "pt") as tensors:
            encoder, decoder = (tensors.get_slice(f"{name}.{split}")[:width] for name in ("encoder", "decoder"))
            switches = int(tensors.get_tensor(f"switches.{split}"))
            return cls(tensors.get_tensor(f"mean.{split}"), encoder, decoder, min(switches, width))

    @staticmethod
    def write(file: Path, bottlenecks: Mapping[int, Bottleneck]) -> None:
        """Make a file of directions, by split point."""
        tensors = {
            f"{each.name}.{split}": torch.as_tensor(getattr(bottleneck, each.name)).clone().contiguous()
            for split, bottleneck in bottlenecks.items()
            for each in fields(bottleneck)
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)

    @property
    def width(self) -> int:
        """Numbers that a token is sent as."""
        return len(self.encoder)

    def narrow(self, cut: Tensor) -> Tensor:
        """The code ``(..., width)`` of an activation ``(..., hidden)``, in its dtype; differentiable."""
        mean, encoder, _ = self._like(cut)
        code: Tensor = cut.to(encoder.dtype) @ encoder.T - encoder @ mean
        return code.to(cut.dtype)

    def widen(self, code: Tensor) -> Tensor:
        """The activation ``(..., hidden)`` that a code ``(..., width)`` stands for, in its dtype."""
        mean, _, decoder = self._like(code)
        cut: Tensor = code.to(decoder.dtype) @ decoder + mean
        return cut.to(code.dtype)

    def narrow_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient ``(..., width)`` of a code, from that of the activation ``(..., hidden)`` that it became."""
        _, _, decoder = self._like(gradient)
        return (gradient.to(decoder.dtype) @ decoder.T).to(gradient.dtype)

    def _like(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The mean and matrices on a tensor's device, in its dtype or in fp32 if that is wider."""
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        return tuple(each.to(tensor.device, dtype) for each in (self.mean, self.encoder, self.decoder))


def widths(file: str) -> dict[int, int]:
    """How many directions a file holds, by split point, rising.

    Raises
    ------
    ConfigError
        If it is none of directions.
    """
    try:
        with safe_open(Path(file).expanduser(), "pt") as tensors:
            names: list[str] = tensors.keys()
            splits = sorted(int(name.partition(".")[2]) for name in names if name.startswith("mean."))
            found = {split: int(tensors.get_slice(f"encoder.{split}").get_shape()[0]) for split in splits}
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"split.bottleneck={file} is no file of directions ({error}); {WAY_OUT}") from error
    if not found:
        raise ConfigError(f"split.bottleneck={file} holds no directions; {WAY_OUT}")
    return found


def check_directions(file: str, split: int, width: int) -> None:
    """Check that a file holds at least ``width`` directions of a split point.

    Raises
    ------
    ConfigError
        If it does not, or is none of directions.
    """
    known = widths(file)
    if split not in known:
        raise ConfigError(
            f"split.bottleneck={file} holds directions of the split points {_spans(known)}, and not of {split}; "
            f"{WAY_OUT}, or keep to these by split.min and split.max"
        )
    if width > known[split]:
        raise ConfigError(
            f"split.width={width} is more than the {known[split]} directions that split.bottleneck={file} holds for "
            f"split point {split}; lower it"
        )


def digest(file: str) -> str:
    """What tells a file of directions from another: 16 hexadecimal digits.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    path = Path(file).expanduser()
    try:
        return _digest(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"split.bottleneck={file} cannot be read ({error}); {WAY_OUT}") from error


@lru_cache
def _digest(path: Path, changed: int) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _spans(splits: dict[int, int]) -> str:
    """Numbers in words: 1-3, 8."""
    spans: list[list[int]] = []
    for split in splits:
        if spans and split == spans[-1][1] + 1:
            spans[-1][1] = split
        else:
            spans.append([split, split])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
