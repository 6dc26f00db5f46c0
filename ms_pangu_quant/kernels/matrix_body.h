// Rows of floats times a panel of 64 outputs, for one instruction set; included by matrix.cc (see isa.h).

#include "lanes_body.h"

#if PANGU_LEVEL == 2
constexpr int kRows = 6, kVectors = 4;  // of a register tile
#elif PANGU_LEVEL == 1
constexpr int kRows = 2, kVectors = 2;
#else
constexpr int kRows = 2, kVectors = 1;
#endif
#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)
#define EACH_VECTOR _Pragma("GCC unroll 4") for (int j = 0; j < kVectors; j++)

PANGU_INLINE void multiply_add(f32x16& sum, f32x16 weight, f32x16 x) {
#if PANGU_LEVEL == 2  // as for integers (tile_body.h): GCC would spill a tile of 6 rows
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
#else
  sum = sum + weight * x;
#endif
}

// R rows times `count` inputs of a panel [count][64], added to what y has, or to `start` where there is one.
template <int R>
void tile(const float* x, int64_t stride, const float* weight, int64_t count, const float* start, float* y, int64_t to) {
  for (int first = 0; first < kPanel / kLanes; first += kVectors) {
    f32x16 sum[R][kVectors];
    EACH_ROW EACH_VECTOR sum[r][j] = load((start ? start : y + r * to) + kLanes * (first + j));
    const float* w = weight + kLanes * first;
    for (int64_t k = 0; k < count; k++, w += kPanel) {
      f32x16 of_input[kVectors];
      EACH_VECTOR of_input[j] = load(w + kLanes * j);
      EACH_ROW {
        const f32x16 v = splat(x[r * stride + k]);
        EACH_VECTOR multiply_add(sum[r][j], of_input[j], v);
      }
    }
    EACH_ROW EACH_VECTOR store(y + r * to + kLanes * (first + j), sum[r][j]);
  }
}

// All rows times one slice of a panel; a row's sums do not depend on how many rows share its tile.
void slice(const float* x, int64_t rows, int64_t stride, const float* weight, int64_t count, const float* start, float* y,
           int64_t to) {
  int64_t row = 0;
#define TILE(R) tile<R>(x + row * stride, stride, weight, count, start, y + row * to, to)
  for (; row + kRows <= rows; row += kRows) TILE(kRows);
  for (; row + 2 <= rows; row += 2) TILE(2);
  if (row < rows) TILE(1);
#undef TILE
}

#undef EACH_ROW
#undef EACH_VECTOR
