//! What a check finds, answer by answer.

use std::time::Duration;

use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Bind, Dialect, ErrorFields, Failure, Machine, Mysql, Postgres,
    Reason, Rows, Statement, Step,
};
use dlock_core::{Report, Severity};

/// Plays a server that answers each statement with what `say` makes of its text; `None` is an error.
fn check(
    mut machine: impl Machine<Output = Report>,
    say: impl Fn(&Statement) -> Option<String>,
) -> Result<Report, Failure> {
    let mut step = machine.start(Duration::ZERO);
    loop {
        let answer = match &step {
            Step::Query(statement) => match say(statement) {
                Some(text) => Answer::Rows(Rows::Text(text)),
                None => Answer::Error(ErrorFields::default()),
            },
            Step::Batch(_) => Answer::Done,
            Step::Sleep(_) | Step::Tell(_) => panic!("a check only asks"),
            Step::Done(_) => break,
        };
        step = machine.next(answer, Duration::ZERO);
    }
    match step {
        Step::Done(result) => result,
        _ => unreachable!(),
    }
}

/// A PostgreSQL where all is well, but for these facts instead.
fn postgres(changed: &[(&str, &str)]) -> Report {
    let changed: Vec<_> = changed.to_vec();
    let report = check(Postgres::check(), |statement| {
        let text = statement.text();
        let facts: &[(&str, &str)] = if text.contains("version()") {
            &[("product", "PostgreSQL 17.2 on x86_64")]
        } else if text.contains("tcp_user_timeout") {
            &[
                ("id", "4711"),
                ("recovery", "f"),
                ("idle_session_timeout", "0"),
                ("isolation", "read committed"),
                ("keepalives_idle", "7200"),
                ("keepalives_interval", "75"),
                ("keepalives_count", "9"),
                ("user_timeout", "0"),
                ("client", "127.0.0.1"),
            ]
        } else if text.contains("pg_has_role") {
            &[
                ("id", "4711"),
                ("stats", "t"),
                ("signal", "t"),
                ("plpgsql", "t"),
                ("cluster", ""),
            ]
        } else if text.contains("pg_try_advisory_xact_lock") {
            &[("id", "4711"), ("granted", "t"), ("seen", "1")]
        } else {
            &[("id", "4711"), ("prepared", "__diesel_stmt_3")]
        };
        let value = |name: &str, value: &str| {
            // Only the last question is answered by another session.
            let only_last = name == "id" && !text.contains("pg_prepared_statements");
            let found = changed
                .iter()
                .find(|(other, _)| *other == name && !only_last);
            found.map_or(value.to_owned(), |(_, value)| (*value).to_owned())
        };
        let lines = facts
            .iter()
            .map(|(name, old)| format!("{name}={}", value(name, old)));
        Some(lines.collect::<Vec<_>>().join("\n"))
    });
    report.expect("a report")
}

fn found(report: &Report, severity: Severity) -> Vec<&'static str> {
    let of = |finding: &&dlock_core::Finding| finding.severity == severity;
    report
        .findings
        .iter()
        .filter(of)
        .map(|finding| finding.topic)
        .collect()
}

#[test]
fn a_postgres_where_all_is_well() {
    let report = postgres(&[]);
    assert_eq!(report.server, "PostgreSQL 17.2");
    assert!(report.is_well(), "{report:#}");
}

#[test]
fn what_keeps_locks_of_postgres_from_excluding() {
    for (changed, topic) in [
        (("seen", "0"), "engine"),
        (("granted", "f"), "engine"),
        (("recovery", "t"), "standby"),
        (("cluster", "bdr"), "cluster"),
        (("id", "4712"), "pooler"),
        (("prepared", "PGBOUNCER_17"), "pooler"),
    ] {
        let report = postgres(&[changed]);
        assert_eq!(found(&report, Severity::Danger), [topic], "{report:#}");
        assert!(!report.excludes());
    }
    for driver in ["__diesel_stmt_0", "s17", ""] {
        assert!(postgres(&[("prepared", driver)]).excludes(), "{driver}");
    }
    let other = postgres(&[("product", "CockroachDB CCL v24.1.0")]);
    assert_eq!(other.server, "CockroachDB CCL v24.1.0");
}

/// "prepared statement already exists": that of another client, in a session that they share.
#[test]
fn a_question_that_fails_here_and_not_there_shows_a_pooler() {
    for failing in [
        "SELECT pg_catalog.concat('product",
        "tcp_user_timeout",
        "pg_prepared_statements",
    ] {
        let report = check(Postgres::check(), |statement| {
            let text = statement.text();
            (!text.contains(failing))
                .then(|| "id=1\ngranted=t\nseen=1\nproduct=PostgreSQL 17.2".to_owned())
        });
        let report = report.expect("a report");
        assert_eq!(found(&report, Severity::Danger), ["pooler"], "{report:#}");
    }
}

#[test]
fn what_lets_locks_of_postgres_be_lost() {
    for (changed, topic) in [
        (("client", "10.0.0.7"), "keepalive"),
        (("idle_session_timeout", "10min"), "idle_session_timeout"),
    ] {
        let report = postgres(&[changed]);
        assert_eq!(found(&report, Severity::Warning), [topic], "{report:#}");
        assert!(report.excludes() && !report.is_well());
    }
    let noticed = [
        ("client", "10.0.0.7"),
        ("keepalives_idle", "10"),
        ("keepalives_interval", "5"),
    ];
    assert!(postgres(&noticed).is_well());
}

#[test]
fn a_server_that_does_not_know_the_functions_has_no_locks() {
    let report = check(Postgres::check(), |statement| {
        let text = statement.text();
        text.contains("version()")
            .then(|| "product=SomethingDB 1".to_owned())
    });
    let report = report.expect("a report");
    assert_eq!(found(&report, Severity::Danger), ["engine"], "{report:#}");
    let report = check(Postgres::check(), |_| None).expect("a report");
    assert!(
        report
            .to_string()
            .starts_with("an unknown server: LOCKS DO NOT EXCLUDE"),
        "{report}"
    );
}

/// A MariaDB where all is well, but for these facts instead.
fn mysql(changed: &[(&str, &str)], failing: &str) -> Result<Report, Failure> {
    check(Mysql::check(), |statement| {
        let tag = match statement.binds.iter().next() {
            Some(Bind::BigInt(tag)) => *tag,
            other => panic!("no tag: {other:?}"),
        };
        let text = statement.text();
        if !failing.is_empty() && text.contains(failing) {
            return None;
        }
        let mut lines = vec![format!("tag={tag}"), "id=10".to_owned()];
        let facts = if text.contains("version_comment") {
            "version=11.8.6-MariaDB\nwait_timeout=28800"
        } else if text.contains("GET_LOCK") {
            "granted=1\nseen=1\nreleased=1"
        } else if text.contains("USER_PRIVILEGES") {
            "process=1"
        } else {
            ""
        };
        lines.push(facts.to_owned());
        lines.extend(
            changed
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        Some(lines.join("\n"))
    })
}

#[test]
fn what_keeps_locks_of_mysql_from_excluding() {
    let well = mysql(&[], "").expect("a report");
    assert_eq!(well.server, "MariaDB 11.8.6");
    assert!(well.is_well(), "{well:#}");
    let writers = [
        ("group_replication_single_primary_mode", "OFF"),
        ("group_replication_group_name", "aaaa"),
    ];
    let danger: [(&[(&str, &str)], _); 4] = [
        (&[("wsrep_on", "ON")], "cluster"),
        (&writers, "cluster"),
        (&[("seen", "0")], "engine"),
        (&[("released", "0")], "engine"),
    ];
    for (changed, topic) in danger {
        let report = mysql(changed, "").expect("a report");
        assert_eq!(found(&report, Severity::Danger), [topic], "{report:#}");
    }
    // The variable is there as soon as the plugin is.
    assert!(mysql(&writers[..1], "").expect("a report").excludes());
    let report = mysql(&[], "GET_LOCK").expect("a report");
    assert_eq!(found(&report, Severity::Danger), ["engine"], "{report:#}");
    let report = mysql(&[("read_only", "ON")], "").expect("a report");
    assert_eq!(
        found(&report, Severity::Warning),
        ["read_only"],
        "{report:#}"
    );
    let report = mysql(&[("wait_timeout", "60")], "").expect("a report");
    assert_eq!(
        found(&report, Severity::Warning),
        ["wait_timeout"],
        "{report:#}"
    );
}

#[test]
fn an_answer_to_an_earlier_question_is_recognized() {
    let failure = mysql(&[("tag", "17")], "").expect_err("out of step");
    assert_eq!(failure.reason, Reason::OutOfStep);
    assert_eq!(failure.aftermath, Aftermath::EndSessionUnread);
}

#[test]
fn a_session_that_is_gone_is_told_from_a_server_that_understands_nothing() {
    for lost_at in 0..3 {
        let mut machine = Mysql::check();
        let mut step = machine.start(Duration::ZERO);
        let mut asked = 0;
        while !matches!(step, Step::Done(_)) {
            let error = ErrorFields {
                lost: asked == lost_at,
                ..ErrorFields::default()
            };
            asked += 1;
            step = machine.next(Answer::Error(error), Duration::ZERO);
        }
        assert!(
            matches!(
                step,
                Step::Done(Err(Failure {
                    reason: Reason::Lost,
                    ..
                }))
            ),
            "{step:?}"
        );
    }
    // Drivers do not always tell.
    let mut machine = Mysql::check();
    let mut step = machine.start(Duration::ZERO);
    while !matches!(step, Step::Done(_)) {
        step = machine.next(Answer::Error(ErrorFields::default()), Duration::ZERO);
    }
    assert!(
        matches!(
            step,
            Step::Done(Err(Failure {
                reason: Reason::Lost,
                ..
            }))
        ),
        "{step:?}"
    );
}

#[test]
fn a_check_that_is_dropped_leaves_nothing() {
    assert_eq!(Postgres::check().abandon(), Abandoned::default());
    let abandoned = Mysql::check().abandon();
    assert!(abandoned.broken && abandoned.messages.is_empty());
}
