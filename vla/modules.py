"""``nn.ModuleDict`` with the type of what it holds."""

from collections.abc import Mapping
from typing import Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


class ModuleDict(nn.ModuleDict, Generic[M]):
    """Modules of one kind by name; parameters are named as in ``nn.ModuleDict``."""

    def __init__(self, modules: Mapping[str, M]) -> None:
        super().__init__(modules)

    def __getitem__(self, key: str) -> M:
        return cast(M, super().__getitem__(key))
