//! What is asked for, and by which session.

use std::fmt::Debug;
use std::num::NonZeroU32;
use std::time::Duration;

use dlock_core::PostgresKey;
use dlock_core::proto::{Ask, Dialect, Hold, Machine, Postgres, Prepared, Session, Step, Wait};

use crate::postgres_server::{Does, KEY, Message};
use crate::script::{Script, millis, plain, play};

pub(crate) const FOREVER: Wait = Wait {
    limit: None,
    poll: None,
};
pub(crate) const TRY: Wait = limit(Duration::ZERO);

pub(crate) const fn limit(limit: Duration) -> Wait {
    Wait {
        limit: Some(limit),
        poll: None,
    }
}

/// Asks again every 50 ms.
pub(crate) const fn poll(limit: Option<Duration>) -> Wait {
    Wait {
        limit,
        poll: Some(millis(50)),
    }
}

pub(crate) const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};
pub(crate) const INSIDE: Session = at_depth(1);

pub(crate) const fn at_depth(depth: u32) -> Session {
    Session {
        depth: NonZeroU32::new(depth),
        test_transaction: false,
    }
}

/// In the transaction of `begin_test_transaction`.
pub(crate) const IN_TEST: Session = Session {
    test_transaction: true,
    ..INSIDE
};

/// By the signatures of the core, a machine borrows what is asked for.
pub(crate) fn leak(ask: Ask) -> &'static Ask {
    Box::leak(Box::new(ask))
}

pub(crate) type Held = Hold<PostgresKey>;

/// Asks for the key 42. A timeout is no failure.
pub(crate) fn asked(wait: Wait) -> Ask {
    Ask {
        wait,
        name_holders: false,
        inside_transaction: true,
        ..Ask::new(KEY.into())
    }
}

pub(crate) fn droppable(wait: Wait) -> Ask {
    Ask {
        droppable: true,
        ..asked(wait)
    }
}

pub(crate) fn acquire_as(
    ask: Ask,
    session: Session,
) -> Script<impl Machine<Output = Option<Held>>> {
    let ask = leak(ask);
    fresh(ask, || play(Postgres::acquire(ask, session).unwrap()))
}

/// A conversation whose savepoint has a name that no other one has left over. With such a name it asks first whether
/// the session holds the lock, also where nobody may drop it.
pub(crate) fn fresh<S: Asks>(ask: &Ask, start: impl Fn() -> S) -> S {
    loop {
        let script = start();
        if ask.droppable || !script.asks_whether_held() {
            return script;
        }
        // So nobody gets that name again.
        std::mem::forget(script);
    }
}

pub(crate) trait Asks {
    fn asks_whether_held(&self) -> bool;
}

impl<M: Machine<Output: Debug>> Asks for Script<M> {
    fn asks_whether_held(&self) -> bool {
        is_held(self.step())
    }
}

pub(crate) fn is_held<T>(step: &Step<T>) -> bool {
    match step {
        Step::Query(_) => {
            Message::of(step, None).is_some_and(|message| message.statements == [Does::IsHeld])
        }
        _ => false,
    }
}

pub(crate) trait Sends: Sized {
    /// The message says this.
    fn sends<const N: usize>(self, expected: [Does; N]) -> Self;
    /// It takes the lock, with any mark.
    fn asks(self, millis: u32) -> Self;
    /// The statement is kept under this name.
    fn kept_as(self, prepared: Prepared) -> Self;
    /// The limit of its wait has passed, and not more.
    fn times_out(self, limit: u64) -> Self;
    /// What is done if nobody reads the answer.
    fn abandons(&self) -> Vec<Vec<Does>>;
}

impl<M: Machine<Output: Debug>> Sends for Script<M> {
    #[track_caller]
    fn sends<const N: usize>(self, expected: [Does; N]) -> Self {
        assert_eq!(statements(self.step()), expected);
        self
    }

    #[track_caller]
    fn asks(self, expected: u32) -> Self {
        match statements(self.step()).as_slice() {
            [Does::Acquire { millis, .. }] => assert_eq!(*millis, expected),
            other => panic!("{other:?}"),
        }
        self
    }

    #[track_caller]
    fn kept_as(self, prepared: Prepared) -> Self {
        assert_eq!(self.statement().prepared, prepared);
        self
    }

    #[track_caller]
    fn times_out(self, limit: u64) -> Self {
        self.after(millis(limit)).answer(plain())
    }

    #[track_caller]
    fn abandons(&self) -> Vec<Vec<Does>> {
        let messages = self.abandoned().messages.into_iter();
        messages
            .map(|text| Message::of_text(&text, own(&text).as_deref()).statements)
            .collect()
    }
}

/// The savepoint that a text names first.
fn own(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("SAVEPOINT ")?;
    rest.split([';', ' ']).next().map(str::to_owned)
}

#[track_caller]
fn statements<T: Debug>(step: &Step<T>) -> Vec<Does> {
    let own = match step {
        Step::Batch(text) => own(text),
        _ => None,
    };
    let message = Message::of(step, own.as_deref());
    message.unwrap_or_else(|| panic!("{step:?}")).statements
}

pub(crate) trait Acquires {
    type Granted;

    /// The lock was granted.
    fn holds(self) -> Self::Granted;
    /// The limit passed.
    fn gave_up(self);
}

impl<M: Machine<Output = Option<T>>, T: Debug> Acquires for Script<M> {
    type Granted = T;

    #[track_caller]
    fn holds(self) -> T {
        self.ended().expect("failed").expect("gave up")
    }

    #[track_caller]
    fn gave_up(self) {
        assert!(self.ended().expect("failed").is_none());
    }
}

pub(crate) fn savepoint() -> Does {
    Does::Savepoint("own".into())
}

pub(crate) fn back() -> Does {
    Does::BackTo("own".into())
}

pub(crate) fn gone_savepoint() -> Does {
    Does::Release("own".into())
}

/// What PostgreSQL calls itself.
pub(crate) const POSTGRES: &str = "PostgreSQL 17.2 on x86_64-pc-linux-gnu, compiled by gcc";
