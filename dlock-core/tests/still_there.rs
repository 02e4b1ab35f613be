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
        let cause = match answer {
            Answer::Error(error) => error.cause,
            _ => return Step::Done(Ok(())),
        };
        Step::Done(Err(Failure {
            cause,
            ..self.failure()
        }))
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}

impl Fails {
    fn failure(&self) -> Failure {
        Failure {
            aftermath: self.1,
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

fn asked<D: Dialect>(aftermath: Aftermath) -> Script<StillThere<D, Fails>> {
    let work = Fails(Reason::Database, aftermath);
    play(StillThere::new(work)).batch("work").answer(plain())
}

/// The session did, or did not, end.
fn ends<D: Dialect>(message: &str, there: &[Answer], gone: &[Answer]) {
    for aftermath in AFTERMATHS {
        for answer in there {
            asked::<D>(aftermath)
                .batch(message)
                .answer(answer.clone())
                .failed(Fails(Reason::Database, aftermath).failure().because());
        }
        for answer in gone {
            // A question that was killed looks the same on MySQL: what is to be ended is ended.
            let aftermath_of_lost = match aftermath {
                Aftermath::Clean => Aftermath::MarkBroken,
                more => more,
            };
            asked::<D>(aftermath)
                .batch(message)
                .answer(answer.clone())
                .failed(Fails(Reason::Lost, aftermath_of_lost).failure().because());
        }
        // What the failure asks for has not been done.
        assert!(asked::<D>(aftermath).abandoned().broken);
    }
}

#[test]
fn a_session_is_asked_after_an_error_that_nobody_can_name() {
    // An aborted transaction answers with an error.
    ends::<Postgres>("SELECT 1", &[DONE, plain()], &[lost()]);
    // Drivers do not tell.
    ends::<Mysql>("SET @dlock_there = 1", &[DONE], &[plain(), lost()]);
}

#[test]
fn nothing_is_asked_otherwise() {
    fn of<D: Dialect>() {
        for reason in [Reason::Lost, Reason::NotHeld, Reason::Interrupted] {
            let work = || Fails(reason.clone(), Aftermath::Clean);
            let script = play(StillThere::<D, _>::new(work())).answer(plain());
            script.failed(work().failure().because());
        }
        let work = Fails(Reason::Database, Aftermath::Clean);
        let script = play(StillThere::<D, _>::new(work));
        assert_eq!(script.abandoned(), Abandoned::default());
        assert_eq!(script.answer(DONE).ended(), Ok(()));
    }
    of::<Postgres>();
    of::<Mysql>();
    of::<Sqlite>();
    // A session of SQLite is not lost.
    let failure = Fails(Reason::Database, Aftermath::Clean).failure();
    asked::<Sqlite>(Aftermath::Clean).failed(failure.because());
}

/// The server's last words are the answer to what was asked: "terminating connection due to administrator command".
#[test]
fn a_lock_inside_a_transaction_of_a_session_that_has_just_ended_is_lost() {
    let session = Session {
        depth: NonZeroU32::new(1),
        test_transaction: false,
    };
    for droppable in [false, true] {
        let ask = Ask {
            inside_transaction: true,
            droppable,
            ..Ask::new(LockKey::from(42))
        };
        let machine = Postgres::acquire(&ask, session).expect("a key");
        play(StillThere::<Postgres, _>::new(machine))
            .answer(plain())
            .answer(lost())
            .failed(gone());
    }
}
