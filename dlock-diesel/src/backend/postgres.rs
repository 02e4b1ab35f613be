use diesel::connection::LoadConnection;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::proto::{Answer, Ask, Postgres, Rows, Statement};

use crate::backend::{LockBackend, LockConnection, SharedLocks, TransactionLocks, sealed};
use crate::{shared, transaction};

impl sealed::Sealed for Pg {}
impl sealed::TransactionLocks for Pg {}
impl SharedLocks for Pg {}
impl TransactionLocks for Pg {}

impl LockBackend for Pg {
    type Dialect = Postgres;

    fn load<C>(conn: &mut C, statement: Statement) -> Answer
    where
        C: LoadConnection<Backend = Self>,
    {
        shared::answer(rows(conn, statement).map(Answer::Rows))
    }

    fn transaction<C, T, E>(
        conn: &mut C,
        ask: Ask,
        f: impl FnOnce(&mut C) -> Result<T, E>,
    ) -> Result<T, E>
    where
        C: LockConnection<Backend = Self>,
        E: From<DieselError>,
    {
        transaction::with_lock_inside(conn, ask, f)
    }
}

fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Rows>
where
    C: LoadConnection<Backend = Pg>,
{
    crate::__load!(Pg, conn, statement,)
}
