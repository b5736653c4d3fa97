// What the data layer's helpers share.

#pragma once

#include <pybind11/numpy.h>

#include <stdexcept>

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::out_of_range(what);
}
