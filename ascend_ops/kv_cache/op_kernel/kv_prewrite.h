// Pre-Write: a layer's new keys and values go to the branches' windows, and in the single-phase
// protocol those of branch 0 to the cache too; RMSNorm and rotary embedding of queries and keys on
// the way.
//
// A piece of work is some columns of one branch. Queries, keys and values of it are streams, which
// go through unified buffer as tiles of [columns, heads, head_dim].
#pragma once

#include "head_norm.h"
#include "kernel_operator.h"
#include "kv_cache_common.h"
#include "rotary.h"

namespace lopa {

// The operands of all forms; null where a form has none.
struct KvPrewriteOperands {
  GM_ADDR q;  // [slots, window, q_heads, head_dim], written
  GM_ADDR kWindow;
  GM_ADDR vWindow;
  GM_ADDR kCache;
  GM_ADDR vCache;
  GM_ADDR qkv;  // packed, or else k and v
  GM_ADDR k;
  GM_ADDR v;
  GM_ADDR cosSin;
  GM_ADDR cacheLen;
  GM_ADDR commitLen;
  GM_ADDR status;
  GM_ADDR qNorm;
  GM_ADDR kNorm;
};

template <typename T, bool kPacked, bool kDirect>
class KvPrewrite {
 public:
  __aicore__ inline KvPrewrite() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe, const KvPrewriteTiling& tiling,
                              const KvPrewriteOperands& operands) {
    t_ = tiling;
    words_.Init(pipe);
    if (t_.hasCacheLen != 0) words_.Bind(kCacheLen, operands.cacheLen, t_.batch);
    if (kDirect) {
      words_.Bind(kCommitLen, operands.commitLen, t_.batch);
      words_.Bind(kStatus, operands.status, t_.batch);
    }
    BindRows(operands);
    const uint32_t tile = t_.tileColumns * t_.tileHeads * t_.headDim;
    pipe->InitBuffer(copies_, kBuffers, tile * sizeof(T));
    pipe->InitBuffer(arriving_, kBuffers, tile * sizeof(T));
    pipe->InitBuffer(leaving_, kBuffers, tile * sizeof(T));
    if (t_.rotates == 0) return;
    cosSin_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(operands.cosSin),
                            static_cast<uint64_t>(t_.positions) * t_.headDim);
    pipe->InitBuffer(angles_, kBuffers, t_.tileColumns * t_.headDim * sizeof(float));
    pipe->InitBuffer(product_, tile / 2 * sizeof(float));
    if constexpr (sizeof(T) < sizeof(float)) {
      pipe->InitBuffer(wide_, tile * sizeof(float));
      pipe->InitBuffer(turned_, tile * sizeof(float));
    }
    if constexpr (kPacked) {
      if (t_.normalises == 0) return;
      norm_.Init(pipe, t_);
      LoadWeight(HeadNorm::kQueries, operands.qNorm);
      LoadWeight(HeadNorm::kKeys, operands.kNorm);
    }
  }

  __aicore__ inline void Process() {
    const uint32_t cores = AscendC::GetBlockNum();
    const uint32_t core = AscendC::GetBlockIdx();
    const uint64_t perSlot = (t_.window + t_.tileColumns - 1) / t_.tileColumns;
    const uint64_t pieces = static_cast<uint64_t>(t_.batch) * t_.branches * perSlot;
    const uint64_t each = pieces / cores;
    const uint64_t more = pieces % cores;
    const uint64_t begin = core * each + (core < more ? core : more);
    const uint64_t end = begin + each + (core < more ? 1 : 0);
    uint32_t known = t_.batch;  // the sequence whose lengths are in place
    for (uint64_t piece = begin; piece < end; ++piece) {
      const uint64_t slot = piece / perSlot;
      const uint32_t b = static_cast<uint32_t>(slot / t_.branches);
      if (b != known) ReadLengths(b);
      known = b;
      const uint32_t column = static_cast<uint32_t>(piece - slot * perSlot) * t_.tileColumns;
      Piece(slot, b, slot % t_.branches == 0, column);
    }
    if (kDirect && core == 0) Report();
  }

 private:
  enum Operand : uint32_t { kCacheLen, kCommitLen, kStatus, kOperands };
  static constexpr int32_t kBuffers = 2;
  static constexpr uint32_t kBlockElements = 32 / sizeof(T);

  // Rows of `heads` heads, and where they go. Pitches and offsets count elements.
  struct Stream {
    AscendC::GlobalTensor<T> from;
    AscendC::GlobalTensor<T> to;
    AscendC::GlobalTensor<T> cache;
    uint64_t fromPitch;  // of columns
    uint64_t toOffset;   // of the layer
    uint32_t heads;
    HeadNorm::Weight weight;
    bool rotates;
    bool cached;
  };

  __aicore__ inline void BindRows(const KvPrewriteOperands& o) {
    const uint64_t columns = static_cast<uint64_t>(t_.batch) * t_.branches * t_.window;
    const uint64_t row = static_cast<uint64_t>(t_.kvHeads) * t_.headDim;
    const uint64_t queries = static_cast<uint64_t>(t_.qHeads) * t_.headDim;
    const uint64_t packed = queries + 2 * row;
    if constexpr (kPacked) {
      BindFrom(q_, o.qkv, 0, columns, packed, t_.qHeads);
      BindFrom(k_, o.qkv, queries, columns, packed, t_.kvHeads);
      BindFrom(v_, o.qkv, queries + row, columns, packed, t_.kvHeads);
      q_.to.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o.q), columns * queries);
      q_.toOffset = 0;
    } else {
      BindFrom(k_, o.k, 0, columns, row, t_.kvHeads);
      BindFrom(v_, o.v, 0, columns, row, t_.kvHeads);
    }
    // The layers after this one are not this launch's.
    const uint64_t layers = static_cast<uint64_t>(t_.layer) + 1;
    k_.to.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o.kWindow), layers * columns * row);
    v_.to.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o.vWindow), layers * columns * row);
    k_.toOffset = v_.toOffset = t_.layer * columns * row;
    q_.rotates = k_.rotates = t_.rotates != 0;
    v_.rotates = false;
    q_.weight = HeadNorm::kQueries;
    k_.weight = HeadNorm::kKeys;
    q_.cached = false;
    k_.cached = v_.cached = kDirect;
    if constexpr (kDirect) {
      const uint64_t cache = layers * t_.batch * t_.capacity * row;
      k_.cache.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o.kCache), cache);
      v_.cache.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o.vCache), cache);
    }
  }

  __aicore__ inline void BindFrom(Stream& stream, GM_ADDR data, uint64_t offset, uint64_t columns,
                                  uint64_t pitch, uint32_t heads) {
    stream.from.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(data) + offset,
                                columns == 0 ? 0 : columns * pitch - offset);
    stream.fromPitch = pitch;
    stream.heads = heads;
  }

  __aicore__ inline void LoadWeight(HeadNorm::Weight which, GM_ADDR data) {
    AscendC::GlobalTensor<T> from;
    from.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(data), t_.headDim);
    AscendC::LocalTensor<T> weight = arriving_.template AllocTensor<T>();
    AscendC::DataCopy(weight, from, t_.headDim);
    arriving_.EnQue(weight);
    weight = arriving_.template DeQue<T>();
    norm_.Set(which, weight);
    arriving_.FreeTensor(weight);
  }

  __aicore__ inline int32_t Fault(int32_t cacheLen, int32_t commitLen) {
    if (cacheLen < 0 || commitLen < 0 || static_cast<uint32_t>(commitLen) > t_.window) {
      return kBadState;
    }
    const int64_t end = static_cast<int64_t>(cacheLen) + t_.window;
    if (t_.rotates != 0 && end > static_cast<int64_t>(t_.positions)) return kBadState;
    return kDirect ? CommitFault(cacheLen, commitLen, t_.window, t_.capacity) : 0;
  }

  __aicore__ inline void ReadLengths(uint32_t b) {
    cacheLen_ = 0;
    int32_t commitLen = 0;
    if (t_.hasCacheLen != 0) {
      words_.Load(kCacheLen, b, 1);
      if (kDirect) words_.Load(kCommitLen, b, 1);
      words_.Ready();
      cacheLen_ = words_.Get(kCacheLen, 0);
      if (kDirect) commitLen = words_.Get(kCommitLen, 0);
      words_.Release();
    }
    fault_ = Fault(cacheLen_, commitLen);
    cached_ = fault_ == 0 ? static_cast<uint32_t>(commitLen) : 0;
  }

  // Columns [column, column + tileColumns) of a slot, which is branch 0 of sequence b if `first`.
  __aicore__ inline void Piece(uint64_t slot, uint32_t b, bool first, uint32_t column) {
    const uint32_t left = t_.window - column;
    const uint32_t columns = left < t_.tileColumns ? left : t_.tileColumns;
    const uint64_t row = slot * t_.window + column;
    if (fault_ == kBadState) {
      if constexpr (kPacked) ClearQueries(row, columns);
      return;
    }
    AscendC::LocalTensor<float> angles;
    if (t_.rotates != 0) {
      angles = angles_.template AllocTensor<float>();
      const uint64_t position = static_cast<uint64_t>(cacheLen_) + column;
      AscendC::DataCopy(angles, cosSin_[position * t_.headDim], columns * t_.headDim);
      angles_.EnQue(angles);
      angles = angles_.template DeQue<float>();
    }
    const uint32_t cached = first && cached_ > column ? cached_ - column : 0;
    const uint64_t position = static_cast<uint64_t>(t_.layer) * t_.batch + b;
    const uint64_t cacheRow = position * t_.capacity + static_cast<uint32_t>(cacheLen_) + column;
    if constexpr (kPacked) Move(q_, row, columns, 0, 0, angles);
    Move(k_, row, columns, cacheRow, cached, angles);
    Move(v_, row, columns, cacheRow, cached, angles);
    if (t_.rotates != 0) angles_.FreeTensor(angles);
  }

  // `columns` columns of a stream from `row`; the first `cached` of them also to the cache.
  __aicore__ inline void Move(Stream& stream, uint64_t row, uint32_t columns, uint64_t cacheRow,
                              uint32_t cached, AscendC::LocalTensor<float>& angles) {
    const uint32_t width = stream.heads * t_.headDim;
    if (cached > columns) cached = columns;
    for (uint32_t head = 0; head < stream.heads; head += t_.tileHeads) {
      const uint32_t left = stream.heads - head;
      const uint32_t heads = left < t_.tileHeads ? left : t_.tileHeads;
      const uint32_t offset = head * t_.headDim;
      const uint32_t part = heads * t_.headDim;
      AscendC::GlobalTensor<T> from = stream.from[row * stream.fromPitch + offset];
      AscendC::GlobalTensor<T> to = stream.to[stream.toOffset + row * width + offset];
      AscendC::LocalTensor<T> tile;
      if (stream.rotates) {
        Load(arriving_, from, columns, part, stream.fromPitch);
        Rotate(columns, heads, angles, stream.weight);
        tile = leaving_.template DeQue<T>();
      } else {
        Load(copies_, from, columns, part, stream.fromPitch);
        tile = copies_.template DeQue<T>();
      }
      Store(to, tile, columns, part, width);
      if (stream.cached && cached > 0) {
        AscendC::GlobalTensor<T> cache = stream.cache[cacheRow * width + offset];
        Store(cache, tile, cached, part, width);
      }
      if (stream.rotates) {
        leaving_.FreeTensor(tile);
      } else {
        copies_.FreeTensor(tile);
      }
    }
  }

  // `columns` runs of `part` elements, `pitch` apart, into a tile without gaps.
  template <typename Queue>
  __aicore__ inline void Load(Queue& queue, AscendC::GlobalTensor<T>& from, uint32_t columns,
                              uint32_t part, uint64_t pitch) {
    AscendC::LocalTensor<T> tile = queue.template AllocTensor<T>();
    AscendC::DataCopyParams shape(static_cast<uint16_t>(columns),
                                  static_cast<uint16_t>(part / kBlockElements),
                                  static_cast<uint16_t>((pitch - part) / kBlockElements), 0);
    AscendC::DataCopy(tile, from, shape);
    queue.EnQue(tile);
  }

  __aicore__ inline void Store(AscendC::GlobalTensor<T>& to, AscendC::LocalTensor<T>& tile,
                               uint32_t columns, uint32_t part, uint64_t pitch) {
    AscendC::DataCopyParams shape(static_cast<uint16_t>(columns),
                                  static_cast<uint16_t>(part / kBlockElements), 0,
                                  static_cast<uint16_t>((pitch - part) / kBlockElements));
    AscendC::DataCopy(to, tile, shape);
  }

  // The tile that arrived leaves normalised, where there are norms, and rotated.
  __aicore__ inline void Rotate(uint32_t columns, uint32_t heads,
                                AscendC::LocalTensor<float>& angles, HeadNorm::Weight weight) {
    AscendC::LocalTensor<T> in = arriving_.template DeQue<T>();
    AscendC::LocalTensor<T> out = leaving_.template AllocTensor<T>();
    AscendC::LocalTensor<float> product = product_.template Get<float>();
    if constexpr (sizeof(T) < sizeof(float)) {
      const uint32_t count = columns * heads * t_.headDim;
      AscendC::LocalTensor<float> x = wide_.template Get<float>();
      AscendC::LocalTensor<float> y = turned_.template Get<float>();
      AscendC::Cast(x, in, AscendC::RoundMode::CAST_NONE, count);
      AscendC::PipeBarrier<PIPE_V>();
      Normalise(x, y, columns * heads, weight);
      RotateHalves(y, x, angles, product, columns, heads, t_.headDim);
      AscendC::Cast(out, y, AscendC::RoundMode::CAST_RINT, count);
      AscendC::PipeBarrier<PIPE_V>();
    } else {
      Normalise(in, out, columns * heads, weight);
      RotateHalves(out, in, angles, product, columns, heads, t_.headDim);
    }
    arriving_.FreeTensor(in);
    leaving_.EnQue(out);
  }

  __aicore__ inline void Normalise(AscendC::LocalTensor<float>& x,
                                   AscendC::LocalTensor<float>& scratch, uint32_t heads,
                                   HeadNorm::Weight weight) {
    if constexpr (kPacked) {
      if (t_.normalises != 0) norm_.Apply(x, scratch, heads, weight);
    }
  }

  // The queries of a sequence that is dropped are 0.
  __aicore__ inline void ClearQueries(uint64_t row, uint32_t columns) {
    const uint32_t width = t_.qHeads * t_.headDim;
    for (uint32_t head = 0; head < t_.qHeads; head += t_.tileHeads) {
      const uint32_t left = t_.qHeads - head;
      const uint32_t part = (left < t_.tileHeads ? left : t_.tileHeads) * t_.headDim;
      AscendC::LocalTensor<T> zeros = leaving_.template AllocTensor<T>();
      AscendC::LocalTensor<float> words = zeros.template ReinterpretCast<float>();
      AscendC::Duplicate(words, 0.0f,
                         static_cast<int32_t>(columns * part * sizeof(T) / sizeof(float)));
      leaving_.EnQue(zeros);
      zeros = leaving_.template DeQue<T>();
      AscendC::GlobalTensor<T> to = q_.to[row * width + head * t_.headDim];
      Store(to, zeros, columns, part, width);
      leaving_.FreeTensor(zeros);
    }
  }

  __aicore__ inline void Report() {
    for (uint32_t first = 0; first < t_.batch; first += kChunkSequences) {
      const uint32_t left = t_.batch - first;
      const uint32_t count = left < kChunkSequences ? left : kChunkSequences;
      words_.Load(kCacheLen, first, count);
      words_.Load(kCommitLen, first, count);
      words_.Load(kStatus, first, count);
      words_.Ready();
      bool any = false;
      for (uint32_t i = 0; i < count; ++i) {
        const int32_t fault = Fault(words_.Get(kCacheLen, i), words_.Get(kCommitLen, i));
        if (fault == 0) continue;
        any = true;
        words_.Or(kStatus, i, fault);
      }
      if (any) words_.Store(kStatus, first, count);
      words_.Release();
    }
  }

  KvPrewriteTiling t_;
  SequenceWords<kOperands> words_;
  Stream q_;
  Stream k_;
  Stream v_;
  AscendC::GlobalTensor<float> cosSin_;
  AscendC::TQueBind<AscendC::TPosition::VECIN, AscendC::TPosition::VECOUT, 1> copies_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> arriving_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> leaving_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> angles_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> product_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> wide_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> turned_;
  HeadNorm norm_;
  // Of the sequence at hand.
  int32_t cacheLen_;
  int32_t fault_;
  uint32_t cached_;  // columns that go to the cache
};

}  // namespace lopa
