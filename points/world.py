"""The paper's claims at the paper's own schedule, on a diffusion of points whose optimum is known.

    python toy/points.py --show      # the lesson: PRDP at four betas and DDPO, one picture
    python toy/points.py             # every claim; what --out has is not done again
    python toy/points.py --claim 3   # one claim, at the settings of points.json
    python toy/points.py --quick     # everything at tiny size, into --out only: does it run?

A prompt names a place on a ring of the plane, and how three modes lie round it; in D = 8 also what
six more numbers should be. A small network learns to draw such points by DDPM, as Stable Diffusion
draws pictures, and is then finetuned for a reward with Table 4's E, K, N and B, in seconds.

In reading order: the world, the network, the chain (prdp.py's mathematics, for all seeds at once),
Algorithm 1 with every baseline, evaluation, and the exact optimum of Eq. 7. points_claims.py has
the experiments and the criteria of their verdicts, points_figures.py the pictures.

Units: a step's log-prob is a mean over D, as in prdp.py. `beta` is that of Eq. 5, reward per nat
of the whole trajectory, so that prdp_loss's kl_weight is beta * T * D.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the workers
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from baselines import LOSSES, diffusion_dpo_loss  # noqa: E402
from prdp import ddpm_schedule, prdp_loss  # noqa: E402

BASES = HERE / "points_base.safetensors"
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012)  # SD v1.4's


@dataclass(frozen=True)
class Arm:
    """One way to train: Table 4's rows (defaults: its small-scale column), and what is compared."""

    method: str = "prdp"  # or a name of baselines.LOSSES, "diffusion-dpo", "pathwise"
    prompts: str = "few"  # 45, or "many": 100,000
    E: int = 100  # epochs
    K: int = 10  # updates an epoch
    N: int = 32  # prompts an epoch
    B: int = 16  # points of each
    lr: float = 3e-4
    clip: float = 0.1  # in the unit of a step's log-prob, or of DDPO's importance weight
    beta: float = 0.02  # reward per nat of the trajectory (Eq. 5); or the method's own setting
    normalise: str = ""  # DDPO's rewards: "global", "per-prompt", "group"
    minibatches: bool = False  # K, which use each sample once (DDPO); else K times all samples
    spread: float = 3.0  # std of b(c), the reward's part that only the prompt decides
    decay: bool = False  # of the learning rate: a cosine to zero
    offline: bool = False  # samples of the base only (Sec. 4.3)
    shared: bool = False  # the B points of a prompt share x_T
    reward: str = "own"  # or "blind" to the prompt
    dims: int = 8
    T: int = 10
    width: int = 64


# ---- 1. The world: prompts, the data they name, the rewards --------------------------------------

FEW, MANY = slice(0, 45), slice(0, 100_000)  # what is trained on
SEEN, UNSEEN = slice(0, 256), slice(100_000, 100_256)  # where many-prompt runs are evaluated
_dice = torch.Generator().manual_seed(0)
ANGLES = 2 * math.pi * torch.rand(100_256, 2, generator=_dice)  # phi: where; psi: how it is turned
TRAITS = torch.randn(100_256, 4, generator=_dice)  # what the other dimensions depend on
LIKED = torch.randn(100_256, generator=_dice)  # b(c): how well a prompt's points score as such
_features = torch.cat([ANGLES.cos(), ANGLES.sin(), TRAITS], dim=1)
EMBEDDINGS = torch.sin(_features @ torch.randn(8, 16, generator=_dice) / 2)  # what the network sees
RESTS = 0.5 * torch.sin(TRAITS @ torch.randn(4, 6, generator=_dice))
CENTRES = 2 * torch.stack([ANGLES[:, 0].cos(), ANGLES[:, 0].sin()], dim=1)
_turned = ANGLES[:, 1:] + 2 * math.pi / 3 * torch.arange(3)
MODES = torch.stack([_turned.cos(), _turned.sin()], dim=-1)  # (prompts, 3, 2), unit vectors
WEIGHTS, OFFSET, STD = torch.tensor([0.6, 0.3, 0.1]), 0.45, 0.18
STAR = torch.tensor([1.2, 0.6])


def draw_data(prompts: Tensor, dims: int, dice: torch.Generator) -> Tensor:
    """x_0 (..., dims) of prompts (...): three modes round the centre, the rarest with weight .1."""
    mode = torch.multinomial(WEIGHTS, prompts.numel(), True, generator=dice).view(prompts.shape)
    mean = CENTRES[prompts] + OFFSET * MODES[prompts, mode]
    mean = torch.cat([mean, RESTS[prompts]], dim=-1)[..., :dims]
    return mean + STD * torch.randn(mean.shape, generator=dice)


def reward_of(kind: str, x: Tensor, prompts: Tensor) -> Tensor:
    """r(x_0, c) without b(c). "own": 8 at a point just beyond the prompt's rarest mode; "blind":
    minus 4 times the distance to the star, whatever the prompt."""
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


def shapes_of(arm: Arm) -> list[tuple[int, int]]:
    """Fan-in and fan-out: prompt and time enter the first layer beside the point."""
    dims, width = arm.dims, arm.width
    return [(dims + 16 + 10, width), (width, width), (width, width), (width, dims)]


def unpack(weights: Tensor, arm: Arm) -> list[Tensor]:
    """Flat weights (S, P) -> a matrix (S, in + 1, out) a layer; the last row is the bias."""
    sizes = [(i + 1, o) for i, o in shapes_of(arm)]
    parts = weights.split([i * o for i, o in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


def time_features(timesteps: Tensor) -> Tensor:
    """(...) -> (..., 10)."""
    angles = timesteps.unsqueeze(-1) / 1000 * math.pi * 2.0 ** torch.arange(5)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def network(weights: Tensor, embedding: Tensor, arm: Arm) -> Callable:
    """The network of weights (S, P) for prompts (S, M, 16): (x (S, M, D), time) -> noise_pred."""
    first, *middle, last = unpack(weights, arm)
    of_x, of_prompt, of_time, bias = first.split([arm.dims, 16, 10, 1], dim=1)
    prompt = torch.baddbmm(bias, embedding, of_prompt)  # (S, M, width), the same at every step

    def noise_pred(x: Tensor, time: Tensor) -> Tensor:
        h = torch.baddbmm(prompt + time @ of_time, x, of_x)
        for layer in middle:
            h = torch.baddbmm(layer[:, -1:], torch.nn.functional.silu(h), layer[:, :-1])
        return torch.baddbmm(last[:, -1:], torch.nn.functional.silu(h), last[:, :-1])

    return noise_pred


def diffuse(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """q(x_t | x_0) of the 1,000 steps of the full schedule."""
    start, end = SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5
    alphas = 1 - torch.linspace(start, end, 1000, dtype=torch.float64) ** 2
    bar = alphas.cumprod(0).float()[t].unsqueeze(-1)
    return bar.sqrt() * x + (1 - bar).sqrt() * noise


def pretrain(arm: Arm, steps: int) -> Tensor:
    """The base model (1, P): noise prediction (Ho et al. 2020, Eq. 14) on all 100,000 prompts."""
    dice = torch.Generator().manual_seed(1)
    layers = [torch.randn((i + 1) * o, generator=dice) / i**0.5 for i, o in shapes_of(arm)]
    weights = torch.cat(layers)[None].requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        prompts = torch.randint(MANY.stop, (1, 4096), generator=dice)
        t = torch.randint(1000, (1, 4096), generator=dice)
        noise = torch.randn(1, 4096, arm.dims, generator=dice)
        x_t = diffuse(draw_data(prompts, arm.dims, dice), t, noise)
        noise_pred = network(weights, EMBEDDINGS[prompts], arm)(x_t, time_features(t))
        (noise_pred - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return weights.detach()


def load_base(arm: Arm) -> Tensor:
    """The pretrained weights (1, P); a copy, which does not hang on the file."""
    return load_file(BASES)[f"{arm.dims}-{arm.width}"].clone()


# ---- 3. The chain: DDPM sampling and its log-probs (prdp.py, Secs. 2 and 3, for points) ----------


class Chain:
    """Eqs. 1 to 4 with the T steps of an arm. Log-probs are means over the D dimensions."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.schedule = ddpm_schedule(SCHEDULER, arm.T)
        self.times = time_features(self.schedule.timesteps)[:, None]  # (T, 1, 10)
        self.steps = list(zip(self.times, *(c.tolist() for c in self.schedule[1:]), strict=True))

    def means(self, weights: Tensor, prompts: Tensor) -> Callable:
        """The mean of step k as a function of x_t (S, M, D) and k."""
        noise_pred = network(weights, EMBEDDINGS[prompts], self.arm)

        def mean(x: Tensor, k: int) -> Tensor:
            time, coef_sample, coef_noise, _ = self.steps[k]
            return coef_sample * x + coef_noise * noise_pred(x, time)

        return mean

    def log_prob(self, x: Tensor, mean: Tensor, k: int) -> Tensor:
        sigma = self.steps[k][-1]
        constant = math.log(sigma * math.sqrt(2 * math.pi))
        return -((x - mean) / sigma).square().mean(-1) / 2 - constant

    def sample(self, weights: Tensor, prompts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (S, M, T+1, D) and their log-probs (S, M, T), which carry the gradient."""
        mean_of, latents, log_probs = self.means(weights, prompts), [noise[:, :, 0]], []
        for k in range(self.arm.T):
            mean = mean_of(latents[-1], k)
            latents.append((mean + self.steps[k][-1] * noise[:, :, k + 1]).detach())
            log_probs.append(self.log_prob(latents[-1], mean, k))
        return torch.stack(latents, 2), torch.stack(log_probs, -1)

    def score(self, weights: Tensor, prompts: Tensor, latents: Tensor) -> Tensor:
        """log pi(x_{t-1} | x_t, c) of stored latents: (S, M, T)."""
        mean_of, x = self.means(weights, prompts), latents.unbind(2)
        steps = range(self.arm.T)
        return torch.stack([self.log_prob(x[k + 1], mean_of(x[k], k), k) for k in steps], -1)

    def compare(self, weights: Tensor, base: Tensor, prompts: Tensor, noise: Tensor):
        """x_0 (S, M, D), and (S, M) each: reward, KL to the base in nats (Eq. 6), log-ratio."""
        mean_of, reference_of = self.means(weights, prompts), self.means(base, prompts)
        x, kl, log_ratio = noise[:, :, 0], 0, 0
        for k in range(self.arm.T):
            mean, reference, sigma = mean_of(x, k), reference_of(x, k), self.steps[k][-1]
            x = mean + sigma * noise[:, :, k + 1]
            kl = kl + (mean - reference).square().sum(-1) / (2 * sigma**2)
            log_ratio = log_ratio + self.log_prob(x, mean, k) - self.log_prob(x, reference, k)
        return x, reward_of(self.arm.reward, x, prompts), kl, log_ratio


# ---- 4. Training: Algorithm 1 --------------------------------------------------------------------


def normalise(rewards: Tensor, prompts: Tensor, arm: Arm, history: Tensor) -> Tensor:
    """DDPO's advantages of rewards (S, N, B): clipped at +-10, as in its code.

    "per-prompt": of the prompt's last 32 rewards, of the epoch while there are fewer than 16.
    history (S, prompts, 32) is NaN where nothing was seen yet.
    """
    over = (1, 2) if arm.normalise != "group" else (2,)
    mean, std = rewards.mean(over, keepdim=True), rewards.std(over, correction=0, keepdim=True)
    if arm.normalise == "per-prompt":
        seed = torch.arange(len(rewards))
        for n in range(arm.N):  # one after the other: an epoch may draw a prompt twice
            seen = torch.cat([history[seed, prompts[:, n]], rewards[:, n]], 1)
            history[seed, prompts[:, n]] = seen[:, -32:]
        seen = history[seed[:, None], prompts]  # (S, N, 32)
        enough = (seen.isfinite().sum(-1, keepdim=True)) >= 16
        own_mean = seen.nanmean(-1, keepdim=True)
        own_std = (seen - own_mean).square().nanmean(-1, keepdim=True).sqrt()
        mean, std = torch.where(enough, own_mean, mean), torch.where(enough, own_std, std)
    return ((rewards - mean) / (std + 1e-6)).clamp(-10, 10)


def draws(dice: list[torch.Generator], *shape: int) -> Tensor:
    """Normal numbers (S, ...), each seed's from its own generator: none depends on others."""
    return torch.stack([torch.randn(shape, generator=g) for g in dice])


def train(arm: Arm, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Algorithm 1 for all seeds at once -> weights (S, P), mean reward of each epoch (S, E)."""
    chain, base = Chain(arm), load_base(arm).repeat(len(seeds), 1)
    weights = base.clone().requires_grad_()  # line 1
    optimizer = torch.optim.AdamW([weights], lr=arm.lr, weight_decay=1e-4)
    dice = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
    shuffle = torch.Generator().manual_seed(0)
    pool = (FEW if arm.prompts == "few" else MANY).stop
    history = torch.full((len(seeds), pool if arm.normalise == "per-prompt" else 0, 32), math.nan)
    loss_of = {"prdp": prdp_loss, **LOSSES}.get(arm.method)
    kl_weight = arm.beta * arm.T * arm.dims if arm.method in ("prdp", "dpo") else arm.beta
    curve = []

    def grouped(x: Tensor) -> Tensor:  # (S, M, ...) -> (S, N, B, ...); DDPO's samples stand alone
        return x if arm.minibatches else x.unflatten(1, (arm.N, arm.B))

    for epoch in range(arm.E):  # line 2
        if arm.decay:
            optimizer.param_groups[0]["lr"] = arm.lr * (1 + math.cos(math.pi * epoch / arm.E)) / 2
        drawn = torch.stack([torch.randint(pool, (arm.N,), generator=g) for g in dice])  # line 4
        prompts = drawn.repeat_interleave(arm.B, 1)  # (S, M)

        # lines 5 and 6: trajectories. Their log-probs keep the graph, which is the first update's
        noise = draws(dice, arm.N * arm.B, arm.T + 1, arm.dims)
        if arm.shared:
            noise[:, :, 0] = noise[:, :: arm.B, 0].repeat_interleave(arm.B, 1)
        with torch.set_grad_enabled(not (arm.offline or arm.minibatches)):
            latents, log_probs = chain.sample(base if arm.offline else weights, prompts, noise)
            if arm.offline:  # theta_old is the policy as the epoch begins, though it drew nothing
                log_probs = chain.score(weights, prompts, latents)
        old = ref = log_probs.detach()
        if arm.method in ("prdp", "dpo"):  # the others do not look at it
            with torch.no_grad():
                ref = chain.score(base, prompts, latents)

        # lines 7 and 8: rewards
        reward = reward_of(arm.reward, latents[:, :, -1], prompts)
        curve.append(reward.mean(1))
        targets = reward + arm.spread * LIKED[prompts]
        if arm.normalise:
            rows = targets.unflatten(1, (arm.N, arm.B))
            targets = normalise(rows, drawn, arm, history).flatten(1)

        order = torch.randperm(arm.N * arm.B, generator=shuffle)
        for part in order.chunk(arm.K) if arm.minibatches else [slice(None)] * arm.K:  # line 9
            if arm.method == "diffusion-dpo":
                x, rewards = latents[:, :, -1], grouped(targets)
                loss = diffusion_dpo(arm, weights, base, prompts, x, rewards, dice)
            else:
                if not log_probs.requires_grad:
                    log_probs = chain.score(weights, prompts[:, part], latents[:, part])
                fixed = (grouped(x[:, part]) for x in (old, ref, targets))
                loss = loss_of(grouped(log_probs), *fixed, arm.clip, kl_weight)  # line 10
            (len(seeds) * loss).backward()  # the loss is a mean over seeds too: to each its own
            log_probs = old

            norm = weights.grad.norm(dim=1, keepdim=True)
            weights.grad *= (1 / (norm + 1e-6)).clamp(max=1)
            weights.grad[~norm.isfinite().squeeze(1)] = 0  # that run stays where it is
            optimizer.step()  # line 11
            optimizer.zero_grad()
    return weights.detach(), torch.stack(curve, 1)


def diffusion_dpo(arm: Arm, weights: Tensor, base: Tensor, prompts, x, rewards, dice) -> Tensor:
    """Diffusion-DPO's own loss (Wallace et al. 2024, Eq. 14): noise prediction on noised samples.
    The B points of a prompt share the timestep and the noise, so that only the points differ."""
    t = torch.stack([torch.randint(1000, (arm.N,), generator=g) for g in dice])
    t = t.repeat_interleave(arm.B, 1)
    noise = draws(dice, arm.N, arm.dims).repeat_interleave(arm.B, 1)
    x_t, times = diffuse(x, t, noise), time_features(t)

    def errors(weights: Tensor) -> Tensor:
        noise_pred = network(weights, EMBEDDINGS[prompts], arm)(x_t, times)
        return (noise_pred - noise).square().mean(-1).unflatten(1, (arm.N, arm.B))  # (S, N, B)

    return diffusion_dpo_loss(errors(weights), errors(base).detach(), rewards, arm.beta)


def pathwise(arm: Arm, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Ascend Eq. 6 itself, through sampler and reward: what the network could reach, if the reward
    were no black box. Returns as `train`."""
    chain, base = Chain(arm), load_base(arm).repeat(len(seeds), 1)
    weights = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=arm.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arm.E * arm.K)
    dice = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
    pool, curve = (FEW if arm.prompts == "few" else MANY).stop, []
    for step in range(arm.E * arm.K):
        drawn = torch.stack([torch.randint(pool, (arm.N * arm.B,), generator=g) for g in dice])
        noise = draws(dice, arm.N * arm.B, arm.T + 1, arm.dims)
        _, reward, kl, _ = chain.compare(weights, base, drawn, noise)
        (arm.beta * kl - reward).mean(1).sum().backward()
        torch.nn.utils.clip_grad_norm_([weights], len(seeds) ** 0.5)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if step % arm.K == 0:
            curve.append(reward.detach().mean(1))
    return weights.detach(), torch.stack(curve, 1)


# ---- 5. Evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(arm: Arm, weights: Tensor, where: slice, points: int, noise_seed: int) -> dict:
    """Figures of each seed on the prompts `where`, `points` of each, the same noise for all seeds.

    "explained": the share of Eq. 14's loss that the policy removes, on its own samples.
    """
    chain, base, dice = Chain(arm), load_base(arm), torch.Generator().manual_seed(noise_seed)
    prompts = torch.arange(where.stop)[where].repeat_interleave(points)[None]
    noise = torch.randn(1, prompts.shape[1], arm.T + 1, arm.dims, generator=dice)
    figures = []
    for own in weights.split(1):  # a seed at a time, to stay in the cache
        x, reward, kl, log_ratio = chain.compare(own, base, prompts, noise)
        ratio = (log_ratio / arm.T).view(-1, points, 1)  # a mean over T, as prdp_loss takes it
        zero, rewards = torch.zeros_like(ratio), reward.view(-1, points)
        weight = arm.beta * arm.T * arm.dims
        fit, nothing = (prdp_loss(y, y, zero, rewards, math.inf, weight) for y in (ratio, zero))
        figures.append({
            "reward": reward.mean().item(), "kl": kl.mean().item(),
            "match": match_of(x, prompts).mean().item(), "explained": 1 - (fit / nothing).item(),
        })  # fmt: skip
    return {name: [f[name] for f in figures] for name in figures[0]}


# ---- 6. The exact optimum of Eq. 7, on the plane -------------------------------------------------

AXIS = torch.linspace(-4.5, 4.5, 301, dtype=torch.float64)
PLANE = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="ij"), -1)  # (G, G, 2)


def read_off(values: Tensor, at: Tensor) -> Tensor:
    """Bilinear: values (..., G, G) on the grid, at (G, G, 2) -> (..., G, G); the edge's outside."""
    where = (at.flip(-1) / AXIS[-1])[None]  # grid_sample counts from -1 to 1, columns first
    flat = values.reshape(1, -1, *values.shape[-2:])
    options = dict(mode="bilinear", padding_mode="border", align_corners=True)
    return torch.nn.functional.grid_sample(flat, where, **options).view(values.shape)


def exact_optimum(means: list, sigmas: list, betas: list, figures: Tensor) -> Tensor:
    """Expectations under Eq. 7's optimum of one prompt, for x_T ~ N(0, I): (betas, F + 1).

    Given x_T, the optimum is pi_ref(x_{t-1} | x_t) exp(V(x_{t-1}) - V(x_t)); V(x_0) = r / beta, and
    exp V(x_t) is the mean of exp V(x_{t-1}) under pi_ref: a Gaussian blur, read off at its mean.
    means[k] (G, G, 2): pi_ref's mean of step k at every point of the grid. figures (F, G, G):
    functions of x_0, the reward first; the last column returned is the KL in nats.
    """
    value = figures[0] / torch.tensor(betas, dtype=torch.float64)[:, None, None]
    expected = figures.expand(len(betas), *figures.shape)
    for k in reversed(range(len(sigmas))):
        blur = torch.exp(-((AXIS[:, None] - AXIS) ** 2) / (2 * sigmas[k] ** 2))
        blur = blur / blur.sum(1, keepdim=True)
        top = value.amax((-2, -1), keepdim=True)
        mass = (value - top).clamp(min=-650).exp()
        blurred = blur @ mass @ blur.T
        expected = blur @ (mass[:, None] * expected) @ blur.T / blurred[:, None]
        value, expected = read_off(blurred.log() + top, means[k]), read_off(expected, means[k])
    start = (-PLANE.square().sum(-1) / 2).flatten().softmax(0).view(PLANE.shape[:2])
    expected = (expected * start).sum((-2, -1))
    kl = expected[:, 0] / torch.tensor(betas, dtype=torch.float64) - (value * start).sum((-2, -1))
    return torch.cat([expected, kl[:, None]], 1)


@torch.no_grad()
def exact_frontier(arm: Arm, betas: list[float], prompts: range = range(45)) -> Tensor:
    """`exact_optimum` of an arm's base and reward: (betas, 3): reward, match, KL, over prompts."""
    torch.set_num_threads(1)
    chain, base, grid = Chain(arm), load_base(arm), PLANE.float().view(1, -1, 2)
    sigmas, total = [step[-1] for step in chain.steps], 0
    for prompt in prompts:
        index = torch.full((1, grid.shape[1]), prompt)
        mean_of = chain.means(base, index)
        means = [mean_of(grid, k).view(PLANE.shape).double() for k in range(arm.T)]
        figures = torch.stack([reward_of(arm.reward, grid, index), match_of(grid, index)])
        figures = figures.view(2, len(AXIS), len(AXIS)).double()
        total = total + exact_optimum(means, sigmas, betas, figures)
    return total / len(prompts)


if __name__ == "__main__":
    import points_claims

    points_claims.main()
