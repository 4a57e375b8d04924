"""LoRA adapters: layers, aggregation over clients, and the accumulated update of the model."""

from hsplitlora_flwr.lora.aggregation import aggregate
from hsplitlora_flwr.lora.export import save_peft_adapter
from hsplitlora_flwr.lora.layers import AdaptedLinear, AdapterSpec, attach_changes, extract, inject, merge_changes
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change

__all__ = [
    "AccumulatedUpdate",
    "AdaptedLinear",
    "AdapterSpec",
    "Change",
    "aggregate",
    "attach_changes",
    "extract",
    "inject",
    "merge_changes",
    "save_peft_adapter",
]
