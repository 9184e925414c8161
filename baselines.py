"""What the paper and its seeds compare PRDP with, and DDPO's reward statistics.

Every function of LOSSES is pure and has the arguments of `prdp.prdp_loss`, used or not: log-probs
(..., B, T) under the policy, under the policy that sampled and under the reference, rewards
(..., B), clip range and weight; a scalar out. So the training loop need not know which it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def ddpo_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """DDPO_IS (Black et al. 2024, Apps. C.3 and F.1): PPO's clipped surrogate, a step an action.

    `rewards` are those of `RewardStatistics.advantages`; clip_range is the importance weight's
    (App. F.6: 1e-4). There is no KL term.
    """
    ratio = torch.exp(log_probs - log_probs_old)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = rewards.to(log_probs.dtype).unsqueeze(-1)  # (..., B, 1)
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()


def ddpo_sf_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """DDPO_SF, the score function estimator (Black et al. 2024, App. C.3): REINFORCE.

    It holds for one update an epoch, the on-policy one.
    """
    return -(log_probs * rewards.to(log_probs.dtype).unsqueeze(-1)).mean()


def rwr_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """Reward-weighted regression (Black et al. 2024, Apps. C.2, F.3): weights exp(r / kl_weight).

    The weights are normalised per prompt; App. F.6's inverse temperature 0.2 is kl_weight 5. Theirs
    weights the denoising loss, a bound on the likelihood of x_0; this weights the exact
    log-likelihood of the sampled trajectory.
    """
    weights = torch.softmax(rewards.to(log_probs.dtype) / kl_weight, dim=-1)  # (..., B)
    return -(weights * log_probs.mean(-1)).sum(-1).mean()


def rwr_sparse_loss(
    log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight
) -> Tensor:
    """The same with binary weights: a prompt's images from the 0.9 quantile of their rewards up.

    Black et al. 2024, Apps. F.3 and F.6.
    """
    best = rewards >= rewards.quantile(0.9, dim=-1, keepdim=True)  # (..., B)
    best = best.to(log_probs.dtype)
    return -(best * log_probs.mean(-1)).sum(-1).div(best.sum(-1)).mean()


def dpo_loss(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight) -> Tensor:
    """Diffusion-DPO (Wallace et al. 2024, Eqs. 8 and 11) on the sampled trajectories themselves.

    Its pairs are all those of a prompt whose rewards differ, ranked by them (Sec. 5.4). kl_weight:
    logits per nat per latent dimension.
    """
    log_ratio = (log_probs - log_probs_ref).mean(-1)  # (..., B)
    return preference_loss(kl_weight * log_ratio, rewards)


def preference_loss(logits: Tensor, rewards: Tensor) -> Tensor:
    """Mean of -log sigmoid(winner's logit - loser's) over a prompt's untied pairs: (..., B) twice.

    The mean over prompts of that; a prompt whose rewards all tie contributes 0.
    """
    logit_diff = logits.unsqueeze(-1) - logits.unsqueeze(-2)  # (..., B, B)
    wins = rewards.unsqueeze(-1) > rewards.unsqueeze(-2)
    loss = torch.where(wins, -logsigmoid(logit_diff), 0.0)
    return (loss.sum((-2, -1)) / wins.sum((-2, -1)).clamp(min=1)).mean()


LOSSES = {
    "ddpo": ddpo_loss,
    "ddpo-sf": ddpo_sf_loss,
    "rwr": rwr_loss,
    "rwr-sparse": rwr_sparse_loss,
    "dpo": dpo_loss,
}


def misfit(config) -> str | None:
    """Why a run's settings do not go with its loss, or None."""
    ddpo = config.loss.startswith("ddpo")
    if config.images_per_prompt == 1 and not ddpo:
        return "compares images of a prompt; --images-per-prompt must be 2 or more"
    if config.loss == "ddpo-sf" and config.updates_per_epoch > 1:
        return "needs --updates-per-epoch 1"
    if ddpo and config.offline:
        return "learns from its own images, so not --offline"
    return None


class RewardStatistics:
    """DDPO's normalised rewards (Black et al. 2024, App. F.3): minus a mean, over a deviation.

    kind "global": of this epoch's rewards. "per-prompt": of the prompt's last 32 rewards, this
    epoch's included; while they are fewer than 16, as in DDPO's code, of the epoch's.
    `latest` holds those by prompt; it is what a checkpoint has to keep.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.latest: dict[str, list[float]] = {}

    def advantages(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N*B,) of B images for each of N prompts -> advantages (N*B,)."""
        rows = rewards.unflatten(0, (len(prompts), -1))  # (N, B)
        for prompt, row in zip(prompts, rows.tolist(), strict=True):
            self.latest[prompt] = (self.latest.get(prompt, []) + row)[-32:]
        advantages = []
        for prompt, row in zip(prompts, rows, strict=True):
            seen = rewards
            if self.kind == "per-prompt" and len(self.latest[prompt]) >= 16:
                seen = torch.tensor(self.latest[prompt], device=row.device)
            advantages.append((row - seen.mean()) / (seen.std(correction=0) + 1e-6))
        return torch.cat(advantages)
