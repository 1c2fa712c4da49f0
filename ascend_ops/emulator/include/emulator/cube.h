// The cube unit and the ways to and from it: L1, L0A, L0B, L0C, architecture 2201.
//
// Operands are 16 bits wide (half, bfloat16_t), results fp32. A fractal is 16 x 16 of them, 512
// bytes. L1 holds NZ: fractals of rows, one column of fractals after another. L0A wants fractals of
// rows in row order (zZ), L0B fractals of columns in row order (nZ); L0C gives NZ in fp32.
// Sums are formed in fp32 in the order of k; the hardware's order is not known. Infinities and NaN
// pass through, as with CTRL[48] = 1.
#pragma once

#include "emulator/cube_types.h"

namespace ascend_emulator {

constexpr uint32_t kFractal = 16;
constexpr uint32_t kFractalBytes = 512;
constexpr uint32_t kL0CStart = 1024;  // alignment of Mmad's result

inline float operand_value(half value) { return half_to_float(value.bits); }
inline float operand_value(bfloat16_t value) { return bfloat16_to_float(value.bits); }

template <typename T>
constexpr bool is_operand = std::is_same<T, half>::value || std::is_same<T, bfloat16_t>::value;

inline void expect_memory(const Place& place, Hardware hardware, const char* api,
                          const char* operand, const char* expected) {
  if (place.hardware != hardware) {
    fail("position", "%s: %s has to lie in %s", api, operand, expected);
  }
}

// Where LoadData may go, and its alignment.
inline void check_load(const Place& dst, const Place& src, const char* api) {
  if (dst.hardware != Hardware::L0A && dst.hardware != Hardware::L0B) {
    fail("position", "%s: dst has to lie in L0A or L0B", api);
  }
  expect_memory(src, Hardware::L1, api, "src", "L1");
  dst.check_alignment(api, "dst", kFractalBytes);
  src.check_alignment(api, "src", kBlock);
}

inline void copy_fractal(const Place& dst, uint64_t to, const Place& src, uint64_t from,
                         bool transpose, const char* api) {
  const uint8_t* read = local_read(src, api, from, kFractalBytes, PIPE_MTE1);
  uint8_t* write = local_write(dst, api, to, kFractalBytes, PIPE_MTE1);
  if (!transpose) {
    std::memcpy(write, read, kFractalBytes);
    return;
  }
  for (uint32_t i = 0; i < kFractal; ++i) {
    for (uint32_t j = 0; j < kFractal; ++j) {
      std::memcpy(write + (j * kFractal + i) * 2, read + (i * kFractal + j) * 2, 2);
    }
  }
}

// Reads those elements of fractals in rows x columns that count: what lies beyond is ignored.
inline void read_fractals(const Place& place, uint32_t rows, uint32_t columns, bool rows_outer,
                          const char* api) {
  const uint32_t down = (rows + kFractal - 1) / kFractal;
  const uint32_t across = (columns + kFractal - 1) / kFractal;
  if (rows % kFractal == 0 && columns % kFractal == 0) {
    local_read(place, api, 0, uint64_t{down} * across * kFractalBytes, PIPE_M);
    return;
  }
  // In L0A a fractal holds rows, in L0B columns; of either, the other index is innermost.
  for (uint32_t i = 0; i < down; ++i) {
    for (uint32_t j = 0; j < across; ++j) {
      const uint32_t live_rows = std::min(rows - i * kFractal, kFractal);
      const uint32_t live_columns = std::min(columns - j * kFractal, kFractal);
      const uint32_t lines = rows_outer ? live_rows : live_columns;
      const uint32_t length = rows_outer ? live_columns : live_rows;
      for (uint32_t line = 0; line < lines; ++line) {
        local_read(place, api, (uint64_t{i} * across + j) * kFractalBytes + line * kFractal * 2,
                   length * 2, PIPE_M);
      }
    }
  }
}

// a [m, k] and b [k, n] as plain matrices, c += a b.
inline void multiply_add(const float* a, const float* b, float* c, uint32_t m, uint32_t n,
                         uint32_t k) {
  for (uint32_t i = 0; i < m; ++i) {
    float* row = c + uint64_t{i} * n;
    for (uint32_t l = 0; l < k; ++l) {
      const float factor = a[uint64_t{i} * k + l];
      const float* right = b + uint64_t{l} * n;
      for (uint32_t j = 0; j < n; ++j) row[j] += factor * right[j];
    }
  }
}

inline void convert(float value, float* to) { *to = value; }
inline void convert(float value, half* to) { to->bits = float_to_half(value); }
inline void convert(float value, bfloat16_t* to) { to->bits = float_to_bfloat16(value); }

}  // namespace ascend_emulator

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& params) {
  using namespace ascend_emulator;
  static const char* const api = "DataCopy (Nd2Nz)";
  constexpr uint32_t lanes = kBlock / sizeof(T);  // C0: elements of a block
  expect_memory(dst.place(), Hardware::L1, api, "dst", "L1");
  dst.place().check_alignment(api, "dst", kBlock);
  check_range(api, "ndNum", params.ndNum, 0, 4095);
  check_range(api, "nValue", params.nValue, 0, 16384);
  if (params.ndNum == 0 || params.nValue == 0 || params.dValue == 0) return;
  check_range(api, "srcDValue", params.srcDValue, 1, 65535);
  check_range(api, "dstNzC0Stride", params.dstNzC0Stride, 1, 16384);
  check_range(api, "dstNzNStride", params.dstNzNStride, 1, 16384);
  check_range(api, "dstNzMatrixStride", params.dstNzMatrixStride, 0, 16384);
  if (params.nValue > 1 && params.srcDValue < params.dValue) {
    fail("overlap", "%s: rows of %u elements begin %u apart", api, params.dValue.value,
         params.srcDValue.value);
  }
  const uint64_t row_bytes = uint64_t{params.dValue} * sizeof(T);
  const uint32_t columns = (params.dValue + lanes - 1) / lanes;
  for (uint32_t nd = 0; nd < params.ndNum; ++nd) {
    const uint64_t from = uint64_t{nd} * params.srcNdMatrixStride;
    const uint64_t to = uint64_t{nd} * params.dstNzMatrixStride * sizeof(T);
    for (uint32_t n = 0; n < params.nValue; ++n) {
      const uint64_t at = (from + uint64_t{n} * params.srcDValue) * sizeof(T);
      const uint8_t* read = src.read(at, row_bytes, PIPE_MTE2, api);
      for (uint32_t c = 0; c < columns; ++c) {
        const uint64_t block =
            uint64_t{c} * params.dstNzC0Stride + uint64_t{n} * params.dstNzNStride;
        uint8_t* write = local_write(dst.place(), api, to + block * kBlock, kBlock, PIPE_MTE2);
        const uint64_t left = row_bytes - uint64_t{c} * kBlock;
        const uint64_t bytes = left < kBlock ? left : kBlock;
        std::memcpy(write, read + uint64_t{c} * kBlock, bytes);
        std::memset(write + bytes, 0, kBlock - bytes);
      }
    }
  }
  core().counters.gm_to_local += row_bytes * params.nValue * params.ndNum;
  ++core().counters.copies;
}

// A constant to blocks of L1.
template <typename T>
void InitConstValue(const LocalTensor<T>& dst, const InitConstValueParams<T>& params) {
  using namespace ascend_emulator;
  static const char* const api = "InitConstValue";
  static_assert(sizeof(T) == 2, "InitConstValue: 16-bit types are emulated");
  expect_memory(dst.place(), Hardware::L1, api, "dst", "L1");
  dst.place().check_alignment(api, "dst", kBlock);
  check_range(api, "repeatTimes", params.repeatTimes, 0, 32767);
  check_range(api, "blockNum", params.blockNum, 0, 32767);
  check_range(api, "dstGap", params.dstGap, 0, 32767);
  const uint64_t bytes = uint64_t{params.blockNum} * kBlock;
  if (bytes == 0) return;
  for (uint64_t i = 0; i < params.repeatTimes; ++i) {
    const uint64_t to = i * (uint64_t{params.blockNum} + params.dstGap) * kBlock;
    uint8_t* write = local_write(dst.place(), api, to, bytes, PIPE_MTE2);
    for (uint64_t at = 0; at < bytes; at += sizeof(T)) {
      std::memcpy(write + at, &params.initValue, sizeof(T));
    }
  }
  ++core().counters.copies;
}

template <typename T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src,
              const LoadData2DParams& params) {
  using namespace ascend_emulator;
  static_assert(is_operand<T>, "LoadData: half and bfloat16_t are emulated");
  check_load(dst.place(), src.place(), "LoadData");
  if (params.addrMode != 0) fail("unsupported", "LoadData: addrMode %u", params.addrMode.value);
  if (params.sid != 0) fail("unsupported", "LoadData: sid %u", params.sid.value);
  for (uint64_t i = 0; i < params.repeatTimes; ++i) {
    copy_fractal(dst.place(), i * (1 + uint64_t{params.dstGap}) * kFractalBytes, src.place(),
                 (params.startIndex + i * params.srcStride) * kFractalBytes, params.ifTranspose,
                 "LoadData");
  }
  core().counters.local_to_local += uint64_t{params.repeatTimes} * kFractalBytes;
  ++core().counters.copies;
}

template <typename T>
void LoadDataWithTranspose(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                           const LoadData2dTransposeParams& params) {
  using namespace ascend_emulator;
  static_assert(is_operand<T>, "LoadDataWithTranspose: half and bfloat16_t are emulated");
  static const char* const api = "LoadDataWithTranspose";
  check_load(dst.place(), src.place(), api);
  if (params.addrMode != 0) fail("unsupported", "%s: addrMode %u", api, params.addrMode.value);
  if (params.dstFracGap != 0) {
    fail("unsupported", "%s: dstFracGap means nothing for 16-bit types", api);
  }
  for (uint64_t i = 0; i < params.repeatTimes; ++i) {
    copy_fractal(dst.place(), i * (1 + uint64_t{params.dstGap}) * kFractalBytes, src.place(),
                 (params.startIndex + i * params.srcStride) * kFractalBytes, true, api);
  }
  core().counters.local_to_local += uint64_t{params.repeatTimes} * kFractalBytes;
  ++core().counters.copies;
}

template <typename T, typename U, typename S>
void Mmad(const LocalTensor<T>& dst, const LocalTensor<U>& fm, const LocalTensor<S>& filter,
          const MmadParams& params) {
  using namespace ascend_emulator;
  static_assert(std::is_same<T, float>::value && std::is_same<U, S>::value && is_operand<U>,
                "Mmad: half or bfloat16_t to float is emulated");
  static const char* const api = "Mmad";
  expect_memory(dst.place(), Hardware::L0C, api, "dst", "L0C");
  expect_memory(fm.place(), Hardware::L0A, api, "fm", "L0A");
  expect_memory(filter.place(), Hardware::L0B, api, "filter", "L0B");
  dst.place().check_alignment(api, "dst", kL0CStart);
  fm.place().check_alignment(api, "fm", kFractalBytes);
  filter.place().check_alignment(api, "filter", kFractalBytes);
  check_range(api, "m", params.m, 0, 4095);
  check_range(api, "n", params.n, 0, 4095);
  check_range(api, "k", params.k, 0, 4095);
  if (params.unitFlag != 0) fail("unsupported", "Mmad: unitFlag %u", params.unitFlag.value);
  if (params.cmatrixSource || params.isBias) fail("unsupported", "Mmad: a bias");
  if (params.kDirectionAlign) fail("unsupported", "Mmad: kDirectionAlign");
  const uint32_t m = params.m, n = params.n, k = params.k;
  if (m == 0 || n == 0 || k == 0) return;
  if (m == 1) fail("unsupported", "Mmad: m of 1 is GEMV, which reads fm as a plain row");

  read_fractals(fm.place(), m, k, true, api);
  read_fractals(filter.place(), k, n, false, api);
  const uint32_t down = (m + kFractal - 1) / kFractal, across = (n + kFractal - 1) / kFractal;
  const uint32_t deep = (k + kFractal - 1) / kFractal;
  const uint64_t result_bytes = uint64_t{down} * across * kFractal * kFractal * sizeof(float);
  Core& self = core();
  dst.place().check(api, "dst", 0, result_bytes);
  const uint64_t begin = dst.place().address, end = begin + result_bytes;
  LocalMemory& l0c = self.memory(Hardware::L0C);
  if (!params.cmatrixInitVal) {
    // The unit orders two products into one place by itself only where they are long enough
    // (Mmad, constraints); otherwise PipeBarrier<PIPE_M> has to.
    Actor actor = self.actor(PIPE_M);
    actor.in_order = (m / kFractal) * (n / kFractal) >= 10;
    l0c.shadow.read(begin, end, actor);
  }
  auto* result =
      reinterpret_cast<float*>(self.write(Hardware::L0C, begin, end, PIPE_M, Write::kGarbage));

  const uint8_t* left = self.memory(Hardware::L0A).bytes.data() + fm.place().address;
  const uint8_t* right = self.memory(Hardware::L0B).bytes.data() + filter.place().address;
  std::vector<float> a(uint64_t{m} * k), b(uint64_t{k} * n), c(uint64_t{m} * n, 0.0f);
  for (uint32_t i = 0; i < m; ++i) {
    for (uint32_t l = 0; l < k; ++l) {
      const uint64_t fractal = uint64_t{i / kFractal} * deep + l / kFractal;
      U value;
      std::memcpy(&value,
                  left + fractal * kFractalBytes + (i % kFractal * kFractal + l % kFractal) * 2, 2);
      a[uint64_t{i} * k + l] = operand_value(value);
    }
  }
  for (uint32_t l = 0; l < k; ++l) {
    for (uint32_t j = 0; j < n; ++j) {
      const uint64_t fractal = uint64_t{l / kFractal} * across + j / kFractal;
      S value;
      std::memcpy(&value,
                  right + fractal * kFractalBytes + (j % kFractal * kFractal + l % kFractal) * 2,
                  2);
      b[uint64_t{l} * n + j] = operand_value(value);
    }
  }
  const auto place_of = [&](uint32_t i, uint32_t j) {
    return (uint64_t{j / kFractal} * down * kFractal + i) * kFractal + j % kFractal;
  };
  if (!params.cmatrixInitVal) {
    for (uint32_t i = 0; i < m; ++i) {
      for (uint32_t j = 0; j < n; ++j) c[uint64_t{i} * n + j] = result[place_of(i, j)];
    }
  }
  multiply_add(a.data(), b.data(), c.data(), m, n, k);
  for (uint32_t i = 0; i < m; ++i) {
    for (uint32_t j = 0; j < n; ++j) result[place_of(i, j)] = c[uint64_t{i} * n + j];
  }
  for (uint32_t column = 0; column < across; ++column) {
    const uint32_t width = std::min(n - column * kFractal, kFractal);
    const uint64_t at = begin + uint64_t{column} * down * kFractal * kFractal * sizeof(float);
    if (width == kFractal) {
      self.write(Hardware::L0C, at, at + uint64_t{m} * kFractal * sizeof(float), PIPE_M);
      continue;
    }
    for (uint32_t i = 0; i < m; ++i) {
      const uint64_t row = at + uint64_t{i} * kFractal * sizeof(float);
      self.write(Hardware::L0C, row, row + width * sizeof(float), PIPE_M);
    }
  }
  self.counters.cube_macs += uint64_t{down} * across * deep * kFractal * kFractal * kFractal;
  ++self.counters.cube_instructions;
}

// L0C to rows in global memory, rounding to 16 bits on the way where quantPre says so.
template <typename T, typename U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src,
             const FixpipeParamsV220& params) {
  using namespace ascend_emulator;
  static_assert(config.format == CO2Layout::ROW_MAJOR, "Fixpipe: NZ to ND is emulated");
  static_assert(std::is_same<U, float>::value, "Fixpipe: float from L0C is emulated");
  static const char* const api = "Fixpipe";
  constexpr QuantMode_t expected = std::is_same<T, half>::value         ? QuantMode_t::F322F16
                                   : std::is_same<T, bfloat16_t>::value ? QuantMode_t::F322BF16
                                                                        : QuantMode_t::NoQuant;
  expect_memory(src.place(), Hardware::L0C, api, "src", "L0C");
  src.place().check_alignment(api, "src", 64);
  if (params.quantPre != expected) {
    fail("unsupported", "Fixpipe: quantPre %d does not give dst's type", params.quantPre);
  }
  if (params.unitFlag != 0) fail("unsupported", "Fixpipe: unitFlag %u", params.unitFlag.value);
  if (params.reluEn || params.isChannelSplit) {
    fail("unsupported", "Fixpipe: reluEn and isChannelSplit");
  }
  check_range(api, "nSize", params.nSize, 0, 4095);
  check_range(api, "mSize", params.mSize, 0, 8192);
  check_range(api, "srcNdStride", params.srcNdStride, 0, 512);
  if (params.nSize == 0 || params.mSize == 0 || params.ndNum == 0) return;
  if (params.nSize % kFractal != 0) {
    fail("alignment", "Fixpipe: nSize %u is no multiple of 16", params.nSize.value);
  }
  if (params.srcStride % kFractal != 0 || params.srcStride < params.mSize) {
    fail("alignment", "Fixpipe: srcStride %u has to be mSize, %u, rounded up to 16",
         params.srcStride.value, params.mSize.value);
  }
  if (params.dstStride == 0 || (params.mSize > 1 && params.dstStride < params.nSize)) {
    fail("overlap", "Fixpipe: rows of %u elements begin %u apart", params.nSize.value,
         params.dstStride.value);
  }
  constexpr uint64_t block = kFractal * sizeof(U);  // a row of a fractal
  std::vector<T> row(params.nSize);
  for (uint64_t nd = 0; nd < params.ndNum; ++nd) {
    const uint64_t from = nd * params.srcNdStride * kFractal * block;
    const uint64_t to = nd * params.dstNdStride * sizeof(T);
    for (uint32_t c = 0; c < params.nSize / kFractal; ++c) {
      local_read(src.place(), api, from + uint64_t{c} * params.srcStride * block,
                 params.mSize * block, PIPE_FIX);
    }
    const uint8_t* base = core().memory(Hardware::L0C).bytes.data() + src.place().address + from;
    for (uint32_t i = 0; i < params.mSize; ++i) {
      for (uint32_t j = 0; j < params.nSize; ++j) {
        float value;
        std::memcpy(&value,
                    base + (uint64_t{j / kFractal} * params.srcStride + i) * block +
                        j % kFractal * sizeof(U),
                    sizeof(value));
        convert(value, &row[j]);
      }
      const uint64_t bytes = params.nSize * sizeof(T);
      std::memcpy(dst.write(to + uint64_t{i} * params.dstStride * sizeof(T), bytes, PIPE_FIX, api),
                  row.data(), bytes);
    }
    core().counters.local_to_gm += uint64_t{params.mSize} * params.nSize * sizeof(T);
  }
  ++core().counters.copies;
}

}  // namespace AscendC
