//! All locks of this process, behind one mutex.

use std::collections::{HashMap, HashSet};
use std::process;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

use super::database::{Attempt, Database, DatabaseId};
use super::function_error::FunctionError;
use super::holders::HolderList;
use super::lock_file::LockFile;
use super::queue::{Request, Requested};

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

pub(super) fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Frees the request's hold, or its place in the queue. Returns `false` if the request has not come yet: it is then
/// refused when it comes.
pub fn give_up(dlock_core::proto::Request(request): dlock_core::proto::Request) -> bool {
    let mut table = table();
    if let Some(at_the_gate) = table.searches.remove(&request) {
        if !table.end(at_the_gate) {
            table.given_up.insert(at_the_gate);
        }
        return true;
    }
    let was_there = table.end(request);
    if !was_there {
        table.given_up.insert(request);
    }
    was_there
}

/// Forgets that the request was given up, because it will not come any more.
pub fn forget(dlock_core::proto::Request(request): dlock_core::proto::Request) {
    table().given_up.remove(&request);
}

/// Whether the session is closed (0), open (1) or in a queue (2).
pub(super) fn session_state(session: i64) -> i64 {
    let table = table();
    let mut databases = table.databases.values();
    match databases.find(|database| database.has_session(session)) {
        Some(database) => 1 + i64::from(database.is_waiting(session)),
        None => 0,
    }
}

/// What came of drawing a fencing token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Draw {
    Token(i64),
    NotHeld,
    /// Another process draws one.
    BusyElsewhere,
}

/// The locks of a semaphore.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    pub(super) gate: u64,
    pub(super) permits: u32,
}

impl Slots {
    pub(super) fn key(self, slot: u32) -> u64 {
        self.gate + 1 + u64::from(slot)
    }

    /// All slots. Which one is the first depends on the session, so that not all begin with the same.
    fn from(self, session: i64) -> impl Iterator<Item = u32> {
        let first = (session >> 32).unsigned_abs() + session.unsigned_abs() % 1_000;
        let permits = u64::from(self.permits);
        (0..permits).map(move |slot| ((first + slot) % permits) as u32)
    }
}

#[derive(Debug, Default)]
pub(super) struct Table {
    databases: HashMap<DatabaseId, Database>,
    /// The database of each request that waits or holds.
    requests: HashMap<i64, DatabaseId>,
    /// Requests that were given up before they came.
    given_up: HashSet<i64>,
    /// Requests that search for a slot of a semaphore, each with the request that it has at the gate meanwhile.
    searches: HashMap<i64, i64>,
}

/// What a search for a slot has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Searched {
    Found(u32),
    NotFound,
    GivenUp,
}

impl Table {
    pub(super) fn open_session(
        &mut self,
        database: DatabaseId,
        session: i64,
        file: Option<LockFile>,
    ) {
        // After a fork, this closes the child's copies of its parent's files. They would keep the parent's locks when
        // it ends.
        let process = database.process();
        self.databases.retain(|id, _| id.process() == process);
        self.requests.retain(|_, id| id.process() == process);

        let database = self.databases.entry(database);
        let database = database.or_insert_with(|| Database::new(file));
        database.add_session(session);
    }

    pub(super) fn close_session(&mut self, database: DatabaseId, session: i64) {
        self.release_all(database, session);
        if let Some(entry) = self.databases.get_mut(&database) {
            if entry.remove_session(session) {
                self.databases.remove(&database);
            }
        }
    }

    /// Adds a request to the queue. Returns `None` if it was given up before it came.
    pub(super) fn request(
        &mut self,
        database: DatabaseId,
        key: u64,
        request: Request<i64, i64>,
        wake: Arc<Condvar>,
    ) -> Result<Option<Requested>, FunctionError> {
        if self.given_up.remove(&request.id) {
            return Ok(None);
        }
        if self.requests.contains_key(&request.id) {
            return Err(FunctionError::other(format!(
                "request {} holds or waits for a lock already: each request needs a number of its own",
                request.id
            )));
        }
        let entry = self.databases.entry(database).or_default();
        let requested = entry.request(key, request, wake);
        if requested != Requested::Deadlock {
            self.requests.insert(request.id, database);
        }
        Ok(Some(requested))
    }

    /// Takes the lock if nobody is in the way.
    pub(super) fn try_take(
        &mut self,
        database: DatabaseId,
        request: i64,
    ) -> Result<Attempt, FunctionError> {
        match self.databases.get_mut(&database) {
            Some(database) => database.try_take(request),
            None => Ok(Attempt::GivenUp),
        }
    }

    /// A request for a slot goes to the gate, by another request. Returns `false` if it was given up before it came.
    pub(super) fn begin_search(&mut self, request: i64, at_the_gate: i64) -> bool {
        let is_wanted = !self.given_up.remove(&request);
        if is_wanted {
            self.searches.insert(request, at_the_gate);
        }
        is_wanted
    }

    /// The search is over, and the gate is free for others.
    pub(super) fn end_search(&mut self, request: i64, at_the_gate: i64) {
        self.searches.remove(&request);
        self.end(at_the_gate);
        self.given_up.remove(&at_the_gate);
    }

    /// Takes a free slot of a semaphore, for the session that has its gate.
    pub(super) fn search(
        &mut self,
        database: DatabaseId,
        slots: Slots,
        request: Request<i64, i64>,
    ) -> Result<Searched, FunctionError> {
        if !self.searches.contains_key(&request.id) {
            return Ok(Searched::GivenUp);
        }
        let found = self.take_slot(database, slots, request, |_, _| true)?;
        if let Searched::Found(_) = found {
            // From now on the request is the hold, and is given up as such.
            self.searches.remove(&request.id);
        }
        Ok(found)
    }

    /// Takes a free slot of a semaphore, unless others wait at its gate. But a session that has a slot already gets
    /// that one once more, since the others may be waiting for it, or never, if not `again`.
    pub(super) fn try_slots(
        &mut self,
        database: DatabaseId,
        slots: Slots,
        again: bool,
        request: Request<i64, i64>,
    ) -> Result<Searched, FunctionError> {
        if self.given_up.remove(&request.id) {
            return Ok(Searched::GivenUp);
        }
        let gate_is_free = match self.databases.get_mut(&database) {
            Some(database) => !database.is_wanted(slots.gate)?,
            None => true,
        };
        self.take_slot(database, slots, request, |database, slot| {
            match database.is_held_by(slot, request.owner) {
                true => again,
                false => gate_is_free,
            }
        })
    }

    fn take_slot(
        &mut self,
        database: DatabaseId,
        slots: Slots,
        request: Request<i64, i64>,
        may_take: impl Fn(&Database, u64) -> bool,
    ) -> Result<Searched, FunctionError> {
        for slot in slots.from(request.owner) {
            let entry = self.databases.entry(database).or_default();
            let key = slots.key(slot);
            if !may_take(entry, key) || entry.is_held_by_other(key, request.owner) {
                continue;
            }
            if entry.request(key, request, Arc::default()) == Requested::Deadlock {
                continue;
            }
            self.requests.insert(request.id, database);
            match self.try_take(database, request.id) {
                Ok(Attempt::Granted) => return Ok(Searched::Found(slot)),
                Ok(_) => self.end(request.id),
                Err(error) => {
                    self.end(request.id);
                    return Err(error);
                }
            };
        }
        Ok(Searched::NotFound)
    }

    /// Shows other processes that this request waits for them.
    pub(super) fn show_waiter(
        &mut self,
        database: DatabaseId,
        request: i64,
    ) -> Result<(), FunctionError> {
        match self.databases.get_mut(&database) {
            Some(database) => database.show_waiter(request),
            None => Ok(()),
        }
    }

    /// Ends a request, whether it holds the lock or waits for it. Returns `false` if there is none.
    pub(super) fn end(&mut self, request: i64) -> bool {
        let Some(database) = self.requests.remove(&request) else {
            return false;
        };
        // A forked child has a copy of its parent's requests, and must not end them.
        if database.process() != process::id() {
            return false;
        }
        let database = self.databases.get_mut(&database);
        database.is_some_and(|database| database.end(request))
    }

    /// Returns how many holds were released.
    pub(super) fn release_all(&mut self, database: DatabaseId, session: i64) -> i64 {
        let Some(database) = self.databases.get(&database) else {
            return 0;
        };
        let requests = database.held_by(session);
        for request in &requests {
            self.end(*request);
        }
        requests.len() as i64
    }

    /// Releases a hold. Returns `false` if there is none, or if other processes no longer saw it.
    pub(super) fn release(
        &mut self,
        database: DatabaseId,
        session: i64,
        key: u64,
        request: i64,
    ) -> bool {
        let Some(entry) = self.databases.get(&database) else {
            return false;
        };
        let is_held = entry.is_held(session, key, request);
        if entry.holds(session, key, request) {
            self.end(request);
        }
        is_held
    }

    /// Whether the session holds the lock by that request, and other processes see it.
    pub(super) fn is_held(
        &self,
        database: DatabaseId,
        session: i64,
        key: u64,
        request: i64,
    ) -> bool {
        let database = self.databases.get(&database);
        database.is_some_and(|database| database.is_held(session, key, request))
    }

    /// Draws a fencing token, if the session holds the lock by that request.
    pub(super) fn draw_token(
        &mut self,
        database: DatabaseId,
        session: i64,
        key: u64,
        request: i64,
    ) -> Result<Draw, FunctionError> {
        if !self.is_held(database, session, key, request) {
            return Ok(Draw::NotHeld);
        }
        let drawn = match self.databases.get_mut(&database) {
            Some(database) => database.draw_token()?,
            None => return Ok(Draw::NotHeld),
        };
        Ok(drawn.map_or(Draw::BusyElsewhere, Draw::Token))
    }

    pub(super) fn holders(
        &mut self,
        database: DatabaseId,
        key: u64,
    ) -> Result<HolderList, FunctionError> {
        match self.databases.get_mut(&database) {
            Some(database) => database.holders(key),
            None => Ok(HolderList::default()),
        }
    }
}
