// Which tokenizer belongs to a model.
#pragma once
#include <memory>
#include <string>

#include "data/tokenizer.h"
#include "eval/run_folder.h"

namespace longhand {

/// Names the tokenizer that was asked for; else the one that the model's run recorded; else tokenizer.json in the model's folder.
/// command  in front of its errors: "eval"
/// asked    a tokenizer.json or the name of a built-in tokenizer; "" for none
/// errors   ConfigError where there is none, with what was looked for
std::string model_tokenizer(const std::string& command, const std::string& asked, const ModelPlace& place, const RunRecord& record);

/// errors  ConfigError where `fingerprint` is of another vocabulary than the one that the model was trained with, if its run says so
void require_trained_vocabulary(const std::string& command, const std::string& fingerprint, const RunRecord& record);

/// That tokenizer, of that vocabulary.
std::unique_ptr<Tokenizer> open_model_tokenizer(const std::string& command, const std::string& asked, const ModelPlace& place,
                                                const RunRecord& record, TokenizerOptions options = {});

}  // namespace longhand
