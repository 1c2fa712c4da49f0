// What a run did, counted by engine.
#pragma once

#include <cstdint>

namespace ascend_emulator {

struct Counters {
  uint64_t gm_to_local = 0;  // bytes, MTE2
  uint64_t local_to_gm = 0;  // bytes, MTE3 and FIX
  uint64_t local_to_local = 0;
  uint64_t gm_scalar = 0;       // bytes that the scalar unit read from GM
  uint64_t copies = 0;          // DMA instructions
  uint64_t vector_repeats = 0;  // 256 bytes each
  uint64_t vector_instructions = 0;
  uint64_t scalar_accesses = 0;  // GetValue and SetValue
  uint64_t cube_macs = 0;        // multiply-accumulates, padding included
  uint64_t cube_instructions = 0;
  uint64_t flags = 0;  // SetFlag, queues included
  uint64_t barriers = 0;
  uint64_t cross_core = 0;  // CrossCoreSetFlag
  uint64_t sync_all = 0;
  uint64_t peak_ub = 0;  // bytes that TPipe gave out
  uint64_t peak_l1 = 0;

  void add(const Counters& other) {
    gm_to_local += other.gm_to_local;
    local_to_gm += other.local_to_gm;
    local_to_local += other.local_to_local;
    gm_scalar += other.gm_scalar;
    copies += other.copies;
    vector_repeats += other.vector_repeats;
    vector_instructions += other.vector_instructions;
    scalar_accesses += other.scalar_accesses;
    cube_macs += other.cube_macs;
    cube_instructions += other.cube_instructions;
    flags += other.flags;
    barriers += other.barriers;
    cross_core += other.cross_core;
    sync_all += other.sync_all;
    if (other.peak_ub > peak_ub) peak_ub = other.peak_ub;
    if (other.peak_l1 > peak_l1) peak_l1 = other.peak_l1;
  }
};

}  // namespace ascend_emulator
