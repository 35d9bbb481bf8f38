// See train_command.h.
#include "tools/train_command.h"

#include <fmt/format.h>

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <exception>
#include <filesystem>
#include <memory>

#include "core/error.h"
#include "core/files.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "eval/perplexity.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "tools/process_device.h"
#include "train/communicator.h"
#include "train/determinism.h"
#include "train/memory_fit.h"
#include "train/recipe.h"
#include "train/run_batches.h"
#include "train/run_folder.h"
#include "train/training_loop.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr const char* kRuns = "runs";

void print_recipe_keys() {
  std::string section;
  for (const RecipeKeyHelp& row : recipe_keys()) {
    const auto dot = row.key.find('.');
    if (const std::string now = dot == std::string::npos ? "" : row.key.substr(0, dot); now != section) {
      section = now;
      fmt::print("\n[{}]\n", section);
    }
    fmt::print("{:<28}{}  (default {})\n{:<28}{}\n", row.key.substr(section.empty() ? 0 : section.size() + 1), row.type, row.default_value,
               "", row.meaning);
  }
}

void require_paths(const Recipe& recipe) {
  if (recipe.data.files.empty() && recipe.data.task == kTextRows)
    throw ConfigError("recipe: no training data", {{"key", "data.files"}, {"try", "--set data.files=FILE.jsonl.zst"}});
  auto require = [](const char* key, const std::string& path) {
    if (!fs::exists(path))
      throw FileError(
          "recipe: a file is not there",
          {{"key", key}, {"path", path}, {"try", "paths are relative to the current directory, " + fs::current_path().string()}});
  };
  for (const std::string& path : recipe.data.files) require("data.files", path);
  for (const std::string& path : recipe.data.val_files) require("data.val_files", path);
  for (const std::string& path : recipe.task.babi) require("task.babi", path);
  if (!is_built_in_tokenizer(recipe.data.tokenizer)) require("data.tokenizer", recipe.data.tokenizer);
}

// The recipe of a run that goes on, with the settings that may change.
Recipe recipe_to_resume(const RunFolder& folder, const std::vector<std::string>& overrides, bool say) {
  const std::string file = folder.file("config.toml");
  const Recipe before = read_recipe(file);
  Recipe after = read_recipe(file, overrides);
  for (const RecipeDifference& change : recipe_differences(before, after)) {
    if (!change.allowed_on_resume)
      throw ConfigError("train: a setting that may not change when a run is resumed",
                        {{"key", change.key},
                         {"run", change.before},
                         {"given", change.after},
                         {"try", "start another run, with --init-from " + folder.path()}});
    if (say) fmt::print(stderr, "changed     {}: {} instead of {}\n", change.key, change.after, change.before);
  }
  after.model.complete();
  return after;
}

// Mean loss over the first batches of validation_source(), every row from the zero state. Every process reads all batches and takes its
// rows of them, as in training.
std::function<double(const LanguageModel&)> make_validation(const Recipe& recipe, std::shared_ptr<const Tokenizer> tokenizer,
                                                            Communicator& processes) {
  if (!has_validation(recipe)) return {};
  const std::function<BatchStream()> open = validation_source(recipe, tokenizer);
  const int64_t batches = recipe.train.val_batches * recipe.train.grad_accumulation;
  const int64_t all_rows = recipe.train.batch_size / recipe.train.grad_accumulation;
  const auto said = std::make_shared<int64_t>(0);  // bad lines told of so far: the same ones come every time
  const Part own = processes.own(all_rows);
  return [=, &processes](const LanguageModel& model) {
    BatchStream stream = open();
    auto next = [&](TokenBatch& out) {
      Batch batch;
      if (!stream.next(batch)) return false;
      // The last batch may have fewer rows than the others.
      const Batch rows = rows_of(batch, std::min(own.begin, batch.rows), std::min(own.end, batch.rows));
      const Shape shape{rows.rows, rows.length};
      out = {Tensor::from(model.device(), shape, rows.tokens), Tensor::from(model.device(), shape, rows.targets),
             Tensor::from(model.device(), shape, std::vector<float>(rows.mask.begin(), rows.mask.end()))};
      return true;
    };
    bool told = processes.alone();  // the others, whether this process could do its part
    ValidationPart part{.first_row = own.begin, .all_rows = all_rows, .sum_over_parts = {}};
    if (!processes.alone())
      part.sum_over_parts = [&](std::vector<double>& sums) {
        told = true;
        together(processes, [] {});
        const Tensor all = Tensor::from(Device::cpu(), {static_cast<int64_t>(sums.size())}, sums);
        processes.all_reduce_sum(all);
        sums = all.to_vector<double>();
      };
    double loss = 0;
    try {
      loss = validation_loss(model, next, batches, part).loss;
    } catch (...) {
      if (!told) together(processes, [failed = std::current_exception()] { std::rethrow_exception(failed); });
      throw;
    }
    if (const BadLines& bad = stream.bad_lines(); processes.leads() && bad.count() > *said) {
      *said = bad.count();
      fmt::print(stderr, "{} bad lines of the validation data were left out, the first:\n{}\n", bad.count(), bad.first().front());
    }
    return loss;
  };
}

// A run that fails before its first step leaves no folder behind that would stand in the way of the next try.
void remove_if_nothing_happened(const RunFolder& folder) {
  const std::string metrics = folder.file("metrics.jsonl");
  std::error_code ignored;  // what ended the run is what has to be told
  if (!folder.latest_step() && (!fs::exists(metrics) || fs::file_size(metrics) == 0)) fs::remove_all(folder.path(), ignored);
}

// The ids of a model mean the tokens it was trained with; a model of another library says nothing about them.
void require_same_tokenizer(const Recipe& recipe, const Tokenizer& tokenizer) {
  const auto trained_with = read_run_record(find_model(recipe.init_from)).fingerprint;
  if (trained_with && !same_vocabulary(*trained_with, tokenizer.fingerprint()))
    throw ConfigError("train: the model to start from was trained with another tokenizer",
                      {{"init_from", recipe.init_from},
                       {"trained with", *trained_with},
                       {"data.tokenizer", recipe.data.tokenizer + ", " + tokenizer.fingerprint()}});
}

std::unique_ptr<LanguageModel> fresh_model(const Recipe& recipe, const Device& device) {
  auto model = std::make_unique<LanguageModel>(recipe.model, device, parse_dtype(recipe.train.dtype));
  model->initialize(static_cast<uint64_t>(recipe.seed));
  if (!recipe.init_from.empty()) load_weights(*model, recipe.init_from);
  return model;
}

// No run folder is made: nothing is left behind.
int verify(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer, const Device& device, int64_t steps) {
  if (!recipe.init_from.empty()) require_same_tokenizer(recipe, *tokenizer);
  const DeterminismReport report = verify_determinism(recipe, tokenizer, steps, [&] { return fresh_model(recipe, device); });
  const std::string replayed = report.queued[0].empty() ? "" : fmt::format(", first as {} and then launch by launch", report.queued[0]);
  fmt::print(
      "deterministic: {} steps twice on {}, with {} and {} data threads{}: the same bits in every loss and gradient norm, in {} weights, "
      "{} "
      "moments and {} bytes of carried state\n",
      report.steps, device.name(), report.threads[0], report.threads[1], replayed, report.weights, report.moments, report.carried);
  return 0;
}

// The file that a process other than 0 tells its progress to.
struct LogFile {
  explicit LogFile(const std::string& path) : file(nullptr) {
    const int descriptor = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (descriptor >= 0) file = ::fdopen(descriptor, "a");
    if (file == nullptr)
      throw FileError("train: the log of a process cannot be written",
                      {{"file", path}, {"reason", std::strerror(errno)}, {"try", "make its folder writable"}});
    std::setvbuf(file, nullptr, _IOLBF, BUFSIZ);
  }
  ~LogFile() { std::fclose(file); }
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;
  std::FILE* file;
};

int train(TrainingJob& job, const Device& device, Communicator& processes, bool through_nccl) {
  const Dtype dtype = parse_dtype(job.recipe.train.dtype);
  if (!job.recipe.init_from.empty() && !job.resume) require_same_tokenizer(job.recipe, *job.tokenizer);
  if (!job.resume && processes.leads())
    write_file_atomically(job.folder.file("config.toml"), to_toml(job.recipe));  // first: a killed start can be resumed
  processes.barrier();
  if (!fs::exists(job.folder.file("config.toml")))
    throw FileError("train: the run folder of process 0 is not seen here",
                    {{"folder", job.folder.path()}, {"try", "start the processes in a folder of a file system that all machines share"}});
  std::optional<LogFile> log;
  if (!processes.leads()) {
    fs::create_directories(job.folder.file("logs"));
    job.messages = log.emplace(job.folder.file(fmt::format("logs/rank-{}.log", processes.rank()))).file;
  }
  if (!processes.alone() || through_nccl) job.processes = &processes;
  LanguageModel model(job.recipe.model, device, dtype);
  if (!job.resume || !job.folder.latest_step()) {
    model.initialize(static_cast<uint64_t>(job.recipe.seed));
    if (!job.recipe.init_from.empty()) load_weights(model, job.recipe.init_from);
    // Equal files are read everywhere, unless machines have different ones under the same name.
    if (!processes.alone()) require_same_everywhere(processes, description_of_weights(model));
  }
  job.evaluate = make_validation(job.recipe, job.tokenizer, processes);
  const TrainingOutcome outcome = run_training(job, model);
  if (outcome.signal != 0) return 128 + outcome.signal;
  if (processes.leads()) fmt::print(stderr, "model       {}\n", job.folder.checkpoint(outcome.step));
  return 0;
}

// Rows at once and what is made again, where they are to follow from the memory that there is.
void fit_to_memory(Recipe& recipe, const std::string& batch, const Device& device, Communicator* processes) {
  if (batch == "auto") {
    choose_micro_batches(recipe, device, processes);
  } else if (!batch.empty()) {
    int64_t rows = 0;
    const char* const end = batch.data() + batch.size();
    const auto [stopped, status] = std::from_chars(batch.data(), end, rows);
    if (status != std::errc{} || stopped != end || rows < 1 || recipe.train.batch_size % rows != 0)
      throw ConfigError(
          "train: the rows of a step cannot be taken as many at once",
          {{"--batch", batch}, {"train.batch_size", std::to_string(recipe.train.batch_size)}, {"expected", "a divisor of it, or auto"}});
    recipe.train.grad_accumulation = recipe.train.batch_size / rows;
  }
  choose_recompute(recipe, device, processes);
}

// What has to be the same for all processes, and is compared before anything begins: first what decides which questions are asked at all.
std::string description_of(const TrainCommand& command) {
  std::string text = description_of_build() + fmt::format("recipe: {}\n", command.recipe);
  for (const auto& [name, value] :
       {std::pair("resume", command.resume), {"init-from", command.init_from}, {"name", command.name}, {"batch", command.batch}})
    text += fmt::format("{}: {}\n", name, value);
  for (const std::string& setting : command.overrides) text += "setting: " + setting + "\n";
  return text + description_of_environment() + fmt::format("verify-determinism: {}\n", command.verify_determinism);
}

// Then what they found.
std::string description_of(const Recipe& recipe, const Tokenizer& tokenizer, const Device& device, const std::string& run) {
  std::string text =
      fmt::format("device: {}\nrun: {}\ntokenizer: {}\n", device.is_cuda() ? device.description() : "cpu", run, tokenizer.fingerprint());
  std::vector<std::string> files = training_files(recipe);
  files.insert(files.end(), recipe.data.val_files.begin(), recipe.data.val_files.end());
  text += description_of_files(files);
  std::string section;
  const std::string toml = to_toml(recipe);
  for (std::size_t at = 0; at < toml.size();) {
    const std::size_t end = std::min(toml.find('\n', at), toml.size());
    const std::string line = toml.substr(at, end - at);
    if (line.starts_with("[")) section = line.substr(1, line.find(']') - 1) + ".";
    else if (!line.empty()) text += "recipe: " + section + line + "\n";
    at = end + 1;
  }
  return text;
}

int train_together(const TrainCommand& command, std::unique_ptr<Communicator>& processes, const LocalPlace& place) {
  if (!processes->alone()) require_same_everywhere(*processes, description_of(command));
  const bool resume = !command.resume.empty();
  if (resume && command.verify_determinism > 0)
    throw ConfigError("train: determinism is verified from a recipe's start, not from a checkpoint",
                      {{"try", "longhand train RECIPE.toml --init-from " + command.resume + " --verify-determinism N"}});
  if (resume && !(command.recipe.empty() && command.init_from.empty() && command.name.empty() && command.batch.empty()))
    throw ConfigError("train: a resumed run has its recipe, its start, its name and its micro-batches",
                      {{"try", "longhand train --resume RUN [--set key=value]"}});
  if (!resume && command.recipe.empty())
    throw ConfigError("train: no recipe", {{"try", "longhand train RECIPE.toml, or longhand train --resume RUN"}});
  if (command.verify_determinism > 0 && !processes->alone())
    throw ConfigError("train: determinism is verified in one process", {{"processes", std::to_string(processes->size())}});
  const Device device = device_of_process(command.device, *processes, place);
  const auto agree = [&](const Recipe& recipe, const Tokenizer& tokenizer, const std::string& run) {
    if (!processes->alone()) require_same_everywhere(*processes, description_of(recipe, tokenizer, device, run));
    with_device(processes, device, command.nccl);
  };

  if (resume) {
    std::optional<RunFolder> own;
    if (processes->leads()) own = RunFolder::open(kRuns, command.resume);
    const RunFolder folder = own ? *own : RunFolder::beside(processes->all_texts("")[0]);
    if (own) processes->all_texts(folder.path());
    const Recipe recipe = recipe_to_resume(folder, command.overrides, processes->leads());
    require_paths(recipe);
    TrainingJob job{.recipe = recipe,
                    .folder = folder,
                    .tokenizer = open_tokenizer(recipe.data.tokenizer),
                    .resume = true,
                    .evaluate = {},
                    .on_step = {}};
    const auto step = folder.latest_step();
    agree(recipe, *job.tokenizer, fmt::format("{}, after step {}", folder.path(), step ? *step : 0));
    fit_to_memory(job.recipe, "", device, processes->alone() ? nullptr : processes.get());
    return train(job, device, *processes, command.nccl);
  }
  auto settings = command.overrides;
  if (!command.init_from.empty()) settings.push_back("init_from=" + command.init_from);
  if (!command.name.empty()) settings.push_back("name=" + command.name);
  Recipe recipe = read_recipe(command.recipe, settings);
  if (processes->leads())
    for (const std::string& key : unread_keys(recipe)) fmt::print(stderr, "note: nothing looks at {}\n", key);
  require_paths(recipe);
  const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(recipe.data.tokenizer);
  resolve_model(recipe, tokenizer->vocab_size());
  if (recipe.train.dtype == "auto") recipe.train.dtype = device.is_cuda() ? "bf16" : "f32";
  if (command.verify_determinism > 0) {
    fit_to_memory(recipe, command.batch, device, nullptr);
    return verify(recipe, tokenizer, device, command.verify_determinism);
  }
  agree(recipe, *tokenizer, recipe.name);
  fit_to_memory(recipe, command.batch, device, processes->alone() ? nullptr : processes.get());
  std::optional<RunFolder> own;
  if (processes->leads()) own = RunFolder::create(kRuns, recipe.name);
  TrainingJob job{.recipe = recipe,
                  .folder = own ? *own : RunFolder::beside(std::string(kRuns) + "/" + recipe.name),
                  .tokenizer = tokenizer,
                  .resume = false,
                  .evaluate = {},
                  .on_step = {}};
  try {
    return train(job, device, *processes, command.nccl);
  } catch (...) {
    if (processes->leads()) remove_if_nothing_happened(job.folder);
    throw;
  }
}

}  // namespace

int run_train(const TrainCommand& command) {
  if (command.help_recipe) {
    print_recipe_keys();
    return 0;
  }
  return with_processes(
      [&](std::unique_ptr<Communicator>& processes, const LocalPlace& place) { return train_together(command, processes, place); });
}

}  // namespace longhand
