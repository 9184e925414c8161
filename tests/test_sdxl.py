"""SDXL behind the same policy; diffusers' pipeline and passes of its bare UNet are the oracle."""

import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch.distributions import Normal

import evaluate
import prdp
from baselines import ddpo, diffusion_dpo, implicit_reward
from baselines.pairs import People
from conftest import CPU, PROMPTS, assert_same_run, call, draw, edit_json, gradient_of
from conftest import only_sentence, small_run, tiny_config

WORDS = [PROMPTS[0], "", PROMPTS[2]]  # a user's empty prompt is encoded


@pytest.fixture
def models(tiny_sdxl) -> Callable[..., prdp.Models]:
    return lambda **changes: prdp.load_models(tiny_config(tiny_sdxl, **changes), CPU)


def changed(tiny_sdxl: str, tmp_path: Path, zeros: bool | None, **unet) -> Path:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "sdxl"))
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    edit_json(folder / "unet" / "config.json", **unet)
    return folder


def pipeline(folder: Path | str) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    settings = {"timestep_spacing": "leading", "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_by(pipe: StableDiffusionXLPipeline, prompts: list[str], **options) -> torch.Tensor:
    """x_0 of 4 images of each of 3 prompts, with the noise of `draw`."""
    generators = prdp.image_generators(0, 1, range(3), 4)
    options |= {"num_images_per_prompt": 4, "num_inference_steps": 5, "guidance_scale": 5.0}
    return pipe(prompts, eta=1.0, generator=generators, output_type="latent", **options).images


# ---- The pipeline's own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zeros", "size"), [(None, [8, 8]), (True, [8, 16]), (False, [8, 8])], ids=str
)
def test_images_equal_the_pipelines_own(tiny_sdxl, models, tmp_path, zeros, size):
    """Of DDIM with eta = 1 and the same generators; and what it does with an empty prompt."""
    folder = changed(tiny_sdxl, tmp_path, zeros, sample_size=size)
    ours = models(model=str(folder))
    noise = prdp.image_generators(0, 1, range(3), 4)
    latents = prdp.sample_prompts(ours, ours.policy, WORDS, noise).latents[:, -1]
    theirs = drawn_by(pipeline(folder), WORDS, height=2 * size[0], width=2 * size[1])
    torch.testing.assert_close(latents, theirs, rtol=0, atol=2e-4)
    assert bool(ours.policy.null_embeds.any()) == (zeros is False)
    assert ours.sd.encode([""]).any()
    assert ours.sd.decode(latents, 6).shape == (12, 3, 2 * size[0], 2 * size[1])


def test_what_is_packed_is_unpacked(models, tiny_sdxl, monkeypatch):
    """Each part of what a UNet is given, compiled too; the pipeline's own passes pass through."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    loaded, seen = models(compile=True), []
    texts = loaded.sd.encode(WORDS)
    loaded.sd.unet.register_forward_pre_hook(
        lambda unet, inputs, options: seen.append(options), with_kwargs=True
    )
    with torch.no_grad():
        x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 900])
        compiled = loaded.policy.unet(x_t, t, encoder_hidden_states=texts).sample
        plain = loaded.sd.unet(x_t, t, encoder_hidden_states=texts).sample
        embeds, _, pooled, _ = pipeline(tiny_sdxl).encode_prompt(
            WORDS, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(seen[0]["encoder_hidden_states"], embeds)
    torch.testing.assert_close(seen[0]["added_cond_kwargs"]["text_embeds"], pooled)
    assert seen[0]["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    loaded.sd.pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        drawn_by(loaded.sd.pipe, WORDS), drawn_by(pipeline(tiny_sdxl), WORDS), rtol=0, atol=2e-4
    )


# ---- Passes and gradient -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rank"), [("fp32", 0), ("fp16", 0), ("bf16", 2)])
def test_on_policy_gap_is_exactly_zero(models, dtype, rank):
    """Of the policy and its reference; after a step the policy alone moves."""
    loaded = models(dtype=dtype, lora_rank=rank)
    trajectories = draw(loaded)
    for policy in (loaded.policy, loaded.reference):
        scored = prdp.score_trajectories(policy, trajectories)
        assert torch.equal(scored, trajectories.log_probs)
    prdp.backward_trajectories(loaded.policy, trajectories, torch.ones_like(trajectories.log_probs))
    learned = [p for p in loaded.sd.unet.parameters() if p.requires_grad]
    torch.optim.AdamW(learned, lr=1e-2).step()
    scored = prdp.score_trajectories(loaded.reference, trajectories)
    assert torch.equal(scored, trajectories.log_probs)
    moved = prdp.score_trajectories(loaded.policy, trajectories)
    assert not torch.equal(moved, trajectories.log_probs)


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_gradient_equals_the_whole_graphs(models, tiny_sdxl, checkpointing):
    """A loop over images and steps through a UNet of its own, in float64, that is given the texts
    and sizes as the pipeline gives them."""
    loaded, pipe = models(gradient_checkpointing=checkpointing), pipeline(tiny_sdxl)
    trajectories = draw(loaded)
    weights = torch.randn(12, 5, dtype=torch.float64)
    weights[torch.rand(12, 5) < 0.3] = 0
    prdp.backward_trajectories(loaded.policy, trajectories, weights)
    ours = gradient_of(loaded.sd.unet).double()

    unet, schedule = pipe.unet.double(), loaded.policy.schedule
    with torch.no_grad():
        embeds, nothing, pooled, pooled_nothing = pipe.encode_prompt(PROMPTS)
    for m, k in weights.nonzero().tolist():
        x_t, x_prev = trajectories.latents[m, k : k + 2].double()
        texts = torch.stack([nothing[m // 4], embeds[m // 4]]).double()
        pooled_texts = torch.stack([pooled_nothing[m // 4], pooled[m // 4]]).double()
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2).double()
        added = {"text_embeds": pooled_texts, "time_ids": sizes}
        t = schedule.timesteps[k]
        u, c = unet(torch.stack([x_t, x_t]), t, texts, added_cond_kwargs=added).sample
        mean = schedule.coef_sample[k] * x_t + schedule.coef_noise[k] * (u + 5 * (c - u))
        log_prob = Normal(mean, schedule.sigma[k]).log_prob(x_prev).mean()
        assert trajectories.log_probs[m, k].item() == pytest.approx(log_prob.item(), abs=2e-5)
        (weights[m, k] * log_prob).backward()
    expected = gradient_of(unet)
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-5


# ---- Diffusion-DPO -------------------------------------------------------------------------------


def write_pairs(folder: Path, count: int = 4) -> Path:
    """Pictures of noise, of two sizes, and people's choices between them."""
    rng, records = np.random.default_rng(0), []
    for n in range(count):
        record = {"prompt": PROMPTS[n % 3]}
        for name in ("chosen", "rejected"):
            record[name] = f"{name}{n}.png"
            pixels = rng.integers(0, 256, (20 + n, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / record[name])
        records.append(json.dumps(record))
    (folder / "pairs.jsonl").write_text("\n".join(records))
    return folder / "pairs.jsonl"


def test_an_update_of_diffusion_dpo_is_their_codes(models, tiny_sdxl, tmp_path):
    """The inner loop of train.py --sdxl: chosen and rejected stacked one after the other, with one
    timestep and noise, the same texts, the model's size and no crop for every picture."""
    loaded, pipe = models(), pipeline(tiny_sdxl)
    with torch.no_grad():  # a policy that has moved
        for p in loaded.policy.unet.parameters():
            p += 1e-2 * torch.randn(p.shape)
    config = diffusion_dpo.Config(beta=500.0, max_grad_norm=math.inf)
    optimizer = torch.optim.SGD(loaded.policy.unet.parameters(), 0.1)
    people = People(str(write_pairs(tmp_path)))
    numbers, t = torch.tensor([2, 0, 3, 1]), torch.tensor([10, 400, 700, 990])
    noise = torch.randn(4, 4, 8, 8)
    before = copy.deepcopy(loaded.policy.unet)
    before._forward_pre_hooks.clear()

    load = partial(people.load, loaded.sd, 7, 1)
    row = diffusion_dpo.update(config, loaded, optimizer, people.owner(), load, numbers, t, noise)
    x_0, _ = load(numbers)
    latents = torch.cat([x_0[:, 0], x_0[:, 1]])
    x_t = pipe.scheduler.add_noise(latents, noise.repeat(2, 1, 1, 1), t.repeat(2))
    with torch.no_grad():
        prompts = [people.records[n]["prompt"] for n in numbers]
        texts, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    sizes = torch.tensor([16, 16, 0, 0, 16, 16])[None].repeat(8, 1)
    added = {"time_ids": sizes, "text_embeds": pooled.repeat(2, 1)}
    losses = []
    for unet in (before, pipe.unet):
        predicted = unet(x_t, t.repeat(2), texts.repeat(2, 1, 1), added_cond_kwargs=added).sample
        won, lost = (predicted - noise.repeat(2, 1, 1, 1)).square().mean((1, 2, 3)).chunk(2)
        losses.append(won - lost)
    inside = -0.5 * config.beta * (losses[0] - losses[1].detach())
    loss = -torch.nn.functional.logsigmoid(inside).mean()
    loss.backward()
    assert row["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert row["accuracy"].item() == (inside > 0).double().mean()
    assert abs(loss.item() - math.log(2)) > 1e-2
    expected = gradient_of(before)
    assert row["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    pairs = zip(before.parameters(), loaded.policy.unet.parameters(), strict=True)
    moved = torch.cat([(p - q).detach().flatten() for p, q in pairs])
    assert ((moved - 0.1 * expected).norm() / moved.norm()).item() < 1e-3


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_people_teach_it_by_a_command(models, tiny_sdxl, tmp_path, capsys, loss):
    """And its implicit rewards of the same pairs, which a double loop gives too: through the bare
    UNets of the saved pipeline and of the base."""
    flags, run = flags_of(tiny_sdxl), tmp_path / "run"
    cut = flags.index("--reward")
    flags = [*flags[:cut], *flags[cut + 2 :], "--pairs", write_pairs(tmp_path), "--loss", loss]
    flags += ["--batch-size", 4, "--beta", 500, "--warmup", 0, "--out", run]
    assert call(diffusion_dpo.main, flags, capsys)[::2] == (0, "")
    flags = [run, "--pairs", tmp_path / "pairs.jsonl", "--draws", 3, "--out", tmp_path / "score"]
    code, out, errors = call(implicit_reward.main, flags, capsys)
    assert (code, errors) == (0, "") and "4 pairs, 3 draws each" in out
    record = json.loads((tmp_path / "score" / "implicit_reward.json").read_text())
    assert record["beta"] == 500 and record["against"] == tiny_sdxl

    pipes, inside = (pipeline(run / "pipeline"), pipeline(tiny_sdxl)), []
    people, sd = People(str(tmp_path / "pairs.jsonl")), models().sd
    for n, pair in enumerate(people.records):
        (x_0,), _ = people.load(sd, 0, 0, torch.tensor([n]), mirror=False)
        *_, generator = prdp.image_generators(0, 0, [n], 3)
        for t in torch.randint(1000, (3,), generator=generator):
            noise, errors = torch.randn(4, 8, 8, generator=generator), []
            for pipe, picture in itertools.product(pipes, x_0):
                with torch.no_grad():
                    text, _, pooled, _ = pipe.encode_prompt(pair["prompt"])
                    added = {
                        "text_embeds": pooled,
                        "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]]),
                    }
                    x_t = pipe.scheduler.add_noise(picture[None], noise, t[None])
                    out = pipe.unet(x_t, t, text, added_cond_kwargs=added).sample
                errors.append((out.double() - noise).square().mean().item())
            won, lost, won_ref, lost_ref = errors
            inside.append(-500 / 2 * (won - won_ref - (lost - lost_ref)))
    found, expected = record["differences"], np.mean(np.reshape(inside, (4, 3)), axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(found).min() > 1e-2


# ---- Runs ----------------------------------------------------------------------------------------


def flags_of(tiny_sdxl: str) -> list:
    return [*small_run(tiny_sdxl), "--learning-rate", "1e-3"]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_on_and_its_models_draw_what_it_drew(tiny_sdxl, tmp_path, capsys, rank):
    """To the bit; the pipeline, the merged one and lora/ on the base."""
    flags, run = [*flags_of(tiny_sdxl), "--lora-rank", rank], tmp_path / "run"
    assert call(prdp.main, [*flags, "--epochs", 1, "--out", run], capsys)[::2] == (0, "")
    if rank == 0:
        assert call(prdp.main, [*flags, "--out", tmp_path / "whole"], capsys)[0] == 0
        assert call(prdp.main, ["--resume", run, "--epochs", 2], capsys)[0] == 0
        assert_same_run(tmp_path / "whole", run)

    loaded = prdp.load_run(str(run), CPU)
    policy = loaded.policy._replace(schedule=prdp.ddpm_schedule(loaded.sd.noise_settings, 5))
    expected = draw(loaded._replace(policy=policy)).latents[:, -1]
    saved, pretrained = pipeline(run / "pipeline"), pipeline(tiny_sdxl)
    assert saved.config.force_zeros_for_empty_prompt
    moved = (drawn_by(pretrained, PROMPTS) - expected).abs().max().item()
    found = drawn_by(saved, PROMPTS)
    assert (found - expected).abs().max().item() < min(1e-3, 0.05 * moved)
    if rank:
        pretrained.load_lora_weights(run / "lora")
        assert (drawn_by(pretrained, PROMPTS) - found).abs().max().item() < 0.05 * moved


def test_evaluate_and_ddpo_take_it(tiny_sdxl, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert call(ddpo.main, [*flags_of(tiny_sdxl), "--out", run], capsys)[::2] == (0, "")
    flags = [run, "--samples-per-prompt", 2, "--max-prompts", 2, "--sampler", "policy", "dpm++"]
    code, out, errors = call(evaluate.main, flags, capsys)
    assert (code, errors) == (0, "") and out.count("wins") == 2
    (file,) = run.glob("evaluation/*/evaluation.json")
    assert len(json.loads(file.read_text())["inputs"]) == 2


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        (
            "",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            "a StableDiffusionXLImg2ImgPipel",
        ),
        (
            "",
            {"_class_name": "StableDiffusionXLInpaintPipeline"},
            "a StableDiffusionXLInpaintPipel",
        ),
        ("", {"_class_name": "StableDiffusion3Pipeline"}, "a StableDiffusion3Pipeline; only"),
        ("", {"_class_name": "FluxPipeline"}, "a FluxPipeline; only Stable Diffusion 1.x, 2.x and"),
        (
            "",
            {"_class_name": "StableDiffusionPipeline"},
            "its unet has addition_embed_type text_ti",
        ),
        ("scheduler", {"timestep_spacing": "trailing"}, "has timestep_spacing 'trailing'"),
        ("scheduler", {"_class_name": "LCMScheduler"}, "has _class_name 'LCMScheduler'"),
        ("unet", {"addition_embed_type": None}, "its unet has addition_embed_type None"),
        ("unet", {"time_cond_proj_dim": 256}, "its unet has time_cond_proj_dim 256"),
        ("unet", {"cross_attention_dim": 16}, "cross_attention_dim is not its texts' width, 40"),
        ("unet", {"in_channels": 9}, "in_channels, out_channels and latent_channels"),
    ],
)
def test_other_models_are_refused_by_name(tiny_sdxl, tmp_path, capsys, part, changes, sentence):
    """The refiner, inpainting, SD 3, FLUX; models distilled to a few steps (SDXL-Turbo, LCM)."""
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "sdxl"))
    names = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    edit_json(folder / names.get(part, "unet/config.json"), **changes)
    flags = [*flags_of(str(folder)), "--out", tmp_path / "run"]
    assert sentence in only_sentence(call(prdp.main, flags, capsys))
