//! One lock, as the connections of this process share it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant, SystemTime};

use dlock_core::Mode;

use super::Trouble;
use super::file::{Byte, LockFile, LockedByte};

/// How long this process passes a lock on among its own connections while another process waits for it.
pub(super) const TURN: Duration = Duration::from_millis(20);

/// How long its writers then leave the lock to others: longer than they pause.
pub(super) const YIELD: Duration = Duration::from_millis(15);

/// How long readers leave a lock that is free to the writer of another process: much longer than it pauses, unless it has
/// been stopped.
const STOPPED_AFTER: Duration = Duration::from_millis(250);

/// How long readers then take no notice of those who wait for them.
const UNNOTICED: Duration = Duration::from_secs(1);

/// What this process has seen of other processes' claims on a lock.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Since when nobody takes the lock, which is claimed.
    free_since: Option<Instant>,
    unnoticed_until: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct Lock {
    pub(super) holds: Vec<Hold>,
    pub(super) queue: VecDeque<Waiter>,
    /// Held as long as there are holds, and between two of them.
    pub(super) byte: Option<LockedByte>,
    pub(super) byte_since: Option<Instant>,
    pub(super) waiting: Option<LockedByte>,
    pub(super) upgrading: Option<LockedByte>,
    pub(super) claim: Option<LockedByte>,
}

#[derive(Debug)]
pub(super) struct Hold {
    pub(super) session: i64,
    pub(super) mode: Mode,
    pub(super) request: i64,
    pub(super) since: SystemTime,
}

#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) session: i64,
    pub(super) mode: Mode,
    pub(super) request: i64,
    pub(super) since: SystemTime,
    pub(super) wake: Arc<Condvar>,
}

pub(super) fn conflict(one: Mode, other: Mode) -> bool {
    one == Mode::Exclusive || other == Mode::Exclusive
}

impl Lock {
    pub(super) fn is_held_by(&self, session: i64) -> bool {
        self.holds.iter().any(|hold| hold.session == session)
    }

    /// The sessions of this process that a waiter waits for: those that hold the lock, and, unless it holds the lock
    /// already, those before it in the queue.
    pub(super) fn blockers(&self, index: usize) -> impl Iterator<Item = i64> {
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

    pub(super) fn may_go(&self, index: usize) -> bool {
        self.blockers(index).next().is_none()
    }

    /// Wakes all for whom the way is free in this process.
    pub(super) fn wake(&self) {
        for (index, waiter) in self.queue.iter().enumerate() {
            if self.may_go(index) {
                waiter.wake.notify_one();
            }
        }
    }

    /// Whether a reader that does not hold the lock lets a writer of another process go first, which might never find the
    /// lock free otherwise.
    pub(super) fn is_left_to_a_writer(
        &mut self,
        file: &mut LockFile,
        key: u64,
        seen: &mut HashMap<u64, Seen>,
    ) -> Result<bool, Trouble> {
        let is_claimed = match &self.byte {
            // After a writer of this process it is the readers' turn.
            Some(byte) if byte.mode() == Mode::Exclusive => false,
            Some(_) => file.elsewhere(key, Byte::Claimed).is_some(),
            None => file.look(key, Byte::Claimed)?.is_some(),
        };
        if !is_claimed {
            seen.remove(&key);
            return Ok(false);
        }
        let now = Instant::now();
        let seen = seen.entry(key).or_default();
        if seen.unnoticed_until.is_some_and(|until| now < until) {
            return Ok(false);
        }
        if self.holds.is_empty() {
            self.byte = None;
        }
        if self.byte.is_some() || file.elsewhere(key, Byte::Held).is_some() {
            seen.free_since = None;
            return Ok(true);
        }
        let is_stopped = now - *seen.free_since.get_or_insert(now) >= STOPPED_AFTER;
        if is_stopped {
            *seen = Seen {
                free_since: None,
                unnoticed_until: Some(now + UNNOTICED),
            };
        }
        Ok(!is_stopped)
    }

    /// Tells the readers of other processes whether a writer waits for them. While it waits for another writer it does
    /// not, so that readers get their turn, too.
    pub(super) fn claim(&mut self, file: &mut LockFile, key: u64) -> Result<(), Trouble> {
        match file.elsewhere(key, Byte::Held) {
            Some((Mode::Shared, _)) if self.claim.is_none() => {
                self.claim = file.lock(key, Byte::Claimed, Mode::Shared)?;
            }
            Some((Mode::Exclusive, _)) => self.claim = None,
            _ => {}
        }
        Ok(())
    }

    /// Makes this process the lock's holder in that mode, unless another one is in the way.
    pub(super) fn take_byte(
        &mut self,
        file: &mut LockFile,
        key: u64,
        mode: Mode,
        yielded: &mut HashMap<u64, Instant>,
    ) -> Result<bool, Trouble> {
        if let Some(byte) = &mut self.byte {
            if !byte.counts(file) {
                if !self.holds.is_empty() {
                    return Err(Trouble::other(
                        "the lock file was deleted or replaced, or the database was, while the lock was held: let nothing \
                         but dlock touch the one, and close all connections before you move the other",
                    ));
                }
                self.byte = None;
            }
        }
        if let Some(byte) = &mut self.byte {
            let suffices = byte.mode() == Mode::Exclusive || mode == Mode::Shared;
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
        // Readers let writers go first by their claims.
        if let (Mode::Exclusive, Some(until)) = (mode, yielded.get(&key)) {
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
