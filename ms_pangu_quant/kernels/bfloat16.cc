// Matrix products of numbers rounded to bfloat16, added up in float32, where the CPU has AVX512-BF16: twice the speed of float32.
// Elsewhere the caller rounds and multiplies in float32 (quantizers/products.py, MindSpore's PanguFloat).
//
// Rows are packed in panels of 6, columns in panels of 64, both [pairs of inputs][of the panel] and a panel after the other; the
// last one of columns is as narrow as it is, so that a float32 weight can be packed where it stands. A sum is made from the first
// input to the last whatever shares its tile, so it does not depend on other rows and columns, nor on the threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "operator.h"
#include "parallel.h"
#include "scratch.h"

#if PANGU_X86
#define PANGU_BF16 1
#endif

namespace pangu {
namespace {

constexpr int64_t kTile = 6, kWide = kPanel;
constexpr int64_t kSlice = 128;                 // pairs: a panel of columns takes 32 KiB of the L1 cache
constexpr int64_t kRowsOnce = 32 * kTile, kColumnsOnce = 4 * kWide;  // of a piece, whose slices and sums stay in L2

#if PANGU_BF16
bool found() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
const bool kFound = found();

PANGU_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "bfloat16_body.h"
PANGU_END

// Both of a [.., inputs] where inputs lie `beside` each other, else of a [inputs, ..]; `step` floats from a row of it to the next.
void pack_rows(const float* a, int64_t step, bool beside, int64_t inputs, int64_t rows, uint32_t* out) {
  constexpr int64_t kOnce = 16 * kTile;  // whole cache lines of [inputs, ..]
  const int64_t pairs = (inputs + 1) / 2;
  parallel_for((rows + kOnce - 1) / kOnce, [&](int64_t i) {
    const int64_t first = i * kOnce, n = std::min(kOnce, rows - first);
    if (beside) {
      for (int64_t r = 0; r < n; r += kTile)
        pack_across(a + (first + r) * step, step, inputs, std::min(kTile, n - r), kTile, out + (first + r) * pairs);
      return;
    }
    pack_along<kOnce>(a + first, step, inputs, n, kTile, kTile * pairs, out + first * pairs);
  });
}

// A panel begins `stride` pairs behind the one before, and these inputs at pair `begin` of it.
void pack_columns(const float* a, int64_t step, bool beside, int64_t inputs, int64_t columns, int64_t stride, int64_t begin,
                  uint32_t* out) {
  parallel_for((columns + kWide - 1) / kWide, [&](int64_t i) {
    const int64_t first = i * kWide, n = std::min(kWide, columns - first);
    uint32_t* panel = out + first * stride + begin * n;
    if (beside) return pack_across(a + first * step, step, inputs, n, n, panel);
    pack_along<kWide>(a + first, step, inputs, n, n, 0, panel);
  });
}

struct Product {
  const uint32_t *rows, *columns;
  int64_t pairs, stride;      // of a sum; from one panel of columns to the next, as many as lie in one
  int64_t begin;              // pair of the columns that is the rows' first
  int64_t row_count, column_count;
  float* y;
  int64_t to;                 // floats from a row of y to the next
  bool adds, lower;           // to y; leaves out what lies above its diagonal by whole pieces
};

// Its sums are gathered beside y, tile after tile: rows of y a power of two apart would share few lines of the cache.
void piece(const Product& p, int64_t row, int64_t column) {
  static thread_local std::vector<float> kept;
  alignas(64) static thread_local uint32_t wide[kSlice * kWide];
  float* sums = room_for(kRowsOnce * kColumnsOnce, kept);
  memset(sums, 0, kRowsOnce * kColumnsOnce * sizeof(float));
  const int64_t rows = std::min(kRowsOnce, p.row_count - row), columns = std::min(kColumnsOnce, p.column_count - column);
  for (int64_t k = 0; k < p.pairs; k += kSlice) {
    const int64_t count = std::min(kSlice, p.pairs - k);
    float* sum = sums;
    for (int64_t c = 0; c < columns; c += kWide) {
      const int64_t n = std::min(kWide, columns - c);
      const uint32_t* panel = p.columns + (column + c) * p.stride + (p.begin + k) * n;
      if (n < kWide) {
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < kWide; j++) wide[i * kWide + j] = j < n ? panel[i * n + j] : 0;
        panel = wide;
      }
      for (int64_t r = 0; r < rows; r += kTile, sum += kTile * kWide)
        tile(p.rows + (row + r) * p.pairs + k * kTile, panel, count, sum);
    }
  }
  for (int64_t c = 0; c < columns; c += kWide)
    for (int64_t r = 0; r < rows; r++, sums += kWide) {
      float* y = p.y + (row + r) * p.to + column + c;
      const int64_t n = std::min(kWide, columns - c);
      for (int64_t j = 0; j < n; j++) y[j] = p.adds ? y[j] + sums[j] : sums[j];
      if (r + 1 == rows) sums += (kTile - rows % kTile) % kTile * kWide;
    }
}

void multiply(const Product& p) {
  const int64_t across = (p.column_count + kColumnsOnce - 1) / kColumnsOnce;
  parallel_for((p.row_count + kRowsOnce - 1) / kRowsOnce * across, [&](int64_t i) {
    const int64_t row = i / across * kRowsOnce, column = i % across * kColumnsOnce;
    if (p.lower && column >= row + kRowsOnce) return;
    piece(p, row, column);
  });
}

std::unique_ptr<uint32_t[]> room(int64_t panels, int64_t width, int64_t pairs) {
  return std::unique_ptr<uint32_t[]>(new uint32_t[panels * width * pairs]);
}
#endif

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// Whether this CPU has the instructions and the path in use is the best one; nothing below may be called otherwise.
EXPORT int pangu_bfloat16() {
#if PANGU_BF16
  return kFound && isa() == VNNI;
#else
  return 0;
#endif
}

#if PANGU_BF16
// weight float32 [outputs, inputs] -> panels of columns, in place; what is not needed any more behind each stays.
EXPORT void pangu_pack_bfloat16(float* weight, int64_t outputs, int64_t inputs) {
  parallel_for((outputs + kWide - 1) / kWide, [&](int64_t i) {
    static thread_local std::vector<float> copy;
    const int64_t n = std::min(kWide, outputs - i * kWide);
    float* panel = weight + i * kWide * inputs;
    copy.assign(panel, panel + n * inputs);
    pack_across(copy.data(), inputs, inputs, n, n, reinterpret_cast<uint32_t*>(panel));
  });
}

// Columns [inputs, columns], or where they are `beside` [columns, inputs], into panels of `stride` pairs from pair `begin` on.
EXPORT void pangu_bfloat16_columns(const float* a, int64_t step, int64_t beside, int64_t inputs, int64_t columns,
                                   int64_t stride, int64_t begin, uint32_t* out) {
  pack_columns(a, step, beside, inputs, columns, stride, begin, out);
}

// y [rows, columns] (+)= rows times packed columns, whose pair `begin` is the rows' first. Rows lie as [rows, inputs] where
// inputs are `beside` each other, else as [inputs, rows].
EXPORT void pangu_bfloat16_product(const float* a, int64_t step, int64_t beside, int64_t inputs, int64_t rows,
                                   const uint32_t* columns, int64_t column_count, int64_t stride, int64_t begin, float* y,
                                   int64_t to, int64_t adds, int64_t lower) {
  const int64_t pairs = (inputs + 1) / 2;
  const auto packed = room((rows + kTile - 1) / kTile, kTile, pairs);
  pack_rows(a, step, beside, inputs, rows, packed.get());
  multiply({packed.get(), columns, pairs, stride, begin, rows, column_count, y, to, adds != 0, lower != 0});
}

// As PanguFloat, weight as pangu_pack_bfloat16 leaves it.
OPERATOR(PanguBfloat16) {
  const Arguments a(params, ndims, shapes);
  const int64_t rows = a.rows(0), outputs = a.dim(1, 0), inputs = a.dim(1, 1), pairs = (inputs + 1) / 2;
  float* y = a.data<float>(3);
  const auto packed = room((rows + kTile - 1) / kTile, kTile, pairs);
  pack_rows(a.data<float>(0), inputs, true, inputs, rows, packed.get());
  const float* bias = a.bias(2, outputs);
  if (bias)
    for (int64_t m = 0; m < rows; m++) memcpy(y + m * outputs, bias, outputs * sizeof(float));
  multiply({packed.get(), a.data<uint32_t>(1), pairs, inputs, 0, rows, outputs, y, outputs, bias != nullptr, false});
  return 0;
}
SHAPE_OF_LINEAR(PanguBfloat16)
#endif
}
