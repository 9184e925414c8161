"""Model folders that are used or refused; the saved pipeline; adapters, offload, compilation."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import prdp
from conftest import PROMPTS, ROOT, SD14_SCHEDULER, assert_same_run, checkpoint, contents, draw
from conftest import edit_json, gradient_of, needs_gpu, only_sentence
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


def cut(part: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / WEIGHTS[part], 1000)


def to_fp16_variant(folder: Path) -> None:
    for name in WEIGHTS.values():
        (folder / name).rename((folder / name).with_suffix(".fp16.safetensors"))


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


MISSING = "1 weights are missing, misshapen or not finite"
CODE = "is damaged, or holds code beside weights (a .safetensors file cannot)"
NO_FOLDER = "no Stable Diffusion folder"
FOLDERS = {
    "unet lacks a weight": (change_weight("unet", drop), f"its unet: {MISSING} (conv_norm_out"),
    "vae lacks a weight": (change_weight("vae", drop), f"its vae: {MISSING} (decoder.conv_norm"),
    "text encoder lacks one": (change_weight("text_encoder", drop), f"its text_encoder: {MISSING}"),
    "nan in the unet": (change_weight("unet", spoil), f"its unet: {MISSING} (conv_norm_out"),
    "unet misshapen": (change_weight("unet", reshape), f"its unet: {MISSING} (conv_norm_out"),
    "text encoder misshapen": (
        change_weight("text_encoder", reshape),
        f"its text_encoder: {MISSING}",
    ),
    "unet cut short": (cut("unet"), "its unet: a file of weights is damaged or cut short"),
    "text encoder cut short": (
        cut("text_encoder"),
        "its text_encoder: a file of weights is damaged or cut short",
    ),
    "fp16 variant alone": (to_fp16_variant, "its unet: is there as its fp16 variant alone"),
    "code in the unet": (to_pickle("unet", x=Code()), f"its unet: {CODE}"),
    "code in the text encoder": (to_pickle("text_encoder", x=Code()), f"its text_encoder: {CODE}"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), f"{NO_FOLDER}: has no vae"),
    "empty index": (index("{}"), "a None; only Stable Diffusion 1.x and 2.x work"),
    "torn index": (index("{"), "It looks like the config file at"),
    "another pipeline": (
        index('{"_class_name": "StableDiffusionXLPipeline"}'),
        "a StableDiffusionXLPipeline; only Stable Diffusion 1.x and 2.x work",
    ),
    "no vocabulary": (
        lambda folder: [
            file.unlink()
            for file in (folder / "tokenizer").iterdir()
            if file.name != "tokenizer_config.json"
        ],
        "has no vocabulary here",
    ),
    "distilled": (config("unet", time_cond_proj_dim=256), "its unet has time_cond_proj_dim"),
    "of classes": (config("unet", num_class_embeds=10), "its unet has num_class_embeds"),
    "of other inputs": (config("unet", addition_embed_type="text"), "has addition_embed_type"),
    "of image prompts": (config("unet", encoder_hid_dim=8), "its unet has encoder_hid_dim"),
    "no size": (config("unet", sample_size=None), "its unet has no sample_size"),
    "flow matching": (
        config("scheduler", _class_name="FlowMatchEulerDiscreteScheduler"),
        "scheduler has _class_name 'FlowMatchEulerDiscreteScheduler': not supported",
    ),
    "EDM": (config("scheduler", _class_name="EDMEulerScheduler"), "'EDMEulerScheduler'"),
    "consistency": (config("scheduler", _class_name="CMStochasticIterativeScheduler"), "'CMSto"),
    "flow sigmas": (config("scheduler", use_flow_sigmas=True), "scheduler has use_flow_sigmas"),
    "another VAE": (
        config("vae", _class_name="AutoencoderTiny"),
        "its vae is an AutoencoderTiny, and not an AutoencoderKL",
    ),
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
    about = "the model's scheduler" if "scheduler has" in said else f"--model {folder}: "
    assert said.startswith(f"prdp.py: {about}")
    assert sentence in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sd"]  # no run, and no code was run


def test_what_is_no_model_folder_is_refused(finished, cli, tmp_path):
    said = only_sentence(cli("--model", finished, "--out", tmp_path / "other"))
    assert said == f"prdp.py: --model {finished}: is a run; its model is {finished / 'pipeline'}."
    file = tmp_path / "v1-5.safetensors"
    file.touch()
    assert "from_single_file" in only_sentence(cli("--model", file, "--out", tmp_path / "other"))
    said = only_sentence(cli("--model", "https://huggingface.co/a/b", "--out", tmp_path / "other"))
    assert "give the hub id" in said
    said = only_sentence(cli("--model", tmp_path / "gone", "--out", tmp_path / "other"))
    assert said == f"prdp.py: --model {tmp_path / 'gone'}: no such folder; say where it is now."


# ---- Folders that are used -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def full_sd(tmp_path_factory, tiny_sd) -> Path:
    """A folder as older diffusers write it: safety checker, feature extractor, vocab.json, merges,
    a licence. Its UNet predicts v through linear projections, as that of Stable Diffusion 2.1."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    settings = {**pipe.unet.config, "use_linear_projection": True}
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "projection_dim": 8}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    checker = CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("full_sd")
    StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=UNet2DConditionModel.from_config(settings),
        scheduler=pipe.scheduler,
        safety_checker=StableDiffusionSafetyChecker(checker),
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    ).save_pretrained(folder)
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    edit_json(folder / "tokenizer/tokenizer_config.json", model_max_length=None)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(ROOT / "toy/sd/tokenizer", folder / "tokenizer")
    (folder / "LICENSE.md").write_text("terms")
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)  # as a shared folder is
    return folder


def test_pipeline_has_the_other_parts_as_they_came(full_sd, cli, tmp_path):
    """With a card; a README that a user wrote there stays."""
    code, _, errors = cli("--model", full_sd, *ONE_EPOCH)
    assert code == 0, errors
    pipeline = tmp_path / "run" / "pipeline"
    then, now = contents(full_sd), contents(pipeline)
    learned = ("unet/", "scheduler/", "model_index.json")
    same = [name for name in then if not name.startswith(learned)]
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "LICENSE.md"} < set(same)
    assert {name.split("/")[0] for name in same} >= {"safety_checker", "feature_extractor"}
    assert {name: now.get(name) for name in same} == {name: then[name] for name in same}
    assert now[WEIGHTS["unet"]] != then[WEIGHTS["unet"]]
    assert b"incompressibility" in now["README.md"] and "before_after.png" in now
    assert json.loads(now["prdp.json"])["epoch"] == 1

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    assert pipe.safety_checker is not None and pipe.feature_extractor is not None
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    (pipeline / "README.md").write_text("mine")
    cli("--resume", tmp_path / "run", "--epochs", 1)
    again = contents(pipeline)
    assert again.pop("README.md") == b"mine" and now.pop("README.md")
    assert again.pop("prdp.json") and now.pop("prdp.json")
    assert again == now  # replaced by the same


def test_model_whose_files_vanish_is_saved_whole(full_sd, cli, tmp_path, monkeypatch):
    """As when a cache is cleaned while a run learns: what was loaded is saved."""
    folder = Path(shutil.copytree(full_sd, tmp_path / "sd"))
    train = prdp.train

    def vanish(*arguments):
        shutil.rmtree(folder)
        yield from train(*arguments)

    loaded = StableDiffusionPipeline.from_pretrained(folder)
    run = partial(prdp.run, train=vanish)
    flags = ["--preset", "toy", "--model", str(folder), "--reward", "incompressibility"]
    flags += ["--prompts-per-epoch", "2", "--images-per-prompt", "2", "--ddpm-steps", "2"]
    run(prdp.parse_args([*flags, *ONE_EPOCH, "--out", str(tmp_path / "run")]))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert weights_digest([pipe.vae, pipe.text_encoder]) == weights_digest(
        [loaded.vae, loaded.text_encoder]
    )
    assert pipe.tokenizer(PROMPTS).input_ids == loaded.tokenizer(PROMPTS).input_ids


def test_saved_scheduler_is_the_policys(cli, tiny_sd, tmp_path):
    """Whatever kind the model's was, what it left open, and what else it did."""
    model = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    names = ("beta_start", "beta_end", "beta_schedule")
    config = {name: SD14_SCHEDULER[name] for name in names}
    odd = {"_class_name": "EulerDiscreteScheduler", "thresholding": True, "use_karras_sigmas": True}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | odd))
    edit_json(model / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    (tmp_path / "p.txt").write_text("a $x_{$ red circle\n" + "red " * 30 + "\n")
    code, out, errors = cli("--model", model, "--prompts", tmp_path / "p.txt", *ONE_EPOCH)
    assert code == 0, errors
    assert "warning: 1 of 2 prompts exceed 16 tokens" in out
    scheduler = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").scheduler
    assert scheduler.config.thresholding is scheduler.config.clip_sample is False
    scheduler.set_timesteps(50)
    sigma = scheduler._get_variance(1, -19) ** 0.5
    assert sigma.item() == pytest.approx(prdp.ddpm_schedule(config, 50).sigma[-1].item(), rel=1e-4)


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
    said = only_sentence(cli("--model", run / "epochs" / "0001", "--out", tmp_path / "other"))
    assert said.endswith("epochs/0001/lora; docs/running.md shows how to merge it.")
    base.fuse_lora()
    base.unload_lora_weights()
    base.save_pretrained(tmp_path / "merged")
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "merged").unet.state_dict()
    for name, weight in merged.unet.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)


LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    "changes",
    [{"lora_rank": 2}, {"lora_rank": 2, "dtype": "bf16", "gradient_checkpointing": True}, {}],
)
def test_scoring_with_the_reference_is_scoring_with_the_pretrained_model(models, changes):
    """Anywhere: after updates, between a forward pass and its backward pass, if the network fails;
    and it leaves the policy as it was."""
    pretrained = draw(models(dtype=changes.get("dtype", "fp32")))
    loaded = models(**changes)
    trajectories = draw(loaded)
    assert torch.equal(trajectories.log_probs, pretrained.log_probs)
    optimizer = torch.optim.SGD([p for p in loaded.sd.unet.parameters() if p.requires_grad], lr=1.0)
    torch.nn.init.normal_(optimizer.param_groups[0]["params"][-1], std=0.1)  # a B, if adapters

    def score(policy: prdp.Policy) -> torch.Tensor:
        return prdp.score_trajectories(policy, trajectories)

    before = score(loaded.policy)
    assert not torch.equal(before, pretrained.log_probs)
    assert torch.equal(score(loaded.reference), pretrained.log_probs)
    assert torch.equal(score(loaded.policy), before)

    rows = torch.arange(6)
    log_prob = prdp.step_log_prob(loaded.policy, trajectories, rows, torch.full_like(rows, 2))
    score(loaded.reference)
    log_prob.sum().backward()
    gradient = gradient_of(loaded.sd.unet)
    loaded.sd.unet.zero_grad()
    log_prob = prdp.step_log_prob(loaded.policy, trajectories, rows, torch.full_like(rows, 2))
    log_prob.sum().backward()
    assert torch.equal(gradient_of(loaded.sd.unet), gradient)

    with pytest.raises((RuntimeError, TypeError, IndexError)):
        loaded.reference.unet(torch.zeros(2, 4, 8, 8), torch.zeros(3), encoder_hidden_states=None)
    assert torch.equal(score(loaded.policy), before)
    assert torch.equal(score(loaded.reference), pretrained.log_probs)


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
    [{"gradient_checkpointing": True}, {"compile": True}, {"compile": True, "lora_rank": 2}],
)
def test_memory_and_speed_flags_keep_gradient_and_bits(models, monkeypatch, changes):
    """The gradient to rounding. And an unchanged policy still reproduces its log-probs to the bit.
    Policy and reference share one graph if they share a network: another, of the same numbers, is
    compiled to other rounding in 16 bits."""
    graphs = []

    def backend(graph, inputs):  # the graphs, not their compilation
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = weighted_gradient(models(lora_rank=changes.get("lora_rank", 0)))
    loaded = models(**changes)
    tolerance = 1e-5 * plain.abs().max().item()
    torch.testing.assert_close(weighted_gradient(loaded), plain, rtol=1e-4, atol=tolerance)
    trajectories, compiled = draw(loaded), len(graphs)
    assert bool(compiled) == ("compile" in changes)
    for policy in (loaded.policy, loaded.reference):
        scores = prdp.score_trajectories(policy, trajectories)
        assert torch.equal(scores, trajectories.log_probs)
    assert len(graphs) == compiled or not changes.get("lora_rank")


def test_compiled_updates_have_one_shape(models, monkeypatch):
    """Of 53 entries each microbatch is full; the gradient is the uncompiled one's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, forward, sizes = models(), prdp.run_unet, set()
    expected = weighted_gradient(plain, 7)

    def watched(policy, x_t, *rest):
        sizes.add(len(x_t))
        return forward(policy, x_t, *rest)

    monkeypatch.setattr(prdp, "run_unet", watched)
    compiled = models(compile=True)
    tolerance = 1e-5 * expected.abs().max().item()
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
        networks = [models.sd.vae, models.sd.pipe.text_encoder, models.reward]
        if hasattr(models.reference.unet, "to"):
            networks.append(models.reference.unet)
        for network in networks:
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
