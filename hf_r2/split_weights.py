"""Training that splits the weights over processes: what of it the range loss can take part in."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_r2.training_args import R2Arguments


def refuse_split_weights(trainer: Any, options: R2Arguments) -> None:
    """Raises ValueError, saying what to do instead, for ways to split weights under which training would be wrong.

    Without a range loss only prepared models are refused: all else is then plain training.
    """
    prepared = any("weight_encoder" in module._modules for module in trainer.model.modules())
    if not (prepared or options.has_range_loss):
        return
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "R2Trainer cannot see whole weights under DeepSpeed ZeRO-3; use ZeRO-2, ZeRO-1, FSDP2 or plain DDP"
        )
    if plugin is not None and options.range_decoupled and options.has_range_loss:
        raise ValueError(
            "DeepSpeed keeps weights of its own, which range_decoupled=True would not move; leave it out, or use DDP"
        )
    if not getattr(trainer, "is_fsdp_enabled", False):
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("R2Trainer cannot see whole weights under FSDP1; set version 2 in fsdp_config, or use DDP")
    if prepared:
        raise ValueError("R2Trainer trains prepared (quantized) models under DDP, not under FSDP: set no fsdp")
    refused = {
        "range_dim > 1": options.range_dim > 1,
        "range_target='deployed'": options.range_target == "deployed",
        "range_units='relative'": options.range_units == "relative",
        "range_decoupled": options.range_decoupled,
        "fp16": trainer.args.fp16,
        "cpu_offload": bool(plugin.cpu_offload) and getattr(plugin.cpu_offload, "pin_memory", None) is not None,
        "torch_compile": trainer.args.torch_compile,
    }
    given = [name for name, present in refused.items() if present]
    if given:
        raise ValueError(f"the range loss does not take {', '.join(given)} under FSDP2; leave it out, or use DDP")


def split_(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Has FSDP2 put away whole weights that a forward pass without a backward pass has left in a model."""
    if not all(isinstance(w, DTensor) for w in weights.values()):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
