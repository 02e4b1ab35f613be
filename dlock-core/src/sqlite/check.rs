//! What can be wrong with locks on a SQLite connection.

use super::sql;
use crate::proto::{Abandoned, Check, Facts};
use crate::{Finding, Report};

const LOCKS: &str = "session and shared locks, of the connections and processes of this host";

pub(super) fn check() -> Check {
    Check::new(sql::check(), judge, "SELECT 1", Abandoned::default())
}

fn judge(facts: &Facts) -> Report {
    let mut findings = Vec::new();
    if facts.has_failed("locks") {
        findings.push(Finding::danger(
            "enable_advisory_locks",
            "this connection cannot take locks yet: call `conn.enable_advisory_locks()` on it once, right after \
             opening it",
        ));
    }
    if !facts.get("refused").is_empty() {
        findings.push(Finding::danger("lock file", facts.get("refused")));
    }
    if facts.is("memory", "1") {
        findings.push(Finding::note(
            "memory",
            "this database is not a file: its locks are those of this process only",
        ));
    }
    Report::new(
        format!("SQLite {}", facts.get("version")).trim_end().into(),
        LOCKS,
        findings,
    )
}
