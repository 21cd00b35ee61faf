"""A tensor that is computed when something first needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: What only asks for another shape is put off as well.
_RESHAPES = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)


class Deferred(Tensor):
    """Stands for the result of a function that has not been called yet.

    Whatever torch is asked to do with it calls the function first, once, and goes on with the plain tensor that it
    gave: operations, methods, attributes as `shape`. A change of shape alone gives another Deferred.
    """

    _compute: Callable[[], Tensor] | None
    _result: Tensor | None

    @classmethod
    def of(cls, compute: Callable[[], Tensor]) -> Deferred:
        """Puts `compute` off."""
        deferred = torch.empty(0, device="cpu").as_subclass(cls)
        deferred._compute, deferred._result = compute, None
        return deferred

    @property
    def is_computed(self) -> bool:
        """Whether the function has been called."""
        return self._compute is None

    def result(self) -> Tensor:
        """The plain tensor, computed now if nobody has needed it before."""
        if self._compute is not None:
            self._result, self._compute = self._compute(), None
        assert self._result is not None
        return self._result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does what torch was asked to do, with plain tensors."""
        kwargs = kwargs or {}
        if func in _RESHAPES and isinstance(args[0], Deferred) and not args[0].is_computed:
            source, *shape = args
            return cls.of(lambda: func(source.result(), *shape, **kwargs))
        args, kwargs = tree_map_only(Deferred, lambda deferred: deferred.result(), (args, kwargs))
        return func(*args, **kwargs)
