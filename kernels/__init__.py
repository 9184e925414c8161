"""Fused log-probabilities of guided denoising steps, each beside its eager reference."""

from kernels.log_prob import (
    gaussian_log_prob,
    guided_log_prob,
    guided_log_prob_ref,
    guided_log_ratio,
    guided_log_ratio_ref,
    guided_mean_ref,
    guided_sample,
    guided_sample_ref,
    path,
)

__all__ = [
    "gaussian_log_prob",
    "guided_log_prob",
    "guided_log_prob_ref",
    "guided_log_ratio",
    "guided_log_ratio_ref",
    "guided_mean_ref",
    "guided_sample",
    "guided_sample_ref",
    "path",
]
