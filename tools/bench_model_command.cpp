// See bench_model_command.h.
#include "tools/bench_model_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "core/op_ledger.h"
#include "core/philox.h"
#include "eval/sampling.h"
#include "models/decoder.h"
#include "tools/ceilings.h"
#include "tools/device_options.h"
#include "tools/option_checks.h"
#include "tools/peer_figures.h"
#include "train/memory_fit.h"
#include "train/progress.h"
#include "train/trainer.h"

namespace longhand {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kWarmSteps = 4;
constexpr int64_t kPrefillTokens = 131072, kDecodeSteps = 256, kParts = 8;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocab, uint64_t key) {
  std::vector<int32_t> tokens(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(philox_u64(key, i) % static_cast<uint64_t>(vocab));
  return tokens;
}

Batch random_batch(const Recipe& recipe, uint64_t key) {
  Batch batch;
  batch.rows = recipe.train.batch_size;
  batch.length = recipe.train.length;
  const int64_t positions = batch.rows * batch.length;
  batch.tokens = random_tokens(positions, recipe.model.vocab_size, 2 * key);
  batch.targets = random_tokens(positions, recipe.model.vocab_size, 2 * key + 1);
  batch.mask.assign(static_cast<std::size_t>(positions), 1);
  batch.resets.assign(static_cast<std::size_t>(batch.rows), 0);
  for (int64_t b = 0; b < batch.rows; ++b) batch.row_ids.push_back(static_cast<int64_t>(key) * batch.rows + b);
  return batch;
}

std::string name_of_recipe(const std::string& path) {
  return std::filesystem::path(path).stem().string();
}

LanguageModel fresh_model(const ModelConfig& config, const DeviceChoice& choice) {
  LanguageModel model(config, choice.device, choice.dtype, choice.master_dtype());
  model.initialize(1);
  return model;
}

std::string peak_text(const Device& device) {
  return bytes_text(device.allocator().use().peak_bytes);
}

void print_ceilings(const DeviceChoice& choice, const Ceilings& ceilings) {
  fmt::print("device {}\n{}\n\n", choice.device.description(), ceilings.text(choice.dtype));
}

constexpr const char* kAutoBatch = "auto";

int64_t rows_of(const std::string& text) {
  int64_t rows = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), rows);
  if (status != std::errc{} || end != text.data() + text.size() || rows < 1)
    throw ConfigError("bench: not a number of rows", {{"--batch", text}, {"expected", "a number from 1; bench train: or auto"}});
  return rows;
}

std::vector<int64_t> batches_or(const BenchModelOptions& options, int64_t fallback) {
  std::vector<int64_t> batches;
  for (const std::string& text : options.batches) batches.push_back(rows_of(text));
  return batches.empty() ? std::vector<int64_t>{fallback} : batches;
}

// What each op of one more step took and cannot avoid; printed only on demand.
// returns  the sum of the ops' floors in ms: for each op and shape the larger of bytes / copy rate and flops of products / their rate
double ops_of_step(const Device& device, const Ceilings& ceilings, const BenchModelOptions& options, bool print,
                   const std::function<void()>& step) {
  OpLedger ledger(device);
  step();
  struct Line {
    double ms = 0, floor_ms = 0;
    int64_t count = 0;
    std::string op;
  };
  std::map<std::string, Line> by_op;
  double sum = 0, floor_sum = 0;
  for (const auto& [op_and_shapes, row] : ledger.rows()) {
    const double floor_ms = 1e3 * std::max(row.bytes / ceilings.copy_bytes_per_s, row.flops / ceilings.product_flops_per_s);
    const std::string op = options.by_shape ? op_and_shapes : op_and_shapes.substr(0, op_and_shapes.find(' '));
    Line& line = by_op[op];
    line = {line.ms + row.ms, line.floor_ms + floor_ms, line.count + row.count, op};
    sum += row.ms;
    floor_sum += floor_ms;
  }
  if (!print) return floor_sum;
  std::vector<Line> lines;
  for (const auto& [op, line] : by_op) lines.push_back(line);
  std::sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) { return a.ms > b.ms; });
  std::size_t width = 32;
  for (const Line& line : lines) width = std::max(width, line.op.size() + 1);
  fmt::print("    {:<{}}{:>7}{:>11}{:>8}{:>11}{:>8}\n", "op", width, "times", "ms", "part", "floor ms", "share");
  for (const Line& line : lines)
    fmt::print("    {:<{}}{:>7}{:>11.3f}{:>7.1f}%{:>11.3f}{:>7.0f}%\n", line.op, width, line.count, line.ms, 100 * line.ms / sum,
               line.floor_ms, 100 * line.floor_ms / line.ms);
  fmt::print("    {:<{}}{:>11.3f}{:>19.3f}  launch by launch\n", "sum", width + 7, sum, floor_sum);
  return floor_sum;
}

void train_case(const Recipe& recipe, const std::string& name, const DeviceChoice& choice, const Ceilings& ceilings,
                const BenchModelOptions& options) {
  const Device& device = choice.device;
  LanguageModel model = fresh_model(recipe.model, choice);
  Trainer trainer(recipe, model);
  std::vector<Batch> batches;
  for (uint64_t i = 0; i < 4; ++i) batches.push_back(random_batch(recipe, i));
  std::size_t count = 0;
  const auto step = [&] { trainer.step(batches[count++ % batches.size()]); };
  device.allocator().reset_peak();
  for (int i = 0; i < kWarmSteps; ++i) step();
  device.synchronize();
  const auto begin = Clock::now();
  for (int64_t i = 0; i < options.steps; ++i) step();
  device.synchronize();
  const double ms = ms_since(begin) / static_cast<double>(options.steps),
               tokens = static_cast<double>(recipe.train.batch_size * recipe.train.length);
  const double flops = model.training_flops_per_token() * tokens, peak = device.is_cuda() ? trainer.link().bf16_peak_flops() : 0;
  const std::string peak_memory = peak_text(device);
  const double peak_gib = static_cast<double>(device.allocator().use().peak_bytes) / (int64_t{1} << 30), tokens_per_s = tokens / ms * 1e3;
  const double floor_ms = ops_of_step(device, ceilings, options, false, step);
  const ModelFigures known =
      choice.dtype == Dtype::bf16 ? training_figures(name, recipe.train.batch_size, recipe.train.length) : ModelFigures{};
  fmt::print("{:<16}{:>6}{:>7}  {:<12}{:>9.2f}{:>11.0f}{:>7}{:>10.2f}{:>6.0f}%  {:<10}{:>10}{:>8}  {:<14}{:<14}{}\n", name,
             recipe.train.batch_size, recipe.train.length, recipe.train.recompute, ms, tokens_per_s,
             peak > 0 ? fmt::format("{:.1f}%", 100 * flops / (ms / 1e3) / peak) : "-", floor_ms, 100 * floor_ms / ms, peak_memory,
             known.peer_tokens_per_s > 0 ? fmt::format("{:.0f}", known.peer_tokens_per_s) : "",
             known.peer_tokens_per_s > 0 ? fmt::format("{:.2f}x", tokens_per_s / known.peer_tokens_per_s) : "",
             verdict(tokens_per_s, known.target_tokens_per_s, false), verdict(peak_gib, known.target_peak_gib, true), trainer.queued());
  if (options.by_op || options.by_shape) (void)ops_of_step(device, ceilings, options, true, step);
  std::fflush(stdout);
}

void prefill_case(const ModelConfig& config, const std::string& name, int64_t batch, const DeviceChoice& choice, const Ceilings& ceilings,
                  const BenchModelOptions& options) {
  const Device& device = choice.device;
  const LanguageModel model = fresh_model(config, choice);
  const int64_t total = options.tokens > 0 ? options.tokens : kPrefillTokens, chunk = std::min(options.chunk, total);
  const NoGrad no_grad;
  std::vector<Tensor> chunks;
  for (uint64_t i = 0; i < 4; ++i)
    chunks.push_back(Tensor::from(device, {batch, chunk}, random_tokens(batch * chunk, config.vocab_size, i)));
  const Tensor one_token = chunks[0].slice(1, 0, 1).contiguous();
  (void)model.forward(chunks[0], model.zero_state(batch));  // whatever is made once
  (void)model.logits(model.forward(one_token, model.zero_state(batch)).hidden.value());
  RecurrentState state = model.zero_state(batch);
  const int64_t count = std::max<int64_t>(1, total / chunk), part = std::max<int64_t>(1, count / kParts);
  std::string first_peak;
  double first_ms = 0;
  device.synchronize();
  device.allocator().reset_peak();
  const auto begin = Clock::now();
  auto last_part = begin;
  for (int64_t i = 0; i < count; ++i) {
    if (i == count - part) {
      device.synchronize();
      last_part = Clock::now();
    }
    state = model.forward(chunks[static_cast<std::size_t>(i) % chunks.size()], state).state;
    if (i + 1 == part) {
      device.synchronize();
      first_peak = peak_text(device);
      first_ms = ms_since(begin);
    }
  }
  (void)model.logits(model.forward(one_token, state).hidden.value());
  device.synchronize();
  const double ms = ms_since(begin), part_tokens = static_cast<double>(batch * part * chunk),
               tokens = static_cast<double>(batch * count * chunk);
  const double last_ms = ms_since(last_part);
  fmt::print("{:<16}{:>7}{:>10}{:>8}{:>12.1f}{:>12.0f}{:>14.0f}{:>14.0f}  {} / {}\n", name, batch, count * chunk, chunk, ms,
             tokens / ms * 1e3, part_tokens / first_ms * 1e3, part_tokens / last_ms * 1e3, first_peak, peak_text(device));
  if (options.by_op || options.by_shape) (void)ops_of_step(device, ceilings, options, true, [&] { (void)model.forward(chunks[0], state); });
  std::fflush(stdout);
}

void decode_case(const ModelConfig& config, const std::string& name, int64_t batch, const DeviceChoice& choice, const Ceilings& ceilings,
                 const BenchModelOptions& options) {
  const Device& device = choice.device;
  LanguageModel model = fresh_model(config, choice);
  const RecurrentState zero = model.zero_state(batch);
  std::optional<BatchSampler> drawing;
  DecoderOptions with;
  if (device.is_cuda()) {
    std::vector<BatchSampler::Row> rows;
    for (int64_t b = 0; b < batch; ++b) rows.push_back({static_cast<uint64_t>(b), 0, {}});
    drawing.emplace(device, SamplingOptions{.temperature = 0}, std::vector<int32_t>{}, config.vocab_size, rows);
    with.then = [&](const Tensor& logits) { drawing->queue(logits); };
  }
  Decoder decoder(model, zero, with);
  const int64_t steps = options.tokens > 0 ? options.tokens : kDecodeSteps;
  const std::vector<int32_t> tokens = random_tokens(batch * 16, config.vocab_size, 3);
  const auto step = [&](int64_t i) {  // as generation does, but for the tokens that it goes on with
    const auto from = tokens.begin() + (i % 16) * batch;
    const Tensor& logits = decoder.step(std::vector<int32_t>(from, from + batch));
    if (drawing) (void)drawing->ids();
    else (void)logits.to_vector<float>();
  };
  for (int64_t i = 0; i < kWarmSteps; ++i) step(i);
  device.synchronize();
  const auto begin = Clock::now();
  for (int64_t i = 0; i < steps; ++i) step(i);
  device.synchronize();
  const double ms = ms_since(begin) / static_cast<double>(steps);
  const int64_t looked_up = config.tie_embeddings ? 0 : config.padded_vocab() * config.d_model;  // an embedding of which a row is read
  const double bytes =
      static_cast<double>((model.parameter_count() - looked_up) * size_of(choice.dtype)) + 2 * static_cast<double>(zero.size_bytes());
  const double floor_ms = 1e3 * bytes / ceilings.copy_bytes_per_s;
  const double tokens_per_s = static_cast<double>(batch) / ms * 1e3;
  fmt::print("{:<16}{:>7}{:>8}{:>12.3f}{:>14.0f}{:>10.3f}{:>7.0f}%  {:<12}{:<14}{}\n", name, batch, steps, ms, tokens_per_s, floor_ms,
             100 * floor_ms / ms, peak_text(device), verdict(tokens_per_s, decode_target(name, static_cast<long>(batch)), false),
             decoder.joined_kernels() ? "joined kernels" : "op by op");
  if (options.by_op || options.by_shape) (void)ops_of_step(device, ceilings, options, true, [&] { step(0); });
  std::fflush(stdout);
}

}  // namespace

void add_bench_model_options(CLI::App& train, CLI::App& prefill, CLI::App& decode, BenchModelOptions& o) {
  for (CLI::App* command : {&train, &prefill, &decode}) {
    command->add_option("recipes", o.recipes, "Recipes: their models with fresh weights")->required()->type_name("RECIPE.toml");
    command->add_option("--set", o.settings, "Change one key of every recipe; may be repeated")
        ->type_name("KEY=VALUE")
        ->allow_extra_args(false);
    command->add_option("--device", o.device, "cpu, cuda, cuda:N, or auto: a GPU if there is one")
        ->type_name("DEVICE")
        ->capture_default_str();
    command->add_option("--dtype", o.dtype, "f32, bf16, or auto: bf16 on a GPU, f32 on a CPU")->type_name("TYPE")->capture_default_str();
    command->add_option("--batch", o.batches, "Rows at once; several are measured one after the other. train: auto is as many as fit")
        ->type_name("N");
  }
  train.add_option("--steps", o.steps, "Timed steps")->type_name("N")->check(at_least(1))->capture_default_str();
  for (CLI::App* command : {&train, &prefill, &decode}) {
    command->add_flag("--by-op", o.by_op, "Also the milliseconds of each op");
    command->add_flag("--by-shape", o.by_shape, "The same for each op and shape of its inputs");
  }
  prefill.add_option("--tokens", o.tokens, "Of a row; 0: 131,072")->type_name("N")->check(at_least(0))->capture_default_str();
  prefill.add_option("--chunk", o.chunk, "Tokens of a row at once")->type_name("N")->check(at_least(1))->capture_default_str();
  decode.add_option("--tokens", o.tokens, "Timed steps; 0: 256")->type_name("N")->check(at_least(0))->capture_default_str();
}

int run_bench_train(const BenchModelOptions& options) {
  const DeviceChoice choice = choose_device(options.device, options.dtype);
  const Ceilings ceilings = measure_ceilings(choice.device, choice.dtype);
  print_ceilings(choice, ceilings);
  fmt::print("{:<16}{:>6}{:>7}  {:<12}{:>9}{:>11}{:>7}{:>10}{:>7}  {:<10}{:>10}{:>8}  {:<14}{:<14}{}\n", "model", "batch", "length",
             "again", "ms/step", "tokens/s", "MFU", "floor ms", "share", "memory", "peer tok/s", "faster", "speed/target", "memory/target",
             "queued as");
  for (const std::string& path : options.recipes) {
    Recipe recipe = read_recipe(path, options.settings);
    recipe.model = recipe_model_config(path, options.settings);
    recipe.model.complete();
    recipe.train.dtype = name_of(choice.dtype);
    const bool automatic = options.batches.size() == 1 && options.batches[0] == kAutoBatch;
    const auto batches = automatic ? std::vector<int64_t>{most_rows(recipe, choice.device)} : batches_or(options, recipe.train.batch_size);
    for (const int64_t batch : batches) {
      recipe.train.batch_size = batch;
      if (!options.batches.empty()) recipe.train.grad_accumulation = 1;  // --batch means rows at once
      Recipe fitted = recipe;
      choose_recompute(fitted, choice.device);
      train_case(fitted, name_of_recipe(path), choice, ceilings, options);
      choice.device.allocator().release_cached();
    }
  }
  return 0;
}

int run_bench_prefill(const BenchModelOptions& options) {
  const DeviceChoice choice = choose_device(options.device, options.dtype);
  const Ceilings ceilings = measure_ceilings(choice.device, choice.dtype);
  print_ceilings(choice, ceilings);
  fmt::print("{:<16}{:>7}{:>10}{:>8}{:>12}{:>12}{:>14}{:>14}  {}\n", "model", "batch", "tokens", "chunk", "ms", "tokens/s", "first eighth",
             "last eighth", "peak memory: first eighth / all");
  for (const std::string& path : options.recipes)
    for (const int64_t batch : batches_or(options, 1)) {
      prefill_case(recipe_model_config(path, options.settings), name_of_recipe(path), batch, choice, ceilings, options);
      choice.device.allocator().release_cached();
    }
  return 0;
}

int run_bench_decode(const BenchModelOptions& options) {
  const DeviceChoice choice = choose_device(options.device, options.dtype);
  const Ceilings ceilings = measure_ceilings(choice.device, choice.dtype);
  print_ceilings(choice, ceilings);
  fmt::print("{:<16}{:>7}{:>8}{:>12}{:>14}{:>10}{:>8}  {:<12}{:<14}{}\n", "model", "batch", "steps", "ms/step", "tokens/s", "floor ms",
             "share", "peak memory", "speed/target", "kernels");
  for (const std::string& path : options.recipes)
    for (const int64_t batch : batches_or(options, 1)) {
      decode_case(recipe_model_config(path, options.settings), name_of_recipe(path), batch, choice, ceilings, options);
      choice.device.allocator().release_cached();
    }
  return 0;
}

}  // namespace longhand
