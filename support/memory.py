"""Which settings fit a GPU: --microbatch 0, --gradient-checkpointing auto and --offload auto."""

import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from support import report
from support.cli import InputError
from support.distributed import gather_objects, processes, say

# Images a microbatch, gradient checkpointing, offload: from the fastest to the smallest.
PLANS = [(32, "off", "off"), (16, "off", "off"), (8, "off", "on")]
PLANS += [(count, "on", "on") for count in (8, 4, 2, 1)]
SPARE = 0.95  # of the free memory; the allocator cannot use all of it


def free_gigabytes() -> float | None:
    """Of the GPU of the process that has the least; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return min(gather_objects(torch.cuda.mem_get_info()[0])) / 1e9


def needed_gigabytes(config, weights: float) -> float:
    """The peak of a run whose UNet has `weights` GB in float32: counted by benchmarks/memory.py for
    SD v1.4 (3.44 GB) and HPSv2, and what a UNet keeps is taken in proportion to its weights."""
    half = config.dtype in ("fp16", "bf16")
    # Gradients and Adam's moments; the reference. Adapters need neither.
    learned, reference = (0, 0) if config.lora_rank else (3 * weights, weights / (1 + half))
    an_image = {(True, "off"): 2.5, (True, "on"): 0.46, (False, "off"): 3.74, (False, "on"): 0.96}
    kept = config.microbatch * an_image[half, config.gradient_checkpointing] * weights / 3.44
    casts = weights / 2 if half else 0
    others = reference + 4.8 if config.offload == "off" else 0  # VAE, text encoder, HPSv2
    # While HPSv2 works, 4 GB at the least; beside it all trajectories and pictures.
    return weights + learned + max(kept + casts, 4.0) + others + 2.5


def plans(config, weights_gigabytes: Callable[[str], float]) -> list:
    """The settings to try, one after another: as given where they are given, else what should fit.
    InputError where nothing does."""
    free = free_gigabytes()
    if free is None or with_plan(config, PLANS[0]) == config:
        return [with_plan(config, (8, "off", "off"))]
    found, size = [], weights_gigabytes(config.model)
    for plan in PLANS:
        chosen = with_plan(config, plan)
        if chosen not in found and needed_gigabytes(chosen, size) < SPARE * free:
            found.append(chosen)
    if not found:
        least = needed_gigabytes(with_plan(config, PLANS[-1]), size)
        remedy = "name --microbatch, --gradient-checkpointing and --offload to try it all the same"
        if not config.lora_rank:
            remedy = "train adapters: --lora-rank 8 --learning-rate 1e-4"
        raise InputError(f"{free:.3g} GB of free GPU memory, and this takes {least:.3g}; {remedy}.")
    return found


def with_plan(config, plan: tuple):
    """`config` with what it leaves open taken from `plan`."""
    chosen = zip(("microbatch", "gradient_checkpointing", "offload"), plan, strict=True)
    return replace(config, **{n: x for n, x in chosen if getattr(config, n) in (0, "auto")})


def first_that_fits(config, weights_gigabytes: Callable[[str], float], attempt: Callable):
    """attempt(config) with the first of `plans` that no process runs out of GPU memory with.
    weights_gigabytes: model -> size of its UNet in float32."""
    configs = plans(config, weights_gigabytes)
    for number, config in enumerate(configs, 1):
        result = None  # and its memory, where another process had none
        gc.collect()
        torch.cuda.empty_cache()
        try:
            result = attempt(config)
        except torch.OutOfMemoryError:
            if number == len(configs):
                raise
        if not any(gather_objects(result is None)):
            return result
        say("out of GPU memory; trying the next smaller settings")


def rehearse(config, models, batch, score: Callable, backward: Callable) -> tuple[float, float]:
    """Score the first step of a microbatch of trajectories, and learn from it, while as much memory
    is held as Adam's moments and an epoch's trajectories will take: what does not fit fails here.
    Returns the seconds an image of such passes through all T steps."""
    sd, num_steps = models.sd, config.ddpm_steps
    images = config.prompts_per_epoch * config.images_per_prompt // processes()
    latents = num_steps + 1 if config.keeps_trajectories else 1
    held = [torch.empty(images, latents, *sd.latent_shape, device=sd.device)]
    held += [torch.empty_like(p) for p in sd.unet.parameters() if p.requires_grad for _ in "mv"]

    step = batch._replace(latents=batch.latents[:, :2], log_probs=batch.log_probs[:, :1])
    seconds = []
    for _ in range(3):  # the first compiles
        report.SECONDS.clear()
        score(models.policy, step)
        backward(models.policy, step, torch.full_like(step.log_probs, 1e-3))
        seconds.append((report.SECONDS["score"], report.SECONDS["update"]))
    del held
    sd.unet.zero_grad(set_to_none=True)
    return tuple(num_steps / len(step.text) * min(x) for x in zip(*seconds, strict=True))
