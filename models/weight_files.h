// The files of a model's weights: one file or several shards with an index, safetensors or torch.
#pragma once
#include <string>
#include <vector>

#include "core/named_tensors.h"
#include "core/torch_file.h"

namespace longhand {

struct WeightFiles {
  NamedTensors stored;                // path: the file or index that was opened
  std::vector<std::string> paths;     // of every file with tensors
  std::vector<std::string> left_out;  // weight files of the folder that were not read, because `stored` comes first
  std::string doubt = {};             // what an index says wrongly although every tensor is there; a sentence, or empty
  int64_t file_bytes() const;         // of `paths` together

  /// To stderr: files that were left out, and the doubt.
  void warn() const;
};

/// The names of weight files, in the order in which they are looked for: model.safetensors, model.safetensors.index.json,
/// pytorch_model.bin, pytorch_model.bin.index.json. Where a folder has several, the first counts and the others are not opened.
std::vector<std::string> weight_file_names();

/// The weights of a folder.
/// errors  FileError naming what was looked for; those of read_tensor_file()
WeightFiles read_weight_files(const std::string& folder, Checksums checksums = Checksums::index);

/// The tensors of one file: .safetensors; .bin, .pt, .pth (torch); .index.json, with all its shards.
/// errors  FileError naming file, item and rule. Of an index: a shard outside its folder or absent; a tensor that is not in the shard the
///         index says; a tensor of a shard that the index does not list. A metadata.total_size that is not the sum of the tensors' bytes is
///         a doubt only: published conversions have wrong ones, and every tensor has been found in its shard
/// source  huggingface/transformers, docs on sharded checkpoints: "weight_map" {tensor: file}, "metadata" {"total_size": bytes}
WeightFiles read_tensor_file(const std::string& path, Checksums checksums = Checksums::index);

}  // namespace longhand
