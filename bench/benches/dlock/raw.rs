//! What one would send without dlock, through the same drivers: statements that Diesel keeps prepared, with the text
//! that stands here and the key as a bind.

use std::time::Duration;

use diesel::backend::Backend;
use diesel::connection::{LoadConnection, SimpleConnection};
use diesel::mysql::Mysql;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::sql_types::{BigInt, Bool, Integer, Nullable, SqlType, Text};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection, SimpleAsyncConnection};
use dlock_core::PostgresKey;
use dlock_diesel::LockKey;
use dlock_tests::{AsyncTestConnection, Kind, TestConnection};

/// The answer of a PostgreSQL function that returns nothing.
#[derive(Debug, SqlType, QueryId)]
#[diesel(postgres_type(oid = 2278, array_oid = 0))]
pub(crate) struct Void;

/// A key in the form that a server takes, made before the measurement.
#[derive(Clone, Debug)]
pub(crate) struct RawKey {
    number: i64,
    name: String,
}

impl RawKey {
    pub(crate) fn new(key: &str) -> Self {
        let key = LockKey::from(key);
        let number = match key.to_postgres().expect("a valid key") {
            PostgresKey::BigInt(number) => number,
            PostgresKey::Pair(..) => unreachable!("BUG: text becomes one number"),
        };
        let name = key.to_mysql().expect("a valid key");
        Self { number, name }
    }

    pub(crate) fn numbered(number: i64) -> Self {
        let name = LockKey::from(number).to_mysql().expect("a valid key");
        Self { number, name }
    }

    /// The message that waits until a limit has passed.
    pub(crate) fn time_out(&self, kind: Kind, limit: Duration) -> String {
        let (millis, Self { number, name }) = (limit.as_millis(), self);
        match kind {
            Kind::Postgres => {
                format!("SET lock_timeout = {millis}; SELECT pg_advisory_lock({number})")
            }
            Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
            Kind::Mysql => format!(
                "SELECT /*+ MAX_EXECUTION_TIME({millis}) */ \
                 GET_LOCK('{name}', {millis} /*M! * 0.001 */ /*!80000 DIV 1000 + 1 */)"
            ),
        }
    }

    /// The two messages of a transaction that holds the lock, on PostgreSQL.
    pub(crate) fn begin(&self) -> String {
        format!("BEGIN; SELECT pg_advisory_xact_lock('{}')", self.number)
    }
}

macro_rules! statements {
    ($($name:ident<$backend:ty>($field:ident: $bind:ty) -> $answer:ty = $before:literal, $after:literal;)*) => {$(
        #[derive(Debug)]
        struct $name<'k>(&'k RawKey);

        impl Query for $name<'_> {
            type SqlType = $answer;
        }

        impl QueryId for $name<'_> {
            type QueryId = $name<'static>;
            const HAS_STATIC_QUERY_ID: bool = true;
        }

        impl<C> RunQueryDsl<C> for $name<'_> {}

        impl QueryFragment<$backend> for $name<'_> {
            fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, $backend>) -> QueryResult<()> {
                out.push_sql($before);
                out.push_bind_param::<$bind, _>(&self.0.$field)?;
                out.push_sql($after);
                Ok(())
            }
        }
    )*};
}

statements! {
    PgTry<Pg>(number: BigInt) -> Bool = "SELECT pg_try_advisory_lock(", ")";
    PgWait<Pg>(number: BigInt) -> Void = "SELECT pg_advisory_lock(", ")";
    PgRelease<Pg>(number: BigInt) -> Bool = "SELECT pg_advisory_unlock(", ")";
    MysqlTry<Mysql>(name: Text) -> Nullable<BigInt> = "SELECT GET_LOCK(", ", 0)";
    MysqlWait<Mysql>(name: Text) -> Nullable<BigInt> = "SELECT GET_LOCK(", ", 3600)";
    MysqlRelease<Mysql>(name: Text) -> Nullable<BigInt> = "SELECT RELEASE_LOCK(", ")";
}

/// The least that one can ask.
#[derive(Debug, QueryId)]
struct One;

impl Query for One {
    type SqlType = Integer;
}

impl<C> RunQueryDsl<C> for One {}

impl<DB: Backend> QueryFragment<DB> for One {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.push_sql("SELECT 1");
        Ok(())
    }
}

/// What the statements are, for the tables.
pub(crate) fn pair_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "`SELECT pg_try_advisory_lock($1)`, `SELECT pg_advisory_unlock($1)`",
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => "`SELECT GET_LOCK(?, 0)`, `SELECT RELEASE_LOCK(?)`",
    }
}

/// What waits in the server's queue, for the tables.
pub(crate) fn wait_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "`SELECT pg_advisory_lock($1)`",
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => "`SELECT GET_LOCK(?, 3600)`",
    }
}

/// What waits until a limit has passed, for the tables.
pub(crate) fn time_out_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "`SET lock_timeout = ..; SELECT pg_advisory_lock(..)`, one message",
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => {
            "`SELECT GET_LOCK(.., ..)`, which on MySQL is ended by `MAX_EXECUTION_TIME`, because it takes whole seconds"
        }
    }
}

/// What the transaction is, for the tables.
pub(crate) fn transaction_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => {
            "`BEGIN; SELECT pg_advisory_xact_lock(key)` as one message, `COMMIT` as another"
        }
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => {
            "`SELECT GET_LOCK(?, 0)`, prepared; `BEGIN` and `COMMIT`, each by `batch_execute`, as Diesel's own \
             `transaction` sends them; `SELECT RELEASE_LOCK(?)`, prepared"
        }
    }
}

/// A sync connection that also sends the raw statements.
pub(crate) trait Raw: TestConnection + dlock_diesel::LockConnection {
    fn raw_try(&mut self, key: &RawKey) -> QueryResult<()>;
    fn raw_wait(&mut self, key: &RawKey) -> QueryResult<()>;
    fn raw_release(&mut self, key: &RawKey) -> QueryResult<()>;
    fn raw_transaction(&mut self, key: &RawKey, begin: &str) -> QueryResult<()>;
    fn raw_one(&mut self) -> QueryResult<()>;

    /// On some servers, a limit that has passed is an error.
    fn raw_time_out(&mut self, message: &str) {
        let _ = self.batch_execute(message);
    }
}

/// An async connection that also sends the raw statements.
pub(crate) trait AsyncRaw: AsyncTestConnection {
    fn raw_try(&mut self, key: &RawKey) -> impl Future<Output = QueryResult<()>> + Send;
    fn raw_wait(&mut self, key: &RawKey) -> impl Future<Output = QueryResult<()>> + Send;
    fn raw_release(&mut self, key: &RawKey) -> impl Future<Output = QueryResult<()>> + Send;
    fn raw_transaction(
        &mut self,
        key: &RawKey,
        begin: &str,
    ) -> impl Future<Output = QueryResult<()>> + Send;
    fn raw_one(&mut self) -> impl Future<Output = QueryResult<()>> + Send;

    /// On some servers, a limit that has passed is an error.
    fn raw_time_out(&mut self, message: &str) -> impl Future<Output = ()> + Send {
        async {
            let _ = self.batch_execute(message).await;
        }
    }
}

fn granted(answer: bool) {
    assert!(answer, "a lock that nobody else uses");
}

fn one<C: LoadConnection>(conn: &mut C) -> QueryResult<()>
where
    One: diesel::query_dsl::LoadQuery<'static, C, i32>,
{
    One.get_result::<i32>(conn).map(drop)
}

impl Raw for PgConnection {
    fn raw_try(&mut self, key: &RawKey) -> QueryResult<()> {
        PgTry(key).get_result(self).map(granted)
    }

    fn raw_wait(&mut self, key: &RawKey) -> QueryResult<()> {
        PgWait(key).execute(self).map(drop)
    }

    fn raw_release(&mut self, key: &RawKey) -> QueryResult<()> {
        PgRelease(key).get_result(self).map(granted)
    }

    fn raw_transaction(&mut self, _key: &RawKey, begin: &str) -> QueryResult<()> {
        self.batch_execute(begin)?;
        self.batch_execute("COMMIT")
    }

    fn raw_one(&mut self) -> QueryResult<()> {
        one(self)
    }
}

impl Raw for MysqlConnection {
    fn raw_try(&mut self, key: &RawKey) -> QueryResult<()> {
        let answer: Option<i64> = MysqlTry(key).get_result(self)?;
        granted(answer == Some(1));
        Ok(())
    }

    fn raw_wait(&mut self, key: &RawKey) -> QueryResult<()> {
        let answer: Option<i64> = MysqlWait(key).get_result(self)?;
        granted(answer == Some(1));
        Ok(())
    }

    fn raw_release(&mut self, key: &RawKey) -> QueryResult<()> {
        let answer: Option<i64> = MysqlRelease(key).get_result(self)?;
        granted(answer == Some(1));
        Ok(())
    }

    fn raw_transaction(&mut self, key: &RawKey, _begin: &str) -> QueryResult<()> {
        self.raw_try(key)?;
        self.batch_execute("BEGIN")?;
        self.batch_execute("COMMIT")?;
        self.raw_release(key)
    }

    fn raw_one(&mut self) -> QueryResult<()> {
        one(self)
    }
}

mod asynchronous {
    use diesel_async::RunQueryDsl;

    use super::*;

    impl AsyncRaw for AsyncPgConnection {
        async fn raw_try(&mut self, key: &RawKey) -> QueryResult<()> {
            PgTry(key).get_result(self).await.map(granted)
        }

        async fn raw_wait(&mut self, key: &RawKey) -> QueryResult<()> {
            PgWait(key).execute(self).await.map(drop)
        }

        async fn raw_release(&mut self, key: &RawKey) -> QueryResult<()> {
            PgRelease(key).get_result(self).await.map(granted)
        }

        async fn raw_transaction(&mut self, _key: &RawKey, begin: &str) -> QueryResult<()> {
            self.batch_execute(begin).await?;
            self.batch_execute("COMMIT").await
        }

        async fn raw_one(&mut self) -> QueryResult<()> {
            One.get_result::<i32>(self).await.map(drop)
        }
    }

    impl AsyncRaw for AsyncMysqlConnection {
        async fn raw_try(&mut self, key: &RawKey) -> QueryResult<()> {
            let answer: Option<i64> = MysqlTry(key).get_result(self).await?;
            granted(answer == Some(1));
            Ok(())
        }

        async fn raw_wait(&mut self, key: &RawKey) -> QueryResult<()> {
            let answer: Option<i64> = MysqlWait(key).get_result(self).await?;
            granted(answer == Some(1));
            Ok(())
        }

        async fn raw_release(&mut self, key: &RawKey) -> QueryResult<()> {
            let answer: Option<i64> = MysqlRelease(key).get_result(self).await?;
            granted(answer == Some(1));
            Ok(())
        }

        async fn raw_transaction(&mut self, key: &RawKey, _begin: &str) -> QueryResult<()> {
            self.raw_try(key).await?;
            self.batch_execute("BEGIN").await?;
            self.batch_execute("COMMIT").await?;
            self.raw_release(key).await
        }

        async fn raw_one(&mut self) -> QueryResult<()> {
            One.get_result::<i32>(self).await.map(drop)
        }
    }
}
