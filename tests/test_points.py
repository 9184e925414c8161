"""toy/points.py: its gradient is prdp.py's, its exact optimum is exact, and all of it runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import points  # noqa: E402
import points_claims  # noqa: E402

import prdp  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class AsUnet(nn.Module):
    """The MLP of one seed behind the interface of a UNet: D channels of one pixel."""

    def __init__(self, weights: torch.Tensor, arm: points.Arm) -> None:
        super().__init__()
        self.weights, self.arm = nn.Parameter(weights), arm

    def forward(self, sample, timestep, encoder_hidden_states):
        network = points.network(self.weights, encoder_hidden_states.transpose(0, 1), self.arm)
        time = points.time_features(timestep)[None].to(sample.dtype)
        out = network(sample[..., 0, 0][None], time)
        return SimpleNamespace(sample=out[0, :, :, None, None])


@pytest.mark.parametrize("clip", [1e-3, float("inf")])
def test_gradient_is_that_of_backward_trajectories(clip: float, monkeypatch) -> None:
    """All seeds at once by plain autograd, against one at a time by prdp.py's two passes."""
    monkeypatch.setattr(points, "EMBEDDINGS", points.EMBEDDINGS.double())
    seeds, arm = 3, points.Arm(N=2, B=4)
    chain, shape = points.Chain(arm), (seeds, 2, 4)
    chain.steps = [(time.double(), *rest) for time, *rest in chain.steps]
    base = points.load_base(arm).double().repeat(seeds, 1)
    old_weights = base + 0.02 * torch.randn_like(base)
    weights = (old_weights + 0.005 * torch.randn_like(base)).requires_grad_()
    prompts = torch.randint(45, (seeds, 2)).repeat_interleave(4, 1)
    noise = torch.randn(seeds, 8, arm.T + 1, arm.dims, dtype=torch.float64)
    with torch.no_grad():
        # prdp.py keeps latents in float32: round them before anything is scored
        latents = chain.sample(old_weights, prompts, noise)[0].float().double()
        old, ref = (chain.score(w, prompts, latents) for w in (old_weights, base))
    rewards = torch.randn(shape, dtype=torch.float64)
    kl_weight = arm.beta * arm.T * arm.dims

    log_probs = chain.score(weights, prompts, latents)
    grouped = [x.view(*shape, arm.T) for x in (log_probs, old, ref)]
    (seeds * prdp.prdp_loss(*grouped, rewards, clip, kl_weight)).backward()

    for s in range(seeds):
        unet = AsUnet(weights.detach()[s : s + 1], arm)
        embedding = points.EMBEDDINGS[prompts[s]][:, None]
        policy = prdp.Policy(unet, chain.schedule, torch.zeros(1, 16).double(), 1.0, 16)
        trajectories = prdp.Trajectories(latents[s][..., None, None], old[s], embedding)
        now = prdp.score_trajectories(policy, trajectories)
        assert torch.allclose(now, log_probs[s], rtol=1e-9, atol=1e-9)
        now.requires_grad_()
        fixed = [x.view(2, 4, arm.T) for x in (now, old[s], ref[s])]
        loss = prdp.prdp_loss(*fixed, rewards[s], clip, kl_weight)
        prdp.backward_trajectories(policy, trajectories, torch.autograd.grad(loss, now)[0])
        expected = unet.weights.grad
        assert expected.abs().max() > 0
        error = (weights.grad[s] - expected[0]).abs().max() / expected.abs().max()
        assert error < 1e-7, error


def test_sampling_scores_as_scoring_does() -> None:
    """The log-probs of `sample`, whose graph the first update uses: same values, same gradient."""
    arm = points.Arm(N=1, B=4)
    chain, weights = points.Chain(arm), points.load_base(arm).repeat(2, 1).requires_grad_()
    prompts, noise = torch.randint(45, (2, 4)), torch.randn(2, 4, arm.T + 1, arm.dims)
    latents, sampled = chain.sample(weights, prompts, noise)
    scored, share = chain.score(weights, prompts, latents), torch.randn(2, 4, arm.T)
    assert torch.allclose(sampled, scored, atol=1e-4)
    gradients = [torch.autograd.grad((share * x).sum(), weights)[0] for x in (sampled, scored)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


def test_exact_optimum_of_a_linear_reward() -> None:
    """A reward g . x_0 shifts step t by sigma_t^2 * (product of the later a's) * g / beta."""
    sigmas, slopes, beta = [0.5, 0.3, 0.1], [0.9, 0.8, 0.7], 0.5
    g = torch.tensor([0.6, -0.4], dtype=torch.float64)
    linear = (points.PLANE * g).sum(-1)
    means = [slope * points.PLANE for slope in slopes]
    result = points.exact_optimum(means, sigmas, [beta], linear[None])
    reward, kl = result[0].tolist()

    later = [slopes[1] * slopes[2], slopes[2], 1.0]  # d x_0 / d (mean of step k)
    shifts = [s**2 * a * g / beta for s, a in zip(sigmas, later, strict=True)]
    expected = sum(a * (shift @ g) for a, shift in zip(later, shifts, strict=True))
    expected_kl = sum(shift @ shift / (2 * s**2) for s, shift in zip(sigmas, shifts, strict=True))
    assert reward == pytest.approx(expected.item(), abs=1e-3)
    assert kl == pytest.approx(expected_kl.item(), abs=1e-3)


def test_normalise_by_hand() -> None:
    """Per-prompt statistics against DDPO's as a plain loop: the last 32, of the epoch below 16."""
    arm = points.Arm(method="ddpo", normalise="per-prompt", N=3, B=6)
    history, seen = torch.full((2, 45, 32), torch.nan), {}
    for epoch in range(7):
        dice = torch.Generator().manual_seed(epoch)
        prompts = torch.randint(3, (2, 3), generator=dice)
        rewards = torch.randn(2, 3, 6, generator=dice) + prompts[..., None]
        advantages = points.normalise(rewards, prompts, arm, history)
        for s in range(2):
            for n in range(3):
                key = (s, prompts[s, n].item())
                seen[key] = (seen.get(key, []) + rewards[s, n].tolist())[-32:]
            for n in range(3):
                known = torch.tensor(seen[s, prompts[s, n].item()])
                known = known if len(known) >= 16 else rewards[s].flatten()
                expected = (rewards[s, n] - known.mean()) / (known.std(correction=0) + 1e-6)
                assert torch.allclose(advantages[s, n], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("curve", "unstable"),
    [
        ([2.0, 4.0, 6.0, 5.0], False),  # 1 of the 5 gained
        ([2.0, 4.0, 2.4, 4.0], True),  # 1.6 of 3, though it comes back
        ([0.6, 1.9, 1.45, 1.5], False),  # before a gain of 1, .5 may be lost
        ([0.4, 1.0, 2.0, 3.0], True),  # .6 below the pretrained model from the first
        ([2.0, float("nan"), float("nan"), float("nan")], True),
    ],
)
def test_unstable_by_hand(curve: list[float], unstable: bool) -> None:
    arm, base = {"curve": [curve, [1.0, 2.0, 3.0, 4.0]]}, {"reward": [0.9, 1.1]}
    assert points_claims.unstable(arm, base) == unstable


def test_paired_interval() -> None:
    """Differences 1, 1, 2, 3: mean 1.75, deviation sqrt(11 / 12), 3 degrees of freedom; and its
    table against the integral of Student's density."""
    a, b = {"reward": [1.0, 2.0, 3.0, 5.0]}, {"reward": [0.0, 1.0, 1.0, 2.0]}
    low = 1.75 - 3.182 * (11 / 12) ** 0.5 / 2
    assert points_claims.above("", a, b, low - 0.01)["passed"]
    assert not points_claims.above("", a, b, low + 0.01)["passed"]
    for degrees, t in enumerate(points_claims.T95, 1):
        x = torch.linspace(-t, t, 100_001, dtype=torch.float64)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        gamma = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        whole = math.sqrt(degrees * math.pi) / math.exp(gamma)
        assert torch.trapezoid(density, x).item() / whole == pytest.approx(0.95, abs=1e-4)


def test_quick_runs_everything(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "toy").glob("points*")}
    command = [sys.executable, ROOT / "toy" / "points.py", "--quick", "--out", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "points.json").read_text())
    assert set(result["verdicts"]) == {str(n) for n in range(1, 10)}
    for figure in ("training", "plane", "kl"):
        assert (tmp_path / f"points_{figure}.png").stat().st_size > 10_000
    assert before == {path: path.stat().st_mtime_ns for path in before}, "--quick wrote into toy/"
