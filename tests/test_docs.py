"""What README and docs show is there and runs: links, commands, tables, Python, fields."""

import ast
import dataclasses
import io
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

import evaluate
import prdp
import rewards
import stable_diffusion
from baselines import ddpo, diffusion_dpo, implicit_reward, rwr
from conftest import ROOT, SD14_SCHEDULER, checkpoint, script, tiny_config
from support.inputs import load_module

SHAPES = str(ROOT / "prompts" / "shapes.txt")
README = (ROOT / "README.md").read_text()
RUNNING, PAPER, HACKING = (
    (ROOT / "docs" / name).read_text() for name in ("running.md", "paper.md", "hacking.md")
)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
PROGRAMS = {
    "prdp.py": prdp,
    "evaluate.py": evaluate,
    "baselines/ddpo.py": ddpo,
    "baselines/rwr.py": rwr,
    "baselines/diffusion_dpo.py": diffusion_dpo,
    "baselines/implicit_reward.py": implicit_reward,
}
COMMAND = r"(prdp|evaluate|baselines/\w+)\.py"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files, headings, and lines of code: where that function begins, or with that word."""
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, place = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if file.suffix == ".py" and place:
            name, lines = re.match(r"`(\w+)`", text)[1], file.read_text().split("\n")
            begins = [n for n, line in enumerate(lines, 1) if line.startswith(f"def {name}(")]
            begins = begins or [n for n, line in enumerate(lines, 1) if name in line]
            assert int(place[1:]) in begins, f"{name} is on line {begins}"
        elif place:
            assert place in anchors(file), target


def source_of(file: str, name: str) -> str:
    """A function or class of a file."""
    text = (ROOT / file).read_text()
    for node in ast.walk(ast.parse(text)):
        if getattr(node, "name", None) == name:
            return "\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"{file} has no {name}")


def numbers(text: str) -> set[int]:
    """Of the equations that a text names: "Eq. 2", "Eqs. 5 to 9, 13 and 15"."""
    found = set()
    for listed in re.findall(r"Eqs?\. (\d+(?:(?:, | and | to )\d+)*)", text):
        for part in re.split(", | and ", listed):
            first, _, last = part.partition(" to ")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_the_page_beside_the_paper_is_the_code():
    """Every function, test and line of code that docs/paper.md shows is in the source; every
    equation has a place there, and one of prdp.py unless it is a step without code."""
    shown, source = 0, ""
    for found in re.finditer(r"`([\w/.]+\.py):\s(\w+)`|```python\n(.*?)```", PAPER, re.DOTALL):
        file, name, block = found.groups()
        if block is None:
            source = source_of(file, name)
        else:
            assert block.rstrip("\n") in source, block
            shown += 1
    assert shown >= 14

    headings = re.findall(r"^#+ (.*)$", PAPER, re.MULTILINE)
    assert numbers("\n".join(headings)) >= set(range(1, 22))
    without = numbers("\n".join(x for x in headings if "without code" in x))
    cited = numbers((ROOT / "prdp.py").read_text())
    assert set(range(1, 22)) - without <= cited


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150 and max(map(len, README.splitlines())) <= 120
    assert len(README.split()) <= 1400


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def arguments_of(program: str, argv: list[str]) -> object:
    module = PROGRAMS[program]
    if module is not evaluate:
        return module.parse_args(argv)
    with mock.patch.object(evaluate, "evaluate") as called:
        evaluate.main(argv)
    return called.call_args.args[0]


def test_commands_are_parsed(tmp_path, monkeypatch):
    """Flags that are gone, or were never there, do not stay in the text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("")
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(), "bash"):
            found += re.findall(rf"(?:python|\d) {COMMAND} ([^&#|\n]*)", block)
    assert {name for name, _ in found} >= {"prdp", "evaluate"} and len(found) >= 8
    systems = re.findall(rf"`python {COMMAND}([^`]*)`", PAPER.split("## The systems")[1])
    assert len(systems) >= 8
    for name, arguments in found + systems:
        if "--resume" not in arguments:
            arguments_of(f"{name}.py", shlex.split(arguments))


def commands(row: str) -> list[list[str]]:
    """The arguments of each `python ...` of a table row, with files for $UNSEEN."""
    found = re.finditer(rf"`python ({COMMAND}[^`]*)`", row)
    return [shlex.split(command[1].replace("$UNSEEN", SHAPES)) for command in found]


TABLES = PAPER.split("## The systems")[0].split("\n")
ROWS = [row for row in TABLES if row.startswith("| ") and commands(row)]


def without(argv: list[str], name: str) -> list[str]:
    """Without a flag and its values."""
    if name not in argv:
        return argv
    first = argv.index(name)
    rest = itertools.dropwhile(lambda word: word[:2] != "--", argv[first + 1 :])
    return [*argv[:first], *rest]


def at_tiny_size(argv: list[str], tiny_sd: str) -> list[str]:
    """The same command, of a model, a reward and sizes that take a second."""
    program, *argv = argv
    if program == "evaluate.py":
        small = ["--samples-per-prompt", "2", "--max-prompts", "2"]
        if "--reward" in argv:
            small += ["--reward", "incompressibility=1", "compressibility=0"]
        return [*without(argv, "--reward"), *small]
    reward = ["--reward", "incompressibility=2", "compressibility=1"]
    small = ["--model", tiny_sd, *reward, "--prompts", SHAPES, "--ddpm-steps", "3"]
    small += ["--epochs", "1", "--prompts-per-epoch", "4", "--microbatch", "8"]
    if arguments_of(program, argv).images_per_prompt > 1:
        small += ["--images-per-prompt", "2"]
    if program == "prdp.py":
        small += ["--updates-per-epoch", "1"]
    return [*without(without(argv, "--reward"), "--prompts"), *small]


def test_the_table_covers_the_paper():
    names = " ".join(row.split("|")[1] for row in ROWS)
    experiments = ["Table 1", "Table 2", "Table 3", "Figs. 6, 7", "Fig. 9", "Fig. 10", "Table 5"]
    assert all(experiment in names for experiment in experiments)


def test_every_row_of_the_table_runs(tiny_sd, tmp_path, monkeypatch, capsys):
    """In the order of the table: a later row may name an earlier one's runs."""
    monkeypatch.chdir(tmp_path)
    for row in ROWS:
        for argv in commands(row):
            try:
                PROGRAMS[argv[0]].main(at_tiny_size(argv, tiny_sd))
            except SystemExit as stop:
                raise AssertionError(f"{argv}: {capsys.readouterr().err}") from stop
    assert "compressibility" in capsys.readouterr().out


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (reward, loss), (judge, library, *_) = blocks(README, "python"), blocks(RUNNING, "python")
    assert loss.split("\n", 1)[1] in (ROOT / "prdp.py").read_text()
    names = {}
    exec(reward, names)
    assert names["brightness"](torch.full((1, 3, 2, 2), 255).byte(), ["a"]).item() == 1
    exec(judge, names)
    loaded = rewards.load_reward(names["judge"], "cpu")
    assert loaded.networks == [names["judge"].net]
    assert loaded(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"]).shape == (2,)
    small = '"--epochs", "1", "--updates-per-epoch", "1", "--ddpm-steps", "3"'
    exec(library.replace('"--epochs", "2"', small), names)
    assert names["loss"].item() > 0 and names["pictures"].shape == (4, 3, 32, 32)
    assert not torch.equal(names["log_probs_ref"], names["drawn"].log_probs)
    assert "of the caller" in capsys.readouterr().out
    assert (tmp_path / "runs" / "from_python" / "pipeline").is_dir()


TRL = RUNNING.split("## From TRL")[1].split("\n## ")[0]
OF_TRL = """
    num_epochs save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from log_with
    seed sample_num_steps sample_eta sample_guidance_scale sample_batch_size
    train_use_8bit_adam sample_num_batches_per_epoch train_batch_size train_learning_rate
    train_adam_beta1 use_lora train_clip_range train_adam_weight_decay
    train_gradient_accumulation_steps train_max_grad_norm train_adv_clip_max
    train_num_inner_epochs train_cfg train_timestep_fraction per_prompt_stat_tracking
"""


def test_names_of_other_trainers():
    """Theirs are DDPOConfig's, or ddpo-pytorch's own; ours are flags."""
    rows = [row.split("|")[1:3] for row in TRL.split("\n") if row.startswith("| `")]
    theirs = {name for row in rows for name in re.findall(r"`([\w.]+)`", row[0]) if name[0] != "_"}
    others = "pretrained.model prompt_fn reward_fn pretrained_model_name prompt_function"
    others += " reward_function project_kwargs logdir"
    assert theirs - set(OF_TRL.split()) == set(others.split())
    ours = {name.replace("-", "_") for row in rows for name in re.findall(r"`--([\w-]+)", row[1])}
    assert ours <= {field.name for field in dataclasses.fields(ddpo.Config)} and len(ours) >= 18


def test_an_epoch_of_other_trainers():
    """The example's images and updates, counted as their loops do; and the unit of log-probs."""
    assert "8 images a batch, 4 batches, updates of 4 images accumulated twice" in TRL
    images = [f"{batch}.{n}" for batch in range(4) for n in range(8)]
    updates, accumulated = [], []
    for i in range(len(images) // 4):
        accumulated += images[4 * i : 4 * i + 4]
        if (i + 1) % 2 == 0:
            updates.append(accumulated)
            accumulated = []
    as_ddpo, as_prdp = (
        arguments_of(f"{program}.py", shlex.split(flags))
        for program, flags in re.findall(r"python ([\w/]+)\.py (.*)", blocks(TRL, "bash")[0])
    )
    parts = ddpo.minibatches(as_ddpo, 1)
    assert [len(part) for part in parts] == [len(update) for update in updates] == [8] * 4
    assert sorted(itertools.chain(*parts)) == [*range(32)]
    assert as_prdp.prompts_per_epoch * as_prdp.images_per_prompt == len(images)

    x, mean = torch.randn(2, 3, 4, 8, 8)
    exponent = -((x - mean) ** 2) / (2 * 0.1**2)
    theirs = exponent - math.log(0.1) - math.log(math.sqrt(2 * math.pi))
    theirs = theirs.mean(dim=tuple(range(1, theirs.ndim)))
    torch.testing.assert_close(prdp.gaussian_log_prob(x, mean, 0.1).float(), theirs)


def test_a_reward_of_other_trainers():
    (code,) = blocks(TRL, "python")

    def theirs(images, prompts, metadata):
        assert images.dtype == torch.float32 and isinstance(prompts, tuple) and metadata[0] == {}
        sizes = []
        for image in (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1):
            Image.fromarray(image.numpy()).save(buffer := io.BytesIO(), "JPEG", quality=95)
            sizes.append(buffer.tell() / 1000)
        return np.array(sizes), {}

    names = {"theirs": theirs}
    exec(code, names)
    images, prompts = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), ["a", "b", "c"]
    scores = rewards.load_reward(names["reward"], "cpu")(images, prompts)
    ours = rewards.load_reward("incompressibility", "cpu")(images, prompts)
    torch.testing.assert_close(scores.float(), ours)


def test_the_lifted_loss_reaches_its_optimum():
    """It is prdp.py's, but for its docstring, and needs PyTorch alone."""
    code = (ROOT / "examples" / "lift_the_loss.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"torch"}
    pasted, ours = (
        ast.parse(source_of(file, "prdp_loss")).body[0]
        for file in ("examples/lift_the_loss.py", "prdp.py")
    )
    del ours.body[0]
    assert ast.unparse(pasted) == ast.unparse(ours) and len(code.splitlines()) <= 85
    code, out, errors = script("examples/lift_the_loss.py")
    assert code == 0, errors
    values = np.array([float(x) for x in re.findall(r"-?\d+\.\d+", out)])
    reached, optimum = values[:36].reshape(3, 2, 6).transpose(1, 0, 2)
    np.testing.assert_allclose(reached, optimum, rtol=0.02)
    outside, *deviations = values[36:]
    assert 0.3 < outside < 0.9  # the clip range is of the size of an update
    allowed, taken = np.reshape(deviations, (2, 3))
    np.testing.assert_allclose(taken, allowed, rtol=0.02)
    assert taken.min() > 0.05


def test_every_field_and_reward_is_defined(cli, tmp_path):
    """Fields of metrics.jsonl, and the built-in rewards, are those of the tables."""
    table = RUNNING.split("| field of")[1].split("\n\n")[0]
    defined = set()
    for cell in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE):
        first, *others = re.findall(r"`(\w+)", cell) or [""]
        stem = first.split("_")[0]
        defined |= {first, *(stem + x if x.startswith("_") else x for x in others)} - {""}
    assert cli("--epochs", "1")[0] == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {name.split("/")[0] for name in json.loads(line)} == defined

    listed = re.findall(r"^\| (`.*?) \|", RUNNING.split("### Rewards")[1], re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", " ".join(listed))) >= set(rewards.LOADERS)


def changed(diff: str, folder: Path) -> ModuleType:
    """prdp.py with a diff of docs/hacking.md applied."""
    source = (ROOT / "prdp.py").read_text()
    _, *hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    assert len(hunks) <= 2 and len(re.findall(r"^\+(?!\+\+)", diff, re.MULTILINE)) <= 10
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] != other) for other in "+-")
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    file = folder / "changed_prdp.py"
    file.write_text(source)
    return load_module("changed_prdp", str(file))


@pytest.fixture
def hacked(tmp_path, tiny_sd) -> Callable:
    """hacked(n): prdp.py with the n-th diff, after a run of two epochs; and the run's folder."""

    def run(number: int, before: Callable = lambda module: None) -> tuple[ModuleType, Path]:
        module = changed(blocks(HACKING, "diff")[number], tmp_path)
        before(module)
        run = {"out": str(tmp_path / "run"), "epochs": 2, "updates_per_epoch": 2, "ddpm_steps": 6}
        module.run(module.Config(**{**vars(tiny_config(tiny_sd)), **run}))
        return module, tmp_path / "run"

    return run


def test_huber_loss(hacked):
    """As a loop over pairs, with PyTorch's Huber loss of each."""
    module, _ = hacked(0)
    old, now, rewards = torch.zeros(4, 3).double(), torch.rand(4, 3).double(), torch.rand(4) * 9
    pairs = [(a, b) for a in range(4) for b in range(4) if rewards[a] > rewards[b]]
    losses = [
        torch.nn.functional.huber_loss(now[a].mean() - now[b].mean(), rewards[a] - rewards[b])
        for a, b in pairs
    ]
    loss = module.prdp_loss(now, old, old, rewards, math.inf, 1.0)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_best_against_worst(hacked):
    """As the loss of those two images."""
    module, _ = hacked(1)
    matrices = [torch.rand(3, 5, 4).double() for _ in range(3)] + [torch.rand(3, 5)]
    ends = torch.stack([matrices[-1].argmax(1), matrices[-1].argmin(1)], 1)
    of_two = [torch.stack([x[n, two] for n, two in enumerate(ends)]) for x in matrices]
    expected = prdp.prdp_loss(*of_two, 0.1, 1.0)
    assert module.prdp_loss(*matrices, 0.1, 1.0).item() == pytest.approx(expected.item())


def test_cosine_learning_rate(hacked):
    _, run = hacked(2)
    (group,) = checkpoint(run)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(1e-5 / 2)  # the second epoch of two begins half way


def test_another_metric(hacked):
    _, run = hacked(3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_gap"] > row["reward_std"] for row in rows] == [True, True]


def test_steps_by_epoch(hacked):
    seen = []

    def before(module):
        loss = module.prdp_loss
        module.prdp_loss = lambda *args: [seen.append(args[0].shape[-1]), loss(*args)][1]

    hacked(4, before)
    assert seen[0] == 3 and seen[-1] == 6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_another_eta(hacked, prediction_type):
    """diffusers' DDIM with that eta."""
    module, _ = hacked(5)
    config = {**SD14_SCHEDULER, "prediction_type": prediction_type}
    ours = module.ddpm_schedule(config, 10)
    del config["skip_prk_steps"]
    theirs = DDIMScheduler(**config, clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(10)
    x, out = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    for k, t in enumerate(theirs.timesteps):
        zero, one = (
            theirs.step(out, t, x, eta=0.5, variance_noise=torch.full_like(x, noise)).prev_sample
            for noise in (0.0, 1.0)
        )
        mean = ours.coef_sample[k] * x + ours.coef_noise[k] * out
        torch.testing.assert_close(mean, zero, rtol=0, atol=2e-5)
        assert ours.sigma[k].item() == pytest.approx((one - zero).mean().item(), rel=1e-4)
    assert "eta=1.0" in stable_diffusion.CARD and RUNNING.count("eta=1.0") == 1


def test_only_the_attention_layers(hacked, tiny_sd):
    _, run = hacked(6)
    load = StableDiffusionPipeline.from_pretrained
    before, after = (dict(load(x).unet.named_parameters()) for x in (tiny_sd, run / "pipeline"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".attn" in name} == set(checkpoint(run)["unet"])


def test_pairs_weighted_by_their_gap(hacked):
    """As a loop over pairs; what a prompt without any gap adds is 0."""
    module, _ = hacked(7)
    ratios, rewards = torch.rand(4, 3).double(), torch.tensor([0.1, 0.2, 2.0, 0.2])
    total, weights = 0.0, 0.0
    for a in range(4):
        for b in range(4):
            gap = max(rewards[a].item() - rewards[b].item(), 0)
            error = (ratios[a].mean() - ratios[b].mean()).item() - gap
            total, weights = total + gap * error**2, weights + gap
    zero = torch.zeros_like(ratios)
    loss = module.prdp_loss(ratios, zero, zero, rewards, math.inf, 1.0)
    assert loss.item() == pytest.approx(total / weights)
    assert module.prdp_loss(ratios, zero, zero, torch.ones(4), math.inf, 1.0) == 0


def test_tests_that_fail_by_design_are_there():
    tests = (ROOT / "test_prdp.py").read_text() + Path(__file__).read_text()
    named = re.findall(r"`(test_\w+)`", HACKING)
    assert len(named) == 11 and all(f"def {name}(" in tests for name in named)
