// Texts on their way into a tokenizer: taken out of JSON lines, and looked through for characters.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

// The numbers of the texts (strings or bytes of UTF-8) that hold a character whose code point is marked, uint8
// [0x110000], or are no valid UTF-8.
std::vector<pybind11::ssize_t> holding(
    const pybind11::list& texts, const pybind11::array_t<uint8_t, pybind11::array::c_style>& marked);

// The strings under `key` of JSON lines, as a list of UTF-8, and their rows, counted from `row`; blank lines have none.
// None unless every other line is for certain an object that has `key` once, with a text that is not blank, and none of
// `others`: whoever gets None reads the lines by a parser that says what is wrong with them.
pybind11::object texts_of_lines(
    const pybind11::bytes& lines, int64_t row, const std::string& key, const std::vector<std::string>& others);
