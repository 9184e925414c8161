"""What the tests share: one thread, a tiny Stable Diffusion, and the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Triton's interpreter runs the kernels on the CPU. It is chosen where they are decorated, so before
# kernels is imported; the public functions go on running the eager references on CPU tensors, but
# for tests that use the fixture `fused` of test_kernels.py.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

import prdp

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SD14_SCHEDULER = {  # scheduler_config.json of Stable Diffusion v1.4
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
PROMPTS = [
    "a red circle on a blue background",
    "a green star on a white background",
    "a black ring on a red background",
]


def needs_gpu(test: Callable) -> Callable:
    skips = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skips(test))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as torchrun does: sums, and so a run's bits, depend on the number


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> str:
    """A Stable Diffusion folder with random weights: 16x16 pictures from 4x8x8 latents."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    folder = tmp_path_factory.mktemp("sd")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SD14_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def tiny_config(tiny_sd: str, **changes) -> prdp.Config:
    """3 prompts x 4 images x 5 steps, in microbatches of 6."""
    settings = {
        "model": tiny_sd,
        "reward": "incompressibility",
        "prompts_per_epoch": 3,
        "images_per_prompt": 4,
        "ddpm_steps": 5,
        "microbatch": 6,
        "clip_range": 1e-4,
    }
    return prdp.Config(**{**settings, **changes})


@pytest.fixture
def models(tiny_sd) -> Callable[..., prdp.Models]:
    """models(**changes): what `tiny_config` with these changes loads, on the CPU."""
    return lambda **changes: prdp.load_models(tiny_config(tiny_sd, **changes), CPU)


@pytest.fixture
def cli(tiny_sd, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """cli(*flags): exit code, stdout and stderr of `python prdp.py FLAGS`, in this process.

    Two epochs of 2 prompts x 2 images of the tiny Stable Diffusion, into tmp_path / "run", but for
    what `flags` say otherwise: of a flag given twice the last counts. To --resume nothing is added.
    """
    small = ["--preset", "toy", "--model", tiny_sd, "--reward", "incompressibility"]
    small += ["--epochs", "2", "--updates-per-epoch", "2", "--prompts-per-epoch", "2"]
    small += ["--images-per-prompt", "2", "--microbatch", "2", "--ddpm-steps", "3", "--seed", "3"]
    small += ["--out", str(tmp_path / "run")]

    def run(*flags: object) -> tuple[int, str, str]:
        arguments = [str(flag) for flag in flags]
        if "--resume" not in arguments:
            arguments = small + arguments
        capsys.readouterr()
        code = 0
        try:
            prdp.main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
