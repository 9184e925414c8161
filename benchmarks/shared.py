"""What the commands here share: tables whose cells may fail, the clock, what runs where."""

import gc
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that they run from any folder

import prdp
from support.machine import load_kernels

TOY = prdp.ROOT / "toy"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
VARIABLES = ("TORCHINDUCTOR_", "TORCH_CUDNN_", "PYTORCH_")  # of the environment, that change speed

# SD v1.4's
UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                 beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
                 prediction_type="epsilon")  # fmt: skip

show = partial(print, file=sys.stdout, flush=True)  # what a run prints goes to stderr


def table(title: str, *columns: str) -> Callable:
    """Print a heading; the function that prints a row under it, filled up with empty cells."""

    def row(*cells) -> None:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        show("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")

    show(f"\n## {title}\n")
    row(*columns)
    row(*["---"] * len(columns))
    return row


class Skipped(Exception):
    """Says what there is too little of."""


def require(needed: float, there: float, unit: str) -> None:
    """Skipped where there is less than the estimate of what is needed."""
    if there < needed:
        raise Skipped(f"takes about {needed:.3g} {unit}, and there are {max(there, 0):.3g}")


def require_minutes(needed: float, end: float) -> None:
    """end: on the clock of `time.perf_counter`."""
    require(needed, (end - time.perf_counter()) / 60, "minutes")


def attempt(call: Callable, *args) -> Iterable:
    """The cells that `call` returns, or one that says why there are none: a failure costs no other
    cell."""
    try:
        return call(*args) or ()
    except Skipped as error:
        return (f"skipped: {error}",)
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:80].replace("|", "/")
        failure = f"failed: {type(error).__name__}: {reason}"
    free_memory()  # here, where the error no longer holds its frames and their tensors
    return (failure,)


def free_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def sd_v1_4():
    """A pipeline of its size and of random weights, with the toy's tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    width = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    kinds = {f"{way}_block_types": (f"{way.title()}{coder}Block2D",) * 4
             for way, coder in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_config(UNET),
        vae=diffusers.AutoencoderKL(**width, **kinds),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, num_attention_heads=12)),
        tokenizer=CLIPTokenizer.from_pretrained(TOY / "sd" / "tokenizer", model_max_length=77),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    """The same of SDXL's base."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with_texts, without = "CrossAttn{}Block2D", "{}Block2D"
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=[kind.format("Down") for kind in (without, with_texts, with_texts)],
        up_block_types=[kind.format("Up") for kind in (with_texts, with_texts, without)],
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    base = sd_v1_4()
    text = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32)
    text |= dict(num_attention_heads=20, projection_dim=1280, hidden_act="gelu")
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        scheduler=base.scheduler,
    )


def interrupt(*_) -> None:
    """Ctrl-C, once: `timeout` may send it twice, and temporary folders must still be removed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def print_tables(
    script: str, tables: dict[str, Callable[[float], object]], minutes: float = math.inf
) -> None:
    """Say what runs where, then make each table, which is told when to end."""
    signal.signal(signal.SIGINT, interrupt)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
    cudnn = torch.backends.cudnn.version()  # which attention there is depends on it
    kernels = load_kernels()[1]
    triton = getattr(sys.modules.get("triton"), "__version__", None)
    show(f"# {device}\n")
    show(f"torch {torch.__version__}, cuDNN {cudnn}, triton {triton}; log-probs: {kernels}\n")
    given = [f"{name}={x}" for name, x in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    show(f"`{' '.join([*given, 'python', script, *sys.argv[1:]])}`")
    for name, make in tables.items():
        started = time.perf_counter()
        with redirect_stdout(sys.stderr):
            for failure in attempt(make, started + 60 * minutes):
                show(f"\n{name}: {failure}")
        free_memory()
        show(f"\n{name}: {time.perf_counter() - started:.0f} seconds")
