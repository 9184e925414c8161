"""PRDP: Proximal Reward Difference Prediction, for reward finetuning of diffusion models
(Deng et al., CVPR 2024).

    python prdp.py --preset toy                                  # a small model: no GPU, no network
    python prdp.py --reward hpsv2 --prompts prompts/animals.txt  # SD v1.4, one GPU, Table 4
    python prdp.py --resume runs/toy --epochs 40                 # go on with a run

In reading order: settings, the DDPM policy (Sec. 2), sampling and scoring (Eqs. 1 to 4; the very
Gaussian is in kernels/log_prob.py), the loss (Secs. 3.1 and 3.3, App. G), its exact gradient in the
memory of one microbatch, the online loop that calls it (Sec. 3.2, Algorithm 1), then plumbing.

Paper                   Here             Shape (M = N*B images)  Note
x_t                     latents[:, k]    (M, T+1, C, H, W)       k counts along the way, from x_T
log pi(x_{t-1}|x_t, c)  log_probs[:, k]  (M, T)                  float64; nats per latent dimension
r-hat_t, Eq. 19         log_ratio        (..., B, T)             log_probs - log_probs_ref
r                       rewards          (..., B)                in the reward's own unit
beta, Eq. 5             kl_weight                                `betas` is the DDPM noise schedule
epsilon, Eq. 20         clip_range                               in the unit of log_probs
the network's epsilon   noise_pred       (2M, C, H, W)           both branches of guidance; or its v
sigma_t, Eq. 2          sigma            (T,)

Units, said once: log_probs are means over C*H*W and the loss takes a mean over T (App. G), where
Eqs. 4, 10 and 21 sum. That rescales beta, epsilon and the loss: the beta of Eq. 5 is
kl_weight / (T*C*H*W). Table 4 is read in these units.

Departures from the paper, and choices where it is silent or says two things (README: why):
 1. The mean over T (App. G), where Eqs. 3, 10, 21 sum: loss_sum(b) == T**2 * loss_mean(b * T).
 2. log_prob is a mean over latent dimensions, as in DDPO's code, whose clip range is Table 4's.
 3. The mean over pairs whose rewards differ (App. G; Alg. 1, line 10: all); 0, not NaN, if none do.
 4. Steps are "leading"-spaced, sigma_t is the posterior's, alpha-bar ends at alphas_cumprod[0].
 5. The gradient runs through both branches of guidance.
 6. With K = 1 (large scale) theta is theta_old at the only update: Eq. 18's clip never acts there.
 7. The number format of the network passes (--dtype); the paper gives none.
 8. --offline draws fresh images of the pretrained model each epoch (Sec. 4.3: a fixed data set).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import baselines
import kernels
import report
from kernels import gaussian_log_prob, guided_log_prob, guided_sample  # noqa: F401
from report import Samples, gather, on_rank_0, own_share, processes, say
from rewards import InputError, Parser, command, load_network, load_reward, option, reading
from rewards import resolve_reward, reward_files

# ---- 1. Settings: Table 4 ------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
PROMPTS = f"{HERE}/prompts/"


def flag(default, text: str, *choices: str, **options):
    """A Config field that is a command line flag too, with its --help."""
    options |= {"help": text, **({"choices": choices} if choices else {})}
    return dataclasses.field(default=default, metadata=options)


@dataclasses.dataclass
class Config:
    """Every setting of a run. The defaults are the small-scale column of Table 4."""

    preset: str = flag("small", "a column of Table 4, or toy", "small", "large", "multi", "toy")
    model: str = flag("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1 or 2, hub id or folder")
    reward: str = flag("hpsv2", "reward to maximise, see rewards.py")
    prompts: tuple = flag((PROMPTS + "animals.txt",), "files", nargs="+", type=str, metavar="FILE")
    loss: str = flag("prdp", "PRDP, or a baseline", "prdp", *baselines.LOSSES)
    out: str = flag("", "run folder, new or empty (default: runs/PRESET)")
    resume: str = flag("", "run folder to go on with, under its own settings", metavar="RUN")
    seed: int = flag(0, "of the prompts drawn and of the noise")
    epochs: int = flag(100, "E, rounds of sampling and learning")
    updates_per_epoch: int = flag(10, "K, gradient updates per epoch")
    prompts_per_epoch: int = flag(32, "N, drawn with replacement")
    images_per_prompt: int = flag(16, "B, at least 2 where the loss compares images")
    kl_weight: float = flag(3e-5, "beta; unit: reward per nat per latent dimension")
    ddpm_steps: int = flag(50, "T, denoising steps")
    clip_range: float = flag(1e-6, "epsilon of Eq. 20, nats per latent dimension; inf: no clipping")
    guidance_scale: float = flag(5.0, "of classifier-free guidance, in sampling and in training")
    learning_rate: float = flag(1e-5, "of AdamW")
    weight_decay: float = flag(1e-4, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients longer than this are scaled down to it")
    advantage: str = flag("per-prompt", "DDPO's statistics", "per-prompt", "global", "group")
    offline: bool = flag(False, "learn from images of the pretrained model alone (Sec. 4.3)")
    microbatch: int = flag(0, "images per network pass; 0: 8, or 16 on a GPU of 120 GB or more")
    dtype: str = flag("auto", "of network passes; weights are fp32",  # auto: see README
                      "auto", "fp32", "tf32", "bf16", "fp16")  # fmt: skip
    lora_rank: int = flag(0, "train adapters of the attention layers alone; 0: the full UNet")
    gradient_checkpointing: bool = flag(False, "recompute activations, to save memory")
    offload: str = flag("auto", "idle networks on the CPU; auto: if < 40 GB", "auto", "on", "off")
    compile: bool = flag(False, "torch.compile the UNet's passes; minutes of start-up")
    save_every: int = flag(1, "epochs between checkpoints")
    sample_every: int = flag(10, "epochs between sample grids")
    log_to: str = flag("none", "also send metrics there", "none", "tensorboard", "wandb")


GROUPS = {"preset": "run", "epochs": "Table 4", "advantage": "baselines", "microbatch": "machine"}
UNBOUNDED = ("clip_range", "max_grad_norm")  # inf: neither clips
# What a run and its continuation may differ in.
HARMLESS = {"resume", "out", "epochs", "save_every", "sample_every", "log_to", "offload"}
LARGE = dict(epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8,
             clip_range=1e-4)  # fmt: skip
PRESETS = {
    "small": {},
    "large": LARGE | dict(kl_weight=3e-6, learning_rate=7e-6,
                          prompts=(PROMPTS + "hpdv2_train.json",)),
    "multi": LARGE | dict(reward="pickscore=10,hpsv2=2,aesthetic=0.05",
                          prompts=(PROMPTS + "pickapic_train.jsonl",)),
    "toy": dict(model=f"{HERE}/toy/sd", reward=f'"pickscore:{HERE}/toy/pickscore"',
                prompts=(PROMPTS + "shapes.txt",), epochs=30, updates_per_epoch=4,
                prompts_per_epoch=8, images_per_prompt=8, clip_range=1e-3, learning_rate=2e-4,
                ddpm_steps=10, microbatch=64, sample_every=5),
}  # fmt: skip


def parse_args(argv: list[str]) -> Config:
    """The command line over the preset; with --resume, over the settings of the run."""
    if gone := {"--evaluate", "--against", "--samples-per-prompt"} & set(argv):
        raise InputError(f"{min(gone)}: of another command; see python evaluate.py --help.")
    presets = [f"  {n}: {' '.join(f'{k}={v}' for k, v in s.items())}" for n, s in PRESETS.items()]
    about = __doc__.split("\n\nIn reading order")[0]
    parser = Parser(description=about, epilog="\n".join(["presets:", *presets]), allow_abbrev=False)
    parser.add_fields(dataclasses.fields(Config), GROUPS)
    given = vars(parser.parse_args(argv))
    if "resume" not in given:
        preset = given.get("preset", "small")
        settings = PRESETS[preset] | baselines.settings(given.get("loss", "prdp"), preset)
        return resolved(Config(**settings | given))

    run = Path(given["resume"])
    if "out" in given:
        raise InputError(f"--out {given['out']}: not with --resume, which goes on in {run}.")
    with reading(f"--resume {run}: its config.json"):
        record = on_rank_0(lambda: json.loads((run / "config.json").read_text()))
        saved = {f.name: type(f.default)(record[f.name]) for f in dataclasses.fields(Config)}
    config = resolved(Config(**saved | given))
    for name in given.keys() - HARMLESS:
        if getattr(config, name) != saved[name]:
            raise InputError(f"{option(name)} {given[name]}: the run began with {saved[name]}.")
    return config


def resolved(config: Config) -> Config:
    """The settings as they act: "auto" decided for this machine, paths absolute, so that --resume
    finds them from anywhere. Raises InputError for settings that cannot run."""
    memory = report.gpu_memory()
    acting = {"reward": resolve_reward(config.reward) if config.reward else ""}
    acting["prompts"] = tuple(str(Path(path).resolve()) for path in config.prompts)
    if Path(config.model).exists():
        acting["model"] = str(Path(config.model).resolve())
    if config.dtype == "auto":  # README: why
        on_gpu = "bf16" if config.updates_per_epoch == 1 else "tf32"
        acting["dtype"] = on_gpu if memory else "fp32"
    if config.offload == "auto":
        acting["offload"] = "on" if 0 < memory < 40e9 else "off"
    images = config.prompts_per_epoch * config.images_per_prompt // processes()
    acting["out"] = config.resume or config.out or f"runs/{config.preset}"
    acting["microbatch"] = min(config.microbatch or (16 if memory >= 120e9 else 8), max(images, 1))
    config = dataclasses.replace(config, **acting)

    for name, value in vars(config).items():
        may_be_0 = name in ("seed", "guidance_scale", "weight_decay", "lora_rank")
        if type(value) in (int, float) and not (value > 0 or (may_be_0 and value == 0)):
            raise InputError(f"{option(name)} {value}: too small.")
        if type(value) in (int, float) and value >= 2**40 and name not in UNBOUNDED:
            raise InputError(f"{option(name)} {value}: too large.")
    if config.prompts_per_epoch % processes():
        raise InputError(f"--prompts-per-epoch: must be a multiple of the {processes()} processes.")
    if why := baselines.misfit(config):
        raise InputError(f"--loss {config.loss}: {why}.")
    if config.log_to != "none" and not importlib.util.find_spec(config.log_to):
        raise InputError(f"--log-to {config.log_to}: not installed; pip install {config.log_to}.")
    return config


# ---- 2. The policy: DDPM ancestral sampling, a chain of Gaussians (Sec. 2) -----------------------


class Schedule(NamedTuple):
    """Eq. 2: N(coef_sample * x_t + coef_noise * noise_pred, sigma^2 I); each (T,), from x_T on."""

    timesteps: Tensor  # int64: 981, 961, ..., 1 for T = 50
    coef_sample: Tensor  # float64
    coef_noise: Tensor  # float64
    sigma: Tensor  # float64, > 0


SD_SCHEDULER = dict(  # what a model's scheduler_config.json leaves open
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    steps_offset=1, set_alpha_to_one=False, prediction_type="epsilon",
)  # fmt: skip
SUPPORTED = dict(
    beta_schedule=("scaled_linear", "linear"), prediction_type=("epsilon", "v_prediction"),
    trained_betas=(None,), rescale_betas_zero_snr=(None, False),
)  # fmt: skip


def ddpm_schedule(scheduler_config: dict, num_steps: int) -> Schedule:
    """The coefficients of Eq. 2 (Ho et al. 2020, Eqs. 6, 7, 11); the chain of DDIM with eta = 1.

    Reads the noise schedule, and whether the network predicts noise or v, from a diffusers
    scheduler's config. Steps are "leading"-spaced, and alpha-bar after the last one is
    alphas_cumprod[0], as Stable Diffusion is configured. Raises InputError for another kind of
    schedule, and for sigma == 0, where log-probabilities do not exist.
    """
    config = {**SD_SCHEDULER, **scheduler_config}
    for name, values in SUPPORTED.items():
        if config.get(name) not in values:
            raise InputError(f"the model's scheduler has {name} {config[name]!r}: not supported.")
    train_steps = config["num_train_timesteps"]
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    start, end = (config[name] ** (1 / power) for name in ("beta_start", "beta_end"))
    betas = torch.linspace(start, end, train_steps, dtype=torch.float64) ** power

    stride = train_steps // max(num_steps, 1)
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config["steps_offset"]
    if stride * num_steps < 0.8 * train_steps or timesteps[0] >= train_steps:
        raise InputError(f"--ddpm-steps {num_steps}: no whole strides of {train_steps}; 50 may do.")
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    final = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0].item()
    previous = timesteps - stride
    bar = alphas_cumprod[timesteps]  # alpha-bar of x_t; on the next line, of x_{t-1}
    bar_previous = torch.where(previous >= 0, alphas_cumprod[previous.clamp(min=0)], final)
    alpha = bar / bar_previous
    sigma = ((1 - bar_previous) / (1 - bar) * (1 - alpha)).clamp(min=0).sqrt()
    if not (sigma > 0).all():
        mend = "set steps_offset to 1 and set_alpha_to_one to false in its scheduler_config.json"
        raise InputError(f"the model's scheduler has sigma = 0 at its last step; {mend}.")
    coef_sample = alpha.rsqrt()
    coef_noise = -(1 - alpha) / ((1 - bar) * alpha).sqrt()
    if config["prediction_type"] == "v_prediction":  # epsilon = sqrt(bar) * v + sqrt(1 - bar) * x_t
        coef_sample = alpha.sqrt()
        coef_noise = coef_noise * bar.sqrt()
    return Schedule(timesteps, coef_sample, coef_noise, sigma)


class Policy(NamedTuple):
    """pi_theta of Eq. 2: a network and how it is run. The reference differs in `unet` alone."""

    # (sample (M, C, H, W), timestep (M,), encoder_hidden_states (M, L, D)) -> .sample (M, C, H, W)
    unet: nn.Module
    schedule: Schedule
    null_text: Tensor  # (L, D), the embedding of the empty prompt
    guidance_scale: float = 5.0
    microbatch: int = 16
    autocast: torch.dtype | None = None  # None: the network runs in its own dtype


def predict_noise(
    policy: Policy, sample: Tensor, text: Tensor, steps: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The network's output for both branches of guidance (Sec. 4.1), unconditional first: (2M, C,
    H, W), in one pass; and coef_sample, coef_noise, sigma of Eq. 2, each (M,). steps (M,) count
    from x_T, each row its own."""
    timesteps, *coefficients = (column[steps] for column in policy.schedule)
    both = torch.cat([policy.null_text.expand_as(text), text])  # (2M, L, D)
    with torch.autocast(sample.device.type, policy.autocast, enabled=policy.autocast is not None):
        inputs = torch.cat([sample, sample]), timesteps.repeat(2)
        out = policy.unet(*inputs, encoder_hidden_states=both).sample
    return out, coefficients


# ---- 3. Trajectories: sampling and scoring (Eqs. 1 to 4) -----------------------------------------


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
    images, num_steps = len(text), len(policy.schedule.timesteps)
    assert len(generators) == images, (len(generators), text.shape)
    latents = torch.empty(images, num_steps + 1, *shape, dtype=torch.float32, device=text.device)
    log_probs = torch.empty(images, num_steps, dtype=torch.float64, device=text.device)

    with report.progress("sample", images * num_steps) as bar:
        for rows in torch.arange(images).split(policy.microbatch):
            # x_T and what each step adds, drawn at once: at every step a GPU would wait for it.
            own = [generators[m] for m in rows for _ in range(num_steps + 1)]
            draws = torch.stack([torch.randn(shape, generator=generator) for generator in own])
            noise = draws.unflatten(0, (len(rows), -1)).to(text.device)  # (m, T+1, C, H, W)
            rows = rows.to(text.device)
            latents[rows, 0] = noise[:, 0]
            for k in range(num_steps):
                x_t = latents[rows, k]
                noise_pred, coefs = predict_noise(policy, x_t, text[rows], torch.full_like(rows, k))
                latents[rows, k + 1], log_probs[rows, k] = guided_sample(
                    noise_pred, x_t, noise[:, k + 1], *coefs, policy.guidance_scale
                )
                bar.update(len(rows))
    return Trajectories(latents, log_probs, text)


@torch.no_grad()
def score_trajectories(policy: Policy, trajectories: Trajectories, label: str = "score") -> Tensor:
    """log pi(x_{t-1} | x_t, c) of stored trajectories under a policy (Eqs. 2 to 4): (M, T) float64.

    Runs in the microbatches, shapes and order of `sample_trajectories`, so that unchanged weights
    return the very bits of `trajectories.log_probs`. Another batch size alone can move them by more
    than the clip range.
    """
    log_probs = torch.empty_like(trajectories.log_probs)
    images, num_steps = log_probs.shape
    with report.progress(label, images * num_steps) as bar:
        for rows in torch.arange(images, device=log_probs.device).split(policy.microbatch):
            for k in range(num_steps):
                steps = torch.full_like(rows, k)
                log_probs[rows, k] = step_log_prob(policy, trajectories, rows, steps)
                bar.update(len(rows))
    return log_probs


def step_log_prob(
    policy: Policy, trajectories: Trajectories, rows: Tensor, steps: Tensor
) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of Eq. 2, with gradient, for P images and steps: (P,)."""
    x_t = trajectories.latents[rows, steps]
    x_prev = trajectories.latents[rows, steps + 1]
    noise_pred, coefs = predict_noise(policy, x_t, trajectories.text[rows], steps)
    return guided_log_prob(noise_pred, x_t, x_prev, *coefs, policy.guidance_scale)


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


def backward_trajectories(
    policy: Policy, trajectories: Trajectories, weights: Tensor, headroom: int = 6
) -> None:
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
    scale = 1.0
    if policy.autocast == torch.float16 and weights.any():
        # The gradient of a mean over C*H*W would underflow in fp16. A power of two scales it up
        # exactly, to 2**-headroom a latent element: what is left is for sums over positions.
        numel = trajectories.latents[0, 0].numel()
        scale = 2.0 ** round(math.log2(numel / weights.abs().max().item()) - headroom)

    parameters = [p for p in policy.unet.parameters() if p.requires_grad]
    for p in parameters:  # without a gradient so far (or at all, if all rewards tie): 0
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.mul_(scale)

    entries = weights.nonzero()  # (entries, 2): image, step
    if weights.is_cuda or hasattr(policy.unet, "_orig_mod"):  # a new size takes seconds: fill up
        padding = -len(entries) % policy.microbatch
        entries = torch.cat([entries, (weights == 0).nonzero()[:padding]])
    with report.progress("update", len(entries)) as bar:
        for chunk in entries.split(policy.microbatch):
            rows, steps = chunk.unbind(1)
            if len(chunk):
                log_prob = step_log_prob(policy, trajectories, rows, steps)
                (scale * weights[rows, steps] * log_prob).sum().backward()
            bar.update(len(chunk))
    for p in parameters:
        p.grad /= scale


def average_gradients(unet: nn.Module) -> None:
    """Over processes, each of which has the mean over its own prompts (Alg. 1, line 10)."""
    for p in unet.parameters():
        if p.requires_grad and processes() > 1:
            dist.all_reduce(p.grad)
            p.grad /= processes()


# ---- 6. Online optimisation (Sec. 3.2, Algorithm 1) ----------------------------------------------

LOSSES = {"prdp": prdp_loss, **baselines.LOSSES}


def train(
    config: Config, models: Models, optimizer: torch.optim.Optimizer,
    statistics: baselines.RewardStatistics, prompts: list[str], start: int,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Algorithm 1 from epoch `start` on; yields each epoch's metrics. Line 1: `load_models`."""
    policy, reference, loss_function = models.policy, models.reference, LOSSES[config.loss]
    own, per_prompt = own_share(config.prompts_per_epoch), config.images_per_prompt

    def by_prompt(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, per_prompt))  # (M, ...) -> (N, B, ...)

    for epoch in range(start, config.epochs + 1):  # line 2
        timed, updates = report.Stopwatch(f"epoch {epoch}"), []

        # Lines 3 to 7: N prompts, B trajectories of each under theta_old, which theta still is.
        drawn = draw_prompts(config, prompts, epoch)
        generators = image_generators(config.seed, epoch, range(len(drawn))[own], per_prompt)
        with timed("sample"):
            sampler = reference if config.offline else policy
            trajectories = sample_prompts(models, sampler, drawn[own], generators)
        log_probs_old = trajectories.log_probs

        # Eqs. 10 and 19: their log-probs under pi_ref; if that drew them, under theta_old too.
        with timed("reference"), in_use(models, reference):
            log_probs_ref = score_trajectories(reference, trajectories, "reference")
        with timed("score"):
            if config.offline:
                log_probs_old = score_trajectories(policy, trajectories, "old")

        # Line 8: decode, reward.
        with timed("reward"):
            images = decode(models, trajectories.latents[:, -1])
            rewards = models.reward(images, [p for p in drawn[own] for _ in range(per_prompt)])
        targets = statistics.targets(gather(rewards), drawn)  # the rewards; for DDPO, advantages

        for k in range(config.updates_per_epoch):  # line 9
            with timed("score"):
                log_probs = score_trajectories(policy, trajectories) if k else log_probs_old.clone()
            log_probs.requires_grad_()
            target = baselines.minibatch(config, epoch, k, targets)  # all of them, but for DDPO
            target = target[own_share(len(targets))].to(rewards.device)
            loss = loss_function(  # line 10
                by_prompt(log_probs), by_prompt(log_probs_old), by_prompt(log_probs_ref),
                by_prompt(target), config.clip_range, config.kl_weight,
            )  # fmt: skip
            (weights,) = torch.autograd.grad(loss, log_probs)

            with timed("update"):  # line 11
                require_finite("the loss", loss)
                for headroom in (6, 14):  # should fp16 overflow, once more at a smaller scale
                    optimizer.zero_grad(set_to_none=True)
                    backward_trajectories(policy, trajectories, weights, headroom)
                    average_gradients(policy.unet)
                    norm = nn.utils.clip_grad_norm_(policy.unet.parameters(), config.max_grad_norm)
                    if norm.isfinite():
                        break
                require_finite("the gradient", norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            matrices = map(by_prompt, (log_probs.detach(), log_probs_old, log_probs_ref, target))
            updates.append(update_metrics(config, *matrices, weights, norm))

        distance, parts = log_probs_old - log_probs_ref, models.reward.parts
        means = {
            "log_ratio_ref": distance,
            "kl_nats": distance * trajectories.latents[0, 1:].numel(),
        }
        metrics = report.epoch_metrics(epoch, rewards, parts, means, updates, timed.seconds)
        del trajectories, images  # and their memory, before others are drawn
        yield metrics


def update_metrics(
    config: Config, log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor,
    rewards: Tensor, weights: Tensor, norm: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Of one update, before it is made; the README defines the fields."""
    loss_function, others = LOSSES[config.loss], (log_probs_old, log_probs_ref, rewards)
    unclipped = loss_function(log_probs, *others, math.inf, config.kl_weight)  # Eq. 14
    of_reference = loss_function(log_probs_ref, *others, math.inf, config.kl_weight)
    moved = (log_probs - log_probs_old).abs()
    return {
        "loss": loss_function(log_probs, *others, config.clip_range, config.kl_weight),
        "loss_unclipped": unclipped,
        "explained": (1 - unclipped / of_reference) * (1 if config.loss == "prdp" else math.nan),
        "clip_fraction": moved > config.clip_range,
        "skipped_fraction": weights == 0,
        "log_ratio_old": moved,
        "grad_norm": norm,
    }


def draw_prompts(config: Config, prompts: list[str], epoch: int) -> list[str]:
    """N prompts, independent and uniform (Alg. 1, line 4); a function of seed and epoch alone."""
    (generator,) = image_generators(config.seed, -epoch, range(1), 1)
    drawn = torch.randint(len(prompts), (config.prompts_per_epoch,), generator=generator)
    return [prompts[i] for i in drawn]


def sample_prompts(
    models: Models, policy: Policy, prompts: list[str], generators: list[torch.Generator]
) -> Trajectories:
    """B = len(generators) / len(prompts) trajectories of each prompt (Alg. 1, lines 5 to 7)."""
    with in_use(models, models.pipe.text_encoder):
        text = encode(models.pipe, prompts)
        text = text.repeat_interleave(len(generators) // len(prompts), dim=0)
    with in_use(models, policy):
        trajectories = sample_trajectories(policy, text, generators, models.latent_shape)
    require_finite("a log-prob", trajectories.log_probs)
    return trajectories


def require_finite(what: str, values: Tensor) -> None:
    """Stop before anything is learned from NaN or infinity."""
    if not values.isfinite().all():
        mend = "a lower --learning-rate or --guidance-scale, a higher --kl-weight, another --dtype"
        raise InputError(f"{what} is not finite; try, in a new run, {mend}.")


# ---- 7. Models -----------------------------------------------------------------------------------


class Models(NamedTuple):
    """Everything with weights; `pipe` is the diffusers pipeline around the policy's UNet."""

    pipe: object  # StableDiffusionPipeline
    policy: Policy
    reference: Policy
    reward: Callable  # a rewards.Reward
    latent_shape: tuple[int, int, int]
    waiting: torch.device  # where all but the policy's network are outside `in_use`


def load_pipeline(model: str):
    """The diffusers pipeline of a folder or the hub, in float32, whole; InputError for others."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of loading; downloads keep theirs
        library.utils.logging.set_verbosity(50)  # `reading` says it
    if (Path(model) / "metrics.jsonl").is_file():
        raise InputError(f"--model {model}: is a run; its model is {Path(model) / 'pipeline'}.")
    if Path(model).is_file():
        raise InputError(f"--model {model}: no Stable Diffusion folder; see from_single_file.")
    local, pipeline = Path(model).exists(), diffusers.StableDiffusionPipeline
    with reading(f"--model {model}: {'no Stable Diffusion folder' if local else 'no such folder'}"):
        kind = pipeline.load_config(model)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise InputError(f"--model {model}: a {kind}; only Stable Diffusion 1.x and 2.x work.")
        folder = model if local else pipeline.download(model)
        parts = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
                 "text_encoder": transformers.CLIPTextModel}  # fmt: skip
        for name in (*parts, "tokenizer", "scheduler"):
            if not Path(folder, name).is_dir():
                raise ValueError(f"has no {name}")
        for name, part in parts.items():
            with reading(what := f"--model {model}: its {name}"):
                parts[name] = load_network(what, part, folder, subfolder=name)
        parts |= dict(safety_checker=None, requires_safety_checker=False)
        return pipeline.from_pretrained(folder, **parts)


def load_models(config: Config, device: torch.device, reward: Callable | None = None) -> Models:
    """The pipeline, the policy, and the frozen reference it starts from (Alg. 1, line 1)."""
    from diffusers import DDIMScheduler

    waiting = torch.device("cpu") if config.offload == "on" else device
    reward = load_reward(reward or config.reward, device, waiting)
    pipe = load_pipeline(config.model)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    channels, expected = unet.config.in_channels, vae.config.latent_channels
    if channels != expected:
        raise InputError(f"--model {config.model}: UNet of {channels} channels, VAE of {expected}.")
    size = unet.config.sample_size
    latent_shape = (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    unet.requires_grad_(True).eval()  # eval: with dropout every pass would be another policy

    tf32 = config.dtype != "fp32"  # it rounds like fp16
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.dtype)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.lora_rank:
        add_adapters(unet, config)
        reference = unet  # without them, see `in_use`
    else:
        reference = copy.deepcopy(unet).requires_grad_(False)
        for layer in reference.modules() if autocast and not config.compile else ():
            # Autocast casts these at every pass; once is the same bits, unless compiled, in half.
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.to(autocast)

    reference.to(waiting)
    vae.to(waiting)
    unet.to(device)
    text_encoder.to(device)
    with reading(f"--model {config.model}: its tokenizer"):
        null_text = encode(pipe, [""])[0]  # on `device`: the same bits wherever networks wait
    text_encoder.to(waiting)
    if config.compile:  # dynamic=False: a graph a shape, so that no pass changes another's bits
        importlib.import_module("torch._inductor.config").deterministic = True  # nor a process
        compiled = {network: torch.compile(network, dynamic=False) for network in (unet, reference)}
        unet, reference = compiled[unet], compiled[reference]
    schedule = ddpm_schedule(pipe.scheduler.config, config.ddpm_steps)
    schedule = Schedule(*(column.to(device) for column in schedule))
    settings = {**SD_SCHEDULER, **pipe.scheduler.config, "timestep_spacing": "leading"}
    pipe.scheduler = DDIMScheduler.from_config(settings | {"clip_sample": False})  # ours: eta = 1
    policy = Policy(unet, schedule, null_text, config.guidance_scale, config.microbatch, autocast)
    return Models(pipe, policy, policy._replace(unet=reference), reward, latent_shape, waiting)


def add_adapters(unet: nn.Module, config: Config) -> None:
    """The attention layers learn W + B A alone, where B begins at 0 (Hu et al. 2021)."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    torch.manual_seed(config.seed)  # A begins at random, the same in every process
    rank, layers = config.lora_rank, ["to_q", "to_k", "to_v", "to_out.0"]
    start = {"lora_alpha": rank, "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(r=rank, target_modules=layers, **start))


@contextmanager
def in_use(models: Models, part: Policy | nn.Module) -> Iterator[None]:
    """Have a policy's network, or another, on the policy's device within this block: --offload lets
    all but the policy's own wait on the CPU, as they are needed in passes of their own."""
    network, own = getattr(part, "unet", part), models.policy.unet
    adapted = part is models.reference and network is own  # pi_ref: B = 0, in the very same graph
    off = [(p, p.detach().clone()) for n, p in own.named_parameters() if adapted and "lora_B" in n]
    network.to(models.policy.null_text.device)
    for p, _ in off:
        p.data.zero_()
    yield
    for p, learned in off:
        p.data.copy_(learned)
    if network is not own:
        network.to(models.waiting)


@torch.no_grad()
def encode(pipe, prompts: list[str]) -> Tensor:
    """Text embeddings (len(prompts), L, D), as the pipeline itself makes them."""
    return pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)[0]


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """x_0 (M, C, H, W) -> uint8 images (M, 3, 8H, 8W), rounded once, as a PNG file would be."""
    vae, images = models.pipe.vae, []
    device, autocast = latents.device.type, models.policy.autocast
    with in_use(models, vae), torch.autocast(device, autocast, enabled=autocast is not None):
        for rows in latents.split(models.policy.microbatch):
            decoded = vae.decode(rows / vae.config.scaling_factor).sample.float()
            require_finite("a picture from the VAE", decoded)
            images.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images)


# ---- 8. Processes, files, main -------------------------------------------------------------------


def load_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt (a line each; blank and # lines skipped), .json or .jsonl file (strings, or
    objects with a "prompt" or "caption"), in order, repeats dropped; InputError if it is none."""
    what, kind = f"--prompts {path}", Path(path).suffix.lower()
    if str(path).startswith(PROMPTS):
        what += " (the README tells how to get the large sets)"
    with reading(what):
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = text.split("\n")  # not splitlines(): JSON strings may hold other separators
        if kind == ".json":
            records = json.loads(text)
        elif kind == ".jsonl":
            records = [json.loads(line) for line in lines if line.strip()]
        else:
            records = [line for line in lines if not line.lstrip().startswith("#")]
        if kind not in (".txt", ".json", ".jsonl", "") or not isinstance(records, list):
            raise ValueError("must be .txt, .json or .jsonl, and hold a list of prompts")
        return as_prompts(records)


def as_prompts(records: list) -> list[str]:
    """The text of each, stripped, blanks and repeats dropped; ValueError for what is no prompt."""
    texts = [r.get("prompt") or r.get("caption") if isinstance(r, dict) else r for r in records]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"entry {number + 1} is neither a string nor has a prompt")
    "".join(texts).encode()  # refuses half a surrogate pair, which no tokenizer takes
    prompts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not prompts:
        raise ValueError("holds no prompt")
    return prompts


def check_on_policy(config: Config, models: Models, prompt: str) -> float:
    """Score a fresh microbatch again, under policy and reference: both must return the same bits,
    for Eq. 20 compares two passes to within clip_range, 1e-6 to 1e-4 in Table 4, and would clip
    noise. Returns the seconds that a pass through T steps takes an image."""
    for deterministic in (False, True):
        torch.backends.cudnn.deterministic = deterministic
        generators, gap = image_generators(config.seed, 0, range(1), config.microbatch), 0.0
        trajectories = sample_prompts(models, models.reference, [prompt], generators)
        for policy in (models.policy, models.reference):
            with in_use(models, policy):
                started = time.perf_counter()
                scores = score_trajectories(policy, trajectories)
                gap += (scores - trajectories.log_probs).abs().max().item()  # NaN stays NaN
                seconds = time.perf_counter() - started  # the last is warm, and compiled
        say(f"on-policy gap{', with deterministic cuDNN' * deterministic}: {gap:.1e}")
        if gap == 0:
            return seconds / config.microbatch
    raise InputError(f"on-policy gap: {gap:.1e}, so the clip would act on noise; try --dtype fp32.")


def draw_samples(config: Config, models: Models, policy: Policy, prompts: list[str]) -> Samples:
    """At most 8 images of 8 prompts spread over all, from the same noise every time."""
    count, images = min(8, config.prompts_per_epoch), min(8, config.images_per_prompt)
    shown = [prompts[n * len(prompts) // count] for n in range(count)]
    generators = image_generators(config.seed, 0, range(count), images)
    trajectories = sample_prompts(models, policy, shown, generators)
    pictures = decode(models, trajectories.latents[:, -1])
    rewards = models.reward(pictures, [prompt for prompt in shown for _ in range(images)])
    return Samples(shown, pictures.cpu(), rewards.cpu())


def run(config: Config, reward: Callable | None = None, prompts: list[str] | None = None) -> None:
    """Train from the first epoch or the last checkpoint, then show what changed.

    reward, (uint8 images (M, 3, H, W), M prompts) -> M numbers, and prompts are taken in place of
    those that config names. Raises InputError for what cannot run.
    """
    device, state = report.start_processes(), {"epoch": 0}
    given = ({"reward": ""} if reward else {}) | ({"prompts": ()} if prompts else {})
    config = resolved(dataclasses.replace(config, **given))
    out, files = Path(config.out), config.prompts
    with reading("prompts"):
        prompts = as_prompts(prompts or [text for file in files for text in load_prompts(file)])
    if config.resume:
        with reading(f"--resume {out}"):
            state = report.load_state(out, HARMLESS)
        if state["epoch"] > config.epochs:
            raise InputError(f"--epochs {config.epochs}: the run has done {state['epoch']}.")
    elif on_rank_0(lambda: report.is_used(out)):
        raise InputError(f"--out {out}: in use; choose another, or go on with --resume {out}.")

    models = load_models(config, device, reward)
    pipe, unet, start = models.pipe, models.pipe.unet, state["epoch"] + 1
    record = report.make_record(vars(config), prompts, reward_files(config.reward), pipe)
    if config.resume:
        with reading(f"--resume {out}"):
            report.require_same(state["record"], record, HARMLESS)
    learned = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    options = {"weight_decay": config.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(learned.values(), config.learning_rate, **options)
    statistics = baselines.RewardStatistics(config.advantage if "ddpo" in config.loss else "none")
    report.introduce(vars(config), learned.values(), kernels.path(device), len(prompts))
    context, some = pipe.tokenizer.model_max_length, prompts[:1000]
    if long := sum(len(ids) > context for ids in pipe.tokenizer(some).input_ids):
        say(f"warning: {long} of {len(some)} prompts exceed {context} tokens; the ends go unread.")
    seconds = check_on_policy(config, models, prompts[0])
    spent = seconds * baselines.passes(config) * config.prompts_per_epoch * config.images_per_prompt
    say(report.forecast(seconds, spent / processes(), config.epochs - start + 1))
    before = draw_samples(config, models, models.reference, prompts)

    with reading(f"--resume {out}"):  # all has been compared: load, and only then write
        statistics.latest = report.restore(state, learned, optimizer)
    del state  # and its memory
    report.start_run(out, record, start, before)
    for metrics in train(config, models, optimizer, statistics, prompts, start):
        epoch = metrics["epoch"]
        report.log_epoch(out, metrics, (epoch - start) % 20 == 0, config.log_to)
        if epoch % config.sample_every == 0 and epoch < config.epochs:
            report.save_grid(out, epoch, draw_samples(config, models, models.policy, prompts))
        if epoch % config.save_every == 0 or epoch == config.epochs:
            state = dict(unet=learned, optimizer=optimizer.state_dict(), latest=statistics.latest)
            report.save_state(out, record, epoch, state)

    after = draw_samples(config, models, models.policy, prompts)
    report.save_grid(out, config.epochs, after)
    report.save_pipeline(out, pipe)
    report.compare(out, before, after)


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with command("prdp.py"):
        report.start_processes()
        config = parse_args(sys.argv[1:] if argv is None else argv)
        try:
            run(config)
        except KeyboardInterrupt:
            say(f"stopped; once epochs have begun: python prdp.py --resume {config.out}")
            raise
        report.end_processes()


if __name__ == "__main__":
    main()
