// The two arrangements, worked by hand; and the promise that threads, caches and resuming change nothing.
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "core/error.h"
#include "data/byte_tokenizer.h"
#include "data/dataset.h"
#include "data/shard_writer.h"
#include "data/token_cache.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

using test::ScratchFolder;

const auto kBytes = std::make_shared<const ByteTokenizer>();
constexpr int32_t kEnd = 256;

void write_texts(const std::string& path, const std::vector<std::string>& texts) {
  write_shard(path, [&](ShardWriter& writer) {
    for (const std::string& text : texts) writer.add(text, "Test");
  });
}

// "abE" for the ids of a, b and the end of a text; "." for a masked place.
std::string spell(const Batch& batch, int64_t b, const std::vector<int32_t>& ids) {
  std::string out;
  for (int64_t i = b * batch.length; i < (b + 1) * batch.length; ++i) {
    const int32_t id = ids[static_cast<std::size_t>(i)];
    out += !batch.mask[static_cast<std::size_t>(i)] ? '.' : id == kEnd ? 'E' : static_cast<char>(id);
  }
  return out;
}

struct SpelledRow {
  std::string tokens, targets;
  int resets;
  bool operator==(const SpelledRow&) const = default;
};

std::vector<SpelledRow> spell_all(BatchStream stream, int64_t most_batches = 1000) {
  std::vector<SpelledRow> out;
  Batch batch;
  for (int64_t k = 0; k < most_batches && stream.next(batch); ++k)
    for (int64_t b = 0; b < batch.rows; ++b)
      out.push_back({spell(batch, b, batch.tokens), spell(batch, b, batch.targets), batch.resets[static_cast<std::size_t>(b)]});
  return out;
}

// Three shards of documents with 0 to 60 letters, and one of 5000.
std::vector<std::string> write_sample(const ScratchFolder& scratch) {
  std::mt19937 random(7);
  std::vector<std::string> files;
  for (int shard = 0; shard < 3; ++shard) {
    std::vector<std::string> texts;
    for (int i = 0; i < 25; ++i) {
      std::string text(random() % 61, 'x');
      if (shard == 1 && i == 11) text.resize(5000);
      for (char& c : text) c = static_cast<char>('a' + random() % 26);
      texts.push_back(text);
    }
    files.push_back(scratch.file("shard-" + std::to_string(shard) + ".jsonl.zst"));
    write_texts(files.back(), texts);
  }
  return files;
}

std::vector<DataOptions> arrangements(const std::vector<std::string>& files) {
  DataOptions packed;
  packed.files = files;
  packed.rows = 3;
  packed.length = 16;
  packed.seed = 5;
  packed.shuffle_rows = 7;
  DataOptions padded = packed;
  padded.pad_tail = true;
  padded.epochs = 2;
  DataOptions streams = packed;
  streams.arrangement = "streams";
  DataOptions documents = streams;
  documents.stream_unit = "document";
  documents.epochs = 2;
  return {packed, padded, streams, documents};
}

std::vector<Batch> take(BatchStream stream, int64_t most_batches) {
  std::vector<Batch> out;
  for (Batch batch; static_cast<int64_t>(out.size()) < most_batches && stream.next(batch);) out.push_back(batch);
  return out;
}

void require_equal(const Batch& a, const Batch& b) {
  REQUIRE(a.rows == b.rows);
  REQUIRE(a.tokens == b.tokens);
  REQUIRE(a.targets == b.targets);
  REQUIRE(a.mask == b.mask);
  REQUIRE(a.resets == b.resets);
  REQUIRE(a.row_ids == b.row_ids);
  REQUIRE(a.cursor_after == b.cursor_after);
}

TEST("packed rows by hand") {
  const ScratchFolder scratch;
  write_texts(scratch.file("s.jsonl.zst"), {"abcde", "fg", "", "hijk"});  // abcdeEfgEEhijkE: 15 tokens, 14 targets
  DataOptions options;
  options.files = {scratch.file("s.jsonl.zst")};
  options.rows = 2;
  options.length = 4;
  options.shuffle = false;
  options.epochs = 1;
  const std::vector<SpelledRow> whole = {{"abcd", "bcde", 1}, {"eEfg", "EfgE", 1}, {"EEhi", "Ehij", 1}};
  CHECK(spell_all({options, kBytes}) == whole);
  options.pad_tail = true;
  std::vector<SpelledRow> padded = whole;
  padded.push_back({"jk..", "kE..", 1});
  CHECK(spell_all({options, kBytes}) == padded);
  options.shuffle_rows = 1;  // blocks of one row: the borders of blocks change nothing
  CHECK(spell_all({options, kBytes}) == padded);
  options.epochs = 2;
  const std::vector<SpelledRow> twice = {padded[0], padded[1], padded[2], padded[3], padded[0], padded[1], padded[2], padded[3]};
  CHECK(spell_all({options, kBytes}) == twice);
}

TEST("streams of packed documents by hand") {
  const ScratchFolder scratch;
  write_texts(scratch.file("s.jsonl.zst"), {"abcdef", "gh", "", "ijklmnopq"});
  DataOptions options;
  options.files = {scratch.file("s.jsonl.zst")};
  options.arrangement = "streams";
  options.rows = 2;
  options.length = 4;
  options.epochs = 1;
  // Row 0 takes the first document, row 1 needs three for five tokens; the end of row 0's text leaves it with padding.
  const std::vector<SpelledRow> expected = {{"abcd", "bcde", 1}, {"ghEE", "hEEi", 1}, {"ef..", "fE..", 0}, {"ijkl", "jklm", 0},
                                            {"....", "....", 0}, {"mnop", "nopq", 0}, {"....", "....", 0}, {"q...", "E...", 0}};
  CHECK(spell_all({options, kBytes}) == expected);
}

TEST("streams of single documents by hand") {
  const ScratchFolder scratch;
  write_texts(scratch.file("s.jsonl.zst"), {"abcdef", "gh", "", "ijklmnop"});
  DataOptions options;
  options.files = {scratch.file("s.jsonl.zst")};
  options.arrangement = "streams";
  options.stream_unit = "document";
  options.rows = 2;
  options.length = 4;
  options.epochs = 1;
  // The empty text has nothing to predict. "ijklmnopE" fills two rows exactly.
  const std::vector<SpelledRow> expected = {{"abcd", "bcde", 1}, {"gh..", "hE..", 1}, {"ef..", "fE..", 0},
                                            {"ijkl", "jklm", 1}, {"....", "....", 1}, {"mnop", "nopE", 0}};
  CHECK(spell_all({options, kBytes}) == expected);
}

TEST("shuffling moves rows inside their block and shards inside their epoch, and loses none") {
  const ScratchFolder scratch;
  DataOptions options = arrangements(write_sample(scratch))[0];
  options.epochs = 1;
  const auto rows_by_id = [&](uint64_t seed, bool shuffle) {
    options.seed = seed;
    options.shuffle = shuffle;
    std::vector<int64_t> order;
    std::map<int64_t, std::string> rows;
    for (const Batch& batch : take({options, kBytes}, 1000))
      for (int64_t b = 0; b < batch.rows; ++b) {
        order.push_back(batch.row_ids[static_cast<std::size_t>(b)]);
        rows[order.back()] = spell(batch, b, batch.tokens);
      }
    return std::pair(order, rows);
  };
  const auto [plain_order, plain_rows] = rows_by_id(0, false);
  CHECK(std::is_sorted(plain_order.begin(), plain_order.end()));
  std::set<std::string> first_rows;
  for (const uint64_t seed : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u}) {
    const auto [order, rows] = rows_by_id(seed, true);
    CHECK(rows.size() == order.size());  // no number twice
    CHECK(rows.size() == plain_rows.size());
    CHECK(rows.rbegin()->first == static_cast<int64_t>(rows.size()) - 1);
    CHECK(!std::is_sorted(order.begin(), order.end()));
    for (std::size_t i = 0; i < order.size(); ++i) CHECK(order[i] / 7 == static_cast<int64_t>(i) / 7);
    first_rows.insert(rows.at(0));
  }
  CHECK(first_rows.size() == 3);  // each of the three shards came first for some seed
}

TEST("each epoch has its own order, and all rows again") {
  const ScratchFolder scratch;
  DataOptions options = arrangements({write_sample(scratch)[0]})[0];
  options.rows = 1;
  std::vector<std::vector<std::string>> epochs(3);
  BatchStream stream(options, kBytes);
  for (Batch batch; stream.next(batch) && batch.cursor_after.next.epoch < 3;)
    epochs[static_cast<std::size_t>(batch.cursor_after.next.epoch)].push_back(spell(batch, 0, batch.tokens));
  CHECK(epochs[0].size() > 20);
  CHECK(epochs[0] != epochs[1]);
  CHECK(epochs[1] != epochs[2]);
  for (auto& rows : epochs) std::sort(rows.begin(), rows.end());
  CHECK(epochs[0] == epochs[1]);
  CHECK(epochs[1] == epochs[2]);
}

TEST("row b of a packed stream goes on where it ended, and all streams together hold every document once") {
  const ScratchFolder scratch;
  DataOptions options = arrangements(write_sample(scratch))[2];
  options.epochs = 1;
  std::vector<std::string> rows(3);
  std::vector<int32_t> last_target(3, -1);
  for (const Batch& batch : take({options, kBytes}, 100000))
    for (int64_t b = 0; b < 3; ++b) {
      const auto row = static_cast<std::size_t>(b);
      const auto first = static_cast<std::size_t>(b * batch.length);
      if (!batch.mask[first]) continue;
      CHECK(batch.resets[row] == (last_target[row] < 0 ? 1 : 0));
      if (last_target[row] >= 0) CHECK(batch.tokens[first] == last_target[row]);
      if (rows[row].empty()) rows[row] = spell(batch, b, batch.tokens).substr(0, 1);
      for (const char c : spell(batch, b, batch.targets))
        if (c != '.') rows[row] += c;
      last_target[row] = batch.targets[first + static_cast<std::size_t>(batch.length) - 1];
    }
  std::multiset<std::string> found, expected;
  for (const std::string& row : rows)
    for (std::size_t from = 0, to; from < row.size(); from = to + 1) {
      to = row.find('E', from);
      REQUIRE(to != std::string::npos);
      found.insert(row.substr(from, to - from));
    }
  DocumentTokens::Options documents;
  documents.files = options.files;
  DocumentTokens source(documents, kBytes);
  for (TokenDocument document; source.next(document);) {
    document.tokens.pop_back();
    expected.insert(kBytes->decode(document.tokens));
  }
  CHECK(found == expected);
  CHECK(expected.size() == 75);
}

TEST("resuming behind any batch gives the batches of the unbroken run, for every number of threads, from shards and from their cache") {
  const ScratchFolder scratch;
  const std::vector<std::string> files = write_sample(scratch);
  write_token_cache(scratch.file("two.tokens"), {files[0], files[1]}, kBytes, {});
  write_token_cache(scratch.file("three.tokens"), {files[2]}, kBytes, {.threads = 3});
  const std::vector<std::string> caches = {scratch.file("two.tokens"), scratch.file("three.tokens")};
  const std::vector<std::string> mixed = {scratch.file("two.tokens"), files[2]};
  constexpr int64_t kBatches = 1000;
  for (const DataOptions& base : arrangements(files)) {
    const std::vector<Batch> unbroken = take({base, kBytes}, kBatches);
    REQUIRE(unbroken.size() > 100);
    for (const int threads : {0, 1, 4})
      for (const auto& inputs : {files, caches, mixed}) {
        DataOptions options = base;
        options.threads = threads;
        options.files = inputs;
        const std::vector<Batch> again = take({options, inputs == caches ? nullptr : kBytes}, kBatches);
        REQUIRE(again.size() == unbroken.size());
        for (std::size_t k = 0; k < again.size(); ++k) require_equal(again[k], unbroken[k]);
      }
    for (std::size_t k = 0; k < unbroken.size(); k += k < 20 || k + 5 > unbroken.size() ? 1 : 13) {
      DataOptions options = base;
      options.threads = static_cast<int>(k % 3);
      if (k % 2 == 1) options.files = caches;
      const DataCursor cursor = DataCursor::from_json(unbroken[k].cursor_after.to_json());
      CHECK(cursor == unbroken[k].cursor_after);
      BatchStream stream(options, kBytes, cursor);
      CHECK(stream.cursor() == cursor);
      Batch batch;
      for (std::size_t j = k + 1; j < std::min(k + 12, unbroken.size()); ++j) {
        REQUIRE(stream.next(batch));
        require_equal(batch, unbroken[j]);
      }
      if (k + 1 == unbroken.size() && base.epochs > 0) CHECK_MESSAGE(!stream.next(batch), base.arrangement, " ", k);
    }
  }
}

TEST("a packed run goes on in the same row order with another number of rows") {
  const ScratchFolder scratch;
  DataOptions options = arrangements(write_sample(scratch))[0];
  std::vector<int64_t> ids;
  for (const Batch& batch : take({options, kBytes}, 20)) ids.insert(ids.end(), batch.row_ids.begin(), batch.row_ids.end());
  const DataCursor cursor = take({options, kBytes}, 4).back().cursor_after;
  options.rows = 8;
  const std::vector<Batch> rest = take({options, kBytes, cursor}, 1);
  CHECK(rest[0].row_ids == std::vector<int64_t>(ids.begin() + 12, ids.begin() + 20));
}

TEST("a cursor made with other settings or data is refused by name") {
  const ScratchFolder scratch;
  const std::vector<std::string> files = write_sample(scratch);
  const DataOptions base = arrangements(files)[2];
  const DataCursor cursor = take({base, kBytes}, 3).back().cursor_after;
  const auto message = [&](const DataOptions& options, std::shared_ptr<const Tokenizer> tokenizer) -> std::string {
    try {
      BatchStream stream(options, std::move(tokenizer), cursor);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  };
  CHECK(message(base, kBytes) == "accepted");
  const auto names = [](const std::string& text, const std::string& name) {
    return text.find("another \"" + name + "\"") != std::string::npos;
  };
  DataOptions changed = base;
  changed.seed = 6;
  CHECK(names(message(changed, kBytes), "seed"));
  changed = base;
  changed.rows = 4;
  CHECK(names(message(changed, kBytes), "rows"));
  changed = base;
  changed.files.pop_back();
  CHECK(names(message(changed, kBytes), "files"));
  CHECK(names(message(base, std::make_shared<const ByteTokenizer>(TokenizerOptions{.parse_special = true})), "tokenizer"));
  CHECK_THROWS_AS(DataCursor::from_json("{\"batches\": 1}"), FileError);
  CHECK_THROWS_AS(DataCursor::from_json("nonsense"), FileError);
}

TEST("a bad line stops the stream at its place with the reader's message, or is left out and counted") {
  const ScratchFolder scratch;
  std::ofstream file(scratch.file("s.jsonl"));
  for (int i = 0; i < 10; ++i) file << (i == 6 ? "{\"text\": 1}\n" : "{\"text\": \"0123456789012345678\"}\n");
  file.close();
  DataOptions options;
  options.files = {scratch.file("s.jsonl")};
  options.length = 20;
  options.shuffle_rows = 1;
  options.epochs = 1;
  for (const int threads : {0, 2}) {
    options.threads = threads;
    options.skip_bad_lines = false;
    BatchStream stream(options, kBytes);
    Batch batch;
    for (int k = 0; k < 5; ++k) REQUIRE(stream.next(batch));
    for (int again = 0; again < 2; ++again) {
      std::string message;
      try {
        stream.next(batch);
      } catch (const FileError& error) {
        message = error.what();
      }
      CHECK(message.find("line 7 is not a document") != std::string::npos);
    }
    options.skip_bad_lines = true;
    BatchStream skipping(options, kBytes);
    int batches = 0;
    while (skipping.next(batch)) ++batches;
    CHECK(batches == 8);  // 9 documents of 20 tokens: 179 targets
    CHECK(skipping.bad_lines().count() == 1);
  }
}

TEST("data that cannot fill a row, or hold no document, are an error and not an endless wait") {
  const ScratchFolder scratch;
  write_texts(scratch.file("short.jsonl.zst"), {"abc"});
  write_texts(scratch.file("none.jsonl.zst"), {});
  for (const int threads : {0, 1}) {
    DataOptions options;
    options.threads = threads;
    options.length = 4;
    Batch batch;
    options.files = {scratch.file("short.jsonl.zst")};
    CHECK_THROWS_AS(BatchStream(options, kBytes).next(batch), FileError);
    options.pad_tail = true;
    CHECK(BatchStream(options, kBytes).next(batch));
    options.files = {scratch.file("none.jsonl.zst")};
    for (const char* arrangement : {"packed", "streams"}) {
      options.arrangement = arrangement;
      options.epochs = 0;
      CHECK_THROWS_AS(BatchStream(options, kBytes).next(batch), FileError);
      options.epochs = 1;
      CHECK(!BatchStream(options, kBytes).next(batch));
    }
  }
  DataOptions options;
  options.files = {scratch.file("short.jsonl.zst")};
  options.rows = 0;
  CHECK_THROWS_AS(BatchStream(options, kBytes), ValueError);
  options.rows = 1;
  options.arrangement = "stream";
  CHECK_THROWS_AS(BatchStream(options, kBytes), ConfigError);
}

TEST("a stream can be dropped at any time, also with a document larger than the read-ahead in the air") {
  const ScratchFolder scratch;
  write_texts(scratch.file("s.jsonl.zst"), {std::string(3000000, 'a'), "b", std::string(3000000, 'c')});
  SourceOptions source_options;
  source_options.files = {scratch.file("s.jsonl.zst")};
  source_options.epochs = 0;
  source_options.threads = 2;
  source_options.ahead_bytes = 1000;
  for (int documents = 0; documents < 5; ++documents) {
    DocumentSource source(source_options, kBytes);
    TokenDocument document;
    for (int i = 0; i < documents; ++i) {
      REQUIRE(source.next(document));
      CHECK(document.tokens.size() == (i % 3 == 1 ? 2u : 3000001u));
    }
  }
  DataOptions options;
  options.files = source_options.files;
  options.threads = 2;
  options.length = 1000;
  for (int64_t batches = 0; batches < 3; ++batches) CHECK(static_cast<int64_t>(take({options, kBytes}, batches).size()) == batches);
}

TEST("rows_of gives a rank its share") {
  const ScratchFolder scratch;
  const Batch whole = take({arrangements(write_sample(scratch))[0], kBytes}, 1)[0];
  const Batch part = rows_of(whole, 1, 3);
  CHECK(part.rows == 2);
  CHECK(std::equal(part.tokens.begin(), part.tokens.end(), whole.tokens.begin() + whole.length));
  CHECK(std::equal(part.targets.begin(), part.targets.end(), whole.targets.begin() + whole.length));
  CHECK(part.row_ids == std::vector<int64_t>(whole.row_ids.begin() + 1, whole.row_ids.end()));
  CHECK_THROWS_AS(rows_of(whole, 1, 4), ValueError);
}

TEST("documents for evaluation come in order with their bytes, sets and places") {
  const ScratchFolder scratch;
  write_texts(scratch.file("a.jsonl.zst"), {"one", "", "three"});
  write_texts(scratch.file("b.jsonl.zst"), {"four"});
  DocumentTokens::Options options;
  options.files = {scratch.path()};
  options.min_tokens = 2;
  DocumentTokens documents(options, kBytes);
  TokenDocument document;
  for (const auto& [part, line, text] :
       std::vector<std::tuple<int64_t, int64_t, std::string>>{{0, 1, "one"}, {0, 3, "three"}, {1, 1, "four"}}) {
    REQUIRE(documents.next(document));
    CHECK(document.at == DocumentPosition{0, part, line, 0});
    CHECK(document.text_bytes == static_cast<int64_t>(text.size()));
    CHECK(document.tokens.back() == kEnd);
    CHECK(document.set_name == "Test");
    CHECK(documents.parts()[static_cast<std::size_t>(part)].name == (part == 0 ? "a.jsonl.zst" : "b.jsonl.zst"));
  }
  CHECK(!documents.next(document));
}

}  // namespace
}  // namespace longhand
