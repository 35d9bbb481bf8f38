// Small models with fixed weights, and token sequences for them: what the tests of measures run on.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "core/philox.h"
#include "models/language_model.h"
#include "tests/support/model_checks.h"

namespace longhand::test {

using Sequences = std::vector<std::vector<int32_t>>;
constexpr int32_t kSmallVocab = 32;
constexpr const char* kFamilies[] = {"mamba1", "mamba2", "gla"};

inline ModelConfig small_config(const std::string& family) {
  ModelConfig config = default_config(family);
  config.d_model = 16;
  config.n_layer = 2;
  config.vocab_size = kSmallVocab;
  if (family == "mamba1") config.options = {{"d_state", 4}};
  if (family == "mamba2") config.options = {{"d_state", 8}, {"headdim", 8}, {"chunk_size", 16}};
  if (family == "gla") config.options = {{"num_heads", 2}};
  config.complete();
  return config;
}

/// A Mamba-2 whose predictions depend strongly on the state: the embedding is scaled up so that logits are of order 1.
inline std::unique_ptr<LanguageModel> small_model(Dtype dtype, double embedding_scale = 25) {
  auto model = std::make_unique<LanguageModel>(small_config("mamba2"), Device::cpu(), dtype, dtype);
  model->initialize(1);
  for (Parameter& parameter : model->parameters().all())
    if (parameter.name.find("embedding") != std::string::npos) multiply(parameter.master, embedding_scale);
  model->parameters().refresh_compute();
  return model;
}

/// Of any family, with values far from the small initial ones, so that every part has its say.
inline std::unique_ptr<LanguageModel> shaken_model(const std::string& family, Dtype dtype, const Device& device = Device::cpu()) {
  auto model = std::make_unique<LanguageModel>(small_config(family), device, dtype, dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
  model->initialize(1);
  uint64_t seed = 100;
  for (Parameter& p : model->parameters().all())
    add_scaled(p.master, random_tensor(Device::cpu(), p.master.dtype(), p.shape, ++seed).to(device), 0.3);
  model->parameters().refresh_compute();
  return model;
}

inline std::vector<int32_t> random_tokens(std::size_t count, uint64_t key) {
  std::vector<int32_t> tokens(count);
  for (std::size_t i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>(philox_u64(key, i) % kSmallVocab);
  return tokens;
}

inline Sequences random_sequences(const std::vector<std::size_t>& lengths) {
  Sequences sequences;
  for (std::size_t i = 0; i < lengths.size(); ++i) sequences.push_back(random_tokens(lengths[i], 100 + i));
  return sequences;
}

/// One sequence after the other.
inline std::function<bool(std::vector<int32_t>&)> each_of(const Sequences& sequences) {
  return [&sequences, i = std::size_t{0}](std::vector<int32_t>& tokens) mutable {
    if (i == sequences.size()) return false;
    tokens = sequences[i++];
    return true;
  };
}

/// Tokens [begin, end) of a sequence as one row.
inline Tensor one_row(const Device& device, const std::vector<int32_t>& tokens, std::size_t begin, std::size_t end) {
  return Tensor::from(
      device, {1, static_cast<int64_t>(end - begin)},
      std::vector<int32_t>(tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end)));
}

/// What an error of type E says, or "" when nothing was thrown.
template <class E>
std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

}  // namespace longhand::test
