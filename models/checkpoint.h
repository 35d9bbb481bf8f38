// Model folders: config.json and safetensors weights, in the layouts of the libraries the models come from.
//   transformers   config.json with model_type "mamba2"; model.safetensors, names backbone.embeddings.weight ...
//   state-spaces   config.json with d_model, ssm_cfg; model.safetensors, names backbone.embedding.weight ...
#pragma once
#include <memory>
#include <string>

#include "models/language_model.h"

namespace longhand {

/// The configuration in `folder`/config.json; which layout it is shows in its keys.
/// errors  FileError or ConfigError naming file and key: unknown model type, options outside what longhand computes
ModelConfig read_model_config(const std::string& folder);

/// A model with the weights of `folder`; every expected tensor must be there once with its exact shape, and no other.
/// errors  FileError naming file, tensor, expected and found shape; NaN or infinity in a weight
std::unique_ptr<LanguageModel> load_model(const std::string& folder, const Device& device, Dtype compute_dtype,
                                          Dtype master_dtype = Dtype::f32);

/// Fills an existing model of the same shape.
void load_weights(LanguageModel& model, const std::string& folder);

/// Writes config.json and model.safetensors (f32 masters) that transformers opens as Mamba2ForCausalLM; a model whose gated norm is per
/// group with more than one group is written in the state-spaces layout, because transformers computes that norm otherwise.
void save_model(const LanguageModel& model, const std::string& folder);

/// The name of the layout that save_model will take, so that a run can fail before its first step instead of at its first checkpoint.
/// errors  ConfigError when no library's layout can express this configuration
std::string checkpoint_layout(const ModelConfig& config);

}  // namespace longhand
