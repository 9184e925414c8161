"""The embedded toy: its files in transformers 4 and 5, its judge, what the base model draws."""

import importlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import prdp
from conftest import ROOT

TOY = ROOT / "toy"


@pytest.fixture
def toy(monkeypatch):
    """toy(name): the module toy/NAME.py."""
    monkeypatch.syspath_prepend(str(TOY))
    return importlib.import_module


@pytest.mark.parametrize("folder", [TOY / "sd" / "tokenizer", TOY / "pickscore"])
def test_tokenizers_two_forms_are_one(folder, tmp_path):
    """transformers 4 reads vocab.json and merges.txt, 5 tokenizer.json."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    texts = (ROOT / "prompts" / "shapes.txt").read_text().splitlines()
    texts += ["", "A RED cat, 3 dogs & it's late", "orangesquare caf\u00e9"]
    of_5, of_4 = (CLIPTokenizer.from_pretrained(place) for place in (folder, tmp_path))
    assert of_5(texts).input_ids == of_4(texts).input_ids


def test_text_encoder_has_the_names_that_transformers_4_knows():
    """Where it finds none of them it begins at random, and warns at most."""
    weights = load_file(TOY / "sd" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)


def test_oracle_knows_the_world(toy):
    """It reads back what the pictures were drawn from, in shape, colours and style."""
    make_toy, oracle = toy("make_toy"), toy("oracle")
    scenes = make_toy.random_scenes(500, torch.Generator().manual_seed(1))
    pictures = make_toy.render(scenes)
    if pictures.is_floating_point():
        pictures = (pictures * 255).round().to(torch.uint8)
    prompts = make_toy.captions(scenes)
    match, shaded = oracle.judge(oracle.load_oracle(), pictures, prompts)
    assert match.double().mean() > 0.97
    assert (shaded == scenes["shading"].bool()).double().mean() > 0.97
    others, _ = oracle.judge(oracle.load_oracle(), pictures, prompts[1:] + prompts[:1])
    assert others.double().mean() < 0.03


def test_oracle_judges_a_run(toy, tmp_path, monkeypatch, capsys):
    """A row for each set of prompts and model. A run that learned nothing is the base; and that
    draws what is named most of the time, and seldom shaded."""
    oracle, load = toy("oracle"), prdp.load_prompts
    monkeypatch.setattr(prdp, "load_prompts", lambda file: load(file)[:96][::4])
    shutil.copytree(TOY / "sd", tmp_path / "pipeline")
    oracle.main([str(tmp_path), "--images-per-prompt", "2"])
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    names = [["shapes.txt", "base"], ["shapes.txt", "finetuned"]]
    names += [["shapes_unseen.txt", "base"], ["shapes_unseen.txt", "finetuned"]]
    assert [row[:2] for row in rows] == names
    for base, finetuned in (rows[:2], rows[2:]):
        assert base[2:] == finetuned[2:]
    _, _, images, reward, _, _, match, _, _, shaded, *_ = rows[2]
    assert images == "24"
    assert 0.2 < float(reward) < 0.4
    assert float(match) > 0.4
    assert float(shaded) < 0.4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--images-per-prompt", "1"], "--images-per-prompt 1"), (["nowhere"], "no pipeline/")],
)
def test_oracle_of_bad_input(toy, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        toy("oracle").main(flags)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in errors
    assert errors.count("\n") == 1


def test_oracle_of_a_pipeline_of_an_earlier_epoch(toy, tmp_path, capsys):
    """Of a run that went on and was stopped: what it judges would not be what was learned."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "prdp.json").write_text('{"epoch": 1}')
    (tmp_path / "config.json").write_text('{"program": "prdp.py"}')
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    with pytest.raises(SystemExit):
        toy("oracle").main([str(tmp_path)])
    assert "no pipeline/ of epoch 2; when it has ended, python prdp.py" in capsys.readouterr().err


def test_stages_of_the_toy_need_its_vae(toy, tmp_path, capsys, monkeypatch):
    arguments = ["make_toy.py", "--only", "oracle", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        toy("make_toy").main()
    assert "need the VAE" in capsys.readouterr().err


def test_the_race_chooses_and_goes_on(toy, monkeypatch, tmp_path):
    """With runs whose reward is known: the best of each axis, widened where it lies at the edge; at
    most 8 settings; nothing twice; without starting anything, an error for what there is not."""
    race, started = toy("race"), []

    def judged(command: list[str], folder: Path, epochs: int) -> float:
        flags = dict(zip(command[3::2], command[4::2], strict=True))
        started.append((command, epochs))
        folder.mkdir(parents=True)
        rate, clip = float(flags["--learning-rate"]), float(flags["--clip-range"])
        reward = -abs(math.log(rate / 6e-3)) - abs(math.log(min(clip, 10) / 1e-2))
        reward -= int(flags["--updates-per-epoch"]) / 10
        (folder / "reward").write_text(str(reward))
        return 2.0

    monkeypatch.setattr(race, "ROOT", tmp_path)
    monkeypatch.setattr(race, "RECORD", tmp_path / "race.json")
    monkeypatch.setattr(race, "go_on", judged)
    monkeypatch.setattr(
        race, "judge", lambda arm, folder, noise: {"reward": float((folder / "reward").read_text())}
    )
    arm = race.ARMS["PRDP"]
    fresh = race.Race({"runs": {}}, start=False)
    with pytest.raises(LookupError):
        fresh.sweep(arm)
    best = race.Race({"runs": {}}, start=True).sweep(arm)
    assert best == {"--learning-rate": 6.7e-3, "--clip-range": 1e-2, "--updates-per-epoch": 1}
    assert len(started) == race.MOST == len({str(command) for command, _ in started})
    assert {epochs for _, epochs in started} == {30}

    stored = race.Race(race.read_record(), start=False)
    assert stored.sweep(arm) == best
    assert race.hours({}) > race.hours(stored.runs)
    with pytest.raises(LookupError):
        stored.final(arm, best, 0)


def test_the_races_table_is_that_of_its_record(toy, monkeypatch, tmp_path, capsys):
    """What toy/README.md shows is what --show prints, by the settings that the sweep chose; no
    reported number is of the sweep's seed, and the preset has PRDP's settings."""
    race = toy("race")
    monkeypatch.setattr("sys.argv", ["race.py", "--show"])
    monkeypatch.setattr(race, "PICTURE", tmp_path / "race.png")
    race.main()
    printed = capsys.readouterr().out.splitlines()
    shown = (TOY / "README.md").read_text().split("```text\n")[1].split("\n```")[0].splitlines()
    assert shown == [line for line in printed if "--seed 900" not in line]
    assert (tmp_path / "race.png").is_file()
    command = next(line for line in shown if line.startswith("PRDP: python prdp.py "))
    best = prdp.parse_args(command.split()[3:])
    assert vars(best) == vars(prdp.parse_args(["--preset", "toy"]))
