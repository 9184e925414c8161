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

import torch
from torch import Tensor

import prdp
from rewards import load_reward
from stable_diffusion import find_folder
from support import report, run_folder
from support.cli import InputError, Parser, command
from support.distributed import end_processes, gather_objects, on_rank_0, processes, rank
from support.distributed import say, start_processes
from support.settings import absolute

SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
ASKED = (*SETTINGS, "offload", "compile")  # prdp.Config's fields; SETTINGS decide the result


def find_model(name: str) -> tuple[str, dict]:
    """The folder or hub id of a model; of a run its pipeline's, and the run's settings."""
    run = Path(name).expanduser()
    if not (run / "config.json").is_file() or (run / "model_index.json").is_file():
        return absolute(name) if run.exists() else name, {}
    record = run_folder.as_today(run_folder.read_json(run / "config.json", f"{name}: config.json"))
    done = [0, *(row["epoch"] for row in run_folder.read_metrics(run))][-1]
    card = run / "pipeline" / "prdp.json"
    made = run_folder.read_json(card, name)["epoch"] if card.is_file() else 0
    if made < done or not card.parent.is_dir():
        remedy = f"python {record['program']} --resume {run} --epochs {done} makes that of {done}"
        raise InputError(f"{run}: has no pipeline/ yet, or of epoch {made}; {remedy}.")
    return absolute(str(run / "pipeline")), {"run": str(run), **record}


def last_parts(paths: list[str]) -> list[str]:
    """What tells them apart: their last parts, or where two are the same the whole."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths


def draw(
    seed: int, models: prdp.Models, chosen: list[tuple[int, str]], images: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`images` pictures of each of some prompts (P*S, 3, H, W), and their rewards, each (P, S)."""
    places, prompts = map(list, zip(*chosen, strict=True))
    generators = prdp.image_generators(seed, 0, places, images)
    latents = prdp.sample_prompts(models, models.policy, prompts, generators).latents[:, -1]
    pictures, total = prdp.score_images(models, latents, prompts)
    scores = models.reward.with_sum(total)
    return pictures.cpu(), {name: x.cpu().view(-1, images) for name, x in scores.items()}


def measure(seed: int, models: prdp.Models, chosen: list, samples: int, done: dict) -> Iterator:
    """Fill `done`, prompt -> {reward: its S numbers}, by chunks: of the same prompts whatever the
    processes, and wherever an evaluation was stopped. Yields where it may be saved."""
    size, started = max(1, models.policy.microbatch // samples), time.perf_counter()
    chunks = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    todo = [chunk for chunk in chunks if chunk[0][1] not in done]
    for first in range(0, len(todo), processes()):
        drawn = {}
        for chunk in todo[first:][rank() : rank() + 1]:  # this process's, if any
            _, rewards = draw(seed, models, chunk, samples)
            for row, (_, prompt) in enumerate(chunk):
                drawn[prompt] = {name: x[row].tolist() for name, x in rewards.items()}
        for part in gather_objects(drawn):
            done |= part
        yield
        if first == 0:
            whole = (time.perf_counter() - started) * len(todo) / processes()
            say(f"  takes about {report.duration(whole)}")


def tabulate(rewards: dict, chosen: dict, labels: list[str], base: str | None) -> list[dict]:
    """A row for each file, reward and model; and print them."""
    table, line = [], "{:>20} {:>16} {:>16} {:>7} {:>20} {:>20} {:>6}"
    say(line.format("prompts", "reward", "model", "images", "mean", "difference", "wins"))
    for shown, (file, prompts) in zip(last_parts([*chosen]), chosen.items(), strict=True):
        of_file = rewards[file]
        for name in of_file[labels[0]][prompts[0][1]]:
            scores = {label: torch.tensor([of_file[label][prompt][name] for _, prompt in prompts])
                      for label in labels}  # (P, S) each  # fmt: skip
            for label, x in scores.items():
                mean, error = report.mean_and_error(x)
                row = {"prompts": shown, "reward": name, "model": label, "images": x.numel()}
                cells = [*row.values(), f"{mean:.4f} +- {error:.4f}", "", ""]
                row |= {"mean": mean, "standard_error": error}
                if base not in (None, label):
                    rise = x - scores[base]
                    mean, error = report.mean_and_error(rise)
                    row |= {"difference": mean, "difference_error": error}
                    row["win_rate"] = (rise.sign().mean().item() + 1) / 2
                    cells[5:] = [f"{mean:+.4f} +- {error:.4f}", f"{row['win_rate']:.1%}"]
                say(line.format(*cells))
                table.append(row)
    return table


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    found = [find_model(name) for name in args.models]
    settings = next((settings for _, settings in found if settings), {})
    base = find_model(args.against)[0] if args.against else settings.get("model")
    folders = dict(zip(last_parts(args.models), [folder for folder, _ in found], strict=True))
    if base not in (None, *folders.values()):
        label = next((x for x in ("base", "pretrained") if x not in folders), base)
        folders = {label: base, **folders}
    for folder in folders.values():  # before hours of drawing
        find_folder(folder)
    given = {name: settings[name] for name in SETTINGS if name in settings}
    given |= {"dtype": "bf16"} if torch.cuda.is_available() else {}
    given |= {name: value for name, value in vars(args).items() if name in ASKED}
    given |= {"prompts_per_epoch": processes(), "images_per_prompt": 2**20}  # for any microbatch
    config, samples, limit = prdp.Config(**given), args.samples_per_prompt, args.max_prompts
    config = config.resolved()
    if not config.prompts or not config.reward:
        how = "with --pairs" if settings.get("pairs") else "from Python"
        raise InputError(f"{settings['run']}: began {how}: give --prompts and --reward.")
    chosen = {}  # of each file some prompts, and their places in it
    for file in config.prompts:
        prompts = prdp.load_prompts(file)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed))
        chosen[file] = [(n, prompts[n]) for n in sorted(order[:limit].tolist())]
    fewest = min(map(len, chosen.values()))
    if min(samples, fewest, limit or 1) < 1 or samples == fewest == 1:
        raise InputError(f"--samples-per-prompt {samples}, --max-prompts {limit}: too few.")

    out = Path(absolute(args.out or Path(settings.get("run", ""), "evaluation")))
    path, what, shown = out / "evaluation.json", f"--out {out}", {}
    asked = {name: getattr(config, name) for name in SETTINGS}
    asked |= {"samples_per_prompt": samples, "max_prompts": limit}
    record = {"settings": json.loads(json.dumps(asked)), "inputs": {}, "rewards": {}}
    with run_folder.only_writer(out):
        if on_rank_0(path.is_file):
            before = run_folder.read_json(path, what)
            if not all(isinstance(before.get(name), dict) for name in record):
                raise InputError(f"{what}: its evaluation.json is no such; choose another folder.")
            run_folder.require_same(before["settings"], record["settings"], what)
            record |= {name: before[name] for name in ("inputs", "rewards")}
        reward = load_reward(config.reward, "cpu" if config.offload == "on" else device)
        texts = [prompt for prompts in chosen.values() for _, prompt in prompts]
        for label, folder in folders.items():
            models = prdp.load_models(replace(config, model=folder), device, reward, learns=False)
            inputs = run_folder.digests(models, texts)
            before = record["inputs"].setdefault(label, inputs)
            run_folder.require_same(before, inputs, f"{what}: {label}")
            for file, prompts in chosen.items():
                say(f"{label}: {len(prompts)} prompts of {Path(file).name}, {samples} images each")
                done = record["rewards"].setdefault(file, {}).setdefault(label, {})
                for _ in measure(config.seed, models, prompts, samples, done):
                    run_folder.write_json(path, record)
            some = prompts[:: -(-len(prompts) // 8)]
            images, rewards = draw(config.seed, models, some, 2)
            total = list(rewards.values())[-1].flatten()
            shown[label] = report.Samples([prompt for _, prompt in some], images, total)
            del models  # before the next are loaded

        base = next((label for label in folders if folders[label] == base), None)
        record["table"] = tabulate(record["rewards"], chosen, list(folders), base)
        run_folder.write_json(path, record)
        report.draw_images(path.with_suffix(".png"), shown)
        say(f"see {path.with_suffix('.png')}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--samples-per-prompt", type=int, default=64, metavar="S")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="a file, drawn by --seed")
    parser.add_argument("--out", help="default: evaluation/ in the first run, or here")
    parser.add_fields(f for f in fields(prdp.Config) if f.name in ASKED)  # absent if not given
    with command("evaluate.py"):
        evaluate(parser.parse_args(argv), start_processes())
        end_processes()


if __name__ == "__main__":
    main()
