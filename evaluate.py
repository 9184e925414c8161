"""The paper's evaluation protocol (Sec. 4.1): rewards of images that models draw from equal noise.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward hpsv2=1 aesthetic=0 --max-prompts 500
    python evaluate.py runs/toy/epochs/* --samples-per-prompt 8

A model is a run, a folder of its epochs/, a pipeline's folder or a hub id. What is not given is the
first run's, or Table 4's. Each file, reward and model gets a mean, its standard error over prompts,
the paired difference to the base, and the share of wins. What was stopped goes on when repeated.
"""

import argparse
import json
import math
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
from support.distributed import end_processes, gather_objects, on_rank_0, print0, processes, rank
from support.distributed import start_processes
from support.machine import own_state
from support.settings import absolute, resolve

SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
FLAGS = (*SETTINGS, "offload", "compile")  # fields of prdp.Config

Prompts = list[tuple[int, str]]  # each with its place in the file, which its noise depends on


class Plan(NamedTuple):
    """What an evaluation draws and compares."""

    config: prdp.Config
    folders: dict[str, str]  # label -> a model
    base: str | None  # the label of the one that others are compared to
    samples: int  # images a prompt
    prompts: dict[str, Prompts]  # by file
    out: Path
    settings: dict  # what decides the result


def find_model(name: str) -> tuple[str, dict]:
    """The folder or hub id of a model, and the settings of the run that made it, if one did: a run
    stands for its pipeline/, a folder of its epochs/ for the one in there."""
    folder = Path(absolute(name))
    if not folder.exists():
        return str(Path(name).expanduser()), {}
    run = folder
    if folder.parent.name == "epochs":
        run = folder.parent.parent
    if (folder / "model_index.json").is_file() or not (run / "config.json").is_file():
        return str(folder), {}

    record = run_folder.read_json(run / "config.json", f"{name}: config.json")
    done = max((row["epoch"] for row in run_folder.read_metrics(run)), default=0)
    pipeline = folder / "pipeline"
    epoch = done
    if (pipeline / "prdp.json").is_file():
        card = run_folder.read_json(pipeline / "prdp.json", f"{name}: pipeline/prdp.json")
        epoch = card.get("epoch", done)
    if run != folder and not pipeline.is_dir():
        raise UserError(f"{folder}: has no pipeline/; docs/running.md makes one of lora/.")
    if run == folder and done == 0:
        raise UserError(f"{run}: has not done an epoch yet.")
    if run == folder and (epoch < done or not pipeline.is_dir()):
        remedy = f"python {record.get('program')} --resume {run} --epochs {done} makes it"
        raise UserError(f"{run}: has no pipeline/ of epoch {done}; when it has ended, {remedy}.")
    return str(pipeline), {**record, "run": str(run), "epoch": epoch}


def labels_of(paths: list[str]) -> list[str]:
    """What tells paths apart: as few of their last parts as do."""
    parts = [Path(absolute(path)).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def settings_of(args: argparse.Namespace, run: dict) -> prdp.Config:
    """What is given, else of the first run, else the default."""
    settings = {name: run[name] for name in SETTINGS if name in run}
    if torch.cuda.is_available():
        settings["dtype"] = "bf16"
    settings |= {name: value for name, value in vars(args).items() if name in FLAGS}
    # There is no epoch here, whose images would bound a microbatch.
    config = prdp.Config(prompts_per_epoch=processes(), images_per_prompt=2**20, **settings)
    config = resolve(config)
    if not config.prompts or not config.reward:
        how = "with --pairs" if run.get("pairs") else "from Python"
        raise UserError(f"{run['run']}: began {how}: give --prompts and --reward.")
    return config


def choose_prompts(config: prdp.Config, limit: int | None) -> dict[str, Prompts]:
    """The prompts of each file, or `limit` of them, drawn by the seed."""
    prompts = {}
    for file in config.prompts:
        texts = prdp.load_prompts(file)
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(texts), generator=generator)
        numbers = sorted(order[:limit].tolist())
        prompts[file] = [(n, texts[n]) for n in numbers]
    return prompts


def default_folder(run: dict) -> Path:
    """evaluation/ in a run; once it went on, evaluation_NNNN/, by its epoch."""
    folder = Path(run.get("run", ""), "evaluation")
    path = folder / "evaluation.json"
    if run and path.is_file():
        before = run_folder.read_json(path, f"--out {folder}")
        if before.get("epoch") != run["epoch"]:
            return folder.with_name(f"evaluation_{run['epoch']:04d}")
    return folder


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
        label = next((x for x in ("base", "pretrained") if x not in folders), base)
        folders = {label: base, **folders}
    base = next((label for label in folders if folders[label] == base), None)

    samples, limit = args.samples_per_prompt, args.max_prompts
    for flag, count in (("--samples-per-prompt", samples), ("--max-prompts", limit)):
        if count is not None and count < 1:
            raise UserError(f"{flag} {count}: must be at least 1.")
    config = settings_of(args, run)
    prompts = choose_prompts(config, limit)
    settings = {name: getattr(config, name) for name in SETTINGS}
    settings |= {"samples_per_prompt": samples, "max_prompts": limit}
    out = Path(absolute(args.out)) if args.out else default_folder(run)
    return Plan(config, folders, base, samples, prompts, Path(absolute(out)), settings)


def prepare_reward(plan: Plan) -> tuple[Reward, dict]:
    """The reward, tried on a grey picture, so that one which cannot score ends before models are
    loaded; and what it depends on: one table has one reward."""
    reward = load_reward(plan.config.reward, "cpu")
    prompts = [prompt for chosen in plan.prompts.values() for _, prompt in chosen]
    for folder in plan.folders.values():
        picture = grey_picture(folder)  # UserError for a model that is none
    reward.score(picture, prompts[:1])
    terms = [f"{label}={weight:g}" for label, (weight, _) in reward.components.items()]
    files = (Path(file).read_bytes() for file in reward.files)
    return reward, {
        "prompts_digest": run_folder.digest(prompt.encode() for prompt in prompts),
        "reward_terms": terms,
        "reward_digest": run_folder.digest(files),
        "reward_weights_digest": run_folder.weights_digest(reward.networks),
    }


def open_record(path: Path, settings: dict) -> dict:
    """What evaluation.json holds of an evaluation that was stopped, or a new record; UserError if
    that was of other settings."""
    record = {"settings": settings, "inputs": {}, "rewards": {}}
    record = json.loads(json.dumps(record))
    if on_rank_0(path.is_file):
        what = f"--out {path.parent}"
        before = run_folder.read_json(path, what)
        if not all(isinstance(before.get(name), dict) for name in record):
            raise UserError(f"{what}: its evaluation.json is no such; choose another folder.")
        run_folder.require_same(before["settings"], record["settings"], what)
        record |= {"inputs": before["inputs"], "rewards": before["rewards"]}
    return record


def draw(
    seed: int, models: prdp.Models, chosen: Prompts, images: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`images` pictures of each of some prompts (P*S, 3, H, W), and their rewards, each (P, S)."""
    places, prompts = map(list, zip(*chosen, strict=True))
    generators = prdp.image_generators(seed, 0, places, images)
    latents = prdp.sample_prompts(models, models.policy, prompts, generators).latents[:, -1]
    pictures, total, scores = prdp.score_images(models, latents, prompts)
    if len(scores) > 1:
        name = "weighted sum" if "sum" in scores else "sum"
        scores[name] = total
    return pictures.cpu(), {name: x.cpu().view(-1, images) for name, x in scores.items()}


def measure(plan: Plan, models: prdp.Models, missing: Prompts) -> Iterator[dict]:
    """Yields rewards of prompts, prompt -> {reward: its S numbers}, as they come: a microbatch of
    each process at a time, of the same prompts whatever the number of processes."""
    size = max(1, models.policy.microbatch // plan.samples)
    chunks = [missing[first : first + size] for first in range(0, len(missing), size)]
    started = time.perf_counter()
    for first in range(0, len(chunks), processes()):
        drawn = {}
        number = first + rank()
        if number < len(chunks):
            _, scores = draw(plan.config.seed, models, chunks[number], plan.samples)
            for row, (_, prompt) in enumerate(chunks[number]):
                drawn[prompt] = {name: x[row].tolist() for name, x in scores.items()}
        for part in gather_objects(drawn):
            drawn |= part
        yield drawn
        if first == 0:
            seconds = (time.perf_counter() - started) * len(chunks) / processes()
            print0(f"  takes about {report.duration(seconds)}")


def measure_model(
    plan: Plan, label: str, reward: Reward, record: dict, device: torch.device
) -> report.Samples:
    """Add a model's rewards to `record`, which is saved as they come; returns a few pictures."""
    config = replace(plan.config, model=plan.folders[label])
    models = prdp.load_models(config, device, reward, learns=False)
    networks = [models.sd.unet, models.sd.vae, models.sd.pipe.text_encoder]
    now = {"model_digest": run_folder.weights_digest(networks)}
    begun = time.strftime("%Y-%m-%d %H:%M")
    before = record["inputs"].setdefault(label, {**now, "begun": begun})
    run_folder.require_same(before, now, f"--out {plan.out}: {label}")

    for file, chosen in plan.prompts.items():
        rewards = record["rewards"].setdefault(file, {}).setdefault(label, {})
        missing = [(place, prompt) for place, prompt in chosen if prompt not in rewards]
        print0(f"{label}: {len(chosen)} prompts of {Path(file).name}, {plan.samples} images each")
        kept = len(chosen) - len(missing)
        if kept:
            print0(f"  {kept} kept from {before.get('begun')}; another --out scores them anew")
        for drawn in measure(plan, models, missing):
            rewards |= drawn
            run_folder.write_json(plan.out / "evaluation.json", record)

    few = chosen[:: -(-len(chosen) // 8)]  # of the last file
    images, scores = draw(config.seed, models, few, 2)
    *_, total = scores.values()
    return report.Samples([prompt for _, prompt in few], images, total.flatten())


def compare(x: Tensor, base: Tensor | None) -> dict[str, float]:
    """Statistics of rewards (P, S), and of their difference to a base's of the same noise."""
    mean, error = report.mean_and_error(x)
    row = {"images": x.numel(), "mean": mean, "standard_error": error}
    if base is not None:
        rise = x - base
        row["difference"], row["difference_error"] = report.mean_and_error(rise)
        row["win_rate"] = (rise.sign().mean().item() + 1) / 2
    return row


def cell(mean: str, error: float) -> str:
    """A mean and its standard error, in 22 columns; a single image has none."""
    text = f"{mean:>11}"
    if math.isfinite(error):
        text += f" +- {error:.2g}"
    return f"{text:<22}"


def tabulate(plan: Plan, rewards: dict) -> list[dict]:
    """Print a table for each file and reward, of at most 80 columns; returns their rows."""
    table = []
    for shown, (file, chosen) in zip(labels_of([*plan.prompts]), plan.prompts.items(), strict=True):
        prompts = [prompt for _, prompt in chosen]
        some = rewards[file][next(iter(plan.folders))]
        for name in some[prompts[0]]:
            print0(f"\n{shown[-30:]}, {name[-20:]}: {len(prompts)} x {plan.samples} images")
            print0(f"{'model':<28}{'mean':<26}{'difference':<19}{'wins':>5}")
            scores = {}  # label -> (P, S)
            for label in plan.folders:
                scores[label] = torch.tensor([rewards[file][label][p][name] for p in prompts])
            for label, x in scores.items():
                base = None if plan.base in (None, label) else scores[plan.base]
                row = compare(x, base)
                text = f"{label[-24:]:<24}" + cell(f"{row['mean']:.5g}", row["standard_error"])
                if base is not None:
                    text += cell(f"{row['difference']:+.5g}", row["difference_error"])
                    text += f"{row['win_rate']:>7.1%}"
                print0(text)
                row = {key: value if math.isfinite(value) else None for key, value in row.items()}
                table.append({"prompts": shown, "reward": name, "model": label, **row})
    return table


@own_state()
def evaluate(args: argparse.Namespace) -> None:
    """Draw, score and compare, going on where an evaluation with this --out was stopped."""
    device = start_processes()
    plan = make_plan(args)
    reward, depends = prepare_reward(plan)
    path = plan.out / "evaluation.json"
    with run_folder.only_writer(plan.out):
        record = open_record(path, plan.settings | depends)
        samples = {}
        for label in plan.folders:
            samples[label] = measure_model(plan, label, reward, record, device)
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
