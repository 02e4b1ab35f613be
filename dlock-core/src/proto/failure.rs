use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::{Holder, InvalidKey, LockKey};

/// Why a conversation failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// What went wrong.
    pub reason: Reason,
    /// What the caller does about the connection.
    pub aftermath: Aftermath,
    /// The driver's error, where there was one.
    pub cause: Cause,
    /// Of several locks, the one that it is about.
    pub key: Option<Box<LockKey>>,
}

/// What went wrong, as far as the server told.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// The limit passed and another session has the lock.
    Timeout {
        /// How long the lock was waited for.
        waited: Duration,
        /// Who holds the lock or waits for it, as far as the server lets this user see it.
        holders: Vec<Holder>,
    },
    /// The server found a deadlock and chose this request as its victim.
    Deadlock,
    /// Somebody cancelled the statement (`pg_cancel_backend`, `KILL QUERY`).
    Interrupted,
    /// The session did not hold the lock that it was to release.
    NotHeld,
    /// A session's lock was asked for while a transaction is open.
    InTransaction,
    /// A transaction's lock was asked for while no transaction is open.
    NotInTransaction,
    /// The server's table of locks is full.
    TooManyLocks,
    /// The server has no such locks.
    Unsupported,
    /// The server has locks of its own: it is a standby, or an engine that does not exclude.
    Standby,
    /// The server is one of several that take writes, and each has its own locks.
    Cluster,
    /// The server does not know a variable of the statement.
    UnknownVariable,
    /// MySQL does not take this name for a lock.
    WrongName,
    /// Several connections share one session: a pooler gives it to one after the other.
    SharedSession,
    /// The server cannot take this key.
    InvalidKey(InvalidKey),
    /// The session has ended, or the connection to it.
    Lost,
    /// A connection of a manager could not be opened, or was not open in time.
    NotOpened,
    /// The connection answered an earlier question.
    OutOfStep,
    /// Anything else: the driver's error tells.
    Database,
}

/// What the caller does about the connection after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aftermath {
    /// Nothing was left behind.
    Clean,
    /// Mark the connection broken: it is not the session that it was.
    MarkBroken,
    /// End the session: it may hold a lock that nobody knows of.
    EndSession,
    /// The same, without waiting for an answer, because the connection gives those to earlier questions.
    EndSessionUnread,
}

impl Aftermath {
    /// The one of the two that does more.
    pub(crate) fn worse(self, other: Self) -> Self {
        let rank = |aftermath| match aftermath {
            Aftermath::Clean => 0,
            Aftermath::MarkBroken => 1,
            Aftermath::EndSession => 2,
            Aftermath::EndSessionUnread => 3,
        };
        if rank(self) < rank(other) {
            other
        } else {
            self
        }
    }
}

/// The error of a driver, which travels through a machine unread.
#[derive(Clone, Default)]
pub struct Cause(Option<Arc<dyn Any + Send + Sync>>);

impl Cause {
    /// Wraps an error.
    pub fn new(error: impl Any + Send + Sync) -> Self {
        Self(Some(Arc::new(error)))
    }

    /// The error, if this is one of that type.
    pub fn get<E: Any + Send + Sync>(&self) -> Option<&E> {
        self.0.as_ref()?.downcast_ref()
    }

    /// Whether there is an error.
    pub(crate) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// The error, if this is one of that type, and nobody else has it.
    pub fn into_error<E: Any + Send + Sync>(self) -> Option<E> {
        let error = self.0?.downcast::<E>().ok()?;
        Arc::into_inner(error)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_some() {
            "Cause(..)"
        } else {
            "Cause(none)"
        })
    }
}

/// Whether there is an error; which one does not matter to a machine.
impl PartialEq for Cause {
    fn eq(&self, other: &Self) -> bool {
        self.is_some() == other.is_some()
    }
}

/// The fields of an error that no server translates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ErrorFields {
    /// The session has ended, or the connection to it.
    pub lost: bool,
    /// DETAIL.
    pub detail: Option<String>,
    /// Whether there is a HINT.
    pub hint: bool,
    /// Whether the error points at a place in the statement: the server did not understand it.
    pub position: bool,
    /// The constraint's name, in which SQL functions of dlock name an error.
    pub constraint: Option<String>,
    /// SQLite: the [request](super::Request) of the statement was there, and the driver has given it up.
    pub given_up: bool,
    /// The error itself.
    pub cause: Cause,
}

impl Reason {
    /// A failure that leaves nothing behind.
    pub(crate) fn clean(self, cause: Cause) -> Failure {
        Failure {
            reason: self,
            aftermath: Aftermath::Clean,
            cause,
            key: None,
        }
    }

    /// A failure after which nobody knows what the session holds.
    pub(crate) fn broken(self, cause: Cause) -> Failure {
        Failure {
            reason: self,
            aftermath: Aftermath::EndSession,
            cause,
            key: None,
        }
    }
}

impl Failure {
    /// The same, about one of several locks.
    pub(crate) fn about(mut self, key: &LockKey) -> Self {
        self.key.get_or_insert_with(|| Box::new(key.clone()));
        self
    }

    /// The same failure, of a session that turned out to be gone. It keeps the key and the first cause.
    pub(crate) fn lost_meanwhile(self) -> Self {
        Failure {
            reason: Reason::Lost,
            aftermath: Aftermath::MarkBroken,
            ..self
        }
    }

    /// The answer was to an earlier question.
    pub(crate) fn out_of_step() -> Self {
        Failure {
            reason: Reason::OutOfStep,
            aftermath: Aftermath::EndSessionUnread,
            cause: Cause::default(),
            key: None,
        }
    }

    /// The session has ended, and with it all that it held.
    pub(crate) fn lost(cause: Cause) -> Self {
        Failure {
            reason: Reason::Lost,
            aftermath: Aftermath::MarkBroken,
            cause,
            key: None,
        }
    }

    /// Nothing is held, but this is not the session that it was.
    pub(crate) fn not_held(cause: Cause) -> Self {
        Failure {
            reason: Reason::NotHeld,
            aftermath: Aftermath::MarkBroken,
            cause,
            key: None,
        }
    }
}

impl From<InvalidKey> for Failure {
    fn from(invalid: InvalidKey) -> Self {
        Reason::InvalidKey(invalid).clean(Cause::default())
    }
}
