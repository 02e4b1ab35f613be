use std::fmt;
use std::ops::DerefMut;
use std::time::Duration;

use diesel::connection::TransactionManager;
use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::proto::{Ask, Hold};
use dlock_core::{Holder, LockKey};

use crate::backend::{KeyOf, LockConnection};
use crate::shared::trace;
use crate::{AdvisorySemaphoreGuard, Error, acquire, holders, transaction};

/// A semaphore that is not held yet, and how to ask for it: at most so many sessions hold it at once, over all
/// processes and hosts.
///
/// [`AdvisoryLockExt::advisory_semaphore`](crate::AdvisoryLockExt::advisory_semaphore) makes one that borrows the
/// connection, [`new`](Self::new) one that owns it. The key is not that of a lock: `advisory_lock("gpu")` and
/// `advisory_semaphore("gpu", 4)` have nothing to do with each other.
///
/// # Examples
///
/// ```
/// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
/// let inside = conn.advisory_semaphore(("billing", "mail"), 10).acquire()?;
/// inside.release()?; // until here, at most 9 others send mail
/// # Ok(()) }
/// ```
///
/// # Slots
///
/// Each permit is a slot with a number, and each slot is a lock of the session: when the session ends, its slot is
/// free. The guard tells its [slot](AdvisorySemaphoreGuard::slot). A session that holds a slot and asks again may get
/// another one or its own once more, which then counts once.
///
/// # Use one number of permits
///
/// A semaphore is nothing but its slots, from 0 to `permits - 1`. Sessions that ask for the same key with different
/// numbers share the slots that both have. So with 3 and 5 permits, at most 5 sessions are inside, of which at most 3
/// asked for 3. All of them wait in one queue, so a session that waits for one of 3 slots delays those behind it,
/// though a fourth may be free. To change the number, deploy it: while both numbers are in use, the greater one holds.
///
/// # Who is next
///
/// Sessions that wait stand in the server's queue for a lock, the *gate*. The first of them looks for a free slot
/// again and again, at first each half millisecond, later with pauses of a thirty-second of the time that it has
/// looked, at most 10 ms. A hundred sessions that wait cost the server what one does. A newcomer goes behind them.
///
/// The order holds within a turn: on PostgreSQL that of every [wait](crate#waiting-on-postgresql) (0.9 times
/// `deadlock_timeout`); on MySQL and MariaDB about 9 seconds at the gate, after which the first goes to the end of the
/// queue; on SQLite within a process.
///
/// A deadlock in which a semaphore takes part is not found: set a [`timeout`](Self::timeout).
#[must_use = "a semaphore does nothing until it is acquired"]
pub struct AdvisorySemaphore<M> {
    conn: M,
    ask: Ask,
    permits: u32,
}

impl<M> fmt::Debug for AdvisorySemaphore<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisorySemaphore")
            .field("ask", &self.ask)
            .field("permits", &self.permits)
            .finish_non_exhaustive()
    }
}

impl<M: DerefMut<Target: LockConnection>> AdvisorySemaphore<M> {
    /// A semaphore on a connection that it owns, so that you can store it or move it to a thread.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::{PgConnection, r2d2::{ConnectionManager, Pool}}, dlock_diesel::AdvisorySemaphore};
    /// # fn example(pool: Pool<ConnectionManager<PgConnection>>) -> Result<(), Box<dyn std::error::Error>> {
    /// let inside = AdvisorySemaphore::new(pool.get()?, ("render", "gpu"), 4).acquire()?;
    /// std::thread::spawn(move || drop(inside)); // frees the slot, then returns the connection to the pool
    /// # Ok(()) }
    /// ```
    pub fn new(conn: M, key: impl Into<LockKey>, permits: u32) -> Self {
        Self {
            conn,
            ask: trace::asking(Ask::new(key.into())),
            permits,
        }
    }

    /// Limits the wait: see [`AdvisoryLock::timeout`](crate::AdvisoryLock::timeout).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let limit = std::time::Duration::from_millis(250);
    /// let result = conn.advisory_semaphore(("render", "gpu"), 4).timeout(limit).acquire();
    /// if let Err(Error::Timeout { holders, .. }) = result {
    ///     println!("{holders:?} have the GPUs or wait for them");
    /// }
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// Tries at this interval (at least a millisecond) and sleeps in between, instead of waiting in the server's queue.
    /// It is unfair: as long as others wait in the queue, a try finds no free slot.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let interval = std::time::Duration::from_millis(500);
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).poll_every(interval).acquire()?;
    /// # Ok(()) }
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.ask.wait.poll = Some(interval);
        self
    }

    /// Allows a permit of the session while a transaction is open: see
    /// [`AdvisoryLock::inside_transaction`](crate::AdvisoryLock::inside_transaction). On PostgreSQL it takes 2 round
    /// trips to acquire and 2 to release, and a wait tries every 10 ms instead of queueing.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// conn.transaction(|conn| {
    ///     let inside = conn.advisory_semaphore("external service", 4).inside_transaction().acquire()?;
    ///     // .. call the service ..
    ///     inside.release().map(drop)
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn inside_transaction(mut self) -> Self {
        self.ask.inside_transaction = true;
        self
    }

    /// The key of the semaphore.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_semaphore(("render", "gpu"), 4).key(), &LockKey::from(("render", "gpu")));
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// Acquires a permit. Waits until a slot is free.
    ///
    /// [Releasing](AdvisorySemaphoreGuard::release) or dropping the guard frees the slot. After an error, nothing is
    /// held that was not held before.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("billing", "import"), 3).acquire()?;
    /// diesel::sql_query("INSERT INTO items SELECT * FROM staged").execute(&mut *inside)?;
    /// inside.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire), with these differences:
    ///
    /// - [`Error::InvalidKey`] also if `permits` is 0 or more than 1,000, and for the key of another library. Nothing
    ///   is sent.
    /// - [`Error::Timeout`] names the sessions that hold slots or wait for one.
    ///
    /// # Round trips
    ///
    /// 1 where a slot is free. Where it has to wait: on PostgreSQL 4, and 3 for each further turn; on MySQL and MariaDB
    /// 3, and 2 for each further turn.
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL: a role that may not use PL/pgSQL tries every 10 ms instead of queueing.
    /// - MySQL: of a limit, only whole seconds are spent in the queue. The rest is spent trying for the gate, each time
    ///   after a pause of up to 10 ms.
    pub fn acquire(mut self) -> Result<AdvisorySemaphoreGuard<M>, Error> {
        let hold = acquire::permit(&mut *self.conn, &self.ask, self.permits)?;
        let hold = hold.expect("BUG: a limit that passes is an error");
        Ok(self.guard(hold))
    }

    fn guard(self, hold: Hold<KeyOf<M::Target>>) -> AdvisorySemaphoreGuard<M> {
        AdvisorySemaphoreGuard::new(self.conn, self.ask, self.permits, hold)
    }

    /// Acquires a permit if a slot is free and nobody waits for one, otherwise returns `None`. With
    /// [`timeout`](Self::timeout) it waits that long first. It has the errors and round trips of
    /// [`acquire`](Self::acquire), but never [`Error::Timeout`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// match conn.advisory_semaphore(("render", "gpu"), 4).try_acquire()? {
    ///     Some(inside) => println!("slot {}", inside.slot()),
    ///     None => println!("all are busy"),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn try_acquire(self) -> Result<Option<AdvisorySemaphoreGuard<M>>, Error> {
        Ok(self.try_acquire_or_return()?.ok())
    }

    /// As [`try_acquire`](Self::try_acquire), but returns the connection if no slot is free.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let inside_or_conn = AdvisorySemaphore::new(conn, ("render", "gpu"), 4).try_acquire_or_return()?;
    /// # Ok(()) }
    /// ```
    pub fn try_acquire_or_return(mut self) -> Result<Result<AdvisorySemaphoreGuard<M>, M>, Error> {
        self.ask = self.ask.as_try();
        Ok(
            match acquire::permit(&mut *self.conn, &self.ask, self.permits)? {
                Some(hold) => Ok(self.guard(hold)),
                None => Err(self.conn),
            },
        )
    }

    /// Acquires a permit, runs `f` and releases the permit, also after an error or a panic of `f`: see
    /// [`AdvisoryLock::run`](crate::AdvisoryLock::run).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> QueryResult<()> {
    /// let import = diesel::sql_query("INSERT INTO items SELECT * FROM staged");
    /// conn.advisory_semaphore(("billing", "import"), 3).run(|conn| import.execute(conn))?;
    /// # Ok(()) }
    /// ```
    pub fn run<T, E>(self, f: impl FnOnce(&mut M::Target) -> Result<T, E>) -> Result<T, E>
    where
        E: From<DieselError>,
    {
        let mut guard = self.acquire().map_err(DieselError::from)?;
        let value = f(&mut guard)?; // an error drops the guard, which releases
        guard.release().map_err(DieselError::from)?;
        Ok(value)
    }

    /// Acquires a permit, runs `f` in a transaction, and releases the permit after COMMIT or ROLLBACK. The session
    /// holds the permit around the transaction, on every server, so `f` sees what earlier holders committed. Inside an
    /// open transaction it returns [`Error::InTransaction`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> QueryResult<()> {
    /// let import = diesel::sql_query("INSERT INTO items SELECT * FROM staged");
    /// conn.advisory_semaphore(("billing", "import"), 3).transaction(|conn| import.execute(conn))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Backend differences
    ///
    /// SQLite: it begins with `BEGIN`, as Diesel's `transaction` does. Other holders may write at the same time.
    pub fn transaction<T, E>(
        mut self,
        f: impl FnOnce(&mut M::Target) -> Result<T, E>,
    ) -> Result<T, E>
    where
        E: From<DieselError>,
    {
        // The permit would be free before the outer COMMIT.
        self.ask.inside_transaction = false;
        let key = self.ask.key.clone();
        let begin = <M::Target as Connection>::TransactionManager::begin_transaction;
        self.run(|conn| transaction::under_lock(conn, &key, begin, f))
    }

    /// Lists the sessions that hold a slot or wait for one, holders first, as far as the server shows them to this
    /// user: see [`Holder`]. It takes 1 round trip on PostgreSQL, once prepared, and 2 or 4 on MySQL and MariaDB. It
    /// fails with [`Error::InvalidKey`], [`Error::Lost`] or [`Error::Database`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let holders = conn.advisory_semaphore(("render", "gpu"), 4).holders()?;
    /// let inside = holders.iter().filter(|holder| holder.granted).count();
    /// # Ok(()) }
    /// ```
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        holders::of_semaphore(&mut *self.conn, &self.ask.key, self.permits)
    }
}
