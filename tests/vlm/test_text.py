"""Conversations: where they come from, what is learned of them, and in which order."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from radio_distill.config.load import load_recipe, load_vlm_recipe
from radio_distill.config.vlm_recipe import Lora, VlmRecipe, VlmSource
from radio_distill.errors import DataError, RecipeError
from radio_distill.train.distributed import World
from radio_distill.vlm.batches import Samples, TextStreams, collate, list_batches
from radio_distill.vlm.conversations import Conversation, read_conversations
from radio_distill.vlm.lora import LoraLinear, add_lora, merge_lora
from radio_distill.vlm.model import Vlm
from radio_distill.vlm.prompt import IGNORE, Encoded, Turn, encode

TURNS = (Turn("user", "is there a tree?"), Turn("assistant", "yes"), Turn("user", "how many?"), Turn("assistant", "two"))


def recipe(*overrides: str) -> VlmRecipe:
    return load_vlm_recipe("toy/vlm_sft", ["start.source=x", "data.sources.toy.path=x.json", *overrides])


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def learned(vlm: Vlm, labels: list[int]) -> str:
    return vlm.processor.tokenizer.decode([i for i in labels if i != IGNORE])


def test_only_answers_are_learned_and_each_ends(vlm: Vlm) -> None:
    tokenizer = vlm.processor.tokenizer
    found = encode(tokenizer, TURNS, template="chat", max_length=99, key="x")
    assert (
        tokenizer.decode(found.ids)
        == "<s> USER : is there a tree ? ASSISTANT : yes </s> USER : how many ? ASSISTANT : two </s>"
    )
    assert learned(vlm, found.labels) == "yes </s> two </s>"
    assert all(label in (IGNORE, token) for token, label in zip(found.ids, found.labels))
    assert encode(tokenizer, TURNS, template="chat", max_length=5, key="x").ids == found.ids[:5]


def test_the_plain_template_is_image_and_answer(vlm: Vlm) -> None:
    turns = (Turn("user", "<image><image>\ndescribe the image."), Turn("assistant", "a tree"))
    found = encode(vlm.processor.tokenizer, turns, template="plain", max_length=99, key="x")
    assert vlm.processor.tokenizer.decode(found.ids) == "<s> <image> <image> a tree </s>"
    assert learned(vlm, found.labels) == "a tree </s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(vlm: Vlm) -> None:
    import copy

    tokenizer = copy.deepcopy(vlm.processor.tokenizer)
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(DataError, match="conversation mix/1: the tokenizer's chat template rewrites earlier turns"):
        encode(tokenizer, TURNS, template="chat", max_length=99, key="mix/1")


def record(value: str = "<image>\nwhat?", **more: object) -> dict:
    return {"id": "7", "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}], **more}


def test_json_and_shards_give_the_same_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    (tmp_path / "a.json").write_text(json.dumps([record(image="a.jpg"), record("what?")]))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.jpg", b"pixels"), ("1.json", json.dumps(record()).encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    image, text = read_conversations({"a": VlmSource(path=str(tmp_path / "a.json"), images=str(tmp_path))})
    (shard,) = read_conversations({"b": VlmSource(path=str(tmp_path / "a.tar"))})
    assert image.turns == shard.turns == (Turn("user", "<image>\nwhat?"), Turn("assistant", "yes"))
    assert image.image is not None
    assert shard.image is not None
    assert image.image() == shard.image() == b"pixels"
    assert text.image is None
    assert image.key == "a/7"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"data.sources.a.path=.*a.json cannot be read: "),
        (json.dumps([{"id": 3}]), r"conversation a/3 is not as LLaVA's: KeyError\('conversations'\); expected conversations: "),
        (
            json.dumps([{"id": 3, "conversations": [{"from": "gpt", "value": ""}]}]),
            "a/3 has turns of assistant; expected human and gpt",
        ),
        ("[]", r"data.sources.a.path=.*a.json holds no conversation; leave the source out"),
        (json.dumps({"data": [record()]}), r"conversation a/0 is not as LLaVA's: TypeError"),
        (json.dumps([record(image=["b.jpg"])]), r"conversation a/7 has the image \['b.jpg'\]; expected the name of one file"),
        (json.dumps([record(image="b.jpg")]), "b.jpg of conversation a/7 does not exist; set data.sources.a.images"),
    ],
)
def test_records_that_are_not_llavas_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_conversations({"a": VlmSource(path=str(tmp_path / "a.json"), images=str(tmp_path))})


def test_a_line_of_jsonl_may_hold_any_separator_of_unicode(tmp_path: Path) -> None:
    lines = [json.dumps(record(f"what?{mark}"), ensure_ascii=False) for mark in ("\u2028", "\u0085")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    assert len(read_conversations({"a": VlmSource(path=str(tmp_path / "a.jsonl"))})) == 2


def test_a_conversation_that_is_cut_within_its_image_is_named(vlm: Vlm) -> None:
    turns = (Turn("user", "is there a tree? " * 3 + "<image>"), Turn("assistant", "yes"))
    samples = Samples(recipe("data.max_length=20"), vlm, [Conversation("mix/1", turns, lambda: b"")])
    message = r"conversation mix/1 has 2 tokens of its image, expected 16: it is cut after 20; put <image> at its beginning"
    with pytest.raises(DataError, match=message):
        samples[0]


def test_a_loader_pins_the_batches_that_a_gpu_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = collate([("a", Encoded([1, 2], [IGNORE, 2]), torch.zeros(1, 3, 4, 4))], pad=0)
    pin_memory(batch)
    assert {id(x) for x in pinned} == {id(x) for x in (batch.tokens_BN, batch.mask_BN, batch.labels_BN, batch.pixels_V3SS)}


def test_every_epoch_is_a_permutation_whatever_the_ranks_and_goes_on_at_any_step() -> None:
    r = recipe("samples=6", "optim.steps=10")
    whole = list_batches(r, 15, world(), 6, 0)
    seen = [i for batch in whole for i in batch]
    assert len(whole) == 10
    assert sorted(seen[:15]) == sorted(seen[15:30]) == list(range(15))
    assert seen[:15] != seen[15:30]
    two = [list_batches(r, 15, world(rank, 2), 3, 0) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two)] == whole
    assert list_batches(r, 15, world(), 6, 7) == whole[7:]


def test_sizes_that_do_not_divide_and_images_that_leave_no_room_are_told(vlm: Vlm) -> None:
    with pytest.raises(RecipeError, match="samples=32 are not divisible into 3 ranks of micro-batches of 10; use samples=30"):
        TextStreams(recipe(), vlm, [], world(0, 3))
    with pytest.raises(RecipeError, match=r"an image is 16 tokens and data.max_length is 16: no place for an answer"):
        Samples(recipe("data.max_length=16"), vlm, [])


def test_lora_starts_as_nothing_and_is_merged_under_the_old_names() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3, bias=False))
    before, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(5, 4)
    want = net(x)
    add_lora(net, Lora(rank=2, alpha=3.0))
    assert torch.equal(net(x), want)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"0.down", "0.up", "2.down", "2.up"}
    for module in net:
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.up)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3, bias=False))
    merged = merge_lora(net)
    assert merged.keys() == before.keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(x), net(x))
    assert not torch.equal(net(x), want)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora={}", None),
        ("micro_batch=33", r"'micro_batch' is 33, expected 1 to 32 \(samples\), or null"),
        ("engine.zero=3", "'engine.zero' is 3: what is saved would be empty; use 2"),
        ("optim.min_lr=1", "'optim.min_lr' is 1.0, more than 'optim.lr' 0.002"),
        ("start.source=''", r"'start.source' is empty; name a folder: start.source=FOLDER"),
        ("start={kind: parts}", r"'start.student' is empty; name a folder: start.student=FOLDER"),
        ("data.sources=null", "'data.sources' is empty; say where the conversations are"),
        ("[start={kind: parts}, start.tiles=0, trains=projector]", r"'start.tiles' is 0: without images nothing"),
        ("[lora={}, trains=projector]", "'lora' has no effect with 'trains' projector"),
    ],
)
def test_recipes_are_checked_before_anything_is_loaded(override: str, message: str | None) -> None:
    overrides = ["start.source=x", "data.sources.toy.path=x.json", *override.strip("[]").split(", ")] if override[0] == "[" else [
        "start.source=x", "data.sources.toy.path=x.json", override
    ]  # fmt: skip
    if message is None:
        assert load_vlm_recipe("toy/vlm_sft", overrides, training=True).lora == Lora()
        return
    with pytest.raises(RecipeError, match=message):
        load_vlm_recipe("toy/vlm_sft", overrides, training=True)


def test_other_commands_say_which_one_trains_a_vlm() -> None:
    with pytest.raises(RecipeError, match=r"vlm_sft is the recipe of a VLM, .*`radio-distill train toy/vlm_sft`"):
        load_recipe("toy/vlm_sft")
