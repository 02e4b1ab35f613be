use diesel::{
    MysqlConnection, PgConnection, RunQueryDsl,
    connection::LoadConnection,
    dsl::sql,
    expression::SqlLiteral,
    query_dsl::LoadQuery,
    sql_types::{BigInt, Nullable, Text},
};

use crate::{Kind, Server, server::without_password};

/// A Diesel connection that can also look at, and act on, the other sessions of its server.
///
/// A backend is a session, named by `pg_backend_pid()` or `CONNECTION_ID()`.
pub trait TestConnection: LoadConnection + Send + 'static {
    /// Which servers it opens.
    const KIND: Kind;

    /// Opens a connection to `server`.
    ///
    /// # Panics
    ///
    /// If the server does not answer.
    #[track_caller]
    fn open(server: &Server) -> Self {
        Self::open_url(&server.url)
    }

    /// Opens a connection to `url`: that of a [`Proxy`](crate::Proxy), for one.
    ///
    /// # Panics
    ///
    /// If no server answers.
    #[track_caller]
    fn open_url(url: &str) -> Self {
        match Self::establish(url) {
            Ok(conn) => conn,
            Err(error) => panic!("cannot connect to {}: {error}", without_password(url)),
        }
    }

    /// The one number (or truth, as 1 or 0) that a `SELECT` returns.
    ///
    /// # Panics
    ///
    /// If the query fails, or does not return one row.
    fn number(&mut self, sql: &str) -> Option<i64>;

    /// The one text that a `SELECT` returns.
    ///
    /// # Panics
    ///
    /// If the query fails, or does not return one row.
    fn text(&mut self, sql: &str) -> Option<String>;

    /// Sends statements whose answers do not matter.
    ///
    /// # Panics
    ///
    /// If one fails.
    #[track_caller]
    fn execute_sql(&mut self, sql: &str) {
        if let Err(error) = self.batch_execute(sql) {
            panic!("{sql}: {error}");
        }
    }

    /// This session.
    fn backend_id(&mut self) -> i64;

    /// What `dlock_diesel::Holder` calls the session.
    fn holder_id(backend_id: i64) -> i64 {
        backend_id
    }

    /// Ends another session: its client finds the connection closed.
    ///
    /// # Panics
    ///
    /// If there is no such session.
    fn kill(&mut self, backend_id: i64);

    /// Ends the statement that another session runs.
    ///
    /// # Panics
    ///
    /// If there is no such session.
    fn cancel(&mut self, backend_id: i64);

    /// Whether the session is there.
    fn is_connected(&mut self, backend_id: i64) -> bool;

    /// Whether the session waits for an advisory lock or a named lock right now.
    fn is_waiting(&mut self, backend_id: i64) -> bool;
}

impl TestConnection for PgConnection {
    const KIND: Kind = Kind::Postgres;

    #[track_caller]
    fn number(&mut self, sql: &str) -> Option<i64> {
        let text = self.text(sql)?;
        match text.as_str() {
            "true" => Some(1),
            "false" => Some(0),
            text => match text.parse() {
                Ok(number) => Some(number),
                Err(error) => panic!("{sql}: {text:?} is no number: {error}"),
            },
        }
    }

    #[track_caller]
    fn text(&mut self, query: &str) -> Option<String> {
        // The column is a text, whatever its type was.
        value(
            self,
            &format!("SELECT value::text FROM ({query}) AS answer (value)"),
            sql::<Nullable<Text>>,
        )
    }

    fn backend_id(&mut self) -> i64 {
        self.number("SELECT pg_backend_pid()")
            .expect("a backend has an id")
    }

    #[track_caller]
    fn kill(&mut self, backend_id: i64) {
        let done = self.number(&format!("SELECT pg_terminate_backend({backend_id})"));
        assert_eq!(done, Some(1), "there is no backend {backend_id} to kill");
    }

    #[track_caller]
    fn cancel(&mut self, backend_id: i64) {
        let done = self.number(&format!("SELECT pg_cancel_backend({backend_id})"));
        assert_eq!(done, Some(1), "there is no backend {backend_id} to cancel");
    }

    fn is_connected(&mut self, backend_id: i64) -> bool {
        self.number(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {backend_id}"
        )) != Some(0)
    }

    fn is_waiting(&mut self, backend_id: i64) -> bool {
        self.number(&format!(
            "SELECT count(*) FROM pg_locks WHERE pid = {backend_id} AND locktype = 'advisory' AND NOT granted"
        )) != Some(0)
    }
}

impl TestConnection for MysqlConnection {
    const KIND: Kind = Kind::Mysql;

    #[track_caller]
    fn number(&mut self, query: &str) -> Option<i64> {
        value(self, query, sql::<Nullable<BigInt>>)
    }

    #[track_caller]
    fn text(&mut self, query: &str) -> Option<String> {
        value(self, query, sql::<Nullable<Text>>)
    }

    fn backend_id(&mut self) -> i64 {
        self.number("SELECT CAST(CONNECTION_ID() AS SIGNED)")
            .expect("a connection has an id")
    }

    #[track_caller]
    fn kill(&mut self, backend_id: i64) {
        self.execute_sql(&format!("KILL {backend_id}"));
    }

    #[track_caller]
    fn cancel(&mut self, backend_id: i64) {
        self.execute_sql(&format!("KILL QUERY {backend_id}"));
    }

    fn is_connected(&mut self, backend_id: i64) -> bool {
        self.number(&format!(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE id = {backend_id}"
        )) != Some(0)
    }

    fn is_waiting(&mut self, backend_id: i64) -> bool {
        self.number(&format!(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE id = {backend_id} AND state = 'User lock'"
        )) != Some(0)
    }
}

/// The only value of the only row.
#[track_caller]
pub(crate) fn value<C, ST, T>(
    conn: &mut C,
    query: &str,
    literal: impl FnOnce(&str) -> SqlLiteral<ST>,
) -> T
where
    SqlLiteral<ST>: for<'query> LoadQuery<'query, C, T>,
{
    match literal(query).load(conn).map(<[T; 1]>::try_from) {
        Ok(Ok([value])) => value,
        Ok(Err(rows)) => panic!("{query}: {} rows, not one", rows.len()),
        Err(error) => panic!("{query}: {error}"),
    }
}
