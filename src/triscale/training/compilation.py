"""Towers whose blocks are compiled by torch.compile, such that the step stays exact and nothing is compiled twice.

Block by block, as torchtitan does it: blocks that are alike share their kernels, and what FSDP2 gathers for a block and
what rematerialisation repeats of it happen outside of the compiled code. The rest of a tower (patches, token embedding,
projection) runs as it is.

- Both passes of the step run the same code: `Lane` runs the first one with gradients switched on, too, and drops its
  graph. Without them a block would be compiled a second time, into code that may round differently and need not draw
  its random numbers in the same order. The price is that the first pass writes what it would not have kept; the memory
  is that of one micro-batch, which the second pass takes anyway.
- Rematerialisation "block" stays around the compiled code, which its replay runs again. torch.compile's own form draws
  other random numbers where gradients are asked for than where they are not, and keeps more. "selective" decides about
  single operations, which compiled code no longer has, and is refused.
- The number of rows is dynamic: one code serves micro-batches of every size above 1, packed captions of any length, and
  half of a micro-batch after an out-of-memory. (A micro-batch of one row is one more.) Evaluation is another.
- CUDA graphs are refused: the next run of one writes over what the last one returned and kept for its backward pass,
  while the step holds outputs, kept graphs and accumulated gradients over many runs.

Random numbers are drawn from torch's default generators, as in the bare tower, but are not the same numbers.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from triscale.errors import RunError, UsageError
from triscale.training.batch_norm import SynchronisedBatchNorm
from triscale.training.memory import is_out_of_memory
from triscale.training.remat import blocks_of, mode_of
from triscale.training.settings import checked_compile_mode

_NUMBERS = itertools.count()


class CompiledBlock:
    """Base of the classes that blocks of a compiled tower are of, beside their own."""


def compile_tower(tower: nn.Module, mode: str = "default", blocks: Iterable[nn.Module] | None = None) -> nn.Module:
    """Have each of a tower's blocks compiled when it is first used. In place.

    Names of parameters and of the state dict stay as they are; deep copies are compiled, too, and share the code. To be
    called before sharding. A block must be capturable as one graph.

    Args:
        tower: any module.
        mode: "none", or torch.compile's "default" or "max-autotune-no-cudagraphs" (which tries kernels out).
        blocks: modules of the tower; None: `remat.blocks_of(tower)`; `[tower]`: the tower as a whole.

    Returns:
        The tower.

    Raises:
        UsageError: another mode, no blocks, blocks that are not the tower's, or one that is compiled already,
            rematerialises selectively or synchronises BatchNorm.
    """
    if checked_compile_mode("compilation", mode) == "none":
        return tower
    chosen = blocks_of(tower) if blocks is None else list(dict.fromkeys(blocks))
    if not chosen:
        raise UsageError(f"{type(tower).__name__} has no repeated blocks to compile: pass blocks=, its parts or itself")
    for block in chosen:
        if block not in tower.modules():
            raise UsageError(f"a {type(block).__name__} to compile is no part of the tower: pass blocks= of it")
        for module in block.modules():
            _refuse(block, module)
    for block in chosen:
        # As FSDP2 does it: what calls type(block).forward, rematerialisation among others, runs the compiled code.
        block.__class__ = _compiled_class(type(block), mode)
    return tower


def _refuse(block: nn.Module, module: nn.Module) -> None:
    """Raise UsageError if a module of the block, or the block itself, keeps it from being compiled."""
    name, mode = f"a {type(block).__name__} to compile", mode_of(module)
    if _is_compiled(module):
        raise UsageError(f"{name} is compiled already")
    if isinstance(module, SynchronisedBatchNorm):
        raise UsageError(f"{name} synchronises BatchNorm with other processes, which compiled code cannot")
    if mode == "selective":
        raise UsageError(
            f"{name} rematerialises selectively, operation by operation, which compiled code has none of: "
            'use rematerialisation "block" or "none"'
        )
    if mode == "block" and module is not block:
        raise UsageError(f"{name} has a part that rematerialises: pass the same blocks= to both")
    if mode == "none" and module is block and "forward" in vars(block):
        raise UsageError(f"{name} has a forward pass of its own: pass blocks= without it")


def is_compiled(tower: nn.Module) -> bool:
    """Whether any part of a tower is compiled, by `compile_tower` or by torch.compile."""
    return any(_is_compiled(module) for module in tower.modules())


def refuse_cuda_graphs(tower: nn.Module) -> None:
    """Raise UsageError for a tower that was given to torch.compile in a mode with CUDA graphs."""
    for module in tower.modules():
        for config in map(_compiler_config, (module, module._compiled_call_impl)):
            if config is not None and (config() or {}).get("triton.cudagraphs"):
                raise UsageError(
                    f"a {type(module).__name__} is compiled with CUDA graphs, which write over outputs and activations "
                    'that the step still needs: compile it in mode "default" or "max-autotune-no-cudagraphs"'
                )


def _is_compiled(module: nn.Module) -> bool:
    if isinstance(module, CompiledBlock) or module._compiled_call_impl is not None:
        return True
    return _compiler_config(module) is not None


def _compiler_config(compiled: Any) -> Callable[[], dict[str, Any] | None] | None:
    """What says how torch.compile was asked to compile a module or function; None for one that it was not given."""
    return getattr(compiled, "get_compiler_config", None)


def _compiled_class(kind: type[nn.Module], mode: str) -> type[nn.Module]:
    """`kind` with its forward pass compiled, for one block."""
    compiled = torch.compile(_with_own_code(kind.forward), fullgraph=True, mode=mode)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.ndim:
                torch._dynamo.maybe_mark_dynamic(value, 0)  # rows, or tokens of all rows
        try:
            return compiled(self, *args, **kwargs)
        except Exception as error:
            failure = _failure_of_compiler(kind.__name__, error)
            if failure is None:
                raise
            raise failure from error

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (CompiledBlock, kind), {**names, "forward": forward})


def _with_own_code(function: Any) -> types.FunctionType:
    """A copy of a function whose compiled forms are its own.

    torch.compile keeps them by code object, and gives up after eight, which blocks that differ in a number (such as
    their stochastic depth) would soon be. By the code's name it notes what sizes it has seen and takes for dynamic what
    differs, which would be the widths of a network of several stages.
    """
    code, names, closure = function.__code__, function.__globals__, function.__closure__
    code = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")
    copied = types.FunctionType(code, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _failure_of_compiler(name: str, error: Exception) -> Exception | None:
    """What compiling a block failed with, in one line; None if it was not compiling that failed."""
    from torch._dynamo import exc  # here, because it takes seconds, and only compiled towers need it

    if isinstance(error, exc.FailOnRecompileLimitHit):
        return UsageError(f"a {name} would be compiled again and again: something besides its rows changes in size")
    if not isinstance(error, exc.TorchDynamoException):
        return None
    inner = error.inner_exception if isinstance(error, exc.BackendCompilerFailed) else error
    if is_out_of_memory(inner):
        return inner
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    reason = f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__
    if isinstance(error, exc.BackendCompilerFailed):
        return RunError(f"a {name} could not be compiled; without compilation it can be trained ({reason})")
    return UsageError(f"a {name} cannot be compiled as one graph; train without compilation ({reason})")
