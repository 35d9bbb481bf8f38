// See convert_command.h.
#include "tools/convert_command.h"

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <filesystem>

#include "core/files.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "tools/model_text.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr const char* kTokenizerFiles[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"};

}  // namespace

void add_convert_options(CLI::App& command, ConvertCommand& options) {
  command.add_option("--model", options.model, "A model folder, a checkpoint, or a run (its latest checkpoint)")
      ->required()
      ->type_name("DIR");
  command.add_option("--to", options.layout, "Layout of the library that shall open it: hf (transformers), state-spaces or fla")
      ->required()
      ->check(CLI::IsMember(layout_names()))
      ->type_name("LAYOUT");
  command.add_option("--out", options.out, "The folder to write; it must be empty or not exist")->required()->type_name("DIR");
  command.add_option("--dtype", options.dtype, "keep (every tensor bit for bit), f32, f16 or bf16")
      ->check(CLI::IsMember({"keep", "f32", "f16", "bf16"}))
      ->type_name("TYPE")
      ->capture_default_str();
  command.add_flag("--skip-checksums", options.skip_checksums, "Do not compare a torch file's data with its CRC-32 checksums");
}

int run_convert(const ConvertCommand& options) {
  int64_t zeroed = 0, tensors = 0;
  std::string first;
  const SaveOptions save{.layout = options.layout,
                         .dtype = options.dtype == "keep" ? std::nullopt : std::optional(parse_dtype(options.dtype)),
                         .end_of_text = {},
                         .on_zeroed = [&](const std::string& name, int64_t values) {
                           zeroed += values;
                           if (tensors++ == 0) first = name;
                         }};
  const StoredModel model = open_model(find_model(options.model).model_folder, options.skip_checksums ? Checksums::none : Checksums::all);
  write_folder_atomically(options.out, [&](const std::string& folder) {
    convert_model(model, folder, save);
    for (const char* name : kTokenizerFiles)
      if (const std::string from = model.folder + "/" + name; fs::exists(from))
        write_file_atomically(folder + "/" + name, read_text_file(from));
  });
  fmt::print("from {} ({}, {})\n", model.folder, model.layout->name, fs::path(model.weights.stored.path).filename().string());
  model.weights.warn();
  if (zeroed > 0)
    fmt::print(stderr, "warning: {} values of {} tensors became 0, because {} has none so small; the first stand in {}\n", zeroed, tensors,
               options.dtype, first);
  print_written_model(options.out);
  return 0;
}

}  // namespace longhand
