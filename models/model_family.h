// ModelFamily: what a model folder offers. The table of families is generated from the add_model lines of the build.
#pragma once
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "autograd/parameters.h"
#include "models/model_config.h"
#include "models/recurrent_state.h"

namespace longhand {

/// A sequence-mixing (or position-wise) part of a layer, between the norm and the residual sum.
class Mixer {
 public:
  virtual ~Mixer() = default;

  /// x        [B, T, d_model]  normalised input
  /// h0       the layer's state before the first token; absent tensors mean zeros
  /// h_T      receives the layer's state after the last token
  /// returns  [B, T, d_model]  what is added to the residual stream
  virtual Variable forward(const Variable& x, const LayerState& h0, LayerState& h_T) const = 0;

  /// One token of every row on a GPU, without a tape.
  struct Step {
    Tensor residual, branch;  // [B, d_model] f32, and what the sublayer before adds: compute type, undefined in front of the first
    Tensor norm;              // [d_model] of this sublayer
    double eps;
    Tensor out;  // [B, d_model]: receives what this mixer adds
  };
  /// Whether step() is offered for these rows.
  virtual bool has_step(int64_t /*rows*/, Dtype /*compute*/) const { return false; }
  /// As norm and forward() of one token, up to the roundings that ops/token_step/token_step.h names.
  /// state    contiguous; changed in place
  /// returns  residual + branch
  virtual Tensor step(const Step&, const LayerState& /*state*/) const { return {}; }

  /// The state tensors of this mixer as zeros for a batch of `rows`; empty for a mixer without state.
  virtual LayerState zero_state(int64_t rows, const Device& device, Dtype compute) const = 0;

  /// Floating point operations of the forward for one token: 2 per multiply-add of its projections plus the mixing itself.
  virtual double forward_flops_per_token() const = 0;
};

/// Tensor `name` of a layer's state, or undefined when it is absent.
inline Variable state_tensor(const LayerState& state, const char* name) {
  const auto found = state.find(name);
  return found == state.end() ? Variable() : found->second;
}

/// The variable of a parameter that a configuration may leave out, or undefined.
inline Variable optional_variable(const Parameter* parameter) {
  return parameter != nullptr ? parameter->variable : Variable();
}

/// Options of a parameter that is small beside the matrices: used in the master's type whatever the compute type.
inline ParameterOptions small_parameter(Initializer init, bool decay = false) {
  return {std::move(init), decay, true};
}

/// residual <- residual + mixer(norm(residual))
struct Sublayer {
  std::string scope;  // for messages and traces: "layers.3.mixer"
  Parameter* norm;    // weight [d_model]
  std::unique_ptr<Mixer> mixer;
};

/// How one library writes a family's models: the keys of its config.json, the file of its weights and the names of its tensors.
struct CheckpointLayout {
  const char* name;                                   // "hf" (transformers), "state-spaces", "fla": what `longhand convert --to` takes
  enum class Weights { safetensors, torch } weights;  // the file that the library opens: model.safetensors or pytorch_model.bin
  bool lists_tied_head;                               // whether a tied head is stored as a second name of the embedding
  bool names_special_tokens;                          // whether config.json says which tokens begin, end and fill texts

  bool (*matches)(const nlohmann::ordered_json& config);
  /// errors  ConfigError naming `file` and the key
  ModelConfig (*read)(const nlohmann::ordered_json& config, const std::string& file);
  std::string (*obstacle)(const ModelConfig&);  // why this library computes something else; empty when it computes this model
  nlohmann::ordered_json (*write)(const ModelConfig&);
  std::string (*tensor_name)(const std::string& parameter);  // longhand's name -> the library's
  /// Brings tensors of older files of this library to today's names and shapes; null when there is nothing to bring.
  /// errors  FileError naming `file` and the tensor
  void (*modernize)(std::map<std::string, Tensor>& tensors, const ModelConfig&, const std::string& file);
};

struct ModelFamily {
  const char* name;
  std::span<const ModelOption> options;
  /// What a model of this family has where nothing else is said: norm_eps, pad_vocab_size_multiple, tie_embeddings.
  void (*defaults)(ModelConfig&);
  /// Puts the number in the place of a 0 that stands for "derived", and throws ConfigError for combinations that do not fit together.
  void (*settle)(ModelConfig&);

  // Names of the parameters that every family has.
  const char* embedding_name;
  const char* final_norm_name;
  const char* head_name;
  Initializer (*embedding_init)(const ModelConfig&);
  Initializer (*head_init)(const ModelConfig&);  // of an untied head

  std::vector<Sublayer> (*make_layer)(const ModelConfig&, int64_t layer, ParameterSet&);

  std::span<const CheckpointLayout> layouts;  // in order of preference for writing
};

/// All families of this build.
std::span<const ModelFamily* const> model_families();

/// errors  ConfigError naming the known families
const ModelFamily& model_family(const std::string& name);

}  // namespace longhand
