"""The settings that any such program has: its folder, its machine; and settings from flags."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import ClassVar

import torch

from support import run_folder
from support.cli import InputError, Parser, flag, option
from support.distributed import on_rank_0, processes, start_processes

UNBOUNDED = ("clip_range", "max_grad_norm")  # inf: neither clips
MAY_BE_0 = ("seed", "weight_decay", "microbatch", "lora_rank")


@dataclasses.dataclass
class RunSettings:
    """Where a run goes and how it uses the machine. What it computes is a subclass's."""

    program: ClassVar[str]  # its command, from the folder of the project
    presets: ClassVar[dict[str, dict]]  # name -> settings that differ from the defaults
    unused: ClassVar[tuple[str, ...]] = ()  # fields of a base class that mean nothing here

    out: str = flag("", "run folder, new or empty (default: runs/PRESET)", group="run")
    resume: str = flag("", "run folder to go on with, under its own settings", metavar="RUN")
    save_every: int = flag(1, "epochs between checkpoints")
    sample_every: int = flag(10, "epochs between sample grids")
    log_to: str = flag("none", "also send metrics there", "none", "tensorboard", "wandb")

    microbatch: int = flag(0, "images per network pass; 0: 8, or 16 on 120 GB", group="machine")
    dtype: str = flag("auto", "of network passes", "auto", "fp32", "tf32", "bf16", "fp16")
    lora_rank: int = flag(0, "train adapters of the attention layers alone; 0: the full UNet")
    gradient_checkpointing: bool = flag(False, "recompute activations, to save memory")
    offload: str = flag("auto", "idle networks on the CPU; auto: if < 40 GB", "auto", "on", "off")
    compile: bool = flag(False, "torch.compile the UNet's passes; minutes of start-up")

    def resolved(self) -> RunSettings:
        """The settings as they act: "auto" decided for this machine, paths absolute. InputError for
        settings that cannot run."""
        memory = gpu_memory()
        acting = {"out": str(Path(self.resume or self.out or "runs/run").absolute())}
        if self.resume:
            acting["resume"] = acting["out"]
        if self.dtype == "auto":
            on_gpu = "bf16" if self.updates_per_epoch == 1 else "tf32"
            acting["dtype"] = on_gpu if memory else "fp32"
        if self.offload == "auto":
            acting["offload"] = "on" if 0 < memory < 40e9 else "off"
        if self.microbatch == 0:
            acting["microbatch"] = 16 if memory >= 120e9 else 8
        config = dataclasses.replace(self, **acting)
        config.check_numbers()
        if config.log_to != "none" and importlib.util.find_spec(config.log_to) is None:
            remedy = f"not installed; pip install {config.log_to}"
            raise InputError(f"--log-to {config.log_to}: {remedy}.")
        return config

    def check_numbers(self) -> None:
        for name, value in vars(self).items():
            if type(value) not in (int, float):
                continue
            if not (value > 0 or (value == 0 and name in MAY_BE_0)):
                raise InputError(f"{option(name)} {value}: too small.")
            if value >= 2**40 and name not in UNBOUNDED:
                raise InputError(f"{option(name)} {value}: too large.")


def gpu_memory() -> float:
    """Bytes of this process's GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def set_precision(dtype: str) -> torch.dtype | None:
    """Let this process's GPU round as --dtype says; what autocast is to use, None for float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)


def parse_settings(kind: type[RunSettings], about: str, argv: list[str]) -> RunSettings:
    """A command line over the preset; with --resume, over the settings of the run."""
    presets = [
        f"  {name}: {' '.join(f'{k}={v}' for k, v in settings.items())}"
        for name, settings in kind.presets.items()
    ]
    parser = Parser(description=about, epilog="\n".join(["presets:", *presets]))
    options = {"choices": kind.presets, "help": "settings to begin with (default: small)"}
    parser.add_argument("--preset", **options)
    parser.add_fields(f for f in dataclasses.fields(kind) if f.name not in kind.unused)
    given = vars(parser.parse_args(argv))
    start_processes()

    preset = given.pop("preset")
    if "resume" not in given:
        settings = {"out": f"runs/{preset or 'small'}"} | kind.presets[preset or "small"]
        return kind(**settings | given).resolved()
    run = Path(given["resume"])
    if preset or "out" in given:
        raise InputError(f"--resume {run}: not with --preset or --out; the run has its own.")
    saved = kind(**on_rank_0(lambda: run_folder.read_settings(run, kind)))
    config = dataclasses.replace(saved, **given).resolved()
    for name in given.keys() - run_folder.MAY_DIFFER:
        if getattr(config, name) != getattr(saved, name):
            began = f"the run began with {getattr(saved, name)}"
            raise InputError(f"{option(name)} {given[name]}: {began}.")
    return config
