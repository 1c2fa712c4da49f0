// The working memory of a CTA: shared memory as far as it goes, global memory beyond, so that no
// window is too long. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lopa {
namespace branch {

// Columns are counted in 32 bits, with room to round up.
constexpr int64_t kMostColumns = int64_t{1} << 30;

// An array of a workspace: an offset from the CTA's shared memory, or from its share of a buffer.
struct Place {
  int64_t offset;
  bool shared;
};

// Laid out by the host, array by array; those that come first are the ones worth shared memory.
class Workspace {
 public:
  // What every architecture from sm_80 on gives a CTA, without a question to the device.
  static constexpr int64_t kSharedBytes = 96 * 1024;

  bool fits(int64_t bytes) const { return shared_ + aligned(bytes) <= kSharedBytes; }

  Place add(int64_t bytes) {
    int64_t& end = fits(bytes) ? shared_ : global_;
    const Place place{end, &end == &shared_};
    end += aligned(bytes);
    return place;
  }

  size_t shared_bytes() const { return static_cast<size_t>(shared_); }
  int64_t global_bytes() const { return global_; }  // of a CTA

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

  int64_t shared_ = 0, global_ = 0;
};

// What the selection in one window keeps (selection.cuh).
struct SelectPlaces {
  Place masks;      // five words for each 32 columns
  Place keys;       // a word a column
  Place lookahead;  // a column each
  Place heads;

  static SelectPlaces add_to(Workspace& workspace, int64_t window, int64_t lookahead) {
    const int64_t words = (window + 31) / 32;
    return {workspace.add(5 * words * 4), workspace.add(words * 32 * 4),
            workspace.add(lookahead * 4), workspace.add(64 * 4)};
  }
};

}  // namespace branch
}  // namespace lopa
