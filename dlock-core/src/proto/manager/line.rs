use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::action::{Identity, Wanted};
use super::slab::Id;
use crate::LockKey;

/// All requests of this process for one lock.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) identity: Identity,
    /// Those who wait.
    pub(super) queue: VecDeque<Id>,
    /// What the server has granted. More than one only while readers move from one to the next.
    pub(super) holds: Vec<Id>,
    pub(super) asking: Asking,
    /// Its place among the lines that wait for a connection to wait on.
    pub(super) order: Option<u64>,
    /// How many connections were lost in a row while asking.
    pub(super) losses: u32,
    /// The last pause between two tries.
    pub(super) pause: Option<Duration>,
    /// The server was asked who has the lock, and has told nobody.
    pub(super) silent: bool,
    /// Since when the server is asked in vain: nobody in this process wants the lock any more.
    pub(super) unwanted: Option<Duration>,
}

impl Line {
    pub(super) fn is_semaphore(&self) -> bool {
        matches!(self.identity, Identity::Semaphore(_))
    }
}

/// Whether the server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asking {
    No,
    /// As soon as a connection is free.
    Ready,
    /// Now. `until` is when the server gives up, if a limit of a request makes it.
    Now {
        until: Option<Duration>,
        waits: bool,
    },
    /// It is taken. Tried again at `at`.
    Parked {
        at: Duration,
    },
}

/// Somebody who waits or holds.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) line: Id,
    pub(super) what: Arc<Wanted>,
    /// Other names of its group that have the same line.
    pub(super) more: Arc<[LockKey]>,
    pub(super) tries: bool,
    /// When its limit passes.
    pub(super) until: Option<Duration>,
    pub(super) since: Duration,
    /// It is one of several that are acquired as one.
    pub(super) group: Option<Id>,
    /// It has heard who has the lock.
    pub(super) told: bool,
    /// What it was granted.
    pub(super) hold: Option<Id>,
    /// Its limit has passed, but the server's answer is on its way.
    pub(super) grace: bool,
}

impl Request {
    pub(super) fn new(
        line: Id,
        what: Arc<Wanted>,
        tries: bool,
        until: Option<Duration>,
        group: Option<Id>,
        now: Duration,
    ) -> Self {
        Self {
            line,
            what,
            more: Arc::default(),
            tries,
            until,
            since: now,
            group,
            told: false,
            hold: None,
            grace: false,
        }
    }
}
