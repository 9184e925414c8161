"""What the tests share: one thread, no GPU unless asked for, a tiny Stable Diffusion, commands."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # `pytest -m gpu` is for one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch import Tensor

# Without a GPU Triton's interpreter runs the kernels. It is chosen where they are decorated.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

import prdp
from support.machine import set_precision

ROOT = Path(__file__).resolve().parent
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
    set_precision("fp32")


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


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_sd, tmp_path_factory) -> str:
    """An SDXL folder with random weights, and the VAE and tokenizer of `tiny_sd`; where the real
    model_index.json says that the empty prompt is zeros, this one leaves it open."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    base = StableDiffusionPipeline.from_pretrained(tiny_sd)
    text = {**base.text_encoder.config.to_dict(), "num_hidden_layers": 2}
    other = {**text, "hidden_size": 24, "projection_dim": 12, "hidden_act": "gelu"}
    conditions = dict(addition_embed_type="text_time", addition_time_embed_dim=4,
                      projection_class_embeddings_input_dim=12 + 6 * 4)  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sdxl")
    StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**other)),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=UNet2DConditionModel(**{**base.unet.config, "cross_attention_dim": 40, **conditions}),
        scheduler=EulerDiscreteScheduler.from_config(
            {**SD14_SCHEDULER, "timestep_spacing": "leading"}
        ),
    ).save_pretrained(folder)
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=None)
    return str(folder)


def tiny_config(tiny_sd: str, **changes) -> prdp.Config:
    """3 prompts x 4 images x 5 steps, in microbatches of 6."""
    settings = {
        "model": tiny_sd,
        "reward": ("incompressibility",),
        "prompts_per_epoch": 3,
        "images_per_prompt": 4,
        "ddpm_steps": 5,
        "microbatch": 6,
        "clip_range": 1e-4,
        "dtype": "fp32",
    }
    return prdp.Config(**{**settings, **changes})


@pytest.fixture
def models(tiny_sd) -> Callable[..., prdp.Models]:
    """models(**changes): what `tiny_config` with these changes loads, on the CPU."""
    return lambda **changes: prdp.load_models(tiny_config(tiny_sd, **changes), CPU)


def call(main: Callable, arguments: list, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command's `main`, in this process."""
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def override(flags: list, others: Sequence) -> list:
    """Flags of one value each, but those that `others` have too, and these."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in others for word in pair] + [*others]


def small_run(tiny_sd: str, *others: object) -> list:
    """Flags of two epochs of 2 prompts x 2 images of the tiny Stable Diffusion, and others."""
    flags = ["--preset", "toy", "--model", tiny_sd, "--reward", "incompressibility"]
    flags += ["--epochs", "2", "--updates-per-epoch", "2", "--prompts-per-epoch", "2"]
    flags += ["--images-per-prompt", "2", "--microbatch", "2", "--ddpm-steps", "3", "--seed", "3"]
    return override(flags, others)


@pytest.fixture
def cli(tiny_sd, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """cli(*flags): exit code, stdout and stderr of `python prdp.py FLAGS`, in this process.

    `small_run` into tmp_path / "run", but for what `flags` say otherwise. To --resume nothing is
    added.
    """

    def run(*flags: object) -> tuple[int, str, str]:
        if "--resume" not in flags:
            flags = override([*small_run(tiny_sd), "--out", tmp_path / "run"], flags)
        return call(prdp.main, flags, capsys)

    return run


@pytest.fixture
def finished(cli, tmp_path) -> Path:
    """A run of one epoch."""
    assert cli("--epochs", 1)[0] == 0
    return tmp_path / "run"


def only_sentence(result: tuple[int, str, str]) -> str:
    """stderr of a command that was refused: one line, and nothing but it."""
    code, _, errors = result
    assert code == 2, errors
    assert errors.count("\n") == 1 and "Traceback" not in errors, errors
    return errors.strip()


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def edit_json(path: Path, **changes) -> None:
    """Set some fields; None takes them away."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
    """A Python script of ours in processes of its own, without a GPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **hidden},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def script(*arguments: object, processes: int = 1, timeout: float = 300) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr; all processes are ended where it takes too long."""
    with start(*arguments, processes=processes) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its own
            raise
    return process.returncode, out, errors


IN_TURN = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
from support import distributed, settings
settings.end_processes = lambda: None  # they are one group to the end
for module, flags in json.loads(sys.argv[2]):
    importlib.import_module(module).main(flags)
distributed.end_processes()
"""


def two_processes(runs: list[tuple[str, list]]) -> str:
    """stdout of two processes that do these runs, (module, flags), one after another."""
    runs = [(module, [str(flag) for flag in flags]) for module, flags in runs]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(IN_TURN)
        file.flush()
        code, out, errors = script(file.name, ROOT, json.dumps(runs), processes=2)
    assert code == 0, errors
    return out


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint" / "state.pt", map_location="cpu", weights_only=True)


def metrics_of(run: Path) -> list[dict]:
    """Without what depends on the clock."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    clock = ("seconds", "images_per", "peak")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics and weights, to the bit."""
    assert metrics_of(a) == metrics_of(b)
    ours, theirs = checkpoint(a)["unet"], checkpoint(b)["unet"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def draw(models: prdp.Models) -> prdp.Trajectories:
    """4 trajectories for each of the 3 PROMPTS, with the noise of seed 0, epoch 1."""
    generators = prdp.image_generators(0, 1, range(3), 4)
    return prdp.sample_prompts(models, models.policy, PROMPTS, generators)


def gradient_of(unet: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


def random_inputs(seed: int, *lead: int, images: int = 5, steps: int = 7) -> tuple[Tensor, ...]:
    """Arguments of a loss: log_probs, those of theta_old and of the reference, and rewards."""
    g = torch.Generator().manual_seed(seed)
    shape = (3, *lead, images, steps)
    log_probs = 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
    return *log_probs, torch.randn(*lead, images, generator=g, dtype=torch.float64)
