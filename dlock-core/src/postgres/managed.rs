//! Sessions of a lock manager.

use std::time::Duration;

use super::several::Keys;
use super::{Postgres, gate, sql};
use crate::proto::manager::{Identity, ManagedDialect, Token};
use crate::proto::{Abandoned, Aftermath, Ask};
use crate::proto::{Answer, Cause, Failure, Machine, Reason, Rows, Statement, Step};
use crate::{InvalidKey, LockKey};

impl ManagedDialect for Postgres {
    const HAS_LEASE: bool = true;

    /// A wait breathes: it comes back each second or so, and after a minute at most.
    const LONGEST_WAIT: Option<Duration> = None;

    /// The first turn.
    const TELLS_AFTER: Duration = Duration::from_millis(super::sql::FIRST_TURN as u64);

    const MAY_BE_POOLED: bool = true;

    fn identities(ask: &Ask) -> Result<Vec<(Identity, LockKey)>, Failure> {
        let keys = Keys::new(ask)?;
        let identities = keys.all().iter().enumerate();
        let identities = identities.map(|(at, key)| ((*key).into(), keys.name(at).clone()));
        Ok(identities.collect())
    }

    fn identity_of_semaphore(key: &LockKey, permits: u32) -> Result<Identity, InvalidKey> {
        let gate = Identity::Number(gate(key, permits)?);
        Ok(Identity::Semaphore(Box::new(gate)))
    }

    fn prepare(lease: Duration, token: Token) -> impl Machine<Output = ()> {
        Once {
            statement: sql::prepare_managed(lease, token),
            refused: Reason::SharedSession,
        }
    }

    fn is_there(token: Token) -> impl Machine<Output = ()> {
        Once {
            statement: sql::is_managed(token),
            refused: Reason::Lost,
        }
    }
}

/// Sends one statement, which answers 1 if all is well.
#[derive(Debug)]
struct Once {
    statement: Statement,
    refused: Reason,
}

impl Machine for Once {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Query(self.statement.clone())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        Step::Done(match answer {
            Answer::Rows(Rows::Number(Some(1))) => Ok(()),
            Answer::Error(error) if error.lost => Err(Failure::lost(error.cause)),
            Answer::Error(error) => Err(Reason::Database.broken(error.cause)),
            _ => Err(Failure {
                reason: self.refused.clone(),
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
