// See row_stream.h.
#include "eval/row_stream.h"

#include <algorithm>
#include <numeric>

#include "autograd/tape.h"

namespace longhand {

RecurrentState read_rows(const LanguageModel& model, const std::vector<std::vector<int32_t>>& rows, int64_t chunk,
                         const std::function<void(const RowChunk&)>& on_chunk) {
  require_at_least_one("chunk", chunk);
  for (std::size_t i = 0; i < rows.size(); ++i) require_tokens_of(rows[i], model.config().vocab_size, static_cast<int64_t>(i) + 1);
  const NoGrad no_grad;
  std::vector<std::size_t> running(rows.size());
  std::iota(running.begin(), running.end(), std::size_t{0});
  std::stable_sort(running.begin(), running.end(), [&](std::size_t a, std::size_t b) { return rows[a].size() < rows[b].size(); });
  std::vector<int64_t> place(rows.size());  // of a row among the finished ones
  std::vector<RecurrentState> finished;
  int64_t finished_rows = 0, at = 0;
  RecurrentState state = model.zero_state(static_cast<int64_t>(rows.size()));
  std::vector<int32_t> tokens;
  while (!running.empty()) {
    const int64_t shortest = std::ssize(rows[running.front()]);
    if (at == shortest) {
      std::size_t ended = 0;
      while (ended < running.size() && std::ssize(rows[running[ended]]) == shortest) ++ended;
      for (std::size_t i = 0; i < ended; ++i) place[running[i]] = finished_rows++;
      std::vector<int64_t> leave(ended), stay(running.size() - ended);
      std::iota(leave.begin(), leave.end(), int64_t{0});
      std::iota(stay.begin(), stay.end(), static_cast<int64_t>(ended));
      finished.push_back(stay.empty() ? std::move(state) : state.select_rows(leave));
      if (!stay.empty()) state = state.select_rows(stay);
      running.erase(running.begin(), running.begin() + static_cast<std::ptrdiff_t>(ended));
      continue;
    }
    const int64_t width = std::min(chunk, shortest - at);
    tokens.clear();
    for (const std::size_t i : running) tokens.insert(tokens.end(), rows[i].begin() + at, rows[i].begin() + at + width);
    auto out = model.forward(Tensor::from(model.device(), {std::ssize(running), width}, tokens), state);
    state = std::move(out.state);
    if (on_chunk) on_chunk({running, at, width, out.hidden.value()});
    at += width;
  }
  if (finished.empty()) return {};
  if (finished.size() > 1) state = RecurrentState::concatenate(finished);
  else state = std::move(finished.front());
  return std::is_sorted(place.begin(), place.end()) ? state : state.select_rows(place);
}

}  // namespace longhand
