//! MySQL's and MariaDB's named locks.

mod acquire;
mod check;
mod errno;
mod managed;
mod question;
mod release;
mod semaphore;
mod several;
mod slot_sql;
mod sql;
mod tag;
mod writers;

use std::time::Duration;

use self::several::{NamedLocks, Names, ReleaseAll};
use crate::proto::{
    Abandoned, AreYouThere, Ask, Condition, Dialect, Either, Failure, Hold, Machine, NameHolders,
    Parting, Question, Session, Several,
};
use crate::{FencingToken, Holder, InvalidKey, LockKey, Report};

/// MySQL 8.0 and later, MariaDB 10.6 and later.
#[derive(Clone, Copy, Debug)]
pub struct Mysql;

fn acquire_several(
    names: Names,
    ask: &Ask,
    session: Session,
) -> Result<NameHolders<Several<NamedLocks>>, Failure> {
    ask.check_session(session)?;
    let several = NamedLocks::several(names, ask, session.depth);
    let ask_holders =
        |several: &Several<NamedLocks>| ask_holders(several.steps().names().name(several.at()));
    Ok(NameHolders::new(several, ask, ask_holders)
        .of_several(|several| Some(several.steps().names().key(several.at()).clone().into())))
}

/// For a caller who wants to know who has the lock. MySQL waits whole seconds in one statement.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// The same for a semaphore, which tries first: then there is a second left.
const FIRST_WAIT_FOR_SLOT: Duration = Duration::from_millis(1_100);

/// An answer that nobody reads puts the connection out of step: the next question is given it.
fn ask_holders(key: &str) -> Question<Vec<Holder>> {
    Question::holders(sql::holders(key), Abandoned::broken())
}

fn ask_slot_holders(base: &str, permits: u32) -> Question<Vec<Holder>> {
    Question::slot_holders(slot_sql::slot_holders(base, permits), Abandoned::broken())
}

/// What the names of a semaphore's locks begin with.
fn base(key: &LockKey, permits: u32) -> Result<String, InvalidKey> {
    key.check_permits(permits)?;
    key.semaphore_base_for_mysql()
}

impl Dialect for Mysql {
    const SERVER: &'static str = "MySQL or MariaDB";

    type Key = String;

    const END_SESSION: &'static [&'static str] = &["KILL CONNECTION_ID()"; 2];

    const ARE_YOU_THERE: Option<AreYouThere> = Some(AreYouThere {
        message: sql::ARE_YOU_THERE,
        driver_tells: false,
    });

    const UNREAD_ANSWERS_SHIFT: bool = true;

    /// Named locks are exclusive, and transactions do not touch them.
    fn acquire(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<String>>>, Failure> {
        let key = match ask.is_one() {
            true => ask.key.to_mysql()?,
            false => {
                let mut names = Names::new(ask)?;
                match names.only() {
                    Some(name) => name,
                    None => return acquire_several(names, ask, session).map(Either::several),
                }
            }
        };
        ask.check_session(session)?;
        let acquire = acquire::Acquire::new(key, ask, session.depth);
        let ask_holders = |acquire: &acquire::Acquire| ask_holders(acquire.key());
        Ok(Either::One(
            NameHolders::new(acquire, ask, ask_holders)
                .without_turns(FIRST_WAIT, |acquire, wait| acquire.wait = wait),
        ))
    }

    fn acquire_slot(
        ask: &Ask,
        permits: u32,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<String>>>, Failure> {
        let base = base(&ask.key, permits)?;
        ask.check_session(session)?;
        let acquire = semaphore::AcquireSlot::new(base, permits, ask, session.depth);
        let ask_holders = |acquire: &semaphore::AcquireSlot| {
            let (base, permits) = acquire.semaphore();
            ask_slot_holders(base, permits)
        };
        Ok(NameHolders::new(acquire, ask, ask_holders)
            .without_turns(FIRST_WAIT_FOR_SLOT, |acquire, wait| acquire.wait = wait))
    }

    fn release(hold: Hold<String>, _session: Session) -> impl Machine<Output = ()> {
        match hold.more.is_empty() {
            true => Either::One(release::Release::new(hold)),
            false => Either::several(ReleaseAll::new(hold.into_all())),
        }
    }

    fn part(hold: &Hold<String>, session: Option<Session>) -> Parting {
        Parting {
            // On a broken connection a wait may have been dropped. It ends when the connection is closed, which the
            // server does not notice while there is a message to read.
            message: session.map(|_| {
                let transaction = hold.open_transaction(session);
                match hold.more.is_empty() {
                    true => sql::release_unread(&hold.key, transaction),
                    false => sql::release_all_unread(&sql::List::of(hold.all()), transaction),
                }
            }),
            broken: true,
            ..Parting::default()
        }
    }

    fn is_held(hold: &Hold<String>) -> impl Machine<Output = bool> {
        question::Question::is_held(hold)
    }

    fn fencing_token(hold: &Hold<String>) -> impl Machine<Output = FencingToken> {
        question::Question::draw_token(hold)
    }

    fn held(hold: &Hold<String>) -> Condition {
        match hold.more.is_empty() {
            true => sql::held(&hold.key),
            false => sql::held_all(&sql::List::of(hold.all())),
        }
    }

    fn holders(key: &LockKey) -> Result<impl Machine<Output = Vec<Holder>>, Failure> {
        Ok(ask_holders(&key.to_mysql()?))
    }

    fn slot_holders(
        key: &LockKey,
        permits: u32,
    ) -> Result<impl Machine<Output = Vec<Holder>>, Failure> {
        Ok(ask_slot_holders(&base(key, permits)?, permits))
    }

    fn check() -> impl Machine<Output = Report> {
        check::check()
    }
}
