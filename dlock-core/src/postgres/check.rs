//! What can be wrong with PostgreSQL's locks on a connection.

use super::sql;
use crate::proto::{Abandoned, Check, Facts};
use crate::{Finding, Report};

const LOCKS: &str = "session, transaction and shared locks";

pub(super) fn check() -> Check {
    Check::new(
        sql::check(),
        judge,
        sql::ARE_YOU_THERE,
        Abandoned::default(),
    )
}

fn judge(facts: &Facts) -> Report {
    let mut findings = Vec::new();
    engine(facts, &mut findings);
    pooler(facts, &mut findings);
    link(facts, &mut findings);
    limits(facts, &mut findings);
    role(facts, &mut findings);
    Report::new(server(facts), LOCKS, findings)
}

/// Whether what a server calls itself is PostgreSQL's own version. Others claim its name, and name themselves behind
/// it.
pub(super) fn is_postgres(version: &str) -> bool {
    let others = ["-YB-", "Redshift", "Greenplum", "Materialize", "CrateDB"];
    version.starts_with("PostgreSQL") && !others.iter().any(|name| version.contains(name))
}

fn server(facts: &Facts) -> String {
    let product = facts.get("product");
    // As in "PostgreSQL 17.2 (Debian 17.2-1) on x86_64-pc-linux-gnu".
    let words: Vec<_> = product.split(' ').take(2).collect();
    match product {
        "" => "an unknown server".into(),
        _ if is_postgres(product) => words.join(" "),
        _ => product.chars().take(80).collect(),
    }
}

fn engine(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.has_failed("locks") {
        findings.push(Finding::danger(
            "engine",
            "the server does not know PostgreSQL's advisory locks, or does not show them in pg_locks",
        ));
    } else if !facts.is("granted", "t") || facts.get("seen") == "0" {
        findings.push(Finding::danger(
            "engine",
            "the server grants a lock and does not know of it afterwards: its lock functions are stubs",
        ));
    }
    if facts.is("recovery", "t") {
        findings.push(Finding::danger(
            "standby",
            "this is a standby, whose locks are its own: connect to the primary \
             (`target_session_attrs=read-write` in the URL)",
        ));
    }
    if let Some(extension) = facts.limit("cluster") {
        findings.push(Finding::danger(
            "cluster",
            format!(
                "the extension {extension} is installed, and each node that takes writes has its own locks: \
                 take locks on one node only"
            ),
        ));
    }
}

fn pooler(facts: &Facts, findings: &mut Vec<Finding>) {
    let name = facts.get("prepared");
    // Diesel's and tokio-postgres's.
    let is_drivers = name.starts_with("__diesel_stmt_")
        || name
            .strip_prefix('s')
            .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()));
    let what = if facts.sessions_differ() {
        "two statements were answered by two sessions".to_owned()
    } else if !name.is_empty() && !is_drivers {
        format!("a prepared statement was renamed to {name}")
    } else if ["product", "settings", "name"]
        .iter()
        .any(|name| facts.has_failed(name))
        && !facts.has_failed("locks")
    {
        // As "prepared statement already exists".
        "a question failed that each session of PostgreSQL answers".to_owned()
    } else {
        return;
    };
    findings.push(Finding::danger(
        "pooler",
        format!(
            "{what}: a pooler in transaction mode is between you and the server. The lock of a session stays with a \
             session that others use. Use `transaction` and `advisory_xact_lock` only, or a session of your own"
        ),
    ));
}

fn link(facts: &Facts, findings: &mut Vec<Finding>) {
    let client = facts.get("client");
    let is_remote = !client.is_empty() && !client.starts_with("127.") && client != "::1";
    let times = ["keepalives_idle", "keepalives_interval", "keepalives_count"];
    let [Some(idle), Some(interval), Some(count)] = times.map(|name| facts.number(name)) else {
        return;
    };
    let seconds = idle.saturating_add(interval.saturating_mul(count));
    if is_remote && seconds > 300 {
        findings.push(Finding::warning(
            "keepalive",
            format!(
                "if the host of a holder or the network to it dies, the server frees the lock after {} minutes: \
                 set tcp_keepalives_idle, tcp_keepalives_interval and tcp_keepalives_count",
                seconds / 60
            ),
        ));
    }
    if is_remote && facts.number("user_timeout") == Some(0) {
        findings.push(Finding::note(
            "tcp_user_timeout",
            "the server waits for the kernel's limit (about 15 minutes) until it gives up an answer that the client \
             does not acknowledge",
        ));
    }
    findings.push(Finding::note(
        "client",
        "a client cannot see its own limits (tcp_user_timeout, keepalives_idle): set them in the URL, or its calls \
         hang when the network is cut",
    ));
}

fn limits(facts: &Facts, findings: &mut Vec<Finding>) {
    for (name, who) in [
        ("idle_session_timeout", "that sends nothing for so long"),
        (
            "idle_in_transaction_session_timeout",
            "that sends nothing in a transaction for so long",
        ),
        ("transaction_timeout", "whose transaction lasts so long"),
    ] {
        if let Some(limit) = facts.limit(name) {
            findings.push(Finding::warning(
                name,
                format!("it is {limit}: the server ends the session of a holder {who}"),
            ));
        }
    }
    let isolation = facts.get("isolation");
    if !isolation.is_empty() && isolation != "read committed" {
        findings.push(Finding::note(
            "isolation",
            format!(
                "default_transaction_isolation is {isolation}: `transaction` takes a round trip more"
            ),
        ));
    }
}

fn role(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.is("plpgsql", "f") {
        findings.push(Finding::note(
            "plpgsql",
            "this role may not use PL/pgSQL: a long wait writes a line to the server's log every second",
        ));
    }
    if facts.is("stats", "f") {
        findings.push(Finding::note(
            "pg_read_all_stats",
            "this role is not a member: since when the sessions of other users hold a lock is not shown",
        ));
    }
    if facts.is("signal", "f") {
        findings.push(Finding::note(
            "pg_signal_backend",
            "this role is not a member: it cannot end the session of another user that holds a lock",
        ));
    }
}
