"""What a run shows: lines, metrics, pictures, trackers; and that none of it can cost an epoch."""

import json
import math
import sys
import weakref

import pytest
import torch

import prdp
from conftest import checkpoint, metrics_of, only_sentence
from support import report
from support.inputs import read_picture


def test_first_screen_fits_80_columns(cli):
    """Prompts, six columns, the forecast before the first epoch, at the end whether it worked."""
    code, out, errors = cli("--sample-every", 1)
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    header = next(n for n, line in enumerate(lines) if line.startswith("epoch "))
    names = "epoch reward_mean +- se clip_fraction log_ratio_ref grad_norm seconds"
    assert lines[header].split() == names.split()
    assert any("to sample an image: an epoch takes about" in line for line in lines[:header])
    assert any(" prompts: a " in line for line in lines[:header])
    table = lines[header : header + 3]
    assert {len(line) for line in table} == {len(table[0])} and len(table[0]) <= 80
    assert lines[-3].startswith("mean reward of 4 images on fixed prompts and seeds: ")


def test_parts_of_a_reward_are_logged(cli, tmp_path):
    words = ["incompressibility=3", "compressibility"]
    assert cli("--epochs", 1, "--reward", *words)[0] == 0
    (row,) = metrics_of(tmp_path / "run")
    kilobytes = row["reward_mean/incompressibility"]
    assert kilobytes == -row["reward_mean/compressibility"]
    assert row["reward_mean"] == pytest.approx(2 * kilobytes)


def test_what_tells_nothing_is_warned_of(cli, tmp_path):
    """Equal rewards, and prompts that are cut."""
    (tmp_path / "r.py").write_text("def constant(i, p):\n    return [1.0] * len(p)\n")
    (tmp_path / "p.txt").write_text("red " * 100 + "\na red circle\n")
    flags = ["--reward", f"{tmp_path}/r.py:constant", "--prompts", tmp_path / "p.txt"]
    code, out, errors = cli(*flags, "--epochs", 1)
    assert (code, errors) == (0, "")
    assert "every image has the same reward" in out
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


def test_names_of_models_are_shown_whole(tmp_path):
    """Of a sweep they may differ in their last letter only."""
    samples = report.Samples(["a cat"], torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.ones(1))
    for name in ("bright-kl_weight=1e-4-seed0", "bright-kl_weight=1e-4-seed1"):
        report.draw_images(tmp_path / f"{name}.png", {name: samples})
    one, other = (path.read_bytes() for path in tmp_path.glob("*.png"))
    assert one != other


# ---- Trackers ------------------------------------------------------------------------------------

WANDB = """
import json, pathlib
log = pathlib.Path(__file__).with_name("sent.jsonl")

def write(*row):
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\\n")

class Image:
    def __init__(self, path):
        assert pathlib.Path(path).exists()

class Run:
    def log(self, numbers, step):
        if pathlib.Path(__file__).with_name("down").exists():
            raise ConnectionError("no network")
        write("log", step, sorted(numbers))

def init(project, name, dir, id, resume, config):
    write("init", id, resume, config["kl_weight"], project)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the package; the rows that were sent."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("wandb", None)
    yield lambda: [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_wandb(cli, tmp_path, wandb, monkeypatch):
    """Numbers and sample grids by epoch, settings, a project of one's own; a resumed run is the
    same run there, and sends nothing twice."""
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    code, _, errors = cli("--log-to", "wandb", "--epochs", 1)
    assert (code, errors) == (0, "")
    assert cli("--resume", tmp_path / "run", "--epochs", 2, "--sample-every", 1)[0] == 0
    rows = wandb()
    inits = [row for row in rows if row[0] == "init"]
    assert len(inits) == 2 and inits[0] == inits[1] and inits[0][2:] == ["allow", 3e-5, "mine"]
    numbers = [row[1] for row in rows if row[0] == "log" and "reward_mean" in row[2]]
    pictures = [row[1] for row in rows if row[0] == "log" and row[2] == ["samples"]]
    assert (numbers, pictures) == ([1, 2], [0, 1, 2])


def test_a_tracker_that_fails_costs_nothing(cli, tmp_path, wandb):
    (tmp_path / "down").touch()
    code, out, errors = cli("--log-to", "wandb")
    assert (code, errors) == (0, "")
    assert "warning: --log-to wandb: epoch 1 was not sent: ConnectionError: no network" in out
    assert checkpoint(tmp_path / "run")["epoch"] == 2
    assert (tmp_path / "run" / "before_after.png").is_file()


@pytest.mark.parametrize(
    "text",
    ["raise ImportError('half installed')", "", "def init(**_):\n    raise ValueError('no login')"],
)
def test_a_tracker_that_cannot_be_opened_is_refused(cli, tmp_path, wandb, text):
    (tmp_path / "wandb.py").write_text(text)
    said = only_sentence(cli("--log-to", "wandb"))
    assert said.startswith("prdp.py: --log-to wandb: cannot be opened (")
    assert not metrics_of(tmp_path / "run")
    assert cli()[0] == 0  # into the same folder


def test_tensorboard_has_each_epoch_once(cli, tmp_path, monkeypatch):
    """Also of an epoch that is done again."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("purge", purge_step))

        def add_scalar(self, name, value, epoch):
            calls.append((name, epoch))

        def add_image(self, name, pixels, epoch):
            assert pixels.shape[0] == 3 and pixels.dtype == torch.uint8
            calls.append((name, epoch))

        def flush(self):
            pass

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert cli("--log-to", "tensorboard", "--epochs", 1)[0] == 0
    assert cli("--resume", tmp_path / "run", "--epochs", 2)[0] == 0
    assert [epoch for name, epoch in calls if name == "reward_mean"] == [1, 2]
    assert [epoch for name, epoch in calls if name == "purge"] == [1, 2]
    assert ("samples", 2) in calls
