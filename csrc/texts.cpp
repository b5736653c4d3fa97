// A reader that takes what is plain and leaves everything else, which costs it no more than a slower way, to a whole
// parser: strictness may be greater than that of JSON, never less. See texts.h.

#include "texts.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <tuple>

namespace py = pybind11;

namespace {

constexpr int kDepth = 32;    // of brackets
constexpr size_t kLeft = 16;  // lines that may be left to a parser in any case
constexpr uint64_t kHigh = 0x8080808080808080;

// The character that begins at `at`, which moves behind it; -1 if that is no valid UTF-8.
inline int32_t next_character(const uint8_t*& at, const uint8_t* end) {
  const uint8_t first = *at;
  if (first < 0x80) return ++at, first;
  // Most of Chinese: three bytes, where every value of the last two is fine.
  if (first > 0xE0 && first < 0xED && end - at > 2 && (at[1] & 0xC0) == 0x80 && (at[2] & 0xC0) == 0x80) {
    at += 3;
    return (first & 0x0F) << 12 | (at[-2] & 0x3F) << 6 | (at[-1] & 0x3F);
  }
  const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  if (first < 0xC2 || first > 0xF4 || end - at <= more) return -1;
  int32_t point = first & (0x3F >> more);
  for (int i = 1; i <= more; ++i) {
    if ((at[i] & 0xC0) != 0x80) return -1;
    point = point << 6 | (at[i] & 0x3F);
  }
  constexpr int32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
  if (point < kLeast[more] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return -1;
  at += more + 1;
  return point;
}

// Writes a character as UTF-8; returns where it ends.
uint8_t* put_character(uint8_t* to, uint32_t point) {
  const int more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr uint8_t kFirst[] = {0, 0xC0, 0xE0, 0xF0};
  *to++ = static_cast<uint8_t>(kFirst[more] | point >> 6 * more);
  for (int i = more - 1; i >= 0; --i) *to++ = static_cast<uint8_t>(0x80 | (point >> 6 * i & 0x3F));
  return to;
}

uint64_t eight(const uint8_t* at) {
  uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

// Whether the next eight bytes stand for themselves in a string: ASCII without quote, backslash and control characters.
bool plain_eight(const uint8_t* at) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  const uint64_t word = eight(at), quote = word ^ kOnes * '"', backslash = word ^ kOnes * '\\';
  return ((word | (word - kOnes * 0x20) | (quote - kOnes) | (backslash - kOnes)) & kHigh) == 0;
}

bool holds_marked_or_damage(const uint8_t* at, const uint8_t* end, const uint8_t* marked) {
  while (at < end) {
    if (end - at >= 8 && (eight(at) & kHigh) == 0) {
      at += 8;
      continue;
    }
    const int32_t point = next_character(at, end);
    if (point < 0 || (point >= 0x80 && marked[point] != 0)) return true;
  }
  return false;
}

struct NotPlain {};

// One line.
class Line {
 public:
  // A text of it is written to `to`, which needs no more room than the line has bytes.
  Line(const uint8_t* begin, const uint8_t* end, uint8_t* to) : at_(begin), end_(end), to_(to) {}

  bool blank() {
    space();
    return at_ == end_;
  }

  // Reads an object and returns where its text ends; throws NotPlain unless it is as texts_of_lines() wants it.
  uint8_t* object(std::string_view key, const std::vector<std::string>& others) {
    bool found = false;
    take('{');
    do {
      space();
      const std::string_view name = plain_string();
      if (std::find(others.begin(), others.end(), name) != others.end()) throw NotPlain();
      space();
      take(':');
      space();
      if (name == key) {
        if (found) throw NotPlain();
        found = true;
        string(true);
      } else {
        value(1);
      }
      space();
    } while (taken(','));
    take('}');
    space();
    if (at_ != end_ || !found) throw NotPlain();
    return to_;
  }

 private:
  void space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }

  bool taken(char wanted) {
    if (at_ == end_ || *at_ != static_cast<uint8_t>(wanted)) return false;
    ++at_;
    return true;
  }

  void take(char wanted) {
    if (!taken(wanted)) throw NotPlain();
  }

  // A string without escapes, as it stands.
  std::string_view plain_string() {
    const uint8_t* begin = at_ + 1;
    string(false);
    const std::string_view found(reinterpret_cast<const char*>(begin), at_ - 1 - begin);
    if (found.find('\\') != found.npos) throw NotPlain();
    return found;
  }

  // A string, which is the text or left out.
  void string(bool is_text) {
    take('"');
    const uint8_t* from = at_;  // up to here it is written
    const auto write = [&] {
      if (!is_text) return;
      std::memcpy(to_, from, at_ - from);
      to_ += at_ - from;
    };
    while (true) {
      while (end_ - at_ >= 8 && plain_eight(at_)) at_ += 8;
      if (at_ == end_) throw NotPlain();
      if (*at_ == '"') {
        write();
        ++at_;
        return;
      }
      if (*at_ == '\\') {
        write();
        const uint32_t point = escaped();
        if (is_text) to_ = put_character(to_, point);
        from = at_;
      } else if (next_character(at_, end_) < 0x20) {  // or damaged
        throw NotPlain();
      }
    }
  }

  uint32_t escaped() {
    take('\\');
    if (at_ == end_) throw NotPlain();
    switch (*at_++) {
      case '"': return '"';
      case '\\': return '\\';
      case '/': return '/';
      case 'b': return '\b';
      case 'f': return '\f';
      case 'n': return '\n';
      case 'r': return '\r';
      case 't': return '\t';
      case 'u': break;
      default: throw NotPlain();
    }
    const uint32_t high = four_digits();
    if (high < 0xD800 || high >= 0xE000) return high;
    take('\\');
    take('u');
    const uint32_t low = four_digits();
    if (high >= 0xDC00 || low < 0xDC00 || low >= 0xE000) throw NotPlain();
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  uint32_t four_digits() {
    if (end_ - at_ < 4) throw NotPlain();
    uint32_t number = 0;
    for (const uint8_t* stop = at_ + 4; at_ < stop; ++at_) {
      const uint8_t lower = *at_ | 0x20;
      if (*at_ >= '0' && *at_ <= '9') number = number << 4 | (*at_ - '0');
      else if (lower >= 'a' && lower <= 'f') number = number << 4 | (lower - 'a' + 10);
      else throw NotPlain();
    }
    return number;
  }

  void value(int depth) {
    if (at_ == end_ || depth > kDepth) throw NotPlain();
    switch (*at_) {
      case '"': return string(false);
      case '{': return list(depth, '}', true);
      case '[': return list(depth, ']', false);
      case 't': return word("true");
      case 'f': return word("false");
      case 'n': return word("null");
      default: return number();
    }
  }

  void list(int depth, char close, bool named) {
    ++at_;
    space();
    if (taken(close)) return;
    do {
      space();
      if (named) {
        string(false);
        space();
        take(':');
        space();
      }
      value(depth + 1);
      space();
    } while (taken(','));
    take(close);
  }

  void word(std::string_view wanted) {
    for (const char letter : wanted) take(letter);
  }

  int digits() {
    const uint8_t* begin = at_;
    while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
    if (at_ == begin) throw NotPlain();
    return static_cast<int>(std::min<int64_t>(at_ - begin, 1000));
  }

  void number() {
    taken('-');
    if (!taken('0') && digits() > 18) throw NotPlain();  // what is too large is for the parser to say
    if (taken('.')) digits();
    if (taken('e') || taken('E')) {
      if (!taken('-')) taken('+');
      if (digits() > 2) throw NotPlain();
    }
  }

  const uint8_t *at_, *end_;
  uint8_t* to_;
};

// Whether a text surely has more than white space: a visible ASCII character or a common ideograph.
bool surely_visible(const uint8_t* at, const uint8_t* end) {
  while (at < end) {
    const int32_t point = next_character(at, end);
    if ((point > 0x20 && point < 0x7F) || (point >= 0x4E00 && point < 0xA000)) return true;
  }
  return false;
}

const uint8_t* begin_of(const std::string_view content) { return reinterpret_cast<const uint8_t*>(content.data()); }

Array<int64_t> as_array(const std::vector<int64_t>& values) {
  return Array<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

std::vector<py::ssize_t> holding(const py::bytes& content, const Array<int64_t>& ends, const Array<uint8_t>& marked) {
  require(marked.size() == 0x110000, "a mark for each code point");
  const std::string_view all(content);
  const int64_t* stops = ends.data();
  const py::ssize_t count = ends.size();
  const uint8_t* marks = marked.data();
  std::vector<py::ssize_t> found;
  const py::gil_scoped_release release;
  for (int64_t start = 0, number = 0; number < count; start = stops[number++] + 1) {
    const int64_t stop = stops[number];
    require(start >= 0 && stop >= start && stop <= static_cast<int64_t>(all.size()), "ends of texts");
    if (holds_marked_or_damage(begin_of(all) + start, begin_of(all) + stop, marks)) found.push_back(number);
  }
  return found;
}

py::object texts_of_lines(
    const py::bytes& lines, int64_t row, const std::string& key, const std::vector<std::string>& others) {
  const std::string_view content(lines);
  const uint8_t *const begin = begin_of(content), *const end = begin + content.size();
  // Each text takes no more room than its line: the separator behind it is one byte, and the quotes are two.
  py::object texts = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, content.size()));
  if (!texts) throw py::error_already_set();
  auto* const out = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(texts.ptr()));
  uint8_t* to = out;
  std::vector<int64_t> rows, ends;
  std::vector<std::tuple<int64_t, int64_t, int64_t>> left;
  bool much_left = false;
  {
    const py::gil_scoped_release release;
    int64_t left_bytes = 0;
    for (const uint8_t *at = begin, *stop; at < end && !much_left; at = stop + 1, ++row) {
      stop = static_cast<const uint8_t*>(std::memchr(at, '\n', end - at));
      if (stop == nullptr) stop = end;
      Line line(at, stop, to);
      if (line.blank()) continue;
      try {
        uint8_t* const text_end = line.object(key, others);
        if (!surely_visible(to, text_end)) throw NotPlain();
        ends.push_back(text_end - out);
        rows.push_back(row);
        *text_end = 0xFF;
        to = text_end + 1;
      } catch (const NotPlain&) {
        left.emplace_back(row, at - begin, stop - begin);
        left_bytes += stop - at;
        much_left = left.size() > kLeft && left_bytes > (end - begin) / 5;
      }
    }
  }
  if (much_left) return py::none();
  PyObject* resized = texts.release().ptr();
  if (_PyBytes_Resize(&resized, to - out) != 0) throw py::error_already_set();
  return py::make_tuple(py::reinterpret_steal<py::object>(resized), as_array(ends), as_array(rows), std::move(left));
}
