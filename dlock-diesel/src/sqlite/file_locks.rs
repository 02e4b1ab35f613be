//! What this process has locked in the lock file of a database, and how it takes turns with other processes.
//!
//! A process locks a byte once for all its connections. The kernel's own waits cannot be cancelled, so nothing here
//! waits: the first waiter of a process tries again and again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use dlock_core::Mode;

use super::function_error::FunctionError;
use super::lock_file::{Byte, LockFile, LockedByte};
use super::processes::ForeignLock;

/// How long this process passes a lock on among its own connections while another process waits for it.
const TURN: Duration = Duration::from_millis(20);

/// How long the writers of this process then leave the lock to others. It is longer than the others pause between two
/// tries.
const YIELD: Duration = Duration::from_millis(15);

/// How long readers leave a free lock to a writer of another process. It is much longer than the writer pauses between
/// two tries, so a writer that needs more has been stopped.
const STOPPED_AFTER: Duration = Duration::from_millis(250);

/// How long readers then ignore the claims on that lock.
const IGNORED: Duration = Duration::from_secs(1);

/// The locks of one database.
#[derive(Debug)]
pub(super) struct FileLocks {
    file: LockFile,
    locks: HashMap<u64, FileLock>,
    /// Until when the writers of this process leave a lock to other processes.
    yielded: HashMap<u64, Instant>,
    claims: HashMap<u64, ClaimHistory>,
}

/// The bytes of a lock that this process has locked.
#[derive(Debug, Default)]
struct FileLock {
    /// Locked while a connection holds the lock, and from one connection to the next.
    held: Option<LockedByte>,
    held_since: Option<Instant>,
    waiting: Option<LockedByte>,
    upgrading: Option<LockedByte>,
    claimed: Option<LockedByte>,
}

/// What this process has seen of the claims of other processes on a lock.
#[derive(Debug, Default)]
struct ClaimHistory {
    /// Since when the lock is free although it is claimed.
    free_since: Option<Instant>,
    ignored_until: Option<Instant>,
}

/// What the connections of this process do with a lock.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalUse {
    /// The strongest mode in which one of them holds it.
    pub(super) held: Option<Mode>,
    /// Whether any of them waits for it.
    pub(super) is_awaited: bool,
}

impl FileLocks {
    pub(super) fn new(file: LockFile) -> Self {
        Self {
            file,
            locks: HashMap::new(),
            yielded: HashMap::new(),
            claims: HashMap::new(),
        }
    }

    /// Whether new readers leave the lock to a writer of another process, which might never find it free otherwise.
    pub(super) fn is_left_to_a_writer(
        &mut self,
        key: u64,
        local: LocalUse,
    ) -> Result<bool, FunctionError> {
        let lock = self.locks.entry(key).or_default();
        let is_claimed = match &lock.held {
            // After a writer of this process it is the readers' turn.
            Some(byte) if byte.mode() == Mode::Exclusive => false,
            Some(_) => self.file.locked_elsewhere(key, Byte::Claimed).is_some(),
            None => self.file.open_and_check(key, Byte::Claimed)?.is_some(),
        };
        if !is_claimed {
            self.claims.remove(&key);
            return Ok(false);
        }
        let now = Instant::now();
        let history = self.claims.entry(key).or_default();
        if history.ignored_until.is_some_and(|until| now < until) {
            return Ok(false);
        }
        if local.held.is_none() {
            lock.held = None;
        }
        if lock.held.is_some() || self.file.locked_elsewhere(key, Byte::Held).is_some() {
            history.free_since = None;
            return Ok(true);
        }
        let is_stopped = now - *history.free_since.get_or_insert(now) >= STOPPED_AFTER;
        if is_stopped {
            *history = ClaimHistory {
                free_since: None,
                ignored_until: Some(now + IGNORED),
            };
        }
        Ok(!is_stopped)
    }

    /// Makes this process a holder of the lock in that mode. Returns `false` if another process is in the way, or has
    /// its turn.
    pub(super) fn take(
        &mut self,
        key: u64,
        mode: Mode,
        local: LocalUse,
    ) -> Result<bool, FunctionError> {
        if !self.take_byte(key, mode, local)? {
            return Ok(false);
        }
        let lock = self.locks.entry(key).or_default();
        lock.waiting = None;
        if mode == Mode::Exclusive {
            lock.upgrading = None;
            lock.claimed = None;
        }
        Ok(true)
    }

    fn take_byte(&mut self, key: u64, mode: Mode, local: LocalUse) -> Result<bool, FunctionError> {
        let lock = self.locks.entry(key).or_default();
        if lock
            .held
            .as_ref()
            .is_some_and(|byte| !byte.is_seen(&self.file))
        {
            if local.held.is_some() {
                return Err(FunctionError::other(
                    "the lock file or the database was deleted or replaced while the lock was held: let nothing but \
                     dlock touch the lock file, and close all connections before you move the database",
                ));
            }
            lock.held = None;
        }
        if let Some(byte) = &mut lock.held {
            let suffices = byte.mode() == Mode::Exclusive || mode == Mode::Shared;
            if suffices {
                if mode == Mode::Shared && local.held.is_none() {
                    byte.share();
                }
                return Ok(true);
            }
            if byte.make_exclusive()? {
                return Ok(true);
            }
            if local.held.is_none() {
                lock.held = None;
            }
            return Ok(false);
        }
        // Readers need no such rule: claims make them let writers go first.
        if let (Mode::Exclusive, Some(until)) = (mode, self.yielded.get(&key)) {
            let is_over = Instant::now() >= *until;
            if !is_over && self.file.open_and_check(key, Byte::Waiting)?.is_some() {
                return Ok(false);
            }
            self.yielded.remove(&key);
        }
        lock.held = self.file.lock(key, Byte::Held, mode)?;
        if lock.held.is_none() {
            return Ok(false);
        }
        lock.held_since = Some(Instant::now());
        Ok(true)
    }

    /// Shows other processes that a connection of this one waits for the lock, which it may hold shared already.
    pub(super) fn show_waiter(
        &mut self,
        key: u64,
        mode: Mode,
        is_holder: bool,
    ) -> Result<(), FunctionError> {
        let lock = self.locks.entry(key).or_default();
        let yielded = self.yielded.get(&key);
        if mode == Mode::Exclusive && yielded.is_none_or(|until| *until <= Instant::now()) {
            lock.claim(&mut self.file, key)?;
        }
        if is_holder && lock.upgrading.is_none() {
            lock.upgrading = self.file.lock(key, Byte::Upgrading, Mode::Exclusive)?;
            if lock.upgrading.is_none() {
                return Err(FunctionError::deadlock(
                    "another process also holds the lock shared and waits to hold it alone",
                ));
            }
        }
        // A reader that leaves a lock of this process to a writer shows nothing: it waits for that writer, which itself
        // waits for other processes.
        if lock.waiting.is_none() && (lock.held.is_none() || is_holder) {
            lock.waiting = self.file.lock(key, Byte::Waiting, Mode::Shared)?;
        }
        Ok(())
    }

    /// A connection no longer waits for the lock. If another one of this process does, it shows itself again.
    pub(super) fn hide_waiter(&mut self, key: u64, mode: Mode) {
        if let (Mode::Exclusive, Some(lock)) = (mode, self.locks.get_mut(&key)) {
            lock.upgrading = None;
            lock.claimed = None;
        }
    }

    /// Unlocks the bytes that this process no longer needs, after a connection has released the lock or stopped
    /// waiting.
    pub(super) fn give_back(&mut self, key: u64, local: LocalUse) {
        let Some(lock) = self.locks.get_mut(&key) else {
            return;
        };
        match local.held {
            None if lock.held.is_some() => {
                let others_wait = self.file.locked_elsewhere(key, Byte::Waiting).is_some();
                let turn_is_over = lock.held_since.is_none_or(|since| since.elapsed() > TURN);
                if !local.is_awaited || (others_wait && turn_is_over) {
                    lock.held = None;
                    if others_wait {
                        let now = Instant::now();
                        self.yielded.retain(|_, until| *until > now);
                        self.yielded.insert(key, now + YIELD);
                    }
                }
            }
            Some(Mode::Shared) => {
                if let Some(byte) = &mut lock.held {
                    byte.share();
                }
            }
            _ => {}
        }
        if !local.is_awaited {
            lock.waiting = None;
            if local.held.is_none() {
                self.locks.remove(&key);
            }
        }
    }

    /// Whether other processes see that this one holds the lock.
    pub(super) fn is_seen(&self, key: u64) -> bool {
        let byte = self.locks.get(&key).and_then(|lock| lock.held.as_ref());
        byte.is_some_and(|byte| byte.is_seen(&self.file))
    }

    /// Draws a fencing token of at least that number. Returns `None` while another process draws one.
    pub(super) fn draw_token(&mut self, least: i64) -> Result<Option<i64>, FunctionError> {
        self.file.draw_token(least)
    }

    /// Whether another process waits for the lock.
    pub(super) fn is_awaited(&self, key: u64) -> bool {
        self.file.locked_elsewhere(key, Byte::Waiting).is_some()
    }

    /// Whether another process holds the lock or waits for it.
    pub(super) fn is_wanted(&mut self, key: u64) -> Result<bool, FunctionError> {
        Ok(self.file.open_and_check(key, Byte::Held)?.is_some() || self.is_awaited(key))
    }

    /// The processes that hold the lock, other than this one, and in which mode.
    pub(super) fn foreign_holders(
        &mut self,
        key: u64,
    ) -> Result<Option<(Mode, ForeignLock)>, FunctionError> {
        let held = self.file.open_and_check(key, Byte::Held)?;
        Ok(held.map(|(mode, process)| (mode, self.foreign(key, Byte::Held, process))))
    }

    /// The processes that wait for the lock, other than this one.
    pub(super) fn foreign_waiters(&self, key: u64) -> Option<ForeignLock> {
        let (_, process) = self.file.locked_elsewhere(key, Byte::Waiting)?;
        Some(self.foreign(key, Byte::Waiting, process))
    }

    fn foreign(&self, key: u64, byte: Byte, process: Option<i64>) -> ForeignLock {
        ForeignLock {
            place: self.file.place(key, byte),
            process,
        }
    }
}

impl FileLock {
    /// Shows the readers of other processes that a writer waits for them. A writer that waits for another writer shows
    /// no claim, so that readers get their turn.
    fn claim(&mut self, file: &mut LockFile, key: u64) -> Result<(), FunctionError> {
        match file.locked_elsewhere(key, Byte::Held) {
            Some((Mode::Shared, _)) if self.claimed.is_none() => {
                self.claimed = file.lock(key, Byte::Claimed, Mode::Shared)?;
            }
            Some((Mode::Exclusive, _)) => self.claimed = None,
            _ => {}
        }
        Ok(())
    }
}
