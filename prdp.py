"""PRDP: Proximal Reward Difference Prediction, for reward finetuning of diffusion models
(Deng et al., CVPR 2024). Read it beside the paper: the sections follow the paper's order.

    python prdp.py --preset toy                                  # a small model: no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt  # SD v1.4, one GPU, Table 4
    python prdp.py --resume runs/toy --epochs 40                 # go on with a run

Paper                   Here             Shape (M = N*B images)  Note
x_t                     latents[:, k]    (M, T+1, C, H, W)       k counts along the way, from x_T
log pi(x_{t-1}|x_t, c)  log_probs[:, k]  (M, T)                  float64, nats per latent dimension
r-hat_t, Eq. 19         log_ratio        (..., B, T)             log_probs - log_probs_ref
r                       rewards          (..., B)                in the reward's own unit
beta, Eq. 5             kl_weight                                `betas` is the DDPM noise schedule
epsilon, Eq. 20         clip_range                               in the unit of log_probs
the network's epsilon   noise_pred       (2M, C, H, W)           both branches of guidance; or its v
sigma_t, Eq. 2          sigma            (T,)

Units: log_probs are means over C*H*W and the loss takes a mean over T, where Eqs. 4, 10 and 21 sum.
So the beta of Eq. 5 is kl_weight / (T*C*H*W). Table 4 is read in these units.

Departures from the paper, and choices where it is silent (docs/paper.md says why):
 1. The mean over T (App. G), where Eqs. 3, 10, 21 sum: loss_sum(b) == T**2 * loss_mean(b * T).
 2. log_prob is a mean over latent dimensions, as in DDPO's code, whose clip range Table 4 shares.
 3. The mean is over pairs whose rewards differ (App. G; Alg. 1, line 10: all); 0 if none do.
 4. Steps are "leading"-spaced, sigma_t is the posterior's, alpha-bar ends at alphas_cumprod[0].
 5. The gradient runs through both branches of guidance.
 6. With K = 1 (large scale) theta is theta_old at the only update: Eq. 18's clip never acts there.
 7. The number format of the network passes (--dtype); the paper gives none.
 8. --offline draws new images of the pretrained model each epoch (Sec. 4.3: a fixed data set).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rewards import Reward, load_reward, resolve_reward, reward_files
from stable_diffusion import StableDiffusion, WithoutAdapters, cast_once, compiled, noise_settings
from support import report, run_folder
from support.cli import InputError, command, during, flag
from support.distributed import end_processes, own_share, processes, say, start_processes
from support.inputs import as_prompts, load_prompts
from support.report import Samples, epoch_metrics, phase
from support.settings import RunSettings, parse_settings, set_precision
from support.update import fp16_scale, gradient_step, require_finite

# ---- 1. Settings: Table 4 ------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
LARGE = dict(epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8,
             clip_range=1e-4)  # fmt: skip
PRESETS = {
    "small": {},
    "large": LARGE | dict(kl_weight=3e-6, learning_rate=7e-6,
                          prompts=(f"{HERE}/prompts/hpdv2_train.json",)),
    "multi": LARGE | dict(reward=("pickscore=10", "hpsv2=2", "aesthetic=0.05"),
                          prompts=(f"{HERE}/prompts/pickapic_train.jsonl",)),
    "toy": dict(model=f"{HERE}/toy/sd", reward=(f"pickscore:{HERE}/toy/pickscore",),
                prompts=(f"{HERE}/prompts/shapes.txt",), epochs=30, updates_per_epoch=4,
                prompts_per_epoch=8, images_per_prompt=8, clip_range=1e-3, learning_rate=2e-4,
                ddpm_steps=10, microbatch=64, sample_every=5),
}  # fmt: skip


@dataclass
class Config(RunSettings):
    """The settings of a run, beside its folder's and its machine's (support/settings.py). The
    defaults are the small-scale column of Table 4."""

    program: ClassVar = "prdp.py"
    presets: ClassVar = PRESETS
    model: str = flag("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1 or 2, hub id or folder",
                      group="PRDP")  # fmt: skip
    reward: tuple = flag(("hpsv2",), "what to maximise, see rewards.py", nargs="+", type=str)
    prompts: tuple = flag((f"{HERE}/prompts/animals.txt",), "files", nargs="+", type=str)
    seed: int = flag(0, "of the prompts drawn and of the noise")
    epochs: int = flag(100, "E, rounds of sampling and learning")
    updates_per_epoch: int = flag(10, "K, gradient updates per epoch")
    prompts_per_epoch: int = flag(32, "N, drawn with replacement")
    images_per_prompt: int = flag(16, "B")
    kl_weight: float = flag(3e-5, "beta; unit: reward per nat per latent dimension")
    ddpm_steps: int = flag(50, "T, denoising steps")
    clip_range: float = flag(1e-6, "epsilon of Eq. 20, nats per latent dimension; inf: no clipping")
    guidance_scale: float = flag(5.0, "of classifier-free guidance, in sampling and in training")
    learning_rate: float = flag(1e-5, "of AdamW")
    weight_decay: float = flag(1e-4, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients longer than this are scaled down to it")
    offline: bool = flag(False, "learn from images of the pretrained model alone (Sec. 4.3)")

    def check(self) -> None:
        """Raises InputError for settings that do not go together."""
        if self.images_per_prompt < 2:
            raise InputError("--images-per-prompt 1: PRDP compares images of a prompt; 2 or more.")

    def passes(self) -> int:
        """How many an epoch makes of an image: drawn, scored under the reference and before each
        update but the first, and one with its gradient, which costs three, for each update."""
        return 1 + self.updates_per_epoch + 3 * self.updates_per_epoch


# ---- 2. The policy: DDPM ancestral sampling, a chain of Gaussians (Sec. 2) -----------------------


def guided_mean(
    noise_pred: Tensor, x_t: Tensor, coef_sample: Tensor, coef_noise: Tensor, guidance_scale: float
) -> Tensor:
    """mu_theta(x_t, c) of Eq. 2 under classifier-free guidance (Sec. 4.1): (M, C, H, W) float64."""
    unconditional, conditional = noise_pred.double().chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    coef_sample, coef_noise = coef_sample.view(-1, 1, 1, 1), coef_noise.view(-1, 1, 1, 1)
    return coef_sample * x_t.double() + coef_noise * guided


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """log N(sample; mean, sigma^2 I) of Eqs. 2 and 4, a mean over latent dimensions: (M,) float64.

    sample, mean (M, ...), sigma (M,) or a number. float64 whatever comes in: at the last step a
    log-prob is about 2.5, where float32 numbers lie 2.4e-7 apart, a quarter of Table 4's smallest
    clip_range. (Summed over 4*64*64 dimensions it would be 40,000: far worse.)
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=sample.device)
    assert sample.shape == mean.shape, (sample.shape, mean.shape)
    assert sigma.shape in ((), sample.shape[:1]), (sigma.shape, sample.shape)
    squared = (sample.double() - mean.double()).square().flatten(1).mean(1)
    return -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)


class Schedule(NamedTuple):
    """Eq. 2: N(coef_sample * x_t + coef_noise * noise_pred, sigma^2 I); each (T,), from x_T on."""

    timesteps: Tensor  # int64: 981, 961, ..., 1 for T = 50
    coef_sample: Tensor  # float64
    coef_noise: Tensor  # float64
    sigma: Tensor  # float64, > 0

    def at(self, steps: Tensor) -> list[Tensor]:
        """coef_sample, coef_noise and sigma of some steps (M,): each (M,)."""
        return [column[steps] for column in self[1:]]


def ddpm_schedule(scheduler_config: dict, num_steps: int) -> Schedule:
    """The coefficients of Eq. 2 (Ho et al. 2020, Eqs. 6, 7, 11); the chain of DDIM with eta = 1.

    Reads the noise schedule, and whether the network predicts noise or v, from a diffusers
    scheduler's config. Steps are "leading"-spaced, and alpha-bar after the last one is
    alphas_cumprod[0], as Stable Diffusion is configured. Raises InputError for another kind of
    schedule, and for sigma == 0, where log-probabilities do not exist.
    """
    config = noise_settings(scheduler_config)
    train_steps = config["num_train_timesteps"]
    power = {"scaled_linear": 2, "linear": 1}[config["beta_schedule"]]
    start, end = (config[name] ** (1 / power) for name in ("beta_start", "beta_end"))
    betas = torch.linspace(start, end, train_steps, dtype=torch.float64) ** power
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    stride = train_steps // max(num_steps, 1)
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config["steps_offset"]
    if stride * num_steps < 0.8 * train_steps or timesteps[0] >= train_steps:
        most = f"at most {train_steps}, and nearly a divisor of it"
        raise InputError(f"--ddpm-steps {num_steps}: must be {most}; the paper's is 50.")
    alpha_bar = alphas_cumprod[timesteps]  # of x_t
    final = torch.ones(()).double() if config["set_alpha_to_one"] else alphas_cumprod[0]
    previous = timesteps - stride
    alpha_bar_previous = torch.where(previous >= 0, alphas_cumprod[previous.clamp(min=0)], final)
    alpha = alpha_bar / alpha_bar_previous

    variance = (1 - alpha_bar_previous) / (1 - alpha_bar) * (1 - alpha)
    sigma = variance.clamp(min=0).sqrt()
    if not (sigma > 0).all():
        remedy = "set steps_offset to 1 and set_alpha_to_one to false in its scheduler_config.json"
        raise InputError(f"the model's scheduler has sigma = 0 at its last step; {remedy}.")
    coef_sample = alpha.rsqrt()
    coef_noise = -(1 - alpha) / ((1 - alpha_bar) * alpha).sqrt()
    if config["prediction_type"] == "v_prediction":
        # noise = sqrt(alpha_bar) * v + sqrt(1 - alpha_bar) * x_t
        coef_sample = alpha.sqrt()
        coef_noise = coef_noise * alpha_bar.sqrt()
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network and how it is run. The reference differs in `unet` alone."""

    # (sample (M, C, H, W), timestep (M,), encoder_hidden_states (M, L, D)) -> .sample (M, C, H, W)
    unet: Callable
    schedule: Schedule
    null_text: Tensor  # (L, D), the embedding of the empty prompt
    guidance_scale: float = 5.0
    microbatch: int = 16
    autocast: torch.dtype | None = None  # None: the network runs in its own dtype


def run_unet(policy: Policy, x_t: Tensor, text: Tensor, steps: Tensor) -> Tensor:
    """noise_pred of M images, each at its own of the T steps: (2M, C, H, W), in one pass, the
    unconditional branch of guidance first."""
    timesteps = policy.schedule.timesteps[steps]
    both = torch.cat([policy.null_text.expand_as(text), text])  # (2M, L, D)
    with torch.autocast(x_t.device.type, policy.autocast, enabled=policy.autocast is not None):
        inputs = (torch.cat([x_t, x_t]), timesteps.repeat(2))
        return policy.unet(*inputs, encoder_hidden_states=both).sample


# ---- 3. Trajectories: sampling and scoring (Eqs. 1 to 4) -----------------------------------------


def or_kernel(function: Callable) -> Callable:
    """On CUDA tensors the Triton kernel of the same name in kernels/log_prob.py runs in its place,
    where Triton can: it computes the same (tests/test_kernels.py)."""

    @functools.wraps(function)
    def chosen(noise_pred: Tensor, x_t: Tensor, *rest) -> Tensor | tuple[Tensor, Tensor]:
        kernels = load_kernels()[0] if x_t.is_cuda and noise_pred.dtype != torch.float64 else None
        return getattr(kernels, function.__name__, function)(noise_pred, x_t, *rest)

    return chosen


@functools.cache
def load_kernels() -> tuple[object, str]:
    """kernels/log_prob.py, or None where it cannot run; and what runs, in words. It is loaded by
    its path: the name `kernels` is a package of Hugging Face's."""
    if not torch.cuda.is_available():
        return None, "eager (no CUDA device)"
    if importlib.util.find_spec("triton") is None:
        return None, "eager (triton is not installed)"
    spec = importlib.util.spec_from_file_location("log_prob", HERE / "kernels" / "log_prob.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, "Triton kernels"


@or_kernel
def guided_log_prob(
    noise_pred: Tensor,  # (2M, ...), the unconditional branch first; it alone gets a gradient
    x_t: Tensor,  # (M, ...) float32
    x_prev: Tensor,  # (M, ...) float32: x_{t-1}
    coef_sample: Tensor,  # (M,) float64, of Eq. 2, per row: steps may be mixed
    coef_noise: Tensor,  # (M,) float64
    sigma: Tensor,  # (M,) float64
    guidance_scale: float,
) -> Tensor:
    """log pi(x_{t-1} | x_t, c) of Eqs. 2 and 4: (M,) float64, nats per latent dimension."""
    mean = guided_mean(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    return gaussian_log_prob(x_prev, mean, sigma)


@or_kernel
@torch.no_grad()
def guided_sample(
    noise_pred: Tensor, x_t: Tensor, noise: Tensor, coef_sample: Tensor, coef_noise: Tensor,
    sigma: Tensor, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_{t-1} ~ N(mean, sigma^2 I) of Eq. 2 from standard normal noise (M, ...), in float32, and
    the log-prob of that rounded number: what `guided_log_prob` says of it, in every bit."""
    mean = guided_mean(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    x_prev = (mean + sigma.view(-1, 1, 1, 1) * noise).float()
    return x_prev, gaussian_log_prob(x_prev, mean, sigma)


class Trajectories(NamedTuple):
    """Denoising trajectories of M images, and their log-probs under the policy that drew them."""

    latents: Tensor  # (M, T+1, C, H, W) float32: x_T, ..., x_0
    log_probs: Tensor  # (M, T) float64
    text: Tensor  # (M, L, D), the embedding of each image's prompt


def image_generators(seed: int, epoch: int, prompts: Sequence[int], images: int) -> list:
    """A CPU torch.Generator an image: its noise depends on no microbatch, device or other image."""
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

    with phase("sample", num_images * num_steps) as done:
        for rows in torch.arange(num_images).split(policy.microbatch):
            # x_T and what each step adds, drawn at once: at every step a GPU would wait for it.
            own = [generators[m] for m in rows for _ in range(num_steps + 1)]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in own])
            noise = noise.unflatten(0, (len(rows), -1)).to(text.device)  # (m, T+1, C, H, W)
            rows = rows.to(text.device)
            latents[rows, 0] = noise[:, 0]
            for k in range(num_steps):
                x_t, steps = latents[rows, k], torch.full_like(rows, k)
                noise_pred = run_unet(policy, x_t, text[rows], steps)
                latents[rows, k + 1], log_probs[rows, k] = guided_sample(
                    noise_pred, x_t, noise[:, k + 1], *policy.schedule.at(steps),
                    policy.guidance_scale,
                )  # fmt: skip
                done(len(rows))
    return Trajectories(latents, log_probs, text)


@torch.no_grad()
def score_trajectories(policy: Policy, trajectories: Trajectories, label: str = "score") -> Tensor:
    """log pi(x_{t-1} | x_t, c) of stored trajectories under a policy (Eqs. 2 to 4): (M, T) float64.

    Runs in the microbatches, shapes and order of `sample_trajectories`, so that unchanged weights
    return the bits of `trajectories.log_probs`. Another batch size alone can move them by more than
    the clip range.
    """
    log_probs = torch.empty_like(trajectories.log_probs)
    num_images, num_steps = log_probs.shape
    with phase(label, num_images * num_steps) as done:
        for rows in torch.arange(num_images, device=log_probs.device).split(policy.microbatch):
            for k in range(num_steps):
                steps = torch.full_like(rows, k)
                log_probs[rows, k] = step_log_prob(policy, trajectories, rows, steps)
                done(len(rows))
    return log_probs


def step_log_prob(
    policy: Policy, trajectories: Trajectories, rows: Tensor, steps: Tensor
) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of some images (m,) at some steps (m,), with gradient: (m,)."""
    x_t, x_prev = trajectories.latents[rows, steps], trajectories.latents[rows, steps + 1]
    noise_pred = run_unet(policy, x_t, trajectories.text[rows], steps)
    coefficients = policy.schedule.at(steps)
    return guided_log_prob(noise_pred, x_t, x_prev, *coefficients, policy.guidance_scale)


# ---- 4. The loss: reward difference prediction, proximal updates (Secs. 3.1 and 3.3, App. G) -----


def prdp_loss(
    log_probs: Tensor,  # (..., B, T), under pi_theta; carries the gradient
    log_probs_old: Tensor,  # (..., B, T), under pi_theta_old, which drew the trajectories
    log_probs_ref: Tensor,  # (..., B, T), under pi_ref
    rewards: Tensor,  # (..., B)
    clip_range: float,  # epsilon of Eq. 20, in the unit of log_probs; inf: the RDP loss of Eq. 14
    kl_weight: float,  # beta
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
        return x.unsqueeze(-1) - x.unsqueeze(-2)  # (..., B) -> (..., B, B): [a, b] is x_a - x_b

    log_ratio_diff = pairwise_diff(log_ratio.mean(-1))  # Eqs. 10 and 11, with App. G's mean over T
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
    and each microbatch of entries can be run again on its own. This is exact for any microbatches,
    because only derivatives are taken here and no value is compared with another pass's. So entries
    of weight 0 are skipped (clipped, in an image whose clipped error wins Eq. 18 in every pair),
    and the rest packed densely, steps of different images and times together.
    """
    assert weights.shape == trajectories.log_probs.shape, weights.shape
    entries = entries_to_run(policy, weights)
    with phase("update", len(entries)) as done:
        for chunk in entries.split(policy.microbatch) if len(entries) else ():
            rows, steps = chunk.unbind(1)
            log_prob = step_log_prob(policy, trajectories, rows, steps)
            (weights[rows, steps] * log_prob).sum().backward()
            done(len(chunk))


def entries_to_run(policy: Policy, weights: Tensor) -> Tensor:
    """(image, step) of each weight that is not 0. On a GPU, or compiled, where a new batch size
    takes seconds to prepare, entries of weight 0 fill up the last microbatch."""
    entries = weights.nonzero()
    if weights.is_cuda or hasattr(policy.unet, "_orig_mod"):
        missing = -len(entries) % policy.microbatch
        entries = torch.cat([entries, (weights == 0).nonzero()[:missing]])
    return entries


# ---- 6. Online optimisation (Sec. 3.2, Algorithm 1) ----------------------------------------------


def train(
    config: Config, models: Models, optimizer: torch.optim.Optimizer, prompts: list[str], start: int
) -> Iterator[dict[str, float]]:
    """Algorithm 1 from epoch `start` on; yields each epoch's metrics. Line 1: `load_models`."""
    policy, reference = models.policy, models.reference

    def by_prompt(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, config.images_per_prompt))  # (M, ...) -> (N, B, ...)

    for epoch in range(start, config.epochs + 1):  # line 2
        # Line 3: theta_old is theta as the epoch begins. Sec. 4.3: offline, pi_ref draws instead.
        sampler = reference if config.offline else policy
        drawn, trajectories = sample_epoch(config, models, sampler, prompts, epoch)  # lines 4 to 7
        _, rewards = score_images(models, trajectories, drawn)  # line 8

        with models.sd.in_use(reference.unet):  # Eq. 10
            log_probs_ref = score_trajectories(reference, trajectories, "reference")
        log_probs_old = trajectories.log_probs
        if config.offline:
            log_probs_old = score_trajectories(policy, trajectories)

        updates = []
        for k in range(config.updates_per_epoch):  # line 9
            log_probs = score_trajectories(policy, trajectories) if k else log_probs_old.clone()
            log_probs.requires_grad_()
            fixed = [by_prompt(x) for x in (log_probs_old, log_probs_ref, rewards)]
            settings = config.clip_range, config.kl_weight
            loss = prdp_loss(by_prompt(log_probs), *fixed, *settings)  # line 10
            (weights,) = torch.autograd.grad(loss, log_probs)

            backward = functools.partial(backward_trajectories, policy, trajectories)  # line 11
            scale = fp16_scale(policy.autocast, weights, trajectories.latents[0, 0].numel())
            norm = gradient_step(optimizer, backward, weights, config.max_grad_norm, scale)
            matrices = [by_prompt(log_probs.detach()), *fixed]
            updates.append({**update_metrics(config, *matrices), "skipped_fraction": weights == 0,
                            "loss": loss, "grad_norm": norm})  # fmt: skip

        ratio = log_probs_old - log_probs_ref
        kl = ratio * trajectories.latents[0, 1:].numel()
        others = {"log_ratio_ref": ratio, "kl_nats": kl}
        del trajectories, backward  # and their memory, before others are drawn
        yield epoch_metrics(rewards, models.reward.parts, updates, others)


def update_metrics(
    config: Config, log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor, rewards: Tensor
) -> dict[str, Tensor]:
    """Of one update, before it is made; docs/running.md defines the fields."""
    fixed = (log_probs_old, log_probs_ref, rewards, math.inf, config.kl_weight)
    loss_unclipped = prdp_loss(log_probs, *fixed)  # Eq. 14
    moved = (log_probs - log_probs_old).abs()
    return {
        "loss_unclipped": loss_unclipped,
        "explained": 1 - loss_unclipped / prdp_loss(log_probs_ref, *fixed),
        "clip_fraction": moved > config.clip_range,
        "log_ratio_old": moved,
    }


def draw_prompts(config: Config, prompts: list[str], epoch: int) -> list[str]:
    """N prompts, independent and uniform (Alg. 1, line 4); a function of seed and epoch alone."""
    (generator,) = image_generators(config.seed, -epoch, range(1), 1)  # no image has this stream
    drawn = torch.randint(len(prompts), (config.prompts_per_epoch,), generator=generator)
    return [prompts[i] for i in drawn]


def sample_epoch(
    config: Config, models: Models, policy: Policy, prompts: list[str], epoch: int
) -> tuple[list[str], Trajectories]:
    """Alg. 1, lines 4 to 7: B trajectories of each of N prompts, and each image's prompt; of N,
    this process's share."""
    drawn = draw_prompts(config, prompts, epoch)
    own = own_share(len(drawn))
    numbers, images = range(len(drawn))[own], config.images_per_prompt
    generators = image_generators(config.seed, epoch, numbers, images)
    trajectories = sample_prompts(models, policy, drawn[own], generators)
    return [prompt for prompt in drawn[own] for _ in range(images)], trajectories


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


def score_images(
    models: Models, trajectories: Trajectories, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """The M images, uint8 (M, 3, H, W), and their rewards, (M,) (Alg. 1, line 8)."""
    with phase("reward"):
        images = models.sd.decode(trajectories.latents[:, -1], models.policy.microbatch)
        with models.sd.in_use(models.reward):
            return images, models.reward(images, prompts)


# ---- 7. Models, a run, main ----------------------------------------------------------------------


class Models(NamedTuple):
    """Everything with weights. Scoring with `reference` is scoring with the pretrained model."""

    policy: Policy
    reference: Policy
    sd: StableDiffusion  # its `unet` is what learns; text encoder and VAE
    reward: Reward


def load_policy(config: Config, device: torch.device) -> tuple[StableDiffusion, Policy]:
    """A pretrained model, and its UNet as the policy."""
    autocast = set_precision(config.dtype)
    idle = torch.device("cpu") if config.offload == "on" else device
    sd = StableDiffusion(config.model, device, idle, autocast)
    schedule = ddpm_schedule(sd.noise_settings, config.ddpm_steps)
    schedule = Schedule(*(column.to(device) for column in schedule))
    null_text = sd.encode([""])[0]
    if config.gradient_checkpointing:
        sd.unet.enable_gradient_checkpointing()
    if config.lora_rank:
        sd.add_adapters(config.lora_rank, config.seed)
    unet = compiled(sd.unet) if config.compile else sd.unet
    how = (config.guidance_scale, config.microbatch, autocast)
    return sd, Policy(unet, schedule, null_text, *how)


def load_models(config: Config, device: torch.device, reward: Callable | None = None) -> Models:
    """The policy, and the frozen reference it starts from (Alg. 1, line 1)."""
    sd, policy = load_policy(config, device)
    images = config.prompts_per_epoch * config.images_per_prompt // processes()
    policy = policy._replace(microbatch=min(policy.microbatch, max(images, 1)))
    if config.lora_rank:
        reference = WithoutAdapters(policy.unet, sd.unet)
    else:
        reference = copy.deepcopy(sd.unet).requires_grad_(False)  # line 1
        reference.to(sd.idle)
        if config.compile:
            reference = compiled(reference)
        elif policy.autocast:
            cast_once(reference, policy.autocast)
    reward = load_reward(config.reward if reward is None else reward, sd.idle)
    return Models(policy, policy._replace(unet=reference), sd, reward)


def check_on_policy(config: Config, models: Models, prompt: str) -> float:
    """Score a new microbatch again, under policy and reference: both must return the same bits, for
    Eq. 20 compares two passes to within clip_range, 1e-6 to 1e-4 in Table 4, and would clip noise.
    Returns the seconds that a pass through T steps takes an image."""
    microbatch = models.policy.microbatch
    for deterministic in (False, True):
        torch.backends.cudnn.deterministic = deterministic
        generators, gap = image_generators(config.seed, 0, range(1), microbatch), 0.0
        trajectories = sample_prompts(models, models.reference, [prompt], generators)
        for policy in (models.policy, models.reference):
            with models.sd.in_use(policy.unet), report.timing() as seconds:
                scores = score_trajectories(policy, trajectories)
            gap += (scores - trajectories.log_probs).abs().max().item()  # NaN stays NaN
        say(f"on-policy gap{', with deterministic cuDNN' * deterministic}: {gap:.1e}")
        if gap == 0:
            return seconds["score"] / microbatch  # of the last pass: warm, and compiled
    raise InputError(f"on-policy gap: {gap:.1e}, so the clip would act on noise; try --dtype fp32.")


def draw_samples(config: Config, models: Models, policy: Policy, prompts: list[str]) -> Samples:
    """At most 8 images of 8 prompts spread over all, from the same noise every time."""
    count, images = min(8, config.prompts_per_epoch), min(8, config.images_per_prompt)
    shown = [prompts[n * len(prompts) // count] for n in range(count)]
    generators = image_generators(config.seed, 0, range(count), images)
    trajectories = sample_prompts(models, policy, shown, generators)
    captions = [prompt for prompt in shown for _ in range(images)]
    pictures, rewards = score_images(models, trajectories, captions)
    return Samples(shown, pictures.cpu(), rewards.cpu())


def run(
    config: Config, reward: Callable | None = None, prompts: list[str] | None = None, *,
    train: Callable = train, state: object = None,
) -> None:  # fmt: skip
    """Train from the first epoch or the last checkpoint, then show what changed.

    reward, (uint8 images (M, 3, H, W), M prompts) -> M numbers, and prompts are taken in place of
    those that config names. Another `train` yields an epoch's metrics as this one does; `state`,
    what it keeps between epochs, has state_dict and load_state_dict. InputError: cannot run.
    """
    device = start_processes()
    given = {name: () for name, x in (("reward", reward), ("prompts", prompts)) if x is not None}
    config = replace(config, **given).resolved()
    if prompts is None:
        prompts = [text for file in config.prompts for text in load_prompts(file)]
    prompts = as_prompts(prompts)
    saved = run_folder.open_run(config)
    start = saved["epoch"] + 1

    models = load_models(config, device, reward)
    learned = {n: p for n, p in models.sd.unet.named_parameters() if p.requires_grad}
    options = {"weight_decay": config.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(learned.values(), config.learning_rate, **options)
    report.introduce(config, learned, load_kernels()[1], prompts, models.sd.pipe.tokenizer)
    report.forecast(config, check_on_policy(config, models, prompts[0]), start)
    before = draw_samples(config, models, models.reference, prompts)

    record = run_folder.make_record(config, prompts, reward_files(config.reward), models.sd.pipe)
    rows = run_folder.begin(config, record, saved, (learned, optimizer, state))
    del saved  # and its memory
    report.save_grid(config, 0, before)
    epochs = train(config, models, optimizer, prompts, start)
    for epoch in range(start, config.epochs + 1):
        with report.timing() as seconds, during(f"epoch {epoch}"):
            rows.append(report.as_row(epoch, next(epochs), seconds))
        run_folder.end_epoch(config, record, rows, (learned, optimizer, state))
        if epoch % config.sample_every == 0 and epoch < config.epochs:
            report.save_grid(config, epoch, draw_samples(config, models, models.policy, prompts))
        report.show_epoch(config, rows, start)

    after = draw_samples(config, models, models.policy, prompts)
    report.save_grid(config, config.epochs, after)
    models.sd.save(Path(config.out))
    report.compare(config, rows, before, after)


def parse_args(argv: list[str], kind: type[Config] = Config) -> Config:
    """A command line, over the preset or the settings of the run that --resume names."""
    return parse_settings(kind, sys.modules[kind.__module__].__doc__.split("\n\nPaper ")[0], argv)


def main(argv: list[str] | None = None, kind: type[Config] = Config, run: Callable = run) -> None:
    with command(kind.program):
        config = parse_args(sys.argv[1:] if argv is None else argv, kind)
        try:
            run(config)
        except KeyboardInterrupt:
            again = f"python {kind.program} --resume {shlex.quote(config.out)}"
            say(f"stopped; once epochs have begun, go on with: {again}")
            raise
        end_processes()


if __name__ == "__main__":
    main()
