//! A piece of a history as a picture.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::proof::check::holds;
use crate::proof::history::{History, Mode};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 110.0;
const ROW: f64 = 22.0;
const COLORS: [(&str, &str); 5] = [
    ("k0", "#4477aa"),
    ("k1", "#ee6677"),
    ("k2", "#228833"),
    ("accounts", "#ccbb44"),
    ("semaphore", "#aa3377"),
];

/// An SVG: a row for each place of a process, a bar for each hold, a thin line for each wait, and what was broken. It shows
/// the `length` nanoseconds with most kinds of faults.
pub fn picture(history: &History, title: &str, length: u64) -> String {
    let begin = history
        .faults
        .iter()
        .map(|fault| fault.from.saturating_sub(length / 8))
        .max_by_key(|begin| {
            let inside = history
                .faults
                .iter()
                .filter(|fault| (*begin..begin + length).contains(&fault.from));
            let mut kinds: Vec<&str> = inside.map(|fault| fault.kind.as_str()).collect();
            kinds.sort_unstable();
            kinds.dedup();
            kinds.len()
        })
        .unwrap_or(0);
    let x = |time: u64| {
        let time = time.clamp(begin, begin + length) - begin;
        LEFT + time as f64 / length as f64 * (WIDTH - LEFT - 10.0)
    };
    let is_seen = |from: u64, to: u64| from < begin + length && to > begin;
    // `w1.t0` of `w1.3.t0`: the next process takes the place of one that was killed.
    let place = |actor: &str| {
        let mut parts = actor.split('.');
        let (worker, thread) = (
            parts.next().unwrap_or_default(),
            parts.next_back().unwrap_or_default(),
        );
        format!("{worker} {thread}")
    };
    let mut rows: BTreeMap<String, f64> = history
        .ops
        .iter()
        .map(|op| (place(&op.actor), 0.0))
        .collect();
    for (row, y) in rows.values_mut().enumerate() {
        *y = 32.0 + ROW * row as f64;
    }
    let height = 32.0 + ROW * rows.len() as f64 + 46.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"14\">{title}</text>\n"
    );
    for (name, y) in &rows {
        let line = y + ROW / 2.0 + 3.0;
        let _ = writeln!(svg, "<text x=\"10\" y=\"{line}\">{name}</text>");
    }
    for op in &history.ops {
        let to = op
            .entered
            .or(op.ended.as_ref().map(|(time, ..)| *time))
            .unwrap_or(op.asked);
        if is_seen(op.asked, to) && to - op.asked > length / 800 {
            let y = rows[&place(&op.actor)] + ROW / 2.0;
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} {y}H{:.1}\" stroke=\"#999\"/>",
                x(op.asked),
                x(to)
            );
        }
    }
    let holds = holds(history);
    for hold in holds.iter().filter(|hold| is_seen(hold.from, hold.to)) {
        let name = match (hold.op.mode, hold.op.keys[0].as_str()) {
            (Mode::Permits(_), _) => "semaphore",
            (_, key) if key.starts_with('a') => "accounts",
            (_, key) => key,
        };
        let color = COLORS
            .iter()
            .find(|(of, _)| *of == name)
            .map_or("#000", |(_, color)| color);
        let y = rows[&place(&hold.op.actor)] + 4.0;
        let width = (x(hold.to) - x(hold.from)).max(1.2);
        let opacity = if hold.op.mode == Mode::Shared {
            " fill-opacity=\".4\""
        } else {
            ""
        };
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{color}\"{opacity}/>",
            x(hold.from),
            ROW - 8.0
        );
    }
    for (number, fault) in history
        .faults
        .iter()
        .filter(|fault| is_seen(fault.from, fault.until))
        .enumerate()
    {
        let owner = fault.worker.as_ref().or_else(|| {
            let session = fault.session.as_ref()?;
            let op = history
                .ops
                .iter()
                .find(|op| op.session.as_ref() == Some(session));
            let manager = || history.opened.iter().find(|(_, opened)| opened == session);
            op.map(|op| &op.worker)
                .or_else(|| manager().map(|(worker, _)| worker))
        });
        let ys: Vec<f64> = rows
            .iter()
            .filter(|(name, _)| {
                let worker = owner.and_then(|worker| worker.split('.').next());
                worker.is_none_or(|worker| name.starts_with(&format!("{worker} ")))
            })
            .map(|(_, y)| *y)
            .collect();
        let (top, bottom) = (
            ys.iter().copied().fold(height, f64::min),
            ys.iter().copied().fold(0.0, f64::max) + ROW,
        );
        let (from, to) = (x(fault.from), x(fault.until).max(x(fault.from) + 1.0));
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{}\" fill=\"#d00\" fill-opacity=\".18\"/>\
             <path d=\"M{from:.1} {top}V{bottom}\" stroke=\"#d00\"/>\
             <text x=\"{:.1}\" y=\"{}\" fill=\"#d00\" font-size=\"9\">{}</text>",
            to - from,
            bottom - top,
            from + 2.0,
            top + 8.0 + 9.0 * (number % 3) as f64,
            fault.kind
        );
    }
    let y = height - 14.0;
    let mut at = LEFT;
    for (name, color) in COLORS {
        let _ = writeln!(
            svg,
            "<rect x=\"{at}\" y=\"{}\" width=\"12\" height=\"10\" fill=\"{color}\"/><text x=\"{}\" y=\"{y}\">{name}</text>",
            y - 9.0,
            at + 16.0
        );
        at += 90.0;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{at}\" y=\"{y}\">paler: shared; thin: a wait; {:.0} ms in all</text>\n</svg>",
        length as f64 / 1e6
    );
    svg
}
