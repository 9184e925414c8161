"""Score pictures by hand, one at a time.

python examples/score_pictures.py --reward hpsv2 --prompt "a cat" cat.png dog.png
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines.pairs import read_picture
from rewards import load_reward
from support.cli import Parser, command


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("pictures", nargs="+", metavar="FILE")
    parser.add_argument("--reward", required=True, nargs="+", help="as in prdp.py")
    parser.add_argument("--prompt", default="", help="of all of them (default: an empty one)")
    with command("examples/score_pictures.py"):
        args = parser.parse_args(argv)
        reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        print("".join(f"{name:>18}" for name in (*reward.components, "sum")) + "  picture")
        for file in args.pictures:
            picture = read_picture(file, "picture").to(reward.device)
            total, parts = reward.score(picture[None], [args.prompt])
            row = [score.item() for score in (*parts.values(), total)]
            print("".join(f"{score:>18.6g}" for score in row) + f"  {file}")


if __name__ == "__main__":
    main()
