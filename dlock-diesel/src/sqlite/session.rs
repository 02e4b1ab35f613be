//! A connection that takes locks.

use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Condvar, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use dlock_core::{Holder, Mode};

use super::Trouble;
use super::file::{self, LockFile};
use super::lock::Waiter;
use super::table::{Database, DatabaseId, Look, table};

/// Who waits for another process asks again after a fiftieth of the time that it has waited, within these bounds.
const PAUSES: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(10));

/// What came of asking for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acquired {
    Granted,
    Busy,
    GivenUp,
}

/// A connection that can take locks. It frees them when it is closed.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: i64,
    pub(super) database: DatabaseId,
}

impl Session {
    /// A connection to that file, or to no file.
    pub(super) fn new(path: Option<PathBuf>) -> Result<Self, Trouble> {
        // The process id, and above it the count of its connections.
        static COUNT: AtomicI64 = AtomicI64::new(0);
        let process = process::id();
        let id = i64::from(process) | (COUNT.fetch_add(1, Ordering::Relaxed) << 32);
        let (database, file) = match path {
            None => (DatabaseId::Memory { process }, None),
            Some(path) => {
                let file = file::id_of(&path)?;
                let lock_file = LockFile::new(path, file);
                (DatabaseId::File { process, file }, Some(lock_file))
            }
        };
        let mut table = table();
        // After a fork: closes the copies of the parent's files, which would keep its locks when it ends.
        table.forget_other_processes(process);
        let entry = table.databases.entry(database).or_insert_with(|| Database {
            file,
            ..Database::default()
        });
        entry.sessions.insert(id);
        Ok(Self { id, database })
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// Acquires the lock, and waits for it at most that long.
    pub(super) fn acquire(
        &self,
        key: u64,
        mode: Mode,
        limit: Option<Duration>,
        request: i64,
    ) -> Result<Acquired, Trouble> {
        self.refuse_forked()?;
        let began = Instant::now();
        let deadline = limit.and_then(|limit| began.checked_add(limit));
        let place = (self.database, key);
        let wake = Arc::new(Condvar::new());

        let mut table = table();
        if table.given_up.remove(&request) {
            return Ok(Acquired::GivenUp);
        }
        table.requests.insert(request, place);
        table.lock(place).queue.push_back(Waiter {
            session: self.id,
            mode,
            request,
            since: SystemTime::now(),
            wake: Arc::clone(&wake),
        });
        let mut first = true;
        let result = loop {
            let busy = match table.look(place, request) {
                Ok(Look::Granted) => return Ok(Acquired::Granted),
                Ok(Look::GivenUp) => return Ok(Acquired::GivenUp),
                Ok(busy) => busy,
                Err(trouble) => break Err(trouble),
            };
            let now = Instant::now();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            if left == Some(Duration::ZERO) {
                break Ok(Acquired::Busy);
            }
            if std::mem::take(&mut first) && table.is_deadlock(self.id) {
                break Err(Trouble::deadlock(
                    "the connections of this process that have the lock wait for this one",
                ));
            }
            let mut pause = left;
            if let Look::BusyElsewhere = busy {
                if let Err(trouble) = table.wait_elsewhere(place, self.id, mode) {
                    break Err(trouble);
                }
                let polling = ((now - began) / 50).clamp(PAUSES.0, PAUSES.1);
                pause = Some(left.map_or(polling, |left| left.min(polling)));
            }
            table = match pause {
                Some(pause) => {
                    let waited = wake.wait_timeout(table, pause);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => wake.wait(table).unwrap_or_else(PoisonError::into_inner),
            };
        };
        table.remove(request);
        result
    }

    /// Releases the hold. `false` if there is none, or if other processes did not see it any more.
    pub(super) fn release(&self, key: u64, request: i64) -> Result<bool, Trouble> {
        self.refuse_forked()?;
        let mut table = table();
        let held = table.is_held(self, key, request);
        if table.holds(self, key, request) {
            table.remove(request);
        }
        Ok(held)
    }

    pub(super) fn release_all(&self) -> i64 {
        if self.refuse_forked().is_err() {
            return 0;
        }
        table().release_all(self)
    }

    pub(super) fn is_held(&self, key: u64, request: i64) -> Result<bool, Trouble> {
        self.refuse_forked()?;
        Ok(table().is_held(self, key, request))
    }

    /// Who holds the lock and who waits for it, holders first, behind their sessions.
    pub(super) fn holders(&self, key: u64) -> Result<Vec<(i64, Holder)>, Trouble> {
        self.refuse_forked()?;
        // To find out about other processes takes a while, in which the table is free for others.
        let found = table().holders((self.database, key))?;
        Ok(found.complete())
    }

    /// SQLite's connections do not survive a fork either.
    fn refuse_forked(&self) -> Result<(), Trouble> {
        if self.database.process() == process::id() {
            return Ok(());
        }
        Err(Trouble::other(
            "this connection was opened by another process, before a fork: open one in this process",
        ))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.refuse_forked().is_err() {
            return;
        }
        let mut table = table();
        table.release_all(self);
        if let Some(database) = table.databases.get_mut(&self.database) {
            database.sessions.remove(&self.id);
            if database.sessions.is_empty() {
                table.databases.remove(&self.database);
            }
        }
    }
}
