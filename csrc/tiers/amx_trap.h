// Runs the AMX tier's own machine code on a CPU without AMX, for tests: each tile instruction raises SIGILL there, and
// a handler decodes it, does what it says on the emulated tiles of its thread, and steps over it. So what the compiler
// made of the tier (registers, addresses, order of instructions) is tested as well as the algorithm.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <ucontext.h>
#include <csignal>

#include "tiers/amx_emulated.h"

namespace kt::testing {

// One instruction of the encoding VEX.128.0F38 (C4, map 2), as all of the tiles' are.
class TileInstruction {
 public:
  explicit TileInstruction(mcontext_t& context) : context_(context), at_(reinterpret_cast<uint8_t*>(Register(kRip))) {}

  // Does it and moves the instruction pointer behind it; false if it is none that the tier uses.
  bool Run() {
    if (at_[0] != 0xc4 || (at_[1] & 0x1f) != 2) return false;
    const int opcode = at_[3], prefix = at_[2] & 3, reg = at_[4] >> 3 & 7, rm = at_[4] & 7;
    const bool in_registers = at_[4] >> 6 == 3;
    const Operand memory = in_registers ? Operand{} : Memory();
    enum Prefix { kNone, k66, kF3, kF2 };
    if (opcode == 0x49 && prefix == kNone && in_registers) {
      EmulatedTiles::Release();
    } else if (opcode == 0x49 && prefix == kNone && reg == 0) {
      TileConfig config;
      std::memcpy(static_cast<void*>(&config), memory.start + memory.stride, sizeof(config));
      EmulatedTiles::Configure(config);
    } else if (opcode == 0x49 && prefix == kF2 && in_registers) {
      EmulatedTiles::Zero(reg);
    } else if (opcode == 0x4b && prefix == kF2) {
      EmulatedTiles::Load(reg, memory.start, memory.stride);
    } else if (opcode == 0x4b && prefix == kF3) {
      EmulatedTiles::Store(reg, memory.start, memory.stride);
    } else if (opcode == 0x5c && prefix == kF3 && in_registers) {
      EmulatedTiles::MultiplyBf16(reg, rm, ~at_[2] >> 3 & 7);
    } else if (opcode == 0x5e && prefix == k66 && in_registers) {
      EmulatedTiles::MultiplyInt8(reg, rm, ~at_[2] >> 3 & 7);
    } else {
      return false;
    }
    Register(kRip) = reinterpret_cast<greg_t>(at_ + 5 + memory.bytes);
    return true;
  }

 private:
  static constexpr int kRip = 16;

  // Loads and stores of tiles take the index register for the rows' stride.
  struct Operand {
    char* start = nullptr;
    int64_t stride = 0;
    int bytes = 0;  // of the encoding, behind the ModRM byte
  };

  // By the number that the encoding has for it.
  greg_t& Register(int number) {
    static constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8,
                                      REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RIP};
    return context_.gregs[kPlaces[number]];
  }

  Operand Memory() {
    const int mod = at_[4] >> 6, rm = at_[4] & 7;
    const int base_high = (at_[1] & 0x20) == 0 ? 8 : 0, index_high = (at_[1] & 0x40) == 0 ? 8 : 0;
    const uint8_t* next = at_ + 5;
    int base = rm + base_high;
    Operand operand;
    if (rm == 4) {
      const int sib = *next++, index = (sib >> 3 & 7) + index_high;
      base = (sib & 7) + base_high;
      if (index != 4) operand.stride = Register(index) << (sib >> 6);
    }
    int displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    const bool no_base = mod == 0 && (base & 7) == 5;  // then a displacement alone, from the next instruction on
    if (no_base) displacement_bytes = 4;
    int32_t displacement = 0;
    if (displacement_bytes == 1) displacement = static_cast<int8_t>(*next);
    if (displacement_bytes == 4) std::memcpy(&displacement, next, 4);
    next += displacement_bytes;
    operand.bytes = static_cast<int>(next - at_) - 5;
    const greg_t from = !no_base ? Register(base) : rm == 4 ? 0 : reinterpret_cast<greg_t>(next);
    operand.start = reinterpret_cast<char*>(from + displacement);
    return operand;
  }

  mcontext_t& context_;
  const uint8_t* const at_;
};

inline void OnIllegalInstruction(int, siginfo_t*, void* context) {
  if (TileInstruction(static_cast<ucontext_t*>(context)->uc_mcontext).Run()) return;
  std::signal(SIGILL, SIG_DFL);  // it happens again, and ends the process
}

// From now on, in all threads.
inline void TrapTileInstructions() {
  struct sigaction action = {};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace kt::testing
#endif
