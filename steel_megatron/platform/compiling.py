"""Keeps megatron-core from loading torch's compiler for functions that may never be called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """For the first import of megatron-core: its fused functions are compiled when they are first called.

    ``megatron.core.jit`` decorates a dozen elementwise functions with ``torch.compile`` while it is imported, and the
    decorator alone loads inductor: half of the start-up of a run that calls none of them.
    """
    plain = torch.compile
    torch.compile = _at_first_call  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401  (keeps the decorator that it finds)

        yield
    finally:
        torch.compile = plain


def _at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of a function, done when it is first called."""
    if function is None:
        return functools.partial(_at_first_call, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
