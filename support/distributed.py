"""One process or several: who this is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def start_processes() -> torch.device:
    """Join the others where torchrun started this process; the device of this one."""
    cuda = torch.cuda.is_available()
    if TORCHRUN <= os.environ.keys() and not dist.is_initialized():
        if cuda:  # a launcher may show each process one GPU alone
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        # NCCL's ten minutes are shorter than one process may lag behind another.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return torch.device("cuda" if cuda else "cpu")


def end_processes() -> None:
    """A process that ends while another still works may abort in gloo: they wait for each other."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; only rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str) -> None:
    """Print, at once, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def own_share(count: int) -> slice:
    """Which of `count` things in a row are this process's."""
    size = count // processes()
    return slice(size * rank(), size * (rank() + 1))


def average(x: Tensor) -> None:
    """Replace x by its mean over processes."""
    if processes() > 1:
        dist.all_reduce(x)
        x /= processes()


def gather(x: Tensor) -> Tensor:
    """(M, ...) tensors of all processes as one, in their order."""
    if processes() == 1:
        return x
    x = x.to("cuda" if dist.get_backend() == "nccl" else "cpu").contiguous()
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def merge(content: dict) -> dict:
    """The dicts of all processes as one."""
    parts = [content]
    if processes() > 1:
        parts = [None] * processes()
        dist.all_gather_object(parts, content)
    return {key: value for part in parts for key, value in part.items()}


def on_rank_0(read: Callable):
    """What `read` returns on rank 0, in every process: only there need its files be."""
    box = [read() if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def share_state(state: dict | None) -> dict:
    """Rank 0's nested dict in every process, its tensors one by one: all at once may not fit."""
    if processes() == 1:
        return state
    leaves, structure = tree_flatten(state)
    likes = [x.to("meta") if torch.is_tensor(x) else x for x in leaves]
    likes, structure = on_rank_0(lambda: (likes, structure))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for i, like in enumerate(likes):
        if torch.is_tensor(like):
            sent = leaves[i].to(device) if rank() == 0 else torch.empty_like(like, device=device)
            dist.broadcast(sent, 0)
            likes[i] = sent.cpu()
    return tree_unflatten(likes, structure)
