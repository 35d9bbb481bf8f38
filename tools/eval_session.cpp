// See eval_session.h.
#include "tools/eval_session.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "data/token_cache.h"
#include "data/tokenizer.h"
#include "eval/plot.h"
#include "models/checkpoint.h"
#include "tools/model_tokenizer.h"
#include "tools/option_checks.h"
#include "train/communicator.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

bool only_caches(const std::vector<std::string>& files) {
  for (const std::string& file : expand_shards(files))
    if (!TokenCache::is_cache(file)) return false;
  return true;
}

// The tokenizer asked for or recorded; null where the data are token caches and nobody named one.
std::shared_ptr<const Tokenizer> tokenizer_for(const EvalOptions& options, const ModelPlace& place, const RunRecord& record) {
  if (options.tokenizer.empty() && only_caches(options.data)) return nullptr;
  return open_model_tokenizer("eval", options.tokenizer, place, record);
}

// "val" for val.jsonl.zst; several files are joined by +.
std::string data_name(const std::vector<std::string>& files) {
  std::string name;
  for (const std::string& file : files) {
    std::string stem = folder_name(file);
    stem = stem.substr(0, stem.find('.'));
    name += (name.empty() ? "" : "+") + stem;
  }
  return name.size() <= 60 ? name : fmt::format("{}-files", files.size());
}

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

bool lies_in(const std::string& file, const fs::path& folder) {
  return fs::weakly_canonical(fs::absolute(file).parent_path()) == fs::weakly_canonical(folder);
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The tables, and beside the first what they are.
void write_results(const fs::path& csv, const std::vector<EvalSession::Result>& results, const std::string& description) {
  if (csv.has_parent_path()) fs::create_directories(csv.parent_path());
  for (const auto& result : results) {
    fs::path path = csv;
    if (!result.suffix.empty()) path.replace_extension("." + result.suffix + ".csv");
    write_file_atomically(path.string(), result.csv);
    fmt::print(stderr, "wrote {}\n", path.string());
  }
  write_file_atomically(fs::path(csv).replace_extension(".json").string(), description);
}

}  // namespace

void add_eval_options(CLI::App& command, EvalOptions& options, bool every_length) {
  command.add_option("--model", options.model, "A model folder, a checkpoint, or a run (its latest checkpoint)")
      ->required()
      ->type_name("DIR");
  command.add_option("--data", options.data, "Shards (.jsonl.zst, .jsonl), token caches, folders of them")->required()->type_name("FILE");
  const auto count = [&](const char* name, int64_t& value, const char* meaning, int64_t least) {
    return command.add_option(name, value, meaning)->type_name("N")->check(at_least(least));
  };
  count("--context", options.context, "Tokens of each sequence, any number", 1)->required();
  count("--chunk", options.chunk, "Tokens of a row at once; the state is carried on", 1)->capture_default_str();
  count("--batch", options.batch, "Rows at once", 1)->capture_default_str();
  count("--sequences", options.sequences, "At most so many sequences (0: all)", 0)->capture_default_str();
  const char* long_enough =
      "long-first: documents longer than the context, the longest if --sequences limits them; min-length: the same in order; ";
  auto* documents = command.add_option(
      "--documents", options.documents,
      std::string(long_enough) + (every_length ? "all: short ones too, to their end; " : "") + "packed: documents one behind the other");
  std::vector<std::string> choices{"long-first", "min-length", "packed"};
  if (every_length) choices.insert(choices.end() - 1, "all");
  documents->check(CLI::IsMember(choices))->type_name("CHOICE")->capture_default_str();
  command.add_flag("--packed", options.packed, "The same as --documents packed")->excludes(documents);
  command
      .add_option("--tokenizer", options.tokenizer, "A tokenizer.json, or bytes (default: the run's, or tokenizer.json beside the model)")
      ->type_name("FILE");
  command.add_option("--out", options.out, "CSV with every value; - for stdout")->type_name("FILE.csv");
  command.add_option("--device", options.device, "cpu, cuda, cuda:N, or auto: a GPU if there is one")
      ->type_name("DEVICE")
      ->capture_default_str();
  command.add_option("--dtype", options.dtype, "f32, bf16, f64, or auto: bf16 on a GPU, f32 on a CPU")
      ->type_name("TYPE")
      ->capture_default_str();
  command.add_option("--train-length", options.train_length, "Training length to mark (default: the one of the run)")
      ->type_name("T")
      ->check(at_least(0));
  command.add_option("--threads", options.threads, "Tokenizing threads")->type_name("N")->check(at_least(0))->capture_default_str();
  command.add_flag("--skip-bad-lines", options.skip_bad_lines, "Leave out lines that are not documents, and count them");
}

struct EvalSession::Parts {
  EvalOptions options;
  std::string name;
  ModelPlace place;
  RunRecord record;
  SequenceChoice choice;
  DeviceChoice device;
  BadLines bad_lines;
  std::unique_ptr<DocumentSequences> sequences;
  std::unique_ptr<LanguageModel> model;
  Clock::time_point start, printed;
  int64_t used = 0, tokens = 0;  // known after finish()
  double seconds = 0;
  int64_t processes = 1, rank = 0;
  bool leads() const { return rank == 0; }

  Parts(const EvalOptions& options_, const std::string& name_)
      : options(options_),
        name(name_),
        place(find_model(options.model)),
        record(read_run_record(place)),
        choice(options.packed ? SequenceChoice::packed : parse_sequence_choice(options.documents)),
        device(choose_device(options.device, options.dtype)) {}

  std::string file_name(const std::string& tag) const {
    std::string file = fmt::format("{}-{}-{}-{}", name, data_name(options.data), name_of(choice), options.context);
    if (options.sequences > 0) file += fmt::format("-n{}", options.sequences);
    if (!tag.empty()) file += "-" + tag;
    file += fmt::format("-{}", name_of(device.dtype));
    if (place.step >= 0) file += fmt::format("-step-{}", place.step);
    return file + ".csv";
  }
};

EvalSession::EvalSession(const EvalOptions& options, const std::string& name, const Communicator* processes) {
  if (fs::path(options.out).extension() == ".json")
    throw ConfigError("eval: --out is the CSV; its description goes to the same name with .json",
                      {{"out", options.out}, {"try", "a name that ends in .csv"}});
  parts_ = std::make_unique<Parts>(options, name);
  Parts& p = *parts_;
  if (processes != nullptr) p.processes = processes->size(), p.rank = processes->rank();
  SourceOptions source;
  source.files = options.data;
  source.threads = options.threads;
  source.skip_bad_lines = options.skip_bad_lines ? &p.bad_lines : nullptr;
  p.sequences = std::make_unique<DocumentSequences>(
      source, tokenizer_for(options, p.place, p.record),
      SequenceOptions{.context = options.context, .choice = p.choice, .max_sequences = options.sequences});
  require_trained_vocabulary("eval", p.sequences->tokenizer_fingerprint(), p.record);  // of caches, too
  p.model = load_model(p.place.model_folder, p.device.device, p.device.dtype, p.device.master_dtype());
  if (p.leads())
    fmt::print(stderr, "{} on {}{}, {}; context {}, documents: {}\n", p.place.model_folder,
               p.processes > 1 ? fmt::format("{} times ", p.processes) : "", p.device.device.description(), name_of(p.device.dtype),
               format_count(options.context), name_of(p.choice));
  p.start = p.printed = Clock::now();
}

EvalSession::~EvalSession() = default;

const LanguageModel& EvalSession::model() const {
  return *parts_->model;
}

NextSequence EvalSession::next() {
  return [this, number = int64_t{0}](std::vector<int32_t>& tokens) mutable {
    while (parts_->sequences->next(tokens))
      if (number++ % parts_->processes == parts_->rank) return true;
    return false;
  };
}

int64_t EvalSession::train_length() const {
  return parts_->options.train_length > 0 ? parts_->options.train_length : parts_->record.train_length.value_or(0);
}

EvalProgressCall EvalSession::progress() {
  return [this](const EvalProgress& progress) {
    Parts& p = *parts_;
    if (!p.leads() || Clock::now() - p.printed < std::chrono::seconds(5)) return;
    p.printed = Clock::now();
    fmt::print(stderr, "{} sequences done, {} running, up to position {}, {} tokens/s\n", format_count(progress.sequences_done),
               progress.sequences_running, format_count(progress.position),
               format_count(std::llround(static_cast<double>(progress.tokens) / seconds_since(p.start))));
  };
}

void EvalSession::finish(int64_t sequences, int64_t tokens) {
  Parts& p = *parts_;
  p.used = sequences, p.tokens = tokens, p.seconds = seconds_since(p.start);
  if (!p.leads()) return;
  fmt::print(stderr, "{} sequence{} used, {} tokens, {:.1f} s, {} tokens/s\n", format_count(sequences), sequences == 1 ? "" : "s",
             format_count(tokens), p.seconds, format_count(std::llround(static_cast<double>(tokens) / p.seconds)));
  if (p.bad_lines.count() > 0)
    fmt::print(stderr, "{} bad lines left out, the first: {}\n", p.bad_lines.count(), p.bad_lines.first().front());
}

std::FILE* EvalSession::summary_stream() const {
  return parts_->options.out == "-" ? stderr : stdout;
}

void EvalSession::write(const std::string& measure, const std::string& tag, const std::vector<Result>& results,
                        const nlohmann::ordered_json& more) {
  const Parts& p = *parts_;
  if (!p.leads()) return;
  nlohmann::ordered_json description = {
      {"measure", measure},     {"model", p.place.model_folder},  {"step", p.place.step},         {"data_name", data_name(p.options.data)},
      {"data", p.options.data}, {"documents", name_of(p.choice)}, {"context", p.options.context}, {"sequences", p.used},
      {"tokens", p.tokens}};
  description.update(more);
  description.update({{"train_length", train_length()},
                      {"tokenizer_fingerprint", p.sequences->tokenizer_fingerprint()},
                      {"device", p.device.device.description()},
                      {"processes", p.processes},
                      {"dtype", name_of(p.device.dtype)},
                      {"chunk", p.options.chunk},
                      {"batch", p.options.batch},
                      {"bad_lines", p.bad_lines.count()},
                      {"seconds", p.seconds},
                      {"date", utc_now()}});
  const std::string text = description.dump(2) + "\n";
  const bool to_stdout = p.options.out == "-";
  if (to_stdout) fmt::print("{}", results.front().csv), std::fflush(stdout);
  if (!p.options.out.empty() && !to_stdout) write_results(p.options.out, results, text);
  if (const fs::path folder = fs::path(p.place.run_folder) / "eval";
      !p.place.run_folder.empty() && (p.options.out.empty() || to_stdout || !lies_in(p.options.out, folder)))
    write_results(folder / p.file_name(tag), results, text);
}

}  // namespace longhand
