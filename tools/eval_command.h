// `longhand eval MEASURE`: one file a measure or task (eval_NAME_command.cpp), what they share in eval_session.h and task_session.h.
#pragma once
#include <functional>

namespace CLI {
class App;
}

namespace longhand {

/// Declares the measures as subcommands of `eval`; the one that the command line names sets `action` to what is to be run.
void add_eval_commands(CLI::App& eval, std::function<int()>& action);

// One measure each; every one prints a summary on stdout and writes its tables as EvalSession::write says.

/// Loss and perplexity by position (eval/perplexity.h).
void add_eval_ppl(CLI::App& eval, std::function<int()>& action);
/// Effective remembrance (eval/remembrance.h).
void add_eval_remember(CLI::App& eval, std::function<int()>& action);
/// Statistics of the recurrent state by position (eval/state_statistics.h).
void add_eval_state(CLI::App& eval, std::function<int()>& action);
/// Half-life of what each layer and head keeps (eval/forgetting.h).
void add_eval_forget(CLI::App& eval, std::function<int()>& action);

// Tasks; what they share is in task_session.h: every one writes a line of JSON for each sample, a table and a description.

/// The last word of passages (eval/continuation_score.h).
void add_eval_lambada(CLI::App& eval, std::function<int()>& action);
/// Retrieval of a number, by length and depth (data/tasks/passkey.h).
void add_eval_passkey(CLI::App& eval, std::function<int()>& action);
/// Synthetic copying, by length (data/tasks/copying.h).
void add_eval_copy(CLI::App& eval, std::function<int()>& action);
/// BABILong, by task and length (data/tasks/babilong.h).
void add_eval_babilong(CLI::App& eval, std::function<int()>& action);
/// Multiple choice on the user's own questions.
void add_eval_choices(CLI::App& eval, std::function<int()>& action);

}  // namespace longhand
