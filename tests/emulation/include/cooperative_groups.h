// What the project's kernels use of cooperative groups.
#pragma once
#include "../machine.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return emulation::cluster_blocks(); }
  unsigned block_rank() const { return emulation::block_rank(); }
  void sync() const {
    emulation::arrive_at_cluster();
    emulation::wait_for_cluster();
  }
  template <typename T>
  T* map_shared_rank(T* mine, unsigned rank) const {
    return static_cast<T*>(emulation::map_to_rank(mine, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
