//! What the sync and the async crate share. Not part of the API.

#[cfg(feature = "migrations")]
mod notices;
pub mod trace;

use std::time::{Duration, Instant};

use diesel::connection::{TransactionDepthChange, TransactionManagerStatus};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use dlock_core::LockKey;
use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Cause, Condition, Depth, Dialect, ErrorFields, Failure,
    MOST_LOCKS, Machine, Reason, Session, Step, StillThere,
};

pub use crate::manager::desk;
pub use crate::query::{ByText, CoreQuery, HolderColumns, HolderRow, Number, Pair, to_holder};
#[cfg(feature = "sqlite")]
pub use crate::sqlite::{explain, forget, give_up, settle};
use crate::{Error, Held};
pub use dlock_core::{for_each_prepared, proto};
#[cfg(feature = "migrations")]
pub use notices::Notices;

/// How often a process tries to get the lock of its migrations, unless the caller sets an interval.
#[cfg(feature = "migrations")]
pub const MIGRATION_INTERVAL: Duration = Duration::from_millis(100);

/// What errors of `check_advisory_locks` name in the place of a key.
pub const CHECKED: &str = "check_advisory_locks";

/// Refuses a check while a transaction is open: a question that fails would abort it.
pub fn may_check(key: &LockKey, session: Session) -> Result<(), Error> {
    match session.depth {
        Some(_) => Err(Error::InTransaction { key: key.clone() }),
        None => Ok(()),
    }
}

/// A machine of the core, with a clock.
#[derive(Debug)]
pub struct Pump<D, M> {
    machine: StillThere<D, M>,
    /// `None` for a machine that does not look at the time.
    started: Option<Instant>,
}

impl<D: Dialect, M: Machine> Pump<D, M> {
    /// The clock starts now.
    pub fn new(machine: M) -> Self {
        Self {
            machine: StillThere::new(machine),
            started: M::TIMED.then(Instant::now),
        }
    }

    /// The first step.
    #[inline]
    pub fn start(&mut self) -> Step<M::Output> {
        self.machine.start(Duration::ZERO)
    }

    /// The next step, after the answer to the last one.
    #[inline]
    pub fn next(&mut self, answer: Answer) -> Step<M::Output> {
        let now = self.started.map(|started| started.elapsed());
        self.machine.next(answer, now.unwrap_or_default())
    }

    /// What to do if nobody will read the answer to the last step.
    pub fn abandon(&self) -> Abandoned {
        self.machine.abandon()
    }
}

/// The answer to a message or a statement, in the form that the core reads.
pub fn answer(result: QueryResult<Answer>) -> Answer {
    result.unwrap_or_else(|error| Answer::Error(fields(error)))
}

/// The fields of an error that the core reads. None of them is translated.
fn fields(error: DieselError) -> ErrorFields {
    let mut fields = ErrorFields {
        lost: is_lost(&error),
        ..ErrorFields::default()
    };
    if let DieselError::DatabaseError(_, info) = &error {
        fields.detail = info.details().map(str::to_owned);
        fields.hint = info.hint().is_some();
        fields.position = info.statement_position().is_some();
        fields.constraint = info.constraint_name().map(str::to_owned);
    }
    fields.cause = Cause::new(error);
    fields
}

/// Whether the driver says that the session is gone.
pub fn is_lost(error: &DieselError) -> bool {
    matches!(
        error,
        DieselError::BrokenTransactionManager
            | DieselError::DatabaseError(
                DatabaseErrorKind::ClosedConnection | DatabaseErrorKind::UnableToSendCommand,
                _
            )
    )
}

/// The error of a failure, and what to do about the connection.
pub fn failed(failure: Failure, key: &LockKey) -> (Aftermath, Error) {
    let key = failure.key.map_or_else(|| key.clone(), |key| *key);
    let cause = failure.cause.into_error::<DieselError>();
    let source = |cause: Option<DieselError>| {
        cause.unwrap_or_else(|| {
            DieselError::DeserializationError("the server answered with an unexpected value".into())
        })
    };
    let error = match failure.reason {
        Reason::Timeout { waited, holders } => Error::Timeout {
            key,
            waited,
            holders,
        },
        Reason::Deadlock => Error::Deadlock {
            key,
            source: source(cause),
        },
        Reason::Interrupted => Error::Interrupted { key, source: cause },
        Reason::NotHeld => Error::NotHeld { key },
        Reason::InTransaction => Error::InTransaction { key },
        Reason::NotInTransaction => Error::NotInTransaction { key },
        Reason::TooManyLocks => Error::TooManyLocks {
            key,
            source: cause.unwrap_or_else(|| DieselError::QueryBuilderError(Box::new(TooMany))),
        },
        Reason::Unsupported => Error::Unsupported {
            key,
            source: source(cause),
        },
        Reason::Standby => unsupported(key, STANDBY),
        Reason::Cluster => unsupported(key, CLUSTER),
        Reason::InvalidKey(invalid) => Error::InvalidKey(invalid),
        Reason::Lost => Error::Lost {
            key,
            source: source(cause),
        },
        Reason::OutOfStep => {
            Error::Database(DieselError::DeserializationError(Box::new(OutOfStep)))
        }
        _ => Error::Database(source(cause)),
    };
    (failure.aftermath, error)
}

const STANDBY: &str = "this server is a standby, and its locks are its own: connect to the primary \
    (`target_session_attrs=read-write` in the URL). If it is YugabyteDB or CockroachDB: its locks exclude nobody, \
    or only on one node. See docs/guide/errors.md";

const CLUSTER: &str = "this server is a node of a Galera cluster, or of a replication group with several writers, and \
    each node has its own locks: if all programs that take locks connect to the same node, allow it with \
    `SET @dlock_one_node = 1` on each connection";

fn unsupported(key: LockKey, why: &str) -> Error {
    let source = DieselError::DatabaseError(DatabaseErrorKind::Unknown, Box::new(why.to_owned()));
    Error::Unsupported { key, source }
}

/// The error of a connection that cannot say how many transactions are open.
pub fn connection_error(error: DieselError, key: &LockKey) -> Error {
    match is_lost(&error) {
        true => Error::Lost {
            key: key.clone(),
            source: error,
        },
        false => Error::Database(error),
    }
}

/// The error of migrations that succeeded, of which some may have run without the lock. Its source is an [`Error`].
#[cfg(feature = "migrations")]
pub fn unprotected(
    applied: &[diesel::migration::MigrationVersion<'static>],
    source: Error,
) -> Box<dyn std::error::Error + Send + Sync> {
    match applied {
        // Nothing has run that a lock protects.
        [] => Box::new(source),
        applied => Box::new(Unprotected {
            applied: applied.iter().map(ToString::to_string).collect(),
            source,
        }),
    }
}

#[cfg(feature = "migrations")]
#[derive(Debug, thiserror::Error)]
#[error(
    "all migrations are applied ({}), but the lock was lost before their end, so some of them may have run beside \
     those of another process",
    .applied.join(", ")
)]
struct Unprotected {
    applied: Vec<String>,
    source: Error,
}

/// The error of a server that has not answered for so long.
pub fn silent(key: &LockKey, waited: Duration) -> Error {
    let message = format!("no answer from the server within {waited:.1?}: is the network down?");
    let source = DieselError::DatabaseError(DatabaseErrorKind::ClosedConnection, Box::new(message));
    let key = key.clone();
    Error::Lost { key, source }
}

/// The condition of a hold as an expression of Diesel.
pub fn held<DB>(condition: Condition) -> Held<DB> {
    Held::new(condition)
}

/// The error of a transaction that was begun under the lock and left open.
pub fn left_open(key: &LockKey) -> Error {
    Error::TransactionLeftOpen { key: key.clone() }
}

#[derive(Debug, thiserror::Error)]
#[error("at most {MOST_LOCKS} different locks can be taken as one, and nothing was sent")]
struct TooMany;

#[derive(Debug, thiserror::Error)]
#[error(
    "this connection returned the answer to an earlier query, because the future waiting for it was dropped; close it"
)]
struct OutOfStep;

/// Diesel's hidden record of the open transactions. `docs/design.md` says what rests on it.
pub mod status {
    use super::*;

    /// How many transactions and savepoints are open, or an error if the connection is broken.
    pub fn depth(status: &TransactionManagerStatus) -> QueryResult<Depth> {
        status.transaction_depth()
    }

    /// Records that a transaction has begun.
    pub fn began(status: &mut TransactionManagerStatus) -> QueryResult<()> {
        match status {
            TransactionManagerStatus::Valid(status) => {
                status.change_transaction_depth(TransactionDepthChange::IncreaseDepth)
            }
            TransactionManagerStatus::InError => Err(DieselError::BrokenTransactionManager),
        }
    }

    /// Marks the connection broken, so that a pool discards it.
    pub fn mark_broken(status: &mut TransactionManagerStatus) {
        status.set_in_error();
    }
}
