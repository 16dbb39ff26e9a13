"""What the parts of the deploy graph need to fold weights."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Size = tuple[int, int]
M = TypeVar("M", bound=nn.Module)


def constant(value: Tensor) -> nn.Parameter:
    """A copy in float32 that is not trained."""
    return nn.Parameter(value.detach().float().clone(), requires_grad=False)


def all_of(modules: nn.ModuleList, kind: type[M]) -> list[M]:
    """The modules of a list, which are all of one kind; ModuleList does not know which."""
    found = [module for module in modules if isinstance(module, kind)]
    assert len(found) == len(modules)
    return found
