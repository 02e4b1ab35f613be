//! Spans and events.

use std::fmt;
use std::time::{Duration, Instant};

use dlock_core::proto::{Ask, Dialect, Wait};
use dlock_core::{Holder, LockKey, Mode};
use tracing::field::{Empty, display};
use tracing::{Instrument, Span};

use super::outcome::{Ended, Outcome};
use super::slow::{LONG, Watched};
use crate::Error;
use crate::manager::desk::Slot;

/// A request for locks, from the call on until its end.
#[derive(Debug)]
pub struct Waiting {
    span: Span,
    started: Instant,
    watched: Option<Watched>,
    only_tries: bool,
    ended: bool,
}

impl Waiting {
    /// `permits` are those of a semaphore.
    pub fn of<D: Dialect>(ask: &Ask, permits: Option<u32>) -> Self {
        Self::new::<D>(&Keys(ask), ask.mode, ask.wait, permits)
    }

    fn new<D: Dialect>(
        key: &dyn fmt::Display,
        mode: Mode,
        wait: Wait,
        permits: Option<u32>,
    ) -> Self {
        let span = tracing::info_span!(
            target: "dlock",
            "dlock.acquire",
            key = %key,
            server = D::SERVER,
            mode = match mode {
                Mode::Exclusive => "exclusive",
                Mode::Shared => "shared",
            },
            permits,
            wait = %Asked(wait),
            held_by = Empty,
            outcome = Empty,
            waited_ms = Empty,
            error = Empty,
        );
        let may_be_long = wait.limit.is_none_or(|limit| limit > LONG);
        let watched = may_be_long.then(|| Watched::new(&span, key));
        Self {
            watched: watched.flatten(),
            span,
            started: Instant::now(),
            only_tries: wait.limit == Some(Duration::ZERO),
            ended: false,
        }
    }

    /// Runs a request that blocks.
    pub fn run<T: Ended>(self, f: impl FnOnce() -> T) -> T {
        let result = self.span.in_scope(f);
        self.end(result.outcome());
        result
    }

    /// Runs a request that may be dropped.
    pub async fn during<F: Future<Output: Ended>>(self, future: F) -> F::Output {
        let result = future.instrument(self.span.clone()).await;
        self.end(result.outcome());
        result
    }

    fn end(mut self, outcome: Outcome<'_>) {
        let name = match outcome {
            // A managed lock does not tell the two apart.
            Outcome::Timeout(_) if self.only_tries => Outcome::Taken.name(),
            _ => outcome.name(),
        };
        self.record(name);
        match outcome {
            Outcome::Timeout(holders) if !self.only_tries => {
                let held_by = display(Sessions(holders, true));
                let waited_for_by = display(Sessions(holders, false));
                tracing::info!(target: "dlock", parent: &self.span, held_by, waited_for_by, "gave up waiting");
            }
            Outcome::Failed(_, Some(error)) => {
                self.span.record("error", display(error));
            }
            _ => {}
        }
    }

    fn record(&mut self, outcome: &str) {
        self.ended = true;
        self.watched = None;
        self.span.record("outcome", outcome);
        let waited = self.started.elapsed().as_millis();
        self.span
            .record("waited_ms", u64::try_from(waited).unwrap_or(u64::MAX));
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // A future that was dropped, or a panic.
        if !self.ended {
            self.record("dropped");
        }
    }
}

/// A lock that is given back.
#[derive(Debug)]
pub struct Releasing(Span);

impl Releasing {
    pub fn of(key: &LockKey) -> Self {
        let span = tracing::info_span!(target: "dlock", "dlock.release", key = %key);
        Self(span)
    }

    pub fn run<T>(self, f: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.0.in_scope(|| kept(f()))
    }

    /// Does what a dropped guard does.
    pub fn drop(self, f: impl FnOnce()) {
        self.0.in_scope(f);
    }

    /// The same, where it waits for an answer.
    pub async fn drop_async(self, future: impl Future<Output = ()>) {
        future.instrument(self.0).await;
    }

    pub async fn during<T>(
        self,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        async { kept(future.await) }.instrument(self.0).await
    }
}

/// Tells of the loss if the error is one.
pub fn kept<T>(result: Result<T, Error>) -> Result<T, Error> {
    result.map_err(lost_error)
}

/// The same, of an error alone.
pub fn lost_error(error: Error) -> Error {
    if let Error::Lost { key, .. } | Error::NotHeld { key } = &error {
        lost(key);
    }
    error
}

/// Tells of the loss if the lock is not held.
pub fn is_held(result: Result<bool, Error>, key: &LockKey) -> Result<bool, Error> {
    if let Ok(false) = result {
        lost(key);
    }
    kept(result)
}

/// Tells when a managed lock is lost.
pub fn on_loss(slot: &Slot, key: &LockKey) {
    let key = key.clone();
    slot.trace_loss(Box::new(move || lost(&key)));
}

fn lost(key: &LockKey) {
    tracing::warn!(target: "dlock", %key, "lock lost");
}

/// Whether anybody would see who has a lock that is waited for.
pub fn sees_waits() -> bool {
    tracing::enabled!(target: "dlock", tracing::Level::INFO)
}

/// The same request. It tells who has the lock, if anybody would see it.
pub fn asking(ask: Ask) -> Ask {
    Ask {
        tell_holders: sees_waits(),
        ..ask
    }
}

/// The request of this span waits for these.
pub fn holders(holders: &[Holder]) {
    Span::current().record("held_by", display(Sessions(holders, true)));
}

/// dlock has ended a session. The span tells why.
pub fn session_ended() {
    tracing::warn!(target: "dlock", "session ended, because nobody knows what it holds");
}

/// A pool will discard the connection.
pub fn marked_broken() {
    tracing::warn!(target: "dlock", "connection marked broken");
}

/// Tells that migrations wait. `false`: nobody would see it.
pub fn migrations_wait(message: &str) -> bool {
    let seen = tracing::enabled!(target: "dlock", tracing::Level::WARN);
    tracing::warn!(target: "dlock", "{message}");
    seen
}

/// All keys of a request.
struct Keys<'a>(&'a Ask);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, key) in self.0.keys().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{key}")?;
        }
        Ok(())
    }
}

/// How a request waits.
struct Asked(Wait);

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.limit {
            None => f.write_str("no limit")?,
            Some(Duration::ZERO) => f.write_str("try")?,
            Some(limit) => write!(f, "at most {limit:?}")?,
        }
        match self.0.poll {
            Some(interval) => write!(f, ", every {interval:?}"),
            None => Ok(()),
        }
    }
}

/// The sessions that hold a lock, or those that wait for it.
struct Sessions<'a>(&'a [Holder], bool);

impl fmt::Display for Sessions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sessions = self.0.iter().filter(|session| session.granted == self.1);
        for (number, session) in sessions.enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{session}")?;
        }
        Ok(())
    }
}
