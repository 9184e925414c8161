"""examples/: rewards as a user would write them, a flow; test_docs.py runs the lifted loss."""

import base64
import contextlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU, ROOT
from rewards import load_reward
from support.inputs import load_module

WORDS = ["USER", ":", "ASSISTANT", "what", "is", "happening", "in", "this", "image", "?"]
WORDS += ["a", "an", "cat", "dog", "riding", "washing", "bike", "Yes", "yes", "no", "or"]
TEMPLATE = (  # of a conversation with pictures, as such models bring it
    "USER: {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
)


def save_tokenizer(folder, special: list[str]) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<unk>", *special]
    vocabulary = {word: n for n, word in enumerate([*marks, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not special:
        pair = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=pair
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=special, model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    return len(vocabulary)


@pytest.fixture(scope="module")
def alignment(tmp_path_factory):
    """The VLM reward of a tiny LLaVA and a tiny encoder, with random weights."""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertModel,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    vlm, encoder = (tmp_path_factory.mktemp(name) for name in ("vlm", "encoder"))
    count, sizes = save_tokenizer(vlm, ["<image>"]), {"hidden_size": 16, "intermediate_size": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, **layers, image_size=32, patch_size=16)
    text = LlamaConfig(**sizes, **layers, vocab_size=count, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(vlm)
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    LlavaProcessor(
        CLIPImageProcessorPil(**square), AutoTokenizer.from_pretrained(vlm), patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(vlm)  # fmt: skip
    count = save_tokenizer(encoder, [])
    BertModel(BertConfig(**sizes, **layers, vocab_size=count)).save_pretrained(encoder)
    module = load_module("vlm_reward", str(ROOT / "examples" / "vlm_reward.py"))
    return module.Alignment(str(vlm), str(encoder), 1)


def test_vlm_describes_each_picture(alignment):
    """As one by one, and only what comes after the question."""
    images = torch.randint(256, (3, 3, 40, 32), dtype=torch.uint8)
    said = alignment.describe(images)
    assert said == [alignment.describe(image[None])[0] for image in images]
    assert not any("happening in this image" in text for text in said)
    rewards = load_reward(alignment, CPU)
    scores = rewards(images, ["a cat riding a bike", "a dog washing a cat", "a dog"])
    assert scores.shape == (3,) and (scores <= 1).all() and rewards.networks == alignment.networks
    expected = alignment.recall(said, ["a cat riding a bike", "a dog washing a cat", "a dog"])
    torch.testing.assert_close(scores, expected)


def test_vlm_says_yes(alignment):
    """Any image-text-to-text model: the probability of a yes, of each picture and prompt."""
    (vlm, _) = alignment.names
    module = load_module("vlm_reward", str(ROOT / "examples" / "vlm_reward.py"))
    judge = module.Yes(vlm)
    images = torch.randint(256, (3, 3, 40, 32), dtype=torch.uint8)
    prompts = ["a cat riding a bike", "a dog washing a cat", "a dog"]
    scores = load_reward(judge, CPU)(images, prompts)
    assert len(set(scores.tolist())) == 3 and ((scores > 0) & (scores < 1)).all()
    (model,) = judge.networks
    vocabulary = judge.processor.tokenizer.get_vocab()
    for image, prompt, score in zip(images, prompts, scores, strict=True):
        text = (
            f'USER: <image> Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT:'
        )
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        inputs = judge.processor(images=[picture], text=[text], return_tensors="pt")
        with torch.no_grad():
            odds = model(**inputs).logits[0, -1].double().exp()
        expected = (odds[vocabulary["Yes"]] + odds[vocabulary["yes"]]) / odds.sum()
        assert score.item() == pytest.approx(expected.item(), rel=1e-4)


def test_recall_is_a_loop_over_word_pieces(alignment):
    """Of each text by itself, without padding."""
    answers = ["a dog washing a cat", "", "a bike"]
    prompts = ["a cat riding a bike", "a dog", "an image of a cat"]
    recall = alignment.recall(answers, prompts)

    def vectors(text: str) -> np.ndarray:
        ids = torch.tensor([alignment.tokenizer(text).input_ids])
        states = alignment.networks[1](ids, output_hidden_states=True).hidden_states[1]
        return states[0].detach().double().numpy()

    for n in range(3):
        best = []
        for piece in vectors(prompts[n])[1:-1]:
            cosines = [
                piece @ other / np.linalg.norm(piece) / np.linalg.norm(other)
                for other in vectors(answers[n])
            ]
            best.append(max(cosines))
        assert recall[n].item() == pytest.approx(np.mean(best), abs=1e-5)
    assert alignment.recall(["a cat"], ["a cat"]).item() == pytest.approx(1, abs=1e-5)


def test_the_papers_prompts():
    """DDPO, Sec. 2.2: 45 animals x 3 activities."""
    import prdp

    prompts = prdp.load_prompts(ROOT / "prompts" / "animal_activities.txt")
    animals = prdp.load_prompts(ROOT / "prompts" / "animal_names.txt")
    assert len(prompts) == 135 and "a dolphin riding a bike" in prompts
    for activity in ("riding a bike", "playing chess", "washing dishes"):
        own = [p.split(" ", 1)[1] for p in prompts if p.endswith(activity)]
        assert own == [f"{animal} {activity}" for animal in animals]


def test_a_server_scores(cli, tmp_path, monkeypatch):
    """One that fails now and then is asked again; one that is down, or answers otherwise, ends the
    run: a traceback, then a sentence."""
    seen, calls, waits = [], [], []
    monkeypatch.setattr("time.sleep", waits.append)

    def sentence(result: tuple[int, str, str]) -> str:
        code, _, errors = result
        assert code == 2 and "in score\n" in errors, errors
        return errors.splitlines()[-1]

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pictures = [Image.open(io.BytesIO(base64.b64decode(x))) for x in asked["images"]]
            seen.extend(picture.size for picture in pictures)
            scores = [float(np.asarray(picture).mean()) for picture in pictures]
            calls.append(self.path)
            failing = self.path == "/busy" or (self.path == "/often" and len(calls) % 2)
            self.send_response(503 if failing else 200)
            if self.path == "/cut" and len(calls) % 2:  # of what comes then the end is missing
                self.send_header("Content-Length", "100000")
            self.end_headers()
            answer = json.dumps({"scores": scores})
            self.wfile.write(b"<html>" if self.path == "/page" else answer.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    reward = ["--reward", f"{ROOT}/examples/http_reward.py:score", "--epochs", 1]
    monkeypatch.setenv("REWARD_URL", f"{address}/score")
    assert cli(*reward)[::2] == (0, "")
    assert set(seen) == {(16, 16)} and not waits
    for path in ("often", "cut"):
        calls.clear()
        waits.clear()
        monkeypatch.setenv("REWARD_URL", f"{address}/{path}")
        assert cli(*reward, "--out", tmp_path / path)[::2] == (0, "")
        assert len(waits) == len(calls) / 2 and set(waits) == {1}
    monkeypatch.setenv("REWARD_URL", f"{address}/page")
    message = sentence(cli(*reward, "--out", tmp_path / "page"))
    assert f"the server at {address}/page: Expecting value" in message
    waits.clear()
    monkeypatch.setenv("REWARD_URL", f"{address}/busy")
    message = sentence(cli(*reward, "--out", tmp_path / "busy"))
    assert f"the server at {address}/busy: HTTP Error 503" in message
    assert waits == [1, 5, 25]
    server.shutdown()
    server.server_close()
    monkeypatch.setenv("REWARD_URL", f"{address}/score")
    message = sentence(cli(*reward, "--out", tmp_path / "down"))
    assert f"the server at {address}/score: " in message and "refused" in message


def test_scores_by_hand_of_pictures_of_any_mode(tmp_path, capsys):
    """A row for each picture, a column for each component and one for the sum. Each is printed
    before the next is read: ten thousand take no more memory than one."""
    main = load_module("score_pictures", str(ROOT / "examples" / "score_pictures.py")).main
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), "uint8"))
    files = [str(tmp_path / f"{mode}.png") for mode in ("RGB", "RGBA", "L", "P")]
    for mode, file in zip(("RGB", "RGBA", "L", "P"), files, strict=True):
        picture.convert(mode).save(file)
    (tmp_path / "notes.txt").write_text("not a picture")
    words = ["incompressibility=2", "compressibility"]
    with pytest.raises(SystemExit) as stop:
        main([*files, f"{tmp_path}/notes.txt", "--reward", *words])
    out, message = capsys.readouterr()
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith(
        f"examples/score_pictures.py: picture {tmp_path}/notes.txt: no picture"
    )

    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["incompressibility", "compressibility", "sum", "picture"] and len(rows) == 5
    assert float(rows[1][2]) == pytest.approx(float(rows[1][0]), rel=1e-4)  # 2 x - x
    assert rows[1][:3] == rows[2][:3] and rows[4][3] == files[3]
    main([files[0], "--reward", "compressibility", "--prompt", "x"])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["compressibility", "sum", "picture"]
    assert row.split() == [rows[1][1], rows[1][1], files[0]]


# ---- A flow --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> ModuleType:
    """examples/flow_matching.py after a shorter run, and what it printed."""
    code = (ROOT / "examples" / "flow_matching.py").read_text()
    assert len(code.splitlines()) <= 120 and "range(3000)" in code and "range(31)" in code
    code = code.replace("range(3000)", "range(1000)").replace("range(31)", "range(11)")
    file = tmp_path_factory.mktemp("flow") / "flow_matching.py"
    file.write_text(code)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module = load_module("flow_matching", str(file))
    module.printed = out.getvalue().splitlines()
    return module


def test_a_flow_is_finetuned(flow):
    """Of the chain that learns and of the ODE that is used, the reward rises by far more than its
    error, at a KL of some nats."""
    rise = (flow.after.mean() - flow.before.mean()).item()
    error = (flow.after.var() + flow.before.var()).sqrt().item() / flow.before.numel() ** 0.5
    assert rise > 5 * error
    first, last, ode = flow.printed
    rewards = [float(re.search(r"reward (\S+),", line)[1]) for line in (first, last)]
    assert rewards[1] > rewards[0] + 5 * error and "KL 0.00 nats" in first
    assert 0.1 < float(re.search(r"KL (\S+) nats", last)[1]) < 10
    assert ode.endswith(f"{flow.before.mean():.3f} -> {flow.after.mean():.3f}")


def test_a_flows_log_probs_are_of_what_is_stored(flow):
    """torch's Gaussian, of float32 latents; in mixed steps as step by step, to float32 rounding."""
    latents, log_probs = flow.sample(flow.network)
    assert latents.dtype == torch.float32 and torch.equal(
        flow.score(flow.network, latents), log_probs
    )
    entries = torch.cat(flow.STEPS)
    mean, std = flow.gaussian(flow.network, latents, entries)
    images, steps = entries.unbind(1)
    normal = torch.distributions.Normal(mean, std.expand_as(mean))
    expected = normal.log_prob(latents[images, steps + 1].double()).mean(1)
    got = log_probs.flatten(0, 1)[images, steps]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.7, 1.5])
def test_a_flows_sde_has_the_odes_marginals(flow, monkeypatch, noise):
    """Data N(m, S): the velocity is affine, so each step takes a Gaussian to a Gaussian, and its
    moments are exact: half way in 2,000 steps those of the path, at the end the data's."""
    monkeypatch.setattr(flow, "NOISE", noise)
    m = torch.tensor([1.0, -2.0]).double()
    S = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()
    eye = torch.eye(2).double()

    def path(t: float):
        return (1 - t) * m, (1 - t) ** 2 * S + t**2 * eye

    times = torch.linspace(1, 0, 2001).double()
    mean, covariance = path(1.0)
    x = torch.cat([torch.zeros(1, 2).double(), eye])  # an affine map by its values at these
    for k in range(2000):
        t, t_next = times[k].expand(3), times[k + 1].expand(3)
        centre, spread = path(times[k].item())
        gain = (times[k] * eye - (1 - times[k]) * S) @ spread.inverse()  # E[noise - x_0 | x_t]
        after, std = flow.sde_step((x - centre) @ gain.T - m, x, t, t_next)
        step = (after[1:] - after[0]).T
        mean = step @ mean + after[0]
        covariance = step @ covariance @ step.T + std[0] ** 2 * eye
        if k in (999, 1999):
            expected = path(times[k + 1].item())
            torch.testing.assert_close(mean, expected[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(covariance, expected[1], rtol=0, atol=4e-3)
