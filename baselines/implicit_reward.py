"""The implicit reward of Diffusion-DPO (Wallace et al., CVPR 2024): which picture a model prefers.

    python baselines/implicit_reward.py runs/people --pairs validation.jsonl
    python baselines/implicit_reward.py MODEL --against BASE --pairs validation.jsonl --draws 100

Read it beside the argument of sigma in their Eq. 14, Sec. 5.5 and Table 2. A model is a run, a
pipeline's folder or a hub id. For each of people's pairs, a file as diffusion_dpo.py's, it
estimates by how much the implicit reward of the chosen picture is above that of the rejected one:
in the mean over draws of a timestep and noise, which both pictures and both models share. Printed
are the mean, and the accuracy, how often the chosen one has more; implicit_reward.json in --out has
all.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prdp
from baselines.diffusion_dpo import denoising_errors
from baselines.pairs import NoReward, People
from evaluate import find_model
from support.cli import Parser, UserError, command
from support.distributed import draw_noise, end_processes, gather_objects, image_generators
from support.distributed import print0, processes, rank, start_processes
from support.machine import own_state
from support.report import mean_and_error
from support.run_folder import model_digest, only_writer, read_json, require_same
from support.run_folder import weights_digest, write_json
from support.settings import absolute, resolve

FLAGS = ("seed", "dtype", "microbatch", "offload", "compile")  # fields of prdp.Config


def reward_differences(errors: Tensor, errors_ref: Tensor, beta: float) -> Tensor:
    """The implicit reward of the chosen picture minus that of the rejected one, sigma's argument in
    Eq. 14 in the mean over draws: (P,). Errors (P, draws, 2), the chosen first."""
    chosen, rejected = (errors - errors_ref).mean(1).unbind(1)
    return -beta / 2 * (chosen - rejected)


@torch.no_grad()
def measure(models: prdp.Models, people: People, draws: int, seed: int) -> Tensor:
    """Denoising errors of all pairs, (P, draws, 2); timesteps and noise are a pair's own, the same
    for every model, and depend on no microbatch or number of processes."""
    policy, sd = models.policy, models.sd
    train_steps = sd.noise_settings["num_train_timesteps"]
    found = {}
    for n in range(rank(), len(people.records), processes()):
        pair = people.load(sd, seed, 0, torch.tensor([n]), mirror=False)
        *_, generator = image_generators(seed, 0, [n], 3)  # the first two are of the pictures
        timesteps = torch.randint(train_steps, (draws,), generator=generator).to(sd.device)
        noise = draw_noise([generator], draws, sd.latent_shape)[0].to(sd.device)
        errors = []
        for part in torch.arange(draws).split(policy.microbatch):
            inputs = (x.expand(len(part), *x.shape[1:]) for x in pair)
            drawn = (timesteps[part], noise[part])
            errors.append(denoising_errors(policy, sd.pipe.scheduler, *inputs, *drawn))
        found[n] = torch.cat(errors).cpu()
    for part in gather_objects(found):
        found |= part
    return torch.stack([found[n] for n in range(len(people.records))])


@own_state()
def score(args: argparse.Namespace) -> None:
    """Measure both models, one after the other, compare, print and write; UserError for models that
    cannot be compared."""
    device = start_processes()
    folder, run = find_model(args.model)
    base = find_model(args.against)[0] if args.against else run.get("model")
    if base is None:
        raise UserError(f"{args.model}: is no run; name what it began from: --against BASE.")
    beta = run.get("beta", 5000.0) if args.beta is None else args.beta
    if args.draws < 1 or not 0 < beta < math.inf:
        raise UserError("--draws and --beta: must be above 0.")
    given = {name: value for name, value in vars(args).items() if name in FLAGS}
    # No epoch's images bound the microbatch here.
    config = prdp.Config(prompts_per_epoch=processes(), images_per_prompt=2**20, **given)
    config = resolve(config)
    people = People(absolute(args.pairs))
    out = Path(absolute(args.out or run.get("out", "evaluation")))
    path = out / "implicit_reward.json"
    settings = {"pairs_digest": people.digest, "draws": args.draws, "seed": config.seed}
    settings |= {"beta": beta, "finetuned": folder, "against": base, "dtype": config.dtype}
    with only_writer(out):
        before = read_json(path, str(path)) if path.is_file() else {}
        require_same(before, settings, f"--out {out}")
        errors, frozen = [], []
        for name, model in (("finetuned", folder), ("against", base)):
            config = replace(config, model=model)
            models = prdp.load_models(config, device, NoReward({}), learns=False)
            drawn_by = model_digest(models.sd)
            if model == base and not args.against:  # as the run began from it
                require_same(run, drawn_by, args.model, "name it by --against")
            settings[f"{name}_model_digest"] = drawn_by["model_digest"]
            require_same(before, settings, f"--out {out}")
            digest = weights_digest([models.sd.vae, models.sd.text_encoders])
            frozen.append((digest, models.sd.noise_settings))
            if frozen[0] != frozen[-1]:
                why = "has another VAE, text encoder or noise schedule"
                raise UserError(f"{base}: {why} than {args.model}: errors cannot be compared.")
            errors.append(measure(models, people, args.draws, config.seed))
            del models  # and its memory

        differences = reward_differences(*errors, beta)
        if not differences.isfinite().all():
            raise UserError("an implicit reward is not finite; try another --dtype.")
        print0(f"{args.model} against {base}: {len(differences)} pairs, {args.draws} draws each")
        record = {**settings, "pairs": people.file}
        right = (differences.sign() + 1) / 2  # a tie, of equal models, is half right
        for name, x in {"difference": differences, "accuracy": right}.items():
            mean, error = mean_and_error(x[:, None])
            error = None if math.isnan(error) else error
            record |= {name: mean, f"{name}_se": error}
            print0(f"  {name:<12}{mean:>9.4g}" + (f" +- {error:.2g}" if error is not None else ""))
        record["differences"] = differences.tolist()
        write_json(path, record)
        print0(f"see {path}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run, folder or hub id")
    parser.add_argument("--pairs", required=True, help="people's choices, .jsonl")
    parser.add_argument("--against", metavar="BASE", help="default: what the run began from")
    parser.add_argument("--draws", type=int, default=10, help="a pair's (default: 10, as theirs)")
    parser.add_argument("--beta", type=float, help="of Eq. 14 (default: the run's, else 5000)")
    parser.add_argument("--out", help="default: evaluation/EPOCH in the run, or evaluation/")
    parser.add_fields(field for field in fields(prdp.Config) if field.name in FLAGS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with command("baselines/implicit_reward.py"):
        score(parse_args(argv))
        end_processes()


if __name__ == "__main__":
    main()
