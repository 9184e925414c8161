"""The experiments of toy/points.py: what is run, by which criterion it is judged, and the pictures."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import points
from points import HERE, Arm

SWEEP_SEEDS, SWEEP_NOISE, NOISE = (900, 901), 1_000_001, 1_000_002
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


# ---- Running arms: two at a time, each kept when it is done ------------------------------------------


def cost(arm: Arm, seeds: int) -> float:
    """About how long an arm takes, in units of its own: network rows times weights."""
    updates = 1 if arm.minibatches else arm.K
    return arm.E * arm.T * (updates + 0.6) * arm.N * arm.B * seeds * arm.width


def work(job: tuple) -> tuple[str, object]:
    """In a worker: one job, its result written to its file."""
    path, function, arguments = job
    result = function(*arguments)
    path = Path(path)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    path.with_suffix(".tmp").rename(path)
    return result


def exact(arm: Arm, betas: list[float], prompts: int) -> list[list[float]]:
    return points.exact_frontier(arm, betas, range(prompts)).tolist()


class Runner:
    """Runs jobs on both cores, shows how far it is, and keeps what is done in `folder`."""

    def __init__(self, folder: Path, quick: bool, workers: int = 2) -> None:
        self.folder, self.quick, self.workers = folder, quick, workers
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, *key) -> Path:
        return self.folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:16] + ".json")

    def __call__(self, what: str, jobs: dict) -> dict:
        """{name: (function, arguments, cost)} -> {name: result}; equal jobs are done once."""
        paths = {name: self.path(function.__name__, args) for name, (function, args, _) in jobs.items()}
        todo = {paths[n]: job for n, job in jobs.items() if not paths[n].exists()}
        total, done, started = sum(j[2] for j in todo.values()), 0.0, time.time()
        queue = sorted(todo.items(), key=lambda item: -item[1][2]) if self.quick else todo.items()
        tasks = [(str(path), function, args) for path, (function, args, _) in queue]
        if tasks:
            with multiprocessing.get_context("spawn").Pool(self.workers) as pool:
                for i, _ in enumerate(pool.imap(work, tasks)):
                    done += todo[Path(tasks[i][0])][2]
                    left = (time.time() - started) * (total / done - 1) / 60
                    bar = "=" * round(30 * done / total)
                    print(f"\r{what:24} [{bar:30}] {i + 1}/{len(tasks)}, {left:.0f} min left ", end="", flush=True)
            print()
        return {name: json.loads(path.read_text()) for name, path in paths.items()}

    def arms(self, what: str, arms: dict[str, Arm], seeds, noise_seed: int) -> dict[str, dict]:
        per_prompt, jobs = (16 if self.quick else 128), {}
        for name, arm in arms.items():
            if self.quick:
                small = dict(E=2, K=min(arm.K, 2), N=min(arm.N, 4), B=min(arm.B, 4))
                arm = replace(arm, **small)
            arguments = (arm, tuple(seeds), noise_seed, per_prompt)
            jobs[name] = (points.run_arm, arguments, cost(arm, len(seeds)))
        return self(what, jobs)


# ---- Sweeps: the rate, and the one other setting that matters ----------------------------------------

MANY = Arm(prompts="many", E=1000, K=1, N=64, B=8)
MANY_K10 = Arm(prompts="many", N=64, B=8)  # 100 epochs of 10 updates: there the clip can act
DDPO = dict(method="ddpo", minibatches=True)
ALONE = dict(N=512, B=1, normalise="global")  # DDPO at large scale: 512 prompts, one sample of each
RATES, CLIPS, NONE = (-8, -7, -6), (-3, -2, -1), (None,)  # half-decades: -7 is 10**-3.5
SWEEPS = {  # name: arm, its other setting and where that starts
    "few/prdp": (Arm(), "clip", CLIPS),
    "few/ddpo": (Arm(**DDPO, normalise="per-prompt"), "clip", CLIPS),
    "few/ddpo global": (Arm(**DDPO, normalise="global"), "clip", CLIPS),
    "few/ddpo group": (Arm(**DDPO, normalise="group"), "clip", CLIPS),
    "few/offline": (Arm(offline=True), "clip", (-2, -1, 0)),
    "few/ddpo-sf": (Arm(method="ddpo-sf", normalise="per-prompt", K=1), "", NONE),
    "few/rwr": (Arm(method="rwr"), "beta", (-2, -1, 0)),
    "few/rwr-sparse": (Arm(method="rwr-sparse"), "", NONE),
    "few/dpo": (Arm(method="dpo"), "beta", (-2, -1, 0)),
    "few/diffusion-dpo": (Arm(method="diffusion-dpo"), "beta", (1, 2, 3)),
    "many/prdp": (MANY, "", NONE),
    "many/ddpo global": (replace(MANY, method="ddpo", **ALONE), "", NONE),
    "many/ddpo group": (replace(MANY, method="ddpo", normalise="group"), "", NONE),
    "many K=10/prdp": (MANY_K10, "clip", CLIPS),
    "many K=10/ddpo global": (replace(MANY_K10, **DDPO, **ALONE), "clip", CLIPS),
}


def half_decade(i: int) -> float:
    return float(f"{10 ** (i / 2):.1e}")


def set_cell(name: str, cell: tuple) -> Arm:
    arm, other, _ = SWEEPS[name]
    changes = {"lr": half_decade(cell[0])}
    if other:
        changes[other] = half_decade(cell[1])
    return replace(arm, **changes)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sweep(runner: Runner, names: list[str]) -> tuple[dict[str, Arm], dict]:
    """The best cell of each sweep by final reward; edges move until the best lies inside."""
    cells = {name: set(itertools.product(RATES, SWEEPS[name][2])) for name in names}
    for round_ in range(1 if runner.quick else 5):
        arms = {(n, c): set_cell(n, c) for n in names for c in sorted(cells[n], key=str)}
        results = runner.arms(f"sweep, round {round_ + 1}", arms, SWEEP_SEEDS, SWEEP_NOISE)
        scores = {key: mean(result["reward"]) for key, result in results.items()}
        best = {n: max(cells[n], key=lambda c, n=n: scores[n, c]) for n in names}
        for n in names:
            for axis in range(2 if SWEEPS[n][1] else 1):
                values = sorted({c[axis] for c in cells[n]})
                wider = {values[0]: values[0] - 1, values[-1]: values[-1] + 1}.get(best[n][axis])
                if wider is not None:
                    cells[n] |= {tuple(wider if a == axis else v for a, v in enumerate(c)) for c in cells[n]}
    table = {
        n: {
            "other": SWEEPS[n][1],
            "best": [half_decade(v) for v in best[n] if v is not None],
            "cells": [[*(half_decade(v) for v in c if v is not None), scores[n, c]] for c in best and sorted(
                (c for (m, c) in scores if m == n), key=str)],
        }
        for n in names
    }  # fmt: skip
    return {n: set_cell(n, best[n]) for n in names}, table


# ---- The experiments ---------------------------------------------------------------------------------

BETAS = (3.0, 1.0, 0.3, 0.1)  # of Fig. 10, in reward per nat
CURVE = [10.0, 3.0, 1.6, 1.0, 0.6, 0.3, 0.17, 0.1]  # and of the exact curve
AXIS = {  # Fig. 9's rates, 8 seeds at each; half-decades
    "prdp": range(-8, -4),
    "ddpo global": range(-9, -4),
    "ddpo group": range(-8, -4),
}
PLANE = Arm(dims=2, beta=1.0)


def experiments(best: dict[str, Arm]) -> dict[int, dict[str, Arm]]:
    """The arms of each claim. Equal arms of different claims are run once."""
    few, ddpo, glob = best["few/prdp"], best["few/ddpo"], best["few/ddpo global"]
    group = best["few/ddpo group"]
    many = {m: best[f"many/{m}"] for m in AXIS}
    rate = many["prdp"].lr
    k10, k10_ddpo = best["many K=10/prdp"], best["many K=10/ddpo global"]
    inf, blind = math.inf, dict(dims=2, reward="blind", E=250)
    plane = replace(few, dims=2, beta=1.0)
    slow = dict(decay=True)
    return {
        1: {
            "base": replace(few, lr=0.0, E=1, K=1),
            "prdp": replace(few, beta=0.005), "prdp beta .02": few,
            "ddpo": ddpo, "ddpo, every sample K times": replace(ddpo, minibatches=False),
        },
        2: {
            "base": replace(MANY, lr=0.0, E=1),
            **{f"{m} {half_decade(i):.1e}": replace(many[m], lr=half_decade(i)) for m in AXIS for i in AXIS[m]},
            **{m: many[m] for m in AXIS},
            **{f"{m} decay {half_decade(i):.1e}": replace(many[m], lr=half_decade(i), **slow)
               for m in AXIS for i in (-6, -5)},
            "ddpo global decay 3.2e-04": replace(many["ddpo global"], lr=half_decade(-7), **slow),
        },
        3: {
            "ddpo": ddpo, "ddpo global": glob,
            "ddpo global, as ddpo": replace(ddpo, normalise="global"), "prdp": few,
        },
        4: {
            f"ratio {ratio:g}, lr {lr:.1e}": replace(many["ddpo global"], ratio=ratio, lr=lr)
            for ratio in (0.0, 1.0, 3.0) for lr in (many["ddpo global"].lr, rate)
        },
        5: {
            "prdp few clip": few, "prdp few none": replace(few, clip=inf),
            "ddpo few clip": ddpo, "ddpo few none": replace(ddpo, clip=inf),
            "prdp many clip": k10, "prdp many none": replace(k10, clip=inf),
            "ddpo many clip": k10_ddpo, "ddpo many none": replace(k10_ddpo, clip=inf),
            "ddpo many clip, prdp's rate": replace(k10_ddpo, lr=k10.lr),
            "ddpo few global clip": glob,
        },
        6: {"online": few, "offline": best["few/offline"]},
        7: {
            "base": replace(plane, reward="blind", lr=0.0, E=1, K=1),
            **{f"beta {b:g}": replace(few, beta=b, **blind) for b in BETAS},
            **{f"beta {b:g} decay": replace(few, beta=b, **blind, **slow) for b in BETAS},
            "ddpo": replace(ddpo, **blind),
        },
        8: {"few base": replace(few, lr=0.0, E=1, K=1), "few": few, "many base": replace(MANY, lr=0.0, E=1),
            "many": many["prdp"], "many ddpo global": many["ddpo global"]},
        9: {
            "prdp": many["prdp"], "group": many["ddpo group"], "global": many["ddpo global"],
            "group at prdp's rate": replace(many["ddpo group"], lr=rate),
            "global at prdp's rate": replace(many["ddpo global"], lr=rate),
        },
        10: {
            "base": replace(few, lr=0.0, E=1, K=1),
            **{f"prdp beta {b:g}": replace(few, beta=b) for b in (0.005, 0.02, 0.1, 0.3)},
            "prdp beta 0.02 decay": replace(few, **slow),
            **{f"through the reward, beta {b:g}": replace(few, method="pathwise", lr=1e-3, beta=b)
               for b in (1.0, 0.2, 0.05)},
            "ddpo decay": replace(ddpo, **slow), "ddpo group decay": replace(group, **slow),
            **{n[4:]: best[n] for n in SWEEPS if n.startswith("few/") and n not in ("few/prdp", "few/offline")},
        },
        11: {
            "base": replace(plane, lr=0.0, E=1, K=1),
            **{f"beta {b:g}": replace(plane, beta=b) for b in (1.0, 0.3, 0.1, 0.02)},
            **{f"beta {b:g} decay": replace(plane, beta=b, **slow) for b in (1.0, 0.3, 0.1, 0.02)},
            "beta 1 decay, x_T shared": replace(plane, shared=True, **slow),
            "beta 1 decay, 400 epochs": replace(plane, E=400, **slow),
            "ddpo": replace(ddpo, dims=2), "ddpo decay": replace(ddpo, dims=2, **slow),
            "ddpo group": replace(group, dims=2),
            "beta 1, through the reward": replace(plane, method="pathwise", lr=1e-3),
            "T=20 base": replace(plane, T=20, lr=0.0, E=1, K=1),
            "T=20 beta 1 decay": replace(plane, T=20, **slow),
            "width 128 base": replace(plane, width=128, lr=0.0, E=1, K=1),
            "width 128 beta 1 decay": replace(plane, width=128, **slow),
            "T=50 base": replace(plane, T=50, lr=0.0, E=1, K=1),
            "T=50 beta 1 decay": replace(plane, T=50, **slow),
        },
    }  # fmt: skip


def exact_jobs(best: dict[str, Arm], quick: bool) -> dict:
    few, prompts = best["few/prdp"], (1 if quick else 45)
    plane = replace(few, dims=2, beta=1.0)
    jobs = {
        "blind": (replace(few, dims=2, reward="blind"), CURVE[:2] if quick else CURVE),
        "own": (plane, CURVE[:2] if quick else CURVE + [0.05]),
        "T=20": (replace(plane, T=20), [1.0]),
        "width 128": (replace(plane, width=128), [1.0]),
        "T=50": (replace(plane, T=50), [1.0]),
    }
    if quick:
        jobs = dict(list(jobs.items())[:2])
    return {
        name: (exact, (Arm(dims=2, reward=a.reward, T=a.T, width=a.width), betas, prompts), 3e8 * a.T * len(betas))
        for name, (a, betas) in jobs.items()
    }


# ---- Verdicts: criteria, written before any number -----------------------------------------------------


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b over the shared seeds, and the half-width of its 95% interval (Student's t)."""
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    n = len(differences)
    return differences.mean().item(), T95[n - 2] * (differences.std() / n**0.5).item()


def unstable(result: dict, base: float) -> int:
    """How many runs once lost more than half of the reward gained by then (or more than half a unit,
    before there was a gain of 1): of the training reward's means over fiftieths of the run."""
    curve = torch.tensor(result["curve"])
    best = curve.cummax(1).values
    return int((((best - curve) / (best - base).clamp(min=1)).amax(1) > 0.5).sum())


def judge(r: dict[int, dict], frontier: dict, seeds: int, best: dict[str, Arm]) -> dict[int, dict]:
    """Each claim: what the paper says, and its criteria as (name, figure, passed)."""
    few, many = mean(r[1]["base"]["reward"]), mean(r[2]["base"]["reward"])
    half, most = seeds / 2, seeds / 8

    def gain(name, figure, ok):
        return {"name": name, "figure": figure, "passed": bool(ok)}

    def difference(name, a, b, above=0.0, key="reward"):
        d, e = paired(a[key], b[key] if isinstance(b, dict) else [b] * len(a[key]))
        return gain(name, f"{d:+.3f} +- {e:.3f}", d - e > above)

    def count(name, result, base, stable):
        u = unstable(result, base)
        return gain(name, f"{u} of {seeds} runs unstable", u <= most if stable else u >= half)

    verdicts = {}
    slack = -0.05 * (mean(r[1]["ddpo"]["reward"]) - few)
    verdicts[1] = ("Table 1: on few prompts PRDP's reward matches DDPO's or is slightly better", [
        difference("PRDP above the base", r[1]["prdp"], few),
        difference("DDPO above the base", r[1]["ddpo"], few),
        difference("PRDP - DDPO, above -5% of DDPO's gain", r[1]["prdp"], r[1]["ddpo"], slack),
        difference("PRDP - DDPO, above 0", r[1]["prdp"], r[1]["ddpo"]),
    ])
    rate = best["many/prdp"].lr
    glob = r[9]["global at prdp's rate"]
    verdicts[2] = ("Table 2, Fig. 9 left: on many prompts PRDP is stable and improves, DDPO ends below the base", [
        difference("PRDP above the base", r[2]["prdp"], many),
        count("PRDP stable", r[2]["prdp"], many, True),
        difference("PRDP - DDPO, each at its best rate", r[2]["prdp"], r[2]["ddpo global"]),
        difference(f"base - DDPO at PRDP's rate {rate:.1e}", {"reward": [many] * seeds}, glob),
        difference("base - DDPO at its own best rate", {"reward": [many] * seeds}, r[2]["ddpo global"]),
    ])
    verdicts[3] = ("Fig. 9 right: without per-prompt normalisation DDPO is unstable on few prompts too", [
        difference("per-prompt - global, each at its best", r[3]["ddpo"], r[3]["ddpo global"]),
        count("DDPO per-prompt stable", r[3]["ddpo"], few, True),
        count("global at per-prompt's settings unstable", r[3]["ddpo global, as ddpo"], few, False),
        count("global at its best unstable", r[3]["ddpo global"], few, False),
    ])
    own = best["many/ddpo global"].lr
    lost = [unstable(r[4][f"ratio {x}, lr {rate:.1e}"], many) for x in (0, 1, 3)]
    verdicts[4] = ("App. B: prompt-agnostic normalisation fails because rewards differ between prompts", [
        difference("reward at spread 0 - at 3, DDPO's best rate", r[4][f"ratio 0, lr {own:.1e}"], r[4][f"ratio 3, lr {own:.1e}"]),
        gain("more unstable runs with spread, PRDP's rate", f"{lost} of {seeds} at 0, 1, 3",
             lost == sorted(lost) and lost[2] > lost[0]),
    ])
    cells = r[5]
    verdicts[5] = ("Table 5: with clipping, only DDPO at large scale is unstable; without, all four are", [
        count("PRDP few, clip: stable", cells["prdp few clip"], few, True),
        count("PRDP few, none: unstable", cells["prdp few none"], few, False),
        count("PRDP many, clip: stable", cells["prdp many clip"], many, True),
        count("PRDP many, none: unstable", cells["prdp many none"], many, False),
        count("DDPO few, clip: stable", cells["ddpo few clip"], few, True),
        count("DDPO few, none: unstable", cells["ddpo few none"], few, False),
        count("DDPO many, clip: unstable", cells["ddpo many clip"], many, False),
        count("DDPO many, none: unstable", cells["ddpo many none"], many, False),
    ])
    offline = mean(r[6]["offline"]["reward"])
    curve = torch.tensor(r[6]["online"]["curve"]).mean(0)
    passed_at = int((curve > offline).float().argmax() + 1) * 2 if curve.max() > offline else None
    verdicts[6] = ("Fig. 7: online passes offline at about epoch 10 of 100 and ends far above", [
        difference("online - offline", r[6]["online"], r[6]["offline"]),
        gain("online passes offline's end by epoch 20", f"epoch {passed_at}", passed_at and passed_at <= 20),
    ])
    plane, base = r[7], {k: mean(v) for k, v in r[7]["base"].items() if k in ("reward", "match")}
    at = {b: {k: mean(plane[f"beta {b:g}"][k]) for k in ("reward", "match", "explained")} for b in BETAS}
    checks = [gain("reward rises and match falls as beta falls", "", all(
        at[a]["reward"] < at[b]["reward"] and at[a]["match"] > at[b]["match"] for a, b in itertools.pairwise(BETAS)))]
    checks += [
        difference("beta 1: reward above the base", plane["beta 1"], base["reward"]),
        gain("beta 1: at least 90% of the base's match", f"{at[1.0]['match']:.3f} of {base['match']:.3f}",
             at[1.0]["match"] > 0.9 * base["match"]),
        gain("DDPO: less than half of it", f"{mean(plane['ddpo']['match']):.3f}",
             mean(plane["ddpo"]["match"]) < base["match"] / 2),
        difference("beta .1 - DDPO in reward", plane["beta 0.1"], plane["ddpo"]),
    ]
    for i, b in enumerate(BETAS):
        target = dict(zip(CURVE, frontier["blind"], strict=False)).get(b, frontier["blind"][-1])
        off = at[b]["reward"] - target[0], at[b]["match"] - target[1]
        checks.append(gain(f"beta {b:g}: within 10% of the range of the exact optimum, explained > 0",
                           f"reward {off[0]:+.2f}, match {off[1]:+.3f}, explained {at[b]['explained']:.2f}",
                           abs(off[0]) < -0.1 * base["reward"] and abs(off[1]) < 0.1 and at[b]["explained"] > 0))
    verdicts[7] = ("Figs. 8, 10: beta sets how far; a large one keeps the prompt, DDPO forgets it", checks)
    seen = mean(r[8]["many"]["reward"]) - many
    unseen = mean(r[8]["many"]["unseen"]) - mean(r[8]["many base"]["unseen"])
    verdicts[8] = ("Table 2, unseen prompts: what is learned on many prompts carries over", [
        gain("unseen gain at least 80% of the seen gain", f"{unseen:.2f} of {seen:.2f}", unseen > 0.8 * seen),
        difference("unseen: after 100,000 prompts - after 45", r[8]["many"], r[8]["few"], key="unseen"),
        difference("unseen: PRDP - DDPO", r[8]["many"], r[8]["many ddpo global"], key="unseen"),
    ])
    verdicts[9] = ("App. B's conjecture: the missing per-prompt baseline is what fails", [
        difference("DDPO per group - DDPO global, best rates", r[9]["group"], r[9]["global"]),
        count("DDPO per group at PRDP's rate stable", r[9]["group at prdp's rate"], many, True),
        count("DDPO global at PRDP's rate unstable", glob, many, False),
        difference("and PRDP above DDPO per group", r[9]["prdp"], r[9]["group"]),
    ])
    out = {}
    for claim, (says, checks) in verdicts.items():
        passed = sum(c["passed"] for c in checks)
        word = "reproduced" if passed == len(checks) else "in part" if passed else "not reproduced"
        out[claim] = {"paper": says, "checks": checks, "verdict": f"{word}: {passed} of {len(checks)}"}
    return out


# ---- Pictures ------------------------------------------------------------------------------------------

COLOURS = {"prdp": "#1f77b4", "ddpo": "#d62728", "global": "#d62728", "group": "#2ca02c", "other": "#7f7f7f"}


def band(axis, result: dict, queries: float, label: str, **style) -> None:
    """Mean training reward over seeds, and every seed in faint: a collapse of some is no mean."""
    curve = torch.tensor(result["curve"])
    x = torch.linspace(queries / curve.shape[1], queries, curve.shape[1])
    for row in curve:
        axis.plot(x, row, lw=0.5, alpha=0.35, color=style["color"])
    axis.plot(x, curve.mean(0), lw=2.2, label=label, **style)


def figure_training(r: dict, best: dict, seeds: int, path: Path) -> None:
    """Fig. 9 again, and the whole axis of learning rates."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6))
    rate = best["many/prdp"].lr
    many = mean(r[2]["base"]["reward"])
    name = f"{half_decade(round(2 * math.log10(rate))):.1e}"
    band(left, r[9]["group at prdp's rate"], 512, f"DDPO normalised per group, rate {name}", color=COLOURS["group"])
    band(left, r[2]["prdp"], 512, f"PRDP, rate {name}", color=COLOURS["prdp"])
    band(left, r[2]["ddpo global"], 512, f"DDPO at its best rate {best['many/ddpo global'].lr:.1e}", color="#ff9896")
    band(left, r[9]["global at prdp's rate"], 512, f"DDPO at PRDP's rate {name}", color=COLOURS["ddpo"])
    left.set(title="100,000 prompts: 1,000 epochs, K = 1", xlabel="thousand reward queries", ylabel="reward")
    few = mean(r[1]["base"]["reward"])
    band(middle, r[1]["ddpo"], 51.2, "DDPO, normalised per prompt", color=COLOURS["group"])
    band(middle, r[1]["prdp"], 51.2, "PRDP", color=COLOURS["prdp"])
    band(middle, r[3]["ddpo global, as ddpo"], 51.2, "DDPO, one mean for all prompts", color=COLOURS["ddpo"])
    band(middle, r[5]["prdp few none"], 51.2, "PRDP without its clip", color="#9ecae1", ls="--")
    band(middle, r[6]["offline"], 51.2, "PRDP offline", color="#9467bd", ls=":")
    middle.set(title="45 prompts: 100 epochs, K = 10", xlabel="thousand reward queries")
    for method, label, colour in (
        ("prdp", "PRDP", COLOURS["prdp"]), ("ddpo group", "DDPO per group", COLOURS["group"]),
        ("ddpo global", "DDPO, one mean for all prompts", COLOURS["ddpo"]),
    ):  # fmt: skip
        rates = [half_decade(i) for i in AXIS[method]]
        rows = torch.tensor([r[2][f"{method} {x:.1e}"]["reward"] for x in rates])
        right.plot(rates, rows.mean(1), color=colour, lw=2.2, label=label)
        right.plot(rates, rows, "o", color=colour, ms=4, alpha=0.5)
    right.set(title="100,000 prompts: final reward over the learning rate", xscale="log", xlabel="learning rate")
    for axis, base in ((left, many), (middle, few), (right, many)):
        axis.axhline(base, color="black", lw=1, ls=":")
        axis.annotate("pretrained", (0.99, base), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axis.set_ylim(-0.3, 8)
        axis.legend(fontsize=8, loc="upper left" if axis is not right else "lower left", framealpha=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Points at the paper's schedule, {seeds} seeds: each seed thin, their mean bold", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_plane(axis, cloud: list, title: str) -> None:
    """Points coloured by where their prompt wants them, on the map of the blind reward."""
    place = points.PLANE[::4, ::4]
    axis.contourf(place[..., 0], place[..., 1], points.reward_of("blind", place, torch.zeros(1, dtype=int)),
                  levels=24, cmap="Greys_r", alpha=0.55)  # fmt: skip
    x = torch.tensor(cloud)
    hue = points.ANGLES[:45, 0].repeat_interleave(len(cloud) // 45)
    axis.scatter(x[:, 0], x[:, 1], c=hue, cmap="hsv", vmin=0, vmax=2 * math.pi, s=9, edgecolors="none")
    axis.plot(*points.STAR.tolist(), marker="*", ms=17, mfc="white", mec="black")
    axis.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=10)


def figure_plane(r: dict, frontier: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 7.4))
    arms = r[7]
    shown = [("base", "pretrained"), ("beta 3", "PRDP, beta 3"), ("beta 1", "PRDP, beta 1"),
             ("beta 0.3", "PRDP, beta .3"), ("beta 0.1", "PRDP, beta .1"), ("ddpo", "DDPO, no KL term")]  # fmt: skip
    for i, (name, title) in enumerate(shown):
        axis = figure.add_subplot(2, 4, (1, 2, 3, 5, 6, 7)[i])
        note = f"{title}\nreward {mean(arms[name]['reward']):.2f}, match {mean(arms[name]['match']):.2f}"
        draw_plane(axis, arms[name]["cloud"], note)
    axis = figure.add_subplot(1, 4, 4)
    curve = torch.tensor(frontier["blind"])
    axis.plot(curve[:, 1], curve[:, 0], "-", color="black", lw=1.5, label="exact optimum of Eq. 7, beta 10 to .1")
    for suffix, face, label in (("", COLOURS["prdp"], "PRDP"), (" decay", "white", "PRDP, decaying rate")):
        x = [mean(arms[f"beta {b:g}{suffix}"]["match"]) for b in BETAS]
        y = [mean(arms[f"beta {b:g}{suffix}"]["reward"]) for b in BETAS]
        axis.plot(x, y, "o", ms=8, mfc=face, mec=COLOURS["prdp"], label=label)
        if not suffix:
            for b, *at in zip(BETAS, x, y, strict=True):
                axis.annotate(f"  {b:g}", at, fontsize=9)
    for b, row in zip(CURVE, frontier["blind"], strict=False):
        if b in BETAS:
            axis.plot(row[1], row[0], "x", color="black", ms=7)
    axis.plot(mean(arms["ddpo"]["match"]), mean(arms["ddpo"]["reward"]), "s", ms=8, color=COLOURS["ddpo"], label="DDPO")
    axis.plot(mean(arms["base"]["match"]), mean(arms["base"]["reward"]), "D", ms=7, color="grey", label="pretrained")
    axis.set(xlabel="match: share of points at their own prompt's place", ylabel="reward", title="Fig. 10 against the exact optimum")
    axis.legend(fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A reward that ignores the prompt: minus the distance to the star. A prompt's colour says where its points belong.", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def figure_kl(r: dict, frontier: dict, path: Path) -> None:
    """Reward bought per nat of KL: exact on the plane; on D = 8 against ascent through the reward."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.4))
    curve = torch.tensor(frontier["own"])
    left.plot(curve[:, 2], curve[:, 0], color="black", lw=1.5, label="exact optimum of Eq. 7")
    left.set(title="The plane (D = 2), 45 prompts")
    ceiling = [(mean(v["kl"]), mean(v["reward"])) for n, v in r[10].items() if n.startswith("through")]
    right.plot(*zip(*sorted(ceiling), strict=True), color="black", lw=1.5, ls="--",
               label="ascent through the reward itself (no black box)")  # fmt: skip
    right.set(title="D = 8, 45 prompts")
    for axis, arms in ((left, r[11]), (right, r[10])):
        for label, prefix, suffix, style in (
            ("PRDP", "", "", dict(marker="o", color=COLOURS["prdp"])),
            ("PRDP, decaying rate", "", " decay", dict(marker="o", color=COLOURS["prdp"], mfc="white")),
        ):
            names = [n for n in arms if "beta" in n and "," not in n and "=" not in n and "width" not in n
                     and n.endswith("decay") == bool(suffix)]  # fmt: skip
            at = sorted((mean(arms[n]["kl"]), mean(arms[n]["reward"]), n) for n in names)
            axis.plot([a[0] for a in at], [a[1] for a in at], ls="-" if not suffix else ":", ms=8, label=label, **style)
            for kl, reward, n in at if not suffix else ():
                axis.annotate(n.split()[-1], (kl, reward), xytext=(4, -12), textcoords="offset points", fontsize=8)
        for n in arms:
            if "beta" in n or "base" in n:
                continue
            colour = COLOURS["group"] if "group" in n else COLOURS["ddpo"] if "ddpo" in n else COLOURS["other"]
            x, y = mean(arms[n]["kl"]), mean(arms[n]["reward"])
            axis.plot(x, y, "s", ms=6, color=colour)
            axis.annotate(n, (x, y), xytext=(6, -3), textcoords="offset points", fontsize=8)
        axis.axhline(mean(arms["base"]["reward"]), color="black", lw=1, ls=":", label="pretrained")
        axis.set(xscale="log", xlabel="KL of trajectories to the pretrained policy, nats", ylabel="reward", xlim=(0.05, 1000))
        axis.legend(fontsize=8, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- All of it -----------------------------------------------------------------------------------------


def rounded(x):
    """Four digits; what json cannot hold (nan, inf) as null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.4g}") if math.isfinite(x) else None
    return x


def parse_seeds(text: str) -> list[int]:
    first, _, last = text.partition("..")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claim", type=int, choices=range(1, 12), help="only this one")
    parser.add_argument("--quick", action="store_true", help="everything at tiny size: does it run?")
    parser.add_argument("--show", action="store_true", help="the two-minute lesson")
    parser.add_argument("--seeds", type=parse_seeds, default=list(range(8)), help="FIRST..LAST")
    parser.add_argument("--out", type=Path, help="folder of finished arms (default runs/points)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    out = args.out or HERE.parent / "runs" / "points"
    runner = Runner(out, args.quick, args.workers)
    seeds = args.seeds[:2] if args.quick else args.seeds
    official = not args.quick and seeds == list(range(8)) and not args.claim
    home = HERE if official else out

    best, table = sweep(runner, list(SWEEPS))
    claims = experiments(best)
    arms = {f"{n}/{label}": arm for n, group in claims.items() for label, arm in group.items()}
    frontier = runner("exact optimum", exact_jobs(best, args.quick))
    results = runner.arms("claims", arms, seeds, NOISE)
    r = {n: {label: results[f"{n}/{label}"] for label in group} for n, group in claims.items()}
    verdicts = judge(r, frontier, len(seeds), best)
    for n, v in verdicts.items():
        print(f"{n}. {v['paper']}: {v['verdict']}")
        for c in v["checks"]:
            print(f"     {'yes' if c['passed'] else 'NO '}  {c['name']}: {c['figure']}")
