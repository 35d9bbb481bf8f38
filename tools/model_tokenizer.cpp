// See model_tokenizer.h.
#include "tools/model_tokenizer.h"

#include <filesystem>

#include "core/error.h"

namespace longhand {

namespace fs = std::filesystem;

std::string model_tokenizer(const std::string& command, const std::string& asked, const ModelPlace& place, const RunRecord& record) {
  if (!asked.empty()) return asked;
  if (record.tokenizer && (is_built_in_tokenizer(*record.tokenizer) || fs::exists(*record.tokenizer))) return *record.tokenizer;
  const std::string beside = (fs::path(place.model_folder) / "tokenizer.json").string();
  if (fs::exists(beside)) return beside;
  std::vector<ErrorRow> rows{{"model", place.model_folder}};
  if (record.tokenizer) rows.push_back({"recorded", *record.tokenizer + ", which is not there"});
  rows.push_back({"looked for", beside});
  rows.push_back({"try", "--tokenizer with the tokenizer.json of the training, or with bytes"});
  throw ConfigError(command + ": the tokenizer of the model is not known", rows);
}

void require_trained_vocabulary(const std::string& command, const std::string& fingerprint, const RunRecord& record) {
  if (record.fingerprint && !same_vocabulary(fingerprint, *record.fingerprint))
    throw ConfigError(command + ": the tokenizer is not the one that the model was trained with",
                      {{"tokenizer", fingerprint}, {"trained with", *record.fingerprint}});
}

std::unique_ptr<Tokenizer> open_model_tokenizer(const std::string& command, const std::string& asked, const ModelPlace& place,
                                                const RunRecord& record, TokenizerOptions options) {
  auto tokenizer = open_tokenizer(model_tokenizer(command, asked, place, record), options);
  require_trained_vocabulary(command, tokenizer->fingerprint(), record);
  return tokenizer;
}

}  // namespace longhand
