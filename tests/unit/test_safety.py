"""What files and addresses of others cannot do: run code, leave their folder, leave secrets behind. See docs/safety.md."""

import io
import os
import tarfile
import time
from pathlib import Path

import pytest
import torch

from radio_distill.cli import main
from radio_distill.config.document import to_yaml
from radio_distill.config.load import load, load_card, load_recipe
from radio_distill.config.secrets import holds_secret, without_secrets
from radio_distill.data.reading import ShardError, read_shard
from radio_distill.data.sources import Shard
from radio_distill.errors import CardError, RecipeError
from radio_distill.teachers.base import load_teacher
from radio_distill.train.engine import no_code

SECRETS = [
    "https://me:pass@host/a.tar",
    "https://host/a.tar?X-Amz-Signature=abc&b=1",
    "https://host/a.tar?access_token=abc",
    "pipe:curl -s -H 'Authorization: Bearer abc' https://host/a.tar",
    "https://:pass@h/a",
    "https://h/a.tar?sig=abc",
    "https://acc.blob.core.windows.net/c/a.tar?sv=2023&se=2026&sr=c&sp=r&sig=abc%3D",
    "https://storage.googleapis.com/b/a.tar?X-Goog-Algorithm=x&X-Goog-Signature=abc",
    "https://h/a?access_key=abc",
    "https://h/a?AWSAccessKeyId=1&Signature=abc",
    "s3://b/a.tar?accesskey=abc",
    "https://h/a?X-Amz-Security-Token=abc",
    "https://h/a?key=AIzaSyA1234567890abcdefghijklmnopqrstuvw",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "https://hf_abcdefghijklmnopqrstuvwxyzABCDEFGH@huggingface.co/d/a.tar",
    "pipe:curl -H 'X-Auth: ghp_abcdefghijklmnopqrstuvwxyz0123456789'",
    "AKIAIOSFODNN7EXAMPLE",
    "pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/a -",
    "pipe:aws s3 cp --password abc",
    "pipe:wget --password=abc x",
    "pipe:wget --http-password 'abc' x",
    "pipe:export FOO_TOKEN=abc; x",
    "pipe:export FOO_TOKEN='abc'; x",
    'pipe:export WANDB_API_KEY="abc"; x',
    "pipe:curl -u me:abc h",
    "pipe:curl --user 'me:abc' h",
    "pipe:curl -H 'X-Api-Key: abc' h",
    "pipe:curl -H X-Api-Key:abc h",
    'pipe:curl -H "PRIVATE-TOKEN: abc" h',
    "pipe:curl --oauth2-bearer abc h",
    "pipe:sshpass -p abc ssh h cat x",
    "pipe:curl -H 'Authorization: Basic abc='",
    "pipe:curl -H 'authorization: token abc'",
    "pipe:curl -H 'Authorization: abc'",
    "Bearer abcabcabcabcabcabc",
    "DefaultEndpointsProtocol=https;AccountName=n;AccountKey=abc==;EndpointSuffix=x",
    "https://h/a?password=abc",
    "https://h/a?apiKey=abc",
    "https://h/a#access_token=abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcabc",
    "pipe:env TOKEN=abc x",
    "pipe:gsutil -o Credentials:gs_secret_access_key=abc cp x",
    "pipe:rclone --s3-secret-access-key abc cat",
    "glpat-abcdefghij0123456789",
    "pipe:huggingface-cli download --token abc x",
    "pipe:hf download --token=abc x",
    "pipe:mc --pass=abc",
]
PLAIN = [
    "https://host/a-{000..009}.tar?v=2",
    "s3://bucket/a.tar",
    "/data/me:pass/a.tar",
    "https://$ME:$PASS@host/a.tar?token=${TOKEN}",
    "my_pkg.token:make",
    "tokens/a.tar",
    "/data/token=1/a.tar",
    "/data/split=train/secret/a.tar",
    'pipe:export FOO_TOKEN=$(cat ~/.t); curl -H "Authorization: Bearer $FOO_TOKEN" h',
    'pipe:export T_TOKEN="$X"; x',
    "pipe:curl --password-file /x h",
    "pipe:curl -u $ME:$PW h",
    "pipe:aws s3 cp s3://b/a.tar -",
    "https://h/a.tar?tokenizer=x&max_tokens=512&design=1&sigma=0.5",
    "timm:vit_base?class_token=true",
    "hf_hub/models",
    "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "pipe:zstd -dc a.tar.zst",
    "pipe:ffmpeg -pass 1 x",
    "pipe:tar -cf - -C /data/key=1 .",
    "a fine name 1.2",
    "https://user@host/a.tar",
    "ssh://git@host:22/a",
    "${WEIGHTS}/sam_vit_h_4b8939.pth",
    "0123456789abcdef0123456789abcdef01234567",
    "runs/risk-task-1/skin_sk-1",
    "gs://b/sign/keys/a.tar",
    "pipe:gsutil cat gs://b/a.tar",
    "pipe:curl -s -L https://h/a.tar || true",
    "Caption this: token",
    "pad_token=0x",
    "pipe:cat /a.tar -u root",
    "pipe:ssh -p 22 me@host cat a:b",
    "pipe:docker run --user 1000:1000 x cat a",
]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_holds_code_is_refused_even_where_the_caller_would_run_it(tmp_path):
    torch.save({"module": Evil(tmp_path / "ran")}, tmp_path / "state.pt")
    with no_code(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=False)  # as DeepSpeed calls it
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_members_of_a_tar_are_read_and_never_written_or_followed(tmp_path, suffix):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    path = tmp_path / "in" / f"a.{suffix}"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz" if suffix == "tgz" else "w") as tar:
        for name, kind in (("../up.jpg", tarfile.REGTYPE), ("/etc/root.jpg", tarfile.REGTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../secret.jpg"
            member.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"abc"))
    before = sorted(tmp_path.rglob("*"))
    samples = list(read_shard(Shard("s", str(path))))
    assert [sample.parts["jpg"]() for sample in samples] == [b"abc", b"abc"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_in_an_address_is_refused_before_a_run_folder_has_it(text):
    assert holds_secret(text)
    assert not holds_secret(without_secrets(text))
    assert not any(word in without_secrets(text) for word in (":pass", "abc"))


@pytest.mark.parametrize(
    ("recipe", "key"),
    [("toy/stage1", "data.sources.a.path"), ("toy/upsampler/toy_clip", "title"), ("toy/vlm_sft", "title")],
)
def test_a_recipe_of_any_kind_with_a_secret_anywhere_is_refused_before_it_is_written(recipe, key):
    with pytest.raises(RecipeError) as error:
        load(recipe, [f"{key}=https://host/a.tar?sig=abc"])
    assert f"'{key}' holds a password or token" in str(error.value)
    assert "export it and write $NAME" in str(error.value)
    assert "abc" not in str(error.value)


def test_a_list_of_addresses_is_looked_at_one_by_one():
    with pytest.raises(RecipeError, match=r"'data.sources.a.path.1' holds a password or token"):
        load("toy/stage1", ["data.sources.a.path=[a.tar, 'pipe:export A_TOKEN=abc; cat a.tar']"])


def test_a_card_with_a_secret_is_refused(tmp_path):
    card = load_card("toy_clip").model_dump(mode="json") | {"params": {"api_key": "abc"}, "source": "https://me:abc@host/a"}
    (tmp_path / "mine.yaml").write_text(to_yaml(card))
    with pytest.raises(CardError) as error:
        load_card(tmp_path / "mine.yaml")
    assert "'params.api_key' holds" in str(error.value)
    assert "'source' holds" in str(error.value)
    assert "abc" not in str(error.value)


def test_telling_secrets_takes_no_time_for_any_text():
    for text in ("a.b-" * 5_000, "://a:" * 5_000, "token " * 5_000, "-u " * 5_000, "-H " + " " * 20_000, "eyJ" * 5_000):
        start = time.monotonic()
        without_secrets(text)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("name", ["../out", "a/b", "", "a.b", "a" * 101, "a b", "x\n"])
@pytest.mark.parametrize("what", ["teacher", "partition", "student"])
def test_names_of_a_recipe_that_become_files_stay_in_their_folder(tmp_path, what, name):
    card, path = load_card("toy_clip"), tmp_path / "r.yaml"
    values = {
        "teacher": {"teachers": {name: {"card": "toy_clip"}}},
        "partition": {"partitions": {name: {"size": 96, "images": 4, "teachers": {"toy_clip": {}}}}},
        "student": {"students": {name: {"model": "vit_tiny_patch16_224"}}},
    }[what]
    path.write_text(to_yaml({"extends": "toy/stage1", "name": "x", **values}))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert f"{what} {name[:100]!r}: its name is that of a folder; use letters, digits, - and _" in str(error.value)
    assert card.name == "toy_clip"


def test_the_name_of_a_card_is_a_name_for_a_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text(to_yaml(load_card("toy_clip").model_dump(mode="json") | {"name": "../out"}))
    with pytest.raises(CardError, match=r"'name' is '../out', expected a name for a folder"):
        load_card(tmp_path / "mine.yaml")


@pytest.mark.parametrize("command", [["doctor"], ["plan", "--check"]])
def test_commands_and_urls_of_a_recipe_are_told_and_run_only_when_asked(tmp_path, capsys, command):
    ran = tmp_path / "ran"
    argv = [command[0], "toy/stage1", f"data.sources.a.path=pipe:touch {ran}; cat /dev/null", *command[1:]]
    main(argv)
    assert not ran.exists()
    shown = " ".join(capsys.readouterr().out.split())
    assert "images a not opened 1 shards; training runs 1 command, first 'pipe:touch" in shown
    assert "; not opened, --open does it" in shown
    main([*argv, "--open"])
    assert ran.exists()


def test_of_files_and_urls_in_one_source_the_files_are_looked_at(tmp_path, capsys):
    for name, what in (("a", b"x"), ("b", b"")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            member = tarfile.TarInfo("0.jpg" if what else "0.txt")
            member.size = len(what)
            tar.addfile(member, io.BytesIO(what))
        path = f"['https://host.invalid/1.tar', 'pipe:false', '{tmp_path}/{name}.tar', 's3://bucket.invalid/a.tar']"
        main(["doctor", "toy/stage1", f"data.sources.a.path={path}"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "training runs 1 command and opens 2 URLs, first 'https://host.invalid/1.tar'" in shown
        assert ("first and last can be read; training" if what else "no image at the start") in shown


def test_a_loader_is_named_once_before_it_is_imported(tmp_path, monkeypatch, caplog):
    (tmp_path / "told_loader.py").write_text("import logging\nlogging.getLogger('mine').info('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    card = load_card("toy_clip").model_copy(update={"loader": "told_loader:make", "name": "told"})
    with caplog.at_level("INFO"):
        for _ in range(2):
            with pytest.raises(CardError, match=r"told_loader\.py has no 'make', expected a function"):
                load_teacher(card, weights="meta")
    told = f"importing told_loader:make ({tmp_path}/told_loader.py), which teacher card 'told' names"
    assert [record.getMessage() for record in caplog.records] == [told, "imported"]


@pytest.mark.parametrize("text", PLAIN)
def test_variables_and_plain_addresses_are_fine(text):
    assert not holds_secret(text)
    assert without_secrets(text) == text


def test_a_shard_that_cannot_be_opened_is_told_without_the_secret_of_its_address():
    with pytest.raises(ShardError) as error:
        list(read_shard(Shard("s", "pipe:false 'https://host/a.tar?sig=abc'")))
    assert "abc" not in str(error.value)
