"""Models of random numbers that are made on the device, parts of them, and stock PEFT around the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.lora.optimizers import OPTIMIZERS
from hsplitlora_flwr.models.parts import BodyModel, ClientModel, HeadModel, ServerModel
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.quantisation import QuantisedLinear
from hsplitlora_flwr.models.split import body_part, client_part, head_part, middle_part, server_part, whole_model
from hsplitlora_flwr.models.stored import empty_model
from simulations.benchmarks.gpu.cases import Place


class RandomBase:
    """A base of random numbers on a device, none of which was ever on the host; its parts share them.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model.
    dtype : str
        Of the base.
    place : Place
        Where it lies.
    quantise : {"none", "8bit", "4bit"}
        How the linear layers of the blocks hold their weights.
    spread : float
        Standard deviation of the numbers in matrices.
    """

    def __init__(
        self, config: PretrainedConfig, dtype: str, place: Place, quantise: str = "none", spread: float = 0.02
    ) -> None:
        self.model = empty_model(config, dtype, quantise)
        self.family = find_family(config)
        _fill(self.model, place.device, spread)

    def client_part(self, split: int) -> ClientModel:
        """Embeddings and blocks below ``split``."""
        return client_part(self.model, self.family, split)

    def server_part(self, split: int) -> ServerModel:
        """Blocks from ``split`` up, norm and head."""
        return server_part(self.model, self.family, split)

    def body_part(self, split: int) -> BodyModel:
        """Blocks from ``split`` up."""
        return body_part(self.model, self.family, split)

    def head_part(self) -> HeadModel:
        """Norm and head."""
        return head_part(self.model, self.family)

    def middle_part(self, first: int, last: int) -> BodyModel:
        """Blocks ``first .. last - 1``."""
        return middle_part(self.model, self.family, first, last)

    def linears(self) -> dict[str, nn.Module]:
        """The layers that may get an adapter, by absolute name."""
        return dict(whole_model(self.model, self.family).linears())


def _fill(model: PreTrainedModel, device: torch.device, spread: float) -> None:
    """Give a model without memory random weights."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(weight: Tensor) -> Tensor:
        numbers = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        if weight.ndim > 1:
            return numbers.normal_(0, spread, generator=generator)
        return numbers.normal_(1, 0.02, generator=generator)  # norms; where biases are, 1 is as good as any number

    made: dict[Tensor, nn.Parameter] = {}  # tied weights are one
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.load(drawn(module.weight))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(drawn(parameter), requires_grad=False)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


class PlainPeft:
    """Stock PEFT around the weights of a base, trained by a plain loop.

    Parameters
    ----------
    base : RandomBase
        It stays as it is.
    spec : AdapterSpec
        Of the adapter of every layer.
    train : TrainConfig
        Optimizer, learning rate and clipping.
    start : Mapping[str, tuple[Tensor, Tensor]], optional
        ``(B, s A)`` by layer to start from.
    """

    def __init__(
        self, base: RandomBase, spec: AdapterSpec, train: TrainConfig, start: Mapping[str, Factors] | None = None
    ) -> None:
        self.names = list(base.linears())
        whole = whole_model(base.model, base.family).causal_lm
        transposed = any(isinstance(layer, Conv1D) for layer in base.linears().values())
        for name in self.names:
            layer = whole.get_submodule(name)
            if isinstance(layer, QuantisedLinear):  # PEFT knows the layers of bitsandbytes
                whole.set_submodule(name, _stock_linear(layer))
                vars(whole)["is_loaded_in_4bit"] = True
        lora = LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha),
            target_modules=self.names,
            task_type="CAUSAL_LM",
            fan_in_fan_out=transposed,
        )
        torch.manual_seed(0)
        self._model = get_peft_model(whole, lora).train()
        for name, (b, a) in (start or {}).items():
            own_b, own_a = self._factors(name)
            own_b.data.copy_(b)
            own_a.data.copy_(a.double() / spec.scale)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._clip = train.clip
        self._optimizer = OPTIMIZERS[train.optimizer].make(self._parameters, train)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Train on a batch, or on the rows of several as one; returns the loss, on the device."""
        device = self._parameters[0].device
        columns = ([getattr(b, name) for b in batches] for name in ("input_ids", "attention_mask", "labels"))
        ids, mask, labels = (torch.cat(column).to(device, non_blocking=True) for column in columns)
        loss: Tensor = self._model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def factors(self) -> dict[str, Factors]:
        """``(B, A)`` of every layer."""
        return {name: self._factors(name) for name in self.names}

    def _factors(self, name: str) -> Factors:
        layer: Any = self._model.get_submodule(f"base_model.model.{name}")
        return layer.lora_B["default"].weight, layer.lora_A["default"].weight


def _stock_linear(layer: QuantisedLinear) -> nn.Module:
    """A layer of bitsandbytes with the same weight in 4 bits."""
    kinds: Any = import_module("bitsandbytes.nn")
    weight = layer.dequantised()
    stock = kinds.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, weight.dtype, quant_type="nf4", device="meta"
    )
    packed = kinds.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=stock)
    stock.weight, stock.bias = packed.to(weight.device), layer.bias
    made: nn.Module = stock
    return made


def random_batch(config: PretrainedConfig, rows: int, length: int, seed: int, *, padded: bool = False) -> Batch:
    """Random ids on the host, every one a label; where ``padded`` the last row is half as long, and a third of each row
    is prompt."""
    ids = torch.randint(3, int(config.vocab_size), (rows, length), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[-1, length // 2 :] = 0
        labels[mask == 0] = -100
        labels[:, : length // 3] = -100
    return Batch(ids, mask, labels)


def random_factors(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, Factors]:
    """``(B, A)`` that are not zero, on the host, for layers ``(out, in)``."""
    generator, factors = torch.Generator().manual_seed(1), {}
    for name, (out_features, in_features) in shapes.items():
        b, a = (torch.randn(shape, generator=generator) for shape in ((out_features, rank), (rank, in_features)))
        factors[name] = 0.1 * b, a / in_features**0.5
    return factors
