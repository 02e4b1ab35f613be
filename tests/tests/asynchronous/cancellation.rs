//! Every future can be dropped at any point: no lock stays behind, nobody in the queue takes it later, and no connection
//! is handed to the next user out of step.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::{pending, poll_fn};
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use bb8::{ManageConnection, Pool};
use diesel::IntoSql;
use diesel::connection::InstrumentationEvent;
use diesel::sql_types::BigInt;
use diesel_async::pooled_connection::AsyncDieselConnectionManager;
use diesel_async::{
    AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, SimpleAsyncConnection,
    TransactionManager,
};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, AdvisoryLockGuard, Error, LockKey};
use dlock_tests::{
    AsyncTestConnection, Kind, Proxy, Server, TestConnection, number_from_environment,
    on_every_network_server_async, on_mysql_async, on_postgres_async, unique_key, wait_for,
    wait_for_within,
};
use tokio::sync::Semaphore;
use tokio::task::coop;

use crate::support::*;

/// Until another connection has the lock, where the connection that was dropped on is still open. What frees the lock
/// has been sent by then, so this is the slowness of a busy machine and not of the protocol.
pub(super) const FREE_IN_STEP: Duration = Duration::from_secs(3);

/// Until another connection has the lock, or the place in the queue is empty, once the connection is closed. On
/// PostgreSQL the first turn of a wait has to end, which is less than 2 s; MySQL and MariaDB look after a waiting client
/// each second. The rest is for a busy machine.
pub(super) fn free_once_closed(kind: Kind) -> Duration {
    match kind {
        Kind::Postgres => Duration::from_secs(3),
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => Duration::from_secs(3),
    }
}

/// The same for PostgreSQL's later turns, in which the server looks after its waiting client each 200 ms.
const SOON_ONCE_CLOSED: Duration = Duration::from_millis(1500);

/// The drops of [`many_drops_leave_no_lock_and_no_connection_out_of_step`] on each server, unless `DLOCK_DROPS` says how
/// many: the second part of `.ci/run` says 10,000.
const DROPS: usize = 2_500;

/// Those of [`a_cancel_at_the_moment_of_the_grant_leaves_no_lock`].
const CANCELS: usize = 500;

/// Threads that drop at the same time, each with a lock of its own.
const WORKERS: usize = 4;

/// A future of the crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    Acquire,
    TryAcquire,
    /// With a limit that may pass.
    Timeout,
    PollEvery,
    Run,
    Transaction,
    /// At an isolation level at which the session's lock is handed over to the transaction.
    RepeatableRead,
    /// In a transaction that is open.
    Nested,
    TransactionLock,
    InsideTransaction,
    Release,
    IsHeld,
    Holders,
    Token,
    /// Of the lock and two more.
    Several,
    SeveralTransaction,
    SeveralRelease,
    /// Of a semaphore with one permit.
    Slot,
    SlotRelease,
}

impl Call {
    const ON_POSTGRES: &[Call] = &[
        Call::Acquire,
        Call::TryAcquire,
        Call::Timeout,
        Call::PollEvery,
        Call::Run,
        Call::Transaction,
        Call::RepeatableRead,
        Call::Nested,
        Call::TransactionLock,
        Call::InsideTransaction,
        Call::Release,
        Call::IsHeld,
        Call::Holders,
        Call::Token,
        Call::Several,
        Call::SeveralTransaction,
        Call::SeveralRelease,
        Call::Slot,
        Call::SlotRelease,
    ];

    const ON_MYSQL: &[Call] = &[
        Call::Acquire,
        Call::TryAcquire,
        Call::Timeout,
        Call::PollEvery,
        Call::Run,
        Call::Transaction,
        Call::InsideTransaction,
        Call::Release,
        Call::IsHeld,
        Call::Holders,
        Call::Token,
        Call::Several,
        Call::SeveralTransaction,
        Call::SeveralRelease,
        Call::Slot,
        Call::SlotRelease,
    ];

    /// It is made in a transaction that is open.
    fn in_transaction(self) -> bool {
        matches!(
            self,
            Call::Nested | Call::TransactionLock | Call::InsideTransaction
        )
    }

    /// It can wait for the lock in the server's queue.
    fn queues(self) -> bool {
        self.asks() && !matches!(self, Call::TryAcquire | Call::PollEvery | Call::Slot)
    }

    /// It can wait for as long as one likes, and be given what cancels it.
    fn can_be_cancelled(self) -> bool {
        let others = matches!(
            self,
            Call::Timeout | Call::TransactionLock | Call::Several | Call::SeveralTransaction
        );
        self.queues() && !others
    }

    /// It asks for the lock.
    fn asks(self) -> bool {
        !matches!(
            self,
            Call::Release
                | Call::IsHeld
                | Call::Holders
                | Call::Token
                | Call::SeveralRelease
                | Call::SlotRelease
        )
    }

    /// The lock that it is about, or one of them.
    fn lock(self, key: &str) -> LockKey {
        match self {
            Call::Slot | Call::SlotRelease => LockKey::from(key).semaphore_lock(Some(0)),
            _ => key.into(),
        }
    }
}

/// What is at the server when a future is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Nothing: not yet, or the sleep between two polls.
    Nothing,
    /// The statement that tries to take the lock and waits where it must.
    Asking,
    /// The same, and the server has shown that the session is in the queue.
    Waiting,
    /// The wait of a turn after the first, on PostgreSQL.
    LaterTurn,
    /// BEGIN. On PostgreSQL at READ COMMITTED it asks for the lock as well.
    Beginning,
    Working,
    Ending,
    Releasing,
    Questioning,
    Other,
}

impl Phase {
    /// What a statement of the crates is for, with its binds behind it.
    fn of(sql: &str) -> Self {
        let has = |part: &str| sql.contains(part);
        // One text tries and releases, as a bind has it.
        let first_binds = sql
            .split_once("binds: [")
            .map(|(_, binds)| binds.split(", ").collect::<Vec<_>>());
        let releases = match first_binds.as_deref() {
            Some(["0", ..]) => has("pg_try_advisory"),
            Some([_, "1", ..]) => has("GET_LOCK"),
            _ => false,
        };
        if releases {
            Phase::Releasing
        } else if has("DO $dlock$") {
            Phase::LaterTurn
        } else if has("pg_locks") || has("IS_USED_LOCK") || has("metadata_locks") {
            Phase::Questioning
        } else if sql.starts_with("BEGIN")
            || sql.starts_with("ROLLBACK; BEGIN")
            || sql.starts_with("SAVEPOINT diesel")
        {
            Phase::Beginning
        } else if has("pg_try_advisory") || has("pg_advisory_xact_lock") || has("GET_LOCK") {
            Phase::Asking
        } else if has("advisory_unlock") || has("RELEASE_LOCK") {
            Phase::Releasing
        } else if sql.starts_with("COMMIT")
            || sql.starts_with("ROLLBACK")
            || has("RELEASE SAVEPOINT")
        {
            Phase::Ending
        } else if sql.starts_with(WORK) || sql.starts_with("INSERT") {
            Phase::Working
        } else {
            Phase::Other
        }
    }
}

/// What [`Call::Run`] and the transactions do under the lock.
const WORK: &str = "SELECT 'work'";

/// Sees what a connection sends, and knows what is at the server: the statement now, and the last one.
#[derive(Clone, Debug)]
pub(super) struct Watch(Arc<Mutex<(Phase, Phase)>>);

impl Watch {
    pub(super) fn new<C: AsyncConnection>(conn: &mut C) -> Self {
        let phases = Arc::new(Mutex::new((Phase::Nothing, Phase::Nothing)));
        let seen = Arc::clone(&phases);
        conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
            let (now, last) = &mut *seen.lock().expect("not poisoned");
            match event {
                InstrumentationEvent::StartQuery { query, .. } => {
                    *now = Phase::of(&query.to_string())
                }
                InstrumentationEvent::FinishQuery { .. } => {
                    *last = std::mem::replace(now, Phase::Nothing)
                }
                _ => {}
            }
        });
        Self(phases)
    }

    pub(super) fn phase(&self) -> Phase {
        self.0.lock().expect("not poisoned").0
    }

    /// A message whose answer nobody reads has no end.
    fn forget(&self) {
        *self.0.lock().expect("not poisoned") = (Phase::Nothing, Phase::Nothing);
    }

    /// Nothing is at the server since such a statement was done.
    fn hangs_after(&self, phase: Phase) -> bool {
        *self.0.lock().expect("not poisoned") == (Phase::Nothing, phase)
    }
}

/// Runs `future` until it is done or `stop` is; then it is dropped.
pub(super) async fn dropped<F: Future>(
    future: F,
    stop: impl Future<Output = ()>,
) -> Option<F::Output> {
    tokio::select! {
        biased;
        output = future => Some(output),
        () = stop => None,
    }
}

/// Precise to microseconds, which the runtime's timer is not. Blocks the thread.
async fn precisely(delay: Duration) {
    const SHORT: Duration = Duration::from_micros(50);
    let begin = Instant::now();
    poll_fn(|cx| {
        let left = delay.saturating_sub(begin.elapsed());
        if left.is_zero() {
            return Poll::Ready(());
        }
        if left > 4 * SHORT {
            thread::sleep(SHORT);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Ready after being polled as often: [`dropped`] polls it once after each poll of the future that is not done.
async fn polls(mut times: u32) {
    poll_fn(|_| match times.checked_sub(1) {
        None => Poll::Ready(()),
        Some(left) => {
            times = left;
            Poll::Pending
        }
    })
    .await;
}

/// Ready when the server shows it.
pub(super) async fn until(mut shown: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !shown() {
        assert!(
            begin.elapsed() < dlock_tests::PATIENCE,
            "the server does not show it"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A connection that makes every [`Call`].
pub(super) trait CancelTest: LockTest {
    const CALLS: &'static [Call];

    /// For pools: diesel-async's needs to know more of the connection.
    type Manager: ManageConnection<Connection = Self, Error: fmt::Debug>;

    fn manager(url: &str) -> Self::Manager;

    /// Makes the call, and drops its future when `stop` is ready: then there is no result.
    async fn call(
        &mut self,
        call: Call,
        key: &str,
        cancel: bool,
        stop: impl Future<Output = ()>,
    ) -> Option<Result<(), Error>>;

    /// [`Call::TransactionLock`].
    async fn transaction_lock(
        &mut self,
        key: &str,
        stop: impl Future<Output = ()>,
    ) -> Option<Result<(), Error>>;

    /// [`Call::Transaction`] with other work, that may hang when it is done.
    async fn transaction_with(
        &mut self,
        key: &str,
        cancel: bool,
        work: &str,
        hang: bool,
        stop: impl Future<Output = ()>,
    ) -> Option<Result<(), Error>>;

    /// The number, by way of the server.
    async fn echo(&mut self, number: i64) -> i64;
}

macro_rules! cancel_test {
    ($Conn:ty, $calls:expr, $($transaction_lock:tt)*) => {
        impl CancelTest for $Conn {
            const CALLS: &'static [Call] = $calls;

            type Manager = AsyncDieselConnectionManager<$Conn>;

            fn manager(url: &str) -> Self::Manager {
                AsyncDieselConnectionManager::new(url)
            }

            async fn call(
                &mut self,
                call: Call,
                key: &str,
                cancel: bool,
                stop: impl Future<Output = ()>,
            ) -> Option<Result<(), Error>> {
                let mut lock = lock(self, key, cancel);
                match call {
                    Call::Acquire => release(dropped(lock.acquire(), stop).await?).await,
                    Call::TryAcquire => match dropped(lock.try_acquire(), stop).await? {
                        Ok(Some(guard)) => release(Ok(guard)).await,
                        result => Some(result.map(drop)),
                    },
                    Call::Timeout => {
                        let lock = lock.timeout(Duration::from_millis(3));
                        release(dropped(lock.acquire(), stop).await?).await
                    }
                    Call::PollEvery => {
                        let lock = lock.poll_every(Duration::from_millis(1));
                        release(dropped(lock.acquire(), stop).await?).await
                    }
                    Call::InsideTransaction => {
                        let lock = lock.inside_transaction();
                        release(dropped(lock.acquire(), stop).await?).await
                    }
                    Call::Run => {
                        let work = async |conn: &mut $Conn| -> Result<(), Error> {
                            Ok(conn.batch_execute(WORK).await?)
                        };
                        dropped(lock.run(work), stop).await
                    }
                    Call::Transaction | Call::RepeatableRead | Call::Nested => {
                        drop(lock);
                        self.transaction_with(key, cancel, WORK, false, stop).await
                    }
                    Call::Release => {
                        let guard = lock.acquire().await.expect("the lock is free");
                        Some(dropped(guard.release(), stop).await?.map(drop))
                    }
                    Call::IsHeld => {
                        let mut guard = lock.acquire().await.expect("the lock is free");
                        let answer = dropped(guard.is_held(), stop).await;
                        leave(guard, answer.is_some()).await;
                        answer.map(|answer| {
                            assert!(answer?, "it is held");
                            Ok(())
                        })
                    }
                    Call::Holders => Some(dropped(lock.holders(), stop).await?.map(drop)),
                    Call::TransactionLock => {
                        drop(lock);
                        self.transaction_lock(key, stop).await
                    }
                    Call::Token => {
                        let mut guard = lock.acquire().await.expect("the lock is free");
                        let token = dropped(guard.fencing_token(), stop).await;
                        leave(guard, token.is_some()).await;
                        token.map(|token| token.map(drop))
                    }
                    Call::Several => {
                        drop(lock);
                        release(dropped(several(self, key).acquire(), stop).await?).await
                    }
                    Call::SeveralTransaction => {
                        drop(lock);
                        let work = async |conn: &mut $Conn| -> Result<(), Error> {
                            Ok(conn.batch_execute(WORK).await?)
                        };
                        dropped(several(self, key).transaction(work), stop).await
                    }
                    Call::SeveralRelease => {
                        drop(lock);
                        let guard = several(self, key).acquire().await.expect("they are free");
                        Some(dropped(guard.release(), stop).await?.map(drop))
                    }
                    Call::Slot => {
                        drop(lock);
                        let inside = self.advisory_semaphore(key, 1).acquire();
                        match dropped(inside, stop).await? {
                            Ok(inside) => Some(inside.release().await.map(drop)),
                            Err(error) => Some(Err(error)),
                        }
                    }
                    Call::SlotRelease => {
                        drop(lock);
                        let inside = self.advisory_semaphore(key, 1).acquire().await;
                        let inside = inside.expect("the slot is free");
                        Some(dropped(inside.release(), stop).await?.map(drop))
                    }
                }
            }

            $($transaction_lock)*

            async fn transaction_with(
                &mut self,
                key: &str,
                cancel: bool,
                work: &str,
                hang: bool,
                stop: impl Future<Output = ()>,
            ) -> Option<Result<(), Error>> {
                let work = work.to_owned();
                let work = async move |conn: &mut $Conn| -> Result<(), Error> {
                    conn.batch_execute(&work).await?;
                    if hang {
                        pending::<()>().await;
                    }
                    Ok(())
                };
                dropped(lock(self, key, cancel).transaction(work), stop).await
            }

            async fn echo(&mut self, number: i64) -> i64 {
                // Not imported, for it has a `load` for everything, atomics included.
                diesel_async::RunQueryDsl::get_result(diesel::select(number.into_sql::<BigInt>()), self)
                    .await
                    .expect("an answer")
            }
        }
    };
}

cancel_test! { AsyncPgConnection, Call::ON_POSTGRES,
    async fn transaction_lock(&mut self, key: &str, stop: impl Future<Output = ()>) -> Option<Result<(), Error>> {
        dropped(self.advisory_xact_lock(key).acquire(), stop).await
    }
}

cancel_test! { AsyncMysqlConnection, Call::ON_MYSQL,
    async fn transaction_lock(&mut self, _: &str, _: impl Future<Output = ()>) -> Option<Result<(), Error>> {
        unreachable!("transactions hold no locks")
    }
}

pub(super) fn lock<'c, C: AsyncTestConnection>(
    conn: &'c mut C,
    key: &str,
    cancel: bool,
) -> AdvisoryLock<&'c mut C> {
    let cancellation = cancel.then(|| conn.cancellation());
    let lock = conn.advisory_lock(key);
    match cancellation {
        Some(cancellation) => lock.cancel_with(cancellation),
        None => lock,
    }
}

/// That lock and two more.
fn several<'c, C: AsyncTestConnection>(conn: &'c mut C, key: &str) -> AdvisoryLock<&'c mut C> {
    conn.advisory_locks([key.to_owned(), format!("{key}/a"), format!("{key}/b")])
}

async fn release<C: AsyncTestConnection>(
    acquired: Result<AdvisoryLockGuard<&mut C>, Error>,
) -> Option<Result<(), Error>> {
    match acquired {
        Ok(guard) => Some(guard.release().await.map(drop)),
        Err(error) => Some(Err(error)),
    }
}

/// After a question under a guard: where the answer was not read, only PostgreSQL's connection can still release.
async fn leave<C: AsyncTestConnection>(guard: AdvisoryLockGuard<&mut C>, answered: bool) {
    if answered || C::KIND == Kind::Postgres {
        guard.release().await.expect("held");
    }
}

/// Whether the transaction that is open can go on.
fn is_transaction_broken<C: AsyncConnection>(conn: &mut C) -> bool {
    let status = C::TransactionManager::transaction_manager_status_mut(conn);
    status.transaction_depth().is_err()
}

/// Another session, which holds the lock and takes it, in plain SQL.
struct Other<C> {
    conn: C,
    literal: String,
}

impl<C: AsyncTestConnection> Other<C> {
    async fn open(server: &Server, key: &str) -> Self {
        let mut conn = C::open(server).await;
        if C::KIND == Kind::Postgres {
            conn.execute_sql("SET lock_timeout = '5s'").await;
        }
        Self {
            conn,
            literal: literal(C::KIND, &key.into()),
        }
    }

    /// From now on it takes another lock.
    fn aim(&mut self, lock: &LockKey) {
        self.literal = literal(C::KIND, lock);
    }

    async fn lock(&mut self) {
        let literal = &self.literal;
        match C::KIND {
            Kind::Postgres => {
                let sql = format!("SELECT pg_advisory_lock({literal})");
                self.conn.execute_sql(&sql).await;
            }
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => {
                let sql = format!("SELECT GET_LOCK({literal}, 5)");
                assert_eq!(self.conn.number(&sql).await, Some(1), "the lock is free");
            }
        }
    }

    async fn unlock(&mut self) {
        let literal = &self.literal;
        let sql = match C::KIND {
            Kind::Postgres => format!("SELECT pg_advisory_unlock({literal})"),
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => format!("DO RELEASE_LOCK({literal})"),
        };
        self.conn.execute_sql(&sql).await;
    }

    /// How long it takes until this session has had the lock; it gives up in the end.
    async fn wait(&mut self) -> Duration {
        let begin = Instant::now();
        let literal = &self.literal;
        match C::KIND {
            Kind::Postgres => {
                let sql = format!(
                    "SELECT pg_advisory_lock({literal}); SELECT pg_advisory_unlock({literal})"
                );
                let _ = self.conn.batch_execute(&sql).await;
            }
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => {
                let sql =
                    format!("SELECT IF(GET_LOCK({literal}, 5) = 1, RELEASE_LOCK({literal}), NULL)");
                self.conn.number(&sql).await;
            }
        }
        begin.elapsed()
    }
}

/// A connection that futures are dropped on, and what is known of it.
struct Subject<C> {
    conn: C,
    id: i64,
    watch: Watch,
}

impl<C: CancelTest> Subject<C> {
    async fn open(server: &Server) -> Self {
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        let watch = Watch::new(&mut conn);
        Self { conn, id, watch }
    }
}

/// Distinct numbers, the same ones in every run.
struct Numbers(u64);

impl Numbers {
    /// One below `end`.
    fn below(&mut self, end: u64) -> u64 {
        // Knuth's MMIX.
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % end.max(1)
    }

    fn duration_below(&mut self, end: Duration) -> Duration {
        Duration::from_nanos(self.below(end.as_nanos() as u64))
    }
}

/// Who has the lock while it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scene {
    /// Nobody.
    Free,
    /// Another connection, which releases it after a while.
    Taken,
    /// The same, and the drop comes when the server shows that the session is in the queue.
    Queue,
    /// The same, and the drop is aimed at the moment of the grant.
    Grant,
}

/// What became of the drops on one server.
#[derive(Default)]
struct Tally {
    phases: BTreeMap<(Scene, Phase), usize>,
    /// The other connection had released the lock, so that it was granted to the future that was dropped.
    after_release: usize,
    done: usize,
    in_step: usize,
    broken: usize,
    /// Calls whose lock was held until the connection was closed, and what was dropped.
    kept: Vec<(Call, Phase)>,
    longest_in_step: Duration,
    longest_closed: Duration,
}

impl Tally {
    fn add(&mut self, more: Tally) {
        for (phase, count) in more.phases {
            *self.phases.entry(phase).or_default() += count;
        }
        self.after_release += more.after_release;
        self.done += more.done;
        self.in_step += more.in_step;
        self.broken += more.broken;
        self.kept.extend(more.kept);
        self.longest_in_step = self.longest_in_step.max(more.longest_in_step);
        self.longest_closed = self.longest_closed.max(more.longest_closed);
    }
}

impl Tally {
    /// A moment at which too few drops came: they would prove nothing of it.
    fn missed(&self, cancelling: bool) -> Option<String> {
        use Phase::{Asking, Beginning, Ending, Questioning, Releasing, Waiting, Working};
        let everywhere = [
            (Scene::Free, Asking),
            (Scene::Free, Beginning),
            (Scene::Free, Working),
            (Scene::Free, Ending),
            (Scene::Free, Releasing),
            (Scene::Free, Questioning),
            (Scene::Taken, Asking),
            (Scene::Queue, Waiting),
            (Scene::Grant, Asking),
        ];
        let moments = match cancelling {
            true => &everywhere[8..],
            false => &everywhere[..],
        };
        for moment in moments {
            let hits = self.phases.get(moment).copied().unwrap_or_default();
            if hits < 5 {
                return Some(format!("{moment:?} was hit {hits} times only"));
            }
        }
        let hits = self.after_release;
        (hits < 20).then(|| format!("the grant was hit {hits} times only"))
    }

    fn assert_hit(&self, cancelling: bool) {
        assert_eq!(self.missed(cancelling), None);
        let hits = self.after_release;
        let known = self.kept.iter().all(|kept| match kept {
            (Call::RepeatableRead, _) => true,
            // The cancel has hit the unlock, which is not sent twice.
            (Call::Run, phase) => matches!(phase, Phase::Working | Phase::Releasing),
            _ => false,
        });
        assert!(
            known && self.kept.len() * 10 <= hits,
            "kept by {:?}",
            self.kept
        );
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for scene in [Scene::Free, Scene::Taken, Scene::Queue, Scene::Grant] {
            write!(f, "{scene:?}:")?;
            for ((_, phase), count) in self
                .phases
                .range((scene, Phase::Nothing)..=(scene, Phase::Other))
            {
                write!(f, " {count} {phase:?}")?;
            }
            f.write_str("; ")?;
        }
        write!(
            f,
            "{} right after the release; {} in step (free in {:.1?}), {} broken (free in {:.1?}), {:?} kept until closed; {} done before the drop",
            self.after_release,
            self.in_step,
            self.longest_in_step,
            self.broken,
            self.longest_closed,
            self.kept,
            self.done,
        )
    }
}

/// Measures how long it lives.
struct Clock<'t> {
    begin: Instant,
    took: &'t Cell<Duration>,
}

impl Drop for Clock<'_> {
    fn drop(&mut self) {
        self.took.set(self.begin.elapsed());
    }
}

/// A round: what is called, and when.
#[derive(Debug)]
struct Round {
    call: Call,
    scene: Scene,
    cancel: bool,
    /// When the other connection releases the lock.
    hold: Duration,
    /// When the future is dropped.
    delay: Duration,
    /// Or after that many polls.
    polls: Option<u32>,
}

/// Two connections and a lock of their own.
struct Worker<C: AsyncTestConnection> {
    server: &'static Server,
    key: String,
    subject: Option<Subject<C>>,
    other: Other<C>,
    /// Looks at the queue.
    observer: C::Observer,
    numbers: Numbers,
    /// Drops at the moment of the grant only, and cancels each time.
    cancelling: bool,
    rounds: usize,
    /// How long a call takes; with [`Scene::Grant`], after the release.
    lives: BTreeMap<(Call, Scene), Duration>,
    tally: Tally,
}

impl<C: CancelTest> Worker<C> {
    async fn start(server: &'static Server, number: usize, cancelling: bool) -> Self {
        let key = unique_key("dropped");
        Self {
            server,
            other: Other::open(server, &key).await,
            observer: C::observer(server),
            subject: None,
            key,
            numbers: Numbers(number as u64),
            cancelling,
            rounds: number,
            lives: BTreeMap::new(),
            tally: Tally::default(),
        }
    }

    fn plan(&mut self) -> Round {
        let calls: Vec<Call> = C::CALLS
            .iter()
            .copied()
            .filter(|call| call.can_be_cancelled() || !self.cancelling)
            .collect();
        let call = calls[self.rounds % calls.len()];
        let scene = match (self.rounds / calls.len()) % 4 {
            _ if self.cancelling => Scene::Grant,
            _ if !call.asks() => Scene::Free,
            0 => Scene::Free,
            1 if call.queues() && self.numbers.below(4) == 0 => Scene::Queue,
            1 => Scene::Taken,
            _ => Scene::Grant,
        };
        self.rounds += 1;
        let life = *self
            .lives
            .entry((call, scene))
            .or_insert(Duration::from_micros(500));
        let (hold, delay) = match scene {
            Scene::Free => (Duration::ZERO, self.numbers.duration_below(life)),
            Scene::Taken => {
                let hold = self.numbers.duration_below(Duration::from_millis(3));
                (hold, self.numbers.duration_below(life))
            }
            // Long enough to be seen in the queue.
            Scene::Queue => (Duration::from_millis(10), Duration::ZERO),
            // Jittered by a fifth of a millisecond.
            Scene::Grant => {
                let hold = Duration::from_millis(2);
                (
                    hold,
                    hold + life + self.numbers.duration_below(Duration::from_micros(200)),
                )
            }
        };
        Round {
            call,
            scene,
            cancel: call.can_be_cancelled() && (self.cancelling || self.numbers.below(20) == 0),
            hold,
            delay,
            polls: (scene == Scene::Free && self.numbers.below(5) == 0)
                .then(|| self.numbers.below(12) as u32),
        }
    }

    /// Learns how long calls take, so that few are done before they would have been dropped; aimed at the grant,
    /// one in four.
    fn learn(&mut self, round: &Round, done: Option<Duration>) {
        const LONGEST: Duration = Duration::from_millis(20);
        let life = self.lives.entry((round.call, round.scene)).or_default();
        *life = match (round.scene, done) {
            (Scene::Grant, Some(_)) => *life * 3 / 4,
            (Scene::Grant, None) => (*life * 12 / 11).min(LONGEST),
            (_, Some(took)) => (*life * 3 + took.min(LONGEST)) / 4,
            (_, None) => *life,
        };
    }

    /// Makes a call and drops it, unless it is done before, and looks at what it has left. Whether it was dropped.
    async fn round(&mut self) -> bool {
        let round = self.plan();
        self.other.aim(&round.call.lock(&self.key));
        let mut subject = match self.subject.take() {
            Some(subject) => subject,
            None => Subject::open(self.server).await,
        };
        before(&mut subject.conn, round.call).await;
        if round.scene != Scene::Free {
            self.other.lock().await;
        }

        let (mut stopped, mut released) = (None, None);
        let took = Cell::new(Duration::ZERO);
        let watch = subject.watch.clone();
        watch.forget();
        let (observer, id) = (&mut self.observer, subject.id);
        let stop = async {
            let _clock = Clock {
                begin: Instant::now(),
                took: &took,
            };
            let phase = match (round.scene, round.polls) {
                (Scene::Queue, _) => {
                    while !observer.is_waiting(id) {
                        yield_now().await;
                    }
                    Phase::Waiting
                }
                (_, Some(times)) => {
                    polls(times).await;
                    watch.phase()
                }
                (_, None) => {
                    precisely(round.delay).await;
                    watch.phase()
                }
            };
            stopped = Some((Instant::now(), phase));
        };
        let call = subject.conn.call(round.call, &self.key, round.cancel, stop);
        let release = async {
            if round.scene != Scene::Free {
                precisely(round.hold).await;
                self.other.unlock().await;
                released = Some(Instant::now());
            }
        };
        let (result, ()) = tokio::join!(call, release);

        match (result, stopped) {
            (None, Some((at, phase))) => {
                self.learn(&round, None);
                *self.tally.phases.entry((round.scene, phase)).or_default() += 1;
                self.tally.after_release +=
                    usize::from(released.is_some_and(|released| released <= at));
            }
            (Some(Ok(()) | Err(Error::Timeout { .. })), _) => {
                self.learn(&round, Some(took.get()));
                self.tally.done += 1;
                stopped = None;
            }
            (result, _) => panic!("{result:?} in {round:?}"),
        }
        self.look(subject, &round, stopped.map(|(_, phase)| phase))
            .await;
        stopped.is_some()
    }

    /// Another connection gets the lock in time, and this one is clean or counts as broken.
    async fn look(&mut self, mut subject: Subject<C>, round: &Round, phase: Option<Phase>) {
        let call = round.call;
        let what = || format!("dropped in {phase:?}: {round:?}");
        let broken = match call {
            // A savepoint is not undone when it is dropped.
            Call::Nested if phase.is_some() => true,
            _ if call.in_transaction() => is_transaction_broken(&mut subject.conn),
            _ => is_broken(&mut subject.conn),
        };
        let count = usize::from(phase.is_some());
        if broken {
            self.tally.broken += count;
        } else {
            self.tally.in_step += count;
            if call.in_transaction() {
                roll_back(&mut subject.conn).await;
            }
        }

        // PostgreSQL's connection stays in step even if it counts as broken. To open one takes longer than all the rest,
        // so one in sixteen is closed and the others go on.
        let mut close = broken && (C::KIND == Kind::Mysql || self.numbers.below(16) == 0);
        // A cancel may hit the next statement.
        close |= broken && round.cancel && !self.cancelling;
        if close {
            drop(subject);
            let wait = self.other.wait().await;
            self.tally.longest_closed = self.tally.longest_closed.max(wait);
            assert!(
                wait <= free_once_closed(C::KIND),
                "free after {wait:?}, {}",
                what()
            );
            return;
        }
        if broken && call.in_transaction() {
            // The first one may be hit by a cancel.
            if subject.conn.batch_execute("ROLLBACK").await.is_err() {
                subject.conn.execute_sql("ROLLBACK").await;
            }
        }
        let wait = self.other.wait().await;
        if let Some(phase) = phase.filter(|_| broken && self.cancelling && wait > FREE_IN_STEP) {
            // The cancel came between the transaction that takes the session's lock and the one that takes it over, or
            // hit the unlock.
            self.tally.kept.push((call, phase));
            drop(subject);
            let wait = self.other.wait().await;
            assert!(
                wait <= FREE_IN_STEP,
                "free after {wait:?} once closed, {}",
                what()
            );
            return;
        }
        self.tally.longest_in_step = self.tally.longest_in_step.max(wait);
        assert!(wait <= FREE_IN_STEP, "free after {wait:?}, {}", what());
        if broken && round.cancel {
            return;
        }
        for n in 0..3 {
            let number = (self.rounds * 10 + n) as i64;
            assert_eq!(
                subject.conn.echo(number).await,
                number,
                "out of step, {}",
                what()
            );
        }
        let holds = match C::KIND {
            Kind::Postgres => {
                let sql = format!(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {}",
                    subject.id
                );
                self.other.conn.number(&sql).await
            }
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => {
                let sql = "SELECT CAST(RELEASE_ALL_LOCKS() AS SIGNED)";
                subject.conn.number(sql).await
            }
        };
        assert_eq!(holds, Some(0), "locks of the session, {}", what());

        if broken {
            let status = C::TransactionManager::transaction_manager_status_mut(&mut subject.conn);
            *status = Default::default();
            // Diesel itself was dropped in BEGIN or COMMIT.
            if is_broken(&mut subject.conn) {
                return;
            }
        }
        if call == Call::RepeatableRead {
            isolate(&mut subject.conn, "READ COMMITTED").await;
        }
        self.subject = Some(subject);
    }
}

async fn before<C: CancelTest>(conn: &mut C, call: Call) {
    if call.in_transaction() {
        begin(conn).await;
    }
    if call == Call::RepeatableRead {
        isolate(conn, "REPEATABLE READ").await;
    }
}

async fn isolate<C: AsyncTestConnection>(conn: &mut C, level: &str) {
    conn.execute_sql(&format!(
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}"
    ))
    .await;
}

/// Drops futures until there are enough, and on a slow machine more: until each moment was hit.
fn drop_again_and_again<C: CancelTest>(server: &'static Server, enough: usize, cancelling: bool) {
    let begin = Instant::now();
    let drops = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    let runtime = tokio::runtime::Handle::current();
    let work = async |number| {
        let mut worker = Worker::<C>::start(server, number, cancelling).await;
        loop {
            let dropped = usize::from(worker.round().await);
            let drops = drops.fetch_add(dropped, Ordering::SeqCst) + dropped;
            let mut tally = tally.lock().expect("not poisoned");
            tally.add(std::mem::take(&mut worker.tally));
            if drops >= enough && (drops >= 3 * enough || tally.missed(cancelling).is_none()) {
                return;
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| {
                scope.spawn({
                    let (work, runtime) = (&work, &runtime);
                    move || runtime.block_on(work(number))
                })
            })
            .collect();
        for worker in workers {
            if let Err(payload) = worker.join() {
                // The other workers end.
                drops.store(3 * enough, Ordering::SeqCst);
                resume_unwind(payload);
            }
        }
    });
    let (drops, tally) = (
        drops.into_inner(),
        tally.into_inner().expect("not poisoned"),
    );
    eprintln!(
        "{}: {drops} drops in {:.1?}. {tally}",
        server.name,
        begin.elapsed()
    );
    tally.assert_hit(cancelling);
}

on_every_network_server_async! {
    async fn many_drops_leave_no_lock_and_no_connection_out_of_step<C: CancelTest>(server: &'static Server) {
        let enough = number_from_environment("DLOCK_DROPS").unwrap_or(DROPS);
        drop_again_and_again::<C>(server, enough, false);
    }
}

on_postgres_async! {
    /// The cancel may come when the wait is over, and must not keep what was sent behind it from releasing the lock.
    /// Only at REPEATABLE READ, and in `run` when it works or releases, the lock may be held until the connection is
    /// closed.
    async fn a_cancel_at_the_moment_of_the_grant_leaves_no_lock(server: &'static Server) {
        drop_again_and_again::<AsyncPgConnection>(server, CANCELS, true);
    }
}

/// Ready when the connection has sent a statement for this and waits for the answer. Polled after the future that is to
/// be dropped, which moves the phase; if the answer is there before the poll ends, the phase is over unseen.
async fn reached(watch: &Watch, phase: Phase) {
    poll_fn(|_| match watch.phase() == phase {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

/// Waits for what the server shows, and tells how long it took.
#[track_caller]
pub(super) fn timed(limit: Duration, what: impl fmt::Display, shown: impl FnMut() -> bool) {
    let begin = Instant::now();
    wait_for_within(limit, &what, shown);
    eprintln!("{:.1?}: {what}", begin.elapsed());
}

/// A pool of one connection, so that the next user gets the one that was dropped on, or a new one.
pub(super) async fn pool<C: CancelTest>(url: &str) -> Pool<C::Manager> {
    let pool = Pool::builder().max_size(1).build(C::manager(url)).await;
    pool.expect("the server answers")
}

/// PostgreSQL's connection stays in step where a future was dropped, and holds nothing, even if it counts as broken.
pub(super) async fn assert_in_step<C: CancelTest>(conn: &mut C, observer: &mut C::Observer) {
    for number in 7001..7004 {
        assert_eq!(conn.echo(number).await, number, "the connection is in step");
    }
    assert!(
        !in_transaction(conn, observer).await,
        "a transaction is open"
    );
    assert_holds_nothing(conn, observer).await;
}

/// The next user of the pool is in step, in no transaction, and holds nothing.
pub(super) async fn assert_next_user_is_clean<C: CancelTest>(
    pool: &Pool<C::Manager>,
    observer: &mut C::Observer,
) {
    let mut next = pool.get().await.expect("a connection");
    for number in 7001..7006 {
        assert_eq!(next.echo(number).await, number, "the next user is in step");
    }
    assert_clean(&mut *next, observer).await;
}

/// The session is the next user's, who has seen to it that it is through with all that was sent, or it has ended. Before,
/// the server might still come to grant the lock.
async fn returned_or_ended<C: CancelTest>(
    pool: &Pool<C::Manager>,
    observer: &mut C::Observer,
    id: i64,
) {
    let mut next = pool.get().await.expect("a connection");
    if next.backend_id().await != id {
        wait_for("the end of the session", || !observer.is_connected(id));
    }
}

on_every_network_server_async! {
    async fn the_next_user_of_a_pool_is_in_step_and_holds_nothing<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        let pool = pool::<C>(&server.url).await;
        let mut numbers = Numbers(0);
        let (mut drops, mut calls) = (0, 0);
        for round in 0..8 {
            for &call in C::CALLS {
                let key = unique_key("cancel_pool");
                let lock = call.lock(&key);
                let taken = call.asks() && round % 2 == 1;
                if taken {
                    assert!(try_lock(&mut observer, &lock));
                }
                let mut pooled = pool.get().await.expect("a connection");
                let id = pooled.backend_id().await;
                before(&mut *pooled, call).await;
                let (delay, times) = (Duration::from_millis(2), numbers.below(4) as u32);
                let delay = numbers.duration_below(delay);
                let stop = async {
                    match taken {
                        true => precisely(delay).await,
                        false => polls(times).await,
                    }
                };
                let result = pooled.call(call, &key, false, stop).await;
                calls += 1;
                drops += usize::from(result.is_none());
                // A transaction that is open goes with it.
                drop(pooled);
                if taken {
                    unlock(&mut observer, &lock);
                }
                assert_next_user_is_clean::<C>(&pool, &mut observer).await;
                returned_or_ended::<C>(&pool, &mut observer, id).await;
                assert_free(&mut observer, &lock);
            }
        }
        // Owned by the lock, and so given back to the pool by the drop.
        for _ in 0..20 {
            let key = unique_key("cancel_pool_owned");
            let mut owned = pool.get_owned().await.expect("a connection");
            let id = owned.backend_id().await;
            let stop = polls(numbers.below(4) as u32);
            let result = dropped(AdvisoryLock::new(owned, &key).acquire(), stop).await;
            calls += 1;
            drops += usize::from(result.is_none());
            drop(result);
            assert_next_user_is_clean::<C>(&pool, &mut observer).await;
            returned_or_ended::<C>(&pool, &mut observer, id).await;
            assert_free(&mut observer, &key);
        }
        assert!(drops * 3 > calls, "too few drops: {drops} of {calls} calls");
    }

    async fn a_dropped_wait_that_is_cancelled_leaves_the_queue_at_once<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        for &call in C::CALLS.iter().filter(|call| call.can_be_cancelled()) {
            let key = unique_key("cancel_with");
            let mut subject = Subject::<C>::open(server).await;
            let id = subject.id;
            before(&mut subject.conn, call).await;
            assert!(try_lock(&mut observer, &key));
            let stop = until(|| observer.is_waiting(id));
            let result = subject.conn.call(call, &key, true, stop).await;
            assert!(result.is_none(), "{call:?} waits: {result:?}");
            timed(FREE_IN_STEP, format!("{call:?} leaves the queue, {}", server.name), || !observer.is_waiting(id));
            assert!(observer.is_connected(id), "{call:?}: the connection stays");
            assert!(is_broken(&mut subject.conn), "{call:?}");
            unlock(&mut observer, &key);
            // It is not granted it later, either.
            assert_free(&mut observer, &key);
            drop(subject);
        }
    }

    async fn a_dropped_wait_leaves_the_queue_when_the_connection_is_closed<C: CancelTest>(server: &'static Server) {
        leaves_when_closed::<C>(server, |call| !call.in_transaction()).await;
    }

    async fn a_grant_whose_answer_was_not_read_is_undone<C: CancelTest>(server: &'static Server) {
        const CALLS: [Call; 6] =
            [Call::Acquire, Call::TryAcquire, Call::Timeout, Call::PollEvery, Call::Run, Call::Transaction];
        let mut observer = C::observer(server);
        for taken in [false, true] {
            for call in CALLS {
                // A limit that has passed is no grant.
                if taken && (!call.queues() || call == Call::Timeout) {
                    continue;
                }
                let key = unique_key("cancel_unread");
                let proxy = Proxy::start(server);
                let mut subject = Subject::<C>::open(&proxy.server(server)).await;
                let id = subject.id;
                // Prepares its statements.
                let warm = subject.conn.call(call, &key, false, pending()).await;
                warm.expect("not dropped").expect("the lock is free");
                if taken {
                    assert!(try_lock(&mut observer, &key));
                }
                let stop = async {
                    if taken {
                        until(|| observer.is_waiting(id)).await;
                        proxy.pause();
                        unlock(&mut observer, &key);
                    }
                    until(|| holders(&mut observer, &key) == [id]).await;
                };
                if !taken {
                    proxy.pause();
                }
                let result = subject.conn.call(call, &key, false, stop).await;
                assert!(result.is_none(), "{call:?}: {result:?}");

                let what = format!("{call:?} (waited: {taken}) frees what was granted, {}", server.name);
                match C::KIND {
                    // Nothing that the server says has been read yet.
                    Kind::Postgres => {
                        timed(FREE_IN_STEP, what, || holders(&mut observer, &key).is_empty());
                        proxy.resume();
                        assert!(is_broken(&mut subject.conn), "{call:?}");
                        assert_in_step(&mut subject.conn, &mut observer).await;
                    }
                    Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
                    Kind::Mysql => {
                        assert!(is_broken(&mut subject.conn), "{call:?}");
                        if call.queues() {
                            // Nothing is sent behind what may wait: then the server notices when the connection is closed.
                            assert_held_by(&mut observer, &key, id);
                            proxy.resume();
                            drop(subject);
                            timed(free_once_closed(C::KIND), what, || holders(&mut observer, &key).is_empty());
                        } else {
                            timed(FREE_IN_STEP, what, || holders(&mut observer, &key).is_empty());
                        }
                    }
                }
                assert_free(&mut observer, &key);
            }
        }
    }

    async fn a_question_that_is_dropped_leaves_the_connection_in_step_or_broken<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        for times in 0..8 {
            let key = unique_key("cancel_question");
            let mut conn = C::open(server).await;
            let asked = dropped(conn.advisory_lock(&key).holders(), polls(times)).await;
            let was_dropped = asked.is_none();
            assert_eq!(is_broken(&mut conn), was_dropped && C::KIND == Kind::Mysql, "holders, after {times} polls");
            if !is_broken(&mut conn) {
                assert_clean(&mut conn, &mut observer).await;
            }

            let mut conn = C::open(server).await;
            let mut guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
            let was_dropped = dropped(guard.is_held(), polls(times)).await.is_none();
            assert_eq!(is_broken(&mut *guard), was_dropped && C::KIND == Kind::Mysql, "is_held, after {times} polls");
            if !is_broken(&mut *guard) {
                guard.release().await.expect("held");
                assert_clean(&mut conn, &mut observer).await;
            }
        }
    }

    async fn a_release_that_is_dropped_releases_no_other_hold<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        for times in 0..8 {
            for outer in [false, true] {
                let key = unique_key("cancel_release");
                let mut subject = Subject::<C>::open(server).await;
                let (conn, id) = (&mut subject.conn, subject.id);
                let mut first = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
                let was_dropped = if outer {
                    let second = first.advisory_lock(&key).acquire().await.expect("re-entrant");
                    let was_dropped = dropped(second.release(), polls(times)).await.is_none();
                    if C::KIND == Kind::Postgres {
                        assert!(first.is_held().await.expect("an answer"), "after {times} polls");
                    }
                    assert_held_by(&mut observer, &key, id);
                    drop(first);
                    was_dropped
                } else {
                    dropped(first.release(), polls(times)).await.is_none()
                };
                assert!(!was_dropped || is_broken(&mut subject.conn), "after {times} polls");
                if C::KIND == Kind::Postgres {
                    assert_eq!(subject.conn.echo(4711).await, 4711, "in step after {times} polls");
                }
                let free = || holders(&mut observer, &key).is_empty();
                match outer {
                    true => {
                        drop(subject);
                        timed(free_once_closed(C::KIND), "the outer hold of a dropped release", free);
                    }
                    // While the connection is open.
                    false => {
                        timed(FREE_IN_STEP, "a dropped release", free);
                        drop(subject);
                    }
                }
                assert_free(&mut observer, &key);
            }
        }
    }

    /// tokio has a task that did much at a time wait for its turn, at the next thing that it could wait for.
    async fn a_release_is_sent_by_a_task_whose_turn_is_over<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        let key = unique_key("cancel_budget");
        let mut conn = C::open(server).await;
        let guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
        let semaphore = Semaphore::new(1);
        let mut release = Box::pin(guard.release());
        poll_fn(|context| {
            while coop::has_budget_remaining() {
                let acquired = pin!(semaphore.acquire()).poll(context);
                assert!(acquired.is_ready());
            }
            // Mostly it waits for the answer now.
            let _ = release.as_mut().poll(context);
            Poll::Ready(())
        })
        .await;
        drop(release);
        timed(FREE_IN_STEP, "a release without a budget", || holders(&mut observer, &key).is_empty());
    }

    async fn an_outer_hold_survives_a_dropped_request_for_the_same_lock<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        for times in 0..8 {
            let key = unique_key("cancel_outer");
            let mut subject = Subject::<C>::open(server).await;
            let id = subject.id;
            let mut outer = subject.conn.advisory_lock(&key).acquire().await.expect("the lock is free");
            let was_dropped = match dropped(outer.advisory_lock(&key).acquire(), polls(times)).await {
                Some(inner) => {
                    inner.expect("re-entrant").release().await.expect("held");
                    false
                }
                None => true,
            };
            assert_held_by(&mut observer, &key, id);
            if C::KIND == Kind::Mysql && was_dropped {
                drop(outer);
                assert!(is_broken(&mut subject.conn));
                assert_held_by(&mut observer, &key, id);
                drop(subject);
            } else {
                assert!(outer.is_held().await.expect("an answer"));
                assert_eq!(outer.echo(4711).await, 4711);
                assert_held_by(&mut observer, &key, id);
                // Held once: what was granted to the future that was dropped is undone.
                match is_broken(&mut *outer) {
                    true => drop(outer),
                    false => drop(outer.release().await.expect("held once")),
                }
                timed(FREE_IN_STEP, "the outer hold", || holders(&mut observer, &key).is_empty());
                assert_in_step(&mut subject.conn, &mut observer).await;
            }
            wait_until_free(&mut observer, &key);
        }
    }

    async fn an_outer_hold_survives_a_dropped_wait_for_another_lock<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        for cancel in [false, true] {
            let (key, another) = (unique_key("cancel_outer"), unique_key("cancel_another"));
            let mut subject = Subject::<C>::open(server).await;
            let id = subject.id;
            assert!(try_lock(&mut observer, &another));
            let mut outer = subject.conn.advisory_lock(&key).acquire().await.expect("the lock is free");
            let stop = until(|| observer.is_waiting(id));
            let result = outer.call(Call::Acquire, &another, cancel, stop).await;
            assert!(result.is_none(), "{result:?}");
            if cancel {
                wait_for("the cancel", || !observer.is_waiting(id));
            }
            unlock(&mut observer, &another);
            assert_held_by(&mut observer, &key, id);
            match C::KIND {
                Kind::Postgres => {
                    // The cancel is over: its effect has been seen.
                    assert!(outer.is_held().await.expect("an answer"));
                    assert_eq!(outer.echo(4711).await, 4711);
                    assert_free(&mut observer, &another);
                    assert_held_by(&mut observer, &key, id);
                    drop(outer);
                    timed(FREE_IN_STEP, "the outer guard frees its lock", || holders(&mut observer, &key).is_empty());
                    assert!(is_broken(&mut subject.conn));
                }
                Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
                Kind::Mysql => {
                    drop(outer);
                    assert!(is_broken(&mut subject.conn));
                    assert_held_by(&mut observer, &key, id);
                    drop(subject);
                }
            }
            wait_until_free(&mut observer, &key);
            wait_until_free(&mut observer, &another);
        }
    }

    async fn a_timer_around_acquire<C: CancelTest>(server: &'static Server) {
        let key = unique_key("cancel_timer");
        let mut observer = C::observer(server);
        let (mut conn, mut second) = (C::open(server).await, C::open(server).await);
        let id = conn.backend_id().await;
        assert!(try_lock(&mut observer, &key));
        let timer = Duration::from_millis(100);
        let result = tokio::time::timeout(timer, lock(&mut conn, &key, true).acquire()).await;
        result.map(drop).expect_err("the lock is taken");
        assert!(is_broken(&mut conn));
        timed(FREE_IN_STEP, "the timer takes the wait from the queue", || !observer.is_waiting(id));
        unlock(&mut observer, &key);

        let timer = dlock_tests::PATIENCE;
        let guard = tokio::time::timeout(timer, second.advisory_lock(&key).acquire()).await;
        guard.expect("in time").expect("the lock is free").release().await.expect("held");
        assert_clean(&mut second, &mut observer).await;
        assert_free(&mut observer, &key);
    }

    async fn select_between_two_locks_leaves_one<C: CancelTest>(server: &'static Server) {
        let (a, b) = (unique_key("select_a"), unique_key("select_b"));
        let mut observer = C::observer(server);
        for taken in [None, Some(&a), Some(&b)] {
            let (mut first, mut second) = (C::open(server).await, C::open(server).await);
            let ids = [first.backend_id().await, second.backend_id().await];
            if let Some(key) = taken {
                assert!(try_lock(&mut observer, key));
            }
            let (got_first, guard) = tokio::select! {
                guard = first.advisory_lock(&a).acquire() => (true, guard),
                guard = second.advisory_lock(&b).acquire() => (false, guard),
            };
            let guard = guard.expect("one of them is free");
            let (got, id, other) = if got_first { (&a, ids[0], &b) } else { (&b, ids[1], &a) };
            assert_ne!(Some(got), taken);
            assert_held_by(&mut observer, got, id);
            guard.release().await.expect("held");
            assert_free(&mut observer, got);
            // The one that lost was dropped in a wait, or right after it had asked.
            let loser = if got_first { &mut second } else { &mut first };
            if taken.is_none() && C::KIND == Kind::Postgres {
                timed(FREE_IN_STEP, "the lock that was not selected", || holders(&mut observer, other).is_empty());
                assert_in_step(loser, &mut observer).await;
            }
            drop((first, second));
            for id in ids {
                wait_for("the end of the session", || !observer.is_connected(id));
            }
            if taken == Some(other) {
                unlock(&mut observer, other);
            }
            assert_free(&mut observer, other);
        }
    }

    async fn a_transaction_that_is_dropped_leaves_nothing_in_the_pool<C: CancelTest>(server: &'static Server) {
        let mut observer = C::observer(server);
        let pool = pool::<C>(&server.url).await;
        let mut late = Vec::new();
        // At READ COMMITTED, PostgreSQL begins with the lock.
        for phase in [Phase::Nothing, Phase::Asking, Phase::Waiting, Phase::Beginning, Phase::Working, Phase::Ending] {
            if phase == Phase::Asking && C::KIND == Kind::Postgres {
                continue;
            }
            let key = unique_key("cancel_transaction");
            let table = Table::new(server);
            let mut pooled = pool.get().await.expect("a connection");
            let watch = Watch::new(&mut *pooled);
            let id = pooled.backend_id().await;
            if phase == Phase::Waiting {
                assert!(try_lock(&mut observer, &key));
            }
            // In the middle of the work: its statement is done and it hangs.
            let hang = phase == Phase::Nothing;
            let mut done = 0;
            loop {
                let stop = async {
                    match phase {
                        Phase::Waiting => until(|| observer.is_waiting(id)).await,
                        Phase::Nothing => until(|| watch.hangs_after(Phase::Working)).await,
                        phase => reached(&watch, phase).await,
                    }
                };
                let work = table.insert(done);
                let Some(result) = pooled.transaction_with(&key, false, &work, hang, stop).await else {
                    break;
                };
                // The answer was there at once, and so was the next phase.
                result.expect("a transaction");
                done += 1;
                assert!(done < 100, "never stopped in {phase:?}");
            }
            if phase == Phase::Waiting {
                unlock(&mut observer, &key);
            }
            let what = format!("a transaction dropped in {phase:?} frees its lock, {}", server.name);
            // Sent without waiting, except behind what may wait on MySQL and MariaDB.
            if C::KIND == Kind::Postgres || !matches!(phase, Phase::Asking | Phase::Waiting) {
                let begin = Instant::now();
                while !holders(&mut observer, &key).is_empty() {
                    if begin.elapsed() > FREE_IN_STEP {
                        late.push(phase);
                        break;
                    }
                }
            }
            assert!(C::KIND == Kind::Postgres || is_broken(&mut *pooled), "{phase:?}");
            drop(pooled);
            timed(free_once_closed(C::KIND), what, || holders(&mut observer, &key).is_empty());
            assert_next_user_is_clean::<C>(&pool, &mut observer).await;
            returned_or_ended::<C>(&pool, &mut observer, id).await;
            assert_free(&mut observer, &key);
            match phase {
                // Either may have come first.
                Phase::Ending => assert!((done..=done + 1).contains(&table.rows(&mut observer))),
                _ => assert_eq!(table.rows(&mut observer), done, "{phase:?}"),
            }
        }
        assert!(late.is_empty(), "held while the connection was open, dropped in {late:?}");
    }
}

on_mysql_async! {
    /// Then the cancel ends the wait, and what is sent behind it is obeyed while the connection is open.
    async fn a_grant_whose_answer_was_not_read_is_undone_at_once_where_the_wait_can_be_cancelled(server: &'static Server) {
        let mut observer = <AsyncMysqlConnection as AsyncTestConnection>::Observer::open(server);
        for &call in Call::ON_MYSQL.iter().filter(|call| call.can_be_cancelled()) {
            for taken in [false, true] {
                let key = unique_key("cancel_unread_at_once");
                let proxy = Proxy::start(server);
                let mut subject = Subject::<AsyncMysqlConnection>::open(&proxy.server(server)).await;
                let id = subject.id;
                before(&mut subject.conn, call).await;
                // Prepares its statements.
                let plain = if call.in_transaction() { call } else { Call::Acquire };
                let warm = subject.conn.call(plain, &key, false, pending()).await;
                warm.expect("not dropped").expect("the lock is free");
                assert!(!taken || try_lock(&mut observer, &key));
                let stop = async {
                    if taken {
                        until(|| observer.is_waiting(id)).await;
                        proxy.pause();
                        unlock(&mut observer, &key);
                    }
                    until(|| holders(&mut observer, &key) == [id]).await;
                };
                if !taken {
                    proxy.pause();
                }
                let result = subject.conn.call(call, &key, true, stop).await;
                assert!(result.is_none(), "{call:?}: {result:?}");
                let what = format!("{call:?} (waited: {taken}) frees what was granted, {}", server.name);
                timed(FREE_IN_STEP, what, || holders(&mut observer, &key).is_empty());
                assert!(is_broken(&mut subject.conn), "{call:?}");
                assert_free(&mut observer, &key);
                proxy.resume();
            }
        }
    }
}

on_postgres_async! {
    async fn a_dropped_wait_in_a_transaction_leaves_the_queue_when_the_connection_is_closed(server: &'static Server) {
        leaves_when_closed::<AsyncPgConnection>(server, Call::in_transaction).await;
    }

    async fn a_grant_in_a_transaction_whose_answer_was_not_read_is_undone(server: &'static Server) {
        let key = unique_key("cancel_unread_inside");
        let proxy = Proxy::start(server);
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        let mut other = Other::<AsyncPgConnection>::open(server, &key).await;
        let mut subject = Subject::<AsyncPgConnection>::open(&proxy.server(server)).await;
        let id = subject.id;
        begin(&mut subject.conn).await;
        other.lock().await;
        let stop = async {
            until(|| observer.is_waiting(id)).await;
            proxy.pause();
            other.unlock().await;
            until(|| holders(&mut observer, &key) == [id]).await;
        };
        let result = subject.conn.call(Call::InsideTransaction, &key, false, stop).await;
        assert!(result.is_none(), "{result:?}");
        timed(FREE_IN_STEP, "what was granted inside a transaction is freed", || {
            holders(&mut observer, &key).is_empty()
        });
        proxy.resume();
        assert!(is_transaction_broken(&mut subject.conn));
    }

    async fn a_wait_that_is_dropped_in_a_later_turn_leaves_the_queue_at_once(server: &'static Server) {
        for cancel in [true, false] {
            in_a_later_turn(async |call| {
                let key = unique_key("cancel_later_turn");
                let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
                let mut subject = Subject::<AsyncPgConnection>::open(server).await;
                let (id, watch) = (subject.id, subject.watch.clone());
                let cancel = cancel && call.can_be_cancelled();
                before(&mut subject.conn, call).await;
                assert!(try_lock(&mut observer, &key));
                let stop = until(|| watch.phase() == Phase::LaterTurn && observer.is_waiting(id));
                let result = subject.conn.call(call, &key, cancel, stop).await;
                assert!(result.is_none(), "{call:?} waits: {result:?}");
                assert!(is_broken(&mut subject.conn), "{call:?}");
                let open = cancel.then_some(subject);
                let what = format!("{call:?} leaves the queue in a later turn, cancelled: {cancel}, {}", server.name);
                timed(SOON_ONCE_CLOSED, what, || !observer.is_waiting(id));
                unlock(&mut observer, &key);
                // It is not granted it later, either.
                assert_free(&mut observer, &key);
                drop(open);
            });
        }
    }

    async fn a_grant_in_a_later_turn_whose_answer_was_not_read_is_undone(server: &'static Server) {
        in_a_later_turn(async |call| {
            let key = unique_key("cancel_unread_later");
            let proxy = Proxy::start(server);
            let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
            let mut subject = Subject::<AsyncPgConnection>::open(&proxy.server(server)).await;
            let (id, watch) = (subject.id, subject.watch.clone());
            before(&mut subject.conn, call).await;
            assert!(try_lock(&mut observer, &key));
            let stop = async {
                until(|| watch.phase() == Phase::LaterTurn && observer.is_waiting(id)).await;
                proxy.pause();
                unlock(&mut observer, &key);
                until(|| holders(&mut observer, &key) == [id]).await;
            };
            let result = subject.conn.call(call, &key, false, stop).await;
            assert!(result.is_none(), "{call:?} waits: {result:?}");
            let what = format!("{call:?} frees what was granted in a later turn, {}", server.name);
            let is_free = || holders(&mut observer, &key).is_empty();
            match call {
                // It ends with the transaction, and that with the connection.
                Call::Nested | Call::TransactionLock => {
                    assert!(is_broken(&mut subject.conn), "{call:?}");
                    drop(subject);
                    proxy.resume();
                    timed(FREE_IN_STEP, what, is_free);
                }
                _ => {
                    timed(FREE_IN_STEP, what, is_free);
                    proxy.resume();
                    assert!(is_broken(&mut subject.conn), "{call:?}");
                }
            }
            assert_free(&mut observer, &key);
        });
    }

    /// It is the transaction's, which can go on.
    async fn a_transactions_grant_whose_answer_was_not_read_stays(server: &'static Server) {
        let key = unique_key("cancel_unread_transaction_lock");
        let proxy = Proxy::start(server);
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        let mut subject = Subject::<AsyncPgConnection>::open(&proxy.server(server)).await;
        let id = subject.id;
        // Prepares its statements.
        begin(&mut subject.conn).await;
        let warm = subject.conn.call(Call::TransactionLock, &key, false, pending()).await;
        warm.expect("not dropped").expect("the lock is free");
        roll_back(&mut subject.conn).await;

        begin(&mut subject.conn).await;
        proxy.pause();
        let stop = until(|| holders(&mut observer, &key) == [id]);
        let result = subject.conn.call(Call::TransactionLock, &key, false, stop).await;
        assert!(result.is_none(), "{result:?}");
        proxy.resume();
        assert_held_by(&mut observer, &key, id);
        roll_back(&mut subject.conn).await;
        assert_clean(&mut subject.conn, &mut observer).await;
        wait_until_free(&mut observer, &key);
    }
}

/// Runs a scenario for each call that can wait for longer than a turn, all of them at the same time.
fn in_a_later_turn(scenario: impl AsyncFn(Call) + Sync) {
    let runtime = tokio::runtime::Handle::current();
    let calls = Call::ON_POSTGRES.iter().copied();
    thread::scope(|scope| {
        for call in calls.filter(|call| call.queues() && *call != Call::Timeout) {
            let (scenario, runtime) = (&scenario, &runtime);
            scope.spawn(move || runtime.block_on(scenario(call)));
        }
    });
}

/// Drops waits of these calls, closes the connection, and sees that the server's queue is empty, while another session
/// has the lock all the time.
async fn leaves_when_closed<C: CancelTest>(server: &'static Server, of: fn(Call) -> bool) {
    let mut observer = C::observer(server);
    let mut late = Vec::new();
    for &call in C::CALLS
        .iter()
        .filter(|call| call.queues() && **call != Call::Timeout && of(**call))
    {
        let key = unique_key("cancel_closed");
        let mut subject = Subject::<C>::open(server).await;
        let id = subject.id;
        before(&mut subject.conn, call).await;
        assert!(try_lock(&mut observer, &key));
        let stop = until(|| observer.is_waiting(id));
        let result = subject.conn.call(call, &key, false, stop).await;
        assert!(result.is_none(), "{call:?} waits: {result:?}");
        assert!(is_broken(&mut subject.conn), "{call:?}");
        drop(subject);
        let closed = Instant::now();
        while observer.is_waiting(id) && closed.elapsed() <= free_once_closed(C::KIND) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let took = closed.elapsed();
        eprintln!(
            "{took:.1?}: {call:?} leaves the queue after the close, {}",
            server.name
        );
        if took > free_once_closed(C::KIND) {
            late.push(call);
            unlock(&mut observer, &key);
            continue;
        }
        wait_for("the end of the session", || !observer.is_connected(id));
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
    }
    assert!(
        late.is_empty(),
        "still in the queue after {:?}: {late:?}",
        free_once_closed(C::KIND)
    );
}
