"""Model folders that are used or refused; the saved pipeline; adapters, offload, compilation."""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import prdp
from conftest import PROMPTS, ROOT, SD14_SCHEDULER, assert_same_run, checkpoint, draw
from conftest import edit_json, gradient_of, needs_gpu, only_sentence
from stable_diffusion import SAMPLERS, noise_settings
from support import machine
from support.run_folder import weights_digest

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
ONE_EPOCH = ["--epochs", "1", "--updates-per-epoch", "1"]
TOY_REWARD = f"pickscore:{ROOT}/toy/pickscore"


# ---- Folders that are refused --------------------------------------------------------------------


def change_weight(part: str, change: Callable) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS[part])
        change(weights, sorted(weights)[3])
        save_file(weights, folder / WEIGHTS[part], {"format": "pt"})

    return damage


def drop(weights, name) -> None:
    del weights[name]


def spoil(weights, name) -> None:
    weights[name].view(-1)[0] = math.nan


def reshape(weights, name) -> None:
    weights[name] = torch.zeros(*weights[name].shape, 2)


def add_to_attention(weights, name) -> None:
    weights["mid_block.attentions.0.processor.to_q_lora.down.weight"] = torch.zeros(2, 2)


def adapt_text_encoder(folder: Path) -> None:
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    adapter = folder.parent / "adapter"
    text_encoder.save_pretrained(adapter)  # the adapter alone
    for file in adapter.iterdir():
        file.rename(folder / "text_encoder" / file.name)
    adapter.rmdir()
    config = folder / "text_encoder" / "adapter_config.json"
    edit_json(config, base_model_name_or_path=str(folder))


def cut(part: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / WEIGHTS[part], 1000)


class Code:
    def __reduce__(self):
        return os.system, ("touch code_was_run",)


def to_pickle(part: str, **more) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights, file = load_file(folder / WEIGHTS[part]), folder / WEIGHTS[part]
        file.unlink()
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(weights | more, file.with_name(name))

    return damage


def index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model_index.json").write_text(text)


def config(part: str, **changes) -> Callable[[Path], None]:
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: edit_json(folder / part / file, **changes)


def remove(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


MISSING = "1 weights are missing, misshapen or not finite"
ADAPTERS = "has adapters beside its weights; merge them, and save it"
DAMAGED = "a file of weights is damaged, cut short, or holds more than weights"
FOLDERS = {
    "unet lacks a weight": (change_weight("unet", drop), f"its unet: {MISSING} (conv_norm_out"),
    "vae lacks a weight": (change_weight("vae", drop), f"its vae: {MISSING} (decoder.conv_norm"),
    "text encoder lacks one": (change_weight("text_encoder", drop), f"its text_encoder: {MISSING}"),
    "nan in the unet": (change_weight("unet", spoil), f"its unet: {MISSING} (conv_norm_out"),
    "unet misshapen": (change_weight("unet", reshape), f"its unet: {MISSING} (conv_norm_out"),
    "text misshapen": (change_weight("text_encoder", reshape), f"its text_encoder: {MISSING}"),
    "adapters in the unet": (change_weight("unet", add_to_attention), f"its unet: {ADAPTERS}"),
    "adapters of the texts": (adapt_text_encoder, f"its text_encoder: {ADAPTERS}"),
    "unet cut short": (cut("unet"), f"its unet: {DAMAGED}"),
    "text encoder cut short": (cut("text_encoder"), f"its text_encoder: {DAMAGED}"),
    "code in the unet": (to_pickle("unet", x=Code()), f"its unet: {DAMAGED}"),
    "no vae": (remove("vae"), "its vae/config.json: No such file or directory"),
    "no vocabulary": (remove("tokenizer"), "has no vocabulary here"),
    "empty index": (index("{}"), "a None; only Stable Diffusion 1.x, 2.x and"),
    "torn index": (index("{"), "It looks like the config file at"),
    "another pipeline": (index('{"_class_name": "X"}'), "a X; only Stable Diffusion 1.x, 2.x"),
    "distilled": (config("unet", time_cond_proj_dim=256), "its unet has time_cond_proj_dim"),
    "of other inputs": (config("unet", addition_embed_type="text"), "has addition_embed_type"),
    "no size": (config("unet", sample_size=None), "its unet's sample_size is None"),
    "a word as size": (config("unet", sample_size="8"), "its unet's sample_size is '8'"),
    "of size 0": (config("unet", sample_size=0), "its unet's sample_size is 0"),
    "more that come out": (config("unet", out_channels=8), "in_channels, out_channels and latent"),
    "a word as scale": (config("vae", scaling_factor="1"), "its vae's scaling_factor is '1'"),
    "of another width": (config("unet", cross_attention_dim=8), "cross_attention_dim is not"),
    "means": (config("vae", latents_mean=[0.0]), "its vae has latents_mean or latents_std"),
    "of more channels": (config("vae", latent_channels=8), "in_channels, out_channels and latent"),
    "another VAE": (
        config("vae", _class_name="AutoencoderTiny"),
        "its vae is no AutoencoderKL: AutoencoderTiny",
    ),
    "EDM": (config("scheduler", _class_name="EDMEulerScheduler"), "has _class_name 'EDMEuler"),
    "flow sigmas": (config("scheduler", use_flow_sigmas=True), "scheduler has use_flow_sigmas"),
    "another offset": (config("scheduler", steps_offset=0), "scheduler has steps_offset 0"),
    "a larger offset": (config("scheduler", steps_offset=2), "scheduler has steps_offset 2"),
    "a beta above 1": (config("scheduler", beta_end=1.5), "beta_start 0.00085, beta_end 1.5"),
    "a scheduler that is none": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text("[1]"),
        "its scheduler/scheduler_config.json: is no JSON object",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_model_folder_is_refused(damage, sentence, tiny_sd, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    damage(folder)
    said = only_sentence(cli("--model", folder))
    assert said.startswith(f"prdp.py: model {folder}: ")
    assert sentence in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sd"]  # no run, and no code was run


def test_what_is_no_model_folder_is_refused(finished, cli, tmp_path):
    said = only_sentence(cli("--model", finished, "--out", tmp_path / "other"))
    assert said == f"prdp.py: model {finished}: is a run; its model is {finished / 'pipeline'}."
    (tmp_path / "v1-5.safetensors").touch()
    for model in (tmp_path / "v1-5.safetensors", "https://huggingface.co/a/b", tmp_path / "gone"):
        said = only_sentence(cli("--model", model, "--out", tmp_path / "other"))
        assert said.startswith(f"prdp.py: model {model}: is no folder, and no hub id as")


# ---- Folders that are used -----------------------------------------------------------------------


def test_saved_pipeline_says_what_it_is_and_has_the_policys_scheduler(cli, tiny_sd, tmp_path):
    """Whatever kind the model's was, what it left open, and what else it did."""
    model = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    names = ("beta_start", "beta_end", "beta_schedule")
    config = {name: SD14_SCHEDULER[name] for name in names} | {"prediction_type": "v_prediction"}
    odd = {"_class_name": "EulerDiscreteScheduler", "thresholding": True, "use_karras_sigmas": True}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | odd))
    unknown = ["diffusers", "UNet2DConditionModel"]  # a part that diffusers ignores, too
    scheduler = ["diffusers", "EulerDiscreteScheduler"]
    edit_json(model / "model_index.json", scheduler=scheduler, unet_ema=unknown)
    edit_json(model / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    (tmp_path / "p.txt").write_text("a $x_{$ red circle\n" + "red " * 30 + "\n")
    code, out, errors = cli("--model", model, "--prompts", tmp_path / "p.txt", *ONE_EPOCH)
    assert code == 0, errors
    assert "warning: 1 of 2 prompts exceed 16 tokens" in out

    pipeline = tmp_path / "run" / "pipeline"
    saved = StableDiffusionPipeline.from_pretrained(pipeline)
    assert saved.tokenizer.model_max_length == 16
    (pipeline / "tokenizer" / "tokenizer.json").unlink()  # which transformers 4 does not read
    older = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    assert older(PROMPTS).input_ids == saved.tokenizer(PROMPTS).input_ids
    scheduler = saved.scheduler
    assert scheduler.config.thresholding is scheduler.config.clip_sample is False
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(50)
    sigma = scheduler._get_variance(1, -19) ** 0.5
    assert sigma.item() == pytest.approx(prdp.ddpm_schedule(config, 50).sigma[-1].item(), rel=1e-4)
    card = (pipeline / "README.md").read_text()
    assert "finetuned by prdp.py" in card and "for the reward incompressibility" in card
    assert "Use the sampler it learned by:" in card and "eta=1.0" in card
    settings = (pipeline / "prdp.json").read_text()
    assert json.loads(settings)["epoch"] == 1 and str(tmp_path) not in settings
    assert len({file.stat().st_mode for file in pipeline.rglob("*.*")}) == 1


@pytest.mark.filterwarnings("ignore")
def test_whatever_sampler_a_pipeline_was_saved_with():
    """Its noise schedule is the one that it was made from."""
    seen = []
    for name in SAMPLERS.split():
        with contextlib.suppress(ImportError):  # some want scipy or torchsde
            kind = getattr(diffusers, f"{name}Scheduler")
            saved = json.loads(kind.from_config(SD14_SCHEDULER).to_json_string())
            assert noise_settings(saved) == noise_settings(SD14_SCHEDULER)
            seen.append(name)
    assert len(seen) >= len(SAMPLERS.split()) - 2


def test_model_of_pickled_tensors_and_of_another_shape(tiny_sd, models, tmp_path):
    """.bin files are read by the safe loader, fp16 variants beside them are not; a picture need not
    be square."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    for part, name in WEIGHTS.items():
        to_pickle(part)(folder)
        (folder / name).with_suffix(".fp16.safetensors").touch()
    edit_json(folder / "unet" / "config.json", sample_size=[8, 16])
    edit_json(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    one, other = models().sd.pipe, models(model=str(folder))
    assert weights_digest([one.unet, one.vae]) == weights_digest([other.sd.unet, other.sd.vae])
    pictures = other.sd.decode(draw(other).latents[:, -1], 6)
    assert pictures.shape == (12, 3, 16, 32)


# ---- LoRA ----------------------------------------------------------------------------------------


def pictures(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """Of 3 prompts, each from its own noise, as floats."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    options = {"num_inference_steps": 5, "generator": generators, "output_type": "pt"}
    return pipe(PROMPTS, eta=1.0, **options).images


def test_lora(cli, tiny_sd, tmp_path):
    """Adapters alone are learned and kept. The pipeline has them merged, and the base with lora/
    and the pipeline's scheduler draws the same, which is not what the base draws. --keep-every
    keeps adapters, and the run goes on as without it."""
    flags = ["--lora-rank", 2, "--learning-rate", "1e-2", "--microbatch", 4]
    assert cli(*flags, "--out", tmp_path / "plain")[0] == 0
    assert cli(*flags, "--keep-every", 1)[0] == 0
    run = tmp_path / "run"
    assert_same_run(tmp_path / "plain", run)
    kept = [load_file(run / "epochs" / f"000{n}" / "lora" / LORA_FILE) for n in (1, 2)]
    assert len({file.stat().st_mode for file in run.rglob("*.[js]*")}) == 1  # for others to read
    assert kept[1].keys() == load_file(run / "lora" / LORA_FILE).keys()
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    adapters = checkpoint(run)["unet"]
    assert adapters and all("lora_" in name for name in adapters)
    assert any(x.abs().max() > 1e-3 for name, x in adapters.items() if "lora_B" in name)

    merged = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert not any("lora" in name for name in merged.unet.state_dict())
    base = StableDiffusionPipeline.from_pretrained(tiny_sd)
    base.scheduler = merged.scheduler
    expected, pretrained = pictures(merged), pictures(base)
    base.load_lora_weights(run / "lora")
    moved = (expected - pretrained).abs().mean().item()
    assert moved > 1e-3
    assert (pictures(base) - expected).abs().mean().item() < 0.01 * moved

    # docs/running.md's lines make of adapters what `pipeline/` has.
    base.fuse_lora()
    base.unload_lora_weights()
    base.save_pretrained(tmp_path / "merged")
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "merged").unet.state_dict()
    for name, weight in merged.unet.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)


LORA_FILE = "pytorch_lora_weights.safetensors"


ADAPTED = {"lora_rank": 2, "dtype": "bf16", "gradient_checkpointing": "on"}


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "dtype": "fp16"}, ADAPTED])
def test_scoring_with_the_reference_is_scoring_with_the_pretrained_model(models, changes):
    """After updates, between a forward pass and its backward pass, if the network fails; and it
    leaves the policy, what learns of it and its gradient as they were."""
    pretrained = draw(models(dtype=changes.get("dtype", "fp32")))
    loaded = models(**changes)
    unet, trajectories, rows = loaded.sd.unet, draw(loaded), torch.arange(6)
    assert torch.equal(trajectories.log_probs, pretrained.log_probs)
    learns = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=0.1 if changes else 1e-4)

    def score(policy: prdp.Policy) -> torch.Tensor:
        return prdp.score_trajectories(policy, trajectories)

    def gradient(between: Callable) -> torch.Tensor:
        optimizer.zero_grad()
        with loaded.policy.autocast():
            log_prob = prdp.step_log_prob(loaded.policy, trajectories, rows, rows % 5)
        between()
        (256 * log_prob).sum().backward()
        return gradient_of(unet)

    def fail() -> None:
        with pytest.raises((RuntimeError, TypeError, IndexError)):
            loaded.reference.unet(torch.zeros(2, 4, 8, 8), torch.zeros(3), None)

    gradient(lambda: None)
    optimizer.step()
    before, plain = score(loaded.policy), gradient(lambda: None)
    assert not torch.equal(before, pretrained.log_probs)
    for between in (lambda: score(loaded.reference), fail):
        assert torch.equal(gradient(between), plain)
        assert torch.equal(score(loaded.policy), before)
        assert torch.equal(score(loaded.reference), pretrained.log_probs)
        again = [p for p in unet.parameters() if p.requires_grad]
        assert [id(p) for p in again] == [id(p) for p in optimizer.param_groups[0]["params"]]


# ---- Speed and memory ----------------------------------------------------------------------------


def weighted_gradient(models: prdp.Models, zeros: int = 0) -> torch.Tensor:
    """Of random weights, of which some are 0."""
    weights = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights[torch.randperm(60, generator=torch.Generator().manual_seed(1))[:zeros]] = 0
    models.sd.unet.zero_grad()
    prdp.backward_trajectories(models.policy, draw(models), weights.view(12, 5))
    return gradient_of(models.sd.unet)


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": "on"}, {"compile": True}, {"compile": True, "lora_rank": 2}],
)
def test_memory_and_speed_flags_keep_gradient_and_bits(models, monkeypatch, changes):
    """The gradient to rounding. And an unchanged policy still reproduces its log-probs to the bit;
    a pass of the reference has it compiled anew no more than once."""
    graphs = []

    def backend(graph, inputs):  # the graphs, not their compilation
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = weighted_gradient(models(lora_rank=changes.get("lora_rank", 0)))
    loaded = models(**changes)
    tolerance = 1e-5 * plain.abs().max().item()
    torch.testing.assert_close(weighted_gradient(loaded), plain, rtol=1e-4, atol=tolerance)
    trajectories, compiled = draw(loaded), [len(graphs)]
    assert bool(graphs) == ("compile" in changes)
    for policy in (loaded.reference, loaded.policy) * 2:
        scores = prdp.score_trajectories(policy, trajectories)
        assert torch.equal(scores, trajectories.log_probs)
        compiled.append(len(graphs))
    weighted_gradient(loaded)
    assert len(graphs) == compiled[2] <= compiled[1] + 1


def test_compiled_updates_have_one_shape(models, monkeypatch):
    """Of 53 entries each microbatch is full; the gradient is the uncompiled one's. Shapes beyond
    Dynamo's limit would run uncompiled in silence: it is higher, and fails."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, forward, sizes = models(), prdp.run_unet, set()
    expected = weighted_gradient(plain, 7)

    def watched(policy, x_t, *rest):
        sizes.add(len(x_t))
        return forward(policy, x_t, *rest)

    monkeypatch.setattr(prdp, "run_unet", watched)
    compiled = models(compile=True)
    tolerance = 1e-5 * expected.abs().max().item()
    dynamo = torch._dynamo.config
    assert dynamo.fail_on_recompile_limit_hit and dynamo.recompile_limit >= 64
    ours = weighted_gradient(compiled, 7)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=tolerance)
    assert sizes == {6}


@pytest.mark.parametrize("flags", [[], ["--offline"], ["--lora-rank", 2]])
def test_offload_networks_are_back_wherever_they_run(cli, tmp_path, monkeypatch, flags):
    """A run whose idle networks hold NaN, but for the phases that move them back, is the run
    without --offload to the bit; and while gradients exist, all of them are idle."""
    flags = ["--reward", TOY_REWARD, *flags]
    assert cli(*flags, "--out", tmp_path / "plain")[0] == 0

    away, idle, learned = {}, torch.device("meta"), []  # a marker: nothing is moved there
    move, load, learn = torch.nn.Module.to, prdp.load_models, prdp.backward_trajectories

    def to(module, *where, **options):
        if idle not in where and not away:
            return move(module, *where, **options)
        for x in itertools.chain(module.parameters(), module.buffers()):
            if x.is_floating_point() and idle in where:
                assert x.data_ptr() not in away, "sent away twice"
                away[x.data_ptr()] = x.data.clone()
                x.data.fill_(math.nan)
            elif x.is_floating_point() and x.data_ptr() in away:
                x.data.copy_(away.pop(x.data_ptr()))
        return module

    def load_offloaded(*arguments):
        models = load(*arguments)
        models.sd.idle = idle
        models.reward.to(idle)
        for network in (models.sd.vae, models.sd.text_encoders, models.reference.unet):
            if hasattr(network, "to"):  # adapters have no reference of their own
                network.to(idle)
        learned.append(len(away))
        return models

    def learn_alone(policy, *arguments):
        learned.append(len(away))
        assert not any(x.data_ptr() in away for x in policy.unet.parameters())
        learn(policy, *arguments)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(prdp, "load_models", load_offloaded)
    monkeypatch.setattr(prdp, "backward_trajectories", learn_alone)
    code, _, errors = cli(*flags, "--out", tmp_path / "offloaded")
    assert code == 0, errors
    assert_same_run(tmp_path / "plain", tmp_path / "offloaded")
    assert len(learned) >= 5
    assert set(learned) == {len(away)}  # as loaded, and in each update
    assert len(away) > 100


@needs_gpu
def test_offload_on_a_gpu(cli, tmp_path):
    """The same values to the bit (of an epoch: later ones depend on cuDNN's gradients), in less GPU
    memory."""
    peaks, first = {}, {}
    for offload in ("off", "on"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        toy = ["--model", ROOT / "toy" / "sd", "--reward", TOY_REWARD, "--microbatch", 4]
        assert cli(*toy, "--offload", offload, "--out", tmp_path / offload)[0] == 0
        peaks[offload] = torch.cuda.max_memory_allocated()
        rows = (tmp_path / offload / "metrics.jsonl").read_text().splitlines()
        first[offload] = json.loads(rows[0])["reward_mean"]
    assert first["on"] == first["off"]
    assert peaks["on"] < peaks["off"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_cast_anew_after_an_update(models, dtype):
    """Inside of another autocast, as of a notebook or of `own_state`, PyTorch would keep the casts
    of the weights before it, and those that checkpointing makes in a backward pass."""
    expected = []
    outers = (contextlib.nullcontext(), torch.autocast("cpu"))
    for outer, checkpointing in itertools.product(outers, ("off", "on")):
        loaded = models(dtype=dtype, gradient_checkpointing=checkpointing)
        with outer, machine.own_state():
            trajectories = draw(loaded)
            prdp.backward_trajectories(
                loaded.policy, trajectories, torch.ones_like(trajectories.log_probs)
            )
            with torch.no_grad():
                for p in loaded.policy.unet.parameters():
                    p -= 1e-3 * p.grad.sign()
            expected.append(prdp.score_trajectories(loaded.policy, trajectories))
        assert (expected[-1] - trajectories.log_probs).abs().max() > 1e-3
        assert torch.equal(expected[-1], expected[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_texts_and_pictures_are_those_of_no_autocast_around_them(models, dtype):
    """A notebook's, around what a user does with `load_run`'s models."""
    sd = models(dtype=dtype).sd
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds, images = sd.encode(["a red star"]), sd.decode(latents, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sd.encode(["a red star"]), embeds)
        assert torch.equal(sd.decode(latents, 3), images)


def test_pictures_that_are_no_numbers_stop_the_run(models):
    """They would be black ones, with a finite reward. In 16 bit too the VAE decodes in float32: a
    decoder whose first layer is large overflows in half precision alone."""
    loaded = models(dtype="fp16")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = models(dtype="fp32").sd.decode(latents, 3)
    assert torch.equal(loaded.sd.decode(latents, 3), expected)
    loaded.sd.vae.decoder.conv_in.weight.data[:] = math.nan
    with pytest.raises(prdp.UserError, match="its vae draws pictures that are not finite"):
        loaded.sd.decode(latents, 3)
