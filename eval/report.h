// The report: one HTML page with the curves of one or several runs, complete in itself (no script, font or picture from elsewhere).
//
// Adding a figure: write a function `void add_NAME(const std::vector<RunData>&, std::vector<Figure>&)` that appends one Figure for each
// picture it draws (line_plot_svg or heat_map_svg of plot.h, and a table with the same numbers), or nothing when no run has the data,
// and put it into the list kFigures in report.cpp, at the place where the page shall show it. Data that no RunData field holds yet are read
// in read_run (evaluations: read_measurements of measure_figures.h), which writes down in `problems` what is there but cannot be read.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "eval/forgetting.h"
#include "eval/perplexity.h"
#include "eval/plot.h"
#include "eval/position_curve.h"
#include "eval/remembrance.h"
#include "eval/run_folder.h"
#include "eval/state_statistics.h"

namespace longhand {

/// One RUN/eval/MEASURE-NAME.csv and what its .json says.
struct Measurement {
  std::string file;       // its name without folder
  std::string data;       // what it was measured on; measurements of equal data, documents, context and distance share a figure
  std::string documents;  // the choice of sequences
  std::string distance;   // of effective remembrance
  int64_t context = 0;    // 0: unknown
  int64_t sequences = 0;  // 0: unknown
  int64_t step = -1;      // of the checkpoint; -1: unknown
};

struct PositionCurve : Measurement {
  std::vector<PositionBin> bins;        // kCurveBinsPerOctave an octave
  std::vector<PositionSpread> spreads;  // of ranges of positions, when the measurement has them
};
inline constexpr int kCurveBinsPerOctave = 4;

struct RemembranceCurve : Measurement {
  std::vector<RemembrancePoint> points;
};

struct StateMeasurement : Measurement {
  std::vector<StateLine> lines;                                // of whole layers and of the model
  std::map<StateHistogramKey, MagnitudeHistogram> histograms;  // where the measurement has them
};

struct ForgettingMeasurement : Measurement {
  std::vector<ForgettingLine> lines;
};

/// A line of a task's table.
struct TaskLine {
  std::string row;                  // passkey: "depth 0.1"; babilong: "qa1"
  int64_t length = 0, samples = 0;  // choices: questions, and those with a label
  double accuracy = 0;              // copy: of characters
  double string_accuracy = 0;
  std::vector<double> scores = {};  // lambada: accuracy, perplexity; choices: three accuracies, greedy; NaN: no question has a label
};

/// One RUN/eval/TASK-NAME.csv and what its .json says.
struct TaskResult {
  std::string task, file;
  std::string settings;                           // results with the same share a figure; JSON where the .json could be read
  std::map<std::string, std::string> files = {};  // settings that are hashes of files: these, without their folders
  std::string unit = {};                          // of passkey's lengths: "tokens", "characters"
  std::string data = {};                          // lambada, choices: the file, without its folder
  int64_t step = -1;                              // of the checkpoint; -1: unknown
  std::vector<TaskLine> lines;
};

struct RunData {
  std::string name;  // unique among the runs of a page
  std::string folder;
  int color = 0;        // of its curves
  bool dashed = false;  // its curves: the run goes on from another one on the page that has the same colour
  int base = -1;        // index of the run on the page that it was started from; -1: none of them
  Metrics metrics;
  FlatConfig config;
  std::optional<int64_t> train_length;  // tokens in a training row
  std::vector<PositionCurve> curves;
  std::vector<RemembranceCurve> remembrance;
  std::vector<StateMeasurement> states;
  std::vector<ForgettingMeasurement> forgetting;
  std::vector<TaskResult> tasks;
  std::vector<std::string> problems;  // what could not be read, as sentences
};

/// Reads what there is; each missing or damaged part becomes an entry of `problems`.
/// errors   FileError if the folder does not exist or holds neither metrics nor evaluations
RunData read_run(const std::string& folder);

/// Reads several; runs of the same folder name are told apart by their paths. Each has its colour, unless the page is made of pairs: two or
/// more bases, each with one run that was started from it (init_from). Then a pair shares a colour, and the second run's curves are dashed.
std::vector<RunData> read_runs(const std::vector<std::string>& folders);

struct Table {
  std::vector<std::string> header;  // the first column holds names, the others numbers
  std::vector<std::vector<std::string>> rows;
};

struct Figure {
  std::string title;
  std::string caption;      // a sentence or two; plain text
  std::string legend, svg;  // HTML; either may be empty
  Table table;              // one of more than kMostOpenRows rows is folded under its figure
};
inline constexpr std::size_t kMostOpenRows = 20;

/// The first line of an error with the rows that say where, for `problems`.
std::string error_sentence(const Error& error);

/// Makes the y axis logarithmic, and says so in its label, when the values span more than a factor of `factor` and are all above 0.
void choose_scale(LinePlot& plot, double factor);

/// The page. `date` is shown as it is.
std::string report_html(const std::vector<RunData>& runs, const std::string& date);

}  // namespace longhand
