"""Runs: input, folder, resume after whatever ended them, memory, several processes, as a library.

Most are of the command line in this process, two epochs of a tiny model: the fixture `cli`.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import prdp
import report
from tests.conftest import (
    PROMPTS,
    ROOT,
    SD14_SCHEDULER,
    assert_same_run,
    checkpoint,
    draw,
    gradient_of,
    metrics_of,
    needs_gpu,
    script,
    small_run,
    tiny_config,
)

TOY_REWARD = f"pickscore:{ROOT}/toy/pickscore"


@pytest.fixture
def finished(cli, tmp_path) -> Path:
    """A run of one epoch."""
    assert cli("--epochs", 1)[0] == 0
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# ---- Input ---------------------------------------------------------------------------------------

BAD_INPUT = [
    (["--prompts", "nowhere.txt"], "nowhere.txt: "),
    (["--prompts", "{empty.txt}"], "holds no prompt"),
    (["--prompts", "{broken.jsonl}"], "broken.jsonl: "),
    (["--prompts", "{number.json}"], "entry 2 is neither"),
    (["--prompts", "{latin.txt}"], "latin.txt: "),
    (["--prompts", "{table.csv}"], "must be .txt, .json or .jsonl"),
    (["--prompts", "{object.json}"], "a list of prompts"),
    (["--epochs", "0"], "--epochs 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", "9" * 30, "--lora-rank", "2"], "--seed 999"),
    (["--clip-range", "nan"], "--clip-range nan"),
    (["--epochs", "many"], "invalid int value"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--evaluate", "run"], "python evaluate.py --help"),
    (["--ddpm-steps", "600"], "--ddpm-steps 600"),
    (["--reward", "beauty"], "no reward 'beauty'; choose from hpsv2"),
    (["--model", "/nowhere/sd"], "--model /nowhere/sd: "),
    (["--model", "{latin.txt}"], "no Stable Diffusion"),
    (["--model", "{flux}"], "a FluxPipeline; only Stable Diffusion 1.x and 2.x"),
    (["--out", "{latin.txt}"], "latin.txt: "),
    (["--out", "{used}"], "in use"),
    (["--resume", "{flux}"], "config.json: "),
    (["--resume", "{used}", "--out", "elsewhere"], "--out elsewhere: not with --resume"),
]


@pytest.mark.parametrize(("flags", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(cli, tmp_path, flags, sentence):
    files = {
        "empty.txt": "# nothing\n\n",
        "broken.jsonl": '"a cat"\n{"prompt": \n',
        "number.json": '["a", 3]',
        "latin.txt": "caf\xe9",
        "table.csv": "prompt\na cat\n",
        "object.json": '{"prompt": "a cat"}',
        "flux/model_index.json": '{"_class_name": "FluxPipeline"}',
        "used/metrics.jsonl": "precious",
    }
    given = tmp_path / "given"
    for name, text in files.items():
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_text(text, encoding="latin-1")
    before = contents(given)
    code, _, errors = cli(*(f"{given}/{f[1:-1]}" if f[0] == "{" else f for f in flags))
    assert code == 2
    assert errors.startswith("prdp.py: ")
    assert errors.count("\n") == 1
    assert sentence in errors
    assert contents(given) == before
    assert not (tmp_path / "run").exists()


def test_prompt_files(tmp_path):
    """Strings and objects, a byte order mark, line separators that JSON strings may hold."""
    cases = {
        "a.txt": "\ufeff# comment\r\na cat\r\n\r\n  a dog \r\na cat\r\n",
        "A.JSON": json.dumps(["a cat", {"prompt": "a dog", "image": 3}, {"prompt": "a cat"}]),
        "a.jsonl": '{"prompt": null, "caption": "a cat"}\n\n"a dog"\n',
    }
    for name, text in cases.items():
        (tmp_path / name).write_bytes(text.encode())
        assert prdp.load_prompts(tmp_path / name) == ["a cat", "a dog"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a\u2028cat"}\n', encoding="utf-8")
    assert prdp.load_prompts(tmp_path / "b.jsonl") == ["a\u2028cat"]
    (tmp_path / "long.txt").write_text("".join(f"prompt {i % 60_000}\n" for i in range(100_000)))
    assert len(prdp.load_prompts(tmp_path / "long.txt")) == 60_000


def test_shipped_prompts():
    files = ("animals", "animal_names", "shapes", "shapes_unseen")
    animals, names, seen, unseen = (prdp.load_prompts(f"{prdp.PROMPTS}{f}.txt") for f in files)
    assert animals == [f"A painting of a {name}" for name in names]
    assert len(animals) == 45
    assert len(seen) + len(unseen) == 6 * 8 * 7
    assert not set(seen) & set(unseen)


def test_import_needs_torch_alone_and_does_nothing(tmp_path):
    hidden = ["numpy", "diffusers", "transformers", "triton", "PIL", "matplotlib", "tqdm", "peft"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({hidden}); sys.path.insert(0, {str(ROOT)!r})\n"
        "import prdp\nprint('silent')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "silent\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_prompt_with_mathematics_and_a_scheduler_of_another_kind(cli, tiny_sd, tmp_path):
    """A prompt with dollar signs is drawn as it stands. And a model whose scheduler config leaves
    set_alpha_to_one open is saved with the schedule it was trained on, whatever diffusers'
    default."""
    model = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    names = ("beta_start", "beta_end", "beta_schedule")
    config = {name: SD14_SCHEDULER[name] for name in names}
    kind = {"_class_name": "EulerDiscreteScheduler"}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | kind))
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "p.txt").write_text("a $x_{$ red circle\n" + "red " * 30 + "\n")
    code, out, _ = cli("--model", model, "--prompts", tmp_path / "p.txt", "--epochs", 1)
    assert code == 0
    assert "warning: " in out
    assert "16 tokens" in out
    scheduler = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").scheduler
    scheduler.set_timesteps(50)
    sigma = scheduler._get_variance(1, -19) ** 0.5
    assert sigma.item() == pytest.approx(prdp.ddpm_schedule(config, 50).sigma[-1].item(), rel=1e-4)


# ---- Rewards -------------------------------------------------------------------------------------


def test_reward_that_is_not_finite_stops_the_run_before_any_update(cli, tmp_path):
    """In the second epoch, naming reward and prompt; the first epoch's checkpoint stays, and the
    run can go on from it."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "calls, bad = [], Path(__file__).with_name('bad')\n"
        "def r(images, prompts):\n"
        "    calls.append(1)\n"
        "    broken = len(calls) == 3 and bad.exists()\n"
        "    return [float('nan') if broken else float(i) for i in range(len(prompts))]\n"
    )
    (tmp_path / "bad").touch()
    code, _, errors = cli("--reward", f"{tmp_path}/mine.py:r")
    run = tmp_path / "run"
    assert code == 2
    assert "reward r returned nan for the prompt 'a" in errors
    assert errors.count("\n") == 1
    assert checkpoint(run)["epoch"] == len(metrics_of(run)) == 1
    (tmp_path / "bad").unlink()
    assert cli("--resume", run)[0] == 0
    assert checkpoint(run)["epoch"] == 2


def test_parts_of_a_reward_are_logged(cli, tmp_path):
    code, out, _ = cli("--reward", "incompressibility=3,compressibility=1", "--epochs", 1)
    assert code == 0
    assert "reward_mean/compressibility" in out
    (row,) = metrics_of(tmp_path / "run")
    kilobytes = row["reward_mean/incompressibility"]
    assert kilobytes == -row["reward_mean/compressibility"]
    assert row["reward_mean"] == pytest.approx(2 * kilobytes)


def test_constant_reward_is_warned_of(cli, tmp_path):
    (tmp_path / "mine.py").write_text("def r(images, prompts):\n    return [1.0] * len(prompts)\n")
    code, out, _ = cli("--reward", f"{tmp_path}/mine.py:r", "--epochs", 1)
    assert code == 0
    assert "every image has the same reward" in out
    (row,) = metrics_of(tmp_path / "run")
    assert (row["reward_std"], row["loss"], row["skipped_fraction"]) == (0, 0, 1)


def test_as_a_library(tiny_sd, tmp_path, capsys):
    """`run` takes a callable and a list: what a file with the same function and prompts gives."""
    config = tiny_config(tiny_sd, epochs=1, updates_per_epoch=2, out=str(tmp_path / "library"))
    calls = []

    def brightness(images, prompts):
        assert set(prompts) <= set(PROMPTS)
        calls.append(len(images))
        return images.double().mean((1, 2, 3))

    prdp.run(config, reward=brightness, prompts=PROMPTS)
    assert sum(calls) >= 3 * 4

    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "r.py").write_text("def brightness(i, p):\n    return i.double().mean((1, 2, 3))\n")
    files = {"reward": f"{tmp_path}/r.py:brightness", "prompts": (str(tmp_path / "p.txt"),)}
    prdp.run(prdp.dataclasses.replace(config, out=str(tmp_path / "files"), **files))
    assert_same_run(tmp_path / "library", tmp_path / "files")

    config = prdp.dataclasses.replace(config, epochs=2, resume=config.out)
    prdp.run(config, reward=brightness, prompts=PROMPTS)
    assert len(metrics_of(tmp_path / "library")) == 2
    with pytest.raises(prdp.InputError, match="prompts"):
        prdp.run(config, reward=brightness, prompts=PROMPTS[:2])


# ---- Resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        pytest.param([], 1, 2, id="prdp"),
        pytest.param(["--loss", "ddpo", "--images-per-prompt", 6], 3, 4, id="ddpo"),
        pytest.param(["--lora-rank", 2, "--microbatch", 4], 1, 2, id="lora"),
        pytest.param(["--offline", "--dtype", "bf16"], 1, 2, id="offline"),
    ],
)
def test_resume_equals_the_uninterrupted_run(cli, tmp_path, flags, first, last):
    """To the bit: weights, metrics and pictures, DDPO's statistics of more than 16 rewards a prompt
    included; a line of metrics that outlived its checkpoint, torn, leaves no trace."""
    (tmp_path / "p.txt").write_text("a red star\na blue star\n")
    flags = [*flags, "--prompts", tmp_path / "p.txt", "--sample-every", 1]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli(*flags, "--epochs", last, "--out", whole)[0] == 0
    assert cli(*flags, "--epochs", first, "--out", halves)[0] == 0
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "reward_me')
    assert cli("--resume", halves, "--epochs", last)[0] == 0
    assert_same_run(whole, halves)
    assert contents(whole / "samples") == contents(halves / "samples")
    if "ddpo" in flags:
        latest = checkpoint(halves)["latest"]
        assert latest == checkpoint(whole)["latest"]
        assert max(map(len, latest.values())) > 16


KILLER = """
import os, random, signal, sys, time
root, whole, folder, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torch
torch.set_num_threads(1)
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from matplotlib.figure import Figure
import matplotlib.backends.backend_agg
import prdp


def launch(arguments):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        prdp.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


started = time.time()
assert os.waitpid(launch([*flags, "--out", whole]), 0)[1] == 0
duration, kills, runs = time.time() - started, 0, 0
random.seed(0)
while kills < 20:
    out = os.path.join(folder, str(runs))
    while True:
        fresh = not os.path.exists(os.path.join(out, "metrics.jsonl"))
        pid = launch([*flags, "--out", out] if fresh else ["--resume", out])
        if kills < 20:
            time.sleep(random.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert os.WEXITSTATUS(status) == 0, status
            break
    runs += 1
print(kills, runs)
"""


def test_kill_at_20_random_moments(tiny_sd, tmp_path):
    """kill -9 in whatever phase, then --resume (or, where no epoch had begun, once more): the
    weights and metrics of every run are the undisturbed one's."""
    flags = [*small_run(tiny_sd), "--epochs", 2, "--sample-every", 1]
    (tmp_path / "runs").mkdir()
    arguments = ["-c", KILLER, ROOT, tmp_path / "whole", tmp_path / "runs", *flags]
    code, out, errors = script(*arguments, timeout=900)
    assert code == 0, errors[-3000:]
    kills, runs = map(int, out.split()[-2:])
    assert kills == 20
    assert runs >= 1
    for run in range(runs):
        assert_same_run(tmp_path / "whole", tmp_path / "runs" / str(run))


def test_resume_after_ctrl_c(cli, tmp_path, monkeypatch):
    """Exit code 130, how to go on, and what the interrupted epoch had done is done again."""
    sample, calls = prdp.sample_trajectories, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # the check, the first samples, epoch 1, epoch 2
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(prdp, "sample_trajectories", interrupted)
    code, out, errors = cli()
    run = tmp_path / "run"
    assert code == 130
    assert f"python prdp.py --resume {run}" in out + errors
    assert "Traceback" not in errors
    assert cli("--resume", run)[0] == 0
    assert cli("--out", tmp_path / "whole")[0] == 0
    assert_same_run(tmp_path / "whole", run)


def test_resume_with_the_same_settings_and_with_harmless_others(finished, cli):
    assert cli("--resume", finished, "--seed", 3, "--kl-weight", "3e-5")[0] == 0
    assert cli("--resume", finished, "--offload", "on", "--save-every", 2)[0] == 0


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_state(run: Path, **changes) -> None:
    torch.save({**checkpoint(run), **changes}, run / "checkpoint" / "state.pt")


def cut_state(run: Path) -> None:
    state = run / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])


def other_shape(run: Path) -> None:
    weights = checkpoint(run)["unet"]
    change_state(run, unet={name: w.flatten() for name, w in weights.items()})


def other_model(run: Path) -> None:
    """Another of the same shapes, in the folder where the run found its own."""
    pipe = StableDiffusionPipeline.from_pretrained(run.parent / "sd")
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1e-3
    pipe.unet.save_pretrained(run.parent / "sd" / "unet")


DAMAGES = {
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoint"), [], "no checkpoint"),
    "cut checkpoint": (cut_state, [], "--resume"),
    "a list": (lambda run: torch.save([], run / "checkpoint" / "state.pt"), [], "--resume"),
    "no keys": (lambda run: torch.save({}, run / "checkpoint" / "state.pt"), [], "--resume"),
    "of other shapes": (other_shape, [], "--resume"),
    "of another layout": (lambda run: change_state(run, version=-1), [], "version"),
    "of another run": (
        lambda run: change_state(run, record={**checkpoint(run)["record"], "seed": 9}),
        [],
        "seed is 3",
    ),
    "torn config": (lambda run: (run / "config.json").write_text('{"preset"'), [], "config.json"),
    "config without a setting": (
        lambda run: (run / "config.json").write_text('{"dtype": "fp32"}'),
        [],
        "config.json",
    ),
    "edited config": (lambda run: edit(run / "config.json", kl_weight=1.0), [], "kl_weight"),
    "other setting": (lambda run: None, ["--kl-weight", 1], "--kl-weight 1"),
    "other dtype": (lambda run: None, ["--dtype", "bf16"], "--dtype bf16"),
    "fewer epochs": (lambda run: None, ["--epochs", 1], "--epochs 1: the run has done 2"),
    "other prompts": (
        lambda run: (run.parent / "p.txt").write_text("a red star\na blue cross\n"),
        [],
        "prompts",
    ),
    "other reward": (
        lambda run: (run.parent / "r.py").write_text("def f(i, p):\n    return [-1.0] * len(p)\n"),
        [],
        "reward",
    ),
    "other model": (other_model, [], "model"),
}


@pytest.fixture(scope="module")
def original(tiny_sd, tmp_path_factory) -> Path:
    """A finished run of two epochs, with model, prompts and reward beside it."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(tiny_sd, folder / "sd")
    (folder / "p.txt").write_text("a red star\na blue star\n")
    (folder / "r.py").write_text("def f(i, p):\n    return i.double().mean((1, 2, 3))\n")
    flags = [*small_run(str(folder / "sd")), "--out", folder / "run"]
    flags += ["--reward", f"{folder}/r.py:f", "--prompts", folder / "p.txt"]
    torch.set_num_threads(1)
    prdp.main([str(flag) for flag in flags])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_refuses_what_would_change_the_result(original, cli, damage):
    """By name, in a sentence, before anything in the folder has changed: not the pipeline, nor a
    line of metrics."""
    break_it, flags, named = DAMAGES[damage]
    kept = original.with_name("kept")
    shutil.copytree(original, kept)  # the run knows its files by absolute paths
    try:
        break_it(original / "run")
        before = contents(original)
        code, _, errors = cli("--resume", original / "run", *flags)
        assert code == 2, errors
        assert errors.startswith("prdp.py: ")
        assert errors.count("\n") == 1
        assert named in errors
        assert contents(original) == before
    finally:
        shutil.rmtree(original)
        kept.rename(original)


@pytest.mark.parametrize("line", ["\n", "null\n", "garbage\n", '{"epoch": 7}\n'])
def test_foreign_lines_and_files_do_no_harm(finished, cli, line):
    metrics = finished / "metrics.jsonl"
    metrics.write_text(line + metrics.read_text() + line)
    (finished / "samples" / "epoch_note.json").write_text("[]")
    (finished / "samples" / "epoch_0001.json.bak").write_text("x")
    code, _, errors = cli("--resume", finished, "--epochs", 2)
    assert (code, errors) == (0, "")
    assert [row["epoch"] for row in metrics_of(finished)] == [1, 2]


def test_folder_of_a_failed_start_can_be_used_again(cli, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prdp, "train", lambda *_: iter([1 / 0]))
        with pytest.raises(ZeroDivisionError):
            cli()
    code, _, errors = cli("--resume", tmp_path / "run")
    assert (code, errors) == (0, "")
    code, _, errors = cli()
    assert code == 2
    assert "in use" in errors


# ---- Full disk -----------------------------------------------------------------------------------


@pytest.fixture
def file_limit():
    """file_limit(bytes): no file of this process may grow larger, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_at_a_checkpoint(finished, cli, file_limit):
    """One sentence, nothing half-written; the checkpoint before it still works."""
    state = finished / "checkpoint" / "state.pt"
    before = state.read_bytes()
    file_limit(len(before) // 2)
    code, _, errors = cli("--resume", finished, "--epochs", 2)
    file_limit(resource.RLIM_INFINITY)
    assert code == 2
    assert errors.startswith(f"prdp.py: {state}: ")
    assert errors.count("\n") == 1
    assert state.read_bytes() == before
    assert not list(finished.rglob("*.tmp*"))
    assert cli("--resume", finished, "--epochs", 2)[0] == 0
    assert [row["epoch"] for row in metrics_of(finished)] == [1, 2]


def test_full_disk_at_the_pipeline(finished, cli, file_limit):
    """The pipeline of before stays."""
    before = contents(finished / "pipeline")
    file_limit(100_000)  # pictures are smaller
    code, _, errors = cli("--resume", finished)
    file_limit(resource.RLIM_INFINITY)
    assert code == 2
    assert errors.startswith(f"prdp.py: {finished / 'pipeline'}: ")
    assert errors.count("\n") == 1
    assert contents(finished / "pipeline") == before
    assert not list(finished.rglob("*.tmp*"))


@pytest.mark.parametrize("name", ["file", "folder"])
def test_writing_is_whole_or_not_at_all(tmp_path, name):
    """What fails leaves the old one and no remains, whatever kind of error a library raises."""
    path = tmp_path / name
    for content in ("old", "new"):
        with report.writing(path) as temporary:
            file = temporary
            if name == "folder":
                temporary.mkdir()
                file = temporary / "weights"
            file.write_text(content)
    before = contents(tmp_path)
    assert list(before.values()) == [b"new"]
    for error in (RuntimeError("[enforce fail]: unexpected pos"), OSError(28, "No space left")):
        with pytest.raises(OSError, match=str(path)), report.writing(path) as temporary:
            temporary.write_text("half")
            raise error
        assert contents(tmp_path) == before


# ---- LoRA ----------------------------------------------------------------------------------------


def pictures(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """Of 3 prompts, each from its own noise, as floats."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    options = {"num_inference_steps": 5, "generator": generators, "output_type": "pt"}
    return pipe(PROMPTS, eta=1.0, **options).images


def test_lora(cli, tiny_sd, tmp_path):
    """Adapters alone are learned and kept; the reference stays the pretrained model. The pipeline
    has them merged, and the base with lora/ loaded draws the same, which is not what the base
    draws."""
    flags = ["--lora-rank", 2, "--learning-rate", "1e-2", "--microbatch", 4]
    assert cli(*flags)[0] == 0
    run = tmp_path / "run"
    adapters = checkpoint(run)["unet"]
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert any(x.abs().max() > 1e-3 for name, x in adapters.items() if "lora_B" in name)

    merged = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert not any("lora" in name for name in merged.unet.state_dict())
    base = StableDiffusionPipeline.from_pretrained(tiny_sd)
    base.scheduler = merged.scheduler
    expected, pretrained = pictures(merged), pictures(base)
    base.load_lora_weights(run / "lora")
    moved = (expected - pretrained).abs().mean().item()
    assert moved > 1e-3
    assert (pictures(base) - expected).abs().mean().item() < 0.01 * moved


def test_reference_of_adapters_is_the_pretrained_network(models):
    loaded, base = models(lora_rank=2), models()
    with torch.no_grad():
        for name, p in loaded.pipe.unet.named_parameters():
            p.add_(0.1 * p.requires_grad)
            assert p.requires_grad == ("lora_" in name)
    trajectories = draw(base)
    with prdp.in_use(loaded, loaded.reference):
        scores = prdp.score_trajectories(loaded.reference, trajectories)
    assert torch.equal(scores, trajectories.log_probs)
    assert not torch.equal(prdp.score_trajectories(loaded.policy, trajectories), scores)


# ---- Speed and memory ----------------------------------------------------------------------------


def weighted_gradient(models: prdp.Models, zeros: int = 0) -> torch.Tensor:
    """Of random weights, of which some are 0."""
    weights = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights[torch.randperm(60, generator=torch.Generator().manual_seed(1))[:zeros]] = 0
    models.pipe.unet.zero_grad()
    prdp.backward_trajectories(models.policy, draw(models), weights.view(12, 5))
    return gradient_of(models.pipe.unet)


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True}, {"compile": True}, {"compile": True, "lora_rank": 2}],
)
def test_memory_and_speed_flags_keep_gradient_and_bits(models, monkeypatch, changes):
    """The gradient to rounding. And an unchanged policy still reproduces its log-probs to the bit;
    the checkpoint has the network's own names. Policy and reference share one graph if they share
    a network: another, of the same numbers, is compiled to other rounding in 16 bits."""
    graphs = []

    def backend(graph, inputs):  # the graphs, not their compilation
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = weighted_gradient(models(lora_rank=changes.get("lora_rank", 0)))
    loaded = models(**changes)
    tolerance = 1e-5 * plain.abs().max().item()
    torch.testing.assert_close(weighted_gradient(loaded), plain, rtol=1e-4, atol=tolerance)
    trajectories, compiled = draw(loaded), len(graphs)
    assert bool(compiled) == ("compile" in changes)
    for policy in (loaded.policy, loaded.reference):
        with prdp.in_use(loaded, policy):
            scores = prdp.score_trajectories(policy, trajectories)
        assert torch.equal(scores, trajectories.log_probs)
    assert len(graphs) == compiled or loaded.reference.unet is not loaded.policy.unet
    assert next(name for name, _ in loaded.pipe.unet.named_parameters()).startswith("conv_in")


def test_compiled_updates_have_one_shape(models, monkeypatch):
    """Of 53 entries, and of none, each microbatch is full; the gradient is the uncompiled one's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    expected = [weighted_gradient(models(), zeros) for zeros in (7, 60)]
    forward, sizes = prdp.predict_noise, set()

    def watched(policy, sample, *rest):
        sizes.add(len(sample))
        return forward(policy, sample, *rest)

    monkeypatch.setattr(prdp, "predict_noise", watched)
    compiled = models(compile=True)
    tolerance = 1e-5 * expected[0].abs().max().item()
    for zeros, gradient in zip((7, 60), expected, strict=True):
        ours = weighted_gradient(compiled, zeros)
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=tolerance)
    assert sizes == {6}


@pytest.mark.parametrize("flags", [[], ["--offline"], ["--lora-rank", 2], ["--loss", "ddpo"]])
def test_offload_networks_are_back_wherever_they_run(cli, tmp_path, monkeypatch, flags):
    """A run whose waiting networks hold NaN, but for the phases that move them back, is the run
    without --offload to the bit; and while gradients exist, all of them wait."""
    flags = ["--reward", TOY_REWARD, *flags]
    assert cli(*flags, "--out", tmp_path / "plain")[0] == 0

    away, waiting, learned = {}, torch.device("meta"), []  # a marker: nothing is moved there
    move, load, learn = torch.nn.Module.to, prdp.load_models, prdp.backward_trajectories

    def to(module, *where, **options):
        if waiting not in where and not away:
            return move(module, *where, **options)
        for x in itertools.chain(module.parameters(), module.buffers()):
            if x.is_floating_point() and waiting in where:
                assert x.data_ptr() not in away, "sent away twice"
                away[x.data_ptr()] = x.data.clone()
                x.data.fill_(math.nan)
            elif x.is_floating_point() and x.data_ptr() in away:
                x.data.copy_(away.pop(x.data_ptr()))
        return module

    def load_offloaded(*arguments):
        models = load(*arguments)._replace(waiting=waiting)
        models.reward.waiting = waiting
        ((_, scorer),) = models.reward.components.values()
        networks = {models.reference.unet, models.pipe.vae, models.pipe.text_encoder}
        for network in (networks | {*scorer.networks}) - {models.policy.unet}:
            network.to(waiting)
        learned.append(len(away))
        return models

    def learn_alone(policy, *arguments):
        learned.append(len(away))
        assert not any(x.data_ptr() in away for x in policy.unet.parameters())
        learn(policy, *arguments)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(prdp, "load_models", load_offloaded)
    monkeypatch.setattr(prdp, "backward_trajectories", learn_alone)
    code, _, errors = cli(*flags, "--out", tmp_path / "offloaded")
    assert code == 0, errors
    assert_same_run(tmp_path / "plain", tmp_path / "offloaded")
    assert len(learned) >= 5
    assert set(learned) == {len(away)}  # as loaded, and in each update
    assert len(away) > 100


def test_memory_of_an_epoch_is_free_before_the_next(cli, monkeypatch):
    """Of Table 4's 512 images it is 2 GB: trajectories and text are gone whenever others are
    drawn."""
    drawn, sample = [], prdp.sample_trajectories

    def watched(*arguments):
        assert not any(tensor() is not None for tensor in drawn)
        trajectories = sample(*arguments)
        drawn.extend(weakref.ref(tensor) for tensor in (trajectories.latents, trajectories.text))
        return trajectories

    monkeypatch.setattr(prdp, "sample_trajectories", watched)
    code, _, errors = cli("--epochs", 3, "--sample-every", 1)
    assert (code, errors) == (0, "")
    assert len(drawn) >= 2 * (3 + 4)


@needs_gpu
def test_offload_on_a_gpu(cli, tmp_path):
    """The same values to the bit (of an epoch: later ones depend on cuDNN's gradients), in less GPU
    memory."""
    peaks, first = {}, {}
    for offload in ("off", "on"):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        toy = ["--model", ROOT / "toy" / "sd", "--reward", TOY_REWARD, "--microbatch", 4]
        assert cli(*toy, "--offload", offload, "--out", tmp_path / offload)[0] == 0
        peaks[offload] = torch.cuda.max_memory_allocated()
        first[offload] = metrics_of(tmp_path / offload)[0]["reward_mean"]
    assert first["on"] == first["off"]
    assert peaks["on"] < peaks["off"]


def fail_to_compile() -> None:
    def broken_backend(*_):
        raise ValueError("no such chip")

    torch.compile(torch.sin, backend=broken_backend)(torch.ones(1))


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (run_out_of_memory, "out of GPU memory: try --offload on"),
        (fail_to_compile, "--compile: failed (backend='"),
    ],
)
def test_what_the_machine_cannot_do_is_a_sentence(cli, tmp_path, monkeypatch, fail, sentence):
    """Any other RuntimeError is a mistake of ours, and keeps its traceback."""
    monkeypatch.setattr(prdp, "backward_trajectories", lambda *_: fail())
    code, _, errors = cli()
    assert code == 2
    assert errors.startswith(f"prdp.py: {sentence}")
    assert errors.count("\n") == 1
    monkeypatch.setattr(prdp, "backward_trajectories", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent"):
        cli("--out", tmp_path / "other")


# ---- What a run shows ----------------------------------------------------------------------------


def test_progress_bars_leave_no_threads():
    """A run of 1,000 epochs makes some 10,000 of them."""
    before = threading.active_count()
    for _ in range(20):
        with report.progress("sample", 2) as bar:
            bar.update(2)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("rewards", "warned"),
    [
        ([0.3, 0.4, 0.2, 0.5, 0.6], [False, False, False, True, False]),
        ([0.3, 0.2, 0.2, 0.1, 0.1], [False] * 5),
    ],
)
def test_over_optimisation_is_warned_of_once(tmp_path, capsys, rewards, warned):
    """When the distance to the reference passes the threshold with a reward above the first
    epoch's."""
    seen = []
    for epoch, reward in enumerate(rewards):
        metrics = dict.fromkeys(report.COLUMNS, 0.1) | {"epoch": epoch + 1, "reward_mean": reward}
        metrics["log_ratio_ref"] = (0.0, 9.0, 11.0, 12.0, 30.0)[epoch]
        report.log_epoch(tmp_path, metrics, header=False, log_to="none")
        seen.append("over-optimisation" in capsys.readouterr().out)
    assert seen == warned


def test_metrics_are_strict_json(tmp_path, capsys):
    """null where there is no number, on the screen a dash."""
    metrics = dict.fromkeys(report.COLUMNS, 0.1) | {"epoch": 1, "reward_std": math.nan}
    report.log_epoch(tmp_path, metrics, header=False, log_to="none")
    assert " - " in capsys.readouterr().out
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["reward_std"] is None


WANDB = """
lines = []
class Run:
    def log(self, metrics):
        lines.append(metrics)
def init(**settings):
    return Run()
"""


def test_log_to(cli, tmp_path, monkeypatch):
    """Every epoch's metrics go there as to metrics.jsonl."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    report.open_log.cache_clear()
    code, _, errors = cli("--log-to", "wandb")
    assert (code, errors) == (0, "")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sys.modules.pop("wandb").lines == [json.loads(line) for line in lines]


def test_log_to_what_is_not_installed(cli, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, errors = cli("--log-to", "tensorboard")
    assert code == 2
    assert errors == "prdp.py: --log-to tensorboard: not installed; pip install tensorboard.\n"


# ---- Several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [[], ["--loss", "ddpo", "--lora-rank", 2, "--images-per-prompt", 8]]
)
def test_two_processes_equal_one(cli, tiny_sd, tmp_path, flags):
    """They draw the same images to the bit, and take the same steps to rounding; DDPO's statistics
    of a prompt and the adapters' start are the same in both. What one process began two go on
    with."""
    # Of sizes in whole bytes a rounded pixel may change a difference by half.
    (tmp_path / "r.py").write_text("def f(i, p):\n    return i.double().mean((1, 2, 3))\n")
    flags = ["--learning-rate", "1e-5", "--reward", f"{tmp_path}/r.py:f", *flags]
    flags += ["--updates-per-epoch", 2 if "ddpo" in flags else 1]  # 2 minibatches of all images
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli(*flags, "--out", one)[0] == 0
    arguments = [ROOT / "prdp.py", *small_run(tiny_sd), *flags, "--out", two]
    code, out, errors = script(*arguments, processes=2)
    assert code == 0, errors
    assert out.count("2 process") == out.count("on-policy gap") == 1  # rank 0 alone prints
    name = Path("samples") / "epoch_0000.png"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    # Differences of numbers of size 1 are compared on that scale, kl_nats as a sum of T*C*H*W ones.
    scales = {"log_ratio_old": 1, "log_ratio_ref": 1, "explained": 1, "kl_nats": 3 * 4 * 8 * 8}
    # DDPO's loss is a mean of advantages of size 1, around 0, times how far two updates went apart.
    scales |= {"loss": 100, "loss_unclipped": 100}
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"explained"} if a["explained"] is None else a:
            close = {"rel": 1e-5 if a["epoch"] == 1 else 2e-2, "abs": 1e-6 * scales.get(name, 0)}
            assert b[name] == pytest.approx(a[name], **close), name
    ours, theirs = checkpoint(one), checkpoint(two)
    for name, weight in ours["unet"].items():
        torch.testing.assert_close(theirs["unet"][name], weight, rtol=0, atol=2e-7)
    for prompt, rewards in ours["latest"].items():
        assert theirs["latest"][prompt] == pytest.approx(rewards, abs=0.02)
    assert bool(ours["latest"]) == bool(theirs["latest"]) == ("ddpo" in flags)
    if "ddpo" in flags:
        code, _, errors = script(ROOT / "prdp.py", "--resume", one, "--epochs", 3, processes=2)
        assert code == 0, errors
        assert [row["epoch"] for row in metrics_of(one)] == [1, 2, 3]


TWO_FACED = """
import os
calls = []
def tied(images, prompts):
    return [0.0 if os.environ["RANK"] == "1" else float(i) for i in range(len(prompts))]
def fails(images, prompts):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        return [float("nan")] * len(prompts)
    return [float(i) for i in range(len(prompts))]
"""


def test_processes_may_skip_different_entries(tiny_sd, tmp_path):
    """All rewards of one process tie, so that it has nothing to run: the other does not wait for
    it."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = ["--epochs", 1, "--reward", f"{tmp_path}/r.py:tied", "--out", tmp_path / "run"]
    code, _, errors = script(ROOT / "prdp.py", *small_run(tiny_sd), *flags, processes=2)
    assert code == 0, errors
    assert metrics_of(tmp_path / "run")[0]["skipped_fraction"] >= 0.5


def test_failure_of_one_process_stops_all(tiny_sd, tmp_path):
    """With the failing one's own sentence; the last checkpoint is there."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = ["--epochs", 50, "--reward", f"{tmp_path}/r.py:fails", "--out", tmp_path / "run"]
    code, _, errors = script(ROOT / "prdp.py", *small_run(tiny_sd), *flags, processes=2)
    assert code != 0
    assert "prdp.py (process 1): " in errors
    assert "reward fails returned nan for the prompt" in errors
    assert checkpoint(tmp_path / "run")["epoch"] == 1
