"""A run's machine: its state, kernels that load or not, fp16's scale, plans by memory, without a
GPU; and the counter of peaks."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import prdp
from conftest import CPU, ROOT, draw, gradient_of, metrics_of, tiny_config
from stable_diffusion import StableDiffusion
from support import machine
from support.cli import UserError
from support.distributed import start_processes

SD14, SDXL = 3.44, 10.27  # GB of their UNets

# ---- State ---------------------------------------------------------------------------------------


def numbers() -> Tensor:
    """A product and its gradient, of a program that names neither device nor dtype."""
    x = (torch.arange(12).view(3, 4) / 7).requires_grad_()
    y = (x @ x.T).exp()
    y.sum().backward()
    return torch.cat([y.detach(), x.grad], 1)


def state() -> tuple:
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


OUTSIDE = [
    "enter(torch.autocast('cpu', torch.bfloat16))", "enter(torch.inference_mode())",
    "torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')",
    "torch.set_grad_enabled(False)", "enter(torch.device('meta'))",
]  # fmt: skip


@pytest.mark.parametrize("outside", OUTSIDE)
def test_numbers_inside_are_those_of_a_program_of_its_own(outside):
    """And what was set outside is set afterwards, whatever ends it."""
    expected, plain = numbers(), state()
    with ExitStack() as stack:
        for restore, value in (
            (torch.set_default_dtype, plain[0]),
            (torch.set_default_device, None),
        ):
            stack.callback(restore, value)
        stack.enter_context(torch.set_grad_enabled(True))
        exec(outside, {"torch": torch, "enter": stack.enter_context})
        before = state()
        with pytest.raises(KeyboardInterrupt), machine.own_state():
            found = numbers()
            raise KeyboardInterrupt
        assert state() == before != plain
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["tf32", "fp16", "fp32"])
def test_switches_of_tf32_can_be_read_whichever_was_used(dtype):
    """PyTorch refuses to read the older ones where only the newer were set."""
    for before in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = before
        machine.set_precision(dtype)
        allowed = dtype != "fp32"
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed


# ---- Kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("No C compiler.\nSet CC."), "RuntimeError: No C compiler. Set CC.)"),
        (KeyError("maxnreg"), "KeyError: 'maxnreg')"),
        (ImportError("no triton"), "ImportError: no triton)"),
        (AssertionError("no libcuda " * 99), "AssertionError: no libcuda no libcuda"),
    ],
)
def test_whatever_fails_at_the_first_launch_means_plain_pytorch(monkeypatch, error, reason):
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "load_module", fail)
    kernels, words = machine.load_kernels.__wrapped__()
    assert kernels is None
    assert words.startswith(f"eager ({reason}") and len(words) < 250 and "\n" not in words


def test_kernels_are_for_a_gpu_but_not_for_float64(monkeypatch):
    assert machine.load_kernels.__wrapped__() == (None, "eager (no CUDA device)")
    monkeypatch.setattr(machine, "load_kernels", lambda: ("kernels", "Triton kernels"))
    for dtype, expected in ((torch.bfloat16, "kernels"), (torch.float64, None)):
        assert machine.kernels_for(SimpleNamespace(is_cuda=True, dtype=dtype)) == expected
    assert machine.kernels_for(torch.zeros(2)) is None


# ---- fp16's scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e6])
def test_loss_scaling_has_the_bits_of_plain_backward_and_adds(size):
    network, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 5)
    network[0].bias.requires_grad_(False)

    def backward(grad: Tensor) -> None:
        (grad * network(x).squeeze(1)).sum().backward()

    first, second = size * torch.randn(2, 6)
    backward(first)
    one = gradient_of(network)
    for scaled in machine.loss_scaling(network, second, 256):
        backward(scaled)
    both = gradient_of(network)
    network.zero_grad()
    backward(second)
    assert torch.equal(both, one + gradient_of(network))
    assert network[0].bias.grad is None


def test_loss_scaling_of_nothing_of_nan_and_of_what_overflows():
    """No pass, an error, and 1/256 of the factor where fp16 overflows with the first one."""
    network, factors = nn.Linear(1, 1, bias=False), []
    assert not [*machine.loss_scaling(network, torch.zeros(3), 256)]
    assert network.weight.grad is None
    with pytest.raises(UserError, match="the loss's gradient is not finite"):
        next(machine.loss_scaling(network, torch.tensor([1.0, math.nan]), 256))

    network.weight.grad = torch.ones(1, 1)
    for scaled in machine.loss_scaling(network, torch.tensor([0.5]), 16):
        factors.append(scaled.item())
        network.weight.grad = (scaled * 2**20).half().float().view(1, 1)
    assert factors == [0.25, 0.25 / 256]
    assert network.weight.grad.item() == 1 + 0.5 * 2**20


def test_fp16_gradients_do_not_underflow(models):
    """Of tiny dloss/dlog_probs, as with a large kl_weight: as in fp32, to fp16's precision."""
    grad_log_probs, found = 1e-7 * torch.randn(12, 5, dtype=torch.float64), []
    for dtype in ("fp32", "fp16"):
        loaded = models(dtype=dtype)
        prdp.backward_trajectories(loaded.policy, draw(loaded), grad_log_probs)
        found.append(gradient_of(loaded.policy.unet))
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() < 0.05


# ---- Memory --------------------------------------------------------------------------------------


def on_a_gpu(monkeypatch, free: float) -> None:
    """Settings are planned as on a GPU of `free` GB; a run is none the wiser."""
    plans = machine.plans

    def planned(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "mem_get_info", lambda: (free * 1e9, None))
            return plans(*arguments)

    monkeypatch.setattr(machine, "plans", planned)


def planned(weights: float = SD14, **settings) -> list[tuple]:
    found = machine.plans(prdp.Config(**{"dtype": "fp16", **settings}), lambda model: weights)
    return [(x.microbatch, x.gradient_checkpointing, x.offload) for x in found]


@pytest.mark.parametrize(
    ("card", "settings", "plan"),
    [
        ("20.5 GB", {}, (4, "on", "on")),
        ("22 GB", {}, (8, "on", "on")),
        ("24 GB", {}, (2, "off", "on")),
        ("32 GB", {}, (4, "off", "on")),
        ("40 GB", {}, (8, "off", "on")),
        ("48 GB", {}, (8, "off", "on")),
        ("80 GB", {}, (16, "off", "off")),
        ("141 GB", {}, (32, "off", "off")),
        ("22 GB", {"dtype": "tf32"}, (4, "on", "on")),
        ("80 GB", {"dtype": "tf32"}, (8, "off", "on")),
        ("12 GB", {"lora_rank": 8}, (8, "on", "on")),
        ("16 GB", {"lora_rank": 8}, (2, "off", "on")),
        ("24 GB", {"lora_rank": 8}, (4, "off", "on")),
        ("80 GB", {"microbatch": 8}, (8, "off", "off")),
        ("40 GB", {"offload": "off"}, (4, "off", "off")),
        ("80 GB", {"weights": SDXL}, (8, "on", "on")),
        ("40 GB", {"weights": SDXL, "lora_rank": 8}, (8, "on", "on")),
    ],
)
def test_the_plan_of_each_card(monkeypatch, card, settings, plan):
    """A card of N GB has about N GiB, of which CUDA itself takes 0.6."""
    on_a_gpu(monkeypatch, float(card.split()[0]) * 1.0737 - 0.6)
    assert planned(**settings)[0] == plan


def test_later_plans_need_less(monkeypatch):
    """So that after the one that runs out of memory the next has a chance (in 16 bit)."""
    on_a_gpu(monkeypatch, 141)
    filled = machine.plans(prdp.Config(dtype="fp16"), lambda model: SD14)
    sizes = [machine.needed_gigabytes(config, SD14) for config in filled]
    assert len(sizes) == len(machine.PLANS) and sizes == sorted(sizes, reverse=True)


def test_a_compiled_reference_stays_in_float32():
    """The other form is a copy in autocast's format, of half the size."""
    config = prdp.Config(dtype="fp16", microbatch=8, gradient_checkpointing="off", offload="off")
    sizes = [machine.needed_gigabytes(replace(config, compile=x), SD14) for x in (False, True)]
    assert sizes[1] - sizes[0] == pytest.approx(SD14 / 2)


def test_plans_of_small_cards_of_given_flags_and_of_a_cpu(monkeypatch):
    """The full UNet is refused on 16 GB, unless all flags ask for it; the toy fits."""
    assert planned() == [(8, "off", "off")]
    assert planned(microbatch=3, offload="on") == [(3, "off", "on")]
    on_a_gpu(monkeypatch, 16)
    with pytest.raises(UserError, match=r"; train adapters: --lora-rank 8 --learning-rate 1e-4"):
        planned()
    assert planned(weights=0.004, microbatch=64)[0] == (64, "off", "off")
    given = {"microbatch": 32, "gradient_checkpointing": "off", "offload": "off"}
    assert planned(**given) == [(32, "off", "off")]


@pytest.mark.parametrize(
    ("settings", "free", "remedy"),
    [
        ({"microbatch": 64}, 25, "leave out --microbatch"),
        ({"offload": "off"}, 25, "leave out --offload"),
        ({"microbatch": 64, "offload": "off"}, 25, "leave out --microbatch and --offload"),
        ({"microbatch": 64, "lora_rank": 8}, 25, "leave out --microbatch"),
        ({"microbatch": 64}, 16, "train adapters: --lora-rank 8 --learning-rate 1e-4"),
        ({"microbatch": 1}, 16, "train adapters: --lora-rank 8 --learning-rate 1e-4"),
        ({"lora_rank": 8}, 6, "name --microbatch, --gradient-checkpointing and --offload to try"),
        (
            {},
            18.44 / 0.95,
            "train adapters: --lora-rank 8 --learning-rate 1e-4",
        ),  # more is free, but not 95% of it
    ],
)
def test_what_does_not_fit_says_what_it_compared_and_which_flag_is_the_cause(
    monkeypatch, settings, free, remedy
):
    on_a_gpu(monkeypatch, free)
    with pytest.raises(UserError) as found:
        planned(**settings)
    takes, share, room, advice = re.fullmatch(
        r"takes (.*) GB of GPU memory, and (\d+)% of what is free are (.*?); (.*)\.",
        str(found.value),
    ).groups()
    assert float(takes) >= float(room) == pytest.approx(int(share) / 100 * free, abs=0.005)
    assert advice.startswith(remedy) and advice.count("--") == remedy.count("--")


WORDS = ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory\nCompile with",
         "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_whoever_says_that_memory_ran_out_the_next_plan_is_tried(capsys, words):
    """PyTorch's allocator, the driver, cuBLAS; another error of theirs ends the run."""

    def attempt(config: int, error: Exception) -> int:
        if config < 3:
            raise error
        return config

    kind = torch.OutOfMemoryError if "Tried" in words else RuntimeError
    assert machine.first_that_fits([1, 2, 3, 4], attempt, kind(words)) == 3
    assert capsys.readouterr().out.count("trying the next smaller settings") == 2
    for configs, error in (([1, 2], kind(words)), ([1, 3], RuntimeError("CUDA error: unknown"))):
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            machine.first_that_fits(configs, attempt, error)


def test_a_gpu_that_this_pytorch_has_no_code_for(monkeypatch):
    """A V100, say, is told which build to take, before anything is loaded."""

    def launch(*shape, device: str) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    for name, found in (
        ("is_available", True),
        ("get_arch_list", ["sm_75", "sm_80"]),
        ("get_device_capability", (7, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch, "zeros", launch)
    with pytest.raises(UserError, match=r"for sm_75 sm_80, not for sm_70; .* CUDA 12\.6 \(whl/cu1"):
        start_processes()
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    assert start_processes().type == "cuda"


@pytest.mark.parametrize("fails", ["load_models", "backward_trajectories"])
def test_a_run_out_of_memory_begins_with_the_next_plan(
    tiny_sd, tmp_path, monkeypatch, capsys, fails
):
    """Until one fits; it is stored, and the run is the one that asked for that plan."""
    on_a_gpu(monkeypatch, 1000)
    function, calls = getattr(prdp, fails), []

    def short(*arguments, **options):
        calls.append(1)
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments, **options)

    monkeypatch.setattr(prdp, fails, short)
    config = tiny_config(tiny_sd, epochs=1, updates_per_epoch=1,
                         prompts=(str(ROOT / "prompts" / "shapes.txt"),))  # fmt: skip
    left = {"microbatch": 0, "gradient_checkpointing": "auto", "offload": "auto"}
    prdp.run(replace(config, out=str(tmp_path / "run"), **left))
    assert capsys.readouterr().out.count("out of GPU memory; trying the next") == 2
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["microbatch"], record["offload"]) == (8, "on")

    plan = {"microbatch": 8, "gradient_checkpointing": "off", "offload": "on"}
    prdp.run(replace(config, out=str(tmp_path / "asked"), **plan))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "asked")


def test_the_rehearsal_holds_what_a_run_will(tiny_sd, monkeypatch):
    """While pictures are judged and a gradient is taken, room for Adam's two moments and an epoch's
    trajectories; and it leaves weights and gradients as they were."""
    config = tiny_config(tiny_sd, images_per_prompt=4)
    models = prdp.load_models(config, CPU)
    batch = prdp.check_on_policy(config, models, "a cat")
    before = [p.clone() for p in models.sd.unet.parameters()]
    made, counted = [], []

    def noted(function, *arguments, **options) -> Tensor:
        made.append(function(*arguments, **options))
        return made[-1]

    def backward(*arguments) -> None:
        counted.append(sum(x.nbytes for x in made))
        prdp.backward_trajectories(*arguments)

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        counted.append(sum(x.nbytes for x in made))
        assert len(images) == len(batch.latents) and set(prompts) == {"a cat"}
        return torch.zeros(len(images))

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(noted, getattr(torch, name)))
    models = models._replace(reward=prdp.load_reward(judge, "cpu"))
    passes = machine.rehearse(config, models, batch, "a cat", prdp.score_trajectories, backward)
    latents = 3 * 4 * (config.ddpm_steps + 1) * batch.latents[0, 0].numel()
    assert len(counted) == 4  # judged once, and three passes
    assert min(counted) >= 4 * (2 * sum(p.numel() for p in before) + latents)
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
    sd = SimpleNamespace(device=device, at_work=lambda network: torch.no_grad(), vae=vae)
    assert len(StableDiffusion.decode(sd, torch.zeros(10, 3, 2, 2), 32)) == 10
    assert sizes == [4, 4, 2]
    StableDiffusion.decode(sd, torch.zeros(2, 3, 128, 128), 32)  # SDXL's
    assert sizes[3:] == [1, 1]


# ---- benchmarks/memory.py ------------------------------------------------------------------------

SCRIPT = """
import json, sys
from unittest import mock
sys.path.insert(0, "benchmarks")
import memory, prdp, torch
from torch.utils._pytree import tree_map_only

def cpu(x):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), x)

def takes_half(function):
    def call(policy, x_t, prompt_embeds, steps):
        with torch.autocast("fakegpu", enabled=False):
            return function(policy, x_t, prompt_embeds.half(), steps)
    return call

PLANTS = {
    "nothing": ("prdp_loss", lambda function: function),
    "sample": ("guided_sample", lambda function: lambda *x: cpu(function(*x))),
    "a dtype": ("run_unet", takes_half),
    "update": ("backward_trajectories", lambda function: lambda *x: function(*x[:2], cpu(x[2]))),
}
memory.register()
plan = {"microbatch": 2, "gradient_checkpointing": "off", "offload": "on", "dtype": "fp16"}
found = {}
for name, (where, plant) in PLANTS.items():
    with mock.patch.object(prdp, where, plant(getattr(prdp, where))):
        try:
            memory.peaks(memory.TOY / "sd", True, **plan)
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_the_counter_finds_a_tensor_on_another_device_or_of_another_dtype():
    """Planted in each phase of an epoch, on fake tensors of a GPU that does not exist."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("nothing") == ""
    assert all("device" in x or "dtype" in x or "same" in x for x in found.values()), found
