// The training loop: batches in, metrics, checkpoints and a trained model out.
#pragma once
#include <cstdio>
#include <functional>
#include <memory>

#include "models/language_model.h"
#include "train/progress.h"
#include "train/recipe.h"
#include "train/run_folder.h"

namespace longhand {

class Communicator;
class Tokenizer;
struct DataOptions;

struct TrainingJob {
  Recipe recipe;     // resolved
  RunFolder folder;  // its config.toml is written already
  std::shared_ptr<const Tokenizer> tokenizer;
  bool resume = false;  // go on from the folder's latest checkpoint, if it has one; its config.toml is written when that is loaded
  std::function<double(const LanguageModel&)>
      evaluate;                                    // validation loss in nats per token; may be empty; of all processes or none it throws
  std::FILE* messages = stderr;                    // null: silent
  std::function<void(const LoggedStep&)> on_step;  // after every step, in order; may be empty
  Communicator* processes = nullptr;               // that train together: process 0 writes the run; null: this one is alone
};

struct TrainingOutcome {
  int64_t step = 0;      // steps done
  int signal = 0;        // the signal that ended the run early, or 0
  double last_loss = 0;  // of the last step
  int64_t skipped = 0;   // steps left out because loss or grad_norm was not finite
};

/// Trains `model`, whose weights are set, from the folder's latest checkpoint or from the start, to recipe.train.steps. SIGINT and SIGTERM
/// end it after the step in hand, with a checkpoint. On a GPU the numbers of a step are read while the next one runs. A step whose loss or
/// gradient is not finite changes nothing, is counted, and is computed again to name the op and layer where that began.
/// holds    a run that is interrupted and resumed writes the same losses and ends with the same weights, bit for bit
/// errors   NumericError naming the last checkpoint after kMostSkippedInARow steps in a row whose loss or gradient was not finite;
///          those of the data room and of the file system
TrainingOutcome run_training(const TrainingJob& job, LanguageModel& model);

/// The files that a run trains on.
std::vector<std::string> training_files(const Recipe& recipe);

/// The batches that a recipe trains on.
DataOptions training_data(const Recipe& recipe);

inline constexpr int64_t kMostSkippedInARow = 10;

}  // namespace longhand
