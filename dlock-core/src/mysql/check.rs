//! What can be wrong with the locks of MySQL and MariaDB on a connection.

use super::sql;
use super::tag::Tag;
use crate::proto::{Abandoned, Check, Facts};
use crate::{Finding, Report};

const LOCKS: &str = "session locks; `transaction` takes one around the transaction";

/// A holder that does nothing for less than this is nothing special.
const AN_HOUR: u64 = 3600;

/// What else speaks the protocol, and names itself in the version or in its comment.
const OTHERS: [&str; 9] = [
    "Percona",
    "TiDB",
    "Vitess",
    "OceanBase",
    "SingleStore",
    "MatrixOne",
    "StarRocks",
    "Doris",
    "Dolt",
];

pub(super) fn check() -> Check {
    let tag = Tag::new();
    // An answer that nobody reads puts the connection out of step: the next question is given it.
    let check = Check::new(
        sql::check(tag),
        judge,
        sql::ARE_YOU_THERE,
        Abandoned::broken(),
    );
    check.tagged(tag.number())
}

fn judge(facts: &Facts) -> Report {
    let mut findings = Vec::new();
    engine(facts, &mut findings);
    cluster(facts, &mut findings);
    limits(facts, &mut findings);
    privileges(facts, &mut findings);
    findings.push(Finding::note(
        "keepalive",
        "neither the server's nor the client's limits for a dead network can be read here: see \
         docs/guide/operations.md",
    ));
    Report::new(server(facts), LOCKS, findings)
}

fn is_mariadb(facts: &Facts) -> bool {
    facts.get("version").contains("MariaDB")
}

fn server(facts: &Facts) -> String {
    let version = facts.get("version");
    let number = version.split('-').next().unwrap_or_default();
    let text = format!("{version} {}", facts.get("comment")).to_lowercase();
    let other = OTHERS
        .iter()
        .find(|name| text.contains(&name.to_lowercase()));
    match other {
        _ if version.is_empty() => "an unknown server".into(),
        _ if is_mariadb(facts) => format!("MariaDB {number}"),
        Some(name) => format!("{name} ({version})"),
        None => format!("MySQL {number}"),
    }
}

fn engine(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.has_failed("locks") {
        findings.push(Finding::danger(
            "engine",
            "the server does not know GET_LOCK, IS_USED_LOCK or RELEASE_LOCK, or refuses them",
        ));
    } else if !facts.is("granted", "1") || !facts.is("seen", "1") || !facts.is("released", "1") {
        findings.push(Finding::danger(
            "engine",
            "the server grants a lock and does not know of it afterwards: its lock functions are stubs",
        ));
    }
    if facts.sessions_differ() {
        findings.push(Finding::danger(
            "proxy",
            "two statements were answered by two sessions: a proxy shares sessions among clients, and a lock stays \
             with a session that others use. Let it keep a session for each client",
        ));
    }
}

fn cluster(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.is("wsrep_on", "ON") {
        findings.push(Finding::danger(
            "cluster",
            "this is a node of a Galera cluster, and each node has its own locks: have all programs connect to the \
             same node",
        ));
    }
    let several_writers = facts.is("group_replication_single_primary_mode", "OFF");
    if several_writers && !facts.get("group_replication_group_name").is_empty() {
        findings.push(Finding::danger(
            "cluster",
            "group replication has several writers, and each of them has its own locks: have all programs connect to \
             the same node",
        ));
    }
    if facts.is("read_only", "ON") {
        findings.push(Finding::warning(
            "read_only",
            "the server is read-only. If it is a replica, its locks are its own: connect to the source",
        ));
    }
}

fn limits(facts: &Facts, findings: &mut Vec<Finding>) {
    if let Some(seconds) = facts.number("wait_timeout") {
        let text = format!(
            "it is {seconds} seconds: the server ends the session of a holder that sends nothing for so long"
        );
        findings.push(match seconds < AN_HOUR {
            true => Finding::warning("wait_timeout", text),
            false => Finding::note("wait_timeout", text),
        });
    }
    for name in [
        "idle_transaction_timeout",
        "idle_write_transaction_timeout",
        "idle_readonly_transaction_timeout",
    ] {
        if let Some(limit) = facts.limit(name) {
            findings.push(Finding::warning(
                name,
                format!(
                    "it is {limit} seconds: the server ends the session of a holder that sends nothing in a \
                     transaction for so long"
                ),
            ));
        }
    }
}

fn privileges(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.has_failed("waiting") || facts.is("performance_schema", "OFF") {
        findings.push(Finding::note(
            "performance_schema",
            "it is off, or this user may not read metadata_locks: sessions that wait for a lock are not shown",
        ));
    }
    if facts.is("process", "0") {
        findings.push(Finding::note(
            "PROCESS",
            "this user does not have the privilege: the user and the time of another user's holder are not shown",
        ));
    }
}
