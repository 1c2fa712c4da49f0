// Operands of vector instructions: checks, records and pointers, in the two forms of the API:
// the first `count` elements, or repeats with a mask and strides.
#pragma once

#include <algorithm>

#include "emulator/copy.h"

namespace ascend_emulator {

struct LaneMask {
  uint64_t words[2];
  bool operator[](int lane) const { return words[lane / 64] >> (lane % 64) & 1; }
};

inline LaneMask prefix_mask(const char* api, uint64_t lanes, uint64_t limit) {
  check_range(api, "mask", lanes, 1, limit);
  const auto word = [](uint64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  return {{word(lanes), lanes > 64 ? word(lanes - 64) : 0}};
}

inline LaneMask bit_mask(const char* api, const uint64_t mask[], uint64_t limit) {
  const LaneMask bits{{mask[0], limit > 64 ? mask[1] : 0}};
  if (bits.words[0] == 0 && bits.words[1] == 0) fail("repeat", "%s: an empty mask", api);
  return bits;
}

// In data blocks.
struct Strides {
  uint32_t block, repeat;
};

// The shape of an instruction with repeats.
struct Repeats {
  LaneMask mask;
  int lanes;  // of a repeat
  int count;
};

template <typename T>
uint64_t lane_offset(int repeat, int lane, const Strides& strides) {
  constexpr int kPerBlock = kBlock / sizeof(T);
  const uint64_t blocks = uint64_t{strides.repeat} * repeat +
                          uint64_t{strides.block} * static_cast<uint64_t>(lane / kPerBlock);
  return blocks * kBlock + (lane % kPerBlock) * sizeof(T);
}

// Calls touch(offset, bytes) for the runs of bytes that the active lanes cover.
template <typename T, typename Touch>
void each_run(const Repeats& shape, const Strides& strides, Touch touch) {
  uint64_t begin = 0, end = 0;
  for (int r = 0; r < shape.count; ++r) {
    for (int i = 0; i < shape.lanes; ++i) {
      if (!shape.mask[i]) continue;
      const uint64_t at = lane_offset<T>(r, i, strides);
      if (at == end && end > begin) {
        end += sizeof(T);
        continue;
      }
      if (end > begin) touch(begin, end - begin);
      begin = at;
      end = at + sizeof(T);
    }
  }
  if (end > begin) touch(begin, end - begin);
}

inline void check_vector(const char* api, const char* operand, const Place& place) {
  if (place.owner != nullptr && place.hardware != Hardware::UB) {
    fail("role", "%s: %s is not in UB", api, operand);
  }
  place.check_alignment(api, operand, kBlock);
}

inline uint8_t* bytes_of(const Place& place) {
  return place.owner->memory(place.hardware).bytes.data() + place.address;
}

// The elements of an operand in the form of a count.
template <typename T>
const T* source(const char* api, const char* operand, const AscendC::LocalTensor<T>& tensor,
                uint64_t count) {
  const Place& place = tensor.place();
  check_vector(api, operand, place);
  place.check(api, operand, 0, count * sizeof(T));
  return reinterpret_cast<const T*>(
      place.owner->read(place.hardware, place.address, place.address + count * sizeof(T), PIPE_V));
}

// `alignment`: reductions may write their result anywhere that is aligned to it.
template <typename T>
T* destination(const char* api, const AscendC::LocalTensor<T>& tensor, uint64_t count,
               uint32_t alignment = kBlock) {
  const Place& place = tensor.place();
  check_vector(api, "dst", AscendC::LocalTensor<T>().place());
  if (place.owner != nullptr && place.hardware != Hardware::UB) {
    fail("role", "%s: dst is not in UB", api);
  }
  place.check_alignment(api, "dst", alignment);
  place.check(api, "dst", 0, count * sizeof(T));
  return reinterpret_cast<T*>(
      place.owner->write(place.hardware, place.address, place.address + count * sizeof(T), PIPE_V));
}

// The same in the form of repeats: the pointer to lane 0 of repeat 0.
template <typename T>
const uint8_t* source(const char* api, const char* operand, const AscendC::LocalTensor<T>& tensor,
                      const Repeats& shape, const Strides& strides) {
  const Place& place = tensor.place();
  check_vector(api, operand, place);
  each_run<T>(shape, strides, [&](uint64_t offset, uint64_t bytes) {
    place.check(api, operand, offset, bytes);
    const uint64_t at = place.address + offset;
    place.owner->read(place.hardware, at, at + bytes, PIPE_V);
  });
  return bytes_of(place);
}

template <typename T>
uint8_t* destination(const char* api, const AscendC::LocalTensor<T>& tensor, const Repeats& shape,
                     const Strides& strides) {
  const Place& place = tensor.place();
  check_vector(api, "dst", place);
  each_run<T>(shape, strides, [&](uint64_t offset, uint64_t bytes) {
    place.check(api, "dst", offset, bytes);
    const uint64_t at = place.address + offset;
    place.owner->write(place.hardware, at, at + bytes, PIPE_V);
  });
  return bytes_of(place);
}

// Operands are the same bytes or separate (general constraints on addresses that overlap).
inline void check_overlap(const char* api, const Place& dst, uint64_t dst_bytes, const Place& src,
                          uint64_t src_bytes) {
  const bool apart =
      dst.address + dst_bytes <= src.address || src.address + src_bytes <= dst.address;
  if (!apart && (dst.address != src.address || dst_bytes != src_bytes)) {
    fail("overlap", "%s: dst and src overlap in part", api);
  }
}

inline void count_instruction(uint64_t repeats) {
  Counters& counters = core().counters;
  ++counters.vector_instructions;
  counters.vector_repeats += repeats;
}

inline uint64_t repeats_of(uint64_t bytes) { return (bytes + kRepeat - 1) / kRepeat; }

inline void check_count(const char* api, int64_t count) {
  if (count <= 0) fail("repeat", "%s: count is %lld", api, static_cast<long long>(count));
}

template <typename T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

template <typename T, typename... Allowed>
constexpr bool one_of() {
  return (std::is_same<T, Allowed>::value || ...);
}

}  // namespace ascend_emulator

namespace AscendC {

struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(ascend_emulator::Exactly<uint16_t> dstBlkStrideIn,
                    ascend_emulator::Exactly<uint16_t> srcBlkStrideIn,
                    ascend_emulator::Exactly<uint8_t> dstRepStrideIn,
                    ascend_emulator::Exactly<uint8_t> srcRepStrideIn)
      : dstBlkStride(dstBlkStrideIn),
        srcBlkStride(srcBlkStrideIn),
        dstRepStride(dstRepStrideIn),
        srcRepStride(srcRepStrideIn) {}
  uint16_t dstBlkStride = 1;
  uint16_t srcBlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t srcRepStride = 8;
};

struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(ascend_emulator::Exactly<uint8_t> dstBlkStrideIn,
                     ascend_emulator::Exactly<uint8_t> src0BlkStrideIn,
                     ascend_emulator::Exactly<uint8_t> src1BlkStrideIn,
                     ascend_emulator::Exactly<uint8_t> dstRepStrideIn,
                     ascend_emulator::Exactly<uint8_t> src0RepStrideIn,
                     ascend_emulator::Exactly<uint8_t> src1RepStrideIn)
      : dstBlkStride(dstBlkStrideIn),
        src0BlkStride(src0BlkStrideIn),
        src1BlkStride(src1BlkStrideIn),
        dstRepStride(dstRepStrideIn),
        src0RepStride(src0RepStrideIn),
        src1RepStride(src1RepStrideIn) {}
  uint8_t dstBlkStride = 1;
  uint8_t src0BlkStride = 1;
  uint8_t src1BlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t src0RepStride = 8;
  uint8_t src1RepStride = 8;
};

}  // namespace AscendC
