#include "cpu/topology.h"

#include <algorithm>
#include <climits>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

namespace kt {
namespace {

// The whole file, empty where it cannot be read.
std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

int ReadNumber(const std::string& path, int otherwise) {
  std::istringstream text(ReadText(path));
  int number = otherwise;
  return text >> number ? number : otherwise;
}

// From "Node 0 MemTotal:  24578236 kB".
int64_t MemoryBytes(const std::string& node) {
  std::istringstream text(ReadText(node + "/meminfo"));
  for (std::string word; text >> word;) {
    int64_t kibibytes = 0;
    if (word == "MemTotal:" && text >> kibibytes) return kibibytes * 1024;
  }
  return 0;
}

// The node nearest to `node` among those with memory; `distance` has one number per online node, in their order.
int NearestMemory(const std::string& distance, const std::vector<int>& online, const std::vector<MemoryNode>& nodes) {
  std::istringstream text(distance);
  int nearest = nodes.front().number, least = INT_MAX;
  for (const int other : online) {
    int away = 0;
    if (!(text >> away)) break;
    const bool has_memory =
        std::any_of(nodes.begin(), nodes.end(), [other](const MemoryNode& n) { return n.number == other; });
    if (has_memory && away < least) {
      nearest = other;
      least = away;
    }
  }
  return nearest;
}

}  // namespace

std::vector<int> ParseList(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream list(text);
  for (int first = 0; list >> first;) {
    int last = first;
    if (list.peek() == '-' && !(list.ignore() >> last)) break;
    for (int number = first; number <= last; ++number) numbers.push_back(number);
    if (list.peek() != ',') break;
    list.ignore();
  }
  return numbers;
}

Topology ReadTopology(const std::string& system, const std::vector<int>& usable) {
  const std::string node_folder = system + "/devices/system/node/", cpu_folder = system + "/devices/system/cpu/";
  const std::vector<int> online_nodes = ParseList(ReadText(node_folder + "online"));
  Topology topology;
  for (const int number : online_nodes) {
    const int64_t bytes = MemoryBytes(node_folder + "node" + std::to_string(number));
    if (bytes > 0) topology.nodes.push_back({number, bytes});
  }
  if (topology.nodes.empty()) topology.nodes.push_back({0, 0});

  std::map<int, int> node_of;
  for (const int number : online_nodes) {
    const std::string node = node_folder + "node" + std::to_string(number);
    const int memory = NearestMemory(ReadText(node + "/distance"), online_nodes, topology.nodes);
    for (const int cpu : ParseList(ReadText(node + "/cpulist"))) node_of[cpu] = memory;
  }

  const std::vector<int> online_list = ParseList(ReadText(cpu_folder + "online"));
  const std::set<int> wanted(usable.begin(), usable.end()), online(online_list.begin(), online_list.end());
  std::set<int> placed;
  for (const int cpu : wanted) {
    if ((!online.empty() && online.count(cpu) == 0) || placed.count(cpu) != 0) continue;
    const std::string folder = cpu_folder + "cpu" + std::to_string(cpu) + "/topology/";
    const auto node = node_of.find(cpu);
    Core core{node == node_of.end() ? topology.nodes.front().number : node->second,
              ReadNumber(folder + "physical_package_id", 0),
              {}};
    std::vector<int> siblings = ParseList(ReadText(folder + "thread_siblings_list"));
    siblings.push_back(cpu);  // also where the file is missing
    for (const int sibling : siblings) {
      const bool counts = wanted.count(sibling) != 0 && (online.empty() || online.count(sibling) != 0);
      if (counts && placed.insert(sibling).second) core.cpus.push_back(sibling);
    }
    topology.cores.push_back(std::move(core));
  }
  std::stable_sort(topology.cores.begin(), topology.cores.end(),
                   [](const Core& a, const Core& b) { return a.node < b.node; });
  return topology;
}

}  // namespace kt
