"""baselines/rwr.py and diffusion_dpo.py: weights, pairs and losses by hand, an epoch's updates in
one graph each, runs that go on, several processes, people's files."""

import itertools
import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import prdp
from baselines import diffusion_dpo, rwr
from baselines.pairs import People
from conftest import CPU, PROMPTS, assert_same_run, call, checkpoint, contents, gradient_of
from conftest import metrics_of, only_sentence, override, small_run, tiny_config, two_processes
from rewards import load_reward
from support.cli import UserError

PROGRAMS = {"rwr": rwr, "diffusion_dpo": diffusion_dpo}


def brightness(images, prompts):
    return images.double().mean((1, 2, 3))


def tiny(kind: type, tiny_sd: str, **changes):
    settings = {"updates_per_epoch": 3, "epochs": 1, "learning_rate": 1e-4, "batch_size": 8}
    return kind(**{**vars(tiny_config(tiny_sd)), **settings, **changes})


def alpha_bars() -> torch.Tensor:
    """SD v1.4's, for 1,000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


# ---- Weights, pairs, losses ----------------------------------------------------------------------


def test_weights_by_hand():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, generator=g)
    soft, sparse = rwr.rwr_weights(rewards, 3.0), rwr.sparse_weights(rewards, 0.75)
    exps = [math.exp(3 * reward) for reward in rewards.tolist()]
    threshold = np.percentile(rewards.tolist(), 75)
    assert 0 < sparse.sum() < 40
    for i, reward in enumerate(rewards.tolist()):
        assert soft[i].item() == pytest.approx(exps[i] / statistics.fmean(exps), rel=1e-6)
        assert sparse[i] == float(reward >= threshold)


def test_pairs_by_hand():
    rewards = torch.tensor([1.0, 3.0, 1.0, 0.0, 0.0, 0.0, 5.0, 4.0, 6.0])
    expected = {
        (3 * n + a, 3 * n + b)
        for n, a, b in itertools.product(range(3), range(3), range(3))
        if rewards[3 * n + a] > rewards[3 * n + b]
    }
    found = diffusion_dpo.ranked_pairs(rewards, 3).tolist()
    assert {tuple(pair) for pair in found} == expected and len(found) == 5


def test_eq_14_by_hand():
    g = torch.Generator().manual_seed(0)
    error, error_ref = (torch.rand(6, 2, generator=g, dtype=torch.float64) for _ in range(2))
    ours = diffusion_dpo.diffusion_dpo_loss(error, error_ref, 30.0)
    for m in range(6):
        (won, lost), (won_ref, lost_ref) = error[m].tolist(), error_ref[m].tolist()
        inside = -0.5 * 30 * ((won - won_ref) - (lost - lost_ref))
        assert ours[m].item() == pytest.approx(math.log1p(math.exp(-inside)), rel=1e-12)
    leaf = error.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: diffusion_dpo.diffusion_dpo_loss(x, error_ref, 30.0), leaf
    )


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_denoising_errors_by_hand(models, predicts):
    """x_t from the schedule itself; guided for RWR, both of a pair alike for Diffusion-DPO."""
    loaded = models()
    scheduler, policy = loaded.sd.pipe.scheduler, loaded.policy
    scheduler.register_to_config(prediction_type=predicts)
    g = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(3, 2, 4, 8, 8, generator=g), torch.randn(3, 4, 8, 8, generator=g)
    text, t = loaded.sd.encode(PROMPTS), torch.tensor([0, 500, 999])
    pairs = diffusion_dpo.denoising_errors(policy, scheduler, x_0, text, t, noise)
    guided = rwr.denoising_error(policy, scheduler, x_0[:, 0], text, t, noise)
    for m, side in itertools.product(range(3), range(2)):
        a = alpha_bars()[t[m]]
        x_t = (a.sqrt() * x_0[m, side] + (1 - a).sqrt() * noise[m]).float()
        target = noise[m]
        if predicts == "v_prediction":
            target = a.sqrt() * noise[m] - (1 - a).sqrt() * x_0[m, side]
        both = torch.stack([policy.null_embeds, text[m]])
        u, c = policy.unet(x_t.expand(2, -1, -1, -1), t[m], encoder_hidden_states=both).sample
        expected = (c - target).square().mean().item()
        assert pairs[m, side].item() == pytest.approx(expected, rel=1e-4)
        if side == 0:
            expected = (u + 5 * (c - u) - target).square().mean().item()
            assert guided[m].item() == pytest.approx(expected, rel=1e-4)


# ---- An epoch ------------------------------------------------------------------------------------


def page(config, models: prdp.Models, optimizer, epoch: int) -> list[float]:
    """An epoch by the letter, one graph an update: gradient norms."""
    policy, reference, norms = models.policy, models.reference, []
    drawn = prdp.draw_prompts(config, PROMPTS, epoch)
    texts = [prompt for prompt in drawn for _ in range(4)]
    noise = prdp.image_generators(config.seed, epoch, range(3), 4)
    sampler = reference if name_of(config) == "diffusion_dpo" and not config.online else policy
    x_0 = prdp.sample_prompts(models, sampler, texts, noise).latents[:, -1]
    rewards = brightness(models.sd.decode(x_0, 6), []).tolist()
    text = models.sd.encode(texts)

    def error(chain, image: int, t, eps, guidance: float):
        a = alpha_bars()[t]
        x_t = (a.sqrt() * x_0[image] + (1 - a).sqrt() * eps).float().expand(2, -1, -1, -1)
        both = torch.stack([policy.null_embeds, text[image]])
        u, c = chain.unet(x_t, t, encoder_hidden_states=both).sample.double()
        return (u + guidance * (c - u) - eps).square().mean()

    if isinstance(config, rwr.Config):
        of_prompt = [[j for j in range(12) if texts[j] == texts[i]] for i in range(12)]
        exps = [math.exp(config.inverse_temperature * r) for r in rewards]
        weights = [exps[i] / statistics.fmean(exps[j] for j in of_prompt[i]) for i in range(12)]
        if config.weighting == "sparse":
            weights = []
            for i in range(12):
                best = np.percentile([rewards[j] for j in of_prompt[i]], 100 * config.percentile)
                weights.append(float(rewards[i] >= best))
        pool = torch.tensor([i for i in range(12) if weights[i] > 0])
    else:  # of Diffusion-DPO, and of its supervised control
        pairs = [
            (4 * n + a, 4 * n + b)
            for n, a, b in itertools.product(range(3), range(4), range(4))
            if rewards[4 * n + a] > rewards[4 * n + b]
        ]
        pool = torch.arange(len(pairs))
    for k, (members, steps, epsilon) in enumerate(rwr.batches(config, epoch, pool, models.sd)):
        terms = []
        for m, t, eps in zip(members.tolist(), steps, epsilon, strict=True):
            if isinstance(config, rwr.Config):
                terms.append(weights[m] * error(policy, m, t, eps, 5.0))
                continue
            won, lost = pairs[m]
            made = 3 * (epoch - 1) + k + 1
            optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, made / config.warmup)
            if config.loss == "sft":
                terms.append(error(policy, won, t, eps, 1.0))
                continue
            fixed = error(reference, won, t, eps, 1.0) - error(reference, lost, t, eps, 1.0)
            now = error(policy, won, t, eps, 1.0) - error(policy, lost, t, eps, 1.0)
            rise = now - fixed.detach()
            terms.append(-torch.log(torch.sigmoid(-config.beta / 2 * rise)))
        optimizer.zero_grad()
        torch.stack(terms).mean().backward()
        norms.append(gradient_of(policy.unet).norm().item())
        torch.nn.utils.clip_grad_norm_(policy.unet.parameters(), config.max_grad_norm)
        optimizer.step()
    return norms


def name_of(config) -> str:
    return type(config).__module__.rpartition(".")[2]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("rwr", {"inverse_temperature": 2.0}),
        ("rwr", {"weighting": "sparse", "percentile": 0.5}),
        ("diffusion_dpo", {"warmup": 5, "beta": 50.0}),
        ("diffusion_dpo", {"warmup": 5, "beta": 50.0, "online": True}),
        ("diffusion_dpo", {"warmup": 5, "loss": "sft"}),
    ],
)
def test_train_is_the_papers_page(tiny_sd, name, own):
    """Two epochs: offline Diffusion-DPO draws from the pretrained model in the second too."""
    module = PROGRAMS[name]
    config = tiny(module.Config, tiny_sd, epochs=2, **own)
    ours, theirs = (prdp.load_models(config, CPU, brightness) for _ in range(2))
    optimizer, other = (
        torch.optim.AdamW(models.policy.unet.parameters(), config.learning_rate)
        for models in (ours, theirs)
    )
    rest = () if name == "rwr" else (None,)
    for epoch, row in enumerate(module.train(config, ours, optimizer, PROMPTS, 1, *rest), 1):
        norms = page(config, theirs, other, epoch)
        assert row["grad_norm"] == pytest.approx(np.mean(norms), rel=2e-3)
        assert ("accuracy" in row) == (vars(config).get("loss") == "dpo")
    networks = (ours.policy.unet, theirs.policy.unet, ours.reference.unet)
    a, b, start = (torch.cat([p.flatten() for p in unet.parameters()]) for unet in networks)
    assert (a - b).norm() < 0.02 * (a - start).norm()


def test_every_member_is_learned_from_before_any_twice():
    config = tiny(rwr.Config, "", updates_per_epoch=5, batch_size=4)
    sd = SimpleNamespace(latent_shape=(1,), noise_settings={"num_train_timesteps": 1000})
    found = [members.tolist() for members, *_ in rwr.batches(config, 1, torch.arange(3, 12), sd)]
    assert [len(part) for part in found] == [4] * 5
    flat = list(itertools.chain(*found))
    assert sorted(flat[:9]) == sorted(flat[9:18]) == list(range(3, 12))
    again, other = (rwr.batches(config, epoch, torch.arange(3, 12), sd) for epoch in (1, 2))
    assert next(again)[0].tolist() == found[0] != next(other)[0].tolist()


def test_each_member_has_a_timestep_and_noise_of_its_own():
    config = tiny(rwr.Config, "", updates_per_epoch=10, batch_size=200)
    sd = SimpleNamespace(latent_shape=(2, 3), noise_settings={"num_train_timesteps": 700})
    _, steps, noise = map(torch.cat, zip(*rwr.batches(config, 1, torch.arange(9), sd), strict=True))
    assert steps.min() < 5 and steps.max() in range(695, 700)
    assert abs(steps.double().mean() - 349.5) < 25
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert len(noise.flatten(1).unique(dim=0)) == 2000


def test_presets_are_the_papers():
    """DDPO, App. F.6; Diffusion-DPO, Secs. 5.1 and 5.4."""
    config = rwr.parse_args(["--prompts", "prompts/animals.txt"])
    assert config.prompts_per_epoch * config.images_per_prompt == 10_000
    assert (config.updates_per_epoch, config.batch_size) == (400, 128)
    assert (config.inverse_temperature, config.percentile) == (0.2, 0.9)
    config = diffusion_dpo.parse_args([])
    assert config.epochs * config.updates_per_epoch == 1000 and config.batch_size == 2048
    assert config.beta == 5000 and config.warmup == 1000 / 4
    assert config.learning_rate == 1e-8 * 128 * 1 * 16  # as launchers/sdxl.sh of their code
    assert config.reward == ("hpsv2",) and config.prompts[0].endswith("animals.txt")


@pytest.mark.parametrize("name", [*PROGRAMS, "sft"])
def test_passes_are_those_of_an_epoch(tiny_sd, name):
    """What the forecast multiplies: rows of the network, two of a sample, and of a pair."""
    own = {"loss": "sft"} if name == "sft" else {}
    name = name if name in PROGRAMS else "diffusion_dpo"
    config = tiny(PROGRAMS[name].Config, tiny_sd, **own)
    models = prdp.load_models(config, CPU, brightness)
    rows = {False: 0, True: 0}

    def count(network, inputs):
        rows[torch.is_grad_enabled()] += len(inputs[0])

    for unet in (models.policy.unet, models.reference.unet):
        unet.register_forward_pre_hook(count)
    optimizer = torch.optim.AdamW(models.policy.unet.parameters(), 1e-5)
    rest = () if name == "rwr" else (None,)
    next(PROGRAMS[name].train(config, models, optimizer, PROMPTS, 1, *rest))
    found = tuple(count / 2 / (12 * 5) for count in rows.values())
    assert found == pytest.approx(config.passes())


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def people(tmp_path):
    """people(**changes): a file of ten pairs, the last record with these changes."""

    def write(**changes):
        rng = np.random.default_rng(0)
        records = []
        for n in range(10):
            record = {"prompt": PROMPTS[n % 3]}
            for name in ("chosen", "rejected"):
                pixels = rng.integers(0, 256, (20 + n, 40, 3), dtype=np.uint8)
                record[name] = f"{name}{n}.png"
                Image.fromarray(pixels).save(tmp_path / record[name])
            records.append(record)
        records[-1] |= changes
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(json.dumps(record) for record in records))
        return file

    return write


def flags_of(name: str, tiny_sd: str, people) -> list:
    flags = [*small_run(tiny_sd), "--batch-size", 5]
    if name == "people":  # without scores
        cut = flags.index("--reward")
        flags = [*flags[:cut], *flags[cut + 2 :], "--pairs", people(), "--learning-rate", 1e-4]
        flags += ["--warmup", 5, "--beta", 50]
        flags[flags.index("--preset") + 1] = "small"
    return flags


@pytest.mark.parametrize("name", [*PROGRAMS, "people"])
def test_run_goes_on_to_the_bit(tiny_sd, tmp_path, capsys, people, name):
    main = PROGRAMS.get(name, diffusion_dpo).main
    flags = flags_of(name, tiny_sd, people)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert call(main, [*flags, "--epochs", 3, "--out", whole], capsys)[::2] == (0, "")
    assert call(main, [*flags, "--epochs", 2, "--out", halves], capsys)[0] == 0
    assert call(main, ["--resume", halves, "--epochs", 3], capsys)[0] == 0
    assert_same_run(whole, halves)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert [row["reward_mean"] is None for row in rows] == [name == "people"] * 3
    if name == "people":
        moved = tmp_path / "moved"
        moved.mkdir()
        for file in [*tmp_path.glob("*.png"), tmp_path / "pairs.jsonl"]:
            file.rename(moved / file.name)
        again = ["--resume", halves, "--epochs", 4, "--pairs", moved / "pairs.jsonl"]
        assert call(main, again, capsys)[::2] == (0, "")
        one, other = moved / "chosen3.png", moved / "rejected3.png"
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)
        said = only_sentence(call(main, ["--resume", halves, "--epochs", 5], capsys))
        assert "has other pairs than the run began with" in said
        before = contents(halves)
        (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
        again = ["--resume", halves, "--epochs", 5, "--pairs", "", "--reward", "incompressibility"]
        again += ["--prompts", tmp_path / "p.txt"]
        assert "feedback is ai, and was people" in only_sentence(call(main, again, capsys))
        assert contents(halves) == before


def test_two_processes_equal_one(tiny_sd, tmp_path, capsys, people):
    """Each program in turn, for that starts them once."""
    runs = []
    for name in (*PROGRAMS, "people"):
        flags = [str(flag) for flag in (*flags_of(name, tiny_sd, people), "--epochs", 1)]
        main = PROGRAMS.get(name, diffusion_dpo).main
        assert call(main, [*flags, "--out", tmp_path / "one" / name], capsys)[0] == 0
        runs.append((name, [*flags, "--out", str(tmp_path / "two" / name)]))
    modules = {"rwr": "baselines.rwr"}
    two_processes([(modules.get(name, "baselines.diffusion_dpo"), flags) for name, flags in runs])

    start = prdp.load_models(tiny_config(tiny_sd), CPU).policy.unet.state_dict()
    for name, _ in runs:
        (one,), (two,) = (metrics_of(tmp_path / folder / name) for folder in ("one", "two"))
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5), name
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3), name
        assert two.get("accuracy") == one.get("accuracy"), name
        a, b = (checkpoint(tmp_path / folder / name)["unet"] for folder in ("one", "two"))
        apart = sum((a[key] - b[key]).square().sum() for key in a).sqrt()
        learned = sum((a[key] - start[key]).square().sum() for key in a).sqrt()
        assert apart < 0.02 * learned, name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chosen": "missing.png"}, "line 10: chosen missing.png: No such file"),
        ({"rejected": "pairs.jsonl"}, "no picture that can be read"),
        ({"rejected": "https://a.b/c.png"}, "line 10: rejected https://a.b/c.png: download it"),
        ({"label": 1}, "line 10: must have prompt, chosen and rejected"),
        ({"prompt": ""}, "line 10: must have prompt, chosen and rejected"),
        ({"prompt": "  "}, "line 10: holds no prompt"),
        ({"prompt": "\ud83d x"}, "line 10: "),
    ],
)
def test_bad_pairs_are_named(tiny_sd, tmp_path, capsys, people, changes, sentence):
    file = people(**changes)
    result = call(diffusion_dpo.main, ["--pairs", file, "--out", tmp_path / "run"], capsys)
    said = only_sentence(result)
    assert sentence in said.replace(f"{tmp_path}/", "") and str(file) in said
    assert not (tmp_path / "run").exists()


def test_peoples_pictures_by_hand(models, people):
    """Scaled to [-1, 1] and the model's size, half of them mirrored; the VAE's mean and deviation;
    the chosen first, each with its prompt."""
    loaded, file = models(), people()
    numbers = torch.tensor([7, 2, 4])
    x_0, text = People(str(file)).load(loaded.sd, 3, 1, numbers)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert torch.equal(text, loaded.sd.encode([records[n]["prompt"] for n in numbers]))
    mirrored = 0
    for m, n in enumerate(numbers.tolist()):
        generators = prdp.image_generators(3, 1, [n], 2)
        for side, name in enumerate(("chosen", "rejected")):
            picture = Image.open(file.parent / records[n][name])
            width, height = picture.size
            edge = min(picture.size)
            left, top = (width - edge) / 2, (height - edge) / 2
            box = (left, top, left + edge, top + edge)
            picture = picture.resize((16, 16), Image.Resampling.BILINEAR, box)
            if torch.rand((), generator=generators[side]) < 0.5:
                picture, mirrored = ImageOps.mirror(picture), mirrored + 1
            pixels = torch.from_numpy(np.asarray(picture) / 127.5 - 1).float().permute(2, 0, 1)
            found = loaded.sd.vae.encode(pixels[None]).latent_dist
            noise = torch.randn(4, 8, 8, generator=generators[side])
            expected = 0.18215 * (found.mean + found.std * noise)[0]
            torch.testing.assert_close(x_0[m, side], expected, atol=2e-3, rtol=0)
    assert 0 < mirrored < 6


def test_peoples_choices_are_learned(tiny_sd, people):
    """On the draws of an epoch, after its updates, the loss is below that of the pretrained model,
    log 2 a pair."""
    config = tiny(diffusion_dpo.Config, tiny_sd, updates_per_epoch=20, batch_size=10)
    config.warmup, config.beta = 0, 500.0
    models = prdp.load_models(config, CPU, diffusion_dpo.NoReward({}))
    chosen = People(str(people()))
    optimizer = torch.optim.AdamW(models.policy.unet.parameters(), config.learning_rate)
    list(diffusion_dpo.train(config, models, optimizer, PROMPTS, 1, chosen))
    losses = []
    for numbers, *drawn in rwr.batches(config, 1, torch.arange(10), models.sd):
        x_0, text = chosen.load(models.sd, config.seed, 1, numbers)
        inputs = (models.sd.pipe.scheduler, x_0, text, *drawn)
        with torch.no_grad():
            errors = (
                diffusion_dpo.denoising_errors(policy, *inputs)
                for policy in (models.policy, models.reference)
            )
            losses.append(diffusion_dpo.diffusion_dpo_loss(*errors, config.beta))
    assert torch.cat(losses).mean() < math.log(2) - 0.01


def test_rwr_logs_every_image(tiny_sd, monkeypatch):
    """Of a sum of rewards each part too, though images are drawn some hundreds at a time."""
    config = tiny(rwr.Config, tiny_sd, prompts_per_epoch=150, updates_per_epoch=1, ddpm_steps=1)
    rewards = load_reward(["incompressibility=2", "compressibility"], CPU)
    models = prdp.load_models(config, CPU, rewards)
    optimizer = torch.optim.AdamW(models.policy.unet.parameters(), 1e-5)
    (row,) = rwr.train(config, models, optimizer, PROMPTS, 1)
    assert row["images"] == 600
    parts = (row["reward_mean/incompressibility"], row["reward_mean/compressibility"])
    assert 2 * parts[0] + parts[1] == pytest.approx(row["reward_mean"], rel=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_adapters_in_16_bits(tiny_sd, name):
    """In the first update of adapters, which begin at 0, the reference is the policy."""
    module, own = PROGRAMS[name], {"lora_rank": 2, "dtype": "bf16"}
    config = tiny(module.Config, tiny_sd, gradient_checkpointing="on", **own)
    models = prdp.load_models(config, CPU, brightness)
    learned = [p for p in models.sd.unet.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learned]
    optimizer = torch.optim.AdamW(learned, 1e-3)
    rest = () if name == "rwr" else (None,)
    config.updates_per_epoch = 1
    (row,) = module.train(config, models, optimizer, PROMPTS, 1, *rest)
    assert row["grad_norm"] > 0 and any(map(lambda p, q: (p != q).any(), learned, before))
    if name == "diffusion_dpo":
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-12)


def test_a_process_without_a_share_takes_part(tiny_sd, monkeypatch):
    """It has none of a batch's images: no pass, and a gradient of 0."""
    config = tiny(rwr.Config, tiny_sd)
    models = prdp.load_models(config, CPU, brightness)
    x_0, text = torch.randn(12, 4, 8, 8), models.sd.encode(PROMPTS)
    others = torch.arange(12, 20)
    batch = (others, torch.zeros(8, dtype=torch.int64), torch.randn(8, 4, 8, 8))
    errors = rwr.backward_batch(config, models, x_0, text, batch, torch.ones(8).double())
    assert not errors.any()
    assert all(p.grad is None for p in models.policy.unet.parameters())


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match="--online: not with --pairs"):
        diffusion_dpo.parse_args(["--pairs", "x.jsonl", "--online"])
    with pytest.raises(UserError, match="--images-per-prompt 1: must be at least 2"):
        rwr.parse_args(["--images-per-prompt", "1"])
    with pytest.raises(UserError, match=r"--percentile 1\.0: must be"):
        rwr.parse_args(["--percentile", "1"])


def test_prompts_whose_images_all_tie_teach_nothing(tiny_sd):
    config = tiny(diffusion_dpo.Config, tiny_sd)
    models = prdp.load_models(config, CPU, lambda images, prompts: torch.zeros(len(images)))
    before = torch.cat([p.detach().flatten().clone() for p in models.policy.unet.parameters()])
    optimizer = torch.optim.AdamW(models.policy.unet.parameters(), 1e-3)
    (row,) = diffusion_dpo.train(config, models, optimizer, PROMPTS, 1, None)
    after = torch.cat([p.detach().flatten() for p in models.policy.unet.parameters()])
    assert math.isnan(row["loss"]) and torch.equal(before, after)


def test_a_run_that_has_learned_nothing_goes_on(tiny_sd, tmp_path, capsys):
    (tmp_path / "tie.py").write_text("def f(images, prompts):\n    return [0.0] * len(prompts)\n")
    flags = override(flags_of("diffusion_dpo", tiny_sd, None), ["--reward", f"{tmp_path}/tie.py:f"])
    assert call(diffusion_dpo.main, [*flags, "--out", tmp_path / "run"], capsys)[0] == 0
    again = ["--resume", tmp_path / "run", "--epochs", 3]
    assert call(diffusion_dpo.main, again, capsys)[::2] == (0, "")


def test_pairs_of_equal_pictures_are_left_out(people, capsys):
    """With a warning; where there are no others it is an error."""
    file = people(rejected="chosen9.png")
    found = People(str(file))
    assert [record["chosen"] for record in found.records] == [f"chosen{n}.png" for n in range(9)]
    assert "1 pairs of equal pictures are left out" in capsys.readouterr().out
    assert found.digest != People(str(people())).digest
    file.write_text(file.read_text().splitlines()[-1].replace("rejected9", "chosen9"))
    with pytest.raises(UserError, match="has no pair of two different pictures"):
        People(str(file))


def test_a_run_from_python_is_given_its_own_again(tiny_sd, tmp_path, capsys):
    """No reward is put in place of the one that it had."""
    flags = [*small_run(tiny_sd), "--batch-size", 5, "--epochs", 1, "--out", tmp_path / "run"]
    config = diffusion_dpo.parse_args(list(map(str, flags)))
    diffusion_dpo.run(config, lambda images, prompts: images.float().mean((1, 2, 3)), PROMPTS)
    again = ["--resume", tmp_path / "run", "--epochs", 2]
    said = only_sentence(call(diffusion_dpo.main, again, capsys))
    assert "--prompts: names no file; a run from Python is given its own again." in said


def test_pictures_in_the_home_folder(people, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = People(str(people())).digest
    (tmp_path / "away").mkdir()
    (tmp_path / "chosen9.png").rename(tmp_path / "away" / "9.png")
    lines = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(lines.replace("chosen9.png", "~/away/9.png"))
    assert People(str(tmp_path / "pairs.jsonl")).digest == expected


def test_a_vae_that_encodes_nan_is_named(models, people):
    loaded = models()
    with torch.no_grad():
        loaded.sd.vae.quant_conv.weight.fill_(math.inf)
    with pytest.raises(UserError, match="VAE encodes a picture as NaN"):
        People(str(people())).load(loaded.sd, 3, 1, torch.tensor([0]))
