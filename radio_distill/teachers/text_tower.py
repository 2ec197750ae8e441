"""A text tower as a folder: tokenizer and text encoder, to compare texts with what an adaptor's summary says of images.

    tower = open_text_tower("EXPORT/text_towers/clip")
    vectors = tower.encode(["a photo of a fox"])     # (1, C), compare by cosine with model(images)["clip"].summary

Travels with an export: it needs torch, safetensors, and open_clip or transformers, whichever library the tower is from.
Licence of this file: Apache-2.0.

Shapes: n texts, L tokens, C width of the embedding: that of the teacher's summary.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["TextTower", "build", "make_tokenizer", "open_text_tower"]

FACTS, WEIGHTS = "text.json", "model.safetensors"
TEXT_CLASSES = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
"""Type of a model of transformers -> class of its text side."""

Tokenizer = Callable[[list[str]], Tensor]


class TextTower:
    """Texts to vectors that are compared with a teacher's summary by cosine; frozen, fp32 until `to` says otherwise."""

    def __init__(self, kind: str, config: dict[str, Any], net: nn.Module, tokenizer: Tokenizer) -> None:
        self.kind, self.config = kind, config
        self.net = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = next(self.net.parameters()).device

    @property
    def example(self) -> str:
        """A text that it can embed."""
        return getattr(self.tokenizer, "example", "")

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextTower:
        """Move the network to `device`, its floating-point weights to `dtype`; returns self."""
        self.device = torch.device(device)
        self.net.to(device=self.device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, texts: list[str], *, chunk: int = 256) -> Tensor:
        """Embed texts: (n, C) fp32 on the tower's device, not normalised; at most `chunk` texts in one forward."""
        if not texts:
            raise ValueError("encode was given no texts, expected a list with at least one")
        parts = [texts[i : i + chunk] for i in range(0, len(texts), chunk)]
        return torch.cat([self.net(self.tokenizer(part).to(self.device)).float() for part in parts])

    def save(self, folder: Path) -> None:
        """Write text.json, model.safetensors (fp32) and the tokenizer's files into the new folder `folder`."""
        folder.mkdir(parents=True)
        (folder / FACTS).write_text(json.dumps({"kind": self.kind, "config": self.config}, indent=1) + "\n")
        state = {name: x.detach().float().cpu().contiguous().clone() for name, x in self.net.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        if hasattr(self.tokenizer, "save_pretrained"):  # others come with their library, or are in `config`
            self.tokenizer.save_pretrained(folder)


def open_text_tower(folder: str | Path) -> TextTower:
    """The tower that `TextTower.save` wrote, on the CPU. Raises OSError or RuntimeError for a folder that is not complete."""
    path = Path(folder)
    facts = json.loads((path / FACTS).read_text())
    net = build(facts["kind"], facts["config"])
    net.load_state_dict(load_file(path / WEIGHTS))
    return TextTower(facts["kind"], facts["config"], net, make_tokenizer(facts["kind"], facts["config"], str(path), net))


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    """The network of a kind (`open_clip`, `transformers`, `toy`, `classifier`), token ids (n, L) to embeddings (n, C); random weights."""
    if kind == "classifier":
        return nn.Embedding(len(config["classes"]), config["width"])
    if kind == "open_clip":  # the public constructors build the image tower too
        tower = import_module("open_clip.model")._build_text_tower
        return tower(config["embed_dim"], config["text_cfg"], quick_gelu=config["quick_gelu"])
    if kind == "transformers":
        cls = getattr(import_module("transformers"), TEXT_CLASSES[_type(config)])
        return Embedding(cls(cls.config_class(**config)))
    tower = import_module("radio_distill.teachers.toy").TextTower
    return tower(tuple(config["vocabulary"]), width=config["width"], out=config["out"])


def make_tokenizer(kind: str, config: dict[str, Any], place: str, net: nn.Module) -> Tokenizer:
    """Texts to token ids (n, L). place: folder or hub id of the tokenizer's files, where it has some."""
    if kind == "transformers":
        files = import_module("transformers").AutoTokenizer.from_pretrained(place)
        return PaddedTokenizer(files, config["max_position_embeddings"], canonical=_type(config) != "clip")
    if kind == "classifier":
        return ClassNames(config["classes"])
    if kind == "toy":
        return net.tokenize  # type: ignore[return-value]
    text, module = config["text_cfg"], import_module("open_clip.tokenizer")
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name"):
        return module.HFTokenizer(place, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options)
    return module.SimpleTokenizer(context_length=length, **options)


def _type(config: dict[str, Any]) -> str:
    return str(config["model_type"]).partition("_")[0]


class Embedding(nn.Module):
    """A text model of transformers. No mask: CLIP is causal, and SigLIP was trained to see its padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_nL: Tensor) -> Tensor:
        out = self.model(input_ids=tokens_nL)
        return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output


class PaddedTokenizer:
    """A tokenizer of transformers that pads to one length; canonical: cleans texts as SigLIP's training did.

    Not every tokenizer of SigLIP cleans by itself, and without it zero-shot accuracy is lost (NVlabs/RADIO pull request 142).
    """

    def __init__(self, tokenizer: Any, length: int, *, canonical: bool) -> None:
        self.tokenizer, self.length, self.canonical = tokenizer, length, canonical

    def __call__(self, texts: list[str]) -> Tensor:
        texts = [canonicalize(text) for text in texts] if self.canonical else texts
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(texts, **options).input_ids

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class ClassNames:
    """Texts to the numbers of the classes that they name: the longest name in a text counts. Raises ValueError where there is none."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.example = classes[0]
        names = [canonicalize(name) for name in classes]
        self._ids = {name: names.index(name) for name in names}
        if "" in self._ids:
            raise ValueError(f"class {names.index('')} has no name; give it one")

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([self._class_of(text) for text in texts])

    def _class_of(self, text: str) -> int:
        words = canonicalize(text).split()
        spans = ((j - i, " ".join(words[i:j])) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        named = [(length, self._ids[span]) for length, span in spans if span in self._ids]
        if not named:
            raise ValueError(
                f"{text!r} names none of the {len(self._ids)} classes of the classifier that stands in for a text tower; "
                "only texts about its classes can be compared"
            )
        return max(named)[1]


def canonicalize(text: str) -> str:
    """Lower case, no punctuation, one space between words."""
    bare = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", bare).strip().lower()
