use diesel::QueryResult;
use diesel::mysql::Mysql;
use diesel::result::Error as DieselError;
use diesel_async::{AsyncConnection, RunQueryDsl};
use dlock_core::proto::{Answer, Ask, Rows, Statement};
use dlock_diesel::shared;

use crate::backend::{AsyncFunc, AsyncLockBackend, BoxFuture, Cancel, LockConnection};
use crate::transaction;

impl AsyncLockBackend for Mysql {
    async fn load<C>(conn: &mut C, statement: Statement) -> Answer
    where
        C: AsyncConnection<Backend = Self>,
    {
        shared::answer(rows(conn, statement).await.map(Answer::Rows))
    }

    fn transaction<'a, C, F, T, E>(
        conn: &'a mut C,
        ask: Ask,
        cancel: Option<Cancel>,
        f: F,
    ) -> BoxFuture<'a, Result<T, E>>
    where
        C: LockConnection<Backend = Self>,
        for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
            + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        Box::pin(transaction::with_lock_around(conn, ask, cancel, f))
    }
}

async fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Rows>
where
    C: AsyncConnection<Backend = Mysql>,
{
    dlock_diesel::__load!(Mysql, conn, statement, .await)
}
