"""The paper's evaluation protocol (Sec. 4.1): rewards of images that models draw from equal noise.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward hpsv2=1 aesthetic=0 --max-prompts 500

A model is a run, a folder or a hub id. What is not given is the first run's, or Table 4's. Of each
file, reward and model: mean, error over prompts, paired difference to the base, and share of wins.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import prdp
from rewards import Reward, load_reward
from stable_diffusion import read_configs
from support import report, run_folder
from support.cli import Parser, UserError, command
from support.distributed import end_processes, gather_objects, on_rank_0, print0, processes, rank
from support.distributed import start_processes
from support.machine import own_state
from support.settings import absolute, resolve

SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
FLAGS = (*SETTINGS, "offload", "compile")  # prdp.Config's fields; SETTINGS decide the result

Prompts = list[tuple[int, str]]  # and the place of each in its file, which its noise depends on


def find_model(name: str) -> tuple[str, dict]:
    """The folder or hub id of a model; of a run its pipeline's, and the run's settings."""
    run = Path(name).expanduser()
    if not (run / "config.json").is_file() or (run / "model_index.json").is_file():
        return absolute(name) if run.exists() else name, {}
    record = run_folder.read_json(run / "config.json", f"{name}: config.json")
    done = max([0, *(row["epoch"] for row in run_folder.read_metrics(run))])
    card = run / "pipeline" / "prdp.json"
    made = run_folder.read_json(card, name)["epoch"] if card.is_file() else 0
    if made < done or not card.parent.is_dir():
        remedy = f"python {record.get('program')} --resume {run} --epochs {done} makes it"
        raise UserError(f"{run}: has no pipeline/ of epoch {done}; when it has ended, {remedy}.")
    return absolute(run / "pipeline"), {"run": str(run), **record}


def labels_of(paths: list[str]) -> list[str]:
    """What tells paths apart: their last parts, or where two are the same the whole."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths


class Plan(NamedTuple):
    """What an evaluation draws and compares."""

    config: prdp.Config
    folders: dict[str, str]  # label -> a model
    base: str | None  # the label of the one that others are compared to
    samples: int  # images a prompt
    prompts: dict[str, Prompts]  # by file
    out: Path
    settings: dict  # that decide the result, as evaluation.json keeps them


def make_plan(args: argparse.Namespace) -> Plan:
    """The arguments, with what is not given from the first run; UserError for what cannot run."""
    models = [find_model(name) for name in args.models]
    run = next((settings for _, settings in models if settings), {})
    base = find_model(args.against)[0] if args.against else run.get("model")
    folders = dict(zip(labels_of(args.models), [folder for folder, _ in models], strict=True))
    if base not in (None, *folders.values()):
        label = next((x for x in ("base", "pretrained") if x not in folders), base)
        folders = {label: base, **folders}
    for folder in folders.values():  # before hours of drawing
        read_configs(folder)

    given = {name: run[name] for name in SETTINGS if name in run}
    if torch.cuda.is_available():
        given["dtype"] = "bf16"
    given |= {name: value for name, value in vars(args).items() if name in FLAGS}
    given |= {"prompts_per_epoch": processes(), "images_per_prompt": 2**20}  # for any microbatch
    config = resolve(prdp.Config(**given))
    if not config.prompts or not config.reward:
        how = "with --pairs" if run.get("pairs") else "from Python"
        raise UserError(f"{run['run']}: began {how}: give --prompts and --reward.")

    prompts = {}
    for file in config.prompts:
        texts = prdp.load_prompts(file)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(config.seed))
        numbers = sorted(order[: args.max_prompts].tolist())
        prompts[file] = [(n, texts[n]) for n in numbers]
    fewest = min(len(chosen) for chosen in prompts.values())
    samples, limit = args.samples_per_prompt, args.max_prompts
    if min(samples, fewest, limit or 1) < 1 or samples == fewest == 1:
        raise UserError(f"--samples-per-prompt {samples}, --max-prompts {limit}: too few.")

    settings = {name: getattr(config, name) for name in SETTINGS}
    settings |= {"samples_per_prompt": samples, "max_prompts": limit}
    out = Path(absolute(args.out or Path(run.get("run", ""), "evaluation")))
    label = next((label for label in folders if folders[label] == base), None)
    return Plan(config, folders, label, samples, prompts, out, json.loads(json.dumps(settings)))


def draw(
    seed: int, models: prdp.Models, chosen: Prompts, images: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`images` pictures of each of some prompts (P*S, 3, H, W), and their rewards, each (P, S)."""
    places, prompts = map(list, zip(*chosen, strict=True))
    generators = prdp.image_generators(seed, 0, places, images)
    latents = prdp.sample_prompts(models, models.policy, prompts, generators).latents[:, -1]
    pictures, total, scores = prdp.score_images(models, latents, prompts)
    if len(scores) > 1:
        scores["weighted sum" if "sum" in scores else "sum"] = total
    return pictures.cpu(), {name: x.cpu().view(-1, images) for name, x in scores.items()}


def measure(plan: Plan, models: prdp.Models, chosen: Prompts, rewards: dict) -> Iterator[None]:
    """Fill `rewards`, prompt -> {reward: its S numbers}, by chunks: the same prompts whatever the
    processes, and wherever an evaluation was stopped. Yields where it may be saved."""
    size, started = max(1, models.policy.microbatch // plan.samples), time.perf_counter()
    chunks = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    chunks = [chunk for chunk in chunks if any(prompt not in rewards for _, prompt in chunk)]
    for first in range(0, len(chunks), processes()):
        drawn = {}
        for chunk in chunks[first:][rank() : rank() + 1]:  # this process's, if any
            _, scores = draw(plan.config.seed, models, chunk, plan.samples)
            for row, (_, prompt) in enumerate(chunk):
                drawn[prompt] = {name: x[row].tolist() for name, x in scores.items()}
        for part in gather_objects(drawn):
            rewards |= part
        yield
        if first == 0:
            whole = (time.perf_counter() - started) * len(chunks) / processes()
            print0(f"  takes about {report.duration(whole)}")


def measure_model(plan: Plan, label: str, reward: Reward, record: dict) -> report.Samples:
    """Add a model's rewards to `record`, which is saved as they come; returns a few pictures."""
    config, path = plan.config, plan.out / "evaluation.json"
    folder = plan.folders[label]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = prdp.load_models(replace(config, model=folder), device, reward, learns=False)
    texts = [prompt for chosen in plan.prompts.values() for _, prompt in chosen]
    inputs = run_folder.digests(models, texts)
    before = record["inputs"].setdefault(label, inputs)
    run_folder.require_same(before, inputs, f"--out {plan.out}: {label}")

    for file, chosen in plan.prompts.items():
        rewards = record["rewards"].setdefault(file, {}).setdefault(label, {})
        known = sum(prompt in rewards for _, prompt in chosen)
        some = f" ({known} kept from before; --out elsewhere scores anew)" if known else ""
        print0(f"{label}: {len(chosen)} prompts of {Path(file).name}, {plan.samples} images{some}")
        for _ in measure(plan, models, chosen, rewards):
            run_folder.write_json(path, record)
    few = chosen[:: -(-len(chosen) // 8)]
    images, scores = draw(config.seed, models, few, 2)
    total = list(scores.values())[-1].flatten()
    return report.Samples([prompt for _, prompt in few], images, total)


def tabulate(plan: Plan, rewards: dict) -> list[dict]:
    """A row for each file, reward and model; and print them."""
    table = []
    for shown, (file, chosen) in zip(labels_of([*plan.prompts]), plan.prompts.items(), strict=True):
        prompts = [prompt for _, prompt in chosen]
        for name in rewards[file][next(iter(plan.folders))][prompts[0]]:
            print0(f"\n{shown}, {name}: {len(prompts)} prompts x {plan.samples} images")
            scores = {}  # label -> (P, S)
            for label in plan.folders:
                scores[label] = torch.tensor([rewards[file][label][p][name] for p in prompts])
            for label, x in scores.items():
                mean, error = report.mean_and_error(x)
                row = {"prompts": shown, "reward": name, "model": label, "images": x.numel()}
                row |= {"mean": mean, "standard_error": error}
                text = f"  {label:<24} {mean:>10.4f} +- {error:.4f}"
                if plan.base not in (None, label):
                    rise = x - scores[plan.base]
                    mean, error = report.mean_and_error(rise)
                    wins = (rise.sign().mean().item() + 1) / 2
                    row |= {"difference": mean, "difference_error": error, "win_rate": wins}
                    text += f"  {mean:>+10.4f} +- {error:.4f}  wins {wins:.1%}"
                print0(text)
                table.append(row)
    return table


@own_state()
def evaluate(args: argparse.Namespace) -> None:
    """Draw, score and compare, going on where an evaluation with this --out was stopped."""
    start_processes()
    plan = make_plan(args)
    reward = load_reward(plan.config.reward, "cpu")
    path, what = plan.out / "evaluation.json", f"--out {plan.out}"
    record = {"settings": plan.settings, "inputs": {}, "rewards": {}}
    with run_folder.only_writer(plan.out):
        if on_rank_0(path.is_file):
            before = run_folder.read_json(path, what)
            if not all(isinstance(before.get(name), dict) for name in record):
                raise UserError(f"{what}: its evaluation.json is no such; choose another folder.")
            run_folder.require_same(before["settings"], record["settings"], what)
            record |= {name: before[name] for name in ("inputs", "rewards")}
        samples = {}
        for label in plan.folders:
            samples[label] = measure_model(plan, label, reward, record)
        record["table"] = tabulate(plan, record["rewards"])
        run_folder.write_json(path, record)
        report.draw_images(path.with_suffix(".png"), samples)
        print0(f"see {path.with_suffix('.png')}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--samples-per-prompt", type=int, default=64, metavar="S")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="a file, drawn by --seed")
    parser.add_argument("--out", help="default: evaluation/ in the first run, or here")
    parser.add_fields(field for field in fields(prdp.Config) if field.name in FLAGS)
    with command("evaluate.py"):
        evaluate(parser.parse_args(argv))
        end_processes()


if __name__ == "__main__":
    main()
