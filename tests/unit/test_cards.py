"""Every shipped card states facts that fit each other; wrong ones are refused with file and line."""

import pytest

from radio_distill.config.load import list_cards, load_card
from radio_distill.errors import CardError
from radio_distill.listing import how_to_get, hub_id, local_weights

CARDS = list_cards()


@pytest.mark.parametrize("name", CARDS)
def test_a_shipped_card_is_named_like_its_file_and_its_size_is_whole_patches(name):
    card = CARDS[name]
    assert card.name == name.rpartition("/")[2]
    assert card.input.size % card.input.patch == 0
    assert all(0 < std < 1 and 0 < mean < 1 for mean, std in zip(card.input.mean, card.input.std))
    assert card.licence
    assert card.note


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_card_of_your_own_may_extend_a_shipped_one(tmp_path, monkeypatch):
    path = write(tmp_path, "extends: toy_clip\nname: mine\nsource: ${WEIGHTS}/mine.safetensors")
    card = load_card(path)
    assert (card.name, card.input) == ("mine", CARDS["toy_clip"].input)
    assert local_weights(card) is None
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    assert load_card("${WEIGHTS}/mine.yaml") == card
    (tmp_path / "mine.safetensors").touch()
    assert local_weights(card) == tmp_path / "mine.safetensors"


def test_a_wrong_card_is_refused_with_file_and_line(tmp_path):
    with pytest.raises(CardError) as caught:
        load_card(write(tmp_path, "extends: toy_clip\ninput:\n  sise: 84\noutput: {features: 0}"))
    assert [line.split("mine.yaml")[1] for line in str(caught.value).splitlines()] == [
        "",
        ":3: unknown key 'input.sise', did you mean 'size'?",
        ":4: 'output.features' is 0, expected more than 0",
    ]


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(CardError, match="no teacher card 'toy_clib', did you mean 'toy_clip'"):
        load_card("toy_clib")


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    with pytest.raises(
        Exception, match=r"needs the environment variable NO_SUCH_FOLDER, which is not set; export NO_SUCH_FOLDER="
    ):
        load_card("${NO_SUCH_FOLDER}/mine.yaml")


def test_what_to_do_about_missing_weights_depends_on_their_source():
    assert (hub_id("timm:vit_small"), hub_id("a/b"), hub_id("a/b.pth"), hub_id("/a/b")) == ("timm/vit_small", "a/b", None, None)
    hub = CARDS["toy_clip"].model_copy(update={"source": "a/b", "revision": "v1"})
    assert how_to_get(hub) == "on a machine with a network: hf download a/b --revision v1   (licence: Apache-2.0)"
    assert how_to_get(hub.model_copy(update={"family": "run"})) == "put them at a/b, or give the card another source"


@pytest.mark.parametrize("source", ["package:", "package:timm", "package:timm/../secrets.pth", "package:a.b/c.pth"])
def test_a_source_in_a_package_names_a_file_inside_one(source):
    from radio_distill.errors import RadioDistillError
    from radio_distill.paths import expand

    with pytest.raises(RadioDistillError, match="package"):
        expand(source)
    assert expand("package:timm/version.py").endswith("timm/version.py")
