//! `AdvisoryLock::transaction`, in its two forms: the transaction holds the lock, or the session holds it around the
//! transaction.

use diesel::connection::TransactionManager;
use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::LockKey;
use dlock_core::Mode;
use dlock_core::proto::{Ask, Depth, TransactionDialect};

use crate::backend::{DialectOf, LockConnection, TransactionLocks};
use crate::run::{self, refused, run};
use crate::shared::trace::{Releasing, Waiting};
use crate::{Error, body, session, shared};

/// The transaction holds the lock. Inside an open transaction, a savepoint takes its place.
pub(crate) fn with_lock_inside<C, T, E>(
    conn: &mut C,
    ask: Ask,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection<Backend: TransactionLocks>,
    E: From<DieselError>,
{
    let outside = run::session(conn, &ask.key)
        .map_err(DieselError::from)?
        .depth;
    if outside.is_none() {
        begin(conn, &ask).map_err(DieselError::from)?;
        return finish(conn, outside, &ask.key, f);
    }
    C::TransactionManager::begin_transaction(conn)?;
    finish(conn, outside, &ask.key, |conn| {
        lock_transaction(conn, &ask)
            .map_err(DieselError::from)?
            .expect(NAMED);
        f(conn)
    })
}

/// Without it the lock that was not granted is no error.
const NAMED: &str = "BUG: Ask::name_holders is on";

/// Begins the transaction together with the lock.
fn begin<C>(conn: &mut C, ask: &Ask) -> Result<(), Error>
where
    C: LockConnection<Backend: TransactionLocks>,
{
    let begun = Waiting::of::<DialectOf<C>>(ask, None).run(|| {
        let machine = DialectOf::<C>::begin(ask).map_err(|failure| refused(failure, &ask.key))?;
        run(conn, machine, &ask.key)
    });
    begun?.expect(NAMED);
    Ok(session::began_transaction(conn)?)
}

/// Takes a lock that ends with the open transaction. `None`: it is taken, and [`Ask::name_holders`] is off.
pub(crate) fn lock_transaction<C>(conn: &mut C, ask: &Ask) -> Result<Option<()>, Error>
where
    C: LockConnection<Backend: TransactionLocks>,
{
    Waiting::of::<DialectOf<C>>(ask, None).run(|| {
        let session = run::session(conn, &ask.key)?;
        let machine = DialectOf::<C>::acquire_in_transaction(ask, session)
            .map_err(|failure| refused(failure, &ask.key))?;
        run(conn, machine, &ask.key)
    })
}

/// The session holds the lock, from before BEGIN until after COMMIT.
pub(crate) fn with_lock_around<C, T, E>(
    conn: &mut C,
    ask: Ask,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    around(conn, ask, C::TransactionManager::begin_transaction, f)
}

/// As [`with_lock_around`], but an exclusive holder writes from the start. On SQLite, a transaction that has read
/// before another connection wrote can never write, whatever `busy_timeout` says.
#[cfg(feature = "sqlite")]
pub(crate) fn with_lock_around_writers<C, T, E>(
    conn: &mut C,
    ask: Ask,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    match ask.mode {
        Mode::Exclusive => around(conn, ask, session::begin_immediate, f),
        Mode::Shared => with_lock_around(conn, ask, f),
    }
}

fn around<C, T, E>(
    conn: &mut C,
    mut ask: Ask,
    begin: impl FnOnce(&mut C) -> QueryResult<()>,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    // `inside_transaction` does not count here: the lock would be free before the outer COMMIT.
    ask.inside_transaction = false;
    let key = ask.key.clone();
    body::run(conn, ask, |conn| under_lock(conn, &key, begin, f))
}

/// Runs `f` in a transaction of a session that holds the lock.
pub(crate) fn under_lock<C, T, E>(
    conn: &mut C,
    key: &LockKey,
    begin: impl FnOnce(&mut C) -> QueryResult<()>,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    let outside = session::session(conn)?.depth;
    begin(conn)?;
    finish(conn, outside, key, f)
}

/// Runs `f` in the transaction that has begun, then commits or rolls back.
fn finish<C, T, E>(
    conn: &mut C,
    outside: Depth,
    key: &LockKey,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    let open = OpenTransaction { conn, key, outside };
    let value = f(open.conn)?; // an error or a panic rolls back
    C::TransactionManager::commit_transaction(open.conn)?;
    if session::session(open.conn)?.depth > outside {
        // `f` began one more transaction and left it open, so the COMMIT above was that one's.
        return Err(DieselError::from(shared::left_open(key)).into());
    }
    Ok(value)
}

/// An open transaction. Dropped, it rolls back.
struct OpenTransaction<'c, C: LockConnection> {
    conn: &'c mut C,
    /// The lock that it is under.
    key: &'c LockKey,
    outside: Depth,
}

impl<C: LockConnection> Drop for OpenTransaction<'_, C> {
    fn drop(&mut self) {
        if session::roll_back_to(self.conn, self.outside).is_err() {
            Releasing::of(self.key).drop(|| {
                session::end(self.conn);
            });
        }
    }
}
