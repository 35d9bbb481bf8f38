// See generate_command.h.
#include "tools/generate_command.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "eval/generation.h"
#include "eval/plot.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "tools/device_options.h"
#include "tools/model_tokenizer.h"
#include "tools/option_checks.h"
#include "train/interrupt.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

std::string read_input(const std::string& path) {
  if (path != "-") return read_text_file(path, std::numeric_limits<std::size_t>::max());
  std::string text{std::istreambuf_iterator<char>(std::cin), {}};
  if (std::cin.bad()) throw FileError("generate: stdin could not be read");
  return text;
}

std::vector<std::string> read_prompt_lines(const std::string& path) {
  std::vector<std::string> prompts;
  std::istringstream in(read_input(path));
  std::string line;
  for (std::size_t number = 1; std::getline(in, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto json = nlohmann::json::parse(line, nullptr, false);
    const auto text = [&](const char* key) { return json.is_object() && json.contains(key) && json[key].is_string(); };
    if (text("prompt") == text("text"))  // neither, or which of the two?
      throw FileError("generate: a line is not a JSON object with one prompt",
                      {{"file", path}, {"line", std::to_string(number)}, {"expected", "{\"prompt\": \"...\"} or {\"text\": \"...\"}"}});
    prompts.push_back(json[text("prompt") ? "prompt" : "text"].get<std::string>());
  }
  if (prompts.empty()) throw FileError("generate: the file holds no prompts", {{"file", path}});
  return prompts;
}

std::vector<std::string> prompts_of(const GenerateCommand& options) {
  if (!options.prompt_file.empty()) return {read_input(options.prompt_file)};
  if (!options.prompts_file.empty()) return read_prompt_lines(options.prompts_file);
  if (options.prompts.empty() && options.load_state.empty())
    throw ConfigError("generate: there is nothing to continue", {{"expected", "--prompt, --prompt-file, --prompts or --load-state"},
                                                                 {"try", "--prompt \"\" for a text from nothing"}});
  return options.prompts;
}

std::optional<int32_t> end_of_text_of(const Tokenizer& tokenizer, const LanguageModel& model) {
  try {
    const int32_t id = tokenizer.end_of_text();
    return id < model.config().vocab_size ? std::optional(id) : std::nullopt;
  } catch (const ValueError&) {
    return std::nullopt;  // a tokenizer without one
  }
}

// Writes rows to stdout as they become known. Once stdout has not taken a text, nothing more is written: the caller asks for the failure
// when the state is safe.
class Printer {
 public:
  Printer(const GenerateCommand& options, std::vector<std::string> echoes) : options_(options), echoes_(std::move(echoes)) {}

  // A single row grows on the screen.
  void stream(const GeneratedRow& row) {
    if (options_.json) return;
    write(std::string_view(row.text).substr(printed_));
    printed_ = row.text.size();
  }
  void begin_stream() {
    if (!options_.json) write(echo(0));
  }
  void end_stream(const GeneratedRow& row) {
    stream(row);
    if (options_.json) print(0, row);
    else if (isatty(STDOUT_FILENO) && !row.text.ends_with('\n')) write("\n");
  }

  void print(std::size_t index, const GeneratedRow& row) {
    if (!options_.json) return write(echo(index) + row.text + "\n");
    nlohmann::ordered_json json = {{"row", index},
                                   {"prompt_tokens", row.prompt_tokens},
                                   {"text", echo(index) + row.text},
                                   {"tokens", row.tokens},
                                   {"stop", name_of(row.stop)}};
    const double seconds = row.decode_seconds;
    json["tokens_per_s"] = seconds > 0 ? static_cast<double>(row.tokens.size()) / seconds : 0.0;
    write(json.dump() + "\n");
  }

  const std::string& failure() const { return failure_; }  // the system's words; empty: none

 private:
  std::string echo(std::size_t row) const {
    if (!options_.echo || echoes_.empty()) return "";
    return echoes_[echoes_.size() == 1 ? 0 : row];
  }
  void write(std::string_view text) {
    if (!failure_.empty()) return;
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) failure_ = std::strerror(errno);
  }

  const GenerateCommand& options_;
  std::vector<std::string> echoes_;
  std::size_t printed_ = 0;
  std::string failure_;
};

void print_speed(const GenerationSpeed& speed) {
  fmt::print(stderr, "prefill {} tokens, {:.1f} tokens/s; decode {} tokens, {:.1f} tokens/s\n", format_count(speed.prefill_tokens),
             speed.prefill_tokens_per_s(), format_count(speed.decode_tokens), speed.decode_tokens_per_s());
}

}  // namespace

void add_generate_options(CLI::App& command, GenerateCommand& o) {
  command.add_option("--model", o.model, "A model folder, a checkpoint, or a run (its latest checkpoint)")->required()->type_name("DIR");
  auto* prompt = command.add_option("--prompt", o.prompts, "Text to continue; may be repeated. \"\": from the end-of-text token");
  prompt->type_name("TEXT")->allow_extra_args(false);
  auto* file = command.add_option("--prompt-file", o.prompt_file, "A file with one prompt, of any length; - for stdin");
  auto* lines = command.add_option("--prompts", o.prompts_file, "A prompt a line: {\"prompt\": ...} or {\"text\": ...}; - for stdin");
  file->type_name("FILE")->excludes(prompt);
  lines->type_name("FILE.jsonl")->excludes(prompt)->excludes(file);
  command.add_option("--tokenizer", o.tokenizer, "A tokenizer.json, or bytes (default: the run's, or tokenizer.json beside the model)")
      ->type_name("FILE");
  command.add_flag("--special,!--no-special", o.parse_special,
                   "Read <|endoftext|> and the like in a prompt as their ids (default), or as plain text (--no-special)");
  const auto count = [&](const char* name, int64_t& value, const char* meaning, int64_t least) {
    command.add_option(name, value, meaning)->type_name("N")->check(at_least(least))->capture_default_str();
  };
  const auto number = [&](const char* name, double& value, const char* meaning) {
    command.add_option(name, value, meaning)->type_name("X")->capture_default_str();
  };
  count("--max-tokens", o.max_tokens, "At most so many tokens a row; 0 only reads the prompts", 0);
  number("--temperature", o.sampling.temperature, "Divides the logits; 0: always the most probable token");
  count("--top-k", o.sampling.top_k, "Only the K most probable tokens; 0: off", 0);
  number("--top-p", o.sampling.top_p, "Only the most probable tokens that together reach this probability; 1: off");
  number("--min-p", o.sampling.min_p, "Only tokens at least so many times as probable as the first; 0: off");
  number("--repetition-penalty", o.sampling.repetition_penalty, "Makes tokens of the text so far less probable; 1: off");
  command.add_option("--seed", o.sampling.seed, "Of the random draws; the same seed gives the same text")
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--stop", o.stop, "A text that ends a row, and is not printed; may be repeated")
      ->type_name("TEXT")
      ->allow_extra_args(false);
  command.add_option("--load-state", o.load_state, "Go on from this state: one row for all prompts, or a row a prompt")->type_name("F");
  command.add_option("--save-state", o.save_state, "Write the state after the last token, to go on from")->type_name("F.safetensors");
  count("--chunk", o.chunk, "Tokens of a prompt at once; the state is carried on", 1);
  count("--batch", o.batch, "Rows at once", 1);
  command.add_option("--device", o.device, "cpu, cuda, cuda:N, or auto: a GPU if there is one")->type_name("DEVICE")->capture_default_str();
  command.add_option("--dtype", o.dtype, "f32, bf16, f64, or auto: bf16 on a GPU, f32 on a CPU")->type_name("TYPE")->capture_default_str();
  command.add_flag("--json", o.json, "One JSON object a row: row, prompt_tokens, text, tokens, stop, tokens_per_s");
  command.add_flag("--echo", o.echo, "Print the prompt before its continuation");
}

int run_generate(const GenerateCommand& options) {
  require_sampling_options(options.sampling);
  const ModelPlace place = find_model(options.model);
  const auto tokenizer =
      open_model_tokenizer("generate", options.tokenizer, place, read_run_record(place), {.parse_special = options.parse_special});
  const std::vector<std::string> texts = prompts_of(options);
  std::vector<std::vector<int32_t>> prompts;
  for (const std::string& text : texts) tokenizer->encode(text, prompts.emplace_back());
  const DeviceChoice choice = choose_device(options.device, options.dtype);
  const auto model = load_model(place.model_folder, choice.device, choice.dtype, choice.master_dtype());
  GenerationState from;
  if (!options.load_state.empty()) {
    from = GenerationState::load(options.load_state, *model);
    if (from.weights != weights_fingerprint(*model))
      fmt::print(stderr, "warning: {} was made with other weights than those of {}\n", options.load_state, place.model_folder);
  }

  const InterruptGuard guard;
  std::signal(SIGPIPE, SIG_IGN);  // a reader that goes away is a write that fails
  fmt::print(stderr, "{} on {}, {}\n", place.model_folder, choice.device.description(), name_of(choice.dtype));
  Printer printer(options, texts);
  const bool single = std::max(prompts.size(), from.sequences.size()) == 1;
  std::vector<std::optional<GeneratedRow>> finished;  // waiting for the rows before them
  std::size_t printed = 0;
  GenerationOptions generation{.max_tokens = options.max_tokens,
                               .sampling = options.sampling,
                               .chunk = options.chunk,
                               .batch = options.batch,
                               .end_of_text = end_of_text_of(*tokenizer, *model),
                               .stop = options.stop,
                               .tokenizer = tokenizer.get(),
                               .keep_state = !options.save_state.empty(),
                               .on_token = {},
                               .should_stop = [&] { return guard.signal() != 0 || !printer.failure().empty(); }};
  generation.on_token = [&](std::size_t row, const GeneratedRow& so_far) {
    if (single) return printer.stream(so_far);
    if (so_far.stop == StopReason::none) return;
    if (finished.size() <= row) finished.resize(row + 1);
    finished[row] = so_far;
    for (; printed < finished.size() && finished[printed]; ++printed)
      printer.print(printed, *std::exchange(finished[printed], GeneratedRow()));
  };
  if (single) printer.begin_stream();
  const Generation result = generate(*model, prompts, generation, from);
  if (!options.save_state.empty()) result.state.save(options.save_state, *model);
  if (single) printer.end_stream(result.rows.front());
  else
    for (; printed < result.rows.size(); ++printed) printer.print(printed, result.rows[printed]);
  print_speed(result.speed);
  if (!printer.failure().empty()) {
    std::vector<ErrorRow> rows{{"reason", printer.failure()}};
    if (!options.save_state.empty()) rows.push_back({"try", "--load-state " + options.save_state + ", which is as far as this came"});
    throw FileError("generate: stdout could not take all of the text", std::move(rows));
  }
  if (guard.signal() == 0) return 0;
  fmt::print(stderr, "interrupted{}\n", options.save_state.empty() ? "" : "; go on with --load-state " + options.save_state);
  return 128 + guard.signal();
}

}  // namespace longhand
