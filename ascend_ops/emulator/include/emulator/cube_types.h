// Parameters of the instructions around the cube unit, with the fields, defaults and constructors
// of architecture 2201. A value that its field cannot hold is an error and not silently cut.
#pragma once

#include "emulator/copy.h"

namespace ascend_emulator {

template <typename N>
struct Field {
  N value;
  Field() : value(0) {}
  template <typename I, typename = std::enable_if_t<std::is_integral<I>::value>>
  Field(I given) : value(Exactly<N>(given)) {}
  operator N() const { return value; }
};

}  // namespace ascend_emulator

enum QuantMode_t { NoQuant = 0, F322F16 = 1, F322BF16 = 16 };

namespace AscendC {

// Rows of ND matrices in global memory to NZ in L1: strides of the source in elements, of the
// destination in blocks of 32 bytes, between NZ matrices in elements.
struct Nd2NzParams {
  using F = ascend_emulator::Field<uint16_t>;
  Nd2NzParams() = default;
  Nd2NzParams(F ndNumIn, F nValueIn, F dValueIn, F srcNdMatrixStrideIn, F srcDValueIn,
              F dstNzC0StrideIn, F dstNzNStrideIn, F dstNzMatrixStrideIn)
      : ndNum(ndNumIn),
        nValue(nValueIn),
        dValue(dValueIn),
        srcNdMatrixStride(srcNdMatrixStrideIn),
        srcDValue(srcDValueIn),
        dstNzC0Stride(dstNzC0StrideIn),
        dstNzNStride(dstNzNStrideIn),
        dstNzMatrixStride(dstNzMatrixStrideIn) {}
  F ndNum, nValue, dValue, srcNdMatrixStride, srcDValue;
  F dstNzC0Stride, dstNzNStride, dstNzMatrixStride;
};

// Fractals of 512 bytes from L1 to L0A or L0B: strides in fractals.
struct LoadData2DParams {
  using F = ascend_emulator::Field<uint16_t>;
  using Byte = ascend_emulator::Field<uint8_t>;
  LoadData2DParams() = default;
  LoadData2DParams(F startIndexIn, Byte repeatTimesIn, F srcStrideIn, Byte sidIn, F dstGapIn,
                   const bool ifTransposeIn, Byte addrModeIn)
      : startIndex(startIndexIn),
        dstGap(dstGapIn),
        srcStride(srcStrideIn),
        ifTranspose(ifTransposeIn),
        repeatTimes(repeatTimesIn),
        sid(sidIn),
        addrMode(addrModeIn) {}
  F startIndex, dstGap, srcStride;
  bool ifTranspose = false;
  Byte repeatTimes, sid, addrMode;
};
using LoadData2dParams = LoadData2DParams;

struct LoadData2dTransposeParams {
  using F = ascend_emulator::Field<uint16_t>;
  using Byte = ascend_emulator::Field<uint8_t>;
  LoadData2dTransposeParams() = default;
  LoadData2dTransposeParams(F startIndexIn, Byte repeatTimesIn, F srcStrideIn, F dstGapIn,
                            F dstFracGapIn, Byte addrModeIn = 0)
      : startIndex(startIndexIn),
        repeatTimes(repeatTimesIn),
        srcStride(srcStrideIn),
        dstGap(dstGapIn),
        dstFracGap(dstFracGapIn),
        addrMode(addrModeIn) {}
  F startIndex;
  Byte repeatTimes;
  F srcStride, dstGap, dstFracGap;
  Byte addrMode;
};

struct MmadParams {
  using F = ascend_emulator::Field<uint16_t>;
  MmadParams() = default;
  MmadParams(F mIn, F nIn, F kIn, ascend_emulator::Field<uint8_t> unitFlagIn,
             const bool cmatrixSourceIn, const bool cmatrixInitValIn)
      : m(mIn),
        n(nIn),
        k(kIn),
        unitFlag(unitFlagIn),
        cmatrixSource(cmatrixSourceIn),
        cmatrixInitVal(cmatrixInitValIn) {}
  F m, n, k;
  bool isBias = false;
  ascend_emulator::Field<uint8_t> unitFlag;
  bool kDirectionAlign = false;
  bool cmatrixSource = false;
  bool cmatrixInitVal = true;
};

template <typename T>
struct InitConstValueParams {
  using F = ascend_emulator::Field<uint16_t>;
  InitConstValueParams() = default;
  InitConstValueParams(F repeatTimesIn, F blockNumIn, F dstGapIn, const T initValueIn)
      : repeatTimes(repeatTimesIn),
        blockNum(blockNumIn),
        dstGap(dstGapIn),
        initValue(initValueIn) {}
  F repeatTimes, blockNum, dstGap;
  T initValue = 0;
};

enum class CO2Layout : uint8_t { NZ = 0, ROW_MAJOR, COLUMN_MAJOR };

struct FixpipeConfig {
  CO2Layout format;
};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  using F = ascend_emulator::Field<uint16_t>;
  FixpipeParamsV220() = default;
  FixpipeParamsV220(F nSizeIn, F mSizeIn, F srcStrideIn,
                    ascend_emulator::Field<uint32_t> dstStrideIn, const bool reluEnIn)
      : nSize(nSizeIn),
        mSize(mSizeIn),
        srcStride(srcStrideIn),
        dstStride(dstStrideIn),
        reluEn(reluEnIn) {}
  F nSize, mSize, srcStride;
  ascend_emulator::Field<uint32_t> dstStride;
  QuantMode_t quantPre = QuantMode_t::NoQuant;
  uint64_t deqScalar = 0;
  F ndNum = 1, srcNdStride, dstNdStride;
  bool reluEn = false;
  ascend_emulator::Field<uint8_t> unitFlag;
  bool isChannelSplit = false;
};

}  // namespace AscendC
