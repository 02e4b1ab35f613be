/// Why a lock was not acquired or released, as far as the server told.
///
/// # Examples
///
/// ```
/// use dlock_core::{Failure, Reason};
///
/// let failure = Failure { reason: Reason::Deadlock, broken: false };
/// assert_eq!(failure.reason, Reason::Deadlock);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub reason: Reason,
    /// Whether the session may hold a lock that nobody knows of, so that it must be ended.
    pub broken: bool,
}

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The server found a deadlock and chose this request as its victim.
    Deadlock,
    /// Somebody cancelled the statement (`pg_cancel_backend`, `KILL QUERY`).
    Interrupted,
    /// The session did not hold the lock that it was to release.
    NotHeld,
    /// A transaction was open already.
    InTransaction,
    /// The server's table of locks is full.
    TooManyLocks,
    /// The server has no such locks.
    Unsupported,
    /// Anything else: the first error of the driver tells.
    Database,
}

#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
impl Reason {
    /// A failure that leaves nothing behind.
    pub(crate) fn clean(self) -> Failure {
        Failure {
            reason: self,
            broken: false,
        }
    }

    /// A failure after which nobody knows what the session holds.
    pub(crate) fn broken(self) -> Failure {
        Failure {
            reason: self,
            broken: true,
        }
    }
}
