// See logits.h.
#include "models/logits.h"

#include <algorithm>

#include "autograd/tape.h"
#include "core/error.h"

namespace longhand {
namespace {

constexpr int32_t kNotCounted = -100;

// A tensor of ids as i32 on the host, each checked.
std::vector<int32_t> ids_of(const NamedTensors& input, const std::string& name, int64_t vocab, bool may_be_left_out) {
  const Tensor& tensor = input.at(name);
  if (tensor.rank() != 2 || tensor.numel() == 0)
    throw ShapeError("logits: ids are [B, T]", {{"file", input.path}, {name, tensor.describe()}, {"expected", "[B, T], not empty"}});
  if (tensor.dtype() != Dtype::i32 && tensor.dtype() != Dtype::i64)
    throw DtypeError("logits: ids are whole numbers", {{"file", input.path}, {name, tensor.describe()}, {"expected", "i32 or i64"}});
  const auto wide = tensor.to_vector<int64_t>();
  for (std::size_t i = 0; i < wide.size(); ++i) {
    if ((wide[i] >= 0 && wide[i] < vocab) || (may_be_left_out && wide[i] == kNotCounted)) continue;
    const int64_t T = tensor.dim(1), at = static_cast<int64_t>(i);
    throw ValueError("logits: an id is outside the model's vocabulary",
                     {{"file", input.path},
                      {name + "[" + std::to_string(at / T) + ", " + std::to_string(at % T) + "]", std::to_string(wide[i])},
                      {"expected", "0 to " + std::to_string(vocab - 1) + (may_be_left_out ? ", or -100 (not counted)" : "")}});
  }
  return {wide.begin(), wide.end()};
}

// input_ids and, where there are labels, targets and mask, on the host.
struct Case {
  int64_t B, T;
  std::vector<int32_t> tokens, targets;
  std::vector<float> mask;

  // Positions [begin, end) of every row, on the device of the model.
  TokenBatch batch(const Device& device, int64_t begin, int64_t end) const {
    const auto cut = [&](const auto& values) {
      const Tensor whole = Tensor::from(Device::cpu(), {B, T}, values);
      return whole.slice(1, begin, end).clone().to(device);
    };
    TokenBatch part{cut(tokens), {}, {}};
    if (!targets.empty()) part.targets = cut(targets), part.mask = cut(mask);
    return part;
  }
};

Case read_case(const NamedTensors& input, int64_t vocab) {
  const Tensor& ids = input.at("input_ids");
  Case c{0, 0, ids_of(input, "input_ids", vocab, false), {}, {}};
  c.B = ids.dim(0), c.T = ids.dim(1);
  if (!input.contains("labels")) return c;
  c.targets = ids_of(input, "labels", vocab, true);
  if (input.at("labels").shape() != ids.shape())
    throw ShapeError("logits: there must be one label for each id",
                     {{"file", input.path}, {"input_ids", ids.describe()}, {"labels", input.at("labels").describe()}});
  for (int32_t& target : c.targets) {
    c.mask.push_back(target == kNotCounted ? 0.0f : 1.0f);
    if (target == kNotCounted) target = 0;
  }
  if (std::count(c.mask.begin(), c.mask.end(), 1.0f) == 0) throw ValueError("logits: no label counts", {{"file", input.path}});
  return c;
}

// Logits of hidden [B, n, d] into out [B, n, V], some rows at a time.
void write_logits(const LanguageModel& model, const Tensor& hidden, const Tensor& out) {
  constexpr int64_t kRows = 256;
  for (int64_t b = 0; b < hidden.dim(0); ++b)
    for (int64_t begin = 0; begin < hidden.dim(1); begin += kRows) {
      const int64_t end = std::min(begin + kRows, hidden.dim(1));
      copy(out.slice(0, b, b + 1).slice(1, begin, end), model.logits(hidden.slice(0, b, b + 1).slice(1, begin, end)));
    }
}

}  // namespace

std::map<std::string, Tensor> logits_and_loss(LanguageModel& model, const NamedTensors& input, const LogitsOptions& options) {
  if (options.chunk < 1) throw ValueError("logits: chunk must be at least 1", {{"chunk", std::to_string(options.chunk)}});
  const Case c = read_case(input, model.config().vocab_size);
  const bool labels = !c.targets.empty();
  if (options.gradients && !labels)
    throw ValueError("logits: gradients are those of the loss, and there are no labels",
                     {{"file", input.path}, {"expected", "labels [B, T]"}});

  std::map<std::string, Tensor> result;
  const Tensor logits = Tensor::empty(Device::cpu(), Dtype::f32, {c.B, c.T, model.config().padded_vocab()});
  result["logits"] = logits;
  double sum = 0, counted = 0;
  RecurrentState state;
  {
    const NoGrad no_grad;
    const int64_t width = std::max<int64_t>(1, options.chunk / c.B);
    for (int64_t begin = 0; begin < c.T; begin += width) {
      const int64_t end = std::min(begin + width, c.T);
      const TokenBatch part = c.batch(model.device(), begin, end);
      auto out = model.forward(part.tokens, state);
      write_logits(model, out.hidden.value(), logits.slice(1, begin, end));
      if (labels && !options.gradients) {
        const auto loss = model.token_loss(out.hidden.value(), part.targets).to_vector<double>();
        const auto mask = part.mask.to_vector<double>();
        for (std::size_t i = 0; i < loss.size(); ++i)
          if (mask[i] != 0) sum += loss[i], counted += 1;
      }
      state = std::move(out.state);
    }
  }
  const RecurrentState on_host = state.to(Device::cpu());
  for (std::size_t layer = 0; layer < on_host.layers().size(); ++layer)
    for (const auto& [name, variable] : on_host.layers()[layer])
      result["final_state." + std::to_string(layer) + "." + name] = variable.value();
  if (!labels) return result;
  double loss = counted > 0 ? sum / counted : 0;
  if (options.gradients) {
    model.parameters().clear_grads();
    const Variable whole = model.loss(c.batch(model.device(), 0, c.T)).loss;
    loss = whole.value().item();
    backward(whole);
    model.parameters().complete_grads();
    for (const Parameter& p : model.parameters().all()) result["grad." + p.name] = p.grad.to(Device::cpu()).to(Dtype::f32).clone();
  }
  result["loss"] = Tensor::full(Device::cpu(), Dtype::f32, {}, loss);
  return result;
}

}  // namespace longhand
