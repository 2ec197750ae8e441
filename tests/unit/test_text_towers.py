"""Text towers: true architectures, local weights against the libraries' own calls, saving and coming back, errors."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from radio_distill.config.cards import TeacherCard
from radio_distill.config.load import load_card
from radio_distill.errors import CardError, TeacherError
from radio_distill.teachers.text import load_text_tower, open_text_tower, tower_config
from radio_distill.teachers.text_tower import build, canonicalize
from radio_distill.teachers.toy import text_tower_of

TEXTS = ["a photo of a red fox", "two_ships, at Sea!", "a"]
WORDS = ["<pad>", "<eos>", "<unk>", "a", "photo", "of", "red", "fox", "two", "ships", "at", "sea"]
EOS = WORDS.index("<eos>")
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}
VISION = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 1, "head_width": 16}
TRANSFORMERS = {
    "clip": (CLIPConfig, CLIPModel, "projection_dim"),
    "siglip": (SiglipConfig, SiglipModel, "projection_size"),
    "siglip2": (Siglip2Config, Siglip2Model, "projection_size"),
}


def card(
    kind: str, model: str, *, family: str = "open_clip", source: str = "somewhere/else", width: int = 24, **text
) -> TeacherCard:
    changed = {"family": family, "source": source}
    output = {"summary": width, "features": 32}
    values = load_card("siglip").model_dump() | changed | {"output": output, "text": {"kind": kind, "model": model, **text}}
    return TeacherCard.model_validate(values)


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.fixture
def clip(tmp_path: Path) -> tuple[str, Path, torch.nn.Module]:
    """A tiny open_clip CLIP: its name, the folder of its weights, and the model itself."""
    return make_open_clip(
        tmp_path, "tiny-text-clip", {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    )


@pytest.fixture
def siglip(tmp_path: Path) -> tuple[str, Path, torch.nn.Module]:
    """A tiny open_clip SigLIP (tokenizer of its own, no causal mask, last token) with the tokenizer beside its weights."""
    text = TEXT | {
        "vocab_size": len(WORDS),
        "hf_tokenizer_name": "nobody/nothing",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    config = {"embed_dim": 24, "custom_text": True, "vision_cfg": VISION, "text_cfg": text}
    made = make_open_clip(tmp_path, "tiny-text-siglip", config)
    save_tokenizer(made[1])
    return made


def make_open_clip(tmp_path: Path, name: str, config: dict) -> tuple[str, Path, torch.nn.Module]:
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    cls = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = cls(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    shake(model)
    folder = tmp_path / name
    folder.mkdir()
    save_file({k: x.contiguous() for k, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return name, folder, model


def save_transformers(kind: str, folder: Path) -> torch.nn.Module:
    config, cls, width = TRANSFORMERS[kind]
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 16, width: 24, "pad_token_id": 0, "eos_token_id": EOS}
    sides = {"text_config": text, "vision_config": small | {"patch_size": 14, "image_size": 28}}
    model = cls(config(**sides, **({"projection_dim": 24} if kind == "clip" else {}))).eval()
    shake(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def comes_back(card: TeacherCard, tmp_path: Path, want: Tensor) -> None:
    """Saved and read again without the card, the tower gives the same."""
    load_text_tower(card).save(tmp_path / "saved")
    same(open_text_tower(tmp_path / "saved").encode(TEXTS), want)


# --- agreement -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_clip_of_open_clip_embeds_as_the_library(clip: tuple, tmp_path: Path) -> None:
    name, folder, model = clip
    want = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    for source in (folder, folder / "open_clip_model.safetensors"):
        same(load_text_tower(card("open_clip", name, source=str(source))).encode(TEXTS), want)
    comes_back(card("open_clip", name, source=str(folder)), tmp_path, want)


@torch.no_grad()
def test_a_siglip_of_open_clip_embeds_as_the_library(siglip: tuple, tmp_path: Path) -> None:
    name, folder, model = siglip
    text = open_clip.get_model_config(name)["text_cfg"]
    tokens = open_clip.tokenizer.HFTokenizer(str(folder), context_length=16, clean="canonicalize")(TEXTS)
    assert text["context_length"] == tokens.shape[1]
    assert WORDS.index("ships") in tokens[1]  # canonical: no underscore, lower case
    want = model.encode_text(tokens)
    same(load_text_tower(card("open_clip", name, source=str(folder))).encode(TEXTS), want)
    comes_back(card("open_clip", name, source=str(folder)), tmp_path, want)


@torch.no_grad()
def test_a_teacher_of_another_family_names_its_tower_by_path(clip: tuple) -> None:
    name, folder, model = clip
    want = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    student = card("open_clip", name, family="radio", pretrained=str(folder))
    same(load_text_tower(student).encode(TEXTS), want)


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_a_model_of_transformers_embeds_as_the_library(kind: str, tmp_path: Path) -> None:
    model = save_transformers(kind, tmp_path / "model")
    plain = TEXTS if kind == "clip" else ["a photo of a red fox", "two ships at sea", "a"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")(
        plain, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    want = model.get_text_features(input_ids=tokens.input_ids).pooler_output
    here = card("transformers", str(tmp_path / "model"))
    same(load_text_tower(here).encode(TEXTS), want)
    comes_back(here, tmp_path, want)


@torch.no_grad()
def test_a_toy_teacher_embeds_as_in_its_training(tmp_path: Path) -> None:
    toy = load_card("toy_clip")
    made = text_tower_of(toy).net
    want = made(made.tokenize(TEXTS))
    same(load_text_tower(toy).encode(TEXTS), want)
    comes_back(toy, tmp_path, want)


@pytest.mark.parametrize("text", [*TEXTS, "  A_b--c \t D's  "])
def test_texts_are_cleaned_for_siglip_as_by_open_clip(text: str) -> None:
    assert canonicalize(text) == open_clip.tokenizer.get_clean_fn("canonicalize")(text)


def test_texts_in_chunks_give_the_same(clip: tuple) -> None:
    tower = load_text_tower(card("open_clip", clip[0], source=str(clip[1])))
    same(tower.encode(TEXTS, chunk=1), tower.encode(TEXTS))
    assert tower.to("cpu", torch.bfloat16).encode(TEXTS).dtype == torch.float32


@pytest.mark.parametrize("name", ["dfn_clip", "siglip", "siglip2_g", "siglip2_so400m"])
def test_the_true_architecture_is_as_wide_as_the_summary(name: str) -> None:
    real = load_card(name)
    config = tower_config(real)
    with torch.device("meta"):
        tokens = torch.zeros(2, config["text_cfg"]["context_length"], dtype=torch.long)
        assert build("open_clip", config).eval()(tokens).shape == (2, real.output.summary)


# --- errors --------------------------------------------------------------------------------------------------------------


def refused(match: str, card: TeacherCard, kind: type[Exception] = TeacherError) -> None:
    with pytest.raises(kind, match=match):
        load_text_tower(card)


def test_cards_that_name_no_tower(clip: tuple) -> None:
    refused(r"'sam_h' has no text tower; expected a card with `text:`, such as dfn_clip", load_card("sam_h"), CardError)
    refused("unknown kind 'bert' of text tower, expected one of open_clip, transformers, toy", card("bert", "x"), CardError)
    refused(r"open_clip has no model 'ViT-Z'; see open_clip.list_models\(\)", card("open_clip", "ViT-Z"), CardError)
    other = card("open_clip", clip[0], family="radio", pretrained="laion400b")
    refused("'laion400b': no file or folder|no file or folder 'laion400b'", other)
    refused("`text.pretrained` is None, expected a tag", card("open_clip", clip[0], family="radio"), CardError)


def test_weights_that_are_not_there(clip: tuple, siglip: tuple, tmp_path: Path) -> None:
    name, _, model = clip
    refused("no file or folder './nowhere'", card("open_clip", name, source="./nowhere"))
    save_file({k: x for k, x in model.state_dict().items() if k.startswith("visual.")}, tmp_path / "image.safetensors")
    refused(
        "holds no text encoder; use the file of the whole", card("open_clip", name, source=str(tmp_path / "image.safetensors"))
    )
    (siglip[1] / "tokenizer.json").unlink()
    (siglip[1] / "tokenizer_config.json").unlink()
    refused(
        "no tokenizer in nobody/nothing .*beside the weights, or unset", card("open_clip", siglip[0], source=str(siglip[1]))
    )
    refused("no file or folder './nowhere'", card("transformers", "./nowhere"))
    refused("text.model` of the card takes a folder with config.json", card("transformers", str(tmp_path)))
    with pytest.raises(TeacherError, match=r"holds no text tower .*; expected text\.json, model.safetensors and a tokenizer"):
        open_text_tower(tmp_path)


def test_weights_of_another_tower(clip: tuple, siglip: tuple) -> None:
    wrong = card("open_clip", clip[0], source=str(siglip[1]))
    refused(r"text tower of 'siglip' .*: the weights are not those of this text tower", wrong)
    narrow = card("open_clip", clip[0], source=str(clip[1]), width=12)
    refused("gives 24 values and the summary has 12, so they cannot be compared; correct `text` or `output`", narrow)


def test_a_model_of_transformers_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("is a 'bert', expected a model of type clip, siglip, siglip2", card("transformers", str(tmp_path)), CardError)


def classifier(folder: Path, **text) -> TeacherCard:
    save_file({"head.weight": torch.eye(3, 4), "head.bias": torch.zeros(3)}, folder / "c.safetensors")
    asked = {"classes": ("fox", "red fox", "two_ships"), **text}
    return card("classifier", "head.weight", source=str(folder / "c.safetensors"), width=4, **asked)


def test_a_classifier_stands_in_for_a_text_tower(tmp_path: Path) -> None:
    """A text is the row of the longest class name in it; saved and read again, too."""
    tower = load_text_tower(classifier(tmp_path))
    tower.save(tmp_path / "saved")
    for each in (tower, open_text_tower(tmp_path / "saved")):
        same(each.encode(["a photo of a Red Fox.", "fox", "a drawing of two ships"]), torch.eye(3, 4)[[1, 0, 2]])
    with pytest.raises(ValueError, match="'a cat' names none of the 3 classes"):
        tower.encode(["a cat"])
    with pytest.raises(ValueError, match="names none"):
        tower.encode(["foxes"])


def test_classes_of_one_name_are_one_vector_as_among_imagenets(tmp_path: Path) -> None:
    tower = load_text_tower(classifier(tmp_path, classes=("fox", "Fox!", "cat")))
    same(tower.encode(["a fox", "cat"]), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0]]))
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    of_imagenet = {**classifier(tmp_path).model_dump(), "source": str(tmp_path / "i.safetensors")}
    save_file({"head.weight": rows}, tmp_path / "i.safetensors")
    of_imagenet["text"] = {**of_imagenet["text"], "classes": ()}
    names = open_clip.IMAGENET_CLASSNAMES
    found = load_text_tower(TeacherCard.model_validate(of_imagenet)).encode([f"a bad photo of a {name}." for name in names])
    alone = [i for i, name in enumerate(names) if names.count(name) == 1]
    assert len(alone) > 990
    same(found[alone], rows[alone])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"classes": ("fox", "cat")}, "head.weight has 3 rows, and text.classes names 2; name every row"),
        ({"classes": ()}, "head.weight has 3 rows, and without text.classes they are ImageNet's 1000"),
        ({"classes": ("fox", "!", "cat")}, "class 1 has no name"),
        ({"model": "head.bias"}, "text.model is 'head.bias', expected the classifier's matrix in .*: head.weight"),
    ],
)
def test_a_classifier_whose_rows_are_not_the_classes_is_refused(text: dict, message: str, tmp_path: Path) -> None:
    given = classifier(tmp_path).model_dump()
    refused(message, TeacherCard.model_validate({**given, "text": {**given["text"], **text}}), CardError)


def test_no_texts() -> None:
    with pytest.raises(ValueError, match="encode was given no texts"):
        load_text_tower(load_card("toy_clip")).encode([])
