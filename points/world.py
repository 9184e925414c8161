"""A diffusion of points whose optimum is known, and Algorithm 1 on it with every baseline.

A prompt names a place on a ring of the plane and how three modes lie round it; in D = 8 also what
six more numbers should be. A small network learns to draw such points by DDPM, as Stable Diffusion
draws images, and is then finetuned for a reward with Table 4's E, K, N and B, in seconds. All seeds
of an arm are trained at once, by plain automatic differentiation.

In reading order: an arm's settings, the world, the network, the chain (prdp.py's mathematics), the
losses that no other file has, Algorithm 1, evaluation, and the exact optimum of Eq. 7.

Shapes: S seeds, N prompts an epoch, B points of each, M = N * B points, T steps, D dimensions, P
weights of a network. Units: a step's log-prob is a mean over D, as in prdp.py. `beta` is that of
Eq. 5, reward per nat of the whole trajectory, so that prdp_loss's kl_weight is beta * T * D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import grid_sample, logsigmoid, silu

from baselines.ddpo import ddpo_loss, ddpo_sf_loss
from prdp import ddpm_schedule, prdp_loss

BASES = Path(__file__).resolve().with_name("base.safetensors")
SCHEDULER = dict(  # SD v1.4's
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    steps_offset=1, set_alpha_to_one=False, prediction_type="epsilon",
)  # fmt: skip

PROMPTS = {"few": 45, "many": 100_000}  # what is trained on: the first of all 100,256
SEEN = {"few": range(45), "many": range(256)}  # what is evaluated
UNSEEN = range(100_000, 100_256)


@dataclass(frozen=True)
class Arm:
    """One way to train: Table 4's rows (defaults: its small-scale column), and what is compared."""

    # "prdp", "ddpo", "ddpo-sf", "rwr", "rwr-sparse", "trajectory-rwr", "trajectory-rwr-sparse",
    # "trajectory-dpo", "diffusion-dpo" or "pathwise"
    method: str = "prdp"
    prompts: str = "few"  # or "many"
    E: int = 100  # epochs
    K: int = 10  # updates an epoch
    N: int = 32  # prompts an epoch
    B: int = 16  # points of each
    lr: float = 3e-4
    clip: float = 0.1  # in the unit of a step's log-prob, or of DDPO's importance weight
    beta: float = 0.02  # reward per nat of the trajectory (Eq. 5); or the method's own setting
    normalise: str = ""  # DDPO's rewards: "global", "per-prompt", "group", "own mean"
    minibatches: bool = False  # K, which use each sample once (DDPO); else K times all samples
    spread: float = 3.0  # std of b(c), the reward's part that only the prompt decides
    decay: bool = False  # of the learning rate: a cosine to zero
    offline: bool = False  # samples of the base only (Sec. 4.3)
    shared: bool = False  # the B points of a prompt share x_T
    reward: str = "own"  # or "blind" to the prompt
    dims: int = 8  # D
    T: int = 10
    width: int = 64  # of the network

    @property
    def kl_weight(self) -> float:
        """beta in the unit of prdp_loss, whose log-probs are means over T and D."""
        return self.beta * self.T * self.dims


# ---- 1. The world: prompts, the data they name, the rewards --------------------------------------

_generator = torch.Generator().manual_seed(0)
ANGLES = 2 * math.pi * torch.rand(100_256, 2, generator=_generator)  # place, and turn of the modes
TRAITS = torch.randn(100_256, 4, generator=_generator)  # what the other dimensions depend on
PROMPT_REWARDS = torch.randn(100_256, generator=_generator)  # b(c), before `spread`
_features = torch.cat([ANGLES.cos(), ANGLES.sin(), TRAITS], dim=1)
# What the network sees of a prompt.
EMBEDDINGS = torch.sin(_features @ torch.randn(8, 16, generator=_generator) / 2)
RESTS = 0.5 * torch.sin(TRAITS @ torch.randn(4, 6, generator=_generator))
CENTRES = 2 * torch.stack([ANGLES[:, 0].cos(), ANGLES[:, 0].sin()], dim=1)
_turned = ANGLES[:, 1:] + 2 * math.pi / 3 * torch.arange(3)
MODES = torch.stack([_turned.cos(), _turned.sin()], dim=-1)  # (prompts, 3, 2), unit vectors
WEIGHTS = torch.tensor([0.6, 0.3, 0.1])  # of the modes
OFFSET = 0.45  # of a mode from the centre
STD = 0.18  # of the points of a mode
STAR = torch.tensor([1.2, 0.6])  # what the reward that is blind to the prompt wants


def draw_data(prompts: Tensor, dims: int, generator: torch.Generator) -> Tensor:
    """x_0 (..., dims) of prompts (...): a mixture of three Gaussians round the prompt's centre."""
    count = prompts.numel()
    mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    mode = mode.view(prompts.shape)
    mean = CENTRES[prompts] + OFFSET * MODES[prompts, mode]
    mean = torch.cat([mean, RESTS[prompts]], dim=-1)[..., :dims]
    return mean + STD * torch.randn(mean.shape, generator=generator)


def reward_of(kind: str, x: Tensor, prompts: Tensor) -> Tensor:
    """r(x_0, c) without b(c), of x (..., D) and prompts (...).

    "own": 8 at a point just beyond the prompt's rarest mode, less as a Gaussian round it. "blind":
    minus 4 times the distance to the star, whatever the prompt.
    """
    if kind == "blind":
        return -4 * (x[..., :2] - STAR).norm(dim=-1)
    target = CENTRES[prompts] + 0.55 * MODES[prompts, 2]
    near = (x[..., :2] - target).square().sum(-1) / (2 * 0.4**2)
    return 8 * torch.exp(-near - x[..., 2:].square().sum(-1) / (2 * 0.8**2))


def match_of(x: Tensor, prompts: Tensor) -> Tensor:
    """1 where the prompt's own centre is the nearest of 8 round the ring, else 0."""
    angle = torch.atan2(x[..., 1], x[..., 0]) - ANGLES[prompts, 0]
    return (angle.cos() > math.cos(math.pi / 8)).to(x.dtype)


# ---- 2. The network: one MLP a seed, all seeds of an arm at once ---------------------------------


def layer_shapes(arm: Arm) -> list[tuple[int, int]]:
    """Fan-in and fan-out: prompt and time enter the first layer beside the point."""
    dims, width = arm.dims, arm.width
    return [(dims + 16 + 10, width), (width, width), (width, width), (width, dims)]


def unpack(weights: Tensor, arm: Arm) -> list[Tensor]:
    """Flat weights (S, P) -> a matrix (S, in + 1, out) a layer; the last row is the bias."""
    shapes = [(fan_in + 1, fan_out) for fan_in, fan_out in layer_shapes(arm)]
    parts = weights.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def time_features(timesteps: Tensor) -> Tensor:
    """Sines and cosines of timesteps (...): (..., 10)."""
    angles = timesteps.unsqueeze(-1) / 1000 * math.pi * 2.0 ** torch.arange(5)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def network(weights: Tensor, embedding: Tensor, arm: Arm) -> Callable:
    """The network of weights (S, P) for prompts (S, M, 16): (x (S, M, D), time) -> noise_pred."""
    first, *middle, last = unpack(weights, arm)
    of_x, of_prompt, of_time, bias = first.split([arm.dims, 16, 10, 1], dim=1)
    prompt = torch.baddbmm(bias, embedding, of_prompt)  # (S, M, width), the same at every step

    def noise_pred(x: Tensor, time: Tensor) -> Tensor:
        hidden = torch.baddbmm(prompt + time @ of_time, x, of_x)
        for layer in middle:
            hidden = torch.baddbmm(layer[:, -1:], silu(hidden), layer[:, :-1])
        return torch.baddbmm(last[:, -1:], silu(hidden), last[:, :-1])

    return noise_pred


def diffuse(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) of the full schedule of 1,000 steps (Ho et al. 2020, Eq. 4)."""
    start, end = SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5
    alphas = 1 - torch.linspace(start, end, 1000, dtype=torch.float64) ** 2
    alpha_bar = alphas.cumprod(0).float()[t].unsqueeze(-1)
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise


def pretrain(arm: Arm, steps: int) -> Tensor:
    """The base model (1, P): noise prediction (Ho et al. 2020, Eq. 14) on all 100,000 prompts."""
    generator = torch.Generator().manual_seed(1)
    layers = [
        torch.randn((fan_in + 1) * fan_out, generator=generator) / fan_in**0.5
        for fan_in, fan_out in layer_shapes(arm)
    ]
    weights = torch.cat(layers)[None].requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for _ in range(steps):
        prompts = torch.randint(PROMPTS["many"], (1, 4096), generator=generator)
        t = torch.randint(1000, (1, 4096), generator=generator)
        noise = torch.randn(1, 4096, arm.dims, generator=generator)
        x_t = diffuse(draw_data(prompts, arm.dims, generator), t, noise)
        noise_pred = network(weights, EMBEDDINGS[prompts], arm)(x_t, time_features(t))

        (noise_pred - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return weights.detach()


def load_base(arm: Arm) -> Tensor:
    """The pretrained weights (1, P); a copy, which does not hang on the file."""
    return load_file(BASES)[f"{arm.dims}-{arm.width}"].clone()


# ---- 3. The chain: DDPM sampling and its log-probs (Secs. 2 and 3) -------------------------------


class Chain:
    """Eqs. 1 to 4 with the T steps of an arm, k = 0 from x_T on: prdp.py's chain in float32, for
    the networks of all seeds at once."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.schedule = ddpm_schedule(SCHEDULER, arm.T)
        self.times = time_features(self.schedule.timesteps)[:, None]  # (T, 1, 10)
        self.coef_sample = self.schedule.coef_sample.tolist()
        self.coef_noise = self.schedule.coef_noise.tolist()
        self.sigma = self.schedule.sigma.tolist()

    def mean_function(self, weights: Tensor, prompts: Tensor) -> Callable:
        """mu_theta of Eq. 2 for prompts (S, M): a function of x_t (S, M, D) and k."""
        noise_pred = network(weights, EMBEDDINGS[prompts], self.arm)

        def mean(x: Tensor, k: int) -> Tensor:
            return self.coef_sample[k] * x + self.coef_noise[k] * noise_pred(x, self.times[k])

        return mean

    def log_prob(self, x: Tensor, mean: Tensor, k: int) -> Tensor:
        """log N(x; mean, sigma_k^2) of Eqs. 2 and 4, a mean over D: (..., D) -> (...)."""
        sigma = self.sigma[k]
        constant = math.log(sigma * math.sqrt(2 * math.pi))
        return -((x - mean) / sigma).square().mean(-1) / 2 - constant

    def sample(self, weights: Tensor, prompts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 1: latents (S, M, T+1, D) from noise of that shape, and their log-probs (S, M, T),
        which carry the gradient."""
        mean_of = self.mean_function(weights, prompts)
        latents = [noise[:, :, 0]]
        log_probs = []
        for k in range(self.arm.T):
            mean = mean_of(latents[-1], k)
            latents.append((mean + self.sigma[k] * noise[:, :, k + 1]).detach())
            log_probs.append(self.log_prob(latents[-1], mean, k))
        return torch.stack(latents, 2), torch.stack(log_probs, -1)

    def score(self, weights: Tensor, prompts: Tensor, latents: Tensor) -> Tensor:
        """Eq. 4: log pi(x_{t-1} | x_t, c) of stored latents (S, M, T+1, D): (S, M, T)."""
        mean_of = self.mean_function(weights, prompts)
        x = latents.unbind(2)
        steps = range(self.arm.T)
        return torch.stack([self.log_prob(x[k + 1], mean_of(x[k], k), k) for k in steps], -1)

    def compare(self, weights: Tensor, base: Tensor, prompts: Tensor, noise: Tensor) -> tuple:
        """x_0 (S, M, D), and (S, M) each: reward, KL to the base in nats (Eq. 6), and log-ratio
        (Eq. 10), a sum over T of means over D."""
        mean_of = self.mean_function(weights, prompts)
        base_mean_of = self.mean_function(base, prompts)
        x = noise[:, :, 0]
        kl = log_ratio = 0
        for k in range(self.arm.T):
            mean, base_mean = mean_of(x, k), base_mean_of(x, k)
            x = mean + self.sigma[k] * noise[:, :, k + 1]
            kl = kl + (mean - base_mean).square().sum(-1) / (2 * self.sigma[k] ** 2)
            log_ratio = log_ratio + self.log_prob(x, mean, k) - self.log_prob(x, base_mean, k)
        return x, reward_of(self.arm.reward, x, prompts), kl, log_ratio


# ---- 4. Losses: what prdp.py and baselines/ddpo.py do not have -----------------------------------


def trajectory_rwr_loss(log_probs: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Reward-weighted regression (Black et al. 2024, Apps. C.2, F.3): weights exp(r / temperature),
    normalised over a prompt's B points. log_probs (..., B, T), rewards (..., B): a scalar.

    Theirs weights the denoising loss, a bound on the likelihood of x_0; this weights the exact
    log-likelihood of the sampled trajectory. App. F.6's inverse temperature 0.2 is temperature 5.
    """
    weights = torch.softmax(rewards.to(log_probs.dtype) / temperature, dim=-1)  # (..., B)
    return -(weights * log_probs.mean(-1)).sum(-1).mean()


def trajectory_rwr_sparse_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """The same with binary weights (Black et al. 2024, Apps. F.3, F.6): a prompt's points from the
    0.9 quantile of their rewards up."""
    best = rewards >= rewards.quantile(0.9, dim=-1, keepdim=True)  # (..., B)
    best = best.to(log_probs.dtype)
    return -(best * log_probs.mean(-1)).sum(-1).div(best.sum(-1)).mean()


def trajectory_dpo_loss(
    log_probs: Tensor, log_probs_ref: Tensor, rewards: Tensor, kl_weight: float
) -> Tensor:
    """Diffusion-DPO (Wallace et al. 2024, Eqs. 8 and 11) on the sampled trajectories themselves.

    Its pairs are all those of a prompt whose rewards differ, ranked by them (Sec. 5.4). log_probs,
    log_probs_ref (..., B, T), rewards (..., B); kl_weight: logits per nat per dimension.
    """
    log_ratio = (log_probs - log_probs_ref).mean(-1)  # (..., B)
    return preference_loss(kl_weight * log_ratio, rewards)


def diffusion_dpo_loss(
    errors: Tensor, errors_ref: Tensor, rewards: Tensor, kl_weight: float
) -> Tensor:
    """Diffusion-DPO's own objective (Wallace et al. 2024, Eq. 14), on all pairs of a prompt whose
    rewards differ (Sec. 5.4): a scalar.

    errors, errors_ref (..., B): squared errors of the noise predicted by policy and reference, mean
    over D, at one random timestep that the B points share. kl_weight is its beta * T * omega.
    """
    return preference_loss(-kl_weight * (errors - errors_ref), rewards)


def preference_loss(logits: Tensor, rewards: Tensor) -> Tensor:
    """Wallace et al. 2024, Eqs. 4 and 8: the mean of -log sigmoid(winner's logit - loser's) over a
    prompt's untied pairs, then over prompts; one whose rewards all tie contributes 0.

    logits, rewards (..., B).
    """
    logit_diff = logits.unsqueeze(-1) - logits.unsqueeze(-2)  # (..., B, B)
    wins = rewards.unsqueeze(-1) > rewards.unsqueeze(-2)
    loss = torch.where(wins, -logsigmoid(logit_diff), 0.0)
    return (loss.sum((-2, -1)) / wins.sum((-2, -1)).clamp(min=1)).mean()


def trajectory_loss(
    arm: Arm, log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor, rewards: Tensor
) -> Tensor:
    """Line 10 of Algorithm 1, or what an arm has there: log-probs (S, M, T), rewards (S, M)."""
    if arm.method == "ddpo":
        return ddpo_loss(log_probs, log_probs_old, rewards, arm.clip)
    if arm.method == "ddpo-sf":
        return ddpo_sf_loss(log_probs, rewards)

    # The others compare the B points of a prompt: (S, M, ...) -> (S, N, B, ...).
    matrices = (log_probs, log_probs_old, log_probs_ref, rewards)
    log_probs, log_probs_old, log_probs_ref, rewards = (
        x.unflatten(1, (arm.N, arm.B)) for x in matrices
    )
    if arm.method == "trajectory-rwr":
        return trajectory_rwr_loss(log_probs, rewards, arm.beta)
    if arm.method == "trajectory-rwr-sparse":
        return trajectory_rwr_sparse_loss(log_probs, rewards)
    if arm.method == "trajectory-dpo":
        return trajectory_dpo_loss(log_probs, log_probs_ref, rewards, arm.kl_weight)
    assert arm.method == "prdp", arm.method
    return prdp_loss(log_probs, log_probs_old, log_probs_ref, rewards, arm.clip, arm.kl_weight)


# ---- 5. Training: Algorithm 1 --------------------------------------------------------------------


def seed_generators(seeds: list[int]) -> list[torch.Generator]:
    """One each, so that no seed's numbers depend on which others run beside it."""
    return [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]


def draw_prompts(generators: list[torch.Generator], arm: Arm, count: int) -> Tensor:
    """`count` prompts for each seed, independent and uniform (Alg. 1, line 4): (S, count)."""
    pool = PROMPTS[arm.prompts]
    return torch.stack([torch.randint(pool, (count,), generator=g) for g in generators])


def draw_normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal numbers (S, *shape)."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def normalise(rewards: Tensor, prompts: Tensor, kind: str, history: Tensor) -> Tensor:
    """DDPO's advantages (Black et al. 2024, App. F.3) of rewards (S, N, B), prompts (S, N).

    RewardStatistics of baselines/ddpo.py for all seeds at once: S of its loops over N prompts would
    make an epoch up to a third longer. "own mean" is "group" without division. history (S, prompts,
    32) is NaN where nothing was seen yet; "per-prompt" reads it and writes to it.
    """
    dims = (2,) if kind in ("group", "own mean") else (1, 2)
    mean = rewards.mean(dims, keepdim=True)
    if kind == "own mean":
        return rewards - mean
    std = rewards.std(dims, correction=0, keepdim=True)

    if kind == "per-prompt":
        seed = torch.arange(len(rewards))
        for n in range(prompts.shape[1]):  # one after the other: an epoch may draw a prompt twice
            seen = torch.cat([history[seed, prompts[:, n]], rewards[:, n]], 1)
            history[seed, prompts[:, n]] = seen[:, -32:]
        seen = history[seed[:, None], prompts]  # (S, N, 32)
        enough = seen.isfinite().sum(-1, keepdim=True) >= 16  # else of the epoch's
        own_mean = seen.nanmean(-1, keepdim=True)
        own_std = (seen - own_mean).square().nanmean(-1, keepdim=True).sqrt()
        mean = torch.where(enough, own_mean, mean)
        std = torch.where(enough, own_std, std)
    return ((rewards - mean) / (std + 1e-6)).clamp(-10, 10)


def train(arm: Arm, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Algorithm 1 for all seeds at once -> weights (S, P), mean reward of each epoch (S, E)."""
    chain = Chain(arm)
    base = load_base(arm).repeat(len(seeds), 1)
    weights = base.clone().requires_grad_()  # line 1
    optimizer = torch.optim.AdamW([weights], lr=arm.lr, weight_decay=1e-4)
    generators = seed_generators(seeds)
    shuffle = torch.Generator().manual_seed(0)
    remembered = PROMPTS[arm.prompts] if arm.normalise == "per-prompt" else 0
    history = torch.full((len(seeds), remembered, 32), math.nan)
    curve = []

    for epoch in range(arm.E):  # line 2
        if arm.decay:
            optimizer.param_groups[0]["lr"] = arm.lr * (1 + math.cos(math.pi * epoch / arm.E)) / 2
        drawn = draw_prompts(generators, arm, arm.N)  # line 4
        prompts = drawn.repeat_interleave(arm.B, 1)  # (S, M)

        noise = draw_normal(generators, arm.N * arm.B, arm.T + 1, arm.dims)
        if arm.shared:
            noise[:, :, 0] = noise[:, :: arm.B, 0].repeat_interleave(arm.B, 1)
        # Lines 5 to 7. Where the first update is on all these samples, it takes their graph.
        with torch.set_grad_enabled(not (arm.offline or arm.minibatches)):
            latents, log_probs = chain.sample(base if arm.offline else weights, prompts, noise)
        log_probs_old = log_probs_ref = log_probs.detach()
        with torch.no_grad():
            if arm.offline:  # line 3: theta_old is theta as the epoch begins, though pi_ref draws
                log_probs_old = chain.score(weights, prompts, latents)
            if arm.method in ("prdp", "trajectory-dpo"):  # the others do not look at it
                log_probs_ref = chain.score(base, prompts, latents)

        rewards = reward_of(arm.reward, latents[:, :, -1], prompts)  # line 8
        curve.append(rewards.mean(1))
        rewards = rewards + arm.spread * PROMPT_REWARDS[prompts]
        if arm.normalise:
            by_prompt = rewards.unflatten(1, (arm.N, arm.B))
            rewards = normalise(by_prompt, drawn, arm.normalise, history).flatten(1)

        order = torch.randperm(arm.N * arm.B, generator=shuffle)
        parts = order.chunk(arm.K) if arm.minibatches else [slice(None)] * arm.K
        for part in parts:  # line 9
            x_0 = latents[:, :, -1]
            if arm.method == "diffusion-dpo":
                loss = noise_preference_loss(arm, weights, base, prompts, x_0, rewards, generators)
            elif arm.method in ("rwr", "rwr-sparse"):
                loss = noise_rwr_loss(arm, weights, prompts, x_0, rewards, generators)
            else:
                if not log_probs.requires_grad:
                    log_probs = chain.score(weights, prompts[:, part], latents[:, part])
                fixed = (x[:, part] for x in (log_probs_old, log_probs_ref, rewards))
                loss = trajectory_loss(arm, log_probs, *fixed)  # line 10
            (len(seeds) * loss).backward()  # the loss is a mean over seeds too: to each its own
            log_probs = log_probs.detach()  # its graph is used up
            clip_gradients(weights)
            optimizer.step()  # line 11
            optimizer.zero_grad()
    return weights.detach(), torch.stack(curve, 1)


def clip_gradients(weights: Tensor) -> None:
    """Each seed's gradient to a norm of at most 1 (Table 4), and to 0 where it is not finite: that
    run stays where it is."""
    norm = weights.grad.norm(dim=1, keepdim=True)
    weights.grad *= (1 / (norm + 1e-6)).clamp(max=1)
    weights.grad[~norm.isfinite().squeeze(1)] = 0


def noise_preference_loss(
    arm: Arm, weights: Tensor, base: Tensor, prompts: Tensor, x_0: Tensor, rewards: Tensor,
    generators: list[torch.Generator],
) -> Tensor:  # fmt: skip
    """Wallace et al. 2024, Eq. 14, of x_0 (S, M, D), prompts and rewards (S, M): a scalar. The B
    points of a prompt share the timestep and the noise, so that only the points differ."""
    t = torch.stack([torch.randint(1000, (arm.N,), generator=g) for g in generators])
    t = t.repeat_interleave(arm.B, 1)  # (S, M)
    noise = draw_normal(generators, arm.N, arm.dims).repeat_interleave(arm.B, 1)
    x_t = diffuse(x_0, t, noise)

    def errors(weights: Tensor) -> Tensor:
        noise_pred = network(weights, EMBEDDINGS[prompts], arm)(x_t, time_features(t))
        return (noise_pred - noise).square().mean(-1).unflatten(1, (arm.N, arm.B))

    rewards = rewards.unflatten(1, (arm.N, arm.B))
    return diffusion_dpo_loss(errors(weights), errors(base).detach(), rewards, arm.beta)


def noise_rwr_loss(
    arm: Arm, weights: Tensor, prompts: Tensor, x_0: Tensor, rewards: Tensor,
    generators: list[torch.Generator],
) -> Tensor:  # fmt: skip
    """Reward-weighted regression as its authors have it (Black et al. 2024, Apps. C.2, F.2, F.3):
    the denoising loss of x_0 (S, M, D), each point at a timestep of its own, weighted over a
    prompt's B by exp(r / beta), or from their 0.9 quantile up; prompts, rewards (S, M)."""
    rows = rewards.unflatten(1, (arm.N, arm.B))
    weight = torch.softmax(rows / arm.beta, dim=-1)
    if arm.method == "rwr-sparse":
        weight = (rows >= rows.quantile(0.9, dim=-1, keepdim=True)).to(rows.dtype)
    t = torch.stack([torch.randint(1000, (arm.N * arm.B,), generator=g) for g in generators])
    noise = draw_normal(generators, arm.N * arm.B, arm.dims)
    x_t = diffuse(x_0, t, noise)
    noise_pred = network(weights, EMBEDDINGS[prompts], arm)(x_t, time_features(t))
    error = (noise_pred - noise).square().mean(-1).unflatten(1, (arm.N, arm.B))
    return (weight / weight.mean(-1, keepdim=True) * error).mean()


def pathwise(arm: Arm, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Ascend Eq. 6 itself, through sampler and reward: what the network could reach, if the reward
    were no black box. Returns as `train`."""
    chain = Chain(arm)
    base = load_base(arm).repeat(len(seeds), 1)
    weights = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=arm.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arm.E * arm.K)
    generators = seed_generators(seeds)
    curve = []

    for update in range(arm.E * arm.K):
        prompts = draw_prompts(generators, arm, arm.N * arm.B)
        noise = draw_normal(generators, arm.N * arm.B, arm.T + 1, arm.dims)
        _, reward, kl, _ = chain.compare(weights, base, prompts, noise)
        (arm.beta * kl - reward).mean(1).sum().backward()
        torch.nn.utils.clip_grad_norm_([weights], len(seeds) ** 0.5)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if update % arm.K == 0:
            curve.append(reward.detach().mean(1))
    return weights.detach(), torch.stack(curve, 1)


# ---- 6. Evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(arm: Arm, weights: Tensor, prompts: range, count: int, noise_seed: int) -> dict:
    """The results by seed: {name: a list of S}, from `count` points of each prompt, with the same
    noise for all seeds.

    "explained": the share of Eq. 14's loss that the policy removes, on its own samples.
    """
    chain = Chain(arm)
    base = load_base(arm)
    prompts = torch.tensor(prompts).repeat_interleave(count)[None]  # (1, M)
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(1, prompts.shape[1], arm.T + 1, arm.dims, generator=generator)
    results = {name: [] for name in ("reward", "kl", "match", "explained")}

    for own in weights.split(1):  # a seed at a time, to stay in the cache
        x, reward, kl, log_ratio = chain.compare(own, base, prompts, noise)
        rewards = reward.view(-1, count)
        ratio = (log_ratio / arm.T).view(-1, count, 1)  # a mean over T, as prdp_loss takes it
        zero = torch.zeros_like(ratio)
        loss = prdp_loss(ratio, ratio, zero, rewards, math.inf, arm.kl_weight)
        loss_of_base = prdp_loss(zero, zero, zero, rewards, math.inf, arm.kl_weight)

        results["reward"].append(reward.mean().item())
        results["kl"].append(kl.mean().item())
        results["match"].append(match_of(x, prompts).mean().item())
        results["explained"].append(1 - (loss / loss_of_base).item())
    return results


@torch.no_grad()
def draw_points(arm: Arm, weights: Tensor, count: int, noise_seed: int) -> Tensor:
    """x_0 (prompts * count, D) of the networks (1, P) on the 45 prompts, `count` points of each."""
    prompts = torch.arange(PROMPTS["few"]).repeat_interleave(count)[None]
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(1, prompts.shape[1], arm.T + 1, arm.dims, generator=generator)
    return Chain(arm).compare(weights, load_base(arm), prompts, noise)[0][0]


# ---- 7. The exact optimum of Eq. 7, on the plane -------------------------------------------------

AXIS = torch.linspace(-4.5, 4.5, 301, dtype=torch.float64)
PLANE = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="ij"), -1)  # (G, G, 2)


def interpolate(values: Tensor, at: Tensor) -> Tensor:
    """Bilinear: values (..., G, G) on the grid, at (G, G, 2) -> (..., G, G); the edge's outside."""
    at = (at.flip(-1) / AXIS[-1])[None]  # grid_sample counts from -1 to 1, columns first
    flat = values.reshape(1, -1, *values.shape[-2:])
    options = dict(mode="bilinear", padding_mode="border", align_corners=True)
    return grid_sample(flat, at, **options).view(values.shape)


def exact_optimum(means: list, sigmas: list, betas: list, functions: Tensor) -> Tensor:
    """Expectations under Eq. 7's optimum of one prompt, for x_T ~ N(0, I): (betas, F + 1).

    Given x_T, the optimum is pi_ref(x_{t-1} | x_t) exp(V(x_{t-1}) - V(x_t)); V(x_0) = r / beta, and
    exp V(x_t) is the mean of exp V(x_{t-1}) under pi_ref: a Gaussian blur, read at its mean.
    means[k] (G, G, 2): pi_ref's mean of step k at every point of the grid.
    functions (F, G, G): of x_0, the reward first; the last column returned is the KL in nats.
    """
    betas = torch.tensor(betas, dtype=torch.float64)
    value = functions[0] / betas[:, None, None]  # V
    expected = functions.expand(len(betas), *functions.shape)
    for k in reversed(range(len(sigmas))):
        blur = torch.exp(-((AXIS[:, None] - AXIS) ** 2) / (2 * sigmas[k] ** 2))
        blur = blur / blur.sum(1, keepdim=True)
        top = value.amax((-2, -1), keepdim=True)
        mass = (value - top).clamp(min=-650).exp()  # exp V, which would overflow
        blurred = blur @ mass @ blur.T
        expected = blur @ (mass[:, None] * expected) @ blur.T / blurred[:, None]
        value = interpolate(blurred.log() + top, means[k])
        expected = interpolate(expected, means[k])

    start = (-PLANE.square().sum(-1) / 2).flatten().softmax(0).view(PLANE.shape[:2])  # p(x_T)
    expected = (expected * start).sum((-2, -1))
    kl = expected[:, 0] / betas - (value * start).sum((-2, -1))
    return torch.cat([expected, kl[:, None]], 1)


@torch.no_grad()
def exact_frontier(arm: Arm, betas: list[float], prompts: range) -> Tensor:
    """`exact_optimum` of an arm's base and reward, a mean over prompts: (betas, 3), the columns
    reward, match, KL."""
    chain = Chain(arm)
    base = load_base(arm)
    grid = PLANE.float().view(1, -1, 2)
    total = 0
    for prompt in prompts:
        index = torch.full((1, grid.shape[1]), prompt)
        mean_of = chain.mean_function(base, index)
        means = [mean_of(grid, k).view(PLANE.shape).double() for k in range(arm.T)]
        functions = torch.stack([reward_of(arm.reward, grid, index), match_of(grid, index)])
        functions = functions.view(2, len(AXIS), len(AXIS)).double()
        total = total + exact_optimum(means, chain.sigma, betas, functions)
    return total / len(prompts)
