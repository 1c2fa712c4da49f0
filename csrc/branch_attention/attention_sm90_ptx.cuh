// The instructions of sm_90a that branch attention is made of: barriers, the copy engine, the
// tensor cores. Layouts are those of the PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "lopa/float_types.h"

namespace lopa {
namespace attention {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  return dynamic;
}

// 16 bytes from global to shared memory, of which the first `exist` are read and the others are 0;
// they are there after copies_wait.
__device__ __forceinline__ void copy_piece(uint32_t to, const char* from, int exist) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exist)
               : "memory");
}

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void load_shared(uint32_t address, float (&x)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_word(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers between shared memory and a warp's registers: lane i gives
// the address of row i % 8 of matrix i / 8, and has of each the numbers 2 (i % 4) and the next of
// row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t* x) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The same number, of which the compiler knows nothing: what follows from it is formed anew, rather
// than kept in registers over a loop.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Barriers in shared memory. A new one is in phase 0: a wait for parity 1 passes.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_inits_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether the phase is over, without waiting.
__device__ __forceinline__ bool barrier_done(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Named barriers of some of a CTA's warps; 0 is __syncthreads.

__device__ __forceinline__ void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Makes this thread's ordinary stores to shared memory visible to the tensor cores and the copy
// engine, once a barrier follows.
__device__ __forceinline__ void publish_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The copy engine: a box of a tensor, by one thread.

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         int x0, int x1, int x2, int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}

// Registers of a warpgroup's threads.

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The cluster.

// By all threads of all CTAs, each of them once.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place of another CTA's shared memory that `address` is of one's own.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// 16 bytes to another CTA; its barrier counts them when they are there.
__device__ __forceinline__ void store_remote(uint32_t address, uint32_t barrier, float x, float y,
                                             float z, float w) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(address),
      "r"(barrier), "f"(x), "f"(y), "f"(z), "f"(w)
      : "memory");
}

__device__ __forceinline__ void require(bool holds) {
  if (!holds) __trap();
}

// A number that all lanes have, in a register of the warp.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(~0u, x); }

// Arithmetic.

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Of bf16 or fp16 bits: neither infinite nor NaN?
template <typename T>
struct Bits;

template <>
struct Bits<BFloat16> {
  static constexpr uint32_t kExponent = 0x7f80;
  static __device__ __forceinline__ float value(uint32_t bits) {
    return __uint_as_float(bits << 16);
  }
};

template <>
struct Bits<Half> {
  static constexpr uint32_t kExponent = 0x7c00;
  static __device__ __forceinline__ float value(uint32_t bits) {
    float x;
    asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(x) : "r"(bits));
    return x;
  }
};

template <typename T>
__device__ __forceinline__ bool finite(uint32_t bits) {
  return (bits & Bits<T>::kExponent) != Bits<T>::kExponent;
}

// Whether any of many numbers, two a word, is not finite: exponents of ones alone overflow into the
// place of the sign when the lowest bit of an exponent is added.
template <typename T>
struct Strange {
  uint32_t bits = 0;

  __device__ __forceinline__ void add(uint32_t word) {
    constexpr uint32_t kExponents = Bits<T>::kExponent * 0x10001u;
    constexpr uint32_t kLowest = (0x8000u - Bits<T>::kExponent) * 0x10001u;
    bits |= (word & kExponents) + kLowest;
  }
  __device__ __forceinline__ bool any() const { return (bits & 0x80008000u) != 0; }
};

template <typename T>
__device__ __forceinline__ bool both_finite(uint32_t word) {
  return finite<T>(word) && finite<T>(word >> 16);
}

// The tensor cores.

// Operands lie in shared memory as rows of 64 numbers (128 bytes), 16-byte pieces exchanged by the
// 128-byte swizzle: piece p of row r is at place p ^ (r % 8). Tiles begin at multiples of 1024
// bytes. A descriptor: bits 0-13 address / 16; 16-29 leading and 32-45 stride byte offset, / 16;
// 62-63 the swizzle, 1 for 128 bytes.
//  * rows are M or N, the 64 numbers lie along K ("K-major"): the stride offset leads from 8 rows
//  to
//    the next 8, 1024 bytes; the leading offset does not count. 16 further K are 32 bytes.
//  * rows are K, the 64 numbers lie along N ("MN-major", transposed): the stride offset leads from
//  8
//    rows to the next 8, 1024 bytes; the leading offset from 64 columns to the next 64. 16 further
//    K are 16 rows, 2048 bytes.
// The upper half is the same for all, and the lower half alone is kept and advanced.
__device__ __forceinline__ uint32_t descriptor(uint32_t address, uint32_t leading_bytes) {
  return (address & 0x3ffff) >> 4 | (leading_bytes >> 4) << 16;
}

__device__ __forceinline__ uint32_t advance(uint32_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Stride 1024 bytes, swizzle of 128 bytes.
#define LOPA_DESCRIPTOR_HIGH "0x40000040"

// Before the first wgmma after other instructions wrote its registers.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `kPending` of the committed groups run.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what touches these registers across.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define LOPA_OUT4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define LOPA_OUT16(x, i) \
  LOPA_OUT4(x, i), LOPA_OUT4(x, i + 4), LOPA_OUT4(x, i + 8), LOPA_OUT4(x, i + 12)
#define LOPA_OUT32(x) LOPA_OUT16(x, 0), LOPA_OUT16(x, 16)
#define LOPA_OUT64(x) LOPA_OUT32(x), LOPA_OUT16(x, 32), LOPA_OUT16(x, 48)
#define LOPA_NAMES32                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOPA_NAMES64                                                                        \
  LOPA_NAMES32                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// 64 x N (+)= 64 x 16 times 16 x N, fp32. Thread t of the warpgroup has of the result rows
// 16 (t / 32) + t % 32 / 4 (x[4 j], x[4 j + 1]) and 8 below (x[4 j + 2], x[4 j + 3]), columns
// 8 j + 2 (t % 4) and the next. As the left operand in registers, k = 16 i + ..., the same numbers
// packed in pairs are {x[8 i], x[8 i + 1]}, {x[8 i + 2], x[8 i + 3]}, {x[8 i + 4], ...}, {...}.
//
// `scores`: both operands K-major in shared memory, or the left one in registers; overwrites where
// kFirst.
// `values`: the left operand in registers, the right MN-major; always adds.
#define LOPA_WGMMA(T, TYPE, N, COUNT, A, B, C, D, E, F)                                            \
  template <bool kFirst>                                                                           \
  __device__ __forceinline__ void scores(T, float (&x)[COUNT], uint32_t a, uint32_t b) {           \
    asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, " C ", 0;\nmov.b64 a, {" A \
                 ", " LOPA_DESCRIPTOR_HIGH "};\nmov.b64 b, {" B ", " LOPA_DESCRIPTOR_HIGH          \
                 "};\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                 " " LOPA_NAMES##COUNT "}, a, b, add, 1, 1, 0, 0;\n}\n"                            \
                 : LOPA_OUT##COUNT(x)                                                              \
                 : "r"(a), "r"(b), "n"(kFirst ? 0 : 1));                                           \
  }                                                                                                \
  template <bool kFirst>                                                                           \
  __device__ __forceinline__ void scores(T, float (&x)[COUNT], const uint32_t* a, uint32_t b) {    \
    asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, " F ", 0;\nmov.b64 b, {" E    \
                 ", " LOPA_DESCRIPTOR_HIGH "};\nwgmma.mma_async.sync.aligned.m64n" #N              \
                 "k16.f32." TYPE "." TYPE " " LOPA_NAMES##COUNT "}, {" A ", " B ", " C ", " D      \
                                                                "}, b, add, 1, 1, 0;\n}\n"         \
                 : LOPA_OUT##COUNT(x)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kFirst ? 0 : 1));       \
  }                                                                                                \
  __device__ __forceinline__ void values(T, float (&x)[COUNT], const uint32_t* a, uint32_t b) {    \
    asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, 1, 0;\nmov.b64 b, {" E        \
                 ", " LOPA_DESCRIPTOR_HIGH "};\nwgmma.mma_async.sync.aligned.m64n" #N              \
                 "k16.f32." TYPE "." TYPE " " LOPA_NAMES##COUNT "}, {" A ", " B ", " C ", " D      \
                                                                "}, b, add, 1, 1, 1;\n}\n"         \
                 : LOPA_OUT##COUNT(x)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                            \
  }

LOPA_WGMMA(BFloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
LOPA_WGMMA(BFloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
LOPA_WGMMA(Half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
LOPA_WGMMA(Half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")

#undef LOPA_WGMMA
#undef LOPA_DESCRIPTOR_HIGH
#undef LOPA_NAMES64
#undef LOPA_NAMES32
#undef LOPA_OUT64
#undef LOPA_OUT32
#undef LOPA_OUT16
#undef LOPA_OUT4

}  // namespace attention
}  // namespace lopa
