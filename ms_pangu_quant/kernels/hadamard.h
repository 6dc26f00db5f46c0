// A row times a Hadamard matrix and a power of two, in front of a linear layer (transforms/hadamard.py).
//
// The matrix is the Kronecker product of a core of order m, a multiple of 4, and of Sylvester's of order 2^k: of a row
// [m][2^k], butterflies turn each of the m parts, and the core each of the 2^k columns. The additions have one order whatever
// the instruction set: the power of two first, butterflies of stride 1, 2, 4 .. 2^(k-1), then of a column the sum
// ((+-a) + (+-b)) + ((+-c) + (+-d)) of each four rows, and those sums from the first to the last.
#pragma once
#include <cstdint>

namespace pangu {

struct Hadamard {
  const uint8_t* signs;  // [order][order / 4]: bit i of byte q of output j is set where row 4 q + i of the core is -1 there
  int64_t order, size;   // of the core, of the whole; order 0: there is no matrix
  float scale;           // the power of two
};

// False where order and size contradict each other.
bool valid(const Hadamard& h);
// One row, for this CPU's instruction set; y may be x.
void hadamard(const Hadamard& h, const float* x, float* y);

}  // namespace pangu
