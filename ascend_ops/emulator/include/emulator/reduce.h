// Reductions, over the first elements of a tensor or over repeats.
#pragma once

#include "emulator/vector.h"

namespace ascend_emulator {

// Elements of the work buffer that a reduction with `count` elements needs (ReduceMax, "work space
// of sharedTmpBuffer"): the pairs of every round but the last, in whole data blocks each.
template <typename T>
uint64_t reduction_workspace(uint64_t count, bool index) {
  constexpr uint64_t kPerBlock = kBlock / sizeof(T), kPerRepeat = kRepeat / sizeof(T);
  const auto up = [](uint64_t a, uint64_t b) { return (a + b - 1) / b; };
  uint64_t pairs = up(count, kPerRepeat) * 2, total = up(pairs, kPerBlock) * kPerBlock;
  while (index && pairs > 2) {
    pairs = up(pairs, kPerRepeat) * 2;
    total += up(pairs, kPerBlock) * kPerBlock;
  }
  return total;
}

template <typename T>
void check_workspace(const char* api, const AscendC::LocalTensor<T>& work, uint64_t elements) {
  check_vector(api, "sharedTmpBuffer", work.place());
  work.place().check(api, "sharedTmpBuffer", 0, elements * sizeof(T));
  const Place& place = work.place();
  place.owner->write(place.hardware, place.address, place.address + elements * sizeof(T), PIPE_V,
                     Write::kGarbage);
}

// The place of the best element; the first of equals (ReduceMax, constraints).
template <typename T, typename Better>
uint64_t best_place(const T* x, uint64_t count, Better better) {
  uint64_t best = 0;
  for (uint64_t i = 1; i < count; ++i) {
    if (better(float(x[i]), float(x[best]))) best = i;
  }
  return best;
}

// An index is stored as the bits of an integer as wide as the type.
template <typename T>
T index_bits(uint64_t index) {
  T bits;
  if constexpr (sizeof(T) == 2) {
    const uint16_t narrow = static_cast<uint16_t>(index);
    std::memcpy(&bits, &narrow, sizeof(T));
  } else {
    const uint32_t wide = static_cast<uint32_t>(index);
    std::memcpy(&bits, &wide, sizeof(T));
  }
  return bits;
}

template <typename T, typename Better>
void reduce_best(const char* api, const AscendC::LocalTensor<T>& dst,
                 const AscendC::LocalTensor<T>& src, const AscendC::LocalTensor<T>& work,
                 int64_t count, bool index, Better better) {
  static_assert(one_of<T, half, float>(), "a reduction of this type");
  check_count(api, count);
  if (index && sizeof(T) == 2 && count > 65536) {
    fail("repeat", "%s: half has no index above 65535", api);
  }
  const T* x = source(api, "src", src, count);
  const uint64_t best = best_place(x, count, better);
  const T value = x[best];
  check_workspace(api, work, reduction_workspace<T>(count, index));
  T* y = destination(api, dst, index ? 2 : 1, index ? 2 * sizeof(T) : sizeof(T));
  y[0] = value;
  if (index) y[1] = index_bits<T>(best);
  uint64_t repeats = 0;
  for (uint64_t left = count; left > 1; left = index && left > kLanes<T>
                                                   ? 2 * repeats_of(left * sizeof(T))
                                                   : repeats_of(left * sizeof(T))) {
    repeats += repeats_of(left * sizeof(T));
    if (left <= kLanes<T>) break;
  }
  count_instruction(std::max<uint64_t>(repeats, 1));
}

// Sums as the hardware forms them in a repeat: neighbours first.
template <typename T>
float tree_sum(const T* x, int count) {
  float level[128];
  for (int i = 0; i < count; ++i) level[i] = float(x[i]);
  while (count > 1) {
    for (int i = 0; i < count / 2; ++i) level[i] = level[2 * i] + level[2 * i + 1];
    if (count % 2) level[count / 2] = level[count - 1];
    count = (count + 1) / 2;
  }
  return count == 1 ? level[0] : 0.0f;
}

struct IsLarger {
  bool operator()(float a, float b) const { return std::isnan(a) ? !std::isnan(b) : a > b; }
};
struct IsSmaller {
  bool operator()(float a, float b) const { return std::isnan(a) ? !std::isnan(b) : a < b; }
};

// The active lanes of one repeat.
template <typename T>
int gather_lanes(const uint8_t* x, const Repeats& shape, const Strides& strides, int repeat,
                 T* values, int* lanes) {
  int n = 0;
  for (int i = 0; i < shape.lanes; ++i) {
    if (!shape.mask[i]) continue;
    lanes[n] = i;
    values[n++] = load<T>(x + lane_offset<T>(repeat, i, strides));
  }
  return n;
}

template <typename T, typename Better>
void whole_reduce_best(const char* api, const AscendC::LocalTensor<T>& dst,
                       const AscendC::LocalTensor<T>& src, int32_t mask, int32_t repeats,
                       int32_t to_stride, int32_t block_stride, int32_t repeat_stride,
                       AscendC::ReduceOrder order, Better better) {
  static_assert(one_of<T, half, float>(), "a reduction of this type");
  using AscendC::ReduceOrder;
  check_range(api, "repeatTime", repeats, 1, 255);
  check_range(api, "srcBlkStride", block_stride, 0, 65535);
  check_range(api, "srcRepStride", repeat_stride, 0, 65535);
  check_range(api, "dstRepStride", to_stride, 0, 65535);
  if (order != ReduceOrder::ORDER_VALUE_INDEX && order != ReduceOrder::ORDER_ONLY_VALUE) {
    fail("unsupported", "%s: ReduceOrder %d", api, static_cast<int>(order));
  }
  const bool index = order == ReduceOrder::ORDER_VALUE_INDEX;
  const Repeats shape{prefix_mask(api, mask, kLanes<T>), static_cast<int>(kLanes<T>), repeats};
  const Strides from{static_cast<uint32_t>(block_stride), static_cast<uint32_t>(repeat_stride)};
  const uint8_t* x = source(api, "src", src, shape, from);
  for (int r = 0; r < repeats; ++r) {
    T values[128];
    int lanes[128];
    const int n = gather_lanes<T>(x, shape, from, r, values, lanes);
    const uint64_t best = best_place(values, n, better);
    const uint32_t at = static_cast<uint32_t>(r) * to_stride * (index ? 2 : 1);
    T* y = destination(api, dst[at], index ? 2 : 1, index ? 2 * sizeof(T) : sizeof(T));
    y[0] = values[best];
    if (index) y[1] = index_bits<T>(lanes[best]);
  }
  count_instruction(repeats);
}

}  // namespace ascend_emulator

namespace AscendC {

template <typename T>
void ReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src,
               const LocalTensor<T>& sharedTmpBuffer, const int32_t count, bool calIndex = 0) {
  ascend_emulator::reduce_best("ReduceMax", dst, src, sharedTmpBuffer, count, calIndex,
                               ascend_emulator::IsLarger());
}

template <typename T>
void ReduceMin(const LocalTensor<T>& dst, const LocalTensor<T>& src,
               const LocalTensor<T>& sharedTmpBuffer, const int32_t count, bool calIndex = 0) {
  ascend_emulator::reduce_best("ReduceMin", dst, src, sharedTmpBuffer, count, calIndex,
                               ascend_emulator::IsSmaller());
}

template <typename T, bool isSetMask = true>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
               const LocalTensor<T>& sharedTmpBuffer, const int32_t count) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float>() && isSetMask, "ReduceSum: this type");
  check_count("ReduceSum", count);
  const T* x = source("ReduceSum", "src", src, count);
  std::vector<T> level(x, x + count);
  uint64_t repeats = 0;
  constexpr int kAtOnce = static_cast<int>(kLanes<T>);
  check_workspace("ReduceSum", sharedTmpBuffer, reduction_workspace<T>(count, false) / 2);
  while (level.size() > 1) {
    std::vector<T> next;
    for (size_t i = 0; i < level.size(); i += kAtOnce) {
      const int n = static_cast<int>(std::min<size_t>(kAtOnce, level.size() - i));
      next.push_back(T(tree_sum(level.data() + i, n)));
    }
    repeats += next.size();
    level.swap(next);
  }
  *destination("ReduceSum", dst, 1, sizeof(T)) = level[0];
  count_instruction(std::max<uint64_t>(repeats, 1));
}

template <typename T>
void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                    const int32_t repeatTime, const int32_t dstRepStride,
                    const int32_t srcBlkStride, const int32_t srcRepStride,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
  ascend_emulator::whole_reduce_best("WholeReduceMax", dst, src, mask, repeatTime, dstRepStride,
                                     srcBlkStride, srcRepStride, order,
                                     ascend_emulator::IsLarger());
}

template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                    const int32_t repeatTime, const int32_t dstRepStride,
                    const int32_t srcBlkStride, const int32_t srcRepStride) {
  using namespace ascend_emulator;
  static_assert(one_of<T, half, float>() && isSetMask, "WholeReduceSum: this type");
  check_range("WholeReduceSum", "repeatTime", repeatTime, 1, 255);
  check_range("WholeReduceSum", "srcBlkStride", srcBlkStride, 0, 65535);
  check_range("WholeReduceSum", "srcRepStride", srcRepStride, 0, 65535);
  const Repeats shape{prefix_mask("WholeReduceSum", mask, kLanes<T>), static_cast<int>(kLanes<T>),
                      repeatTime};
  const Strides from{static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)};
  const uint8_t* x = source("WholeReduceSum", "src", src, shape, from);
  for (int r = 0; r < repeatTime; ++r) {
    T values[128];
    int lanes[128];
    const int n = gather_lanes<T>(x, shape, from, r, values, lanes);
    *destination("WholeReduceSum", dst[static_cast<uint32_t>(r * dstRepStride)], 1, sizeof(T)) =
        T(tree_sum(values, n));
  }
  count_instruction(repeatTime);
}

}  // namespace AscendC
