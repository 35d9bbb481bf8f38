// See doctor_command.h.
#include "tools/doctor_command.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "core/device.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "core/switches.h"
#include "core/tensor.h"
#include "data/shard_check.h"
#include "data/shard_reader.h"
#include "data/shard_writer.h"
#include "data/tokenizer.h"
#include "tools/known_answers.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

// Prints the checks and counts those that failed.
class Examination {
 public:
  void fine(const std::string& what, const std::string& text) const { fmt::print("ok     {:<12}{}\n", what, text); }
  void note(const std::string& what, const std::string& text) const { fmt::print("note   {:<12}{}\n", what, text); }
  void wrong(const std::string& what, const std::string& text, const std::string& mend) {
    fmt::print("WRONG  {:<12}{}\n       {:<12}to do: {}\n", what, text, "", mend);
    ++wrong_;
  }
  /// Whatever `check` throws is wrong; the way out that the error knows comes before `mend`.
  template <class F>
  void attempt(const std::string& what, const std::string& mend, F&& check) {
    try {
      check();
    } catch (const Error& error) {
      const std::string text = error.what();
      std::string what_is = text.substr(0, text.find('\n')), way = mend;
      for (const ErrorRow& row : error.rows())
        if (row.name == "try") way = row.value;
        else what_is += fmt::format("\n       {:<12}  {}: {}", "", row.name, row.value);
      wrong(what, what_is, way);
    } catch (const std::exception& error) {
      wrong(what, error.what(), mend);
    }
  }
  int count() const { return wrong_; }

 private:
  int wrong_ = 0;
};

// A folder that goes with the object.
class Scratch {
 public:
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "longhand-doctor-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr)
      throw FileError("doctor: no folder for temporary files",
                      {{"folder", pattern}, {"reason", std::strerror(errno)}, {"try", "set TMPDIR to a folder that can be written"}});
    path_ = pattern;
  }
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

std::string first_line_of(const std::string& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

void require(bool holds, const std::string& sentence) {
  if (!holds) throw ValueError(sentence);
}

void examine_build(Examination& doctor) {
  const bool with_cuda = LONGHAND_WITH_CUDA != 0;
#ifdef NDEBUG
  const char* kind = "optimised";
#else
  const char* kind = "with assertions: slow";
#endif
  doctor.fine("build", fmt::format("longhand {}, {}, GCC-compatible {}, {}", LONGHAND_VERSION, with_cuda ? "CPU and CUDA" : "CPU only",
                                   __VERSION__, kind));
  doctor.fine("processor",
              fmt::format("{} threads, {:.1f} GiB of memory", std::thread::hardware_concurrency(),
                          static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE)) / (1 << 30)));
  const auto unknown = unknown_switches();
  for (const std::string& name : unknown)
    doctor.wrong("switches", name + " is not a switch of longhand", "unset it; longhand inspect switches lists them");
  if (unknown.empty()) doctor.fine("switches", "no unknown LONGHAND_ name in the environment");
}

// Each library does a piece of its work, and the result is looked at.
void examine_libraries(Examination& doctor) {
  const char* mend = "install the libraries again (tools/install_dependencies.sh) and rebuild";
  doctor.attempt("zstd, JSON", mend, [&] {
    const Scratch scratch;
    const std::string text(100'000, 'a'), path = scratch.file("x.jsonl.zst");
    write_shard(path, [&](ShardWriter& writer) { writer.add(text, "S"), writer.add("h\xC3\xA9\n", ""); });
    ShardReader reader(path);
    Document document;
    require(reader.next(document) && document.text == text && document.set_name == "S", "shard: a document came back as another one");
    require(reader.next(document) && document.text == "h\xC3\xA9\n" && !reader.next(document),
            "shard: a document came back as another one");
    doctor.fine("zstd, JSON", fmt::format("a shard written and read again, {} bytes", fs::file_size(path)));
  });
  doctor.attempt("files", mend, [&] {
    const Scratch scratch;
    const Tensor x = Tensor::from(Device::cpu(), {2, 2}, std::vector<float>{1, -2, 3.5F, 0});
    write_safetensors(scratch.file("x.safetensors"), {{"x", x}});
    require(read_safetensors(scratch.file("x.safetensors")).at("x").to_vector<float>() == x.to_vector<float>(),
            "safetensors: a tensor came back as another one");
    doctor.fine("files", "a tensor file written, synced and mapped again in " + fs::temp_directory_path().string());
  });
}

void examine_runs(Examination& doctor) {
  const fs::path runs = fs::exists("runs") ? fs::path("runs") : fs::current_path();
  const char* mend = "work in a folder that you may write to";
  doctor.attempt("runs", mend, [&] {
    if (::access(runs.c_str(), W_OK | X_OK) != 0)
      throw FileError("runs cannot be written here", {{"folder", runs.string()}, {"reason", std::strerror(errno)}});
    const auto space = fs::space(runs);
    constexpr uint64_t kLittle = uint64_t{1} << 30;
    const std::string text = fmt::format("{}: {:.1f} GiB free", runs.string(), static_cast<double>(space.available) / (1 << 30));
    if (space.available < kLittle) doctor.wrong("runs", text, "make room: a checkpoint takes 12 bytes a parameter, and two are kept");
    else doctor.fine("runs", text);
  });
}

std::vector<Device> examine_devices(Examination& doctor, const std::string& wanted) {
  std::vector<Device> devices;
  if (!wanted.empty()) {
    doctor.attempt("device", "give --device cpu", [&] { devices.push_back(Device::parse(wanted)); });
  } else {
    devices.push_back(Device::cpu());
    const std::string driver = first_line_of("/proc/driver/nvidia/version");
    if (!driver.empty()) doctor.fine("driver", driver);
    const int count = cuda_device_count();
    if (LONGHAND_WITH_CUDA == 0 && !driver.empty())
      doctor.note("GPU", "there is an NVIDIA driver, but this build has no CUDA: install the CUDA toolkit and build with the cuda preset");
    if (LONGHAND_WITH_CUDA != 0 && count == 0) {
      if (driver.empty()) doctor.note("GPU", "this build has CUDA, but the machine has no NVIDIA driver: only the CPU is used");
      else
        doctor.wrong("GPU", "the driver is there, but offers no GPU",
                     "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver must be as new as the CUDA toolkit of this build");
    }
    for (int i = 0; i < count; ++i)
      doctor.attempt(fmt::format("cuda:{}", i), "look at nvidia-smi", [&] { devices.push_back(Device::cuda(i)); });
  }
  for (const Device& device : devices) doctor.fine(device.name(), device.description());
  return devices;
}

void examine_data(Examination& doctor, const DoctorCommand& command) {
  std::shared_ptr<const Tokenizer> tokenizer;
  if (!command.tokenizer.empty())
    doctor.attempt("tokenizer", "name a byte-level BPE tokenizer.json", [&] {
      tokenizer = open_tokenizer(command.tokenizer);
      const std::string text = "The state is a value: h\xC3\xA9, \xE6\x97\xA5\xE6\x9C\xAC, 3.14\n\n";
      std::vector<int32_t> ids;
      tokenizer->encode(text, ids);
      require(tokenizer->decode(ids) == text, "tokenizer: a text came back as another one");
      doctor.fine("tokenizer",
                  fmt::format("{}, {} ids, a text there and back in {} tokens", tokenizer->name(), tokenizer->vocab_size(), ids.size()));
    });
  for (const std::string& path : command.data)
    doctor.attempt("data", "name a whole shard, or a folder that holds some; longhand data check FILE names every fault of one", [&] {
      for (const std::string& file : expand_shards({path})) {
        const ShardCount count = check_shard(file);
        if (count.documents == 0) doctor.wrong("data", file + " has no documents", "leave it out, or make it again");
        else doctor.fine("data", fmt::format("{}: {} documents, {} bytes of text", file, count.documents, count.text_bytes));
      }
    });
  if (command.data.empty()) doctor.note("data", "not looked at: give --data FILE or FOLDER");
}

}  // namespace

void add_doctor_options(CLI::App& command, DoctorCommand& options) {
  command.add_option("--data", options.data, "Shards, token caches or folders of them to read from end to end; may be repeated")
      ->type_name("FILE");
  command.add_option("--tokenizer", options.tokenizer, "A tokenizer.json to try, or bytes")->type_name("FILE");
  command.add_option("--device", options.device, "Examine only this one: cpu, cuda or cuda:N (default: the CPU and every GPU)")
      ->type_name("DEVICE");
}

int run_doctor(const DoctorCommand& command) {
  Examination doctor;
  examine_build(doctor);
  examine_libraries(doctor);
  examine_runs(doctor);
  examine_data(doctor, command);
  for (const Device& device : examine_devices(doctor, command.device)) {
    const auto rows = self_test(device);
    int right = 0;
    for (const SelfTestRow& row : rows) {
      if (row.right) ++right;
      else
        doctor.wrong(device.name(), row.name + ": " + row.text, "build again from a clean folder; if it stays, report it with this output");
    }
    const std::string summary = fmt::format("{} of {} known answers right", right, rows.size());
    if (right == static_cast<int>(rows.size())) doctor.fine(device.name(), summary);
    else doctor.note(device.name(), summary);
  }
  if (doctor.count() == 0) fmt::print("all is well\n");
  else fmt::print("{} {} wrong\n", doctor.count(), doctor.count() == 1 ? "thing is" : "things are");
  return doctor.count() == 0 ? 0 : 1;
}

}  // namespace longhand
