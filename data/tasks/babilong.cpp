// See babilong.h.
#include "data/tasks/babilong.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/strict_json.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"

namespace longhand {
namespace {

using Sentences = std::vector<std::vector<int32_t>>;
constexpr std::size_t kLeastSentenceTokens = 10;
constexpr int64_t kBytesPerToken = 10;  // of the window
constexpr int kMostFruitlessWindows = 1000;

Sentences draw_sentences(const Background& background, int64_t needed, const Tokenizer& tokenizer, Draws& draws) {
  Sentences sentences;
  int fruitless = 0;
  for (int64_t have = 0; have < needed;) {
    const int64_t before = have;
    for (const std::string& text : background.window(draws, std::max<int64_t>(kBytesPerToken * needed, 4096))) {
      std::vector<int32_t> ids = encoded(tokenizer, " " + text);
      if (ids.size() < kLeastSentenceTokens) continue;
      ids.resize(std::min(ids.size(), static_cast<std::size_t>(needed - have)));
      have += std::ssize(ids);
      sentences.push_back(std::move(ids));
      if (have == needed) break;
    }
    if (have > before) fruitless = 0;
    else if (++fruitless == kMostFruitlessWindows)
      throw ValueError("babilong: the background has no sentences that are long enough",
                       {{"windows tried", std::to_string(kMostFruitlessWindows)}, {"expected", "sentences of 10 tokens"}});
  }
  return sentences;
}

// The gaps of `facts` facts among those of so many sentences, ascending.
std::vector<std::size_t> draw_gaps(std::size_t facts, std::size_t sentences, const BabilongOptions& options, Draws& draws) {
  std::vector<std::size_t> allowed, gaps;
  for (std::size_t g = 0; g <= sentences; ++g) {
    const double share = static_cast<double>(g) / static_cast<double>(sentences + 1);
    if (share >= options.facts_from && share < options.facts_to) allowed.push_back(g);
  }
  if (allowed.empty())
    throw ValueError("babilong: no gap between sentences lies in the range of the facts",
                     {{"facts from", std::to_string(options.facts_from)},
                      {"facts to", std::to_string(options.facts_to)},
                      {"sentences", std::to_string(sentences)}});
  for (std::size_t i = 0; i < facts; ++i) gaps.push_back(allowed[static_cast<std::size_t>(draws.below(std::ssize(allowed)))]);
  std::sort(gaps.begin(), gaps.end());
  return gaps;
}

std::string stripped(const std::string& text) {
  constexpr const char* kWhite = " \t\n\r\v\f";
  const auto begin = text.find_first_not_of(kWhite), end = text.find_last_not_of(kWhite);
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

}  // namespace

std::vector<std::string> babilong_labels(const std::string& task) {
  using Labels = std::vector<std::string>;
  static const Labels kPlaces{"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}, kYesNo{"no", "yes"};
  static const std::map<std::string, Labels> kLabels{
      {"qa1", kPlaces},
      {"qa2", kPlaces},
      {"qa3", kPlaces},
      {"qa4", kPlaces},
      {"qa5", {"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"}},
      {"qa6", kYesNo},
      {"qa7", {"none", "one", "three", "two"}},
      {"qa8", {"apple", "football", "milk", "nothing"}},
      {"qa9", kYesNo},
      {"qa10", {"maybe", "no", "yes"}},
      {"qa11", kPlaces},
      {"qa12", kPlaces},
      {"qa13", kPlaces},
      {"qa14", {"bedroom", "cinema", "kitchen", "office", "park", "school"}},
      {"qa15", {"cat", "mouse", "sheep", "wolf"}},
      {"qa16", {"gray", "green", "white", "yellow"}},
      {"qa17", kYesNo},
      {"qa18", kYesNo},
      {"qa19", {"e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"}},
      {"qa20", {"bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"}},
  };
  const auto found = kLabels.find(task);
  return found == kLabels.end() ? Labels() : found->second;
}

int64_t most_babi_lines(int64_t length) {
  return length == 0 ? 0 : std::max<int64_t>(2, (length - kBabilongPromptTokens) / 8);
}

std::string babilong_text(const BabiSample& story, const Background& background, const BabilongOptions& options, const Tokenizer& tokenizer,
                          uint64_t key) {
  Sentences facts;
  int64_t needed = options.length - kBabilongPromptTokens;
  for (const std::string& fact : story.facts) {
    facts.push_back(encoded(tokenizer, " " + fact));
    needed -= std::ssize(facts.back());
  }
  if (needed > 0 && background.empty())
    throw ValueError("babilong: this length needs a background",
                     {{"length", std::to_string(options.length)}, {"try", "shards with books, or length 0"}});
  Draws draws(key);
  const Sentences sentences = needed > 0 ? draw_sentences(background, needed, tokenizer, draws) : Sentences();
  const std::vector<std::size_t> gaps =
      sentences.empty() ? std::vector<std::size_t>(facts.size(), 0) : draw_gaps(facts.size(), sentences.size(), options, draws);
  std::vector<int32_t> ids;
  std::size_t fact = 0;
  for (std::size_t g = 0; g <= sentences.size(); ++g) {
    for (; fact < facts.size() && gaps[fact] == g; ++fact) ids.insert(ids.end(), facts[fact].begin(), facts[fact].end());
    if (g < sentences.size()) ids.insert(ids.end(), sentences[g].begin(), sentences[g].end());
  }
  return stripped(tokenizer.decode(ids));
}

std::map<std::string, BabilongPrompt> read_babilong_prompts(const std::string& path) {
  const auto json = parse_strict_json(read_text_file(path, std::size_t{1} << 20), "babilong: the prompts", path);
  std::map<std::string, BabilongPrompt> prompts;
  const auto text_of = [&](const std::string& task, const char* part, const nlohmann::json& value) {
    if (!value.is_string()) throw FileError("babilong: a part of a prompt is not text", {{"file", path}, {"task", task}, {"part", part}});
    return value.get<std::string>();
  };
  for (const auto& [task, parts] : json.items()) {
    if (!parts.is_object()) throw FileError("babilong: the prompt of a task is not an object", {{"file", path}, {"task", task}});
    BabilongPrompt& prompt = prompts[task];
    for (const auto& [part, value] : parts.items()) {
      if (part == "instruction") {
        prompt.instruction = text_of(task, "instruction", value);
      } else if (part == "post_prompt") {
        prompt.post_prompt = text_of(task, "post_prompt", value);
      } else if (part == "examples" && value.is_array()) {
        for (const auto& example : value)
          prompt.examples +=
              (prompt.examples.empty() ? "" : "\n\n") + ("<example>\n" + text_of(task, "examples", example)) + "\n</example>";
      } else {
        throw FileError("babilong: an unknown part of a prompt",
                        {{"file", path}, {"task", task}, {"part", part}, {"known", "instruction, post_prompt, and examples, a list"}});
      }
    }
  }
  return prompts;
}

std::string babilong_prompt(const BabilongPrompt& around, const std::string& text, const std::string& question) {
  return stripped(around.instruction + "\n\n" + around.examples + "\n\n" + around.post_prompt + "\n\n<context>\n" + stripped(text) +
                  "\n</context>\n\nQuestion: " + question);
}

}  // namespace longhand
