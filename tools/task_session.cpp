// See task_session.h.
#include "tools/task_session.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <numeric>

#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "eval/generation_state.h"
#include "eval/plot.h"
#include "models/checkpoint.h"
#include "tools/model_tokenizer.h"
#include "tools/option_checks.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

// Where no sample was run there is nothing to measure: what an earlier description says of those that were is kept.
void keep_earlier(const std::string& description, nlohmann::ordered_json& measured) {
  if (!fs::exists(description)) return;
  const auto earlier = nlohmann::ordered_json::parse(read_text_file(description), nullptr, false);
  if (!earlier.is_object()) return;
  for (auto& [key, value] : measured.items())
    if (const auto found = earlier.find(key); found != earlier.end()) value = *found;
}

}  // namespace

std::string text_of(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += tokenizer.bytes_of(id).value_or("?");
  return text;
}

std::string share_text(double share) {
  return fmt::format("{:.4f}", share);
}

void add_task_options(CLI::App& command, TaskSessionOptions& options) {
  command.add_option("--model", options.model, "A model folder, a checkpoint, or a run (its latest checkpoint)")
      ->required()
      ->type_name("DIR");
  command
      .add_option("--tokenizer", options.tokenizer,
                  "A tokenizer.json, bytes or letters:N (default: the run's, or tokenizer.json beside the model)")
      ->type_name("FILE");
  command.add_option("--out", options.out, "A line of JSON for each sample; those that are there already are not run again")
      ->type_name("FILE.jsonl");
  command.add_flag("--fresh", options.fresh, "Run all samples again");
  command.add_option("--chunk", options.chunk, "Tokens of a prompt at once; the state is carried on")
      ->type_name("N")
      ->check(at_least(1))
      ->capture_default_str();
  command.add_option("--batch", options.batch, "Samples at once")->type_name("N")->check(at_least(1))->capture_default_str();
  command.add_option("--device", options.device, "cpu, cuda, cuda:N, or auto: a GPU if there is one")
      ->type_name("DEVICE")
      ->capture_default_str();
  command.add_option("--dtype", options.dtype, "f32, bf16, f64, or auto: bf16 on a GPU, f32 on a CPU")
      ->type_name("TYPE")
      ->capture_default_str();
}

TaskSession::TaskSession(const TaskSessionOptions& options, std::string name)
    : options_(options), name_(std::move(name)), place_(find_model(options.model)), device_(choose_device(options.device, options.dtype)) {
  if (!options_.out.empty() && fs::path(options_.out).extension() != ".jsonl")
    throw ConfigError("eval: --out is a file of JSON lines; table and description go beside it",
                      {{"out", options_.out}, {"try", "a name that ends in .jsonl"}});
  tokenizer_ = open_model_tokenizer("eval", options_.tokenizer, place_, read_run_record(place_));
  model_ = load_model(place_.model_folder, device_.device, device_.dtype, device_.master_dtype());
  if (model_->config().vocab_size < tokenizer_->vocab_size())
    throw ConfigError("eval: the tokenizer has more tokens than the model",
                      {{"tokenizer", tokenizer_->name() + ", " + std::to_string(tokenizer_->vocab_size()) + " tokens"},
                       {"model", std::to_string(model_->config().vocab_size) + " tokens"}});
}

SampleLog& TaskSession::open_log(const std::string& tag, nlohmann::ordered_json settings, int64_t samples) {
  const std::string hash = settings_hash(settings).substr(0, 6);
  settings_ = nlohmann::ordered_json{{"task", name_}};
  settings_.update(settings);
  settings_.update(
      {{"tokenizer", tokenizer_->fingerprint()}, {"weights", weights_fingerprint(*model_)}, {"dtype", name_of(device_.dtype)}});
  path_ = options_.out;
  if (path_.empty() && !place_.run_folder.empty()) {
    std::string file = name_ + (tag.empty() ? "" : "-" + tag) + "-" + hash + "-" + name_of(device_.dtype);
    if (place_.step >= 0) file += fmt::format("-step-{}", place_.step);
    path_ = (fs::path(place_.run_folder) / "eval" / (file + ".jsonl")).string();
  }
  samples_ = samples;
  log_ = std::make_unique<SampleLog>(path_, settings_, samples, options_.fresh);
  fmt::print(stderr, "{} on {}, {}; {} samples{}\n", place_.model_folder, device_.device.description(), name_of(device_.dtype),
             format_count(samples), log_->found() > 0 ? fmt::format(", {} of them done before", format_count(log_->found())) : "");
  if (path_.empty())
    fmt::print(stderr,
               "nothing is kept: {} belongs to no run; --out FILE.jsonl keeps a line for each sample, the table and its description\n",
               options_.model);
  start_ = printed_ = Clock::now();
  return *log_;
}

void TaskSession::each_batch(const std::vector<int64_t>& order, const std::function<void(const std::vector<int64_t>&)>& run) {
  std::vector<int64_t> batch;
  const auto flush = [&] {
    if (!batch.empty()) run(batch);
    batch.clear();
  };
  for (const int64_t sample : order) {
    if (log_->done(sample)) continue;
    batch.push_back(sample);
    if (std::ssize(batch) == options_.batch) flush();
  }
  flush();
}

void TaskSession::each_batch(const std::function<void(const std::vector<int64_t>&)>& run) {
  std::vector<int64_t> order(static_cast<std::size_t>(samples_));
  std::iota(order.begin(), order.end(), int64_t{0});
  each_batch(order, run);
}

std::function<void(int64_t)> TaskSession::progress() {
  return [this](int64_t tokens) {
    tokens_ += tokens;
    if (Clock::now() - printed_ < std::chrono::seconds(5)) return;
    printed_ = Clock::now();
    say_progress();
  };
}

void TaskSession::say_progress() {
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  fmt::print(stderr, "{} of {} samples done, {} tokens, {} tokens/s\n", format_count(log_->count()), format_count(samples_),
             format_count(tokens_), format_count(std::llround(static_cast<double>(tokens_) / std::max(seconds, 1e-9))));
}

void TaskSession::finish(const std::string& measure, const Table& table, const nlohmann::ordered_json& more) {
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  say_progress();
  const int64_t peak = device_.device.allocator().use().peak_bytes;
  fmt::print(stderr, "{:.1f} s, peak memory {:.1f} MiB{}\n", seconds, static_cast<double>(peak) / (1 << 20),
             log_->found() == 0 ? "" : fmt::format(", of the {} samples that were run now", format_count(samples_ - log_->found())));
  std::vector<std::vector<std::string>> lines{table.columns};
  lines.insert(lines.end(), table.rows.begin(), table.rows.end());
  std::vector<std::size_t> widths(table.columns.size());
  for (const auto& line : lines)
    for (std::size_t c = 0; c < line.size(); ++c) widths[c] = std::max(widths[c], line[c].size());
  std::string csv;
  for (const auto& line : lines)
    for (std::size_t c = 0; c < line.size(); ++c) {
      const bool last = c + 1 == line.size();
      fmt::print("{:>{}}{}", line[c], widths[c] + 2, last ? "\n" : "");
      csv += line[c] + (last ? "\n" : ",");
    }
  std::fflush(stdout);
  if (path_.empty()) return;
  nlohmann::ordered_json description = {{"measure", measure}, {"model", place_.model_folder}, {"step", place_.step}};
  description.update(settings_);
  description.update(more);
  description["samples"] = samples_;
  nlohmann::ordered_json measured = {{"samples_found", log_->found()},
                                     {"device", device_.device.description()},
                                     {"chunk", options_.chunk},
                                     {"batch", options_.batch},
                                     {"tokens", tokens_},
                                     {"seconds", seconds},
                                     {"peak_memory_bytes", peak},
                                     {"date", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))}};
  const std::string description_path = fs::path(path_).replace_extension(".json").string();
  if (log_->found() == samples_) keep_earlier(description_path, measured);
  description.update(measured);
  const fs::path path(path_);
  write_file_atomically(fs::path(path).replace_extension(".csv").string(), csv);
  write_file_atomically(description_path, description.dump(2) + "\n");
  fmt::print(stderr, "wrote {}, .csv and .json beside it\n", path_);
}

}  // namespace longhand
