//! Threads, and a pool of sync connections.

pub(super) use std::thread::sleep as pause;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use diesel::connection::{SimpleConnection, TransactionManager};
use diesel::dsl::sql;
use diesel::sql_types::BigInt;
use diesel::{
    Connection, ConnectionError, MysqlConnection, PgConnection, QueryResult, RunQueryDsl,
    SqliteConnection, sql_query,
};
pub(super) use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, LockManager, ManagedLockGuard};
use dlock_diesel::{
    AdvisorySemaphore, AdvisoryXactLock, Error, LockConnection, ManagedLock, SqliteLocksExt,
};
pub(super) use dlock_sync_or_async::without_await as both;

use super::operations::{has_no_xact_locks, has_xact_locks, managed, on_connection, xact_acquired};
use crate::Kind;
use crate::proof::clock::now;
use crate::proof::random::Random;
use crate::proof::worker::Common;
use crate::proof::worker::log::Log;
use crate::proof::worker::server::*;
use crate::proof::worker::task::Task;

pub(super) trait ProofConnection: LockConnection + Send + 'static {
    const ASKS: &'static Asks;

    fn ready(&mut self) -> QueryResult<()> {
        Ok(())
    }

    fn try_number(&mut self, query: &str) -> QueryResult<i64>;

    fn change(&mut self, statement: &str) -> QueryResult<usize>;

    fn shared(lock: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self>;

    fn shared_managed(lock: ManagedLock<Self>) -> ManagedLock<Self>;

    fn xact_lock(&mut self, task: &Task) -> Result<bool, Error>;
}

macro_rules! asks_by_diesel {
    () => {
        fn try_number(&mut self, query: &str) -> QueryResult<i64> {
            sql::<BigInt>(query).get_result(self)
        }

        fn change(&mut self, statement: &str) -> QueryResult<usize> {
            sql_query(statement).execute(self)
        }
    };
}

impl ProofConnection for PgConnection {
    const ASKS: &'static Asks = &POSTGRES;
    asks_by_diesel!();
    has_shared_locks!();
    has_xact_locks!();
}

impl ProofConnection for MysqlConnection {
    const ASKS: &'static Asks = &MYSQL;
    asks_by_diesel!();

    has_no_shared_locks!();
    has_no_xact_locks!();
}

impl ProofConnection for SqliteConnection {
    const ASKS: &'static Asks = &SQLITE;
    asks_by_diesel!();
    has_shared_locks!();
    has_no_xact_locks!();

    fn ready(&mut self) -> QueryResult<()> {
        self.batch_execute("PRAGMA busy_timeout = 20000; PRAGMA synchronous = OFF")?;
        Ok(self.enable_advisory_locks()?)
    }
}

/// Nothing: a thread that waits cannot be dropped.
pub(super) struct NoCancel;

pub(super) fn cancellation<C>(_: &C, _: &Task) -> NoCancel {
    NoCancel
}

pub(super) fn with_cancel<C>(lock: AdvisoryLock<&mut C>, _: NoCancel) -> AdvisoryLock<&mut C> {
    lock
}

pub(super) fn semaphore_with_cancel<C>(
    lock: AdvisorySemaphore<&mut C>,
    _: NoCancel,
) -> AdvisorySemaphore<&mut C> {
    lock
}

pub(super) fn xact_with_cancel<C>(
    lock: AdvisoryXactLock<'_, C>,
    _: NoCancel,
) -> AdvisoryXactLock<'_, C> {
    lock
}

pub(super) fn in_transaction<C: Connection, T>(
    conn: &mut C,
    body: impl FnOnce(&mut C) -> Result<T, Error>,
) -> Result<T, Error> {
    conn.transaction(body)
}

fn connect<C: ProofConnection>(url: &str) -> Result<(C, i64, u64), ConnectionError> {
    let opened = now();
    let mut conn = C::establish(url)?;
    let ready = conn.ready().and_then(|()| conn.try_number(C::ASKS.session));
    let session = ready.map_err(ConnectionError::CouldntSetupConfiguration)?;
    Ok((conn, session, opened))
}

/// Hands connections on as r2d2 does: those that are not marked broken, and answer.
type Pool<C> = Mutex<Vec<(C, i64, u64)>>;

pub(crate) fn run(common: &Arc<Common>) {
    match common.kind {
        Kind::Postgres => run_on::<PgConnection>(common),
        Kind::Mysql => run_on::<MysqlConnection>(common),
        Kind::Sqlite => run_on::<SqliteConnection>(common),
    }
}

fn run_on<C: ProofConnection>(common: &Arc<Common>) {
    let options = &common.options;
    let pool: Pool<C> = Mutex::default();
    let locks = LockManager::builder({
        let (url, name, writer) = (
            options.url.clone(),
            options.name.clone(),
            common.writer.clone(),
        );
        move || {
            let (conn, session, opened) = connect::<C>(&url)?;
            writer.write(
                &format!("{name}.m"),
                format_args!("opened session={session} from={opened}"),
            );
            Ok::<_, ConnectionError>(conn)
        }
    });
    let locks = locks.connections(3).lease(options.lease()).build();
    thread::scope(|scope| {
        for number in 0..options.actors {
            let (pool, locks) = (&pool, &locks);
            scope.spawn(move || act(common, number, pool, locks));
        }
    });
    locks.close();
}

fn act<C: ProofConnection>(common: &Common, number: u32, pool: &Pool<C>, locks: &LockManager<C>) {
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
        let task = Task::draw(common, &mut random);
        if !task.has_connection() {
            log.ask(&task, None);
            log.ended(&quietly(|| managed(locks, None, &task, &log)));
            continue;
        }
        let free = pool.lock().expect("no panic").pop();
        let pooled = match free {
            Some(pooled) => Ok(pooled),
            None => connect(&options.url),
        };
        let Ok((mut conn, session, opened)) = pooled else {
            pause(Duration::from_millis(50));
            continue;
        };
        match conn.try_number(C::ASKS.held) {
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
            log.ended(&quietly(|| managed(locks, Some(&mut conn), &task, &log)));
        } else {
            log.ask(&task, Some((session, opened)));
            log.ended(&quietly(|| on_connection(&mut conn, &task, &log)));
        }
        if !C::TransactionManager::is_broken_transaction_manager(&mut conn) {
            pool.lock().expect("no panic").push((conn, session, opened));
        }
    }
}

fn quietly(work: impl FnOnce() -> Result<&'static str, Error>) -> Result<&'static str, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Ok("panic"))
}
