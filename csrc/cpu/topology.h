// Where this machine's CPUs and memory lie, as sysfs tells.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kt {

// A physical core: its usable CPUs (more than one where it runs several hardware threads) and where it sits.
struct Core {
  int node = 0;  // the nearest NUMA node that has memory
  int package = 0;
  std::vector<int> cpus;
};

// A NUMA node that has memory.
struct MemoryNode {
  int number = 0;
  int64_t bytes = 0;
};

struct Topology {
  std::vector<Core> cores;  // by node, then by their first CPU
  std::vector<MemoryNode> nodes;
};

// The cores that hold the CPUs in `usable` and are online. `system` is /sys, or a made-up tree in tests. What the tree
// does not say is taken to be one node (without a known size) and one core per CPU.
Topology ReadTopology(const std::string& system, const std::vector<int>& usable);

// The numbers of a kernel list such as "0-3,8,10-11"; what is no such list ends it.
std::vector<int> ParseList(const std::string& text);

}  // namespace kt
