"""What ranks tell each other inside a training step, by torch.distributed.

Ranks form a grid: `latent_shards` of them share the latents of one SAE and see the same rows; such groups (replicas)
share the rows of a batch. Shards exchange candidates and partial reconstructions, replicas rows and errors: a few
numbers per row, and never a gradient as large as the weights. Every sum is the same bits on all ranks that receive it,
so the biases, which all of them hold, stay equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from monosemy.kernels import ALONE, Exchange
from monosemy.runtime import InputError, Ranks


class RankExchange:
    """`kernels.Exchange` over the ranks that `torchrun` started."""

    def __init__(self, n_latents: int, ranks: Ranks, latent_shards: int, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(
            device.type, (ranks.count // latent_shards, latent_shards), mesh_dim_names=("replica", "shard")
        )
        self.replica, self.shard = mesh.get_coordinate() or (0, 0)
        self.n_replicas, self.n_shards = mesh.shape
        self._shards, self._replicas = mesh.get_group("shard"), mesh.get_group("replica")
        bounds = [n_latents * part // self.n_shards for part in range(self.n_shards + 1)]
        self.first_latent, self.end_latent = bounds[self.shard], bounds[self.shard + 1]

    def sum_shards(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        _heard(partial(distributed.all_reduce, tensor, group=self._shards))
        return tensor

    def gather_shards(self, tensor: Tensor) -> list[Tensor]:
        return _gather(tensor, self.n_shards, self._shards, dimension=1)

    def gather_replicas(self, tensor: Tensor) -> list[Tensor]:
        return _gather(tensor, self.n_replicas, self._replicas, dimension=0)


class Whole:
    """The place of a process that works alone."""

    replica, n_replicas, first_latent = 0, 1, 0

    def __init__(self, n_latents: int) -> None:
        self.end_latent = n_latents


def place_and_exchange(
    n_latents: int, ranks: Ranks, latent_shards: int, device: torch.device
) -> tuple[RankExchange | Whole, Exchange]:
    """(which rows and latents are this rank's, how it talks to the others)."""
    if ranks.count == 1:
        if latent_shards > 1:
            raise InputError(f"latent_shards is {latent_shards}, but there is one rank: start torchrun with as many")
        return Whole(n_latents), ALONE
    latent_shards = latent_shards or ranks.count
    if ranks.count % latent_shards:
        raise InputError(f"latent_shards is {latent_shards}; expected a divisor of the {ranks.count} ranks")
    if latent_shards > n_latents:
        raise InputError(f"latent_shards is {latent_shards}, more than the {n_latents} latents")
    exchange = RankExchange(n_latents, ranks, latent_shards, device)
    return exchange, exchange


def _gather(tensor: Tensor, count: int, group: Any, dimension: int) -> list[Tensor]:
    """`tensor` of every rank of `group`; lengths along `dimension` may differ."""
    if count == 1:
        return [tensor]
    kept = tensor
    if flags := tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    if tensor.dim() == 0:
        tensor = tensor[None]
    length = torch.tensor([tensor.shape[dimension]], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(count)]
    _heard(partial(distributed.all_gather, lengths, length, group=group))
    longest = max(int(other) for other in lengths)
    shape = list(tensor.shape)
    shape[dimension] = longest
    padded = tensor.new_zeros(shape)
    padded.narrow(dimension, 0, tensor.shape[dimension]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in range(count)]
    _heard(partial(distributed.all_gather, parts, padded, group=group))
    found = [part.narrow(dimension, 0, int(other)) for part, other in zip(parts, lengths, strict=True)]
    if kept.dim() == 0:
        found = [part[0] for part in found]
    return [part.bool() if flags else part for part in found]


def _heard(talk: Callable[[], object]) -> None:
    """Talk to the other ranks; one that has died is no bug of this one."""
    try:
        talk()
    except RuntimeError as error:
        raise InputError(
            f"another rank has stopped answering ({str(error).splitlines()[0]}): this one stops too. The same command "
            "goes on from the last checkpoint; torchrun --max-restarts 3 gives it by itself"
        ) from error
