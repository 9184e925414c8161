"""All that knows diffusers: loading Stable Diffusion, text and pictures, adapters, saving."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from support.cli import InputError, reading
from support.distributed import rank
from support.inputs import load_network, load_tokenizer, quiet
from support.run_folder import read_json, writing

SD_SCHEDULER = dict(  # what a model's scheduler_config.json leaves open
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    steps_offset=1, set_alpha_to_one=False, prediction_type="epsilon",
)  # fmt: skip
SAMPLERS = """DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete
    DEISMultistep DPMSolverMultistep DPMSolverSinglestep UniPCMultistep KDPM2Discrete"""
SUPPORTED = dict(  # of such samplers only the noise schedule is read
    beta_schedule=("scaled_linear", "linear"), prediction_type=("epsilon", "v_prediction"),
    trained_betas=(None,), rescale_betas_zero_snr=(None, False), use_flow_sigmas=(None, False),
    _class_name=(None, *(f"{name}Scheduler" for name in SAMPLERS.split())),
)  # fmt: skip
# Pipelines of the same parts.
TEXT_TO_IMAGE = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# Inputs that a UNet may want beside a latent, a timestep and a text.
OTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "addition_embed_type")
OTHER_INPUTS += ("encoder_hid_dim", "encoder_hid_dim_type")


CARD = """---
base_model: {model}
---
# {name}, finetuned by {program}

To epoch {epoch}, for the reward {rewards}; settings in prdp.json. Before and after:

![](before_after.png)

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(THIS_FOLDER)
    pipe(PROMPT, num_inference_steps={ddpm_steps}, guidance_scale={guidance_scale}, eta=1.0)
"""


def noise_settings(scheduler_config: dict) -> dict:
    """The noise schedule of a diffusers scheduler's config; InputError for another kind."""
    config = {**SD_SCHEDULER, **scheduler_config}
    for name, values in SUPPORTED.items():
        if config.get(name) not in values:
            raise InputError(f"the model's scheduler has {name} {config[name]!r}: not supported.")
    return {name: config[name] for name in SD_SCHEDULER}


@quiet()
def find_folder(model: str) -> tuple[Path, dict]:
    """A pipeline's folder, fetched from the hub if it is an id, and its model_index.json;
    InputError unless it is Stable Diffusion's."""
    from diffusers import StableDiffusionPipeline

    what, folder = f"--model {model}", Path(model)
    if "://" in model:
        raise InputError(f"{what}: give the hub id, as CompVis/stable-diffusion-v1-4, no address.")
    for part in ("pipeline", "lora"):
        if (folder / part).is_dir() and not (folder / "model_index.json").is_file():
            merge = "; docs/running.md shows how to merge it" if part == "lora" else ""
            raise InputError(f"{what}: is a run; its model is {folder / part}{merge}.")
    if folder.is_file():
        raise InputError(f"{what}: no Stable Diffusion folder; see diffusers' from_single_file.")
    if folder.is_absolute() and not folder.exists():
        raise InputError(f"{what}: no such folder; say where it is now.")
    with reading(what):
        index = StableDiffusionPipeline.load_config(model)
        kind = index.get("_class_name")
        if kind in TEXT_TO_IMAGE and not folder.exists():
            folder = Path(StableDiffusionPipeline.download(model))
    if kind not in TEXT_TO_IMAGE:
        raise InputError(f"{what}: a {kind}; only Stable Diffusion 1.x and 2.x work.")
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / name).is_dir():
            raise InputError(f"{what}: no Stable Diffusion folder: has no {name}.")
    return folder, index


class StableDiffusion:
    """A Stable Diffusion 1.x or 2.x in float32. `unet` learns, text encoder and VAE are frozen:
    those are on `device` while they work, and else on `idle`.

    `pipe` is the diffusers pipeline around them; its scheduler is DDIM's, which with eta = 1 is the
    chain that prdp.py samples. `autocast` is what the VAE computes in, None its own float32."""

    @quiet()
    def __init__(
        self, model: str, device: torch.device, offload: bool, autocast: torch.dtype | None
    ) -> None:
        import diffusers
        import transformers

        self.device, self.autocast = device, autocast
        self.idle = torch.device("cpu") if offload else device
        self.folder, self.index = find_folder(model)
        self.configs, what = {}, f"--model {model}"
        for name in ("unet", "vae", "text_encoder", "scheduler"):
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            found = read_json(self.folder / name / file, f"{what}: its {name}/{file}")
            private = ("_name_or_path", "_diffusers_version", "transformers_version")
            self.configs[name] = {key: x for key, x in found.items() if key not in private}
        self.noise_settings = noise_settings(self.configs["scheduler"])
        for name in OTHER_INPUTS:
            if self.configs["unet"].get(name) is not None:
                raise InputError(f"{what}: its unet has {name}, another input: not supported.")

        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
        kinds["text_encoder"] = transformers.CLIPTextModel
        for name, kind in kinds.items():
            found = self.configs[name].get("_class_name", kind.__name__)
            if found != kind.__name__:
                raise InputError(f"{what}: its {name} is an {found}, and not an {kind.__name__}.")
        parts = {name: load_network(f"{what}: its {name}", kind, self.folder, subfolder=name)
                 for name, kind in kinds.items()}  # fmt: skip
        parts["tokenizer"] = load_tokenizer(what, self.folder, subfolder="tokenizer")
        places = parts["text_encoder"].config.max_position_embeddings
        parts["tokenizer"].model_max_length = min(parts["tokenizer"].model_max_length, places)
        parts["scheduler"] = diffusers.DDIMScheduler(
            **self.noise_settings, timestep_spacing="leading", clip_sample=False
        )
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        self.pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)

        self.unet, self.vae = parts["unet"], parts["vae"]
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        if size is None or channels != self.vae.config.latent_channels:
            raise InputError(f"{what}: its unet has no sample_size, or not its vae's channels.")
        sizes = size if isinstance(size, (list, tuple)) else (size, size)
        self.latent_shape = (channels, *sizes)
        self.unet.to(device)  # in eval(): with dropout passes would differ
        self.vae.to(self.idle)
        self.pipe.text_encoder.to(self.idle)

    @staticmethod
    def weights_gigabytes(model: str) -> float:
        """Of a model's UNet in float32; its weights are not read."""
        import diffusers

        with reading(f"--model {model}: its unet"), torch.device("meta"):
            config = read_json(find_folder(model)[0] / "unet" / "config.json", f"--model {model}")
            unet = diffusers.UNet2DConditionModel.from_config(config)
        return 4e-9 * sum(p.numel() for p in unet.parameters())

    @contextlib.contextmanager
    def in_use(self, network) -> Iterator[None]:
        """Have a network on `device` within this block, where what learns always is."""
        learns = getattr(network, "_orig_mod", network) is self.unet
        moves = self.idle != self.device and hasattr(network, "to") and not learns
        if moves:
            network.to(self.device)
        yield
        if moves:
            network.to(self.idle)

    @quiet()
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings (len(prompts), L, D), as the pipeline itself makes them."""
        with self.in_use(self.pipe.text_encoder):
            return self.pipe.encode_prompt(prompts, self.device, 1, False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor, microbatch: int) -> Tensor:
        """x_0 (M, C, H, W) -> uint8 images (M, 3, 8H, 8W), rounded once, as a PNG file would be."""
        images, kind = [], self.device.type
        at_once = microbatch if kind == "cpu" else min(microbatch, 4)  # of 0.7 GB each
        autocast = torch.autocast(kind, self.autocast, enabled=self.autocast is not None)
        with self.in_use(self.vae), autocast:
            for rows in latents.split(at_once):
                decoded = self.vae.decode(rows / self.vae.config.scaling_factor).sample.float()
                images.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(images)

    def unfreeze(self, lora_rank: int, seed: int, checkpointing: bool) -> None:
        """Let the UNet learn; with a rank, adapters of its attention layers alone: W + B A, where B
        begins at 0 (Hu et al. 2021)."""
        self.unet.requires_grad_(lora_rank == 0)
        if lora_rank:
            from peft import LoraConfig

            torch.manual_seed(seed)  # A begins at random, the same in every process
            layers = ["to_q", "to_k", "to_v", "to_out.0"]
            start = {"lora_alpha": lora_rank, "init_lora_weights": "gaussian"}
            self.unet.add_adapter(LoraConfig(r=lora_rank, target_modules=layers, **start))
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    def frozen(self, compile: bool) -> nn.Module:
        """A copy of the UNet, the reference, on `idle`. What autocast would cast at each pass is
        cast for good, which gives the same bits; not if compiled, in 16 bits."""
        network = copy.deepcopy(self.unet).requires_grad_(False).to(self.idle)
        for layer in network.modules() if self.autocast and not compile else ():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.to(self.autocast)
        return compiled(network) if compile else network

    def save(self, run: Path, record: dict, epoch: int, merge: bool = True) -> None:
        """pipeline/, for diffusers' from_pretrained: the learned UNet, the scheduler, and all other
        parts as they came, with a model card. Of adapters lora/, for `load_lora_weights`, and with
        `merge` a pipeline/ too, of whose UNet they become part."""
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
        index, files = dict(self.index), []
        with writing(run / "pipeline") as folder:
            for name, kind in self.index.items():
                if not isinstance(kind, list) or kind[0] is None:
                    continue
                part = getattr(self.pipe, name)
                if name not in ("unet", "scheduler") and (self.folder / name).is_dir():
                    files += (self.folder / name).rglob("*")
                elif part is None:  # its files have gone since
                    index[name] = [None, None]
                else:
                    part.save_pretrained(folder / name)
                    index[name] = [kind[0], type(part).__name__]
            files += [*self.folder.glob("LICEN*"), *self.folder.glob("NOTICE*")]
            for file in files:
                if file.is_file():
                    copy = folder / file.relative_to(self.folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)  # not its permissions: it may be read-only
            (folder / "model_index.json").write_text(json.dumps(index, indent=2))
            (folder / "prdp.json").write_text(json.dumps({"epoch": epoch, **record}, indent=1))
            card = run / "pipeline" / "README.md"
            text = card.read_text() if card.is_file() else ""
            if not text or "prdp.json" in text:  # else a user's own
                rewards = " ".join(record["reward"] or record["reward_terms"]) or "of no one's own"
                named = {"name": Path(record["model"]).name, "rewards": rewards}
                text = CARD.format(epoch=epoch, **named, **record)
            (folder / "README.md").write_text(text)
            if (run / "before_after.png").is_file():
                shutil.copyfile(run / "before_after.png", folder / "before_after.png")


def compiled(network: nn.Module) -> nn.Module:
    """torch.compile with a graph a shape: no pass changes another's bits, nor does a process."""
    importlib.import_module("torch._inductor.config").deterministic = True
    return torch.compile(network, dynamic=False)


class WithoutAdapters:
    """The pretrained network inside a network with adapters: each call runs the policy's own graph
    with B = 0, so that both give the same bits where B is 0.

    No nn.Module: moving it would move the policy. It writes through `.data`, so that a call between
    a forward pass and its backward pass does not disturb autograd."""

    def __init__(self, network: Callable, unet: nn.Module) -> None:
        self.network = network  # `unet`, or what torch.compile made of it
        self.parameters = [p for name, p in unet.named_parameters() if "lora_B" in name]

    def __call__(self, *inputs, **options):
        adapters = [p.data for p in self.parameters]
        learned = [b.clone() for b in adapters]
        torch._foreach_zero_(adapters)
        torch.clear_autocast_cache()  # it holds casts of the weights of before
        try:
            return self.network(*inputs, **options)
        finally:
            torch._foreach_copy_(adapters, learned)
            torch.clear_autocast_cache()
