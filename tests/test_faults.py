"""Other people's folders, inputs and disks: what cannot be used is refused in one exact sentence,
with exit code 2 and nothing lost; what can be used is."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import prdp
import report
from tests.conftest import ROOT

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
REWARD = "def bright(images, prompts):\n    return images.float().mean((1, 2, 3))\n"
ONE_EPOCH = ["--epochs", "1", "--updates-per-epoch", "1"]


def only_sentence(result: tuple[int, str, str]) -> str:
    """stderr of a command that was refused: one line, and nothing but it."""
    code, _, err = result
    assert code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err.strip()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def edit_json(path: Path, **changes) -> None:
    """Set some fields; None takes them away."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_sd) -> Path:
    """A folder with a model, a reward, prompts, and a run of two epochs in microbatches of 3, which
    do not divide its 4 images."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_sd, folder / "sd")
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("a red circle\na green star\na blue ring\n")
    torch.set_num_threads(1)
    prdp.main([*flags_of(folder), "--epochs", "2", "--out", str(folder / "run")])
    return folder


def flags_of(world: Path) -> list[str]:
    sizes = ["--preset", "toy", "--updates-per-epoch", "2", "--prompts-per-epoch", "2"]
    sizes += ["--images-per-prompt", "2", "--microbatch", "3", "--ddpm-steps", "3"]
    inputs = ["--model", str(world / "sd"), "--prompts", str(world / "prompts.txt")]
    return [*sizes, *inputs, "--reward", f"{world}/mine.py:bright"]


@pytest.fixture
def run(world, tmp_path) -> Path:
    """A copy of the world's run, to be damaged."""
    return Path(shutil.copytree(world / "run", tmp_path / "copy"))


# ---- Model folders -------------------------------------------------------------------------------


def change_weight(part: str, change: Callable) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS[part])
        change(weights, sorted(weights)[3])
        save_file(weights, folder / WEIGHTS[part], {"format": "pt"})

    return damage


def drop(weights, name) -> None:
    del weights[name]


def spoil(weights, name) -> None:
    weights[name].view(-1)[0] = math.nan


def reshape(weights, name) -> None:
    weights[name] = torch.zeros(*weights[name].shape, 2)


def cut(part: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / WEIGHTS[part], 1000)


def to_fp16_variant(folder: Path) -> None:
    for name in WEIGHTS.values():
        (folder / name).rename((folder / name).with_suffix(".fp16.safetensors"))


class Code:
    def __reduce__(self):
        return os.system, ("touch code_was_run",)


def to_pickle(part: str, **more) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights, file = load_file(folder / WEIGHTS[part]), folder / WEIGHTS[part]
        file.unlink()
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(weights | more, file.with_name(name))

    return damage


def index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model_index.json").write_text(text)


MISSING = "1 weights are missing, misshapen or not finite"
CODE = "holds code beside weights, and is not opened (a .safetensors file cannot)"
FP16 = "from_pretrained it with variant='fp16', then save_pretrained it"
NO_FOLDER = "no Stable Diffusion folder"
FOLDERS = {
    "unet lacks a weight": (
        change_weight("unet", drop),
        f"its unet: {MISSING} (conv_norm_out.weight)",
    ),
    "vae lacks a weight": (
        change_weight("vae", drop),
        f"its vae: {MISSING} (decoder.conv_norm_out.weight)",
    ),
    "text encoder lacks a weight": (
        change_weight("text_encoder", drop),
        f"its text_encoder: {MISSING} (encoder.layers.0.layer_norm1.weight)",
    ),
    "nan in the unet": (
        change_weight("unet", spoil),
        f"its unet: {MISSING} (conv_norm_out.weight)",
    ),
    "nan in the vae": (
        change_weight("vae", spoil),
        f"its vae: {MISSING} (decoder.conv_norm_out.weight)",
    ),
    "unet's weight of another shape": (
        change_weight("unet", reshape),
        "its unet: has weights of other shapes",
    ),
    "text encoder's weight of another shape": (
        change_weight("text_encoder", reshape),
        "its text_encoder: has weights of other shapes",
    ),
    "unet cut short": (cut("unet"), "its unet: a file of weights is damaged or cut short"),
    "text encoder cut short": (
        cut("text_encoder"),
        "its text_encoder: a file of weights is damaged or cut short",
    ),
    "fp16 variant alone": (
        to_fp16_variant,
        f"its unet: is there as its fp16 variant alone; {FP16}",
    ),
    "code in the unet": (to_pickle("unet", x=Code()), f"its unet: {CODE}"),
    "code in the text encoder": (to_pickle("text_encoder", x=Code()), f"its text_encoder: {CODE}"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), f"{NO_FOLDER}: has no vae"),
    "no tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        f"{NO_FOLDER}: has no tokenizer",
    ),
    "empty index": (index("{}"), f"{NO_FOLDER}: lacks '_class_name'"),
    "index without parts": (
        index('{"_class_name": "StableDiffusionPipeline"}'),
        f"{NO_FOLDER}: model_index.json lacks a part",
    ),
    "another pipeline": (
        index('{"_class_name": "StableDiffusionXLPipeline"}'),
        "a StableDiffusionXLPipeline; only Stable Diffusion 1.x and 2.x work",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_model_folder_is_refused(damage, sentence, tiny_sd, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    damage(folder)
    said = only_sentence(cli("--model", folder))
    assert said == f"prdp.py: --model {folder}: {sentence}."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sd"]  # no run, and no code was run


def test_what_is_no_model_folder_is_refused(run, cli, tmp_path):
    said = only_sentence(cli("--model", run))
    assert said == f"prdp.py: --model {run}: is a run; its model is {run / 'pipeline'}."
    file = tmp_path / "v1-5.safetensors"
    file.touch()
    assert "from_single_file" in only_sentence(cli("--model", file))


@pytest.fixture(scope="session")
def full_sd(tmp_path_factory, tiny_sd) -> Path:
    """A folder as older diffusers write it: safety checker, feature extractor, vocab.json, merges.
    Its UNet predicts v through linear projections, as that of Stable Diffusion 2.1 does."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    settings = {**pipe.unet.config, "use_linear_projection": True}
    unet = UNet2DConditionModel.from_config(settings)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "projection_dim": 8}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    checker = CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("full_sd")
    StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
        safety_checker=StableDiffusionSafetyChecker(checker),
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    ).save_pretrained(folder)
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(ROOT / "toy/sd/tokenizer", folder / "tokenizer")
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)  # as a shared folder is
    return folder


def test_pipeline_has_the_other_parts_as_they_came(full_sd, cli, tmp_path):
    from diffusers import StableDiffusionPipeline

    code, _, err = cli("--model", full_sd, *ONE_EPOCH)
    assert code == 0, err
    then, now = contents(full_sd), contents(tmp_path / "run" / "pipeline")
    learned = ("unet/", "scheduler/", "model_index.json")
    same = [name for name in then if not name.startswith(learned)]
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} < set(same)
    assert {name.split("/")[0] for name in same} >= {"safety_checker", "feature_extractor"}
    assert {name: now.get(name) for name in same} == {name: then[name] for name in same}
    assert now[WEIGHTS["unet"]] != then[WEIGHTS["unet"]]

    files = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert len({file.stat().st_mode for file in files}) == 1  # whoever reads one reads all

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.safety_checker is not None and pipe.feature_extractor is not None
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    cli("--resume", tmp_path / "run", "--epochs", 1)
    assert contents(tmp_path / "run" / "pipeline") == now  # replaced by the same


def test_model_of_pickled_tensors_runs(tiny_sd, models, tmp_path):
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    for part in WEIGHTS:
        to_pickle(part)(folder)
    one, other = models().pipe, models(model=str(folder)).pipe
    assert report.weights_digest(one) == report.weights_digest(other)


def test_lora_gives_the_images_of_the_pipeline(tiny_sd, cli, tmp_path):
    from diffusers import StableDiffusionPipeline

    code, _, err = cli("--lora-rank", 2, "--learning-rate", 0.5, *ONE_EPOCH)
    assert code == 0, err

    def images(pipe) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 3, "output_type": "np", "generator": noise}
        return torch.from_numpy(pipe(["a red circle", "a blue ring"], **options).images)

    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    base = StableDiffusionPipeline.from_pretrained(tiny_sd)
    base.scheduler = merged.scheduler
    pretrained = images(base)
    base.load_lora_weights(tmp_path / "run" / "lora")
    adapted = images(base)
    assert (tmp_path / "run/lora/pytorch_lora_weights.safetensors").is_file()
    assert (adapted - pretrained).abs().mean() > 0.01
    torch.testing.assert_close(adapted, images(merged), rtol=0, atol=1e-4)


# ---- Runs to go on with --------------------------------------------------------------------------


def edit_state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / "checkpoint" / "state.pt"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def state_is(content: object) -> Callable[[Path], None]:
    return lambda run: torch.save(content, run / "checkpoint" / "state.pt")


def misshape(state: dict) -> None:
    state["unet"]["conv_in.bias"] = torch.zeros(3, 3)


def edit_config(**changes) -> Callable[[Path], None]:
    return lambda run: edit_json(run / "config.json", **changes)


CHANGED = "restore that, or choose a new --out"
RUNS = {
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoint"),
        "has no checkpoint to go on from",
    ),
    "cut checkpoint": (
        lambda run: os.truncate(run / "checkpoint/state.pt", 5000),
        "{run}/checkpoint/state.pt is damaged or cannot be read",
    ),
    "empty checkpoint": (
        lambda run: os.truncate(run / "checkpoint/state.pt", 0),
        "{run}/checkpoint/state.pt is damaged or cannot be read",
    ),
    "list": (state_is([1]), "{run}/checkpoint/state.pt is no checkpoint of a run"),
    "no keys": (state_is({}), "{run}/checkpoint/state.pt is no checkpoint of a run"),
    "no optimizer": (
        edit_state(lambda state: state.pop("optimizer")),
        "{run}/checkpoint/state.pt is no checkpoint of a run",
    ),
    "no epoch": (
        edit_state(lambda state: state.pop("epoch")),
        "{run}/checkpoint/state.pt is no checkpoint of a run",
    ),
    "shape of a weight": (edit_state(misshape), "its checkpoint has another shape of conv_in.bias"),
    "a weight less": (
        edit_state(lambda state: state["unet"].popitem()),
        "its checkpoint is of a network with other weights",
    ),
    "a moment less": (
        edit_state(lambda state: state["optimizer"]["state"].popitem()),
        "its checkpoint is of a network with other weights",
    ),
    "version": (
        edit_state(lambda state: state.update(version=0)),
        "its checkpoint is of version 0, and this is 3",
    ),
    "another run's": (
        edit_state(lambda state: state["record"].update(seed=5)),
        f"seed is 0, and was 5; {CHANGED}",
    ),
    "edited setting": (edit_config(kl_weight=1.0), f"kl_weight is 1.0, and was 3e-05; {CHANGED}"),
    "config lacks": (edit_config(seed=None), "its config.json: lacks 'seed'"),
    "config garbage": (
        lambda run: (run / "config.json").write_text("{"),
        "its config.json: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), RUNS.values(), ids=RUNS)
def test_damaged_run_is_refused_and_left_as_it_is(damage, sentence, run, cli):
    damage(run)
    before = contents(run)
    said = only_sentence(cli("--resume", run, "--epochs", 3))
    assert said == f"prdp.py: --resume {run}: {sentence.format(run=run)}."
    assert contents(run) == before


def test_run_without_prompts_is_refused(run, cli):
    edit_config(prompts=[])(run)
    assert only_sentence(cli("--resume", run)) == "prdp.py: prompts: holds no prompt."


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("prompts.txt", lambda text: text + b"a new one\n", "prompts"),
        ("mine.py", lambda text: text.replace(b"return ", b"return -"), "reward"),
        ("sd/" + WEIGHTS["vae"], lambda data: data[:-4] + b"\0\0\x80?", "model"),
    ],
)
@pytest.mark.parametrize("command", ["prdp.py", "evaluate.py"])
def test_inputs_that_changed_are_refused_by_name(command, file, change, what, world, run, capsys):
    argv = ["--resume", str(run), "--epochs", "3"]
    main, where = prdp.main, f"--resume {run}"
    if command == "evaluate.py":
        argv = [str(run), "--samples-per-prompt", "1"]
        main, where = evaluate.main, f"--out {run}/evaluation, choose another folder"
        main(argv)
    before, path = contents(run), world / file
    capsys.readouterr()
    original = path.read_bytes()
    path.write_bytes(change(original))
    try:
        with pytest.raises(SystemExit) as stop:
            main(argv)
    finally:
        path.write_bytes(original)
    said = only_sentence((stop.value.code, *capsys.readouterr()))
    if (command, what) == ("evaluate.py", "model"):
        expected = f"--out {run}/evaluation: holds rewards of another base; choose another."
    else:
        expected = f"{where}: the {what} changed since it began; {CHANGED}."
    assert said == f"{command}: {expected}"
    assert contents(run) == before


def test_moved_run_with_foreign_lines_and_files_goes_on_to_the_bit(
    world, run, cli, tmp_path, monkeypatch
):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    junk = ["", "{torn", "[1]", "3", '{"epoch": 1}', '{"epoch": "x"}']
    (run / "metrics.jsonl").write_text("\n".join([*junk, *lines, *junk, "\u00ff"]))
    for name in ("epoch_0001.json", "epoch_mine.json", "mine.json"):
        (run / "samples" / name).write_text('[{"rewards": ["a"]}]')
    (tmp_path / "elsewhere").mkdir()
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")

    again = ["--seed", 0, "--microbatch", 3, "--model", os.path.relpath(world / "sd")]
    code, out, err = cli("--resume", "../moved", "--epochs", 3, *again)
    assert code == 0, err
    assert "on-policy gap: 0.0e+00" in out
    prdp.main([*flags_of(world), "--epochs", "3", "--out", str(tmp_path / "straight")])

    def kept(run: Path) -> tuple[list, dict]:
        rows = report.read_metrics(run)
        timeless = [
            {name: x for name, x in row.items() if not name.startswith(("seconds", "images_per"))}
            for row in rows
        ]
        return timeless, report.read_state(run)["unet"]

    (rows, weights), (rows_straight, straight) = map(
        kept, (tmp_path / "moved", Path("../straight"))
    )
    assert rows == rows_straight
    assert all(torch.equal(weights[name], straight[name]) for name in straight)


def test_lost_metrics_cost_only_themselves(run, cli):
    (run / "metrics.jsonl").write_text("lost\n")
    code, _, err = cli("--resume", run, "--epochs", 4)
    assert code == 0, err
    assert [row["epoch"] for row in report.read_metrics(run)] == [3, 4]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", 1], "--seed 1: the run began with 0."),
        (["--clip-range", "inf"], "--clip-range inf: the run began with 0.001."),
        (["--epochs", 1], "--epochs 1: the run has done 2."),
        (["--out", "x"], "--out x: not with --resume, which goes on in {run}."),
    ],
)
def test_run_goes_on_under_its_own_settings(flags, sentence, run, cli):
    before = contents(run)
    assert only_sentence(cli("--resume", run, *flags)) == f"prdp.py: {sentence.format(run=run)}"
    assert contents(run) == before


def test_folder_is_used_again_only_after_a_start_that_failed(run, cli, tmp_path):
    failing = tmp_path / "failing.py"
    text = "calls = []\ndef f(images, prompts):\n    calls.append(1)\n    assert len(calls) != 2\n"
    failing.write_text(text + "    return [float(i) for i in range(len(images))]\n")
    said = only_sentence(cli("--reward", f"{failing}:f"))
    line = "AssertionError: (failing.py, line 4)"
    assert said == f"prdp.py: epoch 1, reward: reward f failed: {line}."
    assert (tmp_path / "run" / "checkpoint" / "state.pt").is_file()
    assert cli("--seed", 4, *ONE_EPOCH)[0] == 0

    for used in (run, tmp_path / "run", tmp_path):
        before = contents(used)
        assert "in use; choose another" in only_sentence(cli("--out", used))
        assert contents(used) == before
    shutil.rmtree(run / "pipeline")
    for name in ("metrics.jsonl", "reward.png", "before_after.png"):
        (run / name).unlink()  # but its checkpoint is of epoch 2
    assert "in use; choose another" in only_sentence(cli("--out", run))
    os.truncate(run / "checkpoint" / "state.pt", 100)  # nobody knows what it held
    assert "in use; choose another" in only_sentence(cli("--out", run))


# ---- Inputs --------------------------------------------------------------------------------------

FINITE = (
    "is not finite; try, in a new run, a lower --learning-rate or --guidance-scale, "
    "a higher --kl-weight, another --dtype"
)
INPUTS = {
    "30 digits": (["--seed", "1" * 30], f"--seed {'1' * 30}: too large"),
    "infinite": (["--kl-weight", "inf"], "--kl-weight inf: too large"),
    "nan": (["--learning-rate", "nan"], "--learning-rate nan: too small"),
    "absurd kl_weight": (["--kl-weight", "1e-300"], f"epoch 1, update: the loss {FINITE}"),
    "steps": (["--ddpm-steps", 600], "--ddpm-steps 600: no whole strides of 1000; 50 may do"),
    "one image": (
        ["--images-per-prompt", 1],
        "--loss prdp: compares images of a prompt; --images-per-prompt must be 2 or more",
    ),
    "large": (
        ["--prompts", prdp.PROMPTS + "hpdv2_train.json"],
        f"--prompts {prdp.PROMPTS}hpdv2_train.json (the README tells how to get the large sets): "
        "No such file or directory",
    ),
    "prompts csv": (
        ["--prompts", "x.csv"],
        "--prompts {folder}/x.csv: must be .txt, .json or .jsonl, and hold a list of prompts",
    ),
    "surrogate": (
        ["--prompts", "half.json"],
        "--prompts {folder}/half.json: holds half a surrogate pair, which is no character",
    ),
    "numbers": (
        ["--prompts", "numbers.json"],
        "--prompts {folder}/numbers.json: entry 1 is neither a string nor has a prompt",
    ),
    "nothing": (["--prompts", "empty.txt"], "--prompts {folder}/empty.txt: holds no prompt"),
    "file": (
        ["--out", "empty.txt"],
        "--out empty.txt: in use; choose another, or go on with --resume empty.txt",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), INPUTS.values(), ids=INPUTS)
def test_input_is_refused(flags, sentence, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"x.csv": "a", "half.json": '["a", "\\ud800"]', "numbers.json": "[1]", "empty.txt": ""}
    for name, text in texts.items():
        Path(name).write_text(text)
    expected = sentence.format(folder=tmp_path)
    assert only_sentence(cli(*flags)) == f"prdp.py: {expected}."


def test_out_of_memory_is_one_sentence(cli, monkeypatch):
    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 TB")

    monkeypatch.setattr(prdp, "sample_trajectories", exhausted)
    mend = "try a smaller --microbatch or --prompts-per-epoch"
    assert only_sentence(cli()) == f"prdp.py: out of memory: {mend}."


def test_many_prompts_take_seconds(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(json.dumps([f"a cat number {n}" for n in range(800_000)]))
    started = time.perf_counter()
    assert len(prdp.load_prompts(path)) == 800_000
    assert time.perf_counter() - started < 30  # it took 166


def test_constant_reward_is_warned_of_and_nan_is_null(cli, tmp_path):
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return [1.0] * len(images)\n")
    single = ["--loss", "ddpo-sf", "--prompts-per-epoch", 1, "--images-per-prompt", 1]
    flags = ["--reward", f"{tmp_path}/mine.py:f", *ONE_EPOCH]
    code, out, err = cli(*flags, "--max-grad-norm", "inf")
    assert code == 0, err
    assert "warning: every image has the same reward" in out

    code, out, err = cli(*flags, *single, "--out", tmp_path / "single", "--seed", 2**40 - 1)
    assert code == 0, err
    assert "warning" not in out + err
    line = (tmp_path / "single" / "metrics.jsonl").read_text()
    assert "NaN" not in line and json.loads(line)["reward_std"] is None


def test_estimate_comes_before_the_first_epoch(cli):
    _, out, _ = cli(*ONE_EPOCH)
    lines = out.splitlines()
    estimate = next(n for n, line in enumerate(lines) if "to sample an image" in line)
    assert estimate < next(n for n, line in enumerate(lines) if "reward_mean" in line)


def test_long_phases_say_that_they_are_over(monkeypatch, capsys):
    now = iter([0.0, 9.0, 100.0, 4000.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    timed = report.Stopwatch("epoch 3")
    for _ in range(2):
        with timed("sample"):
            pass
    assert capsys.readouterr().out == "epoch 3, sample: 65 min\n"
    assert timed.seconds == {"sample": 3909.0}


# ---- A full disk, a closed terminal --------------------------------------------------------------


@contextlib.contextmanager
def small_files(size: int):
    """The system refuses to write files beyond `size` bytes: so a full disk needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("function", "file"),
    [
        ("save_state", "checkpoint/state.pt"),
        ("write_metrics", "metrics.jsonl"),
        ("save_grid", "samples/epoch_0003.png"),
        ("save_pipeline", "pipeline"),
    ],
)
def test_what_cannot_be_written_leaves_what_was(function, file, run, cli, monkeypatch):
    writes = getattr(report, function)
    before = contents(run)

    def on_full_disk(*arguments):
        if function == "write_metrics" and len(arguments[1]) < 3:
            return writes(*arguments)  # of the epochs before
        if function == "save_grid" and arguments[1] < 3:
            return writes(*arguments)
        with small_files(100):
            return writes(*arguments)

    monkeypatch.setattr(report, function, on_full_disk)
    said = only_sentence(cli("--resume", run, "--epochs", 3))
    assert said.startswith(f"prdp.py: {run / file}: ")
    assert said.endswith("; what was saved before is intact.")
    after = contents(run)
    assert not [name for name in after if ".tmp" in name]
    assert before.keys() <= after.keys()
    finished = [name for name in before if name.startswith(("pipeline", "checkpoint"))]
    written = function in ("save_grid", "save_pipeline")  # the checkpoint of epoch 3 is
    assert [name for name in finished if after[name] != before[name]] == (
        ["checkpoint/state.pt"] if written else []
    )
    monkeypatch.undo()
    assert cli("--resume", run)[0] == 0
    assert [row["epoch"] for row in report.read_metrics(run)] == [1, 2, 3]


def test_folder_that_cannot_be_made(cli, monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    said = only_sentence(cli())
    where = tmp_path / "run" / "config.json"
    assert said == f"prdp.py: {where}: Permission denied; what was saved before is intact."


def test_full_disk(cli, tmp_path):
    """A file system with room for what a run writes at first, and not for its checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        said = only_sentence(cli("--out", disk / "run"))
        reason = "No space left on device; what was saved before is intact"
        assert said == f"prdp.py: {disk}/run/checkpoint/state.pt: {reason}."
        assert not [name for name in contents(disk) if ".tmp" in name]
        assert len(report.read_metrics(disk / "run")) == 1
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        code, _, err = cli("--resume", disk / "run")
        assert code == 0, err
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ascii_terminal(world, tmp_path):
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    plain["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(ROOT / "prdp.py"), *flags_of(world), *ONE_EPOCH]
    command += ["--out", "f\u00fcnf"]
    done = subprocess.run(command, env=plain, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "f\u00fcnf" / "pipeline").is_dir()


def test_reader_that_leaves():
    """As in `python prdp.py ... | head -1`."""
    code = "import rewards\nwith rewards.command('x'):\n    while True: print('line', flush=True)"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], **options) as writer:
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 2


# ---- Evaluations and the library -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "is of another form (TypeError: list indices must be integers or slices, not str)"),
        ("{}", "lacks 'settings'"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_foreign_evaluation_is_refused(text, sentence, run, capsys):
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run)])
    said = only_sentence((stop.value.code, *capsys.readouterr()))
    assert said == f"evaluate.py: --out {run}/evaluation, choose another folder: {sentence}."


def test_stopped_evaluation_goes_on(run, monkeypatch, tmp_path):
    draws, draw = [], evaluate.draw

    def stops(*arguments):
        draws.append(arguments)
        if len(draws) == 5:
            raise KeyboardInterrupt
        return draw(*arguments)

    argv = [str(run), "--samples-per-prompt", "3"]
    evaluate.main([*argv, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(evaluate, "draw", stops)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, "--out", str(tmp_path / "stopped")])
    assert stop.value.code == 130
    evaluate.main([*argv, "--out", str(tmp_path / "stopped")])
    # Each of two models draws a chunk for each of three prompts, and one more for the pictures;
    # those of the base were done, and its pictures are drawn again.
    assert len(draws) == 5 + 1 + 4
    whole, stopped = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in
                      ("whole", "stopped"))  # fmt: skip
    assert whole == stopped


def test_library(world, tmp_path):
    def redness(images, prompts):
        return images[:, 0].float().mean((1, 2))

    argv = [*flags_of(world), *ONE_EPOCH, "--out", str(tmp_path / "run")]
    prompts = ["a red circle", "a green star"]
    prdp.run(prdp.parse_args(argv), reward=redness, prompts=prompts)
    config = prdp.parse_args(["--resume", str(tmp_path / "run"), "--epochs", "2"])
    for changed in (["a red circle"], None):
        with pytest.raises(prdp.InputError, match="prompt"):
            prdp.run(config, reward=redness, prompts=changed)
    prdp.run(config, reward=redness, prompts=prompts)
    rows = report.read_metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2] and "reward_mean/redness" in rows[0]
    with pytest.raises(prdp.InputError, match="entry 1 is neither"):
        prdp.run(prdp.parse_args(argv), reward=redness, prompts=[3])
    with pytest.raises(prdp.InputError, match="no reward ''"):
        prdp.run(config, prompts=prompts)
