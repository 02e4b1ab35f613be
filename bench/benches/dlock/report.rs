//! The tables, as Markdown.

use std::fmt::Write;
use std::time::Duration;

use crate::duel::{Estimate, Spread};

/// A part of the page, under a heading.
#[derive(Debug, Default)]
pub(crate) struct Section {
    text: String,
    bars: Vec<Bar>,
}

/// A limit that a measurement has to keep.
#[derive(Debug)]
struct Bar {
    what: String,
    measured: String,
    limit: String,
    met: bool,
}

impl Section {
    pub(crate) fn new(title: &str) -> Self {
        Self {
            text: format!("## {title}\n"),
            bars: Vec::new(),
        }
    }

    pub(crate) fn paragraph(&mut self, text: &str) {
        let _ = write!(self.text, "\n{text}\n");
    }

    pub(crate) fn heading(&mut self, title: &str) {
        let _ = write!(self.text, "\n### {title}\n");
    }

    pub(crate) fn items(&mut self, items: &[String]) {
        self.paragraph(&format!("- {}", items.join("\n- ")));
    }

    pub(crate) fn picture(&mut self, file: &str, what: &str) {
        self.paragraph(&format!("![{what}]({file})"));
    }

    pub(crate) fn table(&mut self, header: &[&str], rows: &[Vec<String>]) {
        let _ = write!(
            self.text,
            "\n| {} |\n|{}\n",
            header.join(" | "),
            "---|".repeat(header.len())
        );
        for row in rows {
            let _ = writeln!(self.text, "| {} |", row.join(" | "));
        }
    }

    /// Notes that `measured` is to be at most `limit`, and says in a few words whether it is.
    pub(crate) fn at_most(
        &mut self,
        what: String,
        measured: f64,
        limit: f64,
        unit: &str,
    ) -> String {
        self.bar(
            what,
            measured <= limit,
            measured,
            format!("at most {limit}{unit}"),
            unit,
        )
    }

    /// Notes that `measured` is to be at least `limit`.
    pub(crate) fn at_least(&mut self, what: String, measured: f64, limit: f64) -> String {
        self.bar(
            what,
            measured >= limit,
            measured,
            format!("at least {limit}×"),
            "×",
        )
    }

    /// Notes that a ratio is to be below 1.
    pub(crate) fn faster(&mut self, what: String, measured: f64) -> String {
        self.bar(what, measured < 1.0, measured, "faster".into(), "×")
    }

    /// Says why a bar is missed, if one is of those whose name contains `what`.
    pub(crate) fn if_missed(&mut self, what: &str, why: &str) {
        if self
            .bars
            .iter()
            .any(|bar| !bar.met && bar.what.contains(what))
        {
            self.paragraph(why);
        }
    }

    fn bar(&mut self, what: String, met: bool, measured: f64, limit: String, unit: &str) -> String {
        let verdict = format!("{limit}: {}", if met { "met" } else { "**missed**" });
        self.bars.push(Bar {
            what,
            measured: format!("{measured:.2}{unit}"),
            limit,
            met,
        });
        verdict
    }
}

/// The page.
pub(crate) fn page(front: &str, sections: &[Section]) -> String {
    let mut page = front.to_owned();
    let mut bars = Section::new("The bars");
    let rows: Vec<Vec<String>> = sections
        .iter()
        .flat_map(|section| &section.bars)
        .map(|bar| {
            let met = if bar.met { "yes" } else { "**no**" };
            vec![
                bar.what.clone(),
                bar.measured.clone(),
                bar.limit.clone(),
                met.into(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        bars.table(&["", "measured", "bar", "met"], &rows);
        let _ = write!(page, "\n{}", bars.text);
    }
    for section in sections {
        let _ = write!(page, "\n{}", section.text);
    }
    page
}

/// A time in the unit that suits it.
pub(crate) fn time(time: Duration) -> String {
    let ns = time.as_nanos() as f64;
    let (value, unit) = if ns < 1e3 {
        (ns, "ns")
    } else if ns < 1e6 {
        (ns / 1e3, "µs")
    } else if ns < 1e9 {
        (ns / 1e6, "ms")
    } else {
        (ns / 1e9, "s")
    };
    let digits = match value {
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// A median with the 5th and the 95th percentile.
pub(crate) fn spread(spread: &Spread) -> String {
    format!(
        "{} ({} – {})",
        time(spread.median),
        time(spread.p5),
        time(spread.p95)
    )
}

/// A ratio with its confidence interval.
pub(crate) fn ratio(ratio: &Estimate) -> String {
    format!("{:.3} ({:.3} – {:.3})", ratio.median, ratio.low, ratio.high)
}
