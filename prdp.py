"""PRDP: Proximal Reward Difference Prediction, for reward finetuning of diffusion models
(Deng et al., CVPR 2024). Read it beside the paper: each heading names its part of it.

    python prdp.py --preset toy                                  # a small model: no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt  # SD v1.4, one GPU, Table 4
    python prdp.py --resume runs/toy --epochs 40                 # go on with a run

Paper                   Here                Shape (M = N*B images)  Note
x_t                     latents[:, step]    (M, T+1, C, H, W)       step = T - t: from x_T on
log pi(x_{t-1}|x_t, c)  log_probs[:, step]  (M, T)                  float64
r-hat_t, Eq. 19         log_ratio           (..., B, T)             log_probs - log_probs_ref
r                       rewards             (..., B)                in the reward's own unit
beta of Table 4         kl_weight                                   `betas` is the noise schedule
epsilon of Table 4      clip_range                                  in the unit of log_probs
the network's output    noise_pred          (2M, C, H, W)           both branches; noise, or v

Units: Eq. 3 sums over T steps, Eq. 4 over C*H*W latent dimensions. App. G's code takes the mean
over T, and log_probs are means over C*H*W here: nats per latent dimension. Table 4 is read in these
units, where the beta of Eq. 5 is kl_weight / (T*C*H*W), the epsilon of Eq. 20 clip_range * C*H*W.

Departures from the paper, and choices where it is silent or disagrees with itself (docs/paper.md):
 1. The mean over T (App. G), where Eqs. 3 and 21 sum: loss_sum(b) == T**2 * loss_mean(b * T).
 2. log_prob is a mean over latent dimensions, as in DDPO's code, which has Table 4's clip range.
 3. The mean is over pairs whose rewards differ (App. G; Alg. 1, line 10: all); 0 if none do.
 4. Steps are "leading"-spaced, sigma_t is the posterior's, alpha-bar ends at alphas_cumprod[0].
 5. The policy is the guided model, with the gradient through both branches.
 6. With K = 1 (large scale) theta is theta_old at the only update: Eq. 20 changes nothing there.
 7. The number format (--dtype), AdamW's betas, and that gradients are clipped by global norm.
 8. --offline draws as many images as Sec. 4.3, but each epoch's serve its own K updates alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rewards import Reward, load_reward, resolve_reward
from stable_diffusion import StableDiffusion, WithoutAdapters, compiled, noise_settings
from support import memory, report, run_folder
from support.cli import InputError, flag
from support.distributed import gather, gradient_step, own_share, processes, require_finite
from support.distributed import say, start_processes
from support.inputs import as_prompts, load_module, load_prompts
from support.report import Samples, epoch_metrics, phase
from support.settings import ROOT, RunSettings, parse_settings, run_command, set_precision

# ---- 1. Settings: Table 4 ------------------------------------------------------------------------

LARGE = dict(epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8,
             clip_range=1e-4)  # fmt: skip
PRESETS = {
    "small": {},
    "large": LARGE | dict(kl_weight=3e-6, learning_rate=7e-6,
                          prompts=(f"{ROOT}/prompts/hpdv2_train.json",)),
    "multi": LARGE | dict(reward=("pickscore=10", "hpsv2=2", "aesthetic=0.05"),
                          prompts=(f"{ROOT}/prompts/pickapic_train.jsonl",)),
    "toy": dict(model=f"{ROOT}/toy/sd", reward=(f"pickscore:{ROOT}/toy/pickscore",),
                prompts=(f"{ROOT}/prompts/shapes.txt",), epochs=30, updates_per_epoch=4,
                prompts_per_epoch=8, images_per_prompt=8, clip_range=1e-3, learning_rate=2e-4,
                ddpm_steps=10, microbatch=64, sample_every=5),
}  # fmt: skip


@dataclass
class Config(RunSettings):
    """The small-scale column of Table 4. What any run has is in support/settings.py."""

    program: ClassVar = "prdp.py"
    presets: ClassVar = PRESETS
    least: ClassVar = {"images_per_prompt": 2}  # PRDP compares a prompt's images
    resolve_reward: ClassVar = staticmethod(resolve_reward)
    epochs: int = flag(100, "E, training epochs", group="Table 4")
    updates_per_epoch: int = flag(10, "K, gradient updates")
    prompts_per_epoch: int = flag(32, "N, drawn with replacement")
    images_per_prompt: int = flag(16, "B")
    kl_weight: float = flag(3e-5, "beta, in reward / (nats per latent dimension)")
    ddpm_steps: int = flag(50, "T, denoising steps")
    clip_range: float = flag(1e-6, "epsilon of Eq. 20, nats per latent dimension; inf: none")
    guidance_scale: float = flag(5.0, "of classifier-free guidance")
    learning_rate: float = flag(1e-5, "of AdamW")
    weight_decay: float = flag(1e-4, "of AdamW")
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to it")
    offline: bool = flag(False, "draw from the pretrained model (Sec. 4.3)")

    def passes(self) -> tuple[float, float]:
        """Network passes per image and epoch, for the forecast: without gradient (sampling, the
        reference, scoring before each update but the first; offline before it too), and with."""
        return 1 + self.updates_per_epoch + self.offline, self.updates_per_epoch


# ---- 2. The policy: DDPM ancestral sampling, a chain of Gaussians (Sec. 2) -----------------------


def guided_mean(
    noise_pred: Tensor, x_t: Tensor, coef_sample: Tensor, coef_noise: Tensor,
    guidance_scale: float,
) -> Tensor:  # fmt: skip
    """mu_theta(x_t, c) of Eq. 2, guided: float64, as x_t (M, C, H, W). noise_pred (2M, C, H, W)."""
    unconditional, conditional = noise_pred.double().chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    return coef_sample.view(-1, 1, 1, 1) * x_t.double() + coef_noise.view(-1, 1, 1, 1) * guided


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """log N(sample; mean, sigma^2 I) of Eqs. 2 and 4, a mean over latent dimensions: (M,) float64.

    sample, mean (M, ...), sigma (M,) or a number. float64, because at the last step a log-prob is
    about 2.5, where float32 numbers lie 2.4e-7 apart: a quarter of Table 4's smallest clip_range.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=sample.device)
    assert sample.shape == mean.shape, (sample.shape, mean.shape)
    assert sigma.shape in ((), sample.shape[:1]), sigma.shape
    squared = (sample.double() - mean.double()).square().flatten(1).mean(1)
    return -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)


class Schedule(NamedTuple):
    """Eq. 2: N(coef_sample * x_t + coef_noise * noise_pred, sigma^2 I); each (T,), from x_T on."""

    timesteps: Tensor  # int64: 981, 961, ..., 1 for T = 50
    coef_sample: Tensor  # float64
    coef_noise: Tensor  # float64
    sigma: Tensor  # float64, > 0


def ddpm_schedule(scheduler_config: dict, num_steps: int) -> Schedule:
    """The coefficients of Eq. 2 (Ho et al. 2020, Eqs. 6, 7, 11); the chain of DDIM with eta = 1.

    From a diffusers scheduler's config; spacing and end as Stable Diffusion's. InputError for
    another kind of schedule, and for sigma == 0, where log-probabilities do not exist.
    """
    config = noise_settings(scheduler_config)
    train_steps = config["num_train_timesteps"]
    power = {"scaled_linear": 2, "linear": 1}[config["beta_schedule"]]
    start, end = (config[name] ** (1 / power) for name in ("beta_start", "beta_end"))
    betas = torch.linspace(start, end, train_steps, dtype=torch.float64) ** power
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    stride = train_steps // max(num_steps, 1)  # "leading" spacing leaves out what remains
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config["steps_offset"]
    if stride * num_steps < 0.8 * train_steps or timesteps[0] >= train_steps:
        raise InputError(f"--ddpm-steps {num_steps}: must span {train_steps} timesteps; 50 does.")
    previous = timesteps - stride
    alpha_bar = alphas_cumprod[timesteps]  # of x_t
    alpha_bar_previous = alphas_cumprod[previous.clamp(min=0)]
    if config["set_alpha_to_one"]:
        alpha_bar_previous[previous < 0] = 1
    alpha = alpha_bar / alpha_bar_previous

    sigma = ((1 - alpha_bar_previous) / (1 - alpha_bar) * (1 - alpha)).clamp(min=0).sqrt()
    if not (sigma > 0).all():
        raise InputError("--model: sigma = 0 at its end; steps_offset 1, set_alpha_to_one false.")
    coef_sample = alpha.rsqrt()
    coef_noise = -(1 - alpha) / ((1 - alpha_bar) * alpha).sqrt()
    if config["prediction_type"] == "v_prediction":
        # noise = sqrt(alpha_bar) * v + sqrt(1 - alpha_bar) * x_t
        coef_sample = alpha.sqrt()
        coef_noise = coef_noise * alpha_bar.sqrt()
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network and how it is run. The reference differs in `unet` alone."""

    # (x_t (2M, C, H, W), timestep (2M,), encoder_hidden_states (2M, L, D)) -> .sample as x_t
    unet: Callable
    schedule: Schedule
    null_text: Tensor  # (L, D), the embedding of the empty prompt
    guidance_scale: float = 5.0
    microbatch: int = 16
    autocast: torch.dtype | None = None  # None: the network runs in its own dtype

    def at(self, steps: Tensor) -> list:
        """coef_sample, coef_noise and sigma of steps (M,), each (M,); and the guidance scale."""
        return [*(column[steps] for column in self.schedule[1:]), self.guidance_scale]

    def casting(self, device: torch.device) -> torch.autocast:
        """As --dtype says. Entered around whole trajectories, it casts each weight once."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)


def run_unet(policy: Policy, x_t: Tensor, text: Tensor, steps: Tensor) -> Tensor:
    """noise_pred (2M, C, H, W) of M images, each at its step; the unconditional branch first."""
    timesteps = policy.schedule.timesteps[steps]
    both = torch.cat([policy.null_text.expand_as(text), text])  # (2M, L, D)
    with policy.casting(x_t.device):
        inputs = (torch.cat([x_t, x_t]), timesteps.repeat(2))
        return policy.unet(*inputs, encoder_hidden_states=both).sample


# ---- 3. Trajectories: sampling and scoring (Eqs. 1 to 4) -----------------------------------------


@functools.cache
def load_kernels() -> tuple[object, str]:
    """kernels/log_prob.py, by its path (Hugging Face has a package `kernels`); and its state."""
    if not torch.cuda.is_available():
        return None, "eager (no CUDA device)"
    if importlib.util.find_spec("triton") is None:
        return None, "eager (triton is not installed)"
    module = load_module("log_prob", str(ROOT / "kernels" / "log_prob.py"))
    if module.missing():
        return None, f"eager ({module.missing()})"
    return module, "Triton kernels"


def or_kernel(function: Callable) -> Callable:
    """On CUDA tensors the Triton kernel of the same name runs: equal but for float64 rounding."""

    @functools.wraps(function)
    def chosen(noise_pred: Tensor, x_t: Tensor, *rest, **named):
        fits = x_t.is_cuda and noise_pred.dtype != torch.float64
        kernels = load_kernels()[0] if fits else None
        return getattr(kernels, function.__name__, function)(noise_pred, x_t, *rest, **named)

    return chosen


@or_kernel
def guided_log_prob(
    noise_pred: Tensor, x_t: Tensor, x_prev: Tensor, coef_sample: Tensor, coef_noise: Tensor,
    sigma: Tensor, guidance_scale: float,
) -> Tensor:  # fmt: skip
    """log pi(x_{t-1} | x_t, c) of Eqs. 2 and 4: (M,) float64, nats per latent dimension.

    noise_pred (2M, C, H, W), which alone gets a gradient; x_t and x_prev (M, C, H, W) float32;
    coefficients (M,) float64, each row's own, so that steps may be mixed.
    """
    mean = guided_mean(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    return gaussian_log_prob(x_prev, mean, sigma)


@or_kernel
@torch.no_grad()
def guided_sample(
    noise_pred: Tensor, x_t: Tensor, noise: Tensor, coef_sample: Tensor, coef_noise: Tensor,
    sigma: Tensor, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_{t-1} ~ N(mean, sigma^2 I) of Eq. 2 from standard normal noise, rounded to float32, and the
    log-prob of the rounded, bit for bit what `guided_log_prob` returns for it."""
    mean = guided_mean(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    x_prev = (mean + sigma.view(-1, 1, 1, 1) * noise).float()
    return x_prev, gaussian_log_prob(x_prev, mean, sigma)


class Trajectories(NamedTuple):
    """Denoising trajectories of M images, and their log-probs under the policy that drew them."""

    latents: Tensor  # (M, T+1, C, H, W) float32: x_T, ..., x_0
    log_probs: Tensor  # (M, T) float64
    text: Tensor  # (M, L, D), the embedding of each image's prompt


def image_generators(seed: int, epoch: int, prompts: Sequence[int], images: int) -> list:
    """One CPU generator for each of `images` images of each prompt, by its number: noise depends on
    no microbatch, device or other image. Epoch 0 is of pictures to show, -epoch of draw_prompts."""
    names = [f"{seed} {epoch} {prompt} {image}" for prompt in prompts for image in range(images)]
    keys = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    return [torch.Generator().manual_seed(int.from_bytes(k, "little", signed=True)) for k in keys]


@torch.no_grad()
def sample_trajectories(
    policy: Policy, text: Tensor, generators: list[torch.Generator], shape: tuple[int, int, int]
) -> Trajectories:
    """Draw x_T, ..., x_0 by ancestral sampling (Eq. 1; Alg. 1, line 6), with each step's log-prob.

    text (M, L, D), a generator for each image, shape (C, H, W). Latents are rounded to float32
    *before* they are scored: scoring what is stored, under the same weights, gives the same bits.
    """
    num_images, num_steps = len(text), len(policy.schedule.timesteps)
    assert len(generators) == num_images, (len(generators), text.shape)
    latents = torch.empty(num_images, num_steps + 1, *shape, device=text.device)
    log_probs = torch.empty(num_images, num_steps, dtype=torch.float64, device=text.device)

    with policy.casting(text.device), phase("sample", num_images * num_steps) as done:
        for rows in torch.arange(num_images, device=text.device).split(policy.microbatch):
            # All noise at once, x_T and each step's: drawing at each step would stall a GPU.
            own = [generators[m] for m in rows.tolist() for _ in range(num_steps + 1)]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in own])
            noise = noise.unflatten(0, (len(rows), -1)).to(text.device)  # (m, T+1, C, H, W)
            latents[rows, 0] = noise[:, 0]
            for step in range(num_steps):
                steps = torch.full_like(rows, step)
                x_t = latents[rows, step]
                noise_pred = run_unet(policy, x_t, text[rows], steps)
                drawn = guided_sample(noise_pred, x_t, noise[:, step + 1], *policy.at(steps))
                latents[rows, step + 1], log_probs[rows, step] = drawn
                done(len(rows))
    return Trajectories(latents, log_probs, text)


@torch.no_grad()
def score_trajectories(policy: Policy, trajectories: Trajectories, label: str = "score") -> Tensor:
    """log pi(x_{t-1} | x_t, c) of stored trajectories under a policy (Eqs. 2 to 4): (M, T) float64.

    In the batches and order of `sample_trajectories`, so that unchanged weights return the bits of
    `trajectories.log_probs`: another batch size alone can move them by more than the clip range.
    """
    log_probs = torch.empty_like(trajectories.log_probs)
    num_images, num_steps = log_probs.shape
    with policy.casting(log_probs.device), phase(label, num_images * num_steps) as done:
        for rows in torch.arange(num_images, device=log_probs.device).split(policy.microbatch):
            for step in range(num_steps):
                steps = torch.full_like(rows, step)
                log_probs[rows, step] = step_log_prob(policy, trajectories, rows, steps)
                done(len(rows))
    return log_probs


def step_log_prob(
    policy: Policy, trajectories: Trajectories, rows: Tensor, steps: Tensor
) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of images (m,) at steps (m,), with gradient: (m,)."""
    x_t = trajectories.latents[rows, steps]
    x_prev = trajectories.latents[rows, steps + 1]
    noise_pred = run_unet(policy, x_t, trajectories.text[rows], steps)
    return guided_log_prob(noise_pred, x_t, x_prev, *policy.at(steps))


# ---- 4. The loss: reward difference prediction, proximal updates (Secs. 3.1 and 3.3, App. G) -----


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
    pairs whose rewards differ (each once; 0 if all rewards tie), then the mean over prompts.
    """
    log_ratio = log_probs - log_probs_ref  # Eq. 19
    log_ratio_old = log_probs_old - log_probs_ref
    low, high = log_ratio_old - clip_range, log_ratio_old + clip_range
    clipped_log_ratio = torch.clamp(log_ratio, low, high)  # Eq. 20

    def pairwise_diff(x: Tensor) -> Tensor:
        return x.unsqueeze(-1) - x.unsqueeze(-2)  # [..., a, b] is x_a - x_b

    log_ratio_diff = pairwise_diff(log_ratio.mean(-1))  # Eqs. 10 and 11; App. G's mean
    clipped_log_ratio_diff = pairwise_diff(clipped_log_ratio.mean(-1))  # Eq. 21
    reward_diff = pairwise_diff(rewards.to(log_probs.dtype))  # Eq. 12

    error = (log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 14
    clipped_error = (clipped_log_ratio_diff - reward_diff / kl_weight) ** 2  # Eq. 17
    untied = reward_diff > 0  # each pair whose rewards differ, once
    loss = torch.where(untied, torch.maximum(error, clipped_error), 0.0)  # Eq. 18
    return (loss.sum((-2, -1)) / untied.sum((-2, -1)).clamp(min=1)).mean()


# ---- 5. Exact gradients, through T steps and all pairs, in the memory of one microbatch ----------


def backward_trajectories(policy: Policy, trajectories: Trajectories, weights: Tensor) -> None:
    """Add the loss's gradient to each `.grad` (Alg. 1, line 11), given dloss/dlog_probs, (M, T).

    The loss squares a mean over T and pairs B images, so plain backpropagation would hold the
    graphs of all B*T network passes at once. But it sees the network only through the small matrix
    log_probs: by the chain rule its gradient is the sum of weights[m, k] * dlog_probs[m, k]/dtheta,
    and each microbatch of entries can be run again on its own. This is exact, because only
    derivatives are taken and no value is compared with another pass's. So entries of weight 0
    (clipped, where the clipped error wins Eq. 18 in every pair) are skipped, and the rest packed.
    """
    assert weights.shape == trajectories.log_probs.shape, weights.shape
    entries = weights.nonzero()  # (image, step)
    # On a GPU, or compiled, a new batch size takes seconds to prepare: entries of weight 0 fill up.
    if weights.is_cuda or hasattr(policy.unet, "_orig_mod"):
        fill = (weights == 0).nonzero()
        entries = torch.cat([entries, fill[: -len(entries) % policy.microbatch]])
    with phase("update", len(entries)) as done:
        for chunk in entries.split(policy.microbatch) if len(entries) else ():
            rows, steps = chunk.unbind(1)
            log_prob = step_log_prob(policy, trajectories, rows, steps)
            (weights[rows, steps] * log_prob).sum().backward()
            done(len(chunk))


# ---- 6. Online optimisation (Sec. 3.2, Algorithm 1) ----------------------------------------------


class Models(NamedTuple):
    """A run's networks. Scoring with `reference` is scoring with the pretrained model."""

    policy: Policy
    reference: Policy
    sd: StableDiffusion  # its `unet` is what learns; text encoder and VAE
    reward: Reward


def train(
    config: Config, models: Models, optimizer: torch.optim.Optimizer, prompts: list[str], start: int
) -> Iterator[dict[str, float]]:
    """Algorithm 1 from epoch `start` on; yields each epoch's metrics. Line 1: `load_models`."""
    policy = models.policy
    numel = math.prod(models.sd.latent_shape)

    def by_prompt(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, config.images_per_prompt))  # (M, ...) -> (N, B, ...)

    for epoch in range(start, config.epochs + 1):  # line 2
        # Line 3: theta_old is theta as the epoch begins. Sec. 4.3: offline, pi_ref draws instead.
        sampler = models.reference if config.offline else policy
        drawn, trajectories = sample_epoch(config, models, sampler, prompts, epoch)  # lines 4 to 7
        _, rewards = score_images(models, trajectories.latents[:, -1], drawn)  # line 8

        with models.sd.in_use(models.reference.unet):  # pi_ref of Eq. 19
            log_probs_ref = score_trajectories(models.reference, trajectories, "reference")
        log_probs_old = trajectories.log_probs
        if config.offline:
            log_probs_old = score_trajectories(policy, trajectories)

        updates = []
        backward = functools.partial(backward_trajectories, policy, trajectories)
        for k in range(config.updates_per_epoch):  # line 9
            log_probs = score_trajectories(policy, trajectories) if k else log_probs_old.clone()
            log_probs.requires_grad_()
            matrices = [by_prompt(x) for x in (log_probs, log_probs_old, log_probs_ref, rewards)]
            loss = prdp_loss(*matrices, config.clip_range, config.kl_weight)  # line 10
            (weights,) = torch.autograd.grad(loss, log_probs)
            with phase("update"):  # line 11, and the optimizer's time
                options = (config.max_grad_norm, policy.autocast, numel)
                norm = gradient_step(optimizer, backward, weights, *options)
            measured = {"loss": loss, "skipped_fraction": weights == 0, "grad_norm": norm}
            updates.append(measured | update_metrics(config, *matrices))

        ratio = log_probs_old - log_probs_ref
        others = {"log_ratio_ref": ratio, "kl_nats": ratio * (ratio.shape[1] * numel)}
        del trajectories, backward  # and their memory, before others are drawn
        yield epoch_metrics(rewards, models.reward.parts, updates, **others)


@torch.no_grad()
def update_metrics(
    config: Config, log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor, rewards: Tensor
) -> dict[str, Tensor]:
    """Of one update, before its step; docs/running.md defines the fields."""

    def unclipped(x: Tensor) -> Tensor:  # Eq. 14 of a policy with log-probs x
        return prdp_loss(x, log_probs_old, log_probs_ref, rewards, math.inf, config.kl_weight)

    losses = torch.stack([unclipped(log_probs), unclipped(log_probs_ref)])
    of_policy, of_reference = gather(losses[None]).mean(0)  # over all processes
    explained = 1 - of_policy / of_reference
    moved = (log_probs - log_probs_old).abs()
    metrics = {"loss_unclipped": losses[0], "explained": explained}
    return metrics | {"log_ratio_old": moved, "clip_fraction": moved > config.clip_range}


def draw_prompts(config: Config, prompts: list[str], epoch: int) -> list[str]:
    """N prompts, independent and uniform (Alg. 1, line 4); a function of seed and epoch alone."""
    (generator,) = image_generators(config.seed, -epoch, range(1), 1)  # no image has this stream
    drawn = torch.randint(len(prompts), (config.prompts_per_epoch,), generator=generator)
    return [prompts[i] for i in drawn]


def sample_epoch(
    config: Config, models: Models, policy: Policy, prompts: list[str], epoch: int
) -> tuple[list[str], Trajectories]:
    """This process's share of N prompts, and their trajectories (Alg. 1, lines 4 to 7)."""
    drawn = draw_prompts(config, prompts, epoch)
    own, images = own_share(len(drawn)), config.images_per_prompt
    generators = image_generators(config.seed, epoch, range(len(drawn))[own], images)
    return drawn[own], sample_prompts(models, policy, drawn[own], generators)


def sample_prompts(
    models: Models, policy: Policy, prompts: list[str], generators: list[torch.Generator]
) -> Trajectories:
    """B = len(generators) / len(prompts) trajectories of each prompt (Alg. 1, lines 5 to 7)."""
    text = models.sd.encode(prompts)
    text = text.repeat_interleave(len(generators) // len(prompts), dim=0)
    with models.sd.in_use(policy.unet):
        trajectories = sample_trajectories(policy, text, generators, models.sd.latent_shape)
    require_finite("a log-prob", trajectories.log_probs)
    return trajectories


def score_images(models: Models, x_0: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Images of x_0 (M, C, H, W), M / len(prompts) a prompt, and rewards (M,) (Alg. 1, line 8)."""
    of_each = [prompt for prompt in prompts for _ in range(len(x_0) // len(prompts))]
    with phase("reward"):
        images = models.sd.decode(x_0, models.policy.microbatch)
        with models.sd.in_use(models.reward):
            return images, models.reward(images, of_each)


# ---- 7. Models, a run, main ----------------------------------------------------------------------


def load_models(
    config: Config, device: torch.device, reward: Callable | None = None, learns: bool = True
) -> Models:
    """The policy, and the frozen reference it starts from (Alg. 1, line 1), if it learns."""
    autocast = set_precision(config.dtype)
    sd = StableDiffusion(config.model, device, config.offload == "on", autocast)
    columns = ddpm_schedule(sd.noise_settings, config.ddpm_steps)
    schedule = Schedule(*(column.to(device) for column in columns))
    images = config.prompts_per_epoch * config.images_per_prompt // processes()
    how = (config.guidance_scale, min(config.microbatch or 8, images), autocast)
    reward = load_reward(config.reward if reward is None else reward, sd.idle)

    sd.unfreeze(config.lora_rank, config.seed, config.gradient_checkpointing == "on")
    unet, reference = sd.unet, None
    if config.compile:
        unet = compiled(unet)
    if learns and config.lora_rank:
        reference = WithoutAdapters(unet, sd.unet)
    elif learns:
        reference = sd.frozen(config.compile)  # line 1
    policy = Policy(unet, schedule, sd.encode([""])[0], *how)
    return Models(policy, policy._replace(unet=reference), sd, reward)


def load_what_fits(
    config: Config, device: torch.device, reward: Callable | None, prompts: list[str]
) -> tuple[Config, Models, tuple[float, float]]:
    """The plan that fits this GPU, its models, and an image's seconds without and with gradient."""

    def attempt(plan: Config) -> tuple:
        models = load_models(plan, device, reward)
        report.introduce(plan, models.sd, load_kernels()[1], prompts)
        batch = check_on_policy(plan, models, prompts[0])
        passes = (score_trajectories, backward_trajectories)
        return plan, models, memory.rehearse(plan, models, batch, *passes)

    return memory.first_that_fits(config, StableDiffusion.weights_gigabytes, attempt)


def check_on_policy(config: Config, models: Models, prompt: str) -> Trajectories:
    """Sample a microbatch from the reference and score it under policy and reference: all must have
    the same bits, for Eq. 20 compares two passes to within clip_range. Returns the microbatch."""
    for deterministic in (False, True):
        torch.backends.cudnn.deterministic = deterministic
        generators = image_generators(config.seed, 0, range(1), models.policy.microbatch)
        gap = 0.0
        trajectories = sample_prompts(models, models.reference, [prompt], generators)
        for policy in (models.policy, models.reference):
            with models.sd.in_use(policy.unet):
                scores = score_trajectories(policy, trajectories)
            gap += (scores - trajectories.log_probs).abs().max().item()  # NaN stays NaN
        say(f"on-policy gap{', with deterministic cuDNN' * deterministic}: {gap:.1e}")
        if gap == 0:
            return trajectories
    raise InputError(f"on-policy gap {gap:.1e}: the clip would act on noise; try --dtype fp32.")


def draw_samples(config: Config, models: Models, policy: Policy, prompts: list[str]) -> Samples:
    """Up to 8 images of each of up to 8 evenly spaced prompts, from the same noise every time."""
    count, images = min(8, config.prompts_per_epoch), min(8, config.images_per_prompt)
    shown = [prompts[n * len(prompts) // count] for n in range(count)]
    generators = image_generators(config.seed, 0, range(count), images)
    x_0 = sample_prompts(models, policy, shown, generators).latents[:, -1]
    pictures, rewards = score_images(models, x_0, shown)
    return Samples(shown, pictures.cpu(), rewards.cpu())


@torch.enable_grad()
def run(
    config: Config, reward: Callable | None = None, prompts: list[str] | None = None, *,
    train: Callable = train, state: object = None,
) -> None:  # fmt: skip
    """Train from the first epoch or the last checkpoint, then show what changed; InputError for
    what cannot run. reward, (uint8 images (M, 3, H, W), M prompts) -> M numbers, and prompts stand
    in for those that config names. `state` is what another `train` keeps between epochs."""
    device = start_processes()
    if config.program != Config.program and train.__module__ == __name__:
        raise InputError(f"settings of {config.program}: begin it by the `run` of that file.")
    config = config.resolved(reward, prompts)
    if prompts is None:
        prompts = (text for file in config.prompts for text in load_prompts(file))
    prompts = as_prompts(prompts, "--prompts")
    with run_folder.only_writer(Path(config.out)):
        saved = run_folder.open_run(config)
        config, models, seconds = load_what_fits(config, device, reward, prompts)
        learned = {n: p for n, p in models.sd.unet.named_parameters() if p.requires_grad}
        options = {"weight_decay": config.weight_decay, "fused": device.type == "cuda"}
        optimizer = torch.optim.AdamW(learned.values(), config.learning_rate, **options)
        learning = (learned, optimizer, state)
        start = saved["epoch"] + 1
        report.forecast(config, seconds, start)
        before = draw_samples(config, models, models.reference, prompts)

        digests = run_folder.digests(models, prompts)
        record, rows = run_folder.begin(config, digests, saved, learning)
        track = report.open_tracker(config, record, start)
        report.save_samples(config, 0, before, track)
        epochs = train(config, models, optimizer, prompts, start)
        for epoch in range(start, config.epochs + 1):
            report.SECONDS.clear()
            rows.append(report.as_row(epoch, next(epochs)))
            run_folder.end_epoch(config, record, rows, learning, models.sd)
            report.show_epoch(config, rows, start, track)
            if epoch % config.sample_every == 0 and epoch < config.epochs:
                now = draw_samples(config, models, models.policy, prompts)
                report.save_samples(config, epoch, now, track)

        after = draw_samples(config, models, models.policy, prompts)
        report.compare(config, before, after, track)
        models.sd.save(Path(config.out), record, config.epochs)


parse_args = functools.partial(parse_settings, Config)
main = functools.partial(run_command, Config, run)

if __name__ == "__main__":
    main()
