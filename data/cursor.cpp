// Cursors as JSON; see cursor.h.
#include "data/cursor.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/strict_json.h"

namespace longhand {
namespace {

nlohmann::json place_to_json(const DocumentPosition& p) {
  return {p.epoch, p.part, p.line, p.token};
}

int64_t count_from_json(const nlohmann::json& j, int64_t least = 0) {
  return whole_count(j, "data cursor", least);
}

DocumentPosition place_from_json(const nlohmann::json& j) {
  return {count_from_json(j.at(0)), count_from_json(j.at(1), -1), count_from_json(j.at(2)), count_from_json(j.at(3))};
}

}  // namespace

std::string DataCursor::to_json() const {
  nlohmann::ordered_json out;
  auto& settings = out["made_with"] = nlohmann::ordered_json::object();
  for (const auto& [name, value] : made_with) settings[name] = value;
  out["batches"] = batches;
  out["next"] = place_to_json(next);
  out["block"] = block;
  out["first_row"] = first_row;
  out["used_rows"] = used_rows;
  auto& rows = out["streams"] = nlohmann::ordered_json::array();
  for (const StreamPosition& row : streams)
    rows.push_back({{"started", row.started}, {"in_document", row.in_document}, {"at", place_to_json(row.at)}});
  return out.dump();
}

DataCursor DataCursor::from_json(std::string_view text) {
  try {
    const auto in = nlohmann::ordered_json::parse(text);
    DataCursor out;
    for (const auto& [name, value] : in.at("made_with").items()) out.made_with.emplace_back(name, value.get<std::string>());
    out.batches = count_from_json(in.at("batches"));
    out.next = place_from_json(in.at("next"));
    out.block = count_from_json(in.at("block"));
    out.first_row = count_from_json(in.at("first_row"));
    out.used_rows = count_from_json(in.at("used_rows"));
    for (const auto& row : in.at("streams"))
      out.streams.push_back({row.at("started").get<bool>(), row.at("in_document").get<bool>(), place_from_json(row.at("at"))});
    return out;
  } catch (const nlohmann::json::exception& error) {
    throw FileError("data cursor: the text is not a cursor", {{"reason", error.what()}, {"text", std::string(text.substr(0, 80))}});
  }
}

void require_made_with(const DataCursor& cursor, const std::vector<std::pair<std::string, std::string>>& now) {
  for (const auto& [name, value] : now) {
    std::string before = "(not set)";
    for (const auto& [other, other_value] : cursor.made_with)
      if (other == name) before = other_value;
    if (before != value)
      throw ConfigError("data: the cursor was made with another \"" + name + "\"",
                        {{"cursor", before}, {"now", value}, {"try", "resume with the settings and the data the run was started with"}});
  }
}

}  // namespace longhand
