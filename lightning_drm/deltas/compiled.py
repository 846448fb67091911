"""What `torch.compile` puts around modules and methods, and computing without it.

`torch.compile(module)` is a module around the other one, and so a part of its parameters' names. ``module.compile()``
changes no name. A compiled method stays bound to its own module, also in a copy of that module. Code that is compiled
already calls no hooks that come later.

Importing the compiler takes a second, and nothing is compiled where nobody has imported it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` has put around another one."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given; itself where it is none of that."""
    while is_compiled(module):
        module = module.get_submodule("_orig_mod")
    return module


def compiled_methods(module: nn.Module) -> dict[str, MethodType]:
    """By attribute of a module, the methods behind the compiled ones that it holds, ``module.compile()`` aside.

    Args:
        module: A module; those inside of it do not count.
    """
    if is_compiled(module):
        return {}
    in_place = "_compiled_call_impl"  # which no copy of a module has
    functions = {n: value for n, value in vars(module).items() if isinstance(value, FunctionType) and n != in_place}
    methods = {name: getattr(value, "_torchdynamo_orig_callable", None) for name, value in functions.items()}
    return {name: method for name, method in methods.items() if isinstance(method, MethodType)}


@contextmanager
def eagerly() -> Iterator[None]:
    """While it lasts, nothing runs as it was compiled, so that hooks are called."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
