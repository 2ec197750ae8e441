"""torch.compile for the blocks of a ViT: one graph for all blocks of a kind, and one for each shape of their input.

What lies around the blocks stays as it is, and so do the names of all tensors: no wrapper goes around a module.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RadioDistillError

__all__ = ["block_runner", "blocks_of", "compile_net"]

BACKEND: Any = "inductor"
LIMIT = 64
"""Graphs of one network. Torch's own limit is 8, over all modules that were compiled: sizes, windows and teachers exceed it."""


def block_runner(*, by: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """A compiled function (block, tokens) -> tokens for blocks of one structure; a block that makes no single graph is an error.

    by: the field that asks for it, for messages.
    """
    return _compiled(_call, by=by, fullgraph=True)


def compile_net(net: nn.Module, *, by: str) -> None:
    """Compile the blocks of a frozen network in place; all of it, where no blocks are found."""
    blocks = blocks_of(net)
    if not blocks:
        net.compile(dynamic=False, backend=_backend(by), **_limit())
        return
    run = _compiled(_forward, by=by, fullgraph=False)  # code of others may have breaks
    for block in blocks:
        block.forward = partial(run, block)


def blocks_of(net: nn.Module) -> Sequence[nn.Module]:
    """The longest list of modules of one class in a network, in order; empty when there is none of two or more."""
    lists = (list(m) for m in net.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    alike = (blocks for blocks in lists if len({type(block) for block in blocks}) == 1 and "forward" not in vars(blocks[0]))
    return max((blocks for blocks in alike if len(blocks) > 1), key=len, default=[])


def _compiled(function: Callable[..., Any], *, by: str, fullgraph: bool) -> Callable[..., Any]:
    return torch.compile(function, backend=_backend(by), dynamic=False, fullgraph=fullgraph, **_limit())


def _limit() -> dict[str, Any]:
    """Options that give a network a limit of its own; a torch that has none of them gets one large limit for all."""
    known = signature(torch.compile).parameters
    if "isolate_recompiles" not in known:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
        return {}
    return {"recompile_limit": LIMIT, "isolate_recompiles": True}


def _backend(by: str) -> Any:
    """Raises RadioDistillError where the code that the compiler writes could not be built."""
    compiler = os.environ.get("CXX", "c++")
    if BACKEND == "inductor" and shutil.which(compiler) is None:
        raise RadioDistillError(
            f"{by} needs a C++ compiler and {compiler!r} is not there: install one, set CXX, or set {by}=false"
        )
    return BACKEND


def _call(block: nn.Module, tokens: Tensor) -> Tensor:
    return block(tokens)  # type: ignore[no-any-return]


def _forward(block: nn.Module, *args: Any, **options: Any) -> Any:
    return type(block).forward(block, *args, **options)
