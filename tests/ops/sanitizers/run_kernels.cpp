// Runs the CPU kernels on awkward cases, for the sanitizers to watch. Every array is exactly as large as it must be and has
// its own allocation, so that a step outside is seen; results are only asked to be finite where they must be, and the same
// from the four passes run twice.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "soft_moe_cpu.h"

namespace {

using steel::Sizes;

struct Case {
  std::string name;
  int64_t batch, length, width, slots;
  std::vector<std::vector<int64_t>> starts, ends, reads;  // a row per plan
  float scale = 3.0f;
  bool any_result = false;  // numbers may be NaN
  float poison = 0.0f;      // added to one token's number
};

template <typename T>
std::vector<T> random(int64_t count, float scale, uint32_t seed) {
  std::vector<T> values(count);
  uint32_t state = seed * 2654435761u + 1;
  for (T& value : values) {
    state = state * 1664525u + 1013904223u;
    value = steel::from_float<T>(scale * (static_cast<float>(state >> 8) / 8388608.0f - 1.0f));
  }
  return values;
}

std::vector<int64_t> flat(const std::vector<std::vector<int64_t>>& rows) {
  std::vector<int64_t> all;
  for (const auto& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

template <typename T>
bool finite(const std::vector<T>& values) {
  for (const T value : values) {
    if (!std::isfinite(steel::to_float(value))) return false;
  }
  return true;
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
struct Results {
  std::vector<float> slots, logits, lse, grad_keys, grad_logits;
  std::vector<T> y, grad_x, grad_outputs;
};

template <typename T>
Results<T> run(const Case& c, bool mix_normalized) {
  const Sizes n{c.batch, c.length, c.width, c.slots, static_cast<int64_t>(c.starts[0].size()), static_cast<int64_t>(c.starts.size())};
  const int64_t tokens = n.batch * n.length, blocks = n.batch * n.blocks;
  auto x = random<T>(tokens * n.width, 1.0f, 1);
  if (!x.empty()) x[x.size() / 2] = steel::from_float<T>(steel::to_float(x[x.size() / 2]) + c.poison);
  const auto keys = random<float>(n.slots * n.width, c.scale, 2);
  const auto starts = flat(c.starts), ends = flat(c.ends), reads = flat(c.reads);
  Results<T> r;
  r.slots.resize(blocks * n.slots * n.width);
  r.logits.resize(tokens * n.slots);
  r.lse.resize(blocks * n.slots);
  steel::cpu::dispatch_forward<T>(
      n, x.data(), keys.data(), starts.data(), ends.data(), mix_normalized, r.slots.data(), r.logits.data(), r.lse.data());
  const auto outputs = random<T>(r.slots.size(), 1.0f, 3), grad_y = random<T>(x.size(), 1.0f, 4);
  r.y.resize(x.size());
  steel::cpu::combine_forward<T>(n, outputs.data(), r.logits.data(), reads.data(), r.y.data());
  r.grad_outputs.resize(outputs.size());
  r.grad_logits.resize(r.logits.size());
  steel::cpu::combine_backward<T>(
      n, grad_y.data(), outputs.data(), r.logits.data(), reads.data(), r.grad_outputs.data(), r.grad_logits.data());
  const auto grad_slots = random<float>(r.slots.size(), 1.0f, 5), grad_lse = random<float>(r.lse.size(), 1.0f, 6);
  r.grad_x.resize(x.size());
  r.grad_keys.resize(keys.size());
  steel::cpu::dispatch_backward<T>(
      n, grad_slots.data(), r.grad_logits.data(), grad_lse.data(), x.data(), keys.data(), starts.data(), ends.data(),
      mix_normalized, r.slots.data(), r.logits.data(), r.lse.data(), r.grad_x.data(), r.grad_keys.data());
  return r;
}

template <typename T>
void check(const Case& c, const char* type) {
  for (const bool mix_normalized : {true, false}) {
    const Results<T> r = run<T>(c, mix_normalized), again = run<T>(c, mix_normalized);
    const bool repeats = same(r.slots, again.slots) && same(r.logits, again.logits) && same(r.lse, again.lse) &&
                         same(r.y, again.y) && same(r.grad_x, again.grad_x) && same(r.grad_keys, again.grad_keys) &&
                         same(r.grad_outputs, again.grad_outputs) && same(r.grad_logits, again.grad_logits);
    const bool all_finite = finite(r.slots) && finite(r.logits) && finite(r.y) && finite(r.grad_x) && finite(r.grad_keys) &&
                            finite(r.grad_outputs) && finite(r.grad_logits);
    if (!repeats || (!all_finite && !c.any_result)) {
      std::fprintf(stderr, "%s, %s: %s\n", c.name.c_str(), type, repeats ? "not finite" : "two runs differ");
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  const float nan = std::nanf("");
  const std::vector<Case> cases = {
      {"ragged", 2, 37, 19, 6, {{0, 0, 0}}, {{1, 16, 32}}, {{16, 32, 37}}},
      {"one slot", 1, 70, 33, 1, {{0}}, {{70}}, {{70}}},
      {"many slots", 1, 130, 21, 600, {{0, 0}}, {{64, 130}}, {{70, 130}}},
      {"larger tiles", 2, 300, 67, 40, {{0}}, {{300}}, {{300}}},
      {"several pieces", 2, 700, 18, 5, {{0}}, {{700}}, {{700}}},
      {"one token", 1, 1, 8, 4, {{0}}, {{1}}, {{1}}},
      {"one number", 1, 1, 1, 1, {{0}}, {{1}}, {{1}}},
      {"no sequence", 0, 5, 4, 2, {{0}}, {{5}}, {{5}}},
      {"no width", 2, 5, 0, 2, {{0}}, {{5}}, {{5}}},
      {"empty blocks and gaps", 1, 30, 9, 3, {{2, 2, 2, 9, 30}}, {{2, 5, 5, 20, 30}}, {{0, 10, 10, 30, 30}}},
      {"only empty blocks", 1, 9, 5, 3, {{0, 9}}, {{0, 9}}, {{4, 9}}},
      {"documents", 2, 20, 7, 4, {{0, 0, 8, 20}, {0, 3, 3, 3}}, {{1, 4, 20, 20}, {3, 4, 5, 20}}, {{4, 8, 20, 20}, {3, 4, 9, 20}}},
      {"huge logits", 1, 40, 12, 6, {{0, 0}}, {{8, 40}}, {{9, 40}}, 1e3f},
      {"keys that overflow", 1, 40, 12, 6, {{0, 0}}, {{8, 40}}, {{9, 40}}, 1e30f, true},
      {"NaN", 2, 40, 12, 6, {{0, 0}}, {{8, 40}}, {{9, 40}}, 3.0f, true, nan},
      {"infinity", 2, 40, 12, 6, {{0, 0}}, {{8, 40}}, {{9, 40}}, 3.0f, true, INFINITY},
  };
  for (const Case& c : cases) {
    check<float>(c, "float32");
    check<steel::BFloat16>(c, "bfloat16");
    check<steel::Float16>(c, "float16");
  }
  std::printf("%zu cases\n", cases.size());
  return 0;
}
