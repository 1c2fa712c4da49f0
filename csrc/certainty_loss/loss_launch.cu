// Grids and instantiations of the loss's kernels.
#include <algorithm>

#include "certainty_loss/gradient_kernel.cuh"
#include "certainty_loss/loss_kernel.cuh"
#include "certainty_loss/loss_launch.h"
#include "confidence/pass_launch.h"
#include "lopa/cuda.h"

namespace lopa {
namespace certainty_loss {
namespace {

// Calls run.template operator()<element type, square>().
template <typename Run>
void with_kernel(FloatType dtype, bool square, const Run& run) {
  const auto of_type = [&]<typename T>() {
    if (square) {
      run.template operator()<T, true>();
    } else {
      run.template operator()<T, false>();
    }
  };
  switch (dtype) {
    case FloatType::kBFloat16:
      return of_type.template operator()<__nv_bfloat16>();
    case FloatType::kHalf:
      return of_type.template operator()<__half>();
    case FloatType::kFloat:
      return of_type.template operator()<float>();
  }
}

}  // namespace

void launch_loss(const LossArgs& args, cudaStream_t stream) {
  const confidence::VocabularyArgs& vocabulary = args.vocabulary;
  launch("order", order_kernel, dim3(1), dim3(kOneCtaThreads), 0, stream, true, args);
  if (vocabulary.capacity > 0) {
    with_kernel(vocabulary.logits.dtype, args.square, [&]<typename T, bool kSquare>() {
      confidence::launch_over_tiles<T, loss_pass_kernel<T, kSquare>>("loss_pass", vocabulary,
                                                                     stream, args);
    });
    constexpr int64_t kRowsPerCta = kRowThreads / 32;
    const int64_t wanted = (vocabulary.capacity + kRowsPerCta - 1) / kRowsPerCta;
    const int64_t ctas = std::min<int64_t>(wanted, int64_t{8} * multiprocessors());
    launch("merge_rows", merge_rows_kernel, dim3(static_cast<unsigned>(ctas)), dim3(kRowThreads), 0,
           stream, true, args);
  }
  launch("means", means_kernel, dim3(1), dim3(kOneCtaThreads), 0, stream, true, args);
}

void launch_gradient(const GradientArgs& args, cudaStream_t stream) {
  if (args.vocabulary.capacity == 0) return;
  with_kernel(args.vocabulary.logits.dtype, args.square, [&]<typename T, bool kSquare>() {
    confidence::launch_over_tiles<T, gradient_kernel<T, kSquare>>("gradient", args.vocabulary,
                                                                  stream, args);
  });
}

}  // namespace certainty_loss
}  // namespace lopa
