//! The locks of one database: a queue for the connections of this process, and the lock file for other processes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar};
use std::time::SystemTime;

use dlock_core::Mode;

use super::file_locks::{FileLocks, LocalUse};
use super::function_error::FunctionError;
use super::holders::HolderList;
use super::lock_file::{FileId, LockFile};
use super::queue::{Changed, Queue, Request, Requested};

/// Identifies the connections that share locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DatabaseId {
    /// All databases of this process that are not files: SQLite does not tell them apart.
    Memory { process: u32 },
    /// The process is part of it because a forked child has a copy of all this, and needs entries of its own.
    File { process: u32, file: FileId },
}

impl DatabaseId {
    pub(super) fn process(self) -> u32 {
        match self {
            Self::Memory { process } | Self::File { process, .. } => process,
        }
    }
}

/// What came of a waiter's try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    Granted,
    GivenUp,
    /// Another connection of this process is in the way, and wakes the waiter.
    BusyHere,
    /// Another process is in the way, and cannot wake the waiter.
    BusyElsewhere,
}

#[derive(Debug, Default)]
pub(super) struct Database {
    sessions: HashSet<i64>,
    queue: Queue<u64, i64, i64>,
    /// One for each request in the queue.
    details: HashMap<i64, Details>,
    /// None for databases in memory.
    file: Option<FileLocks>,
    /// The last fencing token that this process has drawn.
    last_token: i64,
}

/// What the queue does not know of a request.
#[derive(Debug)]
struct Details {
    /// Since when it waits, or holds the lock.
    since: SystemTime,
    /// Wakes its thread while it waits.
    wake: Arc<Condvar>,
}

impl Database {
    pub(super) fn new(file: Option<LockFile>) -> Self {
        Self {
            file: file.map(FileLocks::new),
            ..Self::default()
        }
    }

    pub(super) fn add_session(&mut self, session: i64) {
        self.sessions.insert(session);
    }

    /// Returns whether it was the last one.
    pub(super) fn remove_session(&mut self, session: i64) -> bool {
        self.sessions.remove(&session);
        self.sessions.is_empty()
    }

    pub(super) fn has_session(&self, session: i64) -> bool {
        self.sessions.contains(&session)
    }

    pub(super) fn is_waiting(&self, session: i64) -> bool {
        self.queue.is_waiting(session)
    }

    pub(super) fn request(
        &mut self,
        key: u64,
        request: Request<i64, i64>,
        wake: Arc<Condvar>,
    ) -> Requested {
        let requested = self.queue.request(key, request);
        if requested != Requested::Deadlock {
            let since = SystemTime::now();
            self.details.insert(request.id, Details { since, wake });
        }
        requested
    }

    /// Takes the lock if nobody is in the way.
    pub(super) fn try_take(&mut self, id: i64) -> Result<Attempt, FunctionError> {
        let Some((key, waiter)) = self.queue.waiter(id) else {
            return Ok(Attempt::GivenUp);
        };
        let key = *key;
        if !self.queue.is_ready(id) {
            return Ok(Attempt::BusyHere);
        }
        if self.stands_back(key, waiter)? {
            return Ok(Attempt::BusyElsewhere);
        }
        let local = self.local_use(key);
        if let Some(file) = &mut self.file {
            if !file.take(key, waiter.mode, local)? {
                return Ok(Attempt::BusyElsewhere);
            }
        }
        let granted = self.queue.grant(id).expect("BUG: it is ready");
        if let Some(details) = self.details.get_mut(&id) {
            details.since = SystemTime::now();
        }
        // Readers behind a reader: they need not ask the lock file.
        self.wake(&granted);
        Ok(Attempt::Granted)
    }

    /// Whether the waiter is a reader that lets a writer of another process go first.
    fn stands_back(&mut self, key: u64, waiter: Request<i64, i64>) -> Result<bool, FunctionError> {
        let local = self.local_use(key);
        let Some(file) = &mut self.file else {
            return Ok(false);
        };
        // A session that holds this lock goes first: the writer waits for it.
        if waiter.mode == Mode::Exclusive
            || self.queue.is_held_by(&key, waiter.owner)
            || !file.is_left_to_a_writer(key, local)?
        {
            return Ok(false);
        }
        // So does one that holds another lock for which somebody waits: the writer may wait for that one.
        let mut held = self.queue.held_by(waiter.owner);
        let blocks_somebody =
            held.any(|(key, _)| self.queue.waiters(key).next().is_some() || file.is_awaited(*key));
        Ok(!blocks_somebody)
    }

    /// Shows other processes that this request waits for them.
    pub(super) fn show_waiter(&mut self, id: i64) -> Result<(), FunctionError> {
        let (Some(file), Some((key, waiter))) = (&mut self.file, self.queue.waiter(id)) else {
            return Ok(());
        };
        let is_holder = self.queue.is_held_by(key, waiter.owner);
        file.show_waiter(*key, waiter.mode, is_holder)
    }

    /// Ends a request, whether it holds the lock or waits for it. Returns `false` if there is none.
    pub(super) fn end(&mut self, id: i64) -> bool {
        let cancelled = self.queue.cancel(id);
        if let (Some(cancelled), Some(file)) = (&cancelled, &mut self.file) {
            file.hide_waiter(cancelled.key, cancelled.mode);
        }
        let Some(changed) = cancelled.or_else(|| self.queue.release(id)) else {
            return false;
        };
        if let Some(details) = self.details.remove(&id) {
            // The waiter finds out that it was given up.
            details.wake.notify_one();
        }
        let local = self.local_use(changed.key);
        if let Some(file) = &mut self.file {
            file.give_back(changed.key, local);
        }
        self.wake(&changed);
        true
    }

    fn wake(&self, changed: &Changed<u64, i64>) {
        for id in &changed.ready {
            if let Some(details) = self.details.get(id) {
                details.wake.notify_one();
            }
        }
    }

    fn local_use(&self, key: u64) -> LocalUse {
        let modes = self.queue.holders(&key).map(|holder| holder.mode);
        LocalUse {
            held: modes.reduce(|one, other| match one {
                Mode::Exclusive => one,
                Mode::Shared => other,
            }),
            is_awaited: self.queue.waiters(&key).next().is_some(),
        }
    }

    /// Whether anybody holds the lock or waits for it, in whatever process.
    pub(super) fn is_wanted(&mut self, key: u64) -> Result<bool, FunctionError> {
        let here =
            self.queue.holders(&key).next().is_some() || self.queue.waiters(&key).next().is_some();
        Ok(here
            || match &mut self.file {
                Some(file) => file.is_wanted(key)?,
                None => false,
            })
    }

    pub(super) fn is_held_by(&self, key: u64, session: i64) -> bool {
        self.queue.is_held_by(&key, session)
    }

    pub(super) fn is_held_by_other(&self, key: u64, session: i64) -> bool {
        let mut holders = self.queue.holders(&key);
        holders.any(|holder| holder.owner != session)
    }

    /// The requests by which the session holds anything.
    pub(super) fn held_by(&self, session: i64) -> Vec<i64> {
        let held = self.queue.held_by(session);
        held.map(|(_, holder)| holder.id).collect()
    }

    pub(super) fn holds(&self, session: i64, key: u64, id: i64) -> bool {
        let mut holders = self.queue.holders(&key);
        holders.any(|holder| holder.owner == session && holder.id == id)
    }

    /// Whether the session holds the lock by that request, and other processes see it.
    pub(super) fn is_held(&self, session: i64, key: u64, id: i64) -> bool {
        let is_seen = self.file.as_ref().is_none_or(|file| file.is_seen(key));
        is_seen && self.holds(session, key, id)
    }

    /// Draws a fencing token. Returns `None` while another process draws one.
    ///
    /// Tokens are microseconds since the Unix epoch, unless the clock is behind the last one. So they rise also where
    /// the lock file has been deleted.
    pub(super) fn draw_token(&mut self) -> Result<Option<i64>, FunctionError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_micros() as i64);
        let least = now.max(self.last_token.saturating_add(1));
        let drawn = match &mut self.file {
            Some(file) => file.draw_token(least)?,
            None => Some(least),
        };
        self.last_token = drawn.unwrap_or(self.last_token);
        Ok(drawn)
    }

    pub(super) fn holders(&mut self, key: u64) -> Result<HolderList, FunctionError> {
        let mut list = HolderList::default();
        let since = |id| self.details.get(&id).map(|details| details.since);
        for holder in self.queue.holders(&key) {
            if let Some(since) = since(holder.id) {
                list.add_holder(holder.owner, holder.mode, since);
            }
        }
        for waiter in self.queue.waiters(&key) {
            if let Some(since) = since(waiter.id) {
                list.add_waiter(waiter.owner, waiter.mode, since);
            }
        }
        if let Some(file) = &mut self.file {
            let holders = file.foreign_holders(key)?;
            list.add_foreign(holders, file.foreign_waiters(key));
        }
        Ok(list)
    }
}
