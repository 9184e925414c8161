"""Peak memory of a run at SD v1.4's and HPSv2's size, counted on a GPU that does not exist: without
a GPU and without weights, in minutes on any CPU.

    python benchmarks/memory.py           # the table of docs/running.md
    python benchmarks/memory.py --sdxl    # of SDXL's base, with HPSv2
    python benchmarks/memory.py --quick   # the toy's networks, in seconds

prdp.py's own code runs on fake tensors, which have a device, a dtype and a shape, but no content:
loading, and two epochs of `train`, the second beside Adam's moments, each of two updates and two
denoising steps. So a tensor on another device or of another dtype ends it with an error, and the
sizes of the tensors alive add up to what a GPU's allocator would have to hold.
"""

import itertools
import math
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from shared import TOY, sd_v1_4, sdxl, table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

import prdp
import stable_diffusion
from rewards import clean_text, cosine_scorer, preprocess_hpsv2, vit_h_14_config
from support.cli import Parser, command
from support.inputs import load_tokenizer
from support.machine import PLANS

aten = torch.ops.aten
GPU = "fakegpu"

# ---- A GPU that does not exist -------------------------------------------------------------------


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


# Of CUDA's autocast, the operators of these networks: in 16 bits, and in float32.
AUTOCAST = dict.fromkeys(
    ("linear", "conv2d", "matmul", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"), True
) | dict.fromkeys(("group_norm", "layer_norm", "softmax.int"), False)
CASTS: dict[int, Tensor] = {}  # of weights that learn, as long as autocast keeps them


def cast(x: object, dtype: torch.dtype) -> object:
    """An operand as autocast casts it."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.dtype in (torch.float64, dtype):
        return x
    if dtype == torch.float32 or not (x.is_leaf and x.requires_grad):
        return x.to(dtype)
    if id(x) not in CASTS:
        CASTS[id(x)] = x.to(dtype)
    return CASTS[id(x)]


def casting(operator: Callable, half: bool) -> Callable:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args, **options):
        dtype = torch.get_autocast_dtype(GPU) if half else torch.float32
        options = {name: cast(x, dtype) for name, x in options.items()}
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*[cast(x, dtype) for x in args], **options)

    return call


def attention(query, key, value, mask=None, dropout=0.0, causal=False, **options) -> Tensor:
    """The kernel that a GPU would choose."""
    if query.dtype == torch.float32 or mask is not None:
        keeps = torch.is_grad_enabled()
        step = (query, key, value, mask, keeps, 0.0, causal)
        return aten._scaled_dot_product_efficient_attention(*step)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[0]


LIBRARIES = []  # alive as long as the device


def register() -> None:
    """Make the device `fakegpu` in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    _setup_privateuseone_for_python_backend(GPU, Backend())
    every, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name, half in AUTOCAST.items():
        operator = getattr(aten, name.split(".")[0])
        ours.impl(name, casting(operator, half), "AutocastPrivateUse1")
    ours.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    torch.clear_autocast_cache = CASTS.clear
    LIBRARIES.extend([every, ours])


class Memory(TorchDispatchMode):
    """Counts the bytes of storages alive on the device; and answers what depends on content as a
    run would that goes well: every entry is learned from, every number is finite."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.seen = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), options=None):
        if operator is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if operator is aten.equal.default:
            return True
        if operator is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if any(type(x) is Tensor for x in args):  # from outside of the mode
            args = tree_map_only(Tensor, self.fake_one, args)
        made = operator(*args, **(options or {}))
        for x in tree_leaves(made):
            if torch.is_tensor(x) and x.device.type == GPU:
                self.count(x.untyped_storage())
        return made

    def fake_one(self, x: Tensor) -> Tensor:
        return self.fake.from_tensor(x) if type(x) is Tensor else x

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        self.now -= size


# ---- A run on it ---------------------------------------------------------------------------------


def move(network: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, which cannot move fake weights."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(function(p.detach()), p.requires_grad)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = function(x)
    return network


def materialise(make: Callable[[], nn.Module]) -> nn.Module:
    """A network of fake weights, on the CPU."""
    with unset_fake_temporarily(), torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu").eval().requires_grad_(False)


def load_network(what: str, kind: type, folder: Path, **options) -> nn.Module:
    """As support/inputs.py's, of a config alone."""
    if hasattr(kind, "load_config"):
        return materialise(partial(kind.from_config, kind.load_config(folder, **options)))
    return materialise(partial(kind, kind.config_class.from_pretrained(folder, **options)))


def write_configs(make: Callable, folder: Path) -> None:
    """A pipeline without weights."""
    with torch.device("meta"):
        pipe = make()
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if name.startswith("text"):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, nn.Module):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def load_reward(quick: bool, device: str) -> Callable:
    """HPSv2 without weights."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(TOY / "pickscore") if quick else vit_h_14_config()
    tokenizer = load_tokenizer("hpsv2", str(TOY / "sd/tokenizer"), config.text_config.vocab_size)
    model = materialise(partial(CLIPModel, config)).to(device)
    return cosine_scorer(model, tokenizer, preprocess_hpsv2, clean_text)


def schedule(scheduler_config: dict, num_steps: int) -> prdp.Schedule:
    """As `ddpm_schedule`'s, without content."""
    columns = [torch.empty(num_steps, dtype=torch.float64) for _ in range(3)]
    return prdp.Schedule(torch.empty(num_steps, dtype=torch.int64), *columns)


def peaks(folder: Path, quick: bool, **settings) -> dict[str, float]:
    """GB at the most in each phase of two epochs."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    found, memory = {}, Memory(fake)
    config = prdp.Config(model=str(folder), epochs=2, updates_per_epoch=2, ddpm_steps=2, **settings)
    config = replace(config, prompts_per_epoch=1, images_per_prompt=max(2, config.microbatch))

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        memory.peak = memory.now
        yield
        found[name] = max(found.get(name, 0), memory.peak / 1e9)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(prdp, "phase", phase))
        stack.enter_context(mock.patch.object(prdp, "ddpm_schedule", schedule))
        stack.enter_context(mock.patch.object(prdp, "check_epoch", lambda *_: None))  # of content
        stack.enter_context(mock.patch.object(nn.Module, "_apply", move))
        stack.enter_context(mock.patch.object(stable_diffusion, "load_network", load_network))
        stack.enter_context(fake)
        stack.enter_context(memory)
        reward = load_reward(quick, "cpu" if config.offload == "on" else GPU)
        models = prdp.load_models(config, torch.device(GPU), reward)
        if config.gradient_checkpointing == "on":  # the state of a generator has no content here
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            models.sd.unet.enable_gradient_checkpointing(again)
        learned = [p for p in models.sd.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, fused=True)  # as on a GPU
        # Of 512 images trajectories of 50 steps and prompt embeddings; their pictures.
        numbers = 51 * math.prod(models.sd.latent_shape) + models.policy.null_embeds.numel()
        pictures = 3 * 64 * math.prod(models.sd.latent_shape[1:])
        held = 0 if quick else 512 * (4 * numbers + pictures)
        held = torch.empty(held, dtype=torch.uint8, device=GPU)
        list(prdp.train(config, models, optimizer, ["a cat", "a dog"], 1))
        del held
    return found


# ---- Main ----------------------------------------------------------------------------------------

PHASES = ("sample", "reward", "reference", "score", "update")


def cells(folder: Path, quick: bool, rank: int, dtype: str, plan: tuple) -> list[str]:
    """A row of the table."""
    microbatch, checkpointing, offload = plan
    settings = {"microbatch": microbatch, "gradient_checkpointing": checkpointing}
    settings |= {"offload": offload, "lora_rank": rank, "dtype": dtype}
    found = peaks(folder, quick, **settings)
    sizes = [found[name] for name in PHASES]
    learns = f"LoRA of rank {rank}" if rank else "the full UNet"
    decimals = 3 if quick else 1
    return [learns, dtype, *plan, *(f"{x:.{decimals}f}" for x in (*sizes, max(sizes)))]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the toy's networks")
    parser.add_argument("--sdxl", action="store_true", help="SDXL's base in place of SD v1.4")
    parser.add_argument(
        "--processes", type=int, default=2, help="rows counted at once (default: 2)"
    )
    with command("benchmarks/memory.py"), tempfile.TemporaryDirectory() as name:
        options = parser.parse_args(sys.argv[1:])
        folder, plans = TOY / "sd", [PLANS[2], PLANS[5]]
        if not options.quick:
            folder, plans = Path(name), [plan for plan in PLANS if plan != (2, "on", "on")]
            write_configs(sdxl if options.sdxl else sd_v1_4, folder)
        row = table("peak GB, counted", "learns", "passes in", "microbatch", "checkpointing",
                    "offload", *PHASES, "at the most")  # fmt: skip
        settings = list(itertools.product((0, 8), ("fp16", "tf32"), plans))
        count = partial(cells, folder, options.quick)
        with ProcessPoolExecutor(options.processes, get_context("spawn"), register) as pool:
            for found in pool.map(count, *zip(*settings, strict=True)):
                row(*found)


if __name__ == "__main__":
    main()
