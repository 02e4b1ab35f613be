use std::time::Duration;

use super::action::Identity;
use crate::proto::{Ask, Dialect, Either, Failure, Hold, Machine, Session, unique_nonzero};
use crate::{InvalidKey, LockKey};

/// What tells one session of a manager from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(i64);

impl Token {
    /// A token that nobody else has.
    pub fn new() -> Self {
        Self(unique_nonzero().get())
    }

    pub(crate) fn number(self) -> i64 {
        self.0
    }
}

impl Default for Token {
    fn default() -> Self {
        Self::new()
    }
}

/// A [`Dialect`] whose sessions a manager can have for itself.
pub trait ManagedDialect: Dialect {
    /// Whether the server ends sessions that are idle.
    const HAS_LEASE: bool;

    /// See [`Config::longest_wait`](super::Config::longest_wait).
    const LONGEST_WAIT: Option<Duration>;

    /// See [`Config::tells_after`](super::Config::tells_after).
    const TELLS_AFTER: Duration;

    /// Whether a pooler may give one session to several connections. Then the first connection of a manager is opened
    /// twice: the second finds what the first has left.
    const MAY_BE_POOLED: bool;

    /// What the server locks, each with its name, in the order in which everybody takes several.
    ///
    /// # Errors
    ///
    /// An invalid key, none at all, or too many.
    fn identities(ask: &Ask) -> Result<Vec<(Identity, LockKey)>, Failure>;

    /// What the server locks for a semaphore.
    ///
    /// # Errors
    ///
    /// An invalid key, a number of permits that no semaphore has.
    fn identity_of_semaphore(key: &LockKey, permits: u32) -> Result<Identity, InvalidKey>;

    /// Acquires a lock, or a slot of a semaphore with so many permits, outside a transaction.
    ///
    /// # Errors
    ///
    /// As [`Dialect::acquire`].
    fn acquire_managed(
        ask: &Ask,
        permits: Option<u32>,
    ) -> Result<impl Machine<Output = Option<Hold<Self::Key>>>, Failure> {
        match permits {
            None => Self::acquire(ask, Session::default()).map(Either::One),
            Some(permits) => {
                Self::acquire_slot(ask, permits, Session::default()).map(Either::several)
            }
        }
    }

    /// Makes a new session one of a manager: it gets its idle limit and the token. Refused if it has another token.
    fn prepare(lease: Duration, token: Token) -> impl Machine<Output = ()>;

    /// Asks whether the session is there, and the same.
    fn is_there(token: Token) -> impl Machine<Output = ()>;
}
