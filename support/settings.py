"""The settings that any such program has, of its folder and its machine; settings from flags."""

import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from support import run_folder
from support.cli import InputError, Parser, command, flag, option
from support.distributed import end_processes, processes, say, start_processes

ROOT = Path(__file__).resolve().parents[1]
UNBOUNDED = ("clip_range", "max_grad_norm")  # inf: neither clips
LEAST = dict.fromkeys(("seed", "weight_decay", "microbatch", "lora_rank", "keep_every"), 0)
LEAST["guidance_scale"] = 1  # no guidance; below it diffusers' pipelines use none either


@dataclasses.dataclass
class RunSettings:
    """What goes into a run, where it goes, and how it uses the machine; a subclass has the rest."""

    program: ClassVar[str]  # its command, from the folder of the project
    presets: ClassVar[dict[str, dict]]  # name -> settings that differ from the defaults
    unused: ClassVar[tuple[str, ...]] = ()  # fields of a base class that mean nothing here
    least: ClassVar[dict[str, int]] = {}  # a field's smallest value, where that is not above 0
    keeps_trajectories: ClassVar[bool] = True  # all of an epoch's, until it has ended
    resolve_reward: ClassVar[Callable]  # the same words, with absolute paths

    model: str = flag("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1 or 2, hub id or folder",
                      group="run")  # fmt: skip
    reward: tuple = flag(("hpsv2",), "what to maximise, see rewards.py")
    prompts: tuple = flag((f"{ROOT}/prompts/animals.txt",), "files")
    seed: int = flag(0, "of the prompts drawn and of the noise")
    out: str = flag("", "run folder, new or empty (default: one in runs/)")
    resume: str = flag("", "run folder to go on with, under its own settings", metavar="RUN")
    save_every: int = flag(1, "epochs between checkpoints")
    keep_every: int = flag(0, "epochs between models that are kept, in epochs/; 0: none")
    sample_every: int = flag(10, "epochs between sample grids")
    log_to: str = flag("none", "also send metrics there", "none", "tensorboard", "wandb")

    microbatch: int = flag(0, "images per network pass; 0: what fits, 8 on a CPU", group="machine")
    dtype: str = flag("auto", "of network passes", "auto", "fp32", "tf32", "bf16", "fp16")
    lora_rank: int = flag(0, "train adapters of the attention layers alone; 0: the full UNet")
    gradient_checkpointing: str = flag("auto", "recompute activations; auto: if memory is short",
                                       "auto", "on", "off", nargs="?", const="on")  # fmt: skip
    offload: str = flag(
        "auto", "idle networks on the CPU; auto: if memory is short", "auto", "on", "off"
    )
    compile: bool = flag(False, "torch.compile the UNet's passes; minutes of start-up")

    def check(self) -> None:
        """InputError for settings that do not go together."""

    def resolved(self, reward: object = None, prompts: object = None):
        """The settings as they act: the number format decided, paths absolute; what memory decides,
        support/memory.py does. InputError for settings that cannot run. A caller's reward and
        prompts stand in for those named here."""
        self.check()
        acting = {"out": absolute(self.resume or self.out or "runs/run")}
        words = self.reward if reward is None else reward
        if reward is None and callable(words):
            raise InputError("a function as reward is given so: run(config, reward=FUNCTION).")
        acting["reward"] = () if callable(words) else self.resolve_reward(words)
        files = (self.prompts,) if isinstance(self.prompts, str) else self.prompts
        acting["prompts"] = () if prompts is not None else tuple(map(absolute, files))
        if Path(self.model).expanduser().exists():
            acting["model"] = absolute(self.model)
        if self.dtype == "auto":
            acting["dtype"] = "fp32"
            if torch.cuda.is_available():  # with K = 1 nothing is clipped, and noise matters less
                coarse = self.updates_per_epoch == 1 and torch.cuda.is_bf16_supported()
                acting["dtype"] = "bf16" if coarse else "fp16"
        self.check_numbers()
        if self.log_to != "none" and importlib.util.find_spec(self.log_to) is None:
            raise InputError(f"--log-to {self.log_to}: not installed; pip install {self.log_to}.")
        return dataclasses.replace(self, **acting)

    def check_numbers(self) -> None:
        least = LEAST | self.least
        for name, value in vars(self).items():
            if type(value) not in (int, float):
                continue
            if not value >= least.get(name, 0) or (value == 0 and name not in least):
                bound = f"at least {least[name]}" if name in least else "above 0"
                raise InputError(f"{option(name)} {value}: must be {bound}.")
            if value >= 2**40 and name not in UNBOUNDED:
                raise InputError(f"{option(name)} {value}: too large.")
        if self.prompts_per_epoch % processes():
            raise InputError(f"--prompts-per-epoch: must be a multiple of {processes()} processes.")


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def set_precision(dtype: str) -> torch.dtype | None:
    """Let this process's GPU round as --dtype says; what autocast is to use, None for float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)


def parse_settings(kind: type[RunSettings], argv: list[str]) -> RunSettings:
    """A command line over the preset; with --resume, over the settings of the run."""
    about = (sys.modules[kind.__module__].__doc__ or "").split("\n\nPaper ")[0]
    parser = Parser(description=about)
    choices = {"choices": kind.presets, "help": "settings to begin with (default: small)"}
    parser.add_argument("--preset", **choices)
    fields = [field for field in dataclasses.fields(kind) if field.name not in kind.unused]
    parser.add_fields(fields, kind.presets["small"])
    given = vars(parser.parse_args(argv))
    start_processes()

    preset = given.pop("preset")
    for name in given.keys() & {"model", "prompts", "out", "resume"}:
        if "" in (given[name], *given[name]):
            raise InputError(f"{option(name)}: is empty.")
    if "resume" not in given:
        names = [preset or "small", *Path(kind.program).with_suffix("").parts[1:]]
        settings = {"out": f"runs/{'-'.join(names)}"} | kind.presets[names[0]]
        return kind(**settings | given).resolved()
    run = Path(given["resume"]).expanduser()
    if preset or "out" in given:
        raise InputError(f"--resume {run}: not with --preset or --out; the run has its own.")
    saved = kind(**run_folder.read_settings(run, kind))
    config = dataclasses.replace(saved, **given).resolved()
    for name in given.keys() - run_folder.MAY_DIFFER:
        if getattr(config, name) != getattr(saved, name):
            began = f"the run began with {getattr(saved, name)}"
            raise InputError(f"{option(name)} {given[name]}: {began}.")
    return config


def run_command(kind: type[RunSettings], run: Callable, argv: list[str] | None = None) -> None:
    """A program's `main`: its command line, and what it does with it."""
    with command(kind.program):
        config = parse_settings(kind, sys.argv[1:] if argv is None else argv)
        try:
            run(config)
        except KeyboardInterrupt:
            if Path(config.out, "config.json").exists():
                again = f"python {kind.program} --resume {shlex.quote(config.out)}"
                say(f"stopped; go on with: {again}")
            raise
        end_processes()
