// When an answer counts as right, exactly as the tasks' authors count.
#pragma once
#include <string>
#include <vector>

namespace longhand {

/// Whether the first run of digits of the continuation is the key, as numbers (leading zeros do not matter).
/// source  Mohtashami & Jaggi 2023
bool passkey_correct(const std::string& continuation, const std::string& key);

/// Whether exactly the target's labels remain of those in the output.
///   output   lower case, up to the first ".", then up to "<context>", then up to "<example>"
///   remain   = labels that are part of the output, without those that are part of the question
///   right    remain = {target}; of a target with a comma and more than 3 characters: every part in remain, and no more than they are
/// labels   any case, each once
/// source   Kuratov et al. 2024
bool babilong_correct(const std::string& output, const std::string& question, const std::string& target,
                      const std::vector<std::string>& labels);

/// The parts of a target: those between commas if it has one and more than 3 characters ("apple,milk"), else the target ("s,e").
std::vector<std::string> babilong_parts(const std::string& target);

}  // namespace longhand
