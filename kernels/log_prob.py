"""log pi_theta(x_{t-1} | x_t, c) of a guided denoising step (Eqs. 2 and 4), eager and in Triton.

In order: eager references, kernels, launchers, autograd.Function, public functions. A public
function has the signature, the shapes and the meaning of its `_ref` twin. It runs Triton on CUDA
tensors and the reference on all others.

M rows, each one image at one step; D = C*H*W. Arithmetic is float64 in registers: log-probs are
compared to within clip_range = 1e-6, and at the last step (sigma = 0.02, log-prob 2.5) a float32
residual alone errs by 4e-8. It costs no time where memory is the limit, as on A100, H100 and H200;
consumer GPUs, with 1/64 of the float32 rate in float64, are limited by the arithmetic instead, at a
time still small beside the network's.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no triton: the references run
    triton = None

NoisePred = Tensor | tuple[Tensor, Tensor] | list[Tensor]

# ---- 1. Eager references -----------------------------------------------------------------------


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(sample; mean, sigma^2 I) of Eqs. 2 and 4, a mean over latent dimensions.

    (M, ...), (M, ...), (M,) -> (M,). float64 whatever comes in: at the last step a log-prob is
    about 2.5, where float32 numbers lie 2.4e-7 apart, a quarter of Table 4's smallest clip_range.
    (Summed over 4*64*64 dimensions it would be 40,000: far worse.)
    """
    shapes = (sample.shape, mean.shape, sigma.shape)
    assert sample.shape == mean.shape and sigma.shape == sample.shape[:1], shapes
    squared = (sample.double() - mean.double()).square().flatten(1).mean(1)
    sigma = sigma.double()
    return -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)


def guided_mean_ref(
    noise_pred: NoisePred,
    x_t: Tensor,
    coef_sample: Tensor,
    coef_noise: Tensor,
    guidance_scale: float,
) -> Tensor:
    """The mean of Eq. 2 under classifier-free guidance (Sec. 4.1): (M, ...) float64.

    The gradient goes through both halves.
    """
    if isinstance(noise_pred, Tensor):
        unconditional, conditional = noise_pred.double().chunk(2)
    else:
        unconditional, conditional = (half.double() for half in noise_pred)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    per_row = (-1,) + (1,) * (x_t.dim() - 1)
    return coef_sample.view(per_row) * x_t.double() + coef_noise.view(per_row) * guided


def guided_log_prob_ref(
    noise_pred: NoisePred,  # (2M, ...), the unconditional half first, or its two halves (M, ...)
    x_t: Tensor,  # (M, ...) float32
    x_prev: Tensor,  # (M, ...) float32: x_{t-1}
    coef_sample: Tensor,  # (M,) float64, of Eq. 2, per row: steps may be mixed
    coef_noise: Tensor,  # (M,) float64
    sigma: Tensor,  # (M,) float64
    guidance_scale: float,
) -> Tensor:
    """log N(x_prev; coef_sample * x_t + coef_noise * guided, sigma^2 I) of Eqs. 2 and 4.

    (M,) float64, in nats per latent dimension. guided = u + guidance_scale * (c - u) for the
    unconditional and conditional halves u, c of noise_pred, in any float dtype. Only noise_pred
    gets a gradient.
    """
    mean = guided_mean_ref(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    return gaussian_log_prob(x_prev, mean, sigma)


def guided_log_ratio_ref(
    noise_pred: NoisePred,
    x_t: Tensor,
    x_prev: Tensor,
    coef_sample: Tensor,
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    log_prob_ref: Tensor,  # (M,) float64, under pi_ref
    log_prob_old: Tensor,  # (M,) float64, under pi_theta_old
    clip_range: float,  # epsilon of Eq. 20, in the unit of log_prob; inf: no clipping
) -> tuple[Tensor, Tensor, Tensor]:
    """`guided_log_prob` and, from it, r-hat of Eq. 19 and its clipped form of Eq. 20.

    Returns log_prob, log_ratio, clipped_log_ratio, each (M,) float64. The gradient passes at the
    clip range's edge, as torch.clamp's. prdp.py keeps log_probs and needs only those; this is for
    trainers that never store them, and want log-prob and clipping fused.
    """
    log_prob = guided_log_prob_ref(
        noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma, guidance_scale
    )
    log_ratio, log_ratio_old = log_prob - log_prob_ref, log_prob_old - log_prob_ref  # Eq. 19
    low, high = log_ratio_old - clip_range, log_ratio_old + clip_range
    clipped_log_ratio = torch.clamp(log_ratio, low, high)  # Eq. 20
    return log_prob, log_ratio, clipped_log_ratio


@torch.no_grad()
def guided_sample_ref(
    noise_pred: NoisePred,
    x_t: Tensor,
    noise: Tensor,  # (M, ...) float32, standard normal
    coef_sample: Tensor,
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} ~ N(mean, sigma^2 I) of Eq. 2, without a gradient.

    Returns x_prev, (M, ...) float32, and its log-prob, (M,) float64: that of the stored, rounded
    x_prev, to the bit what `guided_log_prob` says of it.
    """
    mean = guided_mean_ref(noise_pred, x_t, coef_sample, coef_noise, guidance_scale)
    x_prev = (mean + sigma.view((-1,) + (1,) * (x_t.dim() - 1)) * noise).float()
    return x_prev, gaussian_log_prob(x_prev, mean, sigma)


# ---- 2. Triton kernels -------------------------------------------------------------------------
#
# Floats are passed as tl.float64: unannotated, Triton would round them to float32.


def jit(**options):
    """triton.jit; without triton nothing, and the kernels are never called."""
    return triton.jit(**options) if triton else lambda kernel: kernel


@jit()
def guided_mean(u, c, x_t, coef_sample, coef_noise, guidance_scale):
    """`guided_mean_ref` in registers, in its order of operations."""
    u = u.to(tl.float64)
    guided = u + guidance_scale * (c.to(tl.float64) - u)
    return coef_sample * x_t.to(tl.float64) + coef_noise * guided


@jit(
    do_not_specialize=["draw", "clip"],
    do_not_specialize_on_alignment=[
        "coef_sample",
        "coef_noise",
        "sigma",
        "log_prob_ref",
        "log_prob_old",
        "log_prob",
        "log_ratio",
        "clipped_log_ratio",
    ],
)
def forward_kernel(
    u,  # (M, D) fp32, bf16 or fp16: unconditional half
    c,  # (M, D), likewise: conditional half
    x_t,  # (M, D) fp32
    given,  # (M, D) fp32: x_prev, or with `draw` the noise to make it from
    x_prev,  # (M, D) fp32: written with `draw`
    coef_sample,  # (M,) fp64, and so are all that follow
    coef_noise,
    sigma,
    log_prob_ref,  # read with `clip`, as is the next
    log_prob_old,
    log_prob,  # written
    log_ratio,  # written with `clip`, as is the next
    clipped_log_ratio,
    guidance_scale: tl.float64,
    clip_range: tl.float64,
    D,
    draw,
    clip,
    BLOCK: tl.constexpr,
):
    """One program a row: guidance, mean, residual, square, sum.

    With `draw` x_prev first, with `clip` Eqs. 19 and 20. Both are known at run time only. So the
    three operations share one binary, with one order of summation, and a sample's log-prob has the
    very bits of its later re-scoring.
    """
    row = tl.program_id(0).to(tl.int64)
    a, b, s = tl.load(coef_sample + row), tl.load(coef_noise + row), tl.load(sigma + row)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        u_block = tl.load(u + row * D + column, inside, 0.0)
        c_block = tl.load(c + row * D + column, inside, 0.0)
        x_t_block = tl.load(x_t + row * D + column, inside, 0.0)
        x = tl.load(given + row * D + column, inside, 0.0)
        mean = guided_mean(u_block, c_block, x_t_block, a, b, guidance_scale)
        if draw != 0:
            x = (mean + s * x.to(tl.float64)).to(tl.float32)
            tl.store(x_prev + row * D + column, x, inside)
        residual = x.to(tl.float64) - mean  # 0 where masked
        total += residual * residual
    value = -(tl.sum(total) / D) / (2 * s * s) - tl.log(s) - 0.9189385332046727  # 0.5 * log(2 * pi)
    tl.store(log_prob + row, value)
    if clip != 0:
        reference = tl.load(log_prob_ref + row)
        ratio, ratio_old = value - reference, tl.load(log_prob_old + row) - reference  # Eq. 19
        low, high = ratio_old - clip_range, ratio_old + clip_range
        tl.store(log_ratio + row, ratio)
        # Eq. 20. Not tl.clamp, which would turn NaN into a bound.
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        tl.store(clipped_log_ratio + row, clipped)


@jit(do_not_specialize_on_alignment=["upstream", "coef_sample", "coef_noise", "sigma"])
def backward_kernel(
    upstream,  # (M,) fp64: dloss/dlog_prob
    u,  # (M, D): as above
    c,
    x_t,
    x_prev,
    coef_sample,  # (M,) fp64
    coef_noise,
    sigma,
    grad_u,  # (M, D): written, in the dtype of u
    grad_c,  # (M, D): written, in the dtype of c
    guidance_scale: tl.float64,
    D,
    BLOCK: tl.constexpr,
):
    """One program a block of a row.

    dlog_prob/dmean = (x_prev - mean) / (sigma^2 D); dmean/dc = coef_noise * guidance_scale;
    dmean/du = coef_noise * (1 - guidance_scale). The mean is computed again: reading one would cost
    more.
    """
    row = tl.program_id(0).to(tl.int64)
    a, b, s = tl.load(coef_sample + row), tl.load(coef_noise + row), tl.load(sigma + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    u_block = tl.load(u + row * D + column, inside, 0.0)
    c_block = tl.load(c + row * D + column, inside, 0.0)
    x_t_block = tl.load(x_t + row * D + column, inside, 0.0)
    x = tl.load(x_prev + row * D + column, inside, 0.0)
    residual = x.to(tl.float64) - guided_mean(u_block, c_block, x_t_block, a, b, guidance_scale)
    grad_guided = tl.load(upstream + row) * b / (s * s * D) * residual
    # Through float32, as PyTorch rounds float64 to half precision.
    grad_c_block = (grad_guided * guidance_scale).to(tl.float32).to(c.dtype.element_ty)
    grad_u_block = (grad_guided * (1 - guidance_scale)).to(tl.float32).to(u.dtype.element_ty)
    tl.store(grad_c + row * D + column, grad_c_block, inside)
    tl.store(grad_u + row * D + column, grad_u_block, inside)


# ---- 3. Launchers ------------------------------------------------------------------------------
#
# One program a row, with no second stage to join partial sums: a training microbatch of 16 rows
# fills 16 of an H200's 132 processors, but the four rounds of loads and arithmetic of a row take an
# estimated 8 microseconds, and a second stage would add a launch. In 64 registers, two programs of
# 16 warps share a processor: one loads while one computes.
#
# enable_fp_fusion=False: no multiply and add is fused, so that each operation rounds as in the
# reference.


def packed(x: Tensor) -> Tensor:
    """Contiguous, and at an address Triton vectorises.

    So one binary, and one order of sums, whatever the caller sliced.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def halves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Unconditional and conditional, of one tensor (2M, ...) or already two."""
    return tensors[0].chunk(2) if len(tensors) == 1 else tensors


def launch_forward(
    u, c, x_t, x_prev, coefs, guidance_scale, noise=None, clipping=None
) -> tuple[Tensor, ...]:
    """log_prob, log_ratio, clipped_log_ratio; reads x_prev, or writes it where `noise` is given.

    The ratios only with clipping = (log_prob_ref, log_prob_old, clip_range).
    """
    count = 3 if clipping else 1
    out = torch.empty(count, len(x_t), dtype=torch.float64, device=x_t.device).expand(3, -1)
    log_prob_ref, log_prob_old, clip_range = clipping or (out[0], out[0], math.inf)  # not read
    given = x_prev if noise is None else noise
    with torch.cuda.device_of(x_t):
        forward_kernel[(len(x_t),)](
            u, c, x_t, given, x_prev, *coefs, log_prob_ref, log_prob_old, *out,
            guidance_scale, clip_range, math.prod(x_t.shape[1:]),
            int(noise is not None), int(clipping is not None),
            BLOCK=4096, num_warps=16, maxnreg=64, enable_fp_fusion=False,
        )  # fmt: skip
    return tuple(out)


def launch_backward(upstream, u, c, x_t, x_prev, coefs, guidance_scale, grad_u, grad_c) -> None:
    size = math.prod(x_t.shape[1:])
    with torch.cuda.device_of(x_t):
        backward_kernel[(len(x_t), triton.cdiv(size, 1024))](
            upstream, u, c, x_t, x_prev, *coefs, grad_u, grad_c, guidance_scale, size,
            BLOCK=1024, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


# ---- 4. Gradient -------------------------------------------------------------------------------


class GuidedLogProb(torch.autograd.Function):
    """log_prob; with clipping = (log_prob_ref, log_prob_old, clip_range) both ratios too."""

    @staticmethod
    def forward(ctx, x_t, x_prev, coefs, guidance_scale, clipping, *noise_pred):
        ctx.coefs, ctx.guidance_scale = coefs, guidance_scale
        ctx.set_materialize_grads(False)  # no zeros for an output that is not used
        u, c = halves(noise_pred)
        outputs = launch_forward(u, c, x_t, x_prev, coefs, guidance_scale, clipping=clipping)
        ctx.save_for_backward(x_t, x_prev, *noise_pred, *outputs[1:])
        return outputs if clipping else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_prob=None, grad_log_ratio=None, grad_clipped=None):
        """dlog_ratio/dlog_prob = 1, the clipped ratio's 1 or 0; the rest is `backward_kernel`'s."""
        x_t, x_prev, *noise_pred, log_ratio, clipped_log_ratio = ctx.saved_tensors
        if grad_clipped is not None:
            inside = log_ratio == clipped_log_ratio  # its edges too
            grad_clipped = torch.where(inside, grad_clipped, 0.0)
        used = [g for g in (grad_log_prob, grad_log_ratio, grad_clipped) if g is not None]
        upstream = functools.reduce(torch.add, used).contiguous()
        grads = [torch.empty_like(x) for x in noise_pred]
        u, c = halves(noise_pred)
        coefs, scale = ctx.coefs, ctx.guidance_scale
        launch_backward(upstream, u, c, x_t, x_prev, coefs, scale, *halves(grads))
        return None, None, None, None, None, *grads


# ---- 5. Public functions -----------------------------------------------------------------------

TRITON = "Triton kernels"


def path(device: torch.device) -> str:
    """What the public functions run on a device, in words for a run's first lines."""
    if device.type != "cuda":
        return "eager (no CUDA device)"
    return TRITON if triton else "eager (triton not installed)"


def prepare(noise_pred: NoisePred, x_t: Tensor, x_other: Tensor, *rows: Tensor) -> tuple | None:
    """Check shapes, of x_other as of x_t, of each of `rows` (M,).

    None: the reference is to run. Else what the launchers take: noise_pred as a tuple, x_t,
    x_other, rows.
    """
    given = (noise_pred,) if isinstance(noise_pred, Tensor) else tuple(noise_pred)
    shapes = [tuple(x.shape) for x in (*given, x_t, x_other, *rows)]
    expected = (2 * len(x_t) if len(given) == 1 else len(x_t), *x_t.shape[1:])
    assert len(given) in (1, 2) and all(x.shape == expected for x in given), shapes
    assert x_other.shape == x_t.shape and all(x.shape == x_t.shape[:1] for x in rows), shapes

    half_or_single = given[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not half_or_single or x_t.dtype != torch.float32 or x_other.dtype != torch.float32:
        return None
    if path(x_t.device) != TRITON:
        return None
    rows = [x.double().contiguous() for x in rows]
    return tuple(packed(x) for x in given), packed(x_t), packed(x_other), rows


def guided_log_prob(
    noise_pred: NoisePred,
    x_t: Tensor,
    x_prev: Tensor,
    coef_sample: Tensor,
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
) -> Tensor:
    fused = prepare(noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma)
    if fused is None:
        return guided_log_prob_ref(
            noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma, guidance_scale
        )
    noise_pred, x_t, x_prev, coefs = fused
    return GuidedLogProb.apply(x_t, x_prev, coefs, guidance_scale, None, *noise_pred)


def guided_log_ratio(
    noise_pred: NoisePred,
    x_t: Tensor,
    x_prev: Tensor,
    coef_sample: Tensor,
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    log_prob_ref: Tensor,
    log_prob_old: Tensor,
    clip_range: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (coef_sample, coef_noise, sigma, log_prob_ref, log_prob_old)
    fused = prepare(noise_pred, x_t, x_prev, *rows)
    if fused is None:
        return guided_log_ratio_ref(
            noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma, guidance_scale,
            log_prob_ref, log_prob_old, clip_range,
        )  # fmt: skip
    noise_pred, x_t, x_prev, (*coefs, log_prob_ref, log_prob_old) = fused
    clipping = (log_prob_ref, log_prob_old, clip_range)
    return GuidedLogProb.apply(x_t, x_prev, coefs, guidance_scale, clipping, *noise_pred)


@torch.no_grad()
def guided_sample(
    noise_pred: NoisePred,
    x_t: Tensor,
    noise: Tensor,
    coef_sample: Tensor,
    coef_noise: Tensor,
    sigma: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    fused = prepare(noise_pred, x_t, noise, coef_sample, coef_noise, sigma)
    if fused is None:
        return guided_sample_ref(
            noise_pred, x_t, noise, coef_sample, coef_noise, sigma, guidance_scale
        )
    noise_pred, x_t, noise, coefs = fused
    x_prev = torch.empty_like(noise)
    u, c = halves(noise_pred)
    return x_prev, launch_forward(u, c, x_t, x_prev, coefs, guidance_scale, noise)[0]


guided_log_prob.__doc__ = guided_log_prob_ref.__doc__
guided_log_ratio.__doc__ = guided_log_ratio_ref.__doc__
guided_sample.__doc__ = guided_sample_ref.__doc__
