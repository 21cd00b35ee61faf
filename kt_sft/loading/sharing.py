"""One store per (checkpoint, module, what it computes, options) in a process.

A DPO run with an explicit reference model loads the same frozen experts twice; both models get the same store. The
cache holds weak references, so a store lives exactly as long as a model that uses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable

from kt_sft.engine.store import LayerStore

_stores: weakref.WeakValueDictionary[Hashable, LayerStore] = weakref.WeakValueDictionary()


def shared_store(key: Hashable) -> LayerStore | None:
    """The living, completely filled store published under `key`, if any."""
    return _stores.get(key)


def publish_store(key: Hashable, store: LayerStore) -> None:
    """Makes a completely filled store available to later loads of the same weights."""
    _stores[key] = store
