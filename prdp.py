"""PRDP: Proximal Reward Difference Prediction for reward finetuning of diffusion models (Deng et al., CVPR 2024).

    python prdp.py --preset toy                                     # embedded 32x32 model, no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt     # SD v1.4, one GPU, Table 4 small-scale

In reading order: settings (Table 4), the DDPM policy (Sec. 2), sampling and scoring of trajectories (Eqs. 1 to 4),
the loss (Secs. 3.1 and 3.3, App. G), its exact gradient in the memory of one microbatch, the online loop that calls
it (Sec. 3.2, Algorithm 1), baselines, then plumbing. The Gaussian of Eqs. 2 and 4 is in kernels/log_prob.py.

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

Departures from the paper, and choices where it is silent or says two things (the README says why):
 1. The loss takes the mean over T (App. G), not Eqs. 10, 19 and 21's sum: loss_sum(beta) == T**2 * loss_mean(beta * T).
 2. log_prob is a mean over latent dimensions, as in DDPO's code, whose clip range is Table 4's large-scale one.
 3. The loss averages over pairs whose rewards differ (App. G; Alg. 1, line 10: over all B(B-1)/2). If all tie it is 0,
    where App. G gives NaN.
 4. After the last step alpha-bar is alphas_cumprod[0], as in Stable Diffusion's samplers.
 5. With K = 1 (large scale) theta is theta_old at the only update, and the clip of Eq. 18 never acts. Kept as printed.
 6. The number format of the network passes (`dtype` in each preset); the paper gives none.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kernels
from kernels import gaussian_log_prob, guided_log_prob, guided_sample  # noqa: F401  (the first for other code)
from prompts import load_prompts, report
from prompts.report import STOP, progress, stop_when_asked, timed
from rewards import InputError, Reward, load_reward, parse_reward

# ---- 1. Settings: Table 4 ----------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
PROMPTS = str(HERE / "prompts") + os.sep
VERSION = 2  # of the checkpoint's layout


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
    prompts: tuple[str, ...] = flag((PROMPTS + "animals.txt",), "files", nargs="+", type=str, metavar="FILE")
    loss: str = flag("prdp", "PRDP, or a baseline", choices=("prdp", "ddpo", "ddpo-sf", "rwr", "rwr-sparse", "dpo"))
    out: str = flag("", "run folder, new or empty (default: runs/PRESET; of --evaluate: RUN/evaluation)")
    resume: str = flag("", "run folder to go on with, under its own settings", metavar="RUN")
    evaluate: str = flag("", "a run, folder or hub model to measure instead of training", metavar="RUN_OR_MODEL")
    against: str = flag("", "model to compare that one with (default: the one RUN began from)", metavar="BASE")
    samples_per_prompt: int = flag(64, "images of each prompt that --evaluate draws", low=2)
    seed: int = flag(0, "of the prompts drawn and of the noise", low=0)
    # Table 4, row by row
    epochs: int = flag(100, "E, rounds of sampling and learning", low=1)
    updates_per_epoch: int = flag(10, "K, gradient updates per epoch", low=1)
    prompts_per_epoch: int = flag(32, "N, drawn with replacement", low=1)
    images_per_prompt: int = flag(16, "B, at least 2 where the loss compares images", low=1)
    kl_weight: float = flag(3e-5, "beta; unit: reward per nat per latent dimension", above=0)
    ddpm_steps: int = flag(50, "T, denoising steps", low=1)
    clip_range: float = flag(1e-6, "epsilon of Eq. 20; unit: nats per latent dimension; inf: no clipping", above=0)
    guidance_scale: float = flag(5.0, "of classifier-free guidance, in sampling and in training", low=0)
    learning_rate: float = flag(1e-5, "of AdamW", above=0)
    weight_decay: float = flag(1e-4, "of AdamW", low=0)
    max_grad_norm: float = flag(1.0, "gradients longer than this are scaled down to it", above=0)
    # ablations
    advantage: str = flag("per-prompt", "reward statistics of --loss ddpo, ddpo-sf", choices=("per-prompt", "global"))
    offline: bool = flag(False, "learn from trajectories of the pretrained model only (Sec. 4.3)")
    share_initial_noise: bool = flag(False, "the B images of a prompt share x_T; not in the paper")
    # the machine
    microbatch: int = flag(8, "images per network pass; must divide N*B", low=1)
    dtype: str = flag("fp32", "of the network passes; weights stay fp32", choices=("fp32", "bf16", "fp16"))
    lora_rank: int = flag(0, "train low-rank adapters of the attention layers instead; 0: the full UNet", low=0)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass, to save memory")
    offload: str = flag(
        "auto", "idle networks wait on the CPU; auto: of a GPU under 40 GB", choices=("auto", "on", "off")
    )
    compile: bool = flag(False, "torch.compile the UNet's passes; minutes of start-up")
    save_every: int = flag(1, "epochs between checkpoints", low=1)
    sample_every: int = flag(10, "epochs between sample grids", low=1)
    log_to: str = flag("none", "also send metrics there", choices=("none", "tensorboard", "wandb"))


LARGE = dict(epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, clip_range=1e-4)
PRESETS = {
    "small": {},
    "large": LARGE | dict(kl_weight=3e-6, learning_rate=7e-6, dtype="bf16", prompts=(PROMPTS + "hpdv2_train.json",)),
    "multi": LARGE | dict(
        kl_weight=3e-5, learning_rate=1e-5, dtype="bf16", prompts=(PROMPTS + "pickapic_train.jsonl",),
        reward="pickscore=10,hpsv2=2,aesthetic=0.05",
    ),
    "toy": dict(
        epochs=30, updates_per_epoch=4, prompts_per_epoch=8, images_per_prompt=8, kl_weight=3e-5,
        clip_range=1e-3, learning_rate=2e-4, ddpm_steps=10, microbatch=64, sample_every=5,
        prompts=(PROMPTS + "shapes.txt",), model=str(HERE / "toy" / "sd"), reward=f"pickscore:{HERE}/toy/pickscore",
    ),
}  # fmt: skip


def parse_args(argv: list[str]) -> Config:
    """The command line, over the preset, over the defaults."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in dataclasses.fields(Config):
        options = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        options |= f.metadata["argparse"]
        options["help"] += f" (default: {f.default})" if f.default not in ("", False) else ""
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    preset, run = given.get("preset", "small"), Path(given.get("resume") or given.get("evaluate", ""))
    settings = {"out": f"runs/{preset}", **PRESETS[preset]}
    if "resume" in given or "evaluate" in given and (run / "config.json").is_file():
        try:
            settings = vars(Config(**json.loads((run / "config.json").read_text())))
        except FileNotFoundError:
            raise InputError(f"--resume {run}: no config.json there, so it is no run folder.") from None
        except (ValueError, TypeError) as error:  # ValueError: no JSON, or no UTF-8
            raise InputError(f"{run / 'config.json'}: damaged, or of another version ({error}).") from error
    if "resume" in given:
        harmless = {"resume", "out", "epochs", "save_every", "sample_every", "log_to", "offload"}
        for name in sorted(given.keys() - harmless):
            if given[name] != settings[name]:
                option = f"--{name.replace('_', '-')} {given[name]}"
                raise InputError(f"{option}: would change the result of the run, which has {settings[name]}.")
        given["out"] = given["resume"]
    elif "evaluate" in given and (run / "config.json").is_file():
        settings |= {"out": str(run / "evaluation"), "against": settings["model"], "model": str(run / "pipeline")}
        if not (run / "pipeline").is_dir():
            raise InputError(f"--evaluate {run}: has no pipeline/ yet; finish the run with --resume {run}.")
    elif "evaluate" in given:
        settings |= {"out": "evaluation", "model": str(run)}
    config = Config(**{**settings, **given})
    check_config(config, given)
    # So that --resume finds them from anywhere.
    config.prompts = [str(Path(str(path)).resolve()) for path in config.prompts]
    config.model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    return config


def check_config(config: Config, given: dict) -> None:
    """Refuse settings that cannot run, before anything is loaded."""
    for f in dataclasses.fields(Config):
        option, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        kinds, choices = {tuple: (tuple, list), float: (float, int)}, f.metadata["argparse"].get("choices", [value])
        if type(value) not in kinds.get(type(f.default), (type(f.default),)) or value not in choices:  # by config.json
            raise InputError(f"{option} {value!r}: must be as in --help.")
        if f.metadata["low"] > -math.inf and not value >= f.metadata["low"]:
            raise InputError(f"{option} {value}: must be at least {f.metadata['low']}.")
        if f.metadata["above"] > -math.inf and not value > f.metadata["above"]:
            raise InputError(f"{option} {value}: must be greater than {f.metadata['above']}.")
    share, rest = divmod(config.prompts_per_epoch, int(os.environ.get("WORLD_SIZE", 1)))
    size, loss, log = config.microbatch, config.loss, "torch" if config.log_to == "none" else config.log_to
    images, alone = share * config.images_per_prompt, config.images_per_prompt == 1 and not loss.startswith("ddpo")
    for wrong, sentence in (
        (rest, f"--prompts-per-epoch {config.prompts_per_epoch}: must be a multiple of the processes."),
        (images % size and not config.evaluate, f"--microbatch {size}: must divide the {images} images per process."),
        (alone, f"--images-per-prompt 1: --loss {loss} compares images of a prompt, and needs 2 or more."),
        (loss == "ddpo-sf" and config.updates_per_epoch > 1, "--loss ddpo-sf: needs --updates-per-epoch 1."),
        (loss.startswith("ddpo") and config.offline, f"--offline: not with {loss}, which learns from its own images."),
        (config.evaluate and "model" in given, "--model: --evaluate names the model, and --against the other one."),
        (config.evaluate and "WORLD_SIZE" in os.environ, "--evaluate: runs in one process, without torchrun."),
        (not importlib.util.find_spec(log), f"--log-to {log}: not installed; pip install {log}."),
    ):
        if wrong:
            raise InputError(sentence)
    parse_reward(config.reward)


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
    for name, supported in (
        ("beta_schedule", ("scaled_linear", "linear")), ("prediction_type", ("epsilon", "v_prediction")),
        ("trained_betas", (None,)), ("rescale_betas_zero_snr", (False,)),
    ):  # fmt: skip
        if config.get(name, supported[0]) not in supported:
            raise InputError(f"the model's scheduler has {name} {config[name]!r}: not supported.")
    train_steps, power = config["num_train_timesteps"], 2 if config["beta_schedule"] == "scaled_linear" else 1
    start, end = config["beta_start"] ** (1 / power), config["beta_end"] ** (1 / power)
    betas = torch.linspace(start, end, train_steps, dtype=torch.float64) ** power

    stride = train_steps // max(num_steps, 1)
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config["steps_offset"]
    if num_steps < 1 or stride * num_steps < 0.8 * train_steps or timesteps[0] >= train_steps:
        raise InputError(f"--ddpm-steps {num_steps}: does not divide the model's {train_steps} training steps; 50 may.")
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
    coef_sample, coef_noise = alpha.rsqrt(), -(1 - alpha) / ((1 - bar) * alpha).sqrt()
    if config["prediction_type"] == "v_prediction":  # put epsilon = sqrt(bar) * v + sqrt(1 - bar) * x_t into it
        coef_sample, coef_noise = alpha.sqrt(), coef_noise * bar.sqrt()
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network and how it is run. The reference policy differs in `unet` alone."""

    unet: nn.Module  # (sample (M, C, H, W), timestep (M,), encoder_hidden_states (M, L, D)) -> .sample (M, C, H, W)
    schedule: Schedule
    null_text: Tensor  # (L, D), the embedding of the empty prompt
    guidance_scale: float = 5.0
    microbatch: int = 16
    autocast: torch.dtype | None = None  # None: the network runs in its own dtype


def predict_noise(policy: Policy, sample: Tensor, text: Tensor, steps: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The network's output for both branches of guidance (Sec. 4.1), in one pass: (2M, C, H, W), the unconditional
    half first; and coef_sample, coef_noise, sigma of Eq. 2, each (M,). steps (M,) count from x_T, each row its own."""
    timesteps, *coefficients = (column[steps] for column in policy.schedule)
    both = torch.cat([policy.null_text.expand_as(text), text])  # (2M, L, D)
    with torch.autocast(sample.device.type, policy.autocast, enabled=policy.autocast is not None):
        out = policy.unet(torch.cat([sample, sample]), timesteps.repeat(2), encoder_hidden_states=both).sample
    return out, coefficients


# ---- 3. Trajectories: sampling and scoring (Eqs. 1 to 4) ---------------------------------------------------


class Trajectories(NamedTuple):
    """Denoising trajectories of M images, and their log-probs under the policy that drew them."""

    latents: Tensor  # (M, T+1, C, H, W) float32: x_T, ..., x_0
    log_probs: Tensor  # (M, T) float64
    text: Tensor  # (M, L, D), the embedding of each image's prompt


def image_generators(seed: int, epoch: int, prompts: Sequence[int], images: int) -> list[torch.Generator]:
    """One CPU generator per image: its noise depends on no microbatch, no device and no other image."""
    keys = (hashlib.sha256(f"{seed} {epoch} {n} {i}".encode()).digest() for n in prompts for i in range(images))
    return [torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True)) for key in keys]


@torch.no_grad()
def sample_trajectories(
    policy: Policy, text: Tensor, generators: list[torch.Generator], shape: tuple[int, int, int],
    initial: list[torch.Generator] | None = None,
) -> Trajectories:  # fmt: skip
    """Draw x_T, ..., x_0 by ancestral sampling (Eq. 1; Alg. 1, line 6), with the log-prob of every step.

    text (M, L, D), a generator per image (`initial` for x_T, if given), shape (C, H, W). Latents are rounded to float32
    *before* they are scored, so that scoring what is stored again, under the same weights, gives the same bits.
    """
    images, num_steps, device = len(text), len(policy.schedule.timesteps), text.device
    assert len(generators) == images, (len(generators), text.shape)

    def noise(m: int) -> Tensor:  # (T+1, C, H, W): x_T, and what each step adds
        draws = [(initial or generators)[m]] + [generators[m]] * num_steps
        return torch.stack([torch.randn(shape, generator=generator) for generator in draws])

    latents = torch.empty(images, num_steps + 1, *shape, dtype=torch.float32, device=device)
    log_probs = torch.empty(images, num_steps, dtype=torch.float64, device=device)
    with progress("sample", images * num_steps) as bar:
        for first in range(0, images, policy.microbatch):
            rows = slice(first, first + policy.microbatch)
            noises = torch.stack([noise(m) for m in range(images)[rows]], dim=1).to(device)  # once: a GPU waits for it
            latents[rows, 0] = noises[0]
            for k in range(num_steps):
                x_t, steps = latents[rows, k], torch.full((noises.shape[1],), k, device=device)
                noise_pred, coefficients = predict_noise(policy, x_t, text[rows], steps)
                drawn = guided_sample(noise_pred, x_t, noises[k + 1], *coefficients, policy.guidance_scale)
                latents[rows, k + 1], log_probs[rows, k] = drawn
                bar.update(len(steps))
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
    x_t, x_prev = trajectories.latents[images, steps], trajectories.latents[images, steps + 1]
    noise_pred, coefficients = predict_noise(policy, x_t, trajectories.text[images], steps)
    return guided_log_prob(noise_pred, x_t, x_prev, *coefficients, policy.guidance_scale)


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
    if hasattr(policy.unet, "_orig_mod"):  # compiled, for one shape: fill the last microbatch, with weights of 0
        entries = torch.cat([entries, (weights == 0).nonzero()[: -len(entries) % policy.microbatch]])
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
        if p.grad is None and p.requires_grad:
            p.grad = torch.zeros_like(p)
        if p.requires_grad and processes() > 1:
            dist.all_reduce(p.grad)
            p.grad /= processes()


# ---- 6. Online optimisation (Sec. 3.2, Algorithm 1) --------------------------------------------------------


class Batch(NamedTuple):
    """What one epoch learns from: N prompts, M = N*B images; or one process's share of them."""

    prompts: list[str]
    trajectories: Trajectories
    log_probs_ref: Tensor  # (M, T) float64
    images: Tensor  # (M, 3, 8H, 8W) uint8, on the CPU
    rewards: Tensor  # (M,) float32
    reward_parts: dict[str, Tensor]  # the components of a summed reward, each (M,)
    targets: Tensor  # (M,), what the loss is given: the rewards, or for DDPO `advantages`
    history: dict[str, list[float]]  # and what those add to the prompts' reward statistics


def collect(
    config: Config, models: Models, epoch: int, prompts: list[str], seconds: dict[str, float],
    sampler: Policy | None = None, mine: Sequence[int] = (),
) -> Batch:  # fmt: skip
    """Alg. 1, lines 5 to 8: B trajectories for each prompt, their log-probs under pi_ref, their rewards.

    By default drawn from the policy, or --offline from the reference. `mine` are the indices of the prompts to take, on
    which the noise depends; by default this process's share of all.
    """
    offline = config.offline and epoch > 0
    sampler = sampler or (models.reference if offline else models.policy)
    with timed(seconds, "sample"):
        mine = mine or range(len(prompts) // processes() * rank(), len(prompts) // processes() * (rank() + 1))
        everyones, prompts, repeats = prompts, [prompts[n] for n in mine], config.images_per_prompt
        with in_use(models, models.pipe.text_encoder):
            text = encode(models.pipe, prompts).repeat_interleave(repeats, dim=0)
        generators = initial = image_generators(config.seed, epoch, mine, repeats)
        if config.share_initial_noise and epoch > 0:  # x_T from generators of its own, equal for images of a prompt
            initial = image_generators(config.seed, epoch, [-1 - n for n in mine for _ in range(repeats)], 1)
        with in_use(models, sampler.unet):
            trajectories = sample_trajectories(sampler, text, generators, models.latent_shape, initial)
        require_finite(f"epoch {epoch}, sampling: a log-prob", trajectories.log_probs, prompts)
    log_probs_ref = trajectories.log_probs  # until the first update, pi_theta is pi_ref
    with timed(seconds, "reference"):
        if epoch > 1 and offline:  # theta_old is the policy as the epoch begins, though it drew nothing
            trajectories = trajectories._replace(log_probs=score_trajectories(models.policy, trajectories, "old"))
        elif epoch > 1:
            with in_use(models, models.reference.unet):
                log_probs_ref = score_trajectories(models.reference, trajectories, "reference")
    with timed(seconds, "reward"):
        with in_use(models, models.pipe.vae):
            images = decode(models, trajectories.latents[:, -1])
        try:
            rewards = models.reward(images, [p for p in prompts for _ in range(repeats)])
        except InputError as error:
            raise InputError(f"epoch {epoch}: {error}") from error
    targets, history = rewards, {}
    if config.loss.startswith("ddpo") and epoch > 0:
        targets, history = advantages(gather(rewards), everyones, models.history, config.advantage)
        targets = targets.to(rewards.device).chunk(processes())[rank()]
    return Batch(prompts, trajectories, log_probs_ref, images.cpu(), rewards, models.reward.parts, targets, history)


def show(config: Config, models: Models, epoch: int, prompts: list[str]) -> report.Samples:
    """Samples of N prompts spread evenly over the file, with the noise of epoch 0; saved in samples/ under `epoch`, at
    epoch 0 of the reference."""
    prompts = [prompts[n * len(prompts) // config.prompts_per_epoch] for n in range(config.prompts_per_epoch)]
    batch = collect(config, models, 0, prompts, {}, models.policy if epoch else models.reference)
    if epoch == 0:
        check_on_policy(models, batch.trajectories)
    samples = report.Samples(prompts, gather(batch.images).cpu(), gather(batch.rewards).cpu())
    if rank() == 0:
        report.save_grid(Path(config.out) / "samples" / f"epoch_{epoch:04d}", samples)
    return samples


def train(config: Config, models: Models, optimizer: torch.optim.Optimizer, prompts: list[str], start: int) -> None:
    """Algorithm 1. Its line 1, pi_theta <- pi_ref, is in `load_models`."""
    policy, loss_function = models.policy, LOSSES[config.loss]  # `prdp_loss`, or a baseline
    groups = (-1, config.images_per_prompt)  # (N, B): the loss pairs images of a prompt
    for epoch in range(start, config.epochs + 1):  # Alg. 1, line 2
        seconds: dict[str, float] = {}
        batch = collect(config, models, epoch, draw_prompts(config, prompts, epoch), seconds)  # lines 4 to 8
        log_probs_old = batch.trajectories.log_probs  # line 3: all that is needed of the snapshot theta_old
        fixed = [x.unflatten(0, groups) for x in (log_probs_old, batch.log_probs_ref, batch.targets)]
        updates = []
        for k in range(config.updates_per_epoch):  # line 9
            with timed(seconds, "score"):
                log_probs = score_trajectories(policy, batch.trajectories) if k else log_probs_old.clone()
            log_probs.requires_grad_()
            loss = loss_function(log_probs.unflatten(0, groups), *fixed, config.clip_range, config.kl_weight)  # line 10
            (weights,) = torch.autograd.grad(loss, log_probs)
            with timed(seconds, "update"):  # line 11
                require_finite(f"epoch {epoch}, update {k + 1}: the loss", loss)
                backward_trajectories(policy, batch.trajectories, weights)
                reduce_gradients(policy.unet)
                grad_norm = nn.utils.clip_grad_norm_(policy.unet.parameters(), config.max_grad_norm)
                require_finite(f"epoch {epoch}, update {k + 1}: the gradient", grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            updates.append((loss.detach(), log_probs.detach(), weights, grad_norm))
        models.history.update(batch.history)
        metrics = epoch_metrics(config, epoch, batch, fixed, updates, seconds)
        del batch, fixed, updates  # and their memory, before the next ones are drawn
        if rank() == 0:
            report.log_epoch(Path(config.out), metrics, header=(epoch - start) % 20 == 0, log_to=config.log_to)
        if epoch % config.sample_every == 0 and epoch < config.epochs:
            show(config, models, epoch, prompts)
        if epoch % config.save_every == 0 or epoch == config.epochs:
            save_checkpoint(config, models, optimizer, epoch)


def epoch_metrics(
    config: Config, epoch: int, batch: Batch, fixed: list[Tensor], updates: list[tuple], seconds: dict[str, float]
) -> dict[str, float]:
    """A line of metrics.jsonl (fields defined in the README); figures of updates are means over the K updates, each of
    the policy as it was before the update. `fixed` and `updates` as in `train`."""
    losses, log_probs, weights, grad_norms = (torch.stack(column) for column in zip(*updates, strict=True))
    log_probs = log_probs.view(-1, *fixed[0].shape)  # (K, N, B, T)
    unclipped = [LOSSES[config.loss](x, *fixed, math.inf, config.kl_weight) for x in log_probs]  # Eq. 14
    moved = (log_probs - fixed[0]).abs()
    means = {
        "loss": losses, "loss_unclipped": torch.stack(unclipped), "clip_fraction": moved > config.clip_range,
        "skipped_fraction": weights == 0, "log_ratio_old": moved, "grad_norm": grad_norms,
        "log_ratio_ref": batch.trajectories.log_probs - batch.log_probs_ref,
    }  # fmt: skip
    mean_of = {name: gather(x.double().mean()[None]).mean().item() for name, x in means.items()}
    rewards = gather(batch.rewards)
    return {
        "epoch": epoch,
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "reward_se": rewards.std().item() / len(rewards) ** 0.5,
        **{f"reward_mean/{label}": gather(part).mean().item() for label, part in batch.reward_parts.items()},
        **mean_of,
        "kl_nats": mean_of["log_ratio_ref"] * batch.trajectories.latents[0, 1:].numel(),  # Eq. 6
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "images_per_second": len(rewards) / sum(seconds.values()),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
    }


# ---- 7. Baselines in the same loop (--loss) ----------------------------------------------------------------
# Pure functions with the arguments of `prdp_loss`, (..., B, T) and (..., B), whether used or not, and a scalar out: the
# loop need not know which it runs.


def ddpo_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """DDPO_IS (Black et al. 2024, Apps. C.3 and F.1): PPO's clipped surrogate, each denoising step an action.

    `rewards` are `advantages`; clip_range is the importance weight's (App. F.6: 1e-4). There is no KL term.
    """
    ratio = torch.exp(log_probs - log_probs_old)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = rewards.to(log_probs.dtype).unsqueeze(-1)  # (..., B, 1)
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()


def ddpo_sf_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """DDPO_SF, the score function estimator (Black et al. 2024, App. C.3): REINFORCE, for one update per epoch."""
    return -(log_probs * rewards.to(log_probs.dtype).unsqueeze(-1)).mean()


def rwr_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """Reward-weighted regression (Black et al. 2024, Apps. C.2 and F.3): weights exp(r / kl_weight), normalised per
    prompt; App. F.6's inverse temperature 0.2 is kl_weight 5. Theirs weights the denoising loss, a bound on the
    likelihood of x_0; this weights the exact log-likelihood of the sampled trajectory."""
    weights = torch.softmax(rewards.to(log_probs.dtype) / kl_weight, dim=-1)  # (..., B)
    return -(weights * log_probs.mean(-1)).sum(-1).mean()


def rwr_sparse_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """The same with binary weights: a prompt's images from the 0.9 quantile of their rewards up (Apps. F.3 and F.6)."""
    best = (rewards >= rewards.quantile(0.9, dim=-1, keepdim=True)).to(log_probs.dtype)  # (..., B)
    return -(best * log_probs.mean(-1)).sum(-1).div(best.sum(-1)).mean()


def dpo_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """Diffusion-DPO (Wallace et al. 2024, Eqs. 8 and 11) on the sampled trajectories themselves, all pairs of a
    prompt whose rewards differ, ranked by them (Sec. 5.4). kl_weight: logits per nat per latent dimension."""
    log_ratio = (log_probs - log_probs_ref).mean(-1)  # (..., B)
    log_ratio_diff = log_ratio.unsqueeze(-1) - log_ratio.unsqueeze(-2)  # (..., B, B)
    wins = rewards.unsqueeze(-1) > rewards.unsqueeze(-2)
    loss = torch.where(wins, -nn.functional.logsigmoid(kl_weight * log_ratio_diff), 0.0)
    return (loss.sum((-2, -1)) / wins.sum((-2, -1)).clamp(min=1)).mean()


LOSSES = {
    "prdp": prdp_loss, "ddpo": ddpo_loss, "ddpo-sf": ddpo_sf_loss, "rwr": rwr_loss, "rwr-sparse": rwr_sparse_loss,
    "dpo": dpo_loss,
}  # fmt: skip


def advantages(rewards: Tensor, prompts: list[str], history: dict, kind: str) -> tuple[Tensor, dict[str, list[float]]]:
    """DDPO's normalised rewards (App. F.3), (N*B,) -> (N*B,), and what to add to `history` once the epoch is over.

    "global": minus the mean of this epoch's rewards, over their standard deviation. "per-prompt": those of the
    prompt's last 32 rewards, this epoch's included; while they are fewer than 16, as in DDPO's code, the epoch's.
    """
    rows = rewards.unflatten(0, (len(prompts), -1))  # (N, B)
    latest = {prompt: history.get(prompt, []) for prompt in prompts}
    for prompt, row in zip(prompts, rows.tolist(), strict=True):
        latest[prompt] = (latest[prompt] + row)[-32:]
    normalised = []
    for prompt, row in zip(prompts, rows, strict=True):
        own = kind == "per-prompt" and len(latest[prompt]) >= 16
        seen = torch.tensor(latest[prompt], device=row.device) if own else rewards
        normalised.append((row - seen.mean()) / (seen.std(correction=0) + 1e-6))
    return torch.cat(normalised), latest


# ---- 8. Plumbing: models, rewards, prompts -----------------------------------------------------------------


class Models(NamedTuple):
    """Everything with weights; `pipe` is the diffusers pipeline around the policy's UNet."""

    pipe: object  # StableDiffusionPipeline
    policy: Policy
    reference: Policy
    reward: Reward
    latent_shape: tuple[int, int, int]
    history: dict[str, list[float]]  # each prompt's last rewards, see `advantages`
    waiting: torch.device  # where all but the policy's network are outside `in_use`


def load_pipeline(model: str, check_only: bool = False):
    """The diffusers pipeline of a folder or the hub, in float32; or, to check_only the name, nothing, at once."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of loading from disk; downloads keep theirs
        library.utils.logging.set_verbosity_error()
    try:
        kind = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise InputError(f"--model {model}: a {kind}; only Stable Diffusion 1.x and 2.x are supported.")
        options = dict(dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
        return None if check_only else diffusers.StableDiffusionPipeline.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        why = "no Stable Diffusion folder in diffusers layout"
        if not Path(model).exists():
            why = "no such folder, not in the local cache, and not to be had from the hub; offline, run --preset toy"
        raise InputError(f"--model {model}: {why}.") from error


def load_models(config: Config, device: torch.device) -> Models:
    """The pipeline, the policy, and the frozen reference the policy starts from (Alg. 1, line 1)."""
    from diffusers import DDIMScheduler

    waiting = idle_device(config.offload, device)
    pipe, reward = load_pipeline(config.model), load_reward(config.reward, device, waiting)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    channels, expected = unet.config.in_channels, vae.config.latent_channels
    if channels != expected:
        raise InputError(f"--model {config.model}: UNet of {channels} channels, VAE of {expected}; must be equal.")
    torch.backends.cudnn.allow_tf32 = config.dtype != "fp32"  # TF32 convolutions round like fp16
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    unet.requires_grad_(True).eval()  # eval: with dropout every pass would be another policy
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.lora_rank:  # the attention layers learn W + B A, where B begins at 0 (Hu et al. 2021)
        from peft import LoraConfig

        unet.requires_grad_(False)
        rank, layers = config.lora_rank, ["to_q", "to_k", "to_v", "to_out.0"]
        torch.manual_seed(config.seed)  # A begins at random, the same in every process
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))
        reference = WithoutAdapters(unet)
    else:
        reference = copy.deepcopy(unet).requires_grad_(False)
    for layer in reference.modules() if autocast and not config.lora_rank and not config.compile else ():
        # Autocast casts these weights at every pass; cast once, they are the same bits in half the memory.
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(autocast)
    for network, place in ((unet, device), (reference, waiting), (vae, waiting), (text_encoder, device)):
        network.to(place)
    null_text = encode(pipe, [""])[0]  # on `device`, for the same bits wherever networks wait
    text_encoder.to(waiting)
    if config.compile:
        unet, reference = torch.compile(unet), torch.compile(reference)
    schedule = Schedule(*(column.to(device) for column in ddpm_schedule(pipe.scheduler.config, config.ddpm_steps)))
    settings = {**SD_SCHEDULER, **pipe.scheduler.config, "timestep_spacing": "leading", "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(settings)  # with eta = 1 it samples this policy
    policy = Policy(unet, schedule, null_text, config.guidance_scale, config.microbatch, autocast)
    size = unet.config.sample_size
    latent_shape = (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    return Models(pipe, policy, policy._replace(unet=reference), reward, latent_shape, {}, waiting)


class WithoutAdapters(nn.Module):
    """The pretrained network within one that has adapters: pi_ref, in no memory of its own."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.shared = [unet]  # in a list: not a part, so that moving this moves nothing

    def forward(self, *arguments, **options):
        self.shared[0].disable_adapters()
        try:
            return self.shared[0](*arguments, **options)
        finally:
            self.shared[0].enable_adapters()


def idle_device(offload: str, device: torch.device) -> torch.device:
    """Where networks wait outside their phases (--offload)."""
    if offload == "auto" and device.type == "cuda":
        offload = "on" if torch.cuda.get_device_properties(device).total_memory < 40e9 else "off"
    return torch.device("cpu") if offload == "on" else device


@contextmanager
def in_use(models: Models, network: nn.Module):
    """Have a network on the policy's device within this block. Under --offload all but the policy's own wait on the
    CPU, as the rewards' do: they are needed in passes of their own, and gradients in none of those."""
    network.to(models.policy.null_text.device)
    yield
    if network is not models.policy.unet:
        network.to(models.waiting)


@torch.no_grad()
def encode(pipe, prompts: list[str]) -> Tensor:
    """Text embeddings (len(prompts), L, D), as the pipeline itself makes them."""
    return pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, do_classifier_free_guidance=False)[0]


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
    """Score a fresh microbatch again, under policy and reference: both must return the very same bits, because Eq. 20
    compares two passes to within clip_range, 1e-6 to 1e-4 in Table 4, and would otherwise clip noise."""
    first = Trajectories(*(x[: models.policy.microbatch] for x in trajectories))
    for name, policy in (("policy", models.policy), ("reference", models.reference)):
        with in_use(models, policy.unet):
            gap = (score_trajectories(policy, first) - first.log_probs).abs().max().item()
        if rank() == 0:
            print(f"on-policy gap of the {name}: {gap:.1e}")
        if gap != 0:
            hint = "clipping would act on noise; switch off cudnn.benchmark and the like, or try --dtype fp32"
            raise InputError(f"the {name} scores its own trajectory {gap:.1e} off: {hint}.")


# ---- 9. What a run writes ----------------------------------------------------------------------------------

UNBORN = {".lock", "config.json.tmp"}  # all that a run killed before its config.json leaves behind


def save_checkpoint(config: Config, models: Models, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """checkpoint/state.pt, after a whole epoch. Prompts and noise depend on (seed, epoch) alone: no RNG state."""
    if rank() != 0:
        return
    path = Path(config.out) / "checkpoint" / "state.pt"
    path.parent.mkdir(exist_ok=True)
    unet = {name: p for name, p in models.pipe.unet.named_parameters() if p.requires_grad}
    state = {"epoch": epoch, "unet": unet, "optimizer": optimizer.state_dict()}
    state |= {"history": models.history, "config": vars(config), "version": VERSION}
    report.write_file(path, lambda file: torch.save(state, file))


def load_checkpoint(config: Config, models: Models, optimizer: torch.optim.Optimizer) -> int:
    """Restore the last checkpoint, drop the metrics of later epochs, and return the epoch to go on with."""
    path, metrics = Path(config.out) / "checkpoint" / "state.pt", Path(config.out) / "metrics.jsonl"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {"epoch": 0}
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: damaged; move it away to begin again with the run's settings.") from error
    if state.get("version", VERSION) != VERSION:
        raise InputError(f"{path}: written by version {state['version']} of prdp.py, and this is version {VERSION}.")
    if state["epoch"]:
        if state["unet"].keys() != {name for name, p in models.pipe.unet.named_parameters() if p.requires_grad}:
            raise InputError(f"{path}: holds another network's weights.")
        models.pipe.unet.load_state_dict(state["unet"], strict=False)  # of a LoRA, the adapters alone
        models.history.update(state["history"])
        optimizer.load_state_dict(state["optimizer"])
    if metrics.is_file() and rank() == 0:
        lines = metrics.read_bytes().splitlines(keepends=True)[: state["epoch"]]
        report.write_file(metrics, lambda file: file.writelines(lines))
    return state["epoch"] + 1


# ---- 10. main ----------------------------------------------------------------------------------------------


def evaluate(config: Config) -> None:
    """--evaluate: the model against the base, by the paper's protocol (Sec. 4.1); see `prompts.report.evaluate`."""
    out, device = Path(config.out), start_processes()
    held = report.hold(out)  # noqa: F841  (until this process ends)

    def load(model: str) -> report.Draw:
        models = load_models(dataclasses.replace(config, model=model, lora_rank=0), device)._replace(reference=None)

        def draw(prompts: list[str], mine: Sequence[int], images: int) -> report.Samples:
            batch = collect(dataclasses.replace(config, images_per_prompt=images), models, 0, prompts, {}, mine=mine)
            return report.Samples(batch.prompts, batch.images, batch.rewards.cpu())

        return draw

    models = {"base": config.against, "finetuned": config.model}
    for model in filter(None, models.values()):
        load_pipeline(model, check_only=True)
    loaders = {name: partial(load, model) for name, model in models.items() if model}
    chunk = max(1, config.microbatch // config.samples_per_prompt)
    report.evaluate(loaders, config.prompts, config.samples_per_prompt, chunk, out, vars(config))


def run(config: Config) -> None:
    """Train from the first epoch or the last checkpoint, then show what changed."""
    out, prompts = Path(config.out), list(dict.fromkeys(p for file in config.prompts for p in load_prompts(file)))
    if not config.resume and (out.is_file() or out.is_dir() and {p.name for p in out.iterdir()} - UNBORN):
        raise InputError(f"--out {out}: already in use; choose another folder, or go on with --resume {out}.")
    device = start_processes()  # waits for all of them: none may see another's new folder
    models = load_models(config, device)
    learning = [p for p in models.pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=config.learning_rate, weight_decay=config.weight_decay)
    if rank() == 0:
        held = report.hold(out)  # noqa: F841  (until this process ends)
        report.open_log(config.log_to, config.out)
        settings = json.dumps(vars(dataclasses.replace(config, resume="")), indent=1).encode()
        report.write_file(out / "config.json", lambda file: file.write(settings))
        shutil.rmtree(out / "pipeline", ignore_errors=True)  # of the run when it was shorter
        millions, context = sum(p.numel() for p in learning) / 1e6, models.pipe.tokenizer.model_max_length
        print(f"{config.model}: {millions:.1f} M parameters to learn, {processes()} process(es)")
        print(f"passes in {config.dtype}; log-probs: {kernels.path(device)}; reward {config.reward}")
        print(f"{len(prompts)} prompts from {', '.join(config.prompts)}; results in {out}")
        if long := sum(len(ids) > context for ids in models.pipe.tokenizer(prompts).input_ids):
            print(f"warning: {long} prompts are longer than {context} tokens; the model sees their beginnings.")

    with timed(seconds := {}, "start-up"):
        before = show(config, models, 0, prompts)
    if rank() == 0:
        print(f"first samples{', and their compilation' * config.compile}: {seconds['start-up']:.0f} s")
    start = load_checkpoint(config, models, optimizer) if config.resume else 1
    stop_when_asked()
    try:
        train(config, models, optimizer, prompts, start)
    except SystemExit as stop:
        # Each parameter counts its updates: none of an unfinished epoch's may get into a checkpoint.
        steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        epoch, rest = divmod(steps, config.updates_per_epoch)
        if epoch >= start and not rest:
            save_checkpoint(config, models, optimizer, epoch)
        if rank() == 0:
            print(f"stopped by signal {stop.code - 128}; go on with: python prdp.py --resume {out}", file=sys.stderr)
        raise

    after = show(config, models, config.epochs, prompts)
    if rank() == 0:
        if config.lora_rank:
            models.pipe.unet.save_lora_adapter(out / "lora")
            models.pipe.unet.fuse_lora()
            models.pipe.unet.unload_lora()
        models.pipe.save_pretrained(out / "pipeline.tmp")
        os.rename(out / "pipeline.tmp", out / "pipeline")
        report.compare(out, before, after)
    if dist.is_initialized():
        dist.barrier()  # a process that ends while another still works may abort in gloo
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
        (evaluate if config.evaluate else run)(config)
    except KeyboardInterrupt:  # before training; from then on see `stop_when_asked`
        raise SystemExit(130) from None
    except InputError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        smaller = f"--microbatch {max(1, config.microbatch // 2)}, --gradient-checkpointing, --lora-rank 8"
        fail(f"out of GPU memory: try --offload on, or in a new run {smaller}.")
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = " ".join(str(error).split("\n\n")[0].split())
        fail(f"--compile: failed ({cause}); begin a new run without it.")
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        fail(f"{error.filename or config.out}: {error.strerror}; what was saved is intact.")


if __name__ == "__main__":
    main()
