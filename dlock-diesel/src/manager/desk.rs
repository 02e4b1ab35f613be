//! What the managers of both crates share: the core's machine behind a mutex, with a clock, and the slots of those who
//! wait or hold.

mod answered;
mod errors;
mod todo;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use dlock_core::FencingToken;
use dlock_core::proto::manager::{
    Action, Config, ConnId, ManagedDialect, Manager, News, QuestionId, Ticket, Wanted,
};
use dlock_core::proto::{Ask, Failure};

use self::answered::Answered;
pub use self::errors::{error, failed, gone, lost, not_opened};
pub use self::todo::{Calls, Todo};
use super::slot::Awake;
pub use super::slot::{Callback, Slot, Waiter};
use crate::Error;
use crate::shared::trace;

/// How many connections a manager has, unless set.
pub const CONNECTIONS: usize = 4;

/// Its lease, unless set.
pub const LEASE: Duration = Duration::from_secs(30);

/// The shortest lease that every server takes.
pub const SHORTEST_LEASE: Duration = Duration::from_secs(1);

/// How long the timer sleeps at most. It then asks again, so a limit can be longer than a clock can count.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

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
    answers: HashMap<QuestionId, Arc<Answered>>,
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
            tells_after: trace::sees_waits().then_some(D::TELLS_AFTER),
        };
        Self {
            inner: Mutex::new(Inner {
                manager: Manager::new(config),
                slots: HashMap::new(),
                answers: HashMap::new(),
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
    pub fn tell<T>(&self, input: impl FnOnce(&mut Manager, Duration) -> T) -> (T, Todo) {
        let mut inner = self.lock();
        let output = input(&mut inner.manager, self.started.elapsed());
        (output, self.spread(inner))
    }

    /// Wants what is asked for: a lock, or a slot of a semaphore with so many permits.
    ///
    /// # Errors
    ///
    /// It is refused, and nothing is sent.
    pub fn request<D: ManagedDialect>(
        &self,
        ask: &Ask,
        permits: Option<u32>,
    ) -> Result<(Ticket, Arc<Slot>, Todo), Error> {
        let identities = match permits {
            None => D::identities(ask).map_err(|failure| failed(failure, &ask.key))?,
            Some(permits) => {
                let identity = D::identity_of_semaphore(&ask.key, permits)?;
                vec![(identity, ask.key.clone())]
            }
        };
        let wanted = identities.into_iter().map(|(identity, key)| {
            let mode = ask.mode;
            (identity, Arc::new(Wanted { key, mode, permits }))
        });
        let mut wanted: Vec<_> = wanted.collect();
        let limit = ask.wait.limit;
        let mut inner = self.lock();
        let now = self.started.elapsed();
        let ticket = match wanted.len() {
            1 => {
                let (identity, what) = wanted.remove(0);
                inner.manager.request(identity, what, limit, now)
            }
            _ => inner.manager.request_all(wanted, limit, now),
        };
        let slot = Arc::new(Slot::default());
        trace::on_loss(&slot, &ask.key);
        inner.slots.insert(ticket, Arc::clone(&slot));
        Ok((ticket, slot, self.spread(inner)))
    }

    /// Hears no more of a request.
    pub fn cancel(&self, ticket: Ticket) -> Todo {
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

    /// Draws a fencing token for the holder of a lock.
    pub fn draw_token(&self, ticket: Ticket) -> (Drawing<'_>, Todo) {
        let mut inner = self.lock();
        let now = self.started.elapsed();
        let question = inner.manager.draw_token(ticket, now);
        let answered = Arc::new(Answered::default());
        inner.answers.insert(question, Arc::clone(&answered));
        let drawing = Drawing {
            desk: self,
            question,
            answered,
        };
        (drawing, self.spread(inner))
    }

    /// Hears no more of a question.
    fn forget(&self, question: QuestionId) {
        let mut inner = self.lock();
        inner.answers.remove(&question);
        inner.manager.forget(question);
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
    fn spread(&self, mut inner: MutexGuard<'_, Inner>) -> Todo {
        let mut actions = Vec::new();
        let mut awake = Awake::default();
        let mut told = Vec::new();
        while let Some(action) = inner.manager.poll() {
            match action {
                Action::Tell(ticket, news) => {
                    let slot = match news {
                        News::Granted { .. } => inner.slots.get(&ticket).cloned(),
                        _ => inner.slots.remove(&ticket),
                    };
                    slot.iter()
                        .for_each(|slot| slot.put(news.clone(), &mut awake));
                    told.extend(slot);
                }
                Action::TellHolders(ticket, holders) => {
                    let slot = inner.slots.get(&ticket);
                    slot.into_iter()
                        .for_each(|slot| slot.tell_holders(&holders, &mut awake));
                }
                Action::Answer(question, answer) => {
                    let answered = inner.answers.remove(&question);
                    let waker = answered.and_then(|answered| answered.put(answer));
                    awake.wakers.extend(waker);
                }
                Action::Closed => {
                    inner.is_over = true;
                    self.closed.put(News::Closed, &mut awake);
                    awake.wakers.extend(inner.timer.take());
                }
                action => actions.push(action),
            }
        }
        awake.wakers.extend(inner.earlier_timer());
        drop(inner);
        awake.wakers.into_iter().for_each(Waker::wake);
        Todo {
            actions,
            traces: Calls(awake.traces),
            callbacks: Calls(awake.callbacks),
            told,
        }
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
        Next::Wait(at.map(|at| LONGEST_SLEEP.min(at - now)))
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

/// A fencing token that is being drawn. Dropped, nobody waits for it any more.
#[derive(Debug)]
pub struct Drawing<'d> {
    desk: &'d Desk,
    question: QuestionId,
    answered: Arc<Answered>,
}

impl Drawing<'_> {
    /// Ready when the token is drawn, or the lock is lost.
    pub fn poll(&self, waker: &Waker) -> Poll<Result<FencingToken, Failure>> {
        self.answered.poll(waker)
    }
}

impl Drop for Drawing<'_> {
    fn drop(&mut self) {
        self.desk.forget(self.question);
    }
}
