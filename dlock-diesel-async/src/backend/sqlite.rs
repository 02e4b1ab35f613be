use diesel::QueryResult;
use diesel::result::Error as DieselError;
use diesel::sql_types::Text;
use diesel::sqlite::Sqlite;
use diesel_async::{AsyncConnection, RunQueryDsl};
use dlock_core::proto::{Answer, Ask, Columns, Rows, Statement};
use dlock_diesel::shared::{self, ByText, Number, explain, settle};

use crate::backend::{AsyncFunc, AsyncLockBackend, BoxFuture, Cancel, LockConnection};
use crate::sqlite::{self, Running};
use crate::transaction;

impl AsyncLockBackend for Sqlite {
    const HAS_NETWORK: bool = false;

    async fn load<C>(conn: &mut C, statement: Statement) -> Answer
    where
        C: AsyncConnection<Backend = Self>,
    {
        let request = statement.request;
        let rows = match statement.columns {
            Columns::Text => {
                let query = ByText::<Text>::new(statement);
                Running::new(query.get_result(conn), request)
                    .await
                    .map(Rows::Text)
            }
            _ => {
                let query = ByText::<Number>::new(statement);
                Running::new(query.get_result(conn), request)
                    .await
                    .map(Rows::Number)
            }
        };
        settle(
            request,
            shared::answer(rows.map(Answer::Rows).map_err(explain)),
        )
    }

    /// Blocks this thread until the message is done. What is sent takes almost no time.
    fn send_unread<C>(conn: &mut C, message: &str) -> bool
    where
        C: AsyncConnection<Backend = Self>,
    {
        Running::new(conn.batch_execute(message), None)
            .finish()
            .is_ok()
    }

    async fn begin_writing<C>(conn: &mut C) -> QueryResult<()>
    where
        C: AsyncConnection<Backend = Self>,
    {
        sqlite::begin_immediate(conn).await
    }

    async fn to_the_end<T>(future: impl Future<Output = T> + Send) -> T {
        sqlite::to_the_end(future).await
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
        Box::pin(transaction::with_lock_around_writers(conn, ask, cancel, f))
    }
}
