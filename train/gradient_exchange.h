// GradientExchange: what the processes that train one model tell each other in a step. The flat buffers are cut into buckets, and every
// bucket into a part for each process:
//
//   while backward runs   a bucket whose gradients have all arrived is summed over the processes; each keeps the sums of its own part
//   optimizer             each process updates its own parts and holds moments of those alone (ZeRO-1)
//   then                  the weights of all parts go to all processes, in the type that products read
//
// Unsharded, every process gets all sums and updates all weights: the same training with the moments of the whole model everywhere.
// source  Rajbhandari et al. 2020, arXiv:1910.02054 (stage 1); Li et al. 2020, arXiv:2006.15704 (buckets)
#pragma once
#include <map>
#include <string>
#include <vector>

#include "autograd/parameters.h"
#include "train/communicator.h"

namespace longhand {

struct ExchangeOptions {
  bool sharded = true;  // each process updates its own parts
  bool overlap = true;  // false: nothing is exchanged before complete(), and everything waited for
};

class GradientExchange {
 public:
  /// parameters  allocated; outlives the exchange
  GradientExchange(ParameterSet& parameters, Communicator& processes, const ExchangeOptions& options = {});

  /// The parts of the flat buffers that this process updates, ascending; empty: all of them.
  const std::vector<Part>& own() const { return own_; }

  // The calls of a step, in this order. Every process makes the same exchanges in the same order and groups, whatever its rows hold.

  /// Before the last backward of the step.
  /// overlap  the same on every process: false where one of them has no such backward, nothing of which arrives before complete(). NCCL
  ///          may sum a group of calls in another way than the calls of several groups, and processes that group differently can hang
  void begin(bool overlap = true);
  void arrived(const std::string& parameter);  // its gradient is that of all of this process's rows: see GradientArrived
  void complete();                             // flat_grad() is whole: exchanges whatever was not yet
  void end();                                  // what is queued now finds the sums in the own parts
  void sum(const Tensor& loss_and_squares);    // the numbers of AdamW::step()
  void share_weights();                        // after the update

  /// Afterwards the masters are whole on every process, and not only where products read them: before they are saved.
  void share_masters();

  /// What this process sends in a step, in bytes; it receives as much.
  struct Traffic {
    int64_t gradients = 0, weights = 0;
  };
  Traffic traffic() const;
  int64_t buckets() const { return static_cast<int64_t>(buckets_.size()); }

 private:
  struct Bucket {
    Part range;                  // of the flat buffers
    int64_t parameters = 0;      // in it
    int64_t first_declared = 0;  // of those; backward comes to it last
    bool masters_read = false;   // products read some of them in the masters' type
  };
  void exchange_ready();
  void gather(const std::vector<Tensor>& wholes);

  ParameterSet& parameters_;
  Communicator& processes_;
  const ExchangeOptions options_;
  std::vector<Bucket> buckets_;                         // in the order in which they are exchanged
  std::map<std::string, std::vector<std::size_t>> of_;  // the buckets that a parameter is in
  std::vector<Part> own_;
  std::vector<Tensor> shared_weights_, shared_masters_;  // whole buckets
  std::vector<int64_t> missing_;                         // parameters of each bucket that have not arrived
  std::size_t next_ = 0;                                 // bucket to exchange
  bool overlap_ = false;                                 // in this step
};

}  // namespace longhand
