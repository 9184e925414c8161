"""prdp_loss in a trainer of its own, on 1-D Gaussian chains whose optimum is known; torch alone.

Prompt n's policy at step k is N(DECAY * x_t + theta[n, k], SIGMA[k]^2), its reward SLOPE[n] * x_0;
its images share x_T, so Eq. 7's optimum shifts each step; beta of Eq. 5 is KL_WEIGHT / T."""

import torch
from torch import Tensor

N, B, T = 3, 16, 6
DECAY, SIGMA, SLOPE = 0.9, torch.linspace(1, 0.3, T).double(), torch.tensor([1.0, -1.0, 0.5])
KL_WEIGHT, CLIP_RANGE, MICROBATCH = 6.0, 0.02, 50
EVERY = torch.ones(N * B, T).nonzero()  # (image, step)


def prdp_loss(
    log_probs: Tensor,  # (..., B, T), under pi_theta; carries the gradient
    log_probs_old: Tensor,  # (..., B, T), under pi_theta_old, which drew the trajectories
    log_probs_ref: Tensor,  # (..., B, T), under pi_ref
    rewards: Tensor,  # (..., B)
    clip_range: float,  # epsilon of Eq. 20, in the unit of log_probs; inf: Eq. 14
    kl_weight: float,  # beta
) -> Tensor:
    assert rewards.shape == log_probs.shape[:-1], rewards.shape
    log_ratio = log_probs - log_probs_ref  # Eq. 19
    log_ratio_old = log_probs_old - log_probs_ref
    clipped_log_ratio = torch.clamp(  # Eq. 20
        log_ratio, log_ratio_old - clip_range, log_ratio_old + clip_range
    )

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


def log_prob(theta: Tensor, latents: Tensor, entries: Tensor) -> Tensor:
    """Of (image, step) entries (m, 2): (m,) float64, a mean over the latent's one dimension."""
    images, steps = entries.unbind(1)
    mean = DECAY * latents[images, steps].double() + theta[images // B, steps]
    return torch.distributions.Normal(mean, SIGMA[steps]).log_prob(latents[images, steps + 1])


def sample(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (N*B, T+1) float32, and log_probs (N, B, T) of what is stored."""
    latents = torch.randn(N, 1).repeat_interleave(B, 0).repeat(1, T + 1)
    log_probs = torch.empty(N * B, T).double()
    for k in range(T):
        mean = DECAY * latents[:, k].double() + theta[:, k].repeat_interleave(B)
        latents[:, k + 1] = mean + SIGMA[k] * torch.randn(N * B)
        log_probs[:, k] = log_prob(theta, latents, EVERY[EVERY[:, 1] == k])
    return latents, log_probs.view(N, B, T)


torch.manual_seed(0)
theta = torch.zeros(N, T).double().requires_grad_()
optimizer = torch.optim.Adam([theta], lr=0.02)
for epoch in range(80):
    latents, log_probs_old = sample(theta.detach())
    log_probs_ref = log_prob(torch.zeros_like(theta), latents, EVERY).view(N, B, T)
    rewards = (SLOPE.repeat_interleave(B) * latents[:, -1]).view(N, B)
    for k in range(4):
        log_probs = log_prob(theta.detach(), latents, EVERY).view(N, B, T).requires_grad_()
        assert k > 0 or log_probs.equal(log_probs_old)  # the on-policy check
        if (epoch, k) == (0, 1):
            outside = ((log_probs - log_probs_old).abs() > CLIP_RANGE).double().mean()
        loss = prdp_loss(log_probs, log_probs_old, log_probs_ref, rewards, CLIP_RANGE, KL_WEIGHT)
        grad = torch.autograd.grad(loss, log_probs)[0].flatten()
        for part in grad.nonzero()[:, 0].split(MICROBATCH):  # the exact gradient, in little memory
            (grad[part] * log_prob(theta, latents, EVERY[part])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

optimum = SLOPE[:, None] * T / KL_WEIGHT * SIGMA**2 * DECAY ** torch.arange(T - 1, -1, -1)
print("reached, optimum:", torch.stack([theta.detach(), optimum], 1), sep="\n")
print("outside the clip range after the first update:", outside.item())
spread = [rewards.std(1) / KL_WEIGHT, (log_probs_old - log_probs_ref).mean(-1).std(1)]
print("log-ratios' deviation, allowed and taken:", torch.stack(spread), sep="\n")
