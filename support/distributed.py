"""One process or several: who this is, what they share, and noise that does not depend on it."""

import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.cli import UserError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_processes() -> torch.device:
    """Join the others where torchrun started this process; the device of this one."""
    cuda = torch.cuda.is_available()
    if all(name in os.environ for name in TORCHRUN) and not dist.is_initialized():
        if cuda:  # a launcher may show each process one GPU alone
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        others = int(os.environ["WORLD_SIZE"]) - 1
        if os.environ["RANK"] == "0" and others:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"waiting for {others} other process(es) at {place}", flush=True)
        # NCCL's ten minutes are shorter than one process may lag behind another.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    if cuda:
        require_code_for_gpu()
    return torch.device("cuda" if cuda else "cpu")


def require_code_for_gpu() -> None:
    """UserError where this build of PyTorch has no kernels for the GPU."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        built = " ".join(torch.cuda.get_arch_list())
        own = "sm_{}{}".format(*torch.cuda.get_device_capability())
        remedy = "take its build for CUDA 12.6 (whl/cu126) for an older GPU, else a newer PyTorch"
        raise UserError(f"this PyTorch is for {built}, not for {own}; {remedy}.") from error


def end_processes() -> None:
    """A process that ends while another still works may abort in gloo: they wait for each other."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which process this is; only rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def print0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def shard(count: int) -> slice:
    """This process's part of `count` things in a row."""
    size = count // processes()
    return slice(size * rank(), size * (rank() + 1))


def image_generators(seed: int, epoch: int, prompts: Sequence[int], images: int) -> list:
    """One CPU generator for each of `images` images of each prompt, by its number: noise depends on
    no microbatch, device or other image. Epoch 0 is of pictures to show, -epoch of draw_prompts."""
    generators = []
    for prompt in prompts:
        for image in range(images):
            key = hashlib.sha256(f"{seed} {epoch} {prompt} {image}".encode()).digest()[:8]
            number = int.from_bytes(key, "little", signed=True)
            generators.append(torch.Generator().manual_seed(number))
    return generators


def draw_noise(generators: list, count: int, shape: tuple) -> Tensor:
    """`count` standard normal tensors of each generator, one after another: (m, count, *shape)."""
    noise = [torch.randn(shape, generator=g) for g in generators for _ in range(count)]
    return torch.stack(noise).unflatten(0, (len(generators), count))


def gather_objects(content: object) -> list:
    """Each process's, in their order."""
    parts = [content] * processes()
    if processes() > 1:
        dist.all_gather_object(parts, content)
    return parts


def gather(x: Tensor) -> Tensor:
    """(M, ...) tensors of all processes as one, in their order."""
    return torch.cat([part.to(x.device) for part in gather_objects(x.cpu())])


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Each `.grad` becomes its mean over processes; where nothing was learned it is 0."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if processes() > 1:
            dist.all_reduce(p.grad)
            p.grad /= processes()


def require_finite(what: str, values: Tensor) -> None:
    """Stop before anything is learned from NaN or infinity."""
    if not values.isfinite().all():
        remedy = "lower --learning-rate or --guidance-scale, a higher --kl-weight, another --dtype"
        raise UserError(f"{what} is not finite; try, in a new run, a {remedy}.")
