//! Migrations that wait for long say so: a start that hangs in silence looks like any other fault.

use std::time::{Duration, Instant};

use super::trace;
use crate::Error;

/// The first notice comes after this.
const FIRST: Duration = Duration::from_secs(3);

/// Further ones come after this.
const NEXT: Duration = Duration::from_secs(60);

/// A wait that is cut into parts. Each part ends with the lock, or with a notice that names the holder.
#[derive(Debug)]
pub struct Notices {
    limit: Option<Duration>,
    started: Instant,
    pause: Duration,
}

impl Notices {
    /// The wait begins now. The limit is the caller's.
    pub fn new(limit: Option<Duration>) -> Self {
        Self {
            limit,
            started: Instant::now(),
            pause: FIRST,
        }
    }

    /// What is left of the caller's limit.
    pub fn rest(&self) -> Option<Duration> {
        let waited = self.started.elapsed();
        self.limit.map(|limit| limit.saturating_sub(waited))
    }

    /// The limit of the next part.
    pub fn part(&self) -> Duration {
        self.rest().map_or(self.pause, |rest| rest.min(self.pause))
    }

    /// A part has failed.
    ///
    /// # Errors
    ///
    /// The error, unless the wait goes on.
    pub fn after(&mut self, error: Error) -> Result<(), Error> {
        let Error::Timeout { key, holders, .. } = error else {
            return Err(error);
        };
        let error = Error::Timeout {
            key,
            waited: self.started.elapsed(),
            holders,
        };
        if self.rest() == Some(Duration::ZERO) {
            return Err(error);
        }
        self.pause = NEXT;
        let notice = format!("waiting to migrate: {error}");
        if !trace::migrations_wait(&notice) {
            eprintln!("{notice}");
        }
        Ok(())
    }
}
