// See training_loop.h.
#include "train/training_loop.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <deque>
#include <exception>
#include <nlohmann/json.hpp>

#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "core/strict_json.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "train/communicator.h"
#include "train/data_record.h"
#include "train/interrupt.h"
#include "train/run_batches.h"
#include "train/trainer.h"

namespace longhand {
namespace {

constexpr int64_t kCheckpointFormat = 1;
constexpr double kFirstLossMargin = 1;  // nats around log(vocabulary) in which the first loss of fresh weights is expected

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a checkpoint knows beside its tensors.
struct Progress {
  int64_t step = 0, tokens = 0;
  double elapsed_s = 0;
  std::optional<DataCursor> cursor;
};

class Loop {
 public:
  Loop(const TrainingJob& job, LanguageModel& model)
      : job_(job),
        recipe_(job.recipe),
        model_(model),
        alone_(single_process()),
        processes_(job.processes != nullptr ? *job.processes : *alone_),
        trainer_(recipe_, model, job.processes),
        line_(job.messages),
        data_(record_data(training_files(recipe_))),
        start_(restore()),
        done_(start_) {
    if (processes_.leads()) metrics_file_.emplace(job.folder.file("metrics.jsonl"));
  }

  TrainingOutcome run() {
    introduce();
    TrainingOutcome outcome;
    if (done_.step >= recipe_.train.steps) {
      line_.say(fmt::format("the run has done its {} steps already", recipe_.train.steps));
      outcome.step = done_.step;
      return outcome;
    }
    BatchStream batches = training_batches(recipe_, job_.tokenizer, done_.cursor);
    const InterruptGuard interrupt;
    Batch batch;
    begin_s_ = now_s();
    interval_step_ = done_.step;
    for (int64_t step = done_.step + 1; step <= recipe_.train.steps; ++step) {
      if (!batches.next(batch)) throw ValueError("train: the data ended before the run did", {{"step", std::to_string(step)}});
      const bool pause_due = step == recipe_.train.steps || due(recipe_.train.checkpoint_every, step) || due(recipe_.train.val_every, step);
      trainer_.step(batch);
      if (trainer_.queued() != queued_) {
        queued_ = trainer_.queued();
        line_.say(fmt::format("step {} on    {}", step, queued_));
      }
      trainer_.request_report();
      ++open_reports_;
      open_batches_.push_back(batch);
      // A GPU works on this step while the numbers of the step before are read. A CPU has done it: read now, its time is its own.
      const int64_t left_open = model_.device().is_cuda() || pause_due ? 1 : 0;
      while (open_reports_ > left_open) take_report();
      if (step < recipe_.train.steps) outcome.signal = static_cast<int>(processes_.all_reduce_max(interrupt.signal()));
      const bool last = step == recipe_.train.steps || outcome.signal != 0;
      if (last || pause_due) {
        done_.cursor = batch.cursor_after;
        pause(last, outcome.signal != 0);
        if (last) break;
      }
    }
    if (const int64_t bad = batches.bad_lines().count(); bad > 0) {
      line_.say(fmt::format("{} bad lines of the data were left out, the first:", bad));
      line_.say(batches.bad_lines().first().front());
    }
    line_.say("peak memory  " + bytes_text(peak_memory_bytes()));
    outcome.step = done_.step;
    outcome.last_loss = report_.loss;
    outcome.skipped = report_.skipped;
    if (outcome.signal != 0)
      line_.say(fmt::format("interrupted after step {}; continue with: longhand train --resume {}", done_.step, job_.folder.path()));
    return outcome;
  }

 private:
  static bool due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

  // Loads the checkpoint to go on from, and cuts the metrics back to it.
  Progress restore() {
    const auto step = job_.resume ? job_.folder.latest_step() : std::nullopt;
    if (!step) {
      if (job_.resume) line_.say("the run has no checkpoint yet: it begins again at step 1");
      if (processes_.leads()) go_on_from(0);
      return {};
    }
    const std::string folder = job_.folder.checkpoint(*step), file = folder + "/training.json";
    Progress progress;
    try {
      const auto json = nlohmann::json::parse(read_text_file(file));
      if (whole_number(json.at("format")) != kCheckpointFormat || whole_number(json.at("step")) != *step)
        throw FileError("train: a checkpoint of another format or step", {{"file", file}});
      progress = {*step, whole_count(json.at("tokens"), "train: training.json"), json.at("elapsed_s").get<double>(),
                  DataCursor::from_json(json.at("cursor").dump())};
      if (json.contains("data")) require_same_data(data_from(json["data"]), data_);  // older checkpoints have none
    } catch (const nlohmann::json::exception& error) {
      throw FileError("train: training.json cannot be read", {{"file", file}, {"reason", error.what()}});
    }
    together(processes_, [&] { trainer_.load(folder, *step); });
    if (processes_.leads()) go_on_from(*step);  // only now that all can
    return progress;
  }

  void go_on_from(int64_t step) const {
    if (job_.resume) write_file_atomically(job_.folder.file("config.toml"), to_toml(recipe_));
    job_.folder.truncate_metrics(step);
  }

  static std::vector<DataFileRecord> data_from(const nlohmann::json& rows) {
    std::vector<DataFileRecord> out;
    for (const auto& row : rows)
      out.push_back(
          {row.at("file").get<std::string>(), whole_number(row.at("bytes")), static_cast<uint32_t>(whole_number(row.at("check")))});
    return out;
  }

  void introduce() {
    const int64_t step_tokens = recipe_.train.batch_size * recipe_.train.length;
    const ModelConfig& m = recipe_.model;
    line_.say(
        fmt::format("run         {}{}", job_.folder.path(), done_.step > 0 ? fmt::format(", resumed after step {}", done_.step) : ""));
    line_.say(fmt::format("model       {}  d_model {}  n_layer {}  vocabulary {} ({} rows)", m.family, m.d_model, m.n_layer, m.vocab_size,
                          m.padded_vocab()));
    line_.say(fmt::format("parameters  {}, {} without the embedding", model_.parameter_count(), model_.non_embedding_parameter_count()));
    line_.say(fmt::format("device      {} ({}), compute in {}", model_.device().name(), model_.device().description(),
                          name_of(model_.compute_dtype())));
    if (job_.processes != nullptr) line_.say(fmt::format("processes   {}", processes_.describe()));
    std::string files;
    for (const std::string& name : recipe_.data.files) files += (files.empty() ? "" : ", ") + name;
    if (recipe_.data.task != kTextRows) files = "samples of " + recipe_.data.task + (files.empty() ? "" : " from " + files);
    line_.say(fmt::format("data        {} in {}, tokenizer {} ({} tokens)", files, recipe_.data.arrangement, job_.tokenizer->name(),
                          job_.tokenizer->vocab_size()));
    line_.say(fmt::format("start       {}, initial states: {}", recipe_.init_from.empty() ? "fresh weights" : recipe_.init_from,
                          recipe_.initial_state));
    line_.say(fmt::format("steps       {} of {} tokens: {} rows of {}, {} micro-batch{}", recipe_.train.steps, step_tokens,
                          recipe_.train.batch_size, recipe_.train.length, recipe_.train.grad_accumulation,
                          recipe_.train.grad_accumulation == 1 ? "" : "es"));
    if (recipe_.train.recompute != name_of(Recompute::none)) line_.say("made again  " + recipe_.train.recompute + ", in the backward");
    line_.say("no weight decay on");
    for (const std::string& group : trainer_.optimizer().describe_no_decay()) line_.say("            " + group);
  }

  // Waits for the oldest open report and logs its step.
  void take_report(std::optional<double> val_loss = {}) {
    report_ = trainer_.receive_report();
    --open_reports_;
    const Batch batch = std::move(open_batches_.front());
    open_batches_.pop_front();
    ++done_.step;
    done_.tokens += recipe_.train.batch_size * recipe_.train.length;
    if (report_.skipped_in_a_row > 0) note_skipped(batch);
    if (done_.step == 1 && recipe_.init_from.empty()) check_first_loss();
    log(val_loss);
  }

  void log(std::optional<double> val_loss) {
    LoggedStep s;
    s.step = done_.step;
    s.tokens = done_.tokens;
    s.loss = report_.loss;
    s.lr = trainer_.lr_at(done_.step - 1);
    s.weight_decay = trainer_.weight_decay_at(done_.step - 1);
    s.grad_norm = report_.grad_norm;
    s.skipped = report_.skipped;
    s.val_loss = val_loss;
    s.device = model_.device().name();
    if (report_.skipped_in_a_row > 0) s.first_non_finite = first_non_finite_;
    const double busy = busy_s(), seconds = busy - interval_busy_s_;
    s.elapsed_s = elapsed_s();
    s.peak_memory_bytes = peak_memory_bytes();
    s.tokens_per_s =
        seconds > 0 ? static_cast<double>((done_.step - interval_step_) * recipe_.train.batch_size * recipe_.train.length) / seconds : 0;
    if (const double peak = trainer_.link().bf16_peak_flops(); peak > 0)
      s.mfu = model_.training_flops_per_token() * s.tokens_per_s / (peak * static_cast<double>(processes_.size()));
    if (job_.on_step) job_.on_step(s);
    if (done_.step != 1 && !due(recipe_.train.log_every, done_.step) && done_.step != recipe_.train.steps && !val_loss &&
        report_.skipped_in_a_row == 0)
      return;
    if (metrics_file_) metrics_file_->write(s);
    const double per_step = busy / static_cast<double>(done_.step - start_.step);
    line_.show(s, recipe_.train.steps, per_step * static_cast<double>(recipe_.train.steps - done_.step));
    interval_busy_s_ = busy;
    interval_step_ = done_.step;
  }

  // Waits for the step in hand, then validates and writes a checkpoint where one is due.
  void pause(bool last, bool interrupted) {
    trainer_.wait();
    const int64_t step = done_.step + open_reports_;
    std::optional<double> val_loss;
    std::exception_ptr failed;  // the steps are kept even if the validation cannot be done
    if (job_.evaluate && !interrupted && (last || due(recipe_.train.val_every, step))) {
      try {
        not_counted([&] { val_loss = job_.evaluate(model_); });
      } catch (...) {
        failed = std::current_exception();
      }
    }
    while (open_reports_ > 0) take_report(open_reports_ == 1 ? val_loss : std::nullopt);
    // While steps are being left out no checkpoint is written, so that the good ones are not pushed out.
    const bool save_due = due(recipe_.train.checkpoint_every, step) && report_.skipped_in_a_row == 0;
    if (report_.skipped_in_a_row > 0 && (last || failed)) require_finite_weights();
    if (report_.skipped_in_a_row > 0) trainer_.forget_carried_state();
    if (last || failed || save_due) not_counted([&] { save(); });
    if (failed) std::rethrow_exception(failed);
  }

  // A step that is left out changes no weight, but behind an update that ruined them all are.
  void require_finite_weights() {
    const Tensor& weights = model_.parameters().flat_master();
    if (processes_.all_reduce_max(first_non_finite(weights) >= 0 ? 1 : 0) == 0) return;
    const auto last = job_.folder.latest_step();
    throw NumericError(
        "train: the weights are not finite; no checkpoint of them is written",
        {{"step", std::to_string(done_.step)},
         {"first", first_non_finite_},
         {"checkpoint", last ? job_.folder.checkpoint(*last) : "none yet"},
         {"try", "a smaller optimizer.lr; longhand train --resume " + job_.folder.path() + " goes on from that checkpoint"}});
  }

  double elapsed_s() const { return start_.elapsed_s + now_s() - begin_s_; }  // of the whole run
  double busy_s() const { return now_s() - begin_s_ - paused_s_; }            // spent on training since this start

  int64_t peak_memory_bytes() const { return model_.device().allocator().use().peak_bytes; }

  template <class F>
  void not_counted(F&& f) {
    const double before = now_s();
    f();
    paused_s_ += now_s() - before;
  }

  // None goes on, or ends, before the checkpoint has its name.
  void save() {
    if (processes_.leads()) write_checkpoint();
    else trainer_.save({});
    processes_.barrier();
  }

  void write_checkpoint() {
    metrics_file_->sync();  // no checkpoint without the metrics before it
    const KeptCheckpoints keep{recipe_.train.keep_last, recipe_.train.keep_every};
    job_.folder.write_checkpoint(done_.step, keep, [&](const std::string& folder) {
      trainer_.save(folder, job_.tokenizer->end_of_text());
      nlohmann::ordered_json json{{"format", kCheckpointFormat},
                                  {"step", done_.step},
                                  {"steps", recipe_.train.steps},
                                  {"tokens", done_.tokens},
                                  {"elapsed_s", elapsed_s()},
                                  {"seed", recipe_.seed},
                                  {"initial_state", recipe_.initial_state},
                                  {"next_lr", trainer_.lr_at(done_.step)},
                                  {"next_weight_decay", trainer_.weight_decay_at(done_.step)},
                                  {"skipped", report_.skipped},
                                  {"tokenizer", recipe_.data.tokenizer},
                                  {"tokenizer_fingerprint", job_.tokenizer->fingerprint()}};
      for (const DataFileRecord& file : data_) json["data"].push_back({{"file", file.file}, {"bytes", file.bytes}, {"check", file.check}});
      json["cursor"] = nlohmann::ordered_json::parse(done_.cursor->to_json());
      write_file_atomically(folder + "/training.json", json.dump(1) + "\n");
    });
  }

  void note_skipped(const Batch& batch) {
    line_.say(fmt::format("step {}: loss {} and grad_norm {} are not both finite; the step was left out, {} so far", done_.step,
                          report_.loss, report_.grad_norm, report_.skipped));
    if (report_.skipped_in_a_row == 1) {
      not_counted([&] { first_non_finite_ = trainer_.first_non_finite_of(batch, done_.step - 1); });
      for (const std::string& found : processes_.all_texts(first_non_finite_))  // in whose rows it was
        if (first_non_finite_.empty()) first_non_finite_ = found;
      if (first_non_finite_.empty()) first_non_finite_ = "not known: computed again, everything was finite";
      line_.say("            first not finite: " + first_non_finite_);
    }
    if (report_.skipped_in_a_row < kMostSkippedInARow) return;
    const auto last = job_.folder.latest_step();
    throw NumericError("train: no finite loss and gradient for too many steps in a row",
                       {{"steps", std::to_string(report_.skipped_in_a_row)},
                        {"last", "step " + std::to_string(done_.step)},
                        {"first", first_non_finite_},
                        {"checkpoint", last ? job_.folder.checkpoint(*last) : "none yet"},
                        {"try", "a smaller optimizer.lr, or LONGHAND_CHECK=1, which stops at the first tensor that is not finite"}});
  }

  void check_first_loss() {
    const double expected = std::log(static_cast<double>(recipe_.model.padded_vocab()));
    line_.say(fmt::format("first loss  {:.3f}, log(vocabulary) is {:.3f}", report_.loss, expected));
    if (!(std::abs(report_.loss - expected) < kFirstLossMargin))
      line_.say("warning: fresh weights should begin near log(vocabulary); check the data, the tokenizer and the initial values");
  }

  const TrainingJob& job_;
  const Recipe& recipe_;
  LanguageModel& model_;
  const std::unique_ptr<Communicator> alone_;
  Communicator& processes_;
  Trainer trainer_;
  ProgressLine line_;
  const std::vector<DataFileRecord> data_;  // as this start found the files
  Progress start_, done_;  // where this start began | steps whose report has come, with the cursor behind the last batch at a pause
  std::optional<MetricsFile> metrics_file_;  // of process 0
  StepReport report_;                        // of step done_.step
  int open_reports_ = 0;
  std::string queued_;              // what was said of it
  std::deque<Batch> open_batches_;  // of those steps
  std::string first_non_finite_;    // of the latest steps that were left out in a row
  int64_t interval_step_ = 0;       // of the logged step before
  double begin_s_ = 0, paused_s_ = 0, interval_busy_s_ = 0;
};

}  // namespace

std::vector<std::string> training_files(const Recipe& recipe) {
  std::vector<std::string> files = recipe.data.files;
  if (recipe.data.task != kTextRows) files.insert(files.end(), recipe.task.babi.begin(), recipe.task.babi.end());
  return files;
}

DataOptions training_data(const Recipe& r) {
  DataOptions options;
  options.files = r.data.files;
  options.tokenizer = r.data.tokenizer;
  options.arrangement = r.data.arrangement;
  options.stream_unit = r.data.stream_unit;
  options.rows = r.train.batch_size;
  options.length = r.train.length;
  options.seed = static_cast<uint64_t>(r.seed);
  options.shuffle_rows = r.data.shuffle_rows;
  options.threads = static_cast<int>(r.data.threads);
  options.skip_bad_lines = r.data.skip_bad_lines;
  return options;
}

TrainingOutcome run_training(const TrainingJob& job, LanguageModel& model) {
  return Loop(job, model).run();
}

}  // namespace longhand
