// SVG figures: every series and marker is drawn, text is escaped, values that cannot be drawn make gaps.
#include "eval/plot.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "core/error.h"
#include "tests/support/check.h"

using namespace longhand;

namespace {

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

LinePlot small_plot() {
  LinePlot plot{.id = "p", .title = "t", .x = {"x"}, .y = {"y"}, .series = {}, .markers = {}};
  plot.series.push_back({.name = "a<b>\"&'", .points = {{1, 10}, {2, 20}, {4, 15}}});
  plot.series.push_back({.name = "second", .points = {{1, 5}, {2, kNaN}, {3, 6}, {4, 7}}, .color = 1, .dashed = true, .dots = true});
  return plot;
}

}  // namespace

TEST("a line plot has one path a series, its values, and escapes its names") {
  const std::string svg = line_plot_svg(small_plot());
  CHECK(count(svg, "<path ") == 2);
  CHECK(svg.find("data-points=\"1,10 2,20 4,15\"") != std::string::npos);
  CHECK(svg.find("data-name=\"a&lt;b&gt;&quot;&amp;&#39;\"") != std::string::npos);
  CHECK(svg.find("a<b>") == std::string::npos);
  CHECK(count(svg, "<circle ") == 3);
  CHECK(svg.find("stroke-dasharray") != std::string::npos);
  CHECK(svg.find("nan") == std::string::npos);
}

TEST("a point that cannot be drawn is a gap: the line goes on with a move") {
  const std::string svg = line_plot_svg(small_plot());
  const auto begin = svg.find("<path class=\"line s1\"");
  const std::string path = svg.substr(begin, svg.find("data-name", begin) - begin);
  CHECK(count(path, "M") == 2);
  CHECK(count(path, "L") == 1);
  LinePlot logarithmic = small_plot();
  logarithmic.y.scale = Scale::log10;
  logarithmic.series[0].points[1].second = -1;
  CHECK(line_plot_svg(logarithmic).find("data-points=\"1,10 4,15\"") != std::string::npos);
}

TEST("log axes put equal ratios at equal distances") {
  LinePlot plot{.id = "p",
                .title = "t",
                .x = {.label = "x", .scale = Scale::log2, .min = 1.0, .max = 256.0},
                .y = {"y"},
                .series = {},
                .markers = {}};
  plot.series.push_back({.name = "a", .points = {{1, 0}, {16, 1}, {256, 0}}});
  const std::string svg = line_plot_svg(plot);
  const std::string area = svg.substr(svg.find("data-area=\"") + 11);
  const double left = std::stod(area), right = 860 - 32;
  CHECK(svg.find(fmt::format("L{:.1f} ", (left + right) / 2)) != std::string::npos);
  for (const char* label : {">1<", ">16<", ">256<"}) CHECK(svg.find(label) != std::string::npos);
}

TEST("markers stand at their place with their words, and outside the axis not at all") {
  LinePlot plot = small_plot();
  plot.markers = {{3, "training <length>"}};
  CHECK(line_plot_svg(plot).find("training &lt;length&gt;") != std::string::npos);
  CHECK(line_plot_svg(plot).find("y=\"13\" text-anchor=\"start\">training") != std::string::npos);  // above the drawing, which begins at 18
  plot.markers.push_back({2, "another"});
  CHECK(line_plot_svg(plot).find("y=\"31\" text-anchor=\"start\">training") != std::string::npos);
  plot.x.max = 2.5;
  CHECK(line_plot_svg(plot).find("training") == std::string::npos);
}

TEST("an axis of whole things has ticks at whole numbers alone") {
  LinePlot plot = small_plot();
  CHECK(line_plot_svg(plot).find(">1.5<") != std::string::npos);
  plot.x.whole = true;
  const std::string svg = line_plot_svg(plot);
  CHECK(svg.find(">1.5<") == std::string::npos);
  for (const char* label : {">1<", ">2<", ">3<", ">4<"}) CHECK(svg.find(label) != std::string::npos);
}

TEST("a plot of one point or of equal values can be drawn; one without any is refused") {
  for (const Scale scale : {Scale::linear, Scale::log10, Scale::log2}) {
    LinePlot plot{
        .id = "p", .title = "t", .x = {"x", scale}, .y = {"y", scale}, .series = {{.name = "a", .points = {{5, 3}}}}, .markers = {}};
    CHECK(line_plot_svg(plot).find("nan") == std::string::npos);
    plot.series[0].points = {{5, kNaN}};
    CHECK_THROWS_AS(line_plot_svg(plot), ValueError);
  }
}

TEST("a heat map has one cell a value, none for NaN, and its numbers as tooltips") {
  HeatMap map{
      .id = "h", .title = "t", .x_label = "x", .y_label = "y", .columns = {"1", "2<"}, .rows = {"a", "b"}, .values = {{1, 2}, {3, kNaN}}};
  const std::string svg = heat_map_svg(map);
  CHECK(svg.find("style=\"fill:#fff\"") != std::string::npos);  // on dark cells; an attribute would lose against the style sheet
  CHECK(svg.find("style=\"fill:#111\"") != std::string::npos);
  CHECK(count(svg, "<rect ") == 3 + 32);
  CHECK(svg.find("<title>a, 2&lt;: 2</title>") != std::string::npos);
  map.scale = Scale::log10;
  map.values = {{1, 100}, {10, std::numeric_limits<double>::infinity()}};
  const std::string colors = heat_map_svg(map);
  const auto fill_of = [&](const std::string& cell) {
    const auto at = colors.find("<title>" + cell);
    return colors.substr(colors.rfind("fill=\"", at), 14);
  };
  CHECK(fill_of("b, 2&lt;: ∞") == fill_of("a, 2&lt;: 100"));
  CHECK(fill_of("b, 1: 10") == "fill=\"#20908c\"");  // the middle of the scale
  map.values.pop_back();
  CHECK_THROWS_AS(heat_map_svg(map), ShapeError);
  map.values = {{kNaN, kNaN}, {kNaN, kNaN}};
  CHECK_THROWS_AS(heat_map_svg(map), ValueError);
}

TEST("the sixteen first colours and dashes differ in the legend") {
  std::string before;
  std::vector<Series> series;
  for (int i = 0; i < 16; ++i) series.push_back({.name = "x", .points = {}, .color = i});
  const std::string html = legend_html(series);
  CHECK(count(html, "<li>") == 16);
  CHECK(count(html, "stroke-dasharray=\"2 3\"") == 8);
}

TEST("numbers for readers") {
  CHECK(format_number(0) == "0");
  CHECK(format_number(12.3456) == "12.35");
  CHECK(format_number(0.0006) == "0.0006");
  CHECK(format_number(0.00123456) == "0.001235");
  CHECK(format_number(123456.7) == "123,457");
  CHECK(format_number(1.5e12) == "1.5e+12");
  CHECK(format_number(kNaN) == "–");
  CHECK(format_aligned(12.3) == "12.30");
  CHECK(format_aligned(0.9999999) == "1.000");
  CHECK(format_aligned(0.0006) == "0.0006");
  CHECK(format_aligned(20000) == "20,000");
  CHECK(format_count(-1234567) == "-1,234,567");
  CHECK(format_count(999) == "999");
  CHECK(format_length(512) == "512");
  CHECK(format_length(1536) == "1.5k");
  CHECK(format_length(262144) == "256k");
  CHECK(format_length(1448) == "1.41k");
  CHECK(format_length(1000 * 1024) == "1000k");
}
