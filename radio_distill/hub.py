"""Get files of a model repository from the Hugging Face hub or its local cache, and give up within seconds when the hub does not answer.

`huggingface_hub` asks up to six times for every file that is not in its cache: 25 s each where connections are refused, and
minutes where nothing answers. So the hub is asked once, for the list of files; without an answer only the cache is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from threading import Thread
from typing import TypeVar

from .errors import RadioDistillError

__all__ = ["Repository"]

Value = TypeVar("Value")

PATIENCE_S = 12.0
"""How long the hub may take to list a repository."""
LISTED = 8
"""How many file names an error shows."""


class Repository:
    """A model repository (`owner/name`) at a revision (a branch, tag or commit; None: the default branch)."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise RadioDistillError(f"{name!r} is no path here and cannot be a hub repository: {error}") from error
        self.name, self.revision = name, revision
        self.trouble = ""
        """Why the hub did not list its files; empty while it has not been asked, or when it did."""

    def get(self, file: str) -> Path | None:
        """The file in the local cache, downloaded if need be; None where there is none.

        Raises RadioDistillError when the repository has the file and it cannot be downloaded.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        if self.revision and isinstance(found := try_to_load_from_cache(self.name, file, revision=self.revision), str):
            return Path(found)
        if self._files is None:
            found = try_to_load_from_cache(self.name, file, revision=self.revision)
            return Path(found) if isinstance(found, str) else None
        if file not in self._files:
            return None
        return self._download(file, lambda: hf_hub_download(self.name, file, revision=self.revision))

    def need(self, *files: str) -> Path:
        """The first of the files that the repository has. Raises RadioDistillError saying what was tried and what to do."""
        for file in files:
            path = self.get(file)
            if path is not None:
                return path
        raise self.without(files)

    def folder(self, patterns: Sequence[str]) -> Path:
        """The folder in the local cache that holds the files matching the patterns. Raises RadioDistillError."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        if self._files is None:
            try:
                return Path(
                    snapshot_download(self.name, revision=self.revision, allow_patterns=[*patterns], local_files_only=True)
                )
            except LocalEntryNotFoundError as error:
                raise self.without(patterns) from error
        return self._download(
            "its files", lambda: snapshot_download(self.name, revision=self.revision, allow_patterns=[*patterns])
        )

    def without(self, files: Sequence[str]) -> RadioDistillError:
        """The error for a repository in which none of the files was found."""
        from huggingface_hub.constants import HF_HUB_CACHE

        if self._files is not None:
            shown = ", ".join(sorted(self._files)[:LISTED]) + (", ..." if len(self._files) > LISTED else "")
            return RadioDistillError(
                f"hub repository {self.name!r} has none of {', '.join(files)}; it has {shown or 'no files'}"
            )
        revision = f" --revision {self.revision}" if self.revision else ""
        return RadioDistillError(
            f"none of {', '.join(files)} in hub repository {self.name!r}: {self.trouble}, and the local cache {HF_HUB_CACHE} has none. "
            f"On a machine with a network: hf download {self.name}{revision} --local-dir FOLDER; copy FOLDER here and give its path"
        )

    @cached_property
    def _files(self) -> frozenset[str] | None:
        """Names of all its files; None when the hub did not say."""
        from huggingface_hub import HfApi

        def ask() -> frozenset[str]:
            info = HfApi().model_info(self.name, revision=self.revision, timeout=2 * PATIENCE_S)
            return frozenset(sibling.rfilename for sibling in info.siblings or ())

        try:
            return _within(PATIENCE_S, ask)
        except Exception as error:  # the hub's own errors, those of its HTTP library, and of whatever a proxy sent as JSON
            self.trouble = _reason(error)
            return None

    def _download(self, what: str, download: Callable[[], str]) -> Path:
        from huggingface_hub.errors import GatedRepoError

        try:
            return Path(download())
        except GatedRepoError as error:
            raise RadioDistillError(
                f"{self.name} is given out only to those who accept its licence; accept it on its hub page, then log in with "
                "`hf auth login`"
            ) from error
        except Exception as error:  # as above
            raise RadioDistillError(
                f"{what} of hub repository {self.name!r} could not be downloaded: {_reason(error.__cause__ or error)}; run the command again to continue the download"
            ) from error


def _within(seconds: float, call: Callable[[], Value]) -> Value:
    """What `call` returns or raises. TimeoutError after `seconds`: looking up a host's name knows no timeout of its own."""
    answer: Future[Value] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    return answer.result(timeout=seconds)


def _reason(error: BaseException) -> str:
    """In one clause, what went wrong between here and the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set (unset it to download)"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where} knows none of that name, or it is private (log in with `hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return f"{where} does not know that revision of it"
    if isinstance(error, HfHubHTTPError):
        answer = error.response
        return (
            f"{where} answered {answer.status_code} {answer.reason_phrase}".rstrip()
            + " (a proxy? see HTTPS_PROXY, HF_ENDPOINT)"
        )
    if isinstance(error, TimeoutError):
        return f"{where} did not answer within {PATIENCE_S:g} s"
    if isinstance(error, JSONDecodeError):
        return f"{where} answered with something else than a list of files (a proxy's page?)"
    return f"asking {where} failed ({(str(error).splitlines() or [type(error).__name__])[0]})"
