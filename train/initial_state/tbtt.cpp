// tbtt, truncated backpropagation through time: row b of a batch goes on with the text of row b of the batch before, from the state that it
// ended with; a row that begins a new sequence starts from zero. Forward it is one pass over a long text, backward it ends at the row's
// begin.
//   S_0[k, b] = resets[k, b] ? 0 : detach(S_T[k-1, b])
// source  Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories"; as an
//         initial state Buitrago Ruiz & Gu 2025, arXiv:2507.02782, section 4
#include "train/initial_state/carried_state.h"

namespace longhand {

std::unique_ptr<InitialState> make_tbtt(const InitialStateContext& context) {
  return std::make_unique<CarriedState>(context, "tbtt");
}

}  // namespace longhand
