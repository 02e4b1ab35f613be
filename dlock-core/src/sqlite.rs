//! Locks for SQLite, which has none. dlock-diesel adds SQL functions to a connection, and they stand in for a server.

mod acquire;
mod check;
mod holders;
mod key;
mod managed;
mod release;
mod semaphore;
mod several;
mod sql;

use std::time::Duration;

use self::key::SqliteKey;
use self::several::FileLocks;
use crate::holder::ServerKind;
use crate::key::SemaphoreLock;
use crate::proto::{
    Abandoned, AreYouThere, Ask, Condition, Dialect, DrawToken, Either, Failure, Hold, Machine,
    NameHolders, OpenTransaction, Parting, Question, Read, Request, Rows, Session, Several,
    Statement, unique,
};
use crate::{FencingToken, Holder, InvalidKey, LockKey, Report};

/// SQLite, on a connection to which dlock's SQL functions were added.
///
/// Transactions do not touch these locks.
#[derive(Clone, Copy, Debug)]
pub struct Sqlite;

impl Sqlite {
    /// The answer to a request: the lock is granted.
    pub const GRANTED: i64 = sql::GRANTED;
    /// The answer to a request: another session has the lock.
    pub const BUSY: i64 = sql::BUSY;
    /// The answer to a request: it was given up by its number.
    pub const GIVEN_UP: i64 = sql::GIVEN_UP;
    /// The answer to a request for a slot of a semaphore: none is free, or others wait for one.
    pub const NO_SLOT: i64 = sql::NO_SLOT;

    /// The constraint of an error which says that this connection, or this database, can have no locks.
    pub const UNSUPPORTED: &'static str = sql::UNSUPPORTED;

    /// The constraint of an error which says that the holder of the lock waits for this session.
    pub const DEADLOCK: &'static str = sql::DEADLOCK;

    /// The text that [`holders`](Dialect::holders) reads: each holder behind the number of its session, which tells the
    /// connections of a process apart.
    pub fn write_holders(holders: &[(i64, Holder)]) -> String {
        holders::write(holders)
    }
}

fn acquire_several(
    keys: several::Keys,
    ask: &Ask,
    session: Session,
) -> Result<NameHolders<Several<FileLocks>>, Failure> {
    ask.check_session(session)?;
    let several = FileLocks::several(keys, ask, session);
    let ask_holders = |several: &Several<FileLocks>| {
        let (key, _) = several.steps().keys().get(several.at());
        ask_holders(*key)
    };
    Ok(
        NameHolders::new(several, ask, ask_holders).of_several(|several| {
            let (_, name) = several.steps().keys().get(several.at());
            Some(name.clone().into())
        }),
    )
}

/// For a caller who wants to know who has the lock.
const FIRST_WAIT: Duration = Duration::from_secs(1);

fn ask_holders(key: u64) -> Question<Vec<Holder>> {
    ask_for_holders(sql::holders(key))
}

fn ask_slot_holders(gate: u64, permits: u32) -> Question<Vec<Holder>> {
    ask_for_holders(sql::slot_holders(gate, permits))
}

/// The gate of a semaphore. Its slots are the numbers behind it.
fn gate(key: &LockKey, permits: u32) -> Result<u64, InvalidKey> {
    key.check_permits(permits)?;
    key.semaphore_to_sqlite(SemaphoreLock::Gate)
}

fn holds_of(hold: &Hold<SqliteKey>) -> Vec<SqliteKey> {
    hold.all().map(|hold| hold.key).collect()
}

fn ask_for_holders(ask: Statement) -> Question<Vec<Holder>> {
    let read = |rows| match rows {
        Rows::Text(text) => {
            let of_server = |holder: Holder| holder.on(ServerKind::Sqlite);
            Read::Accept(holders::read(&text).into_iter().map(of_server).collect())
        }
        _ => Read::OutOfStep,
    };
    Question::new(vec![ask], read, Abandoned::default())
}

impl Dialect for Sqlite {
    const SERVER: &'static str = "SQLite";

    type Key = SqliteKey;

    // It frees nothing: the connection goes on, and so does the work under outer guards.
    const END_SESSION: &'static [&'static str] = &[sql::ROLL_BACK];

    const ARE_YOU_THERE: Option<AreYouThere> = None;

    fn acquire(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<SqliteKey>>>, Failure> {
        let key = match ask.is_one() {
            true => ask.key.to_sqlite()?,
            false => {
                let keys = several::Keys::new(ask)?;
                match keys.only() {
                    Some(key) => key,
                    None => return acquire_several(keys, ask, session).map(Either::several),
                }
            }
        };
        ask.check_session(session)?;
        let request = Request(unique() as i64);
        let acquire = acquire::Acquire::new(SqliteKey { key, request }, ask, session);
        let ask_holders = |acquire: &acquire::Acquire| ask_holders(acquire.key().key);
        Ok(Either::One(
            NameHolders::new(acquire, ask, ask_holders)
                .without_turns(FIRST_WAIT, |acquire, wait| acquire.wait = wait),
        ))
    }

    fn acquire_slot(
        ask: &Ask,
        permits: u32,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<SqliteKey>>>, Failure> {
        let gate = gate(&ask.key, permits)?;
        ask.check_session(session)?;
        let request = Request(unique() as i64);
        let acquire = semaphore::AcquireSlot::new(gate, permits, request, ask, session);
        let ask_holders = |acquire: &semaphore::AcquireSlot| {
            let (gate, permits) = acquire.semaphore();
            ask_slot_holders(gate, permits)
        };
        Ok(NameHolders::new(acquire, ask, ask_holders)
            .without_turns(FIRST_WAIT, |acquire, wait| acquire.wait = wait))
    }

    fn release(hold: Hold<SqliteKey>, session: Session) -> impl Machine<Output = ()> {
        match hold.more.is_empty() {
            true => Either::One(release::Release::new(hold.key)),
            false => Either::several(several::release_each(hold.into_all(), session)),
        }
    }

    fn part(hold: &Hold<SqliteKey>, session: Option<Session>) -> Parting {
        let roll_back = hold.open_transaction(session) == OpenTransaction::RollBack;
        Parting {
            message: roll_back.then(|| sql::ROLL_BACK.into()),
            // Diesel does not know of the rollback.
            broken: roll_back,
            request: Some(hold.key.request),
            more_requests: hold.more.iter().map(|hold| hold.key.request).collect(),
        }
    }

    fn requests(hold: &Hold<SqliteKey>) -> impl Iterator<Item = Request> + use<> {
        let more: Vec<_> = hold.more.iter().map(|hold| hold.key.request).collect();
        std::iter::once(hold.key.request).chain(more)
    }

    fn is_held(hold: &Hold<SqliteKey>) -> impl Machine<Output = bool> {
        let read = |rows| match rows {
            Rows::Number(number) => Read::Accept(number == Some(1)),
            _ => Read::OutOfStep,
        };
        let ask = match hold.more.is_empty() {
            true => sql::is_held(hold.key),
            false => sql::all_held(&holds_of(hold)),
        };
        Question::new(vec![ask], read, Abandoned::default())
    }

    fn fencing_token(hold: &Hold<SqliteKey>) -> impl Machine<Output = FencingToken> {
        DrawToken::new(vec![sql::draw_token(&holds_of(hold))], Failure::not_held)
    }

    fn held(hold: &Hold<SqliteKey>) -> Condition {
        sql::held(&holds_of(hold))
    }

    fn holders(key: &LockKey) -> Result<impl Machine<Output = Vec<Holder>>, Failure> {
        Ok(ask_holders(key.to_sqlite()?))
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
