// Rows first..last of a block of channels, the last channel first; included by gptq.cc for each instruction set.

inline void round_rows(const Rounded& p, int64_t first, int64_t last) {
  for (int64_t j = p.channels - 1; j >= 0; j--) {
    const float* step = p.steps + p.group[j] * p.rows;
    const int64_t at = j * p.rows;
    for (int64_t m = first; m < last; m++) {
      const float target = p.target[at + m];
      float code = __builtin_rintf((target + p.carried[at + m]) / step[m]);
      code = code < p.least ? p.least : code > p.most ? p.most : code;
      p.codes[at + m] = static_cast<int8_t>(code);
      p.error[at + m] = target - code * step[m];
    }
    const float* error = p.error + at;
    for (int64_t i = 0; i < j; i++) {
      const float factor = p.inside[i * p.channels + j];
      float* carried = p.carried + i * p.rows;
      for (int64_t m = first; m < last; m++) carried[m] += factor * error[m];
    }
  }
}
