//! Bytes, time and downtime as bars, an SVG written by hand: it is a few rectangles and words.
//!
//! ```text
//!              wire MB        total s        downtime ms
//!  medium …
//!  godwit      ▬▬▬├┤          ▬▬├┤           ▬
//!  qemu-…      ▬▬▬▬▬▬▬├┤      ▬▬▬▬▬├┤        ▬▬▬▬▬▬▬├─┤
//! ```

use std::fmt::Write as _;

use super::summary::{Group, Row, Spread, Summary};

const ROW_HEIGHT: usize = 18;
const HEAD_HEIGHT: usize = 26;
const NAME_WIDTH: usize = 170;
const PANEL_WIDTH: usize = 210;
/// Of a panel, for the longest bar; the rest is for its figure.
const BAR_WIDTH: usize = 140;

/// A panel's title, its figure, and the decimals to show.
type Panel = (&'static str, fn(&Row) -> Option<Spread>, usize);

const PANELS: [Panel; 3] = [
    ("wire MB", |row| row.wire_mb, 0),
    ("total s", |row| row.total_s, 1),
    ("downtime ms", |row| row.downtime_ms, 0),
];

/// All groups below each other, a panel for each figure; bars of a panel share a scale within a group.
pub(super) fn render(summary: &Summary) -> String {
    let rows: usize = summary.groups.iter().map(|group| group.rows.len()).sum();
    let height = rows * ROW_HEIGHT + summary.groups.len() * HEAD_HEIGHT + ROW_HEIGHT;
    let width = NAME_WIDTH + PANELS.len() * PANEL_WIDTH;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut top = ROW_HEIGHT / 2;
    for group in &summary.groups {
        svg.push_str(&heading(group, top));
        top += HEAD_HEIGHT;
        for row in &group.rows {
            svg.push_str(&bars(group, row, top));
            top += ROW_HEIGHT;
        }
    }
    svg + "</svg>\n"
}

fn heading(group: &Group, top: usize) -> String {
    let base = top + HEAD_HEIGHT - 10;
    let mut svg = text(4, base, "bold", &group.title());
    for (index, (title, ..)) in PANELS.iter().enumerate() {
        svg.push_str(&text(NAME_WIDTH + index * PANEL_WIDTH, base, "bold", title));
    }
    svg
}

fn bars(group: &Group, row: &Row, top: usize) -> String {
    let base = top + ROW_HEIGHT - 6;
    let mut svg = text(4, base, "normal", row.contender.name);
    for (index, (_, figure, decimals)) in PANELS.iter().enumerate() {
        let left = NAME_WIDTH + index * PANEL_WIDTH;
        let longest = group.rows.iter().filter_map(figure).map(|spread| spread.high).fold(0.0, f64::max);
        let Some(spread) = figure(row).filter(|_| longest > 0.0) else { continue };
        let scaled = |value: f64| value / longest * BAR_WIDTH as f64;
        // Faint: it never got there.
        let opacity = if row.always_converged() { 1.0 } else { 0.35 };
        let colour = if row.contender.is_godwit() { "#1b6ca8" } else { "#b0b7bd" };
        let (bar, low, high) = (scaled(spread.median), scaled(spread.low), scaled(spread.high));
        let (low, high, middle) = (left as f64 + low, left as f64 + high, top + ROW_HEIGHT / 2);
        // Writing to a string doesn't fail.
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{}\" width=\"{bar:.1}\" height=\"{}\" fill=\"{colour}\" opacity=\"{opacity}\"/>\n\
             <path d=\"M{low:.1} {middle}H{high:.1}\" stroke=\"#333\"/>",
            top + 2,
            ROW_HEIGHT - 4,
        );
        svg.push_str(&text(high as usize + 5, base, "normal", &format!("{:.decimals$}", spread.median)));
    }
    svg
}

/// Words that hold no markup: names of this bench.
fn text(left: usize, base: usize, weight: &str, words: &str) -> String {
    format!("<text x=\"{left}\" y=\"{base}\" font-weight=\"{weight}\">{words}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            ledger::Run,
            summary::tests::{summary, three},
        },
        *,
    };

    #[test]
    fn each_figure_has_a_bar_and_what_never_arrived_is_faint() {
        let mut runs = three("godwit", [100, 100, 100]);
        runs.extend(three("qemu-precopy", [400, 400, 400]).into_iter().map(|run| Run {
            converged: false,
            downtime_ms: None,
            ..run
        }));
        let svg = render(&summary(&runs));
        // The background, three bars of godwit, two of the other.
        assert_eq!(svg.matches("<rect").count(), 6);
        assert_eq!(svg.matches("opacity=\"0.35\"").count(), 2);
        assert!(svg.contains("width=\"35.0\""), "a quarter of the longest bar: {svg}");
    }
}
