"""evaluate.py: whose pictures it scores, its table, and that it ends the same however it went."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import StableDiffusionPipeline

import evaluate
import prdp
from conftest import PROMPTS, ROOT, call, edit_json, only_sentence, override, script, small_run
from support import run_folder
from support.cli import UserError


@pytest.fixture(scope="module")
def finished(tiny_sd, tmp_path_factory) -> Path:
    """A run that moved the tiny model and kept each epoch's; p.txt and q.txt beside it hold 3 and 2
    prompts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "p.txt").write_text("a red star\na blue ring\na green cross\n")
    (folder / "q.txt").write_text("a white square\na black circle\n")
    flags = [*small_run(tiny_sd), "--learning-rate", "1e-3", "--keep-every", "1"]
    flags += ["--out", folder / "run"]
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
        return call(evaluate.main, [*models, *override(small, flags)], capsys)

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
    (of_file,) = record_in(tmp_path / "out")["rewards"]["policy"].values()
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
    labels = ("base", "run", "other")
    names = ("incompressibility", "compressibility", "weighted sum")
    rows = {(row["prompts"], row["reward"], row["model"]): row for row in record["table"]["policy"]}
    assert len(rows) == len(record["table"]["policy"]) == 2 * len(names) * len(labels)
    for file, of_file in record["rewards"]["policy"].items():
        for name in names:
            x = {m: np.array([by[name] for by in of_file[m].values()]) for m in labels}
            assert np.abs(x["run"] - x["base"]).max() > 0
            for label in labels:
                row = rows[Path(file).name, name, label]
                assert row["images"] == x[label].size
                assert row["mean"] == pytest.approx(x[label].mean(), rel=1e-13)
                by_prompt = x[label].mean(1)
                error = by_prompt.std(ddof=1) / len(by_prompt) ** 0.5
                assert row["standard_error"] == pytest.approx(error, rel=1e-9)
                assert f"{row['mean']:.5g} +- {row['standard_error']:.2g}" in out
                if label != "base":
                    rise = x[label] - x["base"]
                    size = np.abs(x["base"]).max()
                    assert row["difference"] == pytest.approx(rise.mean(), abs=1e-13 * size)
                    error = rise.mean(1).std(ddof=1) / len(rise) ** 0.5
                    assert row["difference_error"] == pytest.approx(error, abs=1e-13 * size)
                    wins = np.mean((rise > 0) + 0.5 * (rise == 0))
                    assert row["win_rate"] == pytest.approx(wins, abs=1e-6)
        assert of_file["run"] == of_file["other"]  # the same model under another name
        for by in of_file["run"].values():
            total = 3 * np.array(by["incompressibility"]) + np.array(by["compressibility"])
            assert by["weighted sum"] == pytest.approx(total, rel=1e-6)


def test_model_alone_and_against_itself(evaluation, tiny_sd, tmp_path):
    """No run is needed. Against itself the difference is nothing, and half the pairs are won."""
    flags = [tiny_sd, "--reward", "compressibility", "--ddpm-steps", 3, "--guidance-scale", 1]
    assert evaluation(*flags, "--out", tmp_path / "alone")[0] == 0
    (alone,) = record_in(tmp_path / "alone")["table"]["policy"]
    assert "difference" not in alone
    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    assert evaluation(*flags, "--against", copy)[0] == 0
    base, row = record_in(tmp_path / "out")["table"]["policy"]
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
    assert whole["table"]["policy"] == parts["table"]["policy"]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 3)])
def test_goes_on_with_another_microbatch(
    evaluation, finished, tmp_path, monkeypatch, before, after
):
    """As on another card: what is missing is found by prompt; what is there is kept, and said."""
    names = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "ring", "x")]
    (tmp_path / "six.txt").write_text("\n".join(names))
    six = ["--prompts", tmp_path / "six.txt"]
    draw, drawn = evaluate.draw, []

    def counted(plan, models, sampler, chosen, images):
        if drawn.count("stop"):
            raise KeyboardInterrupt
        drawn.extend(chosen)
        if len(drawn) > 1:
            drawn.append("stop")
        return draw(plan, models, sampler, chosen, images)

    monkeypatch.setattr(evaluate, "draw", counted)
    assert evaluation(finished, *six, "--microbatch", before)[0] == 130
    kept = drawn[:-1]
    drawn.clear()
    monkeypatch.setattr(evaluate, "draw", lambda *x: drawn.extend(x[3]) or draw(*x))
    code, out, errors = evaluation(finished, *six, "--microbatch", after)
    assert (code, errors) == (0, "")
    assert f", six.txt: {6 - len(kept)} of 6 prompts to draw" in out
    assert drawn[: 6 - len(kept)] == names[len(kept) :]
    for by_prompt in next(iter(record_in(tmp_path / "out")["rewards"]["policy"].values())).values():
        assert sorted(by_prompt) == sorted(names)


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
    (everything,) = record_in(tmp_path / "out")["rewards"]["policy"].values()
    chosen = set()
    for seed in range(3, 9):
        flags = ["--max-prompts", 2, "--seed", seed, "--out", tmp_path / str(seed)]
        assert evaluation(finished, *flags)[0] == 0
        (some,) = record_in(tmp_path / str(seed))["rewards"]["policy"].values()
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
    """By name, and what was measured stays."""
    few = ["--prompts", finished.parent / "q.txt"]
    assert evaluation(finished, *few)[0] == 0
    code, _, errors = evaluation(finished, *few, *flags)
    assert code == 2
    assert errors.startswith("evaluate.py: ")
    assert errors.count("\n") == 1
    assert sentence in errors


def test_prompts_in_another_place_are_refused(evaluation, finished, tmp_path):
    """A prompt's place in its file decides its noise."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for cut in (2, 1):
        for file, prompts in zip(files, (PROMPTS[:cut], PROMPTS[cut:]), strict=True):
            file.write_text("\n".join(prompts))
        result = evaluation(finished, "--prompts", *files)
        if cut == 2:
            assert result[0] == 0
    assert "the prompts changed since it began" in only_sentence(result)


def test_another_model_or_reward_of_the_same_name_is_refused(
    evaluation, finished, tmp_path, monkeypatch
):
    """One table, one reward; what a file holds is looked at before a model is loaded."""
    run = shutil.copytree(finished, tmp_path / "run")
    reward = tmp_path / "r.py"
    reward.write_text("def f(images, prompts):\n    return [1.0] * len(prompts)\n")
    flags = [run, "--reward", f"{reward}:f"]
    assert evaluation(*flags)[0] == 0
    before = (tmp_path / "out" / "evaluation.json").read_bytes()

    reward.write_text("def f(images, prompts):\n    return [2.0] * len(prompts)\n")
    with monkeypatch.context() as patched:
        patched.setattr(prdp, "load_models", None)
        said = only_sentence(evaluation(*flags))
    assert "the reward changed since it began" in said
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
    (young / "metrics.jsonl").write_text('{"epoch": 2}\n')  # the first epoch's is lost
    edit_json(python / "config.json", reward=[], prompts=[])
    edit_json(people / "config.json", reward=[], prompts=[], pairs="/pairs.jsonl")
    for folder in (python, people):
        shutil.copytree(finished / "pipeline", folder / "pipeline")
    (tmp_path / "none.py").write_text("raise ImportError('the model is looked at first')")
    cases = [
        (["missing", "--reward", tmp_path / "none.py:f"], "model missing: is no folder"),
        ([young], f"{young}: has no pipeline/ of epoch 2; when it has ended, python prdp.py"),
        ([young], f"--resume {young} --epochs 2 makes it."),
        ([tmp_path, "--reward", "compressibility"], f"model {tmp_path}: "),
        (["missing", "--reward", "compressibility"], "model missing: is no folder"),
        (["mis/sing/er", "--reward", "compressibility"], "model mis/sing/er: is no folder"),
        (["mis/sing", "--reward", "compressibility"], "model mis/sing: "),
        (["./mis/sing/", "--reward", "compressibility"], "is no folder"),
        ([tmp_path / "missing", "--reward", "compressibility"], "is no folder"),
        ([finished, "--against", "missing"], "model missing: is no folder"),
        ([finished / "epochs" / "0009"], "0009: has no pipeline/"),
        ([finished, "--samples-per-prompt", 0], "--samples-per-prompt and --max-prompts: must be"),
        ([finished, "--max-prompts", 0], "--samples-per-prompt and --max-prompts: must be"),
        ([finished, "--learning-rate", 1], "unrecognized arguments: --learning-rate"),
        ([python], "began without files or reward: give --prompts and --reward"),
        ([people], "began without files or reward: give --prompts and --reward"),
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
    assert f"{run}: has no pipeline/ of epoch 2; when it has ended, python prdp.py" in said


def test_epochs_that_a_run_kept(evaluation, finished, tmp_path):
    """They are the run's, with its prompts, its reward and what it began from."""
    run = shutil.copytree(finished, tmp_path / "run")
    epochs = [run / "epochs" / name for name in ("0001", "0002")]
    code, _, errors = evaluation(epochs, "--reward", "incompressibility")
    assert (code, errors) == (0, "")
    base, first, last = record_in(tmp_path / "out")["table"]["policy"]
    assert [row["model"] for row in (base, first, last)] == ["base", "0001", "0002"]
    assert base["mean"] != first["mean"] != last["mean"]
    code, out, _ = evaluation(epochs[::-1], "--reward", "incompressibility")
    assert code == 0 and out.count(": 0 of 3 prompts to draw") == 3
    assert evaluation(run, "--out", tmp_path / "other")[0] == 0
    whole = record_in(tmp_path / "other")["table"]["policy"]
    assert [row["mean"] for row in whole] == [base["mean"], last["mean"]]

    shutil.move(epochs[0] / "pipeline", epochs[0] / "lora")
    assert "has no pipeline/; of adapters: docs/running.md#adapters-alone" in only_sentence(
        evaluation(epochs[0])
    )


def test_default_folder_is_of_an_epoch(finished, tmp_path, capsys):
    """So that a run that went on, or its epochs, can be evaluated again."""
    run = shutil.copytree(finished, tmp_path / "run")
    few = ["--prompts", finished.parent / "q.txt", "--samples-per-prompt", 1]
    for model, epoch in ((run / "epochs" / "0001", "0001"), (run, "0002")):
        code, out, errors = call(evaluate.main, [model, *few], capsys)
        assert (code, errors) == (0, "")
        assert f"see {run / 'evaluation' / epoch / 'evaluation.png'}" in out
    call(prdp.main, ["--resume", run, "--epochs", 3], capsys)
    assert call(evaluate.main, [run, *few], capsys)[::2] == (0, "")
    assert {path.name for path in (run / "evaluation").iterdir()} == {"0001", "0002", "0003"}


def test_a_reward_that_fails_ends_it_before_models_are_loaded(
    evaluation, finished, tmp_path, monkeypatch
):
    """It is tried on a picture of the model's size, with a prompt of the file."""
    reward = tmp_path / "r.py"
    reward.write_text(
        "def f(images, prompts):\n"
        "    assert images.shape == (1, 3, 16, 16) and prompts[0] in 'a red star, a blue ring'\n"
        "    raise ValueError('a mistake of mine')\n"
    )
    monkeypatch.setattr(prdp, "load_models", None)
    code, _, errors = evaluation(finished, "--reward", f"{reward}:f")
    assert code == 2 and "evaluate.py: reward f failed: ValueError: a mistake of mine." in errors
    assert not (tmp_path / "out").exists()


def test_single_image_has_no_error(evaluation, finished, tmp_path):
    """Neither printed nor in the file, which is strict JSON."""
    code, out, errors = evaluation(finished, "--samples-per-prompt", 1, "--max-prompts", 1)
    assert (code, errors) == (0, "")
    rows = out.split("\n\n", 1)[1].split("\n", 2)[2]
    assert "+-" not in rows and "nan" not in out
    base, row = record_in(tmp_path / "out")["table"]["policy"]
    assert base["standard_error"] is row["standard_error"] is row["difference_error"] is None
    assert row["difference"] == pytest.approx(row["mean"] - base["mean"], abs=1e-5)


def test_table_has_at_most_80_columns(evaluation, finished, tmp_path):
    """Whatever models, files and numbers there are."""
    long = shutil.copytree(finished, tmp_path / ("a_name_of_many_letters" * 3))
    file = tmp_path / ("prompts_of_many_letters" * 3 + ".txt")
    file.write_text("a red star\na blue ring\n")
    (tmp_path / "r.py").write_text(
        "def f(images, prompts):\n"
        "    return [-1.2345678e-11 * (1 + x.float().mean().item()) for x in images]\n\n"
        "def g(images, prompts):\n"
        "    return [1.2345678e11 + 1e9 * x.float().mean().item() for x in images]\n"
    )
    words = [f"{tmp_path}/r.py:{name}" for name in "fg"]
    code, out, errors = evaluation(long, "--prompts", file, "--reward", *words)
    assert (code, errors) == (0, "")
    table = out.split("\n\n", 1)[1].split("see ")[0]
    assert table.count(f"\n  {long.name}\n") == 3  # whole: others may end alike
    assert table.count("wins") == 3 and "e+1" in table and "e-1" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["base"], ["pretrained base", "base"]),
        (["a/run", "b/run"], ["base", "a/run", "b/run"]),
        (["a/run", "b/base"], ["pretrained base", "run", "base"]),
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
    table = record_in(tmp_path / "out")["table"]["policy"]
    assert [row["model"] for row in table] == labels
    assert ["difference" in row for row in table] == [False] + [True] * len(names)
    code, _, errors = evaluation(names, "--against", finished, "--out", "other")
    assert code == 0, errors
    (first, *_) = record_in(tmp_path / "other")["table"]["policy"]
    assert first["mean"] == table[1]["mean"]


def test_it_says_what_it_does(evaluation, finished):
    """A line for each model and file, and what is kept is not drawn."""
    _, out, _ = evaluation(finished)
    assert "base, policy, p.txt: 3 of 3 prompts to draw\n" in out
    assert "run, policy, p.txt: 3 of 3 prompts to draw\n" in out
    assert evaluation(finished)[1].count(", p.txt: 0 of 3 prompts to draw") == 2


@pytest.mark.parametrize(
    ("run", "flags", "native", "dtype"),
    [
        (True, [], True, "fp32"),
        (True, ["--dtype", "bf16"], True, "bf16"),
        (False, [], True, "bf16"),
        (False, [], False, "fp16"),
    ],
)
def test_it_computes_in_the_runs_format(
    evaluation, finished, tiny_sd, monkeypatch, run, flags, native, dtype
):
    """Without a run in bf16 on a GPU; a card that only emulates it, as a T4, gets fp16."""
    seen = []

    def load_models(config, *rest, **options):
        seen.append(config)
        raise UserError("seen")

    monkeypatch.setattr(prdp, "load_models", load_models)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated or native)
    monkeypatch.setattr(evaluate, "start_processes", lambda: torch.device("cpu"))
    model = finished if run else tiny_sd
    result = evaluation(model, "--reward", "incompressibility", *flags, "--compile")
    assert only_sentence(result) == "evaluate.py: seen"
    assert (seen[0].dtype, seen[0].compile) == (dtype, True)


def test_a_base_that_is_another_by_now_is_refused(evaluation, finished, monkeypatch):
    """As where the run that it came from was trained on; --against it is compared all the same."""
    monkeypatch.setattr(run_folder, "model_digest", lambda sd: {"model_digest": "another"})
    said = only_sentence(evaluation(finished))
    assert said.startswith("evaluate.py: base: the model changed since it began; restore that, or ")
    assert said.endswith("give a new --out, and the base by --against.")
    assert evaluation(finished, "--against", finished / "pipeline")[0] == 0
    assert only_sentence(evaluation(finished)) == said  # into the same folder


def test_prompt_files_of_one_name_are_told_apart(evaluation, finished, tmp_path):
    files = [tmp_path / folder / "p.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"a red circle {file.parent.name}\na ring\n")
    assert evaluation(finished, "--prompts", *files)[0] == 0
    assert {row["prompts"] for row in record_in(tmp_path / "out")["table"]["policy"]} == {
        *map(str, files)
    }


# ---- Other samplers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("dpm++", 10), ("euler", 10)])
def test_samplers_are_diffusers_own(evaluation, finished, monkeypatch, sampler, steps):
    """A user's `pipe(prompt)` of the same x_T and batch, to a grey level; with ddim that is the
    pipeline as it comes, with its own defaults."""
    drawn, draw = {}, evaluate.draw

    def kept(plan, models, sampler, chosen, images):
        pictures, total, rewards = draw(plan, models, sampler, chosen, images)
        drawn[tuple(chosen)] = pictures  # of the last model
        return pictures, total, rewards

    monkeypatch.setattr(evaluate, "draw", kept)
    flags = [
        "--sampler",
        sampler,
        "--ddpm-steps",
        steps,
        "--guidance-scale",
        7.5,
        "--microbatch",
        2,
    ]
    assert evaluation(finished, *flags, "--max-prompts", 1)[::2] == (0, "")
    pipe = StableDiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    if sampler == "dpm++":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if sampler == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ((prompt,), pictures), *_ = drawn.items()
    place = prdp.load_prompts(finished.parent / "p.txt").index(prompt)
    generators = prdp.image_generators(3, 0, [place], 2)
    x_T = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    own = {} if sampler == "ddim" else {"num_inference_steps": steps}
    expected = pipe([prompt] * 2, latents=x_T, output_type="np", **own).images
    pictures = pictures.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(pictures - np.round(expected * 255)).max() <= 1


def test_results_by_sampler(evaluation, finished, tmp_path, monkeypatch):
    """In one table and one file, to which another sampler's are added; what is there is not drawn
    again, and the policy's own scheduler serves each."""
    assert evaluation(finished, "--sampler", "policy", "euler")[::2] == (0, "")
    before = record_in(tmp_path / "out")
    code, out, errors = evaluation(finished, "--sampler", "ddim", "euler")
    assert (code, errors) == (0, "")
    assert out.count(", p.txt: 0 of 3 prompts to draw") == 2  # euler's, of base and run
    header, *lines = out.split("\n\n", 1)[1].splitlines()
    assert header == "p.txt, incompressibility: 3 x 2 images"
    assert [line.split(" ")[0] for line in lines[:6]] == ["ddim", "", "", "euler", "", ""]
    assert lines[0].split()[1:] == ["mean", "+-", "se", "difference", "+-", "se"]
    record = record_in(tmp_path / "out")
    assert set(record["table"]) == set(record["rewards"]) == {"policy", "ddim", "euler"}
    for name in ("policy", "euler"):
        assert record["rewards"][name] == before["rewards"][name]
        assert record["table"][name] == before["table"][name]
    means = [row["mean"] for rows in record["table"].values() for row in rows]
    assert len(set(means)) == len(means) == 6
    assert evaluation(finished, "--sampler", "ddim", "--out", tmp_path / "alone")[0] == 0
    assert record_in(tmp_path / "alone")["table"]["ddim"] == record["table"]["ddim"]


def test_a_schedule_that_a_sampler_cannot_serve(evaluation, tiny_sd, tmp_path):
    """In diffusers' float32 the alpha-bar of this one ends at 0."""
    model = shutil.copytree(tiny_sd, tmp_path / "sd")
    edit_json(model / "scheduler" / "scheduler_config.json", beta_end=0.99)
    flags = [model, "--reward", "incompressibility", "--ddpm-steps", 10]
    for sampler in ("ddim", "dpm++", "euler"):
        said = only_sentence(evaluation(*flags, "--sampler", sampler))
        assert (
            said == f"evaluate.py: --sampler {sampler}: cannot serve this model's noise schedule."
        )
    assert "invalid choice: 'heun'" in only_sentence(evaluation(*flags, "--sampler", "heun"))


def test_two_finetuned_models(evaluation, finished, tmp_path):
    """--against RUN: its label is its own, and lines are no longer for it."""
    other = shutil.copytree(finished, tmp_path / "another_run_of_many_more_letters")
    shutil.copytree(
        finished / "epochs" / "0001" / "pipeline", other / "pipeline", dirs_exist_ok=True
    )
    edit_json(other / "pipeline" / "prdp.json", epoch=2)
    code, out, errors = evaluation(finished, "--against", other, "--sampler", "dpm++")
    assert (code, errors) == (0, "")
    first, second = record_in(tmp_path / "out")["table"]["dpm++"]
    assert (first["model"], second["model"]) == (other.name, "run")
    assert "difference" not in first and second["difference"] != 0 and "base" not in out
    assert max(map(len, out.split("\n\n", 1)[1].split("see ")[0].splitlines())) <= 80
