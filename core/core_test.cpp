// Element types, shapes, random numbers, errors, switches, memory.
#include <cmath>
#include <cstdlib>
#include <set>

#include "core/allocator.h"
#include "core/device_graph.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/files.h"
#include "core/nearest.h"
#include "core/op_scope.h"
#include "core/philox.h"
#include "core/switches.h"
#include "core/tensor.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

TEST("Philox gives the published vectors") {
  const PhiloxBlock zero = philox(0, 0, 0);
  CHECK(zero.word[0] == 0x6627e8d5u);
  CHECK(zero.word[1] == 0xe169c58du);
  CHECK(zero.word[2] == 0xbc57ac4cu);
  CHECK(zero.word[3] == 0x9b00dbd8u);
  const PhiloxBlock ones = philox(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0});
  CHECK(ones.word[0] == 0x408f276du);
  CHECK(ones.word[1] == 0x41c83b0eu);
  CHECK(ones.word[2] == 0xa20bc7c6u);
  CHECK(ones.word[3] == 0x6d5451fdu);
  const PhiloxBlock pi = philox(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x0370734413198a2eu);
  CHECK(pi.word[0] == 0xd16cfe09u);
  CHECK(pi.word[1] == 0x94fdccebu);
  CHECK(pi.word[2] == 0x5001e420u);
  CHECK(pi.word[3] == 0x24126ea1u);
}

TEST("Philox normal numbers have mean 0 and standard deviation 1") {
  constexpr int n = 200'000;
  double sum = 0, squares = 0;
  for (uint64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(philox_normal(7, i));
    sum += x;
    squares += x * x;
  }
  CHECK(std::abs(sum / n) < 5 / std::sqrt(n));
  CHECK(std::abs(squares / n - 1) < 5 * std::sqrt(2.0 / n));
}

TEST("every f16 value survives the way through float") {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    f16 h;
    h.bits = static_cast<uint16_t>(bits);
    const float value = static_cast<float>(h);
    const f16 back(value);
    if (std::isnan(value)) CHECK(std::isnan(static_cast<float>(back)));
    else CHECK(back.bits == h.bits);
  }
  CHECK(f16(65519.0f).bits == 0x7bff);                 // rounds down to the largest finite value
  CHECK(f16(65520.0f).bits == 0x7c00);                 // the tie goes to infinity
  CHECK(f16(1.0f + 0x1p-11f).bits == f16(1.0f).bits);  // tie to even
}

TEST("bf16 rounds to nearest, ties to even, and keeps NaN") {
  CHECK(static_cast<float>(bf16(1.0f + 0x1p-8f)) == 1.0f);
  CHECK(static_cast<float>(bf16(1.0f + 3 * 0x1p-8f)) == 1.0f + 0x1p-6f);
  CHECK(static_cast<float>(bf16(-2.5f)) == -2.5f);
  CHECK(std::isnan(static_cast<float>(bf16(NAN))));
  CHECK(std::isinf(static_cast<float>(bf16(3.4e38f))));
}

TEST("an error shows sentence, rows, place and way out") {
  const ShapeError error("rmsnorm: weight does not match", {{"weight", "[768] f32"}, {"try", "a narrower model"}});
  const std::string text = error.what();
  CHECK(text.starts_with("rmsnorm: weight does not match\n"));
  CHECK(text.find("\n  weight  [768] f32") != std::string::npos);
  CHECK(text.find("\n  at      core/core_test.cpp:") != std::string::npos);
  CHECK(text.ends_with("\n  try     a narrower model"));
}

TEST("the nearest known name is found") {
  CHECK(nearest_name("lerning_rate", {"lr", "learning_rate", "warmup"}) == "learning_rate");
  CHECK(nearest_name("x", {}).empty());
}

TEST("switches hold for a scope and unknown names are reported") {
  const int before = switches().trace;
  {
    const SwitchScope scope([](Switches& s) { s.trace = 2; });
    CHECK(switches().trace == 2);
  }
  CHECK(switches().trace == before);
  setenv("LONGHAND_TRASE", "1", 1);
  const auto unknown = unknown_switches();
  unsetenv("LONGHAND_TRASE");
  CHECK(std::set<std::string>(unknown.begin(), unknown.end()).contains("LONGHAND_TRASE"));
}

TEST("freed blocks are handed out again, and the peak is remembered") {
  const SwitchScope scope([](Switches& s) { s.exact = false; });
  CachingAllocator& memory = Device::cpu().allocator();
  const Tensor kept = Tensor::empty(Device::cpu(), Dtype::f32, {1 << 16});
  const MemoryUse before = memory.use();
  { const Tensor a = Tensor::empty(Device::cpu(), Dtype::f32, {12345}); }
  const int64_t taken = memory.use().system_allocations;
  for (int i = 0; i < 10; ++i) const Tensor b = Tensor::empty(Device::cpu(), Dtype::f32, {12300});  // the same size class
  CHECK(memory.use().system_allocations == taken);
  CHECK(memory.use().live_bytes == before.live_bytes);
  CHECK(memory.use().peak_bytes >= before.live_bytes + 12345 * 4);
}

TEST("exact memory is as large as was asked, from the system and back to it at once") {
  CachingAllocator& memory = Device::cpu().allocator();
  void* const before_scope = memory.allocate(777);
  const SwitchScope scope([](Switches& s) { s.exact = true; });
  const MemoryUse before = memory.use();
  for (int i = 1; i <= 3; ++i) {
    void* const block = memory.allocate(777);
    CHECK(reinterpret_cast<std::uintptr_t>(block) % 256 == 0);
    CHECK(memory.use().system_allocations == before.system_allocations + i);
    CHECK(memory.use().reserved_bytes == before.reserved_bytes + 777);
    CHECK(memory.use().live_bytes == before.live_bytes + 777);
    memory.release(block);
    CHECK(memory.use().reserved_bytes == before.reserved_bytes);
  }
  void* const read = memory.allocate(777);
  memory.begin_reserving();  // recorded work reads and writes its memory after the tensors are gone
  memory.release(memory.allocate(777));
  memory.release(read);
  const ReservedBlocks blocks = memory.end_reserving();
  const int64_t recorded = memory.use().reserved_bytes;
  CHECK(recorded >= before.reserved_bytes + 777);
  memory.give_back(blocks);
  CHECK(memory.use().reserved_bytes == recorded - 777);  // the allocator keeps the other one for those that come
  memory.release(before_scope);
}

TEST("memory is counted by op and layer") {
  const SwitchScope scope([](Switches& s) { s.memory = true; });
  const LayerScope layer("layers", 3);
  const OpScope op("ssd");
  const Tensor t = Tensor::empty(Device::cpu(), Dtype::f32, {1000});
  CHECK(Device::cpu().allocator().use().live_by_op.at("layers.3/ssd") >= 4000);
}

TEST("memory outside any op is counted, and given back") {
  const SwitchScope scope([](Switches& s) { s.memory = true; });
  auto outside = [] { return Device::cpu().allocator().use().live_by_op[""]; };
  const int64_t before = outside();
  {
    const Tensor t = Tensor::empty(Device::cpu(), Dtype::f32, {1000});
    CHECK(outside() >= before + 4000);
  }
  CHECK(outside() == before);
}

TEST("poisoned buffers read as NaN") {
  const SwitchScope scope([](Switches& s) { s.poison = true, s.exact = false; });
  CHECK(std::isnan(Tensor::empty(Device::cpu(), Dtype::f32, {3}).to_vector<float>()[1]));
  CHECK(std::isnan(static_cast<float>(Tensor::empty(Device::cpu(), Dtype::bf16, {1}).data<bf16>()[0])));
}

TEST("devices are named, and unknown ones refused") {
  CHECK(Device::parse("cpu") == Device::cpu());
  CHECK_THROWS_AS(Device::parse("gpu"), ConfigError);
  CHECK_THROWS_AS(Device::parse("cuda:-1"), ConfigError);
  CHECK_THROWS_AS(Device::cuda(cuda_device_count()), DeviceError);
  CHECK_THROWS_AS(parse_dtype("float"), ConfigError);
}

TEST("a failed atomic write leaves the old content and no other file") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("a.txt");
  write_file_atomically(path, "old");
  CHECK_THROWS_AS(write_file_atomically(path,
                                        [](OutputFile& out) {
                                          out.write("new");
                                          throw ValueError("interrupted");
                                        }),
                  ValueError);
  CHECK(read_text_file(path) == "old");
  CHECK_THROWS_AS(write_file_atomically(scratch.file("no/such/folder"), "x"), FileError);
  CHECK_THROWS_AS(read_text_file(scratch.file("absent")), FileError);
  CHECK_THROWS_AS(MappedFile{scratch.path()}, FileError);  // a folder is not a file
}

TEST("reserved blocks are given to nobody until they are given back") {
  const SwitchScope scope([](Switches& s) { s.exact = false; });
  CachingAllocator& memory = Device::cpu().allocator();
  memory.release_cached();
  const int64_t before = memory.use().live_bytes;
  void* const early = memory.allocate(70001);
  memory.begin_reserving();
  void* const first = memory.allocate(70001);
  memory.release(first);
  CHECK(memory.allocate(70001) == first);  // within the recording it may serve again
  void* const held = memory.allocate(70001);
  memory.release(first);
  const ReservedBlocks blocks = memory.end_reserving();
  CHECK(blocks.handed_out.size() == 2);
  memory.release(held);  // a tensor that outlives the recording
  memory.release(early);
  CHECK(memory.use().live_bytes > before + 2 * 70001 - 1);
  void* const other = memory.allocate(70001);
  CHECK(other == early);
  void* const another = memory.allocate(70001);
  CHECK((another != first && another != held));
  memory.give_back(blocks);
  std::set<void*> again{memory.allocate(70001), memory.allocate(70001)};
  CHECK(again == std::set<void*>{first, held});
  for (void* block : again) memory.release(block);
  memory.release(other);
  memory.release(another);
  CHECK(memory.use().live_bytes == before);
}

TEST("a graph replays what was queued on a GPU, on the values of that time; a CPU has none") {
  CHECK_THROWS_AS(record_graph(Device::cpu(), [] {}), DeviceError);
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const Tensor in = Tensor::zeros(gpu, Dtype::f32, {1000}), out = Tensor::zeros(gpu, Dtype::f32, {1000});
  CHECK_THROWS_AS(record_graph(gpu, [&] { (void)in.to_vector<float>(); }), DeviceError);  // waits for the device
  const auto graph = record_graph(gpu, [&] { copy(out, in.clone()); });
  CHECK(graph->size() == 2);
  CHECK(out.to_vector<float>()[0] == 0);
  for (const float value : {1.5f, -2.0f}) {
    fill(in, value);
    const Tensor other = Tensor::empty(gpu, Dtype::f32, {1000});
    fill(other, 7);
    graph->replay();
    CHECK(out.to_vector<float>() == std::vector<float>(1000, value));
    CHECK(other.to_vector<float>() == std::vector<float>(1000, 7));
  }
}
