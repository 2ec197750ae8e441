"""--push: what is sent and when, with a client that keeps what it is given; and exports that are not complete."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from radio_distill.cli import main
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export
from radio_distill.export.folder import faults, push, write_folder
from radio_distill.files import UNFINISHED


class Client:
    """Stands in for huggingface_hub.HfApi."""

    calls: list[tuple[str, dict]] = []
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: object) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: object) -> SimpleNamespace:
        files = sorted(path.name for path in Path(str(options["folder_path"])).rglob("*") if path.is_file())
        self.calls.append(("upload", {**options, "files": files}))
        return SimpleNamespace(commit_url="https://hub/mine/student/commit/1")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(Client, "calls", [])
    monkeypatch.setattr(Client, "error", None)
    return Client


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "student", adaptors=[])


def test_an_export_is_pushed_whole_with_card_and_checksums(
    run: Path, tmp_path: Path, client: type[Client], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "student"
    assert main(["export", str(run), "--out", str(out), "--push", "mine/student", "adaptors=none"]) == 0
    (create, made), (upload, sent) = client.calls
    assert (create, made) == ("create", {"repo_id": "mine/student", "private": True, "exist_ok": True})
    assert (upload, sent["repo_id"], Path(sent["folder_path"])) == ("upload", "mine/student", out)
    assert {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "provenance.json"} <= set(sent["files"])
    assert f"pushed {out} to https://hub/mine/student/commit/1" in capsys.readouterr().out
    assert 'from_pretrained("mine/student"' in (out / "README.md").read_text()


def test_an_export_that_is_there_is_pushed_without_another(folder: Path, client: type[Client]) -> None:
    assert main(["export", str(folder), "--push", "mine/student"]) == 0
    assert [call for call, _ in client.calls] == ["create", "upload"]


def test_nothing_is_sent_unless_asked_or_in_a_dry_run(
    run: Path, folder: Path, tmp_path: Path, client: type[Client], capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "a"), "adaptors=none"]) == 0
    assert main(["export", str(folder), "--push", "mine/student", "--dry-run"]) == 0
    assert client.calls == []
    told = capsys.readouterr().out
    assert f"dry run: would push {folder} to mine/student" in told
    assert f"  model.safetensors  {(folder / 'model.safetensors').stat().st_size} bytes" in told


@pytest.mark.parametrize("name", ["student", "a/b/c", "../b", "a/..b", "mine/the student", "mine/"])
def test_names_that_are_no_repository(folder: Path, client: type[Client], name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not a repository; expected OWNER/NAME"):
        push(folder, name)
    assert client.calls == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalTokenNotFoundError("no token"), "no login for the hub, so mine/student cannot be written; log in with `hf auth"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, so mine/student cannot be reached; unset it to push"),
        (OSError("no route\nmore"), r"the hub did not take mine/student \(no route\); .* is complete: check the network"),
        (
            HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None)),
            "403 Forbidden.*--push mine/student",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hub_that_refuses(folder: Path, client: type[Client], error: Exception, told: str) -> None:
    client.error = error
    with pytest.raises(CheckpointError, match=told):
        push(folder, "mine/student")


def test_flags_that_do_not_go_together(folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, told in (
        (["--dry-run", "--out", str(tmp_path / "x")], "--dry-run has no effect without --push"),
        ([], "export needs --out, the folder to make"),
        (["--push", "mine/student", "dtype=float16"], "export needs --out, the folder to make"),
        (["--push", "student", "--out", str(tmp_path / "x")], "--push 'student' is not a repository"),
    ):
        assert main(["export", str(run), *arguments]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- complete or not -----------------------------------------------------------------------------------------------------


def test_what_is_not_a_complete_export_is_not_pushed(run: Path, tmp_path: Path, client: type[Client]) -> None:
    with pytest.raises(CheckpointError, match="is not a complete export: it has no SHA256SUMS; export again"):
        push(run, "mine/student")
    out = write_folder(tmp_path / "out", lambda folder: [(folder / name).write_text(name) for name in "abc"] and None)
    assert faults(out) == []
    (out / "a").write_text("other")
    (out / "b").unlink()
    (out / "d").write_text("d")
    assert faults(out) == ["b is missing", "d is not in SHA256SUMS", "a has changed"]
    with pytest.raises(CheckpointError, match="b is missing; d is not in SHA256SUMS; a has changed"):
        push(out, "mine/student")
    assert client.calls == []


def test_a_writer_that_is_killed_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        write_folder(out, fill)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(UNFINISHED)
    assert faults(left) == ["it has no SHA256SUMS"]
    write_folder(out, lambda folder: (folder / "a").write_text("a") and None)
    assert faults(out) == []
