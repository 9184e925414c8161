"""What prdp.py would do on a card, and how long it would take: before anything is downloaded.

    python benchmarks/plan.py                         # this machine's GPU; without one, every card
    python benchmarks/plan.py --gb 24 --lora-rank 8   # cards of 24 GB, and any flags of prdp.py

The plan is the one that prdp.py chooses by free memory, and weights are not read. Times are
estimates, +- 25%: the passes of an epoch over rates of which only the H200's was measured; a run
times its own passes when it starts, and its forecast counts.
"""

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from shared import table

import prdp
from stable_diffusion import StableDiffusion, latent_shape, read_configs
from support import machine
from support.cli import Parser, UserError, command

# GB that are free with CUDA's context taken off, and TFLOP/s of the UNet in 16 bit, by eager
# PyTorch: an H200's as measured (README.md), the others' by a roofline of its operators.
CARDS = {
    "T4": (15.6, 11.3),
    "RTX 3090": (25.3, 25),
    "RTX 4090": (25.3, 49),
    "RTX 5090": (33.7, 70),
    "L40S": (47.8, 62),
    "A100 40GB": (42.4, 75),
    "A100 80GB": (85.0, 86),
    "H100": (85.0, 205),
    "H200": (150.2, 226),
}
SD14 = (3.44, 64 * 64)  # GB of its UNet's weights in float32; places of its latents
SIZES = {prdp.Config.model: SD14, "stabilityai/stable-diffusion-xl-base-1.0": (10.27, 128 * 128)}
TFLOP = 1.606  # of an image and step through it: two samples, for guidance
COMPILED = 1.45  # times as fast
SKIPPED = 0.2  # of the entries of an epoch's updates, where K > 1


@functools.cache
def size_of(model: str) -> tuple[float, int]:
    """GB of a UNet's weights, and places of its latents; UserError for another model of the hub."""
    if model in SIZES:
        return SIZES[model]
    if not Path(model).is_dir():
        raise UserError(f"--model {model}: is no folder, and nothing is downloaded here.")
    _, height, width = latent_shape(read_configs(model)[1]["unet"])
    return StableDiffusion.weights_gigabytes(model), height * width


def chosen(config: prdp.Config, free: float) -> prdp.Config:
    """The settings that prdp.py would begin with where so many GB are free; UserError for none."""
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "mem_get_info", lambda: (free * 1e9, free * 1e9)),
    ):
        return machine.plans(config, lambda model: size_of(model)[0])[0]


def epoch_hours(config: prdp.Config, rate: float) -> float:
    """Network passes of an epoch over TFLOP/s. A pass with gradient costs as much as 3.07 without,
    2.22 with adapters alone, and one more where activations are recomputed (counted)."""
    without, learned = config.passes()
    cost = 2.22 if config.lora_rank else 3.07
    cost += config.gradient_checkpointing == "on"
    if config.updates_per_epoch > 1:
        learned *= 1 - SKIPPED
    gigabytes, places = size_of(config.model)
    # Counted for SD v1.4, SD 2.1 of 768x768 and SDXL's base.
    size = (gigabytes / SD14[0]) ** 0.41 * (places / SD14[1]) ** 1.21
    image_steps = config.prompts_per_epoch * config.images_per_prompt * config.ddpm_steps
    rate *= COMPILED if config.compile else 1
    return image_steps * size * TFLOP * (without + cost * learned) / rate / 3600


def row(config: prdp.Config, card: str, free: float, rate: float) -> list[str]:
    """Cells of a card: plan, GB that it takes, hours an epoch, days of all epochs."""
    if config.dtype == "auto":
        config = replace(config, dtype="fp16")  # in bf16 memory and times are the same
    try:
        config = chosen(config, free)
    except UserError as error:
        return [card, f"none: {error}"]
    plan = ", ".join(str(getattr(config, name)) for name in machine.PLAN)
    needed = machine.needed_gigabytes(config, size_of(config.model)[0])
    times = ["", ""]
    if config.dtype in machine.FORMATS and rate:
        hours = epoch_hours(config, rate)
        days = config.epochs * hours / 24
        times = [f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (hours, days)]
    fits = needed < machine.SPARE * free  # else it was named, and not chosen
    return [card, plan if fits else f"{plan}: does not fit", f"{needed:.1f}", *times]


def cards(gb: float | None) -> Iterator[tuple[str, float, float]]:
    """(name, free GB, TFLOP/s) of cards of so many GB, of this machine's, or of all."""
    if gb is None and torch.cuda.is_available():
        name, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] / 1e9
        words = {word.removesuffix("GB") for word in re.split(r"\W+", name)}
        rates = [
            rate
            for card, (_, rate) in CARDS.items()
            if words >= set(card.removesuffix("GB").split())
        ]
        yield name, free, rates[0] if rates else 0.0
        return
    for name, (free, rate) in CARDS.items():
        if gb is None or 0 <= gb * 2**30 / 1e9 - free < 0.11 * free:
            yield name, free, rate
    if gb is not None:
        yield f"any of {gb:g} GB", gb * 2**30 / 1e9 - 0.6, 0.0  # its context


def main() -> None:
    with command("benchmarks/plan.py"):
        parser = Parser(description=__doc__)
        parser.add_argument("--gb", type=float)
        parser.add_argument("--dtype", default="auto", choices=("auto", *machine.ROUNDING))
        options, flags = parser.parse_known_args(sys.argv[1:])
        if options.gb is not None and not 0 < options.gb < 2**20:
            parser.error(f"--gb {options.gb}: must be a card's GB")
        config = replace(prdp.parse_args(flags), dtype=options.dtype)
        size_of(config.model)  # of another model of the hub this ends here
        print_row = table(
            f"plans, and estimates +- 25% of {config.epochs} epochs", "card",
            "microbatch, checkpointing, offload", "GB", "hours an epoch", "days",
        )  # fmt: skip
        for card in cards(options.gb):
            print_row(*row(config, *card))


if __name__ == "__main__":
    main()
