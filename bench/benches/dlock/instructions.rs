use std::env;
use std::process::Command;

use dlock_tests::{Kind, Server, unique_key};

use crate::Bench;
use crate::report::Section;
use crate::session::{Api, How};

pub(crate) fn run(bench: &Bench) -> Section {
    let mut section = Section::new("8. Instructions");
    section.paragraph(
        "What the client executes to acquire and release a free lock, in our code, Diesel and the driver, as callgrind \
         counts it: what a thousand turns take more than five hundred, for each turn. Raw as in section 1. The difference \
         is what dlock costs. It does not depend on how busy the machine is.",
    );
    let mut rows = Vec::new();
    for server in &bench.servers {
        for api in Api::BOTH {
            let row = row(bench, server, api, Counted::Instructions);
            if let Some(Ok(ratio)) = row.get(5).map(|ratio| ratio.parse()) {
                let limit = match server.kind {
                    Kind::Postgres => 1.1,
                    _ => 1.15,
                };
                let what = format!(
                    "{} {api}: instructions of the client, against raw",
                    server.name
                );
                section.at_most(what, ratio, limit, "×");
            }
            rows.push(row);
        }
    }
    section.table(
        &["server", "API", "dlock", "raw", "difference", "ratio"],
        &rows,
    );
    section
}

/// What valgrind counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counted {
    Instructions,
    Allocations,
}

impl Counted {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Counted::Instructions => &["--tool=callgrind", "--callgrind-out-file=/dev/null"],
            Counted::Allocations => &[
                "--tool=memcheck",
                "--leak-check=no",
                "--undef-value-errors=no",
            ],
        }
    }

    /// The number in what valgrind prints.
    fn read(self, text: &str) -> Option<u64> {
        let (before, after) = match self {
            Counted::Instructions => ("Collected : ", ""),
            Counted::Allocations => ("total heap usage: ", " allocs"),
        };
        let line = text
            .lines()
            .find_map(|line| Some(line.split_once(before)?.1))?;
        let number = match after {
            "" => line,
            after => line.split_once(after)?.0,
        };
        number.trim().replace(',', "").parse().ok()
    }
}

/// Server, API, dlock's number for each turn, raw's, the difference and the ratio.
pub(crate) fn row(bench: &Bench, server: &Server, api: Api, counted: Counted) -> Vec<String> {
    let turns = if bench.quick { 50 } else { 500 };
    let [dlock, raw] = ["dlock", "raw"].map(|what| {
        let [once, twice] =
            [turns, 2 * turns].map(|turns| count(server, api, what, turns, counted));
        Ok::<_, String>(twice?.saturating_sub(once?) as f64 / turns as f64)
    });
    match (dlock, raw) {
        (Ok(dlock), Ok(raw)) => vec![
            server.name.clone(),
            api.to_string(),
            format!("{dlock:.0}"),
            format!("{raw:.0}"),
            format!("{:.0}", dlock - raw),
            format!("{:.2}", dlock / raw),
        ],
        (Err(error), _) | (_, Err(error)) => vec![server.name.clone(), api.to_string(), error],
    }
}

/// Of a process that takes a lock so often.
fn count(
    server: &Server,
    api: Api,
    what: &str,
    turns: u64,
    counted: Counted,
) -> Result<u64, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let kind = match server.kind {
        Kind::Postgres => "postgres",
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => "mysql",
    };
    let output = Command::new("valgrind")
        .args(counted.arguments())
        .arg(program)
        .args(["--exercise", kind, &server.url, &api.to_string(), what])
        .arg(turns.to_string())
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    match counted.read(&text) {
        Some(count) if output.status.success() => Ok(count),
        _ => Err(format!(
            "valgrind failed: {}",
            text.lines().next_back().unwrap_or_default()
        )),
    }
}

/// What [`count`] counts.
pub(crate) fn exercise(kind: &str, url: &str, api: &str, what: &str, turns: &str) {
    let kind = match kind {
        "postgres" => Kind::Postgres,
        _ => Kind::Mysql,
    };
    let api = match api {
        "sync" => Api::Sync,
        _ => Api::Async,
    };
    let how = match what {
        "dlock" => How::DLOCK,
        _ => How::RawTry,
    };
    let turns: u32 = turns.parse().expect("BUG: turns are a number");
    let mut session = api.open_url(kind, url, &unique_key("bench/instructions"));
    for _ in 0..turns {
        session.acquire(how);
        session.release();
    }
}
