"""PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models (Deng et al., CVPR 2024).

    python prdp.py --preset toy                                          # embedded 32x32 Stable Diffusion, no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt          # SD v1.4, one GPU, the small-scale column of Table 4

One file, in reading order: settings (Table 4), the DDPM policy and its log-probabilities (Sec. 2), sampling and scoring of
trajectories (Eqs. 1 to 4), the loss (Secs. 3.1 and 3.3, App. G), its exact gradient in the memory of one microbatch, the
online loop (Sec. 3.2, Algorithm 1), then plumbing. The loss comes before the loop because Algorithm 1 calls it.

Paper                   Here                Shape (M images = N*B)  Unit, note
x_t                     latents[:, k]       (M, T+1, C, H, W)       float32; k counts along the trajectory: 0 is x_T, T is x_0
log pi(x_{t-1}|x_t, c)  log_probs[:, k]     (M, T)                  float64, nats per latent dimension (mean over C*H*W)
r-hat, Eq. 19           log_ratio           (..., B, T)             the same; minus log_probs_ref
r, Eq. 12               rewards             (..., B)                the reward's own unit
beta, Eq. 5             kl_weight                                   `betas` is only ever the DDPM noise schedule
epsilon, Eq. 20         clip_range                                  unit of log_probs
network's epsilon       noise_pred          (M, C, H, W)            classifier-free guided output, also where it predicts v
sigma_t, Eq. 2          sigma               (T,)

Units, said once: log_probs are means over C*H*W and the loss takes a mean over T (App. G), where Eqs. 4, 10 and 21 sum. Both
only rescale beta: in the paper's Eq. 5, beta is kl_weight / (T * C * H * W). Table 4's numbers are in our units.

Departures from the paper, and choices where it is silent or speaks twice:
 1. Mean over T in the loss (App. G), not the sum of Eqs. 10, 19, 21. loss_sum(beta) == T**2 * loss_mean(beta * T).
 2. Mean over latent dimensions in log_prob. The paper does not say; DDPO's code, whose clip range Table 4 inherits, does so.
 3. The loss averages over pairs with different rewards (App. G); Alg. 1, line 10 divides by B(B-1)/2, ties included. A prompt
    whose rewards all tie contributes 0 (App. G: NaN).
 4. The last step's sigma is DDIM(eta=1)'s, as in Stable Diffusion's own samplers: alpha-bar after it is alphas_cumprod[0].
 5. With K = 1 the policy is still theta_old at the only update, so Eq. 18 changes nothing there; the clip range of Table 4's
    large-scale columns never acts.
 6. Numeric format of the network passes (`dtype` of each preset): the paper gives none.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewards import InputError, load_reward

# ------------------------------------------------------------------------------------------------------------------------
# 1. Settings: Table 4
# ------------------------------------------------------------------------------------------------------------------------


def flag(default, text: str, **argparse_options):
    """A Config field that is also a command line flag; `text` is its --help."""
    return dataclasses.field(default=default, metadata={"help": text, **argparse_options})


@dataclass
class Config:
    """Every setting of a run. The defaults are the small-scale column of Table 4."""

    preset: str = flag("small", "column of Table 4, or the embedded toy", choices=("small", "large", "multi", "toy"))
    model: str = flag("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.x or 2.x in diffusers layout: hub id or folder")
    reward: str = flag("hpsv2", "reward to maximise, see rewards.py")
    prompts: str = flag("prompts/animals.txt", "training prompts: .txt, .json or .jsonl")
    out: str = flag("", "run folder, new or empty (default: runs/PRESET)")
    resume: str = flag("", "run folder to go on with; its own settings are used", metavar="RUN")
    seed: int = flag(0, "of prompts and of noise")
    # Table 4, row by row
    epochs: int = flag(100, "E, rounds of sampling")
    updates_per_epoch: int = flag(10, "K, gradient updates per epoch")
    prompts_per_epoch: int = flag(32, "N, drawn with replacement")
    images_per_prompt: int = flag(16, "B, at least 2")
    kl_weight: float = flag(3e-5, "beta, in reward per (nat per latent dimension and step)")
    ddpm_steps: int = flag(50, "T, denoising steps")
    clip_range: float = flag(1e-6, "epsilon of Eq. 20, in nats per latent dimension; inf switches clipping off")
    guidance_scale: float = flag(5.0, "w of classifier-free guidance, in sampling and in training")
    learning_rate: float = flag(1e-5, "of AdamW")
    weight_decay: float = flag(1e-4, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    # the machine
    microbatch: int = flag(16, "images per network pass; divides N*B; changes memory and speed")
    dtype: str = flag("fp32", "format of the network passes (weights stay fp32)", choices=("fp32", "bf16", "fp16"))
    save_every: int = flag(1, "epochs between checkpoints")
    sample_every: int = flag(10, "epochs between sample grids")


PRESETS = {
    "small": {},
    "large": dict(
        epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, kl_weight=3e-6, clip_range=1e-4,
        learning_rate=7e-6, prompts="prompts/hpdv2_train.json", dtype="bf16",
    ),
    "multi": dict(
        epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, kl_weight=3e-5, clip_range=1e-4,
        learning_rate=1e-5, prompts="prompts/pickapic_train.jsonl", reward="pickscore=10,hpsv2=2,aesthetic=0.05", dtype="bf16",
    ),
    "toy": dict(
        epochs=20, updates_per_epoch=4, prompts_per_epoch=8, images_per_prompt=8, kl_weight=3e-5, clip_range=1e-3,
        ddpm_steps=10, learning_rate=1e-4, model="toy/sd", reward="pickscore:toy/pickscore", prompts="prompts/shapes.txt",
        microbatch=64, sample_every=5,
    ),
}  # fmt: skip
HERE = Path(__file__).resolve().parent


def parse_args(argv: list[str]) -> Config:
    """The command line, over the preset, over the defaults. Paths of a preset are found from any working directory."""
    parser = argparse.ArgumentParser(
        description="PRDP: reward finetuning of Stable Diffusion.", argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in dataclasses.fields(Config):
        options = {"type": type(f.default), **f.metadata}
        default = f" (default: {f.default})" if f.default != "" else ""
        parser.add_argument("--" + f.name.replace("_", "-"), **{**options, "help": options["help"] + default})
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if set(given) > {"resume"}:
            raise InputError("--resume takes its settings from the run folder: leave out the other flags.")
        path = Path(given["resume"]) / "config.json"
        if not path.is_file():
            raise InputError(f"--resume {given['resume']}: no config.json there, so it is no run folder.")
        return Config(**{**json.loads(path.read_text()), "resume": given["resume"], "out": given["resume"]})
    preset = given.get("preset", "small")
    config = Config(**{**dict(out=f"runs/{preset}"), **PRESETS[preset], **given})
    if preset == "toy":
        local = {k: PRESETS["toy"][k] for k in ("model", "prompts") if k not in given}
        config = dataclasses.replace(config, **{k: str(HERE / v) for k, v in local.items()})
        if "reward" not in given:
            config.reward = f"pickscore:{HERE / 'toy' / 'pickscore'}"
    elif "prompts" not in given and preset == "small":
        config.prompts = str(HERE / config.prompts)
    return check_config(config)


def check_config(config: Config) -> Config:
    """Refuse settings that cannot run, before anything is loaded."""
    at_least = dict(
        epochs=1, updates_per_epoch=1, prompts_per_epoch=1, images_per_prompt=2, ddpm_steps=1, microbatch=1, save_every=1,
        sample_every=1, seed=0, weight_decay=0, guidance_scale=0,
    )  # fmt: skip
    for name, low in at_least.items():
        if not getattr(config, name) >= low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {low}.")
    for name in ("kl_weight", "clip_range", "learning_rate", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be greater than 0.")
    images = config.prompts_per_epoch * config.images_per_prompt
    if images % config.microbatch:
        raise InputError(f"--microbatch {config.microbatch}: must divide the {images} images of an epoch (N*B).")
    return config


# ------------------------------------------------------------------------------------------------------------------------
# 2. The policy: DDPM ancestral sampling as a chain of Gaussians (Sec. 2)
# ------------------------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """pi(x_{t-1} | x_t, c) = N(coef_sample * x_t + coef_noise * noise_pred, sigma^2), in sampling order; each (T,)."""

    timesteps: Tensor  # int64, e.g. 981, 961, ..., 1
    coef_sample: Tensor  # float64
    coef_noise: Tensor  # float64
    sigma: Tensor  # float64, > 0


def ddpm_schedule(scheduler_config: dict, num_steps: int) -> Schedule:
    """Coefficients of Eq. 2 for DDPM ancestral sampling (Ho et al. 2020, Eqs. 6, 7 and 11), equal to DDIM with eta = 1.

    Reads a diffusers `scheduler_config`: the noise schedule and whether the network predicts noise or v. The steps are
    "leading"-spaced and alpha-bar after the last one is alphas_cumprod[0], as Stable Diffusion is configured.
    Raises InputError for a schedule of another kind, or one with sigma == 0, whose log-probabilities do not exist.
    """
    steps = scheduler_config.get("num_train_timesteps", 1000)
    start, end = scheduler_config.get("beta_start", 0.00085), scheduler_config.get("beta_end", 0.012)
    kind, predicts = scheduler_config.get("beta_schedule", "scaled_linear"), scheduler_config.get("prediction_type", "epsilon")
    if scheduler_config.get("trained_betas") is not None:
        betas = torch.tensor(scheduler_config["trained_betas"], dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise InputError(f"beta_schedule {kind!r} of the model's scheduler is not supported: use scaled_linear or linear.")
    if scheduler_config.get("rescale_betas_zero_snr"):
        raise InputError("rescale_betas_zero_snr of the model's scheduler is not supported.")
    if not 1 <= num_steps <= steps:
        raise InputError(f"--ddpm-steps {num_steps}: must lie between 1 and the model's {steps} training steps.")

    stride = steps // num_steps
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + scheduler_config.get("steps_offset", 1)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    final = 1.0 if scheduler_config.get("set_alpha_to_one", False) else alphas_cumprod[0].item()
    if timesteps[0] >= steps:
        raise InputError(f"steps_offset {scheduler_config['steps_offset']} of the model's scheduler reaches past its last step.")
    previous = timesteps - stride
    bar = alphas_cumprod[timesteps]  # alpha-bar_t
    bar_previous = torch.where(previous >= 0, alphas_cumprod[previous.clamp(min=0)], final)
    alpha = bar / bar_previous
    sigma = ((1 - bar_previous) / (1 - bar) * (1 - alpha)).clamp(min=0).sqrt()
    if not (sigma > 0).all():
        raise InputError(
            f"the model's scheduler gives sigma = 0 at t = {timesteps[sigma <= 0][0]}, where log-probabilities do not exist: "
            "set steps_offset to 1 and set_alpha_to_one to false in scheduler_config.json."
        )
    if predicts == "epsilon":
        coef_sample, coef_noise = alpha.rsqrt(), -(1 - alpha) / ((1 - bar) * alpha).sqrt()
    elif predicts == "v_prediction":  # epsilon = sqrt(bar) * v + sqrt(1 - bar) * x_t, put into the line above
        coef_sample, coef_noise = alpha.sqrt(), -(1 - alpha) * (bar / ((1 - bar) * alpha)).sqrt()
    else:
        raise InputError(f"prediction_type {predicts!r} of the model's scheduler is not supported: epsilon or v_prediction.")
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(sample; mean, sigma^2 I) of Eqs. 2 and 4, as the mean over latent dimensions: (M, ...), (M, ...), (M,) -> (M,).

    float64 whatever comes in: near the last step a log-prob is about 2.5, where float32 numbers lie 2.4e-7 apart, a quarter
    of the smallest clip_range in Table 4. Summed over 4*64*64 dimensions the numbers would be near 8,192 and far worse.
    """
    assert sample.shape == mean.shape and sigma.shape == sample.shape[:1], (sample.shape, mean.shape, sigma.shape)
    sigma = sigma.double()
    squared = (sample.double() - mean.double()).square().flatten(1).mean(1)
    return -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network, the schedule it walks, and how it is run. The reference policy differs in `unet` alone."""

    unet: nn.Module  # (sample (M, C, H, W), timestep (M,), text (M, L, D)) -> an object with .sample (M, C, H, W)
    schedule: Schedule
    null_text: Tensor  # (L, D), embedding of the empty prompt
    guidance_scale: float = 5.0
    microbatch: int = 16
    autocast: torch.dtype | None = None  # None: the passes run in the weights' own dtype


def guided_noise_pred(policy: Policy, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Classifier-free guidance (Sec. 4.1), both branches in one pass, both with gradient: (M, C, H, W), (M,), (M, L, D)."""
    text = torch.cat([policy.null_text.expand_as(text), text])  # (2M, L, D)
    with torch.autocast(sample.device.type, policy.autocast, enabled=policy.autocast is not None):
        noise_pred = policy.unet(torch.cat([sample, sample]), timestep.repeat(2), encoder_hidden_states=text).sample
    unconditional, conditional = noise_pred.double().chunk(2)
    return unconditional + policy.guidance_scale * (conditional - unconditional)


def denoising_gaussian(policy: Policy, sample: Tensor, text: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (M, C, H, W) and sigma (M,) of Eq. 2, float64; `steps` (M,) counts along the trajectory and may differ by row."""
    schedule = policy.schedule
    noise_pred = guided_noise_pred(policy, sample, schedule.timesteps[steps], text)
    coef_sample, coef_noise = (c[steps].view(-1, 1, 1, 1) for c in (schedule.coef_sample, schedule.coef_noise))
    return coef_sample * sample.double() + coef_noise * noise_pred, schedule.sigma[steps]


# ------------------------------------------------------------------------------------------------------------------------
# 3. Trajectories: sampling and scoring (Eqs. 1 to 4; Alg. 1, line 6)
# ------------------------------------------------------------------------------------------------------------------------


class Trajectories(NamedTuple):
    """Denoising trajectories of M images under the policy that drew them."""

    latents: Tensor  # (M, T+1, C, H, W), float32: x_T, ..., x_0
    log_probs: Tensor  # (M, T), float64
    text: Tensor  # (M, L, D), the prompt's embedding, once per image


def image_generators(seed: int, epoch: int, prompts: int, images: int) -> list[torch.Generator]:
    """One CPU generator per image, so that its noise depends neither on the microbatch, nor the device, nor other images."""

    def key(prompt: int, image: int) -> int:
        digest = hashlib.sha256(f"{seed} {epoch} {prompt} {image}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    return [torch.Generator().manual_seed(key(n, i)) for n in range(prompts) for i in range(images)]


@torch.no_grad()
def sample_trajectories(policy: Policy, text: Tensor, generators: list[torch.Generator], shape: tuple, label="sample") -> Trajectories:
    """Draw x_T, ..., x_0 by ancestral sampling (Eq. 1; Alg. 1, line 6) with the log-prob of every step.

    text (M, L, D), one generator per image, shape (C, H, W). Latents are rounded to float32 *before* they are scored: the
    log-prob is that of the stored tensor, so that scoring it again under the same weights gives the same bits.
    """
    images, steps, device = len(text), len(policy.schedule.timesteps), text.device
    assert len(generators) == images, (len(generators), text.shape)

    def noise(rows: slice) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators[rows]]).to(device)

    latents = torch.empty(images, steps + 1, *shape, device=device)
    log_probs = torch.empty(images, steps, dtype=torch.float64, device=device)
    with progress(label, images * steps) as bar:
        for rows in microbatches(images, policy.microbatch):
            latents[rows, 0] = noise(rows)
            for k in range(steps):
                step = torch.full((len(text[rows]),), k, device=device)
                mean, sigma = denoising_gaussian(policy, latents[rows, k], text[rows], step)
                latents[rows, k + 1] = mean + sigma.view(-1, 1, 1, 1) * noise(rows)
                log_probs[rows, k] = gaussian_log_prob(latents[rows, k + 1], mean, sigma)
                bar.update(len(step))
    return Trajectories(latents, log_probs, text)


@torch.no_grad()
def score_trajectories(policy: Policy, trajectories: Trajectories, label="score") -> Tensor:
    """log pi(x_{t-1} | x_t, c) of stored trajectories under a policy (Eqs. 2 and 4): (M, T) float64.

    Runs in the microbatches, shapes and order of `sample_trajectories`: under unchanged weights it returns the very bits of
    `trajectories.log_probs`. Anything else would move log-probs by more than the clip range.
    """
    log_probs = torch.empty_like(trajectories.log_probs)
    with progress(label, log_probs.numel()) as bar:
        for rows in microbatches(len(log_probs), policy.microbatch):
            for k in range(log_probs.shape[1]):
                step = torch.full((len(log_probs[rows]),), k, device=log_probs.device)
                log_probs[rows, k] = step_log_prob(policy, trajectories, torch.arange(len(log_probs), device=step.device)[rows], step)
                bar.update(len(step))
    return log_probs


def step_log_prob(policy: Policy, trajectories: Trajectories, images: Tensor, steps: Tensor) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) (Eq. 2) of steps `steps` (M',) of images `images` (M',), with gradient: (M',) float64."""
    latents, text = trajectories.latents, trajectories.text
    mean, sigma = denoising_gaussian(policy, latents[images, steps], text[images], steps)
    return gaussian_log_prob(latents[images, steps + 1], mean, sigma)


# ------------------------------------------------------------------------------------------------------------------------
# 4. The loss: reward difference prediction with proximal updates (Secs. 3.1 and 3.3, App. G)
# ------------------------------------------------------------------------------------------------------------------------


def prdp_loss(
    log_probs: Tensor,  # (..., B, T), under pi_theta; carries the gradient
    log_probs_old: Tensor,  # (..., B, T), under pi_theta_old, which drew the trajectories
    log_probs_ref: Tensor,  # (..., B, T), under pi_ref
    rewards: Tensor,  # (..., B)
    clip_range: float,  # epsilon of Eq. 20, in units of log_probs; inf gives the plain RDP loss of Eq. 14
    kl_weight: float,  # beta
) -> Tensor:
    """PRDP loss, Eqs. 10 to 14 and 17 to 21 as App. G computes them: a scalar.

    B trajectories share a prompt; leading dimensions are prompts. Per prompt, the mean over pairs with different rewards
    (each pair once); 0 where all rewards tie; then the mean over prompts.
    """
    log_ratio = log_probs - log_probs_ref  # Eq. 19
    log_ratio_old = log_probs_old - log_probs_ref
    clipped_log_ratio = torch.clamp(log_ratio, log_ratio_old - clip_range, log_ratio_old + clip_range)  # Eq. 20

    def pairwise_difference(x: Tensor) -> Tensor:
        return x.unsqueeze(-1) - x.unsqueeze(-2)  # (..., B) -> (..., B, B), entry [a, b] is x_a - x_b

    reward_diff = pairwise_difference(rewards.to(log_probs.dtype))  # Eq. 12
    log_ratio_diff = pairwise_difference(log_ratio.mean(-1))  # Eqs. 10 and 11, with App. G's mean over T
    clipped_log_ratio_diff = pairwise_difference(clipped_log_ratio.mean(-1))  # Eq. 21

    error = (log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 14
    clipped_error = (clipped_log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 17
    untied = reward_diff > 0
    loss = torch.where(untied, torch.maximum(error, clipped_error), 0.0)  # Eq. 18
    return (loss.sum((-2, -1)) / untied.sum((-2, -1)).clamp(min=1)).mean()


# ------------------------------------------------------------------------------------------------------------------------
# 5. Exact gradients through T steps and all pairs, in the memory of one microbatch
# ------------------------------------------------------------------------------------------------------------------------


def backward_trajectories(policy: Policy, trajectories: Trajectories, weights: Tensor, label="update") -> None:
    """Gradient of the loss (Alg. 1, line 11) by the chain rule: adds sum(weights * dlog_prob/dtheta) to each `.grad`.

    The loss squares a mean over T and pairs B images, so plain backpropagation would hold the graphs of all B*T network
    passes. But it sees the network only through the small matrix log_probs (M, T); weights = dloss/dlog_probs are that
    matrix's gradient, and then each microbatch of entries can be run again alone. Exact, whatever its composition: only
    derivatives are taken here, no value is compared with one of another pass. Entries whose weight is 0 (clipped in every
    pair that matters, Eq. 18) are skipped, steps of different images and times share a microbatch.
    """
    assert weights.shape == trajectories.log_probs.shape, (weights.shape, trajectories.log_probs.shape)
    # In fp16, gradients of a mean over C*H*W dimensions would underflow. A power of two scales them exactly.
    scale = 1.0
    if policy.autocast == torch.float16 and weights.any():
        scale = 2.0 ** round(math.log2(trajectories.latents[0, 0].numel() / weights.abs().max().item()))
    entries = weights.nonzero()  # (entries, 2): image, step
    with progress(label, len(entries)) as bar:
        for images, steps in (chunk.unbind(1) for chunk in entries.split(policy.microbatch)):
            log_prob = step_log_prob(policy, trajectories, images, steps)
            (scale * weights[images, steps] * log_prob).sum().backward()
            bar.update(len(images))
    if scale != 1:
        torch._foreach_div_([p.grad for p in policy.unet.parameters() if p.grad is not None], scale)


# ------------------------------------------------------------------------------------------------------------------------
# 6. Online optimisation (Sec. 3.2, Algorithm 1)
# ------------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What an epoch learns from: N prompts, B images each."""

    prompts: list[str]  # N
    trajectories: Trajectories  # M = N*B images
    log_probs_ref: Tensor  # (M, T)
    images: Tensor  # (M, 3, H, W) uint8
    rewards: Tensor  # (M,) float32


def collect(config: Config, models: Models, epoch: int, prompts: list[str], seconds: dict) -> Batch:
    """Alg. 1, lines 5 to 8: B trajectories for each prompt, their log-probs under pi_ref, and their rewards."""
    with timed(seconds, "sample"):
        trajectories = sample_for(config, models, models.policy, prompts, epoch)
    with timed(seconds, "reference"):  # in the first epoch the policy still is the reference
        log_probs_ref = trajectories.log_probs
        if epoch > 1:
            log_probs_ref = score_trajectories(models.reference, trajectories, "reference")
    with timed(seconds, "reward"):
        images = decode(models, trajectories.latents[:, -1])
        rewards = score_images(config, models, images, prompts, epoch)
    return Batch(prompts, trajectories, log_probs_ref, images, rewards)


def train(config: Config, models: Models, optimizer: torch.optim.Optimizer, prompts: list[str], start: int) -> None:
    """Algorithm 1. Line 1 (pi_theta <- pi_ref) is `load_models`; line 3 (the snapshot theta_old) is log_probs_old."""
    policy = models.policy
    groups = (config.prompts_per_epoch, config.images_per_prompt)  # (N, B): the loss pairs images of one prompt
    for epoch in range(start, config.epochs + 1):  # Alg. 1, line 2
        seconds: dict[str, float] = {}
        batch = collect(config, models, epoch, draw_prompts(config, prompts, epoch), seconds)  # lines 3 to 8
        log_probs_old = batch.trajectories.log_probs
        fixed = [x.unflatten(0, groups) for x in (log_probs_old, batch.log_probs_ref, batch.rewards)]
        updates = []
        for k in range(config.updates_per_epoch):  # line 9
            with timed(seconds, "score"):  # at k = 0, theta = theta_old: these are log_probs_old already
                log_probs = score_trajectories(policy, batch.trajectories) if k else log_probs_old.clone()
            log_probs.requires_grad_()
            loss = prdp_loss(log_probs.unflatten(0, groups), *fixed, config.clip_range, config.kl_weight)  # line 10
            (weights,) = torch.autograd.grad(loss, log_probs)
            with timed(seconds, "update"):
                backward_trajectories(policy, batch.trajectories, weights)  # line 11
                grad_norm = nn.utils.clip_grad_norm_(policy.unet.parameters(), config.max_grad_norm)
                require_finite(epoch, loss=loss, gradient=grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            unclipped = prdp_loss(log_probs.detach().unflatten(0, groups), *fixed, math.inf, config.kl_weight)  # Eq. 14
            updates.append(update_metrics(log_probs.detach(), log_probs_old, weights, loss, unclipped, grad_norm, config.clip_range))
        metrics = epoch_metrics(epoch, batch, updates, seconds)
        if epoch % config.sample_every == 0 or epoch == config.epochs:
            images, rewards = sample_fixed(config, models, policy, prompts)
            metrics["sample_reward_mean"], metrics["sample_reward_std"] = rewards.mean().item(), rewards.std().item()
            save_samples(config, epoch, images, rewards, fixed_prompts(config, prompts))
        log_epoch(config, metrics)
        if epoch % config.save_every == 0 or epoch == config.epochs:
            save_checkpoint(config, policy.unet, optimizer, epoch)


def update_metrics(log_probs, log_probs_old, weights, loss, unclipped, grad_norm, clip_range: float) -> dict[str, float]:
    """Diagnostics of one gradient update, before it is applied; all (M, T) or scalar tensors."""
    moved = (log_probs - log_probs_old).abs()
    return {
        "loss": loss.item(),
        "loss_unclipped": unclipped.item(),
        "clip_fraction": (moved > clip_range).double().mean().item(),
        "skipped_fraction": (weights == 0).double().mean().item(),
        "log_ratio_old": moved.mean().item(),
        "grad_norm": grad_norm.item(),
    }


def epoch_metrics(epoch: int, batch: Batch, updates: list[dict], seconds: dict[str, float]) -> dict[str, float]:
    """One line of metrics.jsonl; the README defines each field. Figures of updates are means over the K updates."""
    images = len(batch.rewards)
    return {
        "epoch": epoch,
        "reward_mean": batch.rewards.mean().item(),
        "reward_std": batch.rewards.std().item(),
        **{name: sum(u[name] for u in updates) / len(updates) for name in updates[0]},
        "log_ratio_ref": (batch.trajectories.log_probs - batch.log_probs_ref).mean().item(),
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "images_per_second": images / sum(seconds.values()),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if batch.rewards.is_cuda else 0.0,
    }


# ------------------------------------------------------------------------------------------------------------------------
# 7. Plumbing: the models, the prompts, the reward
# ------------------------------------------------------------------------------------------------------------------------


class Models(NamedTuple):
    """Everything with weights. `pipe` is the diffusers pipeline whose UNet is the policy's."""

    pipe: object  # StableDiffusionPipeline: tokenizer, frozen text encoder and VAE
    policy: Policy
    reference: Policy
    reward: Callable[[Tensor, list[str]], Tensor]
    latent_shape: tuple[int, int, int]


def load_models(config: Config, device: torch.device) -> Models:
    """Load the pipeline and make the policy and the frozen reference from it (Alg. 1, line 1)."""
    from diffusers import StableDiffusionPipeline

    reward = load_reward(config.reward, device)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            config.model, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        if Path(config.model).is_dir():
            raise InputError(f"--model {config.model}: not a Stable Diffusion folder in diffusers layout ({error}).") from error
        raise InputError(
            f"--model {config.model}: no such folder, not in the local cache, and the hub cannot be reached or does not have it; "
            "without a network, run --preset toy."
        ) from error
    pipe.to(device)
    unet, vae = pipe.unet, pipe.vae
    if unet.config.in_channels != vae.config.latent_channels:
        raise InputError(
            f"--model {config.model}: its UNet takes {unet.config.in_channels} channels and its VAE makes "
            f"{vae.config.latent_channels}; only text-to-image models can be finetuned."
        )
    for frozen in (vae, pipe.text_encoder):
        frozen.requires_grad_(False).eval()
    unet.requires_grad_(True).eval()  # eval: dropout would make every pass another policy
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    reference = copy.deepcopy(unet).requires_grad_(False)
    for layer in reference.modules():
        # Autocast would cast these weights at every pass; cast once, the values are the same bits in half the memory.
        if autocast is not None and isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(autocast)
    schedule = Schedule(*(column.to(device) for column in ddpm_schedule(pipe.scheduler.config, config.ddpm_steps)))
    policy = Policy(unet, schedule, encode(pipe, [""])[0], config.guidance_scale, config.microbatch, autocast)
    size = unet.config.sample_size
    shape = (unet.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
    return Models(pipe, policy, policy._replace(unet=reference), reward, shape)


@torch.no_grad()
def encode(pipe, prompts: list[str]) -> Tensor:
    """Text embeddings (len(prompts), L, D), as the pipeline itself makes them."""
    return pipe.encode_prompt(prompts, pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """x_0 latents (M, C, H, W) -> uint8 images (M, 3, 8H, 8W), rounded once: rewards see what a PNG file would hold."""
    vae, policy, images = models.pipe.vae, models.policy, []
    for rows in microbatches(len(latents), policy.microbatch):
        with torch.autocast(latents.device.type, policy.autocast, enabled=policy.autocast is not None):
            decoded = vae.decode(latents[rows] / vae.config.scaling_factor).sample
        images.append(((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images)


def sample_for(config: Config, models: Models, policy: Policy, prompts: list[str], epoch: int) -> Trajectories:
    """B trajectories for each prompt (Alg. 1, lines 5 to 7)."""
    text = encode(models.pipe, prompts).repeat_interleave(config.images_per_prompt, dim=0)
    generators = image_generators(config.seed, epoch, len(prompts), config.images_per_prompt)
    return sample_trajectories(policy, text, generators, models.latent_shape)


def score_images(config: Config, models: Models, images: Tensor, prompts: list[str], epoch: int) -> Tensor:
    """Rewards (M,) of B images for each prompt; a reward that is not a finite number stops the run here, before any update."""
    each = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
    rewards = models.reward(images, each)
    if not rewards.isfinite().all():
        bad = (~rewards.isfinite()).nonzero()[0].item()
        raise InputError(f"reward {config.reward}: returned {rewards[bad]} for the prompt {each[bad]!r} in epoch {epoch}.")
    return rewards


def draw_prompts(config: Config, prompts: list[str], epoch: int) -> list[str]:
    """N prompts, independent and uniform (Alg. 1, line 4); a function of seed and epoch alone."""
    (generator,) = image_generators(config.seed, -epoch, 1, 1)
    return [prompts[i] for i in torch.randint(len(prompts), (config.prompts_per_epoch,), generator=generator)]


def load_prompts(path: str) -> list[str]:
    """Prompts of a .txt (a line each; # and blank lines skipped), .json or .jsonl file (strings, or objects with a "prompt"
    or "caption" field), in order, repeats dropped."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--prompts {path}: no such file.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            records = json.loads(text)
        elif file.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read as {file.suffix or 'text'}: {error}.") from error
    if not isinstance(records, list):
        raise InputError(f"--prompts {path}: must hold a list of prompts.")
    prompts = [r.get("prompt", r.get("caption")) if isinstance(r, dict) else r for r in records]
    if wrong := [i for i, p in enumerate(prompts) if not isinstance(p, str)]:
        raise InputError(f'--prompts {path}: entry {wrong[0] + 1} is neither a string nor an object with a "prompt".')
    prompts = list(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    if not prompts:
        raise InputError(f"--prompts {path}: holds no prompt.")
    return prompts


def microbatches(images: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def progress(label: str, total: int):
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(total=total, desc=f"{label:>9}", unit="step", leave=False, disable=None, dynamic_ncols=True)


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Add the wall-clock time of the block to seconds[name]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def require_finite(epoch: int, **values: Tensor) -> None:
    for name, value in values.items():
        if not value.isfinite():
            raise InputError(f"the {name} of epoch {epoch} is {value.item()}: stopped before the update was applied.")


def check_on_policy(models: Models, trajectories: Trajectories) -> None:
    """Score one freshly drawn microbatch again, under the policy and the reference: both must return the very same bits.

    Every clip of Eq. 20 compares two passes over one trajectory, to 1e-6. If an unchanged network does not reproduce its own
    log-probs, the clip acts on noise, and the run is worth nothing.
    """
    first = Trajectories(*(x[: models.policy.microbatch] for x in trajectories))
    for name, policy in (("policy", models.policy), ("reference", models.reference)):
        gap = (score_trajectories(policy, first, "check") - first.log_probs).abs().max().item()
        print(f"on-policy gap ({name}): {gap:.1e}")
        if gap != 0:
            raise InputError(
                f"the {name} moves its own log-probs by {gap:.1e} when it scores a trajectory again, so clipping would act on "
                "noise: switch off nondeterministic kernels (torch.backends.cudnn.benchmark), or try --dtype fp32."
            )


# ------------------------------------------------------------------------------------------------------------------------
# 8. Samples, metrics, checkpoints
# ------------------------------------------------------------------------------------------------------------------------


def fixed_prompts(config: Config, prompts: list[str]) -> list[str]:
    """N prompts spread evenly over the file, the same all through a run."""
    return [prompts[n * len(prompts) // config.prompts_per_epoch] for n in range(config.prompts_per_epoch)]


def sample_fixed(config: Config, models: Models, policy: Policy, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Images (M, 3, H, W) and rewards (M,) for fixed prompts and seeds, those of epoch 0, which is never trained on."""
    prompts = fixed_prompts(config, prompts)
    images = decode(models, sample_for(config, models, policy, prompts, epoch=0).latents[:, -1])
    return images, score_images(config, models, images, prompts, epoch=0)


def save_samples(config: Config, epoch: int, images: Tensor, rewards: Tensor, prompts: list[str]) -> None:
    """samples/epoch_NNNN.png, a grid with a row for each of the first 8 prompts, and .json with every reward."""
    from PIL import Image

    rows, columns = min(8, len(prompts)), min(8, config.images_per_prompt)
    grid = images.unflatten(0, (len(prompts), -1))[:rows, :columns].permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    height, width = images.shape[-2:]
    folder = Path(config.out) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.reshape(rows * height, columns * width, 3).cpu().numpy()).save(folder / f"epoch_{epoch:04d}.png")
    table = [{"prompt": p, "rewards": r} for p, r in zip(prompts, rewards.unflatten(0, (len(prompts), -1)).tolist(), strict=True)]
    (folder / f"epoch_{epoch:04d}.json").write_text(json.dumps(table, indent=1))


COLUMNS = ("epoch", "reward_mean", "reward_std", "loss", "clip_fraction", "skipped_fraction", "log_ratio_old", "log_ratio_ref",
           "grad_norm", "images_per_second")  # fmt: skip


def log_epoch(config: Config, metrics: dict[str, float]) -> None:
    """A line on the screen, a line in metrics.jsonl, and reward.png drawn again."""
    if metrics["epoch"] % 20 == 1:
        print("".join(f"{name:>17}" for name in COLUMNS))
    print("".join(f"{metrics[name]:>17.5g}" for name in COLUMNS), flush=True)
    with open(Path(config.out) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    plot_rewards(config)


def plot_rewards(config: Config) -> None:
    """reward.png: mean and standard deviation of each epoch's rewards, and the mean over the fixed samples."""
    from matplotlib.figure import Figure

    folder = Path(config.out)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs, mean, std = ([row[name] for row in rows] for name in ("epoch", "reward_mean", "reward_std"))
    samples = [(int(p.stem[-4:]), [r for row in json.loads(p.read_text()) for r in row["rewards"]])
               for p in sorted((folder / "samples").glob("*.json"))]  # fmt: skip
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(epochs, *zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True), alpha=0.15, lw=0)
    axes.plot(epochs, mean, label="training images, mean and standard deviation")
    axes.plot([e for e, _ in samples], [sum(r) / len(r) for _, r in samples], "o", label="fixed prompts and seeds, mean")
    axes.set(xlabel="epoch", ylabel=f"reward ({Path(config.reward).name})")
    axes.legend(frameon=False)
    figure.savefig(folder / "reward.png", dpi=120)


def plot_before_after(config: Config, prompts: list[str], before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    """before_after.png: the first images of 8 prompts, the base model's above, the finetuned model's below, same seeds."""
    from matplotlib.figure import Figure

    columns, blocks = min(8, len(prompts)), min(2, config.images_per_prompt)
    figure = Figure(figsize=(1.5 * columns + 0.6, 3.7 * blocks), layout="constrained")
    for block, part in enumerate(figure.subfigures(blocks, 1, squeeze=False)[:, 0]):
        axes = part.subplots(2, columns, squeeze=False)
        for n in range(columns):
            image = n * config.images_per_prompt + block
            for row, (images, rewards) in enumerate((before, after)):
                axes[row, n].imshow(images[image].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
                axes[row, n].set(xticks=[], yticks=[])
                axes[row, n].set_xlabel(f"{rewards[image]:.4g}", fontsize=9, labelpad=2)
            axes[0, n].set_title(textwrap.shorten("\n".join(textwrap.wrap(prompts[n], 20)), 120), fontsize=8)
        axes[0, 0].set_ylabel("base")
        axes[1, 0].set_ylabel("finetuned")
    figure.savefig(Path(config.out) / "before_after.png", dpi=120)


def save_checkpoint(config: Config, unet: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """checkpoint/state.pt, replaced in one step. Noise and prompts are functions of (seed, epoch), so no RNG state is needed."""
    path = Path(config.out) / "checkpoint" / "state.pt"
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save({"epoch": epoch, "unet": unet.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(config: Config, unet: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the state of the last checkpoint, drop metrics of later epochs, and return the epoch to go on with."""
    path = Path(config.out) / "checkpoint" / "state.pt"
    if not path.is_file():
        return 1
    state = torch.load(path, map_location="cpu", weights_only=True)
    unet.load_state_dict(state["unet"])
    optimizer.load_state_dict(state["optimizer"])
    metrics = Path(config.out) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines[: state["epoch"]]))
    return state["epoch"] + 1


def save_pipeline(config: Config, models: Models) -> None:
    """pipeline/, for StableDiffusionPipeline.from_pretrained; `pipe(prompt, eta=1.0)` draws from the trained policy."""
    from diffusers import DDIMScheduler

    pipe = models.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", clip_sample=False)
    pipe.save_pretrained(Path(config.out) / "pipeline")


# ------------------------------------------------------------------------------------------------------------------------
# 9. main
# ------------------------------------------------------------------------------------------------------------------------


def run(config: Config) -> None:
    """Train from the first epoch or the last checkpoint, then show what changed."""
    out = Path(config.out)
    prompts = load_prompts(config.prompts)
    if not config.resume and out.exists() and any(out.iterdir()):
        raise InputError(f"--out {config.out}: already holds a run; choose another folder, or go on with --resume {config.out}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(config, device)
    unet = models.policy.unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    size = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"{config.model} on {device}: UNet of {size:.1f} M parameters, passes in {config.dtype}; reward {config.reward}; {len(prompts)} prompts")

    check_on_policy(models, sample_for(config, models, models.reference, fixed_prompts(config, prompts), epoch=0))
    before = sample_fixed(config, models, models.reference, prompts)
    start = 1
    if config.resume:
        start = load_checkpoint(config, unet, optimizer)
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        save_samples(config, 0, *before, fixed_prompts(config, prompts))
    train(config, models, optimizer, prompts, start)

    after = sample_fixed(config, models, models.policy, prompts)
    plot_before_after(config, fixed_prompts(config, prompts), before, after)
    save_pipeline(config, models)
    gain = (after[1] - before[1]).double()
    error = gain.std() / len(gain) ** 0.5
    print(
        f"reward on {len(gain)} fixed images: {before[1].mean():.4f} -> {after[1].mean():.4f}, "
        f"a rise of {gain.mean():.4f} +- {error:.4f} ({gain.mean() / error:.1f} standard errors)\nsee {out}/before_after.png"
    )


def fail(message: str) -> None:
    print(f"prdp.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run(parse_args(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
