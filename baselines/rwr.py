"""RWR: reward-weighted regression on the denoising loss (DDPO's baseline, Black et al. 2023).

    python baselines/rwr.py --preset toy --out runs/toy-rwr
    python baselines/rwr.py --reward hpsv2 --prompts prompts/animals.txt --out runs/hps-rwr

Read it beside Apps. C.2, F.2, F.3, F.6 and G.1 of DDPO's ICML-workshop edition. An epoch is one of
its iterations: N*B images of the current model (10,000), then K updates (400) of the denoising
loss, each on --batch-size of them (128) at random timesteps, weighted by their rewards. What learns
is the guided noise prediction, with the guidance of sampling (G.1). There is no KL term and no
clipping.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prdp
from support.cli import UserError, flag
from support.distributed import average_gradients, gather, processes, rank, require_finite, shard
from support.machine import loss_scaling
from support.report import epoch_metrics, phase
from support.settings import parse_settings, run_command

PUBLISHED = dict(epochs=5, updates_per_epoch=400, prompts_per_epoch=400, images_per_prompt=25,
                 learning_rate=1e-5)  # fmt: skip
TOY = dict(batch_size=64, updates_per_epoch=16, inverse_temperature=300.0, learning_rate=2e-4)
PRESETS = {
    name: settings | (TOY if name == "toy" else PUBLISHED)
    for name, settings in prdp.PRESETS.items()
}
SAMPLED_AT_ONCE = 512  # images whose trajectories are there at once; 10,000 would take 33 GB


@dataclass
class Config(prdp.Config):
    """prdp.py's settings, and RWR's own."""

    program = "baselines/rwr.py"
    columns = ("loss", "grad_norm")
    kl_weight: float = flag(0.0, least=0)
    clip_range: float = flag(0.0, least=0)
    offline: bool = flag(False)
    weighting: str = flag("softmax", "exp(beta r) over a prompt's images; sparse: 1 from "
                          "--percentile up, else 0", "softmax", "sparse", group="RWR")  # fmt: skip
    inverse_temperature: float = flag(0.2, "beta of softmax; cosines as rewards need about 100")
    percentile: float = flag(0.9, "sparse drops this share of a prompt's images", least=0)
    batch_size: int = flag(128, "images an update")

    def check(self) -> None:
        if self.percentile >= 1:
            raise UserError(f"--percentile {self.percentile}: must be below 1; 0.9 is usual.")

    def passes(self) -> tuple[float, float]:
        """As prdp.py's: an image is drawn; an update learns from one step of each of its images."""
        images = self.prompts_per_epoch * self.images_per_prompt
        return 1, self.updates_per_epoch * self.batch_size / (images * self.ddpm_steps)

    def images_held(self) -> int:
        """`sample_images` draws so many at a time."""
        return min(SAMPLED_AT_ONCE, super().images_held())


def rwr_weights(rewards: Tensor, inverse_temperature: float) -> Tensor:
    """w_RWR of a prompt's images (Apps. C.2, F.2, F.3): exp(beta r), scaled to a mean of 1 as in
    their code, so that where all rewards are equal this is the denoising loss itself."""
    return len(rewards) * torch.softmax(inverse_temperature * rewards.double(), 0)


def sparse_weights(rewards: Tensor, percentile: float) -> Tensor:
    """w_sparse of a prompt's images: 1 for rewards from the percentile C up, else 0."""
    rewards = rewards.double()
    return (rewards >= rewards.quantile(percentile)).double()


def denoising_error(
    policy: prdp.Policy, scheduler, x_0: Tensor, prompt_embeds: Tensor, timesteps: Tensor,
    noise: Tensor,
) -> Tensor:  # fmt: skip
    """The denoising loss (Eq. 1, of noise in place of means, as in their code) of the guided
    prediction (Eq. 5, App. G.1), with gradient: (m,) float64, a mean over latent dimensions.

    x_0 and noise (m, C, H, W), prompt_embeds (m, L, F), timesteps (m,) of the 1,000; `scheduler` is
    diffusers', of the model's noise schedule.
    """
    x_t, target = noised(scheduler, x_0, timesteps, noise)
    embeds = torch.cat([policy.null_embeds.expand_as(prompt_embeds), prompt_embeds])
    inputs = (torch.cat([x_t, x_t]), timesteps.repeat(2))
    with policy.autocast():
        noise_pred = policy.unet(*inputs, encoder_hidden_states=embeds).sample
    unconditional, conditional = noise_pred.double().chunk(2)
    guided = unconditional + policy.guidance_scale * (conditional - unconditional)  # Eq. 5
    return (guided - target).square().flatten(1).mean(1)


def noised(scheduler, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_t of q(x_t | x_0), and what the network should predict of it: the noise, or v."""
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x_0, noise, timesteps)
    return scheduler.add_noise(x_0, noise, timesteps), target


def batches(config, epoch: int, pool: Tensor, sd) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """K batches from `pool`, in a random order, each member once before any a second time: members,
    and of each a timestep and noise. All processes draw the same; of an empty pool there is none.
    """
    if len(pool) == 0:
        return
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    size, count = config.batch_size, config.updates_per_epoch
    rounds = -(-count * size // len(pool))
    orders = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)]
    train_steps = sd.noise_settings["num_train_timesteps"]
    for members in torch.cat(orders).split(size)[:count]:
        timesteps = torch.randint(train_steps, (size,), generator=generator)
        yield members, timesteps, torch.randn(size, *sd.latent_shape, generator=generator)


def sample_images(
    config: Config, models: prdp.Models, epoch_prompts: list[str], epoch: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """This process's share of an epoch's images (App. F.2): x_0 (M, C, H, W), rewards (M,) and the
    parts of these."""
    count = config.images_per_prompt
    own = torch.arange(len(epoch_prompts))[shard(len(epoch_prompts))]
    latents, rewards, parts = [], [], []
    for numbers in own.split(max(1, SAMPLED_AT_ONCE // count)):
        prompts = [epoch_prompts[n] for n in numbers]
        generators = prdp.image_generators(config.seed, epoch, numbers.tolist(), count)
        trajectories = prdp.sample_prompts(models, models.policy, prompts, generators)
        latents.append(trajectories.latents[:, -1].clone())
        del trajectories
        _, scores, score_parts = prdp.score_images(models, latents[-1], prompts)
        rewards.append(scores)
        parts.append(score_parts)
    parts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(latents), torch.cat(rewards), parts


def train(
    config: Config, models: prdp.Models, optimizer: torch.optim.Optimizer, prompts: list[str],
    start: int,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """RWR from epoch `start` on; yields each epoch's metrics."""
    parameters = optimizer.param_groups[0]["params"]
    for epoch in range(start, config.epochs + 1):
        epoch_prompts = prdp.draw_prompts(config, prompts, epoch)
        x_0, rewards, parts = sample_images(config, models, epoch_prompts, epoch)
        prompt_embeds = models.sd.encode(epoch_prompts[shard(len(epoch_prompts))])

        # Weights of the images of all processes; of sparse ones only those of weight 1 are used.
        every_reward = gather(rewards).cpu()
        repeated = [prompt for prompt in epoch_prompts for _ in range(config.images_per_prompt)]
        weights = torch.empty(len(every_reward), dtype=torch.float64)
        for prompt in set(repeated):
            rows = [row for row, other in enumerate(repeated) if other == prompt]
            if config.weighting == "sparse":
                weights[rows] = sparse_weights(every_reward[rows], config.percentile)
            else:
                weights[rows] = rwr_weights(every_reward[rows], config.inverse_temperature)
        pool = torch.arange(len(weights))
        if config.weighting == "sparse":
            pool = weights.nonzero()[:, 0]

        updates = []
        with phase("update"):
            for batch in batches(config, epoch, pool, models.sd):
                share = processes() * weights[batch[0]] / len(batch[0])
                optimizer.zero_grad()
                errors = backward_batch(config, models, x_0, prompt_embeds, batch, share)
                average_gradients(parameters)
                grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                require_finite("the gradient", grad_norm)
                optimizer.step()
                updates.append({"loss": (share * errors).sum(), "grad_norm": grad_norm})
        del x_0, prompt_embeds, batch  # and gradients: their memory, before others are drawn
        optimizer.zero_grad()
        yield epoch_metrics(rewards, parts, updates)


def backward_batch(
    config: Config, models: prdp.Models, x_0: Tensor, prompt_embeds: Tensor,
    batch: tuple[Tensor, Tensor, Tensor], share: Tensor,
) -> Tensor:  # fmt: skip
    """Add the gradient of sum(share * error) over those images of a batch that this process has to
    each `.grad`, a microbatch at a time; returns the errors, 0 where another process has them."""
    images, timesteps, noise = batch
    policy, scheduler = models.policy, models.sd.pipe.scheduler
    timesteps, noise = timesteps.to(x_0.device), noise.to(x_0.device)
    first = rank() * len(x_0)
    own = ((images >= first) & (images < first + len(x_0))).nonzero()[:, 0]
    errors = torch.zeros(len(images))

    if not len(own):
        return errors
    for scaled in loss_scaling(policy.unet, share, noise[0].numel()):
        for part in own.split(policy.microbatch):
            rows = images[part] - first
            embeds = prompt_embeds[rows // config.images_per_prompt]
            error = denoising_error(
                policy, scheduler, x_0[rows], embeds, timesteps[part], noise[part]
            )
            (scaled[part].to(error.device) * error).sum().backward()
            errors[part] = error.detach().float().cpu()
    return errors


def run(config: Config, reward=None, prompts=None) -> None:
    prdp.run(config, reward, prompts, train=train)


def parse_args(argv: list[str] | None = None) -> Config:
    return parse_settings(Config, PRESETS, __doc__, argv)


def main(argv: list[str] | None = None) -> None:
    run_command(Config.program, parse_args, run, argv)


if __name__ == "__main__":
    main()
