// lopa_step, branch_step and needed_rows on CUDA devices: memory, streams and registration.
#include <limits>

#include "confidence/confidence_cuda.h"
#include "confidence/confidence_launch.h"
#include "lopa/cuda_tensor.h"
#include "step/step_args.h"
#include "step/step_launch.h"

namespace lopa {
namespace {

// Pieces of one allocation, each 16-byte aligned; first their sizes, then their addresses.
class Pieces {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = size_;
    size_ += (bytes + 15) / 16 * 16;
    return offset;
  }

  void allocate(Device device) {
    memory_ = TensorHandle{empty_handle({size_}, ScalarType::Byte, device)};
    base_ = mutable_data<char>(memory_);
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  OwnedTensor memory_;
  char* base_ = nullptr;
  int64_t size_ = 0;
};

class Cuda : public CudaCall {
 public:
  using CudaCall::CudaCall;

  void run_from_stats(const char* op, const BatchView& view, const ColumnStats& stats,
                      const RoundConfig& config, const BatchOutput& output) const {
    check_sizes(op, view, config);
    if (view.B == 0) return;
    const step::RoundPlan plan = step::plan_round(view, config, false);
    Pieces memory;
    memory.add(view.B * plan.memory_of_sequence);
    if (plan.memory_of_sequence > 0) memory.allocate(device());
    step::RoundArgs args = round_args(view, config, output, plan);
    args.stats = stats;
    args.memory = memory.at<char>(0);
    step::launch_round(args, plan, stream());
  }

  void run_from_logits(const char* op, const BatchView& view, const VocabularyTensors& vocabulary,
                       const RoundConfig& config, const BatchOutput& output) const {
    check_sizes(op, view, config);
    const auto& [logits, rows, seed, step, sampled] = vocabulary;
    const auto& [metric, temperature, top_k, top_p] = sampled;
    const LogitsView logits_view = make_logits_view(op, logits, device());
    const Sampling sampling =
        check_sampling(op, metric, temperature, top_k, top_p, seed, step, device());
    const int64_t slots = view.B * view.K * view.W;
    confidence::VocabularyArgs pass = make_vocabulary_args(op, logits_view, sampling, false, slots);
    if (slots == 0) return;
    OptTensor map;
    if (rows.has_value()) {
      map = as_contiguous(*rows);
      pass.rows = data<int32_t>(*map);
    }

    const step::RoundPlan plan = step::plan_round(view, config, true);
    Pieces memory;
    const int64_t partials_at = memory.add(static_cast<int64_t>(partials_bytes(pass)));
    const int64_t list_at = memory.add(slots * sizeof(int32_t));
    const int64_t offsets_at = memory.add((view.B + 1) * sizeof(int32_t));
    const int64_t arrivals_at = memory.add(view.B * sizeof(int32_t));
    const int64_t token_at = memory.add(slots * sizeof(int64_t));
    const int64_t prob_at = memory.add(slots * sizeof(float));
    const int64_t score_at = memory.add(slots * sizeof(float));
    const int64_t flags_at = memory.add(slots);
    const int64_t rounds_at = memory.add(view.B * plan.memory_of_sequence);
    memory.allocate(device());

    step::RowsArgs list{};
    list.state = view;
    list.mask_id = config.select.mask_id;
    list.shift = config.shift;
    list.slots = memory.at<int32_t>(list_at);
    list.offsets = memory.at<int32_t>(offsets_at);
    list.arrivals = memory.at<int32_t>(arrivals_at);

    place_partials(pass, memory.at<char>(partials_at));
    pass.slots = list.slots;
    pass.count = list.offsets + view.B;

    step::FinishArgs finish{};
    finish.vocabulary = pass;
    finish.stats.token = memory.at<int64_t>(token_at);
    finish.stats.prob = memory.at<float>(prob_at);
    finish.stats.score = memory.at<float>(score_at);
    finish.stats.flags = memory.at<uint8_t>(flags_at);
    finish.round = round_args(view, config, output, plan);
    finish.round.stats = {finish.stats.token, finish.stats.prob, finish.stats.score};
    finish.round.flags = finish.stats.flags;
    finish.round.memory = memory.at<char>(rounds_at);
    finish.offsets = list.offsets;
    finish.arrivals = list.arrivals;

    step::launch_rows(list, stream());
    if (logits_view.rows > 0) confidence::launch_vocabulary_pass(pass, stream());
    step::launch_finish(finish, plan, stream());
  }

  void needed_rows(const char* op, const BatchView& view, int64_t mask_id, bool shift,
                   int64_t capacity, int64_t* index, int32_t* rows, int32_t* count) const {
    check_sizes(op, view);
    step::RowsArgs args{};
    args.state = view;
    args.mask_id = mask_id;
    args.shift = shift;
    args.index = index;
    args.rows = rows;
    args.count = count;
    args.capacity = capacity;
    step::launch_rows(args, stream());
  }

 private:
  static void check_at_most(const char* op, const char* argument, int64_t value, int64_t most) {
    if (value > most) fail(op, argument, "at most " + std::to_string(most), value);
  }

  // Slots are numbers of 32 bits, as are the rows that name them.
  static void check_sizes(const char* op, const BatchView& view) {
    check_at_most(op, "columns of tokens", view.W, branch::kMostColumns);
    check_at_most(op, "branches of tokens", view.K, step::kMostBranches);
    check_at_most(op, "elements of tokens", view.B * view.K * view.W,
                  std::numeric_limits<int32_t>::max());
  }

  static void check_sizes(const char* op, const BatchView& view, const RoundConfig& config) {
    check_sizes(op, view);
    check_at_most(op, "out_window", config.window, branch::kMostColumns);
    check_at_most(op, "out_branches", config.branches, std::numeric_limits<int32_t>::max());
  }

  static step::RoundArgs round_args(const BatchView& view, const RoundConfig& config,
                                    const BatchOutput& output, const step::RoundPlan& plan) {
    step::RoundArgs args{};
    args.state = view;
    args.output = output;
    args.config = config;
    args.places = plan.places;
    args.staged = plan.staged;
    args.memory_of_sequence = plan.memory_of_sequence;
    return args;
  }
};

using Operators = StepOperators<Cuda>;

}  // namespace
}  // namespace lopa

STABLE_TORCH_LIBRARY_IMPL(lopa, CUDA, m) {
  m.impl("lopa_step", TORCH_BOX(&lopa::Operators::lopa_step));
  m.impl("lopa_step_out", TORCH_BOX(&lopa::Operators::lopa_step_out));
  m.impl("lopa_step_", TORCH_BOX(&lopa::Operators::lopa_step_in_place));
  m.impl("branch_step", TORCH_BOX(&lopa::Operators::branch_step));
  m.impl("branch_step_out", TORCH_BOX(&lopa::Operators::branch_step_out));
  m.impl("branch_step_", TORCH_BOX(&lopa::Operators::branch_step_in_place));
  m.impl("needed_rows", TORCH_BOX(&lopa::Operators::needed_rows));
}

STABLE_TORCH_LIBRARY_IMPL(lopa_eager, CUDA, m) {
  m.impl("lopa_step", TORCH_BOX(&lopa::Operators::lopa_step_eager));
  m.impl("lopa_step_out", TORCH_BOX(&lopa::Operators::lopa_step_out_eager));
  m.impl("lopa_step_", TORCH_BOX(&lopa::Operators::lopa_step_in_place_eager));
  m.impl("branch_step", TORCH_BOX(&lopa::Operators::branch_step_eager));
  m.impl("branch_step_out", TORCH_BOX(&lopa::Operators::branch_step_out_eager));
  m.impl("branch_step_", TORCH_BOX(&lopa::Operators::branch_step_in_place_eager));
}
