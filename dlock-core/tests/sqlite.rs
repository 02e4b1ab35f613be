//! The machines of SQLite, answer by answer.
#![cfg(feature = "sqlite")]

#[expect(dead_code, reason = "no message to SQLite is a batch")]
mod script;

use std::time::Duration;

use dlock_core::{
    Abandoned, Answer, Dialect, Holder, Mode, OpenTransaction, Outcome, Piece, Reason, Sqlite,
    SqliteAcquire, SqliteKey, Step, Wait,
};
use script::{ERROR, NULL, Script, Witness, broken, clean, error, millis, play, value, walk};

const GRANTED: Answer = Answer::Value(Some(1));
const BUSY: Answer = Answer::Value(Some(0));
const GIVEN_UP: Answer = Answer::Value(Some(-1));

fn key() -> SqliteKey {
    Sqlite::key(&42.into()).unwrap()
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

fn acquire(key: SqliteKey, wait: Wait) -> Script<SqliteAcquire> {
    play(Sqlite::acquire(&key, Mode::Exclusive, wait, None))
}

trait Asks: Sized {
    fn asks(self, key: SqliteKey, millis: i64) -> Self;
    fn gives_back(self, key: SqliteKey) -> Self;
}

impl Asks for Script<SqliteAcquire> {
    #[track_caller]
    fn asks(self, key: SqliteKey, millis: i64) -> Self {
        self.query(
            "SELECT dlock_acquire(?, 1, ?, ?)",
            &[
                Piece::BigInt(42),
                Piece::BigInt(millis),
                Piece::BigInt(key.request),
            ],
        )
    }

    #[track_caller]
    fn gives_back(self, key: SqliteKey) -> Self {
        self.query(
            "SELECT dlock_release(?, ?)",
            &[Piece::BigInt(42), Piece::BigInt(key.request)],
        )
    }
}

#[test]
fn each_request_has_a_number_of_its_own() {
    let (one, two) = (key(), key());
    assert_eq!(one.key, two.key);
    assert_ne!(one.request, two.request);
}

#[test]
fn it_waits_where_the_lock_is_asked_for() {
    let key = key();
    let forever = Wait::default();
    acquire(key, forever)
        .asks(key, -1)
        .answer(GRANTED)
        .ends(Outcome::Success);
    acquire(key, limit(millis(250)))
        .asks(key, 250)
        .answer(GRANTED)
        .ends(Outcome::Success);
    acquire(key, limit(Duration::from_nanos(1)))
        .asks(key, 1)
        .answer(GRANTED)
        .ends(Outcome::Success);
    acquire(key, Wait::TRY)
        .asks(key, 0)
        .answer(GRANTED)
        .ends(Outcome::Success);
}

#[test]
fn a_limit_that_passed_is_a_timeout_and_what_is_left_is_waited_for() {
    let key = key();
    acquire(key, Wait::TRY)
        .asks(key, 0)
        .answer(BUSY)
        .ends(Outcome::TimedOut);
    acquire(key, limit(millis(250)))
        .asks(key, 250)
        .at(millis(250))
        .answer(BUSY)
        .ends(Outcome::TimedOut);
    acquire(key, limit(Duration::MAX))
        .asks(key, i32::MAX.into())
        .at(millis(i32::MAX as u64))
        .answer(BUSY)
        .asks(key, i32::MAX.into());
}

#[test]
fn polling_never_waits_in_the_queue() {
    let key = key();
    acquire(key, poll(Some(millis(80))))
        .asks(key, 0)
        .answer(BUSY)
        .sleep(millis(50))
        .at(millis(50))
        .answer(script::DONE)
        .asks(key, 0)
        .answer(BUSY)
        .sleep(millis(30))
        .at(millis(80))
        .answer(script::DONE)
        .asks(key, 0)
        .answer(BUSY)
        .ends(Outcome::TimedOut);
}

#[test]
fn errors_that_were_told_leave_nothing() {
    let key = key();
    let wait = Wait::default();
    let after = |answer| acquire(key, wait).answer(answer);
    after(error(Sqlite::DEADLOCK)).ends(clean(Reason::Deadlock));
    after(error(Sqlite::UNSUPPORTED)).ends(clean(Reason::Unsupported));
    after(GIVEN_UP).ends(clean(Reason::Interrupted));
}

/// Whoever sent the statement has given the request up by its number.
#[test]
fn after_any_other_error_nothing_is_left() {
    for answer in [ERROR, error("another")] {
        acquire(key(), Wait::default())
            .answer(answer)
            .ends(clean(Reason::Database));
    }
}

#[test]
fn after_a_strange_answer_what_may_be_held_is_given_back() {
    let key = key();
    for answer in [NULL, value(7)] {
        let failed = || {
            acquire(key, Wait::default())
                .answer(answer.clone())
                .gives_back(key)
        };
        for released in [BUSY, GRANTED] {
            failed().answer(released).ends(clean(Reason::Database));
        }
        for unclear in [ERROR, NULL, value(7)] {
            failed().answer(unclear).ends(broken(Reason::Database));
        }
    }
}

#[test]
fn shared_is_asked_for_as_shared() {
    let key = key();
    play(Sqlite::acquire(&key, Mode::Shared, Wait::TRY, None)).query(
        "SELECT dlock_acquire(?, 0, ?, ?)",
        &[
            Piece::BigInt(42),
            Piece::BigInt(0),
            Piece::BigInt(key.request),
        ],
    );
}

#[test]
fn a_release_says_whether_the_lock_was_held() {
    let key = key();
    let release = || {
        play(Sqlite::release(&key, Mode::Exclusive, None)).query(
            "SELECT dlock_release(?, ?)",
            &[Piece::BigInt(42), Piece::BigInt(key.request)],
        )
    };
    release().answer(GRANTED).ends(Outcome::Success);
    release().answer(BUSY).ends(clean(Reason::NotHeld));
    release().answer(ERROR).ends(broken(Reason::Database));
    release().answer(NULL).ends(broken(Reason::Database));
}

#[test]
fn who_drops_a_question_learns_which_request_it_was() {
    let key = key();
    let request = |step: &Step| match step {
        Step::Query(statement) => Sqlite::request(statement),
        other => panic!("{other:?}"),
    };
    let acquire = acquire(key, Wait::default());
    assert_eq!(request(acquire.step()), Some(key.request));
    assert_eq!(acquire.abandoned(), Abandoned::default());
    let release = play(Sqlite::release(&key, Mode::Exclusive, None));
    assert_eq!(request(release.step()), Some(key.request));
    assert_eq!(release.abandoned(), Abandoned::default());
    assert_eq!(
        Sqlite::request(&Sqlite::is_held(&key, Mode::Exclusive)),
        None
    );
    assert_eq!(Sqlite::request(&Sqlite::holders(&key)[0]), None);
}

#[test]
fn an_open_transaction_goes_before_the_lock() {
    let key = key();
    let unread = |transaction| Sqlite::release_unread(&key, Mode::Exclusive, transaction);
    assert_eq!(unread(OpenTransaction::None), None);
    assert_eq!(unread(OpenTransaction::Keep), None);
    assert_eq!(
        unread(OpenTransaction::RollBack).as_deref(),
        Some("SAVEPOINT dlock; ROLLBACK")
    );
    // What outer guards hold stays.
    assert_eq!(Sqlite::END_SESSION, "SAVEPOINT dlock; ROLLBACK");
}

#[test]
fn no_statement_names_a_table() {
    let key = key();
    let statements = [
        Sqlite::is_held(&key, Mode::Exclusive).text(),
        Sqlite::holders(&key)[0].text(),
        acquire(key, Wait::TRY).statement().text(),
        Sqlite::END_SESSION.into(),
    ];
    for statement in statements {
        assert!(!statement.contains("FROM"), "{statement}");
    }
}

#[test]
fn holders_are_read_as_they_were_written() {
    let holders = [
        (
            1,
            Holder::from_columns(
                4711,
                Some("billing".into()),
                None,
                1,
                1,
                Some(1_700_000_000_000_001),
            ),
        ),
        (
            2,
            Holder::from_columns(4711, Some("two words\nand lines".into()), None, 0, 1, None),
        ),
        (-3, Holder::from_columns(0, None, None, 1, 0, Some(0))),
    ];
    let read = Sqlite::read_holders(&Sqlite::write_holders(&holders));
    assert_eq!(read[0], holders[0].1);
    assert_eq!(
        read[1].application_name.as_deref(),
        Some("two words and lines")
    );
    assert_eq!(
        (read[1].mode, read[1].granted, read[1].since),
        (Mode::Shared, true, None)
    );
    assert_eq!(read[2], holders[2].1);
    assert_eq!(Sqlite::read_holders(""), []);
    assert_eq!(Sqlite::read_holders("no holder\n1 2\n"), []);
}

/// Somebody who knows what the functions do.
struct Acquiring {
    wait: Wait,
    may_hold: bool,
    asked: bool,
}

impl Witness for Acquiring {
    fn sent(&mut self, step: &Step) {
        if let Step::Query(statement) = step {
            let text = statement.text();
            if text.contains("dlock_acquire") {
                assert!(!self.may_hold, "it may hold the lock already");
            } else {
                assert!(text.contains("dlock_release"), "{text}");
                assert!(self.may_hold, "there is nothing to give back");
            }
        }
    }

    fn answered(&mut self, step: &Step, answer: &Answer, _elapsed: Duration) {
        let Step::Query(statement) = step else {
            return;
        };
        if statement.text().contains("dlock_acquire") {
            self.asked = true;
            // After an error, whoever sent it has given the request up by its number.
            self.may_hold = !matches!(answer, Answer::Value(Some(0 | -1)) | Answer::Error(_));
        } else if matches!(answer, Answer::Value(Some(0 | 1))) {
            self.may_hold = false;
        }
    }

    fn abandoned(&self, _step: &Step, abandoned: &Abandoned) {
        assert_eq!(*abandoned, Abandoned::default());
    }

    fn ended(&mut self, outcome: Outcome, elapsed: Duration) {
        assert!(self.asked);
        match outcome {
            Outcome::Success => assert!(self.may_hold, "it holds nothing"),
            Outcome::TimedOut => {
                assert!(!self.may_hold, "it may hold the lock");
                assert!(self.wait.limit.is_some_and(|limit| limit <= elapsed));
            }
            Outcome::Failed(failure) => assert_eq!(failure.broken, self.may_hold),
        }
    }
}

#[test]
fn no_conversation_ends_with_a_hold_that_nobody_knows_of() {
    let answers = [
        GRANTED,
        BUSY,
        GIVEN_UP,
        NULL,
        ERROR,
        value(7),
        error(Sqlite::DEADLOCK),
        error(Sqlite::UNSUPPORTED),
        error("another"),
    ];
    for wait in [
        Wait::default(),
        Wait::TRY,
        limit(millis(100)),
        poll(None),
        poll(Some(millis(100))),
    ] {
        let machine = || Sqlite::acquire(&key(), Mode::Exclusive, wait, None);
        let witness = || Acquiring {
            wait,
            may_hold: false,
            asked: false,
        };
        let conversations = walk(machine, witness, &answers, 7);
        assert!(conversations > answers.len());
    }
}
