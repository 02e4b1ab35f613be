use std::thread;
use std::time::{Duration, Instant};

use dlock_tests::{Kind, unique_key};

use crate::Bench;
use crate::duel::{Spread, record, times};
use crate::plot::{self, Axis, Line};
use crate::raw;
use crate::report::{Section, time};
use crate::session::{Api, How, Vain};

/// How much later than the limit at most one call of a hundred returns.
const BAR: Duration = Duration::from_millis(5);

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("5. Limits: how late `timeout(d)` returns");
    section.paragraph(
        "Another connection holds the lock. How much longer than `d` it takes until the answer is there: of `acquire`, \
         which asks who holds the lock when `d` has passed; of `try_acquire`, which does not; and of raw SQL, which is \
         how late the server itself is.",
    );
    section.items(&[
        format!("Raw on PostgreSQL: {}", raw::time_out_text(Kind::Postgres)),
        format!(
            "Raw on MySQL and MariaDB: {}",
            raw::time_out_text(Kind::Mysql)
        ),
    ]);
    let mut rows = Vec::new();
    let mut lines = Vec::new();
    for server in bench.servers.clone() {
        for api in Api::BOTH {
            let mut points = Vec::new();
            for limit in [1, 10, 100, 1000].map(Duration::from_millis) {
                // Long waits side by side: they are spread over time, so that they do not end at once.
                let waiters: u32 = match limit.as_millis() {
                    ..100 => 1,
                    100..1000 => 4,
                    _ => 8,
                };
                let turns = match (bench.quick, limit.as_millis()) {
                    (true, ..1000) => 5,
                    (true, _) => 1,
                    (false, ..100) => 50 * bench.seconds,
                    (false, 100..1000) => 10 * bench.seconds,
                    (false, _) => (5 * bench.seconds).div_ceil(2),
                };
                for by in [Vain::Acquire, Vain::TryAcquire, Vain::Raw] {
                    let key = unique_key("bench/limit");
                    let mut holder = api.open(server, &key);
                    holder.acquire(How::DLOCK);
                    let late = thread::scope(|scope| {
                        let threads: Vec<_> = (0..waiters)
                            .map(|waiter| {
                                let mut session = api.open(server, &key);
                                // Prepares.
                                session.time_out(Duration::from_millis(1), by);
                                let head_start = limit * waiter / waiters;
                                scope.spawn(move || {
                                    thread::sleep(head_start);
                                    let mut late = times();
                                    for _ in 0..turns {
                                        let begin = Instant::now();
                                        session.time_out(limit, by);
                                        let taken = begin.elapsed();
                                        // MySQL's own limit is not exact.
                                        let least = match by {
                                            Vain::Acquire | Vain::TryAcquire => limit,
                                            Vain::Raw => limit / 2,
                                        };
                                        assert!(taken >= least, "cut short: {taken:?}");
                                        record(&mut late, taken.saturating_sub(limit));
                                    }
                                    late
                                })
                            })
                            .collect();
                        let mut all = times();
                        for thread in threads {
                            all.add(thread.join().expect("a waiter that ends"))
                                .expect("BUG: their bounds are the same");
                        }
                        all
                    });
                    let late = Spread::of(&late);
                    let what = format!(
                        "{} {api}: 99th percentile of being late for {} ms",
                        server.name,
                        limit.as_millis()
                    );
                    let p99 = late.p99.as_secs_f64() * 1e3;
                    let bar = if by == Vain::Acquire {
                        section.at_most(what, p99, BAR.as_secs_f64() * 1e3, " ms")
                    } else {
                        String::new()
                    };
                    rows.push(vec![
                        server.name.clone(),
                        api.to_string(),
                        format!("{} ms", limit.as_millis()),
                        match by {
                            Vain::Acquire => "`acquire`",
                            Vain::TryAcquire => "`try_acquire`",
                            Vain::Raw => "raw",
                        }
                        .into(),
                        time(late.median),
                        time(late.p99),
                        late.count.to_string(),
                        bar,
                    ]);
                    if by == Vain::Acquire {
                        points.push((limit.as_secs_f64() * 1e3, p99));
                    }
                }
            }
            lines.push(Line::new(format!("{} {api}", server.name), points));
        }
    }
    section.table(
        &[
            "server",
            "API",
            "`d`",
            "call",
            "late by (median)",
            "99th percentile",
            "calls",
            "bar",
        ],
        &rows,
    );
    plot::lines(
        &bench.pictures.join("limits.svg"),
        "99th percentile of being late, ms",
        "limit, ms",
        Axis::Powers(10.0),
        &lines,
    );
    section.picture("limits.svg", "How late limits are, by their length");
    section
}
