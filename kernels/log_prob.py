"""Triton kernels for log pi_theta(x_{t-1} | x_t, c) of a guided denoising step (Eqs. 2 and 4).

guided_log_prob   the log-prob of a stored x_{t-1}, and its gradient: prdp.py's scoring and updates
guided_sample     x_{t-1} and its log-prob, from noise: prdp.py's sampling
guided_log_ratio  the first with Eq. 20's clip in the same pass: for other trainers

They take CUDA tensors (any under TRITON_INTERPRET=1), and do what prdp.py's functions say in plain
torch, in the same order; a run compares both when it starts. M rows, each one image at one step;
D = C*H*W. Arithmetic is float64 in registers: log-probs are compared to within clip_range = 1e-6,
and at the last step (sigma = 0.02, log-prob 2.5) a float32 residual alone errs by 4e-8.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def guided_mean(u, c, x_t, coef_sample, coef_noise, guidance_scale):
    """`guided_mean` of prdp.py in registers, in its order of operations."""
    u = u.to(tl.float64)
    guided = u + guidance_scale * (c.to(tl.float64) - u)
    return coef_sample * x_t.to(tl.float64) + coef_noise * guided


ROWS = ["coef_sample", "coef_noise", "sigma"]  # (M,) tensors, at any address
RATIOS = ["log_prob_ref", "log_prob_old", "log_prob", "log_ratio", "clipped_log_ratio"]


@triton.jit(do_not_specialize=["draw", "clip"], do_not_specialize_on_alignment=ROWS + RATIOS)
def forward_kernel(
    u,  # (M, D) fp32, bf16 or fp16: the unconditional branch
    c,  # (M, D), likewise: the conditional one
    x_t,  # (M, D) fp32
    given,  # (M, D) fp32: x_prev, or with `draw` the noise to make it from
    x_prev,  # (M, D) fp32: written with `draw`
    coef_sample, coef_noise, sigma,  # (M,) fp64, and so are those of the next three lines
    log_prob_ref, log_prob_old,  # read with `clip`
    log_prob,  # written
    log_ratio, clipped_log_ratio,  # written with `clip`
    # Unannotated, Triton would round floats to float32.
    guidance_scale: tl.float64, clip_range: tl.float64, D, draw, clip, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: with `draw` x_prev first, with `clip` Eqs. 19 and 20 too. Both are known
    at run time only: one binary, one order of summation, and so re-scoring has a sample's bits."""
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(coef_sample + row)
    b = tl.load(coef_noise + row)
    s = tl.load(sigma + row)
    total = tl.zeros((BLOCK,), tl.float64)

    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        place = row * D + column
        u_block = tl.load(u + place, inside, 0.0)
        c_block = tl.load(c + place, inside, 0.0)
        x_t_block = tl.load(x_t + place, inside, 0.0)
        x = tl.load(given + place, inside, 0.0)
        mean = guided_mean(u_block, c_block, x_t_block, a, b, guidance_scale)
        if draw != 0:
            x = (mean + s * x.to(tl.float64)).to(tl.float32)
            tl.store(x_prev + place, x, inside)
        residual = x.to(tl.float64) - mean  # 0 where masked
        total += residual * residual
    value = -(tl.sum(total) / D) / (2 * s * s) - tl.log(s) - 0.9189385332046727  # 0.5 * log(2 * pi)
    tl.store(log_prob + row, value)
    if clip != 0:
        reference = tl.load(log_prob_ref + row)
        ratio = value - reference  # Eq. 19
        ratio_old = tl.load(log_prob_old + row) - reference
        low = ratio_old - clip_range
        high = ratio_old + clip_range
        tl.store(log_ratio + row, ratio)
        # Eq. 20. Not tl.clamp, which would turn NaN into a bound.
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        tl.store(clipped_log_ratio + row, clipped)


@triton.jit(do_not_specialize_on_alignment=["upstream", *ROWS])
def backward_kernel(
    upstream,  # (M,) fp64: dloss/dlog_prob
    u, c, x_t, x_prev,  # (M, D): as above
    coef_sample, coef_noise, sigma,  # (M,) fp64
    grad_u, grad_c,  # (M, D): written, in the dtype of u and c
    guidance_scale: tl.float64, D, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of a row. dlog_prob/dmean = (x_prev - mean) / (sigma^2 D); dmean/dc =
    coef_noise * guidance_scale; dmean/du = coef_noise * (1 - guidance_scale)."""
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(coef_sample + row)
    b = tl.load(coef_noise + row)
    s = tl.load(sigma + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    place = row * D + column
    u_block = tl.load(u + place, inside, 0.0)
    c_block = tl.load(c + place, inside, 0.0)
    x_t_block = tl.load(x_t + place, inside, 0.0)
    x = tl.load(x_prev + place, inside, 0.0)
    residual = x.to(tl.float64) - guided_mean(u_block, c_block, x_t_block, a, b, guidance_scale)
    grad_guided = tl.load(upstream + row) * b / (s * s * D) * residual
    # Through float32, as PyTorch rounds float64 to half precision.
    grad_c_block = (grad_guided * guidance_scale).to(tl.float32).to(c.dtype.element_ty)
    grad_u_block = (grad_guided * (1 - guidance_scale)).to(tl.float32).to(u.dtype.element_ty)
    tl.store(grad_c + place, grad_c_block, inside)
    tl.store(grad_u + place, grad_u_block, inside)


def packed(x: Tensor) -> Tensor:
    """Contiguous, and at an address Triton vectorises: one binary, whatever the caller sliced."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def prepare(noise_pred: Tensor, x_t: Tensor, x_other: Tensor, *rows: Tensor) -> tuple:
    """The arguments as the kernels take them: noise_pred (2M, ...), x_t, x_other (M, ...) packed,
    rows (M,) float64."""
    shapes = [tuple(x.shape) for x in (noise_pred, x_t, x_other, *rows)]
    assert noise_pred.shape == (2 * len(x_t), *x_t.shape[1:]), shapes
    assert x_other.shape == x_t.shape and all(x.shape == x_t.shape[:1] for x in rows), shapes
    assert x_t.dtype == x_other.dtype == torch.float32, (x_t.dtype, x_other.dtype)
    if not x_t.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"Triton kernels need CUDA tensors, and these are on {x_t.device}")
    rows = [x.double().contiguous() for x in rows]
    return packed(noise_pred), packed(x_t), packed(x_other), rows


def launch_forward(
    noise_pred, x_t, x_prev, coefs, guidance_scale, noise=None, clipping=None
) -> tuple[Tensor, ...]:
    """log_prob, and with clipping = (log_prob_ref, log_prob_old, clip_range) log_ratio and
    clipped_log_ratio. Reads x_prev, or writes it where `noise` is given."""
    out = torch.empty(3, len(x_t), dtype=torch.float64, device=x_t.device)
    log_prob_ref, log_prob_old, clip_range = clipping or (out[0], out[0], math.inf)  # not read
    given = x_prev if noise is None else noise
    # One program a row, without a second stage to join partial sums, which would cost a launch. In
    # 64 registers two programs of 16 warps share a processor: one loads while one computes. No
    # multiply and add is fused, so that each operation rounds as in plain torch.
    with torch.cuda.device_of(x_t):
        forward_kernel[(len(x_t),)](
            *noise_pred.chunk(2), x_t, given, x_prev, *coefs, log_prob_ref, log_prob_old, *out,
            guidance_scale, clip_range, math.prod(x_t.shape[1:]),
            int(noise is not None), int(clipping is not None),
            BLOCK=4096, num_warps=16, maxnreg=64, enable_fp_fusion=False,
        )  # fmt: skip
    return tuple(out)


class GuidedLogProb(torch.autograd.Function):
    """log_prob; with clipping = (log_prob_ref, log_prob_old, clip_range) both ratios too."""

    @staticmethod
    def forward(ctx, noise_pred, x_t, x_prev, coefs, guidance_scale, clipping):
        ctx.coefs, ctx.guidance_scale = coefs, guidance_scale
        outputs = launch_forward(noise_pred, x_t, x_prev, coefs, guidance_scale, clipping=clipping)
        ctx.save_for_backward(noise_pred, x_t, x_prev, *outputs[1:])
        return outputs if clipping else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, grad_log_ratio=None, grad_clipped=None):
        noise_pred, x_t, x_prev, log_ratio, clipped_log_ratio = ctx.saved_tensors
        if grad_log_ratio is not None:  # dlog_ratio/dlog_prob = 1, the clipped ratio's 1 or 0
            inside = log_ratio == clipped_log_ratio  # its edges too
            upstream = upstream + grad_log_ratio + torch.where(inside, grad_clipped, 0.0)
        gradient, size = torch.empty_like(noise_pred), math.prod(x_t.shape[1:])
        with torch.cuda.device_of(x_t):
            backward_kernel[(len(x_t), triton.cdiv(size, 1024))](
                upstream.contiguous(), *noise_pred.chunk(2), x_t, x_prev, *ctx.coefs,
                *gradient.chunk(2), ctx.guidance_scale, size,
                BLOCK=1024, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return gradient, None, None, None, None, None


def guided_log_prob(
    noise_pred: Tensor,  # (2M, ...) float32, bfloat16 or float16, the unconditional half first
    x_t: Tensor,  # (M, ...) float32
    x_prev: Tensor,  # (M, ...) float32: x_{t-1}
    coef_sample: Tensor,  # (M,) of Eq. 2, per row: steps may be mixed
    coef_noise: Tensor,  # (M,)
    sigma: Tensor,  # (M,)
    guidance_scale: float,
) -> Tensor:
    """log pi(x_prev | x_t): (M,) float64, nats per latent dimension; a gradient for noise_pred."""
    step = prepare(noise_pred, x_t, x_prev, coef_sample, coef_noise, sigma)
    return GuidedLogProb.apply(*step, guidance_scale, None)


@torch.no_grad()
def guided_sample(
    noise_pred: Tensor, x_t: Tensor, noise: Tensor, coef_sample: Tensor, coef_noise: Tensor,
    sigma: Tensor, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_{t-1} drawn with standard normal noise (M, ...), in float32, and its log-prob, (M,)
    float64: that of the rounded x_{t-1}, in the bits that `guided_log_prob` gives it."""
    noise_pred, x_t, noise, coefs = prepare(noise_pred, x_t, noise, coef_sample, coef_noise, sigma)
    x_prev = torch.empty_like(noise)
    return x_prev, launch_forward(noise_pred, x_t, x_prev, coefs, guidance_scale, noise)[0]


def guided_log_ratio(
    noise_pred: Tensor, x_t: Tensor, x_prev: Tensor, coef_sample: Tensor, coef_noise: Tensor,
    sigma: Tensor, guidance_scale: float,
    log_prob_ref: Tensor,  # (M,), under pi_ref
    log_prob_old: Tensor,  # (M,), under pi_theta_old
    clip_range: float,  # epsilon of Eq. 20, in the unit of log_prob; inf: no clipping
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """log_prob, r-hat of Eq. 19 and its clipped form of Eq. 20, each (M,) float64, in one kernel:
    for trainers whose loss splits by steps, as PPO's does. (PRDP's squares a mean over T, so that
    prdp.py clips the matrix of all.) The gradient passes at the clip's edge, as torch.clamp's."""
    rows = (coef_sample, coef_noise, sigma, log_prob_ref, log_prob_old)
    noise_pred, x_t, x_prev, rows = prepare(noise_pred, x_t, x_prev, *rows)
    clipping = (*rows[3:], clip_range)
    return GuidedLogProb.apply(noise_pred, x_t, x_prev, rows[:3], guidance_scale, clipping)
