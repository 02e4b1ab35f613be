//! Connections of a lock manager. The process holds the locks, so nothing ends them but its end.

use std::time::Duration;

use super::several::Keys;
use super::{Sqlite, gate};
use crate::proto::manager::{Identity, ManagedDialect, Token};
use crate::proto::{Abandoned, Answer, Ask, Failure, Machine, Step};
use crate::{InvalidKey, LockKey};

impl ManagedDialect for Sqlite {
    const HAS_LEASE: bool = false;

    /// A thread that waits cannot be told to stop.
    const LONGEST_WAIT: Option<Duration> = Some(Duration::from_secs(2));

    const TELLS_AFTER: Duration = super::FIRST_WAIT;

    const MAY_BE_POOLED: bool = false;

    fn identities(ask: &Ask) -> Result<Vec<(Identity, LockKey)>, Failure> {
        let keys = Keys::new(ask)?.into_pairs();
        let identities = keys.map(|(key, name)| (Identity::Number(key as i64), name));
        Ok(identities.collect())
    }

    fn identity_of_semaphore(key: &LockKey, permits: u32) -> Result<Identity, InvalidKey> {
        let gate = Identity::Number(gate(key, permits)? as i64);
        Ok(Identity::Semaphore(Box::new(gate)))
    }

    fn prepare(_lease: Duration, _token: Token) -> impl Machine<Output = ()> {
        Nothing
    }

    fn is_there(_token: Token) -> impl Machine<Output = ()> {
        Nothing
    }
}

/// There is nothing to ask.
#[derive(Debug)]
struct Nothing;

impl Machine for Nothing {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Done(Ok(()))
    }

    fn next(&mut self, _answer: Answer, _now: Duration) -> Step<()> {
        Step::Done(Ok(()))
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
