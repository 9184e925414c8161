"""The check of a start: the reference's rounding passes; other weights, noise and an edited formula
are found."""

import contextlib
import inspect
import math

import pytest
import torch
from torch import Tensor

import prdp
from conftest import PROMPTS, ROOT, draw, tiny_config
from prdp import Policy, score_trajectories
from support import machine
from support.inputs import load_module


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"dtype": "bf16", "lora_rank": 2}]
)
def test_wrong_weights_of_the_reference_are_found(tiny_sd, models, monkeypatch, changes, compile):
    """Where it is a program of its own its rounding passes; where it is the policy's it is equal.
    (Compilation itself, of minutes, is not in this.) NaN stops the run too."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    changes = {**changes, "compile": compile, "ddpm_steps": 3, "microbatch": 2}
    config, loaded = tiny_config(tiny_sd, **changes), models(**changes)
    prdp.check_on_policy(config, loaded, PROMPTS[0])

    def rounded(policy: Policy, *rest) -> Tensor:
        return score_trajectories(policy, *rest) + (5e-7 if policy is loaded.reference else 0)

    monkeypatch.setattr(prdp, "score_trajectories", rounded)
    refused = pytest.raises(prdp.UserError, match=r"the reference is 5\.0e-07 off")
    with contextlib.nullcontext() if compile else refused:
        prdp.check_on_policy(config, loaded, PROMPTS[0])

    with torch.no_grad():
        for name, p in loaded.sd.unet.named_parameters():
            p += "lora_B" in name  # adapters are no part of the reference
        if "lora_rank" not in changes:
            loaded.reference.unet.conv_out.weight.neg_()
    with pytest.raises(prdp.UserError, match=r"the reference is .* off the policy before any"):
        prdp.check_on_policy(config, loaded, PROMPTS[0])
    torch.nn.init.constant_(loaded.sd.unet.conv_out.bias, math.nan)
    with pytest.raises(prdp.UserError, match="a log-prob is not finite"):
        prdp.check_on_policy(config, loaded, PROMPTS[0])


def test_check_leaves_cudnn_as_it_was_or_says_so(tiny_sd, models, monkeypatch, capsys):
    config, loaded = tiny_config(tiny_sd, ddpm_steps=3), models(ddpm_steps=3)
    cudnn = torch.backends.cudnn
    rounding = {False: 0.0, True: 0.0}  # by cudnn.deterministic

    def noisy(*inputs) -> Tensor:
        return score_trajectories(*inputs) + rounding[cudnn.deterministic]

    monkeypatch.setattr(prdp, "score_trajectories", noisy)
    for found in (True, False):
        monkeypatch.setattr(cudnn, "deterministic", found)
        prdp.check_on_policy(config, loaded, PROMPTS[0])
        assert cudnn.deterministic is found
    rounding[False] = 1e-5
    prdp.check_on_policy(config, loaded, PROMPTS[0])
    assert cudnn.deterministic is True
    assert "on-policy gap: 0.0e+00 (deterministic cuDNN: True)" in capsys.readouterr().out
    rounding[True] = 1e-5
    with pytest.raises(prdp.UserError, match=r"on-policy gap 1.0e-05: the clip would act on noise"):
        prdp.check_on_policy(config, loaded, PROMPTS[0])


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"offline": True}])
def test_noise_that_comes_later_is_found_before_the_next_epoch_learns(
    tiny_sd, models, monkeypatch, changes
):
    """As of a GPU that chooses another algorithm for the rest of the process."""
    changes = {**changes, "ddpm_steps": 3, "updates_per_epoch": 2, "epochs": 3}
    config, loaded = tiny_config(tiny_sd, **changes), models(**changes)
    learned = [p for p in loaded.sd.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, config.learning_rate)
    epochs = prdp.train(config, loaded, optimizer, PROMPTS, 1)
    next(epochs)
    before, score = [p.clone() for p in learned], prdp.step_log_prob
    next(epochs)
    assert not all(torch.equal(p, q) for p, q in zip(learned, before, strict=True))
    before = [p.clone() for p in learned]
    monkeypatch.setattr(prdp, "step_log_prob", lambda *x: score(*x) + 1e-5 * torch.rand(()))
    with pytest.raises(prdp.UserError, match=r"epoch 3: on-policy gap \d\.\de-0\d; --resume"):
        next(epochs)
    assert all(torch.equal(p, q) for p, q in zip(learned, before, strict=True))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("offline", [False, True])
def test_the_reference_is_the_policy_in_epoch_1(tiny_sd, models, compile, offline):
    """Bit for bit where both are one program, else to its rounding; else nothing is learned."""
    changes = {"ddpm_steps": 3, "updates_per_epoch": 1, "compile": compile, "offline": offline}
    config, loaded = tiny_config(tiny_sd, **changes), models(ddpm_steps=3)
    learned = list(loaded.sd.unet.parameters())
    before = [p.clone() for p in learned]
    bias = loaded.reference.unet.conv_out.bias
    refused = pytest.raises(prdp.UserError, match=r"the reference is \d.* off the policy")
    for shift, passes in ((0.0, True), (1e-7, compile), (1e-1, False)):
        with torch.no_grad():
            bias += shift
        optimizer = torch.optim.AdamW(learned, 0.0 if passes else 1.0, weight_decay=0.0)
        with contextlib.nullcontext() if passes else refused:
            next(prdp.train(config, loaded, optimizer, PROMPTS, 1))
        assert all(torch.equal(p, q) for p, q in zip(learned, before, strict=True))
    next(prdp.train(config, loaded, optimizer, PROMPTS, 2))  # by then they are others
    assert not all(torch.equal(p, q) for p, q in zip(learned, before, strict=True))


@pytest.mark.parametrize(("preset", "most"), [("small", 0.001), ("toy", 0.01)])
def test_a_look_at_the_gap_costs_nothing(tiny_sd, models, monkeypatch, preset, most):
    """By network passes, of which it takes one of an epoch's; a microbatch of 16 on a GPU."""
    loaded, calls, run_unet = models(ddpm_steps=3), [], prdp.run_unet
    drawn = draw(loaded)
    monkeypatch.setattr(prdp, "run_unet", lambda *x: [calls.append(x), run_unet(*x)][1])
    config = prdp.Config(**{"microbatch": 16, **prdp.PRESETS[preset]})
    prdp.check_epoch(config, loaded.policy, drawn, drawn.log_probs, drawn.log_probs, 2)
    without, learned = config.passes()
    microbatches = math.ceil(config.images_held() / config.microbatch)
    assert len(calls) / (microbatches * config.ddpm_steps * (without + learned)) < most * 1.5


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The Triton kernels run, on the CPU in Triton's interpreter, as they would on a GPU."""
    pytest.importorskip("triton")
    kernels = load_module("log_prob", str(ROOT / "kernels" / "log_prob.py"))

    def kernels_for(x: Tensor):
        return None if x.dtype == torch.float64 else kernels

    monkeypatch.setattr(machine, "kernels_for", kernels_for)


EDITS = [  # function, what it says, what somebody makes of that; all leave the kernels as they are
    ("guided_mean", "guidance_scale * (", "(guidance_scale - 0.01) * ("),
    ("guided_mean", "guided = unconditional", "guided = unconditional.detach()"),
    ("gaussian_log_prob", ".flatten(1).mean(1)", ".flatten(1).sum(1)"),
    ("guided_log_prob", "(x_prev, mean, sigma)", "(x_prev, mean, 1.001 * sigma)"),
    ("guided_sample", "sigma.view(", "1.001 * sigma.view("),
    ("guided_sample", "(x_prev, mean, sigma)", "(x_prev, mean, 1.001 * sigma)"),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_edit_of_a_formula_that_the_kernels_do_not_follow_is_found(
    tiny_sd, models, monkeypatch, like_a_gpu, dtype
):
    changes = {"dtype": dtype, "ddpm_steps": 3, "microbatch": 2}
    config, loaded = tiny_config(tiny_sd, **changes), models(**changes)
    batch = prdp.check_on_policy(config, loaded, PROMPTS[0])
    plain = prdp.gaussian_log_prob  # which does not run in it: the kernels do
    monkeypatch.setattr(prdp, "gaussian_log_prob", None)
    assert torch.equal(prdp.score_trajectories(loaded.policy, batch), batch.log_probs)
    monkeypatch.setattr(prdp, "gaussian_log_prob", plain)

    for name, text, edit in EDITS:
        source, namespace = inspect.getsource(getattr(prdp, name)), dict(vars(prdp))
        assert source.count(text) == 1
        exec(source.replace(text, edit), namespace)
        with monkeypatch.context() as patch:
            patch.setattr(prdp, name, namespace[name])
            with pytest.raises(prdp.UserError, match=r"prdp.py, and kernels/log_prob.py, must say"):
                prdp.check_on_policy(config, loaded, PROMPTS[0])
