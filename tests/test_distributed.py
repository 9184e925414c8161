"""Several processes: the same images and steps as one, uneven work, failures, going on."""

import shutil
from pathlib import Path

import pytest
import torch

import prdp
from baselines import ddpo
from conftest import ROOT, call, checkpoint, metrics_of, script, small_run, two_processes
from support import distributed

BRIGHT = "def f(images, prompts):\n    return images.double().mean((1, 2, 3))\n"

TWO_FACED = """
import os
calls = []
def tied(images, prompts):
    return [0.0 if os.environ["RANK"] == "1" else float(i) for i in range(len(prompts))]
def fails(images, prompts):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":  # the start has three, an epoch one
        return [float("nan")] * len(prompts)
    return [float(i) for i in range(len(prompts))]
"""


def test_two_processes(tiny_sd, tmp_path, capsys):
    """They draw the images of one to the bit, take the same steps to rounding; DDPO's statistics
    of a prompt and the adapters' start are the same in both. What one process began two go on with,
    in smaller microbatches if need be. Where all rewards of one process tie, so that it has nothing
    to run, the other does not wait for it. All in one start, which takes longest."""
    # Of sizes in whole bytes a rounded pixel may change a difference by half.
    (tmp_path / "r.py").write_text(BRIGHT)
    (tmp_path / "tied.py").write_text(TWO_FACED)
    small = small_run(tiny_sd, "--learning-rate", "1e-5", "--reward", f"{tmp_path}/r.py:f")
    flags = {"prdp": [*small, "--updates-per-epoch", 1]}
    flags["baselines.ddpo"] = [*small, "--lora-rank", 2, "--images-per-prompt", 8]
    for module, main in (("prdp", prdp.main), ("baselines.ddpo", ddpo.main)):
        assert call(main, [*flags[module], "--out", tmp_path / module / "one"], capsys)[0] == 0
    shutil.copytree(tmp_path / "baselines.ddpo" / "one", tmp_path / "more")

    tied = small_run(tiny_sd, "--epochs", 1, "--reward", f"{tmp_path}/tied.py:tied")
    runs = [(module, [*flags[module], "--out", tmp_path / module / "two"]) for module in flags]
    runs += [("baselines.ddpo", ["--resume", tmp_path / "more", "--epochs", 3])]
    runs += [("prdp", [*tied, "--out", tmp_path / "tied"])]
    out = two_processes(runs)
    assert out.count("2 process") == out.count("on-policy gap") == len(runs)  # rank 0 alone prints

    for module in flags:
        require_equal(tmp_path / module / "one", tmp_path / module / "two")
    ddpos = [checkpoint(tmp_path / "baselines.ddpo" / name) for name in ("one", "two")]
    latest = [state["state"]["latest"] for state in ddpos]
    assert latest[0].keys() == latest[1].keys() and latest[0]
    for prompt, rewards in latest[0].items():
        assert latest[1][prompt] == pytest.approx(rewards, abs=0.02)
    assert [row["epoch"] for row in metrics_of(tmp_path / "more")] == [1, 2, 3]
    assert metrics_of(tmp_path / "tied")[0]["skipped_fraction"] >= 0.5


def require_equal(one: Path, two: Path) -> None:
    name = Path("samples") / "epoch_0000.png"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    # Differences of numbers of size 1 are compared on that scale, kl_nats as a sum of T*C*H*W ones.
    scales = {"log_ratio_old": 1, "log_ratio_ref": 1, "kl_nats": 3 * 4 * 8 * 8}
    # DDPO's loss is a mean of advantages of size 1, around 0, times how far two updates went apart.
    scales |= {"loss": 100}
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] is None] == [n for n in b if b[n] is None]
        for name in (name for name in a if a[name] is not None):
            close = {"rel": 1e-5 if a["epoch"] == 1 else 2e-2, "abs": 1e-6 * scales.get(name, 0)}
            assert b[name] == pytest.approx(a[name], **close), name
    ours, theirs = checkpoint(one), checkpoint(two)
    for name, weight in ours["unet"].items():
        torch.testing.assert_close(theirs["unet"][name], weight, rtol=0, atol=2e-7)


def test_failure_of_one_process_stops_all(tiny_sd, tmp_path):
    """With the failing one's own sentence; the last checkpoint is there."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = ["--epochs", 50, "--reward", f"{tmp_path}/r.py:fails", "--out", tmp_path / "run"]
    code, _, errors = script(ROOT / "prdp.py", *small_run(tiny_sd, *flags), processes=2)
    assert code != 0
    assert "prdp.py (process 1): " in errors
    assert "reward fails returned nan for the prompt" in errors
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_waiting_for_others_is_said(monkeypatch, capsys):
    """Left-over variables of torchrun would have it wait for a day."""
    values = ("0", "0", "3", "nowhere", "29500")
    for name, value in zip(distributed.TORCHRUN, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    distributed.start_processes()
    assert capsys.readouterr().out == "waiting for 2 other process(es) at nowhere:29500\n"


def test_a_process_that_is_shown_one_gpu_takes_it(monkeypatch):
    """As `srun --gpus-per-task=1` has it: LOCAL_RANK is then no GPU's number."""
    taken = []
    for name in distributed.TORCHRUN:
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "require_code_for_gpu", lambda: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    assert distributed.start_processes() == torch.device("cuda") and taken == [0]
