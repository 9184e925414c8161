"""points/: its gradient is prdp.py's, its losses are those of their papers, its exact optimum is
exact, and all of it runs."""

import argparse
import itertools
import json
import math
import multiprocessing.pool
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prdp
from baselines.ddpo import RewardStatistics
from conftest import ROOT, contents, random_inputs
from points import claims, world


class AsUnet(nn.Module):
    """The MLP of one seed behind the interface of a UNet: D channels of one pixel."""

    def __init__(self, weights: Tensor, arm: world.Arm) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.arm = arm

    def forward(self, sample, timestep, encoder_hidden_states):
        network = world.network(self.weights, encoder_hidden_states.transpose(0, 1), self.arm)
        time = world.time_features(timestep)[None].to(sample.dtype)
        out = network(sample[..., 0, 0][None], time)
        return SimpleNamespace(sample=out[0, :, :, None, None])


@pytest.mark.parametrize("clip", [1e-3, float("inf")])
def test_gradient_is_that_of_backward_trajectories(clip, monkeypatch):
    """All seeds at once by plain autograd, against one at a time by prdp.py's two passes."""
    monkeypatch.setattr(world, "EMBEDDINGS", world.EMBEDDINGS.double())
    seeds, arm = 3, world.Arm(N=2, B=4, clip=clip)
    chain, shape = world.Chain(arm), (seeds, 2, 4)
    chain.times = chain.times.double()
    base = world.load_base(arm).double().repeat(seeds, 1)
    old_weights = base + 0.02 * torch.randn_like(base)
    weights = (old_weights + 0.005 * torch.randn_like(base)).requires_grad_()
    prompts = torch.randint(45, (seeds, 2)).repeat_interleave(4, 1)
    noise = torch.randn(seeds, 8, arm.T + 1, arm.dims, dtype=torch.float64)
    with torch.no_grad():
        # prdp.py keeps latents in float32: round them before anything is scored
        latents = chain.sample(old_weights, prompts, noise)[0].float().double()
        old, ref = (chain.score(w, prompts, latents) for w in (old_weights, base))
    rewards = torch.randn(shape, dtype=torch.float64)

    log_probs = chain.score(weights, prompts, latents)
    loss = world.trajectory_loss(arm, log_probs, old, ref, rewards.flatten(1))
    (seeds * loss).backward()

    for s in range(seeds):
        unet = AsUnet(weights.detach()[s : s + 1], arm)
        embedding = world.EMBEDDINGS[prompts[s]][:, None]
        policy = prdp.Policy(unet, chain.schedule, torch.zeros(1, 16).double(), 1.0, 16)
        trajectories = prdp.Trajectories(latents[s][..., None, None], old[s], embedding)
        now = prdp.score_trajectories(policy, trajectories)
        assert torch.allclose(now, log_probs[s], rtol=1e-9, atol=1e-9)
        now.requires_grad_()
        matrices = [x.view(2, 4, arm.T) for x in (now, old[s], ref[s])]
        loss = prdp.prdp_loss(*matrices, rewards[s], clip, arm.beta * arm.T * arm.dims)
        prdp.backward_trajectories(policy, trajectories, torch.autograd.grad(loss, now)[0])
        expected = unet.weights.grad
        assert expected.abs().max() > 0
        error = (weights.grad[s] - expected[0]).abs().max() / expected.abs().max()
        assert error < 1e-7, error


def test_sampling_scores_as_scoring_does():
    """The log-probs of `sample`, whose graph the first update uses: same values, same gradient."""
    arm = world.Arm(N=1, B=4)
    chain, weights = world.Chain(arm), world.load_base(arm).repeat(2, 1).requires_grad_()
    prompts, noise = torch.randint(45, (2, 4)), torch.randn(2, 4, arm.T + 1, arm.dims)
    latents, sampled = chain.sample(weights, prompts, noise)
    scored, share = chain.score(weights, prompts, latents), torch.randn(2, 4, arm.T)
    assert torch.allclose(sampled, scored, atol=1e-4)
    gradients = [torch.autograd.grad((share * x).sum(), weights)[0] for x in (sampled, scored)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


def by_hand(method: str, log_probs, old, ref, rewards, arm: world.Arm) -> float:
    """One prompt's loss as its paper writes it, in plain numbers; log-likelihoods are means over
    T."""
    log_probs, old, ref, rewards = (x.tolist() for x in (log_probs, old, ref, rewards))
    points = range(len(rewards))
    likelihood = [sum(row) / len(row) for row in log_probs]
    if method == "ddpo":
        total = 0.0
        for i, t in itertools.product(points, range(arm.T)):
            weight = math.exp(log_probs[i][t] - old[i][t])
            inside = min(max(weight, 1 - arm.clip), 1 + arm.clip)
            total -= min(weight * rewards[i], inside * rewards[i])
        return total / len(points) / arm.T
    if method == "ddpo-sf":
        return -sum(r * lp for r, lp in zip(rewards, likelihood, strict=True)) / len(points)
    if method == "trajectory-rwr":
        weights = [math.exp(r / arm.beta) for r in rewards]
        return -sum(w * lp for w, lp in zip(weights, likelihood, strict=True)) / sum(weights)
    if method == "trajectory-rwr-sparse":
        threshold = np.quantile(rewards, 0.9)
        best = [i for i in points if rewards[i] >= threshold]
        return -sum(likelihood[i] for i in best) / len(best)
    assert method == "trajectory-dpo"
    losses = []
    for winner, loser in itertools.permutations(points, 2):
        if rewards[winner] > rewards[loser]:
            a, b = (likelihood[i] - sum(ref[i]) / len(ref[i]) for i in (winner, loser))
            losses.append(math.log1p(math.exp(-arm.beta * arm.T * arm.dims * (a - b))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "method", ["ddpo", "ddpo-sf", "trajectory-rwr", "trajectory-rwr-sparse", "trajectory-dpo"]
)
def test_loss_equals_its_paper_by_hand(method):
    """Of two seeds of three prompts at once; its gradient by finite differences."""
    arm = world.Arm(method=method, N=3, B=16, T=7, beta=0.7)
    inputs = random_inputs(1, 2, 3, images=arm.B, steps=arm.T)
    by_prompt = zip(*(x.flatten(0, 1) for x in inputs), strict=True)
    expected = np.mean([by_hand(method, *prompt, arm) for prompt in by_prompt])

    log_probs, *fixed = (x.flatten(1, 2) for x in inputs)
    loss = world.trajectory_loss(arm, log_probs, *fixed)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: world.trajectory_loss(arm, x, *fixed), log_probs)


def test_rewards_that_all_tie():
    """Nothing to rank for DPO, so 0; equal weights for both regressions."""
    log_probs, _, ref, rewards = random_inputs(3)
    ties = torch.ones_like(rewards)
    assert world.trajectory_dpo_loss(log_probs, ref, ties, 1.0) == 0
    expected = pytest.approx(-log_probs.mean().item())
    assert world.trajectory_rwr_loss(log_probs, ties, 1.0).item() == expected
    assert world.trajectory_rwr_sparse_loss(log_probs, ties).item() == expected


def test_diffusion_dpo_by_hand():
    """Wallace et al. 2024, Eq. 14, pair by pair: -log sigmoid of how much more the error of the
    winner fell than the loser's."""
    generator = torch.Generator().manual_seed(0)
    errors, errors_ref = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    rewards = torch.tensor([[1.0, 2.0, 2.0, 0.0], [0.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    total = 0.0
    for n in range(3):
        pairs = []
        for winner, loser in itertools.permutations(range(4), 2):
            if rewards[n, winner] > rewards[n, loser]:
                fall = [errors_ref[n, i].item() - errors[n, i].item() for i in (winner, loser)]
                pairs.append(math.log1p(math.exp(-7.0 * (fall[0] - fall[1]))))
        total += sum(pairs) / max(1, len(pairs))
    loss = world.diffusion_dpo_loss(errors, errors_ref, rewards, 7.0)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("kind", ["per-prompt", "global", "group"])
def test_advantages_are_those_of_ddpo(kind):
    """All seeds at once, against baselines/ddpo.py's statistics one seed at a time: over 7 epochs a
    prompt has fewer than 16 rewards, then more, then more than 32; some are drawn twice."""
    history = torch.full((2, 45, 32), torch.nan)
    statistics = [RewardStatistics(kind) for _ in range(2)]
    for epoch in range(7):
        generator = torch.Generator().manual_seed(epoch)
        prompts = torch.randint(3, (2, 3), generator=generator)
        rewards = torch.randn(2, 3, 6, generator=generator) + prompts[..., None]
        advantages = world.normalise(rewards, prompts, kind, history)
        for s in range(2):
            names = [str(prompt) for prompt in prompts[s].tolist()]
            expected = statistics[s].advantages(rewards[s].flatten(), names)
            assert torch.allclose(advantages[s].flatten().double(), expected, atol=1e-4)


def test_exact_optimum_of_a_linear_reward():
    """A reward g . x_0 shifts step t by sigma_t^2 * (product of the later a's) * g / beta."""
    sigmas, slopes, beta = [0.5, 0.3, 0.1], [0.9, 0.8, 0.7], 0.5
    g = torch.tensor([0.6, -0.4], dtype=torch.float64)
    linear = (world.PLANE * g).sum(-1)
    means = [slope * world.PLANE for slope in slopes]
    result = world.exact_optimum(means, sigmas, [beta], linear[None])
    reward, kl = result[0].tolist()

    later = [slopes[1] * slopes[2], slopes[2], 1.0]  # d x_0 / d (mean of step k)
    shifts = [s**2 * a * g / beta for s, a in zip(sigmas, later, strict=True)]
    expected = sum(a * (shift @ g) for a, shift in zip(later, shifts, strict=True))
    expected_kl = sum(shift @ shift / (2 * s**2) for s, shift in zip(sigmas, shifts, strict=True))
    assert reward == pytest.approx(expected.item(), abs=1e-3)
    assert kl == pytest.approx(expected_kl.item(), abs=1e-3)


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
def test_unstable_by_hand(curve, unstable):
    arm, base = {"curve": [curve, [1.0, 2.0, 3.0, 4.0]]}, {"reward": [0.9, 1.1]}
    assert claims.unstable(arm, base) == unstable


def test_paired_interval():
    """Differences 1, 1, 2, 3: mean 1.75, deviation sqrt(11 / 12), 3 degrees of freedom."""
    a, b = {"reward": [1.0, 2.0, 3.0, 5.0]}, {"reward": [0.0, 1.0, 1.0, 2.0]}
    low = 1.75 - 3.182 * (11 / 12) ** 0.5 / 2
    assert claims.above("", a, b, low - 0.01)["passed"]
    assert not claims.above("", a, b, low + 0.01)["passed"]
    for margin, passed in ((4.0, True), (3.0, False)):  # 1.75 +- 1.52 is within 3.27 of 0
        assert claims.equal("", a, b, margin)["passed"] == passed


@pytest.mark.parametrize("degrees", [1, 2, 7, 13, 60, 400])
def test_students_t_is_the_integral_of_its_density(degrees):
    t = claims.student_t(degrees)
    x = torch.linspace(-t, t, 100_001, dtype=torch.float64)
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    gamma = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    whole = math.sqrt(degrees * math.pi) / math.exp(gamma)
    assert torch.trapezoid(density, x).item() / whole == pytest.approx(0.95, abs=1e-4)


def test_seeds_of_an_interval():
    assert claims.parse_seeds("3..16") == list(range(3, 17))
    with pytest.raises(argparse.ArgumentTypeError, match="an interval needs two seeds"):
        claims.parse_seeds("4")


def test_results_are_kept_by_seed(tmp_path):
    """A run with more seeds does those alone, and a seed's numbers depend on no other."""
    arm = world.Arm(E=2, K=2, N=2, B=4, dims=2)

    def results_of(folder: Path, *seeds: int) -> dict:
        folder.mkdir(exist_ok=True)
        with multiprocessing.pool.ThreadPool(1) as pool:
            runner = claims.Runner(folder, False, pool)
            job = claims.Job(claims.run_arm, seeds, (arm, 7, 2), 1.0)
            (rows,) = runner.run("", {"": job}).values()
            return claims.by_name(rows)

    two = results_of(tmp_path / "a", 0, 1)
    before = contents(tmp_path / "a")
    three = results_of(tmp_path / "a", 1, 2, 0)
    after = contents(tmp_path / "a")
    assert len(before) == 2 and len(after) == 3 and before.items() <= after.items()
    assert three["reward"][2] == two["reward"][0] and three["curve"][0] == two["curve"][1]
    alone = results_of(tmp_path / "b", 2)
    assert alone["reward"] == [three["reward"][1]] and alone["kl"] == [three["kl"][1]]
    assert len(set(three["reward"])) == 3


def test_own_mean_is_the_gradient_of_prdp_without_its_kl_term():
    """Row 10, on-policy: the same direction; rewards divided by their deviation have another."""
    arm = world.Arm(N=4, B=8, beta=1e-9)
    log_probs, _, ref, rewards = (x.flatten(0, 1) for x in random_inputs(5, 1, 4, images=8))
    log_probs, ref, rewards = (x.flatten(0, 1)[None] for x in (log_probs, ref, rewards))
    rewards = rewards * torch.arange(1.0, 33)
    history = torch.full((1, 0, 32), torch.nan)
    gradients = []
    for method, kind in (("prdp", ""), ("ddpo", "own mean"), ("ddpo", "group")):
        of_loss = rewards
        if kind:
            rows = rewards.unflatten(1, (4, 8))
            of_loss = world.normalise(rows, torch.zeros(1, 4), kind, history).flatten(1)
        x = log_probs.clone().requires_grad_()
        loss = world.trajectory_loss(replace(arm, method=method), x, log_probs, ref, of_loss)
        gradients.append(torch.autograd.grad(loss, x)[0].flatten())
    prdp_, own, group = (g / g.norm() for g in gradients)
    assert (prdp_ - own).abs().max() < 1e-6
    assert (prdp_ - group).abs().max() > 0.01


def test_the_stored_results_are_of_these_experiments():
    """results.json: the arms that the table gives for its own sweeps, and no others."""
    stored = json.loads(claims.RESULTS.read_text())
    arms = claims.experiments(claims.best_arms(stored["sweeps"]))
    ours = {f"{n}/{label}": vars(arm) for n, group in arms.items() for label, arm in group.items()}
    assert claims.rounded(ours) == {name: row["arm"] for name, row in stored["arms"].items()}


@pytest.mark.parametrize("cpuinfo", ["processor : 0\nBogoMIPS : 50.00\n", None])
def test_a_machine_that_names_no_processor(cpuinfo, tmp_path, monkeypatch):
    """As Linux on ARM; and macOS, which has no such file."""
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(claims, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert claims.machine()["processor"] == "unknown"
    assert claims.machine()["cores"] == os.cpu_count()


def test_quick_runs_everything(tmp_path):
    """Whatever a notebook has set MPLBACKEND to."""

    def room() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (ROOT / "points").glob("*.*")}

    before = room()
    command = [sys.executable, ROOT / "points" / "claims.py", "--quick", "--out", tmp_path]
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["verdicts"]) == {str(n) for n in range(1, 12)}
    for figure in ("training", "plane", "kl"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
    assert room() == before, "--quick wrote into points/"
