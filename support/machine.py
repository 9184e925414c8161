"""What a run's machine decides: number format, kernels, and which settings fit its GPU's memory."""

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from support import report
from support.cli import UserError, option, out_of_memory
from support.distributed import gather_objects, print0, require_finite
from support.inputs import load_module

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # autocast's
# One rounding of noise_pred in a number format, in float32 eight.
ROUNDING = {"fp32": 1e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Compute as a program of its own would, whatever a notebook has switched on around it."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        cudnn = torch.backends.cudnn
        stack.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
        yield


def set_precision(dtype: str) -> torch.dtype | None:
    """Let this process round as --dtype says, whichever of PyTorch's switches was used before; what
    autocast is to use, None for float32."""
    backends = torch.backends
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = dtype != "fp32"
    for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        part.fp32_precision = "ieee" if dtype == "fp32" else "tf32"
    for part in (backends.mkldnn.matmul, backends.mkldnn.conv):
        part.fp32_precision = "ieee"
    return FORMATS.get(dtype)


def check_reference(config, policy, log_probs: Tensor, log_probs_ref: Tensor) -> None:
    """UserError where log-probs of policy and reference, of the same weights yet, differ: at all
    where both are one program, else by more than one rounding of noise_pred moves them."""
    gain = (policy.schedule.coef_noise / policy.schedule.sigma).abs().max().item()
    shift = ROUNDING[config.dtype] * policy.guidance_scale * gain * config.compile
    gap = (log_probs_ref - log_probs).abs().max().item()
    if not gap <= shift + shift**2:
        raise UserError(f"the reference is {gap:.1e} off the policy before any update.")


@functools.cache
def load_kernels() -> tuple[object, str]:
    """kernels/log_prob.py, by its path (Hugging Face has a package `kernels`), or None, and what to
    say of it: whatever goes wrong at the first launch means plain PyTorch."""
    if not torch.cuda.is_available():
        return None, "eager (no CUDA device)"
    file = Path(__file__).resolve().parents[1] / "kernels" / "log_prob.py"
    try:
        kernels = load_module("log_prob", str(file))
        row = torch.ones(1, device="cuda")
        noise_pred = torch.ones(2, 1, device="cuda", requires_grad=True)
        step = (noise_pred, row[None], row[None], row, row, row, 1.0)
        kernels.guided_log_prob(*step).sum().backward()
        kernels.guided_sample(*step)
    except Exception as error:  # no compiler, no libcuda, an old driver, another vendor's GPU
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return None, f"eager ({reason[:200]})"
    return kernels, "Triton kernels"


def kernels_for(noise_pred: Tensor):
    """The kernels where they can stand in for plain PyTorch: on a GPU, but for float64. Or None."""
    if not noise_pred.is_cuda or noise_pred.dtype == torch.float64:
        return None
    return load_kernels()[0]


def check_kernels(policy, batch, run_unet: Callable, log_prob: Callable, sample: Callable) -> None:
    """UserError where prdp.py's guided_log_prob and guided_sample (x_{t-1} serves as its noise)
    disagree with the kernels at a batch's first step: they take the plain form of float64."""
    x_t, x_prev = batch.latents[:, 0], batch.latents[:, 1]
    steps = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
    gaussian = (*policy.coefficients(steps), policy.guidance_scale)
    with torch.no_grad(), policy.autocast():
        noise_pred = run_unet(policy, x_t, batch.prompt_embeds, steps)
    if kernels_for(noise_pred) is None:
        return
    results = []
    for output in (noise_pred.detach(), noise_pred.detach().double()):
        value = log_prob(output.requires_grad_(), x_t, x_prev, *gaussian)
        # Times D, so that half precision has room for it.
        (gradient,) = torch.autograd.grad(value.sum() * output[0].numel(), output)
        drawn, log_prob_of_drawn = sample(output, x_t, x_prev, *gaussian)
        results.append((value, gradient, drawn, log_prob_of_drawn))
    formats = (torch.float64, noise_pred.dtype, torch.float32, torch.float64)
    for kernel, plain, kind in zip(*results, formats, strict=True):
        rounding = max(torch.finfo(kind).eps, 1e-12)
        kernel = kernel.double()
        plain = plain.double()
        if not torch.allclose(kernel, plain, rtol=rounding, atol=rounding):
            error = (kernel - plain).abs().max()
            places = "guided_mean and what calls it in prdp.py, and kernels/log_prob.py"
            raise UserError(f"{places}, must say the same, and differ by {error:.1e}.")


def loss_scaling(network: nn.Module, grad: Tensor, latent_dim: float) -> Iterator[Tensor]:
    """grad, of means over latent_dim numbers, times a power of two, so that a network's gradients
    do not underflow in fp16: to about 2**-6 for each of those numbers, and once more at 1/256 of it
    if they overflow. The loop's body runs backward() with it. What that adds to the gradients is
    scaled back, which is exact."""
    require_finite("the loss's gradient", grad)
    if not grad.any():
        return
    scale = 2.0 ** round(math.log2(latent_dim / grad.abs().max().item()) - 6)
    parameters = [p for p in network.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    for factor in (scale, scale / 256):
        for p in parameters:
            p.grad = None
        yield factor * grad
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_div_(gradients, factor)
        if nn.utils.get_total_norm(gradients).isfinite():
            break
    for p, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad + gradient


# Memory: images a microbatch, gradient checkpointing, offload; from the fastest to the smallest.
PLAN = ("microbatch", "gradient_checkpointing", "offload")
PLANS = [(32, "off", "off"), (16, "off", "off")]
PLANS += [(count, "off", "on") for count in (8, 4, 2)]
PLANS += [(count, "on", "on") for count in (8, 4, 2, 1)]
SPARE = 0.95  # of the free memory; the allocator cannot use all of it


def needed_gigabytes(config, weights: float) -> float:
    """The peak of a run whose UNet has `weights` GB in float32: counted by benchmarks/memory.py for
    SD v1.4 (3.44 GB) and SDXL (10.3) with HPSv2, and scaled by a power of weights for others."""
    half = config.dtype in FORMATS
    checkpointing = config.gradient_checkpointing
    # Gradients, twice as much for Adam's moments; the reference. Adapters need neither.
    gradients = 0 if config.lora_rank else weights
    reference = 0 if config.lora_rank else weights / (1 + (half and not config.compile))
    an_image = {"off": (3.74, 2.5), "on": (0.96, 0.46)}[checkpointing]
    power = 1.8 if checkpointing == "off" else 1.2
    relative = weights / 3.44
    kept = config.microbatch * an_image[half] * relative**power
    casts = weights / 2 if half else 0
    held = 2.5 * relative  # trajectories and pictures
    others = reference + 4.8 if config.offload == "off" else 0  # VAE, text encoder, HPSv2
    # HPSv2 takes 4 GB where there are no gradients.
    return weights + 2 * gradients + max(gradients + kept + casts, 4.0) + others + held


def plans(config, weights_gigabytes: Callable[[str], float]) -> list:
    """The settings to try, one after another: as given where they are given, else what should fit.
    UserError where nothing does. weights_gigabytes: model -> size of its UNet in float32."""

    def fill(plan: tuple):
        chosen = {}
        for name, value in zip(PLAN, plan, strict=True):
            if getattr(config, name) in (0, "auto"):
                chosen[name] = value
        return replace(config, **chosen)

    if not torch.cuda.is_available() or fill(PLANS[0]) == config:
        return [fill((8, "off", "off"))]
    torch.cuda.empty_cache()  # a reward has been called
    room = SPARE * min(gather_objects(torch.cuda.mem_get_info()[0])) / 1e9
    size = weights_gigabytes(config.model)
    fitting = []
    for filled in map(fill, PLANS):
        if filled not in fitting and needed_gigabytes(filled, size) < room:
            fitting.append(filled)
    if fitting:
        return fitting

    smallest = dict(zip(PLAN, PLANS[-1], strict=True))
    given = []
    for name, value in smallest.items():
        if getattr(config, name) not in (0, "auto", value):
            given.append(option(name))
    remedy = "name --microbatch, --gradient-checkpointing and --offload to try it all the same"
    if needed_gigabytes(replace(config, **smallest), size) < room:
        remedy = f"leave out {' and '.join(given)}"
    elif not config.lora_rank:
        remedy = "train adapters: --lora-rank 8 --learning-rate 1e-4"
    least = needed_gigabytes(fill(PLANS[-1]), size)
    share = f"{SPARE:.0%} of what is free are {room:.2f}"
    raise UserError(f"takes {least:.2f} GB of GPU memory, and {share}; {remedy}.")


def first_that_fits(configs: list, attempt: Callable, *arguments):
    """attempt(config, *arguments) with the first config that fits the GPUs of all processes."""
    for config in configs:
        result = None
        try:
            result = attempt(config, *arguments)
        except Exception as error:
            if config is configs[-1] or not out_of_memory(error):
                raise
        if not any(gather_objects(result is None)):
            return result
        print0("out of GPU memory; trying the next smaller settings")
        result = None  # and its memory, where another process had none
        gc.collect()
        torch.cuda.empty_cache()


def rehearse(config, models, batch, prompt: str, score, backward) -> tuple[float, float]:
    """Decode and judge a microbatch of trajectories, score their first step and learn from it, with
    as much memory held as Adam's moments and an epoch's trajectories and pictures will take: what
    does not fit fails here. Returns the seconds an image of such passes through all T steps."""
    sd, num_steps, count = models.sd, config.ddpm_steps, config.images_held()
    held = [torch.empty(count, num_steps + 1, *sd.latent_shape, device=sd.device)]
    held += [torch.empty_like(p) for p in sd.unet.parameters() if p.requires_grad for _ in "mv"]
    pictures = sd.decode(batch.latents[:, -1], models.policy.microbatch)
    held.append(pictures.new_empty(2 * count, *pictures.shape[1:]))  # and copies for a scorer
    models.reward.score(pictures, [prompt] * len(pictures))
    step = batch._replace(latents=batch.latents[:, :2], log_probs=batch.log_probs[:, :1])
    seconds = []
    for _ in range(3):  # the first compiles
        report.SECONDS.clear()
        score(models.policy, step)
        backward(models.policy, step, torch.full_like(step.log_probs, 1e-3))
        seconds.append((report.SECONDS["score"], report.SECONDS["update"]))
    del held
    sd.unet.zero_grad(set_to_none=True)
    scoring, learning = (min(x) for x in zip(*seconds, strict=True))
    microbatches = num_steps / len(step.latents)
    return microbatches * scoring, microbatches * learning
