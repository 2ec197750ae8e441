"""A folder that is there completely or not at all, with SHA256SUMS over everything in it; sent to a hub repository only when `--push`
asks for it, and only when it is complete."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..files import SHA256SUMS as SUMS
from ..files import appearing, digest_of_file, put_on_disk, sums_of

__all__ = ["check_repository", "faults", "push", "weights_changed", "write_folder"]


def write_folder(out: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write into a hidden folder beside `out`, add checksums (`sha256sum -c`), then give it its name.

    Raises CheckpointError when `out` exists; whatever `fill` raises leaves nothing behind.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists; exports never write over anything: delete it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as temporary:  # its rename refuses a folder that somebody filled in the meantime
        temporary.mkdir()
        fill(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        lines = [f"{digest_of_file(path)}  {path.relative_to(temporary).as_posix()}\n" for path in files]
        (temporary / SUMS).write_text("".join(lines))
        put_on_disk(*temporary.rglob("*"), temporary)  # before the rename that makes them count
    return out


def faults(folder: Path) -> list[str]:
    """What is wrong with an export, one line per file; empty when every file is what its checksum says."""
    if (told := sums_of(folder)) is None:
        return [f"it has no {SUMS}"]
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.name != SUMS}
    lines = [f"{name} is missing" for name in sorted(told.keys() - here.keys())]
    lines += [f"{name} is not in {SUMS}" for name in sorted(here.keys() - told.keys())]
    return lines + [
        f"{name} has changed" for name in sorted(told.keys() & here.keys()) if digest_of_file(here[name]) != told[name]
    ]


def weights_changed(folder: Path) -> bool:
    """Whether a file of weights of an export is another than the one that was written; False where nothing tells."""
    told = sums_of(folder)
    return told is not None and any(
        path.name not in told or digest_of_file(path) != told[path.name] for path in folder.glob("*.safetensors")
    )


def check_repository(repository: str) -> None:
    """Raise CheckpointError unless `repository` is OWNER/NAME as a hub takes it."""
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository, flags=re.ASCII) or ".." in repository or "--" in repository:
        raise CheckpointError(
            f"--push {repository!r} is not a repository; expected OWNER/NAME of letters, digits, '-', '_' and '.'"
        )


def push(folder: Path, repository: str, *, dry_run: bool = False) -> str:
    """Upload every file of an export as one commit, and make the repository, private, where there is none.

    The checksums are verified first, so that what arrives is what was exported; with `dry_run` nothing is sent. Returns
    one line to print. Raises CheckpointError when the folder is not a complete export or when the hub refuses.
    """
    check_repository(repository)
    if wrong := faults(folder):
        raise CheckpointError(f"{folder} is not a complete export: {'; '.join(wrong[:3])}; export again, then push")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"
    if dry_run:
        listing = "\n".join(f"  {path.relative_to(folder).as_posix()}  {path.stat().st_size} bytes" for path in files)
        return f"dry run: would push {folder} to {repository} ({size})\n{listing}"
    return f"pushed {folder} to {_upload(folder, repository)} ({size})"


def _upload(folder: Path, repository: str) -> str:
    """Returns the address of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    client = HfApi()
    try:
        client.create_repo(repository, private=True, exist_ok=True)
        done = client.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Student {folder.name}, exported with radio_distill"
        )
    except LocalTokenNotFoundError as error:
        raise CheckpointError(
            f"no login for the hub, so {repository} cannot be written; log in with `hf auth login`"
        ) from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(f"HF_HUB_OFFLINE is set, so {repository} cannot be reached; unset it to push {folder}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the hub did not take {repository} ({reason}); {folder} is complete: check the network, the login (`hf auth whoami`) "
            f"and its right to write there, then run `radio-distill export {folder} --push {repository}`"
        ) from error
    return str(done.commit_url)
