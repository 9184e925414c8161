"""What fits a GPU, without one: plans by free memory, the start-up check, the counter of peaks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prdp
from conftest import ROOT, metrics_of, tiny_config
from stable_diffusion import StableDiffusion
from support import memory, report
from support.cli import InputError

SD14 = 3.44  # GB of its UNet


def planned(monkeypatch, free: float, weights: float = SD14, **settings) -> list[tuple]:
    monkeypatch.setattr(memory, "free_gigabytes", lambda: free)
    config = prdp.Config(**{"dtype": "fp16", **settings})
    found = memory.plans(config, lambda model: weights)
    return [(x.microbatch, x.gradient_checkpointing, x.offload) for x in found]


@pytest.mark.parametrize(
    ("card", "settings", "plan"),
    [
        ("24 GB", {}, (8, "on", "on")),
        ("40 GB", {}, (8, "off", "on")),
        ("48 GB", {}, (8, "off", "on")),
        ("80 GB", {}, (16, "off", "off")),
        ("141 GB", {}, (32, "off", "off")),
        ("24 GB", {"dtype": "tf32"}, (4, "on", "on")),
        ("80 GB", {"dtype": "tf32"}, (8, "off", "on")),
        ("16 GB", {"lora_rank": 8}, (8, "on", "on")),
        ("80 GB", {"microbatch": 8}, (8, "off", "off")),
        ("40 GB", {"offload": "off"}, (8, "on", "off")),
    ],
)
def test_the_plan_of_each_card(monkeypatch, card, settings, plan):
    """A card of N GB has about N GiB, of which CUDA itself takes 0.6."""
    free = float(card.split()[0]) * 1.0737 - 0.6
    assert planned(monkeypatch, free, **settings)[0] == plan


def test_later_plans_need_less(monkeypatch):
    """So that after the one that runs out of memory the next has a chance."""
    plans = planned(monkeypatch, 141)
    sizes = [memory.needed_gigabytes(memory.with_plan(prdp.Config(dtype="fp16"), plan), SD14)
             for plan in plans]  # fmt: skip
    assert len(plans) == len(memory.PLANS) and sizes == sorted(sizes, reverse=True)


def test_the_full_unet_is_refused_on_16_gb_and_the_toy_is_not(monkeypatch):
    with pytest.raises(InputError, match=r"16 GB of free .* --lora-rank 8 --learning-rate 1e-4"):
        planned(monkeypatch, 16)
    assert planned(monkeypatch, 16, weights=0.004, microbatch=64)[0] == (64, "off", "off")


def test_given_flags_stay_even_where_they_should_not_fit(monkeypatch):
    given = {"microbatch": 32, "gradient_checkpointing": "off", "offload": "off"}
    assert planned(monkeypatch, 16, **given) == [(32, "off", "off")]


def test_on_a_cpu(monkeypatch):
    assert planned(monkeypatch, None) == [(8, "off", "off")]
    assert planned(monkeypatch, None, microbatch=3, offload="on") == [(3, "off", "on")]


@pytest.mark.parametrize("fails", ["load_models", "backward_trajectories"])
def test_a_run_out_of_memory_begins_with_the_next_plan(
    tiny_sd, tmp_path, monkeypatch, capsys, fails
):
    """Until one fits; it is stored, and the run is the one that asked for that plan."""
    monkeypatch.setattr(memory, "free_gigabytes", lambda: 1000.0)
    function, calls = getattr(prdp, fails), []

    def short(*arguments, **options):
        calls.append(1)
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments, **options)

    monkeypatch.setattr(prdp, fails, short)
    config = tiny_config(tiny_sd, epochs=1, updates_per_epoch=1, reward=("incompressibility",),
                         prompts=(str(ROOT / "prompts" / "shapes.txt"),))  # fmt: skip
    left = {"microbatch": 0, "gradient_checkpointing": "auto", "offload": "auto"}
    prdp.run(replace(config, out=str(tmp_path / "run"), **left))
    assert capsys.readouterr().out.count("out of GPU memory; trying the next") == 2
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["microbatch"], record["offload"]) == (8, "on")

    plan = {"microbatch": 8, "gradient_checkpointing": "off", "offload": "on"}
    prdp.run(replace(config, out=str(tmp_path / "asked"), **plan))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "asked")


def test_given_flags_that_do_not_fit_are_one_sentence(cli, monkeypatch):
    monkeypatch.setattr(memory, "free_gigabytes", lambda: 1000.0)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prdp, "backward_trajectories", full)
    flags = ["--microbatch", 2, "--gradient-checkpointing", "off", "--offload", "off"]
    code, _, errors = cli(*flags)
    assert code == 2 and "out of GPU memory: try a smaller --microbatch" in errors


def test_the_rehearsal_holds_what_a_run_will(tiny_sd, monkeypatch):
    """While the gradient is taken, room for Adam's two moments and an epoch's trajectories; and it
    leaves weights and gradients as they were."""
    config = tiny_config(tiny_sd, images_per_prompt=4)
    models = prdp.load_models(
        config, torch.device("cpu"), lambda images, prompts: [0] * len(images)
    )
    batch = prdp.check_on_policy(config, models, "a cat")
    before = [p.clone() for p in models.sd.unet.parameters()]
    made, empty, empty_like = [], torch.empty, torch.empty_like

    def backward(*arguments):
        counted.append(sum(made))
        prdp.backward_trajectories(*arguments)

    def noted(function):
        def call(*arguments, **options):
            x = function(*arguments, **options)
            made.append(x.nbytes)
            return x

        return call

    counted = []
    monkeypatch.setattr(torch, "empty", noted(empty))
    monkeypatch.setattr(torch, "empty_like", noted(empty_like))
    passes = memory.rehearse(config, models, batch, prdp.score_trajectories, backward)
    numel, images = sum(p.numel() for p in before), 3 * 4
    latents = images * (config.ddpm_steps + 1) * batch.latents[0, 0].numel()
    assert counted[0] >= 4 * (2 * numel + latents)
    assert all(x > 0 for x in passes)
    assert all(torch.equal(p, q) for p, q in zip(models.sd.unet.parameters(), before, strict=True))
    assert all(p.grad is None for p in models.sd.unet.parameters())


def test_decoding_on_a_gpu_takes_four_at_a_time(monkeypatch):
    sizes = []

    def decode(latents):
        sizes.append(len(latents))
        return SimpleNamespace(sample=latents)

    vae = SimpleNamespace(decode=decode, config=SimpleNamespace(scaling_factor=1.0))
    device = SimpleNamespace(type="cuda")
    sd = SimpleNamespace(device=device, autocast=None, vae=vae, in_use=lambda _: torch.no_grad())
    assert len(StableDiffusion.decode(sd, torch.zeros(10, 3, 2, 2), 32)) == 10
    assert sizes == [4, 4, 2]


def test_without_a_gpu_a_large_model_is_warned_of(monkeypatch, capsys):
    tokenizer = type("Tokenizer", (), {"model_max_length": 77})()
    monkeypatch.setattr(
        type(tokenizer), "__call__",
        lambda self, texts: SimpleNamespace(input_ids=[[0]] * len(texts)), raising=False,
    )  # fmt: skip
    with torch.device("meta"):
        small, large = torch.nn.Linear(100, 100), torch.nn.Linear(20_000, 10_000)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for unet, warned in ((small, False), (large, True)):
        sd = SimpleNamespace(unet=unet, pipe=SimpleNamespace(tokenizer=tokenizer))
        report.introduce(prdp.Config(), sd, "eager", ["a cat"])
        out = capsys.readouterr().out
        assert ("which may take months" in out) == ("(CUDA 13.0) finds no GPU" in out) == warned


def test_a_pass_without_gradient_casts_weights_once(models):
    """Not at every step, which a step scored by itself does; the bits are the same."""
    loaded = models(dtype="bf16")
    policy, (generator,) = loaded.policy, prdp.image_generators(0, 1, [0], 1)
    batch = prdp.sample_prompts(loaded, policy, ["a cat"], [generator])

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, args=(), options=None):
            options = options or {}
            self.count += operator is torch.ops.aten._to_copy.default and (
                args[0].dtype == torch.float32 and options.get("dtype") == torch.bfloat16
            )
            return operator(*args, **options)

    with Casts() as whole:
        scores = prdp.score_trajectories(policy, batch)
    with Casts() as by_step, torch.no_grad():
        row = torch.zeros(1, dtype=torch.int64)
        steps = [prdp.step_log_prob(policy, batch, row, row + k) for k in range(5)]
    assert torch.equal(scores, torch.stack(steps, 1)) and torch.equal(scores, batch.log_probs)
    matrices = [p for p in policy.unet.parameters() if p.ndim > 1]
    assert whole.count < by_step.count - 3 * len(matrices)


# ---- benchmarks/memory.py ------------------------------------------------------------------------

SCRIPT = """
import json, sys
from unittest import mock
sys.path.insert(0, "benchmarks")
import memory, prdp, torch

def on_cpu(x):
    return x.cpu() if torch.is_tensor(x) else x

def returns_on_cpu(function):
    def call(*args, **options):
        found = function(*args, **options)
        return tuple(map(on_cpu, found)) if isinstance(found, tuple) else on_cpu(found)
    return call

def reference_on_cpu(function):
    def call(policy, trajectories, label="score"):
        found = function(policy, trajectories, label)
        return found.cpu() if label == "reference" else found
    return call

def takes_half(function):
    def call(policy, x_t, text, steps):
        return function(policy._replace(autocast=None), x_t, text.half(), steps)
    return call

def grads_on_cpu(function):
    def call(optimizer, backward, *rest):
        def moved(weights):
            backward(weights)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.zeros(1)
        return function(optimizer, moved, *rest)
    return call

PLANTS = {
    "nothing": ("prdp_loss", lambda function: function),
    "sample": ("guided_sample", returns_on_cpu),
    "reward": ("score_images", returns_on_cpu),
    "reference": ("score_trajectories", reference_on_cpu),
    "score": ("guided_log_prob", returns_on_cpu),
    "a dtype": ("run_unet", takes_half),
    "loss": ("prdp_loss", lambda function: lambda *x: function(x[0].cpu(), *x[1:])),
    "update": ("backward_trajectories", lambda f: lambda p, t, weights: f(p, t, weights.cpu())),
    "step": ("gradient_step", grads_on_cpu),
}
memory.register()
found = {}
for name, (where, plant) in PLANTS.items():
    with mock.patch.object(prdp, where, plant(getattr(prdp, where))):
        try:
            memory.peaks(memory.TOY / "sd", True, microbatch=2, dtype="fp16",
                         gradient_checkpointing="off", offload="on")
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_the_counter_finds_a_tensor_on_another_device_or_of_another_dtype():
    """Planted in each phase of an epoch, on fake tensors of a GPU that does not exist."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("nothing") == ""
    assert all("device" in x or "dtype" in x or "same" in x for x in found.values()), found
