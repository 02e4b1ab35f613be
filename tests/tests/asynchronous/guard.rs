//! A guard is an async connection.

use diesel::result::Error as DieselError;
use diesel::{ExpressionMethods, QueryDsl, QueryResult};
use diesel_async::{
    AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
};
use dlock_diesel_async::AdvisoryLockExt;
use dlock_tests::{
    AsyncTestConnection, Server, TestConnection, on_mysql_async, on_postgres_async, unique_key,
};

use crate::support::*;

diesel::table! {
    users {
        id -> Integer,
        name -> Text,
    }
}

/// Queries of Diesel, methods of the connection, and transactions, all with the guard as the connection.
macro_rules! queries_through_the_guard {
    ($Connection:ty, $server:ident) => {{
        let key = unique_key("async_guard_queries");
        let mut observer = <$Connection as AsyncTestConnection>::Observer::open($server);
        let mut conn = <$Connection as AsyncTestConnection>::open($server).await;
        conn.execute_sql(
            "CREATE TEMPORARY TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)",
        )
        .await;
        let id = conn.backend_id().await;
        let mut lock = conn
            .advisory_lock(&key)
            .acquire()
            .await
            .expect("a free lock");

        let ann = (users::id.eq(1), users::name.eq("Ann"));
        diesel::insert_into(users::table)
            .values(ann)
            .execute(&mut lock)
            .await
            .expect("an insert");
        let loaded: Vec<(i32, String)> = users::table.load(&mut lock).await.expect("the users");
        assert_eq!(loaded, [(1, "Ann".to_owned())]);
        let name: String = users::table
            .find(1)
            .select(users::name)
            .first(&mut *lock)
            .await
            .expect("a user");
        assert_eq!(name, "Ann");
        lock.batch_execute("UPDATE users SET name = 'Bea'")
            .await
            .expect("an update");

        let result = lock
            .transaction(async |conn| {
                let dan = (users::id.eq(2), users::name.eq("Dan"));
                diesel::insert_into(users::table)
                    .values(dan)
                    .execute(conn)
                    .await?;
                Err::<(), _>(DieselError::RollbackTransaction)
            })
            .await;
        assert_eq!(result, Err(DieselError::RollbackTransaction));
        assert_held_by(&mut observer, &key, id);
        let names: Vec<String> = users::table
            .select(users::name)
            .load(&mut lock)
            .await
            .expect("the users");
        assert_eq!(names, ["Bea"]);

        // It is a connection for functions that are generic, too, and stacks.
        async fn count<Conn: AsyncConnection>(conn: &mut Conn) -> QueryResult<()> {
            conn.batch_execute("DELETE FROM users").await
        }
        let mut inner = lock
            .advisory_lock(format!("{key}/inner"))
            .acquire()
            .await
            .expect("a free lock");
        count(&mut inner).await.expect("a statement");
        let rest: Vec<(i32, String)> = users::table.load(&mut inner).await.expect("the users");
        assert!(rest.is_empty());
        inner.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }};
}

on_postgres_async! {
    async fn the_guard_is_an_async_connection_on_postgres(server: &Server) {
        queries_through_the_guard!(AsyncPgConnection, server)
    }
}

on_mysql_async! {
    async fn the_guard_is_an_async_connection_on_mysql(server: &Server) {
        queries_through_the_guard!(AsyncMysqlConnection, server)
    }
}
