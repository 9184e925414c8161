"""Diffusion-DPO: direct preference optimization of diffusion models (Wallace et al., CVPR 2024).

    python baselines/diffusion_dpo.py --preset toy --out runs/toy-dpo
    python baselines/diffusion_dpo.py --reward hpsv2 --prompts prompts/animals.txt --out runs/dpo
    python baselines/diffusion_dpo.py --pairs pairs.jsonl --out runs/people

Read it beside their Eq. 14 and Secs. 5.1 and 5.4. With --pairs it learns people's choices: a line a
pair, of `prompt`, `chosen` and `rejected`, two pictures' paths from the file's folder. Else AI
feedback: images of the pretrained model (--online: of the current one) ranked by --reward, all
pairs of a prompt. An epoch is K updates of --batch-size pairs; a pair shares timestep and noise.

Paper                    Here
||eps - eps_theta||^2    error, without guidance; a mean over latent dimensions, as in their code
beta T omega             beta / 2, as in their code
eps^w, eps^l             one draw, which a pair shares, as in their code
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prdp
from baselines.pairs import People
from baselines.rwr import batches, noised
from rewards import Reward
from support.cli import InputError, flag
from support.distributed import gather, gradient_step, processes, rank
from support.report import epoch_metrics, phase
from support.settings import absolute, run_command

PUBLISHED = dict(epochs=100, updates_per_epoch=10, learning_rate=8.192e-9)
TOY = dict(batch_size=64, updates_per_epoch=16, warmup=0)


@dataclass
class Config(prdp.Config):
    """prdp.py's settings, and Diffusion-DPO's own."""

    program: ClassVar = "baselines/diffusion_dpo.py"
    presets: ClassVar = {
        name: settings | (TOY if name == "toy" else PUBLISHED)
        for name, settings in prdp.PRESETS.items()
    }
    unused: ClassVar = ("kl_weight", "clip_range", "offline")
    least: ClassVar = {"images_per_prompt": 2, "warmup": 0}
    reward: tuple = flag((), "what ranks images (default: the preset's or hpsv2; for --pairs alone "
                         "none)")  # fmt: skip
    prompts: tuple = flag((), "files (default: the preset's or animals.txt; for --pairs alone "
                          "theirs)")  # fmt: skip
    learning_rate: float = flag(8.192e-9, "of AdamW (Sec. 5.1); their code's is 2.048e-5")
    pairs: str = flag("", "people's choices, .jsonl", group="Diffusion-DPO")
    online: bool = flag(False, "rank images of the current model, not of the pretrained one")
    beta: float = flag(5000.0, "of Eq. 14")
    batch_size: int = flag(2048, "pairs an update")
    warmup: int = flag(250, "updates until the learning rate is reached, linearly")

    def resolved(self, reward: object = None, prompts: object = None) -> Config:
        given = {"pairs": absolute(self.pairs) if self.pairs else ""}
        if not self.pairs:
            given["reward"] = self.reward or prdp.Config.reward
            given["prompts"] = self.prompts or prdp.Config.prompts
        return super(Config, replace(self, **given)).resolved(reward, prompts)

    def check(self) -> None:
        if self.pairs and self.online:
            raise InputError("--online: not with --pairs, whose pictures are given.")

    def passes(self) -> tuple[float, float]:
        """As prdp.py counts them: an image is drawn, unless pairs are given; of a pair, one step is
        scored under the reference and learned from."""
        images = self.prompts_per_epoch * self.images_per_prompt
        learned = self.updates_per_epoch * self.batch_size / (images * self.ddpm_steps)
        return (not self.pairs) + learned, learned


def diffusion_dpo_loss(error: Tensor, error_ref: Tensor, beta: float) -> Tensor:
    """Eq. 14 of each pair: (m,). error, error_ref (m, 2): of the chosen and the rejected, under
    policy and reference."""
    chosen, rejected = (error - error_ref).unbind(1)
    return -logsigmoid(-beta / 2 * (chosen - rejected))


def denoising_errors(
    policy: prdp.Policy, scheduler, x_0: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """||eps - eps_theta(x_t, t)||^2 of Eq. 14, a mean over latent dimensions: (m, 2) float64.

    x_0 (m, 2, C, H, W); both of a pair share text (m, L, D), timesteps (m,) and noise.
    """
    text, timesteps, noise = (x.repeat_interleave(2, 0) for x in (text, timesteps, noise))
    x_t, target = noised(scheduler, x_0.flatten(0, 1), timesteps, noise)
    with policy.casting(x_0.device):
        predicted = policy.unet(x_t, timesteps, encoder_hidden_states=text).sample
    return (predicted.double() - target).square().flatten(1).mean(1).unflatten(0, (-1, 2))


def ranked_pairs(rewards: Tensor, images_per_prompt: int) -> Tensor:
    """All pairs of a prompt whose rewards differ (Sec. 5.4): rewards (N*B,) -> (P, 2), the numbers
    of the chosen and the rejected image."""
    rows = rewards.view(-1, images_per_prompt)
    prompt, chosen, rejected = (rows[:, :, None] > rows[:, None, :]).nonzero().unbind(1)
    return prompt[:, None] * images_per_prompt + torch.stack([chosen, rejected], 1)


def train(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, prompts: list[str],
    start: int, people: People | None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Diffusion-DPO from epoch `start` on; yields each epoch's metrics."""
    sd, sampler = models.sd, models.policy if config.online else models.reference
    for epoch in range(start, config.epochs + 1):
        if people:
            owner, load = people.owner(), functools.partial(people.load, sd, config.seed, epoch)
            count = config.updates_per_epoch * config.batch_size // processes()
            rewards, parts = torch.full((max(1, count),), math.nan), {}
        else:
            drawn, trajectories = prdp.sample_epoch(config, models, sampler, prompts, epoch)
            x_0, text = trajectories.latents[:, -1].clone(), trajectories.text
            del trajectories
            _, rewards = prdp.score_images(models, x_0, drawn)
            parts = models.reward.parts
            pairs = ranked_pairs(gather(rewards).cpu(), config.images_per_prompt)
            owner, load = pairs[:, 0] // len(x_0), functools.partial(own_pairs, pairs, x_0, text)

        updates = []
        for k, batch in enumerate(batches(config, epoch, torch.arange(len(owner)), sd)):
            made = (epoch - 1) * config.updates_per_epoch + k + 1
            rate = config.learning_rate * min(1, made / max(1, config.warmup))
            optimizer.param_groups[0]["lr"] = rate
            updates.append(update(config, models, optimizer, owner, load, *batch))
        none = {"loss": torch.tensor(math.nan), "accuracy": torch.tensor(math.nan)}
        yield epoch_metrics(rewards, parts, updates or [none])  # if all rewards tie


def own_pairs(pairs: Tensor, x_0: Tensor, text: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Of pairs (m,), all of this process's images: x_0 (m, 2, C, H, W), the chosen first; text."""
    rows = (pairs[numbers] - rank() * len(x_0)).to(x_0.device)  # (m, 2)
    return x_0[rows], text[rows[:, 0]]


def update(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, owner: Tensor,
    load: Callable, numbers: Tensor, timesteps: Tensor, noise: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Learn from a batch of pairs, of which this process loads its own."""
    policy, reference, scheduler = models.policy, models.reference, models.sd.pipe.scheduler
    own = (owner[numbers] == rank()).nonzero()[:, 0]
    microbatches, losses = [], torch.zeros(len(own), dtype=torch.float64)
    if len(own):
        with phase("pictures"):
            x_0, text = load(numbers[own])
        drawn = (x[own].to(x_0.device) for x in (timesteps, noise))
        inputs = (torch.arange(len(own)), x_0, text, *drawn)
        microbatches = [*zip(*(x.split(policy.microbatch) for x in inputs), strict=True)]
    with torch.no_grad(), phase("reference"), models.sd.in_use(reference.unet):
        references = [denoising_errors(reference, scheduler, *x) for _, *x in microbatches]

    def backward(weights: Tensor) -> None:
        for (part, *x), error_ref in zip(microbatches, references, strict=True):
            error = denoising_errors(policy, scheduler, *x)
            loss = diffusion_dpo_loss(error, error_ref, config.beta)
            (weights[part].to(loss.device) * loss).sum().backward()
            losses[part] = loss.detach().cpu()

    with phase("update"):
        share = torch.full((len(own),), processes() / len(numbers), dtype=torch.float64)
        numel = noise[0].numel() / config.beta  # a loss is at most beta / 2 as steep as an error
        options = (config.max_grad_norm, policy.autocast, numel)
        norm = gradient_step(optimizer, backward, share, *options)
    right = losses < math.log(2)
    return {"loss": share @ losses, "accuracy": share @ right.double(), "grad_norm": norm}


class NoReward(Reward):
    """No scores, of people's choices without --reward: NaN for every image."""

    def __init__(self) -> None:
        super().__init__({})

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images),), math.nan, device=images.device)


def run(config: Config, reward=None, prompts=None) -> None:
    people = People(config.pairs) if config.pairs else None
    if people and reward is None and not config.reward:
        reward = NoReward()
    if people and prompts is None and not config.prompts:
        prompts = [record["prompt"] for record in people.records]
    learn = functools.partial(train, people=people)
    prdp.run(config, reward, prompts, train=learn, state=people)


main = functools.partial(run_command, Config, run)

if __name__ == "__main__":
    main()
