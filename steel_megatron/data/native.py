"""The compiled helpers of the data layer (``steel_megatron._index``, made of csrc/), or None in a package without them.

Each caller has a reference in numpy or Python next to the call, which gives the same result.
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
        logger.warning(
            f"the compiled helpers do not load ({error}); numpy and Python do their work, slower. Build again"
        )
        return None


helpers: Any = _load()
"""The module ``steel_megatron._index``, or None."""
