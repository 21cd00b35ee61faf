"""Turns an engine that failed, or has stopped, into an error that says so, where its result is waited for.

The native side looks every second whether the engine does anything at all (csrc/moe/engine.h): a slow pass is none that
has stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EngineError(RuntimeError):
    """The engine cannot give the result of a pass; the message says why."""


@contextmanager
def explained(direction: str, tokens: int) -> Iterator[None]:
    """Around waiting for a pass: its failure becomes an EngineError.

    Args:
        direction: "forward" or "backward".
        tokens: Of the pass.

    Raises:
        EngineError: The pass failed, or the engine has stopped.
        IndexError: As the engine raises it, for an index of an expert that there is not.
    """
    try:
        yield
    except (EngineError, IndexError):
        raise
    except MemoryError as error:
        raise EngineError(
            f"kt_sft: no memory was left for the {direction} of {tokens} tokens through a layer's experts; set "
            "scratch_mb or retained_mb lower, or use shorter batches"
        ) from error
    except Exception as error:
        said = str(error) or type(error).__name__
        said = said.removeprefix("kt_sft: ")
        raise EngineError(f"kt_sft: the expert engine failed in the {direction} of {tokens} tokens: {said}") from error
