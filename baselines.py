"""What the paper, DDPO's authors and Diffusion-DPO's compare; and DDPO's reward statistics.

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


def diffusion_dpo_loss(
    errors: Tensor, errors_ref: Tensor, rewards: Tensor, kl_weight: float
) -> Tensor:
    """Diffusion-DPO's own objective (Wallace et al. 2024, Eq. 14), on all pairs of a prompt whose
    rewards differ (Sec. 5.4): a scalar.

    errors, errors_ref (..., B): squared errors of the noise predicted by policy and reference, mean
    over latent dimensions, at one random timestep that the B images share. kl_weight is its
    beta * T * omega. It needs x_0 alone and no trajectory, so it is none of LOSSES.
    """
    return preference_loss(-kl_weight * (errors - errors_ref), rewards)


LOSSES = {
    "ddpo": ddpo_loss,
    "ddpo-sf": ddpo_sf_loss,
    "rwr": rwr_loss,
    "rwr-sparse": rwr_sparse_loss,
    "dpo": dpo_loss,
}


def settings(loss: str, preset: str) -> dict:
    """What `ddpo` brings with it, where its authors' settings are not Table 4's; others keep those.

    DDPO: 4 minibatches an epoch, each image in one (App. F.1), clip range 1e-4; at large scale one
    image for each of 512 prompts, whose statistics cannot be the prompt's own (PRDP, App. B).
    """
    if loss != "ddpo":
        return {}
    values = {"updates_per_epoch": 4, "clip_range": 1e-4}
    if preset in ("large", "multi"):
        values |= {"prompts_per_epoch": 512, "images_per_prompt": 1, "learning_rate": 1e-5}
    return values


def misfit(config) -> str | None:
    """Why a run's settings do not go with its loss, or None."""
    images = config.prompts_per_epoch * config.images_per_prompt
    ddpo = config.loss.startswith("ddpo")
    if config.images_per_prompt == 1 and (not ddpo or config.advantage == "group"):
        return "compares images of a prompt; --images-per-prompt must be 2 or more"
    if config.loss == "ddpo" and images % config.updates_per_epoch:
        return f"--updates-per-epoch must divide the {images} images, to use each in one minibatch"
    if config.loss == "ddpo-sf" and config.updates_per_epoch > 1:
        return "needs --updates-per-epoch 1"
    if ddpo and config.offline:
        return "learns from its own images, so not --offline"
    return None


def passes(config) -> int:
    """How many an epoch makes of an image: drawn, scored under the reference and before each update
    but the first, and a pass with its gradient, which costs three, for each update it is in."""
    in_updates = 1 if config.loss == "ddpo" else config.updates_per_epoch
    return 1 + config.updates_per_epoch + 3 * in_updates


def minibatch(config, epoch: int, k: int, targets: Tensor) -> Tensor:
    """What update k learns from, of targets (N*B,): all; for DDPO the k-th of K random minibatches.

    The others get 0, which is no gradient in DDPO's loss, a mean over all; the factor K makes it
    the mean over the minibatch.
    """
    if config.loss != "ddpo":
        return targets
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(targets), generator=generator)
    rows = order.chunk(config.updates_per_epoch)[k].to(targets.device)
    return torch.zeros_like(targets).index_copy(0, rows, config.updates_per_epoch * targets[rows])


class RewardStatistics:
    """What a loss is given for rewards: for DDPO, normalised (Black et al. 2024, App. F.3).

    kind "none": the rewards. Else minus a mean, over a deviation, and no larger than 10: "global",
    of this epoch's rewards; "per-prompt", of the prompt's last 32, this epoch's included (while
    they are fewer than 16, as in DDPO's code, of the epoch's); "group", of the prompt's B, as GRPO
    does. `latest` holds the last rewards by prompt: what a checkpoint has to keep.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.latest: dict[str, list[float]] = {}

    def targets(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N*B,) of B images for each of N prompts -> (N*B,)."""
        if self.kind == "none":
            return rewards
        rows = rewards.unflatten(0, (len(prompts), -1))  # (N, B)
        if self.kind == "per-prompt":
            for prompt, row in zip(prompts, rows.tolist(), strict=True):
                self.latest[prompt] = (self.latest.get(prompt, []) + row)[-32:]
        advantages = []
        for prompt, row in zip(prompts, rows, strict=True):
            seen = row if self.kind == "group" else rewards
            if len(self.latest.get(prompt, [])) >= 16:
                seen = torch.tensor(self.latest[prompt], device=row.device)
            advantages.append((row - seen.mean()) / (seen.std(correction=0) + 1e-6))
        return torch.cat(advantages).clamp(-10, 10)
