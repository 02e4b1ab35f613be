use crate::postgres::fault::Failed;
use crate::proto::Failure;

/// What follows a rollback.
#[derive(Debug)]
pub(super) enum Then {
    /// The next turn.
    Next,
    /// Nobody waited: try again, or give up.
    TryAgain,
    /// A wait that the user's limits do not cut short.
    Wait {
        millis: u32,
    },
    Session,
    Verify(Failed),
    Probe(Failed),
    Fail(Failure),
}
