//! MySQL's and MariaDB's named locks.

mod acquire;
mod question;
mod release;
mod sql;
mod tag;

use crate::proto::{
    Abandoned, Ask, Condition, Dialect, Failure, Hold, Machine, NameHolders, Parting, Question,
    Session,
};
use crate::{FencingToken, Holder, LockKey};

/// MySQL 8.0 and later, MariaDB 10.6 and later.
#[derive(Clone, Copy, Debug)]
pub struct Mysql;

/// An answer that nobody reads puts the connection out of step: the next question is given it.
fn ask_holders(key: &str) -> Question<Vec<Holder>> {
    Question::holders(sql::holders(key), Abandoned::broken())
}

impl Dialect for Mysql {
    type Key = String;

    const END_SESSION: &'static str = "KILL CONNECTION_ID()";

    /// Named locks are exclusive, and transactions do not touch them.
    fn acquire(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<String>>>, Failure> {
        let key = ask.key.to_mysql()?;
        ask.check_session(session)?;
        let acquire = acquire::Acquire::new(key, ask, session.depth);
        let ask_holders = |acquire: &acquire::Acquire| ask_holders(acquire.key());
        Ok(NameHolders::new(
            acquire,
            ask.name_holders.then_some(ask_holders),
        ))
    }

    fn release(hold: Hold<String>, _session: Session) -> impl Machine<Output = ()> {
        release::Release::new(hold)
    }

    fn part(hold: &Hold<String>, session: Option<Session>) -> Parting {
        Parting {
            // On a broken connection a wait may have been dropped. It ends when the connection is closed, which the
            // server does not notice while there is a message to read.
            message: session
                .map(|_| sql::release_unread(&hold.key, hold.open_transaction(session))),
            broken: true,
            request: None,
        }
    }

    fn is_held(hold: &Hold<String>) -> impl Machine<Output = bool> {
        question::Question::is_held(hold)
    }

    fn fencing_token(hold: &Hold<String>) -> impl Machine<Output = FencingToken> {
        question::Question::draw_token(hold)
    }

    fn held(hold: &Hold<String>) -> Condition {
        sql::held(&hold.key)
    }

    fn holders(key: &LockKey) -> Result<impl Machine<Output = Vec<Holder>>, Failure> {
        Ok(ask_holders(&key.to_mysql()?))
    }
}
