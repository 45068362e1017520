// The mass reduction of score_pages: log of each head's softmax over the pages of a request, summed over the heads of a
// group. A NaN bound leaves its own page NaN and counts for nothing elsewhere. Included by kernels_impl.h.

constexpr float kInfinity = __builtin_inff();

// Natural logarithm of a positive normal number (Cephes' polynomial, below 2 ulp); NaN stays.
QUEST_INLINE Vec log_positive(Vec x) {
  const VecI bits = (VecI)x;
  VecI exponent = (bits >> 23) - 126;
  Vec m = (Vec)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const VecI low = m < 0.707106781186547524f;
  exponent += low;  // true is -1
  m = (low ? m + m : m) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec z = m * m;
  Vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec y = p * m * z - e * 2.12194440e-4f - z * 0.5f;
  return x == x ? m + y + e * 0.693359375f : x;
}

// logits = bounds * scale for `count` pages, -inf up to a whole vector; returns the logits' log-sum-exp.
QUEST_INLINE float scale_and_sum(const float* bounds, int64_t count, float scale, float* logits) {
  Vec top = splat(-kInfinity);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec scaled = load(bounds + i) * scale;
    const Vec logit = lane_index() < int32_t(count - i) ? scaled : splat(-kInfinity);
    top = logit > top ? logit : top;
    store(logits + i, logit);
  }
  const float peak = reduce(top, Max{});
  if (peak == kInfinity || peak == -kInfinity) return peak;
  Vec sum = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec logit = load(logits + i);
    sum += logit == logit ? exp_nonpositive(logit - peak) : Vec{};
  }
  return peak + __builtin_logf(reduce(sum, Add{}));
}

// The greatest or the mean of the heads' logits; NaN stays.
inline void combine_logits(const MassTask& task) {
  const float weight = task.policy == Reduction::kMean ? 1.0f / float(task.group) : 1.0f;
  for (int64_t i = 0; i < task.pages; ++i) {
    float score = task.logits[i];
    for (int64_t g = 1; g < task.group; ++g) {
      const float logit = task.logits[g * task.logit_stride + i];
      if (task.policy == Reduction::kMean) score += logit;
      else score = logit > score || logit != logit ? logit : score;
    }
    task.scores[i] = score * weight;
  }
}

inline void combine_mass(const MassTask& task) {
  if (task.policy == Reduction::kMax || task.policy == Reduction::kMean) return combine_logits(task);
  for (int64_t start = 0; start < task.pages; start += kLanes) {
    const auto share = [&](int64_t g) { return load(task.logits + g * task.logit_stride + start) - task.lse[g]; };
    Vec top = splat(-kInfinity), sum = {};
    for (int64_t g = 0; g < task.group; ++g) {
      const Vec value = share(g);
      top = value > top ? value : top;
    }
    const VecI infinite = (top == kInfinity) | (top == -kInfinity);
    const Vec shift = infinite ? Vec{} : top;
    for (int64_t g = 0; g < task.group; ++g) sum += exp_nonpositive(vmin(Vec{}, share(g) - shift));
    const Vec score = infinite & (sum == sum) ? top : shift + log_positive(sum);
    const int64_t width = task.pages - start < kLanes ? task.pages - start : kLanes;
    __builtin_memcpy(task.scores + start, &score, width * sizeof(float));
  }
}
