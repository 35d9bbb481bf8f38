// See generation.h. A row is where a sequence stands; rows are taken `batch` at a time: prefill(), then step() until all have stopped.
#include "eval/generation.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <optional>

#include "autograd/tape.h"
#include "core/error.h"
#include "eval/sampling.h"
#include "eval/text_stream.h"
#include "models/decoder.h"

namespace longhand {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The ids of a sequence, each once.
class SeenTokens {
 public:
  SeenTokens(int64_t vocab, const std::vector<int32_t>& ids) : flags_(static_cast<std::size_t>(vocab)) {
    for (const int32_t id : ids) add(id);
  }
  void add(int32_t id) {
    if (std::exchange(flags_[static_cast<std::size_t>(id)], uint8_t{1}) == 0) ids_.push_back(id);
  }
  const std::vector<int32_t>& ids() const { return ids_; }
  std::vector<int32_t> sorted() const {
    std::vector<int32_t> ids = ids_;
    std::sort(ids.begin(), ids.end());
    return ids;
  }

 private:
  std::vector<uint8_t> flags_;
  std::vector<int32_t> ids_;  // in order of appearance
};

struct Row {
  std::size_t index;  // in the call
  GeneratedRow* out;
  std::vector<int32_t> pending;  // known; the first `fed` of them have been read
  std::size_t fed = 0;
  int64_t read = 0;
  SeenTokens seen;
  TextStream text;

  std::size_t unread() const { return pending.size() - fed; }
};

// Runs rows together until each has stopped, and writes what becomes of them into `result` and `final_states`.
class BatchRunner {
 public:
  BatchRunner(const LanguageModel& model, const GenerationOptions& options, Sampler& sampler, Generation& result,
              std::vector<RecurrentState>& final_states)
      : model_(model), options_(options), sampler_(sampler), result_(result), final_states_(final_states) {}

  // `state` holds one row for each of `rows`.
  void run(std::vector<Row> rows, RecurrentState state) {
    rows_ = std::move(rows);
    state_ = std::move(state);
    const auto start = Clock::now();
    prefill();
    model_.device().synchronize();
    result_.speed.prefill_seconds += seconds_since(start);
    decode_start_ = Clock::now();
    while (!rows_.empty()) {
      if (interrupted()) stop_all(StopReason::interrupted);
      else if (options_.max_tokens == 0) stop_all(StopReason::max_tokens);
      else step();
    }
    result_.speed.decode_seconds += seconds_since(decode_start_);
  }

 private:
  // Once asked to stop, the answer stays: rows in the middle of their prompts must not be stepped.
  bool interrupted() { return interrupted_ = interrupted_ || (options_.should_stop && options_.should_stop()); }

  // Reads all but the last token of each row; rows with equally many to read go together.
  void prefill() {
    std::map<std::size_t, std::vector<int64_t>> groups;  // tokens to read -> rows
    for (std::size_t i = 0; i < rows_.size(); ++i) groups[rows_[i].unread() - 1].push_back(static_cast<int64_t>(i));
    std::vector<RecurrentState> states;
    std::vector<int64_t> order;
    for (const auto& [length, members] : groups) {
      RecurrentState state = groups.size() == 1 ? std::move(state_) : state_.select_rows(members);
      for (std::size_t at = 0; at < length && !interrupted();) {
        const std::size_t width = std::min(length - at, static_cast<std::size_t>(options_.chunk));
        state = model_.forward(next_tokens(members, width), state).state;
        at += width;
        result_.speed.prefill_tokens += static_cast<int64_t>(width * members.size());
      }
      states.push_back(std::move(state));
      order.insert(order.end(), members.begin(), members.end());
    }
    if (states.size() == 1) {
      state_ = std::move(states.front());
      return;
    }
    std::vector<int64_t> places(order.size());  // where row i stands among the groups
    for (std::size_t i = 0; i < order.size(); ++i) places[static_cast<std::size_t>(order[i])] = static_cast<int64_t>(i);
    state_ = RecurrentState::concatenate(states).select_rows(places);
  }

  // The next `width` tokens of some rows [members, width].
  Tensor next_tokens(const std::vector<int64_t>& members, std::size_t width) {
    take_tokens(members, width);
    return Tensor::from(model_.device(), {static_cast<int64_t>(members.size()), static_cast<int64_t>(width)}, tokens_);
  }

  // The same into tokens_; they count as read from now on.
  void take_tokens(const std::vector<int64_t>& members, std::size_t width) {
    tokens_.clear();
    for (const int64_t i : members) {
      Row& row = rows_[static_cast<std::size_t>(i)];
      const auto from = row.pending.begin() + static_cast<std::ptrdiff_t>(row.fed);
      tokens_.insert(tokens_.end(), from, from + static_cast<std::ptrdiff_t>(width));
      row.fed += width;
      row.read += static_cast<int64_t>(width);
    }
  }

  // One token for every row.
  void step() {
    all_.resize(rows_.size());
    std::iota(all_.begin(), all_.end(), int64_t{0});
    if (!decoder_) make_decoder();
    take_tokens(all_, 1);
    const Tensor& logits = decoder_->step(tokens_);  // [B, padded vocabulary]
    std::vector<int32_t> drawn;
    if (batch_sampler_) drawn = batch_sampler_->ids();
    // On the host where there is no GPU, and where it has found logits that Sampler refuses and names.
    if (!batch_sampler_ || *std::min_element(drawn.begin(), drawn.end()) < 0) drawn = draw_on_host(logits);
    std::vector<std::size_t> ended;
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      take(rows_[i], drawn[i]);
      if (rows_[i].out->stop != StopReason::none) ended.push_back(i);
    }
    result_.speed.decode_tokens += static_cast<int64_t>(rows_.size());
    if (!ended.empty()) remove(ended);
  }

  // Of the rows as they are now, with the draw behind every step where the logits are on a GPU.
  void make_decoder() {
    DecoderOptions with;
    if (model_.device().is_cuda()) {
      std::vector<BatchSampler::Row> rows;
      for (const Row& row : rows_) rows.push_back({row.index, static_cast<uint64_t>(row.read), row.seen.ids()});
      batch_sampler_.emplace(model_.device(), sampler_.options(), sampler_.never(), model_.config().vocab_size, rows);
      with.then = [this](const Tensor& logits) { batch_sampler_->queue(logits); };
    }
    decoder_ = std::make_unique<Decoder>(model_, std::exchange(state_, {}), with);
  }

  std::vector<int32_t> draw_on_host(const Tensor& logits) {
    const std::vector<float> values = logits.to_vector<float>();
    const auto vocab = static_cast<std::size_t>(model_.config().vocab_size), stride = static_cast<std::size_t>(logits.dim(-1));
    std::vector<int32_t> drawn;
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const Row& row = rows_[i];
      const std::span<const float> of_row = std::span(values).subspan(i * stride, vocab);
      drawn.push_back(sampler_.draw(of_row, row.seen.ids(), row.index, static_cast<uint64_t>(row.read)));
    }
    return drawn;
  }

  void take(Row& row, int32_t token) {
    GeneratedRow& out = *row.out;
    out.tokens.push_back(token);
    row.seen.add(token);
    row.pending.assign(1, token);
    row.fed = 0;
    if (token == options_.end_of_text) out.stop = StopReason::end_of_text;
    else if (options_.tokenizer != nullptr) out.text += row.text.push(options_.tokenizer->bytes_of(token).value());
    if (row.text.stopped()) out.stop = StopReason::stop_string;
    else if (out.stop == StopReason::none && static_cast<int64_t>(out.tokens.size()) >= options_.max_tokens)
      out.stop = StopReason::max_tokens;
    if (out.stop != StopReason::none) close(row);
    if (options_.on_token) options_.on_token(row.index, out);
  }

  void close(Row& row) {
    row.out->decode_seconds = seconds_since(decode_start_);
    const bool goes_on = row.out->stop == StopReason::max_tokens || row.out->stop == StopReason::interrupted;
    if (!(goes_on && options_.keep_state)) row.out->text += row.text.finish();
  }

  void stop_all(StopReason reason) {
    std::vector<std::size_t> ended(rows_.size());
    std::iota(ended.begin(), ended.end(), std::size_t{0});
    for (Row& row : rows_) {
      row.out->stop = reason;
      close(row);
    }
    remove(ended);
  }

  // Rows leave the batch with their state as it is now. `ended` ascends.
  void remove(const std::vector<std::size_t>& ended) {
    if (decoder_) state_ = decoder_->state();
    std::vector<int64_t> stay;
    std::vector<Row> running;
    auto next = ended.begin();
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      Row& row = rows_[i];
      if (next == ended.end() || *next != i) {
        stay.push_back(static_cast<int64_t>(i));
        running.push_back(std::move(row));
        continue;
      }
      ++next;
      if (!options_.keep_state) continue;
      SequenceState& s = result_.state.sequences[row.index];
      s.pending.assign(row.pending.begin() + static_cast<std::ptrdiff_t>(row.fed), row.pending.end());
      s.read = row.read;
      s.seen = row.seen.sorted();
      s.held = row.text.held();
      s.stop = row.out->stop;
      final_states_[row.index] = state_.select_rows({static_cast<int64_t>(i)});
    }
    rows_ = std::move(running);
    state_ = rows_.empty() ? RecurrentState() : state_.select_rows(stay);
    decoder_.reset();
  }

  const LanguageModel& model_;
  const GenerationOptions& options_;
  Sampler& sampler_;
  Generation& result_;
  std::vector<RecurrentState>& final_states_;  // by row of the call; one row each
  std::vector<Row> rows_;
  RecurrentState state_;  // while nothing is decoded; then the decoder has it
  std::unique_ptr<Decoder> decoder_;
  std::optional<BatchSampler> batch_sampler_;  // of the decoder's rows
  std::vector<int32_t> tokens_;
  std::vector<int64_t> all_;
  Clock::time_point decode_start_;
  bool interrupted_ = false;
};

void require_options(const GenerationOptions& o, int64_t vocab) {
  for (const auto& [name, value, least] :
       {std::tuple{"max_tokens", o.max_tokens, 0}, std::tuple{"chunk", o.chunk, 1}, std::tuple{"batch", o.batch, 1}})
    if (value < least) throw ValueError(fmt::format("generation: {} must be at least {}", name, least), {{name, std::to_string(value)}});
  if (o.end_of_text && (*o.end_of_text < 0 || *o.end_of_text >= vocab))
    throw ValueError("generation: the end-of-text token is outside the model's vocabulary",
                     {{"end_of_text", std::to_string(*o.end_of_text)}, {"vocabulary", fmt::format("{} tokens", vocab)}});
  if (!o.stop.empty() && o.tokenizer == nullptr) throw ValueError("generation: stop strings need a tokenizer", {{"stop", o.stop.front()}});
}

void require_tokens(const std::vector<int32_t>& tokens, int64_t vocab, const std::string& what) {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab)
      throw ValueError("generation: a token is outside the model's vocabulary",
                       {{"token", fmt::format("{} at index {} of {}", tokens[i], i, what)},
                        {"vocabulary", fmt::format("{} tokens", vocab)},
                        {"try", "the tokenizer that the model was trained with"}});
}

std::size_t row_count(std::size_t prompts, std::size_t state_rows) {
  if (prompts == 0 && state_rows == 0) throw ValueError("generation: there is neither a prompt nor a state to go on from");
  if (state_rows == 0 || state_rows == 1) return std::max(prompts, state_rows);
  if (prompts > 1 && prompts != state_rows)
    throw ValueError("generation: the prompts and the rows of the state differ in number",
                     {{"prompts", std::to_string(prompts)},
                      {"rows of the state", std::to_string(state_rows)},
                      {"expected", "as many prompts as rows, or one of either, or no prompt"}});
  return state_rows;
}

// Ids below `vocab` that the tokenizer does not have.
std::vector<int32_t> ids_without_text(const Tokenizer* tokenizer, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int32_t id = 0; tokenizer != nullptr && id < vocab; ++id)
    if (!tokenizer->bytes_of(id)) ids.push_back(id);
  return ids;
}

}  // namespace

Generation generate(const LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts, const GenerationOptions& options,
                    const GenerationState& from) {
  const int64_t vocab = model.config().vocab_size;
  require_options(options, vocab);
  const std::size_t count = row_count(prompts.size(), from.sequences.size());
  const std::string tokenizer = options.tokenizer != nullptr ? vocabulary_fingerprint(options.tokenizer->fingerprint()) : from.tokenizer;
  if (!from.tokenizer.empty() && !same_vocabulary(tokenizer, from.tokenizer))
    throw ValueError("generation: the state's tokens are of another tokenizer",
                     {{"tokenizer", tokenizer}, {"of the state", from.tokenizer}});
  const RecurrentState carried = from.absent() ? RecurrentState() : fitted_to(model, from.recurrent);
  if (carried.rows() != static_cast<int64_t>(from.sequences.size()) && !from.absent())
    throw ShapeError("generation: the state's tensors and sequences differ in number",
                     {{"tensors", fmt::format("{} rows", carried.rows())}, {"sequences", std::to_string(from.sequences.size())}});
  Sampler sampler(options.sampling, ids_without_text(options.tokenizer, vocab));
  const NoGrad no_grad;

  Generation result;
  result.rows.resize(count);
  std::vector<RecurrentState> final_states(options.keep_state ? count : 0);
  if (options.keep_state) result.state = {{}, std::vector<SequenceState>(count), tokenizer, weights_fingerprint(model)};
  BatchRunner runner(model, options, sampler, result, final_states);

  std::vector<Row> rows;
  std::vector<int64_t> origins;  // the row of `from` that each of `rows` begins with
  const auto run = [&] {
    if (!rows.empty())
      runner.run(std::exchange(rows, {}),
                 carried.absent() ? model.zero_state(static_cast<int64_t>(origins.size())) : carried.select_rows(origins));
    rows.clear();
    origins.clear();
  };
  for (std::size_t i = 0; i < count; ++i) {
    // By the row's number, not by how many run: a row keeps its neighbours, and with them its bits, when others have ended before.
    if (i % static_cast<std::size_t>(options.batch) == 0) run();
    const std::size_t origin = from.sequences.size() == 1 ? 0 : i;
    SequenceState s = from.absent() ? SequenceState() : from.sequences[origin];
    GeneratedRow& out = result.rows[i];
    TextStream text(options.stop, prompts.empty() ? std::exchange(s.held, {}) : std::string());
    if (text.stopped()) {  // what was held back has a stop string that was none before
      s.stop = StopReason::stop_string;
      out.text = text.finish();
    }
    if (prompts.empty() && (s.stop == StopReason::end_of_text || s.stop == StopReason::stop_string)) {
      out.stop = s.stop;
      if (options.keep_state) {
        final_states[i] = carried.select_rows({static_cast<int64_t>(origin)});
        result.state.sequences[i] = std::move(s);
      }
      continue;
    }
    if (!prompts.empty()) {
      std::vector<int32_t> prompt = prompts[prompts.size() == 1 ? 0 : i];
      if (prompt.empty() && s.length() == 0) {
        if (!options.end_of_text)
          throw ValueError("generation: a prompt is empty, and no end-of-text token is known to begin with",
                           {{"prompt", std::to_string(i)}});
        prompt = {*options.end_of_text};
      }
      require_tokens(prompt, vocab, fmt::format("prompt {}", i));
      out.prompt_tokens = static_cast<int64_t>(prompt.size());
      out.text = TextStream({}, std::exchange(s.held, {})).finish();  // nothing can join it any more
      s.pending.insert(s.pending.end(), prompt.begin(), prompt.end());
    }
    if (s.pending.empty()) throw ValueError("generation: a row of the state has no token to go on from", {{"row", std::to_string(i)}});
    require_tokens(s.pending, vocab, fmt::format("the tokens to be read of row {}", i));
    require_tokens(s.seen, vocab, fmt::format("the tokens seen of row {}", i));
    SeenTokens seen(vocab, s.seen);
    for (const int32_t id : s.pending) seen.add(id);
    rows.push_back({i, &out, std::move(s.pending), 0, s.read, std::move(seen), std::move(text)});
    origins.push_back(static_cast<int64_t>(origin));
  }
  run();
  if (options.keep_state) result.state.recurrent = RecurrentState::concatenate(final_states);
  return result;
}

}  // namespace longhand
