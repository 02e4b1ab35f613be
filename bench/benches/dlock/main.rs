//! Measures dlock against the wire, the drivers and the neighbours. `cargo bench -p dlock-bench` measures everything and
//! writes `docs/benchmarks/`; `cargo bench -p dlock-bench -- --help` says what else can be asked for.
//!
//! Times on a shared machine drift, so all that is compared takes turns, and what counts is the ratio.

mod duel;
mod growth;
mod hand_over;
mod instructions;
mod keys;
mod limits;
mod machine;
mod managed;
mod neighbours;
mod plot;
mod processor;
mod raw;
mod report;
mod session;
mod transaction;
mod uncontended;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use dlock_tests::{Kind, Server, servers};

use crate::duel::{Duels, Pace};
use crate::neighbours::Python;
use crate::report::Section;

/// Measures dlock on the servers of TEST_URLS, or on servers that are started for it.
#[derive(Debug, Parser)]
struct Arguments {
    /// The sections to measure, by their numbers; none is all
    #[arg(value_parser = clap::value_parser!(u8).range(1..=9))]
    sections: Vec<u8>,
    /// Few samples: to see that it works, not for numbers
    #[arg(long)]
    quick: bool,
    /// How long each comparison takes turns. Less is less exact
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Only servers whose product and version contain this
    #[arg(long, default_value = "")]
    server: String,
    /// Where the page and the pictures go. By default docs/benchmarks if everything is measured, else nowhere
    #[arg(long)]
    out: Option<PathBuf>,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
    /// For the instructions section: server's kind, URL, API, what, turns
    #[arg(long, hide = true, num_args = 5)]
    exercise: Vec<String>,
}

/// What all sections share.
struct Bench {
    quick: bool,
    seconds: u32,
    servers: Vec<&'static Server>,
    duels: Duels,
    pictures: PathBuf,
}

impl Bench {
    /// Enough turns of what takes about `turn` for a median to be exact.
    fn pace(&self, turn: Duration) -> Pace {
        let ms = Duration::from_millis;
        match (self.quick, turn < ms(20)) {
            (true, fast) => Pace {
                samples: 10,
                warm_up: ms(if fast { 100 } else { 1 }),
                measure: ms(if fast { 500 } else { 1 }),
            },
            (false, true) => Pace {
                samples: 100,
                warm_up: ms(1000),
                measure: Duration::from_secs(self.seconds.into()),
            },
            (false, false) => Pace {
                samples: 20,
                warm_up: ms(1),
                measure: turn * 20,
            },
        }
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &'static Server> + use<> {
        let servers = self.servers.clone();
        servers
            .into_iter()
            .filter(move |server| server.kind == kind)
    }
}

/// What a name may be in a file's name.
fn slug(text: &str) -> String {
    text.to_lowercase().replace([' ', '/', '.', ':'], "-")
}

const FRONT: &str = "# Benchmarks

How long dlock takes, compared in each case with what takes turns with it in the same run on the same machine. So the \
ratios count, and not the times. A time is the median, with the 5th and the 95th percentile in parentheses; a ratio is \
the median over samples, with its 95 % confidence interval, where a sample is the ratio of the medians of some turns. \
dlock is given a key of text, and makes the server's key of it each time; raw statements are given that ready-made.

This page is written by `cargo bench -p dlock-bench`, and `cargo bench -p dlock-bench -- 3` repeats its section 3. \
Servers are those of `TEST_URLS`, or else are started for it: see the [readme](../../README.md#try-it). No test looks at \
times.
";

fn main() {
    let arguments = Arguments::parse();
    if let [kind, url, api, what, turns] = arguments.exercise.as_slice() {
        return instructions::exercise(kind, url, api, what, turns);
    }
    let all = arguments.sections.is_empty() && arguments.server.is_empty() && !arguments.quick;
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dlock-bench");
    let out = arguments
        .out
        .or_else(|| all.then(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks")));
    let pictures = out.clone().unwrap_or_else(|| scratch.join("pictures"));
    fs::create_dir_all(&pictures).expect("a folder for the pictures");

    let mut bench = Bench {
        quick: arguments.quick,
        seconds: arguments.seconds,
        servers: servers()
            .iter()
            .filter(|server| server.name.contains(&arguments.server))
            .collect(),
        duels: Duels::new(scratch.join("criterion")),
        pictures,
    };
    let names: Vec<String> = bench
        .servers
        .iter()
        .map(|server| server.name.clone())
        .collect();
    assert!(!names.is_empty(), "no server is a {}", arguments.server);

    let wanted = |number| arguments.sections.is_empty() || arguments.sections.contains(&number);
    let python = wanted(7).then(|| Python::install(&scratch));
    let measures: [fn(&mut Bench) -> Section; 6] = [
        uncontended::run,
        transaction::run,
        hand_over::run,
        growth::run,
        limits::run,
        keys::run,
    ];
    let mut sections = Vec::new();
    for (number, measure) in (1..).zip(measures) {
        if wanted(number) {
            sections.push(measure(&mut bench));
        }
    }
    if let Some(python) = &python {
        sections.push(neighbours::run(&mut bench, python));
    }
    if wanted(8) {
        sections.push(instructions::run(&bench));
    }
    if wanted(9) {
        sections.push(managed::run(&mut bench));
    }
    let versions = match &python {
        Some(Ok(python)) => Some(python.versions()),
        _ => None,
    };
    sections.push(machine::describe(&names, versions));

    let page = report::page(FRONT, &sections);
    println!("\n{page}");
    if let Some(out) = out {
        fs::write(out.join("README.md"), page).expect("the page can be written");
    }
}
