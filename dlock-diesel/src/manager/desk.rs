//! What the managers of both crates share: the core's machine behind a mutex, with a clock, and the slots of those who
//! wait or hold.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use dlock_core::proto::manager::{
    Action, Config, ConnId, HoldId, Identity, ManagedDialect, Manager, News, Ticket, Wanted,
};
use dlock_core::proto::{Aftermath, Cause, Failure, Reason};
use dlock_core::{LockKey, Mode};

use crate::{Error, shared};

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
        let mut inner = self.lock();
        let now = self.started.elapsed();
        let ticket = inner.manager.request(identity, what, limit, now);
        let slot = Arc::new(Slot::default());
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

/// Where the news of a request arrive.
#[derive(Default)]
pub struct Slot {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    wakers: Vec<Waker>,
    when_lost: Vec<Callback>,
}

/// Called when a lock is lost.
pub type Callback = Box<dyn FnOnce() + Send>;

#[derive(Clone, Debug, Default, PartialEq)]
enum Phase {
    #[default]
    Waiting,
    Held,
    Ended(News),
}

/// Who is to be woken.
#[derive(Default)]
struct Awake {
    wakers: Vec<Waker>,
    callbacks: Vec<Callback>,
}

impl Awake {
    fn wake(self) {
        self.wakers.into_iter().for_each(Waker::wake);
        self.callbacks.into_iter().for_each(|callback| callback());
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, news: News, awake: &mut Awake) {
        let mut state = self.lock();
        if news == News::Lost {
            awake.callbacks.append(&mut state.when_lost);
        }
        state.phase = match news {
            News::Granted => Phase::Held,
            news => Phase::Ended(news),
        };
        awake.wakers.append(&mut state.wakers);
    }

    /// Ready when the lock is held, or the request has ended.
    pub fn poll_held(&self, waker: &Waker) -> Poll<Result<(), News>> {
        let mut state = self.lock();
        match &state.phase {
            Phase::Waiting => state.wait(waker),
            Phase::Held => Poll::Ready(Ok(())),
            Phase::Ended(news) => Poll::Ready(Err(news.clone())),
        }
    }

    /// Ready when the request has ended.
    pub fn poll_ended(&self, waker: &Waker) -> Poll<News> {
        let mut state = self.lock();
        match &state.phase {
            Phase::Ended(news) => Poll::Ready(news.clone()),
            _ => state.wait(waker),
        }
    }

    /// Whether the loss was told.
    pub fn is_lost(&self) -> bool {
        self.lock().phase == Phase::Ended(News::Lost)
    }

    /// Calls it when the lock is lost, at once if it is.
    pub fn when_lost(&self, callback: Callback) {
        let mut state = self.lock();
        match state.phase {
            Phase::Ended(News::Lost) => {
                drop(state);
                callback();
            }
            Phase::Ended(_) => {}
            _ => state.when_lost.push(callback),
        }
    }
}

impl State {
    fn wait<T>(&mut self, waker: &Waker) -> Poll<T> {
        if !self.wakers.iter().any(|other| other.will_wake(waker)) {
            self.wakers.push(waker.clone());
        }
        Poll::Pending
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").finish_non_exhaustive()
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

/// The error of somebody's closure that opens connections. Several requests may fail with it.
#[derive(Clone, Debug)]
struct NotOpened(Arc<dyn StdError + Send + Sync>);

/// The failure of a connection that could not be opened.
pub fn not_opened(error: Box<dyn StdError + Send + Sync>) -> Failure {
    Failure {
        key: None,
        reason: Reason::Database,
        aftermath: Aftermath::Clean,
        cause: Cause::new(NotOpened(error.into())),
    }
}

/// The failure of a connection that is closed.
pub fn gone() -> Failure {
    Failure {
        key: None,
        reason: Reason::Lost,
        aftermath: Aftermath::MarkBroken,
        cause: Cause::default(),
    }
}

/// The error of a request that has ended without the lock, or of a release.
pub fn error(news: News, key: &LockKey) -> Error {
    match news {
        News::Taken { waited, holders } => Error::Timeout {
            key: key.clone(),
            waited,
            holders,
        },
        News::Failed(failure) | News::NotReleased(failure) => failed(failure, key),
        News::Closed => Error::ManagerClosed { key: key.clone() },
        News::Lost | News::Granted | News::Released => lost(key),
    }
}

/// The error of a lock that is lost.
pub fn lost(key: &LockKey) -> Error {
    failed(gone(), key)
}

fn failed(mut failure: Failure, key: &LockKey) -> Error {
    if let Some(NotOpened(source)) = failure.cause.get::<NotOpened>() {
        return Error::NotConnected {
            key: key.clone(),
            source: Box::new(NotOpenedError(Arc::clone(source))),
        };
    }
    if failure.reason == Reason::SharedSession {
        failure.reason = Reason::Unsupported;
        failure.cause = Cause::new(DieselError::QueryBuilderError(SHARED.into()));
    } else if let Some(error) = failure.cause.get::<DieselError>() {
        // Others may fail with the same error.
        failure.cause = Cause::new(copy(error));
    } else if failure.reason == Reason::Lost {
        let silent = Box::new(String::from(
            "the session has ended, or did not answer in time",
        ));
        failure.cause = Cause::new(DieselError::DatabaseError(
            DatabaseErrorKind::ClosedConnection,
            silent,
        ));
    }
    shared::failed(failure, key).1
}

const SHARED: &str = "a pooler gives one session to several connections: connect to the server itself, or let the \
                      pooler pool sessions, not transactions";

fn copy(error: &DieselError) -> DieselError {
    match error {
        DieselError::DatabaseError(kind, information) => {
            let kind = match kind {
                DatabaseErrorKind::ClosedConnection => DatabaseErrorKind::ClosedConnection,
                DatabaseErrorKind::UnableToSendCommand => DatabaseErrorKind::UnableToSendCommand,
                _ => DatabaseErrorKind::Unknown,
            };
            DieselError::DatabaseError(kind, Box::new(information.message().to_owned()))
        }
        DieselError::BrokenTransactionManager => DieselError::BrokenTransactionManager,
        error => DieselError::QueryBuilderError(error.to_string().into()),
    }
}

/// An error that several requests have.
#[derive(Debug)]
struct NotOpenedError(Arc<dyn StdError + Send + Sync>);

impl fmt::Display for NotOpenedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for NotOpenedError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}
