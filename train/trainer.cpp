// See trainer.h.
#include "train/trainer.h"

#include <algorithm>
#include <filesystem>

#include "autograd/gradient_arrival.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "core/safetensors.h"
#include "core/safetensors_parts.h"
#include "core/switches.h"
#include "models/checkpoint.h"
#include "models/model_family.h"
#include "train/communicator.h"
#include "train/gradient_exchange.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr const char* kOptimizerFile = "/optimizer.safetensors";
constexpr const char* kCarriedFile = "/carried_state.safetensors";

AdamWOptions optimizer_options(const Recipe& recipe, const LanguageModel& model) {
  const Recipe::Optimizer& o = recipe.optimizer;
  AdamWOptions options{.rule = {.beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .clip = o.clip}, .no_decay = {}};
  if (!o.decay_embedding) options.no_decay.insert(model_family(model.config().family).embedding_name);
  return options;
}

int64_t positions_that_count(const Batch& batch) {
  return std::count_if(batch.mask.begin(), batch.mask.end(), [](uint8_t m) { return m != 0; });
}

}  // namespace

Trainer::Trainer(const Recipe& recipe, LanguageModel& model, Communicator* processes)
    : recipe_(recipe),
      model_(model),
      processes_(processes),
      link_(make_host_link(model.device())),
      initial_state_(make_initial_state(recipe.initial_state, {.zero_state = [&model](int64_t rows) { return model.zero_state(rows); },
                                                               .device = model.device(),
                                                               .link = *link_,
                                                               .seed = static_cast<uint64_t>(recipe.seed),
                                                               .options = recipe.initial_state_options,
                                                               .processes = processes})),
      exchange_(processes == nullptr ? nullptr
                                     : std::make_unique<GradientExchange>(
                                           model.parameters(), *processes,
                                           ExchangeOptions{.sharded = recipe.train.shard_optimizer, .overlap = recipe.train.overlap})),
      optimizer_(model.parameters(), optimizer_options(recipe, model), exchange_ ? exchange_->own() : std::vector<Part>()),
      lr_{recipe.train.steps, recipe.optimizer.lr, recipe.optimizer.min_lr, recipe.optimizer.warmup_fraction},
      decay_(decay_schedule_from(recipe.optimizer.weight_decay_schedule)),
      graphs_(recipe.train.graph && model.device().is_cuda()) {
  model_.set_recompute(parse_recompute_plan(recipe.train.recompute, model.config().n_layer));
  if (processes_ != nullptr) link_->while_waiting([this] { processes_->require_links(); });
  const int64_t rows = recipe.train.batch_size / recipe.train.grad_accumulation;
  if (processes_ != nullptr && rows < processes_->size())
    throw ConfigError("train: a micro-batch has fewer rows than there are processes",
                      {{"rows", std::to_string(rows)},
                       {"processes", std::to_string(processes_->size())},
                       {"try", "fewer processes, a larger train.batch_size, or a smaller train.grad_accumulation"}});
}

Trainer::~Trainer() = default;

void Trainer::upload(const Batch& rows, TokenBatch& to) {
  const Shape shape{rows.rows, rows.length};
  link_->upload(to.tokens, rows.tokens, shape);
  link_->upload(to.targets, rows.targets, shape);
  if (positions_that_count(rows) < rows.rows * rows.length)
    link_->upload(to.mask, std::vector<float>(rows.mask.begin(), rows.mask.end()), shape);
}

Batch Trainer::micro_batch(const Batch& batch, int64_t m) const {
  const int64_t rows = batch.rows / recipe_.train.grad_accumulation;
  const Part own = processes_ != nullptr ? processes_->own(rows) : Part{0, rows};
  return rows_of(batch, m * rows + own.begin, m * rows + own.end);
}

std::string Trainer::first_non_finite_of(const Batch& batch, int64_t step) {
  graph_.reset();  // it holds the memory of a whole step, which the one below needs
  launched_.clear();
  for (const Parameter& p : model_.parameters().all())
    if (const int64_t index = first_non_finite(p.master); index >= 0)
      return "weight " + p.name + " " + p.shape.str() + ", index " + std::to_string(index);
  const SwitchScope check([](Switches& s) { s.check = true; });
  std::string found;
  try {
    for (int64_t m = 0; m < recipe_.train.grad_accumulation; ++m) {
      const Batch rows = micro_batch(batch, m);
      if (positions_that_count(rows) == 0) continue;
      const bool same_start = step + 1 == steps_done_ && static_cast<std::size_t>(m) < begun_.size();
      const RecurrentState h0 = same_start ? begun_[static_cast<std::size_t>(m)] : RecurrentState();
      model_.parameters().clear_grads();  // each micro-batch by itself
      TokenBatch tokens;
      upload(rows, tokens);
      backward(model_.loss(tokens, h0, 1.0 / static_cast<double>(recipe_.train.grad_accumulation)).loss);
    }
  } catch (const NumericError& error) {
    const std::string text = error.what();
    found = text.substr(0, text.find(" is not finite"));
    for (const ErrorRow& row : error.rows())
      if (row.name == "layer" || row.name == "index") found += ", " + row.name + " " + row.value;
  } catch (const MemoryError&) {
    found = "not known: there was no memory to compute the step again";
  }
  model_.parameters().clear_grads();
  return found;
}

void Trainer::step(const Batch& batch) {
  const Recipe::Train& train = recipe_.train;
  if (batch.rows != train.batch_size || batch.length != train.length)
    throw ShapeError("train: a batch of another size than the recipe says",
                     {{"batch", Shape{batch.rows, batch.length}.str()}, {"expected", Shape{train.batch_size, train.length}.str()}});
  const int64_t positions = positions_that_count(batch);
  if (positions == 0) throw ValueError("train: a batch in which no position counts", {{"step", std::to_string(steps_done_)}});
  const bool streams = recipe_.data.arrangement == "streams";
  places_.resize(static_cast<std::size_t>(train.grad_accumulation));
  micro_batches_.clear();
  form_.clear();
  for (int64_t m = 0; m < train.grad_accumulation; ++m) {
    const bool whole = train.grad_accumulation == 1 && (processes_ == nullptr || processes_->alone());
    const Batch cut = whole ? Batch{} : micro_batch(batch, m);
    const Batch& rows = whole ? batch : cut;
    const BatchInfo info{.step = steps_done_,
                         .micro = m,
                         .rows = rows.rows,
                         .resets = streams ? std::span<const uint8_t>(rows.resets) : std::span<const uint8_t>(),
                         .row_ids = rows.row_ids,
                         .all_rows = batch.rows / train.grad_accumulation};
    initial_state_->prepare(info);
    TokenBatch& place = places_[static_cast<std::size_t>(m)];
    upload(rows, place);
    const int64_t counted = positions_that_count(rows);
    form_of_all(batch, m, positions);
    micro_batches_.push_back({.info = {.step = info.step,
                                       .micro = m,
                                       .rows = info.rows,
                                       .resets = {},
                                       .row_ids = {},
                                       .all_rows = info.all_rows,
                                       .left_out = optimizer_.left_out()},
                              .counted = counted,
                              .share = static_cast<double>(counted) / static_cast<double>(positions),
                              .tokens = place});
    if (counted == rows.rows * rows.length) micro_batches_.back().tokens.mask = Tensor();
  }
  optimizer_.set_rates(lr_at(steps_done_), weight_decay_at(steps_done_));
  queue_step();
  ++steps_done_;
}

// Of the rows of every process, not of its own alone: whether a step is recorded, replayed or neither has to be the same for all.
void Trainer::form_of_all(const Batch& batch, int64_t m, int64_t positions) {
  const int64_t rows = batch.rows / recipe_.train.grad_accumulation, processes = processes_ != nullptr ? processes_->size() : 1;
  for (int64_t p = 0; p < processes; ++p) {
    const Part part = part_of(rows, p, processes);
    const auto begin = batch.mask.begin() + (m * rows + part.begin) * batch.length,
               end = batch.mask.begin() + (m * rows + part.end) * batch.length;
    const int64_t counted = std::count_if(begin, end, [](uint8_t mask) { return mask != 0; });
    form_.emplace_back(static_cast<double>(counted) / static_cast<double>(positions), counted < part.size() * batch.length);
  }
}

// Whether every process has a position that counts in the last micro-batch, and so a backward to exchange gradients beside.
bool Trainer::all_learn_last() const {
  const auto last = form_.end() - static_cast<std::ptrdiff_t>(processes_->size());
  return std::none_of(last, form_.end(), [](const auto& share_and_mask) { return share_and_mask.first == 0; });
}

// Whether a recording failed here, or on another process: then there is none.
bool Trainer::failed_anywhere(bool failed) {
  return processes_ != nullptr ? processes_->all_reduce_max(failed ? 1 : 0) != 0 : failed;
}

void Trainer::queue_step() {
  const bool watched = ops_are_watched();
  if (graphs_ && !watched) {
    if (graph_ && form_ == recorded_) return graph_->replay();
    if (form_ == launched_) {  // whatever such a step makes once is there, and another like it is likely
      std::string problem;
      graph_.reset();
      try {
        graph_ = record_graph(model_.device(), [this] { run_step(); });
      } catch (const Error& error) {
        problem = error.what();
        graph_lacked_memory_ = dynamic_cast<const MemoryError*>(&error) != nullptr;
      }
      graphs_ = !failed_anywhere(!graph_);
      if (graphs_) {
        recorded_ = form_;
        queued_ = "a graph of " + std::to_string(graph_->size()) + " launches";
        return graph_->replay();
      }
      graph_.reset();
      queued_ = "launch by launch: no graph could be recorded\n" + (problem.empty() ? "by another process" : problem);
    }
  }
  run_step();
  launched_ = form_;
}

void Trainer::run_step() {
  begun_.clear();
  model_.parameters().clear_grads();
  if (processes_ != nullptr) processes_->end_overlap();  // which a recording that failed may have left open
  Tensor loss;                                           // of this process's rows
  for (const MicroBatch& micro : micro_batches_) learn(micro, &micro == &micro_batches_.back(), loss);
  if (exchange_) exchange_->end();
  // Where no position counts, other processes have some.
  if (!loss) loss = Tensor::zeros(model_.device(), model_.parameters().flat_master().dtype(), {});
  if (!exchange_) return optimizer_.step(loss);
  optimizer_.step(loss, [this](const Tensor& sums) { exchange_->sum(sums); });
  exchange_->share_weights();
}

// The order of what is told to other processes is the same whatever the rows hold, or they would wait for each other.
void Trainer::learn(const MicroBatch& micro, bool last, Tensor& loss) {
  const RecurrentState h0 = initial_state_->begin(micro.info);
  if (!model_.device().is_cuda()) begun_.push_back(h0);
  if (last && exchange_) exchange_->begin(all_learn_last());
  RecurrentState h_T;
  if (micro.counted == 0) {  // all padding: nothing to learn, but its state goes on
    const NoGrad no_grad;
    h_T = model_.forward(micro.tokens.tokens, h0).state;
  } else {
    const auto result = model_.loss(micro.tokens, h0, micro.share);
    if (last && exchange_) backward(result.loss, [this](const std::string& parameter) { exchange_->arrived(parameter); });
    else backward(result.loss);
    h_T = result.state;
    if (loss) {
      add_scaled(loss, result.loss.value());
    } else {
      loss = result.loss.value().clone();
    }
  }
  if (last) {
    model_.parameters().complete_grads();
    if (exchange_) exchange_->complete();
  }
  initial_state_->end(micro.info, h_T);
}

void Trainer::save(const std::string& own_folder, std::optional<int64_t> end_of_text) const {
  const auto carried = initial_state_->save();
  const std::map<std::string, std::string> kind{{"format", "longhand adamw"}};
  const bool leads = processes_ == nullptr || processes_->leads();
  std::string folder = own_folder;
  if (exchange_) {
    exchange_->share_masters();
    link_->wait();
    const auto moments = optimizer_.save_own(leads);
    if (leads) make_safetensors(folder + kOptimizerFile, moments, kind);
    folder = processes_->all_texts(own_folder)[0];
    together(*processes_, [&] {
      if (leads || recipe_.train.shard_optimizer) write_safetensors_part(folder + kOptimizerFile, moments, kind);  // else all have the same
    });
  } else {
    write_safetensors(folder + kOptimizerFile, optimizer_.save(), kind);
  }
  if (!leads) return;
  save_model(model_, folder, {.end_of_text = end_of_text});
  if (!carried.empty())
    write_safetensors(folder + kCarriedFile, carried, {{"format", "longhand initial state"}, {"strategy", recipe_.initial_state}});
}

void Trainer::load(const std::string& folder, int64_t steps_done) {
  load_weights(model_, folder);
  optimizer_.load(read_safetensors(folder + kOptimizerFile).tensors);
  std::map<std::string, Tensor> carried;
  if (fs::exists(folder + kCarriedFile)) carried = read_safetensors(folder + kCarriedFile).tensors;
  else if (initial_state_->carries() && steps_done > 0)
    throw FileError(
        "train: the checkpoint lacks the states that its strategy carries on",
        {{"file", folder + kCarriedFile}, {"strategy", recipe_.initial_state}, {"try", "an older checkpoint, or copy it again"}});
  initial_state_->load(carried, recipe_.train.grad_accumulation);
  steps_done_ = steps_done;
  graph_.reset();  // what is loaded may lie elsewhere
  launched_.clear();
}

}  // namespace longhand
