//! PostgreSQL's advisory locks.

mod attempt;
mod begin;
mod check;
mod fault;
mod inside;
mod managed;
mod mark;
mod release;
mod semaphore;
mod session;
mod several;
mod sql;
mod transaction;
mod turns;

use std::time::Duration;

use self::several::{BeginSeveral, InsideSteps, Keys, SessionSteps, SeveralInTransaction};
use crate::holder::ServerKind;
use crate::key::SemaphoreLock;
use crate::proto::{
    Abandoned, Answer, AreYouThere, Ask, Cause, Condition, Dialect, DrawToken, Either, Failure,
    Hold, Machine, NameHolders, Parting, Question, Read, Reason, Rows, Session, Several, Statement,
    Step, TransactionDialect,
};
use crate::{FencingToken, Holder, InvalidKey, LockKey, Mode, PostgresKey, Report};

/// PostgreSQL 14 and later.
#[derive(Clone, Copy, Debug)]
pub struct Postgres;

/// The two ways to a session's lock.
#[derive(Debug)]
enum Acquire {
    Session(session::AcquireSession),
    Inside(inside::AcquireInside),
}

impl Acquire {
    fn key(&self) -> PostgresKey {
        match self {
            Acquire::Session(machine) => machine.key(),
            Acquire::Inside(machine) => machine.key(),
        }
    }
}

impl Machine for Acquire {
    type Output = Option<Hold<PostgresKey>>;

    fn start(&mut self, now: Duration) -> Step<Self::Output> {
        match self {
            Acquire::Session(machine) => machine.start(now),
            Acquire::Inside(machine) => machine.start(now),
        }
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<Self::Output> {
        match self {
            Acquire::Session(machine) => machine.next(answer, now),
            Acquire::Inside(machine) => machine.next(answer, now),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self {
            Acquire::Session(machine) => machine.abandon(),
            Acquire::Inside(machine) => machine.abandon(),
        }
    }
}

type AcquireSeveral = Either<NameHolders<Several<SessionSteps>>, NameHolders<Several<InsideSteps>>>;

fn acquire_several(keys: Keys, ask: &Ask, session: Session) -> Result<AcquireSeveral, Failure> {
    ask.check_session(session)?;
    let (wait, droppable) = (ask.wait, ask.droppable);
    Ok(match session.depth {
        None => {
            let several = SessionSteps::several(keys, wait, droppable);
            let ask_holders = |several: &Several<SessionSteps>| {
                ask_holders(several.steps().keys().get(several.at()))
            };
            let taken = |several: &Several<SessionSteps>| {
                Some(several.steps().keys().name(several.at()).clone().into())
            };
            Either::One(NameHolders::new(several, ask, ask_holders).of_several(taken))
        }
        Some(_) => {
            let several = InsideSteps::several(keys, wait, session, droppable);
            let ask_holders = |several: &Several<InsideSteps>| {
                ask_holders(several.steps().keys().get(several.at()))
            };
            let taken = |several: &Several<InsideSteps>| {
                Some(several.steps().keys().name(several.at()).clone().into())
            };
            Either::several(NameHolders::new(several, ask, ask_holders).of_several(taken))
        }
    })
}

fn several_in_transaction(
    keys: Keys,
    ask: &Ask,
    session: Session,
) -> NameHolders<SeveralInTransaction> {
    let several = SeveralInTransaction::new(keys, ask, session);
    let ask_holders =
        |several: &SeveralInTransaction| ask_holders(several.keys().get(several.at()));
    NameHolders::new(several, ask, ask_holders)
        .of_several(|several| Some(several.keys().name(several.at()).clone().into()))
}

fn begin_several(keys: Keys, ask: &Ask) -> NameHolders<BeginSeveral> {
    let begin = BeginSeveral::new(keys, ask);
    let ask_holders = |begin: &BeginSeveral| ask_holders(begin.keys().get(begin.at()));
    NameHolders::new(begin, ask, ask_holders)
        .of_several(|begin| Some(begin.keys().name(begin.at()).clone().into()))
}

fn not_in_transaction<T>() -> Result<T, Failure> {
    Err(Reason::NotInTransaction.clean(Cause::default()))
}

fn keys_of(hold: &Hold<PostgresKey>) -> Vec<PostgresKey> {
    hold.all().map(|hold| hold.key).collect()
}

fn ask_holders(key: PostgresKey) -> Question<Vec<Holder>> {
    ask_for_holders(sql::holders(key))
}

fn ask_slot_holders(gate: i64, permits: u32) -> Question<Vec<Holder>> {
    ask_for_holders(sql::slot_holders(gate, permits))
}

fn ask_for_holders(ask: Statement) -> Question<Vec<Holder>> {
    let unprepared = ask.clone().never_kept();
    let read = |rows| match rows {
        Rows::Holders(holders) => {
            let of_server = |holder: Holder| holder.on(ServerKind::Postgres);
            Read::Accept(holders.into_iter().map(of_server).collect())
        }
        _ => Read::OutOfStep,
    };
    Question::new(vec![ask, unprepared], read, Abandoned::default())
}

fn draw_token(keys: &[PostgresKey], mode: Mode, not_held: fn(Cause) -> Failure) -> DrawToken {
    let draw = sql::draw_token(keys, mode);
    let unprepared = draw.clone().never_kept();
    DrawToken::new(vec![draw, unprepared], not_held)
}

/// The gate of a semaphore. Its slots are the numbers behind it.
fn gate(key: &LockKey, permits: u32) -> Result<i64, InvalidKey> {
    key.check_permits(permits)?;
    key.semaphore_to_postgres(SemaphoreLock::Gate)
}

impl Dialect for Postgres {
    const SERVER: &'static str = "PostgreSQL";

    type Key = PostgresKey;

    const END_SESSION: &'static [&'static str] =
        &[sql::END_SESSION, sql::END_SESSION, sql::END_IDLE_SESSION];

    // An aborted transaction does not obey.
    const ARE_YOU_THERE: Option<AreYouThere> = Some(AreYouThere {
        message: sql::ARE_YOU_THERE,
        driver_tells: true,
    });

    fn acquire(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<PostgresKey>>>, Failure> {
        let key = match ask.is_one() {
            true => ask.key.to_postgres()?,
            false => {
                let keys = Keys::new(ask)?;
                match keys.only() {
                    Some(key) => key,
                    None => return acquire_several(keys, ask, session).map(Either::several),
                }
            }
        };
        ask.check_session(session)?;
        let (mode, wait, droppable) = (ask.mode, ask.wait, ask.droppable);
        let acquire = match session.depth {
            None => Acquire::Session(session::AcquireSession::new(key, mode, wait, droppable)),
            Some(_) => Acquire::Inside(inside::AcquireInside::new(
                key, mode, wait, session, droppable,
            )),
        };
        let ask_holders = |acquire: &Acquire| ask_holders(acquire.key());
        Ok(Either::One(NameHolders::new(acquire, ask, ask_holders)))
    }

    fn acquire_slot(
        ask: &Ask,
        permits: u32,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<PostgresKey>>>, Failure> {
        let gate = gate(&ask.key, permits)?;
        ask.check_session(session)?;
        let acquire = semaphore::AcquireSlot::new(gate, permits, ask, session);
        let ask_holders = |acquire: &semaphore::AcquireSlot| {
            let (gate, permits) = acquire.semaphore();
            ask_slot_holders(gate, permits)
        };
        Ok(NameHolders::new(acquire, ask, ask_holders))
    }

    fn release(hold: Hold<PostgresKey>, session: Session) -> impl Machine<Output = ()> {
        several::release(hold, session)
    }

    fn part(hold: &Hold<PostgresKey>, session: Option<Session>) -> Parting {
        let transaction = hold.open_transaction(session);
        let outside = session.is_some_and(|session| session.depth.is_none());
        // The test's own transaction goes on.
        let in_test =
            hold.depth.is_some() && session.is_some_and(|session| session.test_transaction);
        Parting {
            message: Some(match hold.more.is_empty() {
                true => sql::release_unread(hold.key, hold.mode, transaction),
                false => sql::release_all_unread(&keys_of(hold), hold.mode, transaction),
            }),
            // In an aborted transaction the unlock fails, and nobody would know.
            broken: !outside && !in_test,
            ..Parting::default()
        }
    }

    fn is_held(hold: &Hold<PostgresKey>) -> impl Machine<Output = bool> {
        let read = |rows| match rows {
            Rows::Number(number) => Read::Accept(number == Some(1)),
            _ => Read::OutOfStep,
        };
        let ask = match hold.more.is_empty() {
            true => sql::is_held(hold.key, hold.mode),
            false => sql::all_held(&keys_of(hold), hold.mode),
        };
        let unprepared = ask.clone().never_kept();
        Question::new(vec![ask, unprepared], read, Abandoned::default())
    }

    fn fencing_token(hold: &Hold<PostgresKey>) -> impl Machine<Output = FencingToken> {
        draw_token(&keys_of(hold), hold.mode, Failure::not_held)
    }

    fn held(hold: &Hold<PostgresKey>) -> Condition {
        sql::held(&keys_of(hold), hold.mode)
    }

    fn holders(key: &LockKey) -> Result<impl Machine<Output = Vec<Holder>>, Failure> {
        Ok(ask_holders(key.to_postgres()?))
    }

    fn slot_holders(
        key: &LockKey,
        permits: u32,
    ) -> Result<impl Machine<Output = Vec<Holder>>, Failure> {
        Ok(ask_slot_holders(gate(key, permits)?, permits))
    }

    fn check() -> impl Machine<Output = Report> {
        check::check()
    }
}

impl TransactionDialect for Postgres {
    fn acquire_in_transaction(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<()>>, Failure> {
        let key = match ask.is_one() {
            true => ask.key.to_postgres()?,
            false => {
                let keys = Keys::new(ask)?;
                match keys.only() {
                    Some(key) => key,
                    None if session.depth.is_none() => return not_in_transaction(),
                    None => return Ok(Either::several(several_in_transaction(keys, ask, session))),
                }
            }
        };
        if session.depth.is_none() {
            return not_in_transaction();
        }
        let acquire = transaction::AcquireInTransaction::new(key, ask.mode, ask.wait, session);
        let ask_holders = |acquire: &transaction::AcquireInTransaction| ask_holders(acquire.key());
        Ok(Either::One(NameHolders::new(acquire, ask, ask_holders)))
    }

    fn begin(ask: &Ask) -> Result<impl Machine<Output = Option<()>>, Failure> {
        let key = match ask.is_one() {
            true => ask.key.to_postgres()?,
            false => {
                let keys = Keys::new(ask)?;
                match keys.only() {
                    Some(key) => key,
                    None => return Ok(Either::several(begin_several(keys, ask))),
                }
            }
        };
        let begin = begin::Begin::new(key, ask.mode, ask.wait, ask.droppable);
        let ask_holders = |begin: &begin::Begin| ask_holders(begin.key());
        Ok(Either::One(NameHolders::new(begin, ask, ask_holders)))
    }

    fn fencing_token_in_transaction(
        ask: &Ask,
    ) -> Result<impl Machine<Output = FencingToken>, Failure> {
        let keys = Keys::new(ask)?;
        Ok(draw_token(keys.all(), keys.mode, |cause| {
            Reason::NotHeld.clean(cause)
        }))
    }
}
