//! The locks of this process's connections, in one table: who waits is woken, first come, first served.
//!
//! Towards other processes a lock is a byte of the lock file, which this process holds once for all its connections. Of
//! those that wait here, the first asks for it again and again, for the kernel's own waits cannot be cancelled.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use dlock_core::{Holder, Mode};

use super::file::{self, Byte, FileId, LockFile, LockedByte};
use super::{Trouble, others};

/// How long this process passes a lock on among its own connections while another process waits for it.
const TURN: Duration = Duration::from_millis(20);

/// How long it then leaves the lock to others: longer than they pause.
const YIELD: Duration = Duration::from_millis(15);

/// Who waits for another process asks again after a fiftieth of the time that it has waited, within these bounds.
const PAUSES: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(10));

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Table {
    databases: HashMap<DatabaseId, Database>,
    /// Where each request stands that waits or holds.
    requests: HashMap<i64, Place>,
    /// Given up before they came.
    given_up: HashSet<i64>,
}

type Place = (DatabaseId, u64);

/// The connections that share locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum DatabaseId {
    /// All databases of this process that are no files: SQLite does not tell which of them are one.
    Memory { process: u32 },
    /// A child that was forked has a copy of this table, and an entry of its own.
    File { process: u32, file: FileId },
}

#[derive(Debug, Default)]
struct Database {
    sessions: HashSet<i64>,
    file: Option<LockFile>,
    locks: HashMap<u64, Lock>,
    /// Locks that are left to other processes, until when.
    yielded: HashMap<u64, Instant>,
}

#[derive(Debug, Default)]
struct Lock {
    holds: Vec<Hold>,
    queue: VecDeque<Waiter>,
    /// Held as long as there are holds, and between two of them.
    byte: Option<LockedByte>,
    byte_since: Option<Instant>,
    waiting: Option<LockedByte>,
    upgrading: Option<LockedByte>,
}

#[derive(Debug)]
struct Hold {
    session: i64,
    mode: Mode,
    request: i64,
    since: SystemTime,
}

#[derive(Debug)]
struct Waiter {
    session: i64,
    mode: Mode,
    request: i64,
    since: SystemTime,
    wake: Arc<Condvar>,
}

/// What came of asking for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acquired {
    Granted,
    Busy,
    GivenUp,
}

/// What a waiter finds when it looks.
enum Look {
    Granted,
    GivenUp,
    /// Somebody of this process is in the way, and wakes it.
    Busy,
    /// Another process is, and cannot wake it.
    BusyElsewhere,
}

/// A connection that can take locks. It frees them when it is closed.
#[derive(Debug)]
pub(super) struct Session {
    id: i64,
    database: DatabaseId,
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
                if let Err(trouble) = table.wait_elsewhere(place, self.id) {
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
        table().release_all(self)
    }

    pub(super) fn is_held(&self, key: u64, request: i64) -> Result<bool, Trouble> {
        self.refuse_forked()?;
        Ok(table().is_held(self, key, request))
    }

    /// Who holds the lock and who waits for it, holders first, behind their sessions.
    pub(super) fn holders(&self, key: u64) -> Result<Vec<(i64, Holder)>, Trouble> {
        self.refuse_forked()?;
        table().holders((self.database, key))
    }

    /// SQLite's connections do not survive a fork either.
    fn refuse_forked(&self) -> Result<(), Trouble> {
        let (DatabaseId::Memory { process } | DatabaseId::File { process, .. }) = self.database;
        if process == process::id() {
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

/// Frees the request's hold, or its place in the queue, also if it has not come there yet.
pub(crate) fn give_up(request: i64) {
    let mut table = table();
    if !table.remove(request) {
        table.given_up.insert(request);
    }
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
    fn lock(&mut self, (database, key): Place) -> &mut Lock {
        let database = self.databases.entry(database).or_default();
        database.locks.entry(key).or_default()
    }

    /// Takes the lock if nobody is in the way.
    fn look(&mut self, (database, key): Place, request: i64) -> Result<Look, Trouble> {
        let Some(database) = self.databases.get_mut(&database) else {
            return Ok(Look::GivenUp);
        };
        let Database {
            file,
            locks,
            yielded,
            ..
        } = database;
        let Some(lock) = locks.get_mut(&key) else {
            return Ok(Look::GivenUp);
        };
        let Some(index) = lock.queue.iter().position(|w| w.request == request) else {
            return Ok(Look::GivenUp);
        };
        if !lock.may_go(index) {
            return Ok(Look::Busy);
        }
        if let Some(file) = file {
            let mode = lock.queue[index].mode;
            let again = lock.is_held_by(lock.queue[index].session);
            if !lock.take_byte(file, key, mode, again, yielded)? {
                return Ok(Look::BusyElsewhere);
            }
            lock.waiting = None;
            lock.upgrading = None;
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
    fn wait_elsewhere(&mut self, (database, key): Place, session: i64) -> Result<(), Trouble> {
        let Some(database) = self.databases.get_mut(&database) else {
            return Ok(());
        };
        let (Some(file), Some(lock)) = (&mut database.file, database.locks.get_mut(&key)) else {
            return Ok(());
        };
        if lock.is_held_by(session) && lock.upgrading.is_none() {
            lock.upgrading = file.lock(key, Byte::Upgrading, Mode::Exclusive)?;
            if lock.upgrading.is_none() {
                return Err(Trouble::deadlock(
                    "another process holds the lock shared, too, and waits to hold it alone",
                ));
            }
        }
        if lock.waiting.is_none() {
            lock.waiting = file.lock(key, Byte::Waiting, Mode::Shared)?;
        }
        Ok(())
    }

    /// Removes a hold or a waiter. `false` if there is none.
    fn remove(&mut self, request: i64) -> bool {
        let Some((database, key)) = self.requests.remove(&request) else {
            return false;
        };
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
            }
            // Another one, if it is another's, takes it again.
            lock.upgrading = None;
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

    fn release_all(&mut self, session: &Session) -> i64 {
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

    fn holds(&self, session: &Session, key: u64, request: i64) -> bool {
        let database = self.databases.get(&session.database);
        let lock = database.and_then(|database| database.locks.get(&key));
        let is_it = |hold: &Hold| hold.session == session.id && hold.request == request;
        lock.is_some_and(|lock| lock.holds.iter().any(is_it))
    }

    /// Whether there is that hold, and other processes see it.
    fn is_held(&self, session: &Session, key: u64, request: i64) -> bool {
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
    fn is_deadlock(&self, session: i64) -> bool {
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

    fn holders(&mut self, (database, key): Place) -> Result<Vec<(i64, Holder)>, Trouble> {
        let Some(database) = self.databases.get_mut(&database) else {
            return Ok(Vec::new());
        };
        let here =
            |mode, granted, since| others::holder(others::this(), mode, granted, Some(since));
        let mut holders = Vec::new();
        let mut waiters = Vec::new();
        if let Some(lock) = database.locks.get(&key) {
            for hold in &lock.holds {
                holders.push((hold.session, here(hold.mode, true, hold.since)));
            }
            for waiter in &lock.queue {
                waiters.push((waiter.session, here(waiter.mode, false, waiter.since)));
            }
        }
        if let Some(file) = &mut database.file {
            if let Some((mode, id)) = file.look(key, Byte::Held)? {
                let found = others::find(file.place(key, Byte::Held), id);
                let holder =
                    |other: others::Other| (other.id, others::holder(other, mode, true, None));
                holders.extend(found.into_iter().map(holder));
            }
            if let Some((_, id)) = file.elsewhere(key, Byte::Waiting) {
                let found = others::find(file.place(key, Byte::Waiting), id);
                // In which mode they do not say.
                let waiter = |other: others::Other| {
                    let holder = others::holder(other, Mode::Exclusive, false, None);
                    (holder.backend_id, holder)
                };
                waiters.extend(found.into_iter().map(waiter));
            }
        }
        holders.extend(waiters);
        Ok(holders)
    }
}

fn conflict(one: Mode, other: Mode) -> bool {
    one == Mode::Exclusive || other == Mode::Exclusive
}

impl Lock {
    fn is_held_by(&self, session: i64) -> bool {
        self.holds.iter().any(|hold| hold.session == session)
    }

    /// The sessions of this process that a waiter waits for: those that hold the lock, and, unless it holds the lock
    /// already, those before it in the queue.
    fn blockers(&self, index: usize) -> impl Iterator<Item = i64> {
        let waiter = &self.queue[index];
        let again = self.is_held_by(waiter.session);
        let holders = self
            .holds
            .iter()
            .filter(|hold| hold.session != waiter.session && conflict(hold.mode, waiter.mode))
            .map(|hold| hold.session);
        let before = self
            .queue
            .range(..index)
            .filter(move |other| !again && conflict(other.mode, waiter.mode))
            .map(|other| other.session);
        holders.chain(before)
    }

    fn may_go(&self, index: usize) -> bool {
        self.blockers(index).next().is_none()
    }

    /// Wakes all for whom the way is free in this process.
    fn wake(&self) {
        for (index, waiter) in self.queue.iter().enumerate() {
            if self.may_go(index) {
                waiter.wake.notify_one();
            }
        }
    }

    /// Makes this process the lock's holder in that mode, unless another one is in the way.
    fn take_byte(
        &mut self,
        file: &mut LockFile,
        key: u64,
        mode: Mode,
        again: bool,
        yielded: &mut HashMap<u64, Instant>,
    ) -> Result<bool, Trouble> {
        if let Some(byte) = &mut self.byte {
            if !byte.counts(file) {
                if !self.holds.is_empty() {
                    return Err(Trouble::other(
                        "the lock file was deleted or replaced while the lock was held: let nothing but dlock touch it",
                    ));
                }
                self.byte = None;
            }
        }
        if let Some(byte) = &mut self.byte {
            let suffices = byte.mode() == Mode::Exclusive || mode == Mode::Shared;
            let tired = || {
                self.byte_since.is_none_or(|since| since.elapsed() > TURN)
                    && file.elsewhere(key, Byte::Waiting).is_some()
            };
            if !again && !self.holds.is_empty() && tired() {
                // One more reader, and the lock would never be free for the writers of other processes.
                return Ok(false);
            }
            if suffices {
                if mode == Mode::Shared && self.holds.is_empty() {
                    byte.share();
                }
                return Ok(true);
            }
            if byte.make_exclusive()? {
                return Ok(true);
            }
            if self.holds.is_empty() {
                self.byte = None;
            }
            return Ok(false);
        }
        if let Some(until) = yielded.get(&key) {
            if Instant::now() < *until && file.look(key, Byte::Waiting)?.is_some() {
                return Ok(false);
            }
            yielded.remove(&key);
        }
        self.byte = file.lock(key, Byte::Held, mode)?;
        if self.byte.is_none() {
            return Ok(false);
        }
        self.byte_since = Some(Instant::now());
        Ok(true)
    }
}
