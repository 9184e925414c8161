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

SWEEP_NOISE, NOISE = 1_000_001, 1_000_002
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
        paths = {
            name: self.path(function.__name__, args) for name, (function, args, _) in jobs.items()
        }
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
                    print(
                        f"\r{what:24} [{bar:30}] {i + 1}/{len(tasks)}, {left:.0f} min left ",
                        end="",
                        flush=True,
                    )
            print()
        return {name: json.loads(path.read_text()) for name, path in paths.items()}

    def arms(self, what: str, arms: dict, seeds, noise_seed: int) -> dict:
        """{name: arm} -> {name: figures}; seeds: a list, or a function of the name."""
        per_prompt, jobs = (16 if self.quick else 128), {}
        for name, arm in arms.items():
            if self.quick:
                small = dict(E=2, K=min(arm.K, 2), N=min(arm.N, 4), B=min(arm.B, 4))
                arm = replace(arm, **small)
            own = tuple(seeds(name) if callable(seeds) else seeds)
            jobs[name] = (points.run_arm, (arm, own, noise_seed, per_prompt), cost(arm, len(own)))
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
}


def half_decade(i: int) -> float:
    return float(f"{10 ** (i / 2):.1e}")


def sweep_seeds(name: str) -> list[int]:
    """Two for what the claims are about, one for the rest; no reported number uses them."""
    return (
        [900, 901] if name.startswith("many/") or name.split("/")[1] in ("prdp", "ddpo") else [900]
    )


def with_settings(name: str, rate: float, other: float | None = None) -> Arm:
    arm, field, _ = SWEEPS[name]
    return replace(arm, lr=rate, **({field: other} if field else {}))


def set_cell(name: str, cell: tuple) -> Arm:
    return with_settings(name, *(half_decade(i) for i in cell if i is not None))


def sweep(runner: Runner, names: list[str]) -> tuple[dict[str, Arm], dict]:
    """The best cell of each sweep by final reward; edges move until the best lies inside."""
    cells = {name: set(itertools.product(RATES, SWEEPS[name][2])) for name in names}
    if runner.quick:
        cells = {name: {min(c, key=str)} for name, c in cells.items()}
    for round_ in range(1 if runner.quick else 5):
        arms = {(n, c): set_cell(n, c) for n in names for c in sorted(cells[n], key=str)}
        results = runner.arms(
            f"sweep, round {round_ + 1}", arms, lambda key: sweep_seeds(key[0]), SWEEP_NOISE
        )
        scores = {key: mean(result["reward"]) for key, result in results.items()}
        best = {n: max(cells[n], key=lambda c, n=n: scores[n, c]) for n in names}
        for n in names:
            for axis in range(2 if SWEEPS[n][1] else 1):
                values = sorted({c[axis] for c in cells[n]})
                wider = {values[0]: values[0] - 1, values[-1]: values[-1] + 1}.get(best[n][axis])
                if wider is not None:
                    cells[n] |= {
                        tuple(wider if a == axis else v for a, v in enumerate(c)) for c in cells[n]
                    }
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
    "ddpo global": range(-8, -5),
    "ddpo group": range(-7, -5),
}
PLANE = Arm(dims=2, beta=1.0)


ORDER = [2, 5, 7, 1, 3, 6, 4, 9, 8, 11, 10]  # what matters most first


def experiments(best: dict[str, Arm]) -> dict[int, dict[str, Arm]]:
    """The arms of each claim. Equal arms of different claims are run once."""
    few, ddpo, glob = best["few/prdp"], best["few/ddpo"], best["few/ddpo global"]
    group = best["few/ddpo group"]
    many = {m: best[f"many/{m}"] for m in AXIS}
    rate = many["prdp"].lr
    k10, k10_ddpo = best["many K=10/prdp"], best["many K=10/ddpo global"]
    inf, blind = math.inf, dict(dims=2, reward="blind", E=250)
    plane, slow = replace(few, dims=2, beta=1.0), dict(decay=True)
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
            **{f"{m} {half_decade(i):.1e}": replace(many[m], lr=half_decade(i)) for m in AXIS for i in AXIS[m]},
            **{m: many[m] for m in AXIS},
            **{f"{m} decay {half_decade(i):.1e}": replace(many[m], lr=half_decade(i), **slow)
               for m, i in (("prdp", -6), ("ddpo global", -7), ("ddpo group", -6))},
        },
        3: {
            "base": few_base, "ddpo": ddpo, "ddpo global": glob,
            "ddpo global, as ddpo": replace(ddpo, normalise="global"), "prdp": few,
        },
        4: {"base": many_base} | {
            f"ratio {ratio:g}, {name} rate": replace(many["ddpo global"], ratio=ratio, lr=lr)
            for ratio, name, lr in (
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
            "base": replace(plane, reward="blind", lr=0.0, E=1, K=1),
            **{f"beta {b:g}": replace(few, beta=b, **blind) for b in BETAS},
            "ddpo": replace(ddpo, **blind),
        },
        8: {
            "few base": few_base, "few": few, "many base": many_base,
            "many": many["prdp"], "many ddpo global": many["ddpo global"],
        },
        9: {
            "base": many_base, "prdp": many["prdp"], "group": many["ddpo group"], "global": many["ddpo global"],
            "group at prdp's rate": replace(many["ddpo group"], lr=rate),
            "global at prdp's rate": replace(many["ddpo global"], lr=rate),
        },
        10: {
            "base": few_base,
            **{f"prdp beta {b:g}": replace(few, beta=b) for b in (0.005, 0.02, 0.1, 0.3)},
            "prdp beta 0.02 decay": replace(few, **slow),
            "ddpo decay": replace(ddpo, **slow), "ddpo group decay": replace(group, **slow),
            **{n[4:]: best[n] for n in SWEEPS if n.startswith("few/") and n not in ("few/prdp", "few/offline")},
        },
        11: {
            "base": replace(plane, lr=0.0, E=1, K=1),
            **{f"beta {b:g}": replace(plane, beta=b) for b in (1.0, 0.3, 0.1)},
            **{f"beta {b:g} decay": replace(plane, beta=b, **slow) for b in (1.0, 0.3, 0.1)},
            "beta 1 decay, x_T shared": replace(plane, shared=True, **slow),
            "ddpo": replace(ddpo, dims=2), "ddpo decay": replace(ddpo, dims=2, **slow),
            "ddpo group": replace(group, dims=2),
            "beta 1, through the reward": replace(plane, method="pathwise", lr=1e-3),
            "T=20 base": replace(plane, T=20, lr=0.0, E=1, K=1),
            "T=20 beta 1 decay": replace(plane, T=20, **slow),
            "width 128 base": replace(plane, width=128, lr=0.0, E=1, K=1),
            "width 128 beta 1 decay": replace(plane, width=128, **slow),
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
    }
    if quick:
        jobs = dict(list(jobs.items())[:2])
    return {
        name: (
            exact,
            (Arm(dims=2, reward=a.reward, T=a.T, width=a.width), betas, prompts),
            3e8 * a.T * len(betas),
        )
        for name, (a, betas) in jobs.items()
    }


# ---- Verdicts: criteria, written before any number ---------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


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
    gain below 1: more than .5). Of training rewards, averaged over fiftieths of the run."""
    curve = torch.tensor(arm["curve"])
    best = curve.cummax(1).values
    lost = (best - curve) / (best - mean(base["reward"])).clamp(min=1)
    return int((lost.amax(1) > 0.5).sum())


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
    lost = [unstable(a[f"ratio {x}, prdp's rate"], a["base"]) for x in (0, 1, 3)]
    best = [a[f"ratio {x}, best rate"] for x in (0, 3)]
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
    exact = dict(zip(CURVE, frontier["blind"], strict=False))
    for b, arm in zip(BETAS, arms, strict=True):
        if b in exact:
            off_reward, off_match = (
                mean(arm[k]) - exact[b][i] for i, k in enumerate(("reward", "match"))
            )
            fit = mean(arm["explained"])
            near = abs(off_reward) < -0.1 * mean(base["reward"]) and abs(off_match) < 0.1
            figure = f"reward {off_reward:+.2f}, match {off_match:+.3f}, explained {fit:.2f}"
            checks.append(check(f"beta {b:g}: beside the exact optimum (reward within 10% of the "
                                "base's, match within .1), explained > 0", figure, near and fit > 0))  # fmt: skip
    return "Figs. 8, 10: beta sets how far; a large one keeps the prompt, DDPO forgets it", checks


def claim_8(a: dict, frontier: dict) -> tuple[str, list]:
    seen, unseen = (mean(a["many"][k]) - mean(a["many base"][k]) for k in ("reward", "unseen"))
    return "Table 2, unseen prompts: what is learned on many prompts carries over", [
        check(
            "unseen gain at least 80% of the seen",
            f"{unseen:.2f} of {seen:.2f}",
            unseen > 0.8 * seen,
        ),
        above("unseen: after 100,000 - after 45 prompts", a["many"], a["few"], key="unseen"),
        above("unseen: PRDP - DDPO", a["many"], a["many ddpo global"], key="unseen"),
    ]


def claim_9(a: dict, frontier: dict) -> tuple[str, list]:
    return "App. B's conjecture: the missing mean of each prompt is what makes DDPO fail", [
        above("DDPO per group - DDPO global, best rates", a["group"], a["global"]),
        cell("DDPO per group, PRDP's rate", a["group at prdp's rate"], a["base"], True),
        cell("DDPO global, PRDP's rate", a["global at prdp's rate"], a["base"], False),
    ]


def judge(r: dict[int, dict], frontier: dict) -> dict[int, dict]:
    """Each claim's sentence, its checks one by one, and how many passed."""
    verdicts = {}
    for n, function in enumerate(
        (claim_1, claim_2, claim_3, claim_4, claim_5, claim_6, claim_7, claim_8, claim_9), 1
    ):
        if n not in r:
            continue
        paper, checks = function(r[n], frontier)
        passed = sum(c["passed"] for c in checks)
        word = "reproduced" if passed == len(checks) else "in part" if passed else "not reproduced"
        verdicts[n] = {
            "paper": paper,
            "verdict": f"{word}, {passed} of {len(checks)}",
            "checks": checks,
        }
    return verdicts


# ---- Pictures ------------------------------------------------------------------------------------------

COLOURS = {
    "prdp": "#1f77b4",
    "ddpo": "#d62728",
    "global": "#d62728",
    "group": "#2ca02c",
    "other": "#7f7f7f",
}


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
    band(
        left,
        r[2]["ddpo group at prdp's rate"],
        512,
        f"DDPO normalised per group, rate {name}",
        color=COLOURS["group"],
    )
    band(left, r[2]["prdp"], 512, f"PRDP, rate {name}", color=COLOURS["prdp"])
    band(
        left,
        r[2]["ddpo global"],
        512,
        f"DDPO at its best rate {best['many/ddpo global'].lr:.1e}",
        color="#ff9896",
    )
    band(
        left,
        r[2]["ddpo global at prdp's rate"],
        512,
        f"DDPO at PRDP's rate {name}",
        color=COLOURS["ddpo"],
    )
    left.set(
        title="100,000 prompts: 1,000 epochs, K = 1",
        xlabel="thousand reward queries",
        ylabel="reward",
    )
    few = mean(r[1]["base"]["reward"])
    band(middle, r[1]["ddpo"], 51.2, "DDPO, normalised per prompt", color=COLOURS["group"])
    band(middle, r[1]["prdp"], 51.2, "PRDP", color=COLOURS["prdp"])
    band(
        middle,
        r[3]["ddpo global, as ddpo"],
        51.2,
        "DDPO, one mean for all prompts",
        color=COLOURS["ddpo"],
    )
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
    right.set(
        title="100,000 prompts: final reward over the learning rate",
        xscale="log",
        xlabel="learning rate",
    )
    for axis, base in ((left, many), (middle, few), (right, many)):
        axis.axhline(base, color="black", lw=1, ls=":")
        axis.annotate(
            "pretrained",
            (0.99, base),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axis.set_ylim(-0.3, 8)
        axis.legend(
            fontsize=8, loc="upper left" if axis is not right else "lower left", framealpha=0.8
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Points at the paper's schedule, {seeds} seeds: each seed thin, their mean bold",
        fontsize=11,
    )
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
    axis.scatter(
        x[:, 0], x[:, 1], c=hue, cmap="hsv", vmin=0, vmax=2 * math.pi, s=9, edgecolors="none"
    )
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
    axis.plot(
        curve[:, 1],
        curve[:, 0],
        "-",
        color="black",
        lw=1.5,
        label="exact optimum of Eq. 7, beta 10 to .1",
    )
    for suffix, face, label in (
        ("", COLOURS["prdp"], "PRDP"),
        (" decay", "white", "PRDP, decaying rate"),
    ):
        done = [b for b in BETAS if f"beta {b:g}{suffix}" in arms]
        x = [mean(arms[f"beta {b:g}{suffix}"]["match"]) for b in done]
        y = [mean(arms[f"beta {b:g}{suffix}"]["reward"]) for b in done]
        axis.plot(x, y, "o", ms=8, mfc=face, mec=COLOURS["prdp"], label=label)
        if not suffix:
            for b, *at in zip(BETAS, x, y, strict=True):
                axis.annotate(f"  {b:g}", at, fontsize=9)
    for b, row in zip(CURVE, frontier["blind"], strict=False):
        if b in BETAS:
            axis.plot(row[1], row[0], "x", color="black", ms=7)
    axis.plot(
        mean(arms["ddpo"]["match"]),
        mean(arms["ddpo"]["reward"]),
        "s",
        ms=8,
        color=COLOURS["ddpo"],
        label="DDPO",
    )
    axis.plot(
        mean(arms["base"]["match"]),
        mean(arms["base"]["reward"]),
        "D",
        ms=7,
        color="grey",
        label="pretrained",
    )
    axis.set(
        xlabel="match: share of points at their own prompt's place",
        ylabel="reward",
        title="Fig. 10 against the exact optimum",
    )
    axis.legend(fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "A reward that ignores the prompt: minus the distance to the star. A prompt's colour says where its points belong.",
        fontsize=11,
    )
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
    ceiling = [
        (mean(v["kl"]), mean(v["reward"])) for n, v in r[10].items() if n.startswith("through")
    ]
    right.plot(*zip(*sorted(ceiling), strict=True), color="black", lw=1.5, ls="--",
               label="ascent through the reward itself (no black box)")  # fmt: skip
    right.set(title="D = 8, 45 prompts")
    for axis, arms in ((left, r[11]), (right, r[10])):
        for label, prefix, suffix, style in (
            ("PRDP", "", "", dict(marker="o", color=COLOURS["prdp"])),
            (
                "PRDP, decaying rate",
                "",
                " decay",
                dict(marker="o", color=COLOURS["prdp"], mfc="white"),
            ),
        ):
            names = [n for n in arms if "beta" in n and "," not in n and "=" not in n and "width" not in n
                     and n.endswith("decay") == bool(suffix)]  # fmt: skip
            at = sorted((mean(arms[n]["kl"]), mean(arms[n]["reward"]), n) for n in names)
            axis.plot(
                [a[0] for a in at],
                [a[1] for a in at],
                ls="-" if not suffix else ":",
                ms=8,
                label=label,
                **style,
            )
            for kl, reward, n in at if not suffix else ():
                axis.annotate(
                    n.split()[-1],
                    (kl, reward),
                    xytext=(4, -12),
                    textcoords="offset points",
                    fontsize=8,
                )
        for n in arms:
            if "beta" in n or "base" in n:
                continue
            colour = (
                COLOURS["group"]
                if "group" in n
                else COLOURS["ddpo"]
                if "ddpo" in n
                else COLOURS["other"]
            )
            x, y = mean(arms[n]["kl"]), mean(arms[n]["reward"])
            axis.plot(x, y, "s", ms=6, color=colour)
            axis.annotate(n, (x, y), xytext=(6, -3), textcoords="offset points", fontsize=8)
        axis.axhline(mean(arms["base"]["reward"]), color="black", lw=1, ls=":", label="pretrained")
        axis.set(
            xscale="log",
            xlabel="KL of trajectories to the pretrained policy, nats",
            ylabel="reward",
            xlim=(0.05, 1000),
        )
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


def machine() -> dict:
    cpus = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": cpus[0].split(": ")[1], "cores": len(cpus), "python": platform.python_version(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def show(out: Path) -> None:
    """The lesson: four short runs on the plane, a picture. About two minutes on one core."""
    arms = {"base": replace(PLANE, reward="blind", lr=0.0, E=1, K=1)}
    arms |= {f"beta {b:g}": replace(PLANE, reward="blind", beta=b, E=60) for b in BETAS}
    arms["ddpo"] = Arm(dims=2, reward="blind", normalise="per-prompt", E=60, lr=1e-3, **DDPO)
    results = {}
    for name, arm in arms.items():
        results[name] = points.run_arm(arm, (0,), NOISE, 64)
        row = {k: results[name][k][0] for k in ("reward", "match", "kl")}
        print(
            f"{name:9} reward {row['reward']:6.2f}   match {row['match']:.2f}   KL {row['kl']:7.2f} nats"
        )
    path = out / "points_show.png"
    committed = HERE / "points.json"
    frontier = json.loads(committed.read_text())["exact"] if committed.exists() else {"blind": []}
    figure_plane({7: results}, frontier, path)
    print(f"see {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=points.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--claim", type=int, choices=range(1, 12), help="only this one, at the committed settings"
    )
    parser.add_argument(
        "--quick", action="store_true", help="everything at tiny size: does it run?"
    )
    parser.add_argument("--show", action="store_true", help="the two-minute lesson: one picture")
    parser.add_argument(
        "--pretrain", action="store_true", help="make points_base.safetensors again, 15 minutes"
    )
    parser.add_argument("--seeds", type=parse_seeds, default=list(range(8)), help="FIRST..LAST")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.parent / "runs" / "points",
        help="where finished arms are kept",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.show:
        return show(args.out)
    if args.pretrain:
        return points.pretrain_all()
    runner = Runner(args.out, args.quick, args.workers)
    seeds = args.seeds[:2] if args.quick else args.seeds
    whole = not args.quick and args.claim is None and seeds == list(range(8))
    home = HERE if whole else args.out

    if args.claim and (HERE / "points.json").exists():
        table = json.loads((HERE / "points.json").read_text())["sweeps"]
        best = {name: with_settings(name, *row["best"]) for name, row in table.items()}
    else:
        best, table = sweep(runner, list(SWEEPS))
    claims = experiments(best)
    order = [args.claim] if args.claim else ORDER
    frontier = (
        runner("exact optimum", exact_jobs(best, args.quick))
        if not args.claim or args.claim in (7, 11)
        else {}
    )
    arms = {f"{n}/{label}": arm for n in order for label, arm in claims[n].items()}
    results = runner.arms("claims", arms, seeds, NOISE)
    r = {n: {label: results[f"{n}/{label}"] for label in claims[n]} for n in order}
    verdicts = judge(r, frontier)
    for n, verdict in verdicts.items():
        print(f"{n}. {verdict['paper']}: {verdict['verdict']}")
        for check in verdict["checks"]:
            print(f"     {'yes' if check['passed'] else 'NO '}  {check['name']}: {check['figure']}")
    print_tables(r, frontier)
    if args.claim:
        return None
    figure_training(r, best, len(seeds), home / "points_training.png")
    figure_plane(r, frontier, home / "points_plane.png")
    figure_kl(r, frontier, home / "points_kl.png")
    stored = {
        f"{n}/{label}": {"arm": asdict(arms[f"{n}/{label}"]), **r[n][label]}
        for n in r
        for label in r[n]
    }
    name = "points.json" if whole or args.quick else f"points_{seeds[0]}.json"
    everything = {
        "machine": machine(), "seeds": seeds, "verdicts": verdicts, "exact_betas": [*CURVE, 0.05],
        "exact": frontier, "sweeps": table, "arms": stored,
    }  # fmt: skip
    (home / name).write_text(json.dumps(rounded(everything)) + "\n")
    return None


def print_tables(r: dict, frontier: dict) -> None:
    """What has no verdict: every method's end, and the distance to the exact optimum at beta 1."""
    for n in (n for n in (2, 10, 11) if n in r):
        print(f"\n{n}. {'arm':36} reward            KL    explained   unseen")
        for label, x in r[n].items():
            deviation = torch.tensor(x["reward"]).std() / len(x["reward"]) ** 0.5
            print(f"   {label:36} {mean(x['reward']):6.3f} +- {deviation:.3f} {mean(x['kl']):9.2f} "
                  f"{mean(x['explained']):9.2f} {mean(x['unseen']):9.3f}")  # fmt: skip
    if 11 in r:
        for label, row in gaps(r[11], frontier).items():
            print(
                f"   {label:36} J {row['J']:.3f}: {row['share']:.0%} of what the exact optimum gains"
            )


def gaps(arms: dict, frontier: dict) -> dict:
    """J = reward - beta KL of arms at beta 1, and their share of the exact optimum's gain."""
    rows = {}
    for label, x in arms.items():
        kind = next((k for k in ("T=20", "width 128") if label.startswith(k)), "own")
        if "beta 1" not in label or (kind not in frontier):
            continue
        exact = frontier[kind][CURVE.index(1.0) if kind == "own" and len(frontier[kind]) > 3 else 0]
        base = mean(arms[f"{kind} base" if kind != "own" else "base"]["reward"])
        j = mean(x["reward"]) - mean(x["kl"])
        rows[label] = {"J": j, "share": (j - base) / (exact[0] - exact[2] - base)}
    return rows


if __name__ == "__main__":
    main()
