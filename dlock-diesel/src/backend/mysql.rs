use diesel::connection::LoadConnection;
use diesel::mysql::Mysql as MysqlBackend;
use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::proto::{Answer, Ask, Mysql, Rows, Statement};

use crate::backend::{LockBackend, LockConnection, sealed};
use crate::{shared, transaction};

impl sealed::Sealed for MysqlBackend {}

impl LockBackend for MysqlBackend {
    type Dialect = Mysql;

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
        transaction::with_lock_around(conn, ask, f)
    }
}

fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Rows>
where
    C: LoadConnection<Backend = MysqlBackend>,
{
    crate::__load!(Mysql, conn, statement,)
}
