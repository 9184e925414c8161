"""PRDP: Proximal Reward Difference Prediction, for reward finetuning of diffusion models
(Deng et al., CVPR 2024). Read it beside the paper: each heading names its part of it.

    python prdp.py --preset toy                                  # a small model: no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt  # SD v1.4, one GPU, Table 4
    python prdp.py --resume runs/toy --epochs 40                 # go on with a run

Paper                   Here                Shape (M = N*B images)  Note
x_t                     latents[:, step]    (M, T+1, C, H, W)       step = T - t: from x_T on
log pi(x_{t-1}|x_t, c)  log_probs[:, step]  (M, T)                  divided by D (Units); float64
r-hat_t, Eq. 19         log_ratio           (..., B, T)             log_probs - log_probs_ref
r                       rewards             (..., B)                in the reward's own unit
beta of Table 4         kl_weight                                   `betas` is the noise schedule
epsilon of Table 4      clip_range                                  in the unit of log_probs
the network's output    noise_pred          (2M, C, H, W)           both branches; noise, or v

Units: Eq. 3 sums over T steps, Eq. 4 over D = C*H*W latent dimensions. App. G's code takes the mean
over T, and log_probs are means over D here: nats per latent dimension. Table 4 is read in these
units, where the beta of Eq. 5 is kl_weight / (T*D) and the epsilon of Eq. 20 clip_range * D.

Departures from the paper, and choices where it is silent (reasons, and two notes: docs/paper.md):
 1. The mean over T (App. G), where Eqs. 3 and 21 sum: sum_loss(beta) = T**2 * loss(beta * T).
 2. log_prob is a mean over latent dimensions, as in DDPO's code, whose clip range is 1e-4.
 3. The mean is over pairs whose rewards differ (App. G; Alg. 1, line 10: all); 0 if none do.
 4. Steps are "leading"-spaced, sigma_t is the posterior's, alpha-bar of x_0 is alphas_cumprod[0].
 5. The policy is the guided model, with the gradient through both branches.
 6. Passes in 16 bit on a GPU (--dtype), log-probs in float64. With K = 1 Eq. 20 changes nothing.
 7. --offline draws new images every epoch (51,200 in all by default); Sec. 4.3 draws them once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewards import Reward, load_reward, resolve_reward
from stable_diffusion import StableDiffusion, grey_picture, noise_settings
from support import machine, report, run_folder
from support.cli import UserError, flag
from support.distributed import average_gradients, draw_noise, gather, image_generators
from support.distributed import print0, processes, require_finite, shard, start_processes
from support.inputs import as_prompts, load_prompts
from support.report import Samples, epoch_metrics, phase
from support.settings import ROOT, model_path, parse_settings, prompt_paths, resolve
from support.settings import run_command

# ---- 1. The policy: DDPM ancestral sampling, a chain of Gaussians (Sec. 2) -----------------------


def guided_mean(
    noise_pred: Tensor,  # (2M, C, H, W), the unconditional branch first
    x_t: Tensor,  # (M, C, H, W)
    coef_sample: Tensor,  # (M,) float64
    coef_noise: Tensor,
    guidance_scale: float,
) -> Tensor:
    """mu_theta(x_t, c) of Eq. 2, under classifier-free guidance: (M, C, H, W) float64."""
    unconditional, conditional = noise_pred.double().chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    return coef_sample.view(-1, 1, 1, 1) * x_t.double() + coef_noise.view(-1, 1, 1, 1) * guided


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """log N(sample; mean, sigma^2 I) of Eqs. 2 and 4, a mean over latent dimensions: (M,) float64.

    sample, mean (M, ...), sigma (M,) or a number. float64, because at the last step a log-prob is
    about 2.5, where float32 numbers lie 2.4e-7 apart: a quarter of Table 4's clip_range of 1e-6."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=sample.device)
    assert sample.shape == mean.shape, (sample.shape, mean.shape)
    assert sigma.shape in ((), sample.shape[:1]), sigma.shape
    squared = (sample.double() - mean.double()).square().flatten(1).mean(1)
    return -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)


class Schedule(NamedTuple):
    """Eq. 2: N(coef_sample * x_t + coef_noise * guided, sigma^2 I); each (T,), from x_T on."""

    timesteps: Tensor  # int64: 981, 961, ..., 1 for T = 50
    coef_sample: Tensor  # float64
    coef_noise: Tensor  # float64
    sigma: Tensor  # float64, > 0


def ddpm_schedule(scheduler_config: dict, num_steps: int) -> Schedule:
    """The coefficients of Eq. 2 (Ho et al. 2020, Eqs. 6, 7, 11); the chain of DDIM with eta = 1.

    From a diffusers scheduler's config; spacing and end as Stable Diffusion's. UserError for
    another kind of schedule, and for sigma == 0, where log-probabilities do not exist."""
    config = noise_settings(scheduler_config)
    train_steps = config["num_train_timesteps"]
    power = {"scaled_linear": 2, "linear": 1}[config["beta_schedule"]]
    start = config["beta_start"] ** (1 / power)
    end = config["beta_end"] ** (1 / power)
    betas = torch.linspace(start, end, train_steps, dtype=torch.float64) ** power
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    stride = train_steps // num_steps  # "leading" spacing rounds down
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config["steps_offset"]
    if stride * num_steps < 0.8 * train_steps or timesteps[0] >= train_steps:
        raise UserError(f"--ddpm-steps {num_steps}: do not fit the model's {train_steps}; 50 do.")
    prev_timestep = timesteps - stride

    alpha_bar = alphas_cumprod[timesteps]  # of x_t
    alpha_bar_prev = alphas_cumprod[prev_timestep.clamp(min=0)]  # of x_{t-1}
    alpha = alpha_bar / alpha_bar_prev

    sigma = ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)).sqrt()
    if not (sigma > 0).all():
        raise UserError("--model: its schedule has a step of sigma = 0.")
    coef_sample = alpha.rsqrt()
    coef_noise = -(1 - alpha) / ((1 - alpha_bar) * alpha).sqrt()
    if config["prediction_type"] == "v_prediction":
        # noise = sqrt(alpha_bar) * v + sqrt(1 - alpha_bar) * x_t; x_t's part joins coef_sample.
        coef_sample = alpha.sqrt()
        coef_noise = coef_noise * alpha_bar.sqrt()
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network, and how it is run."""

    # (x_t (2M, C, H, W), timestep (2M,), encoder_hidden_states (2M, L, F)) -> .sample as x_t
    unet: Callable
    schedule: Schedule
    null_embeds: Tensor  # (L, F): the empty prompt's L tokens, F features
    guidance_scale: float = 5.0
    microbatch: int = 16
    # The number format, entered around passes: around many of them it casts each weight once.
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def coefficients(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """coef_sample, coef_noise and sigma of steps (M,), each (M,) float64."""
        _, coef_sample, coef_noise, sigma = self.schedule
        return coef_sample[steps], coef_noise[steps], sigma[steps]


def run_unet(policy: Policy, x_t: Tensor, prompt_embeds: Tensor, steps: Tensor) -> Tensor:
    """noise_pred (2M, C, H, W) of M images, each at its step; the unconditional branch first."""
    timesteps = policy.schedule.timesteps[steps]
    null_embeds = policy.null_embeds.expand_as(prompt_embeds)
    embeds = torch.cat([null_embeds, prompt_embeds])  # (2M, L, F)
    x_t = torch.cat([x_t, x_t])
    return policy.unet(x_t, timesteps.repeat(2), encoder_hidden_states=embeds).sample


# ---- 2. Trajectories: sampling and scoring (Eqs. 1 to 4) -----------------------------------------


def guided_log_prob(
    noise_pred: Tensor,  # (2M, C, H, W); it alone gets a gradient
    x_t: Tensor,  # (M, C, H, W) float32
    x_prev: Tensor,  # (M, C, H, W) float32: x_{t-1}
    coef_sample: Tensor,  # (M,) float64: each row may be at another step
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
) -> Tensor:
    """log pi(x_{t-1} | x_t, c) of Eqs. 2 and 4: (M,) float64, nats per latent dimension."""
    if kernels := machine.kernels_for(noise_pred):  # on a GPU: the two lines below in one pass
        return kernels.guided_log_prob(
            noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma, guidance_scale
        )
    mean = guided_mean(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    return gaussian_log_prob(x_prev, mean, sigma)


@torch.no_grad()
def guided_sample(
    noise_pred: Tensor,
    x_t: Tensor,
    noise: Tensor,  # (M, C, H, W), standard normal
    coef_sample: Tensor,
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} ~ N(mean, sigma^2 I) of Eq. 2, rounded to float32, and then its log-prob, bit for bit
    what `guided_log_prob` returns."""
    if kernels := machine.kernels_for(noise_pred):  # on a GPU: the three lines below in one pass
        return kernels.guided_sample(
            noise_pred, x_t, noise, coef_sample, coef_noise, sigma, guidance_scale
        )
    mean = guided_mean(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    x_prev = (mean + sigma.view(-1, 1, 1, 1) * noise).float()
    return x_prev, gaussian_log_prob(x_prev, mean, sigma)


class Trajectories(NamedTuple):
    """Denoising trajectories of M images, and their log-probs under the policy that drew them."""

    latents: Tensor  # (M, T+1, C, H, W) float32: x_T, ..., x_0
    log_probs: Tensor  # (M, T) float64
    prompt_embeds: Tensor  # (M, L, F)


@torch.no_grad()
def sample_trajectories(
    policy: Policy,
    prompt_embeds: Tensor,  # (M, L, F)
    generators: list,  # one for each image
    shape: tuple,  # (C, H, W)
) -> Trajectories:
    """Draw x_T, ..., x_0 by ancestral sampling (Eq. 1; Alg. 1, line 6), with each step's log-prob.

    Latents are rounded to float32 *before* they are scored: scoring what is stored, under the same
    weights in the same batches, gives the same bits."""
    num_images = len(generators)
    num_steps = len(policy.schedule.timesteps)
    device = prompt_embeds.device
    latents = torch.empty(num_images, num_steps + 1, *shape, device=device)
    log_probs = torch.empty(num_images, num_steps, dtype=torch.float64, device=device)

    with policy.autocast(), phase("sample"):
        for rows in torch.arange(num_images, device=device).split(policy.microbatch):
            # All noise at once, x_T and each step's: drawing at each step would stall a GPU.
            own = [generators[row] for row in rows.tolist()]
            noise = draw_noise(own, num_steps + 1, shape).to(device)  # (m, T+1, C, H, W)
            latents[rows, 0] = noise[:, 0]  # x_T

            # Each step draws x_{t-1} around the guided mean, and scores it.
            for step in range(num_steps):
                steps = torch.full_like(rows, step)
                x_t = latents[rows, step]
                noise_pred = run_unet(policy, x_t, prompt_embeds[rows], steps)
                gaussian = (*policy.coefficients(steps), policy.guidance_scale)
                x_prev, log_prob = guided_sample(noise_pred, x_t, noise[:, step + 1], *gaussian)
                latents[rows, step + 1] = x_prev
                log_probs[rows, step] = log_prob
    return Trajectories(latents, log_probs, prompt_embeds)


@torch.no_grad()
def score_trajectories(policy: Policy, trajectories: Trajectories, label: str = "score") -> Tensor:
    """log pi(x_{t-1} | x_t, c) of stored trajectories under a policy (Eqs. 2 to 4): (M, T) float64.

    In the batches and order of `sample_trajectories`: other batches can move log-probs by more than
    the clip range, and unchanged weights must reproduce them bit for bit."""
    log_probs = torch.empty_like(trajectories.log_probs)
    num_images, num_steps = log_probs.shape
    with policy.autocast(), phase(label):
        for rows in torch.arange(num_images, device=log_probs.device).split(policy.microbatch):
            for step in range(num_steps):
                steps = torch.full_like(rows, step)
                log_probs[rows, step] = step_log_prob(policy, trajectories, rows, steps)
    return log_probs


def step_log_prob(
    policy: Policy, trajectories: Trajectories, rows: Tensor, steps: Tensor
) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of images (m,) at steps (m,), with gradient: (m,)."""
    x_t = trajectories.latents[rows, steps]
    x_prev = trajectories.latents[rows, steps + 1]
    noise_pred = run_unet(policy, x_t, trajectories.prompt_embeds[rows], steps)
    gaussian = (*policy.coefficients(steps), policy.guidance_scale)
    return guided_log_prob(noise_pred, x_t, x_prev, *gaussian)


# ---- 3. The loss: reward difference prediction, proximal updates (Secs. 3.1 and 3.3, App. G) -----


def prdp_loss(
    log_probs: Tensor,  # (..., B, T), under pi_theta; carries the gradient
    log_probs_old: Tensor,  # (..., B, T), under pi_theta_old, theta as the epoch begins
    log_probs_ref: Tensor,  # (..., B, T), under pi_ref
    rewards: Tensor,  # (..., B)
    clip_range: float,  # epsilon of Eq. 20, in the unit of log_probs; inf: Eq. 14
    kl_weight: float,  # beta of Table 4
) -> Tensor:
    """The PRDP loss of Eqs. 10 to 12, 14 and 17 to 21, as App. G computes it: a scalar.

    The B trajectories share a prompt; leading dimensions are prompts. Per prompt, the mean over
    pairs whose rewards differ (each once; 0 if all rewards tie), then the mean over prompts."""
    assert rewards.shape == log_probs.shape[:-1], rewards.shape
    log_ratio = log_probs - log_probs_ref  # Eq. 19
    log_ratio_old = log_probs_old - log_probs_ref
    clipped_log_ratio = torch.clamp(  # Eq. 20
        log_ratio, log_ratio_old - clip_range, log_ratio_old + clip_range
    )

    def pairwise_diff(x: Tensor) -> Tensor:
        return x.unsqueeze(-1) - x.unsqueeze(-2)  # [..., a, b] is x_a - x_b

    log_ratio_diff = pairwise_diff(log_ratio.mean(-1))  # Eqs. 10 and 11; App. G's mean
    clipped_log_ratio_diff = pairwise_diff(clipped_log_ratio.mean(-1))  # Eqs. 21 and 17
    reward_diff = pairwise_diff(rewards.to(log_probs.dtype))  # Eq. 12

    error = (log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 14
    clipped_error = (clipped_log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 17
    untied = reward_diff > 0  # each pair whose rewards differ, once
    loss = torch.where(untied, torch.maximum(error, clipped_error), 0.0)  # Eq. 18
    return (loss.sum((-2, -1)) / untied.sum((-2, -1)).clamp(min=1)).mean()


# ---- 4. Exact gradients, through T steps and all pairs, in the memory of one microbatch ----------


def backward_trajectories(
    policy: Policy,
    trajectories: Trajectories,
    grad_log_probs: Tensor,  # (M, T): dloss/dlog_probs
) -> None:
    """Add the loss's gradient to each parameter's `.grad` (Alg. 1, line 11).

    The loss squares a mean over T and pairs B images, so plain backpropagation would hold the
    graphs of all B*T network passes at once. But it sees the network only through log_probs: by the
    chain rule its gradient is the sum of grad_log_probs[m, step] * dlog_probs[m, step]/dtheta, and
    each microbatch of entries is run again on its own. This is exact: the value of such a pass
    never enters the loss. Entries of gradient 0 (clipped, where the clipped error wins Eq. 18 in
    every pair; ties) are skipped."""
    assert grad_log_probs.shape == trajectories.log_probs.shape
    entries = grad_log_probs.nonzero()  # (image, step)
    # On a GPU, or compiled, a new batch size takes seconds: entries of 0 fill it up.
    if grad_log_probs.is_cuda or hasattr(policy.unet, "_orig_mod"):
        skipped = (grad_log_probs == 0).nonzero()
        missing = -len(entries) % policy.microbatch
        entries = torch.cat([entries, skipped[:missing]])

    latent_dim = trajectories.latents[0, 0].numel()  # D
    with phase("update"):
        # Once, with a power of two as factor, for fp16; once more if that overflowed.
        for scaled in machine.loss_scaling(policy.unet, grad_log_probs, latent_dim):
            for chunk in entries.split(policy.microbatch):
                rows, steps = chunk.unbind(1)
                with policy.autocast():
                    log_prob = step_log_prob(policy, trajectories, rows, steps)
                (scaled[rows, steps] * log_prob).sum().backward()


# ---- 5. Settings: Table 4 ------------------------------------------------------------------------

LARGE = dict(epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8,
             clip_range=1e-4)  # fmt: skip
PRESETS = {
    "small": {},
    "large": dict(LARGE, kl_weight=3e-6, learning_rate=7e-6,
                  prompts=(f"{ROOT}/prompts/hpdv2_train.json",)),
    "multi": dict(LARGE, reward=("pickscore=10", "hpsv2=2", "aesthetic=0.05"),
                  prompts=(f"{ROOT}/prompts/pickapic_train.jsonl",)),
    "toy": dict(model=f"{ROOT}/toy/sd", reward=(f"pickscore:{ROOT}/toy/pickscore",),
                prompts=(f"{ROOT}/prompts/shapes.txt",), epochs=30, updates_per_epoch=4,
                prompts_per_epoch=8, images_per_prompt=8, clip_range=1e-2, learning_rate=6.7e-5,
                ddpm_steps=10, microbatch=64, sample_every=5),
}  # fmt: skip
SWITCH = ("auto", "on", "off")  # auto: on if memory is short


@dataclass
class Config:
    """The small-scale column of Table 4, and what a run needs beside it; each field is a flag."""

    epochs: int = flag(100, "E, training epochs", group="Table 4")
    updates_per_epoch: int = flag(10, "K, gradient updates")
    prompts_per_epoch: int = flag(32, "N, drawn with replacement")
    images_per_prompt: int = flag(16, "B", least=2)
    kl_weight: float = flag(3e-5, "beta, in the reward's unit")
    ddpm_steps: int = flag(50, "T, denoising steps", least=3)
    clip_range: float = flag(1e-6, "epsilon of Eq. 20; inf: none")
    guidance_scale: float = flag(5.0, "of guidance; 1: none", least=1)
    learning_rate: float = flag(1e-5, "of AdamW")
    weight_decay: float = flag(1e-4, "of AdamW", least=0)
    max_grad_norm: float = flag(1.0, "of a clipped gradient")

    offline: bool = flag(False, "draw from the base model (Sec. 4.3)", group="run")
    model: str = flag("CompVis/stable-diffusion-v1-4", "Stable Diffusion, XL too: hub id or folder",
                      resolve=model_path)  # fmt: skip
    reward: tuple = flag(("hpsv2",), "NAME or FILE.py:FUNCTION, =WEIGHT", resolve=resolve_reward)
    prompts: tuple = flag((f"{ROOT}/prompts/animals.txt",), "FILE or FILE:COLUMN",
                          resolve=prompt_paths)  # fmt: skip
    seed: int = flag(0, "of prompts and noise", least=0)
    out: str = flag("", "run folder, new or empty (default: one in runs/)")
    resume: str = flag("", "run folder to go on with", metavar="RUN")
    save_every: int = flag(1, "epochs between checkpoints")
    keep_every: int = flag(0, "epochs between kept models", least=0)
    sample_every: int = flag(10, "epochs between sample grids")
    log_to: str = flag("none", "also send metrics there", "none", "tensorboard", "wandb")

    microbatch: int = flag(0, "images per network pass; 0: what fits, 8 on a CPU", least=0,
                           group="machine (auto: what memory allows)")  # fmt: skip
    dtype: str = flag("auto", "of network passes", "auto", "fp32", "tf32", "bf16", "fp16")
    lora_rank: int = flag(0, "of adapters to train; 0: the whole UNet", least=0)
    gradient_checkpointing: str = flag("auto", "recompute activations", *SWITCH, nargs="?",
                                       const="on")  # fmt: skip
    offload: str = flag("auto", "idle networks on the CPU", *SWITCH)
    compile: bool = flag(False, "torch.compile the UNet; minutes of start-up")

    program = "prdp.py"  # the command that these are settings of
    columns = ("clip_fraction", "log_ratio_ref", "grad_norm")  # on the screen

    def check(self) -> None:
        """UserError for settings that do not go together: here none, in the baselines some."""

    def passes(self) -> tuple[float, float]:
        """Passes through all T steps per image and epoch: without gradient, and with."""
        return 1 + self.updates_per_epoch, self.updates_per_epoch

    def images_held(self) -> int:
        """Images of an epoch whose trajectories a process holds at once."""
        return self.prompts_per_epoch * self.images_per_prompt // processes()


# ---- 6. Online optimisation (Sec. 3.2, Algorithm 1) ----------------------------------------------


class Models(NamedTuple):
    """A run's networks; `reference` is pi_ref, with LoRA the same network without adapters."""

    policy: Policy
    reference: Policy
    sd: StableDiffusion  # its `unet` is what learns; text encoder and VAE
    reward: Reward


def train(
    config: Config, models: Models, optimizer: torch.optim.Optimizer, prompts: list[str], start: int
) -> Iterator[dict]:
    """Algorithm 1 from epoch `start` on; yields each epoch's metrics. Line 1: `load_models`."""
    policy, reference = models.policy, models.reference
    parameters = optimizer.param_groups[0]["params"]
    by_prompt = (-1, config.images_per_prompt)  # (M, ...) -> (N, B, ...)
    for epoch in range(start, config.epochs + 1):  # line 2
        # Lines 3 to 8. Of theta_old the log-probs are kept, not a copy; offline pi_ref draws.
        sampler = reference if config.offline else policy
        epoch_prompts, trajectories = sample_epoch(config, models, sampler, prompts, epoch)
        _, rewards, parts = score_images(models, trajectories.latents[:, -1], epoch_prompts)

        # pi_ref of Eq. 19, pi_theta_old of Eq. 20. Whoever drew the images has scored them.
        if config.offline:
            log_probs_old = score_trajectories(policy, trajectories)
            log_probs_ref = trajectories.log_probs
        else:
            log_probs_old = trajectories.log_probs
            log_probs_ref = score_trajectories(reference, trajectories, "reference")
        check_epoch(config, policy, trajectories, log_probs_old, log_probs_ref, epoch)
        log_probs_old = log_probs_old.unflatten(0, by_prompt)
        log_probs_ref = log_probs_ref.unflatten(0, by_prompt)
        rewards = rewards.unflatten(0, by_prompt)
        updates = []
        for k in range(config.updates_per_epoch):  # line 9
            log_probs = log_probs_old.clone()  # theta is theta_old at the first update
            if k > 0:
                log_probs = score_trajectories(policy, trajectories).unflatten(0, by_prompt)
            loss = prdp_loss(  # line 10
                log_probs.requires_grad_(),
                log_probs_old,
                log_probs_ref,
                rewards,
                config.clip_range,
                config.kl_weight,
            )
            (grad_log_probs,) = torch.autograd.grad(loss, log_probs)
            metrics = update_metrics(config, log_probs, log_probs_old, log_probs_ref, rewards)

            # Line 11: AdamW's step, from the exact gradient, cut to a norm of max_grad_norm.
            optimizer.zero_grad()
            backward_trajectories(policy, trajectories, grad_log_probs.flatten(0, 1))
            average_gradients(parameters)
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            require_finite("the gradient", grad_norm)
            optimizer.step()
            optimizer.zero_grad()  # free them
            metrics |= {"loss": loss, "grad_norm": grad_norm}
            updates.append(metrics | {"skipped_fraction": grad_log_probs == 0})

        ratio = log_probs_old - log_probs_ref
        kl = ratio * trajectories.latents[0, 1:].numel()  # T*D: Eq. 6
        del trajectories  # frees their memory before others are drawn
        yield epoch_metrics(rewards, parts, updates, log_ratio_ref=ratio, kl_nats=kl)


@torch.no_grad()
def update_metrics(
    config: Config,
    log_probs: Tensor,  # (N, B, T)
    log_probs_old: Tensor,
    log_probs_ref: Tensor,
    rewards: Tensor,  # (N, B)
) -> dict[str, Tensor]:
    """Where theta stands before an update; docs/running.md defines the fields."""

    def unclipped(x: Tensor) -> Tensor:  # Eq. 14 of a policy with log-probs x
        return prdp_loss(x, log_probs_old, log_probs_ref, rewards, math.inf, config.kl_weight)

    losses = torch.stack([unclipped(log_probs), unclipped(log_probs_ref)])
    loss_of_policy, loss_of_reference = gather(losses[None]).mean(0)  # over all processes
    moved = (log_probs - log_probs_old).abs()
    return {
        "loss_unclipped": losses[0],
        "explained": 1 - loss_of_policy / loss_of_reference,
        "log_ratio_old": moved,
        "clip_fraction": moved > config.clip_range,
    }


def draw_prompts(config: Config, prompts: list[str], epoch: int) -> list[str]:
    """N prompts, independent and uniform (Alg. 1, line 4); a function of seed and epoch alone."""
    (generator,) = image_generators(config.seed, -epoch, range(1), 1)  # no image has this stream
    numbers = torch.randint(len(prompts), (config.prompts_per_epoch,), generator=generator)
    return [prompts[n] for n in numbers]


def sample_epoch(
    config: Config, models: Models, policy: Policy, prompts: list[str], epoch: int
) -> tuple[list[str], Trajectories]:
    """This process's share of N prompts, and their trajectories (Alg. 1, lines 4 to 7)."""
    epoch_prompts = draw_prompts(config, prompts, epoch)
    own = shard(len(epoch_prompts))
    numbers = range(len(epoch_prompts))[own]
    generators = image_generators(config.seed, epoch, numbers, config.images_per_prompt)
    return epoch_prompts[own], sample_prompts(models, policy, epoch_prompts[own], generators)


def sample_prompts(
    models: Models, policy: Policy, prompts: list[str], generators: list
) -> Trajectories:
    """B = len(generators) / len(prompts) trajectories of each prompt (Alg. 1, lines 5 to 7)."""
    prompt_embeds = models.sd.encode(prompts)
    prompt_embeds = prompt_embeds.repeat_interleave(len(generators) // len(prompts), dim=0)
    trajectories = sample_trajectories(policy, prompt_embeds, generators, models.sd.latent_shape)
    require_finite("a log-prob", trajectories.log_probs)
    return trajectories


def score_images(models: Models, x_0: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, dict]:
    """Decode x_0 (M, C, H, W): uint8 images, rewards (M,), each component's rewards (line 8)."""
    repeated = [prompt for prompt in prompts for _ in range(len(x_0) // len(prompts))]
    with phase("reward"):
        images = models.sd.decode(x_0, models.policy.microbatch)
        return images, *models.reward.score(images, repeated)


# ---- 7. Models, a run, main ----------------------------------------------------------------------


@machine.own_state()
def load_models(
    config: Config, device: torch.device, reward: Callable | None = None, learns: bool = True
) -> Models:
    """The policy, and the frozen reference it starts from (Alg. 1, line 1), if it learns."""
    sd = StableDiffusion(config, device)
    reward = load_reward(config.reward if reward is None else reward, sd.idle).to(sd.idle)
    schedule = ddpm_schedule(sd.noise_settings, config.ddpm_steps)
    schedule = Schedule(*(column.to(device) for column in schedule))
    microbatch = min(config.microbatch or 8, config.images_held())
    null_embeds = sd.null_embeds()

    unet, scale = sd.learner(config), config.guidance_scale
    policy = Policy(unet, schedule, null_embeds, scale, microbatch, sd.autocast)
    reference = policy
    if learns:
        unet, autocast = sd.reference(unet)
        reference = policy._replace(unet=unet, autocast=autocast)
    return Models(policy, reference, sd, reward)


def prepare(config: Config, device: torch.device, reward: Reward, prompts: list[str]) -> tuple:
    """Load, check and time: config, models, an image's seconds (without gradient, with)."""
    models = load_models(config, device, reward)
    report.introduce(config, models.sd, machine.load_kernels()[1], prompts)
    batch = check_on_policy(config, models, prompts[0])
    passes = (score_trajectories, backward_trajectories)
    return config, models, machine.rehearse(config, models, batch, prompts[0], *passes)


def check_on_policy(config: Config, models: Models, prompt: str) -> Trajectories:
    """Score a microbatch that the policy drew: its log-probs must have the same bits, for Eq. 20
    compares two passes to within clip_range. Compiled, the reference may differ by a rounding."""
    policy, cudnn = models.policy, torch.backends.cudnn
    for deterministic in (cudnn.deterministic, True):
        cudnn.deterministic = deterministic
        generators = image_generators(config.seed, 0, range(1), policy.microbatch)
        batch = sample_prompts(models, policy, [prompt], generators)
        gap = (score_trajectories(policy, batch) - batch.log_probs).abs().max().item()
        print0(f"on-policy gap: {gap:.1e} (deterministic cuDNN: {deterministic})")
        if gap == 0:
            break
    else:
        raise UserError(f"on-policy gap {gap:.1e}: the clip would act on noise; try --dtype fp32.")
    log_probs_ref = score_trajectories(models.reference, batch)
    machine.check_reference(config, policy, batch.log_probs, log_probs_ref)
    # Triton's kernels against the formulas above: who edits one must edit both.
    machine.check_kernels(policy, batch, run_unet, guided_log_prob, guided_sample)
    return batch


def check_epoch(
    config: Config, policy: Policy, trajectories: Trajectories, old: Tensor, ref: Tensor, epoch: int
) -> None:
    """Before an epoch learns: a microbatch's first step, scored again, must give the bits of `old`,
    theta_old's log-probs (M, T); in epoch 1 `old` must equal `ref`, the reference's."""
    m = policy.microbatch
    first = Trajectories(trajectories.latents[:m, :2], old[:m, :1], trajectories.prompt_embeds[:m])
    gap = (score_trajectories(policy, first) - first.log_probs).abs().max().item()
    if gap != 0:
        raise UserError(f"epoch {epoch}: on-policy gap {gap:.1e}; --resume, or mend the reward.")
    if epoch == 1:
        machine.check_reference(config, policy, old, ref)


def draw_samples(config: Config, models: Models, policy: Policy, prompts: list[str]) -> Samples:
    """Up to 8 images of each of up to 8 evenly spaced prompts, from the same noise every time."""
    count = min(8, config.prompts_per_epoch)
    images = min(8, config.images_per_prompt)
    fixed = [prompts[n * len(prompts) // count] for n in range(count)]
    generators = image_generators(config.seed, 0, range(count), images)
    x_0 = sample_prompts(models, policy, fixed, generators).latents[:, -1]
    pictures, rewards, _ = score_images(models, x_0, fixed)
    return Samples(fixed, pictures.cpu(), rewards.cpu())


@machine.own_state()
def run(
    config: Config,
    reward: Callable | None = None,  # (uint8 images (M, 3, H, W), M prompts) -> M numbers
    prompts: list[str] | None = None,  # both stand in for those that config names
    *,
    train: Callable = train,
    state: object = None,  # what another `train` keeps between epochs
) -> None:
    """Train, from the last checkpoint if any, and show what changed; UserError if it cannot."""
    device = start_processes()
    config = resolve(config, reward, prompts)
    prompts = load_prompts(*config.prompts) if prompts is None else prompts
    prompts = as_prompts(prompts, "--prompts")
    picture = grey_picture(config.model).to(device)
    reward = load_reward(config.reward if reward is None else reward, "cpu")
    reward.score(picture, prompts[:1])
    with run_folder.only_writer(Path(config.out)):
        # Alg. 1, line 1. A run that goes on is loaded before anything is written.
        saved = run_folder.open_run(config)
        plans = machine.plans(config, StableDiffusion.weights_gigabytes)
        config, models, seconds = machine.first_that_fits(plans, prepare, device, reward, prompts)
        weights = {n: p for n, p in models.sd.unet.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            weights.values(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )
        learner = run_folder.Learner(weights, optimizer, state)
        record = run_folder.restore(config, saved, learner, models, prompts)
        start = saved["epoch"] + 1

        # The pretrained model's images.
        report.forecast(config, seconds, start)
        before = draw_samples(config, models, models.reference, prompts)
        rows = run_folder.begin(config, record, start)
        track = report.open_tracker(config, record, start)
        if start == 1:
            report.save_samples(config, 0, before, track)

        # Algorithm 1. Nothing that comes after an epoch's checkpoint can cost the epoch.
        epoch, samples = start - 1, None
        report.SECONDS.clear()
        for epoch, metrics in enumerate(train(config, models, optimizer, prompts, start), start):
            rows.append(report.as_row(epoch, metrics))
            samples = report.try_samples(config, rows[-1], draw_samples, models, prompts)
            run_folder.save_epoch(config, record, rows, learner, models.sd)
            report.show_epoch(config, rows, start, track)
            if samples and epoch < config.epochs:
                report.show_samples(config, epoch, before, samples, track)
            report.SECONDS.clear()

        after = samples or report.try_samples(config, {"epoch": 0}, draw_samples, models, prompts)
        models.sd.save(Path(config.out), record, epoch)
        report.finish(config, epoch, before, after, track)


def load_run(folder: str, device: torch.device, reward=None, flags=()) -> Models:
    """A run's policy as its last checkpoint has it, and the reference that it began from. `flags`
    name what has moved since: ("--model", FOLDER)."""
    config = parse_args(["--resume", str(folder), *flags])
    models = load_models(config, device, reward)
    saved = run_folder.read_state(Path(config.out))
    run_folder.require_same(saved["record"], run_folder.model_digest(models.sd), folder)
    models.sd.unet.load_state_dict(saved.get("unet", {}), strict=False)  # of LoRA adapters alone
    return models


def parse_args(argv: list[str] | None = None) -> Config:
    """The settings of a command line; UserError for what cannot run."""
    return parse_settings(Config, PRESETS, __doc__, argv)


def main(argv: list[str] | None = None) -> None:
    """The command line: `run` with its settings."""
    run_command(Config.program, parse_args, run, argv)


if __name__ == "__main__":
    main()
