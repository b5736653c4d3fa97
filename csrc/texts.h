// Texts on their way into a tokenizer: taken out of JSON lines, and looked through for characters.

#pragma once

#include "arrays.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

// Many texts are in one string of bytes, each in UTF-8 with a byte 0xFF behind it, which UTF-8 never has; `ends` are the
// places of those.

// The numbers of the texts that hold a character whose code point is marked [0x110000], or are no valid UTF-8.
std::vector<pybind11::ssize_t> holding(const pybind11::bytes& content, const Array<int64_t>& ends, const Array<uint8_t>& marked);

// The strings under `key` of JSON lines: texts, their ends, their rows, counted from `row`, and what is left to a parser,
// which says what is wrong: the row, begin and end of each line that is not for certain an object which has `key` once,
// with a text that is not blank, and none of `others`. Blank lines have no row. None where too much is left.
pybind11::object texts_of_lines(
    const pybind11::bytes& lines, int64_t row, const std::string& key, const std::vector<std::string>& others);
