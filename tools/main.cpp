// The longhand program: parses the command line, calls one function per subcommand, turns errors into messages and exit codes.
// Exit codes: 0 only on success, 1 for an error, 2 for a command line that cannot be understood, 128 + signal for an interrupted run.
// Messages go to stderr, data to stdout.
#include <fmt/core.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "core/allocator.h"
#include "core/device.h"
#include "core/error.h"
#include "core/switches.h"
#include "tools/bench_command.h"
#include "tools/bench_model_command.h"
#include "tools/bench_scale_command.h"
#include "tools/convert_command.h"
#include "tools/data_commands.h"
#include "tools/doctor_command.h"
#include "tools/eval_command.h"
#include "tools/generate_command.h"
#include "tools/init_command.h"
#include "tools/inspect_command.h"
#include "tools/logits_command.h"
#include "tools/option_checks.h"
#include "tools/report_command.h"
#include "tools/tokenize_command.h"
#include "tools/train_command.h"
#include "train/communicator.h"

namespace longhand {
namespace {

// Every subcommand sets this to what main runs after parsing.
using Action = std::function<int()>;

constexpr int kUsageExitCode = 2;

void add_train(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("train", "Train a model from a recipe, or resume a run");
  auto options = std::make_shared<TrainCommand>();
  command->add_option("recipe", options->recipe, "TOML recipe (see tools/recipes); not with --resume")->type_name("RECIPE.toml");
  command->add_option("--set", options->overrides, "Change one key of the recipe, for example --set train.steps=500; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  command->add_option("--resume", options->resume, "Continue this run from its latest checkpoint, bit for bit")->type_name("RUN");
  command->add_option("--device", options->device, "cpu, cuda or cuda:N (default: the first GPU if there is one, else the CPU)")
      ->type_name("DEVICE");
  command->add_option("--init-from", options->init_from, "Start from the weights of this model, checkpoint or run folder")
      ->type_name("DIR");
  command->add_option("--name", options->name, "Name of the run: its folder is runs/NAME (default: the recipe's)")->type_name("NAME");
  command
      ->add_option("--batch", options->batch,
                   "Rows at once, or auto: as many as fit (train.memory_gib); sets train.grad_accumulation, and a step stays the same")
      ->type_name("N");
  command
      ->add_option("--verify-determinism", options->verify_determinism,
                   "Instead of training do the first N steps twice, and compare every loss, weight and moment bit for bit")
      ->type_name("N")
      ->check(at_least(1));
  command->add_flag("--nccl", options->nccl, "Join GPUs by NCCL even when there is only one, to see what that costs");
  command->add_flag("--help-recipe", options->help_recipe, "List every key of a recipe with type, default and meaning");
  command->callback([=, &action] { action = [=] { return run_train(*options); }; });
}

void add_eval(CLI::App& app, Action& action) {
  add_eval_commands(*app.add_subcommand("eval", "Measure a model"), action);
}

void add_generate(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("generate", "Continue texts, from a prompt or from a saved state");
  auto options = std::make_shared<GenerateCommand>();
  add_generate_options(*command, *options);
  command->callback([=, &action] { action = [=] { return run_generate(*options); }; });
}

void add_logits(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("logits", "Logits, loss, gradients and final states for given tokens, as a safetensors file");
  auto options = std::make_shared<LogitsCommand>();
  add_logits_options(*command, *options);
  command->callback([=, &action] { action = [=] { return run_logits(*options); }; });
}

void add_tokenize(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("tokenize", "Text on stdin to token ids on stdout, or shards to a token cache (--out)");
  auto text = std::make_shared<TokenizeOptions>();
  auto cache = std::make_shared<TokenCacheOptions>();
  command->add_option("--tokenizer", text->tokenizer, "A tokenizer.json, or the word bytes")->required()->type_name("FILE");
  command->add_flag("--jsonl", text->jsonl, "stdin holds {\"text\": ...} objects, one a line");
  command->add_flag(
      "--special,!--no-special", text->parse_special,
      "Read <|endoftext|> and the like in the text as their ids (default), or as plain text (--no-special; training always does)");
  auto* out = command->add_option("--out", cache->out, "Write a token cache of the given shards instead")->type_name("CACHE");
  command->add_option("files", cache->files, "Shards, folders of shards (with --out)")->type_name("FILE")->needs(out);
  command->add_flag("--skip-bad-lines", cache->skip_bad_lines, "Leave out lines that are not documents, and count them (with --out)")
      ->needs(out);
  command->add_option("--threads", cache->threads, "Tokenizing threads (with --out)")
      ->type_name("N")
      ->check(at_least(0))
      ->capture_default_str()
      ->needs(out);
  command->callback([=, &action] {
    action = [=] {
      if (cache->out.empty()) return run_tokenize(*text);
      cache->tokenizer = text->tokenizer;
      return run_tokenize_cache(*cache);
    };
  });
}

void add_data(CLI::App& app, Action& action) {
  auto* data = app.add_subcommand("data", "Check and make shards");
  data->require_subcommand(1);

  auto* check = data->add_subcommand("check", "Documents, bytes and tokens of every shard, or its first fault with file, line and byte");
  auto checked = std::make_shared<DataCheckOptions>();
  check->add_option("files", checked->files, "Shards (.jsonl.zst, .jsonl), token caches, folders")->required()->type_name("FILE");
  check->add_option("--tokenizer", checked->tokenizer, "Count tokens with this tokenizer.json, or bytes")->type_name("FILE");
  check->add_flag("--skip-bad-lines", checked->skip_bad_lines, "Count bad lines instead of stopping at the first");
  check->add_option("--threads", checked->threads, "Tokenizing threads")->type_name("N")->check(at_least(0))->capture_default_str();
  check->callback([=, &action] { action = [=] { return run_data_check(*checked); }; });

  auto* pack = data->add_subcommand("pack", "Text files of a folder into a shard in the Pile's form");
  auto packed = std::make_shared<PackOptions>();
  pack->add_option("folder", packed->folder, "Searched with its subfolders")->required()->type_name("DIR");
  pack->add_option("--out", packed->out, "The shard to write")->required()->type_name("F.jsonl.zst");
  pack->add_option("--set-name", packed->set_name, "meta.pile_set_name of every document")->type_name("NAME")->capture_default_str();
  pack->add_option("--include", packed->include, "Only files that match this pattern, such as *.txt; may be repeated (default: every file)")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  pack->add_option("--exclude", packed->exclude, "No files that match this pattern; may be repeated")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  pack->add_option("--shuffle-seed", packed->shuffle_seed, "Shuffle the documents with this seed (default: order of the paths)")
      ->type_name("N");
  pack->add_option("--split-val", packed->val_fraction, "This share of the documents, from 0 to below 1, goes to --val-out")
      ->type_name("SHARE")
      ->capture_default_str();
  pack->add_option("--val-out", packed->val_out, "Shard for the validation documents")->type_name("F.jsonl.zst");
  pack->add_option("--level", packed->zstd_level, "Compression level of zstd")->type_name("N")->capture_default_str();
  pack->callback([=, &action] { action = [=] { return run_data_pack(*packed); }; });
}

void add_convert(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("convert", "A model folder in the layout of another library, bit for bit");
  auto options = std::make_shared<ConvertCommand>();
  add_convert_options(*command, *options);
  command->callback([=, &action] { action = [=] { return run_convert(*options); }; });
}

void add_init(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("init", "A model folder with the fresh weights of a recipe");
  auto options = std::make_shared<InitCommand>();
  add_init_options(*command, *options);
  command->callback([=, &action] { action = [=] { return run_init(*options); }; });
}

void add_inspect(CLI::App& app, Action& action) {
  auto* command =
      app.add_subcommand("inspect", "Configuration, parameters, FLOPs and bytes per token, state sizes; or the environment switches");
  auto options = std::make_shared<InspectOptions>();
  command
      ->add_option("target", options->target,
                   "A model or run folder, a tensor file or index (.safetensors, .bin, .pt, .index.json), a recipe, or the word switches")
      ->required()
      ->type_name("DIR|FILE");
  command->add_option("--set", options->overrides, "Change one key of the recipe, for example --set model.d_model=1024; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  command->add_flag("--all", options->all_parameters, "One line per tensor instead of one per kind");
  command->callback([=, &action] { action = [=] { return run_inspect(*options); }; });
}

void add_bench(CLI::App& app, Action& action) {
  auto* bench = app.add_subcommand("bench", "Measure speed");
  bench->require_subcommand(1);

  auto* ops = bench->add_subcommand("ops", "Every op beside the floor that this machine's copy and matrix product rates set");
  auto timed = std::make_shared<BenchOpsOptions>();
  ops->add_option("--device", timed->device, "cpu, cuda, cuda:N, or auto: a GPU if there is one")
      ->type_name("DEVICE")
      ->capture_default_str();
  ops->add_option("--dtype", timed->dtype, "auto (bf16 on a GPU, f32 on a CPU), f32 or bf16")->type_name("TYPE")->capture_default_str();
  ops->add_option("--op", timed->op, "Only this op")->type_name("OP");
  ops->add_option("--shape", timed->shape, "One shape of that op, in the names that its table shows: B=4,T=4096")->type_name("SIZES");
  ops->add_option("--repeats", timed->repeats, "Measurements per figure; the median is shown")
      ->type_name("N")
      ->check(at_least(1))
      ->capture_default_str();
  ops->add_flag("--csv", timed->csv, "Comma separated values");
  ops->callback([=, &action] { action = [=] { return run_bench_ops(*timed); }; });

  auto* data = bench->add_subcommand("data", "MB/s of reading, parsing and tokenizing shards");
  auto read = std::make_shared<BenchDataOptions>();
  data->add_option("files", read->files, "Shards or folders of shards")->required()->type_name("FILE");
  data->add_option("--tokenizer", read->tokenizer, "A tokenizer.json, or bytes")->type_name("FILE")->capture_default_str();
  data->add_option("--threads", read->threads, "Threads of the last row")->type_name("N")->check(at_least(0))->capture_default_str();
  data->callback([=, &action] { action = [=] { return run_bench_data(*read); }; });

  auto models = std::make_shared<BenchModelOptions>();
  auto* train =
      bench->add_subcommand("train", "Whole training steps of models on random tokens: tokens/s, MFU, peak memory, share of the floor");
  auto* prefill = bench->add_subcommand("prefill", "Long prompts of random tokens at constant memory");
  auto* decode = bench->add_subcommand("decode", "One token after the other, drawn ids read by the host");
  add_bench_model_options(*train, *prefill, *decode, *models);
  train->callback([=, &action] { action = [=] { return run_bench_train(*models); }; });
  prefill->callback([=, &action] { action = [=] { return run_bench_prefill(*models); }; });
  decode->callback([=, &action] { action = [=] { return run_bench_decode(*models); }; });

  auto* scale =
      bench->add_subcommand("scale", "What several processes gain over one and what they tell each other; started by mpirun or srun");
  auto several = std::make_shared<BenchScaleOptions>();
  add_bench_scale_options(*scale, *several);
  scale->callback([=, &action] { action = [=] { return run_bench_scale(*several); }; });
}

void add_doctor(CLI::App& app, Action& action) {
  auto* command =
      app.add_subcommand("doctor", "Examine build, libraries, devices and data, and compute known answers; says how to mend what is wrong");
  auto options = std::make_shared<DoctorCommand>();
  add_doctor_options(*command, *options);
  command->callback([=, &action] { action = [=] { return run_doctor(*options); }; });
}

void add_report(CLI::App& app, Action& action) {
  auto* command = app.add_subcommand("report", "One self-contained HTML page with the curves of one or several runs");
  auto options = std::make_shared<ReportOptions>();
  command->add_option("runs", options->runs, "Run folders")->required()->type_name("RUN");
  command->add_option("--out", options->out, "The page to write (default: report.html in the first run)")->type_name("FILE.html");
  command->callback([=, &action] { action = [=] { return run_report(*options); }; });
}

// The subcommand that the words name, as far as they do: "longhand data check" for "data check a.jsonl --no-such-option".
// `unknown` becomes the word that stands where a subcommand should, if it is none.
const CLI::App* named_subcommand(const CLI::App& app, int argc, char** argv, std::string& unknown) {
  const CLI::App* command = &app;
  for (int i = 1; i < argc && !command->get_subcommands({}).empty(); ++i) {
    const CLI::App* next = nullptr;
    for (const CLI::App* candidate : command->get_subcommands({}))
      if (candidate->get_name() == argv[i]) next = candidate;
    if (next == nullptr) {
      unknown = argv[i][0] == '-' ? "" : argv[i];
      break;
    }
    command = next;
  }
  return command;
}

// What is wrong with the command line, and where to read more; in the form of all other errors.
std::string usage_message(const CLI::App& app, int argc, char** argv, const CLI::ParseError& problem) {
  std::string unknown, path;
  const CLI::App* command = named_subcommand(app, argc, argv, unknown);
  for (const CLI::App* at = command; at != nullptr; at = at->get_parent()) path = at->get_name() + (path.empty() ? "" : " ") + path;
  if (unknown.empty()) return fmt::format("error: {}: {}\n  try  {} --help\n", path, problem.what(), path);
  std::string known;
  for (const CLI::App* sub : command->get_subcommands({})) known += (known.empty() ? "" : ", ") + sub->get_name();
  return fmt::format("error: {}: no such subcommand\n  given  {}\n  known  {}\n  try    {} --help\n", path, unknown, known, path);
}

// Commands that several processes do together; of the others they would do the same thing several times.
void require_alone_unless_shared(const CLI::App& app, int argc, char** argv) {
  if (launched_processes() == 1) return;
  std::string unknown, path;
  for (const CLI::App* at = named_subcommand(app, argc, argv, unknown); at->get_parent() != nullptr; at = at->get_parent())
    path = at->get_name() + (path.empty() ? "" : " ") + path;
  for (const char* shared : {"train", "eval ppl", "bench scale"})
    if (path == shared) return;
  throw ConfigError("longhand: a command for one process was started as several",
                    {{"command", path},
                     {"processes", std::to_string(launched_processes())},
                     {"try", "without mpirun or srun; several processes can train, eval ppl and bench scale"}});
}

int run(int argc, char** argv) {
  CLI::App app{
      "longhand: recurrent language models from scratch. Train, measure and cure length generalisation.\n"
      "Environment switches: longhand inspect switches.",
      "longhand"};
  app.set_version_flag("--version", std::string("longhand ") + LONGHAND_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Action action;
  add_train(app, action);
  add_eval(app, action);
  add_generate(app, action);
  add_logits(app, action);
  add_tokenize(app, action);
  add_data(app, action);
  add_convert(app, action);
  add_init(app, action);
  add_inspect(app, action);
  add_bench(app, action);
  add_report(app, action);
  add_doctor(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& problem) {
    if (problem.get_exit_code() == 0) return app.exit(problem);  // --help, --version
    fmt::print(stderr, "{}", usage_message(app, argc, argv, problem));
    return kUsageExitCode;
  }
  switches();  // read here, so that a value that a switch does not take is reported before any work
  for (const std::string& name : unknown_switches())
    fmt::print(stderr, "warning: {} is not a switch that longhand knows; see longhand inspect switches\n", name);
  require_alone_unless_shared(app, argc, argv);
  const int code = action();
  if (switches().memory) {
    for (const Device& device : Device::opened()) fmt::print(stderr, "{}\n{}", device.name(), memory_report(device.allocator().use()));
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) throw FileError("longhand: stdout could not take all of the output");
  return code;
}

}  // namespace
}  // namespace longhand

// Threads that prepare data hand texts and tokens to others. With an arena for every thread malloc would keep what comes back in a dozen
// places, and a long run's memory would creep up for minutes (docs/decisions.md).
static void share_malloc_arenas() {
#ifdef __GLIBC__
  mallopt(M_ARENA_MAX, 2);
#endif
}

int main(int argc, char** argv) {
  share_malloc_arenas();
  try {
    return longhand::run(argc, argv);
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "error: the host's memory ran out\n  try  smaller sizes (train.batch_size, train.length, --context, --batch)\n");
    return 1;
  } catch (const std::exception& problem) {
    fmt::print(stderr, "error: {}\n", problem.what());
    return 1;
  }
}
