// y = a b of any m and k on a cube core, for the tests of the emulator's arithmetic: what m and k
// leave of a fractal stays as nobody wrote it.
#include "binding.h"
#include "emulator/launch.h"
#include "kernel_operator.h"

namespace {

using namespace AscendC;

struct ProductTiling {
  uint32_t m, k, n;  // n a multiple of 16
};

constexpr uint32_t kFractal = 16;

uint32_t Rounded(uint32_t size) { return (size + kFractal - 1) / kFractal * kFractal; }

template <typename T>
class Product {
 public:
  void Run(GM_ADDR a, GM_ADDR b, GM_ADDR y, const ProductTiling& t) {
    TPipe pipe;
    const uint32_t m = Rounded(t.m), k = Rounded(t.k);
    pipe.InitBuffer(a1, m * k * sizeof(T));
    pipe.InitBuffer(b1, k * t.n * sizeof(T));
    pipe.InitBuffer(a2, m * k * sizeof(T));
    pipe.InitBuffer(b2, k * t.n * sizeof(T));
    pipe.InitBuffer(co1, m * t.n * sizeof(float));
    GlobalTensor<T> left, right, out;
    left.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a), t.m * t.k);
    right.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(b), t.k * t.n);
    out.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), t.m * t.n);
    LocalTensor<T> l1a = a1.template Get<T>(), l1b = b1.template Get<T>();
    LocalTensor<T> l0a = a2.template Get<T>(), l0b = b2.template Get<T>();
    LocalTensor<float> l0c = co1.template Get<float>();

    // The last columns of a are filled up with zeros on the way, the last rows of both are not.
    DataCopy(l1a, left, Nd2NzParams(1, t.m, t.k, 0, t.k, m, 1, 0));
    DataCopy(l1b, right, Nd2NzParams(1, t.k, t.n, 0, t.n, k, 1, 0));
    InitConstValueParams<T> poison(k / kFractal, m - t.m, t.m, T(float(NAN)));
    if (m > t.m) InitConstValue(l1a[t.m * kFractal], poison);
    poison = InitConstValueParams<T>(t.n / kFractal, k - t.k, t.k, T(float(NAN)));
    if (k > t.k) InitConstValue(l1b[t.k * kFractal], poison);
    PipeBarrier<PIPE_ALL>();
    for (uint32_t i = 0; i < m / kFractal; ++i) {
      LoadData(l0a[i * k * kFractal], l1a,
               LoadData2DParams(i, k / kFractal, m / kFractal, 0, 0, false, 0));
    }
    for (uint32_t i = 0; i < k / kFractal; ++i) {
      LoadDataWithTranspose(l0b[i * t.n * kFractal], l1b,
                            LoadData2dTransposeParams(i, t.n / kFractal, k / kFractal, 0, 0));
    }
    PipeBarrier<PIPE_ALL>();
    Mmad(l0c, l0a, l0b, MmadParams(t.m, t.n, t.k, 0, false, true));
    PipeBarrier<PIPE_ALL>();
    // In two halves of the columns, as two matrices.
    FixpipeParamsV220 params(t.n / 2, t.m, m, t.n, false);
    params.quantPre = std::is_same<T, half>::value ? QuantMode_t::F322F16 : QuantMode_t::F322BF16;
    params.ndNum = 2;
    params.srcNdStride = m * (t.n / 2 / kFractal) / kFractal;
    params.dstNdStride = t.n / 2;
    Fixpipe(out, l0c, params);
  }

 private:
  TBuf<TPosition::A1> a1;
  TBuf<TPosition::B1> b1;
  TBuf<TPosition::A2> a2;
  TBuf<TPosition::B2> b2;
  TBuf<TPosition::CO1> co1;
};

template <typename T>
void RunProduct(GM_ADDR a, GM_ADDR b, GM_ADDR y, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  REGISTER_TILING_DEFAULT(ProductTiling);
  GET_TILING_DATA(data, tiling);
  Product<T>().Run(a, b, y, data);
}

extern "C" void cube_product_fp16(GM_ADDR a, GM_ADDR b, GM_ADDR y, GM_ADDR, GM_ADDR tiling) {
  RunProduct<half>(a, b, y, tiling);
}
extern "C" void cube_product_bf16(GM_ADDR a, GM_ADDR b, GM_ADDR y, GM_ADDR, GM_ADDR tiling) {
  RunProduct<bfloat16_t>(a, b, y, tiling);
}
ASCEND_EMULATOR_KERNEL(cube_product_fp16);
ASCEND_EMULATOR_KERNEL(cube_product_bf16);

const ascend_emulator::Binding binding([](pybind11::module_& m) {
  m.def("cube_product_tiling", [](uint32_t rows, uint32_t depth, uint32_t columns) {
    return ascend_emulator::as_bytes(ProductTiling{rows, depth, columns});
  });
});

}  // namespace
