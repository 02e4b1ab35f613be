//! A connection that takes locks.

use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Condvar, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dlock_core::{Holder, Mode};

use super::database::{Attempt, DatabaseId};
use super::function_error::FunctionError;
use super::lock_file::{self, LockFile};
use super::queue::{Request, Requested};
use super::table::{Draw, Searched, Slots, table};

/// The bounds of the pause between two tries while another process is in the way. In between, a waiter pauses for a
/// fiftieth of the time that it has waited.
const PAUSES: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(10));

/// How long a process may be in the middle of drawing a fencing token, which takes it microseconds.
const DRAWS_FOR: Duration = Duration::from_secs(5);

/// How a request for a lock ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acquired {
    Granted,
    Busy,
    GivenUp,
}

/// A connection that can take locks. It frees them when it is closed.
#[derive(Debug)]
pub(super) struct Session {
    id: i64,
    database: DatabaseId,
}

impl Session {
    /// For a connection to that file, or to no file.
    pub(super) fn new(path: Option<PathBuf>) -> Result<Self, FunctionError> {
        // The low half of a session's id is the process's id, the high half counts its connections.
        static COUNT: AtomicI64 = AtomicI64::new(0);
        let process = process::id();
        let id = i64::from(process) | (COUNT.fetch_add(1, Ordering::Relaxed) << 32);
        let (database, file) = match path {
            None => (DatabaseId::Memory { process }, None),
            Some(path) => {
                let file = lock_file::id_of(&path)?;
                let lock_file = LockFile::new(path, file);
                (DatabaseId::File { process, file }, Some(lock_file))
            }
        };
        table().open_session(database, id, file);
        Ok(Self { id, database })
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// Acquires the lock, and waits for it for as long as the limit allows.
    pub(super) fn acquire(
        &self,
        key: u64,
        mode: Mode,
        limit: Option<Duration>,
        request: i64,
    ) -> Result<Acquired, FunctionError> {
        self.refuse_forked()?;
        let began = Instant::now();
        let deadline = limit.and_then(|limit| began.checked_add(limit));
        let time_left =
            |now| deadline.map(|deadline: Instant| deadline.saturating_duration_since(now));
        let wake = Arc::new(Condvar::new());
        let asked = Request {
            id: request,
            owner: self.id,
            mode,
        };

        let mut table = table();
        match table.request(self.database, key, asked, Arc::clone(&wake))? {
            None => return Ok(Acquired::GivenUp),
            Some(Requested::Deadlock) if time_left(Instant::now()) == Some(Duration::ZERO) => {
                return Ok(Acquired::Busy);
            }
            Some(Requested::Deadlock) => {
                return Err(FunctionError::deadlock(
                    "the connections of this process that hold the lock wait for this one",
                ));
            }
            Some(Requested::Ready | Requested::Blocked) => {}
        }
        let result = loop {
            let busy = match table.try_take(self.database, request) {
                Ok(Attempt::Granted) => return Ok(Acquired::Granted),
                Ok(Attempt::GivenUp) => return Ok(Acquired::GivenUp),
                Ok(busy) => busy,
                Err(error) => break Err(error),
            };
            let now = Instant::now();
            let left = time_left(now);
            if left == Some(Duration::ZERO) {
                break Ok(Acquired::Busy);
            }
            let mut pause = left;
            if busy == Attempt::BusyElsewhere {
                if let Err(error) = table.show_waiter(self.database, request) {
                    break Err(error);
                }
                let until_next_try = ((now - began) / 50).clamp(PAUSES.0, PAUSES.1);
                pause = Some(left.map_or(until_next_try, |left| left.min(until_next_try)));
            }
            table = match pause {
                Some(pause) => {
                    let waited = wake.wait_timeout(table, pause);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => wake.wait(table).unwrap_or_else(PoisonError::into_inner),
            };
        };
        table.end(request);
        result
    }

    /// Acquires a slot of a semaphore, one that this session has already only `again`. While others wait it queues for
    /// the gate, and then looks for a free slot for as long as the limit allows.
    pub(super) fn acquire_slot(
        &self,
        slots: Slots,
        again: bool,
        limit: Option<Duration>,
        request: i64,
    ) -> Result<Searched, FunctionError> {
        self.refuse_forked()?;
        let began = Instant::now();
        let time_left = || limit.map(|limit| limit.saturating_sub(began.elapsed()));
        let asked = Request {
            id: request,
            owner: self.id,
            mode: Mode::Exclusive,
        };
        let tried = table().try_slots(self.database, slots, again, asked)?;
        if tried != Searched::NotFound || limit == Some(Duration::ZERO) {
            return Ok(tried);
        }

        // Requests are numbered one after another, so nobody has this number.
        let at_the_gate = request ^ i64::MIN;
        if !table().begin_search(request, at_the_gate) {
            return Ok(Searched::GivenUp);
        }
        let _gate = AtTheGate {
            request,
            at_the_gate,
        };
        match self.acquire(slots.gate, Mode::Exclusive, time_left(), at_the_gate)? {
            Acquired::Granted => {}
            Acquired::Busy => return Ok(Searched::NotFound),
            Acquired::GivenUp => return Ok(Searched::GivenUp),
        }
        let looks_since = Instant::now();
        loop {
            let found = table().search(self.database, slots, asked)?;
            let left = time_left();
            if found != Searched::NotFound || left == Some(Duration::ZERO) {
                return Ok(found);
            }
            let pause = (looks_since.elapsed() / 32).clamp(PAUSES.0, PAUSES.1);
            thread::sleep(left.map_or(pause, |left| left.min(pause)));
        }
    }

    /// Who has a slot of a semaphore and who waits for one, holders first. To hold the gate is to wait.
    pub(super) fn slot_holders(&self, slots: Slots) -> Result<Vec<(i64, Holder)>, FunctionError> {
        self.refuse_forked()?;
        let mut all = Vec::new();
        for slot in 0..slots.permits {
            let list = table().holders(self.database, slots.key(slot))?;
            all.extend(list.complete());
        }
        let list = table().holders(self.database, slots.gate)?;
        for (session, mut holder) in list.complete() {
            holder.granted = false;
            all.push((session, holder));
        }
        Ok(all)
    }

    /// Releases the hold. Returns `false` if there is none, or if other processes no longer saw it.
    pub(super) fn release(&self, key: u64, request: i64) -> Result<bool, FunctionError> {
        self.refuse_forked()?;
        Ok(table().release(self.database, self.id, key, request))
    }

    /// Returns how many holds were released.
    pub(super) fn release_all(&self) -> i64 {
        if self.refuse_forked().is_err() {
            return 0;
        }
        table().release_all(self.database, self.id)
    }

    pub(super) fn is_held(&self, key: u64, request: i64) -> Result<bool, FunctionError> {
        self.refuse_forked()?;
        Ok(table().is_held(self.database, self.id, key, request))
    }

    /// Draws a fencing token. Returns 0 if this session does not have that hold.
    pub(super) fn draw_token(&self, key: u64, request: i64) -> Result<i64, FunctionError> {
        self.refuse_forked()?;
        let began = Instant::now();
        loop {
            let draw = table().draw_token(self.database, self.id, key, request)?;
            match draw {
                Draw::Token(token) => return Ok(token),
                Draw::NotHeld => return Ok(0),
                Draw::BusyElsewhere if began.elapsed() > DRAWS_FOR => {
                    return Err(FunctionError::other(
                        "another process was stopped while it drew a fencing token: let it go on, or end it",
                    ));
                }
                Draw::BusyElsewhere => thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    /// Who holds the lock and who waits for it, holders first, each one behind its session.
    pub(super) fn holders(&self, key: u64) -> Result<Vec<(i64, Holder)>, FunctionError> {
        self.refuse_forked()?;
        // The search for other processes takes a while. It does not need the table, which others may use meanwhile.
        let list = table().holders(self.database, key)?;
        Ok(list.complete())
    }

    /// Takes a lock that nobody else has, and releases it: lines of facts for the core's check.
    pub(super) fn check(&self, key: u64, request: i64) -> String {
        let taken = self.acquire(key, Mode::Exclusive, Some(Duration::ZERO), request);
        let released = taken.and_then(|_| self.release(key, request));
        let in_memory = i64::from(matches!(self.database, DatabaseId::Memory { .. }));
        let refused = released.err().map(|error| error.to_string());
        let refused = refused.unwrap_or_default().replace(['\n', '\r'], " ");
        format!("memory={in_memory}\nrefused={refused}")
    }

    /// The connection of a parent process is not for its child: SQLite does not allow it either.
    fn refuse_forked(&self) -> Result<(), FunctionError> {
        if self.database.process() == process::id() {
            return Ok(());
        }
        Err(FunctionError::other(
            "this connection was opened by another process, before a fork: open one in this process",
        ))
    }
}

/// A search for a slot. Dropped, it frees the gate.
struct AtTheGate {
    request: i64,
    at_the_gate: i64,
}

impl Drop for AtTheGate {
    fn drop(&mut self) {
        table().end_search(self.request, self.at_the_gate);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.refuse_forked().is_ok() {
            table().close_session(self.database, self.id);
        }
    }
}
