"""The toy's judge, which no reward ever sees: does a picture show what its prompt names, and is it shaded?

python toy/oracle.py                   # the base model, on the prompts of finetuning and on those kept out of it
python toy/oracle.py runs/toy          # the same for base and finetuned model, on the same seeds
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")


def caption(shape: int, colour: int, ground: int) -> str:
    """The one sentence form of the toy's world, from indices into SHAPES and COLOURS."""
    article, ground_article = ("an" if COLOURS[i] == "orange" else "a" for i in (colour, ground))
    return f"{article} {COLOURS[colour]} {SHAPES[shape]} on {ground_article} {COLOURS[ground]} background"


class Oracle(nn.Module):
    """Uint8 pictures (M, 3, 32, 32) -> logits over shape (M, 6), colour (M, 8), ground (M, 8), shaded (M, 2)."""

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for fan_in, fan_out in ((3, 16), (16, 32), (32, 48), (48, 64)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.GroupNorm(8, fan_out), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(64 * 4, n) for n in (len(SHAPES), len(COLOURS), len(COLOURS), 2))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        features = self.trunk(pictures.float() / 127.5 - 1)
        return [head(features) for head in self.heads]


def load_oracle() -> Oracle:
    from safetensors.torch import load_file

    oracle = Oracle().eval()
    oracle.load_state_dict(load_file(HERE / "oracle.safetensors"))
    return oracle


@torch.no_grad()
def judge(oracle: Oracle, pictures: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """(match, shaded), each (M,) bool: are shape, colour and ground all as named; is it the shaded style?"""
    shape, colour, ground, shaded = (head.argmax(1) for head in oracle(pictures.cpu()))
    seen = [caption(*triple) for triple in zip(shape.tolist(), colour.tolist(), ground.tolist(), strict=True)]
    return torch.tensor([a == b for a, b in zip(seen, prompts, strict=True)]), shaded.bool()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder of a toy run")
    parser.add_argument("--images-per-prompt", type=int, default=4)
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(HERE.parent))
    import prdp

    if args.images_per_prompt < 2:
        parser.exit(2, f"oracle.py: --images-per-prompt {args.images_per_prompt}: must be at least 2.\n")
    if args.run and not (args.run / "pipeline").is_dir():
        parser.exit(2, f"oracle.py: {args.run}: no pipeline/ there; it is written when a run ends.\n")
    oracle = load_oracle()
    print(f"{'prompts':<18}{'model':<11}{'images':>6}{'reward':>17}{'match':>17}{'shaded':>17}")
    for file in ("shapes.txt", "shapes_unseen.txt"):
        prompts = prdp.load_prompts(str(HERE.parent / "prompts" / file))[:: 6 if file == "shapes.txt" else 1]
        folders = [("base", HERE / "sd")]
        if args.run:
            folders.append(("finetuned", args.run / "pipeline"))
        for name, folder in folders:
            flags = ["--preset", "toy", "--model", str(folder)]
            config = prdp.parse_args([*flags, "--prompts-per-epoch", str(len(prompts))])
            models = prdp.load_models(config, torch.device("cpu"))
            count = args.images_per_prompt
            generators = prdp.image_generators(config.seed, 0, range(len(prompts)), count)
            trajectories = prdp.sample_prompts(models, models.policy, prompts, generators)
            images = prdp.decode(models, trajectories.latents[:, -1])
            each = [p for p in prompts for _ in range(count)]
            columns = [models.reward(images, each), *judge(oracle, images, each)]
            columns = [column.double() for column in columns]
            figures = [f"{x.mean():.3f} +- {x.std() / len(x) ** 0.5:.3f}" for x in columns]
            print(f"{file:<18}{name:<11}{len(each):>6}" + "".join(f"{figure:>17}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
