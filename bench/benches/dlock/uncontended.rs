use std::cell::RefCell;
use std::time::{Duration, Instant};

use dlock_tests::{Kind, unique_key};

use crate::plot::{self, Bar};
use crate::processor::OneProcessor;
use crate::report::{Section, ratio, spread};
use crate::session::{Api, How, Locker, Session};
use crate::{Bench, raw, slug};

/// How long it takes to acquire a lock that is free, and to release it.
pub(crate) fn pair(locker: &mut (impl Locker + ?Sized), how: How) -> Duration {
    let begin = Instant::now();
    locker.acquire(how);
    locker.release();
    begin.elapsed()
}

fn ones(session: &mut dyn Session) -> Duration {
    let begin = Instant::now();
    session.select_one();
    session.select_one();
    begin.elapsed()
}

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("1. A free lock: acquire and release");
    section.paragraph(
        "Both through the same connection. The rows of raw against raw show how exact the others are.",
    );
    section.items(&[
        format!(
            "Raw on PostgreSQL: {}, prepared once",
            raw::pair_text(Kind::Postgres)
        ),
        format!(
            "Raw on MySQL and MariaDB: {}, prepared once",
            raw::pair_text(Kind::Mysql)
        ),
        "`SELECT 1`: twice, prepared once".into(),
    ]);
    let mut processor = OneProcessor::enter();
    let pace = bench.pace(Duration::ZERO);
    let mut rows = Vec::new();
    let mut bars = Vec::new();
    for server in bench.servers.clone() {
        for api in Api::BOTH {
            let session = RefCell::new(processor.open(api, server, &unique_key("bench/free")));
            let mut dlock = || pair(&mut **session.borrow_mut(), How::DLOCK);
            let mut raw = || pair(&mut **session.borrow_mut(), How::RawTry);
            let mut raw_too = || pair(&mut **session.borrow_mut(), How::RawTry);
            let mut ones = || ones(&mut **session.borrow_mut());
            let name = |what| slug(&format!("1 {} {api} {what}", server.name));
            let against_raw = bench.duels.fight(&name("raw"), pace, &mut dlock, &mut raw);
            let against_ones = bench
                .duels
                .fight(&name("ones"), pace, &mut dlock, &mut ones);
            let check = bench
                .duels
                .fight(&name("check"), pace, &mut raw_too, &mut raw);
            let what = format!("{} {api}: free lock against raw", server.name);
            let bar = section.at_most(what, against_raw.ratio.median, 1.05, "×");
            for (compared, outcome, bar) in [
                ("dlock : raw", against_raw, bar.as_str()),
                ("dlock : `SELECT 1`", against_ones, ""),
                ("raw : raw", check, ""),
            ] {
                rows.push(vec![
                    server.name.clone(),
                    api.to_string(),
                    compared.into(),
                    spread(&outcome.ours),
                    spread(&outcome.theirs),
                    ratio(&outcome.ratio),
                    bar.into(),
                ]);
            }
            let group = format!("{} {api}", server.name);
            let [to_raw, to_ones] = [against_raw, against_ones].map(|it| it.ratio.median);
            for (name, ratio) in [
                ("dlock", to_raw),
                ("raw", 1.0),
                ("two SELECT 1", to_raw / to_ones),
            ] {
                bars.push(Bar::ratio(&group, name, ratio));
            }
        }
    }
    processor.tell(&mut section);
    section.table(
        &[
            "server",
            "API",
            "compared",
            "the first",
            "the second",
            "ratio",
            "bar",
        ],
        &rows,
    );
    section.if_missed(
        "free lock",
        "Where the time goes, by the server's own work (statements of each kind, prepared, in turns on one processor): on \
         PostgreSQL 18 raw takes 21 µs, the sync statements 22 µs and the async ones 26 µs. The sync ones answer without \
         columns, which saves 0.9 µs. The wait that a free lock does not need costs them 1.5 µs, and the question whether \
         this is a standby 0.9 µs, because a statement looks up each of its functions for each execution. The async one \
         has 19 of them: it tries, waits and releases, so that a release goes out in one message and a dropped one still \
         releases. On MySQL 9.7 the sync statements take 5 µs more than raw, which takes 26 µs: 1.3 µs for a limit in the \
         text, so that no setting of the user cuts a wait short, 1.1 µs to ask whether this is one of several servers that \
         take writes, 0.9 µs for the release. On MariaDB 11.8 it is 6 µs more than 22 µs, of which that question takes \
         1.9 µs. Async, the client works more as well, which sections 6 and 8 count: \
         more binds, and a longer text that diesel-async puts together each time. None of it grows with the distance.",
    );
    plot::bars(
        &bench.pictures.join("free.svg"),
        "acquire and release a free lock: times as long as raw",
        &bars,
        plot::Scale::Linear,
    );
    section.picture(
        "free.svg",
        "How long it takes to acquire and release a free lock, against raw",
    );
    section
}
