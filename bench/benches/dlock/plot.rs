//! Pictures, in colours that are told apart on white.

use std::path::Path;
use std::time::Duration;

use plotters::prelude::*;

use crate::report;

/// A bar of a picture: bars of one group stand together.
#[derive(Debug)]
pub(crate) struct Bar {
    group: String,
    name: String,
    value: f64,
    label: String,
}

impl Bar {
    pub(crate) fn time(group: &str, name: &str, time: Duration) -> Self {
        Self {
            group: group.to_owned(),
            name: name.to_owned(),
            value: time.as_secs_f64() * 1e6,
            label: report::time(time),
        }
    }

    pub(crate) fn ratio(group: &str, name: &str, ratio: f64) -> Self {
        Self {
            group: group.to_owned(),
            name: name.to_owned(),
            value: ratio,
            label: format!("{ratio:.2}"),
        }
    }
}

/// How long a bar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    /// For times: each line of the grid is ten times the one before.
    Logarithmic,
}

/// A line of a picture.
#[derive(Debug)]
pub(crate) struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

impl Line {
    pub(crate) fn new(name: String, points: Vec<(f64, f64)>) -> Self {
        Self { name, points }
    }
}

/// How the horizontal axis of a picture grows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Axis {
    Linear,
    /// From one power of this number to the next.
    Powers(f64),
}

impl Axis {
    fn place(self, value: f64) -> f64 {
        match self {
            Axis::Linear => value,
            Axis::Powers(base) => value.log(base),
        }
    }

    fn label(self, place: f64) -> String {
        match self {
            Axis::Linear => format!("{place:.0}"),
            Axis::Powers(base) => format!("{:.0}", base.powf(place)),
        }
    }
}

/// Colours of Okabe and Ito, whom all readers can follow.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

const FONT: &str = "sans-serif";
const DRAWN: &str = "a picture in memory can be drawn";

/// Draws bars, each with its value.
pub(crate) fn bars(file: &Path, title: &str, bars: &[Bar], scale: Scale) {
    const WIDTH: i32 = 860;
    const LEFT: i32 = 210;
    const RIGHT: i32 = WIDTH - 90;
    const TOP: i32 = 58;
    const ROW: i32 = 18;
    const GAP: i32 = 12;

    let mut names: Vec<&str> = Vec::new();
    let mut groups = 0;
    for (index, bar) in bars.iter().enumerate() {
        if !names.contains(&bar.name.as_str()) {
            names.push(&bar.name);
        }
        groups += i32::from(index == 0 || bars[index - 1].group != bar.group);
    }
    let height = TOP + bars.len() as i32 * ROW + groups * GAP + 10;
    let most = bars
        .iter()
        .map(|bar| bar.value)
        .fold(f64::EPSILON, f64::max);
    let least = bars.iter().map(|bar| bar.value).fold(most, f64::min);
    // A logarithmic bar begins a bit below the shortest.
    let start = (least / 2.0).log10();
    let length = |value: f64| match scale {
        Scale::Linear => value / most,
        Scale::Logarithmic => (value.log10() - start) / (most.log10() - start),
    };
    let x = |value: f64| LEFT + (length(value) * f64::from(RIGHT - LEFT)) as i32;

    let area = SVGBackend::new(file, (WIDTH as u32, height as u32)).into_drawing_area();
    let text = |text: &str, x: i32, y: i32, size: i32, colour: &RGBColor| {
        let style = (FONT, size).into_font().color(colour);
        area.draw(&Text::new(text.to_owned(), (x, y), style))
            .expect(DRAWN);
    };
    area.fill(&WHITE).expect(DRAWN);
    text(title, 10, 10, 20, &BLACK);
    if scale == Scale::Logarithmic {
        for power in (start.ceil() as i32)..=(most.log10().floor() as i32) {
            let x = x(10f64.powi(power));
            let line = PathElement::new([(x, TOP - 6), (x, height - 8)], RGBColor(210, 210, 210));
            area.draw(&line).expect(DRAWN);
            let label = report::time(Duration::from_secs_f64(10f64.powi(power) / 1e6));
            text(&label, x - 20, TOP - 20, 14, &RGBColor(110, 110, 110));
        }
    }
    let mut y = TOP;
    for (index, bar) in bars.iter().enumerate() {
        if index == 0 || bars[index - 1].group != bar.group {
            y += if index == 0 { 0 } else { GAP };
            text(&bar.group, 10, y + 2, 16, &BLACK);
        }
        let name = names.iter().position(|name| *name == bar.name);
        let colour = COLOURS[name.unwrap_or_default() % COLOURS.len()];
        let end = x(bar.value);
        let rectangle = Rectangle::new([(LEFT, y + 2), (end, y + ROW - 2)], colour.filled());
        area.draw(&rectangle).expect(DRAWN);
        let label = format!("{} {}", bar.label, bar.name);
        // Behind the bar, or in it where there is no room.
        let (x, colour) = if end > RIGHT - 120 {
            (LEFT + 6, &WHITE)
        } else {
            (end + 5, &BLACK)
        };
        text(&label, x, y + 3, 15, colour);
        y += ROW;
    }
    area.present().expect("the picture can be written");
}

/// Draws lines; those of "raw" are dashed, in the colour of the one before.
pub(crate) fn lines(file: &Path, title: &str, x_title: &str, axis: Axis, lines: &[Line]) {
    const RIGHT: i32 = 700;

    let area = SVGBackend::new(file, (940, 460)).into_drawing_area();
    area.fill(&WHITE).expect(DRAWN);
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|(x, _)| axis.place(*x)).fold(0.0, f64::max);
    let top = points().map(|(_, y)| *y).fold(0.0, f64::max) * 1.05;
    let left = points().map(|(x, _)| axis.place(*x)).fold(right, f64::min);
    if right <= left || top <= 0.0 {
        return;
    }
    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 20))
        .margin(12)
        .margin_right(940 - RIGHT)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(left..right, 0.0..top)
        .expect(DRAWN);
    let steps = match axis {
        Axis::Linear => 10,
        Axis::Powers(_) => (right - left).round() as usize + 1,
    };
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_labels(steps)
        .x_label_formatter(&|place| axis.label(*place))
        .y_label_formatter(&|value| match top {
            ..20.0 => format!("{value:.1}"),
            _ => format!("{value:.0}"),
        })
        .label_style((FONT, 14))
        .x_desc(x_title)
        .draw()
        .expect(DRAWN);
    let mut colours = COLOURS.iter().cycle();
    let mut colour = BLACK;
    for (index, line) in lines.iter().enumerate() {
        let places = line.points.iter().map(|(x, y)| (axis.place(*x), *y));
        let dashed = line.name.ends_with(", raw");
        let drawn = if dashed {
            let style = colour.stroke_width(2);
            chart.draw_series(DashedLineSeries::new(places, 5, 4, style))
        } else {
            colour = *colours.next().expect("BUG: colours come again");
            chart.draw_series(LineSeries::new(places, colour.stroke_width(2)))
        };
        drawn.expect(DRAWN);
        // Beside the chart, where no line is.
        let y = 60 + index as i32 * 20;
        let key = colour.stroke_width(if dashed { 1 } else { 4 });
        area.draw(&PathElement::new([(RIGHT + 12, y), (RIGHT + 30, y)], key))
            .expect(DRAWN);
        let text = Text::new(
            line.name.clone(),
            (RIGHT + 36, y - 7),
            (FONT, 15).into_font(),
        );
        area.draw(&text).expect(DRAWN);
    }
    area.present().expect("the picture can be written");
}
