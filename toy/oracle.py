"""The toy's judge, which no reward ever sees: is a picture what its prompt names, and is it shaded?

python toy/oracle.py             # the base model, on the prompts of finetuning and those kept out
python toy/oracle.py runs/toy    # the same for base and finetuned model, on the same seeds
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")


def caption(shape: int, colour: int, ground: int) -> str:
    """The one sentence form of the toy's world, from indices into SHAPES and COLOURS."""
    inner, outer = (
        f"an {COLOURS[i]}" if COLOURS[i] == "orange" else f"a {COLOURS[i]}"
        for i in (colour, ground)
    )
    return f"{inner} {SHAPES[shape]} on {outer} background"


class Oracle(nn.Module):
    """Uint8 pictures (M, 3, 32, 32) -> logits (M, 6), (M, 8), (M, 8), (M, 2).

    Over the shape, its colour, the ground's colour, and whether it is shaded.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for fan_in, fan_out in ((3, 16), (16, 32), (32, 48), (48, 64)):
            convolution = nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(8, fan_out), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        answers = (len(SHAPES), len(COLOURS), len(COLOURS), 2)
        self.heads = nn.ModuleList(nn.Linear(64 * 4, n) for n in answers)

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
    """(match, shaded), each (M,) bool: is all as named; is it the shaded style?"""
    shape, colour, ground, shaded = (head.argmax(1) for head in oracle(pictures.cpu()))
    triples = zip(shape.tolist(), colour.tolist(), ground.tolist(), strict=True)
    seen = [caption(*triple) for triple in triples]
    return torch.tensor([a == b for a, b in zip(seen, prompts, strict=True)]), shaded.bool()


def main(argv: list[str] | None = None) -> None:
    sys.path.insert(0, str(HERE.parent))
    import prdp
    from evaluate import find_model
    from support.cli import Parser, UserError, command

    parser = Parser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run folder of a toy run")
    parser.add_argument("--images-per-prompt", type=int, default=4)
    with command("oracle.py"):
        args = parser.parse_args(argv)
        count = args.images_per_prompt
        if count < 2:
            raise UserError(f"--images-per-prompt {count}: must be at least 2.")
        folders = {"base": HERE / "sd"}
        if args.run:
            if not (args.run / "pipeline").is_dir():
                raise UserError(f"{args.run}: no pipeline/ there; it is written when a run ends.")
            find_model(str(args.run))  # refuses a pipeline of an earlier epoch
            folders["finetuned"] = args.run / "pipeline"
        oracle = load_oracle()
        print(f"{'prompts':<18}{'model':<11}{'images':>6}{'reward':>17}{'match':>17}{'shaded':>17}")
        for file, every in (("shapes.txt", 6), ("shapes_unseen.txt", 1)):
            prompts = prdp.load_prompts(HERE.parent / "prompts" / file)[::every]
            of_each = [prompt for prompt in prompts for _ in range(count)]
            for name, folder in folders.items():
                flags = ["--preset", "toy", "--model", str(folder)]
                config = prdp.parse_args([*flags, "--prompts-per-epoch", str(len(prompts))])
                models = prdp.load_models(config, torch.device("cpu"), learns=False)
                noise = prdp.image_generators(config.seed, 0, range(len(prompts)), count)
                drawn = prdp.sample_prompts(models, models.policy, prompts, noise)
                images, rewards, _ = prdp.score_images(models, drawn.latents[:, -1], of_each)
                columns = [x.double() for x in (rewards, *judge(oracle, images, of_each))]
                cells = [f"{x.mean():.3f} +- {x.std() / len(x) ** 0.5:.3f}" for x in columns]
                line = f"{file:<18}{name:<11}{len(of_each):>6}"
                print(line + "".join(f"{cell:>17}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
