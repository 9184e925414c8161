"""DDPO: denoising diffusion policy optimization (Black et al. 2023).

    python baselines/ddpo.py --preset toy --out runs/toy-ddpo
    python baselines/ddpo.py --reward hpsv2 --prompts prompts/animals.txt --out runs/hps-ddpo

Read it beside Apps. C.3, F.1 and F.3 of its ICML-workshop edition. Its settings where they are not
PRDP's Table 4: K = 4 minibatches an epoch, each image in one, clip range 1e-4; at large scale one
image for each of 512 prompts (PRDP, App. B). There is no KL term.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prdp
from support.cli import UserError, flag
from support.distributed import average_gradients, gather, processes, require_finite, shard
from support.report import epoch_metrics
from support.settings import parse_settings, run_command

SMALL = dict(updates_per_epoch=4, clip_range=1e-4)
LARGE = dict(SMALL, prompts_per_epoch=512, images_per_prompt=1, learning_rate=1e-5)
PRESETS = {
    "small": prdp.PRESETS["small"] | SMALL,
    "large": prdp.PRESETS["large"] | LARGE,
    "multi": prdp.PRESETS["multi"] | LARGE,
    "toy": prdp.PRESETS["toy"] | dict(SMALL, epochs=100, clip_range=1e-3, learning_rate=6e-4),
}


@dataclass
class Config(prdp.Config):
    """prdp.py's settings, and DDPO's own."""

    program = "baselines/ddpo.py"
    images_per_prompt: int = flag(16, "B")
    clip_range: float = flag(1e-4, "of the importance weight, as PPO's; inf: none")
    kl_weight: float = flag(0.0, least=0)
    offline: bool = flag(False)
    loss: str = flag("ddpo", "DDPO_IS or DDPO_SF (App. C.3)", "ddpo", "ddpo-sf", group="DDPO")
    advantage: str = flag("per-prompt", "rewards to normalise by: the prompt's last 32; all of the "
                          "epoch's; the prompt's of this epoch alone, as GRPO",
                          "per-prompt", "global", "group")  # fmt: skip
    measure_kl: bool = flag(False, "also measure the KL to the pretrained model: one more pass")

    def check(self) -> None:
        images = self.prompts_per_epoch * self.images_per_prompt
        if self.loss == "ddpo" and images % self.updates_per_epoch:
            raise UserError(f"--updates-per-epoch: must divide the {images} images of an epoch.")
        if self.loss == "ddpo-sf" and self.updates_per_epoch > 1:
            raise UserError("--loss ddpo-sf: is on-policy, and needs --updates-per-epoch 1.")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise UserError("--advantage group: needs --images-per-prompt 2 or more.")

    def passes(self) -> tuple[float, float]:
        """As prdp.py's: an image is learned from once, and scored before unless update 1 does."""
        return 1 + (1 - 1 / self.updates_per_epoch) + self.measure_kl, 1


def ddpo_loss(
    log_probs: Tensor,  # (..., T), under pi_theta
    log_probs_old: Tensor,  # (..., T), under pi_theta_old, which drew the trajectories
    advantages: Tensor,  # (...)
    clip_range: float,  # of the importance weight
) -> Tensor:
    """DDPO_IS (Apps. C.3 and F.1): PPO's clipped surrogate, each denoising step an action."""
    ratio = torch.exp(log_probs - log_probs_old)  # the importance weight
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = advantages.to(log_probs.dtype).unsqueeze(-1)  # (..., 1)
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()


def ddpo_sf_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """DDPO_SF (App. C.3), REINFORCE, for the on-policy update alone: (..., T) and (...)."""
    return -(log_probs * advantages.to(log_probs.dtype).unsqueeze(-1)).mean()


class RewardStatistics:
    """Rewards normalised (App. F.3): minus a mean, over a deviation, within 10 of 0 (their code).

    "global": of the epoch; "per-prompt": of the prompt's last 32, this epoch's too (while fewer
    than 16, of the epoch); "group": of its B. A checkpoint keeps `latest`, each prompt's last."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.latest: dict[str, list[float]] = {}

    def state_dict(self) -> dict:
        return {"latest": self.latest}

    def load_state_dict(self, state: dict) -> None:
        self.latest = state["latest"]

    def advantages(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N*B,) of B images for each of N prompts -> (N*B,)."""
        rewards = rewards.double()
        rows = rewards.unflatten(0, (len(prompts), -1))  # (N, B)
        if self.kind == "per-prompt":
            for prompt, row in zip(prompts, rows.tolist(), strict=True):
                self.latest[prompt] = (self.latest.get(prompt, []) + row)[-32:]
        advantages = []
        for prompt, row in zip(prompts, rows, strict=True):
            seen = row if self.kind == "group" else rewards
            if len(self.latest.get(prompt, [])) >= 16:
                seen = row.new_tensor(self.latest[prompt])
            unequal = seen.min() < seen.max()  # the mean of equal ones may be rounded
            advantages.append(unequal * (row - seen.mean()) / (seen.std(correction=0) + 1e-6))
        return torch.cat(advantages).clamp(-10, 10)


def minibatches(config: Config, epoch: int) -> list[list[int]]:
    """This process's images, by place, in each of the epoch's K random minibatches: each in one."""
    images = config.prompts_per_epoch * config.images_per_prompt
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    parts = torch.randperm(images, generator=generator).chunk(config.updates_per_epoch)
    own = range(images)[shard(images)]
    return [[place - own.start for place in part.tolist() if place in own] for part in parts]


def train(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, prompts: list[str],
    start: int, statistics: RewardStatistics,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """DDPO from epoch `start` on; yields each epoch's metrics."""
    for epoch in range(start, config.epochs + 1):
        epoch_prompts = prdp.draw_prompts(config, prompts, epoch)
        own = shard(len(epoch_prompts))
        repeated = [p for p in epoch_prompts[own] for _ in range(config.images_per_prompt)]
        numbers = range(len(epoch_prompts))[own]
        generators = prdp.image_generators(config.seed, epoch, numbers, config.images_per_prompt)

        # Each minibatch is drawn by itself, so that it is scored in the same microbatches.
        parts = minibatches(config, epoch)
        batches = []
        for part in parts:
            texts = [repeated[n] for n in part]
            noise = [generators[n] for n in part]
            batch = prdp.sample_prompts(models, models.policy, texts, noise) if part else None
            batches.append(batch)

        # Rewards of all, put back into their order, and normalised.
        drawn = [batch for batch in batches if batch]
        x_0 = torch.cat([batch.latents[:, -1] for batch in drawn])
        order = [n for part in parts for n in part]
        _, scores, reward_parts = prdp.score_images(models, x_0, [repeated[n] for n in order])
        rewards = torch.empty_like(scores)
        rewards[order] = scores
        advantages = statistics.advantages(gather(rewards), epoch_prompts)
        advantages = advantages[shard(len(advantages))]

        updates = []
        for k, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            updates.append(update(config, models, optimizer, batch, advantages[part], k == 0))

        kl = {}  # of theta_old to the pretrained model: a step's mean, and a trajectory's sum
        if config.measure_kl:
            reference = models.reference
            log_probs_ref = [prdp.score_trajectories(reference, b, "reference") for b in drawn]
            ratio = torch.cat([batch.log_probs for batch in drawn]) - torch.cat(log_probs_ref)
            kl = {"log_ratio_ref": ratio, "kl_nats": ratio * drawn[0].latents[0, 1:].numel()}
        del batch, batches, drawn, x_0  # and gradients: their memory, before others are drawn
        optimizer.zero_grad()
        yield epoch_metrics(rewards, reward_parts, updates, **kl)


def update(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer,
    batch: prdp.Trajectories | None, advantages: Tensor, first: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """A gradient step on a minibatch, of which `batch` is this process's share, if it has one; at
    an epoch's first update theta is theta_old. Means are over the minibatch of all processes."""
    parameters = optimizer.param_groups[0]["params"]
    names = ("loss", "log_ratio_old", "clip_fraction", "skipped_fraction")
    metrics = dict.fromkeys(names, torch.zeros((), device=models.sd.device))
    optimizer.zero_grad()
    if batch is not None:
        log_probs_old = batch.log_probs
        log_probs = log_probs_old.clone()
        if not first:
            log_probs = prdp.score_trajectories(models.policy, batch)
        log_probs.requires_grad_()

        # A process's share of the minibatch may be more or less than that of another.
        entries = config.prompts_per_epoch * config.images_per_prompt * config.ddpm_steps
        share = log_probs.numel() / (entries / config.updates_per_epoch / processes())
        loss = share * ddpo_loss(log_probs, log_probs_old, advantages, config.clip_range)
        if config.loss == "ddpo-sf":
            loss = share * ddpo_sf_loss(log_probs, advantages)
        (grad_log_probs,) = torch.autograd.grad(loss, log_probs)
        prdp.backward_trajectories(models.policy, batch, grad_log_probs)

        moved = log_probs.detach() - log_probs_old
        clipped = torch.expm1(moved).abs() > config.clip_range
        metrics["loss"] = loss.detach()
        metrics["log_ratio_old"] = share * moved.abs().mean()
        metrics["clip_fraction"] = share * clipped.double().mean()
        metrics["skipped_fraction"] = share * (grad_log_probs == 0).double().mean()

    average_gradients(parameters)
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    require_finite("the gradient", grad_norm)
    optimizer.step()
    return metrics | {"grad_norm": grad_norm}


def run(config: Config, reward=None, prompts=None) -> None:
    statistics = RewardStatistics(config.advantage)
    learn = functools.partial(train, statistics=statistics)
    prdp.run(config, reward, prompts, train=learn, state=statistics)


def parse_args(argv: list[str] | None = None) -> Config:
    return parse_settings(Config, PRESETS, __doc__, argv)


def main(argv: list[str] | None = None) -> None:
    run_command(Config.program, parse_args, run, argv)


if __name__ == "__main__":
    main()
