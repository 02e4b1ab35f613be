use std::hint::black_box;
use std::time::Duration;

use dlock_diesel::LockKey;
use dlock_tests::unique_key;

use crate::Bench;
use crate::report::Section;
use crate::session::{Api, How, Session};

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("6. Keys and allocations");
    section.paragraph("Nanoseconds to make a server's key of text:");
    let pace = bench.pace(Duration::ZERO);
    let mut rows = Vec::new();
    for length in [10, 100, 1000] {
        let text = "k".repeat(length);
        let postgres = bench.duels.time(&format!("6-postgres-{length}"), pace, || {
            LockKey::from(black_box(text.as_str())).to_postgres()
        });
        let mysql = bench.duels.time(&format!("6-mysql-{length}"), pace, || {
            LockKey::from(black_box(text.as_str())).to_mysql()
        });
        let ns = |estimate: crate::duel::Estimate| {
            format!(
                "{:.0} ({:.0} – {:.0})",
                estimate.median, estimate.low, estimate.high
            )
        };
        rows.push(vec![format!("{length} bytes"), ns(postgres), ns(mysql)]);
    }
    section.table(&["key", "PostgreSQL", "MySQL, MariaDB"], &rows);

    section.paragraph(
        "Allocations of Rust code in the calling thread, once prepared; raw statements as in section 1, whose \
         allocations are Diesel's and the driver's:",
    );
    let mut rows = Vec::new();
    for server in bench.servers.clone() {
        for api in Api::BOTH {
            let mut session = api.open(server, &unique_key("bench/allocations"));
            let [dlock, raw] = [How::DLOCK, How::RawTry].map(|how| count(&mut *session, how));
            rows.push(vec![
                server.name.clone(),
                api.to_string(),
                dlock.0.to_string(),
                raw.0.to_string(),
                dlock.1.to_string(),
                raw.1.to_string(),
            ]);
        }
    }
    section.table(
        &["server", "API", "acquire", "raw", "release", "raw"],
        &rows,
    );
    section
}

/// How often `acquire` and `release` allocate: the least of some turns, as a map or a buffer grows now and then.
fn count(session: &mut dyn Session, how: How) -> (u64, u64) {
    (0..20)
        .map(|_| {
            let acquire = allocation_counter::measure(|| session.acquire(how));
            let release = allocation_counter::measure(|| session.release());
            (acquire.count_total, release.count_total)
        })
        .min()
        .expect("BUG: there are turns")
}
