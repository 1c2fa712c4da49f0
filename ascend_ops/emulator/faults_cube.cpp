// One mixed kernel, y = a b twice over through every memory of the cube core, with a fault for each
// check of cube.h and cross_core.h; for the tests of the emulator.
//
// a is [32, 48] and b [48, 32] in half, y [blocks, 32, 32] in fp32; k is summed in two products of
// 32 and 16. Each vector core copies half of the rows.
#include <cstring>
#include <string>

#include "binding.h"
#include "emulator/launch.h"
#include "kernel_operator.h"

namespace {

using namespace AscendC;

// The name of a fault, or of none.
struct Fault {
  char name[32];
  bool operator==(const char* other) const { return std::strcmp(name, other) == 0; }
  bool operator!=(const char* other) const { return !(*this == other); }
};

constexpr uint32_t kM = 32, kK = 48, kN = 32, kFirst = 32;  // of k in the first product
constexpr uint32_t kSize = 16 * 16;
constexpr uint32_t kL1 = 512 * 1024 - 256, kL0 = 64 * 1024, kL0C = 128 * 1024;

struct Cube {
  TPipe pipe;
  TBuf<TPosition::A1> a1;
  TBuf<TPosition::B1> b1;
  TBuf<TPosition::A2> a2;
  TBuf<TPosition::B2> b2;
  TBuf<TPosition::CO1> co1;
  GlobalTensor<half> a, b;
  GlobalTensor<float> c;
  Fault fault;

  template <HardEvent event>
  void Order(const char* without) {
    if (fault == without) return;
    SetFlag<event>(0);
    WaitFlag<event>(0);
  }
  // What a pipe of the former round has to have ended: set there, waited for here.
  template <HardEvent event>
  void Set(int round, const char* without) {
    if (round == 0 && fault != without) SetFlag<event>(1);
  }
  template <HardEvent event>
  void Wait(int round, const char* without) {
    if (round == 1 && fault != without) WaitFlag<event>(1);
  }

  void Buffers() {
    pipe.InitBuffer(a1, kM * kK * 2 + 32);
    pipe.InitBuffer(b1, fault == "l1_capacity" ? kL1 : kL1 - kM * kK * 2 - 32 - 32);
    pipe.InitBuffer(a2, fault == "l0a_capacity" ? kL0 + 32 : kL0);
    pipe.InitBuffer(b2, fault == "l0b_capacity" ? kL0 + 32 : kL0);
    pipe.InitBuffer(co1, fault == "l0c_capacity" ? kL0C + 32 : kL0C);
  }

  void Load(int round) {
    Wait<HardEvent::MTE1_MTE2>(round, "no_flag_from_mte1");
    LocalTensor<half> left = a1.Get<half>(), right = b1.Get<half>();
    Nd2NzParams params(1, kM, kK, 0, kK, kM, 1, 0);
    if (fault == "nd2nz_stride") params.dstNzC0Stride = 0;
    if (fault == "nd2nz_narrowing") params.srcDValue = 1 << 16;
    if (fault == "nd2nz_rows") params.srcDValue = kK - 16;
    if (fault == "nd2nz_bounds") params.nValue = kM + 1;
    if (fault == "unwritten_l1") params.nValue = kM - 1;
    DataCopy(fault == "l1_alignment" ? left[8] : left, a, params);
    // The last rows of b twice: as they are, and over zeros.
    InitConstValueParams<half> zero(kN / 16, 16, kK - 16, half(0.0f));
    if (fault == "fill_range") zero.blockNum = 32768;
    InitConstValue(right[(kK - 16) * 16], zero);
    PipeBarrier<PIPE_MTE2>();
    DataCopy(right, b, Nd2NzParams(1, kK, kN, 0, kN, kK, 1, 0));
    Order<HardEvent::MTE2_MTE1>("no_flag_to_mte1");
  }

  // a2: two row fractals of 2 in k, then of 1; b2: 3 row fractals of 2 in n.
  void Fractals(int round) {
    Wait<HardEvent::M_MTE1>(round, "no_flag_from_m");
    LocalTensor<half> left = a1.Get<half>(), right = b1.Get<half>();
    LocalTensor<half> l0a = a2.Get<half>(), l0b = b2.Get<half>();
    LoadData2DParams rows(0, 2, kM / 16, 0, 0, false, 0);
    if (fault == "load_repeat") rows.repeatTimes = 256;
    if (fault == "load_bounds") rows.startIndex = 6;
    if (fault == "load_address_mode") rows.addrMode = 1;
    if (fault == "load_position") {
      LoadData(left, right, rows);
    }
    for (uint32_t i = 0; i < kM / 16; ++i) {
      LoadData(l0a[2 * i * kSize + (fault == "l0a_alignment" ? 16 : 0)], left[i * kSize], rows);
      LoadData2DParams last(static_cast<uint16_t>(4 + i), 1, 0, 0, 0, false, 0);
      if (fault != "unwritten_l0a" || i == 0) LoadData(l0a[(4 + i) * kSize], left, last);
    }
    LoadData2dTransposeParams columns(0, kN / 16, kK / 16, 0, 0);
    if (fault == "transpose_gap") columns.dstFracGap = 1;
    for (uint32_t i = 0; i < kK / 16; ++i) {
      columns.startIndex = i;
      LoadDataWithTranspose(l0b[i * 2 * kSize + (fault == "l0b_alignment" ? 16 : 0)], right,
                            columns);
    }
    Set<HardEvent::MTE1_MTE2>(round, "no_flag_from_mte1");
    Order<HardEvent::MTE1_M>("no_flag_to_m");
  }

  void Multiply(int round) {
    Wait<HardEvent::FIX_M>(round, "no_flag_from_fix");
    LocalTensor<half> l0a = a2.Get<half>(), l0b = b2.Get<half>();
    LocalTensor<float> l0c = co1.Get<float>();
    MmadParams params(kM, kN, kFirst, 0, false, true);
    if (fault == "mmad_range") params.k = 4096;
    if (fault == "mmad_unit_flag") params.unitFlag = 3;
    if (fault == "mmad_bias") params.cmatrixSource = true;
    if (fault == "mmad_gemv") params.m = 1;
    if (fault == "unwritten_l0c") params.n = kN - 16;
    if (fault == "mmad_position") {
      Mmad(l0c, l0b, l0b, params);
    }
    Mmad(fault == "l0c_alignment" ? l0c[128] : l0c, l0a, l0b, params);
    if (fault != "no_barrier_m") PipeBarrier<PIPE_M>();
    params.k = kK - kFirst;
    params.cmatrixInitVal = false;
    Mmad(l0c, l0a[4 * kSize], l0b[4 * kSize], params);
    Set<HardEvent::M_MTE1>(round, "no_flag_from_m");
    Order<HardEvent::M_FIX>("no_flag_to_fix");
  }

  void Store(int round) {
    if (round == 1 && fault != "no_wait_of_vector") CrossCoreWaitFlag(1);
    LocalTensor<float> l0c = co1.Get<float>();
    FixpipeParamsV220 params(kN, kM, kM, kN, false);
    if (fault == "fixpipe_columns") params.nSize = 24;
    if (fault == "fixpipe_source_stride") params.srcStride = 16;
    if (fault == "fixpipe_overlap") params.dstStride = 16;
    if (fault == "fixpipe_unit_flag") params.unitFlag = 3;
    if (fault == "fixpipe_quantization") params.quantPre = QuantMode_t::F322F16;
    if (fault == "fixpipe_bounds") params.dstStride = 64;
    if (fault == "fixpipe_position") {
      Fixpipe(c, a1.Get<float>(), params);
    }
    Fixpipe(c, fault == "fixpipe_alignment" ? l0c[8] : l0c, params);
    Set<HardEvent::FIX_M>(round, "no_flag_from_fix");
    if (fault == "wrong_pipe") {
      CrossCoreSetFlag<2, PIPE_M>(0);
    } else {
      CrossCoreSetFlag<2, PIPE_FIX>(0);
    }
  }

  void Flags() {
    if (fault == "flag_range") CrossCoreSetFlag<2, PIPE_FIX>(16);
    if (fault == "flag_of_sync_all") CrossCoreSetFlag<2, PIPE_FIX>(12);
    if (fault == "flag_left") CrossCoreSetFlag<2, PIPE_FIX>(5);
    if (fault == "flag_mode_role") CrossCoreSetFlag<1, PIPE_FIX>(5);
    if (fault == "flag_offered" && GetBlockIdx() == 0) CrossCoreSetFlag<0, PIPE_FIX>(6);
    for (int i = 0; fault == "flag_overflow" && i < 16; ++i) CrossCoreSetFlag<2, PIPE_FIX>(5);
    if (fault == "flag_modes") {
      CrossCoreSetFlag<2, PIPE_FIX>(5);
      CrossCoreSetFlag<0, PIPE_FIX>(5);
    }
    if (fault == "nobody_sets") CrossCoreWaitFlag(7);
  }

  // Every cube core writes a cell for the next one to read after the meeting of all.
  void MeetAll(GlobalTensor<float> cells) {
    const uint32_t blocks = GetBlockNum(), own = GetBlockIdx();
    FixpipeParamsV220 params(16, 1, 16, 16, false);
    LocalTensor<float> l0c = co1.Get<float>();
    Fixpipe(cells[own * 16], l0c, params);
    CrossCoreSetFlag<0, PIPE_FIX>(8);
    if (fault != "no_wait_of_all_cubes") CrossCoreWaitFlag(8);
    LocalTensor<half> to = a1.Get<half>();
    GlobalTensor<half> next;
    next.SetGlobalBuffer((__gm__ half*)(cells[(own + 1) % blocks * 16].GetPhyAddr(0)), 32);
    PipeBarrier<PIPE_ALL>();
    DataCopy(to, next, Nd2NzParams(1, 1, 32, 0, 32, 1, 1, 0));
    if (fault == "no_wait_of_all_cubes") CrossCoreWaitFlag(8);
  }
};

void VectorCore(GlobalTensor<float> c, GlobalTensor<float> y, GlobalTensor<float> pair,
                const Fault& fault) {
  TPipe pipe;
  TBuf<> buffer, exchange;
  constexpr uint32_t count = kM / 2 * kN;
  pipe.InitBuffer(buffer, count * sizeof(float));
  pipe.InitBuffer(exchange, 64);
  LocalTensor<float> rows = buffer.Get<float>(), cell = exchange.Get<float>();
  const uint32_t half_index = GetSubBlockIdx();
  if (fault == "vector_role") {
    LocalTensor<half> nowhere;
    TBuf<TPosition::A1> l1;
    pipe.InitBuffer(l1, 64);
  }
  for (int round = 0; round < 2; ++round) {
    if (fault != "no_wait_of_cube") CrossCoreWaitFlag(0);
    if (round == 1) {
      SetFlag<HardEvent::MTE3_MTE2>(1);
      WaitFlag<HardEvent::MTE3_MTE2>(1);
    }
    DataCopy(rows, c[half_index * count], count);
    SetFlag<HardEvent::MTE2_MTE3>(0);
    WaitFlag<HardEvent::MTE2_MTE3>(0);
    // The second round writes the same rows again, after the first.
    if (round == 1) PipeBarrier<PIPE_MTE3>();
    DataCopy(y[half_index * count], rows, count);
    if (round == 0 && (fault != "one_vector_core_sets" || half_index == 0)) {
      if (fault == "other_pipe_back") {
        CrossCoreSetFlag<2, PIPE_V>(1);  // which has not followed the read
      } else {
        CrossCoreSetFlag<2, PIPE_MTE2>(1);
      }
    }
  }
  // The pair of vector cores meets: each reads what the other wrote.
  Duplicate(cell, 1.0f, 8);
  SetFlag<HardEvent::V_MTE3>(0);
  WaitFlag<HardEvent::V_MTE3>(0);
  DataCopy(pair[half_index * 8], cell, 8);
  CrossCoreSetFlag<1, PIPE_MTE3>(2);
  if (fault != "no_wait_of_pair") CrossCoreWaitFlag(2);
  DataCopy(cell[8], pair[(1 - half_index) * 8], 8);
  if (fault == "no_wait_of_pair") CrossCoreWaitFlag(2);
}

extern "C" void cube_fault(GM_ADDR a, GM_ADDR b, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  REGISTER_TILING_DEFAULT(Fault);
  GET_TILING_DATA(fault, tiling);
  const uint32_t block = GetBlockIdx() / (ASCEND_IS_AIV ? 2 : 1);
  const uint64_t blocks = GetBlockNum();
  auto* user = reinterpret_cast<__gm__ float*>(GetUserWorkspace(workspace));
  GlobalTensor<float> c, cells, pair;
  c.SetGlobalBuffer(user + block * kM * kN, kM * kN);
  cells.SetGlobalBuffer(user + blocks * kM * kN, blocks * 16);
  pair.SetGlobalBuffer(user + blocks * (kM * kN + 16) + block * 16, 16);
  if ASCEND_IS_AIV {
    GlobalTensor<float> out;
    out.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y) + block * kM * kN, kM * kN);
    VectorCore(c, out, pair, fault);
    return;
  }
  Cube cube;
  cube.fault = fault;
  cube.a.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(a), kM * kK);
  cube.b.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(b), kK * kN);
  cube.c = c;
  cube.Buffers();
  cube.Flags();
  for (int round = 0; round < 2; ++round) {
    cube.Load(round);
    cube.Fractals(round);
    cube.Multiply(round);
    cube.Store(round);
  }
  cube.MeetAll(cells);
}
ASCEND_EMULATOR_KERNEL(cube_fault);

const ascend_emulator::Binding binding([](pybind11::module_& m) {
  m.def("cube_fault_tiling", [](const std::string& name) {
    Fault fault{};
    name.copy(fault.name, sizeof(fault.name) - 1);
    return ascend_emulator::as_bytes(fault);
  });
});

}  // namespace
