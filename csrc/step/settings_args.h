// The settings of a round as they arrive through torch.ops: one by one, or as one text.
#pragma once

#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "lopa/checks.h"
#include "lopa/tensor.h"

namespace lopa {

// The fields of LopaConfig.step_args, not yet checked.
struct RoundSettings {
  std::optional<int64_t> branches, window;  // of the next state; nullopt: as they come in
  double tau_conf, tau_add, tau_act;
  int64_t block_size, max_new_tokens, mask_id, eos_id;
  std::string accept, fallback, reduction;
  double fraction;
  std::optional<int64_t> group;
  double alpha;
  bool shift, force_anchor;
};

// Those of LopaConfig.sampling_args.
struct SamplingSettings {
  std::string metric;
  double temperature;
  std::optional<int64_t> top_k;
  std::optional<double> top_p;
};

struct StepSettings {
  RoundSettings round;
  SamplingSettings sampling;
};

// Reads the words of a text one after another: numbers, names, True, False and None, as Python
// writes them.
class Words {
 public:
  Words(const char* op, std::string_view text) : op_(op), rest_(text) {}

  template <typename T>
  void read(T& value) {
    const std::string_view word = next();
    if constexpr (std::is_same_v<T, std::string>) {
      value = word;
    } else if constexpr (std::is_same_v<T, bool>) {
      value = word == "True";
      if (!value && word != "False") fail(op_, "settings", "True or False", word);
    } else {
      const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
      if (error != std::errc() || end != word.data() + word.size()) {
        fail(op_, "settings", "a number", word);
      }
    }
  }

  template <typename T>
  void read(std::optional<T>& value) {
    value.reset();
    if (rest_.substr(0, rest_.find(' ')) == "None") {
      next();
    } else {
      read(value.emplace());
    }
  }

  void end() const {
    if (!rest_.empty()) fail(op_, "settings", "no further words", rest_);
  }

 private:
  std::string_view next() {
    const size_t length = rest_.find(' ');
    const std::string_view word = rest_.substr(0, length);
    if (word.empty()) fail(op_, "settings", "another word", "the end");
    rest_.remove_prefix(length == std::string_view::npos ? rest_.size() : length + 1);
    return word;
  }

  const char* op_;
  std::string_view rest_;
};

inline StepSettings parse_settings(const char* op, std::string_view text) {
  StepSettings settings{};
  auto& [round, sampling] = settings;
  Words words(op, text);
  words.read(round.branches);
  words.read(round.window);
  words.read(round.tau_conf);
  words.read(round.tau_add);
  words.read(round.tau_act);
  words.read(round.block_size);
  words.read(round.max_new_tokens);
  words.read(round.mask_id);
  words.read(round.eos_id);
  words.read(round.accept);
  words.read(round.fallback);
  words.read(round.reduction);
  words.read(round.fraction);
  words.read(round.group);
  words.read(round.alpha);
  words.read(round.shift);
  words.read(round.force_anchor);
  words.read(sampling.metric);
  words.read(sampling.temperature);
  words.read(sampling.top_k);
  words.read(sampling.top_p);
  words.end();
  return settings;
}

// The settings that a text holds. A decode gives the same text round after round, so the last one
// is remembered; the reference holds until the next call in this thread.
inline const StepSettings& settings_of(const char* op, TextHandle given) {
  thread_local std::string known;
  thread_local StepSettings settings;
  const OwnedText text(given);
  if (text.view() != known) {
    known.clear();
    settings = parse_settings(op, text.view());
    known = text.view();
  }
  return settings;
}

}  // namespace lopa
