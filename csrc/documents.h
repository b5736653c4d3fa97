// Documents on their way out of a tokenizer: as they are stored, and how often each token occurs.

#pragma once

#include "arrays.h"

#include <pybind11/pybind11.h>

#include <utility>

// The chosen ones of documents that lie one after the other: their ids as uint16 or int32, where `width` is 2 or 4 bytes,
// and their lengths; each ends in `eod` once, unless that is negative. `chosen` has a byte for each document.
std::pair<pybind11::array, Array<int64_t>> stored_documents(
    const Array<int32_t>& ids, const Array<int64_t>& lengths, const Array<uint8_t>& chosen, int64_t eod, int width);

// Adds to `counts` how often each id occurs; `ids` are uint16 or int32.
void count_ids(Array<int64_t>& counts, const pybind11::array& ids);
