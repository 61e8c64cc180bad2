// The hand-off between the blocks of one launch: the last block to arrive continues with what all have stored.
#pragma once
#include "common/ptx.cuh"

// Returns true in the last of `count` blocks that call this with the same counter. That block then sees all
// stores that the other blocks made before their calls; it must read them past L1 (ld_cg). All threads of a
// block call it. Resets the counter.
//
// PTX memory model: the first barrier orders the stores of all threads of the block before thread 0's
// release, and causality order is transitive, so the release covers them without a fence in each thread. The
// additions of all blocks form one release sequence, so the last one acquires from each earlier one, and the
// second barrier orders it before the loads of the other threads.
DEVICE bool is_last_block(u32 count, u32* counter) {  // [1], zero before and after
  __shared__ u32 before;
  __syncthreads();
  if (threadIdx.x == 0) before = atomic_add_acq_rel(counter, 1);
  __syncthreads();
  if (before + 1 != count) return false;
  if (threadIdx.x == 0) *counter = 0;
  return true;
}
