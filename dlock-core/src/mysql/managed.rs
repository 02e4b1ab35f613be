//! Sessions of a lock manager.

use std::time::Duration;

use super::several::{Names, folded};
use super::{Mysql, base, sql};
use crate::proto::manager::{Identity, ManagedDialect, Token};
use crate::proto::{
    Abandoned, Aftermath, Answer, Ask, Cause, Failure, Machine, Reason, Rows, Statement, Step,
};
use crate::{InvalidKey, LockKey};

impl ManagedDialect for Mysql {
    const HAS_LEASE: bool = true;

    /// A wait that nobody wants any more cannot be left without its connection. It ends soon by itself.
    const LONGEST_WAIT: Option<Duration> = Some(Duration::from_secs(2));

    const TELLS_AFTER: Duration = super::FIRST_WAIT;

    /// A pooler that gives a session to several connections does not do so after GET_LOCK or SET (ProxySQL).
    const MAY_BE_POOLED: bool = false;

    fn identities(ask: &Ask) -> Result<Vec<(Identity, LockKey)>, Failure> {
        let names = Names::new(ask)?.into_pairs();
        let identities = names.map(|(name, key)| (Identity::Name(folded(&name).into()), key));
        Ok(identities.collect())
    }

    fn identity_of_semaphore(key: &LockKey, permits: u32) -> Result<Identity, InvalidKey> {
        let base = Identity::Name(base(key, permits)?.into());
        Ok(Identity::Semaphore(Box::new(base)))
    }

    fn prepare(lease: Duration, token: Token) -> impl Machine<Output = ()> {
        Once(sql::prepare_managed(lease, token), Expected::Nothing)
    }

    fn is_there(token: Token) -> impl Machine<Output = ()> {
        Once(sql::is_managed(token), Expected::One)
    }
}

/// Sends one statement without rows.
#[derive(Debug)]
struct Once(Statement, Expected);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Nothing,
    /// The row is there.
    One,
}

impl Machine for Once {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Query(self.0.clone())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        Step::Done(match (answer, self.1) {
            (Answer::Rows(Rows::Number(_)), Expected::Nothing)
            | (Answer::Rows(Rows::Number(Some(1))), Expected::One) => Ok(()),
            // Drivers do not tell the loss of a connection from other errors.
            (Answer::Error(error), Expected::One) => Err(Failure::lost(error.cause)),
            (Answer::Error(error), Expected::Nothing) => Err(Reason::Database.broken(error.cause)),
            _ => Err(Failure {
                reason: Reason::Lost,
                aftermath: Aftermath::MarkBroken,
                cause: Cause::default(),
                key: None,
            }),
        })
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
