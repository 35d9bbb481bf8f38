// zero: every row starts from the zero state.
#include "train/initial_state/initial_state.h"

namespace longhand {
namespace {

class ZeroState final : public InitialState {
 public:
  RecurrentState begin(const BatchInfo&) override { return {}; }
  void end(const BatchInfo&, const RecurrentState&) override {}
};

}  // namespace

std::unique_ptr<InitialState> make_zero_state(const InitialStateContext&) {
  return std::make_unique<ZeroState>();
}

}  // namespace longhand
