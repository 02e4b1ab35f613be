use std::time::Duration;

use super::check::is_postgres;
use super::sql;
use crate::proto::{Answer, Cause, ErrorFields, Failure, Reason, Rows};

/// What a failed wait means. Diesel does not tell the SQLSTATE, and messages are translated; these fields are not:
///
/// | SQLSTATE | DETAIL | HINT | points at the statement |
/// |---|---|---|---|
/// | 40P01 deadlock | yes | yes | no |
/// | 53200 out of shared memory | no | yes | no |
/// | 42883 no such function | no | yes | yes |
/// | a token of ours | the token | no | no |
/// | 55P03 lock timeout | no | no | no |
/// | 57014 cancelled, or cut by `statement_timeout` | no | no | no |
///
/// The last two differ by time: the server cannot end a wait before its limit has passed since the statement was sent,
/// on clocks that run at the same rate to 0.2 %. But after that a cancel looks the same, so a session's lock may have
/// been granted nevertheless.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    /// The session has ended, and with it all that it held.
    Lost(Cause),
    /// A deadlock, or it is a standby. Nothing was granted.
    Refused(Reason, Cause),
    /// With this DETAIL, and without a HINT.
    Detail(String, Failed),
    /// Anything else. A session's lock may have been granted.
    Other(Failed),
}

/// A wait that has failed, and how that looks.
///
/// The reason is a timeout if the wait's own limit has passed, or if it held another session up that waits for this
/// transaction to end, as `CREATE INDEX CONCURRENTLY` does: that one goes on as soon as the wait starts over, in
/// another transaction.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failed {
    pub(super) reason: Reason,
    pub(super) cause: Cause,
    /// The limit of the wait, in milliseconds; 0 if it cannot be the cause.
    pub(super) millis: u32,
    /// How long after it was sent.
    pub(super) passed: Duration,
}

impl Failed {
    fn new(millis: u32, passed: Duration) -> Self {
        let (reason, cause) = (Reason::Database, Cause::default());
        Self {
            reason,
            cause,
            millis,
            passed,
        }
    }

    /// A wait with this limit failed now.
    pub(super) fn after(millis: u32, sent: Duration, now: Duration) -> Self {
        Self::new(millis, now.saturating_sub(sent))
    }

    /// It had no limit that could end it with an error.
    pub(super) fn unlimited() -> Self {
        Self::new(0, Duration::ZERO)
    }

    /// The answer was of another kind than asked for.
    pub(super) fn strange() -> Self {
        Self::unlimited()
    }

    /// The limit passed, or it held another session up.
    pub(super) fn is_timeout(&self) -> bool {
        matches!(self.reason, Reason::Timeout { .. })
    }

    /// The reason of a wait that does not start over.
    pub(super) fn reason(&self) -> Reason {
        match &self.reason {
            Reason::Timeout { .. } => Reason::Interrupted,
            reason => reason.clone(),
        }
    }

    /// The failure of an engine, after the question what it calls itself.
    ///
    /// PostgreSQL answers the questions to its locks, and gives a HINT where its table of locks is full. YugabyteDB up
    /// to 2024 gives a HINT where it refuses a lock, and CockroachDB does not know the functions.
    pub(super) fn of_engine(failure: Failure, answer: Answer) -> Failure {
        match answer {
            Answer::Rows(Rows::Text(version)) if !is_postgres(&version) => Failure {
                reason: Reason::Unsupported,
                ..failure
            },
            Answer::Error(error) if error.lost => failure.lost_meanwhile(),
            _ => failure,
        }
    }

    /// The failure, after the question whether there are such locks was answered with an error.
    pub(super) fn probed(self, answer: Answer) -> Failure {
        match answer {
            Answer::Error(error) if error.lost => Failure::lost(error.cause),
            Answer::Error(error) if error.hint && !error.position => {
                Reason::TooManyLocks.clean(error.cause)
            }
            _ => Reason::Unsupported.clean(self.cause),
        }
    }
}

const TIMEOUT: Reason = Reason::Timeout {
    waited: Duration::ZERO,
    holders: Vec::new(),
};

impl Fault {
    /// In a transaction that goes on: who waits for its end waits until this wait is over, so every deadlock is one.
    pub(super) fn inside(error: ErrorFields, failed: Failed) -> Self {
        match error.detail.is_some() && error.hint && !error.lost {
            true => Fault::Refused(Reason::Deadlock, error.cause),
            false => Self::new(error, failed),
        }
    }

    pub(super) fn new(error: ErrorFields, mut failed: Failed) -> Self {
        if error.lost {
            return Fault::Lost(error.cause);
        }
        failed.cause = error.cause;
        // The client's clock may be slower than the server's.
        let passed = failed.passed + failed.passed / 500 + Duration::from_millis(1);
        let limit = Duration::from_millis(failed.millis.into());
        failed.reason = match (&error.detail, error.hint) {
            (Some(detail), true) if names_virtual_transaction(detail) => TIMEOUT,
            (Some(_), true) => return Fault::Refused(Reason::Deadlock, failed.cause),
            (Some(detail), false) if detail.contains(sql::TOKEN_STANDBY) => {
                return Fault::Refused(Reason::Standby, failed.cause);
            }
            (Some(detail), false) => return Fault::Detail(detail.clone(), failed),
            (None, _) if error.position => Reason::Unsupported,
            (None, true) => Reason::TooManyLocks,
            (None, false) if failed.millis > 0 && passed >= limit => TIMEOUT,
            (None, false) => Reason::Interrupted,
        };
        Fault::Other(failed)
    }
}

/// The failure of a conversation in an open transaction that is aborted now: nothing was granted, or it goes with the
/// transaction.
pub(super) fn aborted(error: ErrorFields) -> Failure {
    match Fault::new(error, Failed::unlimited()) {
        Fault::Lost(cause) => Failure::lost(cause),
        Fault::Refused(reason, cause) => reason.clean(cause),
        Fault::Other(Failed {
            reason: reason @ (Reason::TooManyLocks | Reason::Unsupported),
            cause,
            ..
        }) => reason.clean(cause),
        Fault::Detail(_, failed) | Fault::Other(failed) => Reason::Database.clean(failed.cause),
    }
}

/// The failure of a step whose answer nobody knows how to read: the session is ended, unless it is gone.
pub(super) fn unknown(answer: Answer) -> Failure {
    match answer {
        Answer::Error(error) if error.lost => Failure::lost(error.cause),
        Answer::Error(error) => Reason::Database.broken(error.cause),
        Answer::Done | Answer::Rows(_) => Reason::Database.broken(Cause::default()),
    }
}

/// Whether the DETAIL of a deadlock names a virtual transaction, as in "waits for ShareLock on virtual transaction
/// 3/17". Nothing else in it is two numbers around a slash, in any language.
fn names_virtual_transaction(detail: &str) -> bool {
    detail.split_whitespace().any(|word| {
        let word = word.trim_end_matches(|letter: char| !letter.is_ascii_digit());
        word.split_once('/').is_some_and(|(backend, transaction)| {
            let is_number =
                |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            is_number(backend) && is_number(transaction)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_transaction_is_recognized_in_every_language() {
        for detail in [
            "Process 17 waits for ExclusiveLock on advisory lock [5,0,42,1]; blocked by process 18.\n\
             Process 18 waits for ShareLock on virtual transaction 3/1234; blocked by process 17.",
            "Prozess 18 wartet auf ShareLock-Sperre auf virtuelle Transaktion 3/1234; blockiert von Prozess 17.",
        ] {
            assert!(names_virtual_transaction(detail));
        }
        assert!(!names_virtual_transaction(
            "Process 17 waits for ExclusiveLock on advisory lock [5,0,42,1]; blocked by process 18."
        ));
    }
}
