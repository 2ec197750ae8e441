"""A hub that refuses, hangs, or is a proxy's error page, played by a socket of this machine: said in time, and what to do."""

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from radio_distill import hub
from radio_distill.config.cards import TeacherCard
from radio_distill.errors import CheckpointError, RadioDistillError, TeacherError
from radio_distill.eval.probes.sam_decoder import SamDecoder
from radio_distill.hub import Repository
from radio_distill.student.load import load_student
from radio_distill.student.start import _timm_state
from radio_distill.teachers.weights import read

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"a": torch.arange(3.0)}
ASKED: list[str] = []
"""Paths that the server was asked for."""


class Hub(BaseHTTPRequestHandler):
    """Answers every question with `status`, `body`; as a hub that has the file model.safetensors where `body` is empty."""

    status, body = 200, b""

    def do_GET(self) -> None:
        ASKED.append(self.path)
        status, body = self.status, self.body
        if not body:
            status, body = self.as_hub()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def as_hub(self) -> tuple[int, bytes]:
        if self.path.startswith("/api/models/o/n"):
            files = [{"rfilename": "model.safetensors"}, {"rfilename": "notes.txt"}]
            return 200, json.dumps({"id": "o/n", "sha": COMMIT, "siblings": files}).encode()
        return (200, save(WEIGHTS)) if self.path.endswith("/model.safetensors") else (404, b"no")

    def log_message(self, *args: object) -> None:
        pass


PAGE = b"<html>the proxy's page</html>"
ANSWERS = {
    "refused": "asking http://127.0.0.1:PORT failed \\(.*refused\\)",
    "hangs": "http://127.0.0.1:PORT did not answer within 0.5 s",
    "404": r"http://127.0.0.1:PORT answered 404 Not Found \(a proxy\? see HTTPS_PROXY, HF_ENDPOINT\)",
    "407": "http://127.0.0.1:PORT answered 407 Proxy Authentication Required",
    "503": "http://127.0.0.1:PORT answered 503 Service Unavailable",
    "page": r"http://127.0.0.1:PORT answered with something else than a list of files \(a proxy's page\?\)",
    "offline": r"HF_HUB_OFFLINE is set \(unset it to download\)",
}


@pytest.fixture
def answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """What the hub does (a key of ANSWERS, or `works`); gives the reason that is expected in messages."""
    kind = getattr(request, "param", "works")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = None
        if kind == "refused":
            listener.close()
        elif kind not in ("hangs", "offline"):
            listener.close()
            body = b"" if kind == "works" else PAGE
            handler = type("Answer", (Hub,), {"status": int(kind) if kind.isdecimal() else 200, "body": body})
            server = ThreadingHTTPServer(("127.0.0.1", port), handler)
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(hub, "PATIENCE_S", 0.5 if kind == "hangs" else 12.0)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", kind == "offline")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for name in ("HF_HUB_CACHE", "AGENT_HARNESSES_PATH"):
            monkeypatch.setattr(constants, name, str(tmp_path / name), raising=False)
        ASKED.clear()
        yield ANSWERS.get(kind, "").replace("PORT", str(port))
        if server:
            server.shutdown()
            server.server_close()


def card(revision: str | None = None, source: str = "o/n") -> TeacherCard:
    return TeacherCard.model_validate(
        {
            "name": "t", "family": "timm", "source": source, "revision": revision, "licence": "none",
            "input": {"size": 32, "patch": 16, "mean": [0.5] * 3, "std": [0.5] * 3}, "output": {"summary": 8, "features": 8},
        }
    )  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, indirect=True)
def test_without_the_hub_everything_that_reads_it_says_what_was_tried_and_how_to_bring_the_file(answer: str) -> None:
    start = time.monotonic()
    advice = r"the local cache .* has none\. On a machine with a network: hf download {} --local-dir FOLDER; copy FOLDER here"
    with pytest.raises(TeacherError, match=rf"teacher 't': none of model.safetensors, .* in hub repository 'timm/x.y': {answer}.*, and "
                       + advice.format("timm/x.y") + r" and give its path \(`source` of the card\)"):  # fmt: skip
        read(card(source="timm:x.y"))
    with pytest.raises(CheckpointError, match=f"o/n is no path here, .*{answer}.*, and {advice.format('o/n')}"):
        load_student("o/n")
    with pytest.raises(TeacherError, match=f"SAM decoder 'o/n' .*{answer}"):
        SamDecoder.load("o/n")
    name = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(CheckpointError, match=rf"start.source .* is no file and timm .*{answer}.*, and {advice.format(name)}"):
        _timm_state("vit_tiny_patch16_224")
    assert time.monotonic() - start < 20


def test_what_the_hub_has_is_downloaded_once_and_what_it_has_not_is_not_asked_for(answer: str) -> None:
    assert torch.equal(read(card())["a"], WEIGHTS["a"])
    assert torch.equal(read(card(COMMIT))["a"], WEIGHTS["a"])
    assert sum(path.startswith("/api/models/") for path in ASKED) == 1, "a commit that is in the cache needs no question"
    with pytest.raises(RadioDistillError, match=r"'o/n' has none of w.bin, v.pt; it has model.safetensors, notes.txt$"):
        Repository("o/n").need("w.bin", "v.pt")
    assert not any(path.endswith(("w.bin", "v.pt")) for path in ASKED)


def test_what_is_in_the_cache_is_used_without_the_hub(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Repository("o/n").need("model.safetensors")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert Repository("o/n").need("model.safetensors") == path
    assert Repository("o/n").folder(["*.safetensors"]) == path.parent


def test_a_file_that_is_listed_and_does_not_come_is_no_missing_file(answer: str) -> None:
    with pytest.raises(RadioDistillError, match=r"notes.txt of hub repository 'o/n' could not be downloaded: .* 404 Not Found"):
        Repository("o/n").get("notes.txt")


def test_a_name_that_no_repository_can_have_is_told(answer: str) -> None:
    with pytest.raises(RadioDistillError, match=r"is no path here and cannot be a hub repository: Repo id must"):
        Repository("a--b/..").need("x")
