"""SDXL behind the same policy; diffusers' pipeline and passes of its bare UNet are the oracle."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch.distributions import Normal

import evaluate
import prdp
from baselines import ddpo
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
    flags = [run, "--samples-per-prompt", 2, "--max-prompts", 2]
    code, out, errors = call(evaluate.main, flags, capsys)
    assert (code, errors) == (0, "") and "wins" in out
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
