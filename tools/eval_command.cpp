// Perplexity by position on the command line; see eval_command.h.
#include "tools/eval_command.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/device.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/files.h"
#include "data/token_cache.h"
#include "data/tokenizer.h"
#include "eval/perplexity.h"
#include "eval/plot.h"
#include "eval/position_curve.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "tools/option_checks.h"

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
std::shared_ptr<const Tokenizer> tokenizer_for(const EvalPplOptions& options, const RunRecord& record) {
  if (!options.tokenizer.empty()) return open_tokenizer(options.tokenizer);
  if (only_caches(options.data)) return nullptr;
  if (record.tokenizer && (*record.tokenizer == "bytes" || fs::exists(*record.tokenizer))) return open_tokenizer(*record.tokenizer);
  std::vector<ErrorRow> rows{{"model", options.model}};
  if (record.tokenizer) rows.push_back({"recorded", *record.tokenizer + ", which is not there"});
  rows.push_back({"try", "--tokenizer with the tokenizer.json of the training, or bytes"});
  throw ConfigError("eval: the tokenizer of the model is not known", rows);
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

// The curve and, beside it, what it is.
void write_result(const fs::path& csv, const PositionLoss& loss, const nlohmann::ordered_json& description) {
  if (csv.has_parent_path()) fs::create_directories(csv.parent_path());
  write_position_csv(csv.string(), loss);
  write_file_atomically(fs::path(csv).replace_extension(".json").string(), description.dump(2) + "\n");
  fmt::print(stderr, "wrote {}\n", csv.string());
}

void print_summary(std::FILE* to, const PositionLoss& loss, int64_t train_length) {
  const std::vector<int64_t> ends = train_length > 0 ? std::vector<int64_t>{train_length} : std::vector<int64_t>{};
  fmt::print(to, "{:>23}  {:>12}  {:>10}  {:>12}\n", "positions", "tokens", "loss", "perplexity");
  for (const PositionBin& bin : octave_bins(position_bins(loss), 1, ends)) {
    const std::string range = bin.first == bin.last ? format_count(bin.first) : format_count(bin.first) + " - " + format_count(bin.last);
    const bool end = bin.last == train_length && loss.positions() > train_length;
    fmt::print(to, "{:>23}  {:>12}  {:>10.5f}  {:>12.6g}{}\n", range, format_count(static_cast<int64_t>(bin.tokens)), bin.loss,
               bin.perplexity(), end ? "   <- end of the training length" : "");
  }
  fmt::print(to, "{:>23}  {:>12}  {:>10.5f}  {:>12.6g}\n", "all", format_count(loss.total_tokens()), loss.mean_loss(),
             std::exp(loss.mean_loss()));
  std::fflush(to);
}

// One line on stderr at most every few seconds.
class ProgressLines {
 public:
  void operator()(const PositionProgress& progress) {
    const auto now = Clock::now();
    if (now - printed_ < std::chrono::seconds(5)) return;
    printed_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    fmt::print(stderr, "{} sequences done, {} running, up to position {}, {} tokens/s\n", format_count(progress.sequences_done),
               progress.sequences_running, format_count(progress.position),
               format_count(std::llround(static_cast<double>(progress.tokens) / seconds)));
  }

 private:
  Clock::time_point start_ = Clock::now(), printed_ = start_;
};

}  // namespace

void add_eval_ppl_options(CLI::App& command, EvalPplOptions& options) {
  command.add_option("--model", options.model, "A model folder, a checkpoint, or a run (its latest checkpoint)")
      ->required()
      ->type_name("DIR");
  command.add_option("--data", options.data, "Shards (.jsonl.zst, .jsonl), token caches, folders of them")->required()->type_name("FILE");
  command.add_option("--context", options.context, "Positions of each sequence, any number")
      ->required()
      ->type_name("N")
      ->check(at_least(1));
  command.add_option("--chunk", options.chunk, "Tokens of a row at once; the state is carried on")
      ->type_name("N")
      ->check(at_least(1))
      ->capture_default_str();
  command.add_option("--batch", options.batch, "Rows at once")->type_name("B")->check(at_least(1))->capture_default_str();
  command.add_option("--sequences", options.sequences, "At most so many sequences (0: all)")
      ->type_name("N")
      ->check(at_least(0))
      ->capture_default_str();
  auto* documents = command.add_option(
      "--documents", options.documents,
      "long-first: documents longer than the context, the longest if --sequences limits them; min-length: the same in order; "
      "all: short ones too, to their end; packed: documents one behind the other");
  documents->check(CLI::IsMember({"long-first", "min-length", "all", "packed"}))->type_name("CHOICE")->capture_default_str();
  command.add_flag("--packed", options.packed, "The same as --documents packed")->excludes(documents);
  command.add_option("--tokenizer", options.tokenizer, "A tokenizer.json, or bytes (default: the one of the run)")->type_name("FILE");
  command.add_option("--out", options.out, "CSV with every position; - for stdout")->type_name("FILE.csv");
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

int run_eval_ppl(const EvalPplOptions& options) {
  if (fs::path(options.out).extension() == ".json")
    throw ConfigError("eval: --out is the CSV; its description goes to the same name with .json",
                      {{"out", options.out}, {"try", "a name that ends in .csv"}});
  const ModelPlace place = find_model(options.model);
  const RunRecord record = read_run_record(place);
  const int64_t train_length = options.train_length > 0 ? options.train_length : record.train_length.value_or(0);
  const SequenceChoice choice = options.packed ? SequenceChoice::packed : parse_sequence_choice(options.documents);
  const Device device = options.device != "auto" ? Device::parse(options.device) : cuda_device_count() > 0 ? Device::cuda() : Device::cpu();
  const Dtype dtype = options.dtype != "auto" ? parse_dtype(options.dtype) : device.is_cuda() ? Dtype::bf16 : Dtype::f32;

  BadLines bad_lines;
  SourceOptions source;
  source.files = options.data;
  source.threads = options.threads;
  source.skip_bad_lines = options.skip_bad_lines ? &bad_lines : nullptr;
  DocumentSequences sequences(source, tokenizer_for(options, record),
                              {.context = options.context, .choice = choice, .max_sequences = options.sequences});
  const std::string fingerprint = sequences.tokenizer_fingerprint();
  if (record.fingerprint && fingerprint != *record.fingerprint)
    throw ConfigError("eval: the tokenizer is not the one that the model was trained with",
                      {{"tokenizer", fingerprint}, {"trained with", *record.fingerprint}});

  const auto model = load_model(place.model_folder, device, dtype, dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
  fmt::print(stderr, "{} on {}, {}; context {}, documents: {}\n", place.model_folder, device.description(), name_of(dtype),
             format_count(options.context), name_of(choice));

  const auto start = Clock::now();
  const PositionLoss loss =
      position_loss(*model, [&](std::vector<int32_t>& tokens) { return sequences.next(tokens); },
                    {.context = options.context, .chunk = options.chunk, .batch = options.batch, .progress = ProgressLines()});
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  fmt::print(stderr, "{} sequence{} used, {} tokens, {:.1f} s, {} tokens/s\n", format_count(loss.sequences), loss.sequences == 1 ? "" : "s",
             format_count(loss.total_tokens()), seconds, format_count(std::llround(static_cast<double>(loss.total_tokens()) / seconds)));
  if (bad_lines.count() > 0) fmt::print(stderr, "{} bad lines left out, the first: {}\n", bad_lines.count(), bad_lines.first().front());

  nlohmann::ordered_json description = {{"measure", "loss by position"},
                                        {"model", place.model_folder},
                                        {"step", place.step},
                                        {"data_name", data_name(options.data)},
                                        {"data", options.data},
                                        {"documents", name_of(choice)},
                                        {"context", options.context},
                                        {"sequences", loss.sequences},
                                        {"tokens", loss.total_tokens()},
                                        {"mean_loss", loss.mean_loss()},
                                        {"train_length", train_length},
                                        {"tokenizer_fingerprint", fingerprint},
                                        {"device", device.description()},
                                        {"dtype", name_of(dtype)},
                                        {"chunk", options.chunk},
                                        {"batch", options.batch},
                                        {"seconds", seconds},
                                        {"date", utc_now()}};
  const bool to_stdout = options.out == "-";
  if (to_stdout) fmt::print("{}", position_csv(loss));  // before any file: a full disk must not lose what was measured
  print_summary(to_stdout ? stderr : stdout, loss, train_length);
  if (!options.out.empty() && !to_stdout) write_result(options.out, loss, description);
  if (const fs::path folder = fs::path(place.run_folder) / "eval";
      !place.run_folder.empty() && (options.out.empty() || to_stdout || !lies_in(options.out, folder))) {
    const std::string step = place.step >= 0 ? fmt::format("-step-{}", place.step) : "";
    write_result(folder / fmt::format("ppl-{}-{}-{}{}.csv", data_name(options.data), name_of(choice), options.context, step), loss,
                 description);
  }
  return 0;
}

}  // namespace longhand
