"""Settings of a program: from flags, a preset, a run to go on with; checked, made absolute."""

import dataclasses
import importlib.util
import numbers
import os
from collections.abc import Callable
from pathlib import Path

import torch

from support.cli import Parser, UserError, command, option, reading, resuming
from support.distributed import end_processes, print0, processes, start_processes
from support.run_folder import read_json, require_same

ROOT = Path(__file__).resolve().parents[1]


def absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def model_path(model: str | Path) -> str:
    """A model's folder as an absolute path, or its hub id."""
    return absolute(model) if Path(model).expanduser().exists() else str(model)


def prompt_paths(files: str | Path | tuple) -> tuple[str, ...]:
    return tuple(map(absolute, (files,) if isinstance(files, (str, Path)) else files))


def resolve(config, reward: object = None, prompts: object = None):
    """The settings as they act: numbers checked, paths absolute, the number format decided; what
    memory decides, support/machine.py does. A caller's reward and prompts stand in for those named
    here. UserError for settings that cannot run."""
    acting = {}
    for field in dataclasses.fields(config):
        name, value = option(field.name), getattr(config, field.name)
        choices = field.metadata.get("choices")
        if type(field.default) is bool:
            choices = (False, True)
            acting[field.name] = bool(value)
        if choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise UserError(f"{name} {value!r}: choose from {known}.")
        if type(field.default) in (int, float):
            if not isinstance(value, numbers.Real):
                raise UserError(f"{name} {value!r}: must be a number.")
            unlimited = field.name in ("clip_range", "max_grad_norm") or value == field.default
            if value >= 2**40 and not unlimited:
                raise UserError(f"{name} {value}: too large.")
            least = field.metadata.get("least")
            bound = "above 0" if least is None else f"at least {least}"
            if not (value > 0 if least is None else value >= least):
                raise UserError(f"{name} {value}: must be {bound}.")
            acting[field.name] = type(field.default)(value)
            if acting[field.name] != value:
                raise UserError(f"{name} {value}: must be a whole number.")
        if "resolve" in field.metadata:
            acting[field.name] = field.metadata["resolve"](value)
        elif type(field.default) is tuple:
            acting[field.name] = tuple(value)
    config.check()
    if config.prompts_per_epoch % processes():
        raise UserError(f"--prompts-per-epoch: must be a multiple of {processes()} processes.")
    acting["resume"] = str(config.resume)
    acting["out"] = absolute(config.resume or config.out or "runs/run")
    with reading(f"--out {acting['out']}"):
        acting["out"].encode()  # tokenizers can write to no other path
    if config.dtype == "auto":
        acting["dtype"] = "fp32"
        if torch.cuda.is_available():  # with K = 1 nothing is clipped, and noise matters less
            coarse = config.updates_per_epoch == 1 and torch.cuda.is_bf16_supported(False)
            acting["dtype"] = "bf16" if coarse else "fp16"
    if config.log_to != "none" and importlib.util.find_spec(config.log_to) is None:
        raise UserError(f"--log-to {config.log_to}: not installed; pip install {config.log_to}.")
    if reward is not None:
        acting["reward"] = ()
    if prompts is not None:
        acting["prompts"] = ()
    return dataclasses.replace(config, **acting)


def parse_settings(kind: type, presets: dict, about: str | None, argv: list[str] | None):
    """A command line over the preset; with --resume, over the settings of the run."""
    parser = Parser(description=(about or "").split("\n\nPaper ")[0])
    parser.add_argument("--preset", choices=presets, help="settings to begin with (default: small)")
    parser.add_fields(dataclasses.fields(kind), presets["small"])
    given = vars(parser.parse_args(argv))
    start_processes()

    preset = given.pop("preset")
    for name in given.keys() & {"model", "prompts", "out", "resume"}:
        if "" in (given[name], *given[name]):
            raise UserError(f"{option(name)}: is empty.")
    if "resume" not in given:
        names = [preset or "small", *Path(kind.program).with_suffix("").parts[1:]]
        settings = {"out": f"runs/{'-'.join(names)}"} | presets[names[0]]
        return resolve(kind(**settings | given))

    run = Path(given["resume"]).expanduser()
    what = f"--resume {run}: its config.json"
    if preset or "out" in given:
        raise UserError(f"--resume {run}: not with --preset or --out; the run has its own.")
    record = read_json(run / "config.json", what)
    began = record.get("program")
    if not began:
        raise UserError(f"{what} is no run's.")
    if began != kind.program:
        remedy = resuming(began, run)
        raise UserError(f"--resume {run}: began with {began}; go on with: {remedy}.")
    fields = [field for field in dataclasses.fields(kind) if field.name in record]
    known = {"program", "tracker_id", "reward_terms"}
    known |= {field.name for field in fields}
    unknown = [name for name in record if name not in known and "digest" not in name]
    if unknown:
        remedy = "go on with the code that it began with, or take them out there"
        raise UserError(f"{what} has settings unknown here, {', '.join(unknown)}; {remedy}.")
    with reading(what):
        saved = kind(**{field.name: type(field.default)(record[field.name]) for field in fields})
    config = resolve(dataclasses.replace(saved, **given))
    require_same(vars(saved), {name: getattr(config, name) for name in given}, f"--resume {run}")
    return config


def run_command(program: str, parse_args: Callable, run: Callable, argv: list[str] | None) -> None:
    """A program's command line, and what it does with it."""
    with command(program):
        config = parse_args(argv)
        try:
            run(config)
        except KeyboardInterrupt:
            if Path(config.out, "config.json").exists():
                print0(f"stopped; go on with: {resuming(program, config.out)}")
            raise
        end_processes()
