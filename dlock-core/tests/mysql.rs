//! The machines of MySQL and MariaDB, answer by answer.
#![cfg(feature = "mysql")]

mod script;

use std::time::Duration;

use dlock_core::{
    Abandoned, Answer, Dialect, Fence, LockKey, Machine, Mode, Mysql, MysqlAcquire, MysqlRelease,
    OpenTransaction, Outcome, Piece, Reason, Step, Wait,
};
use script::{DONE, ERROR, NULL, Script, Witness, broken, clean, error, millis, play, value, walk};

const FOREVER: Wait = Wait {
    limit: None,
    poll: None,
};

const UNCAP: &str =
    "SET @dlock_max_statement_time = @@max_statement_time, SESSION max_statement_time = 0";
const RECAP: &str = "SET SESSION max_statement_time = @dlock_max_statement_time";
const KEEP_ERRNO: &str = "GET DIAGNOSTICS @dlock_conditions = NUMBER; \
    GET DIAGNOSTICS CONDITION @dlock_conditions @dlock_errno = MYSQL_ERRNO";
/// The text of a question.
macro_rules! ask {
    ($text:literal) => {
        explained!("SELECT 4611686018427387904 + CAST(? AS SIGNED) + ", $text)
    };
}

macro_rules! explained {
    ($($text:literal),*) => {
        concat!(
            "/* dlock: a named lock; to its answer a number is added, so that it is not taken for that of another query */ ",
            $($text),*
        )
    };
}

const READ_ERRNO: &str =
    ask!("IF(@dlock_conditions > 0, CAST(@dlock_errno AS SIGNED), NULL) AS answer");
/// `report`, where there are no binds.
const REPORT: &str = "CONVERT(x'7265706f7274' USING utf8mb4)";

/// Another session has the lock.
const TAKEN: Answer = Answer::Value(Some(0));
/// Another session has the lock, and MariaDB's `max_statement_time` is set.
const CAPPED: Answer = Answer::Value(Some(-1));
const GRANTED: Answer = Answer::Value(Some(1));

const DEADLOCKS: [i64; 2] = [3058, 1213];
const TIMEOUTS: [i64; 2] = [3024, 1969];

/// Before asking again where a wait ended early.
const PAUSE: Duration = Duration::from_millis(1);

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

fn key(key: impl Into<LockKey>) -> String {
    Mysql::key(&key.into()).unwrap()
}

const TRY: &str = ask!(
    "CASE GET_LOCK(CONVERT(? USING utf8mb4), 0) WHEN 1 THEN 1 \
    WHEN 0 THEN 0 /*M! - (@@max_statement_time > 0) */ END AS answer"
);
const TRY_OR_RELEASE: &str = ask!(
    "IF(?, RELEASE_LOCK(CONVERT(? USING utf8mb4)), \
    CASE GET_LOCK(CONVERT(? USING utf8mb4), 0) WHEN 1 THEN 1 \
    WHEN 0 THEN 0 /*M! - (@@max_statement_time > 0) */ END) AS answer"
);

fn name() -> [Piece; 1] {
    [Piece::Binary(b"report".to_vec())]
}

fn acquire(wait: Wait) -> Script<MysqlAcquire> {
    play(Mysql::acquire(&key("report"), Mode::Exclusive, wait, None))
}

fn release() -> Script<MysqlRelease> {
    play(Mysql::release(&key("report"), Mode::Exclusive, None))
}

/// What a conversation about the key `report` asks for next, in the terms of these tests.
trait Asks: Sized {
    fn tries(self) -> Self;
    fn waits(self) -> Self;
    fn waits_at_most(self, millis: u32, fraction: &str, longer: u32) -> Self;
    fn asks_whether_held(self) -> Self;
    fn gives_back(self) -> Self;
    fn fails_with(self, errno: i64) -> Self;
}

impl<M: Machine> Asks for Script<M> {
    #[track_caller]
    fn tries(self) -> Self {
        self.query(TRY, &name())
    }

    /// Without a limit: the longest that each server knows.
    #[track_caller]
    fn waits(self) -> Self {
        self.query(
            explained!(
                "SELECT /*+ MAX_EXECUTION_TIME(4294967295) */ \
                 4611686018427387904 + CAST(? AS SIGNED) + GET_LOCK(CONVERT(? USING utf8mb4), 1000000000) AS answer"
            ),
            &name(),
        )
    }

    /// `millis` by MySQL's own limit of the statement, below the `longer` seconds of the lock; the `fraction` of
    /// seconds on MariaDB.
    #[track_caller]
    fn waits_at_most(self, millis: u32, fraction: &str, longer: u32) -> Self {
        self.query(
            &format!(
                explained!(
                    "SELECT /*+ MAX_EXECUTION_TIME({}) */ \
                     4611686018427387904 + CAST(? AS SIGNED) + GET_LOCK(CONVERT(? USING utf8mb4), \
                     IF(VERSION() LIKE '%MariaDB%', {}, {})) AS answer"
                ),
                millis, fraction, longer
            ),
            &name(),
        )
    }

    #[track_caller]
    fn asks_whether_held(self) -> Self {
        self.query(
            ask!("(IS_USED_LOCK(CONVERT(? USING utf8mb4)) <=> CONNECTION_ID()) AS answer"),
            &name(),
        )
    }

    #[track_caller]
    fn gives_back(self) -> Self {
        self.query(
            ask!("RELEASE_LOCK(CONVERT(? USING utf8mb4)) AS answer"),
            &name(),
        )
    }

    /// Answers with an error, and tells its number when asked.
    #[track_caller]
    fn fails_with(self, errno: i64) -> Self {
        self.answer(ERROR)
            .batch(KEEP_ERRNO)
            .answer(DONE)
            .query(READ_ERRNO, &[])
            .answer(value(errno))
    }
}

/// Answers to asking for a lock that leave it open whether it was granted, and their reasons. Errors are followed by
/// what came of asking for their number.
fn unclear_answers() -> Vec<(Vec<Answer>, Reason)> {
    vec![
        // KILL QUERY on MariaDB.
        (vec![NULL], Reason::Interrupted),
        // KILL QUERY on MySQL.
        (vec![ERROR, DONE, value(1317)], Reason::Interrupted),
        (vec![ERROR, DONE, value(3058)], Reason::Deadlock),
        (vec![ERROR, DONE, value(1213)], Reason::Deadlock),
        (vec![ERROR, DONE, value(1305)], Reason::Unsupported),
        (vec![ERROR, DONE, value(1205)], Reason::Database),
        (vec![ERROR, DONE, value(0)], Reason::Database),
        (vec![ERROR, DONE, value(-1)], Reason::Database),
        (vec![ERROR, DONE, NULL], Reason::Database),
        (vec![ERROR, DONE, ERROR], Reason::Database),
        (vec![ERROR, DONE, DONE], Reason::Database),
        (vec![ERROR, ERROR], Reason::Database),
        (vec![ERROR, NULL], Reason::Database),
        (vec![ERROR, value(3058)], Reason::Database),
        (vec![error("3058"), ERROR], Reason::Database),
        (vec![DONE], Reason::Database),
        (vec![value(2)], Reason::Database),
        (vec![value(i64::MIN)], Reason::Database),
    ]
}

fn answer_all<M: Machine>(script: Script<M>, answers: &[Answer]) -> Script<M> {
    answers
        .iter()
        .fold(script, |script, answer| script.answer(answer.clone()))
}

mod trying {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_query() {
        for wait in [FOREVER, Wait::TRY, limit(millis(250)), poll(None)] {
            acquire(wait).tries().answer(GRANTED).ends(Outcome::Success);
        }
    }

    #[test]
    fn a_grant_counts_however_late_it_comes() {
        acquire(limit(millis(250)))
            .at(Duration::MAX)
            .answer(GRANTED)
            .ends(Outcome::Success);
    }

    #[test]
    fn a_try_gives_up_at_once_and_touches_no_setting() {
        for answer in [TAKEN, CAPPED] {
            acquire(Wait::TRY)
                .tries()
                .answer(answer)
                .ends(Outcome::TimedOut);
        }
    }

    #[test]
    fn at_the_limit_and_past_it_the_wait_is_over() {
        for elapsed in [millis(250), millis(251), Duration::MAX] {
            for answer in [TAKEN, CAPPED] {
                acquire(limit(millis(250)))
                    .at(elapsed)
                    .answer(answer)
                    .ends(Outcome::TimedOut);
            }
        }
    }

    #[test]
    fn a_deadlock_and_a_server_without_the_function_end_it() {
        for errno in DEADLOCKS {
            acquire(FOREVER)
                .fails_with(errno)
                .asks_whether_held()
                .answer(value(0))
                .ends(clean(Reason::Deadlock));
        }
        acquire(FOREVER)
            .fails_with(1305)
            .asks_whether_held()
            .answer(value(0))
            .ends(clean(Reason::Unsupported));
    }

    /// The number may be that of another error: it never says that the lock was not granted.
    #[test]
    fn whatever_number_an_error_has_the_session_is_asked_what_it_holds() {
        for errno in (-1..=5_000).chain([i64::MIN, i64::MAX]) {
            acquire(FOREVER).fails_with(errno).asks_whether_held();
            acquire(FOREVER)
                .answer(TAKEN)
                .fails_with(errno)
                .asks_whether_held();
        }
    }

    #[test]
    fn a_try_that_failed_never_gives_back_what_an_outer_guard_may_hold() {
        for (answers, reason) in unclear_answers() {
            let asking = || answer_all(acquire(FOREVER), &answers).asks_whether_held();
            asking().answer(value(0)).ends(clean(reason));
            for unknown in [value(1), value(2), value(-1), NULL, DONE, ERROR] {
                asking().answer(unknown).ends(broken(reason));
            }
        }
    }

    #[test]
    fn a_try_that_the_server_cut_short_is_no_grant_even_if_the_lock_is_held() {
        for errno in TIMEOUTS {
            for unknown in [value(1), value(2), NULL, DONE, ERROR] {
                acquire(FOREVER)
                    .fails_with(errno)
                    .asks_whether_held()
                    .answer(unknown)
                    .ends(broken(Reason::Database));
            }
        }
    }

    /// A try does not wait, so no limit of a statement is its own.
    #[test]
    fn a_try_that_the_server_cut_short_is_a_failure() {
        for errno in TIMEOUTS {
            for wait in [FOREVER, Wait::TRY, limit(millis(250)), poll(None)] {
                acquire(wait)
                    .fails_with(errno)
                    .asks_whether_held()
                    .answer(value(0))
                    .ends(clean(Reason::Database));
            }
        }
    }
}

mod polling {
    use super::*;

    #[test]
    fn it_sleeps_and_never_waits_in_the_queue_nor_touches_a_setting() {
        let mut polling = acquire(poll(None));
        for round in 1..=5 {
            polling = polling
                .tries()
                .at(millis(60 * round))
                .answer(if round % 2 == 0 { TAKEN } else { CAPPED })
                .sleep(millis(50))
                .answer(DONE);
        }
        polling.tries().answer(GRANTED).ends(Outcome::Success);
    }

    #[test]
    fn with_a_limit_it_asks_a_last_time_when_that_is_reached() {
        let polling = || {
            acquire(poll(Some(millis(80))))
                .answer(TAKEN)
                .sleep(millis(50))
                .at(millis(51))
                .answer(DONE)
                .tries()
                .answer(TAKEN)
                .sleep(millis(29))
                .at(millis(80))
                .answer(DONE)
                .tries()
        };
        polling().answer(TAKEN).ends(Outcome::TimedOut);
        polling().answer(GRANTED).ends(Outcome::Success);
    }

    #[test]
    fn without_an_interval_it_sleeps_all_the_same() {
        let wait = Wait {
            limit: None,
            poll: Some(Duration::ZERO),
        };
        acquire(wait).answer(TAKEN).sleep(millis(1));
    }

    #[test]
    fn a_stray_hold_of_a_later_try_is_given_back() {
        acquire(poll(None))
            .answer(TAKEN)
            .sleep(millis(50))
            .answer(DONE)
            .tries()
            .answer(NULL)
            .asks_whether_held()
            .answer(value(1))
            .gives_back()
            .answer(value(1))
            .ends(clean(Reason::Interrupted));
    }

    #[test]
    fn it_ends_after_a_try_that_the_server_cut_short() {
        for errno in TIMEOUTS {
            acquire(poll(None))
                .fails_with(errno)
                .asks_whether_held()
                .answer(value(0))
                .ends(clean(Reason::Database));
            acquire(poll(None))
                .answer(TAKEN)
                .answer(DONE)
                .fails_with(errno)
                .asks_whether_held()
                .answer(value(0))
                .ends(clean(Reason::Database));
        }
    }
}

mod waiting {
    use super::*;

    #[test]
    fn a_taken_lock_is_waited_for_without_a_limit() {
        acquire(FOREVER)
            .tries()
            .answer(TAKEN)
            .waits()
            .answer(GRANTED)
            .ends(Outcome::Success);
    }

    #[test]
    fn the_wait_is_for_what_is_left_of_the_limit_to_the_millisecond_on_each_server() {
        let longest = Duration::from_millis(i32::MAX as u64);
        let cases = [
            (millis(250), Duration::ZERO, 250, "0.250", 10),
            (millis(250), millis(245), 5, "0.005", 10),
            (millis(250), Duration::from_micros(249_001), 1, "0.001", 10),
            (Duration::from_nanos(1), Duration::ZERO, 1, "0.001", 10),
            (millis(1_000), Duration::ZERO, 1_000, "1.000", 11),
            (millis(61_050), millis(1_000), 60_050, "60.050", 70),
            (longest, Duration::ZERO, 2147483647, "2147483.647", 2147493),
            (Duration::MAX, millis(5), 2147483647, "2147483.647", 2147493),
        ];
        for (wait, elapsed, millis, fraction, longer) in cases {
            acquire(limit(wait))
                .at(elapsed)
                .answer(TAKEN)
                .waits_at_most(millis, fraction, longer)
                .answer(GRANTED)
                .ends(Outcome::Success);
        }
    }

    /// MariaDB answers 0, MySQL with the statement's own limit.
    fn wait_over(script: Script<MysqlAcquire>, errno: Option<i64>) -> Script<MysqlAcquire> {
        match errno {
            None => script.answer(TAKEN),
            Some(errno) => script
                .fails_with(errno)
                .asks_whether_held()
                .answer(value(0)),
        }
    }

    #[test]
    fn at_the_limit_and_past_it_it_times_out() {
        for errno in [None, Some(3024), Some(1969)] {
            for elapsed in [millis(250), millis(251), Duration::MAX] {
                let waiting = acquire(limit(millis(250)))
                    .answer(TAKEN)
                    .waits_at_most(250, "0.250", 10)
                    .at(elapsed);
                wait_over(waiting, errno).ends(Outcome::TimedOut);
            }
        }
    }

    #[test]
    fn a_wait_that_ends_before_the_limit_asks_again() {
        for errno in [None, Some(3024), Some(1969)] {
            let waiting = acquire(limit(millis(250)))
                .answer(TAKEN)
                .at(Duration::from_micros(249_900));
            wait_over(waiting, errno)
                .sleep(PAUSE)
                .answer(DONE)
                .tries()
                .answer(TAKEN)
                .waits_at_most(1, "0.001", 10);
        }
    }

    #[test]
    fn a_wait_longer_than_one_statement_is_cut_into_slices() {
        let longest = Duration::from_millis(i32::MAX as u64);
        for errno in [None, Some(3024)] {
            let first = acquire(limit(longest + millis(500)))
                .answer(TAKEN)
                .waits_at_most(2147483647, "2147483.647", 2147493)
                .at(longest);
            let second = wait_over(first, errno)
                .sleep(PAUSE)
                .answer(DONE)
                .tries()
                .answer(TAKEN)
                .waits_at_most(500, "0.500", 10)
                .at(longest + millis(500));
            wait_over(second, errno).ends(Outcome::TimedOut);

            let unlimited = acquire(FOREVER).answer(TAKEN).waits().at(Duration::MAX);
            wait_over(unlimited, errno)
                .sleep(PAUSE)
                .answer(DONE)
                .tries()
                .answer(TAKEN)
                .waits();
        }
    }

    #[test]
    fn a_grant_just_before_the_statements_own_limit_is_kept() {
        for errno in TIMEOUTS {
            for elapsed in [millis(249), millis(251)] {
                acquire(limit(millis(250)))
                    .answer(TAKEN)
                    .at(elapsed)
                    .fails_with(errno)
                    .asks_whether_held()
                    .answer(value(1))
                    .ends(Outcome::Success);
            }
        }
    }

    #[test]
    fn a_wait_of_which_nobody_knows_whether_it_was_granted_breaks_the_session() {
        for errno in TIMEOUTS {
            for unknown in [value(2), value(-1), NULL, DONE, ERROR] {
                acquire(limit(millis(250)))
                    .answer(TAKEN)
                    .fails_with(errno)
                    .asks_whether_held()
                    .answer(unknown)
                    .ends(broken(Reason::Database));
            }
        }
    }

    #[test]
    fn a_deadlock_ends_it() {
        for errno in DEADLOCKS {
            acquire(FOREVER)
                .answer(TAKEN)
                .fails_with(errno)
                .asks_whether_held()
                .answer(value(0))
                .ends(clean(Reason::Deadlock));
        }
    }

    #[test]
    fn an_interrupted_wait_gives_a_stray_hold_back() {
        for (answers, reason) in unclear_answers().into_iter().chain([
            // A try says this, a wait does not.
            (vec![CAPPED], Reason::Database),
        ]) {
            let asking =
                || answer_all(acquire(FOREVER).answer(TAKEN), &answers).asks_whether_held();
            asking().answer(value(0)).ends(clean(reason));
            for unknown in [value(2), value(-1), NULL, DONE, ERROR] {
                asking().answer(unknown).ends(broken(reason));
            }
            let giving_back = || asking().answer(value(1)).gives_back();
            giving_back().answer(value(1)).ends(clean(reason));
            for unknown in [value(0), value(2), NULL, DONE, ERROR] {
                giving_back().answer(unknown).ends(broken(reason));
            }
        }
    }

    #[test]
    fn without_a_connection_it_ends_broken() {
        for before in [vec![], vec![TAKEN], vec![TAKEN, ERROR, DONE]] {
            let gone = answer_all(acquire(FOREVER), &before);
            let answers = if before.len() == 3 { 2 } else { 3 };
            answer_all(gone, &vec![ERROR; answers]).ends(broken(Reason::Database));
        }
    }
}

/// MariaDB's `max_statement_time`.
mod capped {
    use super::*;

    fn waiting() -> Script<MysqlAcquire> {
        acquire(limit(millis(250)))
            .tries()
            .answer(CAPPED)
            .batch(UNCAP)
            .answer(DONE)
            .waits_at_most(250, "0.250", 10)
    }

    #[test]
    fn the_cap_is_taken_off_for_the_wait_and_put_back_after_the_grant() {
        waiting()
            .answer(GRANTED)
            .batch(RECAP)
            .answer(DONE)
            .ends(Outcome::Success);
        acquire(FOREVER)
            .answer(CAPPED)
            .batch(UNCAP)
            .answer(DONE)
            .waits()
            .answer(GRANTED)
            .batch(RECAP)
            .answer(DONE)
            .ends(Outcome::Success);
    }

    #[test]
    fn the_cap_is_put_back_before_a_timeout() {
        waiting()
            .answer(TAKEN)
            .batch(RECAP)
            .at(millis(250))
            .answer(DONE)
            .ends(Outcome::TimedOut);
    }

    #[test]
    fn the_cap_is_put_back_before_it_asks_again_and_taken_off_again() {
        waiting()
            .answer(TAKEN)
            .batch(RECAP)
            .at(millis(249))
            .answer(DONE)
            .sleep(PAUSE)
            .answer(DONE)
            .tries()
            .answer(CAPPED)
            .batch(UNCAP)
            .answer(DONE)
            .waits_at_most(1, "0.001", 10)
            .answer(GRANTED)
            .batch(RECAP)
            .answer(DONE)
            .ends(Outcome::Success);
        // The setting was changed meanwhile: there is nothing to put back the second time.
        waiting()
            .answer(TAKEN)
            .answer(DONE)
            .sleep(PAUSE)
            .answer(DONE)
            .tries()
            .answer(TAKEN)
            .waits_at_most(250, "0.250", 10)
            .answer(GRANTED)
            .ends(Outcome::Success);
    }

    #[test]
    fn the_cap_is_put_back_before_a_deadlock_is_told() {
        for errno in DEADLOCKS {
            waiting()
                .fails_with(errno)
                .batch(RECAP)
                .answer(DONE)
                .asks_whether_held()
                .answer(value(0))
                .ends(clean(Reason::Deadlock));
        }
        waiting()
            .fails_with(1305)
            .batch(RECAP)
            .answer(DONE)
            .asks_whether_held()
            .answer(value(0))
            .ends(clean(Reason::Unsupported));
    }

    #[test]
    fn the_cap_is_put_back_after_every_interruption_before_the_hold_is_asked_for() {
        for (answers, reason) in unclear_answers() {
            let asking = || {
                answer_all(waiting(), &answers)
                    .batch(RECAP)
                    .answer(DONE)
                    .asks_whether_held()
            };
            asking().answer(value(0)).ends(clean(reason));
            asking()
                .answer(value(1))
                .gives_back()
                .answer(value(1))
                .ends(clean(reason));
            asking().answer(ERROR).ends(broken(reason));
        }
        for errno in TIMEOUTS {
            waiting()
                .fails_with(errno)
                .batch(RECAP)
                .answer(DONE)
                .asks_whether_held()
                .answer(value(1))
                .ends(Outcome::Success);
        }
    }

    #[test]
    fn a_cap_that_cannot_be_put_back_breaks_the_session_whatever_came_before() {
        let mut before: Vec<_> = unclear_answers().into_iter().map(|(all, _)| all).collect();
        before.extend([vec![GRANTED], vec![TAKEN], vec![ERROR, DONE, value(3058)]]);
        for answers in before {
            for failed in [ERROR, NULL, value(1)] {
                answer_all(waiting(), &answers)
                    .batch(RECAP)
                    .answer(failed)
                    .ends(broken(Reason::Database));
            }
        }
    }

    #[test]
    fn a_cap_that_cannot_be_taken_off_ends_it_without_a_wait() {
        for failed in [ERROR, NULL, value(1)] {
            acquire(FOREVER)
                .answer(CAPPED)
                .batch(UNCAP)
                .answer(failed)
                .ends(clean(Reason::Database));
        }
    }

    #[test]
    fn without_a_connection_it_ends_broken() {
        answer_all(waiting(), &[ERROR, ERROR, ERROR]).ends(broken(Reason::Database));
    }
}

mod releasing {
    use super::*;

    #[test]
    fn one_hold_is_released_by_one_query() {
        release()
            .gives_back()
            .answer(value(1))
            .ends(Outcome::Success);
    }

    #[test]
    fn a_lock_of_another_session_or_of_nobody_was_lost() {
        for answer in [value(0), NULL] {
            release().answer(answer).ends(clean(Reason::NotHeld));
        }
    }

    #[test]
    fn anything_else_breaks_the_session() {
        for answer in [DONE, ERROR, error("1317"), value(2), value(-1)] {
            release().answer(answer).ends(broken(Reason::Database));
        }
    }
}

/// Nobody waits for the answer any more, which the next question would be given.
mod abandoning {
    use super::*;

    const BROKEN: Abandoned = Abandoned {
        messages: Vec::new(),
        broken: true,
        waiting: false,
    };

    /// What a wait may have left is released, also if a cancel hits the first message.
    fn reclaims(waiting: bool) -> Abandoned {
        let message =
            format!("DO IF(IS_USED_LOCK({REPORT}) <=> CONNECTION_ID(), RELEASE_LOCK({REPORT}), 0)");
        Abandoned {
            messages: vec![message.clone().into(), message.into()],
            broken: true,
            waiting,
        }
    }

    #[test]
    fn answers_are_not_skipped() {
        const { assert!(!Mysql::SKIPS_UNREAD_ANSWERS) };
    }

    #[test]
    fn a_hold_is_given_up_in_one_message() {
        let release = format!("DO RELEASE_LOCK({REPORT})");
        for (transaction, expected) in [
            (OpenTransaction::None, release.clone()),
            (OpenTransaction::RollBack, format!("ROLLBACK; {release}")),
            (OpenTransaction::Keep, release),
        ] {
            let message = Mysql::release_unread(&key("report"), Mode::Exclusive, transaction);
            assert_eq!(message, Some(expected));
        }
    }

    #[test]
    fn names_in_text_are_hexadecimal() {
        let key = key("it's \\ a `name`");
        let transaction = OpenTransaction::None;
        let message = Mysql::release_unread(&key, Mode::Exclusive, transaction).unwrap();
        let hex = message
            .strip_prefix("DO RELEASE_LOCK(CONVERT(x'")
            .and_then(|rest| rest.strip_suffix("' USING utf8mb4))"))
            .unwrap();
        assert!(hex.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hex}");
        assert_eq!(hex.len(), 2 * key.len());
    }

    #[test]
    fn a_conversation_that_can_be_abandoned_is_the_same_but_for_the_text_of_its_try() {
        fn same(one: &Step, other: &Step) {
            match (one, other) {
                (Step::Query(one), Step::Query(other)) => {
                    let text = one.text();
                    let text = if text == TRY { TRY_OR_RELEASE } else { &text };
                    assert_eq!(other.text(), text);
                    assert_ne!(one.nonce, other.nonce);
                }
                _ => assert_eq!(one, other),
            }
        }
        let key = key("report");
        for wait in [FOREVER, Wait::TRY, poll(None)] {
            let mut one = Mysql::acquire(&key, Mode::Exclusive, wait, None);
            let mut other = Mysql::acquire_abandonable(&key, Mode::Exclusive, wait, None);
            same(&one.start(), &other.start());
            for answer in [TAKEN, ERROR, DONE, value(1317), value(0)] {
                same(
                    &one.next(answer.clone(), Duration::ZERO),
                    &other.next(answer, Duration::ZERO),
                );
                assert_eq!(one.abandon(), other.abandon());
            }
        }
    }

    #[test]
    fn a_sleep_leaves_nothing_behind() {
        for sleeping in [
            acquire(poll(None)).answer(TAKEN).sleep(millis(50)),
            acquire(FOREVER).answer(TAKEN).answer(TAKEN).sleep(PAUSE),
            acquire(limit(millis(250)))
                .answer(CAPPED)
                .answer(DONE)
                .fails_with(3024)
                .batch(RECAP)
                .answer(DONE)
                .answer(value(0))
                .sleep(PAUSE),
        ] {
            assert_eq!(sleeping.abandoned(), Abandoned::default());
        }
    }

    #[test]
    fn a_wait_goes_on_until_somebody_cancels_it() {
        for waiting in [
            acquire(FOREVER).answer(TAKEN).waits(),
            acquire(FOREVER).answer(CAPPED).answer(DONE).waits(),
            acquire(limit(millis(250)))
                .answer(TAKEN)
                .waits_at_most(250, "0.250", 10),
        ] {
            assert_eq!(waiting.abandoned(), reclaims(true));
        }
    }

    /// An outer guard may hold the lock.
    #[test]
    fn the_first_try_and_what_follows_its_failure_break_the_session() {
        for asked in [
            acquire(FOREVER).tries(),
            acquire(FOREVER).answer(ERROR).batch(KEEP_ERRNO),
            acquire(FOREVER)
                .answer(ERROR)
                .answer(DONE)
                .query(READ_ERRNO, &[]),
            acquire(FOREVER).answer(NULL).asks_whether_held(),
        ] {
            assert_eq!(asked.abandoned(), BROKEN);
        }
        assert_eq!(release().gives_back().abandoned(), BROKEN);
    }

    #[test]
    fn after_it_was_taken_whatever_may_be_held_is_released() {
        let waited = || acquire(FOREVER).answer(TAKEN);
        let capped = || acquire(FOREVER).answer(CAPPED);
        for asked in [
            acquire(poll(None)).answer(TAKEN).answer(DONE).tries(),
            capped().batch(UNCAP),
            capped().answer(DONE).answer(GRANTED).batch(RECAP),
            capped().answer(DONE).answer(TAKEN).batch(RECAP),
            waited().answer(ERROR).batch(KEEP_ERRNO),
            waited().answer(NULL).asks_whether_held(),
            waited().answer(NULL).answer(value(1)).gives_back(),
        ] {
            assert_eq!(asked.abandoned(), reclaims(false));
        }
    }
}

/// Of a guard whose `release` may be dropped.
mod releasing_abandonably {
    use super::*;

    fn release() -> Script<MysqlRelease> {
        let release = Mysql::release_abandonable(&key("report"), Mode::Exclusive, None);
        play(release).query(
            TRY_OR_RELEASE,
            &[[Piece::Integer(1)], name(), name()].concat(),
        )
    }

    #[test]
    fn the_statement_of_the_try_releases_for_the_driver_has_prepared_that() {
        let trying = Mysql::acquire_abandonable(&key("report"), Mode::Exclusive, FOREVER, None);
        let trying = play(trying).query(
            TRY_OR_RELEASE,
            &[[Piece::Integer(0)], name(), name()].concat(),
        );
        assert!(trying.statement().cached && release().statement().cached);
    }

    #[test]
    fn it_is_released_or_was_lost() {
        release().answer(value(1)).ends(Outcome::Success);
        for lost in [value(0), NULL] {
            release().answer(lost).ends(clean(Reason::NotHeld));
        }
    }

    #[test]
    fn anything_else_breaks_the_session() {
        for answer in [ERROR, DONE, value(-1), value(2), Answer::OutOfStep] {
            release().answer(answer).ends(broken(Reason::Database));
        }
    }

    /// To release once more could take an outer guard's hold.
    #[test]
    fn nothing_is_sent_behind_it() {
        let nothing = Abandoned {
            broken: true,
            ..Abandoned::default()
        };
        assert_eq!(release().abandoned(), nothing);
    }
}

/// The answer to another question is never believed.
mod out_of_step {
    use super::*;

    #[test]
    fn it_breaks_the_session_wherever_it_is_noticed() {
        let waited = || acquire(FOREVER).answer(TAKEN);
        for asked in [
            acquire(FOREVER).tries(),
            waited().waits(),
            waited().answer(NULL).asks_whether_held(),
            waited().answer(NULL).answer(value(1)).gives_back(),
            waited().answer(ERROR).answer(DONE).query(READ_ERRNO, &[]),
        ] {
            asked
                .answer(Answer::OutOfStep)
                .ends(broken(Reason::Database));
        }
        release()
            .answer(Answer::OutOfStep)
            .ends(broken(Reason::Database));
    }

    #[test]
    fn every_question_about_a_lock_has_a_nonce_of_its_own() {
        let mut nonces = Vec::new();
        for asked in [
            acquire(FOREVER),
            acquire(FOREVER).answer(TAKEN),
            acquire(limit(millis(250))).answer(TAKEN),
            acquire(FOREVER).answer(NULL).asks_whether_held(),
            acquire(FOREVER).answer(ERROR).answer(DONE),
        ] {
            nonces.push(asked.statement().nonce.expect("a nonce"));
        }
        nonces.push(release().statement().nonce.expect("a nonce"));
        let is_held = Mysql::is_held(&key("report"), Mode::Exclusive);
        nonces.push(is_held.nonce.expect("a nonce"));
        for (at, nonce) in nonces.iter().enumerate() {
            assert_eq!(nonces.iter().position(|other| other == nonce), Some(at));
        }
    }

    #[test]
    fn a_nonce_is_taken_off_its_answer_and_refuses_others() {
        let statement = Mysql::is_held(&key("report"), Mode::Exclusive);
        let nonce = statement.nonce.expect("a nonce");
        let [Piece::Sql(_), Piece::BigInt(number), ..] = statement.pieces[..] else {
            panic!("{statement:?}");
        };
        let number = number + (1 << 62);
        assert_eq!(nonce.check(None), Ok(None));
        for code in [-1, 0, 1, 1690, 3024, 0xffff] {
            assert_eq!(nonce.check(Some(number + code)), Ok(Some(code)));
        }
        for other in [0, 1, -1, 42, i64::MIN, i64::MAX, -number, number - 2] {
            assert_eq!(
                nonce.check(Some(other)),
                Err(dlock_core::OutOfStep),
                "{other}"
            );
        }
        // The answer to the same question of a moment ago.
        let next = Mysql::is_held(&key("report"), Mode::Exclusive)
            .nonce
            .unwrap();
        assert!(next.check(Some(number)).is_err() || next.check(Some(number + 1)).is_err());
    }
}

/// What the statements carry.
mod sent {
    use super::*;

    /// Every query with the key's name that the machines can send.
    fn queries(key: &str, mode: Mode, fence: Option<Fence>) -> Vec<dlock_core::Statement> {
        let key = key.to_owned();
        let mut acquire = Mysql::acquire(&key, mode, limit(millis(1_500)), fence);
        let mut unlimited = Mysql::acquire(&key, mode, FOREVER, fence);
        unlimited.start();
        let steps = [
            acquire.start(),
            acquire.next(TAKEN, Duration::ZERO),
            acquire.next(NULL, Duration::ZERO),
            acquire.next(value(1), Duration::ZERO),
            unlimited.next(TAKEN, Duration::ZERO),
            Mysql::release(&key, mode, fence).start(),
        ];
        let statement = |step| match step {
            Step::Query(statement) => statement,
            other => panic!("{other:?}"),
        };
        steps.map(statement).to_vec()
    }

    #[test]
    fn the_name_travels_as_bytes_and_never_in_the_text() {
        let names = [
            key("report"),
            key("it's; drop table accounts; --"),
            key("ÜSER/001"),
            key(b"\x00\xff"),
            key(i64::MIN),
            key((-1, i32::MIN)),
            key(LockKey::namespaced("*/ KILL 1; /*", "?")),
        ];
        for name in &names {
            let statements = queries(name, Mode::Exclusive, None);
            for (statement, other) in statements
                .iter()
                .zip(queries("other", Mode::Exclusive, None))
            {
                assert_eq!(statement.text(), other.text());
                assert!(!statement.text().contains(name.as_str()));
                assert_eq!(
                    script::binds(statement),
                    [Piece::Binary(name.clone().into_bytes())]
                );
            }
        }
    }

    #[test]
    fn transactions_and_modes_change_nothing() {
        let texts = |mode, fence| -> Vec<_> {
            let queries = queries("report", mode, fence);
            queries.iter().map(|statement| statement.text()).collect()
        };
        let plain = texts(Mode::Exclusive, None);
        assert_eq!(texts(Mode::Exclusive, Some(Fence::new())), plain);
        assert_eq!(texts(Mode::Shared, Some(Fence::new())), plain);
    }

    #[test]
    fn only_statements_with_one_of_few_texts_are_kept_prepared() {
        for statement in queries("report", Mode::Exclusive, None) {
            // A wait that fails half-way hangs a client that executes it again.
            let waits = statement.text().contains("MAX_EXECUTION_TIME");
            assert_eq!(statement.cached, !waits);
        }
    }
}

/// Every sequence of answers, against what may be known of the server.
mod any_answers {
    use super::*;

    fn answers() -> [Answer; 10] {
        [
            Answer::OutOfStep,
            DONE,
            NULL,
            TAKEN,
            GRANTED,
            CAPPED,
            ERROR,
            value(3024),
            value(3058),
            value(1317),
        ]
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Sent {
        Try,
        Uncap,
        Wait,
        KeepErrno,
        ReadErrno,
        Recap,
        AskHeld,
        Release,
    }

    impl Sent {
        fn of(step: &Step) -> Option<Sent> {
            let text = match step {
                Step::Query(statement) => statement.text(),
                Step::Batch(text) => text.to_string(),
                Step::Sleep(_) | Step::Done(_) => return None,
            };
            let text = text.as_str();
            Some(match text {
                UNCAP => Sent::Uncap,
                RECAP => Sent::Recap,
                KEEP_ERRNO => Sent::KeepErrno,
                READ_ERRNO => Sent::ReadErrno,
                _ if text.starts_with(ask!("CASE GET_LOCK(")) => Sent::Try,
                _ if text.starts_with(explained!("SELECT /*+ MAX_EXECUTION_TIME(")) => Sent::Wait,
                _ if text.starts_with(ask!("(IS_USED_LOCK(")) => Sent::AskHeld,
                _ if text.starts_with(ask!("RELEASE_LOCK(")) => Sent::Release,
                _ => panic!("unknown: {text}"),
            })
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Known {
        No,
        Maybe,
        Yes,
    }

    /// What is known of the lock and of the session's setting.
    struct Acquiring {
        wait: Wait,
        held: Known,
        /// The server has said that the session did not hold the lock before.
        not_held_before: bool,
        /// The last try said so.
        capped: bool,
        /// `max_statement_time` is ours, not the user's.
        uncapped: bool,
        /// A lock was asked for, and since then nobody slept.
        asked: bool,
    }

    impl Acquiring {
        fn new(wait: Wait) -> Self {
            Acquiring {
                wait,
                held: Known::No,
                not_held_before: false,
                capped: false,
                uncapped: false,
                asked: false,
            }
        }
    }

    impl Witness for Acquiring {
        fn sent(&mut self, step: &Step) {
            match Sent::of(step) {
                sleep_or_try @ (None | Some(Sent::Try)) => {
                    assert_eq!(self.held, Known::No, "goes on while it may have it");
                    assert!(!self.uncapped, "goes on with the setting changed");
                    if sleep_or_try.is_some() {
                        assert!(!self.asked, "asks again without a pause");
                    }
                    self.asked = sleep_or_try.is_some();
                }
                Some(Sent::Wait) => {
                    assert_eq!(self.held, Known::No, "asks again while it may have it");
                    assert_eq!(self.uncapped, self.capped, "waits under the cap");
                    assert_eq!(self.wait.poll, None, "waits in the queue");
                }
                Some(Sent::Uncap) => assert!(self.capped && !self.uncapped),
                Some(Sent::Recap) => assert!(self.uncapped),
                Some(Sent::Release) => {
                    assert!(self.not_held_before, "may release an outer hold");
                    assert_eq!(self.held, Known::Yes, "releases what it has not");
                }
                Some(Sent::KeepErrno | Sent::ReadErrno | Sent::AskHeld) => {}
            }
        }

        fn answered(&mut self, step: &Step, answer: &Answer, _elapsed: Duration) {
            let Some(sent) = Sent::of(step) else { return };
            match (sent, answer) {
                (Sent::Try | Sent::Wait, Answer::Value(Some(1))) => self.held = Known::Yes,
                (Sent::Try, Answer::Value(Some(said @ (0 | -1)))) => {
                    self.not_held_before = true;
                    self.capped = *said == -1;
                }
                (Sent::Wait, Answer::Value(Some(0))) => {}
                (Sent::Try | Sent::Wait, _) => self.held = Known::Maybe,

                (Sent::AskHeld, Answer::Value(Some(0))) => self.held = Known::No,
                // Otherwise it may be an outer guard's alone.
                (Sent::AskHeld, Answer::Value(Some(1))) if self.not_held_before => {
                    self.held = Known::Yes;
                }
                (Sent::Release, Answer::Value(Some(1))) => self.held = Known::No,
                (Sent::Release, _) => self.held = Known::Maybe,

                (Sent::Uncap, Answer::Done) => self.uncapped = true,
                (Sent::Recap, Answer::Done) => self.uncapped = false,
                (
                    Sent::KeepErrno | Sent::ReadErrno | Sent::AskHeld | Sent::Uncap | Sent::Recap,
                    _,
                ) => {}
            }
        }

        fn abandoned(&self, step: &Step, abandoned: &Abandoned) {
            // The next question would be given the answer that nobody reads.
            assert!(abandoned.broken || abandoned.messages.is_empty());
            if Sent::of(step).is_some() {
                let reclaims = abandoned.messages.len() == 2;
                assert_eq!(reclaims, self.not_held_before, "may release an outer hold");
            }
            assert_eq!(abandoned.waiting, Sent::of(step) == Some(Sent::Wait));
            if !abandoned.broken {
                assert!(matches!(step, Step::Sleep(_)), "out of step");
                assert_eq!(self.held, Known::No, "the session may hold the lock");
                assert!(!self.uncapped, "the setting is changed");
            }
        }

        fn ended(&mut self, outcome: Outcome, elapsed: Duration) {
            if matches!(outcome, Outcome::Failed(failure) if failure.broken) {
                return;
            }
            assert!(!self.uncapped, "the setting is changed");
            match outcome {
                Outcome::Success => assert_eq!(self.held, Known::Yes, "not granted"),
                Outcome::TimedOut => {
                    assert_eq!(self.held, Known::No, "the session may hold the lock");
                    assert!(elapsed >= self.wait.limit.expect("a limit"), "too early");
                }
                Outcome::Failed(_) => {
                    assert_eq!(self.held, Known::No, "the session may hold the lock");
                }
            }
        }
    }

    #[test]
    fn acquiring_leaves_neither_a_lock_nor_a_setting_behind() {
        for wait in [
            FOREVER,
            Wait::TRY,
            limit(millis(100)),
            poll(None),
            poll(Some(millis(100))),
        ] {
            let machine = || Mysql::acquire(&key("report"), Mode::Exclusive, wait, None);
            let conversations = walk(machine, || Acquiring::new(wait), &answers(), 8);
            assert!(conversations > answers().len());
        }
    }
}
