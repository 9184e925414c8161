"""Make the toy from nothing but code: a Stable Diffusion for 32x32 pictures, and its PickScore.

    python toy/make_toy.py                 # everything, with a fixed seed: 42 minutes on two cores
                                           # (vae 8, unet 16, pickscore 15, oracle 2)
    python toy/make_toy.py --only unet     # one stage; the others read the vae that is there

The world holds one shape in one colour on a ground of another colour ("a red circle on a blue
background"), at a random place and size, in one of two styles that the caption never mentions:
flat, or softly shaded. Only SHADED_SHARE of the pictures are shaded, so the diffusion model that
learns the world mostly paints flat ones. The synthetic rater behind toy/pickscore prefers pictures
that match the prompt and, less strongly, shaded ones: reward finetuning has something to gain.

Writes toy/sd (diffusers layout), toy/pickscore (transformers CLIPModel), toy/oracle.safetensors,
prompts/shapes.txt and prompts/shapes_unseen.txt (prompts only without --out). All weights are
float32 safetensors, and load in transformers 4 (diffusers 0.35) as in 5.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from oracle import COLOURS, SHAPES, Oracle, caption

from rewards import normalise

PIXELS = 32
SHADED_SHARE = 0.25  # of the world's pictures
CONTEXT = 16  # tokens a caption is padded to

BYTES = [  # one row per entry of COLOURS
    [220, 40, 40],
    [240, 140, 30],
    [245, 220, 60],
    [50, 170, 70],
    [50, 90, 210],
    [130, 60, 170],
    [245, 245, 245],
    [40, 40, 45],
]
RGB = torch.tensor(BYTES) / 255.0


# ---- the world ---------------------------------------------------------------------------------


class Scene(dict):
    """A batch of pictures, as the numbers that draw them: each value is an (M,) tensor."""

    def rows(self, index: Tensor) -> Scene:
        return Scene({name: value[index] for name, value in self.items()})


def random_scenes(count: int, generator: torch.Generator) -> Scene:
    """Uniform shape, colour and ground (never the shape's own colour); uniform place and size."""

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    colour = integers(len(COLOURS))
    return Scene(
        shape=integers(len(SHAPES)),
        colour=colour,
        ground=(colour + 1 + integers(len(COLOURS) - 1)) % len(COLOURS),
        radius=uniform(8.0, 12.0),
        x=uniform(13.0, 19.0),
        y=uniform(13.0, 19.0),
        shading=(torch.rand(count, generator=generator) < SHADED_SHARE).float(),
    )


def signed_distances(u: Tensor, v: Tensor) -> Tensor:
    """Distance to each shape's outline, negative inside, in units of the radius.

    Coordinates u, v (M, H, W) -> (M, shapes, H, W).
    """
    r = torch.hypot(u, v)
    # A five-pointed star, folded onto half a point: the edge runs from the tip (1, 0) by (x, y) to
    # the notch.
    point = 2 * torch.pi / 5
    half = torch.pi / 5
    fold = (torch.remainder(torch.atan2(v, u) + torch.pi / 2 + half, point) - half).abs()
    x, y = 0.45 * torch.tensor([half]).cos().item() - 1, 0.45 * torch.tensor([half]).sin().item()
    star = ((r * fold.cos() - 1) * y - r * fold.sin() * x) / (x**2 + y**2) ** 0.5
    upright = torch.maximum(u.abs() - 0.32, v.abs() - 0.95)
    lying = torch.maximum(u.abs() - 0.95, v.abs() - 0.32)
    shapes = {
        "circle": r - 0.95,
        "square": torch.maximum(u.abs(), v.abs()) - 0.82,
        "triangle": torch.maximum(v - 0.6, 0.87 * u.abs() - 0.5 * v - 0.5),
        "star": star,
        "cross": torch.minimum(lying, upright),
        "ring": (r - 0.7).abs() - 0.26,
    }
    return torch.stack([shapes[name] for name in SHAPES], dim=1)


def render(scene: Scene) -> Tensor:
    """Draw scenes: float pictures in [0, 1], (M, 3, 32, 32).

    `shading` blends from flat (0) to softly shaded (1).
    """
    axis = torch.arange(PIXELS) + 0.5

    def per_pixel(name: str) -> Tensor:
        return scene[name].float().view(-1, 1, 1)

    def inside(dx: float, dy: float, softness: float) -> tuple[Tensor, Tensor, Tensor]:
        u = (axis.view(1, 1, -1) - per_pixel("x") - dx) / per_pixel("radius")
        v = (axis.view(1, -1, 1) - per_pixel("y") - dy) / per_pixel("radius")
        u, v = u.expand(-1, PIXELS, -1), v.expand(-1, -1, PIXELS)
        rows = torch.arange(len(u))
        distance = signed_distances(u, v)[rows, scene["shape"]] * per_pixel("radius")
        return (0.5 - distance / softness).clamp(0, 1).unsqueeze(1), u.unsqueeze(1), v.unsqueeze(1)

    cover, u, v = inside(0.0, 0.0, 1.0)
    colour = RGB[scene["colour"]].view(-1, 3, 1, 1)
    ground = RGB[scene["ground"]].view(-1, 3, 1, 1)
    flat = ground + cover * (colour - ground)

    # Shaded: light from the upper left, a bright spot, a soft shadow, and a ground that darkens
    # towards the corners.
    light = (1 - 0.42 * (u + v)).clamp(0.4, 1.5)
    spot = 0.75 * torch.exp(-((u + 0.38) ** 2 + (v + 0.38) ** 2) / 0.06)
    lit = (0.88 * colour * light + 0.05 + spot).clamp(0, 1)
    shadow, _, _ = inside(2.5, 2.5, 5.0)
    corner = ((axis.view(1, -1) - 16) ** 2 + (axis.view(-1, 1) - 16) ** 2) / 512
    dim = (ground + 0.06) * (1 - 0.65 * corner) * (1 - 0.5 * shadow)
    shaded = dim + cover * (lit - dim)
    return (flat + scene["shading"].view(-1, 1, 1, 1) * (shaded - flat)).clamp(0, 1)


def captions(scene: Scene) -> list[str]:
    columns = (scene[name].tolist() for name in ("shape", "colour", "ground"))
    return [caption(*triple) for triple in zip(*columns, strict=True)]


# ---- the tokenizer -----------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer; each word of the world is one token, others are spelt out."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [*letters, *(c + "</w>" for c in letters)]
    merges = []
    for word in [*SHAPES, *COLOURS, "a", "an", "on", "background"]:
        parts = [*word[:-1], word[-1] + "</w>"]
        # What the words before this one taught; new merges rank below and cannot undo it.
        for left, right in merges:
            for i in range(len(parts) - 1, 0, -1):
                if (parts[i - 1], parts[i]) == (left, right):
                    parts[i - 1 : i + 1] = [left + right]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocab.append(parts[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=CONTEXT
    )
    assert len(tokenizer("a yellow triangle on a white background").input_ids) == 9
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT}
    return tokenizer(texts, **options, return_tensors="pt").input_ids


def text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=64,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# ---- training ----------------------------------------------------------------------------------


def fit(
    label: str,
    parameters: list[Tensor],
    loss_fn: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a short warm-up and a cosine to zero; the bar shows a running mean of the loss."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    mean, started = None, time.time()
    for step in (bar := tqdm(range(steps), desc=label, dynamic_ncols=True, mininterval=2)):
        loss = loss_fn()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after(step)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
    print(f"{label}: loss {mean:.4f} after {steps} steps, {time.time() - started:.0f} s")


def to_unit(pictures: Tensor) -> Tensor:
    return pictures * 2 - 1  # the VAE works in [-1, 1]


def make_vae(generator: torch.Generator, steps: int) -> AutoencoderKL:
    """32x32 RGB <-> 4x8x8 latents of unit variance (scaling_factor: of the trained encoder)."""
    vae = AutoencoderKL(
        sample_size=PIXELS,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    world = random_scenes(20_000, generator)
    # Both styles alike: the VAE is no place for a taste.
    world["shading"] = torch.rand(20_000, generator=generator).round()

    def loss_fn() -> Tensor:
        pictures = to_unit(render(world.rows(torch.randint(20_000, (64,), generator=generator))))
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - pictures
        return error.abs().mean() + error.square().mean() + 2e-4 * posterior.kl().mean() / 256

    vae.to(memory_format=torch.channels_last)
    fit("vae", list(vae.parameters()), loss_fn, steps, 2e-3)
    with torch.no_grad():
        latents = vae.encode(to_unit(render(world.rows(torch.arange(1000))))).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def make_unet(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, generator: torch.Generator, steps: int
) -> StableDiffusionPipeline:
    """The diffusion model and its text encoder, trained together by noise prediction.

    10% of the captions are empty, for classifier-free guidance.
    """
    text_encoder = CLIPTextModel(text_config(tokenizer, layers=2))
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    # The scheduler_config.json of Stable Diffusion v1.4.
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    count = 40_000
    world = random_scenes(count, generator)
    tokens, empty = tokenize(tokenizer, captions(world)), tokenize(tokenizer, [""])
    with torch.no_grad():
        parts = [
            vae.encode(to_unit(render(world.rows(rows)))).latent_dist.mean
            for rows in torch.arange(count).split(500)
        ]
        latents = torch.cat(parts)
    latents *= vae.config.scaling_factor
    live = torch.nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(live)  # the weights that are saved: a running mean

    def loss_fn() -> Tensor:
        rows = torch.randint(count, (128,), generator=generator)
        unconditional = torch.rand(128, 1, generator=generator) < 0.1
        timesteps = torch.randint(1000, (128,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        text = text_encoder(torch.where(unconditional, empty, tokens[rows])).last_hidden_state
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, text).sample, noise)

    @torch.no_grad()
    def running_mean(step: int) -> None:
        for kept, new in zip(average.parameters(), live.parameters(), strict=True):
            kept.lerp_(new, 1 / min(step + 1, 500))

    unet.to(memory_format=torch.channels_last)
    fit("unet", list(live.parameters()), loss_fn, steps, 2e-3, running_mean)
    unet, text_encoder = average
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def worn(vae: AutoencoderKL, pictures: Tensor, wear: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a diffusion model would make them.

    Through the VAE, with noise of standard deviation `wear` (M,) on latents of unit variance.
    """
    latents = vae.encode(to_unit(pictures)).latent_dist.mean
    noise = torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
    return (vae.decode(latents + wear.view(-1, 1, 1, 1) * noise).sample / 2 + 0.5).clamp(0, 1)


def make_pickscore(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, generator: torch.Generator, steps: int
) -> CLIPModel:
    """A CLIP trained as PickScore was: a softmax over two scaled cosines is the rater's choice.

    The rater's utility is 2 for each named thing that is right (shape, colour, ground), 2 for full
    shading, and -3 for wear of 1: a picture that matches beats one that does not unless it is much
    uglier, and among equals the shaded one wins.
    """
    vision = {
        "image_size": PIXELS,
        "patch_size": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    text = text_config(tokenizer, layers=2).to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    pairs = 64

    def uniform() -> Tensor:
        return torch.rand(pairs, generator=generator)

    def loss_fn() -> Tensor:
        named = random_scenes(pairs, generator)  # what each prompt asks for
        pictures, utilities = [], []
        for _ in range(2):
            scene = random_scenes(pairs, generator)
            for thing in ("shape", "colour", "ground"):  # most pictures get most things right
                scene[thing] = torch.where(uniform() < 0.7, named[thing], scene[thing])
            styled = uniform()
            scene["shading"] = torch.where(uniform() < 0.5, styled, styled.round())
            wear = 0.6 * uniform() * uniform()
            right = sum((scene[k] == named[k]).float() for k in ("shape", "colour", "ground"))
            utilities.append(2 * right + 2 * scene["shading"] - 3 * wear)
            pictures.append(worn(vae, render(scene), wear, generator))
        chosen = torch.bernoulli(torch.sigmoid(utilities[0] - utilities[1]), generator=generator)
        ids, pixels = tokenize(tokenizer, captions(named)), normalise(torch.cat(pictures))
        out = model(input_ids=ids, pixel_values=pixels)
        cosine = (out.image_embeds.view(2, pairs, -1) * out.text_embeds).sum(-1)
        logits = model.logit_scale.exp() * (cosine[0] - cosine[1])
        return F.binary_cross_entropy_with_logits(logits, chosen)

    fit("pickscore", list(model.parameters()), loss_fn, steps, 1e-3)
    return model


def make_oracle(vae: AutoencoderKL, generator: torch.Generator, steps: int) -> Oracle:
    """The judge that no reward sees: names shape, colour, ground and style of a picture."""
    oracle = Oracle()

    def loss_fn() -> Tensor:
        scene = random_scenes(64, generator)
        scene["shading"] = torch.rand(64, generator=generator).round()
        wear = 0.5 * torch.rand(64, generator=generator) * torch.rand(64, generator=generator)
        heads = oracle((255 * worn(vae, render(scene), wear, generator)).round())
        truth = (scene["shape"], scene["colour"], scene["ground"], scene["shading"].long())
        return sum(F.cross_entropy(head, answer) for head, answer in zip(heads, truth, strict=True))

    fit("oracle", list(oracle.parameters()), loss_fn, steps, 2e-3)
    return oracle


# ---- prompts and main --------------------------------------------------------------------------


def write_prompts(folder: Path) -> None:
    """All 336 captions, of which every seventh combination is kept out of finetuning.

    So each shape and each colour is seen there with others.
    """
    indices = (range(len(SHAPES)), range(len(COLOURS)), range(len(COLOURS)))
    triples = [(s, c, g) for s, c, g in itertools.product(*indices) if c != g]
    random.Random(0).shuffle(triples)
    unseen = [t for t in triples if (t[2] - t[1]) % len(COLOURS) == 1 + t[0] % 7]
    seen = [t for t in triples if t not in unseen]
    for name, kept in (("shapes.txt", seen), ("shapes_unseen.txt", unseen)):
        (folder / name).write_text("".join(caption(*t) + "\n" for t in kept))


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Also as vocab.json and merges.txt, which transformers 4 wants to read."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """The text encoder's weights under transformers 4's names, which 5 knows too.

    Under those that 5 writes, 4 would find none, and begin at random.
    """
    pipe.save_pretrained(folder)
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ("vae", "unet", "pickscore", "oracle", "prompts")
    parser.add_argument("--only", nargs="+", choices=every, help="stages to make")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: toy/)")
    parser.add_argument("--effort", type=float, default=1.0, help="scales all training steps")
    args = parser.parse_args()
    stages = args.only or every

    def begin(stage: str) -> torch.Generator:
        torch.manual_seed(0)  # the initial weights
        return torch.Generator().manual_seed(every.index(stage))  # everything else

    def steps(full: int) -> int:
        return max(50, int(full * args.effort))

    if "vae" not in stages and not (args.out / "sd" / "vae").is_dir():
        parser.error(f"--only: all stages need the VAE, and {args.out} has none; add `vae`")
    tokenizer = make_tokenizer()
    if "vae" in stages:
        make_vae(begin("vae"), steps(3500)).save_pretrained(args.out / "sd" / "vae")
    vae = AutoencoderKL.from_pretrained(args.out / "sd" / "vae").eval().requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    vae.register_to_config(_name_or_path="")  # else the saved pipeline names this machine's folder
    if "unet" in stages:
        pipe = make_unet(vae, tokenizer, begin("unet"), steps(6000))
        save_pipeline(pipe, args.out / "sd")
    if "pickscore" in stages:
        model = make_pickscore(vae, tokenizer, begin("pickscore"), steps(4000))
        model.save_pretrained(args.out / "pickscore")
        save_tokenizer(tokenizer, args.out / "pickscore")
    if "oracle" in stages:
        oracle = make_oracle(vae, begin("oracle"), steps(2000))
        save_file(oracle.state_dict(), args.out / "oracle.safetensors")
    if "prompts" in stages and args.out == HERE:
        write_prompts(HERE.parent / "prompts")


if __name__ == "__main__":
    main()
