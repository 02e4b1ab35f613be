//! The locks of this process's connections, in one table: who waits is woken, first come, first served.
//!
//! Towards other processes a lock is a byte of the lock file, which this process holds once for all its connections. Of
//! those that wait here, the first asks for it again and again, for the kernel's own waits cannot be cancelled.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::process;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use dlock_core::{Holder, Mode};

use super::file::{Byte, FileId, LockFile};
use super::lock::{Hold, Lock, Seen, TURN, Waiter, YIELD};
use super::session::Session;
use super::{Trouble, others};

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

pub(super) fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a waiter finds when it looks.
pub(super) enum Look {
    Granted,
    GivenUp,
    /// Somebody of this process is in the way, and wakes it.
    Busy,
    /// Another process is, and cannot wake it.
    BusyElsewhere,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) databases: HashMap<DatabaseId, Database>,
    /// Where each request stands that waits or holds.
    pub(super) requests: HashMap<i64, Place>,
    /// Given up before they came.
    pub(super) given_up: HashSet<i64>,
}

pub(super) type Place = (DatabaseId, u64);

/// The connections that share locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DatabaseId {
    /// All databases of this process that are no files: SQLite does not tell which of them are one.
    Memory { process: u32 },
    /// A child that was forked has a copy of this table, and an entry of its own.
    File { process: u32, file: FileId },
}

impl DatabaseId {
    pub(super) fn process(self) -> u32 {
        match self {
            Self::Memory { process } | Self::File { process, .. } => process,
        }
    }
}

/// Who holds a lock and who waits for it, with what is known of other processes so far.
#[derive(Debug, Default)]
pub(super) struct Found {
    holders: Vec<(i64, Holder)>,
    waiters: Vec<(i64, Holder)>,
    held: Option<(Mode, Elsewhere)>,
    awaited: Option<Elsewhere>,
}

/// A byte that other processes have locked.
#[derive(Debug)]
struct Elsewhere {
    place: Option<(PathBuf, u64, u64)>,
    process: Option<i64>,
}

impl Elsewhere {
    fn new(file: &LockFile, key: u64, byte: Byte, process: Option<i64>) -> Self {
        let place = file.place(key, byte);
        Self {
            place: place.map(|(path, inode, at)| (path.to_owned(), inode, at)),
            process,
        }
    }

    fn find(&self) -> impl Iterator<Item = others::Other> + use<> {
        let place = self.place.as_ref();
        let place = place.map(|(path, inode, at)| (path.as_path(), *inode, *at));
        others::find(place, self.process).into_iter()
    }
}

impl Found {
    /// Asks the operating system for the others.
    pub(super) fn complete(self) -> Vec<(i64, Holder)> {
        let mut all = self.holders;
        if let Some((mode, elsewhere)) = self.held {
            let holder = |other: others::Other| (other.id, others::holder(other, mode, true, None));
            all.extend(elsewhere.find().map(holder));
        }
        all.extend(self.waiters);
        if let Some(elsewhere) = self.awaited {
            // In which mode they do not say.
            let waiter = |other: others::Other| {
                let holder = others::holder(other, Mode::Exclusive, false, None);
                (holder.backend_id, holder)
            };
            all.extend(elsewhere.find().map(waiter));
        }
        all
    }
}

#[derive(Debug, Default)]
pub(super) struct Database {
    pub(super) sessions: HashSet<i64>,
    pub(super) file: Option<LockFile>,
    pub(super) locks: HashMap<u64, Lock>,
    /// Locks that are left to other processes, until when.
    pub(super) yielded: HashMap<u64, Instant>,
    /// Of those that readers wait for.
    pub(super) claims: HashMap<u64, Seen>,
}

impl Database {
    /// Whether the waiter is a reader that lets a writer of another process go first. Who holds the lock already does not,
    /// for the writer waits for it.
    fn stands_back(&mut self, key: u64, index: usize) -> Result<bool, Trouble> {
        let (Some(file), Some(lock)) = (&mut self.file, self.locks.get_mut(&key)) else {
            return Ok(false);
        };
        let Waiter { session, mode, .. } = lock.queue[index];
        if mode == Mode::Exclusive
            || lock.is_held_by(session)
            || !lock.is_left_to_a_writer(file, key, &mut self.claims)?
        {
            return Ok(false);
        }
        // Nor who holds another lock for which somebody waits: that may be one for whom the writer waits.
        let is_awaited = |(key, lock): (&u64, &Lock)| {
            lock.is_held_by(session)
                && (!lock.queue.is_empty() || file.elsewhere(*key, Byte::Waiting).is_some())
        };
        Ok(!self.locks.iter().any(is_awaited))
    }
}

/// Frees the request's hold, or its place in the queue, also if it has not come there yet: then `false`.
pub(crate) fn give_up(request: i64) -> bool {
    let mut table = table();
    let was_there = table.remove(request);
    if !was_there {
        table.given_up.insert(request);
    }
    was_there
}

/// The request that was given up will not come any more.
pub(crate) fn forget(request: i64) {
    table().given_up.remove(&request);
}

/// Whether the session is there.
pub(crate) fn is_open(session: i64) -> bool {
    let table = table();
    let mut databases = table.databases.values();
    databases.any(|database| database.sessions.contains(&session))
}

/// Whether the session is in a queue.
pub(crate) fn is_waiting(session: i64) -> bool {
    let table = table();
    let mut locks = table.databases.values().flat_map(|d| d.locks.values());
    locks.any(|lock| lock.queue.iter().any(|waiter| waiter.session == session))
}

impl Table {
    pub(super) fn lock(&mut self, (database, key): Place) -> &mut Lock {
        let database = self.databases.entry(database).or_default();
        database.locks.entry(key).or_default()
    }

    /// Takes the lock if nobody is in the way.
    pub(super) fn look(&mut self, (database, key): Place, request: i64) -> Result<Look, Trouble> {
        let Some(database) = self.databases.get_mut(&database) else {
            return Ok(Look::GivenUp);
        };
        let Some(lock) = database.locks.get(&key) else {
            return Ok(Look::GivenUp);
        };
        let Some(index) = lock.queue.iter().position(|w| w.request == request) else {
            return Ok(Look::GivenUp);
        };
        if !lock.may_go(index) {
            return Ok(Look::Busy);
        }
        if database.stands_back(key, index)? {
            return Ok(Look::BusyElsewhere);
        }
        let Database {
            file,
            locks,
            yielded,
            ..
        } = database;
        let lock = locks.get_mut(&key).expect("BUG: it was found there");
        if let Some(file) = file {
            let mode = lock.queue[index].mode;
            if !lock.take_byte(file, key, mode, yielded)? {
                return Ok(Look::BusyElsewhere);
            }
            lock.waiting = None;
            if mode == Mode::Exclusive {
                lock.upgrading = None;
                lock.claim = None;
            }
        }
        let waiter = lock.queue.remove(index).expect("BUG: it was found there");
        lock.holds.push(Hold {
            session: waiter.session,
            mode: waiter.mode,
            request,
            since: SystemTime::now(),
        });
        // Readers behind a reader: they need not ask the lock file for themselves.
        lock.wake();
        Ok(Look::Granted)
    }

    /// Tells other processes that somebody waits here.
    pub(super) fn wait_elsewhere(
        &mut self,
        (database, key): Place,
        session: i64,
        mode: Mode,
    ) -> Result<(), Trouble> {
        let Some(database) = self.databases.get_mut(&database) else {
            return Ok(());
        };
        let (Some(file), Some(lock)) = (&mut database.file, database.locks.get_mut(&key)) else {
            return Ok(());
        };
        let yielded = database.yielded.get(&key);
        if mode == Mode::Exclusive && yielded.is_none_or(|until| *until <= Instant::now()) {
            lock.claim(file, key)?;
        }
        if lock.is_held_by(session) && lock.upgrading.is_none() {
            lock.upgrading = file.lock(key, Byte::Upgrading, Mode::Exclusive)?;
            if lock.upgrading.is_none() {
                return Err(Trouble::deadlock(
                    "another process holds the lock shared, too, and waits to hold it alone",
                ));
            }
        }
        // Not where a reader stands back although this process holds the lock: it is the writer before it that waits for
        // others.
        if lock.waiting.is_none() && (lock.byte.is_none() || lock.is_held_by(session)) {
            lock.waiting = file.lock(key, Byte::Waiting, Mode::Shared)?;
        }
        Ok(())
    }

    /// Removes a hold or a waiter. `false` if there is none.
    pub(super) fn remove(&mut self, request: i64) -> bool {
        let Some((database, key)) = self.requests.remove(&request) else {
            return false;
        };
        if database.process() != process::id() {
            return false; // the parent's, before a fork
        }
        let Some(Database {
            file,
            locks,
            yielded,
            ..
        }) = self.databases.get_mut(&database)
        else {
            return false;
        };
        let Some(lock) = locks.get_mut(&key) else {
            return false;
        };
        if let Some(index) = lock.queue.iter().position(|w| w.request == request) {
            if let Some(waiter) = lock.queue.remove(index) {
                waiter.wake.notify_one();
                // Another one, if it is another's, takes them again.
                if waiter.mode == Mode::Exclusive {
                    lock.upgrading = None;
                    lock.claim = None;
                }
            }
        }
        lock.holds.retain(|hold| hold.request != request);
        if lock.holds.is_empty() && lock.byte.is_some() {
            let others_wait = |file: &LockFile| file.elsewhere(key, Byte::Waiting).is_some();
            let others_wait = file.as_ref().is_some_and(others_wait);
            let turn_is_over = lock.byte_since.is_none_or(|since| since.elapsed() > TURN);
            if lock.queue.is_empty() || (others_wait && turn_is_over) {
                lock.byte = None;
                if others_wait {
                    let now = Instant::now();
                    yielded.retain(|_, until| *until > now);
                    yielded.insert(key, now + YIELD);
                }
            }
        }
        if !lock.holds.iter().any(|hold| hold.mode == Mode::Exclusive) && !lock.holds.is_empty() {
            if let Some(byte) = &mut lock.byte {
                byte.share();
            }
        }
        if lock.queue.is_empty() {
            lock.waiting = None;
        }
        if lock.holds.is_empty() && lock.queue.is_empty() {
            locks.remove(&key);
        } else {
            lock.wake();
        }
        true
    }

    pub(super) fn release_all(&mut self, session: &Session) -> i64 {
        let Some(database) = self.databases.get(&session.database) else {
            return 0;
        };
        let requests: Vec<i64> = database
            .locks
            .values()
            .flat_map(|lock| &lock.holds)
            .filter(|hold| hold.session == session.id)
            .map(|hold| hold.request)
            .collect();
        for request in &requests {
            self.remove(*request);
        }
        requests.len() as i64
    }

    pub(super) fn holds(&self, session: &Session, key: u64, request: i64) -> bool {
        let database = self.databases.get(&session.database);
        let lock = database.and_then(|database| database.locks.get(&key));
        let is_it = |hold: &Hold| hold.session == session.id && hold.request == request;
        lock.is_some_and(|lock| lock.holds.iter().any(is_it))
    }

    /// Whether there is that hold, and other processes see it.
    pub(super) fn is_held(&self, session: &Session, key: u64, request: i64) -> bool {
        let Some(database) = self.databases.get(&session.database) else {
            return false;
        };
        let byte = database.locks.get(&key).and_then(|lock| lock.byte.as_ref());
        let is_seen = match &database.file {
            Some(file) => byte.is_some_and(|byte| byte.counts(file)),
            None => true,
        };
        is_seen && self.holds(session, key, request)
    }

    /// Whether those for whom this session waits wait for it.
    pub(super) fn is_deadlock(&self, session: i64) -> bool {
        let waits: HashMap<i64, (&Lock, usize)> = self
            .databases
            .values()
            .flat_map(|database| database.locks.values())
            .flat_map(|lock| {
                let waiters = lock.queue.iter().enumerate();
                waiters.map(move |(index, waiter)| (waiter.session, (lock, index)))
            })
            .collect();
        let mut seen = HashSet::new();
        let mut next = vec![session];
        while let Some(waiter) = next.pop() {
            let Some((lock, index)) = waits.get(&waiter) else {
                continue;
            };
            for blocker in lock.blockers(*index) {
                if blocker == session {
                    return true;
                }
                if seen.insert(blocker) {
                    next.push(blocker);
                }
            }
        }
        false
    }

    pub(super) fn holders(&mut self, (database, key): Place) -> Result<Found, Trouble> {
        let mut found = Found::default();
        let Some(database) = self.databases.get_mut(&database) else {
            return Ok(found);
        };
        let here =
            |mode, granted, since| others::holder(others::this(), mode, granted, Some(since));
        if let Some(lock) = database.locks.get(&key) {
            for hold in &lock.holds {
                let holder = here(hold.mode, true, hold.since);
                found.holders.push((hold.session, holder));
            }
            for waiter in &lock.queue {
                let holder = here(waiter.mode, false, waiter.since);
                found.waiters.push((waiter.session, holder));
            }
        }
        if let Some(file) = &mut database.file {
            if let Some((mode, process)) = file.look(key, Byte::Held)? {
                let elsewhere = Elsewhere::new(file, key, Byte::Held, process);
                found.held = Some((mode, elsewhere));
            }
            if let Some((_, process)) = file.elsewhere(key, Byte::Waiting) {
                found.awaited = Some(Elsewhere::new(file, key, Byte::Waiting, process));
            }
        }
        Ok(found)
    }

    /// Drops what a fork has copied.
    pub(super) fn forget_other_processes(&mut self, process: u32) {
        self.databases.retain(|id, _| id.process() == process);
        self.requests.retain(|_, (id, _)| id.process() == process);
    }
}
