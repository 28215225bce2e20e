"""Read and write parameters that are sharded over processes, by FSDP 2 or by DeepSpeed's ZeRO-3.

Every process must call these functions, in the same order. They read and write a parameter that is
not sharded as any tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(parameter: Any) -> bool:
    """Return whether this process has only a part of a parameter."""
    return _is_of_fsdp(parameter) or _is_of_zero(parameter)


def reshard(model: nn.Module) -> None:
    """Let FSDP 2 free the parameters that it has gathered for the last forward.

    Without this, some parameters of a model are gathered copies, and look as if not sharded.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # a module of FSDP 2
            module.reshard()


def full_shape(parameter: Any) -> torch.Size:
    """Return the shape of a parameter over all processes."""
    shape: torch.Size = parameter.ds_shape if _is_of_zero(parameter) else parameter.shape
    return shape


def gather_parameter(parameter: Any) -> Tensor:
    """Return all values of a parameter, detached. If it is not sharded, they share its memory."""
    values: Tensor
    if _is_of_fsdp(parameter):
        values = parameter.detach().full_tensor()
    elif _is_of_zero(parameter):
        from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-untyped]

        with GatheredParameters([parameter]):
            values = parameter.detach().clone()
    else:
        values = parameter.detach()
    return values


@torch.no_grad()
def write_parameter(parameter: Any, values: Tensor) -> None:
    """Overwrite a parameter. Sharded ones get the values of the first process.

    Args:
        parameter: The parameter.
        values: Its number of values, in any dtype and on any device.
    """
    values = values.reshape(full_shape(parameter))
    if _is_of_zero(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(values)
        return
    if _is_of_fsdp(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(parameter.device).contiguous(), mesh, placements)
    parameter.copy_(values)


def local_shard(parameter: Any) -> Tensor:
    """Return the values of a parameter that this process has, detached, sharing its memory."""
    shard: Tensor
    if _is_of_fsdp(parameter):
        shard = parameter.detach().to_local()
    elif _is_of_zero(parameter):
        shard = parameter.ds_tensor
    else:
        shard = parameter.detach()
    return shard


def _is_of_fsdp(parameter: Any) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor


def _is_of_zero(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor")
