"""DDPO: denoising diffusion policy optimization (Black et al., ICLR 2024).

    python baselines/ddpo.py --preset toy --out runs/toy-ddpo
    python baselines/ddpo.py --reward hpsv2 --prompts prompts/animals.txt --out runs/hps-ddpo
    python baselines/ddpo.py --resume runs/hps-ddpo

Read it beside their Sec. 4.3 and Apps. C.3, F.1 and F.3. Sampling, scoring, gradient, rewards and
the run's folder are prdp.py's. Their settings where they are not Table 4's: K = 4 minibatches an
epoch, each image in one, clip range 1e-4; at large scale one image for each of 512 prompts (PRDP,
App. B). There is no KL term.

Paper   Here
ratio of Eq. 4's importance sampling, clipped as PPO's   ratio, clip_range
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prdp
from support.cli import InputError, flag
from support.distributed import gather, gradient_step, own_share
from support.report import epoch_metrics, phase
from support.settings import run_command

MINIBATCHES = dict(updates_per_epoch=4, clip_range=1e-4)
MANY = dict(prompts_per_epoch=512, images_per_prompt=1, learning_rate=1e-5)


@dataclass
class Config(prdp.Config):
    """prdp.py's settings, and DDPO's own."""

    program: ClassVar = "baselines/ddpo.py"
    presets: ClassVar = {
        name: settings | MINIBATCHES | (MANY if name in ("large", "multi") else {})
        for name, settings in prdp.PRESETS.items()
    }
    unused: ClassVar = ("kl_weight", "offline")
    loss: str = flag("ddpo", "DDPO_IS, or the score function's DDPO_SF", "ddpo", "ddpo-sf",
                     group="DDPO")  # fmt: skip
    advantage: str = flag("per-prompt", "whose mean rewards are held against: the prompt's last "
                          "32, all of the epoch's, or those of the prompt's images of this epoch, "
                          "as GRPO", "per-prompt", "global", "group")  # fmt: skip

    def check(self) -> None:
        images = self.prompts_per_epoch * self.images_per_prompt
        if self.loss == "ddpo" and images % self.updates_per_epoch:
            raise InputError(f"--updates-per-epoch: must divide the {images} images of an epoch.")
        if self.loss == "ddpo-sf" and self.updates_per_epoch > 1:
            raise InputError("--loss ddpo-sf: is on-policy, and needs --updates-per-epoch 1.")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise InputError("--advantage group: needs --images-per-prompt 2 or more.")

    def passes(self) -> int:
        """As prdp.py counts them: an image is learned from once an epoch, and so costs 3 there."""
        return 1 + self.updates_per_epoch + 3


def ddpo_loss(
    log_probs: Tensor,  # (..., T), under pi_theta
    log_probs_old: Tensor,  # (..., T), under pi_theta_old, which drew the trajectories
    advantages: Tensor,  # (...)
    clip_range: float,  # of the importance weight
) -> Tensor:
    """DDPO_IS (Apps. C.3 and F.1): PPO's clipped surrogate, each denoising step an action."""
    ratio = torch.exp(log_probs - log_probs_old)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = advantages.to(log_probs.dtype).unsqueeze(-1)  # (..., 1)
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()


def ddpo_sf_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """DDPO_SF (App. C.3), REINFORCE: log_probs (..., T), advantages (...). It holds for the
    on-policy update alone."""
    return -(log_probs * advantages.to(log_probs.dtype).unsqueeze(-1)).mean()


class RewardStatistics:
    """Rewards normalised (App. F.3): minus a mean, over a deviation, and no larger than 10.

    "global": of this epoch's rewards; "per-prompt": of the prompt's last 32, this epoch's included
    (while they are fewer than 16, as in DDPO's code, of the epoch's); "group": of the prompt's B.
    `latest` holds the last rewards by prompt: what a checkpoint has to keep.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.latest: dict[str, list[float]] = {}

    def state_dict(self) -> dict:
        return {"latest": self.latest}

    def load_state_dict(self, state: dict) -> None:
        self.latest = state["latest"]

    def advantages(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N*B,) of B images for each of N prompts -> (N*B,)."""
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


def minibatch(config: Config, epoch: int, k: int, advantages: Tensor) -> Tensor:
    """The advantages (N*B,) that update k learns from: the k-th of K random minibatches.

    The others get 0, which is no gradient in a mean over all; the factor K makes it the mean over
    the minibatch.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(advantages), generator=generator)
    rows = order.chunk(config.updates_per_epoch)[k].to(advantages.device)
    part = config.updates_per_epoch * advantages[rows]
    return torch.zeros_like(advantages).index_copy(0, rows, part)


def train(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, prompts: list[str],
    start: int, statistics: RewardStatistics,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """DDPO from epoch `start` on; yields each epoch's metrics."""
    policy, reference, numel = models.policy, models.reference, math.prod(models.sd.latent_shape)
    for epoch in range(start, config.epochs + 1):
        drawn, trajectories = prdp.sample_epoch(config, models, policy, prompts, epoch)
        _, rewards = prdp.score_images(models, trajectories, drawn)
        of_all = prdp.draw_prompts(config, prompts, epoch)
        advantages = statistics.advantages(gather(rewards), of_all)
        log_probs_old = trajectories.log_probs
        with models.sd.in_use(reference.unet):  # for the metrics alone
            log_probs_ref = prdp.score_trajectories(reference, trajectories, "reference")

        updates = []
        for k in range(config.updates_per_epoch):
            log_probs = (
                prdp.score_trajectories(policy, trajectories) if k else log_probs_old.clone()
            )
            log_probs.requires_grad_()
            part = minibatch(config, epoch, k, advantages)
            part = part[own_share(len(part))].to(rewards.device)
            loss = ddpo_loss(log_probs, log_probs_old, part, config.clip_range)
            if config.loss == "ddpo-sf":
                loss = ddpo_sf_loss(log_probs, part)
            (weights,) = torch.autograd.grad(loss, log_probs)

            backward = functools.partial(prdp.backward_trajectories, policy, trajectories)
            with phase("update"):
                options = (config.max_grad_norm, policy.autocast, numel)
                norm = gradient_step(optimizer, backward, weights, *options)
            moved = (log_probs.detach() - log_probs_old).abs()
            updates.append({
                "loss": loss.detach(), "clip_fraction": moved > config.clip_range,
                "skipped_fraction": weights == 0, "log_ratio_old": moved, "grad_norm": norm,
            })  # fmt: skip

        ratio = log_probs_old - log_probs_ref
        others = {"log_ratio_ref": ratio, "kl_nats": ratio * (config.ddpm_steps * numel)}
        del trajectories, backward  # and their memory, before others are drawn
        yield epoch_metrics(rewards, models.reward.parts, updates, **others)


def run(config: Config) -> None:
    statistics = RewardStatistics(config.advantage)
    prdp.run(config, train=functools.partial(train, statistics=statistics), state=statistics)


if __name__ == "__main__":
    run_command(Config, run)
