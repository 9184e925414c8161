"""baselines/implicit_reward.py: against loops, planted models, and what cannot be compared."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import prdp
from baselines import implicit_reward
from baselines.pairs import NoReward, People
from conftest import CPU, PROMPTS, call, edit_json, only_sentence, tiny_config


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Six pairs of pictures of noise."""
    rng, records = np.random.default_rng(0), []
    for n in range(6):
        record = {"prompt": PROMPTS[n % 3]}
        for name in ("chosen", "rejected"):
            record[name] = f"{name}{n}.png"
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / record[name])
        records.append(json.dumps(record))
    (tmp_path / "pairs.jsonl").write_text("\n".join(records))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def models(tiny_sd) -> Callable[..., prdp.Models]:
    """models(change, **settings): what a command loads, its weights moved by `change`."""

    def load(change: float = 0.0, **settings) -> prdp.Models:
        config = tiny_config(tiny_sd, **settings)
        loaded = prdp.load_models(config, CPU, NoReward({}), learns=False)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in loaded.sd.unet.parameters():
                p += change * torch.randn(p.shape, generator=g)
        return loaded

    return load


def alpha_bars() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def test_differences_equal_a_double_loop(models, pairs):
    """Over pairs and draws, from Eq. 14 itself, whatever the microbatch."""
    policy, base, people = models(0.02), models(), People(str(pairs))
    found = []
    for microbatch in (2, 5):
        errors = [
            implicit_reward.measure(
                loaded._replace(policy=loaded.policy._replace(microbatch=microbatch)), people, 5, 3
            )
            for loaded in (policy, base)
        ]
        found.append(implicit_reward.reward_differences(*errors, 500.0))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert (found[0].abs() > 1e-2).all()

    def error(loaded: prdp.Models, x_0: Tensor, text: Tensor, t: Tensor, noise: Tensor) -> float:
        a = alpha_bars()[t]
        x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float()
        predicted = loaded.sd.unet(x_t[None], t, encoder_hidden_states=text[None]).sample[0]
        return sum(((noise - predicted) ** 2).flatten().tolist()) / noise.numel()

    for n, record in enumerate(people.records):
        (x_0,), (text,) = people.load(base.sd, 3, 0, torch.tensor([n]), mirror=False)
        *_, generator = prdp.image_generators(3, 0, [n], 3)
        timesteps = torch.randint(1000, (5,), generator=generator)
        inside = []
        for t in timesteps:
            noise = torch.randn(4, 8, 8, generator=generator)
            (won, lost), (won_ref, lost_ref) = (
                [error(loaded, x, text, t, noise) for x in x_0] for loaded in (policy, base)
            )
            inside.append(-500 / 2 * (won - won_ref - (lost - lost_ref)))
        expected = math.fsum(inside) / 5
        assert found[0][n].item() == pytest.approx(expected, rel=1e-3, abs=1e-4), record


def planted(loaded: prdp.Models, people: People, side: int) -> prdp.Models:
    """A model that knows the noise in one picture of each pair, and takes the other for it."""
    x_0, texts = people.load(loaded.sd, 0, 0, torch.arange(6), mirror=False)

    def unet(x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor):
        distances = (encoder_hidden_states[:, None] - texts[None]).square().sum((2, 3))
        a = alpha_bars()[timesteps].view(-1, 1, 1, 1, 1)
        implied = (x_t[:, None] - a.sqrt() * x_0[None, :, side]) / (1 - a).sqrt()
        size = implied.square().mean((2, 3, 4)) + 1e6 * distances  # of those with this prompt
        return SimpleNamespace(sample=implied[torch.arange(len(x_t)), size.argmin(1)])

    return loaded._replace(policy=loaded.policy._replace(unet=unet))


@pytest.mark.parametrize(("side", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_a_model_prefers_what_was_planted(models, pairs, side, accuracy):
    loaded, people = models(), People(str(pairs))
    zero = loaded.policy._replace(unet=lambda x, *_, **__: SimpleNamespace(sample=0 * x))
    errors = implicit_reward.measure(planted(loaded, people, side), people, 4, 0)
    errors_ref = implicit_reward.measure(loaded._replace(policy=zero), people, 4, 0)
    found = implicit_reward.reward_differences(errors, errors_ref, 5000.0)
    assert ((found > 0).double().mean() == accuracy) and found.isfinite().all()


def test_the_mean_does_not_depend_on_the_number_of_draws(models, pairs):
    """Of one draw from many seeds, and of many draws; and the error falls as its root."""
    loaded, people = models(), People(str(pairs))
    people.records = people.records[:1]
    x_0, text = people.load(loaded.sd, 0, 0, torch.tensor([0]), mirror=False)
    people.load = lambda *_, **__: (x_0, text)  # the VAE's own draw is not what is asked for

    def unet(slope: float):
        return lambda x, *_, **__: SimpleNamespace(sample=slope * x)

    def estimates(draws: int, seeds: int) -> Tensor:
        found = []
        for seed in range(seeds):
            errors = []
            for slope in (0.3, 0.1):
                policy = loaded.policy._replace(unet=unet(slope), microbatch=draws)
                one = loaded._replace(policy=policy)
                errors.append(implicit_reward.measure(one, people, draws, seed))
            found.append(implicit_reward.reward_differences(*errors, 2.0))
        return torch.cat(found)

    few, many, whole = estimates(1, 400), estimates(16, 100), estimates(20_000, 1)
    # Of predictions s * x_t and r * x_t what pictures do not share is, in the mean over noise,
    # (s^2 - r^2) * alpha_bar * |x_0|^2 / D.
    a, size = alpha_bars().mean(), x_0.square().flatten(2).mean(2)[0].double()
    exact = -(0.3**2 - 0.1**2) * a * (size[0] - size[1])
    for found in (few, many):
        assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5
    assert abs(whole.item() - exact) < 5 * few.std() / 20_000**0.5
    assert 3 < few.std() / many.std() < 5.3


def run(tiny_sd: str, *flags: object) -> list:
    return [tiny_sd, "--seed", 3, "--draws", 2, *flags]


def test_processes_share_the_pairs(models, pairs, monkeypatch):
    """Each measures its own, and gets the bits that one alone gets."""
    loaded, people, parts = models(), People(str(pairs)), {}
    whole = implicit_reward.measure(loaded, people, 2, 3)

    def gather(found: dict) -> list[dict]:
        parts.update(found)
        return [dict(enumerate(whole))]

    monkeypatch.setattr(implicit_reward, "gather_objects", gather)
    monkeypatch.setattr(implicit_reward, "processes", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(implicit_reward, "rank", lambda rank=rank: rank)
        assert torch.equal(implicit_reward.measure(loaded, people, 2, 3), whole)
        assert len(parts) == 3 * (rank + 1)
    assert torch.equal(torch.stack([parts[n] for n in range(6)]), whole)


def test_what_is_printed_and_written(tiny_sd, pairs, tmp_path, capsys):
    """Accuracy is the share above 0; equal models tie in every pair, which is half right."""
    other = Path(shutil.copytree(tiny_sd, tmp_path / "other"))
    edit_json(other / "unet" / "config.json", act_fn="gelu")
    flags = run(tiny_sd, "--pairs", pairs, "--against", other, "--out", tmp_path / "out")
    code, out, errors = call(implicit_reward.main, flags, capsys)
    record = json.loads((tmp_path / "out" / "implicit_reward.json").read_text())
    right = np.array(record["differences"]) > 0
    assert (code, errors) == (0, "") and len(right) == 6 and record["beta"] == 5000
    assert record["accuracy"] == right.mean()
    assert record["accuracy_se"] == pytest.approx(right.std(ddof=1) / 6**0.5)
    assert f"accuracy    {right.mean():>9.4g} +- " in out
    assert call(implicit_reward.main, flags, capsys)[0] == 0  # again
    said = only_sentence(call(implicit_reward.main, [*flags, "--draws", 3], capsys))
    assert "draws is 3, and was 2; restore that, or choose a new --out" in said
    flags = run(tiny_sd, "--pairs", pairs, "--against", tiny_sd, "--out", tmp_path / "same")
    code, out, _ = call(implicit_reward.main, flags, capsys)
    assert code == 0 and "accuracy          0.5 +- 0" in out


def test_what_cannot_be_compared_is_refused(tiny_sd, pairs, tmp_path, capsys):
    other = Path(shutil.copytree(tiny_sd, tmp_path / "other"))
    edit_json(other / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    for flags, sentence in [
        ([], f"{tiny_sd}: is no run; name what it began from: --against BASE."),
        (["--against", other], "has another VAE, text encoder or noise schedule"),
        (["--against", tiny_sd, "--draws", 0], "--draws and --beta: must be above 0."),
        (["--against", tiny_sd, "--beta", -1], "--draws and --beta: must be above 0."),
        (["--against", tiny_sd, "--pairs", tmp_path / "no.jsonl"], "No such file"),
    ]:
        flags = run(tiny_sd, "--pairs", pairs, "--out", tmp_path / "score", *flags)
        assert sentence in only_sentence(call(implicit_reward.main, flags, capsys))
        assert not (tmp_path / "score").exists()


def test_a_base_that_changed_is_refused(tiny_sd, pairs, tmp_path, capsys):
    """The run began from other weights than are there now."""
    pipeline = Path(shutil.copytree(tiny_sd, tmp_path / "run" / "pipeline"))
    (pipeline / "prdp.json").write_text('{"epoch": 1}')
    record = {"model": tiny_sd, "model_digest": "another"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    flags = [tmp_path / "run", "--pairs", pairs, "--draws", 2]
    sentence = only_sentence(call(implicit_reward.main, flags, capsys))
    assert "the model changed since it began; restore that, or name it by --against" in sentence
    assert call(implicit_reward.main, [*flags, "--against", tiny_sd], capsys)[0] == 0
    edit_json(pipeline / "vae" / "config.json", scaling_factor=0.2)  # the run went on
    said = only_sentence(call(implicit_reward.main, [*flags, "--against", pipeline], capsys))
    assert f"against is {pipeline}, and was {tiny_sd}; restore that" in said
    said = only_sentence(call(implicit_reward.main, [*flags, "--against", tiny_sd], capsys))
    assert "the finetuned model changed since it began; restore that, or choose a new --out" in said
