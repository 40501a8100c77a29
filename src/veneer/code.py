"""What a module's code says of itself: the names that its forward uses, and the children whose tensors it reads."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

TENSORS = ("weight", "bias")
# what may be asked of a tensor without computing with it
INSPECTED = frozenset(("dtype", "device", "shape", "size", "ndim", "dim", "is_meta", "requires_grad", "numel", "element_size", "is_cuda"))


def own_class(module: nn.Module) -> type:
    """The class of `module` without what attaching has put round it."""
    return next(c for c in type(module).__mro__ if "_veneer_generated" not in c.__dict__)


def codes(cls: type) -> Iterator[CodeType]:
    """The code of `cls.forward`, of what is nested in it, and of the methods of the class that it calls."""
    seen: set[str] = set()
    todo = ["forward"]
    while todo:
        method = todo.pop()
        if method in seen:
            continue
        seen.add(method)
        fn = inspect.unwrap(getattr(cls, method))
        code = getattr(getattr(fn, "__func__", fn), "__code__", None)
        stack = [code] if code is not None else []
        while stack:
            c = stack.pop()
            yield c
            stack += [k for k in c.co_consts if isinstance(k, CodeType)]
            own = {k for k in c.co_names if not k.startswith("__")}
            todo += [k for k in own if callable(getattr(cls, k, None)) and not hasattr(nn.Module, k)]


@lru_cache(maxsize=1024)
def code_names(cls: type) -> frozenset[str]:
    """Every name that the forward of `cls` uses, and the methods of the class that it calls.

    'is_causal=True' stands for a call with that argument.
    """
    names: set[str] = set()
    for c in codes(cls):
        names.update(c.co_names)
        if any(isinstance(k, tuple) and "is_causal" in k for k in c.co_consts) and True in c.co_consts:
            names.add("is_causal=True")
    return frozenset(names)


@lru_cache(maxsize=1024)
def reads(cls: type) -> frozenset[str]:
    """Names of the children of `cls` whose weight or bias its own code computes with, as Mamba's mixer does with
    conv1d: a deviation of such a child's output may never be met, one in the tensor always is.

    Where every child that is read is called too (Bloom's slow path), the calls are what counts, and none is named.
    """
    found: set[str] = set()
    called: set[str] = set()
    for c in codes(cls):
        ops = [op for op in dis.get_instructions(c) if op.opname not in _NOISE]
        for i, op in enumerate(ops[:-1]):
            if not op.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) or not i or not _is_self(ops[i - 1], c):
                continue
            if ops[i + 1].argval not in TENSORS:
                called.add(str(op.argval))
            elif i + 3 < len(ops) and not _inspected(ops[max(0, i - 2) : i + 4], min(i, 2) + 1):
                found.add(str(op.argval))
    return frozenset(found) if found - called else frozenset()


def _is_self(op: Any, code: CodeType) -> bool:
    me = code.co_varnames[:1] if code.co_argcount else ("self",)  # a nested function closes over it
    loaded = op.argval[-1:] if isinstance(op.argval, tuple) else (op.argval,)
    return op.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD_FAST")) and loaded == me


_NOISE = frozenset(("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL", "NOP"))


def _inspected(ops: list[Any], i: int) -> bool:
    """Whether the tensor that instruction i loads is only asked for its dtype and the like, or compared with None."""
    after, then = ops[i + 1], ops[i + 2]
    tested = after.opname == "LOAD_CONST" and after.argval is None and then.opname == "IS_OP"
    return tested or after.argval in INSPECTED or (i >= 3 and ops[i - 3].argval == "isinstance")
