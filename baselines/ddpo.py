"""DDPO: denoising diffusion policy optimization (Black et al. 2023).

    python baselines/ddpo.py --preset toy --out runs/toy-ddpo
    python baselines/ddpo.py --reward hpsv2 --prompts prompts/animals.txt --out runs/hps-ddpo

Read it beside Apps. C.3, F.1 and F.3 of its ICML-workshop edition. Its settings where they are not
PRDP's Table 4: K = 4 minibatches an epoch, each image in one, clip range 1e-4; at large scale one
image for each of 512 prompts (PRDP, App. B). There is no KL term.

Paper                       Here
the importance weight       ratio, of theta to theta_old, which drew the minibatch
its clipping, as PPO's      clip_range
normalised rewards          advantages
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
from support.distributed import gather, gradient_step, own_share, processes
from support.report import epoch_metrics, phase
from support.settings import run_command

MINIBATCHES = dict(updates_per_epoch=4, clip_range=1e-4)
MANY = dict(prompts_per_epoch=512, images_per_prompt=1, learning_rate=1e-5)
OF_PRESET = dict(large=MANY, multi=MANY, toy=dict(epochs=100, clip_range=1e-3, learning_rate=6e-4))


@dataclass
class Config(prdp.Config):
    """prdp.py's settings, and DDPO's own."""

    program: ClassVar = "baselines/ddpo.py"
    presets: ClassVar = {
        name: settings | MINIBATCHES | OF_PRESET.get(name, {})
        for name, settings in prdp.PRESETS.items()
    }
    unused: ClassVar = ("kl_weight", "offline")
    least: ClassVar = {}
    loss: str = flag("ddpo", "DDPO_IS, or the score function's DDPO_SF", "ddpo", "ddpo-sf",
                     group="DDPO")  # fmt: skip
    advantage: str = flag("per-prompt", "whose mean rewards are held against: the prompt's last "
                          "32, all of the epoch's, or those of the prompt's images of this epoch, "
                          "as GRPO", "per-prompt", "global", "group")  # fmt: skip
    measure_kl: bool = flag(False, "also measure the KL to the pretrained model: one more pass")

    def check(self) -> None:
        images = self.prompts_per_epoch * self.images_per_prompt
        if self.loss == "ddpo" and images % self.updates_per_epoch:
            raise InputError(f"--updates-per-epoch: must divide the {images} images of an epoch.")
        if self.loss == "ddpo-sf" and self.updates_per_epoch > 1:
            raise InputError("--loss ddpo-sf: is on-policy, and needs --updates-per-epoch 1.")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise InputError("--advantage group: needs --images-per-prompt 2 or more.")

    def passes(self) -> tuple[float, float]:
        """As prdp.py's: an image is learned from once, and scored before unless update 1 does."""
        return 1 + (1 - 1 / self.updates_per_epoch) + self.measure_kl, 1


METRICS = ("loss", "log_ratio_old", "clip_fraction", "skipped_fraction")


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
    """DDPO_SF (App. C.3), REINFORCE, for the on-policy update alone: (..., T) and (...)."""
    return -(log_probs * advantages.to(log_probs.dtype).unsqueeze(-1)).mean()


class RewardStatistics:
    """Rewards normalised (App. F.3): minus a mean, over a deviation, within 10 of 0 (their code).

    "global": of this epoch's rewards; "per-prompt": of the prompt's last 32, this epoch's included
    (while they are fewer than 16, of the epoch's); "group": of the prompt's B.
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
        rewards = rewards.double()  # so that of equal ones the deviation is 0
        rows = rewards.unflatten(0, (len(prompts), -1))  # (N, B)
        if self.kind == "per-prompt":
            for prompt, row in zip(prompts, rows.tolist(), strict=True):
                self.latest[prompt] = (self.latest.get(prompt, []) + row)[-32:]
        advantages = []
        for prompt, row in zip(prompts, rows, strict=True):
            seen = row if self.kind == "group" else rewards
            if len(self.latest.get(prompt, [])) >= 16:
                seen = row.new_tensor(self.latest[prompt])
            advantages.append((row - seen.mean()) / (seen.std(correction=0) + 1e-6))
        return torch.cat(advantages).clamp(-10, 10)


def minibatches(config: Config, epoch: int) -> list[list[int]]:
    """This process's images, by place, in each of the epoch's K random minibatches: each in one."""
    images = config.prompts_per_epoch * config.images_per_prompt
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(images, generator=generator)
    own = range(images)[own_share(images)]
    parts = order.chunk(config.updates_per_epoch)
    return [[place - own.start for place in part.tolist() if place in own] for part in parts]


def update(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer,
    batch: prdp.Trajectories | None, advantages: Tensor, first: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Learn from a minibatch, of which this process has these images, or none; at the first update
    of an epoch theta is theta_old. Means are over the minibatch of all processes."""
    entries = config.prompts_per_epoch * config.images_per_prompt * config.ddpm_steps
    entries = entries / config.updates_per_epoch / processes()  # if all had as many
    metrics = dict.fromkeys(METRICS, torch.zeros((), device=models.sd.device))
    weights, backward = torch.zeros(0), lambda weights: None
    if batch is not None:
        old, policy = batch.log_probs, models.policy
        log_probs = old.clone() if first else prdp.score_trajectories(policy, batch)
        log_probs.requires_grad_()
        share = log_probs.numel() / entries
        loss = share * ddpo_loss(log_probs, old, advantages, config.clip_range)
        if config.loss == "ddpo-sf":
            loss = share * ddpo_sf_loss(log_probs, advantages)
        (weights,) = torch.autograd.grad(loss, log_probs)
        backward = functools.partial(prdp.backward_trajectories, policy, batch)
        moved = (log_probs.detach() - old).abs()
        clips = torch.expm1(log_probs.detach() - old).abs() > config.clip_range
        measured = (loss.detach(), moved, clips, weights == 0)
        for name, x in zip(METRICS, measured, strict=True):
            metrics[name] = x if name == "loss" else share * x.double().mean()

    with phase("update"):
        options = (config.max_grad_norm, models.policy.autocast, math.prod(models.sd.latent_shape))
        norm = gradient_step(optimizer, backward, weights, *options)
    return metrics | {"grad_norm": norm}


def train(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, prompts: list[str],
    start: int, statistics: RewardStatistics,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """DDPO from epoch `start` on; yields each epoch's metrics."""
    policy, count = models.policy, config.images_per_prompt
    for epoch in range(start, config.epochs + 1):
        drawn = prdp.draw_prompts(config, prompts, epoch)
        own = own_share(len(drawn))
        texts = [prompt for prompt in drawn[own] for _ in range(count)]
        noise = prdp.image_generators(config.seed, epoch, range(len(drawn))[own], count)

        # Each minibatch is drawn by itself, so that it is scored in the same microbatches.
        parts, batches = minibatches(config, epoch), []
        for part in parts:
            batch = None
            if part:
                of_part = [texts[n] for n in part], [noise[n] for n in part]
                batch = prdp.sample_prompts(models, policy, *of_part)
            batches.append(batch)
        order = [n for part in parts for n in part]
        x_0 = torch.cat([batch.latents[:, -1] for batch in batches if batch])
        _, scores = prdp.score_images(models, x_0, [texts[n] for n in order])
        rewards = torch.empty_like(scores)
        rewards[order] = scores
        advantages = statistics.advantages(gather(rewards), drawn)[own_share(count * len(drawn))]

        updates = []
        for part, batch in zip(parts, batches, strict=True):
            first = not updates
            updates.append(update(config, models, optimizer, batch, advantages[part], first))
        others = {}
        if config.measure_kl:
            others = measure_kl(models, [batch for batch in batches if batch])
        del batch, batches, x_0  # and their memory, before others are drawn
        yield epoch_metrics(rewards, models.reward.parts, updates, **others)


def measure_kl(models: prdp.Models, batches: list[prdp.Trajectories]) -> dict[str, Tensor]:
    """Of theta_old to the pretrained model, a step's mean and a trajectory's sum, as prdp.py's."""
    reference, ratios = models.reference, []
    with models.sd.in_use(reference.unet):
        for batch in batches:
            ratios.append(batch.log_probs - prdp.score_trajectories(reference, batch, "reference"))
    ratio = torch.cat(ratios)
    numel = ratio.shape[1] * math.prod(models.sd.latent_shape)
    return {"log_ratio_ref": ratio, "kl_nats": ratio * numel}


def run(config: Config, reward=None, prompts=None) -> None:
    kept = RewardStatistics(config.advantage)
    prdp.run(config, reward, prompts, train=functools.partial(train, statistics=kept), state=kept)


main = functools.partial(run_command, Config, run)

if __name__ == "__main__":
    main()
