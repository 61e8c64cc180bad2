//! Figures as SVG: lines and points over two axes, and bars. Colours are names in the page's style sheet,
//! which has a light and a dark scheme. Knows no records.

use crate::format::short;
use dflash::{Error, Result};
use minijinja::HtmlEscape;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// The number of a colour in the style sheet: `var(--c0)` and so on.
pub type Colour = u8;
/// Text and axes.
pub const INK: Colour = 0;
/// Grid lines.
const FAINT: Colour = 1;
/// The first of `KINDS` colours for series.
pub const FIRST: Colour = 2;
pub const KINDS: Colour = 7;
/// The reference that others are compared with.
pub const REFERENCE: Colour = FIRST + KINDS;

/// The width of a figure in units. plotters draws at whole units, so there are about two to a pixel.
const WIDTH: u32 = 1080;
/// The size of text for plotters, 1.24 times its height in units.
const TEXT: f64 = 39.0;
/// About the largest width of a character, in units.
const CHARACTER: u32 = 17;
/// The largest value that an axis can show. Records may hold any number.
const LARGEST: f64 = 1e15;

/// How a series is drawn. Rules and columns have no dots at their points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Dots,
    Line,
    Dashed,
    Rule,
    DashedRule,
    Columns,
}

impl Mark {
    /// The class of the legend's mark in the style sheet.
    pub fn class(self) -> &'static str {
        match self {
            Mark::Dots => "dot",
            Mark::Line | Mark::Rule => "line",
            Mark::Dashed | Mark::DashedRule => "dashed",
            Mark::Columns => "box",
        }
    }
}

/// Points that belong together.
#[derive(Debug, Clone)]
pub struct Series {
    pub name: String,
    pub colour: Colour,
    pub mark: Mark,
    /// x, y, and the dot's tooltip, which may be empty.
    pub points: Vec<(f64, f64, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// From 0, with ticks at whole numbers.
    Whole,
    /// Decimal. Values that are not above 0 are not drawn.
    Log,
}

/// An axis: its name with the unit, and its scale.
pub struct Axis<'a>(pub &'a str, pub Scale);

impl Axis<'_> {
    /// The place of a value. None: it cannot be drawn.
    fn place(&self, x: f64) -> Option<f64> {
        match self.1 {
            Scale::Log => (1.0 / LARGEST..=LARGEST).contains(&x).then(|| x.log10()),
            _ => (x == 0.0 || (1.0 / LARGEST..=LARGEST).contains(&x)).then_some(x),
        }
    }

    /// The range of these places, with about `count` ticks. A linear range has `more` on both sides.
    fn range(&self, places: impl Iterator<Item = f64>, more: f64, count: f64) -> Span {
        let (low, high) = places.fold((f64::INFINITY, 0f64), |(low, high), x| (low.min(x), high.max(x)));
        if self.1 == Scale::Log {
            // `high` started at 0, which is a place here.
            let (from, to) = (low.floor(), high.ceil().max(low.floor() + 1.0));
            let step = ((to - from) / count).ceil();
            let ticks = (0..).map(|i| from + step * f64::from(i)).take_while(|x| *x <= to);
            return Span(from..to, ticks.collect());
        }
        let to = if high + more > 0.0 { high * 1.05 + more } else { 1.0 };
        let step = nice(to / count).max(if self.1 == Scale::Whole { 1.0 } else { 0.0 });
        let ticks = (0..).map(|i| step * f64::from(i)).take_while(|x| *x <= to);
        Span(-more..to, ticks.collect())
    }

    fn tick(&self, place: f64) -> String {
        let value = if self.1 == Scale::Log { 10f64.powf(place) } else { place };
        // Removes the rounding errors of sums of steps.
        short(if value == 0.0 { 0.0 } else { format!("{value:.6e}").parse().unwrap_or(value) })
    }
}

/// A range of places and its ticks. plotters' own lacks the traits that a mesh needs.
struct Span(Range<f64>, Vec<f64>);

impl Ranged for Span {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn range(&self) -> Range<f64> {
        self.0.clone()
    }

    fn map(&self, place: &f64, pixels: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.range()).map(place, pixels)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { vec![] } else { self.1.clone() }
    }
}

/// `x`, above 0, rounded up to 1, 2 or 5 times a power of ten.
fn nice(x: f64) -> f64 {
    let power = 10f64.powf(x.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= x * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// The placeholder of a colour, which the style sheet's name replaces in the SVG.
fn rgb(colour: Colour) -> RGBColor {
    RGBColor(0x0d, 0x0f, colour)
}

fn text(anchor: HPos, colour: Colour) -> TextStyle<'static> {
    let pos = Pos::new(anchor, VPos::Center);
    TextStyle { color: rgb(colour).to_backend_color(), pos, ..TextStyle::from(("sans-serif", TEXT)) }
}

/// The drawn SVG with the style sheet's colours. `titles`: the tooltips of its circles, in order.
fn svg(drawn: std::result::Result<String, impl std::fmt::Display>, titles: &[&str]) -> Result<String> {
    let mut svg = drawn.map_err(|e| Error::Internal(format!("a figure cannot be drawn: {e}")))?;
    for colour in 0..=REFERENCE {
        svg = svg.replace(&format!("\"#0D0F{colour:02X}\""), &format!("\"var(--c{colour})\""));
    }
    let mut parts = svg.split("<circle ");
    let mut whole = parts.next().unwrap_or_default().to_string();
    for (part, title) in parts.zip(titles.iter().copied().chain(std::iter::repeat(""))) {
        let titled = match title {
            "" => part.to_string(),
            _ => part.replacen("/>", &format!("><title>{}</title></circle>", HtmlEscape(title)), 1),
        };
        whole += "<circle ";
        whole += &titled;
    }
    Ok(whole)
}

/// Draws the axes, their ticks and grid lines. Without `y`: only those of `x`.
fn mesh<Y, DB>(
    chart: &mut ChartContext<DB, Cartesian2d<Span, Y>>,
    x: &Axis,
    y: Option<&Axis>,
) -> std::result::Result<(), DrawingAreaErrorKind<DB::ErrorType>>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    DB: DrawingBackend,
{
    let across = |at: &f64| x.tick(*at);
    let up = |at: &f64| y.map(|y| y.tick(*at)).unwrap_or_default();
    let ink = rgb(INK);
    let mut mesh = chart.configure_mesh();
    mesh.axis_style(ink)
        .bold_line_style(rgb(FAINT))
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", TEXT, &ink))
        .axis_desc_style(("sans-serif", TEXT, &ink))
        .x_desc(x.0)
        .x_label_formatter(&across)
        .y_label_formatter(&up);
    match y {
        Some(y) => mesh.y_desc(y.0),
        None => mesh.disable_y_mesh().disable_y_axis(),
    };
    mesh.draw()
}

/// Series over two axes. None: no point can be drawn.
///
/// # Errors
/// [`Error::Internal`] if plotters fails.
pub fn lines(x: &Axis, y: &Axis, series: &[Series]) -> Result<Option<String>> {
    let places: Vec<Vec<(f64, f64, &str)>> = series
        .iter()
        .map(|series| {
            let points = series.points.iter();
            points
                .filter_map(|(at, value, title)| Some((x.place(*at)?, y.place(*value)?, &**title)))
                .collect()
        })
        .collect();
    let all = || places.iter().flatten();
    if all().next().is_none() {
        return Ok(None);
    }
    // Half a column's width.
    let more = if series.iter().any(|series| series.mark == Mark::Columns) { 0.5 } else { 0.0 };
    let across = x.range(all().map(|point| point.0), more, 8.0);
    let up = y.range(all().map(|point| point.1), 0.0, 7.0);
    let digits = up.1.iter().map(|tick| y.tick(*tick).len()).max().unwrap_or(0) as u32;
    let mut titles = vec![];
    let draw = || -> std::result::Result<String, DrawingAreaErrorKind<std::io::Error>> {
        let mut out = String::new();
        let root = SVGBackend::with_string(&mut out, (WIDTH, 620)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(20)
            .margin_right(50)
            .x_label_area_size(100)
            .y_label_area_size(digits * CHARACTER + 70)
            .build_cartesian_2d(across, up)?;
        mesh(&mut chart, x, Some(y))?;
        for (series, places) in series.iter().zip(&places) {
            let style = rgb(series.colour).stroke_width(4);
            let points = || places.iter().map(|point| (point.0, point.1));
            match series.mark {
                Mark::Dots => (),
                Mark::Line | Mark::Rule => {
                    chart.draw_series(LineSeries::new(points(), style))?;
                }
                Mark::Dashed | Mark::DashedRule => {
                    chart.draw_series(DashedLineSeries::new(points(), 14, 10, style))?;
                }
                Mark::Columns => {
                    let column = |(at, high)| [(at - 0.4, 0.0), (at + 0.4, high)];
                    let fill = rgb(series.colour).filled();
                    chart.draw_series(points().map(|point| Rectangle::new(column(point), fill)))?;
                }
            }
            if matches!(series.mark, Mark::Dots | Mark::Line | Mark::Dashed) {
                let dot = if series.mark == Mark::Dashed { style } else { style.filled() };
                chart.draw_series(points().map(|point| Circle::new(point, 9, dot)))?;
                titles.extend(places.iter().map(|point| point.2));
            }
        }
        root.present()?;
        drop(chart);
        drop(root);
        Ok(out)
    };
    let drawn = draw();
    svg(drawn, &titles).map(Some)
}

/// A horizontal bar. Without parts it is a heading for the bars below it.
#[derive(Debug, Clone, Default)]
pub struct Bar {
    pub label: String,
    /// Stacked from left to right, each 0 or more.
    pub parts: Vec<(Colour, f64)>,
    /// The text behind the bar.
    pub value: String,
}

/// Bars below each other, over one axis from 0. None: nothing can be drawn. `rule`: a value that is marked.
///
/// # Errors
/// [`Error::Internal`] if plotters fails.
pub fn bars(x: &Axis, bars: &[Bar], rule: Option<f64>) -> Result<Option<String>> {
    let parts = |bar: &Bar| -> Vec<(Colour, f64)> {
        bar.parts.iter().filter_map(|(colour, value)| Some((*colour, x.place(*value)?))).collect()
    };
    let sum = |bar: &Bar| parts(bar).iter().map(|part| part.1).sum::<f64>();
    if bars.iter().all(|bar| sum(bar) == 0.0) {
        return Ok(None);
    }
    let cut = |label: &str| match label.chars().count() {
        0..=32 => label.to_string(),
        _ => label.chars().take(31).chain(['…']).collect(),
    };
    let widest = |of: &dyn Fn(&Bar) -> usize| bars.iter().map(of).max().unwrap_or(0) as u32 * CHARACTER;
    let left = widest(&|bar| if bar.parts.is_empty() { 0 } else { cut(&bar.label).chars().count() }) + 24;
    let right = widest(&|bar| bar.value.chars().count()) + 40;
    let across = x.range(
        bars.iter().map(sum).chain(rule),
        0.0,
        (f64::from(WIDTH.saturating_sub(left + right)) / 110.0).max(1.0),
    );
    let draw = || -> std::result::Result<String, DrawingAreaErrorKind<std::io::Error>> {
        let mut out = String::new();
        let height = bars.len() as u32 * 48 + 120;
        let root = SVGBackend::with_string(&mut out, (WIDTH, height)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_left(left)
            .margin_right(right)
            .margin_top(10)
            .x_label_area_size(100)
            .build_cartesian_2d(across, bars.len() as f64..0.0)?;
        mesh(&mut chart, x, None)?;
        for (i, bar) in bars.iter().enumerate() {
            let middle = i as f64 + 0.5;
            let mut end = 0.0;
            for (colour, value) in parts(bar) {
                let corners = [(end, middle - 0.32), (end + value, middle + 0.32)];
                chart.draw_series([Rectangle::new(corners, rgb(colour).filled())])?;
                end += value;
            }
            let start = chart.backend_coord(&(0.0, middle));
            if bar.parts.is_empty() {
                root.draw(&Text::new(bar.label.clone(), (10, start.1), text(HPos::Left, INK)))?;
            } else {
                let place = (start.0 - 14, start.1);
                root.draw(&Text::new(cut(&bar.label), place, text(HPos::Right, INK)))?;
                let place = (WIDTH as i32 - 10, start.1);
                root.draw(&Text::new(bar.value.clone(), place, text(HPos::Right, INK)))?;
            }
        }
        if let Some(rule) = rule {
            let line = vec![(rule, 0.0), (rule, bars.len() as f64)];
            chart.draw_series([PathElement::new(line, rgb(INK).stroke_width(3))])?;
        }
        root.present()?;
        drop(chart);
        drop(root);
        Ok(out)
    };
    svg(draw(), &[]).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(points: &[(f64, f64)], mark: Mark) -> Series {
        let points = points.iter().map(|(x, y)| (*x, *y, "a <b> & c".to_string())).collect();
        Series { name: "one".into(), colour: FIRST, mark, points }
    }

    #[test]
    fn steps_are_one_two_or_five() {
        let steps = [0.7, 1.0, 1.1, 2.0, 2.1, 5.1, 0.03, 3e9].map(nice);
        for (found, expected) in steps.into_iter().zip([1.0, 1.0, 2.0, 2.0, 5.0, 10.0, 0.05, 5e9]) {
            assert!((found / expected - 1.0).abs() < 1e-9, "{found}, expected {expected}");
        }
        let log = Axis("", Scale::Log);
        assert_eq!([-1.0, 0.0, 3.0].map(|place| log.tick(place)), ["0.1", "1", "1000"]);
        assert_eq!(
            [0.1 + 0.2, 0.0, 1.5, 40.0].map(|x| Axis("", Scale::Linear).tick(x)),
            ["0.3", "0", "1.5", "40"]
        );
    }

    #[test]
    fn every_number_draws_or_is_left_out() {
        let numbers = [0.0, -1.0, 5e-324, 1e-300, 1e-15, 1e-9, 0.1, 1.0, 7.0, 1e9, 1e15, 1e16, f64::MAX];
        for scale in [Scale::Linear, Scale::Whole, Scale::Log] {
            let axis = Axis("x", scale);
            for a in numbers {
                for b in numbers {
                    for mark in [Mark::Dots, Mark::Dashed, Mark::Columns] {
                        let drawn = lines(&axis, &axis, &[one(&[(a, b), (b, a)], mark)]).unwrap();
                        let length = drawn.as_ref().map_or(0, String::len);
                        assert!(length < 60_000, "{a} {b} {scale:?} {mark:?}: {length}");
                        let can = |x| axis.place(x).is_some();
                        assert_eq!(drawn.is_some(), can(a) && can(b), "{a} {b} {scale:?}");
                    }
                    let bar = Bar { parts: vec![(FIRST, a), (FIRST, b)], ..Bar::default() };
                    let drawn = bars(&Axis("x", Scale::Linear), &[bar], Some(1.0)).unwrap();
                    assert!(drawn.is_none_or(|svg| svg.len() < 20_000), "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn colours_are_style_names_and_dots_have_tooltips() {
        let axis = Axis("\"#0D0F02\"", Scale::Linear);
        let drawn = lines(&axis, &axis, &[one(&[(1.0, 1.0), (-1.0, 1.0), (2.0, 3.0)], Mark::Line)]);
        let drawn = drawn.unwrap().unwrap();
        assert!(!drawn.contains("=\"#") && drawn.contains("stroke=\"var(--c2)\""), "{drawn}");
        // The point that cannot be drawn has no tooltip.
        assert_eq!(drawn.matches("<title>a &lt;b&gt; &amp; c</title></circle>").count(), 2);
    }

    #[test]
    fn each_axis_has_its_own_name_and_ticks() {
        let texts = |svg: &str| -> Vec<String> {
            let inside = svg.split("</text>").map(|part| part.rsplit('>').next().unwrap().trim().to_string());
            inside.filter(|text| !text.is_empty()).collect()
        };
        let (x, y) = (Axis("across", Scale::Linear), Axis("up", Scale::Log));
        let drawn = lines(&x, &y, &[one(&[(0.5, 1.0), (2.0, 1000.0)], Mark::Line)]).unwrap().unwrap();
        let (left, below) = (["1", "10", "100", "1000"], ["0", "0.5", "1", "1.5", "2"]);
        let found = texts(&drawn);
        assert_eq!(found.len(), left.len() + below.len() + 2, "{found:?}");
        for text in left.into_iter().chain(below).chain(["across", "up"]) {
            assert!(found.iter().any(|found| found == text), "{text}: {found:?}");
        }
        let bar = Bar { label: "label".into(), parts: vec![(FIRST, 2.0)], value: "value".into() };
        let drawn = bars(&x, &[bar.clone(), bar], None).unwrap().unwrap();
        assert_eq!(
            texts(&drawn),
            ["across", "0", "0.5", "1", "1.5", "2", "label", "value", "label", "value"]
        );
        // Only this axis: grid lines at the ticks, and ticks with their axis.
        assert_eq!((drawn.matches("<line ").count(), drawn.matches("<polyline ").count()), (5, 6), "{drawn}");
    }
}
