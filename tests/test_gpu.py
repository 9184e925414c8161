"""On a GPU: a start's gap is 0, and in epoch 1 the reference's log-probs are the policy's, in every
number format, compiled, with adapters, with networks moved to the CPU and back."""

import re

import pytest

from conftest import ROOT, metrics_of, needs_gpu

FORMATS = {
    "fp16": ["--dtype", "fp16"],
    "bf16": ["--dtype", "bf16"],
    "tf32": ["--dtype", "tf32"],
    "LoRA": ["--dtype", "fp16", "--lora-rank", "4"],
    "checkpointing, offload": ["--dtype", "fp16", "--gradient-checkpointing", "--offload", "on"],
    "compiled": ["--dtype", "fp16", "--compile"],
}


@needs_gpu
@pytest.mark.parametrize("name", FORMATS)
def test_the_toy_is_on_policy(cli, tmp_path, name):
    """Two epochs: each looks at the gap, and the first at every log-prob of the reference."""
    toy = ["--model", ROOT / "toy" / "sd", "--reward", f"pickscore:{ROOT}/toy/pickscore"]
    code, out, errors = cli(*toy, "--microbatch", 4, *FORMATS[name])
    assert code == 0, out + errors
    gaps = re.findall(r"on-policy gap: (\S+) \(", out)
    assert gaps[-1] == "0.0e+00", gaps
    first, second = metrics_of(tmp_path / "run")
    if name != "compiled":  # where the reference is a program of its own
        assert first["log_ratio_ref"] == 0
    assert first["skipped_fraction"] < 1 and second["log_ratio_ref"] != 0
