// select_pages and shortlist_pages: the best pages of one row by radix selection. Included by kernels_impl.h.

// Unsigned keys in the order of the scores; NaN becomes +inf, -0 becomes +0.
QUEST_INLINE uint32_t ordered_key(float score) {
  if (score != score) score = __builtin_inff();
  score += 0.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `rank`-th greatest of `keys` (rank >= 1), and how many of the keys equal to it belong to the first `rank`.
// Destroys `keys`.
inline uint32_t nth_greatest(uint32_t* keys, int64_t count, int64_t rank, int64_t& equal_wanted) {
  constexpr int kShift[3] = {21, 10, 0}, kBits[3] = {11, 11, 10};
  uint32_t threshold = 0;
  for (int pass = 0; pass < 3; ++pass) {
    uint32_t histogram[1 << 11] = {};
    const int shift = kShift[pass];
    const uint32_t mask = (1u << kBits[pass]) - 1;
    for (int64_t i = 0; i < count; ++i) ++histogram[(keys[i] >> shift) & mask];
    uint32_t digit = mask;
    while (int64_t(histogram[digit]) < rank) rank -= histogram[digit--];
    threshold |= digit << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      keys[kept] = key;
      kept += ((key >> shift) & mask) == digit;
    }
    count = kept;
  }
  equal_wanted = rank;
  return threshold;
}

// The greatest keys of those in a row's budget that reach `wanted` mass (> 0): the least of them, and how many of the
// keys equal to it belong to them. `masses` are the keys' own, equal for equal keys. Destroys both.
inline uint32_t key_at_mass(uint32_t* keys, float* masses, int64_t count, double wanted, int64_t& equal_wanted) {
  constexpr int kShift[3] = {21, 10, 0}, kBits[3] = {11, 11, 10};
  uint32_t threshold = 0;
  equal_wanted = count;
  for (int pass = 0; pass < 3; ++pass) {
    double histogram[1 << 11] = {};
    const int shift = kShift[pass];
    const uint32_t mask = (1u << kBits[pass]) - 1;
    for (int64_t i = 0; i < count; ++i) histogram[(keys[i] >> shift) & mask] += masses[i];
    int64_t digit = mask;
    while (digit >= 0 && histogram[digit] < wanted) wanted -= histogram[digit--];
    if (digit < 0) return 0;  // rounding: all of them
    threshold |= uint32_t(digit) << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      keys[kept] = key;
      masses[kept] = masses[i];
      kept += ((key >> shift) & mask) == uint32_t(digit);
    }
    count = kept;
  }
  equal_wanted = 1;
  while (equal_wanted < count && double(masses[0]) * double(equal_wanted) < wanted) ++equal_wanted;
  return threshold;
}

// masses[i] = e^(mass_scale * score - peak) of the `count` pages; false unless all of them are finite.
inline bool page_masses(const SelectTask& task, const int32_t* pages, int64_t count) {
  float peak = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i) {
    const float logit = task.mass[i] = task.scores[pages[i]] * task.mass_scale;
    if (!(logit < __builtin_inff())) return false;
    if (logit > peak) peak = logit;
  }
  if (peak == -__builtin_inff()) return false;
  for (int64_t i = 0; i < count; i += kLanes) store(task.mass + i, exp_nonpositive(load(task.mass + i) - peak));
  return true;
}

// Leaves of the `take` ascending pages in task.selected, whose first `sink` and last `recent` stay, the best that hold
// top_p of their mass; returns how many.
inline int64_t keep_mass(const SelectTask& task, int64_t take, int64_t sink, int64_t recent) {
  int32_t* const pages = task.selected;
  if (take <= sink + recent || !page_masses(task, pages, take)) return take;
  double total = 0, forced = 0;
  for (int64_t i = 0; i < take; ++i) {
    total += task.mass[i];
    if (i < sink || i >= take - recent) forced += task.mass[i];
  }
  const int64_t free = take - recent - sink;
  const double wanted = double(task.top_p) * total - forced;
  int64_t equal_left = 0, kept = sink;
  if (wanted > 0) {
    for (int64_t i = 0; i < free; ++i) task.scratch[i] = ordered_key(task.scores[pages[sink + i]]);
    const uint32_t threshold = key_at_mass(task.scratch, task.mass + sink, free, wanted, equal_left);
    for (int64_t i = sink; i < take - recent; ++i) {
      const uint32_t key = ordered_key(task.scores[pages[i]]);
      const bool equal = key == threshold && equal_left > 0;
      equal_left -= equal;
      pages[kept] = pages[i];
      kept += key > threshold || equal;
    }
  }
  for (int64_t i = take - recent; i < take; ++i) pages[kept++] = pages[i];
  return kept;
}

// How many pages a row takes, which of them are forced, and which pages compete: [first, end).
struct Competition {
  int64_t take, recent, sink, first, end;
};

QUEST_INLINE Competition competition_of(const SelectTask& task) {
  const int64_t pages = task.pages;
  int64_t take = task.page_budget < pages ? task.page_budget : pages;
  if (take > task.max_page_budget) take = task.max_page_budget;
  if (take < 0) take = 0;
  const int64_t recent_tier = task.recent_pages < pages ? task.recent_pages : pages;
  const int64_t sink_tier = task.sink_pages < pages - recent_tier ? task.sink_pages : pages - recent_tier;
  const int64_t recent = recent_tier < take ? recent_tier : take;
  const int64_t sink = sink_tier < take - recent ? sink_tier : take - recent;
  return {take, recent, sink, sink_tier, pages - recent_tier};
}

// Whether a key, of keys met in order, is among the `rank` greatest; of equal ones the first.
class Best {
 public:
  // Destroys `keys`.
  Best(uint32_t* keys, int64_t count, int64_t rank) {
    if (rank >= count) return;
    threshold_ = ~0u;  // none: no score has this key
    if (rank > 0) threshold_ = nth_greatest(keys, count, rank, equal_left_);
  }
  QUEST_INLINE bool has(uint32_t key) {
    const bool equal = key == threshold_ && equal_left_ > 0;
    equal_left_ -= equal;
    return key > threshold_ || equal;
  }

 private:
  uint32_t threshold_ = 0;  // all: no score has this key either
  int64_t equal_left_ = 0;
};

// The keys of the competing pages, twice; returns the copy to destroy.
QUEST_INLINE uint32_t* competing_keys(const SelectTask& task, const Competition& found) {
  uint32_t* keys = task.scratch;
  uint32_t* spare = task.scratch + task.pages;
  for (int64_t page = found.first; page < found.end; ++page)
    spare[page - found.first] = keys[page - found.first] = ordered_key(task.scores[page]);
  return spare;
}

void select_row(const SelectTask& task) {
  const Competition found = competition_of(task);
  const int64_t pages = task.pages, count = found.end - found.first, wanted = found.take - found.recent - found.sink;
  int32_t* out = task.selected;
  for (int64_t page = 0; page < found.sink; ++page) *out++ = int32_t(page);
  if (wanted > 0 && wanted == count) {
    for (int64_t page = found.first; page < found.end; ++page) *out++ = int32_t(page);
  } else if (wanted > 0) {
    Best best(competing_keys(task, found), count, wanted);
    int32_t* const last = out + wanted;
    for (int64_t page = found.first; page < found.end && out < last; ++page) {
      *out = int32_t(page);
      out += best.has(task.scratch[page - found.first]);
    }
  }
  for (int64_t page = pages - found.recent; page < pages; ++page) *out++ = int32_t(page);
  if (task.top_p < 1) out = task.selected + keep_mass(task, found.take, found.sink, found.recent);
  for (int32_t* const stop = task.selected + task.max_page_budget; out < stop;) *out++ = -1;
}

// The pages about as near to the edge of the budget as half of it is wide: see reference.shortlist_pages.
void shortlist_row(const SelectTask& task) {
  const Competition found = competition_of(task);
  const int64_t count = found.end - found.first, forced = task.pages - count, take = found.take;
  int32_t* out = task.selected;
  if (take > forced && take < task.pages) {
    const int64_t begin = take / 2 > forced ? take / 2 - forced : 0;
    const int64_t end = take + (take + 1) / 2 < task.pages ? take + (take + 1) / 2 - forced : count;
    uint32_t* spare = competing_keys(task, found);
    Best within(spare, count, end);
    for (int64_t i = 0; i < count; ++i) spare[i] = task.scratch[i];
    Best before(spare, count, begin);
    int32_t* const last = out + end - begin;
    for (int64_t page = found.first; page < found.end && out < last; ++page) {
      const uint32_t key = task.scratch[page - found.first];
      const bool sure = before.has(key);
      *out = int32_t(page);
      out += within.has(key) && !sure;
    }
  }
  for (int32_t* const stop = task.selected + task.max_page_budget + 1; out < stop;) *out++ = -1;
}
