"""All that knows diffusers: loading Stable Diffusion, text and pictures, adapters, saving."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from support.cli import UserError, reading
from support.distributed import rank
from support.inputs import load_network, load_tokenizer, quiet_libraries
from support.machine import set_precision
from support.run_folder import read_json, writing

SAMPLERS = """DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete SASolver
    EulerAncestralDiscrete HeunDiscrete DEISMultistep DPMSolverMultistep DPMSolverSinglestep
    DPMSolverSDE UniPCMultistep KDPM2Discrete KDPM2AncestralDiscrete"""
SUPPORTED = dict(  # of such samplers only the noise schedule is read
    beta_schedule=("scaled_linear", "linear"), timestep_spacing=(None, "leading", "linspace"),
    prediction_type=("epsilon", "v_prediction"), steps_offset=(1,), use_flow_sigmas=(None, False),
    trained_betas=(None,), rescale_betas_zero_snr=(None, False), set_alpha_to_one=(False,),
    _class_name=(None, *(f"{name}Scheduler" for name in SAMPLERS.split())),
)  # fmt: skip
# What a config leaves open; betas it must name, for diffusers' own defaults are another chain's.
DEFAULTS = dict(num_train_timesteps=1000, beta_schedule=None, beta_start=None, beta_end=None,
                steps_offset=1, set_alpha_to_one=False, prediction_type="epsilon")  # fmt: skip
PARTS = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", text_encoder="CLIPTextModel")
PIPELINES = {f"StableDiffusion{kind}Pipeline": PARTS for kind in ("", "Img2Img")}
PIPELINES["StableDiffusionXLPipeline"] = PARTS | {"text_encoder_2": "CLIPTextModelWithProjection"}
# Inputs that a UNet may want beside a latent, a timestep and a text; SDXL's wants one of them.
OTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "addition_embed_type",
                "encoder_hid_dim", "encoder_hid_dim_type")  # fmt: skip

PATHS = ("model", "reward", "prompts", "pairs", "out", "resume")  # of the machine it was made on
CARD = """---
library_name: diffusers
{base}---
# {name}, finetuned by {program}

To epoch {epoch}, for the reward {rewards}; settings: prdp.json. Use the sampler it learned by:

    pipe = diffusers.DiffusionPipeline.from_pretrained(THIS_FOLDER)
    pipe(PROMPT, num_inference_steps={ddpm_steps}, guidance_scale={guidance_scale}, eta=1.0)
"""


def noise_settings(scheduler_config: dict, what: str = "the model") -> dict:
    """The noise schedule of a diffusers scheduler's config; UserError for another kind."""
    config = {**DEFAULTS, **scheduler_config}
    for name, values in SUPPORTED.items():
        found = config.get(name)
        if found not in values:
            raise UserError(f"{what}: its scheduler has {name} {found!r}: not supported.")
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if type(count) is not int or count < 1:
        raise UserError(f"{what}: its scheduler has num_train_timesteps {count!r}.")
    if not (isinstance(start, float) and isinstance(end, float) and 0 < start <= end < 1):
        raise UserError(f"{what}: its scheduler has beta_start {start}, beta_end {end}.")
    return {name: config[name] for name in DEFAULTS}


def read_configs(model: str) -> tuple[Path, dict[str, dict]]:
    """A pipeline's folder, fetched from the hub if it is an id, its config and those of its parts;
    UserError unless it is a Stable Diffusion that can be finetuned here."""
    quiet_libraries()
    from diffusers import DiffusionPipeline

    what, folder = f"model {model}", Path(model)
    if (folder / "pipeline").is_dir():
        raise UserError(f"{what}: is a run; its model is {folder / 'pipeline'}.")
    if not folder.is_dir() and (folder.is_absolute() or model.count("/") != 1):
        remedy = "make one of a file (docs/running.md), name a moved one by --model or --against"
        raise UserError(f"{what}: is no folder, and no hub id as a/b; {remedy}.")
    with reading(what if folder.is_dir() else f"{what}: no folder here, and as a hub id"):
        configs = {"pipeline": DiffusionPipeline.load_config(model)}
        kind = str(configs["pipeline"].get("_class_name"))
        if kind in PIPELINES and not folder.exists():
            folder = Path(DiffusionPipeline.download(model))
    if kind not in PIPELINES:
        raise UserError(f"{what}: a {kind}; only Stable Diffusion 1.x, 2.x and XL's base work.")

    parts = PIPELINES[kind]
    for name in (*parts, "scheduler"):
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        configs[name] = read_json(folder / name / file, f"{what}: its {name}/{file}")
    wanted = {"addition_embed_type": "text_time"} if "text_encoder_2" in parts else {}
    for name in OTHER_INPUTS:
        if (found := configs["unet"].get(name)) != wanted.get(name):
            raise UserError(f"{what}: its unet has {name} {found}, other inputs: not supported.")
    for name, kind in parts.items():
        if configs[name].get("_class_name", kind) != kind:
            raise UserError(f"{what}: its {name} is no {kind}: {configs[name]['_class_name']}.")

    # The parts must fit each other.
    unet, vae = configs["unet"], configs["vae"]
    channels = {latent_shape(unet)[0], unet.get("out_channels", 4), vae.get("latent_channels", 4)}
    width = sum(configs[name].get("hidden_size", 512) for name in parts if "text" in name)
    if unet.get("cross_attention_dim", 1280) != width:
        raise UserError(f"{what}: its unet's cross_attention_dim is not its texts' width, {width}.")
    if len(channels) > 1:
        raise UserError(f"{what}: in_channels, out_channels and latent_channels are {channels}.")
    if not all(type(side) is int and side > 0 for side in latent_shape(unet)):
        raise UserError(f"{what}: its unet's sample_size is {unet.get('sample_size')!r}.")
    if not isinstance(vae.get("scaling_factor", 1.0), (int, float)):
        raise UserError(f"{what}: its vae's scaling_factor is {vae['scaling_factor']!r}.")
    if vae.get("latents_mean") or vae.get("latents_std"):  # which XL's pipeline would apply
        raise UserError(f"{what}: its vae has latents_mean or latents_std: not supported.")
    noise_settings(configs["scheduler"], what)
    return folder, configs


def latent_shape(unet: dict) -> tuple[int, int, int]:
    """(C, H, W) of a UNet's config."""
    size = unet.get("sample_size")
    return (unet.get("in_channels", 4), *(size if isinstance(size, list) else (size, size)))


def grey_picture(model: str) -> Tensor:
    """Grey noise of the size that a model draws, (1, 3, H, W) uint8, to try a reward on."""
    _, configs = read_configs(model)
    zoom = 2 ** (len(configs["vae"].get("block_out_channels", [64])) - 1)
    _, height, width = latent_shape(configs["unet"])
    shape = (1, 3, zoom * height, zoom * width)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(120, 136, shape, generator=generator, dtype=torch.uint8)


class StableDiffusion:
    """A Stable Diffusion in float32. `unet` learns, text encoders and VAE are frozen: those are on
    `device` while they work, and else on `idle`. `dtype` is autocast's, None for float32. `pipe` is
    the diffusers pipeline around them; its DDIM scheduler with eta = 1 is the chain of prdp.py.
    """

    def __init__(self, config, device: torch.device) -> None:
        import diffusers
        import transformers

        self.device, self.dtype = torch.device(device), set_precision(config.dtype)
        self.idle = torch.device("cpu") if config.offload == "on" else self.device
        folder, configs = read_configs(config.model)
        self.noise_settings = noise_settings(configs["scheduler"])
        what = f"model {config.model}"
        parts, self.text_encoders = {"feature_extractor": None}, nn.ModuleList()
        for name, kind in PIPELINES[configs["pipeline"]["_class_name"]].items():
            kind = getattr(diffusers, kind, None) or getattr(transformers, kind)
            parts[name] = load_network(f"{what}: its {name}", kind, folder, subfolder=name)
            if "text" in name:
                self.text_encoders.append(parts[name])
                text, name = parts[name].config, name.replace("text_encoder", "tokenizer")
                parts[name] = load_tokenizer(what, folder, text.vocab_size, subfolder=name)
                places = (parts[name].model_max_length, text.max_position_embeddings)
                parts[name].model_max_length = min(places)
        parts["scheduler"] = diffusers.DDIMScheduler(
            **self.noise_settings, timestep_spacing="leading", clip_sample=False
        )
        self.unet, self.vae = parts["unet"], parts["vae"]
        self.latent_shape = latent_shape(configs["unet"])
        if "text_encoder_2" in parts:
            options = {n: x for n, x in configs["pipeline"].items() if n.startswith("force_zeros")}
            self.pipe = diffusers.StableDiffusionXLPipeline(**parts, **options)
            size = [side * self.pipe.vae_scale_factor for side in self.latent_shape[1:]]
            time_ids = torch.tensor([[*size, 0, 0, *size]])  # original size, crop, target size
            self.unet.register_buffer("time_ids", time_ids, persistent=False)
            self.unet.register_forward_pre_hook(unpack, with_kwargs=True)
        else:
            options = {"safety_checker": None, "requires_safety_checker": False}
            self.pipe = diffusers.StableDiffusionPipeline(**parts, **options)
        self.unet.to(device)  # in eval(): with dropout passes would differ
        self.vae.to(self.idle)
        self.text_encoders.to(self.idle)

    @staticmethod
    def weights_gigabytes(model: str) -> float:
        """The size of a model's UNet in float32; its weights are not read."""
        from diffusers import UNet2DConditionModel

        with reading(f"model {model}: its unet"), torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_configs(model)[1]["unet"])
        return 4e-9 * sum(p.numel() for p in unet.parameters())

    @contextlib.contextmanager
    def at_work(self, network: nn.Module) -> Iterator[None]:
        """Have a network on `device` within this block, without autocast, and on `idle` after."""
        network.to(self.device)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            network.to(self.idle)

    @contextlib.contextmanager
    def autocast(self, network: nn.Module | None = None) -> Iterator[None]:
        """Around passes: the number format; and a network that else is idle is there for them."""
        moves = self.at_work(network) if network is not None else contextlib.nullcontext()
        with moves, torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            # Inside of another autocast it stays, and checkpointing fills it in a backward pass.
            torch.clear_autocast_cache()
            yield
            torch.clear_autocast_cache()  # and its memory

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings (len(prompts), L, F), as the pipeline makes them; the last of L is
        SDXL's pooled one, filled up with zeros."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with self.at_work(self.text_encoders):
            embeds, _, *rest = self.pipe.encode_prompt(prompts, device=self.device, **options)
        if rest:
            pooled = nn.functional.pad(rest[0], (0, embeds.shape[2] - rest[0].shape[1]))
            embeds = torch.cat([embeds, pooled[:, None]], 1)
        return embeds

    def null_embeds(self) -> Tensor:
        """The unconditional branch's (L, F): of the empty prompt, or zeros where SDXL says so."""
        embeds = self.encode([""])[0]
        zeros = self.pipe.config.get("force_zeros_for_empty_prompt")
        return torch.zeros_like(embeds) if zeros else embeds

    @torch.no_grad()
    def decode(self, latents: Tensor, microbatch: int) -> Tensor:
        """x_0 (M, C, H, W) -> uint8 images, 8 times as high and wide in SD, rounded as in PNG. In
        float32: there are VAEs that overflow in half precision, and NaN would be black."""
        images = []
        fit = min(4, max(1, 2**14 // latents[0, 0].numel()))  # 4 of 512x512, at 0.8 GB each
        at_once = microbatch if self.device.type == "cpu" else min(microbatch, fit)
        with self.at_work(self.vae):
            for rows in latents.split(at_once):
                decoded = self.vae.decode(rows / self.vae.config.scaling_factor).sample
                if not decoded.isfinite().all():
                    raise UserError("--model: its vae draws pictures that are not finite.")
                images.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(images)

    def learner(self, config) -> Callable:
        """The UNet, which learns; with a rank, adapters of its attention layers alone: W + B A,
        where B begins at 0 (Hu et al. 2021)."""
        self.unet.requires_grad_(config.lora_rank == 0)
        if config.lora_rank:
            from peft import LoraConfig

            torch.manual_seed(config.seed)  # A begins at random, the same in every process
            layers = ["to_q", "to_k", "to_v", "to_out.0"]
            rank = {"r": config.lora_rank, "lora_alpha": config.lora_rank}
            start = {"init_lora_weights": "gaussian", "target_modules": layers}
            self.unet.add_adapter(LoraConfig(**rank, **start))
        if config.gradient_checkpointing == "on":
            self.unet.enable_gradient_checkpointing()
        return compiled(self.unet) if config.compile else self.unet

    def reference(self, learner: Callable) -> tuple[Callable, Callable]:
        """The pretrained network beside `learner`, and the context of its passes: a frozen copy of
        the UNet, on `idle` between them; of adapters the same network without them."""
        if hasattr(self.unet, "peft_config"):
            return functools.partial(self.without_adapters, learner), self.autocast
        network = copy.deepcopy(self.unet).requires_grad_(False).to(self.idle)
        if learner is not self.unet:
            network = compiled(network)
        elif self.dtype:  # what autocast would cast at each pass is cast for good: the same bits
            for layer in network.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    layer.to(self.dtype)
        return network, functools.partial(self.autocast, network)

    def without_adapters(self, learner: Callable, *inputs, **options):
        """A pass of `learner` without what adapters add."""
        self.unet.disable_adapters()
        try:
            return learner(*inputs, **options)
        finally:
            self.unet.enable_adapters()

    def save(self, run: Path, record: dict, epoch: int, merge: bool = True) -> None:
        """pipeline/, for diffusers' from_pretrained, with prdp.json and a model card. Of adapters
        lora/, for `load_lora_weights`, and with `merge` a pipeline/ whose UNet has them in it."""
        if rank() != 0:
            return
        if hasattr(self.unet, "peft_config"):
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            adapters = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
            with writing(run / "lora") as folder:
                self.pipe.save_lora_weights(folder, unet_lora_layers=adapters)
            if not merge:
                return
            self.unet.fuse_lora()
            self.unet.unload_lora()
        model, rewards = record["model"], " ".join(record["reward_terms"]) or "of people's choices"
        base = "" if os.path.isabs(model) else f"base_model: {json.dumps(model)}\n"
        named = {"epoch": epoch, "name": os.path.basename(model), "base": base, "rewards": rewards}
        with writing(run / "pipeline") as folder:
            self.pipe.save_pretrained(folder)
            for name, part in self.pipe.components.items():
                if "tokenizer" in name:  # vocab.json and merges.txt, which transformers 4 wants
                    part.backend_tokenizer.model.save(str(folder / name))
            for file in folder.glob("*/config.json"):
                config = read_json(file, str(file)) | {"_name_or_path": ""}
                file.write_text(json.dumps(config, indent=2), encoding="utf-8")
            shared = {name: x for name, x in record.items() if name not in PATHS}
            settings = json.dumps({"epoch": epoch, **shared}, indent=1)
            (folder / "prdp.json").write_text(settings, encoding="utf-8")
            card = CARD.format(**record | named)
            (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")


def unpack(unet: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
    """A hook before SDXL's UNet: the inputs it expects, of what `encode` packed, and sizes."""
    if "added_cond_kwargs" in options:  # in a pass of the pipeline's own
        return inputs, options
    texts = options["encoder_hidden_states"]
    width = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": texts[:, -1, :width], "time_ids": unet.time_ids.expand(len(texts), -1)}
    return inputs, {"encoder_hidden_states": texts[:, :-1], "added_cond_kwargs": added}


def compiled(network: nn.Module) -> nn.Module:
    """torch.compile with a graph a shape: no pass changes another's bits, nor does a process. More
    graphs than its limit would silently be run without it."""
    importlib.import_module("torch._inductor.config").deterministic = True
    dynamo = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True
    return torch.compile(network, dynamic=False)
