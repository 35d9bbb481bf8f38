// The list of measures; see eval_command.h.
#include "tools/eval_command.h"

#include <CLI/CLI.hpp>

namespace longhand {

void add_eval_commands(CLI::App& eval, std::function<int()>& action) {
  eval.require_subcommand(1);
  for (const auto add : {add_eval_ppl, add_eval_remember, add_eval_state, add_eval_forget, add_eval_lambada, add_eval_passkey,
                         add_eval_copy, add_eval_babilong, add_eval_choices})
    add(eval, action);
}

}  // namespace longhand
