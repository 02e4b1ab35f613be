use std::ops::DerefMut;

use diesel::connection::Connection;
use diesel::migration::{MigrationSource, MigrationVersion, Result};
use diesel_migrations::MigrationHarness;
use dlock_core::Mode;

use crate::{AdvisoryLock, LockConnection, glue};

#[cfg_attr(docsrs, doc(cfg(feature = "migrations")))]
impl<M: DerefMut<Target: LockConnection>> AdvisoryLock<M> {
    /// Runs the migrations that are pending once the lock is held, in their order, and releases the lock: what any
    /// number of processes can do at their start, for each migration is applied by one of them.
    ///
    /// It waits by [polling](Self::poll_every), each 100 ms unless told otherwise: a wait in PostgreSQL's queue holds
    /// a snapshot, which a migration with `CREATE INDEX CONCURRENTLY` waits for, and that is a deadlock. The lock is
    /// exclusive, even if it was asked for as [`shared`](Self::shared).
    ///
    /// It returns the versions that *this* call applied, none if another process did.
    ///
    /// It is no transaction around all of them: each migration has its own, or none, as its `metadata.toml` says. And
    /// it keeps apart those who take this lock, which `diesel migration run` does not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use diesel::prelude::*;
    /// use diesel_migrations::{EmbeddedMigrations, embed_migrations};
    /// use dlock_diesel::{AdvisoryLockExt, Error};
    ///
    /// const MIGRATIONS: EmbeddedMigrations = embed_migrations!("examples/migrations");
    ///
    /// let mut conn = PgConnection::establish("postgres://localhost/app")?;
    /// for version in conn.advisory_lock("migrations").run_pending_migrations(MIGRATIONS)? {
    ///     println!("applied {version}");
    /// }
    ///
    /// // An error of the lock is told from one of a migration by its type.
    /// let migrations = conn.advisory_lock("migrations").timeout(Duration::from_secs(60));
    /// if let Err(error) = migrations.run_pending_migrations(MIGRATIONS) {
    ///     match error.downcast_ref::<Error>() {
    ///         Some(Error::Timeout { holders, .. }) => println!("still being migrated by {holders:?}"),
    ///         Some(other) => println!("the lock: {other}"),
    ///         None => println!("a migration: {error}"),
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    ///
    /// [`run`](Self::run) does everything else under the same lock:
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use diesel::prelude::*;
    /// # use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # const MIGRATIONS: EmbeddedMigrations = embed_migrations!("examples/migrations");
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock("migrations").poll_every(Duration::from_millis(100));
    /// lock.run(|conn| conn.revert_last_migration(MIGRATIONS))?;
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - Those of [`acquire`](Self::acquire), as an [`Error`](crate::Error) in the box. No migration has been run.
    ///   In an open transaction that is [`Error::InTransaction`](crate::Error::InTransaction), since the lock would
    ///   be free before the migrations are committed.
    /// - Those of [`MigrationHarness::run_pending_migrations`], as they are. The lock is released, and the migrations
    ///   before the one that failed are applied.
    /// - If all migrations succeeded, those of [`release`](crate::AdvisoryLockGuard::release), as an
    ///   [`Error`](crate::Error) in the box.
    ///
    /// # Round trips
    ///
    /// Those of [`acquire`](Self::acquire) when polling, of [`MigrationHarness::run_pending_migrations`] and of
    /// [`release`](crate::AdvisoryLockGuard::release).
    ///
    /// # Backend differences
    ///
    /// On MySQL and MariaDB most statements that change the schema commit at once, so that a migration that fails
    /// half-way leaves its first half behind. The lock is the session's and is held all the same. On SQLite a migration
    /// waits for who else writes as long as `busy_timeout` says.
    pub fn run_pending_migrations<S>(mut self, source: S) -> Result<Vec<MigrationVersion<'static>>>
    where
        M::Target: MigrationHarness<<M::Target as Connection>::Backend>,
        S: MigrationSource<<M::Target as Connection>::Backend>,
    {
        self.mode = Mode::Exclusive;
        self.wait.poll.get_or_insert(glue::MIGRATION_INTERVAL);
        self.run(|conn| {
            let applied = conn.run_pending_migrations(source)?;
            Ok(applied.iter().map(MigrationVersion::as_owned).collect())
        })
    }
}
