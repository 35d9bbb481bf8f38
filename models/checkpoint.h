// Model folders: config.json and weights, in the layouts of the libraries the models come from (CheckpointLayout).
//   transformers ("hf"), FLA ("fla")   config.json with model_type; model.safetensors, or shards with an index
//   "state-spaces"                     config.json with d_model and ssm_cfg; pytorch_model.bin
// Reading takes any of these kinds of weight files in any layout (weight_files.h says which comes first); writing takes the one that the
// layout's library opens.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "models/language_model.h"
#include "models/weight_files.h"

namespace longhand {

/// The configuration in `folder`/config.json; which layout it is shows in its keys.
/// errors  FileError or ConfigError naming file and key: unknown model type, options outside what longhand computes
ModelConfig read_model_config(const std::string& folder);

/// Ids of special tokens by their keys in config.json, "bos_token_id", "eos_token_id", "pad_token_id"; what is absent is not known.
using SpecialTokens = std::map<std::string, int64_t>;

/// A model folder as it lies on disk: no tensor is copied, and none but those of old forms are touched.
struct StoredModel {
  std::string folder;
  ModelConfig config;
  const CheckpointLayout* layout;
  WeightFiles weights;  // names and shapes as the layout has them today
  SpecialTokens special_tokens;

  /// The stored tensor of one of longhand's parameters.
  const Tensor& tensor(const std::string& parameter) const { return weights.stored.at(layout->tensor_name(parameter)); }
};

/// Opens a model folder and compares its tensors with its configuration.
/// errors  FileError naming the file and the first few problems: tensors that are missing, unknown, of another shape, not floating; a tied
///         head that is not the embedding
StoredModel open_model(const std::string& folder, Checksums checksums = Checksums::index);

/// A model with the weights of `folder`, converted to the masters' type as they are read: host memory for the masters and one block.
/// Warnings about the folder go to stderr.
/// errors  those of open_model(); NaN or infinity in a weight
std::unique_ptr<LanguageModel> load_model(const std::string& folder, const Device& device, Dtype compute_dtype,
                                          Dtype master_dtype = Dtype::f32);

/// Fills an existing model of the same configuration. After an error its weights are those of neither.
void load_weights(LanguageModel& model, const std::string& folder);

struct SaveOptions {
  std::string layout = {};          // "hf", "state-spaces", "fla"; empty: the first of the family that can express the model
  std::optional<Dtype> dtype = {};  // in which every tensor is stored; absent: its own
  /// Id of the token that begins and ends texts. Absent: not known, and written as null where the layout has keys for it, because libraries
  /// put numbers of their own in the place of absent ones; convert_model() takes what the source says.
  std::optional<int64_t> end_of_text = {};
  /// Called with the name of a tensor and how many of its values became 0, because `dtype` has no number so small.
  std::function<void(const std::string& name, int64_t values)> on_zeroed = {};
};

/// Writes weights, then config.json. A tied head is stored where the layout lists it, as a second name of the embedding.
/// errors  ConfigError when the layout cannot express the model; FileError when the folder has other weight files, which a reader might
///         take for these; NumericError when a value does not fit the dtype
void save_model(const LanguageModel& model, const std::string& folder, const SaveOptions& options = {});

/// Writes a stored model in another layout, tensor by tensor from the mapped files; without a dtype every tensor keeps its bits.
/// errors  those of save_model(); NaN or infinity in a weight
void convert_model(const StoredModel& model, const std::string& folder, const SaveOptions& options = {});

/// The layout that save_model takes, so that a run can fail before its first step instead of at its first checkpoint.
/// errors  ConfigError naming the family's layouts and why each is not possible
const CheckpointLayout& find_layout(const ModelConfig& config, const std::string& wanted = "");
std::string checkpoint_layout(const ModelConfig& config);

/// The names of all layouts of all families.
std::vector<std::string> layout_names();

/// The file of the weights that a layout's library opens.
const char* weights_file_of(const CheckpointLayout& layout);

}  // namespace longhand
