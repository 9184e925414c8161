"""The paper's evaluation protocol (Sec. 4.1): rewards of many images of every prompt, from the same
noise for every model.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward "hpsv2=1,aesthetic=0" --max-prompts 500
    torchrun --nproc-per-node 8 evaluate.py runs/large

A model is a run of prdp.py, a diffusers folder or a hub id. Steps, guidance, reward and prompts are
the first run's, or Table 4's, unless given. Prints a row for each file, reward and model: mean,
standard error over prompts, and against the base the paired difference and the share of images that
win (ties count half). Writes evaluation.json, with every reward, and evaluation.png. A stopped
evaluation goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import prdp
import report
from rewards import InputError, Parser, command, reading, reward_files

# Fields of prdp.Config that decide the result, and that may be asked for.
SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
ASKED = (*SETTINGS, "offload")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; fields of prdp.Config that are not given are absent."""
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--samples-per-prompt", type=int, default=64, metavar="S")
    parser.add_argument(
        "--max-prompts", type=int, metavar="N", help="of each file, drawn by --seed"
    )
    parser.add_argument("--out", help="default: evaluation/ in the first run, or here")
    for f in dataclasses.fields(prdp.Config):
        if f.name in ASKED:
            options = {"type": type(f.default), "default": argparse.SUPPRESS, **f.metadata}
            parser.add_argument(prdp.option(f.name), **options)
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
                settings = settings or dict(json.loads((run / "config.json").read_text()))
            folder = str(run / "pipeline")
        label = run.name if run.name not in folders else name
        folders[label] = folder
    base = against or settings.get("model")
    if base is None or base in folders.values():
        return folders, next((label for label in folders if folders[label] == base), None), settings
    return {"base": base, **folders}, "base", settings


def make_config(settings: dict, given: dict) -> prdp.Config:
    """What is given, over the first run's settings, over Table 4's."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(prdp.Config)}
    taken = {name: kinds[name](settings[name]) for name in SETTINGS if name in settings}
    return prdp.Config(**taken | {name: given[name] for name in given if name in ASKED})


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
    parts = dict(models.reward.parts)
    if len(parts) > 1:
        parts["sum"] = total
    return pictures.cpu(), {name: x.cpu().view(-1, images) for name, x in parts.items()}


def measure(
    config: prdp.Config, models: prdp.Models, file: str, prompts: list[str], indices: list[int],
    samples: int, done: dict, save: Callable,
) -> None:  # fmt: skip
    """Fill `done`, prompt -> {reward: its S numbers}, and `save` as it grows.

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
            save()
            bar.update(min(report.processes(), len(todo) - first))


def show(config: prdp.Config, models: prdp.Models, chosen: dict) -> report.Samples:
    """2 images of each of 8 prompts, spread over the files."""
    per_file = -(-8 // len(chosen))
    names, pictures, rewards = [], [], []
    for prompts, indices in chosen.values():
        some = indices[:: max(1, len(indices) // per_file)][:per_file]
        images, scores = draw(config, models, prompts, some, 2)
        names += [prompts[n] for n in some]
        pictures.append(images)
        rewards.append(list(scores.values())[-1].flatten())
    return report.Samples(names, torch.cat(pictures), torch.cat(rewards))


def load_record(out: Path, asked: dict) -> dict:
    """evaluation.json of an evaluation that was stopped, or a new one."""
    path = out / "evaluation.json"
    if not path.is_file():
        return {"settings": asked, "digests": {}, "rewards": {}}
    with reading(f"--out {out}, choose another folder"):
        record = json.loads(path.read_text())
        report.require_same(dict(record["settings"]), asked, set())
        record |= {name: dict(record[name]) for name in ("digests", "rewards")}
    return record


def save_record(out: Path, record: dict) -> None:
    if report.rank() == 0:
        report.write_json(out / "evaluation.json", record)


def tabulate(rewards: dict, chosen: dict, labels: list[str], base: str | None) -> list[dict]:
    """A row for each file, reward and model."""
    table = []
    for file, (prompts, indices) in chosen.items():
        done = [[rewards[file][label][prompts[n]] for n in indices] for label in labels]
        for name in done[0][0]:
            scores = {
                label: torch.tensor([parts[name] for parts in by_prompt])  # (P, S)
                for label, by_prompt in zip(labels, done, strict=True)
            }
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
    print(f"{titles} {'difference':>20} {'wins':>6}")
    for row in table:
        line = f"{row['prompts']:>20} {row['reward']:>16} {row['model']:>16} {row['images']:>7}"
        line += f" {row['mean']:>8.4f} +- {row['standard_error']:.4f}"
        if "difference" in row:
            line += f" {row['difference']:>+10.4f} +- {row['difference_error']:.4f}"
            line += f" {row['win_rate']:>6.1%}"
        print(line)


def main(argv: list[str] | None = None) -> None:
    with command("evaluate.py"):
        device = report.start_processes()
        args = parse_args(sys.argv[1:] if argv is None else argv)
        folders, base, settings = find_models(args.models, args.against)
        config = prdp.resolved(make_config(settings, vars(args)))
        samples, default = args.samples_per_prompt, Path("evaluation")
        if settings:
            default = Path(args.models[0]) / "evaluation"
        out = Path(args.out or default)
        chosen = {f: choose_prompts(f, args.max_prompts, config.seed) for f in config.prompts}
        for name in ("samples_per_prompt", "max_prompts"):
            if (number := getattr(args, name)) is not None and number < 1:
                raise InputError(f"{prdp.option(name)} {number}: must be at least 1.")

        asked = {name: getattr(config, name) for name in SETTINGS}
        asked |= {"samples_per_prompt": samples, "max_prompts": args.max_prompts}
        asked["reward_digest"] = report.digest(f.read_bytes() for f in reward_files(config.reward))
        asked["prompts_digest"] = report.digest(
            prompt.encode() for prompts, _ in chosen.values() for prompt in prompts
        )
        record = report.share(load_record(out, json.loads(json.dumps(asked))))
        shown = {}
        for label, folder in folders.items():
            own = dataclasses.replace(config, model=folder)
            models = prdp.load_models(own, device)._replace(reference=None)
            pipe = models.pipe
            digest = report.weights_digest(pipe.unet, pipe.vae, pipe.text_encoder)
            if record["digests"].setdefault(label, digest) != digest:
                raise InputError(f"--out {out}: holds rewards of another {label}; choose another.")
            for file, (prompts, indices) in chosen.items():
                done = record["rewards"].setdefault(file, {}).setdefault(label, {})
                save = partial(save_record, out, record)
                measure(own, models, file, prompts, indices, samples, done, save)
            shown[label] = show(own, models, chosen)
            del models, pipe  # and their memory, before the next are loaded

        if report.rank() == 0:
            with reading(f"--out {out}, choose another folder"):
                table = tabulate(record["rewards"], chosen, list(folders), base)
            record["table"] = [  # NaN, the error of a single number, is no JSON
                {name: None if x != x else x for name, x in row.items()} for row in table
            ]
            save_record(out, record)
            print_table(table)
            report.plot_pairs(out / "evaluation.png", shown)
            print(f"see {out / 'evaluation.png'}")
        report.end_processes()


if __name__ == "__main__":
    main()
