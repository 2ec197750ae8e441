"""The fingerprint of a teacher: everything that changes its output; and what differs between two fingerprints.

    facts    of the card: family, loader, input, output, params; not its name, licence or notes
    weights  SHA-256 of the content: a file may be moved or renamed
    code     SHA-256 of the loader's source file and of the modules beside it that it imports

Upsamplers, balancers and run folders keep the fingerprint of the teacher that they were made with; feature caches and results of
evaluations hold it in the model's identity. What is not known of one of two teachers is not compared: without the weights of
one, their source and revision are.

What the code's digest does not see: packages installed elsewhere (a new timm is another teacher, too; pin it), modules found by
a string at run time, and files that a loader reads besides the card's `source`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .config.cards import TeacherCard
from .config.load import cards_of, code_of, upsampler_cards
from .config.recipe import Debias, Job, Recipe, Trained
from .config.upsampler_recipe import UpsamplerRecipe
from .errors import RadioDistillError
from .files import digest_of, digest_of_file, replace_text
from .loaders import look_here
from .paths import PACKAGE, cache_dir, expand
from .runs import artifact_folder
from .weight_files import local_weights

__all__ = [
    "Difference",
    "Fingerprint",
    "code_digest",
    "fingerprint",
    "fingerprints",
    "flat_map",
    "known_fingerprint",
    "weights_digest",
]

log = logging.getLogger(__name__)

FACTS = ("family", "loader", "input", "output", "params")
COSTS_ONLY = "arch"
"""Of `params`: sizes for the cost model, which no network reads."""
READ_FROM_WEIGHTS = "pool"
"""Of `output`: sizes of a part of the network that change nothing of what it gives."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".tar")
LARGE = 2**31
"""Bytes of a file from which on reading it is worth a line in the log."""
LIBRARIES = ("site-packages", "dist-packages")


class Difference(NamedTuple):
    """One fact that two teachers do not share."""

    what: str
    """`params.layer`, `input.std`, `weights`, `code`."""
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.was} -> {self.now}"


@dataclass(frozen=True)
class Fingerprint:
    """What a teacher's outputs depend on."""

    facts: Mapping[str, Any]
    """Of the card, by dotted name."""
    source: str
    revision: str | None
    weights: str | None = None
    """Digest of their content; None: they are not on this machine, or were not recorded."""
    code: str | None = None
    """Digest of the loader's code; None: there is no loader, or it was not found or recorded."""

    @property
    def digest(self) -> str:
        """One short word for all of it; equal for teachers without a difference, wherever their weights lie."""
        where = [self.weights] if self.weights else [self.source, self.revision]
        text = json.dumps([dict(self.facts), where, self.code], sort_keys=True, default=str)
        return digest_of(text)[:12]

    def differences(self, now: Fingerprint) -> list[Difference]:
        """What another teacher has that this one had not; empty when they are the same as far as both are known."""
        keys = sorted({*self.facts, *now.facts})
        found = [Difference(k, self.facts.get(k), now.facts.get(k)) for k in keys if self.facts.get(k) != now.facts.get(k)]
        if self.weights and now.weights:
            found += [Difference("weights", self.weights[:12], now.weights[:12])] if self.weights != now.weights else []
        else:
            pairs = (("source", self.source, now.source), ("revision", self.revision, now.revision))
            found += [Difference(what, was, is_now) for what, was, is_now in pairs if was != is_now]
        if self.code and now.code and self.code != now.code:
            found.append(Difference("code", self.code[:12], now.code[:12]))
        return found

    def brief(self) -> dict[str, str | None]:
        """Short digests, for machines that tell each other which teacher they have; None: not known here."""
        facts = json.dumps(dict(self.facts), sort_keys=True, default=str)
        return {
            "card": digest_of(facts)[:12], "weights": self.weights and self.weights[:12], "code": self.code and self.code[:12]
        }  # fmt: skip

    def unlike(self, brief: Mapping[str, str | None]) -> list[str]:
        """What another machine's `brief` has otherwise; only what is known on both is compared."""
        return [what for what, mine in self.brief().items() if mine and brief.get(what) and mine != brief[what]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `Fingerprint.from_dict` is the way back."""
        named = {"source": self.source, "revision": self.revision, "weights": self.weights, "code": self.code}
        return {"facts": dict(self.facts), **named}

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint:
        """Raises KeyError or TypeError for values that are none."""
        facts = dict(values["facts"])
        return cls(facts, values["source"], values["revision"], values["weights"], values["code"])


def fingerprint(card: TeacherCard) -> Fingerprint:
    """The fingerprint of a card's teacher as it is on this machine now. Large weights are read once, then known by their file."""
    return known_fingerprint(card, weights=weights_digest(card), code=code_digest(card.loader) if card.loader else None)


def known_fingerprint(card: TeacherCard, *, weights: str | None = None, code: str | None = None) -> Fingerprint:
    """What a card alone says, as of a record from before fingerprints."""
    facts = card.model_dump(mode="json", include=set(FACTS))
    facts["params"].pop(COSTS_ONLY, None)
    facts["output"].pop(READ_FROM_WEIGHTS, None)
    return Fingerprint(flat_map(facts), card.source, card.revision, weights, code)


def fingerprints(recipe: Job) -> dict[str, Fingerprint]:
    """Those of a recipe's teachers, of the upsamplers that change their maps (`sam`, `high.sam.upsampler`), and of functions of the
    user's that it names (`loss.terms.gram`)."""
    found = {key: Fingerprint({}, target, None, code=code_digest(target)) for key, target in code_of(recipe).items()}
    if isinstance(recipe, UpsamplerRecipe):
        return found | {name: fingerprint(card) for name, card in upsampler_cards(recipe).items()}
    if not isinstance(recipe, Recipe):
        return found
    found |= {name: fingerprint(card) for name, card in cards_of(recipe).items()}
    for partition, part in recipe.partitions.items():
        for name, view in part.teachers.items():
            if isinstance(view.upsampler, Trained | Debias):
                found[f"{partition}.{name}.upsampler"] = _upsampler(view.upsampler.weights)
    return found


def code_digest(target: str) -> str | None:
    """Digest of the source of `package.module:function` and of the modules beside it that it imports, one after the other.

    Beside it: in the same package, or for a module without one in the same folder. Nothing is imported or run. None when the
    module has no source file on the path.
    """
    look_here()
    invalidate_caches()
    module = target.partition(":")[0]
    files = dict(_sources(module))
    if not files:
        return None
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def flat_map(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested maps by their dotted keys; a map without a key leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_map(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _upsampler(weights: str) -> Fingerprint:
    try:
        digest = _digest(_files(artifact_folder(Path(expand(weights)), "upsampler"), configs=True))
    except (RadioDistillError, OSError):
        digest = None  # told where it is loaded
    return Fingerprint({}, weights, None, digest)


def weights_digest(card: TeacherCard) -> str | None:
    """SHA-256 of the content of a card's weights, wherever they lie; None when they are not on this machine."""
    path = local_weights(card)
    if path is None:
        return None
    try:
        if card.family == "run":
            return _digest(_files(artifact_folder(path), configs=True))
        if path.parent.parent.name == "snapshots":  # of the hub's cache: all shards
            path = path.parent
        return _digest(_files(path, configs=card.loader is not None, family=card.family))
    except (RadioDistillError, OSError):
        return None  # told where they are loaded


def _files(path: Path, *, configs: bool, family: str = "") -> list[Path]:
    """The file, or the weights in a folder: safetensors where there are any, and the JSON beside them if `configs`."""
    if path.is_file():
        return [path]
    files = [file for file in path.iterdir() if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"] or [file for file in files if file.suffix in WEIGHTS]
    # a hub repository may hold the same model for open_clip and for others
    own = [file for file in weights if file.name.startswith("open_clip") == (family == "open_clip")] or weights
    return own + [file for file in files if configs and file.suffix == ".json"]


def _digest(files: list[Path]) -> str | None:
    """Of the contents, whatever the files are called."""
    digests = sorted(_file_digest(file) for file in files)
    if len(digests) < 2:
        return digests[0] if digests else None
    return digest_of("".join(digests))


def _file_digest(path: Path) -> str:
    """SHA-256 of the content. The hub's cache names files by it; any other file is read once for each state it is in."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()  # the change time cannot be set back: a file replaced in place is read again
    return _read_once(str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=1024)
def _read_once(path: str, size: int, *state: int) -> str:
    known = cache_dir() / "digests" / digest_of(repr((path, size, state)))[:32]
    try:
        return known.read_text()
    except OSError:
        pass
    if size >= LARGE:
        log.info("reading %.0f GiB of %s, to know these weights again", size / 2**30, path)
    content = digest_of_file(Path(path))
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_text(known, content)
    except OSError:  # a cache that cannot be written to costs time only
        log.debug("cannot write %s", known)
    return content


def _sources(module: str) -> Iterator[tuple[str, Path]]:
    """The module's source file and those of the modules beside it that it imports, by name."""
    first = _find(module)
    if first is None:
        return
    top = module.partition(".")[0]
    alone = "." not in module and first.name != "__init__.py"
    root = first.parent
    if alone and any(part in LIBRARIES or part.startswith("python3") for part in root.parts):
        yield module, first  # its neighbours are all that is installed
        return
    waiting, seen = [module], set[str]()
    while waiting:
        name = waiting.pop()
        path = _find(name)
        if name in seen or path is None or path.is_relative_to(PACKAGE):
            continue
        inside = path.is_relative_to(root) and not set(LIBRARIES) & set(path.relative_to(root).parts)
        if not (inside if alone else name.partition(".")[0] == top):
            continue
        seen.add(name)
        yield name, path
        parents = name.split(".")[:-1]
        waiting += [".".join(parents[: i + 1]) for i in range(len(parents))]
        waiting += _imports(path, name if path.name == "__init__.py" else ".".join(parents))


def _imports(path: Path, package: str) -> Iterator[str]:
    """Names of modules that a source file may import, anywhere in it; `from x import y` may mean the module x.y."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if package else []
            base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            name = base if node.level else node.module or ""
            yield name
            yield from (f"{name}.{alias.name}" if name else alias.name for alias in node.names)


def _find(module: str) -> Path | None:
    """The source file of a module on the path, found without importing its packages."""
    where: list[str] | None = None
    found: Path | None = None
    for part in module.split("."):
        try:
            spec = find_spec(part) if where is None else PathFinder.find_spec(part, where)
        except ValueError:  # no name, or a module without a source (__main__)
            spec = None
        if spec is None:
            return None
        found = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
        where = list(spec.submodule_search_locations or [])
    return found
