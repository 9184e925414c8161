"""Diffusion-DPO: direct preference optimization of diffusion models (Wallace et al., CVPR 2024).

    python baselines/diffusion_dpo.py --preset toy --out runs/toy-dpo
    python baselines/diffusion_dpo.py --reward hpsv2 --prompts prompts/animals.txt --out runs/dpo
    python baselines/diffusion_dpo.py --pairs pairs.jsonl --out runs/people

Read it beside their Eq. 14 and Secs. 5.1 and 5.4. With --pairs it learns people's choices: a line a
pair, with `prompt`, `chosen` and `rejected`, two pictures' paths from the file's folder. Without,
AI feedback: images of the pretrained model (--online: of the current one) ranked by --reward, all
pairs of a prompt. An epoch is K updates of --batch-size pairs. --loss sft is their supervised
control (Sec. 5.5): the denoising loss of the chosen picture, without a reference.

Paper                    Here, as in their code
||eps - eps_theta||^2    error, without guidance; a mean over latent dimensions
beta T omega             beta / 2
eps^w, eps^l             one draw, which a pair shares, as it does the timestep
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prdp
from baselines.pairs import NoReward, People
from baselines.rwr import batches, noised
from rewards import resolve_reward
from support.cli import UserError, flag
from support.distributed import average_gradients, gather, processes, rank, require_finite
from support.machine import loss_scaling
from support.report import epoch_metrics, phase
from support.settings import absolute, parse_settings, prompt_paths, run_command

PUBLISHED = dict(epochs=100, updates_per_epoch=10, learning_rate=2.048e-5)
TOY = dict(batch_size=64, updates_per_epoch=16, warmup=0, learning_rate=2e-4)
PRESETS = {
    name: settings | (TOY if name == "toy" else PUBLISHED)
    for name, settings in prdp.PRESETS.items()
}


@dataclass
class Config(prdp.Config):
    """prdp.py's settings, and Diffusion-DPO's own."""

    program = "baselines/diffusion_dpo.py"
    columns = ("loss", "accuracy", "grad_norm")
    kl_weight: float = flag(0.0, least=0)
    clip_range: float = flag(0.0, least=0)
    offline: bool = flag(False)
    reward: tuple = flag((), "ranks images (hpsv2; with --pairs none)", resolve=resolve_reward)
    prompts: tuple = flag((), "files (animals.txt; with --pairs its own)", resolve=prompt_paths)
    learning_rate: float = flag(2.048e-5, "of AdamW, as in their code; Sec. 5.1: 8.192e-9")
    pairs: str = flag("", "people's choices, .jsonl", group="Diffusion-DPO",
                      resolve=lambda file: absolute(file) if file else "")  # fmt: skip
    loss: str = flag("dpo", "dpo, or sft: of the chosen alone", "dpo", "sft")
    online: bool = flag(False, "rank images of the current model, not of the pretrained one")
    beta: float = flag(5000.0, "of Eq. 14")
    batch_size: int = flag(2048, "pairs an update")
    warmup: int = flag(250, "updates until the learning rate is reached, linearly", least=0)
    feedback: str = flag("ai")  # or "people", with --pairs: a run that goes on keeps to its own

    def check(self) -> None:
        if self.pairs and self.online:
            raise UserError("--online: not with --pairs, whose pictures are given.")

    def passes(self) -> tuple[float, float]:
        """As prdp.py's: an image is drawn, if need be; of a pair one step is scored and learned."""
        images = self.prompts_per_epoch * self.images_per_prompt
        learned = self.updates_per_epoch * self.batch_size / (images * self.ddpm_steps)
        scored, learned = (0, learned / 2) if self.loss == "sft" else (learned, learned)
        return (not self.pairs) + scored, learned


def diffusion_dpo_loss(error: Tensor, error_ref: Tensor, beta: float) -> Tensor:
    """Eq. 14 of each pair: (m,). Errors (m, 2), chosen and rejected, of policy and reference."""
    chosen, rejected = (error - error_ref).unbind(1)
    return -nn.functional.logsigmoid(-beta / 2 * (chosen - rejected))


def denoising_errors(
    policy: prdp.Policy, scheduler, x_0: Tensor, prompt_embeds: Tensor, timesteps: Tensor,
    noise: Tensor,
) -> Tensor:  # fmt: skip
    """||eps - eps_theta(x_t, t)||^2 of Eq. 14, a mean over latent dimensions: (m, 2) float64.

    x_0 (m, 2, C, H, W), or of the chosen alone (m, 1, ...); a pair shares prompt_embeds (m, L, F),
    timesteps (m,) and noise.
    """
    shared, sides = (prompt_embeds, timesteps, noise), x_0.shape[1]
    prompt_embeds, timesteps, noise = (x.repeat_interleave(sides, 0) for x in shared)
    x_t, target = noised(scheduler, x_0.flatten(0, 1), timesteps, noise)
    with policy.autocast():
        predicted = policy.unet(x_t, timesteps, encoder_hidden_states=prompt_embeds).sample
    return (predicted.double() - target).square().flatten(1).mean(1).unflatten(0, (-1, sides))


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
    sampler = models.policy if config.online else models.reference
    for epoch in range(start, config.epochs + 1):
        if people:
            owner = people.owner()
            load = functools.partial(people.load, models.sd, config.seed, epoch)
            count = config.updates_per_epoch * config.batch_size // processes()
            rewards = torch.full((max(1, count),), math.nan)  # none, of so many pairs
            parts = {}
        else:
            drawn, trajectories = prdp.sample_epoch(config, models, sampler, prompts, epoch)
            x_0 = trajectories.latents[:, -1].clone()
            prompt_embeds = trajectories.prompt_embeds
            del trajectories
            _, rewards, parts = prdp.score_images(models, x_0, drawn)
            pairs = ranked_pairs(gather(rewards).cpu(), config.images_per_prompt)
            owner = pairs[:, 0] // len(x_0)
            load = functools.partial(own_pairs, pairs, x_0, prompt_embeds)

        updates = []
        every = torch.arange(len(owner))
        for k, batch in enumerate(batches(config, epoch, every, models.sd), 1):
            made = (epoch - 1) * config.updates_per_epoch + k
            rate = config.learning_rate * min(1, made / max(1, config.warmup))
            optimizer.param_groups[0]["lr"] = rate
            updates.append(update(config, models, optimizer, owner, load, *batch))
        optimizer.zero_grad()  # their memory, before other images are drawn
        if not updates:  # all rewards tie
            updates = [{name: torch.tensor(math.nan) for name in ("loss", "accuracy")}]
        yield epoch_metrics(rewards, parts, updates)


def own_pairs(
    pairs: Tensor, x_0: Tensor, prompt_embeds: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """x_0 (m, 2, C, H, W), the chosen first, and prompt_embeds (m, L, F) of pairs (m,), which are
    all of this process's images."""
    rows = (pairs[numbers] - rank() * len(x_0)).to(x_0.device)  # (m, 2)
    return x_0[rows], prompt_embeds[rows[:, 0]]


def update(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, owner: Tensor,
    load: Callable, numbers: Tensor, timesteps: Tensor, noise: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """A gradient step on a batch of pairs, of which this process loads its own."""
    policy, reference, scheduler = models.policy, models.reference, models.sd.pipe.scheduler
    parameters = optimizer.param_groups[0]["params"]
    own, sft = (owner[numbers] == rank()).nonzero()[:, 0], config.loss == "sft"
    losses = torch.zeros(len(own), dtype=torch.float64)
    microbatches = []
    if len(own):
        with phase("pictures"):
            x_0, prompt_embeds = load(numbers[own])
        x_0 = x_0[:, :1] if sft else x_0
        drawn = (x[own].to(x_0.device) for x in (timesteps, noise))
        inputs = (torch.arange(len(own)), x_0, prompt_embeds, *drawn)
        microbatches = [*zip(*(x.split(policy.microbatch) for x in inputs), strict=True)]
    references = [None] * len(microbatches)
    if not sft:
        with torch.no_grad(), phase("reference"), reference.autocast():
            references = [denoising_errors(reference, scheduler, *x) for _, *x in microbatches]

    with phase("update"):
        share = torch.full((len(own),), processes() / len(numbers), dtype=torch.float64)
        steepness = 1 if sft else config.beta  # a loss is at most beta / 2 as steep as an error
        optimizer.zero_grad()
        for scaled in loss_scaling(policy.unet, share, noise[0].numel() / steepness):
            for (part, *x), error_ref in zip(microbatches, references, strict=True):
                error = denoising_errors(policy, scheduler, *x)
                loss = error[:, 0] if sft else diffusion_dpo_loss(error, error_ref, config.beta)
                (scaled[part].to(loss.device) * loss).sum().backward()
                losses[part] = loss.detach().cpu()
        average_gradients(parameters)
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        require_finite("the gradient", grad_norm)
        optimizer.step()
    accuracy = {} if sft else {"accuracy": share @ (losses < math.log(2)).double()}
    return {"loss": share @ losses, "grad_norm": grad_norm, **accuracy}


def complete(config: Config) -> Config:
    """The settings that depend on --pairs; without it, prdp.py's reward and prompts by default."""
    if config.pairs:
        return replace(config, feedback="people")
    default = Config if config.resume else prdp.Config  # a run that goes on has its own
    reward, prompts = config.reward or default.reward, config.prompts or default.prompts
    return replace(config, feedback="ai", reward=reward, prompts=prompts)


def run(config: Config, reward=None, prompts=None) -> None:
    config = complete(config)
    people = People(config.pairs) if config.pairs else None
    if people and reward is None and not config.reward:
        reward = NoReward({})
    if people and prompts is None and not config.prompts:
        prompts = [record["prompt"] for record in people.records]
    learn = functools.partial(train, people=people)
    prdp.run(config, reward, prompts, train=learn, state=people)


def parse_args(argv: list[str] | None = None) -> Config:
    return complete(parse_settings(Config, PRESETS, __doc__, argv))


def main(argv: list[str] | None = None) -> None:
    run_command(Config.program, parse_args, run, argv)


if __name__ == "__main__":
    main()
