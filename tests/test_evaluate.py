"""evaluate.py: whose pictures it scores, its table, and that it ends the same however it went."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import evaluate
import prdp
from conftest import ROOT, call, edit_json, only_sentence, script, small_run
from support.cli import InputError


@pytest.fixture(scope="module")
def finished(tiny_sd, tmp_path_factory) -> Path:
    """A run that moved the tiny model; p.txt and q.txt beside it hold 3 and 2 prompts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "p.txt").write_text("a red star\na blue ring\na green cross\n")
    (folder / "q.txt").write_text("a white square\na black circle\n")
    flags = [*small_run(tiny_sd), "--learning-rate", "1e-3", "--out", folder / "run"]
    torch.set_num_threads(1)
    prdp.main([str(flag) for flag in flags])
    return folder / "run"


@pytest.fixture
def evaluation(finished, tmp_path, capsys):
    """evaluation(models, *flags): exit code, stdout, stderr of evaluate.py, in this process.

    Of 2 images of each prompt of p.txt, into tmp_path / "out", but for what `flags` say.
    """
    small = ["--prompts", finished.parent / "p.txt", "--samples-per-prompt", 2]
    small += ["--out", tmp_path / "out"]

    def run(models: object, *flags: object) -> tuple[int, str, str]:
        models = models if isinstance(models, list) else [models]
        return call(evaluate.main, [*models, *small, *flags], capsys)

    return run


def record_in(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def kilobytes(picture) -> float:
    picture.save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.tell() / 1000


def test_scores_are_of_the_pipelines_own_pictures(evaluation, finished, tiny_sd, tmp_path):
    """Every reward is that of the picture diffusers' own pipeline draws from the same noise, for
    base and finetuned model."""
    code, _, errors = evaluation(finished, "--samples-per-prompt", 4)
    assert (code, errors) == (0, "")
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 10_000
    (of_file,) = record_in(tmp_path / "out")["rewards"].values()
    assert list(of_file) == ["base", "run"]
    for label, folder in (("base", tiny_sd), ("run", finished / "pipeline")):
        pipe = StableDiffusionPipeline.from_pretrained(finished / "pipeline")  # for its scheduler
        pipe.unet = StableDiffusionPipeline.from_pretrained(folder).unet
        pipe.set_progress_bar_config(disable=True)
        for n, prompt in enumerate(prdp.load_prompts(finished.parent / "p.txt")):
            generators = prdp.image_generators(3, 0, [n], 4)
            x_T = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
            pictures = pipe(
                [prompt] * 4, num_inference_steps=3, guidance_scale=5.0, eta=1.0, latents=x_T,
                generator=generators, height=16, width=16,
            ).images  # fmt: skip
            expected = [kilobytes(picture) for picture in pictures]
            rewards = of_file[label][prompt]["incompressibility"]
            assert rewards == pytest.approx(expected, abs=0.02)  # a grey level, rarely


def test_table_is_numpys(evaluation, finished, tmp_path):
    """Of several files, rewards and models; and it is printed."""
    other = shutil.copytree(finished, tmp_path / "other")
    flags = ["--reward", "incompressibility=3", "compressibility"]
    flags += ["--prompts", *(finished.parent / f"{name}.txt" for name in "pq")]
    code, out, errors = evaluation([finished, other], *flags)
    assert (code, errors) == (0, "")
    record = record_in(tmp_path / "out")
    labels, names = ("base", "run", "other"), ("incompressibility", "compressibility", "sum")
    rows = {(row["prompts"], row["reward"], row["model"]): row for row in record["table"]}
    assert len(rows) == len(record["table"]) == 2 * len(names) * len(labels)
    for file, of_file in record["rewards"].items():
        for name in names:
            x = {m: np.array([by[name] for by in of_file[m].values()]) for m in labels}
            assert np.abs(x["run"] - x["base"]).max() > 0
            for label in labels:
                row = rows[Path(file).name, name, label]
                assert row["images"] == x[label].size
                assert row["mean"] == pytest.approx(x[label].mean(), rel=1e-6)
                by_prompt = x[label].mean(1)
                error = by_prompt.std(ddof=1) / len(by_prompt) ** 0.5
                assert row["standard_error"] == pytest.approx(error, rel=1e-4)
                assert f"{row['mean']:.4f} +- {row['standard_error']:.4f}" in out
                if label != "base":
                    rise = x[label] - x["base"]
                    size = np.abs(x["base"]).max()
                    assert row["difference"] == pytest.approx(rise.mean(), abs=1e-6 * size)
                    error = rise.mean(1).std(ddof=1) / len(rise) ** 0.5
                    assert row["difference_error"] == pytest.approx(error, abs=1e-6 * size)
                    wins = np.mean((rise > 0) + 0.5 * (rise == 0))
                    assert row["win_rate"] == pytest.approx(wins, abs=1e-6)
        assert of_file["run"] == of_file["other"]  # the same model under another name
        for by in of_file["run"].values():
            total = 3 * np.array(by["incompressibility"]) + np.array(by["compressibility"])
            assert by["sum"] == pytest.approx(total, rel=1e-6)


def test_model_alone_and_against_itself(evaluation, tiny_sd, tmp_path):
    """No run is needed. Against itself the difference is nothing, and half the pairs are won."""
    flags = [tiny_sd, "--reward", "compressibility", "--ddpm-steps", 3, "--guidance-scale", 1]
    assert evaluation(*flags, "--out", tmp_path / "alone")[0] == 0
    (alone,) = record_in(tmp_path / "alone")["table"]
    assert "difference" not in alone
    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    assert evaluation(*flags, "--against", copy)[0] == 0
    base, row = record_in(tmp_path / "out")["table"]
    assert row["model"] == alone["model"]
    assert row["mean"] == base["mean"] == alone["mean"]
    assert (row["difference"], row["difference_error"], row["win_rate"]) == (0, 0, 0.5)


def test_goes_on_where_it_was_stopped(evaluation, finished, tmp_path, monkeypatch):
    """Ctrl-C at the third chunk, twice: what was drawn is not drawn again, and the end is that of
    one go, to the bit."""
    draw, drawn, limit = evaluate.draw, [], [math.inf]

    def counted(*arguments):
        drawn.append(arguments)
        if len(drawn) == limit[0]:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(evaluate, "draw", counted)
    assert evaluation(finished, "--microbatch", 2)[0] == 0
    in_one_go, codes, calls = len(drawn), [], []
    for limit[0] in (3, 3, math.inf):
        drawn.clear()
        parts = ["--out", tmp_path / "parts"]
        codes.append(evaluation(finished, "--microbatch", 2, *parts)[0])
        calls.append(len(drawn))
    assert codes == [130, 130, 0]
    assert sum(calls) <= in_one_go + 3  # the two interrupted ones, and pictures to show
    whole, parts = (record_in(tmp_path / name) for name in ("out", "parts"))
    assert whole["rewards"] == parts["rewards"]
    assert whole["table"] == parts["table"]


def test_two_processes_equal_one(evaluation, finished, tmp_path):
    """To the bit, of an odd number of chunks."""
    flags = ["--prompts", finished.parent / "p.txt", "--samples-per-prompt", 2, "--microbatch", 2]
    assert evaluation(finished, *flags)[0] == 0
    arguments = [ROOT / "evaluate.py", finished, *flags, "--out", tmp_path / "two"]
    code, out, errors = script(*arguments, processes=2)
    assert code == 0, errors
    assert out.count("see ") == 1  # rank 0 alone prints
    one, two = record_in(tmp_path / "out"), record_in(tmp_path / "two")
    assert one["rewards"] == two["rewards"]
    assert one["table"] == two["table"]


def test_max_prompts(evaluation, finished, tmp_path):
    """Drawn by the seed; the images of a prompt are those of an evaluation of all."""
    assert evaluation(finished)[0] == 0
    (everything,) = record_in(tmp_path / "out")["rewards"].values()
    chosen = set()
    for seed in range(3, 9):
        flags = ["--max-prompts", 2, "--seed", seed, "--out", tmp_path / str(seed)]
        assert evaluation(finished, *flags)[0] == 0
        (some,) = record_in(tmp_path / str(seed))["rewards"].values()
        assert len(some["run"]) == 2
        chosen.add(tuple(some["run"]))
        if seed == 3:  # the run's own, as above
            for prompt, rewards in some["run"].items():
                expected = everything["run"][prompt]["incompressibility"]
                assert rewards["incompressibility"] == pytest.approx(expected, abs=0.02)
    assert len(chosen) > 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", 9], "seed"),
        (["--guidance-scale", 2], "guidance_scale"),
        (["--reward", "compressibility"], "reward"),
        (["--samples-per-prompt", 4], "samples_per_prompt"),
        (["--max-prompts", 1], "max_prompts"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(evaluation, finished, flags, sentence):
    """By name, and what was measured stays. One prompt, for speed."""
    few = ["--prompts", finished.parent / "q.txt", "--ddpm-steps", 2]
    assert evaluation(finished, *few)[0] == 0
    code, _, errors = evaluation(finished, *few, *flags)
    assert code == 2
    assert errors.startswith("evaluate.py: ")
    assert errors.count("\n") == 1
    assert sentence in errors


def test_another_model_or_reward_of_the_same_name_is_refused(evaluation, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    reward = tmp_path / "r.py"
    reward.write_text("def f(images, prompts):\n    return [1.0] * len(prompts)\n")
    flags = [run, "--reward", f"{reward}:f"]
    assert evaluation(*flags)[0] == 0
    before = (tmp_path / "out" / "evaluation.json").read_bytes()

    reward.write_text("def f(images, prompts):\n    return [2.0] * len(prompts)\n")
    code, _, errors = evaluation(*flags)
    assert code == 2
    assert "reward" in errors
    reward.write_text("def f(images, prompts):\n    return [1.0] * len(prompts)\n")

    unet = StableDiffusionPipeline.from_pretrained(run / "pipeline").unet
    with torch.no_grad():
        unet.conv_in.weight += 1e-3
    unet.save_pretrained(run / "pipeline" / "unet")
    code, _, errors = evaluation(*flags)
    assert code == 2
    assert "run: the model changed since it began" in errors
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before


def test_bad_input_is_one_sentence(evaluation, finished, tmp_path):
    young, python, people = (tmp_path / name for name in ("young", "python", "people"))
    for folder in (young, python, people):
        folder.mkdir()
        shutil.copy(finished / "config.json", folder)
    shutil.copy(finished / "metrics.jsonl", young)
    edit_json(python / "config.json", reward=[], prompts=[])
    edit_json(people / "config.json", reward=[], prompts=[], pairs="/pairs.jsonl")
    for folder in (python, people):
        shutil.copytree(finished / "pipeline", folder / "pipeline")
    (tmp_path / "one.txt").write_text("a red star\n")
    cases = [
        ([young], f"python prdp.py --resume {young} --epochs 2 makes that of 2"),
        ([tmp_path, "--reward", "compressibility"], f"--model {tmp_path}: "),
        ([finished, "--samples-per-prompt", 0], "--samples-per-prompt 0"),
        ([finished, "--samples-per-prompt", 1, "--max-prompts", 1], "--samples-per-prompt 1"),
        ([finished, "--learning-rate", 1], "unrecognized arguments: --learning-rate"),
        ([python], "began from Python: give --prompts and --reward"),
        ([people], "began with --pairs: give --prompts and --reward"),
    ]
    for flags, sentence in cases:
        said = only_sentence(evaluation(*flags))
        assert said.startswith("evaluate.py: ")
        assert sentence in said
    assert not (tmp_path / "out").exists()
    code, _, errors = evaluation(python, "--reward", "compressibility")
    assert code == 0, errors


def test_damaged_record_is_refused(evaluation, finished, tmp_path):
    (tmp_path / "out").mkdir()
    for content in ("[]", '{"settings"', "{}"):
        (tmp_path / "out" / "evaluation.json").write_text(content)
        only_sentence(evaluation(finished))
        assert (tmp_path / "out" / "evaluation.json").read_text() == content


def test_a_pipeline_of_an_earlier_epoch_is_refused(evaluation, finished, tmp_path):
    """Of a run that went on and was stopped: its pipeline is not what it has learned."""
    run = shutil.copytree(finished, tmp_path / "run")
    edit_json(run / "pipeline" / "prdp.json", epoch=1)
    said = only_sentence(evaluation(run))
    assert f"or of epoch 1; python prdp.py --resume {run} --epochs 2 makes that of 2" in said


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["base"], ["pretrained", "base"]),
        (["a/run", "b/run"], ["base", "a/run", "b/run"]),
        (["a/run", "b/base"], ["pretrained", "run", "base"]),
        (["a/base", "b/pretrained"], [None, "base", "pretrained"]),
    ],
)
def test_every_model_that_is_named_is_in_the_table(
    evaluation, finished, tmp_path, monkeypatch, names, labels
):
    """Whatever runs are called; --against takes a run too."""
    monkeypatch.chdir(tmp_path)
    for name in names:
        shutil.copytree(finished, tmp_path / name)
    assert evaluation(names)[0] == 0
    table = record_in(tmp_path / "out")["table"]
    (base, *_) = labels = [
        label or json.loads((tmp_path / names[0] / "config.json").read_text())["model"]
        for label in labels
    ]
    assert [row["model"] for row in table] == labels and base
    assert ["difference" in row for row in table] == [False] + [True] * len(names)
    code, _, errors = evaluation(names, "--against", finished, "--out", "other")
    assert code == 0, errors
    (first, *_) = record_in(tmp_path / "other")["table"]
    assert first["mean"] == table[1]["mean"]


def test_it_says_what_it_does(evaluation, finished):
    """A plan and a forecast, a line for each model and file."""
    _, out, _ = evaluation(finished)
    assert "base: 3 prompts of p.txt, 2 images each\n  takes about " in out
    assert "run: 3 prompts of p.txt, 2 images each\n  takes about " in out


@pytest.mark.parametrize(
    ("flags", "dtype", "compiles"),
    [([], "bf16", False), (["--dtype", "fp32", "--compile"], "fp32", True)],
)
def test_on_a_gpu_it_computes_in_bf16_unless_asked(
    evaluation, finished, monkeypatch, flags, dtype, compiles
):
    """The run itself was in fp32."""
    seen = []

    def load_models(config, *rest, **options):
        seen.append(config)
        raise InputError("seen")

    monkeypatch.setattr(prdp, "load_models", load_models)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert only_sentence(evaluation(finished, *flags)) == "evaluate.py: seen"
    assert (seen[0].dtype, seen[0].compile) == (dtype, compiles)


def test_prompt_files_of_one_name_are_told_apart(evaluation, finished, tmp_path):
    files = [tmp_path / folder / "p.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"a red circle {file.parent.name}\na ring\n")
    assert evaluation(finished, "--prompts", *files)[0] == 0
    assert {row["prompts"] for row in record_in(tmp_path / "out")["table"]} == {*map(str, files)}
