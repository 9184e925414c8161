"""All tests: no network, no GPU, about 5 minutes on two cores. Each oracle is of another form than the code it checks."""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# Before kernels is imported: it chooses how they run. (F811: fixtures are imported, and arguments.)
# ruff: noqa: F811
from tests.conftest import CPU, PROMPTS, SD14_SCHEDULER, needs_gpu, seed, tiny_config, tiny_sd  # noqa: F401

# isort: split
import prompts.report

import kernels
import prdp
from prdp import Policy, Schedule, Trajectories, prdp_loss

ROOT = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------ the loss


def random_inputs(
    seed: int, *lead: int, images=5, steps=7, scale=0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    log_probs, old, ref = (
        scale * torch.randn(*lead, images, steps, generator=g, dtype=torch.float64)
        for _ in range(3)
    )
    return log_probs, old, ref, torch.randn(*lead, images, generator=g, dtype=torch.float64)


def loss_by_pairs(log_probs, old, ref, rewards, clip_range, kl_weight) -> float:
    """Alg. 1, line 10 by hand: one prompt, a Python loop over the pairs i < j, plain numbers."""
    log_probs, old, ref, rewards = (x.tolist() for x in (log_probs, old, ref, rewards))
    total, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(rewards)), 2):
        if rewards[i] == rewards[j]:
            continue
        predicted = clipped = 0.0
        for image, sign in ((i, 1), (j, -1)):
            for new_t, old_t, ref_t in zip(log_probs[image], old[image], ref[image], strict=True):
                step = (
                    new_t - old_t
                )  # Eq. 20 clips the ratio to theta_old; adding r-hat_old back gives r-hat
                predicted += sign * (new_t - ref_t) / len(ref[0])
                clipped += (
                    sign * (min(max(step, -clip_range), clip_range) + old_t - ref_t) / len(ref[0])
                )
        target = (rewards[i] - rewards[j]) / kl_weight
        total += max((predicted - target) ** 2, (clipped - target) ** 2)
        pairs += 1
    return total / pairs if pairs else 0.0


@pytest.mark.parametrize("clip_range", [1e-6, 0.05, 0.3, math.inf])
@pytest.mark.parametrize("case", range(3))
def test_loss_equals_a_loop_over_pairs(case, clip_range):
    inputs = random_inputs(case, 4)
    expected = np.mean([loss_by_pairs(*(x[n] for x in inputs), clip_range, 0.7) for n in range(4)])
    assert prdp_loss(*inputs, clip_range, 0.7).item() == pytest.approx(expected, rel=1e-12)


def test_loss_clips_some_pairs_and_not_others():
    """The case above is not vacuous: clipping changes the loss, by less than everything."""
    inputs = random_inputs(0, 4)
    assert prdp_loss(*inputs, 0.05, 0.7) > prdp_loss(*inputs, math.inf, 0.7) > 0


def test_loss_gradcheck():
    log_probs, *rest = random_inputs(1, 2)
    assert torch.autograd.gradcheck(
        lambda x: prdp_loss(x, *rest, 0.05, 0.7), log_probs.requires_grad_()
    )


def test_loss_is_zero_exactly_where_rewards_are_predicted():
    """Eqs. 13 and 15: r-hat = r / beta + c(prompt) is the optimum, whatever c."""
    _, _, ref, r = random_inputs(2, 3)
    spread = torch.randn(7, dtype=torch.float64)  # any split over steps with the right mean
    log_probs = (
        ref + (r / 0.7 + torch.tensor([[5.0], [-3.0], [0.1]]))[..., None] + spread - spread.mean()
    )
    assert prdp_loss(log_probs, log_probs, ref, r, 1e-6, 0.7).item() < 1e-24
    assert prdp_loss(log_probs, log_probs, ref, -r, 1e-6, 0.7).item() > 1


def test_loss_ignores_a_constant_per_prompt_and_the_order():
    log_probs, old, ref, r = random_inputs(3, 4)
    loss = prdp_loss(log_probs, old, ref, r, 0.1, 0.7)
    shifted = prdp_loss(
        log_probs, old, ref, r + torch.tensor([[10.0], [-4.0], [0.0], [1.0]]), 0.1, 0.7
    )
    assert shifted.item() == pytest.approx(loss.item(), rel=1e-12)
    images, prompts = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 3, 1])
    permuted = prdp_loss(*(x[prompts][:, images] for x in (log_probs, old, ref, r)), 0.1, 0.7)
    assert permuted.item() == pytest.approx(loss.item(), rel=1e-12)


def test_loss_ties():
    """Tied pairs leave the mean (App. G); a prompt whose rewards all tie contributes 0, and a zero gradient, not NaN."""
    log_probs, old, ref, r = random_inputs(4, 2)
    r[0, 1] = r[0, 3]
    r[1] = 2.0
    log_probs.requires_grad_()
    loss = prdp_loss(log_probs, old, ref, r, 0.1, 0.7)
    first = loss_by_pairs(*(x[0] for x in (log_probs.detach(), old, ref, r)), 0.1, 0.7)
    assert loss.item() == pytest.approx(first / 2, rel=1e-12)
    loss.backward()
    assert log_probs.grad[0].abs().min() > 0 or log_probs.grad[0].any()
    assert not log_probs.grad[1].any()


def test_on_policy_clipping_changes_nothing():
    """K = 1: theta = theta_old at the only update, so Eq. 18 has neither a value nor a gradient of its own."""
    _, old, ref, r = random_inputs(5, 2)
    results = []
    for clip_range in (1e-6, math.inf):
        log_probs = old.clone().requires_grad_()
        loss = prdp_loss(log_probs, old, ref, r, clip_range, 0.7)
        loss.backward()
        results.append((loss.detach(), log_probs.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(
        results[0][1], results[1][1], rtol=1e-14, atol=0
    )


def test_sum_over_steps_is_the_mean_with_another_kl_weight():
    """loss_sum(beta) == T**2 * loss_mean(beta * T): Eqs. 10 and 21 against App. G."""
    log_probs, old, ref, r = random_inputs(6)
    steps = log_probs.shape[-1]
    ratio, old_ratio = (log_probs - ref), (old - ref)
    clipped = ratio.clamp(old_ratio - 0.1, old_ratio + 0.1)
    total = []
    for i, j in itertools.combinations(range(len(r)), 2):
        target = (r[i] - r[j]) / 0.3
        total.append(max((x[i].sum() - x[j].sum() - target) ** 2 for x in (ratio, clipped)))
    expected = steps**2 * prdp_loss(log_probs, old, ref, r, 0.1, 0.3 * steps)
    assert torch.stack(total).mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradient_stops_outside_the_clip_range_and_passes_at_its_edge():
    """Two images, one step: r_0 > r_1, both ratios zero under theta_old; image 0 has moved up by x, clip_range is 0.25."""

    def gradient(x: float) -> float:
        log_probs = torch.tensor([[x], [0.0]], dtype=torch.float64, requires_grad=True)
        zeros = torch.zeros(2, 1, dtype=torch.float64)
        prdp_loss(log_probs, zeros, zeros, torch.tensor([1.0, 0.0]), 0.25, 1.0).backward()
        return log_probs.grad[0].item()

    assert gradient(0.2) == pytest.approx(2 * (0.2 - 1))
    assert gradient(0.25) == pytest.approx(
        2 * (0.25 - 1)
    )  # exactly at the bound, both branches are the same
    assert (
        gradient(0.26) == 0
    )  # moved far enough towards the target: the larger, clipped error has no slope
    assert gradient(-0.3) == pytest.approx(
        2 * (-0.3 - 1)
    )  # moved the wrong way: the unclipped error wins


def test_loss_can_be_pasted_elsewhere():
    """It needs torch alone, fits in 40 lines, and the README shows it verbatim."""
    source = inspect.getsource(prdp_loss)
    namespace: dict = {"torch": torch, "Tensor": Tensor}
    exec(source, namespace)
    inputs = random_inputs(7, 2)
    assert torch.equal(namespace["prdp_loss"](*inputs, 0.1, 0.7), prdp_loss(*inputs, 0.1, 0.7))
    assert len(source.splitlines()) <= 40
    assert source in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ the policy


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [7, 10, 50])
def test_schedule_equals_diffusers_ddim_with_eta_1(num_steps, prediction_type):
    from diffusers import DDIMScheduler

    config = {**SD14_SCHEDULER, "prediction_type": prediction_type}
    del config["skip_prk_steps"]
    theirs = DDIMScheduler(**config, clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(num_steps)
    ours = prdp.ddpm_schedule(config, num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x, out = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for k, t in enumerate(theirs.timesteps):
        mean, moved = (
            theirs.step(out, t, x, eta=1.0, variance_noise=torch.full_like(x, z)).prev_sample
            for z in (0.0, 1.0)
        )
        torch.testing.assert_close(
            ours.coef_sample[k] * x + ours.coef_noise[k] * out, mean, rtol=0, atol=2e-5
        )
        assert ours.sigma[k].item() == pytest.approx((moved - mean).mean().item(), rel=1e-4)


def test_schedule_is_the_posterior_of_the_forward_process():
    """Ho et al., Eqs. 6 and 7, in exact rational form: condition the joint Gaussian of (x_{t-1}, x_t) given x_0 by hand."""
    schedule = prdp.ddpm_schedule(SD14_SCHEDULER, 50)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    for k, t in enumerate(range(981, 0, -20)):
        s = max(t - 20, 0)
        joint = np.array([[1 - bar[s], np.sqrt(bar[t] / bar[s]) * (1 - bar[s])], [0, 1 - bar[t]]])
        gain = joint[0, 1] / joint[1, 1]
        variance = joint[0, 0] - gain * joint[0, 1]
        x_t, noise = 0.3, -0.8
        x_0 = (x_t - np.sqrt(1 - bar[t]) * noise) / np.sqrt(bar[t])
        mean = np.sqrt(bar[s]) * x_0 + gain * (x_t - np.sqrt(bar[t]) * x_0)
        assert schedule.sigma[k].item() == pytest.approx(np.sqrt(variance), rel=1e-9)
        assert (
            schedule.coef_sample[k] * x_t + schedule.coef_noise[k] * noise
        ).item() == pytest.approx(mean, rel=1e-9)
    assert schedule.sigma[-1].item() == pytest.approx(0.0206, abs=5e-5)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"steps_offset": 0}, "sigma = 0"),
        ({"set_alpha_to_one": True}, "sigma = 0"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"steps_offset": 20}, "ddpm-steps 50: does not divide"),
        ({"num_train_timesteps": 80}, "ddpm-steps 50: does not divide"),
        ({"num_train_timesteps": 40}, "ddpm-steps"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas"),
    ],
)
def test_schedule_refuses(change, names):
    with pytest.raises(prdp.InputError, match=names):
        prdp.ddpm_schedule({**SD14_SCHEDULER, **change}, 50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gaussian_log_prob_equals_torch_distributions(dtype):
    sample, mean = torch.randn(2, 6, 4, 5, 3).to(dtype)
    sigma = torch.rand(6, dtype=torch.float64) + 0.02
    log_prob = prdp.gaussian_log_prob(sample, mean, sigma)
    normal = torch.distributions.Normal(mean.double(), sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(
        log_prob, normal.log_prob(sample.double()).mean((1, 2, 3)), rtol=1e-12, atol=1e-12
    )
    assert log_prob.dtype == torch.float64


class Linear(nn.Module):
    """A stand-in UNet of which everything is known: out = scale * sample + mean of the text, per row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.rows = 0

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        self.rows += len(sample)
        assert len(timestep) == len(encoder_hidden_states) == len(sample)
        shift = encoder_hidden_states.double().mean((1, 2)).view(-1, 1, 1, 1)
        return type("Out", (), {"sample": self.scale * shift * sample.double() + shift})


def linear_policy(**kwargs) -> Policy:
    schedule = prdp.ddpm_schedule(SD14_SCHEDULER, 4)
    return Policy(
        Linear(),
        schedule,
        torch.full((5, 3), 0.1),
        **{"guidance_scale": 5.0, "microbatch": 4, **kwargs},
    )


def test_guidance():
    """u + w (c - u), and a gradient through both branches."""
    policy = linear_policy(guidance_scale=3.0)
    sample, text = torch.randn(4, 2, 3, 3), torch.full((4, 5, 3), 0.7)
    both, _ = prdp.predict_noise(policy, sample, text, torch.zeros(4, dtype=torch.long))
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    out = kernels.guided_mean_ref(
        both, sample, zeros, ones, policy.guidance_scale
    )  # the mean of Eq. 2 with a = 0, b = 1
    u, c = (s * (1 + 0.3 * sample.double()) for s in (0.1, 0.7))
    torch.testing.assert_close(out, u + 3.0 * (c - u), rtol=1e-6, atol=1e-6)
    out.sum().backward()
    expected = ((0.1 + 3.0 * (0.7 - 0.1)) * sample.double()).sum()
    assert policy.unet.scale.grad.item() == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ kernels


def test_benchmark_quick_prints_its_tables():
    """On a CPU in seconds; the on-policy gap it measures is exactly 0 in every number format."""
    command = [sys.executable, str(ROOT / "kernels" / "benchmark.py"), "--quick"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    tables = [part.strip().split("\n") for part in done.stdout.split("\n## ")[1:]]
    assert [table[0][:3] for table in tables] == ["(a)", "(b)", "one", "(c)", "(d)"]
    for table in tables[1], tables[3]:
        gaps = [
            cells[-1].strip()
            for cells in (line.strip("|").split("|") for line in table if line.startswith("|"))
        ]
        assert {gap for gap in gaps[2:] if gap} == {"0.0"}


# ------------------------------------------------------------------------------------------------ trajectories


def test_trajectory_is_ancestral_sampling_and_its_log_prob_is_of_the_stored_tensor():
    """Redraw the noise of each image by hand, and walk and score each step in float64 numpy."""
    policy, text = linear_policy(), torch.randn(6, 5, 3)
    generators = prdp.image_generators(0, 1, range(3), 2)
    trajectories = prdp.sample_trajectories(policy, text, generators, (2, 3, 3))
    assert trajectories.latents.dtype == torch.float32 and trajectories.latents.shape == (
        6,
        5,
        2,
        3,
        3,
    )
    schedule = [column.numpy() for column in policy.schedule]
    for m, g in enumerate(prdp.image_generators(0, 1, range(3), 2)):
        stored = trajectories.latents[m].double().numpy()
        np.testing.assert_array_equal(stored[0], torch.randn(2, 3, 3, generator=g).numpy())
        for k in range(4):
            shifts = (policy.null_text.double().mean().item(), text[m].double().mean().item())
            u, c = (s + 0.3 * s * stored[k] for s in shifts)
            mean = schedule[1][k] * stored[k] + schedule[2][k] * (u + 5.0 * (c - u))
            x = mean + schedule[3][k] * torch.randn(2, 3, 3, generator=g).numpy()
            np.testing.assert_allclose(stored[k + 1], x.astype(np.float32), rtol=2e-7, atol=1e-7)
            density = -((stored[k + 1] - mean) ** 2) / (2 * schedule[3][k] ** 2) - np.log(
                schedule[3][k]
            )
            expected = density.mean() - 0.5 * np.log(2 * np.pi)
            assert trajectories.log_probs[m, k].item() == pytest.approx(expected, rel=1e-10)


def test_noise_does_not_depend_on_batch_or_order():
    """Prompt 1's images are the same whether 2 or 3 prompts are sampled; seed, epoch, prompt and image each matter."""

    def noise(seed: int, epoch: int, prompts: int, images: int) -> Tensor:
        return torch.stack(
            [
                torch.randn(4, generator=g)
                for g in prdp.image_generators(seed, epoch, range(prompts), images)
            ]
        )

    assert torch.equal(noise(0, 1, 3, 2)[:4], noise(0, 1, 2, 2))
    every = torch.cat([noise(0, 1, 3, 4), noise(0, 2, 3, 4), noise(1, 1, 3, 4)])
    assert len(every.unique(dim=0)) == 36


def draw(models: prdp.Models) -> Trajectories:
    """4 trajectories for each of the 3 prompts, with the noise of seed 0, epoch 1."""
    text = prdp.encode(models.pipe, PROMPTS).repeat_interleave(4, dim=0)
    return prdp.sample_trajectories(
        models.policy, text, prdp.image_generators(0, 1, range(3), 4), models.latent_shape
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_equal_the_pipelines_own(tiny_sd, tmp_path, prediction_type):
    """Our sampler against diffusers' pipeline with DDIM, eta = 1, and the same generators: the same pictures."""
    import shutil

    from diffusers import DDIMScheduler

    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "prediction_type": prediction_type})
    )
    models = prdp.load_models(tiny_config(str(folder)), CPU)
    latents = draw(models).latents[:, -1]
    pipe = models.pipe
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    generators = prdp.image_generators(0, 1, range(3), 4)
    theirs = pipe(
        PROMPTS, num_images_per_prompt=4, num_inference_steps=5, guidance_scale=5.0, eta=1.0, generator=generators,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents, theirs, rtol=0, atol=2e-4)
    images = prdp.decode(models, latents)
    floats = pipe.image_processor.postprocess(
        pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, "pt"
    )
    assert (images - 255 * floats).abs().max() <= 0.5 + 1e-3 and images.dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_on_policy_gap_is_exactly_zero(tiny_sd, dtype):
    """Scoring reproduces sampling bit for bit, and so does the reference, whose weights are cast once; another microbatch does
    not reproduce it, which is why the passes share one."""
    config = tiny_config(tiny_sd, dtype=dtype)
    models = prdp.load_models(config, CPU)
    trajectories = draw(models)
    assert torch.equal(prdp.score_trajectories(models.policy, trajectories), trajectories.log_probs)
    assert torch.equal(
        prdp.score_trajectories(models.reference, trajectories), trajectories.log_probs
    )
    prdp.check_on_policy(models, trajectories)
    with torch.no_grad():
        models.policy.unet.conv_out.bias += 1e-4
    assert not torch.equal(
        prdp.score_trajectories(models.policy, trajectories), trajectories.log_probs
    )
    with pytest.raises(prdp.InputError, match="policy scores its own trajectory"):
        prdp.check_on_policy(models, trajectories)


def test_same_images_whatever_the_microbatch(tiny_sd):
    runs = []
    for microbatch in (1, 4, 12):
        config = tiny_config(tiny_sd, microbatch=microbatch)
        models = prdp.load_models(config, CPU)
        trajectories = draw(models)
        runs.append((trajectories.latents, prdp.decode(models, trajectories.latents[:, -1]).int()))
    for latents, images in runs[1:]:
        assert torch.equal(latents[:, 0], runs[0][0][:, 0])
        torch.testing.assert_close(latents, runs[0][0], rtol=0, atol=1e-3)
        assert (images - runs[0][1]).abs().max() <= 1


# ------------------------------------------------------------------------------------------------ exact gradients


class InDouble(nn.Module):
    """A UNet in float64 behind float32 latents, that counts the rows it is given."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet, self.rows = unet.double(), 0

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        self.rows += len(sample)
        return self.unet(
            sample.double(), timestep, encoder_hidden_states=encoder_hidden_states.double()
        )


def naive_gradient(
    policy: Policy,
    trajectories: Trajectories,
    old: Tensor,
    ref: Tensor,
    r: Tensor,
    clip_range: float,
):
    """Plain backpropagation through all images and steps in one graph, row by row, without prdp's passes."""
    policy.unet.zero_grad()
    schedule = policy.schedule
    rows = []
    for m, latents in enumerate(trajectories.latents.double()):
        for k, t in enumerate(schedule.timesteps):
            text = torch.stack([policy.null_text, trajectories.text[m]])
            u, c = policy.unet(
                latents[k].expand(2, -1, -1, -1), t.expand(2), encoder_hidden_states=text
            ).sample
            mean = schedule.coef_sample[k] * latents[k] + schedule.coef_noise[k] * (
                (1 - policy.guidance_scale) * u + policy.guidance_scale * c
            )
            rows.append(
                torch.distributions.Normal(mean, schedule.sigma[k]).log_prob(latents[k + 1]).mean()
            )
    log_probs = torch.stack(rows).view(3, 4, -1)
    prdp_loss(
        log_probs, old.view_as(log_probs), ref.view_as(log_probs), r.view(3, 4), clip_range, 1e-3
    ).backward()
    return torch.cat([p.grad.flatten() for p in policy.unet.parameters()])


@pytest.mark.parametrize(("updates", "clip_range"), [(1, 1e-4), (2, math.inf), (2, 1e-5)])
def test_gradient_equals_the_whole_graphs(tiny_sd, updates, clip_range):
    """Three passes against naive autograd in float64, on- and off-policy, with clipped entries skipped and without."""
    config = tiny_config(tiny_sd)
    models = prdp.load_models(config, CPU)
    policy = models.policy._replace(unet=InDouble(models.policy.unet))
    reference = models.reference._replace(unet=InDouble(models.reference.unet))
    with torch.no_grad():  # a reference that differs, as in any epoch after the first
        for p in reference.unet.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    trajectories = draw(models._replace(policy=policy))
    ref = prdp.score_trajectories(reference, trajectories)
    r = torch.randn(12, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(policy.unet.parameters(), lr=1e-7)
    for k in range(updates):
        log_probs = (
            prdp.score_trajectories(policy, trajectories) if k else trajectories.log_probs.clone()
        )
        log_probs.requires_grad_()
        grouped = [x.view(3, 4, *x.shape[1:]) for x in (log_probs, trajectories.log_probs, ref, r)]
        (weights,) = torch.autograd.grad(prdp_loss(*grouped, clip_range, 1e-3), log_probs)
        policy.unet.zero_grad()
        policy.unet.rows = 0
        prdp.backward_trajectories(policy, trajectories, weights)
        ours, skipped = (
            torch.cat([p.grad.flatten() for p in policy.unet.parameters()]),
            (weights == 0).double().mean(),
        )
        assert policy.unet.rows == 2 * int((weights != 0).sum())
        expected = naive_gradient(policy, trajectories, trajectories.log_probs, ref, r, clip_range)
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-9
        optimizer.step()
    assert (0.1 < skipped < 0.9) if (updates, clip_range) == (2, 1e-5) else skipped == 0


def test_gradients_add_up(tiny_sd):
    """Two backward passes leave twice the gradient of one, in fp16 too, where it is scaled on the way."""
    for dtype in ("fp32", "fp16"):
        models = prdp.load_models(tiny_config(tiny_sd, dtype=dtype), CPU)
        trajectories, norms = draw(models), []
        weights = torch.randn(12, 5, dtype=torch.float64)
        for _ in range(2):
            prdp.backward_trajectories(models.policy, trajectories, weights)
            norms.append(
                torch.cat([p.grad.flatten() for p in models.policy.unet.parameters()]).norm().item()
            )
        assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


def test_fp16_gradients_do_not_underflow(tiny_sd):
    """Tiny weights, as with a large kl_weight: fp16 gradients come out as fp32's do, to fp16's precision."""
    gradients = []
    for dtype in ("fp32", "fp16"):
        config = tiny_config(tiny_sd, dtype=dtype)
        models = prdp.load_models(config, CPU)
        trajectories = draw(models)
        weights = 1e-7 * torch.randn(
            12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        prdp.backward_trajectories(models.policy, trajectories, weights)
        gradients.append(torch.cat([p.grad.flatten() for p in models.policy.unet.parameters()]))
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.05


def test_no_gradient_where_all_rewards_tie(tiny_sd):
    """All weights are zero: no pass is run, and no gradient is left."""
    models = prdp.load_models(tiny_config(tiny_sd), CPU)
    trajectories = draw(models)
    prdp.backward_trajectories(
        models.policy, trajectories, torch.zeros_like(trajectories.log_probs)
    )
    assert all(p.grad is None for p in models.policy.unet.parameters())


class Offsets(nn.Module):
    """A linear-Gaussian chain: the mean of step t is a_t x_t + theta_t."""

    def __init__(self, schedule: Schedule, dimensions: int) -> None:
        super().__init__()
        self.timesteps = schedule.timesteps.tolist()
        self.theta = nn.Parameter(torch.zeros(len(self.timesteps), dimensions, dtype=torch.float64))
        self.register_buffer("coef_noise", schedule.coef_noise)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        steps = [self.timesteps.index(t) for t in timestep.tolist()]
        return type(
            "Out",
            (),
            {"sample": (self.theta[steps] / self.coef_noise[steps, None]).view(sample.shape)},
        )


def test_converges_to_the_closed_form_optimum():
    """With x_T shared and r = g . x_0, Eq. 7 shifts the mean of step t by sigma_t^2 * (product of the later a's) * g / beta_eff,
    where beta_eff = kl_weight / (T * C*H*W). The loss goes to zero there, and nowhere else."""
    schedule, dimensions, kl_weight = prdp.ddpm_schedule(SD14_SCHEDULER, 5), 3, 0.8
    steps, g = 5, torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)
    unet = Offsets(schedule, dimensions)
    policy = Policy(unet, schedule, torch.zeros(1, 1), microbatch=64)
    reference = policy._replace(unet=Offsets(schedule, dimensions))
    text, random = torch.zeros(64, 1, 1), torch.Generator().manual_seed(0)
    latents = torch.empty(64, steps + 1, dimensions, 1, 1)
    latents[:, 0] = torch.randn(dimensions, 1, 1, generator=random)  # shared x_T
    for k in range(steps):
        noise = torch.randn(64, dimensions, 1, 1, generator=random)
        latents[:, k + 1] = schedule.coef_sample[k] * latents[:, k] + schedule.sigma[k] * noise
    trajectories = Trajectories(latents, torch.empty(64, steps, dtype=torch.float64), text)
    ref = prdp.score_trajectories(reference, trajectories)
    r = latents[:, -1].flatten(1).double() @ g
    optimizer = torch.optim.LBFGS(
        [unet.theta],
        lr=1,
        max_iter=400,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_probs = prdp.score_trajectories(policy, trajectories).requires_grad_()
        loss = prdp_loss(log_probs, log_probs.detach(), ref, r, math.inf, kl_weight)
        (weights,) = torch.autograd.grad(loss, log_probs)
        prdp.backward_trajectories(policy, trajectories, weights)
        return loss.detach()

    start = closure().item()
    optimizer.step(closure)
    later = torch.tensor([schedule.coef_sample[k + 1 :].prod() for k in range(steps)])
    optimum = (schedule.sigma**2 * later)[:, None] * g / (kl_weight / (steps * dimensions))
    assert closure().item() < 1e-6 * start
    torch.testing.assert_close(unet.theta.detach(), optimum, rtol=0.01, atol=0)


# ------------------------------------------------------------------------------------------------ speed and memory


def gradient_of(models: prdp.Models) -> Tensor:
    trajectories = draw(models)
    weights = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prdp.backward_trajectories(models.policy, trajectories, weights)
    return torch.cat(
        [p.grad.flatten() for p in models.pipe.unet.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True}, {"compile": True}, {"compile": True, "lora_rank": 2}],
)
def test_memory_and_speed_flags_keep_the_gradient(tiny_sd, monkeypatch, changes):
    """To rounding. And where they recompute or compile, an unchanged policy still reproduces its log-probs to the bit."""
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # the graphs, not their compilation
    plain = gradient_of(
        prdp.load_models(tiny_config(tiny_sd, lora_rank=changes.get("lora_rank", 0)), CPU)
    )
    models = prdp.load_models(tiny_config(tiny_sd, **changes), CPU)
    torch.testing.assert_close(
        gradient_of(models), plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item()
    )
    prdp.check_on_policy(models, draw(models))
    assert [name for name, _ in models.pipe.unet.named_parameters()][0].startswith(
        "conv_in"
    )  # for the checkpoint


def test_compiled_updates_have_one_shape(tiny_sd, monkeypatch):
    """With some weights zero, and none left over: each microbatch is full, and the gradient is the uncompiled one's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    weights = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients, sizes = {}, set()
    forward = prdp.predict_noise
    for compiled in (False, True):
        models = prdp.load_models(tiny_config(tiny_sd, compile=compiled), CPU)
        trajectories = draw(models)
        if compiled:
            monkeypatch.setattr(
                prdp,
                "predict_noise",
                lambda p, x, *rest: (sizes.add(len(x)), forward(p, x, *rest))[1],
            )
        for zeros in (7, 60):  # of 60 entries: 53 to do in microbatches of 6, and none
            few = weights.flatten().clone()
            few[torch.randperm(60, generator=torch.Generator().manual_seed(1))[:zeros]] = 0
            prdp.backward_trajectories(models.policy, trajectories, few.view(12, 5))
        gradients[compiled] = torch.cat([x.grad.flatten() for x in models.pipe.unet.parameters()])
    assert sizes == {6}
    tolerance = 1e-5 * gradients[False].abs().max().item()
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"offline": True}, {"lora_rank": 2}, {"loss": "ddpo"}])
def test_offload_networks_are_back_wherever_they_run(
    tiny_sd, tmp_path, capsys, monkeypatch, changes
):
    """A run whose waiting networks hold NaN, but for the phases that move them back, is the run without --offload to the
    bit; and while gradients exist, all of them wait."""
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--reward",
        f"pickscore:{ROOT}/toy/pickscore",
        "--epochs",
        "2",
    ]
    for name, value in changes.items():
        flags += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    assert run_cli(*flags, "--out", str(tmp_path / "plain"), capsys=capsys) == (0, "")

    away, move, load, learn = {}, torch.nn.Module.to, prdp.load_models, prdp.backward_trajectories
    elsewhere, learned = torch.device("meta"), []  # a marker: nothing is moved there

    def to(module: torch.nn.Module, *where, **options):
        if elsewhere not in where and not away:
            return move(module, *where, **options)
        for x in itertools.chain(module.parameters(), module.buffers()):
            if x.is_floating_point() and elsewhere in where:
                assert x.data_ptr() not in away, "sent away twice"
                away[x.data_ptr()] = x.data.clone()
                x.data.fill_(math.nan)
            elif x.is_floating_point() and x.data_ptr() in away:
                x.data.copy_(away.pop(x.data_ptr()))
        return module

    def load_offloaded(*arguments):
        models = load(*arguments)._replace(waiting=elsewhere)
        models.reward.waiting = elsewhere
        (_, scorer), *_ = models.reward.components.values()
        for network in (
            models.reference.unet,
            models.pipe.vae,
            models.pipe.text_encoder,
            *scorer.networks,
        ):
            network.to(elsewhere)
        learned.append(len(away))
        return models

    def learn_alone(policy, *arguments):
        learned.append(len(away))
        assert not any(x.data_ptr() in away for x in policy.unet.parameters())
        learn(policy, *arguments)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(prdp, "load_models", load_offloaded)
    monkeypatch.setattr(prdp, "backward_trajectories", learn_alone)
    code, errors = run_cli(*flags, "--out", str(tmp_path / "offloaded"), capsys=capsys)
    assert code == 0, errors
    assert_same_run(tmp_path / "plain", tmp_path / "offloaded")
    assert learned == [len(away)] * 5 and len(away) > 100  # as loaded, and in each update


def test_memory_of_an_epoch_is_free_before_the_next(tiny_sd, tmp_path, capsys, monkeypatch):
    """Of Table 4's 512 images it is 2 GB: trajectories, pictures and text are gone whenever others are drawn."""
    drawn, sample = [], prdp.sample_trajectories

    def watched(*arguments):
        assert not any(tensor() is not None for tensor in drawn)
        trajectories = sample(*arguments)
        drawn.extend(weakref.ref(tensor) for tensor in (trajectories.latents, trajectories.text))
        return trajectories

    monkeypatch.setattr(prdp, "sample_trajectories", watched)
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--epochs",
        "3",
        "--sample-every",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run_cli(*flags, capsys=capsys) == (0, "") and len(drawn) == 2 * (3 + 4)


def test_offload_by_default_on_small_gpus(tiny_sd, monkeypatch):
    cuda = torch.device("cuda")
    for gigabytes in (24, 80):
        size = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, size=size: size)
        idle = {offload: prdp.idle_device(offload, cuda) for offload in ("auto", "on", "off")}
        assert idle == {"auto": CPU if gigabytes == 24 else cuda, "on": CPU, "off": cuda}
    assert prdp.idle_device("auto", CPU) == prdp.idle_device("off", CPU) == CPU
    gpu, places, move = (
        torch.device("meta"),
        {},
        torch.nn.Module.to,
    )  # a stand-in: nothing is moved there

    def to(module: torch.nn.Module, *where, **options):
        places[module] = where[0] if where else None
        return module if gpu in where else move(module, *where, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(prdp, "ddpm_schedule", lambda *_: ())  # its tensors would move
    monkeypatch.setattr(prdp, "Schedule", lambda *columns: columns)
    for offload, idle in (("on", CPU), ("off", gpu)):
        config = tiny_config(tiny_sd, offload=offload, reward=f"pickscore:{ROOT}/toy/pickscore")
        models = prdp.load_models(config, gpu)
        (_, scorer), *_ = models.reward.components.values()
        for network in (
            models.reference.unet,
            models.pipe.vae,
            models.pipe.text_encoder,
            *scorer.networks,
        ):
            assert places[network] == models.waiting == models.reward.waiting == idle
        assert places[models.policy.unet] == models.reward.device == gpu


@needs_gpu
def test_offload_on_a_gpu(tmp_path, capsys):
    """The same values to the bit (of an epoch: later ones depend on cuDNN's gradients), in less GPU memory."""
    peaks, first = {}, {}
    for offload in ("off", "on"):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        flags = [
            "--preset",
            "toy",
            "--epochs",
            "2",
            "--offload",
            offload,
            "--out",
            str(tmp_path / offload),
        ]
        assert run_cli(*flags, capsys=capsys) == (0, "")
        peaks[offload] = torch.cuda.max_memory_allocated()
        first[offload] = metrics_of(tmp_path / offload)[0]["reward_mean"]
    assert first["on"] == first["off"] and peaks["on"] < peaks["off"]


def test_lora(tiny_sd, tmp_path, capsys):
    """Adapters alone are learned and kept in the checkpoint, the reference stays the pretrained model, a resumed run is
    the uninterrupted one, and the pipeline has the adapters merged: it draws what the run last showed."""
    from diffusers import StableDiffusionPipeline

    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--lora-rank",
        "2",
        "--learning-rate",
        "1e-2",
        "--microbatch",
        "4",
    ]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_cli(*flags, "--epochs", "2", "--out", str(whole), capsys=capsys)[0] == 0
    assert run_cli(*flags, "--epochs", "1", "--out", str(halves), capsys=capsys)[0] == 0
    assert run_cli("--resume", str(halves), "--epochs", "2", capsys=capsys)[0] == 0
    assert_same_run(whole, halves)
    adapters = weights_of(whole)
    assert adapters and all("lora_" in name for name in adapters)
    assert any(x.abs().max() > 1e-3 for name, x in adapters.items() if "lora_B" in name)
    assert (whole / "lora" / "pytorch_lora_weights.safetensors").is_file()

    config = prdp.Config(**json.loads((whole / "config.json").read_text()))
    models, base = prdp.load_models(config, CPU), prdp.load_models(tiny_config(tiny_sd), CPU)
    prdp.load_checkpoint(
        config,
        models,
        torch.optim.AdamW([p for p in models.pipe.unet.parameters() if p.requires_grad]),
    )
    merged = StableDiffusionPipeline.from_pretrained(whole / "pipeline").unet
    assert not any("lora" in name for name in merged.state_dict())
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 16, 16)
    with torch.no_grad():
        networks = (models.policy.unet, models.reference.unet, merged, base.policy.unet)
        learned, reference, ours, pretrained = (
            unet(x, t, encoder_hidden_states=text).sample for unet in networks
        )
    assert torch.equal(reference, pretrained)
    torch.testing.assert_close(ours, learned, rtol=1e-4, atol=1e-5)
    assert (learned - pretrained).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------ baselines


def baseline_by_hand(
    name: str, log_probs, old, ref, rewards, clip_range: float, kl_weight: float
) -> float:
    """One prompt, plain numbers: each method as its paper writes it, log-likelihoods as means over T."""
    log_probs, old, ref, rewards = (x.tolist() for x in (log_probs, old, ref, rewards))
    images, steps = range(len(rewards)), range(len(log_probs[0]))
    likelihood = [sum(row) / len(row) for row in log_probs]
    if name == "ddpo":
        total = 0.0
        for i, t in itertools.product(images, steps):
            weight = math.exp(log_probs[i][t] - old[i][t])
            inside = min(max(weight, 1 - clip_range), 1 + clip_range)
            total -= min(weight * rewards[i], inside * rewards[i])
        return total / len(images) / len(steps)
    if name == "ddpo-sf":
        return -sum(r * lp for r, lp in zip(rewards, likelihood, strict=True)) / len(images)
    if name == "rwr":
        weights = [math.exp(r / kl_weight) for r in rewards]
        return -sum(w * lp for w, lp in zip(weights, likelihood, strict=True)) / sum(weights)
    if name == "rwr-sparse":
        threshold = np.quantile(rewards, 0.9)
        best = [i for i in images if rewards[i] >= threshold]
        return -sum(likelihood[i] for i in best) / len(best)
    assert name == "dpo"
    losses = []
    for w, l in itertools.permutations(images, 2):  # noqa: E741  (Diffusion-DPO's letters)
        if rewards[w] > rewards[l]:
            margin = sum(
                log_probs[w][t] - ref[w][t] - log_probs[l][t] + ref[l][t] for t in steps
            ) / len(steps)
            losses.append(math.log1p(math.exp(-kl_weight * margin)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["ddpo", "ddpo-sf", "rwr", "rwr-sparse", "dpo"])
def test_baseline_equals_its_paper_by_hand(name):
    """On several prompts at once; in float64, values and (by finite differences) gradients."""
    log_probs, old, ref, rewards = random_inputs(1, 3, images=16)
    expected = [
        baseline_by_hand(name, *parts, 0.1, 0.7)
        for parts in zip(log_probs, old, ref, rewards, strict=True)
    ]
    loss = prdp.LOSSES[name](log_probs, old, ref, rewards, 0.1, 0.7)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: prdp.LOSSES[name](x, old, ref, rewards, 0.1, 0.7), log_probs
    )


def test_baseline_policy_gradients_agree_on_policy():
    """At theta_old, DDPO_IS and DDPO_SF are one policy gradient: minus the advantage at every step."""
    log_probs, _, ref, advantage = random_inputs(2, 2)
    gradients = []
    for name in ("ddpo", "ddpo-sf"):
        x = log_probs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            prdp.LOSSES[name](x, log_probs, ref, advantage, 1e-4, 1.0), x
        )
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        gradients[0], -advantage.unsqueeze(-1).expand_as(log_probs) / log_probs.numel()
    )


def test_baseline_ddpo_clips_one_sided():
    """Beyond the range PPO's surrogate has no gradient where moving on would raise it, and keeps it where moving back would."""
    old, advantage = torch.zeros(1, 2, 1, dtype=torch.float64), torch.tensor([[1.0, -1.0]])
    for moved, expected in ((0.3, [False, True]), (-0.3, [True, False]), (0.05, [True, True])):
        x = (old + moved).requires_grad_()
        (gradient,) = torch.autograd.grad(prdp.ddpo_loss(x, old, old, advantage, 0.1, 1.0), x)
        assert (gradient != 0).flatten().tolist() == expected


def test_baseline_ties():
    """Rewards that all tie: nothing to rank for DPO (0), equal weights for both regressions."""
    log_probs, old, ref, rewards = random_inputs(3)
    tied = torch.ones_like(rewards)
    assert prdp.dpo_loss(log_probs, old, ref, tied, 0.1, 1.0) == 0
    for loss in (prdp.rwr_loss, prdp.rwr_sparse_loss):
        assert loss(log_probs, old, ref, tied, 0.1, 1.0).item() == pytest.approx(
            -log_probs.mean().item()
        )


def test_baseline_advantages():
    """Three epochs against lists kept by hand: the last 32 rewards of each prompt once there are 16, else the epoch's."""
    import random
    import statistics

    random.seed(0)
    history, by_hand = {}, {}
    kinds_seen = set()
    for _ in range(12):
        prompts = [random.choice("abc") for _ in range(2)]
        rewards = [random.gauss(0, 1) for _ in range(10)]
        ours, latest = prdp.advantages(torch.tensor(rewards), prompts, dict(history), "per-prompt")
        overall, _ = prdp.advantages(torch.tensor(rewards), prompts, dict(history), "global")
        history |= latest
        for n, prompt in enumerate(prompts):
            by_hand.setdefault(prompt, []).extend(rewards[5 * n : 5 * n + 5])
        for i, reward in enumerate(rewards):
            known = by_hand[prompts[i // 5]][-32:]
            own = len(known) >= 16
            kinds_seen.add((own, len(known) == 32))
            for result, values in ((ours, known if own else rewards), (overall, rewards)):
                expected = (reward - statistics.fmean(values)) / (statistics.pstdev(values) + 1e-6)
                assert result[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert kinds_seen == {(False, False), (True, False), (True, True)}


def test_baseline_names():
    (choices,) = (
        f.metadata["argparse"]["choices"]
        for f in prdp.dataclasses.fields(prdp.Config)
        if f.name == "loss"
    )
    assert tuple(prdp.LOSSES) == choices


@pytest.mark.parametrize("name", ["ddpo", "ddpo-sf", "rwr", "rwr-sparse", "dpo"])
def test_baseline_runs_and_resumes(tiny_sd, tmp_path, capsys, name):
    """Every loss through the command line; stopped in the middle and resumed it is the uninterrupted run, to the bit,
    DDPO's running statistics included."""
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--loss",
        name,
        "--prompts-per-epoch",
        "1",
        "--images-per-prompt",
        "6",
    ]
    flags += ["--updates-per-epoch", "1"] if name == "ddpo-sf" else []
    (tmp_path / "p.txt").write_text("a red star\na blue star\n")
    flags += ["--prompts", str(tmp_path / "p.txt"), "--epochs", "8"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_cli(*flags, "--out", str(whole), capsys=capsys)[0] == 0
    assert run_cli(*flags, "--epochs", "5", "--out", str(run), capsys=capsys)[0] == 0
    assert run_cli("--resume", str(run), "--epochs", "8", capsys=capsys)[0] == 0
    assert_same_run(whole, run)
    history = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["history"]
    assert (max(map(len, history.values())) >= 16) if name.startswith("ddpo") else not history


# ------------------------------------------------------------------------------------------------ ablations


def test_ablation_shared_initial_noise(tiny_sd):
    """Images of a prompt begin at one x_T, of other prompts at others, and go different ways from there."""
    config = tiny_config(tiny_sd, share_initial_noise=True)
    models = prdp.load_models(config, CPU)
    latents = prdp.collect(
        config, models, 1, ["a red star", "a red star"], {}
    ).trajectories.latents.unflatten(0, (2, -1))
    start = latents[:, :, 0].flatten(2)
    assert torch.equal(start, start[:, :1].expand_as(start)) and not torch.equal(start[0], start[1])
    plain = prdp.collect(
        prdp.dataclasses.replace(config, share_initial_noise=False),
        models,
        1,
        ["a red star"] * 2,
        {},
    )
    drawn = plain.trajectories.latents[:, 0].flatten(
        1
    )  # the first noise of each image's own generator, used for x_1 here
    assert not (start.flatten(0, 1).unsqueeze(1) == drawn).all(-1).any()
    noise = latents[:, :, 1].flatten(0, 1).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise)
    shown = prdp.collect(config, models, 0, ["a red star"], {}).trajectories.latents[:, 0]
    assert len(shown.flatten(1).unique(dim=0)) == len(shown)


def test_ablation_offline(tiny_sd):
    """After an update the trajectories are still the pretrained model's; theta_old is the policy as the epoch begins."""
    config = tiny_config(tiny_sd, offline=True)
    models = prdp.load_models(config, CPU)
    with torch.no_grad():
        for p in models.policy.unet.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    batch = prdp.collect(config, models, 2, ["a red star"], {})
    base = prdp.collect(config, models._replace(policy=models.reference), 2, ["a red star"], {})
    assert torch.equal(batch.trajectories.latents, base.trajectories.latents)
    assert torch.equal(batch.log_probs_ref, base.trajectories.log_probs)
    policy = prdp.score_trajectories(models.policy, base.trajectories)
    assert torch.equal(batch.trajectories.log_probs, policy) and not torch.equal(
        policy, batch.log_probs_ref
    )
    online = prdp.collect(
        prdp.dataclasses.replace(config, offline=False), models, 2, ["a red star"], {}
    )
    assert not torch.equal(online.trajectories.latents, base.trajectories.latents)


# ------------------------------------------------------------------------------------------------ rewards


def test_reward_that_is_not_finite_stops_the_run_before_any_update(tiny_sd, tmp_path, capsys):
    """In the second epoch, naming reward, prompt and epoch; the first epoch's checkpoint stays."""
    code = "calls = []\ndef r(images, prompts):\n    calls.append(1)\n    bad = len(calls) == 3\n"
    (tmp_path / "mine.py").write_text(
        code + "    return [float('nan') if bad else float(i) for i in range(len(prompts))]\n"
    )
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--reward",
        f"{tmp_path}/mine.py:r",
        "--out",
        str(tmp_path / "run"),
    ]
    exit_code, message = run_cli(*flags, capsys=capsys)
    assert (
        exit_code == 2
        and "epoch 2: reward r returned nan for the prompt 'a" in message
        and message.count("\n") == 1
    )
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["epoch"] == 1


def test_reward_components_are_logged(tiny_sd, tmp_path, capsys):
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--reward",
        "incompressibility=3,compressibility=1",
        "--epochs",
        "1",
    ]
    prdp.main([*flags, "--out", str(tmp_path / "run")])
    assert "reward_mean/compressibility" in capsys.readouterr().out
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    kilobytes = row["reward_mean/incompressibility"]
    assert kilobytes == -row["reward_mean/compressibility"] and row["reward_mean"] == pytest.approx(
        2 * kilobytes
    )


# ------------------------------------------------------------------------------------------------ settings, prompts, command line


def test_presets_equal_table_4():
    """E, K, N, B, beta, T, epsilon, guidance, gradient clipping, learning rate, weight decay: as printed in the paper."""
    table = {
        "small": (100, 10, 32, 16, 3e-5, 50, 1e-6, 5.0, 1.0, 1e-5, 1e-4),
        "large": (1000, 1, 64, 8, 3e-6, 50, 1e-4, 5.0, 1.0, 7e-6, 1e-4),
        "multi": (1000, 1, 64, 8, 3e-5, 50, 1e-4, 5.0, 1.0, 1e-5, 1e-4),
    }
    for preset, row in table.items():
        c = prdp.parse_args(["--preset", preset])
        assert row == (
            c.epochs, c.updates_per_epoch, c.prompts_per_epoch, c.images_per_prompt, c.kl_weight, c.ddpm_steps, c.clip_range,
            c.guidance_scale, c.max_grad_norm, c.learning_rate, c.weight_decay,
        )  # fmt: skip
    assert prdp.parse_args([]) == prdp.parse_args(["--preset", "small"])
    assert prdp.parse_args(["--preset", "large", "--epochs", "3"]).epochs == 3
    assert prdp.parse_args(["--clip-range", "inf"]).clip_range == math.inf


def test_prompt_files(tmp_path):
    cases = {
        "a.txt": "\ufeff# comment\r\na cat\r\n\r\n  a dog \r\na cat\r\n",
        "a.json": json.dumps(["a cat", {"prompt": "a dog", "image": 3}, {"prompt": "a cat"}]),
        "a.jsonl": '{"caption": "a cat"}\n\n"a dog"\n',
    }
    for name, text in cases.items():
        (tmp_path / name).write_bytes(text.encode())
        assert prdp.load_prompts(str(tmp_path / name)) == ["a cat", "a dog"]


def test_prompt_files_that_are_odd(tmp_path):
    """Line separators that JSON strings may hold, upper case suffixes, 100,000 lines with repeats."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028cat"}\n"a dog"\n', encoding="utf-8")
    assert prdp.load_prompts(str(tmp_path / "a.jsonl")) == ["a\u2028cat", "a dog"]
    (tmp_path / "A.JSON").write_text('["a cat"]')
    assert prdp.load_prompts(str(tmp_path / "A.JSON")) == ["a cat"]
    (tmp_path / "long.txt").write_text("".join(f"prompt {i % 60_000}\n" for i in range(100_000)))
    assert len(prdp.load_prompts(str(tmp_path / "long.txt"))) == 60_000


def test_shipped_prompts():
    animals, names = (
        prdp.load_prompts(str(ROOT / "prompts" / f"{n}.txt")) for n in ("animals", "animal_names")
    )
    assert len(animals) == len(names) == 45 and animals == [
        f"A painting of a {name}" for name in names
    ]
    seen, unseen = (
        prdp.load_prompts(str(ROOT / "prompts" / f"{n}.txt")) for n in ("shapes", "shapes_unseen")
    )
    assert len(seen) + len(unseen) == 6 * 8 * 7 and not set(seen) & set(unseen)


def test_prompts_are_drawn_independently_and_uniformly(tiny_sd):
    config = tiny_config(tiny_sd, prompts_per_epoch=1000)
    drawn = prdp.draw_prompts(config, PROMPTS, 1)
    assert drawn == prdp.draw_prompts(config, PROMPTS, 1) != prdp.draw_prompts(config, PROMPTS, 2)
    assert all(250 < drawn.count(p) < 420 for p in PROMPTS)
    few = tiny_config(tiny_sd, prompts_per_epoch=3)
    assert any(
        len(set(prdp.draw_prompts(few, PROMPTS, epoch))) < 3 for epoch in range(1, 20)
    )  # with replacement


def test_import_needs_torch_alone_and_does_nothing(tmp_path):
    code = (
        "import sys\n"
        "for name in ('numpy', 'diffusers', 'transformers', 'triton', 'PIL', 'matplotlib', 'tqdm', 'peft'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import prdp\n"
        "print('silent')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "silent\n", done.stderr
    assert not list(tmp_path.iterdir())


def run_cli(*arguments: str, capsys) -> tuple[int, str]:
    """Exit code and stderr of `python prdp.py ARGUMENTS`, in this process."""
    import signal

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    try:
        prdp.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, capsys.readouterr().err


def test_cli_run_folder(tiny_sd, tmp_path, capsys):
    """A run of two epochs of the toy's settings leaves everything the README promises, and a pipeline that diffusers loads."""
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "run"
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--epochs",
        "2",
        "--images-per-prompt",
        "4",
        "--microbatch",
        "8",
    ]
    flags += ["--out", str(out)]
    assert run_cli(*flags, capsys=capsys)[0] == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    promised = (
        "epoch reward_mean reward_std loss clip_fraction skipped_fraction log_ratio_old log_ratio_ref grad_norm images_per_second "
        "seconds_sample seconds_reference seconds_reward seconds_score seconds_update"
    )
    for row in rows:
        assert set(promised.split()) <= set(row) and all(
            math.isfinite(value) for value in row.values()
        )
    assert rows[0]["log_ratio_ref"] == 0 != rows[1]["log_ratio_ref"]
    for name in (
        "config.json",
        "reward.png",
        "before_after.png",
        "checkpoint/state.pt",
        "samples/epoch_0000.png",
        "samples/epoch_0002.png",
    ):
        assert (out / name).stat().st_size > 0
    assert not list(out.glob("**/*.tmp"))
    pipe = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert all(
        torch.equal(value, state["unet"][name]) for name, value in pipe.unet.state_dict().items()
    )
    code, message = run_cli(*flags, capsys=capsys)
    assert code == 2 and "already in use" in message


def test_cli_prompt_with_mathematics_and_a_scheduler_of_another_kind(tiny_sd, tmp_path, capsys):
    """A prompt with dollar signs is drawn as it stands. And a model whose scheduler config leaves set_alpha_to_one open is
    saved with the schedule it was trained on, whatever the default of diffusers."""
    import shutil

    from diffusers import StableDiffusionPipeline

    model = shutil.copytree(tiny_sd, tmp_path / "sd")
    config = {
        "_class_name": "EulerDiscreteScheduler",
        **{k: SD14_SCHEDULER[k] for k in ("beta_start", "beta_end", "beta_schedule")},
    }
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "p.txt").write_text("a $x_{$ red circle\n" + "red " * 30 + "\n")
    flags = [
        *SMALL_RUN,
        "--model",
        str(model),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--epochs",
        "1",
    ]
    prdp.main([*flags, "--out", str(tmp_path / "run")])
    assert "warning: 1 prompts are longer than 16 tokens" in capsys.readouterr().out
    scheduler = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").scheduler
    scheduler.set_timesteps(50)
    sigma = scheduler._get_variance(1, -19) ** 0.5
    assert sigma.item() == pytest.approx(prdp.ddpm_schedule(config, 50).sigma[-1].item(), rel=1e-4)


def test_cli_small_preset_on_a_tiny_model(tiny_sd, tmp_path, capsys):
    """The small-scale column of Table 4 as it stands, for one epoch, but for the steps and images that would take hours."""
    flags = [
        "--reward",
        "incompressibility",
        "--prompts",
        str(ROOT / "prompts" / "animals.txt"),
        "--model",
        tiny_sd,
        "--epochs",
        "1",
    ]
    flags += ["--ddpm-steps", "5", "--prompts-per-epoch", "4", "--out", str(tmp_path / "run")]
    assert run_cli(*flags, capsys=capsys)[0] == 0
    (row,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert row["clip_fraction"] > 0.1 and row["skipped_fraction"] > 0


SMALL_RUN = [
    "--preset", "toy", "--reward", "incompressibility", "--updates-per-epoch", "2", "--prompts-per-epoch", "2",
    "--images-per-prompt", "2", "--microbatch", "2", "--ddpm-steps", "3", "--seed", "3",
]  # fmt: skip


def weights_of(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)["unet"]


def metrics_of(run: Path) -> list[dict]:
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "images_per", "peak"))}
        for row in rows
    ]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics_of(a) == metrics_of(b)
    ours, theirs = weights_of(a), weights_of(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resume_equals_the_uninterrupted_run(tiny_sd, tmp_path, capsys):
    """To the bit, weights and metrics; a line of metrics that outlived its checkpoint, torn in the middle, leaves no trace."""
    flags = [*SMALL_RUN, "--model", tiny_sd]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_cli(*flags, "--epochs", "3", "--out", str(whole), capsys=capsys)[0] == 0
    assert run_cli(*flags, "--epochs", "1", "--out", str(halves), capsys=capsys)[0] == 0
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "reward_me')
    assert run_cli("--resume", str(halves), "--epochs", "3", capsys=capsys)[0] == 0
    assert_same_run(whole, halves)
    assert (whole / "samples" / "epoch_0003.png").read_bytes() == (
        halves / "samples" / "epoch_0003.png"
    ).read_bytes()


def test_resume_of_a_damaged_checkpoint(tiny_sd, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(run), capsys=capsys)[
            0
        ]
        == 0
    )
    state = run / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    code, message = run_cli("--resume", str(run), capsys=capsys)
    assert code == 2 and f"{state}: damaged" in message and message.count("\n") == 1


def test_resume_refuses_what_would_change_the_result(tiny_sd, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert (
        run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", run, capsys=capsys)[0]
        == 0
    )
    for flag, value, saved in (
        ("--kl-weight", "1", 3e-5),
        ("--seed", "4", 3),
        ("--dtype", "bf16", "fp32"),
    ):
        code, message = run_cli("--resume", run, flag, value, capsys=capsys)
        assert code == 2 and flag in message and str(saved) in message and message.count("\n") == 1
    assert (
        run_cli("--resume", run, "--seed", "3", "--epochs", "1", "--offload", "on", capsys=capsys)[
            0
        ]
        == 0
    )


def start(*arguments: str, launcher: tuple[str, ...] = (), **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(ROOT / "prdp.py"), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_resume_after_a_stop_signal(tiny_sd, tmp_path, capsys, name, exit_code):
    """Ctrl-C and SIGTERM stop between two passes; --save-every 100 notwithstanding, a resumed run is the uninterrupted one."""
    import signal
    import time

    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [*SMALL_RUN, "--model", tiny_sd, "--save-every", "100"]
    process = start(*flags, "--epochs", "1000", "--out", str(run))
    for _ in range(600):
        time.sleep(0.1)
        if (run / "metrics.jsonl").exists() and len(
            (run / "metrics.jsonl").read_text().splitlines()
        ) >= 2:
            break
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == exit_code
        and f"python prdp.py --resume {run}" in errors
        and "Traceback" not in errors
    )
    epochs = str(len(metrics_of(run)) + 2)
    assert run_cli("--resume", str(run), "--epochs", epochs, capsys=capsys)[0] == 0
    assert run_cli(*flags, "--epochs", epochs, "--out", str(whole), capsys=capsys)[0] == 0
    assert_same_run(whole, run)


KILLER = """
import os, random, signal, sys, time
root, whole, folder, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torch
torch.set_num_threads(1)
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from matplotlib.figure import Figure
import matplotlib.backends.backend_agg
import prdp


def launch(arguments):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        prdp.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


started = time.time()
assert os.waitpid(launch([*flags, "--out", whole]), 0)[1] == 0
duration, kills, runs = time.time() - started, 0, 0
random.seed(0)
while kills < 20:
    out = os.path.join(folder, str(runs))
    while True:
        fresh = not os.path.exists(os.path.join(out, "config.json"))
        pid = launch([*flags, "--out", out] if fresh else ["--resume", out])
        if kills < 20:
            time.sleep(random.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert os.WEXITSTATUS(status) == 0, status
            break
    runs += 1
print(kills, runs)
"""


def test_kill_at_20_random_moments(tiny_sd, tmp_path):
    """kill -9, in whatever phase a run is, then --resume: the weights and metrics of every run are the undisturbed one's."""
    flags = [*SMALL_RUN, "--model", tiny_sd, "--epochs", "6", "--sample-every", "2"]
    (tmp_path / "runs").mkdir()
    command = [
        sys.executable,
        "-c",
        KILLER,
        str(ROOT),
        str(tmp_path / "whole"),
        str(tmp_path / "runs"),
        *flags,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, runs = map(int, done.stdout.split()[-2:])
    assert kills == 20 and runs >= 1
    for run in range(runs):
        assert_same_run(tmp_path / "whole", tmp_path / "runs" / str(run))


def test_resume_after_a_full_disk(tiny_sd, tmp_path, capsys):
    """A checkpoint that cannot be written is one sentence, and the one before it still works."""
    import resource

    run = tmp_path / "run"
    assert (
        run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(run), capsys=capsys)[
            0
        ]
        == 0
    )
    before = (run / "checkpoint" / "state.pt").read_bytes()
    limit = len(before) // 2
    process = start(
        "--resume",
        str(run),
        "--epochs",
        "2",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert errors.startswith("prdp.py: ") and errors.endswith(
        "File too large; what was saved is intact.\n"
    )
    assert (run / "checkpoint" / "state.pt").read_bytes() == before
    assert run_cli("--resume", str(run), "--epochs", "2", capsys=capsys)[0] == 0
    assert [row["epoch"] for row in metrics_of(run)] == [1, 2]


def test_resume_while_another_process_runs_there(tiny_sd, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(run), capsys=capsys)[
            0
        ]
        == 0
    )
    held = prompts.report.hold(run)
    code, message = run_cli("--resume", str(run), capsys=capsys)
    assert code == 2 and "another process is running there" in message and message.count("\n") == 1
    held.close()
    assert run_cli("--resume", str(run), capsys=capsys)[0] == 0


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.fixture(scope="module")
def finished_run(tiny_sd, tmp_path_factory) -> Path:
    """A run of the tiny model that moved it, 16x16 pictures and their JPEG sizes."""
    run = tmp_path_factory.mktemp("runs") / "run"
    torch.set_num_threads(1)
    prdp.main(
        [
            *SMALL_RUN,
            "--model",
            tiny_sd,
            "--epochs",
            "2",
            "--learning-rate",
            "1e-3",
            "--out",
            str(run),
        ]
    )
    return run


def prompt_files(folder: Path) -> list[str]:
    (folder / "seen.txt").write_text("a red star\na blue ring\na green cross\n")
    (folder / "unseen.txt").write_text("a white square\na black circle\n")
    return [str(folder / "seen.txt"), str(folder / "unseen.txt")]


def test_evaluate_is_the_pipelines_own_images_scored(finished_run, tiny_sd, tmp_path, capsys):
    """Every reward in evaluation.json is that of the picture diffusers' own pipeline draws from the same noise, for base
    and finetuned model; the table is numpy's of them; and it is printed."""
    import io

    from diffusers import StableDiffusionPipeline
    from PIL import Image

    files = prompt_files(tmp_path)
    flags = ["--evaluate", str(finished_run), "--prompts", *files, "--samples-per-prompt", "4"]
    assert prdp.main(flags) is None
    printed = capsys.readouterr().out
    record = json.loads((finished_run / "evaluation" / "evaluation.json").read_text())
    assert (finished_run / "evaluation" / "evaluation.png").stat().st_size > 10_000
    shown = [(finished_run / "samples" / f"epoch_{n:04d}.json").read_text() for n in (0, 2)]
    assert shown[0] != shown[1]  # the run itself shows the base first, the finetuned model last
    (schedule,) = {json.loads((finished_run / "config.json").read_text())["ddpm_steps"]}
    for model, folder in (("base", tiny_sd), ("finetuned", finished_run / "pipeline")):
        pipe = StableDiffusionPipeline.from_pretrained(
            finished_run / "pipeline"
        )  # for its scheduler
        pipe.unet = StableDiffusionPipeline.from_pretrained(folder).unet
        pipe.set_progress_bar_config(disable=True)
        for n, prompt in enumerate(prdp.load_prompts(files[0])):
            generators = prdp.image_generators(3, 0, [n], 4)
            start = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
            images = pipe(
                [prompt] * 4, num_inference_steps=schedule, guidance_scale=5.0, eta=1.0, generator=generators,
                latents=start, height=16, width=16,
            ).images  # fmt: skip
            sizes = []
            for image in images:
                image.save(buffer := io.BytesIO(), "JPEG", quality=95)
                sizes.append(buffer.tell() / 1000)
            assert isinstance(images[0], Image.Image)
            assert record["rewards"][model][files[0]][prompt] == pytest.approx(
                sizes, abs=0.02
            )  # a grey level, rarely
    for file in files:
        base, finetuned = (
            np.array(list(record["rewards"][m][file].values())) for m in ("base", "finetuned")
        )
        row = record["table"][file]
        for name, x in (("base", base), ("finetuned", finetuned), ("difference", finetuned - base)):
            assert row[name]["mean"] == pytest.approx(x.mean(), rel=1e-6, abs=1e-7)
            assert row[name]["standard_error"] == pytest.approx(
                x.mean(1).std(ddof=1) / len(x) ** 0.5, rel=1e-5
            )
            assert f"{x.mean():.4f} +- " in printed
        assert row["win rate"] == pytest.approx(
            np.mean((finetuned > base) + 0.5 * (finetuned == base)), abs=1e-6
        )
    assert not torch.equal(torch.tensor(base), torch.tensor(finetuned))


def test_evaluate_goes_on_where_it_was_stopped(finished_run, tmp_path, capsys, monkeypatch):
    """Ctrl-C at the third chunk, twice: what was drawn is not drawn again, and the end is that of one go, to the bit."""
    files, collect, drawn = prompt_files(tmp_path), prdp.collect, []

    def counted(*arguments, **options):
        drawn.append(arguments)
        if len(drawn) == limit[0]:
            raise KeyboardInterrupt
        return collect(*arguments, **options)

    monkeypatch.setattr(prdp, "collect", counted)
    flags = [
        "--evaluate",
        str(finished_run),
        "--prompts",
        *files,
        "--samples-per-prompt",
        "2",
        "--microbatch",
        "2",
    ]
    limit = [math.inf]
    assert run_cli(*flags, "--out", str(tmp_path / "whole"), capsys=capsys) == (0, "")
    in_one_go, codes, calls = len(drawn), [], []
    for limit[0] in (3, 3, math.inf):
        drawn.clear()
        codes.append(run_cli(*flags, "--out", str(tmp_path / "parts"), capsys=capsys)[0])
        calls.append(len(drawn))
    assert codes == [130, 130, 0] and calls == [
        3,
        3,
        in_one_go - 3,
    ]  # the pictures to show are drawn anew
    whole, parts = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["rewards"] == parts["rewards"] and whole["table"] == parts["table"]


def test_evaluate_a_folder_against_itself(tiny_sd, tmp_path, capsys):
    """No run needed: any two models; of one and the same the difference is exactly nothing, and half the pairs are won."""
    files = prompt_files(tmp_path)
    common = [
        "--reward",
        "compressibility",
        "--ddpm-steps",
        "5",
        "--prompts",
        files[1],
        "--samples-per-prompt",
        "3",
    ]
    flags = ["--evaluate", tiny_sd, "--against", tiny_sd, *common, "--out", str(tmp_path / "out")]
    assert run_cli(*flags, capsys=capsys) == (0, "")
    (row,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["table"].values()
    assert row["difference"] == {"mean": 0.0, "standard_error": 0.0} and row["win rate"] == 0.5
    alone = ["--evaluate", tiny_sd, *common, "--out", str(tmp_path / "alone")]
    assert run_cli(*alone, capsys=capsys) == (0, "")
    (only,) = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["table"].values()
    assert only == {"finetuned": row["finetuned"]}


def test_evaluate_bad_input(finished_run, tiny_sd, tmp_path, capsys, monkeypatch):
    """Other settings in the same folder; a run that is not over; --model beside --evaluate; a second model that is none,
    before the first is drawn from; torchrun."""
    file = prompt_files(tmp_path)[1]
    flags = [
        "--evaluate",
        str(finished_run),
        "--prompts",
        file,
        "--samples-per-prompt",
        "2",
        "--out",
        str(tmp_path / "e"),
    ]
    assert run_cli(*flags, capsys=capsys) == (0, "")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_bytes((finished_run / "config.json").read_bytes())
    for changed, sentence in (
        ([*flags, "--seed", "9"], "holds an evaluation with another seed; choose another folder"),
        ([*flags, "--model", tiny_sd], "--model: --evaluate names the model"),
        ([*flags, "--samples-per-prompt", "1"], "--samples-per-prompt 1: must be at least 2"),
        (
            ["--evaluate", str(tmp_path / "young")],
            "has no pipeline/ yet; finish the run with --resume",
        ),
        (
            [*flags[:-1], str(tmp_path / "f"), "--evaluate", str(tmp_path)],
            "no Stable Diffusion folder in diffusers",
        ),
    ):
        code, message = run_cli(*changed, "--against", tiny_sd, capsys=capsys)
        assert code == 2 and sentence in message and message.count("\n") == 1
    assert not (tmp_path / "f" / "evaluation.json").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, message = run_cli(*flags, capsys=capsys)
    assert code == 2 and "--evaluate: runs in one process" in message


def test_progress_bars_leave_no_threads():
    """A run of 1,000 epochs makes some 10,000 of them."""
    before = threading.active_count()
    for _ in range(20):
        with prompts.report.progress("sample", 2) as bar:
            bar.update(2)
    assert threading.active_count() == before


def test_over_optimisation_is_warned_of_once(tmp_path, capsys):
    """When the distance to the reference passes the threshold with a reward above the first epoch's: not before, not twice,
    and not where the reward fell."""
    base = {"reward_std": 0.1, **dict.fromkeys(prompts.report.COLUMNS[3:], 0.0)}
    for folder, heights in (
        ("rises", [0.3, 0.4, 0.2, 0.5, 0.6]),
        ("falls", [0.3, 0.2, 0.2, 0.1, 0.1]),
    ):
        (tmp_path / folder).mkdir()
        warned = []
        for epoch, (reward, distance) in enumerate(
            zip(heights, (0.0, 9.0, 11.0, 12.0, 30.0), strict=True), 1
        ):
            metrics = {**base, "epoch": epoch, "reward_mean": reward, "log_ratio_ref": distance}
            prompts.report.log_epoch(tmp_path / folder, metrics, header=False, log_to="")
            warned.append("over-optimisation" in capsys.readouterr().out)
        assert warned == [False, False, False, folder == "rises", False]


WANDB = """
lines = []
class Run:
    def log(self, metrics):
        lines.append(metrics)
def init(**settings):
    return Run()
"""


def test_cli_checks_the_policy_itself(tiny_sd, tmp_path, capsys, monkeypatch):
    """A policy that is not quite the reference at the start stops the run."""
    load = prdp.load_models

    def off(*arguments):
        models = load(*arguments)
        with torch.no_grad():
            models.policy.unet.conv_out.bias += 1e-6
        return models

    monkeypatch.setattr(prdp, "load_models", off)
    code, message = run_cli(
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
        capsys=capsys,
    )
    assert code == 2 and "the policy scores its own trajectory" in message


def test_cli_one_image_per_prompt(tiny_sd, tmp_path, capsys):
    """As DDPO samples in the large: B = 1, to the last picture."""
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--loss",
        "ddpo",
        "--images-per-prompt",
        "1",
        "--epochs",
        "1",
    ]
    assert run_cli(*flags, "--out", str(tmp_path / "run"), capsys=capsys)[0] == 0
    assert (tmp_path / "run" / "before_after.png").is_file()


def broken_backend(*_):
    raise ValueError("no such chip")


@pytest.mark.parametrize(("error", "sentence"), [
    (lambda: torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory: try --offload on, or in a new run --microbatch 1,"),
    (lambda: torch._inductor.exc.InvalidCxxCompiler(), "--compile: failed (No working C++ compiler found"),
    (lambda: torch.compile(torch.sin, backend=broken_backend)(torch.ones(1)), "--compile: failed (backend='broken_backend' raised: ValueError: no such"),
])  # fmt: skip
def test_cli_out_of_memory_and_compiler_errors(
    tiny_sd, tmp_path, capsys, monkeypatch, error, sentence
):
    """In one sentence; any other RuntimeError is a mistake of ours, and keeps its traceback."""

    def fails(*_):
        raise error()

    monkeypatch.setattr(prdp, "backward_trajectories", fails)
    flags = [*SMALL_RUN, "--model", tiny_sd, "--out"]
    code, message = run_cli(*flags, str(tmp_path / "run"), capsys=capsys)
    assert code == 2 and message.startswith(f"prdp.py: {sentence}") and message.count("\n") == 1
    monkeypatch.setattr(prdp, "backward_trajectories", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent"):
        run_cli(*flags, str(tmp_path / "other"), capsys=capsys)


def test_log_to(tiny_sd, tmp_path, capsys, monkeypatch):
    """Every epoch's metrics go to wandb as they go to metrics.jsonl; what is not installed is named in a sentence."""
    flags = [*SMALL_RUN, "--model", tiny_sd, "--epochs", "2", "--log-to"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, message = run_cli(*flags, "tensorboard", "--out", str(tmp_path / "none"), capsys=capsys)
    assert (
        code == 2
        and message == "prdp.py: --log-to tensorboard: not installed; pip install tensorboard.\n"
    )
    monkeypatch.undo()
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    prompts.report.open_log.cache_clear()
    assert run_cli(*flags, "wandb", "--out", str(tmp_path / "run"), capsys=capsys)[0] == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sys.modules.pop("wandb").lines == lines


def test_claims_quick(tmp_path):
    """One seed of every experiment at tiny size, with its figures; the committed results stay as they are."""
    committed = {
        p: p.read_bytes() for p in (ROOT / "toy").glob("claim*") if p.suffix in (".json", ".png")
    }
    command = [
        sys.executable,
        str(ROOT / "toy" / "claims.py"),
        "--quick",
        "--jobs",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    book = json.loads((tmp_path / "claims.json").read_text())
    assert sorted(book["claims"]) == list("123456")
    assert {entry["verdict"] for entry in book["claims"].values()} == {"one seed: no verdict"}
    assert all((tmp_path / f"claim{n}.png").stat().st_size > 5000 for n in range(1, 7))
    assert committed == {p: p.read_bytes() for p in committed}


# ------------------------------------------------------------------------------------------------ several processes


def torchrun(*arguments: str, timeout: float = 100) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of two gloo processes."""
    process = start(
        *arguments,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    out, errors = process.communicate(timeout=timeout)
    return process.returncode, out, errors


@pytest.mark.parametrize(
    "changes", [[], ["--loss", "ddpo", "--lora-rank", "2", "--images-per-prompt", "8"]]
)
def test_distributed_equals_one_process(tiny_sd, tmp_path, capsys, changes):
    """Two processes draw the same images to the bit, and take the same steps to rounding; DDPO's statistics of a prompt and
    the adapters' start are the same in both. What one process began two go on with."""
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--epochs",
        "2",
        "--updates-per-epoch",
        "1",
        "--learning-rate",
        "1e-5",
        *changes,
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_cli(*flags, "--out", str(one), capsys=capsys)[0] == 0
    code, out, errors = torchrun(*flags, "--out", str(two))
    assert code == 0, errors
    assert out.count("on-policy gap of the policy") == 1 and "2 process(es)" in out
    assert (one / "samples" / "epoch_0000.png").read_bytes() == (
        two / "samples" / "epoch_0000.png"
    ).read_bytes()
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-6 if a["epoch"] == 1 else 2e-2), name
    ours, theirs = weights_of(one), weights_of(two)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=2e-7)
    histories = [
        torch.load(run / "checkpoint" / "state.pt", weights_only=True)["history"]
        for run in (one, two)
    ]
    assert histories[0] == histories[1] and bool(histories[0]) == bool(changes)
    if changes:
        code, _, errors = torchrun("--resume", str(one), "--epochs", "3")
        assert code == 0, errors
        assert [row["epoch"] for row in metrics_of(one)] == [1, 2, 3]


TWO_FACED = """
import os
calls = []
def tied(images, prompts):
    return [0.0 if os.environ["RANK"] == "1" else float(i) for i in range(len(prompts))]
def fails(images, prompts):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        return [float("nan")] * len(prompts)
    return [float(i) for i in range(len(prompts))]
"""


def test_distributed_processes_may_skip_different_entries(tiny_sd, tmp_path):
    """All rewards of one process tie, so that it has nothing to run: the other does not wait for it."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--epochs",
        "1",
        "--reward",
        f"{tmp_path / 'r.py'}:tied",
    ]
    code, _, errors = torchrun(*flags, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    assert metrics_of(tmp_path / "run")[0]["skipped_fraction"] >= 0.5


def test_distributed_failure_of_one_stops_all(tiny_sd, tmp_path):
    """Within a minute, with the failing process's own sentence; the last checkpoint is there."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = [
        *SMALL_RUN,
        "--model",
        tiny_sd,
        "--epochs",
        "50",
        "--reward",
        f"{tmp_path / 'r.py'}:fails",
    ]
    code, _, errors = torchrun(*flags, "--out", str(tmp_path / "run"), timeout=60)
    assert (
        code != 0
        and "prdp.py (process 1): epoch 2: reward fails returned nan for the prompt" in errors
    )
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["epoch"] == 1


BAD_INPUT = [
    (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--prompts", "{empty}"], "holds no prompt"),
    (["--prompts", "{broken}"], "cannot be read as .json"),
    (["--prompts", "{numbers}"], "entry 2 is neither"),
    (["--prompts", "{latin}"], "cannot be read as .txt"),
    (["--prompts", "{table}"], "must be .txt, .json or .jsonl"),
    (["--prompts", "{object}"], "must hold a list of prompts"),
    (["--prompts", "{lines}"], "cannot be read as .jsonl"),
    (["--updates-per-epoch", "0"], "--updates-per-epoch 0: must be at least 1"),
    (["--prompts-per-epoch", "0"], "--prompts-per-epoch 0: must be at least 1"),
    (["--microbatch", "0"], "--microbatch 0: must be at least 1"),
    (["--save-every", "0"], "--save-every 0: must be at least 1"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--weight-decay", "-0.1"], "--weight-decay -0.1: must be at least 0"),
    (["--guidance-scale", "-1"], "--guidance-scale -1.0: must be at least 0"),
    (["--max-grad-norm", "0"], "--max-grad-norm 0.0: must be greater than 0"),
    (["--ddpm-steps", "600"], "--ddpm-steps 600: does not divide"),
    (["--model", "{latin}"], "no Stable Diffusion folder"),
    (["--model", "{sdxl}"], "a StableDiffusionXLPipeline; only Stable Diffusion 1.x and 2.x"),
    (["--model", "{flux}"], "a FluxPipeline; only Stable Diffusion 1.x and 2.x"),
    (["--out", "{latin}/run"], "run: Not a directory"),
    (["--out", "{latin}"], "already in use"),
    (["--resume", "{torn}"], "config.json: damaged"),
    (["--resume", "{retyped}"], "--epochs '40': must be as in --help"),
    (["--resume", "{unknown}"], "--dtype 'fp8': must be as in --help"),
    (["--offload", "maybe"], "invalid choice: 'maybe'"),
    (["--reward", "x.py"], "no reward 'x.py'"),
    (["--reward", "beauty"], "no reward 'beauty'; choose from hpsv2"),
    (["--reward", "incompressibility=x"], "'x' is no weight"),
    (["--reward", "incompressibility=nan"], "'nan' is no weight"),
    (["--reward", "incompressibility=1,incompressibility=2"], "names incompressibility twice"),
    (["--reward", "/nowhere/mine.py:f"], "mine.py:f: no such file"),
    (["--reward", "incompressibility:x"], "takes no path"),
    (["--reward", "pickscore:/nowhere"], "no such file or folder: /nowhere"),
    (["--images-per-prompt", "0"], "--images-per-prompt 0: must be at least 1"),
    (
        ["--images-per-prompt", "1", "--microbatch", "8"],
        "--images-per-prompt 1: --loss prdp compares images",
    ),
    (["--loss", "ddpo-sf"], "--loss ddpo-sf: needs --updates-per-epoch 1"),
    (["--loss", "ddpo", "--offline"], "--offline: not with ddpo, which learns from its own images"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"),
    (["--advantage", "none"], "invalid choice: 'none'"),
    (["--epochs", "0"], "--epochs 0: must be at least 1"),
    (["--epochs", "many"], "invalid int value"),
    (["--kl-weight", "0"], "--kl-weight 0.0: must be greater than 0"),
    (["--clip-range", "nan"], "--clip-range nan: must be greater than 0"),
    (["--learning-rate", "-1"], "--learning-rate -1.0: must be greater than 0"),
    (["--microbatch", "7"], "--microbatch 7: must divide the 64 images"),
    (
        ["--ddpm-steps", "1001"],
        "--ddpm-steps 1001: does not divide the model's 1000 training steps",
    ),
    (["--model", "/nowhere/sd"], "run --preset toy"),
    (["--model", "{empty_folder}"], "no Stable Diffusion folder in diffusers layout"),
    (["--out", "{used}"], "already in use"),
    (["--resume", "{empty_folder}"], "no config.json there"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments, sentence, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = {
        "empty": ("empty.txt", "# nothing\n\n"),
        "broken": ("b.json", "["),
        "numbers": ("n.json", '["a", 3]'),
        "latin": ("l.txt", "caf\xe9"),
        "table": ("t.csv", "prompt\na cat\n"),
        "object": ("o.json", '{"prompt": "a cat"}'),
        "lines": ("l.jsonl", '"a cat"\n{"prompt": \n'),
    }
    paths = {key: tmp_path / name for key, (name, _) in files.items()}
    for key, (_, text) in files.items():
        paths[key].write_text(text, encoding="latin-1")
    for key in ("used", "empty_folder", "sdxl", "flux", "torn", "retyped", "unknown"):
        paths[key] = tmp_path / key
        paths[key].mkdir()
    for key, kind in (("sdxl", "StableDiffusionXLPipeline"), ("flux", "FluxPipeline")):
        (paths[key] / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (paths["torn"] / "config.json").write_text('{"preset": "to')
    (paths["unknown"] / "config.json").write_text('{"dtype": "fp8"}')
    (paths["retyped"] / "config.json").write_text('{"epochs": "40", "prompts": ["p.txt"]}')
    (paths["used"] / "metrics.jsonl").write_text("precious")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    base = [] if {"--preset", "--resume"} & set(arguments) else ["--preset", "toy"]
    out = [] if "--resume" in arguments else out
    code, message = run_cli(*base, *out, *(a.format(**paths) for a in arguments), capsys=capsys)
    assert code == 2 and sentence in message
    assert (
        message.startswith("prdp.py: ") and message.count("\n") == 1 and "Traceback" not in message
    )
    assert (
        not (tmp_path / "out").exists()
        and (paths["used"] / "metrics.jsonl").read_text() == "precious"
    )
