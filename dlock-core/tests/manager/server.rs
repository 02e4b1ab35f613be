//! A model of the servers: sessions, holds, one queue for each lock and one at the gate of each semaphore, and the idle
//! limit.

use std::collections::{BTreeMap, VecDeque};

use dlock_core::Mode;

pub(crate) type Session = usize;
pub(crate) type Key = u64;
/// Microseconds.
pub(crate) type Time = u64;

#[derive(Debug, Default)]
pub(crate) struct Server {
    pub(crate) sessions: Vec<State>,
    locks: BTreeMap<Key, Lock>,
    /// Who waits for a slot of each semaphore of so many.
    gates: BTreeMap<Key, VecDeque<(Session, u32)>>,
}

/// The lock of a slot.
pub(crate) fn slot_key(semaphore: Key, slot: u32) -> Key {
    SLOTS + semaphore * 1024 + Key::from(slot)
}

/// The keys from here on are those of slots.
const SLOTS: Key = 1 << 62;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) alive: bool,
    /// Since when it has nothing to do. `None` while a statement runs.
    pub(crate) idle_since: Option<Time>,
    /// The key that it waits for.
    waits: Option<Key>,
    /// The slot that it was granted after a wait.
    pub(crate) slot: Option<u32>,
}

#[derive(Debug, Default)]
struct Lock {
    /// A session that holds it several times stands here as often.
    holders: Vec<(Session, Mode)>,
    queue: VecDeque<(Session, Mode)>,
}

impl Lock {
    fn allows(&self, session: Session, mode: Mode) -> bool {
        let mut others = self.holders.iter().filter(|(holder, _)| *holder != session);
        match mode {
            Mode::Exclusive => others.next().is_none(),
            Mode::Shared => others.all(|(_, mode)| *mode == Mode::Shared),
        }
    }
}

impl Server {
    pub(crate) fn connect(&mut self, now: Time) -> Session {
        self.sessions.push(State {
            alive: true,
            idle_since: Some(now),
            waits: None,
            slot: None,
        });
        self.sessions.len() - 1
    }

    pub(crate) fn begins(&mut self, session: Session) {
        self.sessions[session].idle_since = None;
    }

    pub(crate) fn ends(&mut self, session: Session, now: Time) {
        self.sessions[session].idle_since = Some(now);
    }

    /// Asks for a lock. `true`: granted. `false`: it waits in the queue if it is to.
    pub(crate) fn ask(&mut self, session: Session, key: Key, mode: Mode, waits: bool) -> bool {
        let lock = self.locks.entry(key).or_default();
        let holds = lock.holders.iter().any(|(holder, _)| *holder == session);
        // Nobody overtakes the queue, except who holds the lock already.
        if (lock.queue.is_empty() || holds) && lock.allows(session, mode) {
            lock.holders.push((session, mode));
            return true;
        }
        if waits {
            lock.queue.push_back((session, mode));
            self.sessions[session].waits = Some(key);
        }
        false
    }

    /// Asks for a slot of a semaphore, but not for one of these. Without one it waits if it is to.
    pub(crate) fn ask_slot(
        &mut self,
        session: Session,
        semaphore: Key,
        permits: u32,
        except: &[u32],
        waits: bool,
    ) -> Option<u32> {
        let queue = self.gates.entry(semaphore).or_default();
        let granted = match queue.is_empty() {
            true => self.take_slot(session, semaphore, permits, except),
            false => None,
        };
        if granted.is_none() && waits {
            let queue = self.gates.entry(semaphore).or_default();
            queue.push_back((session, permits));
            self.sessions[session].waits = Some(semaphore);
        }
        granted
    }

    /// It grants a session once more what it has already.
    fn take_slot(
        &mut self,
        session: Session,
        semaphore: Key,
        permits: u32,
        except: &[u32],
    ) -> Option<u32> {
        let slots = (0..permits).map(|slot| (slot + session as u32) % permits);
        for slot in slots.filter(|slot| !except.contains(slot)) {
            let key = slot_key(semaphore, slot);
            let lock = self.locks.get(&key);
            if lock.is_none_or(|lock| lock.allows(session, Mode::Exclusive)) {
                let lock = self.locks.entry(key).or_default();
                lock.holders.push((session, Mode::Exclusive));
                return Some(slot);
            }
        }
        None
    }

    /// The slots that a session has.
    pub(crate) fn slots_of(&self, session: Session, semaphore: Key) -> Vec<u32> {
        let first = slot_key(semaphore, 0);
        let locks = self.locks.range(first..first + 1024);
        let has = |lock: &Lock| lock.holders.iter().any(|(holder, _)| *holder == session);
        let own = locks.filter(|(_, lock)| has(lock));
        own.map(|(key, _)| (key - first) as u32).collect()
    }

    /// Leaves the queue. `false`: it was not there.
    pub(crate) fn give_up(&mut self, session: Session) -> (bool, Vec<Session>) {
        let Some(key) = self.sessions[session].waits.take() else {
            return (false, Vec::new());
        };
        if let Some(queue) = self.gates.get_mut(&key) {
            queue.retain(|(waiting, _)| *waiting != session);
        }
        if let Some(lock) = self.locks.get_mut(&key) {
            lock.queue.retain(|(waiting, _)| *waiting != session);
        }
        (true, self.wake(key))
    }

    /// Releases one hold. Returns whether there was one, and who is granted the lock now.
    pub(crate) fn release(
        &mut self,
        session: Session,
        key: Key,
        mode: Mode,
    ) -> (bool, Vec<Session>) {
        let lock = self.locks.entry(key).or_default();
        let mut holders = lock.holders.iter();
        let Some(index) = holders.position(|holder| *holder == (session, mode)) else {
            return (false, Vec::new());
        };
        lock.holders.remove(index);
        (true, self.wake(key))
    }

    /// Ends a session. Returns who is granted a lock now.
    pub(crate) fn end(&mut self, session: Session) -> Vec<Session> {
        self.sessions[session].alive = false;
        self.sessions[session].idle_since = None;
        let (_, mut woken) = self.give_up(session);
        let has = |lock: &Lock| lock.holders.iter().any(|(holder, _)| *holder == session);
        let own = self.locks.iter().filter(|(_, lock)| has(lock));
        let keys: Vec<_> = own.map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(lock) = self.locks.get_mut(&key) {
                lock.holders.retain(|(holder, _)| *holder != session);
            }
            woken.extend(self.wake(key));
        }
        woken
    }

    fn wake(&mut self, key: Key) -> Vec<Session> {
        let mut woken = self.wake_lock(key);
        let semaphore = match key >= SLOTS {
            true => (key - SLOTS) / 1024,
            false => key,
        };
        // The first of them looks for a slot.
        while let Some(&(session, permits)) = self.gates.get(&semaphore).and_then(|q| q.front()) {
            let Some(slot) = self.take_slot(session, semaphore, permits, &[]) else {
                break;
            };
            self.gates.entry(semaphore).or_default().pop_front();
            self.sessions[session].slot = Some(slot);
            self.sessions[session].waits = None;
            woken.push(session);
        }
        woken
    }

    fn wake_lock(&mut self, key: Key) -> Vec<Session> {
        let Some(lock) = self.locks.get_mut(&key) else {
            return Vec::new();
        };
        let mut woken = Vec::new();
        while let Some(&(session, mode)) = lock.queue.front() {
            if !lock.allows(session, mode) {
                break;
            }
            lock.queue.pop_front();
            lock.holders.push((session, mode));
            self.sessions[session].waits = None;
            woken.push(session);
        }
        if lock.holders.is_empty() && lock.queue.is_empty() {
            self.locks.remove(&key);
        }
        woken
    }

    /// Whether a session holds a lock.
    pub(crate) fn holds(&self, session: Session, key: Key) -> bool {
        let lock = self.locks.get(&key);
        lock.is_some_and(|lock| lock.holders.iter().any(|(holder, _)| *holder == session))
    }

    /// How many holds a session has.
    pub(crate) fn count(&self, session: Session) -> usize {
        let holders = self.locks.values().flat_map(|lock| &lock.holders);
        holders.filter(|(holder, _)| *holder == session).count()
    }

    pub(crate) fn is_clean(&self) -> bool {
        let mut locks = self.locks.values();
        locks.all(|lock| lock.holders.is_empty() && lock.queue.is_empty())
            && self.gates.values().all(VecDeque::is_empty)
    }

    pub(crate) fn locks(&self) -> String {
        format!("{:?}", self.locks)
    }
}
