"""The pictures of the points, drawn from the results alone."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from points.world import ANGLES, PLANE, PROMPTS, STAR, reward_of

os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook's may not exist here
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, GREEN, RED, PINK, GREY = "#1f77b4", "#2ca02c", "#d62728", "#f4a3a3", "#7f7f7f"
CYAN, VIOLET = "#17becf", "#9467bd"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- Fig. 9 again, and the whole axis of learning rates ------------------------------------------


def draw_curves(
    axis: Axes, arm: dict, queries: float, label: str, diverging: bool = False, **style: str
) -> None:
    """Training reward over thousands of queries: each seed thin, their mean bold; where seeds part
    ways (`diverging`) there is no mean to draw."""
    curve = torch.tensor(arm["curve"])
    x = (torch.arange(curve.shape[1]) + 0.5) * queries / curve.shape[1]
    thin = dict(lw=1.3, alpha=0.8) if diverging else dict(lw=0.6, alpha=0.35)
    axis.plot(x, curve.T, color=style["color"], **thin)
    bold = ([], []) if diverging else (x, curve.mean(0))
    axis.plot(*bold, lw=2.4, label=label, **style)


def draw_pretrained(axis: Axes, base: dict) -> None:
    reward = mean(base["reward"])
    axis.axhline(reward, color="black", lw=1, ls=":")
    where = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axis.annotate("pretrained", (1, reward), **where)


def draw_many_prompts(axis: Axes, arms: dict, rates: dict[str, float]) -> None:
    rate = rates["prdp"]
    base = mean(arms["base"]["reward"])
    failing = arms["ddpo global at prdp's rate"]
    lost = sum(reward < base for reward in failing["reward"])
    seeds = len(failing["reward"])
    best = f"DDPO, one mean for all prompts, its best rate {rates['ddpo global']:g}"
    same = f"the same at rate {rate:g}: {lost} of {seeds} end below the pretrained"
    group = f"DDPO, a mean for each prompt's 8 points, rate {rate:g}"
    draw_curves(axis, arms["prdp"], 512, f"PRDP, rate {rate:g}", color=BLUE)
    draw_curves(axis, arms["ddpo global"], 512, best, color=PINK)
    draw_curves(axis, failing, 512, same, diverging=True, color=RED)
    draw_curves(axis, arms["ddpo group at prdp's rate"], 512, group, color=GREEN, ls="--")
    axis.set(title="100,000 prompts (Fig. 9, left)", ylabel="training reward")


def draw_few_prompts(axis: Axes, results: dict) -> None:
    of_prompt = "DDPO, a mean of each prompt's last 32 rewards"
    best = "DDPO, one mean for all prompts, its best settings"
    same = "the same at PRDP's rate and clip"
    failing = results[3]["ddpo global at prdp's settings"]
    unclipped = results[5]["prdp few none"]
    draw_curves(axis, results[1]["prdp"], 51.2, "PRDP, beta .005", color=BLUE)
    draw_curves(axis, results[1]["ddpo"], 51.2, of_prompt, color=GREEN)
    draw_curves(axis, results[3]["ddpo global"], 51.2, best, color=PINK)
    draw_curves(axis, failing, 51.2, same, diverging=True, color=RED)
    draw_curves(axis, unclipped, 51.2, "PRDP, beta .02, without its clip", color=CYAN, ls="--")
    end = mean(results[6]["offline"]["reward"])  # its training rewards are the pretrained model's
    axis.axhline(end, color=VIOLET, ls="-.", label="where PRDP, beta .02, ends offline")
    axis.set(title="45 prompts (Fig. 9, right; Table 5; Fig. 7)")


def draw_rates(axis: Axes, arms: dict, rates: list[float]) -> None:
    methods = {
        "prdp": ("PRDP", BLUE),
        "ddpo group": ("DDPO, a mean for each prompt's 8 points", GREEN),
        "ddpo global": ("DDPO, one mean for all prompts", RED),
    }
    for method, (label, color) in methods.items():
        rewards = torch.tensor([arms[f"{method} {rate:.1e}"]["reward"] for rate in rates])
        median = rewards.median(1).values  # where seeds part ways no seed is at the mean
        axis.plot(rates, median, lw=2.4, color=color, label=label)
        axis.plot(rates, rewards, "o", ms=4, alpha=0.5, color=color)
    axis.set(title="100,000 prompts: each seed's end, median", xscale="log")
    axis.set_xlabel("learning rate")


def figure_training(
    results: dict, best_rates: dict[str, float], rates: list[float], path: Path
) -> None:
    """Fig. 9 again, and the whole axis of learning rates. best_rates: the sweeps', by method."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), sharey=True)
    draw_many_prompts(left, results[2], best_rates)
    draw_few_prompts(middle, results)
    draw_rates(right, results[2], rates)
    few, many = results[1]["base"], results[2]["base"]
    for axis, base in ((left, many), (middle, few), (right, many)):
        draw_pretrained(axis, base)
        axis.set_ylim(-0.3, 11.8)
        axis.legend(loc="upper left", framealpha=0.9)
    for axis in (left, middle):
        axis.set_xlabel("thousand reward queries")

    seeds = len(many["reward"])
    title = f"The paper's schedule on points, {seeds} seeds: each thin, their mean bold"
    figure.suptitle(f"{title}. No point can score more than 8.")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- Fig. 10 on the plane ------------------------------------------------------------------------


def draw_cloud(axis: Axes, arm: dict, title: str) -> None:
    """Points coloured by their prompt's place on the ring, on the map of the blind reward."""
    grid = PLANE[::4, ::4]
    any_prompt = torch.zeros(1, dtype=torch.long)
    levels = reward_of("blind", grid, any_prompt)
    axis.contourf(grid[..., 0], grid[..., 1], levels, 24, cmap="Greys_r", alpha=0.5)
    ring = torch.linspace(0, 2 * math.pi, 200)
    axis.scatter(2.95 * ring.cos(), 2.95 * ring.sin(), c=ring, cmap="hsv", s=9)
    axis.plot(*STAR, marker="*", ms=18, mfc="white", mec="black")

    x = torch.tensor(arm["cloud"])
    prompts = PROMPTS["few"]
    place = ANGLES[:prompts, 0].repeat_interleave(len(x) // prompts)
    colors = dict(c=place, cmap="hsv", vmin=0, vmax=2 * math.pi)
    axis.scatter(*x.T, **colors, s=11, ec="black", lw=0.2, zorder=3)
    axis.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), xticks=[], yticks=[], aspect="equal")
    reward, match = mean(arm["reward"]), mean(arm["match"])
    axis.set_title(f"{title}\nreward {reward:.2f}, match {match:.2f}", fontsize=10)


def draw_match(axis: Axes, arms: dict, betas: list[str], titles: dict, exact: dict) -> None:
    """Reward over match: each arm, PRDP's beside the exact optimum at its beta."""
    curve = [exact[beta] for beta in sorted(exact)]
    axis.plot([row[1] for row in curve], [row[0] for row in curve], color="black", lw=1.5)
    axis.plot([], [], "-x", color="black", label="exact optimum of Eq. 7")
    for name in betas:
        beta = float(name.split()[1])
        match, reward = mean(arms[name]["match"]), mean(arms[name]["reward"])
        label = "PRDP, constant rate" if beta == 1 else None
        axis.plot(match, reward, "o", ms=9, color=BLUE, label=label)
        side = dict(xytext=(-8, -14), ha="right") if match > 0.3 else dict(xytext=(9, -5))
        note = dict(textcoords="offset points", fontsize=8, **side)
        axis.annotate(f"beta {beta:g}", (match, reward), **note)
        if beta in exact:
            exact_reward, exact_match, _ = exact[beta]
            axis.plot(exact_match, exact_reward, "x", ms=8, mew=2, color="black")
            axis.plot([match, exact_match], [reward, exact_reward], color=BLUE, lw=0.8)
    for name, marker, color in (("ddpo", "s", RED), ("base", "D", GREY)):
        match, reward = mean(arms[name]["match"]), mean(arms[name]["reward"])
        axis.plot(match, reward, marker, ms=8, color=color, label=titles[name])
    axis.set(xlim=(-0.05, 1.05), ylabel="reward", title="beside the exact optimum")
    axis.set_xlabel("match: share of points\nat their own prompt's place")
    axis.legend(loc="lower left")


def figure_plane(arms: dict, exact: dict[float, list[float]], path: Path) -> None:
    """Fig. 10 on the plane. exact: beta -> reward, match, KL of Eq. 7's optimum."""
    figure = plt.figure(figsize=(15, 7.2))
    betas = [name for name in arms if name.startswith("beta")]
    titles = {"base": "pretrained", "ddpo": "DDPO, which has no KL term"}
    titles |= {name: f"PRDP, {name}" for name in betas}
    for cell, name in zip((1, 2, 3, 5, 6, 7), ("base", *betas, "ddpo"), strict=True):
        draw_cloud(figure.add_subplot(2, 4, cell), arms[name], titles[name])
    draw_match(figure.add_subplot(1, 4, 4), arms, betas, titles, exact)
    figure.suptitle(
        "A reward that ignores the prompt: minus 4 times the distance to the star. A point's "
        "colour is its prompt's place on the ring."
    )
    save(figure, path)


# ---- Reward against KL ---------------------------------------------------------------------------


def draw_prdp(axis: Axes, arms: dict, decay: bool) -> None:
    """Reward over KL of PRDP's arms, joined in the order of their KL."""
    points = []
    for name, arm in arms.items():
        words = name.removeprefix("prdp ").removesuffix(" decay").split()
        if words[0] == "beta" and len(words) == 2 and name.endswith(" decay") == decay:
            points.append((mean(arm["kl"]), mean(arm["reward"]), words[1]))
    points.sort()
    style = dict(color=BLUE, ms=8, mfc="white" if decay else BLUE, ls=":" if decay else "-")
    label = "PRDP, decaying rate" if decay else "PRDP"
    axis.plot([p[0] for p in points], [p[1] for p in points], "o", label=label, **style)
    for kl, reward, beta in [] if decay else points:
        note = dict(xytext=(8, -15), ha="center", textcoords="offset points", color=BLUE)
        axis.annotate(f"beta {beta}", (kl, reward), fontsize=8, **note)


def draw_others(axis: Axes, arms: dict) -> None:
    """A square for each other method, its name at the right; labels keep their distance."""
    others = {
        name: arm
        for name, arm in arms.items()
        if "beta" not in name and "base" not in name and not name.startswith("many")
    }
    height = -math.inf
    for name, arm in sorted(others.items(), key=lambda item: mean(item[1]["reward"])):
        kl, reward = min(mean(arm["kl"]), 1000), mean(arm["reward"])
        height = max(height + 0.27, reward)
        color = RED if name.startswith("ddpo") else GREY
        if "group" in name:
            color = GREEN
        axis.plot(kl, reward, "s", ms=6, color=color)
        axis.plot([kl, 1250], [reward, height], lw=0.5, color=color)
        axis.annotate(name, (1300, height), va="center", fontsize=8, color=color)


def figure_kl(results: dict, exact: dict[float, list[float]], path: Path) -> None:
    """What a nat of KL buys, per method; on the plane, against the exact optimum."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6))
    curve = [exact[beta] for beta in sorted(exact)]
    label = f"exact optimum of Eq. 7, beta {max(exact):g} to {min(exact):g}"
    left.plot([row[2] for row in curve], [row[0] for row in curve], "k-x", label=label)
    left.set_title("The plane (D = 2), 45 prompts")
    right.set_title("D = 8, 45 prompts")
    for axis, arms in ((left, results[13]), (right, results[12])):
        draw_prdp(axis, arms, decay=False)
        draw_prdp(axis, arms, decay=True)
        draw_others(axis, arms)
        draw_pretrained(axis, arms["base"])
        axis.set(xscale="log", xlim=(0.1, 7000), ylim=(0.8, 9.4), ylabel="reward")
        axis.set_xlabel("KL to the pretrained policy, nats (at the edge: 1,000 and more)")
        axis.legend(loc="upper left")
    figure.suptitle("What a nat of KL buys: every method after the same 51,200 reward queries")
    save(figure, path)
