"""The paper's evaluation protocol (Sec. 4.1): rewards of images that models draw from equal noise.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward hpsv2=1 aesthetic=0 --max-prompts 500

A model is a run, a folder of its epochs/, a pipeline's folder or a hub id. What is not given is the
first run's, or Table 4's. For each prompt file, reward and model: mean, standard error over
prompts, paired difference to the base, share of wins. A stopped evaluation goes on if repeated.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import prdp
from rewards import Reward, load_reward
from stable_diffusion import grey_picture
from support import report, run_folder
from support.cli import Parser, UserError, command
from support.distributed import end_processes, gather_objects, print0, processes, rank
from support.distributed import start_processes
from support.machine import own_state
from support.settings import absolute, model_path, resolve

SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
FLAGS = (*SETTINGS, "offload", "compile")  # fields of prdp.Config
Prompts = list[tuple[int, str]]  # each with its place in its file, which its noise depends on


def find_model(name: str) -> tuple[str, dict]:
    """The folder or hub id of a model, and the settings of the run that made it, if one did."""
    folder = Path(absolute(name))
    run = folder
    if folder.parent.name == "epochs":
        run = folder.parent.parent
    if (folder / "model_index.json").is_file() or not (run / "config.json").is_file():
        return model_path(name), {}

    record = run_folder.read_json(run / "config.json", f"{name}: config.json")
    done = len(run_folder.read_metrics(run)) or 1
    pipeline = folder / "pipeline"
    card = pipeline / "prdp.json"
    epoch = done
    if card.is_file():
        epoch = run_folder.read_json(card, str(card))["epoch"]
    if run != folder and not pipeline.is_dir():
        raise UserError(f"{folder}: has no pipeline/; docs/running.md makes one of its lora/.")
    if run == folder and (epoch < done or not pipeline.is_dir()):
        remedy = f"python {record.get('program')} --resume {run} --epochs {done} makes it"
        raise UserError(f"{run}: has no pipeline/ of epoch {done}; when it has ended, {remedy}.")
    return str(pipeline), {**record, "out": run / "evaluation" / f"{epoch:04d}"}


def labels_of(paths: list[str]) -> list[str]:
    """What tells paths apart: their last parts, or where two are the same the whole."""
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        return paths
    return names


class Plan(NamedTuple):
    """What an evaluation draws and compares."""

    config: prdp.Config
    folders: dict[str, str]  # label -> a model
    base: str | None  # the label of the one that others are compared to
    samples: int  # images a prompt
    prompts: dict[str, Prompts]  # by file
    texts: list[str]  # all prompts
    out: Path


def make_plan(args: argparse.Namespace) -> Plan:
    """The arguments, with what is not given from the first run; UserError for what cannot run."""
    models = [find_model(name) for name in args.models]
    run = next((settings for _, settings in models if settings), {})
    base = run.get("model")
    if args.against:
        base, _ = find_model(args.against)
    folders = {}
    for label, (folder, _) in zip(labels_of(args.models), models, strict=True):
        folders[label] = folder
    if base not in (None, *folders.values()):
        label = "base"
        while label in folders:
            label = "pretrained " + label
        folders = {label: base, **folders}

    if min(args.samples_per_prompt, args.max_prompts) < 1:
        raise UserError("--samples-per-prompt and --max-prompts: must be at least 1.")
    given = {name: run[name] for name in SETTINGS if name in run}
    if torch.cuda.is_available():
        given["dtype"] = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    given |= {name: value for name, value in vars(args).items() if name in FLAGS}
    # No epoch's images bound the microbatch here.
    config = prdp.Config(prompts_per_epoch=processes(), images_per_prompt=2**20, **given)
    config = resolve(config)
    if not config.prompts or not config.reward:
        raise UserError("the run began without files or reward: give --prompts and --reward.")

    prompts = {}
    texts = []
    for file in config.prompts:
        every = prdp.load_prompts(file)
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(every), generator=generator)
        numbers = sorted(order[: args.max_prompts].tolist())
        prompts[file] = [(n, every[n]) for n in numbers]
        texts += [every[n] for n in numbers]
    out = Path(absolute(args.out or run.get("out", "evaluation")))
    label = next((label for label in folders if folders[label] == base), None)
    return Plan(config, folders, label, args.samples_per_prompt, prompts, texts, out)


def draw(seed: int, models: prdp.Models, chosen: Prompts, images: int) -> tuple[Tensor, dict]:
    """`images` pictures of each of some prompts (P*S, 3, H, W), and their rewards, each (P, S)."""
    places = [place for place, _ in chosen]
    prompts = [prompt for _, prompt in chosen]
    generators = prdp.image_generators(seed, 0, places, images)
    trajectories = prdp.sample_prompts(models, models.policy, prompts, generators)
    x_0 = trajectories.latents[:, -1]
    pictures, total, scores = prdp.score_images(models, x_0, prompts)
    if len(scores) > 1:
        name = "weighted sum" if "sum" in scores else "sum"
        scores[name] = total
    rewards = {name: x.cpu().view(-1, images) for name, x in scores.items()}
    return pictures.cpu(), rewards


def measure(plan: Plan, models: prdp.Models, missing: Prompts) -> Iterator[dict]:
    """Draw and score, a chunk a process at a time; yields prompt -> {reward: its S numbers}."""
    size = max(1, models.policy.microbatch // plan.samples)
    # Of the same prompts whatever the number of processes.
    chunks = [missing[first : first + size] for first in range(0, len(missing), size)]
    started = time.perf_counter()
    for first in range(0, len(chunks), processes()):
        drawn = {}
        for chunk in chunks[first:][rank() : rank() + 1]:  # this process's, if any
            _, scores = draw(plan.config.seed, models, chunk, plan.samples)
            for row, (_, prompt) in enumerate(chunk):
                drawn[prompt] = {name: x[row].tolist() for name, x in scores.items()}
        for part in gather_objects(drawn):
            drawn |= part
        yield drawn
        if first == 0:
            seconds = time.perf_counter() - started
            whole = seconds * len(chunks) / processes()
            print0(f"  takes about {report.duration(whole)}")


def measure_model(
    plan: Plan, label: str, reward: Reward, record: dict, device: torch.device
) -> report.Samples:
    """Add a model's rewards to `record`, which is saved as they come; returns a few pictures."""
    config = replace(plan.config, model=plan.folders[label])
    models = prdp.load_models(config, device, reward, learns=False)
    networks = [models.sd.unet, models.sd.vae, models.sd.text_encoders]
    inputs = {"model_digest": run_folder.weights_digest(networks)}
    begun = time.strftime("%Y-%m-%d %H:%M")
    before = record["inputs"].setdefault(label, {**inputs, "begun": begun})
    run_folder.require_same(before, inputs, f"--out {plan.out}: {label}")

    for file, chosen in plan.prompts.items():
        of_file = record["rewards"].setdefault(file, {})
        rewards = of_file.setdefault(label, {})
        missing = [pair for pair in chosen if pair[1] not in rewards]
        print0(f"{label}: {len(chosen)} prompts of {Path(file).name}, {plan.samples} images each")
        if len(missing) < len(chosen):
            kept = len(chosen) - len(missing)
            print0(f"  {kept} kept from {before['begun']}; another --out scores them anew")
        for drawn in measure(plan, models, missing):
            rewards |= drawn
            run_folder.write_json(plan.out / "evaluation.json", record)

    stride = -(-len(chosen) // 8)
    few = chosen[::stride]  # of the last file
    images, scores = draw(config.seed, models, few, 2)
    *_, total = scores.values()
    prompts = [prompt for _, prompt in few]
    return report.Samples(prompts, images, total.flatten())


def summary(x: Tensor, form: str) -> tuple:
    """Mean and standard error of rewards (P, S), None for a single image, and both as text."""
    mean, error = report.mean_and_error(x)
    text = format(mean, form)
    if x.numel() == 1:
        return mean, None, text
    return mean, error, f"{text} +- {error:.2g}"


def tabulate(plan: Plan, rewards: dict) -> list[dict]:
    """Print a table for each file and reward, of at most 80 columns; returns their rows."""
    table = []
    for shown, file in zip(labels_of([*plan.prompts]), plan.prompts, strict=True):
        prompts = [prompt for _, prompt in plan.prompts[file]]
        of_file = rewards[file]
        for name in of_file[next(iter(plan.folders))][prompts[0]]:
            print0(f"\n{shown[-30:]}, {name}: {len(prompts)} prompts x {plan.samples} images")
            scores = {}  # label -> (P, S)
            for label in plan.folders:
                scores[label] = torch.tensor([of_file[label][p][name] for p in prompts])
            for label, x in scores.items():
                row = {"prompts": shown, "reward": name, "model": label, "images": x.numel()}
                row["mean"], row["standard_error"], text = summary(x, ".5g")
                line = f"  {label[-20:]:<20}{text:>22}"
                if plan.base not in (None, label):
                    rise = x - scores[plan.base]
                    row["difference"], row["difference_error"], text = summary(rise, "+.5g")
                    row["win_rate"] = (rise.sign().mean().item() + 1) / 2
                    line += f"{text:>22}  wins {row['win_rate']:.1%}"
                print0(line)
                table.append(row)
    return table


@own_state()
def evaluate(args: argparse.Namespace) -> None:
    """Draw, score and compare, going on where an evaluation with this --out was stopped."""
    device = start_processes()
    plan = make_plan(args)

    # A reward that fails or changed, or a model that is none, ends here.
    reward = load_reward(plan.config.reward, "cpu")
    for folder in plan.folders.values():
        picture = grey_picture(folder)
    reward.score(picture, plan.texts[:1])
    settings = {name: getattr(plan.config, name) for name in SETTINGS}
    settings |= {
        "samples_per_prompt": plan.samples,
        "max_prompts": args.max_prompts,
        **run_folder.digests(reward, plan.texts),
    }
    record = {"settings": settings, "inputs": {}, "rewards": {}}
    path = plan.out / "evaluation.json"
    with run_folder.only_writer(plan.out):
        if path.is_file():
            before = run_folder.read_json(path, str(path))
            if not record.keys() <= before.keys():
                raise UserError(f"{path}: is no evaluation's; choose another --out.")
            run_folder.require_same(before["settings"], settings, f"--out {plan.out}")
            record = before | {"settings": settings}

        samples = {}
        for label in plan.folders:
            samples[label] = measure_model(plan, label, reward, record, device)
        record["table"] = tabulate(plan, record["rewards"])
        run_folder.write_json(path, record)
        page = path.with_suffix(".png")
        report.draw_images(page, samples)
        print0(f"see {page}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--samples-per-prompt", type=int, default=64, metavar="S")
    parser.add_argument(
        "--max-prompts", type=int, default=1_000_000, metavar="N", help="a file, drawn by --seed"
    )
    parser.add_argument("--out", help="default: evaluation/EPOCH in the first run, or evaluation/")
    parser.add_fields(field for field in fields(prdp.Config) if field.name in FLAGS)
    with command("evaluate.py"):
        evaluate(parser.parse_args(argv))
        end_processes()


if __name__ == "__main__":
    main()
