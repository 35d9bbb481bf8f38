// state-passing: row b of a batch starts from the final state of row b of the batch before, whose text has nothing to do with it.
//   S_0[k, b] = detach(S_T[k-1, b])
// source  Buitrago Ruiz & Gu 2025, arXiv:2507.02782, section 4
#include "train/initial_state/carried_state.h"

namespace longhand {

std::unique_ptr<InitialState> make_state_passing(const InitialStateContext& context) {
  return std::make_unique<CarriedState>(context, "state-passing");
}

}  // namespace longhand
