"""The paper's evaluation protocol (Sec. 4.1): rewards of images that models draw from equal noise.

    python evaluate.py runs/toy --prompts prompts/shapes.txt --samples-per-prompt 8
    python evaluate.py MODEL OTHER --against BASE --reward hpsv2=1 aesthetic=0 --max-prompts 500

MODEL: a run, one of its epochs/, a pipeline's folder or a hub id. What is not given is the first
run's, or Table 4's. Prints mean, paired difference, their standard errors over prompts, and wins.
"""

import argparse
import copy
import itertools
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import prdp
from rewards import Reward, load_reward
from stable_diffusion import grey_picture
from support import report, run_folder
from support.cli import Parser, UserError, command, resuming
from support.distributed import end_processes, gather_objects, print0, processes, shard
from support.distributed import start_processes
from support.machine import own_state
from support.settings import absolute, model_path, resolve

SETTINGS = ("reward", "prompts", "seed", "ddpm_steps", "guidance_scale", "dtype", "microbatch")
FLAGS = (*SETTINGS, "offload", "compile")  # fields of prdp.Config
SAMPLERS = {  # of diffusers, over the model's own noise schedule
    "policy": "",  # the chain that was trained
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


def find_model(name: str) -> tuple[str, dict]:
    """The folder or hub id of a model, and the settings of the run that made it, if one did."""
    folder = Path(absolute(name))
    run = folder.parent.parent if folder.parent.name == "epochs" else folder
    if (folder / "model_index.json").is_file() or not (run / "config.json").is_file():
        return model_path(name), {}

    record = run_folder.read_json(run / "config.json", f"{name}: config.json")
    done = max([1, *(row["epoch"] for row in run_folder.read_metrics(run))])
    pipeline = folder / "pipeline"
    epoch = 0
    if pipeline.is_dir():
        epoch = run_folder.read_json(pipeline / "prdp.json", f"{pipeline}: prdp.json")["epoch"]
    elif run != folder:
        raise UserError(f"{folder}: has no pipeline/; of adapters: docs/running.md#adapters-alone.")
    if run == folder and epoch < done:
        remedy = f"{resuming(record.get('program'), run)} --epochs {done} makes it"
        raise UserError(f"{run}: has no pipeline/ of epoch {done}; when it has ended, {remedy}.")
    return str(pipeline), {**record, "out": run / "evaluation" / f"{epoch:04d}"}


def labels_of(paths: list[str]) -> list[str]:
    """What tells paths apart: their last parts, or where two are the same the whole."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths


class Plan(NamedTuple):
    """What an evaluation draws and compares."""

    config: prdp.Config
    folders: dict[str, str]  # label -> a model
    base: str | None  # the label of the one that others are compared to
    began: dict[str, dict]  # its digest when the run began from it
    samplers: list[str]
    samples: int  # images a prompt
    prompts: dict[str, dict]  # by file; each its place there, which decides its noise
    out: Path


def make_plan(args: argparse.Namespace) -> Plan:
    """The arguments, with what is not given from the first run; UserError for what cannot run."""
    models = [find_model(name) for name in args.models]
    run = next((settings for _, settings in models if settings), {})
    base = run.get("model")
    name = "base"
    labels = labels_of(args.models)
    if args.against:
        base = find_model(args.against)[0]
        name, *labels = labels_of([args.against, *args.models])
    folders = dict(zip(labels, [folder for folder, _ in models], strict=True))
    if base not in (None, *folders.values()):
        if name in folders:
            name = "pretrained base"
        folders = {name: base, **folders}
    if min(args.samples_per_prompt, args.max_prompts) < 1:
        raise UserError("--samples-per-prompt and --max-prompts: must be at least 1.")
    given = {name: run[name] for name in SETTINGS if name in run}
    given |= {name: value for name, value in vars(args).items() if name in FLAGS}
    # For --dtype auto: nothing is clipped. No epoch's images bound the microbatch.
    sizes = dict(updates_per_epoch=1, prompts_per_epoch=processes(), images_per_prompt=2**20)
    config = resolve(prdp.Config(**sizes, **given))
    if not config.prompts or not config.reward:
        raise UserError("the run began without files or reward: give --prompts and --reward.")
    prompts = {}
    for file in config.prompts:
        every = prdp.load_prompts(file)
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(every), generator=generator)
        numbers = sorted(order[: args.max_prompts].tolist())
        prompts[file] = {every[n]: n for n in numbers}
    out = Path(absolute(args.out or run.get("out", "evaluation")))
    label = next((label for label in folders if folders[label] == base), None)
    began = {}
    if run and not args.against:
        began = {label: {"model_digest": run["model_digest"]}}
    return Plan(config, folders, label, began, args.sampler, args.samples_per_prompt, prompts, out)


def draw(plan: Plan, models: prdp.Models, sampler: str, prompts: dict, images: int) -> tuple:
    """Pictures (P*S, 3, H, W), their rewards (P*S,), and for each of P prompts S numbers by reward;
    x_T is the same for all models and samplers."""
    config, sd = plan.config, models.sd
    size = models.policy.microbatch
    generators = prdp.image_generators(config.seed, 0, [*prompts.values()], images)
    if sampler == "policy":
        x_0 = prdp.sample_prompts(models, models.policy, [*prompts], generators).latents[:, -1]
    else:
        import diffusers

        pipe = copy.copy(sd.pipe)  # whose scheduler stays the policy's
        kind = getattr(diffusers, SAMPLERS[sampler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        texts = [prompt for prompt in prompts for _ in range(images)]
        parts = []
        with sd.at_work(sd.text_encoders), sd.autocast(sd.vae):
            for first in range(0, len(texts), size):
                drawn = pipe(
                    texts[first : first + size],
                    generator=generators[first : first + size],
                    num_inference_steps=config.ddpm_steps,
                    guidance_scale=config.guidance_scale,
                    output_type="latent",
                )
                parts.append(drawn.images.float())
        x_0 = torch.cat(parts)
        if not x_0.isfinite().all():
            raise UserError(f"--sampler {sampler}: cannot serve this model's noise schedule.")
    pictures, total, scores = prdp.score_images(models, x_0, [*prompts])
    if len(scores) > 1:
        scores["weighted sum"] = total  # no function can be called that
    rewards = {prompt: {} for prompt in prompts}
    for name, x in scores.items():
        for prompt, row in zip(prompts, x.view(-1, images).tolist(), strict=True):
            rewards[prompt][name] = row
    return pictures.cpu(), total.cpu(), rewards


def measure(plan: Plan, label: str, reward: Reward, record: dict) -> report.Samples:
    """Add a model's rewards to `record`, saved as they come; a few pictures of the last sampler."""
    config = replace(plan.config, model=plan.folders[label])
    models = prdp.load_models(config, start_processes(), reward, learns=False)
    inputs = run_folder.model_digest(models.sd)
    before = record["inputs"].setdefault(label, inputs)
    run_folder.require_same(before, inputs, label, "give a new --out, and the base by --against")

    for sampler, (file, chosen) in itertools.product(plan.samplers, plan.prompts.items()):
        of_sampler = record["rewards"].setdefault(sampler, {})
        rewards = of_sampler.setdefault(file, {}).setdefault(label, {})
        missing = [pair for pair in chosen.items() if pair[0] not in rewards]
        name = Path(file).name
        print0(f"{label}, {sampler}, {name}: {len(missing)} of {len(chosen)} prompts to draw")
        # A microbatch a process at a time, of the same prompts whatever the number of processes.
        step = processes() * max(1, models.policy.microbatch // plan.samples)
        started = time.perf_counter()
        for first in range(0, len(missing), step):
            drawn = {}
            if own := dict(missing[first:][shard(step)]):
                *_, drawn = draw(plan, models, sampler, own, plan.samples)
            for part in gather_objects(drawn):
                rewards |= part
            run_folder.write_json(plan.out / "evaluation.json", record)
            if first == 0:
                whole = (time.perf_counter() - started) * len(missing) / step
                print0(f"  takes about {report.duration(whole)}")
    few = dict([*chosen.items()][:8])
    pictures, totals, _ = draw(plan, models, sampler, few, 2)
    return report.Samples([*few], pictures, totals)


def summary(x: Tensor, form: str) -> tuple:
    """Mean and standard error of rewards (P, S), None for a single image, and both as text."""
    mean, error = report.mean_and_error(x)
    if x.numel() == 1:
        return mean, None, format(mean, form)
    return mean, error, f"{mean:{form}} +- {error:.2g}"


def tabulate(plan: Plan, rewards: dict) -> dict:
    """Print a table for each file and reward, of at most 80 columns; its rows by sampler."""
    table = {sampler: [] for sampler in plan.samplers}
    for shown, file in zip(labels_of([*plan.prompts]), plan.prompts, strict=True):
        prompts = [*plan.prompts[file]]
        first = next(iter(rewards[plan.samplers[0]][file].values()))
        for name in first[prompts[0]]:
            print0(f"\n{shown[-36:]}, {name}: {len(prompts)} x {plan.samples} images")
            for sampler in plan.samplers:
                print0(f"{sampler:<33}mean +- se       difference +- se")
                scores = {}  # label -> (P, S)
                for label in plan.folders:
                    by_prompt = rewards[sampler][file][label]
                    numbers = [by_prompt[prompt][name] for prompt in prompts]
                    scores[label] = torch.tensor(numbers, dtype=torch.float64)
                for label, x in scores.items():
                    row = {"prompts": shown, "reward": name, "model": label, "images": x.numel()}
                    row["mean"], row["standard_error"], text = summary(x, ".5g")
                    line = f"  {label[-78:]:<18}"
                    if len(label) > 18:  # alone in its line
                        line += "\n".ljust(21)
                    line += f" {text:>22}"
                    if plan.base not in (None, label):
                        rise = x - scores[plan.base]
                        row["difference"], row["difference_error"], text = summary(rise, "+.5g")
                        row["win_rate"] = (rise.sign().mean().item() + 1) / 2
                        line += f" {text:>22}  wins {row['win_rate']:.1%}"
                    print0(line)
                    table[sampler].append(row)
    return table


@own_state()
def evaluate(args: argparse.Namespace) -> None:
    """Draw, score and compare, going on where an evaluation with this --out was stopped."""
    device = start_processes()
    plan = make_plan(args)

    for folder in plan.folders.values():
        picture = grey_picture(folder)
    reward = load_reward(plan.config.reward, "cpu")
    chosen = [*plan.prompts.values()]  # with each prompt's place
    reward.score(picture.to(device), [min(chosen[0])])
    settings = {name: getattr(plan.config, name) for name in SETTINGS}
    settings |= {"samples_per_prompt": plan.samples, "max_prompts": args.max_prompts}
    settings |= run_folder.digests(reward, [str(chosen)])
    record = {"settings": settings, "inputs": plan.began, "rewards": {}, "table": {}}
    path = plan.out / "evaluation.json"
    page = path.with_suffix(".png")
    with run_folder.only_writer(plan.out):
        if path.is_file() or page.is_file():
            before = run_folder.read_json(path, f"--out {plan.out}: its evaluation.json")
            if not record.keys() <= before.keys():
                raise UserError(f"{path}: is no evaluation's; choose another --out.")
            run_folder.require_same(before["settings"], settings, f"--out {plan.out}")
            record = {**before, "inputs": plan.began | before["inputs"]}
        samples = {label: measure(plan, label, reward, record) for label in plan.folders}
        record["table"] |= tabulate(plan, record["rewards"])
        run_folder.write_json(path, record)
        report.draw_images(page, samples)
        print0(f"see {page}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--against", metavar="BASE", help="default: what the first run began from")
    parser.add_argument("--sampler", nargs="+", choices=SAMPLERS, default=["policy"])
    parser.add_argument("--samples-per-prompt", type=int, default=64)
    parser.add_argument(
        "--max-prompts", type=int, default=1_000_000, help="of each file, drawn by the seed"
    )
    parser.add_argument("--out", help="default: evaluation/EPOCH in the first run, or evaluation/")
    parser.add_fields(field for field in fields(prdp.Config) if field.name in FLAGS)
    with command("evaluate.py"):
        evaluate(parser.parse_args(argv))
        end_processes()


if __name__ == "__main__":
    main()
