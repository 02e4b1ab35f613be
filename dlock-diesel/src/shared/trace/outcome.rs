use dlock_core::Holder;
use dlock_core::proto::manager::News;

use crate::Error;

/// How a request for a lock has ended.
#[derive(Debug)]
pub enum Outcome<'r> {
    Acquired,
    /// A try found it taken.
    Taken,
    /// The limit has passed.
    Timeout(&'r [Holder]),
    Failed(&'static str, Option<&'r Error>),
}

impl Outcome<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Acquired => "acquired",
            Self::Taken => "taken",
            Self::Timeout(_) => "timeout",
            Self::Failed(name, _) => name,
        }
    }
}

/// The result of a request.
pub trait Ended {
    fn outcome(&self) -> Outcome<'_>;
}

impl<T> Ended for Result<Option<T>, Error> {
    fn outcome(&self) -> Outcome<'_> {
        match self {
            Ok(Some(_)) => Outcome::Acquired,
            Ok(None) => Outcome::Taken,
            Err(error) => failed(error),
        }
    }
}

/// Of a managed lock.
impl<T> Ended for Result<Result<T, News>, Error> {
    fn outcome(&self) -> Outcome<'_> {
        match self {
            Ok(Ok(_)) => Outcome::Acquired,
            Ok(Err(News::Taken { holders, .. })) => Outcome::Timeout(holders),
            Ok(Err(News::Closed)) => Outcome::Failed("closed", None),
            Ok(Err(_)) => Outcome::Failed("error", None),
            Err(error) => failed(error),
        }
    }
}

fn failed(error: &Error) -> Outcome<'_> {
    let name = match error {
        Error::Timeout { holders, .. } => return Outcome::Timeout(holders),
        Error::Deadlock { .. } => "deadlock",
        Error::Interrupted { .. } => "interrupted",
        Error::Lost { .. } => "lost",
        Error::InTransaction { .. } | Error::NotInTransaction { .. } | Error::InvalidKey(_) => {
            "refused"
        }
        Error::Unsupported { .. } => "unsupported",
        _ => "error",
    };
    Outcome::Failed(name, Some(error))
}
