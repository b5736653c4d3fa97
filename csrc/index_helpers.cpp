// What numpy does too slowly for the data layer: random orders, cutting documents into samples, reading them, mixing
// corpora. Each function has a numpy reference of the same numbers in steel_megatron/data, which says what it does;
// tests/csrc/test_index_helpers.py holds the two together. Needs no torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arrays.h"
#include "documents.h"
#include "texts.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15, kMultiply = 0xBF58476D1CE4E5B9, kMultiplyAgain = 0x94D049BB133111EB;

uint64_t finalise(uint64_t value) {
  value = (value ^ value >> 30) * kMultiply;
  value = (value ^ value >> 27) * kMultiplyAgain;
  return value ^ value >> 31;
}

uint64_t scramble(uint64_t value) {
  value *= kMultiply;
  return (value ^ value >> 32) * kMultiplyAgain;
}

// An element of an array that need not be aligned: those of a mapped .idx file are not.
template <typename T>
T load(const void* array, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(array) + index * sizeof(T), sizeof(T));
  return value;
}

// ---- permutation.py ----

class Permutation {
 public:
  Permutation(int64_t count, std::vector<uint64_t> round_keys) : count_(count), keys_(std::move(round_keys)) {
    require(count >= 0 && count <= int64_t{1} << 62 && keys_.size() % 2 == 0, "a permutation of that many");
    const int bits = count <= 4 ? 2 : 64 - std::countl_zero(static_cast<uint64_t>(count - 1));
    left_ = bits / 2;
    right_ = bits - left_;
  }

  int64_t count() const { return count_; }

  int64_t at(int64_t place) const {
    require(place >= 0 && place < count_, "a place outside the permutation");
    uint64_t value = static_cast<uint64_t>(place);
    do {
      uint64_t left = value >> right_, right = value & ((uint64_t{1} << right_) - 1);
      for (size_t round = 0; round < keys_.size(); round += 2) {
        left ^= scramble(right ^ keys_[round]) >> (64 - left_);
        right ^= scramble(left ^ keys_[round + 1]) >> (64 - right_);
      }
      value = left << right_ | right;
    } while (value >= static_cast<uint64_t>(count_));
    return static_cast<int64_t>(value);
  }

  Array<int64_t> many(const Array<int64_t>& places) const {
    Array<int64_t> result(places.size());
    const int64_t* from = places.data();
    int64_t* to = result.mutable_data();
    const py::ssize_t count = places.size();
    const py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < count; ++i) to[i] = at(from[i]);
    return result;
  }

 private:
  int64_t count_;
  std::vector<uint64_t> keys_;
  int left_ = 1, right_ = 1;
};

// ---- packing.py ----

// The sizes of documents, 0 for dropped ones.
class Sizes {
 public:
  Sizes(py::array sizes, const py::object& dropped) : sizes_(std::move(sizes)), count_(sizes_.size()) {
    narrow_ = sizes_.itemsize() == 4;
    require(sizes_.dtype().kind() == 'i' && (narrow_ || sizes_.itemsize() == 8), "sizes of documents are int32 or int64");
    require(sizes_.ndim() == 1 && (count_ == 0 || sizes_.strides(0) == sizes_.itemsize()), "sizes are one piece");
    data_ = sizes_.data();
    if (!dropped.is_none()) {
      bits_ = dropped.cast<Array<uint8_t>>();
      require(bits_.size() == (count_ + 7) / 8, "one bit for each document");
      dropped_ = bits_.data();
    }
  }

  int64_t count() const { return count_; }

  int64_t operator[](int64_t document) const {
    if (dropped_ != nullptr && dropped_[document >> 3] >> (document & 7) & 1) return 0;
    return narrow_ ? load<int32_t>(data_, document) : load<int64_t>(data_, document);
  }

 private:
  py::array sizes_;
  Array<uint8_t> bits_;
  const void* data_ = nullptr;
  const uint8_t* dropped_ = nullptr;
  int64_t count_;
  bool narrow_ = false;
};

// Where samples begin among the documents at places [begin, end), before which lie `before` tokens: [m, 2] (place,
// offset), and the tokens up to `end`.
std::pair<Array<int64_t>, int64_t> pack(
    const Permutation& order, const py::array& size_array, const py::object& dropped, int64_t length, int64_t begin,
    int64_t end, int64_t before) {
  const Sizes sizes(size_array, dropped);
  require(sizes.count() == order.count() && 0 <= begin && end <= order.count() && length > 0, "documents of an order");
  std::vector<int64_t> found;
  int64_t next = (before + length - 1) / length * length;  // the token with which the next sample begins
  {
    const py::gil_scoped_release release;
    constexpr int64_t kTogether = 64;  // documents whose sizes are fetched from memory at once
    int64_t size[kTogether];
    for (int64_t at = begin; at < end; at += kTogether) {
      const int64_t count = std::min(kTogether, end - at);
      for (int64_t i = 0; i < count; ++i) size[i] = order.at(at + i);
      for (int64_t i = 0; i < count; ++i) size[i] = sizes[size[i]];
      for (int64_t i = 0; i < count; ++i) {
        for (; next < before + size[i]; next += length) found.insert(found.end(), {at + i, next - before});
        before += size[i];
      }
    }
  }
  Array<int64_t> result(std::vector<py::ssize_t>{static_cast<py::ssize_t>(found.size() / 2), 2});
  if (!found.empty()) std::memcpy(result.mutable_data(), found.data(), found.size() * sizeof(int64_t));
  return {std::move(result), before};
}

template <typename T>
void widen(const void* from, int64_t start, int64_t count, int64_t* to) {
  std::copy_n(static_cast<const T*>(from) + start, count, to);
}

// The samples of one pass over a corpus, read in one call each.
class Reader {
 public:
  Reader(
      py::array flat, Array<int64_t> positions, const py::array& sizes, const py::object& dropped, Permutation documents,
      Permutation samples, Array<int64_t> first, int64_t length)
      : flat_(std::move(flat)), positions_(std::move(positions)), sizes_(sizes, dropped), documents_(std::move(documents)),
        samples_(std::move(samples)), first_(std::move(first)), length_(length) {
    const std::string code = std::string(1, flat_.dtype().kind()) + std::to_string(flat_.itemsize());
    widen_ = code == "u1"   ? widen<uint8_t>
             : code == "i1" ? widen<int8_t>
             : code == "u2" ? widen<uint16_t>
             : code == "i2" ? widen<int16_t>
             : code == "i4" ? widen<int32_t>
             : code == "i8" ? widen<int64_t>
                            : nullptr;
    require(widen_ != nullptr, "token ids of that type");
    require(flat_.ndim() == 1 && (flat_.size() == 0 || flat_.strides(0) == flat_.itemsize()), "tokens are one piece");
    require(sizes_.count() == positions_.size() && sizes_.count() == documents_.count(), "one position per document");
    require(first_.ndim() == 2 && first_.shape(1) == 2 && first_.shape(0) == samples_.count(), "one beginning per sample");
    ids_ = flat_.data();
    tokens_ = flat_.size();
    bytes_ = flat_.itemsize();
    position_ = positions_.data();
    begins_ = first_.data();
  }

  Array<int64_t> tokens(int64_t number) const {
    Array<int64_t> result(length_ + 1);
    read(number, result.mutable_data(), nullptr);
    return result;
  }

  std::pair<Array<int64_t>, Array<int64_t>> with_starts(int64_t number) const {
    Array<int64_t> result(length_ + 1), starts(length_ + 1);
    read(number, result.mutable_data(), starts.mutable_data());
    return {std::move(result), std::move(starts)};
  }

 private:
  void read(int64_t number, int64_t* tokens, int64_t* starts) const {
    const py::gil_scoped_release release;  // the pages may have to come from disk; no Python object from here on
    const int64_t sample = samples_.at(number);
    int64_t place = load<int64_t>(begins_, 2 * sample), offset = load<int64_t>(begins_, 2 * sample + 1), filled = 0;
    while (filled <= length_) {
      const int64_t document = documents_.at(place++);
      const int64_t size = sizes_[document];
      if (size == 0) continue;
      const int64_t taken = std::min(size - offset, length_ + 1 - filled);
      const int64_t start = load<int64_t>(position_, document) / bytes_ + offset;
      require(offset >= 0 && taken > 0 && start >= 0 && start + taken <= tokens_, "tokens outside the corpus");
      widen_(ids_, start, taken, tokens + filled);
      if (starts != nullptr) std::fill_n(starts + filled, taken, filled);
      filled += taken;
      offset = 0;
    }
  }

  py::array flat_;
  Array<int64_t> positions_;
  const void *ids_ = nullptr, *position_ = nullptr, *begins_ = nullptr;  // what the arrays hold
  int64_t tokens_ = 0, bytes_ = 1;
  Sizes sizes_;
  Permutation documents_, samples_;
  Array<int64_t> first_;
  int64_t length_;
  void (*widen_)(const void*, int64_t, int64_t, int64_t*);
};

// ---- mixing.py ----

double key_of(int64_t count, uint64_t stream, int64_t number, int bits) {
  const uint64_t draw = finalise(stream + (static_cast<uint64_t>(number) + 1) * kGolden) >> (64 - bits);
  return (static_cast<double>(number) + std::ldexp(static_cast<double>(draw), -bits)) / static_cast<double>(count);
}

int bits_of(int64_t count) {
  require(count >= 0 && count < int64_t{1} << 52, "samples of a corpus");
  return 53 - std::bit_width(static_cast<uint64_t>(count));
}

// For each corpus, how many of its keys are below `bound`: int64 [K].
Array<int64_t> counts_below(const Array<int64_t>& counts, const Array<uint64_t>& streams, double bound) {
  require(counts.size() == streams.size(), "one stream per corpus");
  Array<int64_t> result(counts.size());
  for (py::ssize_t i = 0; i < counts.size(); ++i) {
    const int64_t count = counts.data()[i];
    int64_t below = static_cast<int64_t>(static_cast<double>(count) * bound);
    const int bits = bits_of(count);
    const uint64_t stream = streams.data()[i];
    const auto is_below = [&](int64_t number) {
      return number >= 0 && number < count && key_of(count, stream, number, bits) < bound;
    };
    if (below > 0 && !is_below(below - 1)) --below;
    else if (is_below(below)) ++below;
    result.mutable_data()[i] = below;
  }
  return result;
}

// Samples [first, last) of each corpus in the order of their keys, which lie in [low, high): int32 [m], int64 [m].
std::pair<Array<int32_t>, Array<int64_t>> merge_keys(
    const Array<int64_t>& counts, const Array<uint64_t>& streams, const Array<int64_t>& first,
    const Array<int64_t>& last, double low, double high) {
  const py::ssize_t corpora = counts.size();
  require(streams.size() == corpora && first.size() == corpora && last.size() == corpora, "one of each per corpus");
  int64_t total = 0;
  for (py::ssize_t i = 0; i < corpora; ++i) {
    require(0 <= first.data()[i] && first.data()[i] <= last.data()[i] && last.data()[i] <= counts.data()[i], "a range");
    total += last.data()[i] - first.data()[i];
  }
  Array<int32_t> corpus(total);
  Array<int64_t> number(total);
  struct Entry {
    double key;
    int64_t number;
    int32_t corpus;
  };
  int32_t* to_corpus = corpus.mutable_data();
  int64_t* to_number = number.mutable_data();
  const py::gil_scoped_release release;
  // Keys are nearly even: put each into one of as many bins as there are keys, in order of corpus and number, then mend
  // the order within bins by insertion, which keeps equal keys as they are.
  std::vector<Entry> entries(total), sorted(total);
  std::vector<int64_t> begins(total + 1, 0);
  const double scale = static_cast<double>(total) / (high - low);
  const auto bin = [&](double key) { return std::clamp<int64_t>(static_cast<int64_t>((key - low) * scale), 0, total - 1); };
  int64_t filled = 0;
  for (py::ssize_t i = 0; i < corpora; ++i) {
    const int bits = bits_of(counts.data()[i]);
    for (int64_t j = first.data()[i]; j < last.data()[i]; ++j) {
      const double key = key_of(counts.data()[i], streams.data()[i], j, bits);
      entries[filled++] = {key, j, static_cast<int32_t>(i)};
      ++begins[bin(key) + 1];
    }
  }
  for (int64_t b = 0; b < total; ++b) begins[b + 1] += begins[b];
  for (const Entry& entry : entries) sorted[begins[bin(entry.key)]++] = entry;
  for (int64_t at = 0; at < total; ++at) {
    const Entry entry = sorted[at];
    int64_t to = at;
    for (; to > 0 && sorted[to - 1].key > entry.key; --to) sorted[to] = sorted[to - 1];
    sorted[to] = entry;
  }
  for (int64_t at = 0; at < total; ++at) {
    to_corpus[at] = sorted[at].corpus;
    to_number[at] = sorted[at].number;
  }
  return {std::move(corpus), std::move(number)};
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Compiled index helpers of steel_megatron.data.";
  py::class_<Permutation>(module, "Permutation")
      .def(py::init<int64_t, std::vector<uint64_t>>())
      .def("__call__", &Permutation::at)
      .def("many", &Permutation::many);
  module.def("pack", &pack);
  py::class_<Reader>(module, "Reader")
      .def(py::init<
           py::array, Array<int64_t>, const py::array&, const py::object&, Permutation, Permutation, Array<int64_t>, int64_t>())
      .def("tokens", &Reader::tokens)
      .def("with_starts", &Reader::with_starts);
  module.def("counts_below", &counts_below);
  module.def("merge_keys", &merge_keys);
  module.def("holding", &holding);
  module.def("texts_of_lines", &texts_of_lines);
  module.def("stored_documents", &stored_documents);
  module.def("count_ids", &count_ids, py::arg("counts").noconvert(), py::arg("ids"));
}
