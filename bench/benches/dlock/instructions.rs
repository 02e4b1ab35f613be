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
    if Command::new("valgrind").arg("--version").output().is_err() {
        section.paragraph("Not measured: there is no `valgrind` on this machine.");
        return section;
    }
    let mut rows = Vec::new();
    for server in &bench.servers {
        for api in Api::BOTH {
            let turns = if bench.quick { 50 } else { 500 };
            let [dlock, raw] = ["dlock", "raw"].map(|what| {
                let [once, twice] = [turns, 2 * turns].map(|turns| count(server, api, what, turns));
                Ok::<_, String>(twice?.saturating_sub(once?) / turns)
            });
            rows.push(match (dlock, raw) {
                (Ok(dlock), Ok(raw)) => vec![
                    server.name.clone(),
                    api.to_string(),
                    dlock.to_string(),
                    raw.to_string(),
                    dlock.saturating_sub(raw).to_string(),
                    format!("{:.2}", dlock as f64 / raw as f64),
                ],
                (Err(error), _) | (_, Err(error)) => {
                    vec![server.name.clone(), api.to_string(), error]
                }
            });
        }
    }
    section.table(
        &["server", "API", "dlock", "raw", "difference", "ratio"],
        &rows,
    );
    section
}

/// The instructions of a process that takes a lock so often.
fn count(server: &Server, api: Api, what: &str, turns: u64) -> Result<u64, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let kind = match server.kind {
        Kind::Postgres => "postgres",
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => "mysql",
    };
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["--exercise", kind, &server.url, &api.to_string(), what])
        .arg(turns.to_string())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text
        .lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    match collected {
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
