//! Checks the locks of a database: `DATABASE_URL=.. cargo run --example doctor`
//!
//! It exits with 0 if all is well, with 1 if a lock can be lost, and with 2 if locks do not exclude.

use std::process::ExitCode;

use dlock_diesel::AdvisoryLockExt;

mod support;

fn main() -> ExitCode {
    let database = support::Database::from_env();
    support::exit_code(support::on_database!(database, examine), 3)
}

fn examine<C: support::Connect>(url: &str) -> support::Result<ExitCode> {
    let mut conn = support::connect::<C>(url)?;
    let report = conn.check_advisory_locks()?;
    println!("{report:#}");
    Ok(match (report.is_well(), report.excludes()) {
        (true, _) => ExitCode::SUCCESS,
        (false, true) => 1.into(),
        (false, false) => 2.into(),
    })
}
