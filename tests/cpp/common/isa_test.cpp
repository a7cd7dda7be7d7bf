// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/isa_choice.h"

namespace dynamic_moe {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using ::testing::ThrowsMessage;

// A processor with everything, under a system that saves everything.
constexpr CpuidRegisters kComplete{
    .leaf1_ecx = (1u << 12) | (1u << 27) | (1u << 28) | (1u << 29),
    .leaf7_ebx = (1u << 5) | (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31),
    .leaf7_edx = (1u << 22) | (1u << 24),
    .leaf7_1_eax = 1u << 5,
    .xcr0 = 0x600e6,
};

std::vector<std::string> levels_of(const CpuidRegisters& registers) {
  std::vector<std::string> names;
  for (const Isa isa : kAllIsas) {
    if (can_run(isa, decode_cpu_features(registers))) names.emplace_back(isa_name(isa));
  }
  return names;
}

CpuidRegisters without(uint32_t CpuidRegisters::* reg, int bit) {
  CpuidRegisters registers = kComplete;
  registers.*reg &= ~(1u << bit);
  return registers;
}

CpuidRegisters with_xcr0(uint64_t xcr0) {
  CpuidRegisters registers = kComplete;
  registers.xcr0 = xcr0;
  return registers;
}

TEST(CpuFeatures, CompleteProcessorRunsEveryLevel) {
  EXPECT_THAT(levels_of(kComplete), ElementsAre("scalar", "avx2", "avx512", "avx512_bf16", "amx"));
}

TEST(CpuFeatures, ProcessorWithoutTheLeavesRunsScalarOnly) { EXPECT_THAT(levels_of({}), ElementsAre("scalar")); }

TEST(CpuFeatures, EachFlagOfAvx2IsNeeded) {
  for (const int bit : {12, 28, 29})
    EXPECT_THAT(levels_of(without(&CpuidRegisters::leaf1_ecx, bit)), ElementsAre("scalar"));
  EXPECT_THAT(levels_of(without(&CpuidRegisters::leaf7_ebx, 5)), ElementsAre("scalar"));
}

TEST(CpuFeatures, EachFlagOfAvx512IsNeeded) {
  for (const int bit : {16, 17, 30, 31}) {
    EXPECT_THAT(levels_of(without(&CpuidRegisters::leaf7_ebx, bit)), ElementsAre("scalar", "avx2"));
  }
}

TEST(CpuFeatures, Bf16AndAmxNeedTheirOwnFlags) {
  EXPECT_THAT(levels_of(without(&CpuidRegisters::leaf7_1_eax, 5)), ElementsAre("scalar", "avx2", "avx512"));
  for (const int bit : {22, 24}) {
    EXPECT_THAT(levels_of(without(&CpuidRegisters::leaf7_edx, bit)),
                ElementsAre("scalar", "avx2", "avx512", "avx512_bf16"));
  }
}

// The instructions are there, but the system does not save the registers: using them would lose or leak their content.
TEST(CpuFeatures, SystemThatDoesNotSaveTheRegistersRulesTheLevelOut) {
  EXPECT_THAT(levels_of(without(&CpuidRegisters::leaf1_ecx, 27)), ElementsAre("scalar"));
  EXPECT_THAT(levels_of(with_xcr0(0)), ElementsAre("scalar"));
  EXPECT_THAT(levels_of(with_xcr0(0x2)), ElementsAre("scalar"));
  EXPECT_THAT(levels_of(with_xcr0(0x6)), ElementsAre("scalar", "avx2"));
  EXPECT_THAT(levels_of(with_xcr0(0xa6)), ElementsAre("scalar", "avx2"));
  EXPECT_THAT(levels_of(with_xcr0(0xe6)), ElementsAre("scalar", "avx2", "avx512", "avx512_bf16"));
  EXPECT_THAT(levels_of(with_xcr0(0x200e6)), ElementsAre("scalar", "avx2", "avx512", "avx512_bf16"));
}

#if defined(__linux__) && defined(__x86_64__)
// The kernel's own reading of CPUID; it leaves out what it does not save.
std::set<std::string> flags_of_the_kernel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("flags")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

TEST(CpuFeatures, AgreeWithTheKernel) {
  const std::set<std::string> flags = flags_of_the_kernel();
  ASSERT_FALSE(flags.empty());
  const auto has = [&](std::initializer_list<const char*> names) {
    return std::all_of(names.begin(), names.end(), [&](const char* name) { return flags.count(name) != 0; });
  };
  const CpuFeatures features = detect_cpu_features();
  EXPECT_EQ(features.avx2, has({"avx2", "fma", "f16c"}));
  EXPECT_EQ(features.avx512, has({"avx512f", "avx512bw", "avx512dq", "avx512vl"}));
  EXPECT_EQ(features.avx512_bf16, has({"avx512_bf16"}));
  EXPECT_EQ(features.amx_bf16, has({"amx_tile", "amx_bf16"}));
}
#endif

int requests = 0;

template <int kAnswer>
int answer() {
  ++requests;
  return kAnswer;
}

// The choice on machines that are not at hand, where the operating system grants the tiles or refuses them.
class IsaChoiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!isa_compiled(Isa::kAmx)) GTEST_SKIP() << "this build has no amx";
    requests = 0;
  }
  static CpuFeatures features(const CpuidRegisters& registers) { return decode_cpu_features(registers); }
};

constexpr DType kWithoutTiles[] = {DType::kFloat32, DType::kFloat16, DType::kFloat64};

TEST_F(IsaChoiceTest, AmxIsTheDefaultAndOnlyABFloat16ProductAsksForTheTiles) {
  IsaChoice choice(features(kComplete), nullptr, answer<0>);
  EXPECT_EQ(choice.current(), Isa::kAmx);
  for (const DType dtype : kWithoutTiles) EXPECT_EQ(choice.for_dtype(dtype), Isa::kAmx);
  EXPECT_EQ(requests, 0);
  for (int call = 0; call < 3; ++call) EXPECT_EQ(choice.for_dtype(DType::kBFloat16), Isa::kAmx);
  EXPECT_EQ(requests, 1);
}

TEST_F(IsaChoiceTest, WhereTilesAreRefusedBFloat16RunsAtTheNextBestLevelForGood) {
  IsaChoice choice(features(kComplete), nullptr, answer<ENOSPC>);
  for (int call = 0; call < 3; ++call) EXPECT_EQ(choice.for_dtype(DType::kBFloat16), Isa::kAvx512);
  for (const DType dtype : kWithoutTiles) EXPECT_EQ(choice.for_dtype(dtype), Isa::kAmx);
  EXPECT_EQ(choice.current(), Isa::kAmx);
  EXPECT_EQ(requests, 1);
}

TEST_F(IsaChoiceTest, WhereAmxWasForcedARefusalIsAnErrorAtTheFirstBFloat16Product) {
  IsaChoice by_variable(features(kComplete), "amx", answer<EPERM>),
      by_call(features(kComplete), nullptr, answer<EPERM>);
  by_call.force(Isa::kAmx);
  EXPECT_EQ(requests, 0);
  for (IsaChoice* choice : {&by_variable, &by_call}) {
    for (const DType dtype : kWithoutTiles) EXPECT_EQ(choice->for_dtype(dtype), Isa::kAmx);
    for (int call = 0; call < 2; ++call) {
      EXPECT_THAT([&] { choice->for_dtype(DType::kBFloat16); },
                  ThrowsMessage<std::runtime_error>(AllOf(HasSubstr("amx was forced"), HasSubstr("(errno 1): "),
                                                          HasSubstr("seccomp"), HasSubstr("computed at avx512"))));
    }
  }
  EXPECT_EQ(requests, 2);
  by_call.reset();
  EXPECT_EQ(by_call.for_dtype(DType::kBFloat16), Isa::kAvx512);
  by_variable.reset();
  EXPECT_THROW(by_variable.for_dtype(DType::kBFloat16), std::runtime_error);
}

TEST_F(IsaChoiceTest, OtherForcedLevelsComputeBFloat16ThemselvesAndNeverAsk) {
  for (const Isa isa : kAllIsas) {
    if (isa == Isa::kAmx) continue;
    IsaChoice choice(features(kComplete), isa_name(isa), answer<0>);
    EXPECT_EQ(choice.current(), isa);
    EXPECT_EQ(choice.for_dtype(DType::kBFloat16), isa);
  }
  EXPECT_EQ(requests, 0);
}

// Whether AVX512_BF16 or float32 is faster depends on the processor: cpu_features.h.
TEST_F(IsaChoiceTest, AProcessorWithoutUsableTilesGetsItsBestLevelAndNeverAsks) {
  for (const int bit : {22, 24}) {
    IsaChoice without_unit(features(without(&CpuidRegisters::leaf7_edx, bit)), nullptr, answer<0>);
    EXPECT_EQ(without_unit.for_dtype(DType::kBFloat16), Isa::kAvx512Bf16);
  }
  IsaChoice not_saved(features(with_xcr0(0xe6)), nullptr, answer<0>);
  EXPECT_EQ(not_saved.current(), Isa::kAvx512);
  EXPECT_EQ(not_saved.for_dtype(DType::kBFloat16), Isa::kAvx512);
  EXPECT_TRUE(not_saved.supports(Isa::kAvx512Bf16));
  IsaChoice without_avx512(features(without(&CpuidRegisters::leaf7_ebx, 16)), nullptr, answer<0>);
  EXPECT_EQ(without_avx512.for_dtype(DType::kBFloat16), Isa::kAvx2);
  EXPECT_EQ(requests, 0);
}

TEST(Isa, NamesComeBackFromParsing) {
  for (const Isa isa : kAllIsas) EXPECT_EQ(parse_isa(isa_name(isa)), isa);
}

TEST(Isa, UnknownNameIsAnErrorThatListsTheKnownOnes) {
  for (const char* name : {"", "avx", "AVX2", "avx2 ", "neon"}) {
    EXPECT_THAT([&] { parse_isa(name); },
                ThrowsMessage<std::invalid_argument>(
                    "isa must be one of scalar, avx2, avx512, avx512_bf16, amx, got '" + std::string(name) + "'"));
  }
}

TEST(Isa, ScalarIsAlwaysSupportedAndLevelsComeWorstFirst) {
  const std::vector<Isa> isas = supported_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), Isa::kScalar);
  EXPECT_TRUE(std::is_sorted(isas.begin(), isas.end()));
}

TEST(Isa, SupportedIsWhatIsCompiledAndRunsHere) {
  const CpuFeatures features = detect_cpu_features();
  for (const Isa isa : kAllIsas) {
    EXPECT_EQ(isa_supported(isa), isa_compiled(isa) && can_run(isa, features));
    const std::vector<Isa> isas = supported_isas();
    EXPECT_EQ(std::count(isas.begin(), isas.end(), isa), isa_supported(isa) ? 1 : 0);
  }
}

TEST(Isa, SetIsaTakesEverySupportedLevelAndNoOther) {
  for (const Isa isa : kAllIsas) {
    if (isa_supported(isa)) {
      set_isa(isa);
      EXPECT_EQ(current_isa(), isa);
    } else {
      EXPECT_THAT([&] { set_isa(isa); },
                  ThrowsMessage<std::invalid_argument>(
                      AllOf(StartsWith("isa must be a level that this build and this machine support (scalar"),
                            HasSubstr(std::string("got '") + isa_name(isa) + "'"))));
    }
  }
  reset_isa();
}

// The variable is read once, so each value needs a process of its own: the death test's child. It runs this binary anew
// ("threadsafe"), sees the value, and leaves with status 0 if current_isa() did what it should.
class IsaVariable : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }

  static void exit_after(const char* value, const std::string& expected) {
    if (value == nullptr) {
      unsetenv("DYNAMIC_MOE_CPU_ISA");
    } else {
      setenv("DYNAMIC_MOE_CPU_ISA", value, 1);
    }
    std::string got;
    try {
      got = isa_name(current_isa());
    } catch (const std::invalid_argument& error) {
      got = error.what();
    }
    if (got != expected) std::fprintf(stderr, "expected: %s\ngot: %s\n", expected.c_str(), got.c_str());
    std::_Exit(got == expected ? 0 : 1);
  }
};

TEST_F(IsaVariable, UnsetOrEmptyGivesTheDefaultOfThisMachine) {
  const std::string best = isa_name(IsaChoice(detect_cpu_features(), nullptr, answer<0>).current());
  EXPECT_EXIT(exit_after(nullptr, best), ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_after("", best), ::testing::ExitedWithCode(0), "");
}

TEST_F(IsaVariable, NamesTheLevel) {
  for (const Isa isa : supported_isas()) {
    EXPECT_EXIT(exit_after(isa_name(isa), isa_name(isa)), ::testing::ExitedWithCode(0), "");
  }
}

TEST_F(IsaVariable, UnknownLevelIsAnError) {
  EXPECT_EXIT(exit_after("sse", "DYNAMIC_MOE_CPU_ISA must be one of scalar, avx2, avx512, avx512_bf16, amx, got 'sse'"),
              ::testing::ExitedWithCode(0), "");
}

TEST_F(IsaVariable, UnsupportedLevelIsAnError) {
  std::string supported;
  for (const Isa isa : supported_isas()) supported += (supported.empty() ? "" : ", ") + std::string(isa_name(isa));
  for (const Isa isa : kAllIsas) {
    if (isa_supported(isa)) continue;
    EXPECT_EXIT(
        exit_after(isa_name(isa), "DYNAMIC_MOE_CPU_ISA must be a level that this build and this machine support (" +
                                      supported + "), got '" + isa_name(isa) + "'"),
        ::testing::ExitedWithCode(0), "");
  }
}

}  // namespace
}  // namespace dynamic_moe
