// The calling convention of MindSpore's ahead-of-time custom operators, which needs none of its headers: params are the
// inputs' buffers and then the outputs', shapes likewise, and NAMEInferShape gives an output's shape from the inputs'.
#pragma once
#include <cstdint>
#include <vector>

#define EXPORT __attribute__((visibility("default")))
#define OPERATOR(name)                                                                                          \
  EXPORT int name(int count, void** params, int* ndims, int64_t** shapes, const char** dtypes, void* stream, void* extra)
#define SHAPE_OF(name) EXPORT std::vector<int64_t> name##InferShape(int* ndims, int64_t** shapes, void* extra)
#define SHAPE_OF_LINEAR(name)                                                                                            \
  SHAPE_OF(name) {                                                                                                       \
    std::vector<int64_t> out(shapes[0], shapes[0] + ndims[0]);                                                           \
    out.back() = shapes[1][0];                                                                                           \
    return out;                                                                                                          \
  }

namespace pangu {

class Arguments {
 public:
  Arguments(void** params, int* ndims, int64_t** shapes) : params_(params), ndims_(ndims), shapes_(shapes) {}
  template <class T>
  T* data(int i) const {
    return static_cast<T*>(params_[i]);
  }
  int64_t dim(int i, int d) const { return shapes_[i][d]; }
  int64_t last(int i) const { return shapes_[i][ndims_[i] - 1]; }
  int64_t rows(int i) const {  // product of all but the last dimension
    int64_t count = 1;
    for (int d = 0; d + 1 < ndims_[i]; d++) count *= shapes_[i][d];
    return count;
  }
  int64_t size(int i) const { return rows(i) * last(i); }
  const float* bias(int i, int64_t outputs) const { return dim(i, 0) == outputs ? data<float>(i) : nullptr; }

 private:
  void** params_;
  int* ndims_;
  int64_t** shapes_;
};

}  // namespace pangu
