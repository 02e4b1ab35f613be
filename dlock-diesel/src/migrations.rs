use std::ops::DerefMut;

use diesel::connection::Connection;
use diesel::migration::{MigrationSource, MigrationVersion, Result};
use diesel_migrations::MigrationHarness;
use dlock_core::Mode;
use dlock_core::proto::{Ask, Hold};

use crate::backend::{DialectOf, KeyOf};
use crate::shared::trace::Waiting;
use crate::shared::{self, Notices};
use crate::{AdvisoryLock, AdvisoryLockGuard, Error, LockConnection, acquire};

#[cfg_attr(docsrs, doc(cfg(feature = "migrations")))]
impl<M: DerefMut<Target: LockConnection>> AdvisoryLock<M> {
    /// Runs the pending migrations under the lock. Any number of processes can call it when they start: each migration
    /// is applied by one of them.
    ///
    /// It looks up what is pending once the lock is held, and returns the versions that *this* call applied. It waits
    /// by [polling](Self::poll_every), every 100 ms unless you choose another interval, because a migration may run
    /// `CREATE INDEX CONCURRENTLY`. The lock is exclusive, even if you asked for it as [`shared`](Self::shared).
    ///
    /// A wait of more than 3 seconds says so, and names the holder: as an event of the crate `tracing`, with that
    /// feature and a subscriber, and otherwise in a line on standard error. A further line follows each minute.
    ///
    /// It does not put a transaction around all migrations: each has its own, or none, as its `metadata.toml` says. It
    /// does not keep out `diesel migration run`, which does not take the lock.
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
    /// for version in conn.advisory_lock(("billing", "migrations")).run_pending_migrations(MIGRATIONS)? {
    ///     println!("applied {version}");
    /// }
    ///
    /// // The type of the error tells an error of the lock from an error of a migration.
    /// let migrations = conn.advisory_lock(("billing", "migrations")).timeout(Duration::from_secs(60));
    /// if let Err(error) = migrations.run_pending_migrations(MIGRATIONS) {
    ///     match Error::find(&*error) {
    ///         Some(Error::Timeout { .. }) => println!("another process is still migrating: {error}"),
    ///         Some(other) => println!("the lock: {other}"),
    ///         None => println!("a migration: {error}"),
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    ///
    /// For everything else under the same lock, use [`run`](Self::run):
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use diesel::prelude::*;
    /// # use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # const MIGRATIONS: EmbeddedMigrations = embed_migrations!("examples/migrations");
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock(("billing", "migrations")).poll_every(Duration::from_millis(100));
    /// lock.run(|conn| conn.revert_last_migration(MIGRATIONS))?;
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - Those of [`acquire`](Self::acquire), as an [`Error`](crate::Error) in the box. No migration has run.
    /// - Those of [`MigrationHarness::run_pending_migrations`], as they are. The lock is released. The migrations
    ///   before the one that failed are applied.
    /// - If all migrations succeeded, those of [`release`](crate::AdvisoryLockGuard::release), in an error that names
    ///   the migrations that are applied. [`Error::find`](crate::Error::find) finds them.
    ///
    /// # Round trips
    ///
    /// Those of [`acquire`](Self::acquire) when polling, of [`MigrationHarness::run_pending_migrations`] and of
    /// [`release`](crate::AdvisoryLockGuard::release). Each notice asks for the [`holders`](Self::holders).
    ///
    /// # Backend differences
    ///
    /// - MySQL and MariaDB: most statements that change the schema commit at once. A migration that fails half-way
    ///   leaves its first half behind. The lock is not affected.
    /// - SQLite: a migration waits for other writers as long as `busy_timeout` says.
    pub fn run_pending_migrations<S>(mut self, source: S) -> Result<Vec<MigrationVersion<'static>>>
    where
        M::Target: MigrationHarness<<M::Target as Connection>::Backend>,
        S: MigrationSource<<M::Target as Connection>::Backend>,
    {
        self.ask.mode = Mode::Exclusive;
        self.ask.wait.poll.get_or_insert(shared::MIGRATION_INTERVAL);
        let hold = acquire(&mut *self.conn, &self.ask)?;
        let hold = hold.expect("BUG: a limit that passes is an error");
        let mut guard = AdvisoryLockGuard::new(self.conn, self.ask, hold);
        // An error drops the guard, which releases.
        let applied: Vec<_> = guard
            .run_pending_migrations(source)?
            .iter()
            .map(MigrationVersion::as_owned)
            .collect();
        match guard.release() {
            Ok(_) => Ok(applied),
            Err(error) => Err(shared::unprotected(&applied, error)),
        }
    }
}

/// Waits for the lock, and says so.
fn acquire<C: LockConnection>(conn: &mut C, ask: &Ask) -> Acquired<C> {
    let mut part = ask.clone();
    Waiting::of::<DialectOf<C>>(ask, None).run(|| {
        let mut notices = Notices::new(ask.wait.limit);
        loop {
            part.wait.limit = Some(notices.part());
            match acquire::hold(conn, &part) {
                Err(error) => notices.after(error)?,
                held => return held,
            }
        }
    })
}

type Acquired<C> = std::result::Result<Option<Hold<KeyOf<C>>>, Error>;
