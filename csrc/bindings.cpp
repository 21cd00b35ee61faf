// The native module: pointers and sizes in, tickets out. It knows nothing of torch; kt_sft.engine keeps the tensors
// behind the pointers alive.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binding_arguments.h"
#include "cpu/topology.h"
#include "held_ticket.h"
#include "moe/engine.h"
#include "moe/fastest_tier.h"

namespace py = pybind11;

namespace kt {
namespace {

// Names of the tiers of products and of integer products.
using TierNames = std::pair<std::string, std::string>;

TierNames TierNamesOf(const TierChoice& choice) { return {TierName(choice.products), TierName(choice.integers)}; }

const TierKernels& KernelsFor(const TierNames& tiers) {
  return *KernelsOf(TierChoice{TierFromName(tiers.first), TierFromName(tiers.second)});
}

std::vector<std::string> AvailableTiers() {
  std::vector<std::string> names;
  for (int i = 0; i < kTierCount; ++i) {
    const Tier tier = static_cast<Tier>(i);
    if (KernelsOf(tier) != nullptr && CpuSupports(tier)) names.emplace_back(TierName(tier));
  }
  return names;
}

py::tuple MachineTopology(const std::string& system, const std::vector<int>& usable) {
  const Topology topology = ReadTopology(system, usable);
  py::list cores, nodes;
  for (const Core& core : topology.cores) cores.append(py::make_tuple(core.node, core.package, core.cpus));
  for (const MemoryNode& node : topology.nodes) nodes.append(py::make_tuple(node.number, node.bytes));
  return py::make_tuple(cores, nodes);
}

// BF16 memory of the engine's pool as a NumPy array of its bit patterns; it goes back to the pool with the array.
py::array_t<uint16_t> TakeBf16(const Engine& engine, int64_t rows, int64_t columns) {
  struct Lease {
    std::shared_ptr<BlockPool> pool;
    Block block;
  };
  auto lease =
      std::make_unique<Lease>(Lease{engine.blocks(), engine.blocks()->Take(static_cast<size_t>(rows * columns) * 2)});
  auto* const data = reinterpret_cast<uint16_t*>(lease->block.data());
  const py::capsule owner(lease.release(), [](void* held) {
    const std::unique_ptr<Lease> returned(static_cast<Lease*>(held));
    returned->pool->Give(std::move(returned->block));
  });
  return py::array_t<uint16_t>({rows, columns}, {columns * 2, int64_t{2}}, data, owner);
}

void BindLayer(py::module_& m) {
  py::class_<FileMapping, std::shared_ptr<FileMapping>>(m, "FileMapping")
      .def(py::init<const std::string&>())
      .def("renew_pages", &FileMapping::RenewPages, py::call_guard<py::gil_scoped_release>());

  py::class_<ExpertLayer>(m, "ExpertLayer")
      .def(py::init([](int64_t experts, int64_t hidden, int64_t intermediate, const std::string& activation, bool gated,
                       const std::string& format, int64_t group, bool zero_point, const std::string& scale_type,
                       const std::vector<int>& nodes, bool shared, int descriptor, bool mapped) {
             const LayerShape shape{experts,
                                    hidden,
                                    intermediate,
                                    ActivationFromName(activation),
                                    gated,
                                    FormatFromName(format.c_str()),
                                    group,
                                    zero_point,
                                    ScaleTypeFromName(scale_type)};
             if (descriptor >= 0)
               return std::make_unique<ExpertLayer>(shape,
                                                    [&](size_t bytes) { return Block::MapShared(descriptor, bytes); });
             if (mapped) return std::make_unique<ExpertLayer>(shape, &ExpertLayer::Nothing);
             auto layer = std::make_unique<ExpertLayer>(
                 shape, [&](size_t bytes) { return shared ? Block::Shared(bytes) : Block(bytes); });
             layer->PlaceOnNodes(nodes);
             return layer;
           }),
           py::kw_only(), py::arg("experts"), py::arg("hidden"), py::arg("intermediate"), py::arg("activation"),
           py::arg("gated"), py::arg("format"), py::arg("group"), py::arg("zero_point"), py::arg("scale_type") = "",
           py::arg("nodes"), py::arg("shared"), py::arg("descriptor"), py::arg("mapped"))
      .def_property_readonly("nbytes", &ExpertLayer::bytes)
      .def_property_readonly("descriptor", &ExpertLayer::descriptor)
      .def("take_huge_pages", &ExpertLayer::TakeHugePages, py::call_guard<py::gil_scoped_release>())
      .def("adopt", [](ExpertLayer& layer, double squared_error,
                       double squared_values) { layer.Adopt({squared_error, squared_values}); })
      .def_property_readonly("error",
                             [](const ExpertLayer& layer) {
                               return std::make_pair(layer.error().squared_error, layer.error().squared_values);
                             })
      .def(
          "write",
          [](ExpertLayer& layer, const std::string& matrix, int64_t expert, uintptr_t base, const std::string& dtype,
             int64_t row_stride, int64_t column_stride) {
            const Matrix which = MatrixFromName(matrix);
            const SourceMatrix source{Pointer<void>(base), DTypeFromName(dtype), row_stride, column_stride};
            const py::gil_scoped_release release;
            layer.Write(which, expert, source);
          },
          py::arg("matrix"), py::arg("expert"), py::arg("base"), py::arg("dtype"), py::arg("row_stride"),
          py::arg("column_stride"))
      .def(
          "read_file",
          [](ExpertLayer& layer, const std::string& matrix, int64_t expert, const std::string& path, int64_t offset,
             const std::string& dtype, int64_t row_stride, int64_t column_stride) {
            const Matrix which = MatrixFromName(matrix);
            const SourceMatrix layout{nullptr, DTypeFromName(dtype), row_stride, column_stride};
            const py::gil_scoped_release release;
            layer.ReadFile(which, expert, path, offset, layout);
          },
          py::arg("matrix"), py::arg("expert"), py::arg("path"), py::arg("offset"), py::arg("dtype"),
          py::arg("row_stride"), py::arg("column_stride"))
      .def(
          "map",
          [](ExpertLayer& layer, const std::string& matrix, int64_t expert, const std::shared_ptr<FileMapping>& file,
             int64_t offset, int64_t row_stride, uintptr_t scales, uintptr_t zeros) {
            const SourceCodes layout{nullptr, row_stride, Pointer<uint8_t>(scales), Pointer<uint8_t>(zeros)};
            const Matrix which = MatrixFromName(matrix);
            const py::gil_scoped_release release;
            layer.Map(which, expert, file, offset, layout);
          },
          py::arg("matrix"), py::arg("expert"), py::arg("file"), py::arg("offset"), py::arg("row_stride"),
          py::arg("scales"), py::arg("zeros"))
      .def("read_ahead", &ExpertLayer::ReadAhead, py::call_guard<py::gil_scoped_release>())
      .def(
          "write_codes",
          [](ExpertLayer& layer, const std::string& matrix, int64_t expert, uintptr_t codes, int64_t row_stride,
             uintptr_t scales, uintptr_t zeros) {
            const Matrix which = MatrixFromName(matrix);
            const SourceCodes source{Pointer<uint8_t>(codes), row_stride, Pointer<uint8_t>(scales),
                                     Pointer<uint8_t>(zeros)};
            const py::gil_scoped_release release;
            layer.WriteCodes(which, expert, source);
          },
          py::arg("matrix"), py::arg("expert"), py::arg("codes"), py::arg("row_stride"), py::arg("scales"),
          py::arg("zeros"))
      .def(
          "read_codes",
          [](ExpertLayer& layer, const std::string& matrix, int64_t expert, const std::string& path, int64_t offset,
             int64_t row_stride, uintptr_t scales, uintptr_t zeros) {
            const Matrix which = MatrixFromName(matrix);
            const SourceCodes layout{nullptr, row_stride, Pointer<uint8_t>(scales), Pointer<uint8_t>(zeros)};
            const py::gil_scoped_release release;
            layer.ReadCodes(which, expert, path, offset, layout);
          },
          py::arg("matrix"), py::arg("expert"), py::arg("path"), py::arg("offset"), py::arg("row_stride"),
          py::arg("scales"), py::arg("zeros"))
      .def(
          "copy_stored",
          [](const ExpertLayer& layer, const std::string& matrix, int64_t expert, uintptr_t codes, uintptr_t scales,
             uintptr_t zeros) {
            const Matrix which = MatrixFromName(matrix);
            const py::gil_scoped_release release;
            layer.CopyStored(which, expert, Pointer<uint8_t>(codes), Pointer<uint8_t>(scales), Pointer<uint8_t>(zeros));
          },
          py::arg("matrix"), py::arg("expert"), py::arg("codes"), py::arg("scales"), py::arg("zeros"))
      .def(
          "map_stored",
          [](ExpertLayer& layer, const std::string& matrix, int64_t expert, const std::shared_ptr<FileMapping>& file,
             int64_t codes, int64_t scales,
             int64_t zeros) { layer.MapStored(MatrixFromName(matrix), expert, file, codes, scales, zeros); },
          py::arg("matrix"), py::arg("expert"), py::arg("file"), py::arg("codes"), py::arg("scales"), py::arg("zeros"))
      .def("written", [](const ExpertLayer& layer, const std::string& matrix,
                         int64_t expert) { return layer.written(MatrixFromName(matrix), expert); })
      .def("dequantize",
           [](const ExpertLayer& layer, const std::string& matrix, int64_t expert, uintptr_t values) {
             const Matrix which = MatrixFromName(matrix);
             const py::gil_scoped_release release;
             layer.Dequantize(which, expert, Pointer<float>(values));
           })
      .def("set_biases", [](ExpertLayer& layer, const std::vector<float>& gate_up, const std::vector<float>& down) {
        layer.SetBiases(gate_up, down);
      });
}

// Some milliseconds after it was called, the word there is 1: for trying out whether a device waits for that.
void RaiseWordLater(void* word) {
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  __atomic_store_n(static_cast<uint32_t*>(word), 1U, __ATOMIC_RELEASE);
}

// One pass's method. Addresses that it has no use for are 0, as is a gradient that is not wanted.
void BindPass(py::class_<Engine, EngineHolder>& engine, const char* name, Job::Direction direction) {
  engine.def(
      name,
      [direction](Engine& engine, const ExpertLayer& layer, int64_t tokens, int64_t slots, const std::string& dtype,
                  uintptr_t hidden, uintptr_t experts, uintptr_t weights, uintptr_t retained, int64_t scratch_bytes,
                  const std::string& compute, uintptr_t output, uintptr_t output_grad, uintptr_t hidden_grad,
                  uintptr_t weights_grad, const std::optional<LoraAddresses>& lora,
                  const std::optional<LoraGradientAddresses>& lora_grads, uintptr_t digests,
                  const std::optional<RememberedAddresses>& remembered, const std::vector<CopyAddresses>& kept,
                  const std::optional<RoutingAddresses>& retained_routing, py::object held) {
        const bool is_forward = direction == Job::Direction::kForward;
        if (is_forward ? retained_routing.has_value() : digests != 0 || remembered || !kept.empty()) {
          throw std::invalid_argument(is_forward ? "kt_sft engine: retained_routing is for backward"
                                                 : "kt_sft engine: digests, remembered and kept are for forward");
        }
        layer.CheckFiles();
        auto job = std::make_shared<Job>();
        job->direction = direction;
        job->digests = Pointer<uint64_t>(digests);
        job->remembered = MakeRemembered(remembered);
        job->kept = MakeCopies(kept);
        job->retained_routing = MakeRouting(retained_routing);
        LayerCall& call = job->call;
        call.layer = &layer;
        call.tokens = tokens;
        call.slots = slots;
        call.compute = ComputeFromName(compute);
        call.type = DTypeFromName(dtype);
        call.hidden = Pointer<void>(hidden);
        call.experts = Pointer<int64_t>(experts);
        call.weights = Pointer<float>(weights);
        call.lora = MakeLora(lora);
        call.scratch_bytes = scratch_bytes;
        call.retained = Pointer<Bf16>(retained);
        call.output = Pointer<void>(output);
        call.output_grad = Pointer<void>(output_grad);
        call.hidden_grad = Pointer<void>(hidden_grad);
        call.weights_grad = Pointer<float>(weights_grad);
        call.lora_grads = MakeLoraGradients(lora_grads);
        return std::make_unique<HeldTicket>(engine, std::move(job), std::move(held));
      },
      py::keep_alive<0, 1>(), py::kw_only(), py::arg("layer"), py::arg("tokens"), py::arg("slots"), py::arg("dtype"),
      py::arg("hidden"), py::arg("experts"), py::arg("weights"), py::arg("retained"), py::arg("scratch_bytes"),
      py::arg("compute"), py::arg("output") = 0, py::arg("output_grad") = 0, py::arg("hidden_grad") = 0,
      py::arg("weights_grad") = 0, py::arg("lora") = py::none(), py::arg("lora_grads") = py::none(),
      py::arg("digests") = 0, py::arg("remembered") = py::none(), py::arg("kept") = std::vector<CopyAddresses>(),
      py::arg("retained_routing") = py::none(), py::arg("held"));
}

void BindTicket(py::module_& m) {
  py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Completion").def_property_readonly("done", &Ticket::done);
  py::class_<HeldTicket>(m, "Ticket")
      .def("start", &HeldTicket::Start, "Hands it to the engine.")
      .def("starter", &HeldTicket::Starter,
           "Addresses of a C function, which does what `start` does, and of its argument: to be called exactly once.")
      .def("signal", &HeldTicket::SetSignal, py::arg("address"), py::arg("value"),
           "Before the start: the 32-bit word there is set when the results are in place, or there will be none.")
      .def("cancel", &HeldTicket::Cancel, py::arg("message"),
           "A ticket that is not started never will be: it is done, with a RuntimeError.")
      .def("wait", &HeldTicket::Wait, py::arg("look") = py::none(),
           "Waits for the work, and calls `look` from time to time; an error where the engine stands still.")
      .def_property_readonly("done", &HeldTicket::done)
      .def_property_readonly("remembered", &HeldTicket::remembered, "Once done: the output is the remembered call's.")
      .def_property_readonly("recomputed", &HeldTicket::recomputed,
                             "Once done: backward computed pre-activations again.")
      .def_property_readonly("completion", &HeldTicket::completion,
                             "For calls that remember this one; what the ticket holds does not stay for it.")
      .def_property_readonly("submitted", &HeldTicket::submitted, "When it was started, like `span`.")
      .def_property_readonly("span", &HeldTicket::Span, "(start, end) of the work in seconds of time.monotonic().");
}

void BindEngine(py::module_& m) {
  py::class_<Engine, EngineHolder> engine(m, "Engine");
  BindPass(engine, "prepare_forward", Job::Direction::kForward);
  BindPass(engine, "prepare_backward", Job::Direction::kBackward);
  engine
      .def(py::init([](int threads, const std::vector<std::vector<int>>& node_cpus, const TierNames& tiers,
                       int64_t spin_us) {
             return EngineHolder(new Engine(threads, node_cpus, KernelsFor(tiers), std::chrono::microseconds(spin_us)));
           }),
           py::arg("threads"), py::arg("node_cpus"), py::arg("tiers"), py::arg("spin_us") = ThreadPool::kSpin.count())
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("tier", [](const Engine& engine) { return TierName(engine.kernels().tier); })
      .def(
          "set_patience",
          [](Engine& engine, double interval, int looks) {
            engine.SetPatience({std::chrono::milliseconds(static_cast<int64_t>(interval * 1000)), looks});
          },
          py::arg("interval_seconds"), py::arg("looks"),
          "An engine that does nothing between so many looks, so far apart, is found to stand still.")
      .def("take_bf16", &TakeBf16, py::arg("rows"), py::arg("columns"))
      .def("stats",
           [](const Engine& engine) {
             const EngineStats stats = engine.stats();
             py::dict facts;
             facts["forward_calls"] = stats.forward.calls;
             facts["backward_calls"] = stats.backward.calls;
             facts["forward_tokens"] = stats.forward.tokens;
             facts["backward_tokens"] = stats.backward.tokens;
             facts["forward_seconds"] = stats.forward.seconds;
             facts["backward_seconds"] = stats.backward.seconds;
             facts["scratch_bytes"] = stats.scratch_bytes;
             facts["kept_bytes"] = stats.kept_bytes;
             return facts;
           })
      .def("peak", [](Engine& engine) {
        MachinePeak peak;
        {
          const py::gil_scoped_release release;
          peak = engine.Peak();
        }
        return py::make_tuple(peak.product_flops, peak.int8_flops, peak.read_bandwidth);
      });
}

}  // namespace
}  // namespace kt

PYBIND11_MODULE(_native, m) {
  m.doc() = "kt_sft's native engine; use it through kt_sft.engine.";
  kt::BindLayer(m);
  kt::BindTicket(m);
  kt::BindEngine(m);
  m.def(
      "word_raiser", [] { return reinterpret_cast<uintptr_t>(&kt::RaiseWordLater); },
      "Address of a C function that sets the 32-bit word at its argument to 1, some milliseconds later.");
  m.def("available_tiers", &kt::AvailableTiers,
        "Names of the instruction tiers this CPU and this build have, lowest first.");
  m.def(
      "fastest_tiers", [] { return kt::TierNamesOf(kt::FastestTiers()); },
      "Names of the tiers whose products, and whose integer products, are to be used: moe/fastest_tier.h.");
  m.def(
      "tiers_up_to",
      [](const std::string& limit) {
        const kt::Tier tier = kt::BestKernels(kt::TierFromName(limit))->tier;
        return kt::TierNamesOf({tier, tier});
      },
      py::arg("limit"), "The same for the highest tier, up to this one, that this CPU and this build have.");
  m.def("topology", &kt::MachineTopology, py::arg("system"), py::arg("usable"),
        "[(node, package, [CPU, ...]) of each core] and [(number, bytes) of each node with memory]: cpu/topology.h.");
  m.def("cpu_model", &kt::CpuModel, "The CPU's own name.");
  m.def(
      "formats",
      [] {
        std::vector<std::string> names;
        names.reserve(kt::kFormatCount);
        for (int i = 0; i < kt::kFormatCount; ++i) names.emplace_back(kt::FormatName(static_cast<kt::Format>(i)));
        return names;
      },
      "Names of the weight formats this build decodes.");
  m.def(
      "matrix_bytes",
      [](const std::string& format, int64_t group, bool zero_point, int64_t rows, int64_t columns,
         const std::string& scale_type) {
        kt::Storage storage = kt::StorageOf(kt::FormatFromName(format.c_str()), group, zero_point);
        if (!scale_type.empty()) storage.scale_type = kt::ScaleTypeFromName(scale_type);
        return storage.bytes(rows, columns);
      },
      py::arg("format"), py::arg("group"), py::arg("zero_point"), py::arg("rows"), py::arg("columns"),
      py::arg("scale_type") = "", "Bytes that a matrix takes in a format, scales included.");
}
