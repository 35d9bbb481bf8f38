// See logits_command.h.
#include "tools/logits_command.h"

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "core/safetensors.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "models/logits.h"
#include "tools/device_options.h"

namespace longhand {

void add_logits_options(CLI::App& command, LogitsCommand& options) {
  command.add_option("--model", options.model, "A model folder, a checkpoint, or a run (its latest checkpoint)")
      ->required()
      ->type_name("DIR");
  command
      .add_option("--tokens", options.tokens,
                  "Reads input_ids [B, T] and, if there are any, labels [B, T] (not shifted; -100: not counted)")
      ->required()
      ->type_name("F.safetensors");
  command.add_option("--out", options.out, "Writes logits [B, T, V], final_state.LAYER.NAME, and with labels the loss")
      ->required()
      ->type_name("F.safetensors");
  command.add_flag("--gradients", options.gradients, "Write grad.PARAMETER of the loss too; needs labels");
  command.add_option("--device", options.device, "cpu, cuda, cuda:N, or auto: a GPU if there is one")
      ->type_name("DEVICE")
      ->capture_default_str();
  command.add_option("--dtype", options.dtype, "Type of the computation: f32, bf16, f64, or auto: bf16 on a GPU, f32 on a CPU")
      ->type_name("TYPE")
      ->capture_default_str();
}

int run_logits(const LogitsCommand& options) {
  const NamedTensors input = read_safetensors(options.tokens);  // first: a model takes longer
  const DeviceChoice choice = choose_device(options.device, options.dtype);
  const auto model = load_model(find_model(options.model).model_folder, choice.device, choice.dtype, choice.master_dtype());
  const auto result = logits_and_loss(*model, input, {.gradients = options.gradients});
  write_safetensors(
      options.out, result,
      {{"format", "longhand logits"}, {"model", options.model}, {"device", choice.device.description()}, {"dtype", name_of(choice.dtype)}});
  fmt::print(stderr, "{}: {} tensors, logits {}", options.out, result.size(), result.at("logits").shape().str());
  if (const auto loss = result.find("loss"); loss != result.end()) fmt::print(stderr, ", loss {:.6f}", loss->second.item());
  fmt::print(stderr, "\n");
  return 0;
}

}  // namespace longhand
