//! Round trips that sync connections do not take, or not as many of.

use std::time::Duration;

use diesel_async::{AsyncConnection, AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, Kind, Server, on_every_network_server_async, on_mysql_async,
    on_postgres_async, unique_key,
};

use crate::both::round_trips::{Counted, acquire_and_release, timeouts};
use crate::support::*;

const LONG: Duration = Duration::from_secs(60);

/// BEGIN and COMMIT.
const PLAIN_TRANSACTION: u64 = 2;

pub(crate) fn plain_transaction(_: Kind) -> u64 {
    PLAIN_TRANSACTION
}

on_every_network_server_async! {
    async fn a_future_that_is_not_polled_takes_none_and_locks_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_none");
        let (mut counted, mut observer) = (Counted::<C>::open(server).await, C::observer(server));
        let trips = counted.count(async |conn| {
            let acquire = conn.advisory_lock(&key).timeout(LONG).acquire();
            assert_free(&mut observer, &key);
            drop(acquire);
        });
        assert_eq!(trips.await, 0);
        assert_free(&mut observer, &key);
        assert_clean(&mut counted.conn, &mut observer).await;
    }

    async fn inside_a_transaction_a_lock_takes_two_and_so_does_its_release_on_postgres<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_inside");
        let mut counted = Counted::<C>::open(server).await;
        let both = match C::KIND {
            Kind::Postgres => 2 + 2,
            Kind::Sqlite => unreachable!("BUG: it has no wire"),
            Kind::Mysql => 1 + 1,
        };
        let free = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| {
                conn.advisory_lock(&key).inside_transaction().acquire().await?.release().await?;
                Ok::<_, Error>(())
            });
            transaction.await.expect("a free lock");
        });
        assert_eq!(free.await, PLAIN_TRANSACTION + both);
    }
}

on_postgres_async! {
    async fn a_wait_inside_a_transaction_takes_two(server: &Server) {
        let mut counted = Counted::<AsyncPgConnection>::open(server).await;
        let waited = counted.count_wait(server, async |conn, key| {
            conn.transaction(async |conn| {
                conn.advisory_lock(key).inside_transaction().acquire().await?.release().await?;
                Ok(())
            })
            .await
        });
        assert_eq!(waited.await, PLAIN_TRANSACTION + 2 + 2);
    }
}

on_mysql_async! {
    /// MySQL's timeout is an error, whose number has to be asked for.
    async fn a_timeout_takes_one_or_two_more_and_on_mysql_three_before_that(server: &Server) {
        let [acquire, try_acquire] = timeouts::<AsyncMysqlConnection>(server, "").await;
        let limited = if server.is_mariadb() { 3 } else { 3 + 3 };
        assert_eq!(try_acquire, limited);
        // Who has the lock is asked for in one way or in two.
        assert!((limited + 1..=limited + 2).contains(&acquire), "{acquire}");
    }

    async fn lifting_mariadbs_cap_takes_two(server: &Server) {
        let cap = "SET @unused = 1 /*M! , SESSION max_statement_time = 50 */ /*!80000 , SESSION max_execution_time = 50000 */";
        let [_, plain] = timeouts::<AsyncMysqlConnection>(server, "").await;
        let [_, capped] = timeouts::<AsyncMysqlConnection>(server, cap).await;
        let more = if server.is_mariadb() { 2 } else { 0 };
        assert_eq!(capped, plain + more);
        let mut counted = Counted::<AsyncMysqlConnection>::open(server).await;
        counted.conn.execute_sql(cap).await;
        let waited = counted.count_wait(server, acquire_and_release).await;
        assert_eq!(waited, 3 + more + 1);
    }
}
