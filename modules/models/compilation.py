"""``torch.compile`` for parts of a model: a graph a part for all lengths and batch sizes above 1, and one for 1.

A *region* is a module that is compiled in place, as one graph or not at all (``fullgraph=True``). What surrounds the
regions, FSDP2's hooks and Lightning's own code included, stays Python; and regions of one kind (decoder layers that
differ in their weights only) share a graph, so that a deep model compiles no longer than a shallow one. The order is:
activation checkpointing inside the region's ``forward``, then :func:`compile_region`, then ``fully_shard``.

Shapes: B samples, S tokens a sample.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

CompileMode = Literal["off", "default", "max-autotune"]

#: What Inductor calls them. ``max-autotune`` times Triton's matrix products (and their fusions) against the vendor's
#: library. Without CUDA graphs: one is recorded for one shape and fixed addresses, which gathered weights lack.
_INDUCTOR_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}


def check_compile_mode(mode: str) -> CompileMode:
    """Return ``mode`` if there is one of this name.

    Raises:
        ValueError: If not.
    """
    if mode not in get_args(CompileMode):
        raise ValueError(f"compile must be one of {', '.join(map(repr, get_args(CompileMode)))}, got {mode!r}.")
    return mode  # type: ignore[return-value]


def compile_region(
    module: nn.Module,
    mode: CompileMode = "default",
    *,
    backend: str | Callable[..., Any] = "inductor",
    kind: Hashable = None,
) -> None:
    """Compile ``module`` in place, without graph breaks and for any S. Call it before ``fully_shard``.

    The first argument of ``module`` is a tensor. Floating-point arguments [B, S, ...] may vary in all dimensions but
    the last, masks (4 dimensions) and integers in all; a dimension of size 1 stays 1. So there is one graph for all
    B > 1 and one for B = 1, and as many again where no gradients are computed, for each set of arguments that are given
    and their dtypes.

    Args:
        module: Its ``forward`` is not one of torch's own, which torch.compile leaves alone, often without a word.
        mode: How hard to look for fast code; ``"off"`` does nothing.
        backend: Another backend of torch.compile. ``"aot_eager"`` makes the same graphs quickly and runs them as they
            are.
        kind: Modules of one class and kind share their graphs. Say what makes kinds differ: each has as many graphs as
            torch.compile allows for one function (8), and all kinds of a class together would have no more.

    Raises:
        ValueError: For an unknown mode, a mode that the backend does not know, or a ``forward`` of ``torch.nn``.
    """
    if check_compile_mode(mode) == "off":
        return
    if backend != "inductor" and mode != "default":
        raise ValueError(f"compile={mode!r} is a mode of Inductor, which backend {backend!r} does not know.")
    if type(module).forward.__module__.startswith("torch."):
        raise ValueError(
            f"torch.compile would leave {type(module).__name__} as it is, because its forward is torch's own. Compile "
            "a module around it."
        )
    module.__class__ = _class_of_kind(type(module), kind)  # type: ignore[arg-type]  # classes are hashable
    module.compile(fullgraph=True, backend=backend, mode=_INDUCTOR_MODES[mode])
    learns = any(parameter.requires_grad for parameter in module.parameters())
    module.register_forward_pre_hook(functools.partial(_prepare, learns=learns), with_kwargs=True)


@functools.cache
def _class_of_kind(cls: type[nn.Module], kind: Hashable) -> type[nn.Module]:
    """``cls`` whose ``forward`` has a code object of its own, by which torch.compile stores and counts graphs."""
    if kind is None:
        return cls

    def keep_forward(subclass: Any, **kwargs: Any) -> None:
        # FSDP2 subclasses what it shards, and transformers wraps the forward of every subclass in the same code again.
        super(own, subclass).__init_subclass__(**kwargs)
        if "forward" in vars(subclass):
            del subclass.forward

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    own: Any = type(cls.__name__, (cls,), {**names, "__init_subclass__": classmethod(keep_forward)})  # type: ignore[arg-type]
    forward = own.forward
    own.forward = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.forward.__kwdefaults__ = forward.__kwdefaults__
    return own  # type: ignore[no-any-return]


@torch.compiler.disable
def _prepare(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, learns: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first, *rest = args
    if learns and torch.is_grad_enabled() and not first.requires_grad:
        # The output of a frozen embedding, for which the first layer would be a graph of its own. The price is that
        # layer's input gradient, which nobody reads.
        first = first.detach().requires_grad_()
    for tensor in _tensors((first, rest, kwargs)):
        # Marked from the start, for torch.compile finds out by compiling again, and takes equal sizes (say S and the
        # hidden size) to be equal for ever.
        varying = tensor.ndim - (1 if tensor.is_floating_point() and tensor.ndim < 4 else 0)
        torch._dynamo.mark_dynamic(tensor, [i for i in range(varying) if tensor.shape[i] > 1])
    return (first, *rest), kwargs


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
