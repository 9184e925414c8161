"""The experiments of toy/points.py: what is run, and by which criteria it is judged.

Every method gets the same reward queries, updates and seeds. Rates, and a method's other setting,
come from sweeps on seeds and evaluation noise that no reported number uses; a sweep goes on until
its best cell lies inside. Differences are paired by seed; intervals are Student's t, 95%.
"""

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

import points
import points_figures
import torch
from points import HERE, Arm
from points_figures import mean
from safetensors.torch import save_file

SWEEP_NOISE, NOISE = 1_000_001, 1_000_002
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


# ---- Running arms: two at a time, each kept when it is done --------------------------------------


def effort_of(arm: Arm, seeds: int) -> float:
    """About how long an arm takes, in units of its own: network rows times weights."""
    updates = 1 if arm.minibatches else arm.K
    return arm.E * arm.T * (updates + 0.6) * arm.N * arm.B * seeds * arm.width


def run_arm(arm: Arm, seeds: tuple[int, ...], noise_seed: int, count: int) -> dict:
    """One arm, all its seeds: trained and evaluated. Its figures by seed, ready for json."""
    torch.set_num_threads(1)
    started = time.time()
    method = points.pathwise if arm.method == "pathwise" else points.train
    seen = points.FEW if arm.prompts == "few" else points.SEEN
    weights, curve = method(arm, list(seeds))
    figures = points.evaluate(arm, weights, seen, count, noise_seed)
    figures["unseen"] = points.evaluate(arm, weights, points.UNSEEN, count, noise_seed)["reward"]
    every = max(1, arm.E // 50)
    curve = curve[:, : arm.E // every * every].unflatten(1, (-1, every)).mean(-1)
    figures["curve"] = curve.tolist()
    if arm.dims == 2:
        figures["cloud"] = cloud(arm, weights[:1], noise_seed)
    return figures | {"seconds": time.time() - started}


@torch.no_grad()
def cloud(arm: Arm, weights: torch.Tensor, noise_seed: int, count: int = 8) -> list[list[float]]:
    """x_0 (prompts * points, 2) of one seed on the 45 prompts, for the picture of the plane."""
    prompts = torch.arange(points.FEW.stop).repeat_interleave(count)[None]
    dice = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(1, prompts.shape[1], arm.T + 1, arm.dims, generator=dice)
    return points.Chain(arm).compare(weights, points.load_base(arm), prompts, noise)[0][0].tolist()


def work(job: tuple) -> None:
    """In a worker: one job, its result written under another name first, so that it is whole."""
    path, function, arguments = job
    part = path.with_suffix(".part")
    part.write_text(json.dumps(function(*arguments)))
    part.rename(path)


def exact(arm: Arm, betas: list[float], prompts: int) -> list[list[float]]:
    return points.exact_frontier(arm, betas, range(prompts)).tolist()


class Runner:
    """Runs jobs on both cores, shows how far it is, and keeps what is done in `folder`."""

    def __init__(self, folder: Path, quick: bool, workers: int) -> None:
        self.folder, self.quick = folder, quick
        self.pool = multiprocessing.get_context("spawn").Pool(workers)

    def __call__(self, what: str, jobs: dict) -> dict:
        """{name: (function, arguments, effort)} -> {name: result}; equal jobs are done once."""
        paths, todo = {}, {}
        for name, (function, arguments, effort) in jobs.items():
            key = repr((function.__name__, arguments)).encode()
            paths[name] = self.folder / f"{hashlib.sha256(key).hexdigest()[:16]}.json"
            if not paths[name].exists():
                todo[paths[name]] = (function, arguments, effort)
        tasks = [(path, function, arguments) for path, (function, arguments, _) in todo.items()]
        efforts, done, started = [job[2] for job in todo.values()], 0.0, time.time()
        for i, _ in enumerate(self.pool.imap(work, tasks)):
            done += efforts[i]
            left = (time.time() - started) * (sum(efforts) / done - 1) / 60
            bar = "=" * round(30 * done / sum(efforts))
            text = f"{what:16} [{bar:30}] {i + 1}/{len(tasks)}, {left:.0f} min left "
            print(f"\r{text}", end="" if i + 1 < len(tasks) else "\n", flush=True)
        return {name: json.loads(path.read_text()) for name, path in paths.items()}

    def arms(self, what: str, arms: dict, seeds, noise_seed: int) -> dict:
        """{name: arm} -> {name: figures}; seeds: a list, or a function of the name."""
        per_prompt, jobs = (16 if self.quick else 128), {}
        for name, arm in arms.items():
            if self.quick:
                small = dict(E=2, K=min(arm.K, 2), N=min(arm.N, 4), B=min(arm.B, 4))
                arm = replace(arm, **small)
            own = tuple(seeds(name) if callable(seeds) else seeds)
            jobs[name] = (run_arm, (arm, own, noise_seed, per_prompt), effort_of(arm, len(own)))
        return self(what, jobs)


# ---- Sweeps: the rate, and the one other setting that matters ------------------------------------

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
    "few/offline": (Arm(offline=True), "", NONE),
    "few/ddpo-sf": (Arm(method="ddpo-sf", normalise="per-prompt", K=1), "", NONE),
    "few/rwr": (Arm(method="rwr", beta=0.32), "", NONE),
    "few/rwr-sparse": (Arm(method="rwr-sparse"), "", NONE),
    "few/dpo": (Arm(method="dpo", beta=0.1), "", NONE),
    "few/diffusion-dpo": (Arm(method="diffusion-dpo", beta=30.0), "", NONE),
    "many/prdp": (MANY, "", NONE),
    "many/ddpo global": (replace(MANY, method="ddpo", **ALONE), "", NONE),
    "many/ddpo group": (replace(MANY, method="ddpo", normalise="group"), "", NONE),
    "many K=10/prdp": (MANY_K10, "", NONE),
    "many K=10/ddpo global": (replace(MANY_K10, **DDPO, **ALONE), "clip", CLIPS),
    "plane/prdp": (Arm(dims=2, reward="blind", E=250, beta=1.0), "", NONE),
}


def half_decade(i: int) -> float:
    return float(f"{10 ** (i / 2):.1e}")


def sweep_seeds(name: str) -> list[int]:
    """Two for what the claims are about, one for the rest; no reported number uses them."""
    twice = name.startswith("many/") or name.endswith(("/prdp", "/ddpo"))
    return [900, 901] if twice else [900]


def with_settings(name: str, rate: float, other: float | None = None) -> Arm:
    arm, field, _ = SWEEPS[name]
    return replace(arm, lr=rate, **({field: other} if field else {}))


def settings(cell: tuple) -> list[float]:
    return [half_decade(i) for i in cell if i is not None]


def score(arm: Arm, result: dict) -> float:
    """What a sweep maximises: the final reward; for Fig. 10 on the plane Eq. 6, with beta's KL."""
    price = arm.beta * mean(result["kl"]) if arm.dims == 2 else 0.0
    reward = mean(result["reward"]) - price
    return reward if math.isfinite(reward) else -math.inf


def sweep(runner: Runner, names: list[str]) -> tuple[dict[str, Arm], dict]:
    """The best cell of each sweep; its edges move until the best lies inside."""
    cells = {name: set(itertools.product(RATES, SWEEPS[name][2])) for name in names}
    if runner.quick:
        cells = {name: {min(c, key=str)} for name, c in cells.items()}
    for round_ in range(1 if runner.quick else 5):
        arms = {
            (n, c): with_settings(n, *settings(c)) for n in names for c in sorted(cells[n], key=str)
        }
        what, seeds = f"sweep, round {round_ + 1}", lambda key: sweep_seeds(key[0])
        results = runner.arms(what, arms, seeds, SWEEP_NOISE)
        scores = {key: score(arms[key], result) for key, result in results.items()}
        best = {n: max(cells[n], key=lambda c, n=n: scores[n, c]) for n in names}
        for n in names:
            for axis in range(2 if SWEEPS[n][1] else 1):
                values = sorted({c[axis] for c in cells[n]})
                wider = {values[0]: values[0] - 1, values[-1]: values[-1] + 1}.get(best[n][axis])
                if wider is not None:
                    cells[n] |= {(*c[:axis], wider, *c[axis + 1 :]) for c in cells[n]}
    table = {}
    for n in names:
        tried = [[*settings(c), score] for (m, c), score in scores.items() if m == n]
        table[n] = {"other": SWEEPS[n][1], "best": settings(best[n]), "cells": tried}
    return {n: with_settings(n, *settings(best[n])) for n in names}, table


# ---- The experiments -----------------------------------------------------------------------------

BETAS = (3.0, 1.0, 0.3, 0.1)  # of Fig. 10, in reward per nat
CURVE = [10.0, 3.0, 1.6, 1.0, 0.6, 0.3, 0.17, 0.1]  # and of the exact curve
METHODS = ("prdp", "ddpo global", "ddpo group")  # on many prompts
AXIS = [half_decade(i) for i in range(-8, -4)]  # and their rates in Fig. 9, 8 seeds at each
ORDER = [2, 5, 7, 1, 3, 6, 4, 9, 8, 11, 10]  # what matters most first


def experiments(best: dict[str, Arm]) -> dict[int, dict[str, Arm]]:
    """The arms of each claim. Equal arms of different claims are run once."""
    few, ddpo, glob = best["few/prdp"], best["few/ddpo"], best["few/ddpo global"]
    group = best["few/ddpo group"]
    many = {m: best[f"many/{m}"] for m in METHODS}
    rate = many["prdp"].lr
    k10, k10_ddpo = best["many K=10/prdp"], best["many K=10/ddpo global"]
    inf, slow = math.inf, dict(decay=True)
    blind = best["plane/prdp"]  # 250 epochs, as Fig. 10
    plane = replace(blind, reward="own", E=100)
    faded = replace(plane, lr=1e-3, decay=True)
    few_base, many_base = replace(few, lr=0.0, E=1, K=1), replace(MANY, lr=0.0, E=1)
    return {
        1: {
            "base": few_base,
            "prdp": replace(few, beta=0.005), "prdp beta .02": few,
            "ddpo": ddpo, "ddpo, every sample K times": replace(ddpo, minibatches=False),
        },
        2: {
            "base": many_base,
            "ddpo global at prdp's rate": replace(many["ddpo global"], lr=rate),
            "ddpo group at prdp's rate": replace(many["ddpo group"], lr=rate),
            **{f"{m} {x:.1e}": replace(many[m], lr=x) for m in METHODS for x in AXIS},
            **{m: many[m] for m in METHODS},
        },
        3: {
            "base": few_base, "ddpo": ddpo, "ddpo global": glob,
            "ddpo global, as ddpo": replace(ddpo, normalise="global"), "prdp": few,
            "ddpo at prdp's settings": replace(ddpo, lr=few.lr, clip=few.clip),
            "ddpo global at prdp's settings": replace(glob, lr=few.lr, clip=few.clip),
        },
        4: {"base": many_base} | {
            f"spread {spread:g}, {name} rate": replace(many["ddpo global"], spread=spread, lr=lr)
            for spread, name, lr in (
                (0.0, "best", many["ddpo global"].lr), (3.0, "best", many["ddpo global"].lr),
                (0.0, "prdp's", rate), (1.0, "prdp's", rate), (3.0, "prdp's", rate),
            )
        },
        5: {
            "few base": few_base, "many base": many_base,
            "prdp few clip": few, "prdp few none": replace(few, clip=inf),
            "ddpo few clip": ddpo, "ddpo few none": replace(ddpo, clip=inf),
            "prdp many clip": k10, "prdp many none": replace(k10, clip=inf),
            "ddpo many clip": k10_ddpo, "ddpo many none": replace(k10_ddpo, clip=inf),
            "ddpo many clip, prdp's rate": replace(k10_ddpo, lr=k10.lr),
            "ddpo few global clip": glob,
        },
        6: {"online": few, "offline": best["few/offline"]},
        7: {
            "base": replace(blind, lr=0.0, E=1, K=1),
            **{f"beta {b:g}": replace(blind, beta=b) for b in BETAS},
            "ddpo": replace(ddpo, dims=2, reward="blind", E=250),
        },
        8: {
            "few base": few_base, "few": few, "many base": many_base,
            "many": many["prdp"], "many ddpo global": many["ddpo global"],
        },
        9: {
            "base": many_base, "prdp": many["prdp"],
            "group": many["ddpo group"], "global": many["ddpo global"],
            "group at prdp's rate": replace(many["ddpo group"], lr=rate),
            "global at prdp's rate": replace(many["ddpo global"], lr=rate),
        },
        10: {
            "base": few_base,
            **{f"prdp beta {b:g}": replace(few, beta=b) for b in (0.005, 0.02, 0.1, 0.3)},
            "prdp beta 0.02 decay": replace(few, **slow),
            "ddpo decay": replace(ddpo, **slow), "ddpo group decay": replace(group, **slow),
            **{n[4:]: best[n] for n in SWEEPS
               if n.startswith("few/") and n not in ("few/prdp", "few/offline")},
            "many base": many_base,
            **{f"many {m}": many[m] for m in METHODS},
            "many prdp beta 0.005": replace(many["prdp"], beta=0.005),
            **{f"many {m} decay": replace(many[m], **slow) for m in METHODS},
        },
        11: {
            "base": replace(plane, lr=0.0, E=1, K=1),
            **{f"beta {b:g}": replace(plane, beta=b) for b in (1.0, 0.3, 0.1)},
            **{f"beta {b:g} decay": replace(faded, beta=b) for b in (1.0, 0.3, 0.1)},
            "beta 1 decay, x_T shared": replace(faded, shared=True),
            "beta 1 decay, 300 epochs": replace(faded, E=300),
            "ddpo": replace(ddpo, dims=2), "ddpo decay": replace(ddpo, dims=2, **slow),
            "ddpo group": replace(group, dims=2),
            "beta 1, through the reward": replace(plane, method="pathwise", lr=1e-3),
            "T=20 base": replace(plane, T=20, lr=0.0, E=1, K=1),
            "T=20 beta 1 decay": replace(faded, T=20),
            "T=50 base": replace(plane, T=50, lr=0.0, E=1, K=1),
            "T=50 beta 1 decay": replace(faded, T=50),
            "width 128 base": replace(plane, width=128, lr=0.0, E=1, K=1),
            "width 128 beta 1 decay": replace(faded, width=128),
        },
    }  # fmt: skip


def exact_jobs(quick: bool) -> dict:
    """The exact optima that arms on the plane are held against, by reward, T and width."""
    curve, one = (CURVE[:2], 1) if quick else (CURVE, 45)
    jobs = {
        "blind": (Arm(dims=2, reward="blind"), curve), "own": (Arm(dims=2), [*curve, 0.05]),
        "T=20": (Arm(dims=2, T=20), [1.0]), "T=50": (Arm(dims=2, T=50), [1.0]),
        "width 128": (Arm(dims=2, width=128), [1.0]),
    }  # fmt: skip
    return {n: (exact, (a, b, one), 3e8 * a.T * len(b)) for n, (a, b) in jobs.items()}


# ---- Verdicts: criteria, written before any number -----------------------------------------------


def check(name: str, figure: str, passed: bool) -> dict:
    return {"name": name, "figure": figure, "passed": bool(passed)}


def above(name: str, a: dict, b: dict, margin: float = 0.0, key: str = "reward") -> dict:
    """Passes if a - b, paired by seed, exceeds `margin` by its whole 95% interval (Student's t)."""
    x, y = (torch.tensor(arm[key], dtype=torch.float64) for arm in (a, b))
    difference = x - y.expand_as(x) if len(y) == 1 else x - y
    n = len(difference)
    middle, half = difference.mean().item(), T95[n - 2] * (difference.std() / n**0.5).item()
    return check(name, f"{middle:+.3f} +- {half:.3f}", middle - half > margin)


def unstable(arm: dict, base: dict) -> int:
    """How many runs lost, at some time, more than half of the reward they had gained by then (of a
    gain below 1: more than .5). Of the base's reward, then training rewards, averaged over
    fiftieths of the run."""
    start = torch.full((len(arm["curve"]), 1), mean(base["reward"]))
    curve = torch.cat([start, torch.tensor(arm["curve"])], 1)
    best = curve.cummax(1).values
    lost = (best - curve) / (best - start).clamp(min=1)
    return int((~(lost <= 0.5)).any(1).sum())  # so that nan counts as lost


def cell(name: str, arm: dict, base: dict, stable: bool) -> dict:
    """Stable: at most an eighth of the runs is unstable. Unstable: at least half of them."""
    bad, runs = unstable(arm, base), len(arm["reward"])
    passed = bad <= runs / 8 if stable else bad >= runs / 2
    word = "stable" if stable else "unstable"
    return check(f"{name}: {word}", f"{bad} of {runs} runs unstable", passed)


def claim_1(a: dict, frontier: dict) -> tuple[str, list]:
    slack = -0.05 * (mean(a["ddpo"]["reward"]) - mean(a["base"]["reward"]))
    return "Table 1: on few prompts PRDP's reward matches DDPO's, or is slightly better", [
        above("PRDP - base", a["prdp"], a["base"]),
        above("DDPO - base", a["ddpo"], a["base"]),
        above("PRDP - DDPO, above -5% of DDPO's gain", a["prdp"], a["ddpo"], slack),
        above("PRDP - DDPO, above 0", a["prdp"], a["ddpo"]),
    ]


def claim_2(a: dict, frontier: dict) -> tuple[str, list]:
    return (
        "Table 2, Fig. 9 left: on many prompts PRDP is stable and improves, DDPO ends below base",
        [
            above("PRDP - base", a["prdp"], a["base"]),
            cell("PRDP", a["prdp"], a["base"], True),
            above("PRDP - DDPO, each at its best rate", a["prdp"], a["ddpo global"]),
            above("base - DDPO, at PRDP's rate", a["base"], a["ddpo global at prdp's rate"]),
            above("base - DDPO, at DDPO's best rate", a["base"], a["ddpo global"]),
        ],
    )


def claim_3(a: dict, frontier: dict) -> tuple[str, list]:
    return "Fig. 9 right: normalised over all prompts, DDPO is unstable on few prompts too", [
        above("per-prompt - global, each at its best", a["ddpo"], a["ddpo global"]),
        cell("DDPO per-prompt", a["ddpo"], a["base"], True),
        cell("DDPO global, per-prompt's settings", a["ddpo global, as ddpo"], a["base"], False),
        cell("DDPO global, its best", a["ddpo global"], a["base"], False),
    ]


def claim_4(a: dict, frontier: dict) -> tuple[str, list]:
    lost = [unstable(a[f"spread {x}, prdp's rate"], a["base"]) for x in (0, 1, 3)]
    best = [a[f"spread {x}, best rate"] for x in (0, 3)]
    return "App. B: what fails is one mean for prompts whose rewards differ", [
        above("spread 0 - spread 3, DDPO's best rate", *best),
        check("more unstable runs with more spread, PRDP's rate", f"{lost} at 0, 1, 3",
              lost == sorted(lost) and lost[2] > lost[0]),
    ]  # fmt: skip


def claim_5(a: dict, frontier: dict) -> tuple[str, list]:
    cells = [("prdp few", True), ("ddpo few", True), ("prdp many", True), ("ddpo many", False)]
    bases = {name: a[f"{name.split()[1]} base"] for name, _ in cells}
    return "Table 5: clipped, only DDPO on many prompts is unstable; unclipped, all four are", [
        *(cell(f"{name}, clip", a[f"{name} clip"], bases[name], stable) for name, stable in cells),
        *(cell(f"{name}, no clip", a[f"{name} none"], bases[name], False) for name, _ in cells),
    ]


def claim_6(a: dict, frontier: dict) -> tuple[str, list]:
    curve, offline = torch.tensor(a["online"]["curve"]).mean(0), mean(a["offline"]["reward"])
    ahead = (curve > offline).nonzero().flatten().tolist()
    share = (ahead[0] + 1) / len(curve) if ahead else math.inf
    return "Fig. 7: online passes offline at a tenth of its epochs, and ends far above", [
        above("online - offline", a["online"], a["offline"]),
        check("passes it in the first fifth", f"after {share:.0%} of the epochs", share <= 0.2),
    ]


def claim_7(a: dict, frontier: dict) -> tuple[str, list]:
    arms = [a[f"beta {b:g}"] for b in BETAS]
    base, ddpo = a["base"], a["ddpo"]
    match, reward = ([mean(arm[key]) for arm in arms] for key in ("match", "reward"))
    kept, forgot = match[1] / mean(base["match"]), mean(ddpo["match"]) / mean(base["match"])
    checks = [
        check("beta 3, 1, .3, .1: reward rises, match falls", f"{[round(x, 2) for x in reward]}",
              reward == sorted(reward) and match == sorted(match, reverse=True)),
        above("beta 1 - base in reward", arms[1], base),
        check("beta 1 keeps 90% of the base's match", f"{kept:.0%}", kept > 0.9),
        check("DDPO keeps less than half of it", f"{forgot:.0%}", forgot < 0.5),
        above("beta .1 - DDPO in reward", arms[3], ddpo),
    ]  # fmt: skip
    exact = frontier["blind"]
    for b, arm in zip(BETAS, arms, strict=True):
        if b not in exact:  # of --quick
            continue
        off = mean(arm["reward"]) - exact[b][0], mean(arm["match"]) - exact[b][1]
        fit, near = mean(arm["explained"]), abs(off[0]) < -0.1 * mean(base["reward"])
        name = f"beta {b:g}: off the exact optimum by less than 10% of the base's reward and .1 in "
        figure = f"reward {off[0]:+.2f}, match {off[1]:+.3f}, explained {fit:.2f}"
        passed = near and abs(off[1]) < 0.1 and fit > 0
        checks.append(check(name + "match; explained > 0", figure, passed))
    return "Figs. 8, 10: beta sets how far; a large one keeps the prompt, DDPO forgets it", checks


def claim_8(a: dict, frontier: dict) -> tuple[str, list]:
    seen, unseen = (mean(a["many"][k]) - mean(a["many base"][k]) for k in ("reward", "unseen"))
    return "Table 2, unseen prompts: what is learned on many prompts carries over", [
        check("unseen gain > 80% of seen", f"{unseen:.2f} of {seen:.2f}", unseen > 0.8 * seen),
        above("unseen: after 100,000 - after 45 prompts", a["many"], a["few"], key="unseen"),
        above("unseen: PRDP - DDPO", a["many"], a["many ddpo global"], key="unseen"),
    ]


def claim_9(a: dict, frontier: dict) -> tuple[str, list]:
    return "App. B's conjecture: the missing mean of each prompt is what makes DDPO fail", [
        above("DDPO per group - DDPO global, best rates", a["group"], a["global"]),
        cell("DDPO per group, PRDP's rate", a["group at prdp's rate"], a["base"], True),
        cell("DDPO global, PRDP's rate", a["global at prdp's rate"], a["base"], False),
    ]


CRITERIA = {
    1: claim_1, 2: claim_2, 3: claim_3, 4: claim_4, 5: claim_5,
    6: claim_6, 7: claim_7, 8: claim_8, 9: claim_9,
}  # fmt: skip


def judge(r: dict[int, dict], frontier: dict) -> dict[int, dict]:
    """Each claim's sentence, its checks one by one, and how many passed."""
    verdicts = {}
    for n in sorted(set(r) & set(CRITERIA)):
        paper, checks = CRITERIA[n](r[n], frontier)
        passed = sum(c["passed"] for c in checks)
        word = "reproduced" if passed == len(checks) else "in part" if passed else "not reproduced"
        word = f"{word}, {passed} of {len(checks)}"
        verdicts[n] = {"paper": paper, "verdict": word, "checks": checks}
    return verdicts


# ---- All of it -----------------------------------------------------------------------------------


def gaps(arms: dict, exact: dict) -> dict:
    """J = reward - beta KL of arms at beta 1, and their share of what the exact optimum gains."""
    rows = {}
    for label, arm in arms.items():
        kind = next((k for k in exact if label.startswith(k)), "own")
        if "beta 1" in label and 1.0 in exact[kind]:
            reward, _, kl = exact[kind][1.0]
            base = mean(arms["base" if kind == "own" else f"{kind} base"]["reward"])
            j = mean(arm["reward"]) - mean(arm["kl"])
            rows[label] = {"J": j, "share": (j - base) / (reward - kl - base)}
    return rows


def print_results(r: dict, verdicts: dict, exact: dict) -> None:
    for n, arms in r.items():
        print(f"\n{'':34} reward          KL, nats  explained  match  unseen")
        for label, arm in arms.items():
            error = torch.tensor(arm["reward"]).std() / len(arm["reward"]) ** 0.5
            rest = [mean(arm[key]) for key in ("kl", "explained", "match", "unseen")]
            numbers = "{:10.2f} {:10.2f} {:6.3f} {:7.3f}".format(*rest)
            print(f"{label:34} {mean(arm['reward']):6.3f} +- {error:.3f} {numbers}")
        if n == 11:
            for label, row in gaps(arms, exact).items():
                print(f"{label:34} J {row['J']:.3f}, {row['share']:.0%} of the optimum's gain")
        if n in verdicts:
            print(f"{n}. {verdicts[n]['paper']}: {verdicts[n]['verdict']}")
        for item in verdicts.get(n, {"checks": []})["checks"]:
            print(f"   {'yes' if item['passed'] else 'NO ':3} {item['name']}: {item['figure']}")


def show(out: Path) -> None:
    """The lesson: five short runs on the plane, and a picture of them."""
    blind = Arm(dims=2, reward="blind", E=60)
    arms = {"base": replace(blind, lr=0.0, E=1, K=1)}
    arms |= {f"beta {beta:g}": replace(blind, beta=beta) for beta in BETAS}
    arms["ddpo"] = replace(blind, **DDPO, normalise="per-prompt", lr=1e-3)
    results = {}
    for name, arm in arms.items():
        results[name] = run_arm(arm, (0,), NOISE, 64)
        reward, match, kl = (results[name][key][0] for key in ("reward", "match", "kl"))
        print(f"{name:9} reward {reward:6.2f}   match {match:.2f}   KL {kl:6.2f} nats", flush=True)
    stored = json.loads((HERE / "points.json").read_text())["exact"]["blind"]
    exact = {float(beta): row for beta, row in stored.items()}
    points_figures.figure_plane(results, exact, out / "points_show.png")
    print(f"The picture: {out / 'points_show.png'}")


def pretrain() -> None:
    """points_base.safetensors, which is in the repository."""
    sizes = {(2, 64): 24_000, (8, 64): 30_000, (2, 128): 15_000}
    bases = {}
    for (dims, width), steps in sizes.items():
        bases[f"{dims}-{width}"] = points.pretrain(Arm(dims=dims, width=width), steps)
    save_file(bases, points.BASES)


def rounded(x):
    """Five digits; what json cannot hold (nan, inf) as null."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"processor": names[0], "cores": len(names), **versions}


def parse_seeds(text: str) -> list[int]:
    first, _, last = text.partition("..")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=points.__doc__, formatter_class=form)
    parser.add_argument("--claim", type=int, choices=ORDER, help="only this one")
    parser.add_argument("--quick", action="store_true", help="everything at tiny size")
    parser.add_argument("--show", action="store_true", help="the lesson: one picture")
    parser.add_argument("--pretrain", action="store_true", help="make the base models again")
    parser.add_argument("--seeds", type=parse_seeds, default=list(range(8)), help="FIRST..LAST")
    out = HERE.parent / "runs" / "points"
    parser.add_argument("--out", type=Path, default=out, help="keeps what is done; empty it after "
                        "a change of the code")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pretrain:
        return pretrain()
    if args.show:
        return show(args.out)

    runner = Runner(args.out, args.quick, args.workers)
    seeds = args.seeds[:2] if args.quick else args.seeds
    published = HERE / "points.json"
    if args.claim and published.exists():
        table = json.loads(published.read_text())["sweeps"]
        best = {name: with_settings(name, *row["best"]) for name, row in table.items()}
    else:
        best, table = sweep(runner, list(SWEEPS))
    claims = {n: experiments(best)[n] for n in ([args.claim] if args.claim else ORDER)}
    arms = {(n, label): arm for n, group in claims.items() for label, arm in group.items()}
    exact = {}
    if not args.claim or args.claim in (7, 11):
        jobs = exact_jobs(args.quick)
        for kind, rows in runner("exact optimum", jobs).items():
            exact[kind] = dict(zip(jobs[kind][1][1], rows, strict=True))
    results = runner.arms("claims", arms, seeds, NOISE)
    r = {n: {label: results[n, label] for label in group} for n, group in claims.items()}
    verdicts = judge(r, exact)
    print_results(r, verdicts, exact)
    if args.claim:
        return None

    official = not args.quick and seeds == list(range(8))
    home = HERE if official else args.out
    rates = {method: best[f"many/{method}"].lr for method in METHODS}
    points_figures.figure_training(r, rates, AXIS, home / "points_training.png")
    points_figures.figure_plane(r[7], exact["blind"], home / "points_plane.png")
    points_figures.figure_kl(r, exact["own"], home / "points_kl.png")
    stored = {
        f"{n}/{label}": {"arm": asdict(arms[n, label]), **results[n, label]} for n, label in arms
    }
    everything = {
        "machine": machine(), "seeds": seeds, "verdicts": verdicts, "exact": exact,
        "sweeps": table, "arms": stored,
    }  # fmt: skip
    (home / "points.json").write_text(json.dumps(rounded(everything)) + "\n")
    return None
