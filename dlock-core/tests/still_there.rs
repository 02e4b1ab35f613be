//! A session that has ended is told from one that has answered with an error, where the driver does not tell them apart.
#![cfg(all(feature = "postgres", feature = "mysql", feature = "sqlite"))]

mod script;

use std::num::NonZeroU32;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Cause, Dialect, ErrorFields, Failure, Machine, Mysql,
    Postgres, Reason, Session, Sqlite, Step, StillThere, TransactionDialect,
};

use self::script::*;

/// Fails with its first answer, as it is told.
#[derive(Debug)]
struct Fails(Reason, Aftermath);

impl Machine for Fails {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Batch("work".into())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        Step::Done(match answer {
            Answer::Error(error) => Err(Failure {
                cause: error.cause,
                ..self.failure()
            }),
            // After an error that was before.
            Answer::Rows(_) => Err(self.failure().because()),
            Answer::Done => Ok(()),
        })
    }

    fn abandon(&self) -> Abandoned {
        Abandoned {
            cancel: true,
            ..Abandoned::default()
        }
    }
}

impl Fails {
    fn failure(&self) -> Failure {
        Failure {
            aftermath: self.1,
            key: Some(Box::new(LockKey::from("one of several"))),
            ..clean(self.0.clone())
        }
    }
}

const AFTERMATHS: [Aftermath; 3] = [
    Aftermath::Clean,
    Aftermath::MarkBroken,
    Aftermath::EndSession,
];

fn failing<D: Dialect>(reason: &Reason, aftermath: Aftermath) -> Script<StillThere<D, Fails>> {
    let work = Fails(reason.clone(), aftermath);
    play(StillThere::new(work)).batch("work").answer(plain())
}

/// After these reasons the session is asked by this message, and is there or has ended.
fn asks<D: Dialect>(reasons: &[Reason], message: &str, there: &[Answer], gone: &[Answer]) {
    for (reason, aftermath) in reasons
        .iter()
        .flat_map(|reason| AFTERMATHS.map(|aftermath| (reason, aftermath)))
    {
        let asked = || failing::<D>(reason, aftermath).batch(message);
        for answer in there {
            asked()
                .answer(answer.clone())
                .failed(Fails(reason.clone(), aftermath).failure().because());
        }
        for answer in gone {
            // A question that was killed looks the same on MySQL, so no less is done.
            let is_sure = *answer == lost();
            let aftermath = match aftermath {
                Aftermath::EndSession if !is_sure => aftermath,
                _ => Aftermath::MarkBroken,
            };
            asked()
                .answer(answer.clone())
                .failed(Fails(Reason::Lost, aftermath).failure().because());
        }
    }
}

#[test]
fn a_session_is_asked_after_an_error_that_may_be_its_end() {
    let reasons = [
        Reason::Database,
        Reason::Interrupted,
        Reason::Deadlock,
        Reason::TooManyLocks,
        Reason::Unsupported,
    ];
    // An aborted transaction answers with an error.
    asks::<Postgres>(&reasons, "SELECT 1", &[DONE, plain()], &[lost()]);
    // Drivers do not tell, so it is asked only where nothing else is known.
    let message = "SET @dlock_there = 1";
    asks::<Mysql>(&reasons[..1], message, &[DONE], &[plain(), lost()]);
    for reason in &reasons[1..] {
        let failure = Fails(reason.clone(), Aftermath::Clean).failure();
        failing::<Mysql>(reason, Aftermath::Clean).failed(failure.because());
    }
}

#[test]
fn nothing_is_asked_otherwise() {
    fn of<D: Dialect>() {
        let work = || Fails(Reason::Database, Aftermath::Clean);
        let script = || play(StillThere::<D, _>::new(work()));
        assert!(script().abandoned().cancel, "what the conversation says");
        assert_eq!(script().answer(DONE).ended(), Ok(()));
        // The session has answered.
        script().answer(NULL).failed(work().failure().because());
        let failure = Fails(Reason::Lost, Aftermath::MarkBroken).failure();
        failing::<D>(&Reason::Lost, Aftermath::MarkBroken).failed(failure.because());
        // The answer would belong to another question.
        let failure = Fails(Reason::Database, Aftermath::EndSessionUnread).failure();
        failing::<D>(&Reason::Database, Aftermath::EndSessionUnread).failed(failure.because());
    }
    of::<Postgres>();
    of::<Mysql>();
    of::<Sqlite>();
    // A session of SQLite is not lost.
    let failure = Fails(Reason::Database, Aftermath::Clean).failure();
    failing::<Sqlite>(&Reason::Database, Aftermath::Clean).failed(failure.because());
}

#[test]
fn an_abandoned_question_carries_out_what_the_failure_asks_for() {
    fn abandoned<D: Dialect>(aftermath: Aftermath) -> Abandoned {
        failing::<D>(&Reason::Database, aftermath).abandoned()
    }
    let broken = |messages: &[&'static str]| Abandoned {
        messages: messages.iter().map(|message| (*message).into()).collect(),
        broken: true,
        ..Abandoned::default()
    };
    let clean = abandoned::<Postgres>(Aftermath::Clean);
    assert_eq!(clean, Abandoned::default());
    // The next question would be given the answer.
    assert_eq!(abandoned::<Mysql>(Aftermath::Clean), broken(&[]));
    let deadlock = failing::<Postgres>(&Reason::Deadlock, Aftermath::EndSession).abandoned();
    for ended in [abandoned::<Postgres>(Aftermath::EndSession), deadlock] {
        assert_eq!(ended, broken(Postgres::END_SESSION));
    }
    let ended = abandoned::<Mysql>(Aftermath::EndSession);
    assert_eq!(ended, broken(Mysql::END_SESSION));
    let marked = abandoned::<Postgres>(Aftermath::MarkBroken);
    assert_eq!(marked, broken(&[]));
}

/// The server's last words are the answer to what was asked: "terminating connection due to administrator command".
#[test]
fn a_lock_inside_a_transaction_of_a_session_that_has_just_ended_is_lost() {
    let ask = Ask {
        inside_transaction: true,
        droppable: true,
        ..Ask::new(LockKey::from(42))
    };
    let session = Session {
        depth: NonZeroU32::new(1),
        test_transaction: false,
    };
    let machine = Postgres::acquire(&ask, session).expect("a key");
    play(StillThere::<Postgres, _>::new(machine))
        .answer(plain())
        .batch("SELECT 1")
        .answer(lost())
        .failed(gone());
}

/// What a wait for the second of two locks of a transaction fails with, if the session is gone when it is undone.
fn lost_at_the_second<T: std::fmt::Debug>(mut machine: impl Machine<Output = T>) -> Failure {
    machine.start(Duration::ZERO);
    let answers = [
        token("dlock_taken"),
        DONE,
        DONE,
        // The second is taken, also when it is tried alone. Then the wait fails, and is undone.
        value(-2),
        value(0),
        detail("The first words."),
        DONE,
    ];
    for answer in answers {
        let step = machine.next(answer, Duration::ZERO);
        assert!(!matches!(step, Step::Done(_)), "{step:?}");
    }
    let closed = Answer::Error(ErrorFields {
        lost: true,
        cause: Cause::new("closed"),
        ..ErrorFields::default()
    });
    match machine.next(closed, Duration::ZERO) {
        Step::Done(Err(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_loss_at_one_of_several_locks_names_it_and_tells_the_first_error() {
    let session = Session {
        depth: NonZeroU32::new(1),
        test_transaction: false,
    };
    let ask = Ask::all([1, 2].map(LockKey::from));
    let inside = Postgres::acquire_in_transaction(&ask, session).expect("valid keys");
    let begun = Postgres::begin(&ask).expect("valid keys");
    for failure in [lost_at_the_second(inside), lost_at_the_second(begun)] {
        assert_eq!(failure.reason, Reason::Lost);
        assert_eq!(failure.aftermath, Aftermath::MarkBroken);
        assert_eq!(failure.key.as_deref(), Some(&LockKey::from(2)));
        assert_eq!(failure.cause.get::<&str>(), Some(&DRIVERS_ERROR));
    }
}
