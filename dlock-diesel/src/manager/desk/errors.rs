//! What has happened, as errors.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use dlock_core::LockKey;
use dlock_core::proto::manager::News;
use dlock_core::proto::{Aftermath, Cause, Failure, Reason};

use crate::shared::trace;
use crate::{Error, shared};

/// The error of somebody's closure that opens connections. Several requests may fail with it.
#[derive(Clone, Debug)]
struct NotOpened(Arc<dyn StdError + Send + Sync>);

/// The failure of a connection that could not be opened.
pub fn not_opened(error: Box<dyn StdError + Send + Sync>) -> Failure {
    Failure {
        key: None,
        reason: Reason::NotOpened,
        aftermath: Aftermath::Clean,
        cause: Cause::new(NotOpened(error.into())),
    }
}

/// The failure of a connection that is closed.
pub fn gone() -> Failure {
    Failure {
        key: None,
        reason: Reason::Lost,
        aftermath: Aftermath::MarkBroken,
        cause: Cause::default(),
    }
}

/// The error of a request that has ended without the lock, or of a release.
pub fn error(news: News, key: &LockKey) -> Error {
    match news {
        News::Taken {
            waited,
            holders,
            about,
        } => Error::Timeout {
            key: about.unwrap_or_else(|| key.clone()),
            waited,
            holders,
        },
        News::Failed(failure) => failed(failure, key),
        News::NotReleased(failure) => trace::lost_error(failed(failure, key)),
        News::Closed => Error::ManagerClosed { key: key.clone() },
        News::Lost | News::Granted { .. } | News::Released => lost(key),
    }
}

/// The error of a lock that is lost.
pub fn lost(key: &LockKey) -> Error {
    failed(gone(), key)
}

/// The error of a conversation about a lock.
pub fn failed(mut failure: Failure, key: &LockKey) -> Error {
    if failure.reason == Reason::NotOpened {
        let opened = failure.cause.get::<NotOpened>();
        let prepared = failure.cause.get::<DieselError>();
        return Error::NotConnected {
            key: key.clone(),
            source: match (opened, prepared) {
                (Some(NotOpened(source)), _) => Box::new(NotOpenedError(Arc::clone(source))),
                (_, Some(error)) => Box::new(copy(error)),
                _ => "the server did not answer in time".into(),
            },
        };
    }
    if failure.reason == Reason::SharedSession {
        failure.reason = Reason::Unsupported;
        failure.cause = Cause::new(DieselError::QueryBuilderError(SHARED.into()));
    } else if let Some(error) = failure.cause.get::<DieselError>() {
        // Others may fail with the same error.
        failure.cause = Cause::new(copy(error));
    } else if failure.reason == Reason::Lost {
        let silent = Box::new(String::from(
            "the session has ended, or did not answer in time",
        ));
        failure.cause = Cause::new(DieselError::DatabaseError(
            DatabaseErrorKind::ClosedConnection,
            silent,
        ));
    }
    shared::failed(failure, key).1
}

const SHARED: &str = "a pooler gives one session to several connections: connect to the server itself, or let the \
                      pooler pool sessions, not transactions";

fn copy(error: &DieselError) -> DieselError {
    match error {
        DieselError::DatabaseError(kind, information) => {
            let kind = match kind {
                DatabaseErrorKind::ClosedConnection => DatabaseErrorKind::ClosedConnection,
                DatabaseErrorKind::UnableToSendCommand => DatabaseErrorKind::UnableToSendCommand,
                _ => DatabaseErrorKind::Unknown,
            };
            DieselError::DatabaseError(kind, Box::new(information.message().to_owned()))
        }
        DieselError::BrokenTransactionManager => DieselError::BrokenTransactionManager,
        error => DieselError::QueryBuilderError(error.to_string().into()),
    }
}

/// An error that several requests have.
#[derive(Debug)]
struct NotOpenedError(Arc<dyn StdError + Send + Sync>);

impl fmt::Display for NotOpenedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for NotOpenedError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}
