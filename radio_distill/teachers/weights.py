"""Read a teacher's weights from a local file or folder or from the hub, and load them: a missing, extra or misshapen tensor is an error.

Only tensors are read: safetensors, or PyTorch files with `weights_only=True`. No code of a checkpoint ever runs.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import RadioDistillError, TeacherError
from ..files import DAMAGE, check_zip, json_file
from ..hub import Repository
from ..paths import expand
from ..weight_files import hub_id

__all__ = ["check_keys", "load", "read", "resolve"]

Prefix = str | tuple[str, ...]

NESTED = ("state_dict_ema", "state_dict", "model")
"""Under which keys trainers put the weights, best first."""
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def resolve(card: TeacherCard) -> Path | str:
    """The existing file or folder that the card's source names, or the id of a hub repository.

    Raises TeacherError when the source is a local path that does not exist or uses a variable that is not set.
    """
    try:
        source = expand(card.source)
    except RadioDistillError as error:
        raise TeacherError(f"teacher {card.name!r}: {error}; or put another `source` into its card") from error
    if (path := Path(source)).exists():
        return path
    if (hub := hub_id(source)) and "${" not in card.source:
        return hub
    raise TeacherError(
        f"teacher {card.name!r}: no file or folder {source!r} (source: {card.source}); "
        "put the weights there, or give the card the path of a .safetensors file or of a folder that holds one"
    )


def read(card: TeacherCard, files: Sequence[str] = HF_FILES, *, prefix: Prefix = "") -> dict[str, Tensor]:
    """The tensors of the card's source, by name, on the CPU.

    files: names to look for in a folder or hub repository, best first; `*.index.json` names shards. prefix: only names
    that begin with it are read, and it is cut off; a file without any such name is read whole (it holds just that part).
    With several prefixes nothing is cut off.
    Raises TeacherError when nothing is found; a hub is asked only when HF_HUB_OFFLINE is not set.
    """
    source = resolve(card)
    if isinstance(source, Path) and source.is_file():
        return _strip(_shards(card, source, prefix, partial(_beside, source.parent)), prefix)
    if isinstance(source, str):
        return _strip(_from_hub(card, Repository(source, card.revision), files, prefix), prefix)
    for name in files:
        if (source / name).is_file():
            return _strip(_shards(card, source / name, prefix, partial(_beside, source)), prefix)
    raise TeacherError(
        f"teacher {card.name!r}: none of {', '.join(files)} in folder {source}; put one there (`source` of the card)"
    )


def load(card: TeacherCard, net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into `net`; every name must fit. Raises TeacherError with the names and shapes that do not."""
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise TeacherError(
            f"teacher {card.name!r}: weights of {card.source} have other shapes than the card says: {faults}"
        ) from error
    check_keys(card, missing, unexpected)


def check_keys(card: TeacherCard, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise TeacherError when weights are missing or left over."""
    faults = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
              for what, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))) if names]  # fmt: skip
    if faults:
        raise TeacherError(
            f"teacher {card.name!r}: {card.source} is not this network: {' and '.join(faults)}; "
            "check `params` of the card, or whether the file belongs to it"
        )


def _from_hub(card: TeacherCard, repository: Repository, files: Sequence[str], prefix: Prefix) -> dict[str, Tensor]:
    try:
        return _shards(card, repository.need(*files), prefix, repository.get)
    except TeacherError:
        raise
    except RadioDistillError as error:
        raise TeacherError(f"teacher {card.name!r}: {error} (`source` of the card)") from error


def _shards(card: TeacherCard, path: Path, prefix: Prefix, get: Callable[[str], Path | None]) -> dict[str, Tensor]:
    if path.suffix != ".json":
        return _tensors(card, path, prefix)
    with json_file(path, "an index of weights", advice="get it again", error=TeacherError) as values:
        index = {str(key): str(shard) for key, shard in values["weight_map"].items()}
    names = {shard for key, shard in index.items() if key.startswith(prefix)} or set(index.values())
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TeacherError(
                f"teacher {card.name!r}: {path} names the shard {name!r}, which is outside of its folder; get it again"
            )
        shard = get(name)
        if shard is None:
            raise TeacherError(
                f"teacher {card.name!r}: {path} names the shard {name}, which is not there; copy all shards beside it"
            )
        state |= _tensors(card, shard, prefix)
    return state


def _tensors(card: TeacherCard, path: Path, prefix: Prefix) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = [key for key in file.keys() if key.startswith(prefix)] or list(file.keys())  # noqa: SIM118
                return {key: file.get_tensor(key) for key in names}
        check_zip(path)
        # RADIO's own files hold their arguments beside the weights, as a plain Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, *DAMAGE) as error:
        raise TeacherError(
            f"teacher {card.name!r}: {path} cannot be read as plain tensors ({(str(error).splitlines() or [type(error).__name__])[0]}); "
            "it is damaged, or holds code: get it again, or convert it to safetensors"
        ) from error
    if not isinstance(content, dict):
        raise TeacherError(f"teacher {card.name!r}: {path} holds a {type(content).__name__}, expected tensors by name")
    for key in NESTED:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {name.removeprefix("module."): x for name, x in content.items() if isinstance(x, Tensor)}


def _strip(state: dict[str, Tensor], prefix: Prefix) -> dict[str, Tensor]:
    cut = prefix if isinstance(prefix, str) else ""
    part = {name.removeprefix(cut): x for name, x in state.items() if name.startswith(prefix)}
    return part or state


def _beside(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None
