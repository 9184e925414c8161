"""The pictures of toy/points.py, drawn from its results alone."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import points
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, GREEN, RED, PINK, GREY = "#1f77b4", "#2ca02c", "#d62728", "#f4a3a3", "#7f7f7f"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def curves(axis, arm: dict, queries: float, label: str, split: bool = False, **style) -> None:
    """Training reward over thousands of queries: each seed thin, their mean bold; where seeds part
    ways (`split`) there is no mean to draw."""
    curve = torch.tensor(arm["curve"])
    x = (torch.arange(curve.shape[1]) + 0.5) * queries / curve.shape[1]
    thin = dict(lw=1.3, alpha=0.8) if split else dict(lw=0.6, alpha=0.35)
    axis.plot(x, curve.T, color=style["color"], **thin)
    axis.plot([] if split else x, [] if split else curve.mean(0), lw=2.4, label=label, **style)


def pretrained(axis, base: dict) -> None:
    reward = mean(base["reward"])
    axis.axhline(reward, color="black", lw=1, ls=":")
    axis.annotate("pretrained", (1, reward), xycoords=("axes fraction", "data"), ha="right",
                  va="bottom", fontsize=8)  # fmt: skip


def figure_training(r: dict, rates: dict[str, float], axis_rates: list[float], path: Path) -> None:
    """Fig. 9 again, and the whole axis of learning rates. rates: the sweeps' best."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), sharey=True)
    many, few = r[2], r[1]
    rate = rates["prdp"]
    curves(left, many["prdp"], 512, f"PRDP, rate {rate:g}", color=BLUE)
    best = f"DDPO, one mean for all prompts, its best rate {rates['ddpo global']:g}"
    curves(left, many["ddpo global"], 512, best, color=PINK)
    failing = many["ddpo global at prdp's rate"]
    lost = sum(reward < mean(many["base"]["reward"]) for reward in failing["reward"])
    seeds = len(failing["reward"])
    label = f"the same at rate {rate:g}: {lost} of {seeds} end below the pretrained"
    curves(left, failing, 512, label, split=True, color=RED)
    of_group = "DDPO, a mean for each prompt's 8 points"
    group = f"{of_group}, rate {rate:g}"
    curves(left, many["ddpo group at prdp's rate"], 512, group, color=GREEN, ls="--")
    left.set(title="100,000 prompts (Fig. 9, left)", ylabel="training reward")

    curves(middle, few["prdp"], 51.2, "PRDP, beta .005", color=BLUE)
    curves(middle, few["ddpo"], 51.2, "DDPO, a mean of each prompt's last 32 rewards", color=GREEN)
    best = "DDPO, one mean for all prompts, its best settings"
    curves(middle, r[3]["ddpo global"], 51.2, best, color=PINK)
    failing = r[3]["ddpo global at prdp's settings"]
    curves(middle, failing, 51.2, "the same at PRDP's rate and clip", split=True, color=RED)
    unclipped = "PRDP, beta .02, without its clip"
    curves(middle, r[5]["prdp few none"], 51.2, unclipped, color="#17becf", ls="--")
    end = mean(r[6]["offline"]["reward"])  # its training rewards are the pretrained model's
    middle.axhline(end, color="#9467bd", ls="-.", label="where PRDP, beta .02, ends offline")
    middle.set(title="45 prompts (Fig. 9, right; Table 5; Fig. 7)")

    for method, label, colour in (
        ("prdp", "PRDP", BLUE), ("ddpo group", of_group, GREEN),
        ("ddpo global", "DDPO, one mean for all prompts", RED),
    ):  # fmt: skip
        rows = torch.tensor([many[f"{method} {x:.1e}"]["reward"] for x in axis_rates])
        middles = rows.median(1).values  # where seeds part ways no seed is at the mean
        right.plot(axis_rates, middles, lw=2.4, color=colour, label=label)
        right.plot(axis_rates, rows, "o", ms=4, alpha=0.5, color=colour)
    right.set(title="100,000 prompts: each seed's end, median", xscale="log")
    right.set_xlabel("learning rate")
    for axis, base in ((left, many["base"]), (middle, few["base"]), (right, many["base"])):
        pretrained(axis, base)
        axis.set_ylim(-0.3, 11.8)
        axis.legend(loc="upper left", framealpha=0.9)
    for axis in (left, middle):
        axis.set_xlabel("thousand reward queries")
    title = f"The paper's schedule on points, {seeds} seeds: each thin, their mean bold"
    figure.suptitle(f"{title}. No point can score more than 8.")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_cloud(axis, arm: dict, title: str) -> None:
    """Points coloured by their prompt's place on the ring, on the map of the blind reward."""
    place = points.PLANE[::4, ::4]
    nobody = torch.zeros(1, dtype=torch.long)
    axis.contourf(place[..., 0], place[..., 1], points.reward_of("blind", place, nobody), 24,
                  cmap="Greys_r", alpha=0.5)  # fmt: skip
    turn = torch.linspace(0, 2 * math.pi, 200)
    axis.scatter(2.95 * turn.cos(), 2.95 * turn.sin(), c=turn, cmap="hsv", s=9)
    x = torch.tensor(arm["cloud"])
    home = points.ANGLES[: points.FEW.stop, 0].repeat_interleave(len(x) // points.FEW.stop)
    axis.plot(*points.STAR, marker="*", ms=18, mfc="white", mec="black")
    axis.scatter(*x.T, c=home, cmap="hsv", vmin=0, vmax=2 * math.pi, s=11, ec="black", lw=0.2,
                 zorder=3)  # fmt: skip
    axis.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), xticks=[], yticks=[], aspect="equal")
    reward, match = mean(arm["reward"]), mean(arm["match"])
    axis.set_title(f"{title}\nreward {reward:.2f}, match {match:.2f}", fontsize=10)


def figure_plane(arms: dict, exact: dict[float, list[float]], path: Path) -> None:
    """Fig. 10 on the plane. exact: beta -> reward, match, KL of Eq. 7's optimum."""
    figure = plt.figure(figsize=(15, 7.2))
    betas = [n for n in arms if n.startswith("beta")]
    titles = {"base": "pretrained", "ddpo": "DDPO, which has no KL term"}
    titles |= {name: f"PRDP, {name}" for name in betas}
    for i, name in zip((1, 2, 3, 5, 6, 7), ("base", *betas, "ddpo"), strict=True):
        draw_cloud(figure.add_subplot(2, 4, i), arms[name], titles[name])

    axis = figure.add_subplot(1, 4, 4)
    curve = [exact[beta] for beta in sorted(exact)]
    axis.plot([x[1] for x in curve], [x[0] for x in curve], color="black", lw=1.5)
    axis.plot([], [], "-x", color="black", label="exact optimum of Eq. 7")
    for name in betas:
        beta = float(name.split()[1])
        at = mean(arms[name]["match"]), mean(arms[name]["reward"])
        axis.plot(*at, "o", ms=9, color=BLUE, label="PRDP, constant rate" if beta == 1 else None)
        side = dict(xytext=(-8, -14), ha="right") if at[0] > 0.3 else dict(xytext=(9, -5))
        axis.annotate(f"beta {beta:g}", at, textcoords="offset points", fontsize=8, **side)
        if beta in exact:
            axis.plot(exact[beta][1], exact[beta][0], "x", ms=8, mew=2, color="black")
            axis.plot([at[0], exact[beta][1]], [at[1], exact[beta][0]], color=BLUE, lw=0.8)
    for name, marker, colour in (("ddpo", "s", RED), ("base", "D", GREY)):
        at = mean(arms[name]["match"]), mean(arms[name]["reward"])
        axis.plot(*at, marker, ms=8, color=colour, label=titles[name])
    axis.set(xlim=(-0.05, 1.05), ylabel="reward", title="beside the exact optimum")
    axis.set_xlabel("match: share of points\nat their own prompt's place")
    axis.legend(loc="lower left")
    figure.suptitle(
        "A reward that ignores the prompt: minus 4 times the distance to the star. A point's "
        "colour is its prompt's place on the ring."
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def figure_kl(r: dict, exact: dict[float, list[float]], path: Path) -> None:
    """What a nat of KL buys, per method; on the plane, against the exact optimum."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.6))
    curve = [exact[beta] for beta in sorted(exact)]
    x, y = [row[2] for row in curve], [row[0] for row in curve]
    axes[0].plot(
        x, y, "k-x", label=f"exact optimum of Eq. 7, beta {max(exact):g} to {min(exact):g}"
    )
    titles = "The plane (D = 2), 45 prompts", "D = 8, 45 prompts"
    for axis, arms, title in zip(axes, (r[11], r[10]), titles, strict=True):
        for tail, label, face in (("", "PRDP", BLUE), (" decay", "PRDP, decaying rate", "white")):
            at = []
            for name, arm in arms.items():
                words = name.removeprefix("prdp ").removesuffix(" decay").split()
                if words[0] == "beta" and len(words) == 2 and name.endswith(" decay") == bool(tail):
                    at.append((mean(arm["kl"]), mean(arm["reward"]), words[1]))
            at.sort()
            style = dict(color=BLUE, mfc=face, ms=8, ls=":" if tail else "-")
            axis.plot([row[0] for row in at], [row[1] for row in at], "o", label=label, **style)
            for kl, reward, beta in [] if tail else at:
                note = dict(xytext=(8, -15), ha="center", textcoords="offset points", color=BLUE)
                axis.annotate(f"beta {beta}", (kl, reward), fontsize=8, **note)

        height = -math.inf  # of the label below: labels keep their distance
        others = {n: arm for n, arm in arms.items() if not ("beta" in n or "base" in n)}
        others = {n: arm for n, arm in others.items() if not n.startswith("many")}
        for name, arm in sorted(others.items(), key=lambda item: mean(item[1]["reward"])):
            kl, reward = min(mean(arm["kl"]), 1000), mean(arm["reward"])
            height = max(height + 0.27, reward)
            colour = GREEN if "group" in name else RED if name.startswith("ddpo") else GREY
            axis.plot(kl, reward, "s", ms=6, color=colour)
            axis.plot([kl, 1250], [reward, height], lw=0.5, color=colour)
            axis.annotate(name, (1300, height), va="center", fontsize=8, color=colour)
        pretrained(axis, arms["base"])
        axis.set(title=title, xscale="log", xlim=(0.1, 7000), ylim=(0.8, 9.4), ylabel="reward")
        axis.set_xlabel("KL to the pretrained policy, nats (at the edge: 1,000 and more)")
        axis.legend(loc="upper left")
    figure.suptitle("What a nat of KL buys: every method after the same 51,200 reward queries")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
