//! A short form of the proof under faults: `dlock-proof` by hand runs it for longer.

use std::path::PathBuf;
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::{Connection, PgConnection};
use dlock_diesel::AdvisoryLockExt;
use dlock_tests::proof::{Figures, Plan, Round};
use dlock_tests::{
    Kind, Server, TestConnection, on_postgres, servers, start_lasting_mysql,
    start_lasting_postgres, unique_key,
};

/// What is broken, and whether managed locks are held for long.
const SESSIONS: (Plan, bool) = (
    Plan {
        kill: 3,
        stop: 1,
        end: 4,
        cancel: 4,
        cut: 3,
        half: 1,
        answer: 2,
        silence: 0,
        delay: 1,
        restart: 0,
        full: 0,
    },
    false,
);
const RESTART: Plan = Plan {
    kill: 1,
    stop: 0,
    end: 1,
    cancel: 1,
    cut: 1,
    half: 0,
    answer: 0,
    silence: 0,
    delay: 0,
    restart: 1,
    full: 0,
};
const LEASES: (Plan, bool) = (
    Plan {
        kill: 1,
        stop: 2,
        end: 0,
        cancel: 0,
        cut: 0,
        half: 0,
        answer: 0,
        silence: 2,
        delay: 1,
        restart: 0,
        full: 0,
    },
    true,
);

/// On each server, and on SQLite.
#[track_caller]
fn nothing_is_wrong(name: &str, broken: (Plan, bool), operations: Option<i64>) {
    let sqlite = Server {
        kind: Kind::Sqlite,
        name: "SQLite".to_owned(),
        url: String::new(),
    };
    for (number, server) in servers().iter().chain([&sqlite]).enumerate() {
        nothing_is_wrong_on(server, &format!("{name}_{number}"), broken, operations);
    }
}

#[track_caller]
fn nothing_is_wrong_on(
    server: &Server,
    name: &str,
    (plan, leases): (Plan, bool),
    operations: Option<i64>,
) -> Figures {
    let folder = tempfile::tempdir().expect("a folder");
    let round = Round {
        server: server.clone(),
        program: PathBuf::from(env!("CARGO_BIN_EXE_dlock-proof")),
        folder: folder.path().to_owned(),
        run: format!("{name}_{}", std::process::id()),
        seed: u64::from(std::process::id()),
        workers: 3,
        actors: 2,
        plan,
        pace: Duration::from_millis(80),
        least: Duration::from_secs(1),
        operations,
        disturbed: true,
        leases,
        patience: Duration::from_secs(60),
    };
    let outcome = round.run().expect("a round");
    let figures = &outcome.figures;
    let histories = || {
        let kept = folder.path().display().to_string();
        format!(
            "{server}, seed {}, {figures:?}, histories in {kept}",
            round.seed
        )
    };
    if !outcome.violations.is_empty() {
        let described = histories();
        let _ = folder.keep();
        panic!("{described}: {:#?}", outcome.violations);
    }
    // Otherwise the history proves nothing.
    assert!(figures.holds > 0, "{}", histories());
    outcome.figures
}

#[test]
fn a_postgres_that_is_killed_and_one_whose_table_of_locks_is_full_break_no_promise() {
    let server = start_lasting_postgres().expect("a server");
    let plan = Plan { full: 1, ..RESTART };
    let figures = nothing_is_wrong_on(&server, "restart_postgres", (plan, false), None);
    assert_eq!((figures.faults["restart"], figures.faults["full"]), (1, 1));
}

#[test]
fn a_mysql_that_is_killed_breaks_no_promise() {
    let server = start_lasting_mysql().expect("a server");
    let figures = nothing_is_wrong_on(&server, "restart_mysql", (RESTART, false), None);
    assert_eq!(figures.faults["restart"], 1);
}

#[test]
fn processes_sessions_and_connections_that_end_break_no_promise() {
    nothing_is_wrong("sessions", SESSIONS, None);
}

#[test]
fn stopped_processes_and_silent_networks_break_no_promise() {
    nothing_is_wrong("leases", LEASES, None);
}

#[test]
fn dropped_futures_and_panics_break_no_promise() {
    nothing_is_wrong("drops", (Plan::default(), false), Some(150));
}

// Found by the program, with a full table of locks.
on_postgres! {
    fn a_statement_that_fails_frees_the_lock_of_its_transaction_before_the_closure_ends(server: &Server) {
        let (mut conn, mut other) = (PgConnection::open(server), PgConnection::open(server));
        let key = unique_key("aborted");
        let mut is_free = || {
            let lock = other.advisory_lock(&key).try_acquire().expect("an answer");
            lock.map(|lock| lock.release().expect("a release")).is_some()
        };
        let done = conn.advisory_lock(&key).transaction(|conn| {
            assert!(!is_free());
            let failed = conn.batch_execute("SELECT 1 / 0");
            assert!(is_free());
            failed
        });
        assert!(done.is_err());
        // A savepoint around the statement keeps it.
        let done = conn.advisory_lock(&key).transaction(|conn| {
            let failed = conn.transaction(|conn| conn.batch_execute("SELECT 1 / 0"));
            assert!(failed.is_err() && !is_free());
            diesel::QueryResult::Ok(())
        });
        assert!(done.is_ok() && is_free());
    }
}
