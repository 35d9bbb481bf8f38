// Keys of config.json and names of tensors that the layouts of several families have in common.
#pragma once
#include <initializer_list>

#include "models/config_json.h"
#include "models/model_config.h"

namespace longhand {

/// Whether `key` is there and is this text.
bool is_text(const nlohmann::ordered_json& json, const char* key, const char* text);

// --- files in the manner of transformers (also FLA): vocab_size counts the rows of the embedding ----------------

/// "silu" or "swish", which are the same function.
void require_silu(ConfigReader& reader, const char* fallback);

/// A number that FLA calls `flas_key`: its Mamba and Mamba-2 have the model_type and the tensors of transformers'.
/// errors  ConfigError when both keys are there and differ
double number_of_either(ConfigReader& reader, const char* key, const char* flas_key, double fallback);

/// vocab_size, and what these files have no key for, from the object "longhand" where longhand wrote them: the number of tokens before
/// padding, the padding, and the named options of the family.
void read_padded_vocab(ConfigReader& reader, const std::string& file, int64_t fallback, ModelConfig& config,
                       std::initializer_list<const char*> options = {});
/// The object "longhand".
nlohmann::ordered_json own_keys(const ModelConfig& config, std::initializer_list<const char*> options = {});

/// The names of tensors in these files are longhand's own.
std::string own_name(const std::string& parameter);

// --- state-spaces -----------------------------------------------------------------------------------------------

/// Every key outside ssm_cfg; no other may be there. errors  ConfigError for attention layers, MLPs and LayerNorm
void read_state_spaces_skeleton(const nlohmann::ordered_json& json, const std::string& file, ModelConfig& config);

/// Only the embedding has another name there.
std::string state_spaces_name(const std::string& parameter);

/// Why state-spaces computes something else for every family; empty when it does not.
std::string state_spaces_skeleton_obstacle(const ModelConfig& config);

}  // namespace longhand
