"""The compiled index helpers (csrc/index_helpers.cpp), or None where the package was built without them.

Whoever uses them has a numpy reference beside the call, which gives the same numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from steel_megatron.log import get_logger

logger = get_logger(__name__)


def _load() -> Any:
    if importlib.util.find_spec("steel_megatron._index") is None:
        return None
    try:
        return importlib.import_module("steel_megatron._index")
    except ImportError as error:
        logger.warning(f"the compiled index helpers do not load ({error}); numpy does their work, slower. Build again")
        return None


helpers: Any = _load()
"""The module ``steel_megatron._index``, or None."""
