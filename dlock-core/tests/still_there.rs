//! A session that has ended is told from one that has answered with an error, where the driver does not tell them apart.
#![cfg(all(feature = "postgres", feature = "mysql", feature = "sqlite"))]

mod script;

use std::num::NonZeroU32;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Dialect, Failure, Machine, Mysql, Postgres, Reason, Session,
    Sqlite, Step, StillThere,
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
            // Of another kind than asked for.
            Answer::Rows(_) => Err(self.failure()),
            Answer::Done => Ok(()),
        })
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::default()
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

const AFTERMATHS: [Aftermath; 4] = [
    Aftermath::Clean,
    Aftermath::MarkBroken,
    Aftermath::EndSession,
    Aftermath::EndSessionUnread,
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
            // A question that was killed looks the same on MySQL: what is to be ended is ended.
            let is_sure = *answer == lost();
            let aftermath = match aftermath {
                Aftermath::EndSession | Aftermath::EndSessionUnread if !is_sure => aftermath,
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
        assert_eq!(script().abandoned(), Abandoned::default());
        assert_eq!(script().answer(DONE).ended(), Ok(()));
        // There was no error.
        script().answer(NULL).failed(work().failure());
        let failure = Fails(Reason::Lost, Aftermath::MarkBroken).failure();
        failing::<D>(&Reason::Lost, Aftermath::MarkBroken).failed(failure.because());
    }
    of::<Postgres>();
    of::<Mysql>();
    of::<Sqlite>();
    // A session of SQLite is not lost.
    let failure = Fails(Reason::Database, Aftermath::Clean).failure();
    failing::<Sqlite>(&Reason::Database, Aftermath::Clean).failed(failure.because());
}

/// What the failure asks for has not been done.
#[test]
fn a_conversation_that_is_abandoned_while_it_asks_ends_what_is_to_be_ended() {
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
    for aftermath in [Aftermath::EndSession, Aftermath::EndSessionUnread] {
        let ended = abandoned::<Postgres>(aftermath);
        assert_eq!(ended, broken(&[Postgres::END_SESSION]));
        let ended = abandoned::<Mysql>(aftermath);
        assert_eq!(ended, broken(&[Mysql::END_SESSION]));
    }
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
