// The dashboards of the stand, written with Grafana's own types: go run . ../dashboards
//
// They are read from left to right and from top to bottom: what has been sold, where buyers wait, and then the parts. Each
// panel says what it shows and what to make of it. Every expression returns data after a rush: tests/compose holds them to it.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/text"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

const (
	third = 8
	half  = 12
	full  = 24
)

// A panel of a dashboard.
type panel struct {
	title, about string
	// A unit of Grafana's, such as "s".
	unit  string
	width uint32
	// Areas that are added up, in place of lines.
	stacked bool
	// The last value in large digits. From redAt on, it is red.
	number bool
	redAt  float64
	// Pairs of an expression and the legend of its series.
	queries []query
}

type query struct{ expr, legend string }

// One that explains, in Markdown.
func note(title, content string) cog.Builder[dashboard.Panel] {
	return text.NewPanelBuilder().Title(title).Height(8).Span(full).Mode(text.TextModeMarkdown).Content(content)
}

var source = common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr("prometheus")}

func (p panel) targets() []cog.Builder[variants.Dataquery] {
	targets := make([]cog.Builder[variants.Dataquery], len(p.queries))
	for i, q := range p.queries {
		targets[i] = prometheus.NewDataqueryBuilder().
			RefId(string(rune('A' + i))).
			Datasource(source).
			Expr(q.expr).
			LegendFormat(q.legend)
	}
	return targets
}

func (p panel) build() cog.Builder[dashboard.Panel] {
	if p.number {
		thresholds := []dashboard.Threshold{{Color: "green"}}
		if p.redAt != 0 {
			thresholds = append(thresholds, dashboard.Threshold{Value: cog.ToPtr(p.redAt), Color: "red"})
		}
		return stat.NewPanelBuilder().
			Title(p.title).Description(p.about).Datasource(source).Unit(p.unit).
			Height(6).Span(p.width).
			Targets(p.targets()).
			Thresholds(dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(thresholds)).
			ColorMode(common.BigValueColorModeBackground).
			GraphMode(common.BigValueGraphModeNone).
			TextMode(common.BigValueTextModeValueAndName)
	}
	built := timeseries.NewPanelBuilder().
		Title(p.title).Description(p.about).Datasource(source).Unit(p.unit).Min(0).
		Height(9).Span(p.width).
		Targets(p.targets()).
		LineWidth(2).
		Legend(common.NewVizLegendOptionsBuilder().
			DisplayMode(common.LegendDisplayModeTable).Placement(common.LegendPlacementBottom).
			ShowLegend(true).Calcs([]string{"max", "lastNotNull"})).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending))
	if p.stacked {
		built = built.FillOpacity(60).
			Stacking(common.NewStackingConfigBuilder().Mode(common.StackingModeNormal))
	}
	return built
}

// A dashboard: its file, and its panels in their order.
func build(uid, title, about string, panels ...cog.Builder[dashboard.Panel]) (dashboard.Dashboard, error) {
	built := dashboard.NewDashboardBuilder(title).
		Uid("oversold-"+uid).Description(about).Tags([]string{"oversold"}).
		Readonly().Refresh("2s").Time("now-5m", "now").Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Link(dashboard.NewDashboardLinkBuilder("Oversold").Type(dashboard.DashboardLinkTypeDashboards).
			Tags([]string{"oversold"}).KeepTime(true))
	for _, p := range panels {
		built = built.WithPanel(p)
	}
	return built.Build()
}

// The 50th, 95th and 99th percentile of a histogram.
func percentiles(histogram string) []query {
	queries := []query{}
	for _, p := range []string{"50", "95", "99"} {
		expr := fmt.Sprintf("histogram_quantile(0.%s, sum by (le) (rate(%s[$__rate_interval])))", p, histogram)
		queries = append(queries, query{expr, "p" + p})
	}
	return queries
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run . FOLDER")
		os.Exit(2)
	}
	// The kinds of panels and queries that are read back strictly.
	runtime := cog.NewRuntime()
	runtime.RegisterPanelcfgVariant(stat.VariantConfig())
	runtime.RegisterPanelcfgVariant(text.VariantConfig())
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	runtime.RegisterDataqueryVariant(prometheus.VariantConfig())
	for name, built := range dashboards() {
		if err := write(filepath.Join(os.Args[1], name+".json"), built); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
			os.Exit(1)
		}
	}
}

// Writes a dashboard, once Grafana's types have read it back without a field that they do not know.
func write(file string, build func() (dashboard.Dashboard, error)) error {
	built, err := build()
	if err != nil {
		return err
	}
	written, err := json.MarshalIndent(built, "", "  ")
	if err != nil {
		return err
	}
	var read dashboard.Dashboard
	// Without an error it returns an empty list of them, and not nil.
	if err := read.UnmarshalJSONStrict(written); err != nil && err.Error() != "" {
		return err
	}
	if err := read.Validate(); err != nil {
		return err
	}
	return os.WriteFile(file, append(written, '\n'), 0o644)
}
