// Small kernels with a fault each, for the tests of the emulator's checks. Every kernel takes
// x and y (1024 floats or more) and does what its name says where its tiling asks for the fault,
// and the same without the fault where it does not.
#include "binding.h"
#include "emulator/launch.h"
#include "kernel_operator.h"

namespace {

using namespace AscendC;

struct FaultTiling {
  int32_t fault;
};

constexpr int32_t kCount = 256;
constexpr uint32_t kBytes = kCount * sizeof(float);

// Global tensors of a core, 256 elements a core, and whether to fail.
struct Setting {
  GlobalTensor<float> x, y, workspace;
  bool fault;

  Setting(GM_ADDR in, GM_ADDR out, GM_ADDR work, GM_ADDR tiling) {
    REGISTER_TILING_DEFAULT(FaultTiling);
    GET_TILING_DATA(data, tiling);
    fault = data.fault != 0;
    const int64_t offset = GetBlockIdx() * kCount;
    x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(in) + offset, kCount);
    y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out) + offset, kCount);
    workspace.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(GetUserWorkspace(work)));
  }
};

#define FAULT_KERNEL(name)                                                        \
  void name##_body(Setting& s);                                                   \
  extern "C" void name(GM_ADDR x, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) { \
    Setting setting(x, y, workspace, tiling);                                     \
    name##_body(setting);                                                         \
  }                                                                               \
  ASCEND_EMULATOR_KERNEL(name);                                                   \
  void name##_body(Setting& s)

using In = TQue<TPosition::VECIN, 2>;
using Out = TQue<TPosition::VECOUT, 2>;

// y = x + 1, by the book.
void add_one(Setting& s, In& in, Out& out) {
  LocalTensor<float> x = in.AllocTensor<float>();
  DataCopy(x, s.x, kCount);
  in.EnQue(x);
  x = in.DeQue<float>();
  LocalTensor<float> y = out.AllocTensor<float>();
  Adds(y, x, 1.0f, kCount);
  in.FreeTensor(x);
  out.EnQue(y);
  y = out.DeQue<float>();
  DataCopy(s.y, y, kCount);
  out.FreeTensor(y);
}

FAULT_KERNEL(fault_misaligned_copy) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes + 32);
  pipe.InitBuffer(out, 1, kBytes);
  if (s.fault) {
    LocalTensor<float> x = in.AllocTensor<float>();
    DataCopy(x[3], s.x, kCount);
    in.FreeTensor(x);
  }
  add_one(s, in, out);
}

FAULT_KERNEL(fault_copy_length) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  if (s.fault) {
    LocalTensor<float> x = in.AllocTensor<float>();
    DataCopy(x, s.x, 5);
    in.FreeTensor(x);
  }
  add_one(s, in, out);
}

// 8 KB and 256 bytes less than 192 KB can be used.
FAULT_KERNEL(fault_capacity) {
  TPipe pipe;
  In in;
  Out out;
  TBuf<> rest;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  const uint32_t usable = 192 * 1024 - 256 - 8 * 1024;
  pipe.InitBuffer(rest, usable - 3 * kBytes + (s.fault ? 32 : 0));
  add_one(s, in, out);
}

FAULT_KERNEL(fault_buffer_count) {
  TPipe pipe;
  In in;
  Out out;
  TBuf<> many[62];
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  for (int i = 0; i < (s.fault ? 62 : 61); ++i) pipe.InitBuffer(many[i], 32);
  add_one(s, in, out);
}

FAULT_KERNEL(fault_buffer_overrun) {
  TPipe pipe;
  In in;
  Out out;
  TBuf<> scratch;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(scratch, 128);
  pipe.InitBuffer(out, 1, kBytes);
  LocalTensor<float> t = scratch.Get<float>();
  Duplicate(t, 0.0f, s.fault ? 33 : 32);
  add_one(s, in, out);
}

FAULT_KERNEL(fault_leak) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  LocalTensor<float> x = in.AllocTensor<float>();
  if (!s.fault) in.FreeTensor(x);
}

FAULT_KERNEL(fault_no_enque) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  if (s.fault) in.DeQue<float>();
}

FAULT_KERNEL(fault_use_after_free) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  LocalTensor<float> x = in.AllocTensor<float>();
  Duplicate(x, 0.0f, kCount);
  in.FreeTensor(x);
  if (s.fault) Adds(x, x, 1.0f, kCount);
}

FAULT_KERNEL(fault_use_while_queued) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  LocalTensor<float> x = in.AllocTensor<float>();
  DataCopy(x, s.x, kCount);
  in.EnQue(x);
  LocalTensor<float> again = x;
  if (!s.fault) again = in.DeQue<float>();
  Adds(again, again, 1.0f, kCount);
  in.FreeTensor(again);
}

FAULT_KERNEL(fault_too_many_tensors) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  LocalTensor<float> a = in.AllocTensor<float>(), b = in.AllocTensor<float>();
  if (s.fault) in.AllocTensor<float>();
  in.FreeTensor(a);
  in.FreeTensor(b);
}

// Without queues: the flags are the kernel's own.
template <typename Body>
void by_hand(Setting& s, Body between) {
  TPipe pipe;
  TBuf<> first, second;
  pipe.InitBuffer(first, kBytes);
  pipe.InitBuffer(second, kBytes);
  LocalTensor<float> x = first.Get<float>(), y = second.Get<float>();
  DataCopy(x, s.x, kCount);
  between(pipe, x, y);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(s.y, y, kCount);
  PipeBarrier<PIPE_ALL>();
}

void await_copy() {
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
}

FAULT_KERNEL(fault_missing_flag) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    if (!s.fault) await_copy();
    Adds(y, x, 1.0f, kCount);
  });
}

// The flag orders the vector unit before the copies, and not the copy before the vector unit.
FAULT_KERNEL(fault_wrong_flag) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    if (s.fault) {
      SetFlag<HardEvent::V_MTE2>(EVENT_ID0);
      WaitFlag<HardEvent::V_MTE2>(EVENT_ID0);
    } else {
      await_copy();
    }
    Adds(y, x, 1.0f, kCount);
  });
}

FAULT_KERNEL(fault_wait_without_set) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    if (!s.fault) SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID1);
    Adds(y, x, 1.0f, kCount);
  });
}

FAULT_KERNEL(fault_set_twice) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    if (s.fault) SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    Adds(y, x, 1.0f, kCount);
  });
}

FAULT_KERNEL(fault_flag_left_set) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, kCount);
    if (s.fault) SetFlag<HardEvent::V_MTE2>(EVENT_ID3);
  });
}

FAULT_KERNEL(fault_event_leak) {
  by_hand(s, [&](TPipe& pipe, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    const TEventID id = pipe.AllocEventID<HardEvent::V_S>();
    Adds(y, x, 1.0f, kCount);
    if (!s.fault) pipe.ReleaseEventID<HardEvent::V_S>(id);
  });
}

// The queue took event 0 when the tensor was freed.
FAULT_KERNEL(fault_queue_event) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  const int32_t id = s.fault ? 0 : pipe.FetchEventID<HardEvent::V_MTE2>();
  SetFlag<HardEvent::V_MTE2>(id);
  WaitFlag<HardEvent::V_MTE2>(id);
}

// The second copy may begin before the first has ended: they need a barrier of their pipe.
FAULT_KERNEL(fault_missing_barrier) {
  TPipe pipe;
  TBuf<> buffer;
  pipe.InitBuffer(buffer, kBytes);
  LocalTensor<float> x = buffer.Get<float>();
  DataCopy(x, s.x, kCount);
  if (!s.fault) PipeBarrier<PIPE_MTE2>();
  DataCopy(x, s.x, kCount);
  await_copy();
  Adds(x, x, 1.0f, kCount);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(s.y, x, kCount);
}

// The scalar unit reads what the vector unit is still writing.
FAULT_KERNEL(fault_scalar_read) {
  by_hand(s, [&](TPipe& pipe, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, kCount);
    if (!s.fault) {
      const int32_t id = pipe.FetchEventID<HardEvent::V_S>();
      SetFlag<HardEvent::V_S>(id);
      WaitFlag<HardEvent::V_S>(id);
    }
    y.GetValue(0);
    SetFlag<HardEvent::S_V>(EVENT_ID0);
    WaitFlag<HardEvent::S_V>(EVENT_ID0);
  });
}

FAULT_KERNEL(fault_scalar_write) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    x.SetValue(0, 2.0f);
    if (!s.fault) {
      SetFlag<HardEvent::S_V>(EVENT_ID0);
      WaitFlag<HardEvent::S_V>(EVENT_ID0);
    }
    Adds(y, x, 1.0f, kCount);
  });
}

// A queue of one buffer is overwritten while the copy out of it may be under way.
FAULT_KERNEL(fault_overwritten) {
  TPipe pipe;
  TBuf<> buffer;
  pipe.InitBuffer(buffer, kBytes);
  LocalTensor<float> t = buffer.Get<float>();
  for (int i = 0; i < 2; ++i) {
    Duplicate(t, 1.0f, kCount);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(s.y, t, kCount);
    if (!s.fault) {
      SetFlag<HardEvent::MTE3_V>(EVENT_ID0);
      WaitFlag<HardEvent::MTE3_V>(EVENT_ID0);
    }
    PipeBarrier<PIPE_MTE3>();
  }
}

FAULT_KERNEL(fault_uninitialized) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    if (!s.fault) Duplicate(y, 1.0f, kCount);
    Add(y, x, y, kCount);
  });
}

// What fills up the last data block of a copy is anything.
FAULT_KERNEL(fault_padding) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  LocalTensor<float> x = in.AllocTensor<float>();
  DataCopyPad(x, s.x, {1, 5 * sizeof(float), 0, 0, 0}, {!s.fault, 0, 3, 0.0f});
  in.EnQue(x);
  x = in.DeQue<float>();
  Adds(x, x, 1.0f, 8);
  in.FreeTensor(x);
  add_one(s, in, out);
}

FAULT_KERNEL(fault_workspace_unwritten) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  if (s.fault) {
    LocalTensor<float> x = in.AllocTensor<float>();
    DataCopy(x, s.workspace, kCount);
    in.FreeTensor(x);
  }
  add_one(s, in, out);
}

FAULT_KERNEL(fault_global_overrun) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  if (s.fault) s.x.SetGlobalBuffer(const_cast<float*>(s.x.GetPhyAddr()) + 8);
  add_one(s, in, out);
}

FAULT_KERNEL(fault_output_unwritten) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  if (!s.fault || GetBlockIdx() > 0) add_one(s, in, out);
}

FAULT_KERNEL(fault_repeat_range) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, 64, s.fault ? 260 : 4, {1, 1, 8, 8});
  });
}

FAULT_KERNEL(fault_mask_range) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, s.fault ? 65 : 64, 4, {1, 1, 8, 8});
  });
}

// 4 repeats 16 data blocks apart reach beyond the buffer.
FAULT_KERNEL(fault_stride) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, 64, 4, {1, 1, s.fault ? 16 : 8, 8});
  });
}

FAULT_KERNEL(fault_partial_overlap) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, kCount);
    Adds(x, x[s.fault ? 8 : 128], 1.0f, 128);
  });
}

FAULT_KERNEL(fault_shared_memory) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, 1.0f, kCount);
    Brcb(y, s.fault ? y[56] : x[56], 1, BrcbRepeatParams(1, 8));
  });
}

// The first element is 0.
FAULT_KERNEL(fault_square_root) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    Adds(y, x, s.fault ? 0.0f : 1.0f, kCount);
    Sqrt(y, y, kCount);
  });
}

FAULT_KERNEL(fault_unsupported) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    LocalTensor<int32_t> integers = y.ReinterpretCast<int32_t>();
    Cast(integers, x, s.fault ? RoundMode::CAST_ODD : RoundMode::CAST_RINT, kCount);
    Adds(y, x, 1.0f, kCount);
  });
}

// Every core adds its neighbour's number to its own.
FAULT_KERNEL(fault_cross_core_race) {
  TPipe pipe;
  TBuf<> first, second;
  pipe.InitBuffer(first, kBytes);
  pipe.InitBuffer(second, kBytes);
  LocalTensor<float> x = first.Get<float>(), y = second.Get<float>();
  DataCopy(x, s.x, kCount);
  SetFlag<HardEvent::MTE2_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_MTE3>(EVENT_ID0);
  DataCopy(s.workspace[GetBlockIdx() * kCount], x, kCount);
  if (s.fault) {
    PipeBarrier<PIPE_ALL>();
  } else {
    SyncAll();
  }
  // By the order of execution here, the neighbour below has always written.
  const int64_t neighbour = GetBlockIdx() == 0 ? 0 : GetBlockIdx() - 1;
  DataCopy(y, s.workspace[neighbour * kCount], kCount);
  await_copy();
  Add(y, x, y, kCount);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(s.y, y, kCount);
}

FAULT_KERNEL(fault_overlapping_outputs) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  if (s.fault && GetBlockIdx() == 1) {
    LocalTensor<float> y = out.AllocTensor<float>();
    Duplicate(y, 0.0f, 8);
    out.EnQue(y);
    y = out.DeQue<float>();
    s.y.SetGlobalBuffer(const_cast<float*>(s.y.GetPhyAddr()) - 8);
    DataCopy(s.y, y, 8);
    out.FreeTensor(y);
  }
}

FAULT_KERNEL(fault_sync_deadlock) {
  {
    TPipe pipe;
    In in;
    Out out;
    pipe.InitBuffer(in, 2, kBytes);
    pipe.InitBuffer(out, 1, kBytes);
    add_one(s, in, out);
  }
  if (!s.fault || GetBlockIdx() != 1) SyncAll();
}

// The scalar unit reads through a cache that knows nothing of the DMA.
FAULT_KERNEL(fault_stale_cache) {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 2, kBytes);
  pipe.InitBuffer(out, 1, kBytes);
  add_one(s, in, out);
  PipeBarrier<PIPE_ALL>();
  if (s.fault) {
    s.y.GetValue(0);
  } else {
    s.x.GetValue(0);
  }
}

// A vector core has no cube unit.
FAULT_KERNEL(fault_role) {
  by_hand(s, [&](TPipe&, LocalTensor<float>& x, LocalTensor<float>& y) {
    await_copy();
    if (s.fault) PipeBarrier<PIPE_M>();
    Adds(y, x, 1.0f, kCount);
  });
}

const ascend_emulator::Binding binding([](pybind11::module_& m) {
  m.def("fault_tiling", [](bool fault) { return ascend_emulator::as_bytes(FaultTiling{fault}); });
});

}  // namespace
