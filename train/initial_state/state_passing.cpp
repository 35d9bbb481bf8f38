// state-passing: row b of a batch starts from the final state of row b of the batch before, whose text has nothing to do with it.
//   S_0[k, b] = detach(S_T[k-1, b])     zeros for the first batch, for rows that begin a new sequence, and for rows that are not drawn
// Each micro-batch slot keeps its own rows, so gradient accumulation does not change which state a row receives.
// source  Buitrago Ruiz & Gu 2025, arXiv:2507.02782, section 4
#include "core/error.h"
#include "core/philox.h"
#include "train/initial_state/initial_state.h"

namespace longhand {
namespace {

class StatePassing final : public InitialState {
 public:
  explicit StatePassing(const InitialStateContext& context)
      : context_(context), key_(philox_key(context.seed, hash_name("state-passing"))), all_(context.options.cover == "all") {}

  RecurrentState begin(const BatchInfo& info) override {
    const auto slot = static_cast<std::size_t>(info.micro);
    if (slot >= carried_.size() || carried_[slot].absent()) return covered(context_.zero_state(info.rows));
    const RecurrentState& before = carried_[slot];
    if (before.rows() != info.rows)
      throw ShapeError("state-passing: the batch has another number of rows than the one before",
                       {{"rows", std::to_string(info.rows)}, {"before", std::to_string(before.rows())}});
    const std::vector<uint8_t> zeroed = rows_from_zero(info);
    for (const uint8_t zero : zeroed)
      if (zero != 0) return before.reset_rows(zeroed);
    return before;
  }

  void end(const BatchInfo& info, const RecurrentState& h_T) override {
    const auto slot = static_cast<std::size_t>(info.micro);
    if (carried_.size() <= slot) carried_.resize(slot + 1);
    carried_[slot] = covered(h_T.detach());
  }

  void forget() override { carried_.clear(); }

  // The rows of all slots one after the other, so that the file is one state of the whole batch.
  std::map<std::string, Tensor> save() const override {
    if (carried_.empty()) return {};
    if (carried_.size() == 1) return carried_[0].named_tensors();
    int64_t rows = 0;
    for (const RecurrentState& state : carried_) rows += state.rows();
    std::map<std::string, Tensor> whole;
    int64_t at = 0;
    for (const RecurrentState& state : carried_) {
      for (const auto& [name, part] : state.named_tensors()) {
        Tensor& all = whole[name];
        if (!all) {
          Shape shape = part.shape();
          shape[0] = rows;
          all = Tensor::empty(Device::cpu(), part.dtype(), shape);
        }
        copy(all.slice(0, at, at + part.dim(0)), part);
      }
      at += state.rows();
    }
    return whole;
  }

  void load(const std::map<std::string, Tensor>& stored, int64_t micro_batches) override {
    carried_.clear();
    if (stored.empty()) return;
    const int64_t rows = stored.begin()->second.dim(0);
    if (rows % micro_batches != 0)
      throw FileError("state-passing: the stored rows cannot be cut into the micro-batches",
                      {{"rows", std::to_string(rows)}, {"micro-batches", std::to_string(micro_batches)}});
    const auto expected = covered(context_.zero_state(rows)).named_tensors();
    for (const auto& [name, zeros] : expected) {
      const auto found = stored.find(name);
      const bool fits = found != stored.end() && found->second.shape() == zeros.shape() && found->second.dtype() == zeros.dtype();
      if (!fits || stored.size() != expected.size())
        throw FileError(
            "state-passing: the stored state is not this model's",
            {{"tensor", name}, {"found", found == stored.end() ? "(absent)" : found->second.describe()}, {"expected", zeros.describe()}});
    }
    const int64_t each = rows / micro_batches;
    for (int64_t m = 0; m < micro_batches; ++m) {
      std::map<std::string, Tensor> part;
      for (const auto& [name, tensor] : stored) part[name] = tensor.slice(0, m * each, (m + 1) * each);
      carried_.push_back(RecurrentState::from_named_tensors(part, context_.device));
    }
  }

 private:
  std::vector<uint8_t> rows_from_zero(const BatchInfo& info) const {
    std::vector<uint8_t> zeroed(static_cast<std::size_t>(info.rows), 0);
    const uint64_t step_key = philox_key(key_, static_cast<uint64_t>(info.step));
    for (std::size_t b = 0; b < zeroed.size(); ++b) {
      const bool begins = !info.resets.empty() && info.resets[b] != 0;
      const bool drawn = philox_uniform(step_key, static_cast<uint64_t>(info.row_ids[b])) < context_.options.probability;
      zeroed[b] = begins || !drawn ? 1 : 0;
    }
    return zeroed;
  }

  RecurrentState covered(RecurrentState state) const {
    if (!all_)
      for (LayerState& layer : state.layers()) std::erase_if(layer, [](const auto& entry) { return is_conv_window(entry.first); });
    return state;
  }

  InitialStateContext context_;
  uint64_t key_;
  bool all_;
  std::vector<RecurrentState> carried_;  // by micro-batch slot
};

}  // namespace

std::unique_ptr<InitialState> make_state_passing(const InitialStateContext& context) {
  return std::make_unique<StatePassing>(context);
}

}  // namespace longhand
