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
use dlock_diesel_async::{
    AdvisoryLock, AdvisorySemaphore, AsyncFunc, Error, LockConnection, ManagedLock, SqliteLocksExt,
};
pub(super) use dlock_diesel_async::{AdvisoryLockExt, LockManager, ManagedLockGuard};
pub(super) use dlock_sync_or_async::with_await as both;

use super::operations::{managed, on_connection};
use crate::proof::clock::now;
use crate::proof::random::Random;
use crate::proof::worker::Common;
use crate::proof::worker::log::Log;
use crate::proof::worker::task::Task;
use crate::{AsyncTestConnection, Kind};

pub(super) trait ProofConnection:
    LockConnection + AsyncTestConnection + PoolableConnection + Send + 'static
{
    /// This session.
    const SESSION: &'static str;
    /// How many locks it has.
    const HELD: &'static str;

    fn ready(&mut self) -> impl Future<Output = QueryResult<()>> + Send {
        async { Ok(()) }
    }

    fn try_number(&mut self, query: &str) -> impl Future<Output = QueryResult<i64>> + Send;

    fn change(&mut self, statement: &str) -> impl Future<Output = QueryResult<usize>> + Send;

    fn shared(lock: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self>;

    fn shared_managed(lock: ManagedLock<Self>) -> ManagedLock<Self>;
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

macro_rules! has_shared_locks {
    () => {
        fn shared(lock: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self> {
            lock.shared()
        }

        fn shared_managed(lock: ManagedLock<Self>) -> ManagedLock<Self> {
            lock.shared()
        }
    };
}

impl ProofConnection for AsyncPgConnection {
    const SESSION: &'static str = "SELECT pg_backend_pid()::bigint";
    const HELD: &'static str =
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    asks_by_diesel!();
    has_shared_locks!();
}

impl ProofConnection for AsyncMysqlConnection {
    const SESSION: &'static str = "SELECT CAST(CONNECTION_ID() AS SIGNED)";
    const HELD: &'static str = "SELECT CAST(RELEASE_ALL_LOCKS() AS SIGNED)";
    asks_by_diesel!();

    fn shared(_: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self> {
        unreachable!("BUG: no task is shared there")
    }

    fn shared_managed(_: ManagedLock<Self>) -> ManagedLock<Self> {
        unreachable!("BUG: no task is shared there")
    }
}

impl ProofConnection for SyncConnectionWrapper<SqliteConnection> {
    const SESSION: &'static str = "SELECT dlock_session()";
    const HELD: &'static str = "SELECT 0";
    asks_by_diesel!();
    has_shared_locks!();

    async fn ready(&mut self) -> QueryResult<()> {
        self.batch_execute("PRAGMA busy_timeout = 20000").await?;
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
    let session = conn.try_number(C::SESSION).await.map_err(set_up)?;
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
        if task.is_managed() {
            log.ask(&task, None);
            log.ended(&quietly(task.polls, managed(&locks, &task, &log)).await);
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
        match conn.try_number(C::HELD).await {
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
        log.ask(&task, Some((session, opened)));
        log.ended(&quietly(task.polls, on_connection(&mut conn, &task, &log)).await);
        if !PoolableConnection::is_broken(&mut conn) {
            pool.lock().expect("no panic").push((conn, session, opened));
        }
    }
}

/// Drops the future when it has been polled so often and is not done.
async fn quietly(
    polls: Option<u64>,
    work: impl Future<Output = Result<&'static str, Error>> + Send,
) -> Result<&'static str, Error> {
    let mut work = Box::pin(work);
    let mut left = polls;
    poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)));
        match (polled, &mut left) {
            (Ok(Poll::Ready(result)), _) => Poll::Ready(result),
            (Err(_), _) => Poll::Ready(Ok("panic")),
            (Ok(Poll::Pending), Some(0)) => Poll::Ready(Ok("dropped")),
            (Ok(Poll::Pending), left) => {
                if let Some(left) = left {
                    *left -= 1;
                }
                Poll::Pending
            }
        }
    })
    .await
}
