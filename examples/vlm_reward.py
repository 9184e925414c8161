"""Prompt alignment by a vision-language model, in two ways.

    VLM=Qwen/Qwen2.5-VL-3B-Instruct python prdp.py --reward examples/vlm_reward.py:yes
    python prdp.py --reward examples/vlm_reward.py:alignment --prompts prompts/animal_activities.txt

`yes` asks any of transformers' image-text-to-text models whether the picture shows the prompt; the
reward is the probability that the answer begins with Yes, as VQAScore's (Lin et al. 2024).

`alignment` is DDPO's (Black et al. 2024, Sec. 2.2 and App. D.3): LLaVA answers "what is happening
in this image?"; the reward is BERTScore's recall of the prompt in the answer. From the hub:
llava-hf/llava-1.5-7b-hf (14 GB) and roberta-large. bert-score 0.3.13 does not work with
transformers 5, so its recall is computed here, as it does for English: layer 17, without idf and
rescaling. Not run here with any of these models: tests make small ones.
"""

import functools
import os

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

QUESTION = "USER: <image>\nwhat is happening in this image? ASSISTANT:"
HALF = torch.float16 if torch.cuda.is_available() else torch.float32


class Yes:
    """(uint8 images (M, 3, H, W), M prompts) -> probabilities (M,), one picture at a time."""

    def __init__(self, vlm: str) -> None:
        self.vlm = vlm

    @functools.cached_property
    def networks(self) -> list[nn.Module]:
        """Loaded when a run asks for them; --offload moves them."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(self.vlm)
        return [AutoModelForImageTextToText.from_pretrained(self.vlm, dtype=HALF).eval()]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([self.ask(*pair) for pair in zip(images, prompts, strict=True)])

    def ask(self, image: Tensor, prompt: str) -> Tensor:
        """The probability that the answer begins with a yes."""
        (model,) = self.networks
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        ).to(model.device, model.dtype)  # fmt: skip
        probability = model(**inputs).logits[0, -1].float().softmax(-1)
        answers = self.processor.tokenizer(["Yes", "yes"], add_special_tokens=False).input_ids
        return probability[[*{ids[0] for ids in answers}]].sum()


class Alignment:
    """(uint8 images (M, 3, H, W), M prompts) -> recalls (M,), at most 1."""

    def __init__(
        self, vlm: str = "llava-hf/llava-1.5-7b-hf", encoder: str = "roberta-large", layer: int = 17
    ) -> None:
        self.names, self.layer = (vlm, encoder), layer

    @functools.cached_property
    def networks(self) -> list[nn.Module]:
        """Loaded when a run asks for them; --offload moves them."""
        from transformers import AutoModel, AutoProcessor, AutoTokenizer
        from transformers import LlavaForConditionalGeneration

        vlm, encoder = self.names
        self.processor = AutoProcessor.from_pretrained(vlm)
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        llava = LlavaForConditionalGeneration.from_pretrained(vlm, dtype=HALF)
        return [llava.eval(), AutoModel.from_pretrained(encoder).eval()]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.cat(
            [self.recall(self.describe(some), prompts[first : first + 8])
             for first, some in zip(range(0, len(images), 8), images.split(8), strict=True)]
        )  # fmt: skip

    def describe(self, images: Tensor) -> list[str]:
        """What the VLM says, by greedy decoding."""
        pictures = [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in images]
        llava = self.networks[0]
        questions = {"text": [QUESTION] * len(pictures), "return_tensors": "pt"}
        inputs = self.processor(images=pictures, **questions).to(llava.device, llava.dtype)
        ids = llava.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers = ids[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers, skip_special_tokens=True)

    def recall(self, answers: list[str], prompts: list[str]) -> Tensor:
        """BERTScore's recall: of each word piece of a prompt the largest cosine to one of the
        answer, and their mean."""
        found, wanted = self.embed(answers), self.embed(prompts)
        cosines = [mine[1:-1] @ answer.T for mine, answer in zip(wanted, found, strict=True)]
        return torch.stack([cosine.max(1).values.mean() for cosine in cosines])

    def embed(self, texts: list[str]) -> list[Tensor]:
        """Unit vectors of each text's word pieces, its two marks included."""
        encoder = self.networks[1]
        pieces = [torch.tensor(self.tokenizer(text, truncation=True).input_ids) for text in texts]
        lengths = torch.tensor([len(ids) for ids in pieces])
        ids = pad_sequence(pieces, True, self.tokenizer.pad_token_id).to(encoder.device)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(encoder.device)
        layers = encoder(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        vectors = nn.functional.normalize(layers[self.layer].float(), dim=-1)
        return [row[: len(ids)] for row, ids in zip(vectors, pieces, strict=True)]


alignment = Alignment()
yes = Yes(os.environ.get("VLM", "Qwen/Qwen2.5-VL-3B-Instruct"))
