"""prdp_loss for flow matching: a rectified flow of 2-D points, finetuned through an SDE.

x_t = (1 - t) x_0 + t noise; the network gives the velocity noise - x_0. An ODE's steps have no
density, so those of an SDE with its marginals are taken (Flow-GRPO, arXiv 2505.05470, and its
sigma_t): Gaussians whose means are linear in the velocity. For SD3 or FLUX in diffusers, replace
- `velocity` by `pipe.transformer(...)[0]`, in eval(); `timestep` is 1000 t in SD3, t in FLUX. SD3
  is guided, the gradient goes through both branches; in FLUX.1-dev `guidance` is an input.
- TIMES by `pipe.scheduler.sigmas.double()`, but after `set_timesteps(T)` (FLUX: with `mu`): T + 1
  of them, ending in 0. `shift` s moves t to s t / (1 + (s - 1) t), FLUX's s being e^mu; SD3's
  smallest is shifted twice, and its last step's deviation is .006: keep latents in float32.
- `reward` by one of the VAE's pictures. Latents stay (m, D), reshaped in `velocity`. CLIP_RANGE is
  in means over D = 65,536 there: begin with 1e-4, and take beta T D of a beta per nat.
Wrong in pasted copies of such losses: rewards (B, 1), or (B,) for (N, B), which broadcast silently
(an assert here); sums over D under a clip range of means; another tensor scored than was stored."""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prdp import prdp_loss

N, B, T, D = 3, 64, 10, 2
NOISE, CLIP_RANGE, KL_WEIGHT, MICROBATCH = 0.7, 0.1, 4.0, 256  # beta of Eq. 5: KL_WEIGHT / (T * D)
TIMES = torch.linspace(1, 0, T + 1).double()
CENTRES = torch.tensor([[-3.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
PROMPTS = torch.arange(N).repeat_interleave(B)  # of each image; n: a ring around the n-th centre
STEPS = [torch.stack([torch.arange(N * B), torch.full((N * B,), k)], 1) for k in range(T)]


def velocity(network: nn.Module, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
    """x_t (m, D), t (m,), prompts (m,) -> (m, D)."""
    return network(torch.cat([x_t, t.float()[:, None], nn.functional.one_hot(prompts, N)], 1))


def sde_step(v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (m, D) and deviation (m, 1) of x_{t_next}; v and x_t (m, D), t (m,): float64."""
    v, x_t, t, t_next = v.double(), x_t.double(), t[:, None], t_next[:, None]
    sigma = NOISE * (t / (1 - torch.where(t < 1, t, t_next))).sqrt()  # at t = 1 as in their code
    noise_pred = x_t + (1 - t) * v  # minus t times the score
    mean = x_t + (v + sigma**2 / (2 * t) * noise_pred) * (t_next - t)
    return mean, sigma * (t - t_next).sqrt()


def gaussian(network: nn.Module, latents: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """pi(x_next | x_t, c) of (image, step) entries (m, 2): mean, deviation."""
    images, steps = entries.unbind(1)
    x_t, t = latents[images, steps], TIMES[steps]
    return sde_step(velocity(network, x_t, t, PROMPTS[images]), x_t, t, TIMES[steps + 1])


def log_prob(network: nn.Module, latents: Tensor, entries: Tensor) -> Tensor:
    """Of the same steps: (m,) float64, a mean over D."""
    mean, std = gaussian(network, latents, entries)
    z = (latents[entries[:, 0], entries[:, 1] + 1].double() - mean) / std
    return -(z.square() + (2 * torch.pi * std**2).log()).mean(1) / 2


@torch.no_grad()
def score(network: nn.Module, latents: Tensor) -> Tensor:
    """Log-probs (N, B, T), in the batches of `sample`."""
    return torch.stack([log_prob(network, latents, step) for step in STEPS], 1).view(N, B, T)


@torch.no_grad()
def sample(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Latents (N*B, T+1, D) float32, and log_probs (N, B, T) of what is stored."""
    latents = torch.randn(N * B, T + 1, D)
    for k, step in enumerate(STEPS):
        mean, std = gaussian(network, latents, step)
        latents[:, k + 1] = mean + std * latents[:, k + 1]
    return latents, score(network, latents)


@torch.no_grad()
def ode_rewards(network: nn.Module) -> Tensor:
    x = torch.randn(N * B, D)
    for k in range(T):
        x += velocity(network, x, TIMES[k].expand(N * B), PROMPTS) * (TIMES[k + 1] - TIMES[k])
    return reward(x)


def reward(x_0: Tensor) -> Tensor:  # (N, B): minus the distance to the top of the prompt's ring
    return -(x_0 - CENTRES[PROMPTS] - torch.tensor([0.0, 1.0])).norm(dim=1).view(N, B)


torch.manual_seed(0)
layers = [nn.Linear(D + 1 + N, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, D)]
network = nn.Sequential(*layers)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(3000):
    angle, t, noise = 2 * torch.pi * torch.rand(N * B), torch.rand(N * B), torch.randn(N * B, D)
    x_0 = CENTRES[PROMPTS] + torch.stack([angle.cos(), angle.sin()], 1)
    v = velocity(network, x_0.lerp(noise, t[:, None]), t, PROMPTS)
    nn.functional.mse_loss(v, noise - x_0).backward()
    optimizer.step()
    optimizer.zero_grad()

before, reference = ode_rewards(network), copy.deepcopy(network)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
for epoch in range(31):
    latents, log_probs_old = sample(network)
    log_probs_ref, rewards = score(reference, latents), reward(latents[:, -1])
    if epoch % 10 == 0:
        kl = D * (log_probs_old - log_probs_ref).sum(-1).mean()
        print(f"epoch {epoch}: reward {rewards.mean():.3f}, KL {kl:.2f} nats")
    for k in range(4):
        log_probs = score(network, latents).requires_grad_()
        assert k > 0 or log_probs.equal(log_probs_old)  # the on-policy check
        loss = prdp_loss(log_probs, log_probs_old, log_probs_ref, rewards, CLIP_RANGE, KL_WEIGHT)
        grad = torch.autograd.grad(loss, log_probs)[0].view(N * B, T)
        for part in grad.nonzero().split(MICROBATCH):  # the exact gradient, in little memory
            (grad[part[:, 0], part[:, 1]] * log_prob(network, latents, part)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
after = ode_rewards(network)
print(f"the ODE's samples: {before.mean():.3f} -> {after.mean():.3f}")
