//! Who holds each lock, who waits for it, and who may go next.
//!
//! A queue only keeps order. It does no I/O, has no clock and wakes nobody: its user acts on what it returns. A request
//! that has nobody in its way is *ready*, and no more than that, because the lock is also wanted outside of this queue.
//! The user gets it there, from the server or the lock file, and then calls [`grant`](Queue::grant).
//!
//! | a request that is | and | is then |
//! |---|---|---|
//! | new | nobody is in its way | waiting, ready |
//! | new | somebody is in its way | waiting, blocked |
//! | new | it would wait for its own owner | refused: a deadlock |
//! | waiting, blocked | the last one in its way leaves | waiting, ready |
//! | waiting, ready | [`grant`](Queue::grant) | holding |
//! | waiting | [`cancel`](Queue::cancel) | gone |
//! | holding | [`release`](Queue::release) | gone |
//!
//! These are in the way of a request, unless both are shared:
//!
//! - the holds of other owners;
//! - the waiters before it, which makes the order first come, first served, and keeps readers from overtaking a writer.
//!
//! An owner that holds the lock already passes the waiters before it: they wait for that owner.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

use dlock_core::Mode;

/// The locks of any number of keys.
///
/// An owner waits as a whole, as a session does: owners that wait for each other are a deadlock. Each request of an
/// owner has an id of its own.
#[derive(Debug)]
pub(super) struct Queue<K, O, R> {
    lines: HashMap<K, Line<O, R>>,
    keys: HashMap<R, K>,
    /// Everything that an owner holds or waits for.
    owned: HashMap<O, Vec<R>>,
}

/// A request for a lock: a hold, or a wait for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request<O, R> {
    /// Unique among the requests in this queue.
    pub(super) id: R,
    pub(super) owner: O,
    pub(super) mode: Mode,
}

/// What became of a new request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Requested {
    /// It waits, and nobody is in its way.
    Ready,
    /// It waits for others.
    Blocked,
    /// Those in its way wait for its owner. The request was not added.
    Deadlock,
}

/// What a change leaves to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(super) struct Changed<K, R> {
    pub(super) key: K,
    /// The mode of the request that was granted, released or cancelled.
    pub(super) mode: Mode,
    /// The waiters for the key that have nobody in their way now, in their order.
    pub(super) ready: Vec<R>,
}

/// The requests for one key.
#[derive(Debug)]
struct Line<O, R> {
    holders: Vec<Request<O, R>>,
    waiters: VecDeque<Request<O, R>>,
}

impl<K, O, R> Default for Queue<K, O, R> {
    fn default() -> Self {
        Self {
            lines: HashMap::new(),
            keys: HashMap::new(),
            owned: HashMap::new(),
        }
    }
}

impl<K, O, R> Queue<K, O, R>
where
    K: Clone + Eq + Hash,
    O: Copy + Eq + Hash,
    R: Copy + Eq + Hash,
{
    /// Adds a request at the end of the key's line, unless it would never get its turn.
    pub(super) fn request(&mut self, key: K, request: Request<O, R>) -> Requested {
        debug_assert!(!self.contains(request.id), "BUG: the request is not new");
        let line = self.lines.entry(key.clone()).or_default();
        line.waiters.push_back(request);
        let is_ready = line.is_ready(line.waiters.len() - 1);
        self.keys.insert(request.id, key);
        self.owned
            .entry(request.owner)
            .or_default()
            .push(request.id);
        if is_ready {
            return Requested::Ready;
        }
        if self.is_deadlock(request.owner) {
            let _ = self.cancel(request.id);
            return Requested::Deadlock;
        }
        Requested::Blocked
    }

    /// Makes a hold of a waiter that is [ready](Self::is_ready). `None` if the request is not.
    pub(super) fn grant(&mut self, id: R) -> Option<Changed<K, R>> {
        let (key, index) = self
            .waiting(id)
            .filter(|(key, index)| self.lines[key].is_ready(*index))?;
        let key = key.clone();
        let line = self.lines.get_mut(&key)?;
        let request = line.waiters.remove(index)?;
        line.holders.push(request);
        Some(self.changed(key, request.mode))
    }

    /// Ends a hold. `None` if the request does not hold anything.
    pub(super) fn release(&mut self, id: R) -> Option<Changed<K, R>> {
        let key = self.keys.get(&id)?.clone();
        let line = self.lines.get_mut(&key)?;
        let index = line.holders.iter().position(|holder| holder.id == id)?;
        let request = line.holders.remove(index);
        self.forget(request);
        Some(self.changed(key, request.mode))
    }

    /// Removes a waiter, wherever it stands. `None` if the request does not wait.
    pub(super) fn cancel(&mut self, id: R) -> Option<Changed<K, R>> {
        let (key, index) = self.waiting(id)?;
        let key = key.clone();
        let request = self.lines.get_mut(&key)?.waiters.remove(index)?;
        self.forget(request);
        Some(self.changed(key, request.mode))
    }

    /// Whether the request holds or waits.
    pub(super) fn contains(&self, id: R) -> bool {
        self.keys.contains_key(&id)
    }

    /// The request's key and itself, if it waits.
    pub(super) fn waiter(&self, id: R) -> Option<(&K, Request<O, R>)> {
        let (key, index) = self.waiting(id)?;
        Some((key, self.lines[key].waiters[index]))
    }

    /// Whether the request waits and nobody is in its way.
    pub(super) fn is_ready(&self, id: R) -> bool {
        self.waiting(id)
            .is_some_and(|(key, index)| self.lines[key].is_ready(index))
    }

    /// The holds of a key, in the order in which they were granted.
    pub(super) fn holders(&self, key: &K) -> impl Iterator<Item = Request<O, R>> {
        let line = self.lines.get(key);
        line.into_iter()
            .flat_map(|line| line.holders.iter().copied())
    }

    /// The waiters for a key, in their order.
    pub(super) fn waiters(&self, key: &K) -> impl Iterator<Item = Request<O, R>> {
        let line = self.lines.get(key);
        line.into_iter()
            .flat_map(|line| line.waiters.iter().copied())
    }

    /// Whether the owner holds the key, in whatever mode.
    pub(super) fn is_held_by(&self, key: &K, owner: O) -> bool {
        self.lines
            .get(key)
            .is_some_and(|line| line.is_held_by(owner))
    }

    /// Everything that the owner holds.
    pub(super) fn held_by(&self, owner: O) -> impl Iterator<Item = (&K, Request<O, R>)> {
        self.owned_by(owner).filter_map(|(id, key)| {
            let holders = &self.lines[key].holders;
            let holder = holders.iter().find(|holder| holder.id == id);
            holder.map(|holder| (key, *holder))
        })
    }

    /// Whether the owner waits for anything.
    pub(super) fn is_waiting(&self, owner: O) -> bool {
        self.owned_by(owner)
            .any(|(id, key)| self.lines[key].position(id).is_some())
    }

    fn owned_by(&self, owner: O) -> impl Iterator<Item = (R, &K)> {
        let ids = self.owned.get(&owner).into_iter().flatten();
        ids.map(|id| (*id, &self.keys[id]))
    }

    fn waiting(&self, id: R) -> Option<(&K, usize)> {
        let key = self.keys.get(&id)?;
        let index = self.lines[key].position(id)?;
        Some((key, index))
    }

    /// Whether those for whom the owner waits wait for the owner, directly or through others.
    ///
    /// Only a new request can close such a circle, so checking each request once is enough.
    fn is_deadlock(&self, owner: O) -> bool {
        // The common case: nobody waits for an owner whose only request is the new one.
        if self.owned_by(owner).nth(1).is_none() {
            return false;
        }
        let mut seen = HashSet::new();
        let mut next = vec![owner];
        while let Some(waiting) = next.pop() {
            for (id, key) in self.owned_by(waiting) {
                let line = &self.lines[key];
                let Some(index) = line.position(id) else {
                    continue;
                };
                for blocker in line.blockers(index) {
                    if blocker == owner {
                        return true;
                    }
                    if seen.insert(blocker) {
                        next.push(blocker);
                    }
                }
            }
        }
        false
    }

    fn forget(&mut self, request: Request<O, R>) {
        self.keys.remove(&request.id);
        if let Some(owned) = self.owned.get_mut(&request.owner) {
            owned.retain(|id| *id != request.id);
            if owned.is_empty() {
                self.owned.remove(&request.owner);
            }
        }
    }

    fn changed(&mut self, key: K, mode: Mode) -> Changed<K, R> {
        let mut ready = Vec::new();
        if let Some(line) = self.lines.get(&key) {
            if line.holders.is_empty() && line.waiters.is_empty() {
                self.lines.remove(&key);
            } else {
                let waiters = line.waiters.iter().enumerate();
                let is_ready = waiters.filter(|(index, _)| line.is_ready(*index));
                ready.extend(is_ready.map(|(_, waiter)| waiter.id));
            }
        }
        Changed { key, mode, ready }
    }
}

impl<O, R> Default for Line<O, R> {
    fn default() -> Self {
        Self {
            holders: Vec::new(),
            waiters: VecDeque::new(),
        }
    }
}

impl<O: Copy + Eq, R: Copy + Eq> Line<O, R> {
    fn position(&self, id: R) -> Option<usize> {
        self.waiters.iter().position(|waiter| waiter.id == id)
    }

    fn is_held_by(&self, owner: O) -> bool {
        self.holders.iter().any(|holder| holder.owner == owner)
    }

    fn is_ready(&self, index: usize) -> bool {
        self.blockers(index).next().is_none()
    }

    /// The owners in the way of a waiter.
    fn blockers(&self, index: usize) -> impl Iterator<Item = O> {
        let waiter = self.waiters[index];
        let before = match self.is_held_by(waiter.owner) {
            true => 0,
            false => index,
        };
        let others = self.holders.iter().chain(self.waiters.range(..before));
        let in_the_way = others
            .filter(move |other| other.owner != waiter.owner && conflict(other.mode, waiter.mode));
        in_the_way.map(|other| other.owner)
    }
}

fn conflict(one: Mode, other: Mode) -> bool {
    one == Mode::Exclusive || other == Mode::Exclusive
}

#[cfg(test)]
mod tests;
