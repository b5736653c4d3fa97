// A reader that takes what is plain and leaves everything else, which costs it no more than a slower way, to a whole
// parser: strictness may be greater than that of JSON, never less. See texts.h.

#include "texts.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>

namespace py = pybind11;

namespace {

constexpr int kDepth = 32;  // of brackets

// The character that begins at `at`, which moves behind it; -1 if that is no valid UTF-8.
int32_t next_character(const uint8_t*& at, const uint8_t* end) {
  const uint8_t first = *at;
  if (first < 0x80) return ++at, first;
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

void append_character(std::string& to, uint32_t point) {
  if (point < 0x80) {
    to += static_cast<char>(point);
  } else if (point < 0x800) {
    to += {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
  } else if (point < 0x10000) {
    to += {static_cast<char>(0xE0 | point >> 12), static_cast<char>(0x80 | (point >> 6 & 0x3F)),
           static_cast<char>(0x80 | (point & 0x3F))};
  } else {
    to += {static_cast<char>(0xF0 | point >> 18), static_cast<char>(0x80 | (point >> 12 & 0x3F)),
           static_cast<char>(0x80 | (point >> 6 & 0x3F)), static_cast<char>(0x80 | (point & 0x3F))};
  }
}

// Whether the next eight bytes are all ASCII and, in a string, none of them is a quote, a backslash or a control
// character.
bool plain_eight(const uint8_t* at, bool of_string) {
  constexpr uint64_t kOnes = 0x0101010101010101, kHigh = 0x8080808080808080;
  uint64_t word;
  std::memcpy(&word, at, 8);
  if (word & kHigh) return false;
  if (!of_string) return true;
  const uint64_t quote = word ^ kOnes * '"', backslash = word ^ kOnes * '\\';
  return (((word - kOnes * 0x20) | (quote - kOnes) | (backslash - kOnes)) & kHigh) == 0;
}

template <typename T>
bool holds_marked(const void* characters, py::ssize_t count, const uint8_t* marked) {
  const T* points = static_cast<const T*>(characters);
  return std::any_of(points, points + count, [marked](T point) { return marked[point] != 0; });
}

bool holds_marked_or_damage(const uint8_t* at, const uint8_t* end, const uint8_t* marked) {
  while (at < end) {
    if (end - at >= 8 && plain_eight(at, false)) {
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
  Line(const uint8_t* begin, const uint8_t* end) : at_(begin), end_(end) {}

  bool blank() {
    space();
    return at_ == end_;
  }

  // Reads an object; throws NotPlain unless it is as texts_of_lines() wants it.
  void object(std::string_view key, const std::vector<std::string>& others, std::string& text) {
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
        string(&text);
      } else {
        value(1);
      }
      space();
    } while (taken(','));
    take('}');
    space();
    if (at_ != end_ || !found) throw NotPlain();
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
    string(nullptr);
    const std::string_view found(reinterpret_cast<const char*>(begin), at_ - 1 - begin);
    if (found.find('\\') != found.npos) throw NotPlain();
    return found;
  }

  // A string, appended to `to` if there is one.
  void string(std::string* to) {
    take('"');
    const uint8_t* from = at_;  // up to here it is in `to`
    const auto flush = [&] {
      if (to != nullptr) to->append(reinterpret_cast<const char*>(from), at_ - from);
    };
    while (true) {
      while (end_ - at_ >= 8 && plain_eight(at_, true)) at_ += 8;
      if (at_ == end_) throw NotPlain();
      if (*at_ == '"') {
        flush();
        ++at_;
        return;
      }
      if (*at_ == '\\') {
        flush();
        const uint32_t point = escaped();
        if (to != nullptr) append_character(*to, point);
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
      case '"': return string(nullptr);
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
        string(nullptr);
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
};

// Whether a text surely has more than white space: a visible ASCII character or a common ideograph.
bool surely_visible(const std::string& text) {
  const uint8_t* at = reinterpret_cast<const uint8_t*>(text.data());
  const uint8_t* end = at + text.size();
  while (at < end) {
    const int32_t point = next_character(at, end);
    if ((point > 0x20 && point < 0x7F) || (point >= 0x4E00 && point < 0xA000)) return true;
  }
  return false;
}

}  // namespace

std::vector<py::ssize_t> holding(const py::list& texts, const py::array_t<uint8_t, py::array::c_style>& marked) {
  if (marked.size() != 0x110000) throw std::out_of_range("a mark for each code point");
  const uint8_t* marks = marked.data();
  std::vector<py::ssize_t> found;
  for (py::ssize_t number = 0; number < static_cast<py::ssize_t>(texts.size()); ++number) {
    PyObject* text = PyList_GET_ITEM(texts.ptr(), number);
    bool holds = false;
    if (PyBytes_Check(text)) {
      const auto* begin = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(text));
      holds = holds_marked_or_damage(begin, begin + PyBytes_GET_SIZE(text), marks);
    } else if (PyUnicode_Check(text)) {
      const void* characters = PyUnicode_DATA(text);
      const auto look = PyUnicode_KIND(text) == PyUnicode_1BYTE_KIND   ? holds_marked<uint8_t>
                        : PyUnicode_KIND(text) == PyUnicode_2BYTE_KIND ? holds_marked<uint16_t>
                                                                       : holds_marked<uint32_t>;
      holds = !PyUnicode_IS_ASCII(text) && look(characters, PyUnicode_GET_LENGTH(text), marks);
    } else {
      throw py::type_error("texts are strings or bytes");
    }
    if (holds) found.push_back(number);
  }
  return found;
}

py::object texts_of_lines(
    const py::bytes& lines, int64_t row, const std::string& key, const std::vector<std::string>& others) {
  const std::string_view content(lines);
  const auto* at = reinterpret_cast<const uint8_t*>(content.data());
  const uint8_t* const end = at + content.size();
  py::list texts;
  std::vector<int64_t> rows;
  std::string text;
  for (; at < end; ++row) {
    const auto* stop = static_cast<const uint8_t*>(std::memchr(at, '\n', end - at));
    if (stop == nullptr) stop = end;
    Line line(at, stop);
    at = stop + 1;
    if (line.blank()) continue;
    text.clear();
    try {
      line.object(key, others, text);
    } catch (const NotPlain&) {
      return py::none();
    }
    if (!surely_visible(text)) return py::none();
    texts.append(py::bytes(text));
    rows.push_back(row);
  }
  return py::make_tuple(std::move(texts), std::move(rows));
}
