"""What files and addresses of others cannot do: run code, leave their folder, leave secrets behind. See docs/safety.md."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch

from radio_distill.config.load import load_recipe
from radio_distill.config.secrets import holds_secret, without_secrets
from radio_distill.data.reading import ShardError, read_shard
from radio_distill.data.sources import Shard
from radio_distill.errors import RecipeError
from radio_distill.train.engine import no_code

SECRETS = [
    "https://me:pass@host/a.tar",
    "https://host/a.tar?X-Amz-Signature=abc&b=1",
    "https://host/a.tar?access_token=abc",
    "pipe:curl -s -H 'Authorization: Bearer abc' https://host/a.tar",
]
PLAIN = [
    "https://host/a-{000..009}.tar?v=2",
    "s3://bucket/a.tar",
    "/data/me:pass/a.tar",
    "https://$ME:$PASS@host/a.tar?token=${TOKEN}",
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
    assert not any(word in without_secrets(text) for word in ("pass", "abc"))
    with pytest.raises(
        RecipeError, match=r"'data.sources.a.path' holds a password or token.* export it and write \$NAME"
    ) as error:
        load_recipe("toy/stage1", [f"data.sources.a.path={text!r}"])
    assert "abc" not in str(error.value).replace("access", "")


@pytest.mark.parametrize("text", PLAIN)
def test_variables_and_plain_addresses_are_fine(text):
    assert not holds_secret(text)
    assert without_secrets(text) == text


def test_a_shard_that_cannot_be_opened_is_told_without_the_secret_of_its_address():
    with pytest.raises(ShardError) as error:
        list(read_shard(Shard("s", "pipe:false 'https://host/a.tar?sig=abc'")))
    assert "abc" not in str(error.value)
