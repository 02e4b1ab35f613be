//! Tasks, and a pool of async connections. Futures are dropped after some polls.

pub(super) use tokio::time::sleep as pause;

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use diesel::dsl::sql;
use diesel::sql_types::BigInt;
use diesel::{ConnectionError, QueryResult, SqliteConnection, sql_query};
use diesel_async::pooled_connection::PoolableConnection;
use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
use diesel_async::{
    AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
};
pub(super) use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, LockManager, ManagedLockGuard};
use dlock_diesel_async::{
    AdvisorySemaphore, AdvisoryXactLock, AsyncFunc, Error, LockConnection, ManagedLock,
    SqliteLocksExt, TransactionLocks,
};
pub(super) use dlock_sync_or_async::with_await as both;

use super::operations::{has_no_xact_locks, has_xact_locks, managed, on_connection, xact_acquired};
use crate::proof::clock::now;
use crate::proof::random::Random;
use crate::proof::worker::Common;
use crate::proof::worker::log::Log;
use crate::proof::worker::server::*;
use crate::proof::worker::task::Task;
use crate::{AsyncTestConnection, Kind};

pub(super) trait ProofConnection:
    LockConnection + AsyncTestConnection + PoolableConnection + Send + 'static
{
    const ASKS: &'static Asks;

    fn ready(&mut self) -> impl Future<Output = QueryResult<()>> + Send {
        async { Ok(()) }
    }

    fn try_number(&mut self, query: &str) -> impl Future<Output = QueryResult<i64>> + Send;

    fn change(&mut self, statement: &str) -> impl Future<Output = QueryResult<usize>> + Send;

    fn shared(lock: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self>;

    fn shared_managed(lock: ManagedLock<Self>) -> ManagedLock<Self>;

    fn xact_lock(&mut self, task: &Task) -> impl Future<Output = Result<bool, Error>> + Send;
}

macro_rules! asks_by_diesel {
    () => {
        async fn try_number(&mut self, query: &str) -> QueryResult<i64> {
            sql::<BigInt>(query).get_result(self).await
        }

        async fn change(&mut self, statement: &str) -> QueryResult<usize> {
            sql_query(statement).execute(self).await
        }
    };
}

impl ProofConnection for AsyncPgConnection {
    const ASKS: &'static Asks = &POSTGRES;
    asks_by_diesel!();
    has_shared_locks!();
    has_xact_locks!();
}

impl ProofConnection for AsyncMysqlConnection {
    const ASKS: &'static Asks = &MYSQL;
    asks_by_diesel!();

    has_no_shared_locks!();
    has_no_xact_locks!();
}

impl ProofConnection for SyncConnectionWrapper<SqliteConnection> {
    const ASKS: &'static Asks = &SQLITE;
    asks_by_diesel!();
    has_shared_locks!();
    has_no_xact_locks!();

    async fn ready(&mut self) -> QueryResult<()> {
        self.batch_execute("PRAGMA busy_timeout = 20000; PRAGMA synchronous = OFF")
            .await?;
        Ok(self.enable_advisory_locks().await?)
    }
}

type Cancel = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

/// What cancels a wait that is dropped.
pub(super) fn cancellation<C: ProofConnection>(conn: &C, task: &Task) -> Cancel {
    task.cancels.then(|| Box::pin(conn.cancellation()) as _)
}

pub(super) fn with_cancel<C: ProofConnection>(
    lock: AdvisoryLock<&mut C>,
    cancel: Cancel,
) -> AdvisoryLock<&mut C> {
    match cancel {
        Some(cancel) => lock.cancel_with(cancel),
        None => lock,
    }
}

pub(super) fn semaphore_with_cancel<C: ProofConnection>(
    lock: AdvisorySemaphore<&mut C>,
    cancel: Cancel,
) -> AdvisorySemaphore<&mut C> {
    match cancel {
        Some(cancel) => lock.cancel_with(cancel),
        None => lock,
    }
}

pub(super) fn xact_with_cancel<C: ProofConnection<Backend: TransactionLocks>>(
    lock: AdvisoryXactLock<'_, C>,
    cancel: Cancel,
) -> AdvisoryXactLock<'_, C> {
    match cancel {
        Some(cancel) => lock.cancel_with(cancel),
        None => lock,
    }
}

pub(super) async fn in_transaction<'a, C, F, T>(conn: &mut C, body: F) -> Result<T, Error>
where
    C: AsyncConnection,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, Error>
        + AsyncFunc<&'r mut C, Result<T, Error>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
{
    conn.transaction(body).await
}

async fn connect<C: ProofConnection>(url: &str) -> Result<(C, i64, u64), ConnectionError> {
    let opened = now();
    let mut conn = C::establish(&C::direct_url(url)).await?;
    let set_up = ConnectionError::CouldntSetupConfiguration;
    conn.ready().await.map_err(set_up)?;
    let session = conn.try_number(C::ASKS.session).await.map_err(set_up)?;
    Ok((conn, session, opened))
}

/// Hands connections on as bb8 does: those that are not marked broken, and answer.
type Pool<C> = Mutex<Vec<(C, i64, u64)>>;

pub(crate) fn run(common: &Arc<Common>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        match common.kind {
            Kind::Postgres => run_on::<AsyncPgConnection>(common).await,
            Kind::Mysql => run_on::<AsyncMysqlConnection>(common).await,
            Kind::Sqlite => run_on::<SyncConnectionWrapper<SqliteConnection>>(common).await,
        }
    });
}

async fn run_on<C: ProofConnection>(common: &Arc<Common>) {
    let options = &common.options;
    let pool: Arc<Pool<C>> = Arc::default();
    let locks = LockManager::builder({
        let (url, name, writer) = (
            options.url.clone(),
            options.name.clone(),
            common.writer.clone(),
        );
        move || {
            let (url, name, writer) = (url.clone(), name.clone(), writer.clone());
            async move {
                let (conn, session, opened) = connect::<C>(&url).await?;
                writer.write(
                    &format!("{name}.m"),
                    format_args!("opened session={session} from={opened}"),
                );
                Ok::<_, ConnectionError>(conn)
            }
        }
    });
    let locks = locks.connections(3).lease(options.lease()).build();
    let actors: Vec<_> = (0..options.actors)
        .map(|number| {
            tokio::spawn(act(
                Arc::clone(common),
                number,
                Arc::clone(&pool),
                locks.clone(),
            ))
        })
        .collect();
    for actor in actors {
        actor.await.expect("no panic");
    }
    locks.close().await;
}

async fn act<C: ProofConnection>(
    common: Arc<Common>,
    number: u32,
    pool: Arc<Pool<C>>,
    locks: LockManager<C>,
) {
    let options = &common.options;
    let actor = format!("{}.t{number}", options.name);
    let mut random = Random::new(options.seed ^ u64::from(number) << 32);
    let mut next = 0;
    while common.goes_on() {
        next += 1;
        let log = Log {
            writer: common.writer.clone(),
            actor: actor.clone(),
            number: next,
        };
        let task = Task::draw(&common, &mut random);
        if !task.has_connection() {
            log.ask(&task, None);
            quietly(&common, &task, &log, managed(&locks, None, &task, &log)).await;
            continue;
        }
        let free = pool.lock().expect("no panic").pop();
        let pooled = match free {
            Some(pooled) => Ok(pooled),
            None => connect(&options.url).await,
        };
        let Ok((mut conn, session, opened)) = pooled else {
            pause(Duration::from_millis(50)).await;
            continue;
        };
        match conn.try_number(C::ASKS.held).await {
            Ok(0) => {}
            Ok(_) => common
                .writer
                .write(&actor, format_args!("dirty session={session}")),
            Err(error) => {
                let text = error.to_string().replace('\n', " ");
                common.writer.write(
                    &actor,
                    format_args!("unfit session={session} opened={opened} text={text}"),
                );
                continue;
            }
        }
        if task.is_managed() {
            log.ask(&task, None);
            let work = managed(&locks, Some(&mut conn), &task, &log);
            // diesel-async hands on a connection whose user has dropped a statement.
            if !quietly(&common, &task, &log, work).await {
                continue;
            }
        } else {
            log.ask(&task, Some((session, opened)));
            let work = on_connection(&mut conn, &task, &log);
            quietly(&common, &task, &log, work).await;
        }
        if !PoolableConnection::is_broken(&mut conn) {
            pool.lock().expect("no panic").push((conn, session, opened));
        }
    }
}

/// Notes how the future ends: `false` if it has been dropped, when it had been polled so often and was not done.
async fn quietly(
    common: &Common,
    task: &Task,
    log: &Log,
    work: impl Future<Output = Result<&'static str, Error>> + Send,
) -> bool {
    let mut work = Box::pin(work);
    let mut left = task.polls;
    let done = poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)));
        match (polled, &mut left) {
            (Ok(Poll::Ready(result)), _) => Poll::Ready(Some(result)),
            (Err(_), _) => Poll::Ready(Some(Ok("panic"))),
            (Ok(Poll::Pending), Some(0)) => Poll::Ready(None),
            (Ok(Poll::Pending), left) => {
                if let Some(left) = left {
                    *left -= 1;
                }
                Poll::Pending
            }
        }
    })
    .await;
    let is_done = done.is_some();
    // So that what it does when it is dropped is done before it counts as ended.
    drop(work);
    match (done, task.polls) {
        (Some(result), polls) => {
            log.ended(&result);
            // It has no more polls than that. One that ends early does not tell.
            if polls.is_some() && matches!(result, Ok("ok")) {
                common.first_poll_again(task.form);
            }
        }
        (None, polls) => log.dropped(polls.unwrap_or_default()),
    }
    is_done
}
