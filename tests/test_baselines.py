"""The baselines: every loss by hand as its paper writes it, DDPO's reward statistics, misfits."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import baselines
import prdp
from tests.conftest import checkpoint, metrics_of, random_inputs

each_loss = pytest.mark.parametrize("name", baselines.LOSSES)


def by_hand(name: str, log_probs, old, ref, rewards, clip_range: float, kl_weight: float) -> float:
    """One prompt, plain numbers; log-likelihoods are means over T."""
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
    for winner, loser in itertools.permutations(images, 2):
        if rewards[winner] > rewards[loser]:
            a, b = (likelihood[i] - sum(ref[i]) / len(ref[i]) for i in (winner, loser))
            losses.append(math.log1p(math.exp(-kl_weight * (a - b))))
    return sum(losses) / len(losses)


@each_loss
def test_loss_equals_its_paper_by_hand(name):
    """On several prompts at once; its gradient by finite differences."""
    log_probs, old, ref, rewards = random_inputs(1, 3, images=16)
    by_prompt = zip(log_probs, old, ref, rewards, strict=True)
    expected = np.mean([by_hand(name, *prompt, 0.1, 0.7) for prompt in by_prompt])

    def loss(x):
        return baselines.LOSSES[name](x, old, ref, rewards, 0.1, 0.7)

    assert loss(log_probs).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(loss, log_probs.requires_grad_())


def gradient(name: str, log_probs, old, ref, rewards, clip_range: float) -> torch.Tensor:
    x = log_probs.clone().requires_grad_()
    loss = baselines.LOSSES[name](x, old, ref, rewards, clip_range, 1.0)
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("name", ["ddpo", "ddpo-sf"])
def test_ddpo_is_a_policy_gradient_on_policy(name):
    """At theta_old: minus the advantage at every step."""
    log_probs, _, ref, advantage = random_inputs(2, 2)
    ours = gradient(name, log_probs, log_probs, ref, advantage, 1e-4)
    expected = -advantage.unsqueeze(-1).expand_as(log_probs) / log_probs.numel()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("moved", "learns"), [(0.3, [False, True]), (-0.3, [True, False]), (0.05, [True, True])]
)
def test_ddpo_clips_one_sided(moved, learns):
    """PPO: no gradient where moving on would raise the surrogate; one where moving back would."""
    old, advantage = torch.zeros(1, 2, 1, dtype=torch.float64), torch.tensor([[1.0, -1.0]])
    ours = gradient("ddpo", old + moved, old, old, advantage, 0.1)
    assert (ours != 0).flatten().tolist() == learns


def test_rewards_that_all_tie():
    """Nothing to rank for DPO, so 0; equal weights for both regressions."""
    log_probs, old, ref, rewards = random_inputs(3)
    inputs = (log_probs, old, ref, torch.ones_like(rewards), 0.1, 1.0)
    assert baselines.dpo_loss(*inputs) == 0
    expected = pytest.approx(-log_probs.mean().item())
    assert baselines.rwr_loss(*inputs).item() == expected
    assert baselines.rwr_sparse_loss(*inputs).item() == expected


def test_reward_statistics():
    """12 epochs against lists kept by hand: "per-prompt" is of the last 32 rewards of a prompt once
    it has 16, else of the epoch's; "group" of its images; "none" leaves rewards as they are."""
    random.seed(0)
    kinds = ("per-prompt", "global", "group", "none")
    kept = {kind: baselines.RewardStatistics(kind) for kind in kinds}
    latest, cases = {}, set()
    for _ in range(12):
        prompts = [random.choice("abc") for _ in range(2)]
        rewards = [random.gauss(0, 1) for _ in range(10)]
        ours = {kind: kept[kind].targets(torch.tensor(rewards), prompts) for kind in kinds}
        for n, prompt in enumerate(prompts):
            latest.setdefault(prompt, []).extend(rewards[5 * n : 5 * n + 5])
        assert ours["none"].tolist() == pytest.approx(rewards)
        for i, reward in enumerate(rewards):
            known = latest[prompts[i // 5]][-32:]
            own = len(known) >= 16
            cases.add((own, len(known) == 32))
            group = rewards[i // 5 * 5 :][:5]
            seen = {"per-prompt": known if own else rewards, "global": rewards, "group": group}
            for kind, values in seen.items():
                expected = (reward - statistics.fmean(values)) / (statistics.pstdev(values) + 1e-6)
                assert ours[kind][i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert cases == {(False, False), (True, False), (True, True)}


def test_reward_statistics_are_bounded():
    """An outlier among very many counts 10."""
    rewards = torch.zeros(400)
    rewards[7] = 1.0
    assert baselines.RewardStatistics("global").targets(rewards, ["a"])[7] == 10


def test_ddpo_learns_from_every_image_in_one_minibatch():
    """The K updates of an epoch: the gradient of each is the loss's on its images alone, and they
    are others in another epoch."""
    config = SimpleNamespace(loss="ddpo", updates_per_epoch=4, seed=3)
    log_probs, old, ref, advantage = random_inputs(2, images=12)
    orders = []
    for epoch in (1, 2):
        orders.append([])
        for k in range(4):
            part = baselines.minibatch(config, epoch, k, advantage)
            rows = part.nonzero().flatten()
            ours = gradient("ddpo", log_probs, old, ref, part, 0.1)
            alone = gradient("ddpo", log_probs[rows], old[rows], ref[rows], advantage[rows], 0.1)
            torch.testing.assert_close(ours[rows], alone)
            assert ours.any(-1).sum() <= len(rows) == 3
            orders[-1] += rows.tolist()
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--loss prdp --images-per-prompt 1", "--images-per-prompt must be 2"),
        ("--loss dpo --images-per-prompt 1", "--images-per-prompt must be 2"),
        ("--loss ddpo --updates-per-epoch 5", "--updates-per-epoch must divide the 64 images"),
        ("--loss ddpo-sf --updates-per-epoch 2", "--updates-per-epoch 1"),
        ("--loss ddpo --offline", "--offline"),
        ("--loss ddpo --images-per-prompt 1", None),
        ("--loss ddpo-sf --updates-per-epoch 1", None),
        ("--loss dpo --offline", None),
    ],
)
def test_settings_that_do_not_go_with_a_loss(flags, why):
    arguments = ["--preset", "toy", *flags.split()]
    if why is None:
        assert prdp.parse_args(arguments).preset == "toy"
    else:
        with pytest.raises(prdp.InputError, match=why):
            prdp.parse_args(arguments)


@each_loss
def test_runs(cli, tmp_path, name):
    """Through the command line; DDPO with one image a prompt, as it samples in the large."""
    flags = ["--loss", name, "--updates-per-epoch", 1 if name == "ddpo-sf" else 2]
    code, _, errors = cli(*flags, "--images-per-prompt", 1 if name == "ddpo" else 2)
    assert (code, errors) == (0, "")
    run = tmp_path / "run"
    assert (run / "before_after.png").is_file()
    assert metrics_of(run)[1]["log_ratio_ref"] != 0
    assert bool(checkpoint(run)["latest"]) == name.startswith("ddpo")


@pytest.mark.parametrize("loss", ["prdp", "ddpo"])
def test_passes_are_those_of_an_epoch(cli, monkeypatch, loss):
    """What the forecast of a run multiplies, against the rows that the network sees in epoch 2; a
    pass that keeps its gradient counts as three."""
    rows, ends = [], []
    forward, finish = prdp.predict_noise, prdp.report.epoch_metrics

    def counted(policy, sample, *rest):
        rows.append(len(sample) * (3 if torch.is_grad_enabled() else 1))
        return forward(policy, sample, *rest)

    def finished(*arguments):
        ends.append(sum(rows))
        return finish(*arguments)

    monkeypatch.setattr(prdp, "predict_noise", counted)
    monkeypatch.setattr(prdp.report, "epoch_metrics", finished)
    code, _, errors = cli("--loss", loss, "--clip-range", "inf")
    assert (code, errors) == (0, "")
    images, steps = 4, 3
    config = SimpleNamespace(loss=loss, updates_per_epoch=2)
    assert ends[1] - ends[0] == images * steps * baselines.passes(config)


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
    loss = baselines.diffusion_dpo_loss(errors, errors_ref, rewards, 7.0)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)
