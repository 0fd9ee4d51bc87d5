"""Weights that are split over processes (DTensor, as FSDP2 makes them): shards, and sums over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def shard_of(w: Tensor) -> Tensor:
    """What this process holds of `w`: of a DTensor its shard, [0] to all of it; else `w` itself."""
    return w.to_local() if isinstance(w, DTensor) else w


def whole(w: Tensor) -> Tensor:
    """All of `w`; all processes must come here for a DTensor."""
    return w.full_tensor() if isinstance(w, DTensor) else w


def like_shard(local: Tensor, w: Tensor) -> Tensor:
    """`local` as a tensor split as `w` is, if it is."""
    if not isinstance(w, DTensor):
        return local
    return DTensor.from_local(local, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())


class Shards:
    """Which of these weights are split, over whom.

    Raises ValueError for a DTensor that is a sum of what the processes hold (Partial): it has no values yet.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self.rows: dict[tuple[dist.ProcessGroup, ...], list[int]] = defaultdict(list)
        for i, w in enumerate(weights):
            if isinstance(w, DTensor):
                if any(p.is_partial() for p in w.placements):
                    raise ValueError(
                        f"the range loss needs weights that are whole or sharded, got placements {w.placements}"
                    )
                groups = [w.device_mesh.get_group(d) for d, p in enumerate(w.placements) if not p.is_replicate()]
                self.rows[tuple(groups)].append(i)

    def total(self, table: Tensor) -> Tensor:
        """Sum over the shards of each row, [weights, K]; the same in all processes."""
        return self._reduced(table, dist.ReduceOp.SUM)

    def largest(self, table: Tensor) -> Tensor:
        """The largest over the shards, likewise."""
        return self._reduced(table, dist.ReduceOp.MAX)

    def _reduced(self, table: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        for groups, rows in self.rows.items():
            whole = len(rows) == len(table)
            part = table.contiguous() if whole else table[rows]
            for group in groups:
                dist.all_reduce(part, operation, group=group)
            table = part if whole else table.index_copy(0, torch.tensor(rows, device=table.device), part)
        return table
