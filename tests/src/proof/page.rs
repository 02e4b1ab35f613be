//! The figures as a table.

use crate::proof::figures::Figures;

/// A Markdown table: a row for each figure, a column for each server.
pub fn table(columns: &[(String, Figures)]) -> String {
    let mut text = String::from("| |");
    for (name, _) in columns {
        text += &format!(" {name} |");
    }
    text += "\n|---|";
    text += &"---:|".repeat(columns.len());
    text.push('\n');
    let mut row = |name: &str, value: &dyn Fn(&Figures) -> String| {
        text += &format!("| {name} |");
        for (_, figures) in columns {
            text += &format!(" {} |", value(figures));
        }
        text.push('\n');
    };
    let fault = |kind: &'static str| {
        move |figures: &Figures| grouped(figures.faults.get(kind).copied().unwrap_or(0))
    };
    row("operations", &|figures| grouped(figures.operations));
    row("times that a lock was held", &|figures| {
        grouped(figures.holds)
    });
    row("fencing tokens drawn", &|figures| grouped(figures.tokens));
    row(
        "writes of a former holder that its token refused",
        &|figures| grouped(figures.refused),
    );
    row("futures dropped", &|figures| grouped(figures.dropped));
    row(
        "different ones: the form, and after how many polls",
        &|figures| grouped(figures.awaits.len() as u64),
    );
    row("bodies that panicked", &|figures| grouped(figures.panics));
    row("processes killed (SIGKILL)", &fault("kill"));
    row("processes stopped (SIGSTOP)", &fault("stop"));
    row("sessions ended by the server", &fault("end"));
    row("statements cancelled by the server", &fault("cancel"));
    row("connections cut", &fault("cut"));
    row("connections half closed", &fault("half"));
    row("answers withheld, then cut", &fault("answer"));
    row("networks silent", &fault("silence"));
    row("networks slow", &fault("delay"));
    row("servers killed and started again", &fault("restart"));
    row("tables of locks full; SQLite: disks", &fault("full"));
    row(
        "holders whose session or process ended meanwhile",
        &|figures| grouped(figures.cut_short),
    );
    row(
        "longest time until such a lock was held again by one that waited",
        &|figures| time(figures.longest_free),
    );
    row(
        "the same of managed locks, of a stopped process or a silent network",
        &|figures| time(figures.longest_lease),
    );
    row(
        "longest time until all locks were free when all had gone",
        &|figures| time(figures.longest_end),
    );
    row("**locks left behind**", &|figures| grouped(figures.kept));
    row("**violations**", &|figures| grouped(figures.violations));
    text
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn time(nanoseconds: u64) -> String {
    match nanoseconds {
        0 => "–".to_owned(),
        _ => format!("{:.1} ms", nanoseconds as f64 / 1e6),
    }
}
