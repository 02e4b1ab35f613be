use diesel::connection::LoadConnection;
use diesel::prelude::*;
use diesel::result::Error as DieselError;
use diesel::sql_types::Text;
use diesel::sqlite::Sqlite as SqliteBackend;
use dlock_core::proto::{Answer, Ask, Columns, Request, Rows, Sqlite, Statement};

use crate::backend::{LockBackend, LockConnection, SharedLocks, sealed};
use crate::shared::{self, ByText, Number};
use crate::{sqlite, transaction};

impl sealed::Sealed for SqliteBackend {}
impl SharedLocks for SqliteBackend {}

impl LockBackend for SqliteBackend {
    type Dialect = Sqlite;

    fn load<C>(conn: &mut C, statement: Statement) -> Answer
    where
        C: LoadConnection<Backend = Self>,
    {
        let request = statement.request;
        let rows = match statement.columns {
            Columns::Text => ByText::<Text>::new(statement)
                .get_result(conn)
                .map(Rows::Text),
            _ => ByText::<Number>::new(statement)
                .get_result(conn)
                .map(Rows::Number),
        };
        let answer = shared::answer(rows.map(Answer::Rows).map_err(sqlite::explain));
        sqlite::settle(request, answer)
    }

    fn give_up(request: Request) {
        sqlite::give_up(request);
        sqlite::forget(request);
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
        transaction::with_lock_around_writers(conn, ask, f)
    }
}
