"""The paper's claims on the toy: every experiment, through prdp.py's own functions, with its baselines.

    python toy/claims.py                   # everything: 183 runs, 5.7 core-hours on an AMD EPYC with other work
    python toy/claims.py --claim 3         # one claim again; the others keep what toy/claims.json holds
    python toy/claims.py --quick           # tiny sizes, one seed, 3 minutes; writes into its --out folder only

Writes toy/claims.json, toy/claim1.png to claim6.png, and the README's table. A run that was stopped goes on where it
was: finished runs are kept in the --out folder, and unfinished ones resume from their last checkpoint.

Three scales, all of 32 reward queries an epoch:
    small     16 prompts, each drawn about 5 times, 8 images a time (N = 4, B = 8, K = 4, 20 epochs)
    large     288 prompts, each drawn about 1.4 times, 4 images a time (N = 8, B = 4, K = 1, 50 epochs)
    large-k4  the same prompts with K = 4, where clipping can act (10 epochs)
Every method gets the same queries, epochs and seeds. The learning rate, and the one other setting that matters to a
method, come from a sweep on a seed of its own, by the evaluated reward on training prompts; `claims.json` holds all of
it. Evaluation: 16 prompts, 8 images each, with noise that no run trained on, the same for all. Errors over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the workers
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import torch  # noqa: E402
from prompts.report import write_file  # noqa: E402
from torch import Tensor  # noqa: E402

import prdp  # noqa: E402

SCALES = {
    "small": dict(
        prompts="few", prompts_per_epoch=4, images_per_prompt=8, updates_per_epoch=4, epochs=20
    ),
    "large": dict(
        prompts="all", prompts_per_epoch=8, images_per_prompt=4, updates_per_epoch=1, epochs=50
    ),
    "large-k4": dict(
        prompts="all", prompts_per_epoch=8, images_per_prompt=4, updates_per_epoch=4, epochs=10
    ),
}
QUICK = dict(prompts_per_epoch=2, images_per_prompt=2, epochs=2, ddpm_steps=2)
SHORT = dict(
    learning_rate="lr", clip_range="clip", kl_weight="kl", updates_per_epoch="k", advantage="adv",
    share_initial_noise="shared", reward="r",
)  # fmt: skip
EVALUATION_SEED, SWEEP_SEEDS = 1_000_003, (100, 101, 102)
RATES, CLIPS = (1e-4, 3e-4), (1e-4, 1e-3, 1e-2, 1e-1)
KNOBS = {  # method: the other setting swept with the learning rate
    "prdp": [dict(clip_range=c) for c in CLIPS],
    "ddpo": [dict(clip_range=c) for c in CLIPS],
    "ddpo-sf": [dict(updates_per_epoch=1)],
    "rwr": [dict(kl_weight=k) for k in (0.01, 0.03)],
    "rwr-sparse": [{}],
    "dpo": [dict(kl_weight=k) for k in (0.3, 3.0)],
}
TWO = ("prdp", "ddpo")  # what the claims are about; the other methods come last
REDNESS_KL = (3e-5, 0.03, 0.1, 0.3)
MATCH_KEPT = 0.9  # of the base model's match


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that ignores the prompt: mean red minus the mean of green and blue, in [-1, 1]."""
    red, green, blue = images.float().mean((2, 3)).unbind(1)
    return (red - (green + blue) / 2) / 255


# ---- Runs ----------------------------------------------------------------------------------------------------


def spec(scale: str, seed: int, loss: str = "prdp", **settings) -> dict:
    """A run: its scale, its seed, and what differs from the toy preset. `loss="base"` is the model as it comes."""
    return {"scale": scale, "seed": seed, "loss": loss, **settings}


def name_of(run: dict) -> str:
    """The run's folder: equal runs of different claims share one."""
    rest = [
        f"{SHORT.get(k, k)}{'' if v is True else v}"
        for k, v in sorted(run.items())
        if k not in ("scale", "loss", "seed")
    ]
    return "_".join([run["scale"], run["loss"], *rest, f"s{run['seed']}"])


def flags_of(run: dict, out: Path, quick: bool) -> list[str]:
    """The command line of prdp.py for it."""
    settings = {**SCALES[run["scale"]], **run, **(QUICK if quick else {})}
    settings["prompts"] = {"few": out / "few.txt", "all": ROOT / "prompts" / "shapes.txt"}[
        settings["prompts"]
    ]
    settings["microbatch"] = settings["prompts_per_epoch"] * settings["images_per_prompt"]
    settings |= {"save_every": 5, "sample_every": settings["epochs"], "out": out / name_of(run)}
    if "reward" in settings:
        settings["reward"] = f"{HERE / 'claims.py'}:{settings['reward']}"
    if settings["loss"] == "base":
        settings["loss"] = "prdp"
    flags = ["--preset", "toy"]
    for key, value in settings.items():
        if key != "scale":
            flags += ["--" + key.replace("_", "-"), *([] if value is True else [str(value)])]
    return flags


def stored(run: dict, flags: list[str], out: Path) -> dict | None:
    """The result of a finished run, if it was made with these very settings."""
    path = out / name_of(run) / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else None
    return result if result and result["run"] == run and result["flags"] == shown(flags) else None


def shown(flags: list[str]) -> list[str]:
    """The flags with paths relative to the repository, as they are stored and published."""
    return [os.path.relpath(f, ROOT) if os.path.isabs(f) else f for f in flags]


def execute(run: dict, out: Path, quick: bool) -> dict:
    """Train (or go on), evaluate, store result.json, and delete the weights."""
    if prdp.STOP:  # asked to stop while this waited in the queue
        raise SystemExit(130)
    flags, folder, started = flags_of(run, out, quick), out / name_of(run), time.time()
    config = prdp.parse_args(flags)
    if run["loss"] == "base":
        folder.mkdir(exist_ok=True)
    elif resumable(config):
        flags_now = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        flags_now = flags
    stopped, log = None, out / f"{folder.name}.log"  # beside the folder: prdp.py wants an empty one
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if run["loss"] != "base":
            try:
                prdp.main(flags_now)
            except SystemExit as stop:
                file.flush()
                stopped = log.read_text().strip().rsplit("\n", 1)[-1]
                if stop.code != 2:
                    raise
                if "is not finite" not in stopped:
                    raise RuntimeError(f"{folder.name}: {stopped}") from stop
        metrics = folder / "metrics.jsonl"
        rows = (
            [json.loads(line) for line in metrics.read_text().splitlines()]
            if metrics.is_file()
            else []
        )
        try:
            figures = evaluate(config, run["loss"] == "base", quick)
        except prdp.InputError as error:
            figures, stopped = {}, stopped or str(error)
    result = {
        "run": run,
        "flags": shown(flags),
        "stopped": stopped,
        "evaluation": figures,
        "seconds": time.time() - started,
    }
    result["curve"] = {
        key: [rounded(row.get(key)) for row in rows]
        for key in (rows[0] if rows else {})
        if key != "peak_gb"
    }
    os.replace(log, folder / "log.txt")
    for part in ("checkpoint", "pipeline"):
        shutil.rmtree(folder / part, ignore_errors=True)
    write_json(folder / "result.json", result)
    return result


def resumable(config: prdp.Config) -> bool:
    """Is there an unfinished run in its folder, with these settings?"""
    path = Path(config.out) / "config.json"
    ignored = {"out", "resume"}
    if not path.is_file() or not (path.parent / "checkpoint").is_dir():
        return False
    saved = json.loads(path.read_text())
    return all(saved.get(k) == v for k, v in dataclasses.asdict(config).items() if k not in ignored)


def evaluate(config: prdp.Config, base: bool, quick: bool) -> dict:
    """{set of prompts: {quantity: [mean, its standard error over prompts]}} of a run's last checkpoint, or the base."""
    from oracle import judge, load_oracle

    models = prdp.load_models(config, torch.device("cpu"))
    if not base:
        prdp.load_checkpoint(config, models, torch.optim.AdamW(models.policy.unet.parameters()))
    images, count = (2, 2) if quick else (8, 16)
    # As in epoch 2 of a plain run of another seed: then `collect` scores under the reference too.
    fresh = dict(seed=EVALUATION_SEED, images_per_prompt=images, loss="prdp", offline=False)
    models = models._replace(policy=models.policy._replace(microbatch=images * count // 2))
    figures = {}
    sets = {"training": config.prompts[0], "unseen": str(ROOT / "prompts" / "shapes_unseen.txt")}
    if config.share_initial_noise:
        sets["shared"] = config.prompts[0]
    for which, file in sets.items():
        prompts = prdp.load_prompts(file)
        prompts = [prompts[i * len(prompts) // count] for i in range(count)]
        settings = dataclasses.replace(
            config, **{**fresh, "share_initial_noise": which == "shared"}
        )
        batch = prdp.collect(settings, models, 2, prompts, {})
        match, shaded = judge(
            load_oracle(), batch.images, [p for p in prompts for _ in range(images)]
        )
        ratio = (
            batch.trajectories.log_probs - batch.log_probs_ref
        )  # (M, T), nats per latent dimension
        each = {
            "reward": batch.rewards,
            "match": match,
            "shaded": shaded,
            "nats_per_dimension": ratio.mean(1),
        }
        each["nats"] = ratio.sum(1) * batch.trajectories.latents[0, 0].numel()
        each["square"] = ratio.square().mean(1)
        means = {
            key: value.double().unflatten(0, (count, images)).mean(1) for key, value in each.items()
        }
        figures[which] = {
            k: [rounded(m.mean().item()), rounded(m.std().item() / count**0.5)]
            for k, m in means.items()
        }
        trained, ref, rewards = (
            x.unflatten(0, (count, images))
            for x in (batch.trajectories.log_probs, batch.log_probs_ref, batch.rewards)
        )  # Eq. 14 of this policy over that of the base model, whose log-ratios are 0
        losses = [
            prdp.prdp_loss(x, x, ref, rewards, math.inf, config.kl_weight).item()
            for x in (trained, ref)
        ]
        figures[which]["residual"] = [rounded(losses[0] / losses[1]) if losses[1] else None, None]
        figures[which]["rms"] = [rounded(figures[which].pop("square")[0] ** 0.5), None]
    return figures


def rounded(x: float | None) -> float | None:
    """Six digits, and null for what JSON cannot hold."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


def write_json(path: Path, value: object) -> None:
    write_file(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def begin_worker() -> None:
    """One thread; stop between two microbatches on Ctrl-C or SIGTERM, and at once if the parent is gone."""
    torch.set_num_threads(1)
    prdp.stop_when_asked()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- What each claim runs ------------------------------------------------------------------------------------


def sweep_runs(quick: bool) -> dict[tuple[str, str], list[dict]]:
    """{(scale, method): the runs it is tuned on}; one of them if `quick`."""
    runs = {("small", m): [spec("small", SWEEP_SEEDS[0], m, learning_rate=r, **knob)
                           for r, knob in itertools.product(RATES, knobs)] for m, knobs in KNOBS.items()}  # fmt: skip
    for method, more in (("prdp", {}), ("ddpo", dict(advantage="global"))):
        rates = (3e-5, *RATES)  # many prompts, few images of each: gentler steps
        runs["large", method] = [
            spec("large", SWEEP_SEEDS[0], method, learning_rate=r, **more) for r in rates
        ]
    return {key: tried[:1] if quick else tried for key, tried in runs.items()}


def arms(claim: int, best: dict, seeds: list[int], last: bool = False) -> dict[str, list[dict]]:
    """{label: a run for each seed} of a claim; `last` adds the other baselines to claim 1."""

    def arm(scale: str, loss: str = "prdp", **more) -> list[dict]:
        tuned = best["large" if scale == "large" else "small"][loss]
        return [spec(scale, seed, loss, **{**tuned, **more}) for seed in seeds]

    base = {"base": [spec("small", 0, "base")]}
    if claim == 1:
        others = (
            {"DDPO-SF": "ddpo-sf", "RWR": "rwr", "RWR sparse": "rwr-sparse", "DPO": "dpo"}
            if last
            else {}
        )
        return (
            base
            | {"PRDP": arm("small"), "DDPO": arm("small", "ddpo")}
            | {k: arm("small", m) for k, m in others.items()}
        )
    if claim == 2:
        return base | {
            "PRDP": arm("large"),
            "DDPO global": arm("large", "ddpo", advantage="global"),
            "DDPO per-prompt": arm("large", "ddpo", advantage="per-prompt"),
            "few prompts, DDPO global": arm("small", "ddpo", advantage="global"),
            "few prompts, DDPO per-prompt": arm("small", "ddpo"),
        }
    if claim == 3:
        cells = itertools.product(("small", "large-k4"), ("prdp", "ddpo"))
        runs = {}
        for scale, loss in cells:
            runs[f"{loss.upper()} {scale}, clipped"] = arm(scale, loss)
            runs[f"{loss.upper()} {scale}, not clipped"] = arm(scale, loss, clip_range=math.inf)
        runs["K = 1, clipped"] = arm("large")[:1]
        runs["K = 1, not clipped"] = arm("large", clip_range=math.inf)[:1]
        return base | runs
    if claim == 4:
        return base | {"online": arm("small"), "offline": arm("small", offline=True)}
    if claim == 5:
        # One setting for both methods, under which 20 epochs suffice to lose the prompt.
        red = dict(reward="redness", learning_rate=4e-4, clip_range=1e-2)
        runs = {f"PRDP, kl_weight {k:g}": arm("small", kl_weight=k, **red) for k in REDNESS_KL}
        return {
            "base": [spec("small", 0, "base", reward="redness")],
            "DDPO": arm("small", "ddpo", **red),
        } | runs
    own = dict(
        kl_weight=0.1
    )  # small enough targets r / kl_weight for the loss to be reachable at all
    runs = {
        "own x_T": arm("small", **own),
        "shared x_T": arm("small", share_initial_noise=True, **own),
    }
    return (
        base
        | runs
        | {
            f"K = {k}": arm("small", **({} if k == 4 else {"updates_per_epoch": k}))[:1]
            for k in (1, 2, 4)
        }
    )


# ---- Verdicts ------------------------------------------------------------------------------------------------


def figure_of(result: dict, quantity: str, where: str = "training") -> float:
    return (result["evaluation"].get(where, {}).get(quantity) or [math.nan])[0]


def over_seeds(results: list[dict], quantity: str, where: str = "training") -> tuple[float, float]:
    """Mean over seeds and its standard error (0 for a single one)."""
    return mean_se([figure_of(r, quantity, where) for r in results])


def mean_se(values: list[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0)


def difference(
    a: list[dict], b: list[dict], quantity: str = "reward", where: str = "training"
) -> tuple[float, float]:
    """Mean of a minus mean of b, and the standard error of that."""
    (x, dx), (y, dy) = over_seeds(a, quantity, where), over_seeds(b, quantity, where)
    return x - y, math.hypot(dx, dy)


def say(pair: tuple[float, float], digits: int = 3) -> str:
    return f"{pair[0]:.{digits}f}" + (f" +- {pair[1]:.{digits}f}" if pair[1] else "")


def unstable(result: dict, base: dict) -> bool:
    """Stopped as not finite; or match below half of the base's, or reward below the base's by 2 of its standard
    errors; or the last 4 epochs' reward lost over half of what the best 4 in a row had gained."""
    if result["stopped"] or not result["evaluation"]:
        return True
    before, error = base["evaluation"]["training"]["reward"]
    curve = (
        torch.tensor(result["curve"]["reward_mean"])
        .unfold(0, min(4, len(result["curve"]["reward_mean"])), 1)
        .mean(1)
    )
    lost = curve.max() - curve[-1] > 0.5 * max(curve.max().item() - before, 2 * error)
    collapsed = figure_of(result, "match") < 0.5 * figure_of(base, "match")
    return bool(lost or collapsed or figure_of(result, "reward") < before - 2 * error)


PAPER = {
    1: "Table 1, few prompts: PRDP reaches at least DDPO's reward",
    2: "Table 2, Fig. 9, many prompts: PRDP rises and DDPO fails; unseen prompts improve too",
    3: "Table 5: unstable without clipping; stable with it, but for DDPO on many prompts",
    4: "Fig. 7: online beats offline at equal queries",
    5: "Fig. 10, a reward that ignores the prompt: small beta loses the prompt, large beta keeps it; DDPO loses it",
    6: "Ours: sharing x_T within a prompt lowers the loss that cannot be removed",
}


RULE = "above 2 standard errors: {}; below -2: {}; between: no clear difference"


def compared(gap: tuple[float, float], yes: str = "reproduced", no: str = "not reproduced") -> str:
    """RULE for a difference and its standard error."""
    return yes if gap[0] > 2 * gap[1] else no if gap[0] < -2 * gap[1] else "no clear difference"


def verdict(claim: int, results: dict[str, list[dict]]) -> tuple[str, str, str]:
    """What the toy shows, the verdict, and the criterion behind it."""
    base = results["base"]
    reward = {label: say(over_seeds(runs, "reward")) for label, runs in results.items()}
    listed = "reward: " + ", ".join(f"{label} {value}" for label, value in reward.items())
    rule = RULE.format("reproduced", "not reproduced")
    if claim == 1:
        gap = difference(results["PRDP"], results["DDPO"])
        return f"{listed}; PRDP - DDPO {say(gap)}", compared(gap), f"PRDP - DDPO {rule}"
    if claim == 2:
        gap = difference(results["PRDP"], results["DDPO global"])
        rise = difference(results["PRDP"], base, where="unseen")
        few = difference(
            results["few prompts, DDPO per-prompt"], results["few prompts, DDPO global"]
        )
        unseen = {
            k: say(over_seeds(results[k], "reward", "unseen"))
            for k in ("base", "PRDP", "DDPO global")
        }
        shows = f"{listed}; unseen prompts: {', '.join(f'{k} {v}' for k, v in unseen.items())}; PRDP - DDPO global "
        shows += f"{say(gap)}; few prompts, DDPO per-prompt - global {say(few)}"
        answer = (
            compared(gap)
            if compared(rise) == "reproduced"
            else compared(gap, yes="no clear difference")
        )
        return (
            shows,
            answer,
            f"PRDP - DDPO global {rule}; reproduced only if PRDP - base on unseen prompts is too",
        )
    if claim == 3:
        bad = {
            k: sum(unstable(run, base[0]) for run in runs)
            for k, runs in results.items()
            if k != "base"
        }
        arms = [
            k.removesuffix(", clipped")
            for k in results
            if k.endswith(", clipped") and "K = 1" not in k
        ]
        cells = []
        for arm in arms:
            stable = arm != "DDPO large-k4"  # with clipping, in Table 5
            majority = len(results[f"{arm}, clipped"]) / 2
            cells += [
                (bad[f"{arm}, clipped"] < majority) == stable,
                bad[f"{arm}, not clipped"] > majority,
            ]
        shows = f"unstable of {len(results[f'{arms[0]}, clipped'])} runs: " + "; ".join(
            f"{arm} {bad[f'{arm}, clipped']} clipped, {bad[f'{arm}, not clipped']} not"
            for arm in arms
        )
        one, other = (
            [run["evaluation"], run["curve"]["loss"]]
            for k in ("clipped", "not clipped")
            for run in results[f"K = 1, {k}"]
        )
        shows += f"; PRDP large at K = 1, clipped and not: {'equal in every digit' if one == other else 'different'}"
        answer = (
            "reproduced"
            if all(cells)
            else f"{sum(cells)} of {len(cells)} cells of Table 5 reproduced"
        )
        return (
            shows,
            answer,
            " ".join((unstable.__doc__ or "").split()) + " A cell counts by majority of seeds.",
        )
    if claim == 4:
        gap = difference(results["online"], results["offline"])
        return f"{listed}; online - offline {say(gap)}", compared(gap), f"online - offline {rule}"
    if claim == 5:
        whole = max(over_seeds(base, "match")[0], 1e-9)
        match = {k: over_seeds(runs, "match")[0] / whole for k, runs in results.items()}
        gains = {
            k for k, runs in results.items() if compared(difference(runs, base)) == "reproduced"
        }
        shows = "; ".join(
            f"{k}: reward {reward[k]}, match {say(over_seeds(results[k], 'match'))}"
            for k in results
        )
        smallest, *larger = (k for k in results if k.startswith("PRDP"))
        kept = any(match[k] >= MATCH_KEPT and k in gains for k in larger)
        good = kept and match[smallest] < 0.5 and match["DDPO"] < 0.5
        rule = f"smallest kl_weight and DDPO below half of the base's match; a larger one keeps {MATCH_KEPT:.0%} and still gains"
        return (
            shows,
            "reproduced" if good else "not reproduced",
            rule + " over 2 standard errors of reward",
        )
    places = {"own x_T": "training", "shared x_T": "shared"}
    left = {k: over_seeds(results[k], "residual", where) for k, where in places.items()}
    (own, own_error), (shared, shared_error) = left.values()
    shows = "loss over that of the base model: " + ", ".join(
        f"{k} {say(v)} (reward {reward[k]})" for k, v in left.items()
    )
    for k in (1, 2, 4):
        curve = results[f"K = {k}"][0]["curve"]
        (skipped, _), (update, _) = (
            mean_se(curve["skipped_fraction"]),
            mean_se(curve["seconds_update"]),
        )
        whole = update / (1 - skipped)
        shows += f"; K = {k}: {skipped:.0%} skipped, {whole - update:.2f} s of {whole:.2f} s saved"
    rule = f"residual loss on fresh trajectories, own - shared, {RULE.format('shown', 'not shown')}"
    return (
        shows,
        compared((own - shared, math.hypot(own_error, shared_error)), "shown", "not shown"),
        rule,
    )


# ---- Figures -------------------------------------------------------------------------------------------------


def plot(claim: int, results: dict[str, list[dict]], path: Path) -> None:
    """Left, curves of the epochs' rewards; right, evaluated figures. Dots are seeds, bars means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = results["base"]
    trained = {k: v for k, v in results.items() if k != "base"}
    curves = {k: v for k, v in trained.items() if not (claim == 3 and "K = 1" in k)}
    for i, (label, runs) in enumerate(curves.items()):
        rows = [run["curve"].get("reward_mean", []) for run in runs]
        shown_epochs = min(len(row) for row in rows)  # a run that stopped ends the mean
        if shown_epochs:
            mean = torch.tensor([row[:shown_epochs] for row in rows]).mean(0)
            mean = torch.stack([mean[max(0, e - 3) : e + 1].mean() for e in range(len(mean))])
            style = "--" if "not clipped" in label or "few prompts" in label else "-"
            left.plot(
                [r["curve"]["epoch"] for r in runs][0][:shown_epochs],
                mean,
                style,
                color=f"C{i}",
                label=label,
            )
    left.axhline(figure_of(base[0], "reward"), color="grey", lw=0.8, ls=":")
    left.set(xlabel="epoch", ylabel="reward of the epoch's images (mean of 4 epochs)")
    left.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    if claim == 5:
        for i, (label, runs) in enumerate(results.items()):
            points = [[figure_of(run, q) for run in runs] for q in ("match", "reward")]
            right.plot(*points, "o", color="grey" if label == "base" else f"C{i - 1}", label=label)
        right.set(xlabel="prompt match (oracle)", ylabel="evaluated reward")
        right.legend(frameon=False, fontsize=7)
    else:
        panels = [("training", "training prompts", 0.0), ("unseen", "unseen prompts", 0.35)]
        if claim == 6:
            panels = [("training", "residual loss on the run's own kind of x_T", 0.0)]
            trained = {k: v for k, v in trained.items() if "x_T" in k}
        shown_arms = trained if claim == 6 else results
        for where, name, shift in panels:
            for i, (label, runs) in enumerate(shown_arms.items()):
                place = "shared" if claim == 6 and label == "shared x_T" else where
                values = [
                    figure_of(run, "residual" if claim == 6 else "reward", place) for run in runs
                ]
                colour = "C0" if where == "training" else "C1"
                right.barh(
                    i + shift,
                    mean_se(values)[0],
                    0.33,
                    color=colour,
                    alpha=0.4,
                    label=name if i == 0 else None,
                )
                right.plot(values, [i + shift] * len(values), "k.", ms=4)
        right.set_yticks([i + 0.17 for i in range(len(shown_arms))], list(shown_arms), fontsize=7)
        right.invert_yaxis()
        right.set(xlabel="residual loss over the base's" if claim == 6 else "evaluated reward")
        low = min(
            0.0 if claim == 6 else 0.9 * over_seeds(runs, "reward", w)[0]
            for runs in shown_arms.values()
            for w, _, _ in panels
        )
        right.set_xlim(left=low if math.isfinite(low) else 0.0)
        right.legend(frameon=False, fontsize=7)
    figure.suptitle(PAPER[claim], fontsize=9)
    figure.savefig(path, dpi=70)


# ---- The table, and main -------------------------------------------------------------------------------------


def table(claims: dict) -> str:
    """The README's rows."""
    lines = ["| | the paper | the toy | verdict |", "|---|---|---|---|"]
    for claim, entry in sorted(claims.items()):
        figure = f"[{claim}](toy/claim{claim}.png)"
        lines.append(
            f"| {figure} | {entry['paper']} | {entry['toy'].replace('; ', '<br>')} | **{entry['verdict']}** |"
        )
    return "\n".join(lines)


def machine() -> dict:
    """What the hours were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line] or [
        platform.processor()
    ]
    versions = {
        p: importlib.metadata.version(p) for p in ("torch", "diffusers", "transformers", "numpy")
    }
    return {
        "cpu": names[0],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def estimate(run: dict, quick: bool) -> float:
    """Seconds on one core of an AMD EPYC: loading and evaluating, then passes to sample, score and update."""
    if quick or run["loss"] == "base":
        return 5 if quick else 10
    settings = {**SCALES[run["scale"]], **run}
    return 13 + settings["epochs"] * (0.2 + 1.05 * settings["updates_per_epoch"])


class Sweep:
    """Runs lists of runs in worker processes, skipping those that are done."""

    def __init__(self, args: argparse.Namespace, planned: list[dict]) -> None:
        from tqdm import tqdm

        self.out, self.quick = args.out, args.quick
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(args.jobs, mp_context=context, initializer=begin_worker)
        todo = {name_of(run): run for run in planned if not self.finished(run)}
        seconds = sum(estimate(run, self.quick) for run in todo.values())
        print(
            f"{len(todo)} runs to do, about {seconds:.0f} core-seconds, {seconds / args.jobs / 60:.0f} minutes with {args.jobs} jobs"
        )
        self.bar = tqdm(total=len(todo), unit="run", dynamic_ncols=True)

    def finished(self, run: dict) -> dict | None:
        return stored(run, flags_of(run, self.out, self.quick), self.out)

    def __call__(self, runs: list[dict]) -> dict[str, dict]:
        """{name: result}."""
        results = {name_of(run): self.finished(run) for run in runs}
        todo = {name_of(run): run for run in runs if not results[name_of(run)]}
        waiting = {self.pool.submit(execute, run, self.out, self.quick) for run in todo.values()}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                results[name_of(result["run"])] = result
                self.bar.set_postfix_str(name_of(result["run"]))
                self.bar.update()
        return results

    def stop(self, message: str, code: int) -> None:
        """Ask the workers to end, as prdp.py does: between two microbatches, with a checkpoint. Then leave at once:
        every result is on disk, and an executor whose workers were stopped may wait for them for ever."""
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(5)  # an idle one only notes the signal, and ends with this process
        print(f"\nclaims.py: {message}", file=sys.stderr, flush=True)
        os._exit(code)


def choose(sweep: Sweep, report: dict, methods: tuple[str, ...]) -> dict:
    """{scale: {method: tuned settings}}; runs the sweep of what `report`, the part for claims.json, does not have.

    Every setting on one seed; for PRDP and DDPO the better half on two more, and the best mean wins.
    """
    groups = {
        (s, m): runs
        for (s, m), runs in sweep_runs(sweep.quick).items()
        if m in methods and m not in report[s]
    }
    results = sweep([run for runs in groups.values() for run in runs])
    better = {key: sorted(runs, key=lambda run: -score(results[name_of(run)]))[: (len(runs) + 1) // 2]
              for key, runs in groups.items()}  # fmt: skip
    pairs = [
        (run, seed)
        for (_, m), runs in better.items()
        if m in TWO
        for run in runs
        for seed in SWEEP_SEEDS[1:]
    ]
    again = [{**run, "seed": seed} for run, seed in pairs]
    results |= sweep([] if sweep.quick else again)
    for (scale, method), runs in groups.items():
        tried = []
        for run in runs:
            repeats = [results.get(name_of({**run, "seed": seed})) for seed in SWEEP_SEEDS]
            rewards = [rounded(score(result)) for result in repeats if result]
            settings = {
                k: v for k, v in run.items() if k not in ("scale", "seed", "loss", "advantage")
            }
            tried.append({"settings": settings, "rewards": rewards})
        # A mean over three seeds counts before any single one.
        best = max(
            tried, key=lambda t: (len(t["rewards"]), mean_se([r or -1.0 for r in t["rewards"]])[0])
        )
        report[scale][method] = {"chosen": best["settings"], "tried": tried}
    return {
        scale: {m: entry["chosen"] for m, entry in tuned.items()} for scale, tuned in report.items()
    }


def score(result: dict) -> float:
    """What the sweep compares: the evaluated reward on training prompts, if the run did not stop."""
    return -math.inf if result["stopped"] else figure_of(result, "reward")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--claim", type=int, nargs="+", choices=range(1, 7), help="only these")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one seed: does it all run?"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument(
        "--out", type=Path, help="folder of the runs (default: runs/claims, or runs/claims-quick)"
    )
    args = parser.parse_args()
    args.out = (args.out or Path("runs/claims-quick" if args.quick else "runs/claims")).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out if args.quick else HERE  # a quick run never touches what is committed
    prompts = prdp.load_prompts(str(ROOT / "prompts" / "shapes.txt"))
    (args.out / "few.txt").write_text("\n".join(prompts[:: len(prompts) // 16]) + "\n")
    seeds = list(range(1 if args.quick else args.seeds))

    known = target / "claims.json"
    book = json.loads(known.read_text()) if args.claim and known.is_file() else {}
    book = {"machine": {}, "sweep": {"small": {}, "large": {}}, "claims": {}, **book}
    steps = [(claim, False) for claim in args.claim or range(1, 7)]
    steps += [(1, True)] if (1, False) in steps else []  # the other baselines last
    swept = {
        (s, m): runs for (s, m), runs in sweep_runs(args.quick).items() if m not in book["sweep"][s]
    }
    planned = [
        run for (_, m), runs in swept.items() if m in TWO or (1, True) in steps for run in runs
    ]
    guess = {s: {m: {"learning_rate": RATES[0], **KNOBS[m][0]} for m in KNOBS} for s in SCALES}
    guess = {
        s: {**tuned, **{m: v["chosen"] for m, v in book["sweep"].get(s, {}).items()}}
        for s, tuned in guess.items()
    }
    planned += [
        run
        for step in steps
        for runs in arms(step[0], guess, seeds, step[1]).values()
        for run in runs
    ]

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started, sweep = time.time(), Sweep(args, planned)
    try:
        for claim, last in steps:
            best = choose(sweep, book["sweep"], tuple(KNOBS) if last else TWO)
            runs = arms(claim, best, seeds, last)
            results = sweep([run for arm in runs.values() for run in arm])
            record(
                book,
                claim,
                {label: [results[name_of(run)] for run in arm] for label, arm in runs.items()},
                target,
            )
            write_json(known, book)
    except (KeyboardInterrupt, SystemExit):
        sweep.stop("stopped; the same command goes on", 130)
    except Exception:
        sweep.stop(traceback.format_exc(), 1)
    sweep.bar.close()
    spent = sum(json.loads(p.read_text())["seconds"] for p in args.out.glob("*/result.json")) / 3600
    book["machine"] = {**machine(), "jobs": args.jobs, "core_hours_of_all_runs": round(spent, 2)}
    write_json(known, book)
    text = table(book["claims"])
    print(
        text,
        f"\n{(time.time() - started) / 3600:.2f} hours now; all runs {spent:.2f} core-hours; {machine()}",
        sep="\n",
    )
    readme = (ROOT / "README.md").read_text()
    begin, end = "<!-- claims -->", "<!-- /claims -->"
    if not args.quick and begin in readme and end in readme:
        head, tail = readme.split(begin)[0], readme.split(end)[1]
        (ROOT / "README.md").write_text(f"{head}{begin}\n{text}\n{end}{tail}")
    sweep.pool.shutdown()


def record(book: dict, claim: int, results: dict[str, list[dict]], target: Path) -> None:
    """A claim's entry in the book, and its figure."""
    shows, answer, rule = verdict(claim, results)
    numbers = {}
    for label, runs in results.items():
        quantities = runs[0]["evaluation"].get("training", {})
        numbers[label] = {
            where: {q: [rounded(x) for x in over_seeds(runs, q, where)] for q in quantities}
            for where in ("training", "unseen")
        }
        kept = ("run", "stopped", "evaluation", "seconds")
        numbers[label]["runs"] = [
            {**{k: run[k] for k in kept}, "reward_curve": run["curve"].get("reward_mean", [])}
            for run in runs
        ]
    answer = answer if max(map(len, results.values())) > 1 else "one seed: no verdict"
    entry = {
        "paper": PAPER[claim],
        "toy": shows,
        "verdict": answer,
        "criterion": rule,
        "numbers": numbers,
    }
    book["claims"][str(claim)] = entry
    plot(claim, results, target / f"claim{claim}.png")


if __name__ == "__main__":
    main()
