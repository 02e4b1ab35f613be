//! The threads of a manager: one for each connection, one for the time, and one for the callbacks of each loss.

mod threads;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use dlock_core::proto::manager::{Action, ConnId, HoldId, ManagedDialect, Manager, Outcome, Token};
use dlock_core::proto::{Aftermath, Ask, Dialect, Failure, Hold, Session};

use self::threads::Threads;
use super::desk::{self, Desk, Next, Todo};
use crate::backend::{DialectOf, KeyOf};
use crate::run::{Watch, talk};
use crate::{LockConnection, session};

/// Opens a connection.
pub(super) type Open<C> = Box<dyn Fn() -> Result<C, Failure> + Send + Sync>;

/// What all handles, guards and threads of a manager share.
pub(super) struct Inner<C> {
    pub(super) desk: Desk,
    open: Open<C>,
    lease: Duration,
    started: AtomicBool,
    workers: Mutex<HashMap<ConnId, Worker>>,
    threads: Threads,
    /// The server was asked whether a pooler stands in front of it.
    probed: AtomicBool,
}

struct Worker {
    jobs: Sender<Action>,
    /// The thread is to end as soon as it can.
    closes: Arc<AtomicBool>,
}

impl<C> fmt::Debug for Inner<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl<C: LockConnection + 'static> Inner<C> {
    pub(super) fn new(connections: usize, lease: Duration, open: Open<C>) -> Arc<Self> {
        Arc::new(Self {
            desk: Desk::new::<DialectOf<C>>(connections, lease),
            open,
            lease,
            started: AtomicBool::new(false),
            workers: Mutex::default(),
            threads: Threads::default(),
            probed: AtomicBool::new(false),
        })
    }

    /// Starts the clock.
    pub(super) fn start(self: &Arc<Self>) {
        if !self.started.swap(true, Ordering::Relaxed) {
            let closes = Closes(Arc::clone(self));
            self.threads.start("dlock-time", move || keep_time(&closes));
        }
    }

    /// Returns when its threads have ended, whose work is done. A process whose `main` returns while a thread of libpq
    /// ends may crash.
    pub(super) fn join(&self) {
        self.threads.join();
    }

    fn workers(&self) -> MutexGuard<'_, HashMap<ConnId, Worker>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the machine something, and does what it wants.
    pub(super) fn tell<T>(self: &Arc<Self>, input: impl FnOnce(&mut Manager, Duration) -> T) -> T {
        let (output, todo) = self.desk.tell(input);
        self.act(todo);
        output
    }

    pub(super) fn act(self: &Arc<Self>, todo: Todo) {
        for action in todo.actions {
            match action {
                Action::Open(conn) => self.spawn(conn),
                Action::Close(conn) => {
                    // Its thread reports that it is gone. Without one, there is none yet, and it will not be wanted.
                    let worker = self.workers().remove(&conn);
                    match worker {
                        Some(worker) => worker.closes.store(true, Ordering::Relaxed),
                        None => self.tell(|manager, now| manager.closed(conn, now)),
                    }
                }
                Action::Acquire { conn, .. }
                | Action::Release { conn, .. }
                | Action::DrawToken { conn, .. }
                | Action::KeepAlive(conn) => {
                    if let Some(worker) = self.workers().get(&conn) {
                        // A thread that has ended has reported it.
                        let _ = worker.jobs.send(action);
                    }
                }
                Action::Tell(..)
                | Action::TellHolders(..)
                | Action::Answer(..)
                | Action::Closed => {}
            }
        }
        drop(todo.traces);
        if !todo.callbacks.is_empty() {
            // Of their own: the one that is here may be a holder's, or one that others wait for.
            let inner = Arc::clone(self);
            self.threads
                .start("dlock-lost", move || inner.threads.call(todo.callbacks));
        }
        drop(todo.told);
    }

    fn spawn(self: &Arc<Self>, conn: ConnId) {
        let (jobs, received) = channel();
        let closes = Arc::new(AtomicBool::new(false));
        let report = Report {
            inner: Arc::clone(self),
            conn,
            closes: Arc::clone(&closes),
        };
        // There before its thread is.
        self.workers().insert(conn, Worker { jobs, closes });
        self.threads
            .start("dlock-connection", move || serve(report, &received));
    }

    /// Opens a connection and makes it one of the manager.
    fn open(&self, watch: &impl Watch, token: Token) -> Result<C, Failure> {
        if DialectOf::<C>::MAY_BE_POOLED && !self.probed.load(Ordering::Relaxed) {
            let mut first = (self.open)()?;
            let prepare = DialectOf::<C>::prepare(self.lease, Token::new());
            talk(&mut first, prepare, watch).unwrap_or_else(|| Err(desk::gone()))?;
        }
        let mut conn = (self.open)()?;
        let prepare = DialectOf::<C>::prepare(self.lease, token);
        talk(&mut conn, prepare, watch).unwrap_or_else(|| Err(desk::gone()))?;
        self.probed.store(true, Ordering::Relaxed);
        Ok(conn)
    }
}

/// Reports the end of a connection, whatever ends its thread. It is dropped after the connection.
struct Report<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    conn: ConnId,
    closes: Arc<AtomicBool>,
}

impl<C: LockConnection + 'static> Drop for Report<C> {
    fn drop(&mut self) {
        self.inner.workers().remove(&self.conn);
        let gone = desk::gone();
        self.inner
            .tell(|manager, now| manager.lost(self.conn, gone, now));
    }
}

/// Tells the machine of each statement.
impl<C: LockConnection + 'static> Watch for Report<C> {
    fn sent(&self) -> bool {
        self.inner.desk.sent(self.conn);
        !self.closes.load(Ordering::Relaxed)
    }

    fn answered(&self) {
        self.inner.desk.answered(self.conn);
    }
}

/// The thread of a connection: one conversation after the other.
fn serve<C: LockConnection + 'static>(report: Report<C>, jobs: &Receiver<Action>) {
    let (inner, id) = (&report.inner, report.conn);
    let token = Token::new();
    let mut conn = match inner.open(&report, token) {
        Ok(conn) => conn,
        Err(failure) => return inner.tell(|manager, now| manager.open_failed(id, failure, now)),
    };
    if !inner.tell(|manager, now| manager.opened(id, now)) {
        return;
    }
    let mut holds = HashMap::new();
    // It ends when the machine has closed the connection: then nobody can send any more.
    while let Ok(job) = jobs.recv() {
        let outcome = match job {
            Action::Acquire {
                hold, what, how, ..
            } => match acquire(&mut conn, &what.ask(how, false), what.permits, &report) {
                Some(Ok(Some(held))) => {
                    let slot = held.slot();
                    holds.insert(hold, held);
                    Outcome::Granted { slot }
                }
                Some(Ok(None)) => Outcome::Taken {
                    holders: Vec::new(),
                },
                Some(Err(failure)) => Outcome::from(failure),
                None => return,
            },
            Action::Release { hold, .. } => release(&mut conn, &mut holds, hold, &report),
            Action::DrawToken { hold, .. } => draw_token(&mut conn, holds.get(&hold), &report),
            _ => match talk(&mut conn, DialectOf::<C>::is_there(token), &report) {
                Some(Ok(())) => Outcome::Alive,
                Some(Err(failure)) => Outcome::Failed(failure),
                None => return,
            },
        };
        let aftermath = match &outcome {
            Outcome::Failed(failure) => failure.aftermath,
            _ => Aftermath::Clean,
        };
        // First, so that holders know of it before the session ends.
        inner.tell(|manager, now| manager.done(id, outcome, now));
        match aftermath {
            Aftermath::Clean => {}
            Aftermath::MarkBroken => return,
            Aftermath::EndSession | Aftermath::EndSessionUnread => {
                session::end(&mut conn);
                return;
            }
        }
    }
}

const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};

fn acquire<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
    permits: Option<u32>,
    watch: &impl Watch,
) -> Option<Result<Option<Hold<KeyOf<C>>>, Failure>> {
    match DialectOf::<C>::acquire_managed(ask, permits) {
        Ok(machine) => talk(conn, machine, watch),
        Err(failure) => Some(Err(failure)),
    }
}

fn release<C: LockConnection>(
    conn: &mut C,
    holds: &mut HashMap<HoldId, Hold<KeyOf<C>>>,
    hold: HoldId,
    watch: &impl Watch,
) -> Outcome {
    let Some(hold) = holds.remove(&hold) else {
        return Outcome::Failed(desk::gone());
    };
    match talk(conn, DialectOf::<C>::release(hold, OUTSIDE), watch) {
        Some(Ok(())) => Outcome::Released,
        Some(Err(failure)) => Outcome::Failed(failure),
        None => Outcome::Failed(desk::gone()),
    }
}

fn draw_token<C: LockConnection>(
    conn: &mut C,
    hold: Option<&Hold<KeyOf<C>>>,
    watch: &impl Watch,
) -> Outcome {
    let drawn = hold.and_then(|hold| talk(conn, DialectOf::<C>::fencing_token(hold), watch));
    match drawn.unwrap_or_else(|| Err(desk::gone())) {
        Ok(token) => Outcome::Drawn(token),
        Err(failure) => Outcome::Failed(failure),
    }
}

/// Closes the manager if its thread ends otherwise, or cannot be started. Nobody else would end a request.
struct Closes<C: LockConnection + 'static>(Arc<Inner<C>>);

impl<C: LockConnection + 'static> Drop for Closes<C> {
    fn drop(&mut self) {
        self.0.tell(Manager::close);
    }
}

/// The thread that tells the machine the time.
fn keep_time<C: LockConnection + 'static>(Closes(inner): &Closes<C>) {
    let waker = waker();
    loop {
        match inner.desk.timer(&waker) {
            Next::Over => return,
            Next::Tick => inner.tell(Manager::tick),
            Next::Wait(Some(rest)) => thread::park_timeout(rest),
            Next::Wait(None) => thread::park(),
        }
    }
}

/// Wakes this thread.
pub(super) fn waker() -> Waker {
    Waker::from(Arc::new(ThisThread(thread::current())))
}

struct ThisThread(Thread);

impl Wake for ThisThread {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
