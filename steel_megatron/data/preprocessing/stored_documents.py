"""Documents as they are stored: each with one end, in the dtype of the file. And how often each token occurs."""

from __future__ import annotations

from typing import Any

import numpy as np

from steel_megatron.data.native import helpers


def stored_documents(
    ids: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, eod_id: int | None, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Some of the documents that lie one after the other.

    Args:
        ids: of all documents, int32 [tokens].
        lengths: tokens of each, int64 [documents].
        chosen: which are wanted, bool [documents].
        eod_id: the token that each ends in, once; None to leave them as they are.
        dtype: uint16 or int32, which holds every id.

    Returns:
        the ids [tokens] and lengths, int64 [documents], of the chosen ones.
    """
    if helpers is None:
        return stored_documents_by_numpy(ids, lengths, chosen, eod_id, dtype)
    found: tuple[np.ndarray, np.ndarray] = helpers.stored_documents(
        ids, lengths, chosen.view(np.uint8), -1 if eod_id is None else eod_id, dtype.itemsize
    )
    return found


def stored_documents_by_numpy(
    ids: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, eod_id: int | None, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`stored_documents` gives, slower.

    Args: as for :func:`stored_documents`.
    """
    ids, lengths = ids[np.repeat(chosen, lengths)].astype(dtype), lengths[chosen]
    if eod_id is None:
        return ids, lengths
    ends = np.cumsum(lengths)
    missing = lengths == 0
    full = ~missing
    missing[full] = ids[ends[full] - 1] != eod_id  # a dialogue may end in it already
    return np.insert(ids, ends[missing], eod_id), lengths + missing


def count_ids(counts: np.ndarray, ids: np.ndarray) -> None:
    """Add to ``counts``, int64 [vocabulary], how often each of the ids [tokens], uint16 or int32, occurs."""
    if helpers is None:
        counts += np.bincount(ids, minlength=len(counts))
    else:
        helpers.count_ids(counts, ids)
