// Figures as SVG text: lines over one pair of axes, and heat maps. Colours, fonts and dark mode come from the style sheet of the page they
// stand in (report_page.h), through the class names below; the numbers behind a line stand in its `data-points`, for the page's script.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace longhand {

enum class Scale {
  linear,
  log10,
  log2,  // ticks at powers of two, written 512, 1k, 2k ... with k = 1024: lengths and positions
};

struct Axis {
  std::string label;
  Scale scale = Scale::linear;
  std::optional<double> min = {}, max = {};  // absent: from the data; a linear axis is widened to round ticks
  bool whole = false;                        // of a linear axis: ticks at whole numbers alone, as for layers
};

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // by rising x; a point without a finite y (or a positive one on a log axis) is a gap
  int color = 0;                                  // of the page's palette, counted modulo kPlotColors
  bool dashed = false;
  bool dots = false;  // marks each point: for few points
};
inline constexpr int kPlotColors = 8;

/// A vertical line with a few words, such as the training length. One label stands above the drawing, several inside it.
struct Marker {
  double x = 0;
  std::string label;
  int color = -1;  // of the series it belongs to; -1: neutral
};

struct LinePlot {
  std::string id;     // unique in the page: letters, digits, '-'
  std::string title;  // for readers who hear the page
  Axis x, y;
  std::vector<Series> series;
  std::vector<Marker> markers;
  int width = 860, height = 380;
};

/// errors  ValueError when no series has a point that can be drawn
std::string line_plot_svg(const LinePlot& plot);

/// One entry a series, each with a sample of its line; as an HTML list, so that long names wrap.
std::string legend_html(const std::vector<Series>& series);

/// A table of numbers as coloured cells; a NaN is an empty cell, an infinity has the colour of the scale's upper end. Cells have their
/// number in them while there is room, and always as a tooltip.
struct HeatMap {
  std::string id, title;
  std::string x_label, y_label;
  std::vector<std::string> columns, rows;
  std::vector<std::vector<double>> values;   // [rows][columns]
  std::optional<double> min = {}, max = {};  // ends of the colour scale; absent: from the finite values
  Scale scale = Scale::linear;               // of the colours; on a log scale a value of 0 or less has the lower end's
  int width = 860;
};

/// errors  ShapeError when the values are not [rows][columns]; ValueError when none is finite
std::string heat_map_svg(const HeatMap& map);

// Numbers and text for readers.
std::string escape_html(const std::string& text);  // & < > " '
std::string format_number(double value);           // 4 significant digits, all before the point: 0.001234, 12.3, 12,345, 6e-04, 1.2e+09
std::string format_aligned(double value);          // the same with the zeros at the end, for columns: 12.30, 1.000
std::string format_count(int64_t value);           // 1,234,567
std::string format_length(double value);           // 512, 2k, 1.5k, 1M with k = 1024

}  // namespace longhand
