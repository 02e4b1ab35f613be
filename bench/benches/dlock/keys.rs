use std::hint::black_box;
use std::time::Duration;

use dlock_diesel::LockKey;

use crate::Bench;
use crate::instructions::{self, Counted};
use crate::report::Section;
use crate::session::Api;

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
        "Allocations for each acquire and release of a free lock, once prepared, as valgrind counts them, Rust's and the C \
         libraries'; raw statements as in section 1, whose allocations are Diesel's and the driver's:",
    );
    let mut rows = Vec::new();
    for server in &bench.servers {
        for api in Api::BOTH {
            rows.push(instructions::row(bench, server, api, Counted::Allocations));
        }
    }
    section.table(
        &["server", "API", "dlock", "raw", "difference", "ratio"],
        &rows,
    );
    section
}
