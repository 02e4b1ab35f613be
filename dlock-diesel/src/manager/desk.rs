//! What the managers of both crates share: the core's machine behind a mutex, with a clock, and the slots of those who
//! wait or hold.

mod errors;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use dlock_core::proto::manager::{
    Action, Config, ConnId, HoldId, Identity, ManagedDialect, Manager, News, Ticket, Wanted,
};
use dlock_core::{LockKey, Mode};

pub use self::errors::{error, gone, lost, not_opened};
use super::slot::Awake;
pub use super::slot::{Callback, Slot};
use crate::Error;
use crate::shared::trace;

/// How many connections a manager has, unless set.
pub const CONNECTIONS: usize = 4;

/// Its lease, unless set.
pub const LEASE: Duration = Duration::from_secs(30);

/// The shortest lease that every server takes.
pub const SHORTEST_LEASE: Duration = Duration::from_secs(1);

/// The machine, and everybody who waits for news of it.
#[derive(Debug)]
pub struct Desk {
    inner: Mutex<Inner>,
    started: Instant,
    /// Ended when all connections are closed.
    pub closed: Slot,
}

#[derive(Debug)]
struct Inner {
    manager: Manager,
    slots: HashMap<Ticket, Arc<Slot>>,
    /// When the timer wakes up by itself.
    wakes_at: Option<Duration>,
    timer: Option<Waker>,
    is_over: bool,
}

/// What the timer does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Call `tick` now.
    Tick,
    /// Wait so long, or until it is woken.
    Wait(Option<Duration>),
    /// End.
    Over,
}

impl Desk {
    /// A desk for a server that has leases, or not.
    pub fn new<D: ManagedDialect>(connections: usize, lease: Duration) -> Self {
        let config = Config {
            connections,
            lease: D::HAS_LEASE.then_some(lease),
            longest_wait: D::LONGEST_WAIT,
            turns: Config::TURNS,
            turn: Config::TURN,
        };
        Self {
            inner: Mutex::new(Inner {
                manager: Manager::new(config),
                slots: HashMap::new(),
                wakes_at: None,
                timer: None,
                is_over: false,
            }),
            started: Instant::now(),
            closed: Slot::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the machine something, and returns what is to be done.
    pub fn tell<T>(&self, input: impl FnOnce(&mut Manager, Duration) -> T) -> (T, Vec<Action>) {
        let mut inner = self.lock();
        let output = input(&mut inner.manager, self.started.elapsed());
        (output, self.spread(inner))
    }

    /// Wants a lock.
    pub fn request(
        &self,
        identity: Identity,
        what: Arc<Wanted>,
        limit: Option<Duration>,
    ) -> (Ticket, Arc<Slot>, Vec<Action>) {
        let slot = Arc::new(Slot::default());
        trace::on_loss(&slot, &what.key);
        let mut inner = self.lock();
        let now = self.started.elapsed();
        let ticket = inner.manager.request(identity, what, limit, now);
        inner.slots.insert(ticket, Arc::clone(&slot));
        (ticket, slot, self.spread(inner))
    }

    /// Hears no more of a request.
    pub fn cancel(&self, ticket: Ticket) -> Vec<Action> {
        let mut inner = self.lock();
        inner.slots.remove(&ticket);
        let now = self.started.elapsed();
        inner.manager.cancel(ticket, now);
        self.spread(inner)
    }

    /// Whether the lock may be another's by now. Also where nobody could be told yet.
    pub fn is_lost(&self, ticket: Ticket) -> bool {
        let inner = self.lock();
        !inner.manager.is_held(ticket, self.started.elapsed())
    }

    /// The connection of a lock that is held.
    pub fn hold_of(&self, ticket: Ticket) -> Option<(ConnId, HoldId)> {
        self.lock().manager.hold_of(ticket)
    }

    /// A statement is about to be sent.
    pub fn sent(&self, conn: ConnId) {
        let mut inner = self.lock();
        inner.manager.sent(conn, self.started.elapsed());
        // How long to wait for the answer.
        let timer = inner.earlier_timer();
        drop(inner);
        timer.into_iter().for_each(Waker::wake);
    }

    /// It is answered, and not with an error.
    pub fn answered(&self, conn: ConnId) {
        self.lock().manager.answered(conn);
    }

    /// Brings the news to those who wait for them, in their order. They are woken when nothing is locked any more.
    fn spread(&self, mut inner: MutexGuard<'_, Inner>) -> Vec<Action> {
        let mut todo = Vec::new();
        let mut awake = Awake::default();
        while let Some(action) = inner.manager.poll() {
            match action {
                Action::Tell(ticket, news) => {
                    let slot = match news {
                        News::Granted => inner.slots.get(&ticket).cloned(),
                        _ => inner.slots.remove(&ticket),
                    };
                    slot.into_iter()
                        .for_each(|slot| slot.put(news.clone(), &mut awake));
                }
                Action::Closed => {
                    inner.is_over = true;
                    self.closed.put(News::Closed, &mut awake);
                    awake.wakers.extend(inner.timer.take());
                }
                action => todo.push(action),
            }
        }
        awake.wakers.extend(inner.earlier_timer());
        drop(inner);
        awake.wake();
        todo
    }

    /// What the timer does next; it is woken when that changes.
    pub fn timer(&self, waker: &Waker) -> Next {
        let mut inner = self.lock();
        if inner.is_over {
            return Next::Over;
        }
        let now = self.started.elapsed();
        let at = inner.manager.next_tick();
        if at.is_some_and(|at| at <= now) {
            return Next::Tick;
        }
        inner.wakes_at = at;
        inner.timer = Some(waker.clone());
        Next::Wait(at.map(|at| at - now))
    }
}

impl Inner {
    /// The timer, if it would wake up too late.
    fn earlier_timer(&mut self) -> Option<Waker> {
        self.timer.as_ref()?;
        let at = self.manager.next_tick()?;
        match self.wakes_at {
            Some(wakes_at) if wakes_at <= at => None,
            _ => self.timer.take(),
        }
    }
}

/// What is wanted, and what the server locks.
pub fn wanted<D: ManagedDialect>(
    key: &LockKey,
    mode: Mode,
) -> Result<(Identity, Arc<Wanted>), Error> {
    let identity = D::identity(key)?;
    let key = key.clone();
    Ok((identity, Arc::new(Wanted { key, mode })))
}
