// Each function has a numpy reference of the same numbers in steel_megatron/data/preprocessing/stored_documents.py; see documents.h.

#include "documents.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
void write(
    const int32_t* ids, const py::ssize_t documents, const int64_t* lengths, const uint8_t* chosen,
    const int64_t* stored_lengths, int64_t eod, T* to) {
  for (py::ssize_t at = 0; at < documents; ids += lengths[at++]) {
    if (chosen[at] == 0) continue;
    to = std::copy(ids, ids + lengths[at], to);
    if (*stored_lengths++ > lengths[at]) *to++ = static_cast<T>(eod);
  }
}

template <typename T>
void count(const T* ids, py::ssize_t tokens, int64_t* counts, py::ssize_t vocabulary) {
  const py::gil_scoped_release release;
  for (py::ssize_t at = 0; at < tokens; ++at) {
    require(ids[at] >= 0 && ids[at] < vocabulary, "an id outside the vocabulary");
    ++counts[ids[at]];
  }
}

}  // namespace

std::pair<py::array, Array<int64_t>> stored_documents(
    const Array<int32_t>& ids, const Array<int64_t>& lengths, const Array<uint8_t>& chosen, int64_t eod, int width) {
  const int32_t* from = ids.data();
  const int64_t* sizes = lengths.data();
  const uint8_t* which = chosen.data();
  const py::ssize_t documents = lengths.size();
  require(chosen.size() == documents, "a choice for each document");
  require(width == 2 || width == 4, "ids of 2 or 4 bytes");
  std::vector<int64_t> stored;
  int64_t total = 0, tokens = 0;
  for (py::ssize_t at = 0; at < documents; ++at) {
    require(sizes[at] >= 0 && sizes[at] <= ids.size() - total, "documents have the ids");
    total += sizes[at];
    if (which[at] == 0) continue;
    stored.push_back(sizes[at] + (eod >= 0 && (sizes[at] == 0 || from[total - 1] != eod)));
    tokens += stored.back();
  }
  require(total == ids.size(), "documents have the ids");
  py::array result = width == 2 ? py::array(py::array_t<uint16_t>(tokens)) : py::array(py::array_t<int32_t>(tokens));
  void* to = result.mutable_data();
  {
    const py::gil_scoped_release release;
    if (width == 2) write(from, documents, sizes, which, stored.data(), eod, static_cast<uint16_t*>(to));
    else write(from, documents, sizes, which, stored.data(), eod, static_cast<int32_t*>(to));
  }
  return {std::move(result), Array<int64_t>(static_cast<py::ssize_t>(stored.size()), stored.data())};
}

void count_ids(Array<int64_t>& counts, const py::array& ids) {
  require(ids.ndim() == 1 && (ids.size() == 0 || ids.strides(0) == ids.itemsize()), "ids are one piece");
  int64_t* to = counts.mutable_data();
  if (py::isinstance<py::array_t<uint16_t>>(ids)) {
    count(static_cast<const uint16_t*>(ids.data()), ids.size(), to, counts.size());
  } else if (py::isinstance<py::array_t<int32_t>>(ids)) {
    count(static_cast<const int32_t*>(ids.data()), ids.size(), to, counts.size());
  } else {
    throw py::type_error("ids are uint16 or int32");
  }
}
