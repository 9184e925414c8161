"""What a run shows: lines, metrics, pictures, trackers; and that none of it can cost an epoch."""

import json
import math
import sys
import weakref
from unittest import mock

import numpy as np
import pytest
import torch

import prdp
from baselines.pairs import read_picture
from conftest import checkpoint, metrics_of, only_sentence
from support import report


def test_first_screen_fits_80_columns(cli):
    """Prompts, six columns, the forecast before the first epoch, at the end whether it worked."""
    code, out, errors = cli("--sample-every", 1)
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    header = next(n for n, line in enumerate(lines) if line.startswith("epoch "))
    names = "epoch reward_mean +- se clip_fraction log_ratio_ref grad_norm seconds"
    assert lines[header].split() == names.split()
    assert any("to sample an image: an epoch takes about" in line for line in lines[:header])
    assert any(", the first: 'a" in line for line in lines[:header])
    table = [line for line in lines[header:] if line.split()[0] in ("epoch", "1", "2")]
    assert {len(line) for line in table} == {len(table[0])} and len(table[0]) <= 80
    rises = [
        n for n, line in enumerate(lines) if line.startswith("sample_reward, of 4 images on fix")
    ]
    first, last = (lines.index(row) for row in table[1:])
    assert [header < first, first + 1, last + 1] == [True, *rises]


def test_fixed_samples_are_scored_as_they_are_drawn(cli, tmp_path):
    """sample_reward is the mean of `draw_samples` where --sample-every says, else null; they change
    nothing that is learned."""
    assert cli("--epochs", 3, "--sample-every", 1, "--out", tmp_path / "each")[0] == 0
    assert cli("--sample-every", 2, "--epochs", 3)[0] == 0
    weights = [checkpoint(tmp_path / name)["unet"] for name in ("run", "each")]
    assert all(torch.equal(weights[0][name], x) for name, x in weights[1].items())
    rewards = [row["sample_reward"] for row in metrics_of(tmp_path / "run")]
    assert rewards[0] is rewards[2] is None
    assert cli("--sample-every", 2, "--epochs", 2, "--out", tmp_path / "two")[0] == 0
    config = prdp.parse_args(["--resume", str(tmp_path / "two")])
    models = prdp.load_run(tmp_path / "two", torch.device("cpu"))
    prompts = prdp.load_prompts(*config.prompts)
    drawn = prdp.draw_samples(config, models, models.policy, prompts)
    assert rewards[1] == drawn.rewards.mean().item()


def test_the_last_samples_are_drawn_once(cli, monkeypatch):
    """Before the first epoch and after each; at the end those of the last epoch are shown."""
    draw, calls = prdp.draw_samples, []
    monkeypatch.setattr(prdp, "draw_samples", lambda *x: calls.append(x) or draw(*x))
    assert cli("--sample-every", 1)[::2] == (0, "") and len(calls) == 3


def test_samples_that_cannot_be_drawn_cost_nothing(cli, tmp_path, monkeypatch):
    """The third drawing fails, which is epoch 2's, and the fourth, of the finished run."""
    draw, calls = prdp.draw_samples, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) >= 3:
            raise RuntimeError("out of memory")
        return draw(*arguments)

    monkeypatch.setattr(prdp, "draw_samples", fails)
    code, out, errors = cli("--sample-every", 1)
    assert (code, errors, len(calls)) == (0, "", 4)
    assert out.count("warning: sample_reward: RuntimeError: out of memory") == 2
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    one, two = (row["sample_reward"] for row in metrics_of(tmp_path / "run"))
    assert one is not None and two is None
    assert checkpoint(tmp_path / "run")["epoch"] == 2


FALLS = ["--clip-range", "inf", "--reward", "falls.py:f"]


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--clip-range", 1e-12], ["nearly all log-probs leave"]),
        (["--clip-range", "inf"], []),
        (["--clip-range", 1e-12, "--updates-per-epoch", 1], []),  # nothing can be clipped
        (FALLS, []),  # 4 images are no evidence
        ([*FALLS, "--images-per-prompt", 8], ["below the pretrained model"]),
    ],
)
def test_runs_that_go_wrong_say_so(cli, tmp_path, monkeypatch, flags, warned):
    """A reward of calls, not of images, falls without fail."""
    falls = "import itertools\ncalls = itertools.count()\ndef f(i, p):\n"
    falls += "    return [-next(calls) for _ in p]\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "falls.py").write_text(falls)
    code, out, errors = cli(*flags)
    assert (code, errors) == (0, "")
    said = [line for line in out.splitlines() if line.startswith("warning")]
    for sentence in ("nearly all log-probs leave", "below the pretrained model"):
        assert any(sentence in line for line in said) == (sentence in warned)


def test_clip_fraction_has_a_ceiling_of_1(cli, tmp_path):
    """Of updates from the second on; null where there is none."""
    for updates, expected in ((1, None), (2, 1), (3, 1)):
        run = tmp_path / str(updates)
        flags = ["--out", run, "--updates-per-epoch", updates, "--clip-range", 1e-12]
        assert cli(*flags, "--epochs", 1)[0] == 0
        assert metrics_of(run)[0]["clip_fraction"] == expected


def test_parts_of_a_reward_are_logged(cli, tmp_path):
    words = ["incompressibility=3", "compressibility"]
    assert cli("--epochs", 1, "--reward", *words)[0] == 0
    (row,) = metrics_of(tmp_path / "run")
    kilobytes = row["reward_mean/incompressibility"]
    assert kilobytes == -row["reward_mean/compressibility"]
    assert row["reward_mean"] == pytest.approx(2 * kilobytes)


def test_a_judge_of_weight_0(cli, tmp_path, monkeypatch):
    """It is scored and has a curve of its own, and the run is that without it."""
    from matplotlib.axes import Axes

    curves, plot = {}, Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, *x, **k: curves.update({axes: x}) or plot(axes, *x, **k)
    )
    flags = ["--reward", "incompressibility", "compressibility=0"]
    assert cli(*flags)[0] == 0
    assert cli("--out", tmp_path / "without")[0] == 0
    rows = metrics_of(tmp_path / "run")
    without = metrics_of(tmp_path / "without")
    judge = [row.pop("reward_mean/compressibility") for row in rows]
    assert rows == without and min(judge) < max(judge) < 0
    assert (
        checkpoint(tmp_path / "run")["unet"].keys()
        == checkpoint(tmp_path / "without")["unet"].keys()
    )
    names = ["reward_mean", "reward_mean/incompressibility", "reward_mean/compressibility"]
    *_, total, part, judged, _, alone = curves.items()
    for (axes, (epochs, *_)), name in zip((total, part, judged), names, strict=True):
        assert axes.get_ylabel() == name and list(epochs) == [1, 2]
    assert judged[1][1] == pytest.approx(judge)
    assert alone[0].get_ylabel() == "reward_mean" and len(alone[0].figure.axes) == 1


def test_what_tells_nothing_is_warned_of(cli, tmp_path):
    """Equal rewards, and prompts that are cut."""
    (tmp_path / "r.py").write_text("def constant(i, p):\n    return [1.0] * len(p)\n")
    (tmp_path / "p.txt").write_text("red " * 100 + "\na red circle\n")
    flags = ["--reward", f"{tmp_path}/r.py:constant", "--prompts", tmp_path / "p.txt"]
    code, out, errors = cli(*flags, "--epochs", 1)
    assert (code, errors) == (0, "")
    assert "warning: all images of a prompt have the same reward" in out
    assert "warning: 1 of 2 prompts exceed 16 tokens, cut there." in out
    (row,) = metrics_of(tmp_path / "run")
    assert (row["reward_std"], row["loss"], row["skipped_fraction"]) == (0, 0, 1)


def test_numbers_that_do_not_exist(tmp_path):
    """null in strict JSON; a curve of the others."""
    report.SECONDS["x"] = 1.0
    row = report.as_row(1, {"images": 1, "reward_mean": 0.1, "reward_std": math.nan})
    assert json.loads(json.dumps(row, allow_nan=False))["reward_std"] is None
    report.plot_rewards(tmp_path / "a.png", [{"reward_mean": None}])
    assert not (tmp_path / "a.png").exists()
    report.plot_rewards(tmp_path / "a.png", [{"reward_mean": None}, row])
    assert read_picture(tmp_path / "a.png", "").shape[0] == 3


def test_long_phases_say_that_they_are_over(monkeypatch, capsys):
    """And time within another phase counts once."""
    now = iter([0.0, 9.0, 100.0, 200.0, 3000.0, 4000.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    report.SECONDS.clear()
    with report.phase("sample"):
        pass
    with report.phase("update"), report.phase("score"):
        pass
    assert report.SECONDS == {"sample": 9.0, "score": 2800.0, "update": 1100.0}
    assert capsys.readouterr().out == "score: 47 min\nupdate: 18 min\n"


def test_memory_of_an_epoch_is_free_before_the_next(cli, monkeypatch):
    """Of Table 4's 512 images it is 2 GB: trajectories and text are gone whenever others are
    drawn."""
    drawn, sample = [], prdp.sample_trajectories

    def watched(*arguments):
        assert not any(tensor() is not None for tensor in drawn)
        trajectories = sample(*arguments)
        kept = (trajectories.latents, trajectories.prompt_embeds)
        drawn.extend(weakref.ref(tensor) for tensor in kept)
        return trajectories

    monkeypatch.setattr(prdp, "sample_trajectories", watched)
    code, _, errors = cli("--epochs", 3, "--sample-every", 1)
    assert (code, errors) == (0, "")
    assert len(drawn) >= 2 * (3 + 4)


@pytest.mark.parametrize("size", [(32, 32), (512, 512), (32, 64)])
def test_pictures_hold_every_image_as_it_is(tmp_path, size):
    """Of 9 prompts the first 8, of 3 images 2, small ones larger; whatever letters a prompt has."""
    images = torch.randint(0, 256, (27, 3, *size), dtype=torch.uint8)
    prompts = ["\u4e00\u53ea\u732b", "x" * 200, "", "a $b_{$", *"efghi"]
    before = report.Samples(prompts, images, torch.randn(27))
    report.draw_images(tmp_path / "a.png", {"base": before, "finetuned": before})
    page = read_picture(tmp_path / "a.png", "")
    zoom = max(1, -(-128 // size[1]))
    found = 0
    for n in (0, 1, 21, 22):  # of the first and of the eighth prompt
        target = images[n].repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        rows = (page[:, :, :] == target[:, :1, :1]).all(0).nonzero()
        for y, x in rows.tolist():
            window = page[:, y : y + target.shape[1], x : x + target.shape[2]]
            if window.shape == target.shape and torch.equal(window, target):
                found += 1
    assert found == 2 * 4


# ---- Trackers ------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch) -> mock.MagicMock:
    """A stand-in for the package."""
    package = mock.MagicMock(__spec__=mock.sentinel.installed)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_wandb(cli, tmp_path, wandb, monkeypatch):
    """Numbers and sample grids by epoch, settings, a project of one's own; a resumed run is the
    same run there, and sends nothing twice."""
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    code, _, errors = cli("--log-to", "wandb", "--epochs", 1)
    assert (code, errors) == (0, "")
    assert cli("--resume", tmp_path / "run", "--epochs", 2, "--sample-every", 1)[0] == 0
    one, other = (call.kwargs for call in wandb.init.call_args_list)
    assert one["id"] == other["id"] and one["resume"] == "allow" and one["project"] == "mine"
    assert one["config"]["kl_weight"] == 3e-5
    assert one["reinit"] == "create_new"  # by default wandb returns an earlier run of the process
    assert wandb.mock_calls.index(mock.call.init().finish()) < wandb.mock_calls.index(
        mock.call.init(**other)
    )
    sent = [(sorted(call.args[0]), call.kwargs["step"]) for call in wandb.init().log.call_args_list]
    assert [step for names, step in sent if "reward_mean" in names] == [1, 2]
    assert [step for names, step in sent if names == ["samples"]] == [0, 1, 2]


def test_tensorboard(cli, tmp_path, monkeypatch):
    """Likewise; what is sent again of an epoch that is done again takes the place of the first."""
    package = mock.MagicMock(__spec__=mock.sentinel.installed)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, package)
    assert cli("--log-to", "tensorboard", "--epochs", 1)[0] == 0
    assert cli("--resume", tmp_path / "run", "--epochs", 2)[0] == 0
    assert [call.kwargs["purge_step"] for call in package.SummaryWriter.call_args_list] == [1, 2]
    scalars = [call.args for call in package.SummaryWriter().add_scalar.call_args_list]
    assert [epoch for name, _, epoch in scalars if name == "reward_mean"] == [1, 2]
    sent = package.SummaryWriter().add_image.call_args_list
    assert [call.args[2] for call in sent] == [0, 1, 2]
    assert all(call.args[1].shape[2] == 3 and call.args[1].dtype == np.uint8 for call in sent)
    assert all(call.kwargs == {"dataformats": "HWC"} for call in sent)


def test_a_tracker_that_fails_costs_nothing(cli, tmp_path, wandb):
    wandb.init.return_value.log.side_effect = ConnectionError("no network")
    code, out, errors = cli("--log-to", "wandb")
    assert (code, errors) == (0, "")
    assert "warning: --log-to wandb: epoch 1 was not sent: ConnectionError: no network" in out
    assert checkpoint(tmp_path / "run")["epoch"] == 2
    assert (tmp_path / "run" / "before_after.png").is_file()


def test_a_tracker_that_cannot_be_opened_is_refused(cli, tmp_path, wandb, monkeypatch):
    wandb.init.side_effect = ValueError("no login")
    said = only_sentence(cli("--log-to", "wandb"))
    assert said == "prdp.py: --log-to wandb: cannot be opened (ValueError: no login)."
    assert not metrics_of(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = only_sentence(cli("--log-to", "wandb"))
    assert said == "prdp.py: --log-to wandb: not installed; pip install wandb."
    assert cli("--epochs", 1)[0] == 0  # into the same folder
