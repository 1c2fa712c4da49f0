// DataCopy and DataCopyPad between global memory, UB and L1.
#pragma once

#include "emulator/sync.h"

namespace ascend_emulator {

// An integer that a parameter of type N holds without loss; a narrowing is an error, not silent.
template <typename N>
struct Exactly {
  N value;
  template <typename I,
            typename = std::enable_if_t<std::is_integral<I>::value || std::is_enum<I>::value>>
  Exactly(I given) : value(static_cast<N>(given)) {
    if (static_cast<__int128>(given) != static_cast<__int128>(value)) {
      fail("repeat", "a repeat, stride or length of %lld does not fit its parameter",
           static_cast<long long>(given));
    }
  }
  operator N() const { return value; }
};

inline pipe_t copy_in_pipe(const Place& destination, const char* api) {
  if (destination.hardware != Hardware::UB && destination.hardware != Hardware::L1) {
    fail("unsupported", "%s: from global memory to this position", api);
  }
  return PIPE_MTE2;
}

inline uint8_t* local_write(const Place& place, const char* api, uint64_t offset, uint64_t bytes,
                            pipe_t pipe, Write kind = Write::kValue) {
  place.check(api, "dst", offset, bytes);
  const uint64_t at = place.address + offset;
  return place.owner->write(place.hardware, at, at + bytes, pipe, kind);
}

inline const uint8_t* local_read(const Place& place, const char* api, uint64_t offset,
                                 uint64_t bytes, pipe_t pipe) {
  place.check(api, "src", offset, bytes);
  const uint64_t at = place.address + offset;
  return place.owner->read(place.hardware, at, at + bytes, pipe);
}

inline void check_range(const char* api, const char* what, uint64_t value, uint64_t low,
                        uint64_t high) {
  if (value < low || value > high) {
    fail("repeat", "%s: %s is %llu, not in [%llu, %llu]", api, what,
         static_cast<unsigned long long>(value), static_cast<unsigned long long>(low),
         static_cast<unsigned long long>(high));
  }
}

}  // namespace ascend_emulator

namespace AscendC {

// Lengths and gaps in data blocks of 32 bytes.
struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(ascend_emulator::Exactly<uint16_t> count, ascend_emulator::Exactly<uint16_t> len,
                 ascend_emulator::Exactly<uint16_t> srcStrideIn,
                 ascend_emulator::Exactly<uint16_t> dstStrideIn)
      : blockCount(count), blockLen(len), srcStride(srcStrideIn), dstStride(dstStrideIn) {}
  uint16_t blockCount = 1;
  uint16_t blockLen = 0;
  uint16_t srcStride = 0;
  uint16_t dstStride = 0;
};

// Lengths in bytes; gaps in bytes on the side of global memory, in data blocks on the other.
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(ascend_emulator::Exactly<uint16_t> count,
                    ascend_emulator::Exactly<uint32_t> len,
                    ascend_emulator::Exactly<uint32_t> srcStrideIn,
                    ascend_emulator::Exactly<uint32_t> dstStrideIn,
                    ascend_emulator::Exactly<uint32_t> rsvIn)
      : blockCount(count),
        blockLen(len),
        srcStride(srcStrideIn),
        dstStride(dstStrideIn),
        rsv(rsvIn) {}
  uint16_t blockCount = 1;
  uint32_t blockLen = 0;
  uint32_t srcStride = 0;
  uint32_t dstStride = 0;
  uint32_t rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(const bool isPadValue, ascend_emulator::Exactly<uint8_t> leftPadValue,
                       ascend_emulator::Exactly<uint8_t> rightPadValue, T padValue)
      : isPad(isPadValue),
        leftPadding(leftPadValue),
        rightPadding(rightPadValue),
        paddingValue(padValue) {}
  bool isPad = false;
  uint8_t leftPadding = 0;
  uint8_t rightPadding = 0;
  T paddingValue = T(0);
};

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params) {
  using namespace ascend_emulator;
  const pipe_t pipe = copy_in_pipe(dst.place(), "DataCopy");
  dst.place().check_alignment("DataCopy", "dst", kBlock);
  check_range("DataCopy", "blockCount", params.blockCount, 1, 4095);
  check_range("DataCopy", "blockLen", params.blockLen, 1, 65535);
  const uint64_t bytes = uint64_t{params.blockLen} * kBlock;
  uint64_t from = 0, to = 0;
  for (int i = 0; i < params.blockCount; ++i) {
    const uint8_t* read = src.read(from, bytes, pipe, "DataCopy");
    std::memcpy(local_write(dst.place(), "DataCopy", to, bytes, pipe), read, bytes);
    from += bytes + uint64_t{params.srcStride} * kBlock;
    to += bytes + uint64_t{params.dstStride} * kBlock;
  }
  core().counters.gm_to_local += bytes * params.blockCount;
  ++core().counters.copies;
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  using namespace ascend_emulator;
  if (src.place().hardware != Hardware::UB) fail("unsupported", "DataCopy: to GM not from UB");
  src.place().check_alignment("DataCopy", "src", kBlock);
  check_range("DataCopy", "blockCount", params.blockCount, 1, 4095);
  check_range("DataCopy", "blockLen", params.blockLen, 1, 65535);
  const uint64_t bytes = uint64_t{params.blockLen} * kBlock;
  uint64_t from = 0, to = 0;
  for (int i = 0; i < params.blockCount; ++i) {
    const uint8_t* read = local_read(src.place(), "DataCopy", from, bytes, PIPE_MTE3);
    std::memcpy(dst.write(to, bytes, PIPE_MTE3, "DataCopy"), read, bytes);
    from += bytes + uint64_t{params.srcStride} * kBlock;
    to += bytes + uint64_t{params.dstStride} * kBlock;
  }
  core().counters.local_to_gm += bytes * params.blockCount;
  ++core().counters.copies;
}

// Inside UB, by the vector unit.
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  using namespace ascend_emulator;
  if (src.place().hardware != Hardware::UB || dst.place().hardware != Hardware::UB) {
    fail("unsupported", "DataCopy: between local memories other than UB");
  }
  dst.place().check_alignment("DataCopy", "dst", kBlock);
  src.place().check_alignment("DataCopy", "src", kBlock);
  check_range("DataCopy", "blockCount", params.blockCount, 1, 4095);
  check_range("DataCopy", "blockLen", params.blockLen, 1, 65535);
  const uint64_t bytes = uint64_t{params.blockLen} * kBlock;
  uint64_t from = 0, to = 0;
  for (int i = 0; i < params.blockCount; ++i) {
    const uint8_t* read = local_read(src.place(), "DataCopy", from, bytes, PIPE_V);
    std::memmove(local_write(dst.place(), "DataCopy", to, bytes, PIPE_V), read, bytes);
    from += bytes + uint64_t{params.srcStride} * kBlock;
    to += bytes + uint64_t{params.dstStride} * kBlock;
  }
  core().counters.local_to_local += bytes * params.blockCount;
  ++core().counters.copies;
}

template <typename Destination, typename Source>
void CopyCount(const Destination& dst, const Source& src, uint32_t count) {
  using T = typename Destination::PrimType;
  const uint64_t bytes = uint64_t{count} * sizeof(T);
  if (bytes % ascend_emulator::kBlock != 0) {
    ascend_emulator::fail("alignment", "DataCopy: %llu bytes are no multiple of 32; DataCopyPad is",
                          static_cast<unsigned long long>(bytes));
  }
  ascend_emulator::check_range("DataCopy", "count in blocks", bytes / ascend_emulator::kBlock, 1,
                               65535);
  DataCopy(dst, src, DataCopyParams(1, bytes / ascend_emulator::kBlock, 0, 0));
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const uint32_t count) {
  CopyCount(dst, src, count);
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count) {
  CopyCount(dst, src, count);
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count) {
  CopyCount(dst, src, count);
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                 const DataCopyExtParams& params, const DataCopyPadExtParams<T>& pad) {
  using namespace ascend_emulator;
  const pipe_t pipe = copy_in_pipe(dst.place(), "DataCopyPad");
  dst.place().check_alignment("DataCopyPad", "dst", kBlock);
  check_range("DataCopyPad", "blockCount", params.blockCount, 1, 4095);
  check_range("DataCopyPad", "blockLen", params.blockLen, 1, 2097151);
  const uint64_t left = pad.isPad ? pad.leftPadding * sizeof(T) : 0;
  const uint64_t right = pad.isPad ? pad.rightPadding * sizeof(T) : 0;
  check_range("DataCopyPad", "leftPadding in bytes", left, 0, kBlock);
  check_range("DataCopyPad", "rightPadding in bytes", right, 0, kBlock);
  const uint64_t bytes = params.blockLen, filled = left + bytes + right;
  const uint64_t whole = (filled + kBlock - 1) / kBlock * kBlock;
  uint64_t from = 0, to = 0;
  for (int i = 0; i < params.blockCount; ++i) {
    const uint8_t* read = src.read(from, bytes, pipe, "DataCopyPad");
    uint8_t* write = local_write(dst.place(), "DataCopyPad", to, filled, pipe);
    for (uint64_t at = 0; at < left; at += sizeof(T)) {
      std::memcpy(write + at, &pad.paddingValue, sizeof(T));
    }
    std::memcpy(write + left, read, bytes);
    for (uint64_t at = left + bytes; at < filled; at += sizeof(T)) {
      std::memcpy(write + at, &pad.paddingValue, sizeof(T));
    }
    // What fills up the last data block is anything.
    if (whole > filled) {
      std::memset(local_write(dst.place(), "DataCopyPad", to + filled, whole - filled, pipe,
                              Write::kGarbage),
                  0xFF, whole - filled);
    }
    from += bytes + params.srcStride;
    to += whole + uint64_t{params.dstStride} * kBlock;
  }
  core().counters.gm_to_local += bytes * params.blockCount;
  ++core().counters.copies;
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                 const DataCopyExtParams& params) {
  using namespace ascend_emulator;
  if (src.place().hardware != Hardware::UB) fail("unsupported", "DataCopyPad: to GM not from UB");
  src.place().check_alignment("DataCopyPad", "src", kBlock);
  check_range("DataCopyPad", "blockCount", params.blockCount, 1, 4095);
  check_range("DataCopyPad", "blockLen", params.blockLen, 1, 2097151);
  const uint64_t bytes = params.blockLen;
  const uint64_t whole = (bytes + kBlock - 1) / kBlock * kBlock;
  uint64_t from = 0, to = 0;
  for (int i = 0; i < params.blockCount; ++i) {
    const uint8_t* read = local_read(src.place(), "DataCopyPad", from, bytes, PIPE_MTE3);
    std::memcpy(dst.write(to, bytes, PIPE_MTE3, "DataCopyPad"), read, bytes);
    from += whole + uint64_t{params.srcStride} * kBlock;
    to += bytes + params.dstStride;
  }
  core().counters.local_to_gm += bytes * params.blockCount;
  ++core().counters.copies;
}

}  // namespace AscendC
