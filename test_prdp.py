"""The paper's tests: loss, policy, trajectories, exact gradient, optimum, Table 4, Algorithm 1.

Each oracle is of another form than the code it checks: loops over pairs, closed forms, diffusers'
own samplers, autograd through the whole graph in float64. The other tests are in tests/, a file a
subject. No test needs network or GPU.
"""

import inspect
import itertools
import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.distributions import Normal

import prdp
from conftest import PROMPTS, SD14_SCHEDULER, checkpoint, draw, gradient_of
from conftest import random_inputs, tiny_config
from prdp import Policy, Schedule, Trajectories, prdp_loss
from support import report

# ---- The loss ------------------------------------------------------------------------------------


def errors_by_pair(log_probs, old, ref, rewards, clip_range, kl_weight) -> list[tuple]:
    """Alg. 1, line 10 by hand, for one prompt: (error, clipped error) of each untied pair i < j."""
    log_probs, old, ref, rewards = (x.tolist() for x in (log_probs, old, ref, rewards))
    errors = []
    for i, j in itertools.combinations(range(len(rewards)), 2):
        if rewards[i] == rewards[j]:
            continue
        predicted = clipped = 0.0
        for image, sign in ((i, 1), (j, -1)):
            for new_t, old_t, ref_t in zip(log_probs[image], old[image], ref[image], strict=True):
                moved = new_t - old_t  # Eq. 20: this is clipped, and r-hat_old added again
                moved = min(max(moved, -clip_range), clip_range)
                predicted += sign * (new_t - ref_t) / len(ref[0])
                clipped += sign * (moved + old_t - ref_t) / len(ref[0])
        target = (rewards[i] - rewards[j]) / kl_weight
        errors.append(((predicted - target) ** 2, (clipped - target) ** 2))
    return errors


def loss_by_pairs(*inputs) -> float:
    errors = errors_by_pair(*inputs)
    return sum(map(max, errors)) / len(errors) if errors else 0.0


@pytest.mark.parametrize("clip_range", [1e-6, 0.05, 0.3, math.inf])
@pytest.mark.parametrize("case", range(3))
def test_loss_equals_a_loop_over_pairs(case, clip_range):
    """And where it clips, the clipped error wins in some pairs and the other one in others."""
    inputs = random_inputs(case, 4)
    by_prompt = [(*(x[n] for x in inputs), clip_range, 0.7) for n in range(4)]
    expected = np.mean([loss_by_pairs(*prompt) for prompt in by_prompt])
    assert prdp_loss(*inputs, clip_range, 0.7).item() == pytest.approx(expected, rel=1e-12)
    errors = [pair for prompt in by_prompt for pair in errors_by_pair(*prompt)]
    assert {a == pytest.approx(b) or b > a for a, b in errors} == (
        {True} if clip_range == math.inf else {True, False}
    )


def test_loss_gradient_equals_finite_differences():
    log_probs, *rest = random_inputs(1, 2)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prdp_loss(x, *rest, 0.05, 0.7), log_probs)


def test_loss_is_zero_exactly_where_rewards_are_predicted():
    """Eqs. 13 and 15: r-hat = r / beta + c(prompt) is the optimum, whatever c."""
    _, _, ref, r = random_inputs(2, 3)
    spread = torch.randn(7, dtype=torch.float64)  # any split over steps with the right mean
    constant = torch.tensor([[5.0], [-3.0], [0.1]])
    log_probs = ref + (r / 0.7 + constant)[..., None] + spread - spread.mean()
    assert prdp_loss(log_probs, log_probs, ref, r, 1e-6, 0.7).item() < 1e-24
    assert prdp_loss(log_probs, log_probs, ref, -r, 1e-6, 0.7).item() > 1


def test_loss_ignores_a_constant_per_prompt_and_the_order():
    log_probs, old, ref, r = random_inputs(3, 4)
    expected = pytest.approx(prdp_loss(log_probs, old, ref, r, 0.1, 0.7).item(), rel=1e-12)
    shifted = r + torch.tensor([[10.0], [-4.0], [0.0], [1.0]])
    assert prdp_loss(log_probs, old, ref, shifted, 0.1, 0.7).item() == expected
    images, prompts = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 3, 1])
    permuted = (x[prompts][:, images] for x in (log_probs, old, ref, r))
    assert prdp_loss(*permuted, 0.1, 0.7).item() == expected


def test_loss_ties():
    """Tied pairs leave the mean (App. G); a prompt whose rewards all tie contributes 0, and a
    gradient of 0, not NaN."""
    log_probs, old, ref, r = random_inputs(4, 2)
    r[0, 1] = r[0, 3]
    r[1] = 2.0
    first = loss_by_pairs(*(x[0] for x in (log_probs, old, ref, r)), math.inf, 0.7)
    log_probs.requires_grad_()
    loss = prdp_loss(log_probs, old, ref, r, math.inf, 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(first / 2, rel=1e-12)
    assert log_probs.grad[0].any(-1).all()  # every image of the first prompt is in a pair
    assert (log_probs.grad[1] == 0).all()


def test_on_policy_clipping_changes_nothing():
    """K = 1: theta = theta_old at the only update, so Eq. 18 changes neither value nor gradient."""
    _, old, ref, r = random_inputs(5, 2)
    results = []
    for clip_range in (1e-6, math.inf):
        log_probs = old.clone().requires_grad_()
        loss = prdp_loss(log_probs, old, ref, r, clip_range, 0.7)
        results.append((loss.detach(), *torch.autograd.grad(loss, log_probs)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-14)


def test_sum_over_steps_is_the_mean_with_another_kl_weight():
    """loss_sum(beta) == T**2 * loss_mean(beta * T): Eqs. 10 and 21 against App. G."""
    log_probs, old, ref, r = random_inputs(6)
    steps = log_probs.shape[-1]
    ratio, old_ratio = log_probs - ref, old - ref
    clipped = ratio.clamp(old_ratio - 0.1, old_ratio + 0.1)
    total = []
    for i, j in itertools.combinations(range(len(r)), 2):
        target = (r[i] - r[j]) / 0.3
        total.append(max((x[i].sum() - x[j].sum() - target) ** 2 for x in (ratio, clipped)))
    expected = steps**2 * prdp_loss(log_probs, old, ref, r, 0.1, 0.3 * steps)
    assert torch.stack(total).mean().item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("moved", "slope"),
    [
        (0.2, 2 * (0.2 - 1)),
        (0.25, 2 * (0.25 - 1)),  # exactly at the bound both branches are the same
        (0.26, 0),  # far enough towards the target: the larger, clipped error has no slope
        (-0.3, 2 * (-0.3 - 1)),  # the wrong way: the unclipped error wins
    ],
)
def test_gradient_stops_outside_the_clip_range_and_passes_at_its_edge(moved, slope):
    """Two images, one step, r_0 - r_1 = 1: image 0 has moved by `moved`, clip_range is 0.25."""
    log_probs = torch.tensor([[moved], [0.0]], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    prdp_loss(log_probs, zeros, zeros, torch.tensor([1.0, 0.0]), 0.25, 1.0).backward()
    assert log_probs.grad[0].item() == pytest.approx(slope)


def reinforce(log_probs, ref, rewards, kl_weight, leave_one_out: bool):
    """The gradient of sum over images of advantage * log_prob, of prompts (N, B, T): the advantage
    is the KL-shaped reward minus the mean of the prompt's images, or of its other ones."""
    gradient = torch.zeros_like(log_probs)
    for n, prompt in enumerate(log_probs):
        shaped = []
        for a, image in enumerate(prompt):
            shaped.append(rewards[n, a] - kl_weight * (image - ref[n, a]).mean())
        for a in range(len(shaped)):
            compared = shaped[:a] + shaped[a + 1 :] if leave_one_out else shaped
            gradient[n, a] = (shaped[a] - sum(compared) / len(compared)) / prompt.shape[-1]
    return gradient


@pytest.mark.parametrize("kl_weight", [3e-6, 3e-5, 1.0, 30.0])
@pytest.mark.parametrize("first", [True, False])  # at K = 1, and after an update
def test_gradient_is_reinforce_on_the_kl_shaped_reward(kl_weight, first):
    """Without clip and ties: minus the gradient of REINFORCE on r - beta * log_ratio with the
    prompt's own mean as baseline, times 2 / beta and the mean over prompts and pairs; of RLOO up to
    B / (B - 1)."""
    log_probs, old, ref, rewards = random_inputs(11, 4)
    images = rewards.shape[1]
    if first:
        log_probs = old.clone()
    log_probs.requires_grad_()
    loss = prdp_loss(log_probs, old, ref, rewards, math.inf, kl_weight)
    (ours,) = torch.autograd.grad(loss, log_probs)
    factor = -2 * images / kl_weight / (len(rewards) * math.comb(images, 2))
    log_probs = log_probs.detach()
    for leave_one_out, scale in ((False, 1), (True, (images - 1) / images)):
        theirs = factor * scale * reinforce(log_probs, ref, rewards, kl_weight, leave_one_out)
        assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-12


def test_what_ties_and_the_clip_change():
    """A tied pair is left out, so the two tied images are pulled by the others alone. Where the
    clipped error wins in every pair of an image, its steps outside the clip range get no gradient,
    and elsewhere they do."""
    log_probs, old, ref, rewards = (x[0] for x in random_inputs(14, 1))
    kl_weight, images, clip_range = 0.7, len(rewards), 0.05
    rewards[1] = rewards[3]

    def gradient(clip_range: float):
        x = log_probs.clone().requires_grad_()
        loss = prdp_loss(x, old, ref, rewards, clip_range, kl_weight)
        return torch.autograd.grad(loss, x)[0]

    shaped = rewards - kl_weight * (log_probs - ref).mean(-1)
    weights = images * (shaped - shaped.mean())
    for a, b in ((1, 3), (3, 1)):
        weights[a] -= shaped[a] - shaped[b]
    pairs = math.comb(images, 2) - 1
    expected = (-2 / kl_weight / pairs * weights / log_probs.shape[-1])[:, None]
    expected = expected.expand_as(log_probs)
    torch.testing.assert_close(gradient(math.inf), expected, rtol=1e-12, atol=0)

    clipped = gradient(clip_range)
    seen = set()
    for a, image in enumerate(log_probs):
        others = [[a, b] for b in range(images) if rewards[b] != rewards[a]]
        wins = []
        for pair in others:
            two = [x[pair] for x in (log_probs, old, ref, rewards)]
            error, larger = (prdp_loss(*two, clip, kl_weight) for clip in (math.inf, clip_range))
            wins.append((larger > error).item())
        for t in range(len(image)):
            outside = (image[t] - old[a, t]).abs() > clip_range
            skipped = all(wins) and bool(outside)
            assert (clipped[a, t] == 0) == skipped
            seen.add(skipped)
    assert seen == {True, False}


@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (4,), (3, 4, 1)])
def test_loss_refuses_rewards_that_would_broadcast(shape):
    log_probs = torch.zeros(3, 4, 5)
    with pytest.raises(AssertionError):
        prdp_loss(log_probs, log_probs, log_probs, torch.zeros(shape), 0.1, 0.7)


def test_loss_can_be_pasted_elsewhere():
    """It needs torch alone."""
    namespace = {"torch": torch, "Tensor": Tensor}
    exec(inspect.getsource(prdp_loss), namespace)
    inputs = random_inputs(7, 2)
    assert torch.equal(namespace["prdp_loss"](*inputs, 0.1, 0.7), prdp_loss(*inputs, 0.1, 0.7))


# ---- The policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [7, 10, 50])
def test_schedule_equals_diffusers_ddim_with_eta_1(num_steps, prediction_type):
    config = {**SD14_SCHEDULER, "prediction_type": prediction_type}
    ours = prdp.ddpm_schedule(config, num_steps)
    del config["skip_prk_steps"]
    theirs = DDIMScheduler(**config, clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x, out = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def step(t: Tensor, noise: float) -> Tensor:
        noise = torch.full_like(x, noise)
        return theirs.step(out, t, x, eta=1.0, variance_noise=noise).prev_sample

    for k, t in enumerate(theirs.timesteps):
        mean = ours.coef_sample[k] * x + ours.coef_noise[k] * out
        torch.testing.assert_close(mean, step(t, 0.0), rtol=0, atol=2e-5)
        sigma = (step(t, 1.0) - step(t, 0.0)).mean().item()
        assert ours.sigma[k].item() == pytest.approx(sigma, rel=1e-4)


def test_schedule_is_the_posterior_of_the_forward_process():
    """Ho et al., Eqs. 6 and 7: the joint Gaussian of (x_{t-1}, x_t), conditioned by hand."""
    config = {**SD14_SCHEDULER}
    del config["steps_offset"]  # which then is 1, as diffusers' pipeline sets it
    schedule = prdp.ddpm_schedule(config, 50)
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
        ours = schedule.coef_sample[k] * x_t + schedule.coef_noise[k] * noise
        assert ours.item() == pytest.approx(mean, rel=1e-9)
        assert schedule.sigma[k].item() == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert schedule.sigma[-1].item() == pytest.approx(0.0206, abs=5e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps_offset": 0}, "steps_offset 0"),
        ({"set_alpha_to_one": True}, "set_alpha_to_one True"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"beta_schedule": None}, "beta_schedule None"),
        ({"beta_start": None}, "beta_start None"),
        ({"beta_end": None}, "beta_end None"),
        ({"beta_start": 1e-20}, "sigma = 0"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas"),
        ({"num_train_timesteps": 80}, "ddpm-steps 50"),
        ({"num_train_timesteps": 40}, "ddpm-steps 50"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps 1000.0"),
    ],
)
def test_schedule_refuses(change, says):
    """None: the config does not name it; diffusers would fill in another chain's."""
    config = {**SD14_SCHEDULER, **change}
    with pytest.raises(prdp.UserError, match=says):
        prdp.ddpm_schedule({k: v for k, v in config.items() if v is not None}, 50)
    with pytest.raises(prdp.UserError, match="--ddpm-steps 1000"):  # from t = 1000 on
        prdp.ddpm_schedule(SD14_SCHEDULER, 1000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gaussian_log_prob_equals_torch_distributions(dtype):
    sample, mean = torch.randn(2, 6, 4, 5, 3).to(dtype)
    sigma = torch.rand(6, dtype=torch.float64) + 0.02
    log_prob = prdp.gaussian_log_prob(sample, mean, sigma)
    expected = Normal(mean.double(), sigma.view(-1, 1, 1, 1)).log_prob(sample.double())
    torch.testing.assert_close(log_prob, expected.mean((1, 2, 3)), rtol=1e-12, atol=1e-12)
    assert log_prob.dtype == torch.float64


class Linear(nn.Module):
    """A UNet of which all is known: out = (scale * sample + 1) * mean of the text, per row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        assert len(timestep) == len(encoder_hidden_states) == len(sample)
        shift = encoder_hidden_states.double().mean((1, 2)).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.scale * shift * sample.double() + shift)


def test_guidance():
    """u + w (c - u), and a gradient through both branches."""
    policy = Policy(Linear(), prdp.ddpm_schedule(SD14_SCHEDULER, 4), torch.full((5, 3), 0.1))
    sample, text = torch.randn(4, 2, 3, 3), torch.full((4, 5, 3), 0.7)
    both = prdp.run_unet(policy, sample, text, torch.zeros(4, dtype=torch.long))
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    # The mean of Eq. 2 with coefficients 0 and 1 is the guided output itself.
    out = prdp.guided_mean(both, sample, zeros, ones, 3.0)
    u, c = (s * (1 + 0.3 * sample.double()) for s in (0.1, 0.7))
    torch.testing.assert_close(out, u + 3.0 * (c - u), rtol=1e-6, atol=1e-6)
    out.sum().backward()
    expected = ((0.1 + 3.0 * (0.7 - 0.1)) * sample.double()).sum().item()
    size = sample.double().abs().sum().item()
    assert policy.unet.scale.grad.item() == pytest.approx(expected, abs=1e-5 * size)


# ---- Trajectories --------------------------------------------------------------------------------


def test_trajectory_is_ancestral_sampling_and_its_log_prob_is_of_the_stored_tensor():
    """Redraw the noise of each image by hand, and walk and score each step in float64 numpy."""
    schedule, text = prdp.ddpm_schedule(SD14_SCHEDULER, 4), torch.randn(6, 5, 3)
    policy = Policy(Linear(), schedule, torch.full((5, 3), 0.1), guidance_scale=5.0, microbatch=4)
    generators = prdp.image_generators(0, 1, range(3), 2)
    trajectories = prdp.sample_trajectories(policy, text, generators, (2, 3, 3))
    assert trajectories.latents.dtype == torch.float32
    assert trajectories.latents.shape == (6, 5, 2, 3, 3)
    _, coef_sample, coef_noise, sigma = (column.numpy() for column in policy.schedule)
    for m, g in enumerate(prdp.image_generators(0, 1, range(3), 2)):
        stored = trajectories.latents[m].double().numpy()
        np.testing.assert_array_equal(stored[0], torch.randn(2, 3, 3, generator=g).numpy())
        for k in range(4):
            shifts = (policy.null_embeds.double().mean().item(), text[m].double().mean().item())
            u, c = (s + 0.3 * s * stored[k] for s in shifts)
            mean = coef_sample[k] * stored[k] + coef_noise[k] * (u + 5.0 * (c - u))
            x = mean + sigma[k] * torch.randn(2, 3, 3, generator=g).numpy()
            np.testing.assert_allclose(stored[k + 1], x.astype(np.float32), rtol=2e-7, atol=1e-6)
            density = -((stored[k + 1] - mean) ** 2) / (2 * sigma[k] ** 2) - np.log(sigma[k])
            expected = density.mean() - 0.5 * np.log(2 * np.pi)
            assert trajectories.log_probs[m, k].item() == pytest.approx(expected, abs=1e-9)


def test_noise_does_not_depend_on_batch_or_order():
    """Seed, epoch, prompt and image each matter."""

    def noise(seed: int, epoch: int, prompts: int, images: int) -> Tensor:
        generators = prdp.image_generators(seed, epoch, range(prompts), images)
        return torch.stack([torch.randn(4, generator=g) for g in generators])

    assert torch.equal(noise(0, 1, 3, 2)[:4], noise(0, 1, 2, 2))
    every = torch.cat([noise(0, 1, 3, 4), noise(0, 2, 3, 4), noise(1, 1, 3, 4)])
    assert len(every.unique(dim=0)) == 36


def test_noise_and_prompts_keep_their_seeds():
    """So that runs of before can be compared number by number."""
    drawn = torch.randn(3, generator=prdp.image_generators(0, 1, range(1), 1)[0])
    assert drawn.tolist() == pytest.approx([0.26946676, 0.29087779, -1.50520778], rel=1e-6)
    hundred, config = list(range(100)), prdp.Config(prompts_per_epoch=8)
    assert prdp.draw_prompts(config, hundred, 1) == [54, 55, 87, 97, 76, 3, 70, 1]
    assert prdp.draw_prompts(config, hundred, 2) == [61, 38, 53, 89, 27, 12, 59, 96]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_equal_the_pipelines_own(models, tiny_sd, tmp_path, prediction_type):
    """Our sampler against diffusers' pipeline with DDIM, eta = 1, and the same generators."""
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(file.read_text()), "prediction_type": prediction_type}
    file.write_text(json.dumps(settings))
    ours = models(model=str(folder))
    latents = draw(ours).latents[:, -1]

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    generators = prdp.image_generators(0, 1, range(3), 4)
    theirs = pipe(
        PROMPTS, num_images_per_prompt=4, num_inference_steps=5, guidance_scale=5.0, eta=1.0,
        generator=generators, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents, theirs, rtol=0, atol=2e-4)
    images = ours.sd.decode(latents, 6)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    floats = pipe.image_processor.postprocess(decoded, "pt")
    assert (images - 255 * floats).abs().max() <= 0.5 + 1e-3
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_on_policy_gap_is_exactly_zero(models, dtype):
    """Scoring reproduces sampling bit for bit, and so does the reference, whose weights are cast
    once; the smallest step of the policy is seen."""
    loaded = models(dtype=dtype)
    trajectories = draw(loaded)
    for policy in (loaded.policy, loaded.reference):
        log_probs = prdp.score_trajectories(policy, trajectories)
        assert torch.equal(log_probs, trajectories.log_probs)
    with torch.no_grad():
        loaded.policy.unet.conv_out.bias += 1e-4
    moved = prdp.score_trajectories(loaded.policy, trajectories)
    assert not torch.equal(moved, trajectories.log_probs)


def test_same_images_whatever_the_microbatch(models):
    runs = []
    for microbatch in (1, 5, 12):
        loaded = models(microbatch=microbatch)
        latents = draw(loaded).latents
        runs.append((latents, loaded.sd.decode(latents[:, -1], microbatch).int()))
    for latents, images in runs[1:]:
        assert torch.equal(latents[:, 0], runs[0][0][:, 0])
        torch.testing.assert_close(latents, runs[0][0], rtol=0, atol=1e-3)
        assert (images - runs[0][1]).abs().max() <= 1


# ---- Exact gradients -----------------------------------------------------------------------------


class InDouble(nn.Module):
    """A UNet in float64 behind float32 latents, that counts the rows it is given."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet, self.rows = unet.double(), 0

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        self.rows += len(sample)
        return self.unet(sample.double(), timestep, encoder_hidden_states.double())


def in_double(models: prdp.Models) -> prdp.Models:
    """The same models, of which gradients have no rounding to speak of."""
    policy = models.policy._replace(unet=InDouble(models.policy.unet))
    reference = models.reference._replace(unet=InDouble(models.reference.unet))
    return models._replace(policy=policy, reference=reference)


def log_probs_in_one_graph(policy: Policy, trajectories: Trajectories) -> Tensor:
    """(M, T) log-probs, by a loop over images and steps without any of prdp's passes."""
    schedule, w = policy.schedule, policy.guidance_scale
    rows = []
    for m, latents in enumerate(trajectories.latents.double()):
        text = torch.stack([policy.null_embeds, trajectories.prompt_embeds[m]])
        for k, t in enumerate(schedule.timesteps):
            u, c = policy.unet(latents[k].expand(2, -1, -1, -1), t.expand(2), text).sample
            mean = schedule.coef_sample[k] * latents[k] + schedule.coef_noise[k] * (u + w * (c - u))
            rows.append(Normal(mean, schedule.sigma[k]).log_prob(latents[k + 1]).mean())
    return torch.stack(rows).view(len(trajectories.latents), -1)


def by_prompt(*matrices: Tensor) -> list[Tensor]:
    return [x.unflatten(0, (3, 4)) for x in matrices]


@pytest.mark.parametrize(("updates", "clip_range"), [(1, 1e-4), (2, math.inf), (2, 1e-5)])
def test_gradient_equals_the_whole_graphs(models, updates, clip_range):
    """Three passes against plain backpropagation in float64, on- and off-policy, with clipped
    entries that are skipped and without."""
    loaded = in_double(models())
    policy = loaded.policy
    with torch.no_grad():  # a reference that differs, as in any epoch after the first
        for p in loaded.reference.unet.parameters():
            p.add_(1e-3 * torch.randn(p.shape))
    trajectories = draw(loaded)
    old, ref = trajectories.log_probs, prdp.score_trajectories(loaded.reference, trajectories)
    r = torch.randn(12)
    optimizer = torch.optim.SGD(policy.unet.parameters(), lr=1e-7)
    for k in range(updates):
        log_probs = prdp.score_trajectories(policy, trajectories) if k else old.clone()
        log_probs.requires_grad_()
        loss = prdp_loss(*by_prompt(log_probs, old, ref, r), clip_range, 1e-3)
        (grad_log_probs,) = torch.autograd.grad(loss, log_probs)
        policy.unet.zero_grad()
        policy.unet.rows = 0
        prdp.backward_trajectories(policy, trajectories, grad_log_probs)
        ours, skipped = gradient_of(policy.unet), (grad_log_probs == 0).double().mean()
        assert policy.unet.rows == 2 * int((grad_log_probs != 0).sum())

        policy.unet.zero_grad()
        log_probs = log_probs_in_one_graph(policy, trajectories)
        prdp_loss(*by_prompt(log_probs, old, ref, r), clip_range, 1e-3).backward()
        expected = gradient_of(policy.unet)
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-9
        optimizer.step()
    assert (0.1 < skipped < 0.9) if (updates, clip_range) == (2, 1e-5) else skipped == 0


# ---- The optimum ---------------------------------------------------------------------------------


class Offsets(nn.Module):
    """A linear-Gaussian chain: the mean of step t is a_t x_t + theta_t."""

    def __init__(self, schedule: Schedule, dimensions: int) -> None:
        super().__init__()
        self.timesteps, self.coef_noise = schedule.timesteps.tolist(), schedule.coef_noise
        self.theta = nn.Parameter(torch.zeros(len(self.timesteps), dimensions, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        steps = [self.timesteps.index(t) for t in timestep.tolist()]
        out = self.theta[steps] / self.coef_noise[steps, None]
        return SimpleNamespace(sample=out.view(sample.shape))


def test_converges_to_the_closed_form_optimum():
    """With x_T shared and r = g . x_0, Eq. 7 shifts the mean of step t by sigma_t^2 * (product of
    the later a's) * g / beta_eff, where beta_eff = kl_weight / (T * C*H*W). The loss goes to zero
    there, and nowhere else."""
    steps, dimensions, kl_weight = 5, 3, 0.8
    schedule = prdp.ddpm_schedule(SD14_SCHEDULER, steps)
    g = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)
    unet = Offsets(schedule, dimensions)
    policy = Policy(unet, schedule, torch.zeros(1, 1), microbatch=64)
    reference = policy._replace(unet=Offsets(schedule, dimensions))
    latents = torch.empty(64, steps + 1, dimensions, 1, 1)
    latents[:, 0] = torch.randn(dimensions, 1, 1)  # shared x_T
    for k in range(steps):
        noise = torch.randn(64, dimensions, 1, 1)
        latents[:, k + 1] = schedule.coef_sample[k] * latents[:, k] + schedule.sigma[k] * noise
    log_probs = torch.empty(64, steps, dtype=torch.float64)
    trajectories = Trajectories(latents, log_probs, torch.zeros(64, 1, 1))
    ref = prdp.score_trajectories(reference, trajectories)
    r = latents[:, -1].flatten(1).double() @ g
    optimizer = torch.optim.LBFGS(
        [unet.theta], max_iter=400, tolerance_grad=1e-14, tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_probs = prdp.score_trajectories(policy, trajectories).requires_grad_()
        loss = prdp_loss(log_probs, log_probs.detach(), ref, r, math.inf, kl_weight)
        (grad_log_probs,) = torch.autograd.grad(loss, log_probs)
        prdp.backward_trajectories(policy, trajectories, grad_log_probs)
        return loss.detach()

    start = closure().item()
    optimizer.step(closure)
    later = torch.tensor([schedule.coef_sample[k + 1 :].prod() for k in range(steps)])
    optimum = (schedule.sigma**2 * later)[:, None] * g / (kl_weight / (steps * dimensions))
    assert closure().item() < 1e-6 * start
    torch.testing.assert_close(unet.theta.detach(), optimum, rtol=0.01, atol=0)


# ---- Settings: Table 4 ---------------------------------------------------------------------------

TABLE_4 = {  # as printed in the paper: small scale, large scale, several rewards
    "epochs": (100, 1000, 1000),
    "updates_per_epoch": (10, 1, 1),
    "prompts_per_epoch": (32, 64, 64),
    "images_per_prompt": (16, 8, 8),
    "kl_weight": (3e-5, 3e-6, 3e-5),
    "ddpm_steps": (50, 50, 50),
    "clip_range": (1e-6, 1e-4, 1e-4),
    "guidance_scale": (5.0, 5.0, 5.0),
    "max_grad_norm": (1.0, 1.0, 1.0),
    "learning_rate": (1e-5, 7e-6, 1e-5),
    "weight_decay": (1e-4, 1e-4, 1e-4),
}


@pytest.mark.parametrize(("column", "preset"), [(0, "small"), (1, "large"), (2, "multi")])
def test_presets_equal_table_4(column, preset):
    config = vars(prdp.parse_args(["--preset", preset, "--reward", "compressibility"]))
    expected = {name: row[column] for name, row in TABLE_4.items()}
    assert {name: config[name] for name in TABLE_4} == expected


def test_flags_come_before_the_preset_which_is_small():
    assert prdp.parse_args([]) == prdp.parse_args(["--preset", "small"])
    config = prdp.parse_args(["--preset", "large", "--epochs", "3", "--clip-range", "inf"])
    assert (config.epochs, config.clip_range, config.kl_weight) == (3, math.inf, 3e-6)


def test_chains_that_do_not_begin_at_noise_are_refused():
    """1 and 2 steps begin at t = 1 and 501."""
    for steps in (1, 2):
        with pytest.raises(prdp.UserError, match=f"--ddpm-steps {steps}: must be at least 3"):
            prdp.parse_args(["--ddpm-steps", str(steps)])
    assert prdp.parse_args(["--ddpm-steps", "3"]).ddpm_steps == 3


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def test_prompts_are_drawn_independently_and_uniformly(tiny_sd):
    many = tiny_config(tiny_sd, prompts_per_epoch=1000)
    drawn = prdp.draw_prompts(many, PROMPTS, 1)
    assert drawn == prdp.draw_prompts(many, PROMPTS, 1) != prdp.draw_prompts(many, PROMPTS, 2)
    assert all(250 < drawn.count(prompt) < 420 for prompt in PROMPTS)
    few = tiny_config(tiny_sd, prompts_per_epoch=3)
    distinct = {len(set(prdp.draw_prompts(few, PROMPTS, epoch))) for epoch in range(1, 30)}
    assert distinct == {1, 2, 3}  # with replacement


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward, of which no two pictures have the same."""
    return images.double().mean((1, 2, 3))


def algorithm_1(config: prdp.Config, models: prdp.Models) -> list[dict[str, float]]:
    """The paper's page by the letter: one graph for all, AdamW on the policy; metrics by hand."""
    policy, rows = models.policy, []
    optimizer = torch.optim.AdamW(policy.unet.parameters(), config.learning_rate)
    for epoch in range(1, config.epochs + 1):
        prompts = prdp.draw_prompts(config, PROMPTS, epoch)
        generators = prdp.image_generators(config.seed, epoch, range(3), 4)
        trajectories = prdp.sample_prompts(models, policy, prompts, generators)
        pictures = models.sd.decode(trajectories.latents[:, -1], 6)
        r = brightness(pictures, []).float()
        with torch.no_grad():
            old = log_probs_in_one_graph(policy, trajectories)
            ref = log_probs_in_one_graph(models.reference, trajectories)
        updates = []
        for _ in range(config.updates_per_epoch):
            log_probs = log_probs_in_one_graph(policy, trajectories)
            moved = (log_probs.detach() - old).abs()
            matrices = by_prompt(log_probs, old, ref, r)
            loss = prdp_loss(*matrices, config.clip_range, config.kl_weight)
            unclipped = prdp_loss(*matrices, math.inf, config.kl_weight)
            of_reference = prdp_loss(*by_prompt(ref, old, ref, r), math.inf, config.kl_weight)
            optimizer.zero_grad()
            loss.backward()
            gradient = gradient_of(policy.unet)
            for p in policy.unet.parameters():
                p.grad *= min(1, config.max_grad_norm / gradient.norm())
            optimizer.step()
            clipped = (moved > config.clip_range).double().mean()
            explained = 1 - unclipped / of_reference
            row = (loss, unclipped, explained, gradient.norm(), moved.mean(), clipped)
            updates.append([x.item() for x in row])
        names = ("loss", "loss_unclipped", "explained", "grad_norm", "log_ratio_old")
        names += ("clip_fraction",)
        means = np.mean(updates, axis=0).tolist()
        means[-1] = np.mean(updates[1:], axis=0)[-1]  # at the first nothing can be clipped
        row = dict(zip(names, means, strict=True))
        row |= {"log_ratio_ref": (old - ref).mean().item()}
        rows.append(row | {"reward_mean": r.mean().item(), "reward_std": r.std().item()})
    return rows


def test_train_is_algorithm_1(tiny_sd):
    """Two epochs of two updates in float64: the metrics it yields, and the weights it leaves."""
    config = tiny_config(
        tiny_sd, epochs=2, updates_per_epoch=2, learning_rate=1e-4, max_grad_norm=0.1, kl_weight=1.0
    )
    ours, theirs = (
        in_double(prdp.load_models(config, torch.device("cpu"), brightness)) for _ in range(2)
    )
    optimizer = torch.optim.AdamW(ours.policy.unet.parameters(), config.learning_rate)
    metrics = list(prdp.train(config, ours, optimizer, PROMPTS, 1))
    for mine, expected in zip(metrics, algorithm_1(config, theirs), strict=True):
        assert expected["grad_norm"] > config.max_grad_norm  # so it is clipped
        for name, value in expected.items():
            # Differences of numbers of size 1, of latents that fp32 rounds.
            small = name.startswith("log_ratio") or name == "explained"
            close = {"abs": 1e-6} if small else {"rel": 1e-4}
            assert mine[name] == pytest.approx(value, **close), name
    assert metrics[1]["clip_fraction"] > 0.1
    assert abs(metrics[1]["log_ratio_ref"]) > 1e-4  # seen at that tolerance
    networks = (ours.policy.unet, theirs.policy.unet, ours.reference.unet)
    a, b, start = (torch.cat([p.flatten() for p in unet.parameters()]) for unet in networks)
    assert (a - b).abs().max() < 0.02 * config.learning_rate
    assert (a - start).abs().max() > 2 * config.learning_rate


def test_line_11_is_there_in_its_order():
    source = inspect.getsource(prdp.train)
    calls = ("zero_grad", "backward_trajectories", "average_gradients", "clip_grad_norm_", "step")
    places = [source.index(f"{call}(", source.index("# Line 11")) for call in calls]
    assert places == sorted(places)


@pytest.mark.parametrize("offline", [False, True])
def test_passes_of_an_epoch(tiny_sd, models, monkeypatch, offline):
    """Whoever drew the images has scored them: the other network scores them once, and the policy
    again before each update but the first."""
    config = tiny_config(tiny_sd, offline=offline, epochs=1, updates_per_epoch=3)
    loaded, passes = models(), []

    def spied(function, policy, *rest) -> object:
        network = "policy" if policy is loaded.policy else "reference"
        passes.append(f"{function.__name__.split('_')[0]} {network}")
        return function(policy, *rest)

    for name in ("sample_trajectories", "score_trajectories", "backward_trajectories"):
        monkeypatch.setattr(prdp, name, partial(spied, getattr(prdp, name)))
    optimizer = torch.optim.AdamW(loaded.policy.unet.parameters(), config.learning_rate)
    report.SECONDS.clear()
    list(prdp.train(config, loaded, optimizer, PROMPTS, 1))
    drew, other = ("reference", "policy") if offline else ("policy", "reference")
    updates = ["score policy", "backward policy"] * 3  # the first score is one step's
    assert passes == [f"sample {drew}", f"score {other}", *updates]
    assert config.passes() == (len(passes) - 4, 3)  # what the forecast multiplies by
    assert ("reference" in report.SECONDS) == (not offline)


def test_offline_learns_from_images_of_the_pretrained_model(tiny_sd, models, monkeypatch):
    """Sec. 4.3: whatever the policy has become; theta_old is the policy as the epoch begins."""
    config = tiny_config(tiny_sd, offline=True, epochs=2, updates_per_epoch=1, learning_rate=1e-3)
    loaded, seen = models(), []

    def spied(*inputs):
        seen.append([x.flatten(0, 1) for x in inputs[1:3]])
        return prdp_loss(*inputs)

    monkeypatch.setattr(prdp, "prdp_loss", spied)
    optimizer = torch.optim.AdamW(loaded.policy.unet.parameters(), config.learning_rate)
    epochs = prdp.train(config, loaded, optimizer, PROMPTS, 1)
    next(epochs)
    drawn = prdp.draw_prompts(config, PROMPTS, 2)
    generators = prdp.image_generators(config.seed, 2, range(3), 4)
    expected = prdp.sample_prompts(loaded, loaded.reference, drawn, generators)
    policy = prdp.score_trajectories(loaded.policy, expected)  # before the epoch's update
    seen.clear()
    next(epochs)
    (old, ref), *_ = seen
    assert torch.equal(ref, expected.log_probs)
    assert torch.equal(old, policy)
    assert not torch.equal(old, ref)


# ---- One whole run -------------------------------------------------------------------------------

PROMISED = (
    "epoch reward_mean reward_std loss loss_unclipped clip_fraction skipped_fraction log_ratio_old "
    "log_ratio_ref grad_norm seconds_sample seconds_reference seconds_reward seconds_score "
    "seconds_update images_per_second sample_reward"
)


def test_run_leaves_what_the_readme_promises(cli, tmp_path):
    """Two epochs, and at their end a pipeline that diffusers loads, with the weights learned."""
    run = tmp_path / "run"
    flags = ["--images-per-prompt", 4, "--microbatch", 8, "--weight-decay", 0.3]
    code, out, errors = cli(*flags, "--sample-every", 1)
    assert (code, errors) == (0, "")
    assert "on-policy gap" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(PROMISED.split()) <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert rows[0]["log_ratio_ref"] == 0 != rows[1]["log_ratio_ref"]
    files = ("config.json", "reward.png", "before_after.png", "checkpoint/state.pt")
    for name in (*files, "samples/epoch_0000.png", "samples/epoch_0002.png"):
        assert (run / name).stat().st_size > 0
    assert not list(run.glob("**/*.tmp"))

    state, pipe = checkpoint(run), StableDiffusionPipeline.from_pretrained(run / "pipeline")
    weights = pipe.unet.state_dict()
    assert weights.keys() == state["unet"].keys()
    assert all(torch.equal(weights[name], state["unet"][name]) for name in weights)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (6.7e-5, 0.3)
