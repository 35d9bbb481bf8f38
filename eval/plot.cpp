// SVG figures; see plot.h.
#include "eval/plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>

#include "core/error.h"

namespace longhand {
namespace {

constexpr double kRight = 32, kTop = 18, kBottom = 48;  // around the drawing, in SVG units; the left margin fits the labels

double to_scale(Scale scale, double value) {
  if (scale == Scale::linear) return value;
  return scale == Scale::log10 ? std::log10(value) : std::log2(value);
}

bool drawable(Scale scale, double value) {
  return std::isfinite(value) && (scale == Scale::linear || value > 0);
}

// A step of 1, 2 or 5 times a power of ten that gives at most `most` steps over `range`.
double round_step(double range, int most) {
  const double power = std::pow(10.0, std::floor(std::log10(range / most)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (range / (factor * power) <= most) return factor * power;
  return 10 * power;
}

struct Tick {
  double value;
  std::string label;
};

// An axis laid out on `begin` .. `end` SVG units.
class AxisLayout {
 public:
  AxisLayout(const Axis& axis, double lowest, double highest, double begin, double end, int most_ticks)
      : scale_(axis.scale), low_(axis.min.value_or(lowest)), high_(axis.max.value_or(highest)), begin_(begin), end_(end) {
    if (!(low_ < high_)) widen_single_value();
    if (scale_ == Scale::linear) {
      const double least = axis.whole ? 1 : 0, step = std::max(least, round_step(high_ - low_, most_ticks));
      if (!axis.min) low_ = std::floor(low_ / step + 1e-9) * step;
      if (!axis.max) high_ = std::ceil(high_ / step - 1e-9) * step;
      add_linear_ticks(step);
    } else if (scale_ == Scale::log2) {
      add_powers_of_two(most_ticks);
    } else {
      const double pad = std::pow(high_ / low_, 0.04);
      if (!axis.min) low_ /= pad;
      if (!axis.max) high_ *= pad;
      add_decades(most_ticks);
    }
  }

  double at(double value) const {
    const double a = to_scale(scale_, low_), b = to_scale(scale_, high_);
    return begin_ + (to_scale(scale_, value) - a) / (b - a) * (end_ - begin_);
  }
  bool holds(double value) const { return drawable(scale_, value) && value >= low_ && value <= high_; }
  const std::vector<Tick>& ticks() const { return ticks_; }
  std::string data_attributes(char name) const {
    return fmt::format(" data-{0}scale=\"{1}\" data-{0}range=\"{2:.9g} {3:.9g}\"", name, scale_ == Scale::linear ? "linear" : "log", low_,
                       high_);
  }

 private:
  void widen_single_value() {
    const double middle = low_;
    if (scale_ == Scale::linear) {
      const double by = middle == 0 ? 1 : std::abs(middle) * 0.1;
      low_ = middle - by, high_ = middle + by;
    } else {
      low_ = middle / 2, high_ = middle * 2;
    }
  }
  void add_linear_ticks(double step) {
    const int decimals = std::clamp(static_cast<int>(-std::floor(std::log10(step) + 1e-9)), 0, 12);
    const double largest = std::max(std::abs(low_), std::abs(high_));
    for (auto i = static_cast<int64_t>(std::ceil(low_ / step - 1e-6)); static_cast<double>(i) * step <= high_ + step * 1e-6; ++i) {
      const double value = static_cast<double>(i) * step;
      if (i == 0) ticks_.push_back({0, "0"});
      else if (largest < 1e-3) ticks_.push_back({value, fmt::format("{:.3g}", value)});
      else if (largest >= 1e7) ticks_.push_back({value, format_number(value)});
      else if (decimals == 0) ticks_.push_back({value, format_count(std::llround(value))});
      else ticks_.push_back({value, fmt::format("{:.{}f}", value, decimals)});
    }
  }
  void add_powers_of_two(int most) {
    const auto first = static_cast<int>(std::ceil(std::log2(low_) - 1e-9)), last = static_cast<int>(std::floor(std::log2(high_) + 1e-9));
    int every = 1;
    while ((last - first) / every + 1 > most) ++every;
    for (int k = last; k >= first; k -= every) ticks_.insert(ticks_.begin(), {std::exp2(k), format_length(std::exp2(k))});
    if (ticks_.size() < 2) ticks_ = {{low_, format_length(low_)}, {high_, format_length(high_)}};
  }
  // Decades where there are several; else 1, 2, 5; else round numbers.
  void add_decades(int most) {
    const auto first = static_cast<int>(std::floor(std::log10(low_))), last = static_cast<int>(std::ceil(std::log10(high_)));
    const auto decades = [&](std::initializer_list<double> factors, int every) {
      ticks_.clear();
      for (int k = first; k <= last; k += every)
        for (const double factor : factors)
          if (const double value = factor * std::pow(10.0, k); value >= low_ && value <= high_)
            ticks_.push_back({value, format_number(value)});
    };
    decades({1, 2, 5}, 1);
    if (static_cast<int>(ticks_.size()) > most) decades({1, 3}, 1);
    for (int every = 1; static_cast<int>(ticks_.size()) > most; ++every) decades({1}, every);
    if (ticks_.size() >= 3) return;
    ticks_.clear();
    add_linear_ticks(round_step(high_ - low_, most));
  }

  Scale scale_;
  double low_, high_, begin_, end_;
  std::vector<Tick> ticks_;
};

AxisLayout fit_axis(const LinePlot& plot, bool horizontal, double begin, double end, int most_ticks) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  const auto take = [&](double value) { low = std::min(low, value), high = std::max(high, value); };
  for (const Series& series : plot.series)
    for (const auto& [x, y] : series.points)
      if (drawable(plot.x.scale, x) && drawable(plot.y.scale, y)) take(horizontal ? x : y);
  if (!(low <= high)) throw ValueError("plot: no series has a point that can be drawn", {{"plot", plot.title}});
  if (horizontal)
    for (const Marker& marker : plot.markers)
      if (drawable(plot.x.scale, marker.x)) take(marker.x);
  return AxisLayout(horizontal ? plot.x : plot.y, low, high, begin, end, most_ticks);
}

// The second round of the palette is dotted, so that no two series look alike before the sixteenth.
std::string dash(const Series& series) {
  const bool second_round = series.color / kPlotColors % 2 == 1;
  if (series.dashed) return second_round ? " stroke-dasharray=\"8 3 2 3\"" : " stroke-dasharray=\"6 4\"";
  return second_round ? " stroke-dasharray=\"2 3\"" : "";
}
int color_of(const Series& series) {
  return ((series.color % kPlotColors) + kPlotColors) % kPlotColors;
}

void add_series(std::string& svg, const LinePlot& plot, const Series& series, const AxisLayout& x, const AxisLayout& y) {
  std::string path, values, dots;
  bool down = false;
  for (const auto& [px, py] : series.points) {
    if (!drawable(plot.x.scale, px) || !drawable(plot.y.scale, py)) {
      down = false;
      continue;
    }
    fmt::format_to(std::back_inserter(path), "{}{:.1f} {:.1f}", down ? "L" : "M", x.at(px), y.at(py));
    fmt::format_to(std::back_inserter(values), "{}{:.6g},{:.5g}", values.empty() ? "" : " ", px, py);
    if (series.dots)
      fmt::format_to(std::back_inserter(dots), "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" class=\"f{}\"/>", x.at(px), y.at(py),
                     color_of(series));
    down = true;
  }
  svg += fmt::format("<path class=\"line s{}\"{} d=\"{}\" data-name=\"{}\" data-color=\"{}\" data-points=\"{}\"/>{}\n", color_of(series),
                     dash(series), path, escape_html(series.name), color_of(series), values, dots);
}

// One label stands above the drawing, where no curve passes; several stand under each other. Near the right edge they are on the left of
// their line.
void add_markers(std::string& svg, const LinePlot& plot, const AxisLayout& x, double right, double bottom) {
  double label_y = plot.markers.size() == 1 ? kTop - 5 : kTop + 13;
  for (const Marker& marker : plot.markers) {
    if (!x.holds(marker.x)) continue;
    const double at = x.at(marker.x);
    const bool left = at + 7.0 * static_cast<double>(marker.label.size()) > right;
    const std::string color = marker.color < 0 ? "" : fmt::format(" s{}", marker.color % kPlotColors);
    svg += fmt::format("<line class=\"marker{}\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{}\" y2=\"{}\"/>", color, at, at, kTop, bottom);
    svg += fmt::format("<text class=\"marker-label\" x=\"{:.1f}\" y=\"{}\" text-anchor=\"{}\">{}</text>\n", left ? at - 6 : at + 6, label_y,
                       left ? "end" : "start", escape_html(marker.label));
    label_y += 16;
  }
}

// Dark blue over green to light yellow: rising lightness, readable without colour.
std::array<int, 3> heat_color(double share) {
  static constexpr double kStops[][3] = {{38, 30, 92}, {42, 92, 138}, {32, 144, 140}, {112, 196, 96}, {250, 232, 60}};
  const double at = std::clamp(share, 0.0, 1.0) * 4;
  const auto i = std::min<std::size_t>(static_cast<std::size_t>(at), 3);
  const double f = at - static_cast<double>(i);
  std::array<int, 3> rgb{};
  for (std::size_t c = 0; c < 3; ++c) rgb[c] = static_cast<int>(std::lround(kStops[i][c] * (1 - f) + kStops[i + 1][c] * f));
  return rgb;
}

std::string rgb_text(double share) {
  const auto c = heat_color(share);
  return fmt::format("#{:02x}{:02x}{:02x}", c[0], c[1], c[2]);
}

}  // namespace

std::string line_plot_svg(const LinePlot& plot) {
  const double right = plot.width - kRight, bottom = plot.height - kBottom;
  const AxisLayout y = fit_axis(plot, false, bottom, kTop, plot.height / 48);
  std::size_t longest = 0;
  for (const Tick& tick : y.ticks()) longest = std::max(longest, tick.label.size());
  const double left = 36 + 7.5 * static_cast<double>(longest);
  const AxisLayout x = fit_axis(plot, true, left, right, plot.width / 64);
  const std::string title_id = plot.id + "-title";
  std::string svg = fmt::format(
      "<svg class=\"plot\" id=\"{}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-labelledby=\"{}\" data-area=\"{} {} {} {}\"{}{}>\n<title "
      "id=\"{}\">{}</title>\n",
      plot.id, plot.width, plot.height, title_id, left, right, kTop, bottom, x.data_attributes('x'), y.data_attributes('y'), title_id,
      escape_html(plot.title));
  svg += "<g class=\"grid\">\n";
  for (const Tick& tick : y.ticks())
    svg += fmt::format("<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", left, right, y.at(tick.value), y.at(tick.value));
  svg += "\n";
  for (const Tick& tick : x.ticks())
    svg += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{}\" y2=\"{}\"/>", x.at(tick.value), x.at(tick.value), kTop, bottom);
  svg +=
      fmt::format("\n</g>\n<line class=\"axis\" x1=\"{0}\" x2=\"{1}\" y1=\"{2}\" y2=\"{2}\"/>\n<g class=\"ticks\">\n", left, right, bottom);
  for (const Tick& tick : y.ticks())
    svg += fmt::format("<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>", left - 8, y.at(tick.value) + 4, tick.label);
  svg += "\n";
  for (const Tick& tick : x.ticks())
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>", x.at(tick.value), bottom + 18, tick.label);
  svg += fmt::format("\n</g>\n<text class=\"axis-label\" x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n", (left + right) / 2,
                     plot.height - 8, escape_html(plot.x.label));
  svg += fmt::format("<text class=\"axis-label\" transform=\"translate(15 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
                     (kTop + bottom) / 2, escape_html(plot.y.label));
  add_markers(svg, plot, x, right, bottom);
  svg += fmt::format(
      "<clipPath id=\"{}-clip\"><rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/></clipPath>\n<g clip-path=\"url(#{}-clip)\">\n",
      plot.id, left, kTop - 4, right - left + 4, bottom - kTop + 4, plot.id);
  for (const Series& series : plot.series) add_series(svg, plot, series, x, y);
  return svg + "</g>\n</svg>\n";
}

std::string legend_html(const std::vector<Series>& series) {
  std::string html = "<ul class=\"legend\">\n";
  for (const Series& s : series)
    html += fmt::format(
        "<li><svg viewBox=\"0 0 28 10\" width=\"28\" height=\"10\" aria-hidden=\"true\"><line class=\"line s{}\"{} x1=\"0\" x2=\"28\" "
        "y1=\"5\" y2=\"5\"/></svg> {}</li>\n",
        color_of(s), dash(s), escape_html(s.name));
  return html + "</ul>\n";
}

std::string heat_map_svg(const HeatMap& map) {
  bool fits = map.values.size() == map.rows.size();
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const auto& row : map.values) {
    fits = fits && row.size() == map.columns.size();
    for (const double value : row)
      if (std::isfinite(value)) low = std::min(low, value), high = std::max(high, value);
  }
  if (!fits)
    throw ShapeError("plot: the values of a heat map are not [rows][columns]",
                     {{"plot", map.title}, {"expected", fmt::format("[{}][{}]", map.rows.size(), map.columns.size())}});
  if (!(low <= high)) throw ValueError("plot: no value of the heat map is a number", {{"plot", map.title}});
  low = map.min.value_or(low), high = map.max.value_or(high);

  const auto share_of = [&](double value) {
    if (std::isinf(value)) return value > 0 ? 1.0 : 0.0;
    if (!(high > low)) return 0.5;
    if (map.scale == Scale::linear) return (value - low) / (high - low);
    return value > 0 && low > 0 ? std::log(value / low) / std::log(high / low) : 0.0;
  };

  std::size_t longest = 0;
  for (const auto& row : map.rows) longest = std::max(longest, row.size());
  const double left = 40 + 7.2 * static_cast<double>(longest), right = map.width - 90, top = 10;
  const double cell_w = (right - left) / static_cast<double>(map.columns.size()),
               cell_h = std::clamp(320.0 / static_cast<double>(map.rows.size()), 8.0, 34.0);
  const double bottom = top + cell_h * static_cast<double>(map.rows.size()), height = bottom + 48;
  std::string svg = fmt::format(
      "<svg class=\"plot heat\" id=\"{0}\" viewBox=\"0 0 {1} {2:.0f}\" role=\"img\" aria-labelledby=\"{0}-title\"><title "
      "id=\"{0}-title\">{3}</title>\n",
      map.id, map.width, height, escape_html(map.title));
  const bool numbers = cell_w >= 46 && cell_h >= 16;
  for (std::size_t r = 0; r < map.rows.size(); ++r) {
    const double y = top + cell_h * static_cast<double>(r);
    for (std::size_t c = 0; c < map.columns.size(); ++c) {
      const double value = map.values[r][c], x = left + cell_w * static_cast<double>(c);
      if (std::isnan(value)) continue;
      const double share = share_of(value);
      svg += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"{}\"><title>{}, {}: {}</title></rect>",
                         x, y, cell_w - 1, cell_h - 1, rgb_text(share), escape_html(map.rows[r]), escape_html(map.columns[c]),
                         format_number(value));
      if (numbers)
        svg += fmt::format("<text class=\"cell\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\" style=\"fill:{}\">{}</text>",
                           x + cell_w / 2, y + cell_h / 2 + 4, share > 0.55 ? "#111" : "#fff", format_number(value));
    }
    svg += fmt::format("\n<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n", left - 8, y + cell_h / 2 + 4,
                       escape_html(map.rows[r]));
  }
  const auto every = static_cast<std::size_t>(std::max(1.0, std::ceil(46 / cell_w)));
  for (std::size_t c = 0; c < map.columns.size(); c += every)
    svg += fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>",
                       left + cell_w * (static_cast<double>(c) + 0.5), bottom + 18, escape_html(map.columns[c]));
  svg += fmt::format("\n<text class=\"axis-label\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n", (left + right) / 2,
                     height - 8, escape_html(map.x_label));
  svg += fmt::format("<text class=\"axis-label\" transform=\"translate(15 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
                     (top + bottom) / 2, escape_html(map.y_label));
  // The colour scale, from the lowest value at the bottom.
  constexpr int kSteps = 32;
  for (int i = 0; i < kSteps; ++i)
    svg += fmt::format("<rect x=\"{:.1f}\" y=\"{:.2f}\" width=\"12\" height=\"{:.2f}\" fill=\"{}\"/>", right + 14,
                       bottom - (bottom - top) * (i + 1) / kSteps, (bottom - top) / kSteps + 0.3, rgb_text((i + 0.5) / kSteps));
  svg += fmt::format(
      "\n<text class=\"tick\" x=\"{0:.1f}\" y=\"{1:.1f}\">{2}</text><text class=\"tick\" x=\"{0:.1f}\" y=\"{3:.1f}\">{4}</text>\n",
      right + 31, top + 10, format_number(high), bottom, format_number(low));
  return svg + "</svg>\n";
}

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string format_count(int64_t value) {
  std::string digits = std::to_string(value < 0 ? -value : value);
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3) digits.insert(static_cast<std::size_t>(at), ",");
  return value < 0 ? "-" + digits : digits;
}

std::string format_number(double value) {
  if (std::isnan(value)) return "–";
  if (std::isinf(value)) return value > 0 ? "∞" : "-∞";
  const double size = std::abs(value);
  if (size != 0 && (size < 1e-3 || size >= 1e9)) return fmt::format("{:.4g}", value);
  if (size >= 999.5) return format_count(std::llround(value));
  return fmt::format("{:.4g}", value);
}

std::string format_aligned(double value) {
  const double size = std::abs(value);
  if (!(size >= 0.1 && size < 999.95)) return format_number(value);
  return fmt::format("{:.{}f}", value, size < 0.99995 ? 4 : size < 9.9995 ? 3 : size < 99.995 ? 2 : 1);
}

std::string format_length(double value) {
  if (value >= 1024 * 1024) return fmt::format("{:.4g}M", value / (1024 * 1024));
  if (value < 1024) return fmt::format("{:.4g}", value);
  return value / 1024 < 999.5 ? fmt::format("{:.3g}k", value / 1024) : fmt::format("{:.4g}k", value / 1024);
}

}  // namespace longhand
