"""baselines/ddpo.py: its losses and statistics by hand, its epochs against the paper's page."""

import itertools
import math
import random
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import prdp
from baselines import ddpo
from conftest import PROMPTS, assert_same_run, call, checkpoint, gradient_of, metrics_of
from conftest import only_sentence, random_inputs, small_run, tiny_config
from support import report
from support.cli import UserError

# ---- Losses and statistics -----------------------------------------------------------------------


def losses(log_probs, old, advantages, clip_range: float) -> dict[str, torch.Tensor]:
    return {
        "ddpo": ddpo.ddpo_loss(log_probs, old, advantages, clip_range),
        "ddpo-sf": ddpo.ddpo_sf_loss(log_probs, advantages),
    }


def by_hand(name: str, log_probs, old, advantages, clip_range: float) -> float:
    """Image by image and step by step, in plain numbers."""
    total, count = 0.0, 0
    for i, t in itertools.product(range(len(advantages)), range(log_probs.shape[1])):
        advantage, count = advantages[i].item(), count + 1
        if name == "ddpo-sf":
            total -= log_probs[i, t].item() * advantage
            continue
        weight = math.exp(log_probs[i, t].item() - old[i, t].item())
        inside = min(max(weight, 1 - clip_range), 1 + clip_range)
        total -= min(weight * advantage, inside * advantage)
    return total / count


@pytest.mark.parametrize("name", ["ddpo", "ddpo-sf"])
def test_loss_equals_its_paper_by_hand(name):
    """Its gradient by finite differences; on-policy it is minus the advantage at every step."""
    log_probs, old, _, advantages = random_inputs(1, images=16)
    ours = losses(log_probs, old, advantages, 0.1)[name].item()
    assert ours == pytest.approx(by_hand(name, log_probs, old, advantages, 0.1), rel=1e-12)
    leaf = log_probs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses(x, old, advantages, 0.1)[name], leaf)
    (on_policy,) = torch.autograd.grad(losses(leaf, log_probs, advantages, 1e-4)[name], leaf)
    expected = -advantages.unsqueeze(-1).expand_as(log_probs) / log_probs.numel()
    torch.testing.assert_close(on_policy, expected)


@pytest.mark.parametrize(
    ("moved", "learns"), [(0.3, [False, True]), (-0.3, [True, False]), (0.05, [True, True])]
)
def test_ddpo_clips_one_sided(moved, learns):
    """PPO: no gradient where moving on would raise the surrogate; one where moving back would."""
    old, advantages = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([1.0, -1.0])
    log_probs = (old + moved).requires_grad_()
    (gradient,) = torch.autograd.grad(ddpo.ddpo_loss(log_probs, old, advantages, 0.1), log_probs)
    assert (gradient != 0).flatten().tolist() == learns


def test_reward_statistics():
    """12 epochs against lists kept by hand: "per-prompt" is of the last 32 rewards of a prompt once
    it has 16, else of the epoch's; "group" of its images. An outlier counts 10."""
    random.seed(0)
    kinds = ("per-prompt", "global", "group")
    kept = {kind: ddpo.RewardStatistics(kind) for kind in kinds}
    latest, cases = {}, set()
    for _ in range(12):
        prompts = [random.choice("abc") for _ in range(2)]
        rewards = [random.gauss(0, 1) for _ in range(10)]
        ours = {kind: kept[kind].advantages(torch.tensor(rewards), prompts) for kind in kinds}
        for n, prompt in enumerate(prompts):
            latest.setdefault(prompt, []).extend(rewards[5 * n : 5 * n + 5])
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
    for outlier in (1.0, -1.0):
        rewards = torch.zeros(400)
        rewards[7] = outlier
        advantages = ddpo.RewardStatistics("global").advantages(rewards, ["a"])
        assert advantages[7] == 10 * outlier
    values = (5.123, 1000.3, 1000.1, 0.27133)  # where all are the same nothing is learned
    for value, count, kind in itertools.product(values, (24, 512), kinds):
        same = torch.full((count,), value, dtype=torch.float64)
        for rewards in (same, same.float()):
            assert not ddpo.RewardStatistics(kind).advantages(rewards, ["a", "b"]).any()
            assert report.deviation(rewards) == 0


def test_every_image_is_in_one_minibatch():
    """Others in another epoch; of several processes each has its own."""
    config = SimpleNamespace(prompts_per_epoch=3, images_per_prompt=4, updates_per_epoch=4, seed=3)
    parts = [ddpo.minibatches(config, epoch) for epoch in (1, 2)]
    for part in parts:
        assert sorted(itertools.chain(*part)) == list(range(12)) and {len(p) for p in part} == {3}
    assert parts[0] != parts[1] and parts[0] == ddpo.minibatches(config, 1)


# ---- Epochs --------------------------------------------------------------------------------------


def ddpo_config(tiny_sd: str, **changes) -> ddpo.Config:
    config = vars(tiny_config(tiny_sd, updates_per_epoch=2, epochs=2, learning_rate=1e-4))
    return ddpo.Config(**{**config, **changes})


def brightness(images, prompts):
    return images.double().mean((1, 2, 3))


def page(config: ddpo.Config, models: prdp.Models) -> list[list[float]]:
    """DDPO_IS by the letter, one graph for a minibatch: gradient norms of each epoch's updates."""
    policy, schedule, norms = models.policy, models.policy.schedule, []
    optimizer = torch.optim.AdamW(policy.unet.parameters(), config.learning_rate)
    kept = ddpo.RewardStatistics(config.advantage)
    for epoch in range(1, config.epochs + 1):
        drawn = prdp.draw_prompts(config, PROMPTS, epoch)
        texts = [prompt for prompt in drawn for _ in range(4)]
        noise = prdp.image_generators(config.seed, epoch, range(3), 4)
        trajectories = prdp.sample_prompts(models, policy, texts, noise)
        pictures = models.sd.decode(trajectories.latents[:, -1], 6)
        advantages = kept.advantages(brightness(pictures, []).float(), drawn)
        norms.append([])
        for part in ddpo.minibatches(config, epoch):
            terms = []
            for m, k in itertools.product(part, range(config.ddpm_steps)):
                x_t, x_prev = trajectories.latents[m, k], trajectories.latents[m, k + 1]
                text = torch.stack([policy.null_embeds, trajectories.prompt_embeds[m]])
                t = schedule.timesteps[k].expand(2)
                u, c = policy.unet(x_t.expand(2, -1, -1, -1), t, encoder_hidden_states=text).sample
                mean = schedule.coef_sample[k] * x_t + schedule.coef_noise[k] * (u + 5 * (c - u))
                log_prob = Normal(mean.double(), schedule.sigma[k]).log_prob(x_prev.double()).mean()
                ratio = torch.exp(log_prob - trajectories.log_probs[m, k])
                clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
                terms.append(-torch.minimum(ratio * advantages[m], clipped * advantages[m]))
            optimizer.zero_grad()
            torch.stack(terms).mean().backward()
            norms[-1].append(gradient_of(policy.unet).norm().item())
            torch.nn.utils.clip_grad_norm_(policy.unet.parameters(), config.max_grad_norm)
            optimizer.step()
    return norms


def test_train_is_the_papers_page(tiny_sd):
    config = ddpo_config(tiny_sd)
    ours, theirs = (prdp.load_models(config, torch.device("cpu"), brightness) for _ in range(2))
    optimizer = torch.optim.AdamW(ours.policy.unet.parameters(), config.learning_rate)
    kept = ddpo.RewardStatistics(config.advantage)
    rows = list(ddpo.train(config, ours, optimizer, PROMPTS, 1, kept))
    for row, norms in zip(rows, page(config, theirs), strict=True):
        assert row["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-3)
        assert "log_ratio_ref" not in row
    networks = (ours.policy.unet, theirs.policy.unet, ours.reference.unet)
    a, b, start = (torch.cat([p.flatten() for p in unet.parameters()]) for unet in networks)
    assert (a - b).norm() < 0.02 * (a - start).norm()


@pytest.mark.parametrize("measure_kl", [False, True])
def test_passes_are_those_of_an_epoch(tiny_sd, monkeypatch, measure_kl):
    """What the forecast multiplies, against the rows that the network sees, without gradient and
    with. The reference scores only if its KL is asked for."""
    config = ddpo_config(tiny_sd, epochs=1, clip_range=math.inf, measure_kl=measure_kl)
    models = prdp.load_models(config, torch.device("cpu"), brightness)
    rows, forward = {False: 0, True: 0}, prdp.run_unet

    def counted(policy, x_t, *rest):
        rows[torch.is_grad_enabled()] += len(x_t)
        return forward(policy, x_t, *rest)

    monkeypatch.setattr(prdp, "run_unet", counted)
    optimizer = torch.optim.AdamW(models.policy.unet.parameters(), 1e-5)
    kept = ddpo.RewardStatistics("global")
    (row,) = ddpo.train(config, models, optimizer, PROMPTS, 1, kept)
    assert config.passes() == (1.5 + measure_kl, 1)
    assert tuple(count / (12 * 5) for count in rows.values()) == config.passes()
    assert ("kl_nats" in row) == measure_kl


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--updates-per-epoch 5", "must divide the 64 images"),
        ("--loss ddpo-sf --updates-per-epoch 2", "needs --updates-per-epoch 1"),
        ("--advantage group --images-per-prompt 1", "--advantage group: needs"),
        ("--offline", "unrecognized arguments: --offline"),
        ("--kl-weight 1", "unrecognized arguments: --kl-weight"),
        ("--images-per-prompt 1", None),
        ("--loss ddpo-sf --updates-per-epoch 1", None),
    ],
)
def test_settings_that_do_not_go_together(flags, why):
    argv = ["--preset", "toy", *flags.split()]
    if why is None:
        assert ddpo.parse_args(argv).program == "baselines/ddpo.py"
        return
    with pytest.raises(UserError, match=why):
        ddpo.parse_args(argv)


def test_numbers_are_checked_before_what_is_computed_from_them(capsys):
    """No division by zero, no traceback."""
    said = only_sentence(call(ddpo.main, ["--preset", "toy", "--updates-per-epoch", 0], capsys))
    assert said == "baselines/ddpo.py: --updates-per-epoch 0: must be above 0."


def test_presets_are_the_papers():
    """K = 4 and clip range 1e-4 (App. F.6); at large scale 512 prompts of one image (PRDP, App. B),
    at its own rate."""
    small, toy = (ddpo.parse_args(["--preset", p]) for p in ("small", "toy"))
    assert (small.updates_per_epoch, small.clip_range, small.learning_rate) == (4, 1e-4, 1e-5)
    many = ddpo.PRESETS["large"]
    assert (many["prompts_per_epoch"], many["images_per_prompt"]) == (512, 1)
    assert many["learning_rate"] == 1e-5
    assert toy.model.endswith("toy/sd") and (toy.epochs, toy.clip_range) == (100, 1e-3)
    assert toy.out.endswith("runs/toy-ddpo")  # beside prdp.py's


def test_from_python_by_its_own_run(tiny_sd, tmp_path):
    """With a callable and a list, as prdp.run."""
    flags = [*small_run(tiny_sd), "--epochs", "1", "--out", str(tmp_path / "run")]
    config = ddpo.parse_args(flags)
    given = (lambda images, prompts: images.double().mean((1, 2, 3)), ["a red circle"])
    ddpo.run(config, *given)
    (row,) = metrics_of(tmp_path / "run")
    assert abs(row["loss"]) < 1 and row["reward_mean"] > 0


def test_run_goes_on_to_the_bit(tiny_sd, tmp_path, capsys):
    """Statistics of more than 16 rewards a prompt included; prdp.py names who can go on with it."""
    (tmp_path / "p.txt").write_text("a red star\na blue star\n")
    flags = [*small_run(tiny_sd), "--prompts", tmp_path / "p.txt", "--images-per-prompt", 6]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert call(ddpo.main, [*flags, "--epochs", 4, "--out", whole], capsys)[0] == 0
    assert call(ddpo.main, [*flags, "--epochs", 3, "--out", halves], capsys)[0] == 0
    code, _, errors = call(prdp.main, ["--resume", halves, "--epochs", 4], capsys)
    assert code == 2
    assert f"go on with: python baselines/ddpo.py --resume {halves}." in errors
    assert call(ddpo.main, ["--resume", halves, "--epochs", 4], capsys)[0] == 0
    assert_same_run(whole, halves)
    latest = checkpoint(halves)["state"]["latest"]
    assert latest == checkpoint(whole)["state"]["latest"]
    assert max(map(len, latest.values())) > 16
    assert len(metrics_of(whole)) == 4
