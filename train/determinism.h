// The promise that the same start gives the same bits, put to the test on this machine.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "models/language_model.h"
#include "train/recipe.h"

namespace longhand {

class Tokenizer;

struct DeterminismReport {
  int64_t steps = 0;
  int64_t threads[2] = {0, 0};       // data threads of the two passes
  std::string queued[2];             // how their last steps were queued: "a graph of 1,234 launches", or "" for launch by launch
  int64_t weights = 0, moments = 0;  // numbers compared at the end
  int64_t carried = 0;               // bytes of carried states and statistics compared at the end
};

/// Does the first `steps` steps of a recipe twice, with different numbers of data threads and on a GPU the second time launch by launch,
/// and compares the bits of every loss and gradient norm, a check sum of all weights after every step, and at the end every weight and
/// moment and all that the initial states carry on. recipe       resolved fresh_model  the model to start from, made anew for each pass
/// errors       NumericError naming the first step that differs, both values, and the parameters that differ at the end
DeterminismReport verify_determinism(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer, int64_t steps,
                                     const std::function<std::unique_ptr<LanguageModel>()>& fresh_model);

}  // namespace longhand
