"""A race on the toy: mean reward against images drawn, PRDP and its baselines at their best.

    python toy/race.py          # all of it, some hours; stopped, it goes on where it was
    python toy/race.py --show   # the table and the picture of what toy/race.json has so far

Decided before any number: every arm sweeps its learning rate first, then its own other setting at
the best rate (clip range, inverse temperature, beta), then K, on seed 900 up to 1,920 images; where
the best lies at an edge, the next value beyond is tried; at most 8 settings an arm. Then seeds 0 to
4 are drawn to 1,920 images and two of them to 6,400. No reported number uses the sweep's seed or
its noise. Each run is a command that anybody can repeat, on one thread; it is judged at its stops
by pictures of the same prompts and noise, of prompts that are finetuned on and of others, and by
its KL on these: the log-ratio to the pretrained model, summed over a trajectory, in nats.

Added when there were numbers, to say where they come from: ONE_THING.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import prdp
from support import cli, run_folder

RECORD = HERE / "race.json"
PICTURE = HERE / "race.png"
RATE, CLIP, UPDATES = "--learning-rate", "--clip-range", "--updates-per-epoch"


class Arm(NamedTuple):
    program: str
    flags: tuple[str, ...]  # which all its runs have
    axes: dict[str, tuple[float, ...]]  # what is swept, in this order, each from its first value
    seconds: float  # of one core for an epoch, an estimate for the forecast


CLIPPED = {RATE: (6e-4, 2e-4, 2e-3), CLIP: (1e-3, 1e-2, math.inf), UPDATES: (4, 1)}
DDPO, DPO = "baselines/ddpo.py", "baselines/diffusion_dpo.py"
ON_POLICY = ("--loss", "ddpo-sf", UPDATES, "1")
ARMS = {
    "PRDP": Arm("prdp.py", (), CLIPPED, 12.6),
    "DDPO_IS": Arm(DDPO, (), CLIPPED, 3.5),
    "DDPO group": Arm(DDPO, ("--advantage", "group"), CLIPPED, 3.5),
    "DDPO_SF": Arm(DDPO, ON_POLICY, {RATE: (6e-4, 2e-4, 2e-3)}, 3.0),
    "RWR": Arm(
        "baselines/rwr.py",
        (),
        {RATE: (2e-4, 6e-4, 6e-5), "--inverse-temperature": (100, 30, 300), UPDATES: (16, 4)},
        4.5,
    ),
    "Diffusion-DPO": Arm(
        DPO,
        ("--online",),
        {RATE: (2e-4, 6e-4, 6e-5), "--beta": (5000, 1500, 15000), UPDATES: (16, 4)},
        7.0,
    ),
}
# To 512 images, arms that differ from one of those in one thing: (program and flags of, settings
# of, what differs).
ONE_THING = {
    "PRDP at the rate of RWR": ("PRDP", "PRDP", {RATE: 2e-4}),
    "PRDP without its clip": ("PRDP", "PRDP", {CLIP: math.inf}),
    "PRDP with RWR's 16 updates": ("PRDP", "PRDP", {UPDATES: 16}),
    "RWR with PRDP's 4 updates": ("RWR", "RWR", {UPDATES: 4}),
    "DDPO_IS with group's advantages": ("DDPO group", "DDPO_IS", {}),
}
MOST = 8  # settings an arm
SWEEP_SEED, SWEEP_NOISE, NOISE = 900, 900, 1000
SEEDS, LONG_SEEDS = (0, 1, 2, 3, 4), (0, 1)
STOPS, LONG_STOPS = (8, 16, 30), (50, 100)  # epochs of 64 images: 512, 1,024, 1,920; 3,200, 6,400
IMAGES = 64  # an epoch's


# ---- Runs, and the record: an entry for each run and stop ----------------------------------------


def read_record() -> dict:
    if RECORD.exists():
        return json.loads(RECORD.read_text())
    names = [platform.processor() or platform.machine(), f"python {platform.python_version()}"]
    return {"machine": ", ".join([*names, f"torch {torch.__version__}"]), "runs": {}}


def write_record(record: dict) -> None:
    with run_folder.writing(RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def module_of(arm: Arm) -> ModuleType:
    return importlib.import_module(arm.program.removesuffix(".py").replace("/", "."))


def command_of(arm: Arm, settings: dict[str, float], seed: int) -> list[str]:
    """A run's program and flags, without its epochs and folder."""
    flags = [text for name, value in settings.items() for text in (name, f"{value:g}")]
    return [arm.program, "--preset", "toy", *arm.flags, *flags, "--seed", str(seed)]


def go_on(command: list[str], folder: Path, epochs: int) -> float:
    """Begin a run, or go on with it, to an epoch; the seconds of a core that it took."""
    program, *flags = command
    if (folder / "checkpoint").is_dir():
        flags = ["--resume", str(folder)]
    else:
        flags += ["--out", str(folder)]
    flags += ["--epochs", str(epochs), "--sample-every", "1000"]
    print(f"python {program} {shlex.join(flags)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, program, *flags], cwd=ROOT, env=environment, capture_output=True
    )
    if done.returncode:
        sys.exit(done.stderr.decode())
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


@torch.no_grad()
def judge(arm: Arm, folder: Path | None, noise: int) -> dict[str, float]:
    """Of the model in a run's checkpoint (of none: of the pretrained one), on 4 pictures for each
    of 32 prompts that it is finetuned on, and of 32 others."""
    flags = ["--resume", str(folder)] if folder else ["--preset", "toy"]
    models = prdp.load_models(module_of(arm).parse_args(flags), torch.device("cpu"))
    if folder:
        models.sd.unet.load_state_dict(run_folder.read_state(folder)["unet"])
    entry = {}
    for file, prefix in (("shapes.txt", ""), ("shapes_unseen.txt", "unseen_")):
        prompts = prdp.load_prompts(ROOT / "prompts" / file)
        prompts = [prompts[n * len(prompts) // 32] for n in range(32)]
        generators = prdp.image_generators(noise, 0, range(32), 4)
        drawn = prdp.sample_prompts(models, models.policy, prompts, generators)
        _, rewards, _ = prdp.score_images(models, drawn.latents[:, -1], prompts)
        log_ratio = drawn.log_probs - prdp.score_trajectories(models.reference, drawn)
        kl = log_ratio.sum(1) * drawn.latents[0, 0].numel()
        entry[f"{prefix}reward"] = rewards.mean().item()
        entry[f"{prefix}kl"] = kl.mean().item()
    return entry


class NotRun(LookupError):
    """The record lacks a run, and none is to be started."""


class Race:
    """The record, and whether what it lacks is run (else it is NotRun)."""

    def __init__(self, record: dict, start: bool) -> None:
        self.record = record
        self.runs = record["runs"]
        self.start = start

    def run(self, arm: Arm, settings: dict[str, float], seed: int, stops: tuple) -> list[dict]:
        """A run's entries at its stops, in epochs; those that there are, if none is started."""
        command = command_of(arm, settings, seed)
        name = shlex.join(command)
        folder = ROOT / "runs" / "race" / run_folder.digest([name.encode()])
        entries = [f"{name} --epochs {stop}" for stop in stops]
        for stop, entry in zip(stops, entries, strict=True):
            if entry in self.runs:
                continue
            if not self.start:
                break
            again = 0.0  # of epochs that the record has, where the run begins anew
            if not folder.exists():
                again = sum(self.runs[e]["seconds"] for e in entries if e in self.runs)
            seconds = go_on(command, folder, stop) - again
            noise = SWEEP_NOISE if seed == SWEEP_SEED else NOISE
            self.runs[entry] = judge(arm, folder, noise) | {"seconds": seconds}
            print(self.runs[entry], flush=True)
            write_record(self.record)
        if self.start:
            shutil.rmtree(folder, ignore_errors=True)
        there = [self.runs[entry] for entry in entries if entry in self.runs]
        if not there:
            raise NotRun(name)
        return there

    def sweep(self, arm: Arm) -> dict[str, float]:
        """An arm's best settings."""
        best = {name: values[0] for name, values in arm.axes.items()}
        planned = 1 + sum(len(values) - 1 for values in arm.axes.values())
        for name, values in arm.axes.items():
            rewards = {}
            todo = list(values)
            while todo:
                settings = best | {name: todo.pop(0)}
                (entry,) = self.run(arm, settings, SWEEP_SEED, STOPS[-1:])
                rewards[settings[name]] = entry["reward"]
                top = max(rewards, key=rewards.get)
                if not todo and name != UPDATES and planned < MOST:
                    todo = beyond(list(rewards), top)
                    planned += len(todo)
            best[name] = top
        return best

    def final(self, arm: Arm, best: dict[str, float], seed: int) -> dict[int, dict]:
        """{epoch: entry} of a seed at the best settings."""
        stops = STOPS + LONG_STOPS if seed in LONG_SEEDS else STOPS
        return dict(zip(stops, self.run(arm, best, seed, stops), strict=False))


def beyond(values: list[float], best: float) -> list[float]:
    """The next value past the edge at which the best lies, if it does, by the axis's last step."""
    ordered = sorted(values)
    for edge, other in ((ordered[0], ordered[1]), (ordered[-1], ordered[-2])):
        if best == edge and math.isfinite(edge):
            return [float(f"{edge * edge / other:.2g}")]
    return []


def hours(runs: dict) -> float:
    """Of one core, for what is left of it: about, and at most."""
    epochs = MOST * STOPS[-1] + len(LONG_SEEDS) * LONG_STOPS[-1]
    epochs += (len(SEEDS) - len(LONG_SEEDS)) * STOPS[-1]
    total = sum(arm.seconds * epochs for arm in ARMS.values())
    for program, *_ in ONE_THING.values():  # with at most 4 times an epoch's updates
        total += 4 * ARMS[program].seconds * len(LONG_SEEDS) * STOPS[0]
    return (total - sum(entry["seconds"] for entry in runs.values())) / 3600


# ---- What it shows -------------------------------------------------------------------------------


def print_rows(name: str, best: dict[str, float], seeds: list[dict[int, dict]]) -> None:
    """An arm's command, and its rows of the table."""
    arm = ARMS[name]
    print(f"{name}: python {shlex.join(command_of(arm, best, 0))}")
    passes = module_of(arm).parse_args(command_of(arm, best, 0)[1:]).passes()
    for stop in (STOPS[0], STOPS[-1], LONG_STOPS[-1]):
        there = [seed for seed in seeds if stop in seed]
        if not there:
            continue
        entries = [seed[stop] for seed in there]
        mean = {key: sum(e[key] for e in entries) / len(entries) for key in entries[0]}
        rewards = [entry["reward"] for entry in entries]
        seconds = sum(e["seconds"] for seed in there for at, e in seed.items() if at <= stop)
        cells = [f"{stop * IMAGES:>8}", f"{len(there):>5}", f"{mean['reward']:>6.4f}"]
        cells += [f"{min(rewards):.4f} to {max(rewards):.4f}", f"{mean['unseen_reward']:>6.4f}"]
        cells += [f"{mean['kl']:>6.0f}", f"{sum(passes) * stop * IMAGES:>7.0f}"]
        print("  ".join([*cells, f"{seconds / len(there):>7.0f}"]))


def print_one_thing(race: Race, best: dict[str, dict]) -> None:
    """Rewards and KL of ONE_THING, of the seeds that are run long."""
    for name, (program, of, change) in ONE_THING.items():
        settings = best[of] | change
        runs = [race.run(ARMS[program], settings, seed, STOPS[:1])[0] for seed in LONG_SEEDS]
        cells = [f"{entry['reward']:.4f} (KL {entry['kl']:.0f})" for entry in runs]
        print(f"{name}, {STOPS[0] * IMAGES} images: {', '.join(cells)}")


def draw(results: dict[str, list[dict[int, dict]]], base: float) -> None:
    """race.png: reward over images drawn (thin: a seed), and over KL at 1,920 images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, seeds) in enumerate(results.items()):
        color = f"C{number}"
        for seed in seeds:
            images = [0, *(stop * IMAGES for stop in seed)]
            rewards = [base, *(entry["reward"] for entry in seed.values())]
            left.plot(images, rewards, color=color, alpha=0.3, linewidth=0.8)
            at = seed[STOPS[-1]]
            right.plot(at["kl"], at["reward"], "o", color=color)
        means = [base]
        for stop in STOPS:
            means.append(sum(seed[stop]["reward"] for seed in seeds) / len(seeds))
        images = [0, *(stop * IMAGES for stop in STOPS)]
        left.plot(images, means, "o-", color=color, linewidth=2.5, label=name)
    left.set(xlabel="images drawn", ylabel="mean reward, fixed prompts and noise")
    right.set(xlabel="KL to the pretrained model, nats, after 1,920 images", xscale="log")
    left.legend()
    with run_folder.writing(PICTURE) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--show", action="store_true", help="of what there is so far")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = read_record()
    race = Race(record, start=not args.show)
    if race.start:
        print(f"{hours(race.runs):.1f} hours of one core are left at most", flush=True)
        if "base" not in record:
            record["base"] = judge(ARMS["PRDP"], None, NOISE)

    best, results = {}, {}
    with contextlib.suppress(NotRun):  # with --show, of a race that is not over
        for name, arm in ARMS.items():
            best[name] = race.sweep(arm)
        results = {name: [] for name in ARMS}
        for seed in SEEDS:
            for name, arm in ARMS.items():
                results[name].append(race.final(arm, best[name], seed))
        print_one_thing(race, best)
    for command, entry in race.runs.items():
        if f"--seed {SWEEP_SEED}" in command:
            print(f"{entry['reward']:.4f}  {command}")
    if len(results.get("Diffusion-DPO", [])) < len(SEEDS):
        print("the race is not over: no table and no picture yet")
        return
    print("  images  seeds  reward  lowest, highest   unseen  KL, nats   passes  seconds")
    for name, seeds in results.items():
        print_rows(name, best[name], seeds)
    draw(results, record["base"]["reward"])


if __name__ == "__main__":
    with cli.command("toy/race.py"):
        main()
