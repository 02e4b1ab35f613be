use std::any::Any;
use std::ops::DerefMut;
use std::panic;

use diesel::QueryResult;
use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::deserialize::FromSql;
use diesel::migration::{
    CREATE_MIGRATIONS_TABLE, Migration, MigrationSource, MigrationVersion, Result,
};
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::result::Error as DieselError;
use diesel::serialize::ToSql;
use diesel::sql_types::Text;
use diesel_async::{AsyncConnectionCore, RunQueryDsl, TransactionManager};
use diesel_migrations::MigrationHarness;
use dlock_core::Mode;
use dlock_core::proto::{Ask, Hold};
use dlock_diesel::shared::trace::Waiting;
use dlock_diesel::shared::{self, Notices};
use tokio::sync::{mpsc, oneshot};

use crate::backend::{Cancel, DialectOf, KeyOf};
use crate::{AdvisoryLock, AdvisoryLockGuard, Error, LockConnection, acquire};

#[cfg_attr(docsrs, doc(cfg(feature = "migrations")))]
impl<M: DerefMut<Target: LockConnection> + Send> AdvisoryLock<M> {
    /// Runs the pending migrations under the lock: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::run_pending_migrations).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// use diesel_migrations::{EmbeddedMigrations, embed_migrations};
    /// use dlock_diesel_async::{AdvisoryLockExt, Error};
    ///
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// const MIGRATIONS: EmbeddedMigrations = embed_migrations!("examples/migrations");
    ///
    /// let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
    /// let migrations = conn.advisory_lock(("billing", "migrations")).timeout(Duration::from_secs(60));
    /// for version in migrations.run_pending_migrations(MIGRATIONS).await? {
    ///     println!("applied {version}");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// For everything else under the same lock, pass a guard that owns its connection to diesel-async's
    /// [`AsyncMigrationHarness`](https://docs.rs/diesel-async/latest/diesel_async/struct.AsyncMigrationHarness.html).
    /// That needs a runtime with several threads:
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use diesel_async::{AsyncConnection, AsyncMigrationHarness, AsyncPgConnection};
    /// # use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
    /// # use dlock_diesel_async::AdvisoryLock;
    /// # const MIGRATIONS: EmbeddedMigrations = embed_migrations!("examples/migrations");
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// # let conn = AsyncPgConnection::establish("").await?;
    /// let lock = AdvisoryLock::new(Box::new(conn), ("billing", "migrations")).poll_every(Duration::from_millis(100));
    /// let mut harness = AsyncMigrationHarness::new(lock.acquire().await?);
    /// harness.revert_last_migration(MIGRATIONS)?;
    /// harness.into_inner().release().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// - Outside a tokio runtime. Every kind of runtime works, also one with a single thread: what is not async in a
    ///   migration runs in [`spawn_blocking`](tokio::task::spawn_blocking).
    /// - If a migration panics. The guard is dropped then: see [`AdvisoryLockGuard`](crate::AdvisoryLockGuard).
    ///
    /// # Cancel safety
    ///
    /// Until the lock is held, that of [`acquire`](Self::acquire). After that, no further migration begins, and the
    /// guard is dropped: see [`AdvisoryLockGuard`](crate::AdvisoryLockGuard). The statement that runs goes on to its
    /// end, and its transaction is rolled back. A migration without a transaction may be left half-way, and so may any
    /// migration on MySQL and MariaDB.
    ///
    /// # Round trips
    ///
    /// Those of [`acquire`](Self::acquire) when polling and of [`release`](crate::AdvisoryLockGuard::release). Each
    /// notice of a long wait asks for the [`holders`](Self::holders). Once prepared, 2 to look up what is
    /// pending, and for each migration 4, or 2 if it has no transaction.
    pub async fn run_pending_migrations<S>(
        mut self,
        source: S,
    ) -> Result<Vec<MigrationVersion<'static>>>
    where
        M::Target: LockConnection<Backend: 'static>,
        S: MigrationSource<<M::Target as AsyncConnectionCore>::Backend> + Send + 'static,
        String: FromSql<Text, <M::Target as AsyncConnectionCore>::Backend>,
        str: ToSql<Text, <M::Target as AsyncConnectionCore>::Backend>,
    {
        self.ask.mode = Mode::Exclusive;
        self.ask.wait.poll.get_or_insert(shared::MIGRATION_INTERVAL);
        let hold = acquire(&mut *self.conn, &self.ask, &mut self.cancel).await?;
        let hold = hold.expect("BUG: a limit that passes is an error");
        let mut guard = AdvisoryLockGuard::new(self.conn, self.ask, hold);
        let result = migrate(&mut *guard, source).await;
        // An error of the release does not hide one of a migration.
        match (result, guard.undo().await) {
            (Ok(applied), Err(error)) => Err(shared::unprotected(&applied, error)),
            (result, _) => result,
        }
    }
}

/// Waits for the lock, and says so.
async fn acquire<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
    cancel: &mut Option<Cancel>,
) -> std::result::Result<Option<Hold<KeyOf<C>>>, Error> {
    let mut part = ask.clone();
    let acquiring = async {
        let mut notices = Notices::new(ask.wait.limit);
        loop {
            part.wait.limit = Some(notices.part());
            match acquire::hold(conn, &part, cancel, notices.rest()).await {
                Err(error) => notices.after(error)?,
                held => return held,
            }
        }
    };
    let waiting = Waiting::of::<DialectOf<C>>(ask, None);
    waiting.during(acquiring).await
}

/// Runs the migrations in a thread where they may block, and runs here what they ask for.
///
/// diesel-async's own harness accepts neither a borrowed connection nor a runtime with one thread.
async fn migrate<C, S>(conn: &mut C, source: S) -> Result<Vec<MigrationVersion<'static>>>
where
    C: LockConnection<Backend: 'static>,
    S: MigrationSource<C::Backend> + Send + 'static,
    String: FromSql<Text, C::Backend>,
    str: ToSql<Text, C::Backend>,
{
    let (requests, mut requested) = mpsc::channel(1);
    let thread = tokio::task::spawn_blocking(move || {
        let mut remote = Remote { requests };
        let applied = MigrationHarness::<C::Backend>::run_pending_migrations(&mut remote, source)?;
        Ok(applied.iter().map(MigrationVersion::as_owned).collect())
    });
    while let Some((request, answer)) = requested.recv().await {
        // If the thread has ended meanwhile, its result says why.
        let _ = answer.send(serve(conn, request).await);
    }
    match thread.await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => panic::resume_unwind(panic),
            Err(shut_down) => Err(shut_down.into()),
        },
    }
}

enum Request {
    Applied,
    Begin,
    Batch(String),
    Record(MigrationVersion<'static>),
    Commit,
    RollBack,
}

/// Only the answer to [`Applied`](Request::Applied) has versions in it.
type Answer = QueryResult<Vec<MigrationVersion<'static>>>;

async fn serve<C>(conn: &mut C, request: Request) -> Answer
where
    C: LockConnection<Backend: 'static>,
    String: FromSql<Text, C::Backend>,
    str: ToSql<Text, C::Backend>,
{
    match request {
        Request::Applied => {
            conn.batch_execute(CREATE_MIGRATIONS_TABLE).await?;
            return Table::Versions.load(conn).await;
        }
        Request::Begin => C::TransactionManager::begin_transaction(conn).await?,
        Request::Batch(sql) => conn.batch_execute(&sql).await?,
        Request::Record(version) => {
            Table::Insert(version).execute(conn).await?;
        }
        Request::Commit => C::TransactionManager::commit_transaction(conn).await?,
        Request::RollBack => C::TransactionManager::rollback_transaction(conn).await?,
    }
    Ok(Vec::new())
}

/// A query of Diesel's table of migrations. (`sql_query` works only for backends that are known by name.)
enum Table {
    Versions,
    Insert(MigrationVersion<'static>),
}

impl Query for Table {
    type SqlType = Text;
}

impl QueryId for Table {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<DB: Backend> QueryFragment<DB> for Table
where
    str: ToSql<Text, DB>,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        match self {
            Self::Versions => out.push_sql("SELECT version FROM __diesel_schema_migrations"),
            Self::Insert(version) => {
                out.push_sql("INSERT INTO __diesel_schema_migrations (version) VALUES (");
                out.push_bind_param::<Text, _>(version)?;
                out.push_sql(")");
            }
        }
        Ok(())
    }
}

/// The connection as a migration sees it in its thread.
struct Remote {
    requests: mpsc::Sender<(Request, oneshot::Sender<Answer>)>,
}

impl Remote {
    fn ask(&mut self, request: Request) -> Answer {
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.blocking_send((request, answer));
        match sent.map(|()| answered.blocking_recv()) {
            Ok(Ok(answer)) => answer,
            // The future was dropped, and the guard with it. Whatever this thread still does has no effect.
            _ => Err(DieselError::BrokenTransactionManager),
        }
    }

    fn run_and_record<DB: Backend>(
        &mut self,
        migration: &dyn Migration<DB>,
    ) -> Result<MigrationVersion<'static>> {
        migration.run(self)?;
        let version = migration.name().version().as_owned();
        self.ask(Request::Record(version.as_owned()))?;
        Ok(version)
    }
}

impl SimpleConnection for Remote {
    fn batch_execute(&mut self, query: &str) -> QueryResult<()> {
        self.ask(Request::Batch(query.to_owned())).map(drop)
    }
}

impl<DB: Backend> BoxableConnection<DB> for Remote {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl<DB: Backend> MigrationHarness<DB> for Remote {
    fn run_migration(
        &mut self,
        migration: &dyn Migration<DB>,
    ) -> Result<MigrationVersion<'static>> {
        if !migration.metadata().run_in_transaction() {
            return self.run_and_record(migration);
        }
        self.ask(Request::Begin)?;
        let result = self.run_and_record(migration).and_then(|version| {
            self.ask(Request::Commit)?;
            Ok(version)
        });
        if result.is_err() {
            // An error of the rollback breaks the connection, but does not hide the error of the migration.
            let _ = self.ask(Request::RollBack);
        }
        result
    }

    fn revert_migration(&mut self, _: &dyn Migration<DB>) -> Result<MigrationVersion<'static>> {
        unreachable!("BUG: what is pending is run, not reverted")
    }

    fn applied_migrations(&mut self) -> Result<Vec<MigrationVersion<'static>>> {
        Ok(self.ask(Request::Applied)?)
    }
}
