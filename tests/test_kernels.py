"""The Triton kernels, against prdp.py's functions of the same names, float64 autograd and plain
numbers. On a machine without a GPU Triton's interpreter runs them."""

import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import prdp
from conftest import ROOT, SD14_SCHEDULER, needs_gpu
from support import machine
from support.inputs import load_module

pytest.importorskip("triton", reason="no triton for this system: prdp.py's own functions run")
kernels = load_module("log_prob", str(ROOT / "kernels" / "log_prob.py"))
pytestmark = pytest.mark.gpu  # without one they run too, but `-m gpu` selects them

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = 49  # the step of smallest sigma, 0.0206, and of the largest log-prob, about 2.5
GUIDANCE = 5.3  # no float32 number: a kernel that rounded it would be seen


def plain(function: Callable) -> Callable:
    """A function of prdp.py as it runs where there are no kernels."""

    def call(*arguments, **named):
        with mock.patch.object(machine, "kernels_for", lambda noise_pred: None):
            return function(*arguments, **named)

    return call


plain_log_prob, plain_sample = plain(prdp.guided_log_prob), plain(prdp.guided_sample)

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_shape = pytest.mark.parametrize(  # B = 1; odd and less than a block; several blocks a row
    "shape", [(1, 4, 8, 8), (3, 3, 5, 7), (2, 4, 64, 64)]
)


def denoising_step(shape: tuple[int, ...], dtype: torch.dtype, steps: list[int] | None = None):
    """Arguments of `guided_log_prob` as Stable Diffusion gives them, x_prev drawn from the policy.

    The rows are at `steps`, or at mixed ones.
    """
    schedule = prdp.ddpm_schedule(SD14_SCHEDULER, 50)
    steps = steps or [(LAST + 20 * m) % 50 for m in range(shape[0])]
    a, b, sigma = (column[steps] for column in schedule[1:])
    noise_pred = torch.randn(2 * shape[0], *shape[1:]).to(dtype)
    x_t, noise = torch.randn(2, *shape)
    x_prev, _ = plain_sample(noise_pred, x_t, noise, a, b, sigma, GUIDANCE)
    step = {"noise_pred": noise_pred, "x_t": x_t, "x_prev": x_prev}
    step |= {"coef_sample": a, "coef_noise": b, "sigma": sigma}
    return {name: x.to(DEVICE) for name, x in step.items()} | {"guidance_scale": GUIDANCE}


def normal_log_prob(noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma, guidance_scale):
    """The oracle: guidance as a weighted sum, then torch.distributions, all in float64."""
    a, b, sigma = (x.view(-1, 1, 1, 1) for x in (coef_sample, coef_noise, sigma))
    u, c = noise_pred.double().chunk(2)
    mean = a * x_t.double() + b * ((1 - guidance_scale) * u + guidance_scale * c)
    return torch.distributions.Normal(mean, sigma).log_prob(x_prev.double()).mean((1, 2, 3))


def value_and_gradient(function, step: dict, upstream: Tensor | float = 1.0, dtype=None):
    """function(**step), and the gradient for noise_pred of its sum weighted by `upstream`."""
    leaf = step["noise_pred"].to(dtype or step["noise_pred"].dtype, copy=True).requires_grad_()
    value = function(**{**step, "noise_pred": leaf})
    (value * upstream).sum().backward()
    return value.detach(), leaf.grad


@each_dtype
@each_shape
def test_log_prob_and_gradient_equal_float64_autograd(shape, dtype):
    """Values to rounding in float64, gradients to twice PyTorch's own rounding to the dtype."""
    step = denoising_step(shape, dtype)
    upstream = torch.randn(shape[0], dtype=torch.float64, device=DEVICE)
    expected, exact = value_and_gradient(normal_log_prob, step, upstream, torch.float64)
    theirs, torchs = value_and_gradient(plain_log_prob, step, upstream)
    values, ours = value_and_gradient(kernels.guided_log_prob, step, upstream)
    torch.testing.assert_close(theirs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert torchs.dtype == ours.dtype == dtype

    error, allowed = (ours - exact).abs().max(), 2 * (torchs - exact).abs().max()
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":  # Triton's interpreter truncates to it
        allowed = allowed.maximum(2.0**-7 * exact.abs().max())
    assert error <= allowed + 1e-12 * exact.abs().max()
    assert exact.abs().max() > 0.01 / step["x_t"][0].numel()  # not vacuous


@each_dtype
def test_log_prob_errs_by_less_than_a_hundredth_of_the_clip_range(dtype):
    """At the last step of SD v1.4, sigma = 0.0206, where float32 residuals alone cost 4e-8."""
    step = denoising_step((2, 4, 64, 64), dtype, [LAST, LAST])
    assert step["sigma"].tolist() == pytest.approx([0.0206, 0.0206], abs=5e-5)
    exact = normal_log_prob(**step)
    assert (kernels.guided_log_prob(**step) - exact).abs().max() < 1e-8
    assert exact.mean().item() == pytest.approx(2.46, abs=0.05)


def test_log_prob_takes_any_strides_and_leaves_its_inputs():
    """The bits of value and gradient are those of contiguous tensors."""
    step = denoising_step((3, 3, 5, 7), torch.bfloat16)
    log_prob, gradient = value_and_gradient(kernels.guided_log_prob, step)
    strided = {k: step[k].mT.contiguous().mT for k in ("x_t", "x_prev")}
    for k in ("coef_sample", "coef_noise", "sigma"):
        strided[k] = torch.stack([step[k], step[k]], 1)[:, 0]
    noise_pred = step["noise_pred"].to(memory_format=torch.channels_last, copy=True)
    copies = {k: x.clone() for k, x in strided.items()}
    again = value_and_gradient(
        kernels.guided_log_prob, {**step, **strided, "noise_pred": noise_pred}
    )
    assert torch.equal(again[0], log_prob) and torch.equal(again[1], gradient)
    assert all(torch.equal(x, copies[k]) for k, x in strided.items())
    assert torch.equal(noise_pred, step["noise_pred"])


def test_bits_repeat_and_do_not_depend_on_the_other_rows():
    step = denoising_step((3, 4, 16, 16), torch.bfloat16)
    log_prob, gradient = value_and_gradient(kernels.guided_log_prob, step)
    again = value_and_gradient(kernels.guided_log_prob, step)
    assert torch.equal(log_prob, again[0]) and torch.equal(gradient, again[1])
    for m in range(3):
        row = {k: x[[m]] for k, x in step.items() if isinstance(x, Tensor)}
        row |= {"noise_pred": step["noise_pred"][[m, 3 + m]], "guidance_scale": GUIDANCE}
        alone = value_and_gradient(kernels.guided_log_prob, row)
        assert torch.equal(alone[0], log_prob[[m]])
        assert torch.equal(alone[1], gradient[[m, 3 + m]])


def clip_at(log_prob: Tensor, moved: float | Tensor, clip_range: float) -> dict:
    """The other arguments of `guided_log_ratio`, for a policy `moved` away from theta_old."""
    old = {"log_prob_ref": log_prob.clone(), "log_prob_old": log_prob - moved}
    return {**old, "clip_range": clip_range}


@each_dtype
@each_shape
def test_sample_is_the_plain_one_and_scores_again_to_the_bit(shape, dtype):
    """x_prev has the bits of prdp.py's; its log-prob those of re-scoring, of the oracle's value."""
    step = denoising_step(shape, dtype)
    del step["x_prev"]
    noise = torch.randn(shape)
    x_prev, log_prob = kernels.guided_sample(**step, noise=noise.to(DEVICE))
    assert x_prev.dtype == torch.float32 and log_prob.dtype == torch.float64
    assert not log_prob.requires_grad
    on_cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in step.items()}
    assert torch.equal(x_prev.cpu(), plain_sample(**on_cpu, noise=noise)[0])

    step["x_prev"] = x_prev
    assert torch.equal(log_prob, kernels.guided_log_prob(**step))
    assert torch.equal(
        log_prob, kernels.guided_log_ratio(**step, **clip_at(log_prob, 0.0, 1e-6))[0]
    )
    torch.testing.assert_close(log_prob, normal_log_prob(**step), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip_range", [2.0**-20, 2.0**-10, math.inf])
def test_log_ratio_is_clipped_and_its_gradient_passes_at_the_edge(clip_range):
    """Rows inside, outside and exactly on either edge: Eqs. 19 and 20 in plain numbers."""
    step = denoising_step((7, 2, 3, 3), torch.float32, [40] * 7)
    edge = min(clip_range, 1.0)
    moved = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5], dtype=torch.float64) * edge
    inside = moved.abs().to(DEVICE) <= clip_range
    log_prob = kernels.guided_log_prob(**step)
    others = clip_at(log_prob, moved.to(DEVICE), clip_range)
    others["log_prob_ref"][0] -= 0.25  # in this row the ratio to pi_ref is not 0
    if clip_range < math.inf:
        assert ((log_prob - others["log_prob_old"])[3:5].abs() == clip_range).all()

    leaf = step["noise_pred"].clone().requires_grad_()
    results = kernels.guided_log_ratio(**{**step, "noise_pred": leaf}, **others)
    assert torch.equal(results[0], log_prob)
    columns = (others["log_prob_ref"], others["log_prob_old"], *results)
    for ref, old, new, ratio, clipped in zip(*(x.tolist() for x in columns), strict=True):
        assert ratio == new - ref
        assert clipped == min(max(new - ref, old - ref - clip_range), old - ref + clip_range)

    # Any one output alone, some, all: the gradient is log_prob's, times those that pass.
    upstream = torch.randn(3, 7, dtype=torch.float64, device=DEVICE)
    for used in ([0], [1], [2], [0, 2], [0, 1, 2]):
        weights = sum(upstream[k] * (inside if k == 2 else 1) for k in used)
        _, expected = value_and_gradient(normal_log_prob, step, weights, torch.float64)
        weighted = sum(results[k] @ upstream[k] for k in used)
        (gradient,) = torch.autograd.grad(weighted, leaf, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-12)


def test_log_ratio_passes_nan_on():
    step = denoising_step((2, 2, 3, 3), torch.float32)
    step["noise_pred"][0, 0, 0, 0] = math.nan
    step |= clip_at(torch.ones(2, dtype=torch.float64, device=DEVICE), 0.0, 1e-6)
    assert [x.isnan().tolist() for x in kernels.guided_log_ratio(**step)] == [[True, False]] * 3


def test_plain_log_prob_is_a_numpy_loop():
    """Element by element; and a float64 noise_pred runs the plain form on every device."""
    step = denoising_step((2, 2, 3, 3), torch.float64)
    numbers = {k: x.cpu().double().numpy() for k, x in step.items() if isinstance(x, Tensor)}
    expected = np.zeros(2)
    for m in range(2):
        a, b, sigma = (numbers[k][m] for k in ("coef_sample", "coef_noise", "sigma"))
        for i in np.ndindex(2, 3, 3):
            u, c = numbers["noise_pred"][m][i], numbers["noise_pred"][2 + m][i]
            mean = a * numbers["x_t"][m][i] + b * (u + GUIDANCE * (c - u))
            z = (numbers["x_prev"][m][i] - mean) / sigma
            expected[m] += (-0.5 * z * z - np.log(sigma * np.sqrt(2 * np.pi))) / 18
    np.testing.assert_allclose(prdp.guided_log_prob(**step).cpu(), expected, rtol=1e-12)
    leaf, rest = step["noise_pred"].requires_grad_(), list(step.values())[1:]
    assert torch.autograd.gradcheck(lambda x: prdp.guided_log_prob(x, *rest), leaf)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("noise_pred", (3, 4, 8, 8)),
        ("noise_pred", (4, 4, 8, 7)),
        ("x_t", (2, 4, 8)),
        ("x_prev", (1, 4, 8, 8)),
        ("sigma", (3,)),
        ("coef_noise", (2, 1)),
        ("coef_sample", ()),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    step = denoising_step((2, 4, 8, 8), torch.float32)
    step[name] = torch.zeros(shape, device=DEVICE)
    ratio = {**step, **clip_at(torch.zeros(2, device=DEVICE), 0.0, 1e-6)}
    sample = {"noise" if k == "x_prev" else k: x for k, x in step.items()}
    for function, arguments in (
        (kernels.guided_log_prob, step),
        (kernels.guided_log_ratio, ratio),
        (kernels.guided_sample, sample),
    ):
        with pytest.raises(AssertionError) as error:
            function(**arguments)
        assert str(shape) in str(error.value)


def test_kernels_refuse_what_is_not_on_a_gpu(monkeypatch):
    step = denoising_step((2, 2, 3, 3), torch.float32)
    cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in step.items()}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="CUDA"):
        kernels.guided_log_prob(**cpu)


@needs_gpu
def test_prdp_runs_the_kernels_on_a_gpu():
    step = denoising_step((2, 4, 8, 8), torch.bfloat16)
    module, words = machine.load_kernels()
    assert words == "Triton kernels"
    assert torch.equal(prdp.guided_log_prob(**step), module.guided_log_prob(**step))


@needs_gpu
def test_passes_never_wait_for_the_gpu():
    step = denoising_step((2, 4, 8, 8), torch.bfloat16)
    value_and_gradient(kernels.guided_log_prob, step)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(kernels.guided_log_prob, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_rows_beyond_two_billion_elements():
    """Row offsets are int64: the last of 2^17 + 1 rows of 2^14 elements is as row 0, its copy."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    rows, step = 2**17 + 1, denoising_step((1, 4, 64, 64), torch.float16, [LAST])
    many = {k: x.expand(rows, *x.shape[1:]).contiguous() for k, x in list(step.items())[1:-1]}
    u, c = step["noise_pred"]
    noise_pred = torch.cat([u.expand(rows, -1, -1, -1), c.expand(rows, -1, -1, -1)])
    noise_pred.requires_grad_()
    log_prob = kernels.guided_log_prob(noise_pred, **many, guidance_scale=GUIDANCE)
    log_prob.sum().backward()
    assert (log_prob == log_prob[0]).all()
    for half in noise_pred.grad.chunk(2):
        assert torch.equal(half[0], half[-1])
    expected = normal_log_prob(**step)
    torch.testing.assert_close(log_prob[:1].detach(), expected, rtol=1e-12, atol=1e-12)
