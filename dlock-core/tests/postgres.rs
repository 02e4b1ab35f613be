//! The machines of PostgreSQL, answer by answer.
#![cfg(feature = "postgres")]

mod postgres_server;
mod script;

use std::time::Duration;

use dlock_core::{
    Abandoned, Answer, Dialect, Fence, LockKey, Machine, Mode, OpenTransaction, Outcome, Piece,
    Postgres, PostgresAcquire, PostgresBegin, PostgresKey, PostgresRelease, Reason, Statement,
    Step, TransactionDialect, Wait,
};
use script::{
    DONE, ERROR, NULL, Script, Witness, binds, broken, clean, error, millis, play, value, walk,
};

const FOREVER: Wait = Wait {
    limit: None,
    poll: None,
};

const TRY: &str = "SELECT pg_try_advisory_lock(?)::int::bigint";
const TRY_IN_TRANSACTION: &str = "SELECT pg_try_advisory_xact_lock(?)::int::bigint";
const UNLOCK: &str = "SELECT pg_advisory_unlock(?)::int::bigint";
const TRY_OR_UNLOCK: &str = "SELECT (CASE WHEN $1 = 0 THEN pg_advisory_unlock($2) \
    WHEN pg_try_advisory_lock($2) \
    THEN set_config('dlock.granted', $1::text, false) IS NOT NULL ELSE false END)::int::bigint /* ?, ? */";
const UNLOCKED: &str = "SELECT current_setting('dlock.unlocked')::bigint";
const HAND_OVER: &str =
    "BEGIN; SELECT pg_advisory_xact_lock('42'::bigint), pg_advisory_unlock('42'::bigint)";

/// Before and after every wait in a transaction.
const BEFORE_WAIT: &str = "PERFORM \
    set_config('dlock.check_interval', current_setting('client_connection_check_interval'), true), \
    set_config('dlock.statement_timeout', current_setting('statement_timeout'), true), \
    set_config('statement_timeout', '0', true)";
const AFTER_WAIT: &str = "PERFORM \
    set_config('client_connection_check_interval', current_setting('dlock.check_interval'), true), \
    set_config('statement_timeout', current_setting('dlock.statement_timeout'), true)";

/// Before every wait.
const WATCH_CLIENT: &str = "BEGIN \
    PERFORM set_config('client_connection_check_interval', '200ms', true); \
    EXCEPTION WHEN OTHERS THEN NULL; END; END $dlock$";

/// Before asking again where a wait ended early.
const PAUSE: Duration = Duration::from_millis(1);

/// Answers that say neither yes nor no to the question whether the lock is held.
const NEITHER: [Answer; 5] = [
    NULL,
    DONE,
    ERROR,
    Answer::Value(Some(2)),
    Answer::Value(Some(-1)),
];

/// How a wait is limited; 0 milliseconds are no limit.
fn limits(millis: u32) -> String {
    match millis {
        0 => "current_setting('lock_timeout', true) <> '0' THEN set_config('lock_timeout', '0', true) END"
            .to_owned(),
        _ => format!("set_config('lock_timeout', '{millis}', true)"),
    }
}

fn limit(limit: Duration) -> Wait {
    Wait {
        limit: Some(limit),
        poll: None,
    }
}

fn poll(limit: Option<Duration>) -> Wait {
    Wait {
        limit,
        poll: Some(millis(50)),
    }
}

fn key(key: impl Into<LockKey>) -> PostgresKey {
    Postgres::key(&key.into()).unwrap()
}

fn acquire(wait: Wait) -> Script<PostgresAcquire> {
    play(Postgres::acquire(&key(42), Mode::Exclusive, wait, None))
}

fn acquire_abandonable(wait: Wait, fence: Option<Fence>) -> Script<PostgresAcquire> {
    play(Postgres::acquire_abandonable(
        &key(42),
        Mode::Exclusive,
        wait,
        fence,
    ))
}

fn begin(wait: Wait) -> Script<PostgresBegin> {
    play(Postgres::begin(&key(42), Mode::Exclusive, wait))
}

/// [`begin`] at another isolation level.
fn isolated(wait: Wait) -> Script<PostgresBegin> {
    begin(wait)
        .begins()
        .answer(ERROR)
        .answer(error("DL001"))
        .batch("ROLLBACK")
        .answer(DONE)
        .tries_marked()
}

fn release() -> Script<PostgresRelease> {
    play(Postgres::release(&key(42), Mode::Exclusive, None))
}

/// A conversation in an open transaction, with the name of its savepoint.
struct Fenced<M> {
    script: Script<M>,
    fence: Fence,
}

fn acquire_in_open_transaction(wait: Wait) -> Fenced<PostgresAcquire> {
    let fence = Fence::new();
    let machine = Postgres::acquire(&key(42), Mode::Exclusive, wait, Some(fence));
    Fenced {
        script: play(machine),
        fence,
    }
}

fn acquire_for_transaction(wait: Wait) -> Fenced<PostgresAcquire> {
    let fence = Fence::new();
    let machine = Postgres::acquire_in_transaction(&key(42), Mode::Exclusive, wait, fence);
    Fenced {
        script: play(machine),
        fence,
    }
}

fn release_in_open_transaction() -> Fenced<PostgresRelease> {
    let fence = Fence::new();
    let machine = Postgres::release(&key(42), Mode::Exclusive, Some(fence));
    Fenced {
        script: play(machine),
        fence,
    }
}

impl<M: Machine> Fenced<M> {
    #[track_caller]
    fn at(self, elapsed: Duration) -> Self {
        Fenced {
            script: self.script.at(elapsed),
            fence: self.fence,
        }
    }

    #[track_caller]
    fn answer(self, answer: Answer) -> Self {
        Fenced {
            script: self.script.answer(answer),
            fence: self.fence,
        }
    }

    #[track_caller]
    fn sleep(self, duration: Duration) -> Self {
        Fenced {
            script: self.script.sleep(duration),
            fence: self.fence,
        }
    }

    #[track_caller]
    fn tries_in_transaction(self) -> Self {
        Fenced {
            script: self.script.query(TRY_IN_TRANSACTION, &[Piece::BigInt(42)]),
            fence: self.fence,
        }
    }

    #[track_caller]
    fn asks_whether_held(self) -> Self {
        Fenced {
            script: self.script.asks_whether_held(),
            fence: self.fence,
        }
    }

    /// 0 milliseconds are no limit.
    #[track_caller]
    fn waits_in_open_transaction(self, millis: u32) -> Self {
        let script = self.script.batch_with(&[
            &format!(
                "SAVEPOINT {}; DO $dlock$ BEGIN {BEFORE_WAIT}; {WATCH_CLIENT}",
                self.fence
            ),
            "; DO $dlock$ BEGIN BEGIN PERFORM ",
            &limits(millis),
            ", pg_advisory_xact_lock('42'::bigint), pg_sleep(0), pg_advisory_lock('42'::bigint);",
            "RAISE EXCEPTION USING ERRCODE = 'DL000'",
            "WHEN SQLSTATE 'DL000' THEN NULL",
            AFTER_WAIT,
            "CONSTRAINT = SQLSTATE; END $dlock$",
        ]);
        Fenced { script, ..self }
    }

    #[track_caller]
    fn waits_for_transaction(self, millis: u32) -> Self {
        let script = self.script.batch_with(&[
            &format!(
                "SAVEPOINT {}; DO $dlock$ BEGIN {BEFORE_WAIT}; {WATCH_CLIENT}",
                self.fence
            ),
            "; DO $dlock$ BEGIN ",
            "before text := current_setting('lock_timeout')",
            &limits(millis),
            ", pg_advisory_xact_lock('42'::bigint), set_config('lock_timeout', before, true);",
            AFTER_WAIT,
            "CONSTRAINT = SQLSTATE",
            &format!("; RELEASE SAVEPOINT {}", self.fence),
        ]);
        Fenced { script, ..self }
    }

    #[track_caller]
    fn undoes(self) -> Self {
        let script = self.script.batch(&undo(self.fence));
        Fenced { script, ..self }
    }

    #[track_caller]
    fn unlocks(self) -> Self {
        let script = self.script.batch(&unlock_fenced(self.fence));
        Fenced { script, ..self }
    }

    #[track_caller]
    fn asks_what_it_unlocked(self) -> Self {
        Fenced {
            script: self.script.query(UNLOCKED, &[]),
            fence: self.fence,
        }
    }

    #[track_caller]
    fn releases_aborted(self) -> Self {
        let script = self.script.batch_with(&[
            &format!(
                "ROLLBACK TO SAVEPOINT {}; DO $dlock$ BEGIN RAISE EXCEPTION",
                self.fence
            ),
            "ERRCODE = 'in_failed_sql_transaction'",
            "CONSTRAINT = CASE WHEN pg_advisory_unlock('42'::bigint) \
             THEN 'dlock_released' ELSE 'dlock_not_held' END",
        ]);
        Fenced { script, ..self }
    }

    #[track_caller]
    fn ends(self, outcome: Outcome) {
        self.script.ends(outcome);
    }
}

fn undo(fence: Fence) -> String {
    format!("ROLLBACK TO SAVEPOINT {fence}; RELEASE SAVEPOINT {fence}")
}

fn unlock_fenced(fence: Fence) -> String {
    format!(
        "RELEASE SAVEPOINT {fence}; SELECT set_config('dlock.unlocked', \
         pg_advisory_unlock('42'::bigint)::int::text, true)"
    )
}

/// What a conversation about the key 42 asks for next, in the terms of these tests.
trait Asks: Sized {
    fn tries(self) -> Self;
    fn tries_marked(self) -> Self;
    fn asks_whether_held(self) -> Self;
    fn reclaims(self) -> Self;
    /// Waits in the server's queue, outside a transaction; 0 milliseconds are no limit.
    fn waits(self, millis: u32) -> Self;
    fn begins(self) -> Self;
    fn begins_waiting(self, millis: u32) -> Self;
    /// The query's text starts with the first part and has the others in this order.
    fn query_with(self, parts: &[&str], binds: &[Piece]) -> Self;
    /// The batch's text, likewise.
    fn batch_with(self, parts: &[&str]) -> Self;
}

impl<M: Machine> Asks for Script<M> {
    #[track_caller]
    fn tries(self) -> Self {
        self.query(TRY, &[Piece::BigInt(42)])
    }

    #[track_caller]
    fn tries_marked(self) -> Self {
        let mark = Piece::BigInt(self.mark());
        self.query(TRY_OR_UNLOCK, &[mark, Piece::BigInt(42)])
    }

    #[track_caller]
    fn asks_whether_held(self) -> Self {
        self.query_with(
            &[
                "SELECT (EXISTS(SELECT FROM pg_locks l WHERE l.locktype = 'advisory'",
                "l.classid::bigint = ?",
                "l.objid::bigint = ?",
                "l.objsubid = ?",
                "l.pid = pg_backend_pid() AND l.granted AND l.mode = 'ExclusiveLock'))::int::bigint",
            ],
            &[Piece::BigInt(0), Piece::BigInt(42), Piece::Integer(1)],
        )
    }

    #[track_caller]
    fn reclaims(self) -> Self {
        self.query_with(
            &[
                "SELECT CASE WHEN EXISTS(SELECT FROM pg_locks l WHERE l.locktype = 'advisory'",
                "l.classid::bigint = ?",
                "l.objid::bigint = ?",
                "l.objsubid = ?",
                "l.pid = pg_backend_pid() AND l.granted AND l.mode = 'ExclusiveLock')",
                "THEN pg_advisory_unlock('42'::bigint)::int::bigint END",
            ],
            &[Piece::BigInt(0), Piece::BigInt(42), Piece::Integer(1)],
        )
    }

    #[track_caller]
    fn waits(self, millis: u32) -> Self {
        self.batch_with(&[
            "DO $dlock$ BEGIN PERFORM CASE WHEN now() <> statement_timestamp() ",
            "set_config('statement_timeout', '0', true)",
            "set_config('transaction_timeout', '0', true)",
            WATCH_CLIENT,
            "; DO $dlock$ BEGIN PERFORM ",
            &limits(millis),
            ", pg_advisory_xact_lock('42'::bigint), pg_sleep(0), pg_advisory_lock('42'::bigint);",
            "EXCEPTION WHEN query_canceled OR OTHERS THEN",
            "CONSTRAINT = SQLSTATE",
        ])
    }

    #[track_caller]
    fn begins(self) -> Self {
        self.batch_with(&[
            "BEGIN; ",
            "SELECT (CASE WHEN CURRENT_TIMESTAMP = statement_timestamp() ",
            "1 / (current_setting('transaction_isolation') = 'read committed' ",
            "AND pg_try_advisory_xact_lock('42'::bigint))::int ELSE -1 END)",
            "::information_schema.cardinal_number",
        ])
    }

    #[track_caller]
    fn begins_waiting(self, millis: u32) -> Self {
        self.batch_with(&[
            "ROLLBACK; BEGIN; DO $dlock$ BEGIN ",
            "set_config('transaction_timeout', '0', true)",
            BEFORE_WAIT,
            WATCH_CLIENT,
            "; DO $dlock$ BEGIN ",
            "current_setting('transaction_isolation') <> 'read committed'",
            "ERRCODE = 'DL001'",
            "before text := current_setting('lock_timeout')",
            &limits(millis),
            ", pg_advisory_xact_lock('42'::bigint), set_config('lock_timeout', before, true);",
            AFTER_WAIT,
            "CONSTRAINT = SQLSTATE",
        ])
    }

    #[track_caller]
    fn query_with(self, parts: &[&str], binds: &[Piece]) -> Self {
        assert_in_order(&self.statement().text(), parts);
        self.binds(binds)
    }

    #[track_caller]
    fn batch_with(self, parts: &[&str]) -> Self {
        match self.step() {
            Step::Batch(text) => assert_in_order(text, parts),
            other => panic!("not a batch: {other:?}"),
        }
        self
    }
}

impl<M: Machine> Script<M> {
    /// What the query leaves in the session if it is granted, or releases something.
    #[track_caller]
    fn mark(&self) -> i64 {
        match self.statement().pieces.as_slice() {
            [Piece::Sql(_), Piece::BigInt(mark), ..] => *mark,
            other => panic!("no mark: {other:?}"),
        }
    }
}

#[track_caller]
fn assert_in_order(text: &str, parts: &[&str]) {
    assert!(
        text.starts_with(parts[0]),
        "{text:?} does not start with {:?}",
        parts[0]
    );
    let mut rest = text;
    for part in parts {
        let Some(at) = rest.find(part) else {
            panic!("{part:?} is missing, or not in its place, in {text:?}");
        };
        rest = &rest[at + part.len()..];
    }
}

/// Errors of a wait that leave it open whether the lock was granted, and their reasons.
fn unclear_errors() -> [(Answer, Reason); 8] {
    [
        (error("53200"), Reason::TooManyLocks),
        (error("57014"), Reason::Interrupted),
        (ERROR, Reason::Database),
        (error("XX000"), Reason::Database),
        (error("25P02"), Reason::Database),
        (error(""), Reason::Database),
        (error("55p03"), Reason::Database),
        (error("dlock_released"), Reason::Database),
    ]
}

/// Errors of a wait that say that nothing was granted, and their reasons.
fn known_errors() -> [(Answer, Reason); 3] {
    [
        (error("40P01"), Reason::Deadlock),
        (error("42883"), Reason::Unsupported),
        (error("0A000"), Reason::Unsupported),
    ]
}

mod acquiring_outside_a_transaction {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_query() {
        for wait in [FOREVER, Wait::TRY, limit(millis(250)), poll(None)] {
            acquire(wait)
                .tries()
                .answer(value(1))
                .ends(Outcome::Success);
        }
    }

    #[test]
    fn a_grant_counts_however_late_it_comes() {
        acquire(limit(millis(250)))
            .at(Duration::MAX)
            .answer(value(1))
            .ends(Outcome::Success);
    }

    #[test]
    fn a_taken_lock_is_waited_for_without_a_limit() {
        acquire(FOREVER)
            .tries()
            .answer(value(0))
            .waits(0)
            .answer(DONE)
            .ends(Outcome::Success);
    }

    #[test]
    fn a_try_gives_up_at_once() {
        acquire(Wait::TRY)
            .tries()
            .answer(value(0))
            .ends(Outcome::TimedOut);
    }

    #[test]
    fn the_wait_is_for_what_is_left_of_the_limit_rounded_up() {
        let cases = [
            (Duration::ZERO, 250),
            (millis(100), 150),
            (Duration::from_micros(100_001), 150),
            (Duration::from_micros(249_001), 1),
            (Duration::from_nanos(249_999_999), 1),
        ];
        for (elapsed, left) in cases {
            acquire(limit(millis(250)))
                .at(elapsed)
                .answer(value(0))
                .waits(left)
                .answer(DONE)
                .ends(Outcome::Success);
        }
    }

    #[test]
    fn at_the_limit_and_past_it_the_wait_is_over() {
        for elapsed in [millis(250), millis(251), Duration::MAX] {
            acquire(limit(millis(250)))
                .at(elapsed)
                .answer(value(0))
                .ends(Outcome::TimedOut);
            acquire(limit(millis(250)))
                .answer(value(0))
                .waits(250)
                .at(elapsed)
                .answer(error("55P03"))
                .ends(Outcome::TimedOut);
        }
    }

    #[test]
    fn a_wait_that_ends_before_the_limit_goes_on() {
        acquire(limit(millis(250)))
            .answer(value(0))
            .waits(250)
            .at(Duration::from_micros(249_900))
            .answer(error("55P03"))
            .sleep(PAUSE)
            .answer(DONE)
            .tries()
            .answer(value(0))
            .waits(1)
            .answer(DONE)
            .ends(Outcome::Success);
    }

    /// By a server that does not wait: each round sleeps.
    #[test]
    fn a_wait_that_always_ends_at_once_never_spins() {
        for wait in [FOREVER, limit(millis(250)), limit(Duration::MAX)] {
            let mut waiting = acquire(wait);
            for _ in 0..100 {
                waiting = waiting
                    .tries()
                    .answer(value(0))
                    .answer(error("55P03"))
                    .sleep(PAUSE)
                    .answer(DONE);
            }
        }
    }

    #[test]
    fn a_wait_longer_than_the_server_knows_is_cut_into_slices() {
        let longest = Duration::from_millis(i32::MAX as u64);
        let second_slice = |wait| {
            acquire(wait)
                .answer(value(0))
                .waits(i32::MAX as u32)
                .at(longest)
                .answer(error("55P03"))
                .sleep(PAUSE)
                .answer(DONE)
                .tries()
                .answer(value(0))
        };
        second_slice(limit(longest + millis(500)))
            .waits(500)
            .at(longest + millis(500))
            .answer(error("55P03"))
            .ends(Outcome::TimedOut);
        second_slice(limit(Duration::MAX))
            .waits(i32::MAX as u32)
            .at(Duration::MAX)
            .answer(error("55P03"))
            .ends(Outcome::TimedOut);
    }

    #[test]
    fn polling_sleeps_and_never_waits_in_the_queue() {
        let mut polling = acquire(poll(None));
        for round in 1..=5 {
            polling = polling
                .tries()
                .at(millis(60 * round))
                .answer(value(0))
                .sleep(millis(50))
                .answer(DONE);
        }
        polling.tries().answer(value(1)).ends(Outcome::Success);
    }

    #[test]
    fn polling_with_a_limit_asks_a_last_time_when_it_is_reached() {
        let polling = || {
            acquire(poll(Some(millis(80))))
                .answer(value(0))
                .sleep(millis(50))
                .at(millis(50))
                .answer(DONE)
                .tries()
                .at(millis(51))
                .answer(value(0))
                .sleep(millis(29))
                .at(millis(80))
                .answer(DONE)
                .tries()
        };
        polling().answer(value(0)).ends(Outcome::TimedOut);
        polling().answer(value(1)).ends(Outcome::Success);
    }

    #[test]
    fn polling_without_an_interval_sleeps_all_the_same() {
        let wait = Wait {
            limit: None,
            poll: Some(Duration::ZERO),
        };
        acquire(wait).answer(value(0)).sleep(millis(1));
    }

    #[test]
    fn an_error_that_says_that_nothing_was_granted_ends_it() {
        for (answer, reason) in known_errors() {
            for wait in [FOREVER, limit(millis(250))] {
                acquire(wait)
                    .answer(value(0))
                    .answer(answer.clone())
                    .ends(clean(reason));
            }
        }
    }

    #[test]
    fn an_interrupted_wait_gives_back_what_it_may_have_left() {
        for (answer, reason) in unclear_errors() {
            let reclaiming = || {
                acquire(FOREVER)
                    .answer(value(0))
                    .waits(0)
                    .answer(answer.clone())
                    .reclaims()
            };
            reclaiming().answer(NULL).ends(clean(reason));
            reclaiming().answer(value(1)).ends(clean(reason));
            for unknown in [DONE, ERROR, error("57014"), value(0), value(2)] {
                reclaiming().answer(unknown).ends(broken(reason));
            }
        }
    }

    #[test]
    fn a_wait_interrupted_in_a_later_slice_gives_back_too() {
        acquire(limit(millis(250)))
            .answer(value(0))
            .at(millis(100))
            .answer(error("55P03"))
            .sleep(PAUSE)
            .answer(DONE)
            .answer(value(0))
            .waits(150)
            .answer(error("57014"))
            .reclaims();
    }

    #[test]
    fn a_wait_answered_with_a_value_is_taken_back() {
        for answer in [NULL, value(0), value(1)] {
            acquire(FOREVER).answer(value(0)).answer(answer).reclaims();
        }
    }

    #[test]
    fn after_a_try_that_failed_the_session_is_asked_what_it_holds() {
        for answer in [NULL, DONE, ERROR, error("57014"), value(2), value(-1)] {
            let checking = || acquire(FOREVER).answer(answer.clone()).asks_whether_held();
            // By this try, or by an outer guard, whose hold must not be given back.
            checking().answer(value(1)).ends(broken(Reason::Database));
            for unknown in NEITHER {
                checking().answer(unknown).ends(broken(Reason::Database));
            }
            // Asked once more in the form that tells the SQLSTATE.
            let again = || checking().answer(value(0)).waits(0);
            again().answer(DONE).ends(Outcome::Success);
            again()
                .answer(error("42883"))
                .ends(clean(Reason::Unsupported));
            again()
                .answer(error("57014"))
                .reclaims()
                .answer(value(1))
                .ends(clean(Reason::Interrupted));
        }
    }

    #[test]
    fn after_a_try_that_failed_it_waits_as_it_was_asked_to() {
        let failed = |wait, left| {
            acquire(wait)
                .answer(ERROR)
                .at(millis(100))
                .answer(value(0))
                .waits(left)
        };
        let cases = [
            (FOREVER, 0),
            (limit(millis(250)), 150),
            (limit(Duration::from_micros(100_001)), 1),
            (limit(Duration::MAX), i32::MAX as u32),
            // The shortest wait there is, since 0 would be no limit.
            (Wait::TRY, 1),
            (limit(millis(100)), 1),
            (poll(None), 1),
            (poll(Some(millis(250))), 1),
        ];
        for (wait, left) in cases {
            failed(wait, left).answer(DONE).ends(Outcome::Success);
        }
        let taken = |wait, left| failed(wait, left).at(millis(102)).answer(error("55P03"));
        taken(Wait::TRY, 1).ends(Outcome::TimedOut);
        taken(limit(millis(100)), 1).ends(Outcome::TimedOut);
        // A server that does not wait.
        taken(FOREVER, 0).sleep(PAUSE).answer(DONE).tries();
        taken(limit(millis(250)), 150)
            .sleep(PAUSE)
            .answer(DONE)
            .tries();
        taken(poll(None), 1).sleep(millis(50)).answer(DONE).tries();
    }

    #[test]
    fn a_try_that_fails_while_polling_is_asked_about_too() {
        acquire(poll(None))
            .answer(value(0))
            .answer(DONE)
            .answer(ERROR)
            .asks_whether_held()
            .answer(value(1))
            .ends(broken(Reason::Database));
    }

    #[test]
    fn without_a_connection_it_ends_broken() {
        acquire(FOREVER)
            .answer(ERROR)
            .answer(ERROR)
            .ends(broken(Reason::Database));
        acquire(FOREVER)
            .answer(value(0))
            .answer(ERROR)
            .answer(ERROR)
            .ends(broken(Reason::Database));
        acquire(FOREVER)
            .answer(ERROR)
            .answer(value(0))
            .answer(ERROR)
            .answer(ERROR)
            .ends(broken(Reason::Database));
        acquire(poll(None))
            .answer(value(0))
            .answer(DONE)
            .answer(ERROR)
            .answer(ERROR)
            .ends(broken(Reason::Database));
    }
}

mod acquiring_in_an_open_transaction {
    use super::*;

    #[test]
    fn the_try_and_the_wait_are_one_message_behind_a_savepoint() {
        let cases = [
            (FOREVER, 0),
            (limit(millis(250)), 250),
            (limit(Duration::from_nanos(1)), 1),
            (limit(Duration::MAX), i32::MAX as u32),
            // The shortest wait there is, since 0 would be no limit.
            (Wait::TRY, 1),
            (poll(None), 1),
            (poll(Some(millis(250))), 1),
            (poll(Some(Duration::ZERO)), 1),
        ];
        for (wait, millis) in cases {
            acquire_in_open_transaction(wait)
                .waits_in_open_transaction(millis)
                .answer(DONE)
                .ends(Outcome::Success);
        }
    }

    #[test]
    fn the_savepoint_stays_for_the_release() {
        let acquiring = acquire_in_open_transaction(FOREVER);
        let Step::Batch(text) = acquiring.script.step() else {
            panic!()
        };
        assert!(!text.contains("RELEASE SAVEPOINT"), "{text}");
    }

    #[test]
    fn each_request_has_a_savepoint_of_its_own() {
        let one = acquire_in_open_transaction(FOREVER);
        let other = acquire_in_open_transaction(FOREVER);
        assert_ne!(one.fence.to_string(), other.fence.to_string());
        for request in [one, other] {
            request.waits_in_open_transaction(0).answer(ERROR).undoes();
        }
    }

    /// It went with the undo, so the name is free again.
    #[test]
    fn asking_again_reuses_the_savepoint() {
        acquire_in_open_transaction(FOREVER)
            .waits_in_open_transaction(0)
            .answer(error("55P03"))
            .undoes()
            .answer(DONE)
            .sleep(PAUSE)
            .answer(DONE)
            .waits_in_open_transaction(0);
    }

    #[test]
    fn every_error_is_undone_first() {
        let errors = known_errors().into_iter().chain(unclear_errors());
        for (answer, _) in errors.chain([(error("55P03"), Reason::Database)]) {
            acquire_in_open_transaction(FOREVER).answer(answer).undoes();
        }
    }

    #[test]
    fn a_lock_that_stays_taken_is_a_timeout_after_the_undo() {
        acquire_in_open_transaction(Wait::TRY)
            .answer(error("55P03"))
            .undoes()
            .answer(DONE)
            .ends(Outcome::TimedOut);
        for elapsed in [millis(250), millis(251), Duration::MAX] {
            acquire_in_open_transaction(limit(millis(250)))
                .answer(error("55P03"))
                .undoes()
                .at(elapsed)
                .answer(DONE)
                .ends(Outcome::TimedOut);
        }
    }

    #[test]
    fn a_wait_that_ends_before_the_limit_goes_on() {
        acquire_in_open_transaction(limit(millis(250)))
            .answer(error("55P03"))
            .undoes()
            .at(millis(249))
            .answer(DONE)
            .sleep(PAUSE)
            .answer(DONE)
            .waits_in_open_transaction(1)
            .answer(DONE)
            .ends(Outcome::Success);
    }

    #[test]
    fn polling_sleeps_between_the_shortest_waits() {
        let again = acquire_in_open_transaction(poll(Some(millis(60))))
            .waits_in_open_transaction(1)
            .answer(error("55P03"))
            .undoes()
            .at(millis(20))
            .answer(DONE)
            .sleep(millis(40))
            .at(millis(60))
            .answer(DONE)
            .waits_in_open_transaction(1)
            .answer(error("55P03"))
            .undoes();
        again.answer(DONE).ends(Outcome::TimedOut);
    }

    #[test]
    fn an_error_that_says_that_nothing_was_granted_ends_it_whether_it_can_be_undone_or_not() {
        for (answer, reason) in known_errors() {
            for undone in [DONE, ERROR] {
                acquire_in_open_transaction(FOREVER)
                    .answer(answer.clone())
                    .undoes()
                    .answer(undone)
                    .ends(clean(reason));
            }
        }
    }

    #[test]
    fn an_interrupted_wait_never_gives_back_what_an_outer_guard_may_hold() {
        for (answer, reason) in unclear_errors() {
            let asking = || {
                acquire_in_open_transaction(FOREVER)
                    .answer(answer.clone())
                    .undoes()
                    .answer(DONE)
                    .asks_whether_held()
            };
            asking().answer(value(0)).ends(clean(reason));
            asking().answer(value(1)).ends(broken(reason));
            for unknown in NEITHER {
                asking().answer(unknown).ends(broken(reason));
            }
        }
    }

    #[test]
    fn a_timeout_that_cannot_be_undone_breaks_the_session() {
        for answer in [NULL, ERROR, error("57014"), value(1)] {
            acquire_in_open_transaction(limit(millis(250)))
                .answer(error("55P03"))
                .undoes()
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }

    /// Nor does a cancel behind the grant, with another one in the undo, make it look like that.
    #[test]
    fn an_aborted_transaction_without_a_savepoint_of_ours_is_told_by_two_undos_that_fail() {
        let undoing_again = || {
            acquire_in_open_transaction(FOREVER)
                .answer(ERROR)
                .undoes()
                .answer(ERROR)
                .undoes()
        };
        undoing_again().answer(ERROR).ends(clean(Reason::Database));
        let asking = || undoing_again().answer(DONE).asks_whether_held();
        asking().answer(value(0)).ends(clean(Reason::Database));
        asking().answer(value(1)).ends(broken(Reason::Database));
        for unknown in NEITHER {
            asking().answer(unknown).ends(broken(Reason::Database));
        }
    }

    /// Whether the savepoint was there nobody knows.
    #[test]
    fn an_undo_with_a_strange_answer_breaks_the_session() {
        for answer in [NULL, value(0), value(1)] {
            for failed in [0, 1] {
                let mut undoing = acquire_in_open_transaction(FOREVER).answer(ERROR).undoes();
                for _ in 0..failed {
                    undoing = undoing.answer(ERROR).undoes();
                }
                undoing
                    .answer(answer.clone())
                    .ends(broken(Reason::Database));
            }
        }
    }

    /// The error came from inside the block, so the savepoint was there and the lock may have been granted; a second
    /// cancel has hit the undo.
    #[test]
    fn an_interrupted_wait_whose_undo_fails_breaks_the_session() {
        for (answer, reason) in unclear_errors() {
            if answer == ERROR {
                continue;
            }
            for failed in [ERROR, error("57014"), NULL, value(1)] {
                acquire_in_open_transaction(FOREVER)
                    .answer(answer.clone())
                    .undoes()
                    .answer(failed)
                    .ends(broken(reason));
            }
        }
    }

    #[test]
    fn a_wait_answered_with_a_value_is_asked_about() {
        for answer in [NULL, value(0), value(1)] {
            acquire_in_open_transaction(FOREVER)
                .answer(answer.clone())
                .undoes()
                .answer(DONE)
                .asks_whether_held()
                .answer(value(1))
                .ends(broken(Reason::Database));
            for undone in [ERROR, NULL] {
                acquire_in_open_transaction(FOREVER)
                    .answer(answer.clone())
                    .undoes()
                    .answer(undone)
                    .ends(broken(Reason::Database));
            }
        }
    }
}

mod acquiring_for_the_transaction {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_query() {
        for wait in [FOREVER, Wait::TRY, limit(millis(250)), poll(None)] {
            acquire_for_transaction(wait)
                .tries_in_transaction()
                .answer(value(1))
                .ends(Outcome::Success);
        }
    }

    #[test]
    fn a_taken_lock_is_waited_for_behind_a_savepoint() {
        for (wait, left) in [
            (FOREVER, 0),
            (limit(millis(250)), 240),
            (limit(Duration::MAX), i32::MAX as u32),
        ] {
            acquire_for_transaction(wait)
                .at(millis(10))
                .answer(value(0))
                .waits_for_transaction(left)
                .answer(DONE)
                .ends(Outcome::Success);
        }
    }

    #[test]
    fn the_limit_counts() {
        acquire_for_transaction(Wait::TRY)
            .answer(value(0))
            .ends(Outcome::TimedOut);
        acquire_for_transaction(limit(millis(250)))
            .at(millis(250))
            .answer(value(0))
            .ends(Outcome::TimedOut);
        acquire_for_transaction(limit(millis(250)))
            .answer(value(0))
            .waits_for_transaction(250)
            .at(millis(249))
            .answer(error("55P03"))
            .undoes()
            .answer(DONE)
            .sleep(PAUSE)
            .answer(DONE)
            .tries_in_transaction()
            .answer(value(0))
            .waits_for_transaction(1)
            .at(millis(250))
            .answer(error("55P03"))
            .undoes()
            .answer(DONE)
            .ends(Outcome::TimedOut);
    }

    #[test]
    fn polling_never_waits_in_the_queue() {
        acquire_for_transaction(poll(Some(millis(60))))
            .answer(value(0))
            .sleep(millis(50))
            .at(millis(50))
            .answer(DONE)
            .tries_in_transaction()
            .answer(value(0))
            .sleep(millis(10))
            .at(millis(60))
            .answer(DONE)
            .tries_in_transaction()
            .answer(value(0))
            .ends(Outcome::TimedOut);
    }

    /// And the aborted transaction is sent nothing more: it would say nothing but that it is aborted.
    #[test]
    fn a_try_that_fails_ends_it() {
        for answer in [ERROR, error("57014")] {
            acquire_for_transaction(FOREVER)
                .answer(answer)
                .ends(clean(Reason::Database));
        }
    }

    #[test]
    fn a_try_with_a_strange_answer_breaks_the_session() {
        for answer in [NULL, DONE, value(2), value(-1)] {
            acquire_for_transaction(FOREVER)
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }

    #[test]
    fn a_failed_wait_is_undone_and_leaves_nothing() {
        for (answer, reason) in known_errors().into_iter().chain(unclear_errors()) {
            for undone in [DONE, ERROR] {
                let mut undoing = acquire_for_transaction(FOREVER)
                    .answer(value(0))
                    .answer(answer.clone())
                    .undoes();
                if (&answer, &undone) == (&ERROR, &ERROR) {
                    undoing = undoing.answer(ERROR).undoes();
                }
                undoing.answer(undone).ends(clean(reason));
            }
        }
    }

    /// Nor is it told as a timeout, after which the transaction could go on.
    #[test]
    fn a_timeout_that_cannot_be_undone_is_a_failure_of_the_transaction() {
        acquire_for_transaction(limit(millis(250)))
            .answer(value(0))
            .at(millis(250))
            .answer(error("55P03"))
            .undoes()
            .answer(ERROR)
            .ends(clean(Reason::Database));
    }

    #[test]
    fn a_wait_answered_with_a_value_is_a_failure() {
        acquire_for_transaction(FOREVER)
            .answer(value(0))
            .answer(value(1))
            .undoes()
            .answer(DONE)
            .ends(clean(Reason::Database));
    }
}

mod beginning {
    use super::*;

    #[test]
    fn a_free_lock_at_read_committed_takes_one_message() {
        for wait in [FOREVER, Wait::TRY, limit(millis(250)), poll(None)] {
            begin(wait).begins().answer(DONE).ends(Outcome::Success);
        }
    }

    /// It is somebody's, and not rolled back.
    #[test]
    fn a_transaction_that_was_open_is_left_to_whoever_began_it() {
        begin(FOREVER)
            .begins()
            .answer(error("cardinal_number_domain_check"))
            .ends(clean(Reason::InTransaction));
    }

    #[test]
    fn anything_else_is_asked_again_in_the_form_that_waits_and_tells() {
        let cases = [
            (FOREVER, 0),
            (limit(millis(250)), 240),
            (limit(millis(10)), 1),
            (limit(Duration::MAX), i32::MAX as u32),
            (Wait::TRY, 1),
            (poll(None), 1),
        ];
        for (wait, left) in cases {
            for answer in [ERROR, error("57014"), error("DL001"), NULL, value(1)] {
                begin(wait)
                    .begins()
                    .at(millis(10))
                    .answer(answer)
                    .begins_waiting(left)
                    .answer(DONE)
                    .ends(Outcome::Success);
            }
        }
    }

    #[test]
    fn a_failed_wait_is_rolled_back_before_anything_else() {
        let errors = known_errors().into_iter().chain(unclear_errors());
        for (answer, reason) in
            errors.chain([(NULL, Reason::Database), (value(1), Reason::Database)])
        {
            begin(FOREVER)
                .answer(ERROR)
                .begins_waiting(0)
                .answer(answer)
                .batch("ROLLBACK")
                .answer(DONE)
                .ends(clean(reason));
        }
    }

    #[test]
    fn a_transaction_that_cannot_be_rolled_back_breaks_the_session() {
        for failed in ["55P03", "40P01", "57014", "DL001"] {
            for answer in [NULL, ERROR, error("57014"), value(1)] {
                begin(FOREVER)
                    .answer(ERROR)
                    .answer(error(failed))
                    .batch("ROLLBACK")
                    .answer(answer)
                    .ends(broken(Reason::Database));
            }
        }
    }

    #[test]
    fn a_lock_that_stays_taken_is_a_timeout_after_the_rollback() {
        begin(Wait::TRY)
            .answer(ERROR)
            .begins_waiting(1)
            .answer(error("55P03"))
            .batch("ROLLBACK")
            .answer(DONE)
            .ends(Outcome::TimedOut);
        for elapsed in [millis(250), millis(251), Duration::MAX] {
            begin(limit(millis(250)))
                .answer(ERROR)
                .answer(error("55P03"))
                .batch("ROLLBACK")
                .at(elapsed)
                .answer(DONE)
                .ends(Outcome::TimedOut);
        }
    }

    #[test]
    fn a_wait_that_ends_before_the_limit_goes_on() {
        begin(limit(millis(250)))
            .answer(ERROR)
            .begins_waiting(250)
            .at(millis(249))
            .answer(error("55P03"))
            .answer(DONE)
            .sleep(PAUSE)
            .answer(DONE)
            .begins()
            .answer(ERROR)
            .begins_waiting(1)
            .answer(DONE)
            .ends(Outcome::Success);
    }

    #[test]
    fn polling_sleeps_outside_any_transaction() {
        begin(poll(Some(millis(60))))
            .begins()
            .answer(ERROR)
            .begins_waiting(1)
            .at(millis(20))
            .answer(error("55P03"))
            .batch("ROLLBACK")
            .answer(DONE)
            .sleep(millis(40))
            .at(millis(60))
            .answer(DONE)
            .begins()
            .answer(ERROR)
            .begins_waiting(1)
            .answer(error("55P03"))
            .batch("ROLLBACK")
            .answer(DONE)
            .ends(Outcome::TimedOut);
    }

    #[test]
    fn at_other_isolation_levels_the_sessions_lock_is_handed_over() {
        isolated(FOREVER)
            .answer(value(1))
            .batch(HAND_OVER)
            .answer(DONE)
            .ends(Outcome::Success);
        isolated(FOREVER)
            .answer(value(0))
            .waits(0)
            .answer(DONE)
            .batch(HAND_OVER)
            .answer(DONE)
            .ends(Outcome::Success);
    }

    #[test]
    fn at_other_isolation_levels_the_limit_counts_from_the_start() {
        isolated(limit(millis(250)))
            .at(millis(100))
            .answer(value(0))
            .waits(150)
            .at(millis(250))
            .answer(error("55P03"))
            .ends(Outcome::TimedOut);
        isolated(Wait::TRY).answer(value(0)).ends(Outcome::TimedOut);
        isolated(poll(None))
            .answer(value(0))
            .sleep(millis(50))
            .answer(DONE)
            .tries_marked();
    }

    #[test]
    fn at_other_isolation_levels_a_stray_hold_is_given_back() {
        let reclaiming = || {
            isolated(FOREVER)
                .answer(value(0))
                .answer(error("57014"))
                .reclaims()
        };
        reclaiming()
            .answer(value(1))
            .ends(clean(Reason::Interrupted));
        reclaiming().answer(ERROR).ends(broken(Reason::Interrupted));
        isolated(FOREVER)
            .answer(ERROR)
            .asks_whether_held()
            .answer(value(1))
            .ends(broken(Reason::Database));
    }

    #[test]
    fn a_hand_over_that_fails_breaks_the_session() {
        for answer in [NULL, ERROR, error("40P01"), error("53200"), value(1)] {
            isolated(FOREVER)
                .answer(value(1))
                .batch(HAND_OVER)
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }

    #[test]
    fn without_a_connection_it_ends_broken() {
        begin(FOREVER)
            .answer(ERROR)
            .answer(ERROR)
            .answer(ERROR)
            .ends(broken(Reason::Database));
        isolated(FOREVER)
            .answer(ERROR)
            .answer(ERROR)
            .ends(broken(Reason::Database));
    }
}

mod releasing {
    use super::*;

    #[test]
    fn a_lock_that_is_held_takes_one_query_and_a_fenced_one_two_messages() {
        release()
            .query(UNLOCK, &[Piece::BigInt(42)])
            .answer(value(1))
            .ends(Outcome::Success);
        release_in_open_transaction()
            .unlocks()
            .answer(DONE)
            .asks_what_it_unlocked()
            .answer(value(1))
            .ends(Outcome::Success);
    }

    #[test]
    fn a_lock_that_was_lost_is_told() {
        release().answer(value(0)).ends(clean(Reason::NotHeld));
        release_in_open_transaction()
            .answer(DONE)
            .asks_what_it_unlocked()
            .answer(value(0))
            .ends(clean(Reason::NotHeld));
    }

    #[test]
    fn an_unfenced_unlock_that_fails_breaks_the_session() {
        for answer in NEITHER.into_iter().chain([error("dlock_released")]) {
            release().answer(answer).ends(broken(Reason::Database));
        }
    }

    /// Of an aborted transaction the server tells without a CONSTRAINT.
    #[test]
    fn a_fenced_unlock_that_fails_in_other_words_breaks_the_session() {
        for answer in [
            error("57014"),
            error("25P02"),
            error(""),
            error("dlock_released"),
            error("dlock_not_held"),
        ] {
            release_in_open_transaction()
                .unlocks()
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }

    /// The savepoint is gone by then, so that an error behind the unlock is not taken for an aborted transaction.
    #[test]
    fn a_fenced_unlock_that_fails_behind_its_savepoint_is_not_repeated() {
        release_in_open_transaction()
            .unlocks()
            .answer(ERROR)
            .releases_aborted()
            .answer(ERROR)
            .ends(broken(Reason::Database));
    }

    #[test]
    fn a_fenced_unlock_with_a_strange_answer_breaks_the_session() {
        for answer in [NULL, value(0), value(1), value(2), value(-1)] {
            release_in_open_transaction()
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }

    #[test]
    fn a_fenced_unlock_of_which_nobody_tells_what_it_did_breaks_the_session() {
        for answer in NEITHER.into_iter().chain([error("57014")]) {
            release_in_open_transaction()
                .answer(DONE)
                .asks_what_it_unlocked()
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }

    #[test]
    fn an_aborted_transaction_is_aborted_again_after_the_unlock() {
        let aborted = || {
            release_in_open_transaction()
                .unlocks()
                .answer(ERROR)
                .releases_aborted()
        };
        aborted()
            .answer(error("dlock_released"))
            .ends(Outcome::Success);
        aborted()
            .answer(error("dlock_not_held"))
            .ends(clean(Reason::NotHeld));
    }

    #[test]
    fn an_aborted_transaction_that_says_anything_else_breaks_the_session() {
        for answer in [
            NULL,
            DONE,
            ERROR,
            value(1),
            error(""),
            error("57014"),
            error("DLOCK_RELEASED"),
        ] {
            release_in_open_transaction()
                .answer(ERROR)
                .releases_aborted()
                .answer(answer)
                .ends(broken(Reason::Database));
        }
    }
}

/// Nobody waits for the answer any more.
mod abandoning {
    use super::*;

    fn nothing() -> Abandoned {
        Abandoned::default()
    }

    fn broken() -> Abandoned {
        Abandoned {
            broken: true,
            ..nothing()
        }
    }

    fn sends(messages: &[&str]) -> Abandoned {
        let messages = messages.iter().map(|&message| message.to_owned().into());
        Abandoned {
            messages: messages.collect(),
            ..nothing()
        }
    }

    /// In vain, perhaps.
    fn sends_and_breaks(messages: &[&str]) -> Abandoned {
        Abandoned {
            broken: true,
            ..sends(messages)
        }
    }

    /// In the server's queue.
    fn waiting(messages: &[&str]) -> Abandoned {
        Abandoned {
            waiting: true,
            ..sends_and_breaks(messages)
        }
    }

    fn if_granted(mark: i64) -> String {
        format!(
            "SELECT CASE WHEN current_setting('dlock.granted', true) = '{mark}' \
             THEN pg_advisory_unlock('42'::bigint) END"
        )
    }

    /// What is sent outside a transaction, where nobody would know that it was cut short.
    const NO_TIMEOUT: &str = "SELECT set_config('statement_timeout', '0', true); ";

    fn reclaim() -> String {
        format!("{NO_TIMEOUT}{RECLAIM}")
    }

    /// As the machines ask when somebody reads the answer, with the numbers in the text.
    const RECLAIM: &str = "SELECT CASE WHEN EXISTS(SELECT FROM pg_locks l WHERE l.locktype = 'advisory' \
        AND l.classid::bigint = '0'::bigint AND l.objid::bigint = '42'::bigint \
        AND l.objsubid = '1'::int AND l.pid = pg_backend_pid() AND l.granted \
        AND l.mode = 'ExclusiveLock') THEN pg_advisory_unlock('42'::bigint)::int::bigint END";

    /// The same message again, for a cancel may hit the first one.
    fn twice(message: &str) -> [&str; 2] {
        [message, message]
    }

    #[test]
    fn answers_that_nobody_reads_are_skipped() {
        const { assert!(Postgres::SKIPS_UNREAD_ANSWERS) };
    }

    #[test]
    fn a_request_has_a_mark_of_its_own() {
        let marks: std::collections::HashSet<_> = (0..100)
            .map(|_| acquire_abandonable(FOREVER, None).mark())
            .collect();
        assert_eq!(marks.len(), 100);
    }

    /// A failing statement takes its settings back, and so its mark, but not what it did to a session's lock.
    #[test]
    fn a_try_is_given_back_if_it_was_granted_and_breaks_the_session() {
        let trying = acquire_abandonable(FOREVER, None).tries_marked();
        assert_eq!(
            trying.abandoned(),
            sends_and_breaks(&[&format!("{NO_TIMEOUT}{}", if_granted(trying.mark()))])
        );
        // A later one, too.
        let trying = acquire_abandonable(poll(None), None)
            .answer(value(0))
            .answer(DONE)
            .tries_marked();
        assert_eq!(
            trying.abandoned(),
            sends_and_breaks(&[&format!("{NO_TIMEOUT}{}", if_granted(trying.mark()))])
        );
    }

    #[test]
    fn a_try_without_a_mark_breaks_the_session() {
        assert_eq!(acquire(FOREVER).tries().abandoned(), broken());
    }

    #[test]
    fn a_wait_is_reclaimed_and_goes_on_until_somebody_cancels_it() {
        for start in [acquire(FOREVER), acquire_abandonable(FOREVER, None)] {
            let wait = start.answer(value(0)).waits(0);
            assert_eq!(wait.abandoned(), waiting(&twice(&reclaim())));
        }
        let once_more = acquire(FOREVER).answer(ERROR).answer(value(0)).waits(0);
        assert_eq!(once_more.abandoned(), waiting(&twice(&reclaim())));
    }

    #[test]
    fn what_was_reclaimed_may_be_reclaimed_again() {
        let reclaiming = acquire(FOREVER)
            .answer(value(0))
            .answer(error("57014"))
            .reclaims();
        assert_eq!(reclaiming.abandoned(), sends_and_breaks(&twice(&reclaim())));
    }

    #[test]
    fn a_question_whether_it_is_held_breaks_the_session() {
        let asking = acquire_abandonable(FOREVER, None).answer(ERROR);
        assert_eq!(asking.asks_whether_held().abandoned(), broken());
        let asking = acquire_in_open_transaction(FOREVER)
            .answer(ERROR)
            .answer(DONE);
        assert_eq!(asking.asks_whether_held().script.abandoned(), broken());
    }

    #[test]
    fn a_question_before_anything_is_asked_for_leaves_nothing_behind() {
        let asking = acquire_abandonable(FOREVER, Some(Fence::new())).asks_whether_held();
        assert_eq!(asking.abandoned(), nothing());
    }

    #[test]
    fn a_sleep_leaves_nothing_behind() {
        assert_eq!(
            acquire(poll(None))
                .answer(value(0))
                .sleep(millis(50))
                .abandoned(),
            nothing()
        );
        assert_eq!(
            acquire_abandonable(FOREVER, None)
                .answer(value(0))
                .answer(error("55P03"))
                .sleep(PAUSE)
                .abandoned(),
            nothing()
        );
        for fenced in [
            acquire_in_open_transaction(poll(None)),
            acquire_for_transaction(poll(None)).answer(value(0)),
        ] {
            // The latter sleeps already.
            let sleeping = match fenced.script.step() {
                Step::Sleep(_) => fenced,
                _ => fenced.answer(error("55P03")).undoes().answer(DONE),
            };
            assert_eq!(sleeping.sleep(millis(50)).script.abandoned(), nothing());
        }
        let begun = begin(poll(None))
            .answer(ERROR)
            .answer(error("55P03"))
            .answer(DONE)
            .sleep(millis(50));
        assert_eq!(begun.abandoned(), nothing());
        let isolated = isolated(poll(None)).answer(value(0)).sleep(millis(50));
        assert_eq!(isolated.abandoned(), nothing());
    }

    #[test]
    fn a_wait_in_an_open_transaction_is_undone_and_given_back() {
        let fence = Fence::new();
        let wait = acquire_abandonable(FOREVER, Some(fence)).answer(value(0));
        let back = format!("ROLLBACK TO SAVEPOINT {fence}; {RECLAIM}");
        assert_eq!(wait.abandoned(), waiting(&twice(&back)));
        let once_more = wait
            .answer(error("55P03"))
            .answer(DONE)
            .answer(DONE)
            .batch_with(&["SAVEPOINT "]);
        assert_eq!(once_more.abandoned(), waiting(&twice(&back)));
    }

    /// The server does not make it wait, so there is nothing to cancel, and a cancel would hit the release.
    #[test]
    fn a_lock_that_an_outer_guard_holds_in_a_transaction_is_released_once() {
        let fence = Fence::new();
        let wait = acquire_abandonable(FOREVER, Some(fence)).answer(value(1));
        assert_eq!(wait.abandoned(), sends_and_breaks(&[&unlock_fenced(fence)]));
    }

    #[test]
    fn an_undo_is_followed_by_a_release_and_breaks_the_session() {
        let fence = Fence::new();
        let wait = || acquire_abandonable(FOREVER, Some(fence)).answer(value(0));
        let undoing = wait().answer(error("55P03")).batch(&undo(fence));
        assert_eq!(undoing.abandoned(), sends_and_breaks(&twice(RECLAIM)));
        let again = wait().answer(ERROR).answer(ERROR).batch(&undo(fence));
        assert_eq!(again.abandoned(), sends_and_breaks(&twice(RECLAIM)));
        let held_before = acquire_abandonable(FOREVER, Some(fence))
            .answer(value(1))
            .answer(error("57014"))
            .batch(&undo(fence));
        assert_eq!(held_before.abandoned(), broken());
        let undoing = acquire_for_transaction(FOREVER)
            .answer(value(0))
            .answer(error("55P03"))
            .undoes();
        assert_eq!(undoing.script.abandoned(), broken());
    }

    #[test]
    fn a_try_for_the_transaction_ends_with_it() {
        let trying = acquire_for_transaction(FOREVER).tries_in_transaction();
        assert_eq!(trying.script.abandoned(), nothing());
    }

    #[test]
    fn a_wait_for_the_transaction_breaks_the_session() {
        let wait = acquire_for_transaction(FOREVER)
            .answer(value(0))
            .waits_for_transaction(0);
        assert_eq!(wait.script.abandoned(), waiting(&[]));
    }

    #[test]
    fn a_transaction_that_is_begun_is_rolled_back() {
        let begin = || begin(FOREVER).begins();
        // It may have rolled a transaction back that Diesel does not know of.
        assert_eq!(begin().abandoned(), sends_and_breaks(&["ROLLBACK"]));
        let wait = || begin().answer(ERROR).begins_waiting(0);
        assert_eq!(wait().abandoned(), waiting(&["ROLLBACK"]));
        for failed in ["55P03", "40P01", "57014", "DL001"] {
            let rolling_back = wait().answer(error(failed)).batch("ROLLBACK");
            assert_eq!(rolling_back.abandoned(), sends(&["ROLLBACK"]));
        }
    }

    #[test]
    fn beginning_at_other_isolation_levels_is_abandoned_as_acquiring_is() {
        let trying = isolated(FOREVER);
        assert_eq!(
            trying.abandoned(),
            sends_and_breaks(&[&format!("{NO_TIMEOUT}{}", if_granted(trying.mark()))])
        );
        let wait = isolated(FOREVER).answer(value(0)).waits(0);
        assert_eq!(wait.abandoned(), waiting(&twice(&reclaim())));
        let reclaiming = wait.answer(error("57014")).reclaims();
        assert_eq!(reclaiming.abandoned(), sends_and_breaks(&twice(&reclaim())));
        let asking = isolated(FOREVER).answer(ERROR).asks_whether_held();
        assert_eq!(asking.abandoned(), broken());
    }

    /// To end the session would take the holds of outer guards.
    #[test]
    fn a_hand_over_is_rolled_back_and_breaks_the_session() {
        let handing_over = isolated(FOREVER).answer(value(1)).batch(HAND_OVER);
        assert_eq!(handing_over.abandoned(), sends_and_breaks(&["ROLLBACK"]));
    }

    /// To release it once more could take an outer guard's hold.
    #[test]
    fn an_unlock_is_not_made_up_for_and_breaks_the_session() {
        assert_eq!(release().abandoned(), broken());
        assert_eq!(release_in_open_transaction().script.abandoned(), broken());
    }

    #[test]
    fn once_it_is_unlocked_nothing_is_left_to_do() {
        let asking = release_in_open_transaction()
            .answer(DONE)
            .asks_what_it_unlocked();
        assert_eq!(asking.script.abandoned(), nothing());
    }

    /// If the answer is not read, nobody knows whether the server has obeyed: it had not if the savepoint was gone.
    #[test]
    fn a_release_in_an_aborted_transaction_breaks_the_session() {
        let releasing = release_in_open_transaction()
            .answer(ERROR)
            .releases_aborted();
        assert_eq!(releasing.script.abandoned(), broken());
    }

    #[test]
    fn a_hold_is_given_up_in_one_message() {
        for (mode, unlock) in [
            (Mode::Exclusive, "SELECT pg_advisory_unlock('42'::bigint)"),
            (
                Mode::Shared,
                "SELECT pg_advisory_unlock_shared('42'::bigint)",
            ),
        ] {
            let outside = format!("{NO_TIMEOUT}{unlock}");
            for (transaction, expected) in [
                (OpenTransaction::None, outside.clone()),
                (OpenTransaction::RollBack, format!("ROLLBACK; {outside}")),
                // There the setting would stay.
                (OpenTransaction::Keep, unlock.to_owned()),
            ] {
                let message = Postgres::release_unread(&key(42), mode, transaction);
                assert_eq!(message, Some(expected));
            }
        }
        let pair =
            Postgres::release_unread(&key((-1, i32::MIN)), Mode::Exclusive, OpenTransaction::None);
        let unlock = "SELECT pg_advisory_unlock('-1'::int, '-2147483648'::int)";
        assert_eq!(pair, Some(format!("{NO_TIMEOUT}{unlock}")));
    }
}

/// Of a guard whose `release` may be dropped.
mod releasing_abandonably {
    use super::*;

    fn release() -> Script<PostgresRelease> {
        let release = Postgres::release_abandonable(&key(42), Mode::Exclusive, None);
        play(release).query(TRY_OR_UNLOCK, &[Piece::BigInt(0), Piece::BigInt(42)])
    }

    #[test]
    fn the_statement_of_the_try_releases_for_the_driver_has_prepared_that() {
        for key in [key(42), key((1, -2))] {
            for mode in [Mode::Exclusive, Mode::Shared] {
                let tries = play(Postgres::acquire_abandonable(&key, mode, FOREVER, None));
                let releases = play(Postgres::release_abandonable(&key, mode, None));
                let [tries, releases] = [tries.statement(), releases.statement()];
                assert_eq!(tries.text(), releases.text());
                assert!(tries.cached && releases.cached);
                assert_ne!(binds(tries)[0], Piece::BigInt(0));
                assert_eq!(binds(releases)[0], Piece::BigInt(0));
                assert_eq!(binds(tries)[1..], binds(releases)[1..]);
            }
        }
    }

    #[test]
    fn it_is_released_or_was_lost() {
        release().answer(value(1)).ends(Outcome::Success);
        release().answer(value(0)).ends(clean(Reason::NotHeld));
    }

    #[test]
    fn anything_else_breaks_the_session() {
        for answer in [
            ERROR,
            NULL,
            DONE,
            value(2),
            error("57014"),
            error("dlock_not_held"),
        ] {
            release().answer(answer).ends(broken(Reason::Database));
        }
    }

    #[test]
    fn nothing_is_sent_behind_it() {
        let nothing = Abandoned {
            broken: true,
            ..Abandoned::default()
        };
        assert_eq!(release().abandoned(), nothing);
    }

    #[test]
    fn in_an_open_transaction_it_is_as_ever() {
        let fence = Fence::new();
        let release = Postgres::release_abandonable(&key(42), Mode::Exclusive, Some(fence));
        play(release).batch(&unlock_fenced(fence));
    }
}

/// What the statements carry.
mod sent {
    use super::*;

    /// Every text that the machines can send for a key.
    struct Everything {
        queries: Vec<Statement>,
        /// And what is sent without reading the answer.
        batches: Vec<String>,
    }

    fn everything(key: &PostgresKey, mode: Mode) -> Everything {
        let mut all = Everything {
            queries: Vec::new(),
            batches: Vec::new(),
        };
        let fence = Fence::new();
        let acquire = |fence| Postgres::acquire(key, mode, FOREVER, fence);
        let abandonable = |fence| Postgres::acquire_abandonable(key, mode, FOREVER, fence);
        for acquire in [&acquire as &dyn Fn(_) -> _, &abandonable] {
            all.add(acquire(None), &[value(0), error("57014"), NULL]);
            all.add(acquire(None), &[ERROR, value(0), DONE]);
        }
        all.add(acquire(Some(fence)), &[error("57014"), DONE, value(0)]);
        all.add(
            abandonable(Some(fence)),
            &[value(0), error("57014"), DONE, NULL],
        );
        all.add(abandonable(Some(fence)), &[value(1), error("57014"), DONE]);
        all.add(
            Postgres::acquire_in_transaction(key, mode, FOREVER, fence),
            &[value(0), error("57014"), DONE],
        );
        all.add(
            Postgres::begin(key, mode, FOREVER),
            &[ERROR, error("DL001"), DONE, value(1), DONE],
        );
        all.add(Postgres::release(key, mode, None), &[value(1)]);
        all.add(Postgres::release_abandonable(key, mode, None), &[value(1)]);
        let fenced = || Postgres::release(key, mode, Some(fence));
        all.add(fenced(), &[ERROR, error("dlock_released")]);
        all.add(fenced(), &[DONE, value(1)]);
        for transaction in [OpenTransaction::None, OpenTransaction::RollBack] {
            all.batches
                .extend(Postgres::release_unread(key, mode, transaction));
        }
        all
    }

    impl Everything {
        /// All that a machine sends when it is answered like this, or abandoned.
        fn add(&mut self, mut machine: impl Machine, answers: &[Answer]) {
            let mut step = machine.start();
            for answer in answers {
                let unread = machine.abandon().messages;
                self.batches
                    .extend(unread.into_iter().map(|message| message.into_owned()));
                match step {
                    Step::Query(statement) => self.queries.push(statement),
                    Step::Batch(text) => self.batches.push(text.into_owned()),
                    Step::Sleep(_) => {}
                    Step::Done(_) => panic!("over before {answer:?}"),
                }
                step = machine.next(answer.clone(), Duration::ZERO);
            }
            assert!(matches!(step, Step::Done(_)), "not over: {step:?}");
        }
    }

    fn texts(key: &PostgresKey, mode: Mode) -> Vec<String> {
        let Everything { queries, batches } = everything(key, mode);
        let queries = queries.iter().map(Statement::text);
        queries.chain(batches).collect()
    }

    /// Without the numbers that differ each time, and the halves of the key.
    fn without_numbers(text: &str) -> String {
        [
            "dlock_",
            "'dlock.granted', '",
            "'dlock.granted', true) = '",
            "'dlock.released', true) IS DISTINCT FROM '",
            "l.classid::bigint = '",
            "l.objid::bigint = '",
        ]
        .iter()
        .fold(text.to_owned(), |text, before| {
            let mut parts = text.split(before);
            let first = parts.next().unwrap().to_owned();
            parts.fold(first, |all, part| {
                // A mark may be negative.
                let part = part.strip_prefix('-').unwrap_or(part);
                let part = part.trim_start_matches(|c: char| c.is_ascii_digit());
                format!("{all}{before}{part}")
            })
        })
    }

    #[test]
    fn a_fence_is_an_identifier_that_no_other_has() {
        let fences: Vec<_> = (0..100).map(|_| Fence::new()).collect();
        for (at, fence) in fences.iter().enumerate() {
            let name = fence.to_string();
            let number = name.strip_prefix("dlock_").unwrap();
            assert!(number.parse::<u64>().is_ok(), "{name}");
            assert_eq!(fences.iter().position(|other| other == fence), Some(at));
            assert_eq!(fence.to_string(), name);
        }
    }

    #[test]
    fn a_session_is_ended_in_an_aborted_transaction_too() {
        assert_eq!(
            Postgres::END_SESSION,
            "ROLLBACK; RESET SESSION AUTHORIZATION; SET ROLE NONE; \
                 SELECT pg_advisory_unlock_all(); SELECT pg_terminate_backend(pg_backend_pid())"
        );
    }

    fn literal(key: PostgresKey) -> String {
        match key {
            PostgresKey::BigInt(key) => format!("'{key}'::bigint"),
            PostgresKey::Pair(first, second) => format!("'{first}'::int, '{second}'::int"),
        }
    }

    #[test]
    fn keys_travel_as_binds_of_their_type() {
        let bigint = |number| vec![Piece::BigInt(number)];
        let cases = [
            (key(42), "?", bigint(42)),
            (key(i64::MIN), "?", bigint(i64::MIN)),
            (key(i64::MAX), "?", bigint(i64::MAX)),
            (key("user/001"), "?", bigint(2222196715328754885)),
            (
                key((-1, i32::MIN)),
                "?, ?",
                vec![Piece::Integer(-1), Piece::Integer(i32::MIN)],
            ),
        ];
        for (key, marks, binds) in cases {
            for (mode, suffix) in [(Mode::Exclusive, ""), (Mode::Shared, "_shared")] {
                play(Postgres::acquire(&key, mode, FOREVER, None)).query(
                    &format!("SELECT pg_try_advisory_lock{suffix}({marks})::int::bigint"),
                    &binds,
                );
                play(Postgres::acquire_in_transaction(
                    &key,
                    mode,
                    FOREVER,
                    Fence::new(),
                ))
                .query(
                    &format!("SELECT pg_try_advisory_xact_lock{suffix}({marks})::int::bigint"),
                    &binds,
                );
                play(Postgres::release(&key, mode, None)).query(
                    &format!("SELECT pg_advisory_unlock{suffix}({marks})::int::bigint"),
                    &binds,
                );
            }
        }
    }

    /// As `pg_locks` shows a key: halves without a sign, and 1 or 2 for the key space.
    #[test]
    fn holds_are_looked_for_under_the_halves_of_the_key() {
        let cases = [
            (key(42), 0, 42, 1),
            (key(-1), 0xffff_ffff, 0xffff_ffff, 1),
            (key(i64::MIN), 0x8000_0000, 0, 1),
            (key(i64::MAX), 0x7fff_ffff, 0xffff_ffff, 1),
            (key(1 << 32), 1, 0, 1),
            (key((0, 42)), 0, 42, 2),
            (key((-1, i32::MIN)), 0xffff_ffff, 0x8000_0000, 2),
            (key((i32::MAX, -2)), 0x7fff_ffff, 0xffff_fffe, 2),
        ];
        for (key, high, low, space) in cases {
            for (mode, row, unlock) in [
                (Mode::Exclusive, "ExclusiveLock", "pg_advisory_unlock"),
                (Mode::Shared, "ShareLock", "pg_advisory_unlock_shared"),
            ] {
                let binds = [
                    Piece::BigInt(high),
                    Piece::BigInt(low),
                    Piece::Integer(space),
                ];
                let own = format!("l.pid = pg_backend_pid() AND l.granted AND l.mode = '{row}')");
                play(Postgres::acquire(&key, mode, FOREVER, None))
                    .answer(ERROR)
                    .query_with(&["SELECT (EXISTS(", &own], &binds);
                play(Postgres::acquire(&key, mode, FOREVER, None))
                    .answer(value(0))
                    .answer(error("57014"))
                    .query_with(
                        &[
                            "SELECT CASE WHEN EXISTS(",
                            &own,
                            &format!(" THEN {unlock}({})::int::bigint END", literal(key)),
                        ],
                        &binds,
                    );
            }
        }
    }

    /// The table of locks may be full, and a look into a table needs a place in it.
    #[test]
    fn no_table_is_looked_into_for_the_sessions_own_holds() {
        for text in texts(&key(42), Mode::Exclusive) {
            assert_eq!(
                text.matches(" FROM ").count(),
                text.matches(" FROM pg_locks l ").count()
                    + text.matches(" IS DISTINCT FROM ").count(),
                "{text}"
            );
        }
    }

    #[test]
    fn each_mode_calls_its_own_functions_and_no_others() {
        for (mode, other) in [
            (Mode::Exclusive, Mode::Shared),
            (Mode::Shared, Mode::Exclusive),
        ] {
            let shared = mode == Mode::Shared;
            for text in texts(&key(42), mode) {
                let calls: Vec<_> = text
                    .match_indices("advisory_")
                    .map(|(at, _)| text[at..].split('(').next().unwrap())
                    .collect();
                // That one is for all keys and modes.
                for call in calls
                    .into_iter()
                    .filter(|&call| call != "advisory_unlock_all")
                {
                    assert_eq!(call.ends_with("_shared"), shared, "{call} in {text}");
                }
            }
            assert_eq!(texts(&key(42), mode).len(), texts(&key(42), other).len());
        }
    }

    #[test]
    fn texts_differ_between_keys_in_formatted_integers_alone() {
        let hostile = LockKey::namespaced("$dlock$; ROLLBACK;", "'); DROP TABLE accounts; --");
        let keys = [key(42), key(i64::MIN), key(0), key("üser'"), key(hostile)];
        let pairs = [key((1, 2)), key((-1, i32::MIN)), key((i32::MAX, 0))];
        for keys in [&keys[..], &pairs[..]] {
            for mode in [Mode::Exclusive, Mode::Shared] {
                let templates = |key: PostgresKey| -> Vec<String> {
                    texts(&key, mode)
                        .iter()
                        .map(|text| without_numbers(text).replace(&literal(key), "KEY"))
                        .collect()
                };
                for &key in keys {
                    assert_eq!(templates(key), templates(keys[0]), "{key:?}");
                }
            }
        }
    }

    #[test]
    fn every_batch_that_takes_a_lock_names_the_key_and_nothing_is_left_to_fill_in() {
        for key in [key(i64::MIN), key((-1, i32::MIN))] {
            for mode in [Mode::Exclusive, Mode::Shared] {
                for text in everything(&key, mode).batches {
                    assert!(text.is_ascii() && !text.contains(['{', '}', '?']), "{text}");
                    let calls = text.matches("advisory_").count()
                        - text.matches("advisory_unlock_all").count();
                    assert_eq!(text.matches(&literal(key)).count(), calls, "{text}");
                }
            }
        }
    }

    #[test]
    fn only_statements_with_one_of_few_texts_are_kept_prepared() {
        for statement in everything(&key(42), Mode::Exclusive).queries {
            assert_eq!(statement.cached, !statement.text().contains("'42'"));
        }
    }
}

/// Every sequence of answers, against all that the server can have come to by it.
mod any_answers {
    use dlock_core::Fence;

    use super::*;
    use crate::postgres_server::{Sent, Session, Transaction};

    fn answers(goal: Goal) -> Vec<Answer> {
        let mut answers = vec![
            DONE,
            NULL,
            value(0),
            value(1),
            value(7),
            ERROR,
            error("55P03"),
            error("57014"),
            error("40P01"),
        ];
        match goal {
            Goal::Session | Goal::Transaction => {}
            Goal::Begin => answers.push(error("DL001")),
            Goal::Release => {
                answers.extend([error("dlock_released"), error("dlock_not_held")]);
            }
        }
        answers
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Goal {
        Session,
        Transaction,
        Begin,
        Release,
    }

    /// What the session was and what it may be now.
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct World {
        before: Session,
        now: Session,
    }

    impl World {
        /// The conversation has left no trace, and has not released what it does not own.
        fn is_as_before(&self) -> bool {
            let World { before, now } = self;
            now.holds == before.holds
                && !now.transaction_holds
                && (now.transaction == Transaction::None)
                    == (before.transaction == Transaction::None)
        }
    }

    /// All that there may be, given what was sent and answered.
    struct Worlds {
        goal: Goal,
        wait: Wait,
        fence: Option<Fence>,
        worlds: Vec<World>,
        /// A lock was asked for in this way, and since then nobody slept.
        asked: Option<Sent>,
    }

    impl Worlds {
        fn new(goal: Goal, wait: Wait, fence: Option<Fence>) -> Self {
            use Transaction::{Aborted, None, Open};
            let mut starts = Vec::new();
            for outer in [0, 1] {
                for transaction in [None, Open, Aborted] {
                    if (transaction == None) == fence.is_none() {
                        let holds = outer + u32::from(goal == Goal::Release);
                        starts.push(Session::new(holds, transaction));
                        if goal == Goal::Release && fence.is_some() {
                            starts.push(Session::new(holds, transaction).fenced());
                        }
                        // Lost.
                        if goal == Goal::Release && outer == 0 {
                            starts.push(Session::new(0, transaction).fenced());
                        }
                    }
                }
            }
            let world = |session| World {
                before: session,
                now: session,
            };
            Worlds {
                goal,
                wait,
                fence,
                worlds: starts.into_iter().map(world).collect(),
                asked: Option::None,
            }
        }

        fn all(&self, holds: impl Fn(&World) -> bool, otherwise: &str) {
            for world in &self.worlds {
                assert!(holds(world), "{otherwise}: {world:?}");
            }
        }

        fn held_once_more(world: &World) -> bool {
            world.now.holds == world.before.holds + 1
        }

        /// It may come too late for the wait, and hits what is sent behind it.
        fn a_cancel_hits_any_message_once(&self, last: &Sent, messages: &[Sent]) {
            for (world, hit) in self
                .worlds
                .iter()
                .flat_map(|world| (0..messages.len()).map(move |hit| (world, hit)))
            {
                let mut sessions = world.now.receive_unread(Some(last));
                for (at, message) in messages.iter().enumerate() {
                    sessions = sessions
                        .into_iter()
                        .flat_map(|session| match at == hit {
                            true => session.cancelled(message),
                            false => vec![session.obey(message)],
                        })
                        .collect();
                }
                for now in sessions {
                    assert_eq!(
                        now.holds, world.before.holds,
                        "abandoned, and message {hit} cancelled: {world:?}, {now:?}"
                    );
                }
            }
        }

        /// There is no other savepoint than the one that was given.
        fn names(&self, text: &str) {
            for (at, name) in text.match_indices("SAVEPOINT ") {
                let given = format!("{name}{}", self.fence.expect("no savepoint was given"));
                let rest = &text[at..];
                let named = rest.strip_prefix(&given).is_some_and(|rest| {
                    !rest.starts_with(|next: char| next.is_ascii_alphanumeric())
                });
                assert!(named, "another savepoint: {rest}");
            }
        }
    }

    impl Witness for Worlds {
        fn sent(&mut self, step: &Step) {
            if let Step::Batch(text) = step {
                self.names(text);
            }
            let Some(sent) = Sent::of(step) else {
                self.all(
                    World::is_as_before,
                    "sleeps with a lock, or in a transaction",
                );
                self.asked = None;
                return;
            };
            match sent {
                Sent::Try { .. }
                | Sent::TryInTransaction
                | Sent::Begin
                | Sent::WaitInOpenTransaction => {
                    self.all(World::is_as_before, "asks again while it may have it");
                    assert_ne!(
                        self.asked.as_ref(),
                        Some(&sent),
                        "asks again without a pause"
                    );
                    self.asked = Some(sent);
                }
                Sent::Wait | Sent::WaitForTransaction => {
                    self.all(World::is_as_before, "waits for what it may have");
                }
                Sent::Reclaim => {
                    self.all(|world| world.before.holds == 0, "may release an outer hold");
                }
                Sent::HandOver => {
                    self.all(Worlds::held_once_more, "hands over what it has not");
                }
                Sent::Unlock | Sent::UnlockFenced | Sent::ReadUnlocked => {
                    assert_eq!(self.goal, Goal::Release);
                }
                Sent::ReleaseAborted => {
                    assert_eq!(self.goal, Goal::Release);
                    // Where the savepoint is gone, this does nothing.
                    self.all(
                        |world| world.now.holds == world.before.holds || !world.now.fence,
                        "releases twice",
                    );
                }
                Sent::AskHeld | Sent::Undo | Sent::BeginWaiting | Sent::RollBack => {
                    assert_ne!(self.goal, Goal::Release);
                }
                Sent::BackAndReclaim | Sent::ReleaseIfGranted { .. } | Sent::EndSession => {
                    panic!("only when it is abandoned: {sent:?}")
                }
            }
        }

        fn answered(&mut self, step: &Step, answer: &Answer, _elapsed: Duration) {
            let Some(sent) = Sent::of(step) else { return };
            let mut said = Vec::new();
            let mut anything = Vec::new();
            for &World { before, now } in &self.worlds {
                for result in now.receive(&sent) {
                    let worlds = if result.says.is(answer) {
                        &mut said
                    } else {
                        &mut anything
                    };
                    let now = result.session;
                    let world = World { before, now };
                    if !worlds.contains(&world) {
                        worlds.push(world);
                    }
                }
            }
            if sent == Sent::Undo {
                // Of these there is a test that stands alone.
                anything.clear();
            }
            // What the server never says tells nothing.
            self.worlds = if said.is_empty() { anything } else { said };
        }

        fn abandoned(&self, step: &Step, abandoned: &Abandoned) {
            let last = Sent::of(step);
            let waits = matches!(
                last,
                Some(
                    Sent::Wait
                        | Sent::WaitInOpenTransaction
                        | Sent::WaitForTransaction
                        | Sent::BeginWaiting
                )
            );
            assert!(abandoned.broken || !waits, "fit for others while it waits");
            let messages: Vec<_> = abandoned
                .messages
                .iter()
                .map(|text| {
                    self.names(text);
                    Sent::of_text(text)
                })
                .collect();
            // Who holds it already does not wait.
            let may_wait = waits && self.worlds.iter().any(|world| world.now.holds == 0);
            assert_eq!(abandoned.waiting, may_wait);
            if abandoned.waiting && self.goal == Goal::Session && !messages.is_empty() {
                let last = last.as_ref().expect("BUG: it waits for a message");
                self.a_cancel_hits_any_message_once(last, &messages);
            }
            for world in &self.worlds {
                for unread in world.now.receive_unread(last.as_ref()) {
                    let now = messages.iter().fold(unread, Session::obey);
                    let world = World { now, ..*world };
                    let fine = match self.goal {
                        // Of this there is a test that stands alone.
                        Goal::Release if abandoned.broken => true,
                        _ if abandoned.broken => now.holds >= world.before.holds || now.ended,
                        Goal::Session | Goal::Begin => world.is_as_before(),
                        // What the transaction of the user holds goes with it.
                        Goal::Transaction => now.holds == world.before.holds,
                        Goal::Release => now.holds == world.before.holds.saturating_sub(1),
                    };
                    assert!(fine, "abandoned, {world:?}, was {unread:?}");
                }
            }
        }

        fn ended(&mut self, outcome: Outcome, elapsed: Duration) {
            match (outcome, self.goal) {
                (Outcome::Success, Goal::Session) => {
                    self.all(
                        |world| Worlds::held_once_more(world) && !world.now.transaction_holds,
                        "not granted",
                    );
                }
                (Outcome::Success, Goal::Transaction | Goal::Begin) => self.all(
                    |World { before, now }| {
                        now.transaction_holds
                            && now.transaction == Transaction::Open
                            && now.holds == before.holds
                    },
                    "not granted",
                ),
                (Outcome::Success, Goal::Release) => self.all(
                    |World { before, now }| now.holds + 1 == before.holds && !now.ended,
                    "not released, or too often",
                ),
                (Outcome::TimedOut, goal) => {
                    assert_ne!(goal, Goal::Release, "there is no limit");
                    self.all(World::is_as_before, "leaves something behind");
                    assert!(elapsed >= self.wait.limit.expect("a limit"), "too early");
                }
                (Outcome::Failed(failure), _) if failure.broken => {}
                (Outcome::Failed(failure), Goal::Release) => {
                    assert_eq!(failure.reason, Reason::NotHeld);
                    self.all(|world| world.before.holds == 0, "it was held");
                }
                (Outcome::Failed(_), Goal::Transaction) => self.all(
                    |World { before, now }| {
                        now.holds == before.holds
                            && (!now.transaction_holds || now.transaction == Transaction::Aborted)
                    },
                    "leaves something behind",
                ),
                (Outcome::Failed(_), Goal::Session | Goal::Begin) => {
                    self.all(World::is_as_before, "leaves something behind");
                }
            }
        }
    }

    fn waits() -> [Wait; 5] {
        [
            FOREVER,
            Wait::TRY,
            limit(millis(100)),
            poll(None),
            poll(Some(millis(100))),
        ]
    }

    #[track_caller]
    fn walk_all<M: Machine>(goal: Goal, fence: Option<Fence>, machine: impl Fn(Wait) -> M) {
        let answers = answers(goal);
        for wait in waits() {
            let witness = || Worlds::new(goal, wait, fence);
            let conversations = walk(|| machine(wait), witness, &answers, 6);
            assert!(conversations > answers.len());
        }
    }

    fn acquiring(fence: Option<Fence>) {
        walk_all(Goal::Session, fence, |wait| {
            Postgres::acquire(&key(42), Mode::Exclusive, wait, fence)
        });
        walk_all(Goal::Session, fence, |wait| {
            Postgres::acquire_abandonable(&key(42), Mode::Exclusive, wait, fence)
        });
    }

    fn releasing(fence: Option<Fence>) {
        walk_all(Goal::Release, fence, |_| {
            Postgres::release(&key(42), Mode::Exclusive, fence)
        });
        walk_all(Goal::Release, fence, |_| {
            Postgres::release_abandonable(&key(42), Mode::Exclusive, fence)
        });
    }

    #[test]
    fn acquiring_outside_a_transaction_leaves_nothing_behind() {
        acquiring(None);
    }

    #[test]
    fn acquiring_in_an_open_transaction_leaves_nothing_behind() {
        acquiring(Some(Fence::new()));
    }

    #[test]
    fn acquiring_for_the_transaction_leaves_nothing_behind() {
        let fence = Fence::new();
        walk_all(Goal::Transaction, Some(fence), |wait| {
            Postgres::acquire_in_transaction(&key(42), Mode::Shared, wait, fence)
        });
    }

    #[test]
    fn beginning_leaves_neither_a_lock_nor_a_transaction_behind() {
        walk_all(Goal::Begin, None, |wait| {
            Postgres::begin(&key(42), Mode::Exclusive, wait)
        });
    }

    #[test]
    fn releasing_outside_a_transaction_is_sure_or_breaks_the_session() {
        releasing(None);
    }

    #[test]
    fn releasing_in_an_open_transaction_is_sure_or_breaks_the_session() {
        releasing(Some(Fence::new()));
    }
}
