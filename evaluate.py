"""The paper's evaluation protocol (Sec. 4.1): rewards of many images of every prompt, from the same
noise for every model.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward "hpsv2=1,aesthetic=0" --max-prompts 500

A model is a run of prdp.py, a folder or a hub id. What is not given is the first run's, or Table
4's. Prints and stores in evaluation.json, for each file, reward and model: mean, standard error
over prompts, paired difference to the base, share of images that win (ties count half).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

import prdp
import report
from rewards import InputError, Parser, command, reading, reward_files

# Fields of prdp.Config: what decides the result, and what may be asked for.
SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
ASKED = (*SETTINGS, "offload")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; fields of prdp.Config that are not given are absent."""
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--samples-per-prompt", type=int, default=64, metavar="S")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="a file, drawn by --seed")
    parser.add_argument("--out", help="default: evaluation/ in the first run, or here")
    parser.add_fields([f for f in fields(prdp.Config) if f.name in ASKED], {})
    return parser.parse_args(argv)


def find_models(names: list[str], against: str | None) -> tuple[dict[str, str], str | None, dict]:
    """Label -> folder or hub id of each model; the base's label; the first run's settings."""
    folders, settings = {}, {}
    for name in names:
        run, folder = Path(name), name
        if (run / "config.json").is_file() and not (run / "model_index.json").is_file():
            if not (run / "pipeline").is_dir():
                raise InputError(f"{run}: has no pipeline/ yet; finish it with --resume {run}.")
            with reading(str(run / "config.json")):
                found = json.loads((run / "config.json").read_text())
                settings = settings or {"run": name, **found}
            folder = str(run / "pipeline")
        folders[run.name if run.name not in ("base", *folders) else name] = folder
    base = against or settings.get("model")
    if base is not None and base not in folders.values():
        folders = {"base": base, **folders}
    return folders, next((label for label in folders if folders[label] == base), None), settings


def make_config(settings: dict, given: dict) -> prdp.Config:
    """What is given, over the first run's settings, over Table 4's."""
    taken = {f.name: type(f.default)(settings[f.name]) for f in fields(prdp.Config)
             if f.name in SETTINGS and settings}  # fmt: skip
    taken |= {name: value for name, value in given.items() if name in ASKED}
    # N and B are not used here, but must allow any number of processes and any microbatch.
    size = {"prompts_per_epoch": report.processes(), "images_per_prompt": 2**20}
    return prdp.resolved(prdp.Config(**taken | size))


def choose_prompts(path: str, limit: int | None, seed: int) -> tuple[list[str], list[int]]:
    """A file's prompts, and the indices of those to draw: all, or `limit` of them, by the seed."""
    prompts = prdp.load_prompts(path)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return prompts, sorted(order[:limit].tolist())


def draw(
    config: prdp.Config, models: prdp.Models, prompts: list[str], indices: list[int], images: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`images` pictures of each of some prompts (P*S, 3, H, W), and their rewards, each (P, S)."""
    chosen = [prompts[n] for n in indices]
    generators = prdp.image_generators(config.seed, 0, indices, images)
    trajectories = prdp.sample_prompts(models, models.policy, chosen, generators)
    pictures = prdp.decode(models, trajectories.latents[:, -1])
    total = models.reward(pictures, [prompt for prompt in chosen for _ in range(images)])
    parts = models.reward.parts | ({"sum": total} if len(models.reward.parts) > 1 else {})
    return pictures.cpu(), {name: x.cpu().view(-1, images) for name, x in parts.items()}


def measure(
    config: prdp.Config, models: prdp.Models, file: str, prompts: list[str], indices: list[int],
    samples: int, done: dict,
) -> Iterator[None]:  # fmt: skip
    """Fill `done`, prompt -> {reward: its S numbers}, and yield whenever it has grown.

    Prompts go in chunks, to the processes in turn. A chunk is always of the same prompts, whatever
    the processes and wherever an earlier evaluation was stopped: so its bits are the same.
    """
    size = max(1, config.microbatch // samples)
    chunks = [indices[first : first + size] for first in range(0, len(indices), size)]
    todo = [chunk for chunk in chunks if prompts[chunk[0]] not in done]
    with report.progress(Path(file).name, len(todo)) as bar:
        for first in range(0, len(todo), report.processes()):
            drawn = {}
            for chunk in todo[first:][report.rank() : report.rank() + 1]:  # this process's, if any
                _, rewards = draw(config, models, prompts, chunk, samples)
                for row, n in enumerate(chunk):
                    drawn[prompts[n]] = {name: x[row].tolist() for name, x in rewards.items()}
            done |= report.merge(drawn)
            yield
            bar.update(min(report.processes(), len(todo) - first))


def tabulate(rewards: dict, chosen: dict, labels: list[str], base: str | None) -> list[dict]:
    """A row for each file, reward and model."""
    table = []
    for file, (prompts, indices) in chosen.items():
        done = [[rewards[file][label][prompts[n]] for n in indices] for label in labels]
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
    titles = f"{'prompts':>20} {'reward':>16} {'model':>16} {'images':>7} {'mean':>18}"
    report.say(f"{titles} {'difference':>20} {'wins':>6}")
    for row in table:
        line = f"{row['prompts']:>20} {row['reward']:>16} {row['model']:>16} {row['images']:>7}"
        line += f" {row['mean']:>8.4f} +- {row['standard_error']:.4f}"
        if "difference" in row:
            rise = f"{row['difference']:>+10.4f} +- {row['difference_error']:.4f}"
            line += f" {rise} {row['win_rate']:>6.1%}"
        report.say(line)


def main(argv: list[str] | None = None) -> None:
    with command("evaluate.py"):
        device = report.start_processes()
        args = parse_args(sys.argv[1:] if argv is None else argv)
        folders, base, settings = find_models(args.models, args.against)
        config = make_config(settings, vars(args))
        samples, limit = args.samples_per_prompt, args.max_prompts
        chosen = {file: choose_prompts(file, limit, config.seed) for file in config.prompts}
        fewest = min(len(indices) for _, indices in chosen.values())
        if min(samples, fewest, limit or 1) < 1 or samples == fewest == 1:
            raise InputError(f"--samples-per-prompt {samples}, --max-prompts {limit}: too few.")
        out = Path(args.out or Path(settings.get("run", ""), "evaluation"))
        asked = {name: getattr(config, name) for name in SETTINGS}
        asked |= {"samples_per_prompt": samples, "max_prompts": limit}
        asked["reward_digest"] = report.digest(f.read_bytes() for f in reward_files(config.reward))
        asked["prompts_digest"] = report.digest(t.encode() for p, _ in chosen.values() for t in p)
        path, shown = out / "evaluation.json", {}
        record = {"settings": json.loads(json.dumps(asked)), "digests": {}, "rewards": {}}
        if report.on_rank_0(path.is_file):
            with reading(f"--out {out}, choose another folder"):
                found = report.on_rank_0(lambda: json.loads(path.read_text()))
                report.require_same(dict(found["settings"]), record["settings"], set())
                record |= {name: dict(found[name]) for name in ("digests", "rewards")}
        for label, folder in folders.items():
            own = replace(config, model=folder)
            models = prdp.load_models(own, device)._replace(reference=None)  # frees its network
            digest = report.weights_digest(models.pipe)
            if record["digests"].setdefault(label, digest) != digest:
                raise InputError(f"--out {out}: holds rewards of another {label}; choose another.")
            for file, (prompts, indices) in chosen.items():
                done = record["rewards"].setdefault(file, {}).setdefault(label, {})
                for _ in measure(config, models, file, prompts, indices, samples, done):
                    report.write_json(path, record)
            prompts, indices = next(iter(chosen.values()))
            some = indices[:: -(-len(indices) // 8)]
            images, rewards = draw(config, models, prompts, some, 2)
            total = list(rewards.values())[-1].flatten()
            shown[label] = report.Samples([prompts[n] for n in some], images, total)
            del models  # before the next are loaded

        with reading(f"--out {out}, choose another folder"):
            record["table"] = tabulate(record["rewards"], chosen, list(folders), base)
        report.write_json(path, record)
        print_table(record["table"])
        report.plot_pairs(out / "evaluation.png", shown)
        report.say(f"see {out / 'evaluation.png'}")
        report.end_processes()


if __name__ == "__main__":
    main()
