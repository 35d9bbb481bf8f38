// Trainer: one optimizer step after the other. What a step does:
//
//   tokens, targets, row keys and rates of this process's rows go to the device
//   for each micro-batch:  h0        = initial_state.begin(info)
//                          loss, h_T = model.loss(rows, h0, share of the step's positions)
//                          backward(loss);  initial_state.end(info, h_T)
//   optimizer.step()
//
// Several processes sum their gradients while the last backward runs: gradient_exchange.h.
//
// On a GPU all but the first line is recorded as a graph in the second step and replayed in those after it, to the same bits.
//
// The files around it: training_loop.h (logging, checkpoints, interruption), run_folder.h (where things lie).
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/device_graph.h"
#include "data/batcher.h"
#include "models/language_model.h"
#include "train/adamw.h"
#include "train/host_link.h"
#include "train/initial_state/initial_state.h"
#include "train/recipe.h"
#include "train/schedule.h"

namespace longhand {

class Communicator;
class GradientExchange;

class Trainer {
 public:
  /// recipe     resolved; its [data] files are not looked at
  /// processes  that train the same model together, each with its part of the rows of every micro-batch; outlives the trainer. They make
  ///            the same calls in the same order, with the same batches. null: this one is alone
  /// errors     ConfigError when a micro-batch has fewer rows than there are processes
  Trainer(const Recipe& recipe, LanguageModel& model, Communicator* processes = nullptr);
  ~Trainer();

  /// Queues one step on a batch of recipe.train.batch_size rows, those of all processes; on a GPU it returns before the step is done.
  /// The rows are cut into grad_accumulation micro-batches of neighbouring rows; each counts by its unmasked positions, so that the
  /// gradient is that of the mean loss over the whole batch.
  void step(const Batch& batch);

  /// Asks for the report of the step queued last, and takes the report of the oldest step asked for; see HostLink.
  void request_report() { link_->request(optimizer_.control()); }
  StepReport receive_report() { return AdamW::report_of(link_->receive()); }

  /// Waits until the device has done all steps that were queued.
  void wait() { link_->wait(); }

  /// Where a step that was left out went wrong: computes it again, with the present weights, and looks at everything on the way.
  /// batch    of that step; only the last one starts from the states that it had, and only on a CPU: others start from zeros
  /// returns  what was the first not to be finite: a weight by its name, else op, output or gradient, layer and index; "" when all was
  /// finite
  std::string first_non_finite_of(const Batch& batch, int64_t step);

  /// To be called before save() where the last step was left out: no state is carried on from it. Where training goes on, the next step
  /// sees to that itself.
  void forget_carried_state() { initial_state_->forget(); }

  /// For people: "a graph of 1,234 launches" once steps are replayed, or why they are not; "" before that is known and on a CPU.
  const std::string& queued() const { return queued_; }
  /// Whether a step could not be recorded because memory ran out.
  bool graph_lacked_memory() const { return graph_lacked_memory_; }

  int64_t steps_done() const { return steps_done_; }
  double lr_at(int64_t step) const { return lr_.at(step); }
  double weight_decay_at(int64_t step) const { return longhand::weight_decay_at(decay_, recipe_.optimizer.weight_decay, lr_, step); }
  const AdamW& optimizer() const { return optimizer_; }
  const InitialState& initial_state() const { return *initial_state_; }
  const HostLink& link() const { return *link_; }
  const GradientExchange* exchange() const { return exchange_.get(); }  // null: alone

  /// What is saved is the same whatever the number of processes; all call this, process 0 first: the others write into the files it makes.
  /// model.safetensors, config.json, optimizer.safetensors and, where the strategy carries something, carried_state.safetensors.
  /// end_of_text  id that closes a document, for the libraries that open the model
  void save(const std::string& folder, std::optional<int64_t> end_of_text = {}) const;
  /// Goes on after `steps_done` steps from what save() wrote.
  void load(const std::string& folder, int64_t steps_done);

 private:
  struct MicroBatch {
    BatchInfo info;
    int64_t counted = 0;  // positions
    double share = 0;     // of those of the batch
    TokenBatch tokens;    // where they are in every step; the mask only where there is one
  };

  void upload(const Batch& rows, TokenBatch& to);
  Batch micro_batch(const Batch& batch, int64_t m) const;  // this process's rows of it
  void run_step();                                         // the device's part
  void learn(const MicroBatch& micro, bool last, Tensor& loss);
  void queue_step();  // run_step() or its graph
  void form_of_all(const Batch& batch, int64_t m, int64_t positions);
  bool all_learn_last() const;
  bool failed_anywhere(bool failed);

  Recipe recipe_;
  LanguageModel& model_;
  Communicator* processes_;  // null: alone
  std::unique_ptr<HostLink> link_;
  std::unique_ptr<InitialState> initial_state_;
  std::unique_ptr<GradientExchange> exchange_;  // null: alone
  AdamW optimizer_;
  Schedule lr_;
  DecaySchedule decay_;
  int64_t steps_done_ = 0;
  std::vector<MicroBatch> micro_batches_;  // of the step in hand
  std::vector<TokenBatch> places_;         // on the device, by micro-batch
  std::unique_ptr<DeviceGraph> graph_;
  // What graphs hold fast of a step's batch, on any process: the share of each one's micro-batch in the loss, and whether it has a mask.
  using Form = std::vector<std::pair<double, bool>>;
  Form form_;                 // of the step in hand
  Form recorded_, launched_;  // of graph_, and of the latest step that was queued launch by launch
  bool graphs_;
  std::string queued_;
  bool graph_lacked_memory_ = false;
  std::vector<RecurrentState>
      begun_;  // h0 of the last step's micro-batches, until the next step: they cost no memory at its peak; CPU only
};

}  // namespace longhand
