"""The paper's evaluation protocol (Sec. 4.1): rewards of many images of every prompt, from the same
noise for every model.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward hpsv2=1 aesthetic=0 --max-prompts 500

A model is a run, a folder or a hub id. What is not given is the first run's, or Table 4's. Prints
and stores in evaluation.json, for each file, reward and model: mean, standard error over prompts,
paired difference to the base, share of images that win (ties count half).
"""

import argparse
import json
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import prdp
from rewards import load_reward, python_files
from support import report, run_folder
from support.cli import InputError, Parser, command
from support.distributed import end_processes, gather_objects, on_rank_0, processes, rank, say
from support.distributed import start_processes

# Fields of prdp.Config: what decides the result, and what may be asked for.
SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
ASKED = (*SETTINGS, "offload", "compile")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; fields of prdp.Config that are not given are absent."""
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--samples-per-prompt", type=int, default=64, metavar="S")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="a file, drawn by --seed")
    parser.add_argument("--out", help="default: evaluation/ in the first run, or here")
    parser.add_fields(f for f in fields(prdp.Config) if f.name in ASKED)
    return parser.parse_args(argv)


def find_model(name: str) -> tuple[str, dict]:
    """The folder or hub id of a model; of a run its pipeline's, and the run's settings."""
    run, what = Path(name), f"{name}: its config.json"
    if not (run / "config.json").is_file() or (run / "model_index.json").is_file():
        return name, {}
    if not (run / "pipeline").is_dir():
        raise InputError(f"{run}: has no pipeline/ yet; finish it with --resume {run}.")
    record = run_folder.as_today(run_folder.read_json(run / "config.json", what))
    return str(run / "pipeline"), {"run": name, **record}


def label_models(names: list[str], folders: list[str], base: str | None) -> dict[str, str]:
    """Label -> folder, the base first: the names' last parts, or names where those are the same."""
    labels = {"base": base} if base is not None and base not in folders else {}
    short = [Path(name).name for name in names]
    for name, label, folder in zip(names, short, folders, strict=True):
        if label in labels or short.count(label) > 1:
            label = name
        while label in labels:
            label += "'"
        labels[label] = folder
    return labels


def choose_prompts(path: str, limit: int | None, seed: int) -> list[tuple[int, str]]:
    """A file's prompts and their places in it: all, or `limit` of them, drawn by the seed."""
    prompts = prdp.load_prompts(path)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [(n, prompts[n]) for n in sorted(order[:limit].tolist())]


def draw(
    seed: int, models: prdp.Models, chosen: list[tuple[int, str]], images: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`images` pictures of each of some prompts (P*S, 3, H, W), and their rewards, each (P, S)."""
    places, prompts = map(list, zip(*chosen, strict=True))
    generators = prdp.image_generators(seed, 0, places, images)
    trajectories = prdp.sample_prompts(models, models.policy, prompts, generators)
    of_each = [prompt for prompt in prompts for _ in range(images)]
    pictures, total = prdp.score_images(models, trajectories, of_each)
    parts = models.reward.parts | ({"sum": total} if len(models.reward.parts) > 1 else {})
    return pictures.cpu(), {name: x.cpu().view(-1, images) for name, x in parts.items()}


def measure(seed: int, models: prdp.Models, chosen: list, samples: int, done: dict, save) -> None:
    """Fill `done`, prompt -> {reward: its S numbers}, and `save` whenever it has grown.

    Prompts go in chunks, to the processes in turn. A chunk is always of the same prompts, whatever
    the processes and wherever an earlier evaluation was stopped: so its bits are the same.
    """
    size = max(1, models.policy.microbatch // samples)
    chunks = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    todo = [chunk for chunk in chunks if chunk[0][1] not in done]
    started = time.perf_counter()
    for first in range(0, len(todo), processes()):
        drawn = {}
        for chunk in todo[first:][rank() : rank() + 1]:  # this process's, if any
            _, rewards = draw(seed, models, chunk, samples)
            for row, (_, prompt) in enumerate(chunk):
                drawn[prompt] = {name: x[row].tolist() for name, x in rewards.items()}
        for part in gather_objects(drawn):
            done |= part
        save()
        if first == 0:
            whole = (time.perf_counter() - started) * len(todo) / processes()
            say(f"  takes about {report.duration(whole)}")


def tabulate(rewards: dict, chosen: dict, labels: list[str], base: str | None) -> list[dict]:
    """A row for each file, reward and model."""
    table = []
    for file, prompts in chosen.items():
        done = [[rewards[file][label][prompt] for _, prompt in prompts] for label in labels]
        for name in done[0][0]:
            scores = {label: torch.tensor([parts[name] for parts in rows])  # (P, S)
                      for label, rows in zip(labels, done, strict=True)}  # fmt: skip
            for label, x in scores.items():
                mean, error = report.mean_and_error(x)
                row = {"prompts": Path(file).name, "reward": name, "model": label}
                row |= {"images": x.numel(), "mean": mean, "standard_error": error}
                if base not in (None, label):
                    rise = x - scores[base]
                    row["difference"], row["difference_error"] = report.mean_and_error(rise)
                    row["win_rate"] = (rise.sign().mean().item() + 1) / 2
                table.append(row)
    return table


def print_table(table: list[dict]) -> None:
    line = "{:>20} {:>16} {:>16} {:>7} {:>20} {:>20} {:>6}"
    say(line.format("prompts", "reward", "model", "images", "mean", "difference", "wins"))
    for row in table:
        cells = [row["prompts"], row["reward"], row["model"], row["images"]]
        cells += [f"{row['mean']:.4f} +- {row['standard_error']:.4f}", "", ""]
        if "difference" in row:
            cells[5] = f"{row['difference']:+.4f} +- {row['difference_error']:.4f}"
            cells[6] = f"{row['win_rate']:.1%}"
        say(line.format(*cells))


def main(argv: list[str] | None = None) -> None:
    with command("evaluate.py"):
        args = parse_args(sys.argv[1:] if argv is None else argv)
        device = start_processes()
        found = [find_model(name) for name in args.models]
        settings = next((settings for _, settings in found if settings), {})
        base = find_model(args.against)[0] if args.against else settings.get("model")
        folders = label_models(args.models, [folder for folder, _ in found], base)
        kinds = {field.name: type(field.default) for field in fields(prdp.Config)}
        given = {name: kinds[name](settings[name]) for name in SETTINGS if name in settings}
        given |= {"dtype": "bf16"} if torch.cuda.is_available() else {}
        given |= {name: value for name, value in vars(args).items() if name in ASKED}
        sizes = {"prompts_per_epoch": processes(), "images_per_prompt": 2**20}  # any microbatch
        config = prdp.Config(**given, **sizes).resolved()
        samples, limit = args.samples_per_prompt, args.max_prompts
        chosen = {file: choose_prompts(file, limit, config.seed) for file in config.prompts}
        fewest = min(map(len, chosen.values()))
        if min(samples, fewest, limit or 1) < 1 or samples == fewest == 1:
            raise InputError(f"--samples-per-prompt {samples}, --max-prompts {limit}: too few.")

        path = Path(args.out or Path(settings.get("run", ""), "evaluation"), "evaluation.json")
        what, shown = f"--out {path.parent}", {}
        asked = {name: getattr(config, name) for name in SETTINGS}
        asked |= {"samples_per_prompt": samples, "max_prompts": limit}
        record = {"settings": json.loads(json.dumps(asked)), "inputs": {}, "rewards": {}}
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
            inputs = run_folder.digests(models, texts, python_files(config.reward))
            run_folder.require_same(record["inputs"].setdefault(label, inputs), inputs, what)
            for file, prompts in chosen.items():
                say(f"{label}: {len(prompts)} prompts of {Path(file).name}, {samples} images each")
                done = record["rewards"].setdefault(file, {}).setdefault(label, {})
                save = partial(run_folder.write_json, path, record)
                measure(config.seed, models, prompts, samples, done, save)
            prompts = next(iter(chosen.values()))
            some = prompts[:: -(-len(prompts) // 8)]
            images, rewards = draw(config.seed, models, some, 2)
            total = list(rewards.values())[-1].flatten()
            shown[label] = report.Samples([prompt for _, prompt in some], images, total)
            del models  # before the next are loaded

        base = next((label for label in folders if folders[label] == base), None)
        record["table"] = tabulate(record["rewards"], chosen, list(folders), base)
        run_folder.write_json(path, record)
        print_table(record["table"])
        report.draw_images(path.with_suffix(".png"), shown)
        say(f"see {path.with_suffix('.png')}")
        end_processes()


if __name__ == "__main__":
    main()
