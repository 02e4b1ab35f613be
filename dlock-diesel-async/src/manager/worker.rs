//! The tasks of a manager: one for each connection, and one for the time.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use dlock_core::proto::manager::{Action, ConnId, HoldId, ManagedDialect, Manager, Outcome, Token};
use dlock_core::proto::{Aftermath, Dialect, Failure, Hold, Session};
use dlock_diesel::shared::desk::{self, Desk, Next, Todo};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::backend::{BoxFuture, DialectOf, KeyOf, LockConnection};
use crate::run::{Watch, talk};
use crate::session;

/// Opens a connection.
pub(super) type Open<C> = Box<dyn Fn() -> BoxFuture<'static, Result<C, Failure>> + Send + Sync>;

/// What all handles, guards and tasks of a manager share.
pub(super) struct Inner<C: LockConnection> {
    pub(super) desk: Desk,
    open: Open<C>,
    lease: Duration,
    /// The runtime that first used the manager.
    runtime: OnceLock<Handle>,
    workers: Mutex<HashMap<ConnId, Worker>>,
    /// The server was asked whether a pooler stands in front of it.
    probed: AtomicBool,
}

struct Worker {
    jobs: UnboundedSender<Action>,
    /// `None` until it is spawned.
    task: Option<AbortHandle>,
}

impl<C: LockConnection> fmt::Debug for Inner<C> {
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
            runtime: OnceLock::new(),
            workers: Mutex::default(),
            probed: AtomicBool::new(false),
        })
    }

    /// Starts the clock, on the runtime of the caller.
    pub(super) fn start(self: &Arc<Self>) {
        if self.runtime.get().is_some() {
            return;
        }
        let runtime = Handle::current();
        if self.runtime.set(runtime.clone()).is_ok() {
            runtime.spawn(keep_time(Closes(Arc::clone(self))));
        }
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
                    // Its task reports that it is gone. Without one, it has not been spawned, and will not be wanted.
                    let worker = self.workers().remove(&conn);
                    match worker {
                        Some(worker) => worker.task.into_iter().for_each(|task| task.abort()),
                        None => self.tell(|manager, now| manager.closed(conn, now)),
                    }
                }
                Action::Acquire { conn, .. }
                | Action::Release { conn, .. }
                | Action::DrawToken { conn, .. }
                | Action::KeepAlive(conn) => {
                    if let Some(worker) = self.workers().get(&conn) {
                        // A task that has ended has reported it.
                        let _ = worker.jobs.send(action);
                    }
                }
                Action::Tell(..)
                | Action::TellHolders(..)
                | Action::Answer(..)
                | Action::Closed => {}
            }
        }
        drop((todo.traces, todo.callbacks, todo.told));
    }

    fn spawn(self: &Arc<Self>, conn: ConnId) {
        let Some(runtime) = self.runtime.get() else {
            return;
        };
        let (jobs, received) = unbounded_channel();
        // There before its task is. Nothing is locked while that is spawned: a runtime that has ended drops it at once.
        self.workers().insert(conn, Worker { jobs, task: None });
        let report = Report {
            inner: Arc::clone(self),
            conn,
        };
        let task = runtime.spawn(serve(report, received)).abort_handle();
        match self.workers().get_mut(&conn) {
            Some(worker) => worker.task = Some(task),
            None => task.abort(),
        }
    }

    /// Opens a connection and makes it one of the manager.
    async fn open(&self, watch: Told<'_, C>, token: Token) -> Result<C, Failure> {
        if DialectOf::<C>::MAY_BE_POOLED && !self.probed.load(Ordering::Relaxed) {
            let mut first = (self.open)().await?;
            let prepare = DialectOf::<C>::prepare(self.lease, Token::new());
            talk(&mut first, prepare, &mut None, ()).await?;
        }
        let mut conn = (self.open)().await?;
        let prepare = DialectOf::<C>::prepare(self.lease, token);
        talk(&mut conn, prepare, &mut None, watch).await?;
        self.probed.store(true, Ordering::Relaxed);
        Ok(conn)
    }
}

/// Reports the end of a connection, whatever ends its task. It is dropped after the connection.
struct Report<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    conn: ConnId,
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
struct Told<'i, C: LockConnection> {
    inner: &'i Inner<C>,
    conn: ConnId,
}

impl<C: LockConnection> Watch for Told<'_, C> {
    fn sent(&self) {
        self.inner.desk.sent(self.conn);
    }

    fn answered(&self) {
        self.inner.desk.answered(self.conn);
    }
}

/// The task of a connection: one conversation after the other.
async fn serve<C: LockConnection + 'static>(
    report: Report<C>,
    mut jobs: UnboundedReceiver<Action>,
) {
    let (inner, id) = (&report.inner, report.conn);
    let token = Token::new();
    let told = || Told { inner, conn: id };
    let mut conn = match inner.open(told(), token).await {
        Ok(conn) => conn,
        Err(failure) => return inner.tell(|manager, now| manager.open_failed(id, failure, now)),
    };
    if !inner.tell(|manager, now| manager.opened(id, now)) {
        return;
    }
    let mut holds = HashMap::new();
    while let Some(job) = jobs.recv().await {
        let outcome = match job {
            Action::Acquire {
                hold, what, how, ..
            } => match acquire(&mut conn, what.ask(how, true), what.permits, told()).await {
                Ok(Some(held)) => {
                    let slot = held.slot();
                    holds.insert(hold, held);
                    Outcome::Granted { slot }
                }
                Ok(None) => Outcome::Taken {
                    holders: Vec::new(),
                },
                Err(failure) => Outcome::from(failure),
            },
            Action::Release { hold, .. } => release(&mut conn, &mut holds, hold, told()).await,
            Action::DrawToken { hold, .. } => draw_token(&mut conn, holds.get(&hold), told()).await,
            _ => {
                let is_there = DialectOf::<C>::is_there(token);
                match talk(&mut conn, is_there, &mut None, told()).await {
                    Ok(()) => Outcome::Alive,
                    Err(failure) => Outcome::Failed(failure),
                }
            }
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
            Aftermath::EndSession => {
                let _ = timeout(Duration::from_secs(1), session::end(&mut conn)).await;
                return;
            }
            Aftermath::EndSessionUnread => return session::end_unread(&mut conn),
        }
    }
}

const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};

async fn acquire<C: LockConnection>(
    conn: &mut C,
    ask: dlock_core::proto::Ask,
    permits: Option<u32>,
    watch: impl Watch,
) -> Result<Option<Hold<KeyOf<C>>>, Failure> {
    let machine = DialectOf::<C>::acquire_managed(&ask, permits)?;
    talk(conn, machine, &mut None, watch).await
}

async fn release<C: LockConnection>(
    conn: &mut C,
    holds: &mut HashMap<HoldId, Hold<KeyOf<C>>>,
    hold: HoldId,
    watch: impl Watch,
) -> Outcome {
    let Some(hold) = holds.remove(&hold) else {
        return Outcome::Failed(desk::gone());
    };
    let machine = DialectOf::<C>::release(hold, OUTSIDE);
    match talk(conn, machine, &mut None, watch).await {
        Ok(()) => Outcome::Released,
        Err(failure) => Outcome::Failed(failure),
    }
}

async fn draw_token<C: LockConnection>(
    conn: &mut C,
    hold: Option<&Hold<KeyOf<C>>>,
    watch: impl Watch,
) -> Outcome {
    let Some(hold) = hold else {
        return Outcome::Failed(desk::gone());
    };
    match talk(conn, DialectOf::<C>::fencing_token(hold), &mut None, watch).await {
        Ok(token) => Outcome::Drawn(token),
        Err(failure) => Outcome::Failed(failure),
    }
}

/// Closes the manager when its runtime ends, also if that has never polled the task. Nobody else would end a request.
struct Closes<C: LockConnection + 'static>(Arc<Inner<C>>);

impl<C: LockConnection + 'static> Drop for Closes<C> {
    fn drop(&mut self) {
        self.0.tell(Manager::close);
    }
}

/// The task that tells the machine the time.
async fn keep_time<C: LockConnection + 'static>(closes: Closes<C>) {
    let inner = &closes.0;
    let mut pause = pin!(sleep(Duration::ZERO));
    loop {
        let next = poll_fn(|cx| {
            loop {
                match inner.desk.timer(cx.waker()) {
                    Next::Wait(None) => return Poll::Pending,
                    Next::Wait(Some(rest)) => {
                        pause.as_mut().reset(Instant::now() + rest);
                        if pause.as_mut().poll(cx).is_pending() {
                            return Poll::Pending;
                        }
                    }
                    next => return Poll::Ready(next),
                }
            }
        })
        .await;
        if next == Next::Over {
            return;
        }
        inner.tell(Manager::tick);
    }
}
