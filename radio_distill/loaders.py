"""Code of the user's, named in a recipe or card as `package.module:name`: the one place where such a name is imported.

Teachers, loss terms, balancers, optimizers, data sets and tasks of an evaluation, and the tables of our own that name
functions, all come through here. Before a module that is not ours is imported, one line of the log says so. Nothing is ever
imported because a folder that was opened (an export, an upsampler, a run) names it: only recipes, cards and suites do.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .errors import RadioDistillError

__all__ = ["check_call", "import_extra", "import_named", "is_named", "is_ours", "look_here"]

FORM = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""What `package.module:name` looks like, as a regular expression."""

log = logging.getLogger(__name__)
_told: set[str] = set()


def is_named(text: object) -> bool:
    """Whether a value has the form `package.module:name`."""
    return isinstance(text, str) and re.fullmatch(FORM, text) is not None


def is_ours(target: str) -> bool:
    """Whether `package.module:name` is code of this package."""
    return target.partition(":")[0].partition(".")[0] == __package__


def import_named(
    target: str, *, by: str, expected: str = "a function", error: type[RadioDistillError] = RadioDistillError
) -> Callable[..., Any]:
    """The function or class that `target` (`package.module:name`) means; what is installed goes before the current folder.

    by: who names it, as messages say it (`optim.loader`). expected: what should be there, in words. Raises `error` when the
    form is wrong, the module is not found or fails when it is imported, or it has no such name that can be called.
    """
    if not is_named(target):
        raise error(f"{by} is {target!r}, expected package.module:name of {expected}")
    name, _, attribute = target.partition(":")
    module = _imported(name, target, by, error)
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    where = getattr(module, "__file__", None) or name
    if found is not None:
        raise error(f"{by}: {attribute!r} in {where} is a {type(found).__name__}, expected {expected}")
    near = get_close_matches(attribute, [n for n in vars(module) if not n.startswith("_")], 1)
    raise error(f"{by}: {where} has no {attribute!r}, expected {expected}" + (f"; did you mean {near[0]!r}?" if near else ""))


def import_extra(module: str, needs: str, *, extra: str, error: type[RadioDistillError] = RadioDistillError) -> Any:
    """A module of an optional package. Raises `error` where it is not installed: who `needs` it, and the extra that installs it."""
    try:
        return import_module(module)
    except ImportError as fault:
        raise error(f'{needs} pip install "radio-distill[{extra}]"') from fault


def check_call(
    function: Callable[..., Any], *arguments: Any, by: str, options: Mapping[str, Any], error: type[RadioDistillError]
) -> None:
    """Raise `error` when `function(*arguments, **options)` could not be called, for what the function takes."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as fault:
        name = f"{function.__module__}:{getattr(function, '__name__', '')}{signature}"
        given = f"{len(arguments)} value{'s' * (len(arguments) != 1)}" + "".join(f", {key}=" for key in options)
        raise error(f"{by}: {name} cannot be called with {given}: {fault}") from None


def look_here() -> None:
    """Let Python find modules of the current folder, after all others; `python -m` does it by itself, a console script does not."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _imported(name: str, target: str, by: str, error: type[RadioDistillError]) -> ModuleType:
    look_here()
    _tell(name, target, by)
    try:
        return import_module(name)
    except ModuleNotFoundError as fault:
        if fault.name is not None and (name == fault.name or name.startswith(f"{fault.name}.")):
            advice = f"run it from the folder that holds {name.partition('.')[0]}, set PYTHONPATH, or install it"
            raise error(
                f"{by}: {target!r} cannot be imported: there is no module {fault.name!r} in {os.getcwd()} or installed; {advice}"
            ) from None
        raise error(_failed(by, target, fault)) from fault
    except (Exception, SystemExit) as fault:
        raise error(_failed(by, target, fault)) from fault


def _tell(name: str, target: str, by: str) -> None:
    """One line before code that is not ours is imported, once a process."""
    if is_ours(target) or name in _told:
        return
    _told.add(name)
    spec = find_spec(name.partition(".")[0])
    if spec is not None:
        log.info("importing %s (%s), which %s names", target, spec.origin or "a folder", by)


def _failed(by: str, target: str, fault: BaseException) -> str:
    frames = traceback.extract_tb(fault.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    if isinstance(fault, SyntaxError):
        where = f"{fault.filename}:{fault.lineno}: "
    return f"{by}: {target!r} cannot be imported: {where}{type(fault).__name__}: {fault}"
