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

# Triton's interpreter runs the kernels on the CPU. It is chosen where they are decorated, so before kernels is imported;
# the public functions go on running the eager references on CPU tensors, except in tests that use the fixture `fused`.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

import kernels
import prdp
import prompts.report
import rewards
from prdp import Policy, Schedule, Trajectories, prdp_loss

ROOT = Path(__file__).resolve().parent
SD14_SCHEDULER = {  # scheduler_config.json of Stable Diffusion v1.4
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as torchrun does; runs are compared to the bit, and sums depend on the number of threads


# ------------------------------------------------------------------------------------------------ the loss


def random_inputs(seed: int, *lead: int, images=5, steps=7, scale=0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    log_probs, old, ref = (
        scale * torch.randn(*lead, images, steps, generator=g, dtype=torch.float64) for _ in range(3)
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
                step = new_t - old_t  # Eq. 20 clips the ratio to theta_old; adding r-hat_old back gives r-hat
                predicted += sign * (new_t - ref_t) / len(ref[0])
                clipped += sign * (min(max(step, -clip_range), clip_range) + old_t - ref_t) / len(ref[0])
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
    assert torch.autograd.gradcheck(lambda x: prdp_loss(x, *rest, 0.05, 0.7), log_probs.requires_grad_())


def test_loss_is_zero_exactly_where_rewards_are_predicted():
    """Eqs. 13 and 15: r-hat = r / beta + c(prompt) is the optimum, whatever c."""
    _, _, ref, r = random_inputs(2, 3)
    spread = torch.randn(7, dtype=torch.float64)  # any split over steps with the right mean
    log_probs = ref + (r / 0.7 + torch.tensor([[5.0], [-3.0], [0.1]]))[..., None] + spread - spread.mean()
    assert prdp_loss(log_probs, log_probs, ref, r, 1e-6, 0.7).item() < 1e-24
    assert prdp_loss(log_probs, log_probs, ref, -r, 1e-6, 0.7).item() > 1


def test_loss_ignores_a_constant_per_prompt_and_the_order():
    log_probs, old, ref, r = random_inputs(3, 4)
    loss = prdp_loss(log_probs, old, ref, r, 0.1, 0.7)
    shifted = prdp_loss(log_probs, old, ref, r + torch.tensor([[10.0], [-4.0], [0.0], [1.0]]), 0.1, 0.7)
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
    assert gradient(0.25) == pytest.approx(2 * (0.25 - 1))  # exactly at the bound, both branches are the same
    assert gradient(0.26) == 0  # moved far enough towards the target: the larger, clipped error has no slope
    assert gradient(-0.3) == pytest.approx(2 * (-0.3 - 1))  # moved the wrong way: the unclipped error wins


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
            theirs.step(out, t, x, eta=1.0, variance_noise=torch.full_like(x, z)).prev_sample for z in (0.0, 1.0)
        )
        torch.testing.assert_close(ours.coef_sample[k] * x + ours.coef_noise[k] * out, mean, rtol=0, atol=2e-5)
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
        assert (schedule.coef_sample[k] * x_t + schedule.coef_noise[k] * noise).item() == pytest.approx(mean, rel=1e-9)
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
    torch.testing.assert_close(log_prob, normal.log_prob(sample.double()).mean((1, 2, 3)), rtol=1e-12, atol=1e-12)
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
    return Policy(Linear(), schedule, torch.full((5, 3), 0.1), **{"guidance_scale": 5.0, "microbatch": 4, **kwargs})


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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 4, 8, 8), (3, 3, 5, 7), (2, 4, 64, 64)]  # B = 1; odd and less than a block; several blocks a row
LAST = 49  # the step of smallest sigma, 0.0206, and of the largest log-prob, about 2.5
GUIDANCE = 5.3  # no float32 number: a kernel that rounded it would be seen


@pytest.fixture
def fused(monkeypatch) -> None:
    """kernels' public functions run Triton: on the GPU, or on the CPU in Triton's interpreter."""
    pytest.importorskip("triton", reason="no triton for this system: only the references run")
    monkeypatch.setattr("kernels.log_prob.path", lambda device: kernels.log_prob.TRITON)


def denoising_step(shape: tuple[int, ...], dtype: torch.dtype, steps: list[int] | None = None) -> dict:
    """Arguments of `guided_log_prob` as Stable Diffusion gives them; steps mixed by row, x_prev drawn from the policy."""
    schedule = prdp.ddpm_schedule(SD14_SCHEDULER, 50)
    steps = steps or [(LAST + 20 * m) % 50 for m in range(shape[0])]
    a, b, sigma = (column[steps] for column in schedule[1:])
    noise_pred = torch.randn(2 * shape[0], *shape[1:]).to(dtype)
    x_t, noise = torch.randn(2, *shape)
    x_prev = kernels.guided_sample_ref(noise_pred, x_t, noise, a, b, sigma, GUIDANCE)[0]
    step = dict(noise_pred=noise_pred, x_t=x_t, x_prev=x_prev, coef_sample=a, coef_noise=b, sigma=sigma)
    return {name: x.to(DEVICE) for name, x in step.items()} | {"guidance_scale": GUIDANCE}


def normal_log_prob(noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma, guidance_scale) -> Tensor:
    """The oracle: guidance as a weighted sum, then torch.distributions, all in float64."""
    a, b, sigma = (x.view(-1, 1, 1, 1) for x in (coef_sample, coef_noise, sigma))
    u, c = noise_pred.double().chunk(2)
    mean = a * x_t.double() + b * ((1 - guidance_scale) * u + guidance_scale * c)
    return torch.distributions.Normal(mean, sigma).log_prob(x_prev.double()).mean((1, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_log_prob_and_gradient_equal_float64_autograd(fused, shape, dtype):
    """Values to rounding in float64, gradients of random upstream ones to twice PyTorch's own rounding to the dtype."""
    step = denoising_step(shape, dtype)
    upstream = torch.randn(shape[0], dtype=torch.float64, device=DEVICE)
    gradients = []
    for function, kind in (
        (normal_log_prob, torch.float64),
        (kernels.guided_log_prob_ref, dtype),
        (kernels.guided_log_prob, dtype),
    ):
        leaf = step["noise_pred"].to(kind, copy=True).requires_grad_()
        log_prob = function(**{**step, "noise_pred": leaf})
        (log_prob * upstream).sum().backward()
        assert leaf.grad.dtype == kind
        gradients.append(leaf.grad.double())
        if function is normal_log_prob:
            expected = log_prob.detach()
        torch.testing.assert_close(log_prob.detach(), expected, rtol=1e-12, atol=1e-12)
    exact, torchs, ours = gradients
    error, allowed = (ours - exact).abs().max(), 2 * (torchs - exact).abs().max()
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        allowed = allowed.maximum(2.0**-7 * exact.abs().max())  # Triton's interpreter truncates to bfloat16
    assert error <= allowed + 1e-12 * exact.abs().max()
    assert exact.abs().max() > 0.01 / step["x_t"][0].numel()  # not vacuous


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_log_prob_errs_by_less_than_a_hundredth_of_the_clip_range(fused, dtype):
    """At the last step of SD v1.4, sigma = 0.0206, where float32 residuals alone cost 4e-8."""
    step = denoising_step((2, 4, 64, 64), dtype, [LAST, LAST])
    assert step["sigma"].tolist() == pytest.approx([0.0206, 0.0206], abs=5e-5)
    error = kernels.guided_log_prob(**step) - normal_log_prob(**step)
    assert error.abs().max() < 1e-8
    assert normal_log_prob(**step).mean().item() == pytest.approx(2.46, abs=0.05)


@pytest.mark.parametrize("path", ["eager", "fused"])
def test_log_prob_takes_two_halves_any_strides_and_leaves_its_inputs(path, request):
    """The bits of value and gradient are those of one contiguous tensor."""
    if path == "fused":
        request.getfixturevalue("fused")
    step = denoising_step((3, 3, 5, 7), torch.bfloat16)
    whole = step["noise_pred"].clone().requires_grad_()
    log_prob = kernels.guided_log_prob(**{**step, "noise_pred": whole})
    log_prob.sum().backward()
    strided = {k: x.transpose(-1, -2).contiguous().transpose(-1, -2) for k, x in step.items() if k.startswith("x_")}
    coefs = {k: torch.stack([x, x], 1)[:, 0] for k, x in step.items() if k in ("coef_sample", "coef_noise", "sigma")}
    u, c = (
        x.to(memory_format=torch.channels_last).detach().requires_grad_() for x in step["noise_pred"].clone().chunk(2)
    )
    copies = {k: x.clone() for k, x in (strided | coefs).items()}
    again = kernels.guided_log_prob(**{**step, **strided, **coefs, "noise_pred": [u, c]})
    again.sum().backward()
    assert torch.equal(again, log_prob)
    assert torch.equal(torch.cat([u.grad, c.grad]), whole.grad)
    assert all(torch.equal(x, copies[k]) for k, x in (strided | coefs).items())
    assert torch.equal(torch.cat([u, c]), step["noise_pred"])


def test_fused_bits_repeat_and_do_not_depend_on_the_other_rows(fused):
    step = denoising_step((3, 4, 16, 16), torch.bfloat16)
    rows = [{k: x[[m, 3 + m]] if k == "noise_pred" else x[[m]] for k, x in list(step.items())[:-1]} for m in range(3)]
    results = []
    for arguments in (step, step, *({**row, "guidance_scale": GUIDANCE} for row in rows)):
        leaf = arguments["noise_pred"].clone().requires_grad_()
        log_prob = kernels.guided_log_prob(**{**arguments, "noise_pred": leaf})
        log_prob.sum().backward()
        results.append((log_prob.detach(), leaf.grad))
    assert all(map(torch.equal, results[0], results[1]))
    for m, (log_prob, grad) in enumerate(results[2:]):
        assert torch.equal(log_prob, results[0][0][[m]]) and torch.equal(grad, results[0][1][[m, 3 + m]])


@pytest.mark.parametrize("path", ["eager", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_is_the_references_and_scores_again_to_the_bit(path, shape, dtype, request):
    """x_prev has the reference's very bits; its log-prob those of `guided_log_prob`, and the oracle's value."""
    if path == "fused":
        request.getfixturevalue("fused")
    step = denoising_step(shape, dtype)
    noise = torch.randn(shape)
    arguments = {k: x for k, x in step.items() if k != "x_prev"}
    x_prev, log_prob = kernels.guided_sample(**arguments, noise=noise.to(DEVICE))
    assert x_prev.dtype == torch.float32 and log_prob.dtype == torch.float64 and not log_prob.requires_grad
    on_cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    assert torch.equal(x_prev.cpu(), kernels.guided_sample_ref(**on_cpu, noise=noise)[0])
    again = {**step, "x_prev": x_prev}
    assert torch.equal(log_prob, kernels.guided_log_prob(**again))
    assert torch.equal(log_prob, kernels.guided_log_ratio(**again, **clip_at(log_prob, 0.0, 1e-6))[0])
    torch.testing.assert_close(log_prob, normal_log_prob(**again), rtol=1e-12, atol=1e-12)


def clip_at(log_prob: Tensor, moved: float | Tensor, clip_range: float) -> dict:
    """The other arguments of `guided_log_ratio`, for a policy that has moved by `moved` from theta_old."""
    return dict(log_prob_ref=log_prob.clone(), log_prob_old=log_prob - moved, clip_range=clip_range)


@pytest.mark.parametrize("path", ["eager", "fused"])
@pytest.mark.parametrize("clip_range", [2.0**-20, 2.0**-10, math.inf])
def test_log_ratio_is_clipped_and_its_gradient_passes_at_the_edge(path, clip_range, request):
    """Rows inside, outside on both sides, and exactly on both edges; Eqs. 19 and 20 in plain numbers, gradient by case."""
    if path == "fused":
        request.getfixturevalue("fused")
    step = denoising_step((7, 2, 3, 3), torch.float32, [40] * 7)
    edge = clip_range if clip_range < math.inf else 1.0
    moved = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5], dtype=torch.float64, device=DEVICE) * edge
    log_prob = kernels.guided_log_prob(**step)
    others = clip_at(log_prob, moved, clip_range)
    others["log_prob_ref"][0] -= 0.25  # in this row the ratio to pi_ref is not 0
    if clip_range < math.inf:
        assert ((log_prob - others["log_prob_old"])[3:5].abs() == clip_range).all()  # exactly on the edge

    leaf = step["noise_pred"].clone().requires_grad_()
    results = kernels.guided_log_ratio(**{**step, "noise_pred": leaf}, **others)
    columns = [others["log_prob_ref"].tolist(), others["log_prob_old"].tolist(), *(x.tolist() for x in results)]
    for row, (ref, old, new, ratio, clipped) in enumerate(zip(*columns, strict=True)):
        assert new == log_prob[row].item()
        assert ratio == new - ref
        assert clipped == min(max(new - ref, old - ref - clip_range), old - ref + clip_range)

    upstream = torch.randn(3, 7, dtype=torch.float64, device=DEVICE)
    passes = torch.ones(7, dtype=torch.float64, device=DEVICE)
    passes[5:] = float(clip_range == math.inf)
    expected_leaf = step["noise_pred"].double().requires_grad_()
    expected = normal_log_prob(**{**step, "noise_pred": expected_leaf})
    (expected * (upstream[0] + upstream[1] + upstream[2] * passes)).sum().backward()
    sum((r * g).sum() for r, g in zip(results, upstream, strict=True)).backward()
    torch.testing.assert_close(leaf.grad.double(), expected_leaf.grad, rtol=1e-6, atol=1e-12)

    (only,) = torch.autograd.grad(
        kernels.guided_log_ratio(**{**step, "noise_pred": leaf}, **others)[2] @ upstream[2], leaf
    )
    rows = only.unflatten(0, (2, 7)).abs().amax((0, 2, 3, 4))
    assert ((rows > 0) == (passes > 0)).all()


def test_fused_log_ratio_passes_nan_on_as_the_reference(fused):
    step = denoising_step((2, 2, 3, 3), torch.float32)
    step["noise_pred"][0, 0, 0, 0] = math.nan
    others = clip_at(torch.ones(2, dtype=torch.float64, device=DEVICE), 0.0, 1e-6)
    for ours, theirs in zip(
        kernels.guided_log_ratio(**step, **others), kernels.guided_log_ratio_ref(**step, **others), strict=True
    ):
        assert ours.isnan().tolist() == theirs.isnan().tolist() == [True, False]


def test_references_are_numpy_loops():
    """Eq. 2 and the log-density element by element; and float64 noise_pred runs the reference on every device."""
    step = denoising_step((2, 2, 3, 3), torch.float64)
    numbers = {k: x.cpu().double().numpy() if isinstance(x, Tensor) else x for k, x in step.items()}
    expected = np.zeros(2)
    for m in range(2):
        a, b, sigma = (numbers[k][m] for k in ("coef_sample", "coef_noise", "sigma"))
        for i in np.ndindex(2, 3, 3):
            u, c = numbers["noise_pred"][m][i], numbers["noise_pred"][2 + m][i]
            z = (numbers["x_prev"][m][i] - a * numbers["x_t"][m][i] - b * (u + GUIDANCE * (c - u))) / sigma
            expected[m] += (-0.5 * z * z - np.log(sigma * np.sqrt(2 * np.pi))) / 18
    np.testing.assert_allclose(kernels.guided_log_prob(**step).cpu(), expected, rtol=1e-12)
    leaf = step["noise_pred"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernels.guided_log_prob(**{**step, "noise_pred": x}), leaf)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise_pred": (3, 4, 8, 8)}, r"\(3, 4, 8, 8\)"),
        ({"noise_pred": (4, 4, 8, 7)}, r"\(4, 4, 8, 7\)"),
        ({"x_t": (2, 4, 8)}, r"\(2, 4, 8\)"),
        ({"x_prev": (1, 4, 8, 8)}, r"\(1, 4, 8, 8\)"),
        ({"sigma": (3,)}, r"\(3,\)"),
        ({"coef_noise": (2, 1)}, r"\(2, 1\)"),
        ({"coef_sample": ()}, r"\(\)"),
    ],
)
def test_wrong_shapes_are_named(change, named):
    step = denoising_step((2, 4, 8, 8), torch.float32)
    step |= {name: torch.zeros(shape, device=DEVICE) for name, shape in change.items()}
    with pytest.raises(AssertionError, match=named):
        kernels.guided_log_prob(**step)
    with pytest.raises(AssertionError, match=named):
        kernels.guided_log_ratio(**step, **clip_at(torch.zeros(2, device=DEVICE), 0.0, 1e-6))
    step["noise"] = step.pop("x_prev")
    with pytest.raises(AssertionError, match=named):
        kernels.guided_sample(**step)


def test_without_triton_or_gpu_the_references_run():
    """Importing kernels needs torch alone and prints nothing; `path` says why the references run."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "args = torch.randn(4, 3, 5), *torch.randn(2, 2, 3, 5), *torch.rand(3, 2).double() + 0.1, 5.0\n"
        "assert torch.equal(kernels.guided_log_prob(*args), kernels.guided_log_prob_ref(*args))\n"
        "print(kernels.path(torch.device('cpu')), kernels.path(torch.device('cuda')), sep='; ')"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip() == "eager (no CUDA device); eager (triton not installed)"


@pytest.mark.parametrize("name", ["guided_log_prob", "guided_log_ratio", "guided_sample"])
def test_public_function_and_reference_have_one_signature_and_docstring(name):
    public, reference = getattr(kernels, name), getattr(kernels, name + "_ref")
    assert public.__annotations__ == reference.__annotations__ and public.__doc__ == reference.__doc__


needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


@needs_gpu
def test_fused_passes_never_wait_for_the_gpu(fused):
    step = denoising_step((2, 4, 8, 8), torch.bfloat16)
    step["noise_pred"].requires_grad_()
    kernels.guided_log_prob(**step).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.guided_log_prob(**step).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_fused_rows_beyond_two_billion_elements(fused):
    """Row offsets are int64: the last row of 2^31 + 2^14 elements has the value and the gradient of row 0, its copy."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    rows, step = 2**17 + 1, denoising_step((1, 4, 64, 64), torch.float16, [LAST])
    u, c = (x[None].expand(rows, -1, -1, -1).contiguous() for x in step["noise_pred"])
    many = {k: x.expand(rows, *x.shape[1:]).contiguous() for k, x in list(step.items())[1:-1]}
    u.requires_grad_(), c.requires_grad_()
    log_prob = kernels.guided_log_prob((u, c), **many, guidance_scale=GUIDANCE)
    log_prob.sum().backward()
    assert (log_prob == log_prob[0]).all() and torch.equal(c.grad[0], c.grad[-1]) and torch.equal(u.grad[0], u.grad[-1])
    torch.testing.assert_close(log_prob[:1].detach(), normal_log_prob(**step), rtol=1e-12, atol=1e-12)


def test_benchmark_quick_prints_its_tables():
    """On a CPU in seconds; the on-policy gap it measures is exactly 0 in every number format."""
    command = [sys.executable, str(ROOT / "kernels" / "benchmark.py"), "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200
    )
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    tables = [part.strip().split("\n") for part in done.stdout.split("\n## ")[1:]]
    assert [table[0][:3] for table in tables] == ["(a)", "(b)", "one", "(c)", "(d)"]
    for table in tables[1], tables[3]:
        gaps = [cells[-1].strip() for cells in (line.strip("|").split("|") for line in table if line.startswith("|"))]
        assert {gap for gap in gaps[2:] if gap} == {"0.0"}


# ------------------------------------------------------------------------------------------------ trajectories


def test_trajectory_is_ancestral_sampling_and_its_log_prob_is_of_the_stored_tensor():
    """Redraw the noise of each image by hand, and walk and score each step in float64 numpy."""
    policy, text = linear_policy(), torch.randn(6, 5, 3)
    generators = prdp.image_generators(0, 1, range(3), 2)
    trajectories = prdp.sample_trajectories(policy, text, generators, (2, 3, 3))
    assert trajectories.latents.dtype == torch.float32 and trajectories.latents.shape == (6, 5, 2, 3, 3)
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
            density = -((stored[k + 1] - mean) ** 2) / (2 * schedule[3][k] ** 2) - np.log(schedule[3][k])
            expected = density.mean() - 0.5 * np.log(2 * np.pi)
            assert trajectories.log_probs[m, k].item() == pytest.approx(expected, rel=1e-10)


def test_noise_does_not_depend_on_batch_or_order():
    """Prompt 1's images are the same whether 2 or 3 prompts are sampled; seed, epoch, prompt and image each matter."""

    def noise(seed: int, epoch: int, prompts: int, images: int) -> Tensor:
        return torch.stack(
            [torch.randn(4, generator=g) for g in prdp.image_generators(seed, epoch, range(prompts), images)]
        )

    assert torch.equal(noise(0, 1, 3, 2)[:4], noise(0, 1, 2, 2))
    every = torch.cat([noise(0, 1, 3, 4), noise(0, 2, 3, 4), noise(1, 1, 3, 4)])
    assert len(every.unique(dim=0)) == 36


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> str:
    """A whole Stable Diffusion with random weights, 16x16 pictures from 4x8x8 latents, in diffusers layout."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd")
    StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        PNDMScheduler(**SD14_SCHEDULER),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def tiny_config(tiny_sd: str, **changes) -> prdp.Config:
    return prdp.Config(**{
        **dict(model=tiny_sd, reward="incompressibility", prompts_per_epoch=3, images_per_prompt=4, ddpm_steps=5, microbatch=6,
               clip_range=1e-4), **changes,
    })  # fmt: skip


PROMPTS = [
    "a red circle on a blue background",
    "a green star on a white background",
    "a black ring on a red background",
]
CPU = torch.device("cpu")


def draw(models: prdp.Models) -> Trajectories:
    """4 trajectories for each of the 3 prompts, with the noise of seed 0, epoch 1."""
    text = prdp.encode(models.pipe, PROMPTS).repeat_interleave(4, dim=0)
    return prdp.sample_trajectories(models.policy, text, prdp.image_generators(0, 1, range(3), 4), models.latent_shape)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_equal_the_pipelines_own(tiny_sd, tmp_path, prediction_type):
    """Our sampler against diffusers' pipeline with DDIM, eta = 1, and the same generators: the same pictures."""
    import shutil

    from diffusers import DDIMScheduler

    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": prediction_type}))
    models = prdp.load_models(tiny_config(str(folder)), CPU)
    latents = draw(models).latents[:, -1]
    pipe = models.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    generators = prdp.image_generators(0, 1, range(3), 4)
    theirs = pipe(
        PROMPTS, num_images_per_prompt=4, num_inference_steps=5, guidance_scale=5.0, eta=1.0, generator=generators,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents, theirs, rtol=0, atol=2e-4)
    images = prdp.decode(models, latents)
    floats = pipe.image_processor.postprocess(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, "pt")
    assert (images - 255 * floats).abs().max() <= 0.5 + 1e-3 and images.dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_on_policy_gap_is_exactly_zero(tiny_sd, dtype):
    """Scoring reproduces sampling bit for bit, and so does the reference, whose weights are cast once; another microbatch does
    not reproduce it, which is why the passes share one."""
    config = tiny_config(tiny_sd, dtype=dtype)
    models = prdp.load_models(config, CPU)
    trajectories = draw(models)
    assert torch.equal(prdp.score_trajectories(models.policy, trajectories), trajectories.log_probs)
    assert torch.equal(prdp.score_trajectories(models.reference, trajectories), trajectories.log_probs)
    prdp.check_on_policy(models, trajectories)
    with torch.no_grad():
        models.policy.unet.conv_out.bias += 1e-4
    assert not torch.equal(prdp.score_trajectories(models.policy, trajectories), trajectories.log_probs)
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
        return self.unet(sample.double(), timestep, encoder_hidden_states=encoder_hidden_states.double())


def naive_gradient(policy: Policy, trajectories: Trajectories, old: Tensor, ref: Tensor, r: Tensor, clip_range: float):
    """Plain backpropagation through all images and steps in one graph, row by row, without prdp's passes."""
    policy.unet.zero_grad()
    schedule = policy.schedule
    rows = []
    for m, latents in enumerate(trajectories.latents.double()):
        for k, t in enumerate(schedule.timesteps):
            text = torch.stack([policy.null_text, trajectories.text[m]])
            u, c = policy.unet(latents[k].expand(2, -1, -1, -1), t.expand(2), encoder_hidden_states=text).sample
            mean = schedule.coef_sample[k] * latents[k] + schedule.coef_noise[k] * (
                (1 - policy.guidance_scale) * u + policy.guidance_scale * c
            )
            rows.append(torch.distributions.Normal(mean, schedule.sigma[k]).log_prob(latents[k + 1]).mean())
    log_probs = torch.stack(rows).view(3, 4, -1)
    prdp_loss(log_probs, old.view_as(log_probs), ref.view_as(log_probs), r.view(3, 4), clip_range, 1e-3).backward()
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
        log_probs = prdp.score_trajectories(policy, trajectories) if k else trajectories.log_probs.clone()
        log_probs.requires_grad_()
        grouped = [x.view(3, 4, *x.shape[1:]) for x in (log_probs, trajectories.log_probs, ref, r)]
        (weights,) = torch.autograd.grad(prdp_loss(*grouped, clip_range, 1e-3), log_probs)
        policy.unet.zero_grad()
        policy.unet.rows = 0
        prdp.backward_trajectories(policy, trajectories, weights)
        ours, skipped = torch.cat([p.grad.flatten() for p in policy.unet.parameters()]), (weights == 0).double().mean()
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
            norms.append(torch.cat([p.grad.flatten() for p in models.policy.unet.parameters()]).norm().item())
        assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


def test_fp16_gradients_do_not_underflow(tiny_sd):
    """Tiny weights, as with a large kl_weight: fp16 gradients come out as fp32's do, to fp16's precision."""
    gradients = []
    for dtype in ("fp32", "fp16"):
        config = tiny_config(tiny_sd, dtype=dtype)
        models = prdp.load_models(config, CPU)
        trajectories = draw(models)
        weights = 1e-7 * torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        prdp.backward_trajectories(models.policy, trajectories, weights)
        gradients.append(torch.cat([p.grad.flatten() for p in models.policy.unet.parameters()]))
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.05


def test_no_gradient_where_all_rewards_tie(tiny_sd):
    """All weights are zero: no pass is run, and no gradient is left."""
    models = prdp.load_models(tiny_config(tiny_sd), CPU)
    trajectories = draw(models)
    prdp.backward_trajectories(models.policy, trajectories, torch.zeros_like(trajectories.log_probs))
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
        return type("Out", (), {"sample": (self.theta[steps] / self.coef_noise[steps, None]).view(sample.shape)})


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
        [unet.theta], lr=1, max_iter=400, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
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
    return torch.cat([p.grad.flatten() for p in models.pipe.unet.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"compile": True}, {"compile": True, "lora_rank": 2}]
)
def test_memory_and_speed_flags_keep_the_gradient(tiny_sd, monkeypatch, changes):
    """To rounding. And where they recompute or compile, an unchanged policy still reproduces its log-probs to the bit."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the graphs, not their compilation
    plain = gradient_of(prdp.load_models(tiny_config(tiny_sd, lora_rank=changes.get("lora_rank", 0)), CPU))
    models = prdp.load_models(tiny_config(tiny_sd, **changes), CPU)
    torch.testing.assert_close(gradient_of(models), plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    prdp.check_on_policy(models, draw(models))
    assert [name for name, _ in models.pipe.unet.named_parameters()][0].startswith("conv_in")  # for the checkpoint


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
            monkeypatch.setattr(prdp, "predict_noise", lambda p, x, *rest: (sizes.add(len(x)), forward(p, x, *rest))[1])
        for zeros in (7, 60):  # of 60 entries: 53 to do in microbatches of 6, and none
            few = weights.flatten().clone()
            few[torch.randperm(60, generator=torch.Generator().manual_seed(1))[:zeros]] = 0
            prdp.backward_trajectories(models.policy, trajectories, few.view(12, 5))
        gradients[compiled] = torch.cat([x.grad.flatten() for x in models.pipe.unet.parameters()])
    assert sizes == {6}
    tolerance = 1e-5 * gradients[False].abs().max().item()
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"offline": True}, {"lora_rank": 2}, {"loss": "ddpo"}])
def test_offload_networks_are_back_wherever_they_run(tiny_sd, tmp_path, capsys, monkeypatch, changes):
    """A run whose waiting networks hold NaN, but for the phases that move them back, is the run without --offload to the
    bit; and while gradients exist, all of them wait."""
    flags = [*SMALL_RUN, "--model", tiny_sd, "--reward", f"pickscore:{ROOT}/toy/pickscore", "--epochs", "2"]
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
        for network in (models.reference.unet, models.pipe.vae, models.pipe.text_encoder, *scorer.networks):
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
    flags = [*SMALL_RUN, "--model", tiny_sd, "--epochs", "3", "--sample-every", "1", "--out", str(tmp_path / "run")]
    assert run_cli(*flags, capsys=capsys) == (0, "") and len(drawn) == 2 * (3 + 4)


def test_offload_by_default_on_small_gpus(tiny_sd, monkeypatch):
    cuda = torch.device("cuda")
    for gigabytes in (24, 80):
        size = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, size=size: size)
        idle = {offload: prdp.idle_device(offload, cuda) for offload in ("auto", "on", "off")}
        assert idle == {"auto": CPU if gigabytes == 24 else cuda, "on": CPU, "off": cuda}
    assert prdp.idle_device("auto", CPU) == prdp.idle_device("off", CPU) == CPU
    gpu, places, move = torch.device("meta"), {}, torch.nn.Module.to  # a stand-in: nothing is moved there

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
        for network in (models.reference.unet, models.pipe.vae, models.pipe.text_encoder, *scorer.networks):
            assert places[network] == models.waiting == models.reward.waiting == idle
        assert places[models.policy.unet] == models.reward.device == gpu


@needs_gpu
def test_offload_on_a_gpu(tmp_path, capsys):
    """The same values to the bit (of an epoch: later ones depend on cuDNN's gradients), in less GPU memory."""
    peaks, first = {}, {}
    for offload in ("off", "on"):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        flags = ["--preset", "toy", "--epochs", "2", "--offload", offload, "--out", str(tmp_path / offload)]
        assert run_cli(*flags, capsys=capsys) == (0, "")
        peaks[offload] = torch.cuda.max_memory_allocated()
        first[offload] = metrics_of(tmp_path / offload)[0]["reward_mean"]
    assert first["on"] == first["off"] and peaks["on"] < peaks["off"]


def test_lora(tiny_sd, tmp_path, capsys):
    """Adapters alone are learned and kept in the checkpoint, the reference stays the pretrained model, a resumed run is
    the uninterrupted one, and the pipeline has the adapters merged: it draws what the run last showed."""
    from diffusers import StableDiffusionPipeline

    flags = [*SMALL_RUN, "--model", tiny_sd, "--lora-rank", "2", "--learning-rate", "1e-2", "--microbatch", "4"]
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
        config, models, torch.optim.AdamW([p for p in models.pipe.unet.parameters() if p.requires_grad])
    )
    merged = StableDiffusionPipeline.from_pretrained(whole / "pipeline").unet
    assert not any("lora" in name for name in merged.state_dict())
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 16, 16)
    with torch.no_grad():
        networks = (models.policy.unet, models.reference.unet, merged, base.policy.unet)
        learned, reference, ours, pretrained = (unet(x, t, encoder_hidden_states=text).sample for unet in networks)
    assert torch.equal(reference, pretrained)
    torch.testing.assert_close(ours, learned, rtol=1e-4, atol=1e-5)
    assert (learned - pretrained).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------ baselines


def baseline_by_hand(name: str, log_probs, old, ref, rewards, clip_range: float, kl_weight: float) -> float:
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
            margin = sum(log_probs[w][t] - ref[w][t] - log_probs[l][t] + ref[l][t] for t in steps) / len(steps)
            losses.append(math.log1p(math.exp(-kl_weight * margin)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["ddpo", "ddpo-sf", "rwr", "rwr-sparse", "dpo"])
def test_baseline_equals_its_paper_by_hand(name):
    """On several prompts at once; in float64, values and (by finite differences) gradients."""
    log_probs, old, ref, rewards = random_inputs(1, 3, images=16)
    expected = [baseline_by_hand(name, *parts, 0.1, 0.7) for parts in zip(log_probs, old, ref, rewards, strict=True)]
    loss = prdp.LOSSES[name](log_probs, old, ref, rewards, 0.1, 0.7)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prdp.LOSSES[name](x, old, ref, rewards, 0.1, 0.7), log_probs)


def test_baseline_policy_gradients_agree_on_policy():
    """At theta_old, DDPO_IS and DDPO_SF are one policy gradient: minus the advantage at every step."""
    log_probs, _, ref, advantage = random_inputs(2, 2)
    gradients = []
    for name in ("ddpo", "ddpo-sf"):
        x = log_probs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(prdp.LOSSES[name](x, log_probs, ref, advantage, 1e-4, 1.0), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], -advantage.unsqueeze(-1).expand_as(log_probs) / log_probs.numel())


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
        assert loss(log_probs, old, ref, tied, 0.1, 1.0).item() == pytest.approx(-log_probs.mean().item())


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
    (choices,) = (f.metadata["argparse"]["choices"] for f in prdp.dataclasses.fields(prdp.Config) if f.name == "loss")
    assert tuple(prdp.LOSSES) == choices


@pytest.mark.parametrize("name", ["ddpo", "ddpo-sf", "rwr", "rwr-sparse", "dpo"])
def test_baseline_runs_and_resumes(tiny_sd, tmp_path, capsys, name):
    """Every loss through the command line; stopped in the middle and resumed it is the uninterrupted run, to the bit,
    DDPO's running statistics included."""
    flags = [*SMALL_RUN, "--model", tiny_sd, "--loss", name, "--prompts-per-epoch", "1", "--images-per-prompt", "6"]
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
    latents = prdp.collect(config, models, 1, ["a red star", "a red star"], {}).trajectories.latents.unflatten(
        0, (2, -1)
    )
    start = latents[:, :, 0].flatten(2)
    assert torch.equal(start, start[:, :1].expand_as(start)) and not torch.equal(start[0], start[1])
    plain = prdp.collect(prdp.dataclasses.replace(config, share_initial_noise=False), models, 1, ["a red star"] * 2, {})
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
    assert torch.equal(batch.trajectories.log_probs, policy) and not torch.equal(policy, batch.log_probs_ref)
    online = prdp.collect(prdp.dataclasses.replace(config, offline=False), models, 2, ["a red star"], {})
    assert not torch.equal(online.trajectories.latents, base.trajectories.latents)


# ------------------------------------------------------------------------------------------------ rewards


def noise_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_reward_jpeg_sizes_equal_pillows():
    from io import BytesIO

    from PIL import Image

    images = noise_images(3, 3, 40, 24)
    images[1] = 7
    sizes = []
    for image in images:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer := BytesIO(), format="jpeg", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    more = rewards.load_reward("incompressibility", "cpu")(images, ["x"] * 3)
    assert more.tolist() == pytest.approx(sizes) and more.dtype == torch.float32
    assert torch.equal(rewards.load_reward("compressibility", "cpu")(images, ["x"] * 3), -more)
    assert more[0] > more[1]


@pytest.mark.parametrize("shape", [(32, 32), (50, 37), (37, 50), (64, 300), (20, 20)])
def test_reward_preprocess_clip_equals_transformers_processor(shape):
    from transformers import CLIPImageProcessorPil

    images = noise_images(2, 3, *shape)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor([i.permute(1, 2, 0).numpy() for i in images], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(rewards.preprocess_clip(images, 32).numpy(), expected, atol=1e-6)


def cubic(x: float, a: float) -> float:
    """Keys' kernel."""
    x = abs(x)
    return ((a + 2) * x - (a + 3)) * x * x + 1 if x < 1 else a * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0


def resampling_matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """(new, old): bicubic resampling of one axis. Antialiased: a = -0.5, the kernel as wide as the scale when shrinking, cut
    off at the border. Not: a = -0.75, four points, the border repeated."""
    scale, matrix = old / new, np.zeros((new, old))
    width, a, reach = (max(scale, 1.0), -0.5, 0) if antialias else (1.0, -0.75, 2)
    for o in range(new):
        for i in range(-reach, old + reach):
            matrix[o, min(max(i, 0), old - 1)] += cubic((i + 0.5 - (o + 0.5) * scale) / width, a)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("shape", "inner"),
    [
        ((64, 64), (32, 32)),
        ((50, 37), (32, 24)),
        ((37, 51), (23, 32)),
        ((64, 20), (32, 10)),
        ((32, 21), (32, 21)),
        ((16, 9), (32, 18)),
    ],
)
def test_reward_preprocess_hpsv2_equals_its_definition(shape, inner, antialias):
    """Longest side to 32, float bicubic with antialias, unclamped, zero padding *before* normalising, as matrices in numpy."""
    images = noise_images(2, 3, *shape)
    pixels = images.numpy() / 255
    if shape != inner:
        pixels = (
            resampling_matrix(shape[0], inner[0], antialias)
            @ pixels
            @ resampling_matrix(shape[1], inner[1], antialias).T
        )
    padded = np.zeros((2, 3, 32, 32))
    top, left = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    padded[:, :, top : top + inner[0], left : left + inner[1]] = pixels
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    options = {} if antialias else {"antialias": False}
    np.testing.assert_allclose(rewards.preprocess_hpsv2(images, 32, **options), (padded - mean) / std, atol=2e-5)


def test_reward_images_by_hand_any_mode(tmp_path, capsys):
    """RGBA, grey and palette pictures become RGB; a folder's other files are passed over; the table has a row each."""
    from PIL import Image

    picture = Image.fromarray(noise_images(24, 20, 3).numpy())
    for mode in ("RGB", "RGBA", "L", "P"):
        picture.convert(mode).save(tmp_path / f"{mode}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures = rewards.load_images([str(tmp_path)])
    assert [p.shape for p in pictures.values()] == [(1, 3, 24, 20)] * 4
    assert torch.equal(pictures[str(tmp_path / "RGB.png")], pictures[str(tmp_path / "RGBA.png")])
    rewards.main(["--reward", "incompressibility=2,compressibility", "--images", str(tmp_path), "--prompt", "x"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["incompressibility", "compressibility", "sum", "image"] and len(rows) == 5
    assert float(rows[1][2]) == pytest.approx(float(rows[1][0]), rel=1e-4)  # 2 x - x


@pytest.fixture(scope="session")
def open_clip():
    """The real open_clip (a dependency of these tests alone). It imports torchvision, which has no CPU build, for image
    transforms that are not used here: a stand-in lets the import pass."""
    import importlib
    import importlib.util
    from unittest import mock

    import transformers  # noqa: F401  (first: it must not see the stand-in)

    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch==3.3.0 ftfy wcwidth")
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.ops",
        "torchvision.ops.misc",
    )
    stand_ins = {name: mock.MagicMock(__spec__=None) for name in names}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("open_clip")


def tiny_open_clip(open_clip) -> nn.Module:
    """A CLIP whose heads are as wide as 10, whose two projections are square, and every parameter of which is random."""
    model = open_clip.model.CLIP(
        embed_dim=20,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=30, head_width=10, patch_size=8, image_size=32),
        text_cfg=open_clip.CLIPTextCfg(context_length=12, vocab_size=50, width=20, heads=2, layers=2),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape))
    return model.eval()


def tiny_clip_config(**changes):
    """The transformers config of `tiny_open_clip`; `changes` to either tower."""
    from transformers import CLIPConfig

    shared = {"hidden_act": "gelu", "projection_dim": 20, "num_hidden_layers": 2}
    text = {
        "hidden_size": 20,
        "intermediate_size": 80,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 12,
    }
    vision = {"hidden_size": 30, "intermediate_size": 120, "num_attention_heads": 3, "patch_size": 8, "image_size": 32}
    config = CLIPConfig(
        text_config={**text, **shared, "eos_token_id": 49, "bos_token_id": 48},
        vision_config={**vision, **shared},
        projection_dim=20,
    )
    for name, value in changes.items():
        tower, field = name.split("__")
        setattr(getattr(config, tower), field, value)
    return config


def swap_query_and_key(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.cat([value.chunk(3)[1], value.chunk(3)[0], value.chunk(3)[2]]) if "in_proj" in name else value
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    ("config_changes", "break_state", "agrees"),
    [
        pytest.param({}, None, True, id="as it is"),
        pytest.param({"vision_config__hidden_act": "quick_gelu"}, None, False, id="vision activation"),
        pytest.param({"text_config__hidden_act": "quick_gelu"}, None, False, id="text activation"),
        pytest.param({"vision_config__num_attention_heads": 2}, None, False, id="vision heads"),
        pytest.param({"text_config__num_attention_heads": 4}, None, False, id="text heads"),
        pytest.param({"text_config__eos_token_id": 47}, None, False, id="end token not in the text"),
        pytest.param({}, swap_query_and_key, False, id="query and key swapped"),
        pytest.param({}, lambda s: {**s, "text_projection": s["text_projection"].T}, False, id="text projection untransposed"),
    ],
)  # fmt: skip
def test_reward_open_clip_weights_give_open_clips_features(open_clip, config_changes, break_state, agrees):
    """Mapped weights in transformers against the real open_clip; each mistake one could make is told apart."""
    theirs = tiny_open_clip(open_clip)
    state = theirs.state_dict()
    ours = rewards.hpsv2_model(
        "hpsv2", break_state(state) if break_state else state, tiny_clip_config(**config_changes)
    ).eval()
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 47, (3, 12))
    ids[:, 0], ids[0, 5], ids[1, 11], ids[2, 2] = 48, 49, 49, 49  # start, and the end at three places
    for row, end in enumerate((5, 11, 2)):
        ids[row, end + 1 :] = 0
    with torch.no_grad():
        gap = max(
            (theirs.encode_image(pixels) - rewards.features(ours.get_image_features(pixel_values=pixels))).abs().max(),
            (theirs.encode_text(ids) - rewards.features(ours.get_text_features(input_ids=ids))).abs().max(),
        )
    assert (gap < 2e-5) == agrees, gap


@pytest.mark.skipif("PRDP_FULL_SIZE" not in os.environ, reason="needs 12 GB and minutes: run with PRDP_FULL_SIZE=1")
def test_reward_full_size_vit_h_14(open_clip):
    """HPSv2's real architecture, random weights: 686 tensors map strictly, and both libraries agree."""
    theirs = open_clip.model.CLIP(**{**open_clip.get_model_config("ViT-H-14"), "quick_gelu": False}).eval()
    state = theirs.state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 986_109_441
    ours = rewards.hpsv2_model("hpsv2", state).eval()
    pixels, ids = torch.randn(2, 3, 224, 224), torch.randint(1, 49405, (2, 77))
    ids[:, 0], ids[0, 9], ids[1, 76] = 49406, 49407, 49407
    with torch.no_grad():
        features = [
            (theirs.encode_image(pixels), rewards.features(ours.get_image_features(pixel_values=pixels))),
            (theirs.encode_text(ids), rewards.features(ours.get_text_features(input_ids=ids))),
        ]
    gaps = [((a - b).abs().max() / a.square().mean().sqrt()).item() for a, b in features]
    print(f"largest difference over the features' rms: image {gaps[0]:.1e}, text {gaps[1]:.1e}")
    assert max(gaps) < 1e-5


def test_reward_padding_token_does_not_matter(open_clip):
    """open_clip pads with 0, transformers with the end token: text is pooled at the first end token either way."""
    ours = rewards.hpsv2_model("hpsv2", tiny_open_clip(open_clip).state_dict(), tiny_clip_config()).eval()
    ids = torch.tensor([[48, 3, 4, 49] + [0] * 8, [48, 3, 4, 49] + [49] * 8])
    with torch.no_grad():
        first, second = rewards.features(ours.get_text_features(input_ids=ids))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_reward_text_cleaning_equals_open_clips(open_clip):
    basic_clean, whitespace_clean = open_clip.tokenizer.basic_clean, open_clip.tokenizer.whitespace_clean
    prompts = [
        "A  cat\n\twith &amp;amp; hats",
        "it\u2019s \u201cfine\u201d",
        "\ufb01sh",
        "  UPPER  ",
        "",
        "caf\u00e9 \U0001f600",
    ]
    for prompt in prompts:
        assert rewards.clean_text(prompt) == whitespace_clean(basic_clean(prompt)).lower()
    with pytest.MonkeyPatch.context() as patch:  # without ftfy
        patch.setitem(sys.modules, "ftfy", None)
        for prompt in prompts:
            assert rewards.clean_text(prompt) == whitespace_clean(basic_clean(prompt)).lower()
    assert rewards.clean_text("a <|endoftext|> b<start_of_text>") == "a b"


@pytest.fixture(scope="session")
def hpsv2_file(tmp_path_factory) -> Path:
    """A checkpoint file as HPSv2's, in half precision, of a tiny CLIP (the official one's layout, without open_clip), beside
    the toy's tokenizer."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
    g = torch.Generator().manual_seed(0)

    def block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        names = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
        }
        names |= {"attn.out_proj.bias": (width,), "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
        names |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
        names |= {f"ln_{i}.{p}": (width,) for i in (1, 2) for p in ("weight", "bias")}
        return {f"{prefix}transformer.resblocks.0.{name}": shape for name, shape in names.items()}

    shapes = {
        **block("", 16),
        **block("visual.", 24),
        "logit_scale": (),
        "positional_embedding": (16, 16),
        "text_projection": (16, 16),
    }
    shapes |= {
        "token_embedding.weight": (len(tokenizer), 16),
        "visual.class_embedding": (24,),
        "visual.positional_embedding": (17, 24),
    }
    shapes |= {
        "visual.conv1.weight": (24, 3, 8, 8),
        "visual.proj": (24, 16),
        "ln_final.weight": (16,),
        "ln_final.bias": (16,),
    }
    shapes |= {f"visual.ln_{at}.{p}": (24,) for at in ("pre", "post") for p in ("weight", "bias")}
    folder = tmp_path_factory.mktemp("hpsv2")
    tokenizer.save_pretrained(folder)
    state = {name: (0.3 * torch.randn(shape, generator=g)).half() for name, shape in shapes.items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_v2_compressed.pt")
    return folder / "HPS_v2_compressed.pt"


@pytest.fixture
def tiny_hpsv2_config(monkeypatch):
    from transformers import CLIPConfig, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
    shared = {"hidden_act": "gelu", "projection_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 64, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"hidden_size": 24, "intermediate_size": 96, "patch_size": 8, "image_size": 32}
    config = CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=16)
    monkeypatch.setattr(rewards, "vit_h_14_config", lambda: config)


@pytest.mark.parametrize("reward", ["pickscore", "hpsv2"])
def test_reward_is_the_models_own_cosine_in_fp32_whatever_the_batch(reward, hpsv2_file, tiny_hpsv2_config):
    """Against CLIPModel's own forward, with its preprocessing; a half precision file gives a float32 model; a prompt with a
    control token, an empty prompt, an upper case one; the same to 1e-6 one by one."""
    from transformers import CLIPModel, CLIPTokenizer

    path = ROOT / "toy" / "pickscore" if reward == "pickscore" else hpsv2_file
    images, prompts = noise_images(5, 3, 40, 30), ["", "A RED circle", *PROMPTS]
    score = rewards.load_reward(f"{reward}:{path}", "cpu")
    scores = score(images, prompts)
    tokenizer = CLIPTokenizer.from_pretrained(path if reward == "pickscore" else path.parent)
    if reward == "pickscore":
        model, pixels = CLIPModel.from_pretrained(path).eval(), rewards.preprocess_clip(images, 32)
    else:
        model = rewards.hpsv2_model("hpsv2", torch.load(path)["state_dict"]).eval()
        pixels = rewards.preprocess_hpsv2(images, 32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(
            input_ids=tokenizer(prompts, padding=True, return_tensors="pt").input_ids, pixel_values=pixels
        ).logits_per_image
    torch.testing.assert_close(scores, logits.diag() / model.logit_scale.exp(), rtol=1e-4, atol=1e-5)
    singly = torch.cat([score(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(scores, singly, rtol=0, atol=1e-6)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    if reward == "hpsv2":
        ends_early = score(images[:2], ["a red <|endoftext|> circle", "a red circle"][::-1][:1] * 2)
        assert torch.equal(score(images[:2], ["a red <|endoftext|> circle"] * 2), ends_early)


def test_reward_half_precision_folder_and_long_prompt(tmp_path):
    """from_pretrained would take the file's own dtype; and a prompt longer than the context is cut, not an error."""
    from transformers import CLIPModel, CLIPTokenizer

    CLIPModel.from_pretrained(ROOT / "toy" / "pickscore").half().save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(ROOT / "toy" / "pickscore").save_pretrained(tmp_path)
    model = rewards.load_clip("pickscore", CLIPModel, str(tmp_path), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in model.parameters()
    )
    images = noise_images(1, 3, 32, 32)
    score = rewards.load_reward(f"pickscore:{tmp_path}", "cpu")
    assert torch.equal(score(images, ["red " * 100]), score(images, ["red " * 14]))


def test_reward_features_of_either_transformers():
    """transformers 4 returns a tensor, 5 an object around it."""
    x = torch.randn(2, 3)
    assert rewards.features(x) is x and rewards.features(type("Output", (), {"pooler_output": x})) is x


def test_reward_aesthetic_head_is_one_affine_map(tmp_path, monkeypatch):
    """The official layout has no activations: its five layers collapse to w . x + b. And the scorer feeds it unit vectors."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes, places = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    state = {}
    for place, a, b in zip(places, sizes, sizes[1:], strict=False):
        state[f"layers.{place}.weight"], state[f"layers.{place}.bias"] = torch.randn(b, a) / a**0.5, torch.randn(b)
    w, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for place in places:
        layer = state[f"layers.{place}.weight"].double()
        w, bias = layer @ w, layer @ bias + state[f"layers.{place}.bias"].double()
    torch.save(state, tmp_path / "head.pth")
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                              patch_size=8, projection_dim=768)  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    monkeypatch.setattr(rewards, "load_clip", lambda what, kind, name, device: model.eval())
    images = noise_images(3, 3, 32, 48)
    scores = rewards.load_reward(f"aesthetic:{tmp_path / 'head.pth'}", "cpu")(images, ["ignored", "", "x"])
    with torch.no_grad():
        embeds = model(pixel_values=rewards.preprocess_clip(images, 32)).image_embeds.double()
    expected = (embeds / embeds.norm(dim=-1, keepdim=True)) @ w.T + bias
    torch.testing.assert_close(scores.double(), expected.squeeze(-1), rtol=1e-5, atol=1e-5)


MY_REWARDS = """
def brightness(images, prompts):
    return images.float().mean((1, 2, 3)) / 255

def lengths(images, prompts):
    return [len(p) for p in prompts]

def too_few(images, prompts): return [1.0]
def nan(images, prompts): return [0.0] * (len(prompts) - 1) + [float("nan")]
def inf(images, prompts): return [float("inf")] * len(prompts)
def words(images, prompts): return ["good"] * len(prompts)
def raises(images, prompts): return 1 / 0
def matrix(images, prompts): return [[1.0]] * len(prompts)
def nothing(images, prompts): return None
def verbose(images, prompts): raise RuntimeError("first" + chr(10) + "second")
number = 3
import torch
def moved(images, prompts): return [0.0] * len(prompts)
moved.networks = torch.nn.Linear(1, 1)
def full(images, prompts): raise torch.OutOfMemoryError("CUDA out of memory")
"""


def test_reward_sums_and_functions_of_your_own(tmp_path):
    (tmp_path / "mine.py").write_text(MY_REWARDS)
    images = noise_images(3, 3, 16, 16)
    (tmp_path / "rewards.py").write_text(MY_REWARDS)  # a name that is taken
    spec = f"{tmp_path}/mine.py:brightness=0.5, {tmp_path}/rewards.py:lengths=-2,incompressibility"
    reward = rewards.load_reward(spec, "cpu")
    total = reward(images, ["a", "bb", "ccc"])
    bright = images.double().mean((1, 2, 3)) / 255
    expected = 0.5 * bright - 2 * torch.tensor([1.0, 2.0, 3.0]) + rewards.jpeg_kilobytes(images)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    assert list(reward.parts) == ["brightness", "lengths", "incompressibility"]
    assert sys.modules["rewards"] is rewards
    assert reward.parts["lengths"].tolist() == [1, 2, 3] and total.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("too_few", "shape (1,) for 3 images"),
        ("nan", "returned nan for the prompt 'ccc'"),
        ("inf", "returned inf for the prompt 'a'"),
        ("words", "failed: "),
        ("raises", "failed: ZeroDivisionError: division by zero (mine.py, line 12)"),
        ("matrix", "shape (3, 1) for 3 images"),
        ("nothing", "failed: "),
        ("verbose", "failed: RuntimeError: first second (mine.py"),
        ("number", "has no function 'number'"),
        ("missing", "has no function 'missing'"),
        ("moved", "its attribute `networks` must be a list of torch modules"),
    ],
)
def test_reward_functions_that_misbehave(function, sentence, tmp_path):
    (tmp_path / "mine.py").write_text(MY_REWARDS)
    with pytest.raises(rewards.InputError) as error:
        rewards.load_reward(f"{tmp_path}/mine.py:{function}", "cpu")(noise_images(3, 3, 8, 8), ["a", "bb", "ccc"])
    assert sentence in str(error.value) and function in str(error.value) and "\n" not in str(error.value)


def test_reward_that_runs_out_of_memory_is_not_blamed_for_it(tmp_path):
    """prdp.py has a sentence for it, which says what to try."""
    (tmp_path / "mine.py").write_text(MY_REWARDS)
    with pytest.raises(torch.OutOfMemoryError):
        rewards.load_reward(f"{tmp_path}/mine.py:full", "cpu")(noise_images(3, 3, 8, 8), ["a", "bb", "ccc"])


def test_reward_that_is_not_finite_stops_the_run_before_any_update(tiny_sd, tmp_path, capsys):
    """In the second epoch, naming reward, prompt and epoch; the first epoch's checkpoint stays."""
    code = "calls = []\ndef r(images, prompts):\n    calls.append(1)\n    bad = len(calls) == 3\n"
    (tmp_path / "mine.py").write_text(
        code + "    return [float('nan') if bad else float(i) for i in range(len(prompts))]\n"
    )
    flags = [*SMALL_RUN, "--model", tiny_sd, "--reward", f"{tmp_path}/mine.py:r", "--out", str(tmp_path / "run")]
    exit_code, message = run_cli(*flags, capsys=capsys)
    assert exit_code == 2 and "epoch 2: reward r returned nan for the prompt 'a" in message and message.count("\n") == 1
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["epoch"] == 1


def test_reward_components_are_logged(tiny_sd, tmp_path, capsys):
    flags = [*SMALL_RUN, "--model", tiny_sd, "--reward", "incompressibility=3,compressibility=1", "--epochs", "1"]
    prdp.main([*flags, "--out", str(tmp_path / "run")])
    assert "reward_mean/compressibility" in capsys.readouterr().out
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    kilobytes = row["reward_mean/incompressibility"]
    assert kilobytes == -row["reward_mean/compressibility"] and row["reward_mean"] == pytest.approx(2 * kilobytes)


def damaged(folder: Path, what: str) -> str:
    """A reward spec whose weights are broken in one way."""
    import shutil

    from safetensors.torch import load_file, save_file

    pickscore, file = folder / "pickscore", folder / "weights.pt"
    if what.startswith("pickscore"):
        shutil.copytree(ROOT / "toy" / "pickscore", pickscore)
        weights = pickscore / "model.safetensors"
        if what == "pickscore truncated":
            weights.write_bytes(weights.read_bytes()[:-5000])
        else:
            state = load_file(weights)
            del state["visual_projection.weight"]
            save_file(state, weights, metadata={"format": "pt"})
        return f"pickscore:{pickscore}"
    torch.save({"state_dict": {"weight": torch.ones(3)}}, file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    if what == "unsafe":
        torch.save({"state_dict": Path("x")}, file)
    if what == "numbers":
        torch.save({"state_dict": {"a": 3}}, file)
    return str(file)


@pytest.mark.parametrize("reward", ["hpsv2", "hpsv2.1", "aesthetic"])
@pytest.mark.parametrize(
    ("what", "sentence"),
    [("truncated", "no intact checkpoint"), ("unsafe", "no intact checkpoint"), ("numbers", "no checkpoint of tensors"),
     ("other weights", "its checkpoint is no")],
)  # fmt: skip
def test_reward_weights_that_are_wrong(reward, what, sentence, tmp_path):
    with pytest.raises(rewards.InputError, match=reward) as error:
        rewards.load_reward(f"{reward}:{damaged(tmp_path, what)}", "cpu")
    assert sentence in str(error.value)
    with pytest.raises(rewards.InputError, match="no such file"):
        rewards.load_reward(f"{reward}:/nowhere", "cpu")


@pytest.mark.parametrize(
    ("what", "sentence"), [("pickscore truncated", "damaged"), ("pickscore incomplete", "no complete CLIPModel")]
)
def test_reward_pickscore_folder_that_is_wrong(what, sentence, tmp_path):
    with pytest.raises(rewards.InputError, match=sentence):
        rewards.load_reward(damaged(tmp_path, what), "cpu")


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
    animals, names = (prdp.load_prompts(str(ROOT / "prompts" / f"{n}.txt")) for n in ("animals", "animal_names"))
    assert len(animals) == len(names) == 45 and animals == [f"A painting of a {name}" for name in names]
    seen, unseen = (prdp.load_prompts(str(ROOT / "prompts" / f"{n}.txt")) for n in ("shapes", "shapes_unseen"))
    assert len(seen) + len(unseen) == 6 * 8 * 7 and not set(seen) & set(unseen)


def test_prompts_are_drawn_independently_and_uniformly(tiny_sd):
    config = tiny_config(tiny_sd, prompts_per_epoch=1000)
    drawn = prdp.draw_prompts(config, PROMPTS, 1)
    assert drawn == prdp.draw_prompts(config, PROMPTS, 1) != prdp.draw_prompts(config, PROMPTS, 2)
    assert all(250 < drawn.count(p) < 420 for p in PROMPTS)
    few = tiny_config(tiny_sd, prompts_per_epoch=3)
    assert any(len(set(prdp.draw_prompts(few, PROMPTS, epoch))) < 3 for epoch in range(1, 20))  # with replacement


def test_import_needs_torch_alone_and_does_nothing(tmp_path):
    code = (
        "import sys\n"
        "for name in ('numpy', 'diffusers', 'transformers', 'triton', 'PIL', 'matplotlib', 'tqdm', 'peft'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import prdp\n"
        "print('silent')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
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
    flags = [*SMALL_RUN, "--model", tiny_sd, "--epochs", "2", "--images-per-prompt", "4", "--microbatch", "8"]
    flags += ["--out", str(out)]
    assert run_cli(*flags, capsys=capsys)[0] == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    promised = (
        "epoch reward_mean reward_std loss clip_fraction skipped_fraction log_ratio_old log_ratio_ref grad_norm images_per_second "
        "seconds_sample seconds_reference seconds_reward seconds_score seconds_update"
    )
    for row in rows:
        assert set(promised.split()) <= set(row) and all(math.isfinite(value) for value in row.values())
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
    assert all(torch.equal(value, state["unet"][name]) for name, value in pipe.unet.state_dict().items())
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
    flags = [*SMALL_RUN, "--model", str(model), "--prompts", str(tmp_path / "p.txt"), "--epochs", "1"]
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
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
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
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "images_per", "peak"))} for row in rows]


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
    assert (whole / "samples" / "epoch_0003.png").read_bytes() == (halves / "samples" / "epoch_0003.png").read_bytes()


def test_resume_of_a_damaged_checkpoint(tiny_sd, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(run), capsys=capsys)[0] == 0
    state = run / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    code, message = run_cli("--resume", str(run), capsys=capsys)
    assert code == 2 and f"{state}: damaged" in message and message.count("\n") == 1


def test_resume_refuses_what_would_change_the_result(tiny_sd, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", run, capsys=capsys)[0] == 0
    for flag, value, saved in (("--kl-weight", "1", 3e-5), ("--seed", "4", 3), ("--dtype", "bf16", "fp32")):
        code, message = run_cli("--resume", run, flag, value, capsys=capsys)
        assert code == 2 and flag in message and str(saved) in message and message.count("\n") == 1
    assert run_cli("--resume", run, "--seed", "3", "--epochs", "1", "--offload", "on", capsys=capsys)[0] == 0


def start(*arguments: str, launcher: tuple[str, ...] = (), **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(ROOT / "prdp.py"), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
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
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 2:
            break
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code and f"python prdp.py --resume {run}" in errors and "Traceback" not in errors
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
    command = [sys.executable, "-c", KILLER, str(ROOT), str(tmp_path / "whole"), str(tmp_path / "runs"), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
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
    assert run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(run), capsys=capsys)[0] == 0
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
    assert errors.startswith("prdp.py: ") and errors.endswith("File too large; what was saved is intact.\n")
    assert (run / "checkpoint" / "state.pt").read_bytes() == before
    assert run_cli("--resume", str(run), "--epochs", "2", capsys=capsys)[0] == 0
    assert [row["epoch"] for row in metrics_of(run)] == [1, 2]


def test_resume_while_another_process_runs_there(tiny_sd, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_cli(*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(run), capsys=capsys)[0] == 0
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
    prdp.main([*SMALL_RUN, "--model", tiny_sd, "--epochs", "2", "--learning-rate", "1e-3", "--out", str(run)])
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
        pipe = StableDiffusionPipeline.from_pretrained(finished_run / "pipeline")  # for its scheduler
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
            assert record["rewards"][model][files[0]][prompt] == pytest.approx(sizes, abs=0.02)  # a grey level, rarely
    for file in files:
        base, finetuned = (np.array(list(record["rewards"][m][file].values())) for m in ("base", "finetuned"))
        row = record["table"][file]
        for name, x in (("base", base), ("finetuned", finetuned), ("difference", finetuned - base)):
            assert row[name]["mean"] == pytest.approx(x.mean(), rel=1e-6, abs=1e-7)
            assert row[name]["standard_error"] == pytest.approx(x.mean(1).std(ddof=1) / len(x) ** 0.5, rel=1e-5)
            assert f"{x.mean():.4f} +- " in printed
        assert row["win rate"] == pytest.approx(np.mean((finetuned > base) + 0.5 * (finetuned == base)), abs=1e-6)
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
    flags = ["--evaluate", str(finished_run), "--prompts", *files, "--samples-per-prompt", "2", "--microbatch", "2"]
    limit = [math.inf]
    assert run_cli(*flags, "--out", str(tmp_path / "whole"), capsys=capsys) == (0, "")
    in_one_go, codes, calls = len(drawn), [], []
    for limit[0] in (3, 3, math.inf):
        drawn.clear()
        codes.append(run_cli(*flags, "--out", str(tmp_path / "parts"), capsys=capsys)[0])
        calls.append(len(drawn))
    assert codes == [130, 130, 0] and calls == [3, 3, in_one_go - 3]  # the pictures to show are drawn anew
    whole, parts = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "parts"))
    assert whole["rewards"] == parts["rewards"] and whole["table"] == parts["table"]


def test_evaluate_a_folder_against_itself(tiny_sd, tmp_path, capsys):
    """No run needed: any two models; of one and the same the difference is exactly nothing, and half the pairs are won."""
    files = prompt_files(tmp_path)
    common = ["--reward", "compressibility", "--ddpm-steps", "5", "--prompts", files[1], "--samples-per-prompt", "3"]
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
        (["--evaluate", str(tmp_path / "young")], "has no pipeline/ yet; finish the run with --resume"),
        ([*flags[:-1], str(tmp_path / "f"), "--evaluate", str(tmp_path)], "no Stable Diffusion folder in diffusers"),
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
    base = {"reward_std": 0.1, **{name: 0.0 for name in prompts.report.COLUMNS[3:]}}
    for folder, heights in (("rises", [0.3, 0.4, 0.2, 0.5, 0.6]), ("falls", [0.3, 0.2, 0.2, 0.1, 0.1])):
        (tmp_path / folder).mkdir()
        warned = []
        for epoch, (reward, distance) in enumerate(zip(heights, (0.0, 9.0, 11.0, 12.0, 30.0), strict=True), 1):
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
        *SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--out", str(tmp_path / "run"), capsys=capsys
    )
    assert code == 2 and "the policy scores its own trajectory" in message


def test_cli_one_image_per_prompt(tiny_sd, tmp_path, capsys):
    """As DDPO samples in the large: B = 1, to the last picture."""
    flags = [*SMALL_RUN, "--model", tiny_sd, "--loss", "ddpo", "--images-per-prompt", "1", "--epochs", "1"]
    assert run_cli(*flags, "--out", str(tmp_path / "run"), capsys=capsys)[0] == 0
    assert (tmp_path / "run" / "before_after.png").is_file()


def broken_backend(*_):
    raise ValueError("no such chip")


@pytest.mark.parametrize(("error", "sentence"), [
    (lambda: torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory: try --offload on, or in a new run --microbatch 1,"),
    (lambda: torch._inductor.exc.InvalidCxxCompiler(), "--compile: failed (No working C++ compiler found"),
    (lambda: torch.compile(torch.sin, backend=broken_backend)(torch.ones(1)), "--compile: failed (backend='broken_backend' raised: ValueError: no such"),
])  # fmt: skip
def test_cli_out_of_memory_and_compiler_errors(tiny_sd, tmp_path, capsys, monkeypatch, error, sentence):
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
    assert code == 2 and message == "prdp.py: --log-to tensorboard: not installed; pip install tensorboard.\n"
    monkeypatch.undo()
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    prompts.report.open_log.cache_clear()
    assert run_cli(*flags, "wandb", "--out", str(tmp_path / "run"), capsys=capsys)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sys.modules.pop("wandb").lines == lines


def test_claims_quick(tmp_path):
    """One seed of every experiment at tiny size, with its figures; the committed results stay as they are."""
    committed = {p: p.read_bytes() for p in (ROOT / "toy").glob("claim*") if p.suffix in (".json", ".png")}
    command = [sys.executable, str(ROOT / "toy" / "claims.py"), "--quick", "--jobs", "2", "--out", str(tmp_path)]
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
    process = start(*arguments, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    out, errors = process.communicate(timeout=timeout)
    return process.returncode, out, errors


@pytest.mark.parametrize("changes", [[], ["--loss", "ddpo", "--lora-rank", "2", "--images-per-prompt", "8"]])
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
    assert (one / "samples" / "epoch_0000.png").read_bytes() == (two / "samples" / "epoch_0000.png").read_bytes()
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-6 if a["epoch"] == 1 else 2e-2), name
    ours, theirs = weights_of(one), weights_of(two)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=2e-7)
    histories = [torch.load(run / "checkpoint" / "state.pt", weights_only=True)["history"] for run in (one, two)]
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
    flags = [*SMALL_RUN, "--model", tiny_sd, "--epochs", "1", "--reward", f"{tmp_path / 'r.py'}:tied"]
    code, _, errors = torchrun(*flags, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    assert metrics_of(tmp_path / "run")[0]["skipped_fraction"] >= 0.5


def test_distributed_failure_of_one_stops_all(tiny_sd, tmp_path):
    """Within a minute, with the failing process's own sentence; the last checkpoint is there."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = [*SMALL_RUN, "--model", tiny_sd, "--epochs", "50", "--reward", f"{tmp_path / 'r.py'}:fails"]
    code, _, errors = torchrun(*flags, "--out", str(tmp_path / "run"), timeout=60)
    assert code != 0 and "prdp.py (process 1): epoch 2: reward fails returned nan for the prompt" in errors
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
    (["--reward", "pickscore:/nowhere"], "cannot load /nowhere"),
    (["--images-per-prompt", "0"], "--images-per-prompt 0: must be at least 1"),
    (["--images-per-prompt", "1", "--microbatch", "8"], "--images-per-prompt 1: --loss prdp compares images"),
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
    (["--ddpm-steps", "1001"], "--ddpm-steps 1001: does not divide the model's 1000 training steps"),
    (["--model", "/nowhere/sd"], "run --preset toy"),
    (["--model", "{empty_folder}"], "no Stable Diffusion folder in diffusers layout"),
    (["--out", "{used}"], "already in use"),
    (["--resume", "{empty_folder}"], "no config.json there"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys, monkeypatch):
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
    assert message.startswith("prdp.py: ") and message.count("\n") == 1 and "Traceback" not in message
    assert not (tmp_path / "out").exists() and (paths["used"] / "metrics.jsonl").read_text() == "precious"
