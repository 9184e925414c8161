"""PRDP: Proximal Reward Difference Prediction for reward finetuning of diffusion models (Deng et al., CVPR 2024).

    python prdp.py --preset toy                                     # embedded 32x32 model, no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt     # SD v1.4, one GPU, Table 4 small-scale

In reading order: settings (Table 4), the DDPM policy (Sec. 2), sampling and scoring of trajectories (Eqs. 1 to 4),
the loss (Secs. 3.1 and 3.3, App. G), its exact gradient in the memory of one microbatch, the online loop (Sec. 3.2,
Algorithm 1), then plumbing. The loss stands before the loop because Algorithm 1 calls it.

Paper                   Here             Shape (M = N*B images)  Note
x_t                     latents[:, k]    (M, T+1, C, H, W)       float32; k counts along the trajectory, from x_T
log pi(x_{t-1}|x_t, c)  log_probs[:, k]  (M, T)                  float64; nats per latent dimension (mean over C*H*W)
r-hat_t, Eq. 19         log_ratio        (..., B, T)             log_probs - log_probs_ref
r                       rewards          (..., B)                in the reward's own unit
beta, Eq. 5             kl_weight                                `betas` is only ever the DDPM noise schedule
epsilon, Eq. 20         clip_range                               in the unit of log_probs
the network's epsilon   noise_pred       (M, C, H, W)            guided output, also of networks that predict v
sigma_t, Eq. 2          sigma            (T,)

Units, said once: log_probs are means over C*H*W and the loss takes a mean over T (App. G), where Eqs. 4, 10 and 21
sum. That rescales beta, epsilon and the loss: the beta of Eq. 5 is kl_weight / (T*C*H*W). Table 4 is read in these
units.

Departures from the paper, and choices where it is silent or says two things:
 1. The loss takes the mean over T (App. G), not the sum of Eqs. 10, 19 and 21:
    loss_sum(beta) == T**2 * loss_mean(beta * T).
 2. log_prob is a mean over latent dimensions. The paper does not say; DDPO's code does so, and its clip range, 1e-4,
    is the one of Table 4's large-scale columns.
 3. The loss averages over pairs whose rewards differ (App. G); Alg. 1, line 10 divides by B(B-1)/2, ties included. A
    prompt whose rewards all tie contributes 0, where App. G gives NaN.
 4. After the last step alpha-bar is alphas_cumprod[0], as in Stable Diffusion's samplers; the paper does not say.
 5. With K = 1 theta is theta_old at the only update, so Eq. 18 changes nothing: the clip range of Table 4's two
    large-scale columns never acts. Kept as printed.
 6. The number format of the network passes (`dtype` in each preset); the paper gives none.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rewards import InputError, Reward, load_reward, parse_reward

# ---- 1. Settings: Table 4 ----------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
VERSION = 1  # of the checkpoint's layout


def flag(default, text: str, low: float = -math.inf, above: float = -math.inf, **argparse_options):
    """A Config field that is also a command line flag: its --help, its smallest value, or a value it must exceed."""
    argparse_options["help"] = text
    return dataclasses.field(default=default, metadata={"low": low, "above": above, "argparse": argparse_options})


@dataclass
class Config:
    """Every setting of a run. The defaults are the small-scale column of Table 4."""

    preset: str = flag("small", "a column of Table 4, or the toy", choices=("small", "large", "multi", "toy"))
    model: str = flag("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.x or 2.x, diffusers hub id or folder")
    reward: str = flag("hpsv2", "reward to maximise, see rewards.py")
    prompts: str = flag(str(HERE / "prompts" / "animals.txt"), "training prompts: .txt, .json or .jsonl")
    out: str = flag("", "run folder, new or empty (default: runs/PRESET)")
    resume: str = flag("", "run folder to go on with, under its own settings", metavar="RUN")
    seed: int = flag(0, "of the prompts drawn and of the noise", low=0)
    # Table 4, row by row
    epochs: int = flag(100, "E, rounds of sampling and learning", low=1)
    updates_per_epoch: int = flag(10, "K, gradient updates per epoch", low=1)
    prompts_per_epoch: int = flag(32, "N, drawn with replacement", low=1)
    images_per_prompt: int = flag(16, "B, at least 2", low=2)
    kl_weight: float = flag(3e-5, "beta; unit: reward per nat per latent dimension", above=0)
    ddpm_steps: int = flag(50, "T, denoising steps", low=1)
    clip_range: float = flag(1e-6, "epsilon of Eq. 20; unit: nats per latent dimension; inf: no clipping", above=0)
    guidance_scale: float = flag(5.0, "of classifier-free guidance, in sampling and in training", low=0)
    learning_rate: float = flag(1e-5, "of AdamW", above=0)
    weight_decay: float = flag(1e-4, "of AdamW", low=0)
    max_grad_norm: float = flag(1.0, "gradients longer than this are scaled down to it", above=0)
    # the machine
    microbatch: int = flag(8, "images per network pass; must divide N*B", low=1)
    dtype: str = flag("fp32", "of the network passes; weights stay fp32", choices=("fp32", "bf16", "fp16"))
    save_every: int = flag(1, "epochs between checkpoints", low=1)
    sample_every: int = flag(10, "epochs between sample grids", low=1)


PRESETS = {
    "small": {},
    "large": dict(
        epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, kl_weight=3e-6,
        clip_range=1e-4, learning_rate=7e-6, dtype="bf16", prompts=str(HERE / "prompts" / "hpdv2_train.json"),
    ),
    "multi": dict(
        epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, kl_weight=3e-5,
        clip_range=1e-4, learning_rate=1e-5, dtype="bf16", reward="pickscore=10,hpsv2=2,aesthetic=0.05",
        prompts=str(HERE / "prompts" / "pickapic_train.jsonl"),
    ),
    "toy": dict(
        epochs=30, updates_per_epoch=4, prompts_per_epoch=8, images_per_prompt=8, kl_weight=3e-5,
        clip_range=1e-3, learning_rate=2e-4, ddpm_steps=10, microbatch=64, sample_every=5,
        model=str(HERE / "toy" / "sd"), reward=f"pickscore:{HERE / 'toy' / 'pickscore'}",
        prompts=str(HERE / "prompts" / "shapes.txt"),
    ),
}  # fmt: skip


def parse_args(argv: list[str]) -> Config:
    """The command line, over the preset, over the defaults."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in dataclasses.fields(Config):
        options = {"type": type(f.default), **f.metadata["argparse"]}
        options["help"] += f" (default: {f.default})" if f.default != "" else ""
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    if "resume" not in given:
        preset = given.get("preset", "small")
        config = Config(**{"out": f"runs/{preset}", **PRESETS[preset], **given})
        config.prompts = str(Path(config.prompts).resolve())  # so that --resume finds it from anywhere
        config.model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
        return check_config(config)
    path = Path(given["resume"]) / "config.json"
    if not path.is_file():
        raise InputError(f"--resume {given['resume']}: no config.json there, so it is no run folder.")
    try:
        saved = dataclasses.asdict(Config(**json.loads(path.read_text())))
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path}: damaged, or of another version ({error}).") from error
    for name, value in given.items():
        if name not in ("resume", "out", "epochs", "save_every", "sample_every") and value != saved[name]:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {value}: would change the result of the run, which has {saved[name]}.")
    return check_config(Config(**{**saved, **given, "out": given["resume"]}))


def check_config(config: Config) -> Config:
    """Refuse settings that cannot run, before anything is loaded."""
    for f in dataclasses.fields(Config):
        option, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        if f.metadata["low"] > -math.inf and not value >= f.metadata["low"]:
            raise InputError(f"{option} {value}: must be at least {f.metadata['low']}.")
        if f.metadata["above"] > -math.inf and not value > f.metadata["above"]:
            raise InputError(f"{option} {value}: must be greater than {f.metadata['above']}.")
    share, rest = divmod(config.prompts_per_epoch, int(os.environ.get("WORLD_SIZE", 1)))
    if rest:
        raise InputError(f"--prompts-per-epoch {config.prompts_per_epoch}: must be a multiple of the processes.")
    if (images := share * config.images_per_prompt) % config.microbatch:
        raise InputError(f"--microbatch {config.microbatch}: must divide the {images} images of an epoch and process.")
    parse_reward(config.reward)
    return config


# ---- 2. The policy: DDPM ancestral sampling, a chain of Gaussians (Sec. 2) ---------------------------------


class Schedule(NamedTuple):
    """Eq. 2 as N(coef_sample * x_t + coef_noise * noise_pred, sigma^2 I); each (T,), in sampling order."""

    timesteps: Tensor  # int64: 981, 961, ..., 1 for T = 50
    coef_sample: Tensor  # float64
    coef_noise: Tensor  # float64
    sigma: Tensor  # float64, > 0


SD_SCHEDULER = dict(  # what a model's scheduler_config.json leaves open
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
    set_alpha_to_one=False, prediction_type="epsilon",
)  # fmt: skip


def ddpm_schedule(scheduler_config: dict, num_steps: int) -> Schedule:
    """The coefficients of Eq. 2 (Ho et al. 2020, Eqs. 6, 7 and 11); the same chain as DDIM with eta = 1.

    Reads the noise schedule, and whether the network predicts noise or v, from a diffusers scheduler's config. Steps
    are "leading"-spaced, and alpha-bar after the last one is alphas_cumprod[0], as Stable Diffusion is configured.
    Raises InputError for another kind of schedule, and for sigma == 0, where log-probabilities do not exist.
    """
    config = {**SD_SCHEDULER, **scheduler_config}
    train_steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise InputError("the model's scheduler sets trained_betas or rescale_betas_zero_snr: not supported.")
    if config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float64) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, train_steps, dtype=torch.float64)
    else:
        raise InputError(f"the model's scheduler has beta_schedule {config['beta_schedule']!r}: not supported.")

    stride = train_steps // max(num_steps, 1)
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config["steps_offset"]
    if num_steps < 1 or stride * num_steps < 0.8 * train_steps or timesteps[0] >= train_steps:
        raise InputError(
            f"--ddpm-steps {num_steps}: does not divide the model's {train_steps} training steps into equal strides "
            f"from its end (steps_offset {config['steps_offset']}); 50 does, for Stable Diffusion."
        )
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    final = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0].item()
    previous = timesteps - stride
    bar = alphas_cumprod[timesteps]  # alpha-bar before the step
    bar_previous = torch.where(previous >= 0, alphas_cumprod[previous.clamp(min=0)], final)  # and after it
    alpha = bar / bar_previous
    sigma = ((1 - bar_previous) / (1 - bar) * (1 - alpha)).clamp(min=0).sqrt()
    if not (sigma > 0).all():
        raise InputError(
            "the model's scheduler gives sigma = 0 at its last step, where log-probabilities do not exist: set "
            "steps_offset to 1 and set_alpha_to_one to false in its scheduler_config.json."
        )
    if config["prediction_type"] == "epsilon":
        coef_sample, coef_noise = alpha.rsqrt(), -(1 - alpha) / ((1 - bar) * alpha).sqrt()
    elif config["prediction_type"] == "v_prediction":  # put epsilon = sqrt(bar) * v + sqrt(1 - bar) * x_t into it
        coef_sample, coef_noise = alpha.sqrt(), -(1 - alpha) * (bar / ((1 - bar) * alpha)).sqrt()
    else:
        raise InputError(f"the model's scheduler has prediction_type {config['prediction_type']!r}: not supported.")
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(sample; mean, sigma^2 I) of Eqs. 2 and 4, a mean over latent dimensions: (M, ...), (M, ...), (M,) -> (M,).

    float64 whatever comes in: at the last step a log-prob is about 2.5, where float32 numbers lie 2.4e-7 apart, a
    quarter of Table 4's smallest clip_range. (Summed over 4*64*64 dimensions it would be 40,000: far worse.)
    """
    assert sample.shape == mean.shape and sigma.shape == sample.shape[:1], (sample.shape, mean.shape, sigma.shape)
    squared = (sample.double() - mean.double()).square().flatten(1).mean(1)
    sigma = sigma.double()
    return -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network and how it is run. The reference policy differs in `unet` alone."""

    unet: nn.Module  # (sample (M, C, H, W), timestep (M,), encoder_hidden_states (M, L, D)) -> .sample (M, C, H, W)
    schedule: Schedule
    null_text: Tensor  # (L, D), the embedding of the empty prompt
    guidance_scale: float = 5.0
    microbatch: int = 16
    autocast: torch.dtype | None = None  # None: the network runs in its own dtype


def guided_noise_pred(policy: Policy, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Classifier-free guidance (Sec. 4.1), both branches in one pass and both with gradient: (M, C, H, W) float64."""
    both = torch.cat([policy.null_text.expand_as(text), text])  # (2M, L, D)
    with torch.autocast(sample.device.type, policy.autocast, enabled=policy.autocast is not None):
        out = policy.unet(torch.cat([sample, sample]), timestep.repeat(2), encoder_hidden_states=both).sample
    unconditional, conditional = out.double().chunk(2)
    return unconditional + policy.guidance_scale * (conditional - unconditional)


def denoising_gaussian(policy: Policy, sample: Tensor, text: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (M, C, H, W) and sigma (M,) of Eq. 2, float64. steps (M,) count from x_T and may differ by row."""
    timesteps, coef_sample, coef_noise, sigma = (column[steps] for column in policy.schedule)
    noise_pred = guided_noise_pred(policy, sample, timesteps, text)
    mean = coef_sample.view(-1, 1, 1, 1) * sample.double() + coef_noise.view(-1, 1, 1, 1) * noise_pred
    return mean, sigma


# ---- 3. Trajectories: sampling and scoring (Eqs. 1 to 4) ---------------------------------------------------


class Trajectories(NamedTuple):
    """Denoising trajectories of M images, and their log-probs under the policy that drew them."""

    latents: Tensor  # (M, T+1, C, H, W) float32: x_T, ..., x_0
    log_probs: Tensor  # (M, T) float64
    text: Tensor  # (M, L, D), the embedding of each image's prompt


def image_generators(seed: int, epoch: int, prompts: range, images: int) -> list[torch.Generator]:
    """One CPU generator per image: its noise depends on no microbatch, no device and no other image."""

    def key(prompt: int, image: int) -> int:
        digest = hashlib.sha256(f"{seed} {epoch} {prompt} {image}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    return [torch.Generator().manual_seed(key(n, i)) for n in prompts for i in range(images)]


@torch.no_grad()
def sample_trajectories(
    policy: Policy, text: Tensor, generators: list[torch.Generator], shape: tuple[int, int, int]
) -> Trajectories:
    """Draw x_T, ..., x_0 by ancestral sampling (Eq. 1; Alg. 1, line 6), with the log-prob of every step.

    text (M, L, D), a generator per image, shape (C, H, W). Latents are rounded to float32 *before* they are scored:
    the log-prob is that of the stored tensor, so that scoring it again under the same weights gives the same bits.
    """
    images, num_steps, device = len(text), len(policy.schedule.timesteps), text.device
    assert len(generators) == images, (len(generators), text.shape)

    def noise(rows: Tensor) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generators[m]) for m in rows.tolist()]).to(device)

    latents = torch.empty(images, num_steps + 1, *shape, dtype=torch.float32, device=device)
    log_probs = torch.empty(images, num_steps, dtype=torch.float64, device=device)
    with progress("sample", images * num_steps) as bar:
        for rows in torch.arange(images, device=device).split(policy.microbatch):
            latents[rows, 0] = noise(rows)
            for k in range(num_steps):
                mean, sigma = denoising_gaussian(policy, latents[rows, k], text[rows], torch.full_like(rows, k))
                latents[rows, k + 1] = (mean + sigma.view(-1, 1, 1, 1) * noise(rows)).float()
                log_probs[rows, k] = gaussian_log_prob(latents[rows, k + 1], mean, sigma)
                bar.update(len(rows))
    return Trajectories(latents, log_probs, text)


@torch.no_grad()
def score_trajectories(policy: Policy, trajectories: Trajectories, label: str = "score") -> Tensor:
    """log pi(x_{t-1} | x_t, c) of stored trajectories under a policy (Eqs. 2 to 4): (M, T) float64.

    Runs in the microbatches, shapes and order of `sample_trajectories`, so that unchanged weights return the very
    bits of `trajectories.log_probs`. Another batch size alone can move them by more than the clip range.
    """
    log_probs = torch.empty_like(trajectories.log_probs)
    images, num_steps = log_probs.shape
    with progress(label, images * num_steps) as bar:
        for rows in torch.arange(images, device=log_probs.device).split(policy.microbatch):
            for k in range(num_steps):
                log_probs[rows, k] = step_log_prob(policy, trajectories, rows, torch.full_like(rows, k))
                bar.update(len(rows))
    return log_probs


def step_log_prob(policy: Policy, trajectories: Trajectories, images: Tensor, steps: Tensor) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of Eq. 2, with gradient, for P pairs of image and step: (P,), (P,) -> (P,)."""
    latents, text = trajectories.latents, trajectories.text
    mean, sigma = denoising_gaussian(policy, latents[images, steps], text[images], steps)
    return gaussian_log_prob(latents[images, steps + 1], mean, sigma)


# ---- 4. The loss: reward difference prediction with proximal updates (Secs. 3.1 and 3.3, App. G) -----------


def prdp_loss(
    log_probs: Tensor,  # (..., B, T), under pi_theta; carries the gradient
    log_probs_old: Tensor,  # (..., B, T), under pi_theta_old, which drew the trajectories
    log_probs_ref: Tensor,  # (..., B, T), under pi_ref
    rewards: Tensor,  # (..., B)
    clip_range: float,  # epsilon of Eq. 20, in the unit of log_probs; inf: the plain RDP loss of Eq. 14
    kl_weight: float,  # beta
) -> Tensor:
    """The PRDP loss of Eqs. 10 to 14 and 17 to 21, as App. G computes it: a scalar.

    The B trajectories share a prompt; leading dimensions are prompts. Per prompt, the mean over pairs whose rewards
    differ (each pair once; 0 if all rewards tie), then the mean over prompts.
    """
    log_ratio = log_probs - log_probs_ref  # Eq. 19
    log_ratio_old = log_probs_old - log_probs_ref
    clipped_log_ratio = torch.clamp(log_ratio, log_ratio_old - clip_range, log_ratio_old + clip_range)  # Eq. 20

    def pairwise_diff(x: Tensor) -> Tensor:
        return x.unsqueeze(-1) - x.unsqueeze(-2)  # (..., B) -> (..., B, B): entry [a, b] is x_a - x_b

    log_ratio_diff = pairwise_diff(log_ratio.mean(-1))  # Eqs. 10 and 11, with App. G's mean over T
    clipped_log_ratio_diff = pairwise_diff(clipped_log_ratio.mean(-1))  # Eq. 21
    reward_diff = pairwise_diff(rewards.to(log_probs.dtype))  # Eq. 12

    error = (log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 14
    clipped_error = (clipped_log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 17
    counts = reward_diff > 0
    loss = torch.where(counts, torch.maximum(error, clipped_error), 0.0)  # Eq. 18
    return (loss.sum((-2, -1)) / counts.sum((-2, -1)).clamp(min=1)).mean()


# ---- 5. Exact gradients, through T steps and all pairs, in the memory of one microbatch --------------------


def backward_trajectories(policy: Policy, trajectories: Trajectories, weights: Tensor) -> None:
    """Add the loss's gradient to each `.grad` (Alg. 1, line 11), given weights = dloss/dlog_probs, (M, T).

    The loss squares a mean over T and pairs B images, so plain backpropagation would hold the graphs of all B*T
    network passes at once. But it sees the network only through the small matrix log_probs: by the chain rule its
    gradient is the sum of weights[m, k] * dlog_probs[m, k]/dtheta, and each microbatch of entries can be run again on
    its own. This is exact for any microbatches, because only derivatives are taken here and no value is compared with
    another pass's. So entries of weight 0 are skipped (clipped, in an image whose clipped error wins Eq. 18 in every
    pair), and the rest packed densely, steps of different images and times together.
    """
    assert weights.shape == trajectories.log_probs.shape, (weights.shape, trajectories.log_probs.shape)
    scale, parameters = 1.0, list(policy.unet.parameters())
    if policy.autocast == torch.float16 and weights.any():
        # The gradient of a mean over C*H*W would underflow in fp16. A power of two scales it up exactly, to about 1/64
        # per latent element, which leaves room for sums over positions. What is in `.grad` already goes along.
        scale = 2.0 ** round(math.log2(trajectories.latents[0, 0].numel() / weights.abs().max().item()) - 6)
        scale_gradients(parameters, scale)
    entries = weights.nonzero()  # (entries, 2): image, step
    with progress("update", len(entries)) as bar:
        for images, steps in (chunk.unbind(1) for chunk in entries.split(policy.microbatch) if len(chunk)):
            log_prob = step_log_prob(policy, trajectories, images, steps)
            (scale * weights[images, steps] * log_prob).sum().backward()
            bar.update(len(images))
    if scale != 1.0:
        scale_gradients(parameters, 1 / scale)


def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor)


def reduce_gradients(unet: nn.Module) -> None:
    """Mean of the gradients over processes, each of which has the mean over its own prompts (Alg. 1, line 10).

    A parameter without a gradient (all rewards tied, or every entry skipped) gets a zero one, so that all processes
    take part and every update is counted.
    """
    for p in unet.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if processes() > 1:
            dist.all_reduce(p.grad)
            p.grad /= processes()


# ---- 6. Online optimisation (Sec. 3.2, Algorithm 1) --------------------------------------------------------


class Batch(NamedTuple):
    """What one epoch learns from: N prompts, M = N*B images; or one process's share of them."""

    prompts: list[str]
    trajectories: Trajectories
    log_probs_ref: Tensor  # (M, T) float64
    images: Tensor  # (M, 3, 8H, 8W) uint8
    rewards: Tensor  # (M,) float32
    reward_parts: dict[str, Tensor]  # the components of a summed reward, each (M,)


def collect(config: Config, models: Models, epoch: int, prompts: list[str], seconds: dict[str, float]) -> Batch:
    """Alg. 1, lines 5 to 8: B trajectories for each prompt, their log-probs under pi_ref, their rewards.

    Each of several processes takes its own share of the prompts; noise does not depend on the number of processes.
    """
    with timed(seconds, "sample"):
        mine = range(len(prompts) // processes() * rank(), len(prompts) // processes() * (rank() + 1))
        prompts = [prompts[n] for n in mine]
        text = encode(models.pipe, prompts).repeat_interleave(config.images_per_prompt, dim=0)
        generators = image_generators(config.seed, epoch, mine, config.images_per_prompt)
        trajectories = sample_trajectories(models.policy, text, generators, models.latent_shape)
        require_finite(f"epoch {epoch}, sampling: a log-prob", trajectories.log_probs, prompts)
    with timed(seconds, "reference"):
        log_probs_ref = trajectories.log_probs  # until the first update, pi_theta is pi_ref
        if epoch > 1:
            log_probs_ref = score_trajectories(models.reference, trajectories, "reference")
    with timed(seconds, "reward"):
        images = decode(models, trajectories.latents[:, -1])
        try:
            rewards = models.reward(images, [p for p in prompts for _ in range(config.images_per_prompt)])
        except InputError as error:
            raise InputError(f"epoch {epoch}: {error}") from error
    return Batch(prompts, trajectories, log_probs_ref, images, rewards, models.reward.parts)


def to_show(batch: Batch, prompts: list[str]) -> Batch:
    """The images and rewards of all processes, on the CPU, for the prompts they shared; without the rest."""
    images, rewards = gather(batch.images).cpu(), gather(batch.rewards).cpu()
    return batch._replace(prompts=prompts, trajectories=None, log_probs_ref=None, images=images, rewards=rewards)


def train(config: Config, models: Models, optimizer: torch.optim.Optimizer, prompts: list[str], start: int) -> None:
    """Algorithm 1. Its line 1, pi_theta <- pi_ref, is in `load_models`."""
    policy, groups = models.policy, (-1, config.images_per_prompt)  # (N, B): the loss pairs images of a prompt
    for epoch in range(start, config.epochs + 1):  # Alg. 1, line 2
        seconds: dict[str, float] = {}
        batch = collect(config, models, epoch, draw_prompts(config, prompts, epoch), seconds)  # lines 4 to 8
        log_probs_old = batch.trajectories.log_probs  # line 3: all that is needed of the snapshot theta_old
        fixed = [x.unflatten(0, groups) for x in (log_probs_old, batch.log_probs_ref, batch.rewards)]
        updates = []
        for k in range(config.updates_per_epoch):  # line 9
            with timed(seconds, "score"):
                log_probs = score_trajectories(policy, batch.trajectories) if k else log_probs_old.clone()
            log_probs.requires_grad_()
            loss = prdp_loss(log_probs.unflatten(0, groups), *fixed, config.clip_range, config.kl_weight)  # line 10
            (weights,) = torch.autograd.grad(loss, log_probs)
            with timed(seconds, "update"):  # line 11
                require_finite(f"epoch {epoch}, update {k + 1}: the loss", loss)
                backward_trajectories(policy, batch.trajectories, weights)
                reduce_gradients(policy.unet)
                grad_norm = nn.utils.clip_grad_norm_(policy.unet.parameters(), config.max_grad_norm)
                require_finite(f"epoch {epoch}, update {k + 1}: the gradient", grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            updates.append(update_metrics(config, loss, log_probs.detach(), fixed, weights, grad_norm))
        log_epoch(config, epoch_metrics(epoch, batch, updates, seconds), header=(epoch - start) % 20 == 0)
        if epoch % config.sample_every == 0 and epoch < config.epochs:
            shown = fixed_prompts(config, prompts)
            save_samples(config, epoch, to_show(collect(config, models, 0, shown, {}), shown))
        if epoch % config.save_every == 0 or epoch == config.epochs:
            save_checkpoint(config, policy.unet, optimizer, epoch)


def update_metrics(
    config: Config, loss: Tensor, log_probs: Tensor, fixed: list[Tensor], weights: Tensor, grad_norm: Tensor
) -> dict[str, float]:
    """Diagnostics of one gradient update, of the policy as it was before it; `fixed` as in `train`."""
    log_probs = log_probs.view_as(fixed[0])
    moved = (log_probs - fixed[0]).abs()
    return {
        "loss": loss.item(),
        "loss_unclipped": prdp_loss(log_probs, *fixed, math.inf, config.kl_weight).item(),  # Eq. 14
        "clip_fraction": (moved > config.clip_range).double().mean().item(),
        "skipped_fraction": (weights == 0).double().mean().item(),
        "log_ratio_old": moved.mean().item(),
        "grad_norm": grad_norm.item(),
    }


def epoch_metrics(epoch: int, batch: Batch, updates: list[dict], seconds: dict[str, float]) -> dict[str, float]:
    """A line of metrics.jsonl (fields defined in the README); figures of updates are means over the K updates."""
    rewards, log_ratio = gather(batch.rewards), gather(batch.trajectories.log_probs - batch.log_probs_ref)
    return {
        "epoch": epoch,
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "reward_se": rewards.std().item() / len(rewards) ** 0.5,
        **{f"reward_mean/{label}": gather(part).mean().item() for label, part in batch.reward_parts.items()},
        **{name: gather(torch.tensor([u[name] for u in updates])).mean().item() for name in updates[0]},
        "log_ratio_ref": log_ratio.mean().item(),
        "kl_nats": log_ratio.mean().item() * log_ratio.shape[1] * batch.trajectories.latents[0, 0].numel(),  # Eq. 6
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "images_per_second": len(rewards) / sum(seconds.values()),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
    }


# ---- 7. Plumbing: models, rewards, prompts -----------------------------------------------------------------


class Models(NamedTuple):
    """Everything with weights; `pipe` is the diffusers pipeline around the policy's UNet."""

    pipe: object  # StableDiffusionPipeline
    policy: Policy
    reference: Policy
    reward: Reward
    latent_shape: tuple[int, int, int]


def load_models(config: Config, device: torch.device) -> Models:
    """The pipeline, the policy, and the frozen reference the policy starts from (Alg. 1, line 1)."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of loading from disk; downloads keep theirs
        library.utils.logging.set_verbosity_error()
    try:
        kind = diffusers.DiffusionPipeline.load_config(config.model)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise InputError(f"--model {config.model}: a {kind}; only Stable Diffusion 1.x and 2.x are supported.")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            config.model, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        ).to(device)
    except (OSError, ValueError) as error:
        if Path(config.model).exists():
            raise InputError(f"--model {config.model}: no Stable Diffusion folder in diffusers layout.") from error
        raise InputError(
            f"--model {config.model}: no such folder, not in the local cache, and the hub cannot be reached or does "
            "not have it; without a network, run --preset toy."
        ) from error
    reward = load_reward(config.reward, device)
    unet, vae = pipe.unet, pipe.vae
    channels = unet.config.in_channels, vae.config.latent_channels
    if channels[0] != channels[1]:
        raise InputError(
            f"--model {config.model}: UNet of {channels[0]} channels, VAE of {channels[1]}; must be equal."
        )
    torch.backends.cudnn.allow_tf32 = config.dtype != "fp32"  # TF32 convolutions round like fp16
    vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    unet.requires_grad_(True).eval()  # eval: with dropout every pass would be another policy
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    reference = copy.deepcopy(unet).requires_grad_(False)
    for layer in reference.modules():
        # Autocast casts these weights at every pass; cast once, they are the same bits in half the memory.
        if autocast is not None and isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(autocast)
    schedule = Schedule(*(column.to(device) for column in ddpm_schedule(pipe.scheduler.config, config.ddpm_steps)))
    policy = Policy(unet, schedule, encode(pipe, [""])[0], config.guidance_scale, config.microbatch, autocast)
    size = unet.config.sample_size
    latent_shape = (channels[0], *(size if isinstance(size, (list, tuple)) else (size, size)))
    return Models(pipe, policy, policy._replace(unet=reference), reward, latent_shape)


@torch.no_grad()
def encode(pipe, prompts: list[str]) -> Tensor:
    """Text embeddings (len(prompts), L, D), as the pipeline itself makes them."""
    return pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)[0]


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """x_0 (M, C, H, W) -> uint8 images (M, 3, 8H, 8W), rounded once: a reward sees what a PNG file would hold."""
    vae, policy, images = models.pipe.vae, models.policy, []
    with progress("reward", len(latents)) as bar:
        for rows in latents.split(policy.microbatch):
            with torch.autocast(latents.device.type, policy.autocast, enabled=policy.autocast is not None):
                decoded = vae.decode(rows / vae.config.scaling_factor).sample
            require_finite("a picture from the VAE", decoded)
            images.append(((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
            bar.update(len(rows))
    return torch.cat(images)


def draw_prompts(config: Config, prompts: list[str], epoch: int) -> list[str]:
    """N prompts, independent and uniform (Alg. 1, line 4); a function of seed and epoch alone."""
    (generator,) = image_generators(config.seed, -epoch, range(1), 1)
    drawn = torch.randint(len(prompts), (config.prompts_per_epoch,), generator=generator)
    return [prompts[i] for i in drawn]


def fixed_prompts(config: Config, prompts: list[str]) -> list[str]:
    """N prompts spread evenly over the file, for the samples that a run shows. Their noise is that of epoch 0."""
    return [prompts[n * len(prompts) // config.prompts_per_epoch] for n in range(config.prompts_per_epoch)]


def load_prompts(path: str) -> list[str]:
    """Prompts of a .txt (a line each; blank and # lines skipped), .json or .jsonl file (strings, or objects with a
    "prompt" or "caption" field), in their order, repeats dropped."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--prompts {path}: no such file.")
    try:
        text, kind = file.read_text(encoding="utf-8-sig"), file.suffix.lower()
        if kind == ".json":
            records = json.loads(text)
        elif kind == ".jsonl":  # not splitlines(): JSON strings may hold other line separators
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif kind in (".txt", ""):
            records = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
        else:
            raise InputError(f"--prompts {path}: must be .txt, .json or .jsonl.")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read as {file.suffix or 'text'}: {error}.") from error
    if not isinstance(records, list):
        raise InputError(f"--prompts {path}: must hold a list of prompts.")
    prompts = [r.get("prompt", r.get("caption")) if isinstance(r, dict) else r for r in records]
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise InputError(f'--prompts {path}: entry {number} is neither a string nor an object with a "prompt".')
    prompts = list(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    if not prompts:
        raise InputError(f"--prompts {path}: holds no prompt.")
    return prompts


def processes() -> int:
    """How many processes torchrun started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; only rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """(M, ...) tensors of all processes as one, in the order of the prompts."""
    if processes() == 1:
        return x
    x = x.to("cuda" if dist.get_backend() == "nccl" else "cpu").contiguous()
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


STOP: list[int] = []  # the signal that asked this run to stop


def ask_to_stop(number: int, frame) -> None:
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def progress(label: str, total: int):
    """A progress bar on a terminal, nothing elsewhere. Its update is where Ctrl-C and SIGTERM take effect: between
    two microbatches, never within an optimizer step or a write."""
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: int = 1) -> None:
            if STOP:
                raise SystemExit(128 + STOP[0])
            super().update(n)

    hidden = None if rank() == 0 else True  # None: on a terminal only
    return Bar(total=total, desc=f"{label:>9}", unit="", leave=False, disable=hidden, dynamic_ncols=True)


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Add the block's wall-clock time to seconds[name]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def require_finite(what: str, values: Tensor, prompts: list[str] | None = None) -> None:
    """Stop before anything is learned from NaN or infinity; values (M, ...) of M images, or a scalar."""
    if values.isfinite().all():
        return
    where = ""
    if prompts:
        bad = (~values.flatten(1).isfinite().all(1)).nonzero()[0].item()
        where = f" for the prompt {prompts[bad * len(prompts) // len(values)]!r}"
    raise InputError(f"{what} is not finite{where}; try a lower --learning-rate, or another --dtype, in a new run.")


def check_on_policy(models: Models, trajectories: Trajectories) -> None:
    """Score a fresh microbatch again, under the policy and the reference: both must return the very same bits.

    Eq. 20 compares two passes over one trajectory to within clip_range, 1e-6 to 1e-4 in Table 4. If an unchanged
    network does not reproduce its own log-probs, the clip acts on noise.
    """
    first = Trajectories(*(x[: models.policy.microbatch] for x in trajectories))
    for name, policy in (("policy", models.policy), ("reference", models.reference)):
        gap = (score_trajectories(policy, first) - first.log_probs).abs().max().item()
        if rank() == 0:
            print(f"on-policy gap of the {name}: {gap:.1e}")
        if gap != 0:
            raise InputError(
                f"the {name} scores its own trajectory {gap:.1e} off, and clipping would act on noise: switch off "
                "torch.backends.cudnn.benchmark and other nondeterminism, or try --dtype fp32."
            )


# ---- 8. Samples, metrics, checkpoints ----------------------------------------------------------------------

UNBORN = {".lock", "config.json.tmp"}  # all that a run killed before its config.json leaves behind
COLUMNS = (
    "epoch", "reward_mean", "reward_std", "loss", "clip_fraction", "skipped_fraction", "log_ratio_old",
    "log_ratio_ref", "grad_norm", "images_per_second",
)  # fmt: skip


def log_epoch(config: Config, metrics: dict[str, float], header: bool) -> None:
    """A line on the screen, a line in metrics.jsonl, reward.png drawn again."""
    if rank() != 0:
        return
    parts = [name for name in metrics if name.startswith("reward_mean/")]
    columns = [*COLUMNS[:3], *(parts if len(parts) > 1 else []), *COLUMNS[3:]]
    if header:
        print("  ".join(f"{name:>9}" for name in columns))
    print("  ".join(f"{metrics[name]:>{max(9, len(name))}.4g}" for name in columns), flush=True)
    with open(Path(config.out) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    plot_rewards(config)


def save_samples(config: Config, epoch: int, samples: Batch) -> None:
    """samples/epoch_NNNN.png, a row of images for each of the first 8 prompts, and .json with every reward."""
    from PIL import Image

    if rank() != 0:
        return
    images, rewards = (x.unflatten(0, (len(samples.prompts), -1)) for x in (samples.images, samples.rewards))
    grid = images[:8, :8].permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows*H, columns*W, 3)
    path = Path(config.out) / "samples" / f"epoch_{epoch:04d}"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(grid.numpy()).save(path.with_suffix(".png"))
    table = [{"prompt": p, "rewards": r} for p, r in zip(samples.prompts, rewards.tolist(), strict=True)]
    path.with_suffix(".json").write_text(json.dumps(table, indent=1))


def plot_rewards(config: Config) -> None:
    """reward.png: mean and standard deviation of each epoch's rewards, and the mean over the fixed samples."""
    from matplotlib.figure import Figure

    folder = Path(config.out)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs, mean, std = (torch.tensor([row[k] for row in rows]) for k in ("epoch", "reward_mean", "reward_std"))
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    axes.fill_between(epochs, mean - std, mean + std, alpha=0.15, lw=0)
    axes.plot(epochs, mean, label="training images: mean, standard deviation")
    for path in sorted((folder / "samples").glob("*.json")):
        rewards = [reward for row in json.loads(path.read_text()) for reward in row["rewards"]]
        label = "the same prompts and seeds: mean" if path.stem == "epoch_0000" else None
        axes.plot(int(path.stem.removeprefix("epoch_")), sum(rewards) / len(rewards), "o", color="C1", label=label)
    axes.set(xlabel="epoch", ylabel="reward")
    axes.legend(frameon=False)
    figure.savefig(folder / "reward.png", dpi=120)


def plot_before_after(config: Config, before: Batch, after: Batch) -> None:
    """before_after.png: 2 images for each of 8 prompts, base above, finetuned below, of the same seed."""
    from matplotlib.figure import Figure

    columns = min(8, len(before.prompts))
    figure = Figure(figsize=(1.5 * columns + 0.5, 7.6), layout="constrained")
    for i, half in enumerate(figure.subfigures(2, 1)):
        axes = half.subplots(2, columns, squeeze=False)
        for n in range(columns):
            for row, (name, samples) in enumerate((("base", before), ("finetuned", after))):
                m = n * config.images_per_prompt + i
                axes[row, n].imshow(samples.images[m].permute(1, 2, 0).numpy(), interpolation="nearest")
                axes[row, n].set(xticks=[], yticks=[], ylabel=name if n == 0 else None)
                axes[row, n].set_xlabel(f"{samples.rewards[m]:.4g}", fontsize=9, labelpad=2)
            lines = textwrap.wrap(before.prompts[n], 20, max_lines=4, placeholder=" ...")
            axes[0, n].set_title("\n".join(lines), fontsize=8, parse_math=False)
    figure.savefig(Path(config.out) / "before_after.png", dpi=120)


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write under another name, flush to the disk, rename: after a crash there is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(config: Config, unet: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """checkpoint/state.pt, after a whole epoch. Prompts and noise depend on (seed, epoch) alone: no RNG state."""
    if rank() != 0:
        return
    path = Path(config.out) / "checkpoint" / "state.pt"
    path.parent.mkdir(exist_ok=True)
    state = {"epoch": epoch, "unet": unet.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"config": dataclasses.asdict(config), "version": VERSION}
    write_file(path, lambda file: torch.save(state, file))


def load_checkpoint(config: Config, unet: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the last checkpoint, drop the metrics of later epochs, and return the epoch to go on with."""
    path, metrics = Path(config.out) / "checkpoint" / "state.pt", Path(config.out) / "metrics.jsonl"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {"epoch": 0}
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: damaged; move it away to begin again with the run's settings.") from error
    if state.get("version", VERSION) != VERSION:
        raise InputError(f"{path}: written by version {state['version']} of prdp.py, and this is version {VERSION}.")
    if state["epoch"]:
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
    if metrics.is_file():
        lines = metrics.read_bytes().splitlines(keepends=True)[: state["epoch"]]
        write_file(metrics, lambda file: file.writelines(lines))
    return state["epoch"] + 1


def hold(folder: Path) -> BinaryIO:
    """Keep other processes out of a run folder for as long as this one lives, however it ends."""
    import fcntl

    file = open(folder / ".lock", "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is running there; wait for it, or stop it.") from None
    return file


def save_pipeline(config: Config, pipe) -> None:
    """pipeline/, for StableDiffusionPipeline.from_pretrained; `pipe(prompt, eta=1.0)` samples the trained policy."""
    from diffusers import DDIMScheduler

    settings = {**SD_SCHEDULER, **pipe.scheduler.config, "timestep_spacing": "leading", "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(settings)
    pipe.save_pretrained(Path(config.out) / "pipeline")


# ---- 9. main -----------------------------------------------------------------------------------------------


def run(config: Config) -> None:
    """Train from the first epoch or the last checkpoint, then show what changed."""
    out, prompts = Path(config.out), load_prompts(config.prompts)
    if not config.resume and (out.is_file() or out.is_dir() and {p.name for p in out.iterdir()} - UNBORN):
        raise InputError(f"--out {out}: already in use; choose another folder, or go on with --resume {out}.")
    device = start_processes()  # waits for all of them: none may see another's new folder
    models = load_models(config, device)
    unet = models.policy.unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    if rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be made ({error.strerror}).") from error
        held = hold(out)  # noqa: F841  (until this process ends)
        settings = json.dumps(vars(dataclasses.replace(config, resume="")), indent=1).encode()
        write_file(out / "config.json", lambda file: file.write(settings))
        millions, context = sum(p.numel() for p in unet.parameters()) / 1e6, models.pipe.tokenizer.model_max_length
        print(f"{config.model}: UNet of {millions:.1f} M parameters in {config.dtype}, {processes()} process(es)")
        print(f"reward {config.reward}; {len(prompts)} prompts from {config.prompts}; results in {out}")
        if long := sum(len(ids) > context for ids in models.pipe.tokenizer(prompts).input_ids):
            print(f"warning: {long} prompts are longer than {context} tokens; the model sees their beginnings.")

    shown = fixed_prompts(config, prompts)
    before = collect(config, models._replace(policy=models.reference), 0, shown, {})
    check_on_policy(models, before.trajectories)
    before = to_show(before, shown)
    save_samples(config, 0, before)
    start = load_checkpoint(config, unet, optimizer) if config.resume else 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    try:
        train(config, models, optimizer, prompts, start)
    except SystemExit as stop:
        # Each parameter counts its updates: none of an unfinished epoch's may get into a checkpoint.
        steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        epoch, partial = divmod(steps, config.updates_per_epoch)
        if epoch >= start and not partial:
            save_checkpoint(config, unet, optimizer, epoch)
        if rank() == 0:
            print(f"stopped by signal {stop.code - 128}; go on with: python prdp.py --resume {out}", file=sys.stderr)
        raise

    after = to_show(collect(config, models, 0, shown, {}), shown)
    save_samples(config, config.epochs, after)
    if rank() == 0:
        save_pipeline(config, models.pipe)
        plot_rewards(config)
        plot_before_after(config, before, after)
        rise = (after.rewards - before.rewards).double()
        error = rise.std() / len(rise) ** 0.5
        print(
            f"mean reward of {len(rise)} images on fixed prompts and seeds: {before.rewards.mean():.4f} -> "
            f"{after.rewards.mean():.4f}, {rise.mean():+.4f} +- {error:.4f} (standard error of the paired difference)\n"
            f"see {out / 'before_after.png'}"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def start_processes() -> torch.device:
    """Join the other processes where torchrun started this one; the device of this one."""
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        dist.barrier()
    return torch.device("cuda" if cuda else "cpu")


def fail(message: str) -> None:
    who = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"prdp.py{who}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    STOP.clear()
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        run(config)
    except KeyboardInterrupt:  # before training; from then on see `ask_to_stop`
        raise SystemExit(130) from None
    except InputError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory with --microbatch {config.microbatch}: try {max(1, config.microbatch // 2)}.")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        fail(f"cannot write to {error.filename or config.out}: {error.strerror}; the last checkpoint is intact.")


if __name__ == "__main__":
    main()
