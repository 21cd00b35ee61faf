// Made-up machines: a folder laid out like /sys.
#include "cpu/topology.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "testing.h"

namespace kt {
namespace {

class MadeUpSystem {
 public:
  MadeUpSystem() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kt_topology_XXXXXX").string();
    root_ = mkdtemp(pattern.data());
  }
  ~MadeUpSystem() { std::filesystem::remove_all(root_); }
  MadeUpSystem(const MadeUpSystem&) = delete;
  MadeUpSystem& operator=(const MadeUpSystem&) = delete;

  const std::string& root() const { return root_; }

  void Online(const std::string& cpus, const std::string& nodes) const {
    Put("cpu/online", cpus);
    Put("node/online", nodes);
  }
  void Node(int number, const std::string& cpus, int64_t kibibytes, const std::string& distance) const {
    const std::string node = "node/node" + std::to_string(number);
    Put(node + "/cpulist", cpus);
    Put(node + "/distance", distance);
    const std::string name = "Node " + std::to_string(number);
    Put(node + "/meminfo",
        name + " MemTotal:       " + std::to_string(kibibytes) + " kB\n" + name + " MemFree:  1 kB\n");
  }
  void Cpu(int number, int package, const std::string& siblings) const {
    const std::string folder = "cpu/cpu" + std::to_string(number) + "/topology";
    Put(folder + "/physical_package_id", std::to_string(package));
    Put(folder + "/thread_siblings_list", siblings);
  }

 private:
  void Put(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = std::filesystem::path(root_) / "devices/system" / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << '\n';
  }

  std::string root_;
};

std::vector<int> Range(int first, int end) {
  std::vector<int> numbers;
  for (int i = first; i < end; ++i) numbers.push_back(i);
  return numbers;
}

// Two packages of two cores with two hardware threads each; siblings are numbered four apart, as Linux mostly does.
void TwoPackages(const MadeUpSystem& system) {
  system.Online("0-7", "0-1");
  system.Node(0, "0-1,4-5", 1000, "10 21");
  system.Node(1, "2-3,6-7", 2000, "21 10");
  for (int cpu = 0; cpu < 8; ++cpu) {
    const int core = cpu % 4;
    system.Cpu(cpu, core / 2, std::to_string(core) + "," + std::to_string(core + 4));
  }
}

TEST(ListsAreParsed) {
  CHECK(ParseList("0-3,8,10-11\n") == (std::vector<int>{0, 1, 2, 3, 8, 10, 11}));
  CHECK(ParseList("5\n") == std::vector<int>{5});
  CHECK(ParseList("").empty() && ParseList("\n").empty() && ParseList("none").empty());
  CHECK(ParseList("3-").empty());
}

TEST(OneNodeWithoutHardwareThreads) {
  const MadeUpSystem system;
  system.Online("0-3", "0");
  system.Node(0, "0-3", 4096, "10");
  for (int cpu = 0; cpu < 4; ++cpu) system.Cpu(cpu, 0, std::to_string(cpu));
  const Topology topology = ReadTopology(system.root(), Range(0, 4));
  CHECK(topology.nodes.size() == 1 && topology.nodes[0].number == 0 && topology.nodes[0].bytes == 4096 * 1024);
  CHECK(topology.cores.size() == 4);
  for (int i = 0; i < 4; ++i) CHECK(topology.cores[static_cast<size_t>(i)].cpus == std::vector<int>{i});
}

TEST(TwoNodesWithHardwareThreads) {
  const MadeUpSystem system;
  TwoPackages(system);
  const Topology topology = ReadTopology(system.root(), Range(0, 8));
  CHECK(topology.nodes.size() == 2 && topology.nodes[1].number == 1 && topology.nodes[1].bytes == 2000 * 1024);
  CHECK(topology.cores.size() == 4);
  for (int i = 0; i < 4; ++i) {
    const Core& core = topology.cores[static_cast<size_t>(i)];
    CHECK(core.node == i / 2 && core.package == i / 2 && core.cpus == (std::vector<int>{i, i + 4}));
  }
}

TEST(AContainersCpusetIsAllThatCounts) {
  const MadeUpSystem system;
  TwoPackages(system);
  const Topology one_node = ReadTopology(system.root(), {2, 3, 6, 7});
  CHECK(one_node.cores.size() == 2 && one_node.cores[0].node == 1 && one_node.cores[1].node == 1);
  const Topology one_thread_each = ReadTopology(system.root(), {0, 7});
  CHECK(one_thread_each.cores.size() == 2);
  CHECK(one_thread_each.cores[0].cpus == std::vector<int>{0} && one_thread_each.cores[0].node == 0);
  CHECK(one_thread_each.cores[1].cpus == std::vector<int>{7} && one_thread_each.cores[1].node == 1);
}

TEST(CoresStandByNodeHoweverCpusAreNumbered) {
  const MadeUpSystem system;
  system.Online("0-3", "0-1");
  system.Node(0, "0,2", 1000, "10 21");
  system.Node(1, "1,3", 1000, "21 10");
  for (int cpu = 0; cpu < 4; ++cpu) system.Cpu(cpu, cpu % 2, std::to_string(cpu));
  std::vector<int> order;
  for (const Core& core : ReadTopology(system.root(), Range(0, 4)).cores) order.push_back(core.cpus[0]);
  CHECK(order == (std::vector<int>{0, 2, 1, 3}));
}

TEST(CoresWithoutMemoryBelongToTheNearestNodeThatHasSome) {
  const MadeUpSystem system;
  system.Online("0-2", "0,2-3");
  system.Node(0, "0", 1000, "10 30 20");
  system.Node(2, "1", 0, "30 10 15");  // its memory was taken out
  system.Node(3, "2", 1000, "20 15 10");
  for (int cpu = 0; cpu < 3; ++cpu) system.Cpu(cpu, cpu, std::to_string(cpu));
  const Topology topology = ReadTopology(system.root(), Range(0, 3));
  CHECK(topology.nodes.size() == 2 && topology.nodes[0].number == 0 && topology.nodes[1].number == 3);
  CHECK(topology.cores[0].node == 0 && topology.cores[1].node == 3 && topology.cores[2].node == 3);
}

TEST(MemoryWithoutCoresIsANodeWithoutThem) {
  const MadeUpSystem system;
  system.Online("0", "0-1");
  system.Node(0, "0", 1000, "10 40");
  system.Node(1, "", 9000, "40 10");
  system.Cpu(0, 0, "0");
  const Topology topology = ReadTopology(system.root(), {0});
  CHECK(topology.nodes.size() == 2 && topology.cores.size() == 1 && topology.cores[0].node == 0);
}

TEST(OfflineCpusAreLeftOut) {
  const MadeUpSystem system;
  system.Online("0,2-3", "0");
  system.Node(0, "0,2-3", 1000, "10");
  system.Cpu(0, 0, "0");  // its sibling 1 is offline and has no topology folder
  system.Cpu(2, 0, "2-3");
  system.Cpu(3, 0, "2-3");
  const Topology topology = ReadTopology(system.root(), Range(0, 4));
  CHECK(topology.cores.size() == 2);
  CHECK(topology.cores[0].cpus == std::vector<int>{0} && topology.cores[1].cpus == (std::vector<int>{2, 3}));
}

TEST(WithoutSysfsThereIsOneNodeAndACorePerCpu) {
  const Topology topology = ReadTopology("/does/not/exist", {4, 9});
  CHECK(topology.nodes.size() == 1 && topology.nodes[0].number == 0 && topology.nodes[0].bytes == 0);
  CHECK(topology.cores.size() == 2 && topology.cores[1].cpus == std::vector<int>{9} && topology.cores[1].node == 0);
}

TEST(ThisMachineHasACoreForEveryUsableCpu) {
  const Topology topology = ReadTopology("/sys", {0});
  CHECK(!topology.nodes.empty() && topology.cores.size() <= 1);
}

}  // namespace
}  // namespace kt
