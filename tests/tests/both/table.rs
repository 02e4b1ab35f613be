use std::sync::Arc;

use diesel::{MysqlConnection, PgConnection, QueryResult, SqliteConnection};
use dlock_tests::{Kind, Server, TestConnection, unique_key};

use crate::flavor::both;
use crate::support::LockTest;

/// A table of the test's own, of different numbers `n`. Dropped with this.
#[derive(Clone, Debug)]
pub(crate) struct Table(Arc<Owner>);

#[derive(Debug)]
struct Owner {
    server: Server,
    name: String,
}

impl Table {
    /// An empty one.
    pub(crate) fn new(server: &Server) -> Self {
        let name = unique_key("t").replace(['/', '-'], "_");
        let table = Self(Arc::new(Owner {
            server: server.clone(),
            name,
        }));
        let name = table.name();
        table.prepare(&format!(
            "CREATE TABLE {name} (n BIGINT NOT NULL, UNIQUE (n))"
        ));
        table
    }

    /// One with a single row, to count in.
    pub(crate) fn counter(server: &Server) -> Self {
        let table = Self::new(server);
        table.prepare(&table.insert(0));
        table
    }

    fn prepare(&self, sql: &str) {
        let server = &self.0.server;
        match server.kind {
            Kind::Postgres => PgConnection::open(server).execute_sql(sql),
            Kind::Mysql => MysqlConnection::open(server).execute_sql(sql),
            Kind::Sqlite => SqliteConnection::open(server).execute_sql(sql),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// The statement that inserts a row. It fails if there is such a row, which on PostgreSQL aborts the transaction.
    pub(crate) fn insert(&self, n: i64) -> String {
        format!("INSERT INTO {} (n) VALUES ({n})", self.name())
    }

    /// The statement that counts the rows.
    pub(crate) fn count(&self) -> String {
        format!("SELECT COUNT(*) FROM {}", self.name())
    }

    /// How many rows `observer` sees.
    #[track_caller]
    pub(crate) fn rows<O: TestConnection>(&self, observer: &mut O) -> i64 {
        observer.number(&self.count()).expect("a count")
    }

    /// The value of a [`counter`](Self::counter).
    #[track_caller]
    pub(crate) fn value<O: TestConnection>(&self, observer: &mut O) -> i64 {
        let value = observer.number(&format!("SELECT n FROM {}", self.name()));
        value.expect("a value")
    }

    /// Reads a counter, and then writes what it was plus one: if two do that at once, an update is lost.
    #[both]
    pub(crate) async fn increment<C: LockTest>(&self, conn: &mut C) -> QueryResult<()> {
        let read = format!("SELECT n FROM {}", self.name());
        let next = conn.try_number(&read).await? + 1;
        // Gives others a chance to come in between.
        crate::support::yield_now().await;
        let write = format!("UPDATE {} SET n = {next}", self.name());
        conn.batch_execute(&write).await
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // With a limit, for after a failure somebody may still use it.
        let drop_table = format!("DROP TABLE {}", self.name);
        let url = &self.server.url;
        let _ = match self.server.kind {
            Kind::Postgres => {
                try_execute::<PgConnection>(url, &["SET lock_timeout = '2s'", &drop_table])
            }
            Kind::Mysql => {
                try_execute::<MysqlConnection>(url, &["SET lock_wait_timeout = 2", &drop_table])
            }
            Kind::Sqlite => {
                try_execute::<SqliteConnection>(url, &["PRAGMA busy_timeout = 2000", &drop_table])
            }
        };
    }
}

fn try_execute<O: TestConnection>(url: &str, statements: &[&str]) -> Option<()> {
    let mut conn = O::establish(url).ok()?;
    statements
        .iter()
        .try_for_each(|sql| conn.batch_execute(sql).ok())
}
