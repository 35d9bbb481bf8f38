// A run over many epochs of changing shards: memory, file handles and threads stay what they were; and the same run from a disk that is
// slow and hands out little at a time. LONGHAND_SOAK_STEPS makes it longer. And what a GPU has left, round after round of models that come
// and go.
#include <malloc.h>
#if LONGHAND_WITH_CUDA
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "data/shard_writer.h"
#include "data/token_cache.h"
#include "models/decoder.h"
#include "tests/support/process.h"
#include "tests/support/tiny_training.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" std::size_t __sanitizer_get_current_allocated_bytes();  // of ASan's run-time library; GCC comes without its header
#endif

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

// Shards of 20 documents each, every third one packed.
std::vector<std::string> write_shards(const ScratchFolder& scratch, int count) {
  std::vector<std::string> files;
  for (int i = 0; i < count; ++i) {
    files.push_back(scratch.file("shard-" + std::to_string(i) + (i % 3 == 0 ? ".jsonl.zst" : ".jsonl")));
    auto text_of_document = [&](uint64_t document) {
      std::string text;
      for (uint64_t k = 0; k < 100; ++k) text += static_cast<char>('a' + philox_u64(static_cast<uint64_t>(i), document, k) % 26);
      return text;
    };
    if (i % 3 == 0) {
      longhand::write_shard(files.back(), [&](ShardWriter& writer) {
        for (uint64_t d = 0; d < 20; ++d) writer.add(text_of_document(d), "Test");
      });
    } else {
      std::ofstream out(files.back());
      for (uint64_t d = 0; d < 20; ++d) out << nlohmann::json{{"text", text_of_document(d)}}.dump() << "\n";
    }
  }
  return files;
}

struct Usage {
  int64_t resident_kib = 0, handles = 0, threads = 0;
  int64_t held_kib = 0;  // by who asked malloc for it: sees what is lost in the room that the process has anyway
};

// Under ASan freed memory stays resident for a while; what is held says what grows.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kFreedIsGivenBack = false;
int64_t held_bytes() {
  return static_cast<int64_t>(__sanitizer_get_current_allocated_bytes());
}
#else
constexpr bool kFreedIsGivenBack = true;
int64_t held_bytes() {
  const auto heap = ::mallinfo2();
  return static_cast<int64_t>(heap.uordblks + heap.hblkhd);
}
#endif

Usage usage_of_this_process() {
  Usage usage;
  std::ifstream in("/proc/self/statm");
  int64_t pages = 0;
  in >> pages >> pages;
  usage.resident_kib = pages * ::sysconf(_SC_PAGESIZE) / 1024;
  auto entries = [](const char* folder) {
    return static_cast<int64_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
  };
  usage.handles = entries("/proc/self/fd");
  usage.threads = entries("/proc/self/task");
  usage.held_kib = held_bytes() / 1024;
  return usage;
}

int64_t steps_wanted() {
  const char* given = std::getenv("LONGHAND_SOAK_STEPS");
  return given == nullptr ? 2000 : std::stoll(given);
}

TEST("soak: memory, file handles and threads stay flat over many epochs of changing shards and many checkpoints") {
  const ScratchFolder scratch;
  const int64_t steps = steps_wanted(), watch_every = std::max<int64_t>(steps / 200, 1);
  std::vector<std::string> settings{
      "train.steps=" + std::to_string(steps), "train.checkpoint_every=100", "train.log_every=20", "data.threads=2", "data.shuffle_rows=64",
      "initial_state=state-passing"};
  std::string files = "[";
  for (const std::string& file : write_shards(scratch, 9)) files += (files.size() > 1 ? ", \"" : "\"") + file + "\"";
  settings.push_back("data.files=" + files + "]");
  const Recipe recipe = tiny_recipe(settings);
  const auto model = tiny_model(recipe);
  std::vector<Usage> watched;
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "soak"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = {},
                        .messages = nullptr,
                        .on_step = [&](const LoggedStep& step) {
                          if (step.step % watch_every == 0) watched.push_back(usage_of_this_process());
                        }};
  write_file_atomically(job.folder.file("config.toml"), to_toml(recipe));
#pragma omp parallel
  {}  // OpenMP's threads stay for good
  const Usage before = usage_of_this_process();
  const TrainingOutcome outcome = run_training(job, *model);
  const Usage after = usage_of_this_process();
  CHECK(outcome.step == steps);
  CHECK(outcome.skipped == 0);
  REQUIRE(watched.size() >= 100);

  // What the first quarter needed at most is all that the rest may need.
  const auto quarter = watched.begin() + static_cast<std::ptrdiff_t>(watched.size() / 4);
  auto most = [](auto begin, auto end, int64_t Usage::*what) {
    int64_t result = 0;
    for (; begin != end; ++begin) result = std::max(result, (*begin).*what);
    return result;
  };
  constexpr int64_t kNoiseKib = 2048;     // pages that the allocator holds back
  constexpr int64_t kHeldNoiseKib = 256;  // documents and batches that happen to be on their way
  const int64_t early_held = most(watched.begin(), quarter, &Usage::held_kib), late_held = most(quarter, watched.end(), &Usage::held_kib);
  const int64_t early = most(watched.begin(), quarter, &Usage::resident_kib), late = most(quarter, watched.end(), &Usage::resident_kib);
  MESSAGE(steps << " steps; resident KiB: " << before.resident_kib << " before, " << early << " at most in the first quarter, " << late
                << " later, " << watched.back().resident_kib << " at the end; KiB held: " << early_held << " at most in the first quarter, "
                << late_held << " later; handles " << before.handles << " before, " << most(watched.begin(), watched.end(), &Usage::handles)
                << " at most, " << after.handles << " after");
  if (kFreedIsGivenBack) CHECK(late <= early + kNoiseKib);
  CHECK(early_held > 0);
  CHECK(late_held <= early_held + kHeldNoiseKib);
  CHECK(most(quarter, watched.end(), &Usage::handles) <= most(watched.begin(), quarter, &Usage::handles) + 1);  // a file being written
  CHECK(most(quarter, watched.end(), &Usage::threads) <= most(watched.begin(), quarter, &Usage::threads));
  CHECK(after.handles == before.handles);
  CHECK(after.threads == before.threads);
  CHECK(fs::exists(job.folder.file("checkpoints/step-" + std::to_string(steps / 100 * 100))));
}

#if LONGHAND_WITH_CUDA
// What a round leaves behind: of tensors, of the GPU's memory that nobody has, and on the host.
struct Left {
  int64_t live_bytes = 0, free_bytes = 0, held_kib = 0, handles = 0;
};

Left left_on(const Device& gpu) {
  gpu.synchronize();
  gpu.allocator().release_cached();
  std::size_t free_bytes = 0, total_bytes = 0;
  REQUIRE(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess);
  const Usage usage = usage_of_this_process();
  return {gpu.allocator().use().live_bytes, static_cast<int64_t>(free_bytes), usage.held_kib, usage.handles};
}

// Steps launch by launch and as a graph, a prompt, tokens launch by launch and as a graph.
void train_and_decode(const std::string& family, int64_t rows, int64_t length, const Device& gpu) {
  const Recipe recipe = tiny_recipe({"train.batch_size=" + std::to_string(rows), "train.length=" + std::to_string(length)}, family);
  const auto model = tiny_model(recipe, gpu);
  {
    Trainer trainer(recipe, *model);
    for (uint64_t step = 0; step < 4; ++step) trainer.step(made_up_batch(recipe, step));
    trainer.wait();
    REQUIRE_MESSAGE(trainer.queued().find("a graph of") != std::string::npos, trainer.queued());
  }
  const NoGrad no_grad;
  const std::vector<int32_t> prompt(static_cast<std::size_t>(rows * length), 7), token(static_cast<std::size_t>(rows), 9);
  Decoder decoder(*model, model->forward(Tensor::from(gpu, {rows, length}, prompt)).state);
  for (int n = 0; n < 4; ++n) decoder.step(token);
}
#endif

TEST("soak: a GPU has as much memory left after hundreds of models, recorded steps and decoders as after the first") {
#if LONGHAND_WITH_CUDA
  const char* given = std::getenv("LONGHAND_SOAK_GPU");
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  if (given == nullptr) SKIP("it needs a GPU to itself: LONGHAND_SOAK_GPU=200");
  const Device gpu = Device::cuda();
  constexpr const char* kFamilies[] = {"mamba1", "mamba2", "gla"};
  constexpr int64_t kRows[] = {1, 3, 10}, kLengths[] = {20, 70, 33};
  constexpr int64_t kForms = 9;
  const int64_t rounds = std::max<int64_t>(std::stoll(given), 4 * kForms) / kForms * kForms;
  std::vector<Left> left;
  for (int64_t round = 0; round < rounds; ++round) {
    train_and_decode(kFamilies[round % 3], kRows[round / 3 % 3], kLengths[round / 3 % 3], gpu);
    left.push_back(left_on(gpu));
  }
  // Each form has loaded its kernels, and cuBLAS what it keeps, in the first quarter.
  const Left early = left[static_cast<std::size_t>(rounds / 4)], late = left.back();
  MESSAGE(rounds << " rounds; bytes free: " << left.front().free_bytes << " after the first, " << early.free_bytes << " after a quarter, "
                 << late.free_bytes << " at the end; bytes of tensors: " << early.live_bytes << ", " << late.live_bytes
                 << "; KiB held on the host: " << early.held_kib << ", " << late.held_kib << "; handles " << early.handles << ", "
                 << late.handles);
  CHECK(late.free_bytes >= early.free_bytes);
  CHECK(late.live_bytes == early.live_bytes);
  CHECK(late.held_kib <= early.held_kib + 64);
  CHECK(late.handles == early.handles);
#else
  SKIP("a build without CUDA");
#endif
}

TEST("soak: a slow disk that hands out little at a time changes no step") {
  const ScratchFolder scratch;
  const auto shards = write_shards(scratch, 4);
  write_token_cache(scratch.file("all.tokens"), shards, open_tokenizer("bytes"), {});
  std::ofstream(scratch.file("tiny.toml")) << tiny_text("mamba2");
  auto losses_of = [&](const std::string& name, const std::string& files, const std::map<std::string, std::string>& environment) {
    const ProcessResult result =
        run_process({LONGHAND_BINARY, "train", "tiny.toml", "--device", "cpu", "--name", name, "--set", "train.log_every=1", "--set",
                     "train.steps=120", "--set", "data.threads=2", "--set", "data.files=" + files},
                    {.folder = scratch.path(), .input = {}, .environment = environment});
    REQUIRE_MESSAGE(result.code == 0, result.err);
    std::ifstream in(scratch.file("runs/" + name + "/metrics.jsonl"));
    std::vector<std::string> losses;
    for (std::string line; std::getline(in, line);) {
      const auto row = nlohmann::json::parse(line);
      losses.push_back(row.at("loss").dump() + " " + row.at("grad_norm").dump());
    }
    return losses;
  };
  std::string list = "[";
  for (const std::string& shard : shards) list += (list.size() > 1 ? ", \"" : "\"") + shard + "\"";
  list += "]";
  const std::map<std::string, std::string> slow{
      {"LD_PRELOAD", SLOW_DISK}, {"SLOW_DISK_US", "500"}, {"ASAN_OPTIONS", "verify_asan_link_order=0"}};
  const auto expected = losses_of("quick", list, {});
  CHECK(expected.size() == 120);
  CHECK(losses_of("slow", list, slow) == expected);
  CHECK(losses_of("slow-cache", "all.tokens", slow) == expected);
}

}  // namespace
}  // namespace longhand::test
