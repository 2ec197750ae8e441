"""Conversations: where they come from, what is learned of them, and in which order."""

import io
import json
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from radio_distill.config.load import load_recipe, load_vlm_recipe
from radio_distill.config.vlm_recipe import FromParts, Lora, Patches, VlmRecipe, VlmSource
from radio_distill.errors import DataError, RecipeError
from radio_distill.toyworld import render
from radio_distill.train.distributed import World
from radio_distill.vlm import toy_lm
from radio_distill.vlm.batches import Sample, Samples, TextStreams, collate, list_batches
from radio_distill.vlm.conversations import Conversation, examine, read_conversations
from radio_distill.vlm.lora import LoraLinear, add_lora, merge_lora
from radio_distill.vlm.model import Vlm, build_vlm
from radio_distill.vlm.prompt import IGNORE, IMAGE, LITERAL_IMAGE, Encoded, Turn, encode
from radio_distill.vlm.tower import Pictures
from radio_distill.vlm.toy_questions import KINDS, SHORT, TRAIN_SEED, ask, converse

TURNS = (Turn("user", "is there a tree?"), Turn("assistant", "yes"), Turn("user", "how many?"), Turn("assistant", "two"))


OWN = "{kind: parts, student: x, lm: x, size: {"


def recipe(*overrides: str) -> VlmRecipe:
    return load_vlm_recipe("toy/vlm_sft", ["start.source=x", "data.sources.toy.path=x.json", *overrides])


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height)).save(content, "png")
    return content.getvalue()


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


def talk(*turns: tuple[str, object], **more: object) -> dict:
    return {"id": 9, "conversations": [{"from": role, "value": value} for role, value in turns], **more}


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
        (json.dumps([{"id": 3}]), r"1 of 1 conversations are left out: 1 no conversations \(a/3: expected conversations: "),
        (json.dumps([{"id": 3, "conversations": [{"from": "gpt", "value": "x"}]}]), r"1 no answer \(a/3: turns of assistant\)"),
        ("[]", r"data.sources.a.path=.*a.json holds no conversation; leave the source out"),
        (json.dumps({"data": [record()]}), r"a.json is no list of records, but a dict"),
        (
            json.dumps([record(image=["a.jpg", "b.jpg"])]),
            r"1 several images \(a/7: 2; expected one, or none\); more than data.max_bad",
        ),
        (json.dumps([record(image=7)]), r"1 image is no name \(a/7: 7; expected the name of a file\)"),
        (json.dumps([record(image="b.jpg")]), r"1 image missing \(a/7: .*b.jpg does not exist; set data.sources.a.images"),
        (json.dumps([record(video="b.mp4")]), r"1 video \(a/7: its `video` is not read\)"),
        (json.dumps(["text"]), r"1 no record \(a/0: 'text'; expected a dictionary"),
        (json.dumps([{"conversations": ["Hi"]}]), r"1 no turn \(a/0: 'Hi'; expected \{from: human"),
        (
            json.dumps([talk(("system", "Be brief."), ("human", "a"), ("gpt", "b"))]),
            r"1 unknown role \(a/9: 'system'; expected human or gpt",
        ),
        (
            json.dumps([talk(("human", "a"), ("human", "b"), ("gpt", "c"))]),
            r"1 not by turns \(a/9: turns of user, user, assistant",
        ),
        (json.dumps([talk(("human", "a"), ("gpt", None))]), r"1 value is no text \(a/9: None of gpt\)"),
        (json.dumps([talk(("human", "a"), ("gpt", " "))]), r"1 empty answer \(a/9: a turn of gpt has no text\)"),
        (json.dumps([talk(("human", "a"), ("gpt", True))]), r"1 value is no text \(a/9: True of gpt\)"),
        ('{"id": 1}\n{"id": 2', r"1 no JSON \(a/1: .*\{\"id\": 2"),
    ],
)
def test_records_that_are_not_llavas_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_conversations({"a": VlmSource(path=str(tmp_path / "a.json"), images=str(tmp_path))})


@pytest.mark.parametrize(
    ("made", "turns", "has_image"),
    [
        (talk(("gpt", "Hello"), ("human", "Hi"), ("gpt", "Bye")), ["Hi", "Bye"], False),
        (talk(("human", "Hi"), ("gpt", "Hello"), ("human", "Sure?")), ["Hi", "Hello"], False),
        (talk(("human", "How many?"), ("gpt", 3)), ["How many?", "3"], False),
        (talk(("human", "Hi"), ("gpt", "Hello"), image=None), ["Hi", "Hello"], False),
        (talk(("human", "Hi"), ("gpt", "Hello"), image=[]), ["Hi", "Hello"], False),
        (talk(("human", "<image>\nHi"), ("gpt", "Hello"), image=["a.jpg"]), ["<image>\nHi", "Hello"], True),
        (talk(("human", "<image>\nHi"), ("gpt", "Hello"), images=["a.jpg"]), ["<image>\nHi", "Hello"], True),
        (talk(("human", "Hi"), ("gpt", "<image>"), image="a.jpg"), ["Hi", LITERAL_IMAGE], True),
        (
            talk(("human", "What is <image>?"), ("gpt", "<image> is a tag")),
            [f"What is {LITERAL_IMAGE}?", f"{LITERAL_IMAGE} is a tag"],
            False,
        ),
    ],
)
@pytest.mark.parametrize("write", ["json", "one", "lines", "BOM", "jsonl", "shard"])
def test_what_llava_reads_is_read(tmp_path: Path, made: dict, turns: list[str], has_image: bool, write: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    text = {"json": json.dumps([made]), "one": json.dumps(made, indent=1)}.get(write, json.dumps(made))
    path = tmp_path / ("a.jsonl" if write == "jsonl" else "a.tar" if write == "shard" else "a.json")
    path.write_text(text + "\n" + text if write == "lines" else text, encoding="utf-8-sig" if write == "BOM" else "utf-8")
    if write == "shard":
        members = {"1.json": text.encode()} | ({"1.jpg": b"pixels"} if has_image else {})
        write_tar(path, members)
    first, *_ = read_conversations({"a": VlmSource(path=str(path), images=str(tmp_path))})
    assert [turn.text for turn in first.turns] == turns
    assert (first.image is not None) == has_image


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_a_few_odd_records_are_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [talk(("human", "a"), ("gpt", None)), record(image="no.jpg"), record(image="neither.jpg")]
    (tmp_path / "a.json").write_text(json.dumps([record("what?")] * 97 + odd))
    source = {"a": VlmSource(path=str(tmp_path / "a.json"), images=str(tmp_path))}
    assert len(read_conversations(source)) == 97
    assert "3 of 100 conversations are left out: 2 image missing (a/7: " in caplog.text
    assert "; 1 value is no text (a/9: None of gpt)" in caplog.text
    with pytest.raises(DataError, match=r"more than data.max_bad=0.02: mend the records, or raise data.max_bad"):
        read_conversations(source, max_bad=0.02)


def test_records_of_a_shard_without_their_image_or_json_are_left_out(tmp_path: Path) -> None:
    good = json.dumps(record()).encode()
    write_tar(
        tmp_path / "a.tar",
        {"1.jpg": b"", "1.json": good, "2.json": json.dumps(record(image="2.jpg")).encode(), "3.jpg": b"", "4.json": b"{"},
    )
    kept, bad = examine("a", VlmSource(path=str(tmp_path / "a.tar")))
    assert [c.key for c in kept] == ["a/a.tar/1"]
    assert [b.reason for b in bad] == ["image missing", "no .json", "no JSON"]


def test_the_letters_of_a_mark_are_text_and_no_image(vlm: Vlm) -> None:
    turns = (Turn("user", f"is there {LITERAL_IMAGE} a tree?"), Turn("assistant", "yes"))
    sample = Samples(recipe(), vlm, [Conversation("mix/1", turns, None)])[0]
    assert vlm.model.config.image_token_id not in sample.encoded.ids
    plain = Samples(recipe(), vlm, [Conversation("mix/1", TURNS[:2], None)])[0]
    assert len(sample.encoded.ids) > len(plain.encoded.ids)
    assert learned(vlm, sample.encoded.labels) == learned(vlm, plain.encoded.labels)


def test_a_conversation_whose_image_is_damaged_is_replaced_counted_and_named(
    vlm: Vlm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = (tmp_path / "no.jpg").read_bytes
    conversations = [Conversation(f"mix/{i}", TURNS, {3: lambda: b"no image", 4: missing}.get(i)) for i in range(120)]
    r = recipe("samples=40", "optim.steps=3", "optim.warmup=0", "data.max_bad=0.02", "engine.workers=0")
    streams = TextStreams(r, vlm, conversations, world())
    streams.open({})
    keys = [key for _ in range(3) for batch in streams.next(torch.device("cpu")) for key in batch.keys]
    assert len(keys) == 120
    assert sorted(set(keys)) == sorted({c.key for c in conversations} - {"mix/3", "mix/4"})
    assert keys.count("mix/5") == 3  # in its own place, and in that of both
    assert "left out: the image of conversation mix/3 cannot be read (not an image" in caplog.text
    assert "left out: the image of conversation mix/4 cannot be read ([Errno 2]" in caplog.text
    strict = TextStreams(
        recipe("samples=120", "optim.steps=1", "optim.warmup=0", "data.max_bad=0.01", "engine.workers=0"),
        vlm,
        conversations,
        world(),
    )
    strict.open({})
    with pytest.raises(
        DataError,
        match=r"2 of the 120 conversations read so far could not be used, more than data.max_bad=0.01; the last: the image",
    ):
        strict.next(torch.device("cpu"))


def test_a_line_of_jsonl_may_hold_any_separator_of_unicode(tmp_path: Path) -> None:
    lines = [json.dumps(record(f"what?{mark}"), ensure_ascii=False) for mark in ("\u2028", "\u0085")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    assert len(read_conversations({"a": VlmSource(path=str(tmp_path / "a.jsonl"))})) == 2


def test_a_conversation_that_is_cut_within_its_image_is_named(vlm: Vlm) -> None:
    turns = (Turn("user", "is there a tree? " * 3 + "<image>"), Turn("assistant", "yes"))
    samples = Samples(recipe("data.max_length=20"), vlm, [Conversation("mix/1", turns, lambda: png(8, 8))])
    message = r"conversation mix/1 has 2 tokens of its image, expected 16: it is cut after 20; put <image> at its beginning"
    with pytest.raises(DataError, match=message):
        samples[0]


def test_a_loader_pins_the_batches_that_a_gpu_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    seen = Pictures(torch.zeros(6, 48), torch.tensor([[8, 12]]))
    batch = collate([Sample("a", Encoded([1, 2], [IGNORE, 2]), seen)], pad=0)
    pin_memory(batch)
    assert {id(x) for x in pinned} == {id(x) for x in (batch.tokens_BN, batch.mask_BN, batch.labels_BN, *batch.pictures)}


def test_an_image_that_is_too_narrow_to_be_resized_is_left_out(parts: FromParts) -> None:
    vlm = build_vlm(parts.model_copy(update={"size": Patches(min_num_patches=4, max_num_patches=64)}))
    turns = (Turn("user", "is there a tree?"), Turn("assistant", "yes"))
    samples = Samples(
        recipe(), vlm, [Conversation(f"mix/{i}", turns, partial(png, *size)) for i, size in enumerate([(201, 1), (32, 8)])]
    )
    found = samples[0]
    assert found.key == "mix/1"
    (why,) = found.left_out
    assert why.startswith(
        "the image of conversation mix/0 has 201 x 1 pixels and cannot be resized: absolute aspect ratio must be"
    )


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
        TextStreams(recipe("samples=32"), vlm, [], world(0, 3))
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
        ("micro_batch=33", r"'micro_batch' is 33, expected 1 to 16 \(samples\), or null"),
        ("engine.zero=3", "'engine.zero' is 3: what is saved would be empty; use 2"),
        ("optim.min_lr=1", "'optim.min_lr' is 1.0, more than 'optim.lr' 0.0003"),
        ("start.source=''", r"'start.source' is empty; name a folder: start.source=FOLDER"),
        ("start={kind: parts}", r"'start.student' is empty; name a folder: start.student=FOLDER"),
        ("data.sources=null", "'data.sources' is empty; say where the conversations are"),
        ("[start={kind: parts}, start.tiles=0, trains=projector]", r"'start.tiles' is 0: without images nothing"),
        (
            "[start={kind: parts}, start.positions=true, start.merge=4]",
            "'start.merge' is 4: a token of several places has no row",
        ),
        ("[lora={}, trains=projector]", "'lora' has no effect with 'trains' projector"),
        (f"start={OWN}min_num_patches: 9, max_num_patches: 8}}}}", r"'start.size.min_num_patches' is 9, more than .* 8"),
        (f"start={OWN}max_num_patches: 8}}}}", "'start.size.min_num_patches' is missing: Smaller images are enlarged to it"),
        (
            f"start={OWN}min_num_patches: 1, max_num_patches: 3}}, unshuffle: 2}}",
            "a token is 2 x 2 patches; expected at least 4",
        ),
        (
            f"start={OWN}min_num_patches: 1, max_num_patches: 3}}, tiles: 2}}",
            "'start.tiles' is 2: that is for squares; remove it",
        ),
        (f"start={OWN}min_num_patches: 1, max_num_patches: 3}}, merge: 2}}", "'start.merge' is 2: that is for squares"),
        ("start={kind: parts, size: large}", "'start.size' is 'large', expected a whole number or a map of keys"),
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


def test_toy_conversations_ask_everything_first_at_times_and_as_often_for_what_is_there_as_for_what_is_not() -> None:
    firsts, answers = Counter[str](), Counter[str]()
    for i in range(200):
        sample = render(TRAIN_SEED, i, size=32)
        there = {o.name for o in sample.scene.objects}
        questions = converse(sample, np.random.default_rng(i))
        firsts[questions[0].kind] += 1
        assert [q.question.endswith(SHORT) for q in questions] == [True, *(len(questions) - 1) * [False]]
        for q in questions:
            if q.kind == "yes_no":
                name = q.question.removesuffix(SHORT).removeprefix("is there a ").removesuffix("?")
                assert (name in there) == (q.answer == "yes")
                answers[q.answer] += 1
            elif q.kind == "where":
                name = q.question.removesuffix(SHORT).removeprefix("where is the ").removesuffix("?")
                column = int(q.answer.removeprefix("column"))
                seen = np.nonzero(sample.instances_HW == 1 + [o.name for o in sample.scene.objects].index(name))[1]
                assert seen.min() // (32 / 6) - 1 <= column <= seen.max() // (32 / 6) + 1  # feet may be hidden
    assert set(firsts) == {*KINDS, "where"}
    assert abs(answers["yes"] - answers["no"]) < 3 * sum(answers.values()) ** 0.5
    assert {q.question.endswith(SHORT) for q in ask(sample)} == {True}


def test_a_toy_language_model_reads_the_cells_of_a_scene_in_the_place_of_an_image(tmp_path: Path) -> None:
    sample = render(TRAIN_SEED, 3, size=48)
    cells = toy_lm.spell(sample)
    names = {o.name for o in sample.scene.objects}
    assert len(cells) == 36
    assert cells[9][2:] == ("row1", "column3")
    assert sample.scene.objects[0].name in {cell[0] for cell in cells} <= names | {sample.scene.time, sample.scene.ground}
    middle = Counter(sample.instances_HW[16:32, 16:32].ravel().tolist()).most_common(1)[0][0]
    assert middle == 0 or sample.scene.objects[middle - 1].name in {cells[i][0] for i in (14, 15, 20, 21)}
    tokenizer = toy_lm._tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    questions = converse(sample, np.random.default_rng(0))
    ours = toy_lm.dialogue(questions, tokenizer)
    turns = [Turn(who, text) for q in questions for who, text in (("user", q.question), ("assistant", q.answer))]
    turns[0] = Turn("user", f"{36 * IMAGE}\n{turns[0].text}")
    expected = encode(tokenizer, turns, template="chat", max_length=10_000, key="0")
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    assert ours.ids == [tokenizer.pad_token_id if i == image else i for i in expected.ids]
    assert ours.labels == expected.labels


def test_a_toy_language_model_learns_by_reading_and_is_the_same_every_time(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, steps in (("random", 0), ("read", 2), ("again", 2)):
        toy_lm.write_toy_lm(tmp_path / name, width=32, depth=1, steps=steps)
    random, read, again = (load_file(tmp_path / name / "model.safetensors") for name in ("random", "read", "again"))
    assert all(torch.equal(read[key], again[key]) for key in read)
    assert not any(torch.equal(read[key], random[key]) for key in read)
