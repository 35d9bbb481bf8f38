// Where models lie on disk: a folder with a config.json, or a run with its checkpoints.
//   RUN/checkpoints/step-N/     a model folder
//   RUN/checkpoints/latest      a link to the latest of them, or a file that names it; absent, or something else: the largest N is it
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace longhand {

/// A model on disk and the run it comes from.
struct ModelPlace {
  std::string model_folder;  // holds config.json
  std::string run_folder;    // "" when the model belongs to no run
  int64_t step = -1;         // of the checkpoint; -1 when unknown
};

/// `path` is a run folder (its latest checkpoint is taken), a checkpoint, or any folder with a config.json.
/// errors  FileError saying what was looked for
ModelPlace find_model(const std::string& path);

/// RUN/checkpoints/step-N
std::string checkpoint_folder(const std::string& run, int64_t step);

/// The steps of a run's checkpoints, ascending.
std::vector<int64_t> checkpoint_steps(const std::string& run);

/// The step of the latest; absent where there is none.
/// errors  FileError where there is a folder `latest` alone
std::optional<int64_t> latest_checkpoint(const std::string& run);

}  // namespace longhand
